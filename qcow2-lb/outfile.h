/* Output that is whole or not there.
 *
 * A named output is written to a temporary file beside it, synced, and
 * renamed; until then the name does not exist, or still means the old file.
 * If the process is killed, the temporary file (.NAME.XXXXXX.tmp) remains.
 * The other kinds wrap a descriptor that was given (standard output), or one
 * that ends in a sink (a program that stores elsewhere what it is sent).
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_OUTFILE_H
#define QLB_OUTFILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

struct qlb_outfile;

enum qlb_outfile_flags {
    QLB_OUTFILE_FORCE = 1, /* an existing file may be replaced */
    QLB_OUTFILE_PRIVATE = 2, /* a new file: mode 0600, not 0666 & ~umask */
};

/* Begins a named output. Where the name exists: without FORCE an error, with
 * FORCE a regular file is replaced at commit, by one with its permissions (and
 * owner, where we may), and a block device is written in place. NULL on
 * failure. */
struct qlb_outfile *qlb_outfile_create(const char *path, unsigned flags,
                                       struct qlb_error *err);

/* Wraps a descriptor, which is not closed. Whether it is a regular file (so
 * that a sync means something) is found out. It is written from its present
 * position. */
struct qlb_outfile *qlb_outfile_fd(int fd, const char *name,
                                   struct qlb_error *err);

struct qlb_outfile_sink {
    /* Returns 0 when all bytes, that many, are stored for good under the
     * output's name. */
    int (*commit)(void *opaque, uint64_t bytes, struct qlb_error *err);
    /* Writing failed with that errno: tells why. Returns -1. */
    int (*failed)(void *opaque, int reason, struct qlb_error *err);
    /* Closes the descriptor; drops what has not been committed. */
    void (*free)(void *opaque);
};

/* Wraps a descriptor that leads to a sink. The opaque pointer is the output's
 * after success. */
struct qlb_outfile *qlb_outfile_to_sink(int fd, const char *name,
                                        const struct qlb_outfile_sink *sink,
                                        void *opaque, struct qlb_error *err);

/* Appends. Bytes reach the file in order; writeback to the disk is started
 * early, so that the final sync has little left to do. */
int qlb_outfile_write(struct qlb_outfile *out, const void *buf, size_t len,
                      struct qlb_error *err);

/* Writes at an offset; only for outputs that can seek (named ones). May be
 * called by several threads at once. A regular file is written past the page
 * cache where buf, len and offset are multiples of QLB_OUTFILE_ALIGNMENT. */
enum { QLB_OUTFILE_ALIGNMENT = 4096 };

int qlb_outfile_pwrite(struct qlb_outfile *out, const void *buf, size_t len,
                       uint64_t offset, struct qlb_error *err);

/* Has a regular file allocate a range that is about to be written, which may
 * make it longer: writes there then need not wait for each other. Only a hint;
 * a later qlb_outfile_truncate gives back what was too much. */
void qlb_outfile_reserve(struct qlb_outfile *out, uint64_t offset,
                         uint64_t length);

/* Makes a range of a block device or of a regular file read as zeroes. */
int qlb_outfile_zero(struct qlb_outfile *out, uint64_t offset,
                     uint64_t length, struct qlb_error *err);

int qlb_outfile_truncate(struct qlb_outfile *out, uint64_t size,
                         struct qlb_error *err);

/* Number of bytes appended so far. */
uint64_t qlb_outfile_position(const struct qlb_outfile *out);

/* The name for messages. */
const char *qlb_outfile_name(const struct qlb_outfile *out);

/* Descriptor of the file being written. */
int qlb_outfile_descriptor(const struct qlb_outfile *out);

/* Whether a commit succeeded as far as that the output stands under its final
 * name (a descriptor: that it is synced). */
bool qlb_outfile_is_committed(const struct qlb_outfile *out);

bool qlb_outfile_is_regular(const struct qlb_outfile *out);
/* Whether a commit proves that all is stored: regular files and sinks. */
bool qlb_outfile_is_stored(const struct qlb_outfile *out);
bool qlb_outfile_is_block_device(const struct qlb_outfile *out);

/* fsync where it means something (regular files, block devices). */
int qlb_outfile_sync(struct qlb_outfile *out, struct qlb_error *err);

/* sync, rename, sync of the folder; a sink's own commit; nothing to do but the
 * sync for other descriptors and block devices. After success only close may
 * follow. */
int qlb_outfile_commit(struct qlb_outfile *out, struct qlb_error *err);

/* Closes and frees; without a commit before, the temporary file is removed.
 * NULL is allowed. */
void qlb_outfile_close(struct qlb_outfile *out);

/* Removes the temporary files of all outputs of this process that are not
 * committed. Async-signal-safe: for a handler of fatal signals. */
void qlb_outfile_abandon_all(void);

#endif
