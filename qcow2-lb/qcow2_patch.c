/* Writing guest data into an existing image.
 *
 * Clusters that belong to the active state alone (COPIED all the way) are
 * overwritten where they are.  All others get a new cluster, and their old
 * one, a snapshot's or a compressed one, loses a reference.
 *
 * Changed L2 entries wait in memory, in slices of 4 KiB, until a flush:
 *
 *   1. slices of new L2 tables are written; refcounts rise; sync
 *   2. slices of the tables that are in use, and L1 entries, are written; sync
 *   3. refcounts of what nothing refers to any more go down
 *
 * Data is written at once: to a cluster that is in use already, or to one
 * that is free on disk until step 1, so a killed process leaves nothing but
 * junk there.  At any point every reference on disk has its refcount.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "qcow2_patch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "byteorder.h"
#include "checked.h"
#include "qcow2_alloc.h"
#include "qcow2_format.h"
#include "qcow2_layer.h"

#define ULL(n) ((unsigned long long)(n))

enum {
    SLICE_BITS = 12,
    SLICE_SIZE = 1 << SLICE_BITS,
    SLICES = 1024,          /* direct-mapped: neighbours never collide */
    PENDING_MAX = 1 << 14,  /* clusters that wait for a flush */
    RENEW_AFTER = 1 << 16,  /* clusters, until the allocator begins anew */
};

#define NO_SLICE UINT64_MAX

struct slice {
    uint64_t number; /* of the slice, counted over all L2 tables */
    bool dirty;
    uint8_t *data;   /* NULL: empty */
};

struct qlb_patch {
    struct qlb_blkio *io;
    struct qlb_qcow2_header *header;
    struct qlb_disk_reader *reader; /* of the content as it was */
    uint64_t disk_size;
    struct qlb_alloc *alloc;
    unsigned entry_bits, l2_bits;   /* log2 of bytes, of entries */

    uint64_t *l1;
    bool *l1_fresh;                 /* not in the L1 table on disk */
    uint64_t *fresh;                /* their indexes */
    size_t n_fresh, fresh_room;

    struct slice slices[SLICES];
    uint64_t *garbage;              /* clusters that lose a reference */
    size_t n_garbage, garbage_room;
    uint64_t pending, allocated;    /* since the flush; by this allocator */
    uint8_t *cluster, *zeroes;      /* one cluster each */
};

/* An L2 entry in memory. */
struct place {
    struct slice *slice;
    uint8_t *p;
    uint64_t entry, bitmap; /* the bitmap of extended entries, else 0 */
    bool owned;             /* its table belongs to the active state alone */
};

/* ---- open and close ---- */

static int load_l1(struct qlb_patch *patch, struct qlb_error *err)
{
    uint64_t n = patch->header->l1_entries;
    uint64_t reserved = QLB_L1_RESERVED | (patch->header->cluster_size - 1);

    patch->l1 = calloc(n + 1, sizeof(*patch->l1));
    patch->l1_fresh = calloc(n + 1, sizeof(*patch->l1_fresh));
    if (patch->l1 == NULL || patch->l1_fresh == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", patch->io->name);
    }
    if (n > 0 && qlb_blkio_read(patch->io, patch->l1, n * 8,
                                patch->header->l1_offset, err) < 0) {
        return -1;
    }
    for (uint64_t i = 0; i < n; i++) {
        uint64_t entry = get_be64(&patch->l1[i]);
        uint64_t table = entry & QLB_OFFSET_MASK;

        patch->l1[i] = entry;
        if ((entry & reserved) != 0 ||
            (table != 0 &&
             (!range_within(table, patch->header->cluster_size,
                            patch->io->size) ||
              qlb_qcow2_is_metadata(patch->header, table,
                                    patch->header->cluster_size)))) {
            return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged L1 entry "
                            "0x%016llx", patch->io->name, ULL(entry));
        }
    }
    return 0;
}

