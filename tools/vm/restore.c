/* lbvm restore: the disks of a machine as they were at one point in time.
 *
 * The order: all chains are opened, and the outputs named; then the outputs are
 * opened, under temporary names; then all disks are restored; and when all are
 * whole they get their names, and last the definition. What a kill leaves is
 * temporary files, or, among the last steps, some of the disks, whole.
 *
 * With --live only the choice of the backup and of names is from here, the rest
 * is vm/live_restore.h.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "chain_job.h"
#include "parallel.h"
#include "restore_chain.h"
#include "vm/commands.h"
#include "vm/live_restore.h"

enum {
    OPT_AT = TOOL_OPT_LONG, OPT_DISK, OPT_IN_PLACE, OPT_LIVE, OPT_QMP,
    OPT_FORMAT, OPT_FORCE, OPT_NO_DEFINITION, OPT_THREADS, OPT_RATE_LIMIT,
    OPT_PROGRESS,
};

static const struct tool_option options[] = {
    VM_REPOSITORY_OPTION,
    { "at", OPT_AT, "TIME", "the newest backup of that time or before it" },
    { "disk", OPT_DISK, "NAME", "that disk (default: all; may be repeated)" },
    { "output", 'o', "FOLDER", "restore to files in that folder" },
    { "in-original-place", OPT_IN_PLACE, NULL,
      "restore each disk to where its image was" },
    { "live", OPT_LIVE, NULL,
      "serve the disks at once, and restore them while the machine runs" },
    { "qmp", OPT_QMP, "SOCKET",
      "with --live: the monitor of the QEMU that is going to run it" },
    { "format", OPT_FORMAT, "FORMAT", "qcow2 (default) or raw" },
    { "force", OPT_FORCE, NULL, "replace files that exist" },
    { "no-definition", OPT_NO_DEFINITION, NULL,
      "restore the disks without the machine's definition" },
    { "threads", OPT_THREADS, "N", "threads (default: one per processor)" },
    { "rate-limit", OPT_RATE_LIMIT, "RATE",
      "write at most RATE bytes per second (as 50M)" },
    { "progress", OPT_PROGRESS, NULL, "show progress, also without a terminal" },
    { "quiet", 'q', NULL, "show neither progress nor what was done" },
    VM_JSON_OPTION,
    TOOL_COMMON_OPTIONS
};

const struct tool vm_restore_tool = {
    .name = "lbvm restore",
    .synopsis = "[OPTION]... -o FOLDER MACHINE [ID]\n"
                "       lbvm restore [OPTION]... --in-original-place MACHINE "
                "[ID]\n"
                "       lbvm restore [OPTION]... --live -o FOLDER MACHINE [ID]",
    .summary = "Restores the disks of a machine, and its definition, from a "
               "backup: the newest\nunless its ID is given (its start is "
               "enough), or --at.",
    .options = options,
};

/* A disk, and where it goes. */
struct target {
    const struct manifest_disk *disk;
    char *path;
    struct restore *restore;
};

struct vm_restore {
    /* asked for */
    struct restorable from;
    char **names; /* --disk */
    unsigned n_names;
    const char *folder;
    bool in_place, force, quiet, no_definition, live;
    const char *qmp;
    enum restore_format format;
    unsigned threads;
    struct tool_rate rate;
    enum tool_progress_mode progress;

    struct live_folder *live_folder;
    bool resumed;          /* something was begun in it */

    struct target *targets;
    unsigned n_targets;
    uint64_t expected; /* bytes of data */
    bool made_folder;
    char *definition;      /* the path that it gets; NULL: none is restored */
    struct store_text definition_text;
    struct qlb_outfile *definition_out;

    struct restore_meter meter;
    struct qlb_error failure; /* the first one, where meter.abandoned */
};

static int no_memory(struct qlb_error *err)
{
    return qlb_fail_errno(err, ENOMEM, "restoring");
}

/* ---- where to ---- */

/* The recorded file's name in its folder; NULL where it is none. */
static const char *base_name(const struct manifest_disk *disk)
{
    const char *slash = strrchr(disk->filename, '/');
    const char *name = slash == NULL ? disk->filename : slash + 1;

    return *name == '\0' || strcmp(name, ".") == 0 || strcmp(name, "..") == 0
               ? NULL : name;
}

/* Among all disks of the backup: a disk has the same name whichever others are
 * restored with it. */
