/* Restoring a disk from a chain of archives, or from a stream.
 *
 * `next` takes frames in guest order and gives each run of live blocks its
 * place in the output, `work` decompresses, checks and writes them there.
 * Nothing appears under the final name before all has been checked and synced.
 *
 * Direct writes take the content right out of the buffer that it was
 * decompressed to. Where that buffer is filled again at once, its cache lines
 * must be fetched back from whatever processor served the disk, which (in a
 * virtual machine) has taken as long as decompressing. So threads take turns
 * among several buffers.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "restore_chain.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "stream_job.h"

enum {
    BUFFERS = 6, /* of each worker */
    SPARE_WORKERS = 2, /* compute while others wait for the disk */
};

struct restore_job {
    struct stream_job stream; /* first; its chain_job serves chains, too */
    uint64_t hosts[QLB_LBZ_STRIPE_BLOCKS / 2]; /* of each live run */
};

struct restore {
    struct restore_options options;
    enum restore_format format;
    unsigned n_workers;

    struct qlb_chain *chain; /* or: */
    struct qlb_lbz_stream *stream;
    struct chain_walk chain_walk;
    struct stream_walk stream_walk;
    const struct qlb_lbz_header *header;
    uint8_t root[QLB_DIGEST_MAX];

    struct restore_job *jobs;
    unsigned n_jobs;
    struct chain_worker *workers;
    struct qlb_blkio *replaced; /* what --force replaces; holds its locks */
    struct qlb_outfile *out;
    struct qlb_qcow2_writer *writer; /* NULL for raw */

    /* On a block device, what no frame covers is zeroed: */
    uint64_t page_offset;        /* of the page that `covered` speaks of */
    uint8_t covered[QLB_LBZ_PAGE_BLOCKS / 8];

    struct restore_meter *meter;
    uint64_t bytes;
};

/* ---- the meter ---- */

void restore_meter_begin(struct restore_meter *meter,
                         const struct tool_rate *rate,
                         enum tool_progress_mode mode, uint64_t expected)
{
    *meter = (struct restore_meter) { .rate = *rate };
    pthread_mutex_init(&meter->lock, NULL);
    tool_progress_begin(&meter->progress, "restored", mode, expected);
}

void restore_meter_end(struct restore_meter *meter)
{
    tool_progress_end(&meter->progress);
    pthread_mutex_destroy(&meter->lock);
}

/* Where the rate is limited who comes too early waits, with the lock held: so
 * do the others. */
int restore_meter_account(struct restore_meter *meter, uint64_t bytes,
                          struct qlb_error *err)
{
    bool abandoned;

    pthread_mutex_lock(&meter->lock);
    meter->bytes += bytes;
    tool_rate_account(&meter->rate, bytes);
    tool_progress_update(&meter->progress, meter->bytes);
    /* A signal ends the wait, and with it the restore. */
    abandoned = meter->abandoned || tool_stop;
    pthread_mutex_unlock(&meter->lock);
    return abandoned ? qlb_fail(err, QLB_E_RUNTIME, "interrupted") : 0;
}

/* ---- zeroes on a block device ---- */

/* Zeroes what of [offset, offset + length) lies on the disk. */
static int zero_range(struct restore *r, uint64_t offset, uint64_t length,
                      struct qlb_error *err)
{
    uint64_t size = r->header->virtual_size;

    if (offset >= size || length == 0) {
        return 0;
    }
    if (length > size - offset) {
        length = size - offset;
    }
    return qlb_outfile_zero(r->out, offset, length, err);
}

static int zero_gaps_of_page(struct restore *r, struct qlb_error *err)
{
    uint64_t at = 0;

    while (at < QLB_LBZ_PAGE_BLOCKS) {
        uint64_t end = qlb_bits_next_set(r->covered, QLB_LBZ_PAGE_BLOCKS, at);

        if (zero_range(r, r->page_offset + at * QLB_LBZ_BLOCK,
                       (end - at) * QLB_LBZ_BLOCK, err) < 0) {
            return -1;
        }
        at = qlb_bits_next_clear(r->covered, QLB_LBZ_PAGE_BLOCKS, end);
    }
    memset(r->covered, 0, sizeof(r->covered));
    return 0;
}

/* Zeroes all gaps before the page at `offset`, which becomes the present. */
static int move_to_page(struct restore *r, uint64_t offset,
                        struct qlb_error *err)
{
    uint64_t next = r->page_offset + QLB_LBZ_PAGE;

    if (offset == r->page_offset) {
        return 0;
    }
    if (zero_gaps_of_page(r, err) < 0 ||
        zero_range(r, next, offset - next, err) < 0) {
        return -1;
    }
    r->page_offset = offset;
    return 0;
}

