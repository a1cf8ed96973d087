/* A chain of archives, served as a disk by nbdkit and our plugin for it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_NBDKIT_SERVER_H
#define VM_NBDKIT_SERVER_H

#include "tool.h"

/* The plugin, as nbdkit takes it: a path, or the name by which it finds it. */
const char *nbdkit_server_plugin(void);

struct nbdkit_server;

/* Serves the archives, up to the one of that checkpoint, read-only on a Unix
 * socket, whose path is taken over; who may enter its folder may connect, if he
 * is the user we are. It serves when this returns, and ends when we end, however
 * that is. name: what messages begin with. All are copied. NULL on failure. */
struct nbdkit_server *nbdkit_server_start(const char *name, const char *socket,
                                          const char *const *archives,
                                          unsigned n,
                                          const struct qlb_uuid *checkpoint,
                                          struct qlb_error *err);

/* To be called again and again: passes on what it has to say, and where it has
 * ended, not by our doing, starts another. An error where that can't be, or not
 * any more. */
int nbdkit_server_look_after(struct nbdkit_server *server,
                             struct qlb_error *err);

/* Whether it has told of damage in an archive. */
bool nbdkit_server_saw_damage(const struct nbdkit_server *server);

/* Ends it, and deletes the socket. NULL is allowed. */
void nbdkit_server_stop(struct nbdkit_server *server);

#endif
