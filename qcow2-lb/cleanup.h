/* Release bound to scope.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_CLEANUP_H
#define QLB_CLEANUP_H

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static inline void qlb_cleanup_free(void *p)
{
    free(*(void **)p);
}

static inline void qlb_cleanup_close(int *fd)
{
    if (*fd >= 0) {
        close(*fd);
    }
}

static inline void qlb_cleanup_unlock(pthread_mutex_t **lock)
{
    pthread_mutex_unlock(*lock);
}

static inline pthread_mutex_t *qlb_lock(pthread_mutex_t *lock)
{
    pthread_mutex_lock(lock);
    return lock;
}

/* char *p QLB_AUTO_FREE = malloc(n);   freed at the end of the scope */
#define QLB_AUTO_FREE __attribute__((cleanup(qlb_cleanup_free)))

/* int fd QLB_AUTO_CLOSE = open(...); */
#define QLB_AUTO_CLOSE __attribute__((cleanup(qlb_cleanup_close)))

/* Holds the mutex until the end of the enclosing block. */
#define QLB_LOCK_SCOPE(lock)                                                  \
    pthread_mutex_t *qlb_scope_lock                                           \
        __attribute__((cleanup(qlb_cleanup_unlock), unused)) = qlb_lock(lock)

#endif
