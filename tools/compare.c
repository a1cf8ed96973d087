/* A disk held against the chain of its archives.
 *
 * A job is a stripe of the disk with what the chain says of its 16 blocks.
 * Where neither disk (by metadata) nor chain has anything, stripes are passed
 * over in bulk.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "compare.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK QLB_LBZ_BLOCK

struct compare_job {
    uint64_t offset;
    unsigned n_blocks;
    uint16_t data;      /* blocks that the chain has content for */
    uint16_t differing; /* found by `work` */
    uint8_t digests[QLB_LBZ_STRIPE_BLOCKS][QLB_DIGEST_MAX];
};

/* A block is hashed right after it was read, while it is in the processor's
 * cache: twice as fast as reading the stripe first. */
struct compare_thread {
    struct qlb_disk_reader *reader;
    uint8_t *block;       /* BLOCK bytes, aligned: some processors copy slowly
                             to what is not */
};

struct compare {
    struct qlb_chain *chain;
    const struct qlb_disk *disk;
    const char *path;
    enum qlb_digest_type digest;
    size_t digest_size;
    uint64_t size;

    /* For `next`. */
    struct qlb_disk_reader *scanner;
    uint64_t position;
    uint64_t taken, limit; /* bytes outside of pages: so far, at most */
    const struct qlb_chain_page *page; /* the first not yet passed */
    bool pages_left;
    /* Digest of each block of the page; NULL where it reads as zeroes. */
    const uint8_t *expected[QLB_LBZ_PAGE_BLOCKS];

    struct compare_thread *workers; /* for each thread */
    struct compare_job *jobs;
    unsigned n_jobs, threads;
    struct tool_progress progress;

    const struct compare_options *options;
    uint64_t differing_blocks;
    uint64_t range_start, range_end; /* of the differences not yet printed */
    unsigned printed;
};

enum { MAX_PRINTED = 20, ALIGNMENT = 4096 };

static int load_page(struct compare *c, struct qlb_error *err)
{
    int ret = qlb_chain_next_page(c->chain, &c->page, err);

    if (ret < 0) {
        return -1;
    }
    c->pages_left = ret > 0;
    memset(c->expected, 0, sizeof(c->expected));
    for (unsigned i = 0; c->pages_left && i < c->page->n_frames; i++) {
        const struct qlb_lbz_entry *entry = &c->page->frames[i].entry;
        const uint8_t *digest = entry->block_digests;

        for (unsigned b = 0; b < entry->n_blocks; b++) {
            if (entry->live >> b & 1) {
                c->expected[entry->first + b] = digest;
                digest += c->digest_size;
            }
        }
    }
    return 0;
}

static uint64_t page_start(const struct compare *c)
{
    return c->pages_left ? c->page->number * QLB_LBZ_PAGE : UINT64_MAX;
}

/* The first stripe from the position on that the chain has something in; of
 * the next page it is only known that it has. */
static uint64_t next_expected(const struct compare *c)
{
    uint64_t start = page_start(c);

    if (c->position < start) {
        return start;
    }
    for (uint64_t b = (c->position - start) / BLOCK; b < QLB_LBZ_PAGE_BLOCKS;
         b++) {
        if (c->expected[b] != NULL) {
            return start + b * BLOCK / QLB_LBZ_STRIPE * QLB_LBZ_STRIPE;
        }
    }
    return start + QLB_LBZ_PAGE;
}

/* Passes over whole stripes that are empty on both sides. */
static int skip_empty(struct compare *c, struct qlb_error *err)
{
    uint64_t limit = next_expected(c);

    if (limit > c->size) {
        limit = c->size;
    }
    while (c->position < limit) {
        enum qlb_extent_type type;
        uint64_t run, end;

        if (qlb_disk_extent(c->scanner, c->position, limit - c->position,
                            &type, &run, err) < 0) {
            return -1;
        }
        end = c->position + run;
        if (end < c->size) {
            end -= end % QLB_LBZ_STRIPE;
        }
        if (type != QLB_EXTENT_ZERO || end <= c->position) {
            break;
        }
        c->position = end;
    }
    return 0;
}

/* Tables that lead to the same clusters over and over give a small file more
 * content than anybody can read. In the pages of the chain the archives bound
 * what is read. */
static int check_limit(struct compare *c, const struct compare_job *job,
                       struct qlb_error *err)
{
    if (job->offset >= page_start(c)) {
        return 0;
    }
    c->taken += job->n_blocks * (uint64_t)BLOCK;
    if (c->taken > c->limit) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: the image maps more data "
                        "than its files can hold", c->path);
    }
    return 0;
}

