/* lbdump: dumps a qcow2 disk into an archive, in full or what has changed.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "audit.h"
#include "dump_options.h"
#include "imagedump.h"
#include "interrupted.h"
#include "livedump.h"
#include "map.h"
#include "nbddump.h"
#include "tool.h"

enum {
    OPT_INCREMENTAL = TOOL_OPT_LONG, OPT_SINCE, OPT_AUTO, OPT_OVERLAY,
    OPT_RESCAN, OPT_AUDIT, OPT_SHARE, OPT_SEED, OPT_MAP, OPT_CHAIN, OPT_COPY,
    OPT_TRUST_PIPE, OPT_FORCE, OPT_JSON, OPT_QMP, OPT_DISK, OPT_INTERRUPTED,
    OPT_ORIG, OPT_DURABLE, OPT_BITMAP, OPT_UUID, OPT_IMAGE_UUID, OPT_PARENT,
    OPT_PARENT_SIZE, OPT_COVERED, OPT_SET, OPT_TIME,
};

static const struct tool_option options[] = {
    { "incremental", OPT_INCREMENTAL, NULL,
      "dump what changed since the last confirmed checkpoint" },
    { "since", OPT_SINCE, "UUID", "dump what changed since that checkpoint" },
    { "auto", OPT_AUTO, NULL, "incremental where there is trust, else full" },
    { "overlay", OPT_OVERLAY, NULL,
      "dump what the top overlay holds, on its backing image's checkpoint" },
    { "rescan", OPT_RESCAN, NULL,
      "compare the disk with its ARCHIVEs, instead of trusting the tracking" },
    { "audit", OPT_AUDIT, NULL,
      "no dump: hold what the tracking calls clean against the ARCHIVEs" },
    { "share", OPT_SHARE, "PERCENT",
      "with --audit: of the disk (default: 100)" },
    { "seed", OPT_SEED, "N", "with --share: which part (default: random)" },
    { "map", OPT_MAP, "FORMAT",
      "no dump: print what has changed, as json (the only format)" },
    { "qmp", OPT_QMP, "SOCKET",
      "dump disks of the running QEMU whose monitor is there" },
    { "disk", OPT_DISK, "NAME",
      "with --qmp: that disk (default: all with livebackup on)" },
    { "durable", OPT_DURABLE, NULL,
      "with --qmp: what was begun survives a power loss" },
    { "interrupted", OPT_INTERRUPTED, NULL,
      "dump the point in time of a backup during which QEMU was killed" },
    { "orig", OPT_ORIG, "FILE",
      "with --interrupted: the saved originals (default: DISK.orig.qcow2)" },
    { "bitmap", OPT_BITMAP, "NAME",
      "of an NBD export: dump what this dirty bitmap says has changed" },
    { "parent", OPT_PARENT, "UUID",
      "with --bitmap: the backup that it goes on from" },
    { "parent-size", OPT_PARENT_SIZE, "SIZE",
      "with --bitmap: that of the disk then, if it has grown since" },
    { "covered", OPT_COVERED, "UUID",
      "with --bitmap: a backup since the parent (may be repeated)" },
    { "uuid", OPT_UUID, "UUID",
      "of an NBD export: that of this backup (default: random)" },
    { "image-uuid", OPT_IMAGE_UUID, "UUID",
      "of an NBD export: that of its disk (default: random)" },
    { "set", OPT_SET, "UUID",
      "of an NBD export: that of the disks backed up together" },
    { "time", OPT_TIME, "SECONDS",
      "of an NBD export: its point in time, since 1970 (default: now)" },
    { "chain", OPT_CHAIN, "NAME", "label of the chain (default: main)" },
    { "copy", OPT_COPY, NULL, "leave the image untouched: no checkpoint" },
    { "trust-pipe", OPT_TRUST_PIPE, NULL,
      "confirm though the archive goes into a pipe" },
    { "output", 'o', "FILE", "write the archive to FILE, whole or not at all" },
    { "force", OPT_FORCE, NULL, "replace FILE where it exists" },
    DUMP_OPTIONS,
    { "quiet", 'q', NULL, "show neither progress nor notes" },
    { "json", OPT_JSON, NULL, "print a summary in JSON" },
    TOOL_COMMON_OPTIONS
};

static const struct tool tool = {
    .name = "lbdump",
    .synopsis = "[OPTION]... DISK > ARCHIVE\n"
                "       lbdump [OPTION]... -o ARCHIVE DISK\n"
                "       lbdump [OPTION]... --rescan [-o ARCHIVE] ARCHIVE... "
                "DISK\n"
                "       lbdump [OPTION]... --audit ARCHIVE... DISK\n"
                "       lbdump [OPTION]... --qmp=SOCKET [--disk=NAME]... "
                "[-o ARCHIVE]...\n"
                "       lbdump [OPTION]... [--bitmap=NAME] [-o ARCHIVE] "
                "nbd://HOST/EXPORT",
    .summary = "Dumps the qcow2 image DISK into an archive: in full, or with "
               "--incremental\nwhat has changed since the last one. With "
               "--qmp, dumps disks of a running QEMU,\nall as they are at one "
               "point in time. Dumps also what an NBD server exports.",
    .options = options,
};

struct lbdump {
    struct imagedump disk;        /* what is asked for, of all kinds */
    bool labelled;
    struct livedump_options live; /* where it has a socket */
    bool interrupted;
    const char *orig;
    bool rescan, audit, map;
    struct audit_options audit_options;
    const char *audit_option;     /* one of those that were given */
    struct nbddump_options nbd;   /* where the path is a URI */
    const char *nbd_option;       /* one of those that were given */
};

