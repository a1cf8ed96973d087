/* The checkpoints of an image on disk: rollback in place.
 *
 * The changes of the list that begin and finish it are in image_update.c; what
 * lies between is qcow2_patch.c's.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "checked.h"
#include "image_state.h"
#include "qcow2_recount.h"

#define MIN_CLUSTER_SIZE 4096 /* the header is changed by one atomic write */

bool qlb_image_is_unfinished(const struct qlb_image *image)
{
    return (image->header->incompatible & QLB_INCOMPAT_ROLLBACK) != 0;
}

static uint64_t l1_entries(const struct qlb_image *image, uint64_t size)
{
    unsigned bits = 2 * image->header->cluster_bits -
                    (image->header->extended_l2 ? 4 : 3);

    return div_round_up(size, UINT64_C(1) << bits);
}

uint32_t qlb_image_l1_entries(const struct qlb_image *image, uint64_t size)
{
    return (uint32_t)l1_entries(image, size);
}

static int check_size(const struct qlb_image *image, uint64_t size,
                      struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = image->header;

    if (size == header->virtual_size) {
        return 0;
    }
    if (header->backing_name != NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the image has a backing "
                        "file and the disk had another size then; such a "
                        "disk can't be rolled back in place",
                        image->io->name);
    }
    if (l1_entries(image, size) * 8 > QLB_MAX_L1_BYTES ||
        (image->on && image->decoded &&
         div_round_up(size, UINT64_C(1) << image->ext.granularity_bits) >
             QLB_BITMAP_BITS_MAX)) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the disk was larger then "
                        "than this image can be", image->io->name);
    }
    return 0;
}

int qlb_image_check_rollback(const struct qlb_image *image, uint64_t size,
                             struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = image->header;
    const char *name = image->io->name;

    if (qlb_image_check_writable(image, err) < 0) {
        return -1;
    }
    if (image->disk == NULL) {
        *err = image->disk_error;
        return -1;
    }
    if (header->version < 3) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: a rollback in place needs "
                        "qcow2 version 3; convert the image with: qemu-img "
                        "amend -f qcow2 -o compat=1.1 %s", name, name);
    }
    if (header->cluster_size < MIN_CLUSTER_SIZE) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: a rollback in place needs "
                        "clusters of %d bytes or more", name,
                        MIN_CLUSTER_SIZE);
    }
    if (header->data_file != NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: a disk with an external "
                        "data file can't be rolled back in place", name);
    }
    if (image->on && !image->decoded) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s: %s (%s); first run: lbctl "
                        "recover %s", name, qlb_trust_reason(image->trust),
                        qlb_trust_keyword(image->trust), name);
    }
    return check_size(image, size, err);
}

struct qlb_patch *qlb_image_patch(struct qlb_image *image,
                                  struct qlb_error *err)
{
    return qlb_patch_open(image->io, image->header, image->disk, err);
}

int qlb_image_free_leaks(struct qlb_image *image, struct qlb_error *err)
{
    struct qlb_alloc *alloc = qlb_alloc_open(image->io, image->header, err);
    uint64_t leaks = 0;
    int ret;

    if (alloc == NULL) {
        return -1;
    }
    ret = qlb_qcow2_recount(image->io, image->header, alloc,
                            QLB_RECOUNT_FREE | QLB_RECOUNT_LOWER, &leaks, err);
    qlb_alloc_close(alloc);
    return ret < 0 || leaks == 0 ? ret : qlb_blkio_sync(image->io, err);
}
