/* The bitmap of a disk held against the digests of its archives.
 *
 * The newest archive has a checkpoint in the image: what the bitmaps since then
 * call clean must have the digests of the archives. What they call changed may
 * be anything.
 *
 * Of a share, each stripe is taken or not by a hash of the seed and its number,
 * so that a seed gives the same stripes again.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "audit.h"

#include <inttypes.h>

enum { MAX_PRINTED = 20 };

struct audit {
    const struct audit_options *options;
    struct rescan rescan; /* its set: blocks that the bitmaps call changed */
    struct qlb_image *image;
    uint64_t start, end;  /* of the range not yet printed */
    uint64_t missed;      /* blocks */
    unsigned printed;
};

static void print_range(struct audit *a)
{
    if (a->end > a->start && a->printed++ < MAX_PRINTED) {
        tool_message("%s: ALARM: changed, but not tracked: 0x%" PRIx64 "-0x%"
                     PRIx64, a->options->path, a->start, a->end - 1);
    }
}

static int block_differs(void *opaque, uint64_t offset, struct qlb_error *err)
{
    struct audit *a = opaque;

    (void)err;
    if (block_set_has(&a->rescan.set, offset)) {
        return 0;
    }
    a->missed++;
    if (offset != a->end || a->end == 0) {
        print_range(a);
        a->start = offset;
    }
    a->end = offset + QLB_LBZ_BLOCK;
    return 0;
}

/* splitmix64 of the stripe's number, from the seed on. */
static bool is_in_share(void *opaque, uint64_t offset)
{
    const struct audit *a = opaque;
    uint64_t z = a->options->seed +
                 (offset / QLB_LBZ_STRIPE + 1) * UINT64_C(0x9e3779b97f4a7c15);

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (z ^ (z >> 31)) % 100 < a->options->share;
}

/* The index of the checkpoint of the newest archive, or -1. */
static int find_checkpoint(const struct audit *a, struct qlb_error *err)
{
    const struct qlb_lbz_header *header = qlb_chain_header(a->rescan.chain);
    char text[QLB_UUID_TEXT];
    int i = qlb_ext_find(qlb_image_ext(a->image), &header->uuid);

    if (i < 0) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s: the image has no "
                        "checkpoint %s, that of the newest archive",
                        a->options->path,
                        qlb_uuid_format(&header->uuid, text));
    }
    return i;
}

/* All that the bitmaps call changed; and the block that the disk was cut in,
 * which every incremental holds. */
static int list_changes(struct audit *a, unsigned since,
                        struct qlb_error *err)
{
    uint64_t size = qlb_disk_size(qlb_image_disk(a->image));
    int ret = block_set_add_changes(&a->rescan.set, a->image, since, err);

    if (ret == 0 && size % QLB_LBZ_BLOCK != 0 &&
        qlb_chain_header(a->rescan.chain)->virtual_size > size) {
        ret = block_set_add(&a->rescan.set, size, 1, err);
    }
    return ret;
}

static int compare(struct audit *a, struct qlb_error *err)
{
    const struct audit_options *o = a->options;
    const struct qlb_disk *disk = qlb_image_disk(a->image);
    struct compare_options options = {
        .threads = o->threads,
        .progress = o->progress,
        .differs = block_differs,
        .wanted = o->share < 100 ? is_in_share : NULL,
        .opaque = a,
    };
    uint64_t blocks;
    int ret;

    if (o->share < 100 && !o->quiet) {
        tool_message("%s: looking at %u%%, --seed=%" PRIu64, o->path,
                     o->share, o->seed);
    }
    ret = compare_open_disk(a->rescan.chain, disk, o->path,
                            qlb_disk_size(disk), &options, &blocks, err);
    print_range(a);
    return ret;
}

static int run(struct audit *a, struct qlb_error *err)
{
    int since;

    a->image = qlb_image_open(a->options->path, 0, err);
    if (a->image == NULL || rescan_open(&a->rescan, err) < 0 ||
        compare_check_identity(a->rescan.chain, qlb_image_ext(a->image),
                               a->options->path, err) < 0) {
        return -1;
    }
    since = find_checkpoint(a, err);
    if (since < 0 || list_changes(a, (unsigned)since, err) < 0) {
        return -1;
    }
    return compare(a, err);
}

int audit(const struct audit_options *options)
{
    struct audit a = {
        .options = options,
        .rescan = { .inputs = options->inputs,
                    .n_inputs = options->n_inputs },
    };
    struct qlb_error err;
    int status = 0;

    if (run(&a, &err) < 0) {
        status = tool_fail(rescan_is_named(&a.rescan, &err) ? NULL
                                                            : options->path,
                           &err);
    }
    if (a.missed > 0) {
        tool_message("%s: ALARM: %" PRIu64 " blocks of 64 KiB have changed "
                     "and were not tracked: the incrementals since the newest "
                     "archive lack them; make a full dump, or use --rescan",
                     options->path, a.missed);
        status = AUDIT_ALARM;
    }
    rescan_close(&a.rescan);
    qlb_image_close(a.image);
    return status;
}