static int prepare(struct qlb_patch *patch, const struct qlb_disk *disk,
                   struct qlb_error *err)
{
    patch->cluster = malloc(patch->header->cluster_size);
    patch->zeroes = calloc(1, patch->header->cluster_size);
    if (patch->cluster == NULL || patch->zeroes == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", patch->io->name);
    }
    patch->reader = qlb_disk_reader_new(disk, err);
    if (patch->reader == NULL) {
        return -1;
    }
    patch->alloc = qlb_alloc_open(patch->io, patch->header, err);
    return patch->alloc == NULL ? -1 : load_l1(patch, err);
}

struct qlb_patch *qlb_patch_open(struct qlb_blkio *io,
                                 struct qlb_qcow2_header *header,
                                 const struct qlb_disk *disk,
                                 struct qlb_error *err)
{
    struct qlb_patch *patch = calloc(1, sizeof(*patch));

    if (patch == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", io->name);
        return NULL;
    }
    patch->io = io;
    patch->header = header;
    patch->disk_size = qlb_disk_size(disk);
    patch->entry_bits = header->extended_l2 ? 4 : 3;
    patch->l2_bits = header->cluster_bits - patch->entry_bits;
    for (unsigned i = 0; i < SLICES; i++) {
        patch->slices[i].number = NO_SLICE;
    }
    if (prepare(patch, disk, err) < 0) {
        qlb_patch_close(patch);
        return NULL;
    }
    return patch;
}

void qlb_patch_close(struct qlb_patch *patch)
{
    if (patch == NULL) {
        return;
    }
    for (unsigned i = 0; i < SLICES; i++) {
        free(patch->slices[i].data);
    }
    qlb_alloc_close(patch->alloc);
    qlb_disk_reader_free(patch->reader);
    free(patch->l1);
    free(patch->l1_fresh);
    free(patch->fresh);
    free(patch->garbage);
    free(patch->cluster);
    free(patch->zeroes);
    free(patch);
}

/* ---- lists ---- */

static int append(struct qlb_patch *patch, uint64_t **list, size_t *n,
                  size_t *room, uint64_t value, struct qlb_error *err)
{
    if (*n == *room) {
        size_t more = *room * 2 + 64;
        uint64_t *grown = realloc(*list, more * sizeof(*grown));

        if (grown == NULL) {
            return qlb_fail_errno(err, ENOMEM, "%s", patch->io->name);
        }
        *list = grown;
        *room = more;
    }
    (*list)[(*n)++] = value;
    return 0;
}

static int add_garbage(struct qlb_patch *patch, uint64_t offset,
                       struct qlb_error *err)
{
    patch->pending++;
    return append(patch, &patch->garbage, &patch->n_garbage,
                  &patch->garbage_room, offset, err);
}

static int allocate(struct qlb_patch *patch, uint64_t *offset,
                    struct qlb_error *err)
{
    if (qlb_alloc_clusters(patch->alloc, 1, offset, err) < 0) {
        return -1;
    }
    patch->pending++;
    patch->allocated++;
    return 0;
}

