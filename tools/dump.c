/* The dump.
 *
 * A job is a piece of one stripe (1 MiB), or a range of any length that reads
 * as zeroes by metadata alone.  `next` cuts the ranges into jobs, `work` reads
 * and compresses, `done` appends to the archive in guest order.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "dump.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "parallel.h"

#define BLOCK QLB_LBZ_BLOCK

struct dump_job {
    uint64_t offset;   /* guest offset, a multiple of the block size */
    uint64_t n_blocks;
    bool zero;         /* by metadata */
    uint8_t *blocks;   /* QLB_LBZ_STRIPE */
    uint8_t *packed;   /* compressed frames, one after the other */
    unsigned n_frames;
    struct qlb_lbz_frame *frames; /* at most one for every block */
};

struct dump {
    const struct dump_source *source;
    uint64_t size;
    const struct dump_ranges *ranges;
    bool incremental;
    struct dump_options options;
    struct qlb_lbz_writer *writer;

    /* For `next`: [position, end) is what is left of the present range. */
    void *scanner;
    uint64_t position, end;
    uint64_t taken; /* bytes to be read so far */

    /* For `work`, by thread. */
    void **readers;
    struct qlb_lbz_encoder **encoders;

    struct dump_job *jobs;
    unsigned n_jobs;
    struct dump_meter *meter;
};

enum { MAX_JOB_FRAMES = QLB_LBZ_STRIPE_BLOCKS };
/* Each frame is given room for the largest one; they are packed tightly. */
#define PACKED_SIZE (2u * QLB_LBZ_FRAME_MAX)

static uint64_t block_floor(uint64_t offset)
{
    return offset - offset % BLOCK;
}

static uint64_t block_ceiling(uint64_t offset)
{
    return block_floor(offset + BLOCK - 1);
}

/* ---- a disk as the source ---- */

/* The disk is not written through it. */
static void *disk_reader_new(void *opaque, struct qlb_error *err)
{
    return qlb_disk_reader_new(opaque, err);
}

static void disk_reader_free(void *reader)
{
    qlb_disk_reader_free(reader);
}

static int disk_extent(void *reader, uint64_t offset, uint64_t length,
                       enum qlb_extent_type *type, uint64_t *run,
                       struct qlb_error *err)
{
    return qlb_disk_extent(reader, offset, length, type, run, err);
}

static int disk_read(void *reader, void *buf, uint64_t offset,
                     uint64_t length, struct qlb_error *err)
{
    return qlb_disk_read(reader, buf, offset, length, err);
}

struct dump_source dump_source_disk(const struct qlb_disk *disk)
{
    return (struct dump_source) {
        .size = qlb_disk_size(disk),
        .limit = qlb_disk_content_limit(disk),
        .reader_new = disk_reader_new,
        .reader_free = disk_reader_free,
        .extent = disk_extent,
        .read = disk_read,
        .opaque = (void *)disk,
    };
}

/* ---- the jobs ---- */

/* Moves on to the next range, in whole blocks: 1, 0 at the end, -1. */
static int next_range(struct dump *dump, struct qlb_error *err)
{
    uint64_t start, length;

    if (dump->position >= dump->size) {
        return 0;
    }
    if (dump->ranges->next(dump->ranges->opaque, dump->position, &start,
                           &length, err) < 0) {
        return -1;
    }
    if (length == 0) {
        return 0;
    }
    if (block_floor(start) > dump->position) {
        dump->position = block_floor(start);
    }
    dump->end = block_ceiling(start + length);
    return 1;
}

/* How many whole blocks from the position on are zero by metadata. A last
 * block that the disk's end cuts off counts as whole. */
static int zero_blocks(struct dump *dump, uint64_t *n, struct qlb_error *err)
{
    uint64_t at = dump->position;
    uint64_t limit = dump->end < dump->size ? dump->end : dump->size;

    while (at < limit) {
        enum qlb_extent_type type;
        uint64_t run;

        if (dump->source->extent(dump->scanner, at, limit - at, &type, &run,
                                 err) < 0) {
            return -1;
        }
        if (type != QLB_EXTENT_ZERO) {
            break;
        }
        at += run;
    }
    if (at == dump->size) {
        at = block_ceiling(at);
    }
    *n = (at - dump->position) / BLOCK;
    return 0;
}

