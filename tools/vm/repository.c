/* A repository of backups in a folder (docs/repository.md).
 *
 * What no manifest names is deleted by machine_sweep alone, and only where all
 * manifests of the machine could be read: a manifest that is damaged, or a
 * folder that can't be listed, stops it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/repository.h"

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

enum { MAX_NAME = 100, MAX_DISK_NAME = 60 };

#define MAX_JSON (UINT64_C(64) << 20)

static const char name_characters[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";

struct repository {
    char *path;
    char *label;
};

struct machine {
    const struct repository *repository;
    char *name;
    char *path;
    struct manifest **backups;
    unsigned n_backups;
    const struct manifest_disk **archives; /* by image and checkpoint */
    unsigned n_archives;
    bool loaded;
    bool may_sweep;            /* MACHINE_BACKUP or MACHINE_PRUNE is held */
    bool alone;                /* MACHINE_PRUNE is held */
    int lock_fd, backup_lock_fd; /* -1: not open */
};

static const char *const folders[] = { "backups", "archives", "definitions" };

enum { N_FOLDERS = sizeof(folders) / sizeof(folders[0]) };

/* ---- files ---- */

static char *join(const char *folder, const char *name)
{
    char *path;

    return asprintf(&path, "%s/%s", folder, name) < 0 ? NULL : path;
}

static int no_memory(const char *what, struct qlb_error *err)
{
    return qlb_fail_errno(err, ENOMEM, "%s", what);
}

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
    char *parent = join(path, "..");
    int ret = parent == NULL ? no_memory(path, err)
                             : sync_folder(parent, err);

    free(parent);
    return ret;
}

/* One that is there already is as good. */
static int make_folder(const char *path, mode_t mode, struct qlb_error *err)
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

/* "." and what a killed process leaves of a file that is written. */
static bool is_temporary(const char *name)
{
    size_t len = strlen(name);

    return name[0] == '.' && len > 12 && name[len - 11] == '.' &&
           strcmp(name + len - 4, ".tmp") == 0;
}

static bool has_suffix(const char *name, const char *suffix)
{
    size_t len = strlen(name), n = strlen(suffix);

    return len > n && strcmp(name + len - n, suffix) == 0;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void free_names(char **names, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        free(names[i]);
    }
    free(names);
}

static int add_name(char ***names, unsigned *n, const char *name)
{
    char **larger = realloc(*names, (*n + 1) * sizeof(*larger));

    if (larger == NULL) {
        return -1;
    }
    *names = larger;
    larger[*n] = strdup(name);
    if (larger[*n] == NULL) {
        return -1;
    }
    ++*n;
    return 0;
}

/* All names in a folder but "." and "..", ascending. */
static int list_folder(const char *path, char ***names, unsigned *n,
                       struct qlb_error *err)
{
    DIR *dir = opendir(path);
    struct dirent *entry;
    int reason = 0;

    *names = NULL;
    *n = 0;
    if (dir == NULL) {
        return qlb_fail_errno(err, errno, "%s", path);
    }
    while (reason == 0 && (errno = 0, entry = readdir(dir)) != NULL) {
        if (strcmp(entry->d_name, ".") != 0 &&
            strcmp(entry->d_name, "..") != 0 &&
            add_name(names, n, entry->d_name) < 0) {
            reason = ENOMEM;
        }
    }
    if (reason == 0) {
        reason = errno;
    }
    closedir(dir);
    if (reason != 0) {
        free_names(*names, *n);
        *names = NULL;
        *n = 0;
        return qlb_fail_errno(err, reason, "%s", path);
    }
    if (*n > 0) {
        qsort(*names, *n, sizeof(**names), compare_names);
    }
    return 0;
}

static int write_whole(const char *path, unsigned flags, const void *data,
                       size_t len, struct qlb_error *err)
{
    struct qlb_outfile *out = qlb_outfile_create(path, flags, err);
    int ret = -1;

    if (out != NULL && qlb_outfile_write(out, data, len, err) == 0) {
        ret = qlb_outfile_commit(out, err);
    }
    qlb_outfile_close(out);
    return ret;
}

static int write_json(const char *path, unsigned flags, const json_t *json,
                      struct qlb_error *err)
{
    char *text = json_dumps(json, JSON_INDENT(2) | JSON_PRESERVE_ORDER);
    size_t len;
    int ret;

    if (text == NULL) {
        return no_memory(path, err);
    }
    len = strlen(text);
    text[len] = '\n'; /* in the place of the zero byte */
    ret = write_whole(path, flags, text, len + 1, err);
    free(text);
    return ret;
}

