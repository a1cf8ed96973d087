/* lbvm prune: keeps the backups that a policy names, and what they need.
 *
 * A backup that stays gets the archives merged into its own that lead to it and
 * don't stay, all of them in one pass; then its manifest names the merged ones;
 * then go the manifests that nothing goes on from any more, and last their
 * archives. So at each moment all of the chains that manifests tell of are
 * whole, and a pruning that was killed is finished by the next: it finds
 * leftovers, and backups that nobody needs.
 *
 * Nothing is deleted before the first merge is done, which reads and checks all
 * that it merges; a chain that is found damaged later stays as it is.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "merge_chain.h"
#include "vm/commands.h"
#include "vm/far.h"
#include "vm/options.h"
#include "vm/outcome.h"
#include "vm/plan.h"

enum {
    OPT_KEEP = TOOL_OPT_LONG, /* and the other rules, in their order */
    OPT_DRY_RUN = OPT_KEEP + RETENTION_RULES, OPT_THREADS, OPT_PROGRESS,
};

enum { MAX_KEEP = 1000000 };

static const struct tool_option options[] = {
    VM_REPOSITORY_OPTION,
    { "keep-last", OPT_KEEP + RETENTION_LAST, "N", "keep the newest N" },
    { "keep-hourly", OPT_KEEP + RETENTION_HOURLY, "N",
      "keep the newest of each of N hours that have one" },
    { "keep-daily", OPT_KEEP + RETENTION_DAILY, "N", "... of N days" },
    { "keep-weekly", OPT_KEEP + RETENTION_WEEKLY, "N",
      "... of N weeks, Monday to Sunday" },
    { "keep-monthly", OPT_KEEP + RETENTION_MONTHLY, "N", "... of N months" },
    { "keep-yearly", OPT_KEEP + RETENTION_YEARLY, "N", "... of N years" },
    { "dry-run", OPT_DRY_RUN, NULL, "only tell what would be done" },
    { "threads", OPT_THREADS, "N", "threads (default: one per processor)" },
    { "progress", OPT_PROGRESS, NULL, "show progress, also without a terminal" },
    { "quiet", 'q', NULL, "show neither progress nor what was done" },
    VM_METRICS_OPTION,
    VM_JSON_OPTION,
    TOOL_COMMON_OPTIONS
};

const struct tool vm_prune_tool = {
    .name = "lbvm prune",
    .synopsis = "[OPTION]... --keep-...=N [MACHINE]...",
    .summary = "Keeps some backups of each machine (default: of all), and "
               "drops the others. Rules\nare applied in the order below; "
               "periods are those of local time.",
    .options = options,
};

struct prune {
    struct vm_options common;
    struct retention retention;
    bool dry_run, quiet;
    struct merge_options merge;
    json_t *results;

    /* the machine at work */
    struct machine *machine;
    struct plan plan;
    bool *deleted;        /* of each backup */
    unsigned merged;      /* archives that were merged into others */
    uint64_t before, after;
};

/* ---- merging ---- */

/* The members are what the manifests say; paths begins with the newest. */
static int check_members(const struct qlb_chain *chain, char *const *paths,
                         const struct plan_node *node, unsigned n,
                         struct qlb_error *err)
{
    for (unsigned i = 0; i < n; i++, node = node->parent) {
        if (qlb_chain_members(chain) != n ||
            !manifest_describes(node->disk,
                                qlb_chain_member(chain, n - 1 - i))) {
            return qlb_fail(err, QLB_E_DAMAGED, "%s: is not the archive that "
                            "the backup's manifest tells of", paths[i]);
        }
    }
    return 0;
}

/* The archive of the node and the n that come before it. */
static struct qlb_chain *open_run(const struct prune *p,
                                  const struct plan_node *node, unsigned n,
                                  struct qlb_error *err)
{
    const struct plan_node *at = node;
    char **paths = calloc(n, sizeof(*paths));
    struct qlb_chain *chain = NULL;
    bool good = paths != NULL;

