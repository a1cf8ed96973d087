/* Jobs of a pipeline over an archive that comes through a pipe.
 *
 * Frames come before the page that holds their digests: each job computes
 * digests of its live blocks, which are kept in order until the page comes.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef STREAM_JOB_H
#define STREAM_JOB_H

#include "chain_job.h"

struct stream_job {
    struct chain_job job; /* first; for frames and for chains */
    bool index;           /* a page, not a frame */
    uint8_t *packed;      /* compressed bytes; only where streaming */
    struct qlb_lbz_page page;
};

struct stream_walk {
    struct qlb_lbz_stream *stream;
    const char *name;         /* for messages */
    size_t digest_size;
    enum qlb_digest_type digest;
    uint8_t *digests;         /* of the page range so far, in order */
    unsigned n_digests;
};

/* The stream must outlive the walk. */
int stream_walk_begin(struct stream_walk *walk, struct qlb_lbz_stream *stream,
                      const char *name, struct qlb_error *err);
void stream_walk_end(struct stream_walk *walk);

/* `next`: 1, 0 at the good end of the archive, -1. */
int stream_walk_next(struct stream_walk *walk, struct stream_job *job,
                     struct qlb_error *err);
/* `work`, for frames: decompresses, computes the digests of live blocks. */
int stream_job_decode(const struct stream_walk *walk, struct stream_job *job,
                      const struct chain_worker *worker,
                      struct qlb_error *err);
/* `done`, for frames and pages: keeps digests, or compares them. */
int stream_walk_check(struct stream_walk *walk, const struct stream_job *job,
                      struct qlb_error *err);

/* Prepares a job, one of an array, and releases it. streaming: it gets a
 * buffer for compressed bytes. */
int stream_job_init(struct stream_job *job, bool streaming,
                    struct qlb_error *err);
void stream_job_release(struct stream_job *job);

#endif
