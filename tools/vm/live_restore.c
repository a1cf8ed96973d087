/* lbvm restore --live.
 *
 * Whatever is killed, the disks are overlays that have all that the guest wrote,
 * over a backup that folder and repository tell: this begins again, finds them,
 * and goes on. That a disk is whole only its own header says.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/live_restore.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "vm/live_stream.h"
#include "vm/nbdkit_server.h"

static const struct timespec nap = { .tv_nsec = 100 * 1000 * 1000 };

struct live_disk {
    const struct manifest_disk *disk;
    const char *path;
    char *socket;
    enum live_disk_state state;
    bool proven;          /* WHOLE, and all of it is in the file */
    bool told;            /* that it is WHOLE, and not proven */
    struct qlb_chain *chain;     /* until the disk is made */
    struct store_names archives;
    struct nbdkit_server *server;
};

struct live {
    const struct live_restore *wanted;
    struct live_disk *disks;
    struct live_stream_disk *streamed; /* in the same order */
    unsigned n;
    struct live_stream *stream;
    struct tool_progress progress;
};

static int no_memory(struct qlb_error *err)
{
    return qlb_fail_errno(err, ENOMEM, "restoring");
}

/* ---- before anything is written ---- */

/* They are looked at, all of them, and found to be those of the backup. */
static int find_archives(struct live *live, struct live_disk *disk,
                         struct qlb_error *err)
{
    int ret = 0;

    disk->chain = restorable_chain(live->wanted->from, disk->disk, err);
    if (disk->chain == NULL) {
        return -1;
    }
    for (unsigned i = 0; ret == 0 && i < qlb_chain_members(disk->chain); i++) {
        ret = store_names_add(&disk->archives, qlb_lbz_reader_name(
                                  qlb_chain_member(disk->chain, i)));
    }
    return ret < 0 ? no_memory(err) : 0;
}

/* Its header says that it is whole. Where we did not see to it that all is in the
 * file before, QEMU may still have some of it; or the host went down. */
static int prove(struct live_disk *disk, struct qlb_error *err)
{
    uint64_t offset;

    if (live_disk_prove(disk->path, disk->disk->size, &disk->proven, &offset,
                        err) < 0) {
        return -1;
    }
    if (!disk->proven && !disk->told) {
        tool_message("%s: has no backing file any more, but what is at %" PRIu64
                     " is not in it yet; it is not to be used without its QEMU",
                     disk->path, offset);
        disk->told = true;
    }
    return 0;
}

static int look(struct live *live, struct live_disk *disk,
                struct qlb_error *err)
{
    bool begun = live_folder_id(live->wanted->folder) != NULL;
    bool ready = live_folder_is_ready(live->wanted->folder);

    if (live_disk_look(disk->path, disk->socket, &disk->state, err) < 0) {
        return -1;
    }
    if (disk->state == LIVE_DISK_ABSENT && ready) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: is gone, and with it what the "
                        "guest has written; to begin anew, delete what else "
                        "is left, and %s", disk->path,
                        live_folder_path(live->wanted->folder));
    }
    if (disk->state != LIVE_DISK_ABSENT && !begun) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: already exists; a live "
                        "restore replaces nothing", disk->path);
    }
    if (disk->state == LIVE_DISK_WHOLE && !ready) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: already exists, and is not "
                        "what was begun here", disk->path);
    }
    return disk->state == LIVE_DISK_WHOLE ? prove(disk, err) : 0;
}

static int open_disks(struct live *live, struct qlb_error *err)
{
    const struct live_restore *wanted = live->wanted;

    live->n = wanted->n_disks;
    live->disks = calloc(live->n, sizeof(*live->disks));
    live->streamed = calloc(live->n, sizeof(*live->streamed));
    if (live->disks == NULL || live->streamed == NULL) {
        live->n = 0;
        return no_memory(err);
    }
    for (unsigned i = 0; i < live->n; i++) {
        struct live_disk *disk = &live->disks[i];

        disk->disk = wanted->disks[i].disk;
        disk->path = wanted->disks[i].path;
        disk->socket = live_folder_socket(wanted->folder, i);
        if (disk->socket == NULL) {
            return no_memory(err);
        }
        if (look(live, disk, err) < 0 ||
            (!disk->proven &&
             find_archives(live, disk, err) < 0)) {
            return -1;
        }
    }
    return 0;
}

