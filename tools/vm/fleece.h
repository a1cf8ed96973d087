/* Fleecing: a stock QEMU keeps a point in time of some disks readable over NBD.
 *
 * A backup job without sync copies each block, before the guest overwrites it,
 * to an overlay, whose backing file is the disk; the overlay is exported. One
 * transaction begins all of it.
 *
 * What is left of a client that died, the next one clears (vm/scratch.h).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_FLEECE_H
#define VM_FLEECE_H

#include "qmp.h"

struct fleece_disk {
    const char *node;    /* of the qcow2 disk */
    const char *filename; /* of its image: who owns it may open the overlay */
    uint64_t size;       /* bytes */
    const char *bitmap;  /* to be added, persistent, at the point in time; NULL:
                            none */
    const char *changes; /* a bitmap whose bits of the point in time are
                            exported; NULL: none */
};

struct fleece;
struct nbd_way;

/* Clears what dead clients have left. To be called before disks are looked for:
 * a job puts a filter on its disk. QLB_E_BUSY where the client lives, or where
 * QEMU is on another host (far) and may have one on that. */
int fleece_clear(struct qmp *qmp, bool far, struct qlb_error *err);
/* Clears scratch folders in that one whose QEMU is dead, too, where they are of
 * a disk of this QEMU. changed: bitmaps may have gone. */
int fleece_sweep(struct qmp *qmp, const char *parent, bool *changed,
                 struct qlb_error *err);

/* way: to a QEMU on another host; NULL: it is on this one. scratch: the folder,
 * on that host, in which one for this backup is made; on another host, in which
 * overlays are. NULL on failure; nothing is left then but, where a command of
 * QEMU failed, what the next one clears. way, scratch and disks must outlive
 * it. */
struct fleece *fleece_begin(struct qmp *qmp, const struct nbd_way *way,
                            const char *scratch,
                            const struct fleece_disk *disks, unsigned n,
                            uint64_t *time, struct qlb_error *err);
/* The export of disk i, and the name of its bitmap (NULL: none). */
const char *fleece_uri(const struct fleece *fleece, unsigned i);
const char *fleece_bitmap(const struct fleece *fleece, unsigned i);
/* Whether the exported bitmap of disk i, which had that size at its checkpoint,
 * is one that fleece_begin has added, and has all changes since: the disk was
 * not shrunk, nor the bitmap cleared. */
int fleece_has_canaries(const struct fleece *fleece, unsigned i,
                        uint64_t size, bool *whole, struct qlb_error *err);
/* Whether the jobs still run: else what was read is not the point in time. */
int fleece_check(struct fleece *fleece, struct qlb_error *err);
/* Takes all of it away, the new bitmaps, too, unless they are to be kept; the
 * first error is told. The connection is not interruptible from then on. NULL
 * is allowed. */
int fleece_end(struct fleece *fleece, bool keep, struct qlb_error *err);

#endif
