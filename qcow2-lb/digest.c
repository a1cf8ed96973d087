/* Digests.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "digest.h"

#include <openssl/evp.h>
#include <openssl/sha.h>
#include <stdlib.h>
#include <string.h>
#ifdef HAVE_XXH_X86DISPATCH
#include <xxh_x86dispatch.h> /* redirects XXH3_*() by macros */
#else
#include <xxhash.h>
#endif

struct qlb_digest_stream {
    enum qlb_digest_type type;
    XXH3_state_t *xxh3;
    EVP_MD_CTX *sha256;
};

size_t qlb_digest_size(enum qlb_digest_type type)
{
    switch (type) {
    case QLB_DIGEST_XXH3_128:
        return 16;
    case QLB_DIGEST_SHA256:
        return 32;
    }
    return 0;
}

static void store_xxh128(XXH128_hash_t hash, uint8_t *out)
{
    XXH128_canonical_t canonical;

    XXH128_canonicalFromHash(&canonical, hash);
    memcpy(out, canonical.digest, sizeof(canonical.digest));
}

void qlb_digest(enum qlb_digest_type type, const void *data, size_t len,
                uint8_t *out)
{
    if (type == QLB_DIGEST_SHA256) {
        SHA256(data, len, out);
    } else {
        store_xxh128(XXH3_128bits(data, len), out);
    }
}

struct qlb_digest_stream *qlb_digest_stream_new(enum qlb_digest_type type)
{
    struct qlb_digest_stream *stream = calloc(1, sizeof(*stream));

    if (stream == NULL) {
        return NULL;
    }
    stream->type = type;
    if (type == QLB_DIGEST_SHA256) {
        stream->sha256 = EVP_MD_CTX_new();
        if (stream->sha256 != NULL &&
            EVP_DigestInit_ex(stream->sha256, EVP_sha256(), NULL) == 1) {
            return stream;
        }
    } else {
        stream->xxh3 = XXH3_createState();
        if (stream->xxh3 != NULL) {
            XXH3_128bits_reset(stream->xxh3);
            return stream;
        }
    }
    qlb_digest_stream_free(stream);
    return NULL;
}

void qlb_digest_stream_update(struct qlb_digest_stream *stream,
                              const void *data, size_t len)
{
    if (stream->type == QLB_DIGEST_SHA256) {
        EVP_DigestUpdate(stream->sha256, data, len);
    } else {
        XXH3_128bits_update(stream->xxh3, data, len);
    }
}

void qlb_digest_stream_final(struct qlb_digest_stream *stream, uint8_t *out)
{
    if (stream->type == QLB_DIGEST_SHA256) {
        EVP_DigestFinal_ex(stream->sha256, out, NULL);
    } else {
        store_xxh128(XXH3_128bits_digest(stream->xxh3), out);
    }
}

void qlb_digest_stream_free(struct qlb_digest_stream *stream)
{
    if (stream == NULL) {
        return;
    }
    XXH3_freeState(stream->xxh3);
    EVP_MD_CTX_free(stream->sha256);
    free(stream);
}

void qlb_hex(const uint8_t *bytes, size_t len, char *text)
{
    static const char digits[] = "0123456789abcdef";

    for (size_t i = 0; i < len; i++) {
        text[2 * i] = digits[bytes[i] >> 4];
        text[2 * i + 1] = digits[bytes[i] & 15];
    }
    text[2 * len] = '\0';
}
