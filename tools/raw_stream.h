/* The content of a disk, front to back, from a chain of archives: for a pipe.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef RAW_STREAM_H
#define RAW_STREAM_H

#include "restore_chain.h"

/* Writes all bytes of the disk to the descriptor, from its present position;
 * where that is a regular file, which must end there, zeroes become holes. The
 * chain, which begins with a full archive, is read to its end. */
int raw_stream_write(struct qlb_chain *chain, int fd, const char *name,
                     unsigned threads, struct restore_meter *meter,
                     struct qlb_error *err);

#endif
