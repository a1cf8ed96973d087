/* A libvirt domain, through libvirt's own interface.
 *
 * Errors of all functions begin with the domain's name, or with the URI where
 * the connection is what is wrong. Without libvirt (--without-libvirt) opening
 * and listing fail.
 *
 * A connection must not be used by two processes: whoever forks opens another.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_DOMAIN_H
#define VM_DOMAIN_H

#include "qmp.h"

struct domain;

/* uri: NULL for libvirt's default. name: of the domain, or its UUID. NULL on
 * failure. */
struct domain *domain_open(const char *uri, const char *name,
                           struct qlb_error *err);
void domain_close(struct domain *domain); /* NULL is allowed */

const char *domain_name(const struct domain *domain);

/* Whether it has a QEMU, which may be paused. */
int domain_is_running(struct domain *domain, bool *running,
                      struct qlb_error *err);

/* What `virsh define` makes the domain of again, for the caller to free. It is
 * without the passwords of consoles (libvirt's "security sensitive" part):
 * it goes into repositories, and nothing of a disk depends on them. */
char *domain_xml(struct domain *domain, struct qlb_error *err);

/* A qcow2 disk in a file that the guest may write to. */
struct domain_disk {
    char *target; /* "vda" */
    char *file;
    char *node;   /* of the qcow2 format on top; NULL: the domain doesn't run */
};

/* All such disks; there may be none. domain_free_disks releases them. */
int domain_disks(struct domain *domain, struct domain_disk **disks,
                 unsigned *n, struct qlb_error *err);
void domain_free_disks(struct domain_disk *disks, unsigned n);

/* The monitor of its QEMU, by way of libvirt, which then marks the domain as
 * tainted. Outlives the domain's closing. */
struct qmp *domain_qmp(struct domain *domain, struct qlb_error *err);

/* Whether the agent in the guest answers. */
int domain_ping_agent(struct domain *domain, struct qlb_error *err);

/* All file systems that the agent in the guest can freeze, or thaw; n: how many
 * these were. They wait for libvirt without a time limit. */
int domain_freeze(struct domain *domain, unsigned *n, struct qlb_error *err);
int domain_thaw(struct domain *domain, unsigned *n, struct qlb_error *err);

/* Whether the last of these was answered, be it with an error: it is done, or
 * won't be. */
bool domain_was_answered(const struct domain *domain);

/* The names of all domains that run, ascending; the caller frees each, and the
 * array. */
int domain_list_active(const char *uri, char ***names, unsigned *n,
                       struct qlb_error *err);

#endif
