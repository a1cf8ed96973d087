/* Reading an archive front to back.
 *
 * The digest of a frame's compressed bytes is only told by the page behind
 * it, so the frames of the current page range are kept, without their data,
 * until then. Pages are not kept: a running digest over the directory entries
 * that they ought to have is compared with one over the directory that the
 * trailer has. So memory does not grow with the archive.
 *
 * Every structure begins with a skippable header and at least as many bytes
 * as a record has, so one read tells what comes.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "blkio.h"
#include "lbz_format.h"

#define DIRECTORY_CHUNK 65536u

/* A frame that passed since the last page. */
struct passed_frame {
    struct lbz_record record;
    uint64_t record_offset;
    uint8_t digest[QLB_DIGEST_MAX];
};

struct qlb_lbz_stream {
    int fd;
    char *name;
    struct qlb_outfile *tee;
    struct qlb_lbz_header header;
    size_t digest_size;
    uint64_t position; /* bytes read: the file offset of the next one */
    bool ended;

    struct passed_frame *frames;
    unsigned n_frames, frames_capacity;
    uint16_t data[LBZ_PAGE_STRIPES]; /* their live blocks, for each stripe */

    uint64_t next_page; /* the least number that the next page may have */
    struct lbz_trailer counted;
    struct qlb_digest_stream *root_stream;
    struct qlb_digest_stream *directory; /* that the trailer should have */
    uint8_t root[QLB_DIGEST_MAX];
    struct qlb_lbz_totals totals;
};

/* ---- input ---- */

static int read_some(struct qlb_lbz_stream *stream, void *buf, size_t len,
                     size_t *got, struct qlb_error *err)
{
    int64_t n = qlb_read_full(stream->fd, buf, len, stream->name, err);

    if (n < 0) {
        lbz_drop_name(err, stream->name);
        return -1;
    }
    *got = (size_t)n;
    stream->position += (uint64_t)n;
    if (stream->tee != NULL && n > 0) {
        return qlb_outfile_write(stream->tee, buf, (size_t)n, err);
    }
    return 0;
}

static int read_all(struct qlb_lbz_stream *stream, void *buf, size_t len,
                    struct qlb_error *err)
{
    size_t got;

    if (read_some(stream, buf, len, &got, err) < 0) {
        return -1;
    }
    if (got < len) {
        return lbz_damaged(err, stream->position, "the archive is cut off");
    }
    return 0;
}

static int read_header(struct qlb_lbz_stream *stream, struct qlb_error *err)
{
    uint8_t start[LBZ_SKIPPABLE_SIZE + LBZ_KIND_SIZE];
    uint8_t payload[LBZ_HEADER_MAX];
    uint32_t size;
    size_t got;

    if (read_some(stream, start, sizeof(start), &got, err) < 0) {
        return -1;
    }
    if (got == 0) {
        return qlb_fail(err, QLB_E_DAMAGED,
                        "not an lbz archive: the input is empty");
    }
    if (got < sizeof(start) || !lbz_skippable_from_disk(start, &size) ||
        !lbz_kind_is(start + LBZ_SKIPPABLE_SIZE, LBZ_KIND_HEADER)) {
        return qlb_fail(err, QLB_E_DAMAGED, "not an lbz archive");
    }
    if (size < LBZ_HEADER_MIN || size > LBZ_HEADER_MAX) {
        return lbz_damaged(err, 0, "the header's size is %u", size);
    }
    memcpy(payload, start + LBZ_SKIPPABLE_SIZE, LBZ_KIND_SIZE);
    if (read_all(stream, payload + LBZ_KIND_SIZE, size - LBZ_KIND_SIZE,
                 err) < 0 ||
        lbz_header_from_disk(payload, size, &stream->header, err) < 0) {
        return -1;
    }
    stream->digest_size = qlb_digest_size(stream->header.digest);
    stream->root_stream = qlb_digest_stream_new(stream->header.digest);
    stream->directory = qlb_digest_stream_new(stream->header.digest);
    if (stream->root_stream == NULL || stream->directory == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "out of memory");
    }
    qlb_digest_stream_update(stream->root_stream, payload, size);
    return 0;
}

struct qlb_lbz_stream *qlb_lbz_stream_open(int fd, const char *name,
                                           struct qlb_outfile *tee,
                                           struct qlb_error *err)
{
    struct qlb_lbz_stream *stream = calloc(1, sizeof(*stream));