static int note_covered(struct restore *r, const struct chain_job *job,
                        struct qlb_error *err)
{
    if (!qlb_outfile_is_block_device(r->out) || r->writer != NULL) {
        return 0;
    }
    if (move_to_page(r, job->page_offset, err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < job->entry.n_blocks; i++) {
        if (job->entry.live >> i & 1) {
            qlb_bit_set(r->covered, job->entry.first + i);
        }
    }
    return 0;
}

/* ---- the pipeline ---- */

static int place_runs(struct restore *r, struct restore_job *job,
                      struct qlb_error *err)
{
    const struct chain_job *frame = &job->stream.job;
    unsigned first = 0, n, i = 0;

    while ((n = chain_job_live_run(frame, &first)) > 0) {
        uint64_t offset = frame->offset + (uint64_t)first * QLB_LBZ_BLOCK;

        if (r->writer == NULL) {
            job->hosts[i] = offset;
        } else if (qlb_qcow2_writer_allocate(r->writer, offset, n,
                                             &job->hosts[i], err) < 0) {
            return -1;
        }
        first += n;
        i++;
    }
    return note_covered(r, frame, err);
}

static int restore_next(void *opaque, void *arg, struct qlb_error *err)
{
    struct restore *r = opaque;
    struct restore_job *job = arg;
    int ret;

    if (r->stream != NULL) {
        ret = stream_walk_next(&r->stream_walk, &job->stream, err);
    } else {
        job->stream.index = false;
        /* A chain that begins with a full has no ZERO runs. */
        ret = chain_walk_next(&r->chain_walk, &job->stream.job, err);
    }
    if (ret > 0 && !job->stream.index && place_runs(r, job, err) < 0) {
        return -1;
    }
    return ret;
}

static int write_run(struct restore *r, const struct restore_job *job,
                     uint64_t host, unsigned first, unsigned n,
                     struct qlb_error *err)
{
    const struct chain_job *frame = &job->stream.job;
    uint64_t offset = frame->offset + (uint64_t)first * QLB_LBZ_BLOCK;
    uint64_t length = (uint64_t)n * QLB_LBZ_BLOCK;

    uint8_t *blocks = frame->blocks + (size_t)first * QLB_LBZ_BLOCK;
    uint64_t inside = r->header->virtual_size - offset;

    /* A raw disk ends at its size; a qcow2 cluster is whole, but must not
     * show what a foreign writer put behind the end when the disk grows. */
    if (length > inside) {
        memset(blocks + inside, 0, length - inside);
        length = r->writer == NULL ? inside : length;
    }
    return qlb_outfile_pwrite(r->out, blocks, length, host, err);
}

static int restore_work(void *opaque, void *arg, unsigned thread,
                        struct qlb_error *err)
{
    struct restore *r = opaque;
    struct restore_job *job = arg;
    struct chain_worker *worker = &r->workers[thread];
    unsigned first = 0, n, i = 0;
    int ret;

    if (job->stream.index) {
        return 0;
    }
    chain_worker_turn(worker);
    if (r->stream != NULL) {
        ret = stream_job_decode(&r->stream_walk, &job->stream, worker, err);
    } else {
        ret = chain_job_decode(r->chain, &job->stream.job, worker, err);
    }
    while (ret == 0 &&
           (n = chain_job_live_run(&job->stream.job, &first)) > 0) {
        ret = write_run(r, job, job->hosts[i++], first, n, err);
        first += n;
    }
    return ret;
}

static int restore_done(void *opaque, void *arg, struct qlb_error *err)
{
    struct restore *r = opaque;
    struct restore_job *job = arg;
    uint64_t length;

    if (r->stream != NULL &&
        stream_walk_check(&r->stream_walk, &job->stream, err) < 0) {
        return -1;
    }
    if (job->stream.index) {
        return 0;
    }
    length = (uint64_t)__builtin_popcount(job->stream.job.entry.live) *
             QLB_LBZ_BLOCK;
    r->bytes += length;
    return restore_meter_account(r->meter, length, err);
}

/* ---- input ---- */

int restore_open_stdin(struct restore *r, const struct qlb_uuid *at,
                       struct qlb_error *err)
{
    static const char name[] = "standard input";

    r->stream = qlb_lbz_stream_open(STDIN_FILENO, name, NULL, err);
    if (r->stream == NULL) {
        return qlb_error_prefix(err, "%s", name);
    }
    r->header = qlb_lbz_stream_header(r->stream);
    if (r->header->index) {
        return qlb_fail(err, QLB_E_USAGE, "%s: is an index, which has digests "
                        "and no content", name);
    }
    if (r->header->incremental) {
        char parent[QLB_UUID_TEXT];

        return qlb_fail(err, QLB_E_UNTRUSTED, "%s: an incremental; restoring "
                        "needs its parent %s too, so name files", name,
                        qlb_uuid_format(&r->header->parent, parent));
    }
    if (at != NULL && !qlb_uuid_equal(at, &r->header->uuid)) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s: not the archive that --at "
                        "names", name);
    }
    return stream_walk_begin(&r->stream_walk, r->stream, name, err);
}

