/* How a command ended for a machine, for those who watch it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_OUTCOME_H
#define VM_OUTCOME_H

#include "vm/metrics.h"
#include "vm/options.h"

/* Tells it where the options or the environment name a file for that.
 * name: of the machine; machine: where it could be opened, else NULL;
 * newest: its newest backup, or NULL; begun: as tool_clock() said;
 * status: the exit status.
 * Returns that status, or QLB_E_RUNTIME where it is 0 and the file can't be
 * written; the message is out then. */
int outcome_note(const struct vm_options *options,
                 enum metrics_command command, const char *name,
                 const struct machine *machine,
                 const struct manifest *newest, double begun, int status);

#endif
