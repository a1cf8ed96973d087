/* Fleecing: a stock QEMU keeps a point in time of some disks readable over NBD.
 *
 * Names, for a backup whose random number is X: node and export and job of disk
 * I "lbvm-X-I", its protocol node "lbvm-X-I-file", its exported bitmap
 * "lbvm-X-I", too.  In the scratch folder ".lbvm-X": "lock", "nbd" (the server's
 * socket), and "I", the overlay.
 *
 * The order in the transaction matters.  A bitmap that is added records from
 * its own action on; a disk is drained from its backup action on until all is
 * done.  So new bitmaps come first, and have all changes since the point in
 * time, perhaps some from before; the copies of the older ones come last, when
 * nothing changes any more.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/fleece.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PREFIX "lbvm-"
#define NODES "query-named-block-nodes"
enum { NAME_SIZE = 32 }; /* QEMU's limit for the names of nodes */

struct fleece {
    struct qmp *qmp;
    const struct fleece_disk *disks;
    unsigned n;
    char key[9];       /* X */
    char *folder;
    int lock;
    bool server;       /* we have started it */
    bool begun;        /* the jobs run */
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

static bool is_ours(const char *name)
{
    return strncmp(name, PREFIX, strlen(PREFIX)) == 0;
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

/* Until the job is over, and gone. Its error, if it had one. */
static int wait_for_job(struct qmp *qmp, const char *id,
                        struct qlb_error *err)
{
    for (;;) {
        json_t *jobs = qmp_call(qmp, "query-jobs", NULL, err);
        const json_t *job = find_job(jobs, id);
        bool over = strcmp(text_of(job, "status"), "concluded") == 0;
        int ret = 0;

        if (over && *text_of(job, "error") != '\0') {
            ret = qlb_fail(err, QLB_E_RUNTIME, "QEMU: %s",
                           text_of(job, "error"));
        }
        if (jobs == NULL || job == NULL || over) {
            bool gone = jobs != NULL && job == NULL;
            struct qlb_error ignored;

            if (over) {
                run(qmp, "job-dismiss", json_pack("{s:s}", "id", id),
                    &ignored);
            }
            json_decref(jobs);
            return gone || over ? ret : -1;
        }
        json_decref(jobs);
        pause_a_little();
    }
}

static int cancel_job(struct qmp *qmp, const char *id, struct qlb_error *err)
{
    if (run(qmp, "job-cancel", json_pack("{s:s}", "id", id), err) < 0) {
        return -1;
    }
    return wait_for_job(qmp, id, err);
}

/* ---- what a dead one has left ---- */

struct leftovers {
    struct qmp *qmp;
    unsigned n;       /* found */
    char folder[4096]; /* of the overlays; "" */
};

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

/* A protocol node, below an overlay. */
static bool ends_with_file(const char *name)
{
    size_t len = strlen(name);

    return len > 5 && strcmp(name + len - 5, "-file") == 0;
}

/* From the file of an overlay to the folder. */
static int note_folder(struct leftovers *left, const json_t *node,
                       struct qlb_error *err)
{
    const char *name = text_of(node, "node-name");
    const char *file = text_of(json_object_get(node, "image"), "filename");
    const char *slash = strrchr(file, '/');

    if (is_ours(name) && ends_with_file(name) && slash != NULL &&
        (size_t)(slash - file) < sizeof(left->folder)) {
        memcpy(left->folder, file, (size_t)(slash - file));
        left->folder[slash - file] = '\0';
    }
    left->n += is_ours(name);
    return 0;
}

/* Whoever made the folder may be alive. */
static int check_owner(const struct leftovers *left, struct qlb_error *err)
{
    char path[sizeof(left->folder) + 8];
    int fd, ret = 0;

    snprintf(path, sizeof(path), "%s/lock", left->folder);
    fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) < 0) {
        ret = qlb_fail(err, QLB_E_BUSY, "another lbvm is backing up this "
                       "machine; try again when that has ended");
    }
    if (fd >= 0) {
        close(fd);
    }
    return ret;
}

static int drop_export(struct leftovers *left, const json_t *entry,
                       struct qlb_error *err)
{
    const char *id = text_of(entry, "id");

    if (!is_ours(id)) {
        return 0;
    }
    left->n++;
    return run(left->qmp, "block-export-del",
               json_pack("{s:s, s:s}", "id", id, "mode", "hard"), err);
}

