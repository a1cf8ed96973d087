/* Reading a disk of a running backup.
 *
 * A stretch is read in the order that live-backup.md demands: the image's L1
 * entries, its L2 entries and data; then the orig's entries of the same range
 * and their data, which win; then the L1 entries once more, and all of it anew
 * if one has changed.  QEMU publishes a unit in the orig before it changes it
 * in the image, so whatever of a change was seen, the orig has the unit.
 *
 * The orig is looked at cluster by cluster, also where a unit is several: the
 * entries of one unit may appear one after the other, but the image is changed
 * after all of them.
 *
 * What a stretch was at T never changes, so what was found may be kept, as
 * extents are; only the tables of the image may not.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "live.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "bitmap.h"
#include "bitmap_ext.h"
#include "blkio.h"
#include "byteorder.h"
#include "checked.h"
#include "image_state.h"
#include "orig.h"
#include "qcow2_layer.h"

#define ULL(n) ((unsigned long long)(n))

/* Extents are found for a window at a time, in blocks. A multiple of every
 * cluster size of the orig, each of which is a multiple of a block. */
#define WINDOW (UINT64_C(256) << 20)
#define BLOCK UINT64_C(65536)
#define WINDOW_BLOCKS (WINDOW / BLOCK)

/* An L1 entry changes once, when its table is allocated. Who needs more tries
 * than this reads no image of a running QEMU. */
#define MAX_TRIES 1000

/* QEMU writes the header's 4096 bytes at once, and a reader may still see them
 * half written. */
#define MAX_TORN 20

struct qlb_live {
    struct qlb_image *image;
    struct qlb_blkio *header_io; /* the image again, for the last look */
    struct qlb_blkio *orig_io;
    struct qlb_orig orig;
    struct qlb_uuid set;
    unsigned checkpoint;
};

struct qlb_live_reader {
    const struct qlb_live *live;
    struct qlb_disk_reader *disk;
    uint8_t *l1[2];      /* L1 entries of the stretch, before and after */
    uint8_t *entries[2]; /* of the orig; one for each block of a window */

    /* The window that was looked at last: empty if start == end. */
    uint64_t start, end;
    uint8_t *data;       /* by block: 1 if any of it is data */
};

/* ---- opening ---- */

static int broken(const struct qlb_blkio *io, const char *why,
                  struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_RUNTIME, "%s: the backup was broken: %s",
                    io->name, why);
}

/* What the extension says of the backup. */
static int check_state(const struct qlb_blkio *io, const struct qlb_ext *ext,
                       const struct qlb_uuid *set, struct qlb_error *err)
{
    switch (ext->state) {
    case QLB_STATE_RUNNING:
        break;
    case QLB_STATE_BROKEN:
        return broken(io, "an original could not be saved", err);
    case QLB_STATE_INTERRUPTED:
        return broken(io, "it was interrupted", err);
    default:
        return broken(io, "it has ended", err);
    }
    if (!qlb_uuid_equal(&ext->set_uuid, set)) {
        return broken(io, "another one has begun", err);
    }
    return 0;
}

static void pause_a_moment(void)
{
    struct timespec pause = { .tv_nsec = 10 * 1000 * 1000 };

    nanosleep(&pause, NULL);
}

static struct qlb_image *open_image(const char *path, unsigned flags,
                                    struct qlb_error *err)
{
    struct qlb_image *image;

    for (unsigned i = 0; ; i++) {
        image = qlb_image_open(path, flags, err);
        if (image == NULL || i == MAX_TORN ||
            qlb_image_trust(image) != QLB_TRUST_EXTENSION_DAMAGED) {
            break;
        }
        qlb_image_close(image);
        pause_a_moment();
    }
    if (image != NULL && qlb_image_ext(image) == NULL) {
        enum qlb_trust trust = qlb_image_trust(image);

        qlb_fail(err, QLB_E_UNTRUSTED, "%s: %s (%s)", path,
                 qlb_trust_reason(trust), qlb_trust_keyword(trust));
        qlb_image_close(image);
        return NULL;
    }
    return image;
}

