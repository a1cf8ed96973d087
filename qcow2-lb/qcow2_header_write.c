/* Changing the header of a qcow2 image and writing it back.
 *
 * Everything that must change together (bitmaps extension, livebackup
 * extension, autoclear bits) lies in the first 4096 bytes, which are written
 * by one write; so header, extensions and end marker have to fit there.  Only
 * the backing file name may lie behind.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "qcow2_header.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "byteorder.h"
#include "checked.h"
#include "cleanup.h"
#include "qcow2_format.h"

#define KNOWN_AUTOCLEAR                                                       \
    (QLB_AUTOCLEAR_BITMAPS | QLB_AUTOCLEAR_DATA_FILE_RAW |                    \
     QLB_AUTOCLEAR_LIVEBACKUP)

struct feature {
    enum qlb_feature_type type;
    uint8_t bit;
    const char *name; /* at most QLB_FEATURE_NAME bytes */
};

static const struct feature livebackup = {
    QLB_FEATURE_AUTOCLEAR, 62, "livebackup",
};
static const struct feature rollback = {
    QLB_FEATURE_INCOMPATIBLE, 62, "unfinished rollback: lbrestore --in-place",
};

/* QEMU writes a table of its own in place of the one it finds: 8 entries by
 * 7.2 and 10.0. Two more may come. */
#define QEMU_FEATURE_ENTRIES 10

/* ---- extensions in memory ---- */

static void remove_ext(struct qlb_qcow2_header *header, unsigned i)
{
    free(header->ext[i].data);
    header->n_ext--;
    memmove(&header->ext[i], &header->ext[i + 1],
            (header->n_ext - i) * sizeof(header->ext[0]));
}

int qlb_qcow2_header_set_ext(struct qlb_qcow2_header *header, uint32_t type,
                             const void *data, uint32_t size,
                             struct qlb_error *err)
{
    struct qlb_header_ext *ext;
    uint8_t *copy = NULL;
    unsigned i = 0;

    if (data != NULL) {
        copy = malloc((size_t)size + 1);
        ext = copy ? realloc(header->ext, (header->n_ext + 1) * sizeof(*ext))
                   : NULL;
        if (ext == NULL) {
            free(copy);
            return qlb_fail_errno(err, ENOMEM, "header extensions");
        }
        header->ext = ext;
        memcpy(copy, data, size);
    }
    /* The first of the type is replaced, so that it keeps its place; others
     * of the type go. */
    while (i < header->n_ext) {
        ext = &header->ext[i];
        if (ext->type != type) {
            i++;
        } else if (copy != NULL) {
            free(ext->data);
            ext->data = copy;
            ext->size = size;
            copy = NULL;
            i++;
        } else {
            remove_ext(header, i);
        }
    }
    if (copy != NULL) {
        header->ext[header->n_ext++] = (struct qlb_header_ext) {
            .type = type, .size = size, .data = copy,
        };
    }
    return 0;
}

/* The entry of a bit in a feature name table; size if it has none. */
static uint32_t find_feature(const struct qlb_header_ext *table,
                             const struct feature *feature)
{
    uint32_t pos;

    for (pos = 0; table->size - pos >= QLB_FEATURE_ENTRY;
         pos += QLB_FEATURE_ENTRY) {
        if (table->data[pos] == feature->type &&
            table->data[pos + 1] == feature->bit) {
            return pos;
        }
    }
    return table->size;
}

static int remove_feature(struct qlb_qcow2_header *header,
                          const struct qlb_header_ext *table,
                          const struct feature *feature,
                          struct qlb_error *err)
{
    uint32_t pos = find_feature(table, feature);
    uint32_t behind;
    uint8_t *data QLB_AUTO_FREE = NULL;

