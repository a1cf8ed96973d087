/* The archive format on disk: numbers, offsets, and one from_disk and one
 * to_disk of each structure, shared by the writer and both readers
 * (docs/lbz-format.md; section names in the comments are its own).
 *
 * from_disk checks everything that the structure says about itself and fails
 * with QLB_E_DAMAGED; what relates structures to each other is checked where
 * they meet. Private to lbz_*.c: nothing here is exported.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_LBZ_FORMAT_H
#define QLB_LBZ_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "lbz_reader.h"

/* "Layout": the header of a skippable frame. */
#define LBZ_SKIPPABLE_MAGIC 0x184D2A5Bu
#define LBZ_SKIPPABLE_SIZE 8u

#define LBZ_KIND_SIZE 4u
#define LBZ_KIND_HEADER "LBZH"
#define LBZ_KIND_RECORD "LBZR"
#define LBZ_KIND_PAGE "LBZP"
#define LBZ_KIND_TRAILER "LBZT"
#define LBZ_KIND_END "LBZE"

/* "Header" */
enum {
    LBZ_HEADER_VERSION = 4,
    LBZ_HEADER_RESERVED_1 = 6,
    LBZ_HEADER_INCOMPATIBLE = 8,
    LBZ_HEADER_COMPATIBLE = 16,
    LBZ_HEADER_DIGEST = 24,
    LBZ_HEADER_INCREMENTAL = 25,
    LBZ_HEADER_BLOCK_BITS = 26,
    LBZ_HEADER_LABEL_LENGTH = 27,
    LBZ_HEADER_N_COVERED = 28,
    LBZ_HEADER_VIRTUAL_SIZE = 32,
    LBZ_HEADER_CLIP = 40,
    LBZ_HEADER_TIME = 48,
    LBZ_HEADER_RESERVED_2 = 56,
    LBZ_HEADER_IMAGE_UUID = 64,
    LBZ_HEADER_UUID = 80,
    LBZ_HEADER_PARENT = 96,
    LBZ_HEADER_SET = 112,
    LBZ_HEADER_LABEL = 128,
    LBZ_HEADER_RESERVED_3 = 150,
    LBZ_HEADER_COVERED = 160,
};
#define LBZ_VERSION 1
/* "Index": bit 0 of the incompatible features. */
#define LBZ_FEATURE_INDEX UINT64_C(1)
#define LBZ_BLOCK_BITS 16
#define LBZ_UUID_SIZE 16u
#define LBZ_VIRTUAL_SIZE_MAX (UINT64_C(1) << 56)
#define LBZ_HEADER_MIN (LBZ_HEADER_COVERED + 16u)
#define LBZ_HEADER_MAX                                                        \
    (LBZ_HEADER_COVERED + LBZ_UUID_SIZE * QLB_LBZ_COVERED_MAX +               \
     QLB_DIGEST_MAX)

/* "Record" */
enum {
    LBZ_RECORD_FRAME_SIZE = 4,
    LBZ_RECORD_OFFSET = 8,
    LBZ_RECORD_N_BLOCKS = 16,
    LBZ_RECORD_LIVE = 18,
    LBZ_RECORD_CHECKSUM = 20,
    LBZ_RECORD_SIZE = 24,
};
/* From a record's skippable header to the frame behind it. */
#define LBZ_RECORD_SPACE (LBZ_SKIPPABLE_SIZE + LBZ_RECORD_SIZE)

