/* A backup of disks of a running QEMU.
 *
 * QEMU begins the backup of all disks at one point in time; then the disks are
 * dumped from images and origs, several at once; when all archives are whole
 * and synced, QEMU ends the backup and confirms the checkpoints.  If anything
 * fails it ends the backup as failed: the checkpoints stay unconfirmed, and no
 * archive appears.
 *
 * A thread of its own, the keeper, talks to QEMU meanwhile: it releases what
 * the archives have and asks how the backup is, which keeps the lease alive
 * also while the pipeline stands still, as behind a pipe that nobody reads.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "live_session.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

/* What the archive has is released when it is so much, or after a second. */
#define RELEASE_BYTES (UINT64_C(64) << 20)
/* How often QEMU is asked. The lease is 60 seconds. */
#define QUERY_SECONDS 5

/* ---- what QEMU says ---- */

static int odd_answer(const struct live_session *session, const char *command,
                      struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_RUNTIME, "%s: %s: the answer is not what it "
                    "should be", session->target, command);
}

static bool get_string(const json_t *object, const char *key, char **copy)
{
    const char *text = json_string_value(json_object_get(object, key));

    *copy = text == NULL ? NULL : strdup(text);
    return *copy != NULL;
}

static bool get_uuid(const json_t *object, const char *key,
                     struct qlb_uuid *uuid)
{
    const char *text = json_string_value(json_object_get(object, key));

    return text != NULL && qlb_uuid_parse(text, uuid);
}

/* ---- which disks ---- */

/* Whether query-named-block-nodes describes a disk with livebackup on that
 * QEMU may write to. */
static bool has_livebackup(const json_t *node)
{
    const json_t *specific = json_object_get(json_object_get(node, "image"),
                                             "format-specific");
    const char *driver = json_string_value(json_object_get(node, "drv"));

    return driver != NULL && strcmp(driver, "qcow2") == 0 &&
           !json_is_true(json_object_get(node, "ro")) &&
           json_object_get(json_object_get(specific, "data"),
                           "livebackup") != NULL;
}

int live_session_add(struct live_session *session, const char *name,
                     struct qlb_error *err)
{
    struct live_disk *disks = realloc(session->disks,
                                      (session->n_disks + 1) * sizeof(*disks));

    if (disks == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", name);
    }
    session->disks = disks;
    disks += session->n_disks;
    memset(disks, 0, sizeof(*disks));
    disks->session = session;
    disks->mode = session->request->mode;
    disks->since = session->request->since;
    disks->name = strdup(name);
    if (disks->name == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", name);
    }
    session->n_disks++;
    return 0;
}

static int compare_names(const void *a, const void *b)
{
    const struct live_disk *x = a, *y = b;

    return strcmp(x->name, y->name);
}

int live_session_find(struct live_session *session, struct qlb_error *err)
{
    static const char command[] = "query-named-block-nodes";
    json_t *nodes = qmp_call(session->qmp, command,
                             json_pack("{s:b}", "flat", 1), err);
    json_t *node;
    size_t i;
    int ret = 0;

    if (nodes == NULL) {
        return -1;
    }
    json_array_foreach(nodes, i, node) {
        const char *name = json_string_value(json_object_get(node,
                                                             "node-name"));

        if (ret == 0 && name != NULL && has_livebackup(node)) {
            ret = live_session_add(session, name, err);
        }
    }
    json_decref(nodes);
    if (ret == 0 && session->n_disks == 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: no disk has livebackup on",
                        session->target);
    }
    if (session->n_disks > 0) {
        qsort(session->disks, session->n_disks, sizeof(*session->disks),
              compare_names);
    }
    return ret;
}

/* ---- beginning ---- */

static const char *const modes[] = {
    [DUMP_FULL] = "full",
    [DUMP_INCREMENTAL] = "incremental",
    [DUMP_SINCE] = "since",
    [DUMP_AUTO] = "auto",
};

