/* Copy before write: each function, then all interleavings of a small model.
 *
 * The model stands for the I/O around the state machine: a disk of three units
 * (the last is a part) in half units, guest writes that follow "Copy before
 * write" of live-backup.md step by step, a client that releases, something that
 * breaks the snapshot, saving that fails, and a reader in another process. A
 * depth first search takes every step that is possible in every state; states
 * it has seen are not walked again, and what each step does is checked in all
 * of them. A second run of the search, with one rule of the protocol broken,
 * must find the violation.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "bitmap.h"
#include "cbw.h"

#define KIB UINT64_C(1024)
#define GIB (UINT64_C(1) << 30)
#define TIB (UINT64_C(1) << 40)

/* ---- one function after the other ---- */

static uint8_t *setup_cbw(struct qlb_cbw *cbw, uint64_t size, unsigned bits)
{
    uint8_t *bitmaps = calloc(3, qlb_cbw_bitmap_size(size, bits) + 1);

    assert_non_null(bitmaps);
    qlb_cbw_init(cbw, size, bits, bitmaps);
    return bitmaps;
}

static struct qlb_units units(uint64_t first, uint64_t count)
{
    return (struct qlb_units){ first, count };
}

static void assert_units(struct qlb_units u, uint64_t first, uint64_t count)
{
    assert_int_equal(u.count, count);
    assert_int_equal(u.first, first);
}

/* Asks, and expects this answer; `left` and `part` where they matter. */
static void expect_next(struct qlb_cbw *cbw, struct qlb_units ask,
                        uint64_t max_units, enum qlb_cbw_step step,
                        struct qlb_units left, struct qlb_units part)
{
    struct qlb_units got = { 77, 77 };
    bool free_to_go = qlb_cbw_free_to_go(cbw, ask);

    assert_int_equal(qlb_cbw_next(cbw, &ask, max_units, &got), step);
    assert_int_equal(free_to_go, step == QLB_CBW_GO);
    assert_units(ask, left.first, left.count);
    if (step == QLB_CBW_SAVE) {
        assert_units(got, part.first, part.count);
    }
}

static void test_sizes(void **state)
{
    static const struct {
        uint64_t size;
        unsigned bits;
        uint64_t n_units, bytes;
    } cases[] = {
        { 0, 16, 0, 0 },
        { 1, 16, 1, 1 },
        { 64 * KIB, 16, 1, 1 },
        { 64 * KIB + 1, 16, 2, 1 },
        { 512 * KIB, 16, 8, 1 },
        { 512 * KIB + 1, 16, 9, 2 },
        { TIB, 16, 1 << 24, 1 << 21 },
        { TIB, 31, 512, 64 },
        { INT64_MAX, 31, UINT64_C(1) << 32, 1 << 29 },
    };
    struct qlb_cbw cbw;
    uint8_t byte;

    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        assert_int_equal(qlb_cbw_bitmap_size(cases[i].size, cases[i].bits),
                         cases[i].bytes);
        qlb_cbw_init(&cbw, cases[i].size, cases[i].bits, &byte);
        assert_int_equal(cbw.n_units, cases[i].n_units);
        assert_int_equal(cbw.n_todo, 0);
    }
    assert_int_equal(qlb_cbw_unit_bits(9, 12), 16);
    assert_int_equal(qlb_cbw_unit_bits(16, 21), 21);
    assert_int_equal(qlb_cbw_unit_bits(31, 16), 31);
}

static void test_units_of(void **state)
{
    struct qlb_cbw cbw;
    uint8_t *bitmaps = setup_cbw(&cbw, 4 * 64 * KIB + 512, 16);

    (void)state;
    assert_units(qlb_cbw_units_of(&cbw, 0, 0), 0, 0);
    assert_units(qlb_cbw_units_of(&cbw, 0, 1), 0, 1);
    assert_units(qlb_cbw_units_of(&cbw, 65535, 1), 0, 1);
    assert_units(qlb_cbw_units_of(&cbw, 65535, 2), 0, 2);
    assert_units(qlb_cbw_units_of(&cbw, 65536, 65536), 1, 1);
    assert_units(qlb_cbw_units_of(&cbw, 65536, UINT64_MAX), 1, 4);
    assert_units(qlb_cbw_units_of(&cbw, 4 * 65536 + 511, 9), 4, 1);
    assert_units(qlb_cbw_units_of(&cbw, 4 * 65536 + 512, 9), 0, 0);
    assert_units(qlb_cbw_units_of(&cbw, UINT64_MAX, UINT64_MAX), 0, 0);
    free(bitmaps);
}

