/* What pruning is to do to the backups of a machine: which are kept, which are
 * dropped, and whose archives are merged into whose.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_PLAN_H
#define VM_PLAN_H

#include "vm/repository.h"
#include "vm/retention.h"

enum plan_action {
    PLAN_KEEP, /* by a rule, or as the newest of its label */
    PLAN_HOLD, /* dropped, but several others go on from its archives */
    PLAN_DROP,
};

/* A disk of a backup, with its archive. */
struct plan_node {
    struct manifest_disk *disk;
    unsigned backup;
    struct plan_node *parent; /* NULL: full, or the parent is missing */
    struct plan_node *child;  /* of a dropped one: by which it is needed */
    bool sound;               /* the chain down to it was looked at */
};

struct plan_backup {
    struct manifest *manifest;
    enum plan_action action;
    enum retention_rule rule; /* RETENTION_RULES: none; the newest */
    struct plan_node *nodes;
    unsigned refs;            /* disks of others that have one as parent */
    char *hold_for;           /* of PLAN_HOLD: the reason, as kept_for */
};

struct plan {
    const struct machine *machine;
    struct plan_backup *backups; /* in the order they were made in */
    unsigned n_backups;
    struct plan_node *nodes;
    unsigned n_nodes;
};

/* Of the manifests that are loaded, which the plan refers to. Archives that
 * will be needed are there, in their size, and their chains are complete:
 * else QLB_E_UNTRUSTED or QLB_E_DAMAGED. */
int plan_make(struct plan *plan, const struct machine *machine,
              const struct retention *retention, struct qlb_error *err);
void plan_release(struct plan *plan);

/* The dropped archives that are merged into that of a disk that stays: their
 * number, and the oldest. */
unsigned plan_run(const struct plan *plan, const struct plan_node *node,
                  struct plan_node **oldest);

#endif
