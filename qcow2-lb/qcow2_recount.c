/* Counting what an image refers to.
 *
 * The file is looked at in windows of host clusters, one saturating byte for
 * each; for every window all metadata is walked, and what lies outside the
 * window is passed over.  So memory is bounded, whatever the image's size, and
 * an image of up to 2 TiB (clusters of 64 KiB) takes one pass.
 *
 * Refcounts that are too high while the cluster is in use cost space only, and
 * lowering one to 1 would make the COPIED flags of the active tables wrong.  So
 * they are left alone, unless the caller asks; then only those are to which an
 * active table has the only reference.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "qcow2_recount.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap.h"
#include "byteorder.h"
#include "checked.h"
#include "cleanup.h"
#include "qcow2_bitmaps.h"
#include "qcow2_format.h"

#define WINDOW_MAX (UINT64_C(1) << 25)      /* clusters */
#define L1_CHUNK 8192                       /* entries read at once */
#define SNAPSHOT_ENTRY 40                   /* fixed part */
#define SNAPSHOT_EXTRA_MAX 1024             /* as QEMU */
#define SNAPSHOT_TABLE_MAX (UINT64_C(64) << 20)

enum snapshot_offset {
    SNAPSHOT_L1_OFFSET = 0,
    SNAPSHOT_L1_ENTRIES = 8,
    SNAPSHOT_ID_SIZE = 12,
    SNAPSHOT_NAME_SIZE = 14,
    SNAPSHOT_EXTRA_SIZE = 36,
};

struct recount {
    struct qlb_blkio *io;
    const struct qlb_qcow2_header *header;
    struct qlb_alloc *alloc;
    unsigned flags;
    uint64_t file_end;       /* no reference reaches behind this, bytes */
    uint64_t first, n;       /* the window, clusters */
    uint8_t *counts;         /* n; 255: that or more */
    bool walks_active;       /* in the active L1 and L2 tables now */
    uint8_t *active;         /* n bits: an entry of those refers to it */
    uint8_t *l2;             /* one cluster */
    uint64_t l2_tables;      /* referred to by the L1 table at hand */
    uint64_t leaks;
};

static int damaged(const struct recount *r, const char *what, uint64_t offset,
                   struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_DAMAGED, "%s: %s at offset %llu; repair it "
                    "with: qemu-img check -r all %s", r->io->name, what,
                    (unsigned long long)offset, r->io->name);
}

/* ---- references ---- */

/* Counts one reference to each cluster that the range touches. */
static int mark(struct recount *r, uint64_t offset, uint64_t length,
                struct qlb_error *err)
{
    unsigned bits = r->header->cluster_bits;
    uint64_t cluster, end;

    if (length == 0) {
        return 0;
    }
    if (!range_within(offset, length, r->file_end)) {
        return damaged(r, "a reference to what lies behind the end of the "
                       "file", offset, err);
    }
    cluster = max_u64(offset >> bits, r->first);
    end = min_u64(((offset + length - 1) >> bits) + 1, r->first + r->n);
    for (; cluster < end; cluster++) {
        uint8_t *count = &r->counts[cluster - r->first];

        *count = (uint8_t)(*count + (*count < UINT8_MAX));
    }
    return 0;
}

/* The same for what must begin at a cluster. */
static int mark_aligned(struct recount *r, uint64_t offset, uint64_t length,
                        const char *what, struct qlb_error *err)
{
    if (offset == 0 || (offset & (r->header->cluster_size - 1)) != 0) {
        return damaged(r, what, offset, err);
    }
    if (r->walks_active && (offset >> r->header->cluster_bits) >= r->first &&
        (offset >> r->header->cluster_bits) - r->first < r->n) {
        qlb_bit_set(r->active,
                    (offset >> r->header->cluster_bits) - r->first);
    }
    return mark(r, offset, length, err);
}

static int mark_bitmap_range(void *opaque, uint64_t offset, uint64_t length,
                             struct qlb_error *err)
{
    return mark(opaque, offset, length, err);
}

/* ---- guest data ---- */

