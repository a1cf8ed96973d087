/* A repository: what describes it, and its machines (docs/repository.md).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/repository.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vm/stored_json.h"

enum { MAX_NAME = 100 };

static const char description[] = "repository.json";

struct repository {
    struct store *store;
    char *label;
};

static int no_memory(const char *what, struct qlb_error *err)
{
    return qlb_fail_errno(err, ENOMEM, "%s", what);
}

/* What a file system, or an attempt that was killed, leaves in a new folder. */
static bool counts_as_content(const char *name)
{
    return !store_is_temporary(name) && strcmp(name, "lost+found") != 0;
}

static int check_empty(struct store *store, struct qlb_error *err)
{
    struct store_names names;
    int ret = store_list(store, "", &names, err);

    for (unsigned i = 0; i < names.n && ret == 0; i++) {
        if (counts_as_content(names.at[i])) {
            ret = qlb_fail(err, QLB_E_USAGE, "%s: is no repository, and not "
                           "empty: a new one wants a folder of its own",
                           store->name);
        }
    }
    store_names_release(&names);
    return ret;
}

static int make_repository(struct store *store, const char *label,
                           struct qlb_error *err)
{
    struct qlb_uuid uuid = tool_random_uuid();
    char text[QLB_UUID_TEXT], own[32];
    json_t *json;
    int ret;

    qlb_uuid_format(&uuid, text);
    snprintf(own, sizeof(own), "lbvm-%.8s", text);
    if (store_make_folder(store, "", true, err) < 0 ||
        check_empty(store, err) < 0) {
        return -1;
    }
    json = json_object();
    json_object_set_new(json, "format", json_string("lbvm-repository"));
    json_object_set_new(json, "version", json_integer(1));
    json_object_set_new(json, "uuid", json_string(text));
    json_object_set_new(json, "label",
                        json_string(label != NULL ? label : own));
    ret = stored_json_put(store, description, json, false, err);
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

/* Reads the description, after making it where that is asked for. */
static int read_description(struct store *store, bool create,
                            const char *label, json_t **json,
                            struct qlb_error *err)
{
    int ret = stored_json_get(store, description, json, err);

    if (ret == 0 && create) {
        if (make_repository(store, label, err) < 0) {
            /* Unless somebody else has made it at the same time. */
            struct qlb_error ignored;

            return stored_json_get(store, description, json,
                                   &ignored) > 0 ? 1 : -1;
        }
        ret = stored_json_get(store, description, json, err);
    }
    if (ret == 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: is no repository: it has no "
                        "repository.json", store->name);
    }
    return ret;
}

static int load_repository(struct repository *repository, bool create,
                           const char *label, struct qlb_error *err)
{
    json_t *json = NULL;
    char *path;
    int ret;

    if (read_description(repository->store, create, label, &json, err) < 0) {
        return -1;
    }
    path = store_path(repository->store, description);
    ret = path == NULL ? no_memory(repository->store->name, err)
                       : check_repository(path, json, err);
    if (ret == 0) {
        repository->label =
            strdup(json_string_value(json_object_get(json, "label")));
        ret = repository->label == NULL ? no_memory(path, err) : 0;
    }
    free(path);
    json_decref(json);
    return ret;
}

struct repository *repository_open(const char *location, bool create,
                                   const char *label, struct qlb_error *err)
{
    struct repository *repository;
    int ret;

    if (label != NULL && !qlb_label_valid(label)) {
        qlb_fail(err, QLB_E_USAGE, "'%s' is no chain label: 1 to %u of the "
                 "characters A-Z a-z 0-9 . _ -", label, QLB_LABEL_MAX);
        return NULL;
    }
    repository = calloc(1, sizeof(*repository));
    if (repository == NULL) {
        no_memory(location, err);
        return NULL;
    }
    repository->store = store_open(location, err);
    ret = repository->store == NULL
              ? -1 : load_repository(repository, create, label, err);
    if (ret == 0 && label != NULL && strcmp(repository->label, label) != 0) {
        ret = qlb_fail(err, QLB_E_USAGE, "%s: the repository has the chain "
                       "label '%s', which can't become '%s'",
                       repository->store->name, repository->label, label);
    }
    if (ret < 0) {
        repository_close(repository);
        return NULL;
    }
    return repository;
}

void repository_close(struct repository *repository)
{
    if (repository != NULL) {
        store_close(repository->store);
        free(repository->label);
        free(repository);
    }
}

struct store *repository_store(const struct repository *repository)
{
    return repository->store;
}

const char *repository_label(const struct repository *repository)
{
    return repository->label;
}

/* ---- machines ---- */

bool machine_name_valid(const char *name)
{
    static const char characters[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    size_t len = strlen(name);

    return len >= 1 && len <= MAX_NAME && name[0] != '.' && name[0] != '-' &&
           strspn(name, characters) == len;
}

bool repository_has_machine(const struct repository *repository,
                            const char *name)
{
    char object[MAX_NAME + 16];
    struct qlb_error ignored;

    if (!machine_name_valid(name)) {
        return false;
    }
    snprintf(object, sizeof(object), "%s/backups", name);
    return store_has(repository->store, object, &ignored) > 0;
}

int repository_machines(const struct repository *repository, char ***names,
                        unsigned *n, struct qlb_error *err)
{
    struct store_names all;
    unsigned kept = 0;

    *n = 0;
    *names = NULL;
    if (store_list(repository->store, "", &all, err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < all.n; i++) {
        if (repository_has_machine(repository, all.at[i])) {
            all.at[kept++] = all.at[i];
        } else {
            free(all.at[i]);
        }
    }
    *names = all.at;
    *n = kept;
    return 0;
}
