/* Checking an archive to its last byte, of lbverify and lbvm.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef ARCHIVE_CHECK_H
#define ARCHIVE_CHECK_H

#include "tool.h"

/* Threads' buffers, for any number of archives, one after the other. */
struct archive_check;
struct archive_check *archive_check_new(unsigned threads,
                                        enum tool_progress_mode progress,
                                        struct qlb_error *err);
void archive_check_free(struct archive_check *check); /* NULL is allowed */

/* Reads all of it: every digest, every structure, and the layout. Each damage
 * is told to `report`, and the rest is still checked. Returns how many there
 * were; a signal counts as one. */
unsigned archive_check_run(struct archive_check *check,
                           struct qlb_lbz_reader *reader,
                           void (*report)(void *opaque,
                                          const struct qlb_error *err),
                           void *opaque);

#endif
