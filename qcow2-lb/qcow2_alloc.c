/* Host clusters of an image that is open for writing: refcounts.
 *
 * The refcount table is in memory, whole (8 MiB at the most).  Blocks are held
 * only while they have uncommitted changes; a search reads them one after the
 * other.  In a transaction refcounts only rise from 0, so an existing block
 * may be written at any time before commit: killed there, clusters are leaked.
 *
 * New refcount blocks.  One new block alone gets its cluster first (described
 * by an existing block or by itself), is written and synced, and is linked by
 * one aligned write of its table entry.  With more than one, or when the table
 * is too small, a block could describe the cluster of another that is not
 * linked yet; then a new table is written beside the old one, and the header's
 * first 4096 bytes switch to it at once.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "qcow2_alloc.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "bitmap.h"
#include "byteorder.h"
#include "checked.h"
#include "qcow2_format.h"

#define HELD_BYTES_MAX (UINT64_C(8) << 20)      /* of blocks with changes */
#define HELD_BLOCKS_MIN 4
#define SCAN_BYTES (UINT64_C(4) << 20)          /* of blocks in one search */
#define WRITE_UNIT 4096                         /* of a changed block */

struct held_block {
    uint64_t index;
    uint8_t *data;               /* one cluster */
    bool fresh;                  /* not in the table on disk */
    uint64_t dirty_start, dirty_end; /* bytes; end 0: clean */
};

struct extent {
    uint64_t cluster, count;
};

struct qlb_alloc {
    struct qlb_blkio *io;
    struct qlb_qcow2_header *header;
    unsigned order;              /* of the refcount width */
    uint64_t block_entries;
    uint64_t limit;              /* clusters that the file can have */
    uint64_t hint;               /* no free cluster that we want below it */

    uint64_t *table;             /* offsets of blocks; 0: absent */
    uint64_t n_table;
    bool move_table;             /* commit writes a new table */

    struct held_block *held;
    size_t n_held;
    uint8_t *scan;               /* one block, as on disk */
    uint64_t scan_index;         /* UINT64_MAX: none */

    struct extent *extents;      /* reserved for the caller */
    size_t n_extents;
};

/* ---- entries of a block ---- */

uint64_t qlb_refcount_get(const uint8_t *block, unsigned order,
                          uint64_t index)
{
    unsigned width = 1u << order;

    switch (order) {
    case 3:
        return block[index];
    case 4:
        return get_be16(block + index * 2);
    case 5:
        return get_be32(block + index * 4);
    case 6:
        return get_be64(block + index * 8);
    default:
        return block[(index << order) / 8] >> ((index << order) % 8) &
               ((1u << width) - 1);
    }
}

void qlb_refcount_set(uint8_t *block, unsigned order, uint64_t index,
                      uint64_t value)
{
    unsigned width = 1u << order;
    unsigned shift = (unsigned)((index << order) % 8);
    uint8_t *byte = block + (index << order) / 8;

    switch (order) {
    case 3:
        block[index] = (uint8_t)value;
        return;
    case 4:
        put_be16(block + index * 2, (uint16_t)value);
        return;
    case 5:
        put_be32(block + index * 4, (uint32_t)value);
        return;
    case 6:
        put_be64(block + index * 8, value);
        return;
    default:
        *byte = (uint8_t)((*byte & ~(((1u << width) - 1) << shift)) |
                          (unsigned)value << shift);
    }
}

/* ---- open and close ---- */

static bool overlaps(uint64_t a, uint64_t a_length, uint64_t b,
                     uint64_t b_length)
{
    return a_length != 0 && b_length != 0 && a < b + b_length &&
           b < a + a_length;
}

bool qlb_qcow2_is_metadata(const struct qlb_qcow2_header *header,
                           uint64_t offset, uint64_t length)
{
    return overlaps(offset, length, 0, header->cluster_size) ||
           overlaps(offset, length, header->refcount_table_offset,
                    header->refcount_table_clusters * header->cluster_size) ||
           overlaps(offset, length, header->l1_offset,
                    round_up(header->l1_entries * UINT64_C(8),
                             header->cluster_size)) ||
           (header->has_bitmaps &&
            (header->autoclear & QLB_AUTOCLEAR_BITMAPS) != 0 &&
            overlaps(offset, length, header->bitmap_directory_offset,
                     round_up(header->bitmap_directory_size,
                              header->cluster_size)));
}

