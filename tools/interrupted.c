/* Dumping what a killed QEMU left.
 *
 * Image and orig together still are the disk at the point in time, until the
 * image is opened for writing.  The dump is full or incremental as the backup
 * was.  When the archive is whole and safe the image is told so, as QEMU would
 * have done, and then the orig is deleted: killed in between, it is a leftover.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "interrupted.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "live_source.h"

struct interrupted {
    const struct interrupted_options *options;
    const struct dump_request *request;
    char *orig;
    struct live_source source;
    struct dump_archive archive;
};

static int open_source(struct interrupted *i, struct qlb_error *err)
{
    const struct interrupted_options *options = i->options;

    i->orig = options->orig != NULL ? strdup(options->orig)
                                    : qlb_live_default_orig(options->disk);
    if (i->orig == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", options->disk);
    }
    i->source.live = qlb_live_open_interrupted(options->disk, i->orig,
                                               !options->copy, err);
    return i->source.live == NULL ? -1 : 0;
}

static struct qlb_image *image_of(const struct interrupted *i)
{
    return qlb_live_image(i->source.live);
}

/* Durable backups outlive a power loss, but the tracking does not. */
static bool may_confirm(const struct interrupted *i)
{
    return !i->options->copy &&
           qlb_image_trust(image_of(i)) == QLB_TRUSTED;
}

static int settle(struct interrupted *i, struct qlb_error *err)
{
    if (!may_confirm(i) || !dump_archive_is_safe(&i->archive, i->request)) {
        return 0;
    }
    if (qlb_image_end_backup(image_of(i), qlb_live_checkpoint(i->source.live),
                             i->archive.root, err) < 0) {
        return qlb_error_prefix(err, "the archive is complete, but its "
                                "checkpoint could not be confirmed");
    }
    i->archive.confirmed = true;
    if (unlink(i->orig) < 0 && errno != ENOENT) {
        tool_message("%s: %s; it may be deleted", i->orig, strerror(errno));
    }
    return 0;
}

static int dump(struct interrupted *i, struct qlb_error *err)
{
    struct dump_options options = i->request->dump;

    options.expected = i->source.expected;
    return live_source_dump(&i->source, &i->archive, &options, err);
}

static int run(struct interrupted *i, struct qlb_error *err)
{
    struct dump_archive *a = &i->archive;

    a->path = i->options->output;
    if (open_source(i, err) < 0 ||
        live_source_prepare(&i->source, a, i->request, err) < 0 ||
        dump_archive_open(a, i->request, err) < 0 ||
        dump(i, err) < 0) {
        return -1;
    }
    if (tool_stop) {
        return qlb_fail(err, QLB_E_RUNTIME, "interrupted");
    }
    if (qlb_outfile_commit(a->out, err) < 0) {
        return -1;
    }
    return settle(i, err);
}

/* ---- messages ---- */

static void note_unconfirmed(const struct interrupted *i)
{
    enum qlb_trust trust = qlb_image_trust(image_of(i));

    if (i->request->quiet || i->options->copy || i->archive.confirmed) {
        return;
    }
    if (trust != QLB_TRUSTED) {
        tool_message("%s: no incremental can go on from this archive: %s (%s)",
                     i->options->disk, qlb_trust_reason(trust),
                     qlb_trust_keyword(trust));
    } else {
        dump_note_unconfirmed(i->options->disk, &i->archive, "");
    }
}

static int report(const struct interrupted *i, const struct qlb_error *err)
{
    return tool_fail(tool_names(err, i->orig) ||
                             dump_archive_is_named(&i->archive, err)
                         ? NULL : i->options->disk, err);
}

int dump_interrupted(const struct interrupted_options *options,
                     const struct dump_request *request)
{
    struct interrupted i = { .options = options, .request = request };
    struct qlb_error err;
    int status = 0;

    if (run(&i, &err) < 0) {
        status = report(&i, &err);
        tool_discard_stdout(options->output == NULL ? i.archive.out : NULL);
    } else {
        note_unconfirmed(&i);
        if (request->json &&
            tool_print_json(dump_summary(options->disk, &i.archive,
                                         !options->copy, ""),
                            options->output == NULL) < 0) {
            status = QLB_E_RUNTIME;
        }
    }
    dump_archive_close(&i.archive);
    live_source_close(&i.source);
    free(i.orig);
    return status;
}