    for (unsigned i = 0; good && i < n; i++, at = at->parent) {
        paths[i] = machine_object_path(p->machine, at->disk->archive);
        good = paths[i] != NULL;
    }
    if (good) {
        chain = qlb_chain_open((const char *const *)paths, n,
                               &node->disk->checkpoint, 0, err);
    } else {
        qlb_fail_errno(err, ENOMEM, "%s", node->disk->archive);
    }
    if (chain != NULL && check_members(chain, paths, node, n, err) < 0) {
        qlb_chain_close(chain);
        chain = NULL;
    }
    for (unsigned i = 0; paths != NULL && i < n; i++) {
        free(paths[i]);
    }
    free(paths);
    return chain;
}

static int write_merged(const struct prune *p, struct qlb_chain *chain,
                        const char *object, struct merge_result *result,
                        struct qlb_error *err)
{
    char *path = machine_object_path(p->machine, object);
    struct qlb_outfile *out;
    int ret;

    if (path == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", object);
    }
    out = qlb_outfile_create(path, 0, err);
    free(path);
    if (out == NULL) {
        return -1;
    }
    ret = merge_chain(chain, out, &p->merge, result, err);
    if (ret == 0) {
        ret = qlb_outfile_commit(out, err);
    }
    qlb_outfile_close(out);
    return ret;
}

/* In memory, the disk gets the merged archive; *old: the one that it had. */
static int take_merged(struct prune *p, struct plan_node *node,
                       const struct plan_node *oldest, char *object,
                       const struct merge_result *result, char **old,
                       struct qlb_error *err)
{
    struct manifest_disk *disk = node->disk;
    size_t size = strcmp(disk->digest, "sha256") == 0 ? 32 : 16;
    char root[2 * QLB_DIGEST_MAX + 1];

    qlb_hex(result->root, size, root);
    free(disk->root);
    disk->root = strdup(root);
    *old = disk->archive;
    disk->archive = object;
    disk->bytes = result->totals.archive_size;
    disk->parent = oldest->disk->parent;
    p->plan.backups[node->parent->backup].refs--;
    node->parent = oldest->parent;
    if (node->parent != NULL) {
        p->plan.backups[node->parent->backup].refs++;
    }
    return disk->root != NULL ? 0 : qlb_fail_errno(err, ENOMEM, "merging");
}

/* *old: the archive that the disk had, NULL where it needs no other. */
static int fold_disk(struct prune *p, struct plan_node *node, char **old,
                     struct qlb_error *err)
{
    struct plan_node *oldest;
    unsigned n = plan_run(&p->plan, node, &oldest);
    struct qlb_uuid random = tool_random_uuid();
    struct merge_result result;
    struct qlb_chain *chain;
    char *object;
    int ret;

    *old = NULL;
    if (n == 0) {
        return 0;
    }
    chain = open_run(p, node, n + 1, err);
    if (chain == NULL) {
        return -1;
    }
    object = machine_archive_object(p->machine, node->disk->name, &random,
                                    err);
    ret = object == NULL ? -1
                         : write_merged(p, chain, object, &result, err);
    qlb_chain_close(chain);
    if (ret < 0) {
        free(object);
        return -1;
    }
    p->merged += n;
    return take_merged(p, node, oldest, object, &result, old, err);
}

/* ---- deleting ---- */

/* The manifest, then its archives; what it went on from may go next. */
static int delete_backup(struct prune *p, unsigned i, struct qlb_error *err)
{
    struct plan_backup *backup = &p->plan.backups[i];
    char object[MANIFEST_ID_SIZE + 16];

    snprintf(object, sizeof(object), "backups/%s.json", backup->manifest->id);
    if (machine_delete(p->machine, object, err) < 0) {
        return -1;
    }
    p->deleted[i] = true;
    for (unsigned k = 0; k < backup->manifest->n_disks; k++) {
        const struct plan_node *parent = backup->nodes[k].parent;

        if (parent != NULL) {
            p->plan.backups[parent->backup].refs--;
        }
        if (machine_delete(p->machine, backup->manifest->disks[k].archive,
                           err) < 0) {
            return -1;
        }
    }
    return 0;
}

