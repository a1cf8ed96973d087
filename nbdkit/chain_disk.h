/* A chain of archives as a disk that is read at random: index pages loaded when
 * they are needed, decompressed frames cached, all of it within a set memory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef CHAIN_DISK_H
#define CHAIN_DISK_H

#include "qcow2lb.h"

struct chain_disk;

#define CHAIN_DISK_MEMORY_MIN (UINT64_C(32) << 20)

/* Opens a chain that begins with a full archive; only headers and trailers are
 * read. memory: bytes, at least CHAIN_DISK_MEMORY_MIN. threads: that many
 * decode at once. NULL on failure. */
struct chain_disk *chain_disk_open(const char *const *paths, unsigned n_paths,
                                   const struct qlb_uuid *at, uint64_t memory,
                                   unsigned threads, struct qlb_error *err);
void chain_disk_close(struct chain_disk *disk); /* NULL is allowed */

uint64_t chain_disk_size(const struct chain_disk *disk); /* bytes */

/* From any thread, within the disk. Each block is checked against its digest;
 * an error begins with the archive, and is that of this range alone. */
int chain_disk_read(struct chain_disk *disk, void *buf, uint64_t offset,
                    uint64_t length, struct qlb_error *err);

/* Whether there is data at offset (else it reads as zeroes), and for how many
 * bytes at least; at most `length`. */
int chain_disk_extent(struct chain_disk *disk, uint64_t offset,
                      uint64_t length, bool *data, uint64_t *run,
                      struct qlb_error *err);

#endif
