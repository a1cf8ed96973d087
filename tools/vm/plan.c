/* What pruning is to do.
 *
 * Archives of an image form a tree. One that is dropped and that nothing which
 * stays goes on from just goes. One that a single archive goes on from is
 * merged into that. Where there are several its backup is held: merging it into
 * each would take its space again and again. Holding a backup holds all of its
 * disks, which may make others held: repeated until nothing changes.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/plan.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* ---- the tree ---- */

static int compare_nodes(const void *a, const void *b)
{
    const struct plan_node *x = *(struct plan_node *const *)a;
    const struct plan_node *y = *(struct plan_node *const *)b;
    int order = memcmp(&x->disk->image, &y->disk->image,
                       sizeof(x->disk->image));

    return order != 0 ? order
                      : memcmp(&x->disk->checkpoint, &y->disk->checkpoint,
                               sizeof(x->disk->checkpoint));
}

static struct plan_node *find_parent(struct plan_node **sorted, unsigned n,
                                     const struct plan_node *node)
{
    struct manifest_disk disk = {
        .image = node->disk->image, .checkpoint = node->disk->parent,
    };
    struct plan_node wanted = { .disk = &disk }, *key = &wanted, **found;

    if (qlb_uuid_is_zero(&disk.checkpoint)) {
        return NULL;
    }
    found = bsearch(&key, sorted, n, sizeof(*sorted), compare_nodes);
    return found == NULL ? NULL : *found;
}

static void add_backup(struct plan *plan, unsigned i)
{
    struct plan_backup *backup = &plan->backups[i];

    backup->manifest = machine_backup(plan->machine, i);
    backup->action = PLAN_DROP;
    backup->rule = RETENTION_RULES;
    backup->nodes = &plan->nodes[plan->n_nodes];
    for (unsigned k = 0; k < backup->manifest->n_disks; k++) {
        plan->nodes[plan->n_nodes++] = (struct plan_node) {
            .disk = &backup->manifest->disks[k], .backup = i,
        };
    }
}

static int build_tree(struct plan *plan, struct qlb_error *err)
{
    unsigned n = 0;
    struct plan_node **sorted;

    for (unsigned i = 0; i < plan->n_backups; i++) {
        n += machine_backup(plan->machine, i)->n_disks;
    }
    plan->backups = calloc(plan->n_backups + 1, sizeof(*plan->backups));
    plan->nodes = calloc(n + 1, sizeof(*plan->nodes));
    sorted = calloc(n + 1, sizeof(*sorted));
    if (plan->backups == NULL || plan->nodes == NULL || sorted == NULL) {
        free(sorted);
        return qlb_fail_errno(err, ENOMEM, "pruning");
    }
    for (unsigned i = 0; i < plan->n_backups; i++) {
        add_backup(plan, i);
    }
    for (unsigned i = 0; i < n; i++) {
        sorted[i] = &plan->nodes[i];
    }
    qsort(sorted, n, sizeof(*sorted), compare_nodes);
    for (unsigned i = 0; i < n; i++) {
        struct plan_node *node = &plan->nodes[i];

        node->parent = find_parent(sorted, n, node);
        if (node->parent != NULL) {
            plan->backups[node->parent->backup].refs++;
        }
    }
    free(sorted);
    return 0;
}

/* ---- what is kept ---- */

static int compare_times(const void *a, const void *b)
{
    const struct plan_backup *x = *(struct plan_backup *const *)a;
    const struct plan_backup *y = *(struct plan_backup *const *)b;

    if (x->manifest->time != y->manifest->time) {
        return x->manifest->time < y->manifest->time ? -1 : 1;
    }
    return x < y ? -1 : 1; /* as they were made */
}

/* The backups of a label; what was not kept once does not count again. */
static unsigned with_label(const struct plan *plan, const char *label,
                           struct plan_backup **list)
{
    unsigned n = 0;