/* All that are dropped and that no disk goes on from, until there is none:
 * a chain goes from its end, so that what is listed stays restorable. */
static int delete_unneeded(struct prune *p, struct qlb_error *err)
{
    bool changed = true;

    while (changed) {
        changed = false;
        for (unsigned i = p->plan.n_backups; i-- > 0;) {
            const struct plan_backup *backup = &p->plan.backups[i];

            if (backup->action == PLAN_DROP && backup->refs == 0 &&
                !p->deleted[i]) {
                if (delete_backup(p, i, err) < 0) {
                    return -1;
                }
                changed = true;
            }
        }
    }
    return 0;
}

/* ---- one backup that stays ---- */

static bool same_text(const char *a, const char *b)
{
    return a == NULL || b == NULL ? a == b : strcmp(a, b) == 0;
}

/* Its merged archives, its manifest, and what is in nobody's way then. */
static int finish_backup(struct prune *p, struct plan_backup *backup,
                         char **old, bool *changed, struct qlb_error *err)
{
    struct manifest *manifest = backup->manifest;

    *changed = !same_text(manifest->kept_for, backup->hold_for);
    for (unsigned k = 0; k < manifest->n_disks; k++) {
        if (fold_disk(p, &backup->nodes[k], &old[k], err) < 0) {
            return -1;
        }
        *changed |= old[k] != NULL;
    }
    if (!*changed) {
        return 0;
    }
    free(manifest->kept_for);
    manifest->kept_for = backup->hold_for == NULL ? NULL
                                                  : strdup(backup->hold_for);
    return machine_put_manifest(p->machine, manifest, err);
}

static int fold_backup(struct prune *p, struct plan_backup *backup,
                       struct qlb_error *err)
{
    unsigned n = backup->manifest->n_disks;
    char **old = calloc(n, sizeof(*old));
    bool changed;
    int ret;

    if (old == NULL) {
        return qlb_fail_errno(err, ENOMEM, "pruning");
    }
    ret = finish_backup(p, backup, old, &changed, err);
    if (ret == 0 && changed) {
        ret = delete_unneeded(p, err);
    }
    for (unsigned k = 0; k < n; k++) {
        if (ret == 0 && old[k] != NULL) {
            ret = machine_delete(p->machine, old[k], err);
        }
        free(old[k]);
    }
    free(old);
    return ret;
}

/* ---- a machine ---- */

static uint64_t bytes_now(const struct prune *p)
{
    uint64_t bytes = 0;

    for (unsigned i = 0; i < p->plan.n_nodes; i++) {
        const struct plan_node *node = &p->plan.nodes[i];

        bytes += p->deleted[node->backup] ? 0 : node->disk->bytes;
    }
    return bytes;
}

/* After a crash there are manifests without need; they go with the others. */
static int execute(struct prune *p, struct qlb_error *err)
{
    for (unsigned i = 0; i < p->plan.n_backups; i++) {
        if (tool_stop) {
            return qlb_fail(err, QLB_E_RUNTIME, "interrupted; what remains "
                            "to be done is done next time");
        }
        if (p->plan.backups[i].action != PLAN_DROP &&
            fold_backup(p, &p->plan.backups[i], err) < 0) {
            return -1;
        }
    }
    return delete_unneeded(p, err);
}

static const char *rule_of(const struct plan_backup *backup)
{
    return backup->rule == RETENTION_RULES ? "newest"
                                           : retention_name(backup->rule);
}

