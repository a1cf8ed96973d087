/* lbverify: checks archives, chains, and a disk against its chain.
 *
 * Every structure and every digest is checked; damage is reported with file,
 * offset and guest range, and the rest is still checked.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "archive_check.h"
#include "compare.h"
#include "stream_job.h"
#include "tool.h"

enum {
    OPT_IMAGE = TOOL_OPT_LONG, OPT_AT, OPT_RECEIPT, OPT_FORCE, OPT_THREADS,
    OPT_PROGRESS, OPT_JSON,
};

static const struct tool_option options[] = {
    { "image", OPT_IMAGE, "DISK", "compare the chain with that disk" },
    { "at", OPT_AT, "UUID", "end the chain with that archive" },
    { "receipt", OPT_RECEIPT, NULL,
      "print UUID and root digest of each good archive" },
    { "output", 'o', "FILE",
      "store the archive that comes through a pipe (ARCHIVE is '-')" },
    { "force", OPT_FORCE, NULL, "replace FILE where it exists" },
    { "threads", OPT_THREADS, "N", "threads (default: one per processor)" },
    { "progress", OPT_PROGRESS, NULL, "show progress, also without a terminal" },
    { "quiet", 'q', NULL, "show neither progress nor notes" },
    { "json", OPT_JSON, NULL, "print a summary in JSON" },
    TOOL_COMMON_OPTIONS
};

static const struct tool tool = {
    .name = "lbverify",
    .synopsis = "[OPTION]... ARCHIVE...\n"
                "       lbverify [OPTION]... -o FILE - < ARCHIVE",
    .summary = "Checks every digest and every structure of each archive, and "
               "where several are\ngiven, that they are a chain.",
    .options = options,
};

struct lbverify {
    const char *const *inputs;
    unsigned n_inputs;
    const char *image, *output;
    bool receipt, force, quiet, json, has_at;
    struct qlb_uuid at;
    unsigned threads;
    enum tool_progress_mode progress_mode;

    struct archive_check *check; /* of files */
    const char *path;            /* the one at work */
    struct stream_job *jobs;     /* of a pipe */
    unsigned n_jobs;
    struct chain_worker *workers;
    struct tool_progress progress;
    uint64_t bytes;

    json_t *results;
    int status;
};

static void note_status(struct lbverify *v, int status)
{
    if (status > v->status) {
        v->status = status;
    }
}

/* ---- one archive, through its index ---- */

static void print_receipt(const struct qlb_uuid *uuid, const uint8_t *root,
                          enum qlb_digest_type digest)
{
    char text[QLB_UUID_TEXT], hex[2 * QLB_DIGEST_MAX + 1];

    qlb_hex(root, qlb_digest_size(digest), hex);
    printf("%s %s\n", qlb_uuid_format(uuid, text), hex);
}

/* What was found of an archive; header is NULL where it could not be read. */
static void add_result(struct lbverify *v, const char *path, bool good,
                       const struct qlb_lbz_header *header,
                       const uint8_t *root)
{
    json_t *result = json_object();

    json_object_set_new(result, "archive", json_string(path));
    json_object_set_new(result, "good", json_boolean(good));
    if (header != NULL) {
        json_object_set_new(result, "uuid", tool_json_uuid(&header->uuid));
        json_object_set_new(result, "parent",
                            tool_json_uuid(&header->parent));
        json_object_set_new(result, "index", json_boolean(header->index));
        json_object_set_new(result, "label", json_string(header->label));
        json_object_set_new(result, "time",
                            json_integer((json_int_t)header->time));
        json_object_set_new(result, "root_digest",
            tool_json_hex(root, qlb_digest_size(header->digest)));
    }
    json_array_append_new(v->results, result);
    if (good && v->receipt) {
        print_receipt(&header->uuid, root, header->digest);
    }
}

static void report_damage(void *opaque, const struct qlb_error *err)
{
    struct lbverify *v = opaque;

    note_status(v, tool_fail(v->path, err));
}

static void verify_archive(struct lbverify *v, const char *path)
{
    struct qlb_lbz_reader *reader;
    struct qlb_error err;
    unsigned damages;

    reader = qlb_lbz_reader_open(path, &err);
    if (reader == NULL) {
        note_status(v, tool_fail(path, &err));
        add_result(v, path, false, NULL, NULL);
        return;
    }
    v->path = path;
    damages = archive_check_run(v->check, reader, report_damage, v);
    add_result(v, path, damages == 0, qlb_lbz_reader_header(reader),
               qlb_lbz_reader_root(reader));
    qlb_lbz_reader_close(reader);
}

