/* A repository of backups (docs/repository.md): objects, locks, and what the
 * manifests of a machine tell together.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_REPOSITORY_H
#define VM_REPOSITORY_H

#include "vm/manifest.h"
#include "vm/store.h"

struct repository;

/* Opens the repository at a location, as store_open. create: makes it where the
 * folder is empty or absent, with that chain label (NULL: its own); where it is
 * there already, a label that differs is QLB_E_USAGE. NULL on failure. */
struct repository *repository_open(const char *location, bool create,
                                   const char *label, struct qlb_error *err);
void repository_close(struct repository *repository); /* NULL is allowed */

struct store *repository_store(const struct repository *repository);
const char *repository_label(const struct repository *repository);

/* The names of all machines, ascending; the caller frees each, and the array. */
int repository_machines(const struct repository *repository, char ***names,
                        unsigned *n, struct qlb_error *err);

bool repository_has_machine(const struct repository *repository,
                            const char *name);

/* 1 to 100 of the characters A-Z a-z 0-9 . _ -, first neither . nor -. */
bool machine_name_valid(const char *name);

struct machine;

/* create: makes its folders where they are not there; else QLB_E_RUNTIME. */
struct machine *machine_open(const struct repository *repository,
                             const char *name, bool create,
                             struct qlb_error *err);
void machine_close(struct machine *machine); /* and its locks; NULL is allowed */

const char *machine_name(const struct machine *machine);
const struct repository *machine_repository(const struct machine *machine);

enum machine_lock {
    MACHINE_READ,   /* archives stay while it is held */
    MACHINE_BACKUP, /* no other backup, no pruning */
    MACHINE_PRUNE,  /* nobody else but who lists */
};

/* At once, or QLB_E_BUSY, telling who is in the way where that is known. A
 * lock is held until the machine is closed. */
int machine_lock(struct machine *machine, enum machine_lock lock,
                 struct qlb_error *err);

/* Reads all manifests anew. One that is damaged is an error: where it counted
 * as absent, pruning would delete what it names. */
int machine_load(struct machine *machine, struct qlb_error *err);

/* In the order they were made in, those that are kept for others too. */
unsigned machine_n_backups(const struct machine *machine);
struct manifest *machine_backup(const struct machine *machine, unsigned i);
/* By ID or by the start of one, "latest" for the newest; not those that are
 * kept for others. QLB_E_RUNTIME: there is none, or several. */
struct manifest *machine_find(const struct machine *machine, const char *id,
                              struct qlb_error *err);
/* That of the last time which is not after this one. */
struct manifest *machine_find_at(const struct machine *machine, uint64_t time,
                                 struct qlb_error *err);

/* The disk entry of that archive in any manifest; NULL: the repository does
 * not have it. */
const struct manifest_disk *
machine_find_archive(const struct machine *machine,
                     const struct qlb_uuid *image,
                     const struct qlb_uuid *checkpoint);

/* The chain of a disk: archives, as manifests name them, the full one first.
 * QLB_E_UNTRUSTED where a link is missing. */
int machine_chain(const struct machine *machine,
                  const struct manifest_disk *disk,
                  struct store_names *objects, struct qlb_error *err);

bool machine_is_remote(const struct machine *machine);
/* As store_path; where it is not remote, a file. */
char *machine_object_path(const struct machine *machine, const char *object);
/* "archives/DISK.UUID-N.lbz", with the first N that no object has; for the
 * caller to free. */
char *machine_archive_object(const struct machine *machine, const char *disk,
                             const struct qlb_uuid *checkpoint,
                             struct qlb_error *err);

/* A small object, as store_get; an archive, as store_fetch. */
int machine_get(const struct machine *machine, const char *object,
                struct store_text *text, struct qlb_error *err);
char *machine_fetch(const struct machine *machine, const char *object,
                    struct qlb_error *err);

/* Writes a small object (a definition, a manifest) whole and synced. */
int machine_put(struct machine *machine, const char *object, const void *data,
                size_t len, struct qlb_error *err);
/* "backups/ID.json", a new one, or anew. */
int machine_put_manifest(struct machine *machine,
                         const struct manifest *manifest,
                         struct qlb_error *err);
int machine_delete(struct machine *machine, const char *object,
                   struct qlb_error *err);

/* Deletes what no manifest names. Wants the lock MACHINE_BACKUP or _PRUNE, and
 * loaded manifests. n: how many; may be NULL. */
int machine_sweep(struct machine *machine, unsigned *n,
                  struct qlb_error *err);

#endif
