/* lbdump: dumps a qcow2 disk into an archive, in full or what has changed.
 *
 * The order at the end is that of livebackup-extension.md, "Adding a
 * checkpoint for an offline dump": seal the archive, sync it, add the
 * checkpoint unconfirmed, make the archive whole and synced, confirm.  An
 * error in between takes the checkpoint away again.
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

#include "dump_archive.h"
#include "interrupted.h"
#include "livedump.h"
#include "nbddump.h"
#include "tool.h"

enum {
    OPT_INCREMENTAL = TOOL_OPT_LONG, OPT_SINCE, OPT_AUTO, OPT_OVERLAY,
    OPT_CHAIN, OPT_COPY, OPT_TRUST_PIPE, OPT_LEVEL, OPT_THREADS,
    OPT_RATE_LIMIT, OPT_DIGEST, OPT_FORCE, OPT_PROGRESS, OPT_JSON, OPT_QMP,
    OPT_DISK, OPT_INTERRUPTED, OPT_ORIG, OPT_DURABLE, OPT_BITMAP, OPT_UUID,
    OPT_IMAGE_UUID, OPT_PARENT, OPT_PARENT_SIZE, OPT_COVERED, OPT_SET,
    OPT_TIME,
};

static const struct tool_option options[] = {
    { "incremental", OPT_INCREMENTAL, NULL,
      "dump what changed since the last confirmed checkpoint" },
    { "since", OPT_SINCE, "UUID", "dump what changed since that checkpoint" },
    { "auto", OPT_AUTO, NULL, "incremental where there is trust, else full" },
    { "overlay", OPT_OVERLAY, NULL,
      "dump what the top overlay holds, on its backing image's checkpoint" },
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
    { "level", OPT_LEVEL, "N", "zstd compression level, 1 to 19 (default: 1)" },
    { "threads", OPT_THREADS, "N", "threads (default: one per processor)" },
    { "digest", OPT_DIGEST, "NAME", "xxh3 (default) or sha256" },
    { "rate-limit", OPT_RATE_LIMIT, "RATE",
      "read at most RATE bytes per second (as 50M)" },
    { "progress", OPT_PROGRESS, NULL, "show progress, also without a terminal" },
    { "quiet", 'q', NULL, "show neither progress nor notes" },
    { "json", OPT_JSON, NULL, "print a summary in JSON" },
    TOOL_COMMON_OPTIONS
};

static const struct tool tool = {
    .name = "lbdump",
    .synopsis = "[OPTION]... DISK > ARCHIVE\n"
                "       lbdump [OPTION]... -o ARCHIVE DISK\n"
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
    /* asked for */
    const char *path;
    bool copy, labelled;
    struct dump_request request;
    struct livedump_options live; /* where it has a socket */
    bool interrupted;
    const char *orig;
    struct nbddump_options nbd;   /* where the path is a URI */
    const char *nbd_option;       /* one of those that were given */

    /* found and decided */
    struct qlb_image *image;    /* NULL with --overlay */
    struct qlb_disk *overlay;   /* with --overlay: the top */
    struct qlb_image *backing;  /* with --overlay: its backing image */
    const struct qlb_disk *disk;
    bool record;                /* add a checkpoint to the image */
    bool incremental;
    unsigned since_index;
    char reason[512];           /* why --auto made a full one; or empty */
    struct qlb_changes *changes;
    struct qlb_disk_reader *overlay_reader;

    struct dump_archive archive;
};

/* ---- opening ---- */

static int open_image(struct lbdump *d, struct qlb_error *err)
{
    enum qlb_trust trust;

    d->image = qlb_image_open(d->path, 0, err);
    if (d->image == NULL) {
        return -1;
    }
    trust = qlb_image_trust(d->image);
    d->record = !d->copy && trust != QLB_TRUST_OFF &&
                trust != QLB_TRUST_UNSUPPORTED &&
                trust != QLB_TRUST_EXTENSION_DAMAGED;
    if (d->record) {
        /* Again, with the writer's locks. */
        qlb_image_close(d->image);
        d->image = qlb_image_open(d->path, QLB_IMAGE_WRITE, err);
        if (d->image == NULL) {
            return -1;
        }
        if (qlb_image_ext(d->image) == NULL) {
            return qlb_fail(err, QLB_E_BUSY, "%s: the image was changed by "
                            "another process", d->path);
        }
    }
    d->disk = qlb_image_disk(d->image);
    return 0;
}

