/* Copy before write: which originals must be saved, and who saves them.
 *
 * Part of libqcow2lb-core, which the patched QEMU links: libc only, no I/O, no
 * locks, no threads, no allocation. Source: live-backup.md ("Copy before
 * write"). The caller holds a lock of his own around each call, but for
 * qlb_cbw_free_to_go.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_CBW_H
#define QLB_CBW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QLB_CBW_MIN_UNIT_BITS 16

/* Units first to first + count - 1. */
struct qlb_units {
    uint64_t first, count;
};

/* One disk of a set. The bitmaps have a bit for each unit, the lowest of a byte
 * first; a unit is in one of four states:
 *
 *   todo  busy  released
 *    0     0     0   free: saved, or never part of the set
 *    1     0     0   the original is in the image alone
 *    1     1     0   a request is saving it, others wait
 *    0     0     1   the client has it; not saved any more
 */
struct qlb_cbw {
    uint64_t disk_size; /* bytes, at the point in time */
    unsigned unit_bits;
    uint64_t n_units;
    uint8_t *todo, *busy, *released;
    /* units; busy ones are counted as todo too */
    uint64_t n_todo, n_busy, n_saved, n_released;
    bool overwritten; /* the image says that released units were overwritten */
    bool broken;
};

/* log2 of the unit for an image of that granularity and cluster size. */
unsigned qlb_cbw_unit_bits(unsigned granularity_bits, unsigned cluster_bits);
/* Bytes of each of the three bitmaps. */
size_t qlb_cbw_bitmap_size(uint64_t disk_size, unsigned unit_bits);

/* bitmaps: 3 * qlb_cbw_bitmap_size() bytes of zeroes, which stay the caller's.
 * No unit is in the set yet. */
void qlb_cbw_init(struct qlb_cbw *cbw, uint64_t disk_size, unsigned unit_bits,
                  uint8_t *bitmaps);
/* Takes all units into the set. This and the next before any write asks. */
void qlb_cbw_add_all(struct qlb_cbw *cbw);
/* Takes the units into the set that have a set bit of a dirty bitmap of the
 * disk, of a granularity not larger than the unit. */
void qlb_cbw_add_dirty(struct qlb_cbw *cbw, const uint8_t *dirty,
                       unsigned granularity_bits);

/* The units that a range of guest bytes touches; none behind the end of the
 * disk. */
struct qlb_units qlb_cbw_units_of(const struct qlb_cbw *cbw, uint64_t offset,
                                  uint64_t bytes);

/* Whether a write to these units needs no step at all. Needs no lock: where it
 * says yes, what was done before the units were set free is visible. */
bool qlb_cbw_free_to_go(const struct qlb_cbw *cbw, struct qlb_units units);

enum qlb_cbw_step {
    QLB_CBW_GO,   /* all are free: the write may go on */
    QLB_CBW_SAVE, /* part is the caller's to save: then _saved or _failed */
    QLB_CBW_WAIT, /* the first unit is being saved by another: ask again when
                     that ended */
    QLB_CBW_MARK, /* the image must say first that released units are
                     overwritten: then qlb_cbw_marked, and ask again */
};

/* What a write to these units must do next. Units that it may change are taken
 * off the front of `units` (all of them: GO). The part, set for SAVE alone, is
 * at most max_units long (at least 1). One that waits holds nothing. */
enum qlb_cbw_step qlb_cbw_next(struct qlb_cbw *cbw, struct qlb_units *units,
                               uint64_t max_units, struct qlb_units *part);

/* The part is published: wake who waits. */
void qlb_cbw_saved(struct qlb_cbw *cbw, struct qlb_units part);
/* The part could not be saved, and is to be saved still: wake who waits. */
void qlb_cbw_failed(struct qlb_cbw *cbw, struct qlb_units part);
/* The image says that released units are overwritten. */
void qlb_cbw_marked(struct qlb_cbw *cbw);

/* The client has this range, in bytes: units that lie in it as a whole (the
 * last one: up to the end of the disk) need not be saved any more. One that is
 * being saved now is saved all the same. Returns how many it released. */
uint64_t qlb_cbw_release(struct qlb_cbw *cbw, uint64_t offset, uint64_t bytes);

/* Nothing is saved any more: every write may go on. Parts that are being saved
 * may still end, either way. */
void qlb_cbw_break(struct qlb_cbw *cbw);

#endif
