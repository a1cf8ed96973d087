/* Archives: round trips, and every kind of damage.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zstd.h>

#include "archives.h"
#include "blkio.h"
#include "byteorder.h"

#define BLOCK ((uint64_t)QLB_LBZ_BLOCK)
#define PAGE_BLOCKS ((size_t)QLB_LBZ_PAGE_BLOCKS)

/* ---- round trips ---- */

static void assert_reads_as(const struct archive *archive,
                            const uint32_t *blocks, size_t n)
{
    uint32_t *found = calloc(n, sizeof(*found));
    struct qlb_error err;

    if (read_by_index(archive->data, archive->size, found, &err) < 0) {
        fail_msg("by index: %s", err.message);
    }
    assert_memory_equal(found, blocks, n * sizeof(*found));
    memset(found, 0, n * sizeof(*found));
    if (read_by_stream(archive->data, archive->size, found, &err) < 0) {
        fail_msg("by stream: %s", err.message);
    }
    assert_memory_equal(found, blocks, n * sizeof(*found));
    free(found);
}

static void check_round_trip(const struct plan *plan)
{
    struct archive archive = make_archive(plan);
    size_t n = plan_blocks(plan);
    uint32_t *expected = calloc(n + 1, sizeof(*expected));

    for (size_t i = 0; i < n; i++) {
        expected[i] = plan->blocks[i];
        if (!plan->header.incremental && expected[i] == ZERO) {
            expected[i] = ABSENT;
        }
    }
    assert_reads_as(&archive, expected, n);
    free(expected);
    free_archive(&archive);
}

static struct qlb_lbz_header incremental_header(uint64_t virtual_size)
{
    struct qlb_lbz_header header = plain_header(virtual_size, 2);

    header.incremental = true;
    header.parent = numbered_uuid(1);
    return header;
}

static void random_maps_come_back(void **state)
{
    uint64_t rng = 1;

    for (unsigned round = 0; round < 40; round++) {
        size_t n = 1 + draw(&rng, round % 4 == 0 ? 3 * PAGE_BLOCKS : 600);
        uint32_t *blocks = calloc(n, sizeof(*blocks));
        struct plan plan = {
            .header = round & 1 ? incremental_header(n * BLOCK)
                                : plain_header(n * BLOCK, 1),
            .blocks = blocks,
            .seed = round & 2 ? round : 0,
        };

        plan.header.digest = round % 5 == 0 ? QLB_DIGEST_SHA256
                                            : QLB_DIGEST_XXH3_128;
        plan.header.virtual_size -= draw(&rng, 2) * draw(&rng, BLOCK);
        for (unsigned run = 0; run < 12; run++) {
            size_t first = draw(&rng, n);
            size_t count = 1 + draw(&rng, 24);
            uint32_t what = (uint32_t)draw(&rng, 4);

            for (size_t i = first; i < n && i < first + count; i++) {
                blocks[i] = what < FIRST_CONTENT
                                ? what
                                : FIRST_CONTENT + (uint32_t)draw(&rng, 1000);
            }
        }
        check_round_trip(&plan);
        free(blocks);
    }
}

static void empty_archives_come_back(void **state)
{
    uint32_t blocks[3] = {ABSENT, ABSENT, ABSENT};
    struct plan full = {.header = plain_header(0, 1), .blocks = blocks};
    struct plan incremental = {
        .header = incremental_header(3 * BLOCK), .blocks = blocks,
    };

    check_round_trip(&full);
    check_round_trip(&incremental);
}

static void zero_runs_cross_pages(void **state)
{
    size_t n = 4 * PAGE_BLOCKS;
    int fd = memfd_create("archive", MFD_CLOEXEC);
    struct qlb_lbz_header header = incremental_header(n * BLOCK);
    uint32_t *blocks = calloc(n, sizeof(*blocks));
    struct qlb_error err;
    struct qlb_outfile *out = qlb_outfile_fd(fd, "archive", &err);
    struct qlb_lbz_writer *writer = qlb_lbz_writer_new(out, &header, &err);
    struct qlb_lbz_totals totals;
    struct archive archive;

    assert_non_null(writer);
    assert_int_equal(qlb_lbz_writer_zero(writer, 5 * BLOCK, n - 6, &err), 0);
    assert_int_equal(qlb_lbz_writer_finish(writer, &totals, &err), 0);
    assert_int_equal(totals.zero_blocks, n - 6);
    for (size_t i = 5; i < n - 1; i++) {
        blocks[i] = ZERO;
    }
    archive.size = totals.archive_size;
    archive.data = malloc(archive.size);
    assert_int_equal(pread(fd, archive.data, archive.size, 0), archive.size);
    assert_reads_as(&archive, blocks, n);
    free_archive(&archive);
    free(blocks);
    qlb_lbz_writer_free(writer);
    qlb_outfile_close(out);
    close(fd);
}