static bool backing_is_qcow2(const struct qlb_disk *overlay)
{
    const char *format = qlb_disk_header(overlay)->backing_format;

    return format != NULL && strcmp(format, "qcow2") == 0;
}

static int open_overlay(struct lbdump *d, struct qlb_error *err)
{
    const char *backing;
    const struct qlb_ext *ext;

    d->overlay = qlb_disk_open(d->path, QLB_DISK_LOCK, err);
    if (d->overlay == NULL) {
        return -1;
    }
    d->disk = d->overlay;
    backing = qlb_disk_backing_path(d->overlay);
    if (backing != NULL && !backing_is_qcow2(d->overlay)) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s: the backing image %s has "
                        "no checkpoint: it is not a qcow2 image", d->path,
                        backing);
    }
    if (backing == NULL) {
        return qlb_fail(err, QLB_E_USAGE, "%s: --overlay wants an image with "
                        "a backing file", d->path);
    }
    d->backing = qlb_image_open(backing, 0, err);
    if (d->backing == NULL) {
        return -1;
    }
    ext = qlb_image_ext(d->backing);
    if (ext == NULL) {
        enum qlb_trust trust = qlb_image_trust(d->backing);

        return qlb_fail(err, QLB_E_UNTRUSTED, "%s: the backing image %s has "
                        "no checkpoint: %s (%s)", d->path, backing,
                        qlb_trust_reason(trust), qlb_trust_keyword(trust));
    }
    return 0;
}

/* ---- deciding ---- */

static const struct qlb_image *tracked_image(const struct lbdump *d)
{
    return d->backing != NULL ? d->backing : d->image;
}

/* Index of the checkpoint to go on from, or -1 with QLB_E_UNTRUSTED. */
static int find_parent(struct lbdump *d, struct qlb_error *err)
{
    const struct qlb_image *image = tracked_image(d);
    const struct qlb_ext *ext = qlb_image_ext(image);
    enum qlb_trust trust = qlb_image_trust(image);
    char text[QLB_UUID_TEXT];
    int i;

    if (trust == QLB_TRUST_OFF) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "livebackup is off; turn it on "
                        "with 'lbctl enable'");
    }
    if (trust != QLB_TRUSTED || ext == NULL) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s (%s)",
                        qlb_trust_reason(trust), qlb_trust_keyword(trust));
    }
    if (d->request.mode == DUMP_SINCE) {
        i = qlb_ext_find(ext, &d->request.since);
        if (i < 0) {
            return qlb_fail(err, QLB_E_UNTRUSTED, "the image has no "
                            "checkpoint %s; 'lbctl status' lists them",
                            qlb_uuid_format(&d->request.since, text));
        }
    } else {
        i = qlb_ext_newest_confirmed(ext, d->request.label);
        if (i < 0) {
            return qlb_fail(err, QLB_E_UNTRUSTED, "chain '%s' has no "
                            "confirmed checkpoint (no-checkpoint)",
                            d->request.label);
        }
    }
    trust = qlb_image_trust_since(image, (unsigned)i);
    if (trust != QLB_TRUSTED) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s (%s)",
                        qlb_trust_reason(trust), qlb_trust_keyword(trust));
    }
    return i;
}

static int decide(struct lbdump *d, struct qlb_error *err)
{
    int parent;

    if (d->request.mode == DUMP_FULL) {
        return 0;
    }
    parent = find_parent(d, err);
    if (parent >= 0) {
        d->incremental = true;
        d->since_index = (unsigned)parent;
        return 0;
    }
    if (d->request.mode == DUMP_AUTO) {
        snprintf(d->reason, sizeof(d->reason), "%.500s", err->message);
        return 0;
    }
    qlb_error_prefix(err, "%s: an incremental is not possible", d->path);
    if (d->request.mode == DUMP_INCREMENTAL) {
        dump_hint_at_auto(err);
    }
    return -1;
}

