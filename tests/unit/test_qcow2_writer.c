/* The qcow2 writer: what it writes is sound to qemu-img, and is read back as
 * it was written, by our reader and by qemu-img.
 *
 * Copyright (C) 2026 The qcow2 livebackup authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checked.h"
#include "qcow2_format.h"
#include "qcow2_map.h"
#include "qcow2_writer.h"

#define CLUSTER UINT64_C(65536)
#define L2_COVERS (UINT64_C(512) << 20)
#define TIB (UINT64_C(1) << 40)

static char folder[4096];

static const char *path_of(const char *name)
{
    static char path[4200];

    snprintf(path, sizeof(path), "%s/%s", folder, name);
    return path;
}

/* Output of a shell command, with IMAGE and DIR in its environment. */
static char *run(const char *command)
{
    static char output[65536];
    size_t n;
    FILE *pipe;

    setenv("IMAGE", path_of("image.qcow2"), 1);
    setenv("DIR", folder, 1);
    pipe = popen(command, "r");
    assert_non_null(pipe);
    n = fread(output, 1, sizeof(output) - 1, pipe);
    output[n] = 0;
    if (pclose(pipe) != 0) {
        fail_msg("%s: %s", command, output);
    }
    return output;
}

/* A cluster's content, from where it belongs. */
static void fill(uint8_t *buf, uint64_t offset)
{
    for (unsigned i = 0; i < CLUSTER; i += 8) {
        uint64_t v = (offset + i) * UINT64_C(0x9e3779b97f4a7c15);

        memcpy(buf + i, &v, 8);
    }
}

struct range {
    uint64_t offset;
    unsigned clusters;
};

static void put_ranges(struct qlb_qcow2_writer *writer,
                       struct qlb_outfile *out, const struct range *ranges,
                       unsigned n)
{
    static uint8_t buf[65536];
    struct qlb_error err;
    uint64_t host;

    for (unsigned i = 0; i < n; i++) {
        if (qlb_qcow2_writer_allocate(writer, ranges[i].offset,
                                      ranges[i].clusters, &host, &err) < 0) {
            fail_msg("%s", err.message);
        }
        for (unsigned c = 0; c < ranges[i].clusters; c++) {
            fill(buf, ranges[i].offset + c * CLUSTER);
            assert_int_equal(qlb_outfile_pwrite(out, buf, CLUSTER,
                                                host + c * CLUSTER, &err), 0);
        }
    }
}

static void make_image(uint64_t size, const struct range *ranges, unsigned n,
                       const struct qlb_qcow2_writer_bitmap *bitmap,
                       const void *ext)
{
    struct qlb_qcow2_writer *writer;
    struct qlb_outfile *out;
    struct qlb_error err;

    out = qlb_outfile_create(path_of("image.qcow2"), QLB_OUTFILE_FORCE, &err);
    assert_non_null(out);
    writer = qlb_qcow2_writer_new(out, size, &err);
    if (writer == NULL) {
        fail_msg("%s", err.message);
    }
    put_ranges(writer, out, ranges, n);
    if (qlb_qcow2_writer_finish(writer, bitmap, ext, &err) < 0 ||
        qlb_outfile_commit(out, &err) < 0) {
        fail_msg("%s", err.message);
    }
    qlb_qcow2_writer_free(writer);
    qlb_outfile_close(out);
    run("qemu-img check -q -f qcow2 \"$IMAGE\" 2>&1");
}

/* Walks over all extents: data exactly where it was put, with its content. */
static void check_content(uint64_t size, const struct range *ranges,
                          unsigned n)
{
    static uint8_t got[65536], want[65536];
    struct qlb_disk_reader *reader;
    struct qlb_disk *disk;
    struct qlb_error err;
    uint64_t run_length, pos = 0, in_range = 0;
    unsigned i = 0;

    disk = qlb_disk_open(path_of("image.qcow2"), 0, &err);
    if (disk == NULL) {
        fail_msg("%s", err.message);
    }
    assert_int_equal(qlb_disk_size(disk), size);
    reader = qlb_disk_reader_new(disk, &err);
    while (pos < size) {
        enum qlb_extent_type type;
        bool data = i < n && pos == ranges[i].offset + in_range;
        uint64_t step = min_u64(CLUSTER, size - pos);

        assert_int_equal(qlb_disk_extent(reader, pos, size - pos, &type,
                                         &run_length, &err), 0);
        assert_int_equal(type, data ? QLB_EXTENT_DATA : QLB_EXTENT_ZERO);
        if (!data) {
            assert_true(i == n || pos + run_length <= ranges[i].offset);
            pos += run_length;
            continue;
        }
        fill(want, pos);
        assert_int_equal(qlb_disk_read(reader, got, pos, step, &err), 0);
        assert_memory_equal(got, want, step);
        pos += step;
        in_range += CLUSTER;
        if (in_range == ranges[i].clusters * CLUSTER) {
            in_range = 0;
            i++;
        }
    }
    assert_int_equal(i, n);
    qlb_disk_reader_free(reader);
    qlb_disk_close(disk);
}

