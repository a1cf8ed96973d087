/* Dumping the disks of a running QEMU: what is said about it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "livedump.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "live_session.h"

/* ---- which disks, and where to ---- */

static int list_disks(struct live_session *session,
                      const struct livedump_options *options,
                      struct qlb_error *err)
{
    if (options->n_disks == 0) {
        return live_session_find(session, err);
    }
    for (unsigned i = 0; i < options->n_disks; i++) {
        if (live_session_add(session, options->disks[i], err) < 0) {
            return -1;
        }
    }
    return 0;
}

bool livedump_is_folder(const char *path)
{
    size_t len = strlen(path);

    return len > 0 && path[len - 1] == '/';
}

/* The path of the archive; NULL for standard output. */
static int name_output(struct live_disk *disk,
                       const struct livedump_options *options, unsigned i,
                       struct qlb_error *err)
{
    const char *first = options->n_outputs == 0 ? NULL : options->outputs[0];

    if (first == NULL) {
        return 0;
    }
    if (!livedump_is_folder(first)) {
        disk->output = strdup(options->outputs[i]);
    } else if (strchr(disk->name, '/') != NULL) {
        return qlb_fail(err, QLB_E_USAGE, "the archive of '%s' can't have its "
                        "name; use -o FILE", disk->name);
    } else {
        size_t room = strlen(first) + strlen(disk->name) + sizeof(".lbz");

        disk->output = malloc(room);
        if (disk->output != NULL) {
            snprintf(disk->output, room, "%s%s.lbz", first, disk->name);
        }
    }
    return disk->output == NULL
               ? qlb_fail_errno(err, ENOMEM, "%s", disk->name) : 0;
}

static int open_output(struct live_disk *disk,
                       const struct livedump_options *options, unsigned i,
                       struct qlb_error *err)
{
    if (name_output(disk, options, i, err) < 0) {
        return -1;
    }
    disk->archive.path = disk->output;
    return dump_archive_open(&disk->archive, disk->session->request, err);
}

/* Opened before the backup begins: what is wrong with them costs the guest
 * nothing then. */
static int open_outputs(struct live_session *session,
                        const struct livedump_options *options,
                        struct qlb_error *err)
{
    unsigned n = options->n_outputs;

    if (session->n_disks > 1 && n == 0) {
        return qlb_fail(err, QLB_E_USAGE, "%u disks have livebackup on, and "
                        "don't all go to standard output; use -o FOLDER/, or "
                        "--disk", session->n_disks);
    }
    if (n > 0 && !livedump_is_folder(options->outputs[0]) &&
        n != session->n_disks) {
        return qlb_fail(err, QLB_E_USAGE, "%u disks have livebackup on, but "
                        "-o names one file; use -o FOLDER/, or --disk",
                        session->n_disks);
    }
    for (unsigned i = 0; i < session->n_disks; i++) {
        if (open_output(&session->disks[i], options, i, err) < 0) {
            return -1;
        }
    }
    return 0;
}

/* ---- messages ---- */

static void say_what_is_done(const struct live_session *session)
{
    if (session->request->quiet || session->request->mode != DUMP_AUTO) {
        return;
    }
    for (unsigned i = 0; i < session->n_disks; i++) {
        const struct live_disk *disk = &session->disks[i];

        dump_say_auto(disk->name, disk->incremental,
                      disk->reason == NULL ? "" : disk->reason);
    }
}

static void note_unconfirmed(const struct live_session *session)
{
    for (unsigned i = 0; i < session->n_disks && !session->request->quiet;
         i++) {
        const struct live_disk *disk = &session->disks[i];

        if (!disk->archive.confirmed) {
            dump_note_unconfirmed(disk->filename, &disk->archive,
                                  ", and QEMU no longer has the disk open");
        }
    }
}

static json_t *summary_of(const struct live_disk *disk)
{
    json_t *summary = dump_summary(disk->filename, &disk->archive, true,
                                   disk->reason == NULL ? "" : disk->reason);

    json_object_set_new(summary, "device", json_string(disk->name));
    return summary;
}

static int print_summary(const struct live_session *session, bool to_stderr)
{
    json_t *disks = json_array();
    json_t *summary = json_object();

    for (unsigned i = 0; i < session->n_disks; i++) {
        json_array_append_new(disks, summary_of(&session->disks[i]));
    }
    json_object_set_new(summary, "set", tool_json_uuid(&session->set));
    json_object_set_new(summary, "time",
                        json_integer((json_int_t)session->time));
    json_object_set_new(summary, "disks", disks);
    return tool_print_json(summary, to_stderr);
}

/* ---- from the beginning to the end ---- */

static int begin(struct live_session *session, struct qlb_error *err)
{
    int ret = live_session_begin(session, err);

    if (ret < 0 && session->request->mode == DUMP_INCREMENTAL &&
        err->code == QLB_E_UNTRUSTED) {
        dump_hint_at_auto(err);
    }
    return ret;
}

static int end(struct live_session *session, struct qlb_error *err)
{
    if (live_session_end(session, true, err) < 0) {
        return qlb_error_prefix(err, session->n_disks == 1
                                ? "the archive is complete, but its "
                                  "checkpoint could not be confirmed"
                                : "the archives are complete, but their "
                                  "checkpoints could not be confirmed");
    }
    return 0;
}

/* Names appear when all archives are whole. */
static int run(struct live_session *session,
               const struct livedump_options *options, struct qlb_error *err)
{
    session->qmp = qmp_connect(options->socket, err);
    if (session->qmp == NULL || list_disks(session, options, err) < 0 ||
        open_outputs(session, options, err) < 0 || begin(session, err) < 0) {
        return -1;
    }
    say_what_is_done(session);
    if (live_session_dump(session, err) < 0 ||
        live_session_commit(session, err) < 0) {
        return -1;
    }
    return end(session, err);
}

int livedump(const struct livedump_options *options,
             const struct dump_request *request)
{
    struct live_session session = {
        .target = options->socket,
        .request = request,
    };
    struct qlb_error err;
    int status = 0;

    live_session_init(&session);
    if (run(&session, options, &err) < 0) {
        status = live_session_fail(&session, &err);
        if (options->n_outputs == 0 && session.n_disks == 1) {
            tool_discard_stdout(session.disks[0].archive.out);
        }
    } else {
        note_unconfirmed(&session);
        if (request->json && print_summary(&session,
                                           options->n_outputs == 0) < 0) {
            status = QLB_E_RUNTIME;
        }
    }
    live_session_release(&session);
    return status;
}
