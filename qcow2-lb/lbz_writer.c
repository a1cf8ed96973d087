/* Writing an archive.
 *
 * The writer holds one page in the making: frame entries as they will stand
 * on disk, block digests in a slot for each block, and a mask of DATA and of
 * ZERO blocks for each stripe. Closing the page turns the masks into runs and
 * a dense table of digests, so neither needs to arrive in order; frames must,
 * since they are in the file already. The directory grows as it will stand on
 * disk. Nothing is known of threads.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "lbz_writer.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "byteorder.h"
#include "checked.h"
#include "lbz_format.h"

struct qlb_lbz_writer {
    struct qlb_outfile *out;
    struct qlb_lbz_header header;
    size_t digest_size;
    uint64_t base; /* where the archive begins in `out` */
    struct qlb_digest_stream *root_stream; /* NULL once sealed */
    uint8_t root[QLB_DIGEST_MAX];
    bool sealed;

    /* The page in the making. */
    uint64_t number;     /* of the page; LBZ_PAGE_NUMBER_END: none yet */
    bool has_content;    /* a frame or a run since the last page */
    unsigned n_frames;
    unsigned first_live; /* of the last frame */
    uint16_t data[LBZ_PAGE_STRIPES], zero[LBZ_PAGE_STRIPES];
    uint8_t *digests;    /* digest_size for each block of the page */
    uint8_t *page;       /* skippable header, payload up to the entries */
    size_t page_capacity;

    uint8_t *directory;
    size_t directory_size, directory_capacity;
    struct lbz_trailer totals;
};

static int out_of_memory(struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_RUNTIME, "out of memory");
}

static uint64_t position(const struct qlb_lbz_writer *writer)
{
    return qlb_outfile_position(writer->out) - writer->base;
}

/* Grows by doubling; what the buffer holds stays. */
static int ensure(uint8_t **buffer, size_t *capacity, size_t needed,
                  struct qlb_error *err)
{
    size_t grown = *capacity == 0 ? 4096 : *capacity;
    uint8_t *p;

    if (needed <= *capacity) {
        return 0;
    }
    while (grown < needed) {
        grown *= 2;
    }
    p = realloc(*buffer, grown);
    if (p == NULL) {
        return out_of_memory(err);
    }
    *buffer = p;
    *capacity = grown;
    return 0;
}

static int write_header(struct qlb_lbz_writer *writer, struct qlb_error *err)
{
    size_t size = lbz_header_size(&writer->header);
    uint8_t *buffer = malloc(LBZ_SKIPPABLE_SIZE + size);
    int ret;

    if (buffer == NULL) {
        return out_of_memory(err);
    }
    lbz_skippable_to_disk((uint32_t)size, buffer);
    lbz_header_to_disk(&writer->header, buffer + LBZ_SKIPPABLE_SIZE);
    qlb_digest_stream_update(writer->root_stream, buffer + LBZ_SKIPPABLE_SIZE,
                             size);
    ret = qlb_outfile_write(writer->out, buffer, LBZ_SKIPPABLE_SIZE + size,
                            err);
    free(buffer);
    return ret;
}

struct qlb_lbz_writer *qlb_lbz_writer_new(struct qlb_outfile *out,
                                          const struct qlb_lbz_header *header,
                                          struct qlb_error *err)
{
    const char *problem = lbz_header_problem(header);
    struct qlb_lbz_writer *writer;

    if (problem != NULL) {
        qlb_fail(err, QLB_E_USAGE, "no archive can be made: %s", problem);
        return NULL;
    }
    writer = calloc(1, sizeof(*writer));
    if (writer == NULL || lbz_header_copy(header, &writer->header) < 0) {
        free(writer);
        out_of_memory(err);
        return NULL;
    }
    writer->out = out;
    writer->base = qlb_outfile_position(out);
    writer->digest_size = qlb_digest_size(header->digest);
    writer->number = LBZ_PAGE_NUMBER_END;
    writer->digests = malloc(QLB_LBZ_PAGE_BLOCKS * writer->digest_size);
    writer->root_stream = qlb_digest_stream_new(header->digest);
    if (writer->digests == NULL || writer->root_stream == NULL) {
        out_of_memory(err);
    } else if (write_header(writer, err) == 0) {
        return writer;
    }
    qlb_lbz_writer_free(writer);
    return NULL;
}