static int decode_orig(struct qlb_live *live, struct qlb_error *err)
{
    uint8_t header[QLB_ORIG_HEADER_SIZE];
    const char *path = live->orig_io->name;

    if (qlb_blkio_read(live->orig_io, header, sizeof(header), 0, err) < 0) {
        return -1;
    }
    switch (qlb_orig_decode_header(header, sizeof(header), &live->orig)) {
    case QLB_ORIG_GOOD:
        return 0;
    case QLB_ORIG_FOREIGN:
        return qlb_fail(err, QLB_E_RUNTIME, "%s: holds no originals", path);
    case QLB_ORIG_UNSUPPORTED:
        return qlb_fail(err, QLB_E_RUNTIME, "%s: holds originals in a version "
                        "that is not supported", path);
    default:
        return qlb_fail(err, QLB_E_DAMAGED, "%s: the header is damaged", path);
    }
}

/* checkpoint: NULL stands for any that the image has. */
static int open_orig(struct qlb_live *live, const char *path,
                     const struct qlb_uuid *checkpoint, struct qlb_error *err)
{
    const struct qlb_ext *ext = qlb_image_ext(live->image);
    const struct qlb_disk *disk = qlb_live_disk(live);
    const struct qlb_orig *orig = &live->orig;

    live->orig_io = qlb_blkio_open(path, 0, err);
    if (live->orig_io == NULL || decode_orig(live, err) < 0) {
        return -1;
    }
    if (!qlb_uuid_equal(&orig->set_uuid, &live->set) ||
        !qlb_uuid_equal(&orig->image_uuid, &ext->image_uuid) ||
        (checkpoint != NULL &&
         !qlb_uuid_equal(&orig->checkpoint_uuid, checkpoint)) ||
        orig->disk_size != qlb_disk_size(disk) ||
        (UINT64_C(1) << orig->cluster_bits) <
            qlb_disk_header(disk)->cluster_size) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s: holds the originals of "
                        "another backup", path);
    }
    return 0;
}

static int open_files(struct qlb_live *live, const char *image, unsigned flags,
                      struct qlb_error *err)
{
    bool direct = flags & QLB_IMAGE_DIRECT;

    live->image = open_image(image, flags, err);
    if (live->image != NULL) {
        live->header_io = qlb_blkio_open(image, direct ? QLB_BLKIO_DIRECT : 0,
                                         err);
    }
    return live->header_io == NULL ? -1 : 0;
}

static int find_checkpoint(struct qlb_live *live,
                           const struct qlb_uuid *checkpoint)
{
    int i = qlb_ext_find(qlb_image_ext(live->image), checkpoint);

    live->checkpoint = i < 0 ? 0 : (unsigned)i;
    return i < 0 ? -1 : 0;
}

static int live_open(struct qlb_live *live, const char *image,
                     const char *orig, const struct qlb_uuid *checkpoint,
                     unsigned flags, struct qlb_error *err)
{
    bool direct = flags & QLB_LIVE_DIRECT;

    if (open_files(live, image, QLB_IMAGE_NO_LOCK |
                   (direct ? QLB_IMAGE_DIRECT : 0), err) < 0) {
        return -1;
    }
    if (qlb_live_disk(live) == NULL) {
        *err = *qlb_image_disk_error(live->image);
        return -1;
    }
    if (check_state(live->header_io, qlb_image_ext(live->image), &live->set,
                    err) < 0) {
        return -1;
    }
    if (find_checkpoint(live, checkpoint) < 0) {
        return broken(live->header_io, "its checkpoint is gone", err);
    }
    return open_orig(live, orig, checkpoint, err);
}

