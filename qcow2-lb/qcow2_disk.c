/* Opening a disk: the image, its external data file, and its backing chain.
 *
 * Nothing is guessed: a backing file is opened in the format that the image
 * records.  Names are taken as QEMU takes them (a relative name is relative
 * to the folder of the file that records it; "file:" in front is dropped),
 * but only those of files: other protocols are refused by name.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "qcow2_layer.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "checked.h"
#include "cleanup.h"

int qlb_error_suffix(struct qlb_error *err, const char *fmt, ...)
{
    size_t used = strlen(err->message);
    char text[512];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    snprintf(err->message + used, sizeof(err->message) - used, " (%s)", text);
    return -1;
}

/* ---- names ---- */

/* Length of the protocol in front of a colon; 0 if there is none. A colon
 * behind a slash is part of a path. */
static size_t protocol_length(const char *name)
{
    size_t n = strcspn(name, ":/");

    return name[n] == ':' ? n : 0;
}

/* The path of a file that `base` names; owned by the caller. */
static char *resolve_name(const char *base, const char *name,
                          const char *what, struct qlb_error *err)
{
    size_t protocol = protocol_length(name);
    const char *slash = strrchr(base, '/');
    char *path;

    if (strncmp(name, "file:", 5) == 0) {
        /* As in QEMU, what follows is a path as it stands, relative to the
         * working directory. */
        path = strdup(name + 5);
    } else if (protocol > 0 || name[0] == ':') {
        qlb_fail(err, QLB_E_RUNTIME, "%s: %s '%s': the protocol '%.*s' is "
                 "not supported", base, what, name,
                 (int)min_u64(protocol, 64), name);
        return NULL;
    } else if (name[0] == '/' || slash == NULL) {
        path = strdup(name);
    } else {
        size_t folder = (size_t)(slash - base) + 1;
        size_t length = strlen(name) + 1;

        path = malloc(folder + length);
        if (path != NULL) {
            memcpy(path, base, folder);
            memcpy(path + folder, name, length);
        }
    }
    if (path == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", base);
    }
    return path;
}

/* ---- layers ---- */

static void set_geometry(struct qlb_layer *layer)
{
    const struct qlb_qcow2_header *h = layer->header;

    if (h == NULL) {
        layer->size = layer->io->size;
        return;
    }
    layer->size = h->virtual_size;
    layer->cluster_bits = h->cluster_bits;
    layer->entry_bits = h->extended_l2 ? 4 : 3;
    layer->sub_bits = h->cluster_bits - (h->extended_l2 ? 5 : 0);
    layer->l2_bits = layer->cluster_bits - layer->entry_bits;
    layer->slice_bits = layer->cluster_bits < QLB_SLICE_BITS
                            ? layer->cluster_bits : QLB_SLICE_BITS;
}

static bool is_known(const struct qlb_disk *disk, struct qlb_file_id id)
{
    for (unsigned i = 0; i < disk->n_layers; i++) {
        const struct qlb_layer *layer = &disk->layers[i];

        for (unsigned k = 0; k < layer->n_ids; k++) {
            if (layer->id[k].device == id.device &&
                layer->id[k].inode == id.inode) {
                return true;
            }
        }
    }
    return false;
}

static struct qlb_file_id id_of(const struct stat *st)
{
    struct qlb_file_id id = { .device = st->st_dev, .inode = st->st_ino };

    if (S_ISBLK(st->st_mode)) {
        /* The same device behind another node. No file has inode 0. */
        id.device = st->st_rdev;
        id.inode = 0;
    }
    return id;
}

/* Every file of the chain has one place in it: a loop would never end, and a
 * file that is both metadata and data, or twice in the chain, is a mistake. */
static int check_new(const struct qlb_disk *disk, const char *name,
                     const struct stat *st, struct qlb_error *err)
{
    if (is_known(disk, id_of(st))) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: appears twice in the backing "
                        "chain of %s", name, disk->layers[0].path);
    }
    return 0;
}

static int note_file(struct qlb_disk *disk, struct qlb_layer *layer,
                     const struct qlb_blkio *io, struct qlb_error *err)
{
    struct stat st;

    if (io->fd < 0) {
        return 0;
    }
    if (fstat(io->fd, &st) < 0) {
        return qlb_fail_errno(err, errno, "%s", io->name);
    }
    if (check_new(disk, io->name, &st, err) < 0) {
        return -1;
    }
    layer->id[layer->n_ids++] = id_of(&st);
    return 0;
}

/* A file that is known already may be locked by this very process, which must
 * not look like another one that uses it. */
static struct qlb_blkio *open_new_file(const struct qlb_disk *disk,
                                       const char *path,
                                       struct qlb_error *err)
{
    struct stat st;
    unsigned flags = disk->flags & QLB_DISK_LOCK ? QLB_BLKIO_LOCK : 0;

