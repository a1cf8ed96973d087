/* Reading an archive: through its index, or front to back from a pipe
 * (docs/lbz-format.md). Archives are hostile: every count is checked before
 * memory is taken for it. Damage is QLB_E_DAMAGED and names file offset and,
 * where it has one, guest range.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_LBZ_READER_H
#define QLB_LBZ_READER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "blkio.h"
#include "error.h"
#include "lbz_writer.h"

/* A frame as a page lists it; of an index a stripe, which has no frame: size,
 * record_offset and digest are zero. */
struct qlb_lbz_entry {
    uint64_t record_offset; /* file offset of the record's skippable frame */
    uint32_t size;          /* compressed bytes; they start at
                               record_offset + 32 */
    uint16_t first;         /* first block, relative to the page */
    uint16_t n_blocks;
    uint16_t live;
    uint16_t record_live;         /* as in the file; a chain may leave less
                                     of it in `live` */
    const uint8_t *digest;        /* of the compressed bytes */
    const uint8_t *block_digests; /* of the live blocks */
};

struct qlb_lbz_run {
    uint16_t first, count; /* blocks, relative to the page */
};

/* An index page, checked. Its memory is reused by the next load. */
struct qlb_lbz_page {
    uint64_t number;      /* guest offset / QLB_LBZ_PAGE */
    uint64_t file_offset; /* of its skippable frame */
    unsigned n_entries, n_runs, n_live;
    struct qlb_lbz_entry *entries;
    struct qlb_lbz_run *runs;
    uint8_t *payload;              /* what digests point into */
    size_t payload_size, payload_capacity;
};

void qlb_lbz_page_init(struct qlb_lbz_page *page);
void qlb_lbz_page_release(struct qlb_lbz_page *page);

/* Decompresses and checks; one for each thread. */
struct qlb_lbz_decoder;
struct qlb_lbz_decoder *qlb_lbz_decoder_new(struct qlb_error *err);
void qlb_lbz_decoder_free(struct qlb_lbz_decoder *decoder);

/* Decompresses `size` bytes to exactly n_blocks blocks at `blocks`. */
int qlb_lbz_decode(struct qlb_lbz_decoder *decoder, const void *data,
                   uint32_t size, unsigned n_blocks, void *blocks,
                   struct qlb_error *err);

/* The same for a frame of an archive: what is wrong with it is told with file
 * offset and guest range. record_offset: as in its entry; data: the compressed
 * bytes. */
int qlb_lbz_decode_at(struct qlb_lbz_decoder *decoder, uint64_t record_offset,
                      uint64_t guest_offset, const void *data, uint32_t size,
                      unsigned n_blocks, void *blocks, struct qlb_error *err);

/* Checks the live blocks of a decompressed frame against their digests;
 * names the guest offset of the first that differs. page_offset: guest offset
 * of the page. */
int qlb_lbz_check_blocks(enum qlb_digest_type digest,
                         const struct qlb_lbz_entry *entry,
                         uint64_t page_offset, const void *blocks,
                         struct qlb_error *err);

/* The same with the digests of the live blocks, ascending, as they were
 * computed when the frame passed in a stream. */
int qlb_lbz_check_digests(enum qlb_digest_type digest,
                          const struct qlb_lbz_entry *entry,
                          uint64_t page_offset, const uint8_t *computed,
                          struct qlb_error *err);

/* ---- through the index ---- */

struct qlb_lbz_reader;

/* Opens an archive that can be seeked in; checks header, trailer and root
 * digest. */
struct qlb_lbz_reader *qlb_lbz_reader_open(const char *path,
                                           struct qlb_error *err);
/* The same from something else that can be read at offsets (memory). Takes
 * io over, also where it fails. */
struct qlb_lbz_reader *qlb_lbz_reader_open_io(struct qlb_blkio *io,
                                              struct qlb_error *err);
void qlb_lbz_reader_close(struct qlb_lbz_reader *reader);

