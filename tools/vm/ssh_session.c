/* A session with another host.
 *
 * The shell there gets the program first, of known length: "eval" of what "dd"
 * reads byte by byte, so that nothing of what follows is read ahead. That
 * one line is all that the login shell sees, whichever it is. The greeting
 * tells that it runs, and not what a start-up file prints.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/ssh_session.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static const char far_end[] =
#include "vm/far_end.inc"
    ;

static const char greeting[] = "qcow2-livebackup 1\n";

struct ssh_session {
    char *name;
    pid_t pid;        /* 0: it has been waited for */
    int to;           /* -1: closed */
    FILE *from;
    int said;         /* what it prints to standard error: a file in memory */
    bool greeted;
};

/* ---- the URL ---- */

static int bad_url(const char *url, const char *why, struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_USAGE, "%s: %s; ssh://[USER@]HOST[:PORT]/PATH "
                    "is wanted", url, why);
}

/* A host of "-oProxyCommand=..." would be an option, and run it. */
static bool host_is_valid(const char *host)
{
    const char *name = strrchr(host, '@');

    name = name == NULL ? host : name + 1;
    return *host != '-' && *host != '@' && *name != '-' && *name != '\0' &&
           strspn(host, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                        "0123456789._-@:%+") == strlen(host);
}

/* Takes "[::1]" apart, and the port from behind it. */
static char *split_port(char *host)
{
    char *name = strrchr(host, '@'), *end, *colon;

    name = name == NULL ? host : name + 1;
    if (*name == '[' && (end = strchr(name, ']')) != NULL) {
        colon = end[1] == ':' ? end + 1 : NULL;
        memmove(name, name + 1, (size_t)(end - name - 1));
        end[-1] = '\0';
    } else {
        colon = strchr(name, ':');
    }
    if (colon == NULL) {
        return NULL;
    }
    *colon = '\0';
    return colon + 1;
}

int ssh_target_parse(struct ssh_target *target, const char *url,
                     struct qlb_error *err)
{
    const char *rest = url + strlen("ssh://");
    const char *slash = strchr(rest, '/');
    char *port;

    *target = (struct ssh_target) { 0 };
    if (slash == NULL || slash[1] == '\0') {
        return bad_url(url, "has no path", err);
    }
    if (strpbrk(url, "\n\r") != NULL) {
        return bad_url(url, "has a line break in it", err);
    }
    target->host = strndup(rest, (size_t)(slash - rest));
    target->path = strdup(strncmp(slash, "/~/", 3) == 0 ? slash + 1 : slash);
    if (target->host == NULL || target->path == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", url);
    }
    port = split_port(target->host);
    if (port != NULL && (*port == '\0' ||
                         strspn(port, "0123456789") != strlen(port))) {
        return bad_url(url, "the port is no number", err);
    }
    if (!host_is_valid(target->host)) {
        return bad_url(url, "has no name of a host", err);
    }
    if (port != NULL && (target->port = strdup(port)) == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", url);
    }
    for (char *end = strchr(target->path, '\0') - 1;
         end > target->path && *end == '/'; end--) {
        *end = '\0';
    }
    return 0;
}

void ssh_target_release(struct ssh_target *target)
{
    free(target->host);
    free(target->port);
    free(target->path);
}

/* ---- the process ---- */

enum { MAX_WORDS = 24 };

static void fill_command(const struct ssh_target *target, const char **words,
                         const char *remote)
{
    static const char *const fixed[] = {
        "-T", "-x", "-a", "-oBatchMode=yes", "-oConnectTimeout=30",
        "-oServerAliveInterval=15", "-oServerAliveCountMax=4",
    };
    const char *own = getenv("LBVM_SSH");
    unsigned n = 0;

    if (own != NULL && *own != '\0') {
        words[n++] = "/bin/sh";
        words[n++] = "-c";
        words[n++] = "eval \"exec $LBVM_SSH \\\"\\$@\\\"\"";
    }
    words[n++] = "ssh";
    for (unsigned i = 0; i < sizeof(fixed) / sizeof(fixed[0]); i++) {
        words[n++] = fixed[i];
    }
    if (target->port != NULL) {
        words[n++] = "-p";
        words[n++] = target->port;
    }
    words[n++] = "--";
    words[n++] = target->host;
    words[n++] = remote;
    words[n] = NULL;
}

