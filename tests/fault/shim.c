/* Faults at the n-th call: preloaded (LD_PRELOAD) into a program under test.
 *
 * Counts calls of the chosen kinds and makes the n-th of them fail, or kills
 * the process there.  A test runs the program once to learn the total, then
 * for each n = 1..total.  Calls that the C library makes itself (stdio) are
 * not seen.
 *
 *   QLB_FAULT_COUNT_FILE  gets the total when the program ends by itself
 *   QLB_FAULT_AT          n, from 1; absent: only count
 *   QLB_FAULT_OP          kinds that count, separated by commas: write, sync,
 *                         truncate, rename, read, unlink (default: all but the
 *                         last two)
 *   QLB_FAULT_PATH        count calls on files whose path has this in it alone
 *   QLB_FAULT_KIND        what happens at the n-th call:
 *       eio, enospc       it fails with this errno and does nothing
 *       eio-on, enospc-on the same, and so do all that follow
 *       kill-before       SIGKILL before it
 *       kill-after        SIGKILL after it
 *       short             a write or read transfers half of its bytes, at least
 *                         one; other calls are not affected
 *       eintr             it fails with EINTR and does nothing
 *       term, int         the process gets SIGTERM or SIGINT, then the call goes
 *                         on; term-on, int-on: before all that follow, too
 *       hang              it waits until the file QLB_FAULT_GO_ON exists, as all
 *                         that follow do, then it is done
 *       torn              a write reaches the file up to a multiple of 4096 in
 *                         the middle (nothing, where there is none), then
 *                         SIGKILL; other calls: as kill-before
 *   QLB_FAULT_LOG_FILE    each write and sync is appended to this file, to be
 *                         replayed, with the file's name without its folder:
 *                         "W OFFSET LENGTH NAME\n" and the bytes, after it was
 *                         done; "S NAME\n" before a sync, "D NAME\n" after it
 *   QLB_FAULT_CLOCK       seconds by which time() is wrong, at the first call, and
 *   QLB_FAULT_CLOCK_STEP  more with each further one; both may be negative
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#undef _FILE_OFFSET_BITS /* pwrite and pwrite64 are both defined here */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096

enum op { OP_WRITE = 1, OP_SYNC = 2, OP_TRUNCATE = 4, OP_RENAME = 8,
          OP_READ = 16, OP_UNLINK = 32 };

enum kind { KIND_NONE, KIND_EIO, KIND_ENOSPC, KIND_EINTR, KIND_SHORT,
            KIND_TERM, KIND_INT, KIND_KILL_BEFORE, KIND_KILL_AFTER,
            KIND_TORN, KIND_HANG };

enum verdict { GO_ON, FAIL, SHORTEN, KILL_AFTER, TEAR };

static struct {
    unsigned ops;
    enum kind kind;
    bool from_then_on;
    unsigned long at;
    const char *path, *count_file, *go_on;
    int log;
} config = { .log = -1 };

static unsigned long count;
static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* ---- configuration ---- */

static unsigned parse_ops(const char *text)
{
    static const struct { const char *name; enum op op; } names[] = {
        { "write", OP_WRITE }, { "sync", OP_SYNC },
        { "truncate", OP_TRUNCATE }, { "rename", OP_RENAME },
        { "read", OP_READ }, { "unlink", OP_UNLINK },
    };
    unsigned ops = 0;

    if (text == NULL) {
        return OP_WRITE | OP_SYNC | OP_TRUNCATE | OP_RENAME;
    }
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        ops |= strstr(text, names[i].name) ? names[i].op : 0;
    }
    return ops;
}

static enum kind parse_kind(const char *text)
{
    static const char *const names[] = {
        [KIND_EIO] = "eio", [KIND_ENOSPC] = "enospc",
        [KIND_EINTR] = "eintr", [KIND_SHORT] = "short",
        [KIND_TERM] = "term", [KIND_INT] = "int",
        [KIND_KILL_BEFORE] = "kill-before", [KIND_KILL_AFTER] = "kill-after",
        [KIND_TORN] = "torn", [KIND_HANG] = "hang",
    };
    size_t len;

    if (text == NULL) {
        return KIND_NONE;
    }
    len = strlen(text);
    if (len > 3 && strcmp(text + len - 3, "-on") == 0) {
        config.from_then_on = true;
        len -= 3;
    }
    for (int i = KIND_EIO; i <= KIND_HANG; i++) {
        if (strlen(names[i]) == len && strncmp(text, names[i], len) == 0) {
            return (enum kind)i;
        }
    }
    fprintf(stderr, "fault shim: unknown QLB_FAULT_KIND\n");
    abort(); /* a test that injects nothing would pass */
}

