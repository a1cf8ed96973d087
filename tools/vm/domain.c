/* A libvirt domain.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/domain.h"

#include <errno.h>
#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>
#include <stdlib.h>
#include <string.h>

#include "vm/domain_disks.h"
#include "vm/domain_qmp.h"

struct domain {
    virConnectPtr connection;
    virDomainPtr handle;
    const char *name; /* the handle's; asking for it would forget an error */
    bool answered;
};

/* ---- connecting ---- */

/* What libvirt would print; errors are returned. */
static void say_nothing(void *opaque, virErrorPtr error)
{
}

static virConnectPtr connect_to(const char *uri, struct qlb_error *err)
{
    virConnectPtr connection;

    virSetErrorFunc(NULL, say_nothing);
    connection = virConnectOpen(uri);
    if (connection == NULL) {
        domain_fail(err, uri == NULL ? "the default connection" : uri);
    }
    return connection;
}

/* A name that looks like a UUID comes first. */
static virDomainPtr look_up(virConnectPtr connection, const char *name)
{
    virDomainPtr handle = virDomainLookupByName(connection, name);
    struct qlb_uuid uuid;

    if (handle == NULL && qlb_uuid_parse(name, &uuid)) {
        handle = virDomainLookupByUUIDString(connection, name);
    }
    return handle;
}

struct domain *domain_open(const char *uri, const char *name,
                           struct qlb_error *err)
{
    struct domain *domain = calloc(1, sizeof(*domain));

    if (domain == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", name);
        return NULL;
    }
    domain->connection = connect_to(uri, err);
    if (domain->connection == NULL) {
        domain_close(domain);
        return NULL;
    }
    domain->handle = look_up(domain->connection, name);
    if (domain->handle == NULL) {
        domain_fail(err, name);
        domain_close(domain);
        return NULL;
    }
    domain->name = virDomainGetName(domain->handle);
    return domain;
}

void domain_close(struct domain *domain)
{
    if (domain == NULL) {
        return;
    }
    if (domain->handle != NULL) {
        virDomainFree(domain->handle);
    }
    if (domain->connection != NULL) {
        virConnectClose(domain->connection);
    }
    free(domain);
}

const char *domain_name(const struct domain *domain)
{
    return domain->name;
}

/* ---- what it is ---- */

int domain_is_running(struct domain *domain, bool *running,
                      struct qlb_error *err)
{
    int active = virDomainIsActive(domain->handle);

    *running = active > 0;
    return active < 0 ? domain_fail(err, domain_name(domain)) : 0;
}

char *domain_xml(struct domain *domain, struct qlb_error *err)
{
    char *xml = virDomainGetXMLDesc(domain->handle, VIR_DOMAIN_XML_INACTIVE);

    if (xml == NULL) {
        domain_fail(err, domain_name(domain));
    }
    return xml;
}

struct qmp *domain_qmp(struct domain *domain, struct qlb_error *err)
{
    return domain_qmp_new(domain->handle, domain_name(domain), err);
}

/* ---- disks ---- */

/* A disk that is described as a volume of a storage pool. */
static int find_volume(struct domain *domain, struct described_disk *disk,
                       struct qlb_error *err)
{
    virStoragePoolPtr pool;
    virStorageVolPtr volume = NULL;

    if (disk->pool == NULL || disk->volume == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: %s: the disk is no file of "
                        "this machine, and can't be backed up",
                        domain_name(domain), disk->target);
    }
    pool = virStoragePoolLookupByName(domain->connection, disk->pool);
    if (pool != NULL) {
        volume = virStorageVolLookupByName(pool, disk->volume);
    }
    if (volume != NULL) {
        disk->file = virStorageVolGetPath(volume);
    }
    if (disk->file == NULL) {
        domain_fail(err, domain_name(domain));
    }
    if (volume != NULL) {
        virStorageVolFree(volume);
    }
    if (pool != NULL) {
        virStoragePoolFree(pool);
    }
    return disk->file == NULL ? -1 : 0;
}

static int describe(struct domain *domain, struct described_disks *list,
                    struct qlb_error *err)
{
    char *xml = virDomainGetXMLDesc(domain->handle, 0);
    int ret;

    if (xml == NULL) {
        return domain_fail(err, domain_name(domain));
    }
    ret = described_disks_parse(list, xml, domain_name(domain), err);
    free(xml);
    for (unsigned i = 0; ret == 0 && i < list->n; i++) {
        if (list->disks[i].file == NULL) {
            ret = find_volume(domain, &list->disks[i], err);
        }
    }
    if (ret < 0) {
        described_disks_release(list);
    }
    return ret;
}

/* target and file become the disk's. */
static void take_described(struct domain_disk *disk,
                           struct described_disk *described)
{
    disk->target = described->target;
    disk->file = described->file;
    described->target = NULL;
    described->file = NULL;
}

static int find_nodes(struct domain *domain, struct described_disks *list,
                      struct domain_disk *disks, struct qlb_error *err)
{
    struct qmp *qmp = domain_qmp(domain, err);
    json_t *blocks = NULL, *nodes = NULL;
    int ret = -1;

