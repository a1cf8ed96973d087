/* The file that originals are saved in.
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

#include "byteorder.h"
#include "orig.h"

#define KIB UINT64_C(1024)
#define MIB (KIB * 1024)
#define GIB (MIB * 1024)
#define TIB (GIB * 1024)

#define EXTENSION_AT 104
#define DATA_AT 112
#define CRC_AT (DATA_AT + 4)
#define DATA_SIZE 96

/* The checksum written a second time, bit by bit. */
static uint32_t crc_of(uint8_t *header)
{
    uint32_t crc = UINT32_MAX;

    put_be32(header + CRC_AT, 0);
    for (size_t i = 0; i < DATA_SIZE; i++) {
        crc ^= header[DATA_AT + i];
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
        }
    }
    return ~crc;
}

static void fix_crc(uint8_t *header)
{
    put_be32(header + CRC_AT, crc_of(header));
}

static void make_orig(struct qlb_orig *orig, uint64_t size, unsigned bits)
{
    memset(orig, 0, sizeof(*orig));
    assert_true(qlb_orig_layout(orig, size, bits));
    for (unsigned i = 0; i < 16; i++) {
        orig->image_uuid.bytes[i] = (uint8_t)(0x10 + i);
        orig->set_uuid.bytes[i] = (uint8_t)(0x20 + i);
        orig->checkpoint_uuid.bytes[i] = (uint8_t)(0x30 + i);
        orig->parent_uuid.bytes[i] = (uint8_t)(0x50 + i);
    }
    orig->time = 0x4041424344454647;
}

/* ---- layout ---- */

static void test_layout(void **state)
{
    static const struct {
        uint64_t size;
        unsigned unit, cluster;
        uint32_t l1_entries;
        uint64_t l1, l2, data;
    } cases[] = {
        { 0, 16, 16, 1, 128 * KIB, 192 * KIB, 256 * KIB },
        { 1, 16, 16, 1, 128 * KIB, 192 * KIB, 256 * KIB },
        { 512, 16, 16, 1, 128 * KIB, 192 * KIB, 256 * KIB },
        /* 8192 entries of 64 KiB */
        { 512 * MIB, 16, 16, 1, 128 * KIB, 192 * KIB, 256 * KIB },
        { 512 * MIB + 1, 16, 16, 2, 128 * KIB, 192 * KIB, 320 * KIB },
        { 10 * GIB + 513, 16, 16, 21, 128 * KIB, 192 * KIB, 24 * 64 * KIB },
        /* 8192 entries fill a cluster of the L1 table */
        { 4 * TIB, 16, 16, 8192, 128 * KIB, 192 * KIB, 8195 * 64 * KIB },
        { 4 * TIB + 1, 16, 16, 8193, 128 * KIB, 256 * KIB, 8197 * 64 * KIB },
        { 16 * TIB, 16, 16, 32768, 128 * KIB, 384 * KIB, 32774 * 64 * KIB },
        { 16 * TIB, 18, 18, 2048, 512 * KIB, 768 * KIB, 2051 * 256 * KIB },
        { 1, 21, 21, 1, 4 * MIB, 6 * MIB, 8 * MIB },
        /* 262144 entries of 2 MiB */
        { 16 * TIB, 21, 21, 32, 4 * MIB, 6 * MIB, 70 * MIB },
        { 512 * GIB, 31, 21, 1, 4 * MIB, 6 * MIB, 8 * MIB },
        { 512 * GIB + 1, 31, 21, 2, 4 * MIB, 6 * MIB, 10 * MIB },
        /* 4 Mi entries are 32 MiB */
        { 2048 * TIB, 16, 16, 1 << 22, 128 * KIB, 128 * KIB + 32 * MIB,
          128 * KIB + 32 * MIB + 256 * GIB },
    };

    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct qlb_orig orig;

        assert_true(qlb_orig_layout(&orig, cases[i].size, cases[i].unit));
        assert_int_equal(orig.disk_size, cases[i].size);
        assert_int_equal(orig.unit_bits, cases[i].unit);
        assert_int_equal(orig.cluster_bits, cases[i].cluster);
        assert_int_equal(orig.l1_entries, cases[i].l1_entries);
        assert_int_equal(orig.l1_offset, cases[i].l1);
        assert_int_equal(orig.l2_offset, cases[i].l2);
        assert_int_equal(orig.data_offset, cases[i].data);
    }
}

