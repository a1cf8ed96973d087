/* The standard bitmaps extension of qcow2: directory, tables, data.
 *
 * Source of the rules: the qcow2 specification, "Bitmaps extension" and
 * "Bitmaps".  Knows nothing of livebackup.  What stands in the image is
 * hostile; the maxima below are met before memory is taken.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_QCOW2_BITMAPS_H
#define QLB_QCOW2_BITMAPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "blkio.h"
#include "error.h"
#include "qcow2_format.h"
#include "qcow2_header.h"

/* QEMU takes no bitmap with more bits. */
#define QLB_BITMAP_BITS_MAX (UINT64_C(1) << 29)

#define QLB_BITMAP_FLAGS_KNOWN                                                \
    (QLB_BITMAP_IN_USE | QLB_BITMAP_AUTO | QLB_BITMAP_EXTRA_COMPATIBLE)

/* Values of a table entry that is no offset. */
#define QLB_BITMAP_ZEROES UINT64_C(0)
#define QLB_BITMAP_ONES UINT64_C(1)

struct qlb_bitmap_entry {
    uint64_t table_offset;
    uint32_t table_entries;
    uint32_t flags;
    uint8_t type;
    uint8_t granularity_bits;
    uint16_t name_size;
    uint32_t extra_size;
    const uint8_t *extra; /* into the directory's data */
    const char *name;     /* not terminated; into the directory's data */
};

/* The directory as on disk; the entries are well-formed by themselves, which
 * says nothing of their tables. */
struct qlb_bitmap_directory {
    uint8_t *data;
    size_t size, allocated;
    uint32_t count;
};

/* Reads and checks the directory that the header names. QLB_E_DAMAGED where
 * it breaks the specification; QLB_E_RUNTIME where it could not be read, or
 * has flags that only a later version can know. */
int qlb_bitmap_directory_read(struct qlb_blkio *io,
                              const struct qlb_qcow2_header *header,
                              struct qlb_bitmap_directory *directory,
                              struct qlb_error *err);
void qlb_bitmap_directory_release(struct qlb_bitmap_directory *directory);

/* Steps through the entries; *position begins with 0. */
bool qlb_bitmap_directory_next(const struct qlb_bitmap_directory *directory,
                               size_t *position,
                               struct qlb_bitmap_entry *entry);

/* Adds an entry at the end; begin with a directory that is all zero. */
int qlb_bitmap_directory_append(struct qlb_bitmap_directory *directory,
                                const struct qlb_bitmap_entry *entry,
                                struct qlb_error *err);

/* Writes it, padded with zeroes to whole clusters. */
int qlb_bitmap_directory_write(struct qlb_blkio *io,
                               const struct qlb_qcow2_header *header,
                               const struct qlb_bitmap_directory *directory,
                               uint64_t offset, struct qlb_error *err);

/* Entries that the table of a bitmap of that granularity has, for the present
 * virtual size. */
uint64_t qlb_bitmap_table_entries(const struct qlb_qcow2_header *header,
                                  unsigned granularity_bits);
/* Whether QEMU takes such a bitmap for the present virtual size. */
bool qlb_bitmap_size_possible(const struct qlb_qcow2_header *header,
                              unsigned granularity_bits);

/* Whether the table lies within the file and on no other metadata. */
bool qlb_bitmap_table_in_range(struct qlb_blkio *io,
                               const struct qlb_qcow2_header *header,
                               const struct qlb_bitmap_entry *entry);

/* Reads and checks a whole table: zeroes, ones or cluster offsets within the
 * file; as many as the present virtual size asks for. *table is the caller's
 * to free. QLB_E_DAMAGED as above. */
int qlb_bitmap_table_read(struct qlb_blkio *io,
                          const struct qlb_qcow2_header *header,
                          const struct qlb_bitmap_entry *entry,
                          uint64_t **table, struct qlb_error *err);
/* Writes a table, padded with zeroes to whole clusters. */
int qlb_bitmap_table_write(struct qlb_blkio *io,
                           const struct qlb_qcow2_header *header,
                           const uint64_t *table, uint32_t entries,
                           uint64_t offset, struct qlb_error *err);

/* Calls fn for each range of host clusters that the bitmap takes: its table,
 * then its data, piece by piece; memory does not grow with the table. Stops
 * where fn does not return 0 and returns that. */
typedef int qlb_bitmap_cluster_fn(void *opaque, uint64_t offset,
                                  uint64_t length, struct qlb_error *err);
int qlb_bitmap_each_cluster(struct qlb_blkio *io,
                            const struct qlb_qcow2_header *header,
                            const struct qlb_bitmap_entry *entry,
                            qlb_bitmap_cluster_fn *fn, void *opaque,
                            struct qlb_error *err);

/* One bit of a bitmap whose table was read; bit lies within the table. */
int qlb_bitmap_read_bit(struct qlb_blkio *io,
                        const struct qlb_qcow2_header *header,
                        const uint64_t *table, uint64_t bit, bool *value,
                        struct qlb_error *err);

/* data: one cluster of bits, of the table's entry. It is ORed into. */
int qlb_bitmap_or_cluster(struct qlb_blkio *io,
                          const struct qlb_qcow2_header *header,
                          uint64_t table_entry, uint8_t *data, uint8_t *work,
                          struct qlb_error *err);

#endif
