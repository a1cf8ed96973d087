/* lbrestore: restores a disk from a chain of archives.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <stdio.h>
#include <string.h>

#include "chain_job.h"
#include "restore_inplace.h"

enum {
    OPT_AT = TOOL_OPT_LONG, OPT_FORMAT, OPT_FORCE, OPT_THREADS, OPT_RATE_LIMIT,
    OPT_PROGRESS, OPT_JSON, OPT_IN_PLACE, OPT_RESCAN,
};

static const struct tool_option options[] = {
    { "output", 'o', "DISK", "file or block device to restore to" },
    { "format", OPT_FORMAT, "FORMAT",
      "qcow2 or raw (default: raw for *.raw, *.img and devices)" },
    { "at", OPT_AT, "UUID",
      "restore that point in time (where there are several)" },
    { "force", OPT_FORCE, NULL, "replace DISK where it exists" },
    { "in-place", OPT_IN_PLACE, "DISK",
      "roll this qcow2 image back: rewrite what differs" },
    { "rescan", OPT_RESCAN, NULL,
      "with --in-place: compare the whole disk with the archives" },
    { "threads", OPT_THREADS, "N", "threads (default: one per processor)" },
    { "rate-limit", OPT_RATE_LIMIT, "RATE",
      "write at most RATE bytes per second (as 50M)" },
    { "progress", OPT_PROGRESS, NULL, "show progress, also without a terminal" },
    { "quiet", 'q', NULL, "show neither progress nor notes" },
    { "json", OPT_JSON, NULL, "print a summary in JSON" },
    TOOL_COMMON_OPTIONS
};

static const struct tool tool = {
    .name = "lbrestore",
    .synopsis = "[OPTION]... -o DISK ARCHIVE...\n"
                "       lbrestore [OPTION]... -o DISK - < ARCHIVE\n"
                "       lbrestore [OPTION]... --in-place DISK ARCHIVE...",
    .summary = "Restores a disk from a full archive and its incrementals, or "
               "from one full\narchive that comes through a pipe.",
    .options = options,
};

struct lbrestore {
    const char *const *inputs;
    unsigned n_inputs;
    struct restore_options options;
    const char *in_place; /* NULL: restore to options.output */
    bool rescan, quiet, json, has_at;
    struct qlb_uuid at;
    struct tool_rate rate;
    enum tool_progress_mode progress_mode;
    struct restore *restore;
};

static struct qlb_chain *open_chain(const struct lbrestore *r,
                                    struct qlb_error *err)
{
    struct qlb_chain *chain;
    const char *path;

    chain = qlb_chain_open(r->inputs, r->n_inputs, r->has_at ? &r->at : NULL,
                           QLB_CHAIN_NEED_FULL, err);
    /* A rollback may need those that come after its target. */
    for (unsigned i = 0; chain != NULL && !r->quiet && r->in_place == NULL &&
         (path = qlb_chain_unused(chain, i)) != NULL; i++) {
        tool_message("%s: not needed, left out", path);
    }
    return chain;
}

/* *expected: bytes of data; 0: not known. */
static int open_input(struct lbrestore *r, uint64_t *expected,
                      struct qlb_error *err)
{
    struct qlb_chain *chain;

    *expected = 0;
    if (r->n_inputs == 1 && strcmp(r->inputs[0], "-") == 0) {
        return restore_open_stdin(r->restore, r->has_at ? &r->at : NULL, err);
    }
    chain = open_chain(r, err);
    if (chain == NULL) {
        return -1;
    }
    *expected = chain_data_bytes(chain);
    restore_take_chain(r->restore, chain);
    return 0;
}

static int restore(struct lbrestore *r, struct qlb_error *err)
{
    struct restore_meter meter;
    uint64_t expected;
    int ret;

    r->restore = restore_new(&r->options, err);
    if (r->restore == NULL || open_input(r, &expected, err) < 0 ||
        restore_open_output(r->restore, err) < 0) {
        return -1;
    }
    restore_meter_begin(&meter, &r->rate, r->progress_mode, expected);
    ret = restore_run(r->restore, &meter, err);
    restore_meter_end(&meter);
    return ret < 0 ? -1 : restore_commit(r->restore, err);
}

static json_t *new_summary(const char *disk, enum restore_format format,
                           const struct qlb_lbz_header *header,
                           uint64_t bytes)
{
    json_t *summary = json_object();

    json_object_set_new(summary, "disk", json_string(disk));
    json_object_set_new(summary, "format",
                        json_string(restore_format_name(format)));
    json_object_set_new(summary, "uuid", tool_json_uuid(&header->uuid));
    json_object_set_new(summary, "time",
                        json_integer((json_int_t)header->time));
    json_object_set_new(summary, "virtual_size",
                        json_integer((json_int_t)header->virtual_size));
    json_object_set_new(summary, "data_bytes",
                        json_integer((json_int_t)bytes));
    return summary;
}

