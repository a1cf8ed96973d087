/* Writing a new qcow2 image front to back.
 *
 * Layout, in clusters of 64 KiB:
 *
 *     0            header
 *     1 ...        L1 table (its length follows from the virtual size)
 *     then         for each 512 MiB of guest range that has content: its L2
 *                  table, followed by the data clusters
 *     at the end   bitmap data, bitmap table, bitmap directory,
 *                  refcount blocks, refcount table
 *
 * Every cluster of the file is used exactly once, so the refcounts are known
 * by counting: all are 1, those of the refcount structures too.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "qcow2_writer.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "byteorder.h"
#include "checked.h"
#include "cleanup.h"
#include "qcow2_format.h"
#include "qcow2_header.h"

#define CLUSTER_BITS 16
#define CLUSTER (UINT64_C(1) << CLUSTER_BITS)
#define L2_ENTRIES (CLUSTER / 8)
#define L2_COVERS (L2_ENTRIES * CLUSTER)
#define REFCOUNT_ORDER 4
#define BLOCK_ENTRIES (CLUSTER / 2)
#define HEADER_LENGTH 112 /* with the compression type, as QEMU writes it */

#define NO_L2 UINT64_MAX
#define RESERVE_STEP (UINT64_C(256) << 20)

struct qlb_qcow2_writer {
    struct qlb_outfile *out;
    uint64_t virtual_size;
    uint64_t clusters;   /* allocated so far: the next one's number */
    uint64_t reserved;   /* bytes of the file */
    uint64_t l1_entries;
    uint8_t *l1;         /* as it will be on disk, whole clusters */
    uint64_t l1_clusters;
    uint8_t *l2;         /* the table that is being filled */
    uint64_t l2_index;   /* its index in the L1 table; NO_L2: none yet */
    const char *backing_name; /* NULL: none */
    const char *backing_format;
};

static uint64_t allocate(struct qlb_qcow2_writer *w, uint64_t clusters)
{
    uint64_t host = w->clusters << CLUSTER_BITS;

    w->clusters += clusters;
    return host;
}

struct qlb_qcow2_writer *qlb_qcow2_writer_new(struct qlb_outfile *out,
                                              uint64_t virtual_size,
                                              struct qlb_error *err)
{
    struct qlb_qcow2_writer *w;
    uint64_t entries = div_round_up(virtual_size, L2_COVERS);

    if (virtual_size % QLB_SECTOR != 0 || entries * 8 > QLB_MAX_L1_BYTES) {
        qlb_fail(err, QLB_E_USAGE, "%s: no qcow2 image has %llu bytes",
                 qlb_outfile_name(out), (unsigned long long)virtual_size);
        return NULL;
    }
    w = calloc(1, sizeof(*w));
    if (w != NULL) {
        w->out = out;
        w->virtual_size = virtual_size;
        w->l1_entries = max_u64(entries, 1);
        w->l1_clusters = div_round_up(w->l1_entries * 8, CLUSTER);
        w->l1 = calloc(w->l1_clusters, CLUSTER);
        w->l2 = malloc(CLUSTER);
        w->l2_index = NO_L2;
        allocate(w, 1 + w->l1_clusters);
    }
    if (w == NULL || w->l1 == NULL || w->l2 == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", qlb_outfile_name(out));
        qlb_qcow2_writer_free(w);
        return NULL;
    }
    /* Nothing may be left of an image that was on the device before: until
     * the header is written, it is none. */
    if (qlb_outfile_is_block_device(out)) {
        memset(w->l2, 0, CLUSTER);
        if (qlb_outfile_pwrite(out, w->l2, CLUSTER, 0, err) < 0) {
            qlb_qcow2_writer_free(w);
            return NULL;
        }
    }
    return w;
}

void qlb_qcow2_writer_free(struct qlb_qcow2_writer *writer)
{
    if (writer == NULL) {
        return;
    }
    free(writer->l1);
    free(writer->l2);
    free(writer);
}

void qlb_qcow2_writer_set_backing(struct qlb_qcow2_writer *writer,
                                  const char *name, const char *format)
{
    writer->backing_name = name;
    writer->backing_format = format;
}

static int flush_l2(struct qlb_qcow2_writer *w, struct qlb_error *err)
{
    uint64_t host;

    if (w->l2_index == NO_L2) {
        return 0;
    }
    host = get_be64(w->l1 + w->l2_index * 8) & QLB_OFFSET_MASK;
    w->l2_index = NO_L2;
    return qlb_outfile_pwrite(w->out, w->l2, CLUSTER, host, err);
}

