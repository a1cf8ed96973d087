/* The objects of a repository in a folder of this host.
 *
 * An object is a temporary file that is synced and renamed, then the folder is
 * synced. A lock is flock on an empty file: it ends with the process.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "vm/store.h"

struct store_lock {
    int fd;
};

static int no_memory(const char *what, struct qlb_error *err)
{
    return qlb_fail_errno(err, ENOMEM, "%s", what);
}

/* NULL where memory is short: the error is told. */
static char *path_of(const struct store *store, const char *object,
                     struct qlb_error *err)
{
    char *path = store_path(store, object);

    if (path == NULL) {
        no_memory(store->name, err);
    }
    return path;
}

/* ---- folders ---- */

static int sync_folder(const char *path, struct qlb_error *err)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int ret = fd < 0 || fsync(fd) < 0 ? -1 : 0;

    if (ret < 0) {
        qlb_fail_errno(err, errno, "%s: syncing the folder", path);
    }
    if (fd >= 0) {
        close(fd);
    }
    return ret;
}

static int sync_parent(const char *path, struct qlb_error *err)
{
    char *parent;
    int ret;

    if (asprintf(&parent, "%s/..", path) < 0) {
        return no_memory(path, err);
    }
    ret = sync_folder(parent, err);
    free(parent);
    return ret;
}

static int make_path(const char *path, mode_t mode, struct qlb_error *err)
{
    struct stat st;

    if (mkdir(path, mode) == 0) {
        return sync_parent(path, err);
    }
    if (errno != EEXIST || stat(path, &st) < 0) {
        return qlb_fail_errno(err, errno, "%s", path);
    }
    return S_ISDIR(st.st_mode) ? 0 : qlb_fail_errno(err, ENOTDIR, "%s", path);
}

static int folder_make(struct store *store, const char *folder, bool own,
                       struct qlb_error *err)
{
    char *path = path_of(store, folder, err);
    int ret = path == NULL ? -1 : make_path(path, own ? 0700 : 0777, err);

    free(path);
    return ret;
}

static int list_path(const char *path, struct store_names *names,
                     struct qlb_error *err)
{
    DIR *dir = opendir(path);
    struct dirent *entry;
    int reason = 0;

    if (dir == NULL) {
        return qlb_fail_errno(err, errno, "%s", path);
    }
    while (reason == 0 && (errno = 0, entry = readdir(dir)) != NULL) {
        if (strcmp(entry->d_name, ".") != 0 &&
            strcmp(entry->d_name, "..") != 0 &&
            store_names_add(names, entry->d_name) < 0) {
            reason = ENOMEM;
        }
    }
    if (reason == 0) {
        reason = errno;
    }
    closedir(dir);
    return reason == 0 ? 0 : qlb_fail_errno(err, reason, "%s", path);
}

static int folder_list(struct store *store, const char *folder,
                       struct store_names *names, struct qlb_error *err)
{
    char *path = path_of(store, folder, err);
    int ret = path == NULL ? -1 : list_path(path, names, err);

    free(path);
    return ret;
}

/* ---- objects ---- */

static int folder_has(struct store *store, const char *object,
                      struct qlb_error *err)
{
    char *path = path_of(store, object, err);
    struct stat st;
    int ret = 1;

    if (path == NULL) {
        return -1;
    }
    if (lstat(path, &st) < 0) {
        ret = errno == ENOENT ? 0 : qlb_fail_errno(err, errno, "%s", path);
    }
    free(path);
    return ret;
}

static int read_file(FILE *file, const char *path, struct store_text *text,
                     struct qlb_error *err)
{
    struct stat st;

    if (fstat(fileno(file), &st) < 0 || !S_ISREG(st.st_mode) ||
        (uint64_t)st.st_size > STORE_MAX_SMALL) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: is no file, or too large",
                        path);
    }
    text->data = malloc((size_t)st.st_size + 1);
    if (text->data == NULL) {
        return no_memory(path, err);
    }
    text->len = fread(text->data, 1, (size_t)st.st_size, file);
    text->data[text->len] = '\0';
    if (ferror(file)) {
        free(text->data);
        text->data = NULL;
        return qlb_fail_errno(err, EIO, "%s: reading", path);
    }
    return 1;
}

