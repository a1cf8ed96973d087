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

#include "audit.h"
#include "dump_options.h"
#include "vm/audit_disks.h"
#include "vm/commands.h"
#include "vm/connect.h"
#include "vm/hooks.h"
#include "vm/nbd_way.h"
#include "vm/options.h"
#include "vm/parent.h"
#include "vm/outcome.h"
#include "vm/quiesce.h"

enum {
    OPT_QMP = TOOL_OPT_LONG, OPT_DOMAIN, OPT_CONNECT, OPT_DISK, OPT_SCRATCH,
    OPT_QUIESCE, OPT_AGENT, OPT_FREEZE_LIMIT, OPT_HOOK, OPT_FULL, OPT_CHAIN,
    OPT_DURABLE, OPT_AUDIT,
};

static const struct tool_option command_options[] = {
    VM_REPOSITORY_OPTION,
    { "domain", OPT_DOMAIN, "NAME",
      "the machine is a libvirt domain (may be repeated)" },
    { "connect", OPT_CONNECT, "URI", "with --domain: libvirt's connection" },
    { "qmp", OPT_QMP, "SOCKET",
      "the machine runs in the QEMU whose monitor is there" },
    { "disk", OPT_DISK, "NAME",
      "of a running machine: that disk (default: all; may be repeated)" },
    { "quiesce", OPT_QUIESCE, "HOW",
      "freeze the guest's file systems: require, or try" },
    { "agent", OPT_AGENT, "SOCKET",
      "with --qmp and --quiesce: of the guest agent" },
    { "freeze-limit", OPT_FREEZE_LIMIT, "SECONDS",
      "thaw after so long, whatever happens (default: 10)" },
    { "hook", OPT_HOOK, "COMMAND", "run it before and after" },
    { "scratch", OPT_SCRATCH, "FOLDER",
      "with a stock QEMU: for what the guest overwrites meanwhile (default: "
      "that of the first image)" },
    NBD_WAY_OPTIONS,
    { "full", OPT_FULL, NULL, "back up all of each disk" },
    { "durable", OPT_DURABLE, NULL,
      "with livebackup in QEMU: what was begun survives a power loss" },
    { "audit", OPT_AUDIT, "SHARE",
      "of a stopped machine: look first for changes that were not tracked, on "
      "a random share of each disk (as 1%)" },
    { "chain", OPT_CHAIN, "NAME",
      "chain label of a repository that is made now (default: its own)" },
    DUMP_OPTIONS,
    { "quiet", 'q', NULL, "show neither progress nor notes" },
    VM_METRICS_OPTION,
    VM_JSON_OPTION,
    TOOL_COMMON_OPTIONS
};

const struct tool vm_backup_tool = {
    .name = "lbvm backup",
    .synopsis = "[OPTION]... --domain=NAME... [MACHINE]\n"
                "       lbvm backup [OPTION]... --qmp=SOCKET MACHINE\n"
                "       lbvm backup [OPTION]... MACHINE [NAME=]IMAGE...",
    .summary = "Backs up the disks of a machine, all at one point in time: "
               "what has changed since\nthe last backup in the repository, "
               "where that can be trusted.",
    .options = command_options,
};

struct backup {
    /* asked for */
    struct vm_options common;
    const char *name;       /* of the machine */
    struct connect_options connect;
    struct nbd_way nbd;
    const char *label;
    bool full;
    struct audit_wanted audit;
    bool alarm;             /* of the audit */
    struct quiesce_options quiesce;
    bool quiesced;          /* asked for, at first */
    struct hooks hooks;
    struct dump_request request;

    struct repository *repository;
    struct machine *machine;
    struct connection connection;
    struct source *source;  /* of the connection */
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

/* The archives of the chain that ends there, for a comparison. */
static int give_chain(const struct backup *backup, struct source_disk *disk,
                      const struct manifest_disk *newest,
                      struct qlb_error *err)
{
    struct store_names objects;
    int ret = machine_chain(backup->machine, newest, &objects, err);

