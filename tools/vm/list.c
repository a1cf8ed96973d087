/* lbvm list, lbvm show: what a repository has. Without locks: manifests are
 * whole files.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vm/commands.h"
#include "vm/options.h"

static const struct tool_option options[] = {
    VM_REPOSITORY_OPTION,
    VM_JSON_OPTION,
    TOOL_COMMON_OPTIONS
};

const struct tool vm_list_tool = {
    .name = "lbvm list",
    .synopsis = "[OPTION]... [MACHINE]",
    .summary = "Lists the backups of a machine, the oldest first, or the "
               "machines.",
    .options = options,
};

const struct tool vm_show_tool = {
    .name = "lbvm show",
    .synopsis = "[OPTION]... MACHINE [ID]",
    .summary = "Tells all about a backup, the newest one unless its ID is "
               "given (its start is\nenough), with the archives that it "
               "needs.",
    .options = options,
};

static const char *kind(const struct manifest_disk *disk)
{
    return qlb_uuid_is_zero(&disk->parent) ? "full" : "incremental";
}

static uint64_t bytes_of(const struct manifest *manifest)
{
    uint64_t bytes = 0;

    for (unsigned i = 0; i < manifest->n_disks; i++) {
        bytes += manifest->disks[i].bytes;
    }
    return bytes;
}

static json_t *number(uint64_t n)
{
    return json_integer((json_int_t)n);
}

/* ---- machines ---- */

struct machine_list {
    json_t *json; /* NULL: as text */
    bool any;
};

static int list_machine(void *opaque, struct machine *machine)
{
    struct machine_list *list = opaque;
    const struct manifest *newest = NULL;
    struct qlb_error err;
    unsigned n = 0;
    uint64_t bytes = 0;
    char size[16], time[32];
    json_t *json;

    if (machine_load(machine, &err) < 0) {
        return tool_fail(NULL, &err);
    }
    for (unsigned i = 0; i < machine_n_backups(machine); i++) {
        const struct manifest *manifest = machine_backup(machine, i);

        bytes += bytes_of(manifest);
        if (manifest->kept_for == NULL) {
            newest = manifest;
            n++;
        }
    }
    list->any = true;
    if (list->json == NULL) {
        printf("%s  %u backup%s  %s%s%s\n", machine_name(machine), n,
               n == 1 ? "" : "s", tool_format_size(bytes, size),
               newest == NULL ? "" : "  newest ",
               newest == NULL ? "" : tool_format_time(newest->time, time));
        return 0;
    }
    json = json_object();
    json_object_set_new(json, "machine", json_string(machine_name(machine)));
    json_object_set_new(json, "backups", number(n));
    json_object_set_new(json, "bytes", number(bytes));
    json_object_set_new(json, "newest", newest == NULL
                                            ? json_null()
                                            : json_string(newest->id));
    json_object_set_new(json, "time", newest == NULL ? json_null()
                                                     : number(newest->time));
    json_array_append_new(list->json, json);
    return 0;
}

static int list_machines(const struct vm_options *common)
{
    struct machine_list list = { .json = common->json ? json_array() : NULL };
    const struct vm_work work = { .run = list_machine, .opaque = &list };
    int status = vm_each_machine(common, NULL, 0, &work);
    json_t *json;

    if (!common->json) {
        int flushed = tool_flush_stdout();

        return flushed > status ? flushed : status;
    }
    if (status != 0 && !list.any) {
        json_decref(list.json);
        return status;
    }
    json = json_object();
    json_object_set_new(json, "machines", list.json);
    if (tool_print_json(json, false) < 0 && status == 0) {
        status = QLB_E_RUNTIME;
    }
    return status;
}

/* ---- the backups of one ---- */

static json_t *backup_to_json(const struct manifest *manifest)
{
    json_t *json = json_object(), *disks = json_array();

    json_object_set_new(json, "id", json_string(manifest->id));
    json_object_set_new(json, "time", number(manifest->time));
    json_object_set_new(json, "finished", number(manifest->finished));
    json_object_set_new(json, "label", json_string(manifest->label));
    json_object_set_new(json, "source", json_string(manifest->source));
    json_object_set_new(json, "quiesced", json_boolean(manifest->quiesced));
    json_object_set_new(json, "bytes", number(bytes_of(manifest)));
    for (unsigned i = 0; i < manifest->n_disks; i++) {
        const struct manifest_disk *disk = &manifest->disks[i];
        json_t *entry = json_object();

        json_object_set_new(entry, "name", json_string(disk->name));
        json_object_set_new(entry, "kind", json_string(kind(disk)));
        json_object_set_new(entry, "bytes", number(disk->bytes));
        json_object_set_new(entry, "size", number(disk->size));
        json_array_append_new(disks, entry);
    }
    json_object_set_new(json, "disks", disks);
    return json;
}