static void test_saving(void **state)
{
    struct qlb_cbw cbw;
    uint8_t *bitmaps = setup_cbw(&cbw, 20 * 64 * KIB, 16);

    (void)state;
    expect_next(&cbw, units(0, 20), 9, QLB_CBW_GO, units(20, 0), units(0, 0));
    qlb_cbw_add_all(&cbw);
    assert_int_equal(cbw.n_todo, 20);
    expect_next(&cbw, units(0, 0), 9, QLB_CBW_GO, units(0, 0), units(0, 0));
    /* at most as long as allowed; no length is not a way to wait for ever */
    expect_next(&cbw, units(6, 9), 4, QLB_CBW_SAVE, units(6, 9), units(6, 4));
    expect_next(&cbw, units(2, 1), 0, QLB_CBW_SAVE, units(2, 1), units(2, 1));
    assert_int_equal(cbw.n_busy, 5);
    assert_int_equal(cbw.n_todo, 20);
    /* it ends before one that is being saved, or is free */
    expect_next(&cbw, units(3, 9), 9, QLB_CBW_SAVE, units(3, 9), units(3, 3));
    expect_next(&cbw, units(9, 2), 9, QLB_CBW_WAIT, units(9, 2), units(0, 0));
    qlb_cbw_saved(&cbw, units(6, 4));
    assert_int_equal(cbw.n_saved, 4);
    assert_int_equal(cbw.n_todo, 16);
    expect_next(&cbw, units(6, 4), 9, QLB_CBW_GO, units(10, 0), units(0, 0));
    expect_next(&cbw, units(7, 4), 9, QLB_CBW_SAVE, units(10, 1),
                units(10, 1));
    qlb_cbw_failed(&cbw, units(3, 3));
    expect_next(&cbw, units(3, 8), 9, QLB_CBW_SAVE, units(3, 8), units(3, 3));
    qlb_cbw_failed(&cbw, units(10, 1));
    qlb_cbw_saved(&cbw, units(2, 1));
    qlb_cbw_saved(&cbw, units(3, 3));
    assert_int_equal(cbw.n_busy, 0);
    assert_int_equal(cbw.n_todo, 12);
    assert_int_equal(cbw.n_saved, 8);
    assert_int_equal(qlb_bits_count(cbw.todo, 20), 12);
    assert_true(qlb_bits_all_zero(cbw.busy, 3));
    free(bitmaps);
}

static void test_release(void **state)
{
    const uint64_t u = 64 * KIB;
    struct qlb_cbw cbw;
    uint8_t *bitmaps = setup_cbw(&cbw, 20 * u + 1, 16);

    (void)state;
    qlb_cbw_add_all(&cbw);
    /* as a whole, the last one up to the end of the disk */
    assert_int_equal(qlb_cbw_release(&cbw, 1, u), 0);
    assert_int_equal(qlb_cbw_release(&cbw, u, u - 1), 0);
    assert_int_equal(qlb_cbw_release(&cbw, 0, 0), 0);
    assert_int_equal(qlb_cbw_release(&cbw, 20 * u, 0), 0);
    assert_int_equal(qlb_cbw_release(&cbw, 20 * u + 1, u), 0);
    assert_int_equal(qlb_cbw_release(&cbw, UINT64_MAX, UINT64_MAX), 0);
    assert_int_equal(qlb_cbw_release(&cbw, 20 * u, 1), 1);
    assert_int_equal(qlb_cbw_release(&cbw, 18 * u + 1, UINT64_MAX), 1);
    assert_int_equal(cbw.n_released, 2);
    assert_int_equal(cbw.n_todo, 19);
    /* one that is being saved, one that was */
    expect_next(&cbw, units(3, 1), 1, QLB_CBW_SAVE, units(3, 1), units(3, 1));
    expect_next(&cbw, units(5, 1), 1, QLB_CBW_SAVE, units(5, 1), units(5, 1));
    qlb_cbw_saved(&cbw, units(5, 1));
    assert_int_equal(qlb_cbw_release(&cbw, 2 * u, 10 * u), 8);
    assert_int_equal(qlb_cbw_release(&cbw, 2 * u, 10 * u), 0);
    qlb_cbw_failed(&cbw, units(3, 1));
    expect_next(&cbw, units(3, 1), 1, QLB_CBW_SAVE, units(3, 1), units(3, 1));
    qlb_cbw_saved(&cbw, units(3, 1));
    /* not to be overwritten before the image says so */
    expect_next(&cbw, units(2, 2), 1, QLB_CBW_MARK, units(2, 2), units(0, 0));
    expect_next(&cbw, units(3, 1), 1, QLB_CBW_GO, units(4, 0), units(0, 0));
    expect_next(&cbw, units(3, 9), 1, QLB_CBW_MARK, units(4, 8), units(0, 0));
    expect_next(&cbw, units(1, 3), 9, QLB_CBW_SAVE, units(1, 3), units(1, 1));
    qlb_cbw_saved(&cbw, units(1, 1));
    qlb_cbw_marked(&cbw);
    expect_next(&cbw, units(1, 11), 9, QLB_CBW_GO, units(12, 0), units(0, 0));
    expect_next(&cbw, units(1, 12), 9, QLB_CBW_SAVE, units(12, 1),
                units(12, 1));
    assert_int_equal(cbw.n_released, 10);
    assert_int_equal(qlb_bits_count(cbw.released, 21), 10);
    assert_int_equal(cbw.n_todo, qlb_bits_count(cbw.todo, 21));
    free(bitmaps);
}

