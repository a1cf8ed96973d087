/* The manifest of a backup (docs/repository.md).
 *
 * What is read is checked as a whole before it is used: strings that become
 * paths stay in the folders that they belong in, and strings that are printed
 * have no control characters.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/manifest.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_DISKS = 1024, MAX_TEXT = 8192, MAX_OBJECT = 255 };

/* One more can always be had. */
#define MAX_SEQUENCE (UINT64_C(1) << 53)
#define MAX_TIME UINT64_C(253402300799) /* the end of the year 9999 */

/* ---- memory ---- */

struct manifest *manifest_new(void)
{
    return calloc(1, sizeof(struct manifest));
}

static void release_disk(struct manifest_disk *disk)
{
    free(disk->name);
    free(disk->filename);
    free(disk->archive);
    free(disk->digest);
    free(disk->root);
    free(disk->reason);
    free(disk->bitmap);
}

void manifest_free(struct manifest *manifest)
{
    if (manifest == NULL) {
        return;
    }
    for (unsigned i = 0; i < manifest->n_disks; i++) {
        release_disk(&manifest->disks[i]);
    }
    free(manifest->disks);
    free(manifest->id);
    free(manifest->machine);
    free(manifest->label);
    free(manifest->source);
    free(manifest->definition);
    free(manifest->kept_for);
    free(manifest);
}

struct manifest_disk *manifest_add_disk(struct manifest *manifest)
{
    struct manifest_disk *disks =
        realloc(manifest->disks, (manifest->n_disks + 1) * sizeof(*disks));

    if (disks == NULL) {
        return NULL;
    }
    manifest->disks = disks;
    disks += manifest->n_disks++;
    memset(disks, 0, sizeof(*disks));
    return disks;
}

struct manifest_disk *manifest_find_disk(const struct manifest *manifest,
                                         const char *name)
{
    for (unsigned i = 0; i < manifest->n_disks; i++) {
        if (strcmp(manifest->disks[i].name, name) == 0) {
            return &manifest->disks[i];
        }
    }
    return NULL;
}

bool manifest_describes(const struct manifest_disk *disk,
                        const struct qlb_lbz_reader *reader)
{
    const struct qlb_lbz_header *header = qlb_lbz_reader_header(reader);
    char root[2 * QLB_DIGEST_MAX + 1];

    qlb_hex(qlb_lbz_reader_root(reader), qlb_digest_size(header->digest),
            root);
    return qlb_uuid_equal(&header->uuid, &disk->checkpoint) &&
           qlb_uuid_equal(&header->image_uuid, &disk->image) &&
           header->virtual_size == disk->size &&
           (header->incremental
                ? qlb_uuid_equal(&header->parent, &disk->parent)
                : qlb_uuid_is_zero(&disk->parent)) &&
           strcmp(root, disk->root) == 0;
}

char *manifest_make_id(uint64_t time, const struct qlb_uuid *set,
                       char id[MANIFEST_ID_SIZE])
{
    time_t t = (time_t)(time > MAX_TIME ? MAX_TIME : time);
    char uuid[QLB_UUID_TEXT];
    struct tm tm = { .tm_mday = 1 };
    size_t used;

    gmtime_r(&t, &tm);
    used = strftime(id, MANIFEST_ID_SIZE, "%Y%m%dT%H%M%SZ-", &tm);
    snprintf(id + used, MANIFEST_ID_SIZE - used, "%.8s",
             qlb_uuid_format(set, uuid));
    return id;
}

/* ---- fields ---- */

static bool is_printable(const char *text)
{
    for (; *text != '\0'; text++) {
        if ((unsigned char)*text < ' ' || *text == 0x7f) {
            return false;
        }
    }
    return true;
}

