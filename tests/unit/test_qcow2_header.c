/* The header of an image: every field poked, and what is written back.
 *
 * The images are made by a stock qemu-img, loaded into memory, changed there,
 * and given back to qemu-img where it shall judge them.
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

#include "byteorder.h"
#include "checked.h"
#include "qcow2_format.h"
#include "qcow2_header.h"

static char folder[4096];

static int make_folder(void **state)
{
    const char *parent = getenv("TMPDIR");

    (void)state;
    snprintf(folder, sizeof(folder), "%s/qcow2-header-XXXXXX",
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

static char *run(const char *fmt, ...)
    __attribute__((format(printf, 1, 2)));

static char *run(const char *fmt, ...)
{
    static char output[65536];
    char command[4096];
    va_list ap;
    size_t n;
    FILE *pipe;

    va_start(ap, fmt);
    vsnprintf(command, sizeof(command), fmt, ap);
    va_end(ap);
    pipe = popen(command, "r");
    assert_non_null(pipe);
    n = fread(output, 1, sizeof(output) - 1, pipe);
    output[n] = 0;
    if (pclose(pipe) != 0) {
        fail_msg("%s: %s", command, output);
    }
    return output;
}

/* ---- a file in memory that keeps a log of what is done to it ---- */

struct image {
    struct qlb_blkio io;
    uint8_t data[1 << 20];
    char log[1024];
    int writes_left; /* then a write fails; -1: never */
};

static struct image image;

static void note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

static void note(const char *fmt, ...)
{
    size_t used = strlen(image.log);
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(image.log + used, sizeof(image.log) - used, fmt, ap);
    va_end(ap);
}

static int64_t image_pread(struct qlb_blkio *io, void *buf, size_t len,
                           uint64_t offset, struct qlb_error *err)
{
    uint64_t n = offset < io->size ? min_u64(len, io->size - offset) : 0;

    (void)err;
    memcpy(buf, image.data + offset, n);
    return (int64_t)n;
}

static int image_pwrite(struct qlb_blkio *io, const void *buf, size_t len,
                        uint64_t offset, struct qlb_error *err)
{
    assert_true(range_within(offset, len, sizeof(image.data)));
    if (image.writes_left == 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "no more writes");
    }
    image.writes_left -= image.writes_left > 0;
    note("write %llu %zu\n", (unsigned long long)offset, len);
    memcpy(image.data + offset, buf, len);
    io->size = max_u64(io->size, offset + len);
    return 0;
}

static int image_sync(struct qlb_blkio *io, struct qlb_error *err)
{
    (void)io;
    (void)err;
    note("sync\n");
    return 0;
}

static void image_close(struct qlb_blkio *io)
{
    (void)io;
}

static const struct qlb_blkio_ops image_ops = {
    image_pread, image_pwrite, image_sync, image_close,
};

static void load(void)
{
    static char name[] = "image";
    FILE *f = fopen("image.qcow2", "r");

    assert_non_null(f);
    memset(&image, 0, sizeof(image));
    image.io.ops = &image_ops;
    image.io.name = name;
    image.io.fd = -1;
    image.io.size = fread(image.data, 1, sizeof(image.data), f);
    image.writes_left = -1;
    fclose(f);
}

/* qemu-img create OPTIONS image.qcow2 SIZE, loaded. */
static void create(const char *options, const char *size)
{
    run("rm -f image.qcow2; qemu-img create -q -f qcow2 %s image.qcow2 %s "
        "2>&1", options, size);
    load();
}

static void store(void)
{
    FILE *f = fopen("image.qcow2", "w");

    assert_non_null(f);
    assert_int_equal(fwrite(image.data, image.io.size, 1, f), 1);
    assert_int_equal(fclose(f), 0);
}

static struct qlb_qcow2_header *read_it(void)
{
    struct qlb_error err;
    struct qlb_qcow2_header *h = qlb_qcow2_header_read(&image.io, true, &err);

    if (h == NULL) {
        fail_msg("%s", err.message);
    }
    return h;
}

static void expect_error(bool for_reading_data, enum qlb_code code,
                         const char *message)
{
    struct qlb_error err = { 0 };

    assert_null(qlb_qcow2_header_read(&image.io, for_reading_data, &err));
    assert_string_equal(err.message, message);
    assert_int_equal(err.code, code);
}

/* ---- reading ---- */