static void test_break(void **state)
{
    struct qlb_cbw cbw;
    uint8_t *bitmaps = setup_cbw(&cbw, 20 * 64 * KIB, 16);

    (void)state;
    qlb_cbw_add_all(&cbw);
    assert_int_equal(qlb_cbw_release(&cbw, 0, 64 * KIB), 1);
    expect_next(&cbw, units(1, 6), 6, QLB_CBW_SAVE, units(1, 6), units(1, 6));
    qlb_cbw_break(&cbw);
    expect_next(&cbw, units(0, 20), 9, QLB_CBW_GO, units(20, 0), units(0, 0));
    qlb_cbw_saved(&cbw, units(1, 3));
    qlb_cbw_failed(&cbw, units(4, 3));
    assert_int_equal(cbw.n_busy, 0);
    assert_int_equal(cbw.n_saved, 3);
    assert_int_equal(cbw.n_todo, 16);
    expect_next(&cbw, units(0, 20), 9, QLB_CBW_GO, units(20, 0), units(0, 0));
    free(bitmaps);
}

/* Against a loop over granules; a bit behind the end counts for nothing. */
static void check_dirty(uint64_t size, unsigned unit_bits, unsigned bits,
                        unsigned one_in)
{
    uint64_t n = (size + (UINT64_C(1) << bits) - 1) >> bits;
    struct qlb_cbw cbw;
    uint8_t *bitmaps = setup_cbw(&cbw, size, unit_bits);
    uint8_t *expected = calloc(1, qlb_cbw_bitmap_size(size, unit_bits) + 1);
    uint8_t *dirty = calloc(1, n / 8 + 1);

    assert_non_null(expected);
    assert_non_null(dirty);
    for (uint64_t i = 0; i < n; i++) {
        if (rand() % one_in == 0) {
            qlb_bit_set(dirty, i);
            qlb_bit_set(expected, i >> (unit_bits - bits));
        }
    }
    for (uint64_t i = n; i % 8 != 0; i++) {
        qlb_bit_set(dirty, i);
    }
    qlb_cbw_add_dirty(&cbw, dirty, bits);
    assert_memory_equal(cbw.todo, expected,
                        qlb_cbw_bitmap_size(size, unit_bits));
    assert_int_equal(cbw.n_todo, qlb_bits_count(expected, cbw.n_units));
    free(dirty);
    free(expected);
    free(bitmaps);
}

static void test_dirty(void **state)
{
    static const uint64_t sizes[] = {
        0, 1, 512, 65536, 65537, 64 * 65536, 64 * 65536 + 1, 63 * 65536 - 512,
        1000 * 65536 + 33333,
    };

    (void)state;
    srand(1);
    for (unsigned bits = 9; bits <= 18; bits++) {
        for (unsigned unit = bits > 16 ? bits : 16; unit <= 18; unit++) {
            for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
                check_dirty(sizes[i], unit, bits, 1);
                check_dirty(sizes[i], unit, bits, 2);
                check_dirty(sizes[i], unit, bits, 100);
                check_dirty(sizes[i], unit, bits, 5000);
            }
        }
    }
    check_dirty(TIB, 16, 16, 2);
    check_dirty(100 * GIB, 31, 20, 3);
}

/* Two dirty bitmaps: what either has. */
static void test_dirty_twice(void **state)
{
    const uint8_t first[2] = { 0x05, 0x80 }, second[2] = { 0x06, 0x01 };
    struct qlb_cbw cbw;
    uint8_t *bitmaps = setup_cbw(&cbw, 16 * 64 * KIB, 16);

    (void)state;
    qlb_cbw_add_dirty(&cbw, first, 16);
    qlb_cbw_add_dirty(&cbw, second, 16);
    assert_int_equal(cbw.n_todo, 5);
    assert_int_equal(cbw.todo[0], 0x07);
    assert_int_equal(cbw.todo[1], 0x81);
    expect_next(&cbw, units(3, 5), 9, QLB_CBW_GO, units(8, 0), units(0, 0));
    expect_next(&cbw, units(3, 6), 9, QLB_CBW_SAVE, units(8, 1), units(8, 1));
    free(bitmaps);
}

