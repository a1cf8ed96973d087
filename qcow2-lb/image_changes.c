/* What changed since a checkpoint: the OR of bitmaps, piece by piece.
 *
 * A piece is what one cluster of bitmap data describes (32 GiB of disk, with
 * clusters and granules of 64 KiB).  The tables are in memory, the data of one
 * piece is: so memory does not grow with the disk, and pieces that no bitmap
 * has a cluster for cost a look at the tables.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap.h"
#include "checked.h"
#include "image_state.h"

#define NO_PIECE UINT64_MAX

struct qlb_changes {
    struct qlb_image *image;
    unsigned granularity_bits;
    unsigned n;              /* bitmaps */
    uint64_t *tables[QLB_MAX_CHECKPOINTS];
    uint64_t bits_per_piece;
    uint64_t size;           /* bytes of the disk */
    uint64_t growth;         /* from here on everything has changed */
    uint64_t n_bits;         /* bits that count: those below growth */
    uint64_t piece;          /* the one in data; NO_PIECE: none */
    uint8_t *data, *work;    /* one cluster each */
};

static void set_growth_above(struct qlb_changes *changes, uint64_t smallest)
{
    uint64_t granule = UINT64_C(1) << changes->granularity_bits;

    changes->growth = changes->size;
    if (smallest < changes->size) {
        /* The granule that holds the old end is partly new. */
        changes->growth = round_down(smallest, granule);
    }
    changes->n_bits = div_round_up(changes->growth, granule);
}

/* What lies above the size of any of the checkpoints has changed: that of a
 * later one counts too, since the disk was cut there after the earlier. */
static void set_growth(struct qlb_changes *changes, unsigned since)
{
    const struct qlb_ext *ext = &changes->image->ext;
    uint64_t smallest = changes->size;

    for (unsigned i = since; i < ext->n_checkpoints; i++) {
        smallest = min_u64(smallest, ext->checkpoints[i].virtual_size);
    }
    set_growth_above(changes, smallest);
}

static int load_tables(struct qlb_changes *changes, unsigned since,
                       unsigned until, struct qlb_error *err)
{
    struct qlb_image *image = changes->image;

    for (unsigned i = since; i < until; i++) {
        if (!image->bitmaps[i].seen.present) {
            return qlb_fail(err, QLB_E_DAMAGED, "%s: %s", image->io->name,
                            qlb_trust_reason(QLB_TRUST_BITMAP_MISSING));
        }
        if (qlb_bitmap_table_read(image->io, image->header,
                                  &image->bitmaps[i].entry,
                                  &changes->tables[changes->n], err) < 0) {
            return -1;
        }
        changes->n++;
    }
    return 0;
}

/* Of no bitmap yet. */
static struct qlb_changes *changes_empty(struct qlb_image *image,
                                         unsigned granularity_bits,
                                         struct qlb_error *err)
{
    struct qlb_changes *changes = calloc(1, sizeof(*changes));
    uint64_t cluster_size = image->header->cluster_size;

    if (changes == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", image->io->name);
        return NULL;
    }
    changes->image = image;
    changes->granularity_bits = granularity_bits;
    changes->bits_per_piece = cluster_size * 8;
    changes->size = image->header->virtual_size;
    changes->piece = NO_PIECE;
    changes->data = malloc(cluster_size);
    changes->work = malloc(cluster_size);
    if (changes->data == NULL || changes->work == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", image->io->name);
        qlb_changes_free(changes);
        return NULL;
    }
    return changes;
}

static struct qlb_changes *changes_new(struct qlb_image *image,
                                       unsigned since, unsigned until,
                                       struct qlb_error *err)
{
    struct qlb_changes *changes =
        changes_empty(image, image->ext.granularity_bits, err);

    if (changes == NULL) {
        return NULL;
    }
    set_growth(changes, since);
    if (load_tables(changes, since, until, err) < 0) {
        qlb_changes_free(changes);
        return NULL;
    }
    return changes;
}

struct qlb_changes *qlb_image_changes(struct qlb_image *image, unsigned i,
                                      struct qlb_error *err)
{
    return qlb_image_changes_between(image, i, image->ext.n_checkpoints, err);
}

