/* A disk of a backup as a file that can be read at once.
 *
 * nbdkit is nbdfuse's child, on a socket that has no name, and ends with it. So
 * the mount is all there is to be undone.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/backup_file.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "vm/command.h"
#include "vm/nbdkit_server.h"

#define FUSE_MAGIC 0x65735546
/* Seconds for nbdfuse to be there. */
enum { PATIENCE = 120 };

static const struct timespec nap = { .tv_nsec = 5 * 1000 * 1000 };

static char *path_of(const char *folder, const char *name, const char *end,
                     struct qlb_error *err)
{
    char *path;

    if (asprintf(&path, "%s/%s%s", folder, name, end) < 0) {
        qlb_fail_errno(err, ENOMEM, "%s", folder);
        return NULL;
    }
    return path;
}

char *backup_file_path(const char *folder, const char *name,
                       struct qlb_error *err)
{
    return path_of(folder, name, ".img", err);
}

/* Where what served it has died, the mount is there yet, and says so. */
static bool is_mounted(const char *path)
{
    struct statfs fs;

    return statfs(path, &fs) == 0 ? fs.f_type == FUSE_MAGIC
                                  : errno == ENOTCONN;
}

void backup_file_last_word(const char *folder, const char *name, char *text,
                           size_t size)
{
    struct qlb_error ignored;
    char *path = path_of(folder, name, ".log", &ignored);
    FILE *log = path == NULL ? NULL : fopen(path, "re");
    char line[1024];

    *text = '\0';
    while (log != NULL && fgets(line, sizeof(line), log) != NULL) {
        const char *what = strstr(line, "error: ");

        line[strcspn(line, "\n")] = '\0';
        /* what nbdfuse makes of it is of less use */
        if (what != NULL || *text == '\0') {
            snprintf(text, size, "%s", what == NULL ? line : what + 7);
        }
    }
    if (log != NULL) {
        fclose(log);
    }
    free(path);
}

/* ---- mounting ---- */

static int make_file(const char *path, int how, struct qlb_error *err)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW | how,
                  0600);

    return fd < 0 ? qlb_fail_errno(err, errno, "%s", path) : fd;
}

static void free_words(char **words)
{
    for (char **at = words; words != NULL && *at != NULL; at++) {
        free(*at);
    }
    free(words);
}

/* Absolute, since nbdkit has a folder of its own to be in. */
static char *archive_word(const char *archive)
{
    char *path = realpath(archive, NULL), *word;

    if (path == NULL || asprintf(&word, "file=%s", path) < 0) {
        word = NULL;
    }
    free(path);
    return word;
}

/* nbdfuse is read-only by itself where its server is. */
static char **make_words(const char *path, const struct qlb_chain *chain,
                         bool writable)
{
    char uuid[QLB_UUID_TEXT];
    const char *const fixed[] = {
        "nbdfuse", path, "[", "nbdkit", "--exit-with-parent",
        writable ? "--filter=cow" : "--readonly", nbdkit_server_plugin(),
    };
    enum { N_FIXED = sizeof(fixed) / sizeof(fixed[0]) };
    unsigned n = qlb_chain_members(chain), count = 0;
    char **words = calloc(N_FIXED + n + 3, sizeof(*words));
    bool bad = words == NULL;

    while (!bad && count < N_FIXED) {
        words[count] = strdup(fixed[count]);
        bad = words[count++] == NULL;
    }
    for (unsigned i = 0; !bad && i < n; i++) {
        words[count] = archive_word(
            qlb_lbz_reader_name(qlb_chain_member(chain, i)));
        bad = words[count++] == NULL;
    }
    if (!bad) {
        qlb_uuid_format(&qlb_chain_header(chain)->uuid, uuid);
        bad = asprintf(&words[count++], "at=%s", uuid) < 0 ||
              (words[count++] = strdup("]")) == NULL;
    }
    if (bad) {
        free_words(words);
        return NULL;
    }
    return words;
}

