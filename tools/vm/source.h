/* A machine as the source of a backup. What QEMU with livebackup, a stock QEMU
 * and images that nobody has open differ in is behind these functions.
 *
 * Order of calls: list, then for each disk what is wanted is filled in, then
 * begin, dump, and end. Errors begin with the disk's file, or with what the
 * machine is reached by.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_SOURCE_H
#define VM_SOURCE_H

#include "dump_archive.h"

struct source_disk {
    /* list */
    char *name;            /* for people, and unique: "vda", node name, ... */
    char *filename;        /* of the image */
    struct qlb_uuid image; /* zero: not known yet */
    struct qlb_uuid checkpoints[QLB_MAX_CHECKPOINTS]; /* in the image */
    unsigned n_checkpoints;
    bool ours[QLB_MAX_CHECKPOINTS]; /* wanted: the repository has a backup of
                                       that one */

    /* What is wanted, filled in before begin. */
    struct qlb_uuid since; /* the parent; zero: a full one */
    uint64_t since_size;   /* bytes, of the disk then */
    char *output;          /* path of the archive */
    /* Of images alone: archives up to `since`, with whose digests the disk is
     * compared where there is no trusted way; may be none. */
    char **chain;
    unsigned n_chain;
    bool has_parent;       /* the image has the checkpoint `since` */
    const char *distrust;  /* why its bitmaps are not to be gone by, or NULL */

    /* begin */
    char *bitmap;          /* of a stock QEMU: tracks from now on; or NULL */
    bool incremental;
    bool rescanned;        /* incremental, by comparing */
    char *reason;          /* why it is none, or was compared; NULL: nothing
                              to say */

    /* dump: header, root, totals; whole and synced, and has its name */
    struct dump_archive archive;
};

struct source;

struct source_ops {
    const char *kind; /* "images", "qemu", "qemu-stock", as in a manifest */
    int (*list)(struct source *source, struct qlb_error *err);
    /* One point in time for all disks. A disk that has no trusted way from its
     * `since` gets a full one. After a failure nothing has begun. */
    int (*begin)(struct source *source, const struct dump_request *request,
                 struct qlb_error *err);
    int (*dump)(struct source *source, const struct dump_request *request,
                struct qlb_error *err);
    /* success: all archives are safe, and the manifest is written: checkpoints
     * are confirmed. Else, after a begin, nothing of it remains but
     * unconfirmed checkpoints. */
    int (*end)(struct source *source, bool success, struct qlb_error *err);
    void (*free)(struct source *source);
};

struct source {
    const struct source_ops *ops;
    struct source_disk *disks;
    unsigned n_disks;
    char *definition;    /* list: of the machine, as text; NULL: none */
    const char *definition_type; /* "json", "xml" */
    struct qlb_uuid set; /* begin */
    uint64_t time;       /* begin: seconds since 1970 */
};

/* For implementations: a further disk, all zero but its name (copied). */
struct source_disk *source_add_disk(struct source *source, const char *name,
                                    struct qlb_error *err);
/* list, for a disk whose file is named: what the image tells of itself; where
 * livebackup is off, the checkpoints of a stock QEMU's bitmaps. */
int source_read_image(struct source_disk *disk, struct qlb_error *err);
/* dump: takes what a manifest tells of the archive. */
void source_take_archive(struct source_disk *disk,
                         const struct dump_archive *archive);
/* The disks and the definition, with all their strings. */
void source_release_disks(struct source *source);

/* All of these only keep what they are told. nodes: disks as QEMU calls them; n
 * 0: all that can be backed up. names: of each for people, NULL: the same. */
struct qmp;
struct source *source_images_new(char *const *names, char *const *paths,
                                 unsigned n);
/* qmp: a connection, which becomes the source's; target: its name in messages. */
struct source *source_qemu_new(struct qmp *qmp, const char *target,
                               char *const *nodes, char *const *names,
                               unsigned n, bool durable);
/* scratch: folder for what the guest overwrites meanwhile (NULL: that of the
 * first disk's image); way: to a QEMU on another host, on which the folder is,
 * too (NULL: it is on this one). */
struct nbd_way;
struct source *source_stock_new(struct qmp *qmp, char *const *nodes,
                                char *const *names, unsigned n,
                                const char *scratch,
                                const struct nbd_way *way);

#endif
