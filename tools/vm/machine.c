/* A machine in a repository: locks, what its manifests tell, its objects.
 *
 * What no manifest names is deleted by machine_sweep alone, and only where all
 * manifests of the machine could be read: a manifest that is damaged, or a
 * folder that can't be listed, stops it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vm/repository.h"
#include "vm/stored_json.h"

enum { MAX_DISK_NAME = 60 };

struct machine {
    const struct repository *repository;
    struct store *store;       /* the repository's */
    char *name;
    char *path;                /* for messages */
    struct manifest **backups;
    unsigned n_backups;
    const struct manifest_disk **archives; /* by image and checkpoint */
    unsigned n_archives;
    bool loaded;
    bool may_sweep;            /* MACHINE_BACKUP or MACHINE_PRUNE is held */
    bool alone;                /* MACHINE_PRUNE is held */
    struct store_lock *lock, *backup_lock; /* NULL: not held */
};

static const char *const folders[] = { "backups", "archives", "definitions" };

enum { N_FOLDERS = sizeof(folders) / sizeof(folders[0]) };

static int no_memory(const char *what, struct qlb_error *err)
{
    return qlb_fail_errno(err, ENOMEM, "%s", what);
}

static char *join(const char *folder, const char *name)
{
    char *path;

    return asprintf(&path, "%s/%s", folder, name) < 0 ? NULL : path;
}

/* As the store knows it; NULL where memory is short: the error is told. */
static char *object_of(const struct machine *machine, const char *name,
                       struct qlb_error *err)
{
    char *object = join(machine->name, name);

    if (object == NULL) {
        no_memory(machine->path, err);
    }
    return object;
}

/* ---- opening ---- */

/* Those who may only read find the locks. A file that is there must stay: it
 * may be locked by who makes the same machine just now. */
static int make_lock(const struct machine *machine, const char *name,
                     struct qlb_error *err)
{
    char *object = object_of(machine, name, err);
    int ret = object == NULL ? -1 : store_touch(machine->store, object, err);

    free(object);
    return ret;
}

static int make_machine(const struct machine *machine, struct qlb_error *err)
{
    int ret = store_make_folder(machine->store, machine->name, false, err);

    if (ret == 0 && (make_lock(machine, "lock", err) < 0 ||
                     make_lock(machine, "backup.lock", err) < 0)) {
        ret = -1;
    }
    for (unsigned i = 0; i < N_FOLDERS && ret == 0; i++) {
        /* "backups" comes last: it is what makes it a machine */
        char *folder = object_of(machine, folders[N_FOLDERS - 1 - i], err);

        ret = folder == NULL
                  ? -1
                  : store_make_folder(machine->store, folder, false, err);
        free(folder);
    }
    return ret;
}

static int find_machine(const struct machine *machine, bool create,
                        struct qlb_error *err)
{
    if (repository_has_machine(machine->repository, machine->name)) {
        return 0;
    }
    return create ? make_machine(machine, err)
                  : qlb_fail(err, QLB_E_RUNTIME, "%s: has no backups of a "
                             "machine '%s'", machine->store->name,
                             machine->name);
}

struct machine *machine_open(const struct repository *repository,
                             const char *name, bool create,
                             struct qlb_error *err)
{
    struct machine *machine;
    int ret;

    if (!machine_name_valid(name)) {
        qlb_fail(err, QLB_E_USAGE, "'%s' is no name of a machine: 1 to 100 of "
                 "the characters A-Z a-z 0-9 . _ -, first neither . nor -",
                 name);
        return NULL;
    }
    machine = calloc(1, sizeof(*machine));
    if (machine == NULL) {
        no_memory(name, err);
        return NULL;
    }
    machine->repository = repository;
    machine->store = repository_store(repository);
    machine->name = strdup(name);
    machine->path = store_path(machine->store, name);
    ret = machine->name == NULL || machine->path == NULL
              ? no_memory(name, err) : find_machine(machine, create, err);
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
    store_unlock(machine->store, machine->lock);
    store_unlock(machine->store, machine->backup_lock);
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

/* ---- locks ---- */

/* who: is in the way where the lock can't be had. */
static int take_lock(struct machine *machine, const char *name,
                     bool exclusive, const char *who,
                     struct store_lock **lock, struct qlb_error *err)
{
    char *object = object_of(machine, name, err);
    int ret = -1;