    if (stat(path, &st) == 0 && check_new(disk, path, &st, err) < 0) {
        return NULL;
    }
    /* The first layer is in the list when its files are opened. */
    if (disk->n_layers == 1 && (disk->flags & QLB_DISK_DIRECT)) {
        flags |= QLB_BLKIO_DIRECT;
    }
    return qlb_blkio_open(path, flags, err);
}

/* QEMU takes a relative data file name as relative to its own working
 * directory, people as relative to the image (the name is the image's). The
 * one that is there is taken; where both are, and are not the same file,
 * nobody knows which is meant. */
static char *data_file_path(const struct qlb_layer *layer,
                            struct qlb_error *err)
{
    const char *name = layer->header->data_file;
    char *path = resolve_name(layer->path, name, "data file", err);
    struct stat there, here;

    if (path == NULL || name[0] == '/' || stat(name, &here) < 0) {
        return path;
    }
    if (stat(path, &there) < 0) {
        free(path);
        path = strdup(name);
        if (path == NULL) {
            qlb_fail_errno(err, ENOMEM, "%s", layer->path);
        }
    } else if (here.st_dev != there.st_dev || here.st_ino != there.st_ino) {
        free(path);
        path = NULL;
        qlb_fail(err, QLB_E_RUNTIME, "%s: the data file name '%s' is "
                 "relative, and means one file in the image's folder and "
                 "another in the working directory; change to the folder that "
                 "QEMU runs in", layer->path, name);
    }
    return path;
}

static int open_data_file(struct qlb_disk *disk, struct qlb_layer *layer,
                          struct qlb_error *err)
{
    char *path QLB_AUTO_FREE = data_file_path(layer, err);

    if (path == NULL) {
        return -1;
    }
    layer->data = open_new_file(disk, path, err);
    if (layer->data == NULL) {
        return qlb_error_suffix(err, "the data file of %s", layer->path);
    }
    return note_file(disk, layer, layer->data, err);
}

/* A new last layer; it is in the list, and released with it, even where
 * opening it then fails. */
static struct qlb_layer *add_layer(struct qlb_disk *disk, const char *path,
                                   struct qlb_error *err)
{
    struct qlb_layer *layers;

    layers = realloc(disk->layers, (disk->n_layers + 1) * sizeof(*layers));
    if (layers == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", path);
        return NULL;
    }
    disk->layers = layers;
    layers += disk->n_layers;
    memset(layers, 0, sizeof(*layers));
    layers->path = strdup(path);
    if (layers->path == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", path);
        return NULL;
    }
    disk->n_layers++;
    return layers;
}

/* io and header: the caller's, or NULL. */
static int open_layer(struct qlb_disk *disk, const char *path, bool raw,
                      struct qlb_blkio *io,
                      const struct qlb_qcow2_header *header,
                      struct qlb_error *err)
{
    struct qlb_layer *layer = add_layer(disk, path, err);

    if (layer == NULL) {
        return -1;
    }
    layer->borrowed = io != NULL;
    layer->io = io;
    layer->header = header;
    if (io == NULL) {
        layer->io = open_new_file(disk, path, err);
        if (layer->io == NULL) {
            return -1;
        }
    }
    layer->data = layer->io;
    if (note_file(disk, layer, layer->io, err) < 0) {
        return -1;
    }
    if (header == NULL && !raw) {
        layer->header = qlb_qcow2_header_read(layer->io, true, err);
        if (layer->header == NULL) {
            return -1;
        }
    }
    set_geometry(layer);
    if (layer->header != NULL && layer->header->data_file != NULL) {
        return open_data_file(disk, layer, err);
    }
    return 0;
}

static int check_backing_format(const struct qlb_layer *layer,
                                struct qlb_error *err)
{
    const struct qlb_qcow2_header *h = layer->header;

    if (h->backing_format == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the backing file '%s' has no "
                        "recorded format; record it with: qemu-img rebase -u "
                        "-F FORMAT -b %s %s", layer->path, h->backing_name,
                        h->backing_name, layer->path);
    }
    if (strcmp(h->backing_format, "qcow2") != 0 &&
        strcmp(h->backing_format, "raw") != 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: the backing file '%s' has "
                        "the format '%s', which is not supported",
                        layer->path, h->backing_name, h->backing_format);
    }
    return 0;
}

static int open_backing_chain(struct qlb_disk *disk, struct qlb_error *err)
{
    for (;;) {
        const struct qlb_layer *last = &disk->layers[disk->n_layers - 1];
        const struct qlb_qcow2_header *h = last->header;
        char *owner QLB_AUTO_FREE = NULL;
        char *path QLB_AUTO_FREE = NULL;
        bool raw;

        if (h == NULL || h->backing_name == NULL) {
            return 0;
        }
        if (disk->n_layers == QLB_MAX_CHAIN) {
            return qlb_fail(err, QLB_E_RUNTIME, "%s: the backing chain is "
                            "longer than %d files", disk->layers[0].path,
                            QLB_MAX_CHAIN);
        }
        if (check_backing_format(last, err) < 0) {
            return -1;
        }
        raw = strcmp(h->backing_format, "raw") == 0;
        path = resolve_name(last->path, h->backing_name, "backing file", err);
        owner = strdup(last->path); /* adding a layer moves the list */
        if (path == NULL || owner == NULL) {
            return path ? qlb_fail_errno(err, ENOMEM, "%s", path) : -1;
        }
        if (open_layer(disk, path, raw, NULL, NULL, err) < 0) {
            return qlb_error_suffix(err, "in the backing chain, named by %s",
                                    owner);
        }
    }
}

