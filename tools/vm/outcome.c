/* How a command ended for a machine, for those who watch it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/outcome.h"

#include <stdlib.h>
#include <time.h>

/* 0: not known. */
static unsigned chain_length(const struct machine *machine,
                             const struct manifest_disk *disk)
{
    struct qlb_error ignored;
    struct store_names objects;
    unsigned n;

    if (machine_chain(machine, disk, &objects, &ignored) < 0) {
        return 0;
    }
    n = objects.n;
    store_names_release(&objects);
    return n;
}

static struct metrics_disk *list_disks(const struct machine *machine,
                                       const struct manifest *newest)
{
    struct metrics_disk *disks = calloc(newest->n_disks, sizeof(*disks));

    for (unsigned i = 0; disks != NULL && i < newest->n_disks; i++) {
        const struct manifest_disk *disk = &newest->disks[i];

        disks[i] = (struct metrics_disk) {
            .name = disk->name,
            .bytes = disk->bytes,
            .chain_length = chain_length(machine, disk),
        };
    }
    return disks;
}

int outcome_note(const struct vm_options *options,
                 enum metrics_command command, const char *name,
                 const struct machine *machine,
                 const struct manifest *newest, double begun, int status)
{
    const char *path = vm_metrics(options);
    const char *repository = vm_repository(options);
    char *resolved;
    struct metrics_disk *disks = NULL;
    struct metrics metrics;
    struct qlb_error err;

    if (path == NULL) {
        return status;
    }
    /* The same one has the same label, however it is named. */
    resolved = realpath(repository, NULL);
    if (newest != NULL && machine != NULL) {
        disks = list_disks(machine, newest);
    }
    metrics = (struct metrics) {
        .machine = name,
        .repository = resolved == NULL ? repository : resolved,
        .command = command,
        .status = status,
        .time = (uint64_t)time(NULL),
        .seconds = tool_clock() - begun,
        .disks = disks,
        .n_disks = disks == NULL ? 0 : newest->n_disks,
    };
    if (metrics_write(path, &metrics, &err) < 0) {
        tool_fail(NULL, &err);
        status = status == 0 ? QLB_E_RUNTIME : status;
    }
    free(resolved);
    free(disks);
    return status;
}
