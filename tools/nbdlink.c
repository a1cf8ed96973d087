/* A connection to an NBD server.
 *
 * libnbd's handle is used through its asynchronous calls alone, under the
 * link's lock.  Whoever waits for an answer polls the socket for all, if
 * nobody does so yet, or else sleeps until the one who does has been round.
 * A round lasts TICK_MS at the most, and after each everybody looks at
 * tool_stop.  Once that is set nobody lets libnbd run any more, so that it
 * writes into no buffer whose owner has left.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "nbdlink.h"

#include <errno.h>
#include <inttypes.h>
#include <libnbd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define TICK_MS 100
/* What the protocol allows for where the server names no limit. */
#define DEFAULT_REQUEST_MAX (UINT32_C(32) << 20)
/* The length of a request has 32 bits. */
#define STATUS_MAX (UINT64_C(0x100000000) - 65536)
/* More are dropped, and asked for again when they are needed. */
#define EXTENTS_MAX 65536u

struct nbdlink {
    struct nbd_handle *nbd;
    char *context;          /* NULL: the server does not have it */
    uint64_t size;
    uint32_t block;         /* what offsets and lengths are multiples of */
    uint64_t request_max;   /* bytes */
    bool multi;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool polling;           /* one of the threads */
    char failure[512];      /* why the connection is lost; or empty */
};

/* ---- errors ---- */

/* libnbd's message, without the name of the function. */
static const char *reason(void)
{
    const char *text = nbd_get_error();
    const char *colon = text == NULL ? NULL : strstr(text, ": ");

    if (text == NULL) {
        return "unknown error";
    }
    return strncmp(text, "nbd_", 4) == 0 && colon != NULL ? colon + 2 : text;
}

static void connecting_failed(struct nbdlink *link)
{
    if (link->failure[0] == '\0') {
        snprintf(link->failure, sizeof(link->failure), "%s", reason());
    }
}

static bool is_lost(const struct nbdlink *link)
{
    return nbd_aio_is_dead(link->nbd) == 1 ||
           nbd_aio_is_closed(link->nbd) == 1;
}

static int fail_lost(const struct nbdlink *link, struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_RUNTIME, "the connection was lost: %s",
                    link->failure[0] == '\0' ? "the server has closed it"
                                             : link->failure);
}

static int check_alive(const struct nbdlink *link, struct qlb_error *err)
{
    return is_lost(link) ? fail_lost(link, err) : 0;
}

/* ---- waiting ---- */

static void notify(struct nbdlink *link, short events)
{
    unsigned direction = nbd_aio_get_direction(link->nbd);
    short odd = POLLHUP | POLLERR | POLLNVAL;
    int ret = 0;

    if ((direction & LIBNBD_AIO_DIRECTION_READ) &&
        (events & (POLLIN | odd))) {
        ret = nbd_aio_notify_read(link->nbd);
    } else if ((direction & LIBNBD_AIO_DIRECTION_WRITE) &&
               (events & (POLLOUT | odd))) {
        ret = nbd_aio_notify_write(link->nbd);
    }
    if (ret < 0) {
        connecting_failed(link);
    }
}

/* Over TLS the end of QEMU's answer waits, in Nagle's algorithm, for our
 * acknowledgement of its start: have that go at once. The kernel forgets that
 * it was told so. */
static void acknowledge(const struct nbdlink *link)
{
    int fd = nbd_aio_get_fd(link->nbd), yes = 1;

    setsockopt(fd, IPPROTO_TCP, TCP_QUICKACK, &yes, sizeof(yes));
}

/* Lock held, released meanwhile. */
static void poll_once(struct nbdlink *link)
{
    unsigned direction = nbd_aio_get_direction(link->nbd);
    struct pollfd pollfd = { .fd = nbd_aio_get_fd(link->nbd) };

    if (direction & LIBNBD_AIO_DIRECTION_READ) {
        pollfd.events |= POLLIN;
    }
    if (direction & LIBNBD_AIO_DIRECTION_WRITE) {
        pollfd.events |= POLLOUT;
    }
    link->polling = true;
    pthread_mutex_unlock(&link->lock);
    poll(&pollfd, 1, TICK_MS);
    pthread_mutex_lock(&link->lock);
    link->polling = false;
    if (!tool_stop) {
        notify(link, pollfd.revents);
        acknowledge(link);
    }
    pthread_cond_broadcast(&link->changed);
}

