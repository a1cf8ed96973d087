/* Writing guest data into an existing image.
 *
 * For an image that is locked for writing, and marked so that nobody takes
 * its content for good before all is done: what is written has no order.  The
 * metadata has: killed at any point, clusters are leaked at worst.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_QCOW2_PATCH_H
#define QLB_QCOW2_PATCH_H

#include <stdint.h>

#include "error.h"
#include "qcow2_map.h"

struct qlb_patch;

/* io, header and disk (which is open over them) must outlive the object. The
 * L1 table may reach beyond the disk's size, and so may what is written. The
 * image has no external data file, and clusters of 4096 bytes or more. */
struct qlb_patch *qlb_patch_open(struct qlb_blkio *io,
                                 struct qlb_qcow2_header *header,
                                 const struct qlb_disk *disk,
                                 struct qlb_error *err);
/* What was not flushed is leaked. NULL is allowed. */
void qlb_patch_close(struct qlb_patch *patch);

/* offset and length: multiples of 64 KiB, or of the cluster size where that
 * is smaller. All of it lies within the L1 table. Where an entry of a table
 * breaks the specification QLB_E_DAMAGED. */
int qlb_patch_write(struct qlb_patch *patch, const void *buf, uint64_t offset,
                    uint64_t length, struct qlb_error *err);
/* The range reads as zeroes: clusters that lie in it whole are given up. What
 * has no tables is passed over in bulk. */
int qlb_patch_zero(struct qlb_patch *patch, uint64_t offset, uint64_t length,
                   struct qlb_error *err);

/* All of it is in the file, and synced. */
int qlb_patch_flush(struct qlb_patch *patch, struct qlb_error *err);

#endif
