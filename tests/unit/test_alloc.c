/* Allocation of host clusters, held against qemu-img's own count.
 *
 * Images with clusters of 512 bytes have refcount blocks and tables so small
 * that a few hundred clusters need new ones of both.
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
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "blkio.h"
#include "qcow2_alloc.h"
#include "qcow2_header.h"
#include "qcow2_recount.h"

static char path[64];

struct opened {
    struct qlb_blkio *io;
    struct qlb_qcow2_header *header;
    struct qlb_alloc *alloc;
};

static struct qlb_error err;

#define assert_ok(expression)                                                 \
    do {                                                                      \
        if ((expression) < 0) {                                               \
            fail_msg("%s: %s", #expression, err.message);                     \
        }                                                                     \
    } while (0)

static int run(const char *format, ...) __attribute__((format(printf, 1, 2)));

static int run(const char *format, ...)
{
    char command[512];
    va_list ap;
    int status;

    va_start(ap, format);
    vsnprintf(command, sizeof(command), format, ap);
    va_end(ap);
    status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void create(unsigned cluster_size, unsigned width)
{
    assert_int_equal(run("qemu-img create -q -f qcow2 -o cluster_size=%u,"
                         "refcount_bits=%u %s 256k", cluster_size, width,
                         path), 0);
    assert_int_equal(run("qemu-io -f qcow2 -c 'write -P 1 0 64k' %s "
                         ">/dev/null", path), 0);
}

static struct opened open_image(void)
{
    struct opened o;

    o.io = qlb_blkio_open(path, QLB_BLKIO_WRITE, &err);
    assert_non_null(o.io);
    o.header = qlb_qcow2_header_read(o.io, true, &err);
    assert_non_null(o.header);
    o.alloc = qlb_alloc_open(o.io, o.header, &err);
    assert_non_null(o.alloc);
    return o;
}

static void close_image(struct opened *o)
{
    qlb_alloc_close(o->alloc);
    qlb_qcow2_header_free(o->header);
    qlb_blkio_close(o->io);
}

/* Both counts: ours, and qemu-img's (no leaks: 0; leaks alone: 3). */
static void expect_leaks(uint64_t expected)
{
    struct opened o = open_image();
    uint64_t leaks = UINT64_MAX;
    char command[128], text[32] = "";
    FILE *pipe;

    assert_ok(qlb_qcow2_recount(o.io, o.header, o.alloc, 0, &leaks, &err));
    assert_int_equal(leaks, expected);
    close_image(&o);
    assert_int_equal(run("qemu-img check -q -f qcow2 %s >/dev/null 2>&1",
                         path), expected > 0 ? 3 : 0);
    snprintf(command, sizeof(command), "qemu-img check --output=json %s "
             "2>/dev/null | jq '.leaks // 0'", path);
    pipe = popen(command, "r");
    assert_non_null(pipe);
    assert_non_null(fgets(text, sizeof(text), pipe));
    pclose(pipe);
    assert_int_equal(strtoull(text, NULL, 10), expected);
}

/* qemu-img counts leaks up to the end of the file only. */
static void extend_file(const struct opened *o, uint64_t offset,
                        uint64_t count)
{
    uint64_t end = offset + count * o->header->cluster_size;

    if (end > o->io->size) {
        assert_ok(qlb_blkio_write(o->io, "", 1, end - 1, &err));
    }
}

/* ---- entries ---- */

static void test_entries(void **state)
{
    (void)state;
    for (unsigned order = 0; order <= 6; order++) {
        unsigned width = 1u << order;
        uint64_t max = order == 6 ? UINT64_MAX : (UINT64_C(1) << width) - 1;
        uint8_t block[512];

        memset(block, 0, sizeof(block));
        for (uint64_t i = 0; i < sizeof(block) * 8 / width; i++) {
            qlb_refcount_set(block, order, i, max);
            for (uint64_t j = i < 9 ? 0 : i - 9; j <= i + 1 &&
                 j < sizeof(block) * 8 / width; j++) {
                assert_true(qlb_refcount_get(block, order, j) ==
                            (j <= i ? max : 0));
            }
        }
        for (uint64_t i = 0; i < sizeof(block) * 8 / width; i++) {
            qlb_refcount_set(block, order, i, max - i % 2);
        }
        for (uint64_t i = 0; i < sizeof(block) * 8 / width; i++) {
            assert_true(qlb_refcount_get(block, order, i) == max - i % 2);
        }
    }
    /* Sub-byte: the least significant bits come first. */
    assert_int_equal(qlb_refcount_get((const uint8_t *)"\x01", 0, 0), 1);
    assert_int_equal(qlb_refcount_get((const uint8_t *)"\x30", 1, 2), 3);
    assert_int_equal(qlb_refcount_get((const uint8_t *)"\x70", 2, 1), 7);
}