/* ---- the summary ---- */

static int print_summary(const struct lbdump *d)
{
    const struct imagedump *disk = &d->disk;

    return tool_print_json(dump_summary(disk->path, &disk->archive,
                                        disk->record, disk->reason),
                           disk->archive.path == NULL);
}

static void note_unconfirmed(const struct lbdump *d)
{
    const struct imagedump *disk = &d->disk;

    if (!disk->request.quiet && disk->record && !disk->archive.confirmed) {
        dump_note_unconfirmed(disk->path, &disk->archive, "");
    }
}

/* ---- options ---- */

static void set_mode(struct lbdump *d, enum dump_mode mode)
{
    if (d->disk.request.mode != DUMP_FULL) {
        tool_usage("--incremental, --since, --auto and --overlay exclude each "
                   "other");
    }
    d->disk.request.mode = mode;
}

/* Adds optarg to a list. */
static const char **add_name(const char **names, unsigned *n)
{
    names = realloc(names, (*n + 1) * sizeof(*names));
    if (names == NULL) {
        tool_message("%s", strerror(ENOMEM));
        exit(QLB_E_RUNTIME);
    }
    names[(*n)++] = optarg;
    return names;
}

static struct qlb_uuid parse_given_uuid(const char *option)
{
    struct qlb_uuid uuid = tool_parse_uuid(optarg, option);

    if (qlb_uuid_is_zero(&uuid)) {
        tool_usage("%s: the UUID of zeroes means none", option);
    }
    return uuid;
}

static void add_covered(struct nbddump_options *nbd)
{
    if (nbd->n_covered == QLB_MAX_CHECKPOINTS) {
        tool_usage("--covered: at most %u are possible", QLB_MAX_CHECKPOINTS);
    }
    nbd->covered[nbd->n_covered++] = parse_given_uuid("--covered");
}

/* What only exports have. */
static void parse_nbd_option(struct lbdump *d, int option)
{
    struct nbddump_options *nbd = &d->nbd;

    for (const struct tool_option *o = options; o->name != NULL; o++) {
        if (o->value == option) {
            d->nbd_option = o->name;
        }
    }
    switch (option) {
    case OPT_BITMAP:
        nbd->bitmap = optarg;
        break;
    case OPT_UUID:
        nbd->uuid = parse_given_uuid("--uuid");
        break;
    case OPT_IMAGE_UUID:
        nbd->image_uuid = parse_given_uuid("--image-uuid");
        break;
    case OPT_PARENT:
        nbd->parent = parse_given_uuid("--parent");
        break;
    case OPT_PARENT_SIZE:
        nbd->parent_size = tool_parse_size(optarg, "--parent-size");
        break;
    case OPT_COVERED:
        add_covered(nbd);
        break;
    case OPT_SET:
        nbd->set = parse_given_uuid("--set");
        break;
    case OPT_TIME:
        nbd->time = tool_parse_number(optarg, "--time", 0, UINT32_MAX);
        break;
    }
}

