/* lbvm verify: the archives are there, whole, and those that the manifests
 * tell of.
 *
 * When an archive was last found good is recorded in verified.json, so that a
 * sample takes those that have waited longest: with 15 % each day, each of them
 * is read once a week. The record is only that: where it is lost, or says
 * nonsense, archives count as never verified.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "archive_check.h"
#include "vm/commands.h"
#include "vm/far.h"
#include "vm/options.h"
#include "vm/outcome.h"

enum {
    OPT_ID = TOOL_OPT_LONG, OPT_SAMPLE, OPT_THREADS, OPT_PROGRESS,
};

static const struct tool_option options[] = {
    VM_REPOSITORY_OPTION,
    { "id", OPT_ID, "ID", "only the archives that this backup needs" },
    { "sample", OPT_SAMPLE, "PERCENT",
      "read that share of the archives, those first that were not for longest" },
    { "threads", OPT_THREADS, "N", "threads (default: one per processor)" },
    { "progress", OPT_PROGRESS, NULL, "show progress, also without a terminal" },
    { "quiet", 'q', NULL, "show neither progress nor what was found good" },
    VM_METRICS_OPTION,
    VM_JSON_OPTION,
    TOOL_COMMON_OPTIONS
};

const struct tool vm_verify_tool = {
    .name = "lbvm verify",
    .synopsis = "[OPTION]... [MACHINE]...",
    .summary = "Checks every digest and every structure of the archives of "
               "machines (default: of\nall), and that the backups have all "
               "that they need.",
    .options = options,
};

/* Longer ones run in a circle. */
enum { MAX_CHAIN = 1000000 };

/* An archive. */
struct item {
    const struct manifest_disk *disk;
    uint64_t verified; /* when it was last found good; 0: never */
    bool bad;
};

struct verify {
    struct vm_options common;
    const char *id;
    unsigned percent, threads;
    bool quiet;
    enum tool_progress_mode progress;
    struct archive_check *check;
    json_t *results;

    /* the machine at work */
    struct machine *machine;
    struct item *items;
    unsigned n_items;
    unsigned n_checked, n_bad;
    bool cut;         /* a signal came before the end */
    json_t *record;   /* of verified.json: what is in "archives" */
    const char *path; /* of the archive at work */
    int status;
};

static void note_status(struct verify *v, int status)
{
    if (status > v->status) {
        v->status = status;
    }
}

/* ---- the record ---- */

static char *record_path(const struct verify *v)
{
    return machine_object_path(v->machine, "verified.json");
}

/* An object, empty where there is no record that can be read. */
static json_t *read_record(const struct verify *v)
{
    char *path = record_path(v);
    json_t *json = path == NULL ? NULL : json_load_file(path, 0, NULL);
    json_t *archives = json_object_get(json, "archives");

    archives = json_is_object(archives) ? json_incref(archives)
                                        : json_object();
    json_decref(json);
    free(path);
    return archives;
}

/* A time to come is nonsense: it would put the archive off until then. */
static uint64_t recorded_time(const json_t *record,
                              const struct manifest_disk *disk)
{
    const json_t *entry = json_object_get(record, disk->archive);
    const char *root = json_string_value(json_object_get(entry, "root"));
    json_int_t when = json_integer_value(json_object_get(entry, "time"));

    if (root == NULL || strcmp(root, disk->root) != 0 || when < 0 ||
        when > (json_int_t)time(NULL)) {
        return 0;
    }
    return (uint64_t)when;
}

static void record_item(json_t *record, const struct item *item)
{
    json_t *entry;

    if (item->verified == 0) {
        return;
    }
    entry = json_object();
    json_object_set_new(entry, "root", json_string(item->disk->root));
    json_object_set_new(entry, "time",
                        json_integer((json_int_t)item->verified));
    json_object_set_new(record, item->disk->archive, entry);
}

/* Of the archives that are there; another verify may have written meanwhile,
 * and who read later knows better. */