static bool is_unique(const struct manifest *manifest,
                      const struct manifest_disk *disk)
{
    for (unsigned i = 0; i < manifest->n_disks; i++) {
        const struct manifest_disk *other = &manifest->disks[i];
        const char *name = base_name(other);

        if (other != disk && name != NULL &&
            strcmp(name, base_name(disk)) == 0) {
            return false;
        }
    }
    return true;
}

/* "NAME.qcow2" */
static char *name_of_disk(const struct vm_restore *r,
                          const struct manifest_disk *disk)
{
    struct qlb_error ignored;
    char *stem = restorable_file_name(disk, &ignored), *name;

    if (stem == NULL || asprintf(&name, "%s.%s", stem,
                                 restore_format_name(r->format)) < 0) {
        name = NULL;
    }
    free(stem);
    return name;
}

static char *in_folder(const char *folder, const char *name)
{
    size_t len = strlen(folder);
    char *path;

    while (len > 0 && folder[len - 1] == '/') {
        len--;
    }
    return asprintf(&path, "%.*s/%s", (int)len, folder, name) < 0 ? NULL
                                                                  : path;
}

static int name_in_folder(const struct vm_restore *r, struct target *target,
                          struct qlb_error *err)
{
    const char *base = base_name(target->disk);
    char *own = NULL;

    if (base == NULL || !is_unique(r->from.manifest, target->disk)) {
        base = own = name_of_disk(r, target->disk);
    }
    target->path = base == NULL ? NULL : in_folder(r->folder, base);
    free(own);
    return target->path == NULL ? no_memory(err) : 0;
}

static int name_in_place(struct target *target, struct qlb_error *err)
{
    const struct manifest_disk *disk = target->disk;

    if (disk->filename[0] != '/' || base_name(disk) == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "disk '%s': where it was, '%s', "
                        "is no path of a file; use -o FOLDER", disk->name,
                        disk->filename);
    }
    target->path = strdup(disk->filename);
    return target->path == NULL ? no_memory(err) : 0;
}

static int check_free(const struct vm_restore *r, const char *path,
                      struct qlb_error *err)
{
    struct stat st;

    if (!r->force && !r->resumed && lstat(path, &st) == 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: already exists; %s", path,
                        r->live ? "a live restore replaces nothing"
                                : "--force replaces it");
    }
    return 0;
}

/* Two disks in one file, or a disk in the definition's. */
static int check_distinct(const struct vm_restore *r, unsigned n,
                          struct qlb_error *err)
{
    const struct target *target = &r->targets[n];

    for (unsigned i = 0; i < n; i++) {
        if (strcmp(r->targets[i].path, target->path) == 0) {
            return qlb_fail(err, QLB_E_RUNTIME, "%s: would be both disk '%s' "
                            "and disk '%s'; restore them one by one, with "
                            "--disk", target->path, r->targets[i].disk->name,
                            target->disk->name);
        }
    }
    if (r->definition != NULL && strcmp(r->definition, target->path) == 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: would be both disk '%s' and "
                        "the definition; use --no-definition", target->path,
                        target->disk->name);
    }
    return 0;
}

static int name_targets(struct vm_restore *r, struct qlb_error *err)
{
    for (unsigned i = 0; i < r->n_targets; i++) {
        struct target *target = &r->targets[i];

        if ((r->in_place ? name_in_place(target, err)
                         : name_in_folder(r, target, err)) < 0 ||
            check_distinct(r, i, err) < 0 ||
            check_free(r, target->path, err) < 0) {
            return -1;
        }
    }
    return r->definition == NULL ? 0 : check_free(r, r->definition, err);
}

/* ---- the definition ---- */

static int read_definition(struct vm_restore *r, const char *object,
                           struct qlb_error *err)
{
    int ret = machine_get(r->from.machine, object, &r->definition_text, err);
    char *path;

    if (ret != 0) {
        return ret < 0 ? -1 : 0;
    }
    path = machine_object_path(r->from.machine, object);
    if (path == NULL) {
        return no_memory(err);
    }
    qlb_fail(err, QLB_E_DAMAGED, "%s: the machine's definition is missing; "
             "--no-definition restores the disks without it", path);
    free(path);
    return -1;
}

/* It goes beside the disks; where each goes to its own place, nowhere. */
static int find_definition(struct vm_restore *r, struct qlb_error *err)
{
    const char *object = r->from.manifest->definition;
    const char *type;
    char *name;

    if (object == NULL || r->in_place || r->no_definition ||
        (r->resumed && live_folder_is_ready(r->live_folder))) {
        return 0;
    }
    type = strrchr(object, '.');
    if (asprintf(&name, "%s%s", r->from.name, type == NULL ? "" : type) < 0) {
        return no_memory(err);
    }
    r->definition = in_folder(r->folder, name);
    free(name);
    return r->definition == NULL ? no_memory(err)
                                 : read_definition(r, object, err);
}

