/* The guest of the kill test: its init, and the only program in it.
 *
 * Loads the modules in /modules, waits for the disk, and then writes to it from
 * several threads until somebody kills the machine.  What it does follows from
 * the kernel's command line alone, so that guestlib.py can compute the same:
 *
 *   qlb.seed=N      64 bits, decimal
 *   qlb.threads=N   1 to MAX_THREADS
 *   qlb.stripe=N    bytes, a multiple of SECTOR.  Stripe i of the disk belongs
 *                   to thread i modulo threads, so no two threads write the
 *                   same sector, but they do write the same granule where that
 *                   is larger
 *   qlb.unit=N      requests begin and end at multiples of it
 *   qlb.largest=N   bytes of a request at the most; of several units
 *   qlb.area=N      bytes of the disk that are used, from its begin
 *
 * Request n of a thread: write, zero, discard or flush; see draw().  A written
 * sector describes itself: struct sector.
 *
 * To the second serial port goes
 *   "begin\n"       before the first request
 *   "A/a B/b ...\n" again and again: thread 0 has done A requests, thread 1 has
 *                   done B, ...: the disk had acknowledged them before the
 *                   line was printed.  The first a, b, ... of them were also
 *                   acknowledged before a flush began that was acknowledged,
 *                   too: no crash can undo these
 *   "failed: ...\n" what went wrong; it does nothing more then
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
#include <inttypes.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <unistd.h>

#define SECTOR 512
#define MAX_THREADS 16
#define MAGIC UINT64_C(0x314c4c494b424c51) /* "QLBKILL1" */
#define DISK "/dev/vda"

/* Little-endian, as the guest is. */
struct sector {
    uint64_t magic;
    uint64_t seed;
    uint64_t thread;
    uint64_t request;        /* n */
    uint64_t number;         /* of this sector, on the disk */
    uint64_t filler[58];
    uint32_t reserved;
    uint32_t adler;          /* Adler-32 of all before it */
};

_Static_assert(sizeof(struct sector) == SECTOR, "a sector");

enum kind { WRITE, ZERO, DISCARD, FLUSH };

struct request {
    enum kind kind;
    uint64_t offset, length;
};

struct thread {
    unsigned number;
    uint64_t random;         /* state of next() */
    uint64_t cursor;         /* of the sequential part: a stripe of ours */
    uint64_t done;           /* requests; read by the others */
    uint64_t safe;           /* requests that a flush has covered */
    char *buffer;
};

static struct {
    uint64_t seed, threads, stripe, unit, largest, area;
} config;

static struct thread threads[MAX_THREADS];
static pthread_mutex_t safe_lock = PTHREAD_MUTEX_INITIALIZER;
static int disk = -1;

/* ---- what is to be done ---- */

