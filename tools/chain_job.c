/* Jobs of a pipeline over the pages of a chain.
 *
 * A job owns copies of what the page says: pages of the chain are reused while
 * jobs made from them are still at work.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "chain_job.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static bool must_split(const struct chain_walk *walk,
                       const struct qlb_lbz_entry *entry)
{
    unsigned live = (unsigned)__builtin_popcount(entry->live);

    switch (walk->split) {
    case CHAIN_SPLIT_SPARSE:
        return 2 * live < entry->n_blocks;
    case CHAIN_SPLIT_PARTIAL:
        return live < entry->n_blocks;
    default:
        return false;
    }
}

static void add_item(struct chain_walk *walk, unsigned frame, unsigned live,
                     bool apart)
{
    const struct qlb_lbz_entry *entry = &walk->page->frames[frame].entry;

    walk->items[walk->n_items++] = (struct chain_item) {
        .first = (uint16_t)(entry->first + __builtin_ctz(live)),
        .frame = (uint16_t)frame,
        .live = (uint16_t)live,
        .apart = apart,
    };
}

/* The lowest run of set bits. */
static unsigned lowest_run(unsigned mask)
{
    unsigned low = mask & -mask;

    return mask & ~(mask + low);
}

static int compare_items(const void *a, const void *b)
{
    return ((const struct chain_item *)a)->first -
           ((const struct chain_item *)b)->first;
}

/* Each item has a live block of its own, so there are at most 4096. */
static int list_items(struct chain_walk *walk, struct qlb_error *err)
{
    bool any = false;

    if (walk->items == NULL) {
        walk->items = calloc(QLB_LBZ_PAGE_BLOCKS, sizeof(*walk->items));
        if (walk->items == NULL) {
            return qlb_fail_errno(err, ENOMEM, "reading a page");
        }
    }
    walk->n_items = walk->item = walk->run = 0;
    for (unsigned i = 0; i < walk->page->n_frames; i++) {
        const struct qlb_lbz_entry *entry = &walk->page->frames[i].entry;
        unsigned left = entry->live;

        if (!must_split(walk, entry)) {
            add_item(walk, i, left, false);
            continue;
        }
        any = true;
        for (; left != 0; left &= ~lowest_run(left)) {
            add_item(walk, i, lowest_run(left), true);
        }
    }
    if (any) {
        qsort(walk->items, walk->n_items, sizeof(*walk->items),
              compare_items);
    }
    return 0;
}

void chain_walk_end(struct chain_walk *walk)
{
    free(walk->items);
    walk->items = NULL;
}

static void take_frame(struct chain_walk *walk, struct chain_job *job,
                       size_t digest_size)
{
    const struct chain_item *item = &walk->items[walk->item++];
    const struct qlb_chain_frame *frame = &walk->page->frames[item->frame];
    unsigned before = frame->entry.live & ((item->live & -item->live) - 1u);

    job->zero = false;
    job->apart = item->apart;
    job->member = frame->member;
    job->entry = frame->entry;
    job->entry.live = item->live;
    memcpy(job->digest, frame->entry.digest, digest_size);
    memcpy(job->block_digests, frame->entry.block_digests +
               digest_size * (size_t)__builtin_popcount(before),
           digest_size * (size_t)__builtin_popcount(item->live));
    job->entry.digest = job->digest;
    job->entry.block_digests = job->block_digests;
    job->offset = job->page_offset +
                  (uint64_t)frame->entry.first * QLB_LBZ_BLOCK;
    job->n_blocks = frame->entry.n_blocks;
}

static void take_run(struct chain_walk *walk, struct chain_job *job)
{
    const struct qlb_lbz_run *run = &walk->page->runs[walk->run++];

    job->zero = true;
    job->offset = job->page_offset + (uint64_t)run->first * QLB_LBZ_BLOCK;
    job->n_blocks = run->count;
}

int chain_walk_next(struct chain_walk *walk, struct chain_job *job,
                    struct qlb_error *err)
{
    const struct qlb_chain_page *page = walk->page;

