/* Dumping what an NBD server exports: lbdump nbd://...
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef NBDDUMP_H
#define NBDDUMP_H

#include "dump_archive.h"

/* NBD tells the content of a disk and, with a bitmap, what has changed; all
 * else that an archive says of itself comes from whoever began the backup. */
struct nbddump_options {
    const char *bitmap;        /* NULL: a full dump */
    struct qlb_uuid uuid, image_uuid, set; /* zero: not given */
    struct qlb_uuid parent;    /* with a bitmap */
    struct qlb_uuid covered[QLB_MAX_CHECKPOINTS];
    unsigned n_covered;
    uint64_t parent_size;      /* bytes; UINT64_MAX: not given */
    uint64_t time;             /* seconds since 1970; UINT64_MAX: now */
};

/* Whether the operand is the URI of an export, and no file. */
bool nbddump_is_uri(const char *operand);

/* Dumps the export into archive->path, whole and synced. dump: may be other
 * than that of the request. The caller closes the archive. */
int nbddump_to(struct dump_archive *archive, const char *uri,
               const struct nbddump_options *options,
               const struct dump_request *request,
               const struct dump_options *dump, struct qlb_error *err);

/* Dumps the export into that path (NULL: standard output). Returns the exit status; messages are
 * out then. */
int nbddump(const char *uri, const struct nbddump_options *options,
            const struct dump_request *request, const char *path);

#endif