/* ---- before anything is written ---- */

static int choose_disks(struct vm_restore *r, struct qlb_error *err)
{
    const struct manifest *manifest = r->from.manifest;

    r->n_targets = r->n_names > 0 ? r->n_names : manifest->n_disks;
    r->targets = calloc(r->n_targets, sizeof(*r->targets));
    if (r->targets == NULL) {
        r->n_targets = 0;
        return no_memory(err);
    }
    for (unsigned i = 0; i < r->n_targets; i++) {
        r->targets[i].disk = r->n_names == 0
            ? &manifest->disks[i]
            : restorable_disk(&r->from, r->names[i], err);
        if (r->targets[i].disk == NULL) {
            return -1;
        }
        for (unsigned k = 0; k < i; k++) {
            if (r->targets[k].disk == r->targets[i].disk) {
                return qlb_fail(err, QLB_E_USAGE, "disk '%s' is named twice",
                                r->targets[i].disk->name);
            }
        }
    }
    return 0;
}

static unsigned disks_at_once(const struct vm_restore *r)
{
    return r->threads < r->n_targets ? r->threads : r->n_targets;
}

static int open_chains(struct vm_restore *r, struct qlb_error *err)
{
    for (unsigned i = 0; i < r->n_targets; i++) {
        struct target *target = &r->targets[i];
        struct restore_options wanted = {
            .output = target->path,
            .format = r->format,
            .force = r->force,
            .threads = r->threads / disks_at_once(r),
        };
        struct qlb_chain *chain = restorable_chain(&r->from, target->disk,
                                                   err);

        if (chain == NULL) {
            return -1;
        }
        target->restore = restore_new(&wanted, err);
        if (target->restore == NULL) {
            qlb_chain_close(chain);
            return -1;
        }
        r->expected += chain_data_bytes(chain);
        restore_take_chain(target->restore, chain);
    }
    return 0;
}

/* ---- writing ---- */

static int make_folder(struct vm_restore *r, struct qlb_error *err)
{
    struct stat st;

    if (r->in_place) {
        return 0;
    }
    if (mkdir(r->folder, 0777) == 0) {
        r->made_folder = true;
        return 0;
    }
    if (errno != EEXIST || stat(r->folder, &st) < 0) {
        return qlb_fail_errno(err, errno, "%s", r->folder);
    }
    return S_ISDIR(st.st_mode) ? 0
                               : qlb_fail_errno(err, ENOTDIR, "%s", r->folder);
}

static int open_definition(struct vm_restore *r, struct qlb_error *err)
{
    if (r->definition == NULL) {
        return 0;
    }
    r->definition_out = qlb_outfile_create(r->definition,
                                           r->force || r->resumed
                                               ? QLB_OUTFILE_FORCE : 0, err);
    return r->definition_out == NULL
               ? -1 : qlb_outfile_write(r->definition_out,
                                        r->definition_text.data,
                                        r->definition_text.len, err);
}

