/* Dumping the disks of a running QEMU: lbdump --qmp.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef LIVEDUMP_H
#define LIVEDUMP_H

#include "dump.h"

enum livedump_mode {
    LIVEDUMP_FULL, LIVEDUMP_INCREMENTAL, LIVEDUMP_SINCE, LIVEDUMP_AUTO,
};

struct livedump_options {
    const char *socket;
    const char **disks;   /* as QEMU calls them; none: all with livebackup */
    unsigned n_disks;
    const char **outputs; /* in the order of the disks, or one folder that
                             ends with a slash; none: standard output */
    unsigned n_outputs;
    enum livedump_mode mode;
    struct qlb_uuid since;
    const char *label;
    bool trust_pipe, force, quiet, json;
    struct dump_options dump;
};

/* Whether the path of an output means a folder. */
bool livedump_is_folder(const char *path);

/* Returns the exit status; messages are out then. */
int livedump(const struct livedump_options *options);

#endif