void qlb_lbz_writer_free(struct qlb_lbz_writer *writer)
{
    if (writer == NULL) {
        return;
    }
    lbz_header_release(&writer->header);
    qlb_digest_stream_free(writer->root_stream);
    free(writer->digests);
    free(writer->page);
    free(writer->directory);
    free(writer);
}

/* ---- pages ---- */

static unsigned block_bit(const uint16_t *masks, unsigned block)
{
    return masks[block / QLB_LBZ_STRIPE_BLOCKS] >>
               block % QLB_LBZ_STRIPE_BLOCKS & 1;
}

/* The first block at or after `block` whose bit has that value. */
static unsigned next_bit(const uint16_t *masks, unsigned block,
                         unsigned value)
{
    unsigned uniform = value ? 0 : 0xffff;

    while (block < QLB_LBZ_PAGE_BLOCKS) {
        if (block % QLB_LBZ_STRIPE_BLOCKS == 0 &&
            masks[block / QLB_LBZ_STRIPE_BLOCKS] == uniform) {
            block += QLB_LBZ_STRIPE_BLOCKS;
        } else if (block_bit(masks, block) == value) {
            break;
        } else {
            block++;
        }
    }
    return block;
}

/* The runs of set bits; n_blocks: how many those are. */
static uint8_t *append_runs(const uint16_t *masks, uint8_t *p,
                            unsigned *n_runs, uint64_t *n_blocks)
{
    unsigned first = next_bit(masks, 0, 1);

    *n_runs = 0;
    *n_blocks = 0;
    while (first < QLB_LBZ_PAGE_BLOCKS) {
        unsigned end = next_bit(masks, first, 0);
        struct qlb_lbz_run run = {
            .first = (uint16_t)first, .count = (uint16_t)(end - first),
        };

        lbz_run_to_disk(&run, p);
        p += LBZ_RUN_SIZE;
        *n_blocks += run.count;
        (*n_runs)++;
        first = next_bit(masks, end, 1);
    }
    return p;
}

static uint8_t *append_digests(struct qlb_lbz_writer *writer, uint8_t *p,
                               unsigned *n_live)
{
    size_t size = writer->digest_size;
    unsigned block = next_bit(writer->data, 0, 1);

    *n_live = 0;
    while (block < QLB_LBZ_PAGE_BLOCKS) {
        unsigned end = next_bit(writer->data, block, 0);

        memcpy(p, writer->digests + block * size, (end - block) * size);
        p += (end - block) * size;
        *n_live += end - block;
        block = next_bit(writer->data, end, 1);
    }
    return p;
}

static int append_directory(struct qlb_lbz_writer *writer,
                            const struct lbz_dir_entry *entry,
                            struct qlb_error *err)
{
    size_t size = LBZ_DIR_DIGEST + writer->digest_size;

    if (writer->totals.n_pages >= LBZ_PAGES_MAX) {
        return qlb_fail(err, QLB_E_RUNTIME, "an archive holds no more than "
                        "%" PRIu64 " index pages", LBZ_PAGES_MAX);
    }
    if (ensure(&writer->directory, &writer->directory_capacity,
               writer->directory_size + size, err) < 0) {
        return -1;
    }
    lbz_dir_entry_to_disk(entry, writer->digest_size,
                          writer->directory + writer->directory_size);
    writer->directory_size += size;
    writer->totals.n_pages++;
    return 0;
}

