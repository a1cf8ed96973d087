/* Bitmap algebra.
 *
 * Runs are searched 64 bits at a time: loaded as little-endian, bit n of the
 * word is bit n of the bitmap.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "bitmap.h"

#include <string.h>

#include "byteorder.h"

bool qlb_bit_test(const uint8_t *bits, uint64_t n)
{
    return bits[n / 8] >> (n % 8) & 1;
}

void qlb_bit_set(uint8_t *bits, uint64_t n)
{
    bits[n / 8] |= (uint8_t)(1u << (n % 8));
}

void qlb_bits_set(uint8_t *bits, uint64_t first, uint64_t count)
{
    uint64_t end = first + count;

    while (first < end && first % 8 != 0) {
        qlb_bit_set(bits, first++);
    }
    if (end - first >= 8) {
        memset(bits + first / 8, 0xff, (end - first) / 8);
        first = end & ~UINT64_C(7);
    }
    while (first < end) {
        qlb_bit_set(bits, first++);
    }
}

uint64_t qlb_bits_word(const uint8_t *bits, uint64_t n_bits, uint64_t n)
{
    uint64_t left = n_bits - n;
    uint8_t tail[8] = { 0 };

    if (left >= 64) {
        return get_le64(bits + n / 8);
    }
    memcpy(tail, bits + n / 8, (left + 7) / 8);
    return get_le64(tail) & ((UINT64_C(1) << left) - 1);
}

uint64_t qlb_bits_count(const uint8_t *bits, uint64_t n_bits)
{
    uint64_t count = 0;

    for (uint64_t n = 0; n < n_bits; n += 64) {
        count += (uint64_t)__builtin_popcountll(qlb_bits_word(bits, n_bits, n));
    }
    return count;
}

/* The first bit at or after `from` that differs from those in `skip` (all
 * zeroes or all ones). */
static uint64_t next_differing(const uint8_t *bits, uint64_t n_bits,
                               uint64_t from, uint64_t skip)
{
    uint64_t n = from & ~UINT64_C(63);
    uint64_t mask = ~UINT64_C(0) << (from % 64);

    if (from >= n_bits) {
        return n_bits;
    }
    for (; n < n_bits; n += 64, mask = ~UINT64_C(0)) {
        uint64_t word = (qlb_bits_word(bits, n_bits, n) ^ skip) & mask;

        if (word != 0) {
            uint64_t found = n + (uint64_t)__builtin_ctzll(word);

            return found < n_bits ? found : n_bits;
        }
    }
    return n_bits;
}

uint64_t qlb_bits_next_set(const uint8_t *bits, uint64_t n_bits,
                           uint64_t from)
{
    return next_differing(bits, n_bits, from, 0);
}

uint64_t qlb_bits_next_clear(const uint8_t *bits, uint64_t n_bits,
                             uint64_t from)
{
    return next_differing(bits, n_bits, from, ~UINT64_C(0));
}

void qlb_bits_or(uint8_t *to, const uint8_t *from, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        to[i] |= from[i];
    }
}

bool qlb_bits_all_zero(const void *data, size_t len)
{
    const uint8_t *p = data;

    /* Equal to itself shifted by one, and the first is zero: memcmp runs at
     * the speed of memory and stops at the first difference. */
    return len == 0 || (p[0] == 0 && memcmp(p, p + 1, len - 1) == 0);
}
