/* Jobs of a pipeline over the pages of a chain, for merge, restore and the
 * comparison with a disk: one frame, or one run of ZERO blocks.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef CHAIN_JOB_H
#define CHAIN_JOB_H

#include "tool.h"

struct chain_job {
    bool zero;             /* a run of ZERO blocks; else a frame */
    bool apart;            /* one run of live blocks, to be rewritten */
    uint64_t page_offset;  /* guest offset of the page */
    uint64_t offset;       /* guest offset of the first block of the run, or
                              of the frame's first block */
    uint64_t n_blocks;     /* of the run, or in the frame, dead ones too */
    unsigned member;
    struct qlb_lbz_entry entry; /* its digests point into this job */
    uint8_t digest[QLB_DIGEST_MAX];
    uint8_t block_digests[QLB_LBZ_STRIPE_BLOCKS * QLB_DIGEST_MAX];
    uint8_t *packed;       /* the record and its compressed bytes */
    uint8_t *blocks;       /* the decompressed frame */
};

/* What a thread needs. Buffers belong to threads, not to jobs, where they are
 * not needed after `work`: they stay in the processor's cache. */
struct chain_worker {
    struct qlb_lbz_decoder *decoder;
    uint8_t *packed; /* CHAIN_PACKED_SIZE */
    uint8_t *blocks;  /* QLB_LBZ_STRIPE: the buffer whose turn it is */
    uint8_t *buffers; /* n_buffers of them, aligned for direct writes */
    unsigned n_buffers, turn;
};

enum { CHAIN_RECORD_SIZE = 32 }; /* with its skippable header */
#define CHAIN_PACKED_SIZE (QLB_LBZ_FRAME_MAX + CHAIN_RECORD_SIZE)

/* Which frames are taken apart into their runs of live blocks. */
enum chain_split {
    CHAIN_SPLIT_NEVER,
    CHAIN_SPLIT_SPARSE,  /* those less than half live */
    CHAIN_SPLIT_PARTIAL, /* those with any dead block */
};

/* Of a page: a frame, or one run of its live blocks. */
struct chain_item {
    uint16_t first; /* first live block, relative to the page */
    uint16_t frame; /* index in the page */
    uint16_t live;
    bool apart;
};

/* Walks over a chain: page by page, in each page frames and runs in the order
 * of their first live block. */
struct chain_walk {
    struct qlb_chain *chain;
    enum chain_split split;
    const struct qlb_chain_page *page; /* NULL: none loaded */
    struct chain_item *items;          /* of the page, ordered */
    unsigned n_items, item, run;       /* item, run: the next ones */
};

/* Frees what the walk holds, not the chain. */
void chain_walk_end(struct chain_walk *walk);

/* `next` of a pipeline: fills the job; 1, 0 at the end, -1. */
int chain_walk_next(struct chain_walk *walk, struct chain_job *job,
                    struct qlb_error *err);

/* Each with that many buffers for blocks. NULL where memory is short. */
struct chain_worker *chain_workers_new(unsigned n, unsigned buffers,
                                       struct qlb_error *err);
void chain_workers_free(struct chain_worker *workers, unsigned n);

/* Has the worker go on with its next buffer. */
void chain_worker_turn(struct chain_worker *worker);

/* Reads the frame into `packed` (CHAIN_PACKED_SIZE), which becomes the job's:
 * checks the record and the compressed bytes, which begin at
 * chain_job_compressed(job). Errors begin with the archive's path. */
int chain_job_load(const struct qlb_chain *chain, struct chain_job *job,
                   uint8_t *packed, struct qlb_error *err);
const uint8_t *chain_job_compressed(const struct chain_job *job);

/* Loads and decompresses into the worker's buffers, which the job then points
 * to, and checks the live blocks. */
int chain_job_decode(const struct qlb_chain *chain, struct chain_job *job,
                     const struct chain_worker *worker,
                     struct qlb_error *err);

/* The next run of live blocks at or after block *first of the frame: its
 * length, and *first moves to its start; 0 if there is none. */
unsigned chain_job_live_run(const struct chain_job *job, unsigned *first);

/* Bytes of DATA that the members of a chain hold, for the progress. */
uint64_t chain_data_bytes(const struct qlb_chain *chain);

#endif
