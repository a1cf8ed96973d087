/* Writes a disk's content to standard output, or lists its extents: what the
 * tests compare with qemu-img.
 *
 *     qcow2cat [-n] [-r] [-s STEP] [-m] FILE
 *
 *     -n  the top layer alone        -r  FILE is a raw image
 *     -s  bytes for each read (1 MiB) -m  list extents instead
 *
 * Exit status: as the library's error codes.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "checked.h"
#include "qcow2_map.h"

static int print_content(struct qlb_disk_reader *reader, uint64_t size,
                         uint64_t step, struct qlb_error *err)
{
    char *buf = malloc(step);
    int ret = buf ? 0 : qlb_fail(err, QLB_E_RUNTIME, "no memory");

    for (uint64_t pos = 0; ret == 0 && pos < size; pos += step) {
        uint64_t n = min_u64(step, size - pos);

        ret = qlb_disk_read(reader, buf, pos, n, err);
        if (ret == 0 && fwrite(buf, 1, n, stdout) != n) {
            ret = qlb_fail(err, QLB_E_RUNTIME, "short write");
        }
    }
    free(buf);
    return ret;
}

static int print_extents(struct qlb_disk_reader *reader, uint64_t size,
                         struct qlb_error *err)
{
    static const char *const names[] = { "data", "zero", "hole" };
    enum qlb_extent_type type, last = QLB_EXTENT_DATA;
    uint64_t run, start = 0;

    for (uint64_t pos = 0; pos < size; pos += run) {
        if (qlb_disk_extent(reader, pos, size - pos, &type, &run, err) < 0) {
            return -1;
        }
        if (pos > start && type != last) {
            printf("%" PRIu64 " %" PRIu64 " %s\n", start, pos - start,
                   names[last]);
            start = pos;
        }
        last = type;
    }
    if (size > 0) {
        printf("%" PRIu64 " %" PRIu64 " %s\n", start, size - start,
               names[last]);
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct qlb_disk_reader *reader = NULL;
    struct qlb_disk *disk;
    struct qlb_error err;
    uint64_t step = 1 << 20;
    bool list = false;
    unsigned flags = 0;
    int ret = -1, c;

    while ((c = getopt(argc, argv, "nrms:")) != -1) {
        switch (c) {
        case 'n':
            flags |= QLB_DISK_NO_BACKING;
            break;
        case 'r':
            flags |= QLB_DISK_RAW;
            break;
        case 'm':
            list = true;
            break;
        case 's':
            step = strtoull(optarg, NULL, 0);
            break;
        default:
            return QLB_E_USAGE;
        }
    }
    if (optind != argc - 1 || step == 0) {
        return QLB_E_USAGE;
    }
    disk = qlb_disk_open(argv[optind], flags, &err);
    if (disk != NULL) {
        reader = qlb_disk_reader_new(disk, &err);
    }
    if (reader != NULL) {
        ret = list ? print_extents(reader, qlb_disk_size(disk), &err)
                   : print_content(reader, qlb_disk_size(disk), step, &err);
    }
    qlb_disk_reader_free(reader);
    qlb_disk_close(disk);
    if (ret == 0 && fflush(stdout) != 0) {
        ret = qlb_fail(&err, QLB_E_RUNTIME, "short write");
    }
    if (ret < 0) {
        fprintf(stderr, "qcow2cat: %s\n", err.message);
        return err.code;
    }
    return 0;
}