static bool is_free(const struct qlb_qcow2_writer *w, uint64_t index,
                    uint64_t first, unsigned clusters)
{
    if (w->l2_index == NO_L2 || index > w->l2_index) {
        return true;
    }
    for (unsigned i = 0; index == w->l2_index && i < clusters; i++) {
        if (get_be64(w->l2 + (first + i) * 8) != 0) {
            return false;
        }
    }
    return index == w->l2_index;
}

/* What is left of the last step, finish() cuts off. */
static void reserve(struct qlb_qcow2_writer *w)
{
    while (w->reserved < w->clusters * CLUSTER) {
        qlb_outfile_reserve(w->out, w->reserved, RESERVE_STEP);
        w->reserved += RESERVE_STEP;
    }
}

/* Makes the table of that number the one that is being filled. */
static int open_l2(struct qlb_qcow2_writer *w, uint64_t index,
                   struct qlb_error *err)
{
    if (w->l2_index == index) {
        return 0;
    }
    if (flush_l2(w, err) < 0) {
        return -1;
    }
    memset(w->l2, 0, CLUSTER);
    w->l2_index = index;
    put_be64(w->l1 + index * 8, allocate(w, 1) | QLB_ENTRY_COPIED);
    return 0;
}

/* Whether they are clusters of the disk, in one table, and free. */
static bool can_take(const struct qlb_qcow2_writer *w, uint64_t offset,
                     unsigned clusters)
{
    uint64_t first = offset % L2_COVERS / CLUSTER;

    return offset % CLUSTER == 0 && offset < w->virtual_size &&
           clusters > 0 && clusters <= L2_ENTRIES - first &&
           (clusters - 1) * CLUSTER < w->virtual_size - offset &&
           is_free(w, offset / L2_COVERS, first, clusters);
}

int qlb_qcow2_writer_allocate(struct qlb_qcow2_writer *writer,
                              uint64_t offset, unsigned clusters,
                              uint64_t *host, struct qlb_error *err)
{
    uint64_t first = offset % L2_COVERS / CLUSTER;

    if (!can_take(writer, offset, clusters)) {
        return qlb_fail(err, QLB_E_USAGE, "%s: can't allocate %u clusters at "
                        "%llu", qlb_outfile_name(writer->out), clusters,
                        (unsigned long long)offset);
    }
    if (open_l2(writer, offset / L2_COVERS, err) < 0) {
        return -1;
    }
    *host = allocate(writer, clusters);
    reserve(writer);
    for (unsigned i = 0; i < clusters; i++) {
        put_be64(writer->l2 + (first + i) * 8,
                 (*host + i * CLUSTER) | QLB_ENTRY_COPIED);
    }
    return 0;
}

int qlb_qcow2_writer_zero(struct qlb_qcow2_writer *writer, uint64_t offset,
                          uint64_t clusters, struct qlb_error *err)
{
    while (clusters > 0) {
        uint64_t first = offset % L2_COVERS / CLUSTER;
        unsigned n = (unsigned)min_u64(clusters, L2_ENTRIES - first);

        if (!can_take(writer, offset, n)) {
            return qlb_fail(err, QLB_E_USAGE, "%s: can't have %u clusters of "
                            "zeroes at %llu", qlb_outfile_name(writer->out), n,
                            (unsigned long long)offset);
        }
        if (open_l2(writer, offset / L2_COVERS, err) < 0) {
            return -1;
        }
        for (unsigned i = 0; i < n; i++) {
            put_be64(writer->l2 + (first + i) * 8, QLB_L2_ZERO);
        }
        offset += n * CLUSTER;
        clusters -= n;
    }
    return 0;
}

/* ---- the bitmap ---- */

/* A cluster of bitmap data in which bit `a` and bit `b` (either may be
 * outside of it) are set; its place in *host. */
static int write_bitmap_cluster(struct qlb_qcow2_writer *w, uint64_t number,
                                uint64_t a, uint64_t b, uint64_t *host,
                                struct qlb_error *err)
{
    uint64_t bits[2] = { a, b };
    uint8_t *data QLB_AUTO_FREE = calloc(1, CLUSTER);

    if (data == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", qlb_outfile_name(w->out));
    }
    for (unsigned i = 0; i < 2; i++) {
        if (bits[i] / (CLUSTER * 8) == number) {
            uint64_t bit = bits[i] % (CLUSTER * 8);

            data[bit / 8] |= (uint8_t)(1u << bit % 8);
        }
    }
    *host = allocate(w, 1);
    return qlb_outfile_pwrite(w->out, data, CLUSTER, *host, err);
}

/* Data and table: all clusters but the first and the last are absent, which
 * reads as clear. */
