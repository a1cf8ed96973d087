/* A disk at the point in time of a backup, as the source of a dump: read from
 * the image and the orig. What lbdump --qmp and lbdump --interrupted share.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef LIVE_SOURCE_H
#define LIVE_SOURCE_H

#include "dump_archive.h"

struct live_source {
    struct qlb_live *live;
    /* As that of a dump_source; may be NULL. */
    int (*passed)(void *opaque, uint64_t end, struct qlb_error *err);
    void *opaque;

    /* of an incremental backup */
    unsigned since; /* index of the parent */
    struct qlb_changes *changes;
    uint64_t expected; /* bytes; 0: all of the disk, as far as it holds data */
};

/* Looks for the parent, where the backup has one, and fills in the archive's
 * header. source->live is open. */
int live_source_prepare(struct live_source *source,
                        struct dump_archive *archive,
                        const struct dump_request *request,
                        struct qlb_error *err);
/* The archive, which was prepared and opened, is whole and synced afterwards,
 * but has no name yet. */
int live_source_dump(struct live_source *source, struct dump_archive *archive,
                     const struct dump_options *options,
                     struct qlb_error *err);
/* Closes source->live too. */
void live_source_close(struct live_source *source);

#endif
