/* lbvm backup: all disks of a machine at one point in time.
 *
 * The order: the disks are found, and for each the newest of the repository's
 * backups that it can go on from; the point in time; the archives, whole and
 * synced; the manifest; the confirmation in the images.  What a kill leaves at
 * each step is told in docs/repository.md.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "qmp.h"
#include "vm/commands.h"
#include "vm/options.h"
#include "vm/parent.h"
#include "vm/source.h"

enum {
    OPT_QMP = TOOL_OPT_LONG, OPT_DISK, OPT_SCRATCH, OPT_FULL, OPT_CHAIN, OPT_DURABLE,
    OPT_LEVEL, OPT_THREADS, OPT_DIGEST, OPT_RATE_LIMIT, OPT_PROGRESS,
};

static const struct tool_option options[] = {
    VM_REPOSITORY_OPTION,
    { "qmp", OPT_QMP, "SOCKET", "the machine runs in the QEMU whose monitor "
      "is there" },
    { "disk", OPT_DISK, "NAME",
      "with --qmp: that disk (default: all; may be repeated)" },
    { "scratch", OPT_SCRATCH, "FOLDER",
      "with a stock QEMU: for what the guest overwrites meanwhile (default: "
      "that of the first image)" },
    { "full", OPT_FULL, NULL, "back up all of each disk" },
    { "durable", OPT_DURABLE, NULL,
      "with --qmp: what was begun survives a power loss" },
    { "chain", OPT_CHAIN, "NAME",
      "chain label of a repository that is made now (default: its own)" },
    { "level", OPT_LEVEL, "N", "zstd compression level, 1 to 19 (default: 1)" },
    { "threads", OPT_THREADS, "N", "threads (default: one per processor)" },
    { "digest", OPT_DIGEST, "NAME", "xxh3 (default) or sha256" },
    { "rate-limit", OPT_RATE_LIMIT, "RATE",
      "read at most RATE bytes per second (as 50M)" },
    { "progress", OPT_PROGRESS, NULL, "show progress, also without a terminal" },
    { "quiet", 'q', NULL, "show neither progress nor notes" },
    VM_JSON_OPTION,
    TOOL_COMMON_OPTIONS
};

const struct tool vm_backup_tool = {
    .name = "lbvm backup",
    .synopsis = "[OPTION]... MACHINE [NAME=]IMAGE...\n"
                "       lbvm backup [OPTION]... --qmp=SOCKET MACHINE",
    .summary = "Backs up the disks of a machine, all at one point in time: "
               "what has changed since\nthe last backup in the repository, "
               "where that can be trusted.",
    .options = options,
};

struct backup {
    /* asked for */
    struct vm_options common;
    const char *name;       /* of the machine */
    const char *socket;
    char **disks;           /* --disk */
    unsigned n_disks;
    char **images, **names; /* names: NULL where none is given */
    unsigned n_images;
    const char *label;
    const char *scratch;
    bool full, durable;
    struct dump_request request;

    struct repository *repository;
    struct machine *machine;
    struct source *source;
    bool begun;
    struct manifest *manifest;
};

/* ---- what is wanted of each disk ---- */

/* As in manifests. */
static const char *digest_name(enum qlb_digest_type digest)
{
    return digest == QLB_DIGEST_SHA256 ? "sha256" : "xxh3-128";
}

static char *new_output(const struct backup *backup,
                        const struct source_disk *disk, struct qlb_error *err)
{
    struct qlb_uuid random = tool_random_uuid();
    char *object = machine_archive_object(backup->machine, disk->name,
                                          &random, err);
    char *path = NULL;

    if (object != NULL) {
        path = machine_object_path(backup->machine, object);
        if (path == NULL) {
            qlb_fail_errno(err, ENOMEM, "%s", object);
        }
        free(object);
    }
    return path;
}

static int want_disk(const struct backup *backup, struct source_disk *disk,
                     struct qlb_error *err)
{
    struct qlb_error why;
    const struct manifest_disk *parent =
        parent_find(backup->machine, disk,
                    digest_name(backup->request.dump.digest), &why);

    if (parent == NULL && !backup->full) {
        disk->reason = strdup(why.message);
    } else if (!backup->full) {
        disk->since = parent->checkpoint;
        disk->since_size = parent->size;
    }
    disk->output = new_output(backup, disk, err);
    return disk->output == NULL ? -1 : 0;
}