static int open_outputs(struct vm_restore *r, struct qlb_error *err)
{
    if (make_folder(r, err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < r->n_targets; i++) {
        if (restore_open_output(r->targets[i].restore, err) < 0) {
            return -1;
        }
    }
    return open_definition(r, err);
}

/* The first to fail ends the others, whose "interrupted" says nothing. */
static int restore_one(void *opaque, unsigned i, struct qlb_error *err)
{
    struct vm_restore *r = opaque;
    struct target *target = &r->targets[i];

    if (restore_run(target->restore, &r->meter, err) == 0) {
        return 0;
    }
    qlb_error_prefix(err, "disk '%s'", target->disk->name);
    pthread_mutex_lock(&r->meter.lock);
    if (!r->meter.abandoned) {
        r->meter.abandoned = true;
        r->failure = *err;
    }
    pthread_mutex_unlock(&r->meter.lock);
    return -1;
}

static int restore_all(struct vm_restore *r, struct qlb_error *err)
{
    int ret;

    restore_meter_begin(&r->meter, &r->rate, r->progress, r->expected);
    ret = parallel_run(r->n_targets, disks_at_once(r), restore_one, r, NULL,
                       err);
    restore_meter_end(&r->meter);
    if (ret < 0 && r->meter.abandoned) {
        *err = r->failure;
    }
    return ret;
}

static int sync_parent(const char *folder, struct qlb_error *err)
{
    char *parent = in_folder(folder, "..");
    int fd = parent == NULL ? -1 : open(parent, O_RDONLY | O_DIRECTORY |
                                                O_CLOEXEC);
    int ret = fd < 0 || fsync(fd) < 0
                  ? qlb_fail_errno(err, errno, "%s: syncing the folder that "
                                   "it is in", folder)
                  : 0;

    if (fd >= 0) {
        close(fd);
    }
    free(parent);
    return ret;
}

/* From here on names appear. */
static int commit_all(struct vm_restore *r, struct qlb_error *err)
{
    for (unsigned i = 0; i < r->n_targets; i++) {
        if (restore_commit(r->targets[i].restore, err) < 0) {
            return -1;
        }
    }
    if (r->definition_out != NULL &&
        qlb_outfile_commit(r->definition_out, err) < 0) {
        return -1;
    }
    return r->made_folder ? sync_parent(r->folder, err) : 0;
}

static int restore(struct vm_restore *r, struct qlb_error *err)
{
    if (choose_disks(r, err) < 0 || find_definition(r, err) < 0 ||
        name_targets(r, err) < 0 || open_chains(r, err) < 0 ||
        open_outputs(r, err) < 0 || restore_all(r, err) < 0) {
        return -1;
    }
    return commit_all(r, err);
}

/* ---- what is told ---- */

static uint64_t bytes_of(const struct vm_restore *r)
{
    uint64_t bytes = 0;

    for (unsigned i = 0; i < r->n_targets; i++) {
        bytes += restore_bytes(r->targets[i].restore);
    }
    return bytes;
}

static void report_names(const struct vm_restore *r)
{
    for (unsigned i = 0; i < r->n_targets; i++) {
        printf("%s: %s: %s\n", r->from.name, r->targets[i].disk->name,
               r->targets[i].path);
    }
    if (r->definition != NULL) {
        printf("%s: definition: %s\n", r->from.name, r->definition);
    }
}

static void report(const struct vm_restore *r)
{
    char size[16];

    if (r->live) {
        printf("%s: %s: %u disk%s restored\n", r->from.name,
               r->from.manifest->id, r->n_targets,
               r->n_targets == 1 ? "" : "s");
        return;
    }
    report_names(r);
    printf("%s: %s: %u disk%s restored, %s\n", r->from.name,
           r->from.manifest->id, r->n_targets, r->n_targets == 1 ? "" : "s",
           tool_format_size(bytes_of(r), size));
}

static json_t *target_to_json(const struct target *target)
{
    const struct qlb_lbz_header *header = restore_header(target->restore);
    json_t *json = json_object();

    json_object_set_new(json, "name", json_string(target->disk->name));
    json_object_set_new(json, "file", json_string(target->path));
    json_object_set_new(json, "format",
        json_string(restore_format_name(restore_format(target->restore))));
    json_object_set_new(json, "checkpoint", tool_json_uuid(&header->uuid));
    json_object_set_new(json, "size",
                        json_integer((json_int_t)header->virtual_size));
    json_object_set_new(json, "data_bytes",
        json_integer((json_int_t)restore_bytes(target->restore)));
    return json;
}

static json_t *live_to_json(const struct target *target)
{
    json_t *json = json_object();

    json_object_set_new(json, "name", json_string(target->disk->name));
    json_object_set_new(json, "file", json_string(target->path));
    json_object_set_new(json, "format", json_string("qcow2"));
    json_object_set_new(json, "checkpoint",
                        tool_json_uuid(&target->disk->checkpoint));
    json_object_set_new(json, "size",
                        json_integer((json_int_t)target->disk->size));
    return json;
}

static int print_json(const struct vm_restore *r)
{
    const struct manifest *manifest = r->from.manifest;
    json_t *json = json_object(), *disks = json_array();

    json_object_set_new(json, "machine", json_string(r->from.name));
    json_object_set_new(json, "id", json_string(manifest->id));
    json_object_set_new(json, "time",
                        json_integer((json_int_t)manifest->time));
    json_object_set_new(json, "definition", r->definition == NULL
                                                ? json_null()
                                                : json_string(r->definition));
    for (unsigned i = 0; i < r->n_targets; i++) {
        json_array_append_new(disks, r->live
                                         ? live_to_json(&r->targets[i])
                                         : target_to_json(&r->targets[i]));
    }
    json_object_set_new(json, "disks", disks);
    return tool_print_json(json, false) < 0 ? QLB_E_RUNTIME : 0;
}

static int print_result(const struct vm_restore *r)
{
    if (r->from.common.json) {
        return r->live ? 0 : print_json(r); /* it was told at once */
    }
    if (!r->quiet) {
        report(r);
    }
    return tool_flush_stdout();
}

/* ---- live ---- */

static int prepare_live(void *opaque, struct qlb_error *err)
{
    struct vm_restore *r = opaque;

    if (open_definition(r, err) < 0 ||
        (r->definition_out != NULL &&
         qlb_outfile_commit(r->definition_out, err) < 0)) {
        return -1;
    }
    return sync_parent(r->folder, err);
}

static int tell_ready(void *opaque, struct qlb_error *err)
{
    struct vm_restore *r = opaque;

    if (r->from.common.json) {
        return print_json(r) == 0
                   ? 0 : qlb_fail(err, QLB_E_RUNTIME, "standard output failed");
    }
    if (!r->quiet) {
        report_names(r);
        printf("%s: %s: served; the machine can be started\n", r->from.name,
               r->from.manifest->id);
    }
    return tool_flush_stdout() == 0
               ? 0 : qlb_fail(err, QLB_E_RUNTIME, "standard output failed");
}

static int open_live_folder(struct vm_restore *r, struct qlb_error *err)
{
    if (r->live_folder == NULL &&
        (make_folder(r, err) < 0 ||
         live_folder_open(r->folder, true, &r->live_folder, err) < 0)) {
        return -1;
    }
    /* Somebody may have begun since we looked. */
    return r->resumed || live_folder_id(r->live_folder) == NULL
               ? 0 : qlb_fail(err, QLB_E_BUSY, "%s: another lbvm restores to "
                              "it", r->folder);
}

static int restore_live(struct vm_restore *r, struct qlb_error *err)
{
    struct live_restore wanted = {
        .from = &r->from,
        .qmp = r->qmp,
        .rate = r->rate.bytes_per_second,
        .progress = r->progress,
        .quiet = r->quiet,
        .prepare = prepare_live,
        .ready = tell_ready,
        .opaque = r,
    };
    struct live_restore_disk *disks;
    int ret;

    if (machine_is_remote(r->from.machine)) {
        return qlb_fail(err, QLB_E_USAGE, "--live wants a repository on this "
                        "host");
    }
    if (choose_disks(r, err) < 0 || find_definition(r, err) < 0 ||
        name_targets(r, err) < 0 || open_live_folder(r, err) < 0) {
        return -1;
    }
    disks = calloc(r->n_targets, sizeof(*disks));
    if (disks == NULL) {
        return no_memory(err);
    }
    for (unsigned i = 0; i < r->n_targets; i++) {
        disks[i].disk = r->targets[i].disk;
        disks[i].path = r->targets[i].path;
    }
    wanted.folder = r->live_folder;
    wanted.disks = disks;
    wanted.n_disks = r->n_targets;
    ret = live_restore(&wanted, err);
    free(disks);
    return ret;
}

static int take_names(struct vm_restore *r, struct qlb_error *err)
{
    char **names = live_folder_disks(r->live_folder, &r->n_names);

    free(r->names);
    r->names = calloc(r->n_names, sizeof(*names));
    if (r->names == NULL) {
        r->n_names = 0;
        return no_memory(err);
    }
    memcpy(r->names, names, r->n_names * sizeof(*names));
    return 0;
}

/* What was begun in the folder goes on, with its own backup and disks. */
static int resume(struct vm_restore *r, struct qlb_error *err)
{
    const char *machine, *id;

    if (live_folder_open(r->folder, false, &r->live_folder, err) < 0) {
        return -1;
    }
    id = r->live_folder == NULL ? NULL : live_folder_id(r->live_folder);
    if (id == NULL) {
        return 0;
    }
    r->resumed = true;
    machine = live_folder_machine(r->live_folder);
    if (strcmp(machine, r->from.name) != 0 ||
        (r->from.id != NULL && strcmp(r->from.id, "latest") != 0 &&
         strncmp(id, r->from.id, strlen(r->from.id)) != 0)) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: a restore of %s %s was begun "
                        "there, and is not finished", r->folder, machine, id);
    }
    r->from.id = id;
    r->from.has_at = false;
    return take_names(r, err);
}

