/* Output that is whole or not there.
 *
 * Temporary names are kept in a small table of the process, which a handler
 * of fatal signals may walk: an entry is a pointer that is set and cleared
 * atomically, and unlink() is async-signal-safe.
 *
 * Writeback of what is appended is started every 8 MiB: the disk works
 * while the processors compress, and the final fsync waits for little.
 *
 * What is written in place to a file of ours goes past the page cache where it
 * is aligned (content of a restored disk; its metadata go through the cache):
 * that spares a copy and the host's cache. The two never share a page.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "outfile.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"

#define WRITEBACK_STEP (UINT64_C(8) << 20)
#define MAX_TEMPORARIES 64

struct qlb_outfile {
    int fd;
    int direct;       /* the same file with O_DIRECT; -1: not possible */
    char *name;       /* the final name, for messages and rename */
    char *temporary;  /* NULL: written in place or a given descriptor */
    unsigned slot;    /* of the temporary in the table */
    bool replace;     /* an existing file may be replaced */
    bool committed;
    bool owned;       /* the descriptor is closed with the object */
    mode_t type;      /* S_IFMT part */
    uint64_t position; /* bytes appended */
    const struct qlb_outfile_sink *sink; /* NULL: none */
    void *opaque;      /* the sink's */
};

static _Atomic(const char *) temporaries[MAX_TEMPORARIES];

static int register_temporary(struct qlb_outfile *out)
{
    for (unsigned i = 0; i < MAX_TEMPORARIES; i++) {
        const char *empty = NULL;

        if (atomic_compare_exchange_strong(&temporaries[i], &empty,
                                           out->temporary)) {
            out->slot = i;
            return 0;
        }
    }
    return -EMFILE;
}

void qlb_outfile_abandon_all(void)
{
    for (unsigned i = 0; i < MAX_TEMPORARIES; i++) {
        const char *path = atomic_exchange(&temporaries[i], NULL);

        if (path != NULL) {
            unlink(path);
        }
    }
}

static struct qlb_outfile *outfile_new(const char *name,
                                       struct qlb_error *err)
{
    struct qlb_outfile *out = calloc(1, sizeof(*out));

    if (out != NULL) {
        out->fd = out->direct = -1;
        out->name = strdup(name);
        if (out->name != NULL) {
            return out;
        }
    }
    free(out);
    qlb_fail_errno(err, ENOMEM, "%s", name);
    return NULL;
}

/* "DIR/.BASE.XXXXXX.tmp" */
static char *temporary_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    int folder = slash == NULL ? 0 : (int)(slash - path + 1);
    char *name;

    /* The longest name a folder takes has 255 bytes. */
    if (asprintf(&name, "%.*s.%.200s.XXXXXX.tmp", folder, path,
                 path + folder) < 0) {
        return NULL;
    }
    return name;
}

static int open_direct(const struct qlb_outfile *out)
{
    char path[32];

    snprintf(path, sizeof(path), "/proc/self/fd/%d", out->fd);
    return open(path, O_WRONLY | O_DIRECT | O_CLOEXEC);
}

/* Who could not read the file that is replaced must not read the new one, and
 * whose it was keeps it, as far as we may give it away. */
static int set_access(const struct qlb_outfile *out, unsigned flags,
                      const struct stat *replaced)
{
    mode_t mask;

    if (replaced != NULL) {
        if (fchown(out->fd, replaced->st_uid, replaced->st_gid) < 0) {
            /* Then it is ours. */
        }
        return fchmod(out->fd, replaced->st_mode & 0777);
    }
    if (flags & QLB_OUTFILE_PRIVATE) {
        return 0;
    }
    mask = umask(0);
    umask(mask);
    return fchmod(out->fd, 0666 & ~mask);
}

