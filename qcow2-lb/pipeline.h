/* An ordered parallel pipeline: the engine of dump, merge, verify, restore.
 *
 * A run turns a sequence of jobs over: `next` makes them one after the other,
 * `work` is done by several threads at once, `done` takes the results in the
 * order in which they were made.  The calling thread is one of the workers;
 * there is no other thread than the workers: whoever finishes the job at the
 * head of the line hands over all finished ones.  So with n threads, n cores
 * are busy as long as `next` and `done` are short, and memory is bounded by
 * the number of jobs.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_PIPELINE_H
#define QLB_PIPELINE_H

#include <stdbool.h>
#include <stddef.h>

#include "error.h"

struct qlb_pipeline_ops {
    /* Fills the job. 1: there is one; 0: no more; -1: error. Never called by
     * two threads at once, but may overlap with `done`. */
    int (*next)(void *opaque, void *job, struct qlb_error *err);
    /* Runs in parallel; thread is 0 to threads-1. */
    int (*work)(void *opaque, void *job, unsigned thread,
                struct qlb_error *err);
    /* In the order of `next`; never called by two threads at once. May be
     * NULL. */
    int (*done)(void *opaque, void *job, struct qlb_error *err);
};

/* Runs to the end or to the first error (of the earliest job that failed).
 *
 * jobs: array of n_jobs objects of job_size bytes, owned by the caller, reused
 *   round and round; at least `threads` of them, twice as many are good.
 * stop: checked before each job; where it becomes true the run fails with
 *   QLB_E_RUNTIME, "interrupted". May be NULL. */
int qlb_pipeline_run(const struct qlb_pipeline_ops *ops, void *opaque,
                     void *jobs, size_t job_size, unsigned n_jobs,
                     unsigned threads, const volatile bool *stop,
                     struct qlb_error *err);

#endif
