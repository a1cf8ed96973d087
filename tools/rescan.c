/* What has changed since a chain of archives, found by its digests.
 *
 * The set holds, besides the blocks that differ, the one in which the disk was
 * cut or has grown: a restore takes nothing of it from the parent
 * (lbz-format.md, "Units" and "clip"). No clip is needed, since what differs is
 * told against the whole state of the parent, and not against some point of
 * its history.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "rescan.h"

int rescan_open(struct rescan *rescan, struct qlb_error *err)
{
    rescan->chain = qlb_chain_open(rescan->inputs, rescan->n_inputs, NULL,
                                   QLB_CHAIN_NEED_FULL | QLB_CHAIN_ALLOW_INDEX,
                                   err);
    return rescan->chain == NULL ? -1 : 0;
}

void rescan_close(struct rescan *rescan)
{
    block_set_release(&rescan->set);
    qlb_chain_close(rescan->chain);
    rescan->chain = NULL;
}

bool rescan_has_file(const struct rescan *rescan, const struct stat *st)
{
    struct stat other;

    for (unsigned i = 0; i < rescan->n_inputs; i++) {
        if (stat(rescan->inputs[i], &other) == 0 &&
            other.st_dev == st->st_dev && other.st_ino == st->st_ino) {
            return true;
        }
    }
    return false;
}

bool rescan_is_named(const struct rescan *rescan, const struct qlb_error *err)
{
    for (unsigned i = 0; i < rescan->n_inputs; i++) {
        if (tool_names(err, rescan->inputs[i])) {
            return true;
        }
    }
    return false;
}

static int block_differs(void *opaque, uint64_t offset, struct qlb_error *err)
{
    struct rescan *rescan = opaque;

    return block_set_add(&rescan->set, offset, QLB_LBZ_BLOCK, err);
}

int rescan_run(struct rescan *rescan, const struct qlb_disk *disk,
               const char *path, const struct compare_options *options,
               struct qlb_error *err)
{
    uint64_t then = qlb_chain_header(rescan->chain)->virtual_size;
    uint64_t now = qlb_disk_size(disk);
    uint64_t edge = then < now ? then : now;
    struct compare_options compare = *options;
    uint64_t blocks;

    compare.differs = block_differs;
    compare.opaque = rescan;
    if (compare_open_disk(rescan->chain, disk, path, now, &compare, &blocks,
                          err) < 0) {
        return -1;
    }
    if (then != now && edge % QLB_LBZ_BLOCK != 0) {
        return block_set_add(&rescan->set, edge, 1, err);
    }
    return 0;
}

int rescan_next(void *opaque, uint64_t offset, uint64_t *start,
                uint64_t *length, struct qlb_error *err)
{
    struct rescan *rescan = opaque;
    const struct block_set *set = &rescan->set;
    uint64_t block = offset / QLB_LBZ_BLOCK;
    size_t i = block_set_find(set, block / QLB_LBZ_PAGE_BLOCKS);

    (void)err;
    *length = 0;
    for (; i < set->n_pages; i++) {
        const struct block_page *page = &set->pages[i];
        uint64_t first = page->number * QLB_LBZ_PAGE_BLOCKS;
        uint64_t b = block > first ? block - first : 0;

        while (b < QLB_LBZ_PAGE_BLOCKS && !qlb_bit_test(page->mask, b)) {
            b++;
        }
        if (b == QLB_LBZ_PAGE_BLOCKS) {
            continue;
        }
        *start = (first + b) * QLB_LBZ_BLOCK;
        while (b < QLB_LBZ_PAGE_BLOCKS && qlb_bit_test(page->mask, b)) {
            b++;
            *length += QLB_LBZ_BLOCK;
        }
        break;
    }
    return 0;
}
