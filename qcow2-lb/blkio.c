/* Block I/O: the file backend, with QEMU's image locks, and a memory backend.
 *
 * Locks: QEMU marks the permissions it uses and those it does not share with
 * read locks on single bytes of the image (OFD locks): byte 100 + p for a
 * permission p in use, byte 200 + p for one that others must not use.  Who
 * opens takes its own bytes first and then looks for foreign locks that
 * conflict, so of two that open at once at least one sees the other.
 * (QEMU: block/file-posix.c, raw_apply_lock_bytes, raw_check_lock_bytes;
 * docs/system/qemu-block-drivers.rst, "Disk image file locking".)
 *
 * O_DIRECT wants aligned memory, offsets and lengths: what is not aligned goes
 * through a buffer that is.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "blkio.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checked.h"
#include "cleanup.h"

enum { LOCK_USED = 100, LOCK_UNSHARED = 200 };

/* Permissions of QEMU's block layer, as bit numbers. */
enum {
    PERM_CONSISTENT_READ = 0,
    PERM_WRITE = 1,
    PERM_WRITE_UNCHANGED = 2,
    PERM_RESIZE = 3,
    PERM_COUNT = 4,
};

#define PERM(p) (1u << (p))

static int lock_byte(int fd, off_t byte)
{
    struct flock lock = {
        .l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1,
    };

    return fcntl(fd, F_OFD_SETLK, &lock) < 0 ? -errno : 0;
}

/* 1: another process holds a lock on the byte. */
static int byte_is_locked(int fd, off_t byte)
{
    struct flock lock = {
        .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1,
    };

    if (fcntl(fd, F_OFD_GETLK, &lock) < 0) {
        return -errno;
    }
    return lock.l_type != F_UNLCK;
}

static int apply_locks(int fd, unsigned used, unsigned unshared)
{
    int ret = 0;

    for (unsigned p = 0; p < PERM_COUNT && ret == 0; p++) {
        if (used & PERM(p)) {
            ret = lock_byte(fd, LOCK_USED + (off_t)p);
        }
        if (ret == 0 && (unshared & PERM(p))) {
            ret = lock_byte(fd, LOCK_UNSHARED + (off_t)p);
        }
    }
    return ret;
}

static int check_locks(int fd, unsigned used, unsigned unshared)
{
    int ret = 0;

    for (unsigned p = 0; p < PERM_COUNT && ret == 0; p++) {
        if (used & PERM(p)) {
            ret = byte_is_locked(fd, LOCK_UNSHARED + (off_t)p);
        }
        if (ret == 0 && (unshared & PERM(p))) {
            ret = byte_is_locked(fd, LOCK_USED + (off_t)p);
        }
    }
    return ret;
}

static int take_image_locks(struct qlb_blkio *io, bool write,
                            struct qlb_error *err)
{
    unsigned used = PERM(PERM_CONSISTENT_READ);
    unsigned unshared = PERM(PERM_WRITE) | PERM(PERM_RESIZE);
    int ret;

    if (write) {
        used |= PERM(PERM_WRITE) | PERM(PERM_RESIZE);
        unshared |= PERM(PERM_WRITE_UNCHANGED);
    }
    ret = apply_locks(io->fd, used, unshared);
    if (ret == 0) {
        ret = check_locks(io->fd, used, unshared);
    }
    if (ret > 0 || ret == -EAGAIN || ret == -EACCES) {
        return qlb_fail(err, QLB_E_BUSY,
                        "%s: the image is in use by another process",
                        io->name);
    }
    if (ret < 0) {
        return qlb_fail_errno(err, -ret, "%s: can't lock the image",
                              io->name);
    }
    return 0;
}

/* Past the page cache a piece is a request to the disk, on which those of a
 * running guest wait: so it is small. */
enum { DIRECT_ALIGNMENT = 4096, DIRECT_PIECE = 65536, DIRECT_BUFFER = 1 << 20 };

/* Short at the end of the file only. Each read is of whole sectors, and at most
 * a piece: where the file ends within one, nothing more can be read. */
static int64_t pread_sectors(struct qlb_blkio *io, void *buf, size_t len,
                             uint64_t offset, size_t sector, size_t piece,
                             struct qlb_error *err)
{
    size_t done = 0;

    while (done < len) {
        ssize_t n = pread(io->fd, (char *)buf + done,
                          min_u64(len - done, piece), (off_t)(offset + done));

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return qlb_fail_errno(err, errno, "%s: reading %zu bytes at "
                                  "offset %llu", io->name, len,
                                  (unsigned long long)offset);
        }
        done += (size_t)n;
        if (n == 0 || (size_t)n % sector != 0) {
            break;
        }
    }
    return (int64_t)done;
}