static int mark_compressed(struct recount *r, uint64_t entry,
                           struct qlb_error *err)
{
    unsigned shift = 62 - (r->header->cluster_bits - 8);
    uint64_t offset = entry & ((UINT64_C(1) << shift) - 1);
    uint64_t sectors = ((entry & (QLB_L2_COMPRESSED - 1)) >> shift) + 1;

    return mark(r, offset, sectors * QLB_SECTOR - offset % QLB_SECTOR, err);
}

static int walk_l2(struct recount *r, uint64_t table, struct qlb_error *err)
{
    uint64_t cluster_size = r->header->cluster_size;
    unsigned step = r->header->extended_l2 ? 16 : 8;
    bool external = (r->header->incompatible & QLB_INCOMPAT_DATA_FILE) != 0;

    if (qlb_blkio_read_padded(r->io, r->l2, cluster_size, table, err) < 0) {
        return -1;
    }
    for (uint64_t at = 0; at < cluster_size; at += step) {
        uint64_t entry = get_be64(r->l2 + at);
        uint64_t offset = entry & QLB_OFFSET_MASK;
        int ret = 0;

        if (external) {
            continue;
        }
        if (entry & QLB_L2_COMPRESSED) {
            ret = mark_compressed(r, entry & ~QLB_ENTRY_COPIED, err);
        } else if (offset != 0) {
            ret = mark_aligned(r, offset, cluster_size,
                               "a data cluster that is not aligned", err);
        }
        if (ret < 0) {
            return -1;
        }
    }
    return 0;
}

static int walk_l1_chunk(struct recount *r, const uint8_t *chunk, uint64_t n,
                         struct qlb_error *err)
{
    for (uint64_t i = 0; i < n; i++) {
        uint64_t table = get_be64(chunk + i * 8) & QLB_OFFSET_MASK;

        if (table == 0) {
            continue;
        }
        /* Tables of one L1 table are distinct, so that a walk ends. */
        if (r->l2_tables++ > r->file_end >> r->header->cluster_bits) {
            return damaged(r, "an L1 table that refers to an L2 table twice",
                           table, err);
        }
        if (mark_aligned(r, table, r->header->cluster_size,
                         "an L2 table that is not aligned", err) < 0 ||
            walk_l2(r, table, err) < 0) {
            return -1;
        }
    }
    return 0;
}

static int walk_l1(struct recount *r, uint64_t offset, uint64_t entries,
                   struct qlb_error *err)
{
    uint8_t *chunk QLB_AUTO_FREE = NULL;

    if (entries == 0) {
        return 0;
    }
    if (entries > QLB_MAX_L1_BYTES / 8) {
        return damaged(r, "an L1 table that is too large", offset, err);
    }
    if (mark_aligned(r, offset, entries * 8, "an L1 table that is not aligned",
                     err) < 0) {
        return -1;
    }
    chunk = malloc(L1_CHUNK * 8);
    if (chunk == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", r->io->name);
    }
    r->l2_tables = 0;
    for (uint64_t i = 0; i < entries; i += L1_CHUNK) {
        uint64_t n = min_u64(entries - i, L1_CHUNK);

        if (qlb_blkio_read_padded(r->io, chunk, n * 8, offset + i * 8,
                                  err) < 0 ||
            walk_l1_chunk(r, chunk, n, err) < 0) {
            return -1;
        }
    }
    return 0;
}

/* ---- other metadata ---- */

static int walk_snapshots(struct recount *r, struct qlb_error *err)
{
    uint64_t start = r->header->snapshots_offset, offset = start;

    /* Each has an L1 table of its own. */
    if (r->header->n_snapshots > r->file_end >> r->header->cluster_bits) {
        return damaged(r, "a snapshot table with more snapshots than the file "
                       "has clusters", start, err);
    }
    for (uint32_t i = 0; i < r->header->n_snapshots; i++) {
        uint8_t entry[SNAPSHOT_ENTRY];
        uint32_t extra;

        if (qlb_blkio_read(r->io, entry, sizeof(entry), offset, err) < 0) {
            return -1;
        }
        extra = get_be32(entry + SNAPSHOT_EXTRA_SIZE);
        if (extra > SNAPSHOT_EXTRA_MAX) {
            return damaged(r, "a snapshot with too much extra data", offset,
                           err);
        }
        if (walk_l1(r, get_be64(entry + SNAPSHOT_L1_OFFSET),
                    get_be32(entry + SNAPSHOT_L1_ENTRIES), err) < 0) {
            return -1;
        }
        offset = round_up(offset + SNAPSHOT_ENTRY + extra +
                          get_be16(entry + SNAPSHOT_ID_SIZE) +
                          get_be16(entry + SNAPSHOT_NAME_SIZE), 8);
        if (offset - start > SNAPSHOT_TABLE_MAX) {
            return damaged(r, "a snapshot table that is too large", start,
                           err);
        }
    }
    return offset == start ? 0
                           : mark_aligned(r, start, offset - start,
                                          "a snapshot table that is not "
                                          "aligned", err);
}

