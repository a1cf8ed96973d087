/* Dumping what an NBD server exports.
 *
 * A full dump reads all but what base:allocation calls zero.  An incremental
 * reads what a bitmap's meta context calls dirty.  A server may refuse to say
 * anything of blocks that are not in the bitmap (QEMU's copy-before-write does
 * so where it has one), and a connection asks for all of its contexts at once:
 * so the bitmap has a connection of its own, and base:allocation is asked for
 * dirty ranges only, through the others; where the server wants to have no
 * others, zeroes are found by reading.
 *
 * There are as many connections as threads if the server says that it allows
 * for many, and if they can be had; else threads share them.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "nbddump.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "nbdlink.h"

#define ALLOCATION "base:allocation"
#define STATE_ZERO 2u  /* of base:allocation */
#define STATE_DIRTY 1u /* of a bitmap */
#define BITMAP_PREFIX "qemu:dirty-bitmap:"
/* The largest disk that an archive can be of. */
#define SIZE_MAX_OF_ARCHIVE (UINT64_C(1) << 56)
/* Block status is asked for so much. */
#define WINDOW (UINT64_C(1) << 30)
/* QEMU's server allows for 100 by default, and has other clients. */
#define MAX_LINKS 16u
/* Seconds until a further connection is done without. qemu-nbd lets it wait
 * if it was told to serve one client. */
#define PATIENCE 5

/* What is known of a context, a window at a time. */
struct window {
    struct nbdlink *link; /* NULL: the server does not have it */
    struct nbdlink_extents extents;
    unsigned index;       /* offsets ascend: where the last one was found */
};

struct nbddump {
    const char *uri;
    const struct nbddump_options *options;
    const struct dump_request *request;
    struct nbdlink *links[1 + MAX_LINKS]; /* the bitmap's first, if any */
    unsigned n_links, n_readers;
    bool no_more;         /* further ones can't be had */
    struct window dirty;  /* with a bitmap */
    const struct dump_options *dump;
    struct dump_archive *archive;
};

/* One for each thread, and for the thread that looks for zeroes. */
struct reader {
    struct nbdlink *link;
    struct window allocation;
};

bool nbddump_is_uri(const char *operand)
{
    const char *p = operand;

    if (strncmp(p, "nbd", 3) != 0) {
        return false;
    }
    p += 3;
    p += *p == 's';
    if (*p == '+') {
        p += strcspn(p, ":/");
    }
    return strncmp(p, ":/", 2) == 0;
}

/* ---- block status ---- */

/* What the context says of offset, and until where. Limit: what lies behind
 * is not asked for. */
static int look_up(struct window *window, uint64_t offset, uint64_t limit,
                   uint64_t *end, uint32_t *flags, struct qlb_error *err)
{
    struct nbdlink_extents *e = &window->extents;

    if (offset < e->start || offset >= e->end) {
        uint64_t length = limit - offset < WINDOW ? limit - offset : WINDOW;

        if (nbdlink_status(window->link, offset, length, e, err) < 0) {
            return -1;
        }
        window->index = 0;
    }
    if (window->index > 0 && offset < e->extents[window->index - 1].end) {
        window->index = 0;
    }
    while (offset >= e->extents[window->index].end) {
        window->index++;
    }
    *end = e->extents[window->index].end;
    *flags = e->extents[window->index].flags;
    return 0;
}

/* ---- connections ---- */

static char *context_of(const char *bitmap, struct qlb_error *err)
{
    char *context;

    if (asprintf(&context, "%s%s", strchr(bitmap, ':') != NULL
                                       ? "" : BITMAP_PREFIX, bitmap) < 0) {
        qlb_fail_errno(err, ENOMEM, "%s", bitmap);
        return NULL;
    }
    return context;
}

static int connect_bitmap(struct nbddump *dump, struct qlb_error *err)
{
    char *context = context_of(dump->options->bitmap, err);
    int ret = 0;

    if (context == NULL) {
        return -1;
    }
    dump->links[0] = nbdlink_open(dump->uri, context, 0, err);
    if (dump->links[0] == NULL) {
        ret = -1;
    } else if (!nbdlink_has_context(dump->links[0])) {
        ret = qlb_fail(err, QLB_E_UNTRUSTED, "the server does not offer the "
                       "meta context %s for this export", context);
    }
    free(context);
    return ret;
}