static void test_version_2(void **state)
{
    struct qlb_qcow2_header *h;

    (void)state;
    create("-o compat=0.10,cluster_size=4k", "12345344");
    h = read_it();
    assert_int_equal(h->version, 2);
    assert_int_equal(h->cluster_bits, 12);
    assert_int_equal(h->cluster_size, 4096);
    assert_int_equal(h->virtual_size, 12345344);
    assert_int_equal(h->refcount_order, 4);
    assert_int_equal(h->header_length, 72);
    assert_null(h->backing_name);
    qlb_qcow2_header_free(h);
}

static void test_version_3(void **state)
{
    struct qlb_qcow2_header *h;

    (void)state;
    create("-u -b some/base.img -F raw -o cluster_size=128k,refcount_bits=1,"
           "lazy_refcounts=on,compression_type=zstd,extended_l2=on", "20G");
    h = read_it();
    assert_int_equal(h->version, 3);
    assert_int_equal(h->cluster_bits, 17);
    assert_int_equal(h->refcount_order, 0);
    assert_int_equal(h->compatible, 1);
    assert_int_equal(h->compression, QLB_COMPRESSION_ZSTD);
    assert_true(h->extended_l2);
    assert_false(h->has_bitmaps);
    assert_string_equal(h->backing_name, "some/base.img");
    assert_string_equal(h->backing_format, "raw");
    qlb_qcow2_header_free(h);
}

static void test_bitmaps_extension(void **state)
{
    struct qlb_qcow2_header *h;

    (void)state;
    create("", "1G");
    run("qemu-img bitmap --add image.qcow2 one 2>&1 && "
        "qemu-img bitmap --add image.qcow2 two 2>&1");
    load();
    h = read_it();
    assert_true(h->has_bitmaps);
    assert_int_equal(h->n_bitmaps, 2);
    assert_int_equal(h->bitmap_directory_size, 64);
    assert_int_equal(h->bitmap_directory_offset % 65536, 0);
    assert_int_equal(h->autoclear, QLB_AUTOCLEAR_BITMAPS);
    qlb_qcow2_header_free(h);
}

struct poke {
    unsigned offset, size;
    uint64_t value;
    enum qlb_code code;
    const char *message;
};

#define TOO_LARGE UINT64_C(0xffffffffffffffff)