struct qlb_live *qlb_live_open(const char *image, const char *orig,
                               const struct qlb_uuid *set,
                               const struct qlb_uuid *checkpoint,
                               unsigned flags, struct qlb_error *err)
{
    struct qlb_live *live = calloc(1, sizeof(*live));

    if (live == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", image);
        return NULL;
    }
    live->set = *set;
    if (live_open(live, image, orig, checkpoint, flags, err) < 0) {
        qlb_live_close(live);
        return NULL;
    }
    return live;
}

/* ---- opening what was interrupted ---- */

static int lost(const struct qlb_live *live, const char *why,
                struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_UNTRUSTED, "%s: the interrupted backup is "
                    "lost: %s", live->header_io->name, why);
}

/* The page cache is gone with the host, or stayed at another one. */
static const char *missed_writes(const struct qlb_image *image)
{
    const struct qlb_ext *ext = &image->ext;

    if ((ext->flags & QLB_EXT_DURABLE) != 0) {
        return NULL;
    }
    if (memcmp(ext->boot_id, image->seen.boot_id, sizeof(ext->boot_id)) != 0) {
        return "the host was restarted, and the backup was not durable";
    }
    if (ext->device != image->seen.device) {
        return "the image was moved, and the backup was not durable";
    }
    return NULL;
}

/* The rules of live-backup.md, "An interrupted backup". */
static int check_interrupted(const struct qlb_live *live,
                             struct qlb_error *err)
{
    const struct qlb_image *image = live->image;
    const struct qlb_ext *ext = &image->ext;
    const char *why = NULL;

    switch (ext->state) {
    case QLB_STATE_RUNNING:
        break;
    case QLB_STATE_BROKEN:
        return lost(live, "an original could not be saved", err);
    case QLB_STATE_INTERRUPTED:
        return lost(live, "the image was opened for writing since", err);
    default:
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s: no backup was interrupted",
                        live->header_io->name);
    }
    if (!image->seen.autoclear_livebackup) {
        why = "another program has opened the image for writing since";
    } else if (ext->released) {
        why = "what had been released was overwritten";
    } else if (!qlb_image_is_left_alone(image)) {
        why = qlb_trust_reason(image->trust);
    } else {
        why = missed_writes(image);
    }
    return why == NULL ? 0 : lost(live, why, err);
}

static int open_interrupted(struct qlb_live *live, const char *image,
                            const char *orig, bool write,
                            struct qlb_error *err)
{
    if (open_files(live, image, write ? QLB_IMAGE_WRITE : 0, err) < 0 ||
        check_interrupted(live, err) < 0) {
        return -1;
    }
    if (qlb_live_disk(live) == NULL) {
        *err = *qlb_image_disk_error(live->image);
        return -1;
    }
    live->set = qlb_image_ext(live->image)->set_uuid;
    if (access(orig, F_OK) < 0 && errno == ENOENT) {
        return lost(live, "its originals are gone", err);
    }
    if (open_orig(live, orig, NULL, err) < 0) {
        return -1;
    }
    if (find_checkpoint(live, &live->orig.checkpoint_uuid) < 0) {
        return lost(live, "its checkpoint is gone", err);
    }
    return 0;
}

struct qlb_live *qlb_live_open_interrupted(const char *image, const char *orig,
                                           bool write, struct qlb_error *err)
{
    struct qlb_live *live = calloc(1, sizeof(*live));

    if (live == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", image);
        return NULL;
    }
    if (open_interrupted(live, image, orig, write, err) < 0) {
        qlb_live_close(live);
        return NULL;
    }
    return live;
}

void qlb_live_close(struct qlb_live *live)
{
    if (live == NULL) {
        return;
    }
    qlb_image_close(live->image);
    qlb_blkio_close(live->header_io);
    qlb_blkio_close(live->orig_io);
    free(live);
}

/* ---- the orig's file ---- */

