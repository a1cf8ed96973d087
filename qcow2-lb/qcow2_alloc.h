/* Host clusters of an image that is open for writing: refcounts.
 *
 * A transaction: clusters are allocated in memory, then commit writes the
 * refcounts and syncs; only then may the clusters be written and referenced.
 * Freeing is for what nothing on disk references any more.  Killed at any
 * point, clusters are leaked at worst.
 *
 * Source of the rules: the qcow2 specification, "Host cluster management".
 * Refcounts are believed, so the caller refuses images whose dirty or corrupt
 * bit is set.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_QCOW2_ALLOC_H
#define QLB_QCOW2_ALLOC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "blkio.h"
#include "error.h"
#include "qcow2_header.h"

struct qlb_alloc;

/* Entries of a refcount block are 1 << order bits wide. index: of the entry. */
uint64_t qlb_refcount_get(const uint8_t *block, unsigned order,
                          uint64_t index);
void qlb_refcount_set(uint8_t *block, unsigned order, uint64_t index,
                      uint64_t value);

/* Whether [offset, offset + length) touches the header's cluster, the
 * refcount table, the active L1 table or the bitmap directory. */
bool qlb_qcow2_is_metadata(const struct qlb_qcow2_header *header,
                           uint64_t offset, uint64_t length);

/* Reads the refcount table. Both io and header must outlive the object; the
 * header is written (as it is then) when the table has to move. */
struct qlb_alloc *qlb_alloc_open(struct qlb_blkio *io,
                                 struct qlb_qcow2_header *header,
                                 struct qlb_error *err);
void qlb_alloc_close(struct qlb_alloc *alloc);

/* Clusters that one refcount block describes. */
uint64_t qlb_alloc_block_entries(const struct qlb_alloc *alloc);
/* Number of blocks that the refcount table has room for, and the offset of
 * one of them; 0: it is absent, all its refcounts are 0. */
uint64_t qlb_alloc_blocks(const struct qlb_alloc *alloc);
uint64_t qlb_alloc_block_offset(const struct qlb_alloc *alloc,
                                uint64_t index);

/* Reserves `count` contiguous clusters, in memory. *offset: in the file. */
int qlb_alloc_clusters(struct qlb_alloc *alloc, uint64_t count,
                       uint64_t *offset, struct qlb_error *err);

/* Writes what was reserved and syncs. */
int qlb_alloc_commit(struct qlb_alloc *alloc, struct qlb_error *err);

/* Gives back all that was reserved since qlb_alloc_open, committed or not:
 * for a caller that failed before it referenced any of it. */
int qlb_alloc_abandon(struct qlb_alloc *alloc, struct qlb_error *err);

/* Lowers the refcounts of clusters, given by ascending offsets, by one; those
 * that are 0 stay 0. Nothing may be reserved and uncommitted. Does not
 * sync. */
int qlb_alloc_free(struct qlb_alloc *alloc, const uint64_t *offsets,
                   size_t count, struct qlb_error *err);

/* The blocks as they are on disk, for a recount. buf: one cluster. */
int qlb_alloc_read_block(struct qlb_alloc *alloc, uint64_t index,
                         uint8_t *buf, struct qlb_error *err);
/* Writes the entries first..last of a block back. Does not sync. */
int qlb_alloc_write_block(struct qlb_alloc *alloc, uint64_t index,
                          const uint8_t *buf, uint64_t first, uint64_t last,
                          struct qlb_error *err);

#endif