/* replaced: the file whose name it will get; NULL: there is none. */
static int create_temporary(struct qlb_outfile *out, unsigned flags,
                            const struct stat *replaced,
                            struct qlb_error *err)
{
    out->temporary = temporary_name(out->name);
    if (out->temporary == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", out->name);
    }
    out->fd = mkostemps(out->temporary, 4, O_CLOEXEC);
    if (out->fd < 0) {
        int reason = errno;

        free(out->temporary);
        out->temporary = NULL;
        return qlb_fail_errno(err, reason, "%s", out->name);
    }
    if (register_temporary(out) < 0) {
        unlink(out->temporary);
        free(out->temporary);
        out->temporary = NULL;
        return qlb_fail(err, QLB_E_RUNTIME, "%s: too many outputs",
                        out->name);
    }
    out->type = S_IFREG;
    out->direct = open_direct(out);
    if (set_access(out, flags, replaced) < 0) {
        return qlb_fail_errno(err, errno, "%s: setting its permissions",
                              out->name);
    }
    return 0;
}

/* A block device, or something like /dev/null or a FIFO. */
static int open_in_place(struct qlb_outfile *out, mode_t type,
                         struct qlb_error *err)
{
    int exclusive = S_ISBLK(type) ? O_EXCL : 0;

    out->fd = open(out->name, O_RDWR | O_CLOEXEC | exclusive);
    if (out->fd < 0 && errno == EBUSY) {
        return qlb_fail(err, QLB_E_BUSY, "%s: the device is in use",
                        out->name);
    }
    if (out->fd < 0 && !S_ISBLK(type)) {
        out->fd = open(out->name, O_WRONLY | O_CLOEXEC);
    }
    if (out->fd < 0) {
        return qlb_fail_errno(err, errno, "%s", out->name);
    }
    out->type = type & S_IFMT;
    return 0;
}

/* Follows a symbolic link, so that a rename replaces what it points to. */
static int resolve_name(struct qlb_outfile *out, struct qlb_error *err)
{
    char *target = realpath(out->name, NULL);

    if (target == NULL) {
        return qlb_fail_errno(err, errno, "%s", out->name);
    }
    free(out->name);
    out->name = target;
    return 0;
}

static int begin_output(struct qlb_outfile *out, unsigned flags,
                        struct qlb_error *err)
{
    struct stat st;

    if (stat(out->name, &st) < 0) {
        if (errno != ENOENT) {
            return qlb_fail_errno(err, errno, "%s", out->name);
        }
        return create_temporary(out, flags, NULL, err);
    }
    if (S_ISDIR(st.st_mode)) {
        return qlb_fail_errno(err, EISDIR, "%s", out->name);
    }
    if (!out->replace && (S_ISREG(st.st_mode) || S_ISBLK(st.st_mode))) {
        return qlb_fail(err, QLB_E_USAGE, "%s: already exists; --force "
                        "replaces it", out->name);
    }
    if (!S_ISREG(st.st_mode)) {
        return open_in_place(out, st.st_mode, err);
    }
    if (resolve_name(out, err) < 0) {
        return -1;
    }
    return create_temporary(out, flags, &st, err);
}

struct qlb_outfile *qlb_outfile_create(const char *path, unsigned flags,
                                       struct qlb_error *err)
{
    struct qlb_outfile *out = outfile_new(path, err);

    if (out == NULL) {
        return NULL;
    }
    out->owned = true;
    out->replace = flags & QLB_OUTFILE_FORCE;
    if (begin_output(out, flags, err) < 0) {
        qlb_outfile_close(out);
        return NULL;
    }
    return out;
}

struct qlb_outfile *qlb_outfile_fd(int fd, const char *name,
                                   struct qlb_error *err)
{
    struct qlb_outfile *out;
    struct stat st;

    if (fstat(fd, &st) < 0) {
        qlb_fail_errno(err, errno, "%s", name);
        return NULL;
    }
    out = outfile_new(name, err);
    if (out != NULL) {
        out->fd = fd;
        out->type = st.st_mode & S_IFMT;
    }
    return out;
}