static void headers_come_back(void **state)
{
    struct qlb_uuid covered[QLB_LBZ_COVERED_MAX];
    uint32_t blocks[4] = {7, ABSENT, ZERO, 7};
    struct plan plan = {
        .header = incremental_header(4 * BLOCK), .blocks = blocks,
    };
    struct qlb_lbz_header *header = &plan.header;
    const struct qlb_lbz_header *found;
    struct qlb_lbz_reader *reader;
    struct archive archive;
    struct qlb_error err;

    for (unsigned i = 0; i < QLB_LBZ_COVERED_MAX; i++) {
        covered[i] = numbered_uuid(100 + i);
    }
    header->n_covered = QLB_LBZ_COVERED_MAX;
    header->covered = covered;
    header->clip = 4 * BLOCK - 1;
    header->set = numbered_uuid(99);
    strcpy(header->label, "Weekly_off-site.number");
    archive = make_archive(&plan);
    reader = qlb_lbz_reader_open_io(
        qlb_blkio_memory(archive.data, archive.size), &err);
    assert_non_null(reader);
    found = qlb_lbz_reader_header(reader);
    assert_string_equal(found->label, header->label);
    assert_int_equal(found->digest, header->digest);
    assert_true(found->incremental);
    assert_int_equal(found->virtual_size, header->virtual_size);
    assert_int_equal(found->clip, header->clip);
    assert_int_equal(found->time, header->time);
    assert_memory_equal(&found->image_uuid, &header->image_uuid, 16);
    assert_memory_equal(&found->uuid, &header->uuid, 16);
    assert_memory_equal(&found->parent, &header->parent, 16);
    assert_memory_equal(&found->set, &header->set, 16);
    assert_int_equal(found->n_covered, QLB_LBZ_COVERED_MAX);
    assert_memory_equal(found->covered, covered, sizeof(covered));
    qlb_lbz_reader_close(reader);
    free_archive(&archive);
}

/* Pages far apart and many, so that the directory has several windows. */
static void pages_are_found_in_any_order(void **state)
{
    uint64_t size = UINT64_C(1) << 50, rng = 3;
    struct qlb_lbz_header header = incremental_header(size);
    int fd = memfd_create("archive", MFD_CLOEXEC);
    struct qlb_error err;
    struct qlb_outfile *out = qlb_outfile_fd(fd, "archive", &err);
    struct qlb_lbz_writer *writer = qlb_lbz_writer_new(out, &header, &err);
    struct qlb_lbz_reader *reader;
    struct qlb_lbz_page page;
    char path[64];
    uint64_t found;

    for (uint64_t i = 0; i < 1000; i++) {
        assert_int_equal(qlb_lbz_writer_zero(writer, (7 * i + 3) *
                                             QLB_LBZ_PAGE, 1, &err), 0);
    }
    assert_int_equal(qlb_lbz_writer_finish(writer, NULL, &err), 0);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    reader = qlb_lbz_reader_open(path, &err);
    assert_non_null(reader);
    assert_int_equal(qlb_lbz_reader_pages(reader), 1000);
    qlb_lbz_page_init(&page);
    for (unsigned round = 0; round < 3000; round++) {
        uint64_t number = round < 1000 ? 7 * round : draw(&rng, 7100);
        uint64_t expected = number <= 3 ? 3 : (number + 3) / 7 * 7 + 3;
        int ret = qlb_lbz_reader_find_page(reader, number, &found, &err);

        if (number > 6996) {
            assert_int_equal(ret, 0);
            continue;
        }
        assert_int_equal(ret, 1);
        assert_int_equal(found, expected);
        assert_int_equal(qlb_lbz_reader_load_page(reader, found, &page,
                                                  &err), 0);
        assert_int_equal(page.number, expected);
    }
    qlb_lbz_page_release(&page);
    qlb_lbz_reader_close(reader);
    qlb_lbz_writer_free(writer);
    qlb_outfile_close(out);
    close(fd);
}

static void a_second_archive_may_follow_in_the_output(void **state)
{
    uint32_t blocks[2] = {5, 6};
    struct plan plan = {.header = plain_header(2 * BLOCK, 1),
                        .blocks = blocks};
    int fd = memfd_create("archive", MFD_CLOEXEC);
    struct qlb_error err;
    struct qlb_outfile *out = qlb_outfile_fd(fd, "archive", &err);
    uint64_t half;
    uint8_t *data;

    write_plan(&plan, out);
    half = qlb_outfile_position(out);
    write_plan(&plan, out);
    assert_int_equal(qlb_outfile_position(out), 2 * half);
    data = malloc(2 * half);
    assert_int_equal(pread(fd, data, 2 * half, 0), 2 * half);
    assert_memory_equal(data, data + half, half);
    free(data);
    qlb_outfile_close(out);
    close(fd);
}