static json_t *backup_to_json(const struct plan_backup *backup)
{
    static const char *const actions[] = {
        [PLAN_KEEP] = "keep", [PLAN_HOLD] = "hold", [PLAN_DROP] = "drop",
    };
    json_t *json = json_object();

    json_object_set_new(json, "id", json_string(backup->manifest->id));
    json_object_set_new(json, "time",
        json_integer((json_int_t)backup->manifest->time));
    json_object_set_new(json, "action",
                        json_string(actions[backup->action]));
    json_object_set_new(json, "rule",
                        backup->action == PLAN_KEEP
                            ? json_string(rule_of(backup)) : json_null());
    json_object_set_new(json, "kept_for", backup->hold_for == NULL
                                              ? json_null()
                                              : json_string(backup->hold_for));
    return json;
}

static void add_result(struct prune *p)
{
    json_t *json = json_object(), *backups = json_array();

    json_object_set_new(json, "machine",
                        json_string(machine_name(p->machine)));
    json_object_set_new(json, "dry_run", json_boolean(p->dry_run));
    for (unsigned i = 0; i < p->plan.n_backups; i++) {
        json_array_append_new(backups,
                              backup_to_json(&p->plan.backups[i]));
    }
    json_object_set_new(json, "backups", backups);
    json_object_set_new(json, "archives_merged", json_integer(p->merged));
    json_object_set_new(json, "bytes_before",
                        json_integer((json_int_t)p->before));
    json_object_set_new(json, "bytes_after", p->dry_run ? json_null()
        : json_integer((json_int_t)p->after));
    json_array_append_new(p->results, json);
}

static void print_backups(const struct prune *p)
{
    const char *name = machine_name(p->machine);

    for (unsigned i = 0; i < p->plan.n_backups; i++) {
        const struct plan_backup *backup = &p->plan.backups[i];

        if (backup->action == PLAN_KEEP) {
            printf("%s: keep %s: %s\n", name, backup->manifest->id,
                   rule_of(backup));
        } else if (backup->action == PLAN_HOLD) {
            printf("%s: hold %s: %s\n", name, backup->manifest->id,
                   backup->hold_for);
        } else {
            printf("%s: drop %s\n", name, backup->manifest->id);
        }
    }
}

static void report(struct prune *p)
{
    unsigned n[3] = { 0 };
    char before[16], after[16];

    if (p->common.json) {
        add_result(p);
        return;
    }
    if (p->dry_run) {
        print_backups(p);
    }
    for (unsigned i = 0; i < p->plan.n_backups; i++) {
        n[p->plan.backups[i].action]++;
    }
    if (p->quiet) {
        return;
    }
    printf("%s: %u kept, %u dropped", machine_name(p->machine), n[PLAN_KEEP],
           n[PLAN_DROP]);
    if (n[PLAN_HOLD] > 0) {
        printf(", %u held for others", n[PLAN_HOLD]);
    }
    if (p->dry_run) {
        printf(" (nothing was done)\n");
    } else {
        printf("; %s before, %s now\n", tool_format_size(p->before, before),
               tool_format_size(p->after, after));
    }
}

/* What only dropped backups named, as definitions, is a leftover now. The plan
 * ends here: the manifests that it refers to do. */
static int clean_up(struct prune *p, struct qlb_error *err)
{
    return machine_load(p->machine, err) < 0
               ? -1 : machine_sweep(p->machine, NULL, err);
}

static int prune(struct prune *p, struct qlb_error *err)
{
    struct machine *machine = p->machine;

    if ((!p->dry_run && machine_lock(machine, MACHINE_PRUNE, err) < 0) ||
        machine_load(machine, err) < 0) {
        return -1;
    }
    if (plan_make(&p->plan, machine, &p->retention, err) < 0) {
        return -1;
    }
    p->deleted = calloc(p->plan.n_backups + 1, sizeof(*p->deleted));
    if (p->deleted == NULL) {
        return qlb_fail_errno(err, ENOMEM, "pruning");
    }
    p->before = bytes_now(p);
    if (p->dry_run) {
        return 0;
    }
    if (machine_sweep(machine, NULL, err) < 0 || execute(p, err) < 0) {
        return -1;
    }
    p->after = bytes_now(p);
    return 0;
}