struct qlb_outfile *qlb_outfile_to_sink(int fd, const char *name,
                                        const struct qlb_outfile_sink *sink,
                                        void *opaque, struct qlb_error *err)
{
    struct qlb_outfile *out = qlb_outfile_fd(fd, name, err);

    if (out != NULL) {
        out->sink = sink;
        out->opaque = opaque;
    }
    return out;
}

/* The step that has just been filled: a hint for the whole file would have the
 * kernel walk over all of it each time. */
static void start_writeback(struct qlb_outfile *out, uint64_t before)
{
    uint64_t full = out->position / WRITEBACK_STEP * WRITEBACK_STEP;

    if (out->type == S_IFREG && full > before) {
        /* Only a hint: fsync is what counts. */
        sync_file_range(out->fd, (off_t)(full - WRITEBACK_STEP),
                        (off_t)WRITEBACK_STEP, SYNC_FILE_RANGE_WRITE);
    }
}

static int write_failed(const struct qlb_outfile *out, int reason,
                        struct qlb_error *err)
{
    return out->sink != NULL ? out->sink->failed(out->opaque, reason, err)
                             : qlb_fail_errno(err, reason, "%s: writing",
                                              out->name);
}

int qlb_outfile_write(struct qlb_outfile *out, const void *buf, size_t len,
                      struct qlb_error *err)
{
    uint64_t before = out->position;
    size_t done = 0;

    while (done < len) {
        ssize_t n = write(out->fd, (const char *)buf + done, len - done);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return write_failed(out, n == 0 ? EIO : errno, err);
        }
        done += (size_t)n;
        out->position += (size_t)n; /* what arrived, where the rest fails */
    }
    start_writeback(out, before);
    return 0;
}

static bool is_aligned(const void *buf, size_t len, uint64_t offset)
{
    return ((uintptr_t)buf | len | offset) % QLB_OUTFILE_ALIGNMENT == 0;
}

int qlb_outfile_pwrite(struct qlb_outfile *out, const void *buf, size_t len,
                       uint64_t offset, struct qlb_error *err)
{
    int fd = out->fd;
    size_t done = 0;

    if (out->direct >= 0 && is_aligned(buf, len, offset)) {
        fd = out->direct;
    }
    while (done < len) {
        ssize_t n = pwrite(fd, (const char *)buf + done, len - done,
                           (off_t)(offset + done));

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0 && errno == EINVAL && fd != out->fd) {
            fd = out->fd; /* a disk with larger sectors, or a short write */
            continue;
        }
        if (n <= 0) {
            return qlb_fail_errno(err, n == 0 ? EIO : errno,
                                  "%s: writing at offset %llu", out->name,
                                  (unsigned long long)offset);
        }
        done += (size_t)n;
    }
    return 0;
}

void qlb_outfile_reserve(struct qlb_outfile *out, uint64_t offset,
                         uint64_t length)
{
    if (out->type == S_IFREG) {
        int ret = fallocate(out->fd, 0, (off_t)offset, (off_t)length);

        (void)ret; /* the write will tell */
    }
}

/* Where neither the file system nor the device can zero by itself. */
static int write_zeroes(struct qlb_outfile *out, uint64_t offset,
                        uint64_t length, struct qlb_error *err)
{
    static const uint8_t zeroes[65536];

    while (length > 0) {
        size_t n = length < sizeof(zeroes) ? length : sizeof(zeroes);

        if (qlb_outfile_pwrite(out, zeroes, n, offset, err) < 0) {
            return -1;
        }
        offset += n;
        length -= n;
    }
    return 0;
}

int qlb_outfile_zero(struct qlb_outfile *out, uint64_t offset,
                     uint64_t length, struct qlb_error *err)
{
    uint64_t range[2] = { offset, length };

    if (fallocate(out->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
                  (off_t)offset, (off_t)length) == 0) {
        return 0;
    }
    if (out->type == S_IFBLK && offset % 512 == 0 && length % 512 == 0 &&
        ioctl(out->fd, BLKZEROOUT, range) == 0) {
        return 0;
    }
    return write_zeroes(out, offset, length, err);
}

