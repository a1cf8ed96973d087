/* The livebackup extension: as it comes, and with its checksum made right, so
 * that what is changed gets past it.  Bytes in front of it say what else is
 * seen of the image.
 *
 * What must hold beyond the absence of crashes: an extension that is taken is
 * encoded to the same bytes; every list that comes of it by taking records out
 * is taken too; every verdict has a keyword and a reason.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include <stdlib.h>
#include <string.h>

#include "bitmap_ext.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHECK(condition)                                                      \
    do {                                                                      \
        if (!(condition)) {                                                   \
            abort();                                                          \
        }                                                                     \
    } while (0)

/* Bytes before the extension: flags, boot id, device, three digests. */
enum { SEEN = 2 + 16 + 4 * 8 };
enum { CHECKSUM = 4 };

static uint32_t crc32c(const uint8_t *data, size_t size)
{
    uint32_t crc = UINT32_MAX;

    for (size_t i = 0; i < size; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? UINT32_C(0x82f63b78) : 0);
        }
    }
    return ~crc;
}

static void seal(uint8_t *data, size_t size)
{
    uint32_t crc;

    if (size < CHECKSUM + 4) {
        return;
    }
    memset(data + CHECKSUM, 0, 4);
    crc = crc32c(data, size);
    for (int i = 0; i < 4; i++) {
        data[CHECKSUM + i] = (uint8_t)(crc >> (24 - 8 * i));
    }
}

static void look(const struct qlb_ext *ext, const uint8_t *seen)
{
    struct qlb_trust_image image = {
        .autoclear_bitmaps = seen[0] & 1,
        .autoclear_livebackup = seen[0] & 2,
        .dirty = seen[0] & 4,
        .directory_readable = seen[0] & 8,
        .unlisted_bitmap = seen[0] & 16,
    };
    struct qlb_trust_bitmap bitmap = {
        .present = seen[1] & 1, .automatic = seen[1] & 2,
        .in_use = seen[1] & 4, .first_canary = seen[1] & 8,
        .last_canary = seen[1] & 16,
    };
    enum qlb_trust trust;

    memcpy(image.boot_id, seen + 2, 16);
    memcpy(&image.device, seen + 18, 8);
    memcpy(&image.backing_digest, seen + 26, 8);
    memcpy(&image.backing_stat_digest, seen + 34, 8);
    memcpy(&image.data_file_stat_digest, seen + 42, 8);
    trust = qlb_trust_image(ext, &image);
    CHECK(qlb_trust_keyword(trust)[0] != '\0');
    CHECK(qlb_trust_reason(trust)[0] != '\0');
    CHECK((trust == QLB_TRUST_NO_CHECKPOINT) == (ext->n_checkpoints == 0));
    for (unsigned i = 0; i < ext->n_checkpoints; i++) {
        trust = qlb_trust_bitmap(ext, i, &bitmap);
        CHECK(qlb_trust_keyword(trust)[0] != '\0');
        CHECK(trust != QLB_TRUSTED || bitmap.present);
    }
}

static void use_list(struct qlb_ext *ext)
{
    uint8_t again[QLB_EXT_SIZE];
    struct qlb_ext decoded;
    char name[QLB_BITMAP_NAME_SIZE];

    for (unsigned i = 0; i < ext->n_checkpoints; i++) {
        const struct qlb_checkpoint *c = &ext->checkpoints[i];
        int newest = qlb_ext_newest_confirmed(ext, c->label);

        CHECK(qlb_label_valid(c->label));
        CHECK(qlb_ext_find(ext, &c->uuid) == (int)i);
        CHECK(!c->confirmed || newest >= (int)i);
        qlb_bitmap_name(&c->uuid, name);
        CHECK(qlb_bitmap_name_is_ours(name, strlen(name)));
        qlb_canary_last(c->virtual_size | 1, 1, ext->granularity_bits);
    }
    while (ext->n_checkpoints > 0) {
        unsigned n = ext->n_checkpoints;
        int i = qlb_ext_foldable(ext, -1);

        CHECK(i < (int)n);
        qlb_ext_remove(ext, i < 0 ? n / 2 : (unsigned)i);
        CHECK(ext->n_checkpoints == n - 1);
        qlb_ext_encode(ext, again);
        CHECK(qlb_ext_decode(again, sizeof(again), &decoded) ==
              QLB_EXT_GOOD);
    }
}

static void take(const uint8_t *data, size_t size, const uint8_t *seen)
{
    uint8_t again[QLB_EXT_SIZE];
    struct qlb_ext ext;

    if (qlb_ext_decode(data, size, &ext) == QLB_EXT_GOOD) {
        CHECK(size == QLB_EXT_SIZE);
        qlb_ext_encode(&ext, again);
        CHECK(memcmp(again, data, size) == 0);
        look(&ext, seen);
        use_list(&ext);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *copy;

    if (size < SEEN) {
        return 0;
    }
    copy = malloc(size - SEEN + 1);
    memcpy(copy, data + SEEN, size - SEEN);
    take(copy, size - SEEN, data);
    seal(copy, size - SEEN);
    take(copy, size - SEEN, data);
    free(copy);
    return 0;
}
