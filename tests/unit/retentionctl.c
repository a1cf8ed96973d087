/* Applies retention to lists of times: tests/oracle/retention.py compares.
 *
 * A line of standard input holds the six numbers of the rules, and times,
 * ascending; the answer is one word for each time: the rule, or "-".
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vm/retention.h"

enum { MAX_TIMES = 4096, MAX_LINE = 65536 };

int main(void)
{
    static char line[MAX_LINE];
    static uint64_t numbers[MAX_TIMES];
    static enum retention_rule kept[MAX_TIMES];

    while (fgets(line, sizeof(line), stdin) != NULL) {
        struct retention retention;
        unsigned n = 0;

        for (char *word = strtok(line, " \n"); word != NULL && n < MAX_TIMES;
             word = strtok(NULL, " \n")) {
            numbers[n++] = strtoull(word, NULL, 10);
        }
        if (n < RETENTION_RULES) {
            return 2;
        }
        for (unsigned i = 0; i < RETENTION_RULES; i++) {
            retention.keep[i] = (unsigned)numbers[i];
        }
        n -= RETENTION_RULES;
        retention_apply(&retention, numbers + RETENTION_RULES, n, kept);
        for (unsigned i = 0; i < n; i++) {
            printf("%s ", kept[i] == RETENTION_RULES
                              ? "-" : retention_name(kept[i]));
        }
        putchar('\n');
    }
    return fflush(stdout) == 0 ? 0 : 1;
}
