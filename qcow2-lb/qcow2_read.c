/* Content of a disk.
 *
 * A read is cut into the runs that the tables give; runs that are contiguous
 * in the file become one read again, straight into the caller's memory.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "qcow2_layer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "checked.h"

#define ULL(n) ((unsigned long long)(n))

/* L2 slots for each layer: enough that a walk which goes back and forth a
 * little finds its slices again. In a long chain few, so that a reader's
 * memory stays bounded: 200 layers with 2 slots and an L1 slice take 2.4 MB. */
#define L2_SLOTS 16
#define L2_SLOTS_LONG_CHAIN 2
#define LONG_CHAIN 8

struct qlb_disk_reader *qlb_disk_reader_new(const struct qlb_disk *disk,
                                            struct qlb_error *err)
{
    struct qlb_disk_reader *reader = calloc(1, sizeof(*reader));

    if (reader != NULL) {
        reader->caches = calloc(disk->n_layers, sizeof(*reader->caches));
    }
    if (reader == NULL || reader->caches == NULL) {
        free(reader);
        qlb_fail_errno(err, ENOMEM, "%s", disk->layers[0].path);
        return NULL;
    }
    reader->disk = disk;
    reader->l2_slots = disk->n_layers > LONG_CHAIN ? L2_SLOTS_LONG_CHAIN
                                                   : L2_SLOTS;
    reader->cluster_layer = disk->n_layers;
    return reader;
}

void qlb_disk_reader_free(struct qlb_disk_reader *reader)
{
    if (reader == NULL) {
        return;
    }
    for (unsigned i = 0; i < reader->disk->n_layers; i++) {
        struct qlb_layer_cache *cache = &reader->caches[i];

        free(cache->l1.data);
        for (unsigned k = 0; cache->l2 != NULL && k < reader->l2_slots; k++) {
            free(cache->l2[k].data);
        }
        free(cache->l2);
    }
    free(reader->caches);
    qlb_inflater_free(reader->inflater);
    free(reader->cluster);
    free(reader->packed);
    free(reader);
}

void qlb_disk_reader_forget(struct qlb_disk_reader *reader)
{
    struct qlb_layer_cache *cache = &reader->caches[0];

    free(cache->l1.data);
    cache->l1.data = NULL;
    for (unsigned k = 0; cache->l2 != NULL && k < reader->l2_slots; k++) {
        free(cache->l2[k].data);
        cache->l2[k].data = NULL;
    }
    cache->last.end = cache->last.start;
    if (reader->cluster_layer == 0) {
        reader->cluster_layer = reader->disk->n_layers;
    }
}

/* ---- compressed clusters ---- */

/* Buffers for the largest cluster of the chain. Compressed data has at most
 * 2^(cluster_bits - 8) sectors: two clusters. */
static int prepare_inflater(struct qlb_disk_reader *reader,
                            struct qlb_error *err)
{
    size_t largest = 0;

    if (reader->inflater != NULL) {
        return 0;
    }
    for (unsigned i = 0; i < reader->disk->n_layers; i++) {
        const struct qlb_layer *layer = &reader->disk->layers[i];

        if (layer->header != NULL) {
            largest = max_u64(largest, layer->header->cluster_size);
        }
    }
    if (reader->cluster == NULL) {
        reader->cluster = malloc(largest);
    }
    if (reader->packed == NULL) {
        reader->packed = malloc(2 * largest);
    }
    if (reader->cluster != NULL && reader->packed != NULL) {
        reader->inflater = qlb_inflater_new();
    }
    if (reader->inflater == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s",
                              reader->disk->layers[0].path);
    }
    return 0;
}

static int inflate_cluster(struct qlb_disk_reader *reader,
                           const struct qlb_map *map, uint8_t *dst,
                           struct qlb_error *err)
{
    const struct qlb_layer *layer = &reader->disk->layers[map->layer];
    struct qlb_blkio *io = layer->io;
    int64_t n;

    if (prepare_inflater(reader, err) < 0) {
        return -1;
    }
    /* The last sector of a file need not be whole. */
    n = io->ops->pread(io, reader->packed, map->host_size, map->host, err);
    if (n < 0) {
        return qlb_error_suffix(err, "guest offset %llu", ULL(map->start));
    }
    if (qlb_inflate(reader->inflater, layer->header->compression, dst,
                    layer->header->cluster_size, reader->packed,
                    (size_t)n) < 0) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged compressed cluster "
                        "at offset %llu (guest offset %llu)", io->name,
                        ULL(map->host), ULL(map->start));
    }
    return 0;
}

/* [offset, offset + length) of a compressed cluster. A whole cluster is
 * decompressed in place; parts come from the reader's last cluster. */