/* optional: absent and null are NULL. */
static int take_text(const json_t *object, const char *key, bool optional,
                     char **text, struct qlb_error *err)
{
    const json_t *value = json_object_get(object, key);
    const char *string = json_string_value(value);

    if (optional && (value == NULL || json_is_null(value))) {
        return 0;
    }
    if (string == NULL || json_string_length(value) > MAX_TEXT ||
        !is_printable(string)) {
        return qlb_fail(err, QLB_E_DAMAGED, "'%s' is missing, or no text of "
                        "one line", key);
    }
    *text = strdup(string);
    return *text == NULL ? qlb_fail_errno(err, ENOMEM, "'%s'", key) : 0;
}

static int take_name(const json_t *object, const char *key, char **text,
                     struct qlb_error *err)
{
    if (take_text(object, key, false, text, err) < 0) {
        return -1;
    }
    if (**text == '\0') {
        return qlb_fail(err, QLB_E_DAMAGED, "'%s' is empty", key);
    }
    return 0;
}

static int take_number(const json_t *object, const char *key, uint64_t max,
                       uint64_t *number, struct qlb_error *err)
{
    const json_t *value = json_object_get(object, key);
    json_int_t n = json_integer_value(value);

    if (!json_is_integer(value) || n < 0 || (uint64_t)n > max) {
        return qlb_fail(err, QLB_E_DAMAGED, "'%s' is missing, or no number "
                        "in its range", key);
    }
    *number = (uint64_t)n;
    return 0;
}

/* optional: null is the zero UUID, which none else may be. */
static int take_uuid(const json_t *object, const char *key, bool optional,
                     struct qlb_uuid *uuid, struct qlb_error *err)
{
    const json_t *value = json_object_get(object, key);
    const char *text = json_string_value(value);

    if (optional && json_is_null(value)) {
        return 0;
    }
    if (text == NULL || !qlb_uuid_parse(text, uuid) ||
        qlb_uuid_is_zero(uuid)) {
        return qlb_fail(err, QLB_E_DAMAGED, "'%s' is missing, or no UUID",
                        key);
    }
    return 0;
}

/* "FOLDER/NAME": nothing leads out of it, or to a file that is hidden. */
static int check_object(const char *object, const char *folder,
                        const char *key, struct qlb_error *err)
{
    size_t len = strlen(folder);
    const char *name = object + len + 1;

    if (strncmp(object, folder, len) != 0 || object[len] != '/' ||
        *name == '\0' || *name == '.' || strchr(name, '/') != NULL ||
        strlen(name) > MAX_OBJECT) {
        return qlb_fail(err, QLB_E_DAMAGED, "'%s' is no file of the "
                        "machine's folder '%s'", key, folder);
    }
    return 0;
}

static int check_root(const struct manifest_disk *disk,
                      struct qlb_error *err)
{
    size_t digits = strcmp(disk->digest, "xxh3-128") == 0 ? 32
                    : strcmp(disk->digest, "sha256") == 0 ? 64 : 0;

    if (digits == 0) {
        return qlb_fail(err, QLB_E_DAMAGED, "'digest' is neither xxh3-128 "
                        "nor sha256");
    }
    if (strlen(disk->root) != digits ||
        strspn(disk->root, "0123456789abcdef") != digits) {
        return qlb_fail(err, QLB_E_DAMAGED, "'root' is no digest");
    }
    return 0;
}

/* ---- reading ---- */

static int read_disk(struct manifest_disk *disk, const json_t *json,
                     struct qlb_error *err)
{
    if (take_text(json, "filename", false, &disk->filename, err) < 0 ||
        take_uuid(json, "checkpoint", false, &disk->checkpoint, err) < 0 ||
        take_uuid(json, "parent", true, &disk->parent, err) < 0 ||
        take_uuid(json, "image", false, &disk->image, err) < 0 ||
        take_number(json, "size", INT64_MAX, &disk->size, err) < 0 ||
        take_text(json, "archive", false, &disk->archive, err) < 0 ||
        check_object(disk->archive, "archives", "archive", err) < 0 ||
        take_number(json, "bytes", INT64_MAX, &disk->bytes, err) < 0 ||
        take_text(json, "digest", false, &disk->digest, err) < 0 ||
        take_text(json, "root", false, &disk->root, err) < 0 ||
        check_root(disk, err) < 0 ||
        take_text(json, "reason", false, &disk->reason, err) < 0 ||
        take_text(json, "bitmap", true, &disk->bitmap, err) < 0) {
        return -1;
    }
    if (qlb_uuid_equal(&disk->parent, &disk->checkpoint)) {
        return qlb_fail(err, QLB_E_DAMAGED, "it is its own parent");
    }
    return 0;
}

