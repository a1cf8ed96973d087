/* The checkpoints of an image on disk.
 *
 * Joins the qcow2 code and bitmap_ext: reads an image's livebackup state and
 * changes it in the write orders of livebackup-extension.md, so that a crash
 * leaves the old state, the new state, or one that is visibly untrusted.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_IMAGE_H
#define QLB_IMAGE_H

#include <stdbool.h>
#include <stdint.h>

#include "bitmap_ext.h"
#include "error.h"
#include "qcow2_map.h"
#include "qcow2_patch.h"

struct qlb_image;

enum qlb_image_flags {
    QLB_IMAGE_WRITE = 1, /* open for changes; takes the writer's locks */
    QLB_IMAGE_NO_LOCK = 2, /* read what a running QEMU has open */
    QLB_IMAGE_DIRECT = 4, /* past the page cache; not with WRITE */
    QLB_IMAGE_UNFINISHED = 8, /* also where a rollback was not finished, which
                                 is QLB_E_UNTRUSTED else */
};

/* Opens a qcow2 image (any; livebackup may be off) and reads its state. A
 * state that is damaged or untrusted is no error: the verdicts tell. Without
 * WRITE the file is opened read-only, with reader's locks. QLB_E_BUSY where
 * another process has it open in a way that conflicts. */
struct qlb_image *qlb_image_open(const char *path, unsigned flags,
                                 struct qlb_error *err);
void qlb_image_close(struct qlb_image *image);

/* The disk of the image, for reading its content; owned by the image. NULL
 * where a backing or data file can't be opened: the state can still be told
 * then (rule 10), and _disk_error says what is wrong (else NULL). */
const struct qlb_disk *qlb_image_disk(const struct qlb_image *image);
const struct qlb_error *qlb_image_disk_error(const struct qlb_image *image);

/* The decoded extension; NULL where livebackup is off, or the extension is
 * damaged or unsupported. */
const struct qlb_ext *qlb_image_ext(const struct qlb_image *image);

/* Verdict of rules 1 to 13; and of rules 1 to 17 for what changed since
 * checkpoint i (its own bitmap and all newer ones). */
enum qlb_trust qlb_image_trust(const struct qlb_image *image);
enum qlb_trust qlb_image_trust_since(const struct qlb_image *image,
                                     unsigned i);

/* Bytes changed since checkpoint i (as far as the bitmaps say, trusted or
 * not; 0 where they can't be read), at most the virtual size. */
int qlb_image_changed_bytes(struct qlb_image *image, unsigned i,
                            uint64_t *bytes, struct qlb_error *err);

/* What changed since a checkpoint: the OR of bitmaps, read piecewise. */
struct qlb_changes;
/* QLB_E_UNTRUSTED, naming the reason, where it is not trusted. */
struct qlb_changes *qlb_image_changes(struct qlb_image *image, unsigned i,
                                      struct qlb_error *err);
/* What changed from checkpoint i to checkpoint `until`: with all bitmaps from
 * that of i on, but without that of `until` and newer ones, which are not looked
 * at. The disk must not have been resized since `until`. */
struct qlb_changes *qlb_image_changes_between(struct qlb_image *image,
                                              unsigned i, unsigned until,
                                              struct qlb_error *err);
/* What a dirty bitmap of that name says, of any program that keeps one in the
 * image, has changed since it was added; the disk had that many bytes then.
 * QLB_E_UNTRUSTED where it does not tell: there is none, it does not record by
 * itself, it is in use, what wrote to the image last knew nothing of it, or
 * one of its canaries is gone: the bits of the first and the last granule of
 * that time, which whoever added it has set (stock-qemu.md, "Trust"). */
struct qlb_changes *qlb_image_named_changes(struct qlb_image *image,
                                            const char *name,
                                            uint64_t since_size,
                                            struct qlb_error *err);
/* Calls fn with the names of the bitmaps that record by themselves and are not
 * in use: none where the directory can't be trusted. */
void qlb_image_each_bitmap(const struct qlb_image *image,
                           void (*fn)(void *opaque, const char *name),
                           void *opaque);
/* The first changed range at or after offset, in bytes, clipped to the
 * present virtual size (length 0: none). Growth counts as changed: what lies
 * above the smallest size of the checkpoints from i on. Ranges that touch need
 * not be joined. Any offset may be given; ascending ones are fast. */
int qlb_changes_next(struct qlb_changes *changes, uint64_t offset,
                     uint64_t *start, uint64_t *length,
                     struct qlb_error *err);
/* How many bytes there are in all ranges. */
int qlb_changes_bytes(struct qlb_changes *changes, uint64_t *bytes,
                      struct qlb_error *err);
void qlb_changes_free(struct qlb_changes *changes);

/* All below need QLB_IMAGE_WRITE, update the object too, and end synced. They
 * refuse an image that is marked dirty. What keeps checkpoints in the list
 * fails with QLB_E_UNTRUSTED where rules 1 to 13 do not trust the image: the
 * write would make it look well. A failure leaves the old state: where a write
 * or sync of the header itself fails, the old header is put back; only if that
 * fails too, what stands in the file may be old or new. The object refuses
 * further changes then. What could not be freed at the end is leaked, and no
 * failure. */