static void test_empty_disks(void **state)
{
    static const uint64_t sizes[] = {
        0, 512, 65536, 65536 + 512, L2_COVERS, L2_COVERS + 512,
        UINT64_C(20) << 30, TIB, 16 * TIB, 256 * TIB,
    };

    (void)state;
    for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        make_image(sizes[i], NULL, 0, NULL, NULL);
        check_content(sizes[i], NULL, 0);
    }
}

static void test_ranges(void **state)
{
    static const struct range ranges[] = {
        { 0, 1 }, { 2 * CLUSTER, 16 }, { L2_COVERS - 2 * CLUSTER, 2 },
        { L2_COVERS, 3 }, { 7 * L2_COVERS + CLUSTER, 1 },
        { 16 * TIB - 2 * CLUSTER, 2 },
    };

    (void)state;
    make_image(16 * TIB, ranges, 6, NULL, NULL);
    check_content(16 * TIB, ranges, 6);
    make_image(16 * TIB - CLUSTER + 512, ranges, 6, NULL, NULL);
    check_content(16 * TIB - CLUSTER + 512, ranges, 6);
}

/* The whole of a small disk, as qemu-img reads it. */
static void test_qemu_reads_the_same(void **state)
{
    static const struct range ranges[] = { { 0, 3 }, { 5 * CLUSTER, 11 } };
    static uint8_t buf[65536];
    FILE *f;

    (void)state;
    make_image(16 * CLUSTER - 1024, ranges, 2, NULL, NULL);
    run("qemu-img convert -f qcow2 -O raw \"$IMAGE\" \"$DIR/raw\" 2>&1");
    f = fopen(path_of("want"), "w");
    assert_non_null(f);
    for (unsigned c = 0; c < 16; c++) {
        memset(buf, 0, sizeof(buf));
        if (c < 3 || c >= 5) {
            fill(buf, c * CLUSTER);
        }
        assert_int_equal(fwrite(buf, c == 15 ? 64512 : 65536, 1, f), 1);
    }
    assert_int_equal(fclose(f), 0);
    run("cmp \"$DIR/raw\" \"$DIR/want\"");
}

/* Refcount blocks count 2 GiB each; at some sizes a block more is needed
 * because of the blocks themselves. Data is left to holes of the file. */
static void test_refcounts_around_a_block(void **state)
{
    (void)state;
    for (unsigned clusters = 32750; clusters <= 32772; clusters++) {
        struct qlb_qcow2_writer *writer;
        struct qlb_outfile *out;
        struct qlb_error err;
        uint64_t host, offset = 0;

        out = qlb_outfile_create(path_of("image.qcow2"), QLB_OUTFILE_FORCE,
                                 &err);
        assert_non_null(out);
        writer = qlb_qcow2_writer_new(out, 8 * L2_COVERS, &err);
        assert_non_null(writer);
        for (unsigned left = clusters; left > 0;) {
            unsigned n = left < 8192 ? left : 8192;

            assert_int_equal(qlb_qcow2_writer_allocate(writer, offset, n,
                                                       &host, &err), 0);
            left -= n;
            offset += n * CLUSTER;
        }
        assert_int_equal(qlb_qcow2_writer_finish(writer, NULL, NULL, &err),
                         0);
        assert_int_equal(qlb_outfile_commit(out, &err), 0);
        qlb_qcow2_writer_free(writer);
        qlb_outfile_close(out);
        run("qemu-img check -q -f qcow2 \"$IMAGE\" 2>&1");
    }
}