/* ---- the disks ---- */

static int note(const struct live *live, bool ready, struct qlb_error *err)
{
    const struct live_restore *wanted = live->wanted;
    const char **names = calloc(live->n, sizeof(*names));
    int ret;

    if (names == NULL) {
        return no_memory(err);
    }
    for (unsigned i = 0; i < live->n; i++) {
        names[i] = live->disks[i].disk->name;
    }
    ret = live_folder_note(wanted->folder, wanted->from->name,
                           wanted->from->manifest->id, names, live->n, ready,
                           err);
    free(names);
    return ret;
}

static int make_disks(struct live *live, struct qlb_error *err)
{
    if (live_folder_is_ready(live->wanted->folder)) {
        return 0;
    }
    if (note(live, false, err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < live->n; i++) {
        struct live_disk *disk = &live->disks[i];

        if (disk->state == LIVE_DISK_ABSENT &&
            live_disk_make(disk->path, disk->socket, disk->chain, err) < 0) {
            return -1;
        }
        disk->state = LIVE_DISK_UNFINISHED;
    }
    return live->wanted->prepare(live->wanted->opaque, err) < 0
               ? -1 : note(live, true, err);
}

/* nbdkit has its own. */
static void close_chains(struct live *live)
{
    for (unsigned i = 0; i < live->n; i++) {
        qlb_chain_close(live->disks[i].chain);
        live->disks[i].chain = NULL;
    }
}

static int serve(struct live_disk *disk, struct qlb_error *err)
{
    char *name;

    if (disk->proven) {
        return 0;
    }
    if (asprintf(&name, "disk '%s'", disk->disk->name) < 0) {
        return no_memory(err);
    }
    disk->server = nbdkit_server_start(name, disk->socket,
                                       (const char *const *)disk->archives.at,
                                       disk->archives.n,
                                       &disk->disk->checkpoint, err);
    free(name);
    return disk->server == NULL ? -1 : 0;
}

/* All servers first: where one can't be, nothing is made. */
static int serve_all(struct live *live, struct qlb_error *err)
{
    for (unsigned i = 0; i < live->n; i++) {
        if (serve(&live->disks[i], err) < 0) {
            return -1;
        }
    }
    return 0;
}

/* ---- while it runs ---- */

static int open_stream(struct live *live, struct qlb_error *err)
{
    const struct live_restore *wanted = live->wanted;
    uint64_t rate = wanted->rate / live->n;

    for (unsigned i = 0; i < live->n; i++) {
        live->streamed[i] = (struct live_stream_disk){
            .name = live->disks[i].disk->name,
            .path = live->disks[i].path,
            .socket = live->disks[i].socket,
            .number = i,
            .size = live->disks[i].disk->size,
            .wanted = live->disks[i].state == LIVE_DISK_UNFINISHED,
        };
    }
    if (wanted->qmp == NULL) {
        return 0;
    }
    live->stream = live_stream_new(wanted->qmp, live->streamed, live->n,
                                   wanted->rate > 0 && rate == 0 ? 1 : rate);
    return live->stream == NULL ? no_memory(err) : 0;
}

static int become_whole(struct live *live, unsigned i, struct qlb_error *err)
{
    struct live_disk *disk = &live->disks[i];

    live->streamed[i].wanted = false;
    if (prove(disk, err) < 0) {
        return -1;
    }
    if (!disk->proven) {
        return 0;
    }
    nbdkit_server_stop(disk->server);
    disk->server = NULL;
    if (live->wanted->quiet || live->wanted->from->common.json) {
        return 0;
    }
    printf("%s: %s: whole\n", live->wanted->from->name, disk->disk->name);
    return tool_flush_stdout() != 0
               ? qlb_fail(err, QLB_E_RUNTIME, "standard output failed") : 0;
}

static int look_after_disk(struct live *live, unsigned i,
                           struct qlb_error *err)
{
    struct live_disk *disk = &live->disks[i];

    if (disk->server == NULL) {
        return 0;
    }
    if (live_disk_look(disk->path, disk->socket, &disk->state, err) < 0) {
        return -1;
    }
    if (disk->state == LIVE_DISK_ABSENT) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: is gone", disk->path);
    }
    if (disk->state == LIVE_DISK_WHOLE && become_whole(live, i, err) < 0) {
        return -1;
    }
    return disk->server == NULL ? 0
                                : nbdkit_server_look_after(disk->server, err);
}

