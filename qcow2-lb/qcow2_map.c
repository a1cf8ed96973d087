/* L1 and L2 tables: from a guest offset to what is there.
 *
 * Tables are never read whole, but in slices of 4 KiB, so that a few changed
 * clusters of a huge disk cost a few slices.  A reader keeps for each layer
 * one slice of the L1 table, a few of L2 tables, and the last answer: a run
 * of clusters that hang together.  Every answer is first computed as far as
 * its L2 slice goes and then clipped to what was asked, so that small steps
 * through a long run cost one look at the tables.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "qcow2_layer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "byteorder.h"
#include "checked.h"

#define ULL(n) ((unsigned long long)(n))

/* ---- slices ---- */

static int load_slice(struct qlb_slice *slice, uint64_t key,
                      struct qlb_blkio *io, uint64_t offset, size_t len,
                      struct qlb_error *err)
{
    uint8_t *data = slice->data;

    if (data != NULL && slice->key == key) {
        return 0;
    }
    if (data == NULL) {
        data = malloc(QLB_SLICE_SIZE);
        if (data == NULL) {
            return qlb_fail_errno(err, ENOMEM, "%s", io->name);
        }
    }
    /* Until the read has succeeded the slice is empty. */
    slice->data = NULL;
    if (qlb_blkio_read(io, data, len, offset, err) < 0) {
        free(data);
        return -1;
    }
    slice->data = data;
    slice->key = key;
    return 0;
}

static int get_l1_entry(const struct qlb_layer *layer,
                        struct qlb_layer_cache *cache, uint64_t index,
                        uint64_t *entry, struct qlb_error *err)
{
    uint64_t per_slice = QLB_SLICE_SIZE / 8;
    uint64_t number = index / per_slice;
    uint64_t left = layer->header->l1_entries - number * per_slice;
    size_t len = min_u64(left, per_slice) * 8;

    if (load_slice(&cache->l1, number, layer->io,
                   layer->header->l1_offset + number * QLB_SLICE_SIZE, len,
                   err) < 0) {
        return qlb_error_suffix(err, "L1 table");
    }
    *entry = get_be64(cache->l1.data + index % per_slice * 8);
    return 0;
}

static struct qlb_slice *l2_slot(struct qlb_disk_reader *reader,
                                 const struct qlb_layer *layer,
                                 struct qlb_layer_cache *cache, uint64_t host)
{
    if (cache->l2 == NULL) {
        cache->l2 = calloc(reader->l2_slots, sizeof(*cache->l2));
        if (cache->l2 == NULL) {
            return NULL;
        }
    }
    return &cache->l2[(host >> layer->slice_bits) & (reader->l2_slots - 1)];
}

/* ---- one L2 entry ---- */

/* A stretch of a cluster that is of one kind. */
struct piece {
    enum qlb_map_kind kind;
    uint64_t length;    /* bytes from where it was asked for */
    uint64_t host;      /* of its first byte; compressed: of the cluster */
    uint64_t host_size; /* compressed only */
};

/* The functions below return NULL, or what is wrong with the entry. */

static const char *classify_compressed(const struct qlb_layer *layer,
                                       uint64_t entry, uint64_t bitmap,
                                       struct piece *piece)
{
    unsigned offset_bits = 62 - (layer->cluster_bits - 8);
    uint64_t offset = entry & ((UINT64_C(1) << offset_bits) - 1);
    uint64_t sectors = ((entry & (QLB_L2_COMPRESSED - 1)) >> offset_bits) + 1;

    if (layer->data != layer->io) {
        return "compressed cluster beside an external data file";
    }
    if ((entry & QLB_ENTRY_COPIED) || bitmap != 0 ||
        offset >= QLB_MAX_OFFSET) {
        return "reserved bits of a compressed cluster";
    }
    piece->kind = QLB_MAP_COMPRESSED;
    piece->host = offset;
    piece->host_size = sectors * QLB_SECTOR - offset % QLB_SECTOR;
    return NULL;
}

/* Number of the bits from `first` on that equal bit `first`. */
static unsigned equal_bits(uint32_t bits, unsigned first)
{
    uint32_t rest = bits >> first;
    unsigned n;

    if (rest & 1) {
        rest = ~rest;
    }
    n = rest ? (unsigned)__builtin_ctz(rest) : 32;
    return (unsigned)min_u64(n, 32 - first);
}