/* 1; 0 where there is no such file; -1. */
static int read_json(const char *path, json_t **json, struct qlb_error *err)
{
    FILE *file = fopen(path, "re");
    json_error_t reason;
    struct stat st;

    if (file == NULL) {
        return errno == ENOENT ? 0 : qlb_fail_errno(err, errno, "%s", path);
    }
    if (fstat(fileno(file), &st) < 0 || !S_ISREG(st.st_mode) ||
        (uint64_t)st.st_size > MAX_JSON) {
        fclose(file);
        return qlb_fail(err, QLB_E_DAMAGED, "%s: is no file, or too large",
                        path);
    }
    *json = json_loadf(file, JSON_REJECT_DUPLICATES, &reason);
    if (*json == NULL && ferror(file)) {
        fclose(file);
        return qlb_fail_errno(err, EIO, "%s: reading", path);
    }
    fclose(file);
    if (*json == NULL) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: is no JSON: line %d: %.200s",
                        path, reason.line, reason.text);
    }
    return 1;
}

/* ---- the repository ---- */

/* What a file system, or an attempt that was killed, leaves in a new folder. */
static bool counts_as_content(const char *name)
{
    return !is_temporary(name) && strcmp(name, "lost+found") != 0;
}

static int check_empty(const char *path, struct qlb_error *err)
{
    char **names;
    unsigned n;
    int ret = 0;

    if (list_folder(path, &names, &n, err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < n && ret == 0; i++) {
        if (counts_as_content(names[i])) {
            ret = qlb_fail(err, QLB_E_USAGE, "%s: is no repository, and not "
                           "empty: a new one wants a folder of its own",
                           path);
        }
    }
    free_names(names, n);
    return ret;
}

/* file: the path of repository.json. */
static int make_repository(const char *path, const char *file,
                           const char *label, struct qlb_error *err)
{
    struct qlb_uuid uuid = tool_random_uuid();
    char text[QLB_UUID_TEXT], own[32];
    json_t *json;
    int ret;

    qlb_uuid_format(&uuid, text);
    snprintf(own, sizeof(own), "lbvm-%.8s", text);
    if (make_folder(path, 0700, err) < 0 || check_empty(path, err) < 0) {
        return -1;
    }
    json = json_object();
    json_object_set_new(json, "format", json_string("lbvm-repository"));
    json_object_set_new(json, "version", json_integer(1));
    json_object_set_new(json, "uuid", json_string(text));
    json_object_set_new(json, "label",
                        json_string(label != NULL ? label : own));
    ret = write_json(file, 0, json, err);
    json_decref(json);
    return ret;
}

static int check_repository(const char *file, const json_t *json,
                            struct qlb_error *err)
{
    const char *format = json_string_value(json_object_get(json, "format"));
    const char *label = json_string_value(json_object_get(json, "label"));
    const char *uuid = json_string_value(json_object_get(json, "uuid"));
    const json_t *version = json_object_get(json, "version");
    struct qlb_uuid value;

    if (format == NULL || strcmp(format, "lbvm-repository") != 0 ||
        !json_is_integer(version)) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: does not describe a "
                        "repository", file);
    }
    if (json_integer_value(version) != 1) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: version %lld is not known "
                        "here; a newer lbvm may read it", file,
                        (long long)json_integer_value(version));
    }
    if (label == NULL || !qlb_label_valid(label)) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: 'label' is no chain label",
                        file);
    }
    if (uuid == NULL || !qlb_uuid_parse(uuid, &value)) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: 'uuid' is no UUID", file);
    }
    return 0;
}

/* Reads repository.json, after making it where that is asked for. */
static int load_repository(struct repository *repository, const char *file,
                           bool create, const char *label,
                           struct qlb_error *err)
{
    json_t *json = NULL;
    int ret = read_json(file, &json, err);

    if (ret == 0 && create) {
        if (make_repository(repository->path, file, label, err) < 0 &&
            access(file, F_OK) < 0) {
            return -1; /* and nobody else has made it at the same time */
        }
        ret = read_json(file, &json, err);
    }
    if (ret == 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: is no repository: it has no "
                        "repository.json", repository->path);
    }
    if (ret < 0) {
        return -1;
    }
    ret = check_repository(file, json, err);
    if (ret == 0) {
        repository->label =
            strdup(json_string_value(json_object_get(json, "label")));
        ret = repository->label == NULL ? no_memory(file, err) : 0;
    }
    json_decref(json);
    return ret;
}

