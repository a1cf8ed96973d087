/* A stopped machine: its images.
 *
 * All images are open, with the writer's locks, from the point in time until
 * the end: no QEMU can start the machine meanwhile.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "imagedump.h"
#include "vm/source.h"
#include "vm/stock_disks.h"

struct images {
    struct source source; /* first */
    char *const *names, *const *paths;
    unsigned n_paths;
    struct imagedump *dumps; /* one for each disk */
    char (*bitmaps)[STOCK_NAME_SIZE]; /* the same: of a stock QEMU */
};

static struct images *images_of(struct source *source)
{
    return (struct images *)source;
}

/* The name of the file without its folder and ".qcow2". */
static char *default_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    char *name = strdup(slash == NULL ? path : slash + 1);
    size_t len = name == NULL ? 0 : strlen(name);

    if (len > 6 && strcmp(name + len - 6, ".qcow2") == 0) {
        name[len - 6] = '\0';
    }
    return name;
}

static int add_image(struct images *images, unsigned i, struct qlb_error *err)
{
    const char *path = images->paths[i];
    char *name = images->names != NULL && images->names[i] != NULL
                     ? strdup(images->names[i]) : default_name(path);
    struct source_disk *disk = NULL;

    if (name != NULL) {
        disk = source_add_disk(&images->source, name, err);
        free(name);
    }
    if (disk == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", path);
    }
    disk->filename = realpath(path, NULL);
    if (disk->filename == NULL) {
        return qlb_fail_errno(err, errno, "%s", path);
    }
    return source_read_image(disk, err);
}

static int images_list(struct source *source, struct qlb_error *err)
{
    struct images *images = images_of(source);

    for (unsigned i = 0; i < images->n_paths; i++) {
        if (add_image(images, i, err) < 0) {
            return -1;
        }
    }
    images->dumps = calloc(images->n_paths, sizeof(*images->dumps));
    images->bitmaps = calloc(images->n_paths, sizeof(*images->bitmaps));
    return images->dumps == NULL || images->bitmaps == NULL
               ? qlb_fail_errno(err, ENOMEM, "%s", images->paths[0]) : 0;
}

static int open_disk(struct images *images, unsigned i,
                     const struct dump_request *request,
                     struct qlb_error *err)
{
    struct source_disk *disk = &images->source.disks[i];
    struct imagedump *dump = &images->dumps[i];
    const char *reason = NULL;

    dump->path = disk->filename;
    dump->request = *request;
    dump->request.mode = qlb_uuid_is_zero(&disk->since) ? DUMP_FULL
                                                        : DUMP_AUTO;
    dump->request.since = disk->since;
    dump->bitmap = stock_bitmap_name(&disk->since, images->bitmaps[i]);
    dump->bitmap_size = disk->since_size;
    dump->image_uuid = disk->image;
    dump->distrust = disk->distrust;
    dump->rescan.inputs = (const char *const *)disk->chain;
    dump->rescan.n_inputs = disk->n_chain;
    dump->set = images->source.set;
    dump->time = images->source.time;
    dump->archive.path = disk->output;
    if (imagedump_open(dump, err) < 0) {
        return -1;
    }
    disk->incremental = dump->incremental;
    disk->rescanned = dump->rescanned;
    if (dump->reason[0] != '\0') {
        reason = dump->reason;
    } else if (!dump->record && !dump->incremental) {
        reason = "livebackup is off; turn it on with 'lbctl enable', and what "
                 "follows is incremental";
    }
    /* It says more than what was found before the image was opened. */
    if (reason != NULL) {
        free(disk->reason);
        disk->reason = strdup(reason);
    }
    return 0;
}

static int images_begin(struct source *source,
                        const struct dump_request *request,
                        struct qlb_error *err)
{
    struct images *images = images_of(source);

    source->set = tool_random_uuid();
    source->time = (uint64_t)time(NULL);
    for (unsigned i = 0; i < source->n_disks; i++) {
        if (open_disk(images, i, request, err) < 0) {
            return qlb_error_prefix(err, "%s", source->disks[i].filename);
        }
    }
    return 0;
}

static int dump_disk(void *opaque, unsigned i,
                     const struct dump_options *options,
                     struct qlb_error *err)
{
    struct images *images = opaque;
    struct source_disk *disk = &images->source.disks[i];
    struct imagedump *dump = &images->dumps[i];

    dump->request.dump = *options;
    if (imagedump_dump(dump, err) < 0 || imagedump_finish(dump, err) < 0) {
        return -1;
    }
    if (disk->rescanned && !dump->rescanned) {
        free(disk->reason);
        disk->reason = strdup(dump->reason);
        disk->rescanned = disk->incremental = false;
        tool_message("%s: a full backup: %s", disk->filename, disk->reason);
    }
    source_take_archive(disk, &dump->archive);
    return 0;
}

static int images_dump(struct source *source,
                       const struct dump_request *request,
                       struct qlb_error *err)
{
    return dump_several(source->n_disks, &request->dump, dump_disk, source,
                        err);
}

static int images_end(struct source *source, bool success,
                      struct qlb_error *err)
{
    struct images *images = images_of(source);

    for (unsigned i = 0; success && i < source->n_disks; i++) {
        if (imagedump_confirm(&images->dumps[i], err) < 0) {
            return -1;
        }
    }
    return 0;
}

static void images_free(struct source *source)
{
    struct images *images = images_of(source);

    for (unsigned i = 0; images->dumps != NULL && i < source->n_disks; i++) {
        imagedump_close(&images->dumps[i]);
    }
    free(images->dumps);
    free(images->bitmaps);
    source_release_disks(source);
    free(images);
}

static const struct source_ops images_ops = {
    .kind = "images",
    .list = images_list,
    .begin = images_begin,
    .dump = images_dump,
    .end = images_end,
    .free = images_free,
};

struct source *source_images_new(char *const *names, char *const *paths,
                                 unsigned n)
{
    struct images *images = calloc(1, sizeof(*images));

    if (images == NULL) {
        return NULL;
    }
    images->source.ops = &images_ops;
    images->names = names;
    images->paths = paths;
    images->n_paths = n;
    return &images->source;
}