static int write_record(struct verify *v, struct qlb_error *err)
{
    json_t *json = json_object(), *archives = json_object();
    json_t *theirs = read_record(v);
    char *text;
    int ret;

    for (unsigned i = 0; i < machine_n_backups(v->machine); i++) {
        const struct manifest *manifest = machine_backup(v->machine, i);

        for (unsigned k = 0; k < manifest->n_disks; k++) {
            const struct manifest_disk *disk = &manifest->disks[k];
            struct item item = { .disk = disk,
                                 .verified = recorded_time(theirs, disk) };

            record_item(archives, &item);
        }
    }
    for (unsigned i = 0; i < v->n_items; i++) {
        if (v->items[i].bad) {
            json_object_del(archives, v->items[i].disk->archive);
        } else if (v->items[i].verified >
                   recorded_time(archives, v->items[i].disk)) {
            record_item(archives, &v->items[i]);
        }
    }
    json_object_set_new(json, "format", json_string("lbvm-verified"));
    json_object_set_new(json, "version", json_integer(1));
    json_object_set_new(json, "archives", archives);
    text = json_dumps(json, JSON_INDENT(1) | JSON_PRESERVE_ORDER);
    ret = text == NULL ? qlb_fail_errno(err, ENOMEM, "verified.json")
                       : machine_put(v->machine, "verified.json", text,
                                     strlen(text), err);
    free(text);
    json_decref(json);
    json_decref(theirs);
    return ret;
}

/* ---- what is verified ---- */

static int add_item(struct verify *v, const struct manifest_disk *disk)
{
    struct item *items = realloc(v->items, (v->n_items + 1) * sizeof(*items));

    if (items == NULL) {
        return -1;
    }
    v->items = items;
    items[v->n_items++] = (struct item) {
        .disk = disk, .verified = recorded_time(v->record, disk),
    };
    return 0;
}

static const struct manifest_disk *parent_of(const struct verify *v,
                                             const struct manifest_disk *disk)
{
    return qlb_uuid_is_zero(&disk->parent)
               ? NULL : machine_find_archive(v->machine, &disk->image,
                                             &disk->parent);
}

/* The archives of the backup's chains; a circle ends where it has been. */
static int list_needed(struct verify *v, const struct manifest *manifest)
{
    for (unsigned k = 0; k < manifest->n_disks; k++) {
        const struct manifest_disk *disk = &manifest->disks[k];

        for (unsigned first = v->n_items; disk != NULL;
             disk = parent_of(v, disk)) {
            for (unsigned i = first; i < v->n_items; i++) {
                if (v->items[i].disk == disk) {
                    return 0;
                }
            }
            if (add_item(v, disk) < 0) {
                return -1;
            }
        }
    }
    return 0;
}

static int list_items(struct verify *v, struct qlb_error *err)
{
    const struct manifest *manifest;
    int ret = 0;

    if (v->id != NULL) {
        manifest = machine_find(v->machine, v->id, err);
        if (manifest == NULL) {
            return -1;
        }
        return list_needed(v, manifest) < 0
                   ? qlb_fail_errno(err, ENOMEM, "verifying") : 0;
    }
    for (unsigned i = 0; i < machine_n_backups(v->machine); i++) {
        manifest = machine_backup(v->machine, i);
        for (unsigned k = 0; ret == 0 && k < manifest->n_disks; k++) {
            ret = add_item(v, &manifest->disks[k]);
        }
    }
    return ret < 0 ? qlb_fail_errno(err, ENOMEM, "verifying") : 0;
}

static int compare_items(const void *a, const void *b)
{
    const struct item *x = a, *y = b;

    if (x->verified != y->verified) {
        return x->verified < y->verified ? -1 : 1;
    }
    return strcmp(x->disk->archive, y->disk->archive);
}

/* ---- checking ---- */

/* The message that is in err comes out, and the archive is bad. */
static void find_bad(struct verify *v, struct item *item,
                     const struct qlb_error *err)
{
    note_status(v, tool_fail(v->path, err));
    if (!item->bad) {
        v->n_bad++;
    }
    item->bad = true;
}

/* Without reading it. */
static void look_at(struct verify *v, struct item *item)
{
    const struct manifest_disk *disk = item->disk;
    const struct manifest_disk *parent = parent_of(v, disk);
    struct qlb_error err;
    char uuid[QLB_UUID_TEXT];
    struct stat st;

    if (stat(v->path, &st) < 0) {
        qlb_fail_errno(&err, errno, "%s", v->path);
        if (errno == ENOENT) {
            qlb_fail(&err, QLB_E_DAMAGED, "is missing");
        }
        find_bad(v, item, &err);
    } else if ((uint64_t)st.st_size != disk->bytes) {
        qlb_fail(&err, QLB_E_DAMAGED, "has %llu bytes, and not the %llu that "
                 "were written", (unsigned long long)st.st_size,
                 (unsigned long long)disk->bytes);
        find_bad(v, item, &err);
    }
    if (parent != NULL && strcmp(parent->digest, disk->digest) != 0) {
        qlb_fail(&err, QLB_E_DAMAGED, "has another digest than its parent, "
                 "and can't be read together with it");
        find_bad(v, item, &err);
    }
    if (!qlb_uuid_is_zero(&disk->parent) && parent == NULL) {
        qlb_fail(&err, QLB_E_DAMAGED, "its parent %s is in no backup",
                 qlb_uuid_format(&disk->parent, uuid));
        find_bad(v, item, &err);
    }
}

