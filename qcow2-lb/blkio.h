/* Block I/O: a table of operations over something addressed by bytes.
 *
 * The qcow2 code does all its I/O through this table, so that tests and
 * fuzzers can put memory in the place of a file.  Reads and writes transfer
 * everything or fail; they may be called from several threads at once.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_BLKIO_H
#define QLB_BLKIO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

struct qlb_blkio;

struct qlb_blkio_ops {
    /* Reads up to len bytes; short only at the end of the file. Returns the
     * number of bytes, or -1. */
    int64_t (*pread)(struct qlb_blkio *io, void *buf, size_t len,
                     uint64_t offset, struct qlb_error *err);
    /* Writes all of it. NULL where the backend is read-only. */
    int (*pwrite)(struct qlb_blkio *io, const void *buf, size_t len,
                  uint64_t offset, struct qlb_error *err);
    /* fdatasync. NULL: nothing to do. */
    int (*sync)(struct qlb_blkio *io, struct qlb_error *err);
    /* Never NULL. */
    void (*close)(struct qlb_blkio *io);
};

struct qlb_blkio {
    const struct qlb_blkio_ops *ops;
    char *name;      /* for messages */
    uint64_t size;   /* bytes; grows with writes behind the end */
    uint64_t mtime;  /* ns since 1970 when opened; 0 for block devices */
    uint64_t device; /* st_dev */
    int fd;          /* -1 where there is none */
};

enum qlb_blkio_flags {
    QLB_BLKIO_WRITE = 1,  /* open for reading and writing */
    QLB_BLKIO_LOCK = 2,   /* take QEMU's image locks: as a reader (nobody
                             else may write), or with QLB_BLKIO_WRITE as the
                             only writer. QLB_E_BUSY where another process
                             holds a lock that conflicts. */
    QLB_BLKIO_DIRECT = 4, /* read past the page cache (O_DIRECT), any buffer
                             and any range; not with QLB_BLKIO_WRITE */
};

/* Opens a regular file or block device. NULL on failure. */
struct qlb_blkio *qlb_blkio_open(const char *path, unsigned flags,
                                 struct qlb_error *err);

/* Serves a copy of nothing: reads come from `data`, which must outlive the
 * object; it can't be written. For tests and fuzzers. */
struct qlb_blkio *qlb_blkio_memory(const void *data, size_t len);

/* Exactly len bytes, or an error; a short file is QLB_E_DAMAGED. */
int qlb_blkio_read(struct qlb_blkio *io, void *buf, size_t len,
                   uint64_t offset, struct qlb_error *err);

/* As qlb_blkio_read, but what lies behind the end of the file is zero. */
int qlb_blkio_read_padded(struct qlb_blkio *io, void *buf, size_t len,
                          uint64_t offset, struct qlb_error *err);

int qlb_blkio_write(struct qlb_blkio *io, const void *buf, size_t len,
                    uint64_t offset, struct qlb_error *err);

int qlb_blkio_sync(struct qlb_blkio *io, struct qlb_error *err);

/* Closes and frees. NULL is allowed. Locks go with the file. */
void qlb_blkio_close(struct qlb_blkio *io);

/* read(2) until len bytes or the end; the number of bytes, or -1. */
int64_t qlb_read_full(int fd, void *buf, size_t len, const char *name,
                      struct qlb_error *err);

#endif
