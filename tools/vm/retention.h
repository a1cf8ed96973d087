/* Which backups a policy keeps, as borg and Proxmox count them.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_RETENTION_H
#define VM_RETENTION_H

#include <stdbool.h>
#include <stdint.h>

enum retention_rule {
    RETENTION_LAST, RETENTION_HOURLY, RETENTION_DAILY, RETENTION_WEEKLY,
    RETENTION_MONTHLY, RETENTION_YEARLY, RETENTION_RULES,
};

struct retention {
    unsigned keep[RETENTION_RULES]; /* 0: the rule keeps none */
};

/* times: seconds since 1970, ascending. kept[i]: the rule that keeps it, or
 * RETENTION_RULES where none does. Rules are applied in their order, from the
 * newest backup to the oldest: each keeps the newest of each of its periods, in
 * local time, that has none kept by an earlier rule, until it has kept its
 * number (a backup that an earlier rule keeps doesn't count, its period is
 * passed over). Weeks are those of ISO 8601. */
void retention_apply(const struct retention *retention, const uint64_t *times,
                     unsigned n, enum retention_rule *kept);

/* "last", "hourly", ... */
const char *retention_name(enum retention_rule rule);

#endif
