/* A command of the operator's that runs before and after.
 *
 * It is run by /bin/sh -c, with LBVM_MACHINE, LBVM_EVENT and LBVM_STATUS in its
 * environment, standard input empty, and standard output where standard error
 * goes. Once "pre-freeze" has run, in whatever way it ended, "post-thaw" runs,
 * and then "post-backup" or "failed".
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_HOOKS_H
#define VM_HOOKS_H

#include "tool.h"

struct hooks {
    const char *command; /* NULL: none, and all functions succeed */
    const char *machine;
    unsigned limit;      /* seconds for each run; 0: 300 */

    /* private, zero at first */
    bool begun, thawed, ended;
};

/* "pre-freeze". Fails where the command does: then nothing must be backed up.
 * Ends as an error where tool_stop is set. */
int hooks_before(struct hooks *hooks, struct qlb_error *err);

/* "post-thaw", at most once, and only after hooks_before. */
int hooks_thawed(struct hooks *hooks, struct qlb_error *err);

/* "post-thaw" if it didn't run yet; "post-backup" for status 0, else "failed";
 * at most once, and only after hooks_before. Everything runs, whatever fails;
 * the first error counts. */
int hooks_after(struct hooks *hooks, int status, struct qlb_error *err);

#endif
