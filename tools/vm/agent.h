/* A client of the QEMU guest agent, on the Unix socket of its channel.
 *
 * What is in the guest is hostile: it may be silent, talk nonsense or without
 * end. Every answer has the same limit in time, and one in size.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_AGENT_H
#define VM_AGENT_H

#include "tool.h"

struct agent;

/* patience: seconds for each answer. NULL on failure; errors of all functions
 * begin with the path, and are QLB_E_RUNTIME. */
struct agent *agent_connect(const char *path, unsigned patience,
                            struct qlb_error *err);
void agent_close(struct agent *agent); /* NULL is allowed */

/* Whether an agent is there and answers to us. What an earlier client asked is
 * out of the way then. Before a command: one that is sent to no agent waits in
 * the channel, and would be done when the agent starts, days later. */
int agent_sync(struct agent *agent, struct qlb_error *err);

/* n: how many file systems. Where freezing fails they may be frozen all the
 * same. */
int agent_freeze(struct agent *agent, unsigned *n, struct qlb_error *err);
int agent_thaw(struct agent *agent, unsigned *n, struct qlb_error *err);
int agent_is_frozen(struct agent *agent, bool *frozen, struct qlb_error *err);

/* Whether anything came as the answer to the last command: it is done, or
 * won't be. */
bool agent_was_answered(const struct agent *agent);

#endif