struct repository *repository_open(const char *path, bool create,
                                   const char *label, struct qlb_error *err)
{
    struct repository *repository;
    char *file;
    int ret;

    if (label != NULL && !qlb_label_valid(label)) {
        qlb_fail(err, QLB_E_USAGE, "'%s' is no chain label: 1 to %u of the "
                 "characters A-Z a-z 0-9 . _ -", label, QLB_LABEL_MAX);
        return NULL;
    }
    repository = calloc(1, sizeof(*repository));
    file = join(path, "repository.json");
    if (repository == NULL || file == NULL ||
        (repository->path = strdup(path)) == NULL) {
        ret = no_memory(path, err);
    } else {
        ret = load_repository(repository, file, create, label, err);
    }
    if (ret == 0 && label != NULL && strcmp(repository->label, label) != 0) {
        ret = qlb_fail(err, QLB_E_USAGE, "%s: the repository has the chain "
                       "label '%s', which can't become '%s'", path,
                       repository->label, label);
    }
    free(file);
    if (ret < 0) {
        repository_close(repository);
        return NULL;
    }
    return repository;
}

void repository_close(struct repository *repository)
{
    if (repository != NULL) {
        free(repository->path);
        free(repository->label);
        free(repository);
    }
}

const char *repository_path(const struct repository *repository)
{
    return repository->path;
}

const char *repository_label(const struct repository *repository)
{
    return repository->label;
}

bool machine_name_valid(const char *name)
{
    size_t len = strlen(name);

    return len >= 1 && len <= MAX_NAME && name[0] != '.' && name[0] != '-' &&
           strspn(name, name_characters) == len;
}

static bool is_machine(const struct repository *repository, const char *name)
{
    struct stat st;
    char *path;
    bool found;

    if (!machine_name_valid(name) ||
        asprintf(&path, "%s/%s/backups", repository->path, name) < 0) {
        return false;
    }
    found = stat(path, &st) == 0 && S_ISDIR(st.st_mode);
    free(path);
    return found;
}