static int read_disks(struct manifest *manifest, const json_t *list,
                      struct qlb_error *err)
{
    size_t n = json_array_size(list);

    if (n == 0 || n > MAX_DISKS) {
        return qlb_fail(err, QLB_E_DAMAGED, "'disks' is missing, or no list "
                        "of 1 to %d disks", MAX_DISKS);
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *json = json_array_get(list, i);
        char *name = NULL;
        struct manifest_disk *disk;

        if (take_name(json, "name", &name, err) < 0) {
            free(name);
            return qlb_error_prefix(err, "disk %zu", i);
        }
        if (manifest_find_disk(manifest, name) != NULL) {
            qlb_fail(err, QLB_E_DAMAGED, "there are two disks '%s'", name);
            free(name);
            return -1;
        }
        disk = manifest_add_disk(manifest);
        if (disk == NULL) {
            free(name);
            return qlb_fail_errno(err, ENOMEM, "disk %zu", i);
        }
        disk->name = name;
        if (read_disk(disk, json, err) < 0) {
            return qlb_error_prefix(err, "disk '%s'", name);
        }
    }
    return 0;
}

static int check_format(const json_t *json, struct qlb_error *err)
{
    const char *format = json_string_value(json_object_get(json, "format"));
    const json_t *version = json_object_get(json, "version");

    if (format == NULL || strcmp(format, "lbvm-backup") != 0) {
        return qlb_fail(err, QLB_E_DAMAGED, "is no manifest: 'format' is not "
                        "'lbvm-backup'");
    }
    if (!json_is_integer(version)) {
        return qlb_fail(err, QLB_E_DAMAGED, "'version' is missing, or no "
                        "number");
    }
    if (json_integer_value(version) != 1) {
        return qlb_fail(err, QLB_E_RUNTIME, "version %lld is not known here; "
                        "a newer lbvm may read it",
                        (long long)json_integer_value(version));
    }
    return 0;
}

static int read_manifest(struct manifest *m, const json_t *json,
                         struct qlb_error *err)
{
    const json_t *quiesced = json_object_get(json, "quiesced");
    char id[MANIFEST_ID_SIZE];

    if (check_format(json, err) < 0 ||
        take_name(json, "id", &m->id, err) < 0 ||
        take_name(json, "machine", &m->machine, err) < 0 ||
        take_uuid(json, "set", false, &m->set, err) < 0 ||
        take_number(json, "sequence", MAX_SEQUENCE, &m->sequence, err) < 0 ||
        take_number(json, "time", MAX_TIME, &m->time, err) < 0 ||
        take_number(json, "finished", MAX_TIME, &m->finished, err) < 0 ||
        take_text(json, "label", false, &m->label, err) < 0 ||
        take_name(json, "source", &m->source, err) < 0 ||
        take_text(json, "definition", true, &m->definition, err) < 0 ||
        take_text(json, "kept_for", true, &m->kept_for, err) < 0) {
        return -1;
    }
    if (!json_is_boolean(quiesced)) {
        return qlb_fail(err, QLB_E_DAMAGED, "'quiesced' is missing, or "
                        "neither true nor false");
    }
    m->quiesced = json_is_true(quiesced);
    if (!qlb_label_valid(m->label)) {
        return qlb_fail(err, QLB_E_DAMAGED, "'label' is no chain label");
    }
    /* The order of IDs is that of the points in time. */
    if (strcmp(m->id, manifest_make_id(m->time, &m->set, id)) != 0) {
        return qlb_fail(err, QLB_E_DAMAGED, "'id' is not that of 'time' and "
                        "'set', %s", id);
    }
    if (m->definition != NULL &&
        check_object(m->definition, "definitions", "definition", err) < 0) {
        return -1;
    }
    return read_disks(m, json_object_get(json, "disks"), err);
}

