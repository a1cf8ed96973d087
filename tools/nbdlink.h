/* A connection to an NBD server, through libnbd, as a dump needs it: several
 * threads read at once, a signal ends every wait, and what the server says of
 * its blocks is checked before anybody uses it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef NBDLINK_H
#define NBDLINK_H

#include "tool.h"

struct nbdlink;

/* What a meta context says of a window of the export. */
struct nbdlink_extents {
    uint64_t start, end; /* bytes; the same: nothing is known */
    struct nbdlink_extent {
        uint64_t end;
        uint32_t flags;  /* as the context defines them */
    } *extents;          /* ascending, without a gap, none of them empty */
    unsigned n, capacity;
};

/* Connects, and asks for the meta context, which the server need not have.
 * patience: seconds after which a server that does not answer is given up; 0:
 * never. NULL on failure. */
struct nbdlink *nbdlink_open(const char *uri, const char *context,
                             double patience, struct qlb_error *err);
/* Until when a server may not know, of a connection of this process that failed
 * before it stood, that it has ended; of tool_clock(). */
double nbdlink_unsure_until(void);
/* NULL is allowed. Nobody waits on the link any more. */
void nbdlink_close(struct nbdlink *link);

uint64_t nbdlink_size(const struct nbdlink *link); /* bytes, of the export */
bool nbdlink_has_context(const struct nbdlink *link);
/* Whether the server allows for more than one connection. */
bool nbdlink_is_multi(const struct nbdlink *link);

/* Content of [offset, offset + length), which is within the export. From any
 * thread. After "interrupted" no link may be used any more. */
int nbdlink_read(struct nbdlink *link, void *buf, uint64_t offset,
                 uint64_t length, struct qlb_error *err);

/* Writes, to an export that allows for it; at most 64 KiB. */
int nbdlink_write(struct nbdlink *link, const void *buf, uint64_t offset,
                  uint64_t length, struct qlb_error *err);

/* Fills the extents, from offset on; they may end before offset + length (at
 * most 4 GiB - 64 KiB are asked for), but not at offset, or behind it. Offset
 * is a multiple of 64 KiB, or the end of an extent of the link. */
int nbdlink_status(struct nbdlink *link, uint64_t offset, uint64_t length,
                   struct nbdlink_extents *extents, struct qlb_error *err);
void nbdlink_extents_release(struct nbdlink_extents *extents);

#endif
