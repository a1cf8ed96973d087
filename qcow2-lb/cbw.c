/* Copy before write: which originals must be saved, and who saves them.
 *
 * The state of a unit is one bit in each of three bitmaps (see cbw.h). All is
 * written under the caller's lock; only qlb_cbw_free_to_go reads without it.
 * So the bytes of `todo` and `released`, and the two flags, are stored whole
 * and with release order, and it loads them with acquire. There is one writer
 * at a time, hence no read-modify-write needs to be atomic.
 *
 * A unit leaves `todo` last: what sets it free (the orig's entry, `released`)
 * is done before, so who finds the bit clear sees that too. No bit of `todo`
 * comes back once the guest writes: a "yes" stays right.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "cbw.h"

#include <string.h>

#include "bitmap.h"
#include "bitrange.h"
#include "byteorder.h"
#include "checked.h"

static uint8_t load_byte(const uint8_t *byte)
{
    return __atomic_load_n(byte, __ATOMIC_ACQUIRE);
}

static void store_byte(uint8_t *byte, uint8_t value)
{
    __atomic_store_n(byte, value, __ATOMIC_RELEASE);
}

static bool load_flag(const bool *flag)
{
    return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}

static void raise_flag(bool *flag)
{
    __atomic_store_n(flag, true, __ATOMIC_RELEASE);
}

static void clear_bits(uint8_t *bits, struct qlb_units units)
{
    uint64_t n;

    for (; units.count > 0; units.first += n, units.count -= n) {
        uint8_t *byte = &bits[units.first / 8];

        n = bitrange_front(units.first, units.count);
        store_byte(byte, (uint8_t)(*byte & ~bitrange_mask(units.first,
                                                          units.count)));
    }
}

/* ---- the set ---- */

unsigned qlb_cbw_unit_bits(unsigned granularity_bits, unsigned cluster_bits)
{
    uint64_t bits = max_u64(granularity_bits, cluster_bits);

    return (unsigned)max_u64(bits, QLB_CBW_MIN_UNIT_BITS);
}

size_t qlb_cbw_bitmap_size(uint64_t disk_size, unsigned unit_bits)
{
    uint64_t n_units = div_round_up(disk_size, UINT64_C(1) << unit_bits);

    return (size_t)div_round_up(n_units, 8);
}

void qlb_cbw_init(struct qlb_cbw *cbw, uint64_t disk_size, unsigned unit_bits,
                  uint8_t *bitmaps)
{
    size_t size = qlb_cbw_bitmap_size(disk_size, unit_bits);

    memset(cbw, 0, sizeof(*cbw));
    cbw->disk_size = disk_size;
    cbw->unit_bits = unit_bits;
    cbw->n_units = div_round_up(disk_size, UINT64_C(1) << unit_bits);
    cbw->todo = bitmaps;
    cbw->busy = bitmaps + size;
    cbw->released = bitmaps + 2 * size;
}

void qlb_cbw_add_all(struct qlb_cbw *cbw)
{
    qlb_bits_set(cbw->todo, 0, cbw->n_units);
    cbw->n_todo = cbw->n_units;
}

/* 64 bits to 32: each is the OR of two neighbours. */
static uint64_t halve(uint64_t word)
{
    word = (word | word >> 1) & UINT64_C(0x5555555555555555);
    word = (word | word >> 1) & UINT64_C(0x3333333333333333);
    word = (word | word >> 2) & UINT64_C(0x0f0f0f0f0f0f0f0f);
    word = (word | word >> 4) & UINT64_C(0x00ff00ff00ff00ff);
    word = (word | word >> 8) & UINT64_C(0x0000ffff0000ffff);
    return (word | word >> 16) & UINT64_C(0x00000000ffffffff);
}

/* Sets the bits of `word`, the lowest of which is bit n: those behind the byte
 * of n only if n is its first. */
static void or_word(uint8_t *bits, uint64_t n, uint64_t word)
{
    uint8_t *byte = &bits[n / 8];

    for (word <<= n % 8; word != 0; word >>= 8) {
        *byte++ |= (uint8_t)word;
    }
}

/* A unit has 2^shift granules, shift is 6 at most: a word of granules makes
 * 64 >> shift whole units. */
static void add_words(struct qlb_cbw *cbw, const uint8_t *dirty,
                      uint64_t n_granules, unsigned shift)
{
    for (uint64_t n = 0; n < n_granules; n += 64) {
        uint64_t word = qlb_bits_word(dirty, n_granules, n);

        for (unsigned i = 0; i < shift; i++) {
            word = halve(word);
        }
        or_word(cbw->todo, n >> shift, word);
    }
}

/* A unit has more than one word of granules. */
static void add_runs(struct qlb_cbw *cbw, const uint8_t *dirty,
                     uint64_t n_granules, unsigned shift)
{
    uint64_t n = 0;

    while ((n = qlb_bits_next_set(dirty, n_granules, n)) < n_granules) {
        qlb_bit_set(cbw->todo, n >> shift);
        n = ((n >> shift) + 1) << shift;
    }
}

void qlb_cbw_add_dirty(struct qlb_cbw *cbw, const uint8_t *dirty,
                       unsigned granularity_bits)
{
    unsigned shift = cbw->unit_bits - granularity_bits;
    uint64_t n_granules = div_round_up(cbw->disk_size,
                                       UINT64_C(1) << granularity_bits);

    if (shift <= 6) {
        add_words(cbw, dirty, n_granules, shift);
    } else {
        add_runs(cbw, dirty, n_granules, shift);
    }
    cbw->n_todo = qlb_bits_count(cbw->todo, cbw->n_units);
}