static _Noreturn void be_ssh(const struct ssh_target *target, int in, int out,
                             int said)
{
    const char *words[MAX_WORDS];
    char remote[80];
    sigset_t none;

    snprintf(remote, sizeof(remote),
             "exec sh -c 'eval \"$(dd bs=1 count=%zu 2>/dev/null)\"'",
             sizeof(far_end) - 1);
    fill_command(target, words, remote);
    for (int number = 1; number < NSIG; number++) {
        signal(number, SIG_DFL);
    }
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (dup2(in, 0) >= 0 && (out < 0 || dup2(out, 1) >= 0) &&
        (said < 0 || dup2(said, 2) >= 0)) {
        closefrom(3);
        execvp(words[0], (char *const *)words);
        dprintf(2, "%s: %s\n", words[0], strerror(errno));
    }
    _exit(127);
}

/* in, out: what is the child's; both are closed here. */
static pid_t start(const struct ssh_target *target, int in, int out, int said)
{
    pid_t pid = fork();

    if (pid == 0) {
        be_ssh(target, in, out, said);
    }
    close(in);
    if (out >= 0) {
        close(out);
    }
    return pid;
}

static int send_bytes(struct ssh_session *session, const void *data,
                      size_t len)
{
    size_t done = 0;

    while (done < len) {
        ssize_t n = write(session->to, (const char *)data + done, len - done);

        if (n < 0 && errno == EINTR && !tool_stop) {
            continue;
        }
        if (n <= 0) {
            return -1;
        }
        done += (size_t)n;
    }
    return 0;
}

/* hear: its messages are for us; else they go where ours go. */
static struct ssh_session *session_new(const struct ssh_target *target,
                                       const char *name, bool hear,
                                       struct qlb_error *err)
{
    struct ssh_session *session = calloc(1, sizeof(*session));
    int to[2], from[2];

    if (session == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", name);
        return NULL;
    }
    session->to = -1;
    session->name = strdup(name);
    session->said = memfd_create("ssh", MFD_CLOEXEC);
    if (session->name == NULL || session->said < 0 ||
        pipe2(to, O_CLOEXEC) < 0) {
        goto failed;
    }
    session->to = to[1];
    if (pipe2(from, O_CLOEXEC) < 0) {
        close(to[0]);
        goto failed;
    }
    session->from = fdopen(from[0], "r");
    session->pid = start(target, to[0], from[1], hear ? session->said : -1);
    if (session->from == NULL || session->pid < 0) {
        goto failed;
    }
    /* Where ssh has ended already, the first answer tells. */
    send_bytes(session, far_end, sizeof(far_end) - 1);
    return session;

failed:
    qlb_fail_errno(err, errno, "%s: starting ssh", name);
    ssh_session_end(session);
    return NULL;
}

struct ssh_session *ssh_session_start(const struct ssh_target *target,
                                      const char *name, struct qlb_error *err)
{
    return session_new(target, name, true, err);
}

