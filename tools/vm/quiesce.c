/* The guest's file systems stand still while the point in time is made.
 *
 * The guardian and we talk through a socket pair that keeps messages apart:
 *
 *     guardian: frozen, or failed
 *     we:       (one byte)                to thaw
 *     guardian: thawed, or failed
 *
 * The end of the connection, which the kernel makes when we die, means to thaw,
 * too. The guardian has a session of its own and lets no signal stop it but
 * SIGKILL; nothing else of ours is open in it, so locks and monitors are free
 * when we die. Should it be killed, we thaw ourselves.
 *
 * A command to freeze that was sent may be done later, though no answer came:
 * then the guardian stays behind and thaws until that succeeds.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/quiesce.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vm/agent.h"
#include "vm/domain.h"

/* Seconds. */
enum { DEFAULT_LIMIT = 10, DEFAULT_PATIENCE = 10 };
/* How long the guardian tries to thaw what does not thaw. */
enum { RESCUE = 600 };

enum message_kind { FROZEN, THAWED, FAILED };

struct message {
    enum message_kind kind;
    bool kept;    /* THAWED; where not, err tells why */
    bool unknown; /* FAILED: something may be frozen still */
    struct qlb_error err;
};

struct quiesce {
    const struct quiesce_options *options;
    int fd;       /* -1: nothing is frozen */
    pid_t pid;
};

static unsigned limit_of(const struct quiesce_options *options)
{
    return options->limit == 0 ? DEFAULT_LIMIT : options->limit;
}

static unsigned patience_of(const struct quiesce_options *options)
{
    return options->patience == 0 ? DEFAULT_PATIENCE : options->patience;
}

static const char *target_of(const struct quiesce_options *options)
{
    return options->agent != NULL ? options->agent : options->domain;
}

/* ---- the two ways to a guest ---- */

struct guest {
    const struct quiesce_options *options;
    struct agent *agent;
    struct domain *domain;
    unsigned n_frozen;
    bool gone;    /* nobody has the socket: its QEMU has ended */
};

static void leave(struct guest *guest)
{
    agent_close(guest->agent);
    domain_close(guest->domain);
    guest->agent = NULL;
    guest->domain = NULL;
}

/* After it an agent has answered: only then we ask for more. */
static int reach(struct guest *guest, struct qlb_error *err)
{
    const struct quiesce_options *options = guest->options;

    leave(guest);
    if (options->agent != NULL) {
        guest->agent = agent_connect(options->agent, patience_of(options),
                                     err);
        guest->gone = guest->agent == NULL;
        return guest->gone ? -1 : agent_sync(guest->agent, err);
    }
    guest->domain = domain_open(options->uri, options->domain, err);
    return guest->domain == NULL ? -1 : domain_ping_agent(guest->domain, err);
}

static int freeze(struct guest *guest, struct qlb_error *err)
{
    int ret = guest->agent != NULL
                  ? agent_freeze(guest->agent, &guest->n_frozen, err)
                  : domain_freeze(guest->domain, &guest->n_frozen, err);

    if (ret == 0 && guest->n_frozen == 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the guest agent froze no file "
                        "system", target_of(guest->options));
    }
    return ret;
}

/* Whether somebody else has not thawed it, as Windows does after a while.
 * libvirt does not tell, but counts what it thaws. */
static bool still_frozen(struct guest *guest)
{
    struct qlb_error ignored;
    bool frozen = true;

    return guest->agent == NULL ||
           (agent_is_frozen(guest->agent, &frozen, &ignored) == 0 && frozen);
}

static int thaw(struct guest *guest, unsigned *n, struct qlb_error *err)
{
    return guest->agent != NULL ? agent_thaw(guest->agent, n, err)
                                : domain_thaw(guest->domain, n, err);
}

static bool was_answered(const struct guest *guest)
{
    return guest->agent != NULL ? agent_was_answered(guest->agent)
                                : domain_was_answered(guest->domain);
}

/* Thaws until it succeeds, from the connection on. frozen: we know that it is;
 * else who refuses to thaw has nothing to thaw. */
static void rescue(struct guest *guest, bool frozen)
{
    double end = tool_clock() + RESCUE;
    struct qlb_error ignored;
    unsigned n;

    do {
        if (reach(guest, &ignored) == 0 &&
            (thaw(guest, &n, &ignored) == 0 ||
             (!frozen && was_answered(guest)))) {
            return;
        }
        sleep(1);
    } while (!guest->gone && tool_clock() < end);
}

