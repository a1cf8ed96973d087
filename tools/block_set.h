/* A set of blocks of a disk: what is to be rewritten, or has changed.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BLOCK_SET_H
#define BLOCK_SET_H

#include "tool.h"

struct block_page {
    uint64_t number; /* guest offset / QLB_LBZ_PAGE */
    uint8_t mask[QLB_LBZ_PAGE_BLOCKS / 8];
};

/* Begin with one that is all zero. Memory follows the pages that have blocks
 * in the set: 2 MiB for each TiB. */
struct block_set {
    struct block_page *pages; /* ascending */
    size_t n_pages, room;
};

void block_set_release(struct block_set *set);

/* Adds every block that [offset, offset + length) touches. Ascending ranges
 * are fast. */
int block_set_add(struct block_set *set, uint64_t offset, uint64_t length,
                  struct qlb_error *err);

/* The same of all that the image's bitmaps say has changed since its checkpoint
 * of that index. QLB_E_UNTRUSTED where they can't be trusted. */
int block_set_add_changes(struct block_set *set, struct qlb_image *image,
                          unsigned since, struct qlb_error *err);

/* Whether the block at offset is in it. */
bool block_set_has(const struct block_set *set, uint64_t offset);

/* Index of the first page at or after that number; n_pages: none. */
size_t block_set_find(const struct block_set *set, uint64_t number);

#endif