static struct qlb_disk *disk_open(const char *path, struct qlb_blkio *io,
                                  const struct qlb_qcow2_header *header,
                                  unsigned flags, struct qlb_error *err)
{
    struct qlb_disk *disk = calloc(1, sizeof(*disk));

    if (disk == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", path);
        return NULL;
    }
    disk->flags = flags;
    if (open_layer(disk, path, flags & QLB_DISK_RAW, io, header, err) < 0 ||
        (!(flags & QLB_DISK_NO_BACKING) &&
         open_backing_chain(disk, err) < 0)) {
        qlb_disk_close(disk);
        return NULL;
    }
    return disk;
}

struct qlb_disk *qlb_disk_open(const char *path, unsigned flags,
                               struct qlb_error *err)
{
    return disk_open(path, NULL, NULL, flags, err);
}

struct qlb_disk *qlb_disk_open_io(const char *path, struct qlb_blkio *io,
                                  const struct qlb_qcow2_header *header,
                                  unsigned flags, struct qlb_error *err)
{
    return disk_open(path, io, header, flags, err);
}

void qlb_disk_close(struct qlb_disk *disk)
{
    if (disk == NULL) {
        return;
    }
    for (unsigned i = 0; i < disk->n_layers; i++) {
        struct qlb_layer *layer = &disk->layers[i];

        if (layer->data != layer->io) {
            qlb_blkio_close(layer->data);
        }
        if (!layer->borrowed) {
            qlb_blkio_close(layer->io);
            qlb_qcow2_header_free((struct qlb_qcow2_header *)layer->header);
        }
        free(layer->path);
    }
    free(disk->layers);
    free(disk);
}

uint64_t qlb_disk_size(const struct qlb_disk *disk)
{
    return disk->layers[0].size;
}

/* A cluster of 2 MiB compresses to some 70 bytes at the best. */
#define BEST_RATIO 32768

uint64_t qlb_disk_content_limit(const struct qlb_disk *disk)
{
    uint64_t limit = 0;

    for (unsigned i = 0; i < disk->n_layers; i++) {
        const struct qlb_layer *layer = &disk->layers[i];
        uint64_t size = max_u64(layer->io->size, layer->data->size);

        if (!checked_mul(size, BEST_RATIO, &size) ||
            !checked_add(limit, size, &limit)) {
            return UINT64_MAX;
        }
    }
    return limit;
}

const char *qlb_disk_backing_path(const struct qlb_disk *disk)
{
    return disk->n_layers > 1 ? disk->layers[1].path : NULL;
}

const struct qlb_qcow2_header *qlb_disk_header(const struct qlb_disk *disk)
{
    return disk->layers[0].header;
}

/* ---- what trust is made of ---- */

bool qlb_disk_backing_stat(const struct qlb_disk *disk, unsigned index,
                           uint64_t *size, uint64_t *mtime)
{
    for (unsigned i = 1; i < disk->n_layers; i++) {
        const struct qlb_layer *layer = &disk->layers[i];
        const struct qlb_blkio *files[2] = { layer->io, layer->data };
        unsigned n = layer->data != layer->io ? 2 : 1;

        if (index < n) {
            *size = files[index]->size;
            *mtime = files[index]->mtime;
            return true;
        }
        index -= n;
    }
    return false;
}

bool qlb_disk_data_file_stat(const struct qlb_disk *disk, uint64_t *size,
                             uint64_t *mtime)
{
    const struct qlb_layer *top = &disk->layers[0];

    if (top->data == top->io) {
        return false;
    }
    *size = top->data->size;
    *mtime = top->data->mtime;
    return true;
}

/* ---- which files it is ---- */

static bool same_file(const struct qlb_blkio *io, const struct stat *st)
{
    struct stat own;

    if (io->fd < 0 || fstat(io->fd, &own) < 0) {
        return false;
    }
    if (S_ISBLK(own.st_mode)) {
        return S_ISBLK(st->st_mode) && own.st_rdev == st->st_rdev;
    }
    return own.st_dev == st->st_dev && own.st_ino == st->st_ino;
}

bool qlb_disk_has_file(const struct qlb_disk *disk, const struct stat *st)
{
    for (unsigned i = 0; i < disk->n_layers; i++) {
        const struct qlb_layer *layer = &disk->layers[i];

        if (same_file(layer->io, st) || same_file(layer->data, st)) {
            return true;
        }
    }
    return false;
}