char *qlb_live_default_orig(const char *image)
{
    static const char suffix[] = ".qcow2", orig[] = ".orig.qcow2";
    size_t len = strlen(image), cut = sizeof(suffix) - 1;
    char *name = malloc(len + sizeof(orig));

    if (name == NULL) {
        return NULL;
    }
    if (len >= cut && strcmp(image + len - cut, suffix) == 0) {
        len -= cut;
    }
    memcpy(name, image, len);
    memcpy(name + len, orig, sizeof(orig));
    return name;
}

int qlb_live_remove_orig(const char *orig, const struct qlb_uuid *image_uuid,
                         struct qlb_error *err)
{
    struct qlb_live file = { .orig_io = NULL };
    bool ours;

    if (access(orig, F_OK) < 0 && errno == ENOENT) {
        return 0;
    }
    file.orig_io = qlb_blkio_open(orig, 0, err);
    if (file.orig_io == NULL) {
        return -1;
    }
    ours = decode_orig(&file, err) == 0 &&
           qlb_uuid_equal(&file.orig.image_uuid, image_uuid);
    qlb_blkio_close(file.orig_io);
    if (!ours) {
        return 0;
    }
    if (unlink(orig) < 0) {
        return qlb_fail_errno(err, errno, "%s", orig);
    }
    return 1;
}

/* ---- queries ---- */

struct qlb_image *qlb_live_image(struct qlb_live *live)
{
    return live->image;
}

const struct qlb_disk *qlb_live_disk(const struct qlb_live *live)
{
    return qlb_image_disk(live->image);
}

unsigned qlb_live_checkpoint(const struct qlb_live *live)
{
    return live->checkpoint;
}

const struct qlb_uuid *qlb_live_parent(const struct qlb_live *live)
{
    const struct qlb_uuid *parent = &live->orig.parent_uuid;

    return qlb_uuid_is_zero(parent) ? NULL : parent;
}

/* Where one cluster of a unit was data all of it may be saved as data. */
uint64_t qlb_live_content_limit(const struct qlb_live *live)
{
    uint64_t limit = qlb_disk_content_limit(qlb_live_disk(live));

    if (!checked_mul(limit, UINT64_C(1) << (live->orig.unit_bits - 16),
                     &limit)) {
        return UINT64_MAX;
    }
    return limit;
}

bool qlb_live_has_file(const struct qlb_live *live, const struct stat *st)
{
    struct stat own;

    return qlb_disk_has_file(qlb_live_disk(live), st) ||
           (fstat(live->orig_io->fd, &own) == 0 &&
            own.st_dev == st->st_dev && own.st_ino == st->st_ino);
}

/* The extension as it is now. 1: torn, or damaged. */
static int read_extension(struct qlb_blkio *io, struct qlb_ext *ext,
                          struct qlb_error *err)
{
    struct qlb_qcow2_header *header = qlb_qcow2_header_read(io, false, err);
    const struct qlb_header_ext *found;
    bool twice = false;
    int ret = 1;

    if (header == NULL) {
        return err->code == QLB_E_DAMAGED ? 1 : -1;
    }
    found = qlb_qcow2_header_ext(header, QLB_EXT_LIVEBACKUP, &twice);
    if (found != NULL && !twice &&
        qlb_ext_decode(found->data, found->size, ext) == QLB_EXT_GOOD) {
        ret = 0;
    }
    qlb_qcow2_header_free(header);
    return ret;
}

int qlb_live_check(const struct qlb_live *live, struct qlb_error *err)
{
    struct qlb_ext ext;

    for (unsigned i = 0; i < MAX_TORN; i++) {
        int ret = read_extension(live->header_io, &ext, err);

        if (ret < 0) {
            return -1;
        }
        if (ret == 0) {
            return check_state(live->header_io, &ext, &live->set, err);
        }
        pause_a_moment();
    }
    return broken(live->header_io, "the image's extension can't be read", err);
}

/* ---- readers ---- */