static void print_backup(const struct manifest *manifest)
{
    char time[32], size[16];

    printf("%s  %s  %s%s ", manifest->id,
           tool_format_time(manifest->time, time),
           tool_format_size(bytes_of(manifest), size),
           manifest->quiesced ? "  quiesced" : "");
    for (unsigned i = 0; i < manifest->n_disks; i++) {
        const struct manifest_disk *disk = &manifest->disks[i];

        printf("%s %s (%s)", i > 0 ? "," : "", disk->name, kind(disk));
    }
    putchar('\n');
}

static int list_backups(const struct vm_options *common,
                        const struct machine *machine)
{
    json_t *backups = json_array(), *json;

    for (unsigned i = 0; i < machine_n_backups(machine); i++) {
        const struct manifest *manifest = machine_backup(machine, i);

        if (manifest->kept_for != NULL) {
            continue;
        }
        if (common->json) {
            json_array_append_new(backups, backup_to_json(manifest));
        } else {
            print_backup(manifest);
        }
    }
    if (!common->json) {
        json_decref(backups);
        return tool_flush_stdout();
    }
    json = json_object();
    json_object_set_new(json, "machine", json_string(machine_name(machine)));
    json_object_set_new(json, "backups", backups);
    return tool_print_json(json, false) < 0 ? QLB_E_RUNTIME : 0;
}

static void parse_options(const struct tool *tool, struct vm_options *common,
                          int argc, char **argv)
{
    int option;

    while ((option = tool_getopt(tool, argc, argv)) != -1) {
        vm_take_option(common, option);
    }
}

int vm_list(int argc, char **argv)
{
    struct vm_options common = { 0 };
    struct repository *repository;
    struct machine *machine;
    int status;

    parse_options(&vm_list_tool, &common, argc, argv);
    if (argc - optind > 1) {
        tool_usage("at most one MACHINE is wanted, %d given", argc - optind);
    }
    if (optind == argc) {
        return list_machines(&common);
    }
    status = vm_open_machine(&common, argv[optind], &repository, &machine);
    if (status == 0) {
        status = list_backups(&common, machine);
    }
    machine_close(machine);
    repository_close(repository);
    return status;
}

/* ---- one backup ---- */

/* Whether the archives that the disk needs are there, and lead to a full one. */
static int check_chain(const struct machine *machine,
                       const struct manifest_disk *disk,
                       struct qlb_error *err)
{
    struct store_names objects;

    if (machine_chain(machine, disk, &objects, err) < 0) {
        return -1;
    }
    store_names_release(&objects);
    return 0;
}

static const struct manifest_disk *parent_of(const struct machine *machine,
                                             const struct manifest_disk *disk)
{
    return qlb_uuid_is_zero(&disk->parent)
               ? NULL
               : machine_find_archive(machine, &disk->image, &disk->parent);
}

/* Of a chain that was checked: the full archive first. */
static int list_chain(const struct machine *machine,
                      const struct manifest_disk *disk,
                      const struct manifest_disk ***chain, unsigned *n,
                      struct qlb_error *err)
{
    *n = 0;
    for (const struct manifest_disk *d = disk; d != NULL;
         d = parent_of(machine, d)) {
        ++*n;
    }
    *chain = calloc(*n, sizeof(**chain));
    if (*chain == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", disk->name);
    }
    for (unsigned i = *n; i-- > 0; disk = parent_of(machine, disk)) {
        (*chain)[i] = disk;
    }
    return 0;
}

static json_t *chain_to_json(const struct manifest_disk *const *chain,
                             unsigned n)
{
    json_t *list = json_array();

    for (unsigned i = 0; i < n; i++) {
        json_t *entry = json_object();

        json_object_set_new(entry, "archive", json_string(chain[i]->archive));
        json_object_set_new(entry, "kind", json_string(kind(chain[i])));
        json_object_set_new(entry, "checkpoint",
                            tool_json_uuid(&chain[i]->checkpoint));
        json_object_set_new(entry, "bytes", number(chain[i]->bytes));
        json_array_append_new(list, entry);
    }
    return list;
}