struct qlb_changes *qlb_image_changes_between(struct qlb_image *image,
                                              unsigned i, unsigned until,
                                              struct qlb_error *err)
{
    enum qlb_trust trust = qlb_image_trust_between(image, i, until);

    if (trust != QLB_TRUSTED) {
        qlb_image_fail_trust(image, trust, err);
        return NULL;
    }
    return changes_new(image, i, until, err);
}

/* ---- bitmaps of other programs ---- */

static bool records(const struct qlb_bitmap_entry *entry)
{
    return entry->type == QLB_BITMAP_TYPE_DIRTY &&
           (entry->flags & QLB_BITMAP_AUTO) != 0 &&
           (entry->flags & QLB_BITMAP_IN_USE) == 0;
}

void qlb_image_each_bitmap(const struct qlb_image *image,
                           void (*fn)(void *opaque, const char *name),
                           void *opaque)
{
    struct qlb_bitmap_entry entry;
    size_t position = 0;

    if (image->directory_state != QLB_DIRECTORY_GOOD) {
        return;
    }
    while (qlb_bitmap_directory_next(&image->directory, &position, &entry)) {
        char *name = records(&entry) ? strndup(entry.name, entry.name_size)
                                     : NULL;

        if (name != NULL) {
            fn(opaque, name);
        }
        free(name);
    }
}

static int find_entry(const struct qlb_image *image, const char *name,
                      struct qlb_bitmap_entry *entry, struct qlb_error *err)
{
    size_t position = 0, len = strlen(name);

    if (image->directory_state == QLB_DIRECTORY_STALE) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "a program that knows nothing "
                        "of bitmaps has written to the image");
    }
    if (image->directory_state == QLB_DIRECTORY_DAMAGED ||
        image->directory_state == QLB_DIRECTORY_UNREADABLE) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s",
                        image->directory_error.message);
    }
    while (image->directory_state == QLB_DIRECTORY_GOOD &&
           qlb_bitmap_directory_next(&image->directory, &position, entry)) {
        if (entry->name_size != len || memcmp(entry->name, name, len) != 0) {
            continue;
        }
        if (records(entry)) {
            return 0;
        }
        return qlb_fail(err, QLB_E_UNTRUSTED, "the bitmap %s %s", name,
                        entry->flags & QLB_BITMAP_IN_USE
                            ? "was in use when its QEMU was killed"
                            : "does not record");
    }
    return qlb_fail(err, QLB_E_UNTRUSTED, "the image has no bitmap %s", name);
}

/* The table is the changes' own. */
static int check_canaries(const struct qlb_changes *changes,
                          uint64_t since_size, struct qlb_error *err)
{
    const struct qlb_image *image = changes->image;
    uint64_t last = qlb_canary_last(since_size, changes->size,
                                    changes->granularity_bits);
    bool first_set, last_set;

    if (qlb_bitmap_read_bit(image->io, image->header, changes->tables[0], 0,
                            &first_set, err) < 0 ||
        qlb_bitmap_read_bit(image->io, image->header, changes->tables[0],
                            last, &last_set, err) < 0) {
        return -1;
    }
    return first_set && last_set && changes->size >= since_size
               ? 0
               : qlb_fail(err, QLB_E_UNTRUSTED, "the disk was shrunk since, "
                          "or its bitmap cleared");
}

struct qlb_changes *qlb_image_named_changes(struct qlb_image *image,
                                            const char *name,
                                            uint64_t since_size,
                                            struct qlb_error *err)
{
    struct qlb_bitmap_entry entry;
    struct qlb_changes *changes;

    if (image->seen.dirty) {
        qlb_fail(err, QLB_E_UNTRUSTED, "the image was not closed (dirty)");
        return NULL;
    }
    if (find_entry(image, name, &entry, err) < 0) {
        return NULL;
    }
    changes = changes_empty(image, entry.granularity_bits, err);
    if (changes == NULL) {
        return NULL;
    }
    set_growth_above(changes, min_u64(since_size, changes->size));
    if (qlb_bitmap_table_read(image->io, image->header, &entry,
                              &changes->tables[0], err) < 0) {
        qlb_changes_free(changes);
        return NULL;
    }
    changes->n = 1;
    if (check_canaries(changes, since_size, err) < 0) {
        qlb_changes_free(changes);
        return NULL;
    }
    return changes;
}