    if (ret == 0) {
        disk->chain = calloc(objects.n, sizeof(*disk->chain));
    }
    for (unsigned i = 0; ret == 0 && i < objects.n; i++) {
        char *path = disk->chain == NULL
                         ? NULL
                         : machine_object_path(backup->machine,
                                               objects.at[i]);

        if (path == NULL) {
            ret = qlb_fail_errno(err, ENOMEM, "%s", disk->name);
        } else {
            disk->chain[disk->n_chain++] = path;
        }
    }
    store_names_release(&objects);
    return ret;
}

/* A stopped disk that has livebackup can be compared with what is known of it,
 * should its bitmaps not tell: with what is in a folder here. */
static bool can_compare(const struct backup *backup,
                        const struct source_disk *disk)
{
    return !qlb_uuid_is_zero(&disk->image) &&
           strcmp(backup->source->ops->kind, "images") == 0 &&
           !machine_is_remote(backup->machine);
}

static int want_disk(const struct backup *backup, struct source_disk *disk,
                     struct qlb_error *err)
{
    const char *digest = digest_name(backup->request.dump.digest);
    bool compare = can_compare(backup, disk);
    struct qlb_error why;
    const struct manifest_disk *parent = parent_find(backup->machine, disk,
                                                     digest, &why);

    disk->has_parent = parent != NULL;
    if (parent == NULL && !backup->full) {
        disk->reason = strdup(why.message);
        parent = compare ? parent_newest(backup->machine, disk, digest)
                         : NULL;
    }
    if (parent != NULL && !backup->full) {
        disk->since = parent->checkpoint;
        disk->since_size = parent->size;
        if (compare && give_chain(backup, disk, parent, err) < 0) {
            return -1;
        }
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
        manifest->quiesced = backup->quiesced;
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
    backup->request.create = store_create;
    backup->request.create_opaque = repository_store(backup->repository);
    backup->machine = machine_open(backup->repository, backup->name, true,
                                   err);
    if (backup->machine == NULL ||
        machine_lock(backup->machine, MACHINE_BACKUP, err) < 0 ||
        machine_load(backup->machine, err) < 0) {
        return -1;
    }
    return machine_sweep(backup->machine, NULL, err);
}

static void say_what_is_done(const struct backup *backup)
{
    const struct source *source = backup->source;

    for (unsigned i = 0; i < source->n_disks; i++) {
        const struct source_disk *disk = &source->disks[i];

        if (backup->request.quiet || disk->reason == NULL) {
            continue;
        }
        if (disk->rescanned) {
            tool_message("%s: %s: incremental, by comparing the disk with its "
                         "archives: %s", backup->name, disk->name,
                         disk->reason);
        } else if (!disk->incremental) {
            tool_message("%s: %s: a full backup: %s", backup->name,
                         disk->name, disk->reason);
        }
    }
}

/* A guest that was not frozen until now is an error only where that is
 * required; that it could not be thawed always is. */
static int thaw(struct backup *backup, struct quiesce *quiesce,
                struct qlb_error *err)
{
    bool frozen = quiesce_is_frozen(quiesce);

    if (quiesce_end(quiesce, &backup->quiesced, err) < 0) {
        return -1;
    }
    if (frozen && !backup->quiesced) {
        if (backup->quiesce.policy == QUIESCE_REQUIRE) {
            return -1;
        }
        tool_message("%s: %s", backup->name, err->message);
    }
    return 0;
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

/* The guest stands still as short as can be: all else is done by then. */
static int point_in_time(struct backup *backup, struct qlb_error *err)
{
    struct source *source = backup->source;
    struct quiesce *quiesce = NULL;
    struct qlb_error why;
    int ret;

    if (hooks_before(&backup->hooks, err) < 0) {
        return -1;
    }
    if (backup->quiesced) {
        quiesce = quiesce_begin(&backup->quiesce, err);
        if (quiesce == NULL) {
            return -1;
        }
    }
    ret = source->ops->begin(source, &backup->request, err);
    backup->begun = ret == 0;
    if (quiesce != NULL && thaw(backup, quiesce, &why) < 0 && ret == 0) {
        *err = why;
        ret = -1;
    }
    if (hooks_thawed(&backup->hooks, &why) < 0 && ret == 0) {
        *err = why;
        ret = -1;
    }
    return ret;
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
    backup->audit.threads = backup->request.dump.threads;
    backup->audit.progress = backup->request.dump.progress;
    backup->audit.quiet = backup->request.quiet;
    backup->alarm = audit_disks(source, backup->name, &backup->audit);
    return point_in_time(backup, err);
}

static int run(struct backup *backup, struct qlb_error *err)
{
    struct source *source;

    if (open_repository(backup, err) < 0 ||
        connect_open(&backup->connection, &backup->connect, err) < 0) {
        return -1;
    }
    source = backup->source = backup->connection.source;
    /* In a machine that doesn't run nothing can be frozen, nor need it be. */
    backup->quiesced = backup->quiesced &&
                       strcmp(source->ops->kind, "images") != 0;
    if (begin(backup, err) < 0) {
        return -1;
    }
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
    connect_close(&backup->connection);
    manifest_free(backup->manifest);
    machine_close(backup->machine);
    repository_close(backup->repository);
    backup->manifest = NULL;
    backup->machine = NULL;
    backup->repository = NULL;
    backup->source = NULL;
}

/* ---- options ---- */

/* The command line: what is the same for all machines, and which domains. */
struct options {
    struct backup backup;
    char **domains;
    unsigned n_domains;
};

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
    struct connect_options *connect = &backup->connect;
    unsigned n = connect->n_images;