static int compare_offsets(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

/* ---- slices ---- */

static unsigned span_bits(const struct qlb_patch *patch)
{
    return patch->header->cluster_bits + patch->l2_bits;
}

static uint64_t slices_per_table(const struct qlb_patch *patch)
{
    return patch->header->cluster_size >> SLICE_BITS;
}

static uint64_t slice_l1_index(const struct qlb_patch *patch, uint64_t number)
{
    return number / slices_per_table(patch);
}

/* Where the slice is in the file; 0: its table does not exist. */
static uint64_t slice_offset(const struct qlb_patch *patch, uint64_t number)
{
    uint64_t table = patch->l1[slice_l1_index(patch, number)] &
                     QLB_OFFSET_MASK;

    return table == 0 ? 0 : table + number % slices_per_table(patch) *
                                        SLICE_SIZE;
}

static int write_slices(struct qlb_patch *patch, bool fresh,
                        struct qlb_error *err)
{
    for (unsigned i = 0; i < SLICES; i++) {
        struct slice *slice = &patch->slices[i];

        if (!slice->dirty ||
            patch->l1_fresh[slice_l1_index(patch, slice->number)] != fresh) {
            continue;
        }
        if (qlb_blkio_write(patch->io, slice->data, SLICE_SIZE,
                            slice_offset(patch, slice->number), err) < 0) {
            return -1;
        }
        slice->dirty = false;
    }
    return 0;
}

static int link_tables(struct qlb_patch *patch, struct qlb_error *err)
{
    for (size_t i = 0; i < patch->n_fresh; i++) {
        uint64_t index = patch->fresh[i];
        uint8_t entry[8];

        put_be64(entry, patch->l1[index]);
        if (qlb_blkio_write(patch->io, entry, sizeof(entry),
                            patch->header->l1_offset + index * 8, err) < 0) {
            return -1;
        }
        patch->l1_fresh[index] = false;
    }
    patch->n_fresh = 0;
    return 0;
}

/* Begins its search at the front again, and forgets what it gave out. */
static int renew_allocator(struct qlb_patch *patch, struct qlb_error *err)
{
    patch->pending = 0;
    if (patch->allocated < RENEW_AFTER) {
        return 0;
    }
    patch->allocated = 0;
    qlb_alloc_close(patch->alloc);
    patch->alloc = qlb_alloc_open(patch->io, patch->header, err);
    return patch->alloc == NULL ? -1 : 0;
}

int qlb_patch_flush(struct qlb_patch *patch, struct qlb_error *err)
{
    if (write_slices(patch, true, err) < 0 ||
        qlb_alloc_commit(patch->alloc, err) < 0 ||
        write_slices(patch, false, err) < 0 ||
        link_tables(patch, err) < 0 ||
        qlb_blkio_sync(patch->io, err) < 0) {
        return -1;
    }
    /* What the reader holds of the old tables may be given to others now. */
    qlb_disk_reader_forget(patch->reader);
    if (patch->n_garbage > 0) {
        qsort(patch->garbage, patch->n_garbage, sizeof(*patch->garbage),
              compare_offsets);
        if (qlb_alloc_free(patch->alloc, patch->garbage, patch->n_garbage,
                           err) < 0) {
            return -1;
        }
        patch->n_garbage = 0;
    }
    return renew_allocator(patch, err);
}

static int load_slice(struct qlb_patch *patch, uint64_t number,
                      struct slice **found, struct qlb_error *err)
{
    struct slice *slice = &patch->slices[number % SLICES];
    uint64_t offset;

    *found = slice;
    if (slice->number == number) {
        return 0;
    }
    if (slice->dirty && qlb_patch_flush(patch, err) < 0) {
        return -1;
    }
    slice->number = NO_SLICE;
    if (slice->data == NULL) {
        slice->data = malloc(SLICE_SIZE);
        if (slice->data == NULL) {
            return qlb_fail_errno(err, ENOMEM, "%s", patch->io->name);
        }
    }
    offset = slice_offset(patch, number);
    if (offset == 0) {
        memset(slice->data, 0, SLICE_SIZE);
    } else if (qlb_blkio_read(patch->io, slice->data, SLICE_SIZE, offset,
                              err) < 0) {
        return -1;
    }
    slice->number = number;
    return 0;
}

/* ---- L2 entries ---- */

static int damaged_entry(const struct qlb_patch *patch, uint64_t entry,
                         uint64_t offset, struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged L2 entry 0x%016llx for "
                    "guest offset %llu", patch->io->name, ULL(entry),
                    ULL(offset));
}

/* The host clusters that a compressed one lies in. */
static void compressed_range(const struct qlb_patch *patch, uint64_t entry,
                             uint64_t *start, uint64_t *end)
{
    unsigned bits = 62 - (patch->header->cluster_bits - 8);
    uint64_t offset = entry & ((UINT64_C(1) << bits) - 1);
    uint64_t sectors = ((entry & (QLB_L2_COMPRESSED - 1)) >> bits) + 1;

    *start = round_down(offset, patch->header->cluster_size);
    *end = round_down(offset, QLB_SECTOR) + sectors * QLB_SECTOR;
}