    for (unsigned i = 0; i < plan->n_backups; i++) {
        const struct manifest *manifest = plan->backups[i].manifest;

        if (manifest->kept_for == NULL &&
            strcmp(manifest->label, label) == 0) {
            list[n++] = &plan->backups[i];
        }
    }
    return n;
}

static void keep_label(struct plan *plan, const struct retention *retention,
                       const char *label, struct plan_backup **list,
                       uint64_t *times, enum retention_rule *kept)
{
    unsigned n = with_label(plan, label, list);

    if (n == 0 || list[n - 1]->action == PLAN_KEEP) {
        return; /* this label has had its turn */
    }
    list[n - 1]->action = PLAN_KEEP; /* also where a clock went back */
    qsort(list, n, sizeof(*list), compare_times);
    for (unsigned i = 0; i < n; i++) {
        times[i] = list[i]->manifest->time;
    }
    retention_apply(retention, times, n, kept);
    for (unsigned i = 0; i < n; i++) {
        if (kept[i] != RETENTION_RULES) {
            list[i]->action = PLAN_KEEP;
            list[i]->rule = kept[i];
        }
    }
}

static int choose(struct plan *plan, const struct retention *retention,
                  struct qlb_error *err)
{
    unsigned n = plan->n_backups;
    struct plan_backup **list = calloc(n + 1, sizeof(struct plan_backup *));
    uint64_t *times = calloc(n + 1, sizeof(*times));
    enum retention_rule *kept = calloc(n + 1, sizeof(*kept));
    bool good = list != NULL && times != NULL && kept != NULL;

    for (unsigned i = 0; good && i < n; i++) {
        keep_label(plan, retention, plan->backups[i].manifest->label, list,
                   times, kept);
    }
    free(list);
    free(times);
    free(kept);
    return good ? 0 : qlb_fail_errno(err, ENOMEM, "pruning");
}

/* ---- what is held ---- */

static bool is_dropped(const struct plan *plan, const struct plan_node *node)
{
    return plan->backups[node->backup].action == PLAN_DROP;
}

/* Marks what the node needs of dropped ones; true: one became held. */
static bool mark_needed(struct plan *plan, struct plan_node *node)
{
    for (struct plan_node *x = node->parent; x != NULL && is_dropped(plan, x);
         node = x, x = x->parent) {
        if (x->child == node) {
            return false; /* and so on */
        }
        if (x->child != NULL) {
            plan->backups[x->backup].action = PLAN_HOLD;
            return true;
        }
        x->child = node;
    }
    return false;
}

static void hold(struct plan *plan)
{
    bool changed;

    do {
        changed = false;
        for (unsigned i = 0; i < plan->n_nodes; i++) {
            plan->nodes[i].child = NULL;
        }
        for (unsigned i = 0; i < plan->n_nodes && !changed; i++) {
            if (!is_dropped(plan, &plan->nodes[i])) {
                changed = mark_needed(plan, &plan->nodes[i]);
            }
        }
    } while (changed);
}

/* Whether a disk of the backup goes on from the held one, over what is
 * merged. */
static bool goes_on_from(const struct plan *plan,
                         const struct plan_backup *backup, unsigned held)
{
    for (unsigned k = 0; k < backup->manifest->n_disks; k++) {
        const struct plan_node *x = backup->nodes[k].parent;

        while (x != NULL && is_dropped(plan, x)) {
            x = x->parent;
        }
        if (x != NULL && x->backup == held) {
            return true;
        }
    }
    return false;
}

static int tell_hold(struct plan *plan, unsigned held, struct qlb_error *err)
{
    enum { LISTED = 3 };
    char text[200] = "its archives are needed by";
    unsigned n = 0;

    for (unsigned i = 0; i < plan->n_backups; i++) {
        const struct plan_backup *backup = &plan->backups[i];
        size_t used = strlen(text);

        if (backup->action == PLAN_DROP || i == held ||
            !goes_on_from(plan, backup, held)) {
            continue;
        }
        if (++n <= LISTED) {
            snprintf(text + used, sizeof(text) - used, "%s %s",
                     n == 1 ? "" : ",", backup->manifest->id);
        }
    }
    if (n > LISTED) {
        size_t used = strlen(text);

        snprintf(text + used, sizeof(text) - used, " and %u more",
                 n - LISTED);
    }
    plan->backups[held].hold_for = strdup(text);
    return plan->backups[held].hold_for == NULL
               ? qlb_fail_errno(err, ENOMEM, "pruning") : 0;
}