static int prune_machine(void *opaque, struct machine *machine)
{
    struct prune *p = opaque;
    const struct manifest *newest = NULL;
    double begun = tool_clock();
    struct qlb_error err;
    int status = 0;

    p->machine = machine;
    p->merged = 0;
    p->before = p->after = 0;
    memset(&p->plan, 0, sizeof(p->plan));
    p->deleted = NULL;
    if (prune(p, &err) < 0) {
        status = tool_fail(NULL, &err);
    } else {
        report(p);
        if (!p->dry_run && clean_up(p, &err) < 0) {
            status = tool_fail(NULL, &err);
        }
    }
    plan_release(&p->plan);
    free(p->deleted);
    if (p->dry_run) {
        return status;
    }
    if (status == 0) {
        newest = machine_find(machine, "latest", &err);
    }
    return outcome_note(&p->common, METRICS_PRUNE, machine_name(machine),
                        machine, newest, begun, status);
}

static int miss_machine(void *opaque, const char *name, int status)
{
    const struct prune *p = opaque;

    return outcome_note(&p->common, METRICS_PRUNE, name, NULL, NULL,
                        tool_clock(), status);
}

/* ---- options ---- */

static void parse_option(struct prune *p, int option)
{
    switch (option) {
    case OPT_DRY_RUN:
        p->dry_run = true;
        p->common.metrics = "";
        break;
    case OPT_THREADS:
        p->merge.threads = tool_parse_number(optarg, "--threads", 1, 256);
        break;
    case OPT_PROGRESS:
        p->merge.progress = PROGRESS_ON;
        break;
    case 'q':
        p->quiet = true;
        p->merge.progress = PROGRESS_OFF;
        break;
    default:
        if (!vm_take_option(&p->common, option)) {
            char name[24];
            int rule = option - OPT_KEEP;

            snprintf(name, sizeof(name), "--keep-%s",
                     retention_name((enum retention_rule)rule));
            p->retention.keep[rule] = tool_parse_number(optarg, name, 0,
                                                        MAX_KEEP);
        }
    }
}

static void parse_options(struct prune *p, int argc, char **argv)
{
    unsigned any = 0;
    int option;

    while ((option = tool_getopt(&vm_prune_tool, argc, argv)) != -1) {
        parse_option(p, option);
    }
    for (unsigned i = 0; i < RETENTION_RULES; i++) {
        any |= p->retention.keep[i];
    }
    if (any == 0) {
        tool_usage("what is to be kept is wanted, as --keep-daily=7: without "
                   "it, all backups but the newest would go");
    }
    vm_repository(&p->common);
}

int vm_prune(int argc, char **argv)
{
    struct prune p = {
        .merge = { .level = 1, .threads = tool_default_threads() },
    };
    const struct vm_work work = {
        .run = prune_machine, .missed = miss_machine, .opaque = &p,
    };
    json_t *json;
    int status, printed = 0;

    parse_options(&p, argc, argv);
    status = far_run(&p.common, METRICS_PRUNE, argc, argv);
    if (status >= 0) {
        return status;
    }
    p.results = json_array();
    status = vm_each_machine(&p.common, argv + optind,
                             (unsigned)(argc - optind), &work);
    if (p.common.json && json_array_size(p.results) > 0) {
        json = json_object();
        json_object_set(json, "machines", p.results);
        printed = tool_print_json(json, false) < 0 ? QLB_E_RUNTIME : 0;
    } else if (!p.common.json) {
        printed = tool_flush_stdout();
    }
    json_decref(p.results);
    return printed > status ? printed : status;
}
