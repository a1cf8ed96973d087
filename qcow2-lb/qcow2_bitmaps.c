/* The standard bitmaps extension of qcow2: directory, tables, data.
 *
 * A directory entry has 24 bytes (enum entry_offset), extra data, the name and
 * padding to 8 bytes.  The directory is kept in memory as it is on disk, so
 * that what is not understood is carried on unchanged.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "qcow2_bitmaps.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap.h"
#include "byteorder.h"
#include "checked.h"
#include "qcow2_alloc.h"

enum entry_offset {
    ENTRY_TABLE_OFFSET = 0,
    ENTRY_TABLE_ENTRIES = 8,
    ENTRY_FLAGS = 12,
    ENTRY_TYPE = 16,
    ENTRY_GRANULARITY = 17,
    ENTRY_NAME_SIZE = 18,
    ENTRY_EXTRA_SIZE = 20,
};

#define GRANULARITY_BITS_MAX 63
#define TABLE_CHUNK 8192 /* entries read at once by qlb_bitmap_each_cluster */

static int damaged(const struct qlb_blkio *io, const char *what,
                   struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_DAMAGED, "%s: dirty bitmaps: %s", io->name,
                    what);
}

/* ---- directory ---- */

/* Bytes of an entry with its padding. */
static uint64_t entry_size(uint32_t extra_size, uint16_t name_size)
{
    return round_up((uint64_t)QLB_BITMAP_ENTRY + extra_size + name_size, 8);
}

/* data has `left` bytes. The size of the entry, or 0 where it does not fit. */
static uint64_t entry_from_disk(const uint8_t *data, uint64_t left,
                                struct qlb_bitmap_entry *entry)
{
    uint64_t size;

    if (left < QLB_BITMAP_ENTRY) {
        return 0;
    }
    entry->table_offset = get_be64(data + ENTRY_TABLE_OFFSET);
    entry->table_entries = get_be32(data + ENTRY_TABLE_ENTRIES);
    entry->flags = get_be32(data + ENTRY_FLAGS);
    entry->type = data[ENTRY_TYPE];
    entry->granularity_bits = data[ENTRY_GRANULARITY];
    entry->name_size = get_be16(data + ENTRY_NAME_SIZE);
    entry->extra_size = get_be32(data + ENTRY_EXTRA_SIZE);
    size = entry_size(entry->extra_size, entry->name_size);
    if (size > left) {
        return 0;
    }
    entry->extra = data + QLB_BITMAP_ENTRY;
    entry->name = (const char *)entry->extra + entry->extra_size;
    return size;
}

static void entry_to_disk(const struct qlb_bitmap_entry *entry, uint8_t *data)
{
    put_be64(data + ENTRY_TABLE_OFFSET, entry->table_offset);
    put_be32(data + ENTRY_TABLE_ENTRIES, entry->table_entries);
    put_be32(data + ENTRY_FLAGS, entry->flags);
    data[ENTRY_TYPE] = entry->type;
    data[ENTRY_GRANULARITY] = entry->granularity_bits;
    put_be16(data + ENTRY_NAME_SIZE, entry->name_size);
    put_be32(data + ENTRY_EXTRA_SIZE, entry->extra_size);
    if (entry->extra_size > 0) {
        memcpy(data + QLB_BITMAP_ENTRY, entry->extra, entry->extra_size);
    }
    memcpy(data + QLB_BITMAP_ENTRY + entry->extra_size, entry->name,
           entry->name_size);
}

struct name {
    const char *text;
    size_t size;
};

static int compare_names(const void *a, const void *b)
{
    const struct name *x = a, *y = b;
    int order = memcmp(x->text, y->text, min_u64(x->size, y->size));

    return order != 0 ? order : x->size < y->size ? -1 : x->size > y->size;
}

/* For a directory whose entries are well-formed. */
static int check_names(const struct qlb_blkio *io,
                       const struct qlb_bitmap_directory *directory,
                       struct qlb_error *err)
{
    struct name *names = calloc(directory->count, sizeof(*names));
    struct qlb_bitmap_entry entry;
    size_t position = 0, n = 0;
    int ret = 0;

    if (names == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", io->name);
    }
    while (qlb_bitmap_directory_next(directory, &position, &entry)) {
        names[n].text = entry.name;
        names[n++].size = entry.name_size;
    }
    qsort(names, n, sizeof(*names), compare_names);
    for (size_t i = 1; i < n && ret == 0; i++) {
        if (compare_names(&names[i - 1], &names[i]) == 0) {
            ret = damaged(io, "a name appears twice in the directory", err);
        }
    }
    free(names);
    return ret;
}

