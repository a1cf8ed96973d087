/* What the programs that are a guest's init, and all that runs in it, have in
 * common.
 *
 * Copyright (C) 2026 The qcow2 livebackup authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef GUEST_INIT_H
#define GUEST_INIT_H

/* Mounts /proc and /dev, opens the second serial port for what is said, and
 * loads the modules in /modules, in the order of their numbers. */
void init_begin(void);

/* To the second serial port. */
void init_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Says "failed: WHAT: " and what errno means; nothing is done any more then. */
_Noreturn void init_fail(const char *what);

/* Waits for the disk, half a minute at most. The descriptor is for O_DIRECT. */
int init_open_disk(const char *path);

#endif
