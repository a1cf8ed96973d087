/* The livebackup extension and the trust rules.
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

#include "bitmap_ext.h"
#include "byteorder.h"

#define CRC_AT 4
#define RECORDS_AT 128
#define RECORD 64

/* The checksum written a second time, bit by bit. */
static void fix_crc(uint8_t *data)
{
    uint32_t crc = UINT32_MAX;

    put_be32(data + CRC_AT, 0);
    for (size_t i = 0; i < QLB_EXT_SIZE; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
        }
    }
    put_be32(data + CRC_AT, ~crc);
}

static void make_checkpoint(struct qlb_checkpoint *cp, uint8_t number,
                            const char *label, bool confirmed)
{
    memset(cp, 0, sizeof(*cp));
    memset(cp->uuid.bytes, number, sizeof(cp->uuid.bytes));
    cp->time = 1700000000 + number;
    cp->virtual_size = (uint64_t)number << 30;
    memset(cp->root, number, sizeof(cp->root));
    cp->confirmed = confirmed;
    strcpy(cp->label, label);
}

static void make_ext(struct qlb_ext *ext, unsigned n)
{
    memset(ext, 0, sizeof(*ext));
    ext->flags = QLB_EXT_SYNC;
    ext->state = QLB_STATE_INTERRUPTED;
    ext->released = true;
    ext->granularity_bits = 16;
    ext->generation = 0x0102030405060708;
    memset(ext->image_uuid.bytes, 0xa1, 16);
    memset(ext->boot_id, 0xa2, 16);
    ext->device = 0x1112131415161718;
    ext->backing_digest = 2;
    ext->backing_stat_digest = 3;
    ext->data_file_stat_digest = 4;
    memset(ext->set_uuid.bytes, 0xa3, 16);
    ext->begin_time = 5;
    ext->n_checkpoints = n;
    for (unsigned i = 0; i < n; i++) {
        make_checkpoint(&ext->checkpoints[i], (uint8_t)(i + 1),
                        i % 2 ? "weekly.offsite_22bytes" : "m", i % 3 == 0);
    }
}

/* ---- encoding ---- */

static void test_round_trip(void **state)
{
    uint8_t data[QLB_EXT_SIZE], again[QLB_EXT_SIZE];
    struct qlb_ext ext, decoded;

    (void)state;
    for (unsigned n = 0; n <= QLB_MAX_CHECKPOINTS; n++) {
        make_ext(&ext, n);
        qlb_ext_encode(&ext, data);
        assert_int_equal(qlb_ext_decode(data, sizeof(data), &decoded),
                         QLB_EXT_GOOD);
        assert_memory_equal(&decoded, &ext, sizeof(ext));
        qlb_ext_encode(&decoded, again);
        assert_memory_equal(again, data, sizeof(data));
    }
}

/* The places of livebackup-extension.md, one by one. */
static void test_layout(void **state)
{
    uint8_t data[QLB_EXT_SIZE], copy[QLB_EXT_SIZE];
    const uint8_t *record = data + RECORDS_AT + RECORD;
    struct qlb_ext ext;

    (void)state;
    make_ext(&ext, 2);
    qlb_ext_encode(&ext, data);
    assert_int_equal(get_be32(data), 1);
    assert_int_equal(get_be32(data + 8), 1);
    assert_int_equal(data[12], 2);
    assert_int_equal(data[13], 1);
    assert_int_equal(get_be16(data + 14), 2);
    assert_int_equal(get_be32(data + 16), 16);
    assert_int_equal(get_be64(data + 24), 0x0102030405060708);
    assert_int_equal(data[32], 0xa1);
    assert_int_equal(data[48], 0xa2);
    assert_int_equal(get_be64(data + 64), 0x1112131415161718);
    assert_int_equal(get_be64(data + 72), 2);
    assert_int_equal(get_be64(data + 80), 3);
    assert_int_equal(get_be64(data + 88), 4);
    assert_int_equal(data[111], 0xa3);
    assert_int_equal(get_be64(data + 112), 5);
    assert_int_equal(record[0], 2);
    assert_int_equal(get_be64(record + 16), 1700000002);
    assert_int_equal(get_be64(record + 24), UINT64_C(2) << 30);
    assert_int_equal(record[39], 2);
    assert_int_equal(get_be16(record + 40), 0);
    assert_memory_equal(record + 42, "weekly.offsite_22bytes", 22);
    memcpy(copy, data, sizeof(data));
    fix_crc(copy);
    assert_memory_equal(copy, data, sizeof(data));
}

