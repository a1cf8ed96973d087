/* Domains where lbvm was built without libvirt.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/domain.h"

static int without(struct qlb_error *err, const char *what)
{
    return qlb_fail(err, QLB_E_RUNTIME, "%s: this lbvm was built without "
                    "libvirt (configure --with-libvirt)", what);
}

struct domain *domain_open(const char *uri, const char *name,
                           struct qlb_error *err)
{
    without(err, name);
    return NULL;
}

void domain_close(struct domain *domain)
{
}

const char *domain_name(const struct domain *domain)
{
    return "";
}

int domain_is_running(struct domain *domain, bool *running,
                      struct qlb_error *err)
{
    return without(err, "libvirt");
}

char *domain_xml(struct domain *domain, struct qlb_error *err)
{
    without(err, "libvirt");
    return NULL;
}

int domain_disks(struct domain *domain, struct domain_disk **disks,
                 unsigned *n, struct qlb_error *err)
{
    return without(err, "libvirt");
}

void domain_free_disks(struct domain_disk *disks, unsigned n)
{
}

struct qmp *domain_qmp(struct domain *domain, struct qlb_error *err)
{
    without(err, "libvirt");
    return NULL;
}

int domain_ping_agent(struct domain *domain, struct qlb_error *err)
{
    return without(err, "libvirt");
}

bool domain_was_answered(const struct domain *domain)
{
    return true;
}

int domain_freeze(struct domain *domain, unsigned *n, struct qlb_error *err)
{
    return without(err, "libvirt");
}

int domain_thaw(struct domain *domain, unsigned *n, struct qlb_error *err)
{
    return without(err, "libvirt");
}

int domain_list_active(const char *uri, char ***names, unsigned *n,
                       struct qlb_error *err)
{
    return without(err, uri == NULL ? "libvirt" : uri);
}
