/* Chains: against a naive model, and every way in which archives don't fit.
 *
 * The model is the disk itself, an array with the content of each block, which
 * is written to, shrunk and grown; backups are planned from what changed. A
 * chain, and a merge of any part of it, must give the disk of its end.
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
#include <sys/resource.h>
#include <unistd.h>

#include "archives.h"
#include "chain.h"

#define BLOCK ((uint64_t)QLB_LBZ_BLOCK)
#define MAX_BLOCKS (QLB_LBZ_PAGE_BLOCKS + 64)
#define MAX_POINTS 9

static char folder[4096];

static int enter_folder(void **state)
{
    const char *base = getenv("TMPDIR");

    snprintf(folder, sizeof(folder), "%s/test_chain.XXXXXX",
             base != NULL ? base : "/tmp");
    return mkdtemp(folder) == NULL ? -1 : chdir(folder);
}

static int leave_folder(void **state)
{
    char command[sizeof(folder) + 16];

    snprintf(command, sizeof(command), "rm -rf '%s'", folder);
    return chdir("/") == 0 && system(command) == 0 ? 0 : -1;
}

/* ---- the model ---- */

struct model {
    uint64_t rng;
    uint64_t size; /* bytes */
    uint64_t lowest; /* size since the last point in time */
    uint32_t disk[MAX_BLOCKS];   /* ZERO or a content */
    bool changed[MAX_BLOCKS];
    uint32_t next_content;
};

static size_t blocks_of(uint64_t size)
{
    return (size + BLOCK - 1) / BLOCK;
}

/* Most of it happens around the border of the pages. */
static size_t draw_block(struct model *model)
{
    size_t n = blocks_of(model->size);
    size_t at = draw(&model->rng, 2)
                    ? draw(&model->rng, n)
                    : QLB_LBZ_PAGE_BLOCKS - 40 + draw(&model->rng, 104);

    return at < n ? at : draw(&model->rng, n);
}

static void write_somewhere(struct model *model)
{
    size_t at = draw_block(model);
    size_t n = 1 + draw(&model->rng, 10);
    bool zero = draw(&model->rng, 3) == 0;

    for (; n > 0 && at < blocks_of(model->size); n--, at++) {
        model->disk[at] = zero ? ZERO : model->next_content++;
        model->changed[at] = true;
    }
}

/* What is above the end is gone; the block of the end keeps some of it, which
 * is a content of its own if there was any. */
static void resize(struct model *model, uint64_t size)
{
    size_t n = blocks_of(size);

    if (size < model->size) {
        for (size_t i = n; i < MAX_BLOCKS; i++) {
            model->disk[i] = ZERO;
            model->changed[i] = false;
        }
        if (size % BLOCK != 0) {
            model->changed[n - 1] = true;
            if (model->disk[n - 1] != ZERO) {
                model->disk[n - 1] = model->next_content++;
            }
        }
    }
    model->size = size;
    if (size < model->lowest) {
        model->lowest = size;
    }
}

static uint64_t draw_size(struct model *model)
{
    uint64_t size = draw(&model->rng, 3) == 0
                        ? draw(&model->rng, MAX_BLOCKS)
                        : QLB_LBZ_PAGE_BLOCKS - 60 +
                              draw(&model->rng, 124);

    return size * BLOCK + BLOCK - draw(&model->rng, 2) * draw(&model->rng,
                                                              BLOCK);
}

/* Plans a backup of what changed since the last one. Some blocks that the clip
 * speaks for are explicit zeroes, as a dump may make them. */
static void plan_backup(struct model *model, struct plan *plan,
                        uint32_t *blocks, unsigned number)
{
    plan->header = plain_header(model->size, number);
    plan->header.incremental = number > 1;
    plan->header.parent = numbered_uuid(number - 1);
    if (number > 1 && model->lowest < model->size) {
        plan->header.clip = model->lowest;
    }
    plan->blocks = blocks;
    plan->seed = draw(&model->rng, 3) * (number + 1);
    for (size_t i = 0; i < blocks_of(model->size); i++) {
        bool present = model->changed[i] ||
                       (i >= blocks_of(model->lowest) &&
                        draw(&model->rng, 40) == 0);

        blocks[i] = number == 1 || present ? model->disk[i] : ABSENT;
        if (number == 1 && blocks[i] == ZERO) {
            blocks[i] = ABSENT;
        }
    }
    model->lowest = model->size;
    memset(model->changed, 0, sizeof(model->changed));
}

