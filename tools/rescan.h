/* What has changed since a chain of archives, found by its digests: for a disk
 * whose bitmaps don't tell.
 *
 * Order of calls: open; run; next as the ranges of a dump; close.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef RESCAN_H
#define RESCAN_H

#include <sys/stat.h>

#include "block_set.h"
#include "compare.h"

struct rescan {
    /* asked for */
    const char *const *inputs; /* the archives, in any order */
    unsigned n_inputs;         /* 0: no rescan */

    struct qlb_chain *chain;
    struct block_set set;      /* blocks that differ */
};

/* Opens the chain, which must begin with a full archive. */
int rescan_open(struct rescan *rescan, struct qlb_error *err);
void rescan_close(struct rescan *rescan);

/* Whether that file is one of the chain's. */
bool rescan_has_file(const struct rescan *rescan, const struct stat *st);

/* Whether the error is about an archive of the chain. */
bool rescan_is_named(const struct rescan *rescan, const struct qlb_error *err);

/* Compares the disk, which path names in messages, with the chain. The disk
 * must be locked until the ranges were read. */
int rescan_run(struct rescan *rescan, const struct qlb_disk *disk,
               const char *path, const struct compare_options *options,
               struct qlb_error *err);

/* `next` of dump_ranges, whose opaque pointer is the rescan: whole blocks, the
 * last one may reach beyond the disk's end. */
int rescan_next(void *rescan, uint64_t offset, uint64_t *start,
                uint64_t *length, struct qlb_error *err);

#endif
