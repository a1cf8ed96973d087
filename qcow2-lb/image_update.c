/* The checkpoints of an image on disk: changes.
 *
 * A change of the list is planned as slots, one for each checkpoint of the new
 * list: its bitmap is kept, folded out of two, or new.  Then comes the write
 * order of livebackup-extension.md, "Change of the list", one function for
 * each step: allocate, write, switch, free.  Nothing that the present header
 * refers to is written to before the switch, and nothing that either header
 * refers to is freed before it is synced.
 *
 * No laundering.  The switch refreshes digests, boot id and the bit P, so it
 * must not keep checkpoints of an image that rules 5 to 13 reject; and the
 * flags of a bitmap that rules 14 to 17 reject are left as they are.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "bitmap.h"
#include "checked.h"
#include "cleanup.h"
#include "image_state.h"
#include "qcow2_alloc.h"

#define DEFAULT_GRANULARITY_BITS 16
#define MIN_GRANULARITY_BITS 12
#define MAX_GRANULARITY_BITS 31
#define MIN_CLUSTER_SIZE 4096

enum slot_kind {
    SLOT_KEPT,   /* the bitmap of checkpoint `from` as it is */
    SLOT_FOLDED, /* those of `from` to `with`, ORed */
    SLOT_NEW,    /* canaries */
};

/* A data cluster that has to be written: the OR of the old ones of all merges
 * in a row that name it. */
struct merge {
    uint64_t from, to;
};

struct slot {
    enum slot_kind kind;
    unsigned from, with;             /* indexes of the old list */
    uint64_t *table;                 /* not for SLOT_KEPT */
    struct merge *merges;
    size_t n_merges;
    struct qlb_bitmap_entry entry;   /* as it will stand in the directory */
    char name[QLB_BITMAP_NAME_SIZE];
};

enum rollback { ROLLBACK_NONE, ROLLBACK_BEGIN, ROLLBACK_FINISH };

/* A table all of whose entries say that every bit is set. */
struct full_table {
    uint64_t offset;
    uint32_t entries;
};

struct update {
    struct qlb_image *image;
    struct qlb_ext ext;              /* the new one */
    bool remove_ext;
    enum rollback rollback;
    bool resized;                    /* at its end: the disk has another size */
    uint32_t l1_entries;             /* of a new L1 table; 0: none */
    uint64_t l1_offset;
    struct full_table *full;         /* for bitmaps of others */
    size_t n_full;
    struct slot slots[QLB_MAX_CHECKPOINTS]; /* of ext's checkpoints */
    bool from_old;                   /* other bitmaps come from the old one */
    struct qlb_bitmap_directory directory; /* the new one */
    uint64_t directory_offset;
    struct qlb_alloc *alloc;
    uint64_t *garbage;               /* offsets of clusters, ascending */
    size_t n_garbage, garbage_room;
};

/* ---- begin and end ---- */

int qlb_image_check_writable(const struct qlb_image *image,
                             struct qlb_error *err)
{
    const char *name = image->io->name;

    if (!image->writable) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: open for reading only",
                        name);
    }
    if (image->lost) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: writing its header failed "
                        "before; nothing more is written", name);
    }
    if (image->seen.dirty) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the image was not closed "
                        "cleanly and its refcounts may be wrong; repair it "
                        "with: qemu-img check -r all %s", name, name);
    }
    if (image->trust == QLB_TRUST_UNSUPPORTED) {
        return qlb_image_fail_trust(image, image->trust, err);
    }
    if (image->directory_state == QLB_DIRECTORY_UNREADABLE) {
        *err = image->directory_error;
        return -1;
    }
    return 0;
}

/* Begins with the present list, every bitmap kept. */
static int update_begin(struct update *u, struct qlb_image *image,
                        struct qlb_error *err)
{
    memset(u, 0, sizeof(*u));
    u->image = image;
    u->ext = image->ext;
    u->from_old = image->directory_state == QLB_DIRECTORY_GOOD;
    for (unsigned i = 0; i < u->ext.n_checkpoints; i++) {
        u->slots[i].from = i;
    }
    return qlb_image_check_writable(image, err);
}

static void update_release(struct update *u)
{
    for (unsigned i = 0; i < QLB_MAX_CHECKPOINTS; i++) {
        free(u->slots[i].table);
        free(u->slots[i].merges);
    }
    qlb_bitmap_directory_release(&u->directory);
    qlb_alloc_close(u->alloc);
    free(u->full);
    free(u->garbage);
}

/* ---- planning ---- */

static void plan_drop(struct update *u, unsigned i)
{
    qlb_ext_remove(&u->ext, i);
    memmove(&u->slots[i], &u->slots[i + 1],
            (u->ext.n_checkpoints - i) * sizeof(u->slots[0]));
    memset(&u->slots[u->ext.n_checkpoints], 0, sizeof(u->slots[0]));
}

/* At most one fold for each update, so that both halves are kept ones. */
static int plan_fold(struct update *u, unsigned i, struct qlb_error *err)
{
    struct qlb_image *image = u->image;
    unsigned newer = u->slots[i].from;

    if (i > 0) {
        unsigned older = u->slots[i - 1].from;

        /* An OR with a bitmap that lost its canaries would have them. */
        if (image->bitmaps[newer].trust != QLB_TRUSTED) {
            return qlb_image_fail_trust(image, image->bitmaps[newer].trust,
                                        err);
        }
        if (image->bitmaps[older].trust != QLB_TRUSTED) {
            return qlb_image_fail_trust(image, image->bitmaps[older].trust,
                                        err);
        }
        u->slots[i - 1].kind = SLOT_FOLDED;
        u->slots[i - 1].with = newer;
    }
    plan_drop(u, i);
    return 0;
}