static void print_chain(const struct manifest_disk *const *chain, unsigned n)
{
    const struct manifest_disk *disk = chain[n - 1];
    char size[16], bytes[16], image[QLB_UUID_TEXT];

    printf("  disk %s: %s, %s\n"
           "    file        %s\n"
           "    image       %s\n"
           "    digest      %s %s\n", disk->name,
           tool_format_size(disk->size, size), kind(disk), disk->filename,
           qlb_uuid_format(&disk->image, image), disk->digest, disk->root);
    if (disk->reason[0] != '\0') {
        printf("    why full    %s\n", disk->reason);
    }
    for (unsigned i = 0; i < n; i++) {
        printf("    %s %s  %s\n", i == 0 ? "archives   " : "           ",
               chain[i]->archive, tool_format_size(chain[i]->bytes, bytes));
    }
}

static void print_head(const struct manifest *manifest)
{
    char time[32], finished[32];

    printf("%s\n"
           "  machine       %s\n"
           "  time          %s\n"
           "  finished      %s\n"
           "  source        %s%s\n"
           "  chain label   %s\n", manifest->id, manifest->machine,
           tool_format_time(manifest->time, time),
           tool_format_time(manifest->finished, finished), manifest->source,
           manifest->quiesced ? ", quiesced" : "", manifest->label);
    if (manifest->definition != NULL) {
        printf("  definition    %s\n", manifest->definition);
    }
}

static int show_backup(const struct vm_options *common,
                       const struct machine *machine,
                       const struct manifest *manifest, bool whole)
{
    json_t *json = manifest_to_json(manifest);
    json_t *disks = json_object_get(json, "disks");
    struct qlb_error err;
    int status = 0;

    if (!common->json) {
        print_head(manifest);
    }
    for (unsigned i = 0; i < manifest->n_disks; i++) {
        const struct manifest_disk *disk = &manifest->disks[i], **chain;
        json_t *entry = json_array_get(disks, i);
        unsigned n;

        json_object_set_new(entry, "kind", json_string(kind(disk)));
        if ((!whole && check_chain(machine, disk, &err) < 0) ||
            list_chain(machine, disk, &chain, &n, &err) < 0) {
            status = tool_fail(NULL, &err);
            json_object_set_new(entry, "chain", json_null());
            continue;
        }
        json_object_set_new(entry, "chain", chain_to_json(chain, n));
        if (!common->json) {
            print_chain(chain, n);
        }
        free(chain);
    }
    if (!common->json) {
        json_decref(json);
        return status != 0 ? status : tool_flush_stdout();
    }
    if (tool_print_json(json, false) < 0 && status == 0) {
        status = QLB_E_RUNTIME;
    }
    return status;
}

static bool is_whole(const struct machine *machine,
                     const struct manifest *manifest)
{
    struct qlb_error ignored;

    for (unsigned i = 0; i < manifest->n_disks; i++) {
        if (check_chain(machine, &manifest->disks[i], &ignored) < 0) {
            return false;
        }
    }
    return true;
}

/* A pruning may be at work, which changes manifests and deletes archives while
 * they are read: what seems broken is looked at again. */
static const struct manifest *find_whole(struct machine *machine,
                                         const char *id, bool *whole,
                                         struct qlb_error *err)
{
    const struct manifest *manifest = machine_find(machine, id, err);

    *whole = false;
    for (int tries = 0; manifest != NULL; tries++) {
        *whole = is_whole(machine, manifest);
        if (*whole || tries == 3) {
            return manifest;
        }
        if (machine_load(machine, err) < 0) {
            return NULL;
        }
        manifest = machine_find(machine, id, err);
    }
    return NULL;
}

int vm_show(int argc, char **argv)
{
    struct vm_options common = { 0 };
    struct repository *repository;
    struct machine *machine;
    const struct manifest *manifest;
    struct qlb_error err;
    bool whole;
    int status;

    parse_options(&vm_show_tool, &common, argc, argv);
    if (argc - optind < 1 || argc - optind > 2) {
        tool_usage("a MACHINE and at most one ID are wanted, %d words given",
                   argc - optind);
    }
    status = vm_open_machine(&common, argv[optind], &repository, &machine);
    if (status == 0) {
        manifest = find_whole(machine, argc - optind > 1 ? argv[optind + 1]
                                                         : "latest", &whole,
                              &err);
        status = manifest == NULL ? tool_fail(NULL, &err)
                                  : show_backup(&common, machine, manifest,
                                                whole);
    }
    machine_close(machine);
    repository_close(repository);
    return status;
}