/* ---- allocate and free ---- */

#define ROUNDS 40

/* Runs of many lengths, a commit after each, then all freed. */
static void allocate_and_free(unsigned cluster_size, unsigned width,
                              uint64_t longest)
{
    uint64_t offset[ROUNDS], count[ROUNDS], total = 0;
    struct opened o;

    create(cluster_size, width);
    for (unsigned i = 0; i < ROUNDS; i++) {
        o = open_image();
        count[i] = 1 + i * 7 % longest;
        assert_ok(qlb_alloc_clusters(o.alloc, count[i], &offset[i], &err));
        assert_ok(qlb_alloc_commit(o.alloc, &err));
        assert_int_equal(offset[i] % cluster_size, 0);
        extend_file(&o, offset[i], count[i]);
        total += count[i];
        close_image(&o);
        for (unsigned j = 0; j < i; j++) {
            assert_true(offset[i] + count[i] * cluster_size <= offset[j] ||
                        offset[j] + count[j] * cluster_size <= offset[i]);
        }
        if (i % 13 == 12) {
            expect_leaks(total);
        }
    }
    o = open_image();
    for (unsigned i = 0; i < ROUNDS; i++) {
        for (uint64_t k = 0; k < count[i]; k++) {
            uint64_t at = offset[i] + k * cluster_size;

            assert_ok(qlb_alloc_free(o.alloc, &at, 1, &err));
        }
    }
    close_image(&o);
    expect_leaks(0);
    assert_int_equal(run("qemu-img compare -q -f qcow2 -F qcow2 %s %s", path,
                         path), 0);
    assert_int_equal(run("qemu-io -f qcow2 -c 'read -P 1 0 64k' -c 'write -P "
                         "2 64k 64k' %s | grep -q 'verification failed'",
                         path), 1);
    expect_leaks(0);
}

static void test_widths(void **state)
{
    (void)state;
    for (unsigned width = 1; width <= 64; width *= 2) {
        allocate_and_free(512, width, 300);
    }
}

static void test_cluster_sizes(void **state)
{
    (void)state;
    for (unsigned size = 1024; size <= 2u << 20; size *= 2) {
        allocate_and_free(size, 16, size < 65536 ? 60 : 5);
    }
}

/* Many in one transaction: several new blocks and a larger table at once. */
static void test_one_transaction(void **state)
{
    (void)state;
    for (unsigned width = 1; width <= 64; width *= 8) {
        struct opened o;
        uint64_t offset, total = 0;

        create(512, width);
        o = open_image();
        for (unsigned i = 0; i < 3000; i++) {
            uint64_t count = i % 100 == 0 ? 500 : 1;

            assert_ok(qlb_alloc_clusters(o.alloc, count, &offset, &err));
            total += count;
        }
        assert_ok(qlb_alloc_commit(o.alloc, &err));
        extend_file(&o, offset, 1000);
        extend_file(&o, total * 512, 16384);
        close_image(&o);
        expect_leaks(total);
        o = open_image();
        assert_ok(qlb_qcow2_recount(o.io, o.header, o.alloc, QLB_RECOUNT_FREE,
                                    &offset, &err));
        assert_int_equal(offset, total);
        close_image(&o);
        expect_leaks(0);
    }
}