static int drop_job(struct leftovers *left, const json_t *entry,
                    struct qlb_error *err)
{
    const char *id = text_of(entry, "id");
    bool over = strcmp(text_of(entry, "status"), "concluded") == 0;

    if (!is_ours(id)) {
        return 0;
    }
    left->n++;
    return over ? wait_for_job(left->qmp, id, err)
                : cancel_job(left->qmp, id, err);
}

static int drop_overlay(struct leftovers *left, const json_t *entry,
                        struct qlb_error *err)
{
    const char *name = text_of(entry, "node-name");

    return !is_ours(name) || ends_with_file(name)
               ? 0 : run(left->qmp, "blockdev-del",
                         json_pack("{s:s}", "node-name", name), err);
}

static int drop_file(struct leftovers *left, const json_t *entry,
                     struct qlb_error *err)
{
    const char *name = text_of(entry, "node-name");

    return !is_ours(name) || !ends_with_file(name)
               ? 0 : run(left->qmp, "blockdev-del",
                         json_pack("{s:s}", "node-name", name), err);
}

/* Those that were exported; the others are persistent. */
static int drop_bitmaps(struct leftovers *left, const json_t *entry,
                        struct qlb_error *err)
{
    const json_t *bitmap;
    size_t i;

    json_array_foreach(json_object_get(entry, "dirty-bitmaps"), i, bitmap) {
        const char *name = text_of(bitmap, "name");

        if (is_ours(name) &&
            !json_is_true(json_object_get(bitmap, "persistent")) &&
            run(left->qmp, "block-dirty-bitmap-remove",
                json_pack("{s:s, s:s}", "node", text_of(entry, "node-name"),
                          "name", name), err) < 0) {
            return -1;
        }
    }
    return 0;
}

static json_t *flat(void)
{
    return json_pack("{s:b}", "flat", 1);
}

static void remove_folder(const char *folder, unsigned n)
{
    char path[4200];

    for (unsigned i = 0; i < n; i++) {
        snprintf(path, sizeof(path), "%s/%u", folder, i);
        unlink(path);
    }
    snprintf(path, sizeof(path), "%s/nbd", folder);
    unlink(path);
    snprintf(path, sizeof(path), "%s/lock", folder);
    unlink(path);
    rmdir(folder);
}

/* Each user of a node before the node. */
static int take_away(struct leftovers *left, struct qlb_error *err)
{
    if (each(left, "query-block-exports", NULL, drop_export, err) < 0 ||
        each(left, "query-jobs", NULL, drop_job, err) < 0 ||
        each(left, NODES, flat(), drop_overlay, err) < 0 ||
        each(left, NODES, flat(), drop_file, err) < 0) {
        return -1;
    }
    return each(left, NODES, flat(), drop_bitmaps, err);
}

int fleece_clear(struct qmp *qmp, struct qlb_error *err)
{
    struct leftovers left = { .qmp = qmp };
    struct qlb_error ignored;

    if (each(&left, NODES, flat(), note_folder, err) < 0 ||
        (left.folder[0] != '\0' && check_owner(&left, err) < 0) ||
        take_away(&left, err) < 0) {
        return qlb_error_prefix(err, "clearing what a backup has left");
    }
    if (left.n > 0) {
        run(qmp, "nbd-server-stop", NULL, &ignored);
    }
    if (left.folder[0] != '\0') {
        remove_folder(left.folder, 1024);
    }
    return 0;
}

/* ---- the scratch folder ---- */

/* Who runs QEMU owns the images that it has open. */
static int give_to_owner(const struct fleece *fleece, const char *path,
                         struct qlb_error *err)
{
    struct stat st;

    if (geteuid() == 0 && stat(fleece->disks[0].filename, &st) == 0 &&
        st.st_uid != 0 && chown(path, st.st_uid, st.st_gid) < 0) {
        return qlb_fail_errno(err, errno, "%s", path);
    }
    return 0;
}

static int make_file(const struct fleece *fleece, const char *path,
                     struct qlb_error *err)
{
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

    if (fd < 0) {
        return qlb_fail_errno(err, errno, "%s", path);
    }
    close(fd);
    return give_to_owner(fleece, path, err);
}

