/* Rollback in place: an image gets the content of a chain of archives, by
 * rewriting what differs.
 *
 * What differs is a set of blocks: those that the bitmaps say have changed
 * since a point in time that the image and the archives have in common, with
 * those that the archives between that point and the target hold; or, where
 * no such point is trusted, those whose digests differ.  Where the disk has
 * another size than it had, all from the smaller one's last block on
 * belongs to it as the `tail`.
 *
 * A pipeline goes over the set three times: first every frame that is needed is
 * read, decompressed and checked, and every table of the image that leads there
 * is read, so that damage is found while the disk is still whole; then the
 * image is marked and written to; last it is read back, before the mark goes:
 * an image whose clusters overlap can't be told before.  Workers decompress,
 * and read back; `done`, one at a time, writes.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "restore_inplace.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "block_set.h"
#include "chain_job.h"
#include "compare.h"

#define BLOCK QLB_LBZ_BLOCK

enum pass { PASS_CHECK, PASS_WRITE, PASS_READ_BACK };

struct inplace_job {
    bool zero;
    uint64_t offset, length;  /* zero: this range */
    struct chain_job frame;   /* else: its live blocks */
    uint8_t *blocks;
};

struct inplace {
    struct inplace_options options;
    struct qlb_chain *chain;
    struct qlb_image *image;
    uint64_t size;            /* that the disk will have */
    uint64_t old_size;        /* that it has */
    uint64_t unit;            /* what is written is a multiple of it */
    uint64_t tail;            /* from here on everything; UINT64_MAX: none */
    struct block_set set;
    bool compared;
    int since;                /* for qlb_image_begin_rollback */
    bool resumed;

    /* For `next`. */
    bool tail_zeroed;
    size_t next_page;         /* of the set */
    uint64_t next_tail;       /* first page of the tail not yet passed */
    uint64_t number;          /* of the present page */
    bool in_page;
    unsigned frame, block;    /* of the page: the next ones */
    const struct qlb_chain_page *page; /* NULL: the chain has nothing there */
    uint8_t wanted[QLB_LBZ_PAGE_BLOCKS / 8];
    uint8_t zeroed[QLB_LBZ_PAGE_BLOCKS / 8]; /* wanted, not in the tail */

    struct inplace_job *jobs;
    unsigned n_jobs;
    struct chain_worker *workers;
    enum pass pass;
    struct qlb_patch *patch;  /* for PASS_WRITE */
    struct qlb_disk_reader **readers; /* of each thread, for the others */
    struct restore_meter *meter;
    uint64_t bytes;
};

/* ---- what differs ---- */

static int add_page(struct inplace *p, const struct qlb_chain_page *page,
                    struct qlb_error *err)
{
    uint64_t start = page->number * QLB_LBZ_PAGE;

    for (unsigned i = 0; i < page->n_frames; i++) {
        const struct qlb_lbz_entry *entry = &page->frames[i].entry;

        for (unsigned b = 0; b < entry->n_blocks; b++) {
            if ((entry->live >> b & 1) &&
                block_set_add(&p->set, start + (entry->first + b) *
                                           (uint64_t)BLOCK, BLOCK, err) < 0) {
                return -1;
            }
        }
    }
    for (unsigned i = 0; i < page->n_runs; i++) {
        if (block_set_add(&p->set,
                          start + page->runs[i].first * (uint64_t)BLOCK,
                          page->runs[i].count * (uint64_t)BLOCK, err) < 0) {
            return -1;
        }
    }
    return 0;
}

/* All blocks that the members first..last of a chain, which are incrementals,
 * have. */
static int add_members(struct inplace *p, const struct qlb_chain *of,
                       unsigned first, unsigned last, struct qlb_error *err)
{
    unsigned n = last - first + 1;
    const char **paths = calloc(n, sizeof(*paths));
    const struct qlb_chain_page *page;
    struct qlb_chain *chain;
    int ret;

    if (paths == NULL) {
        return qlb_fail_errno(err, ENOMEM, "reading the archives");
    }
    for (unsigned i = 0; i < n; i++) {
        paths[i] = qlb_lbz_reader_name(qlb_chain_member(of, first + i));
    }
    chain = qlb_chain_open(paths, n, NULL, 0, err);
    free(paths);
    if (chain == NULL) {
        return -1;
    }
    while ((ret = qlb_chain_next_page(chain, &page, err)) > 0) {
        ret = add_page(p, page, err);
        if (ret < 0) {
            break;
        }
    }
    qlb_chain_close(chain);
    return ret;
}