/* ---- reading a chain ---- */

struct chain_reading {
    struct qlb_chain *chain;
    struct qlb_lbz_decoder *decoder;
    uint8_t *packed, *blocks;
};

static uint32_t identify(const uint8_t *block)
{
    static uint8_t expected[QLB_LBZ_BLOCK];
    uint32_t content;

    memcpy(&content, block, sizeof(content));
    content = le32toh(content);
    fill_block(content, expected);
    return memcmp(block, expected, sizeof(expected)) == 0 ? content
                                                          : UINT32_MAX;
}

static void load_frame(const struct chain_reading *reading,
                       const struct qlb_chain_page *page,
                       const struct qlb_chain_frame *frame)
{
    const struct qlb_lbz_reader *reader =
        qlb_chain_member(reading->chain, frame->member);
    uint64_t offset = page->number * QLB_LBZ_PAGE;
    struct qlb_error err;

    if (qlb_lbz_reader_frame(reader, &frame->entry, offset, reading->packed,
                             &err) < 0 ||
        qlb_lbz_decode(reading->decoder, reading->packed + 32,
                       frame->entry.size, frame->entry.n_blocks,
                       reading->blocks, &err) < 0 ||
        qlb_lbz_check_blocks(qlb_lbz_reader_header(reader)->digest,
                             &frame->entry, offset, reading->blocks,
                             &err) < 0) {
        fail_msg("%s", err.message);
    }
}

/* What a block is in the state; every block at most once. */
static void set_once(uint32_t *found, size_t block, uint32_t what)
{
    assert_true(block < MAX_BLOCKS);
    assert_int_equal(found[block], ABSENT);
    found[block] = what;
}

static void read_chain(struct qlb_chain *chain, uint32_t *found)
{
    struct chain_reading reading = {.chain = chain};
    const struct qlb_chain_page *page;
    uint64_t last_page = 0;
    struct qlb_error err;
    bool first = true;
    int ret;

    memset(found, 0, MAX_BLOCKS * sizeof(*found));
    reading.decoder = qlb_lbz_decoder_new(&err);
    reading.packed = malloc(QLB_LBZ_FRAME_MAX + 32);
    reading.blocks = malloc(QLB_LBZ_STRIPE);
    while ((ret = qlb_chain_next_page(chain, &page, &err)) > 0) {
        size_t base = page->number * QLB_LBZ_PAGE_BLOCKS;
        int last = -1, end = -1;

        assert_true(first || page->number > last_page);
        first = false;
        last_page = page->number;
        for (unsigned i = 0; i < page->n_frames; i++) {
            const struct qlb_chain_frame *frame = &page->frames[i];
            int live = frame->entry.first + __builtin_ctz(frame->entry.live);

            assert_true(live > last);
            last = live;
            load_frame(&reading, page, frame);
            for (unsigned k = 0; k < frame->entry.n_blocks; k++) {
                if (frame->entry.live >> k & 1) {
                    set_once(found, base + frame->entry.first + k,
                             identify(reading.blocks + k * BLOCK));
                }
            }
        }
        for (unsigned i = 0; i < page->n_runs; i++) {
            assert_true(page->runs[i].first > end);
            end = page->runs[i].first + page->runs[i].count;
            for (int block = page->runs[i].first; block < end; block++) {
                set_once(found, base + (size_t)block, ZERO);
            }
        }
    }
    assert_int_equal(ret, 0);
    qlb_lbz_decoder_free(reading.decoder);
    free(reading.packed);
    free(reading.blocks);
}

static struct qlb_chain *open_chain(const char *const *paths, unsigned n,
                                    unsigned flags)
{
    struct qlb_error err;
    struct qlb_chain *chain = qlb_chain_open(paths, n, NULL, flags, &err);

    if (chain == NULL) {
        fail_msg("%s", err.message);
    }
    return chain;
}

static void assert_chain_is(const char *const *paths, unsigned n,
                            const uint32_t *disk, uint64_t size)
{
    struct qlb_chain *chain = open_chain(paths, n, QLB_CHAIN_NEED_FULL);
    static uint32_t found[MAX_BLOCKS];

    assert_int_equal(qlb_chain_members(chain), n);
    assert_int_equal(qlb_chain_header(chain)->virtual_size, size);
    read_chain(chain, found);
    for (size_t i = 0; i < MAX_BLOCKS; i++) {
        uint32_t expected = i < blocks_of(size) ? disk[i] : ZERO;

        if ((found[i] == ABSENT ? ZERO : found[i]) != expected) {
            fail_msg("block %zu is %u, not %u", i, found[i], expected);
        }
    }
    qlb_chain_close(chain);
}

