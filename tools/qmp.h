/* A client of QEMU's monitor (QMP), on a Unix socket or by other ways.
 *
 * One command at a time; events are skipped. Not thread-safe.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef QMP_H
#define QMP_H

#include "tool.h"

struct qmp;

/* Seconds that QEMU has for an answer. */
enum { QMP_PATIENCE = 120 };

/* A way to a monitor. */
struct qmp_ops {
    /* Sends a request, an object with "execute" and perhaps "arguments", to
     * which it may add. Returns the answer, an object, for the caller to
     * release, or NULL: none came (QLB_E_RUNTIME), or tool_stop was set and
     * the call interruptible. */
    json_t *(*call)(void *opaque, json_t *request, bool interruptible,
                    struct qlb_error *err);
    void (*close)(void *opaque);
};

/* target: what errors begin with (copied). Takes opaque: closes it, also where
 * it fails, which is for lack of memory. */
struct qmp *qmp_new(const struct qmp_ops *ops, void *opaque,
                    const char *target, struct qlb_error *err);

/* Connects, takes the greeting, and leaves the negotiation. NULL on failure.
 * Errors of all functions begin with the path. */
struct qmp *qmp_connect(const char *path, struct qlb_error *err);
void qmp_close(struct qmp *qmp); /* NULL is allowed */

/* Whether waiting for an answer ends, as an error, where tool_stop is set. The
 * answer that comes later is skipped. At first it does. */
void qmp_set_interruptible(struct qmp *qmp, bool interruptible);

/* Sends a command with its arguments (NULL: none), which are released. Returns
 * what QEMU returns, for the caller to release, or NULL: what QEMU refuses for
 * lack of trust is QLB_E_UNTRUSTED, for another backup of the disk QLB_E_BUSY, all
 * else QLB_E_RUNTIME. */
json_t *qmp_call(struct qmp *qmp, const char *command, json_t *arguments,
                 struct qlb_error *err);

/* Whether QEMU has that command; not, where it doesn't answer. */
bool qmp_has_command(struct qmp *qmp, const char *command);

/* The entry of the device that has that node, in what query-block returns;
 * NULL: none has. */
const json_t *qmp_find_block(const json_t *devices, const char *node);

/* Whether the last command was answered, be it with an error: the connection
 * is in order. */
bool qmp_was_answered(const struct qmp *qmp);

#endif
