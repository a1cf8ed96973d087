/* Reading an archive through its index.
 *
 * Opening reads the directory once, front to back, for the root digest and
 * keeps none of it: later accesses go through a window of some entries, found
 * by the next window for ascending pages and by bisection for others. An
 * entry that is read again is parsed and bounded again; the file may have
 * changed since, and then the page's digest says so or the page is what the
 * entry names.
 *
 * What the root digest does not pin is compared with its one correct value:
 * skippable headers, the last 16 bytes, the records.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "lbz_reader.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "blkio.h"
#include "byteorder.h"
#include "checked.h"
#include "lbz_format.h"

#define WINDOW_ENTRIES 64u
/* Entries that opening reads at once. */
#define SCAN_ENTRIES 1024u

struct qlb_lbz_reader {
    struct qlb_blkio *io;
    struct qlb_lbz_header header;
    size_t digest_size;
    uint64_t header_end;     /* file offset behind the header */
    uint64_t trailer_offset; /* of its skippable header */
    struct lbz_trailer trailer;
    struct qlb_lbz_totals totals;
    uint8_t root[QLB_DIGEST_MAX];

    /* Directory entries window_first .. + window_count - 1. */
    uint64_t window_first;
    unsigned window_count;
    struct lbz_dir_entry window[WINDOW_ENTRIES];

    /* qlb_lbz_reader_check_layout: what was seen so far. */
    uint64_t layout_end;
    struct lbz_trailer counted;
};

static int read_at(const struct qlb_lbz_reader *reader, void *buf, size_t len,
                   uint64_t offset, struct qlb_error *err)
{
    int64_t n = reader->io->ops->pread(reader->io, buf, len, offset, err);

    if (n < 0) {
        lbz_drop_name(err, reader->io->name);
        return -1;
    }
    if ((uint64_t)n < len) {
        return lbz_damaged(err, offset + (uint64_t)n,
                           "the archive is cut off");
    }
    return 0;
}

/* ---- opening ---- */

static int read_header(struct qlb_lbz_reader *reader,
                       struct qlb_digest_stream **root,
                       struct qlb_error *err)
{
    uint8_t start[LBZ_SKIPPABLE_SIZE + LBZ_KIND_SIZE];
    uint8_t payload[LBZ_HEADER_MAX];
    uint32_t size;

    if (reader->io->size == 0) {
        return qlb_fail(err, QLB_E_DAMAGED,
                        "not an lbz archive: the file is empty");
    }
    if (reader->io->size >= sizeof(start) &&
        read_at(reader, start, sizeof(start), 0, err) < 0) {
        return -1;
    }
    if (reader->io->size < sizeof(start) ||
        !lbz_skippable_from_disk(start, &size) ||
        !lbz_kind_is(start + LBZ_SKIPPABLE_SIZE, LBZ_KIND_HEADER)) {
        return qlb_fail(err, QLB_E_DAMAGED, "not an lbz archive");
    }
    if (size < LBZ_HEADER_MIN || size > LBZ_HEADER_MAX) {
        return lbz_damaged(err, 0, "the header's size is %u", size);
    }
    if (read_at(reader, payload, size, LBZ_SKIPPABLE_SIZE, err) < 0 ||
        lbz_header_from_disk(payload, size, &reader->header, err) < 0) {
        return -1;
    }
    reader->digest_size = qlb_digest_size(reader->header.digest);
    reader->header_end = LBZ_SKIPPABLE_SIZE + size;
    *root = qlb_digest_stream_new(reader->header.digest);
    if (*root == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "out of memory");
    }
    qlb_digest_stream_update(*root, payload, size);
    return 0;
}

/* From the last bytes of the file to the trailer's fixed part. */
static int read_trailer(struct qlb_lbz_reader *reader,
                        struct qlb_digest_stream *root, struct qlb_error *err)
{
    uint64_t file_size = reader->io->size;
    uint8_t fixed[LBZ_SKIPPABLE_SIZE + LBZ_TRAILER_DIRECTORY];
    uint8_t end[LBZ_END_SIZE];
    uint32_t size, size_again;
    uint64_t offset;