static int get_path(const char *path, struct store_text *text,
                    struct qlb_error *err)
{
    FILE *file = fopen(path, "re");
    int ret;

    if (file == NULL) {
        return errno == ENOENT ? 0 : qlb_fail_errno(err, errno, "%s", path);
    }
    ret = read_file(file, path, text, err);
    fclose(file);
    return ret;
}

static int folder_get(struct store *store, const char *object,
                      struct store_text *text, struct qlb_error *err)
{
    char *path = path_of(store, object, err);
    int ret = path == NULL ? -1 : get_path(path, text, err);

    free(path);
    return ret;
}

static bool has_suffix(const char *name, const char *suffix)
{
    size_t len = strlen(name), n = strlen(suffix);

    return len > n && strcmp(name + len - n, suffix) == 0;
}

static int give_one(struct store *store, const char *folder, const char *name,
                    store_each_fn *each, void *opaque, struct qlb_error *err)
{
    struct store_text text;
    char *object;
    int ret;

    if (asprintf(&object, "%s/%s", folder, name) < 0) {
        return no_memory(folder, err);
    }
    ret = store_get(store, object, &text, err);
    free(object);
    if (ret > 0) {
        ret = each(opaque, name, &text, err);
        free(text.data);
    }
    return ret;
}

static int folder_each(struct store *store, const char *folder,
                       const char *suffix, store_each_fn *each, void *opaque,
                       struct qlb_error *err)
{
    struct store_names names;
    int ret = store_list(store, folder, &names, err);

    for (unsigned i = 0; ret == 0 && i < names.n; i++) {
        /* One that is written anew just now may be listed twice. */
        if (names.at[i][0] != '.' && has_suffix(names.at[i], suffix) &&
            (i == 0 || strcmp(names.at[i - 1], names.at[i]) != 0)) {
            ret = give_one(store, folder, names.at[i], each, opaque, err);
        }
    }
    store_names_release(&names);
    return ret;
}

static int folder_put(struct store *store, const char *object,
                      const char *data, size_t len, bool replace,
                      struct qlb_error *err)
{
    char *path = path_of(store, object, err);
    struct qlb_outfile *out = NULL;
    int ret = -1;

    if (path != NULL) {
        out = qlb_outfile_create(path, replace ? QLB_OUTFILE_FORCE : 0, err);
    }
    if (out != NULL && qlb_outfile_write(out, data, len, err) == 0) {
        ret = qlb_outfile_commit(out, err);
    }
    qlb_outfile_close(out);
    free(path);
    return ret;
}

static int folder_touch(struct store *store, const char *object,
                        struct qlb_error *err)
{
    char *path = path_of(store, object, err);
    int fd, ret = 0;

    if (path == NULL) {
        return -1;
    }
    fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (fd < 0) {
        ret = qlb_fail_errno(err, errno, "%s", path);
    } else {
        close(fd);
    }
    free(path);
    return ret;
}

static struct qlb_outfile *folder_create(struct store *store,
                                         const char *object,
                                         struct qlb_error *err)
{
    char *path = path_of(store, object, err);
    struct qlb_outfile *out = path == NULL ? NULL
                                           : qlb_outfile_create(path, 0, err);

    free(path);
    return out;
}

static int unlink_object(struct store *store, const char *object,
                         struct qlb_error *err)
{
    char *path = path_of(store, object, err);
    int ret = path == NULL ? -1 : 0;

    /* A folder is nobody's leftover. */
    if (ret == 0 && unlink(path) < 0 && errno != ENOENT &&
        errno != EISDIR) {
        ret = qlb_fail_errno(err, errno, "%s: deleting", path);
    }
    free(path);
    return ret;
}

static int folder_delete(struct store *store, const char *const *objects,
                         unsigned n, struct qlb_error *err)
{
    char *folder;
    int ret = 0;

    for (unsigned i = 0; i < n && ret == 0; i++) {
        ret = unlink_object(store, objects[i], err);
    }
    if (ret < 0) {
        return -1;
    }
    folder = path_of(store, objects[0], err);
    if (folder == NULL) {
        return -1;
    }
    *strrchr(folder, '/') = '\0';
    ret = sync_folder(folder, err);
    free(folder);
    return ret;
}

static char *folder_fetch(struct store *store, const char *object,
                          struct qlb_error *err)
{
    return path_of(store, object, err);
}

