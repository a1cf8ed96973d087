/* The backup that is asked for, and the chains of its disks.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/restorable.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void restorable_parse(struct restorable *from, int argc, char **argv)
{
    if (argc - optind < 1 || argc - optind > 2) {
        tool_usage("a MACHINE and at most one ID are wanted, %d words given",
                   argc - optind);
    }
    from->name = argv[optind];
    from->id = argc - optind > 1 ? argv[optind + 1] : NULL;
    if (from->id != NULL && from->has_at) {
        tool_usage("an ID and --at are not wanted both");
    }
    vm_repository(&from->common);
}

int restorable_open(struct restorable *from)
{
    struct qlb_error err;
    int status = vm_open_machine(&from->common, from->name,
                                 &from->repository, &from->machine);

    if (status != 0) {
        return status;
    }
    /* What was read without the lock may be pruned already. */
    if (machine_lock(from->machine, MACHINE_READ, &err) == 0 &&
        machine_load(from->machine, &err) == 0) {
        from->manifest = from->has_at
            ? machine_find_at(from->machine, from->at, &err)
            : machine_find(from->machine,
                           from->id == NULL ? "latest" : from->id, &err);
    }
    return from->manifest == NULL ? tool_fail(NULL, &err) : 0;
}

void restorable_close(struct restorable *from)
{
    machine_close(from->machine);
    repository_close(from->repository);
}

const struct manifest_disk *restorable_disk(const struct restorable *from,
                                            const char *name,
                                            struct qlb_error *err)
{
    const struct manifest *manifest = from->manifest;
    const struct manifest_disk *disk = manifest_find_disk(manifest, name);
    char list[600] = "";

    if (disk != NULL) {
        return disk;
    }
    for (unsigned i = 0; i < manifest->n_disks; i++) {
        size_t used = strlen(list);

        snprintf(list + used, sizeof(list) - used, "%s '%.100s'",
                 i > 0 ? "," : "", manifest->disks[i].name);
    }
    qlb_fail(err, QLB_E_RUNTIME, "%s: %s has no disk '%.100s'; it has%s",
             from->name, manifest->id, name, list);
    return NULL;
}

char *restorable_file_name(const struct manifest_disk *disk,
                           struct qlb_error *err)
{
    char *name;

    if (asprintf(&name, "%.200s", disk->name) < 0) {
        qlb_fail_errno(err, ENOMEM, "disk '%s'", disk->name);
        return NULL;
    }
    for (char *c = name; *c != '\0'; c++) {
        if (*c == '/' || (c == name && *c == '.')) {
            *c = '_';
        }
    }
    return name;
}

/* The members, the newest last, are what the manifests say. */
static int check_members(const struct restorable *from,
                         const struct manifest_disk *disk,
                         const struct qlb_chain *chain, struct qlb_error *err)
{
    for (unsigned i = qlb_chain_members(chain); i-- > 0;) {
        const struct qlb_lbz_reader *member = qlb_chain_member(chain, i);

        if (disk == NULL || !manifest_describes(disk, member)) {
            return qlb_fail(err, QLB_E_DAMAGED, "%s: is not the archive that "
                            "the backup's manifest tells of",
                            qlb_lbz_reader_name(member));
        }
        disk = machine_find_archive(from->machine, &disk->image,
                                    &disk->parent);
    }
    return 0;
}

static int fetch_chain(const struct restorable *from,
                       const struct manifest_disk *disk,
                       struct store_names *paths, struct qlb_error *err)
{
    struct store_names objects;
    int ret = machine_chain(from->machine, disk, &objects, err);

    for (unsigned i = 0; i < objects.n && ret == 0; i++) {
        char *path = machine_fetch(from->machine, objects.at[i], err);

        if (path == NULL) {
            ret = -1;
        } else if (store_names_add(paths, path) < 0) {
            ret = qlb_fail_errno(err, ENOMEM, "%s", path);
        }
        free(path);
    }
    store_names_release(&objects);
    return ret;
}

struct qlb_chain *restorable_chain(const struct restorable *from,
                                   const struct manifest_disk *disk,
                                   struct qlb_error *err)
{
    struct qlb_chain *chain = NULL;
    struct store_names paths = { 0 };

    if (fetch_chain(from, disk, &paths, err) == 0) {
        chain = qlb_chain_open((const char *const *)paths.at, paths.n,
                               &disk->checkpoint, QLB_CHAIN_NEED_FULL, err);
    }
    store_names_release(&paths);
    if (chain != NULL && check_members(from, disk, chain, err) < 0) {
        qlb_chain_close(chain);
        chain = NULL;
    }
    if (chain == NULL) {
        qlb_error_prefix(err, "disk '%s'", disk->name);
    }
    return chain;
}

void restorable_hint(const struct restorable *from, int status)
{
    if (status == QLB_E_UNTRUSTED || status == QLB_E_DAMAGED) {
        tool_message("%s: 'lbvm verify %s' tells which backups are whole; an "
                     "ID chooses an older one, --disk disks that are",
                     from->name, from->name);
    }
}
