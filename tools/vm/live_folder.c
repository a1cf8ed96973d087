/* What a live restore has begun in a folder.
 *
 * The order: state.json, not ready; the disks; state.json, ready; then the
 * machine may start. So a disk that was ever given to a guest is in a folder
 * that is ready, and its absence is seen. state.json goes when all disks are
 * whole, and synced.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/live_folder.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "vm/stock_disks.h"

#define NAME ".lbvm-live"
#define STATE "state.json"
#define FORMAT "lbvm-live"
#define STATE_MAX ((size_t)1 << 20)
/* Seconds that QEMU waits for the server to come back, before a read of the
 * guest's fails. */
#define RECONNECT_DELAY 600

struct live_folder {
    char *path;    /* absolute */
    char *state_path;
    int dir;       /* locked */
    json_t *state; /* NULL: nothing was begun */
    char **disks;
    unsigned n_disks;
};

static int no_memory(struct qlb_error *err)
{
    return qlb_fail_errno(err, ENOMEM, "restoring");
}

/* ---- what was begun ---- */

static const char *text_of(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));

    return text == NULL ? "" : text;
}

static int damaged(const struct live_folder *live, struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged: does not tell of a live "
                    "restore", live->state_path);
}

static int take_disks(struct live_folder *live, struct qlb_error *err)
{
    const json_t *disks = json_object_get(live->state, "disks");
    const json_t *entry;
    size_t i;

    live->disks = calloc(json_array_size(disks) + 1, sizeof(*live->disks));
    if (live->disks == NULL) {
        return no_memory(err);
    }
    json_array_foreach(disks, i, entry) {
        if (json_string_value(entry) == NULL) {
            return damaged(live, err);
        }
        live->disks[i] = strdup(json_string_value(entry));
        if (live->disks[i] == NULL) {
            return no_memory(err);
        }
        live->n_disks++;
    }
    return live->n_disks == 0 ? damaged(live, err) : 0;
}

static int parse_state(struct live_folder *live, const char *text, size_t len,
                       struct qlb_error *err)
{
    live->state = json_loadb(text, len, JSON_REJECT_DUPLICATES, NULL);
    if (strcmp(text_of(live->state, "format"), FORMAT) != 0 ||
        *text_of(live->state, "machine") == '\0' ||
        *text_of(live->state, "id") == '\0' ||
        !json_is_boolean(json_object_get(live->state, "ready"))) {
        return damaged(live, err);
    }
    if (json_integer_value(json_object_get(live->state, "version")) != 1) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: is of another version of "
                        "lbvm", live->state_path);
    }
    return take_disks(live, err);
}