static void test_no_layout(void **state)
{
    static const struct {
        uint64_t size;
        unsigned unit;
    } cases[] = {
        { 2048 * TIB + 1, 16 },
        { UINT64_MAX, 16 },
        { UINT64_C(1) << 56, 21 },
        { UINT64_C(1) << 61, 31 },
        { UINT64_MAX, 31 },
        { 1, 0 },
        { 1, 1 },
        { 1, 15 },
        { 1, 32 },
        { 1, 63 },
        { 1, UINT32_MAX },
    };

    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct qlb_orig orig;

        assert_false(qlb_orig_layout(&orig, cases[i].size, cases[i].unit));
    }
}

/* Offsets of 56 bits: 2^17 L2 tables of 2 MiB come before the data. */
static void test_largest_file(void **state)
{
    const uint64_t end = UINT64_C(1) << 56;
    struct qlb_orig orig;

    (void)state;
    assert_false(qlb_orig_layout(&orig, end - 256 * GIB, 21));
    assert_true(qlb_orig_layout(&orig, end - 257 * GIB, 21));
    assert_true(orig.data_offset <= 257 * GIB);
}

/* ---- header ---- */

/* A disk of 10 GiB + 513 bytes, by hand. */
static const uint8_t golden[QLB_ORIG_HEADER_SIZE] = {
    'Q', 'F', 'I', 0xfb, 0, 0, 0, 3, /* magic, version */
    0, 0, 0, 0, 0, 0, 0, 0, /* backing file */
    0, 0, 0, 0, 0, 0, 0, 16, /* its length, cluster bits */
    0, 0, 0, 2, 0x80, 0, 2, 1, /* size */
    0, 0, 0, 0, 0, 0, 0, 21, /* encryption, L1 entries */
    0, 0, 0, 0, 0, 2, 0, 0, /* L1 table */
    0, 0, 0, 0, 0, 1, 0, 0, /* refcount table */
    0, 0, 0, 1, 0, 0, 0, 0, /* its clusters, snapshots */
    0, 0, 0, 0, 0, 0, 0, 0, /* snapshot table */
    0, 0, 0, 0, 0, 0, 0, 1, /* incompatible: dirty */
    0, 0, 0, 0, 0, 0, 0, 0, /* compatible */
    0, 0, 0, 0, 0, 0, 0, 0, /* autoclear */
    0, 0, 0, 4, 0, 0, 0, 104, /* refcount order, header length */
    'L', 'B', 'O', 'R', 0, 0, 0, 96,
    0, 0, 0, 1, 0xf4, 0x67, 0x01, 0xae, /* version, checksum */
    0, 0, 0, 0, 0, 1, 0, 0, /* unit */
    0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, /* image */
    0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f,
    0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27, /* set */
    0x28, 0x29, 0x2a, 0x2b, 0x2c, 0x2d, 0x2e, 0x2f,
    0x30, 0x31, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37, /* checkpoint */
    0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x3e, 0x3f,
    0x40, 0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47, /* T */
    0x50, 0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57, /* parent */
    0x58, 0x59, 0x5a, 0x5b, 0x5c, 0x5d, 0x5e, 0x5f,
    0, 0, 0, 0, 0, 0, 0, 0, /* reserved */
    0, 0, 0, 0, 0, 0, 0, 0, /* end */
};

static void test_golden_header(void **state)
{
    uint8_t header[QLB_ORIG_HEADER_SIZE], expected[QLB_ORIG_HEADER_SIZE];
    struct qlb_orig orig, decoded;

    (void)state;
    make_orig(&orig, 10 * GIB + 513, 16);
    memset(header, 0xee, sizeof(header));
    qlb_orig_encode_header(&orig, header);
    assert_memory_equal(header, golden, sizeof(header));
    /* and the golden checksum is right by another computation */
    memcpy(expected, golden, sizeof(expected));
    assert_int_equal(crc_of(expected), get_be32(golden + CRC_AT));
    assert_int_equal(qlb_orig_decode_header(golden, sizeof(golden), &decoded),
                     QLB_ORIG_GOOD);
    assert_memory_equal(&decoded, &orig, sizeof(orig));
}

static void test_round_trip(void **state)
{
    static const uint64_t sizes[] = {
        0, 1, 512, 65537, 512 * MIB + 1, 3 * GIB, 16 * TIB, 16 * TIB + 511,
    };

    (void)state;
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        for (unsigned bits = 16; bits <= 31; bits++) {
            uint8_t header[QLB_ORIG_HEADER_SIZE];
            struct qlb_orig orig, decoded;

            make_orig(&orig, sizes[i], bits);
            qlb_orig_encode_header(&orig, header);
            assert_int_equal(qlb_orig_decode_header(header, sizeof(header),
                                                    &decoded),
                             QLB_ORIG_GOOD);
            assert_memory_equal(&decoded, &orig, sizeof(orig));
        }
    }
}

