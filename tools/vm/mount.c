/* lbvm mount and umount: the disks of a backup as files.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "vm/backup_file.h"
#include "vm/commands.h"
#include "vm/restorable.h"

enum { OPT_AT = TOOL_OPT_LONG, OPT_DISK, OPT_WRITABLE };

static const struct tool_option options[] = {
    VM_REPOSITORY_OPTION,
    { "at", OPT_AT, "TIME", "the newest backup of that time or before it" },
    { "disk", OPT_DISK, "NAME", "only that disk" },
    { "output", 'o', "FOLDER", "show the disks there" },
    { "writable", OPT_WRITABLE, NULL,
      "let them be written to; umount forgets what was written" },
    VM_JSON_OPTION,
    TOOL_COMMON_OPTIONS
};

const struct tool vm_mount_tool = {
    .name = "lbvm mount",
    .synopsis = "[OPTION]... -o FOLDER MACHINE [ID]",
    .summary = "Shows the disks of a backup as files, FOLDER/NAME.img, which "
               "can be read at once:\nof the newest one unless its ID is given "
               "(its start is enough), or --at.",
    .options = options,
};

static const struct tool_option umount_options[] = {
    TOOL_COMMON_OPTIONS
};

const struct tool vm_umount_tool = {
    .name = "lbvm umount",
    .synopsis = "FOLDER",
    .summary = "Takes away what lbvm mount has shown in the folder.",
    .options = umount_options,
};

struct mount {
    struct restorable from;
    const char *disk; /* NULL: all */
    bool writable;
    char *folder;
    json_t *disks;    /* what is shown */
};

/* ---- mount ---- */

static int show(struct mount *m, const struct manifest_disk *disk,
                struct qlb_error *err)
{
    struct qlb_chain *chain = restorable_chain(&m->from, disk, err);
    char *name = NULL, *path = NULL;
    int ret = -1;

    if (chain != NULL &&
        (name = restorable_file_name(disk, err)) != NULL &&
        (path = backup_file_path(m->folder, name, err)) != NULL) {
        ret = backup_file_mount(m->folder, name, chain, m->writable, NULL,
                                err);
    }
    if (ret == 0) {
        json_array_append_new(
            m->disks, json_pack("{s:s, s:s, s:s, s:I}", "name", disk->name,
                                "stem", name, "file", path, "size",
                                (json_int_t)disk->size));
    }
    qlb_chain_close(chain);
    free(name);
    free(path);
    return ret;
}

static int show_all(struct mount *m, struct qlb_error *err)
{
    const struct manifest *manifest = m->from.manifest;
    int ret = 0;

    if (m->disk != NULL) {
        const struct manifest_disk *disk = restorable_disk(&m->from, m->disk,
                                                           err);

        return disk == NULL ? -1 : show(m, disk, err);
    }
    for (unsigned i = 0; i < manifest->n_disks && ret == 0; i++) {
        ret = show(m, &manifest->disks[i], err);
    }
    return ret;
}

static void take_back(struct mount *m)
{
    struct qlb_error ignored;
    json_t *disk;
    size_t i;

    json_array_foreach(m->disks, i, disk) {
        backup_file_unmount(m->folder,
                            json_string_value(json_object_get(disk, "stem")),
                            &ignored);
    }
}

static int report(struct mount *m)
{
    json_t *disk;
    size_t i;

    json_array_foreach(m->disks, i, disk) {
        json_object_del(disk, "stem");
        if (!m->from.common.json) {
            printf("%s\n", json_string_value(json_object_get(disk, "file")));
        }
    }
    if (!m->from.common.json) {
        return tool_flush_stdout() < 0 ? QLB_E_RUNTIME : 0;
    }
    return tool_print_json(
               json_pack("{s:s, s:s, s:I, s:s, s:O}", "machine", m->from.name,
                         "id", m->from.manifest->id, "time",
                         (json_int_t)m->from.manifest->time, "folder",
                         m->folder, "disks", m->disks), false) < 0
               ? QLB_E_RUNTIME : 0;
}

