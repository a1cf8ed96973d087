/* Writing into an existing image, held against a shadow in memory and
 * qemu-img: random writes and zeroes at places all over a large disk, on top
 * of clusters of every kind.
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
#include "qcow2_patch.h"

#define UNIT 65536u
#define PLACES 160u
#define ROUNDS 400
#define DISK (UINT64_C(6) << 30)

static struct qlb_error err;
static uint64_t places[PLACES]; /* guest offsets, ascending, some adjacent */
static uint8_t (*shadow)[UNIT];
static uint8_t buffer[UNIT];

#define assert_ok(expression)                                                 \
    do {                                                                      \
        if ((expression) < 0) {                                               \
            fail_msg("%s: %s", #expression, err.message);                     \
        }                                                                     \
    } while (0)

static void run(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void run(const char *format, ...)
{
    char command[512];
    va_list ap;

    va_start(ap, format);
    vsnprintf(command, sizeof(command), format, ap);
    va_end(ap);
    if (system(command) != 0) {
        fail_msg("%s", command);
    }
}

/* Runs of four neighbours, far from each other. */
static void choose_places(void)
{
    for (unsigned i = 0; i < PLACES; i++) {
        uint64_t run_start = (i / 4) * (DISK / (PLACES / 4));

        places[i] = (run_start & ~(uint64_t)(4 * UNIT - 1)) +
                    (i % 4) * (uint64_t)UNIT;
    }
}

/* A disk with plain, compressed, zero and shared clusters, and holes. */
static void create(const char *options)
{
    FILE *commands;

    run("qemu-img create -q -f qcow2 backing.qcow2 1G && qemu-io -f qcow2 -c "
        "'write -P 9 0 16M' backing.qcow2 >/dev/null");
    run("qemu-img create -q -f qcow2 %s image.qcow2 %llu", options,
        (unsigned long long)DISK);
    commands = popen("qemu-io -f qcow2 image.qcow2 >/dev/null", "w");
    assert_non_null(commands);
    for (unsigned i = 0; i < PLACES; i++) {
        static const char *const kinds[] = {
            "write -P 1", "write -z", "write -z -u", "discard", "write -P 2",
        };

        /* The others stay holes. */
        if (i % 8 < 5) {
            fprintf(commands, "%s %llu 64k\n", kinds[(i + i / 8) % 5],
                    (unsigned long long)places[i]);
        }
    }
    fprintf(commands, "write -c -P 3 %llu 2M\n",
            (unsigned long long)places[100] & ~UINT64_C(0x1fffff));
    assert_int_equal(pclose(commands), 0);
    run("qemu-img snapshot -c kept image.qcow2");
    run("qemu-io -f qcow2 -c 'write -P 4 0 64k' -c 'write -P 5 %llu 64k' "
        "image.qcow2 >/dev/null", (unsigned long long)places[20]);
    run("cp image.qcow2 before.qcow2");
}

struct opened {
    struct qlb_blkio *io;
    struct qlb_qcow2_header *header;
    struct qlb_disk *disk;
};

static struct opened open_image(void)
{
    struct opened o;

    o.io = qlb_blkio_open("image.qcow2", QLB_BLKIO_WRITE, &err);
    assert_non_null(o.io);
    o.header = qlb_qcow2_header_read(o.io, true, &err);
    assert_non_null(o.header);
    o.disk = qlb_disk_open_io("image.qcow2", o.io, o.header, 0, &err);
    assert_non_null(o.disk);
    return o;
}

static void close_image(struct opened *o)
{
    qlb_disk_close(o->disk);
    qlb_qcow2_header_free(o->header);
    qlb_blkio_close(o->io);
}

/* Into the shadow, or against it. */
static void read_places(bool compare)
{
    struct opened o = open_image();
    struct qlb_disk_reader *reader = qlb_disk_reader_new(o.disk, &err);

    assert_non_null(reader);
    for (unsigned i = 0; i < PLACES; i++) {
        assert_ok(qlb_disk_read(reader, buffer, places[i], UNIT, &err));
        if (!compare) {
            memcpy(shadow[i], buffer, UNIT);
        } else if (memcmp(shadow[i], buffer, UNIT) != 0) {
            fail_msg("place %u, guest offset %llu: not what was written", i,
                     (unsigned long long)places[i]);
        }
    }
    qlb_disk_reader_free(reader);
    close_image(&o);
}

/* Part of a place, in units that the interface takes. */
static void change(struct qlb_patch *patch, uint64_t unit)
{
    unsigned i = (unsigned)rand() % PLACES;
    uint64_t n = UNIT / unit;
    uint64_t first = (uint64_t)rand() % n;
    uint64_t count = 1 + (uint64_t)rand() % (n - first);
    uint64_t offset = first * unit, length = count * unit;

    if (rand() % 3 == 0) {
        memset(shadow[i] + offset, 0, length);
        assert_ok(qlb_patch_zero(patch, places[i] + offset, length, &err));
        return;
    }
    memset(shadow[i] + offset, 1 + rand() % 255, length);
    assert_ok(qlb_patch_write(patch, shadow[i] + offset, places[i] + offset,
                              length, &err));
}

static void change_all(void)
{
    struct opened o = open_image();
    struct qlb_patch *patch = qlb_patch_open(o.io, o.header, o.disk, &err);
    uint64_t unit = o.header->cluster_size < UNIT ? o.header->cluster_size
                                                  : UNIT;

    assert_non_null(patch);
    for (unsigned round = 0; round < ROUNDS; round++) {
        change(patch, unit);
        if (rand() % 50 == 0) {
            assert_ok(qlb_patch_flush(patch, &err));
        }
    }
    assert_ok(qlb_patch_flush(patch, &err));
    qlb_patch_close(patch);
    close_image(&o);
}

static void test_shape(const char *options)
{
    create(options);
    read_places(false);
    for (unsigned time = 0; time < 3; time++) {
        change_all();
        read_places(true);
        run("qemu-img check -q -f qcow2 image.qcow2");
    }
    /* The snapshot is what it was. */
    run("for i in image before; do qemu-img snapshot -a kept $i.qcow2 && "
        "qemu-img snapshot -d kept $i.qcow2 || exit 1; done; "
        "qemu-img check -q -f qcow2 image.qcow2 && "
        "qemu-img compare -q -f qcow2 -F qcow2 image.qcow2 before.qcow2");
}

static void test_clusters_of_64k(void **state)
{
    (void)state;
    test_shape("");
}

static void test_clusters_of_4k(void **state)
{
    (void)state;
    test_shape("-o cluster_size=4k,refcount_bits=64");
}

static void test_clusters_of_2m(void **state)
{
    (void)state;
    test_shape("-o cluster_size=2M");
}

static void test_extended_entries(void **state)
{
    (void)state;
    test_shape("-o extended_l2=on,cluster_size=128k");
    test_shape("-o extended_l2=on,cluster_size=16k");
}

static void test_backing_file(void **state)
{
    (void)state;
    test_shape("-b backing.qcow2 -F qcow2");
    test_shape("-b backing.qcow2 -F qcow2 -o extended_l2=on,cluster_size=2M");
}

static void test_beyond_the_tables(void **state)
{
    struct opened o;
    struct qlb_patch *patch;

    (void)state;
    run("qemu-img create -q -f qcow2 image.qcow2 1G");
    o = open_image();
    patch = qlb_patch_open(o.io, o.header, o.disk, &err);
    assert_non_null(patch);
    assert_int_equal(qlb_patch_write(patch, buffer, UINT64_C(1) << 30, UNIT,
                                     &err), -1);
    assert_string_equal(err.message, "image.qcow2: guest offset 1073741824 is "
                        "beyond the L1 table");
    qlb_patch_close(patch);
    close_image(&o);
}

static int setup(void **state)
{
    static char folder[] = "/tmp/qlb-patch-XXXXXX";

    (void)state;
    shadow = malloc(PLACES * sizeof(*shadow));
    srand(1);
    choose_places();
    return shadow == NULL || mkdtemp(folder) == NULL || chdir(folder) < 0;
}

static int teardown(void **state)
{
    char folder[64];

    (void)state;
    free(shadow);
    unlink("image.qcow2");
    unlink("before.qcow2");
    unlink("backing.qcow2");
    return getcwd(folder, sizeof(folder)) == NULL || chdir("/") < 0 ||
           rmdir(folder) < 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_clusters_of_64k),
        cmocka_unit_test(test_clusters_of_4k),
        cmocka_unit_test(test_clusters_of_2m),
        cmocka_unit_test(test_extended_entries),
        cmocka_unit_test(test_backing_file),
        cmocka_unit_test(test_beyond_the_tables),
    };

    return cmocka_run_group_tests_name("qcow2_patch", tests, setup, teardown);
}
