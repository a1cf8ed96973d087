/* Bitmap algebra against a model with one byte for each bit.
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

#include "bitmap.h"

enum { BITS = 517 };

static uint32_t seed;

static uint32_t next_random(void)
{
    seed = seed * 1664525u + 1013904223u;
    return seed >> 8;
}

/* Runs of random length of random value, so that long runs occur. */
static void fill(uint8_t *bits, uint8_t *model)
{
    memset(bits, 0, BITS / 8 + 1);
    memset(model, 0, BITS);
    for (unsigned n = 0; n < BITS;) {
        unsigned length = 1 + next_random() % 150;

        if (length > BITS - n) {
            length = BITS - n;
        }
        if (next_random() % 2) {
            qlb_bits_set(bits, n, length);
            memset(model + n, 1, length);
        }
        n += length;
    }
    /* What lies behind the end must not be looked at. */
    bits[BITS / 8] |= (uint8_t)(0xff << BITS % 8);
}

static uint64_t model_next(const uint8_t *model, unsigned from, uint8_t value)
{
    while (from < BITS && model[from] != value) {
        from++;
    }
    return from;
}

static void test_against_model(void **state)
{
    uint8_t bits[BITS / 8 + 1], model[BITS];

    (void)state;
    for (seed = 1; seed < 200; seed++) {
        uint64_t count = 0;

        fill(bits, model);
        for (unsigned n = 0; n < BITS; n++) {
            count += model[n];
            assert_int_equal(qlb_bit_test(bits, n), model[n]);
            assert_int_equal(qlb_bits_next_set(bits, BITS, n),
                             model_next(model, n, 1));
            assert_int_equal(qlb_bits_next_clear(bits, BITS, n),
                             model_next(model, n, 0));
        }
        assert_int_equal(qlb_bits_count(bits, BITS), count);
        assert_int_equal(qlb_bits_next_set(bits, BITS, BITS + 5), BITS);
    }
}

static void test_or(void **state)
{
    uint8_t to[5] = { 1, 2, 0, 0x80, 7 };
    const uint8_t from[5] = { 2, 2, 0, 0x01, 8 };
    const uint8_t expected[5] = { 3, 2, 0, 0x81, 7 };

    (void)state;
    qlb_bits_or(to, from, 4);
    assert_memory_equal(to, expected, sizeof(expected));
}

static void test_all_zero(void **state)
{
    uint8_t data[300] = { 0 };

    (void)state;
    assert_true(qlb_bits_all_zero(data, 0));
    assert_true(qlb_bits_all_zero(data, sizeof(data)));
    for (unsigned i = 0; i < sizeof(data); i++) {
        data[i] = 1;
        assert_false(qlb_bits_all_zero(data, sizeof(data)));
        assert_true(qlb_bits_all_zero(data, i));
        data[i] = 0;
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_model),
        cmocka_unit_test(test_or),
        cmocka_unit_test(test_all_zero),
    };

    return cmocka_run_group_tests_name("bitmap", tests, NULL, NULL);
}