static int await(const char *folder, const char *name, const char *path,
                 pid_t pid, struct qlb_error *err)
{
    double deadline = tool_clock() + PATIENCE;
    char word[1024];
    int status;

    while (!is_mounted(path)) {
        if (waitpid(pid, &status, WNOHANG) == pid) {
            backup_file_last_word(folder, name, word, sizeof(word));
            return qlb_fail(err, QLB_E_RUNTIME, "%s: can't be shown: %s",
                            path, *word == '\0' ? "nbdfuse has ended" : word);
        }
        if (tool_stop || tool_clock() > deadline) {
            kill(pid, SIGTERM);
            waitpid(pid, &status, 0);
            return qlb_fail(err, QLB_E_RUNTIME, "%s: %s", path,
                            tool_stop ? "interrupted"
                                      : "nbdfuse does not get ready");
        }
        nanosleep(&nap, NULL);
    }
    return 0;
}

static int show(const char *folder, const char *name, const char *path,
                const struct qlb_chain *chain, bool writable, int log,
                pid_t *pid, struct qlb_error *err)
{
    char **words = make_words(path, chain, writable);
    int ret = -1;

    if (words == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", path);
    }
    *pid = command_start((const char *const *)words, log, log, true, err);
    if (*pid >= 0) {
        ret = await(folder, name, path, *pid, err);
    }
    free_words(words);
    return ret;
}

int backup_file_mount(const char *folder, const char *name,
                      const struct qlb_chain *chain, bool writable,
                      pid_t *pid, struct qlb_error *err)
{
    char *path = backup_file_path(folder, name, err);
    char *log_path = path_of(folder, name, ".log", err);
    int file = -1, log = -1, ret = -1;
    pid_t own;

    if (path != NULL && log_path != NULL &&
        (log = make_file(log_path, O_APPEND, err)) >= 0 &&
        (file = make_file(path, O_EXCL, err)) >= 0) {
        ret = show(folder, name, path, chain, writable, log,
                   pid == NULL ? &own : pid, err);
    }
    if (file >= 0) {
        close(file);
    }
    if (log >= 0) {
        close(log);
    }
    if (ret < 0 && file >= 0) {
        unlink(path);
        unlink(log_path);
    }
    free(path);
    free(log_path);
    return ret;
}

/* ---- and back ---- */

/* Who is not root has fusermount3 do it. */
static int unmount(const char *path, struct qlb_error *err)
{
    const char *const words[] = { "fusermount3", "-u", path, NULL };
    size_t len;
    char *text;
    int said, status;

    if (umount2(path, UMOUNT_NOFOLLOW) == 0) {
        return 0;
    }
    if (errno == EBUSY) {
        return qlb_fail(err, QLB_E_BUSY, "%s: is being read", path);
    }
    said = command_scratch(err);
    if (said < 0 || command_run(words, said, said, &status, err) < 0) {
        return -1;
    }
    text = command_text(said, &len, err);
    close(said);
    if (text == NULL) {
        return -1;
    }
    text[strcspn(text, "\n")] = '\0';
    status = !is_mounted(path) ? 0
             : qlb_fail(err, strstr(text, "busy") != NULL ? QLB_E_BUSY
                                                          : QLB_E_RUNTIME,
                        "%s: %s", path, text);
    free(text);
    return status;
}

/* What was below the mount: ours is empty, and has a log beside it. */
static int remove_below(const char *path, const char *log,
                        struct qlb_error *err)
{
    struct stat st;

    if (lstat(path, &st) < 0 || !S_ISREG(st.st_mode) || st.st_size > 0 ||
        access(log, F_OK) < 0) {
        return 0;
    }
    if (unlink(path) < 0) {
        return qlb_fail_errno(err, errno, "%s", path);
    }
    return unlink(log) < 0 ? qlb_fail_errno(err, errno, "%s", log) : 1;
}

int backup_file_unmount(const char *folder, const char *name,
                        struct qlb_error *err)
{
    char *path = backup_file_path(folder, name, err);
    char *log = path_of(folder, name, ".log", err);
    int ret = path == NULL || log == NULL ? -1 : 0;

    while (ret == 0 && is_mounted(path)) {
        ret = unmount(path, err);
    }
    if (ret == 0) {
        ret = remove_below(path, log, err);
    }
    free(path);
    free(log);
    return ret;
}
