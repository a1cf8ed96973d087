/* What a domain's description, and its QEMU, tell of its disks.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/domain_disks.h"

#include <errno.h>
#include <libxml/parser.h>
#include <libxml/xpath.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the description ---- */

static xmlNode *child_of(const xmlNode *node, const char *name)
{
    for (xmlNode *child = node->children; child != NULL; child = child->next) {
        if (child->type == XML_ELEMENT_NODE &&
            strcmp((const char *)child->name, name) == 0) {
            return child;
        }
    }
    return NULL;
}

/* A copy of the attribute of a child, NULL where there is none. */
static char *attribute(const xmlNode *disk, const char *element,
                       const char *name)
{
    xmlNode *node = child_of(disk, element);
    xmlChar *text = node == NULL ? NULL : xmlGetProp(node,
                                                     (const xmlChar *)name);
    char *copy = text == NULL ? NULL : strdup((const char *)text);

    xmlFree(text);
    return copy;
}

static bool attribute_is(const xmlNode *disk, const char *element,
                         const char *name, const char *value)
{
    char *text = attribute(disk, element, name);
    bool equal = text != NULL && strcmp(text, value) == 0;

    free(text);
    return equal;
}

/* What is written to a transient disk ends with the domain. */
static bool is_wanted(xmlNode *disk)
{
    xmlChar *device = xmlGetProp(disk, (const xmlChar *)"device");
    bool is_disk = device == NULL ||
                   strcmp((const char *)device, "disk") == 0;

    xmlFree(device);
    return is_disk && attribute_is(disk, "driver", "type", "qcow2") &&
           child_of(disk, "readonly") == NULL &&
           child_of(disk, "transient") == NULL;
}

static void release_disk(struct described_disk *disk)
{
    free(disk->target);
    free(disk->file);
    free(disk->pool);
    free(disk->volume);
    free(disk->alias);
    free(disk->index);
}

static int add_disk(struct described_disks *list, const xmlNode *node,
                    const char *name, struct qlb_error *err)
{
    struct described_disk *disk;
    struct described_disk *disks =
        realloc(list->disks, (list->n + 1) * sizeof(*disks));

    if (disks == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", name);
    }
    list->disks = disks;
    disk = &disks[list->n++];
    disk->target = attribute(node, "target", "dev");
    disk->file = attribute(node, "source", "file");
    if (disk->file == NULL) {
        disk->file = attribute(node, "source", "dev");
    }
    disk->pool = attribute(node, "source", "pool");
    disk->volume = attribute(node, "source", "volume");
    disk->alias = attribute(node, "alias", "name");
    disk->index = attribute(node, "source", "index");
    if (disk->target == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: a disk in libvirt's "
                        "description has no target", name);
    }
    return 0;
}

static int add_disks(struct described_disks *list, xmlXPathContext *context,
                     const char *name, struct qlb_error *err)
{
    xmlXPathObject *found = xmlXPathEvalExpression(
        (const xmlChar *)"/domain/devices/disk", context);
    const xmlNodeSet *set = found == NULL ? NULL : found->nodesetval;
    int ret = found == NULL ? qlb_fail_errno(err, ENOMEM, "%s", name) : 0;

    for (int i = 0; ret == 0 && set != NULL && i < set->nodeNr; i++) {
        if (is_wanted(set->nodeTab[i])) {
            ret = add_disk(list, set->nodeTab[i], name, err);
        }
    }
    xmlXPathFreeObject(found);
    return ret;
}

int described_disks_parse(struct described_disks *list, const char *xml,
                          const char *name, struct qlb_error *err)
{
    xmlDoc *document = xmlReadMemory(xml, (int)strlen(xml), NULL, NULL,
                                     XML_PARSE_NONET | XML_PARSE_NOERROR |
                                     XML_PARSE_NOWARNING);
    xmlXPathContext *context = NULL;
    int ret;

    list->disks = NULL;
    list->n = 0;
    if (document != NULL) {
        context = xmlXPathNewContext(document);
    }
    ret = context == NULL
              ? qlb_fail(err, QLB_E_RUNTIME, "%s: libvirt's description of it "
                         "can't be parsed", name)
              : add_disks(list, context, name, err);
    xmlXPathFreeContext(context);
    xmlFreeDoc(document);
    if (ret < 0) {
        described_disks_release(list);
    }
    return ret;
}

void described_disks_release(struct described_disks *list)
{
    for (unsigned i = 0; i < list->n; i++) {
        release_disk(&list->disks[i]);
    }
    free(list->disks);
    list->disks = NULL;
    list->n = 0;
}

/* ---- the nodes ---- */

static const char *string_of(const json_t *object, const char *key)
{
    return json_string_value(json_object_get(object, key));
}

static bool equal(const char *a, const char *b)
{
    return a != NULL && b != NULL && strcmp(a, b) == 0;
}

/* The ID of a device is a component of its path, where it is not all that QEMU
 * tells: "/machine/peripheral/virtio-disk0/virtio-backend". */
static bool has_component(const char *path, const char *alias)
{
    size_t len = strlen(alias);

    while (path != NULL && len > 0) {
        path += *path == '/';
        if (strncmp(path, alias, len) == 0 &&
            (path[len] == '/' || path[len] == '\0')) {
            return true;
        }
        path = strchr(path, '/');
    }
    return false;
}

/* A node of the image that the guest may write to. */
static const char *usable(const json_t *node)
{
    return equal(string_of(node, "drv"), "qcow2") &&
           !json_is_true(json_object_get(node, "ro"))
               ? string_of(node, "node-name") : NULL;
}

/* What the device of the disk has on top, which may be a filter. */
static const char *node_of_device(const json_t *blocks, const char *alias)
{
    const json_t *block;
    size_t i;

    json_array_foreach(blocks, i, block) {
        if (has_component(string_of(block, "qdev"), alias)) {
            return usable(json_object_get(block, "inserted"));
        }
    }
    return NULL;
}

/* By the name that libvirt gives it; by the file, which QEMU doesn't tell of an
 * image that was given its backing file by name. */
static const char *node_below(const json_t *nodes,
                              const struct described_disk *disk)
{
    const json_t *node;
    char name[64] = "";
    size_t i;

    if (disk->index != NULL) {
        snprintf(name, sizeof(name), "libvirt-%s-format", disk->index);
    }
    json_array_foreach(nodes, i, node) {
        if (usable(node) != NULL &&
            (equal(usable(node), name) ||
             equal(string_of(json_object_get(node, "image"), "filename"),
                   disk->file))) {
            return usable(node);
        }
    }
    return NULL;
}

char *described_disk_node(const struct described_disk *disk,
                          const json_t *blocks, const json_t *nodes,
                          const char *name, struct qlb_error *err)
{
    const char *node = NULL;
    char *copy;

    if (disk->alias != NULL) {
        node = node_of_device(blocks, disk->alias);
    }
    if (node == NULL) {
        node = node_below(nodes, disk);
    }
    if (node == NULL) {
        qlb_fail(err, QLB_E_RUNTIME, "%s: %s: QEMU has no node for '%s' that "
                 "can be backed up", name, disk->target, disk->file);
        return NULL;
    }
    copy = strdup(node);
    if (copy == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", name);
    }
    return copy;
}