const char *qlb_lbz_reader_name(const struct qlb_lbz_reader *reader);
const struct qlb_lbz_header *
qlb_lbz_reader_header(const struct qlb_lbz_reader *reader);
/* Root digest, digest-size bytes. */
const uint8_t *qlb_lbz_reader_root(const struct qlb_lbz_reader *reader);
const struct qlb_lbz_totals *
qlb_lbz_reader_totals(const struct qlb_lbz_reader *reader);
uint64_t qlb_lbz_reader_pages(const struct qlb_lbz_reader *reader);

/* The number of the first page at or after `number`: 1 and *found, or 0 if
 * there is none. Costs nothing for ascending numbers. */
int qlb_lbz_reader_find_page(struct qlb_lbz_reader *reader, uint64_t number,
                             uint64_t *found, struct qlb_error *err);

/* Loads and checks the page that find_page found. Damage to one page leaves
 * the others readable. */
int qlb_lbz_reader_load_page(struct qlb_lbz_reader *reader, uint64_t number,
                             struct qlb_lbz_page *page,
                             struct qlb_error *err);

/* Reads record and compressed bytes of a frame into `data`
 * (QLB_LBZ_FRAME_MAX + 32 bytes); checks the record against the entry, and
 * the digest of the compressed bytes. QLB_E_USAGE where the archive is an
 * index. The compressed bytes begin at data + 32.
 * Thread-safe. page_offset for messages. */
int qlb_lbz_reader_frame(const struct qlb_lbz_reader *reader,
                         const struct qlb_lbz_entry *entry,
                         uint64_t page_offset, void *data,
                         struct qlb_error *err);

/* Whether the file is laid out without gaps: header, frames, pages, trailer,
 * and the trailer's totals are right. Fed by the caller with every page, in
 * order; called with NULL at the end. (That a page's frames are contiguous and
 * right before it is checked when it is loaded.) For lbverify: bytes that no
 * digest covers would be found here. After a page that could not be loaded
 * the next one, and the end, fail too: leave the call out then. */
int qlb_lbz_reader_check_layout(struct qlb_lbz_reader *reader,
                                const struct qlb_lbz_page *page,
                                struct qlb_error *err);

/* ---- front to back ---- */

struct qlb_lbz_stream;

enum qlb_lbz_item {
    QLB_LBZ_END = 0,   /* the trailer has been checked: all was good */
    QLB_LBZ_FRAME = 1, /* a record and its frame, digest not yet known; none
                          in an index */
    QLB_LBZ_INDEX = 2, /* the page of the frames before it, checked against
                          what passed: records, compressed digests; entry i
                          is the i-th frame since the last page (of an
                          index none passed). Block digests are the
                          caller's to compare. */
};

struct qlb_lbz_stream_frame {
    uint64_t offset; /* guest offset */
    unsigned n_blocks;
    uint16_t live;
    uint32_t size;
    uint64_t record_offset; /* file offset, as in the entry to come */
};

/* Reads fd from its present position; reads the header at once. tee: where
 * every byte is also appended (may be NULL). */
struct qlb_lbz_stream *qlb_lbz_stream_open(int fd, const char *name,
                                           struct qlb_outfile *tee,
                                           struct qlb_error *err);
void qlb_lbz_stream_close(struct qlb_lbz_stream *stream);
const struct qlb_lbz_header *
qlb_lbz_stream_header(const struct qlb_lbz_stream *stream);
const uint8_t *qlb_lbz_stream_root(const struct qlb_lbz_stream *stream);
const struct qlb_lbz_totals *
qlb_lbz_stream_totals(const struct qlb_lbz_stream *stream);

/* The next item: a qlb_lbz_item, or -1. For FRAME, `frame` and `data`
 * (QLB_LBZ_FRAME_MAX bytes; the compressed bytes) are filled; for INDEX,
 * `page`. After END the input must be at its end, which is checked. */
int qlb_lbz_stream_next(struct qlb_lbz_stream *stream,
                        struct qlb_lbz_stream_frame *frame, void *data,
                        struct qlb_lbz_page *page, struct qlb_error *err);

#endif