static void expect_verdict(const uint8_t *header,
                           enum qlb_orig_verdict expected)
{
    struct qlb_orig orig;

    assert_int_equal(qlb_orig_decode_header(header, QLB_ORIG_HEADER_SIZE,
                                            &orig), expected);
}

/* Every byte of the extension, to every other value. */
static void test_changed_bytes(void **state)
{
    (void)state;
    for (size_t i = EXTENSION_AT; i < QLB_ORIG_HEADER_SIZE; i++) {
        enum qlb_orig_verdict expected =
            i < EXTENSION_AT + 4                      ? QLB_ORIG_FOREIGN
            : i >= DATA_AT && i < DATA_AT + 4         ? QLB_ORIG_UNSUPPORTED
                                                      : QLB_ORIG_DAMAGED;

        for (unsigned change = 1; change < 256; change++) {
            uint8_t header[QLB_ORIG_HEADER_SIZE];

            memcpy(header, golden, sizeof(header));
            header[i] ^= (uint8_t)change;
            expect_verdict(header, expected);
        }
    }
}

/* The header's own bytes have no checksum, but follow from the size, which a
 * change within the same number of L1 entries can alter. */
static void test_changed_header(void **state)
{
    (void)state;
    for (size_t i = 0; i < EXTENSION_AT; i++) {
        for (unsigned bit = 0; bit < 8; bit++) {
            uint8_t header[QLB_ORIG_HEADER_SIZE];
            struct qlb_orig orig;
            bool good;

            memcpy(header, golden, sizeof(header));
            header[i] ^= (uint8_t)(1u << bit);
            good = qlb_orig_decode_header(header, sizeof(header), &orig) ==
                   QLB_ORIG_GOOD;
            assert_true(!good || (i >= 24 && i < 32));
            if (good) {
                assert_int_equal(orig.disk_size, get_be64(header + 24));
                assert_int_equal(orig.l1_entries, 21);
            }
        }
    }
}

/* Values that the checksum vouches for, and that are wrong. */
static void test_wrong_values(void **state)
{
    static const uint64_t units[] = {
        0, 1, 3, 65535, 65537, 32768, 3 << 16, UINT64_C(1) << 32,
        UINT64_C(1) << 63, UINT64_MAX, 1 << 17,
    };
    uint8_t header[QLB_ORIG_HEADER_SIZE];

    (void)state;
    for (size_t i = 0; i < sizeof(units) / sizeof(units[0]); i++) {
        memcpy(header, golden, sizeof(header));
        put_be64(header + DATA_AT + 8, units[i]);
        fix_crc(header);
        expect_verdict(header, QLB_ORIG_DAMAGED);
    }
    for (size_t i = DATA_AT + 88; i < DATA_AT + 96; i++) {
        memcpy(header, golden, sizeof(header));
        header[i] = 1;
        fix_crc(header);
        expect_verdict(header, QLB_ORIG_DAMAGED);
    }
    /* sizes that need another table, or no table can hold */
    memcpy(header, golden, sizeof(header));
    put_be64(header + 24, 11 * GIB);
    expect_verdict(header, QLB_ORIG_DAMAGED);
    put_be64(header + 24, UINT64_MAX);
    expect_verdict(header, QLB_ORIG_DAMAGED);
    put_be64(header + 24, 0);
    expect_verdict(header, QLB_ORIG_DAMAGED);
    /* the checksum of another version may be anything */
    memcpy(header, golden, sizeof(header));
    put_be32(header + DATA_AT, 2);
    put_be32(header + EXTENSION_AT + 4, 4);
    expect_verdict(header, QLB_ORIG_UNSUPPORTED);
}

/* With an allocation of just this size, so that a sanitizer sees more. */
static enum qlb_orig_verdict verdict_of(const void *data, size_t size)
{
    struct qlb_orig orig;
    enum qlb_orig_verdict verdict;
    void *copy = malloc(size + (size == 0));

    assert_non_null(copy);
    memcpy(copy, data, size);
    verdict = qlb_orig_decode_header(copy, size, &orig);
    free(copy);
    return verdict;
}