/* Its exit status; -1: none. */
static int await_end(struct ssh_session *session)
{
    int status = 0;

    if (session->pid <= 0) {
        return -1;
    }
    while (waitpid(session->pid, &status, 0) < 0) {
        if (errno != EINTR) {
            break;
        }
    }
    session->pid = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* One that has ended by itself has told why. */
static void end_process(struct ssh_session *session)
{
    if (session->pid > 0 && waitpid(session->pid, NULL, WNOHANG) == 0) {
        kill(session->pid, SIGTERM);
        await_end(session);
    }
    session->pid = 0;
}

void ssh_session_end(struct ssh_session *session)
{
    if (session == NULL) {
        return;
    }
    ssh_session_close_input(session);
    if (session->from != NULL) {
        fclose(session->from);
    }
    end_process(session);
    if (session->said >= 0) {
        close(session->said);
    }
    free(session->name);
    free(session);
}

int ssh_session_descriptor(const struct ssh_session *session)
{
    return session->to;
}

void ssh_session_close_input(struct ssh_session *session)
{
    if (session->to >= 0) {
        close(session->to);
        session->to = -1;
    }
}

/* ---- when it fails ---- */

/* The last line that it printed to standard error; "" where there is none. */
static void last_words(const struct ssh_session *session, char *text,
                       size_t size)
{
    char *line;
    off_t len = lseek(session->said, 0, SEEK_END);
    off_t from = len < (off_t)size ? 0 : len - (off_t)size + 1;
    ssize_t n = pread(session->said, text, size - 1, from);

    n = n < 0 ? 0 : n;
    while (n > 0 && (text[n - 1] == '\n' || text[n - 1] == '\r')) {
        n--;
    }
    text[n] = '\0';
    line = strrchr(text, '\n');
    if (line != NULL) {
        memmove(text, line + 1, strlen(line + 1) + 1);
    }
}

/* The other end is gone. */
static int is_gone(struct ssh_session *session, struct qlb_error *err)
{
    char text[240];

    if (tool_stop) {
        return qlb_fail(err, QLB_E_RUNTIME, "interrupted");
    }
    ssh_session_close_input(session);
    end_process(session);
    last_words(session, text, sizeof(text));
    return qlb_fail(err, QLB_E_RUNTIME, "%s: %s%s%s", session->name,
                    session->greeted ? "the connection is gone"
                                     : "no connection",
                    text[0] == '\0' ? "" : ": ", text);
}

/* ---- requests and answers ---- */

int ssh_session_send(struct ssh_session *session, const char *const *words,
                     unsigned n, const void *data, size_t len,
                     struct qlb_error *err)
{
    for (unsigned i = 0; i < n; i++) {
        if (strchr(words[i], '\n') != NULL) {
            return qlb_fail(err, QLB_E_USAGE, "%s: '%.100s' has a line break "
                            "in it", session->name, words[i]);
        }
        if (send_bytes(session, words[i], strlen(words[i])) < 0 ||
            send_bytes(session, "\n", 1) < 0) {
            return is_gone(session, err);
        }
    }
    return send_bytes(session, data, len) < 0 ? is_gone(session, err) : 0;
}

int ssh_session_read(struct ssh_session *session, void *buf, size_t len,
                     struct qlb_error *err)
{
    size_t done = 0;

    while (done < len) {
        size_t n = fread((char *)buf + done, 1, len - done, session->from);

        done += n;
        if (n == 0) {
            if (feof(session->from) || errno != EINTR || tool_stop) {
                return is_gone(session, err);
            }
            clearerr(session->from);
        }
    }
    return 0;
}

/* A line without its end; what is longer than the buffer is cut. */
static int read_line(struct ssh_session *session, char *line, size_t size,
                     struct qlb_error *err)
{
    size_t n = 0;
    char c;

    for (;;) {
        if (ssh_session_read(session, &c, 1, err) < 0) {
            return -1;
        }
        if (c == '\n') {
            line[n] = '\0';
            return 0;
        }
        if (n + 1 < size && c != '\0') {
            line[n++] = c;
        }
    }
}

int ssh_session_await(struct ssh_session *session, struct qlb_error *err)
{
    char line[120];

    if (session->greeted) {
        return 0;
    }
    if (read_line(session, line, sizeof(line), err) < 0) {
        return -1;
    }
    if (strncmp(line, greeting, strlen(greeting) - 1) != 0 ||
        line[strlen(greeting) - 1] != '\0') {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the shell there says '%s' "
                        "before it is asked: its start-up files must print "
                        "nothing where nobody sits", session->name, line);
    }
    session->greeted = true;
    return 0;
}