static const struct poke pokes[] = {
    { 0, 4, 0x51464900, 1, "image: not a qcow2 image" },
    { 4, 4, 0, 1, "image: qcow2 version 0 is not supported" },
    { 4, 4, 1, 1, "image: qcow2 version 1 is not supported" },
    { 4, 4, 4, 1, "image: qcow2 version 4 is not supported" },
    { 8, 8, 65536, 4,
      "image: damaged header: backing file name at offset 65536" },
    { 8, 8, 100, 4,
      "image: damaged header: backing file name at offset 100" },
    { 8, 8, TOO_LARGE, 4, "image: damaged header: backing file name at "
      "offset 18446744073709551615" },
    { 16, 4, 1024, 4,
      "image: damaged header: backing file name of 1024 bytes" },
    { 16, 4, TOO_LARGE, 4,
      "image: damaged header: backing file name of 4294967295 bytes" },
    { 20, 4, 8, 4,
      "image: damaged header: cluster bits 8 are not 9 to 21" },
    { 20, 4, 22, 4,
      "image: damaged header: cluster bits 22 are not 9 to 21" },
    { 20, 4, 0x80000010, 4,
      "image: damaged header: cluster bits 2147483664 are not 9 to 21" },
    { 24, 8, UINT64_C(1) << 30 | 1, 4,
      "image: damaged header: L1 table of 2 entries is too small for a disk "
      "of 1073741825 bytes" },
    { 24, 8, TOO_LARGE, 4,
      "image: damaged header: L1 table of 2 entries is too small for a disk "
      "of 18446744073709551615 bytes" },
    { 32, 4, 1, 1, "image: encrypted images (AES) are not supported" },
    { 32, 4, 2, 1, "image: encrypted images (LUKS) are not supported" },
    { 32, 4, 3, 1, "image: unknown encryption method 3" },
    { 36, 4, 1, 4,
      "image: damaged header: L1 table of 1 entries is too small for a disk "
      "of 1073741824 bytes" },
    { 36, 4, 0, 4,
      "image: damaged header: L1 table of 0 entries is too small for a disk "
      "of 1073741824 bytes" },
    { 36, 4, 4194304, 4,
      "image: damaged: the file ends at 196624, before the end of the L1 "
      "table at 196608" },
    { 36, 4, 4194305, 4,
      "image: damaged header: L1 table of 4194305 entries" },
    { 36, 4, TOO_LARGE, 4,
      "image: damaged header: L1 table of 4294967295 entries" },
    { 40, 8, 196608 + 512, 4,
      "image: damaged header: L1 table at offset 197120" },
    { 40, 8, 0, 4, "image: damaged header: L1 table at offset 0" },
    { 40, 8, 262144, 4,
      "image: damaged: the file ends at 196624, before the end of the L1 "
      "table at 262144" },
    { 40, 8, UINT64_C(0xffffffffffff0000), 4,
      "image: damaged header: L1 table at offset 18446744073709486080" },
    { 48, 8, 65536 + 8, 4, "image: damaged header: refcount table of 1 "
      "clusters at offset 65544" },
    { 48, 8, 0, 4,
      "image: damaged header: refcount table of 1 clusters at offset 0" },
    { 48, 8, 1 << 20, 4, "image: damaged: the file ends at 196624, before "
      "the refcount table at 1048576" },
    { 56, 4, 0, 4,
      "image: damaged header: refcount table of 0 clusters at offset 65536" },
    { 56, 4, 129, 4, "image: damaged header: refcount table of 129 clusters "
      "at offset 65536" },
    { 56, 4, TOO_LARGE, 4, "image: damaged header: refcount table of "
      "4294967295 clusters at offset 65536" },
    { 60, 4, 1, 4,
      "image: damaged header: 1 snapshots, table at offset 0" },
    { 60, 4, 65537, 4,
      "image: damaged header: 65537 snapshots, table at offset 0" },
    { 72, 8, 2, 4, "image: the image is marked corrupt; repair it with: "
      "qemu-img check -r all image" },
    { 72, 8, 4, 1, "image: the name of its external data file is not "
      "recorded; record it with: qemu-img amend -o data_file=FILE image" },
    { 72, 8, 8, 4, "image: damaged header: compression type and its feature "
      "bit contradict each other" },
    { 72, 8, 0x8000000000000020, 1,
      "image: unknown incompatible features: bit 5, bit 63" },
    { 72, 8, UINT64_C(1) << 62, 3, "image: a rollback was not finished, its "
      "content is of no point in time; run lbrestore --in-place again, or "
      "replace it with: lbrestore --force -o image" },
    { 96, 4, 7, 4, "image: damaged header: refcount order 7" },
    { 96, 4, TOO_LARGE, 4,
      "image: damaged header: refcount order 4294967295" },
    { 100, 4, 96, 4, "image: damaged header: header length 96" },
    { 100, 4, 108, 4, "image: damaged header: header length 108" },
    { 100, 4, 65544, 4, "image: damaged header: header length 65544" },
    { 104, 1, 1, 4, "image: damaged header: compression type and its feature "
      "bit contradict each other" },
    { 116, 4, 65536, 4, "image: damaged header: extension 0xe2792aca of "
      "65536 bytes does not fit" },
    { 116, 4, TOO_LARGE, 4, "image: damaged header: extension 0xe2792aca of "
      "4294967295 bytes does not fit" },
    { 112, 4, 0x12345678, 1, "image: the backing file 'b' has no recorded "
      "format; record it with: qemu-img rebase -u -F FORMAT -b b image" },
};

static void poke(const struct poke *p)
{
    uint8_t bytes[8];

    put_be64(bytes, p->value);
    memcpy(image.data + p->offset, bytes + 8 - p->size, p->size);
}

static void test_poked_fields(void **state)
{
    (void)state;
    create("-u -b b -F raw", "1G");
    for (unsigned i = 0; i < sizeof(pokes) / sizeof(pokes[0]); i++) {
        load();
        poke(&pokes[i]);
        expect_error(true, pokes[i].code, pokes[i].message);
    }
}

/* Where a value is at its limit, it is taken. */
static void test_limits(void **state)
{
    static const struct poke fine[] = {
        { 16, 4, 0 }, { 72, 8, 1 }, { 80, 8, TOO_LARGE },
        { 88, 8, TOO_LARGE & ~UINT64_C(2) }, { 96, 4, 0 }, { 96, 4, 6 },
        { 56, 4, 128 }, { 36, 4, 2 },
    };

    (void)state;
    create("-u -b b -F raw", "1G");
    for (unsigned i = 0; i < sizeof(fine) / sizeof(fine[0]); i++) {
        load();
        poke(&fine[i]);
        qlb_qcow2_header_free(read_it());
    }
}

