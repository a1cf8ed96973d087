/* Mapping and reading: what tests/cli/qcow2-reader.bats can't see from
 * outside: how much is read for an answer, that runs and pieces agree, and
 * the exact error for each damaged table entry.
 *
 * Copyright (C) 2026 The qcow2 livebackup authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "byteorder.h"
#include "checked.h"
#include "qcow2_map.h"

#define MIB (UINT64_C(1) << 20)

static char folder[4096];

static int make_folder(void **state)
{
    const char *parent = getenv("TMPDIR");

    (void)state;
    snprintf(folder, sizeof(folder), "%s/qcow2-map-XXXXXX",
             parent ? parent : "/tmp");
    return mkdtemp(folder) ? chdir(folder) : -1;
}

static int remove_folder(void **state)
{
    char command[5000];

    (void)state;
    snprintf(command, sizeof(command), "rm -rf '%s'", folder);
    return chdir("/") == 0 ? system(command) : -1;
}

static void run(const char *command)
{
    char shell[2048];

    snprintf(shell, sizeof(shell), "{ rm -f d base mid; %s ; } >out 2>&1 || "
             "{ cat out; false; }", command);
    if (system(shell) != 0) {
        fail_msg("%s", command);
    }
}

/* A file whose reads are counted. */
struct counting {
    struct qlb_blkio io;
    struct qlb_blkio *file;
    unsigned reads;
    uint64_t bytes;
};

static int64_t counting_pread(struct qlb_blkio *io, void *buf, size_t len,
                              uint64_t offset, struct qlb_error *err)
{
    struct counting *counting = (struct counting *)io;

    counting->reads++;
    counting->bytes += len;
    return counting->file->ops->pread(counting->file, buf, len, offset, err);
}

static void counting_close(struct qlb_blkio *io)
{
    (void)io;
}

static const struct qlb_blkio_ops counting_ops = {
    .pread = counting_pread, .close = counting_close,
};

struct view {
    struct counting counting;
    struct qlb_qcow2_header *header;
    struct qlb_disk *disk;
    struct qlb_disk_reader *reader;
};

static void open_view(struct view *v, const char *path)
{
    struct qlb_error err;

    memset(v, 0, sizeof(*v));
    v->counting.file = qlb_blkio_open(path, 0, &err);
    assert_non_null(v->counting.file);
    v->counting.io = *v->counting.file;
    v->counting.io.ops = &counting_ops;
    v->header = qlb_qcow2_header_read(&v->counting.io, true, &err);
    assert_non_null(v->header);
    v->disk = qlb_disk_open_io(path, &v->counting.io, v->header, 0, &err);
    assert_non_null(v->disk);
    v->reader = qlb_disk_reader_new(v->disk, &err);
    assert_non_null(v->reader);
    v->counting.reads = 0;
    v->counting.bytes = 0;
}

static void close_view(struct view *v)
{
    qlb_disk_reader_free(v->reader);
    qlb_disk_close(v->disk);
    qlb_qcow2_header_free(v->header);
    qlb_blkio_close(v->counting.file);
}

/* ---- how much is read ---- */

static void test_contiguous_clusters_are_one_read(void **state)
{
    struct qlb_error err;
    struct view v;
    char *buf = malloc(MIB);

    (void)state;
    run("qemu-img create -f qcow2 d 64M && "
        "qemu-io -f qcow2 -c 'write -P 1 0 64M' d");
    open_view(&v, "d");
    assert_int_equal(qlb_disk_read(v.reader, buf, 0, MIB, &err), 0);
    assert_int_equal(v.counting.reads, 3); /* L1, L2, data */
    for (uint64_t pos = MIB; pos < 32 * MIB; pos += MIB) {
        v.counting.reads = 0;
        assert_int_equal(qlb_disk_read(v.reader, buf, pos, MIB, &err), 0);
        assert_int_equal(v.counting.reads, 1);
    }
    /* Also over the border of two L2 slices, where one more is read. */
    v.counting.reads = 0;
    assert_int_equal(qlb_disk_read(v.reader, buf, 32 * MIB - 100, MIB, &err),
                     0);
    assert_int_equal(v.counting.reads, 2);
    close_view(&v);
    free(buf);
}