static void plan_append(struct update *u,
                        const struct qlb_checkpoint *checkpoint)
{
    unsigned n = u->ext.n_checkpoints++;

    u->ext.checkpoints[n] = *checkpoint;
    u->ext.checkpoints[n].confirmed = false;
    u->ext.checkpoints[n].virtual_size = u->image->header->virtual_size;
    u->slots[n].kind = SLOT_NEW;
}

/* Whether the write takes away what tells that an interrupted backup still is
 * the point in time: an autoclear bit that is clear, digests that don't match,
 * the boot id. */
static bool hides_changes(const struct update *u, bool keep_open)
{
    return !qlb_image_is_left_alone(u->image) ||
           (!keep_open && (u->ext.flags & QLB_EXT_DURABLE) == 0);
}

/* The extension as a tool leaves it: one generation more, digests of now. */
static void refresh_ext(struct update *u, bool keep_open)
{
    const struct qlb_trust_image *seen = &u->image->seen;

    if (u->ext.state == QLB_STATE_RUNNING && hides_changes(u, keep_open)) {
        u->ext.state = QLB_STATE_INTERRUPTED;
    }
    u->ext.generation++;
    u->ext.backing_digest = seen->backing_digest;
    u->ext.backing_stat_digest = seen->backing_stat_digest;
    u->ext.data_file_stat_digest = seen->data_file_stat_digest;
    if (!keep_open) {
        memset(u->ext.boot_id, 0, sizeof(u->ext.boot_id));
        u->ext.device = 0;
    }
}

/* ---- tables of bitmaps that are made ---- */

static int allocate_cluster(struct update *u, uint64_t *offset,
                            struct qlb_error *err)
{
    return qlb_alloc_clusters(u->alloc, 1, offset, err);
}

static int make_new_table(struct update *u, struct slot *slot,
                          struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = u->image->header;
    unsigned bits = u->ext.granularity_bits;
    uint64_t last = qlb_canary_last(header->virtual_size,
                                    header->virtual_size, bits);
    uint64_t per_cluster = header->cluster_size * 8;

    slot->table = calloc(qlb_bitmap_table_entries(header, bits), 8);
    if (slot->table == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", u->image->io->name);
    }
    if (allocate_cluster(u, &slot->table[0], err) < 0) {
        return -1;
    }
    return last < per_cluster
               ? 0 : allocate_cluster(u, &slot->table[last / per_cluster],
                                      err);
}

/* Entry i of the OR of tables. A cluster that only one of them has is taken
 * over as it is: until the switch the old directory refers to it, afterwards
 * the new one, and nobody writes to it. */
static int fold_entry(struct update *u, struct slot *slot,
                      uint64_t *const *tables, unsigned n_tables, uint64_t i,
                      struct qlb_error *err)
{
    uint64_t *to = &slot->table[i];
    unsigned n = 0;

    *to = QLB_BITMAP_ZEROES;
    for (unsigned t = 0; t < n_tables; t++) {
        if (tables[t][i] == QLB_BITMAP_ONES) {
            *to = QLB_BITMAP_ONES;
            return 0;
        }
        if (tables[t][i] != QLB_BITMAP_ZEROES) {
            *to = tables[t][i];
            n++;
        }
    }
    if (n < 2) {
        return 0;
    }
    if (allocate_cluster(u, to, err) < 0) {
        return -1;
    }
    for (unsigned t = 0; t < n_tables; t++) {
        if (tables[t][i] != QLB_BITMAP_ZEROES) {
            slot->merges[slot->n_merges++] = (struct merge) {
                .from = tables[t][i], .to = *to,
            };
        }
    }
    return 0;
}

static int fold_tables(struct update *u, struct slot *slot, uint64_t **tables,
                       struct qlb_error *err)
{
    struct qlb_image *image = u->image;
    unsigned n_tables = slot->with - slot->from + 1;
    uint64_t n = qlb_bitmap_table_entries(image->header,
                                          u->ext.granularity_bits);

    for (unsigned t = 0; t < n_tables; t++) {
        if (qlb_bitmap_table_read(image->io, image->header,
                                  &image->bitmaps[slot->from + t].entry,
                                  &tables[t], err) < 0) {
            return -1;
        }
    }
    slot->table = calloc(n, sizeof(*slot->table));
    slot->merges = calloc(n, n_tables * sizeof(*slot->merges));
    if (slot->table == NULL || slot->merges == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", image->io->name);
    }
    for (uint64_t i = 0; i < n; i++) {
        if (fold_entry(u, slot, tables, n_tables, i, err) < 0) {
            return -1;
        }
    }
    return 0;
}

static int make_folded_table(struct update *u, struct slot *slot,
                             struct qlb_error *err)
{
    uint64_t *tables[QLB_MAX_CHECKPOINTS] = { NULL };
    int ret = fold_tables(u, slot, tables, err);

    for (unsigned t = 0; t < QLB_MAX_CHECKPOINTS; t++) {
        free(tables[t]);
    }
    return ret;
}

/* ---- the new directory ---- */

/* Flags of a kept bitmap change only where it is trusted: the tool that writes
 * now vouches for it, so IN_USE goes, and only the newest is enabled. */
static void set_flags(struct update *u, unsigned i)
{
    struct slot *slot = &u->slots[i];
    bool newest = i + 1 == u->ext.n_checkpoints;

    if (slot->kind == SLOT_KEPT &&
        u->image->bitmaps[slot->from].trust != QLB_TRUSTED) {
        return;
    }
    slot->entry.flags &= ~(uint32_t)(QLB_BITMAP_IN_USE | QLB_BITMAP_AUTO);
    slot->entry.flags |= newest ? QLB_BITMAP_AUTO : 0;
}

