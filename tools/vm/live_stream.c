/* Has QEMU copy into its disks what they have from their backing files.
 *
 * The job of disk N is "lbvm-restore-N"; one that an lbvm which was killed has
 * begun is gone on with. A job does not end by itself: when all is copied, it
 * waits until QEMU's caches are in the image, that is read back to be all there,
 * and synced; then QEMU may take the backing file out of the header. QEMU itself
 * syncs nothing before: after a power loss the header could be the new one, and
 * the content not there.
 *
 * When it has ended, QEMU dismisses it by itself: one that waits to be dismissed
 * has a node without a child, and query-named-block-nodes kills QEMU 10.0 then.
 * So that we learn why one fails, it stops at an error, and we cancel it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/live_stream.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "vm/live_folder.h"

/* How often a flush may turn out not to have done it. */
enum { MAX_FLUSHES = 20 };

struct live_stream {
    const char *socket;
    struct live_stream_disk *disks;
    unsigned n;
    uint64_t rate;
    struct qmp *qmp;      /* NULL: not connected */
    unsigned *flushes;    /* of each disk */
    bool *begun;          /* of each disk: its job runs, with our speed */
    json_t *told;         /* the messages since QEMU was connected with */
};

static const char *text_of(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));

    return text == NULL ? "" : text;
}

static void tell_once(struct live_stream *stream, const char *text)
{
    if (json_object_get(stream->told, text) == NULL) {
        json_object_set_new(stream->told, text, json_true());
        tool_message("%s", text);
    }
}

static void job_name(char name[32], const struct live_stream_disk *disk)
{
    snprintf(name, 32, "lbvm-restore-%u", disk->number);
}

/* ---- the connection ---- */

struct live_stream *live_stream_new(const char *socket,
                                    struct live_stream_disk *disks,
                                    unsigned n, uint64_t rate)
{
    struct live_stream *stream = calloc(1, sizeof(*stream));

    if (stream == NULL) {
        return NULL;
    }
    stream->socket = socket;
    stream->disks = disks;
    stream->n = n;
    stream->rate = rate;
    stream->told = json_object();
    stream->flushes = calloc(n, sizeof(*stream->flushes));
    stream->begun = calloc(n, sizeof(*stream->begun));
    if (stream->flushes == NULL || stream->begun == NULL) {
        live_stream_free(stream);
        return NULL;
    }
    return stream;
}

static void disconnect(struct live_stream *stream)
{
    qmp_close(stream->qmp);
    stream->qmp = NULL;
    memset(stream->flushes, 0, stream->n * sizeof(*stream->flushes));
    memset(stream->begun, 0, stream->n * sizeof(*stream->begun));
}

void live_stream_free(struct live_stream *stream)
{
    if (stream != NULL) {
        qmp_close(stream->qmp);
        json_decref(stream->told);
        free(stream->flushes);
        free(stream->begun);
        free(stream);
    }
}

static bool connect_to(struct live_stream *stream)
{
    struct qlb_error err;
    struct stat st;

    if (stat(stream->socket, &st) < 0) {
        return false; /* nothing is started yet */
    }
    stream->qmp = qmp_connect(stream->socket, &err);
    if (stream->qmp == NULL && !tool_stop) {
        char text[1100];

        snprintf(text, sizeof(text), "%s; waiting for QEMU", err.message);
        tell_once(stream, text);
    } else if (stream->qmp != NULL) {
        json_object_clear(stream->told);
    }
    return stream->qmp != NULL;
}

/* False: the command has failed, and that was told where QEMU is still there;
 * it may be tried again. */
static bool call(struct live_stream *stream, const char *command,
                 json_t *arguments, json_t **answer)
{
    struct qlb_error err;
    json_t *result = qmp_call(stream->qmp, command, arguments, &err);

    if (result == NULL) {
        if (!tool_stop) {
            tell_once(stream, err.message);
        }
        if (!qmp_was_answered(stream->qmp)) {
            disconnect(stream);
        }
        return false;
    }
    if (answer != NULL) {
        *answer = result;
    } else {
        json_decref(result);
    }
    return true;
}

