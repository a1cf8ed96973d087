/* A running QEMU with livebackup.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "live_session.h"
#include "vm/definition.h"
#include "vm/source.h"

struct qemu {
    struct source source; /* first */
    char *const *nodes, *const *names; /* names: NULL: as the nodes */
    unsigned n_nodes;
    bool durable;
    struct dump_request request; /* of the session */
    struct live_session session;
};

static struct qemu *qemu_of(struct source *source)
{
    return (struct qemu *)source;
}

/* ---- the disks ---- */

/* The node of that name or of the device of that name, as QEMU finds it. */
static const json_t *find_node(const json_t *nodes, const json_t *devices,
                               const char *name)
{
    const json_t *entry;
    size_t i;

    json_array_foreach(devices, i, entry) {
        const char *device = json_string_value(json_object_get(entry,
                                                               "device"));

        if (device != NULL && *name != '\0' && strcmp(device, name) == 0) {
            return json_object_get(entry, "inserted");
        }
    }
    json_array_foreach(nodes, i, entry) {
        const char *node = json_string_value(json_object_get(entry,
                                                             "node-name"));

        if (node != NULL && strcmp(node, name) == 0) {
            return entry;
        }
    }
    return NULL;
}

static int odd_answer(const struct source_disk *disk, const char *what,
                      struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_RUNTIME, "%s: QEMU's answer has no %s",
                    disk->name, what);
}

static int take_checkpoints(struct source_disk *disk,
                            const json_t *checkpoints, struct qlb_error *err)
{
    const json_t *entry;
    size_t i;

    json_array_foreach(checkpoints, i, entry) {
        const char *uuid = json_string_value(json_object_get(entry, "uuid"));

        if (disk->n_checkpoints == QLB_MAX_CHECKPOINTS || uuid == NULL ||
            !qlb_uuid_parse(uuid,
                            &disk->checkpoints[disk->n_checkpoints])) {
            return odd_answer(disk, "valid checkpoints", err);
        }
        disk->n_checkpoints++;
    }
    return 0;
}

/* What query-named-block-nodes says of the disk. One without livebackup is
 * left to livebackup-begin, which says so. */
static int take_node(struct source_disk *disk, const json_t *node,
                     struct qlb_error *err)
{
    const json_t *image = json_object_get(node, "image");
    const json_t *specific = json_object_get(image, "format-specific");
    const json_t *info = json_object_get(json_object_get(specific, "data"),
                                         "livebackup");
    const char *file = json_string_value(json_object_get(image, "filename"));
    const char *uuid = json_string_value(json_object_get(info, "image-uuid"));

    if (node == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: QEMU has no such disk",
                        disk->name);
    }
    disk->filename = file == NULL ? NULL : strdup(file);
    if (disk->filename == NULL ||
        (uuid != NULL && !qlb_uuid_parse(uuid, &disk->image))) {
        return odd_answer(disk, "valid image", err);
    }
    return take_checkpoints(disk, json_object_get(info, "checkpoints"), err);
}

static int list_names(struct qemu *qemu, struct qlb_error *err)
{
    struct live_session *session = &qemu->session;

    if (qemu->n_nodes == 0) {
        return live_session_find(session, err);
    }
    for (unsigned i = 0; i < qemu->n_nodes; i++) {
        if (live_session_add(session, qemu->nodes[i], err) < 0) {
            return -1;
        }
    }
    return 0;
}

/* What people call the node of that name.  QEMU's own names begin with '#', and
 * change: the device's is taken then. */
static const char *name_of(const json_t *devices, const char *node)
{
    const json_t *entry = *node == '#' ? qmp_find_block(devices, node) : NULL;
    const char *device = json_string_value(json_object_get(entry, "device"));
    const char *path = json_string_value(json_object_get(entry, "qdev"));

    return device != NULL && *device != '\0' ? device
           : path != NULL ? path : node;
}

static int take_nodes(struct qemu *qemu, const json_t *nodes,
                      const json_t *devices, struct qlb_error *err)
{
    struct live_session *session = &qemu->session;

    for (unsigned i = 0; i < session->n_disks; i++) {
        const char *node = session->disks[i].name;
        struct source_disk *disk =
            source_add_disk(&qemu->source,
                            qemu->names != NULL ? qemu->names[i]
                                                : name_of(devices, node),
                            err);

        if (disk == NULL ||
            take_node(disk, find_node(nodes, devices, node), err) < 0) {
            return -1;
        }
    }
    return 0;
}

