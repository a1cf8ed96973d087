/* The scratch folder of one backup.
 *
 * In PARENT/.lbvm-KEY are "lock", which is locked with flock and has the note,
 * "nbd", a socket of QEMU's, and overlays for as long as QEMU has not opened
 * them; their names are numbers.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/scratch.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define PREFIX ".lbvm-"
#define LOCK "lock"
/* Of a note: a line for each of some hundred disks. */
#define NOTE_MAX ((size_t)1 << 20)

struct scratch {
    char *path;
    int dir, lock;
    uid_t uid; /* of who runs QEMU */
    gid_t gid;
};

const char *scratch_path(const struct scratch *scratch)
{
    return scratch->path;
}

const char *scratch_key(const struct scratch *scratch)
{
    return scratch->path + strlen(scratch->path) - SCRATCH_KEY;
}

static bool is_scratch(const char *path)
{
    const char *slash = strrchr(path, '/');
    const char *name = slash == NULL ? path : slash + 1;
    size_t prefix = strlen(PREFIX);

    return strncmp(name, PREFIX, prefix) == 0 &&
           strlen(name + prefix) == SCRATCH_KEY &&
           strspn(name + prefix, "0123456789abcdef") == SCRATCH_KEY;
}

static struct scratch *scratch_new(char *path)
{
    struct scratch *scratch = path == NULL ? NULL
                                           : calloc(1, sizeof(*scratch));

    if (scratch == NULL) {
        free(path);
        return NULL;
    }
    scratch->path = path;
    scratch->dir = scratch->lock = -1;
    return scratch;
}

/* ---- deleting ---- */

static bool is_ours(const char *name)
{
    return strcmp(name, "nbd") == 0 ||
           (*name != '\0' && name[strspn(name, "0123456789")] == '\0');
}

static void delete_files(const struct scratch *scratch)
{
    int fd = dup(scratch->dir);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    const struct dirent *entry;

    if (dir == NULL) {
        if (fd >= 0) {
            close(fd);
        }
        return;
    }
    rewinddir(dir);
    while ((entry = readdir(dir)) != NULL) {
        if (is_ours(entry->d_name)) {
            unlinkat(scratch->dir, entry->d_name, 0);
        }
    }
    closedir(dir);
}

/* The lock last: who finds the folder without it leaves it alone, since its
 * owner may be about to make it. */
void scratch_free(struct scratch *scratch, bool remove)
{
    if (scratch == NULL) {
        return;
    }
    if (remove && scratch->lock >= 0) {
        delete_files(scratch);
        unlinkat(scratch->dir, LOCK, 0);
        rmdir(scratch->path);
    }
    if (scratch->lock >= 0) {
        close(scratch->lock);
    }
    if (scratch->dir >= 0) {
        close(scratch->dir);
    }
    free(scratch->path);
    free(scratch);
}

/* ---- a new one ---- */

/* Who runs QEMU owns the images that it has open. By descriptor: a name could
 * be another file's by now. */
static int give_away(const struct scratch *scratch, int fd,
                     struct qlb_error *err)
{
    if (geteuid() == 0 && scratch->uid != 0 &&
        fchown(fd, scratch->uid, scratch->gid) < 0) {
        return qlb_fail_errno(err, errno, "%s", scratch->path);
    }
    return 0;
}

static int open_folder(struct scratch *scratch, struct qlb_error *err)
{
    struct stat st;

    if (mkdir(scratch->path, 0700) < 0) {
        return qlb_fail_errno(err, errno, "%s", scratch->path);
    }
    scratch->dir = open(scratch->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW |
                                       O_CLOEXEC);
    if (scratch->dir < 0 || fstat(scratch->dir, &st) < 0) {
        return qlb_fail_errno(err, errno, "%s", scratch->path);
    }
    return st.st_uid == geteuid()
               ? 0 : qlb_fail_errno(err, EPERM, "%s", scratch->path);
}

/* Who clears may have come in between making the file and locking it. */
static bool has_lock(const struct scratch *scratch)
{
    struct stat mine, there;

    return flock(scratch->lock, LOCK_EX | LOCK_NB) == 0 &&
           fstat(scratch->lock, &mine) == 0 &&
           fstatat(scratch->dir, LOCK, &there, AT_SYMLINK_NOFOLLOW) == 0 &&
           mine.st_ino == there.st_ino && mine.st_dev == there.st_dev;
}

static int make_lock(struct scratch *scratch, const json_t *note,
                     struct qlb_error *err)
{
    int lock = openat(scratch->dir, LOCK, O_RDWR | O_CREAT | O_EXCL |
                                          O_CLOEXEC, 0600);