/* What of the bitmaps can't be walked is an error, or passed over. */
static int skip_or_fail(const struct recount *r, const struct qlb_error *err)
{
    return r->flags & QLB_RECOUNT_SKIP_BITMAPS &&
           err->code == QLB_E_DAMAGED ? 0 : -1;
}

static int walk_bitmaps(struct recount *r, struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = r->header;
    struct qlb_bitmap_directory directory;
    struct qlb_bitmap_entry entry;
    size_t position = 0;
    int ret;

    if (!header->has_bitmaps ||
        (header->autoclear & QLB_AUTOCLEAR_BITMAPS) == 0) {
        return 0;
    }
    if (qlb_bitmap_directory_read(r->io, header, &directory, err) < 0) {
        return skip_or_fail(r, err);
    }
    ret = mark(r, header->bitmap_directory_offset,
               header->bitmap_directory_size, err);
    while (ret == 0 &&
           qlb_bitmap_directory_next(&directory, &position, &entry)) {
        ret = qlb_bitmap_each_cluster(r->io, header, &entry,
                                      mark_bitmap_range, r, err);
        if (ret < 0) {
            ret = skip_or_fail(r, err);
        }
    }
    qlb_bitmap_directory_release(&directory);
    return ret;
}

static int walk_refcounts(struct recount *r, struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = r->header;

    if (mark(r, header->refcount_table_offset,
             header->refcount_table_clusters * header->cluster_size,
             err) < 0) {
        return -1;
    }
    for (uint64_t i = 0; i < qlb_alloc_blocks(r->alloc); i++) {
        uint64_t offset = qlb_alloc_block_offset(r->alloc, i);

        if (offset != 0 && mark(r, offset, header->cluster_size, err) < 0) {
            return -1;
        }
    }
    return 0;
}

static int walk_all(struct recount *r, struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = r->header;

    memset(r->counts, 0, r->n);
    memset(r->active, 0, r->n / 8 + 1);
    if (r->first > r->file_end >> header->cluster_bits) {
        return 0; /* nothing refers to what lies behind the end */
    }
    if (mark(r, 0, 1, err) < 0 || walk_refcounts(r, err) < 0) {
        return -1;
    }
    r->walks_active = true;
    if (walk_l1(r, header->l1_offset, header->l1_entries, err) < 0) {
        return -1;
    }
    r->walks_active = false;
    if (walk_snapshots(r, err) < 0 || walk_bitmaps(r, err) < 0) {
        return -1;
    }
    return 0;
}

/* ---- comparison ---- */

static int too_low(const struct recount *r, uint64_t cluster,
                   struct qlb_error *err)
{
    return damaged(r, "refcounts are wrong: too low for the cluster",
                   cluster << r->header->cluster_bits, err);
}

/* What the refcount should be lowered to; itself: it stays. */
static uint64_t lowered(const struct recount *r, uint64_t refcount,
                        uint64_t cluster)
{
    uint8_t count = r->counts[cluster - r->first];

    if (count == 0) {
        return 0;
    }
    if ((r->flags & QLB_RECOUNT_LOWER) == 0 || count == UINT8_MAX ||
        (count == 1 && qlb_bit_test(r->active, cluster - r->first))) {
        return refcount;
    }
    return count;
}