static const struct qlb_lbz_header *member_header(const struct qlb_chain *chain,
                                                  unsigned i)
{
    return qlb_lbz_reader_header(qlb_chain_member(chain, i));
}

/* Whether all members from `first` on describe a disk of one size: what is
 * above a size that one of them had has changed without an entry. */
static bool one_size(const struct qlb_chain *chain, unsigned first)
{
    unsigned n = qlb_chain_members(chain);

    for (unsigned i = first; i + 1 < n; i++) {
        if (member_header(chain, i)->virtual_size !=
            member_header(chain, i + 1)->virtual_size) {
            return false;
        }
    }
    return true;
}

/* The checkpoint of that UUID, if what has changed since is trusted; or -1. */
static int trusted_point(const struct inplace *p, const struct qlb_uuid *uuid)
{
    const struct qlb_ext *ext = qlb_image_ext(p->image);
    int i = ext == NULL ? -1 : qlb_ext_find(ext, uuid);

    return i >= 0 && qlb_image_trust_since(p->image, (unsigned)i) ==
                         QLB_TRUSTED ? i : -1;
}

/* A point of the chain before the target. 1: found; 0; -1. */
static int try_earlier(struct inplace *p, struct qlb_error *err)
{
    unsigned n = qlb_chain_members(p->chain);

    for (unsigned i = n - 1; i-- > 0;) {
        int since = trusted_point(p, &member_header(p->chain, i)->uuid);

        if (since < 0 || !one_size(p->chain, i)) {
            continue;
        }
        return add_members(p, p->chain, i + 1, n - 1, err) < 0 ||
               block_set_add_changes(&p->set, p->image, (unsigned)since,
                                     err) < 0 ? -1 : 1;
    }
    return 0;
}

/* The same of a chain that goes on from the target to a later point. */
static int try_chain(struct inplace *p, const struct qlb_chain *chain,
                     unsigned since, struct qlb_error *err)
{
    const struct qlb_uuid *target = &qlb_chain_header(p->chain)->uuid;
    unsigned n = qlb_chain_members(chain);

    for (unsigned i = 0; i + 1 < n; i++) {
        if (!qlb_uuid_equal(&member_header(chain, i)->uuid, target)) {
            continue;
        }
        if (!one_size(chain, i)) {
            return 0;
        }
        return add_members(p, chain, i + 1, n - 1, err) < 0 ||
               block_set_add_changes(&p->set, p->image, since, err) < 0
                   ? -1 : 1;
    }
    return 0;
}

static int try_later(struct inplace *p, struct qlb_error *err)
{
    const struct qlb_ext *ext = qlb_image_ext(p->image);
    struct qlb_error ignored;
    int ret = 0;

    for (unsigned i = ext == NULL ? 0 : ext->n_checkpoints; ret == 0 && i > 0;
         i--) {
        struct qlb_chain *chain;

        if (trusted_point(p, &ext->checkpoints[i - 1].uuid) < 0) {
            break;
        }
        chain = qlb_chain_open(p->options.inputs, p->options.n_inputs,
                               &ext->checkpoints[i - 1].uuid,
                               QLB_CHAIN_NEED_FULL, &ignored);
        ret = chain == NULL ? 0 : try_chain(p, chain, i - 1, err);
        qlb_chain_close(chain);
    }
    return ret;
}

static int block_differs(void *opaque, uint64_t offset, struct qlb_error *err)
{
    struct inplace *p = opaque;

    return block_set_add(&p->set, offset, BLOCK, err);
}

/* Why the bitmaps can't tell. */
static void explain(const struct inplace *p, char *text, size_t size)
{
    const struct qlb_ext *ext = qlb_image_ext(p->image);
    const struct qlb_uuid *target = &qlb_chain_header(p->chain)->uuid;
    enum qlb_trust trust = qlb_image_trust(p->image);
    int i = ext == NULL ? -1 : qlb_ext_find(ext, target);

    if (trust == QLB_TRUSTED && i >= 0) {
        trust = qlb_image_trust_since(p->image, (unsigned)i);
    }
    if (p->options.rescan) {
        snprintf(text, size, "--rescan was given");
    } else if (trust == QLB_TRUSTED) {
        snprintf(text, size, "the image has no checkpoint that leads there");
    } else {
        snprintf(text, size, "%s (%s)", qlb_trust_reason(trust),
                 qlb_trust_keyword(trust));
    }
}

