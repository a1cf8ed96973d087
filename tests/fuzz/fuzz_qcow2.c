/* An image as a stranger gives it: its header is parsed, its extents walked,
 * its content read, and its header written back into a copy.
 *
 * What must hold beyond the absence of crashes: runs advance and stay within
 * what was asked for; what is zero by the extents is read as zero; a header
 * that was written is read back as it was.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include <stdlib.h>
#include <string.h>

#include "bitmap.h"
#include "checked.h"
#include "qcow2_map.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHECK(condition)                                                      \
    do {                                                                      \
        if (!(condition)) {                                                   \
            abort();                                                          \
        }                                                                     \
    } while (0)

/* A few bytes may make a disk of exabytes; some of it is enough. */
#define MAX_RUNS 300
#define MAX_READ (UINT64_C(64) << 10)

static void walk(const struct qlb_disk *disk)
{
    static uint8_t buf[MAX_READ];
    struct qlb_error err;
    struct qlb_disk_reader *reader = qlb_disk_reader_new(disk, &err);
    uint64_t size = qlb_disk_size(disk);
    uint64_t pos = 0, run;

    for (unsigned i = 0; i < MAX_RUNS && pos < size; i++) {
        enum qlb_extent_type type;
        uint64_t n;
        int ret;

        if (qlb_disk_extent(reader, pos, size - pos, &type, &run, &err) < 0) {
            CHECK(err.code == QLB_E_DAMAGED);
            pos += min_u64(size - pos, 512);
            continue;
        }
        CHECK(run > 0 && run <= size - pos);
        n = min_u64(run, MAX_READ);
        ret = qlb_disk_read(reader, buf, pos, n, &err);
        CHECK(ret == 0 || (err.code == QLB_E_DAMAGED &&
                           type == QLB_EXTENT_DATA));
        CHECK(ret < 0 || type == QLB_EXTENT_DATA ||
              qlb_bits_all_zero(buf, n));
        /* The middle too: parts of clusters. */
        qlb_disk_read(reader, buf, pos + run / 2, min_u64(n, run - run / 2),
                      &err);
        pos += run;
    }
    qlb_disk_reader_free(reader);
}

/* ---- a copy that can be written ---- */

struct copy {
    struct qlb_blkio io;
    uint8_t *data;
    uint64_t room;
};

static int64_t copy_pread(struct qlb_blkio *io, void *buf, size_t len,
                          uint64_t offset, struct qlb_error *err)
{
    struct copy *copy = (struct copy *)io;
    uint64_t n = offset < io->size ? min_u64(len, io->size - offset) : 0;

    (void)err;
    if (n > 0) {
        memcpy(buf, copy->data + offset, n);
    }
    return (int64_t)n;
}

static int copy_pwrite(struct qlb_blkio *io, const void *buf, size_t len,
                       uint64_t offset, struct qlb_error *err)
{
    struct copy *copy = (struct copy *)io;

    (void)err;
    CHECK(range_within(offset, len, copy->room));
    memcpy(copy->data + offset, buf, len);
    io->size = max_u64(io->size, offset + len);
    return 0;
}

static bool same_string(const char *a, const char *b)
{
    return a == NULL || b == NULL ? a == b : strcmp(a, b) == 0;
}

static void write_back(struct qlb_qcow2_header *header, const uint8_t *data,
                       size_t size)
{
    static const struct qlb_blkio_ops ops = {
        .pread = copy_pread, .pwrite = copy_pwrite,
    };
    static const uint8_t payload[QLB_EXT_LIVEBACKUP_SIZE];
    char name[] = "copy";
    struct copy copy = {
        .io = { .ops = &ops, .name = name, .size = size, .fd = -1 },
        .room = size + header->cluster_size,
    };
    struct qlb_qcow2_header *again;
    struct qlb_error err;

    copy.data = calloc(1, copy.room);
    memcpy(copy.data, data, size);
    qlb_qcow2_header_has_room(header);
    CHECK(qlb_qcow2_header_set_ext(header, QLB_EXT_LIVEBACKUP, payload,
                                   sizeof(payload), &err) == 0);
    CHECK(qlb_qcow2_header_name_feature(header, true, &err) == 0);
    if (qlb_qcow2_header_write(header, &copy.io, &err) == 0) {
        again = qlb_qcow2_header_read(&copy.io, false, &err);
        CHECK(again != NULL);
        CHECK(again->n_ext == header->n_ext);
        CHECK(again->virtual_size == header->virtual_size);
        CHECK(again->l1_offset == header->l1_offset);
        CHECK(same_string(again->backing_name, header->backing_name));
        CHECK(same_string(again->backing_format, header->backing_format));
        qlb_qcow2_header_free(again);
    }
    free(copy.data);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct qlb_blkio *io = qlb_blkio_memory(data, size);
    struct qlb_qcow2_header *header;
    struct qlb_disk *disk;
    struct qlb_error err;

    header = qlb_qcow2_header_read(io, true, &err);
    /* A data file would be opened by the name that stands there. */
    if (header != NULL && header->data_file == NULL) {
        disk = qlb_disk_open_io("image", io, header, QLB_DISK_NO_BACKING,
                                &err);
        CHECK(disk != NULL);
        walk(disk);
        qlb_disk_close(disk);
    }
    qlb_qcow2_header_free(header);
    header = qlb_qcow2_header_read(io, false, &err);
    if (header != NULL) {
        write_back(header, data, size);
    }
    qlb_qcow2_header_free(header);
    qlb_blkio_close(io);
    return 0;
}
