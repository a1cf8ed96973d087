/* Dumping an image that nobody has open.
 *
 * The order at the end is that of livebackup-extension.md, "Adding a
 * checkpoint for an offline dump": seal the archive, sync it, add the
 * checkpoint unconfirmed, make the archive whole and synced, confirm.  An
 * error in between takes the checkpoint away again.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "imagedump.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

/* ---- opening ---- */

static int open_image(struct imagedump *d, struct qlb_error *err)
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

static int open_overlay(struct imagedump *d, struct qlb_error *err)
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

static const struct qlb_image *tracked_image(const struct imagedump *d)
{
    return d->backing != NULL ? d->backing : d->image;
}

/* Index of the checkpoint to go on from, or -1 with QLB_E_UNTRUSTED. */
static int find_parent(struct imagedump *d, struct qlb_error *err)
{
    const struct qlb_image *image = tracked_image(d);
    const struct qlb_ext *ext = qlb_image_ext(image);
    enum qlb_trust trust = qlb_image_trust(image);
    char text[QLB_UUID_TEXT];
    int i;

    if (d->distrust != NULL) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s", d->distrust);
    }
    if (trust == QLB_TRUST_OFF) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "livebackup is off; turn it on "
                        "with 'lbctl enable'");
    }
    if (trust != QLB_TRUSTED || ext == NULL) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s (%s)",
                        qlb_trust_reason(trust), qlb_trust_keyword(trust));
    }
    if (d->request.mode == DUMP_SINCE ||
        !qlb_uuid_is_zero(&d->request.since)) {
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

static bool has_stock_bitmap(const struct imagedump *d)
{
    return d->bitmap != NULL && qlb_image_ext(d->image) == NULL;
}

/* From the bitmap of a stock QEMU, or in full. A bitmap that is damaged says no
 * more than one that is missing. */
static int decide_by_bitmap(struct imagedump *d, struct qlb_error *err)
{
    struct qlb_error why;

    d->changes = qlb_image_named_changes(d->image, d->bitmap, d->bitmap_size,
                                         &why);
    d->incremental = d->changes != NULL;
    if (d->incremental) {
        return 0;
    }
    if (why.code == QLB_E_RUNTIME) {
        *err = why;
        return -1;
    }
    snprintf(d->reason, sizeof(d->reason), "%.500s", why.message);
    return 0;
}

/* The chain is that of this disk: it can be compared. */
static int decide_by_rescan(struct imagedump *d, struct qlb_error *err)
{
    const struct qlb_lbz_header *header;

    if (rescan_open(&d->rescan, err) < 0) {
        return -1;
    }
    header = qlb_chain_header(d->rescan.chain);
    d->request.label = header->label;
    d->request.dump.digest = header->digest;
    return compare_check_identity(d->rescan.chain, qlb_image_ext(d->image),
                                  d->path, err);
}

/* As decide, where there is a chain to compare with. */
static int decide_with_chain(struct imagedump *d, struct qlb_error *err)
{
    struct qlb_error why;
    int parent;

    if (decide_by_rescan(d, err) < 0) {
        if (d->request.mode != DUMP_AUTO || err->code != QLB_E_UNTRUSTED) {
            return -1;
        }
        snprintf(d->reason, sizeof(d->reason), "%.500s", err->message);
        return 0;
    }
    d->incremental = true;
    if (d->request.mode == DUMP_AUTO) {
        parent = find_parent(d, &why);
        if (parent >= 0) {
            d->since_index = (unsigned)parent;
            return 0;
        }
        snprintf(d->reason, sizeof(d->reason), "%.500s", why.message);
    }
    d->rescanned = true;
    return 0;
}

/* The archives are the last resort, and nothing is lost where they are of no
 * use. */
static bool is_last_resort(const struct imagedump *d)
{
    return d->rescan.n_inputs > 0 && d->request.mode == DUMP_AUTO &&
           !qlb_uuid_is_zero(&d->request.since);
}

/* A full dump, since the archives can't be compared with; why the bitmaps don't
 * tell has been noted. */
static bool give_up_rescan(struct imagedump *d, const struct qlb_error *why)
{
    size_t used = strlen(d->reason);

    if (!is_last_resort(d) || (why->code != QLB_E_UNTRUSTED &&
                               why->code != QLB_E_DAMAGED)) {
        return false;
    }
    snprintf(d->reason + used, sizeof(d->reason) - used,
             "; and the disk can't be compared with its archives: %s",
             why->message);
    d->rescanned = d->incremental = false;
    return true;
}

static int decide_at_last(struct imagedump *d, struct qlb_error *err)
{
    if (d->rescan.n_inputs == 0) {
        return 0;
    }
    if (decide_by_rescan(d, err) < 0) {
        return give_up_rescan(d, err) ? 0 : -1;
    }
    d->rescanned = d->incremental = true;
    return 0;
}

static int decide(struct imagedump *d, struct qlb_error *err)
{
    int parent;

    if (d->request.mode == DUMP_FULL) {
        return 0;
    }
    if (d->rescan.n_inputs > 0 && !is_last_resort(d)) {
        return decide_with_chain(d, err);
    }
    if (has_stock_bitmap(d)) {
        return decide_by_bitmap(d, err);
    }
    parent = find_parent(d, err);
    if (parent >= 0) {
        d->incremental = true;
        d->since_index = (unsigned)parent;
        return 0;
    }
    if (d->request.mode == DUMP_AUTO) {
        snprintf(d->reason, sizeof(d->reason), "%.500s", err->message);
        return decide_at_last(d, err);
    }
    qlb_error_prefix(err, "%s: an incremental is not possible", d->path);
    if (d->request.mode == DUMP_INCREMENTAL) {
        dump_hint_at_auto(err);
    }
    return -1;
}

void imagedump_say(const struct imagedump *d)
{
    enum qlb_trust trust;

    if (d->request.quiet) {
        return;
    }
    if (d->request.mode == DUMP_AUTO) {
        if (d->rescanned) {
            tool_message("%s: incremental, by comparing the disk with its "
                         "archives: %s", d->path, d->reason);
        } else {
            dump_say_auto(d->path, d->incremental, d->reason);
        }
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

/* The state of the chain is the parent. Newer checkpoints of its label, of
 * which there may be archives, are not needed any more. */
static void follow_chain(struct imagedump *d, const struct qlb_ext *ext)
{
    struct qlb_lbz_header *h = &d->archive.header;
    int parent;

    h->incremental = true;
    h->parent = qlb_chain_header(d->rescan.chain)->uuid;
    parent = qlb_ext_find(ext, &h->parent);
    for (unsigned i = (unsigned)parent + 1;
         parent >= 0 && i < ext->n_checkpoints; i++) {
        if (strcmp(ext->checkpoints[i].label, h->label) == 0) {
            d->archive.covered[h->n_covered++] = ext->checkpoints[i].uuid;
        }
    }
}

static void make_header(struct imagedump *d)
{
    const struct qlb_image *image = tracked_image(d);
    const struct qlb_ext *ext = qlb_image_ext(image);
    struct qlb_lbz_header *h = &d->archive.header;

    dump_archive_begin(&d->archive, &d->request, qlb_disk_size(d->disk));
    h->time = d->time != 0 ? d->time : (uint64_t)time(NULL);
    h->set = d->set;
    h->uuid = tool_random_uuid();
    if (ext != NULL) {
        h->image_uuid = ext->image_uuid;
    } else {
        h->image_uuid = qlb_uuid_is_zero(&d->image_uuid) ? tool_random_uuid()
                                                         : d->image_uuid;
    }
    if (d->rescanned) {
        follow_chain(d, ext);
    } else if (d->incremental && has_stock_bitmap(d)) {
        h->incremental = true;
        h->parent = d->request.since;
    } else if (d->incremental) {
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
static int next_allocated(struct imagedump *d, uint64_t offset, uint64_t *start,
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
    struct imagedump *d = opaque;
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
    struct imagedump *d = opaque;
    const struct qlb_ext *ext = qlb_image_ext(tracked_image(d));

    if (changed(d, offset, start, length, err) < 0) {
        return -1;
    }
    if (*length == 0) {
        dump_cut_range(d->archive.header.virtual_size,
                       ext == NULL
                           ? d->bitmap_size
                           : ext->checkpoints[d->since_index].virtual_size,
                       offset, start, length);
    }
    return 0;
}

static int prepare_rescan(struct imagedump *d, struct dump_ranges *ranges,
                          struct qlb_error *err)
{
    struct compare_options options = {
        .threads = d->request.dump.threads,
        .progress = d->request.dump.progress,
    };

    ranges->opaque = &d->rescan;
    ranges->next = rescan_next;
    return rescan_run(&d->rescan, d->disk, d->path, &options, err);
}

static int prepare_ranges(struct imagedump *d, struct dump_ranges *ranges,
                          struct qlb_error *err)
{
    struct qlb_image *image = d->backing != NULL ? d->backing : d->image;

    ranges->opaque = &d->archive;
    ranges->next = dump_whole_disk;
    d->request.dump.expected = 0;
    if (!d->incremental) {
        return 0;
    }
    if (d->rescanned) {
        return prepare_rescan(d, ranges, err);
    }
    ranges->opaque = d;
    ranges->next = changed_and_cut;
    if (d->changes == NULL) {
        d->changes = qlb_image_changes(image, d->since_index, err);
    }
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

static int add_checkpoint(struct imagedump *d, struct qlb_error *err)
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

/* The trailer and the name: what makes the archive one. */
static int complete_archive(struct imagedump *d, struct qlb_error *err)
{
    struct dump_archive *a = &d->archive;

    if (qlb_lbz_writer_finish(a->writer, &a->totals, err) < 0) {
        return -1;
    }
    return qlb_outfile_commit(a->out, err);
}

int imagedump_finish(struct imagedump *d, struct qlb_error *err)
{
    struct qlb_error undo_err;

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

int imagedump_confirm(struct imagedump *d, struct qlb_error *err)
{
    if (!d->record || !dump_archive_is_safe(&d->archive, &d->request)) {
        return 0;
    }
    if (qlb_image_confirm(d->image,
                          qlb_image_ext(d->image)->n_checkpoints - 1,
                          err) < 0) {
        /* The archive is there and good: the checkpoint must stay. */
        return qlb_error_prefix(err, "the archive is complete, but its "
                                "checkpoint could not be confirmed");
    }
    d->archive.confirmed = true;
    return 0;
}

static int open_output(struct imagedump *d, struct qlb_error *err)
{
    struct stat st;

    if (dump_archive_stat(&d->archive, &st) &&
        qlb_disk_has_file(d->disk, &st)) {
        return dump_archive_is_disk(&d->archive, err);
    }
    if (dump_archive_stat(&d->archive, &st) &&
        rescan_has_file(&d->rescan, &st)) {
        return qlb_fail(err, QLB_E_USAGE, "%s: is one of the archives that "
                        "the dump goes on from", d->archive.path != NULL
                            ? d->archive.path : "standard output");
    }
    return dump_archive_open(&d->archive, &d->request, err);
}

int imagedump_open(struct imagedump *d, struct qlb_error *err)
{
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
    return d->record ? qlb_image_check_add(d->image, err) : 0;
}

/* Damage in an archive may be found only now. */
static int prepare(struct imagedump *d, struct dump_ranges *ranges,
                   struct qlb_error *err)
{
    int ret = prepare_ranges(d, ranges, err);

    if (ret < 0 && d->rescanned && rescan_is_named(&d->rescan, err) &&
        give_up_rescan(d, err)) {
        make_header(d);
        ret = prepare_ranges(d, ranges, err);
    }
    return ret;
}

int imagedump_dump(struct imagedump *d, struct qlb_error *err)
{
    struct dump_archive *a = &d->archive;
    struct dump_source source;
    struct dump_ranges ranges;

    make_header(d);
    /* The output first: a rescan takes hours. */
    if (open_output(d, err) < 0 || prepare(d, &ranges, err) < 0) {
        return -1;
    }
    a->writer = qlb_lbz_writer_new(a->out, &a->header, err);
    source = dump_source_disk(d->disk);
    if (a->writer == NULL ||
        dump_run(&source, &ranges, d->incremental, &d->request.dump,
                 a->writer, err) < 0 ||
        qlb_lbz_writer_seal(a->writer, a->root, err) < 0 ||
        qlb_outfile_sync(a->out, err) < 0) {
        return -1;
    }
    return tool_stop ? qlb_fail(err, QLB_E_RUNTIME, "interrupted") : 0;
}

void imagedump_close(struct imagedump *d)
{
    dump_archive_close(&d->archive);
    rescan_close(&d->rescan);
    qlb_changes_free(d->changes);
    qlb_disk_reader_free(d->overlay_reader);
    qlb_image_close(d->image);
    qlb_image_close(d->backing);
    qlb_disk_close(d->overlay);
}