/* ---- one archive, through a pipe ---- */

struct pipe_check {
    struct lbverify *v;
    struct stream_walk walk;
};

static int pipe_next(void *opaque, void *arg, struct qlb_error *err)
{
    struct pipe_check *check = opaque;
    struct stream_job *job = arg;

    return stream_walk_next(&check->walk, job, err);
}

static int pipe_work(void *opaque, void *arg, unsigned thread,
                     struct qlb_error *err)
{
    struct pipe_check *check = opaque;
    struct stream_job *job = arg;

    return stream_job_decode(&check->walk, job,
                             &check->v->workers[thread], err);
}

static int pipe_done(void *opaque, void *arg, struct qlb_error *err)
{
    struct pipe_check *check = opaque;
    struct stream_job *job = arg;

    if (!job->index) {
        check->v->bytes += job->job.n_blocks * QLB_LBZ_BLOCK;
        tool_progress_update(&check->v->progress, check->v->bytes);
    }
    return stream_walk_check(&check->walk, job, err);
}

static int run_stream(struct lbverify *v, struct qlb_lbz_stream *stream,
                      const char *name, struct qlb_error *err)
{
    static const struct qlb_pipeline_ops ops = {
        .next = pipe_next,
        .work = pipe_work,
        .done = pipe_done,
    };
    struct pipe_check check = { .v = v };
    int ret;

    if (stream_walk_begin(&check.walk, stream, name, err) < 0) {
        return -1;
    }
    tool_progress_begin(&v->progress, "verified", v->progress_mode, 0);
    ret = qlb_pipeline_run(&ops, &check, v->jobs, sizeof(*v->jobs), v->n_jobs,
                           v->threads, &tool_stop, err);
    tool_progress_end(&v->progress);
    stream_walk_end(&check.walk);
    return ret;
}

/* The archive is good only when it is also safely stored. */
static void verify_stream(struct lbverify *v)
{
    static const char name[] = "standard input";
    struct qlb_outfile *out = NULL;
    struct qlb_lbz_stream *stream = NULL;
    struct qlb_error err;
    int ret = -1;

    if (v->output != NULL) {
        out = qlb_outfile_create(v->output,
                                 v->force ? QLB_OUTFILE_FORCE : 0, &err);
    }
    if (v->output == NULL || out != NULL) {
        stream = qlb_lbz_stream_open(STDIN_FILENO, name, out, &err);
    }
    if (stream != NULL) {
        ret = run_stream(v, stream, name, &err);
    }
    if (ret == 0 && out != NULL) {
        ret = qlb_outfile_commit(out, &err);
    }
    if (ret < 0) {
        note_status(v, tool_fail(v->output != NULL && out == NULL ? v->output
                                                                  : name,
                                 &err));
        add_result(v, name, false, NULL, NULL);
    } else {
        add_result(v, name, true, qlb_lbz_stream_header(stream),
                   qlb_lbz_stream_root(stream));
    }
    qlb_lbz_stream_close(stream);
    qlb_outfile_close(out);
}

/* ---- the chain, and the disk ---- */

static void verify_chain(struct lbverify *v)
{
    struct qlb_error err;
    struct qlb_chain *chain;
    const char *path;
    int ret = 0;

    chain = qlb_chain_open(v->inputs, v->n_inputs, v->has_at ? &v->at : NULL,
                           QLB_CHAIN_ALLOW_INDEX |
                               (v->image != NULL ? QLB_CHAIN_NEED_FULL : 0),
                           &err);
    if (chain == NULL) {
        note_status(v, tool_fail(NULL, &err));
        return;
    }
    for (unsigned i = 0; !v->quiet &&
         (path = qlb_chain_unused(chain, i)) != NULL; i++) {
        tool_message("%s: not part of the chain", path);
    }
    if (v->image != NULL) {
        struct compare_options compare = {
            .threads = v->threads,
            .progress = v->progress_mode,
        };

        ret = compare_with_disk(chain, v->image, &compare, &err);
    }
    if (ret < 0) {
        note_status(v, tool_fail(v->image, &err));
    }
    qlb_chain_close(chain);
}

/* ---- the program ---- */

