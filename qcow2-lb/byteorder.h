/* Integers at unaligned addresses, in the byte order of a format: qcow2 is
 * big-endian, .lbz little-endian.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_BYTEORDER_H
#define QLB_BYTEORDER_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

#define QLB_DEFINE_ACCESS(bits, order)                                        \
    static inline uint##bits##_t get_##order##bits(const void *p)             \
    {                                                                         \
        uint##bits##_t v;                                                     \
        memcpy(&v, p, sizeof(v));                                             \
        return order##bits##toh(v);                                           \
    }                                                                         \
    static inline void put_##order##bits(void *p, uint##bits##_t v)           \
    {                                                                         \
        v = hto##order##bits(v);                                              \
        memcpy(p, &v, sizeof(v));                                             \
    }

QLB_DEFINE_ACCESS(16, be)
QLB_DEFINE_ACCESS(32, be)
QLB_DEFINE_ACCESS(64, be)
QLB_DEFINE_ACCESS(16, le)
QLB_DEFINE_ACCESS(32, le)
QLB_DEFINE_ACCESS(64, le)

#undef QLB_DEFINE_ACCESS

#endif
