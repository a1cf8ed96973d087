/* Checking an archive to its last byte.
 *
 * Damage is no error of the pipeline: it becomes a failed job, which is
 * reported in its turn, and the rest is still checked.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "archive_check.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "chain_job.h"

struct check_job {
    struct chain_job job;
    bool failed;
    struct qlb_error err;
};

/* The archive at work. */
struct archive {
    struct qlb_lbz_reader *reader;
    const struct qlb_lbz_header *header;
    uint64_t next_page;
    bool page_loaded, lost;
    struct qlb_lbz_page page;
    unsigned entry; /* the next one of the page */
    unsigned damages;
};

struct archive_check {
    unsigned threads;
    enum tool_progress_mode progress_mode;
    struct check_job *jobs;
    unsigned n_jobs;
    struct chain_worker *workers;
    struct archive archive;
    struct tool_progress progress;
    uint64_t bytes;
    void (*report)(void *opaque, const struct qlb_error *err);
    void *opaque;
};

/* Loads the next page: 1; 0 at the end; -1: job->err tells of a bad one. */
static int next_page(struct archive *a, struct qlb_error *err)
{
    uint64_t number;
    int ret = qlb_lbz_reader_find_page(a->reader, a->next_page, &number, err);

    if (ret <= 0) {
        a->next_page = UINT64_MAX;
        a->lost |= ret < 0;
        return ret;
    }
    a->next_page = number + 1;
    if (qlb_lbz_reader_load_page(a->reader, number, &a->page, err) < 0) {
        a->lost = true;
        return -1;
    }
    a->page_loaded = true;
    a->entry = a->header->index ? a->page.n_entries : 0;
    /* Behind a damaged page the layout can't be followed any more. */
    if (!a->lost && qlb_lbz_reader_check_layout(a->reader, &a->page,
                                                err) < 0) {
        a->lost = true;
        return -1;
    }
    return 1;
}

static void take_entry(struct archive *a, struct chain_job *job)
{
    const struct qlb_lbz_entry *entry = &a->page.entries[a->entry++];
    size_t size = qlb_digest_size(a->header->digest);

    job->page_offset = a->page.number * QLB_LBZ_PAGE;
    job->entry = *entry;
    memcpy(job->digest, entry->digest, size);
    memcpy(job->block_digests, entry->block_digests,
           size * (size_t)__builtin_popcount(entry->live));
    job->entry.digest = job->digest;
    job->entry.block_digests = job->block_digests;
}

static void add_damage(struct archive_check *check, const struct qlb_error *err)
{
    check->archive.damages++;
    check->report(check->opaque, err);
}

static int check_next(void *opaque, void *arg, struct qlb_error *err)
{
    struct archive_check *check = opaque;
    struct check_job *job = arg;
    struct archive *a = &check->archive;

    (void)err;
    job->failed = false;
    while (!a->page_loaded || a->entry == a->page.n_entries) {
        int ret;

        if (a->next_page == UINT64_MAX) {
            return 0;
        }
        a->page_loaded = false;
        ret = next_page(a, &job->err);
        if (ret < 0) {
            job->failed = true;
            return 1;
        }
    }
    take_entry(a, &job->job);
    return 1;
}

static int check_work(void *opaque, void *arg, unsigned thread,
                       struct qlb_error *err)
{
    struct archive_check *check = opaque;
    struct check_job *job = arg;
    struct chain_job *j = &job->job;
    const struct chain_worker *worker = &check->workers[thread];
    const struct archive *a = &check->archive;

    (void)err;
    if (job->failed) {
        return 0;
    }
    j->packed = worker->packed;
    j->blocks = worker->blocks;
    if (qlb_lbz_reader_frame(a->reader, &j->entry, j->page_offset, j->packed,
                             &job->err) < 0 ||
        qlb_lbz_decode_at(worker->decoder, j->entry.record_offset,
                          j->page_offset + (uint64_t)j->entry.first *
                              QLB_LBZ_BLOCK,
                          chain_job_compressed(j), j->entry.size,
                          j->entry.n_blocks, j->blocks, &job->err) < 0 ||
        qlb_lbz_check_blocks(a->header->digest, &j->entry, j->page_offset,
                             j->blocks, &job->err) < 0) {
        job->failed = true;
    }
    return 0;
}

static int check_done(void *opaque, void *arg, struct qlb_error *err)
{
    struct archive_check *check = opaque;
    struct check_job *job = arg;

    (void)err;
    if (job->failed) {
        add_damage(check, &job->err);
        return 0;
    }
    check->bytes += (uint64_t)job->job.entry.n_blocks * QLB_LBZ_BLOCK;
    tool_progress_update(&check->progress, check->bytes);
    return 0;
}

static int run_archive(struct archive_check *check, struct qlb_error *err)
{
    static const struct qlb_pipeline_ops ops = {
        .next = check_next,
        .work = check_work,
        .done = check_done,
    };
    struct archive *a = &check->archive;
    const struct qlb_lbz_totals *totals = qlb_lbz_reader_totals(a->reader);
    int ret;

    check->bytes = 0;
    tool_progress_begin(&check->progress, "verified", check->progress_mode,
                        totals->data_blocks * QLB_LBZ_BLOCK);
    ret = qlb_pipeline_run(&ops, check, check->jobs, sizeof(*check->jobs),
                           check->n_jobs, check->threads, &tool_stop, err);
    tool_progress_end(&check->progress);
    if (ret == 0 && !a->lost) {
        ret = qlb_lbz_reader_check_layout(a->reader, NULL, err);
    }
    return ret;
}

unsigned archive_check_run(struct archive_check *check,
                           struct qlb_lbz_reader *reader,
                           void (*report)(void *opaque,
                                          const struct qlb_error *err),
                           void *opaque)
{
    struct archive *a = &check->archive;
    struct qlb_error err;

    *a = (struct archive) {
        .reader = reader,
        .header = qlb_lbz_reader_header(reader),
    };
    check->report = report;
    check->opaque = opaque;
    qlb_lbz_page_init(&a->page);
    if (run_archive(check, &err) < 0) {
        add_damage(check, &err);
    }
    qlb_lbz_page_release(&a->page);
    return a->damages;
}

struct archive_check *archive_check_new(unsigned threads,
                                        enum tool_progress_mode progress,
                                        struct qlb_error *err)
{
    struct archive_check *check = calloc(1, sizeof(*check));

    if (check == NULL) {
        qlb_fail_errno(err, ENOMEM, "starting");
        return NULL;
    }
    check->threads = threads;
    check->progress_mode = progress;
    check->n_jobs = 2 * threads + 2;
    check->workers = chain_workers_new(threads, 1, err);
    check->jobs = calloc(check->n_jobs, sizeof(*check->jobs));
    if (check->jobs == NULL) {
        qlb_fail_errno(err, ENOMEM, "starting");
    }
    if (check->workers == NULL || check->jobs == NULL) {
        archive_check_free(check);
        return NULL;
    }
    return check;
}

void archive_check_free(struct archive_check *check)
{
    if (check != NULL) {
        chain_workers_free(check->workers, check->threads);
        free(check->jobs);
        free(check);
    }
}
