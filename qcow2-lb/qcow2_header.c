/* Reading and checking the header of a qcow2 image.
 *
 * The order of the checks matters: an image that uses a feature we don't know
 * may give other fields another meaning, so unknown incompatible features are
 * reported before any field they might explain.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "qcow2_header.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "byteorder.h"
#include "checked.h"
#include "cleanup.h"
#include "qcow2_format.h"

#define KNOWN_INCOMPATIBLE                                                    \
    (QLB_INCOMPAT_DIRTY | QLB_INCOMPAT_CORRUPT | QLB_INCOMPAT_DATA_FILE |     \
     QLB_INCOMPAT_COMPRESSION | QLB_INCOMPAT_EXTL2 | QLB_INCOMPAT_ROLLBACK)

#define ULL(n) ((unsigned long long)(n))

static int damaged(struct qlb_blkio *io, struct qlb_error *err,
                   const char *what)
{
    return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged header: %s", io->name,
                    what);
}

/* What the file says and the struct does not keep. */
struct raw_fields {
    uint64_t backing_offset;
    uint32_t backing_size;
    uint32_t compression;
};

static void header_from_disk(struct qlb_qcow2_header *h,
                             struct raw_fields *raw, const uint8_t *p)
{
    h->version = get_be32(p + QLB_H_VERSION);
    raw->backing_offset = get_be64(p + QLB_H_BACKING_OFFSET);
    raw->backing_size = get_be32(p + QLB_H_BACKING_SIZE);
    h->cluster_bits = get_be32(p + QLB_H_CLUSTER_BITS);
    h->size_field = get_be64(p + QLB_H_SIZE);
    h->virtual_size = round_down(h->size_field, QLB_SECTOR);
    h->crypt_method = get_be32(p + QLB_H_CRYPT_METHOD);
    h->l1_entries = get_be32(p + QLB_H_L1_SIZE);
    h->l1_offset = get_be64(p + QLB_H_L1_OFFSET);
    h->refcount_table_offset = get_be64(p + QLB_H_REFTABLE_OFFSET);
    h->refcount_table_clusters = get_be32(p + QLB_H_REFTABLE_CLUSTERS);
    h->n_snapshots = get_be32(p + QLB_H_SNAPSHOTS);
    h->snapshots_offset = get_be64(p + QLB_H_SNAPSHOTS_OFFSET);
    if (h->version == 2) {
        h->refcount_order = 4;
        h->header_length = QLB_H_V2_LENGTH;
        return;
    }
    h->incompatible = get_be64(p + QLB_H_INCOMPATIBLE);
    h->compatible = get_be64(p + QLB_H_COMPATIBLE);
    h->autoclear = get_be64(p + QLB_H_AUTOCLEAR);
    h->refcount_order = get_be32(p + QLB_H_REFCOUNT_ORDER);
    h->header_length = get_be32(p + QLB_H_HEADER_LENGTH);
    if (h->header_length > QLB_H_COMPRESSION) {
        raw->compression = p[QLB_H_COMPRESSION];
    }
}

/* Version, cluster size and header length: what must hold before anything
 * else can be found. */
static int check_frame(struct qlb_qcow2_header *h, struct qlb_blkio *io,
                       struct qlb_error *err)
{
    if (h->version != 2 && h->version != 3) {
        return qlb_fail(err, QLB_E_RUNTIME,
                        "%s: qcow2 version %u is not supported", io->name,
                        h->version);
    }
    if (h->cluster_bits < QLB_MIN_CLUSTER_BITS ||
        h->cluster_bits > QLB_MAX_CLUSTER_BITS) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged header: cluster "
                        "bits %u are not %d to %d", io->name,
                        h->cluster_bits, QLB_MIN_CLUSTER_BITS,
                        QLB_MAX_CLUSTER_BITS);
    }
    h->cluster_size = UINT64_C(1) << h->cluster_bits;
    if (h->version == 3 &&
        (h->header_length < QLB_H_V3_LENGTH || h->header_length % 8 != 0 ||
         h->header_length > h->cluster_size)) {
        return qlb_fail(err, QLB_E_DAMAGED,
                        "%s: damaged header: header length %u", io->name,
                        h->header_length);
    }
    return 0;
}

static int check_backing_place(const struct qlb_qcow2_header *h,
                               const struct raw_fields *raw,
                               struct qlb_blkio *io, struct qlb_error *err)
{
    if (raw->backing_offset == 0) {
        return 0;
    }
    if (raw->backing_size > QLB_MAX_BACKING_NAME) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged header: backing "
                        "file name of %u bytes", io->name, raw->backing_size);
    }
    if (raw->backing_offset < h->header_length ||
        !range_within(raw->backing_offset, raw->backing_size,
                      h->cluster_size)) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged header: backing "
                        "file name at offset %llu", io->name,
                        ULL(raw->backing_offset));
    }
    return 0;
}

