/* Counting what an image refers to, to find leaked clusters.
 *
 * Source of the rules: the qcow2 specification; every structure that refers to
 * host clusters: header, refcounts, active and snapshots' L1 and L2 tables,
 * snapshot table, standard bitmaps.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_QCOW2_RECOUNT_H
#define QLB_QCOW2_RECOUNT_H

#include <stdint.h>

#include "qcow2_alloc.h"

enum qlb_recount_flags {
    QLB_RECOUNT_FREE = 1,        /* set the refcounts of leaked clusters to 0 */
    QLB_RECOUNT_SKIP_BITMAPS = 2, /* a bitmap that can't be walked is no error:
                                     what it refers to is not counted */
    QLB_RECOUNT_LOWER = 4,       /* with FREE: lower also those that are too
                                    high, where no COPIED flag has to follow */
};

/* Compares the refcounts with the references. *leaks: clusters with a refcount
 * that nothing refers to (with LOWER: or that is lowered). QLB_E_DAMAGED where
 * a refcount is too low or the metadata is damaged. A pass for each 2^25 host
 * clusters; 36 MiB of memory at the most. Does not sync. */
int qlb_qcow2_recount(struct qlb_blkio *io,
                      const struct qlb_qcow2_header *header,
                      struct qlb_alloc *alloc, unsigned flags,
                      uint64_t *leaks, struct qlb_error *err);

#endif