static void test_few_clusters_of_a_huge_disk(void **state)
{
    enum qlb_extent_type type;
    struct qlb_error err;
    struct view v;
    uint64_t run_length, pos;
    unsigned found = 0;

    (void)state;
    run("qemu-img create -f qcow2 d 16T && qemu-io -f qcow2 "
        "-c 'write -P 1 1T 64k' -c 'write -P 2 5T 64k' "
        "-c 'write -P 3 16383G 64k' d");
    open_view(&v, "d");
    for (pos = 0; pos < v.header->virtual_size; pos += run_length) {
        assert_int_equal(qlb_disk_extent(v.reader, pos,
                                         v.header->virtual_size - pos, &type,
                                         &run_length, &err), 0);
        found += type == QLB_EXTENT_DATA;
    }
    assert_int_equal(found, 3);
    /* The L1 table (256 KiB, some slices twice) and 16 slices of each of the
     * three L2 tables. */
    assert_true(v.counting.bytes < 600 * 1024);
    v.counting.bytes = 0;
    assert_int_equal(qlb_disk_extent(v.reader, UINT64_C(5) << 40, 1, &type,
                                     &run_length, &err), 0);
    assert_int_equal(type, QLB_EXTENT_DATA);
    assert_true(v.counting.bytes <= 8192);
    close_view(&v);
}

/* Small steps through a long run look at the tables once. */
static void test_steps_are_cheap(void **state)
{
    enum qlb_extent_type type;
    struct qlb_error err;
    struct view v;
    uint64_t run_length;

    (void)state;
    run("qemu-img create -f qcow2 d 64T");
    open_view(&v, "d");
    for (unsigned i = 0; i < 100000; i++) {
        assert_int_equal(qlb_disk_extent(v.reader, i * MIB, MIB, &type,
                                         &run_length, &err), 0);
        assert_int_equal(type, QLB_EXTENT_ZERO);
        assert_int_equal(run_length, MIB);
    }
    assert_true(v.counting.reads <= 2);
    close_view(&v);
}

/* ---- pieces and the whole ---- */

static void make_chain(void)
{
    run("qemu-img create -f raw base 3000000 && "
        "qemu-io -f raw -c 'write -P 1 0 1M' -c 'write -P 2 1500k 1000k' base"
        " && qemu-img create -f qcow2 -b base -F raw "
        "-o cluster_size=4k,extended_l2=off mid 6M && "
        "qemu-io -f qcow2 -c 'write -P 3 500k 5k' -c 'write -z 700k 9k' "
        "-c 'write -P 4 3900k 1000k' mid && "
        "qemu-img convert -c -O qcow2 -o compression_type=zstd mid midc && "
        "mv midc mid && "
        "qemu-img create -f qcow2 -b mid -F qcow2 -o extended_l2=on d 8M && "
        "qemu-io -f qcow2 -c 'write -P 5 100k 3k' -c 'write -P 6 110k 6k' "
        "-c 'write -z 2M 10k' -c 'write -c -P 7 4M 64k' "
        "-c 'write -P 8 5M 2500k' d && "
        "qemu-img convert -O raw d raw");
}

struct walker {
    const struct qlb_disk *disk;
    const uint8_t *want;
    unsigned seed;
    const char *wrong;
};

static uint64_t draw(struct walker *w, uint64_t below)
{
    uint64_t high = (uint64_t)rand_r(&w->seed);

    return (high << 16 ^ (uint64_t)rand_r(&w->seed)) % below;
}

/* cmocka's asserts are for the main thread alone. */
static void *walk(void *arg)
{
    struct walker *w = arg;
    uint64_t size = qlb_disk_size(w->disk);
    struct qlb_error err;
    struct qlb_disk_reader *reader = qlb_disk_reader_new(w->disk, &err);
    uint8_t *buf = malloc(size);

    for (unsigned i = 0; i < 3000 && w->wrong == NULL; i++) {
        uint64_t offset = draw(w, size);
        uint64_t length = draw(w, i % 10 ? 9000 : 1000000) + 1;
        enum qlb_extent_type type;
        uint64_t run_length;

        length = min_u64(length, size - offset);
        if (qlb_disk_extent(reader, offset, length, &type, &run_length,
                            &err) < 0) {
            w->wrong = "extent fails";
        } else if (run_length == 0 || run_length > length) {
            w->wrong = "length of a run";
        } else if (type == QLB_EXTENT_ZERO) {
            for (uint64_t k = 0; k < run_length; k++) {
                w->wrong = w->want[offset + k] ? "zero is not" : w->wrong;
            }
        } else if (type != QLB_EXTENT_DATA) {
            w->wrong = "type of a run";
        }
        if (qlb_disk_read(reader, buf, offset, length, &err) < 0) {
            w->wrong = "read fails";
        } else if (memcmp(buf, w->want + offset, length) != 0) {
            w->wrong = "content";
        }
    }
    free(buf);
    qlb_disk_reader_free(reader);
    return NULL;
}

