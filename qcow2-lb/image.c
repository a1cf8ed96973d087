/* The checkpoints of an image on disk: opening, reading the state, trust.
 *
 * Everything that is seen of the image goes into structs of bitmap_ext.h,
 * whose rules then decide.  The state is read once, at open, and again after
 * each change, by the same function: what this object believes is what the
 * next one will read.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "image.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bitmap.h"
#include "cleanup.h"
#include "image_state.h"

#define BOOT_ID_FILE "/proc/sys/kernel/random/boot_id"

/* ---- what is seen of the image ---- */

/* All zero where the kernel does not tell: then no boot is this one. */
static void read_boot_id(uint8_t *boot_id)
{
    char text[QLB_UUID_TEXT] = "";
    struct qlb_uuid uuid;
    struct qlb_error ignored;
    int fd QLB_AUTO_CLOSE = open(BOOT_ID_FILE, O_RDONLY | O_CLOEXEC);

    memset(boot_id, 0, 16);
    if (fd >= 0 &&
        qlb_read_full(fd, text, QLB_UUID_TEXT - 1, BOOT_ID_FILE,
                      &ignored) == QLB_UUID_TEXT - 1 &&
        qlb_uuid_parse(text, &uuid)) {
        memcpy(boot_id, uuid.bytes, 16);
    }
}

/* Size and time of the files of the backing chain; 0 where there is none, or
 * where one is missing: no recorded digest of a chain is 0, so that differs. */
static uint64_t backing_stat_digest(const struct qlb_image *image)
{
    uint64_t hash = qlb_fnv_start();
    uint64_t size, mtime;

    if (image->header->backing_name == NULL || image->disk == NULL) {
        return 0;
    }
    for (unsigned i = 0;
         qlb_disk_backing_stat(image->disk, i, &size, &mtime); i++) {
        hash = qlb_fnv_u64(qlb_fnv_u64(hash, size), mtime);
    }
    return qlb_fnv_final(hash);
}

static uint64_t data_file_stat_digest(const struct qlb_image *image)
{
    uint64_t size, mtime;

    if (image->disk == NULL ||
        !qlb_disk_data_file_stat(image->disk, &size, &mtime)) {
        return 0;
    }
    return qlb_fnv_final(qlb_fnv_u64(qlb_fnv_u64(qlb_fnv_start(), size),
                                     mtime));
}

static void look_at_image(struct qlb_image *image)
{
    const struct qlb_qcow2_header *header = image->header;
    struct qlb_trust_image *seen = &image->seen;

    memset(seen, 0, sizeof(*seen));
    seen->autoclear_bitmaps =
        header->has_bitmaps && (header->autoclear & QLB_AUTOCLEAR_BITMAPS);
    seen->autoclear_livebackup =
        (header->autoclear & QLB_AUTOCLEAR_LIVEBACKUP) != 0;
    seen->dirty = (header->incompatible & QLB_INCOMPAT_DIRTY) != 0;
    read_boot_id(seen->boot_id);
    seen->device = image->io->device;
    seen->backing_digest = qlb_backing_digest(header->backing_name,
                                              header->backing_format);
    seen->backing_stat_digest = backing_stat_digest(image);
    seen->data_file_stat_digest = data_file_stat_digest(image);
}

/* ---- the directory and our bitmaps in it ---- */

/* The checkpoint that a bitmap of that name belongs to, or -1. */
static int checkpoint_of(const struct qlb_image *image,
                         const struct qlb_bitmap_entry *entry)
{
    for (unsigned i = 0; i < image->ext.n_checkpoints; i++) {
        char name[QLB_BITMAP_NAME_SIZE];

        qlb_bitmap_name(&image->ext.checkpoints[i].uuid, name);
        if (entry->name_size == strlen(name) &&
            memcmp(entry->name, name, entry->name_size) == 0) {
            return (int)i;
        }
    }
    return -1;
}

/* Finds ours among the entries, whose names are unique. */
static void assign_bitmaps(struct qlb_image *image)
{
    struct qlb_bitmap_entry entry;
    size_t position = 0;

    while (qlb_bitmap_directory_next(&image->directory, &position, &entry)) {
        int i;

        if (!qlb_bitmap_name_is_ours(entry.name, entry.name_size)) {
            continue;
        }
        i = checkpoint_of(image, &entry);
        if (i < 0) {
            image->seen.unlisted_bitmap = true;
        } else {
            image->bitmaps[i].found = true;
            image->bitmaps[i].entry = entry;
        }
    }
}

