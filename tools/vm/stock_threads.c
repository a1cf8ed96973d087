/* Disks of an iothread, which an old QEMU can't export without danger.
 *
 * An export is served by the thread of its disk.  Before QEMU 9.0 that thread
 * also closes the connection, which is the main loop's business: QEMU aborts,
 * where it looks (since its fix of CVE-2024-7409, which distributions have in
 * older ones, too), and the guest with it, be it that we are done or that we
 * were killed.  So such a disk is refused before anything is begun.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/stock_disks.h"

#include <stdlib.h>
#include <string.h>

enum { SAFE_MAJOR = 9 };

static int find_version(struct qmp *qmp, int *major, struct qlb_error *err)
{
    json_t *answer = qmp_call(qmp, "query-version", NULL, err);

    *major = (int)json_integer_value(
        json_object_get(json_object_get(answer, "qemu"), "major"));
    json_decref(answer);
    return answer == NULL ? -1 : 0;
}

/* A property that is a text: for the caller to free; NULL: there is none. */
static char *get_text(struct qmp *qmp, const char *path, const char *property)
{
    struct qlb_error ignored;
    json_t *answer = qmp_call(qmp, "qom-get",
                              json_pack("{s:s, s:s}", "path", path,
                                        "property", property), &ignored);
    char *text = json_is_string(answer) ? strdup(json_string_value(answer))
                                        : NULL;

    json_decref(answer);
    return text;
}

static bool has_thread(struct qmp *qmp, const char *path)
{
    char *thread = get_text(qmp, path, "iothread");
    bool has = thread != NULL && *thread != '\0';

    free(thread);
    return has;
}

/* The device's own, or that of the controller whose bus it is on. */
static bool is_in_thread(struct qmp *qmp, const char *device)
{
    char *bus, *slash;
    bool in = has_thread(qmp, device);

    if (in) {
        return true;
    }
    bus = get_text(qmp, device, "parent_bus");
    slash = bus == NULL ? NULL : strrchr(bus, '/');
    if (slash != NULL) {
        *slash = '\0';
        in = has_thread(qmp, bus);
    }
    free(bus);
    return in;
}

static int look(struct qmp *qmp, const struct source *source,
                const struct stock_disk *disks, struct qlb_error *err)
{
    json_t *devices = qmp_call(qmp, "query-block", NULL, err);
    int ret = devices == NULL ? -1 : 0;

    for (unsigned i = 0; ret == 0 && i < source->n_disks; i++) {
        const char *device = json_string_value(json_object_get(
            qmp_find_block(devices, disks[i].node), "qdev"));

        if (device != NULL && is_in_thread(qmp, device)) {
            ret = qlb_fail(err, QLB_E_UNTRUSTED, "%s: it is in an iothread, "
                           "and a QEMU older than 9.0 may crash when such a "
                           "disk was read; take it out of the iothread, or "
                           "name the other disks with --disk",
                           source->disks[i].name);
        }
    }
    json_decref(devices);
    return ret;
}

int stock_check_threads(struct qmp *qmp, const struct source *source,
                        const struct stock_disk *disks, struct qlb_error *err)
{
    json_t *threads;
    size_t n;
    int major;

    if (find_version(qmp, &major, err) < 0) {
        return -1;
    }
    if (major >= SAFE_MAJOR) {
        return 0;
    }
    threads = qmp_call(qmp, "query-iothreads", NULL, err);
    n = json_array_size(threads);
    json_decref(threads);
    if (threads == NULL) {
        return -1;
    }
    return n == 0 ? 0 : look(qmp, source, disks, err);
}
