/* A command of the operator's that runs before and after.
 *
 * It is a process group: what takes too long is ended with all that it started.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/hooks.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Seconds; the second is between SIGTERM and SIGKILL. */
enum { DEFAULT_LIMIT = 300, GRACE = 5 };

/* ---- the process ---- */

/* As a program finds itself that is started by a shell. */
static void reset_signals(void)
{
    sigset_t none;

    for (int number = 1; number < NSIG; number++) {
        signal(number, SIG_DFL);
    }
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

static _Noreturn void be_hook(const struct hooks *hooks, const char *event,
                              int status)
{
    int null = open("/dev/null", O_RDONLY);
    char text[16];

    setpgid(0, 0);
    reset_signals();
    if (null < 0 || dup2(null, 0) < 0 || dup2(2, 1) < 0) {
        _exit(126);
    }
    closefrom(3);
    snprintf(text, sizeof(text), "%d", status);
    if (setenv("LBVM_MACHINE", hooks->machine, 1) == 0 &&
        setenv("LBVM_EVENT", event, 1) == 0 &&
        setenv("LBVM_STATUS", text, 1) == 0) {
        execl("/bin/sh", "sh", "-c", hooks->command, (char *)NULL);
    }
    _exit(126);
}

/* Until it ends, the time has passed, or we shall stop. 1: it has ended. */
static int await_end(pid_t pid, int *wstatus, double seconds,
                     bool interruptible)
{
    static const struct timespec nap = { .tv_nsec = 10 * 1000 * 1000 };
    double deadline = tool_clock() + seconds;

    for (;;) {
        pid_t ret = waitpid(pid, wstatus, WNOHANG);

        if (ret == pid) {
            return 1;
        }
        if (tool_clock() > deadline || (interruptible && tool_stop)) {
            return 0;
        }
        nanosleep(&nap, NULL);
    }
}

/* The group lives as long as its leader was not waited for. */
static void end_group(pid_t pid)
{
    siginfo_t info;
    double deadline = tool_clock() + GRACE;
    static const struct timespec nap = { .tv_nsec = 10 * 1000 * 1000 };

    kill(-pid, SIGTERM);
    do {
        nanosleep(&nap, NULL);
        info.si_pid = 0;
        waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT);
    } while (info.si_pid == 0 && tool_clock() < deadline);
    kill(-pid, SIGKILL);
    waitpid(pid, NULL, 0);
}

/* ---- what became of it ---- */

static int judge(const struct hooks *hooks, const char *event, int wstatus,
                 struct qlb_error *err)
{
    if (WIFSIGNALED(wstatus)) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the %s hook was killed by "
                        "signal %d: %s", hooks->machine, event,
                        WTERMSIG(wstatus), hooks->command);
    }
    if (WEXITSTATUS(wstatus) != 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the %s hook ended with status "
                        "%d: %s", hooks->machine, event, WEXITSTATUS(wstatus),
                        hooks->command);
    }
    return 0;
}

static int run(const struct hooks *hooks, const char *event, int status,
               bool interruptible, struct qlb_error *err)
{
    unsigned limit = hooks->limit == 0 ? DEFAULT_LIMIT : hooks->limit;
    pid_t pid = fork();
    int wstatus;

    if (pid == 0) {
        be_hook(hooks, event, status);
    }
    if (pid < 0) {
        return qlb_fail_errno(err, errno, "%s: the %s hook", hooks->machine,
                              event);
    }
    /* in both processes, so that it is done before it is needed in either */
    setpgid(pid, pid);
    if (await_end(pid, &wstatus, limit, interruptible)) {
        return judge(hooks, event, wstatus, err);
    }
    end_group(pid);
    if (interruptible && tool_stop) {
        return qlb_fail(err, QLB_E_RUNTIME, "interrupted");
    }
    return qlb_fail(err, QLB_E_RUNTIME, "%s: the %s hook was ended after %u "
                    "second%s: %s", hooks->machine, event, limit,
                    limit == 1 ? "" : "s", hooks->command);
}

/* ---- the events ---- */

int hooks_before(struct hooks *hooks, struct qlb_error *err)
{
    if (hooks->command == NULL) {
        return 0;
    }
    hooks->begun = true;
    return run(hooks, "pre-freeze", 0, true, err);
}

int hooks_thawed(struct hooks *hooks, struct qlb_error *err)
{
    if (!hooks->begun || hooks->thawed) {
        return 0;
    }
    hooks->thawed = true;
    return run(hooks, "post-thaw", 0, false, err);
}

int hooks_after(struct hooks *hooks, int status, struct qlb_error *err)
{
    struct qlb_error later;
    int ret;

    if (!hooks->begun || hooks->ended) {
        return 0;
    }
    hooks->ended = true;
    ret = hooks_thawed(hooks, err);
    if (run(hooks, status == 0 ? "post-backup" : "failed", status, false,
            ret < 0 ? &later : err) < 0) {
        ret = -1;
    }
    return ret;
}