/* ---- merging, as a tool does it ---- */

static void move_frame(struct chain_reading *reading,
                       struct qlb_lbz_writer *writer,
                       const struct qlb_chain_page *page,
                       const struct qlb_chain_frame *chain_frame)
{
    size_t digest_size =
        qlb_digest_size(qlb_chain_header(reading->chain)->digest);
    const struct qlb_lbz_entry *entry = &chain_frame->entry;
    struct qlb_lbz_frame frame = {
        .offset = page->number * QLB_LBZ_PAGE + entry->first * BLOCK,
        .n_blocks = entry->n_blocks, .live = entry->live,
        .data = reading->packed + 32, .size = entry->size,
    };
    struct qlb_error err;

    assert_int_equal(qlb_lbz_reader_frame(
        qlb_chain_member(reading->chain, chain_frame->member), entry,
        page->number * QLB_LBZ_PAGE, reading->packed, &err), 0);
    memcpy(frame.digest, entry->digest, digest_size);
    memcpy(frame.block_digests, entry->block_digests,
           digest_size * (unsigned)__builtin_popcount(entry->live));
    assert_int_equal(qlb_lbz_writer_frame(writer, &frame, &err), 0);
}

static void merge(const char *const *paths, unsigned n, const char *to)
{
    struct chain_reading reading = {.chain = open_chain(paths, n, 0)};
    const struct qlb_chain_page *page;
    struct qlb_lbz_writer *writer;
    struct qlb_outfile *out;
    struct qlb_error err;
    int ret;

    reading.packed = malloc(QLB_LBZ_FRAME_MAX + 32);
    out = qlb_outfile_create(to, QLB_OUTFILE_FORCE, &err);
    assert_non_null(out);
    writer = qlb_lbz_writer_new(out, qlb_chain_header(reading.chain), &err);
    assert_non_null(writer);
    while ((ret = qlb_chain_next_page(reading.chain, &page, &err)) > 0) {
        for (unsigned i = 0; i < page->n_frames; i++) {
            move_frame(&reading, writer, page, &page->frames[i]);
        }
        for (unsigned i = 0; i < page->n_runs; i++) {
            assert_int_equal(qlb_lbz_writer_zero(
                writer, page->number * QLB_LBZ_PAGE +
                            page->runs[i].first * BLOCK,
                page->runs[i].count, &err), 0);
        }
    }
    assert_int_equal(ret, 0);
    assert_int_equal(qlb_lbz_writer_finish(writer, NULL, &err), 0);
    assert_int_equal(qlb_outfile_commit(out, &err), 0);
    qlb_lbz_writer_free(writer);
    qlb_outfile_close(out);
    qlb_chain_close(reading.chain);
    free(reading.packed);
}

static void assert_sound(const char *path)
{
    static uint8_t data[8 << 20];
    FILE *f = fopen(path, "r");
    size_t size = fread(data, 1, sizeof(data), f);
    struct qlb_error err;

    fclose(f);
    assert_in_range(size, 1, sizeof(data) - 1);
    if (read_by_index(data, size, NULL, &err) < 0 ||
        read_by_stream(data, size, NULL, &err) < 0) {
        fail_msg("%s: %s", path, err.message);
    }
}

/* ---- chains against the model ---- */

static const char *const names[MAX_POINTS] = {
    "1.lbz", "2.lbz", "3.lbz", "4.lbz", "5.lbz", "6.lbz", "7.lbz", "8.lbz",
    "9.lbz",
};

static void change_disk(struct model *model, unsigned number)
{
    for (uint64_t n = draw(&model->rng, 12); n > 0; n--) {
        write_somewhere(model);
    }
    if (number > 1 && draw(&model->rng, 2)) {
        for (uint64_t n = 1 + draw(&model->rng, 3); n > 0; n--) {
            resize(model, draw_size(model));
            write_somewhere(model);
        }
    }
}

