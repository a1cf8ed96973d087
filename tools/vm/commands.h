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
extern const struct tool vm_list_tool;
int vm_list(int argc, char **argv);
extern const struct tool vm_show_tool;
int vm_show(int argc, char **argv);
extern const struct tool vm_verify_tool;
int vm_verify(int argc, char **argv);
extern const struct tool vm_prune_tool;
int vm_prune(int argc, char **argv);
extern const struct tool vm_restore_tool;
int vm_restore(int argc, char **argv);
extern const struct tool vm_export_tool;
int vm_export(int argc, char **argv);
extern const struct tool vm_mount_tool;
int vm_mount(int argc, char **argv);
extern const struct tool vm_umount_tool;
int vm_umount(int argc, char **argv);
extern const struct tool vm_ls_tool;
int vm_ls(int argc, char **argv);
extern const struct tool vm_cat_tool;
int vm_cat(int argc, char **argv);
extern const struct tool vm_init_timer_tool;
int vm_init_timer(int argc, char **argv);

#endif
