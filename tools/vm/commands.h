/* The commands of lbvm.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_COMMANDS_H
#define VM_COMMANDS_H

#include "tool.h"

/* argv[0] is the command's name. Returns the exit status; messages are out
 * then. */
extern const struct tool vm_backup_tool;
int vm_backup(int argc, char **argv);

#endif