static int make_folder(struct fleece *fleece, const char *scratch,
                       struct qlb_error *err)
{
    char path[4200];

    if (asprintf(&fleece->folder, "%s/.lbvm-%s", scratch, fleece->key) < 0) {
        fleece->folder = NULL;
        return qlb_fail_errno(err, ENOMEM, "%s", scratch);
    }
    if (strlen(fleece->folder) + sizeof("/nbd") >
        sizeof(((struct sockaddr_un *)NULL)->sun_path)) {
        return qlb_fail_errno(err, ENAMETOOLONG, "%s", fleece->folder);
    }
    if (mkdir(fleece->folder, 0700) < 0) {
        return qlb_fail_errno(err, errno, "%s", fleece->folder);
    }
    snprintf(path, sizeof(path), "%s/lock", fleece->folder);
    fleece->lock = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fleece->lock < 0 || flock(fleece->lock, LOCK_EX | LOCK_NB) < 0) {
        return qlb_fail_errno(err, errno, "%s", path);
    }
    return give_to_owner(fleece, fleece->folder, err);
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
    return wait_for_job(fleece->qmp, name, err);
}

static int add_overlay(struct fleece *fleece, unsigned i,
                       struct qlb_error *err)
{
    const char *name = fleece->names[i];
    char file[NAME_SIZE + 8], path[4200];

    snprintf(file, sizeof(file), "%s-file", name);
    snprintf(path, sizeof(path), "%s/%u", fleece->folder, i);
    if (make_file(fleece, path, err) < 0 ||
        run(fleece->qmp, "blockdev-add",
            json_pack("{s:s, s:s, s:s, s:s}", "driver", "file", "node-name",
                      file, "filename", path, "discard", "unmap"),
            err) < 0 ||
        format_overlay(fleece, i, file, err) < 0) {
        return -1;
    }
    return run(fleece->qmp, "blockdev-add",
               json_pack("{s:s, s:s, s:s, s:s, s:s}", "driver", "qcow2",
                         "node-name", name, "file", file, "backing",
                         fleece->disks[i].node, "discard", "unmap"), err);
}

/* ---- the point in time ---- */

static void add_action(json_t *actions, const char *type, json_t *data)
{
    json_array_append_new(actions, json_pack("{s:s, s:o}", "type", type,
                                             "data", data));
}

static void add_new_bitmap(json_t *actions, const struct fleece_disk *disk)
{
    if (disk->bitmap != NULL) {
        add_action(actions, "block-dirty-bitmap-add",
                   json_pack("{s:s, s:s, s:i, s:b}", "node", disk->node,
                             "name", disk->bitmap, "granularity", 65536,
                             "persistent", 1));
    }
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
                         name, "granularity", 65536, "disabled", 1));
    add_action(actions, "block-dirty-bitmap-merge",
               json_pack("{s:s, s:s, s:[s]}", "node", disk->node, "target",
                         name, "bitmaps", disk->changes));
}

static int transact(struct fleece *fleece, uint64_t *now,
                    struct qlb_error *err)
{
    json_t *actions = json_array();

    for (unsigned i = 0; i < fleece->n; i++) {
        add_new_bitmap(actions, &fleece->disks[i]);
    }
    for (unsigned i = 0; i < fleece->n; i++) {
        add_job(actions, &fleece->disks[i], fleece->names[i]);
    }
    for (unsigned i = 0; i < fleece->n; i++) {
        add_copy(actions, &fleece->disks[i], fleece->names[i]);
    }
    if (run(fleece->qmp, "transaction",
            json_pack("{s:o}", "actions", actions), err) < 0) {
        return -1;
    }
    *now = (uint64_t)time(NULL);
    fleece->begun = true;
    return 0;
}

/* ---- the exports ---- */

static int start_server(struct fleece *fleece, struct qlb_error *err)
{
    char path[4200];
    json_t *address;

    snprintf(path, sizeof(path), "%s/nbd", fleece->folder);
    address = json_pack("{s:s, s:{s:s}}", "type", "unix", "data", "path",
                        path);
    if (run(fleece->qmp, "nbd-server-start",
            json_pack("{s:o}", "addr", address), err) < 0) {
        if (strstr(err->message, "already running") != NULL) {
            return qlb_fail(err, QLB_E_BUSY, "QEMU's NBD server is used by "
                            "somebody else, as by a migration; try again "
                            "when that has ended");
        }
        return -1;
    }
    fleece->server = true;
    return 0;
}