/* Any byte that changes without the checksum is found. */
static void test_each_byte(void **state)
{
    uint8_t data[QLB_EXT_SIZE];
    struct qlb_ext ext, decoded;

    (void)state;
    make_ext(&ext, 3);
    qlb_ext_encode(&ext, data);
    for (size_t i = 0; i < sizeof(data); i++) {
        for (unsigned bit = 0; bit < 8; bit++) {
            data[i] ^= (uint8_t)(1 << bit);
            assert_int_equal(qlb_ext_decode(data, sizeof(data), &decoded),
                             i < 4 ? QLB_EXT_UNSUPPORTED : QLB_EXT_DAMAGED);
            data[i] ^= (uint8_t)(1 << bit);
        }
    }
    assert_int_equal(qlb_ext_decode(data, sizeof(data), &decoded),
                     QLB_EXT_GOOD);
}

static void test_lengths(void **state)
{
    uint8_t data[QLB_EXT_SIZE + 8] = { 0 };
    struct qlb_ext ext, decoded;

    (void)state;
    make_ext(&ext, 3);
    qlb_ext_encode(&ext, data);
    for (size_t size = 0; size <= sizeof(data); size++) {
        assert_int_equal(qlb_ext_decode(data, size, &decoded),
                         size == QLB_EXT_SIZE ? QLB_EXT_GOOD
                                              : QLB_EXT_DAMAGED);
    }
}

/* Values out of range, each with a good checksum. */
static void test_bad_values(void **state)
{
    static const struct { size_t at; uint8_t value; } bad[] = {
        { 8, 1 }, { 11, 4 },                    /* flags */
        { 12, 4 }, { 13, 2 },                   /* state, released */
        { 14, 1 }, { 15, 33 },                  /* number */
        { 19, 8 }, { 19, 32 }, { 16, 1 },       /* granularity */
        { 20, 1 }, { 23, 1 }, { 120, 1 }, { 127, 1 }, /* reserved */
        { RECORDS_AT + 40, 1 }, { RECORDS_AT + 41, 2 }, /* record flags */
        { RECORDS_AT + 42, 0 },                 /* label: empty */
        { RECORDS_AT + 42, '/' }, { RECORDS_AT + 42, 0xe4 },
        { RECORDS_AT + 45, 'x' },               /* behind its end */
        { RECORDS_AT + 63, 'x' },
        { RECORDS_AT + 3 * RECORD, 1 },         /* behind the last record */
        { QLB_EXT_SIZE - 1, 1 },
    };
    uint8_t data[QLB_EXT_SIZE];
    struct qlb_ext ext, decoded;

    (void)state;
    make_ext(&ext, 3);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        qlb_ext_encode(&ext, data);
        data[bad[i].at] = bad[i].value;
        fix_crc(data);
        assert_int_equal(qlb_ext_decode(data, sizeof(data), &decoded),
                         QLB_EXT_DAMAGED);
    }
    qlb_ext_encode(&ext, data);
    memset(data + RECORDS_AT, 0, 16);   /* UUID zero */
    fix_crc(data);
    assert_int_equal(qlb_ext_decode(data, sizeof(data), &decoded),
                     QLB_EXT_DAMAGED);
    memset(data + RECORDS_AT, 2, 16);   /* that of the next */
    fix_crc(data);
    assert_int_equal(qlb_ext_decode(data, sizeof(data), &decoded),
                     QLB_EXT_DAMAGED);
}

