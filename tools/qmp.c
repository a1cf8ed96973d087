/* A client of QMP.
 *
 * On a socket, which is called a wire here, QEMU sends one JSON object a line.
 * Every command has a number as its "id", which the answer repeats: so one that
 * was not waited for is told from that to a later command.
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
enum { GREETING_PATIENCE = 10 };
/* Of one answer: a node's description takes some KiB. */
#define MAX_LINE ((size_t)64 << 20)

struct qmp {
    const struct qmp_ops *ops;
    void *opaque;
    char *target;
    bool interruptible, answered;
};

/* ---- commands ---- */

/* QEMU's errors have no classes of ours; but it has the sentences for a lack of
 * trust from our library, and some of its own. */
static enum qlb_code code_of(const char *text)
{
    if (strstr(text, "has no confirmed checkpoint") != NULL ||
        strstr(text, "has no such checkpoint") != NULL) {
        return QLB_E_UNTRUSTED;
    }
    if (strstr(text, "has a backup running already") != NULL ||
        strstr(text, "is in use by another backup") != NULL) {
        return QLB_E_BUSY;
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
                 qmp->target, command, text == NULL ? "failed" : text);
    }
    return json_incref(result);
}

struct qmp *qmp_new(const struct qmp_ops *ops, void *opaque,
                    const char *target, struct qlb_error *err)
{
    struct qmp *qmp = calloc(1, sizeof(*qmp));

    if (qmp != NULL) {
        qmp->target = strdup(target);
    }
    if (qmp == NULL || qmp->target == NULL) {
        free(qmp);
        ops->close(opaque);
        qlb_fail_errno(err, ENOMEM, "%s", target);
        return NULL;
    }
    qmp->ops = ops;
    qmp->opaque = opaque;
    qmp->interruptible = true;
    return qmp;
}

void qmp_close(struct qmp *qmp)
{
    if (qmp == NULL) {
        return;
    }
    qmp->ops->close(qmp->opaque);
    free(qmp->target);
    free(qmp);
}

json_t *qmp_call(struct qmp *qmp, const char *command, json_t *arguments,
                 struct qlb_error *err)
{
    json_t *request = json_pack("{s:s}", "execute", command);
    json_t *answer, *result;

    if (arguments != NULL) {
        json_object_set_new(request, "arguments", arguments);
    }
    answer = qmp->ops->call(qmp->opaque, request, qmp->interruptible, err);
    json_decref(request);
    qmp->answered = answer != NULL;
    if (answer == NULL) {
        return NULL;
    }
    result = take_result(qmp, command, answer, err);
    json_decref(answer);
    return result;
}

bool qmp_was_answered(const struct qmp *qmp)
{
    return qmp->answered;
}

void qmp_set_interruptible(struct qmp *qmp, bool interruptible)
{
    qmp->interruptible = interruptible;
}

bool qmp_has_command(struct qmp *qmp, const char *command)
{
    struct qlb_error ignored;
    json_t *commands = qmp_call(qmp, "query-commands", NULL, &ignored);
    json_t *entry;
    bool found = false;
    size_t i;

    json_array_foreach(commands, i, entry) {
        const char *name = json_string_value(json_object_get(entry, "name"));

        found = found || (name != NULL && strcmp(name, command) == 0);
    }
    json_decref(commands);
    return found;
}

/* ---- lines ---- */

/* A monitor on a Unix socket. */
struct wire {
    int fd;
    char *path;
    bool interruptible;
    bool dead;           /* QEMU has gone, or hangs */
    uint64_t id;
    char *buf;           /* what was received */
    size_t room, used;
    size_t line;         /* length of the line that was handed out */
};

