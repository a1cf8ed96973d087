/* Several things at once: which are done, and whose error counts.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <pthread.h>
#include <string.h>

#include "parallel.h"

enum { MANY = 200 };

struct state {
    pthread_mutex_t lock;
    unsigned times[MANY]; /* how often each was done */
    unsigned now, most;   /* at the same time */
    unsigned bad;         /* the number that fails */
};

static int do_one(void *opaque, unsigned i, struct qlb_error *err)
{
    struct state *state = opaque;

    pthread_mutex_lock(&state->lock);
    state->times[i]++;
    state->now++;
    if (state->now > state->most) {
        state->most = state->now;
    }
    pthread_mutex_unlock(&state->lock);
    sched_yield();
    pthread_mutex_lock(&state->lock);
    state->now--;
    pthread_mutex_unlock(&state->lock);
    return i == state->bad ? qlb_fail(err, QLB_E_DAMAGED, "number %u", i) : 0;
}

static struct state new_state(unsigned bad)
{
    return (struct state) {
        .lock = PTHREAD_MUTEX_INITIALIZER, .bad = bad,
    };
}

static void test_each_is_done_once(void **unused)
{
    for (unsigned at_once = 0; at_once < 9; at_once++) {
        struct state state = new_state(MANY);
        struct qlb_error err;

        assert_int_equal(parallel_run(MANY, at_once, do_one, &state, NULL,
                                      &err), 0);
        for (unsigned i = 0; i < MANY; i++) {
            assert_int_equal(state.times[i], 1);
        }
        assert_true(state.most <= (at_once == 0 ? 1 : at_once));
    }
}

static void test_nothing_to_do(void **unused)
{
    struct state state = new_state(MANY);
    struct qlb_error err;

    assert_int_equal(parallel_run(0, 4, do_one, &state, NULL, &err), 0);
    assert_int_equal(state.most, 0);
}

static void test_an_error_is_told_and_ends_it(void **unused)
{
    struct state state = new_state(7);
    unsigned culprit = MANY;
    struct qlb_error err;

    assert_int_equal(parallel_run(MANY, 1, do_one, &state, &culprit, &err),
                     -1);
    assert_int_equal(culprit, 7);
    assert_int_equal(err.code, QLB_E_DAMAGED);
    assert_string_equal(err.message, "number 7");
    assert_int_equal(state.times[7], 1);
    assert_int_equal(state.times[8], 0);
}

static void test_an_error_among_several_threads(void **unused)
{
    for (unsigned round = 0; round < 50; round++) {
        struct state state = new_state(round);
        unsigned culprit = MANY;
        struct qlb_error err;

        assert_int_equal(parallel_run(MANY, 4, do_one, &state, &culprit,
                                      &err), -1);
        assert_int_equal(culprit, round);
        assert_int_equal(state.now, 0);
        for (unsigned i = 0; i < round; i++) {
            assert_int_equal(state.times[i], 1);
        }
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_each_is_done_once),
        cmocka_unit_test(test_nothing_to_do),
        cmocka_unit_test(test_an_error_is_told_and_ends_it),
        cmocka_unit_test(test_an_error_among_several_threads),
    };

    return cmocka_run_group_tests_name("parallel", tests, NULL, NULL);
}