__attribute__((constructor)) static void start(void)
{
    const char *at = getenv("QLB_FAULT_AT");
    const char *log = getenv("QLB_FAULT_LOG_FILE");

    config.ops = parse_ops(getenv("QLB_FAULT_OP"));
    config.kind = parse_kind(getenv("QLB_FAULT_KIND"));
    config.at = at == NULL ? 0 : strtoul(at, NULL, 10);
    config.path = getenv("QLB_FAULT_PATH");
    config.count_file = getenv("QLB_FAULT_COUNT_FILE");
    config.go_on = getenv("QLB_FAULT_GO_ON");
    if (config.kind == KIND_HANG) {
        config.from_then_on = true;
    }
    if (log != NULL) {
        config.log = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC,
                          0600);
    }
}

__attribute__((destructor)) static void finish(void)
{
    FILE *file;

    if (config.count_file == NULL) {
        return;
    }
    file = fopen(config.count_file, "w");
    if (file != NULL) {
        fprintf(file, "%lu\n", __atomic_load_n(&count, __ATOMIC_SEQ_CST));
        fclose(file);
    }
}

/* ---- decisions ---- */

static bool path_matches(const char *path)
{
    return config.path == NULL || strstr(path, config.path) != NULL;
}

/* path: PATH_MAX bytes. */
static bool path_of(int fd, char *path)
{
    char link[64];
    ssize_t len;

    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    len = readlink(link, path, PATH_MAX - 1);
    if (len < 0) {
        return false;
    }
    path[len] = 0;
    return true;
}

static bool fd_matches(int fd)
{
    char path[PATH_MAX];

    return config.path == NULL || (path_of(fd, path) && path_matches(path));
}

static void die(void)
{
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) {
        pause();
    }
}

static void hang(void)
{
    while (config.go_on == NULL || access(config.go_on, F_OK) != 0) {
        usleep(10000);
    }
}

static enum verdict decide(enum op op, bool matches)
{
    unsigned long n;

    if ((config.ops & op) == 0 || !matches) {
        return GO_ON;
    }
    n = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (config.at == 0 ||
        (config.from_then_on ? n < config.at : n != config.at)) {
        return GO_ON;
    }
    switch (config.kind) {
    case KIND_EIO:
        errno = EIO;
        return FAIL;
    case KIND_ENOSPC:
        errno = ENOSPC;
        return FAIL;
    case KIND_EINTR:
        errno = EINTR;
        return FAIL;
    case KIND_SHORT:
        return SHORTEN;
    case KIND_TERM:
        kill(getpid(), SIGTERM);
        return GO_ON;
    case KIND_INT:
        kill(getpid(), SIGINT);
        return GO_ON;
    case KIND_KILL_BEFORE:
        die();
        return FAIL;
    case KIND_TORN:
        if (op == OP_WRITE) {
            return TEAR;
        }
        die();
        return FAIL;
    case KIND_KILL_AFTER:
        return KILL_AFTER;
    case KIND_HANG:
        hang();
        return GO_ON;
    default:
        return GO_ON;
    }
}

static void log_bytes(const void *data, size_t len)
{
    const char *bytes = data;

    while (len > 0) {
        long n = syscall(SYS_write, config.log, bytes, len);

        if (n <= 0) {
            return;
        }
        bytes += n;
        len -= (size_t)n;
    }
}

/* An entry: what comes before the file's name, and the bytes after it. */
static void log_entry(int fd, const char *what, const void *buf, size_t len)
{
    char path[PATH_MAX], head[PATH_MAX + 64];
    const char *slash;

    if (config.log < 0 || !fd_matches(fd) || !path_of(fd, path)) {
        return;
    }
    slash = strrchr(path, '/');
    snprintf(head, sizeof(head), "%s %s\n", what,
             slash == NULL ? path : slash + 1);
    pthread_mutex_lock(&log_lock);
    log_bytes(head, strlen(head));
    log_bytes(buf, len);
    pthread_mutex_unlock(&log_lock);
}

static void log_write(int fd, off_t offset, const void *buf, size_t len)
{
    char what[64];

    snprintf(what, sizeof(what), "W %lld %zu", (long long)offset, len);
    log_entry(fd, what, buf, len);
}

static int logged_sync(int fd, int (*sync)(int))
{
    int ret;

    log_entry(fd, "S", NULL, 0);
    ret = sync(fd);
    if (ret == 0) {
        log_entry(fd, "D", NULL, 0);
    }
    return ret;
}

