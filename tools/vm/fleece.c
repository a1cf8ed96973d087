/* Fleecing: a stock QEMU keeps a point in time of some disks readable over NBD.
 *
 * Names, for a backup whose scratch folder has the key X: overlay, export and
 * job of disk I "lbvm-X-I", its protocol node "lbvm-X-I-file", its exported
 * bitmap "lbvm-X-I", too, and "lbvm-X-I-mark", a disk of nothing.  In the folder
 * is "nbd", the server's socket.
 *
 * The order in the transaction matters.  A bitmap that is added records from
 * its own action on; a disk is drained from its backup action on until all is
 * done.  So new bitmaps come first, and have all changes since the point in
 * time, perhaps some from before; the copies of the older ones come last, when
 * nothing changes any more.
 *
 * A bitmap has its first and its last granule set from the start.  QEMU cuts
 * bitmaps when it shrinks a disk, and what is added when it grows is clean: one
 * that has lost these canaries does not tell what has changed.  They come from
 * a bitmap of the disk of nothing, which is written to.
 *
 * The folder is there, and locked, before QEMU has a node that names it, and
 * these are there before the NBD server: so whoever finds one of ours finds out
 * whether its owner lives.  The folder goes last, and only when all else has.
 *
 * With a QEMU on another host there is no such folder.  What tells that the
 * owner lives is its connection to "lbvm-X-0-lease", an export of a disk of
 * nothing, which QEMU does not delete as long as it is used; that disk is the
 * first of all nodes to come and the last to go.  Overlays are files with a
 * name of their own for each image, "lbvm-HASH.overlay", which nobody can
 * delete over the monitor: they are emptied instead.  What a dead one has added
 * to a disk is told by the bitmaps of its "-mark" nodes, which have the new
 * ones' names.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/fleece.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "nbdlink.h"
#include "vm/nbd_way.h"
#include "vm/scratch.h"

#define PREFIX "lbvm-"
#define NODES "query-named-block-nodes"
#define GRANULARITY 65536
#define OVERLAY ".overlay"
enum { NAME_SIZE = 32 }; /* QEMU's limit for the names of nodes */
/* Of the lease. */
#define LEASE_SIZE 65536
/* Seconds for a server to let us in, and to see that a client has gone. */
enum { LEASE_PATIENCE = 30, GONE_PATIENCE = 2 };

struct fleece {
    struct qmp *qmp;
    const struct fleece_disk *disks;
    unsigned n;
    struct scratch *scratch;
    bool tried;        /* the transaction was sent */
    char key[SCRATCH_KEY + 1];

    /* of a QEMU on another host; without it there is a scratch */
    const struct nbd_way *way;
    const char *folder; /* for overlays, there */
    unsigned port;
    bool serves;
    struct nbdlink *lease;

    char **uris;       /* one for each disk */
    char (*names)[NAME_SIZE];
};

/* ---- small commands ---- */

/* Runs a command for its effect. */
static int run(struct qmp *qmp, const char *command, json_t *arguments,
               struct qlb_error *err)
{
    json_t *answer = qmp_call(qmp, command, arguments, err);

    json_decref(answer);
    return answer == NULL ? -1 : 0;
}

static const char *text_of(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));

    return text == NULL ? "" : text;
}

/* A name that fleecing gives, with what it ends with: "", "-file", "-mark". */
static bool is_named(const char *name, const char *end)
{
    const char *p = name + strlen(PREFIX);

    if (strncmp(name, PREFIX, strlen(PREFIX)) != 0 ||
        strspn(p, "0123456789abcdef") != SCRATCH_KEY ||
        p[SCRATCH_KEY] != '-') {
        return false;
    }
    p += SCRATCH_KEY + 1;
    return *p >= '0' && *p <= '9' &&
           strcmp(p + strspn(p, "0123456789"), end) == 0;
}

static bool ends_with(const char *text, const char *end)
{
    size_t len = strlen(text), end_len = strlen(end);

    return len >= end_len && strcmp(text + len - end_len, end) == 0;
}

static void pause_a_little(void)
{
    nanosleep(&(struct timespec) { .tv_nsec = 2000000 }, NULL);
}

/* The job of that name in the answer of query-jobs; NULL: there is none. */
static const json_t *find_job(const json_t *jobs, const char *id)
{
    const json_t *job;
    size_t i;

    json_array_foreach(jobs, i, job) {
        if (strcmp(text_of(job, "id"), id) == 0) {
            return job;
        }
    }
    return NULL;
}

/* Looks at a job; one that is over is dismissed. Its error, if it had one. */
static int poll_job(struct qmp *qmp, const char *id, bool *gone,
                    struct qlb_error *job_error, struct qlb_error *err)
{
    json_t *jobs = qmp_call(qmp, "query-jobs", NULL, err);
    const json_t *job = find_job(jobs, id);
    struct qlb_error ignored;

    if (jobs == NULL) {
        return -1;
    }
    *gone = job == NULL;
    if (strcmp(text_of(job, "status"), "concluded") == 0) {
        if (*text_of(job, "error") != '\0') {
            qlb_fail(job_error, QLB_E_RUNTIME, "QEMU: %s",
                     text_of(job, "error"));
        }
        run(qmp, "job-dismiss", json_pack("{s:s}", "id", id), &ignored);
    }
    json_decref(jobs);
    return 0;
}

