/* The objects of a repository on another host, through ssh.
 *
 * One session is for all small requests, and holds the locks: they end with it.
 * An archive that is written has a session of its own, which begins before it
 * is needed and is not waited for: what it stored is counted at the end, and
 * only when the count is that of what was sent, its name is published through
 * the first session. So a connection that breaks leaves a temporary file.
 *
 * An archive that is read is fetched into a folder of temporary files first, and
 * deleted when the store is closed.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vm/ssh_session.h"
#include "vm/store.h"

struct store_lock {
    unsigned descriptor; /* of the shell there */
};

struct ssh_store {
    struct store store;
    struct ssh_target target;
    struct ssh_session *session;
    pthread_mutex_t mutex;     /* of the session: one request at a time */
    unsigned locks;            /* bits of descriptors in use */
    char *listed;              /* folder whose names are known; NULL: none */
    struct store_names names;
    char *fetched_folder;      /* NULL: none yet */
    struct store_names fetched; /* paths */
};

enum { FIRST_LOCK = 7, N_LOCKS = 3 }; /* one digit: all that POSIX promises */

static struct ssh_store *ssh_of(struct store *store)
{
    return (struct ssh_store *)store;
}

static int no_memory(const struct ssh_store *ssh, struct qlb_error *err)
{
    return qlb_fail_errno(err, ENOMEM, "%s", ssh->store.name);
}

/* ---- requests ---- */

/* The path that the host has for an object; "" is the store. */
static char *far_path(const struct ssh_store *ssh, const char *object)
{
    char *path;

    if (*object == '\0') {
        return strdup(ssh->target.path);
    }
    return asprintf(&path, "%s/%s", ssh->target.path, object) < 0 ? NULL
                                                                 : path;
}

/* Words: a request, an object, and what else it takes (NULL: nothing). The
 * mutex is held. */
static int send_request(struct ssh_store *ssh, const char *request,
                        const char *object, const char *third,
                        const char *fourth, struct qlb_error *err)
{
    char *path = far_path(ssh, object);
    const char *words[] = { request, path, third, fourth };
    unsigned n = third == NULL ? 2 : fourth == NULL ? 3 : 4;
    int ret = -1;

    if (path == NULL) {
        return no_memory(ssh, err);
    }
    if (ssh_session_await(ssh->session, err) == 0) {
        ret = ssh_session_send(ssh->session, words, n, NULL, 0, err);
    }
    free(path);
    return ret;
}

/* The subject of errors. */
static char *subject_of(const struct ssh_store *ssh, const char *object)
{
    return store_path(&ssh->store, object);
}

static int ask(struct ssh_store *ssh, const char *request, const char *object,
               const char *third, const char *fourth,
               struct store_text *text, struct qlb_error *err)
{
    char *subject = subject_of(ssh, object);
    int ret = subject == NULL ? no_memory(ssh, err) : 0;

    pthread_mutex_lock(&ssh->mutex);
    if (ret == 0) {
        ret = send_request(ssh, request, object, third, fourth, err);
    }
    if (ret == 0) {
        ret = ssh_session_answer_text(ssh->session, subject, text, err);
    }
    pthread_mutex_unlock(&ssh->mutex);
    free(subject);
    return ret;
}

/* The same where the answer tells nothing: 1, 0, -1. */
static int order(struct ssh_store *ssh, const char *request,
                 const char *object, const char *third, const char *fourth,
                 struct qlb_error *err)
{
    struct store_text text;
    int ret = ask(ssh, request, object, third, fourth, &text, err);

    if (ret > 0) {
        free(text.data);
    }
    return ret;
}

/* ---- folders ---- */

static void forget_list(struct ssh_store *ssh)
{
    free(ssh->listed);
    ssh->listed = NULL;
    store_names_release(&ssh->names);
}

static int ssh_make_folder(struct store *store, const char *folder, bool own,
                           struct qlb_error *err)
{
    return order(ssh_of(store), "make-folder", folder, own ? "own" : "any",
                 NULL, err) < 0 ? -1 : 0;
}

static int ssh_list(struct store *store, const char *folder,
                    struct store_names *names, struct qlb_error *err)
{
    struct ssh_store *ssh = ssh_of(store);
    struct store_text text;
    char *rest, *name;
    int ret = 0;