/* ---- locks ---- */

/* The process that holds a lock on the file, as the kernel lists them; 0 where
 * that can't be known (another host, a file system with devices of its own). */
static long find_holder(int fd)
{
    FILE *locks = fopen("/proc/locks", "re");
    char line[256], kind[16];
    struct stat st;
    long holder = 0;

    if (locks == NULL || fstat(fd, &st) < 0) {
        if (locks != NULL) {
            fclose(locks);
        }
        return 0;
    }
    while (holder == 0 && fgets(line, sizeof(line), locks) != NULL) {
        unsigned major, minor;
        unsigned long long inode;
        long pid;

        if (sscanf(line, "%*d: %15s %*s %*s %ld %x:%x:%llu", kind, &pid,
                   &major, &minor, &inode) == 5 &&
            strcmp(kind, "FLOCK") == 0 && pid > 0 && inode == st.st_ino &&
            makedev(major, minor) == st.st_dev) {
            holder = pid;
        }
    }
    fclose(locks);
    return holder;
}

static int open_lock(const char *path, bool exclusive, struct qlb_error *err)
{
    /* NFS wants a file that may be written for an exclusive lock. */
    int flags = (exclusive ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NOFOLLOW;
    int fd = open(path, flags);

    if (fd < 0 && errno == ENOENT) {
        fd = open(path, flags | O_CREAT, 0666);
    }
    if (fd < 0) {
        qlb_fail_errno(err, errno, "%s", path);
    }
    return fd; /* keeps errno */
}

/* subject: what is locked, for messages. */
static int take_lock(int fd, const char *subject, const char *name,
                     bool exclusive, const char *who, struct qlb_error *err)
{
    char process[48] = "";
    long holder;

    if (flock(fd, (exclusive ? LOCK_EX : LOCK_SH) | LOCK_NB) == 0) {
        return 0;
    }
    if (errno != EWOULDBLOCK) {
        return qlb_fail_errno(err, errno, "%s: locking '%s'", subject, name);
    }
    holder = find_holder(fd);
    if (holder > 0) {
        snprintf(process, sizeof(process), " (process %ld)", holder);
    }
    return qlb_fail(err, QLB_E_BUSY, "%s: %s%s; try again when that has "
                    "ended", subject, who, process);
}

static int lock_path(char *path, bool exclusive, const char *who, int *fd,
                     struct qlb_error *err)
{
    char *slash = strrchr(path, '/');

    *fd = open_lock(path, exclusive, err);
    if (*fd < 0) {
        return !exclusive && errno == EROFS ? 0 : -1;
    }
    *slash = '\0';
    if (take_lock(*fd, path, slash + 1, exclusive, who, err) < 0) {
        close(*fd);
        return -1;
    }
    return 0;
}

static int folder_lock(struct store *store, const char *object,
                       bool exclusive, const char *who,
                       struct store_lock **lock, struct qlb_error *err)
{
    char *path = path_of(store, object, err);
    int fd = -1, ret = path == NULL
                           ? -1 : lock_path(path, exclusive, who, &fd, err);

    free(path);
    if (ret < 0 || fd < 0) {
        return ret;
    }
    *lock = malloc(sizeof(**lock));
    if (*lock == NULL) {
        close(fd);
        return no_memory(store->name, err);
    }
    (*lock)->fd = fd;
    return 0;
}

static void folder_unlock(struct store *store, struct store_lock *lock)
{
    (void)store;
    close(lock->fd);
    free(lock);
}

/* ---- the store ---- */

static void folder_close(struct store *store)
{
    free(store->name);
    free(store);
}

static const struct store_ops folder_ops = {
    .make_folder = folder_make,
    .list = folder_list,
    .each = folder_each,
    .has = folder_has,
    .get = folder_get,
    .put = folder_put,
    .touch = folder_touch,
    .create = folder_create,
    .delete = folder_delete,
    .fetch = folder_fetch,
    .lock = folder_lock,
    .unlock = folder_unlock,
    .close = folder_close,
};

struct store *store_folder_open(const char *path, struct qlb_error *err)
{
    struct store *store = calloc(1, sizeof(*store));

    if (store == NULL || (store->name = strdup(path)) == NULL) {
        free(store);
        no_memory(path, err);
        return NULL;
    }
    store->ops = &folder_ops;
    return store;
}
