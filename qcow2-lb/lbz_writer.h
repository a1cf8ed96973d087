/* Writing an archive (docs/lbz-format.md).
 *
 * The encoder (parallel, one for each thread) turns blocks into a frame; the
 * writer (serial) appends frames and ZERO runs in ascending guest order and
 * makes records, pages and trailer. A writer holds one page and the
 * directory (40 bytes for each page).
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_LBZ_WRITER_H
#define QLB_LBZ_WRITER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "digest.h"
#include "error.h"
#include "outfile.h"
#include "uuid.h"

#define QLB_LBZ_BLOCK 65536u
#define QLB_LBZ_STRIPE_BLOCKS 16u
#define QLB_LBZ_STRIPE (QLB_LBZ_BLOCK * QLB_LBZ_STRIPE_BLOCKS)
#define QLB_LBZ_PAGE_BLOCKS 4096u
#define QLB_LBZ_PAGE ((uint64_t)QLB_LBZ_BLOCK * QLB_LBZ_PAGE_BLOCKS)
#define QLB_LBZ_FRAME_MAX (QLB_LBZ_STRIPE + QLB_LBZ_BLOCK) /* compressed */
#define QLB_LBZ_LABEL_MAX 22
#define QLB_LBZ_COVERED_MAX 1024
#define QLB_LBZ_NO_CLIP UINT64_MAX

struct qlb_lbz_header {
    enum qlb_digest_type digest;
    bool incremental;
    bool index; /* digests alone, no content */
    char label[QLB_LBZ_LABEL_MAX + 1];
    uint64_t virtual_size;
    uint64_t clip; /* QLB_LBZ_NO_CLIP if none */
    uint64_t time; /* seconds since 1970 */
    struct qlb_uuid image_uuid, uuid, parent, set;
    unsigned n_covered;
    struct qlb_uuid *covered;
};

/* One zstd frame with what its record and page say. */
struct qlb_lbz_frame {
    uint64_t offset;    /* guest offset of the first block */
    unsigned n_blocks;  /* 1 to 16, within one stripe */
    uint16_t live;      /* mask */
    const void *data;   /* compressed */
    uint32_t size;      /* of data */
    uint8_t digest[QLB_DIGEST_MAX]; /* of data */
    /* digests of the live blocks, ascending, digest size apart */
    uint8_t block_digests[QLB_LBZ_STRIPE_BLOCKS * QLB_DIGEST_MAX];
};

struct qlb_lbz_encoder;

/* level: zstd's, 1 to 19. */
struct qlb_lbz_encoder *qlb_lbz_encoder_new(int level,
                                            enum qlb_digest_type digest,
                                            struct qlb_error *err);
void qlb_lbz_encoder_free(struct qlb_lbz_encoder *encoder);

/* Compresses n_blocks blocks (all live) of guest offset `offset` from
 * `blocks` into `out` (QLB_LBZ_FRAME_MAX bytes) and fills the frame, whose
 * data is `out`. */
int qlb_lbz_encode(struct qlb_lbz_encoder *encoder, uint64_t offset,
                   unsigned n_blocks, const void *blocks, void *out,
                   struct qlb_lbz_frame *frame, struct qlb_error *err);

struct qlb_lbz_writer;

struct qlb_lbz_totals {
    uint64_t data_blocks, zero_blocks, frames, compressed, archive_size;
};

/* Writes the header. The header is copied; out must outlive the writer. */
struct qlb_lbz_writer *qlb_lbz_writer_new(struct qlb_outfile *out,
                                          const struct qlb_lbz_header *header,
                                          struct qlb_error *err);

/* Appends a frame: its first live block lies behind those of the frames
 * appended before, and in no page before that of anything appended. Live
 * blocks of frames and zero blocks may interleave, but never coincide. */
int qlb_lbz_writer_frame(struct qlb_lbz_writer *writer,
                         const struct qlb_lbz_frame *frame,
                         struct qlb_error *err);

/* The same of an index: blocks within one stripe, at guest offset `offset`,
 * which have these digests (live ones, ascending). They come in any order within
 * a page. */
int qlb_lbz_writer_digests(struct qlb_lbz_writer *writer, uint64_t offset,
                           unsigned n_blocks, uint16_t live,
                           const uint8_t *block_digests,
                           struct qlb_error *err);

/* Records that `blocks` blocks at guest offset `offset` are zero (any number,
 * also over pages). Within a page they may come in any order, before or after
 * its frames; pages ascend. Nothing is recorded in a full archive, where
 * absent blocks are zero. */
int qlb_lbz_writer_zero(struct qlb_lbz_writer *writer, uint64_t offset,
                        uint64_t blocks, struct qlb_error *err);

/* Writes the last page and computes the root digest (digest-size bytes into
 * root). Only the trailer is still missing from the file, so the archive is
 * not yet one. */
int qlb_lbz_writer_seal(struct qlb_lbz_writer *writer, uint8_t *root,
                        struct qlb_error *err);

/* Writes the trailer. Does not sync. */
int qlb_lbz_writer_finish(struct qlb_lbz_writer *writer,
                          struct qlb_lbz_totals *totals,
                          struct qlb_error *err);
void qlb_lbz_writer_free(struct qlb_lbz_writer *writer);

#endif