static void the_stream_passes_every_byte_to_its_tee(void **state)
{
    uint32_t blocks[] = {5, 6, ABSENT, ZERO, 9};
    struct plan plan = {.header = incremental_header(5 * BLOCK),
                        .blocks = blocks};
    struct archive archive = make_archive(&plan);
    int in = memfd_create("in", MFD_CLOEXEC);
    int copy = memfd_create("copy", MFD_CLOEXEC);
    uint8_t *data = malloc(QLB_LBZ_FRAME_MAX);
    struct qlb_lbz_stream_frame frame;
    struct qlb_lbz_stream *stream;
    struct qlb_lbz_page page;
    struct qlb_outfile *tee;
    struct qlb_error err;
    int items = 0;

    assert_int_equal(pwrite(in, archive.data, archive.size, 0), archive.size);
    tee = qlb_outfile_fd(copy, "copy", &err);
    stream = qlb_lbz_stream_open(in, "in", tee, &err);
    assert_non_null(stream);
    qlb_lbz_page_init(&page);
    while (qlb_lbz_stream_next(stream, &frame, data, &page, &err) > 0) {
        items++;
    }
    assert_int_equal(items, 3);
    assert_int_equal(qlb_lbz_stream_totals(stream)->archive_size,
                     archive.size);
    assert_int_equal(qlb_lbz_stream_totals(stream)->data_blocks, 3);
    assert_int_equal(qlb_lbz_stream_totals(stream)->zero_blocks, 1);
    assert_int_equal(qlb_outfile_position(tee), archive.size);
    assert_int_equal(pread(copy, data, archive.size, 0), archive.size);
    assert_memory_equal(data, archive.data, archive.size);
    qlb_lbz_page_release(&page);
    qlb_lbz_stream_close(stream);
    qlb_outfile_close(tee);
    close(in);
    close(copy);
    free(data);
    free_archive(&archive);
}

static void the_writer_refuses_what_is_out_of_order(void **state)
{
    struct qlb_lbz_header header = incremental_header(2 * QLB_LBZ_PAGE);
    int fd = memfd_create("archive", MFD_CLOEXEC);
    struct qlb_error err;
    struct qlb_outfile *out = qlb_outfile_fd(fd, "archive", &err);
    struct qlb_lbz_writer *writer = qlb_lbz_writer_new(out, &header, &err);
    struct qlb_lbz_frame frame = {
        .offset = 4 * BLOCK, .n_blocks = 2, .live = 3, .data = "x", .size = 1,
    };

    assert_int_equal(qlb_lbz_writer_frame(writer, &frame, &err), 0);
    assert_int_equal(qlb_lbz_writer_frame(writer, &frame, &err), -1);
    assert_int_equal(err.code, QLB_E_USAGE);
    assert_int_equal(qlb_lbz_writer_zero(writer, 3 * BLOCK, 2, &err), -1);
    assert_int_equal(err.code, QLB_E_USAGE);
    assert_int_equal(qlb_lbz_writer_zero(writer, QLB_LBZ_PAGE, 1, &err), 0);
    frame.offset = 40 * BLOCK;
    assert_int_equal(qlb_lbz_writer_frame(writer, &frame, &err), -1);
    assert_string_equal(err.message, "page 1 was written before page 0");
    assert_int_equal(qlb_lbz_writer_zero(writer, 2 * QLB_LBZ_PAGE - BLOCK, 2,
                                         &err), -1);
    frame.offset = 4096 * BLOCK + 15 * BLOCK;
    assert_int_equal(qlb_lbz_writer_frame(writer, &frame, &err), -1);
    assert_string_equal(err.message, "the frame at guest offset 0x100f0000 "
                        "has an impossible shape");
    qlb_lbz_writer_free(writer);
    header.clip = header.virtual_size;
    assert_null(qlb_lbz_writer_new(out, &header, &err));
    assert_int_equal(err.code, QLB_E_USAGE);
    assert_string_equal(err.message, "no archive can be made: the clip is not "
                        "less than the virtual size");
    qlb_outfile_close(out);
    close(fd);
}

/* ---- damage ---- */

/* Small, with every structure: two pages, frames with dead blocks that
 * interleave, zero runs. Blocks 0, 1, 2, 3 and 40 are DATA, 8 to 10 and the
 * first two of the second page are ZERO, its third is DATA. */
static struct archive small_archive(enum qlb_digest_type digest)
{
    static uint32_t blocks[PAGE_BLOCKS + 4];
    struct plan plan = {
        .header = incremental_header((PAGE_BLOCKS + 4) * BLOCK - 100),
        .blocks = blocks, .seed = 5,
    };
    struct qlb_uuid covered = numbered_uuid(77);