static void load_directory(struct qlb_image *image)
{
    qlb_bitmap_directory_release(&image->directory);
    memset(image->bitmaps, 0, sizeof(image->bitmaps));
    if (!image->header->has_bitmaps) {
        image->directory_state = QLB_DIRECTORY_NONE;
        return;
    }
    if (!image->seen.autoclear_bitmaps) {
        image->directory_state = QLB_DIRECTORY_STALE;
        return;
    }
    if (qlb_bitmap_directory_read(image->io, image->header,
                                  &image->directory,
                                  &image->directory_error) < 0) {
        image->directory_state =
            image->directory_error.code == QLB_E_DAMAGED
                ? QLB_DIRECTORY_DAMAGED : QLB_DIRECTORY_UNREADABLE;
        return;
    }
    image->directory_state = QLB_DIRECTORY_GOOD;
    image->seen.directory_readable = true;
    assign_bitmaps(image);
}

/* Rule 14 and the canaries of rule 17. A bitmap that is damaged is as good as
 * missing; one that can't be read just now is an error. */
static int look_at_bitmap(struct qlb_image *image, unsigned i,
                          struct qlb_error *err)
{
    struct qlb_image_bitmap *bitmap = &image->bitmaps[i];
    const struct qlb_bitmap_entry *entry = &bitmap->entry;
    uint64_t *table QLB_AUTO_FREE = NULL;
    uint64_t last;

    bitmap->seen.first_canary = bitmap->seen.last_canary = true;
    if (!bitmap->found || entry->type != QLB_BITMAP_TYPE_DIRTY ||
        entry->granularity_bits != image->ext.granularity_bits ||
        entry->extra_size != 0) {
        return 0;
    }
    if (qlb_bitmap_table_read(image->io, image->header, entry, &table,
                              err) < 0) {
        return err->code == QLB_E_RUNTIME ? -1 : 0;
    }
    bitmap->seen.automatic = (entry->flags & QLB_BITMAP_AUTO) != 0;
    bitmap->seen.in_use = (entry->flags & QLB_BITMAP_IN_USE) != 0;
    bitmap->seen.present = true;
    if (image->ext.checkpoints[i].virtual_size == 0) {
        return 0; /* a disk that was empty then had no canaries */
    }
    last = qlb_canary_last(image->ext.checkpoints[i].virtual_size,
                           image->header->virtual_size,
                           image->ext.granularity_bits);
    if (qlb_bitmap_read_bit(image->io, image->header, table, 0,
                            &bitmap->seen.first_canary, err) < 0 ||
        qlb_bitmap_read_bit(image->io, image->header, table, last,
                            &bitmap->seen.last_canary, err) < 0) {
        bitmap->seen.present = false;
        return err->code == QLB_E_RUNTIME ? -1 : 0;
    }
    return 0;
}

/* ---- the state ---- */

static enum qlb_trust decode_extension(struct qlb_image *image)
{
    const struct qlb_header_ext *ext;
    bool twice;

    memset(&image->ext, 0, sizeof(image->ext));
    image->decoded = false;
    ext = qlb_qcow2_header_ext(image->header, QLB_EXT_LIVEBACKUP, &twice);
    image->on = ext != NULL;
    if (ext == NULL) {
        return QLB_TRUST_OFF;
    }
    if (twice) {
        return QLB_TRUST_EXTENSION_DAMAGED;
    }
    switch (qlb_ext_decode(ext->data, ext->size, &image->ext)) {
    case QLB_EXT_UNSUPPORTED:
        memset(&image->ext, 0, sizeof(image->ext));
        return QLB_TRUST_UNSUPPORTED;
    case QLB_EXT_GOOD:
        image->decoded = true;
        return QLB_TRUSTED;
    default:
        memset(&image->ext, 0, sizeof(image->ext));
        return QLB_TRUST_EXTENSION_DAMAGED;
    }
}

int qlb_image_load_state(struct qlb_image *image, struct qlb_error *err)
{
    int ret = 0;

    image->trust = decode_extension(image);
    look_at_image(image);
    load_directory(image);
    if (!image->decoded) {
        return 0;
    }
    if (image->directory_state == QLB_DIRECTORY_UNREADABLE &&
        image->directory_error.code == QLB_E_RUNTIME) {
        *err = image->directory_error;
        ret = -1;
    }
    image->trust = qlb_trust_image(&image->ext, &image->seen);
    for (unsigned i = 0; i < image->ext.n_checkpoints; i++) {
        struct qlb_error other;

        if (look_at_bitmap(image, i, ret == 0 ? err : &other) < 0) {
            ret = -1;
        }
        image->bitmaps[i].trust = qlb_trust_bitmap(
            &image->ext, i, &image->bitmaps[i].seen);
    }
    return ret;
}

/* ---- open and close ---- */

/* The disk may be out of reach, because a backing file is missing: then the
 * state can still be told (rule 10), and qlb_image_disk is NULL. */