static int connect_first(struct nbddump *dump, struct qlb_error *err)
{
    if (dump->options->bitmap != NULL) {
        if (connect_bitmap(dump, err) < 0) {
            return -1;
        }
        dump->dirty.link = dump->links[0];
    } else {
        dump->links[0] = nbdlink_open(dump->uri, ALLOCATION, 0, err);
        if (dump->links[0] == NULL) {
            return -1;
        }
    }
    dump->n_links = 1;
    dump->no_more = !nbdlink_is_multi(dump->links[0]);
    if (nbdlink_size(dump->links[0]) > SIZE_MAX_OF_ARCHIVE) {
        return qlb_fail(err, QLB_E_RUNTIME, "the export is larger than an "
                        "archive can hold");
    }
    return 0;
}

/* One that can't be had is done without, unless the server has another disk
 * there now. */
static int connect_further(struct nbddump *dump, struct qlb_error *err)
{
    struct nbdlink *link = nbdlink_open(dump->uri, ALLOCATION, PATIENCE, err);

    if (link == NULL) {
        dump->no_more = true;
        return tool_stop ? -1 : 0;
    }
    dump->links[dump->n_links++] = link;
    if (nbdlink_size(link) != nbdlink_size(dump->links[0])) {
        return qlb_fail(err, QLB_E_RUNTIME, "the size of the export has "
                        "changed");
    }
    return 0;
}

/* The connection of the n-th reader; the first one, which looks for zeroes,
 * shares that of the second. */
static struct nbdlink *choose_link(struct nbddump *dump, unsigned n,
                                   struct qlb_error *err)
{
    unsigned first = dump->options->bitmap != NULL ? 1 : 0;
    unsigned wanted = first + (n == 0 ? 0 : (n - 1) % MAX_LINKS);

    if (wanted >= dump->n_links && !dump->no_more &&
        connect_further(dump, err) < 0) {
        return NULL;
    }
    if (wanted < dump->n_links) {
        return dump->links[wanted];
    }
    return dump->n_links == first
               ? dump->links[0]
               : dump->links[first + wanted % (dump->n_links - first)];
}

/* ---- the source ---- */

/* One at a time, before the dump begins. */
static void *source_reader_new(void *opaque, struct qlb_error *err)
{
    struct nbddump *dump = opaque;
    struct reader *reader = calloc(1, sizeof(*reader));

    if (reader == NULL) {
        qlb_fail_errno(err, ENOMEM, "connecting");
        return NULL;
    }
    reader->link = choose_link(dump, dump->n_readers++, err);
    if (reader->link == NULL) {
        free(reader);
        return NULL;
    }
    if (reader->link != dump->dirty.link &&
        nbdlink_has_context(reader->link)) {
        reader->allocation.link = reader->link;
    }
    return reader;
}

static void source_reader_free(void *opaque)
{
    struct reader *reader = opaque;

    if (reader != NULL) {
        nbdlink_extents_release(&reader->allocation.extents);
        free(reader);
    }
}

static int source_extent(void *opaque, uint64_t offset, uint64_t length,
                         enum qlb_extent_type *type, uint64_t *run,
                         struct qlb_error *err)
{
    struct reader *reader = opaque;
    uint64_t end = offset + length;
    uint32_t flags = 0;

    if (reader->allocation.link != NULL &&
        look_up(&reader->allocation, offset, end, &end, &flags, err) < 0) {
        return -1;
    }
    *type = flags & STATE_ZERO ? QLB_EXTENT_ZERO : QLB_EXTENT_DATA;
    *run = end - offset < length ? end - offset : length;
    return 0;
}

static int source_read(void *opaque, void *buf, uint64_t offset,
                       uint64_t length, struct qlb_error *err)
{
    struct reader *reader = opaque;

    return nbdlink_read(reader->link, buf, offset, length, err);
}

static struct dump_source source_of(struct nbddump *dump)
{
    return (struct dump_source) {
        .size = dump->archive->header.virtual_size,
        .limit = UINT64_MAX,
        .reader_new = source_reader_new,
        .reader_free = source_reader_free,
        .extent = source_extent,
        .read = source_read,
        .opaque = dump,
    };
}

/* ---- ranges ---- */

static int next_dirty(struct nbddump *dump, uint64_t offset, uint64_t *start,
                      uint64_t *length, struct qlb_error *err)
{
    uint64_t size = dump->archive->header.virtual_size;

    *length = 0;
    while (offset < size && *length == 0) {
        uint64_t end;
        uint32_t flags;

        if (look_up(&dump->dirty, offset, size, &end, &flags, err) < 0) {
            return -1;
        }
        if (flags & ~STATE_DIRTY) {
            return qlb_fail(err, QLB_E_RUNTIME, "block status at offset "
                            "%" PRIu64 ": flags 0x%x, which no dirty bitmap "
                            "has", offset, flags);
        }
        if (flags & STATE_DIRTY) {
            *start = offset;
            *length = end - offset;
        }
        offset = end;
    }
    return 0;
}

