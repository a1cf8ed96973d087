/* The file that originals are saved in, without I/O.
 *
 * Everything in it but the L2 entries and the data follows from the size of the
 * disk and of the unit (live-backup.md, "The orig"). So a header is good if it
 * is, byte for byte, the one that would be encoded from what was read. The L2
 * tables follow each other and are as large as a cluster: the entry of cluster
 * n is entry n counted from the first table.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "orig.h"

#include <string.h>

#include "byteorder.h"
#include "checked.h"
#include "crc32c.h"

#define MAGIC 0x514649fbu /* "QFI\xfb" */
#define HEADER_LENGTH 104
#define INCOMPATIBLE_DIRTY 1
#define REFCOUNT_ORDER 4
#define EXTENSION_TYPE 0x4c424f52u /* "LBOR" */
#define EXTENSION_VERSION 1
#define UNIT_BITS_MIN 16
#define UNIT_BITS_MAX 31
#define L1_ENTRIES_MAX (UINT32_C(32) * 1024 * 1024 / 8) /* as QEMU has it */
#define FILE_SIZE_MAX (UINT64_C(1) << 56) /* what an L2 entry can name */

/* Set in an entry: one reference, which is the entry's own. */
#define ENTRY_COPIED (UINT64_C(1) << 63)
#define ENTRY_OFFSET UINT64_C(0x00fffffffffffe00)

/* What else there is in the header is zero. */
enum header_offset {
    AT_MAGIC = 0,
    AT_QCOW2_VERSION = 4,
    AT_CLUSTER_BITS = 20,
    AT_SIZE = 24,
    AT_L1_ENTRIES = 36,
    AT_L1_OFFSET = 40,
    AT_REFTABLE_OFFSET = 48,
    AT_REFTABLE_CLUSTERS = 56,
    AT_INCOMPATIBLE = 72,
    AT_REFCOUNT_ORDER = 96,
    AT_HEADER_LENGTH = 100,
};

/* An extension: type and length, then its data, padded to 8 bytes. */
#define EXTENSION_HEAD 8
#define EXTENSION_END 0

enum extension_offset {
    EXT_VERSION = 0,
    EXT_CRC = 4,
    EXT_UNIT_SIZE = 8,
    EXT_IMAGE_UUID = 16,
    EXT_SET_UUID = 32,
    EXT_CHECKPOINT_UUID = 48,
    EXT_TIME = 64,
    EXT_PARENT_UUID = 72,
    EXTENSION_SIZE = 96,
};

_Static_assert(HEADER_LENGTH + EXTENSION_HEAD + EXTENSION_SIZE +
               EXTENSION_HEAD == QLB_ORIG_HEADER_SIZE,
               "the end marker ends the header");

/* ---- layout ---- */

bool qlb_orig_layout(struct qlb_orig *orig, uint64_t disk_size,
                     unsigned unit_bits)
{
    unsigned bits = (unsigned)min_u64(unit_bits, QLB_ORIG_MAX_CLUSTER_BITS);
    uint64_t cluster = UINT64_C(1) << bits;
    uint64_t l1_entries;

    if (unit_bits < UNIT_BITS_MIN || unit_bits > UNIT_BITS_MAX) {
        return false;
    }
    /* an L2 table is a cluster of entries of 8 bytes, one for each cluster */
    l1_entries = max_u64(
        div_round_up(disk_size, UINT64_C(1) << (2 * bits - 3)), 1);
    if (l1_entries > L1_ENTRIES_MAX) {
        return false;
    }
    orig->disk_size = disk_size;
    orig->unit_bits = unit_bits;
    orig->cluster_bits = bits;
    orig->l1_entries = (uint32_t)l1_entries;
    orig->l1_offset = 2 * cluster;
    orig->l2_offset = orig->l1_offset + round_up(l1_entries * 8, cluster);
    orig->data_offset = orig->l2_offset + l1_entries * cluster;
    /* the size is at most 2^61 here: the sum can't overflow */
    return orig->data_offset + round_up(disk_size, cluster) <= FILE_SIZE_MAX;
}

/* ---- header ---- */

static void extension_to_disk(const struct qlb_orig *orig, uint8_t *data)
{
    put_be32(data + EXT_VERSION, EXTENSION_VERSION);
    put_be64(data + EXT_UNIT_SIZE, UINT64_C(1) << orig->unit_bits);
    memcpy(data + EXT_IMAGE_UUID, orig->image_uuid.bytes, 16);
    memcpy(data + EXT_SET_UUID, orig->set_uuid.bytes, 16);
    memcpy(data + EXT_CHECKPOINT_UUID, orig->checkpoint_uuid.bytes, 16);
    put_be64(data + EXT_TIME, orig->time);
    memcpy(data + EXT_PARENT_UUID, orig->parent_uuid.bytes, 16);
    put_be32(data + EXT_CRC,
             qlb_crc32c_with_hole(data, EXTENSION_SIZE, EXT_CRC));
}

void qlb_orig_encode_header(const struct qlb_orig *orig, void *header)
{
    uint8_t *bytes = header;
    uint8_t *extension = bytes + HEADER_LENGTH;

    memset(bytes, 0, QLB_ORIG_HEADER_SIZE);
    put_be32(bytes + AT_MAGIC, MAGIC);
    put_be32(bytes + AT_QCOW2_VERSION, 3);
    put_be32(bytes + AT_CLUSTER_BITS, orig->cluster_bits);
    put_be64(bytes + AT_SIZE, orig->disk_size);
    put_be32(bytes + AT_L1_ENTRIES, orig->l1_entries);
    put_be64(bytes + AT_L1_OFFSET, orig->l1_offset);
    put_be64(bytes + AT_REFTABLE_OFFSET, UINT64_C(1) << orig->cluster_bits);
    put_be32(bytes + AT_REFTABLE_CLUSTERS, 1);
    put_be64(bytes + AT_INCOMPATIBLE, INCOMPATIBLE_DIRTY);
    put_be32(bytes + AT_REFCOUNT_ORDER, REFCOUNT_ORDER);
    put_be32(bytes + AT_HEADER_LENGTH, HEADER_LENGTH);
    put_be32(extension, EXTENSION_TYPE);
    put_be32(extension + 4, EXTENSION_SIZE);
    extension_to_disk(orig, extension + EXTENSION_HEAD);
}