/* Until the job is gone. Cancelled: what it ends with does not matter; and it is
 * told so again, since one that is about to end, or to begin, won't listen. */
static int end_job(struct qmp *qmp, const char *id, bool cancel,
                   struct qlb_error *err)
{
    double deadline = tool_clock() + QMP_PATIENCE;
    struct qlb_error job_error = { .code = 0 }, ignored;
    bool gone = false;

    for (;;) {
        if (cancel) {
            run(qmp, "job-cancel", json_pack("{s:s}", "id", id), &ignored);
        }
        if (poll_job(qmp, id, &gone, &job_error, err) < 0) {
            return -1;
        }
        if (gone) {
            break;
        }
        if (tool_clock() > deadline) {
            return qlb_fail(err, QLB_E_RUNTIME, "QEMU does not end its job "
                            "'%s'", id);
        }
        pause_a_little();
    }
    if (cancel || job_error.code == 0) {
        return 0;
    }
    *err = job_error;
    return -1;
}

/* ---- taking away ---- */

/* What is to go: all of one folder, or (NULL) of any. */
struct leftovers {
    struct qmp *qmp;
    const char *key;
    json_t *folders; /* of what was found, where that is wanted */
    json_t *note;    /* of a dead one: what else is to go */
    bool here;       /* the note is of a disk that this QEMU has */
};

static bool is_left(const struct leftovers *left, const char *name,
                    const char *end)
{
    return is_named(name, end) &&
           (left->key == NULL ||
            strncmp(name + strlen(PREFIX), left->key, SCRATCH_KEY) == 0);
}

/* Calls for each element of what a query returns. */
static int each(struct leftovers *left, const char *query, json_t *arguments,
                int (*function)(struct leftovers *left, const json_t *entry,
                                struct qlb_error *err),
                struct qlb_error *err)
{
    json_t *answer = qmp_call(left->qmp, query, arguments, err);
    const json_t *entry;
    size_t i;
    int ret = answer == NULL ? -1 : 0;

    json_array_foreach(answer, i, entry) {
        if (ret == 0) {
            ret = function(left, entry, err);
        }
    }
    json_decref(answer);
    return ret;
}

static int drop_export(struct leftovers *left, const json_t *entry,
                       struct qlb_error *err)
{
    const char *id = text_of(entry, "id");

    return is_left(left, id, "") || is_left(left, id, "-mark")
               ? run(left->qmp, "block-export-del",
                     json_pack("{s:s, s:s}", "id", id, "mode", "hard"), err)
               : 0;
}

static int drop_job(struct leftovers *left, const json_t *entry,
                    struct qlb_error *err)
{
    const char *id = text_of(entry, "id");

    return is_left(left, id, "") ? end_job(left->qmp, id, true, err) : 0;
}

static int drop_node(struct leftovers *left, const char *name,
                     struct qlb_error *err)
{
    return run(left->qmp, "blockdev-del",
               json_pack("{s:s}", "node-name", name), err);
}

static int drop_overlay(struct leftovers *left, const json_t *entry,
                        struct qlb_error *err)
{
    const char *name = text_of(entry, "node-name");

    return is_left(left, name, "") || is_left(left, name, "-mark")
               ? drop_node(left, name, err) : 0;
}

/* Makes the file, or empties it. job: a name that none has. */
static int create_file(struct qmp *qmp, const char *job, const char *path,
                       struct qlb_error *err)
{
    json_t *options = json_pack("{s:s, s:s, s:i}", "driver", "file",
                                "filename", path, "size", 0);

    if (run(qmp, "blockdev-create",
            json_pack("{s:s, s:o}", "job-id", job, "options", options),
            err) < 0) {
        return -1;
    }
    return end_job(qmp, job, false, err);
}

/* An overlay that has kept its name gives its space back, if it can be. */
static int drop_file(struct leftovers *left, const json_t *entry,
                     struct qlb_error *err)
{
    const char *name = text_of(entry, "node-name");
    const char *path = text_of(json_object_get(entry, "image"), "filename");
    char job[NAME_SIZE];
    struct qlb_error ignored;

    if (!is_left(left, name, "-file")) {
        return 0;
    }
    if (drop_node(left, name, err) < 0) {
        return -1;
    }
    if (ends_with(path, OVERLAY)) {
        snprintf(job, sizeof(job), "%.*s", (int)(strlen(name) - 5), name);
        create_file(left->qmp, job, path, &ignored);
    }
    return 0;
}

static int remove_bitmap(struct qmp *qmp, const char *node, const char *name,
                         struct qlb_error *err)
{
    return run(qmp, "block-dirty-bitmap-remove",
               json_pack("{s:s, s:s}", "node", node, "name", name), err);
}

static json_t *flat(void)
{
    return json_pack("{s:b}", "flat", 1);
}

/* Those that were exported; the others are persistent. */
static int drop_bitmaps(struct leftovers *left, const json_t *entry,
                        struct qlb_error *err)
{
    const json_t *bitmap;
    size_t i;