    store_unlock(machine->store, *lock); /* what was held goes */
    *lock = NULL;
    if (object != NULL) {
        ret = store_lock(machine->store, object, exclusive, who, lock, err);
    }
    free(object);
    return ret;
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
                      &machine->backup_lock, err) < 0) {
            return -1;
        }
        machine->may_sweep = true;
    }
    if (lock != MACHINE_BACKUP) {
        machine->alone = false;
        if (take_lock(machine, "lock", lock == MACHINE_PRUNE,
                      lock == MACHINE_PRUNE ? reading : pruning,
                      &machine->lock, err) < 0) {
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

static int take_manifest(struct machine *machine, struct manifest *manifest,
                         struct qlb_error *err)
{
    struct manifest **larger = realloc(machine->backups,
                                       (machine->n_backups + 1) *
                                           sizeof(*larger));

    if (larger == NULL) {
        return no_memory(machine->path, err);
    }
    machine->backups = larger;
    larger[machine->n_backups++] = manifest;
    machine->n_archives += manifest->n_disks;
    return 0;
}

static int read_manifest(struct machine *machine, const char *name,
                         const char *path, const struct store_text *text,
                         struct qlb_error *err)
{
    json_t *json = stored_json_parse(text, path, err);
    struct manifest *manifest;

    if (json == NULL) {
        return -1;
    }
    manifest = manifest_from_json(json, err);
    json_decref(json);
    if (manifest == NULL || check_place(machine, name, manifest, err) < 0) {
        manifest_free(manifest);
        return qlb_error_prefix(err, "%s", path);
    }
    if (take_manifest(machine, manifest, err) < 0) {
        manifest_free(manifest);
        return -1;
    }
    return 0;
}

static int load_manifest(void *opaque, const char *name,
                         const struct store_text *text,
                         struct qlb_error *err)
{
    struct machine *machine = opaque;
    char *path;
    int ret;

    if (asprintf(&path, "%s/backups/%s", machine->path, name) < 0) {
        return no_memory(machine->path, err);
    }
    ret = read_manifest(machine, name, path, text, err);
    free(path);
    return ret;
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
    char *folder = object_of(machine, "backups", err);
    int ret;

    unload(machine);
    ret = folder == NULL ? -1
                         : store_each(machine->store, folder, ".json",
                                      load_manifest, machine, err);
    free(folder);
    if (ret == 0 && machine->n_backups > 0) {
        qsort(machine->backups, machine->n_backups,
              sizeof(*machine->backups), compare_backups);
    }
    if (ret == 0) {
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

static struct manifest *find_newest(const struct machine *machine)
{
    for (unsigned i = machine->n_backups; i-- > 0;) {
        if (machine->backups[i]->kept_for == NULL) {
            return machine->backups[i];
        }
    }
    return NULL;
}

/* By the clock, not by sequence: a backup that was made later, while the clock was
 * far behind, is not the state of the time that is asked for.  Of two of the same
 * time the one that was made later. */
static struct manifest *find_last_until(const struct machine *machine,
                                        uint64_t time)
{
    struct manifest *found = NULL;

    for (unsigned i = 0; i < machine->n_backups; i++) {
        struct manifest *manifest = machine->backups[i];

        if (manifest->kept_for == NULL && manifest->time <= time &&
            (found == NULL || manifest->time >= found->time)) {
            found = manifest;
        }
    }
    return found;
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
        found = find_newest(machine);
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
    struct manifest *found = find_last_until(machine, time);
    char text[32];

    if (found == NULL && find_newest(machine) == NULL) {
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

/* Puts the disk's archive at the end. */
static int add_link(const struct machine *machine,
                    const struct manifest_disk *disk,
                    struct store_names *objects, struct qlb_error *err)
{
    char *object = object_of(machine, disk->archive, err);
    int ret = object == NULL ? -1 : store_has(machine->store, object, err);

    free(object);
    if (ret == 0) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s/%s: is missing: the chain "
                        "of disk '%s' is broken", machine->path,
                        disk->archive, disk->name);
    }
    if (ret > 0 && store_names_add(objects, disk->archive) < 0) {
        ret = no_memory(machine->path, err);
    }
    return ret < 0 ? -1 : 0;
}

/* From the disk's archive back to the full one. */
static int follow_parents(const struct machine *machine,
                          const struct manifest_disk *disk,
                          struct store_names *objects, struct qlb_error *err)
{
    const struct manifest_disk *at = disk;
    int ret = add_link(machine, at, objects, err);

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
        } else if (objects->n > machine->n_archives) {
            ret = qlb_fail(err, QLB_E_DAMAGED, "%s: disk '%s': the parents "
                           "of its archives run in a circle", machine->path,
                           disk->name);
        } else {
            at = parent;
            ret = add_link(machine, at, objects, err);
        }
    }
    return ret;
}

int machine_chain(const struct machine *machine,
                  const struct manifest_disk *disk,
                  struct store_names *objects, struct qlb_error *err)
{
    *objects = (struct store_names) { 0 };
    if (follow_parents(machine, disk, objects, err) < 0) {
        store_names_release(objects);
        return -1;
    }
    for (unsigned i = 0; i < objects->n / 2; i++) {
        char *object = objects->at[i];

        objects->at[i] = objects->at[objects->n - 1 - i];
        objects->at[objects->n - 1 - i] = object;
    }
    return 0;
}

/* ---- objects ---- */

char *machine_archive_object(const struct machine *machine, const char *disk,
                             const struct qlb_uuid *checkpoint,
                             struct qlb_error *err)
{
    char name[MAX_DISK_NAME + 2], uuid[QLB_UUID_TEXT];
    char *object, *whole;
    int taken = 1;

    snprintf(name, MAX_DISK_NAME + 1, "%s", disk);
    for (char *c = name; *c != '\0'; c++) {
        char one[] = { *c, '\0' };

        if (!machine_name_valid(one) && (c == name || (*c != '.' &&
                                                       *c != '-'))) {
            *c = '_';
        }
    }
    qlb_uuid_format(checkpoint, uuid);
    for (unsigned n = 0; taken > 0; n++) {
        if (asprintf(&object, "archives/%s.%s-%u.lbz", name, uuid, n) < 0) {
            no_memory(machine->path, err);
            return NULL;
        }
        whole = object_of(machine, object, err);
        taken = whole == NULL ? -1 : store_has(machine->store, whole, err);
        free(whole);
        if (taken != 0) {
            free(object);
        }
    }
    return taken == 0 ? object : NULL;
}

bool machine_is_remote(const struct machine *machine)
{
    return store_is_remote(machine->store->name);
}

char *machine_object_path(const struct machine *machine, const char *object)
{
    return join(machine->path, object);
}

int machine_get(const struct machine *machine, const char *object,
                struct store_text *text, struct qlb_error *err)
{
    char *whole = object_of(machine, object, err);
    int ret = whole == NULL ? -1
                            : store_get(machine->store, whole, text, err);

    free(whole);
    return ret;
}

char *machine_fetch(const struct machine *machine, const char *object,
                    struct qlb_error *err)
{
    char *whole = object_of(machine, object, err);
    char *path = whole == NULL ? NULL
                               : store_fetch(machine->store, whole, err);

    free(whole);
    return path;
}

int machine_put(struct machine *machine, const char *object, const void *data,
                size_t len, struct qlb_error *err)
{
    char *whole = object_of(machine, object, err);
    int ret = whole == NULL ? -1
                            : store_put(machine->store, whole, data, len,
                                        true, err);

    free(whole);
    return ret;
}

static int put_readable(struct machine *machine, const char *object,
                        const json_t *json, struct qlb_error *err)
{
    struct manifest *readable = manifest_from_json(json, err);
    int ret;

    if (readable == NULL) {
        /* Nobody could read it again, and nothing be backed up after it. */
        return qlb_error_prefix(err, "%s/%s: can't be written",
                                machine->store->name, object);
    }
    ret = stored_json_put(machine->store, object, json, true, err);
    manifest_free(readable);
    return ret;
}

int machine_put_manifest(struct machine *machine,
                         const struct manifest *manifest,
                         struct qlb_error *err)
{
    char name[MANIFEST_ID_SIZE + 16];
    json_t *json = manifest_to_json(manifest);
    char *object;
    int ret;

    snprintf(name, sizeof(name), "backups/%s.json", manifest->id);
    object = object_of(machine, name, err);
    ret = object == NULL ? -1 : put_readable(machine, object, json, err);
    free(object);
    json_decref(json);
    return ret;
}

int machine_delete(struct machine *machine, const char *object,
                   struct qlb_error *err)
{
    char *whole = object_of(machine, object, err);
    int ret = whole == NULL ? -1 : store_delete(machine->store, whole, err);

    free(whole);
    return ret;
}

/* ---- leftovers ---- */

/* Objects that manifests name, ascending. */
static int list_named(const struct machine *machine,
                      struct store_names *named)
{
    for (unsigned i = 0; i < machine->n_backups; i++) {
        const struct manifest *manifest = machine->backups[i];

        if (manifest->definition != NULL &&
            store_names_add(named, manifest->definition) < 0) {
            return -1;
        }
        for (unsigned j = 0; j < manifest->n_disks; j++) {
            if (store_names_add(named, manifest->disks[j].archive) < 0) {
                return -1;
            }
        }
    }
    store_names_sort(named);
    return 0;
}

static bool has_suffix(const char *name, const char *suffix)
{
    size_t len = strlen(name), n = strlen(suffix);

    return len > n && strcmp(name + len - n, suffix) == 0;
}

/* Files of forms that lbvm doesn't write are someone else's. */
static bool is_leftover(const struct store_names *named, const char *folder,
                        const char *name)
{
    bool ours = strcmp(folder, "archives") == 0
                    ? has_suffix(name, ".lbz")
                    : strcmp(folder, "definitions") == 0 &&
                          (has_suffix(name, ".xml") ||
                           has_suffix(name, ".json"));
    char *object;
    bool found;

    if (store_is_temporary(name)) {
        return true;
    }
    if (name[0] == '.' || !ours || (object = join(folder, name)) == NULL) {
        return false;
    }
    found = store_names_have(named, object);
    free(object);
    return !found;
}

/* Of a folder, or "" for the machine's own, as objects of the store. */
static int find_leftovers(const struct machine *machine,
                          const struct store_names *named,
                          const char *folder, struct store_names *leftovers,
                          struct qlb_error *err)
{
    char *place = *folder == '\0' ? strdup(machine->name)
                                  : object_of(machine, folder, err);
    struct store_names names = { 0 };
    int ret = place == NULL
                  ? no_memory(machine->path, err)
                  : store_list(machine->store, place, &names, err);

    for (unsigned i = 0; i < names.n && ret == 0; i++) {
        char *object;

        if (!is_leftover(named, folder, names.at[i])) {
            continue;
        }
        object = join(place, names.at[i]);
        if (object == NULL || store_names_add(leftovers, object) < 0) {
            ret = no_memory(machine->path, err);
        }
        free(object);
    }
    store_names_release(&names);
    free(place);
    return ret;
}

static int sweep_folder(struct machine *machine,
                        const struct store_names *named, const char *folder,
                        unsigned *n, struct qlb_error *err)
{
    struct store_names leftovers = { 0 };
    int ret = find_leftovers(machine, named, folder, &leftovers, err);

    if (ret == 0) {
        ret = store_delete_all(machine->store,
                               (const char *const *)leftovers.at,
                               leftovers.n, err);
        *n += leftovers.n;
    }
    store_names_release(&leftovers);
    return ret;
}

int machine_sweep(struct machine *machine, unsigned *n, struct qlb_error *err)
{
    struct store_names named = { 0 };
    unsigned deleted = 0;
    int ret = 0;

    if (!machine->may_sweep || !machine->loaded) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: leftovers are not deleted "
                        "without the lock and the manifests", machine->path);
    }
    if (list_named(machine, &named) < 0) {
        ret = no_memory(machine->path, err);
    }
    for (unsigned i = 0; i < N_FOLDERS && ret == 0; i++) {
        ret = sweep_folder(machine, &named, folders[i], &deleted, err);
    }
    if (ret == 0 && machine->alone) {
        /* the record of verify */
        ret = sweep_folder(machine, &named, "", &deleted, err);
    }
    store_names_release(&named);
    if (n != NULL) {
        *n = deleted;
    }
    return ret;
}