/* ---- extensions ---- */

static int add_ext(struct qlb_qcow2_header *h, uint32_t type,
                   const uint8_t *data, uint32_t size, struct qlb_error *err)
{
    struct qlb_header_ext *ext;

    ext = realloc(h->ext, (h->n_ext + 1) * sizeof(*ext));
    if (ext == NULL) {
        return qlb_fail_errno(err, ENOMEM, "header extensions");
    }
    h->ext = ext;
    ext += h->n_ext;
    ext->type = type;
    ext->size = size;
    ext->data = malloc((size_t)size + 1);
    if (ext->data == NULL) {
        return qlb_fail_errno(err, ENOMEM, "header extensions");
    }
    memcpy(ext->data, data, size);
    h->n_ext++;
    return 0;
}

/* Collects the extensions out of the first cluster. They end at the end
 * marker, at the backing file name, or with the cluster. */
static int read_extensions(struct qlb_qcow2_header *h, const uint8_t *cluster,
                           uint64_t end, struct qlb_blkio *io,
                           struct qlb_error *err)
{
    uint64_t pos = h->header_length;

    while (pos + QLB_EXT_HEAD <= end) {
        uint32_t type = get_be32(cluster + pos);
        uint32_t size = get_be32(cluster + pos + 4);

        pos += QLB_EXT_HEAD;
        if (type == QLB_EXT_END) {
            break;
        }
        if (size > end - pos) {
            return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged header: "
                            "extension 0x%08x of %u bytes does not fit",
                            io->name, type, size);
        }
        if (h->n_ext == QLB_MAX_EXTENSIONS) {
            return damaged(io, err, "too many extensions");
        }
        if (add_ext(h, type, cluster + pos, size, err) < 0) {
            return -1;
        }
        pos += round_up(size, 8);
    }
    h->used = min_u64(pos, end);
    return 0;
}

static void release_extensions(struct qlb_qcow2_header *h)
{
    for (unsigned i = 0; i < h->n_ext; i++) {
        free(h->ext[i].data);
    }
    free(h->ext);
    h->ext = NULL;
    h->n_ext = 0;
}

const struct qlb_header_ext *
qlb_qcow2_header_ext(const struct qlb_qcow2_header *header, uint32_t type,
                     bool *twice)
{
    const struct qlb_header_ext *found = NULL;

    if (twice != NULL) {
        *twice = false;
    }
    for (unsigned i = 0; i < header->n_ext; i++) {
        if (header->ext[i].type != type) {
            continue;
        }
        if (found == NULL) {
            found = &header->ext[i];
        } else if (twice != NULL) {
            *twice = true;
        }
    }
    return found;
}

/* An extension that the standard defines: once at the most. */
static int find_once(const struct qlb_qcow2_header *h, uint32_t type,
                     struct qlb_blkio *io, const struct qlb_header_ext **ext,
                     struct qlb_error *err)
{
    bool twice;

    *ext = qlb_qcow2_header_ext(h, type, &twice);
    if (twice) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged header: extension "
                        "0x%08x appears twice", io->name, type);
    }
    return 0;
}

/* A string as QEMU takes it: it ends at a zero byte, if there is one. */
static char *copy_string(const uint8_t *data, size_t size)
{
    return strndup((const char *)data, size);
}

static int read_string_ext(const struct qlb_qcow2_header *h, uint32_t type,
                           uint32_t max, const char *what, char **string,
                           struct qlb_blkio *io, struct qlb_error *err)
{
    const struct qlb_header_ext *ext;

    if (find_once(h, type, io, &ext, err) < 0) {
        return -1;
    }
    if (ext == NULL || ext->size == 0 || ext->data[0] == 0) {
        return 0;
    }
    if (ext->size > max) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged header: %s of %u "
                        "bytes", io->name, what, ext->size);
    }
    *string = copy_string(ext->data, ext->size);
    if (*string == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", io->name);
    }
    return 0;
}

/* Damaged bitmaps don't keep the disk from being read, so nothing is refused
 * here; qlb_bitmap_directory_read checks the fields. What is no bitmaps
 * extension at all is given as one with no bitmaps, which the specification
 * forbids, so that it can't pass for a good one. */