static int make_folder(const char *folder, struct qlb_error *err)
{
    return mkdir(folder, 0700) < 0 && errno != EEXIST
               ? qlb_fail_errno(err, errno, "%s", folder) : 0;
}

/* Without what would be doubled, or is at the end for no use. */
static char *clean_folder(const char *folder)
{
    char *clean = strdup(folder);

    for (size_t n = clean == NULL ? 0 : strlen(clean);
         n > 1 && clean[n - 1] == '/'; n--) {
        clean[n - 1] = '\0';
    }
    if (clean == NULL) {
        tool_usage("out of memory");
    }
    return clean;
}

static void parse_mount(struct mount *m, int argc, char **argv)
{
    int option;

    while ((option = tool_getopt(&vm_mount_tool, argc, argv)) != -1) {
        switch (option) {
        case OPT_AT:
            m->from.has_at = true;
            m->from.at = vm_parse_time(optarg, "--at");
            break;
        case OPT_DISK:
            m->disk = optarg;
            break;
        case OPT_WRITABLE:
            m->writable = true;
            break;
        case 'o':
            free(m->folder);
            m->folder = clean_folder(optarg);
            break;
        default:
            vm_take_option(&m->from.common, option);
        }
    }
    restorable_parse(&m->from, argc, argv);
    if (m->folder == NULL) {
        tool_usage("-o FOLDER is wanted");
    }
}

int vm_mount(int argc, char **argv)
{
    struct mount m = { .disks = json_array() };
    struct qlb_error err;
    int status;

    parse_mount(&m, argc, argv);
    status = restorable_open(&m.from);
    if (status == 0 &&
        (make_folder(m.folder, &err) < 0 || show_all(&m, &err) < 0)) {
        status = tool_fail(NULL, &err);
        restorable_hint(&m.from, status);
        take_back(&m);
    } else if (status == 0) {
        status = report(&m);
    }
    restorable_close(&m.from);
    json_decref(m.disks);
    free(m.folder);
    return status;
}

/* ---- umount ---- */

/* The names of what may be ours, without their ends. */
static int list_files(const char *folder, struct store_names *names,
                      struct qlb_error *err)
{
    DIR *dir = opendir(folder);
    const struct dirent *entry;
    int ret = dir == NULL ? qlb_fail_errno(err, errno, "%s", folder) : 0;

    while (ret == 0 && (entry = readdir(dir)) != NULL) {
        size_t len = strlen(entry->d_name);
        char name[256];

        if (len > 4 && strcmp(entry->d_name + len - 4, ".img") == 0) {
            snprintf(name, sizeof(name), "%.*s", (int)len - 4,
                     entry->d_name);
            if (store_names_add(names, name) < 0) {
                ret = qlb_fail_errno(err, ENOMEM, "%s", folder);
            }
        }
    }
    if (dir != NULL) {
        closedir(dir);
    }
    return ret;
}

static int take_away(const char *folder, struct qlb_error *err)
{
    struct store_names names = { 0 };
    struct qlb_error own;
    int ret = list_files(folder, &names, err), gone = 0;

    for (unsigned i = 0; i < names.n; i++) {
        int one = backup_file_unmount(folder, names.at[i], &own);

        /* one that is being read does not keep the others */
        if (one < 0 && ret == 0) {
            *err = own;
            ret = -1;
        }
        gone += one != 0;
    }
    store_names_release(&names);
    return ret < 0 || gone > 0
               ? ret
               : qlb_fail(err, QLB_E_RUNTIME, "%s: no backup is shown there",
                          folder);
}

int vm_umount(int argc, char **argv)
{
    struct qlb_error err;
    char *folder;
    int status;

    while (tool_getopt(&vm_umount_tool, argc, argv) != -1) {
        /* has none of its own */
    }
    if (argc - optind != 1) {
        tool_usage("one FOLDER is wanted, %d given", argc - optind);
    }
    folder = clean_folder(argv[optind]);
    status = take_away(folder, &err) < 0 ? tool_fail(NULL, &err) : 0;
    free(folder);
    return status;
}