    if (pos == table->size) {
        return 0;
    }
    if (table->size == QLB_FEATURE_ENTRY) {
        return qlb_qcow2_header_set_ext(header, QLB_EXT_FEATURE_NAMES, NULL,
                                        0, err);
    }
    data = malloc(table->size);
    if (data == NULL) {
        return qlb_fail_errno(err, ENOMEM, "feature name table");
    }
    behind = pos + QLB_FEATURE_ENTRY;
    memcpy(data, table->data, pos);
    memcpy(data + pos, table->data + behind, table->size - behind);
    return qlb_qcow2_header_set_ext(header, QLB_EXT_FEATURE_NAMES, data,
                                    table->size - QLB_FEATURE_ENTRY, err);
}

static int add_feature(struct qlb_qcow2_header *header,
                       const struct qlb_header_ext *table,
                       const struct feature *feature,
                       struct qlb_error *err)
{
    /* A tail that is no whole entry means nothing and goes. */
    uint32_t size = table ? table->size - table->size % QLB_FEATURE_ENTRY : 0;
    uint8_t *data QLB_AUTO_FREE = NULL;

    data = calloc(1, size + QLB_FEATURE_ENTRY);
    if (data == NULL) {
        return qlb_fail_errno(err, ENOMEM, "feature name table");
    }
    if (size > 0) {
        memcpy(data, table->data, size);
    }
    data[size] = (uint8_t)feature->type;
    data[size + 1] = feature->bit;
    memcpy(data + size + 2, feature->name, strlen(feature->name));
    return qlb_qcow2_header_set_ext(header, QLB_EXT_FEATURE_NAMES, data,
                                    size + QLB_FEATURE_ENTRY, err);
}

/* ---- layout ---- */

static uint64_t head_size(const struct qlb_qcow2_header *header)
{
    return min_u64(QLB_HEADER_ATOM, header->cluster_size);
}

/* Bytes of header, extensions and end marker. */
static uint64_t extent_of_extensions(const struct qlb_qcow2_header *header)
{
    uint64_t end = header->header_length + QLB_EXT_HEAD;

    for (unsigned i = 0; i < header->n_ext; i++) {
        end += QLB_EXT_HEAD + round_up(header->ext[i].size, 8);
    }
    return end;
}

/* Where a backing file name goes if header, extensions and end marker take
 * `end` bytes: 0 if there is none, or no place for it (*fits tells).
 *
 * A name that lies behind the atom stays.  Otherwise it goes into the atom;
 * or, where that is full, behind all that the header on disk uses, so that it
 * can be written while that header still counts. */
static uint64_t place_name(const struct qlb_qcow2_header *header,
                           uint64_t end, bool *fits)
{
    uint64_t head = head_size(header);
    uint64_t length, place;

    *fits = end <= head;
    if (header->backing_name == NULL || !*fits) {
        return 0;
    }
    if (header->backing_offset >= head) {
        return header->backing_offset;
    }
    length = strlen(header->backing_name);
    if (length <= head - end) {
        return end;
    }
    place = round_up(max_u64(head, header->used), 8);
    *fits = range_within(place, length, header->cluster_size);
    return place;
}

static bool name_fits(const struct qlb_qcow2_header *header, uint64_t end)
{
    bool fits;

    place_name(header, end, &fits);
    return fits;
}

bool qlb_qcow2_header_has_room(const struct qlb_qcow2_header *header)
{
    uint64_t end = extent_of_extensions(header);
    const struct qlb_header_ext *table;
    uint64_t names = 0;

    if (!qlb_qcow2_header_ext(header, QLB_EXT_LIVEBACKUP, NULL)) {
        end += QLB_EXT_HEAD + QLB_EXT_LIVEBACKUP_SIZE;
    }
    if (!qlb_qcow2_header_ext(header, QLB_EXT_BITMAPS, NULL)) {
        end += QLB_EXT_HEAD + QLB_EXT_BITMAPS_SIZE;
    }
    table = qlb_qcow2_header_ext(header, QLB_EXT_FEATURE_NAMES, NULL);
    if (table == NULL) {
        end += QLB_EXT_HEAD;
    } else {
        names = round_up(table->size, 8);
        end -= names;
    }
    end += max_u64(names + QLB_FEATURE_ENTRY,
                   (QEMU_FEATURE_ENTRIES + 1) * QLB_FEATURE_ENTRY);
    return name_fits(header, end);
}