static int restore_and_tell(struct lbrestore *r, struct qlb_error *err)
{
    if (restore(r, err) < 0) {
        return tool_fail(NULL, err);
    }
    if (r->json &&
        tool_print_json(new_summary(r->options.output,
                                    restore_format(r->restore),
                                    restore_header(r->restore),
                                    restore_bytes(r->restore)), false) < 0) {
        return QLB_E_RUNTIME;
    }
    return 0;
}

/* ---- in place ---- */

static int run_in_place(struct lbrestore *r, struct inplace *inplace,
                        struct qlb_error *err)
{
    struct restore_meter meter;
    int ret;

    restore_meter_begin(&meter, &r->rate, r->progress_mode,
                        inplace_bytes(inplace));
    ret = inplace_run(inplace, &meter, err);
    restore_meter_end(&meter);
    return ret;
}

static int roll_back(struct lbrestore *r, struct qlb_error *err)
{
    struct inplace_options wanted = {
        .disk = r->in_place,
        .inputs = r->inputs,
        .n_inputs = r->n_inputs,
        .threads = r->options.threads,
        .rescan = r->rescan,
        .force = r->options.force,
        .quiet = r->quiet,
        .progress = r->progress_mode,
    };
    struct qlb_chain *chain = open_chain(r, err);
    struct qlb_lbz_header header;
    struct inplace *inplace;
    json_t *summary;
    int ret;

    if (chain == NULL) {
        return tool_fail(NULL, err);
    }
    header = *qlb_chain_header(chain);
    inplace = inplace_prepare(&wanted, chain, err);
    if (inplace == NULL) {
        return tool_fail(NULL, err);
    }
    ret = run_in_place(r, inplace, err) < 0 ? tool_fail(NULL, err) : 0;
    if (ret == 0 && r->json) {
        summary = new_summary(r->in_place, RESTORE_QCOW2, &header,
                              inplace_bytes(inplace));
        json_object_set_new(summary, "compared",
                            json_boolean(inplace_compared(inplace)));
        ret = tool_print_json(summary, false) < 0 ? QLB_E_RUNTIME : 0;
    }
    inplace_free(inplace);
    return ret;
}

/* ---- options ---- */

static void parse_option(struct lbrestore *r, int option)
{
    switch (option) {
    case 'o':
        r->options.output = optarg;
        break;
    case OPT_FORMAT:
        r->options.format = restore_parse_format(optarg);
        break;
    case OPT_AT:
        r->has_at = true;
        r->at = tool_parse_uuid(optarg, "--at");
        break;
    case OPT_IN_PLACE:
        r->in_place = optarg;
        break;
    case OPT_RESCAN:
        r->rescan = true;
        break;
    case OPT_FORCE:
        r->options.force = true;
        break;
    case OPT_THREADS:
        r->options.threads = tool_parse_number(optarg, "--threads", 1, 256);
        break;
    case OPT_RATE_LIMIT:
        r->rate.bytes_per_second = tool_parse_size(optarg, "--rate-limit");
        break;
    case OPT_PROGRESS:
        r->progress_mode = PROGRESS_ON;
        break;
    case 'q':
        r->quiet = true;
        break;
    case OPT_JSON:
        r->json = true;
        break;
    }
}

static void parse_options(struct lbrestore *r, int argc, char **argv)
{
    int option;

    while ((option = tool_getopt(&tool, argc, argv)) != -1) {
        parse_option(r, option);
    }
    if (r->quiet) {
        r->progress_mode = PROGRESS_OFF;
    }
    if (r->options.output == NULL && r->in_place == NULL) {
        tool_usage("-o DISK is wanted");
    }
    if (r->in_place != NULL && (r->options.output != NULL ||
                                r->options.format != RESTORE_BY_NAME)) {
        tool_usage("--in-place does not go with -o or --format");
    }
    if (r->rescan && r->in_place == NULL) {
        tool_usage("--rescan goes with --in-place");
    }
    if (optind == argc) {
        tool_usage("at least one ARCHIVE is wanted");
    }
    r->inputs = (const char *const *)&argv[optind];
    r->n_inputs = (unsigned)(argc - optind);
    for (unsigned i = 0; i < r->n_inputs; i++) {
        if (strcmp(r->inputs[i], "-") != 0) {
            continue;
        }
        if (r->in_place != NULL) {
            tool_usage("--in-place can't read an ARCHIVE from a pipe");
        }
        if (r->n_inputs > 1) {
            tool_usage("standard input ('-') must be the only ARCHIVE");
        }
    }
}

int main(int argc, char **argv)
{
    struct lbrestore r = {
        .options = { .threads = tool_default_threads() },
    };
    struct qlb_error err;
    int status;

    tool_begin("lbrestore");
    parse_options(&r, argc, argv);
    status = r.in_place != NULL ? roll_back(&r, &err)
                                : restore_and_tell(&r, &err);
    restore_free(r.restore);
    return status;
}
