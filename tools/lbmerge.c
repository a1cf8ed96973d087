/* lbmerge: merges a chain of archives into one.
 *
 * Compressed frames are moved as they are, checked against their digests on
 * the way. Only a frame of which less than half is still live (with --compact:
 * any dead block) is decompressed and its live blocks compressed again.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "chain_job.h"
#include "tool.h"

enum {
    OPT_AT = TOOL_OPT_LONG, OPT_COMPACT, OPT_FORCE, OPT_LEVEL, OPT_THREADS,
    OPT_PROGRESS, OPT_JSON,
};

static const struct tool_option options[] = {
    { "at", OPT_AT, "UUID", "end with that archive (where there are several)" },
    { "compact", OPT_COMPACT, NULL,
      "rewrite all frames that hold superseded blocks" },
    { "output", 'o', "FILE",
      "write to FILE, whole or not at all; it may be one of the inputs" },
    { "force", OPT_FORCE, NULL, "replace FILE where it exists" },
    { "level", OPT_LEVEL, "N",
      "zstd level of frames that are rewritten (default: 1)" },
    { "threads", OPT_THREADS, "N", "threads (default: one per processor)" },
    { "progress", OPT_PROGRESS, NULL, "show progress, also without a terminal" },
    { "quiet", 'q', NULL, "show neither progress nor notes" },
    { "json", OPT_JSON, NULL, "print a summary in JSON" },
    TOOL_COMMON_OPTIONS
};

static const struct tool tool = {
    .name = "lbmerge",
    .synopsis = "[OPTION]... ARCHIVE... > MERGED\n"
                "       lbmerge [OPTION]... -o MERGED ARCHIVE...",
    .summary = "Merges a full archive and incrementals into one full archive, "
               "or incrementals\nalone into one incremental. Parent links "
               "order them, not their arguments.",
    .options = options,
};

/* A frame that is rewritten is taken apart into its live runs first. */
struct merge_job {
    struct chain_job job;
    uint8_t *packed; /* CHAIN_PACKED_SIZE: what is moved, or rewritten */
    struct qlb_lbz_frame rewritten;
};

struct lbmerge {
    const char *const *inputs;
    unsigned n_inputs;
    const char *output;
    bool force, compact, quiet, json;
    bool has_at;
    struct qlb_uuid at;
    int level;
    unsigned threads;
    enum tool_progress_mode progress_mode;

    struct qlb_chain *chain;
    struct chain_walk walk;
    struct merge_job *jobs;
    unsigned n_jobs;
    struct chain_worker *workers;
    struct qlb_lbz_encoder **encoders;
    struct qlb_outfile *out;
    struct qlb_lbz_writer *writer;
    struct tool_progress progress;
    uint64_t bytes;

    uint64_t moved, rewritten; /* frames */
    struct qlb_lbz_totals totals;
    uint8_t root[QLB_DIGEST_MAX];
};

static int merge_next(void *opaque, void *arg, struct qlb_error *err)
{
    struct lbmerge *m = opaque;
    struct merge_job *job = arg;

    return chain_walk_next(&m->walk, &job->job, err);
}

/* job has one run of live blocks. */
static int rewrite_run(struct lbmerge *m, struct merge_job *job,
                       unsigned thread, struct qlb_error *err)
{
    unsigned first = 0, n;
    size_t at;

    if (chain_job_decode(m->chain, &job->job, &m->workers[thread], err) < 0) {
        return -1;
    }
    n = chain_job_live_run(&job->job, &first);
    at = (size_t)first * QLB_LBZ_BLOCK;
    return qlb_lbz_encode(m->encoders[thread], job->job.offset + at, n,
                          job->job.blocks + at, job->packed, &job->rewritten,
                          err);
}

static int merge_work(void *opaque, void *arg, unsigned thread,
                      struct qlb_error *err)
{
    struct lbmerge *m = opaque;
    struct merge_job *job = arg;

    if (job->job.zero) {
        return 0;
    }
    if (job->job.apart) {
        return rewrite_run(m, job, thread, err);
    }
    return chain_job_load(m->chain, &job->job, job->packed, err);
}

static int move_frame(struct lbmerge *m, const struct chain_job *job,
                      struct qlb_error *err)
{
    size_t digest_size = qlb_digest_size(qlb_chain_header(m->chain)->digest);
    struct qlb_lbz_frame frame = {
        .offset = job->offset,
        .n_blocks = job->entry.n_blocks,
        .live = job->entry.live,
        .data = chain_job_compressed(job),
        .size = job->entry.size,
    };

    memcpy(frame.digest, job->digest, digest_size);
    memcpy(frame.block_digests, job->block_digests,
           digest_size * (size_t)__builtin_popcount(job->entry.live));
    m->moved++;
    return qlb_lbz_writer_frame(m->writer, &frame, err);
}