/* ---- the list ---- */

static void test_labels(void **state)
{
    (void)state;
    assert_true(qlb_label_valid("m"));
    assert_true(qlb_label_valid("Az09._-"));
    assert_true(qlb_label_valid("1234567890123456789012"));
    assert_false(qlb_label_valid("12345678901234567890123"));
    assert_false(qlb_label_valid(""));
    assert_false(qlb_label_valid("a b"));
    assert_false(qlb_label_valid("\xc3\xa4"));
}

static void test_names(void **state)
{
    char name[QLB_BITMAP_NAME_SIZE];
    struct qlb_uuid uuid;

    (void)state;
    assert_true(qlb_uuid_parse("01234567-89AB-4cde-8f01-23456789abcd", &uuid));
    qlb_bitmap_name(&uuid, name);
    assert_string_equal(name, "lb-01234567-89ab-4cde-8f01-23456789abcd");
    assert_true(qlb_bitmap_name_is_ours(name, strlen(name)));
    assert_true(qlb_bitmap_name_is_ours("lb-", 3));
    assert_false(qlb_bitmap_name_is_ours("lb-", 2));
    assert_false(qlb_bitmap_name_is_ours("LB-x", 4));
}

static void test_list(void **state)
{
    struct qlb_ext ext;
    struct qlb_uuid third;

    (void)state;
    make_ext(&ext, 0);
    assert_int_equal(qlb_ext_foldable(&ext, -1), -1);
    assert_int_equal(qlb_ext_newest_confirmed(&ext, "a"), -1);
    ext.n_checkpoints = 5;
    make_checkpoint(&ext.checkpoints[0], 1, "b", true);
    make_checkpoint(&ext.checkpoints[1], 2, "a", true);
    make_checkpoint(&ext.checkpoints[2], 3, "a", true);
    make_checkpoint(&ext.checkpoints[3], 4, "a", false);
    make_checkpoint(&ext.checkpoints[4], 5, "c", false);
    third = ext.checkpoints[2].uuid;
    assert_int_equal(qlb_ext_newest_confirmed(&ext, "a"), 2);
    assert_int_equal(qlb_ext_newest_confirmed(&ext, "b"), 0);
    assert_int_equal(qlb_ext_newest_confirmed(&ext, "c"), -1);
    /* 0 is the newest confirmed one of its label, 1 is not. */
    assert_int_equal(qlb_ext_foldable(&ext, -1), 1);
    assert_int_equal(qlb_ext_foldable(&ext, 1), 3);
    assert_int_equal(qlb_ext_find(&ext, &third), 2);
    qlb_ext_remove(&ext, 1);
    assert_int_equal(ext.n_checkpoints, 4);
    assert_int_equal(qlb_ext_find(&ext, &third), 1);
    assert_int_equal(qlb_ext_foldable(&ext, -1), 2);
    qlb_ext_remove(&ext, 2);
    qlb_ext_remove(&ext, 2);
    assert_int_equal(qlb_ext_foldable(&ext, -1), -1);
    qlb_ext_remove(&ext, 2);
    assert_int_equal(ext.n_checkpoints, 2);
}

/* ---- digests and canaries ---- */

static void test_digests(void **state)
{
    (void)state;
    /* The published test vectors of FNV-1a. */
    assert_true(qlb_fnv_final(qlb_fnv_start()) == 0xcbf29ce484222325);
    assert_true(qlb_fnv_update(qlb_fnv_start(), "a", 1) ==
                0xaf63dc4c8601ec8c);
    assert_true(qlb_fnv_update(qlb_fnv_start(), "foobar", 6) ==
                0x85944171f73967e8);
    assert_true(qlb_fnv_final(0) == 1);
    assert_true(qlb_fnv_u64(qlb_fnv_start(), 0x6100000000000000) ==
                qlb_fnv_update(qlb_fnv_start(), "a\0\0\0\0\0\0\0", 8));
    assert_true(qlb_backing_digest(NULL, NULL) == 0);
    assert_true(qlb_backing_digest("a", NULL) ==
                qlb_fnv_update(qlb_fnv_start(), "a\0\0", 3));
    assert_true(qlb_backing_digest("a", "raw") ==
                qlb_fnv_update(qlb_fnv_start(), "a\0raw", 6));
}