/* ---- whether what is needed is there ---- */

static int check_archive(const struct plan *plan,
                         const struct manifest_disk *disk,
                         struct qlb_error *err)
{
    char *path = machine_object_path(plan->machine, disk->archive);
    struct stat st;
    int ret = 0;

    if (path == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", disk->archive);
    }
    if (stat(path, &st) < 0) {
        ret = errno == ENOENT
                  ? qlb_fail(err, QLB_E_UNTRUSTED, "%s: is missing: the "
                             "chain of disk '%s' is broken", path, disk->name)
                  : qlb_fail_errno(err, errno, "%s", path);
    } else if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size != disk->bytes) {
        ret = qlb_fail(err, QLB_E_DAMAGED, "%s: has %llu bytes, and not the "
                       "%llu that were written", path,
                       (unsigned long long)st.st_size,
                       (unsigned long long)disk->bytes);
    }
    free(path);
    return ret;
}

static bool has_good_parent(const struct plan_node *node)
{
    const struct plan_node *parent = node->parent;

    return parent == NULL ? qlb_uuid_is_zero(&node->disk->parent)
                          : strcmp(parent->disk->digest,
                                   node->disk->digest) == 0;
}

/* Up to a full archive, or to what was checked before. */
static int check_chain(const struct plan *plan, struct plan_node *node,
                       struct qlb_error *err)
{
    struct plan_node *first = node;
    struct store_names objects;
    unsigned steps = 0;

    for (; node != NULL && !node->sound; node = node->parent) {
        if (check_archive(plan, node->disk, err) < 0) {
            return -1;
        }
        if (!has_good_parent(node) || ++steps > plan->n_nodes) {
            break;
        }
    }
    if (node != NULL && !node->sound) {
        /* which finds that too, and has the words for it */
        if (machine_chain(plan->machine, first->disk, &objects, err) < 0) {
            return -1;
        }
        store_names_release(&objects);
        return 0;
    }
    for (node = first;
         node != NULL && !node->sound; node = node->parent) {
        node->sound = true;
    }
    return 0;
}

static int check_needed(struct plan *plan, struct qlb_error *err)
{
    for (unsigned i = 0; i < plan->n_nodes; i++) {
        if (!is_dropped(plan, &plan->nodes[i]) &&
            check_chain(plan, &plan->nodes[i], err) < 0) {
            return -1;
        }
    }
    return 0;
}

/* ---- all of it ---- */

int plan_make(struct plan *plan, const struct machine *machine,
              const struct retention *retention, struct qlb_error *err)
{
    *plan = (struct plan) {
        .machine = machine, .n_backups = machine_n_backups(machine),
    };
    if (build_tree(plan, err) < 0 || choose(plan, retention, err) < 0) {
        return -1;
    }
    hold(plan);
    for (unsigned i = 0; i < plan->n_backups; i++) {
        if (plan->backups[i].action == PLAN_HOLD &&
            tell_hold(plan, i, err) < 0) {
            return -1;
        }
    }
    return check_needed(plan, err);
}

void plan_release(struct plan *plan)
{
    for (unsigned i = 0; plan->backups != NULL && i < plan->n_backups; i++) {
        free(plan->backups[i].hold_for);
    }
    free(plan->backups);
    free(plan->nodes);
}

unsigned plan_run(const struct plan *plan, const struct plan_node *node,
                  struct plan_node **oldest)
{
    unsigned n = 0;

    *oldest = NULL;
    for (struct plan_node *x = node->parent; x != NULL && is_dropped(plan, x);
         x = x->parent) {
        *oldest = x;
        n++;
    }
    return n;
}
