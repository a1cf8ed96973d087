/* Reading a disk of a running backup as it was when the backup began.
 *
 * The patched QEMU has the image open and goes on writing to it; what it
 * overwrites it saves in the orig before. Both are read here from another
 * process of the same host, without locks, by the protocol of live-backup.md
 * ("Reading it from another process"). Where QEMU was killed meanwhile, image
 * and orig can be read in the same way ("An interrupted backup").
 *
 * As with qlb_disk: a `struct qlb_live` is shared by threads, each of which
 * reads through a `struct qlb_live_reader` of its own.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_LIVE_H
#define QLB_LIVE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include "error.h"
#include "image.h"
#include "qcow2_map.h"
#include "uuid.h"

struct qlb_live;
struct qlb_live_reader;

enum qlb_live_flags {
    QLB_LIVE_DIRECT = 1, /* read the image past the page cache: QEMU does */
};

/* Opens the image and the orig of a backup that has begun, and checks that
 * they are of that set and that checkpoint. NULL on failure; QLB_E_RUNTIME,
 * "the backup was broken", where the image says that it is over. */
struct qlb_live *qlb_live_open(const char *image, const char *orig,
                               const struct qlb_uuid *set,
                               const struct qlb_uuid *checkpoint,
                               unsigned flags, struct qlb_error *err);
/* The same for a backup whose QEMU was killed, whichever it was. The image is
 * locked, as a reader does or, with `write`, as a writer: qlb_live_image() may
 * be changed then. QLB_E_UNTRUSTED where image and orig are no longer what the
 * disk was, with the reason. */
struct qlb_live *qlb_live_open_interrupted(const char *image, const char *orig,
                                           bool write, struct qlb_error *err);
void qlb_live_close(struct qlb_live *live); /* NULL is allowed */

/* The image, as it was read at open; its extension is there. The disk, which
 * is there too, tells sizes and files, but its content is not that at T. Both
 * are owned by `live`. */
struct qlb_image *qlb_live_image(struct qlb_live *live);
const struct qlb_disk *qlb_live_disk(const struct qlb_live *live);

/* Index of the set's checkpoint in the extension's list. */
unsigned qlb_live_checkpoint(const struct qlb_live *live);

/* UUID of the parent; NULL where all of the disk can be read. Else only what
 * changed since then can be: the rest was not saved. */
const struct qlb_uuid *qlb_live_parent(const struct qlb_live *live);

/* As qlb_disk_content_limit. */
uint64_t qlb_live_content_limit(const struct qlb_live *live);

/* Whether the file is one of those that are read. */
bool qlb_live_has_file(const struct qlb_live *live, const struct stat *st);

/* Whether all that was read so far is right: the image still says that the
 * backup of this set is running. Else "the backup was broken", and what was
 * read must not be used. */
int qlb_live_check(const struct qlb_live *live, struct qlb_error *err);

/* Where QEMU makes the orig of an image by default: disk.orig.qcow2 beside
 * disk.qcow2. The caller frees it; NULL: no memory. */
char *qlb_live_default_orig(const char *image);
/* Deletes what an interrupted backup of that image left, which the caller has
 * locked. 1: done, 0: there is no such file, or it is not that, -1. */
int qlb_live_remove_orig(const char *orig, const struct qlb_uuid *image_uuid,
                         struct qlb_error *err);

struct qlb_live_reader *qlb_live_reader_new(const struct qlb_live *live,
                                            struct qlb_error *err);
void qlb_live_reader_free(struct qlb_live_reader *reader);

/* As qlb_disk_extent and qlb_disk_read, of the disk at T. Extents are told in
 * pieces of 64 KiB: one that is QLB_EXTENT_DATA need not be so in all its
 * parts. */
int qlb_live_extent(struct qlb_live_reader *reader, uint64_t offset,
                    uint64_t length, enum qlb_extent_type *type,
                    uint64_t *run, struct qlb_error *err);
int qlb_live_read(struct qlb_live_reader *reader, void *buf, uint64_t offset,
                  uint64_t length, struct qlb_error *err);

#endif