static int compare_all(struct inplace *p, struct qlb_error *err)
{
    struct compare_options options = {
        .threads = p->options.threads,
        .progress = p->options.progress,
        .differs = block_differs,
        .opaque = p,
    };
    char why[200];
    uint64_t blocks;

    explain(p, why, sizeof(why));
    if (!p->options.quiet) {
        tool_message("%s: %s; the whole disk is compared with the archives",
                     p->options.disk, why);
    }
    p->compared = true;
    return compare_open_disk(p->chain, qlb_image_disk(p->image),
                             p->options.disk,
                             p->tail < p->size ? p->tail : p->size, &options,
                             &blocks, err);
}

static int find_differences(struct inplace *p, struct qlb_error *err)
{
    int ret = 0;

    p->since = p->options.rescan
                   ? -1
                   : trusted_point(p, &qlb_chain_header(p->chain)->uuid);
    if (p->since >= 0) {
        return block_set_add_changes(&p->set, p->image, (unsigned)p->since,
                                     err);
    }
    if (!p->options.rescan) {
        ret = try_earlier(p, err);
        if (ret == 0) {
            ret = try_later(p, err);
        }
    }
    return ret == 0 ? compare_all(p, err) : ret < 0 ? -1 : 0;
}

/* ---- the pipeline ---- */

static void rewind_walk(struct inplace *p)
{
    p->tail_zeroed = p->tail == UINT64_MAX;
    p->next_page = 0;
    p->next_tail = p->tail == UINT64_MAX ? UINT64_MAX : p->tail / QLB_LBZ_PAGE;
    p->in_page = false;
    p->bytes = 0;
}

/* Loads what the chain has at or after a page. *number: which one it is,
 * UINT64_MAX: none. */
static int seek_chain(struct inplace *p, uint64_t number, uint64_t *found,
                      struct qlb_error *err)
{
    int ret;

    qlb_chain_seek(p->chain, number);
    ret = qlb_chain_next_page(p->chain, &p->page, err);
    if (ret <= 0) {
        p->page = NULL;
    }
    *found = ret > 0 ? p->page->number : UINT64_MAX;
    return ret < 0 ? -1 : 0;
}

static void want_page(struct inplace *p, uint64_t number)
{
    size_t i = p->next_page;
    uint64_t start = number * QLB_LBZ_PAGE;

    memset(p->zeroed, 0, sizeof(p->zeroed));
    if (i < p->set.n_pages && p->set.pages[i].number == number) {
        memcpy(p->zeroed, p->set.pages[i].mask, sizeof(p->zeroed));
        p->next_page++;
    }
    memcpy(p->wanted, p->zeroed, sizeof(p->wanted));
    for (unsigned b = 0; b < QLB_LBZ_PAGE_BLOCKS; b++) {
        if (start + b * (uint64_t)BLOCK >= p->tail) {
            qlb_bit_set(p->wanted, b);
            p->zeroed[b / 8] &= (uint8_t)~(1u << b % 8);
        }
    }
    p->number = number;
    p->frame = p->block = 0;
    p->in_page = true;
}

/* The next page of the set, or of the tail where the chain has something.
 * 1, 0 at the end, -1. */
static int load_page(struct inplace *p, struct qlb_error *err)
{
    uint64_t number = p->next_page < p->set.n_pages
                          ? p->set.pages[p->next_page].number : UINT64_MAX;
    uint64_t found;

    if (number >= p->next_tail && p->next_tail != UINT64_MAX) {
        if (seek_chain(p, p->next_tail, &found, err) < 0) {
            return -1;
        }
        number = found < number ? found : number;
        p->next_tail = number == UINT64_MAX ? UINT64_MAX : number + 1;
    } else if (number != UINT64_MAX &&
               seek_chain(p, number, &found, err) < 0) {
        return -1;
    }
    if (number == UINT64_MAX || number * QLB_LBZ_PAGE >= p->size) {
        return 0;
    }
    if (p->page != NULL && p->page->number != number) {
        p->page = NULL;
    }
    want_page(p, number);
    return 1;
}