static void read_bitmaps_ext(struct qlb_qcow2_header *h)
{
    const struct qlb_header_ext *ext;
    bool twice;

    ext = qlb_qcow2_header_ext(h, QLB_EXT_BITMAPS, &twice);
    if (ext == NULL) {
        return;
    }
    h->has_bitmaps = true;
    if (twice || ext->size != QLB_EXT_BITMAPS_SIZE ||
        get_be32(ext->data + 4) != 0) {
        return;
    }
    h->n_bitmaps = get_be32(ext->data);
    h->bitmap_directory_size = get_be64(ext->data + 8);
    h->bitmap_directory_offset = get_be64(ext->data + 16);
}

/* ---- what can't be read ---- */

/* The image's own name for a feature; false if it gives none. The name is a
 * stranger's: only what can be printed of it is. */
static bool feature_name(const struct qlb_qcow2_header *h, unsigned bit,
                         char *name)
{
    const struct qlb_header_ext *table;

    table = qlb_qcow2_header_ext(h, QLB_EXT_FEATURE_NAMES, NULL);
    if (table == NULL) {
        return false;
    }
    for (uint32_t pos = 0; table->size - pos >= QLB_FEATURE_ENTRY;
         pos += QLB_FEATURE_ENTRY) {
        const uint8_t *entry = table->data + pos;

        if (entry[0] != QLB_FEATURE_INCOMPATIBLE || entry[1] != bit ||
            entry[2] == 0) {
            continue;
        }
        memcpy(name, entry + 2, QLB_FEATURE_NAME);
        name[QLB_FEATURE_NAME] = 0;
        for (char *c = name; *c; c++) {
            if (!isprint((unsigned char)*c)) {
                *c = '?';
            }
        }
        return true;
    }
    return false;
}

static int check_unknown_features(const struct qlb_qcow2_header *h,
                                  struct qlb_blkio *io, struct qlb_error *err)
{
    uint64_t unknown = h->incompatible & ~KNOWN_INCOMPATIBLE;
    char list[400];
    size_t used = 0;

    if (unknown == 0) {
        return 0;
    }
    for (unsigned bit = 0; bit < 64; bit++) {
        char name[QLB_FEATURE_NAME + 1];

        if (!(unknown & (UINT64_C(1) << bit))) {
            continue;
        }
        if (sizeof(list) - used < sizeof(name) + 8) {
            snprintf(list + used, sizeof(list) - used, ", ...");
            break;
        }
        if (!feature_name(h, bit, name)) {
            snprintf(name, sizeof(name), "bit %u", bit);
        }
        used += (size_t)snprintf(list + used, sizeof(list) - used, "%s%s",
                                 used > 0 ? ", " : "", name);
    }
    return qlb_fail(err, QLB_E_RUNTIME,
                    "%s: unknown incompatible features: %s", io->name, list);
}

static int check_readable(const struct qlb_qcow2_header *h,
                          struct qlb_blkio *io, struct qlb_error *err)
{
    if (h->crypt_method == QLB_CRYPT_AES || h->crypt_method == QLB_CRYPT_LUKS) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: encrypted images (%s) are "
                        "not supported", io->name,
                        h->crypt_method == QLB_CRYPT_AES ? "AES" : "LUKS");
    }
    if (h->crypt_method != QLB_CRYPT_NONE) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: unknown encryption method "
                        "%u", io->name, h->crypt_method);
    }
    if (h->incompatible & QLB_INCOMPAT_CORRUPT) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: the image is marked corrupt; "
                        "repair it with: qemu-img check -r all %s", io->name,
                        io->name);
    }
    if (h->backing_name != NULL && h->backing_format == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the backing file '%s' has no "
                        "recorded format; record it with: qemu-img rebase -u "
                        "-F FORMAT -b %s %s", io->name, h->backing_name,
                        h->backing_name, io->name);
    }
    if ((h->incompatible & QLB_INCOMPAT_DATA_FILE) && h->data_file == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the name of its external "
                        "data file is not recorded; record it with: qemu-img "
                        "amend -o data_file=FILE %s", io->name, io->name);
    }
    return 0;
}

/* ---- fields ---- */

static int check_compression(struct qlb_qcow2_header *h, uint32_t type,
                             struct qlb_blkio *io, struct qlb_error *err)
{
    bool flagged = h->incompatible & QLB_INCOMPAT_COMPRESSION;

    if (flagged != (type != QLB_COMPRESSION_DEFLATE)) {
        return damaged(io, err, "compression type and its feature bit "
                       "contradict each other");
    }
    if (type > QLB_COMPRESSION_ZSTD) {
        return qlb_fail(err, QLB_E_RUNTIME,
                        "%s: unknown compression type %u", io->name, type);
    }
    h->compression = (enum qlb_compression)type;
    return 0;
}