/* Bytes of a write at offset that arrive when it is torn in its middle. */
static size_t torn_length(off_t offset, size_t len)
{
    off_t middle = offset + (off_t)(len / 2);
    off_t boundary = (middle + PAGE - 1) / PAGE * PAGE;

    if (boundary >= offset + (off_t)len) {
        boundary -= PAGE;
    }
    return boundary <= offset ? 0 : (size_t)(boundary - offset);
}

static size_t short_length(enum verdict verdict, size_t len)
{
    return verdict == SHORTEN && len > 1 ? len / 2 : len;
}

/* ---- the clock ---- */

static long number_of(const char *name)
{
    const char *text = getenv(name);

    return text == NULL ? 0 : strtol(text, NULL, 10);
}

time_t time(time_t *result)
{
    static long calls;
    struct timespec now;
    long before = __atomic_fetch_add(&calls, 1, __ATOMIC_SEQ_CST);

    clock_gettime(CLOCK_REALTIME, &now);
    now.tv_sec += number_of("QLB_FAULT_CLOCK") +
                  before * number_of("QLB_FAULT_CLOCK_STEP");
    if (result != NULL) {
        *result = now.tv_sec;
    }
    return now.tv_sec;
}

/* ---- the calls ---- */

/* What call() returns, with the faults around it. */
#define WITH_FAULTS(op, matches, type, call)                                  \
    do {                                                                      \
        enum verdict verdict_ = decide(op, matches);                          \
        type result_;                                                         \
        if (verdict_ == FAIL) {                                               \
            return -1;                                                        \
        }                                                                     \
        if (verdict_ == TEAR) {                                               \
            die(); /* there is no middle */                                   \
        }                                                                     \
        result_ = (call);                                                     \
        if (verdict_ == KILL_AFTER) {                                         \
            die();                                                            \
        }                                                                     \
        return result_;                                                       \
    } while (0)

static ssize_t pwrite_with_faults(int fd, const void *buf, size_t len,
                                  off_t offset)
{
    enum verdict verdict = decide(OP_WRITE, fd_matches(fd));
    ssize_t n;

    if (verdict == FAIL) {
        return -1;
    }
    if (verdict == TEAR) {
        len = torn_length(offset, len);
    }
    len = short_length(verdict, len);
    n = len == 0 ? 0 : REAL(pwrite)(fd, buf, len, offset);
    if (verdict == TEAR || verdict == KILL_AFTER) {
        die();
    }
    if (n > 0) {
        log_write(fd, offset, buf, (size_t)n);
    }
    return n;
}

ssize_t pwrite(int fd, const void *buf, size_t len, off_t offset)
{
    return pwrite_with_faults(fd, buf, len, offset);
}

ssize_t pwrite64(int fd, const void *buf, size_t len, off64_t offset)
{
    return pwrite_with_faults(fd, buf, len, (off_t)offset);
}

/* The first len bytes of the vectors. */
static ssize_t pwritev_in_part(int fd, const struct iovec *iov, int n,
                               off_t offset, size_t len)
{
    size_t done = 0;

    for (int i = 0; i < n && done < len; i++) {
        size_t part = iov[i].iov_len < len - done ? iov[i].iov_len
                                                  : len - done;
        ssize_t result = REAL(pwrite)(fd, iov[i].iov_base, part,
                                      offset + (off_t)done);

        if (result < 0) {
            return done == 0 ? -1 : (ssize_t)done;
        }
        done += (size_t)result;
        if ((size_t)result < part) {
            break;
        }
    }
    return (ssize_t)done;
}

static ssize_t pwritev_with_faults(int fd, const struct iovec *iov, int n,
                                   off_t offset)
{
    enum verdict verdict = decide(OP_WRITE, fd_matches(fd));
    size_t len = 0;
    ssize_t result;

    if (verdict == FAIL) {
        return -1;
    }
    for (int i = 0; i < n; i++) {
        len += iov[i].iov_len;
    }
    if (verdict == TEAR) {
        len = torn_length(offset, len);
    }
    if (verdict == TEAR || verdict == SHORTEN || config.log >= 0) {
        result = pwritev_in_part(fd, iov, n, offset,
                                 short_length(verdict, len));
    } else {
        result = REAL(pwritev)(fd, iov, n, offset);
    }
    if (verdict == TEAR || verdict == KILL_AFTER) {
        die();
    }
    len = result > 0 ? (size_t)result : 0;
    for (int i = 0; i < n && len > 0; i++) {
        size_t part = len < iov[i].iov_len ? len : iov[i].iov_len;

        log_write(fd, offset, iov[i].iov_base, part);
        offset += (off_t)part;
        len -= part;
    }
    return result;
}

ssize_t pwritev(int fd, const struct iovec *iov, int n, off_t offset)
{
    return pwritev_with_faults(fd, iov, n, offset);
}

