/* A running stock QEMU: dirty bitmaps, fleecing and NBD.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "nbddump.h"
#include "vm/definition.h"
#include "vm/fleece.h"
#include "vm/source.h"
#include "vm/stock_disks.h"

struct stock {
    struct source source; /* first */
    struct qmp *qmp;
    char *const *nodes, *const *names; /* names: NULL: as the nodes */
    unsigned n_nodes;
    const struct nbd_way *way; /* NULL: QEMU is on this host */
    const char *scratch;      /* NULL: beside the first disk's image */
    char *folder;             /* that one */
    struct stock_disk *disks; /* one for each of the source's, as all below */
    struct fleece_disk *plan;
    struct qlb_uuid *checkpoints;
    char (*bitmaps)[2][STOCK_NAME_SIZE]; /* the new one; the parent's */
    struct fleece *fleece;
    const struct dump_request *request;
};

static struct stock *stock_of(struct source *source)
{
    return (struct stock *)source;
}

/* ---- the disks ---- */

/* On another host it can't be looked at. */
static int take_far_scratch(struct stock *stock, struct qlb_error *err)
{
    if (stock->scratch == NULL || *stock->scratch != '/') {
        return qlb_fail(err, QLB_E_USAGE, "--nbd wants --scratch=FOLDER, an "
                        "absolute path on QEMU's host, of a folder that only "
                        "QEMU's user may enter");
    }
    stock->folder = strdup(stock->scratch);
    return stock->folder == NULL
               ? qlb_fail_errno(err, ENOMEM, "%s", stock->scratch) : 0;
}

static int find_scratch(struct stock *stock, struct qlb_error *err)
{
    const char *file = stock->source.disks[0].filename;
    const char *slash = strrchr(file, '/');

    if (stock->way != NULL) {
        return take_far_scratch(stock, err);
    }
    if (stock->scratch != NULL) {
        stock->folder = realpath(stock->scratch, NULL);
    } else if (*file != '/') {
        return qlb_fail(err, QLB_E_USAGE, "%s: QEMU does not tell in which "
                        "folder it is; --scratch=FOLDER is wanted", file);
    } else {
        stock->folder = strndup(file, slash == file ? 1
                                                    : (size_t)(slash - file));
    }
    return stock->folder == NULL
               ? qlb_fail_errno(err, errno, "%s", stock->scratch != NULL
                                                      ? stock->scratch : file)
               : 0;
}

static void forget_disks(struct stock *stock)
{
    struct source *source = &stock->source;
    char *definition = source->definition;

    for (unsigned i = 0; i < source->n_disks; i++) {
        free(stock->disks[i].node);
    }
    free(stock->disks);
    stock->disks = NULL;
    source->definition = NULL;
    source_release_disks(source);
    source->definition = definition;
}

static int find_disks(struct stock *stock, struct qlb_error *err)
{
    if (stock_find_disks(stock->qmp, stock->nodes, stock->names,
                         stock->n_nodes, &stock->source, &stock->disks,
                         err) < 0) {
        return -1;
    }
    return stock_check_threads(stock->qmp, &stock->source, stock->disks, err);
}

/* The scratch folder is by the disks; and what is cleared there may change what
 * bitmaps they have. */
static int stock_list(struct source *source, struct qlb_error *err)
{
    struct stock *stock = stock_of(source);
    bool changed = false;

    if (fleece_clear(stock->qmp, stock->way != NULL, err) < 0 ||
        find_disks(stock, err) < 0 || find_scratch(stock, err) < 0) {
        return -1;
    }
    if (stock->way == NULL &&
        fleece_sweep(stock->qmp, stock->folder, &changed, err) < 0) {
        return -1;
    }
    if (changed) {
        forget_disks(stock);
        if (find_disks(stock, err) < 0) {
            return -1;
        }
    }
    if (source->definition != NULL) {
        return 0;
    }
    source->definition = definition_of_qemu(stock->qmp, err);
    source->definition_type = "json";
    return source->definition == NULL ? -1 : 0;
}