static int name_feature(struct qlb_qcow2_header *header,
                        const struct feature *feature, bool on,
                        struct qlb_error *err)
{
    const struct qlb_header_ext *table;
    uint64_t end = extent_of_extensions(header) + QLB_FEATURE_ENTRY;

    table = qlb_qcow2_header_ext(header, QLB_EXT_FEATURE_NAMES, NULL);
    if (!on) {
        return table ? remove_feature(header, table, feature, err) : 0;
    }
    if (table == NULL) {
        end += QLB_EXT_HEAD;
    } else if (find_feature(table, feature) < table->size) {
        return 0;
    }
    /* The name only makes messages better: without room it is left out. */
    return name_fits(header, end) ? add_feature(header, table, feature, err)
                                  : 0;
}

int qlb_qcow2_header_name_feature(struct qlb_qcow2_header *header, bool on,
                                  struct qlb_error *err)
{
    return name_feature(header, &livebackup, on, err);
}

int qlb_qcow2_header_mark_rollback(struct qlb_qcow2_header *header, bool on,
                                   struct qlb_error *err)
{
    header->incompatible &= ~QLB_INCOMPAT_ROLLBACK;
    header->incompatible |= on ? QLB_INCOMPAT_ROLLBACK : 0;
    return name_feature(header, &rollback, on, err);
}

/* ---- encoding ---- */

static void header_to_disk(const struct qlb_qcow2_header *h, uint8_t *p)
{
    put_be32(p + QLB_H_MAGIC, QLB_QCOW2_MAGIC);
    put_be32(p + QLB_H_VERSION, h->version);
    if (h->backing_name != NULL) {
        put_be64(p + QLB_H_BACKING_OFFSET, h->backing_offset);
        put_be32(p + QLB_H_BACKING_SIZE, (uint32_t)strlen(h->backing_name));
    }
    put_be32(p + QLB_H_CLUSTER_BITS, h->cluster_bits);
    put_be64(p + QLB_H_SIZE, h->size_field);
    put_be32(p + QLB_H_CRYPT_METHOD, h->crypt_method);
    put_be32(p + QLB_H_L1_SIZE, h->l1_entries);
    put_be64(p + QLB_H_L1_OFFSET, h->l1_offset);
    put_be64(p + QLB_H_REFTABLE_OFFSET, h->refcount_table_offset);
    put_be32(p + QLB_H_REFTABLE_CLUSTERS, h->refcount_table_clusters);
    put_be32(p + QLB_H_SNAPSHOTS, h->n_snapshots);
    put_be64(p + QLB_H_SNAPSHOTS_OFFSET, h->snapshots_offset);
    if (h->version == 2) {
        return;
    }
    put_be64(p + QLB_H_INCOMPATIBLE, h->incompatible);
    put_be64(p + QLB_H_COMPATIBLE, h->compatible);
    put_be64(p + QLB_H_AUTOCLEAR, h->autoclear);
    put_be32(p + QLB_H_REFCOUNT_ORDER, h->refcount_order);
    put_be32(p + QLB_H_HEADER_LENGTH, h->header_length);
    if (h->more != NULL) {
        memcpy(p + QLB_H_V3_LENGTH, h->more,
               h->header_length - QLB_H_V3_LENGTH);
    }
}