static int check_entry(const struct qlb_blkio *io, const uint8_t *data,
                       uint64_t size, const struct qlb_bitmap_entry *entry,
                       struct qlb_error *err)
{
    uint64_t used = (uint64_t)QLB_BITMAP_ENTRY + entry->extra_size +
                    entry->name_size;

    if (entry->name_size == 0 || entry->name_size > QLB_MAX_BITMAP_NAME) {
        return damaged(io, "an entry of the directory has a bad name", err);
    }
    if (!qlb_bits_all_zero(data + used, size - used)) {
        return damaged(io, "the padding of an entry of the directory is not "
                       "zero", err);
    }
    if ((entry->flags & ~QLB_BITMAP_FLAGS_KNOWN) != 0) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s: dirty bitmap \"%.*s\" has "
                        "unknown flags", io->name, (int)entry->name_size,
                        entry->name);
    }
    return 0;
}

/* All entries must fill the directory exactly, as many as the header says.
 * Damage anywhere counts before unknown flags do. */
static int check_entries(const struct qlb_blkio *io,
                         const struct qlb_bitmap_directory *directory,
                         struct qlb_error *err)
{
    size_t position = 0;
    uint32_t count = 0;
    int ret = 0;

    while (position < directory->size) {
        struct qlb_bitmap_entry entry;
        uint64_t size = entry_from_disk(directory->data + position,
                                        directory->size - position, &entry);

        if (size == 0) {
            return damaged(io, "an entry of the directory is cut off", err);
        }
        if (check_entry(io, directory->data + position, size, &entry,
                        err) < 0) {
            if (err->code == QLB_E_DAMAGED) {
                return -1;
            }
            ret = -1;
        }
        position += size;
        count++;
    }
    if (count != directory->count) {
        return damaged(io, "the directory has another number of entries than "
                       "the header says", err);
    }
    return ret < 0 ? -1 : check_names(io, directory, err);
}

static int check_directory_place(const struct qlb_blkio *io,
                                 const struct qlb_qcow2_header *header,
                                 struct qlb_error *err)
{
    struct qlb_qcow2_header others = *header;

    others.has_bitmaps = false; /* the directory does not overlap itself */
    if (header->n_bitmaps == 0 || header->n_bitmaps > QLB_MAX_BITMAPS ||
        header->bitmap_directory_size == 0 ||
        header->bitmap_directory_size > QLB_MAX_BITMAP_DIRECTORY) {
        return damaged(io, "the size of the directory is out of range", err);
    }
    if ((header->bitmap_directory_offset & (header->cluster_size - 1)) != 0 ||
        !range_within(header->bitmap_directory_offset,
                      header->bitmap_directory_size, io->size) ||
        qlb_qcow2_is_metadata(&others, header->bitmap_directory_offset,
                              header->bitmap_directory_size)) {
        return damaged(io, "the directory can't be where the header says",
                       err);
    }
    return 0;
}

int qlb_bitmap_directory_read(struct qlb_blkio *io,
                              const struct qlb_qcow2_header *header,
                              struct qlb_bitmap_directory *directory,
                              struct qlb_error *err)
{
    memset(directory, 0, sizeof(*directory));
    if (check_directory_place(io, header, err) < 0) {
        return -1;
    }
    directory->data = malloc(header->bitmap_directory_size);
    if (directory->data == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", io->name);
    }
    directory->size = directory->allocated = header->bitmap_directory_size;
    directory->count = header->n_bitmaps;
    if (qlb_blkio_read(io, directory->data, directory->size,
                       header->bitmap_directory_offset, err) < 0 ||
        check_entries(io, directory, err) < 0) {
        qlb_bitmap_directory_release(directory);
        return -1;
    }
    return 0;
}

void qlb_bitmap_directory_release(struct qlb_bitmap_directory *directory)
{
    free(directory->data);
    memset(directory, 0, sizeof(*directory));
}

bool qlb_bitmap_directory_next(const struct qlb_bitmap_directory *directory,
                               size_t *position,
                               struct qlb_bitmap_entry *entry)
{
    uint64_t size;

    if (*position >= directory->size) {
        return false;
    }
    size = entry_from_disk(directory->data + *position,
                           directory->size - *position, entry);
    *position += size;
    return size != 0;
}