/* ---- the guardian ---- */

/* Nobody may be there to listen. */
static void tell(int fd, const struct message *message)
{
    ssize_t ignored = send(fd, message, sizeof(*message), MSG_NOSIGNAL);

    (void)ignored;
}

/* Whether we are told to thaw, or alone, before the time has passed. The order
 * is read: a socket that is closed with something unread in it takes from the
 * other side what it has not read either. */
static bool await_order(int fd, double deadline)
{
    for (;;) {
        struct pollfd p = { .fd = fd, .events = POLLIN };
        double left = deadline - tool_clock();
        char order;

        if (left <= 0) {
            return false;
        }
        if (poll(&p, 1, (int)(left * 1000) + 1) > 0 &&
            (recv(fd, &order, 1, MSG_DONTWAIT) >= 0 || errno != EINTR)) {
            return true;
        }
    }
}

static void await_any_order(int fd)
{
    while (!await_order(fd, tool_clock() + 3600)) {
    }
}

static void set_lost(struct message *message, const struct guest *guest)
{
    message->kept = false;
    qlb_fail(&message->err, QLB_E_RUNTIME, "%s: the guest's file systems were "
             "thawed by somebody else", target_of(guest->options));
}

static void set_late(struct message *message, const struct guest *guest)
{
    unsigned limit = limit_of(guest->options);

    message->kept = false;
    qlb_fail(&message->err, QLB_E_RUNTIME, "%s: the guest was thawed after %u "
             "second%s, the time limit", target_of(guest->options), limit,
             limit == 1 ? "" : "s");
}

static void guard(struct guest *guest, int fd)
{
    struct message message = { .kind = THAWED, .kept = true };
    bool in_time = await_order(fd, tool_clock() + limit_of(guest->options));
    unsigned n;

    if (in_time && !still_frozen(guest)) {
        set_lost(&message, guest);
    }
    if (thaw(guest, &n, &message.err) < 0) {
        message.kind = FAILED;
        message.unknown = true;
    } else if (!in_time) {
        set_late(&message, guest);
    } else if (n < guest->n_frozen) {
        set_lost(&message, guest);
    }
    if (message.kind == FAILED) {
        if (in_time) {
            tell(fd, &message);
        }
        rescue(guest, true);
    }
    if (!in_time) {
        await_any_order(fd);
        tell(fd, &message);
    } else if (message.kind == THAWED) {
        tell(fd, &message);
    }
}

static void be_guardian(const struct quiesce_options *options, int fd)
{
    struct guest guest = { .options = options };
    struct message message = { .kind = FAILED };

    if (reach(&guest, &message.err) < 0) {
        tell(fd, &message);
    } else if (freeze(&guest, &message.err) < 0) {
        message.unknown = true;
        tell(fd, &message);
        rescue(&guest, false);
    } else {
        message.kind = FROZEN;
        tell(fd, &message);
        guard(&guest, fd);
    }
    leave(&guest);
}

/* Returns the only descriptor that stays open, but the standard ones, which
 * lead nowhere: who reads our output must not wait for the guardian. */
static int detach(int fd)
{
    static const int ignored[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE };
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);

    setsid();
    for (unsigned i = 0; i < sizeof(ignored) / sizeof(ignored[0]); i++) {
        signal(ignored[i], SIG_IGN);
    }
    /* both are above 2, or were 0, 1 or 2 because these were closed */
    fd = fcntl(fd, F_DUPFD_CLOEXEC, 16);
    for (int i = 0; i < 3 && null >= 0; i++) {
        dup2(null, i);
    }
    dup2(fd, 3);
    fcntl(3, F_SETFD, FD_CLOEXEC);
    closefrom(4);
    return 3;
}

/* ---- we ---- */

static int start_guardian(struct quiesce *quiesce, struct qlb_error *err)
{
    int fds[2];

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds) < 0) {
        return qlb_fail_errno(err, errno, "%s", target_of(quiesce->options));
    }
    quiesce->pid = fork();
    if (quiesce->pid == 0) {
        be_guardian(quiesce->options, detach(fds[1]));
        _exit(0);
    }
    close(fds[1]);
    if (quiesce->pid < 0) {
        int errnum = errno;

        close(fds[0]);
        return qlb_fail_errno(err, errnum, "%s", target_of(quiesce->options));
    }
    quiesce->fd = fds[0];
    return 0;
}