    json_array_foreach(json_object_get(entry, "dirty-bitmaps"), i, bitmap) {
        const char *name = text_of(bitmap, "name");

        if (is_left(left, name, "") &&
            !json_is_true(json_object_get(bitmap, "persistent")) &&
            remove_bitmap(left->qmp, text_of(entry, "node-name"), name,
                          err) < 0) {
            return -1;
        }
    }
    return 0;
}

/* A server whose socket is in our folder is ours. */
static int stop_server(struct qmp *qmp, const struct scratch *scratch,
                       struct qlb_error *err)
{
    return scratch != NULL && scratch_has_server(scratch, "nbd")
               ? run(qmp, "nbd-server-stop", NULL, err) : 0;
}

/* Each user of a node before the node; the protocol nodes, by which the folder
 * is found, last. */
static int take_away(struct leftovers *left, struct qlb_error *err)
{
    if (each(left, "query-block-exports", NULL, drop_export, err) < 0 ||
        each(left, "query-jobs", NULL, drop_job, err) < 0 ||
        each(left, NODES, flat(), drop_overlay, err) < 0 ||
        each(left, NODES, flat(), drop_bitmaps, err) < 0) {
        return -1;
    }
    return each(left, NODES, flat(), drop_file, err);
}

/* ---- what a dead one has left ---- */

/* From the file of an overlay to the folder. */
static int note_folder(struct leftovers *left, const json_t *node,
                       struct qlb_error *err)
{
    const char *name = text_of(node, "node-name");
    const char *file = text_of(json_object_get(node, "image"), "filename");
    const char *slash = strrchr(file, '/');
    char *folder;

    (void)err;
    if (is_named(name, "-file") && slash != NULL) {
        folder = strndup(file, (size_t)(slash - file));
        if (folder != NULL) {
            json_object_set_new(left->folders, folder, json_true());
        }
        free(folder);
    }
    return 0;
}

static bool is_noted(const struct leftovers *left, const char *key,
                     const char *value)
{
    const json_t *line;
    size_t i;

    json_array_foreach(left->note, i, line) {
        if (*value != '\0' && strcmp(text_of(line, key), value) == 0) {
            return true;
        }
    }
    return false;
}

static int look_for_disk(struct leftovers *left, const json_t *node,
                         struct qlb_error *err)
{
    (void)err;
    left->here = left->here ||
                 is_noted(left, "filename",
                          text_of(json_object_get(node, "image"),
                                  "filename"));
    return 0;
}

/* The bitmaps of a backup whose end nobody has seen. */
static int drop_noted(struct leftovers *left, const json_t *entry,
                      struct qlb_error *err)
{
    const json_t *bitmap;
    size_t i;

    json_array_foreach(json_object_get(entry, "dirty-bitmaps"), i, bitmap) {
        const char *name = text_of(bitmap, "name");

        if (is_noted(left, "bitmap", name) &&
            strncmp(name, PREFIX, strlen(PREFIX)) == 0 &&
            remove_bitmap(left->qmp, text_of(entry, "node-name"), name,
                          err) < 0) {
            return -1;
        }
    }
    return 0;
}

/* QEMU has no nodes of that folder; it goes with the server, and the bitmaps it
 * tells of. */
static int clear_folder(struct qmp *qmp, struct scratch *scratch,
                        struct qlb_error *err)
{
    struct leftovers left = { .qmp = qmp };
    int ret;

    left.note = scratch_note(scratch);
    ret = stop_server(qmp, scratch, err);
    if (ret == 0) {
        ret = each(&left, NODES, flat(), drop_noted, err);
    }
    json_decref(left.note);
    scratch_free(scratch, ret == 0);
    return ret;
}

/* Whoever made the folder may be alive. */
static int clear_owner(struct qmp *qmp, const char *folder,
                       struct qlb_error *err)
{
    struct leftovers left = { .qmp = qmp };
    bool alive;
    struct scratch *scratch = scratch_take_over(folder, &alive);

    if (alive) {
        return qlb_fail(err, QLB_E_BUSY, "another lbvm is backing up this "
                        "machine; try again when that has ended");
    }
    if (scratch == NULL) {
        return take_away(&left, err);
    }
    left.key = scratch_key(scratch);
    if (take_away(&left, err) < 0) {
        scratch_free(scratch, false);
        return -1;
    }
    return clear_folder(qmp, scratch, err);
}

/* ---- what one on another host has left ---- */

static void name_of(char name[NAME_SIZE], const char *key, const char *end)
{
    snprintf(name, NAME_SIZE, PREFIX "%s-0%s", key, end);
}

static int note_lease(struct leftovers *left, const json_t *node,
                      struct qlb_error *err)
{
    const char *name = text_of(node, "node-name");
    char key[SCRATCH_KEY + 1];

    (void)err;
    if (is_named(name, "-lease")) {
        snprintf(key, sizeof(key), "%.*s", SCRATCH_KEY,
                 name + strlen(PREFIX));
        json_object_set_new(left->folders, key, json_true());
    }
    return 0;
}

/* Deletes the export that its owner has a connection to, if there is none any
 * more. had: there was that export. */
static int end_lease(struct qmp *qmp, const char *name, bool *had,
                     struct qlb_error *err)
{
    double deadline = tool_clock() + GONE_PATIENCE;

