/* A chain of archives, served as a disk by nbdkit and our plugin for it.
 *
 * nbdkit may be ended by SIGKILL alone: at any other signal it answers what a
 * guest is about to read with an error, where a lost connection is one that QEMU
 * waits for. So signals are blocked for it, and it is a child of our child, the
 * keeper, which kills it when we are gone, so that none is left that nobody
 * knows of. What it writes to standard error comes to us through a pipe.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/nbdkit_server.h"

#include <errno.h>
#include <fcntl.h>
#include <libnbd.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PLUGIN_VARIABLE "LBVM_NBDKIT_PLUGIN"
/* One that ends again and again is of no use. */
enum { MAX_RESTARTS = 20, LOG_SIZE = 1024 };
/* Seconds for it to be ready. */
enum { START_PATIENCE = 120 };

static const struct timespec nap = { .tv_nsec = 5 * 1000 * 1000 };

struct nbdkit_server {
    char *name, *socket;
    char **arguments;     /* of nbdkit; NULL-terminated */
    pid_t pid;            /* of its keeper; 0: none */
    int life;             /* nobody writes to it; closed, nbdkit ends; -1 */
    int log;              /* its standard error; -1: none */
    char line[LOG_SIZE];  /* what has come of the next line, */
    size_t used;          /* that many bytes */
    char last[LOG_SIZE];  /* the last message, */
    bool told;            /* which was passed on */
    bool damage;
    unsigned restarts;
};

/* ---- what it says ---- */

/* "nbdkit: lbz[1]: error: WHAT": WHAT. */
static void take_line(struct nbdkit_server *server, bool tell)
{
    const char *text = strstr(server->line, "error: ");

    if (text == NULL && server->last[0] != '\0') {
        return; /* where to find the manual */
    }
    text = text == NULL ? server->line : text + strlen("error: ");
    if (strstr(text, "damaged") != NULL) {
        server->damage = true;
    }
    /* A guest tries again what has failed, and again. */
    if (strcmp(text, server->last) != 0) {
        snprintf(server->last, sizeof(server->last), "%s", text);
        server->told = false;
    }
    if (tell && !server->told) {
        tool_message("%s: %s", server->name, text);
        server->told = true;
    }
}

/* All that has come; what is longer than a line may be, in pieces. */
static void read_log(struct nbdkit_server *server, bool tell)
{
    char text[LOG_SIZE];
    ssize_t n;

    while (server->log >= 0 &&
           (n = read(server->log, text, sizeof(text))) > 0) {
        for (ssize_t i = 0; i < n; i++) {
            bool full = server->used == sizeof(server->line) - 1;

            if (text[i] != '\n' && !full) {
                server->line[server->used++] = text[i];
                continue;
            }
            server->line[server->used] = '\0';
            server->used = 0;
            take_line(server, tell);
        }
    }
}

/* ---- the process ---- */

/* Signals are blocked. */
static _Noreturn void be_nbdkit(const struct nbdkit_server *server, int log)
{
    if (dup2(log, 2) < 0) {
        _exit(126);
    }
    closefrom(3);
    execvp(server->arguments[0], server->arguments);
    dprintf(2, "nbdkit can't be started: %s\n", strerror(errno));
    _exit(127);
}

static void ignore(int number)
{
    (void)number; /* only to end ppoll */
}

/* Locks, and the other ends of other keepers' pipes, are not to live on in this
 * process. */
static void keep_only(int a, int b)
{
    unsigned low = (unsigned)(a < b ? a : b), high = (unsigned)(a < b ? b : a);
    int null = open("/dev/null", O_RDWR);

    if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 ||
        dup2(null, 2) < 0 || (low > 3 && close_range(3, low - 1, 0) < 0) ||
        (high > low + 1 && close_range(low + 1, high - 1, 0) < 0) ||
        close_range(high + 1, ~0u, 0) < 0) {
        _exit(126);
    }
}