/* Turns livebackup on, with no checkpoint yet. granularity_bits: 12 to 31
 * (0: 64 KiB). QLB_E_USAGE: already on, version 2, clusters under 4 KiB, no
 * room in the header, more than 2^29 granules (QEMU's limit). */
int qlb_image_enable(struct qlb_image *image, unsigned granularity_bits,
                     uint32_t ext_flags, struct qlb_error *err);

/* Takes all of livebackup out of the image, also where it is damaged.
 * QLB_E_USAGE: there is nothing of it. QLB_E_UNTRUSTED: the extension has
 * another version. */
int qlb_image_disable(struct qlb_image *image, struct qlb_error *err);

/* Whether a checkpoint could be added now, as far as the list and the state of
 * the image tell: for those who have much to do before they add it. */
int qlb_image_check_add(const struct qlb_image *image, struct qlb_error *err);

/* Adds a checkpoint, unconfirmed, as the newest: its bitmap is enabled and
 * clean (canaries aside), the one before frozen. Checkpoints that are not
 * trusted are dropped first where drop_untrusted is set (else QLB_E_UNTRUSTED
 * if there are any). Where the list is full, folds one as the specification
 * says. virtual_size and confirmed of the argument are not looked at. With
 * a damaged extension QLB_E_UNTRUSTED: recover first. */
int qlb_image_add_checkpoint(struct qlb_image *image,
                             const struct qlb_checkpoint *checkpoint,
                             bool drop_untrusted, struct qlb_error *err);

/* Undoes the last add of this object: ORs the newest bitmap into the one
 * before, which is enabled again. (Checkpoints that the add dropped or folded
 * stay gone.) */
int qlb_image_undo_add(struct qlb_image *image, struct qlb_error *err);

/* Writes the header alone; nothing where it is confirmed already. */
int qlb_image_confirm(struct qlb_image *image, unsigned i,
                      struct qlb_error *err);

/* Folds checkpoint i into the one before; the oldest is dropped. Any may be
 * folded; policy is the caller's. QLB_E_UNTRUSTED where one of the two bitmaps
 * is not trusted. */
int qlb_image_fold(struct qlb_image *image, unsigned i,
                   struct qlb_error *err);

/* Ends a backup that was interrupted, as its QEMU would have: checkpoint i is
 * confirmed, with the first bytes of its archive's root digest. One write of
 * the header. */
int qlb_image_end_backup(struct qlb_image *image, unsigned i,
                         const uint8_t root[8], struct qlb_error *err);

struct qlb_recovery {
    unsigned dropped_checkpoints;
    uint64_t freed_clusters;
    bool cleared_state; /* an interrupted backup was given up */
};

/* Drops what is not trusted, gives up an interrupted backup, and frees leaked
 * clusters (those with a refcount that nothing refers to). A damaged extension
 * is replaced by a new one, with a new image UUID. Where refcounts are too low
 * (an error, not a leak) or the image is marked dirty it changes nothing and
 * says to use `qemu-img check -r`. */
int qlb_image_recover(struct qlb_image *image, struct qlb_recovery *recovery,
                      struct qlb_error *err);

/* ---- rollback in place ---- */

/* Its order (livebackup-extension.md): begin; what qlb_image_patch gives,
 * flushed and closed; free_leaks, where the image was unfinished before;
 * finish. After a failure the image stays unfinished, and all is to be done
 * again. */

/* Whether a rollback was begun and not finished. */
bool qlb_image_is_unfinished(const struct qlb_image *image);

/* Whether the image can be rolled back in place to that size at all.
 * QLB_E_RUNTIME where it can't, saying why. */
int qlb_image_check_rollback(const struct qlb_image *image, uint64_t size,
                             struct qlb_error *err);

/* Marks the image as unfinished. since: the checkpoint whose bits tell what is
 * rewritten (all trusted, or QLB_E_UNTRUSTED), which becomes the newest; -1:
 * none does, and the list is emptied. */
int qlb_image_begin_rollback(struct qlb_image *image, int since,
                             uint64_t size, struct qlb_error *err);

/* For writing the content; to be closed before the next change of the image.
 * NULL on failure. */
struct qlb_patch *qlb_image_patch(struct qlb_image *image,
                                  struct qlb_error *err);

/* Frees what an attempt that was killed has leaked. */
int qlb_image_free_leaks(struct qlb_image *image, struct qlb_error *err);

/* The content is that of the checkpoint, whose virtual size the disk gets. It
 * is confirmed, and nothing has changed since. Where livebackup is off it
 * stays off. */
int qlb_image_finish_rollback(struct qlb_image *image,
                              const struct qlb_checkpoint *checkpoint,
                              const struct qlb_uuid *image_uuid,
                              struct qlb_error *err);

#endif
