/* The manifest of a backup (docs/repository.md).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_MANIFEST_H
#define VM_MANIFEST_H

#include "tool.h"

/* Strings are the manifest's; NULL where the key is absent or null. */
struct manifest_disk {
    char *name, *filename;
    struct qlb_uuid checkpoint, parent; /* parent: zero for a full one */
    struct qlb_uuid image;
    uint64_t size;        /* bytes, of the disk */
    char *archive;        /* relative to the machine's folder */
    uint64_t bytes;       /* of the archive */
    char *digest, *root;
    char *reason;         /* "" where there is none */
    char *bitmap;         /* from a stock QEMU only, else NULL */
};

struct manifest {
    char *id, *machine;
    struct qlb_uuid set;
    uint64_t sequence;    /* 1 for the machine's first backup, and so on */
    uint64_t time, finished; /* seconds since 1970 */
    char *label, *source;
    bool quiesced;
    char *definition;     /* NULL: none */
    char *kept_for;       /* NULL: an ordinary backup */
    struct manifest_disk *disks;
    unsigned n_disks;
};

struct manifest *manifest_new(void);
void manifest_free(struct manifest *manifest); /* NULL is allowed */

/* A further disk, all zero. */
struct manifest_disk *manifest_add_disk(struct manifest *manifest);
/* The disk of that name, or NULL. */
struct manifest_disk *manifest_find_disk(const struct manifest *manifest,
                                         const char *name);

/* Whether that is the archive of the disk: the same UUIDs, size and root. */
bool manifest_describes(const struct manifest_disk *disk,
                        const struct qlb_lbz_reader *reader);

/* QLB_E_DAMAGED where it is none; what is hostile in it (names that lead out
 * of the machine's folder, numbers out of range) too. */
struct manifest *manifest_from_json(const json_t *json,
                                    struct qlb_error *err);
json_t *manifest_to_json(const struct manifest *manifest);

/* "20261123T141258Z-1a2b3c4d" */
#define MANIFEST_ID_SIZE 32
char *manifest_make_id(uint64_t time, const struct qlb_uuid *set,
                       char id[MANIFEST_ID_SIZE]);

#endif
