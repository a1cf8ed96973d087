/* A machine as the source of a backup: what all kinds share.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/source.h"
#include "vm/stock_disks.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct source_disk *source_add_disk(struct source *source, const char *name,
                                    struct qlb_error *err)
{
    struct source_disk *disks = realloc(source->disks,
                                        (source->n_disks + 1) *
                                        sizeof(*disks));

    if (disks == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", name);
        return NULL;
    }
    source->disks = disks;
    disks += source->n_disks;
    memset(disks, 0, sizeof(*disks));
    disks->name = strdup(name);
    if (disks->name == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", name);
        return NULL;
    }
    source->n_disks++;
    return disks;
}

static void take_bitmap(void *opaque, const char *name)
{
    struct source_disk *disk = opaque;

    if (disk->n_checkpoints < QLB_MAX_CHECKPOINTS &&
        stock_bitmap_checkpoint(name,
                                &disk->checkpoints[disk->n_checkpoints])) {
        disk->n_checkpoints++;
    }
}

int source_read_image(struct source_disk *disk, struct qlb_error *err)
{
    struct qlb_image *image = qlb_image_open(disk->filename,
                                             QLB_IMAGE_NO_LOCK, err);
    const struct qlb_ext *ext;

    if (image == NULL) {
        return -1;
    }
    ext = qlb_image_ext(image);
    if (ext != NULL) {
        disk->image = ext->image_uuid;
        disk->n_checkpoints = ext->n_checkpoints;
        for (unsigned i = 0; i < ext->n_checkpoints; i++) {
            disk->checkpoints[i] = ext->checkpoints[i].uuid;
        }
    } else {
        qlb_image_each_bitmap(image, take_bitmap, disk);
    }
    qlb_image_close(image);
    return 0;
}

void source_take_archive(struct source_disk *disk,
                         const struct dump_archive *archive)
{
    disk->archive.header = archive->header;
    disk->archive.totals = archive->totals;
    memcpy(disk->archive.root, archive->root, sizeof(archive->root));
}

void source_release_disks(struct source *source)
{
    for (unsigned i = 0; i < source->n_disks; i++) {
        struct source_disk *disk = &source->disks[i];

        dump_archive_close(&disk->archive);
        free(disk->name);
        free(disk->filename);
        free(disk->output);
        for (unsigned k = 0; k < disk->n_chain; k++) {
            free(disk->chain[k]);
        }
        free(disk->chain);
        free(disk->bitmap);
        free(disk->reason);
    }
    free(source->definition);
    source->definition = NULL;
    free(source->disks);
    source->disks = NULL;
    source->n_disks = 0;
}