static int dump_next(void *opaque, void *arg, struct qlb_error *err)
{
    struct dump *dump = opaque;
    struct dump_job *job = arg;
    uint64_t zero, stripe_end;

    for (;;) {
        if (dump->position >= dump->end) {
            int ret = next_range(dump, err);

            if (ret <= 0) {
                return ret;
            }
        }
        if (zero_blocks(dump, &zero, err) < 0) {
            return -1;
        }
        job->offset = dump->position;
        if (zero == 0) {
            break;
        }
        dump->position += zero * BLOCK;
        if (dump->incremental) {
            job->zero = true;
            job->n_blocks = zero;
            return 1;
        }
    }
    stripe_end = job->offset - job->offset % QLB_LBZ_STRIPE + QLB_LBZ_STRIPE;
    dump->position = dump->end < stripe_end ? dump->end : stripe_end;
    job->zero = false;
    job->n_blocks = (dump->position - job->offset) / BLOCK;
    dump->taken += job->n_blocks * BLOCK;
    if (dump->taken > dump->source->limit) {
        return qlb_fail(err, QLB_E_DAMAGED, "the image maps more data than "
                        "its files can hold");
    }
    return 1;
}

static int read_blocks(struct dump *dump, struct dump_job *job,
                       unsigned thread, struct qlb_error *err)
{
    uint64_t length = job->n_blocks * BLOCK;

    if (length > dump->size - job->offset) {
        uint64_t inside = dump->size - job->offset;

        memset(job->blocks + inside, 0, length - inside);
        length = inside;
    }
    return dump->source->read(dump->readers[thread], job->blocks, job->offset,
                              length, err);
}

/* Each run of blocks that are not zero becomes a frame, or several where it is
 * longer than a frame shall be. */
static int dump_work(void *opaque, void *arg, unsigned thread,
                     struct qlb_error *err)
{
    struct dump *dump = opaque;
    struct dump_job *job = arg;
    uint8_t *packed = job->packed;
    unsigned n = (unsigned)job->n_blocks;
    unsigned largest = dump->options.frame_blocks;

    largest = largest == 0 ? QLB_LBZ_STRIPE_BLOCKS : largest;
    job->n_frames = 0;
    if (job->zero) {
        return 0;
    }
    if (read_blocks(dump, job, thread, err) < 0) {
        return -1;
    }
    for (unsigned i = 0, first; i < n;) {
        struct qlb_lbz_frame *frame = &job->frames[job->n_frames];

        for (first = i; i < n && i - first < largest; i++) {
            if (qlb_bits_all_zero(job->blocks + i * BLOCK, BLOCK)) {
                break;
            }
        }
        if (i == first) {
            i++;
            continue;
        }
        if (qlb_lbz_encode(dump->encoders[thread],
                           job->offset + first * BLOCK, i - first,
                           job->blocks + first * BLOCK, packed, frame,
                           err) < 0) {
            return -1;
        }
        packed += frame->size;
        job->n_frames++;
    }
    return 0;
}

/* ---- the meter ---- */

void dump_meter_begin(struct dump_meter *meter,
                      const struct dump_options *options)
{
    *meter = (struct dump_meter) { .rate = options->rate };
    pthread_mutex_init(&meter->lock, NULL);
    tool_progress_begin(&meter->progress, "read", options->progress,
                        options->expected);
}

void dump_meter_end(struct dump_meter *meter)
{
    tool_progress_end(&meter->progress);
    pthread_mutex_destroy(&meter->lock);
}

/* Where the rate is limited who comes too early waits, with the lock held: so
 * do the others. */
static void account(struct dump_meter *meter, uint64_t bytes)
{
    pthread_mutex_lock(&meter->lock);
    meter->bytes += bytes;
    tool_rate_account(&meter->rate, bytes);
    tool_progress_update(&meter->progress, meter->bytes);
    pthread_mutex_unlock(&meter->lock);
}

/* ---- the end of a job ---- */

static int append_job(struct dump *dump, const struct dump_job *job,
                      struct qlb_error *err)
{
    uint64_t at = job->offset;
    uint64_t end = job->offset + job->n_blocks * BLOCK;

    for (unsigned i = 0; i < job->n_frames; i++) {
        const struct qlb_lbz_frame *frame = &job->frames[i];

        if (qlb_lbz_writer_zero(dump->writer, at,
                                (frame->offset - at) / BLOCK, err) < 0 ||
            qlb_lbz_writer_frame(dump->writer, frame, err) < 0) {
            return -1;
        }
        at = frame->offset + (uint64_t)frame->n_blocks * BLOCK;
    }
    return qlb_lbz_writer_zero(dump->writer, at, (end - at) / BLOCK, err);
}

static int dump_done(void *opaque, void *arg, struct qlb_error *err)
{
    struct dump *dump = opaque;
    struct dump_job *job = arg;

    if (append_job(dump, job, err) < 0) {
        return -1;
    }
    if (!job->zero) {
        account(dump->meter, job->n_blocks * BLOCK);
    }
    if (dump->source->passed != NULL) {
        return dump->source->passed(dump->source->opaque,
                                    job->offset + job->n_blocks * BLOCK, err);
    }
    return 0;
}