    if (file_size < reader->header_end + LBZ_END_SIZE) {
        return lbz_damaged(err, file_size, "the archive is cut off");
    }
    if (read_at(reader, end, sizeof(end), file_size - sizeof(end), err) < 0) {
        return -1;
    }
    if (!lbz_end_from_disk(end, &offset, &size)) {
        return lbz_damaged(err, file_size - sizeof(end), "no end mark: the "
                           "archive is cut off, or was never finished");
    }
    if (size < lbz_trailer_size(0, reader->digest_size) ||
        offset < reader->header_end || offset > file_size ||
        file_size - offset != (uint64_t)LBZ_SKIPPABLE_SIZE + size) {
        return lbz_damaged(err, file_size - sizeof(end),
                           "the trailer is not where the end mark says");
    }
    if (read_at(reader, fixed, sizeof(fixed), offset, err) < 0) {
        return -1;
    }
    if (!lbz_skippable_from_disk(fixed, &size_again) || size_again != size) {
        return lbz_damaged(err, offset, "there should be the trailer");
    }
    reader->trailer_offset = offset;
    qlb_digest_stream_update(root, fixed + LBZ_SKIPPABLE_SIZE,
                             LBZ_TRAILER_DIRECTORY);
    return lbz_trailer_from_disk(fixed + LBZ_SKIPPABLE_SIZE, size, offset,
                                 reader->digest_size, &reader->trailer, err);
}

static uint64_t directory_offset(const struct qlb_lbz_reader *reader,
                                 uint64_t i)
{
    return reader->trailer_offset + LBZ_SKIPPABLE_SIZE +
           LBZ_TRAILER_DIRECTORY + i * (LBZ_DIR_DIGEST + reader->digest_size);
}

/* Parses entry i, which follows `before` (NULL: not known). */
static int parse_dir_entry(const struct qlb_lbz_reader *reader,
                           const uint8_t *p, uint64_t i,
                           const struct lbz_dir_entry *before,
                           struct lbz_dir_entry *entry, struct qlb_error *err)
{
    uint64_t at = directory_offset(reader, i);
    uint64_t earliest = reader->header_end;

    if (lbz_dir_entry_from_disk(p, at, &reader->header, entry, err) < 0) {
        return -1;
    }
    if (before != NULL) {
        earliest = before->file_offset + LBZ_SKIPPABLE_SIZE +
                   before->payload_size;
        if (entry->number <= before->number) {
            return lbz_damaged(err, at, "the directory is not in order");
        }
    }
    if (entry->file_offset < earliest ||
        !range_within(entry->file_offset,
                      (uint64_t)LBZ_SKIPPABLE_SIZE + entry->payload_size,
                      reader->trailer_offset)) {
        return lbz_damaged(err, at, "the directory gives page %" PRIu64
                           " the impossible offset %" PRIu64, entry->number,
                           entry->file_offset);
    }
    return 0;
}

static int scan_directory(struct qlb_lbz_reader *reader,
                          struct qlb_digest_stream *root, uint8_t *buffer,
                          struct qlb_error *err)
{
    size_t size = LBZ_DIR_DIGEST + reader->digest_size;
    struct lbz_dir_entry entries[2];
    uint64_t i = 0;

    while (i < reader->trailer.n_pages) {
        uint64_t n = min_u64(SCAN_ENTRIES, reader->trailer.n_pages - i);

        if (read_at(reader, buffer, n * size, directory_offset(reader, i),
                    err) < 0) {
            return -1;
        }
        qlb_digest_stream_update(root, buffer, n * size);
        for (uint64_t k = 0; k < n; k++, i++) {
            if (parse_dir_entry(reader, buffer + k * size, i,
                                i == 0 ? NULL : &entries[(i - 1) % 2],
                                &entries[i % 2], err) < 0) {
                return -1;
            }
        }
    }
    return 0;
}

static int check_root(struct qlb_lbz_reader *reader,
                      struct qlb_digest_stream *root, struct qlb_error *err)
{
    uint8_t *buffer = malloc(SCAN_ENTRIES * LBZ_DIR_ENTRY_MAX);
    uint64_t at = directory_offset(reader, reader->trailer.n_pages);
    uint8_t stored[QLB_DIGEST_MAX];
    int ret;

