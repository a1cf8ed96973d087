/* The disks of a stock QEMU, and the dirty bitmaps that lbvm keeps in them.
 *
 * A bitmap of lbvm goes on tracking, whatever other bitmaps there are: it has
 * all changes since its checkpoint by itself.  QEMU keeps it in the image, and
 * says if it is not what was written there ("inconsistent", after a crash).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/stock_disks.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PREFIX "lbvm-"

char *stock_bitmap_name(const struct qlb_uuid *checkpoint,
                        char name[STOCK_NAME_SIZE])
{
    char uuid[QLB_UUID_TEXT];

    snprintf(name, STOCK_NAME_SIZE, PREFIX "%s",
             qlb_uuid_format(checkpoint, uuid));
    return name;
}

bool stock_bitmap_checkpoint(const char *name, struct qlb_uuid *checkpoint)
{
    return strncmp(name, PREFIX, strlen(PREFIX)) == 0 &&
           qlb_uuid_parse(name + strlen(PREFIX), checkpoint);
}

static const char *text_of(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));

    return text == NULL ? "" : text;
}

static bool is_true(const json_t *object, const char *key)
{
    return json_is_true(json_object_get(object, key));
}

/* Whether the bitmap, as query-block and its like describe it, has all changes
 * since its checkpoint. */
static bool is_trusted(const json_t *bitmap, struct qlb_uuid *checkpoint)
{
    return stock_bitmap_checkpoint(text_of(bitmap, "name"), checkpoint) &&
           is_true(bitmap, "recording") && is_true(bitmap, "persistent") &&
           !is_true(bitmap, "inconsistent") && !is_true(bitmap, "busy");
}

static void take_bitmaps(struct source_disk *disk, const json_t *bitmaps)
{
    const json_t *bitmap;
    size_t i;

    json_array_foreach(bitmaps, i, bitmap) {
        if (disk->n_checkpoints < QLB_MAX_CHECKPOINTS &&
            is_trusted(bitmap, &disk->checkpoints[disk->n_checkpoints])) {
            disk->n_checkpoints++;
        }
    }
}

/* Another program's backup job has put a filter on the disk. */
static bool is_backed_up(const json_t *node)
{
    return strcmp(text_of(node, "drv"), "copy-before-write") == 0;
}

/* What makes it a disk of lbvm: NULL, or what is in the way. */
static const char *obstacle(const json_t *node)
{
    if (is_backed_up(node)) {
        return "another program is backing it up";
    }
    if (strcmp(text_of(node, "drv"), "qcow2") != 0) {
        return "it is no qcow2 disk";
    }
    if (is_true(node, "ro")) {
        return "it is read-only";
    }
    if (is_true(node, "encrypted")) {
        return "it is encrypted";
    }
    return NULL;
}

/* ---- a disk ---- */

static int describe(const json_t *node, struct source_disk *disk,
                    struct stock_disk *own, struct qlb_error *err)
{
    const json_t *image = json_object_get(node, "image");
    const json_t *specific = json_object_get(
        json_object_get(image, "format-specific"), "data");
    json_int_t size = json_integer_value(json_object_get(image,
                                                         "virtual-size"));

    if (size <= 0 || *text_of(image, "filename") == '\0' ||
        *text_of(node, "node-name") == '\0') {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: QEMU does not say what "
                        "image it has", disk->name);
    }
    own->size = (uint64_t)size;
    own->can_track = strcmp(text_of(specific, "compat"), "1.1") == 0;
    own->node = strdup(text_of(node, "node-name"));
    disk->filename = strdup(text_of(image, "filename"));
    if (own->node == NULL || disk->filename == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", disk->name);
    }
    take_bitmaps(disk, json_object_get(node, "dirty-bitmaps"));
    return 0;
}

static int add(const json_t *node, const char *name, struct source *source,
               struct stock_disk **disks, struct qlb_error *err)
{
    struct stock_disk *own = realloc(*disks, (source->n_disks + 1) *
                                             sizeof(*own));
    struct source_disk *disk;

    if (own == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", name);
    }
    *disks = own;
    own += source->n_disks;
    memset(own, 0, sizeof(*own));
    disk = source_add_disk(source, name, err);
    return disk == NULL ? -1 : describe(node, disk, own, err);
}

/* ---- which disks ---- */

/* An entry of query-block: by what the disk is known. */
static bool is_called(const json_t *device, const char *name)
{
    return strcmp(text_of(device, "device"), name) == 0 ||
           strcmp(text_of(device, "qdev"), name) == 0 ||
           strcmp(text_of(json_object_get(device, "inserted"), "node-name"),
                  name) == 0;
}

static const char *name_of(const json_t *device)
{
    const char *node = text_of(json_object_get(device, "inserted"),
                               "node-name");

    if (*text_of(device, "device") != '\0') {
        return text_of(device, "device");
    }
    /* QEMU's own names begin with '#', and change. */
    return *node != '#' || *text_of(device, "qdev") == '\0'
               ? node : text_of(device, "qdev");
}

static const json_t *find_node(const json_t *devices, const json_t *nodes,
                               const char *name)
{
    const json_t *entry;
    size_t i;

    json_array_foreach(devices, i, entry) {
        if (*name != '\0' && is_called(entry, name)) {
            return json_object_get(entry, "inserted");
        }
    }
    json_array_foreach(nodes, i, entry) {
        if (strcmp(text_of(entry, "node-name"), name) == 0) {
            return entry;
        }
    }
    return NULL;
}

static int add_named(const json_t *devices, const json_t *nodes,
                     const char *wanted, const char *name,
                     struct source *source, struct stock_disk **disks,
                     struct qlb_error *err)
{
    const json_t *node = find_node(devices, nodes, wanted);
    const char *why = node == NULL ? "QEMU has no such disk" : obstacle(node);

    if (why != NULL) {
        return qlb_fail(err, node != NULL && is_backed_up(node)
                                 ? QLB_E_BUSY : QLB_E_RUNTIME,
                        "%s: %s", name, why);
    }
    return add(node, name, source, disks, err);
}

static int add_all(const json_t *devices, struct source *source,
                   struct stock_disk **disks, struct qlb_error *err)
{
    const json_t *entry;
    size_t i;

    json_array_foreach(devices, i, entry) {
        const json_t *node = json_object_get(entry, "inserted");

        if (node != NULL && is_backed_up(node)) {
            return qlb_fail(err, QLB_E_BUSY, "%s: %s", name_of(entry),
                            obstacle(node));
        }
        if (node != NULL && obstacle(node) == NULL &&
            add(node, name_of(entry), source, disks, err) < 0) {
            return -1;
        }
    }
    if (source->n_disks == 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "no qcow2 disk that the guest "
                        "may write to");
    }
    return 0;
}

int stock_find_disks(struct qmp *qmp, char *const *wanted,
                     char *const *names, unsigned n, struct source *source,
                     struct stock_disk **disks, struct qlb_error *err)
{
    json_t *devices = qmp_call(qmp, "query-block", NULL, err);
    json_t *nodes = devices == NULL ? NULL
                        : qmp_call(qmp, "query-named-block-nodes",
                                   json_pack("{s:b}", "flat", 1), err);
    int ret = nodes == NULL ? -1 : 0;

    if (ret == 0 && n == 0) {
        ret = add_all(devices, source, disks, err);
    }
    for (unsigned i = 0; ret == 0 && i < n; i++) {
        ret = add_named(devices, nodes, wanted[i],
                        names != NULL ? names[i] : wanted[i], source, disks,
                        err);
    }
    json_decref(devices);
    json_decref(nodes);
    return ret;
}
