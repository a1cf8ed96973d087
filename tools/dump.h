/* The dump: from ranges of a disk to frames of an archive.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef DUMP_H
#define DUMP_H

#include "tool.h"

/* Which ranges of the disk go into the archive. */
struct dump_ranges {
    /* The first range at or after offset (length 0: none), in bytes, within
     * the disk. Offsets ascend over calls. */
    int (*next)(void *opaque, uint64_t offset, uint64_t *start,
                uint64_t *length, struct qlb_error *err);
    void *opaque;
};

struct dump_options {
    int level;
    unsigned threads;
    enum qlb_digest_type digest;
    struct tool_rate rate;
    enum tool_progress_mode progress;
    uint64_t expected; /* bytes, for the progress; 0 if not known */
};

/* Reads the ranges from the disk and appends them to the writer: as frames
 * and, where incremental, ZERO runs. Ranges are widened to whole blocks. Does
 * not seal the writer. */
int dump_run(const struct qlb_disk *disk, const struct dump_ranges *ranges,
             bool incremental, const struct dump_options *options,
             struct qlb_lbz_writer *writer, struct qlb_error *err);

#endif