static int merge_done(void *opaque, void *arg, struct qlb_error *err)
{
    struct lbmerge *m = opaque;
    struct merge_job *job = arg;

    if (job->job.zero) {
        return qlb_lbz_writer_zero(m->writer, job->job.offset,
                                   job->job.n_blocks, err);
    }
    m->bytes += job->job.entry.size;
    tool_progress_update(&m->progress, m->bytes);
    if (!job->job.apart) {
        return move_frame(m, &job->job, err);
    }
    m->rewritten++;
    return qlb_lbz_writer_frame(m->writer, &job->rewritten, err);
}

/* ---- set-up ---- */

static bool same_file(const struct stat *a, const char *path)
{
    struct stat b;

    return stat(path, &b) == 0 && a->st_dev == b.st_dev &&
           a->st_ino == b.st_ino;
}

/* Whether the output is one of the inputs, which it may replace. */
static bool output_is_input(const struct lbmerge *m, const struct stat *st)
{
    for (unsigned i = 0; i < m->n_inputs; i++) {
        if (same_file(st, m->inputs[i])) {
            return true;
        }
    }
    return false;
}

/* Before anything is read: the shell has emptied such a file already, so that
 * what reading it says would mislead. */
static int check_stdout(const struct lbmerge *m, struct qlb_error *err)
{
    struct stat st;

    if (m->output == NULL && fstat(STDOUT_FILENO, &st) == 0 &&
        S_ISREG(st.st_mode) && output_is_input(m, &st)) {
        return qlb_fail(err, QLB_E_USAGE, "standard output is one of the "
                        "inputs; use -o FILE to replace it");
    }
    return 0;
}

static int open_output(struct lbmerge *m, struct qlb_error *err)
{
    unsigned flags = m->force ? QLB_OUTFILE_FORCE : 0;
    struct stat st;

    if (m->output == NULL) {
        m->out = tool_open_stdout(err);
    } else {
        if (stat(m->output, &st) == 0 && output_is_input(m, &st)) {
            flags |= QLB_OUTFILE_FORCE;
        }
        m->out = qlb_outfile_create(m->output, flags, err);
    }
    return m->out == NULL ? -1 : 0;
}

static int prepare(struct lbmerge *m, struct qlb_error *err)
{
    m->n_jobs = 2 * m->threads + 2;
    m->workers = chain_workers_new(m->threads, 1, err);
    if (m->workers == NULL) {
        return -1;
    }
    m->encoders = calloc(m->threads, sizeof(*m->encoders));
    m->jobs = calloc(m->n_jobs, sizeof(*m->jobs));
    if (m->encoders == NULL || m->jobs == NULL) {
        return qlb_fail_errno(err, ENOMEM, "starting the merge");
    }
    for (unsigned i = 0; i < m->n_jobs; i++) {
        m->jobs[i].packed = malloc(CHAIN_PACKED_SIZE);
        if (m->jobs[i].packed == NULL) {
            return qlb_fail_errno(err, ENOMEM, "starting the merge");
        }
    }
    for (unsigned i = 0; i < m->threads; i++) {
        m->encoders[i] = qlb_lbz_encoder_new(
            m->level, qlb_chain_header(m->chain)->digest, err);
        if (m->encoders[i] == NULL) {
            return -1;
        }
    }
    return 0;
}

static void release(struct lbmerge *m)
{
    qlb_lbz_writer_free(m->writer);
    qlb_outfile_close(m->out);
    for (unsigned i = 0; m->encoders != NULL && i < m->threads; i++) {
        qlb_lbz_encoder_free(m->encoders[i]);
    }
    free(m->encoders);
    chain_workers_free(m->workers, m->threads);
    for (unsigned i = 0; m->jobs != NULL && i < m->n_jobs; i++) {
        free(m->jobs[i].packed);
    }
    free(m->jobs);
    chain_walk_end(&m->walk);
    qlb_chain_close(m->chain);
}

static uint64_t compressed_bytes(const struct qlb_chain *chain)
{
    uint64_t bytes = 0;

    for (unsigned i = 0; i < qlb_chain_members(chain); i++) {
        bytes += qlb_lbz_reader_totals(qlb_chain_member(chain, i))
                     ->compressed;
    }
    return bytes;
}

static void note_unused(const struct lbmerge *m)
{
    const char *path;

    for (unsigned i = 0; !m->quiet &&
         (path = qlb_chain_unused(m->chain, i)) != NULL; i++) {
        tool_message("%s: not needed, left out", path);
    }
}

