/* Archives for tests.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "archives.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xxhash.h>

#include "blkio.h"
#include "byteorder.h"

#define MUST(condition)                                                       \
    do {                                                                      \
        if (!(condition)) {                                                   \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);   \
            abort();                                                          \
        }                                                                     \
    } while (0)

uint64_t draw(uint64_t *state, uint64_t below)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % below;
}

struct qlb_uuid numbered_uuid(unsigned n)
{
    struct qlb_uuid uuid = {{0}};

    put_be32(uuid.bytes + 12, n);
    return uuid;
}

struct qlb_lbz_header plain_header(uint64_t virtual_size, unsigned number)
{
    return (struct qlb_lbz_header) {
        .digest = QLB_DIGEST_XXH3_128,
        .label = "main",
        .virtual_size = virtual_size,
        .clip = QLB_LBZ_NO_CLIP,
        .time = 1700000000 + number,
        .image_uuid = numbered_uuid(0xffff),
        .uuid = numbered_uuid(number),
    };
}

/* The number, then some structure, so that frames are small. */
void fill_block(uint32_t content, uint8_t *block)
{
    for (uint32_t i = 0; i < QLB_LBZ_BLOCK / 4; i++) {
        put_le32(block + 4 * (size_t)i,
                 i < 1024 ? content : content ^ i / 4096);
    }
}

static uint32_t content_of(const uint8_t *block)
{
    static const uint8_t zero[QLB_LBZ_BLOCK];
    uint8_t expected[QLB_LBZ_BLOCK];

    if (memcmp(block, zero, sizeof(zero)) == 0) {
        return ZERO;
    }
    fill_block(get_le32(block), expected);
    return memcmp(block, expected, sizeof(expected)) == 0 ? get_le32(block)
                                                          : UINT32_MAX;
}

size_t plan_blocks(const struct plan *plan)
{
    return (plan->header.virtual_size + QLB_LBZ_BLOCK - 1) / QLB_LBZ_BLOCK;
}

/* ---- writing ---- */

struct maker {
    const struct plan *plan;
    uint64_t rng;
    struct qlb_lbz_encoder *encoder;
    struct qlb_lbz_writer *writer;
    uint8_t *blocks, *packed;
};

/* Blocks first .. first + n - 1 of a stripe at `base`, those of mask live. */
static void write_frame(struct maker *maker, size_t base, unsigned first,
                        unsigned n, unsigned mask)
{
    size_t digest_size = qlb_digest_size(maker->plan->header.digest);
    struct qlb_lbz_frame frame;
    struct qlb_error err;
    unsigned k = 0;

    for (unsigned i = 0; i < n; i++) {
        bool live = mask >> (first + i) & 1;
        uint32_t content = live ? maker->plan->blocks[base + first + i]
                                : DEAD_CONTENT + i;

        fill_block(content, maker->blocks + (size_t)i * QLB_LBZ_BLOCK);
    }
    MUST(qlb_lbz_encode(maker->encoder, (base + first) * QLB_LBZ_BLOCK, n,
                        maker->blocks, maker->packed, &frame, &err) == 0);
    frame.live = (uint16_t)(mask >> first);
    for (unsigned i = 0; i < n; i++) {
        if (frame.live >> i & 1) {
            memmove(frame.block_digests + k++ * digest_size,
                    frame.block_digests + i * digest_size, digest_size);
        }
    }
    MUST(qlb_lbz_writer_frame(maker->writer, &frame, &err) == 0);
}

/* The first run of DATA blocks. */
static void tidy_frame(struct maker *maker, size_t base, unsigned *data)
{
    unsigned first = (unsigned)__builtin_ctz(*data);
    unsigned n = (unsigned)__builtin_ctz(~(*data >> first));
    unsigned mask = ((1u << n) - 1) << first;

    write_frame(maker, base, first, n, mask);
    *data &= ~mask;
}

/* The first DATA block and any of the others, in a span that may be larger. */
static void messy_frame(struct maker *maker, size_t base, unsigned *data)
{
    unsigned lowest = *data & -*data;
    unsigned mask = lowest |
                    (*data & (unsigned)draw(&maker->rng, 1u << 16));
    unsigned first = (unsigned)draw(&maker->rng,
                                    (unsigned)__builtin_ctz(mask) + 1u);
    unsigned last = 31 - (unsigned)__builtin_clz(mask);
    unsigned end = last + 1 + (unsigned)draw(&maker->rng, 16 - last);

    write_frame(maker, base, first, end - first, mask);
    *data &= ~mask;
}

