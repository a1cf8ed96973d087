/* Several things of one kind at once.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef PARALLEL_H
#define PARALLEL_H

#include "tool.h"

/* Calls do_one for 0 to n - 1, at most at_once of them at the same time. After
 * one has failed no further one is begun, and its error is the result, with
 * its number in *culprit (may be NULL). Fewer threads than asked for are
 * slower, and no error. */
int parallel_run(unsigned n, unsigned at_once,
                 int (*do_one)(void *opaque, unsigned i,
                               struct qlb_error *err),
                 void *opaque, unsigned *culprit, struct qlb_error *err);

#endif
