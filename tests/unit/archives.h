/* Archives for tests: made from a plan that gives each block of the disk a
 * number, checked against it, damaged, and sealed again.
 *
 * Uses nothing of cmocka; what can't go wrong in a sound test aborts.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef ARCHIVES_H
#define ARCHIVES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "lbz_reader.h"
#include "lbz_writer.h"

/* What a block of a plan is: one of these, or the number of its content. */
enum { ABSENT = 0, ZERO = 1, FIRST_CONTENT = 2 };

/* Contents of that number and above are only in dead blocks. */
#define DEAD_CONTENT 0x80000000u

struct plan {
    struct qlb_lbz_header header;
    const uint32_t *blocks; /* one for each block of the virtual size */
    /* 0: frames as a dump makes them. Otherwise the seed for frames with dead
     * blocks, whose live blocks interleave, as after merges. */
    uint64_t seed;
};

struct archive {
    uint8_t *data;
    size_t size;
};

/* splitmix64: the next number below `below`. */
uint64_t draw(uint64_t *state, uint64_t below);

/* A header that needs no more than what differs. */
struct qlb_lbz_header plain_header(uint64_t virtual_size, unsigned number);

/* UUID number n: n in its last bytes. */
struct qlb_uuid numbered_uuid(unsigned n);

/* 64 KiB of a content. */
void fill_block(uint32_t content, uint8_t *block);

size_t plan_blocks(const struct plan *plan);
void write_plan(const struct plan *plan, struct qlb_outfile *out);
struct archive make_archive(const struct plan *plan);
void save_archive(const struct archive *archive, const char *path);
void free_archive(struct archive *archive);

/* Computes checksums and digests again, as far as the structures can be found,
 * so that a changed field meets its own check and not a digest's. */
void reseal(uint8_t *data, size_t size);

/* Reads all of an archive, through the index or front to back. blocks, which
 * may be NULL, gets the content of every present block as a plan has it;
 * UINT32_MAX where it is none of fill_block's. 0, or -1 and the error. */
int read_by_index(const void *data, size_t size, uint32_t *blocks,
                  struct qlb_error *err);
int read_by_stream(const void *data, size_t size, uint32_t *blocks,
                   struct qlb_error *err);

#endif
