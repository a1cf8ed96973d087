/* The dump: from ranges of a disk to frames of an archive.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef DUMP_H
#define DUMP_H

#include <pthread.h>

#include "tool.h"

/* Which ranges of the disk go into the archive. */
struct dump_ranges {
    /* The first range at or after offset (length 0: none), in bytes, within
     * the disk. Offsets ascend over calls. */
    int (*next)(void *opaque, uint64_t offset, uint64_t *start,
                uint64_t *length, struct qlb_error *err);
    void *opaque;
};

/* What is dumped: a disk, or one of a running backup. */
struct dump_source {
    uint64_t size;  /* bytes */
    uint64_t limit; /* more than can be read in all: qlb_disk_content_limit */
    /* One for each thread. */
    void *(*reader_new)(void *opaque, struct qlb_error *err);
    void (*reader_free)(void *reader); /* NULL is allowed */
    /* As qlb_disk_extent and qlb_disk_read. */
    int (*extent)(void *reader, uint64_t offset, uint64_t length,
                  enum qlb_extent_type *type, uint64_t *run,
                  struct qlb_error *err);
    int (*read)(void *reader, void *buf, uint64_t offset, uint64_t length,
                struct qlb_error *err);
    /* All below `end` is in the archive, and not read again. Ascending. An
     * error ends the dump. May be NULL. */
    int (*passed)(void *opaque, uint64_t end, struct qlb_error *err);
    void *opaque;
};

/* A disk that nobody writes to; it must outlive the source. */
struct dump_source dump_source_disk(const struct qlb_disk *disk);

/* How much has been read, by several dumps at once. */
struct dump_meter {
    pthread_mutex_t lock;
    struct tool_rate rate;
    struct tool_progress progress;
    uint64_t bytes;
};

struct dump_options {
    int level;
    unsigned frame_blocks; /* at most, in a frame; 0: as many as can be */
    unsigned threads;
    enum qlb_digest_type digest;
    struct tool_rate rate;
    enum tool_progress_mode progress;
    uint64_t expected; /* bytes, for the progress; 0 if not known */
    struct dump_meter *meter; /* shared with others, or NULL */
};

/* With the rate, the progress and what is expected of the options. */
void dump_meter_begin(struct dump_meter *meter,
                      const struct dump_options *options);
void dump_meter_end(struct dump_meter *meter);

/* Calls dump_one for 0 to n - 1, several at a time, with options for each, who
 * share the threads and the meter. After one has failed no further one is
 * begun, and its error is the result. */
int dump_several(unsigned n, const struct dump_options *options,
                 int (*dump_one)(void *opaque, unsigned i,
                                 const struct dump_options *options,
                                 struct qlb_error *err),
                 void *opaque, struct qlb_error *err);

/* Reads the ranges from the source and appends them to the writer: as frames
 * and, where incremental, ZERO runs. Ranges are widened to whole blocks. Does
 * not seal the writer. */
int dump_run(const struct dump_source *source,
             const struct dump_ranges *ranges, bool incremental,
             const struct dump_options *options,
             struct qlb_lbz_writer *writer, struct qlb_error *err);

#endif