struct manifest *manifest_from_json(const json_t *json,
                                    struct qlb_error *err)
{
    struct manifest *manifest = manifest_new();

    if (manifest == NULL) {
        qlb_fail_errno(err, ENOMEM, "reading a manifest");
        return NULL;
    }
    if (read_manifest(manifest, json, err) < 0) {
        manifest_free(manifest);
        return NULL;
    }
    return manifest;
}

/* ---- writing ---- */

static json_t *number(uint64_t n)
{
    return json_integer((json_int_t)n);
}

static json_t *text_or_null(const char *text)
{
    return text == NULL ? json_null() : json_string(text);
}

/* What is only there to be read by people: paths are bytes, JSON is UTF-8, and
 * a backup doesn't fail for that. */
static json_t *readable(const char *text)
{
    json_t *json = json_string(text == NULL ? "" : text);
    char *copy;

    if (json != NULL && is_printable(json_string_value(json))) {
        return json;
    }
    json_decref(json);
    copy = strdup(text);
    for (char *c = copy; copy != NULL && *c != '\0'; c++) {
        *c = *c >= ' ' && (unsigned char)*c < 0x7f ? *c : '?';
    }
    json = json_string(copy);
    free(copy);
    return json;
}

static json_t *disk_to_json(const struct manifest_disk *disk)
{
    json_t *json = json_object();

    json_object_set_new(json, "name", json_string(disk->name));
    json_object_set_new(json, "filename", readable(disk->filename));
    json_object_set_new(json, "checkpoint",
                        tool_json_uuid(&disk->checkpoint));
    json_object_set_new(json, "parent", tool_json_uuid(&disk->parent));
    json_object_set_new(json, "image", tool_json_uuid(&disk->image));
    json_object_set_new(json, "size", number(disk->size));
    json_object_set_new(json, "archive", json_string(disk->archive));
    json_object_set_new(json, "bytes", number(disk->bytes));
    json_object_set_new(json, "digest", json_string(disk->digest));
    json_object_set_new(json, "root", json_string(disk->root));
    json_object_set_new(json, "reason", readable(disk->reason));
    if (disk->bitmap != NULL) {
        json_object_set_new(json, "bitmap", json_string(disk->bitmap));
    }
    return json;
}

json_t *manifest_to_json(const struct manifest *manifest)
{
    json_t *json = json_object();
    json_t *disks = json_array();

    json_object_set_new(json, "format", json_string("lbvm-backup"));
    json_object_set_new(json, "version", json_integer(1));
    json_object_set_new(json, "id", json_string(manifest->id));
    json_object_set_new(json, "machine", json_string(manifest->machine));
    json_object_set_new(json, "set", tool_json_uuid(&manifest->set));
    json_object_set_new(json, "sequence", number(manifest->sequence));
    json_object_set_new(json, "time", number(manifest->time));
    json_object_set_new(json, "finished", number(manifest->finished));
    json_object_set_new(json, "label", json_string(manifest->label));
    json_object_set_new(json, "source", json_string(manifest->source));
    json_object_set_new(json, "quiesced", json_boolean(manifest->quiesced));
    json_object_set_new(json, "definition",
                        text_or_null(manifest->definition));
    if (manifest->kept_for != NULL) {
        json_object_set_new(json, "kept_for",
                            json_string(manifest->kept_for));
    }
    for (unsigned i = 0; i < manifest->n_disks; i++) {
        json_array_append_new(disks, disk_to_json(&manifest->disks[i]));
    }
    json_object_set_new(json, "disks", disks);
    return json;
}
