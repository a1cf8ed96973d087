/* The livebackup extension and the trust rules, without I/O.
 *
 * On disk the extension is 2176 bytes, big-endian: 128 bytes of fixed part and
 * 32 records of 64 bytes (livebackup-extension.md, "The extension's data").
 * The offsets stand in the enums below; fixed_from_disk, record_from_disk and
 * their opposites are the only code that knows them.  A decoded struct qlb_ext
 * has passed every check, so the rest relies on its values.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "bitmap_ext.h"

#include <string.h>

#include "bitmap.h"
#include "bitrange.h"
#include "byteorder.h"
#include "checked.h"
#include "crc32c.h"

#define EXT_VERSION 1
#define GRANULARITY_BITS_MIN 9
#define GRANULARITY_BITS_MAX 31
#define RECORD_CONFIRMED 1

enum fixed_offset {
    AT_VERSION = 0,
    AT_CRC = 4,
    AT_FLAGS = 8,
    AT_STATE = 12,
    AT_RELEASED = 13,
    AT_COUNT = 14,
    AT_GRANULARITY = 16,
    AT_RESERVED_32 = 20,
    AT_GENERATION = 24,
    AT_IMAGE_UUID = 32,
    AT_BOOT_ID = 48,
    AT_DEVICE = 64,
    AT_BACKING = 72,
    AT_BACKING_STAT = 80,
    AT_DATA_FILE_STAT = 88,
    AT_SET_UUID = 96,
    AT_BEGIN_TIME = 112,
    AT_RESERVED_64 = 120,
    FIXED_SIZE = 128,
};

enum record_offset {
    REC_UUID = 0,
    REC_TIME = 16,
    REC_SIZE = 24,
    REC_ROOT = 32,
    REC_FLAGS = 40,
    REC_LABEL = 42,
    RECORD_SIZE = 64,
};

_Static_assert(FIXED_SIZE + QLB_MAX_CHECKPOINTS * RECORD_SIZE == QLB_EXT_SIZE,
               "fixed part and records fill the extension");
_Static_assert(REC_LABEL + QLB_LABEL_MAX == RECORD_SIZE,
               "the label ends the record");

/* Of the whole extension, its checksum field taken as zero. */
static uint32_t ext_checksum(const uint8_t *data)
{
    return qlb_crc32c_with_hole(data, QLB_EXT_SIZE, AT_CRC);
}

/* ---- labels ---- */