static void test_canaries(void **state)
{
    (void)state;
    assert_int_equal(qlb_canary_last(1, 1, 16), 0);
    assert_int_equal(qlb_canary_last(65536, 65536, 16), 0);
    assert_int_equal(qlb_canary_last(65537, 65537, 16), 1);
    assert_int_equal(qlb_canary_last(1 << 20, 1 << 30, 16), 15);
    assert_int_equal(qlb_canary_last(1 << 30, 1 << 20, 16), 15);
    assert_int_equal(qlb_canary_last(0, 1 << 20, 16), 0);
}

/* ---- trust ---- */

static const uint8_t this_boot[16] = { 1, 2, 3 };

struct trust_case {
    struct qlb_ext ext;
    struct qlb_trust_image image;
    struct qlb_trust_bitmap bitmap;
};

/* Everything as it was left by a tool: trusted. */
static void good_case(struct trust_case *t)
{
    memset(t, 0, sizeof(*t));
    make_ext(&t->ext, 2);
    t->ext.flags = 0;
    memset(t->ext.boot_id, 0, 16);
    t->ext.device = 0;
    t->image.autoclear_bitmaps = true;
    t->image.autoclear_livebackup = true;
    t->image.directory_readable = true;
    memcpy(t->image.boot_id, this_boot, 16);
    t->image.device = 77;
    t->image.backing_digest = t->ext.backing_digest;
    t->image.backing_stat_digest = t->ext.backing_stat_digest;
    t->image.data_file_stat_digest = t->ext.data_file_stat_digest;
    t->bitmap.present = true;
    t->bitmap.automatic = true;
    t->bitmap.first_canary = t->bitmap.last_canary = true;
}

static enum qlb_trust judge(const struct trust_case *t)
{
    enum qlb_trust trust = qlb_trust_image(&t->ext, &t->image);

    return trust != QLB_TRUSTED
               ? trust : qlb_trust_bitmap(&t->ext, 1, &t->bitmap);
}

static void break_rule(struct trust_case *t, int rule)
{
    switch (rule) {
    case 4: t->ext.n_checkpoints = 0; break;
    case 5: t->image.autoclear_bitmaps = false; break;
    case 6: t->image.directory_readable = false; break;
    case 7: t->image.unlisted_bitmap = true; break;
    case 8:
        t->image.dirty = true;
        t->image.autoclear_livebackup = false;
        break;
    case 9: t->image.backing_digest++; break;
    case 10: t->image.backing_stat_digest++; break;
    case 11: t->image.data_file_stat_digest++; break;
    case 12: t->ext.boot_id[0] = 9; break;
    case 13:
        memcpy(t->ext.boot_id, this_boot, 16);
        t->ext.device = 78;
        break;
    case 14: t->bitmap.present = false; break;
    case 15: t->bitmap.automatic = false; break;
    case 16: t->bitmap.in_use = true; break;
    case 17: t->bitmap.last_canary = false; break;
    default: fail();
    }
}

static const enum qlb_trust verdict_of[] = {
    [4] = QLB_TRUST_NO_CHECKPOINT,    [5] = QLB_TRUST_BITMAPS_DROPPED,
    [6] = QLB_TRUST_DIRECTORY_DAMAGED, [7] = QLB_TRUST_UNLISTED_BITMAP,
    [8] = QLB_TRUST_NOT_CLOSED,       [9] = QLB_TRUST_BACKING_CHANGED,
    [10] = QLB_TRUST_BACKING_MODIFIED, [11] = QLB_TRUST_DATA_FILE_MODIFIED,
    [12] = QLB_TRUST_POWER_LOSS,      [13] = QLB_TRUST_MOVED_OPEN,
    [14] = QLB_TRUST_BITMAP_MISSING,  [15] = QLB_TRUST_BITMAP_DISABLED,
    [16] = QLB_TRUST_IN_USE,          [17] = QLB_TRUST_CANARY,
};