/* Every part of the chain merged, and put in the place of its members. */
static void check_merges(struct model *model, unsigned n)
{
    for (unsigned round = 0; round < 4; round++) {
        unsigned first = (unsigned)draw(&model->rng, n);
        unsigned last = first + (unsigned)draw(&model->rng, n - first);
        const char *paths[MAX_POINTS];
        unsigned n_paths = 0;

        merge(names + first, last - first + 1, "merged.lbz");
        assert_sound("merged.lbz");
        for (unsigned i = 0; i < n; i++) {
            if (i == last) {
                paths[n_paths++] = "merged.lbz";
            } else if (i < first || i > last) {
                paths[n_paths++] = names[i];
            }
        }
        assert_chain_is(paths, n_paths, model->disk, model->size);
    }
}

static void shuffle(struct model *model, const char **paths, unsigned n)
{
    for (unsigned i = n; i > 1; i--) {
        unsigned k = (unsigned)draw(&model->rng, i);
        const char *path = paths[i - 1];

        paths[i - 1] = paths[k];
        paths[k] = path;
    }
}

static void random_chains_give_the_disk(void **state)
{
    static struct model model;
    static uint32_t blocks[MAX_BLOCKS];
    unsigned rounds = getenv("QLB_NIGHTLY") != NULL ? 2000 : 60;

    for (unsigned round = 0; round < rounds; round++) {
        unsigned n = 1 + round % MAX_POINTS;
        const char *paths[MAX_POINTS];

        memset(&model, 0, sizeof(model));
        model.rng = round;
        model.next_content = FIRST_CONTENT;
        for (size_t i = 0; i < MAX_BLOCKS; i++) {
            model.disk[i] = ZERO;
        }
        model.size = model.lowest = draw_size(&model);
        for (unsigned i = 0; i < n; i++) {
            struct plan plan;
            struct archive archive;

            change_disk(&model, i + 1);
            plan_backup(&model, &plan, blocks, i + 1);
            archive = make_archive(&plan);
            save_archive(&archive, names[i]);
            free_archive(&archive);
            memcpy(paths, names, sizeof(paths));
            shuffle(&model, paths, i + 1);
            assert_chain_is(paths, i + 1, model.disk, model.size);
        }
        check_merges(&model, n);
    }
}

/* ---- headers and links ---- */

struct archive_spec {
    const char *path;
    unsigned uuid, parent; /* parent 0: full */
    uint64_t size;         /* blocks; 0: 16 */
    uint64_t clip;         /* blocks; 0: none */
    unsigned covered[4];   /* 0: no more */
    unsigned image;        /* 0: the usual */
    enum qlb_digest_type digest; /* 0: XXH3 */
};

static void save_spec(const struct archive_spec *spec)
{
    static uint32_t blocks[1024];
    uint64_t size = (spec->size == 0 ? 16 : spec->size) * BLOCK;
    struct plan plan = {
        .header = plain_header(size, spec->uuid), .blocks = blocks,
    };
    struct qlb_uuid covered[4];
    struct archive archive;

    plan.header.incremental = spec->parent != 0;
    plan.header.parent = numbered_uuid(spec->parent);
    if (spec->clip != 0) {
        plan.header.clip = spec->clip * BLOCK;
    }
    if (spec->image != 0) {
        plan.header.image_uuid = numbered_uuid(spec->image);
    }
    if (spec->digest != 0) {
        plan.header.digest = spec->digest;
    }
    for (unsigned i = 0; i < 4 && spec->covered[i] != 0; i++) {
        covered[plan.header.n_covered++] = numbered_uuid(spec->covered[i]);
    }
    plan.header.covered = covered;
    archive = make_archive(&plan);
    save_archive(&archive, spec->path);
    free_archive(&archive);
}

#define UUID(n) "00000000-0000-0000-0000-0000000000" n

struct links {
    struct archive_spec specs[5];
    unsigned at, flags;
    enum qlb_code code; /* 0: opens */
    const char *expected; /* message, or the members and unused ones */
};

static void describe(const struct qlb_chain *chain, char *text, size_t size)
{
    size_t used = 0;
    const char *path;

    for (unsigned i = 0; i < qlb_chain_members(chain); i++) {
        used += (size_t)snprintf(text + used, size - used, "%s%s",
                                 i > 0 ? " " : "", qlb_lbz_reader_name(
                                     qlb_chain_member(chain, i)));
    }
    for (unsigned i = 0; (path = qlb_chain_unused(chain, i)) != NULL; i++) {
        used += (size_t)snprintf(text + used, size - used, "%s%s",
                                 i > 0 ? " " : " without ", path);
    }
}