static bool call_job(struct live_stream *stream, const char *command,
                     const struct live_stream_disk *disk)
{
    char name[32];

    job_name(name, disk);
    return call(stream, command, json_pack("{s:s}", "id", name), NULL);
}

/* ---- the end of a job ---- */

static void give_up(struct live_stream_disk *disk, const char *why)
{
    tool_message("disk '%s': streaming has failed: %s; it is served on, and "
                 "can be tried again by another lbvm", disk->name, why);
    disk->failed = true;
}

static bool is_the_file(const json_t *node, const char *path)
{
    struct stat st, there;
    const char *name = text_of(json_object_get(node, "image"), "filename");

    return stat(path, &st) == 0 && *name == '/' && stat(name, &there) == 0 &&
           st.st_dev == there.st_dev && st.st_ino == there.st_ino;
}

/* A relative name is one for QEMU alone; but no two images have the same
 * backing file. */
static bool is_the_disk(const json_t *node, const struct live_stream_disk *disk)
{
    const json_t *image = json_object_get(node, "image");

    return strcmp(text_of(node, "drv"), "qcow2") == 0 &&
           (is_the_file(node, disk->path) ||
            strstr(text_of(image, "backing-filename"), disk->socket) != NULL);
}

/* The name of its node, for the caller to free; NULL: none, or no answer. */
static char *find_node(struct live_stream *stream,
                       const struct live_stream_disk *disk)
{
    json_t *nodes;
    const json_t *node;
    char *name = NULL;
    size_t i;

    if (!call(stream, "query-named-block-nodes",
              json_pack("{s:b}", "flat", 1), &nodes)) {
        return NULL;
    }
    json_array_foreach(nodes, i, node) {
        if (name == NULL && is_the_disk(node, disk)) {
            name = strdup(text_of(node, "node-name"));
        }
    }
    json_decref(nodes);
    return name;
}

/* QMP has no flush. What came of it is seen in the file. */
static bool flush(struct live_stream *stream,
                  const struct live_stream_disk *disk)
{
    char *node = find_node(stream, disk);
    char *line;
    bool done = false;

    if (node != NULL && asprintf(&line, "qemu-io %s flush", node) >= 0) {
        done = call(stream, "human-monitor-command",
                    json_pack("{s:s}", "command-line", line), NULL);
        free(line);
    }
    free(node);
    return done;
}

/* All is copied, and the guest still runs on image and backing file. */
static void finish(struct live_stream *stream, struct live_stream_disk *disk)
{
    struct qlb_error err;
    uint64_t offset;
    char why[1200];
    bool whole;

    if (!flush(stream, disk)) {
        return;
    }
    if (live_disk_prove(disk->path, disk->size, &whole, &offset, &err) < 0) {
        snprintf(why, sizeof(why), "%s", err.message);
    } else if (whole) {
        call_job(stream, "job-finalize", disk);
        return;
    } else if (++stream->flushes[disk - stream->disks] < MAX_FLUSHES) {
        return; /* once more, with the next step */
    } else {
        snprintf(why, sizeof(why), "QEMU says that all is copied, but what is "
                 "at %" PRIu64 " is not in %s", offset, disk->path);
    }
    if (call_job(stream, "job-cancel", disk)) {
        stream->begun[disk - stream->disks] = false;
        give_up(disk, why);
    }
}

/* The job that was there is no more. */
static void conclude(struct live_stream *stream, struct live_stream_disk *disk)
{
    enum live_disk_state state;
    struct qlb_error err;

    stream->begun[disk - stream->disks] = false;
    if (live_disk_look(disk->path, disk->socket, &state, &err) < 0) {
        give_up(disk, err.message);
    } else if (state != LIVE_DISK_WHOLE) {
        give_up(disk, "it was ended before all was copied");
    }
}