static const char *classify_subclusters(const struct qlb_layer *layer,
                                        uint64_t bitmap, bool allocated,
                                        uint64_t within, struct piece *piece)
{
    uint32_t alloc = (uint32_t)bitmap;
    uint32_t zero = (uint32_t)(bitmap >> 32);
    unsigned first = (unsigned)(within >> layer->sub_bits);
    unsigned n = (unsigned)min_u64(equal_bits(alloc, first),
                                   equal_bits(zero, first));

    if (alloc & zero) {
        return "subclusters both allocated and zero";
    }
    if (alloc != 0 && !allocated) {
        return "allocated subclusters without a host cluster";
    }
    if ((zero >> first) & 1) {
        piece->kind = QLB_MAP_ZERO;
    } else if ((alloc >> first) & 1) {
        piece->kind = QLB_MAP_DATA;
    } else {
        piece->kind = QLB_MAP_UNALLOCATED;
    }
    piece->length = ((uint64_t)(first + n) << layer->sub_bits) - within;
    return NULL;
}

/* What the L2 entry says about the cluster that begins at guest offset
 * `start`, from byte `within` on. */
static const char *classify(const struct qlb_layer *layer, const uint8_t *p,
                            uint64_t start, uint64_t within,
                            struct piece *piece)
{
    uint64_t cluster_size = layer->header->cluster_size;
    bool extended = layer->header->extended_l2;
    bool external = layer->data != layer->io;
    uint64_t entry = get_be64(p);
    uint64_t bitmap = extended ? get_be64(p + 8) : 0;
    uint64_t host = entry & QLB_OFFSET_MASK;
    bool allocated;

    piece->length = cluster_size - within;
    if (entry == 0 && bitmap == 0) {
        piece->kind = QLB_MAP_UNALLOCATED;
        return NULL;
    }
    if (entry & QLB_L2_COMPRESSED) {
        return classify_compressed(layer, entry, bitmap, piece);
    }
    if ((entry & QLB_L2_RESERVED) ||
        ((entry & QLB_L2_ZERO) &&
         (extended || layer->header->version < 3))) {
        return "reserved bits";
    }
    if (host & (cluster_size - 1)) {
        return "host cluster is not aligned";
    }
    /* Host offset 0 is a place in an external data file only. In the image
     * itself the header is there; QEMU takes such a cluster as unallocated. */
    allocated = host != 0 || (external && (entry & QLB_ENTRY_COPIED));
    if (allocated && external && host != start) {
        return "cluster has another offset in the external data file";
    }
    piece->host = host + within;
    if (extended) {
        return classify_subclusters(layer, bitmap, allocated, within, piece);
    }
    piece->kind = (entry & QLB_L2_ZERO) ? QLB_MAP_ZERO
                  : allocated           ? QLB_MAP_DATA
                                        : QLB_MAP_UNALLOCATED;
    return NULL;
}

/* ---- one layer ---- */

static void start_map(struct qlb_map *map, uint64_t offset,
                      const struct piece *piece)
{
    map->start = offset;
    map->end = offset + piece->length;
    map->kind = piece->kind;
    map->host = piece->host;
    map->host_size = piece->host_size;
}

static bool continues(const struct qlb_map *map, const struct piece *piece)
{
    if (piece->kind != map->kind || map->kind == QLB_MAP_COMPRESSED) {
        return false;
    }
    return map->kind != QLB_MAP_DATA ||
           piece->host == map->host + (map->end - map->start);
}

/* Reads the run at offset out of one slice of an L2 table. */
static int map_slice(const struct qlb_layer *layer, const uint8_t *slice,
                     uint64_t offset, struct qlb_map *map,
                     struct qlb_error *err)
{
    uint64_t cluster_size = layer->header->cluster_size;
    unsigned entries = 1u << (layer->slice_bits - layer->entry_bits);
    unsigned i = (unsigned)(offset >> layer->cluster_bits) & (entries - 1);
    uint64_t within = offset & (cluster_size - 1);
    const uint8_t *entry = slice + ((size_t)i << layer->entry_bits);
    struct piece piece = { 0 };
    const char *wrong = classify(layer, entry, offset - within, within,
                                 &piece);

