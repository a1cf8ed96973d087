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
    /* Called for each block that differs, ascending, instead of a message; may
     * be NULL. Where it does not return 0 the comparison ends. */
    int (*differs)(void *opaque, uint64_t offset, struct qlb_error *err);
    /* Which stripes are looked at, by their offset; NULL: all. */
    bool (*wanted)(void *opaque, uint64_t offset);
    void *opaque;
};

/* Compares every block of the disk with the digests of the chain (which must
 * begin with a full archive). The first differences are printed, each range
 * once; QLB_E_DAMAGED where there are any. */
int compare_with_disk(struct qlb_chain *chain, const char *path,
                      const struct compare_options *options,
                      struct qlb_error *err);

/* The same of the first `size` bytes of a disk that is open, path naming it in
 * messages. Differences are no error: *blocks tells how many there are. */
int compare_open_disk(struct qlb_chain *chain, const struct qlb_disk *disk,
                      const char *path, uint64_t size,
                      const struct compare_options *options,
                      uint64_t *blocks, struct qlb_error *err);

/* QLB_E_UNTRUSTED where the chain is not known to be of this disk: ext is that
 * of its image, or NULL. */
int compare_check_identity(const struct qlb_chain *chain,
                           const struct qlb_ext *ext, const char *path,
                           struct qlb_error *err);

#endif