static int make_entry(struct update *u, unsigned i, struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = u->image->header;
    struct slot *slot = &u->slots[i];
    struct qlb_bitmap_entry *entry = &slot->entry;
    uint64_t n;

    qlb_bitmap_name(&u->ext.checkpoints[i].uuid, slot->name);
    if (slot->kind == SLOT_KEPT) {
        if (!u->image->bitmaps[slot->from].found) {
            return 0;
        }
        *entry = u->image->bitmaps[slot->from].entry;
        set_flags(u, i);
        return qlb_bitmap_directory_append(&u->directory, entry, err);
    }
    n = qlb_bitmap_table_entries(header, u->ext.granularity_bits);
    entry->table_entries = (uint32_t)n;
    entry->type = QLB_BITMAP_TYPE_DIRTY;
    entry->granularity_bits = (uint8_t)u->ext.granularity_bits;
    entry->name = slot->name;
    entry->name_size = (uint16_t)strlen(slot->name);
    set_flags(u, i);
    if ((slot->kind == SLOT_NEW ? make_new_table(u, slot, err)
                                : make_folded_table(u, slot, err)) < 0 ||
        qlb_alloc_clusters(u->alloc, div_round_up(n * 8,
                                                  header->cluster_size),
                           &entry->table_offset, err) < 0) {
        return -1;
    }
    return qlb_bitmap_directory_append(&u->directory, entry, err);
}

/* Whether a rollback makes a bitmap of others wrong: it does not get the bits
 * of what is rewritten, nor another size. */
static bool must_fill(const struct update *u,
                      const struct qlb_bitmap_entry *entry)
{
    return (entry->flags & QLB_BITMAP_IN_USE) == 0 &&
           ((u->rollback == ROLLBACK_BEGIN &&
             (entry->flags & QLB_BITMAP_AUTO)) ||
            (u->rollback == ROLLBACK_FINISH && u->resized));
}

/* All bits set are never too few. A bitmap that can't have so many is marked as
 * inconsistent. */
static int fill_bitmap(struct update *u, struct qlb_bitmap_entry *entry,
                       struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = u->image->header;
    struct full_table *grown, *table;

    if (!qlb_bitmap_size_possible(header, entry->granularity_bits)) {
        entry->flags |= QLB_BITMAP_IN_USE;
        return 0;
    }
    grown = realloc(u->full, (u->n_full + 1) * sizeof(*grown));
    if (grown == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", u->image->io->name);
    }
    u->full = grown;
    table = &grown[u->n_full++];
    table->entries = (uint32_t)qlb_bitmap_table_entries(
        header, entry->granularity_bits);
    if (qlb_alloc_clusters(u->alloc,
                           div_round_up(table->entries * UINT64_C(8),
                                        header->cluster_size),
                           &table->offset, err) < 0) {
        return -1;
    }
    entry->table_entries = table->entries;
    entry->table_offset = table->offset;
    return 0;
}

static int write_full_table(struct update *u, const struct full_table *full,
                            struct qlb_error *err)
{
    uint64_t *table QLB_AUTO_FREE = calloc(full->entries, sizeof(*table));

    if (table == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", u->image->io->name);
    }
    for (uint32_t i = 0; i < full->entries; i++) {
        table[i] = QLB_BITMAP_ONES;
    }
    return qlb_bitmap_table_write(u->image->io, u->image->header, table,
                                  full->entries, full->offset, err);
}

/* Other people's bitmaps, which are kept as they are: only where everything
 * in their entries is understood can they be kept rightly. */
static int keep_other(struct update *u, const struct qlb_bitmap_entry *entry,
                      struct qlb_error *err)
{
    struct qlb_bitmap_entry kept = *entry;

    if (entry->type != QLB_BITMAP_TYPE_DIRTY) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the bitmap \"%.*s\" has an "
                        "unknown type; nothing is written",
                        u->image->io->name, (int)entry->name_size,
                        entry->name);
    }
    if (must_fill(u, &kept) && fill_bitmap(u, &kept, err) < 0) {
        return -1;
    }
    return qlb_bitmap_directory_append(&u->directory, &kept, err);
}

/* Steps 1 and half of 2 in memory: all clusters reserved, all entries made. */
static int make_directory(struct update *u, struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = u->image->header;
    struct qlb_bitmap_entry entry;
    size_t position = 0;

    while (u->from_old &&
           qlb_bitmap_directory_next(&u->image->directory, &position,
                                     &entry)) {
        if (!qlb_bitmap_name_is_ours(entry.name, entry.name_size) &&
            keep_other(u, &entry, err) < 0) {
            return -1;
        }
    }
    for (unsigned i = 0; i < u->ext.n_checkpoints; i++) {
        if (make_entry(u, i, err) < 0) {
            return -1;
        }
    }
    if (u->directory.count == 0) {
        return 0;
    }
    return qlb_alloc_clusters(u->alloc,
                              div_round_up(u->directory.size,
                                           header->cluster_size),
                              &u->directory_offset, err);
}

/* ---- step 2: write ---- */

static int write_new_data(struct update *u, const struct slot *slot,
                          uint8_t *data, struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = u->image->header;
    uint64_t last = qlb_canary_last(header->virtual_size,
                                    header->virtual_size,
                                    u->ext.granularity_bits);
    uint64_t per_cluster = header->cluster_size * 8;

    memset(data, 0, header->cluster_size);
    qlb_bit_set(data, 0);
    if (last < per_cluster) {
        qlb_bit_set(data, last);
    }
    if (qlb_blkio_write(u->image->io, data, header->cluster_size,
                        slot->table[0], err) < 0) {
        return -1;
    }
    if (last < per_cluster) {
        return 0;
    }
    memset(data, 0, header->cluster_size);
    qlb_bit_set(data, last % per_cluster);
    return qlb_blkio_write(u->image->io, data, header->cluster_size,
                           slot->table[last / per_cluster], err);
}