static void test_bitmap(void **state)
{
    static const struct {
        uint64_t size;
        unsigned bits;
    } cases[] = {
        { 512, 9 }, { 65536, 16 }, { CLUSTER * 7, 16 }, { TIB, 16 },
        { 16 * TIB, 16 }, { 2 * TIB, 9 }, { 16 * TIB, 31 },
    };
    static uint8_t ext[QLB_EXT_LIVEBACKUP_SIZE];
    const char *output;

    (void)state;
    memset(ext, 0xa5, sizeof(ext));
    for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct qlb_qcow2_writer_bitmap bitmap = { "lb-name", cases[i].bits };
        char want[64];

        make_image(cases[i].size, NULL, 0, &bitmap, ext);
        output = run("qemu-img info -f qcow2 --output=json \"$IMAGE\" | "
                     "jq -r '.\"format-specific\".data.bitmaps[] | "
                     "\"\\(.name) \\(.granularity) \\(.flags)\"'");
        snprintf(want, sizeof(want), "lb-name %llu [\"auto\"]\n",
                 1ULL << cases[i].bits);
        assert_string_equal(output, want);
    }
}

/* A stock QEMU uses the bitmap: the canaries are set, and a write is seen. */
static void test_qemu_uses_the_bitmap(void **state)
{
    struct qlb_qcow2_writer_bitmap bitmap = { "b", 16 };
    const char *output;

    (void)state;
    make_image(UINT64_C(100) << 30, NULL, 0, &bitmap, NULL);
    run("qemu-io -f qcow2 -c 'write -P 1 1G 64k' \"$IMAGE\" >/dev/null");
    run("qemu-img check -q -f qcow2 \"$IMAGE\" 2>&1");
    /* Merged into a new one, the bits can be counted over NBD. */
    output = run(
        "s=\"$DIR/nbd\"; qemu-nbd -r -f qcow2 -B b -k \"$s\" -t \"$IMAGE\" & "
        "p=$!; while [ ! -S \"$s\" ]; do sleep 0.02; done; "
        "qemu-img map --output=json --image-opts "
        "driver=nbd,server.type=unix,server.path=\"$s\","
        "x-dirty-bitmap=qemu:dirty-bitmap:b | "
        "jq -r '.[] | select(.data == false) | \"\\(.start) \\(.length)\"'; "
        "kill $p; wait $p; rm -f \"$s\"");
    assert_string_equal(output, "0 65536\n1073741824 65536\n"
                                "107374116864 65536\n");
}

static void test_header(void **state)
{
    static uint8_t ext[QLB_EXT_LIVEBACKUP_SIZE];
    struct qlb_qcow2_writer_bitmap bitmap = { "b", 16 };
    const struct qlb_header_ext *found;
    struct qlb_qcow2_header *header;
    struct qlb_blkio *io;
    struct qlb_error err;
    bool twice;

    (void)state;
    memset(ext, 0x5a, sizeof(ext));
    make_image(TIB, NULL, 0, &bitmap, ext);
    io = qlb_blkio_open(path_of("image.qcow2"), 0, &err);
    assert_non_null(io);
    header = qlb_qcow2_header_read(io, true, &err);
    assert_non_null(header);
    assert_int_equal(header->version, 3);
    assert_int_equal(header->compatible, 0);
    assert_int_equal(header->incompatible, 0);
    assert_int_equal(header->autoclear, QLB_AUTOCLEAR_BITMAPS |
                                            QLB_AUTOCLEAR_LIVEBACKUP);
    assert_true(qlb_qcow2_header_has_room(header));
    found = qlb_qcow2_header_ext(header, QLB_EXT_LIVEBACKUP, &twice);
    assert_non_null(found);
    assert_false(twice);
    assert_int_equal(found->size, sizeof(ext));
    assert_memory_equal(found->data, ext, sizeof(ext));
    found = qlb_qcow2_header_ext(header, QLB_EXT_FEATURE_NAMES, NULL);
    assert_non_null(found);
    assert_int_equal(found->data[0], 2);
    assert_int_equal(found->data[1], 62);
    assert_string_equal((char *)found->data + 2, "livebackup");
    qlb_qcow2_header_free(header);
    qlb_blkio_close(io);

    make_image(TIB, NULL, 0, NULL, NULL);
    io = qlb_blkio_open(path_of("image.qcow2"), 0, &err);
    header = qlb_qcow2_header_read(io, true, &err);
    assert_int_equal(header->autoclear, 0);
    assert_int_equal(header->n_ext, 0);
    qlb_qcow2_header_free(header);
    qlb_blkio_close(io);
}

/* The backing file's name is where QEMU and we look for it, whatever else is in
 * the header. */