/* Waits until the server has answered the command: 0, or the error that it
 * has answered; -1 is an error of the connection. Lock held. */
static int finish(struct nbdlink *link, int64_t cookie, struct qlb_error *err)
{
    int done;

    if (cookie < 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s", reason());
    }
    while ((done = nbd_aio_command_completed(link->nbd,
                                             (uint64_t)cookie)) == 0) {
        if (tool_stop) {
            return qlb_fail(err, QLB_E_RUNTIME, "interrupted");
        }
        if (link->polling) {
            pthread_cond_wait(&link->changed, &link->lock);
        } else {
            poll_once(link);
        }
    }
    if (done > 0) {
        return 0;
    }
    if (is_lost(link)) {
        return fail_lost(link, err);
    }
    done = nbd_get_errno();
    return done > 0 ? done : EIO;
}

/* ---- connecting ---- */

static int prepare(struct nbdlink *link, const char *context,
                   struct qlb_error *err)
{
    struct nbd_handle *nbd = link->nbd = nbd_create();

    if (nbd == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s", reason());
    }
    link->context = context == NULL ? NULL : strdup(context);
    /* The end of an export may be no multiple of its blocks. */
    if ((context != NULL && link->context == NULL) ||
        nbd_set_uri_allow_local_file(nbd, true) < 0 ||
        nbd_set_strict_mode(nbd, nbd_get_strict_mode(nbd) &
                                     ~LIBNBD_STRICT_ALIGN) < 0 ||
        (context != NULL && nbd_add_meta_context(nbd, context) < 0)) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s", reason());
    }
    return 0;
}

/* What TLS libraries say is a riddle where one side does not take what the
 * other shows. */
static const char *explain(const struct nbdlink *link)
{
    const char *text = link->failure;

    if (text[0] == '\0') {
        return "the server has closed the connection";
    }
    if (strncmp(text, "gnutls_record_", 14) != 0 &&
        strncmp(text, "gnutls_handshake: ", 18) != 0) {
        return text;
    }
    if (strstr(text, "certificate verification") != NULL) {
        return "the server's certificate is not trusted, or not for this "
               "host";
    }
    if (text[7] == 'r' || strstr(text, "terminated") != NULL ||
        strstr(text, "alert") != NULL) {
        return "the server has ended the TLS handshake; does it take our "
               "certificate or key?";
    }
    return text;
}

/* A host that has gone without a word is noticed: within two minutes. A Unix
 * socket does not know these options, and needs none. */
static void keep_alive(const struct nbdlink *link)
{
    static const struct {
        int level, name, value;
    } options[] = {
        { SOL_SOCKET, SO_KEEPALIVE, 1 },
        { IPPROTO_TCP, TCP_KEEPIDLE, 60 },
        { IPPROTO_TCP, TCP_KEEPINTVL, 10 },
        { IPPROTO_TCP, TCP_KEEPCNT, 6 },
        { IPPROTO_TCP, TCP_USER_TIMEOUT, 120000 }, /* ms */
    };
    int fd = nbd_aio_get_fd(link->nbd);

    for (size_t i = 0; i < sizeof(options) / sizeof(options[0]); i++) {
        setsockopt(fd, options[i].level, options[i].name, &options[i].value,
                   sizeof(options[i].value));
    }
}

/* Lock held, as for all that waits. */
static int connect_to(struct nbdlink *link, const char *uri, double patience,
                      struct qlb_error *err)
{
    double start = tool_clock();

    if (nbd_aio_connect_uri(link->nbd, uri) < 0) {
        connecting_failed(link);
    }
    while (nbd_aio_is_connecting(link->nbd) == 1) {
        if (tool_stop) {
            return qlb_fail(err, QLB_E_RUNTIME, "interrupted");
        }
        if (patience > 0 && tool_clock() - start > patience) {
            return qlb_fail(err, QLB_E_RUNTIME, "can't connect: the server "
                            "does not answer");
        }
        poll_once(link);
    }
    if (nbd_aio_is_ready(link->nbd) != 1) {
        return qlb_fail(err, QLB_E_RUNTIME, "can't connect: %s",
                        explain(link));
    }
    keep_alive(link);
    return 0;
}

