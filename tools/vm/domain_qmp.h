/* The monitor of a libvirt domain.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_DOMAIN_QMP_H
#define VM_DOMAIN_QMP_H

#include <libvirt/libvirt.h>

#include "qmp.h"

struct qmp *domain_qmp_new(virDomainPtr handle, const char *name,
                           struct qlb_error *err);

/* What libvirt says of the failure of its last call in this thread, fit for one
 * line; name: what it begins with. Also a call that only asks for a name
 * counts as the last. Returns -1. */
int domain_fail(struct qlb_error *err, const char *name);

#endif