    if (buffer == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "out of memory");
    }
    ret = scan_directory(reader, root, buffer, err);
    free(buffer);
    if (ret < 0) {
        return -1;
    }
    qlb_digest_stream_final(root, reader->root);
    if (read_at(reader, stored, reader->digest_size, at, err) < 0) {
        return -1;
    }
    if (memcmp(stored, reader->root, reader->digest_size) != 0) {
        return lbz_damaged(err, at, "header and directory do not match the "
                           "root digest");
    }
    return 0;
}

static int open_archive(struct qlb_lbz_reader *reader, struct qlb_error *err)
{
    struct qlb_digest_stream *root = NULL;
    int ret = read_header(reader, &root, err);

    if (ret == 0) {
        ret = read_trailer(reader, root, err);
    }
    if (ret == 0) {
        ret = check_root(reader, root, err);
    }
    qlb_digest_stream_free(root);
    reader->layout_end = reader->header_end;
    reader->totals.data_blocks = reader->trailer.data_blocks;
    reader->totals.zero_blocks = reader->trailer.zero_blocks;
    reader->totals.frames = reader->trailer.frames;
    reader->totals.compressed = reader->trailer.compressed;
    reader->totals.archive_size = reader->io->size;
    return ret;
}

struct qlb_lbz_reader *qlb_lbz_reader_open_io(struct qlb_blkio *io,
                                              struct qlb_error *err)
{
    struct qlb_lbz_reader *reader = calloc(1, sizeof(*reader));

    if (reader == NULL) {
        qlb_blkio_close(io);
        qlb_fail(err, QLB_E_RUNTIME, "out of memory");
        return NULL;
    }
    reader->io = io;
    if (open_archive(reader, err) < 0) {
        qlb_lbz_reader_close(reader);
        return NULL;
    }
    return reader;
}

struct qlb_lbz_reader *qlb_lbz_reader_open(const char *path,
                                           struct qlb_error *err)
{
    struct qlb_blkio *io = qlb_blkio_open(path, 0, err);

    if (io == NULL) {
        lbz_drop_name(err, path);
        return NULL;
    }
    return qlb_lbz_reader_open_io(io, err);
}

void qlb_lbz_reader_close(struct qlb_lbz_reader *reader)
{
    if (reader != NULL) {
        lbz_header_release(&reader->header);
        qlb_blkio_close(reader->io);
        free(reader);
    }
}

const char *qlb_lbz_reader_name(const struct qlb_lbz_reader *reader)
{
    return reader->io->name;
}

const struct qlb_lbz_header *
qlb_lbz_reader_header(const struct qlb_lbz_reader *reader)
{
    return &reader->header;
}

const uint8_t *qlb_lbz_reader_root(const struct qlb_lbz_reader *reader)
{
    return reader->root;
}

const struct qlb_lbz_totals *
qlb_lbz_reader_totals(const struct qlb_lbz_reader *reader)
{
    return &reader->totals;
}

uint64_t qlb_lbz_reader_pages(const struct qlb_lbz_reader *reader)
{
    return reader->trailer.n_pages;
}

/* ---- directory ---- */

static int load_window(struct qlb_lbz_reader *reader, uint64_t first,
                       struct qlb_error *err)
{
    uint8_t buffer[WINDOW_ENTRIES * LBZ_DIR_ENTRY_MAX];
    size_t size = LBZ_DIR_DIGEST + reader->digest_size;
    unsigned n = (unsigned)min_u64(WINDOW_ENTRIES,
                                   reader->trailer.n_pages - first);