    for (uint32_t i = 0; i < 4; i++) {
        blocks[i] = 11 + i;
    }
    blocks[40] = 20;
    blocks[8] = blocks[9] = blocks[10] = ZERO;
    blocks[PAGE_BLOCKS] = blocks[PAGE_BLOCKS + 1] = ZERO;
    blocks[PAGE_BLOCKS + 2] = 30;
    plan.header.covered = &covered;
    plan.header.n_covered = 1;
    plan.header.digest = digest;
    return make_archive(&plan);
}

static void assert_found_by_both(const uint8_t *data, size_t size,
                                 const char *what, size_t at)
{
    struct qlb_error err;

    if (read_by_index(data, size, NULL, &err) == 0) {
        fail_msg("%s at %zu: not found by index", what, at);
    }
    if (err.code != QLB_E_DAMAGED) {
        fail_msg("%s at %zu: by index: %d, %s", what, at, err.code,
                 err.message);
    }
    if (read_by_stream(data, size, NULL, &err) == 0) {
        fail_msg("%s at %zu: not found by stream", what, at);
    }
    if (err.code != QLB_E_DAMAGED) {
        fail_msg("%s at %zu: by stream: %d, %s", what, at, err.code,
                 err.message);
    }
}

static void every_flipped_byte_is_found(void **state)
{
    enum qlb_digest_type digests[] = {QLB_DIGEST_XXH3_128, QLB_DIGEST_SHA256};

    for (unsigned k = 0; k < 2; k++) {
        struct archive archive = small_archive(digests[k]);

        for (size_t i = 0; i < archive.size; i++) {
            archive.data[i] ^= (uint8_t)(1u << i % 8);
            assert_found_by_both(archive.data, archive.size, "a bit", i);
            archive.data[i] ^= (uint8_t)(1u << i % 8);
            archive.data[i] ^= 0xff;
            assert_found_by_both(archive.data, archive.size, "a byte", i);
            archive.data[i] ^= 0xff;
        }
        free_archive(&archive);
    }
}

static void every_cut_is_found(void **state)
{
    struct archive archive = small_archive(QLB_DIGEST_XXH3_128);

    for (size_t i = 0; i < archive.size; i++) {
        assert_found_by_both(archive.data, i, "a cut", i);
    }
    free_archive(&archive);
}

static void appended_bytes_are_found(void **state)
{
    struct archive archive = small_archive(QLB_DIGEST_XXH3_128);

    archive.data = realloc(archive.data, 2 * archive.size);
    archive.data[archive.size] = 0;
    assert_found_by_both(archive.data, archive.size + 1, "a byte more", 0);
    memcpy(archive.data + archive.size, archive.data, archive.size);
    assert_int_equal(read_by_stream(archive.data, 2 * archive.size, NULL,
                                    &(struct qlb_error) {0}), -1);
    free_archive(&archive);
}

/* Where structures stand in the small archive. */
struct places {
    size_t header, page[2], record[2], trailer, directory, end;
};

static struct places find_places(const struct archive *archive)
{
    struct places places;

    places.header = 8;
    places.end = archive->size - 16;
    places.trailer = get_le64(archive->data + places.end) + 8;
    places.directory = places.trailer + 64;
    for (unsigned i = 0; i < 2; i++) {
        const uint8_t *entry = archive->data + places.directory + 40 * i;

        places.page[i] = get_le64(entry + 8) + 8;
        places.record[i] = get_le64(archive->data + places.page[i] + 32) + 8;
    }
    return places;
}

enum place { HEADER, PAGE, RECORD, TRAILER, DIRECTORY, END };

struct damage {
    enum place place;
    unsigned offset, width;
    uint64_t value; /* put there; XOR: flipped */
    const char *message; /* of the reader through the index */
    const char *stream;  /* NULL: the same */
    enum qlb_code code;  /* 0: QLB_E_DAMAGED */
};

static size_t place_of(const struct places *places, enum place place)
{
    switch (place) {
    case HEADER:
        return places->header;
    case PAGE:
        return places->page[0];
    case RECORD:
        return places->record[0];
    case TRAILER:
        return places->trailer;
    case DIRECTORY:
        return places->directory;
    default:
        return places->end;
    }
}

static void put_value(uint8_t *p, unsigned width, uint64_t value)
{
    for (unsigned i = 0; i < width; i++) {
        p[i] = (uint8_t)(value >> 8 * i);
    }
}

