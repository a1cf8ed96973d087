/* Other programs that lbvm has do a part of its work.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_COMMAND_H
#define VM_COMMAND_H

#include <sys/types.h>

#include "tool.h"

/* Starts words[0] (NULL ends them), found along PATH and in the folders for
 * administrators, as a shell would start it, its standard input empty. out,
 * errors: where its output goes; all other descriptors are closed. own_session:
 * it is to outlive us and our terminal. The process; -1. Where it can't be
 * started, it says why to errors, and ends with 127. */
pid_t command_start(const char *const *words, int out, int errors,
                    bool own_session, struct qlb_error *err);

/* A descriptor of a file without a name, to be read after it was written.
 * -1. */
int command_scratch(struct qlb_error *err);
/* All that is in it, a zero byte behind; for the caller to free. NULL. */
char *command_text(int scratch, size_t *len, struct qlb_error *err);

/* Starts it and waits for it: its wait status in *status. */
int command_run(const char *const *words, int out, int errors, int *status,
                struct qlb_error *err);

#endif
