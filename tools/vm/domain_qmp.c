/* The monitor of a libvirt domain.
 *
 * libvirt passes a command on, and waits for QEMU as long as it takes. So each
 * call has a thread of its own, which is left behind when the patience ends or
 * the user wants to stop; what it has is freed by whoever is the last to need
 * it. Between calls there is no thread, which is as well where others fork.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/domain_qmp.h"

#include <errno.h>
#include <libvirt/libvirt-qemu.h>
#include <libvirt/virterror.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct way {
    virDomainPtr handle;
    char *name;
    bool dead; /* QEMU or libvirt hangs */
};

/* A command that libvirt has. */
struct call {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    virDomainPtr handle;
    char *request;
    char *answer;         /* NULL: failed, see err */
    struct qlb_error err;
    bool done;            /* the thread doesn't touch it again */
    bool left;            /* nobody waits for it: the thread frees it */
};

int domain_fail(struct qlb_error *err, const char *name)
{
    const virError *error = virGetLastError();
    const char *text = error == NULL ? NULL : error->message;
    char copy[512];
    size_t len = 0;

    for (; text != NULL && text[len] != '\0' && len + 1 < sizeof(copy);
         len++) {
        unsigned char c = (unsigned char)text[len];

        copy[len] = c < ' ' || c == 127 ? ' ' : text[len];
    }
    copy[len] = '\0';
    return qlb_fail(err, QLB_E_RUNTIME, "%s: libvirt: %s", name,
                    len == 0 ? "failed" : copy);
}

static void free_call(struct call *call)
{
    virDomainFree(call->handle);
    pthread_mutex_destroy(&call->lock);
    pthread_cond_destroy(&call->cond);
    free(call->request);
    free(call->answer);
    free(call);
}

static void *run_call(void *opaque)
{
    struct call *call = opaque;
    const char *name = virDomainGetName(call->handle);
    bool left;
    int ret = virDomainQemuMonitorCommand(call->handle, call->request,
                                          &call->answer, 0);

    if (ret < 0) {
        domain_fail(&call->err, name);
        call->answer = NULL;
    }
    pthread_mutex_lock(&call->lock);
    call->done = true;
    left = call->left;
    pthread_cond_signal(&call->cond);
    pthread_mutex_unlock(&call->lock);
    if (left) {
        free_call(call);
    }
    return NULL;
}

static struct call *new_call(const struct way *way, json_t *request,
                             struct qlb_error *err)
{
    struct call *call = calloc(1, sizeof(*call));
    pthread_condattr_t attr;

    if (call == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", way->name);
        return NULL;
    }
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&call->lock, NULL);
    pthread_cond_init(&call->cond, &attr);
    pthread_condattr_destroy(&attr);
    virDomainRef(way->handle);
    call->handle = way->handle;
    call->request = json_dumps(request, JSON_COMPACT);
    if (call->request == NULL) {
        free_call(call);
        qlb_fail_errno(err, ENOMEM, "%s", way->name);
        return NULL;
    }
    return call;
}

static int start_call(struct call *call, const char *name,
                      struct qlb_error *err)
{
    pthread_t thread;
    pthread_attr_t attr;
    int ret;

    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    ret = pthread_create(&thread, &attr, run_call, call);
    pthread_attr_destroy(&attr);
    return ret == 0 ? 0 : qlb_fail_errno(err, ret, "%s", name);
}

/* Lock held. Whether the call came to its end. */
static int await_call(struct call *call, struct way *way, bool interruptible,
                      struct qlb_error *err)
{
    double deadline = tool_clock() + QMP_PATIENCE;

    while (!call->done) {
        struct timespec until;

        if (interruptible && tool_stop) {
            return qlb_fail(err, QLB_E_RUNTIME, "interrupted");
        }
        if (tool_clock() > deadline) {
            way->dead = true;
            return qlb_fail(err, QLB_E_RUNTIME, "%s: neither libvirt nor QEMU "
                            "answers", way->name);
        }
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += 200 * 1000 * 1000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&call->cond, &call->lock, &until);
    }
    return 0;
}

/* The text is libvirt's, but what is in it is QEMU's. */
static json_t *parse_answer(const char *text, const char *name,
                            struct qlb_error *err)
{
    json_t *answer = json_loads(text, 0, NULL);

    if (!json_is_object(answer)) {
        json_decref(answer);
        qlb_fail(err, QLB_E_RUNTIME, "%s: libvirt's answer is no QMP", name);
        return NULL;
    }
    return answer;
}

/* libvirt makes the "id", and skips events. */
static json_t *way_call(void *opaque, json_t *request, bool interruptible,
                        struct qlb_error *err)
{
    struct way *way = opaque;
    struct call *call;
    json_t *answer = NULL;
    bool done;

    if (way->dead) {
        qlb_fail(err, QLB_E_RUNTIME, "%s: neither libvirt nor QEMU answers",
                 way->name);
        return NULL;
    }
    call = new_call(way, request, err);
    if (call == NULL) {
        return NULL;
    }
    if (start_call(call, way->name, err) < 0) {
        free_call(call);
        return NULL;
    }
    pthread_mutex_lock(&call->lock);
    done = await_call(call, way, interruptible, err) == 0;
    call->left = !done;
    pthread_mutex_unlock(&call->lock);
    if (!done) {
        return NULL;
    }
    if (call->answer != NULL) {
        answer = parse_answer(call->answer, way->name, err);
    } else {
        *err = call->err;
    }
    free_call(call);
    return answer;
}

static void way_close(void *opaque)
{
    struct way *way = opaque;

    virDomainFree(way->handle);
    free(way->name);
    free(way);
}

static const struct qmp_ops way_ops = {
    .call = way_call,
    .close = way_close,
};

struct qmp *domain_qmp_new(virDomainPtr handle, const char *name,
                           struct qlb_error *err)
{
    struct way *way = calloc(1, sizeof(*way));

    if (way == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", name);
        return NULL;
    }
    virDomainRef(handle);
    way->handle = handle;
    way->name = strdup(name);
    if (way->name == NULL) {
        way_close(way);
        qlb_fail_errno(err, ENOMEM, "%s", name);
        return NULL;
    }
    return qmp_new(&way_ops, way, name, err);
}
