/* Before a stopped machine is backed up: are its bitmaps right?
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/audit_disks.h"

#include <string.h>

#include "audit.h"

/* One without trust is compared as a whole by the backup itself: an audit that
 * can't be made is a note, and no more. */
static bool audit_disk(struct source_disk *disk,
                       const struct audit_wanted *wanted)
{
    struct qlb_uuid random = tool_random_uuid();
    struct audit_options options = {
        .path = disk->filename,
        .inputs = (const char *const *)disk->chain,
        .n_inputs = disk->n_chain,
        .share = wanted->share,
        .threads = wanted->threads,
        .progress = wanted->progress,
        .quiet = wanted->quiet,
    };

    memcpy(&options.seed, &random, sizeof(options.seed));
    if (audit(&options) != AUDIT_ALARM) {
        return false;
    }
    disk->distrust = "an audit found changes that were not tracked (audit)";
    return true;
}

bool audit_disks(struct source *source, const char *machine,
                 const struct audit_wanted *wanted)
{
    bool alarm = false;

    for (unsigned i = 0; wanted->share > 0 && i < source->n_disks; i++) {
        struct source_disk *disk = &source->disks[i];

        if (disk->n_chain > 0 && disk->has_parent) {
            alarm = audit_disk(disk, wanted) || alarm;
        } else if (!wanted->quiet) {
            tool_message("%s: %s: not audited: only a stopped disk with "
                         "livebackup can be, where its last backup is in a "
                         "repository on this host", machine, disk->name);
        }
    }
    return alarm;
}