/* Numbers in the messages: @H, @P, @R, @T, @D, @E become file offsets. */
static void expand(const char *text, const struct places *places, char *out,
                   size_t size)
{
    size_t used = 0;

    for (; *text != '\0' && used + 24 < size; text++) {
        if (*text != '@') {
            out[used++] = *text;
            continue;
        }
        text++;
        used += (size_t)snprintf(
            out + used, size - used, "%zu",
            *text == 'P' ? places->page[0] - 8
            : *text == 'Q' ? places->page[1] - 8
            : *text == 'R' ? places->record[0] - 8
            : *text == 'F' ? places->record[0] + 24
            : *text == 'T' ? places->trailer - 8
            : *text == 'D' ? places->directory
            : *text == 'O' ? places->end - 16 : places->end);
    }
    out[used] = '\0';
}

static void check_damage(const struct damage *damage, size_t i, bool sealed)
{
    struct archive archive = small_archive(QLB_DIGEST_XXH3_128);
    struct places places = find_places(&archive);
    enum qlb_code code = damage->code == 0 ? QLB_E_DAMAGED : damage->code;
    char expected[1024];
    struct qlb_error err;

    put_value(archive.data + place_of(&places, damage->place) +
              damage->offset, damage->width, damage->value);
    if (sealed) {
        reseal(archive.data, archive.size);
    }
    memset(&err, 0, sizeof(err));
    expand(damage->message, &places, expected, sizeof(expected));
    read_by_index(archive.data, archive.size, NULL, &err);
    if (strcmp(err.message, expected) != 0 || err.code != code) {
        fail_msg("case %zu by index: %d \"%s\"\nnot %d \"%s\"", i, err.code,
                 err.message, code, expected);
    }
    memset(&err, 0, sizeof(err));
    expand(damage->stream == NULL ? damage->message : damage->stream, &places,
           expected, sizeof(expected));
    read_by_stream(archive.data, archive.size, NULL, &err);
    if (strcmp(err.message, expected) != 0 || err.code != code) {
        fail_msg("case %zu by stream: %d \"%s\"\nnot %d \"%s\"", i, err.code,
                 err.message, code, expected);
    }
    free_archive(&archive);
}

#define PAGE_0 "damaged at offset @P: index page of guest range " \
               "0x0-0xfffffff: "

static void damage_is_named(void **state)
{
    static const struct damage table[] = {
        {HEADER, 0, 1, 'X', "not an lbz archive"},
        {HEADER, 40, 1, 0, "damaged at offset 0: the header does not match "
         "its digest"},
        {RECORD, 0, 1, 'X', "damaged at offset @R: record of guest range "
         "0x0-0xfffff differs from the index page",
         "damaged at offset @R: there should be a record, an index page or "
         "the trailer"},
        {RECORD, 20, 4, 0, "damaged at offset @R: record of guest range "
         "0x0-0xfffff differs from the index page",
         "damaged at offset @R: a frame's record does not match its "
         "checksum"},
        {RECORD, 24 + 30, 1, 0xff, "damaged at offset @F: compressed data of "
         "guest range 0x0-0xfffff does not match its digest",
         "damaged at offset @F: compressed data of guest range 0x0-0xfffff: "
         "damaged frame: Data corruption detected"},
        {PAGE, 50, 1, 1, PAGE_0 "it does not match its digest"},
        {TRAILER, 0, 1, 'X', "damaged at offset @T: there should be the "
         "trailer", "damaged at offset @T: there should be a record, an "
         "index page or the trailer"},
        {TRAILER, 24, 1, 0, "damaged at offset @O: header and directory do "
         "not match the root digest", "damaged at offset @T: the trailer "
         "counts 0 zero blocks; there are 5"},
        {DIRECTORY, 30, 2, 0, "damaged at offset @O: header and directory do "
         "not match the root digest", "damaged at offset @T: the directory "
         "does not list the index pages"},
        {END, 12, 1, 'X', "damaged at offset @E: no end mark: the archive is "
         "cut off, or was never finished",
         "damaged at offset @E: the end mark is wrong"},
        {END, 0, 1, 0xff, "damaged at offset @E: the trailer is not where the "
         "end mark says", "damaged at offset @E: the end mark is wrong"},
    };

    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        check_damage(&table[i], i, false);
    }
}

