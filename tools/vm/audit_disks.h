/* Before a stopped machine is backed up: are its bitmaps right?
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_AUDIT_DISKS_H
#define VM_AUDIT_DISKS_H

#include "vm/source.h"

struct audit_wanted {
    unsigned share; /* percent of each disk; 0: no audit */
    unsigned threads;
    enum tool_progress_mode progress;
    bool quiet;
};

/* Audits each disk that has a way to go on, a random share of it, against its
 * chain; says which are not audited, and why. One where something has changed
 * that was not tracked gets `distrust`. Returns whether there was one. */
bool audit_disks(struct source *source, const char *machine,
                 const struct audit_wanted *wanted);

#endif