    while (page == NULL ||
           (walk->item == walk->n_items && walk->run == page->n_runs)) {
        int ret = qlb_chain_next_page(walk->chain, &walk->page, err);

        if (ret <= 0) {
            return ret;
        }
        page = walk->page;
        if (list_items(walk, err) < 0) {
            return -1;
        }
    }
    job->page_offset = page->number * QLB_LBZ_PAGE;
    if (walk->run == page->n_runs ||
        (walk->item < walk->n_items &&
         walk->items[walk->item].first < page->runs[walk->run].first)) {
        take_frame(walk, job, qlb_digest_size(
                       qlb_chain_header(walk->chain)->digest));
    } else {
        take_run(walk, job);
    }
    return 1;
}

struct chain_worker *chain_workers_new(unsigned n, unsigned buffers,
                                       struct qlb_error *err)
{
    struct chain_worker *workers = calloc(n, sizeof(*workers));

    if (workers == NULL) {
        qlb_fail_errno(err, ENOMEM, "allocating buffers");
        return NULL;
    }
    for (unsigned i = 0; i < n; i++) {
        struct chain_worker *worker = &workers[i];

        worker->packed = malloc(CHAIN_PACKED_SIZE);
        worker->n_buffers = buffers;
        worker->buffers = aligned_alloc(QLB_OUTFILE_ALIGNMENT,
                                        buffers * (size_t)QLB_LBZ_STRIPE);
        worker->blocks = worker->buffers;
        worker->decoder = qlb_lbz_decoder_new(err);
        if (worker->packed == NULL || worker->blocks == NULL ||
            worker->decoder == NULL) {
            qlb_fail_errno(err, ENOMEM, "allocating buffers");
            chain_workers_free(workers, n);
            return NULL;
        }
    }
    return workers;
}

void chain_workers_free(struct chain_worker *workers, unsigned n)
{
    for (unsigned i = 0; workers != NULL && i < n; i++) {
        free(workers[i].packed);
        free(workers[i].buffers);
        qlb_lbz_decoder_free(workers[i].decoder);
    }
    free(workers);
}

void chain_worker_turn(struct chain_worker *worker)
{
    worker->turn = (worker->turn + 1) % worker->n_buffers;
    worker->blocks = worker->buffers + worker->turn * (size_t)QLB_LBZ_STRIPE;
}

int chain_job_load(const struct qlb_chain *chain, struct chain_job *job,
                   uint8_t *packed, struct qlb_error *err)
{
    const struct qlb_lbz_reader *reader = qlb_chain_member(chain,
                                                           job->member);

    job->packed = packed;
    if (qlb_lbz_reader_frame(reader, &job->entry, job->page_offset, packed,
                             err) < 0) {
        return qlb_error_prefix(err, "%s", qlb_lbz_reader_name(reader));
    }
    return 0;
}

const uint8_t *chain_job_compressed(const struct chain_job *job)
{
    return job->packed + CHAIN_RECORD_SIZE;
}

int chain_job_decode(const struct qlb_chain *chain, struct chain_job *job,
                     const struct chain_worker *worker,
                     struct qlb_error *err)
{
    const struct qlb_lbz_reader *reader = qlb_chain_member(chain,
                                                           job->member);

    if (chain_job_load(chain, job, worker->packed, err) < 0) {
        return -1;
    }
    job->blocks = worker->blocks;
    if (qlb_lbz_decode_at(worker->decoder, job->entry.record_offset,
                          job->offset, chain_job_compressed(job),
                          job->entry.size, job->entry.n_blocks, job->blocks,
                          err) < 0 ||
        qlb_lbz_check_blocks(qlb_lbz_reader_header(reader)->digest,
                             &job->entry, job->page_offset, job->blocks,
                             err) < 0) {
        return qlb_error_prefix(err, "%s", qlb_lbz_reader_name(reader));
    }
    return 0;
}

unsigned chain_job_live_run(const struct chain_job *job, unsigned *first)
{
    unsigned live = job->entry.live;
    unsigned end;

    while (*first < job->entry.n_blocks && !(live >> *first & 1)) {
        ++*first;
    }
    end = *first;
    while (end < job->entry.n_blocks && (live >> end & 1)) {
        end++;
    }
    return end - *first;
}

uint64_t chain_data_bytes(const struct qlb_chain *chain)
{
    uint64_t blocks = 0;

    for (unsigned i = 0; i < qlb_chain_members(chain); i++) {
        blocks += qlb_lbz_reader_totals(qlb_chain_member(chain, i))
                      ->data_blocks;
    }
    return blocks * QLB_LBZ_BLOCK;
}