    if (ask(ssh, "list", folder, NULL, NULL, &text, err) <= 0) {
        return -1;
    }
    rest = text.data;
    while (ret == 0 && (name = strsep(&rest, "\n")) != NULL) {
        if (*name != '\0' && store_names_add(names, name) < 0) {
            ret = no_memory(ssh, err);
        }
    }
    free(text.data);
    return ret;
}

static int take_each(struct ssh_store *ssh, const char *subject,
                     store_each_fn *each, void *opaque,
                     struct qlb_error *err)
{
    for (;;) {
        struct store_text text, content;
        char *end;
        int ret = ssh_session_answer_text(ssh->session, subject, &text, err);

        if (ret <= 0) {
            return -1;
        }
        end = strchr(text.data, '\n');
        if (end == NULL) {
            free(text.data); /* the last one: empty */
            return 0;
        }
        *end = '\0';
        content = (struct store_text) {
            .data = end + 1, .len = text.len - (size_t)(end + 1 - text.data),
        };
        ret = each(opaque, text.data, &content, err);
        free(text.data);
        if (ret < 0) {
            return -1;
        }
    }
}

/* After an error of `each`, answers are left over: the session is of no more
 * use. */
static int ssh_each(struct store *store, const char *folder,
                    const char *suffix, store_each_fn *each, void *opaque,
                    struct qlb_error *err)
{
    struct ssh_store *ssh = ssh_of(store);
    char *subject = subject_of(ssh, folder);
    int ret = subject == NULL ? no_memory(ssh, err) : 0;

    pthread_mutex_lock(&ssh->mutex);
    if (ret == 0) {
        ret = send_request(ssh, "each", folder, suffix, NULL, err);
    }
    if (ret == 0) {
        ret = take_each(ssh, subject, each, opaque, err);
    }
    pthread_mutex_unlock(&ssh->mutex);
    free(subject);
    return ret;
}

/* ---- objects ---- */

/* Whether a folder's object exists is asked for many of them, a chain: its list
 * is kept until something in there is changed. */
static int ssh_has(struct store *store, const char *object,
                   struct qlb_error *err)
{
    struct ssh_store *ssh = ssh_of(store);
    const char *slash = strrchr(object, '/');
    size_t len = slash == NULL ? 0 : (size_t)(slash - object);

    if (slash == NULL || strncmp(slash - strlen("archives"), "archives",
                                 strlen("archives")) != 0) {
        return order(ssh, "has", object, NULL, NULL, err);
    }
    if (ssh->listed == NULL || strlen(ssh->listed) != len ||
        strncmp(ssh->listed, object, len) != 0) {
        forget_list(ssh);
        ssh->listed = strndup(object, len);
        if (ssh->listed == NULL ||
            store_list(store, ssh->listed, &ssh->names, err) < 0) {
            forget_list(ssh);
            return -1;
        }
    }
    return store_names_have(&ssh->names, slash + 1);
}

static int ssh_get(struct store *store, const char *object,
                   struct store_text *text, struct qlb_error *err)
{
    return ask(ssh_of(store), "get", object, NULL, NULL, text, err);
}

/* ".NAME.XXXXXX.tmp" beside the object. */
static char *temporary_of(const char *object)
{
    const char *slash = strrchr(object, '/');
    int folder = slash == NULL ? 0 : (int)(slash + 1 - object);
    struct qlb_uuid random = tool_random_uuid();
    char uuid[QLB_UUID_TEXT], *name;

    qlb_uuid_format(&random, uuid);
    return asprintf(&name, "%.*s.%.200s.%.6s.tmp", folder, object,
                    object + folder, uuid) < 0 ? NULL : name;
}

static int send_object(struct ssh_store *ssh, const char *object,
                       const char *temporary, bool replace, const char *data,
                       size_t len, struct qlb_error *err)
{
    char *path = far_path(ssh, object), *beside = far_path(ssh, temporary);
    char *subject = subject_of(ssh, object), count[24];
    const char *words[] = { "put", path, beside, replace ? "yes" : "no",
                            count };
    struct store_text text;
    int ret = -1;

    snprintf(count, sizeof(count), "%zu", len);
    if (path == NULL || beside == NULL || subject == NULL) {
        no_memory(ssh, err);
    } else if (ssh_session_await(ssh->session, err) == 0 &&
               ssh_session_send(ssh->session, words, 5, data, len,
                                err) == 0) {
        ret = ssh_session_answer_text(ssh->session, subject, &text, err);
    }
    if (ret > 0) {
        free(text.data);
    }
    free(subject);
    free(beside);
    free(path);
    return ret > 0 ? 0 : -1;
}