int qlb_qcow2_header_encode(const struct qlb_qcow2_header *header,
                            uint8_t *buf, size_t size, struct qlb_error *err)
{
    uint64_t pos = header->header_length;
    uint64_t length;

    if (extent_of_extensions(header) > size) {
        return qlb_fail(err, QLB_E_USAGE, "header and extensions take %llu "
                        "bytes, more than %zu",
                        (unsigned long long)extent_of_extensions(header),
                        size);
    }
    memset(buf, 0, size);
    header_to_disk(header, buf);
    for (unsigned i = 0; i < header->n_ext; i++) {
        const struct qlb_header_ext *ext = &header->ext[i];

        put_be32(buf + pos, ext->type);
        put_be32(buf + pos + 4, ext->size);
        memcpy(buf + pos + QLB_EXT_HEAD, ext->data, ext->size);
        pos += QLB_EXT_HEAD + round_up(ext->size, 8);
    }
    if (header->backing_name != NULL) {
        length = strlen(header->backing_name);
        if (range_within(header->backing_offset, length, size)) {
            memcpy(buf + header->backing_offset, header->backing_name,
                   length);
        }
    }
    return 0;
}

int qlb_qcow2_header_set_backing(struct qlb_qcow2_header *header,
                                 const char *name, const char *format,
                                 struct qlb_error *err)
{
    size_t length = strlen(name);
    bool fits;

    if (length == 0 || length > QLB_MAX_BACKING_NAME ||
        strlen(format) > QLB_MAX_FORMAT_NAME) {
        return qlb_fail(err, QLB_E_USAGE, "a backing file name of %zu bytes",
                        length);
    }
    if (qlb_qcow2_header_set_ext(header, QLB_EXT_BACKING_FORMAT, format,
                                 (uint32_t)strlen(format), err) < 0) {
        return -1;
    }
    free(header->backing_name);
    free(header->backing_format);
    header->backing_offset = 0;
    header->backing_name = strdup(name);
    header->backing_format = strdup(format);
    if (header->backing_name == NULL || header->backing_format == NULL) {
        return qlb_fail_errno(err, ENOMEM, "backing file name");
    }
    header->backing_offset = place_name(header, extent_of_extensions(header),
                                        &fits);
    return fits ? 0 : qlb_fail(err, QLB_E_USAGE, "no room in the header for a "
                               "backing file name of %zu bytes", length);
}

/* ---- writing ---- */

static int update_bitmaps_ext(struct qlb_qcow2_header *header,
                              struct qlb_error *err)
{
    uint8_t data[QLB_EXT_BITMAPS_SIZE] = { 0 };

    put_be32(data, header->n_bitmaps);
    put_be64(data + 8, header->bitmap_directory_size);
    put_be64(data + 16, header->bitmap_directory_offset);
    return qlb_qcow2_header_set_ext(header, QLB_EXT_BITMAPS,
                                    header->has_bitmaps ? data : NULL,
                                    sizeof(data), err);
}

int qlb_qcow2_header_write(struct qlb_qcow2_header *header,
                           struct qlb_blkio *io, struct qlb_error *err)
{
    uint8_t buf[QLB_HEADER_ATOM];
    uint64_t head = head_size(header);
    uint64_t end, place, used;
    size_t length;
    bool fits;

    if (update_bitmaps_ext(header, err) < 0) {
        return -1;
    }
    end = extent_of_extensions(header);
    place = place_name(header, end, &fits);
    if (!fits) {
        return qlb_fail(err, QLB_E_USAGE, "%s: no room in the header: header "
                        "extensions and backing file name don't fit",
                        io->name);
    }
    used = end;
    if (place != 0) {
        length = strlen(header->backing_name);
        used = max_u64(end, place + length);
        /* The header on disk does not point there: killed now, the image is
         * in the old state. */
        if (place >= head && place != header->backing_offset &&
            (qlb_blkio_write(io, header->backing_name, length, place,
                             err) < 0 ||
             qlb_blkio_sync(io, err) < 0)) {
            return -1;
        }
    }
    header->backing_offset = place;
    header->autoclear &= KNOWN_AUTOCLEAR;
    if (qlb_qcow2_header_encode(header, buf, head, err) < 0 ||
        qlb_blkio_write(io, buf, head, 0, err) < 0) {
        return -1;
    }
    header->used = used;
    return 0;
}
