/* UUIDs.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "uuid.h"

#include <string.h>

bool qlb_uuid_is_zero(const struct qlb_uuid *uuid)
{
    static const struct qlb_uuid zero;

    return memcmp(uuid, &zero, sizeof(zero)) == 0;
}

bool qlb_uuid_equal(const struct qlb_uuid *a, const struct qlb_uuid *b)
{
    return memcmp(a, b, sizeof(*a)) == 0;
}

static bool dash_before(unsigned byte)
{
    return byte == 4 || byte == 6 || byte == 8 || byte == 10;
}

char *qlb_uuid_format(const struct qlb_uuid *uuid, char *text)
{
    static const char digits[] = "0123456789abcdef";
    char *p = text;

    for (unsigned i = 0; i < sizeof(uuid->bytes); i++) {
        if (dash_before(i)) {
            *p++ = '-';
        }
        *p++ = digits[uuid->bytes[i] >> 4];
        *p++ = digits[uuid->bytes[i] & 15];
    }
    *p = '\0';
    return text;
}

static int hex_value(char c)
{
    if (c >= '0' && c <= '9') {
        return c - '0';
    }
    if (c >= 'a' && c <= 'f') {
        return c - 'a' + 10;
    }
    if (c >= 'A' && c <= 'F') {
        return c - 'A' + 10;
    }
    return -1;
}

bool qlb_uuid_parse(const char *text, struct qlb_uuid *uuid)
{
    struct qlb_uuid parsed;

    for (unsigned i = 0; i < sizeof(parsed.bytes); i++) {
        int high, low;

        if (dash_before(i) && *text++ != '-') {
            return false;
        }
        high = hex_value(text[0]);
        low = high < 0 ? -1 : hex_value(text[1]);
        if (low < 0) {
            return false;
        }
        parsed.bytes[i] = (uint8_t)(high << 4 | low);
        text += 2;
    }
    if (*text != '\0') {
        return false;
    }
    *uuid = parsed;
    return true;
}