static int check_entry(const struct qlb_patch *patch,
                       const struct place *place, uint64_t offset,
                       struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = patch->header;
    uint64_t host = place->entry & QLB_OFFSET_MASK;
    uint32_t alloc = (uint32_t)place->bitmap;
    uint32_t zero = (uint32_t)(place->bitmap >> 32);

    if (place->entry & QLB_L2_COMPRESSED) {
        uint64_t start, end;

        compressed_range(patch, place->entry, &start, &end);
        return (place->entry & QLB_ENTRY_COPIED) || place->bitmap != 0 ||
               start == 0 || start >= patch->io->size
                   ? damaged_entry(patch, place->entry, offset, err) : 0;
    }
    if ((place->entry & QLB_L2_RESERVED) ||
        ((place->entry & QLB_L2_ZERO) && header->extended_l2) ||
        (host & (header->cluster_size - 1)) || (alloc & zero) ||
        (host == 0 && (alloc || (place->entry & QLB_ENTRY_COPIED))) ||
        (host != 0 &&
         (!range_within(host, header->cluster_size,
                        round_up(patch->io->size, header->cluster_size)) ||
          qlb_qcow2_is_metadata(header, host, header->cluster_size)))) {
        return damaged_entry(patch, place->entry, offset, err);
    }
    return 0;
}

static int find(struct qlb_patch *patch, uint64_t offset, struct place *place,
                struct qlb_error *err)
{
    uint64_t cluster = offset >> patch->header->cluster_bits;
    uint64_t byte = cluster << patch->entry_bits;
    uint64_t index = offset >> span_bits(patch);

    if (index >= patch->header->l1_entries) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: guest offset %llu is beyond "
                        "the L1 table", patch->io->name, ULL(offset));
    }
    if (load_slice(patch, byte >> SLICE_BITS, &place->slice, err) < 0) {
        return -1;
    }
    place->p = place->slice->data + (byte & (SLICE_SIZE - 1));
    place->entry = get_be64(place->p);
    place->bitmap = patch->header->extended_l2 ? get_be64(place->p + 8) : 0;
    place->owned = (patch->l1[index] & QLB_ENTRY_COPIED) != 0;
    return check_entry(patch, place, offset, err);
}

/* A table of our own: a new one, or a copy of one that a snapshot shares. Its
 * slices in memory stay as they are. */
static int own_table(struct qlb_patch *patch, uint64_t index,
                     struct qlb_error *err)
{
    uint64_t old = patch->l1[index] & QLB_OFFSET_MASK;
    uint64_t cluster_size = patch->header->cluster_size;
    uint64_t offset;

    if (patch->l1[index] & QLB_ENTRY_COPIED) {
        return 0;
    }
    if (old == 0) {
        memset(patch->cluster, 0, cluster_size);
    } else if (qlb_blkio_read(patch->io, patch->cluster, cluster_size, old,
                              err) < 0 ||
               add_garbage(patch, old, err) < 0) {
        return -1;
    }
    if (allocate(patch, &offset, err) < 0 ||
        append(patch, &patch->fresh, &patch->n_fresh, &patch->fresh_room,
               index, err) < 0 ||
        qlb_blkio_write(patch->io, patch->cluster, cluster_size, offset,
                        err) < 0) {
        return -1;
    }
    patch->l1[index] = offset | QLB_ENTRY_COPIED;
    patch->l1_fresh[index] = true;
    return 0;
}

/* The old clusters of an entry that is replaced. */
static int drop_host(struct qlb_patch *patch, const struct place *place,
                     struct qlb_error *err)
{
    uint64_t host = place->entry & QLB_OFFSET_MASK;
    uint64_t start, end;

