/* A guest with an application that keeps related records on two disks: its init,
 * and the only program in it.
 *
 * Loads the modules in /modules, waits for both disks, and writes record n to the
 * first disk, flushes it, and does the same on the second one, then record n + 1,
 * until somebody ends the machine.  So at any time the second disk has as many as
 * the first, or one less.  Records go round in SLOTS places; pairs.py in tests/qemu
 * writes and checks the same ones.
 *
 * After a start it goes on from the newest record that both disks have.  To the
 * second serial port goes
 *   "begin N\n"     before record N, the first one
 *   "N\n"           both disks have N
 *   "failed: ...\n" what went wrong; it does nothing more then
 *
 * Copyright (C) 2026 The qcow2 livebackup authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "init.h"

#include <endian.h>
#include <inttypes.h>
#include <stdlib.h>
#include <unistd.h>

#define SLOTS 700
#define STEP (24 << 10)
#define NUMBERS 64

static const char *const names[2] = { "/dev/vda", "/dev/vdb" };
static int disks[2];
static uint64_t *record; /* aligned, as O_DIRECT wants it */

static uint64_t newest(int i)
{
    uint64_t newest = 0;

    for (unsigned slot = 0; slot < SLOTS; slot++) {
        if (pread(disks[i], record, NUMBERS * sizeof(*record),
                  (off_t)slot * STEP) != NUMBERS * sizeof(*record)) {
            init_fail(names[i]);
        }
        if (be64toh(record[0]) > newest) {
            newest = be64toh(record[0]);
        }
    }
    return newest;
}

static void put(int i, uint64_t n)
{
    if (pwrite(disks[i], record, NUMBERS * sizeof(*record),
               (off_t)(n % SLOTS) * STEP) != NUMBERS * sizeof(*record) ||
        fdatasync(disks[i]) < 0) {
        init_fail(names[i]);
    }
}

int main(void)
{
    uint64_t n;
    void *buffer;

    init_begin();
    if (posix_memalign(&buffer, 4096, NUMBERS * sizeof(*record)) != 0) {
        init_fail("memory");
    }
    record = buffer;
    disks[0] = init_open_disk(names[0]);
    disks[1] = init_open_disk(names[1]);
    n = newest(1) + 1;
    init_say("begin %" PRIu64 "\n", n);
    for (;; n++) {
        for (unsigned k = 0; k < NUMBERS; k++) {
            record[k] = htobe64(n);
        }
        put(0, n);
        put(1, n);
        init_say("%" PRIu64 "\n", n);
    }
}
