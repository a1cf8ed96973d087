/* Dumping the disks of a running QEMU.
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
#include "livedump.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "live_source.h"
#include "qmp.h"

/* What the archive has is released when it is so much, or after a second. */
#define RELEASE_BYTES (UINT64_C(64) << 20)
/* How often QEMU is asked. The lease is 60 seconds. */
#define QUERY_SECONDS 5

struct live_disk {
    struct live_set *set;
    char *name;          /* as QEMU calls it */
    char *output;        /* the archive's path; NULL: standard output */

    /* what QEMU told at the beginning */
    char *filename, *orig;
    struct qlb_uuid checkpoint, parent;
    uint64_t unit;
    bool direct;

    struct live_source source;
    struct dump_archive archive;

    /* bytes from the start; under the set's lock */
    uint64_t passed, released;
};

struct live_set {
    const struct livedump_options *options;
    const struct dump_request *request;
    struct live_disk *disks;
    unsigned n_disks;
    char job[64];
    bool incremental;
    char reason[512];   /* why --auto made a full one; or empty */
    struct qlb_uuid uuid;
    uint64_t time;

    /* The keeper's while it runs, else the main thread's. */
    struct qmp *qmp;
    bool begun, ended;

    pthread_t keeper;
    bool keeping;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool quit;          /* the keeper shall end */
    unsigned n_taken;   /* disks that are dumped, or were */
    bool failed;        /* the keeper or a dump has met an error */
    struct qlb_error failure;
    struct live_disk *culprit; /* whose error it is; or NULL */

    struct dump_options dump;  /* of each disk */
};

/* ---- what QEMU says ---- */

static int odd_answer(const struct live_set *set, const char *command,
                      struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_RUNTIME, "%s: %s: the answer is not what it "
                    "should be", set->options->socket, command);
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

/* ---- which disks, and where to ---- */

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

static int add_disk(struct live_set *set, const char *name,
                    struct qlb_error *err)
{
    struct live_disk *disks = realloc(set->disks,
                                      (set->n_disks + 1) * sizeof(*disks));

    if (disks == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", name);
    }
    set->disks = disks;
    disks += set->n_disks;
    memset(disks, 0, sizeof(*disks));
    disks->set = set;
    disks->name = strdup(name);
    if (disks->name == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", name);
    }
    set->n_disks++;
    return 0;
}

static int find_disks(struct live_set *set, struct qlb_error *err)
{
    static const char command[] = "query-named-block-nodes";
    json_t *nodes = qmp_call(set->qmp, command,
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
            ret = add_disk(set, name, err);
        }
    }
    json_decref(nodes);
    if (ret == 0 && set->n_disks == 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: no disk has livebackup on",
                        set->options->socket);
    }
    return ret;
}