static void open_disk(struct qlb_image *image, unsigned flags)
{
    unsigned disk_flags = flags & QLB_IMAGE_NO_LOCK ? 0 : QLB_DISK_LOCK;

    disk_flags |= flags & QLB_IMAGE_DIRECT ? QLB_DISK_DIRECT : 0;
    image->disk = qlb_disk_open_io(image->io->name, image->io, image->header,
                                   disk_flags, &image->disk_error);
}

struct qlb_image *qlb_image_open(const char *path, unsigned flags,
                                 struct qlb_error *err)
{
    struct qlb_image *image = calloc(1, sizeof(*image));
    unsigned io_flags = 0;

    if (image == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", path);
        return NULL;
    }
    image->writable = (flags & QLB_IMAGE_WRITE) != 0;
    io_flags |= flags & QLB_IMAGE_WRITE ? QLB_BLKIO_WRITE : 0;
    io_flags |= flags & QLB_IMAGE_NO_LOCK ? 0 : QLB_BLKIO_LOCK;
    io_flags |= flags & QLB_IMAGE_DIRECT ? QLB_BLKIO_DIRECT : 0;
    image->io = qlb_blkio_open(path, io_flags, err);
    if (image->io == NULL) {
        qlb_image_close(image);
        return NULL;
    }
    image->header = flags & QLB_IMAGE_UNFINISHED
                        ? qlb_qcow2_header_read_unfinished(image->io, err)
                        : qlb_qcow2_header_read(image->io, true, err);
    if (image->header == NULL) {
        qlb_image_close(image);
        return NULL;
    }
    open_disk(image, flags);
    /* Somebody else writes the backing file: nothing here can be read now. */
    if (image->disk == NULL && image->disk_error.code == QLB_E_BUSY) {
        *err = image->disk_error;
        qlb_image_close(image);
        return NULL;
    }
    if (qlb_image_load_state(image, err) < 0) {
        qlb_image_close(image);
        return NULL;
    }
    return image;
}

void qlb_image_close(struct qlb_image *image)
{
    if (image == NULL) {
        return;
    }
    qlb_bitmap_directory_release(&image->directory);
    qlb_disk_close(image->disk);
    qlb_qcow2_header_free(image->header);
    qlb_blkio_close(image->io);
    free(image);
}

/* ---- queries ---- */

const struct qlb_disk *qlb_image_disk(const struct qlb_image *image)
{
    return image->disk;
}

const struct qlb_error *qlb_image_disk_error(const struct qlb_image *image)
{
    return image->disk == NULL ? &image->disk_error : NULL;
}

const struct qlb_ext *qlb_image_ext(const struct qlb_image *image)
{
    return image->decoded ? &image->ext : NULL;
}

enum qlb_trust qlb_image_trust(const struct qlb_image *image)
{
    return image->trust;
}

enum qlb_trust qlb_image_trust_since(const struct qlb_image *image,
                                     unsigned i)
{
    return qlb_image_trust_between(image, i, image->ext.n_checkpoints);
}

/* Whether all that is wrong is that the last writes may be missing. */
static bool lacks_syncs(const struct qlb_image *image)
{
    return image->trust == QLB_TRUST_POWER_LOSS ||
           image->trust == QLB_TRUST_MOVED_OPEN;
}

enum qlb_trust qlb_image_trust_between(const struct qlb_image *image,
                                       unsigned i, unsigned until)
{
    enum qlb_trust found = QLB_TRUSTED;

    if (image->trust != QLB_TRUSTED &&
        (until == image->ext.n_checkpoints || !lacks_syncs(image))) {
        return image->trust;
    }
    if (i >= image->ext.n_checkpoints) {
        return QLB_TRUST_NO_CHECKPOINT;
    }
    /* The keyword of the lowest rule; enum qlb_trust has them in order. */
    for (; i < until; i++) {
        enum qlb_trust trust = image->bitmaps[i].trust;

        if (trust != QLB_TRUSTED &&
            (found == QLB_TRUSTED || trust < found)) {
            found = trust;
        }
    }
    return found;
}

bool qlb_image_is_left_alone(const struct qlb_image *image)
{
    return image->seen.autoclear_livebackup &&
           (image->trust == QLB_TRUSTED || lacks_syncs(image));
}

int qlb_image_fail_trust(const struct qlb_image *image, enum qlb_trust trust,
                         struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_UNTRUSTED, "%s: %s (%s)", image->io->name,
                    qlb_trust_reason(trust), qlb_trust_keyword(trust));
}

unsigned qlb_image_untrusted(const struct qlb_image *image)
{
    unsigned n = image->ext.n_checkpoints;

    if (image->trust != QLB_TRUSTED) {
        return n;
    }
    while (n > 0 && image->bitmaps[n - 1].trust == QLB_TRUSTED) {
        n--;
    }
    return n;
}
