/* What monitoring is told, in a file for Prometheus' text file collector.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_METRICS_H
#define VM_METRICS_H

#include "tool.h"

enum metrics_command { METRICS_BACKUP, METRICS_VERIFY, METRICS_PRUNE };

struct metrics_disk {
    const char *name;
    uint64_t bytes;        /* of its newest archive */
    unsigned chain_length; /* archives that a restore of it reads */
};

/* How a command ended for a machine. */
struct metrics {
    const char *machine, *repository;
    enum metrics_command command;
    int status;            /* exit status */
    uint64_t time;         /* now, seconds since 1970 */
    double seconds;        /* that it took */
    const struct metrics_disk *disks; /* of the newest backup */
    unsigned n_disks;      /* 0: not known */
};

/* Writes the file, whole, to be read by everybody. What it says already of
 * other commands, machines and repositories is kept, and of this one what a
 * failure says nothing about, as the time of the last success. What else is in
 * there, or can't be understood, goes. Several processes may do so at once. */
int metrics_write(const char *path, const struct metrics *metrics,
                  struct qlb_error *err);

#endif