/* ---- the model ---- */

#define UNITS 3
#define CELLS 5 /* half units; the last unit has one */
#define CELL (32 * KIB)
#define WRITERS 3
#define AT_T(cell) ((uint8_t)(0xa0 + (cell)))

/* A rule of the protocol that is not kept. */
enum fault {
    NO_FAULT,
    FAULT_FREE_FIRST, /* set free before published */
    FAULT_WRITE_FIRST, /* the guest's write before saved */
    FAULT_NO_WAIT,
    FAULT_NO_MARK, /* the image never says that released ones go */
    FAULT_NO_WAKE,
    FAULT_BREAK_FIRST, /* before the image says so */
    FAULT_ORIG_FIRST, /* the reader reads the orig before the image */
    FAULT_NO_STATE, /* the reader doesn't look at the state at the end */
    FAULTS
};

enum failing { FAIL_NEVER, FAIL_REQUEST, FAIL_SNAPSHOT };

enum writer_at {
    W_ASK, W_BLOCKED, W_READ, W_DATA, W_PUBLISH, W_SAVED, W_MARK, W_MARKED,
    W_FAILED, W_BREAK, W_BROKEN, W_WRITE, W_WRITE_REST, W_DONE
};

/* It reads the cells before its middle, then the others; the same for the
 * units that the orig has. */
enum reader_at {
    R_IMAGE, R_IMAGE_REST, R_ORIG, R_ORIG_REST, R_STATE, R_DONE
};

enum other_at { X_FIRST, X_SECOND, X_DONE };

struct plan {
    struct {
        uint8_t first, count; /* cells */
        uint8_t max_units;
        uint8_t failing; /* its first save */
    } writers[WRITERS];
    unsigned n_writers;
    uint8_t release_first, release_count; /* cells */
    bool releases, breaks;
    uint8_t dirty; /* the units of the set */
    enum fault fault;
};

struct writer {
    uint8_t at, asked, failures, published;
    uint8_t first, count; /* units left */
    uint8_t part_first, part_count;
    uint8_t copy[CELLS];
};

/* Copied as it is, and compared by its bytes: so it is cleared at first. */
struct model {
    struct qlb_cbw cbw;
    uint8_t bitmaps[3];
    uint8_t image[CELLS], orig[CELLS];
    uint8_t has_original, client_has; /* units, as bits */
    bool image_overwritten, image_broken;
    struct writer writers[WRITERS];
    uint8_t releaser, breaker, reader;
    uint8_t seen[CELLS], seen_orig;
};

static struct {
    struct plan plan;
    uint64_t *known; /* hashes of states; 0: none */
    uint64_t n_states, n_leaves;
} search;

#define KNOWN_SIZE (UINT64_C(1) << 22)

static unsigned first_cell(unsigned unit)
{
    return 2 * unit;
}

static unsigned end_cell(unsigned unit)
{
    return 2 * unit + 2 < CELLS ? 2 * unit + 2 : CELLS;
}

static void use_own_bitmaps(struct model *m)
{
    m->cbw.todo = &m->bitmaps[0];
    m->cbw.busy = &m->bitmaps[1];
    m->cbw.released = &m->bitmaps[2];
}

static void begin(struct model *m)
{
    const struct plan *plan = &search.plan;

    memset(m, 0, sizeof(*m));
    qlb_cbw_init(&m->cbw, CELLS * CELL, 16, m->bitmaps);
    qlb_cbw_add_dirty(&m->cbw, &plan->dirty, 16);
    for (unsigned i = 0; i < CELLS; i++) {
        m->image[i] = AT_T(i);
    }
    for (unsigned i = 0; i < plan->n_writers; i++) {
        struct qlb_units u = qlb_cbw_units_of(
            &m->cbw, plan->writers[i].first * CELL,
            plan->writers[i].count * CELL);

        m->writers[i].first = (uint8_t)u.first;
        m->writers[i].count = (uint8_t)u.count;
    }
    m->releaser = plan->releases ? X_FIRST : X_DONE;
    m->breaker = plan->breaks ? X_FIRST : X_DONE;
}

/* ---- steps of a guest write: NULL or what is wrong ---- */

static void wake_all(struct model *m)
{
    for (unsigned i = 0; i < WRITERS; i++) {
        if (m->writers[i].at == W_BLOCKED) {
            m->writers[i].at = W_ASK;
        }
    }
}