/* Whatever one byte says: a header or an error, and nothing worse. */
static void test_every_byte(void **state)
{
    static const uint8_t flips[] = { 0x01, 0x80, 0xff, 0x55 };

    (void)state;
    create("-u -b some/backing/file.qcow2 -F qcow2 -o data_file=d", "1G");
    run("qemu-img bitmap --add image.qcow2 b 2>&1 || true");
    load();
    for (unsigned i = 0; i < 1024; i++) {
        for (unsigned k = 0; k < sizeof(flips); k++) {
            struct qlb_qcow2_header *h;
            struct qlb_error err = { 0 };

            image.data[i] ^= flips[k];
            for (int reading = 0; reading < 2; reading++) {
                h = qlb_qcow2_header_read(&image.io, reading, &err);
                if (h == NULL) {
                    assert_true(err.code == QLB_E_DAMAGED ||
                                err.code == QLB_E_RUNTIME);
                    assert_int_equal(strncmp(err.message, "image: ", 7), 0);
                } else {
                    qlb_qcow2_header_has_room(h);
                }
                qlb_qcow2_header_free(h);
            }
            image.data[i] ^= flips[k];
        }
    }
}

static void test_cut_anywhere(void **state)
{
    uint64_t size;

    (void)state;
    create("-u -b some/backing/file.qcow2 -F qcow2", "1G");
    size = image.io.size;
    for (image.io.size = 0; image.io.size < size; image.io.size += 61) {
        struct qlb_error err;

        assert_null(qlb_qcow2_header_read(&image.io, true, &err));
    }
}

static void test_feature_names(void **state)
{
    static const char name[46] = "frob\x1b[2Jnicated tables and more of such";
    uint8_t table[3 * 48 + 5] = { 0 };
    struct qlb_qcow2_header *h;
    struct qlb_error err;
    char message[1024];

    (void)state;
    create("", "1G");
    h = read_it();
    table[0] = 1; /* a compatible feature with the same bit */
    table[1] = 9;
    memcpy(table + 2, "wrong", 5);
    table[48 + 1] = 9;
    memcpy(table + 48 + 2, name, sizeof(name));
    table[96 + 1] = 10;
    assert_int_equal(qlb_qcow2_header_set_ext(h, QLB_EXT_FEATURE_NAMES, table,
                                              sizeof(table), &err), 0);
    h->incompatible |= 3 << 9;
    assert_int_equal(qlb_qcow2_header_write(h, &image.io, &err), 0);
    qlb_qcow2_header_free(h);
    snprintf(message, sizeof(message), "image: unknown incompatible features: "
             "frob?[2J%.38s, bit 10", name + 8);
    expect_error(true, QLB_E_RUNTIME, message);

    memset(image.data + QLB_H_INCOMPATIBLE, 0xff, 8);
    assert_null(qlb_qcow2_header_read(&image.io, true, &err));
    assert_non_null(strstr(err.message, ", ..."));
}

static void test_raw_data_file_has_no_backing_file(void **state)
{
    (void)state;
    create("-o data_file=d,data_file_raw=on", "1G");
    put_be64(image.data + 8, 60000);
    put_be32(image.data + 16, 1);
    image.data[60000] = 'b';
    expect_error(true, QLB_E_DAMAGED, "image: damaged header: a raw external "
                 "data file and a backing file exclude each other");
}

static void test_standard_extension_twice(void **state)
{
    (void)state;
    create("-u -b b -F raw", "1G");
    /* The table of feature names becomes a second format. */
    assert_int_equal(get_be32(image.data + 128), QLB_EXT_FEATURE_NAMES);
    put_be32(image.data + 128, QLB_EXT_BACKING_FORMAT);
    expect_error(true, QLB_E_DAMAGED,
                 "image: damaged header: extension 0xe2792aca appears twice");
}