/* "Page" */
enum {
    LBZ_PAGE_N_FRAMES = 4,
    LBZ_PAGE_NUMBER = 8,
    LBZ_PAGE_N_RUNS = 16,
    LBZ_PAGE_N_LIVE = 20,
    LBZ_PAGE_RESERVED = 24,
    LBZ_PAGE_ENTRIES = 32,
};
enum {
    LBZ_ENTRY_RECORD_OFFSET = 0,
    LBZ_ENTRY_FRAME_SIZE = 8,
    LBZ_ENTRY_FIRST = 12,
    LBZ_ENTRY_N_BLOCKS = 14,
    LBZ_ENTRY_LIVE = 16,
    LBZ_ENTRY_RESERVED = 18,
    LBZ_ENTRY_DIGEST = 24, /* and the size of an entry without its digest */
};
enum {
    LBZ_RUN_FIRST = 0,
    LBZ_RUN_COUNT = 2,
    LBZ_RUN_SIZE = 4,
};
#define LBZ_PAGE_FRAMES_MAX 4096u
#define LBZ_PAGE_RUNS_MAX 2048u
#define LBZ_PAGE_STRIPES (QLB_LBZ_PAGE_BLOCKS / QLB_LBZ_STRIPE_BLOCKS)
#define LBZ_PAGE_BITS 28
#define LBZ_PAGE_NUMBER_END (LBZ_VIRTUAL_SIZE_MAX >> LBZ_PAGE_BITS)

/* "Trailer" */
enum {
    LBZ_TRAILER_RESERVED_1 = 4,
    LBZ_TRAILER_N_PAGES = 8,
    LBZ_TRAILER_DATA_BLOCKS = 16,
    LBZ_TRAILER_ZERO_BLOCKS = 24,
    LBZ_TRAILER_FRAMES = 32,
    LBZ_TRAILER_COMPRESSED = 40,
    LBZ_TRAILER_RESERVED_2 = 48,
    LBZ_TRAILER_DIRECTORY = 64,
};
enum {
    LBZ_DIR_NUMBER = 0,
    LBZ_DIR_FILE_OFFSET = 8,
    LBZ_DIR_PAYLOAD_SIZE = 16,
    LBZ_DIR_RESERVED = 20,
    LBZ_DIR_DIGEST = 24, /* and the size of an entry without its digest */
};
/* The last bytes of a file. */
enum {
    LBZ_END_OFFSET = 0,
    LBZ_END_PAYLOAD_SIZE = 8,
    LBZ_END_KIND = 12,
    LBZ_END_SIZE = 16,
};
#define LBZ_PAGES_MAX (UINT64_C(1) << 20)
#define LBZ_ENTRY_MAX (LBZ_ENTRY_DIGEST + QLB_DIGEST_MAX)
#define LBZ_DIR_ENTRY_MAX (LBZ_DIR_DIGEST + QLB_DIGEST_MAX)

/* ---- errors ---- */