static int write_bitmap_table(struct qlb_qcow2_writer *w, uint64_t last_bit,
                              uint64_t *table_host, uint32_t *entries,
                              struct qlb_error *err)
{
    uint64_t n = last_bit / (CLUSTER * 8) + 1;
    uint64_t clusters = div_round_up(n * 8, CLUSTER);
    uint8_t *table QLB_AUTO_FREE = calloc(clusters, CLUSTER);
    uint64_t host;

    if (table == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", qlb_outfile_name(w->out));
    }
    if (write_bitmap_cluster(w, 0, 0, last_bit, &host, err) < 0) {
        return -1;
    }
    put_be64(table, host);
    if (n > 1) {
        if (write_bitmap_cluster(w, n - 1, 0, last_bit, &host, err) < 0) {
            return -1;
        }
        put_be64(table + (n - 1) * 8, host);
    }
    *table_host = allocate(w, clusters);
    *entries = (uint32_t)n;
    return qlb_outfile_pwrite(w->out, table, clusters * CLUSTER, *table_host,
                              err);
}

static int write_bitmap(struct qlb_qcow2_writer *w,
                        const struct qlb_qcow2_writer_bitmap *bitmap,
                        struct qlb_qcow2_header *header,
                        struct qlb_error *err)
{
    uint8_t *directory QLB_AUTO_FREE = calloc(1, CLUSTER);
    size_t name = strlen(bitmap->name);
    uint64_t table = 0, last_bit, granules;
    uint32_t entries = 0;

    if (directory == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", qlb_outfile_name(w->out));
    }
    granules = div_round_up(w->virtual_size,
                            UINT64_C(1) << (bitmap->granularity_bits & 63));
    last_bit = granules - 1;
    if (name == 0 || name > QLB_MAX_BITMAP_NAME || granules == 0 ||
        bitmap->granularity_bits < QLB_MIN_GRANULARITY_BITS ||
        bitmap->granularity_bits > QLB_MAX_GRANULARITY_BITS ||
        last_bit / 8 >= QLB_MAX_BITMAP_BYTES) {
        return qlb_fail(err, QLB_E_USAGE, "%s: no bitmap '%s' with granules "
                        "of 2^%u bytes is possible", qlb_outfile_name(w->out),
                        bitmap->name, bitmap->granularity_bits);
    }
    if (write_bitmap_table(w, last_bit, &table, &entries, err) < 0) {
        return -1;
    }
    put_be64(directory, table);
    put_be32(directory + 8, entries);
    put_be32(directory + 12, QLB_BITMAP_AUTO);
    directory[16] = QLB_BITMAP_TYPE_DIRTY;
    directory[17] = (uint8_t)bitmap->granularity_bits;
    put_be16(directory + 18, (uint16_t)name);
    memcpy(directory + QLB_BITMAP_ENTRY, bitmap->name, name);
    header->has_bitmaps = true;
    header->n_bitmaps = 1;
    header->bitmap_directory_size = round_up(QLB_BITMAP_ENTRY + name, 8);
    header->bitmap_directory_offset = allocate(w, 1);
    header->autoclear |= QLB_AUTOCLEAR_BITMAPS;
    return qlb_outfile_pwrite(w->out, directory, CLUSTER,
                              header->bitmap_directory_offset, err);
}

/* ---- refcounts ---- */

/* How many blocks count `used` clusters, those blocks themselves and the
 * table that lists them. */
static void plan_refcounts(uint64_t used, uint64_t *blocks, uint64_t *table)
{
    *blocks = 0;
    *table = 0;
    for (;;) {
        uint64_t total = used + *blocks + *table;
        uint64_t b = div_round_up(total, BLOCK_ENTRIES);
        uint64_t t = div_round_up(b * 8, CLUSTER);

        if (b == *blocks && t == *table) {
            return;
        }
        *blocks = b;
        *table = t;
    }
}

static int write_refcounts(struct qlb_qcow2_writer *w,
                           struct qlb_qcow2_header *header,
                           struct qlb_error *err)
{
    uint64_t blocks, table_clusters, total, first, table_host;
    uint8_t *table QLB_AUTO_FREE = NULL;
    uint8_t *block QLB_AUTO_FREE = malloc(CLUSTER);