/* 1: there are disks that are not whole. */
static int look_after_disks(struct live *live, struct qlb_error *err)
{
    int left = 0;

    for (unsigned i = 0; i < live->n; i++) {
        if (look_after_disk(live, i, err) < 0) {
            return -1;
        }
        left = left || !live->disks[i].proven;
    }
    return left;
}

static void show_progress(struct live *live)
{
    uint64_t done = 0;

    for (unsigned i = 0; i < live->n; i++) {
        done += live->disks[i].proven
                    ? live->streamed[i].size : live->streamed[i].done;
    }
    tool_progress_update(&live->progress, done);
}

/* Until all are whole; jobs that are done are taken out of QEMU, too. */
static int stay(struct live *live, struct qlb_error *err)
{
    bool busy = false;
    int left;

    while ((left = look_after_disks(live, err)) >= 0 && !tool_stop) {
        if (live->stream != NULL) {
            busy = live_stream_step(live->stream);
            show_progress(live);
        }
        if (left == 0 && !busy) {
            return 0;
        }
        nanosleep(&nap, NULL);
    }
    return left < 0 ? -1 : 1;
}

static int was_interrupted(const struct live *live, struct qlb_error *err)
{
    unsigned left = 0;
    const struct live_disk *damaged = NULL;

    for (unsigned i = 0; i < live->n; i++) {
        const struct live_disk *disk = &live->disks[i];

        left += !disk->proven;
        if (disk->server != NULL && nbdkit_server_saw_damage(disk->server)) {
            damaged = disk;
        }
    }
    if (damaged != NULL) {
        return qlb_fail(err, QLB_E_DAMAGED, "%s: unfinished, and can't be "
                        "finished: an archive is damaged", damaged->path);
    }
    return qlb_fail(err, QLB_E_RUNTIME, "interrupted: %u disk%s unfinished; "
                    "the same command goes on", left,
                    left == 1 ? " is" : "s are");
}

static int run(struct live *live, struct qlb_error *err)
{
    uint64_t total = 0;
    int ret;

    if (open_disks(live, err) < 0 || serve_all(live, err) < 0 ||
        make_disks(live, err) < 0 || open_stream(live, err) < 0 ||
        live->wanted->ready(live->wanted->opaque, err) < 0) {
        return -1;
    }
    close_chains(live);
    for (unsigned i = 0; i < live->n; i++) {
        total += live->streamed[i].size;
    }
    tool_progress_begin(&live->progress, "streamed", live->wanted->progress,
                        total);
    ret = stay(live, err);
    tool_progress_end(&live->progress);
    if (ret > 0) {
        return was_interrupted(live, err);
    }
    return ret < 0 ? -1 : live_folder_remove(live->wanted->folder, err);
}

int live_restore(const struct live_restore *wanted, struct qlb_error *err)
{
    struct live live = { .wanted = wanted };
    int ret = run(&live, err);

    live_stream_free(live.stream);
    close_chains(&live);
    for (unsigned i = 0; i < live.n; i++) {
        nbdkit_server_stop(live.disks[i].server);
        store_names_release(&live.disks[i].archives);
        free(live.disks[i].socket);
    }
    free(live.disks);
    free(live.streamed);
    return ret;
}
