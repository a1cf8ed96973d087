/* An image with checkpoints as a stranger gives it: its state is told, then
 * everything is done to it that lbctl and lbdump can do, each to the image as
 * it came, and with the checksum of the extension made right.
 *
 * What must hold beyond the absence of crashes: a refusal writes nothing but
 * what is leaked; after recover a second one finds nothing; a checkpoint that
 * was added is the newest, trusted, and the image opens again.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "image.h"
#include "qcow2_header.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHECK(condition)                                                      \
    do {                                                                      \
        if (!(condition)) {                                                   \
            abort();                                                          \
        }                                                                     \
    } while (0)

/* Tables may be as large as a disk makes them; fuzzing wants many inputs. */
#define MAX_DISK (UINT64_C(1) << 40)
#define MAX_RUNS 200

static int file = -1;
static char path[32];

static void store(const uint8_t *data, size_t size)
{
    if (file < 0) {
        file = memfd_create("image", MFD_CLOEXEC);
        snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
    }
    CHECK(ftruncate(file, 0) == 0);
    CHECK(pwrite(file, data, size, 0) == (ssize_t)size);
}

/* Nothing else is to be opened by names that stand in the image. */
static bool stands_alone(const uint8_t *data, size_t size)
{
    struct qlb_blkio *io = qlb_blkio_memory(data, size);
    struct qlb_qcow2_header *header;
    struct qlb_error err;
    bool alone;

    header = qlb_qcow2_header_read(io, false, &err);
    alone = header != NULL && header->backing_name == NULL &&
            header->data_file == NULL && header->virtual_size <= MAX_DISK;
    qlb_qcow2_header_free(header);
    qlb_blkio_close(io);
    return alone;
}

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

/* Makes the checksum of what looks like the extension right. */
static bool seal(uint8_t *data, size_t size)
{
    static const uint8_t head[8] = { 0x4c, 0x42, 0x4b, 0x50, 0, 0, 0x08, 0x80 };
    const uint8_t *found = memmem(data, size, head, sizeof(head));
    uint8_t *ext;
    uint32_t crc;

    if (found == NULL ||
        size - (size_t)(found - data) < sizeof(head) + QLB_EXT_SIZE) {
        return false;
    }
    ext = data + (found - data) + sizeof(head);
    memset(ext + 4, 0, 4);
    crc = crc32c(ext, QLB_EXT_SIZE);
    for (int i = 0; i < 4; i++) {
        ext[4 + i] = (uint8_t)(crc >> (24 - 8 * i));
    }
    return true;
}

static void walk_changes(struct qlb_image *image, unsigned i)
{
    struct qlb_error err;
    struct qlb_changes *changes = qlb_image_changes(image, i, &err);
    uint64_t offset = 0, start, length;

    CHECK((changes != NULL) ==
              (qlb_image_trust_since(image, i) == QLB_TRUSTED) ||
          err.code != QLB_E_UNTRUSTED);
    for (unsigned n = 0; changes != NULL && n < MAX_RUNS; n++) {
        if (qlb_changes_next(changes, offset, &start, &length, &err) < 0 ||
            length == 0) {
            break;
        }
        CHECK(start + length > offset);
        offset = start + length;
    }
    qlb_changes_free(changes);
}

static void look(const uint8_t *data, size_t size)
{
    struct qlb_image *image;
    struct qlb_error err;
    uint64_t bytes;

    store(data, size);
    image = qlb_image_open(path, QLB_IMAGE_NO_LOCK, &err);
    if (image != NULL && qlb_image_ext(image) != NULL) {
        for (unsigned i = 0; i < qlb_image_ext(image)->n_checkpoints; i++) {
            if (qlb_image_changed_bytes(image, i, &bytes, &err) == 0) {
                CHECK(bytes <= MAX_DISK);
            }
            walk_changes(image, i);
        }
    }
    qlb_image_close(image);
}

enum action { ENABLE, DISABLE, ADD, FOLD, CONFIRM, RECOVER, N_ACTIONS };

static int act(struct qlb_image *image, enum action action,
               struct qlb_recovery *recovery, struct qlb_error *err)
{
    struct qlb_checkpoint checkpoint = {
        .uuid = { { 0xfe, [15] = 1 } }, .time = 1, .label = "main",
    };

    switch (action) {
    case ENABLE:
        return qlb_image_enable(image, 0, 0, err);
    case DISABLE:
        return qlb_image_disable(image, err);
    case ADD:
        return qlb_image_add_checkpoint(image, &checkpoint, true, err);
    case FOLD:
        return qlb_image_fold(image, 0, err);
    case CONFIRM:
        return qlb_image_confirm(image, 0, err);
    default:
        return qlb_image_recover(image, recovery, err);
    }
}

static void check_result(struct qlb_image *image, enum action action)
{
    const struct qlb_ext *ext = qlb_image_ext(image);

    switch (action) {
    case ENABLE:
        CHECK(ext != NULL && ext->n_checkpoints == 0);
        break;
    case DISABLE:
        CHECK(ext == NULL && qlb_image_trust(image) == QLB_TRUST_OFF);
        break;
    case ADD:
        CHECK(ext != NULL && ext->n_checkpoints > 0);
        CHECK(qlb_image_trust_since(image, ext->n_checkpoints - 1) ==
              QLB_TRUSTED);
        break;
    default:
        break;
    }
}

static void change(const uint8_t *data, size_t size, enum action action)
{
    struct qlb_recovery recovery;
    struct qlb_image *image;
    struct qlb_error err;
    int ret;

    store(data, size);
    image = qlb_image_open(path, QLB_IMAGE_WRITE, &err);
    if (image == NULL) {
        return;
    }
    ret = act(image, action, &recovery, &err);
    if (ret == 0) {
        check_result(image, action);
    }
    qlb_image_close(image);
    if (ret < 0) {
        return;
    }
    /* What was written is read again, and a second recover finds nothing. */
    image = qlb_image_open(path, QLB_IMAGE_WRITE, &err);
    CHECK(image != NULL);
    check_result(image, action);
    if (action == RECOVER) {
        CHECK(qlb_image_recover(image, &recovery, &err) == 0);
        CHECK(recovery.freed_clusters == 0);
        CHECK(recovery.dropped_checkpoints == 0);
    }
    qlb_image_close(image);
}

static void do_all(const uint8_t *data, size_t size)
{
    if (!stands_alone(data, size)) {
        return;
    }
    look(data, size);
    for (int action = 0; action < N_ACTIONS; action++) {
        change(data, size, (enum action)action);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size + 1);

    do_all(data, size);
    memcpy(copy, data, size);
    if (seal(copy, size) && memcmp(copy, data, size) != 0) {
        do_all(copy, size);
    }
    free(copy);
    return 0;
}