static const char *ask(struct model *m, unsigned i)
{
    struct writer *w = &m->writers[i];
    struct qlb_units left = { w->first, w->count }, part = { 0, 0 };
    bool free_to_go = qlb_cbw_free_to_go(&m->cbw, left);
    enum qlb_cbw_step step = qlb_cbw_next(
        &m->cbw, &left, search.plan.writers[i].max_units, &part);

    if (free_to_go != (step == QLB_CBW_GO)) {
        return "free_to_go and next disagree";
    }
    if (++w->asked > 20) {
        return "a request asks for ever";
    }
    w->first = (uint8_t)left.first;
    w->count = (uint8_t)left.count;
    w->part_first = (uint8_t)part.first;
    w->part_count = (uint8_t)part.count;
    switch (step) {
    case QLB_CBW_GO:
        w->at = W_WRITE;
        break;
    case QLB_CBW_SAVE:
        w->at = W_READ;
        break;
    case QLB_CBW_WAIT:
        w->at = search.plan.fault == FAULT_NO_WAIT ? W_WRITE : W_BLOCKED;
        break;
    case QLB_CBW_MARK:
        w->at = search.plan.fault == FAULT_NO_MARK ? W_MARKED : W_MARK;
        break;
    }
    return NULL;
}

static struct qlb_units part_of(const struct writer *w)
{
    return units(w->part_first, w->part_count);
}

static void read_part(struct model *m, struct writer *w)
{
    unsigned from = first_cell(w->part_first);
    unsigned to = end_cell(w->part_first + w->part_count - 1u);

    memcpy(w->copy + from, m->image + from, to - from);
    w->at = W_DATA;
}

static void write_orig_data(struct writer *w, const struct plan *plan,
                            unsigned i)
{
    if (plan->writers[i].failing != FAIL_NEVER && w->failures == 0) {
        w->failures++;
        w->at = plan->writers[i].failing == FAIL_REQUEST ? W_FAILED : W_BREAK;
    } else {
        w->at = plan->fault == FAULT_FREE_FIRST ? W_SAVED : W_PUBLISH;
    }
}

/* One entry at a time: the write of several can be seen half done. */
static const char *publish_one(struct model *m, struct writer *w)
{
    unsigned unit = w->part_first + w->published;
    unsigned from = first_cell(unit), to = end_cell(unit);

    if (m->has_original >> unit & 1) {
        return "a unit is saved twice";
    }
    m->has_original |= (uint8_t)(1u << unit);
    memcpy(m->orig + from, w->copy + from, to - from);
    if (++w->published == w->part_count) {
        w->published = 0;
        memset(w->copy, 0, sizeof(w->copy));
        w->at = search.plan.fault == FAULT_FREE_FIRST ? W_ASK : W_SAVED;
    }
    return NULL;
}

static void saved(struct model *m, struct writer *w)
{
    qlb_cbw_saved(&m->cbw, part_of(w));
    w->at = search.plan.fault == FAULT_FREE_FIRST ? W_PUBLISH : W_ASK;
    wake_all(m);
}

static void failed(struct model *m, struct writer *w)
{
    bool broken = w->at == W_BROKEN;

    memset(w->copy, 0, sizeof(w->copy));
    if (broken) {
        qlb_cbw_break(&m->cbw);
    }
    qlb_cbw_failed(&m->cbw, part_of(w));
    w->at = broken ? W_ASK : W_DONE;
    if (search.plan.fault != FAULT_NO_WAKE) {
        wake_all(m);
    }
}

/* What must be true before the guest's write reaches a unit. */
static bool may_change(const struct model *m, unsigned unit)
{
    return !(search.plan.dirty >> unit & 1) || m->image_broken ||
           (m->has_original >> unit & 1) ||
           ((m->client_has >> unit & 1) && m->image_overwritten);
}

static const char *write_half(struct model *m, unsigned i)
{
    struct writer *w = &m->writers[i];
    unsigned first = search.plan.writers[i].first;
    unsigned end = first + search.plan.writers[i].count;
    unsigned middle = (first + end + 1) / 2;
    bool rest = w->at == W_WRITE_REST;

    for (unsigned c = rest ? middle : first; c < (rest ? end : middle); c++) {
        if (!may_change(m, c / 2)) {
            return "a unit changes whose original is nowhere";
        }
        m->image[c] = (uint8_t)(i + 1);
    }
    w->at = rest ? W_DONE : W_WRITE_REST;
    return NULL;
}

static const char *step_writer(struct model *m, unsigned i)
{
    struct writer *w = &m->writers[i];

    switch ((enum writer_at)w->at) {
    case W_ASK:
        return ask(m, i);
    case W_READ:
        if (search.plan.fault == FAULT_WRITE_FIRST) {
            w->at = W_WRITE;
            break;
        }
        read_part(m, w);
        break;
    case W_DATA:
        write_orig_data(w, &search.plan, i);
        break;
    case W_PUBLISH:
        return publish_one(m, w);
    case W_SAVED:
        saved(m, w);
        break;
    case W_MARK:
        m->image_overwritten = true;
        w->at = W_MARKED;
        break;
    case W_MARKED:
        qlb_cbw_marked(&m->cbw);
        w->at = W_ASK;
        break;
    case W_BREAK:
        m->image_broken = true;
        w->at = W_BROKEN;
        break;
    case W_FAILED:
    case W_BROKEN:
        failed(m, w);
        break;
    case W_WRITE:
    case W_WRITE_REST:
        return write_half(m, i);
    case W_BLOCKED:
    case W_DONE:
        break;
    }
    return NULL;
}