static int write_page(struct qlb_lbz_writer *writer, struct qlb_error *err)
{
    struct qlb_lbz_page page = {
        .number = writer->number, .n_entries = writer->n_frames,
    };
    struct lbz_dir_entry entry = {
        .number = writer->number, .file_offset = position(writer),
    };
    struct lbz_trailer *totals = &writer->totals;
    size_t size = writer->digest_size;
    uint8_t *payload, *end;
    uint64_t blocks;

    /* Room for the most that can follow the entries. */
    if (ensure(&writer->page, &writer->page_capacity,
               LBZ_SKIPPABLE_SIZE +
                   lbz_page_size(writer->n_frames, 2 * LBZ_PAGE_RUNS_MAX,
                                 QLB_LBZ_PAGE_BLOCKS, size), err) < 0) {
        return -1;
    }
    payload = writer->page + LBZ_SKIPPABLE_SIZE;
    end = payload + LBZ_PAGE_ENTRIES +
          writer->n_frames * (LBZ_ENTRY_DIGEST + size);
    totals->frames += writer->n_frames;
    if (writer->header.index) {
        end = append_runs(writer->data, end, &page.n_entries, &blocks);
    }
    end = append_runs(writer->zero, end, &page.n_runs, &blocks);
    totals->zero_blocks += blocks;
    end = append_digests(writer, end, &page.n_live);
    totals->data_blocks += page.n_live;
    lbz_page_to_disk(&page, payload);
    qlb_digest(writer->header.digest, payload, (size_t)(end - payload), end);
    memcpy(entry.digest, end, size);
    end += size;
    entry.payload_size = (uint32_t)(end - payload);
    lbz_skippable_to_disk(entry.payload_size, writer->page);
    if (append_directory(writer, &entry, err) < 0) {
        return -1;
    }
    return qlb_outfile_write(writer->out, writer->page,
                             (size_t)(end - writer->page), err);
}

static int close_page(struct qlb_lbz_writer *writer, struct qlb_error *err)
{
    if (writer->has_content && write_page(writer, err) < 0) {
        return -1;
    }
    writer->has_content = false;
    writer->n_frames = 0;
    memset(writer->data, 0, sizeof(writer->data));
    memset(writer->zero, 0, sizeof(writer->zero));
    return 0;
}

/* Makes the page of that number the one in the making. */
static int enter_page(struct qlb_lbz_writer *writer, uint64_t number,
                      struct qlb_error *err)
{
    if (writer->sealed) {
        return qlb_fail(err, QLB_E_USAGE, "the archive is sealed");
    }
    if (writer->number == number) {
        return 0;
    }
    if (writer->number != LBZ_PAGE_NUMBER_END && number < writer->number) {
        return qlb_fail(err, QLB_E_USAGE, "page %" PRIu64 " was written "
                        "before page %" PRIu64, writer->number, number);
    }
    if (close_page(writer, err) < 0) {
        return -1;
    }
    writer->number = number;
    return 0;
}

/* ---- frames and zero runs ---- */

static unsigned block_in_page(uint64_t offset)
{
    return (unsigned)(offset % QLB_LBZ_PAGE / QLB_LBZ_BLOCK);
}

static int check_place(const struct qlb_lbz_writer *writer, uint64_t offset,
                       unsigned n_blocks, uint16_t live,
                       struct qlb_error *err)
{
    if (offset % QLB_LBZ_BLOCK != 0 || offset >= LBZ_VIRTUAL_SIZE_MAX ||
        lbz_shape_problem(block_in_page(offset), n_blocks, live) != NULL ||
        offset + (uint64_t)lbz_last_live(0, live) * QLB_LBZ_BLOCK >=
            writer->header.virtual_size) {
        return qlb_fail(err, QLB_E_USAGE, "the frame at guest offset 0x%"
                        PRIx64 " has an impossible shape", offset);
    }
    return 0;
}

static int check_frame(const struct qlb_lbz_writer *writer,
                       const struct qlb_lbz_frame *frame,
                       struct qlb_error *err)
{
    if (writer->header.index) {
        return qlb_fail(err, QLB_E_USAGE, "an index holds no frames");
    }
    if (frame->size < 1 || frame->size > QLB_LBZ_FRAME_MAX) {
        return qlb_fail(err, QLB_E_USAGE, "a frame has an impossible size");
    }
    return check_place(writer, frame->offset, frame->n_blocks, frame->live,
                       err);
}

/* Claims the live blocks and stores their digests. */
static int claim_blocks(struct qlb_lbz_writer *writer, uint64_t offset,
                        uint16_t live, const uint8_t *digest,
                        struct qlb_error *err)
{
    unsigned first = block_in_page(offset);
    unsigned stripe = first / QLB_LBZ_STRIPE_BLOCKS;
    unsigned mask = (unsigned)live << first % QLB_LBZ_STRIPE_BLOCKS;
    size_t size = writer->digest_size;

