/* The file that originals are saved in, without I/O.
 *
 * Part of libqcow2lb-core, which the patched QEMU links: libc only, no
 * allocation. Source: live-backup.md ("The orig").
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_ORIG_H
#define QLB_ORIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "uuid.h"

#define QLB_ORIG_HEADER_SIZE 216
#define QLB_ORIG_MAX_CLUSTER_BITS 21
#define QLB_ORIG_ZERO UINT64_C(1) /* an L2 entry, in host order */

struct qlb_orig {
    uint64_t disk_size; /* bytes */
    unsigned unit_bits, cluster_bits;
    uint32_t l1_entries;
    uint64_t l1_offset, l2_offset, data_offset; /* of the file, in bytes */
    struct qlb_uuid image_uuid, set_uuid, checkpoint_uuid;
    struct qlb_uuid parent_uuid; /* zero: every unit is saved */
    uint64_t time; /* seconds since 1970 */
};

/* Sets sizes and offsets, nothing else. False: the disk is larger than such a
 * file can hold (an L1 table of more than 32 MiB, offsets of more than 56
 * bits), or the unit out of range (2^16 to 2^31). */
bool qlb_orig_layout(struct qlb_orig *orig, uint64_t disk_size,
                     unsigned unit_bits);
/* header: QLB_ORIG_HEADER_SIZE bytes. The rest of the first cluster is zero. */
void qlb_orig_encode_header(const struct qlb_orig *orig, void *header);
/* Entries first to first + n - 1 of the L1 table, big-endian. */
void qlb_orig_encode_l1(const struct qlb_orig *orig, uint32_t first, uint32_t n,
                        void *entries);

enum qlb_orig_verdict {
    QLB_ORIG_GOOD,
    QLB_ORIG_FOREIGN, /* no originals: no qcow2, or without the extension */
    QLB_ORIG_UNSUPPORTED, /* of another version */
    QLB_ORIG_DAMAGED, /* of ours, and wrong: checksum, layout, a value */
};
/* data: the first bytes of a file, QLB_ORIG_HEADER_SIZE or more (fewer are
 * foreign); with a whole cluster the extension is found wherever another
 * program may have moved it. orig is only to be used if the verdict is good. */
enum qlb_orig_verdict qlb_orig_decode_header(const void *data, size_t size,
                                             struct qlb_orig *orig);

/* Where the L2 entries of a unit begin in the file; those of units that follow
 * each other do too. */
uint64_t qlb_orig_entries_offset(const struct qlb_orig *orig, uint64_t unit);
/* How many entries a unit has; the last unit of a disk too, though those of
 * clusters behind the end of the disk mean nothing. */
unsigned qlb_orig_entries_per_unit(const struct qlb_orig *orig);
/* Entries, big-endian, of n clusters whose data follows at data_offset, or that
 * are all zero if that is QLB_ORIG_ZERO. */
void qlb_orig_encode_entries(const struct qlb_orig *orig, uint64_t n,
                             uint64_t data_offset, void *entries);

/* What an L2 entry that was read says. */
enum qlb_orig_entry {
    QLB_ORIG_ENTRY_NONE,
    QLB_ORIG_ENTRY_ZERO,
    QLB_ORIG_ENTRY_DATA,
    QLB_ORIG_ENTRY_BAD, /* reserved bits, or not in the data clusters */
};
/* entry: 8 bytes. offset: where the data is, else 0. */
enum qlb_orig_entry qlb_orig_decode_entry(const struct qlb_orig *orig,
                                          const void *entry, uint64_t *offset);

#endif