static void test_backing_file(void **state)
{
    static uint8_t ext[QLB_EXT_LIVEBACKUP_SIZE];
    struct qlb_qcow2_writer_bitmap bitmap = { "b", 16 };
    static const struct range range = { CLUSTER, 2 };
    char name[1025], want[1100];

    (void)state;
    run("head -c 1M /dev/urandom >\"$DIR/base\"");
    for (unsigned i = 0; i < 4; i++) {
        struct qlb_outfile *out;
        struct qlb_qcow2_writer *writer;
        struct qlb_error err;

        /* ./././base */
        memset(name, 0, sizeof(name));
        for (unsigned k = 0; k < (i & 1 ? 1018 : 0); k += 2) {
            strcat(name, "./");
        }
        strcat(name, "base");
        out = qlb_outfile_create(path_of("image.qcow2"), QLB_OUTFILE_FORCE,
                                 &err);
        assert_non_null(out);
        writer = qlb_qcow2_writer_new(out, 1 << 20, &err);
        assert_non_null(writer);
        qlb_qcow2_writer_set_backing(writer, name, "raw");
        put_ranges(writer, out, &range, 1);
        assert_int_equal(qlb_qcow2_writer_finish(writer, i & 2 ? &bitmap
                                                               : NULL,
                                                 i & 2 ? ext : NULL, &err), 0);
        assert_int_equal(qlb_outfile_commit(out, &err), 0);
        qlb_qcow2_writer_free(writer);
        qlb_outfile_close(out);
        run("qemu-img check -q -f qcow2 \"$IMAGE\" 2>&1");
        snprintf(want, sizeof(want), "%s raw\n", name);
        assert_string_equal(
            run("qemu-img info -f qcow2 --output=json \"$IMAGE\" | jq -r "
                "'\"\\(.\"backing-filename\") "
                "\\(.\"backing-filename-format\")\"'"), want);
        run("cd \"$DIR\" && qemu-img convert -f qcow2 -O raw image.qcow2 it && "
            "cmp -n 65536 it base && cmp -i 196608 it base");
    }
}

/* Zeroes hide the backing file, over several tables and up to the last cluster,
 * beside clusters with content. */
static void test_zeroes(void **state)
{
    static const struct range range = { CLUSTER, 2 };
    const uint64_t size = 3 * L2_COVERS - 512;
    struct qlb_qcow2_writer *writer;
    struct qlb_outfile *out;
    struct qlb_error err;

    (void)state;
    run("head -c 1M /dev/zero | tr '\\0' x >\"$DIR/base\"; "
        "truncate -s 1610612224 \"$DIR/base\"; "
        "printf xyz | dd of=\"$DIR/base\" bs=1 seek=1610612000 2>&1");
    out = qlb_outfile_create(path_of("image.qcow2"), QLB_OUTFILE_FORCE, &err);
    assert_non_null(out);
    writer = qlb_qcow2_writer_new(out, size, &err);
    assert_non_null(writer);
    qlb_qcow2_writer_set_backing(writer, "base", "raw");
    put_ranges(writer, out, &range, 1);
    assert_int_equal(qlb_qcow2_writer_zero(writer, CLUSTER, 1, &err), -1);
    assert_int_equal(qlb_qcow2_writer_zero(writer, 5 * CLUSTER,
                                           3 * L2_COVERS / CLUSTER - 5, &err),
                     0);
    assert_int_equal(qlb_qcow2_writer_zero(writer, 9 * CLUSTER, 1, &err), -1);
    assert_int_equal(qlb_qcow2_writer_finish(writer, NULL, NULL, &err), 0);
    assert_int_equal(qlb_outfile_commit(out, &err), 0);
    qlb_qcow2_writer_free(writer);
    qlb_outfile_close(out);
    run("qemu-img check -q -f qcow2 \"$IMAGE\" 2>&1");
    assert_string_equal(
        run("cd \"$DIR\" && qemu-img map -f qcow2 --output=json image.qcow2 | "
            "jq -r '.[] | \"\\(.start) \\(.depth) \\(.zero)\"'"),
        "0 1 false\n65536 0 false\n196608 1 false\n327680 0 true\n");
}

static void expect_no_backing(const char *name)
{
    struct qlb_outfile *out;
    struct qlb_qcow2_writer *writer;
    struct qlb_error err;

    out = qlb_outfile_create(path_of("none.qcow2"), 0, &err);
    assert_non_null(out);
    writer = qlb_qcow2_writer_new(out, 1 << 20, &err);
    assert_non_null(writer);
    qlb_qcow2_writer_set_backing(writer, name, "raw");
    assert_int_equal(qlb_qcow2_writer_finish(writer, NULL, NULL, &err), -1);
    assert_int_equal(err.code, QLB_E_USAGE);
    qlb_qcow2_writer_free(writer);
    qlb_outfile_close(out);
}

