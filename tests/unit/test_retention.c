/* Which backups a policy keeps: cases that were counted by hand.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <stdio.h>
#include <time.h>

#include "vm/retention.h"

#define BERLIN "CET-1CEST,M3.5.0,M10.5.0/3"

enum { MAX_TIMES = 64 };

static uint64_t parse(const char *text)
{
    struct tm tm = { .tm_isdst = 0 };
    const char *end = strptime(text, "%Y-%m-%d %H:%M", &tm);

    assert_non_null(end);
    return (uint64_t)timegm(&tm);
}

/* A case: the numbers of the rules; then lines "TIME RULE", in UTC, ascending,
 * RULE a letter (lhdwmy) or "-". */
static void expect(const char *tz, struct retention retention,
                   const char *lines)
{
    uint64_t times[MAX_TIMES];
    enum retention_rule kept[MAX_TIMES + 1];
    char wanted[MAX_TIMES + 1] = "", got[MAX_TIMES + 1] = "";
    unsigned n = 0;

    assert_int_equal(setenv("TZ", tz, 1), 0);
    for (const char *line = lines; *line != '\0'; line += 19) {
        char text[17];

        memcpy(text, line, 16);
        text[16] = '\0';
        times[n] = parse(text);
        wanted[n++] = line[17];
    }
    kept[n] = (enum retention_rule)99;
    retention_apply(&retention, times, n, kept);
    for (unsigned i = 0; i < n; i++) {
        got[i] = kept[i] == RETENTION_RULES ? '-'
                                            : retention_name(kept[i])[0];
    }
    assert_string_equal(got, wanted);
    assert_int_equal(kept[n], 99);
}

#define KEEP(l, h, d, w, m, y) ((struct retention) { { l, h, d, w, m, y } })

static void test_nothing(void **state)
{
    struct retention retention = KEEP(1, 1, 1, 1, 1, 1);

    (void)state;
    retention_apply(&retention, NULL, 0, NULL);
    expect("UTC0", KEEP(0, 0, 0, 0, 0, 0),
           "2026-01-01 00:00 -\n2026-01-02 00:00 -\n");
}

static void test_last(void **state)
{
    (void)state;
    expect("UTC0", KEEP(2, 0, 0, 0, 0, 0),
           "2026-01-01 00:00 -\n2026-01-01 00:00 l\n2026-01-01 00:00 l\n");
    expect("UTC0", KEEP(5, 0, 0, 0, 0, 0), "2026-01-01 00:00 l\n");
}

static void test_the_newest_of_a_period_is_kept(void **state)
{
    (void)state;
    expect("UTC0", KEEP(0, 2, 0, 0, 0, 0),
           "2026-01-01 09:59 -\n2026-01-01 10:00 -\n2026-01-01 10:59 h\n"
           "2026-01-01 12:00 -\n2026-01-01 12:30 h\n");
    expect("UTC0", KEEP(0, 0, 2, 0, 0, 0),
           "2026-01-01 23:59 -\n2026-01-02 00:00 -\n2026-01-02 23:00 d\n"
           "2026-01-09 00:00 d\n");
    expect("UTC0", KEEP(0, 0, 0, 0, 2, 0),
           "2025-11-30 00:00 -\n2025-12-31 23:59 m\n2026-01-01 00:00 -\n"
           "2026-01-31 00:00 m\n");
    expect("UTC0", KEEP(0, 0, 0, 0, 0, 2),
           "2023-11-30 00:00 -\n2024-12-31 23:59 y\n2026-01-01 00:00 -\n"
           "2026-01-31 00:00 y\n");
}

/* Monday to Sunday; the 1st of January may be of the last week of a year. */
static void test_weeks(void **state)
{
    (void)state;
    expect("UTC0", KEEP(0, 0, 0, 9, 0, 0),
           "2026-12-27 00:00 w\n2026-12-28 00:00 -\n2026-12-31 00:00 -\n"
           "2027-01-01 00:00 -\n2027-01-03 23:59 w\n2027-01-04 00:00 w\n");
}