/* ---- steps of the others ---- */

static const char *step_releaser(struct model *m)
{
    unsigned first = search.plan.release_first;
    unsigned end = first + search.plan.release_count;
    uint64_t expected = 0;

    for (unsigned unit = 0; unit < UNITS; unit++) {
        if (first_cell(unit) >= first && end_cell(unit) <= end) {
            m->client_has |= (uint8_t)(1u << unit);
            expected += (m->bitmaps[0] & ~m->bitmaps[1]) >> unit & 1;
        }
    }
    m->releaser = X_DONE;
    if (qlb_cbw_release(&m->cbw, first * CELL, (end - first) * CELL) !=
        expected) {
        return "not the units that lie in the range are released";
    }
    return NULL;
}

static const char *step_breaker(struct model *m)
{
    bool image = m->breaker == X_FIRST;

    if (search.plan.fault == FAULT_BREAK_FIRST) {
        image = !image;
    }
    if (image) {
        m->image_broken = true;
    } else {
        qlb_cbw_break(&m->cbw);
        wake_all(m);
    }
    m->breaker++;
    return NULL;
}

static void reader_takes(struct model *m, bool orig, bool rest)
{
    for (unsigned c = rest ? 3 : 0; c < (rest ? CELLS : 3); c++) {
        if (!orig && !(m->seen_orig >> (c / 2) & 1)) {
            m->seen[c] = m->image[c];
        }
    }
    for (unsigned unit = rest ? 1 : 0; orig && unit < (rest ? UNITS : 1);
         unit++) {
        if (m->has_original >> unit & 1) {
            unsigned from = first_cell(unit);

            m->seen_orig |= (uint8_t)(1u << unit);
            memcpy(m->seen + from, m->orig + from, end_cell(unit) - from);
        }
    }
}

/* A unit that was released is none of the reader's business: its client has
 * it. Those that are not in the set it does not read. */
static const char *check_seen(const struct model *m, const uint8_t *seen)
{
    for (unsigned c = 0; c < CELLS; c++) {
        unsigned needed = search.plan.dirty & ~(unsigned)m->client_has;

        if ((needed >> (c / 2) & 1) && seen[c] != AT_T(c)) {
            return "a reader finds something else than what was at T";
        }
    }
    return NULL;
}

static const char *step_reader(struct model *m)
{
    bool swapped = search.plan.fault == FAULT_ORIG_FIRST;

    switch ((enum reader_at)m->reader++) {
    case R_IMAGE:
        reader_takes(m, swapped, false);
        break;
    case R_IMAGE_REST:
        reader_takes(m, swapped, true);
        break;
    case R_ORIG:
        reader_takes(m, !swapped, false);
        break;
    case R_ORIG_REST:
        reader_takes(m, !swapped, true);
        break;
    case R_STATE:
        if (!m->image_broken || search.plan.fault == FAULT_NO_STATE) {
            const char *wrong = check_seen(m, m->seen);

            if (wrong != NULL) {
                return wrong;
            }
        }
        /* what it saw matters no more: fewer states */
        memset(m->seen, 0, sizeof(m->seen));
        m->seen_orig = 0;
        break;
    case R_DONE:
        break;
    }
    return NULL;
}

/* ---- the search ---- */

/* Those who can act: writers, then releaser, breaker, reader. */
enum { RELEASER = WRITERS, BREAKER, READER, ACTORS };

static bool can_step(const struct model *m, unsigned actor)
{
    switch (actor) {
    case RELEASER:
        return m->releaser != X_DONE;
    case BREAKER:
        return m->breaker != X_DONE;
    case READER:
        return m->reader != R_DONE;
    default:
        return actor < search.plan.n_writers &&
               m->writers[actor].at != W_DONE &&
               m->writers[actor].at != W_BLOCKED;
    }
}

static const char *step(struct model *m, unsigned actor)
{
    switch (actor) {
    case RELEASER:
        return step_releaser(m);
    case BREAKER:
        return step_breaker(m);
    case READER:
        return step_reader(m);
    default:
        return step_writer(m, actor);
    }
}

static uint64_t ones(uint8_t bits)
{
    return (uint64_t)__builtin_popcount(bits);
}

/* What is true of the state machine at all times; free_to_go says the same as
 * next for every range. */