static bool label_character(char c)
{
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') ||
           (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
}

bool qlb_label_valid(const char *label)
{
    size_t len = 0;

    while (label[len] != '\0') {
        if (len == QLB_LABEL_MAX || !label_character(label[len])) {
            return false;
        }
        len++;
    }
    return len > 0;
}

/* ---- decode and encode ---- */

static bool fixed_from_disk(const uint8_t *data, struct qlb_ext *ext)
{
    ext->flags = get_be32(data + AT_FLAGS);
    ext->n_checkpoints = get_be16(data + AT_COUNT);
    ext->granularity_bits = get_be32(data + AT_GRANULARITY);
    if ((ext->flags & ~(uint32_t)(QLB_EXT_SYNC | QLB_EXT_DURABLE)) != 0 ||
        data[AT_STATE] > QLB_STATE_BROKEN || data[AT_RELEASED] > 1 ||
        ext->n_checkpoints > QLB_MAX_CHECKPOINTS ||
        ext->granularity_bits < GRANULARITY_BITS_MIN ||
        ext->granularity_bits > GRANULARITY_BITS_MAX ||
        get_be32(data + AT_RESERVED_32) != 0 ||
        get_be64(data + AT_RESERVED_64) != 0) {
        return false;
    }
    ext->state = (enum qlb_backup_state)data[AT_STATE];
    ext->released = data[AT_RELEASED] == 1;
    ext->generation = get_be64(data + AT_GENERATION);
    memcpy(ext->image_uuid.bytes, data + AT_IMAGE_UUID, 16);
    memcpy(ext->boot_id, data + AT_BOOT_ID, 16);
    ext->device = get_be64(data + AT_DEVICE);
    ext->backing_digest = get_be64(data + AT_BACKING);
    ext->backing_stat_digest = get_be64(data + AT_BACKING_STAT);
    ext->data_file_stat_digest = get_be64(data + AT_DATA_FILE_STAT);
    memcpy(ext->set_uuid.bytes, data + AT_SET_UUID, 16);
    ext->begin_time = get_be64(data + AT_BEGIN_TIME);
    return true;
}

static void fixed_to_disk(const struct qlb_ext *ext, uint8_t *data)
{
    put_be32(data + AT_VERSION, EXT_VERSION);
    put_be32(data + AT_FLAGS, ext->flags);
    data[AT_STATE] = (uint8_t)ext->state;
    data[AT_RELEASED] = ext->released ? 1 : 0;
    put_be16(data + AT_COUNT, (uint16_t)ext->n_checkpoints);
    put_be32(data + AT_GRANULARITY, ext->granularity_bits);
    put_be64(data + AT_GENERATION, ext->generation);
    memcpy(data + AT_IMAGE_UUID, ext->image_uuid.bytes, 16);
    memcpy(data + AT_BOOT_ID, ext->boot_id, 16);
    put_be64(data + AT_DEVICE, ext->device);
    put_be64(data + AT_BACKING, ext->backing_digest);
    put_be64(data + AT_BACKING_STAT, ext->backing_stat_digest);
    put_be64(data + AT_DATA_FILE_STAT, ext->data_file_stat_digest);
    memcpy(data + AT_SET_UUID, ext->set_uuid.bytes, 16);
    put_be64(data + AT_BEGIN_TIME, ext->begin_time);
}

/* The label is 22 bytes without a terminator where it is that long; what
 * follows a shorter one must be zero. */
static bool label_from_disk(const uint8_t *data, char *label)
{
    size_t len;

    memcpy(label, data, QLB_LABEL_MAX);
    label[QLB_LABEL_MAX] = '\0';
    len = strlen(label);
    return qlb_label_valid(label) &&
           qlb_bits_all_zero(data + len, QLB_LABEL_MAX - len);
}

static bool record_from_disk(const uint8_t *data, struct qlb_checkpoint *cp)
{
    uint16_t flags = get_be16(data + REC_FLAGS);

    memcpy(cp->uuid.bytes, data + REC_UUID, 16);
    cp->time = get_be64(data + REC_TIME);
    cp->virtual_size = get_be64(data + REC_SIZE);
    memcpy(cp->root, data + REC_ROOT, sizeof(cp->root));
    cp->confirmed = (flags & RECORD_CONFIRMED) != 0;
    return (flags & ~RECORD_CONFIRMED) == 0 && !qlb_uuid_is_zero(&cp->uuid) &&
           label_from_disk(data + REC_LABEL, cp->label);
}

static void record_to_disk(const struct qlb_checkpoint *cp, uint8_t *data)
{
    memcpy(data + REC_UUID, cp->uuid.bytes, 16);
    put_be64(data + REC_TIME, cp->time);
    put_be64(data + REC_SIZE, cp->virtual_size);
    memcpy(data + REC_ROOT, cp->root, sizeof(cp->root));
    put_be16(data + REC_FLAGS, cp->confirmed ? RECORD_CONFIRMED : 0);
    memcpy(data + REC_LABEL, cp->label, strnlen(cp->label, QLB_LABEL_MAX));
}

enum qlb_ext_verdict qlb_ext_decode(const void *data, size_t size,
                                    struct qlb_ext *ext)
{
    const uint8_t *bytes = data;
    const uint8_t *record = bytes + FIXED_SIZE;

    memset(ext, 0, sizeof(*ext));
    /* The version comes first: another one may have another length. */
    if (size < AT_VERSION + 4) {
        return QLB_EXT_DAMAGED;
    }
    if (get_be32(bytes + AT_VERSION) != EXT_VERSION) {
        return QLB_EXT_UNSUPPORTED;
    }
    if (size != QLB_EXT_SIZE ||
        get_be32(bytes + AT_CRC) != ext_checksum(bytes) ||
        !fixed_from_disk(bytes, ext)) {
        return QLB_EXT_DAMAGED;
    }
    for (unsigned i = 0; i < ext->n_checkpoints; i++) {
        struct qlb_checkpoint *cp = &ext->checkpoints[i];

        if (!record_from_disk(record, cp) ||
            qlb_ext_find(ext, &cp->uuid) != (int)i) {
            return QLB_EXT_DAMAGED;
        }
        record += RECORD_SIZE;
    }
    if (!qlb_bits_all_zero(record,
                           (size_t)(bytes + QLB_EXT_SIZE - record))) {
        return QLB_EXT_DAMAGED;
    }
    return QLB_EXT_GOOD;
}

void qlb_ext_encode(const struct qlb_ext *ext, void *data)
{
    uint8_t *bytes = data;

    memset(bytes, 0, QLB_EXT_SIZE);
    fixed_to_disk(ext, bytes);
    for (unsigned i = 0; i < ext->n_checkpoints; i++) {
        record_to_disk(&ext->checkpoints[i],
                       bytes + FIXED_SIZE + i * RECORD_SIZE);
    }
    put_be32(bytes + AT_CRC, ext_checksum(bytes));
}

/* ---- names and the list ---- */

#define NAME_PREFIX "lb-"
#define NAME_PREFIX_LEN 3

_Static_assert(NAME_PREFIX_LEN + QLB_UUID_TEXT <= QLB_BITMAP_NAME_SIZE,
               "a bitmap's name fits");

void qlb_bitmap_name(const struct qlb_uuid *checkpoint, char *name)
{
    memcpy(name, NAME_PREFIX, NAME_PREFIX_LEN);
    qlb_uuid_format(checkpoint, name + NAME_PREFIX_LEN);
}

bool qlb_bitmap_name_is_ours(const char *name, size_t length)
{
    return length >= NAME_PREFIX_LEN &&
           memcmp(name, NAME_PREFIX, NAME_PREFIX_LEN) == 0;
}

int qlb_ext_find(const struct qlb_ext *ext, const struct qlb_uuid *uuid)
{
    for (unsigned i = 0; i < ext->n_checkpoints; i++) {
        if (qlb_uuid_equal(&ext->checkpoints[i].uuid, uuid)) {
            return (int)i;
        }
    }
    return -1;
}

int qlb_ext_newest_confirmed(const struct qlb_ext *ext, const char *label)
{
    for (unsigned i = ext->n_checkpoints; i > 0; i--) {
        const struct qlb_checkpoint *cp = &ext->checkpoints[i - 1];

        if (cp->confirmed && strcmp(cp->label, label) == 0) {
            return (int)i - 1;
        }
    }
    return -1;
}

int qlb_ext_foldable(const struct qlb_ext *ext, int keep)
{
    for (int i = 0; i < (int)ext->n_checkpoints; i++) {
        if (i != keep &&
            i != qlb_ext_newest_confirmed(ext, ext->checkpoints[i].label)) {
            return i;
        }
    }
    return -1;
}

void qlb_ext_remove(struct qlb_ext *ext, unsigned i)
{
    if (i >= ext->n_checkpoints) {
        return;
    }
    ext->n_checkpoints--;
    memmove(&ext->checkpoints[i], &ext->checkpoints[i + 1],
            (ext->n_checkpoints - i) * sizeof(ext->checkpoints[0]));
    memset(&ext->checkpoints[ext->n_checkpoints], 0,
           sizeof(ext->checkpoints[0]));
}

/* ---- digests ---- */

uint64_t qlb_fnv_start(void)
{
    return UINT64_C(0xcbf29ce484222325);
}

uint64_t qlb_fnv_update(uint64_t hash, const void *data, size_t len)
{
    const uint8_t *bytes = data;

    for (size_t i = 0; i < len; i++) {
        hash = (hash ^ bytes[i]) * UINT64_C(0x100000001b3);
    }
    return hash;
}

uint64_t qlb_fnv_u64(uint64_t hash, uint64_t value)
{
    uint8_t bytes[8];

    put_be64(bytes, value);
    return qlb_fnv_update(hash, bytes, sizeof(bytes));
}

uint64_t qlb_fnv_final(uint64_t hash)
{
    return hash == 0 ? 1 : hash;
}

uint64_t qlb_backing_digest(const char *backing, const char *format)
{
    uint64_t hash = qlb_fnv_start();

    if (backing == NULL) {
        return 0;
    }
    if (format == NULL) {
        format = "";
    }
    /* The zero bytes that end the strings are part of what is hashed. */
    hash = qlb_fnv_update(hash, backing, strlen(backing) + 1);
    hash = qlb_fnv_update(hash, format, strlen(format) + 1);
    return qlb_fnv_final(hash);
}

/* ---- trust ---- */

uint64_t qlb_canary_last(uint64_t checkpoint_size, uint64_t present_size,
                         unsigned granularity_bits)
{
    uint64_t size = min_u64(checkpoint_size, present_size);

    /* A record may claim any size: 0 shares the first granule's canary. */
    return size == 0 ? 0 : (size - 1) >> granularity_bits;
}

static bool boot_id_zero(const struct qlb_ext *ext)
{
    return qlb_bits_all_zero(ext->boot_id, sizeof(ext->boot_id));
}

/* Rules 12 and 13: the image was open for tracked writing when its writer
 * ended, whoever wrote it since: who does not know the extension has gone on
 * from bits that may not be those of that writer. */
static enum qlb_trust trust_left_open(const struct qlb_ext *ext,
                                      const struct qlb_trust_image *image)
{
    if (boot_id_zero(ext) || (ext->flags & QLB_EXT_SYNC) != 0) {
        return QLB_TRUSTED;
    }
    if (memcmp(ext->boot_id, image->boot_id, sizeof(ext->boot_id)) != 0) {
        return QLB_TRUST_POWER_LOSS;
    }
    if (ext->device != image->device) {
        return QLB_TRUST_MOVED_OPEN;
    }
    return QLB_TRUSTED;
}

enum qlb_trust qlb_trust_image(const struct qlb_ext *ext,
                               const struct qlb_trust_image *image)
{
    if (ext->n_checkpoints == 0) {
        return QLB_TRUST_NO_CHECKPOINT;
    }
    if (!image->autoclear_bitmaps) {
        return QLB_TRUST_BITMAPS_DROPPED;
    }
    if (!image->directory_readable) {
        return QLB_TRUST_DIRECTORY_DAMAGED;
    }
    if (image->unlisted_bitmap) {
        return QLB_TRUST_UNLISTED_BITMAP;
    }
    if (image->dirty && !image->autoclear_livebackup) {
        return QLB_TRUST_NOT_CLOSED;
    }
    if (ext->backing_digest != image->backing_digest) {
        return QLB_TRUST_BACKING_CHANGED;
    }
    if (ext->backing_stat_digest != image->backing_stat_digest) {
        return QLB_TRUST_BACKING_MODIFIED;
    }
    if (image->autoclear_livebackup && boot_id_zero(ext) &&
        ext->data_file_stat_digest != image->data_file_stat_digest) {
        return QLB_TRUST_DATA_FILE_MODIFIED;
    }
    return trust_left_open(ext, image);
}

enum qlb_trust qlb_trust_bitmap(const struct qlb_ext *ext, unsigned i,
                                const struct qlb_trust_bitmap *bitmap)
{
    bool newest = i + 1 == ext->n_checkpoints;

    if (!bitmap->present) {
        return QLB_TRUST_BITMAP_MISSING;
    }
    if (bitmap->automatic != newest) {
        return QLB_TRUST_BITMAP_DISABLED;
    }
    if (bitmap->in_use) {
        return QLB_TRUST_IN_USE;
    }
    if (!bitmap->first_canary || !bitmap->last_canary) {
        return QLB_TRUST_CANARY;
    }
    return QLB_TRUSTED;
}

/* ---- tracking writers ---- */

uint64_t qlb_granule_count(uint64_t disk_size, unsigned granularity_bits)
{
    uint64_t last = (UINT64_C(1) << granularity_bits) - 1;

    return (disk_size >> granularity_bits) + ((disk_size & last) != 0);
}

struct qlb_granules qlb_granules_of(uint64_t offset, uint64_t bytes,
                                    uint64_t disk_size,
                                    unsigned granularity_bits)
{
    struct qlb_granules range = { 0, 0 };

    if (offset >= disk_size || bytes == 0) {
        return range;
    }
    if (bytes > disk_size - offset) {
        bytes = disk_size - offset;
    }
    range.first = offset >> granularity_bits;
    range.count = ((offset + bytes - 1) >> granularity_bits) - range.first + 1;
    return range;
}

/* The rest of the range, from the next byte on. */
static struct qlb_granules behind_front(struct qlb_granules range)
{
    uint64_t taken = bitrange_front(range.first, range.count);

    range.first += taken;
    range.count -= taken;
    return range;
}

bool qlb_granules_marked(const uint8_t *bits, struct qlb_granules range)
{
    for (; range.count > 0; range = behind_front(range)) {
        uint8_t mask = bitrange_mask(range.first, range.count);

        if ((__atomic_load_n(&bits[range.first / 8], __ATOMIC_ACQUIRE) &
             mask) != mask) {
            return false;
        }
    }
    return true;
}

void qlb_granules_mark(uint8_t *bits, struct qlb_granules range)
{
    for (; range.count > 0; range = behind_front(range)) {
        __atomic_fetch_or(&bits[range.first / 8],
                          bitrange_mask(range.first, range.count),
                          __ATOMIC_ACQ_REL);
    }
}

bool qlb_writethrough_next(const uint8_t *persisted,
                           struct qlb_granules *range, uint64_t *chunk)
{
    while (range->count > 0) {
        uint64_t left = QLB_CHUNK_BITS - range->first % QLB_CHUNK_BITS;
        struct qlb_granules part = *range;

        if (part.count > left) {
            part.count = left;
        }
        *chunk = range->first / QLB_CHUNK_BITS;
        range->first += part.count;
        range->count -= part.count;
        if (!qlb_granules_marked(persisted, part)) {
            return true;
        }
    }
    return false;
}

void qlb_ext_begin_session(struct qlb_ext *ext, const uint8_t boot_id[16],
                           uint64_t device)
{
    memcpy(ext->boot_id, boot_id, sizeof(ext->boot_id));
    ext->device = device;
    ext->generation++;
}

void qlb_ext_end_session(struct qlb_ext *ext)
{
    memset(ext->boot_id, 0, sizeof(ext->boot_id));
    ext->device = 0;
    ext->generation++;
}

void qlb_bits_resize(uint8_t *bits, uint64_t old_size, uint64_t new_size,
                     unsigned granularity_bits)
{
    uint64_t old_count = qlb_granule_count(old_size, granularity_bits);
    uint64_t count = qlb_granule_count(new_size, granularity_bits);
    uint64_t known = old_count < count ? old_count : count;

    /* what the last byte has behind the end would be read as bits */
    for (uint64_t n = known; n % 8 != 0; n++) {
        bits[n / 8] &= (uint8_t)~(1u << (n % 8));
    }
    if (count == 0) {
        return;
    }
    if (new_size > old_size) {
        /* from the granule that holds the old end; an old end on its border
         * begins a new one, which has no canary yet */
        uint64_t first = old_size >> granularity_bits;

        qlb_bits_set(bits, first, count - first);
        qlb_bit_set(bits, 0); /* an empty disk has no canaries */
    } else if (new_size < old_size) {
        qlb_bit_set(bits, count - 1);
    }
    for (uint64_t n = count; n % 8 != 0; n++) {
        bits[n / 8] &= (uint8_t)~(1u << (n % 8));
    }
}

static const struct {
    const char *keyword;
    const char *reason;
} trust_text[] = {
    [QLB_TRUSTED] = {
        "trusted", "every change has been tracked",
    },
    [QLB_TRUST_OFF] = {
        "off", "livebackup is off",
    },
    [QLB_TRUST_UNSUPPORTED] = {
        "unsupported",
        "the livebackup extension has a version that this program does not "
        "know",
    },
    [QLB_TRUST_EXTENSION_DAMAGED] = {
        "extension-damaged", "the livebackup extension is damaged",
    },
    [QLB_TRUST_NO_CHECKPOINT] = {
        "no-checkpoint", "there is no checkpoint to go on from",
    },
    [QLB_TRUST_BITMAPS_DROPPED] = {
        "bitmaps-dropped",
        "a program that does not know dirty bitmaps has written the image, "
        "or removed them all",
    },
    [QLB_TRUST_DIRECTORY_DAMAGED] = {
        "directory-damaged", "the directory of the dirty bitmaps is damaged",
    },
    [QLB_TRUST_UNLISTED_BITMAP] = {
        "unlisted-bitmap",
        "there is a bitmap with a name of livebackup that no checkpoint has",
    },
    [QLB_TRUST_NOT_CLOSED] = {
        "not-closed",
        "the image is marked dirty: its last writer did not close it",
    },
    [QLB_TRUST_BACKING_CHANGED] = {
        "backing-changed", "the image was given another backing file",
    },
    [QLB_TRUST_BACKING_MODIFIED] = {
        "backing-modified", "a backing file was changed or is missing",
    },
    [QLB_TRUST_DATA_FILE_MODIFIED] = {
        "data-file-modified",
        "the external data file was changed behind the image's back",
    },
    [QLB_TRUST_POWER_LOSS] = {
        "power-loss", "the host went down while the image was open",
    },
    [QLB_TRUST_MOVED_OPEN] = {
        "moved-open",
        "the file system was mounted elsewhere while the image was open",
    },
    [QLB_TRUST_BITMAP_MISSING] = {
        "bitmap-missing",
        "the dirty bitmap of a checkpoint is missing or is not as it was made",
    },
    [QLB_TRUST_BITMAP_DISABLED] = {
        "bitmap-disabled",
        "a dirty bitmap was switched off, or an old one on",
    },
    [QLB_TRUST_IN_USE] = {
        "in-use",
        "QEMU has the image open now, or was killed while it had",
    },
    [QLB_TRUST_CANARY] = {
        "canary",
        "a dirty bitmap was cleared, recreated or shrunk by a program that "
        "does not know livebackup",
    },
};

const char *qlb_trust_keyword(enum qlb_trust trust)
{
    return trust_text[trust].keyword;
}

const char *qlb_trust_reason(enum qlb_trust trust)
{
    return trust_text[trust].reason;
}