static int64_t file_pread(struct qlb_blkio *io, void *buf, size_t len,
                          uint64_t offset, struct qlb_error *err)
{
    return pread_sectors(io, buf, len, offset, 1, SIZE_MAX, err);
}

static bool is_aligned(uint64_t n)
{
    return n % DIRECT_ALIGNMENT == 0;
}

static int64_t direct_pread(struct qlb_blkio *io, void *buf, size_t len,
                            uint64_t offset, struct qlb_error *err)
{
    uint8_t *bounce QLB_AUTO_FREE = NULL;
    size_t done = 0, room;

    if (is_aligned((uintptr_t)buf) && is_aligned(len) && is_aligned(offset)) {
        return pread_sectors(io, buf, len, offset, DIRECT_ALIGNMENT,
                             DIRECT_PIECE, err);
    }
    room = min_u64(DIRECT_BUFFER,
                   round_up(len, DIRECT_ALIGNMENT) + DIRECT_ALIGNMENT);
    bounce = aligned_alloc(DIRECT_ALIGNMENT, room);
    if (bounce == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", io->name);
    }
    while (done < len) {
        uint64_t start = round_down(offset + done, DIRECT_ALIGNMENT);
        size_t skip = offset + done - start;
        size_t want = min_u64(room, round_up(skip + len - done,
                                             DIRECT_ALIGNMENT));
        int64_t n = pread_sectors(io, bounce, want, start, DIRECT_ALIGNMENT,
                                  DIRECT_PIECE, err);

        if (n < 0) {
            return -1;
        }
        if ((size_t)n > skip) {
            size_t got = min_u64((size_t)n - skip, len - done);

            memcpy((char *)buf + done, bounce + skip, got);
            done += got;
        }
        if ((size_t)n < want) {
            break;
        }
    }
    return (int64_t)done;
}

static int file_pwrite(struct qlb_blkio *io, const void *buf, size_t len,
                       uint64_t offset, struct qlb_error *err)
{
    size_t done = 0;

    while (done < len) {
        ssize_t n = pwrite(io->fd, (const char *)buf + done, len - done,
                           (off_t)(offset + done));

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return qlb_fail_errno(err, n == 0 ? EIO : errno,
                                  "%s: writing %zu bytes at offset %llu",
                                  io->name, len, (unsigned long long)offset);
        }
        done += (size_t)n;
    }
    io->size = max_u64(io->size, offset + len);
    return 0;
}

static int file_sync(struct qlb_blkio *io, struct qlb_error *err)
{
    if (fdatasync(io->fd) < 0) {
        return qlb_fail_errno(err, errno, "%s: syncing", io->name);
    }
    return 0;
}

static void file_close(struct qlb_blkio *io)
{
    close(io->fd);
}

static const struct qlb_blkio_ops file_read_ops = {
    .pread = file_pread,
    .close = file_close,
};

static const struct qlb_blkio_ops file_direct_ops = {
    .pread = direct_pread,
    .close = file_close,
};

static const struct qlb_blkio_ops file_write_ops = {
    .pread = file_pread,
    .pwrite = file_pwrite,
    .sync = file_sync,
    .close = file_close,
};

/* Size, time and device of a file that was just opened. */
static int examine_file(struct qlb_blkio *io, struct qlb_error *err)
{
    struct stat st;

    if (fstat(io->fd, &st) < 0) {
        return qlb_fail_errno(err, errno, "%s", io->name);
    }
    io->device = st.st_dev;
    if (S_ISBLK(st.st_mode)) {
        uint64_t bytes;

        if (ioctl(io->fd, BLKGETSIZE64, &bytes) < 0) {
            return qlb_fail_errno(err, errno, "%s: reading the size",
                                  io->name);
        }
        io->size = bytes;
        return 0;
    }
    if (!S_ISREG(st.st_mode)) {
        return qlb_fail(err, QLB_E_RUNTIME,
                        "%s: neither a regular file nor a block device",
                        io->name);
    }
    io->size = (uint64_t)st.st_size;
    io->mtime = (uint64_t)st.st_mtim.tv_sec * 1000000000u +
                (uint64_t)st.st_mtim.tv_nsec;
    return 0;
}

static struct qlb_blkio *blkio_new(const char *name,
                                   const struct qlb_blkio_ops *ops)
{
    struct qlb_blkio *io = calloc(1, sizeof(*io));

    if (io == NULL) {
        return NULL;
    }
    io->ops = ops;
    io->fd = -1;
    io->name = strdup(name);
    if (io->name == NULL) {
        free(io);
        return NULL;
    }
    return io;
}