static void set_since(json_t *object, const struct qlb_uuid *since)
{
    char text[QLB_UUID_TEXT];

    if (!qlb_uuid_is_zero(since)) {
        json_object_set_new(object, "since",
                            json_string(qlb_uuid_format(since, text)));
    }
}

/* What is asked for all disks is not said again for each. */
static json_t *disk_argument(const struct live_disk *disk)
{
    const struct dump_request *request = disk->session->request;
    json_t *argument = json_pack("{s:s}", "device", disk->name);

    if (disk->mode != request->mode ||
        !qlb_uuid_equal(&disk->since, &request->since)) {
        json_object_set_new(argument, "mode", json_string(modes[disk->mode]));
        set_since(argument, &disk->since);
    }
    return argument;
}

static json_t *begin_arguments(const struct live_session *session)
{
    const struct dump_request *request = session->request;
    json_t *disks = json_array();
    json_t *arguments;
    char text[QLB_UUID_TEXT];

    for (unsigned i = 0; i < session->n_disks; i++) {
        json_array_append_new(disks, disk_argument(&session->disks[i]));
    }
    arguments = json_pack("{s:s, s:o, s:s, s:s}", "job-id", session->job,
                          "disks", disks, "mode", modes[request->mode],
                          "label", request->label);
    set_since(arguments, &request->since);
    if (session->durable) {
        json_object_set_new(arguments, "durable", json_true());
    }
    if (!qlb_uuid_is_zero(&session->set)) {
        json_object_set_new(arguments, "set",
                            json_string(qlb_uuid_format(&session->set,
                                                        text)));
    }
    return arguments;
}

/* A disk without a parent is dumped in full. */
static bool take_disk(struct live_disk *disk, const json_t *info)
{
    bool full = json_object_get(info, "parent") == NULL;

    get_string(info, "full-reason", &disk->reason);
    disk->direct = json_is_true(json_object_get(info, "direct"));
    disk->unit = (uint64_t)json_integer_value(json_object_get(info, "unit"));
    disk->incremental = !full;
    return get_string(info, "filename", &disk->filename) &&
           get_string(info, "orig", &disk->orig) &&
           get_uuid(info, "checkpoint", &disk->checkpoint) &&
           disk->unit > 0 &&
           (full || get_uuid(info, "parent", &disk->parent)) &&
           (disk->mode == DUMP_AUTO || full == (disk->mode == DUMP_FULL));
}

static int call_begin(struct live_session *session, struct qlb_error *err)
{
    static const char command[] = "livebackup-begin";
    json_t *answer = qmp_call(session->qmp, command, begin_arguments(session),
                              err);
    const json_t *disks = json_object_get(answer, "disks");
    bool good;

    /* Where no answer came the backup may have begun all the same. */
    session->begun = answer != NULL || !qmp_was_answered(session->qmp);
    if (answer == NULL) {
        return -1;
    }
    session->time =
        (uint64_t)json_integer_value(json_object_get(answer, "time"));
    good = get_uuid(answer, "set", &session->set) &&
           json_array_size(disks) == session->n_disks;
    for (unsigned i = 0; good && i < session->n_disks; i++) {
        good = take_disk(&session->disks[i], json_array_get(disks, i));
    }
    json_decref(answer);
    return good ? 0 : odd_answer(session, command, err);
}

int live_session_begin(struct live_session *session, struct qlb_error *err)
{
    char uuid[QLB_UUID_TEXT];
    struct qlb_uuid random = tool_random_uuid();
    int ret;

    snprintf(session->job, sizeof(session->job), "lbdump-%s",
             qlb_uuid_format(&random, uuid));
    ret = call_begin(session, err);
    qmp_set_interruptible(session->qmp, false);
    return ret;
}

/* ---- ending ---- */

static bool is_safe(const struct live_disk *disk)
{
    return dump_archive_is_safe(&disk->archive, disk->session->request);
}

/* The checkpoints are confirmed for which a root is given. */
int live_session_end(struct live_session *session, bool success,
                     struct qlb_error *err)
{
    json_t *arguments = json_pack("{s:s, s:b}", "job-id", session->job,
                                  "success", success);
    json_t *roots = json_array(), *answer;