/* The backup that disks are unfinished without may be pruned by now. */
static int open_backup(struct vm_restore *r)
{
    int status = restorable_open(&r->from);

    if (status == QLB_E_RUNTIME && r->resumed && r->from.machine != NULL &&
        r->from.manifest == NULL) {
        tool_message("%s: the disks there can't be finished without that "
                     "backup; they are left as they are", r->folder);
        return QLB_E_UNTRUSTED;
    }
    return status;
}

static void release_live(struct vm_restore *r)
{
    struct qlb_error ignored;

    if (r->live_folder != NULL && live_folder_id(r->live_folder) == NULL) {
        live_folder_remove(r->live_folder, &ignored);
    }
    live_folder_close(r->live_folder);
}

/* done: names have appeared. */
static void release(struct vm_restore *r, bool done)
{
    for (unsigned i = 0; i < r->n_targets; i++) {
        restore_free(r->targets[i].restore);
        free(r->targets[i].path);
    }
    qlb_outfile_close(r->definition_out);
    release_live(r);
    if (r->made_folder && !done) {
        rmdir(r->folder); /* only if it is empty */
    }
    free(r->targets);
    free(r->definition);
    free(r->definition_text.data);
    free(r->names);
    restorable_close(&r->from);
}

/* ---- options ---- */