static int learn(struct nbdlink *link, struct qlb_error *err)
{
    int64_t size = nbd_get_size(link->nbd);
    int64_t block = nbd_get_block_size(link->nbd, LIBNBD_SIZE_MINIMUM);
    int64_t preferred = nbd_get_block_size(link->nbd, LIBNBD_SIZE_PREFERRED);
    int64_t most = nbd_get_block_size(link->nbd, LIBNBD_SIZE_MAXIMUM);

    if (size < 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s", reason());
    }
    link->size = (uint64_t)size;
    link->block = block > 0 ? (uint32_t)block : 1;
    link->request_max = most > 0 ? (uint64_t)most : DEFAULT_REQUEST_MAX;
    if (link->request_max > DEFAULT_REQUEST_MAX) {
        link->request_max = DEFAULT_REQUEST_MAX;
    }
    if (preferred > 0 && link->request_max > (uint64_t)preferred) {
        link->request_max -= link->request_max % (uint64_t)preferred;
    }
    link->multi = nbd_can_multi_conn(link->nbd) == 1;
    if (link->context != NULL &&
        nbd_can_meta_context(link->nbd, link->context) != 1) {
        free(link->context);
        link->context = NULL;
    }
    return 0;
}

/* Seconds within which a server has heard the end of a connection: where the
 * network works; and else, when QEMU has given up its client's handshake, for
 * which it gives 10. */
enum { SOON = 1, AT_LAST = 12 };

static _Atomic double unsure_until;

/* That one side has turned the other's credentials down tells that there is a
 * network between the two. */
static void note_failed_open(const struct nbdlink *link)
{
    bool heard = strstr(link->failure, "certificate verification") != NULL ||
                 strstr(link->failure, "alert") != NULL;

    atomic_store(&unsure_until, tool_clock() + (heard ? SOON : AT_LAST));
}

double nbdlink_unsure_until(void)
{
    return atomic_load(&unsure_until);
}

struct nbdlink *nbdlink_open(const char *uri, const char *context,
                             double patience, struct qlb_error *err)
{
    struct nbdlink *link = calloc(1, sizeof(*link));
    int ret;

    if (link == NULL) {
        qlb_fail_errno(err, ENOMEM, "connecting");
        return NULL;
    }
    pthread_mutex_init(&link->lock, NULL);
    pthread_cond_init(&link->changed, NULL);
    pthread_mutex_lock(&link->lock);
    ret = prepare(link, context, err) < 0 ||
                  connect_to(link, uri, patience, err) < 0 ||
                  learn(link, err) < 0 ? -1 : 0;
    pthread_mutex_unlock(&link->lock);
    if (ret < 0) {
        note_failed_open(link);
        nbdlink_close(link);
        return NULL;
    }
    return link;
}

void nbdlink_close(struct nbdlink *link)
{
    if (link == NULL) {
        return;
    }
    if (link->nbd != NULL && !tool_stop &&
        nbd_aio_is_ready(link->nbd) == 1) {
        nbd_aio_disconnect(link->nbd, 0); /* a word of farewell */
    }
    nbd_close(link->nbd);
    pthread_cond_destroy(&link->changed);
    pthread_mutex_destroy(&link->lock);
    free(link->context);
    free(link);
}

uint64_t nbdlink_size(const struct nbdlink *link)
{
    return link->size;
}

bool nbdlink_has_context(const struct nbdlink *link)
{
    return link->context != NULL;
}

bool nbdlink_is_multi(const struct nbdlink *link)
{
    return link->multi;
}

/* ---- reading ---- */

/* Where the server says that the error is. */
static int take_chunk(void *opaque, const void *buf, size_t length,
                      uint64_t offset, unsigned status, int *error)
{
    uint64_t *bad = opaque;

    (void)buf;
    (void)length;
    (void)error;
    if (status == LIBNBD_READ_ERROR) {
        *bad = offset;
    }
    return 0;
}

static int read_once(struct nbdlink *link, void *buf, uint64_t offset,
                     uint64_t length, struct qlb_error *err)
{
    uint64_t bad = offset;
    nbd_chunk_callback chunk = { .callback = take_chunk, .user_data = &bad };
    int64_t cookie;
    int ret;

    pthread_mutex_lock(&link->lock);
    ret = check_alive(link, err);
    if (ret == 0) {
        cookie = nbd_aio_pread_structured(link->nbd, buf, length, offset,
                                          chunk, NBD_NULL_COMPLETION, 0);
        ret = finish(link, cookie, err);
    }
    pthread_mutex_unlock(&link->lock);
    if (ret > 0) {
        return qlb_fail_errno(err, ret, "reading at offset %" PRIu64, bad);
    }
    return ret;
}