static int refused(const char *subject, char *line, struct qlb_error *err)
{
    char *why = line + strlen("no "), *text = strchr(why, ' ');
    size_t end;

    if (text != NULL) {
        *text++ = '\0';
    }
    if (strcmp(why, "absent") == 0) {
        return 0;
    }
    if (strcmp(why, "busy") == 0) {
        return qlb_fail(err, QLB_E_BUSY, "%s: is locked", subject);
    }
    text = text == NULL ? why : text;
    end = strlen(text);
    while (end > 0 && text[end - 1] == ' ') {
        text[--end] = '\0';
    }
    return qlb_fail(err, QLB_E_RUNTIME, "%s: the other host says: %s",
                    subject, text);
}

int ssh_session_answer(struct ssh_session *session, const char *subject,
                       uint64_t *len, struct qlb_error *err)
{
    char line[400], *end;

    if (ssh_session_await(session, err) < 0 ||
        read_line(session, line, sizeof(line), err) < 0) {
        return -1;
    }
    if (strncmp(line, "no ", 3) == 0) {
        return refused(subject, line, err);
    }
    errno = 0;
    *len = strtoull(line + 3, &end, 10);
    if (strncmp(line, "ok ", 3) != 0 || end == line + 3 || *end != '\0' ||
        errno != 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: '%.100s' is no answer",
                        session->name, line);
    }
    return 1;
}

int ssh_session_answer_text(struct ssh_session *session, const char *subject,
                            struct store_text *text, struct qlb_error *err)
{
    uint64_t len;
    int ret = ssh_session_answer(session, subject, &len, err);

    *text = (struct store_text) { 0 };
    if (ret <= 0) {
        return ret;
    }
    /* with a name before it, and a little more */
    if (len > STORE_MAX_SMALL + 4096) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: is too large", subject);
    }
    text->data = malloc((size_t)len + 1);
    if (text->data == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", subject);
    }
    if (ssh_session_read(session, text->data, (size_t)len, err) < 0) {
        free(text->data);
        text->data = NULL;
        return -1;
    }
    text->len = (size_t)len;
    text->data[len] = '\0';
    return 1;
}

/* ---- a program ---- */

/* What it prints goes on to standard output. */
static int pass_on(struct ssh_session *session, struct qlb_error *err)
{
    char buf[65536];
    size_t n;

    while ((n = fread(buf, 1, sizeof(buf), session->from)) > 0 ||
           (ferror(session->from) && errno == EINTR && !tool_stop)) {
        clearerr(session->from);
        if (fwrite(buf, 1, n, stdout) != n) {
            return qlb_fail_errno(err, errno, "standard output");
        }
    }
    return tool_stop ? qlb_fail(err, QLB_E_RUNTIME, "interrupted") : 0;
}

static int run(struct ssh_session *session, const char *const *words,
               unsigned n, struct qlb_error *err)
{
    char count[16];
    const char *first[] = { "run", count };
    int status;

    snprintf(count, sizeof(count), "%u", n);
    if (ssh_session_await(session, err) < 0 ||
        ssh_session_send(session, first, 2, NULL, 0, err) < 0 ||
        ssh_session_send(session, words, n, NULL, 0, err) < 0) {
        return -1;
    }
    ssh_session_close_input(session);
    if (pass_on(session, err) < 0) {
        return -1;
    }
    status = await_end(session);
    if (status < 0 || status == 255) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the connection is gone",
                        session->name);
    }
    return status;
}

int ssh_run(const struct ssh_target *target, const char *name,
            const char *const *words, unsigned n, struct qlb_error *err)
{
    struct ssh_session *session = session_new(target, name, false, err);
    int status = session == NULL ? -1 : run(session, words, n, err);

    ssh_session_end(session);
    return status;
}
