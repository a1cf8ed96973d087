/* The objects of a repository, wherever they are.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/store.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char scheme[] = "ssh://";

/* ---- names ---- */

int store_names_add(struct store_names *names, const char *name)
{
    char **larger = realloc(names->at, (names->n + 1) * sizeof(*larger));

    if (larger == NULL) {
        return -1;
    }
    names->at = larger;
    larger[names->n] = strdup(name);
    if (larger[names->n] == NULL) {
        return -1;
    }
    names->n++;
    return 0;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

void store_names_sort(struct store_names *names)
{
    if (names->n > 0) {
        qsort(names->at, names->n, sizeof(*names->at), compare_names);
    }
}

bool store_names_have(const struct store_names *names, const char *name)
{
    return names->n > 0 && bsearch(&name, names->at, names->n,
                                   sizeof(*names->at), compare_names) != NULL;
}

void store_names_release(struct store_names *names)
{
    for (unsigned i = 0; i < names->n; i++) {
        free(names->at[i]);
    }
    free(names->at);
    *names = (struct store_names) { 0 };
}

bool store_is_temporary(const char *name)
{
    size_t len = strlen(name);

    return name[0] == '.' && len > 12 && name[len - 11] == '.' &&
           strcmp(name + len - 4, ".tmp") == 0;
}

/* ---- stores ---- */

bool store_is_remote(const char *location)
{
    return strncmp(location, scheme, strlen(scheme)) == 0;
}

struct store *store_open(const char *location, struct qlb_error *err)
{
    return store_is_remote(location) ? store_ssh_open(location, err)
                                     : store_folder_open(location, err);
}

void store_close(struct store *store)
{
    if (store != NULL) {
        store->ops->close(store);
    }
}

char *store_path(const struct store *store, const char *object)
{
    char *path;

    if (*object == '\0') {
        return strdup(store->name);
    }
    return asprintf(&path, "%s/%s", store->name, object) < 0 ? NULL : path;
}

int store_make_folder(struct store *store, const char *folder, bool own,
                      struct qlb_error *err)
{
    return store->ops->make_folder(store, folder, own, err);
}

int store_list(struct store *store, const char *folder,
               struct store_names *names, struct qlb_error *err)
{
    *names = (struct store_names) { 0 };
    if (store->ops->list(store, folder, names, err) < 0) {
        store_names_release(names);
        return -1;
    }
    store_names_sort(names);
    return 0;
}

int store_each(struct store *store, const char *folder, const char *suffix,
               store_each_fn *each, void *opaque, struct qlb_error *err)
{
    return store->ops->each(store, folder, suffix, each, opaque, err);
}

int store_has(struct store *store, const char *object, struct qlb_error *err)
{
    return store->ops->has(store, object, err);
}

int store_get(struct store *store, const char *object,
              struct store_text *text, struct qlb_error *err)
{
    *text = (struct store_text) { 0 };
    return store->ops->get(store, object, text, err);
}

int store_put(struct store *store, const char *object, const void *data,
              size_t len, bool replace, struct qlb_error *err)
{
    return store->ops->put(store, object, data, len, replace, err);
}

int store_touch(struct store *store, const char *object,
                struct qlb_error *err)
{
    return store->ops->touch(store, object, err);
}

struct qlb_outfile *store_create(void *opaque, const char *path,
                                 struct qlb_error *err)
{
    struct store *store = opaque;

    return store->ops->create(store, path + strlen(store->name) + 1, err);
}

int store_delete(struct store *store, const char *object,
                 struct qlb_error *err)
{
    return store->ops->delete(store, &object, 1, err);
}

int store_delete_all(struct store *store, const char *const *objects,
                     unsigned n, struct qlb_error *err)
{
    return n == 0 ? 0 : store->ops->delete(store, objects, n, err);
}

char *store_fetch(struct store *store, const char *object,
                  struct qlb_error *err)
{
    return store->ops->fetch(store, object, err);
}

int store_lock(struct store *store, const char *object, bool exclusive,
               const char *who, struct store_lock **lock,
               struct qlb_error *err)
{
    *lock = NULL;
    return store->ops->lock(store, object, exclusive, who, lock, err);
}

void store_unlock(struct store *store, struct store_lock *lock)
{
    if (lock != NULL) {
        store->ops->unlock(store, lock);
    }
}
