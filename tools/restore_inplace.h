/* Rollback in place: an image gets the content of a chain of archives, by
 * rewriting what differs.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef RESTORE_INPLACE_H
#define RESTORE_INPLACE_H

#include "restore_chain.h"

struct inplace_options {
    const char *disk;
    const char *const *inputs; /* all archives that were given */
    unsigned n_inputs;
    unsigned threads;
    bool rescan;  /* compare the whole disk, whatever the bitmaps say */
    bool force;   /* also where the image is not known to be of that disk */
    bool quiet;
    enum tool_progress_mode progress;
};

struct inplace;

/* The chain, which begins with a full archive, becomes the object's, also
 * where this fails. Opens and locks the image, finds out what differs, and
 * reads and checks all that is needed of the archives. Nothing is written.
 * QLB_E_UNTRUSTED where the image is that of another disk. */
struct inplace *inplace_prepare(const struct inplace_options *options,
                                struct qlb_chain *chain,
                                struct qlb_error *err);
void inplace_free(struct inplace *inplace); /* NULL is allowed */

/* Bytes of data that will be, or have been, written. */
uint64_t inplace_bytes(const struct inplace *inplace);
/* Whether the whole disk was compared. */
bool inplace_compared(const struct inplace *inplace);

/* Rewrites. After a failure the image is marked as unfinished, which the
 * message tells, unless nothing was written yet. */
int inplace_run(struct inplace *inplace, struct restore_meter *meter,
                struct qlb_error *err);

#endif
