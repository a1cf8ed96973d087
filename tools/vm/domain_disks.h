/* What a domain's description, and its QEMU, tell of its disks.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_DOMAIN_DISKS_H
#define VM_DOMAIN_DISKS_H

#include "vm/domain.h"

/* A <disk> that is qcow2 and that the guest may write to. Strings are the
 * list's; NULL where the description doesn't have them. */
struct described_disk {
    char *target, *file;
    char *pool, *volume; /* where libvirt knows the file by these */
    /* in a domain that runs: */
    char *alias;         /* of its device */
    char *index;         /* a number that is in the names of its nodes */
};

struct described_disks {
    struct described_disk *disks;
    unsigned n;
};

/* xml: of the domain of that name. */
int described_disks_parse(struct described_disks *list, const char *xml,
                          const char *name, struct qlb_error *err);
void described_disks_release(struct described_disks *list);

/* The name of the node that has the disk's format; for the caller to free. NULL
 * on failure. blocks: what query-block returns; nodes: query-named-block-nodes,
 * flat. */
char *described_disk_node(const struct described_disk *disk,
                          const json_t *blocks, const json_t *nodes,
                          const char *name, struct qlb_error *err);

#endif