    if (stream != NULL) {
        stream->name = strdup(name);
    }
    if (stream == NULL || stream->name == NULL) {
        free(stream);
        qlb_fail(err, QLB_E_RUNTIME, "out of memory");
        return NULL;
    }
    stream->fd = fd;
    stream->tee = tee;
    if (read_header(stream, err) < 0) {
        qlb_lbz_stream_close(stream);
        return NULL;
    }
    return stream;
}

void qlb_lbz_stream_close(struct qlb_lbz_stream *stream)
{
    if (stream == NULL) {
        return;
    }
    lbz_header_release(&stream->header);
    qlb_digest_stream_free(stream->root_stream);
    qlb_digest_stream_free(stream->directory);
    free(stream->frames);
    free(stream->name);
    free(stream);
}

const struct qlb_lbz_header *
qlb_lbz_stream_header(const struct qlb_lbz_stream *stream)
{
    return &stream->header;
}

const uint8_t *qlb_lbz_stream_root(const struct qlb_lbz_stream *stream)
{
    return stream->root;
}

const struct qlb_lbz_totals *
qlb_lbz_stream_totals(const struct qlb_lbz_stream *stream)
{
    return &stream->totals;
}

/* ---- frames ---- */

static unsigned record_first_live(const struct lbz_record *record)
{
    return lbz_first_live((unsigned)(record->offset / QLB_LBZ_BLOCK %
                                     QLB_LBZ_PAGE_BLOCKS), record->live);
}

/* The rules among the frames since the last page that keep what a caller holds
 * for them bounded: no block is live twice. The page repeats the check. */
static int claim_blocks(struct qlb_lbz_stream *stream,
                        const struct lbz_record *record, uint64_t at,
                        struct qlb_error *err)
{
    unsigned first = (unsigned)(record->offset / QLB_LBZ_BLOCK %
                                QLB_LBZ_PAGE_BLOCKS);
    uint16_t *data = &stream->data[first / QLB_LBZ_STRIPE_BLOCKS];
    unsigned mask = (unsigned)record->live << first % QLB_LBZ_STRIPE_BLOCKS;

    if (*data & mask) {
        return lbz_damaged(err, at, "live blocks of two frames coincide");
    }
    *data |= (uint16_t)mask;
    return 0;
}

static int check_order(const struct qlb_lbz_stream *stream,
                       const struct lbz_record *record, uint64_t at,
                       struct qlb_error *err)
{
    uint64_t number = record->offset / QLB_LBZ_PAGE;
    const struct lbz_record *before;

    if (stream->n_frames == 0) {
        if (number >= stream->next_page) {
            return 0;
        }
        return lbz_damaged(err, at, "a frame belongs to a page range that "
                           "is complete already");
    }
    before = &stream->frames[stream->n_frames - 1].record;
    if (before->offset / QLB_LBZ_PAGE != number) {
        return lbz_damaged(err, at, "there should be the index page of the "
                           "frames before");
    }
    /* Strictly ascending, so there are at most as many as a page lists. */
    if (record_first_live(record) <= record_first_live(before)) {
        return lbz_damaged(err, at, "frames are not in order");
    }
    return 0;
}

static int ensure_frames(struct qlb_lbz_stream *stream, struct qlb_error *err)
{
    unsigned capacity = stream->frames_capacity;
    struct passed_frame *frames;

    if (stream->n_frames < capacity) {
        return 0;
    }
    capacity = capacity == 0 ? 256 : 2 * capacity;
    frames = realloc(stream->frames, capacity * sizeof(*frames));
    if (frames == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "out of memory");
    }
    stream->frames = frames;
    stream->frames_capacity = capacity;
    return 0;
}

static int take_frame(struct qlb_lbz_stream *stream, const uint8_t *payload,
                      uint64_t at, struct qlb_lbz_stream_frame *frame,
                      void *data, struct qlb_error *err)
{
    struct passed_frame *passed;
    struct lbz_record record;

    if (lbz_record_from_disk(payload, at, &stream->header, &record,
                             err) < 0 ||
        check_order(stream, &record, at, err) < 0 ||
        claim_blocks(stream, &record, at, err) < 0 ||
        ensure_frames(stream, err) < 0 ||
        read_all(stream, data, record.size, err) < 0) {
        return -1;
    }
    passed = &stream->frames[stream->n_frames++];
    passed->record = record;
    passed->record_offset = at;
    qlb_digest(stream->header.digest, data, record.size, passed->digest);
    frame->offset = record.offset;
    frame->n_blocks = record.n_blocks;
    frame->live = record.live;
    frame->size = record.size;
    frame->record_offset = at;
    return QLB_LBZ_FRAME;
}

/* ---- pages ---- */

