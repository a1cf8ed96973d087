/* How a dump is made, on the command lines of lbdump and of lbvm backup.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "dump_options.h"

void dump_options_init(struct dump_options *options)
{
    *options = (struct dump_options) {
        .level = 1,
        .threads = tool_default_threads(),
        .digest = QLB_DIGEST_XXH3_128,
    };
}

static unsigned parse_frame(const char *text)
{
    uint64_t size = tool_parse_size(text, "--frame");

    if (size < QLB_LBZ_BLOCK || size > QLB_LBZ_STRIPE ||
        size % QLB_LBZ_BLOCK != 0) {
        tool_usage("--frame: '%s' is no multiple of 64K up to 1M", text);
    }
    return (unsigned)(size / QLB_LBZ_BLOCK);
}

bool dump_options_take(struct dump_options *options, int option)
{
    switch (option) {
    case DUMP_OPT_LEVEL:
        options->level = (int)tool_parse_number(optarg, "--level", 1, 19);
        return true;
    case DUMP_OPT_FRAME:
        options->frame_blocks = parse_frame(optarg);
        return true;
    case DUMP_OPT_THREADS:
        options->threads = tool_parse_number(optarg, "--threads", 1, 256);
        return true;
    case DUMP_OPT_DIGEST:
        options->digest = tool_parse_digest(optarg, "--digest");
        return true;
    case DUMP_OPT_RATE_LIMIT:
        options->rate.bytes_per_second = tool_parse_size(optarg,
                                                         "--rate-limit");
        return true;
    case DUMP_OPT_PROGRESS:
        options->progress = PROGRESS_ON;
        return true;
    default:
        return false;
    }
}
