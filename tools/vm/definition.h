/* What QEMU tells of a machine: kept beside the disks, so that somebody who
 * restores them knows what they were in.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_DEFINITION_H
#define VM_DEFINITION_H

#include "qmp.h"

/* { "name", "uuid", "qemu", "status", "cpus", "memory", "block" }, as query-name
 * and its like answer; what a QEMU can't tell is null. The text is the
 * caller's to free. NULL on failure. */
char *definition_of_qemu(struct qmp *qmp, struct qlb_error *err);

#endif