void qlb_changes_free(struct qlb_changes *changes)
{
    if (changes == NULL) {
        return;
    }
    for (unsigned i = 0; i < changes->n; i++) {
        free(changes->tables[i]);
    }
    free(changes->data);
    free(changes->work);
    free(changes);
}

static bool piece_is_clean(const struct qlb_changes *changes, uint64_t piece)
{
    for (unsigned i = 0; i < changes->n; i++) {
        if (changes->tables[i][piece] != QLB_BITMAP_ZEROES) {
            return false;
        }
    }
    return true;
}

static int load_piece(struct qlb_changes *changes, uint64_t piece,
                      struct qlb_error *err)
{
    const struct qlb_qcow2_header *header = changes->image->header;

    if (changes->piece == piece) {
        return 0;
    }
    changes->piece = NO_PIECE;
    memset(changes->data, 0, header->cluster_size);
    for (unsigned i = 0; i < changes->n; i++) {
        if (qlb_bitmap_or_cluster(changes->image->io, header,
                                  changes->tables[i][piece], changes->data,
                                  changes->work, err) < 0) {
            return -1;
        }
    }
    changes->piece = piece;
    return 0;
}

/* The first run of set bits at or after `bit`, up to the end of its piece;
 * *end is *start where there is none. */
static int next_run(struct qlb_changes *changes, uint64_t bit,
                    uint64_t *start, uint64_t *end, struct qlb_error *err)
{
    *start = *end = changes->n_bits;
    while (bit < changes->n_bits) {
        uint64_t piece = bit / changes->bits_per_piece;
        uint64_t base = piece * changes->bits_per_piece;
        uint64_t here = min_u64(changes->bits_per_piece,
                                changes->n_bits - base);
        uint64_t found;

        if (piece_is_clean(changes, piece)) {
            bit = base + here;
            continue;
        }
        if (load_piece(changes, piece, err) < 0) {
            return -1;
        }
        found = qlb_bits_next_set(changes->data, here, bit - base);
        if (found < here) {
            *start = base + found;
            *end = base + qlb_bits_next_clear(changes->data, here, found);
            return 0;
        }
        bit = base + here;
    }
    return 0;
}

int qlb_changes_next(struct qlb_changes *changes, uint64_t offset,
                     uint64_t *start, uint64_t *length,
                     struct qlb_error *err)
{
    uint64_t first, end;

    *start = changes->size;
    *length = 0;
    if (offset >= changes->size) {
        return 0;
    }
    if (next_run(changes, offset >> changes->granularity_bits, &first, &end,
                 err) < 0) {
        return -1;
    }
    if (first < end) {
        *start = max_u64(first << changes->granularity_bits, offset);
        *length = min_u64(end << changes->granularity_bits, changes->size) -
                  *start;
    } else if (changes->growth < changes->size) {
        *start = max_u64(changes->growth, offset);
        *length = changes->size - *start;
    }
    return 0;
}

int qlb_changes_bytes(struct qlb_changes *changes, uint64_t *bytes,
                      struct qlb_error *err)
{
    uint64_t offset = 0, length;

    *bytes = 0;
    do {
        if (qlb_changes_next(changes, offset, &offset, &length, err) < 0) {
            return -1;
        }
        *bytes += length;
        offset += length;
    } while (length > 0);
    return 0;
}

int qlb_image_changed_bytes(struct qlb_image *image, unsigned i,
                            uint64_t *bytes, struct qlb_error *err)
{
    struct qlb_changes *changes;
    int ret;

    *bytes = 0;
    if (i >= image->ext.n_checkpoints) {
        return 0;
    }
    changes = changes_new(image, i, image->ext.n_checkpoints, err);
    if (changes == NULL) {
        return err->code == QLB_E_DAMAGED ? 0 : -1;
    }
    ret = qlb_changes_bytes(changes, bytes, err);
    qlb_changes_free(changes);
    return ret;
}
