/* How a dump is made, on the command lines of lbdump and of lbvm backup.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef DUMP_OPTIONS_H
#define DUMP_OPTIONS_H

#include "dump.h"

enum {
    DUMP_OPT_LEVEL = TOOL_OPT_LONG + 0x400, DUMP_OPT_FRAME, DUMP_OPT_THREADS,
    DUMP_OPT_DIGEST, DUMP_OPT_RATE_LIMIT, DUMP_OPT_PROGRESS,
};

#define DUMP_OPTIONS                                                         \
    { "level", DUMP_OPT_LEVEL, "N",                                          \
      "zstd compression level, 1 to 19 (default: 1)" },                      \
    { "frame", DUMP_OPT_FRAME, "SIZE",                                       \
      "compress at most so much at once, 64K to 1M (default: 1M)" },         \
    { "threads", DUMP_OPT_THREADS, "N",                                      \
      "threads (default: one per processor)" },                              \
    { "digest", DUMP_OPT_DIGEST, "NAME", "xxh3 (default) or sha256" },       \
    { "rate-limit", DUMP_OPT_RATE_LIMIT, "RATE",                             \
      "read at most RATE bytes per second (as 50M)" },                       \
    { "progress", DUMP_OPT_PROGRESS, NULL,                                   \
      "show progress, also without a terminal" }

/* What holds where no option is given. */
void dump_options_init(struct dump_options *options);
/* Takes the option, whose argument is optarg, if it is one of the above. */
bool dump_options_take(struct dump_options *options, int option);

#endif