static void write_stripe(struct maker *maker, size_t base)
{
    size_t total = plan_blocks(maker->plan);
    unsigned data = 0;

    for (unsigned i = 0; i < QLB_LBZ_STRIPE_BLOCKS && base + i < total; i++) {
        data |= (maker->plan->blocks[base + i] >= FIRST_CONTENT) << i;
    }
    while (data != 0) {
        if (maker->plan->seed != 0) {
            messy_frame(maker, base, &data);
        } else {
            tidy_frame(maker, base, &data);
        }
    }
}

static void write_zeroes(struct maker *maker, size_t base)
{
    size_t end = plan_blocks(maker->plan);
    const uint32_t *blocks = maker->plan->blocks;
    struct qlb_error err;
    size_t i = base;

    if (end > base + QLB_LBZ_STRIPE_BLOCKS) {
        end = base + QLB_LBZ_STRIPE_BLOCKS;
    }
    while (i < end) {
        size_t start = i;

        while (i < end && (blocks[i] == ZERO) == (blocks[start] == ZERO)) {
            i++;
        }
        if (blocks[start] == ZERO) {
            MUST(qlb_lbz_writer_zero(maker->writer, start * QLB_LBZ_BLOCK,
                                     i - start, &err) == 0);
        }
    }
}

void write_plan(const struct plan *plan, struct qlb_outfile *out)
{
    struct maker maker = {.plan = plan, .rng = plan->seed};
    struct qlb_lbz_totals totals;
    struct qlb_error err;

    maker.encoder = qlb_lbz_encoder_new(1, plan->header.digest, &err);
    maker.writer = qlb_lbz_writer_new(out, &plan->header, &err);
    maker.blocks = malloc(QLB_LBZ_STRIPE);
    maker.packed = malloc(QLB_LBZ_FRAME_MAX);
    MUST(maker.encoder != NULL && maker.writer != NULL &&
         maker.blocks != NULL && maker.packed != NULL);
    for (size_t i = 0; i < plan_blocks(plan); i += QLB_LBZ_STRIPE_BLOCKS) {
        write_stripe(&maker, i);
        write_zeroes(&maker, i);
    }
    MUST(qlb_lbz_writer_finish(maker.writer, &totals, &err) == 0);
    qlb_lbz_writer_free(maker.writer);
    qlb_lbz_encoder_free(maker.encoder);
    free(maker.blocks);
    free(maker.packed);
}

struct archive make_archive(const struct plan *plan)
{
    int fd = memfd_create("archive", MFD_CLOEXEC);
    struct qlb_error err;
    struct qlb_outfile *out = qlb_outfile_fd(fd, "archive", &err);
    struct archive archive;

    MUST(out != NULL);
    write_plan(plan, out);
    archive.size = qlb_outfile_position(out);
    archive.data = malloc(archive.size);
    MUST(archive.data != NULL);
    MUST(pread(fd, archive.data, archive.size, 0) == (ssize_t)archive.size);
    qlb_outfile_close(out);
    close(fd);
    return archive;
}

void save_archive(const struct archive *archive, const char *path)
{
    FILE *f = fopen(path, "w");

    MUST(f != NULL);
    MUST(fwrite(archive->data, 1, archive->size, f) == archive->size);
    MUST(fclose(f) == 0);
}

void free_archive(struct archive *archive)
{
    free(archive->data);
    archive->data = NULL;
}

/* ---- sealing again ---- */

struct span {
    uint8_t *data;
    size_t size;
};

static bool holds(const struct span *span, uint64_t offset, uint64_t length)
{
    return offset <= span->size && length <= span->size - offset;
}

static void reseal_frame(const struct span *file, uint8_t *entry,
                         enum qlb_digest_type digest)
{
    uint64_t record = get_le64(entry);
    uint32_t size = get_le32(entry + 8);

    if (holds(file, record, 32) &&
        memcmp(file->data + record + 8, "LBZR", 4) == 0) {
        uint8_t *p = file->data + record + 8;

        put_le32(p + 20, (uint32_t)XXH3_64bits(p, 20));
        if (holds(file, record + 32, size)) {
            qlb_digest(digest, file->data + record + 32, size, entry + 24);
        }
    }
}

static void reseal_page(const struct span *file, uint8_t *entry,
                        enum qlb_digest_type digest)
{
    size_t digest_size = qlb_digest_size(digest);
    uint64_t offset = get_le64(entry + 8);
    uint32_t size = get_le32(entry + 16);
    uint8_t *page;