    if (wrong != NULL) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged L2 entry 0x%016llx "
                        "for guest offset %llu: %s", layer->path,
                        ULL(get_be64(entry)), ULL(offset), wrong);
    }
    start_map(map, offset, &piece);
    if (piece.kind == QLB_MAP_COMPRESSED) {
        map->start = offset - within;
        return 0;
    }
    /* A damaged entry further on ends the run; who gets there sees it. */
    for (;;) {
        within = map->end & (cluster_size - 1);
        if (within == 0 && ++i == entries) {
            return 0;
        }
        entry = slice + ((size_t)i << layer->entry_bits);
        if (classify(layer, entry, map->end - within, within, &piece) ||
            !continues(map, &piece)) {
            return 0;
        }
        map->end += piece.length;
    }
}

/* Entries of the L1 table from index on that have no L2 table: at least one;
 * further slices of the L1 table are read as far as `length` asks for. */
static int skip_l1(const struct qlb_layer *layer,
                   struct qlb_layer_cache *cache, uint64_t offset,
                   uint64_t length, struct qlb_map *map,
                   struct qlb_error *err)
{
    unsigned l1_bits = layer->cluster_bits + layer->l2_bits;
    uint64_t index = offset >> l1_bits;
    uint64_t n = div_round_up(layer->size, UINT64_C(1) << l1_bits);

    map->start = offset;
    map->kind = QLB_MAP_UNALLOCATED;
    for (index++; index < n; index++) {
        uint64_t entry;

        if (index % (QLB_SLICE_SIZE / 8) == 0 &&
            (index << l1_bits) - offset >= length) {
            break;
        }
        if (get_l1_entry(layer, cache, index, &entry, err) < 0) {
            return -1;
        }
        if ((entry & ~QLB_ENTRY_COPIED) != 0) {
            break;
        }
    }
    map->end = index << l1_bits;
    return 0;
}

static int map_qcow2(struct qlb_disk_reader *reader,
                     const struct qlb_layer *layer,
                     struct qlb_layer_cache *cache, uint64_t offset,
                     uint64_t length, struct qlb_map *map,
                     struct qlb_error *err)
{
    unsigned l1_bits = layer->cluster_bits + layer->l2_bits;
    uint64_t entry, table, within, host;
    struct qlb_slice *slot;

    if (get_l1_entry(layer, cache, offset >> l1_bits, &entry, err) < 0) {
        return -1;
    }
    table = entry & QLB_OFFSET_MASK;
    if ((entry & QLB_L1_RESERVED) ||
        (table & (layer->header->cluster_size - 1))) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: damaged L1 entry 0x%016llx "
                        "for guest offset %llu", layer->path, ULL(entry),
                        ULL(offset));
    }
    if (table == 0) {
        return skip_l1(layer, cache, offset, length, map, err);
    }
    within = (offset & ((UINT64_C(1) << l1_bits) - 1)) >> layer->cluster_bits
             << layer->entry_bits;
    host = table + round_down(within, UINT64_C(1) << layer->slice_bits);
    slot = l2_slot(reader, layer, cache, host);
    if (slot == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", layer->path);
    }
    if (load_slice(slot, host, layer->io, host, 1u << layer->slice_bits,
                   err) < 0) {
        return qlb_error_suffix(err, "L2 table for guest offset %llu",
                                ULL(offset));
    }
    return map_slice(layer, slot->data, offset, map, err);
}

/* A raw image is data, holes of its file apart. */
static void map_raw(const struct qlb_layer *layer, uint64_t offset,
                    struct qlb_map *map)
{
    off_t data, hole;

    map->start = offset;
    map->end = layer->size;
    map->kind = QLB_MAP_DATA;
    map->host = offset;
    if (layer->io->fd < 0) {
        return;
    }
    /* Nobody uses the file position, so threads don't disturb each other. */
    data = lseek(layer->io->fd, (off_t)offset, SEEK_DATA);
    if (data < 0) {
        if (errno == ENXIO) {
            map->kind = QLB_MAP_ZERO;
        }
        return;
    }
    if ((uint64_t)data > offset) {
        map->kind = QLB_MAP_ZERO;
        map->end = min_u64(layer->size, (uint64_t)data);
        return;
    }
    hole = lseek(layer->io->fd, (off_t)offset, SEEK_HOLE);
    if (hole > (off_t)offset) {
        map->end = min_u64(layer->size, (uint64_t)hole);
    }
}