/* First-fit: what is free is used again. */
static void test_reuse(void **state)
{
    uint64_t first, second, third;
    struct opened o;

    (void)state;
    create(4096, 16);
    o = open_image();
    assert_ok(qlb_alloc_clusters(o.alloc, 3, &first, &err));
    assert_ok(qlb_alloc_clusters(o.alloc, 1, &second, &err));
    assert_ok(qlb_alloc_commit(o.alloc, &err));
    first += 4096;
    assert_ok(qlb_alloc_free(o.alloc, &first, 1, &err));
    close_image(&o);
    o = open_image();
    assert_ok(qlb_alloc_clusters(o.alloc, 2, &third, &err));
    assert_true(third > second);
    assert_ok(qlb_alloc_clusters(o.alloc, 1, &third, &err));
    assert_int_equal(third, first);
    close_image(&o); /* neither is committed */
}

static void test_abandon(void **state)
{
    (void)state;
    for (unsigned width = 1; width <= 64; width *= 2) {
        for (int commit = 0; commit <= 1; commit++) {
            struct opened o;
            uint64_t offset;

            create(512, width);
            o = open_image();
            for (unsigned i = 0; i < 700; i++) {
                assert_ok(qlb_alloc_clusters(o.alloc, 1 + i % 3, &offset,
                                             &err));
            }
            if (commit) {
                assert_ok(qlb_alloc_commit(o.alloc, &err));
                extend_file(&o, offset, 3);
            }
            assert_ok(qlb_alloc_abandon(o.alloc, &err));
            close_image(&o);
            expect_leaks(0);
        }
    }
}

/* ---- damage ---- */

static void poke(uint64_t offset, uint64_t value)
{
    FILE *file = fopen(path, "r+");
    uint8_t bytes[8];

    assert_non_null(file);
    for (unsigned i = 0; i < 8; i++) {
        bytes[i] = (uint8_t)(value >> (56 - 8 * i));
    }
    assert_int_equal(fseek(file, (long)offset, SEEK_SET), 0);
    assert_int_equal(fwrite(bytes, 1, 8, file), 8);
    assert_int_equal(fclose(file), 0);
}

static void test_bad_table(void **state)
{
    static const uint64_t bad[] = {
        1, 512, 0x8000000000000000, UINT64_C(1) << 40, 0x10000 + 512, 4096 * 3,
    };
    struct opened o;
    uint64_t table;

    (void)state;
    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        create(4096, 16);
        o = open_image();
        table = o.header->refcount_table_offset;
        qlb_alloc_close(o.alloc);
        poke(table, i == 5 ? o.header->l1_offset : bad[i]);
        o.alloc = qlb_alloc_open(o.io, o.header, &err);
        assert_null(o.alloc);
        assert_int_equal(err.code, QLB_E_DAMAGED);
        assert_non_null(strstr(err.message, "qemu-img check -r all"));
        close_image(&o);
    }
}

/* The refcounts of the header's cluster and of guest data say "free". */
static void test_too_low(void **state)
{
    struct opened o;
    uint64_t block, offset;

    (void)state;
    create(4096, 16);
    o = open_image();
    block = qlb_alloc_block_offset(o.alloc, 0);
    close_image(&o);
    poke(block, 0);
    o = open_image();
    assert_int_equal(qlb_qcow2_recount(o.io, o.header, o.alloc,
                                       QLB_RECOUNT_FREE, &offset, &err), -1);
    assert_int_equal(err.code, QLB_E_DAMAGED);
    assert_int_equal(qlb_alloc_clusters(o.alloc, 1, &offset, &err), -1);
    assert_int_equal(err.code, QLB_E_DAMAGED);
    close_image(&o);
}

static int set_up(void **state)
{
    (void)state;
    snprintf(path, sizeof(path), "test_alloc.%ld.qcow2", (long)getpid());
    return getenv("TMPDIR") != NULL ? chdir(getenv("TMPDIR")) : 0;
}

static int tear_down(void **state)
{
    (void)state;
    return unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_entries),
        cmocka_unit_test(test_widths),
        cmocka_unit_test(test_cluster_sizes),
        cmocka_unit_test(test_one_transaction),
        cmocka_unit_test(test_reuse),
        cmocka_unit_test(test_abandon),
        cmocka_unit_test(test_bad_table),
        cmocka_unit_test(test_too_low),
    };

    return cmocka_run_group_tests_name("alloc", tests, set_up, tear_down);
}