/* Tells what an operator may not expect. */
static void say_what_is_done(const struct lbdump *d)
{
    enum qlb_trust trust;

    if (d->request.quiet) {
        return;
    }
    if (d->request.mode == DUMP_AUTO) {
        dump_say_auto(d->path, d->incremental, d->reason);
    }
    if (d->image == NULL || d->copy) {
        return;
    }
    trust = qlb_image_trust(d->image);
    if (trust == QLB_TRUST_OFF) {
        if (d->request.mode == DUMP_AUTO) {
            return; /* that was the reason */
        }
        tool_message("%s: livebackup is off, so this dump is not followed by "
                     "incrementals; turn it on with: lbctl enable %s",
                     d->path, d->path);
    } else if (!d->record) {
        tool_message("%s: no checkpoint is recorded: %s (%s)", d->path,
                     qlb_trust_reason(trust), qlb_trust_keyword(trust));
    } else if (d->request.mode != DUMP_AUTO && trust != QLB_TRUSTED &&
               trust != QLB_TRUST_NO_CHECKPOINT) {
        tool_message("%s: checkpoints that can't be trusted are dropped: %s "
                     "(%s)", d->path, qlb_trust_reason(trust),
                     qlb_trust_keyword(trust));
    }
}

/* ---- the header ---- */

static void make_header(struct lbdump *d)
{
    const struct qlb_image *image = tracked_image(d);
    const struct qlb_ext *ext = qlb_image_ext(image);
    struct qlb_lbz_header *h = &d->archive.header;

    dump_archive_begin(&d->archive, &d->request, qlb_disk_size(d->disk));
    h->time = (uint64_t)time(NULL);
    h->uuid = tool_random_uuid();
    h->image_uuid = ext != NULL ? ext->image_uuid : tool_random_uuid();
    if (d->incremental) {
        uint64_t smallest = UINT64_MAX;

        /* A larger overlay reads as zeroes above its base. */
        if (d->backing != NULL) {
            smallest = qlb_disk_size(qlb_image_disk(d->backing));
        }
        dump_archive_increment(&d->archive, ext, d->since_index,
                               ext->n_checkpoints, smallest);
    }
}

/* ---- ranges ---- */

/* The next range that the top overlay itself holds. */
static int next_allocated(struct lbdump *d, uint64_t offset, uint64_t *start,
                          uint64_t *length, struct qlb_error *err)
{
    uint64_t size = qlb_disk_size(d->disk);

    *length = 0;
    while (offset < size) {
        enum qlb_extent_type type;
        uint64_t run;

        if (qlb_disk_top_extent(d->overlay_reader, offset, size - offset,
                                &type, &run, err) < 0) {
            return -1;
        }
        if (type != QLB_EXTENT_UNALLOCATED) {
            *start = offset;
            *length = run;
            return 0;
        }
        offset += run;
    }
    return 0;
}

/* What has changed since the parent: of two sources, the nearer range. The
 * block that holds the disk's end is changed if the disk was cut there. */
static int changed(void *opaque, uint64_t offset, uint64_t *start,
                   uint64_t *length, struct qlb_error *err)
{
    struct lbdump *d = opaque;
    uint64_t size = qlb_disk_size(d->disk);
    uint64_t other, other_length = 0;

    *length = 0;
    if (offset < qlb_disk_size(qlb_image_disk(tracked_image(d))) &&
        qlb_changes_next(d->changes, offset, start, length, err) < 0) {
        return -1;
    }
    if (*length > 0 && *start >= size) {
        *length = 0;
    }
    if (*length > size - *start) {
        *length = size - *start;
    }
    if (d->overlay != NULL) {
        if (next_allocated(d, offset, &other, &other_length, err) < 0) {
            return -1;
        }
        if (other_length > 0 && (*length == 0 || other < *start)) {
            *start = other;
            *length = other_length;
        }
    }
    return 0;
}