static int compare_frame(const struct qlb_lbz_stream *stream,
                         const struct passed_frame *passed,
                         const struct qlb_lbz_entry *entry,
                         uint64_t page_offset, struct qlb_error *err)
{
    const struct lbz_record *record = &passed->record;
    char range[LBZ_RANGE_TEXT];

    if (passed->record_offset != entry->record_offset ||
        record->offset !=
            page_offset + (uint64_t)entry->first * QLB_LBZ_BLOCK ||
        record->size != entry->size || record->live != entry->live ||
        record->n_blocks != entry->n_blocks) {
        return lbz_damaged(err, passed->record_offset,
                           "record of %s differs from the index page",
                           lbz_range(record->offset, record->n_blocks,
                                     range));
    }
    if (memcmp(passed->digest, entry->digest, stream->digest_size) != 0) {
        return lbz_damaged(err, passed->record_offset + LBZ_RECORD_SPACE,
                           "compressed data of %s does not match its digest",
                           lbz_range(record->offset, record->n_blocks,
                                     range));
    }
    return 0;
}

static int compare_page(const struct qlb_lbz_stream *stream,
                        const struct qlb_lbz_page *page,
                        struct qlb_error *err)
{
    uint64_t page_offset = page->number << LBZ_PAGE_BITS;

    if (page->number < stream->next_page) {
        return lbz_damaged(err, page->file_offset,
                           "index pages are not in order");
    }
    if (stream->header.index) {
        return 0;
    }
    if (page->n_entries != stream->n_frames) {
        return lbz_damaged(err, page->file_offset, "the index page lists %u "
                           "frames; %u were before it", page->n_entries,
                           stream->n_frames);
    }
    for (unsigned i = 0; i < page->n_entries; i++) {
        if (compare_frame(stream, &stream->frames[i], &page->entries[i],
                          page_offset, err) < 0) {
            return -1;
        }
    }
    return 0;
}

/* What the directory ought to say of the page. */
static void expect_in_directory(struct qlb_lbz_stream *stream,
                                const struct qlb_lbz_page *page)
{
    struct lbz_dir_entry entry = {
        .number = page->number, .file_offset = page->file_offset,
        .payload_size = (uint32_t)page->payload_size,
    };
    uint8_t buffer[LBZ_DIR_ENTRY_MAX];

    memcpy(entry.digest, page->payload + page->payload_size -
                             stream->digest_size, stream->digest_size);
    lbz_dir_entry_to_disk(&entry, stream->digest_size, buffer);
    qlb_digest_stream_update(stream->directory, buffer,
                             LBZ_DIR_DIGEST + stream->digest_size);
}

/* start: the first LBZ_RECORD_SIZE bytes of the payload, read already. */
static int take_page(struct qlb_lbz_stream *stream, const uint8_t *start,
                     uint32_t size, uint64_t at, struct qlb_lbz_page *page,
                     struct qlb_error *err)
{
    if (size < lbz_page_size(0, 0, 0, stream->digest_size) ||
        size > lbz_page_max(stream->digest_size)) {
        return lbz_damaged(err, at, "an index page has the size %u", size);
    }
    if (stream->counted.n_pages == LBZ_PAGES_MAX) {
        return lbz_damaged(err, at, "there are too many index pages");
    }
    page->file_offset = at;
    if (lbz_page_reserve(page, size, err) < 0) {
        return -1;
    }
    memcpy(page->payload, start, LBZ_RECORD_SIZE);
    if (read_all(stream, page->payload + LBZ_RECORD_SIZE,
                 size - LBZ_RECORD_SIZE, err) < 0 ||
        lbz_page_from_disk(page, &stream->header, err) < 0 ||
        compare_page(stream, page, err) < 0) {
        return -1;
    }
    stream->n_frames = 0;
    memset(stream->data, 0, sizeof(stream->data));
    stream->next_page = page->number + 1;
    lbz_count_page(&stream->counted, page);
    expect_in_directory(stream, page);
    return QLB_LBZ_INDEX;
}

/* ---- trailer ---- */

/* Reads the directory; whether it is the one that the pages make. */
static int compare_directory(struct qlb_lbz_stream *stream, uint64_t at,
                             struct qlb_error *err)
{
    uint64_t left = stream->counted.n_pages *
                    (LBZ_DIR_DIGEST + stream->digest_size);
    struct qlb_digest_stream *found;
    uint8_t digests[2][QLB_DIGEST_MAX];
    uint8_t buffer[DIRECTORY_CHUNK];
    int ret = 0;

