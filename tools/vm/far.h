/* Commands that read and write whole archives run where the repository is.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_FAR_H
#define VM_FAR_H

#include "vm/outcome.h"

/* Where the repository is on another host: has the lbvm there run the command,
 * after its options were looked at here, and returns its exit status; messages
 * are out then, and metrics of the machines that were named. -1: the repository
 * is here. */
int far_run(const struct vm_options *options, enum metrics_command command,
            int argc, char **argv);

#endif