/* The changed ranges and, at the end, the block the disk was cut in. */
static int changed_and_cut(void *opaque, uint64_t offset, uint64_t *start,
                           uint64_t *length, struct qlb_error *err)
{
    struct lbdump *d = opaque;
    const struct qlb_ext *ext = qlb_image_ext(tracked_image(d));

    if (changed(d, offset, start, length, err) < 0) {
        return -1;
    }
    if (*length == 0) {
        dump_cut_range(d->archive.header.virtual_size,
                       ext->checkpoints[d->since_index].virtual_size, offset,
                       start, length);
    }
    return 0;
}

static int prepare_ranges(struct lbdump *d, struct dump_ranges *ranges,
                          struct qlb_error *err)
{
    struct qlb_image *image = d->backing != NULL ? d->backing : d->image;

    ranges->opaque = &d->archive;
    ranges->next = dump_whole_disk;
    d->request.dump.expected = 0;
    if (!d->incremental) {
        return 0;
    }
    ranges->opaque = d;
    ranges->next = changed_and_cut;
    d->changes = qlb_image_changes(image, d->since_index, err);
    if (d->changes == NULL ||
        qlb_changes_bytes(d->changes, &d->request.dump.expected, err) < 0) {
        return -1;
    }
    if (d->overlay != NULL) {
        d->request.dump.expected = 0;
        d->overlay_reader = qlb_disk_reader_new(d->overlay, err);
        if (d->overlay_reader == NULL) {
            return -1;
        }
    }
    return 0;
}

/* ---- the end ---- */

static int add_checkpoint(struct lbdump *d, struct qlb_error *err)
{
    struct qlb_checkpoint checkpoint = {
        .uuid = d->archive.header.uuid,
        .time = d->archive.header.time,
        .virtual_size = d->archive.header.virtual_size,
    };

    snprintf(checkpoint.label, sizeof(checkpoint.label), "%s",
             d->request.label);
    memcpy(checkpoint.root, d->archive.root, sizeof(checkpoint.root));
    /* What is not trusted now never will be again. */
    return qlb_image_add_checkpoint(d->image, &checkpoint, true, err);
}

/* The trailer, the name, the confirmation: what makes the archive one. */
static int complete_archive(struct lbdump *d, struct qlb_error *err)
{
    const struct qlb_ext *ext;

    struct dump_archive *a = &d->archive;

    if (qlb_lbz_writer_finish(a->writer, &a->totals, err) < 0 ||
        qlb_outfile_commit(a->out, err) < 0) {
        return -1;
    }
    if (!d->record || !dump_archive_is_safe(&d->archive, &d->request)) {
        return 0;
    }
    ext = qlb_image_ext(d->image);
    if (qlb_image_confirm(d->image, ext->n_checkpoints - 1, err) < 0) {
        /* The archive is there and good: the checkpoint must stay. */
        return qlb_error_prefix(err, "the archive is complete, but its "
                                "checkpoint could not be confirmed");
    }
    d->archive.confirmed = true;
    return 0;
}

static int finish(struct lbdump *d, struct qlb_error *err)
{
    struct qlb_error undo_err;

    if (qlb_lbz_writer_seal(d->archive.writer, d->archive.root, err) < 0 ||
        qlb_outfile_sync(d->archive.out, err) < 0) {
        return -1;
    }
    if (tool_stop) {
        return qlb_fail(err, QLB_E_RUNTIME, "interrupted");
    }
    if (d->record && add_checkpoint(d, err) < 0) {
        return -1;
    }
    if (complete_archive(d, err) == 0) {
        return 0;
    }
    if (d->record && !qlb_outfile_is_committed(d->archive.out) &&
        qlb_image_undo_add(d->image, &undo_err) < 0) {
        tool_fail(d->path, &undo_err);
    }
    return -1;
}