static void check_links(const struct links *links, size_t number)
{
    const char *paths[5];
    struct qlb_uuid at = numbered_uuid(links->at);
    struct qlb_error err = {.message = ""};
    struct qlb_chain *chain;
    char text[1024] = "";
    unsigned n = 0;

    for (; n < 5 && links->specs[n].path != NULL; n++) {
        save_spec(&links->specs[n]);
        paths[n] = links->specs[n].path;
    }
    chain = qlb_chain_open(paths, n, links->at == 0 ? NULL : &at,
                           links->flags, &err);
    if (chain != NULL) {
        describe(chain, text, sizeof(text));
        qlb_chain_close(chain);
    } else {
        strcpy(text, err.message);
    }
    if (strcmp(text, links->expected) != 0 ||
        (chain == NULL ? err.code : QLB_OK) != links->code) {
        fail_msg("case %zu: %d \"%s\"\nnot %d \"%s\"", number,
                 chain == NULL ? err.code : QLB_OK, text, links->code,
                 links->expected);
    }
}

static void archives_are_ordered_by_their_links(void **state)
{
    static const struct links table[] = {
        {.specs = {{"a", 1}}, .expected = "a"},
        {.specs = {{"c", 3, 2}, {"a", 1}, {"b", 2, 1}},
         .expected = "a b c"},
        {.specs = {{"c", 3, 2}, {"b", 2, 1}}, .expected = "b c"},
        {.specs = {{"c", 3, 2}, {"a", 1}, {"b", 2, 1}}, .at = 2,
         .expected = "a b without c"},
        /* a differential covers what it replaces */
        {.specs = {{"a", 1}, {"b", 2, 1}, {"c", 3, 2},
                   {"d", 4, 1, .covered = {2, 3}}},
         .expected = "a d without b c"},
        {.specs = {{"a", 1}, {"b", 2, 1}, {"c", 3, 2},
                   {"d", 4, 1, .covered = {2, 3}}}, .at = 3,
         .expected = "a b c without d"},
        {.specs = {{"c", 3, 2}, {"b", 2, 1}}, .flags = QLB_CHAIN_NEED_FULL,
         .code = QLB_E_UNTRUSTED, .expected = "b: its parent " UUID("01")
         " is not among the archives given"},
        {.specs = {{"a", 1}, {"b", 2, 1}, {"d", 4, 3}},
         .code = QLB_E_UNTRUSTED, .expected = "d: its parent " UUID("03")
         " is not among the archives given"},
        {.specs = {{"a", 1}, {"b", 2, 1}, {"c", 3, 1}},
         .code = QLB_E_UNTRUSTED, .expected = "the archives end in 2 "
         "different states; choose one with --at UUID: " UUID("02")
         " (b, 2023-11-14T22:13:22Z), " UUID("03")
         " (c, 2023-11-14T22:13:23Z)"},
        {.specs = {{"a", 1}, {"b", 2}},
         .code = QLB_E_UNTRUSTED, .expected = "the archives end in 2 "
         "different states; choose one with --at UUID: " UUID("01")
         " (a, 2023-11-14T22:13:21Z), " UUID("02")
         " (b, 2023-11-14T22:13:22Z)"},
        {.specs = {{"a", 1}, {"b", 2, 1}}, .at = 9,
         .code = QLB_E_UNTRUSTED, .expected = "no archive with the UUID "
         UUID("09") " was given"},
        {.specs = {{"a", 1}, {"b", 2, 1, .image = 0x77}},
         .code = QLB_E_UNTRUSTED, .expected = "b: belongs to the image "
         UUID("77") "; a belongs to 00000000-0000-0000-0000-00000000ffff"},
        {.specs = {{"a", 1}, {"b", 2, 1}, {"c", 1}},
         .code = QLB_E_UNTRUSTED, .expected = "c: has the same UUID as a, "
         UUID("01") "; give only one of them"},
        {.specs = {{"a", 1}, {"b", 2, 1}, {"c", 2, 1}},
         .code = QLB_E_UNTRUSTED, .expected = "c: has the same UUID as b, "
         UUID("02") "; give only one of them"},
        /* a merge took the place of the base, its members are still there */
        {.specs = {{"b", 2, 1}, {"c", 3, 2}, {"a", 3, .covered = {1, 2}}},
         .expected = "a without b c"},
        {.specs = {{"a", 3, .covered = {1, 2}}, {"b", 2, 1}, {"c", 3, 2},
                   {"d", 4, 3}},
         .expected = "a d without b c"},
        {.specs = {{"a", 3, .covered = {1, 2}}, {"b", 2, 1}, {"c", 3, 2}},
         .at = 3, .expected = "a without b c"},
        {.specs = {{"a", 1}, {"b", 2, 1, .digest = QLB_DIGEST_SHA256}},
         .code = QLB_E_USAGE, .expected = "a: has another digest algorithm "
         "than b; archives of one chain that are read together must have the "
         "same"},
        {.specs = {{"b", 2, 3}, {"c", 3, 2}},
         .code = QLB_E_UNTRUSTED, .expected = "b: every archive is the "
         "parent of another or covered by it; choose one with --at UUID"},
        {.specs = {{"b", 2, 3}, {"c", 3, 2}}, .at = 3,
         .code = QLB_E_UNTRUSTED, .expected = "c: the parent links lead round "
         "in a circle"},
        {.specs = {{"b", 2, 3}, {"c", 3, 2}, {"d", 4, 3}},
         .code = QLB_E_UNTRUSTED, .expected = "d: the parent links lead round "
         "in a circle"},
        {.specs = {{NULL}}, .code = QLB_E_USAGE,
         .expected = "no archive was given"},
    };

    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        check_links(&table[i], i);
    }
}

