/* The checkpoints of an image on disk: mending it.
 *
 * First everything is counted without a write: an image with refcounts that
 * are too low is for `qemu-img check -r`, since here anything that is written
 * could land on a cluster in use.  Then what is not trusted goes, by the write
 * order of any other change; last the leaked clusters are freed, which nothing
 * refers to: killed in between, some are leaked still.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include <string.h>

#include "image_state.h"
#include "qcow2_recount.h"

static int recount(struct qlb_image *image, unsigned flags, uint64_t *leaks,
                   struct qlb_error *err)
{
    struct qlb_alloc *alloc = qlb_alloc_open(image->io, image->header, err);
    int ret;

    if (alloc == NULL) {
        return -1;
    }
    ret = qlb_qcow2_recount(image->io, image->header, alloc, flags, leaks,
                            err);
    qlb_alloc_close(alloc);
    return ret;
}

/* Whether the header or the list has to change. Where livebackup is off, its
 * bitmaps and those of others are left as they are. */
static bool needs_cleaning(const struct qlb_image *image)
{
    return image->on &&
           (!image->decoded || qlb_image_untrusted(image) > 0 ||
            image->ext.state != QLB_STATE_NONE ||
            image->seen.unlisted_bitmap ||
            image->directory_state == QLB_DIRECTORY_STALE ||
            image->directory_state == QLB_DIRECTORY_DAMAGED);
}

static int clean(struct qlb_image *image, struct qlb_recovery *recovery,
                 struct qlb_error *err)
{
    unsigned drop = qlb_image_untrusted(image);
    bool clear_state = image->ext.state != QLB_STATE_NONE;

    if (!needs_cleaning(image)) {
        return 0;
    }
    if (qlb_image_clean(image, drop, clear_state, err) < 0) {
        return -1;
    }
    recovery->dropped_checkpoints = drop;
    recovery->cleared_state = clear_state;
    return 0;
}

int qlb_image_recover(struct qlb_image *image, struct qlb_recovery *recovery,
                      struct qlb_error *err)
{
    uint64_t leaks;

    memset(recovery, 0, sizeof(*recovery));
    if (qlb_image_check_writable(image, err) < 0 ||
        recount(image, QLB_RECOUNT_SKIP_BITMAPS, &leaks, err) < 0 ||
        clean(image, recovery, err) < 0 ||
        recount(image, QLB_RECOUNT_FREE, &recovery->freed_clusters,
                err) < 0) {
        return -1;
    }
    return recovery->freed_clusters == 0 ? 0 : qlb_blkio_sync(image->io, err);
}