static void test_long_format_name(void **state)
{
    struct qlb_qcow2_header *h;
    struct qlb_error err;

    (void)state;
    create("-u -b b -F raw", "1G");
    h = read_it();
    qlb_qcow2_header_set_ext(h, QLB_EXT_BACKING_FORMAT, "a-format-of-16-b",
                             16, &err);
    assert_int_equal(qlb_qcow2_header_write(h, &image.io, &err), 0);
    qlb_qcow2_header_free(h);
    expect_error(true, QLB_E_DAMAGED, "image: damaged header: backing format "
                 "name of 16 bytes");
}

/* ---- extensions in memory ---- */

static void test_set_ext(void **state)
{
    struct qlb_qcow2_header *h;
    struct qlb_error err;
    const struct qlb_header_ext *ext;
    unsigned n;
    bool twice;

    (void)state;
    create("", "1G");
    h = read_it();
    n = h->n_ext;
    assert_null(qlb_qcow2_header_ext(h, 77, &twice));
    assert_false(twice);
    assert_int_equal(qlb_qcow2_header_set_ext(h, 77, "abc", 3, &err), 0);
    assert_int_equal(qlb_qcow2_header_set_ext(h, 78, "", 0, &err), 0);
    assert_int_equal(qlb_qcow2_header_set_ext(h, 77, "defg", 4, &err), 0);
    assert_int_equal(h->n_ext, n + 2);
    ext = qlb_qcow2_header_ext(h, 77, &twice);
    assert_ptr_equal(ext, &h->ext[n]);
    assert_int_equal(ext->size, 4);
    assert_memory_equal(ext->data, "defg", 4);
    h->ext[n + 1].type = 77;
    qlb_qcow2_header_ext(h, 77, &twice);
    assert_true(twice);
    assert_int_equal(qlb_qcow2_header_set_ext(h, 77, "x", 1, &err), 0);
    assert_int_equal(h->n_ext, n + 1);
    assert_int_equal(qlb_qcow2_header_set_ext(h, 77, NULL, 0, &err), 0);
    assert_int_equal(qlb_qcow2_header_set_ext(h, 77, NULL, 0, &err), 0);
    assert_int_equal(h->n_ext, n);
    qlb_qcow2_header_free(h);
}

static void test_rollback_mark(void **state)
{
    const struct qlb_header_ext *table;
    struct qlb_qcow2_header *h;
    struct qlb_error err;
    uint32_t size;

    (void)state;
    create("", "1G");
    h = read_it();
    size = qlb_qcow2_header_ext(h, QLB_EXT_FEATURE_NAMES, NULL)->size;
    assert_int_equal(qlb_qcow2_header_mark_rollback(h, true, &err), 0);
    table = qlb_qcow2_header_ext(h, QLB_EXT_FEATURE_NAMES, NULL);
    assert_int_equal(table->size, size + 48);
    assert_memory_equal(table->data + size,
                        "\0\76unfinished rollback: lbrestore --in-place", 44);
    assert_int_equal(qlb_qcow2_header_write(h, &image.io, &err), 0);
    qlb_qcow2_header_free(h);
    assert_null(qlb_qcow2_header_read(&image.io, true, &err));
    assert_int_equal(err.code, QLB_E_UNTRUSTED);

    h = qlb_qcow2_header_read_unfinished(&image.io, &err);
    assert_non_null(h);
    assert_int_equal(h->incompatible, QLB_INCOMPAT_ROLLBACK);
    assert_int_equal(qlb_qcow2_header_mark_rollback(h, false, &err), 0);
    assert_int_equal(h->incompatible, 0);
    table = qlb_qcow2_header_ext(h, QLB_EXT_FEATURE_NAMES, NULL);
    assert_int_equal(table->size, size);
    qlb_qcow2_header_free(h);
}

static void test_name_feature(void **state)
{
    struct qlb_qcow2_header *h;
    struct qlb_error err;
    const struct qlb_header_ext *table;
    uint32_t size;

    (void)state;
    create("", "1G");
    h = read_it();
    table = qlb_qcow2_header_ext(h, QLB_EXT_FEATURE_NAMES, NULL);
    size = table->size;
    assert_int_equal(qlb_qcow2_header_name_feature(h, false, &err), 0);
    assert_int_equal(qlb_qcow2_header_name_feature(h, true, &err), 0);
    assert_int_equal(qlb_qcow2_header_name_feature(h, true, &err), 0);
    table = qlb_qcow2_header_ext(h, QLB_EXT_FEATURE_NAMES, NULL);
    assert_int_equal(table->size, size + 48);
    assert_memory_equal(table->data + size, "\2\76livebackup\0", 13);
    assert_int_equal(qlb_qcow2_header_name_feature(h, false, &err), 0);
    table = qlb_qcow2_header_ext(h, QLB_EXT_FEATURE_NAMES, NULL);
    assert_int_equal(table->size, size);

    qlb_qcow2_header_set_ext(h, QLB_EXT_FEATURE_NAMES, NULL, 0, &err);
    assert_int_equal(qlb_qcow2_header_name_feature(h, true, &err), 0);
    table = qlb_qcow2_header_ext(h, QLB_EXT_FEATURE_NAMES, NULL);
    assert_int_equal(table->size, 48);
    assert_int_equal(qlb_qcow2_header_name_feature(h, false, &err), 0);
    assert_null(qlb_qcow2_header_ext(h, QLB_EXT_FEATURE_NAMES, NULL));
    qlb_qcow2_header_free(h);
}