    if (!holds(file, offset, 8) || !holds(file, offset + 8, size) ||
        size < 32 + digest_size ||
        memcmp(file->data + offset + 8, "LBZP", 4) != 0) {
        return;
    }
    page = file->data + offset + 8;
    for (uint64_t i = 0; i < get_le32(page + 4) && i < 4096 &&
         32 + (i + 1) * (24 + digest_size) <= size - digest_size; i++) {
        reseal_frame(file, page + 32 + i * (24 + digest_size), digest);
    }
    qlb_digest(digest, page, size - digest_size, page + size - digest_size);
    memmove(entry + 24, page + size - digest_size, digest_size);
}

void reseal(uint8_t *data, size_t size)
{
    struct span file = {data, size};
    size_t digest_size, header_size, trailer_size, root_at;
    struct qlb_digest_stream *root;
    uint8_t *trailer;

    if (size < 400 || qlb_digest_size(data[8 + 24]) == 0) {
        return;
    }
    digest_size = qlb_digest_size(data[8 + 24]);
    header_size = get_le32(data + 4);
    trailer_size = get_le32(data + size - 8);
    if (header_size <= digest_size || !holds(&file, 8, header_size) ||
        trailer_size < 64 + digest_size + 16 || trailer_size > size) {
        return;
    }
    qlb_digest(data[8 + 24], data + 8, header_size - digest_size,
               data + 8 + header_size - digest_size);
    trailer = data + size - trailer_size;
    root_at = trailer_size - 16 - digest_size;
    for (size_t at = 64; at + 24 + digest_size <= root_at;
         at += 24 + digest_size) {
        reseal_page(&file, trailer + at, data[8 + 24]);
    }
    root = qlb_digest_stream_new(data[8 + 24]);
    MUST(root != NULL);
    qlb_digest_stream_update(root, data + 8, header_size);
    qlb_digest_stream_update(root, trailer, root_at);
    qlb_digest_stream_final(root, trailer + root_at);
    qlb_digest_stream_free(root);
}

/* ---- reading ---- */

/* What a reading works with. The buffers are the largest ones that are needed,
 * and static: thousands of readings would mostly map and unmap memory. */
static uint8_t packed_buffer[QLB_LBZ_FRAME_MAX + 32];
static uint8_t blocks_buffer[QLB_LBZ_STRIPE];
static uint8_t digests_buffer[QLB_LBZ_PAGE_BLOCKS * QLB_DIGEST_MAX];

struct reading {
    struct qlb_lbz_decoder *decoder;
    struct qlb_lbz_page page;
    uint8_t *packed, *blocks;
    uint8_t *digests; /* of the live blocks that passed since the last page */
    size_t n_digests;
    uint32_t *found;
};

static void begin_reading(struct reading *reading, uint32_t *found)
{
    struct qlb_error err;

    reading->decoder = qlb_lbz_decoder_new(&err);
    qlb_lbz_page_init(&reading->page);
    reading->packed = packed_buffer;
    reading->blocks = blocks_buffer;
    reading->digests = digests_buffer;
    reading->n_digests = 0;
    reading->found = found;
    MUST(reading->decoder != NULL);
}

static void end_reading(struct reading *reading)
{
    qlb_lbz_decoder_free(reading->decoder);
    qlb_lbz_page_release(&reading->page);
}

static void note_blocks(struct reading *reading, uint64_t guest_offset,
                        unsigned live)
{
    for (; reading->found != NULL && live != 0; live &= live - 1) {
        unsigned i = (unsigned)__builtin_ctz(live);

        reading->found[guest_offset / QLB_LBZ_BLOCK + i] =
            content_of(reading->blocks + (size_t)i * QLB_LBZ_BLOCK);
    }
}

static void note_runs(struct reading *reading)
{
    const struct qlb_lbz_page *page = &reading->page;

    for (unsigned i = 0; reading->found != NULL && i < page->n_runs; i++) {
        for (unsigned k = 0; k < page->runs[i].count; k++) {
            reading->found[page->number * QLB_LBZ_PAGE_BLOCKS +
                           page->runs[i].first + k] = ZERO;
        }
    }
}

static int read_entry(struct reading *reading,
                      const struct qlb_lbz_reader *reader,
                      const struct qlb_lbz_entry *entry,
                      struct qlb_error *err)
{
    uint64_t page_offset = reading->page.number * QLB_LBZ_PAGE;
    uint64_t guest = page_offset + (uint64_t)entry->first * QLB_LBZ_BLOCK;

    if (qlb_lbz_reader_frame(reader, entry, page_offset, reading->packed,
                             err) < 0 ||
        qlb_lbz_decode_at(reading->decoder, entry->record_offset, guest,
                          reading->packed + 32, entry->size, entry->n_blocks,
                          reading->blocks, err) < 0 ||
        qlb_lbz_check_blocks(qlb_lbz_reader_header(reader)->digest, entry,
                             page_offset, reading->blocks, err) < 0) {
        return -1;
    }
    note_blocks(reading, guest, entry->live);
    return 0;
}