static void every_rule_of_the_header_is_checked(void **state)
{
#define IN_HEADER "damaged at offset 0: in the header: "
    static const struct damage table[] = {
        {HEADER, 4, 2, 2, "unsupported archive format version 2", NULL,
         QLB_E_RUNTIME},
        {HEADER, 8, 8, UINT64_C(0x28) << 32, "unsupported incompatible "
         "feature: bit 35", NULL, QLB_E_RUNTIME},
        {HEADER, 6, 2, 1, "damaged at offset 0: reserved bytes of the header "
         "are set"},
        {HEADER, 25, 1, 2, "damaged at offset 0: the header has the unknown "
         "kind 2"},
        {HEADER, 26, 1, 12, "damaged at offset 0: the header has blocks of "
         "2^12 bytes"},
        {HEADER, 27, 1, 23, "damaged at offset 0: the header's chain label "
         "has not the length that it says"},
        {HEADER, 27, 1, 5, "damaged at offset 0: the header's chain label "
         "has not the length that it says"},
        {HEADER, 27, 1, 3, "damaged at offset 0: the header's chain label "
         "has not the length that it says"},
        {HEADER, 128, 1, '/', IN_HEADER "the chain label is not 1 to 22 "
         "letters, digits, '.', '_' or '-'"},
        {HEADER, 28, 4, 0, "damaged at offset 0: the header's size 192 does "
         "not fit 0 covered checkpoints"},
        {HEADER, 28, 4, UINT32_MAX, "damaged at offset 0: the header's size "
         "192 does not fit 4294967295 covered checkpoints"},
        {HEADER, 32, 8, (UINT64_C(1) << 56) + 1, IN_HEADER "the virtual size "
         "is above 2^56"},
        {HEADER, 40, 8, UINT64_MAX - 1, IN_HEADER "the clip is not less than "
         "the virtual size"},
        {HEADER, 56, 8, 1, "damaged at offset 0: reserved bytes of the header "
         "are set"},
        {HEADER, 92, 4, 0, IN_HEADER "the backup UUID is zero"},
        {HEADER, 108, 4, 0, IN_HEADER "an incremental without a parent"},
        {HEADER, 25, 1, 0, IN_HEADER "a full archive with a parent"},
        {HEADER, 157, 1, 1, "damaged at offset 0: reserved bytes of the "
         "header are set"},
        {HEADER, 108, 4, 0x02000000, IN_HEADER "the archive is its own "
         "parent"},
        {HEADER, 172, 4, 0, IN_HEADER "a covered checkpoint is zero"},
        {HEADER, 172, 4, 0x02000000, IN_HEADER "the archive or its parent is "
         "among the covered checkpoints"},
    };

    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        check_damage(&table[i], i, true);
    }
}

static void every_rule_of_the_page_is_checked(void **state)
{
    static const struct damage table[] = {
        {PAGE, 4, 4, UINT32_MAX, PAGE_0 "its size does not fit its counts"},
        {PAGE, 4, 4, 0, PAGE_0 "its size does not fit its counts"},
        {PAGE, 8, 8, UINT64_MAX, "damaged at offset @P: index page of guest "
         "range 0x0-0xfffffff says that it is something else", "damaged at offset @P: index page of an "
         "impossible guest range: it lies behind the end of the disk"},
        {PAGE, 8, 8, 1, "damaged at offset @P: index page of guest range "
         "0x0-0xfffffff says that it is something else", "damaged at offset @P: index page of guest range "
         "0x10000000-0x1fffffff: a frame reaches behind the end of the disk"},
        {PAGE, 16, 4, 2049, PAGE_0 "its size does not fit its counts"},
        {PAGE, 20, 4, 4097, PAGE_0 "its size does not fit its counts"},
        {PAGE, 24, 8, 1, PAGE_0 "reserved bytes are set"},
        {PAGE, 32, 8, 0, PAGE_0 "a frame is not right behind the one before "
         "it"},
        {PAGE, 40, 4, 0, PAGE_0 "a frame has an impossible size"},
        {PAGE, 40, 4, QLB_LBZ_FRAME_MAX + 1,
         PAGE_0 "a frame has an impossible size"},
        {PAGE, 44, 2, 4096, PAGE_0 "a frame has an impossible place"},
        {PAGE, 46, 2, 0,
         PAGE_0 "a frame has an impossible number of blocks"},
        {PAGE, 46, 2, 17,
         PAGE_0 "a frame has an impossible number of blocks"},
        {PAGE, 48, 2, 0, PAGE_0 "a frame has an impossible live mask"},
        {PAGE, 44, 2, 1, PAGE_0 "a frame crosses a stripe"},
        {PAGE, 48, 2, 0x000f, PAGE_0 "live blocks of two frames coincide"},
        {PAGE, 50, 6, 1, PAGE_0 "reserved bytes of a frame are set"},
        {PAGE, 72 + 12, 2, 0, PAGE_0 "live blocks of two frames coincide"},
    };

    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        check_damage(&table[i], i, true);
    }
}