/* ---- the manifest ---- */

static char *hex_root(const struct dump_archive *archive)
{
    char text[2 * QLB_DIGEST_MAX + 1];

    qlb_hex(archive->root, qlb_digest_size(archive->header.digest), text);
    return strdup(text);
}

/* The path of the archive without the machine's folder. */
static char *object_of(const char *path)
{
    const char *name = strrchr(path, '/') + 1;
    char *object;

    return asprintf(&object, "archives/%s", name) < 0 ? NULL : object;
}

static bool describe_disk(struct manifest *manifest,
                          const struct source_disk *disk)
{
    const struct qlb_lbz_header *header = &disk->archive.header;
    struct manifest_disk *entry = manifest_add_disk(manifest);

    if (entry == NULL) {
        return false;
    }
    entry->name = strdup(disk->name);
    entry->filename = strdup(disk->filename);
    entry->checkpoint = header->uuid;
    if (header->incremental) {
        entry->parent = header->parent;
    }
    entry->image = header->image_uuid;
    entry->size = header->virtual_size;
    entry->archive = object_of(disk->output);
    entry->bytes = disk->archive.totals.archive_size;
    entry->digest = strdup(digest_name(header->digest));
    entry->root = hex_root(&disk->archive);
    entry->reason = strdup(disk->reason == NULL ? "" : disk->reason);
    entry->bitmap = disk->bitmap == NULL ? NULL : strdup(disk->bitmap);
    return entry->name != NULL && entry->filename != NULL &&
           entry->archive != NULL && entry->digest != NULL &&
           entry->root != NULL && entry->reason != NULL;
}

static uint64_t next_sequence(const struct machine *machine)
{
    unsigned n = machine_n_backups(machine);

    return n == 0 ? 1 : machine_backup(machine, n - 1)->sequence + 1;
}

static int describe(struct backup *backup, struct qlb_error *err)
{
    const struct source *source = backup->source;
    struct manifest *manifest = manifest_new();
    char id[MANIFEST_ID_SIZE];
    bool good = manifest != NULL;

    backup->manifest = manifest;
    if (good) {
        manifest->set = source->set;
        manifest->sequence = next_sequence(backup->machine);
        manifest->time = source->time;
        manifest->finished = (uint64_t)time(NULL);
        manifest->id = strdup(manifest_make_id(source->time, &source->set,
                                               id));
        manifest->machine = strdup(backup->name);
        manifest->label = strdup(backup->request.label);
        manifest->source = strdup(source->ops->kind);
        good = manifest->id != NULL && manifest->machine != NULL &&
               manifest->label != NULL && manifest->source != NULL;
    }
    for (unsigned i = 0; good && i < source->n_disks; i++) {
        good = describe_disk(manifest, &source->disks[i]);
    }
    return good ? 0 : qlb_fail_errno(err, ENOMEM, "the manifest");
}

static int put_definition(struct backup *backup, struct qlb_error *err)
{
    const struct source *source = backup->source;
    struct manifest *manifest = backup->manifest;

    if (source->definition == NULL) {
        return 0;
    }
    if (asprintf(&manifest->definition, "definitions/%s.%s", manifest->id,
                 source->definition_type) < 0) {
        manifest->definition = NULL;
        return qlb_fail_errno(err, ENOMEM, "the machine's definition");
    }
    return machine_put(backup->machine, manifest->definition,
                       source->definition, strlen(source->definition), err);
}

/* ---- the backup ---- */

static int open_repository(struct backup *backup, struct qlb_error *err)
{
    backup->repository = repository_open(vm_repository(&backup->common), true,
                                         backup->label, err);
    if (backup->repository == NULL) {
        return -1;
    }
    backup->request.label = repository_label(backup->repository);
    backup->machine = machine_open(backup->repository, backup->name, true,
                                   err);
    if (backup->machine == NULL ||
        machine_lock(backup->machine, MACHINE_BACKUP, err) < 0 ||
        machine_load(backup->machine, err) < 0) {
        return -1;
    }
    return machine_sweep(backup->machine, NULL, err);
}

/* A QEMU with livebackup, or a stock one. */
static int open_running(struct backup *backup, struct qmp *qmp,
                        struct qlb_error *err)
{
    bool patched = qmp_has_command(qmp, "livebackup-begin");

