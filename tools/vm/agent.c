/* A client of the QEMU guest agent.
 *
 * Both sides send JSON objects, one a line. A channel has no connections: what
 * comes out of it first may be the rest of an answer to somebody else. So a
 * synchronisation sends a number that is new, and waits for it; in front of the
 * answer is a byte that is in no JSON, 0xFF, and one before the request clears
 * what the agent may have of a broken one.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/agent.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* Of an answer, its end included. Those that we ask for have some 30 bytes,
 * errors a sentence. */
enum { MAX_ANSWER = 64 << 10 };
/* Of what is in the channel before the answer to a synchronisation. */
enum { MAX_STALE = 4 << 20 };

#define DELIMITER '\xff'

struct agent {
    int fd;
    char *path;
    unsigned patience;
    const char *command; /* that is waited for; NULL: a synchronisation */
    bool answered;
    size_t used, line;   /* as in qmp.c */
    char buf[MAX_ANSWER];
};

/* ---- lines ---- */

static int wait_for(struct agent *agent, short events, double deadline,
                    struct qlb_error *err)
{
    for (;;) {
        struct pollfd p = { .fd = agent->fd, .events = events };
        double left = deadline - tool_clock();
        int ret;

        if (left <= 0) {
            return qlb_fail(err, QLB_E_RUNTIME, "%s: the guest agent does not "
                            "answer%s%s", agent->path,
                            agent->command == NULL ? "" : " to ",
                            agent->command == NULL ? "" : agent->command);
        }
        ret = poll(&p, 1, (int)(left * 1000) + 1);
        if (ret > 0) {
            return 0;
        }
        if (ret < 0 && errno != EINTR) {
            return qlb_fail_errno(err, errno, "%s", agent->path);
        }
    }
}

static int closed(const struct agent *agent, struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_RUNTIME, "%s: the connection to the guest agent "
                    "was closed", agent->path);
}

static int send_all(struct agent *agent, const char *text, size_t len,
                    double deadline, struct qlb_error *err)
{
    while (len > 0) {
        ssize_t n;

        if (wait_for(agent, POLLOUT, deadline, err) < 0) {
            return -1;
        }
        n = send(agent->fd, text, len, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && (errno == EPIPE || errno == ECONNRESET)) {
            return closed(agent, err);
        }
        if (n < 0 && errno != EINTR && errno != EAGAIN) {
            return qlb_fail_errno(err, errno, "%s", agent->path);
        }
        if (n > 0) {
            text += n;
            len -= (size_t)n;
        }
    }
    return 0;
}

/* At least one byte more, for which there is room. */
static int receive(struct agent *agent, double deadline, struct qlb_error *err)
{
    for (;;) {
        ssize_t n;

        if (wait_for(agent, POLLIN, deadline, err) < 0) {
            return -1;
        }
        n = recv(agent->fd, agent->buf + agent->used,
                 sizeof(agent->buf) - agent->used, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno == ECONNRESET)) {
            return closed(agent, err);
        }
        if (n < 0 && errno != EINTR && errno != EAGAIN) {
            return qlb_fail_errno(err, errno, "%s", agent->path);
        }
        if (n > 0) {
            agent->used += (size_t)n;
            return 0;
        }
    }
}

static void drop(struct agent *agent, size_t len)
{
    memmove(agent->buf, agent->buf + len, agent->used - len);
    agent->used -= len;
}

/* The next line is at the start of the buffer, agent->line bytes long. */
static int read_line(struct agent *agent, double deadline,
                     struct qlb_error *err)
{
    drop(agent, agent->line);
    agent->line = 0;
    for (;;) {
        const char *end = memchr(agent->buf, '\n', agent->used);

        if (end != NULL) {
            agent->line = (size_t)(end - agent->buf) + 1;
            return 0;
        }
        if (agent->used == sizeof(agent->buf)) {
            return qlb_fail(err, QLB_E_RUNTIME, "%s: the guest agent's answer "
                            "is too long", agent->path);
        }
        if (receive(agent, deadline, err) < 0) {
            return -1;
        }
    }
}