    for (unsigned i = 0; success && i < session->n_disks; i++) {
        struct live_disk *disk = &session->disks[i];
        char root[17];

        if (is_safe(disk)) {
            qlb_hex(disk->archive.root, 8, root);
            json_array_append_new(roots, json_pack("{s:s, s:s}", "device",
                                                   disk->name, "root", root));
        }
    }
    if (json_array_size(roots) > 0) {
        json_object_set(arguments, "roots", roots);
    }
    json_decref(roots);
    session->ended = true;
    answer = qmp_call(session->qmp, "livebackup-end", arguments, err);
    if (answer == NULL) {
        return -1;
    }
    json_decref(answer);
    for (unsigned i = 0; success && i < session->n_disks; i++) {
        session->disks[i].archive.confirmed = is_safe(&session->disks[i]);
    }
    return 0;
}

/* ---- the keeper ---- */

/* How far a disk can be released: whole units, below what the archive has. */
static uint64_t releasable(const struct live_disk *disk)
{
    uint64_t size = disk->archive.header.virtual_size;

    return disk->passed >= size ? size
                                : disk->passed - disk->passed % disk->unit;
}

static int release_range(struct live_session *session,
                         const struct live_disk *disk, uint64_t from,
                         uint64_t to, struct qlb_error *err)
{
    json_t *ranges = json_pack("[{s:I, s:I}]", "offset", (json_int_t)from,
                               "bytes", (json_int_t)(to - from));
    json_t *answer = qmp_call(session->qmp, "livebackup-release",
                              json_pack("{s:s, s:s, s:o}",
                                        "job-id", session->job,
                                        "device", disk->name,
                                        "ranges", ranges), err);

    json_decref(answer);
    return answer == NULL ? -1 : 0;
}

/* Lock held, released meanwhile. */
static int release_all(struct live_session *session, struct qlb_error *err)
{
    for (unsigned i = 0; i < session->n_disks; i++) {
        struct live_disk *disk = &session->disks[i];
        uint64_t from = disk->released, to = releasable(disk);
        int ret;

        if (to <= from) {
            continue;
        }
        pthread_mutex_unlock(&session->lock);
        ret = release_range(session, disk, from, to, err);
        pthread_mutex_lock(&session->lock);
        if (ret < 0) {
            return -1;
        }
        disk->released = to;
    }
    return 0;
}

static int judge(const struct live_session *session, const json_t *job,
                 struct qlb_error *err)
{
    const char *phase = json_string_value(json_object_get(job, "phase"));
    const char *reason = json_string_value(json_object_get(job, "reason"));

    if (job == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the backup was broken: QEMU "
                        "has ended it", session->target);
    }
    if (phase == NULL) {
        return odd_answer(session, "query-livebackup", err);
    }
    if (strcmp(phase, "running") != 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the backup was broken%s%s",
                        session->target, reason == NULL ? "" : ": ",
                        reason == NULL ? "" : reason);
    }
    return 0;
}

/* Whether the backup still is in order. */
static int ask(struct live_session *session, struct qlb_error *err)
{
    json_t *jobs = qmp_call(session->qmp, "query-livebackup", NULL, err);
    json_t *job, *found = NULL;
    size_t i;
    int ret;

    if (jobs == NULL) {
        return -1;
    }
    json_array_foreach(jobs, i, job) {
        const char *id = json_string_value(json_object_get(job, "job-id"));

        if (id != NULL && strcmp(id, session->job) == 0) {
            found = job;
        }
    }
    ret = judge(session, found, err);
    json_decref(jobs);
    return ret;
}

/* Until there is much to release, or a second has passed. Lock held. */
static void wait_a_while(struct live_session *session)
{
    struct timespec until;

    for (unsigned i = 0; i < session->n_disks; i++) {
        const struct live_disk *disk = &session->disks[i];

        if (releasable(disk) >= disk->released + RELEASE_BYTES) {
            return;
        }
    }
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec++;
    pthread_cond_timedwait(&session->changed, &session->lock, &until);
}