/* The block that the parent's end is in is present where the disk has grown
 * since, and that of the disk's end where it was cut, or may have been. */
static int changed(void *opaque, uint64_t offset, uint64_t *start,
                   uint64_t *length, struct qlb_error *err)
{
    struct nbddump *dump = opaque;
    uint64_t size = dump->archive->header.virtual_size;
    uint64_t parent = dump->options->parent_size;

    if (next_dirty(dump, offset, start, length, err) < 0) {
        return -1;
    }
    if (parent < size && parent % QLB_LBZ_BLOCK != 0 && offset <= parent &&
        (*length == 0 || *start > parent)) {
        *start = parent;
        *length = 1;
    }
    if (*length == 0) {
        dump_cut_range(size, parent, offset, start, length);
    }
    return 0;
}

/* ---- the archive ---- */

static struct qlb_uuid or_random(const struct qlb_uuid *uuid)
{
    return qlb_uuid_is_zero(uuid) ? tool_random_uuid() : *uuid;
}

static void make_header(struct nbddump *dump)
{
    const struct nbddump_options *options = dump->options;
    struct qlb_lbz_header *h = &dump->archive->header;

    dump_archive_begin(dump->archive, dump->request,
                       nbdlink_size(dump->links[0]));
    h->time = options->time != UINT64_MAX ? options->time
                                          : (uint64_t)time(NULL);
    h->uuid = or_random(&options->uuid);
    h->image_uuid = or_random(&options->image_uuid);
    h->set = options->set;
    h->incremental = options->bitmap != NULL;
    h->parent = options->parent;
    h->n_covered = options->n_covered;
    memcpy(dump->archive->covered, options->covered,
           options->n_covered * sizeof(options->covered[0]));
}

static int run(struct nbddump *dump, struct qlb_error *err)
{
    struct dump_archive *a = dump->archive;
    bool incremental = dump->options->bitmap != NULL;
    struct dump_ranges ranges = {
        .next = incremental ? changed : dump_whole_disk,
        .opaque = incremental ? (void *)dump : (void *)a,
    };
    struct dump_source source;

    if (connect_first(dump, err) < 0) {
        return -1;
    }
    make_header(dump);
    if (dump_archive_open(a, dump->request, err) < 0) {
        return -1;
    }
    a->writer = qlb_lbz_writer_new(a->out, &a->header, err);
    source = source_of(dump);
    if (a->writer == NULL ||
        dump_run(&source, &ranges, incremental, dump->dump, a->writer,
                 err) < 0 ||
        qlb_lbz_writer_seal(a->writer, a->root, err) < 0 ||
        qlb_lbz_writer_finish(a->writer, &a->totals, err) < 0 ||
        qlb_outfile_sync(a->out, err) < 0) {
        return -1;
    }
    if (tool_stop) {
        return qlb_fail(err, QLB_E_RUNTIME, "interrupted");
    }
    return qlb_outfile_commit(a->out, err);
}

static void release(struct nbddump *dump)
{
    for (unsigned i = 0; i < 1 + MAX_LINKS; i++) {
        nbdlink_close(dump->links[i]);
    }
    nbdlink_extents_release(&dump->dirty.extents);
}

int nbddump_to(struct dump_archive *archive, const char *uri,
               const struct nbddump_options *options,
               const struct dump_request *request,
               const struct dump_options *dump_options, struct qlb_error *err)
{
    struct nbddump dump = {
        .uri = uri,
        .options = options,
        .request = request,
        .dump = dump_options,
        .archive = archive,
    };
    double start = tool_clock();
    int ret = run(&dump, err);

    archive->seconds = tool_clock() - start;
    release(&dump);
    return ret;
}

int nbddump(const char *uri, const struct nbddump_options *options,
            const struct dump_request *request, const char *path)
{
    struct dump_archive archive = { .path = path };
    struct qlb_error err;
    int status = 0;

    if (nbddump_to(&archive, uri, options, request, &request->dump,
                   &err) < 0) {
        status = tool_fail(dump_archive_is_named(&archive, &err) ? NULL : uri,
                           &err);
        tool_discard_stdout(path == NULL ? archive.out : NULL);
    } else if (request->json &&
               tool_print_json(dump_summary(uri, &archive, false, ""),
                               path == NULL) < 0) {
        status = QLB_E_RUNTIME;
    }
    dump_archive_close(&archive);
    return status;
}