    if (!(place->entry & QLB_L2_COMPRESSED)) {
        return host == 0 ? 0 : add_garbage(patch, host, err);
    }
    compressed_range(patch, place->entry, &start, &end);
    for (; start < end; start += patch->header->cluster_size) {
        if (add_garbage(patch, start, err) < 0) {
            return -1;
        }
    }
    return 0;
}

static void set_entry(struct qlb_patch *patch, struct place *place,
                      uint64_t entry, uint64_t bitmap)
{
    put_be64(place->p, entry);
    if (patch->header->extended_l2) {
        put_be64(place->p + 8, bitmap);
    }
    place->slice->dirty = true;
}

/* ---- what an entry says ---- */

#define ALL_ALLOCATED UINT64_C(0x00000000ffffffff)
#define ALL_ZERO UINT64_C(0xffffffff00000000)

static uint64_t host_of(const struct place *place)
{
    return place->entry & QLB_OFFSET_MASK;
}

/* Whether the cluster may be written to where it is. */
static bool is_own(const struct place *place)
{
    return place->owned && (place->entry & QLB_ENTRY_COPIED) &&
           !(place->entry & QLB_L2_COMPRESSED) && host_of(place) != 0;
}

/* The same, and nothing in the tables has to change for it. */
static bool is_plain(const struct qlb_patch *patch, const struct place *place)
{
    return is_own(place) &&
           (patch->header->extended_l2 ? place->bitmap == ALL_ALLOCATED
                                       : !(place->entry & QLB_L2_ZERO));
}

static bool has_backing(const struct qlb_patch *patch)
{
    return patch->header->backing_name != NULL;
}

/* Whether the whole cluster reads as zeroes, by the tables. */
static bool reads_zero(const struct qlb_patch *patch,
                       const struct place *place)
{
    uint32_t alloc = (uint32_t)place->bitmap;

    if (place->entry & QLB_L2_COMPRESSED) {
        return false;
    }
    if (patch->header->extended_l2) {
        return place->bitmap == ALL_ZERO ||
               (alloc == 0 && !has_backing(patch));
    }
    return (place->entry & QLB_L2_ZERO) ||
           (host_of(place) == 0 && !has_backing(patch));
}

/* ---- write ---- */

/* The content of a cluster as it was. Its entry in memory is the one on disk
 * unless it reads as zeroes: all other entries that are made are own ones. */
static int gather(struct qlb_patch *patch, const struct place *place,
                  uint64_t start, struct qlb_error *err)
{
    uint64_t length = 0;

    memset(patch->cluster, 0, patch->header->cluster_size);
    if (reads_zero(patch, place)) {
        return 0;
    }
    if (start < patch->disk_size) {
        length = min_u64(patch->header->cluster_size,
                         patch->disk_size - start);
    }
    return length == 0 ? 0 : qlb_disk_read(patch->reader, patch->cluster,
                                           start, length, err);
}

/* A range within one cluster, which is not plain. */
static int write_cluster(struct qlb_patch *patch, const uint8_t *buf,
                         uint64_t offset, uint64_t length,
                         struct qlb_error *err)
{
    uint64_t cluster_size = patch->header->cluster_size;
    uint64_t start = round_down(offset, cluster_size);
    uint64_t host;
    struct place place;

    if (own_table(patch, offset >> span_bits(patch), err) < 0 ||
        find(patch, offset, &place, err) < 0) {
        return -1;
    }
    if (length < cluster_size) {
        if (gather(patch, &place, start, err) < 0) {
            return -1;
        }
        memcpy(patch->cluster + (offset - start), buf, length);
        buf = patch->cluster;
    }
    host = host_of(&place);
    if (!is_own(&place) && (drop_host(patch, &place, err) < 0 ||
                            allocate(patch, &host, err) < 0)) {
        return -1;
    }
    set_entry(patch, &place, host | QLB_ENTRY_COPIED, ALL_ALLOCATED);
    return qlb_blkio_write(patch->io, buf, cluster_size, host, err);
}

/* Bytes from offset on that can be written to one place of the file without a
 * change of tables; 0: none. */