int nbdlink_read(struct nbdlink *link, void *buf, uint64_t offset,
                 uint64_t length, struct qlb_error *err)
{
    for (uint64_t done = 0, n; done < length; done += n) {
        n = length - done < link->request_max ? length - done
                                              : link->request_max;
        if (read_once(link, (uint8_t *)buf + done, offset + done, n,
                      err) < 0) {
            return -1;
        }
    }
    return 0;
}

int nbdlink_write(struct nbdlink *link, const void *buf, uint64_t offset,
                  uint64_t length, struct qlb_error *err)
{
    int64_t cookie;
    int ret;

    pthread_mutex_lock(&link->lock);
    ret = check_alive(link, err);
    if (ret == 0) {
        cookie = nbd_aio_pwrite(link->nbd, buf, length, offset,
                                NBD_NULL_COMPLETION, 0);
        ret = finish(link, cookie, err);
    }
    pthread_mutex_unlock(&link->lock);
    if (ret > 0) {
        return qlb_fail_errno(err, ret, "writing at offset %" PRIu64, offset);
    }
    return ret;
}

/* ---- block status ---- */

struct status_request {
    const struct nbdlink *link;
    struct nbdlink_extents *extents;
    bool answered;
    const char *problem; /* or NULL */
};

static const char *add_extent(struct status_request *request, uint32_t length,
                              uint32_t flags)
{
    const struct nbdlink *link = request->link;
    struct nbdlink_extents *e = request->extents;

    if (length == 0) {
        return "an extent of length 0";
    }
    if (length > link->size - e->end) {
        return "an extent beyond the end of the export";
    }
    if (length % link->block != 0 && e->end + length != link->size) {
        return "an extent that is no multiple of the block size";
    }
    if (e->n == e->capacity) {
        unsigned capacity = e->capacity == 0 ? 64 : 2 * e->capacity;
        void *grown = realloc(e->extents, capacity * sizeof(*e->extents));

        if (grown == NULL) {
            return "more extents than there is memory for";
        }
        e->extents = grown;
        e->capacity = capacity;
    }
    e->end += length;
    e->extents[e->n++] = (struct nbdlink_extent) { e->end, flags };
    return NULL;
}

/* Called by libnbd, with the lock held. entries: lengths and flags by turns. */
static int take_extents(void *opaque, const char *context, uint64_t offset,
                        uint32_t *entries, size_t n, int *error)
{
    struct status_request *request = opaque;

    (void)offset;
    (void)error;
    if (strcmp(context, request->link->context) != 0) {
        return 0;
    }
    if (request->answered && request->problem == NULL) {
        request->problem = "two lists of extents";
    }
    request->answered = true;
    for (size_t i = 0; i + 1 < n && request->problem == NULL &&
                       request->extents->n < EXTENTS_MAX; i += 2) {
        request->problem = add_extent(request, entries[i], entries[i + 1]);
    }
    return 0;
}

int nbdlink_status(struct nbdlink *link, uint64_t offset, uint64_t length,
                   struct nbdlink_extents *extents, struct qlb_error *err)
{
    struct status_request request = { .link = link, .extents = extents };
    nbd_extent_callback take = {
        .callback = take_extents,
        .user_data = &request,
    };
    int64_t cookie;
    int ret;

    extents->start = extents->end = offset;
    extents->n = 0;
    if (length > STATUS_MAX) {
        length = STATUS_MAX;
    }
    pthread_mutex_lock(&link->lock);
    ret = check_alive(link, err);
    if (ret == 0) {
        cookie = nbd_aio_block_status(link->nbd, length, offset, take,
                                      NBD_NULL_COMPLETION, 0);
        ret = finish(link, cookie, err);
    }
    pthread_mutex_unlock(&link->lock);
    if (ret < 0) {
        return -1;
    }
    if (ret > 0) {
        return qlb_fail_errno(err, ret, "block status at offset %" PRIu64,
                              offset);
    }
    if (request.problem == NULL && extents->n == 0) {
        request.problem = "no extent";
    }
    if (request.problem != NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "block status at offset %" PRIu64
                        ": the answer has %s", offset, request.problem);
    }
    return 0;
}

void nbdlink_extents_release(struct nbdlink_extents *extents)
{
    free(extents->extents);
}