/* Of a frame, the blocks that are wanted, with their digests. */
static void take_frame(struct inplace *p, struct chain_job *job,
                       const struct qlb_chain_frame *frame, unsigned live)
{
    size_t size = qlb_digest_size(qlb_chain_header(p->chain)->digest);
    const uint8_t *from = frame->entry.block_digests;
    uint8_t *to = job->block_digests;

    job->zero = false;
    job->member = frame->member;
    job->entry = frame->entry;
    job->entry.live = (uint16_t)live;
    memcpy(job->digest, frame->entry.digest, size);
    for (unsigned b = 0; b < frame->entry.n_blocks; b++) {
        if (live >> b & 1) {
            memcpy(to, from, size);
            to += size;
        }
        from += frame->entry.live >> b & 1 ? size : 0;
    }
    job->entry.digest = job->digest;
    job->entry.block_digests = job->block_digests;
    job->page_offset = p->number * QLB_LBZ_PAGE;
    job->offset = job->page_offset + frame->entry.first * (uint64_t)BLOCK;
    job->n_blocks = frame->entry.n_blocks;
}

/* The next frame of the page of which something is wanted. */
static bool next_frame(struct inplace *p, struct inplace_job *job)
{
    while (p->page != NULL && p->frame < p->page->n_frames) {
        const struct qlb_chain_frame *frame = &p->page->frames[p->frame++];
        unsigned live = 0;

        for (unsigned b = 0; b < frame->entry.n_blocks; b++) {
            unsigned at = frame->entry.first + b;

            if ((frame->entry.live >> b & 1) && qlb_bit_test(p->wanted, at)) {
                live |= 1u << b;
                p->zeroed[at / 8] &= (uint8_t)~(1u << at % 8);
            }
        }
        if (live != 0) {
            job->zero = false;
            take_frame(p, &job->frame, frame, live);
            return true;
        }
    }
    return false;
}

/* What is wanted and no frame has: it reads as zeroes. */
static bool next_zeroes(struct inplace *p, struct inplace_job *job)
{
    uint64_t start = qlb_bits_next_set(p->zeroed, QLB_LBZ_PAGE_BLOCKS,
                                       p->block);
    uint64_t end;

    if (start == QLB_LBZ_PAGE_BLOCKS) {
        return false;
    }
    end = qlb_bits_next_clear(p->zeroed, QLB_LBZ_PAGE_BLOCKS, start);
    p->block = (unsigned)end;
    job->zero = true;
    job->offset = p->number * QLB_LBZ_PAGE + start * BLOCK;
    job->length = (end - start) * BLOCK;
    return true;
}

static int inplace_next(void *opaque, void *arg, struct qlb_error *err)
{
    struct inplace *p = opaque;
    struct inplace_job *job = arg;

    if (!p->tail_zeroed) {
        p->tail_zeroed = true;
        job->zero = true;
        job->offset = p->tail;
        job->length = UINT64_MAX - p->tail;
        return 1;
    }
    for (;;) {
        int ret;

        if (p->in_page && (next_frame(p, job) || next_zeroes(p, job))) {
            return 1;
        }
        ret = load_page(p, err);
        if (ret <= 0) {
            return ret;
        }
    }
}

/* How much of a range the disk has, before and after, while it is open. */
static uint64_t readable(const struct inplace *p, uint64_t offset,
                         uint64_t length)
{
    uint64_t size = p->size < p->old_size ? p->size : p->old_size;

    return offset >= size ? 0 : length < size - offset ? length
                                                       : size - offset;
}

static int differs(const struct inplace *p, uint64_t offset,
                   struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_DAMAGED, "%s: what was written at guest offset "
                    "%" PRIu64 " reads back otherwise: clusters of the image "
                    "overlap", p->options.disk, offset);
}

/* The live blocks of a frame, as far as they lie on the disk whole; where it
 * ends in one, and grows, that block can't be read yet. */