static int merge(struct lbmerge *m, struct qlb_error *err)
{
    static const struct qlb_pipeline_ops ops = {
        .next = merge_next,
        .work = merge_work,
        .done = merge_done,
    };
    int ret;

    if (check_stdout(m, err) < 0) {
        return -1;
    }
    m->chain = qlb_chain_open(m->inputs, m->n_inputs,
                              m->has_at ? &m->at : NULL, 0, err);
    if (m->chain == NULL) {
        return -1;
    }
    note_unused(m);
    m->walk.chain = m->chain;
    m->walk.split = m->compact ? CHAIN_SPLIT_PARTIAL : CHAIN_SPLIT_SPARSE;
    if (prepare(m, err) < 0 || open_output(m, err) < 0) {
        return -1;
    }
    m->writer = qlb_lbz_writer_new(m->out, qlb_chain_header(m->chain), err);
    if (m->writer == NULL) {
        return -1;
    }
    tool_progress_begin(&m->progress, "moved", m->progress_mode,
                        compressed_bytes(m->chain));
    ret = qlb_pipeline_run(&ops, m, m->jobs, sizeof(*m->jobs), m->n_jobs,
                           m->threads, &tool_stop, err);
    tool_progress_end(&m->progress);
    if (ret < 0 || qlb_lbz_writer_seal(m->writer, m->root, err) < 0 ||
        qlb_lbz_writer_finish(m->writer, &m->totals, err) < 0) {
        return -1;
    }
    return qlb_outfile_commit(m->out, err);
}

static int print_summary(const struct lbmerge *m)
{
    const struct qlb_lbz_header *header = qlb_chain_header(m->chain);
    json_t *summary = json_object();

    json_object_set_new(summary, "archive",
                        m->output == NULL ? json_null()
                                          : json_string(m->output));
    json_object_set_new(summary, "kind",
        json_string(header->incremental ? "incremental" : "full"));
    json_object_set_new(summary, "members",
        json_integer((json_int_t)qlb_chain_members(m->chain)));
    json_object_set_new(summary, "uuid", tool_json_uuid(&header->uuid));
    json_object_set_new(summary, "parent", tool_json_uuid(&header->parent));
    json_object_set_new(summary, "virtual_size",
                        json_integer((json_int_t)header->virtual_size));
    json_object_set_new(summary, "frames_moved",
                        json_integer((json_int_t)m->moved));
    json_object_set_new(summary, "frames_rewritten",
                        json_integer((json_int_t)m->rewritten));
    json_object_set_new(summary, "archive_bytes",
                        json_integer((json_int_t)m->totals.archive_size));
    json_object_set_new(summary, "root_digest",
                        tool_json_hex(m->root,
                                      qlb_digest_size(header->digest)));
    return tool_print_json(summary, m->output == NULL);
}

static void parse_option(struct lbmerge *m, int option)
{
    switch (option) {
    case OPT_AT:
        m->has_at = true;
        m->at = tool_parse_uuid(optarg, "--at");
        break;
    case OPT_COMPACT:
        m->compact = true;
        break;
    case 'o':
        m->output = optarg;
        break;
    case OPT_FORCE:
        m->force = true;
        break;
    case OPT_LEVEL:
        m->level = (int)tool_parse_number(optarg, "--level", 1, 19);
        break;
    case OPT_THREADS:
        m->threads = tool_parse_number(optarg, "--threads", 1, 256);
        break;
    case OPT_PROGRESS:
        m->progress_mode = PROGRESS_ON;
        break;
    case 'q':
        m->quiet = true;
        break;
    case OPT_JSON:
        m->json = true;
        break;
    }
}

static void parse_options(struct lbmerge *m, int argc, char **argv)
{
    int option;

    while ((option = tool_getopt(&tool, argc, argv)) != -1) {
        parse_option(m, option);
    }
    if (m->quiet) {
        m->progress_mode = PROGRESS_OFF;
    }
    if (optind == argc) {
        tool_usage("at least one ARCHIVE is wanted");
    }
    m->inputs = (const char *const *)&argv[optind];
    m->n_inputs = (unsigned)(argc - optind);
    if (m->output == NULL && isatty(STDOUT_FILENO)) {
        tool_usage("an archive is not written to a terminal; redirect it, or "
                   "use -o FILE");
    }
}

int main(int argc, char **argv)
{
    struct lbmerge m = { .level = 1, .threads = tool_default_threads() };
    struct qlb_error err;
    int status = 0;

    tool_begin("lbmerge");
    parse_options(&m, argc, argv);
    if (merge(&m, &err) < 0) {
        status = tool_fail(NULL, &err);
        tool_discard_stdout(m.output == NULL ? m.out : NULL);
    } else if (m.json && print_summary(&m) < 0) {
        status = QLB_E_RUNTIME;
    }
    release(&m);
    return status;
}
