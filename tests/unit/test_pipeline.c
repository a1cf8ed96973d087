/* The pipeline: order, bounds, errors.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <sched.h>
#include <stdatomic.h>

#include "pipeline.h"

struct job {
    unsigned number;
    unsigned result;
};

struct run {
    unsigned total;
    unsigned fail_next, fail_work, fail_done; /* at that job; ~0u: never */
    bool *stop;
    unsigned stop_at;

    unsigned made, handed;
    atomic_int in_next, in_done;
    atomic_uint worked;
    bool order_broken;
};

static int report(struct qlb_error *err, const char *where, unsigned number)
{
    return qlb_fail(err, QLB_E_DAMAGED, "%s %u", where, number);
}

static int next(void *opaque, void *arg, struct qlb_error *err)
{
    struct run *run = opaque;
    struct job *job = arg;
    int ret = 1;

    assert_int_equal(atomic_fetch_add(&run->in_next, 1), 0);
    job->number = run->made;
    job->result = 0;
    if (run->made == run->fail_next) {
        ret = report(err, "next", run->made);
    } else if (run->made == run->total) {
        ret = 0;
    } else {
        run->made++;
    }
    if (run->stop != NULL && run->made == run->stop_at) {
        *run->stop = true;
    }
    atomic_fetch_sub(&run->in_next, 1);
    return ret;
}

static int work(void *opaque, void *arg, unsigned thread,
                struct qlb_error *err)
{
    struct run *run = opaque;
    struct job *job = arg;

    (void)thread;
    /* Jobs take differing times, so that they overtake each other. */
    for (unsigned i = 0; i < job->number * 7 % 5; i++) {
        sched_yield();
    }
    atomic_fetch_add(&run->worked, 1);
    job->result = job->number + 1;
    return job->number == run->fail_work ? report(err, "work", job->number) : 0;
}

static int done(void *opaque, void *arg, struct qlb_error *err)
{
    struct run *run = opaque;
    struct job *job = arg;

    assert_int_equal(atomic_fetch_add(&run->in_done, 1), 0);
    if (job->number != run->handed || job->result != job->number + 1) {
        run->order_broken = true;
    }
    run->handed++;
    atomic_fetch_sub(&run->in_done, 1);
    return job->number == run->fail_done ? report(err, "done", job->number) : 0;
}

static const struct qlb_pipeline_ops ops = {
    .next = next, .work = work, .done = done,
};

static int run_with(struct run *run, unsigned n_jobs, unsigned threads,
                    const volatile bool *stop, struct qlb_error *err)
{
    struct job jobs[16];

    return qlb_pipeline_run(&ops, run, jobs, sizeof(jobs[0]), n_jobs, threads,
                            stop, err);
}

static struct run new_run(unsigned total)
{
    return (struct run) {
        .total = total, .fail_next = ~0u, .fail_work = ~0u, .fail_done = ~0u,
    };
}

static void test_all_jobs_in_order(void **state)
{
    struct qlb_error err;

    (void)state;
    for (unsigned threads = 1; threads <= 8; threads++) {
        for (unsigned n_jobs = threads; n_jobs <= 16; n_jobs += 3) {
            struct run run = new_run(1000);

            assert_int_equal(run_with(&run, n_jobs, threads, NULL, &err), 0);
            assert_int_equal(run.handed, 1000);
            assert_int_equal(run.worked, 1000);
            assert_false(run.order_broken);
        }
    }
}

static void test_no_jobs(void **state)
{
    struct run run = new_run(0);
    struct qlb_error err;

    (void)state;
    assert_int_equal(run_with(&run, 4, 2, NULL, &err), 0);
    assert_int_equal(run.handed, 0);
}

/* The error of the earliest failed job is reported; nothing behind it is
 * handed over. */
static void test_errors(void **state)
{
    struct qlb_error err;

    (void)state;
    for (unsigned at = 0; at < 60; at += 7) {
        for (unsigned threads = 1; threads <= 4; threads++) {
            struct run run = new_run(60);
            char expected[32];

            run.fail_work = at;
            assert_int_equal(run_with(&run, 8, threads, NULL, &err), -1);
            assert_int_equal(err.code, QLB_E_DAMAGED);
            sprintf(expected, "work %u", at);
            assert_string_equal(err.message, expected);
            assert_true(run.handed <= at);

            run = new_run(60);
            run.fail_next = at;
            assert_int_equal(run_with(&run, 8, threads, NULL, &err), -1);
            sprintf(expected, "next %u", at);
            assert_string_equal(err.message, expected);

            run = new_run(60);
            run.fail_done = at;
            assert_int_equal(run_with(&run, 8, threads, NULL, &err), -1);
            sprintf(expected, "done %u", at);
            assert_string_equal(err.message, expected);
            assert_int_equal(run.handed, at + 1);
        }
    }
}

static void test_stop(void **state)
{
    bool stop = false;
    struct run run = new_run(1000);
    struct qlb_error err;

    (void)state;
    run.stop = &stop;
    run.stop_at = 30;
    assert_int_equal(run_with(&run, 8, 3, &stop, &err), -1);
    assert_string_equal(err.message, "interrupted");
    assert_int_equal(err.code, QLB_E_RUNTIME);
    assert_int_equal(run.made, 30);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_jobs_in_order),
        cmocka_unit_test(test_no_jobs),
        cmocka_unit_test(test_errors),
        cmocka_unit_test(test_stop),
    };

    return cmocka_run_group_tests_name("pipeline", tests, NULL, NULL);
}
