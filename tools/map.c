/* What has changed since a checkpoint, for other programs: docs/recovery.md
 * tells the form.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "map.h"

#include <inttypes.h>

struct map {
    struct qlb_changes *changes;
    struct qlb_disk_reader *reader;
    json_t *extents;
    uint64_t start, end; /* of the extent that is not yet in the list */
    enum qlb_extent_type type;
};

static void finish_extent(struct map *m)
{
    bool zero = m->type == QLB_EXTENT_ZERO;

    if (m->end > m->start) {
        json_array_append_new(m->extents,
            json_pack("{s:I, s:I, s:s}", "start", (json_int_t)m->start,
                      "length", (json_int_t)(m->end - m->start),
                      "type", zero ? "zero" : "data"));
    }
}

/* All that is not known to read as zeroes is data. */
static int add_range(struct map *m, uint64_t offset, uint64_t length,
                     struct qlb_error *err)
{
    while (length > 0) {
        enum qlb_extent_type type;
        uint64_t run;

        if (qlb_disk_extent(m->reader, offset, length, &type, &run,
                            err) < 0) {
            return -1;
        }
        if (offset != m->end || type != m->type) {
            finish_extent(m);
            m->start = offset;
            m->type = type;
        }
        m->end = offset + run;
        offset += run;
        length -= run;
    }
    return 0;
}

static int collect(struct map *m, struct qlb_error *err)
{
    uint64_t offset = 0, length;

    do {
        if (qlb_changes_next(m->changes, offset, &offset, &length, err) < 0 ||
            add_range(m, offset, length, err) < 0) {
            return -1;
        }
        offset += length;
    } while (length > 0);
    finish_extent(m);
    return 0;
}

static int print_map(const struct imagedump *disk, struct map *m)
{
    const struct qlb_ext *ext = qlb_image_ext(disk->image);
    const struct qlb_checkpoint *since = &ext->checkpoints[disk->since_index];
    json_t *map = json_object();

    json_object_set_new(map, "disk", json_string(disk->path));
    json_object_set_new(map, "image_uuid", tool_json_uuid(&ext->image_uuid));
    json_object_set_new(map, "since", tool_json_uuid(&since->uuid));
    json_object_set_new(map, "since_size",
                        json_integer((json_int_t)since->virtual_size));
    json_object_set_new(map, "virtual_size",
        json_integer((json_int_t)qlb_disk_size(disk->disk)));
    json_object_set(map, "extents", m->extents);
    return tool_print_json(map, false);
}

int map_print(struct imagedump *disk, struct qlb_error *err)
{
    struct map m = { .extents = json_array() };
    int ret = -1;

    disk->copy = true;
    if (imagedump_open(disk, err) == 0) {
        m.changes = qlb_image_changes(disk->image, disk->since_index, err);
        m.reader = m.changes == NULL ? NULL
                                     : qlb_disk_reader_new(disk->disk, err);
    }
    if (m.reader != NULL && collect(&m, err) == 0) {
        ret = print_map(disk, &m);
        if (ret < 0) {
            qlb_fail(err, QLB_E_RUNTIME, "the map could not be printed");
        }
    }
    json_decref(m.extents);
    qlb_disk_reader_free(m.reader);
    qlb_changes_free(m.changes);
    return ret;
}
