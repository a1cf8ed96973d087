/* The disks of a stock QEMU, and the dirty bitmaps that lbvm keeps in them.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_STOCK_DISKS_H
#define VM_STOCK_DISKS_H

#include "qmp.h"
#include "vm/source.h"

/* "lbvm-UUID": tracks changes since that checkpoint. */
#define STOCK_NAME_SIZE (sizeof("lbvm-") + QLB_UUID_TEXT)
char *stock_bitmap_name(const struct qlb_uuid *checkpoint,
                        char name[STOCK_NAME_SIZE]);

/* The checkpoint of a bitmap of that name; false: it is not one of lbvm's. */
bool stock_bitmap_checkpoint(const char *name, struct qlb_uuid *checkpoint);

struct stock_disk {
    char *node;       /* name of the qcow2 node */
    uint64_t size;    /* bytes */
    bool can_track;   /* the image's version allows for bitmaps in it */
};

/* Adds to the source these disks (device, path of the device, or node), called
 * by these names (NULL: as they are asked for), or where there are none all
 * qcow2 disks that the guest may write to; with the checkpoints whose bitmaps
 * can be trusted. disks: one for each, for the caller to free, as their
 * nodes. */
int stock_find_disks(struct qmp *qmp, char *const *wanted,
                     char *const *names, unsigned n, struct source *source,
                     struct stock_disk **disks, struct qlb_error *err);

/* Whether they can be exported without danger to the guest: QLB_E_UNTRUSTED
 * where QEMU is too old for disks of an iothread. */
int stock_check_threads(struct qmp *qmp, const struct source *source,
                        const struct stock_disk *disks, struct qlb_error *err);

#endif