static int read_back(struct inplace *p, struct inplace_job *job,
                     unsigned thread, struct qlb_error *err)
{
    enum qlb_digest_type type = qlb_chain_header(p->chain)->digest;
    const uint8_t *wanted = job->frame.block_digests;
    uint8_t digest[QLB_DIGEST_MAX];

    for (unsigned b = 0; b < job->frame.entry.n_blocks; b++) {
        uint64_t offset = job->frame.offset + b * (uint64_t)BLOCK;
        uint64_t length = readable(p, offset, BLOCK);

        if (!(job->frame.entry.live >> b & 1)) {
            continue;
        }
        wanted += qlb_digest_size(type);
        if (length == 0 || (length < BLOCK && p->size > p->old_size)) {
            continue;
        }
        memset(job->blocks, 0, BLOCK);
        if (qlb_disk_read(p->readers[thread], job->blocks, offset, length,
                          err) < 0) {
            return -1;
        }
        qlb_digest(type, job->blocks, BLOCK, digest);
        if (memcmp(digest, wanted - qlb_digest_size(type),
                   qlb_digest_size(type)) != 0) {
            return differs(p, offset, err);
        }
    }
    return 0;
}

/* What is not in the tail, which was written to again. */
static int read_back_zeroes(struct inplace *p, struct inplace_job *job,
                            unsigned thread, struct qlb_error *err)
{
    uint64_t offset = job->offset, run;
    uint64_t left = offset >= p->tail ? 0 : readable(p, offset, job->length);

    for (; left > 0; offset += run, left -= run) {
        enum qlb_extent_type type;

        if (qlb_disk_extent(p->readers[thread], offset, left, &type, &run,
                            err) < 0) {
            return -1;
        }
        if (type == QLB_EXTENT_ZERO) {
            continue;
        }
        run = run < BLOCK ? run : BLOCK;
        if (qlb_disk_read(p->readers[thread], job->blocks, offset, run,
                          err) < 0) {
            return -1;
        }
        if (!qlb_bits_all_zero(job->blocks, run)) {
            return differs(p, offset, err);
        }
    }
    return 0;
}

static int inplace_work(void *opaque, void *arg, unsigned thread,
                        struct qlb_error *err)
{
    struct inplace *p = opaque;
    struct inplace_job *job = arg;
    struct chain_worker worker = p->workers[thread];

    if (p->pass == PASS_READ_BACK) {
        return job->zero ? read_back_zeroes(p, job, thread, err)
                         : read_back(p, job, thread, err);
    }
    worker.blocks = job->blocks;
    return job->zero ? 0 : chain_job_decode(p->chain, &job->frame, &worker,
                                            err);
}

static uint64_t round_up_to(uint64_t n, uint64_t unit)
{
    return (n + unit - 1) / unit * unit;
}

/* The last unit of a disk is written whole, but must not show what a foreign
 * writer put behind the disk's end when it grows. */
static int write_run(struct inplace *p, const struct chain_job *frame,
                     unsigned first, unsigned n, struct qlb_error *err)
{
    uint64_t offset = frame->offset + first * (uint64_t)BLOCK;
    uint64_t length = n * (uint64_t)BLOCK;
    uint64_t inside = p->size > offset ? p->size - offset : 0;
    uint8_t *blocks = frame->blocks + first * (size_t)BLOCK;

    if (length > inside) {
        memset(blocks + inside, 0, length - inside);
        length = round_up_to(inside, p->unit);
    }
    return qlb_patch_write(p->patch, blocks, offset, length, err);
}

static int write_zeroes(struct inplace *p, const struct inplace_job *job,
                        struct qlb_error *err)
{
    uint64_t larger = p->size > p->old_size ? p->size : p->old_size;
    uint64_t end = round_up_to(larger, p->unit);

    if (job->offset >= end) {
        return 0;
    }
    return qlb_patch_zero(p->patch, job->offset,
                          job->length < end - job->offset
                              ? job->length : end - job->offset, err);
}

/* Whether the tables of a range that will be written to can be read. */
static int probe(struct inplace *p, uint64_t offset, uint64_t length,
                 struct qlb_error *err)
{
    enum qlb_extent_type type;
    uint64_t run;

    if (offset >= p->old_size) {
        return 0;
    }
    if (length > p->old_size - offset) {
        length = p->old_size - offset;
    }
    for (; length > 0; offset += run, length -= run) {
        if (qlb_disk_top_extent(p->readers[0], offset, length, &type, &run,
                                err) < 0) {
            return -1;
        }
    }
    return 0;
}

static int check_job(struct inplace *p, const struct inplace_job *job,
                     struct qlb_error *err)
{
    return job->zero ? probe(p, job->offset, job->length, err)
                     : probe(p, job->frame.offset,
                             job->frame.n_blocks * (uint64_t)BLOCK, err);
}