int qlb_bitmap_directory_append(struct qlb_bitmap_directory *directory,
                                const struct qlb_bitmap_entry *entry,
                                struct qlb_error *err)
{
    uint64_t size = entry_size(entry->extra_size, entry->name_size);

    if (directory->count == QLB_MAX_BITMAPS ||
        size > QLB_MAX_BITMAP_DIRECTORY - directory->size) {
        return qlb_fail(err, QLB_E_RUNTIME,
                        "the image has too many dirty bitmaps");
    }
    if (size > directory->allocated - directory->size) {
        size_t wanted = directory->allocated * 2 + size;
        uint8_t *grown = realloc(directory->data, wanted);

        if (grown == NULL) {
            return qlb_fail_errno(err, ENOMEM, "directory of dirty bitmaps");
        }
        directory->data = grown;
        directory->allocated = wanted;
    }
    memset(directory->data + directory->size, 0, size);
    entry_to_disk(entry, directory->data + directory->size);
    directory->size += size;
    directory->count++;
    return 0;
}

int qlb_bitmap_directory_write(struct qlb_blkio *io,
                               const struct qlb_qcow2_header *header,
                               const struct qlb_bitmap_directory *directory,
                               uint64_t offset, struct qlb_error *err)
{
    size_t bytes = round_up(directory->size, header->cluster_size);
    uint8_t *buf = calloc(1, bytes);
    int ret;

    if (buf == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", io->name);
    }
    memcpy(buf, directory->data, directory->size);
    ret = qlb_blkio_write(io, buf, bytes, offset, err);
    free(buf);
    return ret;
}

/* ---- tables ---- */

static uint64_t bits_of(const struct qlb_qcow2_header *header,
                        unsigned granularity_bits)
{
    return div_round_up(header->virtual_size,
                        UINT64_C(1) << granularity_bits);
}

uint64_t qlb_bitmap_table_entries(const struct qlb_qcow2_header *header,
                                  unsigned granularity_bits)
{
    return div_round_up(bits_of(header, granularity_bits),
                        header->cluster_size * 8);
}

bool qlb_bitmap_size_possible(const struct qlb_qcow2_header *header,
                              unsigned granularity_bits)
{
    return granularity_bits <= GRANULARITY_BITS_MAX &&
           bits_of(header, granularity_bits) <= QLB_BITMAP_BITS_MAX;
}

bool qlb_bitmap_table_in_range(struct qlb_blkio *io,
                               const struct qlb_qcow2_header *header,
                               const struct qlb_bitmap_entry *entry)
{
    uint64_t bytes = entry->table_entries * UINT64_C(8);

    return bytes > 0 && 
           entry->table_entries <= QLB_MAX_BITMAP_TABLE &&
           (entry->table_offset & (header->cluster_size - 1)) == 0 &&
           range_within(entry->table_offset, bytes, io->size) &&
           !qlb_qcow2_is_metadata(header, entry->table_offset, bytes);
}

/* Checks one entry of a table; it may point a cluster that the end of the
 * file cuts off. */
static bool table_entry_valid(const struct qlb_blkio *io,
                              const struct qlb_qcow2_header *header,
                              uint64_t value)
{
    if (value == QLB_BITMAP_ZEROES || value == QLB_BITMAP_ONES) {
        return true;
    }
    return (value & ~QLB_OFFSET_MASK) == 0 &&
           (value & (header->cluster_size - 1)) == 0 && value < io->size &&
           !qlb_qcow2_is_metadata(header, value, header->cluster_size);
}

/* Reads the entries first .. first + n - 1. */
static int read_entries(struct qlb_blkio *io,
                        const struct qlb_qcow2_header *header,
                        const struct qlb_bitmap_entry *entry, uint64_t first,
                        uint64_t n, uint64_t *table, struct qlb_error *err)
{
    if (qlb_blkio_read(io, table, n * 8, entry->table_offset + first * 8,
                       err) < 0) {
        return -1;
    }
    for (uint64_t i = 0; i < n; i++) {
        table[i] = get_be64(&table[i]);
        if (!table_entry_valid(io, header, table[i])) {
            return qlb_fail(err, QLB_E_DAMAGED,
                            "%s: dirty bitmap \"%.*s\": entry %llu of its "
                            "table is out of range", io->name,
                            (int)entry->name_size, entry->name,
                            (unsigned long long)(first + i));
        }
    }
    return 0;
}