static int prepare(struct lbverify *v, bool streaming, struct qlb_error *err)
{
    v->results = json_array();
    if (!streaming) {
        v->check = archive_check_new(v->threads, v->progress_mode, err);
        return v->check == NULL ? -1 : 0;
    }
    v->n_jobs = 2 * v->threads + 2;
    v->workers = chain_workers_new(v->threads, 1, err);
    if (v->workers == NULL) {
        return -1;
    }
    v->jobs = calloc(v->n_jobs, sizeof(*v->jobs));
    if (v->jobs == NULL) {
        return qlb_fail_errno(err, ENOMEM, "starting");
    }
    for (unsigned i = 0; i < v->n_jobs; i++) {
        if (stream_job_init(&v->jobs[i], true, err) < 0) {
            return -1;
        }
    }
    return 0;
}

static void release(struct lbverify *v)
{
    for (unsigned i = 0; v->jobs != NULL && i < v->n_jobs; i++) {
        stream_job_release(&v->jobs[i]);
    }
    free(v->jobs);
    chain_workers_free(v->workers, v->threads);
    archive_check_free(v->check);
    json_decref(v->results);
}

static bool from_pipe(const struct lbverify *v)
{
    return strcmp(v->inputs[0], "-") == 0;
}

/* Whether a signal came before the rest was looked at. What ended in spite of
 * one has ended, and is no failure. */
static bool stopped(struct lbverify *v, const char *rest)
{
    if (tool_stop) {
        tool_message("interrupted: %s", rest);
        note_status(v, QLB_E_RUNTIME);
    }
    return tool_stop;
}

static void verify(struct lbverify *v)
{
    struct qlb_error err;

    if (prepare(v, from_pipe(v), &err) < 0) {
        note_status(v, tool_fail(NULL, &err));
        return;
    }
    if (from_pipe(v)) {
        verify_stream(v);
        return;
    }
    for (unsigned i = 0; i < v->n_inputs; i++) {
        if (i > 0 && stopped(v, "not all archives were checked")) {
            return;
        }
        verify_archive(v, v->inputs[i]);
    }
    if (v->status == 0 &&
        (v->n_inputs > 1 || v->image != NULL || v->has_at) &&
        !stopped(v, "the chain was not checked")) {
        verify_chain(v);
    }
}

static void print_summary(struct lbverify *v)
{
    json_t *summary = json_object();

    json_object_set_new(summary, "good", json_boolean(v->status == 0));
    json_object_set(summary, "archives", v->results);
    if (tool_print_json(summary, v->receipt) < 0) {
        note_status(v, QLB_E_RUNTIME);
    }
}

static void parse_option(struct lbverify *v, int option)
{
    switch (option) {
    case OPT_IMAGE:
        v->image = optarg;
        break;
    case OPT_AT:
        v->has_at = true;
        v->at = tool_parse_uuid(optarg, "--at");
        break;
    case OPT_RECEIPT:
        v->receipt = true;
        break;
    case 'o':
        v->output = optarg;
        break;
    case OPT_FORCE:
        v->force = true;
        break;
    case OPT_THREADS:
        v->threads = tool_parse_number(optarg, "--threads", 1, 256);
        break;
    case OPT_PROGRESS:
        v->progress_mode = PROGRESS_ON;
        break;
    case 'q':
        v->quiet = true;
        break;
    case OPT_JSON:
        v->json = true;
        break;
    }
}

static void parse_options(struct lbverify *v, int argc, char **argv)
{
    bool from_pipe = false;
    int option;

    while ((option = tool_getopt(&tool, argc, argv)) != -1) {
        parse_option(v, option);
    }
    if (v->quiet) {
        v->progress_mode = PROGRESS_OFF;
    }
    if (optind == argc) {
        tool_usage("at least one ARCHIVE is wanted");
    }
    v->inputs = (const char *const *)&argv[optind];
    v->n_inputs = (unsigned)(argc - optind);
    for (unsigned i = 0; i < v->n_inputs; i++) {
        from_pipe |= strcmp(v->inputs[i], "-") == 0;
    }
    if (from_pipe && (v->n_inputs > 1 || v->image != NULL || v->has_at)) {
        tool_usage("standard input ('-') must be the only ARCHIVE, without "
                   "--image and --at");
    }
    if (v->output != NULL && !from_pipe) {
        tool_usage("-o stores what comes through standard input: ARCHIVE must "
                   "be '-'");
    }
}

int main(int argc, char **argv)
{
    struct lbverify v = { .threads = tool_default_threads() };

    tool_begin("lbverify");
    parse_options(&v, argc, argv);
    verify(&v);
    if (v.json) {
        print_summary(&v);
    }
    note_status(&v, tool_flush_stdout());
    release(&v);
    return v.status;
}