static void test_long_backing_names(void **state)
{
    char name[1025];

    (void)state;
    memset(name, 'x', 1024);
    name[1024] = 0;
    expect_no_backing(name);
    expect_no_backing("");
}

static void test_unfinished_is_no_image(void **state)
{
    static const struct range range = { 0, 4 };
    struct qlb_qcow2_writer *writer;
    struct qlb_outfile *out;
    struct qlb_blkio *io;
    struct qlb_error err;
    char fd_path[64];

    (void)state;
    out = qlb_outfile_create(path_of("image.qcow2"), QLB_OUTFILE_FORCE, &err);
    writer = qlb_qcow2_writer_new(out, TIB, &err);
    put_ranges(writer, out, &range, 1);
    snprintf(fd_path, sizeof(fd_path), "/dev/fd/%d",
             qlb_outfile_descriptor(out));
    io = qlb_blkio_open(fd_path, 0, &err);
    assert_non_null(io);
    assert_null(qlb_qcow2_header_read(io, true, &err));
    assert_int_equal(err.code, QLB_E_RUNTIME);
    assert_non_null(strstr(err.message, "not a qcow2 image"));
    qlb_blkio_close(io);
    qlb_qcow2_writer_free(writer);
    qlb_outfile_close(out);
}

static void expect_refusal(struct qlb_qcow2_writer *writer, uint64_t offset,
                           unsigned clusters)
{
    struct qlb_error err;
    uint64_t host;

    assert_int_equal(qlb_qcow2_writer_allocate(writer, offset, clusters,
                                               &host, &err), -1);
    assert_int_equal(err.code, QLB_E_USAGE);
}

static void test_refusals(void **state)
{
    struct qlb_qcow2_writer_bitmap bitmap = { "b", 9 };
    struct qlb_qcow2_writer *writer;
    struct qlb_outfile *out;
    struct qlb_error err;
    uint64_t host;

    (void)state;
    out = qlb_outfile_create(path_of("other"), QLB_OUTFILE_FORCE, &err);
    assert_null(qlb_qcow2_writer_new(out, 1000, &err));
    assert_int_equal(err.code, QLB_E_USAGE);
    assert_null(qlb_qcow2_writer_new(out, UINT64_MAX - 511, &err));
    assert_int_equal(err.code, QLB_E_USAGE);
    writer = qlb_qcow2_writer_new(out, 8 * TIB, &err);
    assert_non_null(writer);
    expect_refusal(writer, 512, 1);
    expect_refusal(writer, 0, 0);
    expect_refusal(writer, CLUSTER, 8192);
    expect_refusal(writer, 8 * TIB, 1);
    assert_int_equal(qlb_qcow2_writer_allocate(writer, CLUSTER, 8191, &host,
                                               &err), 0);
    expect_refusal(writer, 0, 2);
    assert_int_equal(qlb_qcow2_writer_allocate(writer, 0, 1, &host, &err), 0);
    expect_refusal(writer, 0, 1);
    expect_refusal(writer, L2_COVERS - CLUSTER, 1);
    assert_int_equal(qlb_qcow2_writer_allocate(writer, L2_COVERS, 1, &host,
                                               &err), 0);
    expect_refusal(writer, 0, 1);
    /* 2 GiB of bits: more than QEMU takes. */
    assert_int_equal(qlb_qcow2_writer_finish(writer, &bitmap, NULL, &err),
                     -1);
    assert_int_equal(err.code, QLB_E_USAGE);
    qlb_qcow2_writer_free(writer);
    qlb_outfile_close(out);
}

static int make_folder(void **state)
{
    const char *parent = getenv("TMPDIR");

    (void)state;
    snprintf(folder, sizeof(folder), "%s/qcow2-writer-XXXXXX",
             parent ? parent : "/tmp");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    run("rm -rf \"$DIR\"");
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_empty_disks),
        cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_qemu_reads_the_same),
        cmocka_unit_test(test_refcounts_around_a_block),
        cmocka_unit_test(test_bitmap),
        cmocka_unit_test(test_qemu_uses_the_bitmap),
        cmocka_unit_test(test_header),
        cmocka_unit_test(test_backing_file),
        cmocka_unit_test(test_zeroes),
        cmocka_unit_test(test_long_backing_names),
        cmocka_unit_test(test_unfinished_is_no_image),
        cmocka_unit_test(test_refusals),
    };

    return cmocka_run_group_tests_name("qcow2_writer", tests, make_folder,
                                       remove_folder);
}
