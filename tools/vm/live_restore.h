/* lbvm restore --live: a machine runs on its backup, and is restored meanwhile.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_LIVE_RESTORE_H
#define VM_LIVE_RESTORE_H

#include "vm/live_folder.h"
#include "vm/restorable.h"

struct live_restore_disk {
    const struct manifest_disk *disk;
    const char *path;
};

struct live_restore {
    const struct restorable *from;
    struct live_folder *folder;      /* open */
    const struct live_restore_disk *disks;
    unsigned n_disks;
    const char *qmp;                 /* of QEMU's monitor; NULL: none */
    uint64_t rate;                   /* bytes per second of all disks; 0 */
    enum tool_progress_mode progress;
    bool quiet;

    /* Called before the machine may be started, and before the folder is noted
     * as ready: the definition's file. */
    int (*prepare)(void *opaque, struct qlb_error *err);
    /* Called when it may be started. */
    int (*ready)(void *opaque, struct qlb_error *err);
    void *opaque;
};

/* Makes the disks that are not there yet, serves them, and ends when all are
 * whole, or by a signal: then an error, too. The error of a disk whose
 * archives are damaged is QLB_E_DAMAGED. */
int live_restore(const struct live_restore *wanted, struct qlb_error *err);

#endif