static void test_random_reads_by_threads(void **state)
{
    struct walker walkers[2] = { { .seed = 1 }, { .seed = 2 } };
    uint8_t *want = malloc(8 * MIB);
    struct qlb_error err;
    struct qlb_disk *disk;
    pthread_t thread[2];
    FILE *f;

    (void)state;
    make_chain();
    f = fopen("raw", "r");
    assert_int_equal(fread(want, 8 * MIB, 1, f), 1);
    fclose(f);
    disk = qlb_disk_open("d", QLB_DISK_LOCK, &err);
    assert_non_null(disk);
    for (unsigned i = 0; i < 2; i++) {
        walkers[i].disk = disk;
        walkers[i].want = want;
        assert_int_equal(pthread_create(&thread[i], NULL, walk, &walkers[i]),
                         0);
    }
    for (unsigned i = 0; i < 2; i++) {
        pthread_join(thread[i], NULL);
        if (walkers[i].wrong != NULL) {
            fail_msg("%s", walkers[i].wrong);
        }
    }
    qlb_disk_close(disk);
    free(want);
}

static void test_outside_of_the_disk(void **state)
{
    static const uint64_t ranges[][2] = {
        { MIB, 1 }, { 0, MIB + 1 }, { MIB + 1, 0 }, { UINT64_MAX, 1 },
        { 512, UINT64_MAX }, { UINT64_MAX, UINT64_MAX },
    };
    enum qlb_extent_type type;
    struct qlb_error err;
    uint64_t run_length;
    struct view v;
    char byte;

    (void)state;
    run("qemu-img create -f qcow2 d 1M");
    open_view(&v, "d");
    for (unsigned i = 0; i < 6; i++) {
        assert_int_equal(qlb_disk_read(v.reader, &byte, ranges[i][0],
                                       ranges[i][1], &err), -1);
        assert_int_equal(err.code, QLB_E_USAGE);
        assert_int_equal(qlb_disk_extent(v.reader, ranges[i][0],
                                         ranges[i][1], &type, &run_length,
                                         &err), -1);
        assert_int_equal(err.code, QLB_E_USAGE);
    }
    assert_int_equal(qlb_disk_extent(v.reader, 0, 0, &type, &run_length,
                                     &err), -1);
    assert_int_equal(qlb_disk_read(v.reader, &byte, MIB, 0, &err), 0);
    close_view(&v);
}

static void test_top_layer(void **state)
{
    enum qlb_extent_type type;
    struct qlb_disk_reader *reader;
    struct qlb_disk *disk;
    struct qlb_error err;
    uint64_t run_length;
    struct view v;
    char byte = 1;

    (void)state;
    run("qemu-img create -f qcow2 base 1M && "
        "qemu-io -f qcow2 -c 'write -P 1 0 1M' base && "
        "qemu-img create -f qcow2 -b base -F qcow2 d 1M && "
        "qemu-io -f qcow2 -c 'write -P 2 64k 64k' d");
    open_view(&v, "d");
    assert_int_equal(qlb_disk_top_extent(v.reader, 0, MIB, &type, &run_length,
                                         &err), 0);
    assert_int_equal(type, QLB_EXTENT_UNALLOCATED);
    assert_int_equal(run_length, 65536);
    assert_int_equal(qlb_disk_extent(v.reader, 0, MIB, &type, &run_length,
                                     &err), 0);
    assert_int_equal(type, QLB_EXTENT_DATA);
    assert_int_equal(run_length, 65536);
    close_view(&v);

    disk = qlb_disk_open("d", QLB_DISK_NO_BACKING, &err);
    reader = qlb_disk_reader_new(disk, &err);
    assert_int_equal(qlb_disk_extent(reader, 1, MIB - 1, &type, &run_length,
                                     &err), 0);
    assert_int_equal(type, QLB_EXTENT_UNALLOCATED);
    assert_int_equal(qlb_disk_read(reader, &byte, 1, 1, &err), 0);
    assert_int_equal(byte, 0);
    qlb_disk_reader_free(reader);
    qlb_disk_close(disk);
}