/* One refcount block, whose clusters begin with `cluster`. */
static int compare_block(struct recount *r, uint64_t index, uint64_t cluster,
                         uint8_t *block, struct qlb_error *err)
{
    const uint8_t *counts = r->counts + (cluster - r->first);
    uint64_t entries = qlb_alloc_block_entries(r->alloc);
    unsigned order = r->header->refcount_order;
    uint64_t first = UINT64_MAX, last = 0;

    if (qlb_alloc_read_block(r->alloc, index, block, err) < 0) {
        return -1;
    }
    for (uint64_t at = 0; at < entries; at++) {
        uint64_t refcount = qlb_refcount_get(block, order, at);

        if (refcount < counts[at]) {
            return too_low(r, cluster + at, err);
        }
        if (lowered(r, refcount, cluster + at) < refcount) {
            r->leaks++;
            qlb_refcount_set(block, order, at,
                             lowered(r, refcount, cluster + at));
            first = min_u64(first, at);
            last = at;
        }
    }
    if (first == UINT64_MAX || (r->flags & QLB_RECOUNT_FREE) == 0) {
        return 0;
    }
    return qlb_alloc_write_block(r->alloc, index, block, first, last, err);
}

/* An absent block says 0 of all its clusters. */
static int check_absent(const struct recount *r, uint64_t cluster,
                        struct qlb_error *err)
{
    uint64_t entries = qlb_alloc_block_entries(r->alloc);

    for (uint64_t i = 0; i < entries; i++) {
        if (r->counts[cluster - r->first + i] > 0) {
            return too_low(r, cluster + i, err);
        }
    }
    return 0;
}

static int compare_window(struct recount *r, uint8_t *block,
                          struct qlb_error *err)
{
    uint64_t entries = qlb_alloc_block_entries(r->alloc);

    for (uint64_t cluster = r->first; cluster < r->first + r->n;
         cluster += entries) {
        uint64_t index = cluster / entries;
        bool absent = index >= qlb_alloc_blocks(r->alloc) ||
                      qlb_alloc_block_offset(r->alloc, index) == 0;

        if ((absent ? check_absent(r, cluster, err)
                    : compare_block(r, index, cluster, block, err)) < 0) {
            return -1;
        }
    }
    return 0;
}

/* Whether anything is to be done in the window: something of the file lies in
 * it, or a refcount block describes it. */
static bool window_matters(const struct recount *r)
{
    uint64_t entries = qlb_alloc_block_entries(r->alloc);

    if (r->first <= r->file_end >> r->header->cluster_bits) {
        return true;
    }
    for (uint64_t i = r->first / entries; i < (r->first + r->n) / entries &&
                                          i < qlb_alloc_blocks(r->alloc);
         i++) {
        if (qlb_alloc_block_offset(r->alloc, i) != 0) {
            return true;
        }
    }
    return false;
}

int qlb_qcow2_recount(struct qlb_blkio *io,
                      const struct qlb_qcow2_header *header,
                      struct qlb_alloc *alloc, unsigned flags,
                      uint64_t *leaks, struct qlb_error *err)
{
    uint64_t entries = qlb_alloc_block_entries(alloc);
    uint64_t in_file = (io->size >> header->cluster_bits) + 2;
    uint64_t end = max_u64(qlb_alloc_blocks(alloc) * entries, in_file);
    struct recount r = {
        .io = io, .header = header, .alloc = alloc, .flags = flags,
        /* The last cluster may be cut off by the end of the file. */
        .file_end = round_up(io->size, header->cluster_size) +
                    header->cluster_size,
        .n = min_u64(round_up(in_file, entries), WINDOW_MAX),
    };
    uint8_t *counts QLB_AUTO_FREE = r.counts = malloc(r.n);
    uint8_t *active QLB_AUTO_FREE = r.active = malloc(r.n / 8 + 1);
    uint8_t *l2 QLB_AUTO_FREE = r.l2 = malloc(header->cluster_size);
    uint8_t *block QLB_AUTO_FREE = malloc(header->cluster_size);

    if (counts == NULL || active == NULL || l2 == NULL || block == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", io->name);
    }
    for (; r.first < end; r.first += r.n) {
        if (window_matters(&r) && (walk_all(&r, err) < 0 ||
                                   compare_window(&r, block, err) < 0)) {
            return -1;
        }
    }
    *leaks = r.leaks;
    return 0;
}