/* One round of the keeper. Lock held, released meanwhile. */
static int keep_once(struct live_session *session, double *asked,
                     struct qlb_error *err)
{
    int ret = 0;

    if (!tool_stop && release_all(session, err) < 0) {
        return -1;
    }
    pthread_mutex_unlock(&session->lock);
    if (tool_stop) {
        /* At once: who is stopped may stand behind a full pipe. */
        live_session_end(session, false, err);
        ret = qlb_fail(err, QLB_E_RUNTIME, "interrupted");
    } else if (tool_clock() - *asked >= QUERY_SECONDS) {
        ret = ask(session, err);
        *asked = tool_clock();
    }
    pthread_mutex_lock(&session->lock);
    return ret;
}

/* The first error counts; it makes the dumps stop. Lock held. */
static void note_failure(struct live_session *session,
                         struct live_disk *culprit,
                         const struct qlb_error *err)
{
    if (!session->failed) {
        session->failed = true;
        session->failure = *err;
        session->culprit = culprit;
    }
}

static void *keep(void *arg)
{
    struct live_session *session = arg;
    double asked = tool_clock();

    pthread_mutex_lock(&session->lock);
    while (!session->quit && !session->failed) {
        struct qlb_error err;

        wait_a_while(session);
        if (!session->quit && keep_once(session, &asked, &err) < 0) {
            note_failure(session,
                         session->n_disks == 1 ? session->disks : NULL, &err);
        }
    }
    pthread_mutex_unlock(&session->lock);
    return NULL;
}

static int start_keeper(struct live_session *session, struct qlb_error *err)
{
    int ret = pthread_create(&session->keeper, NULL, keep, session);

    if (ret != 0) {
        return qlb_fail_errno(err, ret, "starting a thread");
    }
    session->keeping = true;
    return 0;
}

/* Afterwards the connection is the caller's. */
static int stop_keeper(struct live_session *session, struct qlb_error *err)
{
    if (session->keeping) {
        pthread_mutex_lock(&session->lock);
        session->quit = true;
        pthread_cond_broadcast(&session->changed);
        pthread_mutex_unlock(&session->lock);
        pthread_join(session->keeper, NULL);
        session->keeping = false;
    }
    if (session->failed) {
        *err = session->failure;
        return -1;
    }
    return 0;
}

/* ---- one disk ---- */

static int passed(void *opaque, uint64_t end_offset, struct qlb_error *err)
{
    struct live_disk *disk = opaque;
    struct live_session *session = disk->session;
    int ret = 0;

    pthread_mutex_lock(&session->lock);
    disk->passed = end_offset;
    if (releasable(disk) >= disk->released + RELEASE_BYTES) {
        pthread_cond_broadcast(&session->changed);
    }
    if (session->failed) {
        *err = session->failure;
        ret = -1;
    }
    pthread_mutex_unlock(&session->lock);
    return ret;
}

/* Whether the orig is of what QEMU told of. */
static int check_parent(const struct live_disk *disk, struct qlb_error *err)
{
    const struct qlb_uuid *parent = qlb_live_parent(disk->source.live);

    if ((parent != NULL) == disk->incremental &&
        (parent == NULL || qlb_uuid_equal(parent, &disk->parent))) {
        return 0;
    }
    return qlb_fail(err, QLB_E_UNTRUSTED, "%s: holds the originals of another "
                    "backup", disk->orig);
}

static int open_disk(struct live_disk *disk, struct qlb_error *err)
{
    struct live_source *source = &disk->source;

    source->live = qlb_live_open(disk->filename, disk->orig,
                                 &disk->session->set, &disk->checkpoint,
                                 disk->direct ? QLB_LIVE_DIRECT : 0, err);
    source->passed = passed;
    source->opaque = disk;
    if (source->live == NULL || check_parent(disk, err) < 0) {
        return -1;
    }
    return live_source_prepare(source, &disk->archive, disk->session->request,
                               err);
}

/* ---- dumping all disks ---- */