    if (lock < 0) {
        return qlb_fail_errno(err, errno, "%s/" LOCK, scratch->path);
    }
    scratch->lock = lock;
    if (!has_lock(scratch)) {
        return qlb_fail(err, QLB_E_BUSY, "%s: another lbvm is clearing it; "
                        "try again", scratch->path);
    }
    if (json_dumpfd(note, lock, JSON_COMPACT) < 0) {
        return qlb_fail_errno(err, errno != 0 ? errno : EIO, "%s/" LOCK,
                              scratch->path);
    }
    return 0;
}

static int fill(struct scratch *scratch, const char *image,
                const json_t *note, struct qlb_error *err)
{
    struct stat st;

    if (strlen(scratch->path) + sizeof("/nbd") >
        sizeof(((struct sockaddr_un *)NULL)->sun_path)) {
        return qlb_fail(err, QLB_E_USAGE, "%s: too long for the path of a "
                        "socket; --scratch=FOLDER is wanted", scratch->path);
    }
    if (stat(image, &st) == 0) {
        scratch->uid = st.st_uid;
        scratch->gid = st.st_gid;
    }
    errno = 0;
    if (open_folder(scratch, err) < 0 || make_lock(scratch, note, err) < 0) {
        return -1;
    }
    return give_away(scratch, scratch->dir, err);
}

struct scratch *scratch_make(const char *parent, const char *image,
                             const json_t *note, struct qlb_error *err)
{
    struct qlb_uuid random = tool_random_uuid();
    char uuid[QLB_UUID_TEXT], *path;
    struct scratch *scratch;

    if (asprintf(&path, "%s/" PREFIX "%.*s", strcmp(parent, "/") == 0
                                                 ? "" : parent,
                 SCRATCH_KEY, qlb_uuid_format(&random, uuid)) < 0) {
        path = NULL;
    }
    scratch = scratch_new(path);
    if (scratch == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", parent);
        return NULL;
    }
    if (fill(scratch, image, note, err) < 0) {
        scratch_free(scratch, true);
        return NULL;
    }
    return scratch;
}

int scratch_add_file(const struct scratch *scratch, const char *name,
                     struct qlb_error *err)
{
    int fd = openat(scratch->dir, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC,
                    0600);
    int ret;

    if (fd < 0) {
        return qlb_fail_errno(err, errno, "%s/%s", scratch->path, name);
    }
    ret = give_away(scratch, fd, err);
    close(fd);
    return ret;
}

void scratch_unlink(const struct scratch *scratch, const char *name)
{
    unlinkat(scratch->dir, name, 0);
}

bool scratch_has_server(const struct scratch *scratch, const char *name)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int n = snprintf(address.sun_path, sizeof(address.sun_path), "%s/%s",
                     scratch->path, name);
    int fd = n < 0 || (size_t)n >= sizeof(address.sun_path)
                 ? -1 : socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool there = fd >= 0 && connect(fd, (struct sockaddr *)&address,
                                    sizeof(address)) == 0;

    if (fd >= 0) {
        close(fd);
    }
    return there;
}

/* ---- those of the dead ---- */

struct scratch *scratch_take_over(const char *path, bool *alive)
{
    struct scratch *scratch = is_scratch(path) ? scratch_new(strdup(path))
                                               : NULL;
    int lock;

    *alive = false;
    if (scratch == NULL) {
        return NULL;
    }
    scratch->dir = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW |
                              O_CLOEXEC);
    lock = scratch->dir < 0 ? -1 : openat(scratch->dir, LOCK,
                                          O_RDONLY | O_NOFOLLOW | O_NONBLOCK |
                                          O_CLOEXEC);
    if (lock >= 0 && flock(lock, LOCK_EX | LOCK_NB) == 0) {
        scratch->lock = lock;
        return scratch;
    }
    *alive = lock >= 0 && errno == EWOULDBLOCK;
    if (lock >= 0) {
        close(lock);
    }
    scratch_free(scratch, false);
    return NULL;
}

struct scratch *scratch_next_dead(const char *parent, void *dir)
{
    const struct dirent *entry;

    while ((entry = readdir(dir)) != NULL) {
        struct scratch *scratch;
        char *path;
        bool alive;

        if (!is_scratch(entry->d_name) ||
            asprintf(&path, "%s/%s", parent, entry->d_name) < 0) {
            continue;
        }
        scratch = scratch_take_over(path, &alive);
        free(path);
        if (scratch != NULL) {
            return scratch;
        }
    }
    return NULL;
}

json_t *scratch_note(const struct scratch *scratch)
{
    struct stat st;
    json_t *note = NULL;
    char *text;
    ssize_t n;

    if (fstat(scratch->lock, &st) < 0 || !S_ISREG(st.st_mode) ||
        st.st_size <= 0 || (uint64_t)st.st_size > NOTE_MAX) {
        return NULL;
    }
    text = malloc((size_t)st.st_size);
    if (text != NULL) {
        n = pread(scratch->lock, text, (size_t)st.st_size, 0);
        note = n < 0 ? NULL : json_loadb(text, (size_t)n, 0, NULL);
    }
    free(text);
    return note;
}