static void test_foreign(void **state)
{
    static const uint8_t zeroes[4096];
    uint8_t header[QLB_ORIG_HEADER_SIZE];

    (void)state;
    for (size_t size = 0; size < QLB_ORIG_HEADER_SIZE; size++) {
        assert_int_equal(verdict_of(golden, size), QLB_ORIG_FOREIGN);
    }
    assert_int_equal(verdict_of(zeroes, sizeof(zeroes)), QLB_ORIG_FOREIGN);
    /* a plain image of version 2: what follows is no extension of ours */
    memcpy(header, golden, sizeof(header));
    put_be32(header + 4, 2);
    expect_verdict(header, QLB_ORIG_FOREIGN);
    for (uint32_t length = 0; length < 2 * QLB_ORIG_HEADER_SIZE; length++) {
        if (length == EXTENSION_AT) {
            continue;
        }
        memcpy(header, golden, sizeof(header));
        put_be32(header + 100, length);
        assert_int_not_equal(verdict_of(header, sizeof(header)),
                             QLB_ORIG_GOOD);
    }
    put_be32(header + 100, UINT32_MAX);
    assert_int_equal(verdict_of(header, sizeof(header)), QLB_ORIG_FOREIGN);
}

/* A program that keeps what it doesn't know has rewritten the header: the file
 * remains one of ours, and is not as it was. */
static void test_moved_extension(void **state)
{
    uint8_t data[4096] = { 0 };
    uint8_t *moved = data + EXTENSION_AT + 8 + 48;

    (void)state;
    memcpy(data, golden, sizeof(golden));
    assert_int_equal(verdict_of(data, sizeof(data)), QLB_ORIG_GOOD);
    memset(data + EXTENSION_AT, 0, sizeof(data) - EXTENSION_AT);
    put_be32(data + EXTENSION_AT, 0x6803f857);
    put_be32(data + EXTENSION_AT + 4, 45); /* padded to 48 */
    memcpy(moved, golden + EXTENSION_AT, 8 + DATA_SIZE);
    assert_int_equal(verdict_of(data, sizeof(data)), QLB_ORIG_DAMAGED);
    put_be32(moved + 8, 7);
    assert_int_equal(verdict_of(data, sizeof(data)), QLB_ORIG_UNSUPPORTED);
    /* it begins at the very end of what was read */
    put_be32(data + EXTENSION_AT + 4, 3976);
    memcpy(data + 4088, golden + EXTENSION_AT, 8);
    assert_int_equal(verdict_of(data, sizeof(data)), QLB_ORIG_DAMAGED);
    /* behind the end marker nothing counts */
    memcpy(data, golden, sizeof(golden));
    memset(data + EXTENSION_AT, 0, 8);
    memcpy(data + EXTENSION_AT + 8, golden + EXTENSION_AT, 8 + DATA_SIZE);
    assert_int_equal(verdict_of(data, sizeof(data)), QLB_ORIG_FOREIGN);
    put_be32(data + EXTENSION_AT, 0x6803f857);
    /* lengths that lead out of the header, or past the end of numbers */
    put_be32(data + EXTENSION_AT + 4, 3984);
    assert_int_equal(verdict_of(data, sizeof(data)), QLB_ORIG_FOREIGN);
    put_be32(data + EXTENSION_AT + 4, UINT32_MAX);
    assert_int_equal(verdict_of(data, sizeof(data)), QLB_ORIG_FOREIGN);
}

/* ---- tables ---- */

static void test_l1(void **state)
{
    const uint8_t expected[32] = {
        0x80, 0, 0, 0, 0, 0x03, 0, 0, 0x80, 0, 0, 0, 0, 0x04, 0, 0,
        0x80, 0, 0, 0, 0, 0x05, 0, 0, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee,
        0xee, 0xee,
    };
    uint8_t entries[32], last[8];
    struct qlb_orig orig;

    (void)state;
    make_orig(&orig, 10 * GIB, 16);
    memset(entries, 0xee, sizeof(entries));
    qlb_orig_encode_l1(&orig, 0, 3, entries);
    assert_memory_equal(entries, expected, sizeof(expected));
    qlb_orig_encode_l1(&orig, 1, 1, entries);
    assert_memory_equal(entries, expected + 8, 8);
    /* the last table ends where the data begins, beyond 32 bits too */
    make_orig(&orig, 2048 * TIB, 16);
    qlb_orig_encode_l1(&orig, orig.l1_entries - 1, 1, last);
    assert_int_equal(get_be64(last),
                     UINT64_C(1) << 63 | (orig.data_offset - 64 * KIB));
}

