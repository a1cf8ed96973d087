/* Other programs that lbvm has do a part of its work.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/command.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static void extend_path(void)
{
    const char *path = getenv("PATH");
    char *longer;

    if (asprintf(&longer, "%s:/usr/sbin:/sbin",
                 path == NULL ? "/usr/bin:/bin" : path) >= 0) {
        setenv("PATH", longer, 1);
    }
}

static _Noreturn void be_command(const char *const *words, int out,
                                 int errors, bool own_session)
{
    int null = open("/dev/null", O_RDWR);
    sigset_t none;

    if (own_session) {
        setsid();
    }
    for (int number = 1; number < NSIG; number++) {
        signal(number, SIG_DFL);
    }
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    extend_path();
    if (null < 0 || dup2(null, 0) < 0 || (out != 1 && dup2(out, 1) < 0) ||
        (errors != 2 && dup2(errors, 2) < 0)) {
        _exit(126);
    }
    closefrom(3);
    execvp(words[0], (char *const *)words);
    dprintf(2, "%s: %s\n", words[0], strerror(errno));
    _exit(127);
}

pid_t command_start(const char *const *words, int out, int errors,
                    bool own_session, struct qlb_error *err)
{
    pid_t pid = fork();

    if (pid == 0) {
        be_command(words, out, errors, own_session);
    }
    return pid < 0 ? qlb_fail_errno(err, errno, "%s", words[0]) : pid;
}

int command_scratch(struct qlb_error *err)
{
    int fd = memfd_create("lbvm", MFD_CLOEXEC);

    return fd < 0 ? qlb_fail_errno(err, errno, "running a program") : fd;
}

char *command_text(int scratch, size_t *len, struct qlb_error *err)
{
    struct stat st;
    char *text = NULL;

    if (fstat(scratch, &st) == 0 &&
        (text = malloc((size_t)st.st_size + 1)) != NULL) {
        ssize_t n = pread(scratch, text, (size_t)st.st_size, 0);

        *len = n < 0 ? 0 : (size_t)n;
        text[*len] = '\0';
        return text;
    }
    qlb_fail_errno(err, errno, "running a program");
    return NULL;
}

int command_run(const char *const *words, int out, int errors, int *status,
                struct qlb_error *err)
{
    pid_t pid = command_start(words, out, errors, false, err);

    if (pid < 0) {
        return -1;
    }
    while (waitpid(pid, status, 0) < 0) {
        if (errno != EINTR) {
            return qlb_fail_errno(err, errno, "%s", words[0]);
        }
    }
    return 0;
}
