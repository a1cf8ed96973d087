/* lbvm export: one disk of a backup, to a file, a device, or a pipe.
 *
 * A qcow2 image can't be written front to back without knowing all of it: its
 * tables are filled as clusters come. So what goes to standard output is raw.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "chain_job.h"
#include "raw_stream.h"
#include "vm/commands.h"
#include "vm/restorable.h"

enum {
    OPT_AT = TOOL_OPT_LONG, OPT_DISK, OPT_FORMAT, OPT_FORCE, OPT_THREADS,
    OPT_RATE_LIMIT, OPT_PROGRESS,
};

static const struct tool_option options[] = {
    VM_REPOSITORY_OPTION,
    { "at", OPT_AT, "TIME", "the newest backup of that time or before it" },
    { "disk", OPT_DISK, "NAME", "which disk, where the machine has several" },
    { "output", 'o', "FILE", "write to that file or block device" },
    { "format", OPT_FORMAT, "FORMAT",
      "qcow2 or raw (default: raw for *.raw, *.img, devices and pipes)" },
    { "force", OPT_FORCE, NULL, "replace FILE where it exists" },
    { "threads", OPT_THREADS, "N", "threads (default: one per processor)" },
    { "rate-limit", OPT_RATE_LIMIT, "RATE",
      "write at most RATE bytes per second (as 50M)" },
    { "progress", OPT_PROGRESS, NULL, "show progress, also without a terminal" },
    { "quiet", 'q', NULL, "show no progress" },
    VM_JSON_OPTION,
    TOOL_COMMON_OPTIONS
};

const struct tool vm_export_tool = {
    .name = "lbvm export",
    .synopsis = "[OPTION]... -o FILE MACHINE [ID]\n"
                "       lbvm export [OPTION]... MACHINE [ID] > RAW",
    .summary = "Writes one disk of a backup, the newest one unless its ID is "
               "given (its start is\nenough), or --at.",
    .options = options,
};

struct export {
    struct restorable from;
    const char *name; /* of the disk; NULL: the only one */
    struct restore_options wanted;
    struct tool_rate rate;
    enum tool_progress_mode progress;

    const struct manifest_disk *disk;
    struct qlb_chain *chain; /* of standard output; else the restore's */
    struct restore *restore;
    struct qlb_outfile *out; /* standard output */
    uint64_t bytes;
};

static int choose_disk(struct export *e, struct qlb_error *err)
{
    const struct manifest *manifest = e->from.manifest;

    if (e->name != NULL) {
        e->disk = restorable_disk(&e->from, e->name, err);
        return e->disk == NULL ? -1 : 0;
    }
    if (manifest->n_disks > 1) {
        return qlb_fail(err, QLB_E_USAGE, "%s: %s has %u disks; --disk=NAME "
                        "is wanted", e->from.name, manifest->id,
                        manifest->n_disks);
    }
    e->disk = &manifest->disks[0];
    return 0;
}

static int to_file(struct export *e, struct restore_meter *meter,
                   struct qlb_error *err)
{
    int ret = restore_run(e->restore, meter, err);

    e->bytes = restore_bytes(e->restore);
    return ret;
}

static int to_stdout(struct export *e, struct restore_meter *meter,
                     struct qlb_error *err)
{
    int ret = raw_stream_write(e->chain, STDOUT_FILENO,
                               qlb_outfile_name(e->out), e->wanted.threads,
                               meter, err);

    e->bytes = meter->bytes;
    return ret;
}

static int open_stdout(struct export *e, struct qlb_error *err)
{
    struct stat st;

    if (fstat(STDOUT_FILENO, &st) == 0 && S_ISREG(st.st_mode) &&
        (st.st_size > 0 || lseek(STDOUT_FILENO, 0, SEEK_CUR) > 0)) {
        return qlb_fail(err, QLB_E_USAGE, "standard output: the file is not "
                        "empty, and a disk can't be appended to it");
    }
    e->out = qlb_outfile_fd(STDOUT_FILENO, "standard output", err);
    return e->out == NULL ? -1 : 0;
}

static int open_output(struct export *e, struct qlb_chain *chain,
                       struct qlb_error *err)
{
    if (e->wanted.output == NULL) {
        e->chain = chain;
        return open_stdout(e, err);
    }
    e->restore = restore_new(&e->wanted, err);
    if (e->restore == NULL) {
        qlb_chain_close(chain);
        return -1;
    }
    restore_take_chain(e->restore, chain);
    return restore_open_output(e->restore, err);
}