static int ssh_put(struct store *store, const char *object, const char *data,
                   size_t len, bool replace, struct qlb_error *err)
{
    struct ssh_store *ssh = ssh_of(store);
    char *temporary = temporary_of(object);
    int ret;

    if (temporary == NULL) {
        return no_memory(ssh, err);
    }
    pthread_mutex_lock(&ssh->mutex);
    ret = send_object(ssh, object, temporary, replace, data, len, err);
    pthread_mutex_unlock(&ssh->mutex);
    free(temporary);
    return ret;
}

static int ssh_touch(struct store *store, const char *object,
                     struct qlb_error *err)
{
    return order(ssh_of(store), "touch", object, NULL, NULL, err) < 0 ? -1
                                                                      : 0;
}

static int ssh_delete(struct store *store, const char *const *objects,
                      unsigned n, struct qlb_error *err)
{
    struct ssh_store *ssh = ssh_of(store);
    char *folder;
    int ret = 0;

    forget_list(ssh);
    for (unsigned i = 0; i < n && ret >= 0; i++) {
        ret = order(ssh, "delete", objects[i], NULL, NULL, err);
    }
    if (ret < 0) {
        return -1;
    }
    folder = strndup(objects[0], (size_t)(strrchr(objects[0], '/') -
                                          objects[0]));
    if (folder == NULL) {
        return no_memory(ssh, err);
    }
    ret = order(ssh, "sync", folder, NULL, NULL, err);
    free(folder);
    return ret < 0 ? -1 : 0;
}

/* ---- archives that are written ---- */

struct upload {
    struct ssh_store *ssh;
    struct ssh_session *session;
    char *object, *temporary, *subject;
    bool done;
};

static int upload_publish(struct upload *upload, struct qlb_error *err)
{
    struct ssh_store *ssh = upload->ssh;
    char *path = far_path(ssh, upload->object);
    int ret = -1;

    if (path == NULL) {
        return no_memory(ssh, err);
    }
    ret = order(ssh, "publish", upload->temporary, path, NULL, err);
    free(path);
    forget_list(ssh);
    return ret > 0 ? 0 : -1;
}

static int upload_commit(void *opaque, uint64_t bytes, struct qlb_error *err)
{
    struct upload *upload = opaque;
    struct store_text text;
    uint64_t stored;

    ssh_session_close_input(upload->session);
    if (ssh_session_answer_text(upload->session, upload->subject, &text,
                                err) <= 0) {
        return -1;
    }
    stored = strtoull(text.data, NULL, 10);
    free(text.data);
    if (stored != bytes) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: only %llu bytes arrived of "
                        "the %llu that were sent", upload->subject,
                        (unsigned long long)stored,
                        (unsigned long long)bytes);
    }
    if (upload_publish(upload, err) < 0) {
        return -1;
    }
    upload->done = true;
    return 0;
}

/* The other end has closed: it tells why, or ssh does. */
static int upload_failed(void *opaque, int reason, struct qlb_error *err)
{
    struct upload *upload = opaque;
    struct store_text text;

    if (ssh_session_answer_text(upload->session, upload->subject, &text,
                                err) > 0) {
        qlb_fail_errno(err, reason, "%s: only %.20s bytes arrived",
                       upload->subject, text.data);
        free(text.data);
    }
    return -1;
}

static void upload_free(void *opaque)
{
    struct upload *upload = opaque;
    struct qlb_error ignored;

    ssh_session_end(upload->session);
    if (!upload->done && upload->temporary != NULL) {
        order(upload->ssh, "delete", upload->temporary, NULL, NULL,
              &ignored);
    }
    free(upload->object);
    free(upload->temporary);
    free(upload->subject);
    free(upload);
}

static const struct qlb_outfile_sink upload_sink = {
    .commit = upload_commit, .failed = upload_failed, .free = upload_free,
};

static int upload_begin(struct upload *upload, struct qlb_error *err)
{
    struct ssh_store *ssh = upload->ssh;
    char *path = upload->temporary == NULL
                     ? NULL : far_path(ssh, upload->temporary);
    const char *words[] = { "stream", path };
    int ret = -1;

    if (path == NULL || upload->object == NULL || upload->subject == NULL) {
        no_memory(ssh, err);
    } else {
        upload->session = ssh_session_start(&ssh->target, upload->subject,
                                            err);
    }
    if (upload->session != NULL) {
        ret = ssh_session_send(upload->session, words, 2, NULL, 0, err);
        /* As much as may be on its way while it connects. */
        fcntl(ssh_session_descriptor(upload->session), F_SETPIPE_SZ, 1 << 20);
    }
    free(path);
    return ret;
}