/* Waits until the socket is ready, not beyond the deadline. */
static int wait_for(struct wire *wire, short events, double deadline,
                    struct qlb_error *err)
{
    for (;;) {
        struct pollfd p = { .fd = wire->fd, .events = events };
        double left = deadline - tool_clock();
        int ret;

        if (wire->interruptible && tool_stop) {
            return qlb_fail(err, QLB_E_RUNTIME, "interrupted");
        }
        if (left <= 0) {
            wire->dead = true;
            return qlb_fail(err, QLB_E_RUNTIME, "%s: QEMU does not answer%s",
                            wire->path, wire->id > 0 ? "" : "; has its monitor "
                            "another client?");
        }
        ret = poll(&p, 1, left > 0.2 ? 200 : (int)(left * 1000) + 1);
        if (ret < 0 && errno != EINTR) {
            return qlb_fail_errno(err, errno, "%s", wire->path);
        }
        if (ret > 0) {
            return 0;
        }
    }
}

static int hung_up(struct wire *wire, struct qlb_error *err)
{
    wire->dead = true;
    return qlb_fail(err, QLB_E_RUNTIME, "%s: QEMU has closed the connection",
                    wire->path);
}

static int send_all(struct wire *wire, const char *text, size_t len,
                    double deadline, struct qlb_error *err)
{
    while (len > 0) {
        ssize_t n;

        if (wait_for(wire, POLLOUT, deadline, err) < 0) {
            return -1;
        }
        n = send(wire->fd, text, len, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && (errno == EPIPE || errno == ECONNRESET)) {
            return hung_up(wire, err);
        }
        if (n < 0 && errno != EINTR && errno != EAGAIN) {
            return qlb_fail_errno(err, errno, "%s", wire->path);
        }
        if (n > 0) {
            text += n;
            len -= (size_t)n;
        }
    }
    return 0;
}

static int make_room(struct wire *wire, struct qlb_error *err)
{
    size_t room = wire->room == 0 ? 65536 : 2 * wire->room;
    char *buf;

    if (wire->used < wire->room) {
        return 0;
    }
    if (room > MAX_LINE) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: QEMU's answer is too long",
                        wire->path);
    }
    buf = realloc(wire->buf, room);
    if (buf == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", wire->path);
    }
    wire->buf = buf;
    wire->room = room;
    return 0;
}

/* The next line is at the start of the buffer, wire->line bytes long. */
static int read_line(struct wire *wire, double deadline, struct qlb_error *err)
{
    memmove(wire->buf, wire->buf + wire->line, wire->used - wire->line);
    wire->used -= wire->line;
    wire->line = 0;
    for (size_t searched = 0; ; ) {
        const char *end = memchr(wire->buf + searched, '\n',
                                 wire->used - searched);
        ssize_t n;

        if (end != NULL) {
            wire->line = (size_t)(end - wire->buf) + 1;
            return 0;
        }
        searched = wire->used;
        if (make_room(wire, err) < 0 ||
            wait_for(wire, POLLIN, deadline, err) < 0) {
            return -1;
        }
        n = recv(wire->fd, wire->buf + wire->used, wire->room - wire->used,
                 MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno == ECONNRESET)) {
            return hung_up(wire, err);
        }
        if (n < 0 && errno != EINTR && errno != EAGAIN) {
            return qlb_fail_errno(err, errno, "%s", wire->path);
        }
        wire->used += n > 0 ? (size_t)n : 0;
    }
}

/* The next object that is no event. */
static json_t *read_object(struct wire *wire, double deadline,
                           struct qlb_error *err)
{
    for (;;) {
        json_t *object;

        if (read_line(wire, deadline, err) < 0) {
            return NULL;
        }
        object = json_loadb(wire->buf, wire->line, 0, NULL);
        if (!json_is_object(object)) {
            json_decref(object);
            qlb_fail(err, QLB_E_RUNTIME, "%s: what answers there is no QMP "
                     "monitor", wire->path);
            return NULL;
        }
        if (json_object_get(object, "event") == NULL) {
            return object;
        }
        json_decref(object);
    }
}

/* ---- a monitor on a socket ---- */

static int send_command(struct wire *wire, json_t *request, double deadline,
                        struct qlb_error *err)
{
    char *text;
    int ret;