    if (qmp != NULL) {
        blocks = qmp_call(qmp, "query-block", NULL, err);
    }
    if (blocks != NULL) {
        nodes = qmp_call(qmp, "query-named-block-nodes",
                         json_pack("{s:b}", "flat", 1), err);
    }
    if (nodes != NULL) {
        ret = 0;
        for (unsigned i = 0; ret == 0 && i < list->n; i++) {
            disks[i].node = described_disk_node(&list->disks[i], blocks,
                                                nodes, domain_name(domain),
                                                err);
            ret = disks[i].node == NULL ? -1 : 0;
        }
    }
    json_decref(blocks);
    json_decref(nodes);
    qmp_close(qmp);
    return ret;
}

int domain_disks(struct domain *domain, struct domain_disk **disks,
                 unsigned *n, struct qlb_error *err)
{
    struct described_disks list;
    bool running;
    int ret;

    *disks = NULL;
    *n = 0;
    if (domain_is_running(domain, &running, err) < 0 ||
        describe(domain, &list, err) < 0) {
        return -1;
    }
    *disks = calloc(list.n + 1, sizeof(**disks));
    ret = *disks == NULL
              ? qlb_fail_errno(err, ENOMEM, "%s", domain_name(domain)) : 0;
    if (ret == 0 && running && list.n > 0) {
        ret = find_nodes(domain, &list, *disks, err);
    }
    for (unsigned i = 0; *disks != NULL && i < list.n; i++) {
        take_described(&(*disks)[i], &list.disks[i]);
    }
    if (ret < 0) {
        domain_free_disks(*disks, *disks == NULL ? 0 : list.n);
        *disks = NULL;
    } else {
        *n = list.n;
    }
    described_disks_release(&list);
    return ret;
}

void domain_free_disks(struct domain_disk *disks, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        free(disks[i].target);
        free(disks[i].file);
        free(disks[i].node);
    }
    free(disks);
}

/* ---- freezing ---- */

/* Asks for the time, a question that does no harm. An agent that refuses it is
 * there. */
int domain_ping_agent(struct domain *domain, struct qlb_error *err)
{
    long long seconds;
    unsigned nanoseconds;

    if (virDomainGetTime(domain->handle, &seconds, &nanoseconds, 0) == 0) {
        return 0;
    }
    switch (virGetLastErrorCode()) {
    case VIR_ERR_INTERNAL_ERROR:
    case VIR_ERR_OPERATION_UNSUPPORTED:
        return 0;
    default:
        return domain_fail(err, domain_name(domain));
    }
}

bool domain_was_answered(const struct domain *domain)
{
    return domain->answered;
}

static int count_of(struct domain *domain, int ret, unsigned *n,
                    struct qlb_error *err)
{
    int code = ret < 0 ? virGetLastErrorCode() : VIR_ERR_OK;

    domain->answered = code != VIR_ERR_AGENT_UNRESPONSIVE &&
                       code != VIR_ERR_OPERATION_TIMEOUT &&
                       code != VIR_ERR_RPC && code != VIR_ERR_SYSTEM_ERROR;
    *n = ret < 0 ? 0 : (unsigned)ret;
    return ret < 0 ? domain_fail(err, domain_name(domain)) : 0;
}

int domain_freeze(struct domain *domain, unsigned *n, struct qlb_error *err)
{
    return count_of(domain, virDomainFSFreeze(domain->handle, NULL, 0, 0), n,
                    err);
}

int domain_thaw(struct domain *domain, unsigned *n, struct qlb_error *err)
{
    return count_of(domain, virDomainFSThaw(domain->handle, NULL, 0, 0), n,
                    err);
}

/* ---- all of them ---- */

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static int copy_names(virDomainPtr *handles, unsigned n, char ***names,
                      struct qlb_error *err)
{
    *names = calloc(n + 1, sizeof(**names));
    for (unsigned i = 0; *names != NULL && i < n; i++) {
        (*names)[i] = strdup(virDomainGetName(handles[i]));
        if ((*names)[i] == NULL) {
            while (i-- > 0) {
                free((*names)[i]);
            }
            free(*names);
            *names = NULL;
        }
    }
    if (*names == NULL) {
        return qlb_fail_errno(err, ENOMEM, "libvirt");
    }
    qsort(*names, n, sizeof(**names), by_name);
    return 0;
}

int domain_list_active(const char *uri, char ***names, unsigned *n,
                       struct qlb_error *err)
{
    virConnectPtr connection = connect_to(uri, err);
    virDomainPtr *handles = NULL;
    int count, ret;

    *names = NULL;
    *n = 0;
    if (connection == NULL) {
        return -1;
    }
    count = virConnectListAllDomains(connection, &handles,
                                     VIR_CONNECT_LIST_DOMAINS_ACTIVE);
    ret = count < 0 ? domain_fail(err, uri == NULL ? "libvirt" : uri)
                    : copy_names(handles, (unsigned)count, names, err);
    for (int i = 0; i < count; i++) {
        virDomainFree(handles[i]);
    }
    free(handles);
    virConnectClose(connection);
    *n = ret < 0 ? 0 : (unsigned)count;
    return ret;
}
