/* The ordered parallel pipeline.
 *
 * Jobs live in a ring.  `made` counts jobs that `next` has filled, `handed`
 * those that `done` has taken; job number k sits in slot k % n_jobs, and
 * handed <= made <= handed + n_jobs.  A worker does, over and over: hand over
 * finished jobs at the head if nobody else is at it; else make a job if there
 * is room, and work on it; else wait.  One mutex guards the ring; it is
 * released around all three callbacks, and the flags `making` and `handing`
 * keep `next` and `done` to one thread at a time.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "pipeline.h"

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#include "cleanup.h"

struct pipeline {
    const struct qlb_pipeline_ops *ops;
    void *opaque;
    char *jobs;
    size_t job_size;
    unsigned n_jobs;
    const volatile bool *stop;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool *finished;     /* by slot: worked on, not yet handed over */
    uint64_t made, handed;
    bool making, handing, exhausted;
    unsigned next_thread;

    /* The failed job with the lowest number wins; failing stops `next`. */
    bool failed;
    uint64_t failed_job;
    struct qlb_error error;
};

static void *job_at(struct pipeline *p, uint64_t number)
{
    return p->jobs + (number % p->n_jobs) * p->job_size;
}

/* Called with the lock held. */
static void note_error(struct pipeline *p, uint64_t job,
                       const struct qlb_error *err)
{
    if (!p->failed || job < p->failed_job) {
        p->failed = true;
        p->failed_job = job;
        p->error = *err;
    }
    pthread_cond_broadcast(&p->changed);
}

static bool head_finished(const struct pipeline *p)
{
    return p->handed < p->made && p->finished[p->handed % p->n_jobs];
}

/* Hands over the job at the head. Lock held, released meanwhile. */
static void hand_over(struct pipeline *p)
{
    uint64_t number = p->handed;
    struct qlb_error err;
    int ret = 0;

    p->handing = true;
    if (p->ops->done != NULL && !p->failed) {
        pthread_mutex_unlock(&p->lock);
        ret = p->ops->done(p->opaque, job_at(p, number), &err);
        pthread_mutex_lock(&p->lock);
    }
    p->handing = false;
    p->finished[number % p->n_jobs] = false;
    p->handed++;
    if (ret < 0) {
        note_error(p, number, &err);
    }
    pthread_cond_broadcast(&p->changed);
}

/* Makes a job and works on it. Lock held, released meanwhile. */
static void make_and_work(struct pipeline *p, unsigned thread)
{
    uint64_t number = p->made;
    struct qlb_error err;
    int ret;

    p->making = true;
    pthread_mutex_unlock(&p->lock);
    if (p->stop != NULL && *p->stop) {
        ret = qlb_fail(&err, QLB_E_RUNTIME, "interrupted");
    } else {
        ret = p->ops->next(p->opaque, job_at(p, number), &err);
    }
    pthread_mutex_lock(&p->lock);
    p->making = false;
    if (ret <= 0) {
        p->exhausted = true;
        if (ret < 0) {
            note_error(p, number, &err);
        }
        pthread_cond_broadcast(&p->changed);
        return;
    }
    p->made++;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
    ret = p->ops->work(p->opaque, job_at(p, number), thread, &err);
    pthread_mutex_lock(&p->lock);
    p->finished[number % p->n_jobs] = true;
    if (ret < 0) {
        note_error(p, number, &err);
    }
    pthread_cond_broadcast(&p->changed);
}

static void *worker(void *arg)
{
    struct pipeline *p = arg;
    unsigned thread;
    QLB_LOCK_SCOPE(&p->lock);

    thread = p->next_thread++;
    for (;;) {
        bool more = !p->exhausted && !p->failed;

        if (!p->handing && head_finished(p)) {
            hand_over(p);
        } else if (more && !p->making && p->made < p->handed + p->n_jobs) {
            make_and_work(p, thread);
        } else if (!more && p->handed == p->made) {
            break;
        } else {
            pthread_cond_wait(&p->changed, &p->lock);
        }
    }
    return NULL;
}

static int run_threads(struct pipeline *p, unsigned threads,
                       struct qlb_error *err)
{
    pthread_t *others QLB_AUTO_FREE = calloc(threads, sizeof(*others));
    unsigned started = 0;
    int ret = 0;

    if (others == NULL) {
        return qlb_fail_errno(err, ENOMEM, "starting threads");
    }
    /* Where a thread can't be had the others do its work. */
    while (started + 1 < threads && ret == 0) {
        ret = pthread_create(&others[started], NULL, worker, p);
        started += ret == 0;
    }
    worker(p);
    for (unsigned i = 0; i < started; i++) {
        pthread_join(others[i], NULL);
    }
    if (p->failed) {
        *err = p->error;
        return -1;
    }
    return 0;
}

int qlb_pipeline_run(const struct qlb_pipeline_ops *ops, void *opaque,
                     void *jobs, size_t job_size, unsigned n_jobs,
                     unsigned threads, const volatile bool *stop,
                     struct qlb_error *err)
{
    bool *finished QLB_AUTO_FREE = calloc(n_jobs, sizeof(*finished));
    struct pipeline p = {
        .ops = ops,
        .opaque = opaque,
        .jobs = jobs,
        .job_size = job_size,
        .n_jobs = n_jobs,
        .stop = stop,
        .finished = finished,
    };
    int ret;

    if (finished == NULL) {
        return qlb_fail_errno(err, ENOMEM, "starting the pipeline");
    }
    pthread_mutex_init(&p.lock, NULL);
    pthread_cond_init(&p.changed, NULL);
    ret = run_threads(&p, threads, err);
    pthread_cond_destroy(&p.changed);
    pthread_mutex_destroy(&p.lock);
    return ret;
}
