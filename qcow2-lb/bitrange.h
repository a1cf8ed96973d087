/* Ranges of bits, byte by byte: where whole bytes are loaded and stored
 * atomically. Internal to the library.
 *
 *     for (; count > 0; first += n, count -= n) {
 *         n = bitrange_front(first, count);
 *         ... bits[first / 8] and bitrange_mask(first, count) ...
 *     }
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_BITRANGE_H
#define QLB_BITRANGE_H

#include <stdint.h>

/* How many bits of the range are in byte first / 8. */
static inline uint64_t bitrange_front(uint64_t first, uint64_t count)
{
    uint64_t left = 8 - first % 8;

    return left < count ? left : count;
}

/* The bits of byte first / 8 that are in the range, which is not empty. */
static inline uint8_t bitrange_mask(uint64_t first, uint64_t count)
{
    unsigned ones = 0xffu >> (8 - bitrange_front(first, count));

    return (uint8_t)(ones << (first % 8));
}

#endif