static void add_disk(struct vm_restore *r, char *name)
{
    char **names = realloc(r->names, (r->n_names + 1) * sizeof(*names));

    if (names == NULL) {
        tool_message("%s", strerror(ENOMEM));
        exit(QLB_E_RUNTIME);
    }
    r->names = names;
    names[r->n_names++] = name;
}

static void parse_work_option(struct vm_restore *r, int option)
{
    switch (option) {
    case OPT_THREADS:
        r->threads = tool_parse_number(optarg, "--threads", 1, 256);
        break;
    case OPT_RATE_LIMIT:
        r->rate.bytes_per_second = tool_parse_size(optarg, "--rate-limit");
        break;
    case OPT_PROGRESS:
        r->progress = PROGRESS_ON;
        break;
    case 'q':
        r->quiet = true;
        r->progress = PROGRESS_OFF;
        break;
    }
}

static void parse_option(struct vm_restore *r, int option)
{
    switch (option) {
    case OPT_AT:
        r->from.has_at = true;
        r->from.at = vm_parse_time(optarg, "--at");
        break;
    case OPT_DISK:
        add_disk(r, optarg);
        break;
    case 'o':
        r->folder = optarg;
        break;
    case OPT_IN_PLACE:
        r->in_place = true;
        break;
    case OPT_LIVE:
        r->live = true;
        break;
    case OPT_QMP:
        r->qmp = optarg;
        break;
    case OPT_FORMAT:
        r->format = restore_parse_format(optarg);
        break;
    case OPT_FORCE:
        r->force = true;
        break;
    case OPT_NO_DEFINITION:
        r->no_definition = true;
        break;
    default:
        if (!vm_take_option(&r->from.common, option)) {
            parse_work_option(r, option);
        }
    }
}

static void parse_options(struct vm_restore *r, int argc, char **argv)
{
    int option;

    while ((option = tool_getopt(&vm_restore_tool, argc, argv)) != -1) {
        parse_option(r, option);
    }
    restorable_parse(&r->from, argc, argv);
    if ((r->folder != NULL) == r->in_place) {
        tool_usage(r->in_place ? "-o and --in-original-place are not wanted "
                                 "both"
                               : "-o FOLDER or --in-original-place is wanted");
    }
    if (r->folder != NULL && *r->folder == '\0') {
        tool_usage("-o: '' is no folder");
    }
    if (r->live && (r->in_place || r->force || r->format != RESTORE_QCOW2)) {
        tool_usage("--live goes with neither --in-original-place, --force nor "
                   "--format=raw");
    }
    if (r->qmp != NULL && !r->live) {
        tool_usage("--qmp goes with --live");
    }
}

int vm_restore(int argc, char **argv)
{
    struct vm_restore r = {
        .format = RESTORE_QCOW2,
        .threads = tool_default_threads(),
    };
    struct qlb_error err;
    int status;
    bool done = false;

    parse_options(&r, argc, argv);
    status = r.live && resume(&r, &err) < 0 ? tool_fail(NULL, &err)
                                            : open_backup(&r);
    if (status == 0 &&
        (r.live ? restore_live(&r, &err) : restore(&r, &err)) < 0) {
        status = tool_fail(NULL, &err);
        restorable_hint(&r.from, status);
    } else if (status == 0) {
        done = true;
        status = print_result(&r);
    }
    release(&r, done);
    return status;
}