/* ---- the point in time ---- */

static void make_full(struct source_disk *disk, const char *reason)
{
    disk->incremental = false;
    free(disk->reason);
    disk->reason = strdup(reason);
}

static void plan_disk(struct stock *stock, unsigned i)
{
    struct source_disk *disk = &stock->source.disks[i];
    struct fleece_disk *plan = &stock->plan[i];

    stock->checkpoints[i] = tool_random_uuid();
    plan->node = stock->disks[i].node;
    plan->filename = disk->filename;
    plan->size = stock->disks[i].size;
    disk->incremental = !qlb_uuid_is_zero(&disk->since);
    if (disk->incremental && plan->size < disk->since_size) {
        make_full(disk, "the disk was shrunk since");
    }
    if (disk->incremental) {
        plan->changes = stock_bitmap_name(&disk->since, stock->bitmaps[i][1]);
    }
    if (stock->disks[i].can_track) {
        plan->bitmap = stock_bitmap_name(&stock->checkpoints[i],
                                         stock->bitmaps[i][0]);
        disk->bitmap = strdup(plan->bitmap);
    } else {
        make_full(disk, "the image is of an old version (compat=0.10), which "
                  "can't keep dirty bitmaps");
    }
    if (qlb_uuid_is_zero(&disk->image)) {
        disk->image = tool_random_uuid();
    }
}

static int make_plan(struct stock *stock, struct qlb_error *err)
{
    unsigned n = stock->source.n_disks;

    stock->plan = calloc(n, sizeof(*stock->plan));
    stock->checkpoints = calloc(n, sizeof(*stock->checkpoints));
    stock->bitmaps = calloc(n, sizeof(*stock->bitmaps));
    if (stock->plan == NULL || stock->checkpoints == NULL ||
        stock->bitmaps == NULL) {
        return qlb_fail_errno(err, ENOMEM, "planning the backup");
    }
    for (unsigned i = 0; i < n; i++) {
        plan_disk(stock, i);
    }
    return 0;
}

/* Whether the parents' bitmaps tell all. */
static int check_bitmaps(struct stock *stock, struct qlb_error *err)
{
    for (unsigned i = 0; i < stock->source.n_disks; i++) {
        struct source_disk *disk = &stock->source.disks[i];
        bool whole = true;

        if (disk->incremental &&
            fleece_has_canaries(stock->fleece, i, disk->since_size, &whole,
                                err) < 0) {
            return -1;
        }
        if (!whole) {
            make_full(disk, "the disk was shrunk since, or its bitmap "
                      "cleared");
        }
    }
    return 0;
}

static int stock_begin(struct source *source,
                       const struct dump_request *request,
                       struct qlb_error *err)
{
    struct stock *stock = stock_of(source);
    struct qlb_error ignored;

    source->set = tool_random_uuid();
    if (make_plan(stock, err) < 0) {
        return -1;
    }
    stock->fleece = fleece_begin(stock->qmp, stock->way, stock->folder,
                                 stock->plan, source->n_disks, &source->time,
                                 err);
    if (stock->fleece == NULL) {
        return -1;
    }
    if (check_bitmaps(stock, err) < 0) {
        fleece_end(stock->fleece, false, &ignored);
        stock->fleece = NULL;
        return -1;
    }
    return 0;
}

/* ---- the dump ---- */

static int dump_disk(void *opaque, unsigned i,
                     const struct dump_options *options,
                     struct qlb_error *err)
{
    struct stock *stock = opaque;
    struct source_disk *disk = &stock->source.disks[i];
    struct nbddump_options nbd = {
        .bitmap = disk->incremental ? fleece_bitmap(stock->fleece, i) : NULL,
        .uuid = stock->checkpoints[i],
        .image_uuid = disk->image,
        .set = stock->source.set,
        .parent = disk->incremental ? disk->since
                                    : (struct qlb_uuid) { .bytes = { 0 } },
        .parent_size = disk->incremental ? disk->since_size : UINT64_MAX,
        .time = stock->source.time,
    };