static int damaged(const struct qlb_alloc *alloc, const char *what,
                   uint64_t offset, struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_DAMAGED,
                    "%s: %s at offset %llu; repair it with: "
                    "qemu-img check -r all %s", alloc->io->name, what,
                    (unsigned long long)offset, alloc->io->name);
}

/* Swaps and checks the entries of the table. */
static int table_from_disk(struct qlb_alloc *alloc, struct qlb_error *err)
{
    uint64_t cluster_size = alloc->header->cluster_size;

    for (uint64_t i = 0; i < alloc->n_table; i++) {
        uint64_t offset = get_be64(&alloc->table[i]);

        alloc->table[i] = offset;
        if (offset == 0) {
            continue;
        }
        if ((offset & (QLB_REFTABLE_RESERVED | (cluster_size - 1))) != 0 ||
            !range_within(offset, cluster_size, alloc->io->size) ||
            qlb_qcow2_is_metadata(alloc->header, offset, cluster_size)) {
            return damaged(alloc, "there can be no refcount block", offset,
                           err);
        }
    }
    return 0;
}

static int load_table(struct qlb_alloc *alloc, struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = alloc->header;
    uint64_t bytes = header->refcount_table_clusters * header->cluster_size;

    free(alloc->table);
    alloc->table = NULL;
    alloc->n_table = 0;
    if (bytes == 0 || bytes > max_u64(QLB_MAX_REFTABLE_BYTES,
                                      header->cluster_size) ||
        (header->refcount_table_offset & (header->cluster_size - 1)) != 0 ||
        header->refcount_table_offset == 0) {
        return damaged(alloc, "there can be no refcount table",
                       header->refcount_table_offset, err);
    }
    alloc->table = malloc(bytes);
    if (alloc->table == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", alloc->io->name);
    }
    alloc->n_table = bytes / 8;
    if (qlb_blkio_read_padded(alloc->io, alloc->table, bytes,
                              header->refcount_table_offset, err) < 0) {
        return -1;
    }
    return table_from_disk(alloc, err);
}

/* A block device can't grow; a file can, as far as qcow2 goes. */
static uint64_t clusters_limit(const struct qlb_blkio *io,
                               uint64_t cluster_size)
{
    struct stat st;

    if (io->fd >= 0 && fstat(io->fd, &st) == 0 && S_ISBLK(st.st_mode)) {
        return io->size / cluster_size;
    }
    return QLB_MAX_OFFSET / cluster_size;
}

struct qlb_alloc *qlb_alloc_open(struct qlb_blkio *io,
                                 struct qlb_qcow2_header *header,
                                 struct qlb_error *err)
{
    struct qlb_alloc *alloc = calloc(1, sizeof(*alloc));

    if (alloc == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", io->name);
        return NULL;
    }
    alloc->io = io;
    alloc->header = header;
    alloc->order = header->refcount_order;
    alloc->block_entries = (header->cluster_size * 8) >> alloc->order;
    alloc->limit = clusters_limit(io, header->cluster_size);
    alloc->hint = 1;
    alloc->scan_index = UINT64_MAX;
    alloc->scan = malloc(header->cluster_size);
    if (alloc->scan == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", io->name);
        qlb_alloc_close(alloc);
        return NULL;
    }
    if (load_table(alloc, err) < 0) {
        qlb_alloc_close(alloc);
        return NULL;
    }
    return alloc;
}

static void drop_held(struct qlb_alloc *alloc)
{
    for (size_t i = 0; i < alloc->n_held; i++) {
        free(alloc->held[i].data);
    }
    free(alloc->held);
    alloc->held = NULL;
    alloc->n_held = 0;
    alloc->scan_index = UINT64_MAX;
}

void qlb_alloc_close(struct qlb_alloc *alloc)
{
    if (alloc == NULL) {
        return;
    }
    drop_held(alloc);
    free(alloc->extents);
    free(alloc->scan);
    free(alloc->table);
    free(alloc);
}

uint64_t qlb_alloc_block_entries(const struct qlb_alloc *alloc)
{
    return alloc->block_entries;
}

uint64_t qlb_alloc_blocks(const struct qlb_alloc *alloc)
{
    return alloc->n_table;
}

uint64_t qlb_alloc_block_offset(const struct qlb_alloc *alloc, uint64_t index)
{
    return alloc->table[index];
}

/* ---- blocks on disk ---- */

int qlb_alloc_read_block(struct qlb_alloc *alloc, uint64_t index,
                         uint8_t *buf, struct qlb_error *err)
{
    return qlb_blkio_read(alloc->io, buf, alloc->header->cluster_size,
                          alloc->table[index], err);
}

