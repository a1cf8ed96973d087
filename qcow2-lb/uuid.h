/* UUIDs: 16 bytes in the order in which they are printed (RFC 4122).
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_UUID_H
#define QLB_UUID_H

#include <stdbool.h>
#include <stdint.h>

struct qlb_uuid {
    uint8_t bytes[16];
};

#define QLB_UUID_TEXT 37 /* 36 characters and a zero byte */

bool qlb_uuid_is_zero(const struct qlb_uuid *uuid);
bool qlb_uuid_equal(const struct qlb_uuid *a, const struct qlb_uuid *b);

/* Lower case, into a buffer of QLB_UUID_TEXT bytes, which is returned. */
char *qlb_uuid_format(const struct qlb_uuid *uuid, char *text);

/* Takes upper and lower case; false where text is no UUID. */
bool qlb_uuid_parse(const char *text, struct qlb_uuid *uuid);

#endif