static void test_each_rule(void **state)
{
    struct trust_case t;

    (void)state;
    good_case(&t);
    assert_int_equal(judge(&t), QLB_TRUSTED);
    for (int rule = 4; rule <= 17; rule++) {
        good_case(&t);
        break_rule(&t, rule);
        assert_int_equal(judge(&t), verdict_of[rule]);
    }
}

/* The first that applies decides. Rule 8 clears P, which rule 11 asks for; 12
 * and 13 set the boot id, which must be zero for 11. */
static void test_order_of_rules(void **state)
{
    struct trust_case t;

    (void)state;
    for (int first = 4; first <= 17; first++) {
        for (int later = first + 1; later <= 17; later++) {
            int expected = first;

            if ((first == 11 && (later == 12 || later == 13)) ||
                (first == 12 && later == 13)) {
                expected = later;
            }
            good_case(&t);
            break_rule(&t, first);
            break_rule(&t, later);
            assert_int_equal(judge(&t), verdict_of[expected]);
        }
    }
}

/* The second table of trust.md, every combination. */
static enum qlb_trust table_of_trust(int b, int p, int u, int boot, int device,
                                     int sync)
{
    if (!b) {
        return QLB_TRUST_BITMAPS_DROPPED;
    }
    (void)p;
    if (boot == 2 && !sync) {
        return QLB_TRUST_POWER_LOSS;
    }
    if (boot == 1 && !device && !sync) {
        return QLB_TRUST_MOVED_OPEN;
    }
    return u ? QLB_TRUST_IN_USE : QLB_TRUSTED;
}

/* boot: 0 zero, 1 this one, 2 another; same: the device is the same. */
static void test_table(void **state)
{
    (void)state;
    for (int n = 0; n < 2 * 2 * 2 * 3 * 2 * 2; n++) {
        int b = n & 1, p = n >> 1 & 1, u = n >> 2 & 1, same = n >> 3 & 1;
        int sync = n >> 4 & 1, boot = n >> 5;
        struct trust_case t;

        good_case(&t);
        t.image.autoclear_bitmaps = b;
        t.image.autoclear_livebackup = p;
        t.bitmap.in_use = u;
        t.ext.flags = sync ? QLB_EXT_SYNC : 0;
        if (boot > 0) {
            memcpy(t.ext.boot_id, this_boot, 16);
            t.ext.boot_id[0] ^= boot == 2;
            t.ext.device = same ? t.image.device : t.image.device + 1;
        }
        assert_int_equal(judge(&t),
                         table_of_trust(b, p, u, boot, same, sync));
    }
}

/* What must not matter. */
static void test_trusted_all_the_same(void **state)
{
    struct trust_case t;

    (void)state;
    for (int backup = QLB_STATE_NONE; backup <= QLB_STATE_BROKEN; backup++) {
        good_case(&t);
        t.ext.state = (enum qlb_backup_state)backup;
        assert_int_equal(judge(&t), QLB_TRUSTED);
    }
    good_case(&t);
    t.image.autoclear_livebackup = false; /* stock QEMU wrote the data file */
    t.image.data_file_stat_digest++;
    assert_int_equal(judge(&t), QLB_TRUSTED);
    good_case(&t);
    t.image.dirty = true;                 /* with P: lazy refcounts */
    assert_int_equal(judge(&t), QLB_TRUSTED);
}

static void test_older_bitmaps(void **state)
{
    struct trust_case t;

    (void)state;
    good_case(&t);
    assert_int_equal(qlb_trust_bitmap(&t.ext, 0, &t.bitmap),
                     QLB_TRUST_BITMAP_DISABLED);
    t.bitmap.automatic = false;
    assert_int_equal(qlb_trust_bitmap(&t.ext, 0, &t.bitmap),
                     QLB_TRUSTED);
    t.bitmap.first_canary = false;
    assert_int_equal(qlb_trust_bitmap(&t.ext, 0, &t.bitmap),
                     QLB_TRUST_CANARY);
}