static int write_block_range(struct qlb_alloc *alloc, uint64_t index,
                             const uint8_t *buf, uint64_t start, uint64_t end,
                             struct qlb_error *err)
{
    start = round_down(start, WRITE_UNIT);
    end = min_u64(round_up(end, WRITE_UNIT), alloc->header->cluster_size);
    return qlb_blkio_write(alloc->io, buf + start, end - start,
                           alloc->table[index] + start, err);
}

int qlb_alloc_write_block(struct qlb_alloc *alloc, uint64_t index,
                          const uint8_t *buf, uint64_t first, uint64_t last,
                          struct qlb_error *err)
{
    alloc->scan_index = UINT64_MAX;
    return write_block_range(alloc, index, buf, (first << alloc->order) / 8,
                             (last << alloc->order) / 8 + 1, err);
}

/* ---- held blocks ---- */

static struct held_block *find_held(struct qlb_alloc *alloc, uint64_t index)
{
    for (size_t i = 0; i < alloc->n_held; i++) {
        if (alloc->held[i].index == index) {
            return &alloc->held[i];
        }
    }
    return NULL;
}

static int write_held(struct qlb_alloc *alloc, struct held_block *block,
                      struct qlb_error *err)
{
    uint64_t start = block->dirty_start, end = block->dirty_end;

    if (block->fresh) {
        start = 0;
        end = alloc->header->cluster_size;
    }
    if (end != 0 && write_block_range(alloc, block->index, block->data,
                                      start, end, err) < 0) {
        return -1;
    }
    block->dirty_end = 0;
    return 0;
}

/* Writes the existing blocks out early where many are held: safe, since their
 * entries only rise. */
static int shrink_held(struct qlb_alloc *alloc, struct qlb_error *err)
{
    uint64_t max = max_u64(HELD_BYTES_MAX / alloc->header->cluster_size,
                           HELD_BLOCKS_MIN);
    size_t kept = 0;

    if (alloc->n_held < max) {
        return 0;
    }
    for (size_t i = 0; i < alloc->n_held; i++) {
        if (!alloc->held[i].fresh &&
            write_held(alloc, &alloc->held[i], err) < 0) {
            return -1;
        }
    }
    for (size_t i = 0; i < alloc->n_held; i++) {
        if (alloc->held[i].fresh) {
            alloc->held[kept++] = alloc->held[i];
        } else {
            free(alloc->held[i].data);
        }
    }
    alloc->n_held = kept;
    alloc->scan_index = UINT64_MAX;
    return 0;
}

/* Room for `needed` blocks in the table, and some more, so that placing the
 * table itself rarely asks for more. */
static int grow_table(struct qlb_alloc *alloc, uint64_t needed,
                      struct qlb_error *err)
{
    uint64_t n = max_u64(needed + 1, alloc->n_table + alloc->n_table / 2);
    uint64_t bytes = round_up(n * 8, alloc->header->cluster_size);
    uint64_t *table;

    if (bytes > max_u64(QLB_MAX_REFTABLE_BYTES, alloc->header->cluster_size)) {
        bytes = QLB_MAX_REFTABLE_BYTES;
    }
    if (needed > bytes / 8) {
        return qlb_fail(err, QLB_E_RUNTIME,
                        "%s: no free clusters: the image has the largest "
                        "refcount table it can have", alloc->io->name);
    }
    table = realloc(alloc->table, bytes);
    if (table == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", alloc->io->name);
    }
    memset(table + alloc->n_table, 0, bytes - alloc->n_table * 8);
    alloc->table = table;
    alloc->n_table = bytes / 8;
    alloc->move_table = true;
    return 0;
}

/* The block to change; an absent one is made, without a place yet. */
static struct held_block *hold_block(struct qlb_alloc *alloc, uint64_t index,
                                     struct qlb_error *err)
{
    struct held_block *block = find_held(alloc, index);
    struct held_block *grown;

    if (block != NULL) {
        return block;
    }
    if (shrink_held(alloc, err) < 0 ||
        (index >= alloc->n_table && grow_table(alloc, index + 1, err) < 0)) {
        return NULL;
    }
    grown = realloc(alloc->held, (alloc->n_held + 1) * sizeof(*grown));
    if (grown == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", alloc->io->name);
        return NULL;
    }
    alloc->held = grown;
    block = &grown[alloc->n_held];
    memset(block, 0, sizeof(*block));
    block->index = index;
    block->fresh = alloc->table[index] == 0;
    block->data = calloc(1, alloc->header->cluster_size);
    if (block->data == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", alloc->io->name);
        return NULL;
    }
    if (!block->fresh &&
        qlb_alloc_read_block(alloc, index, block->data, err) < 0) {
        free(block->data);
        return NULL;
    }
    alloc->n_held++;
    return block;
}