int qlb_outfile_truncate(struct qlb_outfile *out, uint64_t size,
                         struct qlb_error *err)
{
    if (out->type == S_IFREG && ftruncate(out->fd, (off_t)size) < 0) {
        return qlb_fail_errno(err, errno, "%s: setting the size to %llu",
                              out->name, (unsigned long long)size);
    }
    return 0;
}

uint64_t qlb_outfile_position(const struct qlb_outfile *out)
{
    return out->position;
}

const char *qlb_outfile_name(const struct qlb_outfile *out)
{
    return out->name;
}

int qlb_outfile_descriptor(const struct qlb_outfile *out)
{
    return out->fd;
}

bool qlb_outfile_is_committed(const struct qlb_outfile *out)
{
    return out->committed;
}

bool qlb_outfile_is_regular(const struct qlb_outfile *out)
{
    return out->type == S_IFREG;
}

bool qlb_outfile_is_stored(const struct qlb_outfile *out)
{
    return out->type == S_IFREG || out->sink != NULL;
}

bool qlb_outfile_is_block_device(const struct qlb_outfile *out)
{
    return out->type == S_IFBLK;
}

int qlb_outfile_sync(struct qlb_outfile *out, struct qlb_error *err)
{
    if (out->type != S_IFREG && out->type != S_IFBLK) {
        return 0;
    }
    if (fsync(out->fd) < 0) {
        return qlb_fail_errno(err, errno, "%s: syncing", out->name);
    }
    return 0;
}

static int sync_folder(const char *path, struct qlb_error *err)
{
    const char *slash = strrchr(path, '/');
    char *folder QLB_AUTO_FREE = NULL;
    int fd QLB_AUTO_CLOSE = -1;

    folder = slash == NULL ? strdup(".")
                           : strndup(path, (size_t)(slash - path) + 1);
    if (folder == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", path);
    }
    fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || fsync(fd) < 0) {
        return qlb_fail_errno(err, errno, "%s: syncing the folder", folder);
    }
    return 0;
}

/* Without leave to replace, a name that appeared meanwhile is an error. */
static int rename_into_place(struct qlb_outfile *out, struct qlb_error *err)
{
    int ret;

    if (out->replace) {
        ret = rename(out->temporary, out->name);
    } else {
        ret = renameat2(AT_FDCWD, out->temporary, AT_FDCWD, out->name,
                        RENAME_NOREPLACE);
        if (ret < 0 && errno == EINVAL) {
            ret = link(out->temporary, out->name);
            if (ret == 0) {
                unlink(out->temporary);
            }
        }
    }
    if (ret < 0) {
        return qlb_fail_errno(err, errno, "%s", out->name);
    }
    return 0;
}

static void forget_temporary(struct qlb_outfile *out)
{
    atomic_store(&temporaries[out->slot], NULL);
    free(out->temporary);
    out->temporary = NULL;
}

int qlb_outfile_commit(struct qlb_outfile *out, struct qlb_error *err)
{
    if (out->sink != NULL) {
        out->committed = out->sink->commit(out->opaque, out->position,
                                           err) == 0;
        return out->committed ? 0 : -1;
    }
    if (qlb_outfile_sync(out, err) < 0) {
        return -1;
    }
    if (out->temporary == NULL) {
        out->committed = true;
        return 0;
    }
    if (rename_into_place(out, err) < 0) {
        return -1;
    }
    out->committed = true;
    forget_temporary(out);
    return sync_folder(out->name, err);
}

void qlb_outfile_close(struct qlb_outfile *out)
{
    if (out == NULL) {
        return;
    }
    if (out->temporary != NULL) {
        unlink(out->temporary);
        forget_temporary(out);
    }
    if (out->direct >= 0) {
        close(out->direct);
    }
    if (out->sink != NULL) {
        out->sink->free(out->opaque);
    }
    if (out->owned && out->fd >= 0) {
        close(out->fd);
    }
    free(out->name);
    free(out);
}