struct qlb_blkio *qlb_blkio_open(const char *path, unsigned flags,
                                 struct qlb_error *err)
{
    bool write = flags & QLB_BLKIO_WRITE;
    bool direct = !write && (flags & QLB_BLKIO_DIRECT);
    struct qlb_blkio *io;

    io = blkio_new(path, write    ? &file_write_ops
                         : direct ? &file_direct_ops
                                  : &file_read_ops);
    if (io == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", path);
        return NULL;
    }
    /* O_NONBLOCK: opening a FIFO must not wait for its writer. */
    io->fd = open(path, (write ? O_RDWR : O_RDONLY) |
                        (direct ? O_DIRECT : 0) | O_CLOEXEC | O_NONBLOCK);
    if (io->fd < 0) {
        qlb_fail_errno(err, errno, "%s", path);
        free(io->name);
        free(io);
        return NULL;
    }
    if (examine_file(io, err) < 0 ||
        ((flags & QLB_BLKIO_LOCK) && take_image_locks(io, write, err) < 0)) {
        qlb_blkio_close(io);
        return NULL;
    }
    return io;
}

/* ---- memory ---- */

struct memory_blkio {
    struct qlb_blkio io;
    const uint8_t *data;
};

static int64_t memory_pread(struct qlb_blkio *io, void *buf, size_t len,
                            uint64_t offset, struct qlb_error *err)
{
    struct memory_blkio *memory = (struct memory_blkio *)io;
    uint64_t n;

    (void)err;
    if (offset >= io->size) {
        return 0;
    }
    n = min_u64(len, io->size - offset);
    memcpy(buf, memory->data + offset, n);
    return (int64_t)n;
}

static void memory_close(struct qlb_blkio *io)
{
    (void)io;
}

struct qlb_blkio *qlb_blkio_memory(const void *data, size_t len)
{
    static const struct qlb_blkio_ops ops = {
        .pread = memory_pread,
        .close = memory_close,
    };
    struct memory_blkio *memory = calloc(1, sizeof(*memory));

    if (memory == NULL) {
        return NULL;
    }
    memory->io.ops = &ops;
    memory->io.fd = -1;
    memory->io.name = strdup("memory");
    memory->io.size = len;
    memory->data = data;
    if (memory->io.name == NULL) {
        free(memory);
        return NULL;
    }
    return &memory->io;
}

/* ---- on top of the table ---- */

int qlb_blkio_read(struct qlb_blkio *io, void *buf, size_t len,
                   uint64_t offset, struct qlb_error *err)
{
    int64_t n = io->ops->pread(io, buf, len, offset, err);

    if (n < 0) {
        return -1;
    }
    if ((uint64_t)n < len) {
        return qlb_fail(err, QLB_E_DAMAGED,
                        "%s: ends at %llu, before the %zu bytes at offset "
                        "%llu", io->name,
                        (unsigned long long)(offset + (uint64_t)n), len,
                        (unsigned long long)offset);
    }
    return 0;
}

int qlb_blkio_read_padded(struct qlb_blkio *io, void *buf, size_t len,
                          uint64_t offset, struct qlb_error *err)
{
    int64_t n = io->ops->pread(io, buf, len, offset, err);

    if (n < 0) {
        return -1;
    }
    memset((char *)buf + n, 0, len - (size_t)n);
    return 0;
}

int qlb_blkio_write(struct qlb_blkio *io, const void *buf, size_t len,
                    uint64_t offset, struct qlb_error *err)
{
    if (io->ops->pwrite == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: open for reading only",
                        io->name);
    }
    return io->ops->pwrite(io, buf, len, offset, err);
}

int qlb_blkio_sync(struct qlb_blkio *io, struct qlb_error *err)
{
    return io->ops->sync == NULL ? 0 : io->ops->sync(io, err);
}

void qlb_blkio_close(struct qlb_blkio *io)
{
    if (io == NULL) {
        return;
    }
    io->ops->close(io);
    free(io->name);
    free(io);
}

int64_t qlb_read_full(int fd, void *buf, size_t len, const char *name,
                      struct qlb_error *err)
{
    size_t done = 0;

    while (done < len) {
        ssize_t n = read(fd, (char *)buf + done, len - done);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return qlb_fail_errno(err, errno, "%s: reading", name);
        }
        if (n == 0) {
            break;
        }
        done += (size_t)n;
    }
    return (int64_t)done;
}