/* The run at offset, which is within the layer. */
static int map_layer(struct qlb_disk_reader *reader, unsigned number,
                     uint64_t offset, uint64_t length,
                     const struct qlb_map **map, struct qlb_error *err)
{
    const struct qlb_layer *layer = &reader->disk->layers[number];
    struct qlb_layer_cache *cache = &reader->caches[number];
    struct qlb_map *last = &cache->last;

    *map = last;
    if (offset >= last->start && offset < last->end) {
        return 0;
    }
    *last = (struct qlb_map) { .layer = number };
    if (layer->header == NULL) {
        map_raw(layer, offset, last);
    } else if (map_qcow2(reader, layer, cache, offset, length, last,
                         err) < 0) {
        last->end = last->start;
        return -1;
    }
    last->end = min_u64(last->end, layer->size);
    return 0;
}

/* ---- the chain ---- */

/* What of a layer's run concerns [offset, end). */
static void clip_map(struct qlb_map *map, const struct qlb_map *from,
                     uint64_t offset, uint64_t end)
{
    *map = *from;
    if (map->kind != QLB_MAP_COMPRESSED) {
        map->host += offset - map->start;
        map->start = offset;
    }
    map->end = min_u64(map->end, end);
}

int qlb_disk_map(struct qlb_disk_reader *reader, uint64_t offset,
                 uint64_t length, bool top_only, struct qlb_map *map,
                 struct qlb_error *err)
{
    const struct qlb_disk *disk = reader->disk;
    unsigned n = top_only ? 1 : disk->n_layers;
    uint64_t end = offset + length;

    *map = (struct qlb_map) { .start = offset, .end = end };
    for (unsigned i = 0; i < n; i++) {
        const struct qlb_map *run;

        if (offset >= disk->layers[i].size) {
            /* A backing file that is shorter than what lies over it reads
             * as zeroes behind its end, whatever is further below. */
            *map = (struct qlb_map) {
                .start = offset, .end = end, .kind = QLB_MAP_ZERO, .layer = i,
            };
            return 0;
        }
        end = min_u64(end, disk->layers[i].size);
        if (map_layer(reader, i, offset, end - offset, &run, err) < 0) {
            return -1;
        }
        end = min_u64(end, run->end);
        clip_map(map, run, offset, end);
        if (map->kind != QLB_MAP_UNALLOCATED) {
            return 0;
        }
    }
    return 0;
}

/* ---- extents ---- */

static int get_extent(struct qlb_disk_reader *reader, uint64_t offset,
                      uint64_t length, bool top_only,
                      enum qlb_extent_type *type, uint64_t *run,
                      struct qlb_error *err)
{
    bool shows_holes = top_only ||
                       (reader->disk->flags & QLB_DISK_NO_BACKING);
    struct qlb_map map;

    if (length == 0 ||
        !range_within(offset, length, qlb_disk_size(reader->disk))) {
        return qlb_fail(err, QLB_E_USAGE, "%s: %llu bytes at offset %llu are "
                        "not within the disk", reader->disk->layers[0].path,
                        ULL(length), ULL(offset));
    }
    if (qlb_disk_map(reader, offset, length, top_only, &map, err) < 0) {
        return -1;
    }
    *run = map.end - offset;
    switch (map.kind) {
    case QLB_MAP_DATA:
    case QLB_MAP_COMPRESSED:
        *type = QLB_EXTENT_DATA;
        break;
    case QLB_MAP_ZERO:
        *type = QLB_EXTENT_ZERO;
        break;
    case QLB_MAP_UNALLOCATED:
        *type = shows_holes ? QLB_EXTENT_UNALLOCATED : QLB_EXTENT_ZERO;
        break;
    }
    return 0;
}

int qlb_disk_extent(struct qlb_disk_reader *reader, uint64_t offset,
                    uint64_t length, enum qlb_extent_type *type,
                    uint64_t *run, struct qlb_error *err)
{
    return get_extent(reader, offset, length, false, type, run, err);
}

int qlb_disk_top_extent(struct qlb_disk_reader *reader, uint64_t offset,
                        uint64_t length, enum qlb_extent_type *type,
                        uint64_t *run, struct qlb_error *err)
{
    return get_extent(reader, offset, length, true, type, run, err);
}