    for (;;) {
        *had = run(qmp, "block-export-del",
                   json_pack("{s:s, s:s}", "id", name, "mode", "safe"),
                   err) == 0;
        if (*had || strstr(err->message, "is not found") != NULL) {
            return 0;
        }
        if (strstr(err->message, "still in use") == NULL) {
            return -1;
        }
        if (tool_clock() > deadline) {
            return qlb_fail(err, QLB_E_BUSY, "another lbvm is backing up this "
                            "machine over NBD; try again when that has "
                            "ended. (Where its host has died, QEMU's command "
                            "nbd-server-stop lets go of it.)");
        }
        nanosleep(&(struct timespec) { .tv_nsec = 50000000 }, NULL);
    }
}

static int note_mark(struct leftovers *left, const json_t *node,
                     struct qlb_error *err)
{
    const json_t *bitmap;
    size_t i;

    (void)err;
    json_array_foreach(json_object_get(node, "dirty-bitmaps"), i, bitmap) {
        if (is_left(left, text_of(node, "node-name"), "-mark")) {
            json_array_append_new(left->note,
                                  json_pack("{s:O}", "bitmap",
                                            json_object_get(bitmap,
                                                            "name")));
        }
    }
    return 0;
}

/* Stops a server that a dead one may have started: it had an export there, or
 * nobody has one. */
static int stop_server_of_lease(struct qmp *qmp, bool had,
                                struct qlb_error *err)
{
    json_t *exports = qmp_call(qmp, "query-block-exports", NULL, err);
    const json_t *export;
    bool used = false;
    size_t i;

    if (exports == NULL) {
        return -1;
    }
    json_array_foreach(exports, i, export) {
        used = used || strcmp(text_of(export, "type"), "nbd") == 0;
    }
    json_decref(exports);
    if (had || !used) {
        struct qlb_error ignored;

        /* it may not have come to starting it */
        run(qmp, "nbd-server-stop", NULL, &ignored);
    }
    return 0;
}

/* The lease's node last: by it the rest is found. */
static int clear_lease(struct qmp *qmp, const char *key,
                       struct qlb_error *err)
{
    struct leftovers left = { .qmp = qmp, .key = key };
    char lease[NAME_SIZE];
    bool had;
    int ret = -1;

    name_of(lease, key, "-lease");
    if (end_lease(qmp, lease, &had, err) < 0) {
        return -1;
    }
    left.note = json_array();
    if (each(&left, NODES, flat(), note_mark, err) == 0 &&
        each(&left, NODES, flat(), drop_noted, err) == 0 &&
        take_away(&left, err) == 0 &&
        stop_server_of_lease(qmp, had, err) == 0) {
        ret = drop_node(&left, lease, err);
    }
    json_decref(left.note);
    return ret;
}

/* ---- clearing all of it ---- */

static int clear_leases(struct qmp *qmp, struct qlb_error *err)
{
    struct leftovers left = { .qmp = qmp, .folders = json_object() };
    int ret = each(&left, NODES, flat(), note_lease, err);
    const char *key;
    json_t *value;

    json_object_foreach(left.folders, key, value) {
        ret = ret < 0 ? -1 : clear_lease(qmp, key, err);
    }
    json_decref(left.folders);
    return ret;
}

/* far: folders are those of another host, where an lbvm may be at work. */
static int clear_folders(struct qmp *qmp, bool far, struct qlb_error *err)
{
    struct leftovers left = { .qmp = qmp, .folders = json_object() };
    int ret = each(&left, NODES, flat(), note_folder, err);
    const char *folder;
    json_t *value;

    json_object_foreach(left.folders, folder, value) {
        if (ret == 0 && far) {
            ret = qlb_fail(err, QLB_E_BUSY, "QEMU has a backup of an lbvm on "
                           "its own host, in %s; if that has died, the next "
                           "one there clears it", folder);
        } else if (ret == 0) {
            ret = clear_owner(qmp, folder, err);
        }
    }
    json_decref(left.folders);
    return ret;
}

int fleece_clear(struct qmp *qmp, bool far, struct qlb_error *err)
{
    if (clear_leases(qmp, err) < 0 || clear_folders(qmp, far, err) < 0) {
        return qlb_error_prefix(err, "clearing what a backup has left");
    }
    return 0;
}

/* A folder whose QEMU is gone, too: of one of our disks? */
static int sweep_one(struct qmp *qmp, struct scratch *scratch, bool *changed,
                     struct qlb_error *err)
{
    struct leftovers left = { .qmp = qmp };

    left.note = scratch_note(scratch);
    if (each(&left, NODES, flat(), look_for_disk, err) < 0) {
        json_decref(left.note);
        scratch_free(scratch, false);
        return -1;
    }
    json_decref(left.note);
    if (!left.here) {
        scratch_free(scratch, false);
        return 0;
    }
    *changed = true;
    return clear_folder(qmp, scratch, err);
}

int fleece_sweep(struct qmp *qmp, const char *parent, bool *changed,
                 struct qlb_error *err)
{
    DIR *dir = opendir(parent);
    struct scratch *scratch;
    int ret = 0;

    *changed = false;
    while (dir != NULL && ret == 0 &&
           (scratch = scratch_next_dead(parent, dir)) != NULL) {
        ret = sweep_one(qmp, scratch, changed, err);
    }
    if (dir != NULL) {
        closedir(dir);
    }
    return ret < 0 ? qlb_error_prefix(err, "clearing what a backup has left")
                   : 0;
}