struct reading {
    struct verify *verify;
    struct item *item;
    bool cut;
};

static void report_damage(void *opaque, const struct qlb_error *err)
{
    struct reading *reading = opaque;

    /* what a signal ends is told in these words, too */
    if (tool_stop && err->code == QLB_E_RUNTIME) {
        reading->cut = true;
    } else {
        find_bad(reading->verify, reading->item, err);
    }
}

static void read_item(struct verify *v, struct item *item)
{
    struct reading reading = { .verify = v, .item = item };
    struct qlb_lbz_reader *reader;
    struct qlb_error err;

    reader = qlb_lbz_reader_open(v->path, &err);
    if (reader == NULL) {
        find_bad(v, item, &err);
        return;
    }
    if (!manifest_describes(item->disk, reader)) {
        qlb_fail(&err, QLB_E_DAMAGED, "is not the archive that the backup's "
                 "manifest tells of");
        find_bad(v, item, &err);
    }
    archive_check_run(v->check, reader, report_damage, &reading);
    qlb_lbz_reader_close(reader);
    if (reading.cut) {
        v->cut = true;
        return;
    }
    v->n_checked++;
    item->verified = item->bad ? 0 : (uint64_t)time(NULL);
}

static void verify_item(struct verify *v, struct item *item, bool read)
{
    char *path = machine_object_path(v->machine, item->disk->archive);

    if (path == NULL) {
        tool_message("%s: %s", item->disk->archive, strerror(ENOMEM));
        note_status(v, QLB_E_RUNTIME);
        return;
    }
    v->path = path;
    look_at(v, item);
    if (read && !item->bad) {
        read_item(v, item);
    }
    free(path);
}

static void verify_items(struct verify *v)
{
    unsigned n = (unsigned)(((uint64_t)v->n_items * v->percent + 99) / 100);

    for (unsigned i = 0; i < v->n_items; i++) {
        v->cut |= tool_stop;
        if (!v->cut) {
            verify_item(v, &v->items[i], i < n);
        }
    }
    if (v->cut) {
        tool_message("%s: interrupted: %u of %u archives were read",
                     machine_name(v->machine), v->n_checked, n);
        note_status(v, QLB_E_RUNTIME);
    }
}

/* ---- what is told ---- */

static bool needs(const struct verify *v, const struct manifest *manifest,
                  const struct manifest_disk *wanted)
{
    for (unsigned k = 0; k < manifest->n_disks; k++) {
        const struct manifest_disk *disk = &manifest->disks[k];
        unsigned steps = 0;

        while (disk != NULL && steps++ < MAX_CHAIN) {
            if (disk == wanted) {
                return true;
            }
            disk = parent_of(v, disk);
        }
    }
    return false;
}

/* The IDs of the backups that need the archive. */
static json_t *list_concerned(const struct verify *v,
                              const struct manifest_disk *disk)
{
    json_t *ids = json_array();

    for (unsigned i = 0; i < machine_n_backups(v->machine); i++) {
        const struct manifest *manifest = machine_backup(v->machine, i);

        if (manifest->kept_for == NULL && needs(v, manifest, disk)) {
            json_array_append_new(ids, json_string(manifest->id));
        }
    }
    return ids;
}

static void print_concerned(const struct verify *v,
                            const struct manifest_disk *disk,
                            const json_t *ids)
{
    enum { LISTED = 10 };
    size_t n = json_array_size(ids);
    char text[40 * LISTED + 40] = "";

    for (size_t i = 0; i < n && i < LISTED; i++) {
        size_t used = strlen(text);

        snprintf(text + used, sizeof(text) - used, "%s %s",
                 i > 0 ? "," : "", json_string_value(json_array_get(ids, i)));
    }
    if (n > LISTED) {
        size_t used = strlen(text);

        snprintf(text + used, sizeof(text) - used, " and %zu more",
                 n - LISTED);
    }
    tool_message("%s: %s is needed by:%s", machine_name(v->machine),
                 disk->archive, n == 0 ? " no backup that is listed" : text);
}