/* ---- search ---- */

/* The refcounts of a block as they will be; NULL in *data: all are 0. */
static int look_at_block(struct qlb_alloc *alloc, uint64_t index,
                         const uint8_t **data, unsigned *reads,
                         struct qlb_error *err)
{
    struct held_block *held = find_held(alloc, index);

    *data = NULL;
    if (held != NULL) {
        *data = held->data;
        return 0;
    }
    if (index >= alloc->n_table || alloc->table[index] == 0) {
        return 0;
    }
    if (alloc->scan_index != index) {
        alloc->scan_index = UINT64_MAX;
        if (qlb_alloc_read_block(alloc, index, alloc->scan, err) < 0) {
            return -1;
        }
        alloc->scan_index = index;
        ++*reads;
    }
    *data = alloc->scan;
    return 0;
}

/* Where a search that has seen SCAN_BYTES at the front goes on: that far from
 * the end. A full disk of many TiB would else have all its refcounts read for
 * one cluster; what is freed near the end is still found again. */
static uint64_t tail_start(const struct qlb_alloc *alloc)
{
    uint64_t scan_blocks = max_u64(SCAN_BYTES / alloc->header->cluster_size,
                                   1);
    uint64_t end = alloc->n_table;

    while (end > 0 && alloc->table[end - 1] == 0) {
        end--;
    }
    return end > scan_blocks ? (end - scan_blocks) * alloc->block_entries : 0;
}

static int find_run(struct qlb_alloc *alloc, uint64_t count, uint64_t *first,
                    struct qlb_error *err)
{
    unsigned max_reads = (unsigned)max_u64(
        SCAN_BYTES / alloc->header->cluster_size, 1);
    uint64_t cluster = alloc->hint, run = 0;
    unsigned reads = 0;

    while (run < count && cluster < alloc->limit) {
        uint64_t at = cluster % alloc->block_entries;
        const uint8_t *data;

        if (look_at_block(alloc, cluster / alloc->block_entries, &data,
                          &reads, err) < 0) {
            return -1;
        }
        if (data == NULL) {
            run += alloc->block_entries - at;
            cluster += alloc->block_entries - at;
            continue;
        }
        for (; at < alloc->block_entries && run < count; at++, cluster++) {
            bool is_free = qlb_refcount_get(data, alloc->order, at) == 0;

            run = is_free ? run + 1 : 0;
        }
        if (reads == max_reads && run < count && cluster < tail_start(alloc)) {
            cluster = tail_start(alloc);
            run = 0;
        }
    }
    if (run < count || cluster - run > alloc->limit - count) {
        return qlb_fail_errno(err, ENOSPC, "%s: no room for %llu more "
                              "clusters", alloc->io->name,
                              (unsigned long long)count);
    }
    *first = cluster - run;
    return 0;
}

/* ---- allocation ---- */

static void set_entry(struct qlb_alloc *alloc, struct held_block *block,
                      uint64_t at, uint64_t value)
{
    uint64_t byte = (at << alloc->order) / 8;
    uint64_t end = ((at + 1) << alloc->order) / 8;

    qlb_refcount_set(block->data, alloc->order, at, value);
    if (block->dirty_end == 0) {
        block->dirty_start = byte;
        block->dirty_end = max_u64(end, byte + 1);
    } else {
        block->dirty_start = min_u64(block->dirty_start, byte);
        block->dirty_end = max_u64(block->dirty_end, max_u64(end, byte + 1));
    }
}

/* Finds a run and raises its refcounts in memory. */
static int reserve(struct qlb_alloc *alloc, uint64_t count, uint64_t *offset,
                   struct qlb_error *err)
{
    uint64_t cluster_size = alloc->header->cluster_size;
    uint64_t first = 0;

    if (find_run(alloc, count, &first, err) < 0) {
        return -1;
    }
    if (qlb_qcow2_is_metadata(alloc->header, first * cluster_size,
                              count * cluster_size)) {
        return damaged(alloc, "metadata in use has the refcount 0",
                       first * cluster_size, err);
    }
    for (uint64_t i = first; i < first + count; i++) {
        struct held_block *block;

        block = hold_block(alloc, i / alloc->block_entries, err);
        if (block == NULL) {
            return -1;
        }
        set_entry(alloc, block, i % alloc->block_entries, 1);
    }
    if (count == 1) {
        alloc->hint = first + 1;
    }
    *offset = first * cluster_size;
    return 0;
}

