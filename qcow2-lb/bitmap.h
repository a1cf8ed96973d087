/* Bitmap algebra: bits in the order of the qcow2 standard bitmaps (bit n is
 * bit n % 8, counted from the least significant, of byte n / 8).
 *
 * Part of libqcow2lb-core: libc only, no allocation.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_BITMAP_H
#define QLB_BITMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

bool qlb_bit_test(const uint8_t *bits, uint64_t n);
void qlb_bit_set(uint8_t *bits, uint64_t n);

/* Sets the bits first .. first + count - 1. */
void qlb_bits_set(uint8_t *bits, uint64_t first, uint64_t count);

/* Number of set bits among the first n_bits. */
uint64_t qlb_bits_count(const uint8_t *bits, uint64_t n_bits);

/* The first bit at or after `from` that is set (clear); n_bits if none is. */
uint64_t qlb_bits_next_set(const uint8_t *bits, uint64_t n_bits,
                           uint64_t from);
uint64_t qlb_bits_next_clear(const uint8_t *bits, uint64_t n_bits,
                             uint64_t from);

/* The 64 bits from bit n (a multiple of 64, below n_bits) on, the lowest first;
 * those behind the end are clear. */
uint64_t qlb_bits_word(const uint8_t *bits, uint64_t n_bits, uint64_t n);

/* to |= from, len bytes. */
void qlb_bits_or(uint8_t *to, const uint8_t *from, size_t len);

/* Whether len bytes are all zero. */
bool qlb_bits_all_zero(const void *data, size_t len);

#endif