/* ---- synchronisation ---- */

static int send_object(struct agent *agent, const char *before,
                       json_t *object, double deadline, struct qlb_error *err)
{
    char *text = json_dumps(object, JSON_COMPACT);
    int ret = -1;

    if (text == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", agent->path);
    }
    if (send_all(agent, before, strlen(before), deadline, err) == 0 &&
        send_all(agent, text, strlen(text), deadline, err) == 0) {
        ret = send_all(agent, "\n", 1, deadline, err);
    }
    free(text);
    return ret;
}

/* Everything up to the next delimiter, and that, is dropped. */
static int skip_to_delimiter(struct agent *agent, size_t *stale,
                             double deadline, struct qlb_error *err)
{
    for (;;) {
        const char *at = memchr(agent->buf, DELIMITER, agent->used);
        size_t len = at == NULL ? agent->used
                                : (size_t)(at - agent->buf) + 1;

        agent->line = 0;
        drop(agent, len);
        *stale += len;
        if (at != NULL) {
            return 0;
        }
        if (*stale > MAX_STALE) {
            return qlb_fail(err, QLB_E_RUNTIME, "%s: what answers there is no "
                            "guest agent", agent->path);
        }
        if (receive(agent, deadline, err) < 0) {
            return -1;
        }
    }
}

/* The answer to somebody else's is passed over, also where it breaks off. */
static int await_sync(struct agent *agent, json_int_t id, double deadline,
                      struct qlb_error *err)
{
    size_t stale = 0;

    for (;;) {
        json_t *answer, *value;
        bool right;

        if (skip_to_delimiter(agent, &stale, deadline, err) < 0) {
            return -1;
        }
        if (read_line(agent, deadline, err) < 0) {
            return -1;
        }
        if (memchr(agent->buf, DELIMITER, agent->line) != NULL) {
            agent->line = 0;
            continue;
        }
        answer = json_loadb(agent->buf, agent->line, 0, NULL);
        value = json_object_get(answer, "return");
        right = json_is_integer(value) && json_integer_value(value) == id;
        json_decref(answer);
        if (right) {
            return 0;
        }
    }
}

int agent_sync(struct agent *agent, struct qlb_error *err)
{
    double deadline = tool_clock() + agent->patience;
    uint64_t random;
    json_t *request;
    json_int_t id;
    int ret;

    agent->command = NULL;
    if (getrandom(&random, sizeof(random), 0) != sizeof(random)) {
        return qlb_fail_errno(err, errno, "%s: random numbers", agent->path);
    }
    /* what a double holds, should the agent's JSON know no other numbers */
    id = (json_int_t)(random >> 11);
    request = json_pack("{s:s, s:{s:I}}", "execute", "guest-sync-delimited",
                        "arguments", "id", id);
    ret = send_object(agent, "\xff", request, deadline, err);
    json_decref(request);
    return ret < 0 ? -1 : await_sync(agent, id, deadline, err);
}

/* ---- commands ---- */

static int odd_answer(const struct agent *agent, const char *command,
                      struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_RUNTIME, "%s: %s: the guest agent's answer is "
                    "not what it should be", agent->path, command);
}

/* The guest's own words, made fit for one line. */
static int refused(const struct agent *agent, const char *command,
                   const json_t *error, struct qlb_error *err)
{
    const char *text = json_string_value(json_object_get(error, "desc"));
    char copy[256];
    size_t len = 0;

    for (; text != NULL && text[len] != '\0' && len + 1 < sizeof(copy);
         len++) {
        unsigned char c = (unsigned char)text[len];

        copy[len] = c < ' ' || c == 127 ? '?' : text[len];
    }
    copy[len] = '\0';
    return len == 0 ? odd_answer(agent, command, err)
                    : qlb_fail(err, QLB_E_RUNTIME, "%s: %s: %s", agent->path,
                               command, copy);
}