    if (!patched && backup->durable) {
        qmp_close(qmp);
        return qlb_fail(err, QLB_E_USAGE, "%s: --durable wants a QEMU with "
                        "livebackup", backup->socket);
    }
    backup->source = patched
        ? source_qemu_new(qmp, backup->socket, backup->disks,
                          backup->n_disks, backup->durable)
        : source_stock_new(qmp, backup->disks, backup->n_disks,
                           backup->scratch);
    return backup->source == NULL
               ? qlb_fail_errno(err, ENOMEM, "%s", backup->name) : 0;
}

static int open_source(struct backup *backup, struct qlb_error *err)
{
    struct qmp *qmp;

    if (backup->socket != NULL) {
        qmp = qmp_connect(backup->socket, err);
        if (qmp == NULL) {
            return -1;
        }
        return open_running(backup, qmp, err);
    } else {
        backup->source = source_images_new(backup->names, backup->images,
                                           backup->n_images);
    }
    return backup->source == NULL
               ? qlb_fail_errno(err, ENOMEM, "%s", backup->name) : 0;
}

static void say_what_is_done(const struct backup *backup)
{
    const struct source *source = backup->source;

    for (unsigned i = 0; i < source->n_disks; i++) {
        const struct source_disk *disk = &source->disks[i];

        if (!backup->request.quiet && !disk->incremental &&
            disk->reason != NULL) {
            tool_message("%s: %s: a full backup: %s", backup->name,
                         disk->name, disk->reason);
        }
    }
}

/* A name is how one of a backup's disks is asked for. */
static int check_names(const struct source *source, struct qlb_error *err)
{
    for (unsigned i = 0; i < source->n_disks; i++) {
        const char *name = source->disks[i].name;

        for (unsigned k = 0; k < i; k++) {
            if (strcmp(name, source->disks[k].name) == 0) {
                return qlb_fail(err, QLB_E_USAGE, "two disks are called '%s'; "
                                "name them: NAME=IMAGE", name);
            }
        }
    }
    return 0;
}