static int export(struct export *e, struct qlb_error *err)
{
    struct restore_meter meter;
    struct qlb_chain *chain;
    int ret;

    if (choose_disk(e, err) < 0) {
        return -1;
    }
    chain = restorable_chain(&e->from, e->disk, err);
    if (chain == NULL || open_output(e, chain, err) < 0) {
        return -1;
    }
    restore_meter_begin(&meter, &e->rate, e->progress,
                        chain_data_bytes(chain));
    ret = e->restore != NULL ? to_file(e, &meter, err)
                             : to_stdout(e, &meter, err);
    restore_meter_end(&meter);
    if (ret < 0) {
        return -1;
    }
    return e->restore != NULL ? restore_commit(e->restore, err)
                              : qlb_outfile_commit(e->out, err);
}

/* What was redirected to a file must not look like a disk. */
static void discard_stdout(const struct export *e)
{
    struct stat st;

    if (e->out != NULL && !qlb_outfile_is_committed(e->out) &&
        fstat(STDOUT_FILENO, &st) == 0 && S_ISREG(st.st_mode) &&
        ftruncate(STDOUT_FILENO, 0) < 0) {
        tool_message("standard output: what is in there is not whole");
    }
}

static int print_summary(const struct export *e)
{
    enum restore_format format = e->restore == NULL
                                     ? RESTORE_RAW
                                     : restore_format(e->restore);
    json_t *json = json_object();

    json_object_set_new(json, "machine", json_string(e->from.name));
    json_object_set_new(json, "id", json_string(e->from.manifest->id));
    json_object_set_new(json, "time",
        json_integer((json_int_t)e->from.manifest->time));
    json_object_set_new(json, "name", json_string(e->disk->name));
    json_object_set_new(json, "file", e->wanted.output == NULL
                                          ? json_null()
                                          : json_string(e->wanted.output));
    json_object_set_new(json, "format",
                        json_string(restore_format_name(format)));
    json_object_set_new(json, "checkpoint",
                        tool_json_uuid(&e->disk->checkpoint));
    json_object_set_new(json, "size",
                        json_integer((json_int_t)e->disk->size));
    json_object_set_new(json, "data_bytes",
                        json_integer((json_int_t)e->bytes));
    return tool_print_json(json, e->wanted.output == NULL) < 0
               ? QLB_E_RUNTIME : 0;
}

/* ---- options ---- */

static void parse_work_option(struct export *e, int option)
{
    switch (option) {
    case OPT_THREADS:
        e->wanted.threads = tool_parse_number(optarg, "--threads", 1, 256);
        break;
    case OPT_RATE_LIMIT:
        e->rate.bytes_per_second = tool_parse_size(optarg, "--rate-limit");
        break;
    case OPT_PROGRESS:
        e->progress = PROGRESS_ON;
        break;
    case 'q':
        e->progress = PROGRESS_OFF;
        break;
    default:
        vm_take_option(&e->from.common, option);
    }
}

static void parse_option(struct export *e, int option)
{
    switch (option) {
    case OPT_AT:
        e->from.has_at = true;
        e->from.at = vm_parse_time(optarg, "--at");
        break;
    case OPT_DISK:
        e->name = optarg;
        break;
    case 'o':
        e->wanted.output = optarg;
        break;
    case OPT_FORMAT:
        e->wanted.format = restore_parse_format(optarg);
        break;
    case OPT_FORCE:
        e->wanted.force = true;
        break;
    default:
        parse_work_option(e, option);
    }
}

static void parse_options(struct export *e, int argc, char **argv)
{
    int option;

    while ((option = tool_getopt(&vm_export_tool, argc, argv)) != -1) {
        parse_option(e, option);
    }
    restorable_parse(&e->from, argc, argv);
    if (e->wanted.output != NULL) {
        return;
    }
    if (e->wanted.format == RESTORE_QCOW2) {
        tool_usage("a qcow2 image can't be written to standard output; use "
                   "-o FILE, or --format=raw");
    }
    if (isatty(STDOUT_FILENO)) {
        tool_usage("a disk is not written to a terminal; redirect it, or use "
                   "-o FILE");
    }
}

int vm_export(int argc, char **argv)
{
    struct export e = { .wanted = { .threads = tool_default_threads() } };
    struct qlb_error err;
    int status;

    parse_options(&e, argc, argv);
    status = restorable_open(&e.from);
    if (status == 0 && export(&e, &err) < 0) {
        status = tool_fail(NULL, &err);
        restorable_hint(&e.from, status);
        discard_stdout(&e);
    } else if (status == 0 && e.from.common.json) {
        status = print_summary(&e);
    }
    restore_free(e.restore);
    qlb_chain_close(e.chain);
    qlb_outfile_close(e.out);
    restorable_close(&e.from);
    return status;
}