/* What is done with the archives of the disk, and what is no dump. */
static bool parse_chain_option(struct lbdump *d, int option)
{
    struct audit_options *audit = &d->audit_options;

    switch (option) {
    case OPT_RESCAN:
        d->rescan = true;
        return true;
    case OPT_AUDIT:
        d->audit = true;
        return true;
    case OPT_SHARE:
        d->audit_option = "share";
        audit->share = tool_parse_number(optarg, "--share", 1, 100);
        return true;
    case OPT_SEED:
        d->audit_option = "seed";
        audit->seed = tool_parse_number(optarg, "--seed", 0, UINT32_MAX);
        return true;
    case OPT_MAP:
        if (strcmp(optarg, "json") != 0) {
            tool_usage("--map: json is wanted, not '%s'", optarg);
        }
        d->map = true;
        return true;
    default:
        return false;
    }
}

static void parse_option(struct lbdump *d, int option)
{
    switch (option) {
    case OPT_INCREMENTAL:
        set_mode(d, DUMP_INCREMENTAL);
        break;
    case OPT_SINCE:
        set_mode(d, DUMP_SINCE);
        d->disk.request.since = tool_parse_uuid(optarg, "--since");
        break;
    case OPT_AUTO:
        set_mode(d, DUMP_AUTO);
        break;
    case OPT_OVERLAY:
        set_mode(d, DUMP_OVERLAY);
        break;
    case OPT_CHAIN:
        d->disk.request.label = tool_parse_label(optarg, "--chain");
        d->labelled = true;
        break;
    case OPT_COPY:
        d->disk.copy = true;
        break;
    case OPT_TRUST_PIPE:
        d->disk.request.trust_pipe = true;
        break;
    case 'o':
        d->disk.archive.path = optarg;
        d->live.outputs = add_name(d->live.outputs, &d->live.n_outputs);
        break;
    case OPT_QMP:
        d->live.socket = optarg;
        break;
    case OPT_DISK:
        d->live.disks = add_name(d->live.disks, &d->live.n_disks);
        break;
    case OPT_DURABLE:
        d->live.durable = true;
        break;
    case OPT_INTERRUPTED:
        d->interrupted = true;
        break;
    case OPT_ORIG:
        d->orig = optarg;
        break;
    case OPT_FORCE:
        d->disk.request.force = true;
        break;
    case 'q':
        d->disk.request.quiet = true;
        break;
    case OPT_JSON:
        d->disk.request.json = true;
        break;
    default:
        if (!parse_chain_option(d, option) &&
            !dump_options_take(&d->disk.request.dump, option)) {
            parse_nbd_option(d, option);
        }
    }
}

/* What is wrong whichever disks there are. */
static void check_live_options(const struct lbdump *d, int operands)
{
    const struct livedump_options *live = &d->live;
    unsigned folders = 0;

    for (unsigned i = 0; i < live->n_outputs; i++) {
        folders += livedump_is_folder(live->outputs[i]);
    }
    if (operands > 0) {
        tool_usage("--qmp finds the disks itself, or by --disk; DISK is not "
                   "wanted");
    }
    if (d->disk.copy || d->disk.request.mode == DUMP_OVERLAY) {
        tool_usage("--qmp excludes %s", d->disk.copy ? "--copy" : "--overlay");
    }
    if (folders > 0 && live->n_outputs > 1) {
        tool_usage("-o FOLDER/ is for all disks; no other -o is wanted");
    }
    if (live->n_outputs > 1 && live->n_disks == 0) {
        tool_usage("several times -o want as many times --disk; or use -o "
                   "FOLDER/");
    }
    if (live->n_disks > 0 && live->n_outputs > 0 && folders == 0 &&
        live->n_outputs != live->n_disks) {
        tool_usage("%u times --disk, but %u times -o; or use -o FOLDER/",
                   live->n_disks, live->n_outputs);
    }
    if (live->n_disks > 1 && live->n_outputs == 0) {
        tool_usage("several disks don't go to standard output; use -o "
                   "FOLDER/");
    }
}

/* The backup was begun as what it is. */
static void check_interrupted_options(const struct lbdump *d)
{
    if (d->live.socket != NULL) {
        tool_usage("--interrupted is for a QEMU that is gone; it excludes "
                   "--qmp");
    }
    if (d->disk.request.mode != DUMP_FULL) {
        tool_usage("--interrupted dumps what the backup was begun for; it "
                   "excludes --incremental, --since, --auto and --overlay");
    }
    if (d->labelled) {
        tool_usage("--interrupted keeps the label of the backup; it excludes "
                   "--chain");
    }
}

