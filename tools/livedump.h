/* Dumping the disks of a running QEMU: lbdump --qmp.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef LIVEDUMP_H
#define LIVEDUMP_H

#include "dump_archive.h"

struct livedump_options {
    const char *socket;
    const char **disks;   /* as QEMU calls them; none: all with livebackup */
    unsigned n_disks;
    const char **outputs; /* in the order of the disks, or one folder that
                             ends with a slash; none: standard output */
    unsigned n_outputs;
    bool durable;         /* survives a power loss; costs the guest syncs */
};

/* Whether the path of an output means a folder. */
bool livedump_is_folder(const char *path);

/* Returns the exit status; messages are out then. */
int livedump(const struct livedump_options *options,
             const struct dump_request *request);

#endif
