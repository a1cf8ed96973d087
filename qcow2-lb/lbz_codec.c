/* Blocks to frames and back: what runs in parallel, one object a thread.
 *
 * Contexts are reused and every frame is one call of zstd over memory, with no
 * window to copy. The decoder does not compute zstd's own checksum again:
 * damaged compressed bytes are found by their digest (through the index
 * before they are decoded, front to back when their page arrives), damaged
 * results by the digests of the blocks.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#define ZSTD_STATIC_LINKING_ONLY /* for ZSTD_d_forceIgnoreChecksum alone */
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "byteorder.h"
#include "lbz_format.h"

/* RFC 8878, 3.1.1.1.1: the byte behind the magic number. */
#define ZSTD_DESCRIPTOR 4
#define ZSTD_DESCRIPTOR_CHECKSUM 0x04
#define ZSTD_DESCRIPTOR_DICTIONARY 0x03

/* ---- encoder ---- */

struct qlb_lbz_encoder {
    ZSTD_CCtx *context;
    enum qlb_digest_type digest;
};

static bool set_parameters(ZSTD_CCtx *context, int level)
{
    return !ZSTD_isError(ZSTD_CCtx_setParameter(
               context, ZSTD_c_compressionLevel, level)) &&
           !ZSTD_isError(ZSTD_CCtx_setParameter(
               context, ZSTD_c_contentSizeFlag, 1)) &&
           !ZSTD_isError(ZSTD_CCtx_setParameter(
               context, ZSTD_c_checksumFlag, 1));
}

struct qlb_lbz_encoder *qlb_lbz_encoder_new(int level,
                                            enum qlb_digest_type digest,
                                            struct qlb_error *err)
{
    struct qlb_lbz_encoder *encoder;

    if (level < 1 || level > 19) {
        qlb_fail(err, QLB_E_USAGE, "the compression level is not 1 to 19");
        return NULL;
    }
    encoder = calloc(1, sizeof(*encoder));
    if (encoder != NULL) {
        encoder->digest = digest;
        encoder->context = ZSTD_createCCtx();
        if (encoder->context != NULL &&
            set_parameters(encoder->context, level)) {
            return encoder;
        }
    }
    qlb_lbz_encoder_free(encoder);
    qlb_fail(err, QLB_E_RUNTIME, "can't set up zstd: out of memory");
    return NULL;
}

void qlb_lbz_encoder_free(struct qlb_lbz_encoder *encoder)
{
    if (encoder != NULL) {
        ZSTD_freeCCtx(encoder->context);
        free(encoder);
    }
}

int qlb_lbz_encode(struct qlb_lbz_encoder *encoder, uint64_t offset,
                   unsigned n_blocks, const void *blocks, void *out,
                   struct qlb_lbz_frame *frame, struct qlb_error *err)
{
    size_t digest_size = qlb_digest_size(encoder->digest);
    size_t size;

    for (unsigned i = 0; i < n_blocks; i++) {
        qlb_digest(encoder->digest,
                   (const uint8_t *)blocks + (size_t)i * QLB_LBZ_BLOCK,
                   QLB_LBZ_BLOCK, frame->block_digests + i * digest_size);
    }
    size = ZSTD_compress2(encoder->context, out, QLB_LBZ_FRAME_MAX, blocks,
                          (size_t)n_blocks * QLB_LBZ_BLOCK);
    if (ZSTD_isError(size)) {
        return qlb_fail(err, QLB_E_RUNTIME, "compressing: %s",
                        ZSTD_getErrorName(size));
    }
    frame->offset = offset;
    frame->n_blocks = n_blocks;
    frame->live = (uint16_t)((1u << n_blocks) - 1);
    frame->data = out;
    frame->size = (uint32_t)size;
    qlb_digest(encoder->digest, out, size, frame->digest);
    return 0;
}

/* ---- decoder ---- */

struct qlb_lbz_decoder {
    ZSTD_DCtx *context;
};

struct qlb_lbz_decoder *qlb_lbz_decoder_new(struct qlb_error *err)
{
    struct qlb_lbz_decoder *decoder = calloc(1, sizeof(*decoder));

    if (decoder != NULL) {
        decoder->context = ZSTD_createDCtx();
    }
    if (decoder == NULL || decoder->context == NULL) {
        free(decoder);
        qlb_fail(err, QLB_E_RUNTIME, "can't set up zstd: out of memory");
        return NULL;
    }
#ifdef ZSTD_d_forceIgnoreChecksum
    /* An experimental parameter: a library that no longer knows it refuses
     * it, and then the checksum costs its time, that is all. */
    (void)ZSTD_DCtx_setParameter(decoder->context, ZSTD_d_forceIgnoreChecksum,
                                 ZSTD_d_ignoreChecksum);
#endif
    return decoder;
}