static int prepare_threads(struct dump *dump, struct qlb_error *err)
{
    unsigned threads = dump->options.threads;

    dump->readers = calloc(threads, sizeof(*dump->readers));
    dump->encoders = calloc(threads, sizeof(*dump->encoders));
    if (dump->readers == NULL || dump->encoders == NULL) {
        return qlb_fail_errno(err, ENOMEM, "starting the dump");
    }
    for (unsigned i = 0; i < threads; i++) {
        dump->readers[i] = dump->source->reader_new(dump->source->opaque,
                                                    err);
        if (dump->readers[i] == NULL) {
            return -1;
        }
        dump->encoders[i] = qlb_lbz_encoder_new(dump->options.level,
                                                dump->options.digest, err);
        if (dump->encoders[i] == NULL) {
            return -1;
        }
    }
    return 0;
}

static int prepare_jobs(struct dump *dump, struct qlb_error *err)
{
    dump->n_jobs = 2 * dump->options.threads + 1;
    dump->jobs = calloc(dump->n_jobs, sizeof(*dump->jobs));
    if (dump->jobs == NULL) {
        return qlb_fail_errno(err, ENOMEM, "starting the dump");
    }
    for (unsigned i = 0; i < dump->n_jobs; i++) {
        struct dump_job *job = &dump->jobs[i];

        /* Aligned for reading past the page cache */
        job->blocks = aligned_alloc(4096, QLB_LBZ_STRIPE);
        job->packed = malloc(PACKED_SIZE);
        job->frames = calloc(MAX_JOB_FRAMES, sizeof(*job->frames));
        if (job->blocks == NULL || job->packed == NULL ||
            job->frames == NULL) {
            return qlb_fail_errno(err, ENOMEM, "starting the dump");
        }
    }
    return 0;
}

static void release(struct dump *dump)
{
    for (unsigned i = 0; i < dump->options.threads; i++) {
        if (dump->readers != NULL) {
            dump->source->reader_free(dump->readers[i]);
        }
        if (dump->encoders != NULL) {
            qlb_lbz_encoder_free(dump->encoders[i]);
        }
    }
    for (unsigned i = 0; dump->jobs != NULL && i < dump->n_jobs; i++) {
        free(dump->jobs[i].blocks);
        free(dump->jobs[i].packed);
        free(dump->jobs[i].frames);
    }
    free(dump->readers);
    free(dump->encoders);
    free(dump->jobs);
    dump->source->reader_free(dump->scanner);
}

int dump_run(const struct dump_source *source,
             const struct dump_ranges *ranges, bool incremental,
             const struct dump_options *options,
             struct qlb_lbz_writer *writer, struct qlb_error *err)
{
    static const struct qlb_pipeline_ops ops = {
        .next = dump_next,
        .work = dump_work,
        .done = dump_done,
    };
    struct dump_meter own;
    struct dump dump = {
        .source = source,
        .size = source->size,
        .ranges = ranges,
        .incremental = incremental,
        .options = *options,
        .writer = writer,
        .meter = options->meter != NULL ? options->meter : &own,
    };
    int ret = -1;

    dump.scanner = source->reader_new(source->opaque, err);
    if (dump.scanner != NULL && prepare_threads(&dump, err) == 0 &&
        prepare_jobs(&dump, err) == 0) {
        if (options->meter == NULL) {
            dump_meter_begin(&own, options);
        }
        ret = qlb_pipeline_run(&ops, &dump, dump.jobs, sizeof(*dump.jobs),
                               dump.n_jobs, options->threads, &tool_stop,
                               err);
        if (options->meter == NULL) {
            dump_meter_end(&own);
        }
    }
    release(&dump);
    return ret;
}

/* ---- several dumps ---- */

struct several {
    int (*dump_one)(void *opaque, unsigned i,
                    const struct dump_options *options,
                    struct qlb_error *err);
    void *opaque;
    struct dump_options options; /* of each */
};

static int dump_nth(void *opaque, unsigned i, struct qlb_error *err)
{
    struct several *several = opaque;

    return several->dump_one(several->opaque, i, &several->options, err);
}

int dump_several(unsigned n, const struct dump_options *options,
                 int (*dump_one)(void *opaque, unsigned i,
                                 const struct dump_options *options,
                                 struct qlb_error *err),
                 void *opaque, struct qlb_error *err)
{
    unsigned at_once = options->threads < n ? options->threads : n;
    struct several several = {
        .dump_one = dump_one,
        .opaque = opaque,
        .options = *options,
    };
    struct dump_meter meter;
    int ret;

    several.options.threads = at_once == 0 ? 1 : options->threads / at_once;
    several.options.meter = &meter;
    dump_meter_begin(&meter, options);
    ret = parallel_run(n, at_once, dump_nth, &several, NULL, err);
    dump_meter_end(&meter);
    return ret;
}