/* What is about to be made, for the one who comes after us. */
static json_t *note_of(const struct fleece_disk *disks, unsigned n)
{
    json_t *note = json_array();

    for (unsigned i = 0; i < n; i++) {
        json_array_append_new(note, json_pack("{s:s, s:s}", "filename",
                                              disks[i].filename, "bitmap",
                                              disks[i].bitmap == NULL
                                                  ? "" : disks[i].bitmap));
    }
    return note;
}

static void name_all(struct fleece *fleece, const char *key)
{
    snprintf(fleece->key, sizeof(fleece->key), "%.*s", SCRATCH_KEY, key);
    for (unsigned i = 0; i < fleece->n; i++) {
        snprintf(fleece->names[i], NAME_SIZE, PREFIX "%s-%u", fleece->key, i);
    }
}

static int make_scratch(struct fleece *fleece, const char *parent,
                        struct qlb_error *err)
{
    json_t *note = note_of(fleece->disks, fleece->n);

    fleece->scratch = scratch_make(parent, fleece->disks[0].filename, note,
                                   err);
    json_decref(note);
    if (fleece->scratch == NULL) {
        return -1;
    }
    name_all(fleece, scratch_key(fleece->scratch));
    return 0;
}

/* ---- overlays ---- */

static int format_overlay(struct fleece *fleece, unsigned i, const char *file,
                          struct qlb_error *err)
{
    const char *name = fleece->names[i];
    json_t *options = json_pack("{s:s, s:s, s:I}", "driver", "qcow2", "file",
                                file, "size",
                                (json_int_t)fleece->disks[i].size);

    if (run(fleece->qmp, "blockdev-create",
            json_pack("{s:s, s:o}", "job-id", name, "options", options),
            err) < 0) {
        return -1;
    }
    return end_job(fleece->qmp, name, false, err);
}

static int open_file(struct fleece *fleece, unsigned i, const char *path,
                     struct qlb_error *err)
{
    char node[NAME_SIZE + 8];

    snprintf(node, sizeof(node), "%s-file", fleece->names[i]);
    return run(fleece->qmp, "blockdev-add",
               json_pack("{s:s, s:s, s:s, s:s}", "driver", "file",
                         "node-name", node, "filename", path, "discard",
                         "unmap"), err);
}

/* Nobody needs the file's name once QEMU has it open. */
static int add_file(struct fleece *fleece, unsigned i, struct qlb_error *err)
{
    char file[16], *path;
    int ret;

    snprintf(file, sizeof(file), "%u", i);
    if (asprintf(&path, "%s/%s", scratch_path(fleece->scratch), file) < 0) {
        return qlb_fail_errno(err, ENOMEM, "%s", file);
    }
    ret = scratch_add_file(fleece->scratch, file, err);
    if (ret == 0) {
        ret = open_file(fleece, i, path, err);
    }
    scratch_unlink(fleece->scratch, file);
    free(path);
    return ret;
}

/* The same name each time: it can't be deleted. QEMU's lock on the file tells
 * whether another one has it. */
static int add_far_file(struct fleece *fleece, unsigned i,
                        struct qlb_error *err)
{
    const char *image = fleece->disks[i].filename;
    uint8_t digest[QLB_DIGEST_MAX];
    char hash[2 * 8 + 1], *path;
    int ret;

    qlb_digest(QLB_DIGEST_XXH3_128, image, strlen(image), digest);
    qlb_hex(digest, 8, hash);
    if (asprintf(&path, "%s/" PREFIX "%s" OVERLAY, fleece->folder, hash) < 0) {
        return qlb_fail_errno(err, ENOMEM, "%s", image);
    }
    ret = create_file(fleece->qmp, fleece->names[i], path, err);
    if (ret == 0) {
        ret = open_file(fleece, i, path, err);
    }
    if (ret < 0) {
        qlb_error_prefix(err, "%s", path);
    }
    free(path);
    return ret;
}

static int add_overlay(struct fleece *fleece, unsigned i,
                       struct qlb_error *err)
{
    const char *name = fleece->names[i];
    char file[NAME_SIZE + 8];

    snprintf(file, sizeof(file), "%s-file", name);
    if (format_overlay(fleece, i, file, err) < 0) {
        return -1;
    }
    return run(fleece->qmp, "blockdev-add",
               json_pack("{s:s, s:s, s:s, s:s, s:s}", "driver", "qcow2",
                         "node-name", name, "file", file, "backing",
                         fleece->disks[i].node, "discard", "unmap"), err);
}

/* ---- canaries ---- */

static char *uri_of(const struct fleece *fleece, const char *name,
                    struct qlb_error *err)
{
    char *uri;

    if (fleece->way != NULL) {
        uri = nbd_way_uri(fleece->way, fleece->port, name);
    } else if (asprintf(&uri, "nbd+unix:///%s?socket=%s/nbd", name,
                        scratch_path(fleece->scratch)) < 0) {
        uri = NULL;
    }
    if (uri == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", name);
    }
    return uri;
}