int qlb_alloc_clusters(struct qlb_alloc *alloc, uint64_t count,
                       uint64_t *offset, struct qlb_error *err)
{
    struct extent *grown;

    grown = realloc(alloc->extents, (alloc->n_extents + 1) * sizeof(*grown));
    if (grown == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", alloc->io->name);
    }
    alloc->extents = grown;
    if (reserve(alloc, count, offset, err) < 0) {
        return -1;
    }
    grown[alloc->n_extents].cluster = *offset / alloc->header->cluster_size;
    grown[alloc->n_extents].count = count;
    alloc->n_extents++;
    return 0;
}

/* ---- commit ---- */

static unsigned count_fresh(const struct qlb_alloc *alloc)
{
    unsigned n = 0;

    for (size_t i = 0; i < alloc->n_held; i++) {
        n += alloc->held[i].fresh;
    }
    return n;
}

/* Gives each fresh block its cluster. That may take another fresh block, so
 * the list is walked by index until nothing is without a place. */
static int place_blocks(struct qlb_alloc *alloc, struct qlb_error *err)
{
    for (size_t i = 0; i < alloc->n_held; i++) {
        uint64_t index = alloc->held[i].index;
        uint64_t offset;

        if (alloc->table[index] != 0) {
            continue;
        }
        if (reserve(alloc, 1, &offset, err) < 0) {
            return -1;
        }
        alloc->table[index] = offset;
        /* Existing blocks may have been written out meanwhile, and the list
         * have moved up: begin again. */
        i = (size_t)-1;
    }
    return 0;
}

/* A place for the new table. It may need more blocks, they a larger table:
 * then another place is taken, and the first stays reserved until the caller
 * frees it: *wasted. */
static int place_table(struct qlb_alloc *alloc, uint64_t *offset,
                       struct extent *wasted, struct qlb_error *err)
{
    uint64_t n;

    for (unsigned attempt = 0; attempt < 8; attempt++) {
        uint64_t clusters;

        n = alloc->n_table;
        clusters = n * 8 / alloc->header->cluster_size;
        if (reserve(alloc, clusters, offset, err) < 0 ||
            place_blocks(alloc, err) < 0) {
            return -1;
        }
        wasted[attempt].cluster = *offset / alloc->header->cluster_size;
        wasted[attempt].count = clusters;
        if (alloc->n_table == n) {
            wasted[attempt].count = 0;
            return 0;
        }
    }
    return qlb_fail(err, QLB_E_RUNTIME,
                    "%s: no place for a larger refcount table",
                    alloc->io->name);
}

static int write_table(struct qlb_alloc *alloc, uint64_t offset,
                       struct qlb_error *err)
{
    size_t bytes = alloc->n_table * 8;
    uint8_t *buf = malloc(bytes);
    int ret;

    if (buf == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", alloc->io->name);
    }
    for (uint64_t i = 0; i < alloc->n_table; i++) {
        put_be64(buf + i * 8, alloc->table[i]);
    }
    ret = qlb_blkio_write(alloc->io, buf, bytes, offset, err);
    free(buf);
    return ret;
}

static int write_all_held(struct qlb_alloc *alloc, struct qlb_error *err)
{
    for (size_t i = 0; i < alloc->n_held; i++) {
        if (write_held(alloc, &alloc->held[i], err) < 0) {
            return -1;
        }
    }
    return 0;
}

static int free_extent(struct qlb_alloc *alloc, struct extent extent,
                       struct qlb_error *err)
{
    for (uint64_t i = 0; i < extent.count; i++) {
        uint64_t offset = (extent.cluster + i) * alloc->header->cluster_size;

        if (qlb_alloc_free(alloc, &offset, 1, err) < 0) {
            return -1;
        }
    }
    return 0;
}

/* The header switches to the new table. Killed before: the new clusters in
 * the range of existing blocks are leaked, those of new blocks are free as
 * before. Killed after: the old table is leaked. */