void qlb_lbz_decoder_free(struct qlb_lbz_decoder *decoder)
{
    if (decoder != NULL) {
        ZSTD_freeDCtx(decoder->context);
        free(decoder);
    }
}

/* What the specification asks of a frame; NULL if it holds. Nothing is
 * decompressed before: the size is known to be that of the buffer. */
static const char *frame_problem(const uint8_t *data, size_t size,
                                 size_t expected)
{
    unsigned long long content = ZSTD_getFrameContentSize(data, size);

    if (size < ZSTD_DESCRIPTOR + 1 || get_le32(data) != ZSTD_MAGICNUMBER) {
        return "it is no zstd frame";
    }
    if (content != expected) {
        return "its content has another size than its blocks";
    }
    if (!(data[ZSTD_DESCRIPTOR] & ZSTD_DESCRIPTOR_CHECKSUM)) {
        return "it has no content checksum";
    }
    if (data[ZSTD_DESCRIPTOR] & ZSTD_DESCRIPTOR_DICTIONARY) {
        return "it wants a dictionary";
    }
    if (ZSTD_findFrameCompressedSize(data, size) != size) {
        return "it does not end where its record says";
    }
    return NULL;
}

int qlb_lbz_decode(struct qlb_lbz_decoder *decoder, const void *data,
                   uint32_t size, unsigned n_blocks, void *blocks,
                   struct qlb_error *err)
{
    size_t expected = (size_t)n_blocks * QLB_LBZ_BLOCK;
    const char *problem = frame_problem(data, size, expected);
    size_t ret;

    if (problem != NULL) {
        return qlb_fail(err, QLB_E_DAMAGED, "damaged frame: %s", problem);
    }
    ret = ZSTD_decompressDCtx(decoder->context, blocks, expected, data, size);
    if (ZSTD_isError(ret) || ret != expected) {
        return qlb_fail(err, QLB_E_DAMAGED, "damaged frame: %s",
                        ZSTD_isError(ret) ? ZSTD_getErrorName(ret)
                                          : "its content is too short");
    }
    return 0;
}

int qlb_lbz_decode_at(struct qlb_lbz_decoder *decoder, uint64_t record_offset,
                      uint64_t guest_offset, const void *data, uint32_t size,
                      unsigned n_blocks, void *blocks, struct qlb_error *err)
{
    struct qlb_error reason;
    char range[LBZ_RANGE_TEXT];

    if (qlb_lbz_decode(decoder, data, size, n_blocks, blocks, &reason) == 0) {
        return 0;
    }
    return lbz_damaged(err, record_offset + LBZ_RECORD_SPACE,
                       "compressed data of %s: %s",
                       lbz_range(guest_offset, n_blocks, range),
                       reason.message);
}

/* ---- block digests ---- */

static int block_damaged(const struct qlb_lbz_entry *entry,
                         uint64_t page_offset, unsigned block,
                         struct qlb_error *err)
{
    char range[LBZ_RANGE_TEXT];

    return lbz_damaged(err, entry->record_offset + LBZ_RECORD_SPACE,
                       "content of %s does not match its digest",
                       lbz_range(page_offset +
                                     (uint64_t)block * QLB_LBZ_BLOCK,
                                 1, range));
}

int qlb_lbz_check_blocks(enum qlb_digest_type digest,
                         const struct qlb_lbz_entry *entry,
                         uint64_t page_offset, const void *blocks,
                         struct qlb_error *err)
{
    size_t digest_size = qlb_digest_size(digest);
    const uint8_t *expected = entry->block_digests;
    uint8_t found[QLB_DIGEST_MAX];

    for (unsigned live = entry->live; live != 0; live &= live - 1) {
        unsigned i = (unsigned)__builtin_ctz(live);

        qlb_digest(digest,
                   (const uint8_t *)blocks + (size_t)i * QLB_LBZ_BLOCK,
                   QLB_LBZ_BLOCK, found);
        if (memcmp(found, expected, digest_size) != 0) {
            return block_damaged(entry, page_offset, entry->first + i, err);
        }
        expected += digest_size;
    }
    return 0;
}

int qlb_lbz_check_digests(enum qlb_digest_type digest,
                          const struct qlb_lbz_entry *entry,
                          uint64_t page_offset, const uint8_t *computed,
                          struct qlb_error *err)
{
    size_t digest_size = qlb_digest_size(digest);
    size_t at = 0;

    for (unsigned live = entry->live; live != 0; live &= live - 1) {
        if (memcmp(computed + at, entry->block_digests + at,
                   digest_size) != 0) {
            return block_damaged(entry, page_offset,
                                 lbz_first_live(entry->first, live), err);
        }
        at += digest_size;
    }
    return 0;
}