static void test_keywords(void **state)
{
    static const char *const keywords[] = {
        "trusted", "off", "unsupported", "extension-damaged", "no-checkpoint",
        "bitmaps-dropped", "directory-damaged", "unlisted-bitmap",
        "not-closed", "backing-changed", "backing-modified",
        "data-file-modified", "power-loss", "moved-open", "bitmap-missing",
        "bitmap-disabled", "in-use", "canary",
    };

    (void)state;
    for (int i = QLB_TRUSTED; i <= QLB_TRUST_CANARY; i++) {
        const char *reason = qlb_trust_reason((enum qlb_trust)i);

        assert_string_equal(qlb_trust_keyword((enum qlb_trust)i),
                            keywords[i]);
        assert_true(strlen(reason) > 10);
        assert_true(reason[strlen(reason) - 1] != '.');
    }
}

/* ---- tracking writers, against bit by bit models ---- */

#define MODEL_BITS (3 * QLB_CHUNK_BITS + 77)
#define MODEL_BYTES ((MODEL_BITS + 7) / 8)

static bool get_bit(const uint8_t *bits, uint64_t n)
{
    return bits[n / 8] >> (n % 8) & 1;
}

static void test_granules_of_ranges(void **state)
{
    (void)state;
    assert_int_equal(qlb_granule_count(0, 16), 0);
    assert_int_equal(qlb_granule_count(65536, 16), 1);
    assert_int_equal(qlb_granule_count(65537, 16), 2);
    assert_int_equal(qlb_granule_count(UINT64_MAX, 9), UINT64_C(1) << 55);
    for (uint64_t size = 0; size < 40; size++) {
        for (uint64_t offset = 0; offset < 50; offset++) {
            for (uint64_t bytes = 0; bytes < 50; bytes++) {
                struct qlb_granules range =
                    qlb_granules_of(offset * 100, bytes * 100, size * 100, 9);
                uint64_t end = (offset + bytes) * 100;

                end = end < size * 100 ? end : size * 100;
                if (offset * 100 >= end) {
                    assert_int_equal(range.count, 0);
                    continue;
                }
                assert_int_equal(range.first, offset * 100 / 512);
                assert_int_equal(range.first + range.count - 1,
                                 (end - 1) / 512);
            }
        }
    }
    /* no overflow at the end of the address space */
    assert_int_equal(qlb_granules_of(1024, UINT64_MAX, 4096, 9).count, 6);
}

