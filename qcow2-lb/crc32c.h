/* CRC-32C (Castagnoli, as in iSCSI, RFC 3720). Internal to the library.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_CRC32C_H
#define QLB_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Of `size` bytes, the four from `hole` on taken as zero: there the checksum
 * itself stands. hole + 4 is not more than size. */
uint32_t qlb_crc32c_with_hole(const void *data, size_t size, size_t hole);

#endif
