/* What the programs that are a guest's init have in common.
 *
 * Copyright (C) 2026 The qcow2 livebackup authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#define LOG "/dev/ttyS1"

static int log_port = -1;

void init_say(const char *format, ...)
{
    char text[1024];
    size_t at = 0, len;
    va_list ap;

    va_start(ap, format);
    vsnprintf(text, sizeof(text), format, ap);
    va_end(ap);
    len = strlen(text);
    while (at < len) {
        ssize_t n = write(log_port >= 0 ? log_port : STDERR_FILENO,
                          text + at, len - at);

        if (n <= 0) {
            break;
        }
        at += (size_t)n;
    }
}

_Noreturn void init_fail(const char *what)
{
    init_say("failed: %s: %s\n", what, strerror(errno));
    for (;;) {
        pause();
    }
}

static void load_modules(void)
{
    char path[64];

    for (int i = 1; ; i++) {
        int fd;

        snprintf(path, sizeof(path), "/modules/%d", i);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) {
            return;
        }
        if (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST) {
            init_fail(path);
        }
        close(fd);
    }
}

static void open_log(void)
{
    struct termios raw;

    log_port = open(LOG, O_WRONLY | O_NOCTTY | O_CLOEXEC);
    if (log_port < 0) {
        init_fail(LOG);
    }
    if (tcgetattr(log_port, &raw) == 0) {
        cfmakeraw(&raw);
        cfsetspeed(&raw, B115200);
        tcsetattr(log_port, TCSANOW, &raw);
    }
}

void init_begin(void)
{
    mount("proc", "/proc", "proc", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    open_log();
    load_modules();
}

int init_open_disk(const char *path)
{
    for (int tries = 0; ; tries++) {
        int disk = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);

        if (disk >= 0) {
            return disk;
        }
        if (tries == 3000) {
            init_fail(path);
        }
        usleep(10000);
    }
}