static const char *check_state(const struct model *m)
{
    uint8_t todo = m->bitmaps[0], busy = m->bitmaps[1];
    uint8_t released = m->bitmaps[2];

    if ((busy & ~todo) != 0 || (todo & released) != 0 || todo >> UNITS != 0 ||
        (released & ~m->client_has) != 0) {
        return "a unit is in no state";
    }
    if (m->cbw.n_todo != ones(todo) || m->cbw.n_busy != ones(busy) ||
        m->cbw.n_released != ones(released) ||
        m->cbw.n_todo + m->cbw.n_released + m->cbw.n_saved !=
            ones(search.plan.dirty)) {
        return "the counters are wrong";
    }
    for (unsigned first = 0; first < UNITS; first++) {
        for (unsigned end = first; end <= UNITS; end++) {
            struct qlb_units range = units(first, end - first), part;
            struct model copy = *m;

            use_own_bitmaps(&copy);
            if (qlb_cbw_free_to_go(&m->cbw, range) !=
                (qlb_cbw_next(&copy.cbw, &range, 1, &part) == QLB_CBW_GO)) {
                return "free_to_go and next disagree";
            }
        }
    }
    return NULL;
}

/* At the end: image and orig together still have T. */
static const char *check_leaf(const struct model *m)
{
    uint8_t seen[CELLS];

    search.n_leaves++;
    for (unsigned i = 0; i < search.plan.n_writers; i++) {
        if (m->writers[i].at == W_BLOCKED) {
            return "a request waits for ever";
        }
    }
    if (m->cbw.n_busy != 0) {
        return "a unit is left busy";
    }
    for (unsigned c = 0; c < CELLS; c++) {
        seen[c] = m->has_original >> (c / 2) & 1 ? m->orig[c] : m->image[c];
    }
    return m->image_broken ? NULL : check_seen(m, seen);
}

/* Whether the state is new; it is known from now on. */
static bool is_new(const struct model *m)
{
    struct model plain = *m;
    uint8_t bytes[(sizeof(plain) + 7) / 8 * 8] = { 0 };
    uint64_t hash = 1, word;

    plain.cbw.todo = plain.cbw.busy = plain.cbw.released = NULL;
    memcpy(bytes, &plain, sizeof(plain));
    for (size_t i = 0; i < sizeof(bytes); i += 8) {
        memcpy(&word, bytes + i, 8);
        hash = (hash ^ word) * UINT64_C(0x9e3779b97f4a7c15);
        hash ^= hash >> 29;
    }
    hash |= hash == 0;
    for (uint64_t i = hash % KNOWN_SIZE;; i = (i + 1) % KNOWN_SIZE) {
        if (search.known[i] == hash) {
            return false;
        }
        if (search.known[i] == 0) {
            search.known[i] = hash;
            return true;
        }
    }
}

static const char *explore(const struct model *m)
{
    const char *wrong = check_state(m);
    bool leaf = true;

    if (++search.n_states > KNOWN_SIZE / 2) {
        return "the model is too large";
    }
    for (unsigned actor = 0; actor < ACTORS && wrong == NULL; actor++) {
        struct model next;

        if (!can_step(m, actor)) {
            continue;
        }
        leaf = false;
        memcpy(&next, m, sizeof(next));
        use_own_bitmaps(&next);
        wrong = step(&next, actor);
        if (wrong == NULL && is_new(&next)) {
            wrong = explore(&next);
        }
    }
    return wrong == NULL && leaf ? check_leaf(m) : wrong;
}

static uint64_t total_states, total_leaves;

/* NULL, or what a first interleaving does wrong. */
static const char *run(const struct plan *plan)
{
    struct model m;
    const char *wrong;

    memset(&search, 0, sizeof(search));
    search.plan = *plan;
    search.known = calloc(KNOWN_SIZE, sizeof(uint64_t));
    assert_non_null(search.known);
    begin(&m);
    wrong = explore(&m);
    free(search.known);
    total_states += search.n_states;
    total_leaves += search.n_leaves;
    return wrong;
}

static void print_totals(void)
{
    print_message("# %llu states, %llu ends\n",
                  (unsigned long long)total_states,
                  (unsigned long long)total_leaves);
    total_states = total_leaves = 0;
}

static void run_good(const struct plan *plan, unsigned variant)
{
    const char *wrong = run(plan);

    if (wrong != NULL) {
        for (unsigned i = 0; i < plan->n_writers; i++) {
            print_error("write %u: cells %u + %u, %u units at once\n", i,
                        plan->writers[i].first, plan->writers[i].count,
                        plan->writers[i].max_units);
        }
        fail_msg("variant %u: %s", variant, wrong);
    }
}

/* ---- plans ---- */

/* Cells: inside a unit, unaligned over two, all but the first half, the part
 * at the end. */