void restore_take_chain(struct restore *r, struct qlb_chain *chain)
{
    const struct qlb_lbz_reader *newest =
        qlb_chain_member(chain, qlb_chain_members(chain) - 1);

    r->chain = chain;
    r->chain_walk.chain = chain;
    r->header = qlb_chain_header(chain);
    memcpy(r->root, qlb_lbz_reader_root(newest),
           qlb_digest_size(r->header->digest));
}

/* ---- output ---- */

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);

    return n >= m && strcmp(text + n - m, end) == 0;
}

static enum restore_format choose_format(const struct restore *r)
{
    if (r->options.format != RESTORE_BY_NAME) {
        return r->options.format;
    }
    if (qlb_outfile_is_block_device(r->out) ||
        ends_with(r->options.output, ".raw") ||
        ends_with(r->options.output, ".img")) {
        return RESTORE_RAW;
    }
    return RESTORE_QCOW2;
}

static int check_device_size(const struct restore *r, struct qlb_error *err)
{
    off_t size = lseek(qlb_outfile_descriptor(r->out), 0, SEEK_END);

    if (size < 0 || (uint64_t)size < r->header->virtual_size) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: has %jd bytes, the disk "
                        "needs %" PRIu64, r->options.output, (intmax_t)size,
                        r->header->virtual_size);
    }
    return 0;
}

static bool is_file(const char *path, const struct stat *st)
{
    struct stat other;

    return stat(path, &other) == 0 && other.st_dev == st->st_dev &&
           other.st_ino == st->st_ino;
}

static bool is_archive(const struct restore *r, const struct stat *st)
{
    const char *path;

    if (r->chain == NULL) {
        return false;
    }
    for (unsigned i = 0; i < qlb_chain_members(r->chain); i++) {
        path = qlb_lbz_reader_name(qlb_chain_member(r->chain, i));
        if (is_file(path, st)) {
            return true;
        }
    }
    for (unsigned i = 0; (path = qlb_chain_unused(r->chain, i)) != NULL; i++) {
        if (is_file(path, st)) {
            return true;
        }
    }
    return false;
}

/* A disk that is replaced must not be that of a running guest, which would go
 * on with a file that has no name; and not an archive that is read. */
static int check_output(struct restore *r, struct qlb_error *err)
{
    struct stat st;
    struct qlb_error ignored;

    if (stat(r->options.output, &st) < 0) {
        return 0;
    }
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) {
        return qlb_fail(err, QLB_E_USAGE, "%s: neither a regular file nor a "
                        "block device", r->options.output);
    }
    if (is_archive(r, &st)) {
        return qlb_fail(err, QLB_E_USAGE, "%s: is one of the archives",
                        r->options.output);
    }
    if (r->options.force) {
        /* What can't be opened for another reason is not locked either. */
        r->replaced = qlb_blkio_open(r->options.output, QLB_BLKIO_WRITE |
                                     QLB_BLKIO_LOCK, &ignored);
        if (r->replaced == NULL && ignored.code == QLB_E_BUSY) {
            *err = ignored;
            return -1;
        }
    }
    return 0;
}

int restore_open_output(struct restore *r, struct qlb_error *err)
{
    if (check_output(r, err) < 0) {
        return -1;
    }
    r->out = qlb_outfile_create(r->options.output,
                                r->options.force ? QLB_OUTFILE_FORCE : 0, err);
    if (r->out == NULL) {
        return -1;
    }
    r->format = choose_format(r);
    if (qlb_outfile_is_block_device(r->out) &&
        check_device_size(r, err) < 0) {
        return -1;
    }
    if (r->format == RESTORE_RAW) {
        return qlb_outfile_truncate(r->out, r->header->virtual_size, err);
    }
    /* qcow2 counts in sectors of 512 bytes. */
    r->writer = qlb_qcow2_writer_new(r->out,
                                     (r->header->virtual_size + 511) / 512 *
                                         512, err);
    return r->writer == NULL ? -1 : 0;
}

/* The extension of the restored image: its one checkpoint is the archive. */
static void describe_checkpoint(const struct restore *r, struct qlb_ext *ext)
{
    struct qlb_checkpoint *checkpoint = &ext->checkpoints[0];

    *ext = (struct qlb_ext) {
        .granularity_bits = 16,
        .generation = 1,
        .image_uuid = r->header->image_uuid,
        .n_checkpoints = 1,
    };
    *checkpoint = (struct qlb_checkpoint) {
        .uuid = r->header->uuid,
        .time = r->header->time,
        .virtual_size = (r->header->virtual_size + 511) / 512 * 512,
        .confirmed = true,
    };
    memcpy(checkpoint->root, r->root, sizeof(checkpoint->root));
    memcpy(checkpoint->label, r->header->label, sizeof(checkpoint->label));
}