/* ---- writes ---- */

struct qlb_units qlb_cbw_units_of(const struct qlb_cbw *cbw, uint64_t offset,
                                  uint64_t bytes)
{
    struct qlb_units units = { 0, 0 };

    if (offset >= cbw->disk_size || bytes == 0) {
        return units;
    }
    bytes = min_u64(bytes, cbw->disk_size - offset);
    units.first = offset >> cbw->unit_bits;
    units.count = ((offset + bytes - 1) >> cbw->unit_bits) - units.first + 1;
    return units;
}

/* `released` is read after `todo`: where a unit that is clear in the one was
 * released, the other shows it. */
bool qlb_cbw_free_to_go(const struct qlb_cbw *cbw, struct qlb_units units)
{
    uint64_t n;

    if (load_flag(&cbw->broken)) {
        return true;
    }
    for (; units.count > 0; units.first += n, units.count -= n) {
        uint64_t byte = units.first / 8;
        uint8_t mask = bitrange_mask(units.first, units.count);

        if ((load_byte(&cbw->todo[byte]) & mask) != 0 ||
            ((load_byte(&cbw->released[byte]) & mask) != 0 &&
             !load_flag(&cbw->overwritten))) {
            return false;
        }
        n = bitrange_front(units.first, units.count);
    }
    return true;
}

/* The first unit of first to end - 1 that a write may not change yet, else
 * end. */
static uint64_t next_obstacle(const struct qlb_cbw *cbw, uint64_t first,
                              uint64_t end)
{
    if (cbw->broken) {
        return end;
    }
    /* the search for released ones need not go beyond the first of todo */
    end = qlb_bits_next_set(cbw->todo, end, first);
    return cbw->overwritten ? end
                            : qlb_bits_next_set(cbw->released, end, first);
}

enum qlb_cbw_step qlb_cbw_next(struct qlb_cbw *cbw, struct qlb_units *units,
                               uint64_t max_units, struct qlb_units *part)
{
    uint64_t end = units->first + units->count;
    uint64_t first = next_obstacle(cbw, units->first, end);

    units->first = first;
    units->count = end - first;
    if (first == end) {
        return QLB_CBW_GO;
    }
    if (!qlb_bit_test(cbw->todo, first)) {
        return QLB_CBW_MARK;
    }
    if (qlb_bit_test(cbw->busy, first)) {
        return QLB_CBW_WAIT;
    }
    end = first + min_u64(units->count, max_u64(max_units, 1));
    end = qlb_bits_next_clear(cbw->todo, end, first);
    end = qlb_bits_next_set(cbw->busy, end, first);
    part->first = first;
    part->count = end - first;
    qlb_bits_set(cbw->busy, part->first, part->count);
    cbw->n_busy += part->count;
    return QLB_CBW_SAVE;
}

void qlb_cbw_saved(struct qlb_cbw *cbw, struct qlb_units part)
{
    clear_bits(cbw->busy, part);
    clear_bits(cbw->todo, part);
    cbw->n_busy -= part.count;
    cbw->n_todo -= part.count;
    cbw->n_saved += part.count;
}

void qlb_cbw_failed(struct qlb_cbw *cbw, struct qlb_units part)
{
    clear_bits(cbw->busy, part);
    cbw->n_busy -= part.count;
}

void qlb_cbw_marked(struct qlb_cbw *cbw)
{
    raise_flag(&cbw->overwritten);
}

/* ---- release and break ---- */

/* The units that lie in the range as a whole. */
static struct qlb_units units_within(const struct qlb_cbw *cbw,
                                     uint64_t offset, uint64_t bytes)
{
    struct qlb_units units = { 0, 0 };
    uint64_t first, end;

    if (offset >= cbw->disk_size) {
        return units;
    }
    first = div_round_up(offset, UINT64_C(1) << cbw->unit_bits);
    end = bytes >= cbw->disk_size - offset
              ? cbw->n_units
              : (offset + bytes) >> cbw->unit_bits;
    if (first < end) {
        units.first = first;
        units.count = end - first;
    }
    return units;
}

uint64_t qlb_cbw_release(struct qlb_cbw *cbw, uint64_t offset, uint64_t bytes)
{
    struct qlb_units units = units_within(cbw, offset, bytes);
    uint64_t n, released = 0;

    for (; units.count > 0; units.first += n, units.count -= n) {
        uint64_t byte = units.first / 8;
        uint8_t bits = cbw->todo[byte] & (uint8_t)~cbw->busy[byte] &
                       bitrange_mask(units.first, units.count);

        if (bits != 0) {
            store_byte(&cbw->released[byte], cbw->released[byte] | bits);
            store_byte(&cbw->todo[byte], cbw->todo[byte] & (uint8_t)~bits);
            released += (uint64_t)__builtin_popcount(bits);
        }
        n = bitrange_front(units.first, units.count);
    }
    cbw->n_todo -= released;
    cbw->n_released += released;
    return released;
}

void qlb_cbw_break(struct qlb_cbw *cbw)
{
    raise_flag(&cbw->broken);
}