static struct qlb_outfile *ssh_create(struct store *store, const char *object,
                                      struct qlb_error *err)
{
    struct upload *upload = calloc(1, sizeof(*upload));
    struct qlb_outfile *out = NULL;

    if (upload == NULL) {
        no_memory(ssh_of(store), err);
        return NULL;
    }
    upload->ssh = ssh_of(store);
    upload->object = strdup(object);
    upload->temporary = temporary_of(object);
    upload->subject = store_path(store, object);
    if (upload_begin(upload, err) == 0) {
        out = qlb_outfile_to_sink(ssh_session_descriptor(upload->session),
                                  upload->subject, &upload_sink, upload, err);
    }
    if (out == NULL) {
        upload_free(upload);
    }
    return out;
}

/* ---- archives that are read ---- */

static int make_fetched_folder(struct ssh_store *ssh, struct qlb_error *err)
{
    const char *base = getenv("TMPDIR");
    char *folder;

    if (ssh->fetched_folder != NULL) {
        return 0;
    }
    if (asprintf(&folder, "%s/lbvm.XXXXXX",
                 base == NULL || *base == '\0' ? "/var/tmp" : base) < 0) {
        return no_memory(ssh, err);
    }
    if (mkdtemp(folder) == NULL) {
        qlb_fail_errno(err, errno, "%s: making a temporary folder", folder);
        free(folder);
        return -1;
    }
    ssh->fetched_folder = folder;
    return 0;
}

static int receive(struct ssh_session *session, const char *subject,
                   struct qlb_outfile *out, struct qlb_error *err)
{
    enum { STEP = 1 << 20 };
    char *buf = malloc(STEP);
    uint64_t len = 0;
    int ret = buf == NULL ? qlb_fail_errno(err, ENOMEM, "%s", subject)
                          : ssh_session_answer(session, subject, &len, err);

    if (buf != NULL && ret == 0) {
        qlb_fail(err, QLB_E_UNTRUSTED, "%s: is missing", subject);
    }
    ret = ret > 0 ? 0 : -1;
    while (ret == 0 && len > 0) {
        size_t n = len < STEP ? (size_t)len : STEP;

        ret = ssh_session_read(session, buf, n, err);
        if (ret == 0) {
            ret = qlb_outfile_write(out, buf, n, err);
        }
        len -= n;
    }
    free(buf);
    return ret;
}

static int download(struct ssh_store *ssh, const char *object,
                    const char *path, struct qlb_error *err)
{
    char *subject = subject_of(ssh, object), *far = far_path(ssh, object);
    const char *words[] = { "fetch", far };
    struct ssh_session *session = NULL;
    struct qlb_outfile *out = NULL;
    int ret = -1;

    if (subject == NULL || far == NULL) {
        no_memory(ssh, err);
    } else {
        session = ssh_session_start(&ssh->target, subject, err);
    }
    if (session != NULL && ssh_session_await(session, err) == 0 &&
        ssh_session_send(session, words, 2, NULL, 0, err) == 0) {
        out = qlb_outfile_create(path, QLB_OUTFILE_PRIVATE, err);
    }
    if (out != NULL && receive(session, subject, out, err) == 0) {
        ret = qlb_outfile_commit(out, err);
    }
    qlb_outfile_close(out);
    ssh_session_end(session);
    free(far);
    free(subject);
    return ret;
}

/* Under its own name: that of an archive is unique in the store, and is what
 * messages about it then end with. */
static char *ssh_fetch(struct store *store, const char *object,
                       struct qlb_error *err)
{
    struct ssh_store *ssh = ssh_of(store);
    const char *slash = strrchr(object, '/');
    char *path;

    if (make_fetched_folder(ssh, err) < 0) {
        return NULL;
    }
    if (asprintf(&path, "%s/%s", ssh->fetched_folder,
                 slash == NULL ? object : slash + 1) < 0) {
        no_memory(ssh, err);
        return NULL;
    }
    if (access(path, F_OK) == 0) {
        return path;
    }
    if (download(ssh, object, path, err) < 0 ||
        store_names_add(&ssh->fetched, path) < 0) {
        unlink(path);
        free(path);
        return NULL;
    }
    return path;
}

/* ---- locks ---- */

