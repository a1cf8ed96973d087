/* A client of QMP.
 *
 * QEMU sends one JSON object a line. Every command has a number as its "id",
 * which the answer repeats: so one that was not waited for is told from that
 * to a later command.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qmp.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* Seconds. A monitor has one client: a second one gets no greeting. */
enum { GREETING_PATIENCE = 10, PATIENCE = 120 };
/* Of one answer: a node's description takes some KiB. */
#define MAX_LINE ((size_t)64 << 20)

struct qmp {
    int fd;
    char *path;
    bool interruptible, answered;
    bool dead;           /* QEMU has gone, or hangs */
    uint64_t id;
    char *buf;           /* what was received */
    size_t room, used;
    size_t line;         /* length of the line that was handed out */
};

/* ---- lines ---- */

/* Waits until the socket is ready, not beyond the deadline. */
static int wait_for(struct qmp *qmp, short events, double deadline,
                    struct qlb_error *err)
{
    for (;;) {
        struct pollfd p = { .fd = qmp->fd, .events = events };
        double left = deadline - tool_clock();
        int ret;

        if (qmp->interruptible && tool_stop) {
            return qlb_fail(err, QLB_E_RUNTIME, "interrupted");
        }
        if (left <= 0) {
            qmp->dead = true;
            return qlb_fail(err, QLB_E_RUNTIME, "%s: QEMU does not answer%s",
                            qmp->path, qmp->id > 0 ? "" : "; has its monitor "
                            "another client?");
        }
        ret = poll(&p, 1, left > 0.2 ? 200 : (int)(left * 1000) + 1);
        if (ret < 0 && errno != EINTR) {
            return qlb_fail_errno(err, errno, "%s", qmp->path);
        }
        if (ret > 0) {
            return 0;
        }
    }
}

static int hung_up(struct qmp *qmp, struct qlb_error *err)
{
    qmp->dead = true;
    return qlb_fail(err, QLB_E_RUNTIME, "%s: QEMU has closed the connection",
                    qmp->path);
}

static int send_all(struct qmp *qmp, const char *text, size_t len,
                    double deadline, struct qlb_error *err)
{
    while (len > 0) {
        ssize_t n;

        if (wait_for(qmp, POLLOUT, deadline, err) < 0) {
            return -1;
        }
        n = send(qmp->fd, text, len, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && (errno == EPIPE || errno == ECONNRESET)) {
            return hung_up(qmp, err);
        }
        if (n < 0 && errno != EINTR && errno != EAGAIN) {
            return qlb_fail_errno(err, errno, "%s", qmp->path);
        }
        if (n > 0) {
            text += n;
            len -= (size_t)n;
        }
    }
    return 0;
}

static int make_room(struct qmp *qmp, struct qlb_error *err)
{
    size_t room = qmp->room == 0 ? 65536 : 2 * qmp->room;
    char *buf;

    if (qmp->used < qmp->room) {
        return 0;
    }
    if (room > MAX_LINE) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: QEMU's answer is too long",
                        qmp->path);
    }
    buf = realloc(qmp->buf, room);
    if (buf == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", qmp->path);
    }
    qmp->buf = buf;
    qmp->room = room;
    return 0;
}

/* The next line is at the start of the buffer, qmp->line bytes long. */
static int read_line(struct qmp *qmp, double deadline, struct qlb_error *err)
{
    memmove(qmp->buf, qmp->buf + qmp->line, qmp->used - qmp->line);
    qmp->used -= qmp->line;
    qmp->line = 0;
    for (size_t searched = 0; ; ) {
        const char *end = memchr(qmp->buf + searched, '\n',
                                 qmp->used - searched);
        ssize_t n;

        if (end != NULL) {
            qmp->line = (size_t)(end - qmp->buf) + 1;
            return 0;
        }
        searched = qmp->used;
        if (make_room(qmp, err) < 0 ||
            wait_for(qmp, POLLIN, deadline, err) < 0) {
            return -1;
        }
        n = recv(qmp->fd, qmp->buf + qmp->used, qmp->room - qmp->used,
                 MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno == ECONNRESET)) {
            return hung_up(qmp, err);
        }
        if (n < 0 && errno != EINTR && errno != EAGAIN) {
            return qlb_fail_errno(err, errno, "%s", qmp->path);
        }
        qmp->used += n > 0 ? (size_t)n : 0;
    }
}

/* The next object that is no event. */
static json_t *read_object(struct qmp *qmp, double deadline,
                           struct qlb_error *err)
{
    for (;;) {
        json_t *object;

        if (read_line(qmp, deadline, err) < 0) {
            return NULL;
        }
        object = json_loadb(qmp->buf, qmp->line, 0, NULL);
        if (!json_is_object(object)) {
            json_decref(object);
            qlb_fail(err, QLB_E_RUNTIME, "%s: what answers there is no QMP "
                     "monitor", qmp->path);
            return NULL;
        }
        if (json_object_get(object, "event") == NULL) {
            return object;
        }
        json_decref(object);
    }
}