/* A table of `bytes` bytes at offset: aligned, and not past the maximum. */
static bool table_ok(const struct qlb_qcow2_header *h, uint64_t offset,
                     uint64_t bytes, uint64_t max)
{
    return bytes <= max && offset % h->cluster_size == 0 && offset != 0 &&
           offset < QLB_MAX_OFFSET;
}

static int check_l1(const struct qlb_qcow2_header *h, struct qlb_blkio *io,
                    struct qlb_error *err)
{
    uint64_t entry = h->extended_l2 ? 16 : 8;
    uint64_t covered = h->cluster_size * (h->cluster_size / entry);
    uint64_t needed = div_round_up(h->size_field, covered);
    uint64_t bytes = h->l1_entries * UINT64_C(8);

    if (bytes > QLB_MAX_L1_BYTES) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged header: L1 table of "
                        "%u entries", io->name, h->l1_entries);
    }
    if (needed > h->l1_entries) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged header: L1 table of "
                        "%u entries is too small for a disk of %llu bytes",
                        io->name, h->l1_entries, ULL(h->size_field));
    }
    if (h->l1_entries == 0) {
        return 0;
    }
    if (!table_ok(h, h->l1_offset, bytes, QLB_MAX_L1_BYTES)) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged header: L1 table at "
                        "offset %llu", io->name, ULL(h->l1_offset));
    }
    if (!range_within(h->l1_offset, bytes, io->size)) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged: the file ends at "
                        "%llu, before the end of the L1 table at %llu",
                        io->name, ULL(io->size), ULL(h->l1_offset));
    }
    return 0;
}

static int check_refcounts(const struct qlb_qcow2_header *h,
                           struct qlb_blkio *io, struct qlb_error *err)
{
    uint64_t bytes = h->refcount_table_clusters * h->cluster_size;

    if (h->refcount_order > QLB_MAX_REFCOUNT_ORDER) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged header: refcount "
                        "order %u", io->name, h->refcount_order);
    }
    if (bytes == 0 || !table_ok(h, h->refcount_table_offset, bytes,
                                QLB_MAX_REFTABLE_BYTES)) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged header: refcount "
                        "table of %u clusters at offset %llu", io->name,
                        h->refcount_table_clusters,
                        ULL(h->refcount_table_offset));
    }
    if (h->refcount_table_offset >= io->size) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged: the file ends at "
                        "%llu, before the refcount table at %llu", io->name,
                        ULL(io->size), ULL(h->refcount_table_offset));
    }
    return 0;
}

static int check_fields(struct qlb_qcow2_header *h,
                        const struct raw_fields *raw, struct qlb_blkio *io,
                        struct qlb_error *err)
{
    h->extended_l2 = h->incompatible & QLB_INCOMPAT_EXTL2;
    if (h->extended_l2 && h->cluster_bits < QLB_MIN_EXTL2_CLUSTER_BITS) {
        return damaged(io, err, "clusters are too small for extended L2 "
                       "entries");
    }
    if (check_compression(h, raw->compression, io, err) < 0 ||
        check_l1(h, io, err) < 0 || check_refcounts(h, io, err) < 0) {
        return -1;
    }
    if (h->n_snapshots > QLB_MAX_SNAPSHOTS ||
        (h->n_snapshots > 0 &&
         !table_ok(h, h->snapshots_offset, 0, UINT64_MAX))) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged header: %u "
                        "snapshots, table at offset %llu", io->name,
                        h->n_snapshots, ULL(h->snapshots_offset));
    }
    return 0;
}

/* Names, formats and bitmaps: what stands in extensions. */
static int read_names(struct qlb_qcow2_header *h,
                      const struct raw_fields *raw, const uint8_t *cluster,
                      struct qlb_blkio *io, struct qlb_error *err)
{
    const struct qlb_header_ext *table;

    if (raw->backing_offset != 0 && raw->backing_size != 0 &&
        cluster[raw->backing_offset] != 0) {
        h->backing_name = copy_string(cluster + raw->backing_offset,
                                      raw->backing_size);
        if (h->backing_name == NULL) {
            return qlb_fail_errno(err, ENOMEM, "%s", io->name);
        }
        h->backing_offset = raw->backing_offset;
        h->used = max_u64(h->used, raw->backing_offset + raw->backing_size);
    }
    if (find_once(h, QLB_EXT_FEATURE_NAMES, io, &table, err) < 0 ||
        read_string_ext(h, QLB_EXT_BACKING_FORMAT, QLB_MAX_FORMAT_NAME,
                        "backing format name", &h->backing_format, io,
                        err) < 0 ||
        read_string_ext(h, QLB_EXT_DATA_FILE, QLB_MAX_DATA_FILE_NAME,
                        "data file name", &h->data_file, io, err) < 0) {
        return -1;
    }
    read_bitmaps_ext(h);
    if (!(h->incompatible & QLB_INCOMPAT_DATA_FILE)) {
        /* As QEMU: without the feature bit the name means nothing. */
        free(h->data_file);
        h->data_file = NULL;
    } else {
        h->data_file_raw = h->autoclear & QLB_AUTOCLEAR_DATA_FILE_RAW;
    }
    if (h->data_file_raw && h->backing_name != NULL) {
        return damaged(io, err, "a raw external data file and a backing file "
                       "exclude each other");
    }
    return 0;
}