/* What the agent returns, for the caller to release. */
static json_t *call(struct agent *agent, const char *command,
                    struct qlb_error *err)
{
    double deadline = tool_clock() + agent->patience;
    json_t *request = json_pack("{s:s}", "execute", command);
    json_t *answer, *value;
    int ret;

    agent->command = command;
    agent->answered = false;
    ret = send_object(agent, "", request, deadline, err);
    json_decref(request);
    if (ret < 0 || read_line(agent, deadline, err) < 0) {
        return NULL;
    }
    agent->answered = true;
    answer = json_loadb(agent->buf, agent->line, 0, NULL);
    value = json_incref(json_object_get(answer, "return"));
    if (value == NULL && json_object_get(answer, "error") != NULL) {
        refused(agent, command, json_object_get(answer, "error"), err);
    } else if (value == NULL) {
        odd_answer(agent, command, err);
    }
    json_decref(answer);
    return value;
}

static int call_count(struct agent *agent, const char *command, unsigned *n,
                      struct qlb_error *err)
{
    json_t *value = call(agent, command, err);
    json_int_t count = json_integer_value(value);
    bool good = json_is_integer(value) && count >= 0 && count <= 1 << 20;

    if (value == NULL) {
        return -1;
    }
    json_decref(value);
    *n = (unsigned)count;
    return good ? 0 : odd_answer(agent, command, err);
}

int agent_freeze(struct agent *agent, unsigned *n, struct qlb_error *err)
{
    return call_count(agent, "guest-fsfreeze-freeze", n, err);
}

int agent_thaw(struct agent *agent, unsigned *n, struct qlb_error *err)
{
    return call_count(agent, "guest-fsfreeze-thaw", n, err);
}

int agent_is_frozen(struct agent *agent, bool *frozen, struct qlb_error *err)
{
    static const char command[] = "guest-fsfreeze-status";
    json_t *value = call(agent, command, err);
    const char *text = json_string_value(value);
    bool good;

    if (value == NULL) {
        return -1;
    }
    *frozen = text != NULL && strcmp(text, "frozen") == 0;
    good = *frozen || (text != NULL && strcmp(text, "thawed") == 0);
    json_decref(value);
    return good ? 0 : odd_answer(agent, command, err);
}

bool agent_was_answered(const struct agent *agent)
{
    return agent->answered;
}

/* ---- connecting ---- */

/* At once: QEMU takes one client for the channel, others wait in the queue. */
static int connect_to(struct agent *agent, struct qlb_error *err)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };

    if (strlen(agent->path) >= sizeof(address.sun_path)) {
        return qlb_fail_errno(err, ENAMETOOLONG, "%s", agent->path);
    }
    strcpy(address.sun_path, agent->path);
    agent->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (agent->fd < 0 || connect(agent->fd, (struct sockaddr *)&address,
                                 sizeof(address)) < 0) {
        return qlb_fail_errno(err, errno, "%s", agent->path);
    }
    return 0;
}

struct agent *agent_connect(const char *path, unsigned patience,
                            struct qlb_error *err)
{
    struct agent *agent = calloc(1, sizeof(*agent));

    if (agent != NULL) {
        agent->fd = -1;
        agent->patience = patience;
        agent->path = strdup(path);
    }
    if (agent == NULL || agent->path == NULL) {
        agent_close(agent);
        qlb_fail_errno(err, ENOMEM, "%s", path);
        return NULL;
    }
    if (connect_to(agent, err) < 0) {
        agent_close(agent);
        return NULL;
    }
    return agent;
}

void agent_close(struct agent *agent)
{
    if (agent == NULL) {
        return;
    }
    if (agent->fd >= 0) {
        close(agent->fd);
    }
    free(agent->path);
    free(agent);
}