static void every_rule_of_the_trailer_is_checked(void **state)
{
    static const struct damage table[] = {
        {TRAILER, 4, 4, 1, "damaged at offset @T: reserved bytes of the "
         "trailer are set"},
        {TRAILER, 8, 8, 1, "damaged at offset @T: the trailer's size 176 does "
         "not fit 1 pages"},
        {TRAILER, 8, 8, UINT64_MAX, "damaged at offset @T: the trailer's size "
         "176 does not fit 18446744073709551615 pages"},
        {TRAILER, 16, 8, 7, "damaged at offset @T: the trailer counts 7 data "
         "blocks; there are 6"},
        {TRAILER, 24, 8, 0, "damaged at offset @T: the trailer counts 0 zero "
         "blocks; there are 5"},
        {TRAILER, 32, 8, 99, "damaged at offset @T: the trailer counts 99 "
         "frames; there are 4"},
        {TRAILER, 48, 8, 1, "damaged at offset @T: reserved bytes of the "
         "trailer are set"},
        {DIRECTORY, 0, 8, 2, "damaged at offset @D: the directory lists page "
         "2, behind the end of the disk",
         "damaged at offset @T: the directory does not list the index pages"},
        {DIRECTORY, 8, 8, UINT64_MAX - 8, "damaged at offset @D: the "
         "directory gives page 0 the impossible offset 18446744073709551607",
         "damaged at offset @T: the directory does not list the index pages"},
        {DIRECTORY, 8, 8, 8, "damaged at offset @D: the directory gives page "
         "0 the impossible offset 8",
         "damaged at offset @T: the directory does not list the index pages"},
        {DIRECTORY, 16, 4, UINT32_MAX, "damaged at offset @D: the directory "
         "gives page 0 the size 4294967295",
         "damaged at offset @T: the directory does not list the index pages"},
        {DIRECTORY, 20, 4, 1, "damaged at offset @D: reserved bytes of the "
         "directory are set",
         "damaged at offset @T: the directory does not list the index pages"},
    };

    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        check_damage(&table[i], i, true);
    }
}

/* An archive of one frame, whose compressed bytes are given. */
static struct archive raw_archive(const void *frame_data, size_t size,
                                  unsigned n_blocks)
{
    struct qlb_lbz_header header = plain_header(16 * BLOCK, 1);
    int fd = memfd_create("archive", MFD_CLOEXEC);
    struct qlb_error err;
    struct qlb_outfile *out = qlb_outfile_fd(fd, "archive", &err);
    struct qlb_lbz_writer *writer = qlb_lbz_writer_new(out, &header, &err);
    struct qlb_lbz_frame frame = {
        .n_blocks = n_blocks, .live = 1, .data = frame_data,
        .size = (uint32_t)size,
    };
    struct qlb_lbz_totals totals;
    struct archive archive;

    qlb_digest(header.digest, frame_data, size, frame.digest);
    assert_int_equal(qlb_lbz_writer_frame(writer, &frame, &err), 0);
    assert_int_equal(qlb_lbz_writer_finish(writer, &totals, &err), 0);
    archive.size = totals.archive_size;
    archive.data = malloc(archive.size);
    assert_int_equal(pread(fd, archive.data, archive.size, 0), archive.size);
    qlb_lbz_writer_free(writer);
    qlb_outfile_close(out);
    close(fd);
    return archive;
}

static void assert_frame_refused(const void *data, size_t size,
                                 unsigned n_blocks, const char *why)
{
    struct archive archive = raw_archive(data, size, n_blocks);
    struct qlb_error err;

    assert_int_equal(read_by_index(archive.data, archive.size, NULL, &err),
                     -1);
    assert_int_equal(err.code, QLB_E_DAMAGED);
    if (strstr(err.message, why) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", err.message, why);
    }
    assert_int_equal(read_by_stream(archive.data, archive.size, NULL, &err),
                     -1);
    assert_int_equal(err.code, QLB_E_DAMAGED);
    if (strstr(err.message, why) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", err.message, why);
    }
    free_archive(&archive);
}

static size_t compress(void *out, const void *in, size_t size, int checksum,
                       int content_size)
{
    ZSTD_CCtx *context = ZSTD_createCCtx();
    size_t ret;

    ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, checksum);
    ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, content_size);
    ret = ZSTD_compress2(context, out, QLB_LBZ_FRAME_MAX, in, size);
    ZSTD_freeCCtx(context);
    assert_false(ZSTD_isError(ret));
    return ret;
}

static void frames_against_the_rules_are_refused(void **state)
{
    size_t bomb = (size_t)64 << 20;
    uint8_t *blocks = calloc(1, bomb);
    uint8_t *out = malloc(QLB_LBZ_FRAME_MAX);
    size_t size = compress(out, blocks, bomb, 1, 1);

    assert_frame_refused(out, size, 16, "damaged frame: its content has "
                         "another size than its blocks");
    size = compress(out, blocks, BLOCK, 1, 1);
    assert_frame_refused(out, size, 2, "damaged frame: its content has "
                         "another size than its blocks");
    assert_frame_refused(out, size, 1,
                         "content of guest range 0x0-0xffff does not match "
                         "its digest");
    assert_frame_refused(out, size - 1, 1, "damaged frame: it does not end "
                         "where its record says");
    memset(out + size, 0, 8);
    assert_frame_refused(out, size + 8, 1, "damaged frame: it does not end "
                         "where its record says");
    size = compress(out, blocks, BLOCK, 1, 0);
    assert_frame_refused(out, size, 1, "damaged frame: its content has "
                         "another size than its blocks");
    size = compress(out, blocks, BLOCK, 0, 1);
    assert_frame_refused(out, size, 1, "damaged frame: it has no content "
                         "checksum");
    assert_frame_refused("LBZ?LBZ?LBZ?LBZ?", 16, 1, "damaged frame: it is no "
                         "zstd frame");
    free(out);
    free(blocks);
}