/* Nothing but what is given tells an export's identity. */
static void check_nbd_options(const struct lbdump *d)
{
    const struct nbddump_options *nbd = &d->nbd;
    bool has_parent = !qlb_uuid_is_zero(&nbd->parent);

    if (d->disk.request.mode != DUMP_FULL || d->interrupted) {
        tool_usage("--incremental, --since, --auto, --overlay and "
                   "--interrupted are not for NBD exports; --bitmap dumps "
                   "what has changed");
    }
    if (d->disk.copy || d->disk.request.trust_pipe) {
        tool_usage("%s is not for NBD exports, whose disk lbdump does not "
                   "write to", d->disk.copy ? "--copy" : "--trust-pipe");
    }
    if (nbd->bitmap != NULL && !has_parent) {
        tool_usage("--bitmap wants --parent: NBD does not tell since when "
                   "the bitmap tracks changes, and an incremental must name "
                   "the backup it goes on from");
    }
    if (nbd->bitmap != NULL && qlb_uuid_is_zero(&nbd->image_uuid)) {
        tool_usage("--bitmap wants --image-uuid: that of the parent's "
                   "archive, which all archives of a disk have");
    }
    if (nbd->bitmap == NULL && (has_parent || nbd->n_covered > 0 ||
                                nbd->parent_size != UINT64_MAX)) {
        tool_usage("--parent, --parent-size and --covered want --bitmap");
    }
}

/* All operands but the last are the chain. */
static void take_chain(struct lbdump *d, int argc, char **argv)
{
    enum dump_mode mode = d->disk.request.mode;

    if (mode != DUMP_INCREMENTAL && mode != DUMP_AUTO) {
        tool_usage("--rescan wants --incremental or --auto");
    }
    if (d->live.socket != NULL || d->interrupted) {
        tool_usage("--rescan is for a disk that nobody has open; it excludes "
                   "--qmp and --interrupted");
    }
    if (d->labelled) {
        tool_usage("--rescan keeps the label of the archives; it excludes "
                   "--chain");
    }
    if (argc - optind < 2) {
        tool_usage("--rescan wants the archives of the disk, and DISK behind "
                   "them");
    }
    d->disk.rescan.inputs = (const char *const *)&argv[optind];
    d->disk.rescan.n_inputs = (unsigned)(argc - 1 - optind);
    optind = argc - 1;
}

/* No dump is made, so hardly any other option has a meaning. */
static void take_audit(struct lbdump *d, int argc, char **argv)
{
    struct audit_options *o = &d->audit_options;

    if (d->rescan || d->disk.request.mode != DUMP_FULL || d->interrupted ||
        d->live.socket != NULL || d->live.n_outputs > 0) {
        tool_usage("--audit makes no dump; it excludes the options for one");
    }
    if (argc - optind < 2) {
        tool_usage("--audit wants the archives of the disk, and DISK behind "
                   "them");
    }
    o->inputs = (const char *const *)&argv[optind];
    o->n_inputs = (unsigned)(argc - 1 - optind);
    o->path = argv[argc - 1];
    o->threads = d->disk.request.dump.threads;
    o->quiet = d->disk.request.quiet;
    o->progress = o->quiet ? PROGRESS_OFF : d->disk.request.dump.progress;
}

static void take_map(struct lbdump *d, int argc, char **argv)
{
    if (d->disk.request.mode == DUMP_FULL) {
        d->disk.request.mode = DUMP_INCREMENTAL;
    }
    if (d->rescan || d->audit || d->interrupted || d->live.socket != NULL ||
        d->live.n_outputs > 0 || d->disk.request.mode == DUMP_AUTO ||
        d->disk.request.mode == DUMP_OVERLAY) {
        tool_usage("--map makes no dump; it goes with --since and --chain "
                   "alone");
    }
    if (argc - optind != 1) {
        tool_usage("one DISK is wanted, %d given", argc - optind);
    }
    d->disk.path = argv[optind];
}

