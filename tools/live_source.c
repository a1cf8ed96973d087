/* A disk at the point in time of a backup, as the source of a dump.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "live_source.h"

#include <stdio.h>
#include <sys/stat.h>

static bool is_incremental(const struct live_source *source)
{
    return source->changes != NULL;
}

/* ---- preparing ---- */

static int find_parent(struct live_source *source,
                       const struct qlb_uuid *parent, struct qlb_error *err)
{
    struct qlb_image *image = qlb_live_image(source->live);
    unsigned until = qlb_live_checkpoint(source->live);
    int i = qlb_ext_find(qlb_image_ext(image), parent);

    if (i < 0 || (unsigned)i >= until) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "the image does not have the "
                        "checkpoint that the backup goes on from");
    }
    source->since = (unsigned)i;
    source->changes = qlb_image_changes_between(image, source->since, until,
                                                err);
    if (source->changes == NULL) {
        return -1;
    }
    return qlb_changes_bytes(source->changes, &source->expected, err);
}

static int check_output(const struct live_source *source,
                        const struct dump_archive *archive,
                        struct qlb_error *err)
{
    struct stat st;

    return dump_archive_stat(archive, &st) &&
                   qlb_live_has_file(source->live, &st)
               ? dump_archive_is_disk(archive, err) : 0;
}

static void make_header(const struct live_source *source,
                        struct dump_archive *archive,
                        const struct dump_request *request)
{
    const struct qlb_ext *ext = qlb_image_ext(qlb_live_image(source->live));
    unsigned index = qlb_live_checkpoint(source->live);
    const struct qlb_checkpoint *checkpoint = &ext->checkpoints[index];
    struct qlb_lbz_header *h = &archive->header;

    dump_archive_begin(archive, request,
                       qlb_disk_size(qlb_live_disk(source->live)));
    snprintf(h->label, sizeof(h->label), "%s", checkpoint->label);
    h->time = checkpoint->time;
    h->uuid = checkpoint->uuid;
    h->set = ext->set_uuid;
    h->image_uuid = ext->image_uuid;
    if (is_incremental(source)) {
        dump_archive_increment(archive, ext, source->since, index,
                               UINT64_MAX);
    }
}

int live_source_prepare(struct live_source *source,
                        struct dump_archive *archive,
                        const struct dump_request *request,
                        struct qlb_error *err)
{
    const struct qlb_uuid *parent = qlb_live_parent(source->live);

    if (check_output(source, archive, err) < 0 ||
        (parent != NULL && find_parent(source, parent, err) < 0)) {
        return -1;
    }
    make_header(source, archive, request);
    return 0;
}

/* ---- the source ---- */

static void *source_reader_new(void *opaque, struct qlb_error *err)
{
    const struct live_source *source = opaque;

    return qlb_live_reader_new(source->live, err);
}

static void source_reader_free(void *reader)
{
    qlb_live_reader_free(reader);
}

static int source_extent(void *reader, uint64_t offset, uint64_t length,
                         enum qlb_extent_type *type, uint64_t *run,
                         struct qlb_error *err)
{
    return qlb_live_extent(reader, offset, length, type, run, err);
}

static int source_read(void *reader, void *buf, uint64_t offset,
                       uint64_t length, struct qlb_error *err)
{
    return qlb_live_read(reader, buf, offset, length, err);
}

static int source_passed(void *opaque, uint64_t end, struct qlb_error *err)
{
    struct live_source *source = opaque;

    return source->passed == NULL ? 0
                                  : source->passed(source->opaque, end, err);
}

/* ---- ranges ---- */

struct changed_ranges {
    struct live_source *source;
    uint64_t size, parent_size; /* of the disk, in bytes */
};

static int changed(void *opaque, uint64_t offset, uint64_t *start,
                   uint64_t *length, struct qlb_error *err)
{
    const struct changed_ranges *ranges = opaque;

    if (qlb_changes_next(ranges->source->changes, offset, start, length,
                         err) < 0) {
        return -1;
    }
    if (*length == 0) {
        dump_cut_range(ranges->size, ranges->parent_size, offset, start,
                       length);
    }
    return 0;
}

/* ---- the dump ---- */

static int run(struct live_source *source, struct dump_archive *archive,
               const struct dump_options *options, struct qlb_error *err)
{
    const struct qlb_ext *ext = qlb_image_ext(qlb_live_image(source->live));
    struct dump_source dump = {
        .size = archive->header.virtual_size,
        .limit = qlb_live_content_limit(source->live),
        .reader_new = source_reader_new,
        .reader_free = source_reader_free,
        .extent = source_extent,
        .read = source_read,
        .passed = source_passed,
        .opaque = source,
    };
    struct changed_ranges some = {
        .source = source,
        .size = archive->header.virtual_size,
        .parent_size = ext->checkpoints[source->since].virtual_size,
    };
    struct dump_ranges ranges = { .next = dump_whole_disk, .opaque = archive };

    if (is_incremental(source)) {
        ranges = (struct dump_ranges) { .next = changed, .opaque = &some };
    }
    return dump_run(&dump, &ranges, is_incremental(source), options,
                    archive->writer, err);
}

int live_source_dump(struct live_source *source, struct dump_archive *archive,
                     const struct dump_options *options,
                     struct qlb_error *err)
{
    double start = tool_clock();

    archive->writer = qlb_lbz_writer_new(archive->out, &archive->header, err);
    if (archive->writer == NULL || run(source, archive, options, err) < 0 ||
        qlb_live_check(source->live, err) < 0 ||
        source_passed(source, archive->header.virtual_size, err) < 0 ||
        qlb_lbz_writer_seal(archive->writer, archive->root, err) < 0 ||
        qlb_lbz_writer_finish(archive->writer, &archive->totals, err) < 0 ||
        qlb_outfile_sync(archive->out, err) < 0) {
        return -1;
    }
    archive->seconds = tool_clock() - start;
    return 0;
}

void live_source_close(struct live_source *source)
{
    qlb_changes_free(source->changes);
    qlb_live_close(source->live);
}