/* splitmix64 */
static uint64_t next(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* Request n; Thread.draw() of guestlib.py is the same.  Exactly five numbers
 * are drawn for each. */
static struct request draw(struct thread *t)
{
    uint64_t kind = next(&t->random) % 100;
    uint64_t where = next(&t->random);
    uint64_t at = next(&t->random);
    uint64_t length = next(&t->random);
    uint64_t shape = next(&t->random);
    uint64_t stripes = config.area / config.stripe / config.threads;
    uint64_t units = config.stripe / config.unit;
    struct request r;

    r.kind = kind < 80 ? WRITE : kind < 88 ? ZERO : kind < 97 ? DISCARD
             : FLUSH;
    if (shape % 4 == 0) {
        t->cursor = (t->cursor + 1) % stripes;
    } else {
        t->cursor = where % stripes;
    }
    at %= units;
    if (shape / 4 % 8 == 0) {
        /* as much as there is: whole clusters are discarded, too */
        at = 0;
        length = units;
    } else {
        length = 1 + length % (units - at);
    }
    length *= config.unit;
    r.offset = (t->cursor * config.threads + t->number) * config.stripe
               + at * config.unit;
    r.length = length < config.largest ? length : config.largest;
    return r;
}

/* ---- doing it ---- */

static uint32_t adler32(const void *data, size_t len)
{
    const unsigned char *bytes = data;
    uint32_t a = 1, b = 0;

    for (size_t i = 0; i < len; i++) { /* too few for an overflow */
        a += bytes[i];
        b += a;
    }
    return b % 65521 << 16 | a % 65521;
}

static void fill(struct thread *t, const struct request *r)
{
    struct sector *sector = (struct sector *)t->buffer;

    for (uint64_t i = 0; i < r->length / SECTOR; i++, sector++) {
        uint64_t word = t->done * 31 + r->offset / SECTOR + i;

        sector->magic = MAGIC;
        sector->seed = config.seed;
        sector->thread = t->number;
        sector->request = t->done;
        sector->number = r->offset / SECTOR + i;
        for (size_t k = 0; k < 58; k++) {
            sector->filler[k] = word += UINT64_C(0x9e3779b97f4a7c15);
        }
        sector->reserved = 0;
        sector->adler = adler32(sector, offsetof(struct sector, adler));
    }
}

/* What all threads had done before it is safe after it. */
static void flush(void)
{
    uint64_t done[MAX_THREADS];

    for (unsigned i = 0; i < config.threads; i++) {
        done[i] = __atomic_load_n(&threads[i].done, __ATOMIC_SEQ_CST);
    }
    if (fdatasync(disk) < 0) {
        init_fail("fdatasync");
    }
    pthread_mutex_lock(&safe_lock);
    for (unsigned i = 0; i < config.threads; i++) {
        if (threads[i].safe < done[i]) {
            threads[i].safe = done[i];
        }
    }
    pthread_mutex_unlock(&safe_lock);
}

static void do_request(struct thread *t, const struct request *r)
{
    uint64_t range[2] = { r->offset, r->length };
    ssize_t n;

    switch (r->kind) {
    case WRITE:
        fill(t, r);
        n = pwrite(disk, t->buffer, r->length, (off_t)r->offset);
        if (n < 0 || (uint64_t)n != r->length) {
            init_fail("write");
        }
        break;
    case ZERO:
        if (ioctl(disk, BLKZEROOUT, range) < 0) {
            init_fail("BLKZEROOUT");
        }
        break;
    case DISCARD:
        if (ioctl(disk, BLKDISCARD, range) < 0) {
            init_fail("BLKDISCARD");
        }
        break;
    case FLUSH:
        flush();
        break;
    }
}

static void *run_thread(void *opaque)
{
    struct thread *t = opaque;

    for (;;) {
        struct request r = draw(t);

        do_request(t, &r);
        __atomic_store_n(&t->done, t->done + 1, __ATOMIC_SEQ_CST);
    }
    return opaque;
}

static void print_done(void)
{
    char line[MAX_THREADS * 48];
    size_t at = 0;

    pthread_mutex_lock(&safe_lock);
    for (unsigned i = 0; i < config.threads; i++) {
        at += (size_t)snprintf(line + at, sizeof(line) - at,
                               "%s%" PRIu64 "/%" PRIu64, i ? " " : "",
                               __atomic_load_n(&threads[i].done,
                                               __ATOMIC_SEQ_CST),
                               threads[i].safe);
    }
    pthread_mutex_unlock(&safe_lock);
    init_say("%s\n", line);
}

/* ---- starting ---- */

static void open_disk(void)
{
    uint64_t size;

    disk = init_open_disk(DISK);
    if (ioctl(disk, BLKGETSIZE64, &size) < 0) {
        init_fail("BLKGETSIZE64");
    }
    if (size < config.area) {
        errno = EFBIG;
        init_fail("qlb.area");
    }
}

static uint64_t parameter(const char *line, const char *name)
{
    const char *at = strstr(line, name);

    return at == NULL ? 0 : strtoull(at + strlen(name), NULL, 10);
}

static void read_config(void)
{
    char line[4096] = "";
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);

    if (fd < 0 || read(fd, line, sizeof(line) - 1) <= 0) {
        init_fail("/proc/cmdline");
    }
    close(fd);
    config.seed = parameter(line, "qlb.seed=");
    config.threads = parameter(line, "qlb.threads=");
    config.stripe = parameter(line, "qlb.stripe=");
    config.unit = parameter(line, "qlb.unit=");
    config.largest = parameter(line, "qlb.largest=");
    config.area = parameter(line, "qlb.area=");
    errno = EINVAL;
    if (config.threads == 0 || config.threads > MAX_THREADS ||
        config.unit == 0 || config.unit % SECTOR ||
        config.stripe == 0 || config.stripe % config.unit ||
        config.largest == 0 || config.largest % config.unit ||
        config.area < config.stripe * config.threads) {
        init_fail("/proc/cmdline");
    }
}

static void start_threads(void)
{
    for (unsigned i = 0; i < config.threads; i++) {
        struct thread *t = &threads[i];
        pthread_t id;
        void *buffer;

        t->number = i;
        t->random = config.seed + i;
        if (posix_memalign(&buffer, 4096, config.largest) != 0) {
            init_fail("memory");
        }
        t->buffer = buffer;
        if (pthread_create(&id, NULL, run_thread, t) != 0) {
            init_fail("pthread_create");
        }
    }
}

int main(void)
{
    init_begin();
    read_config();
    open_disk();
    init_say("begin\n");
    start_threads();
    for (;;) {
        print_done();
        usleep(2000);
    }
}