/* 1: a message; 0: the guardian has ended without one. */
static int receive(struct quiesce *quiesce, struct message *message,
                   bool interruptible, struct qlb_error *err)
{
    /* its own limits come first, unless libvirt hangs */
    double deadline = tool_clock() + 4 * patience_of(quiesce->options) + 10;

    for (;;) {
        struct pollfd p = { .fd = quiesce->fd, .events = POLLIN };

        if (interruptible && tool_stop) {
            return qlb_fail(err, QLB_E_RUNTIME, "interrupted");
        }
        if (tool_clock() > deadline) {
            return qlb_fail(err, QLB_E_RUNTIME, "%s: the guest agent does not "
                            "answer", target_of(quiesce->options));
        }
        if (poll(&p, 1, 200) > 0) {
            return recv(quiesce->fd, message, sizeof(*message), 0) ==
                   sizeof(*message);
        }
    }
}

/* The guardian thaws now, if it has not. wait: it has nothing more to do. */
static void part(struct quiesce *quiesce, bool wait)
{
    if (quiesce->fd >= 0) {
        close(quiesce->fd);
        waitpid(quiesce->pid, NULL, wait ? 0 : WNOHANG);
    }
    quiesce->fd = -1;
}

static int await_frozen(struct quiesce *quiesce, struct qlb_error *err)
{
    struct message message;
    int ret = receive(quiesce, &message, true, err);

    if (ret < 0) {
        part(quiesce, false);
        return -1;
    }
    if (ret == 0) {
        part(quiesce, true);
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the process that freezes was "
                        "killed", target_of(quiesce->options));
    }
    if (message.kind != FROZEN) {
        part(quiesce, !message.unknown);
        *err = message.err;
        return -1;
    }
    return 0;
}

struct quiesce *quiesce_begin(const struct quiesce_options *options,
                              struct qlb_error *err)
{
    struct quiesce *quiesce = calloc(1, sizeof(*quiesce));

    if (quiesce == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", target_of(options));
        return NULL;
    }
    quiesce->options = options;
    quiesce->fd = -1;
    if (start_guardian(quiesce, err) == 0 && await_frozen(quiesce, err) == 0) {
        return quiesce;
    }
    if (options->policy == QUIESCE_REQUIRE || tool_stop) {
        free(quiesce);
        return NULL;
    }
    tool_message("%s; going on without freezing the guest", err->message);
    return quiesce;
}

bool quiesce_is_frozen(const struct quiesce *quiesce)
{
    return quiesce->fd >= 0;
}

/* The guardian was killed. */
static int thaw_ourselves(const struct quiesce *quiesce, struct qlb_error *err)
{
    struct guest guest = { .options = quiesce->options };
    unsigned n;
    int ret = reach(&guest, err);

    if (ret == 0) {
        ret = thaw(&guest, &n, err);
    }
    leave(&guest);
    if (ret == 0) {
        qlb_fail(err, QLB_E_RUNTIME, "%s: the process that keeps the guest "
                 "frozen was killed", target_of(quiesce->options));
    }
    return ret;
}

static int end(struct quiesce *quiesce, bool *kept, struct qlb_error *err)
{
    struct message message;
    ssize_t sent = send(quiesce->fd, "", 1, MSG_NOSIGNAL);
    int ret = sent < 0 ? 0 : receive(quiesce, &message, false, err);

    if (ret < 0) {
        part(quiesce, false);
        return -1;
    }
    if (ret == 0) {
        part(quiesce, true);
        return thaw_ourselves(quiesce, err);
    }
    part(quiesce, message.kind == THAWED);
    *kept = message.kind == THAWED && message.kept;
    *err = message.err;
    return message.kind == THAWED ? 0 : -1;
}

int quiesce_end(struct quiesce *quiesce, bool *kept_until_now,
                struct qlb_error *err)
{
    int ret = 0;

    *kept_until_now = false;
    if (quiesce->fd >= 0) {
        ret = end(quiesce, kept_until_now, err);
        if (ret < 0) {
            qlb_error_prefix(err, "the guest's file systems may still be "
                             "frozen");
        }
    }
    free(quiesce);
    return ret;
}