static int list_disks(struct live_set *set, struct qlb_error *err)
{
    const struct livedump_options *options = set->options;

    if (options->n_disks == 0) {
        return find_disks(set, err);
    }
    for (unsigned i = 0; i < options->n_disks; i++) {
        if (add_disk(set, options->disks[i], err) < 0) {
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
static int name_output(struct live_disk *disk, unsigned i,
                       struct qlb_error *err)
{
    const struct livedump_options *options = disk->set->options;
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

static int open_output(struct live_disk *disk, unsigned i,
                       struct qlb_error *err)
{
    if (name_output(disk, i, err) < 0) {
        return -1;
    }
    disk->archive.path = disk->output;
    return dump_archive_open(&disk->archive, disk->set->request, err);
}

/* Opened before the backup begins: what is wrong with them costs the guest
 * nothing then. */
static int open_outputs(struct live_set *set, struct qlb_error *err)
{
    const struct livedump_options *options = set->options;
    unsigned n = options->n_outputs;

    if (set->n_disks > 1 && n == 0) {
        return qlb_fail(err, QLB_E_USAGE, "%u disks have livebackup on, and "
                        "don't all go to standard output; use -o FOLDER/, or "
                        "--disk", set->n_disks);
    }
    if (n > 0 && !livedump_is_folder(options->outputs[0]) &&
        n != set->n_disks) {
        return qlb_fail(err, QLB_E_USAGE, "%u disks have livebackup on, but "
                        "-o names one file; use -o FOLDER/, or --disk",
                        set->n_disks);
    }
    for (unsigned i = 0; i < set->n_disks; i++) {
        if (open_output(&set->disks[i], i, err) < 0) {
            return -1;
        }
    }
    return 0;
}

/* ---- beginning ---- */

static json_t *begin_arguments(const struct live_set *set, const char *mode)
{
    const struct dump_request *request = set->request;
    json_t *disks = json_array();
    json_t *arguments;
    char text[QLB_UUID_TEXT];

    for (unsigned i = 0; i < set->n_disks; i++) {
        json_array_append_new(disks, json_pack("{s:s}", "device",
                                               set->disks[i].name));
    }
    arguments = json_pack("{s:s, s:o, s:s, s:s}", "job-id", set->job, "disks",
                          disks, "mode", mode, "label", request->label);
    if (set->options->durable) {
        json_object_set_new(arguments, "durable", json_true());
    }
    if (request->mode == DUMP_SINCE) {
        json_object_set_new(arguments, "since",
                            json_string(qlb_uuid_format(&request->since,
                                                        text)));
    }
    return arguments;
}

static bool take_disk(struct live_disk *disk, const json_t *info)
{
    disk->direct = json_is_true(json_object_get(info, "direct"));
    disk->unit = (uint64_t)json_integer_value(json_object_get(info, "unit"));
    return get_string(info, "filename", &disk->filename) &&
           get_string(info, "orig", &disk->orig) &&
           get_uuid(info, "checkpoint", &disk->checkpoint) &&
           disk->unit > 0 &&
           (!disk->set->incremental ||
            get_uuid(info, "parent", &disk->parent));
}

static int call_begin(struct live_set *set, const char *mode,
                      struct qlb_error *err)
{
    static const char command[] = "livebackup-begin";
    json_t *answer = qmp_call(set->qmp, command, begin_arguments(set, mode),
                              err);
    const json_t *disks = json_object_get(answer, "disks");
    bool good;

    /* Where no answer came the backup may have begun all the same. */
    set->begun = answer != NULL || !qmp_was_answered(set->qmp);
    if (answer == NULL) {
        return -1;
    }
    set->incremental = strcmp(mode, "full") != 0;
    set->time = (uint64_t)json_integer_value(json_object_get(answer, "time"));
    good = get_uuid(answer, "set", &set->uuid) &&
           json_array_size(disks) == set->n_disks;
    for (unsigned i = 0; good && i < set->n_disks; i++) {
        good = take_disk(&set->disks[i], json_array_get(disks, i));
    }
    json_decref(answer);
    return good ? 0 : odd_answer(set, command, err);
}

static int begin(struct live_set *set, struct qlb_error *err)
{
    static const char *const modes[] = {
        [DUMP_FULL] = "full",
        [DUMP_INCREMENTAL] = "incremental",
        [DUMP_SINCE] = "since",
        [DUMP_AUTO] = "incremental",
    };
    enum dump_mode mode = set->request->mode;
    char uuid[QLB_UUID_TEXT];
    struct qlb_uuid random = tool_random_uuid();
    int ret;

    snprintf(set->job, sizeof(set->job), "lbdump-%s",
             qlb_uuid_format(&random, uuid));
    ret = call_begin(set, modes[mode], err);
    if (ret < 0 && mode == DUMP_AUTO && !set->begun) {
        /* If it was for another reason the full one is refused, too. */
        snprintf(set->reason, sizeof(set->reason), "%.500s", err->message);
        ret = call_begin(set, "full", err);
    }
    qmp_set_interruptible(set->qmp, false);
    if (ret < 0 && mode == DUMP_INCREMENTAL &&
        err->code == QLB_E_UNTRUSTED) {
        dump_hint_at_auto(err);
    }
    return ret;
}

/* ---- ending ---- */

static bool is_safe(const struct live_disk *disk)
{
    return dump_archive_is_safe(&disk->archive, disk->set->request);
}

/* The checkpoints are confirmed for which a root is given. */
static int end(struct live_set *set, bool success, struct qlb_error *err)
{
    json_t *arguments = json_pack("{s:s, s:b}", "job-id", set->job, "success",
                                  success);
    json_t *roots = json_array(), *answer;

    for (unsigned i = 0; success && i < set->n_disks; i++) {
        struct live_disk *disk = &set->disks[i];
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
    set->ended = true;
    answer = qmp_call(set->qmp, "livebackup-end", arguments, err);
    if (answer == NULL) {
        return -1;
    }
    json_decref(answer);
    for (unsigned i = 0; success && i < set->n_disks; i++) {
        set->disks[i].archive.confirmed = is_safe(&set->disks[i]);
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

static int release_range(struct live_set *set, const struct live_disk *disk,
                         uint64_t from, uint64_t to, struct qlb_error *err)
{
    json_t *ranges = json_pack("[{s:I, s:I}]", "offset", (json_int_t)from,
                               "bytes", (json_int_t)(to - from));
    json_t *answer = qmp_call(set->qmp, "livebackup-release",
                              json_pack("{s:s, s:s, s:o}", "job-id", set->job,
                                        "device", disk->name, "ranges",
                                        ranges), err);

    json_decref(answer);
    return answer == NULL ? -1 : 0;
}

/* Lock held, released meanwhile. */
static int release_all(struct live_set *set, struct qlb_error *err)
{
    for (unsigned i = 0; i < set->n_disks; i++) {
        struct live_disk *disk = &set->disks[i];
        uint64_t from = disk->released, to = releasable(disk);
        int ret;

        if (to <= from) {
            continue;
        }
        pthread_mutex_unlock(&set->lock);
        ret = release_range(set, disk, from, to, err);
        pthread_mutex_lock(&set->lock);
        if (ret < 0) {
            return -1;
        }
        disk->released = to;
    }
    return 0;
}

static int judge(const struct live_set *set, const json_t *job,
                 struct qlb_error *err)
{
    const char *phase = json_string_value(json_object_get(job, "phase"));
    const char *reason = json_string_value(json_object_get(job, "reason"));

    if (job == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the backup was broken: QEMU "
                        "has ended it", set->options->socket);
    }
    if (phase == NULL) {
        return odd_answer(set, "query-livebackup", err);
    }
    if (strcmp(phase, "running") != 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the backup was broken%s%s",
                        set->options->socket, reason == NULL ? "" : ": ",
                        reason == NULL ? "" : reason);
    }
    return 0;
}

/* Whether the backup still is in order. */
static int ask(struct live_set *set, struct qlb_error *err)
{
    json_t *jobs = qmp_call(set->qmp, "query-livebackup", NULL, err);
    json_t *job, *found = NULL;
    size_t i;
    int ret;

    if (jobs == NULL) {
        return -1;
    }
    json_array_foreach(jobs, i, job) {
        const char *id = json_string_value(json_object_get(job, "job-id"));

        if (id != NULL && strcmp(id, set->job) == 0) {
            found = job;
        }
    }
    ret = judge(set, found, err);
    json_decref(jobs);
    return ret;
}

/* Until there is much to release, or a second has passed. Lock held. */
static void wait_a_while(struct live_set *set)
{
    struct timespec until;

    for (unsigned i = 0; i < set->n_disks; i++) {
        const struct live_disk *disk = &set->disks[i];

        if (releasable(disk) >= disk->released + RELEASE_BYTES) {
            return;
        }
    }
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec++;
    pthread_cond_timedwait(&set->changed, &set->lock, &until);
}

/* One round of the keeper. Lock held, released meanwhile. */
static int keep_once(struct live_set *set, double *asked,
                     struct qlb_error *err)
{
    int ret = 0;

    if (!tool_stop && release_all(set, err) < 0) {
        return -1;
    }
    pthread_mutex_unlock(&set->lock);
    if (tool_stop) {
        /* At once: who is stopped may stand behind a full pipe. */
        end(set, false, err);
        ret = qlb_fail(err, QLB_E_RUNTIME, "interrupted");
    } else if (tool_clock() - *asked >= QUERY_SECONDS) {
        ret = ask(set, err);
        *asked = tool_clock();
    }
    pthread_mutex_lock(&set->lock);
    return ret;
}

/* The first error counts; it makes the dumps stop. Lock held. */
static void note_failure(struct live_set *set, struct live_disk *culprit,
                         const struct qlb_error *err)
{
    if (!set->failed) {
        set->failed = true;
        set->failure = *err;
        set->culprit = culprit;
    }
}

static void *keep(void *arg)
{
    struct live_set *set = arg;
    double asked = tool_clock();

    pthread_mutex_lock(&set->lock);
    while (!set->quit && !set->failed) {
        struct qlb_error err;

        wait_a_while(set);
        if (!set->quit && keep_once(set, &asked, &err) < 0) {
            note_failure(set, set->n_disks == 1 ? set->disks : NULL, &err);
        }
    }
    pthread_mutex_unlock(&set->lock);
    return NULL;
}

static int start_keeper(struct live_set *set, struct qlb_error *err)
{
    int ret = pthread_create(&set->keeper, NULL, keep, set);

    if (ret != 0) {
        return qlb_fail_errno(err, ret, "starting a thread");
    }
    set->keeping = true;
    return 0;
}

/* Afterwards the connection is the caller's. */
static int stop_keeper(struct live_set *set, struct qlb_error *err)
{
    if (set->keeping) {
        pthread_mutex_lock(&set->lock);
        set->quit = true;
        pthread_cond_broadcast(&set->changed);
        pthread_mutex_unlock(&set->lock);
        pthread_join(set->keeper, NULL);
        set->keeping = false;
    }
    if (set->failed) {
        *err = set->failure;
        return -1;
    }
    return 0;
}

/* ---- one disk ---- */

static int passed(void *opaque, uint64_t end_offset, struct qlb_error *err)
{
    struct live_disk *disk = opaque;
    struct live_set *set = disk->set;
    int ret = 0;

    pthread_mutex_lock(&set->lock);
    disk->passed = end_offset;
    if (releasable(disk) >= disk->released + RELEASE_BYTES) {
        pthread_cond_broadcast(&set->changed);
    }
    if (set->failed) {
        *err = set->failure;
        ret = -1;
    }
    pthread_mutex_unlock(&set->lock);
    return ret;
}

/* Whether the orig is of what QEMU told of. */
static int check_parent(const struct live_disk *disk, struct qlb_error *err)
{
    const struct qlb_uuid *parent = qlb_live_parent(disk->source.live);

    if ((parent != NULL) == disk->set->incremental &&
        (parent == NULL || qlb_uuid_equal(parent, &disk->parent))) {
        return 0;
    }
    return qlb_fail(err, QLB_E_UNTRUSTED, "%s: holds the originals of another "
                    "backup", disk->orig);
}

static int open_disk(struct live_disk *disk, struct qlb_error *err)
{
    struct live_source *source = &disk->source;

    source->live = qlb_live_open(disk->filename, disk->orig, &disk->set->uuid,
                                 &disk->checkpoint,
                                 disk->direct ? QLB_LIVE_DIRECT : 0, err);
    source->passed = passed;
    source->opaque = disk;
    if (source->live == NULL || check_parent(disk, err) < 0) {
        return -1;
    }
    return live_source_prepare(source, &disk->archive, disk->set->request,
                               err);
}

/* ---- dumping all disks ---- */

/* The next disk, as long as all is well. */
static struct live_disk *take_next(struct live_set *set)
{
    struct live_disk *disk = NULL;

    pthread_mutex_lock(&set->lock);
    if (!set->failed && set->n_taken < set->n_disks) {
        disk = &set->disks[set->n_taken++];
    }
    pthread_mutex_unlock(&set->lock);
    return disk;
}

/* Archives are whole afterwards, but have no names yet. */
static void *dump_disks(void *arg)
{
    struct live_set *set = arg;
    struct live_disk *disk;
    struct qlb_error err;

    while ((disk = take_next(set)) != NULL) {
        if (live_source_dump(&disk->source, &disk->archive, &set->dump,
                             &err) < 0) {
            pthread_mutex_lock(&set->lock);
            note_failure(set, disk, &err);
            pthread_mutex_unlock(&set->lock);
        }
    }
    return NULL;
}

/* As many disks at once as there are threads, which they share. */
static unsigned share_threads(struct live_set *set)
{
    unsigned threads = set->dump.threads;
    unsigned at_once = threads < set->n_disks ? threads : set->n_disks;

    set->dump.threads = threads / at_once;
    return at_once;
}

static void expect(struct live_set *set)
{
    set->dump.expected = 0;
    for (unsigned i = 0; set->incremental && i < set->n_disks; i++) {
        set->dump.expected += set->disks[i].source.expected;
    }
}

static int dump_all(struct live_set *set, struct qlb_error *err)
{
    unsigned at_once = share_threads(set), started = 0;
    pthread_t *threads = calloc(at_once, sizeof(*threads));
    struct dump_meter meter;

    if (threads == NULL) {
        return qlb_fail_errno(err, ENOMEM, "starting the dump");
    }
    expect(set);
    dump_meter_begin(&meter, &set->dump);
    set->dump.meter = &meter;
    /* This thread is one of them: fewer are slower, and no error. */
    while (started + 1 < at_once &&
           pthread_create(&threads[started], NULL, dump_disks, set) == 0) {
        started++;
    }
    dump_disks(set);
    while (started > 0) {
        pthread_join(threads[--started], NULL);
    }
    dump_meter_end(&meter);
    free(threads);
    return 0;
}

/* ---- the set ---- */

static void say_what_is_done(const struct live_set *set)
{
    if (set->request->quiet || set->request->mode != DUMP_AUTO) {
        return;
    }
    for (unsigned i = 0; i < set->n_disks; i++) {
        dump_say_auto(set->disks[i].name, set->incremental, set->reason);
    }
}

/* Does one thing for each disk. */
static int for_each(struct live_set *set,
                    int (*function)(struct live_disk *disk,
                                    struct qlb_error *err),
                    struct qlb_error *err)
{
    for (unsigned i = 0; i < set->n_disks; i++) {
        if (function(&set->disks[i], err) < 0) {
            set->culprit = &set->disks[i];
            return -1;
        }
    }
    return 0;
}

static int commit(struct live_disk *disk, struct qlb_error *err)
{
    return qlb_outfile_commit(disk->archive.out, err);
}

/* Names appear when all archives are whole. QEMU may have gone, or the backup
 * been broken, up to the last moment: then it is not the set's. */
static int run(struct live_set *set, struct qlb_error *err)
{
    set->qmp = qmp_connect(set->options->socket, err);
    if (set->qmp == NULL || list_disks(set, err) < 0 ||
        open_outputs(set, err) < 0 || begin(set, err) < 0) {
        return -1;
    }
    say_what_is_done(set);
    if (for_each(set, open_disk, err) < 0 ||
        start_keeper(set, err) < 0 ||
        dump_all(set, err) < 0 || stop_keeper(set, err) < 0 ||
        ask(set, err) < 0) {
        return -1;
    }
    if (tool_stop) {
        return qlb_fail(err, QLB_E_RUNTIME, "interrupted");
    }
    if (for_each(set, commit, err) < 0) {
        return -1;
    }
    if (end(set, true, err) < 0) {
        return qlb_error_prefix(err, set->n_disks == 1
                                ? "the archive is complete, but its "
                                  "checkpoint could not be confirmed"
                                : "the archives are complete, but their "
                                  "checkpoints could not be confirmed");
    }
    return 0;
}

/* Else the backup would go on in QEMU until the lease ends. */
static void give_up(struct live_set *set)
{
    struct qlb_error ignored;

    stop_keeper(set, &ignored);
    if (set->begun && !set->ended) {
        qmp_set_interruptible(set->qmp, false);
        end(set, false, &ignored);
    }
}

/* ---- messages ---- */

/* Messages that name another file are not prefixed with the disk's. */
static int report(const struct live_set *set, const struct qlb_error *err)
{
    const struct live_disk *disk = set->culprit;

    if (disk == NULL || tool_names(err, disk->orig) ||
        tool_names(err, set->options->socket) ||
        dump_archive_is_named(&disk->archive, err)) {
        return tool_fail(NULL, err);
    }
    return tool_fail(disk->filename, err);
}

static void note_unconfirmed(const struct live_set *set)
{
    for (unsigned i = 0; i < set->n_disks && !set->request->quiet; i++) {
        const struct live_disk *disk = &set->disks[i];

        if (!disk->archive.confirmed) {
            dump_note_unconfirmed(disk->filename, &disk->archive,
                                  ", and QEMU no longer has the disk open");
        }
    }
}

static json_t *summary_of(const struct live_disk *disk)
{
    json_t *summary = dump_summary(disk->filename, &disk->archive, true,
                                   disk->set->reason);

    json_object_set_new(summary, "device", json_string(disk->name));
    return summary;
}

static int print_summary(const struct live_set *set)
{
    json_t *disks = json_array();
    json_t *summary = json_object();

    for (unsigned i = 0; i < set->n_disks; i++) {
        json_array_append_new(disks, summary_of(&set->disks[i]));
    }
    json_object_set_new(summary, "set", tool_json_uuid(&set->uuid));
    json_object_set_new(summary, "time", json_integer((json_int_t)set->time));
    json_object_set_new(summary, "disks", disks);
    return tool_print_json(summary, set->options->n_outputs == 0);
}

static void release(struct live_set *set)
{
    for (unsigned i = 0; i < set->n_disks; i++) {
        struct live_disk *disk = &set->disks[i];

        dump_archive_close(&disk->archive);
        live_source_close(&disk->source);
        free(disk->name);
        free(disk->output);
        free(disk->filename);
        free(disk->orig);
    }
    free(set->disks);
    qmp_close(set->qmp);
    pthread_cond_destroy(&set->changed);
    pthread_mutex_destroy(&set->lock);
}

static void init_locks(struct live_set *set)
{
    pthread_condattr_t attributes;

    pthread_mutex_init(&set->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&set->changed, &attributes);
    pthread_condattr_destroy(&attributes);
}

/* The guest goes first: compression would take the processors that QEMU needs
 * to save originals and to answer. Nothing is lost if that is not allowed. */
static void be_nice(void)
{
    setpriority(PRIO_PROCESS, 0, 10);
}

int livedump(const struct livedump_options *options,
             const struct dump_request *request)
{
    struct live_set set = {
        .options = options,
        .request = request,
        .dump = request->dump,
    };
    struct qlb_error err;
    int status = 0;

    be_nice();
    init_locks(&set);
    if (run(&set, &err) < 0) {
        give_up(&set);
        status = report(&set, &err);
        if (options->n_outputs == 0 && set.n_disks == 1) {
            tool_discard_stdout(set.disks[0].archive.out);
        }
    } else {
        note_unconfirmed(&set);
        if (request->json && print_summary(&set) < 0) {
            status = QLB_E_RUNTIME;
        }
    }
    release(&set);
    return status;
}
