/* A disk held against the chain of its archives.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef COMPARE_H
#define COMPARE_H

#include "tool.h"

struct compare_options {
    unsigned threads;
    enum tool_progress_mode progress;
};

/* Compares every block of the disk with the digests of the chain (which must
 * begin with a full archive). The first differences are printed, each range
 * once; QLB_E_DAMAGED where there are any. */
int compare_with_disk(struct qlb_chain *chain, const char *path,
                      const struct compare_options *options,
                      struct qlb_error *err);

#endif
