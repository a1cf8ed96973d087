/* Several things of one kind at once.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "parallel.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

struct work {
    int (*do_one)(void *opaque, unsigned i, struct qlb_error *err);
    void *opaque;
    unsigned n;
    pthread_mutex_t lock;
    unsigned next;
    bool failed;
    unsigned culprit;
    struct qlb_error failure;
};

/* The next number, or n. */
static unsigned take(struct work *work)
{
    unsigned i;

    pthread_mutex_lock(&work->lock);
    i = work->failed || work->next == work->n ? work->n : work->next++;
    pthread_mutex_unlock(&work->lock);
    return i;
}

static void fail(struct work *work, unsigned i, const struct qlb_error *err)
{
    pthread_mutex_lock(&work->lock);
    if (!work->failed) {
        work->failed = true;
        work->culprit = i;
        work->failure = *err;
    }
    pthread_mutex_unlock(&work->lock);
}

static void *run(void *arg)
{
    struct work *work = arg;
    struct qlb_error err;
    unsigned i;

    while ((i = take(work)) < work->n) {
        if (work->do_one(work->opaque, i, &err) < 0) {
            fail(work, i, &err);
        }
    }
    return NULL;
}

int parallel_run(unsigned n, unsigned at_once,
                 int (*do_one)(void *opaque, unsigned i,
                               struct qlb_error *err),
                 void *opaque, unsigned *culprit, struct qlb_error *err)
{
    struct work work = { .do_one = do_one, .opaque = opaque, .n = n };
    unsigned wanted = at_once < n ? at_once : n, started = 0;
    pthread_t *threads = calloc(wanted + 1, sizeof(*threads));

    if (threads == NULL) {
        return qlb_fail_errno(err, ENOMEM, "starting threads");
    }
    pthread_mutex_init(&work.lock, NULL);
    /* This thread is one of them. */
    while (started + 1 < wanted &&
           pthread_create(&threads[started], NULL, run, &work) == 0) {
        started++;
    }
    run(&work);
    while (started > 0) {
        pthread_join(threads[--started], NULL);
    }
    pthread_mutex_destroy(&work.lock);
    free(threads);
    if (!work.failed) {
        return 0;
    }
    *err = work.failure;
    if (culprit != NULL) {
        *culprit = work.culprit;
    }
    return -1;
}