/* An export of the server; context: or NULL. */
static struct nbdlink *open_link(const struct fleece *fleece,
                                 const char *name, const char *context,
                                 struct qlb_error *err)
{
    const struct nbd_way *way = fleece->way;
    char *uri = uri_of(fleece, name, err);
    struct nbdlink *link;

    if (uri == NULL) {
        return NULL;
    }
    link = nbdlink_open(uri, context, way == NULL ? 0 : LEASE_PATIENCE, err);
    free(uri);
    if (link == NULL && way != NULL) {
        qlb_error_prefix(err, "%s:%u", way->host, fleece->port);
    }
    return link;
}

static int write_ends(const struct fleece *fleece, const char *name,
                      uint64_t size, struct qlb_error *err)
{
    static const uint8_t zeroes[512];
    struct nbdlink *link = open_link(fleece, name, NULL, err);
    int ret = -1;

    if (link != NULL &&
        nbdlink_write(link, zeroes, 0, sizeof(zeroes), err) == 0) {
        ret = nbdlink_write(link, zeroes, size - sizeof(zeroes),
                            sizeof(zeroes), err);
    }
    nbdlink_close(link);
    return ret;
}

static int add_mark(struct fleece *fleece, unsigned i, struct qlb_error *err)
{
    const struct fleece_disk *disk = &fleece->disks[i];
    char mark[NAME_SIZE + 8];

    if (disk->bitmap == NULL) {
        return 0;
    }
    snprintf(mark, sizeof(mark), "%s-mark", fleece->names[i]);
    if (run(fleece->qmp, "blockdev-add",
            json_pack("{s:s, s:s, s:I}", "driver", "null-co", "node-name",
                      mark, "size", (json_int_t)disk->size), err) < 0 ||
        run(fleece->qmp, "block-dirty-bitmap-add",
            json_pack("{s:s, s:s, s:i}", "node", mark, "name", disk->bitmap,
                      "granularity", GRANULARITY), err) < 0 ||
        run(fleece->qmp, "block-export-add",
            json_pack("{s:s, s:s, s:s, s:s, s:b}", "type", "nbd", "id", mark,
                      "node-name", mark, "name", mark, "writable", 1),
            err) < 0) {
        return -1;
    }
    return write_ends(fleece, mark, disk->size, err);
}

/* Whether the granule at offset is set in the exported bitmap. */
static int is_set(struct nbdlink *link, uint64_t offset, bool *set,
                  struct qlb_error *err)
{
    struct nbdlink_extents extents = { 0 };
    uint64_t left = nbdlink_size(link) - offset;
    int ret = nbdlink_status(link, offset,
                             left < GRANULARITY ? left : GRANULARITY,
                             &extents, err);

    *set = ret == 0 && extents.n > 0 && (extents.extents[0].flags & 1) != 0;
    nbdlink_extents_release(&extents);
    return ret;
}

int fleece_has_canaries(const struct fleece *fleece, unsigned i,
                        uint64_t size, bool *whole, struct qlb_error *err)
{
    uint64_t last = (size - 1) / GRANULARITY * GRANULARITY;
    struct nbdlink *link;
    char *context;
    bool first;
    int ret = -1;

    if (asprintf(&context, "qemu:dirty-bitmap:%s", fleece->names[i]) < 0) {
        return qlb_fail_errno(err, ENOMEM, "%s", fleece->names[i]);
    }
    link = open_link(fleece, fleece->names[i], context, err);
    free(context);
    if (link != NULL && (!nbdlink_has_context(link) ||
                         last >= nbdlink_size(link))) {
        *whole = false;
        ret = 0;
    } else if (link != NULL && is_set(link, 0, &first, err) == 0) {
        ret = is_set(link, last, whole, err);
        *whole = *whole && first;
    }
    nbdlink_close(link);
    return ret;
}

/* ---- the point in time ---- */

static void add_action(json_t *actions, const char *type, json_t *data)
{
    json_array_append_new(actions, json_pack("{s:s, s:o}", "type", type,
                                             "data", data));
}

static void add_new_bitmap(json_t *actions, const struct fleece_disk *disk,
                           const char *name)
{
    char mark[NAME_SIZE + 8];

    if (disk->bitmap == NULL) {
        return;
    }
    snprintf(mark, sizeof(mark), "%s-mark", name);
    add_action(actions, "block-dirty-bitmap-add",
               json_pack("{s:s, s:s, s:i, s:b}", "node", disk->node, "name",
                         disk->bitmap, "granularity", GRANULARITY,
                         "persistent", 1));
    add_action(actions, "block-dirty-bitmap-merge",
               json_pack("{s:s, s:s, s:[{s:s, s:s}]}", "node", disk->node,
                         "target", disk->bitmap, "bitmaps", "node", mark,
                         "name", disk->bitmap));
}

static void add_job(json_t *actions, const struct fleece_disk *disk,
                    const char *name)
{
    add_action(actions, "blockdev-backup",
               json_pack("{s:s, s:s, s:s, s:s}", "job-id", name, "device",
                         disk->node, "target", name, "sync", "none"));
}

