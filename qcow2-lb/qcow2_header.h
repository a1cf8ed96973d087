/* The header of a qcow2 image: parsed, checked, and written back.
 *
 * Source of the rules: the qcow2 specification (docs/interop/qcow2.txt of
 * QEMU), "Header" and "Header extensions".  An image is hostile: every field
 * is checked against a named maximum before it is used.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_QCOW2_HEADER_H
#define QLB_QCOW2_HEADER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "blkio.h"
#include "error.h"

/* The livebackup extension and autoclear bit (livebackup-extension.md). */
#define QLB_EXT_LIVEBACKUP 0x4C424B50u
#define QLB_EXT_LIVEBACKUP_SIZE 2176
#define QLB_AUTOCLEAR_BITMAPS (UINT64_C(1) << 0)
#define QLB_AUTOCLEAR_DATA_FILE_RAW (UINT64_C(1) << 1)
#define QLB_AUTOCLEAR_LIVEBACKUP (UINT64_C(1) << 62)
#define QLB_HEADER_ATOM 4096 /* bytes that reach the file whole */

#define QLB_INCOMPAT_DIRTY (UINT64_C(1) << 0)
#define QLB_INCOMPAT_CORRUPT (UINT64_C(1) << 1)
#define QLB_INCOMPAT_DATA_FILE (UINT64_C(1) << 2)
#define QLB_INCOMPAT_COMPRESSION (UINT64_C(1) << 3)
#define QLB_INCOMPAT_EXTL2 (UINT64_C(1) << 4)
/* A rollback in place was begun and is not finished (ours). */
#define QLB_INCOMPAT_ROLLBACK (UINT64_C(1) << 62)

enum qlb_compression { QLB_COMPRESSION_DEFLATE = 0, QLB_COMPRESSION_ZSTD = 1 };

/* Any header extension, as found. */
struct qlb_header_ext {
    uint32_t type;
    uint32_t size;
    uint8_t *data; /* size bytes, owned by the header */
};

struct qlb_qcow2_header {
    unsigned version;          /* 2 or 3 */
    unsigned cluster_bits;     /* 9 to 21 */
    uint64_t cluster_size;     /* bytes */
    uint64_t virtual_size;     /* bytes; whole sectors of 512, as QEMU has
                                  it: the rest of the field is cut off */
    uint32_t crypt_method;     /* 0: none */
    uint32_t l1_entries;
    uint64_t l1_offset;
    uint64_t refcount_table_offset;
    uint32_t refcount_table_clusters;
    uint32_t n_snapshots;
    uint64_t snapshots_offset;
    uint64_t incompatible, compatible, autoclear;
    unsigned refcount_order;   /* refcount width is 1 << order bits, 0 to 6 */
    uint32_t header_length;    /* 72 for version 2; kept when written back */
    enum qlb_compression compression;

    bool extended_l2;          /* L2 entries have 16 bytes, 32 subclusters */
    bool data_file_raw;
    char *backing_name;        /* NULL if none */
    char *backing_format;      /* NULL if not recorded */
    char *data_file;           /* name in the extension; NULL if none */

    bool has_bitmaps;          /* the standard bitmaps extension is there; its
                                  fields are unchecked, and n_bitmaps is 0
                                  where it can't be decoded */
    uint32_t n_bitmaps;
    uint64_t bitmap_directory_size, bitmap_directory_offset;

    struct qlb_header_ext *ext; /* all of them, in the order of the file */
    unsigned n_ext;

    /* What the writer needs. Fields of the header behind byte 104 that have
     * no meaning here are kept as they were. */
    uint8_t *more;             /* header_length - 104 bytes; NULL if none */
    uint64_t size_field;       /* virtual size as written in the file */
    uint64_t backing_offset;   /* where the name stands; 0 if none */
    uint64_t used;             /* first byte that neither extensions nor
                                  backing name of the file reach */
};

/* Reads and checks the header. With for_reading_data, also refuses by name
 * what can't be read correctly: encryption, unknown incompatible features
 * (named from the image's feature name table), images marked corrupt, a
 * backing file without a format, an external data file without a name.
 * Errors, which begin with the file's name: QLB_E_DAMAGED where a field
 * breaks the specification or the image is marked corrupt, QLB_E_RUNTIME
 * where the image is fine but unsupported or is no qcow2 image at all,
 * QLB_E_UNTRUSTED (for_reading_data) where a rollback is not finished.
 * NULL on failure. */
struct qlb_qcow2_header *qlb_qcow2_header_read(struct qlb_blkio *io,
                                               bool for_reading_data,
                                               struct qlb_error *err);
/* The same, for_reading_data, by who finishes a rollback. */
struct qlb_qcow2_header *
qlb_qcow2_header_read_unfinished(struct qlb_blkio *io,
                                 struct qlb_error *err);
void qlb_qcow2_header_free(struct qlb_qcow2_header *header);

/* The only extension of that type; NULL if there is none. *twice (may be
 * NULL) tells that there is more than one. */
const struct qlb_header_ext *
qlb_qcow2_header_ext(const struct qlb_qcow2_header *header, uint32_t type,
                     bool *twice);

/* Sets (data != NULL) or removes an extension of the type in memory. A new
 * one goes behind the others. */
int qlb_qcow2_header_set_ext(struct qlb_qcow2_header *header, uint32_t type,
                             const void *data, uint32_t size,
                             struct qlb_error *err);

/* Puts the livebackup bit's name into the feature name table (creates it
 * where the image has none and there is room), or takes it out. */
int qlb_qcow2_header_name_feature(struct qlb_qcow2_header *header, bool on,
                                  struct qlb_error *err);
/* Sets or clears QLB_INCOMPAT_ROLLBACK, in memory, and its name likewise. */
int qlb_qcow2_header_mark_rollback(struct qlb_qcow2_header *header, bool on,
                                   struct qlb_error *err);

/* Gives the header of a new image a backing file, in memory: its name as it is
 * to be recorded (1 to 1023 bytes), and its format. To be called when all
 * extensions are set. QLB_E_USAGE where there is no room. */
int qlb_qcow2_header_set_backing(struct qlb_qcow2_header *header,
                                 const char *name, const char *format,
                                 struct qlb_error *err);

/* Whether header, extensions and the end marker fit into the first 4096
 * bytes (and the backing file name there or behind them, within the first
 * cluster), with a livebackup extension, its feature name, a bitmaps
 * extension and the feature name table that QEMU writes counted even where
 * they are not there yet. */
bool qlb_qcow2_header_has_room(const struct qlb_qcow2_header *header);

/* Writes the header back in one write of the file's first 4096 bytes (one
 * cluster if that is smaller), as livebackup-extension.md, "Write orders",
 * demands: the part of the header that lies behind byte 4096 (a long backing
 * file name) is written and synced first, to a place the present header does
 * not use. n_bitmaps and the directory fields go into the bitmaps extension
 * (removed where has_bitmaps is false). Unknown autoclear bits are cleared.
 * backing_name is not to be changed in between. Errors: QLB_E_USAGE where the
 * header does not fit (nothing is written then), QLB_E_RUNTIME. Does not sync
 * after the last write. */
int qlb_qcow2_header_write(struct qlb_qcow2_header *header,
                           struct qlb_blkio *io, struct qlb_error *err);

/* Encodes header, extensions, end marker and, as far as it lies there, the
 * backing file name (at backing_offset) as the first `size` bytes of a file;
 * what is left is zero. For new images; header_write does it by itself. */
int qlb_qcow2_header_encode(const struct qlb_qcow2_header *header,
                            uint8_t *buf, size_t size,
                            struct qlb_error *err);

#endif