int repository_machines(const struct repository *repository, char ***names,
                        unsigned *n, struct qlb_error *err)
{
    unsigned all, kept = 0;

    *n = 0;
    if (list_folder(repository->path, names, &all, err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < all; i++) {
        if (is_machine(repository, (*names)[i])) {
            (*names)[kept++] = (*names)[i];
        } else {
            free((*names)[i]);
        }
    }
    *n = kept;
    return 0;
}

/* ---- a machine ---- */

static int make_lock(const struct machine *machine, const char *name,
                     struct qlb_error *err)
{
    char *path = join(machine->path, name);
    int fd, ret = 0;

    if (path == NULL) {
        return no_memory(machine->path, err);
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

/* The locks too: who may only read finds them. */
static int make_machine(const struct machine *machine, struct qlb_error *err)
{
    int ret = make_folder(machine->path, 0777, err);

    if (ret == 0 && (make_lock(machine, "lock", err) < 0 ||
                     make_lock(machine, "backup.lock", err) < 0)) {
        ret = -1;
    }

    for (unsigned i = 0; i < N_FOLDERS && ret == 0; i++) {
        /* "backups" comes last: it is what makes it a machine */
        char *path = join(machine->path, folders[N_FOLDERS - 1 - i]);

        ret = path == NULL ? no_memory(machine->path, err)
                           : make_folder(path, 0777, err);
        free(path);
    }
    return ret;
}

struct machine *machine_open(const struct repository *repository,
                             const char *name, bool create,
                             struct qlb_error *err)
{
    struct machine *machine;
    int ret = 0;

    if (!machine_name_valid(name)) {
        qlb_fail(err, QLB_E_USAGE, "'%s' is no name of a machine: 1 to %d of "
                 "the characters A-Z a-z 0-9 . _ -, first neither . nor -",
                 name, MAX_NAME);
        return NULL;
    }
    machine = calloc(1, sizeof(*machine));
    if (machine == NULL) {
        no_memory(name, err);
        return NULL;
    }
    machine->repository = repository;
    machine->lock_fd = machine->backup_lock_fd = -1;
    machine->name = strdup(name);
    machine->path = join(repository->path, name);
    if (machine->name == NULL || machine->path == NULL) {
        ret = no_memory(name, err);
    } else if (create) {
        ret = make_machine(machine, err);
    } else if (!is_machine(repository, name)) {
        ret = qlb_fail(err, QLB_E_RUNTIME, "%s: has no backups of a machine "
                       "'%s'", repository->path, name);
    }
    if (ret < 0) {
        machine_close(machine);
        return NULL;
    }
    return machine;
}

static void unload(struct machine *machine)
{
    for (unsigned i = 0; i < machine->n_backups; i++) {
        manifest_free(machine->backups[i]);
    }
    free(machine->backups);
    free(machine->archives);
    machine->backups = NULL;
    machine->archives = NULL;
    machine->n_backups = machine->n_archives = 0;
    machine->loaded = false;
}

void machine_close(struct machine *machine)
{
    if (machine == NULL) {
        return;
    }
    unload(machine);
    if (machine->lock_fd >= 0) {
        close(machine->lock_fd);
    }
    if (machine->backup_lock_fd >= 0) {
        close(machine->backup_lock_fd);
    }
    free(machine->name);
    free(machine->path);
    free(machine);
}

const char *machine_name(const struct machine *machine)
{
    return machine->name;
}

const struct repository *machine_repository(const struct machine *machine)
{
    return machine->repository;
}

char *machine_object_path(const struct machine *machine, const char *object)
{
    return join(machine->path, object);
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

static int open_lock(const struct machine *machine, const char *name,
                     bool exclusive, int *fd, struct qlb_error *err)
{
    /* NFS wants a file that may be written for an exclusive lock. */
    int flags = (exclusive ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NOFOLLOW;
    char *path;

    if (*fd >= 0) {
        close(*fd); /* and with it goes what was held */
        *fd = -1;
    }
    path = join(machine->path, name);
    if (path == NULL) {
        return no_memory(machine->path, err);
    }
    *fd = open(path, flags);
    if (*fd < 0 && errno == ENOENT) {
        *fd = open(path, flags | O_CREAT, 0666);
    }
    if (*fd < 0) {
        qlb_fail_errno(err, errno, "%s", path);
    }
    free(path); /* keeps errno */
    return *fd < 0 ? -1 : 0;
}

/* who: is in the way where the lock can't be had. */
static int take_lock(struct machine *machine, const char *name,
                     bool exclusive, const char *who, int *fd,
                     struct qlb_error *err)
{
    char process[48] = "";
    long holder;

    if (open_lock(machine, name, exclusive, fd, err) < 0) {
        /* Where there is none and none can be made, nobody prunes. */
        return !exclusive && errno == EROFS ? 0 : -1;
    }
    if (flock(*fd, (exclusive ? LOCK_EX : LOCK_SH) | LOCK_NB) == 0) {
        return 0;
    }
    if (errno != EWOULDBLOCK) {
        return qlb_fail_errno(err, errno, "%s: locking '%s'", machine->path,
                              name);
    }
    holder = find_holder(*fd);
    if (holder > 0) {
        snprintf(process, sizeof(process), " (process %ld)", holder);
    }
    return qlb_fail(err, QLB_E_BUSY, "%s: %s%s; try again when that has "
                    "ended", machine->path, who, process);
}

int machine_lock(struct machine *machine, enum machine_lock lock,
                 struct qlb_error *err)
{
    static const char adding[] = "a backup or a pruning of it is at work";
    static const char reading[] = "its archives are being read by another "
                                  "lbvm";
    static const char pruning[] = "a pruning of it is at work";

    if (lock != MACHINE_READ) {
        machine->may_sweep = false;
        if (take_lock(machine, "backup.lock", true, adding,
                      &machine->backup_lock_fd, err) < 0) {
            return -1;
        }
        machine->may_sweep = true;
    }
    if (lock != MACHINE_BACKUP) {
        machine->alone = false;
        if (take_lock(machine, "lock", lock == MACHINE_PRUNE,
                      lock == MACHINE_PRUNE ? reading : pruning,
                      &machine->lock_fd, err) < 0) {
            return -1;
        }
        machine->alone = lock == MACHINE_PRUNE;
    }
    return 0;
}

/* ---- what the manifests tell ---- */

static int check_place(const struct machine *machine, const char *name,
                       const struct manifest *manifest,
                       struct qlb_error *err)
{
    size_t len = strlen(manifest->id);

    if (strncmp(name, manifest->id, len) != 0 ||
        strcmp(name + len, ".json") != 0) {
        return qlb_fail(err, QLB_E_DAMAGED, "'id' is '%s', which the file's "
                        "name is not", manifest->id);
    }
    if (strcmp(manifest->machine, machine->name) != 0) {
        return qlb_fail(err, QLB_E_DAMAGED, "'machine' is '%.100s', which "
                        "the folder's name is not", manifest->machine);
    }
    return 0;
}

/* One that was deleted since the folder was listed is passed over. */
static int load_manifest(struct machine *machine, const char *path,
                         const char *name, struct qlb_error *err)
{
    struct manifest *manifest;
    json_t *json = NULL;
    int ret = read_json(path, &json, err);

    if (ret <= 0) {
        return ret;
    }
    manifest = manifest_from_json(json, err);
    json_decref(json);
    if (manifest == NULL || check_place(machine, name, manifest, err) < 0) {
        manifest_free(manifest);
        return qlb_error_prefix(err, "%s", path);
    }
    machine->backups[machine->n_backups++] = manifest;
    machine->n_archives += manifest->n_disks;
    return 0;
}

static int compare_backups(const void *a, const void *b)
{
    const struct manifest *x = *(struct manifest *const *)a;
    const struct manifest *y = *(struct manifest *const *)b;

    if (x->sequence != y->sequence) {
        return x->sequence < y->sequence ? -1 : 1;
    }
    return strcmp(x->id, y->id);
}

static int compare_keys(const void *a, const void *b)
{
    const struct manifest_disk *x = *(const struct manifest_disk *const *)a;
    const struct manifest_disk *y = *(const struct manifest_disk *const *)b;
    int order = memcmp(&x->image, &y->image, sizeof(x->image));

    return order != 0 ? order
                      : memcmp(&x->checkpoint, &y->checkpoint,
                               sizeof(x->checkpoint));
}

static int index_archives(struct machine *machine, struct qlb_error *err)
{
    const struct manifest_disk **keys = calloc(machine->n_archives + 1,
                                               sizeof(*keys));
    unsigned n = 0;

    if (keys == NULL) {
        return no_memory(machine->path, err);
    }
    for (unsigned i = 0; i < machine->n_backups; i++) {
        for (unsigned j = 0; j < machine->backups[i]->n_disks; j++) {
            keys[n++] = &machine->backups[i]->disks[j];
        }
    }
    qsort(keys, n, sizeof(*keys), compare_keys);
    machine->archives = keys;
    for (unsigned i = 1; i < n; i++) {
        if (compare_keys(&keys[i - 1], &keys[i]) == 0) {
            return qlb_fail(err, QLB_E_DAMAGED, "%s: %s and %s have the same "
                            "checkpoint", machine->path,
                            keys[i - 1]->archive, keys[i]->archive);
        }
    }
    return 0;
}

static int compare_objects(const void *a, const void *b)
{
    const struct manifest_disk *x = *(const struct manifest_disk *const *)a;
    const struct manifest_disk *y = *(const struct manifest_disk *const *)b;

    return strcmp(x->archive, y->archive);
}

/* An archive that is of two checkpoints can be of one at the most, and pruning
 * one would take it from the other. */
static int check_objects(const struct machine *machine, struct qlb_error *err)
{
    unsigned n = machine->n_archives;
    const struct manifest_disk **disks = calloc(n + 1, sizeof(*disks));
    int ret = 0;

    if (disks == NULL) {
        return no_memory(machine->path, err);
    }
    if (n > 0) {
        memcpy(disks, machine->archives, n * sizeof(*disks));
        qsort(disks, n, sizeof(*disks), compare_objects);
    }
    for (unsigned i = 1; i < n && ret == 0; i++) {
        if (compare_objects(&disks[i - 1], &disks[i]) == 0) {
            ret = qlb_fail(err, QLB_E_DAMAGED, "%s: two backups or disks "
                           "name %s as theirs", machine->path,
                           disks[i]->archive);
        }
    }
    free(disks);
    return ret;
}

int machine_load(struct machine *machine, struct qlb_error *err)
{
    char *folder = join(machine->path, "backups");
    char **names = NULL;
    unsigned n = 0;
    int ret;

    unload(machine);
    ret = folder == NULL ? no_memory(machine->path, err)
                         : list_folder(folder, &names, &n, err);
    machine->backups = calloc(n + 1, sizeof(*machine->backups));
    if (ret == 0 && machine->backups == NULL) {
        ret = no_memory(machine->path, err);
    }
    for (unsigned i = 0; i < n && ret == 0; i++) {
        /* One that is written anew just now may be listed twice. */
        if (names[i][0] != '.' && has_suffix(names[i], ".json") &&
            (i == 0 || strcmp(names[i - 1], names[i]) != 0)) {
            char *path = join(folder, names[i]);

            ret = path == NULL ? no_memory(folder, err)
                               : load_manifest(machine, path, names[i], err);
            free(path);
        }
    }
    free_names(names, n);
    free(folder);
    if (ret == 0) {
        qsort(machine->backups, machine->n_backups,
              sizeof(*machine->backups), compare_backups);
        ret = index_archives(machine, err);
    }
    if (ret == 0) {
        ret = check_objects(machine, err);
    }
    machine->loaded = ret == 0;
    if (ret < 0) {
        unload(machine);
    }
    return ret;
}

unsigned machine_n_backups(const struct machine *machine)
{
    return machine->n_backups;
}

struct manifest *machine_backup(const struct machine *machine, unsigned i)
{
    return machine->backups[i];
}

static struct manifest *find_newest(const struct machine *machine,
                                    uint64_t time)
{
    for (unsigned i = machine->n_backups; i-- > 0;) {
        struct manifest *manifest = machine->backups[i];

        if (manifest->kept_for == NULL && manifest->time <= time) {
            return manifest;
        }
    }
    return NULL;
}

static struct manifest *no_backup(const struct machine *machine,
                                  struct qlb_error *err)
{
    qlb_fail(err, QLB_E_RUNTIME, "%s: has no backup", machine->path);
    return NULL;
}

struct manifest *machine_find(const struct machine *machine, const char *id,
                              struct qlb_error *err)
{
    struct manifest *found = NULL;

    if (strcmp(id, "latest") == 0) {
        found = find_newest(machine, UINT64_MAX);
        return found != NULL ? found : no_backup(machine, err);
    }
    for (unsigned i = 0; i < machine->n_backups; i++) {
        struct manifest *manifest = machine->backups[i];

        if (*id == '\0' || manifest->kept_for != NULL ||
            strncmp(manifest->id, id, strlen(id)) != 0) {
            continue;
        }
        if (found != NULL) {
            qlb_fail(err, QLB_E_RUNTIME, "%s: several backups begin with "
                     "'%s': %s, %s", machine->path, id, found->id,
                     manifest->id);
            return NULL;
        }
        found = manifest;
    }
    if (found == NULL) {
        qlb_fail(err, QLB_E_RUNTIME, "%s: has no backup '%s'; 'lbvm list' "
                 "shows them", machine->path, id);
    }
    return found;
}

struct manifest *machine_find_at(const struct machine *machine, uint64_t time,
                                 struct qlb_error *err)
{
    struct manifest *found = find_newest(machine, time);
    char text[32];

    if (found == NULL && find_newest(machine, UINT64_MAX) == NULL) {
        return no_backup(machine, err);
    }
    if (found == NULL) {
        qlb_fail(err, QLB_E_RUNTIME, "%s: has no backup of %s or before it",
                 machine->path, tool_format_time(time, text));
    }
    return found;
}

const struct manifest_disk *
machine_find_archive(const struct machine *machine,
                     const struct qlb_uuid *image,
                     const struct qlb_uuid *checkpoint)
{
    const struct manifest_disk wanted = {
        .image = *image, .checkpoint = *checkpoint,
    };
    const struct manifest_disk *key = &wanted, **found = NULL;

    if (machine->n_archives > 0) {
        found = bsearch(&key, machine->archives, machine->n_archives,
                        sizeof(key), compare_keys);
    }
    return found == NULL ? NULL : *found;
}

static int no_link(const struct machine *machine,
                   const struct manifest_disk *disk,
                   const struct manifest_disk *child,
                   const struct qlb_uuid *missing, struct qlb_error *err)
{
    char text[QLB_UUID_TEXT];

    return qlb_fail(err, QLB_E_UNTRUSTED, "%s: disk '%s': the chain is "
                    "broken: the parent %s of %s is in no backup",
                    machine->path, disk->name,
                    qlb_uuid_format(missing, text), child->archive);
}

/* Puts the path of the disk's archive at the end. */
static int add_link(const struct machine *machine,
                    const struct manifest_disk *disk, char ***paths,
                    unsigned *n, struct qlb_error *err)
{
    char *path = machine_object_path(machine, disk->archive);
    int ret = 0;

    if (path == NULL || add_name(paths, n, path) < 0) {
        ret = no_memory(machine->path, err);
    } else if (access(path, F_OK) < 0 && errno == ENOENT) {
        ret = qlb_fail(err, QLB_E_UNTRUSTED, "%s: is missing: the chain of "
                       "disk '%s' is broken", path, disk->name);
    }
    free(path);
    return ret;
}

static void reverse(char **paths, unsigned n)
{
    for (unsigned i = 0; i < n / 2; i++) {
        char *path = paths[i];

        paths[i] = paths[n - 1 - i];
        paths[n - 1 - i] = path;
    }
}

int machine_chain(const struct machine *machine,
                  const struct manifest_disk *disk, char ***paths,
                  unsigned *n, struct qlb_error *err)
{
    const struct manifest_disk *at = disk;
    int ret;

    *paths = NULL;
    *n = 0;
    ret = add_link(machine, at, paths, n, err);
    while (ret == 0 && !qlb_uuid_is_zero(&at->parent)) {
        const struct manifest_disk *parent =
            machine_find_archive(machine, &at->image, &at->parent);

        if (parent == NULL) {
            ret = no_link(machine, disk, at, &at->parent, err);
        } else if (strcmp(parent->digest, at->digest) != 0) {
            ret = qlb_fail(err, QLB_E_UNTRUSTED, "%s: disk '%s': %s has "
                           "another digest than its parent, and can't be "
                           "read together with it", machine->path, disk->name,
                           at->archive);
        } else if (*n > machine->n_archives) {
            ret = qlb_fail(err, QLB_E_DAMAGED, "%s: disk '%s': the parents "
                           "of its archives run in a circle", machine->path,
                           disk->name);
        } else {
            at = parent;
            ret = add_link(machine, at, paths, n, err);
        }
    }
    if (ret < 0) {
        free_names(*paths, *n);
        *paths = NULL;
        *n = 0;
        return -1;
    }
    reverse(*paths, *n);
    return 0;
}

/* ---- objects ---- */

/* 1: no object has that name; 0; -1. */
static int is_free(const struct machine *machine, const char *object,
                   struct qlb_error *err)
{
    char *path = machine_object_path(machine, object);
    struct stat st;
    int ret = 0;

    if (path == NULL) {
        return no_memory(machine->path, err);
    }
    if (lstat(path, &st) < 0) {
        ret = errno == ENOENT ? 1 : qlb_fail_errno(err, errno, "%s", path);
    }
    free(path);
    return ret;
}

char *machine_archive_object(const struct machine *machine, const char *disk,
                             const struct qlb_uuid *checkpoint,
                             struct qlb_error *err)
{
    char name[MAX_DISK_NAME + 1], uuid[QLB_UUID_TEXT];
    char *object;
    int ret = 0;

    snprintf(name, sizeof(name), "%s", disk);
    for (char *c = name; *c != '\0'; c++) {
        if (strchr(name_characters, *c) == NULL ||
            (c == name && (*c == '.' || *c == '-'))) {
            *c = '_';
        }
    }
    qlb_uuid_format(checkpoint, uuid);
    for (unsigned n = 0; ret == 0; n++) {
        if (asprintf(&object, "archives/%s.%s-%u.lbz", name, uuid, n) < 0) {
            no_memory(machine->path, err);
            return NULL;
        }
        ret = is_free(machine, object, err);
        if (ret <= 0) {
            free(object);
        }
    }
    return ret > 0 ? object : NULL;
}

int machine_put(struct machine *machine, const char *object, const void *data,
                size_t len, struct qlb_error *err)
{
    char *path = machine_object_path(machine, object);
    int ret = path == NULL ? no_memory(machine->path, err)
                           : write_whole(path, QLB_OUTFILE_FORCE, data, len,
                                         err);

    free(path);
    return ret;
}

int machine_put_manifest(struct machine *machine,
                         const struct manifest *manifest,
                         struct qlb_error *err)
{
    char object[MANIFEST_ID_SIZE + 16];
    json_t *json = manifest_to_json(manifest);
    struct manifest *readable = manifest_from_json(json, err);
    char *path;
    int ret = -1;

    snprintf(object, sizeof(object), "backups/%s.json", manifest->id);
    path = machine_object_path(machine, object);
    if (path == NULL) {
        no_memory(machine->path, err);
    } else if (readable == NULL) {
        /* Nobody could read it again, and nothing be backed up after it. */
        qlb_error_prefix(err, "%s: can't be written", path);
    } else {
        ret = write_json(path, QLB_OUTFILE_FORCE, json, err);
    }
    manifest_free(readable);
    json_decref(json);
    free(path);
    return ret;
}

int machine_delete(struct machine *machine, const char *object,
                   struct qlb_error *err)
{
    char *path = machine_object_path(machine, object);
    char *slash;
    int ret = 0;

    if (path == NULL) {
        return no_memory(machine->path, err);
    }
    if (unlink(path) < 0 && errno != ENOENT) {
        ret = qlb_fail_errno(err, errno, "%s: deleting", path);
    } else {
        slash = strrchr(path, '/');
        *slash = '\0';
        ret = sync_folder(path, err);
    }
    free(path);
    return ret;
}

/* ---- leftovers ---- */

struct sweep {
    struct machine *machine;
    char **named; /* objects that manifests name, ascending */
    unsigned n_named;
    unsigned deleted;
};

static int list_named(struct sweep *sweep)
{
    const struct machine *machine = sweep->machine;

    for (unsigned i = 0; i < machine->n_backups; i++) {
        const struct manifest *manifest = machine->backups[i];

        if (manifest->definition != NULL &&
            add_name(&sweep->named, &sweep->n_named,
                     manifest->definition) < 0) {
            return -1;
        }
        for (unsigned j = 0; j < manifest->n_disks; j++) {
            if (add_name(&sweep->named, &sweep->n_named,
                         manifest->disks[j].archive) < 0) {
                return -1;
            }
        }
    }
    if (sweep->n_named > 0) {
        qsort(sweep->named, sweep->n_named, sizeof(*sweep->named),
              compare_names);
    }
    return 0;
}

/* Files of forms that lbvm doesn't write are someone else's. */
static bool is_leftover(const struct sweep *sweep, const char *folder,
                        const char *name)
{
    bool ours = strcmp(folder, "archives") == 0
                    ? has_suffix(name, ".lbz")
                    : strcmp(folder, "definitions") == 0 &&
                          (has_suffix(name, ".xml") ||
                           has_suffix(name, ".json"));
    char *object;
    bool named;

    if (is_temporary(name)) {
        return true;
    }
    if (name[0] == '.' || !ours || (object = join(folder, name)) == NULL) {
        return false;
    }
    named = sweep->n_named > 0 &&
            bsearch(&object, sweep->named, sweep->n_named,
                    sizeof(*sweep->named), compare_names) != NULL;
    free(object);
    return !named;
}

static int delete_leftover(struct sweep *sweep, const char *folder,
                           const char *name, struct qlb_error *err)
{
    char *path = join(folder, name);
    struct stat st;
    int ret = 0;

    if (path == NULL) {
        return no_memory(folder, err);
    }
    if (lstat(path, &st) == 0 && !S_ISDIR(st.st_mode)) {
        if (unlink(path) == 0) {
            sweep->deleted++;
        } else if (errno != ENOENT) {
            ret = qlb_fail_errno(err, errno, "%s: deleting a leftover", path);
        }
    }
    free(path);
    return ret;
}

static int sweep_folder(struct sweep *sweep, const char *folder,
                        struct qlb_error *err)
{
    char *path = join(sweep->machine->path, folder);
    unsigned n = 0, before = sweep->deleted;
    char **names = NULL;
    int ret = path == NULL ? no_memory(folder, err)
                           : list_folder(path, &names, &n, err);

    for (unsigned i = 0; i < n && ret == 0; i++) {
        if (is_leftover(sweep, folder, names[i])) {
            ret = delete_leftover(sweep, path, names[i], err);
        }
    }
    if (ret == 0 && sweep->deleted > before) {
        ret = sync_folder(path, err);
    }
    free_names(names, n);
    free(path);
    return ret;
}

int machine_sweep(struct machine *machine, unsigned *n, struct qlb_error *err)
{
    struct sweep sweep = { .machine = machine };
    int ret = 0;

    if (!machine->may_sweep || !machine->loaded) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: leftovers are not deleted "
                        "without the lock and the manifests", machine->path);
    }
    if (list_named(&sweep) < 0) {
        ret = no_memory(machine->path, err);
    }
    for (unsigned i = 0; i < N_FOLDERS && ret == 0; i++) {
        ret = sweep_folder(&sweep, folders[i], err);
    }
    if (ret == 0 && machine->alone) {
        ret = sweep_folder(&sweep, ".", err); /* the record of verify */
    }
    free_names(sweep.named, sweep.n_named);
    if (n != NULL) {
        *n = sweep.deleted;
    }
    return ret;
}