/* ---- writing ---- */

static uint8_t payload[QLB_EXT_LIVEBACKUP_SIZE];

static void turn_on(struct qlb_qcow2_header *h)
{
    struct qlb_error err;

    memset(payload, 0x5a, sizeof(payload));
    assert_int_equal(qlb_qcow2_header_set_ext(h, QLB_EXT_LIVEBACKUP, payload,
                                              sizeof(payload), &err), 0);
    assert_int_equal(qlb_qcow2_header_name_feature(h, true, &err), 0);
    h->autoclear |= QLB_AUTOCLEAR_LIVEBACKUP;
}

static void expect_payload(const struct qlb_qcow2_header *h)
{
    const struct qlb_header_ext *ext;

    ext = qlb_qcow2_header_ext(h, QLB_EXT_LIVEBACKUP, NULL);
    assert_non_null(ext);
    assert_int_equal(ext->size, sizeof(payload));
    assert_memory_equal(ext->data, payload, sizeof(payload));
}

static void test_rewritten_unchanged(void **state)
{
    static uint8_t before[65536];
    struct qlb_qcow2_header *h;
    struct qlb_error err;

    (void)state;
    create("-u -b base -F raw -o compression_type=zstd", "1G");
    memcpy(before, image.data, sizeof(before));
    h = read_it();
    assert_int_equal(qlb_qcow2_header_write(h, &image.io, &err), 0);
    assert_memory_equal(image.data, before, sizeof(before));
    assert_string_equal(image.log, "write 0 4096\n");
    qlb_qcow2_header_free(h);

    create("-o compat=0.10,cluster_size=512", "1M");
    memcpy(before, image.data, 512);
    h = read_it();
    assert_int_equal(qlb_qcow2_header_write(h, &image.io, &err), 0);
    assert_memory_equal(image.data, before, 512);
    assert_string_equal(image.log, "write 0 512\n");
    qlb_qcow2_header_free(h);
}

static void test_unknown_things_are_kept(void **state)
{
    struct qlb_qcow2_header *h;
    struct qlb_error err;

    (void)state;
    create("", "1G");
    /* A longer header, of which we know nothing; the extensions move. */
    memmove(image.data + 120, image.data + 112, 1024);
    memcpy(image.data + 112, "\x01\x02\x03\x04\x05\x06\x07\x08", 8);
    put_be32(image.data + QLB_H_HEADER_LENGTH, 120);
    put_be64(image.data + QLB_H_COMPATIBLE, 0xf0);
    put_be64(image.data + QLB_H_AUTOCLEAR, 0xff00000000000000);
    put_be64(image.data + QLB_H_SIZE, (1 << 30) - 1);
    h = read_it();
    assert_int_equal(h->virtual_size, (1 << 30) - 512);
    qlb_qcow2_header_set_ext(h, 0xabcdef01, "private", 7, &err);
    assert_int_equal(qlb_qcow2_header_write(h, &image.io, &err), 0);
    qlb_qcow2_header_free(h);
    h = read_it();
    assert_int_equal(h->header_length, 120);
    assert_memory_equal(image.data + 112, "\x01\x02\x03\x04\x05\x06\x07\x08",
                        8);
    assert_int_equal(h->compatible, 0xf0);
    assert_int_equal(h->autoclear, QLB_AUTOCLEAR_LIVEBACKUP);
    assert_int_equal(h->size_field, (1 << 30) - 1);
    assert_memory_equal(qlb_qcow2_header_ext(h, 0xabcdef01, NULL)->data,
                        "private", 7);
    qlb_qcow2_header_free(h);
}