static void test_entries_of_units(void **state)
{
    struct qlb_orig orig;

    (void)state;
    make_orig(&orig, 10 * GIB, 16);
    assert_int_equal(qlb_orig_entries_per_unit(&orig), 1);
    assert_int_equal(qlb_orig_entries_offset(&orig, 0), 192 * KIB);
    assert_int_equal(qlb_orig_entries_offset(&orig, 8192), 256 * KIB);
    assert_int_equal(qlb_orig_entries_offset(&orig, 10 * GIB / 65536 - 1),
                     orig.data_offset - 8);
    make_orig(&orig, 16 * TIB, 31);
    assert_int_equal(qlb_orig_entries_per_unit(&orig), 1024);
    assert_int_equal(qlb_orig_entries_offset(&orig, 1), 6 * MIB + 8 * KIB);
    assert_int_equal(qlb_orig_entries_offset(&orig, 8191),
                     orig.data_offset - 8 * KIB);
}

static void test_entries(void **state)
{
    const uint8_t zeroes[24] = { [7] = 1, [15] = 1, [23] = 1 };
    uint8_t entries[24];
    struct qlb_orig orig;

    (void)state;
    make_orig(&orig, 10 * GIB, 16);
    qlb_orig_encode_entries(&orig, 3, 1 * TIB, entries);
    for (unsigned i = 0; i < 3; i++) {
        uint64_t offset;

        assert_int_equal(get_be64(entries + 8 * i),
                         UINT64_C(1) << 63 | (TIB + i * 64 * KIB));
        assert_int_equal(qlb_orig_decode_entry(&orig, entries + 8 * i,
                                               &offset),
                         QLB_ORIG_ENTRY_DATA);
        assert_int_equal(offset, TIB + i * 64 * KIB);
    }
    qlb_orig_encode_entries(&orig, 3, QLB_ORIG_ZERO, entries);
    assert_memory_equal(entries, zeroes, sizeof(zeroes));
}

static void test_decode_entries(void **state)
{
    static const struct {
        uint64_t entry;
        enum qlb_orig_entry expected;
    } cases[] = {
        { 0, QLB_ORIG_ENTRY_NONE },
        { 1, QLB_ORIG_ENTRY_ZERO },
        { 0x8000000000180000, QLB_ORIG_ENTRY_DATA }, /* the first */
        { 0x80ffffffffff0000, QLB_ORIG_ENTRY_DATA },
        { 0x8000000000170000, QLB_ORIG_ENTRY_BAD }, /* an L2 table */
        { 0x8000000000000000, QLB_ORIG_ENTRY_BAD },
        { 0x8000000000000001, QLB_ORIG_ENTRY_BAD },
        { 0x8000000000180001, QLB_ORIG_ENTRY_BAD }, /* zero with a cluster */
        { 0x8000000000180002, QLB_ORIG_ENTRY_BAD },
        { 0x8000000000180100, QLB_ORIG_ENTRY_BAD },
        { 0x8000000000180200, QLB_ORIG_ENTRY_BAD }, /* not a whole cluster */
        { 0x8000000000188000, QLB_ORIG_ENTRY_BAD },
        { 0x0000000000180000, QLB_ORIG_ENTRY_BAD }, /* bit 63 is missing */
        { 0xc000000000180000, QLB_ORIG_ENTRY_BAD }, /* compressed */
        { 0x4000000000180000, QLB_ORIG_ENTRY_BAD },
        { 0x8100000000180000, QLB_ORIG_ENTRY_BAD },
        { 0xa000000000180000, QLB_ORIG_ENTRY_BAD },
        { 2, QLB_ORIG_ENTRY_BAD },
        { UINT64_MAX, QLB_ORIG_ENTRY_BAD },
    };
    struct qlb_orig orig;

    (void)state;
    make_orig(&orig, 10 * GIB + 513, 16);
    assert_int_equal(orig.data_offset, 0x180000);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        uint64_t offset = 77;
        uint8_t entry[8];

        put_be64(entry, cases[i].entry);
        assert_int_equal(qlb_orig_decode_entry(&orig, entry, &offset),
                         cases[i].expected);
        assert_int_equal(offset, cases[i].expected == QLB_ORIG_ENTRY_DATA
                                     ? cases[i].entry & ~(UINT64_C(1) << 63)
                                     : 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layout),
        cmocka_unit_test(test_no_layout),
        cmocka_unit_test(test_largest_file),
        cmocka_unit_test(test_golden_header),
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_changed_bytes),
        cmocka_unit_test(test_changed_header),
        cmocka_unit_test(test_wrong_values),
        cmocka_unit_test(test_foreign),
        cmocka_unit_test(test_moved_extension),
        cmocka_unit_test(test_l1),
        cmocka_unit_test(test_entries_of_units),
        cmocka_unit_test(test_entries),
        cmocka_unit_test(test_decode_entries),
    };

    return cmocka_run_group_tests_name("orig", tests, NULL, NULL);
}