static int write_merges(struct update *u, const struct slot *slot,
                        uint8_t *data, uint8_t *work, struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = u->image->header;
    struct qlb_blkio *io = u->image->io;

    for (size_t i = 0; i < slot->n_merges;) {
        uint64_t to = slot->merges[i].to;

        memset(data, 0, header->cluster_size);
        for (; i < slot->n_merges && slot->merges[i].to == to; i++) {
            if (qlb_bitmap_or_cluster(io, header, slot->merges[i].from, data,
                                      work, err) < 0) {
                return -1;
            }
        }
        if (qlb_blkio_write(io, data, header->cluster_size, to, err) < 0) {
            return -1;
        }
    }
    return 0;
}

static int write_slot(struct update *u, const struct slot *slot,
                      uint8_t *data, uint8_t *work, struct qlb_error *err)
{
    if (slot->kind == SLOT_KEPT) {
        return 0;
    }
    if ((slot->kind == SLOT_NEW
             ? write_new_data(u, slot, data, err)
             : write_merges(u, slot, data, work, err)) < 0) {
        return -1;
    }
    return qlb_bitmap_table_write(u->image->io, u->image->header, slot->table,
                                  slot->entry.table_entries,
                                  slot->entry.table_offset, err);
}

static int write_all(struct update *u, struct qlb_error *err)
{
    uint64_t cluster_size = u->image->header->cluster_size;
    uint8_t *data QLB_AUTO_FREE = malloc(cluster_size);
    uint8_t *work QLB_AUTO_FREE = malloc(cluster_size);

    if (data == NULL || work == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", u->image->io->name);
    }
    for (unsigned i = 0; i < u->ext.n_checkpoints; i++) {
        if (write_slot(u, &u->slots[i], data, work, err) < 0) {
            return -1;
        }
    }
    for (size_t i = 0; i < u->n_full; i++) {
        if (write_full_table(u, &u->full[i], err) < 0) {
            return -1;
        }
    }
    if (u->directory.count > 0 &&
        qlb_bitmap_directory_write(u->image->io, u->image->header,
                                   &u->directory, u->directory_offset,
                                   err) < 0) {
        return -1;
    }
    return qlb_blkio_sync(u->image->io, err);
}

/* ---- what is garbage after the switch ---- */

static int add_garbage(void *opaque, uint64_t offset, uint64_t length,
                       struct qlb_error *err)
{
    struct update *u = opaque;
    uint64_t cluster_size = u->image->header->cluster_size;

    for (uint64_t end = offset + length; offset < end;
         offset += cluster_size) {
        if (u->n_garbage == u->garbage_room) {
            size_t room = u->garbage_room * 2 + 64;
            uint64_t *grown = realloc(u->garbage, room * sizeof(*grown));

            if (grown == NULL) {
                return qlb_fail_errno(err, ENOMEM, "%s", u->image->io->name);
            }
            u->garbage = grown;
            u->garbage_room = room;
        }
        u->garbage[u->n_garbage++] = offset;
    }
    return 0;
}