static int qemu_list(struct source *source, struct qlb_error *err)
{
    struct qemu *qemu = qemu_of(source);
    json_t *nodes, *devices = NULL;
    int ret = -1;

    if (list_names(qemu, err) < 0) {
        return -1;
    }
    nodes = qmp_call(qemu->session.qmp, "query-named-block-nodes",
                     json_pack("{s:b}", "flat", 1), err);
    if (nodes != NULL) {
        devices = qmp_call(qemu->session.qmp, "query-block", NULL, err);
    }
    /* Names that were found are those of nodes; a storage daemon has no
     * devices. */
    if (devices != NULL ||
        (nodes != NULL && qemu->n_nodes == 0 &&
         qmp_was_answered(qemu->session.qmp))) {
        ret = take_nodes(qemu, nodes, devices, err);
    }
    json_decref(nodes);
    json_decref(devices);
    if (ret == 0 && source->definition == NULL) {
        source->definition = definition_of_qemu(qemu->session.qmp, err);
        source->definition_type = "json";
        ret = source->definition == NULL ? -1 : 0;
    }
    return ret;
}

/* ---- the backup ---- */

static int open_output(struct live_disk *live, const struct source_disk *disk,
                       const struct dump_request *request,
                       struct qlb_error *err)
{
    live->output = strdup(disk->output);
    if (live->output == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", disk->name);
    }
    live->archive.path = live->output;
    live->since = disk->since;
    live->mode = qlb_uuid_is_zero(&disk->since) ? DUMP_FULL : DUMP_AUTO;
    return dump_archive_open(&live->archive, request, err);
}

static int take_begun(struct source_disk *disk, const struct live_disk *live,
                      struct qlb_error *err)
{
    char *absolute = strdup(live->filename);

    if (absolute == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", disk->name);
    }
    free(disk->filename);
    disk->filename = absolute;
    disk->incremental = live->incremental;
    if (live->reason != NULL) {
        free(disk->reason);
        disk->reason = strdup(live->reason);
    }
    return 0;
}

static int qemu_begin(struct source *source,
                      const struct dump_request *request,
                      struct qlb_error *err)
{
    struct qemu *qemu = qemu_of(source);
    struct live_session *session = &qemu->session;

    qemu->request = *request;
    qemu->request.mode = DUMP_AUTO;
    session->dump = request->dump;
    for (unsigned i = 0; i < source->n_disks; i++) {
        if (open_output(&session->disks[i], &source->disks[i], request,
                        err) < 0) {
            return -1;
        }
    }
    if (live_session_begin(session, err) < 0) {
        return -1;
    }
    source->set = session->set;
    source->time = session->time;
    for (unsigned i = 0; i < source->n_disks; i++) {
        if (take_begun(&source->disks[i], &session->disks[i], err) < 0) {
            return -1;
        }
    }
    return 0;
}

static int qemu_dump(struct source *source,
                     const struct dump_request *request,
                     struct qlb_error *err)
{
    struct live_session *session = &qemu_of(source)->session;

    if (live_session_dump(session, err) < 0 ||
        live_session_commit(session, err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < source->n_disks; i++) {
        source_take_archive(&source->disks[i], &session->disks[i].archive);
    }
    return 0;
}

static int qemu_end(struct source *source, bool success,
                    struct qlb_error *err)
{
    struct live_session *session = &qemu_of(source)->session;

    return session->ended ? 0 : live_session_end(session, success, err);
}

static void qemu_free(struct source *source)
{
    struct qemu *qemu = qemu_of(source);

    live_session_release(&qemu->session);
    source_release_disks(source);
    free(qemu);
}

static const struct source_ops qemu_ops = {
    .kind = "qemu",
    .list = qemu_list,
    .begin = qemu_begin,
    .dump = qemu_dump,
    .end = qemu_end,
    .free = qemu_free,
};

struct source *source_qemu_new(struct qmp *qmp, const char *target,
                               char *const *nodes, char *const *names,
                               unsigned n, bool durable)
{
    struct qemu *qemu = calloc(1, sizeof(*qemu));

    if (qemu == NULL) {
        qmp_close(qmp);
        return NULL;
    }
    qemu->source.ops = &qemu_ops;
    qemu->nodes = nodes;
    qemu->names = names;
    qemu->n_nodes = n;
    qemu->request.mode = DUMP_AUTO;
    qemu->session.target = target;
    qemu->session.request = &qemu->request;
    qemu->session.durable = durable;
    qemu->session.qmp = qmp;
    live_session_init(&qemu->session);
    return &qemu->source;
}