static void expect_stat(const struct qlb_disk *disk, unsigned index,
                        const char *path)
{
    uint64_t size, mtime;
    struct stat st;

    assert_int_equal(stat(path, &st), 0);
    assert_true(qlb_disk_backing_stat(disk, index, &size, &mtime));
    assert_int_equal(size, st.st_size);
    assert_int_equal(mtime, (uint64_t)st.st_mtim.tv_sec * 1000000000 +
                                (uint64_t)st.st_mtim.tv_nsec);
}

static void test_files_of_the_chain(void **state)
{
    struct qlb_disk *disk;
    struct qlb_error err;
    uint64_t size, mtime;

    (void)state;
    run("truncate -s 1M base && rm -f *.data && "
        "qemu-img create -f qcow2 -b base -F raw -o data_file=mid.data "
        "mid 1M && qemu-img create -f qcow2 -b mid -F qcow2 "
        "-o data_file=d.data d 2M");
    disk = qlb_disk_open("d", 0, &err);
    assert_non_null(disk);
    expect_stat(disk, 0, "mid");
    expect_stat(disk, 1, "mid.data");
    expect_stat(disk, 2, "base");
    assert_false(qlb_disk_backing_stat(disk, 3, &size, &mtime));
    assert_true(qlb_disk_data_file_stat(disk, &size, &mtime));
    assert_int_equal(size, 2 * MIB);
    qlb_disk_close(disk);
    disk = qlb_disk_open("base", QLB_DISK_RAW, &err);
    assert_null(qlb_disk_header(disk));
    assert_false(qlb_disk_data_file_stat(disk, &size, &mtime));
    qlb_disk_close(disk);
}

/* ---- damaged tables ---- */

/* An image of 64 KiB clusters: L1 table at 0x30000, L2 at 0x40000. */
static uint8_t data[0x70000];
static size_t data_size;

static void load(void)
{
    FILE *f = fopen("d", "r");

    assert_non_null(f);
    data_size = fread(data, 1, sizeof(data), f);
    fclose(f);
    assert_int_equal(get_be64(data + 0x30000), 0x8000000000040000);
}

static void expect_error(const char *message)
{
    struct qlb_blkio *io = qlb_blkio_memory(data, data_size);
    struct qlb_qcow2_header *header;
    struct qlb_disk_reader *reader;
    struct qlb_disk *disk;
    struct qlb_error err;
    uint8_t buf[1];

    header = qlb_qcow2_header_read(io, true, &err);
    assert_non_null(header);
    disk = qlb_disk_open_io("d", io, header, QLB_DISK_NO_BACKING, &err);
    assert_non_null(disk);
    reader = qlb_disk_reader_new(disk, &err);
    for (unsigned twice = 0; twice < 2; twice++) {
        err.message[0] = 0;
        err.code = QLB_OK;
        assert_int_equal(qlb_disk_read(reader, buf, 66000, 1, &err), -1);
        assert_string_equal(err.message, message);
        assert_int_equal(err.code, QLB_E_DAMAGED);
    }
    qlb_disk_reader_free(reader);
    qlb_disk_close(disk);
    qlb_qcow2_header_free(header);
    qlb_blkio_close(io);
}

static void test_damaged_l1_entries(void **state)
{
    static const struct {
        uint64_t entry;
        const char *message;
    } cases[] = {
        { 0x8000000000040001,
          "d: damaged L1 entry 0x8000000000040001 for guest offset 66000" },
        { 0x8100000000040000,
          "d: damaged L1 entry 0x8100000000040000 for guest offset 66000" },
        { 0x8000000000040200,
          "d: damaged L1 entry 0x8000000000040200 for guest offset 66000" },
        { 0x8000000000800000,
          "memory: ends at 8388608, before the 4096 bytes at offset 8388608 "
          "(L2 table for guest offset 66000)" },
        { 0x80ffffffffff0000,
          "memory: ends at 72057594037862400, before the 4096 bytes at "
          "offset 72057594037862400 (L2 table for guest offset 66000)" },
    };

    (void)state;
    run("qemu-img create -f qcow2 d 1M && "
        "qemu-io -f qcow2 -c 'write -P 1 0 128k' d");
    load();
    for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        put_be64(data + 0x30000, cases[i].entry);
        expect_error(cases[i].message);
    }
}