static void describe_stripe(const struct compare *c, struct compare_job *job)
{
    uint64_t start = page_start(c);

    job->data = 0;
    job->differing = 0;
    if (job->offset < start || job->offset - start >= QLB_LBZ_PAGE) {
        return;
    }
    for (unsigned i = 0; i < QLB_LBZ_STRIPE_BLOCKS; i++) {
        const uint8_t *digest =
            c->expected[(job->offset - start) / BLOCK + i];

        if (digest != NULL) {
            job->data |= (uint16_t)(1u << i);
            memcpy(job->digests[i], digest, c->digest_size);
        }
    }
}

static int compare_next(void *opaque, void *arg, struct qlb_error *err)
{
    struct compare *c = opaque;
    struct compare_job *job = arg;
    uint64_t left;

    for (;;) {
        while (c->pages_left && c->position >= page_start(c) + QLB_LBZ_PAGE) {
            if (load_page(c, err) < 0) {
                return -1;
            }
        }
        left = c->position;
        if (skip_empty(c, err) < 0) {
            return -1;
        }
        if (c->position == left) {
            if (c->position >= c->size || c->options->wanted == NULL ||
                c->options->wanted(c->options->opaque, c->position)) {
                break;
            }
            c->position += QLB_LBZ_STRIPE;
        }
    }
    if (c->position >= c->size) {
        return 0;
    }
    job->offset = c->position;
    left = c->size - c->position;
    job->n_blocks = left >= QLB_LBZ_STRIPE
                        ? QLB_LBZ_STRIPE_BLOCKS
                        : (unsigned)((left + BLOCK - 1) / BLOCK);
    c->position += QLB_LBZ_STRIPE;
    describe_stripe(c, job);
    return check_limit(c, job, err) < 0 ? -1 : 1;
}

static bool block_is_same(const struct compare *c,
                          const struct compare_job *job, unsigned i,
                          const uint8_t *block)
{
    uint8_t digest[QLB_DIGEST_MAX];

    if (!(job->data >> i & 1)) {
        return qlb_bits_all_zero(block, BLOCK);
    }
    qlb_digest(c->digest, block, BLOCK, digest);
    return memcmp(digest, job->digests[i], c->digest_size) == 0;
}

static int compare_work(void *opaque, void *arg, unsigned thread,
                        struct qlb_error *err)
{
    struct compare *c = opaque;
    struct compare_job *job = arg;
    struct compare_thread *worker = &c->workers[thread];

    for (unsigned i = 0; i < job->n_blocks; i++) {
        uint64_t offset = job->offset + (uint64_t)i * BLOCK, length = BLOCK;

        if (length > c->size - offset) {
            memset(worker->block, 0, BLOCK);
            length = c->size - offset;
        }
        if (qlb_disk_read(worker->reader, worker->block, offset, length,
                          err) < 0) {
            return -1;
        }
        if (!block_is_same(c, job, i, worker->block)) {
            job->differing |= (uint16_t)(1u << i);
        }
    }
    return 0;
}

static void print_range(struct compare *c)
{
    if (c->range_end > c->range_start && c->printed++ < MAX_PRINTED) {
        tool_message("%s: differs from the chain in 0x%" PRIx64 "-0x%" PRIx64,
                     c->path, c->range_start, c->range_end - 1);
    }
    c->range_start = c->range_end = 0;
}

static int compare_done(void *opaque, void *arg, struct qlb_error *err)
{
    struct compare *c = opaque;
    struct compare_job *job = arg;

    for (unsigned i = 0; i < job->n_blocks; i++) {
        uint64_t offset = job->offset + (uint64_t)i * BLOCK;

        if (!(job->differing >> i & 1)) {
            continue;
        }
        if (c->options->differs != NULL) {
            c->differing_blocks++;
            if (c->options->differs(c->options->opaque, offset, err) < 0) {
                return -1;
            }
            continue;
        }
        if (offset != c->range_end || c->range_end == c->range_start) {
            print_range(c);
            c->range_start = offset;
        }
        c->range_end = offset + BLOCK;
        c->differing_blocks++;
    }
    tool_progress_update(&c->progress, job->offset);
    return 0;
}

