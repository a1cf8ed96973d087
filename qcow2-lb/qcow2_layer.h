/* What qcow2_disk.c (opening), qcow2_map.c (tables) and qcow2_read.c (content)
 * share: an open disk as a list of layers, and a thread's view of it.
 *
 * Not installed; only these files and their tests include it.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_QCOW2_LAYER_H
#define QLB_QCOW2_LAYER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "qcow2_format.h"
#include "qcow2_map.h"

/* Identity of a file, to notice one that appears twice. */
struct qlb_file_id {
    dev_t device;
    ino_t inode;
};

/* One image of the chain. Immutable once the disk is open. */
struct qlb_layer {
    struct qlb_blkio *io;
    struct qlb_blkio *data; /* where data clusters are: io, or the external
                               data file */
    bool borrowed;          /* io and header are the caller's */
    const struct qlb_qcow2_header *header; /* NULL: a raw image */
    struct qlb_file_id id[2];              /* of io and of the data file */
    unsigned n_ids;
    char *path;             /* names in the header are relative to it */

    uint64_t size;          /* guest-visible bytes */
    unsigned cluster_bits;
    unsigned sub_bits;      /* log2 of a subcluster; without extended L2
                               entries a cluster is its one subcluster */
    unsigned entry_bits;    /* log2 of an L2 entry's bytes: 3 or 4 */
    unsigned l2_bits;       /* log2 of the entries of an L2 table */
    unsigned slice_bits;    /* log2 of the bytes of an L2 slice */
};

struct qlb_disk {
    struct qlb_layer *layers; /* the top one first; at least one */
    unsigned n_layers;
    unsigned flags;           /* enum qlb_disk_flags */
};

enum qlb_map_kind {
    QLB_MAP_UNALLOCATED, /* look into the next layer */
    QLB_MAP_ZERO,
    QLB_MAP_DATA,        /* at `host` in the layer's data file */
    QLB_MAP_COMPRESSED,  /* one cluster, `host_size` bytes at `host` */
};

/* What a layer says about [start, end) of the guest. */
struct qlb_map {
    uint64_t start, end;
    enum qlb_map_kind kind;
    unsigned layer;
    uint64_t host;      /* of the byte at start (compressed: of the cluster) */
    uint64_t host_size; /* compressed only */
};

/* Slices of tables: each is 4 KiB of an L1 or L2 table (all of an L2 table
 * that is smaller), read on demand. */
#define QLB_SLICE_BITS 12
#define QLB_SLICE_SIZE (1u << QLB_SLICE_BITS)

struct qlb_slice {
    uint64_t key;  /* host offset (L2) or number of the slice (L1) */
    uint8_t *data; /* NULL: empty */
};

/* A thread's cache for one layer. */
struct qlb_layer_cache {
    struct qlb_slice l1;
    struct qlb_slice *l2; /* direct-mapped */
    struct qlb_map last;  /* the last answer; empty: start == end */
};

struct qlb_inflater;

struct qlb_disk_reader {
    const struct qlb_disk *disk;
    struct qlb_layer_cache *caches; /* one for each layer */
    unsigned l2_slots;              /* of each cache; a power of two */

    /* The last cluster that was decompressed; layer n_layers: none. */
    struct qlb_inflater *inflater;
    unsigned cluster_layer;
    uint64_t cluster_start;
    uint8_t *cluster;
    uint8_t *packed; /* its compressed form */
};

/* Follows the chain from the top. The answer is clipped to
 * [offset, offset + length); a range that no layer holds is
 * QLB_MAP_UNALLOCATED. With top_only, looks at the top layer alone. */
int qlb_disk_map(struct qlb_disk_reader *reader, uint64_t offset,
                 uint64_t length, bool top_only, struct qlb_map *map,
                 struct qlb_error *err);

/* Forgets what was read of the top layer: for an image that another process
 * writes. What lies below it does not change. */
void qlb_disk_reader_forget(struct qlb_disk_reader *reader);

/* Adds " (text)" to the message; returns -1. */
int qlb_error_suffix(struct qlb_error *err, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

/* ---- qcow2_compress.c ---- */

struct qlb_inflater *qlb_inflater_new(void);
void qlb_inflater_free(struct qlb_inflater *inflater);

/* Decompresses one cluster: exactly `len` bytes. src may hold more than the
 * compressed data (it comes in sectors). 0, or -1 where it is damaged. */
int qlb_inflate(struct qlb_inflater *inflater, enum qlb_compression type,
                uint8_t *dst, size_t len, const uint8_t *src, size_t src_len);

#endif
