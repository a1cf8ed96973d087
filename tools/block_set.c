/* A set of blocks of a disk: what is to be rewritten, or has changed.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "block_set.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* 256 TiB of changed blocks: more than anybody rolls back, less than what a
 * damaged image could ask for. */
#define PAGES_MAX ((size_t)1 << 20)

void block_set_release(struct block_set *set)
{
    free(set->pages);
    *set = (struct block_set) { 0 };
}

size_t block_set_find(const struct block_set *set, uint64_t number)
{
    size_t low = 0, high = set->n_pages;

    if (high > 0 && set->pages[high - 1].number < number) {
        return high;
    }
    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if (set->pages[middle].number < number) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static int grow(struct block_set *set, struct qlb_error *err)
{
    size_t room = set->room * 2 + 16;
    struct block_page *grown;

    if (set->n_pages == PAGES_MAX) {
        return qlb_fail(err, QLB_E_RUNTIME, "too much has changed");
    }
    grown = realloc(set->pages, room * sizeof(*grown));
    if (grown == NULL) {
        return qlb_fail_errno(err, ENOMEM, "listing what has changed");
    }
    set->pages = grown;
    set->room = room;
    return 0;
}

static struct block_page *get_page(struct block_set *set, uint64_t number,
                                   struct qlb_error *err)
{
    size_t i = block_set_find(set, number);

    if (i < set->n_pages && set->pages[i].number == number) {
        return &set->pages[i];
    }
    if (set->n_pages == set->room && grow(set, err) < 0) {
        return NULL;
    }
    memmove(&set->pages[i + 1], &set->pages[i],
            (set->n_pages - i) * sizeof(set->pages[0]));
    set->n_pages++;
    set->pages[i] = (struct block_page) { .number = number };
    return &set->pages[i];
}

int block_set_add(struct block_set *set, uint64_t offset, uint64_t length,
                  struct qlb_error *err)
{
    uint64_t block = offset / QLB_LBZ_BLOCK;
    uint64_t end = length == 0 ? block
                               : (offset + length - 1) / QLB_LBZ_BLOCK + 1;

    while (block < end) {
        uint64_t number = block / QLB_LBZ_PAGE_BLOCKS;
        uint64_t last = (number + 1) * QLB_LBZ_PAGE_BLOCKS;
        struct block_page *page = get_page(set, number, err);

        if (page == NULL) {
            return -1;
        }
        for (; block < end && block < last; block++) {
            qlb_bit_set(page->mask, block % QLB_LBZ_PAGE_BLOCKS);
        }
    }
    return 0;
}

int block_set_add_changes(struct block_set *set, struct qlb_image *image,
                          unsigned since, struct qlb_error *err)
{
    struct qlb_changes *changes = qlb_image_changes(image, since, err);
    uint64_t offset = 0, length = 0;
    int ret = changes == NULL ? -1 : 0;

    while (ret == 0) {
        ret = qlb_changes_next(changes, offset, &offset, &length, err);
        if (ret < 0 || length == 0) {
            break;
        }
        ret = block_set_add(set, offset, length, err);
        offset += length;
    }
    qlb_changes_free(changes);
    return ret;
}

bool block_set_has(const struct block_set *set, uint64_t offset)
{
    uint64_t block = offset / QLB_LBZ_BLOCK;
    uint64_t number = block / QLB_LBZ_PAGE_BLOCKS;
    size_t i = block_set_find(set, number);

    return i < set->n_pages && set->pages[i].number == number &&
           qlb_bit_test(set->pages[i].mask, block % QLB_LBZ_PAGE_BLOCKS);
}
