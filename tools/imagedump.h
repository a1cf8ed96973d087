/* Dumping an image that nobody has open, in full or what has changed.
 *
 * Order of calls: open, dump, finish, confirm, close; close after a failure
 * too.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef IMAGEDUMP_H
#define IMAGEDUMP_H

#include "dump_archive.h"
#include "rescan.h"

struct imagedump {
    /* asked for; archive.path too */
    const char *path;
    bool copy;                  /* the image is left as it is */
    struct dump_request request; /* since: with DUMP_AUTO too, if not zero */
    /* Where livebackup is off: a bitmap of a stock QEMU that has what changed
     * since request.since, when the disk had that many bytes. NULL: none. */
    const char *bitmap;
    uint64_t bitmap_size;
    struct qlb_uuid image_uuid; /* where the image has none; zero: random */
    struct qlb_uuid set;        /* zero: none */
    /* Where it has inputs, the way to an incremental; with DUMP_AUTO only where
     * there is no trust. The label is that of its chain. With DUMP_AUTO and a
     * checkpoint to go on from, that of the newest of the archives, they are not
     * looked at while there is trust, and damage in them makes a full dump. */
    struct rescan rescan;
    const char *distrust;       /* why the bitmaps are not to be gone by, though
                                   the image calls them right; or NULL */
    uint64_t time;              /* seconds since 1970; 0: now */

    /* found and decided */
    struct qlb_image *image;    /* NULL with DUMP_OVERLAY */
    struct qlb_disk *overlay;   /* with DUMP_OVERLAY: the top */
    struct qlb_image *backing;  /* with DUMP_OVERLAY: its backing image */
    const struct qlb_disk *disk;
    bool record;                /* add a checkpoint to the image */
    bool incremental;
    unsigned since_index;
    bool rescanned;             /* incremental, by the rescan */
    char reason[512];           /* why DUMP_AUTO rescans, or makes a full one;
                                   or empty */
    struct qlb_changes *changes;
    struct qlb_disk_reader *overlay_reader;

    struct dump_archive archive;
};

/* Opens the image, with locks, and decides what is to be dumped. */
int imagedump_open(struct imagedump *d, struct qlb_error *err);
/* Tells what an operator may not expect. */
void imagedump_say(const struct imagedump *d);
/* The archive's content is synced afterwards, but the archive is not whole. */
int imagedump_dump(struct imagedump *d, struct qlb_error *err);
/* Adds the checkpoint, unconfirmed; the archive is whole, and has its name. */
int imagedump_finish(struct imagedump *d, struct qlb_error *err);
/* Confirms the checkpoint if the archive is known to be safe. */
int imagedump_confirm(struct imagedump *d, struct qlb_error *err);
void imagedump_close(struct imagedump *d);

#endif