static int read_pages(struct reading *reading, struct qlb_lbz_reader *reader,
                      struct qlb_error *err)
{
    uint64_t number = 0;
    int ret;

    while ((ret = qlb_lbz_reader_find_page(reader, number, &number,
                                           err)) > 0) {
        if (qlb_lbz_reader_load_page(reader, number, &reading->page,
                                     err) < 0 ||
            qlb_lbz_reader_check_layout(reader, &reading->page, err) < 0) {
            return -1;
        }
        for (unsigned i = 0; i < reading->page.n_entries &&
             !qlb_lbz_reader_header(reader)->index; i++) {
            if (read_entry(reading, reader, &reading->page.entries[i],
                           err) < 0) {
                return -1;
            }
        }
        note_runs(reading);
        number++;
    }
    return ret < 0 ? -1 : qlb_lbz_reader_check_layout(reader, NULL, err);
}

int read_by_index(const void *data, size_t size, uint32_t *blocks,
                  struct qlb_error *err)
{
    struct qlb_blkio *io = qlb_blkio_memory(data, size);
    struct qlb_lbz_reader *reader = qlb_lbz_reader_open_io(io, err);
    struct reading reading;
    int ret;

    if (reader == NULL) {
        return -1;
    }
    begin_reading(&reading, blocks);
    ret = read_pages(&reading, reader, err);
    end_reading(&reading);
    qlb_lbz_reader_close(reader);
    return ret;
}

static int pass_frame(struct reading *reading, enum qlb_digest_type digest,
                      const struct qlb_lbz_stream_frame *frame,
                      struct qlb_error *err)
{
    if (qlb_lbz_decode_at(reading->decoder, frame->record_offset,
                          frame->offset, reading->packed, frame->size,
                          frame->n_blocks, reading->blocks, err) < 0) {
        return -1;
    }
    for (unsigned live = frame->live; live != 0; live &= live - 1) {
        MUST(reading->n_digests < QLB_LBZ_PAGE_BLOCKS);
        qlb_digest(digest, reading->blocks +
                   (size_t)__builtin_ctz(live) * QLB_LBZ_BLOCK,
                   QLB_LBZ_BLOCK, reading->digests +
                   reading->n_digests * qlb_digest_size(digest));
        reading->n_digests++;
    }
    note_blocks(reading, frame->offset, frame->live);
    return 0;
}

static int pass_page(struct reading *reading, enum qlb_digest_type digest,
                     struct qlb_error *err)
{
    const uint8_t *computed = reading->digests;
    const struct qlb_lbz_page *page = &reading->page;

    for (unsigned i = 0; i < page->n_entries; i++) {
        if (qlb_lbz_check_digests(digest, &page->entries[i],
                                  page->number * QLB_LBZ_PAGE, computed,
                                  err) < 0) {
            return -1;
        }
        computed += qlb_digest_size(digest) *
                    (size_t)__builtin_popcount(page->entries[i].live);
    }
    reading->n_digests = 0;
    note_runs(reading);
    return 0;
}

static int pass_all(struct reading *reading, struct qlb_lbz_stream *stream,
                    struct qlb_error *err)
{
    enum qlb_digest_type digest = qlb_lbz_stream_header(stream)->digest;
    struct qlb_lbz_stream_frame frame;
    int ret;

    while ((ret = qlb_lbz_stream_next(stream, &frame, reading->packed,
                                      &reading->page, err)) > 0) {
        if (qlb_lbz_stream_header(stream)->index) {
            note_runs(reading);
            continue;
        }
        ret = ret == QLB_LBZ_FRAME ? pass_frame(reading, digest, &frame, err)
                                   : pass_page(reading, digest, err);
        if (ret < 0) {
            break;
        }
    }
    return ret;
}

int read_by_stream(const void *data, size_t size, uint32_t *blocks,
                   struct qlb_error *err)
{
    int fd = memfd_create("archive", MFD_CLOEXEC);
    struct qlb_lbz_stream *stream;
    struct reading reading;
    int ret = -1;

    MUST(fd >= 0);
    MUST(pwrite(fd, data, size, 0) == (ssize_t)size);
    stream = qlb_lbz_stream_open(fd, "archive", NULL, err);
    if (stream != NULL) {
        begin_reading(&reading, blocks);
        ret = pass_all(&reading, stream, err);
        end_reading(&reading);
        qlb_lbz_stream_close(stream);
    }
    close(fd);
    return ret;
}