/* What an earlier rule keeps stands for its period, and isn't counted. */
static void test_rules_go_on_from_each_other(void **state)
{
    (void)state;
    expect("UTC0", KEEP(1, 0, 2, 0, 0, 0),
           "2026-01-01 12:00 -\n2026-01-02 12:00 d\n2026-01-03 12:00 d\n"
           "2026-01-04 08:00 -\n2026-01-04 12:00 l\n");
    /* the newest of the 3rd is passed over, and its older one is not taken */
    expect("UTC0", KEEP(0, 2, 1, 0, 0, 0),
           "2026-01-02 08:00 -\n2026-01-02 12:00 d\n2026-01-03 10:00 -\n"
           "2026-01-03 11:00 h\n2026-01-03 12:00 h\n");
    /* February's week holds the end of January: still January's newest */
    expect("UTC0", KEEP(0, 0, 0, 1, 1, 0),
           "2027-01-30 00:00 -\n2027-01-31 12:00 m\n2027-02-01 00:00 -\n"
           "2027-02-07 00:00 w\n");
    expect("UTC0", KEEP(1, 1, 1, 1, 1, 1),
           "2023-05-01 00:00 -\n2024-05-01 00:00 y\n2026-01-01 00:00 -\n"
           "2026-04-30 00:00 m\n2026-05-04 00:00 w\n2026-05-12 00:00 -\n"
           "2026-05-13 00:00 d\n2026-05-14 01:00 h\n2026-05-14 02:00 l\n");
}

static void test_days_are_those_of_the_place(void **state)
{
    (void)state;
    expect("UTC0", KEEP(0, 0, 9, 0, 0, 0),
           "2026-01-01 22:30 -\n2026-01-01 23:30 d\n2026-01-02 00:30 d\n");
    expect(BERLIN, KEEP(0, 0, 9, 0, 0, 0),
           "2026-01-01 22:30 d\n2026-01-01 23:30 -\n2026-01-02 00:30 d\n");
    expect("NPT-5:45", KEEP(0, 9, 0, 0, 0, 0),
           "2026-01-01 00:14 h\n2026-01-01 00:16 -\n2026-01-01 01:14 h\n");
}

static void test_clocks_that_change(void **state)
{
    (void)state;
    /* 01:30, 03:30: there is no 02:30 */
    expect(BERLIN, KEEP(0, 9, 0, 0, 0, 0),
           "2026-03-29 00:30 h\n2026-03-29 01:30 h\n");
    /* 02:30 twice: one hour of the clock */
    expect(BERLIN, KEEP(0, 9, 0, 0, 0, 0),
           "2026-10-24 23:30 h\n2026-10-25 00:30 -\n2026-10-25 01:30 h\n"
           "2026-10-25 02:30 h\n");
    /* a day of 25 hours */
    expect(BERLIN, KEEP(0, 0, 9, 0, 0, 0),
           "2026-10-24 21:59 d\n2026-10-24 22:00 -\n2026-10-25 22:59 d\n"
           "2026-10-25 23:00 d\n");
    /* back over midnight: Saturday ends, begins again, and is one day */
    expect("NST3:30NDT2:30,M3.2.0/0:01,M11.1.0/0:01", KEEP(0, 0, 9, 0, 0, 0),
           "2026-11-01 02:29 -\n2026-11-01 02:30 -\n2026-11-01 02:32 -\n"
           "2026-11-01 03:29 d\n2026-11-01 03:30 d\n");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nothing),
        cmocka_unit_test(test_last),
        cmocka_unit_test(test_the_newest_of_a_period_is_kept),
        cmocka_unit_test(test_weeks),
        cmocka_unit_test(test_rules_go_on_from_each_other),
        cmocka_unit_test(test_days_are_those_of_the_place),
        cmocka_unit_test(test_clocks_that_change),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