void qlb_orig_encode_l1(const struct qlb_orig *orig, uint32_t first, uint32_t n,
                        void *entries)
{
    uint8_t *bytes = entries;

    for (uint32_t i = 0; i < n; i++) {
        uint64_t table = (uint64_t)first + i;

        put_be64(bytes + (size_t)i * 8,
                 ENTRY_COPIED |
                 (orig->l2_offset + (table << orig->cluster_bits)));
    }
}

/* The data of our extension, NULL if there is none. It is looked for among
 * others: a program that rewrites the header may move it, and the file remains
 * one of ours. */
static const uint8_t *find_extension(const uint8_t *bytes, size_t size)
{
    uint64_t at;

    if (size < QLB_ORIG_HEADER_SIZE || get_be32(bytes + AT_MAGIC) != MAGIC ||
        get_be32(bytes + AT_QCOW2_VERSION) < 3) {
        return NULL;
    }
    at = get_be32(bytes + AT_HEADER_LENGTH);
    while (range_within(at, EXTENSION_HEAD, size)) {
        uint32_t type = get_be32(bytes + at);
        uint32_t length = get_be32(bytes + at + 4);

        at += EXTENSION_HEAD;
        if (type == EXTENSION_TYPE) {
            return bytes + at;
        }
        if (type == EXTENSION_END) {
            break;
        }
        at += round_up(length, 8);
    }
    return NULL;
}

/* log2 of the unit; 0, which is out of range, if it is no power of two. */
static unsigned unit_bits_from_disk(const uint8_t *extension)
{
    uint64_t unit = get_be64(extension + EXT_UNIT_SIZE);

    return unit == 0 || (unit & (unit - 1)) != 0
               ? 0
               : (unsigned)__builtin_ctzll(unit);
}

enum qlb_orig_verdict qlb_orig_decode_header(const void *data, size_t size,
                                             struct qlb_orig *orig)
{
    const uint8_t *bytes = data;
    const uint8_t *extension = find_extension(bytes, size);
    uint8_t expected[QLB_ORIG_HEADER_SIZE];

    memset(orig, 0, sizeof(*orig));
    if (extension == NULL) {
        return QLB_ORIG_FOREIGN;
    }
    /* The version comes first: another one may have another layout. */
    if (range_within((uint64_t)(extension - bytes), 4, size) &&
        get_be32(extension + EXT_VERSION) != EXTENSION_VERSION) {
        return QLB_ORIG_UNSUPPORTED;
    }
    if (extension != bytes + HEADER_LENGTH + EXTENSION_HEAD ||
        !qlb_orig_layout(orig, get_be64(bytes + AT_SIZE),
                         unit_bits_from_disk(extension))) {
        return QLB_ORIG_DAMAGED;
    }
    memcpy(orig->image_uuid.bytes, extension + EXT_IMAGE_UUID, 16);
    memcpy(orig->set_uuid.bytes, extension + EXT_SET_UUID, 16);
    memcpy(orig->checkpoint_uuid.bytes, extension + EXT_CHECKPOINT_UUID, 16);
    orig->time = get_be64(extension + EXT_TIME);
    memcpy(orig->parent_uuid.bytes, extension + EXT_PARENT_UUID, 16);
    qlb_orig_encode_header(orig, expected);
    return memcmp(bytes, expected, sizeof(expected)) == 0 ? QLB_ORIG_GOOD
                                                          : QLB_ORIG_DAMAGED;
}

/* ---- entries ---- */

uint64_t qlb_orig_entries_offset(const struct qlb_orig *orig, uint64_t unit)
{
    return orig->l2_offset + unit * qlb_orig_entries_per_unit(orig) * 8;
}

unsigned qlb_orig_entries_per_unit(const struct qlb_orig *orig)
{
    return 1u << (orig->unit_bits - orig->cluster_bits);
}

void qlb_orig_encode_entries(const struct qlb_orig *orig, uint64_t n,
                             uint64_t data_offset, void *entries)
{
    uint8_t *bytes = entries;

    for (uint64_t i = 0; i < n; i++) {
        put_be64(bytes + i * 8,
                 data_offset == QLB_ORIG_ZERO
                     ? QLB_ORIG_ZERO
                     : ENTRY_COPIED |
                       (data_offset + (i << orig->cluster_bits)));
    }
}

enum qlb_orig_entry qlb_orig_decode_entry(const struct qlb_orig *orig,
                                          const void *entry, uint64_t *offset)
{
    uint64_t value = get_be64(entry);
    uint64_t at = value & ENTRY_OFFSET;

    *offset = 0;
    if (value == 0) {
        return QLB_ORIG_ENTRY_NONE;
    }
    if (value == QLB_ORIG_ZERO) {
        return QLB_ORIG_ENTRY_ZERO;
    }
    if (value != (at | ENTRY_COPIED) || at < orig->data_offset ||
        (at & ((UINT64_C(1) << orig->cluster_bits) - 1)) != 0) {
        return QLB_ORIG_ENTRY_BAD;
    }
    *offset = at;
    return QLB_ORIG_ENTRY_DATA;
}