    if ((writer->n_frames > 0 &&
         lbz_first_live(first, live) <= writer->first_live) ||
        ((writer->data[stripe] | writer->zero[stripe]) & mask)) {
        return qlb_fail(err, QLB_E_USAGE, "the frame at guest offset 0x%"
                        PRIx64 " is out of order", offset);
    }
    writer->data[stripe] |= (uint16_t)mask;
    writer->first_live = lbz_first_live(first, live);
    for (unsigned left = live; left != 0; left &= left - 1) {
        memcpy(writer->digests + lbz_first_live(first, left) * size, digest,
               size);
        digest += size;
    }
    return 0;
}

static int append_entry(struct qlb_lbz_writer *writer, unsigned first,
                        const struct qlb_lbz_frame *frame,
                        struct qlb_error *err)
{
    size_t size = LBZ_ENTRY_DIGEST + writer->digest_size;
    size_t end = LBZ_SKIPPABLE_SIZE + LBZ_PAGE_ENTRIES +
                 writer->n_frames * size;
    struct qlb_lbz_entry entry = {
        .record_offset = position(writer), .size = frame->size,
        .first = (uint16_t)first, .n_blocks = (uint16_t)frame->n_blocks,
        .live = frame->live, .digest = frame->digest,
    };

    if (ensure(&writer->page, &writer->page_capacity, end + size, err) < 0) {
        return -1;
    }
    lbz_entry_to_disk(&entry, writer->digest_size, writer->page + end);
    writer->n_frames++;
    writer->has_content = true;
    writer->totals.compressed += frame->size;
    return 0;
}

int qlb_lbz_writer_frame(struct qlb_lbz_writer *writer,
                         const struct qlb_lbz_frame *frame,
                         struct qlb_error *err)
{
    struct lbz_record record = {
        .offset = frame->offset, .size = frame->size,
        .n_blocks = (uint16_t)frame->n_blocks, .live = frame->live,
    };
    uint8_t buffer[LBZ_RECORD_SPACE];

    if (check_frame(writer, frame, err) < 0 ||
        enter_page(writer, frame->offset / QLB_LBZ_PAGE, err) < 0) {
        return -1;
    }
    if (claim_blocks(writer, frame->offset, frame->live,
                     frame->block_digests, err) < 0 ||
        append_entry(writer, block_in_page(frame->offset), frame, err) < 0) {
        return -1;
    }
    lbz_record_to_disk(&record, buffer);
    if (qlb_outfile_write(writer->out, buffer, sizeof(buffer), err) < 0) {
        return -1;
    }
    return qlb_outfile_write(writer->out, frame->data, frame->size, err);
}

int qlb_lbz_writer_digests(struct qlb_lbz_writer *writer, uint64_t offset,
                           unsigned n_blocks, uint16_t live,
                           const uint8_t *block_digests,
                           struct qlb_error *err)
{
    if (!writer->header.index) {
        return qlb_fail(err, QLB_E_USAGE, "the archive is no index");
    }
    if (check_place(writer, offset, n_blocks, live, err) < 0 ||
        enter_page(writer, offset / QLB_LBZ_PAGE, err) < 0 ||
        claim_blocks(writer, offset, live, block_digests, err) < 0) {
        return -1;
    }
    writer->has_content = true;
    return 0;
}

/* Zero blocks first .. first + count - 1 of the page in the making. */
static int zero_in_page(struct qlb_lbz_writer *writer, unsigned first,
                        unsigned count, struct qlb_error *err)
{
    while (count > 0) {
        unsigned stripe = first / QLB_LBZ_STRIPE_BLOCKS;
        unsigned shift = first % QLB_LBZ_STRIPE_BLOCKS;
        unsigned n = QLB_LBZ_STRIPE_BLOCKS - shift;
        unsigned mask;

        n = n < count ? n : count;
        mask = ((1u << n) - 1) << shift;
        if ((writer->data[stripe] | writer->zero[stripe]) & mask) {
            return qlb_fail(err, QLB_E_USAGE, "zero blocks at guest offset "
                            "0x%" PRIx64 " were written before",
                            writer->number * QLB_LBZ_PAGE +
                                (uint64_t)first * QLB_LBZ_BLOCK);
        }
        writer->zero[stripe] |= (uint16_t)mask;
        writer->has_content = true;
        first += n;
        count -= n;
    }
    return 0;
}

