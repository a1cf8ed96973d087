/* The qcow2 format on disk: offsets, magic numbers, masks, and the named
 * maxima that every length from a file meets first.  All integers are
 * big-endian.
 *
 * Source: the qcow2 specification (docs/interop/qcow2.txt of QEMU).  Where it
 * sets no limit, the limit is QEMU's own: an image beyond it can't be opened
 * there either.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_QCOW2_FORMAT_H
#define QLB_QCOW2_FORMAT_H

#include <stdint.h>

#define QLB_QCOW2_MAGIC 0x514649fbu /* "QFI\xfb" */

/* Header, section "Header". */
enum qlb_qcow2_header_field {
    QLB_H_MAGIC = 0,
    QLB_H_VERSION = 4,
    QLB_H_BACKING_OFFSET = 8,
    QLB_H_BACKING_SIZE = 16,
    QLB_H_CLUSTER_BITS = 20,
    QLB_H_SIZE = 24,
    QLB_H_CRYPT_METHOD = 32,
    QLB_H_L1_SIZE = 36,
    QLB_H_L1_OFFSET = 40,
    QLB_H_REFTABLE_OFFSET = 48,
    QLB_H_REFTABLE_CLUSTERS = 56,
    QLB_H_SNAPSHOTS = 60,
    QLB_H_SNAPSHOTS_OFFSET = 64,
    QLB_H_V2_LENGTH = 72,
    QLB_H_INCOMPATIBLE = 72,
    QLB_H_COMPATIBLE = 80,
    QLB_H_AUTOCLEAR = 88,
    QLB_H_REFCOUNT_ORDER = 96,
    QLB_H_HEADER_LENGTH = 100,
    QLB_H_V3_LENGTH = 104,
    QLB_H_COMPRESSION = 104,
};

enum qlb_qcow2_crypt { QLB_CRYPT_NONE = 0, QLB_CRYPT_AES = 1,
                       QLB_CRYPT_LUKS = 2 };

/* Header extensions. */
#define QLB_EXT_END 0u
#define QLB_EXT_BACKING_FORMAT 0xe2792acau
#define QLB_EXT_FEATURE_NAMES 0x6803f857u
#define QLB_EXT_BITMAPS 0x23852875u
#define QLB_EXT_CRYPTO 0x0537be77u
#define QLB_EXT_DATA_FILE 0x44415441u
#define QLB_EXT_HEAD 8          /* type and length before the data */
#define QLB_EXT_BITMAPS_SIZE 24

/* Feature name table: entries of type, bit, name. */
#define QLB_FEATURE_ENTRY 48
#define QLB_FEATURE_NAME 46
enum qlb_feature_type { QLB_FEATURE_INCOMPATIBLE = 0,
                        QLB_FEATURE_COMPATIBLE = 1,
                        QLB_FEATURE_AUTOCLEAR = 2 };

/* Maxima. */
#define QLB_MIN_CLUSTER_BITS 9
#define QLB_MAX_CLUSTER_BITS 21
#define QLB_MIN_EXTL2_CLUSTER_BITS 14 /* subclusters of 512 bytes */
#define QLB_MAX_REFCOUNT_ORDER 6
#define QLB_MAX_L1_BYTES (UINT64_C(32) << 20)
#define QLB_MAX_REFTABLE_BYTES (UINT64_C(8) << 20)
#define QLB_MAX_SNAPSHOTS 65536
#define QLB_MAX_BACKING_NAME 1023
#define QLB_MAX_FORMAT_NAME 15
#define QLB_MAX_DATA_FILE_NAME 4095 /* PATH_MAX without its zero byte */
#define QLB_MAX_EXTENSIONS 256      /* QEMU's: none; ours bounds memory */
#define QLB_MAX_CHAIN 200           /* files of a backing chain */
#define QLB_MAX_OFFSET (UINT64_C(1) << 56)

/* Bitmaps. */
#define QLB_MAX_BITMAPS 65535
#define QLB_MAX_BITMAP_NAME 1023
#define QLB_BITMAP_ENTRY 24         /* fixed part of a directory entry */
#define QLB_MAX_BITMAP_DIRECTORY                                              \
    (QLB_MAX_BITMAPS * (QLB_BITMAP_ENTRY + UINT64_C(1024)))
#define QLB_MAX_BITMAP_TABLE (UINT64_C(8) << 24) /* entries */
#define QLB_MAX_BITMAP_BYTES (UINT64_C(512) << 20)
#define QLB_MIN_GRANULARITY_BITS 9
#define QLB_MAX_GRANULARITY_BITS 31
#define QLB_BITMAP_IN_USE 1u
#define QLB_BITMAP_AUTO 2u
#define QLB_BITMAP_EXTRA_COMPATIBLE 4u
#define QLB_BITMAP_TYPE_DIRTY 1

/* Table entries. */
#define QLB_OFFSET_MASK UINT64_C(0x00fffffffffffe00)
#define QLB_ENTRY_COPIED (UINT64_C(1) << 63)     /* refcount is exactly 1 */
#define QLB_L1_RESERVED UINT64_C(0x7f000000000001ff)
#define QLB_L2_COMPRESSED (UINT64_C(1) << 62)
#define QLB_L2_ZERO UINT64_C(1)
#define QLB_L2_RESERVED UINT64_C(0x3f000000000001fe)
#define QLB_REFTABLE_RESERVED UINT64_C(0x1ff)
#define QLB_SUBCLUSTERS 32
#define QLB_SECTOR 512

#endif
