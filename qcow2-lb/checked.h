/* Arithmetic on numbers that come from a file: each returns false, and leaves
 * the result alone, where it would overflow.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_CHECKED_H
#define QLB_CHECKED_H

#include <stdbool.h>
#include <stdint.h>

static inline bool checked_add(uint64_t a, uint64_t b, uint64_t *sum)
{
    return !__builtin_add_overflow(a, b, sum);
}

static inline bool checked_mul(uint64_t a, uint64_t b, uint64_t *product)
{
    return !__builtin_mul_overflow(a, b, product);
}

/* Whether [offset, offset + length) lies within [0, size). */
static inline bool range_within(uint64_t offset, uint64_t length,
                                uint64_t size)
{
    return offset <= size && length <= size - offset;
}

static inline uint64_t div_round_up(uint64_t n, uint64_t d)
{
    return n / d + (n % d != 0);
}

/* alignment: a power of two; n at most 2^63 */
static inline uint64_t round_up(uint64_t n, uint64_t alignment)
{
    return (n + alignment - 1) & ~(alignment - 1);
}

static inline uint64_t round_down(uint64_t n, uint64_t alignment)
{
    return n & ~(alignment - 1);
}

static inline uint64_t min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline uint64_t max_u64(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

#endif
