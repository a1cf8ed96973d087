/* The dump: from ranges of a disk to frames of an archive.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef DUMP_H
#define DUMP_H

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

struct dump_options {
    int level;
    unsigned threads;
    enum qlb_digest_type digest;
    struct tool_rate rate;
    enum tool_progress_mode progress;
    uint64_t expected; /* bytes, for the progress; 0 if not known */
};

/* The fields of the header that an incremental has besides: `since` is the
 * index of the parent, `until` that of the checkpoint of this dump (or how many
 * there are, where it has none yet). covered is the caller's, with room for
 * QLB_MAX_CHECKPOINTS; label and virtual_size are set. smallest: a size that
 * the disk had in between, besides those of the checkpoints. */
void dump_describe_increment(struct qlb_lbz_header *header,
                             const struct qlb_ext *ext, unsigned since,
                             unsigned until, uint64_t smallest);

/* Where nothing else has changed at or after offset: the block that holds the
 * end of a disk which was cut there since the parent, of which the parent holds
 * more. length 0: there is none. */
void dump_cut_range(uint64_t size, uint64_t parent_size, uint64_t offset,
                    uint64_t *start, uint64_t *length);

/* What --json tells of a dump. */
struct dump_result {
    const char *disk;
    const char *archive; /* NULL: standard output */
    const char *reason;  /* "": none */
    const struct qlb_lbz_header *header;
    bool checkpoint, confirmed;
    const struct qlb_lbz_totals *totals;
    const uint8_t *root;
    double seconds;
};

json_t *dump_summary(const struct dump_result *result);

/* Reads the ranges from the source and appends them to the writer: as frames
 * and, where incremental, ZERO runs. Ranges are widened to whole blocks. Does
 * not seal the writer. */
int dump_run(const struct dump_source *source,
             const struct dump_ranges *ranges, bool incremental,
             const struct dump_options *options,
             struct qlb_lbz_writer *writer, struct qlb_error *err);

#endif
