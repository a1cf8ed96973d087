/* Digests of blocks and structures (docs/lbz-format.md, "Digests").
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_DIGEST_H
#define QLB_DIGEST_H

#include <stddef.h>
#include <stdint.h>

enum qlb_digest_type {
    QLB_DIGEST_XXH3_128 = 1, /* the default */
    QLB_DIGEST_SHA256 = 2,
};

#define QLB_DIGEST_MAX 32

/* Size in bytes; 0 for an unknown type. */
size_t qlb_digest_size(enum qlb_digest_type type);

/* Writes qlb_digest_size(type) bytes to out. */
void qlb_digest(enum qlb_digest_type type, const void *data, size_t len,
                uint8_t *out);

/* A digest over a stream. new returns NULL where memory is short; final may
 * be called once; free takes NULL. */
struct qlb_digest_stream;
struct qlb_digest_stream *qlb_digest_stream_new(enum qlb_digest_type type);
void qlb_digest_stream_update(struct qlb_digest_stream *stream,
                              const void *data, size_t len);
void qlb_digest_stream_final(struct qlb_digest_stream *stream, uint8_t *out);
void qlb_digest_stream_free(struct qlb_digest_stream *stream);

/* Lower-case hexadecimal of len bytes into text (2 * len + 1 bytes). */
void qlb_hex(const uint8_t *bytes, size_t len, char *text);

#endif