static int compare_offsets(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

static void sort_garbage(struct update *u)
{
    size_t kept = 0;

    if (u->n_garbage == 0) {
        return;
    }
    qsort(u->garbage, u->n_garbage, sizeof(*u->garbage), compare_offsets);
    for (size_t i = 0; i < u->n_garbage; i++) {
        if (kept == 0 || u->garbage[kept - 1] != u->garbage[i]) {
            u->garbage[kept++] = u->garbage[i];
        }
    }
    u->n_garbage = kept;
}

/* Takes what the new directory refers to out of the garbage, in two steps:
 * here it gets a mark, the lowest bit, which no offset has. */
static int spare(void *opaque, uint64_t offset, uint64_t length,
                 struct qlb_error *err)
{
    struct update *u = opaque;
    uint64_t cluster_size = u->image->header->cluster_size;

    (void)err;
    for (uint64_t end = offset + length; offset < end;
         offset += cluster_size) {
        size_t low = 0, high = u->n_garbage;

        while (low < high) {
            size_t middle = low + (high - low) / 2;

            if ((u->garbage[middle] & ~UINT64_C(1)) < offset) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        if (low < u->n_garbage && u->garbage[low] == offset) {
            u->garbage[low] |= 1;
        }
    }
    return 0;
}

static int spare_new(struct update *u, struct qlb_error *err)
{
    struct qlb_bitmap_entry entry;
    size_t position = 0, kept = 0;

    if (u->n_garbage == 0) {
        return 0;
    }
    while (qlb_bitmap_directory_next(&u->directory, &position, &entry)) {
        if (qlb_bitmap_each_cluster(u->image->io, u->image->header, &entry,
                                    spare, u, err) < 0) {
            return -1;
        }
    }
    for (size_t i = 0; i < u->n_garbage; i++) {
        if ((u->garbage[i] & 1) == 0) {
            u->garbage[kept++] = u->garbage[i];
        }
    }
    u->n_garbage = kept;
    return 0;
}

/* What the old directory refers to and the new one does not. Where a table of
 * the old one can't be read, what it refers to is leaked; where one of the
 * new can't, nothing is freed but the directory. */
static void collect_garbage(struct update *u)
{
    struct qlb_image *image = u->image;
    struct qlb_bitmap_entry entry;
    struct qlb_error ignored;
    size_t position = 0;

    u->n_garbage = 0;
    while (u->from_old && qlb_bitmap_directory_next(&image->directory,
                                                    &position, &entry)) {
        size_t before = u->n_garbage;

        if ((u->n_full > 0 ||
             qlb_bitmap_name_is_ours(entry.name, entry.name_size)) &&
            qlb_bitmap_each_cluster(image->io, image->header, &entry,
                                    add_garbage, u, &ignored) < 0) {
            u->n_garbage = before;
        }
    }
    sort_garbage(u);
    if (spare_new(u, &ignored) < 0) {
        u->n_garbage = 0;
    }
    if (u->from_old &&
        add_garbage(u, image->header->bitmap_directory_offset,
                    round_up(image->header->bitmap_directory_size,
                             image->header->cluster_size), &ignored) == 0) {
        sort_garbage(u);
    }
}

/* ---- a larger L1 table ---- */

static int make_l1(struct update *u, struct qlb_error *err)
{
    return u->l1_entries == 0
               ? 0 : qlb_alloc_clusters(u->alloc,
                                        div_round_up(u->l1_entries * 8ull,
                                                     u->image->header
                                                         ->cluster_size),
                                        &u->l1_offset, err);
}

/* The old entries, and empty ones. */
static int write_l1(struct update *u, struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = u->image->header;
    size_t bytes = round_up(u->l1_entries * UINT64_C(8),
                            header->cluster_size);
    uint8_t *table QLB_AUTO_FREE = NULL;

    if (u->l1_entries == 0) {
        return 0;
    }
    table = calloc(1, bytes);
    if (table == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", u->image->io->name);
    }
    return qlb_blkio_read(u->image->io, table,
                          header->l1_entries * UINT64_C(8),
                          header->l1_offset, err) < 0
               ? -1 : qlb_blkio_write(u->image->io, table, bytes,
                                      u->l1_offset, err);
}

static void add_old_l1(struct update *u)
{
    const struct qlb_qcow2_header *header = u->image->header;
    struct qlb_error ignored;

    if (u->l1_entries > 0 && header->l1_entries > 0 &&
        add_garbage(u, header->l1_offset,
                    round_up(header->l1_entries * UINT64_C(8),
                             header->cluster_size), &ignored) == 0) {
        sort_garbage(u);
    }
}

/* ---- step 3: switch ---- */

static int set_header(struct update *u, struct qlb_error *err)
{
    struct qlb_qcow2_header *header = u->image->header;
    uint8_t data[QLB_EXT_SIZE];

    if (u->l1_entries > 0) {
        header->l1_entries = u->l1_entries;
        header->l1_offset = u->l1_offset;
    }
    if (u->rollback != ROLLBACK_NONE) {
        if (qlb_qcow2_header_mark_rollback(
                header, u->rollback == ROLLBACK_BEGIN, err) < 0) {
            return -1;
        }
        if (!u->image->on) {
            return 0; /* livebackup is off, and stays so */
        }
    }
    qlb_ext_encode(&u->ext, data);
    if (u->remove_ext) {
        header->autoclear &= ~QLB_AUTOCLEAR_LIVEBACKUP;
    } else {
        header->autoclear |= QLB_AUTOCLEAR_LIVEBACKUP;
    }
    if (qlb_qcow2_header_set_ext(header, QLB_EXT_LIVEBACKUP,
                                 u->remove_ext ? NULL : data, sizeof(data),
                                 err) < 0) {
        return -1;
    }
    return qlb_qcow2_header_name_feature(header, !u->remove_ext, err);
}

static void set_bitmaps(struct update *u)
{
    struct qlb_qcow2_header *header = u->image->header;

    header->has_bitmaps = u->directory.count > 0;
    header->n_bitmaps = u->directory.count;
    header->bitmap_directory_size = u->directory.size;
    header->bitmap_directory_offset = u->directory_offset;
    if (header->has_bitmaps) {
        header->autoclear |= QLB_AUTOCLEAR_BITMAPS;
    } else {
        header->autoclear &= ~QLB_AUTOCLEAR_BITMAPS;
    }
}

/* The old header again, all of whose clusters are still in use. */
static void put_back(struct qlb_image *image, const uint8_t *before)
{
    struct qlb_error ignored;

    if (qlb_blkio_write(image->io, before, QLB_HEADER_ATOM, 0,
                        &ignored) == 0) {
        (void)qlb_blkio_sync(image->io, &ignored);
    }
}

/* The one write that makes the new state. Where it fails, or its sync, the old
 * state is put back, so that a change that failed is none. Where that fails
 * too, the file may hold either: nothing may be freed then, old or new. */
static int switch_header(struct update *u, struct qlb_error *err)
{
    struct qlb_image *image = u->image;
    uint8_t before[QLB_HEADER_ATOM];

    if (qlb_blkio_read_padded(image->io, before, sizeof(before), 0,
                              err) < 0) {
        return -1;
    }
    if (set_header(u, err) < 0 ||
        qlb_qcow2_header_write(image->header, image->io, err) < 0 ||
        qlb_blkio_sync(image->io, err) < 0) {
        image->lost = true;
        if (err->code != QLB_E_USAGE) { /* no room: nothing was written */
            put_back(image, before);
        }
        return -1;
    }
    return 0;
}

/* The change is done, whether what it made can be read or not: what can't is
 * not trusted. */
static void load_new_state(struct qlb_image *image)
{
    struct qlb_error ignored;

    (void)qlb_image_load_state(image, &ignored);
}

/* ---- the write orders ---- */

/* Step 3 alone. What a stale bitmaps extension names has been leaked by the
 * program that cleared the bit. */
static int commit_header(struct update *u, bool keep_open,
                         struct qlb_error *err)
{
    struct qlb_qcow2_header *header = u->image->header;

    if (!u->image->seen.autoclear_bitmaps) {
        header->has_bitmaps = false;
        header->autoclear &= ~QLB_AUTOCLEAR_BITMAPS;
    }
    refresh_ext(u, keep_open);
    if (switch_header(u, err) < 0) {
        return -1;
    }
    load_new_state(u->image);
    return 0;
}

/* Steps 1 and 2. Killed in here: the old state, clusters leaked. */
static int prepare(struct update *u, struct qlb_error *err)
{
    if (make_directory(u, err) < 0 || make_l1(u, err) < 0) {
        return -1;
    }
    if (qlb_alloc_commit(u->alloc, err) < 0) {
        /* It may have failed in a header write of its own. */
        u->image->lost = true;
        return -1;
    }
    if (write_l1(u, err) < 0 || write_all(u, err) < 0) {
        return -1;
    }
    collect_garbage(u);
    add_old_l1(u);
    return 0;
}

static int commit(struct update *u, struct qlb_error *err)
{
    struct qlb_image *image = u->image;
    struct qlb_error ignored;

    u->alloc = qlb_alloc_open(image->io, image->header, err);
    if (u->alloc == NULL) {
        return -1;
    }
    if (prepare(u, err) < 0) {
        /* What can't be given back is leaked. */
        qlb_alloc_abandon(u->alloc, &ignored);
        return -1;
    }
    refresh_ext(u, false);
    set_bitmaps(u);
    if (switch_header(u, err) < 0) {
        if (err->code == QLB_E_USAGE) { /* no room: nothing was written */
            qlb_alloc_abandon(u->alloc, &ignored);
        }
        return -1;
    }
    /* Step 4. The change is done: what can't be freed is leaked, and no
     * failure of the change. Killed in here: the new state, leaks. */
    if (qlb_alloc_free(u->alloc, u->garbage, u->n_garbage, &ignored) == 0) {
        (void)qlb_blkio_sync(image->io, &ignored);
    }
    load_new_state(image);
    return 0;
}

/* ---- enable and disable ---- */

static int random_uuid(struct qlb_uuid *uuid, struct qlb_error *err)
{
    if (getrandom(uuid->bytes, 16, 0) != 16) {
        return qlb_fail_errno(err, errno, "random numbers");
    }
    uuid->bytes[6] = (uint8_t)((uuid->bytes[6] & 0x0f) | 0x40);
    uuid->bytes[8] = (uint8_t)((uuid->bytes[8] & 0x3f) | 0x80);
    return 0;
}

static int check_granularity(const struct qlb_image *image, unsigned bits,
                             struct qlb_error *err)
{
    if (image->header->virtual_size == 0) {
        return qlb_fail(err, QLB_E_USAGE, "%s: the disk has size 0",
                        image->io->name);
    }
    if (!qlb_bitmap_size_possible(image->header, bits)) {
        return qlb_fail(err, QLB_E_USAGE, "%s: the disk is too large for a "
                        "dirty bitmap with a granularity of %llu bytes; "
                        "choose a larger one", image->io->name,
                        (unsigned long long)(UINT64_C(1) << bits));
    }
    return 0;
}

static int check_enable(const struct qlb_image *image, unsigned bits,
                        struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = image->header;
    const char *name = image->io->name;

    if (image->on) {
        return qlb_fail(err, QLB_E_USAGE, "%s: livebackup is on already",
                        name);
    }
    if (header->version < 3) {
        return qlb_fail(err, QLB_E_USAGE, "%s: livebackup needs qcow2 version "
                        "3; convert the image with: qemu-img amend -f qcow2 "
                        "-o compat=1.1 %s", name, name);
    }
    if (header->cluster_size < MIN_CLUSTER_SIZE) {
        return qlb_fail(err, QLB_E_USAGE, "%s: livebackup needs clusters of "
                        "%d bytes or more, the image has %llu", name,
                        MIN_CLUSTER_SIZE,
                        (unsigned long long)header->cluster_size);
    }
    if (bits < MIN_GRANULARITY_BITS || bits > MAX_GRANULARITY_BITS) {
        return qlb_fail(err, QLB_E_USAGE, "the granularity must be a power of "
                        "two from 4 KiB to 2 GiB");
    }
    if (!qlb_qcow2_header_has_room(header)) {
        return qlb_fail(err, QLB_E_USAGE, "%s: no room for the livebackup "
                        "extension in the first %d bytes of the header",
                        name, QLB_HEADER_ATOM);
    }
    return check_granularity(image, bits, err);
}

int qlb_image_enable(struct qlb_image *image, unsigned granularity_bits,
                     uint32_t ext_flags, struct qlb_error *err)
{
    struct update u;

    if (granularity_bits == 0) {
        granularity_bits = DEFAULT_GRANULARITY_BITS;
    }
    if (update_begin(&u, image, err) < 0 ||
        check_enable(image, granularity_bits, err) < 0) {
        return -1;
    }
    u.ext.flags = ext_flags;
    u.ext.granularity_bits = granularity_bits;
    if (random_uuid(&u.ext.image_uuid, err) < 0) {
        return -1;
    }
    return commit_header(&u, false, err);
}

static bool has_ours(const struct qlb_image *image)
{
    return image->seen.unlisted_bitmap || image->ext.n_checkpoints > 0;
}

int qlb_image_disable(struct qlb_image *image, struct qlb_error *err)
{
    struct update u;
    int ret;

    if (update_begin(&u, image, err) < 0) {
        return -1;
    }
    if (!image->on && !image->seen.unlisted_bitmap &&
        !image->seen.autoclear_livebackup) {
        return qlb_fail(err, QLB_E_USAGE, "%s: livebackup is off already",
                        image->io->name);
    }
    u.remove_ext = true;
    image->may_undo = false;
    /* A directory that can't be read is left to whoever can. */
    if (image->directory_state != QLB_DIRECTORY_GOOD || !has_ours(image)) {
        u.ext.n_checkpoints = 0;
        return commit_header(&u, false, err);
    }
    u.ext.n_checkpoints = 0;
    ret = commit(&u, err);
    update_release(&u);
    return ret;
}

/* ---- add and undo ---- */

static int check_add(const struct qlb_image *image,
                     const struct qlb_checkpoint *checkpoint,
                     bool drop_untrusted, struct qlb_error *err)
{
    unsigned n = qlb_image_untrusted(image);

    if (!image->on) {
        return qlb_fail(err, QLB_E_USAGE, "%s: livebackup is off",
                        image->io->name);
    }
    if (!image->decoded) {
        return qlb_image_fail_trust(image, image->trust, err);
    }
    if (image->disk == NULL) {
        *err = image->disk_error;
        return -1;
    }
    if (n > 0 && !drop_untrusted) {
        return qlb_image_fail_trust(image, qlb_image_trust_since(image, n - 1),
                                    err);
    }
    if (image->directory_state == QLB_DIRECTORY_DAMAGED && !drop_untrusted) {
        return qlb_image_fail_trust(image, QLB_TRUST_DIRECTORY_DAMAGED, err);
    }
    if (!qlb_label_valid(checkpoint->label) ||
        qlb_uuid_is_zero(&checkpoint->uuid) ||
        qlb_ext_find(&image->ext, &checkpoint->uuid) >= 0) {
        return qlb_fail(err, QLB_E_USAGE, "%s: a checkpoint with this UUID "
                        "or label can't be added", image->io->name);
    }
    return check_granularity(image, image->ext.granularity_bits, err);
}

/* Which checkpoint of a list makes room for another: *fold, or -1 where none
 * has to. */
static int find_room(const struct qlb_image *image, const struct qlb_ext *ext,
                     int *fold, struct qlb_error *err)
{
    *fold = -1;
    if (ext->n_checkpoints < QLB_MAX_CHECKPOINTS) {
        return 0;
    }
    *fold = qlb_ext_foldable(ext, -1);
    if (*fold < 0) {
        return qlb_fail(err, QLB_E_USAGE, "%s: the image has %d "
                        "checkpoints, each the newest confirmed one of "
                        "its chain; prune one", image->io->name,
                        QLB_MAX_CHECKPOINTS);
    }
    return 0;
}

int qlb_image_check_add(const struct qlb_image *image, struct qlb_error *err)
{
    int fold;

    if (qlb_image_check_writable(image, err) < 0) {
        return -1;
    }
    /* What is not trusted makes room. */
    return qlb_image_untrusted(image) > 0
               ? 0 : find_room(image, &image->ext, &fold, err);
}

static void plan_drop_front(struct update *u, unsigned n)
{
    while (n-- > 0) {
        plan_drop(u, 0);
    }
}

int qlb_image_add_checkpoint(struct qlb_image *image,
                             const struct qlb_checkpoint *checkpoint,
                             bool drop_untrusted, struct qlb_error *err)
{
    struct update u;
    int fold, ret = 0;

    if (update_begin(&u, image, err) < 0 ||
        check_add(image, checkpoint, drop_untrusted, err) < 0) {
        return -1;
    }
    plan_drop_front(&u, qlb_image_untrusted(image));
    if (find_room(image, &u.ext, &fold, err) < 0) {
        return -1;
    }
    if (fold >= 0) {
        ret = plan_fold(&u, (unsigned)fold, err);
    }
    if (ret == 0) {
        plan_append(&u, checkpoint);
        ret = commit(&u, err);
    }
    image->may_undo = ret == 0;
    update_release(&u);
    return ret;
}

static int fold(struct qlb_image *image, unsigned i, struct qlb_error *err)
{
    struct update u;
    int ret;

    if (update_begin(&u, image, err) < 0) {
        return -1;
    }
    if (image->trust != QLB_TRUSTED) {
        return qlb_image_fail_trust(image, image->trust, err);
    }
    if (i >= image->ext.n_checkpoints) {
        return qlb_fail(err, QLB_E_USAGE, "%s: no such checkpoint",
                        image->io->name);
    }
    ret = plan_fold(&u, i, err);
    if (ret == 0) {
        ret = commit(&u, err);
    }
    update_release(&u);
    return ret;
}

int qlb_image_undo_add(struct qlb_image *image, struct qlb_error *err)
{
    if (!image->may_undo) {
        return qlb_fail(err, QLB_E_USAGE, "%s: no checkpoint was added",
                        image->io->name);
    }
    image->may_undo = false;
    return fold(image, image->ext.n_checkpoints - 1, err);
}

int qlb_image_fold(struct qlb_image *image, unsigned i,
                   struct qlb_error *err)
{
    image->may_undo = false;
    return fold(image, i, err);
}

/* ---- confirm ---- */

static int begin_confirm(struct update *u, struct qlb_image *image, unsigned i,
                         struct qlb_error *err)
{
    if (update_begin(u, image, err) < 0) {
        return -1;
    }
    if (image->trust != QLB_TRUSTED) {
        return qlb_image_fail_trust(image, image->trust, err);
    }
    if (i >= image->ext.n_checkpoints) {
        return qlb_fail(err, QLB_E_USAGE, "%s: no such checkpoint",
                        image->io->name);
    }
    return 0;
}

/* Boot id and device stay: no bitmap is written here, so what they say of the
 * bits is as true as before. */
static int commit_confirm(struct update *u, unsigned i, struct qlb_error *err)
{
    u->ext.checkpoints[i].confirmed = true;
    if (commit_header(u, true, err) < 0) {
        return -1;
    }
    u->image->may_undo = false;
    return 0;
}

int qlb_image_confirm(struct qlb_image *image, unsigned i,
                      struct qlb_error *err)
{
    struct update u;

    if (begin_confirm(&u, image, i, err) < 0) {
        return -1;
    }
    return image->ext.checkpoints[i].confirmed ? 0
                                               : commit_confirm(&u, i, err);
}

/* ---- the end of a backup ---- */

static void clear_backup(struct qlb_ext *ext)
{
    ext->state = QLB_STATE_NONE;
    ext->released = false;
    ext->flags &= ~(uint32_t)QLB_EXT_DURABLE;
    memset(&ext->set_uuid, 0, sizeof(ext->set_uuid));
    ext->begin_time = 0;
}

int qlb_image_end_backup(struct qlb_image *image, unsigned i,
                         const uint8_t root[8], struct qlb_error *err)
{
    struct update u;

    if (begin_confirm(&u, image, i, err) < 0) {
        return -1;
    }
    clear_backup(&u.ext);
    memcpy(u.ext.checkpoints[i].root, root, sizeof(u.ext.checkpoints[i].root));
    return commit_confirm(&u, i, err);
}

/* ---- rollback in place ---- */

static void plan_drop_newer(struct update *u, unsigned i)
{
    while (u->ext.n_checkpoints > i + 1) {
        plan_drop(u, u->ext.n_checkpoints - 1);
    }
}

int qlb_image_begin_rollback(struct qlb_image *image, int since,
                             uint64_t size, struct qlb_error *err)
{
    struct update u;
    uint32_t entries = qlb_image_l1_entries(image, size);
    int ret;

    if (qlb_image_check_rollback(image, size, err) < 0 ||
        update_begin(&u, image, err) < 0) {
        return -1;
    }
    image->may_undo = false;
    u.rollback = ROLLBACK_BEGIN;
    u.l1_entries = entries > image->header->l1_entries ? entries : 0;
    clear_backup(&u.ext);
    if (since < 0) {
        plan_drop_front(&u, u.ext.n_checkpoints);
    } else if (qlb_image_trust_since(image, (unsigned)since) != QLB_TRUSTED) {
        return qlb_image_fail_trust(
            image, qlb_image_trust_since(image, (unsigned)since), err);
    } else if ((unsigned)since + 1 < u.ext.n_checkpoints) {
        u.slots[since].kind = SLOT_FOLDED;
        u.slots[since].with = u.ext.n_checkpoints - 1;
        plan_drop_newer(&u, (unsigned)since);
    }
    ret = commit(&u, err);
    if (ret < 0 && err->code == QLB_E_USAGE) { /* no room for the mark */
        image->header->incompatible &= ~QLB_INCOMPAT_ROLLBACK;
        err->code = QLB_E_RUNTIME;
    }
    update_release(&u);
    return ret;
}

/* The list of the new state. Where the size was changed the older bitmaps
 * don't fit the disk any more. */
static void plan_finish(struct update *u,
                        const struct qlb_checkpoint *checkpoint, bool resized)
{
    int i = qlb_ext_find(&u->ext, &checkpoint->uuid);
    unsigned n;

    if (resized || i < 0 || (unsigned)i + 1 != u->ext.n_checkpoints) {
        plan_drop_front(u, u->ext.n_checkpoints);
        plan_append(u, checkpoint);
    }
    n = u->ext.n_checkpoints - 1;
    u->ext.checkpoints[n] = *checkpoint;
    u->ext.checkpoints[n].confirmed = true;
    u->ext.checkpoints[n].virtual_size = u->image->header->virtual_size;
    u->slots[n].kind = SLOT_NEW;
}

int qlb_image_finish_rollback(struct qlb_image *image,
                              const struct qlb_checkpoint *checkpoint,
                              const struct qlb_uuid *image_uuid,
                              struct qlb_error *err)
{
    struct update u;
    uint64_t size = checkpoint->virtual_size;
    bool resized = size != image->header->virtual_size;
    int ret;

    if (update_begin(&u, image, err) < 0) {
        return -1;
    }
    u.rollback = ROLLBACK_FINISH;
    u.resized = resized;
    /* Bitmaps are made for the new size. The old ones are not trusted with a
     * header of that size, should one be written before the switch: then a
     * rollback that is begun again compares the whole disk. */
    image->header->virtual_size = image->header->size_field = size;
    if (image->on && size > 0) {
        u.ext.image_uuid = *image_uuid;
        plan_finish(&u, checkpoint, resized);
    } else {
        plan_drop_front(&u, u.ext.n_checkpoints);
    }
    ret = commit(&u, err);
    update_release(&u);
    return ret;
}

/* ---- for recover ---- */

int qlb_image_clean(struct qlb_image *image, unsigned drop, bool clear_state,
                    struct qlb_error *err)
{
    struct update u;
    bool header_only = drop == 0 && !image->seen.unlisted_bitmap &&
                       image->directory_state != QLB_DIRECTORY_STALE &&
                       image->directory_state != QLB_DIRECTORY_DAMAGED;
    int ret;

    if (update_begin(&u, image, err) < 0) {
        return -1;
    }
    image->may_undo = false;
    if (image->on && !image->decoded) {
        u.ext.granularity_bits = DEFAULT_GRANULARITY_BITS;
        if (random_uuid(&u.ext.image_uuid, err) < 0) {
            return -1;
        }
    }
    if (clear_state) {
        clear_backup(&u.ext);
    }
    plan_drop_front(&u, drop);
    if (header_only) {
        return commit_header(&u, image->seen.autoclear_livebackup &&
                                 image->trust == QLB_TRUSTED, err);
    }
    ret = commit(&u, err);
    update_release(&u);
    return ret;
}