int qlb_bitmap_table_read(struct qlb_blkio *io,
                          const struct qlb_qcow2_header *header,
                          const struct qlb_bitmap_entry *entry,
                          uint64_t **table, struct qlb_error *err)
{
    *table = NULL;
    if (!qlb_bitmap_size_possible(header, entry->granularity_bits) ||
        entry->table_entries !=
            qlb_bitmap_table_entries(header, entry->granularity_bits) ||
        !qlb_bitmap_table_in_range(io, header, entry)) {
        return damaged(io, "a table is out of range", err);
    }
    *table = malloc(entry->table_entries * sizeof(**table));
    if (*table == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", io->name);
    }
    if (read_entries(io, header, entry, 0, entry->table_entries, *table,
                     err) < 0) {
        free(*table);
        *table = NULL;
        return -1;
    }
    return 0;
}

int qlb_bitmap_table_write(struct qlb_blkio *io,
                           const struct qlb_qcow2_header *header,
                           const uint64_t *table, uint32_t entries,
                           uint64_t offset, struct qlb_error *err)
{
    size_t bytes = round_up(entries * UINT64_C(8), header->cluster_size);
    uint8_t *buf = calloc(1, bytes);
    int ret;

    if (buf == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", io->name);
    }
    for (uint32_t i = 0; i < entries; i++) {
        put_be64(buf + i * UINT64_C(8), table[i]);
    }
    ret = qlb_blkio_write(io, buf, bytes, offset, err);
    free(buf);
    return ret;
}

static int each_data_cluster(const struct qlb_qcow2_header *header,
                             const uint64_t *table, uint64_t n,
                             qlb_bitmap_cluster_fn *fn, void *opaque,
                             struct qlb_error *err)
{
    for (uint64_t i = 0; i < n; i++) {
        if (table[i] != QLB_BITMAP_ZEROES && table[i] != QLB_BITMAP_ONES) {
            int ret = fn(opaque, table[i], header->cluster_size, err);

            if (ret != 0) {
                return ret;
            }
        }
    }
    return 0;
}

int qlb_bitmap_each_cluster(struct qlb_blkio *io,
                            const struct qlb_qcow2_header *header,
                            const struct qlb_bitmap_entry *entry,
                            qlb_bitmap_cluster_fn *fn, void *opaque,
                            struct qlb_error *err)
{
    uint64_t bytes = entry->table_entries * UINT64_C(8);
    uint64_t *table;
    int ret;

    if (!qlb_bitmap_table_in_range(io, header, entry)) {
        return damaged(io, "a table is out of range", err);
    }
    ret = fn(opaque, entry->table_offset,
             round_up(bytes, header->cluster_size), err);
    if (ret != 0) {
        return ret;
    }
    table = malloc(TABLE_CHUNK * sizeof(*table));
    if (table == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", io->name);
    }
    for (uint64_t i = 0; i < entry->table_entries && ret == 0;
         i += TABLE_CHUNK) {
        uint64_t n = min_u64(entry->table_entries - i, TABLE_CHUNK);

        ret = read_entries(io, header, entry, i, n, table, err);
        if (ret == 0) {
            ret = each_data_cluster(header, table, n, fn, opaque, err);
        }
    }
    free(table);
    return ret;
}

/* ---- data ---- */

int qlb_bitmap_read_bit(struct qlb_blkio *io,
                        const struct qlb_qcow2_header *header,
                        const uint64_t *table, uint64_t bit, bool *value,
                        struct qlb_error *err)
{
    uint64_t per_cluster = header->cluster_size * 8;
    uint64_t entry = table[bit / per_cluster];
    uint64_t at = bit % per_cluster;
    uint8_t byte;

    if (entry == QLB_BITMAP_ZEROES || entry == QLB_BITMAP_ONES) {
        *value = entry == QLB_BITMAP_ONES;
        return 0;
    }
    if (qlb_blkio_read_padded(io, &byte, 1, entry + at / 8, err) < 0) {
        return -1;
    }
    *value = qlb_bit_test(&byte, at % 8);
    return 0;
}

int qlb_bitmap_or_cluster(struct qlb_blkio *io,
                          const struct qlb_qcow2_header *header,
                          uint64_t table_entry, uint8_t *data, uint8_t *work,
                          struct qlb_error *err)
{
    if (table_entry == QLB_BITMAP_ZEROES) {
        return 0;
    }
    if (table_entry == QLB_BITMAP_ONES) {
        memset(data, 0xff, header->cluster_size);
        return 0;
    }
    if (qlb_blkio_read_padded(io, work, header->cluster_size, table_entry,
                              err) < 0) {
        return -1;
    }
    qlb_bits_or(data, work, header->cluster_size);
    return 0;
}