static void add_copy(json_t *actions, const struct fleece_disk *disk,
                     const char *name)
{
    if (disk->changes == NULL) {
        return;
    }
    add_action(actions, "block-dirty-bitmap-add",
               json_pack("{s:s, s:s, s:i, s:b}", "node", disk->node, "name",
                         name, "granularity", GRANULARITY, "disabled", 1));
    add_action(actions, "block-dirty-bitmap-merge",
               json_pack("{s:s, s:s, s:[s]}", "node", disk->node, "target",
                         name, "bitmaps", disk->changes));
}

static int transact(struct fleece *fleece, uint64_t *now,
                    struct qlb_error *err)
{
    json_t *actions = json_array();

    for (unsigned i = 0; i < fleece->n; i++) {
        add_new_bitmap(actions, &fleece->disks[i], fleece->names[i]);
    }
    for (unsigned i = 0; i < fleece->n; i++) {
        add_job(actions, &fleece->disks[i], fleece->names[i]);
    }
    for (unsigned i = 0; i < fleece->n; i++) {
        add_copy(actions, &fleece->disks[i], fleece->names[i]);
    }
    fleece->tried = true;
    if (run(fleece->qmp, "transaction",
            json_pack("{s:o}", "actions", actions), err) < 0) {
        return -1;
    }
    *now = (uint64_t)time(NULL);
    return 0;
}

/* ---- the exports ---- */

/* What the error says where QEMU has one already. */
static int explain_server(struct qlb_error *err)
{
    if (strstr(err->message, "already running") != NULL) {
        return qlb_fail(err, QLB_E_BUSY, "QEMU's NBD server is used by "
                        "somebody else, as by a migration; try again "
                        "when that has ended");
    }
    return -1;
}

static int start_server(struct fleece *fleece, struct qlb_error *err)
{
    json_t *address;
    char *path;

    if (asprintf(&path, "%s/nbd", scratch_path(fleece->scratch)) < 0) {
        return qlb_fail_errno(err, ENOMEM, "nbd");
    }
    address = json_pack("{s:s, s:{s:s}}", "type", "unix", "data", "path",
                        path);
    free(path);
    return run(fleece->qmp, "nbd-server-start",
               json_pack("{s:o}", "addr", address), err) < 0
               ? explain_server(err) : 0;
}

/* That it listens is told by the node, which is there before. */
static int take_lease(struct fleece *fleece, struct qlb_error *err)
{
    char name[NAME_SIZE];

    name_of(name, fleece->key, "-lease");
    if (run(fleece->qmp, "blockdev-add",
            json_pack("{s:s, s:s, s:i}", "driver", "null-co", "node-name",
                      name, "size", LEASE_SIZE), err) < 0) {
        return -1;
    }
    if (nbd_way_serve(fleece->way, fleece->qmp, &fleece->port, err) < 0) {
        return explain_server(err);
    }
    fleece->serves = true;
    if (run(fleece->qmp, "block-export-add",
            json_pack("{s:s, s:s, s:s, s:s}", "type", "nbd", "id", name,
                      "node-name", name, "name", name), err) < 0) {
        return -1;
    }
    fleece->lease = open_link(fleece, name, NULL, err);
    return fleece->lease == NULL ? -1 : 0;
}

static int export(struct fleece *fleece, unsigned i, struct qlb_error *err)
{
    const char *name = fleece->names[i];
    json_t *arguments = json_pack("{s:s, s:s, s:s, s:s}", "type", "nbd", "id",
                                  name, "node-name", name, "name", name);

    if (fleece->disks[i].changes != NULL) {
        json_object_set_new(arguments, "bitmaps", json_pack("[s]", name));
    }
    fleece->uris[i] = uri_of(fleece, name, err);
    if (fleece->uris[i] == NULL) {
        json_decref(arguments);
        return -1;
    }
    return run(fleece->qmp, "block-export-add", arguments, err);
}

/* ---- from the beginning to the end ---- */

static int for_each_disk(struct fleece *fleece,
                         int (*function)(struct fleece *fleece, unsigned i,
                                         struct qlb_error *err),
                         struct qlb_error *err)
{
    for (unsigned i = 0; i < fleece->n; i++) {
        if (function(fleece, i, err) < 0) {
            return -1;
        }
    }
    return 0;
}

static int prepare_here(struct fleece *fleece, const char *scratch,
                        struct qlb_error *err)
{
    if (make_scratch(fleece, scratch, err) < 0 ||
        for_each_disk(fleece, add_file, err) < 0) {
        return -1;
    }
    return start_server(fleece, err);
}

static int prepare_far(struct fleece *fleece, const char *scratch,
                       struct qlb_error *err)
{
    struct qlb_uuid random = tool_random_uuid();
    char uuid[QLB_UUID_TEXT];

    name_all(fleece, qlb_uuid_format(&random, uuid));
    fleece->folder = scratch;
    if (take_lease(fleece, err) < 0) {
        return -1;
    }
    return for_each_disk(fleece, add_far_file, err);
}

static int begin(struct fleece *fleece, const char *scratch, uint64_t *now,
                 struct qlb_error *err)
{
    int ret = fleece->way != NULL ? prepare_far(fleece, scratch, err)
                                  : prepare_here(fleece, scratch, err);

    if (ret < 0 || for_each_disk(fleece, add_overlay, err) < 0 ||
        for_each_disk(fleece, add_mark, err) < 0 ||
        transact(fleece, now, err) < 0) {
        return -1;
    }
    return for_each_disk(fleece, export, err);
}

