/* What restore and export have in common: the backup that is asked for, and the
 * chains of its disks.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_RESTORABLE_H
#define VM_RESTORABLE_H

#include "vm/options.h"

struct restorable {
    struct vm_options common;
    const char *name; /* of the machine */
    const char *id;   /* NULL: the newest, or that of `at` */
    bool has_at;
    uint64_t at;

    struct repository *repository;
    struct machine *machine;   /* MACHINE_READ is held */
    struct manifest *manifest;
};

/* Takes MACHINE and ID from the command line. */
void restorable_parse(struct restorable *restorable, int argc, char **argv);
/* Finds the backup. Returns an exit status; the message is out then. */
int restorable_open(struct restorable *restorable);
void restorable_close(struct restorable *restorable);

/* The disk of that name; QLB_E_RUNTIME, telling which there are. */
const struct manifest_disk *restorable_disk(const struct restorable *from,
                                            const char *name,
                                            struct qlb_error *err);
/* The disk's name, with what can't be in that of a file replaced; for the caller
 * to free. NULL where memory is short. */
char *restorable_file_name(const struct manifest_disk *disk,
                           struct qlb_error *err);
/* All archives that the disk needs, opened; they are those that the manifests
 * tell of. NULL on failure; errors begin with the disk. */
struct qlb_chain *restorable_chain(const struct restorable *from,
                                   const struct manifest_disk *disk,
                                   struct qlb_error *err);
/* After a failure that is about archives: what else can be done. */
void restorable_hint(const struct restorable *from, int status);

#endif