static const struct qlb_layer *top_layer(const struct qlb_live_reader *reader)
{
    return &reader->disk->disk->layers[0];
}

static bool allocate_tables(struct qlb_live_reader *reader)
{
    unsigned l1_bits = top_layer(reader)->cluster_bits +
                       top_layer(reader)->l2_bits;
    bool good;

    reader->data = malloc(WINDOW_BLOCKS);
    good = reader->data != NULL;
    for (unsigned i = 0; i < 2; i++) {
        reader->l1[i] = malloc(8 * ((WINDOW >> l1_bits) + 2));
        reader->entries[i] = malloc(8 * WINDOW_BLOCKS);
        good &= reader->l1[i] != NULL && reader->entries[i] != NULL;
    }
    return good;
}

struct qlb_live_reader *qlb_live_reader_new(const struct qlb_live *live,
                                            struct qlb_error *err)
{
    struct qlb_live_reader *reader = calloc(1, sizeof(*reader));

    if (reader == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", live->header_io->name);
        return NULL;
    }
    reader->live = live;
    reader->disk = qlb_disk_reader_new(qlb_live_disk(live), err);
    if (reader->disk == NULL) {
        free(reader);
        return NULL;
    }
    if (!allocate_tables(reader)) {
        qlb_fail_errno(err, ENOMEM, "%s", live->header_io->name);
        qlb_live_reader_free(reader);
        return NULL;
    }
    return reader;
}

void qlb_live_reader_free(struct qlb_live_reader *reader)
{
    if (reader == NULL) {
        return;
    }
    for (unsigned i = 0; i < 2; i++) {
        free(reader->l1[i]);
        free(reader->entries[i]);
    }
    free(reader->data);
    qlb_disk_reader_free(reader->disk);
    free(reader);
}

/* ---- one stretch ---- */

/* Lies in one window. For extents it is all of the window. */
struct stretch {
    struct qlb_live_reader *reader;
    uint64_t offset, end;
    uint8_t *buf; /* for content; NULL: for extents, in reader->data */
};

static void set_extents(const struct stretch *s, uint64_t offset,
                        uint64_t end, bool data)
{
    uint64_t first = (offset - s->offset) / BLOCK;

    memset(s->reader->data + first, data,
           div_round_up(end - s->offset, BLOCK) - first);
}

/* What the image says of a part now. The part begins with a block. */
static int take_from_image(const struct stretch *s, uint64_t offset,
                           uint64_t end, struct qlb_error *err)
{
    struct qlb_live_reader *reader = s->reader;

    if (s->buf != NULL) {
        return qlb_disk_read(reader->disk, s->buf + (offset - s->offset),
                             offset, end - offset, err);
    }
    set_extents(s, offset, end, false);
    while (offset < end) {
        enum qlb_extent_type type;
        uint64_t run;

        if (qlb_disk_extent(reader->disk, offset, end - offset, &type, &run,
                            err) < 0) {
            return -1;
        }
        if (type != QLB_EXTENT_ZERO) {
            set_extents(s, offset, offset + run, true);
        }
        offset += run;
    }
    return 0;
}

/* A part of one cluster that the orig has. data_offset: of the part. */
static int take_original(const struct stretch *s, uint64_t offset,
                         uint64_t end, bool zero, uint64_t data_offset,
                         struct qlb_error *err)
{
    if (s->buf == NULL) {
        set_extents(s, offset, end, !zero);
        return 0;
    }
    if (zero) {
        memset(s->buf + (offset - s->offset), 0, end - offset);
        return 0;
    }
    return qlb_blkio_read(s->reader->live->orig_io,
                          s->buf + (offset - s->offset), end - offset,
                          data_offset, err);
}

/* Reads the orig's entries of a range into entries[0]: those that are not zero
 * until two readings agree. *n: how many. */
