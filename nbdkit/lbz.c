/* nbdkit-lbz-plugin: serves a chain of archives as a disk.
 *
 *     nbdkit lbz base.lbz incr*.lbz [at=UUID] [cache=SIZE]
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "chain_disk.h"

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

enum { MAX_DECODERS = 8 };

static char **paths;
static unsigned n_paths;
static struct qlb_uuid at;
static bool has_at;
static int64_t memory = 64 << 20;
static struct chain_disk *disk;

/* ---- options ---- */

static int add_path(const char *path)
{
    char **larger = realloc(paths, (n_paths + 1) * sizeof(*larger));

    if (larger == NULL) {
        nbdkit_error("out of memory");
        return -1;
    }
    paths = larger;
    paths[n_paths] = nbdkit_realpath(path);
    if (paths[n_paths] == NULL) {
        return -1;
    }
    n_paths++;
    return 0;
}

static int lbz_config(const char *key, const char *value)
{
    if (strcmp(key, "file") == 0) {
        return add_path(value);
    }
    if (strcmp(key, "at") == 0) {
        has_at = qlb_uuid_parse(value, &at);
        if (!has_at) {
            nbdkit_error("at=%s: is no UUID", value);
            return -1;
        }
        return 0;
    }
    if (strcmp(key, "cache") == 0) {
        memory = nbdkit_parse_size(value);
        if (memory >= 0 && (uint64_t)memory < CHAIN_DISK_MEMORY_MIN) {
            nbdkit_error("cache=%s: at least 32M are wanted", value);
            return -1;
        }
        return memory < 0 ? -1 : 0;
    }
    nbdkit_error("unknown parameter '%s'", key);
    return -1;
}

static int lbz_config_complete(void)
{
    if (n_paths == 0) {
        nbdkit_error("no archive is given: nbdkit lbz BASE.lbz INCR.lbz...");
        return -1;
    }
    return 0;
}

static unsigned n_decoders(void)
{
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set)
                                                         : 2;

    return n < 1 ? 1 : n > MAX_DECODERS ? MAX_DECODERS : (unsigned)n;
}

static int lbz_get_ready(void)
{
    struct qlb_error err;

    disk = chain_disk_open((const char *const *)paths, n_paths,
                           has_at ? &at : NULL, (uint64_t)memory,
                           n_decoders(), &err);
    if (disk == NULL) {
        nbdkit_error("%s", err.message);
        return -1;
    }
    return 0;
}

static void lbz_unload(void)
{
    chain_disk_close(disk);
    for (unsigned i = 0; i < n_paths; i++) {
        free(paths[i]);
    }
    free(paths);
}

/* ---- requests ---- */

static void *lbz_open(int readonly)
{
    (void)readonly;
    return NBDKIT_HANDLE_NOT_NEEDED;
}

static int64_t lbz_get_size(void *handle)
{
    (void)handle;
    return (int64_t)chain_disk_size(disk);
}

static int yes(void *handle)
{
    (void)handle;
    return 1;
}

static int lbz_block_size(void *handle, uint32_t *minimum,
                          uint32_t *preferred, uint32_t *maximum)
{
    (void)handle;
    *minimum = 1;
    *preferred = QLB_LBZ_BLOCK;
    *maximum = UINT32_MAX;
    return 0;
}

static int io_error(const struct qlb_error *err)
{
    nbdkit_error("%s", err->message);
    nbdkit_set_error(EIO);
    return -1;
}

static int lbz_pread(void *handle, void *buf, uint32_t count, uint64_t offset,
                     uint32_t flags)
{
    struct qlb_error err;

    (void)handle;
    (void)flags;
    return chain_disk_read(disk, buf, offset, count, &err) < 0
               ? io_error(&err) : 0;
}

static int lbz_extents(void *handle, uint32_t count, uint64_t offset,
                       uint32_t flags, struct nbdkit_extents *extents)
{
    uint64_t left = count;

    (void)handle;
    while (left > 0) {
        struct qlb_error err;
        uint64_t run;
        bool data;

        if (chain_disk_extent(disk, offset, left, &data, &run, &err) < 0) {
            return io_error(&err);
        }
        if (nbdkit_add_extent(extents, offset, run,
                              data ? 0 : NBDKIT_EXTENT_HOLE |
                                             NBDKIT_EXTENT_ZERO) < 0) {
            return -1;
        }
        if (flags & NBDKIT_FLAG_REQ_ONE) {
            break;
        }
        offset += run;
        left -= run;
    }
    return 0;
}

static struct nbdkit_plugin plugin = {
    .name = "lbz",
    .longname = "archives of qcow2 livebackup",
    .version = PACKAGE_VERSION,
    .description = "serves a backup of a disk, without restoring it",
    .unload = lbz_unload,
    .config = lbz_config,
    .config_complete = lbz_config_complete,
    .config_help = "[file=]ARCHIVE  of the chain, in any order\n"
                   "at=UUID         the archive to end with\n"
                   "cache=SIZE      memory (default: 64M)",
    .magic_config_key = "file",
    .get_ready = lbz_get_ready,
    .open = lbz_open,
    .get_size = lbz_get_size,
    .block_size = lbz_block_size,
    .can_multi_conn = yes,
    .can_extents = yes,
    .pread = lbz_pread,
    .extents = lbz_extents,
    .errno_is_preserved = 0,
};

NBDKIT_REGISTER_PLUGIN(plugin)
