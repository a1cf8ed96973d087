/* The partitions of a disk: GPT, or MBR with logical ones. Disks are hostile.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_PARTITIONS_H
#define VM_PARTITIONS_H

#include "tool.h"

enum { PARTITIONS_MAX = 128 };

struct partition {
    unsigned number;         /* as the kernel counts, from 1 */
    uint64_t offset, length; /* bytes, within the disk */
};

/* Those of the disk that fd reads, at most PARTITIONS_MAX of them, in the order
 * of the table; entries that make no sense are left out. The number of them;
 * 0: there is no table; -1: reading failed. size: of the disk, bytes. */
int partitions_read(int fd, uint64_t size,
                    struct partition list[PARTITIONS_MAX],
                    struct qlb_error *err);

#endif