    found = qlb_digest_stream_new(stream->header.digest);
    if (found == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "out of memory");
    }
    while (left > 0 && ret == 0) {
        size_t n = left < sizeof(buffer) ? (size_t)left : sizeof(buffer);

        ret = read_all(stream, buffer, n, err);
        if (ret == 0) {
            qlb_digest_stream_update(found, buffer, n);
            qlb_digest_stream_update(stream->root_stream, buffer, n);
            left -= n;
        }
    }
    qlb_digest_stream_final(stream->directory, digests[0]);
    qlb_digest_stream_final(found, digests[1]);
    qlb_digest_stream_free(found);
    if (ret == 0 &&
        memcmp(digests[0], digests[1], stream->digest_size) != 0) {
        return lbz_damaged(err, at,
                           "the directory does not list the index pages");
    }
    return ret;
}

static int check_end(struct qlb_lbz_stream *stream, uint64_t at,
                     uint32_t size, struct qlb_error *err)
{
    uint8_t tail[QLB_DIGEST_MAX + LBZ_END_SIZE], extra;
    uint64_t root_at = stream->position;
    uint64_t offset;
    uint32_t size_again;
    size_t got;

    if (read_all(stream, tail, stream->digest_size + LBZ_END_SIZE, err) < 0) {
        return -1;
    }
    qlb_digest_stream_final(stream->root_stream, stream->root);
    if (memcmp(tail, stream->root, stream->digest_size) != 0) {
        return lbz_damaged(err, root_at, "header and directory do not match "
                           "the root digest");
    }
    if (!lbz_end_from_disk(tail + stream->digest_size, &offset,
                           &size_again) || offset != at ||
        size_again != size) {
        return lbz_damaged(err, root_at + stream->digest_size,
                           "the end mark is wrong");
    }
    if (read_some(stream, &extra, 1, &got, err) < 0) {
        return -1;
    }
    if (got != 0) {
        return lbz_damaged(err, stream->position - 1,
                           "there are bytes behind the archive");
    }
    return 0;
}

static int take_trailer(struct qlb_lbz_stream *stream, const uint8_t *start,
                        uint32_t size, uint64_t at, struct qlb_error *err)
{
    uint8_t fixed[LBZ_TRAILER_DIRECTORY];
    struct lbz_trailer trailer;

    if (stream->n_frames > 0) {
        return lbz_damaged(err, at, "there should be the index page of the "
                           "frames before");
    }
    memcpy(fixed, start, LBZ_RECORD_SIZE);
    if (read_all(stream, fixed + LBZ_RECORD_SIZE,
                 sizeof(fixed) - LBZ_RECORD_SIZE, err) < 0 ||
        lbz_trailer_from_disk(fixed, size, at, stream->digest_size, &trailer,
                              err) < 0 ||
        lbz_check_totals(&trailer, &stream->counted, at, err) < 0) {
        return -1;
    }
    qlb_digest_stream_update(stream->root_stream, fixed, sizeof(fixed));
    if (compare_directory(stream, at, err) < 0 ||
        check_end(stream, at, size, err) < 0) {
        return -1;
    }
    stream->totals.data_blocks = trailer.data_blocks;
    stream->totals.zero_blocks = trailer.zero_blocks;
    stream->totals.frames = trailer.frames;
    stream->totals.compressed = trailer.compressed;
    stream->totals.archive_size = stream->position;
    stream->ended = true;
    return QLB_LBZ_END;
}

int qlb_lbz_stream_next(struct qlb_lbz_stream *stream,
                        struct qlb_lbz_stream_frame *frame, void *data,
                        struct qlb_lbz_page *page, struct qlb_error *err)
{
    uint64_t at = stream->position;
    uint8_t buffer[LBZ_RECORD_SPACE];
    const uint8_t *payload = buffer + LBZ_SKIPPABLE_SIZE;
    uint32_t size;

    if (stream->ended) {
        return QLB_LBZ_END;
    }
    if (read_all(stream, buffer, sizeof(buffer), err) < 0) {
        return -1;
    }
    if (lbz_skippable_from_disk(buffer, &size)) {
        if (lbz_kind_is(payload, LBZ_KIND_RECORD) &&
            size == LBZ_RECORD_SIZE && !stream->header.index) {
            return take_frame(stream, payload, at, frame, data, err);
        }
        if (lbz_kind_is(payload, LBZ_KIND_PAGE)) {
            return take_page(stream, payload, size, at, page, err);
        }
        if (lbz_kind_is(payload, LBZ_KIND_TRAILER)) {
            return take_trailer(stream, payload, size, at, err);
        }
    }
    return lbz_damaged(err, at, "there should be a record, an index page or "
                       "the trailer");
}