static void damage_names_the_archive(void **state)
{
    const char *paths[] = {"a", "b"};
    struct qlb_error err;

    save_spec(&(struct archive_spec) {"a", 1});
    assert_int_equal(truncate("b", 0), 0);
    assert_null(qlb_chain_open(paths, 2, NULL, 0, &err));
    assert_int_equal(err.code, QLB_E_DAMAGED);
    assert_string_equal(err.message,
                        "b: not an lbz archive: the file is empty");
    unlink("b");
    assert_null(qlb_chain_open(paths, 2, NULL, 0, &err));
    assert_int_equal(err.code, QLB_E_RUNTIME);
    assert_string_equal(err.message, "b: No such file or directory");
}

static void assert_merged_header(const struct archive_spec *specs, unsigned n,
                                 const struct archive_spec *expected)
{
    const struct qlb_lbz_header *header;
    struct qlb_chain *chain;
    const char *paths[8];
    unsigned k = 0;

    for (unsigned i = 0; i < n; i++) {
        save_spec(&specs[i]);
        paths[i] = specs[i].path;
    }
    chain = open_chain(paths, n, 0);
    header = qlb_chain_header(chain);
    assert_int_equal(header->incremental, expected->parent != 0);
    assert_memory_equal(&header->uuid,
                        (&(struct qlb_uuid[]) {numbered_uuid(expected->uuid)}),
                        16);
    assert_memory_equal(&header->parent, (&(struct qlb_uuid[]) {
                            numbered_uuid(expected->parent)}), 16);
    assert_int_equal(header->virtual_size, expected->size * BLOCK);
    assert_int_equal(header->clip, expected->clip == 0
                     ? QLB_LBZ_NO_CLIP : expected->clip * BLOCK);
    assert_int_equal(header->time, 1700000000 + expected->uuid);
    for (; k < 4 && expected->covered[k] != 0; k++) {
        assert_true(k < header->n_covered);
        assert_memory_equal(&header->covered[k], (&(struct qlb_uuid[]) {
                                numbered_uuid(expected->covered[k])}), 16);
    }
    assert_int_equal(header->n_covered, k);
    qlb_chain_close(chain);
}