ssize_t pwritev64(int fd, const struct iovec *iov, int n, off64_t offset)
{
    return pwritev_with_faults(fd, iov, n, (off_t)offset);
}

ssize_t write(int fd, const void *buf, size_t len)
{
    enum verdict verdict = decide(OP_WRITE, fd_matches(fd));
    off_t at;
    ssize_t n;

    if (verdict == FAIL) {
        return -1;
    }
    if (verdict == TEAR) {
        at = lseek(fd, 0, SEEK_CUR);
        len = torn_length(at < 0 ? 0 : at, len);
    }
    len = short_length(verdict, len);
    n = len == 0 ? 0 : REAL(write)(fd, buf, len);
    if (verdict == TEAR || verdict == KILL_AFTER) {
        die();
    }
    return n;
}

ssize_t writev(int fd, const struct iovec *iov, int n)
{
    WITH_FAULTS(OP_WRITE, fd_matches(fd), ssize_t, REAL(writev)(fd, iov, n));
}

ssize_t copy_file_range(int in, off64_t *in_offset, int out,
                        off64_t *out_offset, size_t len, unsigned flags)
{
    WITH_FAULTS(OP_WRITE, fd_matches(out), ssize_t,
                REAL(copy_file_range)(in, in_offset, out, out_offset, len,
                                      flags));
}

int fallocate(int fd, int mode, off_t offset, off_t len)
{
    WITH_FAULTS(OP_WRITE, fd_matches(fd), int,
                REAL(fallocate)(fd, mode, offset, len));
}

int fallocate64(int fd, int mode, off64_t offset, off64_t len)
{
    WITH_FAULTS(OP_WRITE, fd_matches(fd), int,
                REAL(fallocate64)(fd, mode, offset, len));
}

int fsync(int fd)
{
    WITH_FAULTS(OP_SYNC, fd_matches(fd), int, logged_sync(fd, REAL(fsync)));
}

int fdatasync(int fd)
{
    WITH_FAULTS(OP_SYNC, fd_matches(fd), int,
                logged_sync(fd, REAL(fdatasync)));
}

int ftruncate(int fd, off_t length)
{
    WITH_FAULTS(OP_TRUNCATE, fd_matches(fd), int,
                REAL(ftruncate)(fd, length));
}

int ftruncate64(int fd, off64_t length)
{
    WITH_FAULTS(OP_TRUNCATE, fd_matches(fd), int,
                REAL(ftruncate64)(fd, length));
}

int rename(const char *from, const char *to)
{
    WITH_FAULTS(OP_RENAME, path_matches(from) || path_matches(to), int,
                REAL(rename)(from, to));
}

int renameat(int from_dir, const char *from, int to_dir, const char *to)
{
    WITH_FAULTS(OP_RENAME, path_matches(from) || path_matches(to), int,
                REAL(renameat)(from_dir, from, to_dir, to));
}

int renameat2(int from_dir, const char *from, int to_dir, const char *to,
              unsigned flags)
{
    WITH_FAULTS(OP_RENAME, path_matches(from) || path_matches(to), int,
                REAL(renameat2)(from_dir, from, to_dir, to, flags));
}

int linkat(int from_dir, const char *from, int to_dir, const char *to,
           int flags)
{
    WITH_FAULTS(OP_RENAME, path_matches(from) || path_matches(to), int,
                REAL(linkat)(from_dir, from, to_dir, to, flags));
}

int unlink(const char *path)
{
    WITH_FAULTS(OP_UNLINK, path_matches(path), int, REAL(unlink)(path));
}

/* A read of which half arrives, where that is asked for. */
#define READ_WITH_FAULTS(fd, len, call)                                       \
    do {                                                                      \
        enum verdict verdict_ = decide(OP_READ, fd_matches(fd));              \
        ssize_t result_;                                                      \
        if (verdict_ == FAIL) {                                               \
            return -1;                                                        \
        }                                                                     \
        len = short_length(verdict_, len);                                    \
        result_ = (call);                                                     \
        if (verdict_ == KILL_AFTER) {                                         \
            die();                                                            \
        }                                                                     \
        return result_;                                                       \
    } while (0)

ssize_t pread(int fd, void *buf, size_t len, off_t offset)
{
    READ_WITH_FAULTS(fd, len, REAL(pread)(fd, buf, len, offset));
}

ssize_t pread64(int fd, void *buf, size_t len, off64_t offset)
{
    READ_WITH_FAULTS(fd, len, REAL(pread64)(fd, buf, len, offset));
}

ssize_t read(int fd, void *buf, size_t len)
{
    READ_WITH_FAULTS(fd, len, REAL(read)(fd, buf, len));
}