/* Random fields of everything, with right digests: no crash, nothing that
 * ends otherwise than well or as damage. */
static void random_fields_never_crash(void **state)
{
    uint64_t rng = 17;
    const unsigned rounds = getenv("QLB_NIGHTLY") != NULL ? 300000 : 5000;
    struct archive archive = small_archive(QLB_DIGEST_XXH3_128);
    uint8_t *copy = malloc(archive.size);
    static const uint64_t values[] = {
        0, 1, 2, 15, 16, 17, 255, 4095, 4096, 4097, 65535, 65536,
        UINT32_MAX, UINT64_MAX, UINT64_MAX - 7, UINT64_C(1) << 63,
        UINT64_C(1) << 56, UINT64_C(1) << 28,
    };

    for (unsigned round = 0; round < rounds; round++) {
        struct qlb_error err;

        memcpy(copy, archive.data, archive.size);
        for (uint64_t n = 1 + draw(&rng, 3); n > 0; n--) {
            unsigned width = 1u << draw(&rng, 4);
            size_t at = draw(&rng, archive.size / 2) * 2;

            if (at + width <= archive.size) {
                put_value(copy + at, width,
                          draw(&rng, 2) ? draw(&rng, 40)
                                        : values[draw(&rng, 18)]);
            }
        }
        reseal(copy, archive.size);
        if (read_by_index(copy, archive.size, NULL, &err) < 0) {
            assert_true(err.code == QLB_E_DAMAGED ||
                        strncmp(err.message, "unsupported", 11) == 0);
        }
        if (read_by_stream(copy, archive.size, NULL, &err) < 0) {
            assert_true(err.code == QLB_E_DAMAGED ||
                        strncmp(err.message, "unsupported", 11) == 0);
        }
    }
    free(copy);
    free_archive(&archive);
}

static void what_is_no_archive_is_said_so(void **state)
{
    struct qlb_error err;
    uint8_t zero[4096] = {0};

    assert_int_equal(read_by_index("", 0, NULL, &err), -1);
    assert_int_equal(err.code, QLB_E_DAMAGED);
    assert_string_equal(err.message,
                        "not an lbz archive: the file is empty");
    assert_int_equal(read_by_stream("", 0, NULL, &err), -1);
    assert_int_equal(err.code, QLB_E_DAMAGED);
    assert_string_equal(err.message,
                        "not an lbz archive: the input is empty");
    assert_int_equal(read_by_index(zero, sizeof(zero), NULL, &err), -1);
    assert_int_equal(err.code, QLB_E_DAMAGED);
    assert_string_equal(err.message, "not an lbz archive");
    assert_int_equal(read_by_stream(zero, sizeof(zero), NULL, &err), -1);
    assert_string_equal(err.message, "not an lbz archive");
    assert_null(qlb_lbz_reader_open("/nonexistent/archive.lbz", &err));
    assert_int_equal(err.code, QLB_E_RUNTIME);
    assert_string_equal(err.message, "No such file or directory");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_maps_come_back),
        cmocka_unit_test(empty_archives_come_back),
        cmocka_unit_test(zero_runs_cross_pages),
        cmocka_unit_test(headers_come_back),
        cmocka_unit_test(pages_are_found_in_any_order),
        cmocka_unit_test(a_second_archive_may_follow_in_the_output),
        cmocka_unit_test(the_stream_passes_every_byte_to_its_tee),
        cmocka_unit_test(the_writer_refuses_what_is_out_of_order),
        cmocka_unit_test(every_flipped_byte_is_found),
        cmocka_unit_test(every_cut_is_found),
        cmocka_unit_test(appended_bytes_are_found),
        cmocka_unit_test(damage_is_named),
        cmocka_unit_test(every_rule_of_the_header_is_checked),
        cmocka_unit_test(every_rule_of_the_page_is_checked),
        cmocka_unit_test(every_rule_of_the_trailer_is_checked),
        cmocka_unit_test(frames_against_the_rules_are_refused),
        cmocka_unit_test(random_fields_never_crash),
        cmocka_unit_test(what_is_no_archive_is_said_so),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