/* The archive is whole afterwards, but has no name yet. */
static int dump_disk(void *opaque, unsigned i,
                     const struct dump_options *options,
                     struct qlb_error *err)
{
    struct live_session *session = opaque;
    struct live_disk *disk = &session->disks[i];

    if (live_source_dump(&disk->source, &disk->archive, options, err) == 0) {
        return 0;
    }
    pthread_mutex_lock(&session->lock);
    note_failure(session, disk, err);
    pthread_mutex_unlock(&session->lock);
    return -1;
}

static void expect(struct live_session *session)
{
    session->dump.expected = 0;
    for (unsigned i = 0; i < session->n_disks; i++) {
        const struct live_disk *disk = &session->disks[i];

        /* How much a full one will read is not known. */
        if (!disk->incremental) {
            session->dump.expected = 0;
            return;
        }
        session->dump.expected += disk->source.expected;
    }
}

/* ---- the session ---- */

/* Does one thing for each disk. */
static int for_each(struct live_session *session,
                    int (*function)(struct live_disk *disk,
                                    struct qlb_error *err),
                    struct qlb_error *err)
{
    for (unsigned i = 0; i < session->n_disks; i++) {
        if (function(&session->disks[i], err) < 0) {
            session->culprit = &session->disks[i];
            return -1;
        }
    }
    return 0;
}

static int commit(struct live_disk *disk, struct qlb_error *err)
{
    return qlb_outfile_commit(disk->archive.out, err);
}

/* QEMU may have gone, or the backup been broken, up to the last moment: then
 * what was read is not the set's. */
int live_session_dump(struct live_session *session, struct qlb_error *err)
{
    int ret;

    if (for_each(session, open_disk, err) < 0 ||
        start_keeper(session, err) < 0) {
        return -1;
    }
    expect(session);
    ret = dump_several(session->n_disks, &session->dump, dump_disk, session,
                       err);
    /* The first error counts, be it the keeper's. */
    if (stop_keeper(session, err) < 0 || ret < 0 || ask(session, err) < 0) {
        return -1;
    }
    return tool_stop ? qlb_fail(err, QLB_E_RUNTIME, "interrupted") : 0;
}

int live_session_commit(struct live_session *session, struct qlb_error *err)
{
    return for_each(session, commit, err);
}

/* Else the backup would go on in QEMU until the lease ends. */
static void give_up(struct live_session *session)
{
    struct qlb_error ignored;

    stop_keeper(session, &ignored);
    if (session->begun && !session->ended) {
        qmp_set_interruptible(session->qmp, false);
        live_session_end(session, false, &ignored);
    }
}

/* Messages that name another file are not prefixed with the disk's. */
int live_session_fail(struct live_session *session,
                      const struct qlb_error *err)
{
    const struct live_disk *disk;

    give_up(session);
    disk = session->culprit;
    if (disk == NULL || tool_names(err, disk->orig) ||
        tool_names(err, session->target) ||
        dump_archive_is_named(&disk->archive, err)) {
        return tool_fail(NULL, err);
    }
    return tool_fail(disk->filename, err);
}

/* The guest goes first: compression would take the processors that QEMU needs
 * to save originals and to answer. Nothing is lost if that is not allowed. */
static void be_nice(void)
{
    setpriority(PRIO_PROCESS, 0, 19);
}

void live_session_init(struct live_session *session)
{
    pthread_condattr_t attributes;

    be_nice();
    session->dump = session->request->dump;
    pthread_mutex_init(&session->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&session->changed, &attributes);
    pthread_condattr_destroy(&attributes);
}

void live_session_release(struct live_session *session)
{
    give_up(session);
    for (unsigned i = 0; i < session->n_disks; i++) {
        struct live_disk *disk = &session->disks[i];

        dump_archive_close(&disk->archive);
        live_source_close(&disk->source);
        free(disk->name);
        free(disk->output);
        free(disk->filename);
        free(disk->orig);
        free(disk->reason);
    }
    free(session->disks);
    qmp_close(session->qmp);
    pthread_cond_destroy(&session->changed);
    pthread_mutex_destroy(&session->lock);
}
