/* Dumping what a killed QEMU left: lbdump --interrupted.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef INTERRUPTED_H
#define INTERRUPTED_H

#include "dump_archive.h"

struct interrupted_options {
    const char *disk;
    const char *orig;   /* NULL: where QEMU makes it by default */
    const char *output; /* NULL: standard output */
    bool copy;          /* leave the image as it is */
};

/* Returns the exit status; messages are out then. */
int dump_interrupted(const struct interrupted_options *options,
                     const struct dump_request *request);

#endif
