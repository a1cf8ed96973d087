/* The content of a disk, front to back.
 *
 * Frames of several archives overlap: each is taken apart into its runs of live
 * blocks, which ascend then. What lies between them is zero. A job has a buffer
 * of its own, since it is written in `done`, in the order of jobs.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "raw_stream.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "chain_job.h"

enum { ZEROES = 256 * 1024 };

struct raw_job {
    struct chain_job job; /* first */
    uint8_t *buffer;      /* QLB_LBZ_STRIPE */
};

struct raw_stream {
    struct qlb_chain *chain;
    struct chain_walk walk;
    struct chain_worker *workers;
    unsigned n_workers;
    struct raw_job *jobs;
    unsigned n_jobs;
    struct restore_meter *meter;

    int fd;
    const char *name;  /* for messages */
    bool sparse;       /* a regular file */
    uint64_t size;     /* of the disk */
    uint64_t position; /* all before it is written */
    uint8_t *zeroes;
};

/* ---- output ---- */

static int write_bytes(struct raw_stream *s, const uint8_t *bytes,
                       uint64_t length, struct qlb_error *err)
{
    s->position += length;
    while (length > 0) {
        ssize_t n = write(s->fd, bytes, length);

        if (n < 0 && errno == EINTR && !tool_stop) {
            continue;
        }
        if (n < 0 && errno == EINTR) {
            return qlb_fail(err, QLB_E_RUNTIME, "interrupted");
        }
        if (n <= 0) {
            return qlb_fail_errno(err, n == 0 ? EIO : errno, "%s: writing",
                                  s->name);
        }
        bytes += n;
        length -= (uint64_t)n;
    }
    return 0;
}

/* Longer, and the position at its end: also where all is appended (>>). */
static int extend(struct raw_stream *s, uint64_t length,
                  struct qlb_error *err)
{
    off_t at = lseek(s->fd, 0, SEEK_CUR);

    if (at < 0 || ftruncate(s->fd, at + (off_t)length) < 0 ||
        lseek(s->fd, (off_t)length, SEEK_CUR) < 0) {
        return qlb_fail_errno(err, errno, "%s: writing", s->name);
    }
    s->position += length;
    return 0;
}

static int zero_up_to(struct raw_stream *s, uint64_t end,
                      struct qlb_error *err)
{
    if (s->sparse && end > s->position) {
        return extend(s, end - s->position, err);
    }
    while (s->position < end) {
        uint64_t left = end - s->position;

        if (tool_stop) {
            return qlb_fail(err, QLB_E_RUNTIME, "interrupted");
        }
        if (write_bytes(s, s->zeroes, left < ZEROES ? left : ZEROES,
                        err) < 0) {
            return -1;
        }
    }
    return 0;
}

/* ---- the pipeline ---- */

static int raw_next(void *opaque, void *arg, struct qlb_error *err)
{
    struct raw_stream *s = opaque;
    struct raw_job *job = arg;

    /* A chain that begins with a full one has no ZERO runs. */
    return chain_walk_next(&s->walk, &job->job, err);
}

static int raw_work(void *opaque, void *arg, unsigned thread,
                    struct qlb_error *err)
{
    struct raw_stream *s = opaque;
    struct raw_job *job = arg;
    struct chain_worker worker = s->workers[thread];

    worker.blocks = job->buffer;
    return chain_job_decode(s->chain, &job->job, &worker, err);
}

static int raw_done(void *opaque, void *arg, struct qlb_error *err)
{
    struct raw_stream *s = opaque;
    struct chain_job *job = arg;
    unsigned first = 0;
    uint64_t length = (uint64_t)chain_job_live_run(job, &first) *
                      QLB_LBZ_BLOCK;
    uint64_t skip = (uint64_t)first * QLB_LBZ_BLOCK;
    uint64_t offset = job->offset + skip;
    uint64_t inside = s->size - offset;

    if (zero_up_to(s, offset, err) < 0 ||
        write_bytes(s, job->blocks + skip, length < inside ? length : inside,
                    err) < 0) {
        return -1;
    }
    return restore_meter_account(s->meter, length, err);
}

/* ---- from the beginning to the end ---- */

static int prepare(struct raw_stream *s, unsigned threads,
                   struct qlb_error *err)
{
    s->n_workers = threads;
    s->n_jobs = 2 * threads + 2;
    s->workers = chain_workers_new(s->n_workers, 1, err);
    if (s->workers == NULL) {
        return -1;
    }
    s->zeroes = calloc(1, ZEROES);
    s->jobs = calloc(s->n_jobs, sizeof(*s->jobs));
    for (unsigned i = 0; s->jobs != NULL && i < s->n_jobs; i++) {
        s->jobs[i].buffer = malloc(QLB_LBZ_STRIPE);
        if (s->jobs[i].buffer == NULL) {
            return qlb_fail_errno(err, ENOMEM, "starting the export");
        }
    }
    return s->jobs == NULL || s->zeroes == NULL
               ? qlb_fail_errno(err, ENOMEM, "starting the export") : 0;
}

static void release(struct raw_stream *s)
{
    for (unsigned i = 0; s->jobs != NULL && i < s->n_jobs; i++) {
        free(s->jobs[i].buffer);
    }
    free(s->jobs);
    free(s->zeroes);
    chain_workers_free(s->workers, s->n_workers);
    chain_walk_end(&s->walk);
}

int raw_stream_write(struct qlb_chain *chain, int fd, const char *name,
                     unsigned threads, struct restore_meter *meter,
                     struct qlb_error *err)
{
    static const struct qlb_pipeline_ops ops = {
        .next = raw_next, .work = raw_work, .done = raw_done,
    };
    struct raw_stream s = {
        .chain = chain,
        .walk = { .chain = chain, .split = CHAIN_SPLIT_PARTIAL },
        .meter = meter,
        .fd = fd,
        .name = name,
        .size = qlb_chain_header(chain)->virtual_size,
    };
    struct stat st;
    int ret = prepare(&s, threads, err);

    s.sparse = fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
    if (ret == 0) {
        ret = qlb_pipeline_run(&ops, &s, s.jobs, sizeof(*s.jobs), s.n_jobs,
                               s.n_workers, &tool_stop, err);
    }
    if (ret == 0) {
        ret = zero_up_to(&s, s.size, err);
    }
    release(&s);
    return ret;
}
