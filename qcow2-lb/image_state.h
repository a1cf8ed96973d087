/* What image.c, image_changes.c, image_update.c, image_recover.c,
 * image_rollback.c and live.c share: the state of an open image. Of no
 * interest to others.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_IMAGE_STATE_H
#define QLB_IMAGE_STATE_H

#include "image.h"
#include "qcow2_bitmaps.h"

enum qlb_directory_state {
    QLB_DIRECTORY_NONE,       /* no bitmaps extension */
    QLB_DIRECTORY_STALE,      /* autoclear bit 0 is clear: by the standard its
                                 content means nothing, its clusters may have
                                 been freed and given to others */
    QLB_DIRECTORY_GOOD,
    QLB_DIRECTORY_DAMAGED,    /* breaks the specification */
    QLB_DIRECTORY_UNREADABLE, /* could not be read: directory_error */
};

/* The bitmap of one checkpoint. */
struct qlb_image_bitmap {
    bool found;                     /* the directory names it */
    struct qlb_bitmap_entry entry;  /* points into the directory */
    struct qlb_trust_bitmap seen;
    enum qlb_trust trust;           /* rules 14 to 17, of this one alone */
};

struct qlb_image {
    struct qlb_blkio *io;
    struct qlb_qcow2_header *header;
    struct qlb_disk *disk;          /* NULL: disk_error tells why */
    struct qlb_error disk_error;
    bool writable;
    bool lost; /* a header write failed: what the file holds is not known */

    /* All below is made anew by qlb_image_load_state. */
    bool on;                        /* there is an extension of ours */
    bool decoded;                   /* ext is valid */
    struct qlb_ext ext;
    enum qlb_directory_state directory_state;
    struct qlb_error directory_error;
    struct qlb_bitmap_directory directory;
    struct qlb_trust_image seen;
    enum qlb_trust trust;           /* rules 1 to 13 */
    struct qlb_image_bitmap bitmaps[QLB_MAX_CHECKPOINTS];

    bool may_undo; /* the newest one was added by this object */
};

/* Derives the state from the header in memory and the bitmaps on disk. */
int qlb_image_load_state(struct qlb_image *image, struct qlb_error *err);

/* Fails with the reason, as QLB_E_UNTRUSTED. */
int qlb_image_fail_trust(const struct qlb_image *image, enum qlb_trust trust,
                         struct qlb_error *err);

/* As qlb_image_trust_since, of the bitmaps i to until - 1. Without the newest
 * one a power loss does no harm: the others were synced when they were frozen. */
enum qlb_trust qlb_image_trust_between(const struct qlb_image *image,
                                       unsigned i, unsigned until);

/* Whether nobody but tracking writers has changed the image or its backing
 * files: what was written last may be missing, at worst. */
bool qlb_image_is_left_alone(const struct qlb_image *image);

/* Number of checkpoints at the front of the list that are not trusted. */
unsigned qlb_image_untrusted(const struct qlb_image *image);

/* Whether the image may be written at all; the message says what to do. */
int qlb_image_check_writable(const struct qlb_image *image,
                             struct qlb_error *err);

/* Entries that the L1 table must have for a disk of that size. */
uint32_t qlb_image_l1_entries(const struct qlb_image *image, uint64_t size);

/* For recover: drops the first `drop` checkpoints, bitmaps of ours that are
 * not listed, and a directory that means nothing; replaces a damaged
 * extension; gives up a backup. */
int qlb_image_clean(struct qlb_image *image, unsigned drop, bool clear_state,
                    struct qlb_error *err);

#endif