static int write_job(struct inplace *p, const struct inplace_job *job,
                     struct qlb_error *err)
{
    unsigned first = 0, n;

    if (job->zero) {
        return write_zeroes(p, job, err);
    }
    while ((n = chain_job_live_run(&job->frame, &first)) > 0) {
        if (write_run(p, &job->frame, first, n, err) < 0) {
            return -1;
        }
        first += n;
    }
    return restore_meter_account(
        p->meter, (uint64_t)__builtin_popcount(job->frame.entry.live) * BLOCK,
        err);
}

static int inplace_done(void *opaque, void *arg, struct qlb_error *err)
{
    struct inplace *p = opaque;
    struct inplace_job *job = arg;

    if (!job->zero) {
        p->bytes += (uint64_t)__builtin_popcount(job->frame.entry.live) *
                    BLOCK;
    }
    switch (p->pass) {
    case PASS_CHECK:
        return check_job(p, job, err);
    case PASS_WRITE:
        return write_job(p, job, err);
    default:
        return 0;
    }
}

static int run_pipeline(struct inplace *p, enum pass pass,
                        struct qlb_error *err)
{
    static const struct qlb_pipeline_ops ops = {
        .next = inplace_next,
        .work = inplace_work,
        .done = inplace_done,
    };

    rewind_walk(p);
    p->pass = pass;
    return qlb_pipeline_run(&ops, p, p->jobs, sizeof(*p->jobs), p->n_jobs,
                            p->options.threads, &tool_stop, err);
}

static void close_readers(struct inplace *p)
{
    for (unsigned i = 0; p->readers != NULL && i < p->options.threads; i++) {
        qlb_disk_reader_free(p->readers[i]);
    }
    free(p->readers);
    p->readers = NULL;
}

/* New ones know nothing of the tables as they were. */
static int open_readers(struct inplace *p, struct qlb_error *err)
{
    close_readers(p);
    p->readers = calloc(p->options.threads, sizeof(*p->readers));
    if (p->readers == NULL) {
        return qlb_fail_errno(err, ENOMEM, "starting the rollback");
    }
    for (unsigned i = 0; i < p->options.threads; i++) {
        p->readers[i] = qlb_disk_reader_new(qlb_image_disk(p->image), err);
        if (p->readers[i] == NULL) {
            return -1;
        }
    }
    return 0;
}

static int prepare_jobs(struct inplace *p, struct qlb_error *err)
{
    p->workers = chain_workers_new(p->options.threads, 1, err);
    if (p->workers == NULL) {
        return -1;
    }
    p->n_jobs = 2 * p->options.threads + 1;
    p->jobs = calloc(p->n_jobs, sizeof(*p->jobs));
    for (unsigned i = 0; p->jobs != NULL && i < p->n_jobs; i++) {
        p->jobs[i].blocks = malloc(QLB_LBZ_STRIPE);
        if (p->jobs[i].blocks == NULL) {
            return qlb_fail_errno(err, ENOMEM, "starting the rollback");
        }
    }
    return p->jobs != NULL ? 0 : qlb_fail_errno(err, ENOMEM,
                                                "starting the rollback");
}

/* ---- from the beginning to the end ---- */

/* The archives of another disk would replace all of this one. */
static int check_identity(const struct inplace *p, struct qlb_error *err)
{
    const struct qlb_ext *ext = qlb_image_ext(p->image);
    size_t used;

    if (p->options.force ||
        compare_check_identity(p->chain, ext, p->options.disk, err) == 0) {
        return 0;
    }
    if (ext == NULL) {
        used = strlen(err->message);
        snprintf(err->message + used, sizeof(err->message) - used,
                 "; if it is, add --force");
    }
    return -1;
}

static int open_image(struct inplace *p, struct qlb_error *err)
{
    const struct qlb_qcow2_header *header;

    p->image = qlb_image_open(p->options.disk,
                              QLB_IMAGE_WRITE | QLB_IMAGE_UNFINISHED, err);
    if (p->image == NULL ||
        qlb_image_check_rollback(p->image, p->size, err) < 0 ||
        check_identity(p, err) < 0) {
        return -1;
    }
    header = qlb_disk_header(qlb_image_disk(p->image));
    p->resumed = qlb_image_is_unfinished(p->image);
    p->old_size = header->virtual_size;
    p->unit = header->cluster_size < BLOCK ? header->cluster_size : BLOCK;
    p->tail = UINT64_MAX;
    if (p->size != p->old_size) {
        p->tail = p->size < p->old_size ? p->size : p->old_size;
        p->tail -= p->tail % BLOCK;
    }
    return 0;
}