    json_object_set_new(request, "id", json_integer((json_int_t)++wire->id));
    text = json_dumps(request, JSON_COMPACT);
    if (text == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", wire->path);
    }
    ret = wire->dead ? hung_up(wire, err)
                     : send_all(wire, text, strlen(text), deadline, err);
    free(text);
    return ret < 0 ? -1 : send_all(wire, "\n", 1, deadline, err);
}

static json_t *wire_call(void *opaque, json_t *request, bool interruptible,
                         struct qlb_error *err)
{
    struct wire *wire = opaque;
    double deadline = tool_clock() + QMP_PATIENCE;

    wire->interruptible = interruptible;
    if (send_command(wire, request, deadline, err) < 0) {
        return NULL;
    }
    for (;;) {
        json_t *answer = read_object(wire, deadline, err);
        json_t *id = json_object_get(answer, "id");

        /* QEMU answers without an id what it could not parse. */
        if (answer == NULL || id == NULL ||
            (uint64_t)json_integer_value(id) == wire->id) {
            return answer;
        }
        json_decref(answer);
    }
}

static int connect_to(struct wire *wire, struct qlb_error *err)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };

    if (strlen(wire->path) >= sizeof(address.sun_path)) {
        return qlb_fail_errno(err, ENAMETOOLONG, "%s", wire->path);
    }
    strcpy(address.sun_path, wire->path);
    wire->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (wire->fd < 0 || connect(wire->fd, (struct sockaddr *)&address,
                               sizeof(address)) < 0) {
        return qlb_fail_errno(err, errno, "%s", wire->path);
    }
    return 0;
}

static int take_greeting(struct wire *wire, struct qlb_error *err)
{
    json_t *object = read_object(wire, tool_clock() + GREETING_PATIENCE, err);
    bool greeting = json_object_get(object, "QMP") != NULL;

    if (object == NULL) {
        return -1;
    }
    json_decref(object);
    return greeting ? 0 : qlb_fail(err, QLB_E_RUNTIME, "%s: what answers there "
                                   "is no QMP monitor", wire->path);
}

static void wire_close(void *opaque)
{
    struct wire *wire = opaque;

    if (wire->fd >= 0) {
        close(wire->fd);
    }
    free(wire->buf);
    free(wire->path);
    free(wire);
}

static struct wire *wire_new(const char *path, struct qlb_error *err)
{
    struct wire *wire = calloc(1, sizeof(*wire));

    if (wire == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", path);
        return NULL;
    }
    wire->fd = -1;
    wire->interruptible = true;
    wire->path = strdup(path);
    if (wire->path == NULL || make_room(wire, err) < 0) {
        wire_close(wire);
        qlb_fail_errno(err, ENOMEM, "%s", path);
        return NULL;
    }
    return wire;
}

static const struct qmp_ops wire_ops = {
    .call = wire_call,
    .close = wire_close,
};

struct qmp *qmp_connect(const char *path, struct qlb_error *err)
{
    struct wire *wire = wire_new(path, err);
    struct qmp *qmp;
    json_t *answer;

    if (wire == NULL) {
        return NULL;
    }
    if (connect_to(wire, err) < 0 || take_greeting(wire, err) < 0) {
        wire_close(wire);
        return NULL;
    }
    qmp = qmp_new(&wire_ops, wire, path, err);
    if (qmp == NULL) {
        return NULL;
    }
    answer = qmp_call(qmp, "qmp_capabilities", NULL, err);
    if (answer == NULL) {
        qmp_close(qmp);
        return NULL;
    }
    json_decref(answer);
    return qmp;
}

const json_t *qmp_find_block(const json_t *devices, const char *node)
{
    const json_t *entry;
    size_t i;

    json_array_foreach(devices, i, entry) {
        const char *name = json_string_value(json_object_get(
            json_object_get(entry, "inserted"), "node-name"));

        if (name != NULL && strcmp(name, node) == 0) {
            return entry;
        }
    }
    return NULL;
}