/* What was added at the point in time; an answer that was not waited for does
 * not tell whether it was. */
static void forget_bitmaps(struct fleece *fleece)
{
    struct qlb_error ignored;

    for (unsigned i = 0; fleece->tried && i < fleece->n; i++) {
        if (fleece->disks[i].bitmap != NULL) {
            remove_bitmap(fleece->qmp, fleece->disks[i].node,
                          fleece->disks[i].bitmap, &ignored);
        }
    }
}

static struct fleece *fleece_new(struct qmp *qmp,
                                 const struct fleece_disk *disks, unsigned n)
{
    struct fleece *fleece = calloc(1, sizeof(*fleece));

    if (fleece == NULL) {
        return NULL;
    }
    fleece->qmp = qmp;
    fleece->disks = disks;
    fleece->n = n;
    fleece->uris = calloc(n, sizeof(*fleece->uris));
    fleece->names = calloc(n, sizeof(*fleece->names));
    return fleece;
}

struct fleece *fleece_begin(struct qmp *qmp, const struct nbd_way *way,
                            const char *scratch,
                            const struct fleece_disk *disks, unsigned n,
                            uint64_t *time, struct qlb_error *err)
{
    struct fleece *fleece = fleece_new(qmp, disks, n);
    struct qlb_error ignored;

    if (fleece == NULL || fleece->uris == NULL || fleece->names == NULL) {
        qlb_fail_errno(err, ENOMEM, "beginning the backup");
        fleece_end(fleece, false, &ignored);
        return NULL;
    }
    fleece->way = way;
    if (begin(fleece, scratch, time, err) < 0) {
        fleece_end(fleece, false, &ignored);
        return NULL;
    }
    return fleece;
}

const char *fleece_uri(const struct fleece *fleece, unsigned i)
{
    return fleece->uris[i];
}

const char *fleece_bitmap(const struct fleece *fleece, unsigned i)
{
    return fleece->disks[i].changes == NULL ? NULL : fleece->names[i];
}

int fleece_check(struct fleece *fleece, struct qlb_error *err)
{
    json_t *jobs = qmp_call(fleece->qmp, "query-jobs", NULL, err);
    int ret = jobs == NULL ? -1 : 0;

    for (unsigned i = 0; ret == 0 && i < fleece->n; i++) {
        const json_t *job = find_job(jobs, fleece->names[i]);

        /* Whoever pauses a job does not stop its copying. */
        if (strcmp(text_of(job, "status"), "running") != 0 &&
            strcmp(text_of(job, "status"), "paused") != 0) {
            ret = qlb_fail(err, QLB_E_RUNTIME, "the backup was broken: QEMU "
                           "has ended its job%s%s",
                           *text_of(job, "error") == '\0' ? "" : ": ",
                           text_of(job, "error"));
        }
    }
    json_decref(jobs);
    return ret;
}

/* A QEMU (7.2, 10.0) that is told to stop its server while a client is amid the
 * TLS handshake stands still for ever, the guest with it. */
static void await_handshakes(const struct fleece *fleece)
{
    while (fleece->way->creds != NULL &&
           tool_clock() < nbdlink_unsure_until()) {
        nanosleep(&(struct timespec) { .tv_nsec = 50000000 }, NULL);
    }
}

/* All is tried, though QEMU may have gone; the first error is told. */
static int take_own_away(struct fleece *fleece, struct qlb_error *err)
{
    struct leftovers left = { .qmp = fleece->qmp, .key = fleece->key };
    struct qlb_error ignored;
    int ret = 0;

    if (fleece->serves) {
        await_handshakes(fleece);
        ret = run(fleece->qmp, "nbd-server-stop", NULL, err);
    } else {
        ret = stop_server(fleece->qmp, fleece->scratch, err);
    }
    return take_away(&left, ret < 0 ? &ignored : err) < 0 ? -1 : ret;
}

/* It was added as the first, and is the last to go: where something is left,
 * that is found by it. */
static int drop_lease(struct fleece *fleece, struct qlb_error *err)
{
    struct leftovers left = { .qmp = fleece->qmp };
    char name[NAME_SIZE];

    if (fleece->way == NULL) {
        return 0;
    }
    name_of(name, fleece->key, "-lease");
    return drop_node(&left, name, err);
}

int fleece_end(struct fleece *fleece, bool keep, struct qlb_error *err)
{
    int ret = 0;

    if (fleece == NULL) {
        return 0;
    }
    qmp_set_interruptible(fleece->qmp, false);
    if (fleece->key[0] != '\0') {
        ret = take_own_away(fleece, err);
    }
    if (!keep) {
        forget_bitmaps(fleece);
    }
    if (fleece->key[0] != '\0' && ret == 0) {
        ret = drop_lease(fleece, err);
    }
    nbdlink_close(fleece->lease);
    /* After a lost connection QEMU may still have all of it: the next one is
     * told by the folder. */
    scratch_free(fleece->scratch, ret == 0);
    for (unsigned i = 0; fleece->uris != NULL && i < fleece->n; i++) {
        free(fleece->uris[i]);
    }
    free(fleece->uris);
    free(fleece->names);
    free(fleece);
    return ret;
}