    disk->archive.path = disk->output;
    if (nbddump_to(&disk->archive, fleece_uri(stock->fleece, i), &nbd,
                   stock->request, options, err) < 0) {
        return tool_names(err, disk->output)
                   ? -1 : qlb_error_prefix(err, "%s", disk->filename);
    }
    return 0;
}

/* The jobs have run until all was read: it is the point in time. */
static int stock_dump(struct source *source,
                      const struct dump_request *request,
                      struct qlb_error *err)
{
    struct stock *stock = stock_of(source);
    struct qlb_error why;

    stock->request = request;
    if (dump_several(source->n_disks, &request->dump, dump_disk, stock,
                     err) < 0) {
        /* A job that ended is the reason for what went wrong after. */
        if (fleece_check(stock->fleece, &why) < 0 && !tool_stop) {
            *err = why;
        }
        return -1;
    }
    return fleece_check(stock->fleece, err);
}

/* ---- the end ---- */

static int remove_bitmap(struct stock *stock, unsigned i, const char *name,
                         struct qlb_error *err)
{
    json_t *answer = qmp_call(stock->qmp, "block-dirty-bitmap-remove",
                              json_pack("{s:s, s:s}", "node",
                                        stock->disks[i].node, "name", name),
                              err);

    json_decref(answer);
    return answer == NULL ? -1 : 0;
}

/* Nobody goes on from them any more: the new one is the repository's newest. */
static int remove_old_bitmaps(struct stock *stock, unsigned i,
                              struct qlb_error *err)
{
    const struct source_disk *disk = &stock->source.disks[i];
    char name[STOCK_NAME_SIZE];
    struct qlb_error ignored;
    int ret = 0;

    for (unsigned k = 0; k < disk->n_checkpoints; k++) {
        if (disk->ours[k] &&
            remove_bitmap(stock, i,
                          stock_bitmap_name(&disk->checkpoints[k], name),
                          ret < 0 ? &ignored : err) < 0) {
            ret = -1;
        }
    }
    return ret;
}

static int stock_end(struct source *source, bool success,
                     struct qlb_error *err)
{
    struct stock *stock = stock_of(source);
    int ret = fleece_end(stock->fleece, success, err);

    /* Where something is left, the next one clears it, and the new bitmap: the
     * older ones are kept for it. */
    stock->fleece = NULL;
    for (unsigned i = 0; success && ret == 0 && i < source->n_disks; i++) {
        if (stock->plan[i].bitmap != NULL) {
            ret = remove_old_bitmaps(stock, i, err);
        }
    }
    return ret;
}

static void stock_free(struct source *source)
{
    struct stock *stock = stock_of(source);
    struct qlb_error ignored;

    if (stock->fleece != NULL) {
        stock_end(source, false, &ignored);
    }
    forget_disks(stock);
    free(stock->plan);
    free(stock->checkpoints);
    free(stock->bitmaps);
    free(stock->folder);
    source_release_disks(source);
    qmp_close(stock->qmp);
    free(stock);
}

static const struct source_ops stock_ops = {
    .kind = "qemu-stock",
    .list = stock_list,
    .begin = stock_begin,
    .dump = stock_dump,
    .end = stock_end,
    .free = stock_free,
};

struct source *source_stock_new(struct qmp *qmp, char *const *nodes,
                                char *const *names, unsigned n,
                                const char *scratch,
                                const struct nbd_way *way)
{
    struct stock *stock = calloc(1, sizeof(*stock));

    if (stock == NULL) {
        qmp_close(qmp);
        return NULL;
    }
    stock->source.ops = &stock_ops;
    stock->qmp = qmp;
    stock->nodes = nodes;
    stock->names = names;
    stock->n_nodes = n;
    stock->scratch = scratch;
    stock->way = way;
    return &stock->source;
}
