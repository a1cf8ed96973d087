/* lbvm: backups of whole machines in a repository.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <string.h>

#include "vm/commands.h"

static const struct tool_option plain_options[] = {
    TOOL_COMMON_OPTIONS,
};

static const struct {
    const struct tool *tool;
    int (*run)(int argc, char **argv);
} commands[] = {
    { &vm_backup_tool, vm_backup },
    { &vm_list_tool, vm_list },
    { &vm_show_tool, vm_show },
    { &vm_verify_tool, vm_verify },
    { &vm_prune_tool, vm_prune },
    { &vm_restore_tool, vm_restore },
    { &vm_export_tool, vm_export },
    { &vm_mount_tool, vm_mount },
    { &vm_umount_tool, vm_umount },
    { &vm_ls_tool, vm_ls },
    { &vm_cat_tool, vm_cat },
    { &vm_init_timer_tool, vm_init_timer },
};

enum { N_COMMANDS = sizeof(commands) / sizeof(commands[0]) };

static const struct tool lbvm_tool = {
    .name = "lbvm",
    .synopsis = "COMMAND [OPTION]... [ARGUMENT]...\n\n"
                "Commands:\n"
                "  backup      back up all disks of a machine\n"
                "  list        list machines, or the backups of one\n"
                "  show        tell all about a backup\n"
                "  verify      check the archives\n"
                "  prune       keep some backups, drop the others\n"
                "  restore     restore the disks of a machine\n"
                "  export      write one disk to a file or a pipe\n"
                "  mount       show the disks of a backup as files\n"
                "  umount      take them away again\n"
                "  ls          list a folder in a disk of a backup\n"
                "  cat         print a file from a disk of a backup\n"
                "  init-timer  have systemd do all that regularly\n",
    .summary = "Backs up whole machines to a repository, and restores them. "
               "'lbvm COMMAND --help'\ntells more.",
    .options = plain_options,
};

int main(int argc, char **argv)
{
    tool_begin("lbvm");
    if (argc < 2 || argv[1][0] == '-') {
        tool_getopt(&lbvm_tool, argc, argv);
        tool_usage("a COMMAND is wanted; --help lists them");
    }
    for (unsigned i = 0; i < N_COMMANDS; i++) {
        if (strcmp(strchr(commands[i].tool->name, ' ') + 1, argv[1]) == 0) {
            return commands[i].run(argc - 1, argv + 1);
        }
    }
    tool_usage("unknown command '%s'", argv[1]);
}