static int open_output(struct lbdump *d, struct qlb_error *err)
{
    struct stat st;

    if (dump_archive_stat(&d->archive, &st) &&
        qlb_disk_has_file(d->disk, &st)) {
        return dump_archive_is_disk(&d->archive, err);
    }
    return dump_archive_open(&d->archive, &d->request, err);
}

static int dump_disk(struct lbdump *d, struct qlb_error *err)
{
    struct dump_source source;
    struct dump_ranges ranges;

    if ((d->request.mode == DUMP_OVERLAY ? open_overlay(d, err)
                                 : open_image(d, err)) < 0 ||
        decide(d, err) < 0) {
        return -1;
    }
    /* A missing backing file: the trust rules have had their say before. */
    if (d->disk == NULL) {
        *err = *qlb_image_disk_error(d->image);
        return -1;
    }
    /* What will keep the checkpoint out is told before hours of reading. */
    if (d->record && qlb_image_check_add(d->image, err) < 0) {
        return -1;
    }
    say_what_is_done(d);
    make_header(d);
    if (prepare_ranges(d, &ranges, err) < 0 || open_output(d, err) < 0) {
        return -1;
    }
    d->archive.writer = qlb_lbz_writer_new(d->archive.out, &d->archive.header,
                                           err);
    source = dump_source_disk(d->disk);
    if (d->archive.writer == NULL ||
        dump_run(&source, &ranges, d->incremental, &d->request.dump,
                 d->archive.writer, err) < 0) {
        return -1;
    }
    return finish(d, err);
}

/* ---- the summary ---- */

static int print_summary(const struct lbdump *d)
{
    return tool_print_json(dump_summary(d->path, &d->archive, d->record,
                                        d->reason),
                           d->archive.path == NULL);
}

static void note_unconfirmed(const struct lbdump *d)
{
    if (!d->request.quiet && d->record && !d->archive.confirmed) {
        dump_note_unconfirmed(d->path, &d->archive, "");
    }
}

static void release(struct lbdump *d)
{
    dump_archive_close(&d->archive);
    qlb_changes_free(d->changes);
    qlb_disk_reader_free(d->overlay_reader);
    qlb_image_close(d->image);
    qlb_image_close(d->backing);
    qlb_disk_close(d->overlay);
}

/* ---- options ---- */

static void set_mode(struct lbdump *d, enum dump_mode mode)
{
    if (d->request.mode != DUMP_FULL) {
        tool_usage("--incremental, --since, --auto and --overlay exclude each "
                   "other");
    }
    d->request.mode = mode;
}

static enum qlb_digest_type parse_digest(const char *name)
{
    if (strcmp(name, "xxh3") == 0) {
        return QLB_DIGEST_XXH3_128;
    }
    if (strcmp(name, "sha256") == 0) {
        return QLB_DIGEST_SHA256;
    }
    tool_usage("--digest: '%s' is neither xxh3 nor sha256", name);
}