static int export(struct fleece *fleece, unsigned i, struct qlb_error *err)
{
    const char *name = fleece->names[i];
    json_t *arguments = json_pack("{s:s, s:s, s:s, s:s}", "type", "nbd", "id",
                                  name, "node-name", name, "name", name);

    if (fleece->disks[i].changes != NULL) {
        json_object_set_new(arguments, "bitmaps", json_pack("[s]", name));
    }
    if (asprintf(&fleece->uris[i], "nbd+unix:///%s?socket=%s/nbd", name,
                 fleece->folder) < 0) {
        fleece->uris[i] = NULL;
        json_decref(arguments);
        return qlb_fail_errno(err, ENOMEM, "%s", name);
    }
    return run(fleece->qmp, "block-export-add", arguments, err);
}

/* ---- from the beginning to the end ---- */

static int begin(struct fleece *fleece, const char *scratch, uint64_t *now,
                 struct qlb_error *err)
{
    if (make_folder(fleece, scratch, err) < 0 ||
        start_server(fleece, err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < fleece->n; i++) {
        if (add_overlay(fleece, i, err) < 0) {
            return -1;
        }
    }
    if (transact(fleece, now, err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < fleece->n; i++) {
        if (export(fleece, i, err) < 0) {
            return -1;
        }
    }
    return 0;
}

static struct fleece *fleece_new(struct qmp *qmp,
                                 const struct fleece_disk *disks, unsigned n)
{
    struct fleece *fleece = calloc(1, sizeof(*fleece));
    struct qlb_uuid random = tool_random_uuid();
    char uuid[QLB_UUID_TEXT];

    if (fleece == NULL) {
        return NULL;
    }
    fleece->qmp = qmp;
    fleece->disks = disks;
    fleece->n = n;
    fleece->lock = -1;
    snprintf(fleece->key, sizeof(fleece->key), "%.8s",
             qlb_uuid_format(&random, uuid));
    fleece->uris = calloc(n, sizeof(*fleece->uris));
    fleece->names = calloc(n, sizeof(*fleece->names));
    for (unsigned i = 0; fleece->names != NULL && i < n; i++) {
        snprintf(fleece->names[i], NAME_SIZE, PREFIX "%s-%u", fleece->key,
                 i);
    }
    return fleece;
}

struct fleece *fleece_begin(struct qmp *qmp, const char *scratch,
                            const struct fleece_disk *disks, unsigned n,
                            uint64_t *time, struct qlb_error *err)
{
    struct fleece *fleece = fleece_new(qmp, disks, n);
    struct qlb_error ignored;

    if (fleece == NULL || fleece->uris == NULL || fleece->names == NULL) {
        qlb_fail_errno(err, ENOMEM, "beginning the backup");
        fleece_end(fleece, &ignored);
        return NULL;
    }
    if (begin(fleece, scratch, time, err) < 0) {
        fleece_end(fleece, &ignored);
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

        if (strcmp(text_of(job, "status"), "running") != 0) {
            ret = qlb_fail(err, QLB_E_RUNTIME, "the backup was broken: QEMU "
                           "has ended its job%s%s",
                           *text_of(job, "error") == '\0' ? "" : ": ",
                           text_of(job, "error"));
        }
    }
    json_decref(jobs);
    return ret;
}

int fleece_end(struct fleece *fleece, struct qlb_error *err)
{
    struct qlb_error ignored;
    struct leftovers left = { 0 };
    int ret = 0;

    if (fleece == NULL) {
        return 0;
    }
    if (fleece->server) {
        left.qmp = fleece->qmp;
        ret = take_away(&left, err);
        if (run(fleece->qmp, "nbd-server-stop", NULL,
                ret < 0 ? &ignored : err) < 0) {
            ret = -1;
        }
    }
    if (fleece->lock >= 0) {
        remove_folder(fleece->folder, fleece->n);
        close(fleece->lock);
    }
    for (unsigned i = 0; fleece->uris != NULL && i < fleece->n; i++) {
        free(fleece->uris[i]);
    }
    free(fleece->uris);
    free(fleece->names);
    free(fleece->folder);
    free(fleece);
    return ret;
}
