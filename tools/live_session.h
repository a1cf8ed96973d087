/* A backup of disks of a running QEMU, from its beginning to its end: what
 * lbdump --qmp and lbvm share.
 *
 * Order of calls: live_session_init, list or add, begin, dump, end; and
 * release, which ends a backup that was not ended, as failed.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef LIVE_SESSION_H
#define LIVE_SESSION_H

#include "live_source.h"
#include "qmp.h"

struct live_session;

struct live_disk {
    struct live_session *session;
    char *name;          /* as QEMU calls it */
    enum dump_mode mode; /* at first that of the request, */
    struct qlb_uuid since; /* and so this; with DUMP_AUTO: zero, or since that
                              one if that can be trusted */

    /* what QEMU told at the beginning */
    char *filename, *orig;
    struct qlb_uuid checkpoint, parent;
    bool incremental;
    char *reason;        /* why DUMP_AUTO made a full one; or NULL */
    uint64_t unit;
    bool direct;

    struct live_source source;
    char *output;        /* path of the archive; NULL: standard output */
    struct dump_archive archive;

    /* bytes from the start; under the session's lock */
    uint64_t passed, released;
};

struct live_session {
    const char *target;  /* the monitor, for messages */
    const struct dump_request *request;
    bool durable;        /* survives a power loss; costs the guest syncs */
    struct live_disk *disks;
    unsigned n_disks;
    char job[64];
    struct qlb_uuid set; /* zero: QEMU chooses one at the beginning */
    uint64_t time;

    /* The keeper's while it runs, else the caller's. */
    struct qmp *qmp;
    bool begun, ended;

    pthread_t keeper;
    bool keeping;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool quit;          /* the keeper shall end */
    bool failed;        /* the keeper or a dump has met an error */
    struct qlb_error failure;
    struct live_disk *culprit; /* whose error it is; or NULL */

    struct dump_options dump;  /* of each disk */
};

/* Of the session that holds target and request (which must outlive it), and
 * is zero else. */
void live_session_init(struct live_session *session);
/* The connection becomes the session's in any case. */
void live_session_release(struct live_session *session);

int live_session_add(struct live_session *session, const char *name,
                     struct qlb_error *err);
/* Adds all disks that have livebackup on, in the order of their names; none is
 * an error. */
int live_session_find(struct live_session *session, struct qlb_error *err);

/* The point in time. */
int live_session_begin(struct live_session *session, struct qlb_error *err);
/* Dumps all disks into their archives, which were opened. They are whole and
 * synced afterwards, but have no names yet; and the backup was in order until
 * then. */
int live_session_dump(struct live_session *session, struct qlb_error *err);
int live_session_commit(struct live_session *session, struct qlb_error *err);
/* success: the checkpoints of archives that are safe are confirmed. */
int live_session_end(struct live_session *session, bool success,
                     struct qlb_error *err);

/* After an error of one of the above: ends the backup as failed, and prints the
 * error, with the file before it that it is about. Returns the exit status. */
int live_session_fail(struct live_session *session,
                      const struct qlb_error *err);

#endif