static const char *parse_label(const char *label)
{
    if (!qlb_label_valid(label)) {
        tool_usage("--chain: '%s' is no label: 1 to %u of the characters "
                   "A-Z a-z 0-9 . _ -", label, QLB_LABEL_MAX);
    }
    return label;
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

static void parse_option(struct lbdump *d, int option)
{
    struct dump_options *dump = &d->request.dump;

    switch (option) {
    case OPT_INCREMENTAL:
        set_mode(d, DUMP_INCREMENTAL);
        break;
    case OPT_SINCE:
        set_mode(d, DUMP_SINCE);
        d->request.since = tool_parse_uuid(optarg, "--since");
        break;
    case OPT_AUTO:
        set_mode(d, DUMP_AUTO);
        break;
    case OPT_OVERLAY:
        set_mode(d, DUMP_OVERLAY);
        break;
    case OPT_CHAIN:
        d->request.label = parse_label(optarg);
        d->labelled = true;
        break;
    case OPT_COPY:
        d->copy = true;
        break;
    case OPT_TRUST_PIPE:
        d->request.trust_pipe = true;
        break;
    case 'o':
        d->archive.path = optarg;
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
        d->request.force = true;
        break;
    case OPT_LEVEL:
        dump->level = (int)tool_parse_number(optarg, "--level", 1, 19);
        break;
    case OPT_THREADS:
        dump->threads = tool_parse_number(optarg, "--threads", 1, 256);
        break;
    case OPT_DIGEST:
        dump->digest = parse_digest(optarg);
        break;
    case OPT_RATE_LIMIT:
        dump->rate.bytes_per_second = tool_parse_size(optarg, "--rate-limit");
        break;
    case OPT_PROGRESS:
        dump->progress = PROGRESS_ON;
        break;
    case 'q':
        d->request.quiet = true;
        break;
    case OPT_JSON:
        d->request.json = true;
        break;
    default:
        parse_nbd_option(d, option);
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
    if (d->copy || d->request.mode == DUMP_OVERLAY) {
        tool_usage("--qmp excludes %s", d->copy ? "--copy" : "--overlay");
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
    if (d->request.mode != DUMP_FULL) {
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

    if (d->request.mode != DUMP_FULL || d->interrupted) {
        tool_usage("--incremental, --since, --auto, --overlay and "
                   "--interrupted are not for NBD exports; --bitmap dumps "
                   "what has changed");
    }
    if (d->copy || d->request.trust_pipe) {
        tool_usage("%s is not for NBD exports, whose disk lbdump does not "
                   "write to", d->copy ? "--copy" : "--trust-pipe");
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

static void parse_options(struct lbdump *d, int argc, char **argv)
{
    int option;

    while ((option = tool_getopt(&tool, argc, argv)) != -1) {
        parse_option(d, option);
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
    d->path = argv[optind];
    if (d->path != NULL && nbddump_is_uri(d->path)) {
        check_nbd_options(d);
    } else if (d->nbd_option != NULL) {
        tool_usage("--%s is for NBD exports (nbd://HOST/EXPORT) alone",
                   d->nbd_option);
    }
    if (d->request.quiet) {
        d->request.dump.progress = PROGRESS_OFF;
    }
    if (d->archive.path == NULL && isatty(STDOUT_FILENO)) {
        tool_usage("an archive is not written to a terminal; redirect it, or "
                   "use -o FILE");
    }
}

static int dump_live(struct lbdump *d)
{
    int status = livedump(&d->live, &d->request);

    free(d->live.disks);
    free(d->live.outputs);
    return status;
}

static int dump_what_was_left(struct lbdump *d)
{
    struct interrupted_options left = {
        .disk = d->path,
        .orig = d->orig,
        .output = d->archive.path,
        .copy = d->copy,
    };
    int status = dump_interrupted(&left, &d->request);

    free(d->live.outputs);
    return status;
}

static int dump_export(struct lbdump *d)
{
    int status = nbddump(d->path, &d->nbd, &d->request, d->archive.path);

    free(d->live.outputs);
    return status;
}

int main(int argc, char **argv)
{
    struct lbdump d = {
        .nbd = { .parent_size = UINT64_MAX, .time = UINT64_MAX },
        .request = {
            .label = "main",
            .dump = {
                .level = 1,
                .threads = tool_default_threads(),
                .digest = QLB_DIGEST_XXH3_128,
            },
        },
    };
    double start = tool_clock();
    struct qlb_error err;
    int status = 0;

    tool_begin("lbdump");
    parse_options(&d, argc, argv);
    if (d.live.socket != NULL) {
        return dump_live(&d);
    }
    if (d.interrupted) {
        return dump_what_was_left(&d);
    }
    if (nbddump_is_uri(d.path)) {
        return dump_export(&d);
    }
    if (dump_disk(&d, &err) < 0) {
        status = tool_fail(dump_archive_is_named(&d.archive, &err)
                               ? NULL : d.path, &err);
        tool_discard_stdout(d.archive.path == NULL ? d.archive.out : NULL);
    } else {
        d.archive.seconds = tool_clock() - start;
        note_unconfirmed(&d);
        if (d.request.json && print_summary(&d) < 0) {
            status = QLB_E_RUNTIME;
        }
    }
    release(&d);
    free(d.live.outputs);
    return status;
}
