/* Has QEMU copy into its disks what they have from their backing files, and let
 * go of those: jobs of block-stream.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_LIVE_STREAM_H
#define VM_LIVE_STREAM_H

#include "qmp.h"

struct live_stream_disk {
    const char *name;    /* for messages */
    const char *path;    /* of the image */
    const char *socket;  /* of its backing file */
    unsigned number;     /* of its job */
    uint64_t size;       /* bytes that may come from the backing file */
    bool wanted;         /* not whole yet */

    bool failed;         /* its job has: the message is out */
    uint64_t done, total; /* bytes, as QEMU counts them */
};

struct live_stream;

/* socket: of QEMU's monitor, which need not be there yet. disks: changed by
 * the steps. rate: bytes per second of each; 0: no limit. NULL where memory is
 * short. */
struct live_stream *live_stream_new(const char *socket,
                                    struct live_stream_disk *disks,
                                    unsigned n, uint64_t rate);
/* Jobs go on. NULL is allowed. */
void live_stream_free(struct live_stream *stream);

/* To be called again and again: connects, begins jobs, and ends those that are
 * done. What goes wrong is told, each thing once: QEMU may come, or come back,
 * at any time. True: QEMU has jobs of ours. */
bool live_stream_step(struct live_stream *stream);

#endif
