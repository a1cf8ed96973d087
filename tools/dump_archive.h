/* The archive that a dump makes, of a file or of a running QEMU's disk: what
 * is asked for, its header, its output, and what is said of it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef DUMP_ARCHIVE_H
#define DUMP_ARCHIVE_H

#include "dump.h"

enum dump_mode {
    DUMP_FULL, DUMP_INCREMENTAL, DUMP_SINCE, DUMP_AUTO, DUMP_OVERLAY,
};

/* What the command line asks for. */
struct dump_request {
    enum dump_mode mode;
    struct qlb_uuid since;
    const char *label;
    bool trust_pipe, force, quiet, json;
    struct dump_options dump;
    /* Begins the output of that name, from any thread; NULL: it is a file. */
    struct qlb_outfile *(*create)(void *opaque, const char *name,
                                  struct qlb_error *err);
    void *create_opaque;
};

struct dump_archive {
    const char *path; /* NULL: standard output; else as request->create takes */
    struct qlb_lbz_header header;
    struct qlb_uuid covered[QLB_MAX_CHECKPOINTS];
    struct qlb_outfile *out;
    struct qlb_lbz_writer *writer;

    /* result */
    uint8_t root[QLB_DIGEST_MAX];
    struct qlb_lbz_totals totals;
    bool confirmed;
    double seconds;
};

/* The fields of the header that every archive of this request has. */
void dump_archive_begin(struct dump_archive *archive,
                        const struct dump_request *request,
                        uint64_t virtual_size);

/* The fields that an incremental has besides: `since` is the index of the
 * parent, `until` that of the checkpoint of this dump (or how many there are,
 * where it has none yet). smallest: a size that the disk had in between,
 * besides those of the checkpoints. */
void dump_archive_increment(struct dump_archive *archive,
                            const struct qlb_ext *ext, unsigned since,
                            unsigned until, uint64_t smallest);

/* Opens archive->path, or standard output. */
int dump_archive_open(struct dump_archive *archive,
                      const struct dump_request *request,
                      struct qlb_error *err);
/* Which file it is: false if there is none yet. An archive that replaces the
 * disk it is of would be the end of both: for those who find it is one. */
bool dump_archive_stat(const struct dump_archive *archive, struct stat *st);
int dump_archive_is_disk(const struct dump_archive *archive,
                         struct qlb_error *err);
/* A pipe proves nothing about its other end. */
bool dump_archive_is_safe(const struct dump_archive *archive,
                          const struct dump_request *request);
/* Whether the error is about the archive, and not about the disk. */
bool dump_archive_is_named(const struct dump_archive *archive,
                           const struct qlb_error *err);
void dump_archive_close(struct dump_archive *archive);

/* All of the disk that the archive, the opaque pointer, is of. */
int dump_whole_disk(void *archive, uint64_t offset, uint64_t *start,
                    uint64_t *length, struct qlb_error *err);
/* Where nothing else has changed at or after offset: the block that holds the
 * end of a disk which was cut there since the parent, of which the parent
 * holds more. length 0: there is none. */
void dump_cut_range(uint64_t size, uint64_t parent_size, uint64_t offset,
                    uint64_t *start, uint64_t *length);

/* What to do if an incremental was asked for and can't be had. */
void dump_hint_at_auto(struct qlb_error *err);
/* What --auto has decided. reason: why it is a full one. */
void dump_say_auto(const char *disk, bool incremental, const char *reason);
/* How the checkpoint is confirmed when the archive is safe, and what else must
 * be so then (", and ..."). */
void dump_note_unconfirmed(const char *disk,
                           const struct dump_archive *archive,
                           const char *also);
/* What --json tells of a dump. reason: as above, or "". */
json_t *dump_summary(const char *disk, const struct dump_archive *archive,
                     bool checkpoint, const char *reason);

#endif
