/* From which backup in the repository a disk goes on.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_PARENT_H
#define VM_PARENT_H

#include "vm/repository.h"
#include "vm/source.h"

/* The newest backup of the disk whose checkpoint the image has, whose chain is
 * whole, and whose archive has that digest (as in manifests); NULL: why tells
 * why there is none. All backups are looked at: disk->ours tells which of the
 * image's checkpoints are the repository's, and disk->image, where the image
 * has no UUID, is that of the earlier backups. */
const struct manifest_disk *parent_find(const struct machine *machine,
                                        struct source_disk *disk,
                                        const char *digest,
                                        struct qlb_error *why);

/* The newest backup of a disk with that image UUID, of which all is here, whose
 * archive has that digest; NULL: there is none. */
const struct manifest_disk *parent_newest(const struct machine *machine,
                                          const struct source_disk *disk,
                                          const char *digest);

#endif