    reader->window_count = 0;
    if (read_at(reader, buffer, n * size, directory_offset(reader, first),
                err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < n; i++) {
        if (parse_dir_entry(reader, buffer + i * size, first + i,
                            i == 0 ? NULL : &reader->window[i - 1],
                            &reader->window[i], err) < 0) {
            return -1;
        }
    }
    reader->window_first = first;
    reader->window_count = n;
    return 0;
}

static int read_dir_number(struct qlb_lbz_reader *reader, uint64_t i,
                           uint64_t *number, struct qlb_error *err)
{
    uint8_t buffer[LBZ_DIR_ENTRY_MAX];
    struct lbz_dir_entry entry;

    if (read_at(reader, buffer, LBZ_DIR_DIGEST + reader->digest_size,
                directory_offset(reader, i), err) < 0 ||
        parse_dir_entry(reader, buffer, i, NULL, &entry, err) < 0) {
        return -1;
    }
    *number = entry.number;
    return 0;
}

/* Index of the first entry at or after `number`, n_pages if none. */
static int bisect(struct qlb_lbz_reader *reader, uint64_t number,
                  uint64_t *index, struct qlb_error *err)
{
    uint64_t low = 0, high = reader->trailer.n_pages;

    while (low < high) {
        uint64_t middle = low + (high - low) / 2, found;

        if (read_dir_number(reader, middle, &found, err) < 0) {
            return -1;
        }
        if (found < number) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    *index = low;
    return 0;
}

/* Whether the window decides which entry is the first at or after `number`:
 * the entry before it is in the window too, or there is none. */
static bool window_decides(const struct qlb_lbz_reader *reader,
                           uint64_t number)
{
    unsigned n = reader->window_count;

    return n > 0 && number <= reader->window[n - 1].number &&
           (reader->window_first == 0 || number >= reader->window[0].number);
}

static int seek_window(struct qlb_lbz_reader *reader, uint64_t number,
                       struct qlb_error *err)
{
    uint64_t next = reader->window_first + reader->window_count;
    uint64_t index;

    if (window_decides(reader, number)) {
        return 1;
    }
    /* Ascending accesses: the next window. It begins with the last entry of
     * this one, so that it decides for the gap between them too. */
    if (reader->window_count > 0 &&
        number > reader->window[reader->window_count - 1].number) {
        if (next >= reader->trailer.n_pages) {
            return 0;
        }
        if (load_window(reader, next - 1, err) < 0) {
            return -1;
        }
        if (window_decides(reader, number)) {
            return 1;
        }
    }
    if (bisect(reader, number, &index, err) < 0) {
        return -1;
    }
    if (index == reader->trailer.n_pages) {
        return 0;
    }
    return load_window(reader, index > 0 ? index - 1 : 0, err) < 0 ? -1 : 1;
}

/* 1: *entry is the first at or after `number`; 0: none; -1. */
static int find_entry(struct qlb_lbz_reader *reader, uint64_t number,
                      const struct lbz_dir_entry **entry,
                      struct qlb_error *err)
{
    int ret = seek_window(reader, number, err);

    if (ret <= 0) {
        return ret;
    }
    for (unsigned i = 0; i < reader->window_count; i++) {
        if (reader->window[i].number >= number) {
            *entry = &reader->window[i];
            return 1;
        }
    }
    /* The file is being changed under us. */
    return lbz_damaged(err, directory_offset(reader, reader->window_first),
                       "the directory is not in order");
}

int qlb_lbz_reader_find_page(struct qlb_lbz_reader *reader, uint64_t number,
                             uint64_t *found, struct qlb_error *err)
{
    const struct lbz_dir_entry *entry;
    int ret = find_entry(reader, number, &entry, err);

    if (ret > 0) {
        *found = entry->number;
    }
    return ret;
}

/* ---- pages and frames ---- */

static int page_is_not(const struct lbz_dir_entry *entry, const char *what,
                       struct qlb_error *err)
{
    char range[LBZ_RANGE_TEXT];

    return lbz_damaged(err, entry->file_offset, "index page of %s %s",
                       lbz_range(entry->number << LBZ_PAGE_BITS,
                                 QLB_LBZ_PAGE_BLOCKS, range), what);
}

int qlb_lbz_reader_load_page(struct qlb_lbz_reader *reader, uint64_t number,
                             struct qlb_lbz_page *page, struct qlb_error *err)
{
    const struct lbz_dir_entry *entry;
    uint8_t start[LBZ_SKIPPABLE_SIZE];
    int ret = find_entry(reader, number, &entry, err);
    uint32_t size;

    page->n_entries = page->n_runs = page->n_live = 0;
    if (ret < 0) {
        return -1;
    }
    if (ret == 0 || entry->number != number) {
        return qlb_fail(err, QLB_E_USAGE, "there is no page %" PRIu64,
                        number);
    }
    page->file_offset = entry->file_offset;
    page->number = number;
    if (lbz_page_reserve(page, entry->payload_size, err) < 0 ||
        read_at(reader, start, sizeof(start), entry->file_offset, err) < 0 ||
        read_at(reader, page->payload, entry->payload_size,
                entry->file_offset + LBZ_SKIPPABLE_SIZE, err) < 0) {
        return -1;
    }
    if (!lbz_skippable_from_disk(start, &size) ||
        size != entry->payload_size) {
        return page_is_not(entry, "is not there", err);
    }
    if (memcmp(page->payload + page->payload_size - reader->digest_size,
               entry->digest, reader->digest_size) != 0) {
        return page_is_not(entry, "does not match its digest in the "
                           "directory", err);
    }
    /* Here the directory knows which page it should be; the page itself, where
     * these bytes are damaged, does not. */
    if (!lbz_kind_is(page->payload, LBZ_KIND_PAGE) ||
        get_le64(page->payload + LBZ_PAGE_NUMBER) != number) {
        return page_is_not(entry, "says that it is something else", err);
    }
    return lbz_page_from_disk(page, &reader->header, err);
}

int qlb_lbz_reader_frame(const struct qlb_lbz_reader *reader,
                         const struct qlb_lbz_entry *entry,
                         uint64_t page_offset, void *data,
                         struct qlb_error *err)
{
    uint64_t guest = page_offset + (uint64_t)entry->first * QLB_LBZ_BLOCK;
    struct lbz_record record = {
        .offset = guest, .size = entry->size,
        .n_blocks = entry->n_blocks, .live = entry->record_live,
    };
    uint8_t expected[LBZ_RECORD_SPACE], digest[QLB_DIGEST_MAX];
    const uint8_t *frame = (const uint8_t *)data + LBZ_RECORD_SPACE;
    char range[LBZ_RANGE_TEXT];

    if (reader->header.index) {
        return qlb_fail(err, QLB_E_USAGE, "the archive is an index: it has no "
                        "content");
    }
    if (read_at(reader, data, LBZ_RECORD_SPACE + entry->size,
                entry->record_offset, err) < 0) {
        return -1;
    }
    qlb_digest(reader->header.digest, frame, entry->size, digest);
    if (memcmp(digest, entry->digest, reader->digest_size) != 0) {
        return lbz_damaged(err, entry->record_offset + LBZ_RECORD_SPACE,
                           "compressed data of %s does not match its digest",
                           lbz_range(guest, entry->n_blocks, range));
    }
    lbz_record_to_disk(&record, expected);
    if (memcmp(data, expected, sizeof(expected)) != 0) {
        return lbz_damaged(err, entry->record_offset,
                           "record of %s differs from the index page",
                           lbz_range(guest, entry->n_blocks, range));
    }
    return 0;
}

/* ---- layout ---- */

static int layout_gap(uint64_t end, uint64_t begin, const char *what,
                      struct qlb_error *err)
{
    return lbz_damaged(err, end, "%s begins at %" PRIu64 ", not right behind "
                       "what is before it", what, begin);
}

int qlb_lbz_reader_check_layout(struct qlb_lbz_reader *reader,
                                const struct qlb_lbz_page *page,
                                struct qlb_error *err)
{
    uint64_t end = reader->layout_end;
    struct lbz_trailer counted = reader->counted;

    if (page != NULL) {
        bool has_frames = page->n_entries > 0 && !reader->header.index;
        uint64_t begin = has_frames ? page->entries[0].record_offset
                                    : page->file_offset;

        /* Whatever was before: the next page is checked from here. */
        reader->layout_end = page->file_offset + LBZ_SKIPPABLE_SIZE +
                             page->payload_size;
        lbz_count_page(&reader->counted, page);
        if (begin != end) {
            return layout_gap(end, begin, has_frames ? "a frame"
                                                     : "an index page", err);
        }
        return 0;
    }
    reader->layout_end = reader->header_end;
    memset(&reader->counted, 0, sizeof(reader->counted));
    if (end != reader->trailer_offset) {
        return layout_gap(end, reader->trailer_offset, "the trailer", err);
    }
    return lbz_check_totals(&reader->trailer, &counted,
                            reader->trailer_offset, err);
}