static void merged_headers_follow_the_rules(void **state)
{
    assert_merged_header(
        (struct archive_spec[]) {{"a", 1, .size = 100}, {"b", 2, 1, 50},
                                 {"c", 3, 2, 80}}, 3,
        &(struct archive_spec) {"", 3, .size = 80, .covered = {1, 2}});
    assert_merged_header(
        (struct archive_spec[]) {{"b", 2, 1, 50}, {"c", 3, 2, 80}}, 2,
        &(struct archive_spec) {"", 3, 1, 80, .clip = 50, .covered = {2}});
    assert_merged_header(
        (struct archive_spec[]) {{"b", 2, 1, 80, .clip = 40},
                                 {"c", 3, 2, 90, .clip = 60}}, 2,
        &(struct archive_spec) {"", 3, 1, 90, .clip = 40, .covered = {2}});
    assert_merged_header(
        (struct archive_spec[]) {{"b", 2, 1, 80, .clip = 40},
                                 {"c", 3, 2, 30}}, 2,
        &(struct archive_spec) {"", 3, 1, 30, .covered = {2}});
    assert_merged_header(
        (struct archive_spec[]) {{"b", 3, 1, 8, .covered = {2}},
                                 {"c", 5, 3, 8, .covered = {4, 2}}}, 2,
        &(struct archive_spec) {"", 5, 1, 8, .covered = {3, 4, 2}});
}

/* More UUIDs than a header holds: the oldest are left out. */
static void the_oldest_covered_are_left_out(void **state)
{
    enum { MEMBERS = 3, EACH = 400 };
    struct qlb_uuid covered[EACH];
    const char *paths[MEMBERS];
    const struct qlb_lbz_header *header;
    struct qlb_chain *chain;

    for (unsigned i = 0; i < MEMBERS; i++) {
        struct plan plan = {.header = plain_header(0, i + 1)};
        struct archive archive;

        plan.header.incremental = i > 0;
        plan.header.parent = numbered_uuid(i);
        for (unsigned k = 0; k < EACH; k++) {
            covered[k] = numbered_uuid(1000 + i * EACH + k);
        }
        plan.header.covered = covered;
        plan.header.n_covered = EACH;
        archive = make_archive(&plan);
        paths[i] = names[i];
        save_archive(&archive, paths[i]);
        free_archive(&archive);
    }
    chain = open_chain(paths, MEMBERS, QLB_CHAIN_NEED_FULL);
    header = qlb_chain_header(chain);
    assert_int_equal(header->n_covered, QLB_LBZ_COVERED_MAX);
    for (unsigned k = 0; k < EACH; k++) {
        struct qlb_uuid uuid = numbered_uuid(1000 + 2 * EACH + k);

        assert_memory_equal(&header->covered[QLB_LBZ_COVERED_MAX - EACH + k],
                            &uuid, 16);
    }
    qlb_chain_close(chain);
}

/* As many as fit below the usual hard limit of descriptors, 1024, with a soft
 * limit far below. */
static void nine_hundred_members_are_read(void **state)
{
    enum { MEMBERS = 900 };
    static char paths[MEMBERS][16];
    static uint32_t found[MAX_BLOCKS];
    const char *list[MEMBERS];
    struct rlimit before, low;
    struct qlb_chain *chain;
    uint32_t blocks[64];

    getrlimit(RLIMIT_NOFILE, &before);
    low = before;
    low.rlim_cur = 100;
    setrlimit(RLIMIT_NOFILE, &low);
    for (unsigned i = 0; i < MEMBERS; i++) {
        struct plan plan = {
            .header = plain_header(64 * BLOCK, i + 1), .blocks = blocks,
        };
        struct archive archive;

        memset(blocks, 0, sizeof(blocks));
        blocks[i % 64] = FIRST_CONTENT + i;
        plan.header.incremental = i > 0;
        plan.header.parent = numbered_uuid(i);
        archive = make_archive(&plan);
        snprintf(paths[i], sizeof(paths[i]), "%u.lbz", i);
        save_archive(&archive, paths[i]);
        free_archive(&archive);
        list[(i * 7) % MEMBERS] = paths[i];
    }
    chain = open_chain(list, MEMBERS, QLB_CHAIN_NEED_FULL);
    assert_int_equal(qlb_chain_members(chain), MEMBERS);
    read_chain(chain, found);
    for (unsigned i = MEMBERS - 64; i < MEMBERS; i++) {
        assert_int_equal(found[i % 64], FIRST_CONTENT + i);
    }
    qlb_chain_close(chain);
    setrlimit(RLIMIT_NOFILE, &before);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_chains_give_the_disk),
        cmocka_unit_test(archives_are_ordered_by_their_links),
        cmocka_unit_test(damage_names_the_archive),
        cmocka_unit_test(merged_headers_follow_the_rules),
        cmocka_unit_test(the_oldest_covered_are_left_out),
        cmocka_unit_test(nine_hundred_members_are_read),
    };

    return cmocka_run_group_tests(tests, enter_folder, leave_folder);
}