static void report(struct verify *v)
{
    json_t *json = json_object(), *damaged = json_array();

    for (unsigned i = 0; i < v->n_items; i++) {
        const struct manifest_disk *disk = v->items[i].disk;
        json_t *ids, *entry;

        if (!v->items[i].bad) {
            continue;
        }
        ids = list_concerned(v, disk);
        print_concerned(v, disk, ids);
        entry = json_object();
        json_object_set_new(entry, "archive", json_string(disk->archive));
        json_object_set_new(entry, "backups", ids);
        json_array_append_new(damaged, entry);
    }
    json_object_set_new(json, "machine",
                        json_string(machine_name(v->machine)));
    json_object_set_new(json, "good", json_boolean(v->status == 0));
    json_object_set_new(json, "archives", json_integer(v->n_items));
    json_object_set_new(json, "verified", json_integer(v->n_checked));
    json_object_set_new(json, "damaged", damaged);
    json_array_append_new(v->results, json);
    if (!v->quiet && !v->common.json && v->status == 0) {
        printf("%s: %u of %u archives were read and are good\n",
               machine_name(v->machine), v->n_checked, v->n_items);
    }
}

/* ---- a machine ---- */

static int verify(struct verify *v, struct qlb_error *err)
{
    if (machine_lock(v->machine, MACHINE_READ, err) < 0 ||
        machine_load(v->machine, err) < 0) {
        return -1;
    }
    v->record = read_record(v);
    if (list_items(v, err) < 0) {
        return -1;
    }
    if (v->n_items > 0) {
        qsort(v->items, v->n_items, sizeof(*v->items), compare_items);
    }
    verify_items(v);
    report(v);
    /* In a repository that can't be written to only a sample needs it. */
    if (v->n_checked + v->n_bad > 0 && write_record(v, err) < 0 &&
        v->percent < 100) {
        return qlb_error_prefix(err, "the next sample will be the same");
    }
    return 0;
}

static int verify_machine(void *opaque, struct machine *machine)
{
    struct verify *v = opaque;
    double begun = tool_clock();
    struct qlb_error err;

    v->machine = machine;
    v->items = NULL;
    v->record = NULL;
    v->n_items = v->n_checked = v->n_bad = 0;
    v->cut = false;
    v->status = 0;
    if (verify(v, &err) < 0) {
        note_status(v, tool_fail(NULL, &err));
    }
    free(v->items);
    json_decref(v->record);
    return outcome_note(&v->common, METRICS_VERIFY, machine_name(machine),
                        machine, NULL, begun, v->status);
}

static int miss_machine(void *opaque, const char *name, int status)
{
    const struct verify *v = opaque;

    return outcome_note(&v->common, METRICS_VERIFY, name, NULL, NULL,
                        tool_clock(), status);
}

/* ---- options ---- */

static void parse_option(struct verify *v, int option)
{
    switch (option) {
    case OPT_ID:
        v->id = optarg;
        break;
    case OPT_SAMPLE:
        v->percent = tool_parse_number(optarg, "--sample", 1, 100);
        break;
    case OPT_THREADS:
        v->threads = tool_parse_number(optarg, "--threads", 1, 256);
        break;
    case OPT_PROGRESS:
        v->progress = PROGRESS_ON;
        break;
    case 'q':
        v->quiet = true;
        v->progress = PROGRESS_OFF;
        break;
    default:
        vm_take_option(&v->common, option);
    }
}

static void parse_options(struct verify *v, int argc, char **argv)
{
    int option;

    while ((option = tool_getopt(&vm_verify_tool, argc, argv)) != -1) {
        parse_option(v, option);
    }
    if (v->id != NULL && argc - optind != 1) {
        tool_usage("--id is of one MACHINE, %d given", argc - optind);
    }
    vm_repository(&v->common);
}

int vm_verify(int argc, char **argv)
{
    struct verify v = { .percent = 100, .threads = tool_default_threads() };
    const struct vm_work work = {
        .run = verify_machine, .missed = miss_machine, .opaque = &v,
    };
    struct qlb_error err;
    json_t *json;
    int status, printed = 0;

    parse_options(&v, argc, argv);
    status = far_run(&v.common, METRICS_VERIFY, argc, argv);
    if (status >= 0) {
        return status;
    }
    v.check = archive_check_new(v.threads, v.progress, &err);
    if (v.check == NULL) {
        return tool_fail(NULL, &err);
    }
    v.results = json_array();
    status = vm_each_machine(&v.common, argv + optind,
                             (unsigned)(argc - optind), &work);
    if (v.common.json && json_array_size(v.results) > 0) {
        json = json_object();
        json_object_set(json, "machines", v.results);
        printed = tool_print_json(json, false) < 0 ? QLB_E_RUNTIME : 0;
    } else if (!v.common.json) {
        printed = tool_flush_stdout();
    }
    json_decref(v.results);
    archive_check_free(v.check);
    return printed > status ? printed : status;
}
