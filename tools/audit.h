/* The bitmap of a disk held against the digests of its archives.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef AUDIT_H
#define AUDIT_H

#include "rescan.h"

/* A block has changed and its bit is clean: no error of the tool's. */
enum { AUDIT_ALARM = 6 };

struct audit_options {
    const char *path;
    const char *const *inputs; /* the chain */
    unsigned n_inputs;
    unsigned share;            /* percent of the disk, 1 to 100 */
    uint64_t seed;             /* which of its stripes */
    unsigned threads;
    enum tool_progress_mode progress;
    bool quiet;
};

/* Changes nothing in the image. Messages are printed. Returns the exit
 * status. */
int audit(const struct audit_options *options);

#endif
