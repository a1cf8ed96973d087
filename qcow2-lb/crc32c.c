/* CRC-32C, four bits at a time: for a few hundred bytes now and then.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "crc32c.h"

/* Remainders of the 16 values of a nibble, polynomial 0x1EDC6F41 reflected. */
static const uint32_t crc32c_nibble[16] = {
    0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1,
    0x417b1dbc, 0x5125dad3, 0x61c69362, 0x7198540d,
    0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9,
    0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75,
};

static uint32_t crc32c_update(uint32_t crc, const uint8_t *data, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        crc ^= data[i];
        crc = (crc >> 4) ^ crc32c_nibble[crc & 15];
        crc = (crc >> 4) ^ crc32c_nibble[crc & 15];
    }
    return crc;
}

uint32_t qlb_crc32c_with_hole(const void *data, size_t size, size_t hole)
{
    static const uint8_t zero[4];
    const uint8_t *bytes = data;
    size_t behind = hole + sizeof(zero);
    uint32_t crc = UINT32_MAX;

    crc = crc32c_update(crc, bytes, hole);
    crc = crc32c_update(crc, zero, sizeof(zero));
    crc = crc32c_update(crc, bytes + behind, size - behind);
    return ~crc;
}