static const uint8_t ranges[][2] = { { 0, 1 }, { 1, 2 }, { 1, 4 }, { 3, 2 } };
#define RANGES (sizeof(ranges) / sizeof(ranges[0]))

static void set_writer(struct plan *plan, unsigned i, unsigned range,
                       uint8_t max_units)
{
    plan->writers[i].first = ranges[range][0];
    plan->writers[i].count = ranges[range][1];
    plan->writers[i].max_units = max_units;
}

#define VARIANTS 8

static void set_variant(struct plan *plan, unsigned variant)
{
    plan->dirty = 0x7;
    plan->release_first = 1;
    plan->release_count = 4; /* units 1 and 2 */
    switch (variant) {
    case 0: /* no more than writes and a reader */
        break;
    case 1:
        plan->releases = true;
        break;
    case 2:
        plan->breaks = true;
        break;
    case 3:
        plan->writers[0].failing = FAIL_REQUEST;
        break;
    case 4:
        plan->writers[0].failing = FAIL_SNAPSHOT;
        break;
    case 5: /* all at once */
        plan->releases = true;
        plan->breaks = true;
        plan->writers[1].failing = FAIL_REQUEST;
        break;
    case 6: /* an incremental backup */
        plan->dirty = 0x5;
        plan->releases = true;
        plan->release_first = 0;
        plan->release_count = 2;
        break;
    case 7: /* a release of one that fails to be saved */
        plan->releases = true;
        plan->writers[0].failing = FAIL_SNAPSHOT;
        plan->writers[1].failing = FAIL_REQUEST;
        break;
    }
}

static void test_two_writes(void **state)
{
    (void)state;
    for (unsigned a = 0; a < RANGES; a++) {
        for (unsigned b = 0; b < RANGES; b++) {
            for (unsigned v = 0; v < VARIANTS; v++) {
                struct plan plan = { .n_writers = 2 };

                set_writer(&plan, 0, a, 1);
                set_writer(&plan, 1, b, 3);
                set_variant(&plan, v);
                run_good(&plan, v);
            }
        }
    }
    print_totals();
}

static void test_three_writes(void **state)
{
    static const uint8_t trios[][3] = {
        { 2, 2, 0 }, { 1, 2, 3 }, { 1, 1, 1 },
    };

    (void)state;
    for (size_t i = 0; i < sizeof(trios) / sizeof(trios[0]); i++) {
        for (unsigned v = 0; v < VARIANTS - 1; v++) {
            struct plan plan = { .n_writers = 3 };

            if (v == 5) {
                continue; /* too many states */
            }
            set_writer(&plan, 0, trios[i][0], 1);
            set_writer(&plan, 1, trios[i][1], 2);
            set_writer(&plan, 2, trios[i][2], 1);
            set_variant(&plan, v);
            run_good(&plan, v);
        }
    }
    print_totals();
}

/* Each broken rule is noticed: so the searches above mean something. */
static void test_broken_rules(void **state)
{
    static const struct {
        unsigned variant;
        const char *wrong;
    } cases[FAULTS] = {
        [FAULT_FREE_FIRST] = { 0, "a unit changes whose original is nowhere" },
        [FAULT_WRITE_FIRST] = { 0,
                                "a unit changes whose original is nowhere" },
        [FAULT_NO_WAIT] = { 0, "a unit changes whose original is nowhere" },
        [FAULT_NO_MARK] = { 1, "a unit changes whose original is nowhere" },
        [FAULT_NO_WAKE] = { 3, "a request waits for ever" },
        [FAULT_BREAK_FIRST] = { 2,
                                "a unit changes whose original is nowhere" },
        [FAULT_ORIG_FIRST] = {
            0, "a reader finds something else than what was at T" },
        [FAULT_NO_STATE] = {
            2, "a reader finds something else than what was at T" },
    };

    (void)state;
    for (unsigned fault = NO_FAULT + 1; fault < FAULTS; fault++) {
        struct plan plan = { .n_writers = 2, .fault = (enum fault)fault };
        const char *wrong;

        set_writer(&plan, 0, 2, 2);
        set_writer(&plan, 1, 2, 1);
        set_variant(&plan, cases[fault].variant);
        wrong = run(&plan);
        assert_non_null(wrong);
        assert_string_equal(wrong, cases[fault].wrong);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_units_of),
        cmocka_unit_test(test_saving),
        cmocka_unit_test(test_release),
        cmocka_unit_test(test_break),
        cmocka_unit_test(test_dirty),
        cmocka_unit_test(test_dirty_twice),
        cmocka_unit_test(test_two_writes),
        cmocka_unit_test(test_three_writes),
        cmocka_unit_test(test_broken_rules),
    };

    return cmocka_run_group_tests_name("cbw", tests, NULL, NULL);
}