static void test_bitmaps_are_written(void **state)
{
    struct qlb_qcow2_header *h;
    struct qlb_error err;

    (void)state;
    create("", "1G");
    h = read_it();
    h->has_bitmaps = true;
    h->n_bitmaps = 3;
    h->bitmap_directory_offset = 5 * 65536;
    h->bitmap_directory_size = 1000;
    h->autoclear = QLB_AUTOCLEAR_BITMAPS;
    assert_int_equal(qlb_qcow2_header_write(h, &image.io, &err), 0);
    qlb_qcow2_header_free(h);
    h = read_it();
    assert_true(h->has_bitmaps);
    assert_int_equal(h->n_bitmaps, 3);
    assert_int_equal(h->bitmap_directory_offset, 5 * 65536);
    assert_int_equal(h->bitmap_directory_size, 1000);
    h->has_bitmaps = false;
    h->autoclear = 0;
    assert_int_equal(qlb_qcow2_header_write(h, &image.io, &err), 0);
    qlb_qcow2_header_free(h);
    h = read_it();
    assert_false(h->has_bitmaps);
    assert_null(qlb_qcow2_header_ext(h, QLB_EXT_BITMAPS, NULL));
    qlb_qcow2_header_free(h);
}

/* A stock QEMU that writes keeps the extension and takes the bit away. */
static void test_stock_qemu_keeps_the_extension(void **state)
{
    struct qlb_qcow2_header *h;
    struct qlb_error err;

    (void)state;
    create("-u -b base -F raw", "1G");
    h = read_it();
    turn_on(h);
    assert_int_equal(qlb_qcow2_header_write(h, &image.io, &err), 0);
    qlb_qcow2_header_free(h);
    store();
    run("truncate -s 1G base; qemu-img check -q image.qcow2 2>&1");
    load();
    h = read_it();
    expect_payload(h);
    assert_int_equal(h->autoclear, QLB_AUTOCLEAR_LIVEBACKUP);
    qlb_qcow2_header_free(h);
    run("qemu-io -c 'write 0 64k' image.qcow2 2>&1 >/dev/null");
    run("qemu-img rebase -u -F qcow2 -b another-name image.qcow2 2>&1");
    load();
    h = read_it();
    expect_payload(h);
    assert_int_equal(h->autoclear, 0);
    assert_string_equal(h->backing_name, "another-name");
    qlb_qcow2_header_free(h);
}

/* A name that gives way to an extension is written first, to where the
 * header on disk does not look; killed before the last write, the image is
 * as it was. */
static void test_long_backing_name(void **state)
{
    static uint8_t filler[700];
    char name[1000], options[1100];
    struct qlb_qcow2_header *h;
    struct qlb_error err;

    (void)state;
    memset(name, 'n', sizeof(name));
    name[sizeof(name) - 1] = 0;
    snprintf(options, sizeof(options), "-u -b %s -F raw", name);
    create(options, "1G");
    h = read_it();
    assert_true(h->backing_offset < 1000);
    assert_true(qlb_qcow2_header_has_room(h));
    qlb_qcow2_header_set_ext(h, 77, filler, sizeof(filler), &err);
    assert_true(qlb_qcow2_header_has_room(h));
    turn_on(h);

    image.writes_left = 1;
    assert_int_equal(qlb_qcow2_header_write(h, &image.io, &err), -1);
    assert_string_equal(image.log, "write 4096 999\nsync\n");
    qlb_qcow2_header_free(h);
    image.writes_left = -1;
    image.log[0] = 0;
    h = read_it();
    assert_string_equal(h->backing_name, name);
    assert_null(qlb_qcow2_header_ext(h, 77, NULL));

    qlb_qcow2_header_set_ext(h, 77, filler, sizeof(filler), &err);
    turn_on(h);
    assert_int_equal(qlb_qcow2_header_write(h, &image.io, &err), 0);
    assert_string_equal(image.log,
                        "write 4096 999\nsync\nwrite 0 4096\n");
    image.log[0] = 0;
    assert_int_equal(qlb_qcow2_header_write(h, &image.io, &err), 0);
    assert_string_equal(image.log, "write 0 4096\n");
    qlb_qcow2_header_free(h);
    h = read_it();
    assert_string_equal(h->backing_name, name);
    expect_payload(h);
    qlb_qcow2_header_free(h);
    store();
    assert_non_null(strstr(run("qemu-img info -U image.qcow2 2>&1"), name));
}

