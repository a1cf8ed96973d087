/* From what the operator names to a source of its disks: images, a monitor, or
 * a libvirt domain.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_CONNECT_H
#define VM_CONNECT_H

#include "vm/source.h"

/* Exactly one of images, socket and domain. */
struct connect_options {
    char **images, **names; /* of a stopped machine; names: NULL where none is
                               given */
    unsigned n_images;
    const char *socket;     /* of QEMU's monitor */
    const char *domain;     /* of libvirt, */
    const char *uri;        /* at that connection; NULL: the default */

    char **disks;           /* only these; none: all */
    unsigned n_disks;
    bool durable;           /* with livebackup */
    const char *scratch;    /* with a stock QEMU; or NULL */
    const struct nbd_way *nbd; /* QEMU is on another host; or NULL */
};

struct connection {
    struct source *source;

    /* private: the disks of a domain that are wanted */
    char **names, **nodes, **files;
    unsigned n;
};

/* The options must outlive the connection, which is to be closed after a
 * failure, too. */
int connect_open(struct connection *connection,
                 const struct connect_options *options,
                 struct qlb_error *err);
void connect_close(struct connection *connection);

#endif