static int parse_header(struct qlb_qcow2_header *h, const uint8_t *cluster,
                        const struct raw_fields *raw, bool for_reading_data,
                        struct qlb_blkio *io, struct qlb_error *err)
{
    uint64_t end = raw->backing_offset ? raw->backing_offset
                                       : h->cluster_size;
    int ret = read_extensions(h, cluster, end, io, err);

    if (for_reading_data && check_unknown_features(h, io, err) < 0) {
        return -1;
    }
    if (ret < 0) {
        return -1;
    }
    if (h->header_length > QLB_H_V3_LENGTH) {
        size_t more = h->header_length - QLB_H_V3_LENGTH;

        h->more = malloc(more);
        if (h->more == NULL) {
            return qlb_fail_errno(err, ENOMEM, "%s", io->name);
        }
        memcpy(h->more, cluster + QLB_H_V3_LENGTH, more);
    }
    if (check_fields(h, raw, io, err) < 0 ||
        read_names(h, raw, cluster, io, err) < 0) {
        return -1;
    }
    return for_reading_data ? check_readable(h, io, err) : 0;
}

static int read_header(struct qlb_qcow2_header *h, struct qlb_blkio *io,
                       bool for_reading_data, struct qlb_error *err)
{
    uint8_t fixed[QLB_H_V3_LENGTH + 8];
    uint8_t *cluster QLB_AUTO_FREE = NULL;
    struct raw_fields raw = { 0 };

    if (qlb_blkio_read_padded(io, fixed, sizeof(fixed), 0, err) < 0) {
        return -1;
    }
    if (get_be32(fixed) != QLB_QCOW2_MAGIC) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: not a qcow2 image",
                        io->name);
    }
    header_from_disk(h, &raw, fixed);
    if (check_frame(h, io, err) < 0) {
        return -1;
    }
    if (check_backing_place(h, &raw, io, err) < 0) {
        if (for_reading_data) {
            check_unknown_features(h, io, err);
        }
        return -1;
    }
    cluster = malloc(h->cluster_size);
    if (cluster == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", io->name);
    }
    if (qlb_blkio_read_padded(io, cluster, h->cluster_size, 0, err) < 0) {
        return -1;
    }
    return parse_header(h, cluster, &raw, for_reading_data, io, err);
}

static struct qlb_qcow2_header *new_header(struct qlb_blkio *io,
                                           bool for_reading_data,
                                           struct qlb_error *err)
{
    struct qlb_qcow2_header *h = calloc(1, sizeof(*h));

    if (h == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", io->name);
        return NULL;
    }
    if (read_header(h, io, for_reading_data, err) < 0) {
        qlb_qcow2_header_free(h);
        return NULL;
    }
    return h;
}

struct qlb_qcow2_header *qlb_qcow2_header_read(struct qlb_blkio *io,
                                               bool for_reading_data,
                                               struct qlb_error *err)
{
    struct qlb_qcow2_header *h = new_header(io, for_reading_data, err);

    if (h != NULL && for_reading_data &&
        (h->incompatible & QLB_INCOMPAT_ROLLBACK)) {
        qlb_fail(err, QLB_E_UNTRUSTED, "%s: a rollback was not finished, its "
                 "content is of no point in time; run lbrestore --in-place "
                 "again, or replace it with: lbrestore --force -o %s",
                 io->name, io->name);
        qlb_qcow2_header_free(h);
        return NULL;
    }
    return h;
}

struct qlb_qcow2_header *
qlb_qcow2_header_read_unfinished(struct qlb_blkio *io, struct qlb_error *err)
{
    return new_header(io, true, err);
}

void qlb_qcow2_header_free(struct qlb_qcow2_header *header)
{
    if (header == NULL) {
        return;
    }
    release_extensions(header);
    free(header->backing_name);
    free(header->backing_format);
    free(header->data_file);
    free(header->more);
    free(header);
}