static int prepare(struct compare *c, struct qlb_error *err)
{
    c->scanner = qlb_disk_reader_new(c->disk, err);
    if (c->scanner == NULL) {
        return -1;
    }
    c->n_jobs = 2 * c->threads + 1;
    c->workers = calloc(c->threads, sizeof(*c->workers));
    c->jobs = calloc(c->n_jobs, sizeof(*c->jobs));
    if (c->workers == NULL || c->jobs == NULL) {
        return qlb_fail_errno(err, ENOMEM, "comparing");
    }
    for (unsigned i = 0; i < c->threads; i++) {
        c->workers[i].reader = qlb_disk_reader_new(c->disk, err);
        if (c->workers[i].reader == NULL) {
            return -1;
        }
        c->workers[i].block = aligned_alloc(ALIGNMENT, BLOCK);
        if (c->workers[i].block == NULL) {
            return qlb_fail_errno(err, ENOMEM, "comparing");
        }
    }
    return load_page(c, err);
}

static void release(struct compare *c)
{
    for (unsigned i = 0; c->workers != NULL && i < c->threads; i++) {
        qlb_disk_reader_free(c->workers[i].reader);
        free(c->workers[i].block);
    }
    free(c->workers);
    free(c->jobs);
    qlb_disk_reader_free(c->scanner);
}

static int run(struct compare *c, struct qlb_error *err)
{
    static const struct qlb_pipeline_ops ops = {
        .next = compare_next,
        .work = compare_work,
        .done = compare_done,
    };
    int ret;

    tool_progress_begin(&c->progress, "compared", c->options->progress,
                        c->size);
    ret = qlb_pipeline_run(&ops, c, c->jobs, sizeof(*c->jobs), c->n_jobs,
                           c->threads, &tool_stop, err);
    tool_progress_end(&c->progress);
    print_range(c);
    return ret;
}

int compare_open_disk(struct qlb_chain *chain, const struct qlb_disk *disk,
                      const char *path, uint64_t size,
                      const struct compare_options *options,
                      uint64_t *blocks, struct qlb_error *err)
{
    const struct qlb_lbz_header *header = qlb_chain_header(chain);
    struct compare c = {
        .chain = chain,
        .disk = disk,
        .path = path,
        .size = size,
        .limit = qlb_disk_content_limit(disk),
        .digest = header->digest,
        .digest_size = qlb_digest_size(header->digest),
        .threads = options->threads,
        .options = options,
    };
    int ret = prepare(&c, err);

    if (ret == 0) {
        ret = run(&c, err);
    }
    *blocks = c.differing_blocks;
    release(&c);
    return ret;
}

int compare_with_disk(struct qlb_chain *chain, const char *path,
                      const struct compare_options *options,
                      struct qlb_error *err)
{
    const struct qlb_lbz_header *header = qlb_chain_header(chain);
    struct qlb_disk *disk = qlb_disk_open(path, QLB_DISK_LOCK, err);
    uint64_t size, blocks;
    int ret = -1;

    if (disk == NULL) {
        return -1;
    }
    size = qlb_disk_size(disk);
    /* qcow2 counts in sectors of 512 bytes, so a restored disk may have a
     * last one that is filled up. */
    if (size != header->virtual_size &&
        size != (header->virtual_size + 511) / 512 * 512) {
        qlb_fail(err, QLB_E_DAMAGED, "%s: has %" PRIu64 " bytes, the chain %"
                 PRIu64, path, size, header->virtual_size);
    } else {
        ret = compare_open_disk(chain, disk, path, size, options, &blocks,
                                err);
    }
    if (ret == 0 && blocks > 0) {
        ret = qlb_fail(err, QLB_E_DAMAGED, "%s: %" PRIu64 " blocks of 64 KiB "
                       "differ from the chain", path, blocks);
    }
    qlb_disk_close(disk);
    return ret;
}

int compare_check_identity(const struct qlb_chain *chain,
                           const struct qlb_ext *ext, const char *path,
                           struct qlb_error *err)
{
    const struct qlb_uuid *uuid = &qlb_chain_header(chain)->image_uuid;
    char ours[QLB_UUID_TEXT], theirs[QLB_UUID_TEXT];

    if (ext == NULL) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s: livebackup is off, so "
                        "nothing tells whether this is the disk that the "
                        "archives are of", path);
    }
    if (!qlb_uuid_equal(&ext->image_uuid, uuid)) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s: the archives are of "
                        "another disk: image UUID %s, not %s", path,
                        qlb_uuid_format(uuid, theirs),
                        qlb_uuid_format(&ext->image_uuid, ours));
    }
    return 0;
}
