/* From which backup in the repository a disk goes on.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/parent.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Which of the image's checkpoints it is: an index, or -1. */
static int find_checkpoint(const struct source_disk *disk,
                           const struct qlb_uuid *uuid)
{
    for (unsigned i = 0; i < disk->n_checkpoints; i++) {
        if (qlb_uuid_equal(&disk->checkpoints[i], uuid)) {
            return (int)i;
        }
    }
    return -1;
}

/* Whether the entry, of an earlier backup, is of this disk: it has the image's
 * UUID. An image without one is known by where it is. */
static bool is_of(const struct manifest_disk *entry,
                  const struct source_disk *disk)
{
    return qlb_uuid_is_zero(&disk->image)
               ? strcmp(entry->name, disk->name) == 0 &&
                 strcmp(entry->filename, disk->filename) == 0
               : qlb_uuid_equal(&entry->image, &disk->image);
}

/* Archives of one chain have the same digest, or can't be read together. */
static bool has_digest(const struct manifest_disk *disk, const char *digest,
                       struct qlb_error *why)
{
    if (strcmp(disk->digest, digest) != 0) {
        qlb_fail(why, QLB_E_UNTRUSTED, "the last backup has the digest %s, "
                 "and not %s", disk->digest, digest);
        return false;
    }
    return true;
}

static bool all_readable(const struct machine *machine,
                         const struct store_names *objects,
                         struct qlb_error *err)
{
    bool readable = true;

    for (unsigned i = 0; i < objects->n && readable; i++) {
        char *path = machine_object_path(machine, objects->at[i]);

        if (path == NULL || access(path, R_OK) < 0) {
            qlb_fail_errno(err, path == NULL ? ENOMEM : errno, "%s",
                           path == NULL ? objects->at[i] : path);
            readable = false;
        }
        free(path);
    }
    return readable;
}

/* Whether all archives that it needs are there. */
static bool is_whole(const struct machine *machine,
                     const struct manifest_disk *disk, struct qlb_error *err)
{
    struct store_names objects;
    bool whole;

    if (machine_chain(machine, disk, &objects, err) < 0) {
        return false;
    }
    whole = machine_is_remote(machine) ||
            all_readable(machine, &objects, err);
    store_names_release(&objects);
    return whole;
}

/* Looks at one entry of an earlier backup; true: it can be gone on from. */
static bool consider(const struct machine *machine, const char *digest,
                     struct source_disk *disk,
                     const struct manifest_disk *entry,
                     const struct manifest_disk **known,
                     struct qlb_error *why)
{
    int i = find_checkpoint(disk, &entry->checkpoint);

    if (i < 0 && !is_of(entry, disk)) {
        return false;
    }
    if (i >= 0) {
        disk->ours[i] = true;
    }
    if (*known == NULL) {
        *known = entry;
        qlb_fail(why, QLB_E_UNTRUSTED, "the image has no checkpoint of a "
                 "backup in the repository that can be trusted");
    }
    return i >= 0 && has_digest(entry, digest, why) &&
           is_whole(machine, entry, why);
}

const struct manifest_disk *parent_find(const struct machine *machine,
                                        struct source_disk *disk,
                                        const char *digest,
                                        struct qlb_error *why)
{
    const struct manifest_disk *found = NULL, *known = NULL;
    struct qlb_error ignored;

    qlb_fail(why, QLB_E_UNTRUSTED, "the repository has no backup of this disk "
             "yet");
    for (unsigned i = machine_n_backups(machine); i-- > 0;) {
        const struct manifest *manifest = machine_backup(machine, i);

        for (unsigned k = 0; k < manifest->n_disks; k++) {
            const struct manifest_disk *entry = &manifest->disks[k];

            if (consider(machine, digest, disk, entry, &known,
                         found == NULL ? why : &ignored) && found == NULL) {
                found = entry;
            }
        }
    }
    /* Archives of a chain are of one image. */
    if (qlb_uuid_is_zero(&disk->image) && known != NULL) {
        disk->image = found != NULL ? found->image : known->image;
    }
    return found;
}

const struct manifest_disk *parent_newest(const struct machine *machine,
                                          const struct source_disk *disk,
                                          const char *digest)
{
    struct qlb_error ignored;

    for (unsigned i = machine_n_backups(machine); i-- > 0;) {
        const struct manifest *manifest = machine_backup(machine, i);

        for (unsigned k = 0; k < manifest->n_disks; k++) {
            const struct manifest_disk *entry = &manifest->disks[k];

            if (qlb_uuid_equal(&entry->image, &disk->image) &&
                has_digest(entry, digest, &ignored) &&
                is_whole(machine, entry, &ignored)) {
                return entry;
            }
        }
    }
    return NULL;
}
