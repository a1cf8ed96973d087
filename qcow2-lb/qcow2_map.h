/* Reading a qcow2 disk: guest offsets to content, through the backing chain.
 *
 * `struct qlb_disk` is an open disk with its chain: immutable once open, so
 * threads share it. Each thread reads through a `struct qlb_disk_reader` of
 * its own, which holds a small cache of L1/L2 slices for each layer and one
 * decompressed cluster; so no locks are needed, and memory does not grow with
 * the disk.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_QCOW2_MAP_H
#define QLB_QCOW2_MAP_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include "error.h"
#include "qcow2_header.h"

struct qlb_disk;
struct qlb_disk_reader;

enum qlb_disk_flags {
    QLB_DISK_LOCK = 1,       /* take QEMU's reader locks on every file; 5 if
                                somebody has one open for writing */
    QLB_DISK_NO_BACKING = 2, /* the top layer alone: what it does not hold is
                                QLB_EXTENT_UNALLOCATED */
    QLB_DISK_RAW = 4,        /* the file itself is a raw image */
    QLB_DISK_DIRECT = 8,     /* the image's own files (not those of backing
                                images) are read past the page cache */
};

/* Opens the disk, its external data file and its backing chain. Relative
 * names are relative to the folder of the file that names them. A chain that
 * is longer than 200 files, or in which a file appears twice, is refused. */
struct qlb_disk *qlb_disk_open(const char *path, unsigned flags,
                               struct qlb_error *err);

/* The same over a header and block I/O that the caller has opened (and keeps:
 * both must outlive the disk): for an image that is locked for writing. */
struct qlb_disk *qlb_disk_open_io(const char *path, struct qlb_blkio *io,
                                  const struct qlb_qcow2_header *header,
                                  unsigned flags, struct qlb_error *err);
void qlb_disk_close(struct qlb_disk *disk);

uint64_t qlb_disk_size(const struct qlb_disk *disk); /* bytes */

/* More bytes than the files of the disk can hold content for, however well it
 * is compressed: 32768 times their size. A disk that maps more refers to the
 * same clusters over and over, and reading all of it would not end. */
uint64_t qlb_disk_content_limit(const struct qlb_disk *disk);

/* Header of the top layer; NULL for a raw file. */
const struct qlb_qcow2_header *qlb_disk_header(const struct qlb_disk *disk);

/* Path of the nearest backing file; NULL if there is none, or with
 * QLB_DISK_NO_BACKING. */
const char *qlb_disk_backing_path(const struct qlb_disk *disk);

/* The backing chain, nearest first, each with its own data file behind it;
 * index counts from 0; false at the end. size: bytes; mtime: ns since 1970,
 * 0 for block devices. */
bool qlb_disk_backing_stat(const struct qlb_disk *disk, unsigned index,
                           uint64_t *size, uint64_t *mtime);
/* The same for the top layer's external data file; false if it has none. */
bool qlb_disk_data_file_stat(const struct qlb_disk *disk, uint64_t *size,
                             uint64_t *mtime);

/* Whether the file is one of those that the disk consists of: the image, its
 * data file, or one of the backing chain. */
bool qlb_disk_has_file(const struct qlb_disk *disk, const struct stat *st);

enum qlb_extent_type {
    QLB_EXTENT_DATA = 0,        /* has to be read */
    QLB_EXTENT_ZERO = 1,        /* reads as zeroes, by metadata */
    QLB_EXTENT_UNALLOCATED = 2, /* only with QLB_DISK_NO_BACKING, or from
                                   qlb_disk_top_extent */
};

struct qlb_disk_reader *qlb_disk_reader_new(const struct qlb_disk *disk,
                                            struct qlb_error *err);
void qlb_disk_reader_free(struct qlb_disk_reader *reader);

/* What the disk holds at offset, and for how many bytes (1 or more, at most
 * `length`) that goes on; adjacent pieces of one type need not be joined, but
 * runs of unallocated L1 entries are crossed in one step, so that scanning an
 * empty disk of any size costs little. offset + length is within the disk.
 * 0, or -1. */
int qlb_disk_extent(struct qlb_disk_reader *reader, uint64_t offset,
                    uint64_t length, enum qlb_extent_type *type,
                    uint64_t *run, struct qlb_error *err);

/* The same, of the top layer alone whatever lies below. */
int qlb_disk_top_extent(struct qlb_disk_reader *reader, uint64_t offset,
                        uint64_t length, enum qlb_extent_type *type,
                        uint64_t *run, struct qlb_error *err);

/* Content of [offset, offset + length), through the chain. Contiguous host
 * ranges are read by one call. What can't be read or decompressed is an
 * error that names guest and host offset (QLB_E_DAMAGED for bad metadata or
 * compressed data, QLB_E_RUNTIME for failed I/O). */
int qlb_disk_read(struct qlb_disk_reader *reader, void *buf, uint64_t offset,
                  uint64_t length, struct qlb_error *err);

#endif