int qlb_lbz_writer_zero(struct qlb_lbz_writer *writer, uint64_t offset,
                        uint64_t blocks, struct qlb_error *err)
{
    uint64_t block = offset / QLB_LBZ_BLOCK;

    if (offset % QLB_LBZ_BLOCK != 0 ||
        !range_within(block, blocks,
                      div_round_up(writer->header.virtual_size,
                                   QLB_LBZ_BLOCK))) {
        return qlb_fail(err, QLB_E_USAGE, "zero blocks at guest offset 0x%"
                        PRIx64 " are not blocks of the disk", offset);
    }
    if (!writer->header.incremental) {
        return 0;
    }
    while (blocks > 0) {
        unsigned first = (unsigned)(block % QLB_LBZ_PAGE_BLOCKS);
        unsigned n = (unsigned)min_u64(blocks, QLB_LBZ_PAGE_BLOCKS - first);

        if (enter_page(writer, block / QLB_LBZ_PAGE_BLOCKS, err) < 0 ||
            zero_in_page(writer, first, n, err) < 0) {
            return -1;
        }
        block += n;
        blocks -= n;
    }
    return 0;
}

/* ---- the end ---- */

int qlb_lbz_writer_seal(struct qlb_lbz_writer *writer, uint8_t *root,
                        struct qlb_error *err)
{
    uint8_t fixed[LBZ_TRAILER_DIRECTORY];

    if (!writer->sealed) {
        if (close_page(writer, err) < 0) {
            return -1;
        }
        lbz_trailer_to_disk(&writer->totals, fixed);
        qlb_digest_stream_update(writer->root_stream, fixed, sizeof(fixed));
        qlb_digest_stream_update(writer->root_stream, writer->directory,
                                 writer->directory_size);
        qlb_digest_stream_final(writer->root_stream, writer->root);
        writer->sealed = true;
    }
    memcpy(root, writer->root, writer->digest_size);
    return 0;
}

static int write_trailer(struct qlb_lbz_writer *writer, struct qlb_error *err)
{
    uint64_t offset = position(writer);
    uint32_t size = (uint32_t)lbz_trailer_size(writer->totals.n_pages,
                                               writer->digest_size);
    uint8_t head[LBZ_SKIPPABLE_SIZE + LBZ_TRAILER_DIRECTORY];
    uint8_t tail[QLB_DIGEST_MAX + LBZ_END_SIZE];

    lbz_skippable_to_disk(size, head);
    lbz_trailer_to_disk(&writer->totals, head + LBZ_SKIPPABLE_SIZE);
    memcpy(tail, writer->root, writer->digest_size);
    lbz_end_to_disk(offset, size, tail + writer->digest_size);
    if (qlb_outfile_write(writer->out, head, sizeof(head), err) < 0 ||
        qlb_outfile_write(writer->out, writer->directory,
                          writer->directory_size, err) < 0) {
        return -1;
    }
    return qlb_outfile_write(writer->out, tail,
                             writer->digest_size + LBZ_END_SIZE, err);
}

int qlb_lbz_writer_finish(struct qlb_lbz_writer *writer,
                          struct qlb_lbz_totals *totals,
                          struct qlb_error *err)
{
    uint8_t root[QLB_DIGEST_MAX];

    if (qlb_lbz_writer_seal(writer, root, err) < 0 ||
        write_trailer(writer, err) < 0) {
        return -1;
    }
    if (totals != NULL) {
        totals->data_blocks = writer->totals.data_blocks;
        totals->zero_blocks = writer->totals.zero_blocks;
        totals->frames = writer->totals.frames;
        totals->compressed = writer->totals.compressed;
        totals->archive_size = position(writer);
    }
    return 0;
}