struct inplace *inplace_prepare(const struct inplace_options *options,
                                struct qlb_chain *chain,
                                struct qlb_error *err)
{
    struct inplace *p = calloc(1, sizeof(*p));

    if (p == NULL) {
        qlb_chain_close(chain);
        qlb_fail_errno(err, ENOMEM, "starting the rollback");
        return NULL;
    }
    p->options = *options;
    p->chain = chain;
    p->size = (qlb_chain_header(chain)->virtual_size + 511) / 512 * 512;
    if (open_image(p, err) < 0 || find_differences(p, err) < 0 ||
        prepare_jobs(p, err) < 0 || open_readers(p, err) < 0 ||
        run_pipeline(p, PASS_CHECK, err) < 0) {
        inplace_free(p);
        return NULL;
    }
    return p;
}

void inplace_free(struct inplace *p)
{
    if (p == NULL) {
        return;
    }
    for (unsigned i = 0; p->jobs != NULL && i < p->n_jobs; i++) {
        free(p->jobs[i].blocks);
    }
    free(p->jobs);
    chain_workers_free(p->workers, p->options.threads);
    block_set_release(&p->set);
    close_readers(p);
    qlb_patch_close(p->patch);
    qlb_image_close(p->image);
    qlb_chain_close(p->chain);
    free(p);
}

uint64_t inplace_bytes(const struct inplace *p)
{
    return p->bytes;
}

bool inplace_compared(const struct inplace *p)
{
    return p->compared;
}

static int rewrite(struct inplace *p, struct qlb_error *err)
{
    int ret;

    p->patch = qlb_image_patch(p->image, err);
    if (p->patch == NULL) {
        return -1;
    }
    ret = run_pipeline(p, PASS_WRITE, err);
    if (ret == 0) {
        ret = qlb_patch_flush(p->patch, err);
    }
    qlb_patch_close(p->patch);
    p->patch = NULL;
    if (ret < 0 || open_readers(p, err) < 0) {
        return -1;
    }
    return run_pipeline(p, PASS_READ_BACK, err);
}

static int finish(struct inplace *p, struct qlb_error *err)
{
    const struct qlb_lbz_header *header = qlb_chain_header(p->chain);
    unsigned newest = qlb_chain_members(p->chain) - 1;
    struct qlb_checkpoint checkpoint = {
        .uuid = header->uuid,
        .time = header->time,
        .virtual_size = p->size,
    };

    memcpy(checkpoint.root,
           qlb_lbz_reader_root(qlb_chain_member(p->chain, newest)),
           sizeof(checkpoint.root));
    memcpy(checkpoint.label, header->label, sizeof(checkpoint.label));
    if (p->resumed && qlb_image_free_leaks(p->image, err) < 0) {
        return -1;
    }
    return qlb_image_finish_rollback(p->image, &checkpoint,
                                     &header->image_uuid, err);
}

/* What an interrupted backup left beside the image is of no use to anybody: the
 * backup was given up. */
static void remove_orig(const struct inplace *p)
{
    const struct qlb_ext *ext = qlb_image_ext(p->image);
    char *orig = qlb_live_default_orig(p->options.disk);
    struct qlb_error err;

    if (ext != NULL && orig != NULL &&
        qlb_live_remove_orig(orig, &ext->image_uuid, &err) < 0) {
        tool_message("%s", err.message);
    }
    free(orig);
}

int inplace_run(struct inplace *p, struct restore_meter *meter,
                struct qlb_error *err)
{
    int ret;

    p->meter = meter;
    ret = qlb_image_begin_rollback(p->image, p->since, p->size, err);
    if (ret == 0) {
        ret = rewrite(p, err) < 0 || finish(p, err) < 0 ? -1 : 0;
    } else if (!qlb_image_is_unfinished(p->image)) {
        return -1;
    }
    if (ret < 0) {
        tool_message("%s: the rollback is not finished; run it again",
                     p->options.disk);
    } else {
        remove_orig(p);
    }
    return ret;
}