/* A name that begins in the first 4096 bytes and ends behind them. */
static void test_name_across_the_border(void **state)
{
    char name[600];
    struct qlb_qcow2_header *h;
    struct qlb_error err;
    static uint8_t filler[3300];

    (void)state;
    create("-u -b b -F raw", "1G");
    memset(name, 'x', sizeof(name));
    name[sizeof(name) - 1] = 0;
    put_be64(image.data + 8, 3900);
    put_be32(image.data + 16, sizeof(name) - 1);
    memcpy(image.data + 3900, name, sizeof(name) - 1);
    h = read_it();
    assert_int_equal(h->used, 3900 + 599);
    qlb_qcow2_header_set_ext(h, 77, filler, sizeof(filler), &err);
    assert_int_equal(qlb_qcow2_header_write(h, &image.io, &err), 0);
    assert_string_equal(image.log,
                        "write 4504 599\nsync\nwrite 0 4096\n");
    qlb_qcow2_header_free(h);
    h = read_it();
    assert_string_equal(h->backing_name, name);
    qlb_qcow2_header_free(h);
}

static void expect_no_room(struct qlb_qcow2_header *h)
{
    static uint8_t before[sizeof(image.data)];
    struct qlb_error err;

    memcpy(before, image.data, sizeof(before));
    assert_int_equal(qlb_qcow2_header_write(h, &image.io, &err), -1);
    assert_int_equal(err.code, QLB_E_USAGE);
    assert_string_equal(err.message, "image: no room in the header: header "
                        "extensions and backing file name don't fit");
    assert_string_equal(image.log, "");
    assert_memory_equal(image.data, before, sizeof(before));
}

static void test_no_room(void **state)
{
    static uint8_t filler[4096];
    struct qlb_qcow2_header *h;
    struct qlb_error err;

    (void)state;
    create("", "1G");
    h = read_it();
    assert_true(qlb_qcow2_header_has_room(h));
    qlb_qcow2_header_set_ext(h, 77, filler, 1200, &err);
    assert_true(qlb_qcow2_header_has_room(h));
    qlb_qcow2_header_set_ext(h, 77, filler, 1300, &err);
    assert_false(qlb_qcow2_header_has_room(h));
    qlb_qcow2_header_set_ext(h, 77, filler, 4096, &err);
    assert_false(qlb_qcow2_header_has_room(h));
    expect_no_room(h);
    qlb_qcow2_header_free(h);

    create("-o cluster_size=512", "1M");
    h = read_it();
    assert_false(qlb_qcow2_header_has_room(h));
    turn_on(h);
    expect_no_room(h);
    qlb_qcow2_header_free(h);

    /* The name could go behind byte 4096, but the cluster ends there. */
    create("-u -b $(printf %01000d 7) -F raw -o cluster_size=4k", "1M");
    h = read_it();
    assert_true(qlb_qcow2_header_has_room(h));
    qlb_qcow2_header_set_ext(h, 77, filler, 900, &err);
    assert_false(qlb_qcow2_header_has_room(h));
    turn_on(h);
    expect_no_room(h);
    qlb_qcow2_header_free(h);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_version_2),
        cmocka_unit_test(test_version_3),
        cmocka_unit_test(test_bitmaps_extension),
        cmocka_unit_test(test_poked_fields),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_every_byte),
        cmocka_unit_test(test_cut_anywhere),
        cmocka_unit_test(test_feature_names),
        cmocka_unit_test(test_raw_data_file_has_no_backing_file),
        cmocka_unit_test(test_standard_extension_twice),
        cmocka_unit_test(test_long_format_name),
        cmocka_unit_test(test_set_ext),
        cmocka_unit_test(test_name_feature),
        cmocka_unit_test(test_rollback_mark),
        cmocka_unit_test(test_rewritten_unchanged),
        cmocka_unit_test(test_unknown_things_are_kept),
        cmocka_unit_test(test_bitmaps_are_written),
        cmocka_unit_test(test_stock_qemu_keeps_the_extension),
        cmocka_unit_test(test_long_backing_name),
        cmocka_unit_test(test_name_across_the_border),
        cmocka_unit_test(test_no_room),
    };

    return cmocka_run_group_tests_name("qcow2_header", tests, make_folder,
                                       remove_folder);
}