static int read_entries(struct qlb_live_reader *reader, uint64_t offset,
                        uint64_t end, size_t *n, struct qlb_error *err)
{
    const struct qlb_live *live = reader->live;
    const struct qlb_orig *orig = &live->orig;
    uint64_t first = offset >> orig->cluster_bits;
    unsigned per_unit = qlb_orig_entries_per_unit(orig);
    uint64_t at = qlb_orig_entries_offset(orig, first / per_unit) +
                  first % per_unit * 8;
    size_t len;

    *n = ((end - 1) >> orig->cluster_bits) - first + 1;
    len = *n * 8;
    /* The file may end within tables that hold nothing yet. */
    if (qlb_blkio_read_padded(live->orig_io, reader->entries[0], len, at,
                              err) < 0) {
        return -1;
    }
    for (unsigned tries = 0; tries < MAX_TRIES; tries++) {
        bool again = false;

        if (qlb_bits_all_zero(reader->entries[0], len)) {
            return 0;
        }
        if (qlb_blkio_read_padded(live->orig_io, reader->entries[1], len, at,
                                  err) < 0) {
            return -1;
        }
        for (size_t i = 0; i < len; i += 8) {
            uint8_t *entry = reader->entries[0] + i;
            const uint8_t *second = reader->entries[1] + i;

            if (get_be64(entry) != 0 && memcmp(entry, second, 8) != 0) {
                memcpy(entry, second, 8);
                again = true;
            }
        }
        if (!again) {
            return 0;
        }
    }
    return qlb_fail(err, QLB_E_RUNTIME, "%s: entries keep changing",
                    live->orig_io->name);
}

/* Takes what the orig has of a part. *all: that was all of it. */
static int take_originals(const struct stretch *s, uint64_t offset,
                          uint64_t end, bool *all, struct qlb_error *err)
{
    struct qlb_live_reader *reader = s->reader;
    const struct qlb_orig *orig = &reader->live->orig;
    uint64_t size = UINT64_C(1) << orig->cluster_bits;
    size_t n;

    *all = true;
    if (read_entries(reader, offset, end, &n, err) < 0) {
        return -1;
    }
    for (size_t i = 0; i < n; i++) {
        uint64_t within = offset & (size - 1), at = 0;
        uint64_t next = min_u64(offset - within + size, end);
        enum qlb_orig_entry entry =
            qlb_orig_decode_entry(orig, reader->entries[0] + i * 8, &at);

        if (entry == QLB_ORIG_ENTRY_BAD) {
            return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged entry for guest "
                            "offset %llu", reader->live->orig_io->name,
                            ULL(offset));
        }
        if (entry == QLB_ORIG_ENTRY_NONE) {
            *all = false;
        } else if (take_original(s, offset, next,
                                 entry == QLB_ORIG_ENTRY_ZERO, at + within,
                                 err) < 0) {
            return -1;
        }
        offset = next;
    }
    return 0;
}

/* An error of the image counts only where the orig has nothing: else the image
 * was changed there just now. Extents of a part that can't be told are data:
 * who reads it sees the error, and nobody may want it (what has not changed
 * since the parent is not protected). */
static int take_parts(const struct stretch *s, struct qlb_error *err)
{
    uint64_t step = UINT64_C(1) << s->reader->live->orig.cluster_bits;

    for (uint64_t at = s->offset, next; at < s->end; at = next) {
        struct qlb_error other;
        bool all;

        next = min_u64(round_down(at, step) + step, s->end);
        if (take_from_image(s, at, next, err) == 0) {
            continue;
        }
        if (take_originals(s, at, next, &all, &other) < 0) {
            *err = other;
            return -1;
        }
        if (!all && s->buf != NULL) {
            return -1;
        }
        if (!all) {
            set_extents(s, at, next, true);
        }
    }
    return 0;
}

static int read_l1(const struct stretch *s, unsigned which, size_t *len,
                   struct qlb_error *err)
{
    const struct qlb_layer *layer = top_layer(s->reader);
    unsigned bits = layer->cluster_bits + layer->l2_bits;
    uint64_t first = s->offset >> bits;