static int read_compressed(struct qlb_disk_reader *reader,
                           const struct qlb_map *map, uint8_t *dst,
                           uint64_t offset, uint64_t length,
                           struct qlb_error *err)
{
    const struct qlb_layer *layer = &reader->disk->layers[map->layer];
    bool cached = reader->cluster_layer == map->layer &&
                  reader->cluster_start == map->start;

    if (!cached && length == layer->header->cluster_size) {
        return inflate_cluster(reader, map, dst, err);
    }
    if (!cached) {
        reader->cluster_layer = reader->disk->n_layers;
        if (prepare_inflater(reader, err) < 0 ||
            inflate_cluster(reader, map, reader->cluster, err) < 0) {
            return -1;
        }
        reader->cluster_layer = map->layer;
        reader->cluster_start = map->start;
    }
    memcpy(dst, reader->cluster + (offset - map->start), length);
    return 0;
}

/* ---- data clusters ---- */

/* A host range that waits to be read, as contiguous runs are added to it. */
struct pending {
    unsigned layer;
    uint8_t *dst;
    uint64_t guest, host, length; /* length 0: nothing waits */
};

/* The file ended after n bytes of the range.
 *
 * QEMU reads zeroes behind the end of the file. That is right for the cluster
 * in which the file ends, since a file is only as long as what was written.
 * A cluster that begins behind the end was lost with the file's tail: a
 * backup must say so and not store zeroes. */
static int pad_short_read(const struct qlb_layer *layer,
                          const struct pending *p, uint64_t n,
                          struct qlb_error *err)
{
    uint64_t end = p->host + n; /* the file's, if n is not 0 */
    uint64_t cluster = 1, lost;
    uint8_t byte;
    int64_t got = 0;

    if (layer->header != NULL) {
        cluster = layer->header->cluster_size;
    }
    lost = round_up(end, cluster);
    if (n == 0 && p->host % cluster != 0) {
        got = layer->data->ops->pread(layer->data, &byte, 1,
                                      round_down(p->host, cluster), err);
        if (got < 0) {
            return -1;
        }
        if (got == 0) {
            lost = p->host;
        }
    }
    if (lost < p->host + p->length) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: the file ends before the "
                        "data at offset %llu (guest offset %llu)",
                        layer->data->name, ULL(lost),
                        ULL(p->guest + (lost - p->host)));
    }
    memset(p->dst + n, 0, p->length - n);
    return 0;
}

static int read_pending(struct qlb_disk_reader *reader, struct pending *p,
                        struct qlb_error *err)
{
    const struct qlb_layer *layer = &reader->disk->layers[p->layer];
    int64_t n;

    if (p->length == 0) {
        return 0;
    }
    n = layer->data->ops->pread(layer->data, p->dst, p->length, p->host, err);
    if (n < 0) {
        return qlb_error_suffix(err, "guest offset %llu", ULL(p->guest));
    }
    if ((uint64_t)n < p->length &&
        pad_short_read(layer, p, (uint64_t)n, err) < 0) {
        return -1;
    }
    p->length = 0;
    return 0;
}

static int add_pending(struct qlb_disk_reader *reader, struct pending *p,
                       const struct qlb_map *map, uint8_t *dst,
                       struct qlb_error *err)
{
    uint64_t length = map->end - map->start;

    if (p->length > 0 && p->layer == map->layer &&
        p->dst + p->length == dst && p->host + p->length == map->host) {
        p->length += length;
        return 0;
    }
    if (read_pending(reader, p, err) < 0) {
        return -1;
    }
    *p = (struct pending) {
        .layer = map->layer, .dst = dst, .guest = map->start,
        .host = map->host, .length = length,
    };
    return 0;
}

int qlb_disk_read(struct qlb_disk_reader *reader, void *buf, uint64_t offset,
                  uint64_t length, struct qlb_error *err)
{
    struct pending pending = { 0 };
    uint8_t *dst = buf;

    if (!range_within(offset, length, qlb_disk_size(reader->disk))) {
        return qlb_fail(err, QLB_E_USAGE, "%s: %llu bytes at offset %llu are "
                        "not within the disk", reader->disk->layers[0].path,
                        ULL(length), ULL(offset));
    }
    while (length > 0) {
        struct qlb_map map;
        uint64_t n;
        int ret = 0;

        if (qlb_disk_map(reader, offset, length, false, &map, err) < 0) {
            return -1;
        }
        n = map.end - offset;
        switch (map.kind) {
        case QLB_MAP_DATA:
            ret = add_pending(reader, &pending, &map, dst, err);
            break;
        case QLB_MAP_COMPRESSED:
            ret = read_compressed(reader, &map, dst, offset, n, err);
            break;
        case QLB_MAP_ZERO:
        case QLB_MAP_UNALLOCATED:
            memset(dst, 0, n);
            break;
        }
        if (ret < 0) {
            return -1;
        }
        dst += n;
        offset += n;
        length -= n;
    }
    return read_pending(reader, &pending, err);
}