static int begin(struct backup *backup, struct qlb_error *err)
{
    struct source *source = backup->source;

    if (source->ops->list(source, err) < 0 || check_names(source, err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < source->n_disks; i++) {
        if (want_disk(backup, &source->disks[i], err) < 0) {
            return -1;
        }
    }
    if (source->ops->begin(source, &backup->request, err) < 0) {
        return -1;
    }
    backup->begun = true;
    return 0;
}

static int run(struct backup *backup, struct qlb_error *err)
{
    struct source *source;

    if (open_repository(backup, err) < 0 || open_source(backup, err) < 0 ||
        begin(backup, err) < 0) {
        return -1;
    }
    source = backup->source;
    say_what_is_done(backup);
    if (source->ops->dump(source, &backup->request, err) < 0 ||
        describe(backup, err) < 0 || put_definition(backup, err) < 0 ||
        machine_put_manifest(backup->machine, backup->manifest, err) < 0) {
        return -1;
    }
    backup->begun = false;
    if (source->ops->end(source, true, err) < 0) {
        return qlb_error_prefix(err, "the backup is complete, but its "
                                "checkpoints could not be confirmed");
    }
    return 0;
}

static void give_up(struct backup *backup)
{
    struct qlb_error ignored;

    if (backup->begun) {
        backup->source->ops->end(backup->source, false, &ignored);
    }
}

static void report(const struct backup *backup)
{
    const struct manifest *manifest = backup->manifest;
    uint64_t bytes = 0;
    unsigned full = 0;
    char size[16];

    for (unsigned i = 0; i < manifest->n_disks; i++) {
        bytes += manifest->disks[i].bytes;
        full += qlb_uuid_is_zero(&manifest->disks[i].parent);
    }
    printf("%s: %s: %u disk%s, %u in full, %s\n", backup->name, manifest->id,
           manifest->n_disks, manifest->n_disks == 1 ? "" : "s", full,
           tool_format_size(bytes, size));
}

static int print_result(const struct backup *backup)
{
    if (backup->common.json) {
        return tool_print_json(manifest_to_json(backup->manifest), false) < 0
                   ? QLB_E_RUNTIME : 0;
    }
    if (!backup->request.quiet) {
        report(backup);
    }
    return tool_flush_stdout();
}

static void release(struct backup *backup)
{
    if (backup->source != NULL) {
        backup->source->ops->free(backup->source);
    }
    manifest_free(backup->manifest);
    machine_close(backup->machine);
    repository_close(backup->repository);
    for (unsigned i = 0; i < backup->n_images; i++) {
        free(backup->names[i]);
    }
    free(backup->names);
    free(backup->images);
    free(backup->disks);
}

/* ---- options ---- */

static char **add_word(char **words, unsigned *n, char *word)
{
    words = realloc(words, (*n + 1) * sizeof(*words));
    if (words == NULL) {
        tool_message("%s", strerror(ENOMEM));
        exit(QLB_E_RUNTIME);
    }
    words[(*n)++] = word;
    return words;
}

/* "NAME=PATH" or "PATH"; a path that has a "=" has a "/" before it. */
static void add_image(struct backup *backup, char *operand)
{
    char *equals = strchr(operand, '='), *slash = strchr(operand, '/');
    bool named = equals != NULL && (slash == NULL || equals < slash);
    unsigned n = backup->n_images;

    if (named && equals == operand) {
        tool_usage("'%s': NAME=IMAGE wants a name", operand);
    }
    backup->names = add_word(backup->names, &n,
                             named ? strndup(operand,
                                             (size_t)(equals - operand))
                                   : NULL);
    backup->images = add_word(backup->images, &backup->n_images,
                              named ? equals + 1 : operand);
}

static void parse_dump_option(struct dump_request *request, int option)
{
    struct dump_options *dump = &request->dump;

    switch (option) {
    case OPT_LEVEL:
        dump->level = (int)tool_parse_number(optarg, "--level", 1, 19);
        break;
    case OPT_THREADS:
        dump->threads = tool_parse_number(optarg, "--threads", 1, 256);
        break;
    case OPT_DIGEST:
        dump->digest = tool_parse_digest(optarg, "--digest");
        break;
    case OPT_RATE_LIMIT:
        dump->rate.bytes_per_second = tool_parse_size(optarg, "--rate-limit");
        break;
    case OPT_PROGRESS:
        dump->progress = PROGRESS_ON;
        break;
    case 'q':
        request->quiet = true;
        dump->progress = PROGRESS_OFF;
        break;
    }
}

static void parse_option(struct backup *backup, int option)
{
    switch (option) {
    case OPT_QMP:
        backup->socket = optarg;
        break;
    case OPT_DISK:
        backup->disks = add_word(backup->disks, &backup->n_disks, optarg);
        break;
    case OPT_SCRATCH:
        backup->scratch = optarg;
        break;
    case OPT_FULL:
        backup->full = true;
        break;
    case OPT_DURABLE:
        backup->durable = true;
        break;
    case OPT_CHAIN:
        backup->label = tool_parse_label(optarg, "--chain");
        break;
    default:
        if (!vm_take_option(&backup->common, option)) {
            parse_dump_option(&backup->request, option);
        }
    }
}

static void parse_options(struct backup *backup, int argc, char **argv)
{
    int option;

    while ((option = tool_getopt(&vm_backup_tool, argc, argv)) != -1) {
        parse_option(backup, option);
    }
    if (optind == argc) {
        tool_usage("the name of a MACHINE is wanted");
    }
    backup->name = argv[optind++];
    while (optind < argc) {
        add_image(backup, argv[optind++]);
    }
    if ((backup->socket != NULL) == (backup->n_images > 0)) {
        tool_usage(backup->socket != NULL
                   ? "--qmp finds the disks itself, or by --disk; IMAGE is "
                     "not wanted"
                   : "the machine's disks are wanted: --qmp=SOCKET where it "
                     "runs, or its images where it does not");
    }
    if (backup->socket == NULL && (backup->n_disks > 0 || backup->durable)) {
        tool_usage("%s wants --qmp", backup->durable ? "--durable" : "--disk");
    }
    vm_repository(&backup->common);
}

int vm_backup(int argc, char **argv)
{
    struct backup backup = {
        .request = {
            .dump = {
                .level = 1,
                .threads = tool_default_threads(),
                .digest = QLB_DIGEST_XXH3_128,
            },
        },
    };
    struct qlb_error err;
    int status;

    parse_options(&backup, argc, argv);
    if (run(&backup, &err) < 0) {
        give_up(&backup);
        status = tool_fail(NULL, &err);
    } else {
        status = print_result(&backup);
    }
    release(&backup);
    return status;
}