/* It is paused: by an error, or by somebody else. */
static void look_why(struct live_stream *stream, struct live_stream_disk *disk)
{
    const char *what = "ok";
    const json_t *job;
    json_t *jobs;
    char name[32];
    size_t i;

    job_name(name, disk);
    if (!call(stream, "query-block-jobs", NULL, &jobs)) {
        return;
    }
    json_array_foreach(jobs, i, job) {
        if (strcmp(text_of(job, "device"), name) == 0) {
            what = text_of(job, "io-status");
        }
    }
    if (strcmp(what, "ok") != 0 && call_job(stream, "job-cancel", disk)) {
        stream->begun[disk - stream->disks] = false;
        give_up(disk, strcmp(what, "nospace") == 0 ? "no space left"
                                                   : "an I/O error");
    }
    json_decref(jobs);
}

/* ---- jobs ---- */

static void begin(struct live_stream *stream, struct live_stream_disk *disk)
{
    char *node = find_node(stream, disk);
    char name[32], text[200];

    job_name(name, disk);
    if (node != NULL) {
        stream->begun[disk - stream->disks] =
            call(stream, "block-stream",
                 json_pack("{s:s, s:s, s:I, s:s, s:b}", "job-id", name,
                           "device", node, "speed",
                           (json_int_t)stream->rate, "on-error", "stop",
                           "auto-finalize", 0), NULL);
    } else if (stream->qmp != NULL) {
        snprintf(text, sizeof(text), "disk '%.100s': QEMU does not have it",
                 disk->name);
        tell_once(stream, text);
    }
    free(node);
}

/* One that another lbvm has begun, perhaps with another speed. */
static void adopt(struct live_stream *stream, struct live_stream_disk *disk)
{
    bool *begun = &stream->begun[disk - stream->disks];
    char name[32];

    job_name(name, disk);
    if (!*begun) {
        *begun = call(stream, "block-job-set-speed",
                        json_pack("{s:s, s:I}", "device", name, "speed",
                                  (json_int_t)stream->rate), NULL);
    }
}

static const json_t *find_job(const json_t *jobs,
                              const struct live_stream_disk *disk)
{
    const json_t *job;
    char name[32];
    size_t i;

    job_name(name, disk);
    json_array_foreach(jobs, i, job) {
        if (strcmp(text_of(job, "id"), name) == 0 &&
            strcmp(text_of(job, "type"), "stream") == 0) {
            return job;
        }
    }
    return NULL;
}

static void look_at(struct live_stream *stream, struct live_stream_disk *disk,
                    const json_t *job)
{
    const char *status = text_of(job, "status");

    if (job == NULL) {
        if (stream->begun[disk - stream->disks]) {
            conclude(stream, disk);
        } else if (!disk->failed) {
            begin(stream, disk);
        }
        return;
    }
    disk->done = (uint64_t)json_integer_value(
        json_object_get(job, "current-progress"));
    disk->total = (uint64_t)json_integer_value(
        json_object_get(job, "total-progress"));
    if (strcmp(status, "pending") == 0) {
        finish(stream, disk);
    } else if (strcmp(status, "paused") == 0) {
        look_why(stream, disk);
    } else if (strcmp(status, "running") == 0) {
        adopt(stream, disk);
    }
}

bool live_stream_step(struct live_stream *stream)
{
    bool busy = false;
    json_t *jobs;

    if ((stream->qmp == NULL && !connect_to(stream)) ||
        !call(stream, "query-jobs", NULL, &jobs)) {
        return false;
    }
    for (unsigned i = 0; i < stream->n && stream->qmp != NULL && !tool_stop;
         i++) {
        struct live_stream_disk *disk = &stream->disks[i];
        const json_t *job = find_job(jobs, disk);

        busy = busy || job != NULL;
        if (disk->wanted || job != NULL) {
            look_at(stream, disk, job);
        }
    }
    json_decref(jobs);
    return busy && stream->qmp != NULL;
}
