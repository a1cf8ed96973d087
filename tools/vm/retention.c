/* Which backups a policy keeps.
 *
 * A period is a number, and times of one period have the same. Numbers needn't
 * be in the order of times: where clocks go back over midnight, a day is left
 * and entered again, and is still one period.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/retention.h"

#include <stdlib.h>
#include <time.h>

struct entry {
    uint64_t period;
    unsigned index;
};

static const char *const names[] = {
    [RETENTION_LAST] = "last",
    [RETENTION_HOURLY] = "hourly",
    [RETENTION_DAILY] = "daily",
    [RETENTION_WEEKLY] = "weekly",
    [RETENTION_MONTHLY] = "monthly",
    [RETENTION_YEARLY] = "yearly",
};

const char *retention_name(enum retention_rule rule)
{
    return names[rule];
}

/* The year and the week of ISO 8601 as one number. */
static uint64_t week_of(const struct tm *tm)
{
    char text[16];

    strftime(text, sizeof(text), "%G%V", tm);
    return strtoull(text, NULL, 10);
}

/* As people write the period, the largest part first; an hour that clocks
 * repeat is one. */
static uint64_t period_of(enum retention_rule rule, uint64_t seconds)
{
    time_t t = (time_t)seconds;
    uint64_t period;
    struct tm tm;

    if (localtime_r(&t, &tm) == NULL) {
        return UINT64_MAX - seconds; /* a period of its own */
    }
    if (rule == RETENTION_WEEKLY) {
        return week_of(&tm);
    }
    period = (uint64_t)(tm.tm_year + 1900);
    if (rule <= RETENTION_MONTHLY) {
        period = period * 100 + (uint64_t)tm.tm_mon;
    }
    if (rule <= RETENTION_DAILY) {
        period = period * 100 + (uint64_t)tm.tm_mday;
    }
    if (rule <= RETENTION_HOURLY) {
        period = period * 100 + (uint64_t)tm.tm_hour;
    }
    return period;
}

/* By period, in each the newest first. */
static int compare_periods(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;

    if (x->period != y->period) {
        return x->period < y->period ? -1 : 1;
    }
    return x->index < y->index ? 1 : -1;
}

static int compare_newest(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;

    return x->index < y->index ? 1 : -1;
}

/* Leaves, of each period that has none kept, the newest: their number. */
static unsigned take_newest(struct entry *entries, unsigned n,
                            const enum retention_rule *kept)
{
    unsigned taken = 0, end;

    for (unsigned first = 0; first < n; first = end) {
        bool passed_over = false;

        for (end = first; end < n &&
             entries[end].period == entries[first].period; end++) {
            passed_over |= kept[entries[end].index] != RETENTION_RULES;
        }
        if (!passed_over) {
            entries[taken++] = entries[first];
        }
    }
    return taken;
}

static void apply_rule(enum retention_rule rule, unsigned keep,
                       const uint64_t *times, unsigned n,
                       struct entry *entries, enum retention_rule *kept)
{
    unsigned taken;

    for (unsigned i = 0; i < n; i++) {
        entries[i].index = i;
        entries[i].period = rule == RETENTION_LAST ? i
                                                   : period_of(rule, times[i]);
    }
    qsort(entries, n, sizeof(*entries), compare_periods);
    taken = take_newest(entries, n, kept);
    qsort(entries, taken, sizeof(*entries), compare_newest);
    for (unsigned i = 0; i < taken && i < keep; i++) {
        kept[entries[i].index] = rule;
    }
}

void retention_apply(const struct retention *retention, const uint64_t *times,
                     unsigned n, enum retention_rule *kept)
{
    struct entry *entries = calloc(n + 1, sizeof(*entries));

    tzset();
    for (unsigned i = 0; i < n; i++) {
        /* Where memory is short, all are kept: what isn't is deleted. */
        kept[i] = entries == NULL ? RETENTION_LAST : RETENTION_RULES;
    }
    for (int rule = 0; entries != NULL && rule < RETENTION_RULES; rule++) {
        if (retention->keep[rule] > 0) {
            apply_rule((enum retention_rule)rule, retention->keep[rule],
                       times, n, entries, kept);
        }
    }
    free(entries);
}