static int plain_run(struct qlb_patch *patch, uint64_t offset,
                     uint64_t length, uint64_t *host, uint64_t *run,
                     struct qlb_error *err)
{
    uint64_t cluster_size = patch->header->cluster_size;

    *run = 0;
    while (*run < length) {
        uint64_t at = offset + *run;
        uint64_t within = at & (cluster_size - 1);
        struct place place;

        if (find(patch, at, &place, err) < 0) {
            return -1;
        }
        if (!is_plain(patch, &place)) {
            return 0;
        }
        if (*run == 0) {
            *host = host_of(&place) + within;
        } else if (host_of(&place) + within != *host + *run) {
            return 0;
        }
        *run += min_u64(cluster_size - within, length - *run);
    }
    return 0;
}

/* Here nothing is half done: the tables in memory fit together. */
static int make_room(struct qlb_patch *patch, struct qlb_error *err)
{
    return patch->pending < PENDING_MAX ? 0 : qlb_patch_flush(patch, err);
}

int qlb_patch_write(struct qlb_patch *patch, const void *buf, uint64_t offset,
                    uint64_t length, struct qlb_error *err)
{
    uint64_t cluster_size = patch->header->cluster_size;
    const uint8_t *from = buf;

    while (length > 0) {
        uint64_t host = 0, run;

        if (make_room(patch, err) < 0 ||
            plain_run(patch, offset, length, &host, &run, err) < 0) {
            return -1;
        }
        if (run > 0) {
            if (qlb_blkio_write(patch->io, from, run, host, err) < 0) {
                return -1;
            }
        } else {
            run = min_u64(cluster_size - (offset & (cluster_size - 1)),
                          length);
            if (write_cluster(patch, from, offset, run, err) < 0) {
                return -1;
            }
        }
        from += run;
        offset += run;
        length -= run;
    }
    return 0;
}

/* ---- zero ---- */

static int zero_cluster(struct qlb_patch *patch, uint64_t offset,
                        struct qlb_error *err)
{
    struct place place;

    if (find(patch, offset, &place, err) < 0) {
        return -1;
    }
    if (reads_zero(patch, &place)) {
        return 0;
    }
    if (own_table(patch, offset >> span_bits(patch), err) < 0 ||
        find(patch, offset, &place, err) < 0 ||
        drop_host(patch, &place, err) < 0) {
        return -1;
    }
    set_entry(patch, &place,
              has_backing(patch) && !patch->header->extended_l2 ? QLB_L2_ZERO
                                                                : 0,
              has_backing(patch) ? ALL_ZERO : 0);
    return 0;
}

static int zero_part(struct qlb_patch *patch, uint64_t offset,
                     uint64_t length, struct qlb_error *err)
{
    struct place place;

    if (find(patch, offset, &place, err) < 0) {
        return -1;
    }
    return reads_zero(patch, &place)
               ? 0 : qlb_patch_write(patch, patch->zeroes, offset, length,
                                     err);
}

int qlb_patch_zero(struct qlb_patch *patch, uint64_t offset, uint64_t length,
                   struct qlb_error *err)
{
    uint64_t cluster_size = patch->header->cluster_size;
    uint64_t span = UINT64_C(1) << span_bits(patch);
    uint64_t end = offset + length;

    while (offset < end) {
        uint64_t index = offset >> span_bits(patch);
        uint64_t next = round_down(offset, cluster_size) + cluster_size;
        bool whole = (offset & (cluster_size - 1)) == 0 && next <= end;

        if (make_room(patch, err) < 0) {
            return -1;
        }
        if (index < patch->header->l1_entries && patch->l1[index] == 0 &&
            !has_backing(patch)) {
            next = round_down(offset, span) + span;
        } else if ((whole ? zero_cluster(patch, offset, err)
                          : zero_part(patch, offset,
                                      min_u64(next, end) - offset,
                                      err)) < 0) {
            return -1;
        }
        offset = next;
    }
    return 0;
}
