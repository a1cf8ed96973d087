/* Writes a new qcow2 image front to back, for restore.
 *
 * Version 3, clusters of 64 KiB, 16-bit refcounts. Clusters are allocated one
 * after the other in ascending guest order, L2 tables between them, so that
 * only one L2 table and the L1 table are in memory; all refcounts are 1 and
 * are written at the end; the header is written last, so that an unfinished
 * file is no qcow2 image. qemu-img check finds neither errors nor leaks.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_QCOW2_WRITER_H
#define QLB_QCOW2_WRITER_H

#include <stdint.h>

#include "error.h"
#include "outfile.h"

struct qlb_qcow2_writer;

/* virtual_size in bytes (a multiple of 512). out is a named output, empty,
 * and must outlive the writer. */
struct qlb_qcow2_writer *qlb_qcow2_writer_new(struct qlb_outfile *out,
                                              uint64_t virtual_size,
                                              struct qlb_error *err);

/* Allocates `clusters` clusters of 64 KiB for the guest range at `offset` (a
 * multiple of 65536); the range must not cross an L2 table, i.e. a multiple of
 * 512 MiB. L2 tables ascend over calls; within one the order is free, but no
 * cluster comes twice. *host gets the file offset at which the caller writes
 * the content (before finish, in any order, from any thread). The clusters are
 * contiguous. Not to be called by two threads at once. */
int qlb_qcow2_writer_allocate(struct qlb_qcow2_writer *writer,
                              uint64_t offset, unsigned clusters,
                              uint64_t *host, struct qlb_error *err);

/* Has `clusters` clusters at `offset`, which may be in several L2 tables, read as
 * zeroes whatever a backing file has there. For the rest as allocate; each of
 * those tables takes 64 KiB of the file. */
int qlb_qcow2_writer_zero(struct qlb_qcow2_writer *writer, uint64_t offset,
                          uint64_t clusters, struct qlb_error *err);

/* What is not allocated is that of a backing file, of this name and format, as
 * qlb_qcow2_header_set_backing; they must outlive the writer. Not looked at
 * before finish. */
void qlb_qcow2_writer_set_backing(struct qlb_qcow2_writer *writer,
                                  const char *name, const char *format);

/* A persistent bitmap to be stored; bits are clear but for two. */
struct qlb_qcow2_writer_bitmap {
    const char *name;
    unsigned granularity_bits;
};

/* Writes what is left: last L2 table, L1 table, the bitmap `bitmap` (may be
 * NULL; type 1, flag auto, first and last granule set), its directory and
 * extension, refcounts, and last the header, with the extension
 * QLB_EXT_LIVEBACKUP holding `ext` (QLB_EXT_LIVEBACKUP_SIZE bytes; NULL: none,
 * then no autoclear bit 62 either) and the feature name table. Does not sync. */
int qlb_qcow2_writer_finish(struct qlb_qcow2_writer *writer,
                            const struct qlb_qcow2_writer_bitmap *bitmap,
                            const void *ext, struct qlb_error *err);
void qlb_qcow2_writer_free(struct qlb_qcow2_writer *writer);

#endif