static int finish_qcow2(struct restore *r, struct qlb_error *err)
{
    char name[QLB_BITMAP_NAME_SIZE];
    struct qlb_qcow2_writer_bitmap bitmap = {
        .name = name,
        .granularity_bits = 16,
    };
    uint8_t data[QLB_EXT_SIZE];
    struct qlb_ext ext;

    if (r->header->virtual_size == 0) {
        return qlb_qcow2_writer_finish(r->writer, NULL, NULL, err);
    }
    describe_checkpoint(r, &ext);
    qlb_ext_encode(&ext, data);
    qlb_bitmap_name(&r->header->uuid, name);
    return qlb_qcow2_writer_finish(r->writer, &bitmap, data, err);
}

static int finish(struct restore *r, struct qlb_error *err)
{
    uint64_t end = r->header->virtual_size + QLB_LBZ_PAGE;

    if (r->stream != NULL) {
        memcpy(r->root, qlb_lbz_stream_root(r->stream),
               qlb_digest_size(r->header->digest));
    }
    if (r->writer != NULL) {
        return finish_qcow2(r, err);
    }
    return qlb_outfile_is_block_device(r->out)
               ? move_to_page(r, end - end % QLB_LBZ_PAGE, err) : 0;
}

static int prepare_jobs(struct restore *r, struct qlb_error *err)
{
    r->n_workers = r->options.threads + SPARE_WORKERS;
    r->n_jobs = 2 * r->n_workers + 2;
    r->workers = chain_workers_new(r->n_workers, BUFFERS, err);
    if (r->workers == NULL) {
        return -1;
    }
    r->jobs = calloc(r->n_jobs, sizeof(*r->jobs));
    if (r->jobs == NULL) {
        return qlb_fail_errno(err, ENOMEM, "starting the restore");
    }
    for (unsigned i = 0; i < r->n_jobs; i++) {
        if (stream_job_init(&r->jobs[i].stream, r->stream != NULL, err) < 0) {
            return -1;
        }
    }
    return 0;
}

static void release_jobs(struct restore *r)
{
    for (unsigned i = 0; r->jobs != NULL && i < r->n_jobs; i++) {
        stream_job_release(&r->jobs[i].stream);
    }
    free(r->jobs);
    chain_workers_free(r->workers, r->n_workers);
    r->jobs = NULL;
    r->workers = NULL;
}

int restore_run(struct restore *r, struct restore_meter *meter,
                struct qlb_error *err)
{
    static const struct qlb_pipeline_ops ops = {
        .next = restore_next,
        .work = restore_work,
        .done = restore_done,
    };
    int ret = prepare_jobs(r, err);

    r->meter = meter;
    if (ret == 0) {
        ret = qlb_pipeline_run(&ops, r, r->jobs, sizeof(*r->jobs), r->n_jobs,
                               r->n_workers, &tool_stop, err);
    }
    if (ret == 0) {
        ret = finish(r, err);
    }
    release_jobs(r);
    return ret;
}

int restore_commit(struct restore *r, struct qlb_error *err)
{
    return qlb_outfile_commit(r->out, err);
}

/* ---- from the beginning to the end ---- */

struct restore *restore_new(const struct restore_options *options,
                            struct qlb_error *err)
{
    struct restore *r = calloc(1, sizeof(*r));

    if (r == NULL) {
        qlb_fail_errno(err, ENOMEM, "starting the restore");
        return NULL;
    }
    r->options = *options;
    return r;
}

void restore_free(struct restore *r)
{
    if (r == NULL) {
        return;
    }
    release_jobs(r);
    qlb_qcow2_writer_free(r->writer);
    qlb_outfile_close(r->out);
    qlb_blkio_close(r->replaced);
    stream_walk_end(&r->stream_walk);
    chain_walk_end(&r->chain_walk);
    qlb_lbz_stream_close(r->stream);
    qlb_chain_close(r->chain);
    free(r);
}

const struct qlb_lbz_header *restore_header(const struct restore *r)
{
    return r->header;
}

enum restore_format restore_format(const struct restore *r)
{
    return r->format;
}

uint64_t restore_bytes(const struct restore *r)
{
    return r->bytes;
}

enum restore_format restore_parse_format(const char *text)
{
    if (strcmp(text, "qcow2") == 0) {
        return RESTORE_QCOW2;
    }
    if (strcmp(text, "raw") == 0) {
        return RESTORE_RAW;
    }
    tool_usage("--format: '%s' is neither qcow2 nor raw", text);
}

const char *restore_format_name(enum restore_format format)
{
    return format == RESTORE_RAW ? "raw" : "qcow2";
}