/* ---- commands ---- */

/* QEMU's errors have no classes of ours; but it has the sentences for a lack of
 * trust from our library, and two of its own. */
static enum qlb_code code_of(const char *text)
{
    if (strstr(text, "has no confirmed checkpoint") != NULL ||
        strstr(text, "has no such checkpoint") != NULL) {
        return QLB_E_UNTRUSTED;
    }
    for (int trust = QLB_TRUST_OFF; trust <= QLB_TRUST_CANARY; trust++) {
        if (strstr(text, qlb_trust_reason((enum qlb_trust)trust)) != NULL) {
            return QLB_E_UNTRUSTED;
        }
    }
    return QLB_E_RUNTIME;
}

static json_t *take_result(struct qmp *qmp, const char *command,
                           json_t *answer, struct qlb_error *err)
{
    json_t *result = json_object_get(answer, "return");
    const char *text = json_string_value(
        json_object_get(json_object_get(answer, "error"), "desc"));

    if (result == NULL) {
        qlb_fail(err, code_of(text == NULL ? "" : text), "%s: %s: %s",
                 qmp->path, command, text == NULL ? "failed" : text);
    }
    return json_incref(result);
}

static int send_command(struct qmp *qmp, const char *command,
                        json_t *arguments, double deadline,
                        struct qlb_error *err)
{
    json_t *request = json_pack("{s:s, s:I}", "execute", command, "id",
                                (json_int_t)++qmp->id);
    char *text;
    int ret;

    if (arguments != NULL) {
        json_object_set_new(request, "arguments", arguments);
    }
    text = json_dumps(request, JSON_COMPACT);
    json_decref(request);
    if (text == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", qmp->path);
    }
    ret = qmp->dead ? hung_up(qmp, err)
                    : send_all(qmp, text, strlen(text), deadline, err);
    free(text);
    return ret < 0 ? -1 : send_all(qmp, "\n", 1, deadline, err);
}

json_t *qmp_call(struct qmp *qmp, const char *command, json_t *arguments,
                 struct qlb_error *err)
{
    double deadline = tool_clock() + PATIENCE;

    qmp->answered = false;
    if (send_command(qmp, command, arguments, deadline, err) < 0) {
        return NULL;
    }
    for (;;) {
        json_t *answer = read_object(qmp, deadline, err);
        json_t *id = json_object_get(answer, "id"), *result;

        if (answer == NULL) {
            return NULL;
        }
        /* QEMU answers without an id what it could not parse. */
        if (id == NULL || (uint64_t)json_integer_value(id) == qmp->id) {
            qmp->answered = true;
            result = take_result(qmp, command, answer, err);
            json_decref(answer);
            return result;
        }
        json_decref(answer);
    }
}

bool qmp_was_answered(const struct qmp *qmp)
{
    return qmp->answered;
}

void qmp_set_interruptible(struct qmp *qmp, bool interruptible)
{
    qmp->interruptible = interruptible;
}

/* ---- connecting ---- */

static int connect_to(struct qmp *qmp, struct qlb_error *err)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };

    if (strlen(qmp->path) >= sizeof(address.sun_path)) {
        return qlb_fail_errno(err, ENAMETOOLONG, "%s", qmp->path);
    }
    strcpy(address.sun_path, qmp->path);
    qmp->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (qmp->fd < 0 || connect(qmp->fd, (struct sockaddr *)&address,
                               sizeof(address)) < 0) {
        return qlb_fail_errno(err, errno, "%s", qmp->path);
    }
    return 0;
}

static int negotiate(struct qmp *qmp, struct qlb_error *err)
{
    json_t *object = read_object(qmp, tool_clock() + GREETING_PATIENCE, err);
    bool greeting = json_object_get(object, "QMP") != NULL;

    if (object == NULL) {
        return -1;
    }
    json_decref(object);
    if (!greeting) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: what answers there is no QMP "
                        "monitor", qmp->path);
    }
    object = qmp_call(qmp, "qmp_capabilities", NULL, err);
    json_decref(object);
    return object == NULL ? -1 : 0;
}

struct qmp *qmp_connect(const char *path, struct qlb_error *err)
{
    struct qmp *qmp = calloc(1, sizeof(*qmp));

    if (qmp != NULL) {
        qmp->fd = -1;
        qmp->interruptible = true;
        qmp->path = strdup(path);
    }
    if (qmp == NULL || qmp->path == NULL || make_room(qmp, err) < 0) {
        qmp_close(qmp);
        qlb_fail_errno(err, ENOMEM, "%s", path);
        return NULL;
    }
    if (connect_to(qmp, err) < 0 || negotiate(qmp, err) < 0) {
        qmp_close(qmp);
        return NULL;
    }
    return qmp;
}

void qmp_close(struct qmp *qmp)
{
    if (qmp == NULL) {
        return;
    }
    if (qmp->fd >= 0) {
        close(qmp->fd);
    }
    free(qmp->buf);
    free(qmp->path);
    free(qmp);
}