    *len = (((s->end - 1) >> bits) - first + 1) * 8;
    return qlb_blkio_read(layer->io, s->reader->l1[which], *len,
                          layer->header->l1_offset + first * 8, err);
}

static int read_stretch(const struct stretch *s, struct qlb_error *err)
{
    struct qlb_live_reader *reader = s->reader;

    for (unsigned tries = 0; tries < MAX_TRIES; tries++) {
        struct qlb_error other;
        size_t len;
        bool all;
        int ret;

        qlb_disk_reader_forget(reader->disk);
        if (read_l1(s, 0, &len, err) < 0) {
            return -1;
        }
        ret = take_from_image(s, s->offset, s->end, err);
        if (ret < 0) {
            ret = take_parts(s, err);
        }
        if (ret == 0 &&
            take_originals(s, s->offset, s->end, &all, err) < 0) {
            return -1;
        }
        if (read_l1(s, 1, &len, &other) < 0) {
            *err = other;
            return -1;
        }
        if (memcmp(reader->l1[0], reader->l1[1], len) == 0) {
            return ret;
        }
    }
    return qlb_fail(err, QLB_E_RUNTIME, "%s: the L1 table keeps changing",
                    reader->live->header_io->name);
}

/* ---- extents and content ---- */

static int check_range(const struct qlb_live_reader *reader, uint64_t offset,
                       uint64_t length, struct qlb_error *err)
{
    if (range_within(offset, length, qlb_disk_size(reader->disk->disk))) {
        return 0;
    }
    return qlb_fail(err, QLB_E_USAGE, "%s: %llu bytes at offset %llu are not "
                    "within the disk", reader->live->header_io->name,
                    ULL(length), ULL(offset));
}

static int load_window(struct qlb_live_reader *reader, uint64_t offset,
                       struct qlb_error *err)
{
    uint64_t start = round_down(offset, WINDOW);
    struct stretch s = {
        .reader = reader,
        .offset = start,
        .end = min_u64(start + WINDOW, qlb_disk_size(reader->disk->disk)),
    };

    reader->start = reader->end = 0;
    if (read_stretch(&s, err) < 0) {
        return -1;
    }
    reader->start = s.offset;
    reader->end = s.end;
    return 0;
}

int qlb_live_extent(struct qlb_live_reader *reader, uint64_t offset,
                    uint64_t length, enum qlb_extent_type *type,
                    uint64_t *run, struct qlb_error *err)
{
    uint64_t block, end;
    uint8_t kind;

    if (check_range(reader, offset, length, err) < 0 ||
        ((offset < reader->start || offset >= reader->end) &&
         load_window(reader, offset, err) < 0)) {
        return -1;
    }
    block = (offset - reader->start) / BLOCK;
    kind = reader->data[block];
    end = min_u64(offset + length, reader->end);
    do {
        block++;
    } while (reader->start + block * BLOCK < end &&
             reader->data[block] == kind);
    *type = kind ? QLB_EXTENT_DATA : QLB_EXTENT_ZERO;
    *run = min_u64(reader->start + block * BLOCK, end) - offset;
    return 0;
}

int qlb_live_read(struct qlb_live_reader *reader, void *buf, uint64_t offset,
                  uint64_t length, struct qlb_error *err)
{
    uint64_t end = offset + length;

    if (check_range(reader, offset, length, err) < 0) {
        return -1;
    }
    while (offset < end) {
        struct stretch s = {
            .reader = reader,
            .offset = offset,
            .end = min_u64(round_down(offset, WINDOW) + WINDOW, end),
            .buf = buf,
        };

        if (read_stretch(&s, err) < 0) {
            return -1;
        }
        buf = s.buf + (s.end - s.offset);
        offset = s.end;
    }
    return 0;
}