    if (named && equals == operand) {
        tool_usage("'%s': NAME=IMAGE wants a name", operand);
    }
    connect->names = add_word(connect->names, &n,
                             named ? strndup(operand,
                                             (size_t)(equals - operand))
                                   : NULL);
    connect->images = add_word(connect->images, &connect->n_images,
                               named ? equals + 1 : operand);
}

static void parse_quiesce(struct backup *backup)
{
    backup->quiesced = true;
    if (strcmp(optarg, "require") == 0) {
        backup->quiesce.policy = QUIESCE_REQUIRE;
    } else if (strcmp(optarg, "try") == 0) {
        backup->quiesce.policy = QUIESCE_TRY;
    } else {
        tool_usage("--quiesce: '%s' is neither require nor try", optarg);
    }
}

/* "1%" or "1". */
static void parse_audit(struct backup *backup)
{
    size_t len = strlen(optarg);

    if (len > 1 && optarg[len - 1] == '%') {
        optarg[len - 1] = '\0';
    }
    backup->audit.share = tool_parse_number(optarg, "--audit", 1, 100);
}

static void parse_option(struct options *options, int option)
{
    struct backup *backup = &options->backup;
    struct connect_options *connect = &backup->connect;

    switch (option) {
    case OPT_QMP:
        connect->socket = optarg;
        break;
    case OPT_DOMAIN:
        options->domains = add_word(options->domains, &options->n_domains,
                                    optarg);
        break;
    case OPT_CONNECT:
        connect->uri = optarg;
        break;
    case OPT_DISK:
        connect->disks = add_word(connect->disks, &connect->n_disks, optarg);
        break;
    case OPT_SCRATCH:
        connect->scratch = optarg;
        break;
    case OPT_DURABLE:
        connect->durable = true;
        break;
    case OPT_FULL:
        backup->full = true;
        break;
    case OPT_AUDIT:
        parse_audit(backup);
        break;
    case OPT_CHAIN:
        backup->label = tool_parse_label(optarg, "--chain");
        break;
    case OPT_QUIESCE:
        parse_quiesce(backup);
        break;
    case OPT_AGENT:
        backup->quiesce.agent = optarg;
        break;
    case OPT_FREEZE_LIMIT:
        backup->quiesce.limit = tool_parse_number(optarg, "--freeze-limit",
                                                  1, 3600);
        break;
    case OPT_HOOK:
        backup->hooks.command = optarg;
        break;
    case 'q':
        backup->request.quiet = true;
        backup->request.dump.progress = PROGRESS_OFF;
        break;
    default:
        if (!vm_take_option(&backup->common, option) &&
            !nbd_way_take_option(&backup->nbd, option)) {
            dump_options_take(&backup->request.dump, option);
        }
    }
}

static void check_nbd(struct backup *backup)
{
    struct connect_options *connect = &backup->connect;

    nbd_way_check(&backup->nbd);
    if (backup->nbd.host == NULL) {
        return;
    }
    if (connect->n_images > 0) {
        tool_usage("--nbd is for a machine that runs; it wants --qmp or "
                   "--domain");
    }
    if (connect->durable) {
        tool_usage("--durable and --nbd exclude each other");
    }
    connect->nbd = &backup->nbd;
}

static void check_options(const struct options *options)
{
    const struct backup *backup = &options->backup;
    const struct connect_options *connect = &backup->connect;
    unsigned ways = (connect->socket != NULL) + (options->n_domains > 0) +
                    (connect->n_images > 0);
    bool images = connect->n_images > 0;

    if (ways > 1) {
        tool_usage("%s", images ? "--qmp and --domain find the disks "
                   "themselves, or by --disk; IMAGE is not wanted"
                   : "--qmp and --domain exclude each other");
    }
    if (ways == 0) {
        tool_usage("the machine's disks are wanted: --domain=NAME, or "
                   "--qmp=SOCKET where it runs, or its images where it does "
                   "not");
    }
    if (images && (connect->n_disks > 0 || connect->durable ||
                   connect->scratch != NULL || backup->quiesced)) {
        tool_usage("--disk, --durable, --scratch and --quiesce are for a "
                   "machine that runs; they want --qmp or --domain");
    }
    if (backup->quiesced && connect->socket != NULL &&
        backup->quiesce.agent == NULL) {
        tool_usage("--quiesce wants --agent, the socket of the guest agent");
    }
    if (backup->quiesce.agent != NULL &&
        (!backup->quiesced || connect->socket == NULL)) {
        tool_usage("--agent goes with --quiesce and --qmp");
    }
}

static void parse_options(struct options *options, int argc, char **argv)
{
    struct backup *backup = &options->backup;
    int option;

    while ((option = tool_getopt(&vm_backup_tool, argc, argv)) != -1) {
        parse_option(options, option);
    }
    if (optind < argc) {
        backup->name = argv[optind++];
    } else if (options->n_domains == 0) {
        tool_usage("the name of a MACHINE is wanted");
    }
    if (backup->name != NULL && options->n_domains > 1) {
        tool_usage("several domains are called by their own names; MACHINE "
                   "is not wanted");
    }
    while (optind < argc) {
        add_image(backup, argv[optind++]);
    }
    check_options(options);
    check_nbd(backup);
    vm_repository(&backup->common);
}

/* ---- the command ---- */

/* One machine: an exit status. */
static int back_up(struct backup *backup)
{
    double begun = tool_clock();
    struct qlb_error err;
    int status = 0;

    backup->hooks.machine = backup->name;
    if (run(backup, &err) < 0) {
        give_up(backup);
        status = tool_fail(NULL, &err);
    }
    if (hooks_after(&backup->hooks, status, &err) < 0) {
        int failed = tool_fail(NULL, &err);

        status = status == 0 ? failed : status;
    }
    if (backup->manifest != NULL && status == 0) {
        status = print_result(backup);
    }
    if (backup->alarm && status == 0) {
        status = AUDIT_ALARM;
    }
    status = outcome_note(&backup->common, METRICS_BACKUP, backup->name,
                          backup->machine, backup->manifest, begun, status);
    release(backup);
    return status;
}

/* One after the other; one that fails does not keep the others back. */
static int back_up_domains(const struct options *options)
{
    int status = 0;

    for (unsigned i = 0; i < options->n_domains && !tool_stop; i++) {
        struct backup backup = options->backup;
        int one;

        backup.connect.domain = options->domains[i];
        backup.quiesce.domain = options->domains[i];
        backup.quiesce.uri = backup.connect.uri;
        if (backup.name == NULL) {
            backup.name = options->domains[i];
        }
        one = back_up(&backup);
        status = status == 0 ? one : status;
    }
    return status;
}

static void release_options(struct options *options)
{
    struct connect_options *connect = &options->backup.connect;

    for (unsigned i = 0; i < connect->n_images; i++) {
        free(connect->names[i]);
    }
    free(connect->names);
    free(connect->images);
    free(connect->disks);
    nbd_way_release(&options->backup.nbd);
    free(options->domains);
}

int vm_backup(int argc, char **argv)
{
    struct options options = { 0 };
    int status;

    dump_options_init(&options.backup.request.dump);
    parse_options(&options, argc, argv);
    status = options.n_domains > 0 ? back_up_domains(&options)
                                   : back_up(&options.backup);
    release_options(&options);
    return status;
}
