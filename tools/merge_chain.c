/* Merging a chain of archives into one.
 *
 * Compressed frames are moved as they are, checked against their digests on
 * the way. Only a frame of which less than half is still live (compact: any
 * dead block) is decompressed and its live blocks compressed again.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "merge_chain.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "chain_job.h"

/* A frame that is rewritten is taken apart into its live runs first. */
struct merge_job {
    struct chain_job job;
    uint8_t *packed; /* CHAIN_PACKED_SIZE: what is moved, or rewritten */
    struct qlb_lbz_frame rewritten;
};

struct merge {
    const struct merge_options *options;
    struct qlb_chain *chain;
    struct chain_walk walk;
    struct merge_job *jobs;
    unsigned n_jobs;
    struct chain_worker *workers;
    struct qlb_lbz_encoder **encoders;
    struct qlb_lbz_writer *writer;
    struct tool_progress progress;
    uint64_t bytes;
    struct merge_result *result;
};

static int merge_next(void *opaque, void *arg, struct qlb_error *err)
{
    struct merge *m = opaque;
    struct merge_job *job = arg;

    return chain_walk_next(&m->walk, &job->job, err);
}

/* job has one run of live blocks. */
static int rewrite_run(struct merge *m, struct merge_job *job,
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
    struct merge *m = opaque;
    struct merge_job *job = arg;

    if (job->job.zero) {
        return 0;
    }
    if (job->job.apart) {
        return rewrite_run(m, job, thread, err);
    }
    return chain_job_load(m->chain, &job->job, job->packed, err);
}

static int move_frame(struct merge *m, const struct chain_job *job,
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
    m->result->moved++;
    return qlb_lbz_writer_frame(m->writer, &frame, err);
}

static int merge_done(void *opaque, void *arg, struct qlb_error *err)
{
    struct merge *m = opaque;
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
    m->result->rewritten++;
    return qlb_lbz_writer_frame(m->writer, &job->rewritten, err);
}

static int prepare(struct merge *m, struct qlb_error *err)
{
    m->n_jobs = 2 * m->options->threads + 2;
    m->workers = chain_workers_new(m->options->threads, 1, err);
    if (m->workers == NULL) {
        return -1;
    }
    m->encoders = calloc(m->options->threads, sizeof(*m->encoders));
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
    for (unsigned i = 0; i < m->options->threads; i++) {
        m->encoders[i] = qlb_lbz_encoder_new(
            m->options->level, qlb_chain_header(m->chain)->digest, err);
        if (m->encoders[i] == NULL) {
            return -1;
        }
    }
    return 0;
}

static void release(struct merge *m)
{
    qlb_lbz_writer_free(m->writer);
    for (unsigned i = 0; m->encoders != NULL && i < m->options->threads; i++) {
        qlb_lbz_encoder_free(m->encoders[i]);
    }
    free(m->encoders);
    chain_workers_free(m->workers, m->options->threads);
    for (unsigned i = 0; m->jobs != NULL && i < m->n_jobs; i++) {
        free(m->jobs[i].packed);
    }
    free(m->jobs);
    chain_walk_end(&m->walk);
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

static int run(struct merge *m, struct qlb_error *err)
{
    static const struct qlb_pipeline_ops ops = {
        .next = merge_next,
        .work = merge_work,
        .done = merge_done,
    };
    int ret;

    tool_progress_begin(&m->progress, "moved", m->options->progress,
                        compressed_bytes(m->chain));
    ret = qlb_pipeline_run(&ops, m, m->jobs, sizeof(*m->jobs), m->n_jobs,
                           m->options->threads, &tool_stop, err);
    tool_progress_end(&m->progress);
    if (ret < 0 || qlb_lbz_writer_seal(m->writer, m->result->root, err) < 0) {
        return -1;
    }
    return qlb_lbz_writer_finish(m->writer, &m->result->totals, err);
}

int merge_chain(struct qlb_chain *chain, struct qlb_outfile *out,
                const struct merge_options *options,
                struct merge_result *result, struct qlb_error *err)
{
    struct merge m = {
        .options = options,
        .chain = chain,
        .walk = {
            .chain = chain,
            .split = options->compact ? CHAIN_SPLIT_PARTIAL
                                      : CHAIN_SPLIT_SPARSE,
        },
        .result = result,
    };
    int ret = -1;

    memset(result, 0, sizeof(*result));
    if (prepare(&m, err) == 0) {
        m.writer = qlb_lbz_writer_new(out, qlb_chain_header(chain), err);
    }
    if (m.writer != NULL) {
        ret = run(&m, err);
    }
    release(&m);
    return ret;
}