    plan_refcounts(w->clusters, &blocks, &table_clusters);
    table = calloc(table_clusters, CLUSTER);
    if (table == NULL || block == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", qlb_outfile_name(w->out));
    }
    first = allocate(w, blocks);
    table_host = allocate(w, table_clusters);
    total = w->clusters;
    for (uint64_t i = 0; i < BLOCK_ENTRIES; i++) {
        put_be16(block + i * 2, 1);
    }
    for (uint64_t i = 0; i < blocks; i++) {
        uint64_t host = first + i * CLUSTER;
        uint64_t n = min_u64(total - i * BLOCK_ENTRIES, BLOCK_ENTRIES);

        memset(block + n * 2, 0, CLUSTER - n * 2);
        put_be64(table + i * 8, host);
        if (qlb_outfile_pwrite(w->out, block, CLUSTER, host, err) < 0) {
            return -1;
        }
    }
    header->refcount_table_offset = table_host;
    header->refcount_table_clusters = (uint32_t)table_clusters;
    return qlb_outfile_pwrite(w->out, table, table_clusters * CLUSTER,
                              table_host, err);
}

/* ---- the header ---- */

static int encode_extensions(struct qlb_qcow2_header *header,
                             const void *ext, struct qlb_error *err)
{
    uint8_t bitmaps[QLB_EXT_BITMAPS_SIZE] = { 0 };

    if (ext != NULL) {
        header->autoclear |= QLB_AUTOCLEAR_LIVEBACKUP;
        if (qlb_qcow2_header_name_feature(header, true, err) < 0 ||
            qlb_qcow2_header_set_ext(header, QLB_EXT_LIVEBACKUP, ext,
                                     QLB_EXT_LIVEBACKUP_SIZE, err) < 0) {
            return -1;
        }
    }
    if (!header->has_bitmaps) {
        return 0;
    }
    put_be32(bitmaps, header->n_bitmaps);
    put_be64(bitmaps + 8, header->bitmap_directory_size);
    put_be64(bitmaps + 16, header->bitmap_directory_offset);
    return qlb_qcow2_header_set_ext(header, QLB_EXT_BITMAPS, bitmaps,
                                    sizeof(bitmaps), err);
}

/* The header goes last: only now the file is an image. */
static int write_header(struct qlb_qcow2_writer *w,
                        struct qlb_qcow2_header *header, const void *ext,
                        struct qlb_error *err)
{
    uint8_t *cluster QLB_AUTO_FREE = malloc(CLUSTER);

    if (cluster == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", qlb_outfile_name(w->out));
    }
    if (encode_extensions(header, ext, err) < 0 ||
        (w->backing_name != NULL &&
         qlb_qcow2_header_set_backing(header, w->backing_name,
                                      w->backing_format, err) < 0) ||
        qlb_qcow2_header_encode(header, cluster, CLUSTER, err) < 0) {
        return -1;
    }
    return qlb_outfile_pwrite(w->out, cluster, CLUSTER, 0, err);
}

static struct qlb_qcow2_header *new_header(const struct qlb_qcow2_writer *w,
                                           struct qlb_error *err)
{
    struct qlb_qcow2_header *h = calloc(1, sizeof(*h));

    if (h != NULL) {
        h->version = 3;
        h->cluster_bits = CLUSTER_BITS;
        h->cluster_size = CLUSTER;
        h->virtual_size = w->virtual_size;
        h->size_field = w->virtual_size;
        h->l1_entries = (uint32_t)w->l1_entries;
        h->l1_offset = CLUSTER;
        h->refcount_order = REFCOUNT_ORDER;
        h->header_length = HEADER_LENGTH;
        h->more = calloc(1, HEADER_LENGTH - QLB_H_V3_LENGTH);
    }
    if (h == NULL || h->more == NULL) {
        qlb_qcow2_header_free(h);
        qlb_fail_errno(err, ENOMEM, "%s", qlb_outfile_name(w->out));
        return NULL;
    }
    return h;
}

int qlb_qcow2_writer_finish(struct qlb_qcow2_writer *writer,
                            const struct qlb_qcow2_writer_bitmap *bitmap,
                            const void *ext, struct qlb_error *err)
{
    struct qlb_qcow2_header *header = new_header(writer, err);
    int ret = -1;

    if (header == NULL) {
        return -1;
    }
    if (flush_l2(writer, err) == 0 &&
        qlb_outfile_pwrite(writer->out, writer->l1,
                           writer->l1_clusters * CLUSTER, CLUSTER,
                           err) == 0 &&
        (bitmap == NULL ||
         write_bitmap(writer, bitmap, header, err) == 0) &&
        write_refcounts(writer, header, err) == 0 &&
        qlb_outfile_truncate(writer->out, writer->clusters * CLUSTER,
                             err) == 0) {
        ret = write_header(writer, header, ext, err);
    }
    qlb_qcow2_header_free(header);
    return ret;
}
