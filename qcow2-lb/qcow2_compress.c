/* Compressed clusters.
 *
 * A compressed cluster's length is known in sectors only, so the input may go
 * on behind the compressed data; decompression ends when a cluster is full.
 * Neither method can be made to use more memory than the cluster and a fixed
 * window, whatever the input says.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "qcow2_layer.h"

#include <stdlib.h>
#include <zlib.h>
#include <zstd.h>

/* Raw deflate with a window of 4 KiB is what QEMU writes (block/qcow2-threads.c)
 * and what it takes. */
#define DEFLATE_WINDOW_BITS (-12)

struct qlb_inflater {
    z_stream deflate;
    ZSTD_DCtx *zstd;
};

struct qlb_inflater *qlb_inflater_new(void)
{
    struct qlb_inflater *inflater = calloc(1, sizeof(*inflater));

    if (inflater == NULL) {
        return NULL;
    }
    if (inflateInit2(&inflater->deflate, DEFLATE_WINDOW_BITS) != Z_OK) {
        free(inflater);
        return NULL;
    }
    inflater->zstd = ZSTD_createDCtx();
    if (inflater->zstd == NULL) {
        inflateEnd(&inflater->deflate);
        free(inflater);
        return NULL;
    }
    return inflater;
}

void qlb_inflater_free(struct qlb_inflater *inflater)
{
    if (inflater == NULL) {
        return;
    }
    inflateEnd(&inflater->deflate);
    ZSTD_freeDCtx(inflater->zstd);
    free(inflater);
}

static int inflate_deflate(struct qlb_inflater *inflater, uint8_t *dst,
                           size_t len, const uint8_t *src, size_t src_len)
{
    z_stream *z = &inflater->deflate;
    int ret = inflateReset(z);

    if (ret != Z_OK) {
        return -1;
    }
    z->next_in = (z_const Bytef *)src;
    z->avail_in = (uInt)src_len;
    z->next_out = dst;
    z->avail_out = (uInt)len;
    ret = inflate(z, Z_FINISH);
    /* Z_BUF_ERROR: the cluster is full, the stream not at its end. */
    if ((ret == Z_STREAM_END || ret == Z_BUF_ERROR) && z->avail_out == 0) {
        return 0;
    }
    return -1;
}

static int inflate_zstd(struct qlb_inflater *inflater, uint8_t *dst,
                        size_t len, const uint8_t *src, size_t src_len)
{
    size_t done = 0;

    /* Frame by frame in one step each, and not as a stream: that needs no
     * window, whose size is for the input to say. */
    while (done < len) {
        size_t frame = ZSTD_findFrameCompressedSize(src, src_len);
        size_t n;

        if (ZSTD_isError(frame)) {
            return -1;
        }
        n = ZSTD_decompressDCtx(inflater->zstd, dst + done, len - done, src,
                                frame);
        if (ZSTD_isError(n)) {
            return -1;
        }
        done += n;
        src += frame;
        src_len -= frame;
    }
    return 0;
}

int qlb_inflate(struct qlb_inflater *inflater, enum qlb_compression type,
                uint8_t *dst, size_t len, const uint8_t *src, size_t src_len)
{
    if (type == QLB_COMPRESSION_ZSTD) {
        return inflate_zstd(inflater, dst, len, src, src_len);
    }
    return inflate_deflate(inflater, dst, len, src, src_len);
}
