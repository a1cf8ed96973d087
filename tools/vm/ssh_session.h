/* A session with another host: ssh, and at its other end far_end.sh, which
 * needs a POSIX shell there and the usual commands, but no lbvm.
 *
 * What this program is for is not to be done twice: authentication, encryption
 * and what hosts are called are ssh's, with the operator's own configuration.
 * LBVM_SSH in the environment names another program, or gives ssh options.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_SSH_SESSION_H
#define VM_SSH_SESSION_H

#include "vm/store.h"

/* ssh://[USER@]HOST[:PORT]/PATH; /~/PATH is below the home folder. */
struct ssh_target {
    char *host;   /* with the user; never begins with - */
    char *port;   /* NULL: ssh's own */
    char *path;   /* "/srv/backups", "~/backups" */
};

int ssh_target_parse(struct ssh_target *target, const char *url,
                     struct qlb_error *err);
void ssh_target_release(struct ssh_target *target);

struct ssh_session;

/* Starts ssh, and does not wait for it. name: what messages begin with. */
struct ssh_session *ssh_session_start(const struct ssh_target *target,
                                      const char *name,
                                      struct qlb_error *err);
/* NULL is allowed. Its locks end, and so does what it was doing. */
void ssh_session_end(struct ssh_session *session);

/* Waits until the other end is there. All requests but a first one that data
 * follow without an end want that. */
int ssh_session_await(struct ssh_session *session, struct qlb_error *err);
/* The request's words, which must not hold a newline, and the data. */
int ssh_session_send(struct ssh_session *session, const char *const *words,
                     unsigned n, const void *data, size_t len,
                     struct qlb_error *err);
/* 1: the answer's length in bytes, which are to be read; 0: absent; -1.
 * QLB_E_BUSY: the message is not told. subject: what errors begin with. */
int ssh_session_answer(struct ssh_session *session, const char *subject,
                       uint64_t *len, struct qlb_error *err);
int ssh_session_read(struct ssh_session *session, void *buf, size_t len,
                     struct qlb_error *err);
/* An answer of few bytes, with a zero byte behind; for the caller to free. */
int ssh_session_answer_text(struct ssh_session *session, const char *subject,
                            struct store_text *text, struct qlb_error *err);

/* Where data are written to; and that these are all. */
int ssh_session_descriptor(const struct ssh_session *session);
void ssh_session_close_input(struct ssh_session *session);

/* Has the host run a program, its output to ours: the exit status; -1 where
 * ssh could not. */
int ssh_run(const struct ssh_target *target, const char *name,
            const char *const *words, unsigned n, struct qlb_error *err);

#endif