static void test_marks_and_writethrough(void **state)
{
    static const uint64_t starts[] = {
        0, 1, 7, 8, 63, QLB_CHUNK_BITS - 9, QLB_CHUNK_BITS - 1, QLB_CHUNK_BITS,
        2 * QLB_CHUNK_BITS - 3, 3 * QLB_CHUNK_BITS + 60,
    };
    static const uint64_t counts[] = {
        1, 2, 7, 8, 9, 17, QLB_CHUNK_BITS, 2 * QLB_CHUNK_BITS + 1,
    };

    (void)state;
    for (size_t i = 0; i < sizeof(starts) / sizeof(starts[0]); i++) {
        for (size_t k = 0; k < sizeof(counts) / sizeof(counts[0]); k++) {
            uint8_t *bits = calloc(1, MODEL_BYTES);
            struct qlb_granules range = { starts[i], counts[k] }, rest;
            uint64_t chunk, expected = starts[i] / QLB_CHUNK_BITS, last;

            if (range.first + range.count > MODEL_BITS) {
                range.count = MODEL_BITS - range.first;
            }
            last = (range.first + range.count - 1) / QLB_CHUNK_BITS;
            assert_false(qlb_granules_marked(bits, range));
            for (rest = range; qlb_writethrough_next(bits, &rest, &chunk);) {
                assert_int_equal(chunk, expected++);
            }
            assert_int_equal(expected, last + 1);
            qlb_granules_mark(bits, range);
            for (uint64_t n = 0; n < MODEL_BYTES * 8; n++) {
                assert_int_equal(get_bit(bits, n),
                                 n >= range.first &&
                                 n < range.first + range.count);
            }
            assert_true(qlb_granules_marked(bits, range));
            rest = range;
            assert_false(qlb_writethrough_next(bits, &rest, &chunk));
            /* one bit of it missing, wherever: just its chunk is named */
            for (uint64_t n = range.first; n < range.first + range.count;
                 n += range.count / 3 + 1) {
                bits[n / 8] ^= (uint8_t)(1u << (n % 8));
                assert_false(qlb_granules_marked(bits, range));
                rest = range;
                assert_true(qlb_writethrough_next(bits, &rest, &chunk));
                assert_int_equal(chunk, n / QLB_CHUNK_BITS);
                assert_false(qlb_writethrough_next(bits, &rest, &chunk));
                bits[n / 8] ^= (uint8_t)(1u << (n % 8));
            }
            free(bits);
        }
    }
}

static void test_sessions(void **state)
{
    struct qlb_ext ext;
    uint8_t boot[16], zero[16] = { 0 };

    (void)state;
    make_ext(&ext, 2);
    memset(boot, 0x77, sizeof(boot));
    qlb_ext_begin_session(&ext, boot, 9);
    assert_memory_equal(ext.boot_id, boot, 16);
    assert_int_equal(ext.device, 9);
    assert_int_equal(ext.generation, 0x0102030405060709);
    qlb_ext_end_session(&ext);
    assert_memory_equal(ext.boot_id, zero, 16);
    assert_int_equal(ext.device, 0);
    assert_int_equal(ext.generation, 0x010203040506070a);
    assert_int_equal(ext.n_checkpoints, 2);
}

static void test_resized_bitmaps(void **state)
{
    (void)state;
    for (uint64_t old_size = 0; old_size <= 20 * 512; old_size += 128) {
        for (uint64_t new_size = 0; new_size <= 20 * 512; new_size += 128) {
            uint64_t old_count = (old_size + 511) / 512;
            uint64_t count = (new_size + 511) / 512;
            uint8_t bits[3] = { 0x92, 0xff, 0xff };

            qlb_bits_resize(bits, old_size, new_size, 9);
            for (uint64_t n = 0; n < count; n++) {
                bool was = n < 8 ? get_bit((const uint8_t[]){ 0x92 }, n)
                                 : true;

                if (new_size > old_size && (n == 0 || n >= old_size / 512)) {
                    was = true; /* grown, and the canaries */
                } else if (new_size < old_size && n == count - 1) {
                    was = true;
                }
                assert_true(n < old_count || new_size > old_size);
                assert_int_equal(get_bit(bits, n), was);
            }
            for (uint64_t n = count; n % 8 != 0; n++) {
                assert_false(get_bit(bits, n));
            }
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_layout),
        cmocka_unit_test(test_each_byte),
        cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_bad_values),
        cmocka_unit_test(test_labels),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_list),
        cmocka_unit_test(test_digests),
        cmocka_unit_test(test_canaries),
        cmocka_unit_test(test_each_rule),
        cmocka_unit_test(test_order_of_rules),
        cmocka_unit_test(test_table),
        cmocka_unit_test(test_trusted_all_the_same),
        cmocka_unit_test(test_older_bitmaps),
        cmocka_unit_test(test_keywords),
        cmocka_unit_test(test_granules_of_ranges),
        cmocka_unit_test(test_marks_and_writethrough),
        cmocka_unit_test(test_sessions),
        cmocka_unit_test(test_resized_bitmaps),
    };

    return cmocka_run_group_tests_name("bitmap_ext", tests, NULL, NULL);
}