static void test_damaged_l2_entries(void **state)
{
    static const struct {
        uint64_t entry;
        const char *message;
    } cases[] = {
        { 0x8000000000060002, "d: damaged L2 entry 0x8000000000060002 for "
          "guest offset 66000: reserved bits" },
        { 0xa000000000060000, "d: damaged L2 entry 0xa000000000060000 for "
          "guest offset 66000: reserved bits" },
        { 0x8000000000060200, "d: damaged L2 entry 0x8000000000060200 for "
          "guest offset 66000: host cluster is not aligned" },
        { 0x8000000000060201, "d: damaged L2 entry 0x8000000000060201 for "
          "guest offset 66000: host cluster is not aligned" },
        { 0x8000000000800000, "memory: the file ends before the data at "
          "offset 8389072 (guest offset 66000)" },
        { 0xc000000000060000, "d: damaged L2 entry 0xc000000000060000 for "
          "guest offset 66000: reserved bits of a compressed cluster" },
        { 0x4000000000800000, "memory: damaged compressed cluster at offset "
          "8388608 (guest offset 65536)" },
        { 0x7fc0000000000000, "memory: damaged compressed cluster at offset "
          "0 (guest offset 65536)" },
    };

    (void)state;
    run("qemu-img create -f qcow2 d 1M && "
        "qemu-io -f qcow2 -c 'write -P 1 0 128k' d");
    load();
    for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        put_be64(data + 0x40008, cases[i].entry);
        expect_error(cases[i].message);
    }
}

static void test_damaged_subclusters(void **state)
{
    (void)state;
    run("qemu-img create -f qcow2 -o extended_l2=on d 1M && "
        "qemu-io -f qcow2 -c 'write -P 1 0 128k' d");
    load();
    put_be64(data + 0x40018, 0x00000001ffffffff);
    expect_error("d: damaged L2 entry 0x8000000000060000 for guest offset "
                 "66000: subclusters both allocated and zero");
    put_be64(data + 0x40018, 0x00000000ffffffff);
    put_be64(data + 0x40010, 0x8000000000060001);
    expect_error("d: damaged L2 entry 0x8000000000060001 for guest offset "
                 "66000: reserved bits");
    put_be64(data + 0x40010, 0);
    expect_error("d: damaged L2 entry 0x0000000000000000 for guest offset "
                 "66000: allocated subclusters without a host cluster");
    put_be64(data + 0x40010, 0x4000000000060000);
    expect_error("d: damaged L2 entry 0x4000000000060000 for guest offset "
                 "66000: reserved bits of a compressed cluster");
}

/* A damaged entry does not keep the ones before it from being read. */
static void test_damage_further_on(void **state)
{
    struct qlb_blkio *io;
    struct qlb_qcow2_header *header;
    struct qlb_disk_reader *reader;
    struct qlb_disk *disk;
    struct qlb_error err;
    enum qlb_extent_type type;
    uint64_t run_length;

    (void)state;
    run("qemu-img create -f qcow2 d 1M && "
        "qemu-io -f qcow2 -c 'write -P 1 0 128k' d");
    load();
    put_be64(data + 0x40008, 0x8000000000060002);
    io = qlb_blkio_memory(data, data_size);
    header = qlb_qcow2_header_read(io, true, &err);
    disk = qlb_disk_open_io("d", io, header, 0, &err);
    reader = qlb_disk_reader_new(disk, &err);
    assert_int_equal(qlb_disk_extent(reader, 0, MIB, &type, &run_length,
                                     &err), 0);
    assert_int_equal(run_length, 65536);
    assert_int_equal(qlb_disk_extent(reader, 65536, MIB - 65536, &type,
                                     &run_length, &err), -1);
    assert_int_equal(err.code, QLB_E_DAMAGED);
    assert_int_equal(qlb_disk_extent(reader, 131072, MIB - 131072, &type,
                                     &run_length, &err), 0);
    assert_int_equal(type, QLB_EXTENT_ZERO);
    qlb_disk_reader_free(reader);
    qlb_disk_close(disk);
    qlb_qcow2_header_free(header);
    qlb_blkio_close(io);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_contiguous_clusters_are_one_read),
        cmocka_unit_test(test_few_clusters_of_a_huge_disk),
        cmocka_unit_test(test_steps_are_cheap),
        cmocka_unit_test(test_random_reads_by_threads),
        cmocka_unit_test(test_outside_of_the_disk),
        cmocka_unit_test(test_top_layer),
        cmocka_unit_test(test_files_of_the_chain),
        cmocka_unit_test(test_damaged_l1_entries),
        cmocka_unit_test(test_damaged_l2_entries),
        cmocka_unit_test(test_damaged_subclusters),
        cmocka_unit_test(test_damage_further_on),
    };

    return cmocka_run_group_tests_name("qcow2_map", tests, make_folder,
                                       remove_folder);
}