static int commit_moved(struct qlb_alloc *alloc, struct qlb_error *err)
{
    struct qlb_qcow2_header *header = alloc->header;
    uint64_t old_offset = header->refcount_table_offset;
    uint32_t old_clusters = header->refcount_table_clusters;
    struct extent old = { old_offset / header->cluster_size, old_clusters };
    struct extent wasted[8] = { { 0, 0 } };
    uint64_t offset;

    if (place_table(alloc, &offset, wasted, err) < 0 ||
        write_all_held(alloc, err) < 0 ||
        write_table(alloc, offset, err) < 0 ||
        qlb_blkio_sync(alloc->io, err) < 0) {
        return -1;
    }
    header->refcount_table_offset = offset;
    header->refcount_table_clusters =
        (uint32_t)(alloc->n_table * 8 / header->cluster_size);
    if (qlb_qcow2_header_write(header, alloc->io, err) < 0 ||
        qlb_blkio_sync(alloc->io, err) < 0) {
        header->refcount_table_offset = old_offset;
        header->refcount_table_clusters = old_clusters;
        return -1;
    }
    alloc->move_table = false;
    drop_held(alloc);
    for (unsigned i = 0; i < 8; i++) {
        if (free_extent(alloc, wasted[i], err) < 0) {
            return -1;
        }
    }
    return free_extent(alloc, old, err);
}

/* Links the only fresh block by its table entry. */
static int link_fresh(struct qlb_alloc *alloc, struct qlb_error *err)
{
    for (size_t i = 0; i < alloc->n_held; i++) {
        uint64_t index = alloc->held[i].index;
        uint8_t entry[8];

        if (!alloc->held[i].fresh) {
            continue;
        }
        put_be64(entry, alloc->table[index]);
        if (qlb_blkio_write(alloc->io, entry, sizeof(entry),
                            alloc->header->refcount_table_offset + index * 8,
                            err) < 0) {
            return -1;
        }
    }
    return qlb_blkio_sync(alloc->io, err);
}

int qlb_alloc_commit(struct qlb_alloc *alloc, struct qlb_error *err)
{
    if (place_blocks(alloc, err) < 0) {
        return -1;
    }
    if (alloc->move_table || count_fresh(alloc) > 1) {
        return commit_moved(alloc, err);
    }
    if (write_all_held(alloc, err) < 0 ||
        qlb_blkio_sync(alloc->io, err) < 0) {
        return -1;
    }
    if (count_fresh(alloc) > 0 && link_fresh(alloc, err) < 0) {
        return -1;
    }
    drop_held(alloc);
    return 0;
}

int qlb_alloc_abandon(struct qlb_alloc *alloc, struct qlb_error *err)
{
    drop_held(alloc);
    alloc->move_table = false;
    alloc->hint = 1;
    if (load_table(alloc, err) < 0) {
        return -1;
    }
    for (size_t i = 0; i < alloc->n_extents; i++) {
        if (free_extent(alloc, alloc->extents[i], err) < 0) {
            return -1;
        }
    }
    alloc->n_extents = 0;
    return qlb_blkio_sync(alloc->io, err);
}

/* ---- free ---- */

/* Lowers the entries of one block; `count` clusters, all in that block. */
static int free_in_block(struct qlb_alloc *alloc, const uint64_t *offsets,
                         size_t count, struct qlb_error *err)
{
    uint64_t cluster_size = alloc->header->cluster_size;
    uint64_t index = offsets[0] / cluster_size / alloc->block_entries;
    uint64_t first = UINT64_MAX, last = 0;

    if (index >= alloc->n_table || alloc->table[index] == 0) {
        return 0;
    }
    alloc->scan_index = UINT64_MAX;
    if (qlb_alloc_read_block(alloc, index, alloc->scan, err) < 0) {
        return -1;
    }
    for (size_t i = 0; i < count; i++) {
        uint64_t at = offsets[i] / cluster_size % alloc->block_entries;
        uint64_t n = qlb_refcount_get(alloc->scan, alloc->order, at);

        if (n > 0) {
            qlb_refcount_set(alloc->scan, alloc->order, at, n - 1);
            first = min_u64(first, at);
            last = max_u64(last, at);
        }
    }
    if (first == UINT64_MAX) {
        return 0;
    }
    return qlb_alloc_write_block(alloc, index, alloc->scan, first, last, err);
}

int qlb_alloc_free(struct qlb_alloc *alloc, const uint64_t *offsets,
                   size_t count, struct qlb_error *err)
{
    uint64_t span = alloc->block_entries * alloc->header->cluster_size;
    size_t i = 0;

    while (i < count) {
        size_t n = 1;

        while (i + n < count && offsets[i + n] / span == offsets[i] / span) {
            n++;
        }
        if (free_in_block(alloc, offsets + i, n, err) < 0) {
            return -1;
        }
        i += n;
    }
    return 0;
}