/* Ends as nbdkit does; or, when the other end of `life` is closed, after it. */
static _Noreturn void be_keeper(const struct nbdkit_server *server, int log,
                                int life)
{
    struct pollfd poll = { .fd = life, .events = POLLIN };
    sigset_t all, child_alone;
    int status = 0;
    pid_t pid;

    keep_only(log, life);
    setpgid(0, 0); /* a Ctrl-C is for lbvm to judge */
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    for (int number = 1; number < NSIG; number++) {
        signal(number, SIG_DFL);
    }
    pid = fork();
    if (pid == 0) {
        be_nbdkit(server, log);
    }
    signal(SIGCHLD, ignore);
    close(log);
    sigdelset(&all, SIGCHLD);
    child_alone = all;
    while (pid > 0 && waitpid(pid, &status, WNOHANG) == 0) {
        if (ppoll(&poll, 1, NULL, &child_alone) > 0) {
            kill(pid, SIGKILL);
            waitpid(pid, &status, 0);
        }
    }
    if (pid > 0 && WIFSIGNALED(status)) {
        kill(getpid(), SIGKILL);
    }
    _exit(pid > 0 ? WEXITSTATUS(status) : 126);
}

static int fork_keeper(struct nbdkit_server *server, const int log[2],
                       const int life[2], struct qlb_error *err)
{
    server->pid = fork();
    if (server->pid == 0) {
        close(life[1]);
        be_keeper(server, log[1], life[0]);
    }
    close(log[1]);
    close(life[0]);
    server->log = log[0];
    server->life = life[1];
    if (server->pid < 0) {
        server->pid = 0;
        return qlb_fail_errno(err, errno, "%s", server->name);
    }
    return fcntl(server->log, F_SETFL, O_NONBLOCK) < 0
               ? qlb_fail_errno(err, errno, "%s", server->name) : 0;
}

static int launch(struct nbdkit_server *server, struct qlb_error *err)
{
    int log[2], life[2];

    /* Of one that was killed, with who had started it. */
    unlink(server->socket);
    server->used = 0;
    server->last[0] = '\0';
    if (pipe2(log, O_CLOEXEC) < 0) {
        return qlb_fail_errno(err, errno, "%s", server->name);
    }
    if (pipe2(life, O_CLOEXEC) < 0) {
        close(log[0]);
        close(log[1]);
        return qlb_fail_errno(err, errno, "%s", server->name);
    }
    return fork_keeper(server, log, life, err);
}

/* Whether it has ended by itself: it is waited for then, and why is told. */
static bool has_ended(struct nbdkit_server *server, char why[64])
{
    int status;

    if (server->pid == 0 ||
        waitpid(server->pid, &status, WNOHANG) != server->pid) {
        return false;
    }
    server->pid = 0;
    if (WIFSIGNALED(status)) {
        snprintf(why, 64, "was killed by signal %d", WTERMSIG(status));
    } else {
        snprintf(why, 64, "ended with status %d", WEXITSTATUS(status));
    }
    return true;
}

static void close_pipes(struct nbdkit_server *server)
{
    if (server->log >= 0) {
        close(server->log);
    }
    if (server->life >= 0) {
        close(server->life);
    }
    server->log = server->life = -1;
}

/* It opens its archives first, then the socket. */
static bool is_ready(const struct nbdkit_server *server)
{
    struct nbd_handle *nbd = nbd_create();
    bool ready = nbd != NULL && nbd_connect_unix(nbd, server->socket) == 0;

    if (ready) {
        nbd_shutdown(nbd, 0);
    }
    nbd_close(nbd);
    return ready;
}

static int start(struct nbdkit_server *server, struct qlb_error *err)
{
    double deadline = tool_clock() + START_PATIENCE;
    char why[64];

    if (launch(server, err) < 0) {
        return -1;
    }
    while (!is_ready(server)) {
        if (has_ended(server, why)) {
            read_log(server, false);
            close_pipes(server);
            return qlb_fail(err, QLB_E_RUNTIME, "%s: nbdkit %s: %s",
                            server->name, why, server->last[0] == '\0'
                                ? "it said nothing" : server->last);
        }
        if (tool_stop || tool_clock() > deadline) {
            return qlb_fail(err, QLB_E_RUNTIME, "%s: %s", server->name,
                            tool_stop ? "interrupted"
                                      : "nbdkit does not get ready");
        }
        read_log(server, false);
        nanosleep(&nap, NULL);
    }
    return 0;
}

