/* Jobs of a pipeline over an archive that comes through a pipe.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "stream_job.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int stream_walk_begin(struct stream_walk *walk, struct qlb_lbz_stream *stream,
                      const char *name, struct qlb_error *err)
{
    enum qlb_digest_type digest = qlb_lbz_stream_header(stream)->digest;

    *walk = (struct stream_walk) {
        .stream = stream,
        .name = name,
        .digest = digest,
        .digest_size = qlb_digest_size(digest),
        .digests = malloc(QLB_LBZ_PAGE_BLOCKS * QLB_DIGEST_MAX),
    };
    if (walk->digests == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", name);
    }
    return 0;
}

void stream_walk_end(struct stream_walk *walk)
{
    free(walk->digests);
    walk->digests = NULL;
}

int stream_walk_next(struct stream_walk *walk, struct stream_job *job,
                     struct qlb_error *err)
{
    struct qlb_lbz_stream_frame frame;
    struct chain_job *j = &job->job;
    int item = qlb_lbz_stream_next(walk->stream, &frame, job->packed,
                                   &job->page, err);

    if (item < 0) {
        return qlb_error_prefix(err, "%s", walk->name);
    }
    if (item == QLB_LBZ_END) {
        return 0;
    }
    job->index = item == QLB_LBZ_INDEX;
    if (!job->index) {
        j->zero = false;
        j->offset = frame.offset;
        j->page_offset = frame.offset - frame.offset % QLB_LBZ_PAGE;
        j->n_blocks = frame.n_blocks;
        j->entry = (struct qlb_lbz_entry) {
            .record_offset = frame.record_offset,
            .size = frame.size,
            .first = (uint16_t)((frame.offset - j->page_offset) /
                                QLB_LBZ_BLOCK),
            .n_blocks = (uint16_t)frame.n_blocks,
            .live = frame.live,
        };
    }
    return 1;
}

int stream_job_decode(const struct stream_walk *walk, struct stream_job *job,
                      const struct chain_worker *worker,
                      struct qlb_error *err)
{
    struct chain_job *j = &job->job;
    uint8_t *digest = j->block_digests;

    if (job->index) {
        return 0;
    }
    j->blocks = worker->blocks;
    if (qlb_lbz_decode_at(worker->decoder, j->entry.record_offset, j->offset,
                          job->packed, j->entry.size, j->entry.n_blocks,
                          j->blocks, err) < 0) {
        return qlb_error_prefix(err, "%s", walk->name);
    }
    for (unsigned i = 0; i < j->entry.n_blocks; i++) {
        if (j->entry.live >> i & 1) {
            qlb_digest(walk->digest, j->blocks + (size_t)i * QLB_LBZ_BLOCK,
                       QLB_LBZ_BLOCK, digest);
            digest += walk->digest_size;
        }
    }
    return 0;
}

/* The reader has checked that the page lists the frames that passed, so both
 * speak of the same blocks in the same order. */
static int compare_digests(struct stream_walk *walk,
                           const struct qlb_lbz_page *page,
                           struct qlb_error *err)
{
    const uint8_t *kept = walk->digests;

    if (qlb_lbz_stream_header(walk->stream)->index) {
        return 0;
    }
    for (unsigned i = 0; i < page->n_entries; i++) {
        const struct qlb_lbz_entry *entry = &page->entries[i];

        if (qlb_lbz_check_digests(walk->digest, entry,
                                  page->number * QLB_LBZ_PAGE, kept,
                                  err) < 0) {
            return qlb_error_prefix(err, "%s", walk->name);
        }
        kept += walk->digest_size *
                (size_t)__builtin_popcount(entry->live);
    }
    walk->n_digests = 0;
    return 0;
}

int stream_walk_check(struct stream_walk *walk, const struct stream_job *job,
                      struct qlb_error *err)
{
    unsigned live;

    if (job->index) {
        return compare_digests(walk, &job->page, err);
    }
    live = (unsigned)__builtin_popcount(job->job.entry.live);
    if (walk->n_digests + live > QLB_LBZ_PAGE_BLOCKS) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged: more blocks than a "
                        "page holds", walk->name);
    }
    memcpy(walk->digests + walk->n_digests * walk->digest_size,
           job->job.block_digests, live * walk->digest_size);
    walk->n_digests += live;
    return 0;
}

int stream_job_init(struct stream_job *job, bool streaming,
                    struct qlb_error *err)
{
    memset(job, 0, sizeof(*job));
    qlb_lbz_page_init(&job->page);
    if (streaming) {
        job->packed = malloc(QLB_LBZ_FRAME_MAX);
        if (job->packed == NULL) {
            return qlb_fail_errno(err, ENOMEM, "allocating buffers");
        }
    }
    return 0;
}

void stream_job_release(struct stream_job *job)
{
    free(job->packed);
    qlb_lbz_page_release(&job->page);
}