static char *busy_folder(const char *subject)
{
    const char *slash = strrchr(subject, '/');

    return strndup(subject, (size_t)(slash - subject));
}

static int take_lock(struct ssh_store *ssh, const char *object,
                     bool exclusive, const char *who, unsigned descriptor,
                     struct qlb_error *err)
{
    char number[8], *subject, *folder;

    snprintf(number, sizeof(number), "%u", descriptor);
    if (order(ssh, "lock", object, number,
              exclusive ? "exclusive" : "shared", err) > 0) {
        return 0;
    }
    if (err->code != QLB_E_BUSY) {
        return -1;
    }
    subject = subject_of(ssh, object);
    folder = subject == NULL ? NULL : busy_folder(subject);
    qlb_fail(err, QLB_E_BUSY, "%s: %s; try again when that has ended",
             folder == NULL ? ssh->store.name : folder, who);
    free(folder);
    free(subject);
    return -1;
}

static int ssh_lock(struct store *store, const char *object, bool exclusive,
                    const char *who, struct store_lock **lock,
                    struct qlb_error *err)
{
    struct ssh_store *ssh = ssh_of(store);
    unsigned i = 0;

    while (i < N_LOCKS && (ssh->locks & 1u << i)) {
        i++;
    }
    if (i == N_LOCKS) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: too many locks",
                        store->name);
    }
    if (take_lock(ssh, object, exclusive, who, FIRST_LOCK + i, err) < 0) {
        return -1;
    }
    *lock = malloc(sizeof(**lock));
    if (*lock == NULL) {
        return no_memory(ssh, err); /* held until the session ends */
    }
    (*lock)->descriptor = FIRST_LOCK + i;
    ssh->locks |= 1u << i;
    return 0;
}

static void ssh_unlock(struct store *store, struct store_lock *lock)
{
    struct ssh_store *ssh = ssh_of(store);
    char number[8];
    const char *words[] = { "unlock", number };
    struct qlb_error ignored;
    struct store_text text;

    snprintf(number, sizeof(number), "%u", lock->descriptor);
    pthread_mutex_lock(&ssh->mutex);
    if (ssh_session_send(ssh->session, words, 2, NULL, 0, &ignored) == 0 &&
        ssh_session_answer_text(ssh->session, store->name, &text,
                                &ignored) > 0) {
        free(text.data);
    }
    pthread_mutex_unlock(&ssh->mutex);
    ssh->locks &= ~(1u << (lock->descriptor - FIRST_LOCK));
    free(lock);
}

/* ---- the store ---- */

static void ssh_close(struct store *store)
{
    struct ssh_store *ssh = ssh_of(store);

    for (unsigned i = 0; i < ssh->fetched.n; i++) {
        unlink(ssh->fetched.at[i]);
    }
    store_names_release(&ssh->fetched);
    if (ssh->fetched_folder != NULL) {
        rmdir(ssh->fetched_folder);
    }
    free(ssh->fetched_folder);
    forget_list(ssh);
    ssh_session_end(ssh->session);
    ssh_target_release(&ssh->target);
    pthread_mutex_destroy(&ssh->mutex);
    free(store->name);
    free(ssh);
}

static const struct store_ops ssh_ops = {
    .make_folder = ssh_make_folder,
    .list = ssh_list,
    .each = ssh_each,
    .has = ssh_has,
    .get = ssh_get,
    .put = ssh_put,
    .touch = ssh_touch,
    .create = ssh_create,
    .delete = ssh_delete,
    .fetch = ssh_fetch,
    .lock = ssh_lock,
    .unlock = ssh_unlock,
    .close = ssh_close,
};

struct store *store_ssh_open(const char *url, struct qlb_error *err)
{
    struct ssh_store *ssh = calloc(1, sizeof(*ssh));
    size_t len = strlen(url);

    while (len > 0 && url[len - 1] == '/') {
        len--;
    }
    if (ssh == NULL || (ssh->store.name = strndup(url, len)) == NULL) {
        free(ssh);
        qlb_fail_errno(err, ENOMEM, "%s", url);
        return NULL;
    }
    ssh->store.ops = &ssh_ops;
    pthread_mutex_init(&ssh->mutex, NULL);
    if (ssh_target_parse(&ssh->target, url, err) == 0) {
        ssh->session = ssh_session_start(&ssh->target, ssh->store.name, err);
    }
    if (ssh->session == NULL || ssh_session_await(ssh->session, err) < 0) {
        ssh_close(&ssh->store);
        return NULL;
    }
    return &ssh->store;
}