/* Its keeper sees that the pipe is closed. */
static void stop(struct nbdkit_server *server)
{
    close_pipes(server);
    if (server->pid != 0) {
        waitpid(server->pid, NULL, 0);
        server->pid = 0;
    }
}

/* ---- its arguments ---- */

/* That of the environment; the one that was installed with us; the one that
 * nbdkit finds by itself. */
const char *nbdkit_server_plugin(void)
{
    const char *plugin = getenv(PLUGIN_VARIABLE);

    if (plugin != NULL && *plugin != '\0') {
        return plugin;
    }
    return access(NBDKIT_PLUGIN, R_OK) == 0 ? NBDKIT_PLUGIN : "lbz";
}

static int make_arguments(struct nbdkit_server *server,
                          const char *const *archives, unsigned n,
                          const struct qlb_uuid *checkpoint)
{
    char uuid[QLB_UUID_TEXT];
    const char *const fixed[] = {
        "nbdkit", "--foreground", "--readonly", "--log=stderr", "--unix",
        server->socket, nbdkit_server_plugin(),
    };
    enum { N_FIXED = sizeof(fixed) / sizeof(fixed[0]) };
    unsigned count = 0;
    char *text;

    server->arguments = calloc(N_FIXED + n + 2, sizeof(char *));
    if (server->arguments == NULL) {
        return -1;
    }
    for (unsigned i = 0; i < N_FIXED + n + 1; i++) {
        int ret = i < N_FIXED ? asprintf(&text, "%s", fixed[i])
                  : i < N_FIXED + n
                      ? asprintf(&text, "file=%s", archives[i - N_FIXED])
                      : asprintf(&text, "at=%s",
                                 qlb_uuid_format(checkpoint, uuid));

        if (ret < 0) {
            return -1;
        }
        server->arguments[count++] = text;
    }
    return 0;
}

/* ---- from outside ---- */

static int prepare(struct nbdkit_server *server, const char *name,
                   const char *socket, const char *const *archives,
                   unsigned n, const struct qlb_uuid *checkpoint,
                   struct qlb_error *err)
{
    const struct sockaddr_un *address = NULL;

    if (strlen(socket) >= sizeof(address->sun_path)) {
        return qlb_fail(err, QLB_E_USAGE, "%s: too long for the path of a "
                        "socket", socket);
    }
    server->name = strdup(name);
    server->socket = strdup(socket);
    return server->name == NULL || server->socket == NULL ||
           make_arguments(server, archives, n, checkpoint) < 0
               ? qlb_fail_errno(err, ENOMEM, "%s", name) : 0;
}

struct nbdkit_server *nbdkit_server_start(const char *name, const char *socket,
                                          const char *const *archives,
                                          unsigned n,
                                          const struct qlb_uuid *checkpoint,
                                          struct qlb_error *err)
{
    struct nbdkit_server *server = calloc(1, sizeof(*server));

    if (server == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", name);
        return NULL;
    }
    server->log = server->life = -1;
    if (prepare(server, name, socket, archives, n, checkpoint, err) < 0 ||
        start(server, err) < 0) {
        nbdkit_server_stop(server);
        return NULL;
    }
    return server;
}

int nbdkit_server_look_after(struct nbdkit_server *server,
                             struct qlb_error *err)
{
    char why[64];

    read_log(server, true);
    if (!has_ended(server, why)) {
        return 0;
    }
    read_log(server, true);
    close_pipes(server);
    if (tool_stop) {
        return 0; /* the same signal may have been for all */
    }
    if (server->restarts++ == MAX_RESTARTS) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: nbdkit %s, once more",
                        server->name, why);
    }
    tool_message("%s: nbdkit %s; starting it again", server->name, why);
    return start(server, err);
}

bool nbdkit_server_saw_damage(const struct nbdkit_server *server)
{
    return server->damage;
}

void nbdkit_server_stop(struct nbdkit_server *server)
{
    if (server == NULL) {
        return;
    }
    stop(server);
    if (server->arguments != NULL) {
        unlink(server->socket);
        for (char **at = server->arguments; *at != NULL; at++) {
            free(*at);
        }
    }
    free(server->arguments);
    free(server->name);
    free(server->socket);
    free(server);
}