static void parse_options(struct lbdump *d, int argc, char **argv)
{
    int option;

    while ((option = tool_getopt(&tool, argc, argv)) != -1) {
        parse_option(d, option);
    }
    if (d->audit_option != NULL && !d->audit) {
        tool_usage("--%s is for --audit", d->audit_option);
    }
    if (d->map) {
        take_map(d, argc, argv);
        return;
    }
    if (d->audit) {
        take_audit(d, argc, argv);
        return;
    }
    if (d->rescan) {
        take_chain(d, argc, argv);
    }
    if (d->interrupted) {
        check_interrupted_options(d);
    } else if (d->orig != NULL) {
        tool_usage("--orig names saved originals; it wants --interrupted");
    }
    if (d->live.socket != NULL) {
        check_live_options(d, argc - optind);
    } else if (d->live.n_disks > 0) {
        tool_usage("--disk names a disk of a running QEMU; it wants --qmp");
    } else if (d->live.durable) {
        tool_usage("--durable is for a running QEMU; it wants --qmp");
    } else if (argc - optind != 1) {
        tool_usage("one DISK is wanted, %d given", argc - optind);
    }
    d->disk.path = argv[optind];
    if (d->disk.path != NULL && nbddump_is_uri(d->disk.path)) {
        check_nbd_options(d);
    } else if (d->nbd_option != NULL) {
        tool_usage("--%s is for NBD exports (nbd://HOST/EXPORT) alone",
                   d->nbd_option);
    }
    if (d->disk.request.quiet) {
        d->disk.request.dump.progress = PROGRESS_OFF;
    }
    if (d->disk.archive.path == NULL && isatty(STDOUT_FILENO)) {
        tool_usage("an archive is not written to a terminal; redirect it, or "
                   "use -o FILE");
    }
}

static int dump_live(struct lbdump *d)
{
    int status = livedump(&d->live, &d->disk.request);

    free(d->live.disks);
    free(d->live.outputs);
    return status;
}

static int dump_what_was_left(struct lbdump *d)
{
    struct interrupted_options left = {
        .disk = d->disk.path,
        .orig = d->orig,
        .output = d->disk.archive.path,
        .copy = d->disk.copy,
    };
    int status = dump_interrupted(&left, &d->disk.request);

    free(d->live.outputs);
    return status;
}

static int dump_export(struct lbdump *d)
{
    int status = nbddump(d->disk.path, &d->nbd, &d->disk.request,
                         d->disk.archive.path);

    free(d->live.outputs);
    return status;
}

static int run_image(struct imagedump *disk, struct qlb_error *err)
{
    if (imagedump_open(disk, err) < 0) {
        return -1;
    }
    imagedump_say(disk);
    if (imagedump_dump(disk, err) < 0 || imagedump_finish(disk, err) < 0) {
        return -1;
    }
    return imagedump_confirm(disk, err);
}

static int print_map(struct lbdump *d)
{
    struct qlb_error err;
    int status = 0;

    if (map_print(&d->disk, &err) < 0) {
        status = tool_fail(d->disk.path, &err);
    }
    imagedump_close(&d->disk);
    return status;
}

static int dump_image(struct lbdump *d)
{
    struct imagedump *disk = &d->disk;
    double start = tool_clock();
    struct qlb_error err;
    int status = 0;

    if (run_image(disk, &err) < 0) {
        bool named = dump_archive_is_named(&disk->archive, &err) ||
                     rescan_is_named(&disk->rescan, &err);

        status = tool_fail(named ? NULL : disk->path, &err);
        tool_discard_stdout(disk->archive.path == NULL ? disk->archive.out
                                                       : NULL);
    } else {
        disk->archive.seconds = tool_clock() - start;
        note_unconfirmed(d);
        if (disk->request.json && print_summary(d) < 0) {
            status = QLB_E_RUNTIME;
        }
    }
    imagedump_close(disk);
    return status;
}

/* One that --seed takes. */
static uint64_t random_seed(void)
{
    struct qlb_uuid random = tool_random_uuid();
    uint64_t seed = 0;

    for (unsigned i = 0; i < 4; i++) {
        seed = seed << 8 | random.bytes[i];
    }
    return seed;
}

int main(int argc, char **argv)
{
    struct lbdump d = {
        .audit_options = { .share = 100 },
        .nbd = { .parent_size = UINT64_MAX, .time = UINT64_MAX },
        .disk.request.label = "main",
    };
    int status;

    tool_begin("lbdump");
    dump_options_init(&d.disk.request.dump);
    d.audit_options.seed = random_seed();
    parse_options(&d, argc, argv);
    if (d.audit) {
        return audit(&d.audit_options);
    }
    if (d.map) {
        return print_map(&d);
    }
    if (d.live.socket != NULL) {
        return dump_live(&d);
    }
    if (d.interrupted) {
        return dump_what_was_left(&d);
    }
    if (nbddump_is_uri(d.disk.path)) {
        return dump_export(&d);
    }
    status = dump_image(&d);
    free(d.live.outputs);
    return status;
}
