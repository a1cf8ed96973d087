/* What the commands of lbvm share on the command line.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/options.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

bool vm_take_option(struct vm_options *options, int option)
{
    switch (option) {
    case VM_OPT_REPOSITORY:
        options->repository = optarg;
        return true;
    case VM_OPT_JSON:
        options->json = true;
        return true;
    case VM_OPT_METRICS:
        options->metrics = optarg;
        return true;
    default:
        return false;
    }
}

const char *vm_metrics(const struct vm_options *options)
{
    const char *path = options->metrics;

    if (path == NULL) {
        path = getenv("LBVM_METRICS");
    }
    return path == NULL || *path == '\0' ? NULL : path;
}

const char *vm_repository(const struct vm_options *options)
{
    const char *path = options->repository;

    if (path == NULL) {
        path = getenv("LBVM_REPOSITORY");
    }
    if (path == NULL || *path == '\0') {
        tool_usage("--repository=PLACE is wanted, or LBVM_REPOSITORY in the "
                   "environment");
    }
    return path;
}

int vm_open_machine(const struct vm_options *options, const char *name,
                    struct repository **repository, struct machine **machine)
{
    struct qlb_error err;

    *machine = NULL;
    *repository = repository_open(vm_repository(options), false, NULL, &err);
    if (*repository != NULL) {
        *machine = machine_open(*repository, name, false, &err);
    }
    if (*machine == NULL || machine_load(*machine, &err) < 0) {
        return tool_fail(NULL, &err);
    }
    return 0;
}

static int note_missed(const struct vm_work *work, const char *name,
                       int status)
{
    return work->missed == NULL ? status
                                : work->missed(work->opaque, name, status);
}

static int run_machine(struct repository *repository, const char *name,
                       const struct vm_work *work)
{
    struct qlb_error err;
    struct machine *machine = machine_open(repository, name, false, &err);
    int status;

    if (machine == NULL) {
        return note_missed(work, name, tool_fail(NULL, &err));
    }
    status = work->run(work->opaque, machine);
    machine_close(machine);
    return status;
}

static int miss_all(const struct vm_work *work, char *const *names,
                    unsigned n, int status)
{
    int worst = status;

    for (unsigned i = 0; i < n; i++) {
        int one = note_missed(work, names[i], status);

        worst = one > worst ? one : worst;
    }
    return worst;
}

int vm_each_machine(const struct vm_options *options, char *const *names,
                    unsigned n, const struct vm_work *work)
{
    struct repository *repository;
    struct qlb_error err;
    char **all = NULL;
    unsigned n_all = 0;
    int status, worst = 0;
    unsigned i;

    repository = repository_open(vm_repository(options), false, NULL, &err);
    if (repository == NULL ||
        (n == 0 && repository_machines(repository, &all, &n_all, &err) < 0)) {
        worst = miss_all(work, names, n, tool_fail(NULL, &err));
        n = 0;
    } else if (n == 0) {
        names = all;
        n = n_all;
    }
    for (i = 0; i < n && !tool_stop; i++) {
        status = run_machine(repository, names[i], work);
        worst = status > worst ? status : worst;
    }
    if (i < n) {
        tool_message("interrupted: %s and what follows had no turn",
                     names[i]);
        worst = worst == 0 ? QLB_E_RUNTIME : worst;
    }
    for (i = 0; i < n_all; i++) {
        free(all[i]);
    }
    free(all);
    repository_close(repository);
    return worst;
}

static bool parse_seconds(const char *text, uint64_t *seconds)
{
    char *end;

    errno = 0;
    *seconds = strtoull(text, &end, 10);
    return errno == 0 && *text >= '0' && *text <= '9' && *end == '\0' &&
           *seconds < (uint64_t)INT64_MAX;
}

uint64_t vm_parse_time(const char *text, const char *what)
{
    static const char *const formats[] = {
        "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M",
        "%Y-%m-%d %H:%M", "%Y%m%dT%H%M%S",
    };
    uint64_t seconds;

    if (text[0] == '@' && parse_seconds(text + 1, &seconds)) {
        return seconds;
    }
    for (unsigned i = 0; i < sizeof(formats) / sizeof(formats[0]); i++) {
        struct tm tm = { .tm_isdst = -1 };
        const char *end = strptime(text, formats[i], &tm);
        time_t value;

        if (end == NULL || (*end != '\0' && strcmp(end, "Z") != 0)) {
            continue;
        }
        value = *end == 'Z' ? timegm(&tm) : mktime(&tm);
        if (value >= 0) {
            return (uint64_t)value;
        }
    }
    tool_usage("%s: '%s' is no time: 'YYYY-MM-DD HH:MM' in local time, "
               "YYYY-MM-DDTHH:MM:SSZ, or @SECONDS", what, text);
}