static int read_state(struct live_folder *live, struct qlb_error *err)
{
    int fd = openat(live->dir, STATE, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    char *text;
    ssize_t n;
    int ret;

    if (fd < 0) {
        return errno == ENOENT ? 0 : qlb_fail_errno(err, errno, "%s",
                                                    live->state_path);
    }
    text = malloc(STATE_MAX);
    n = text == NULL ? -1 : read(fd, text, STATE_MAX);
    ret = n < 0 ? qlb_fail_errno(err, errno, "%s", live->state_path)
                : parse_state(live, text, (size_t)n, err);
    free(text);
    close(fd);
    return ret;
}

/* ---- opening ---- */

static int lock_folder(struct live_folder *live, struct qlb_error *err)
{
    live->dir = open(live->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW |
                                 O_CLOEXEC);
    if (live->dir < 0) {
        return qlb_fail_errno(err, errno, "%s", live->path);
    }
    if (flock(live->dir, LOCK_EX | LOCK_NB) < 0) {
        return errno == EWOULDBLOCK
                   ? qlb_fail(err, QLB_E_BUSY, "%s: another lbvm serves the "
                              "disks of this folder", live->path)
                   : qlb_fail_errno(err, errno, "%s", live->path);
    }
    return 0;
}

static struct live_folder *folder_new(const char *folder,
                                      struct qlb_error *err)
{
    struct live_folder *live = calloc(1, sizeof(*live));
    char *real = realpath(folder, NULL);

    if (live == NULL || real == NULL) {
        qlb_fail_errno(err, errno, "%s", folder);
        free(live);
        free(real);
        return NULL;
    }
    live->dir = -1;
    if (asprintf(&live->path, "%s/" NAME, strcmp(real, "/") == 0 ? ""
                                                                 : real) < 0) {
        live->path = NULL;
    }
    if (live->path == NULL ||
        asprintf(&live->state_path, "%s/" STATE, live->path) < 0) {
        live->state_path = NULL;
        no_memory(err);
        live_folder_close(live);
        live = NULL;
    }
    free(real);
    return live;
}

int live_folder_open(const char *folder, bool make, struct live_folder **live,
                     struct qlb_error *err)
{
    struct stat st;

    *live = NULL;
    if (!make && stat(folder, &st) < 0 && errno == ENOENT) {
        return 0;
    }
    *live = folder_new(folder, err);
    if (*live == NULL) {
        return -1;
    }
    if (!make && lstat((*live)->path, &st) < 0 && errno == ENOENT) {
        live_folder_close(*live);
        *live = NULL;
        return 0;
    }
    if (make && mkdir((*live)->path, 0700) < 0 && errno != EEXIST) {
        qlb_fail_errno(err, errno, "%s", (*live)->path);
    } else if (lock_folder(*live, err) == 0 && read_state(*live, err) == 0) {
        return 0;
    }
    live_folder_close(*live);
    *live = NULL;
    return -1;
}

void live_folder_close(struct live_folder *live)
{
    if (live == NULL) {
        return;
    }
    if (live->dir >= 0) {
        close(live->dir);
    }
    for (unsigned i = 0; i < live->n_disks; i++) {
        free(live->disks[i]);
    }
    free(live->disks);
    json_decref(live->state);
    free(live->path);
    free(live->state_path);
    free(live);
}

const char *live_folder_path(const struct live_folder *live)
{
    return live->path;
}

const char *live_folder_machine(const struct live_folder *live)
{
    return live->state == NULL ? NULL : text_of(live->state, "machine");
}

const char *live_folder_id(const struct live_folder *live)
{
    return live->state == NULL ? NULL : text_of(live->state, "id");
}

char **live_folder_disks(const struct live_folder *live, unsigned *n)
{
    *n = live->n_disks;
    return live->disks;
}

bool live_folder_is_ready(const struct live_folder *live)
{
    return json_is_true(json_object_get(live->state, "ready"));
}

char *live_folder_socket(const struct live_folder *live, unsigned n)
{
    char *path;

    return asprintf(&path, "%s/%u", live->path, n) < 0 ? NULL : path;
}

/* ---- noting ---- */

static int write_whole(const char *path, const char *text,
                       struct qlb_error *err)
{
    struct qlb_outfile *out = qlb_outfile_create(path, QLB_OUTFILE_FORCE |
                                                 QLB_OUTFILE_PRIVATE, err);
    int ret = out == NULL ||
              qlb_outfile_write(out, text, strlen(text), err) < 0 ||
              qlb_outfile_commit(out, err) < 0 ? -1 : 0;

    qlb_outfile_close(out);
    return ret;
}

/* The folder's own name is to last, too. */
static int sync_parent(const struct live_folder *live, struct qlb_error *err)
{
    int fd = openat(live->dir, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int ret = fd < 0 || fsync(fd) < 0
                  ? qlb_fail_errno(err, errno, "%s", live->path) : 0;

    if (fd >= 0) {
        close(fd);
    }
    return ret;
}

int live_folder_note(struct live_folder *live, const char *machine,
                     const char *id, const char *const *disks, unsigned n,
                     bool ready, struct qlb_error *err)
{
    json_t *list = json_array();
    json_t *state = json_pack("{s:s, s:i, s:s, s:s, s:b}", "format", FORMAT,
                              "version", 1, "machine", machine, "id", id,
                              "ready", ready);
    char *text;
    int ret;

    for (unsigned i = 0; i < n; i++) {
        json_array_append_new(list, json_string(disks[i]));
    }
    json_object_set_new(state, "disks", list);
    text = json_dumps(state, JSON_INDENT(2));
    if (text == NULL) {
        ret = no_memory(err);
    } else {
        ret = write_whole(live->state_path, text, err);
    }
    free(text);
    json_decref(live->state);
    live->state = state;
    return ret < 0 ? -1 : sync_parent(live, err);
}

int live_folder_remove(struct live_folder *live, struct qlb_error *err)
{
    if (unlinkat(live->dir, STATE, 0) < 0 && errno != ENOENT) {
        return qlb_fail_errno(err, errno, "%s", live->state_path);
    }
    if (fsync(live->dir) < 0) {
        return qlb_fail_errno(err, errno, "%s", live->path);
    }
    rmdir(live->path); /* only if it is empty */
    return 0;
}

/* ---- the disks ---- */

/* For any QEMU from 4.2 on. */
static char *backing_name(const char *socket)
{
    json_t *json = json_pack("{s:s, s:{s:s, s:i, s:{s:s, s:s}}}",
                             "driver", "raw", "file", "driver", "nbd",
                             "reconnect-delay", RECONNECT_DELAY,
                             "server", "type", "unix", "path", socket);
    char *text = json_dumps(json, JSON_COMPACT);
    char *name;

    json_decref(json);
    if (text == NULL || asprintf(&name, "json:%s", text) < 0) {
        name = NULL;
    }
    free(text);
    return name;
}

/* QEMU asks for zeroes as slowly as it copies data, so it is spared those that
 * the archives' directories tell of: pages of 256 MiB. */
static int mark_zeroes(struct qlb_qcow2_writer *writer, uint64_t size,
                       struct qlb_chain *chain, struct qlb_error *err)
{
    uint64_t n_pages = (size + QLB_LBZ_PAGE - 1) / QLB_LBZ_PAGE;
    uint64_t found;

    for (uint64_t page = 0; page < n_pages; page = found + 1) {
        uint64_t start = page * QLB_LBZ_PAGE, end = size;

        if (qlb_chain_find_page(chain, page, &found, err) < 0) {
            return -1;
        }
        if (found < n_pages) {
            end = found * QLB_LBZ_PAGE;
        } else {
            found = n_pages;
        }
        if (end > start &&
            qlb_qcow2_writer_zero(writer, start,
                                  (end - start + QLB_LBZ_BLOCK - 1) /
                                      QLB_LBZ_BLOCK, err) < 0) {
            return -1;
        }
    }
    return 0;
}

/* The bitmap is one of those that lbvm keeps in images of a stock QEMU. What is
 * copied from the backing file is no change, to any QEMU. */
static int write_overlay(struct qlb_outfile *out, const char *backing,
                         struct qlb_chain *chain, struct qlb_error *err)
{
    const struct qlb_lbz_header *header = qlb_chain_header(chain);
    uint64_t size = header->virtual_size;
    char name[STOCK_NAME_SIZE];
    const struct qlb_qcow2_writer_bitmap bitmap = {
        .name = stock_bitmap_name(&header->uuid, name),
        .granularity_bits = 16,
    };
    struct qlb_qcow2_writer *writer = qlb_qcow2_writer_new(out, size, err);
    int ret;

    if (writer == NULL) {
        return -1;
    }
    qlb_qcow2_writer_set_backing(writer, backing, "raw");
    ret = mark_zeroes(writer, size, chain, err);
    if (ret == 0) {
        ret = qlb_qcow2_writer_finish(writer, size > 0 ? &bitmap : NULL, NULL,
                                      err);
    }
    qlb_qcow2_writer_free(writer);
    return ret;
}

int live_disk_make(const char *path, const char *socket,
                   struct qlb_chain *chain, struct qlb_error *err)
{
    char *backing = backing_name(socket);
    struct qlb_outfile *out;
    int ret;

    if (backing == NULL) {
        return no_memory(err);
    }
    out = qlb_outfile_create(path, QLB_OUTFILE_PRIVATE, err);
    ret = out == NULL || write_overlay(out, backing, chain, err) < 0 ||
          qlb_outfile_commit(out, err) < 0 ? -1 : 0;
    qlb_outfile_close(out);
    free(backing);
    return ret;
}

/* Whether a backing file's name, as backing_name makes it, has that socket. */
static bool has_socket(const char *name, const char *socket)
{
    json_t *json = strncmp(name, "json:", 5) == 0
                       ? json_loads(name + 5, 0, NULL) : NULL;
    const json_t *file = json_object_get(json, "file");
    bool same = strcmp(text_of(file, "driver"), "nbd") == 0 &&
                strcmp(text_of(json_object_get(file, "server"), "path"),
                       socket) == 0;

    json_decref(json);
    return same;
}

int live_disk_look(const char *path, const char *socket,
                   enum live_disk_state *state, struct qlb_error *err)
{
    struct qlb_disk *disk;
    const char *backing;
    struct stat st;
    int ret = 0;

    *state = LIVE_DISK_ABSENT;
    if (lstat(path, &st) < 0 && errno == ENOENT) {
        return 0;
    }
    disk = qlb_disk_open(path, QLB_DISK_NO_BACKING, err);
    if (disk == NULL) {
        return -1;
    }
    backing = qlb_disk_header(disk)->backing_name;
    *state = backing == NULL ? LIVE_DISK_WHOLE : LIVE_DISK_UNFINISHED;
    if (backing != NULL && !has_socket(backing, socket)) {
        ret = qlb_fail(err, QLB_E_RUNTIME, "%s: its backing file is '%s', and "
                       "not what is served here", path, backing);
    }
    qlb_disk_close(disk);
    return ret;
}

/* ---- the proof ---- */

static int find_hole(struct qlb_disk_reader *reader, uint64_t size,
                     uint64_t *offset, struct qlb_error *err)
{
    enum qlb_extent_type type;
    uint64_t run;

    for (*offset = 0; *offset < size; *offset += run) {
        if (qlb_disk_extent(reader, *offset, size - *offset, &type, &run,
                            err) < 0) {
            return -1;
        }
        if (type == QLB_EXTENT_UNALLOCATED) {
            return 1;
        }
    }
    return 0;
}

static int sync_file(const char *path, struct qlb_error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    int ret = fd < 0 || fsync(fd) < 0 ? qlb_fail_errno(err, errno, "%s", path)
                                      : 0;

    if (fd >= 0) {
        close(fd);
    }
    return ret;
}

int live_disk_prove(const char *path, uint64_t size, bool *whole,
                    uint64_t *offset, struct qlb_error *err)
{
    struct qlb_disk *disk = qlb_disk_open(path, QLB_DISK_NO_BACKING, err);
    struct qlb_disk_reader *reader = disk == NULL
                                         ? NULL
                                         : qlb_disk_reader_new(disk, err);
    int ret = -1;

    if (reader != NULL) {
        uint64_t now = qlb_disk_size(disk);

        ret = find_hole(reader, size < now ? size : now, offset, err);
    }
    qlb_disk_reader_free(reader);
    qlb_disk_close(disk);
    *whole = ret == 0;
    return ret < 0 ? -1 : sync_file(path, err);
}
