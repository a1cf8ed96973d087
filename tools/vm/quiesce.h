/* The guest's file systems stand still while the point in time is made.
 *
 * Freezing and thawing are done by a process of its own, the guardian. It thaws
 * when it is told to, when we end, in whatever way, and when its time limit has
 * passed: a guest never stays frozen because lbvm was killed, or hangs.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_QUIESCE_H
#define VM_QUIESCE_H

#include "tool.h"

enum quiesce_policy {
    QUIESCE_REQUIRE, /* not frozen is an error */
    QUIESCE_TRY,     /* it is a message, and we go on */
};

struct quiesce_options {
    const char *agent;    /* the socket of the agent's channel; or: */
    const char *domain;   /* a libvirt domain, */
    const char *uri;      /* of that connection; NULL: the default */
    enum quiesce_policy policy;
    unsigned limit;       /* seconds; 0: 10 */
    unsigned patience;    /* seconds for an answer of the agent; 0: 10 */
};

struct quiesce;

/* Freezes. The options must live until the end. To be called before there are
 * threads: it forks. NULL on failure, when nothing stays frozen for longer than
 * it takes to thaw it. */
struct quiesce *quiesce_begin(const struct quiesce_options *options,
                              struct qlb_error *err);

/* Whether anything is frozen; not after QUIESCE_TRY had no luck. */
bool quiesce_is_frozen(const struct quiesce *quiesce);

/* Thaws, and frees. kept_until_now: everything was frozen since quiesce_begin
 * returned; where it is false the reason is in err (or, after QUIESCE_TRY, was
 * told then). -1: it could not be thawed yet; the guardian goes on trying. */
int quiesce_end(struct quiesce *quiesce, bool *kept_until_now,
                struct qlb_error *err);

#endif