/* QLB_E_DAMAGED, "damaged at offset OFFSET: ..."; returns -1. */
int lbz_damaged(struct qlb_error *err, uint64_t offset, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* "guest range 0xFIRST-0xLAST" of n_blocks blocks into text. */
#define LBZ_RANGE_TEXT 64
const char *lbz_range(uint64_t guest_offset, uint64_t n_blocks, char *text);

/* Takes "NAME: " off a message of the I/O layer: the name is the caller's to
 * give. */
void lbz_drop_name(struct qlb_error *err, const char *name);

/* ---- structures ---- */

void lbz_skippable_to_disk(uint32_t size, uint8_t *p);
/* The payload's size; false where p is no skippable frame of ours. */
bool lbz_skippable_from_disk(const uint8_t *p, uint32_t *size);
bool lbz_kind_is(const uint8_t *payload, const char *kind);

/* What breaks a rule of the format, or NULL. */
const char *lbz_header_problem(const struct qlb_lbz_header *header);
size_t lbz_header_size(const struct qlb_lbz_header *header);
/* Writes lbz_header_size() bytes, the digest included. */
void lbz_header_to_disk(const struct qlb_lbz_header *header, uint8_t *p);
/* Takes memory for `covered`, which lbz_header_release gives back. The header
 * begins at the file's offset 0. QLB_E_RUNTIME where version, feature or
 * algorithm are unknown. */
int lbz_header_from_disk(const uint8_t *p, size_t size,
                         struct qlb_lbz_header *header,
                         struct qlb_error *err);
int lbz_header_copy(const struct qlb_lbz_header *from,
                    struct qlb_lbz_header *to);
void lbz_header_release(struct qlb_lbz_header *header);

struct lbz_record {
    uint64_t offset; /* guest */
    uint32_t size;   /* of the frame */
    uint16_t n_blocks, live;
};
/* LBZ_RECORD_SPACE bytes: with the skippable header. */
void lbz_record_to_disk(const struct lbz_record *record, uint8_t *p);
/* p: the payload; file_offset: of the skippable header. */
int lbz_record_from_disk(const uint8_t *p, uint64_t file_offset,
                         const struct qlb_lbz_header *header,
                         struct lbz_record *record, struct qlb_error *err);

/* What is wrong with a frame of n blocks from block `first` on (relative to the
 * page, or to anything that begins with a stripe), or NULL. */
const char *lbz_shape_problem(unsigned first, unsigned n_blocks,
                              unsigned live);

static inline unsigned lbz_first_live(unsigned first, unsigned live)
{
    return first + (unsigned)__builtin_ctz(live);
}

static inline unsigned lbz_last_live(unsigned first, unsigned live)
{
    return first + 31 - (unsigned)__builtin_clz(live);
}

void lbz_entry_to_disk(const struct qlb_lbz_entry *entry, size_t digest_size,
                       uint8_t *p);
void lbz_run_to_disk(const struct qlb_lbz_run *run, uint8_t *p);
/* The first LBZ_PAGE_ENTRIES bytes. */
void lbz_page_to_disk(const struct qlb_lbz_page *page, uint8_t *p);
size_t lbz_page_size(unsigned n_frames, unsigned n_runs, unsigned n_live,
                     size_t digest_size);
/* That of an index, with DATA runs in the place of frames. */
size_t lbz_index_page_size(unsigned n_data_runs, unsigned n_runs,
                           unsigned n_live, size_t digest_size);
size_t lbz_page_max(size_t digest_size);
/* Makes room for the payload, which the caller then reads into it. */
int lbz_page_reserve(struct qlb_lbz_page *page, size_t payload_size,
                     struct qlb_error *err);
/* Parses page->payload (payload_size and file_offset are set). */
int lbz_page_from_disk(struct qlb_lbz_page *page,
                       const struct qlb_lbz_header *header,
                       struct qlb_error *err);

struct lbz_dir_entry {
    uint64_t number, file_offset;
    uint32_t payload_size;
    uint8_t digest[QLB_DIGEST_MAX];
};
void lbz_dir_entry_to_disk(const struct lbz_dir_entry *entry,
                           size_t digest_size, uint8_t *p);
/* file_offset: where the entry itself stands. */
int lbz_dir_entry_from_disk(const uint8_t *p, uint64_t file_offset,
                            const struct qlb_lbz_header *header,
                            struct lbz_dir_entry *entry,
                            struct qlb_error *err);

struct lbz_trailer {
    uint64_t n_pages, data_blocks, zero_blocks, frames, compressed;
};
/* The first LBZ_TRAILER_DIRECTORY bytes. */
void lbz_trailer_to_disk(const struct lbz_trailer *trailer, uint8_t *p);
int lbz_trailer_from_disk(const uint8_t *p, uint64_t payload_size,
                          uint64_t file_offset, size_t digest_size,
                          struct lbz_trailer *trailer, struct qlb_error *err);
uint64_t lbz_trailer_size(uint64_t n_pages, size_t digest_size);

void lbz_end_to_disk(uint64_t trailer_offset, uint32_t payload_size,
                     uint8_t *p);
/* false where the bytes are not the end of an archive. */
bool lbz_end_from_disk(const uint8_t *p, uint64_t *trailer_offset,
                       uint32_t *payload_size);

/* Whether what was counted is what the trailer (at file_offset) says. */
int lbz_check_totals(const struct lbz_trailer *trailer,
                     const struct lbz_trailer *counted, uint64_t file_offset,
                     struct qlb_error *err);

/* Adds a page to the counts of a trailer. */
void lbz_count_page(struct lbz_trailer *counted,
                    const struct qlb_lbz_page *page);

#endif
