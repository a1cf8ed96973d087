/* What the commands of lbvm share on the command line.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_OPTIONS_H
#define VM_OPTIONS_H

#include "vm/repository.h"

enum { VM_OPT_REPOSITORY = TOOL_OPT_LONG + 0x800, VM_OPT_JSON,
       VM_OPT_METRICS };

#define VM_REPOSITORY_OPTION                                                 \
    { "repository", VM_OPT_REPOSITORY, "PLACE",                              \
      "where the backups are: a folder, or ssh://HOST/FOLDER (default: "     \
      "$LBVM_REPOSITORY)" }
#define VM_JSON_OPTION                                                       \
    { "json", VM_OPT_JSON, NULL, "print the result as JSON" }
#define VM_METRICS_OPTION                                                    \
    { "metrics", VM_OPT_METRICS, "FILE",                                     \
      "tell Prometheus how it ended (default: $LBVM_METRICS)" }

struct vm_options {
    const char *repository; /* NULL: not given */
    const char *metrics;    /* NULL: not given */
    bool json;
};

/* Takes the option if it is one of the above. */
bool vm_take_option(struct vm_options *options, int option);

/* The repository of the option or the environment, else a usage error. */
const char *vm_repository(const struct vm_options *options);

/* The file of the option or the environment; NULL: none. */
const char *vm_metrics(const struct vm_options *options);

/* Opens that repository, and the machine in it, with its manifests. Returns
 * an exit status; the message is out then. */
int vm_open_machine(const struct vm_options *options, const char *name,
                    struct repository **repository,
                    struct machine **machine);

/* What is done with each machine. */
struct vm_work {
    /* Returns an exit status; messages are out then. */
    int (*run)(void *opaque, struct machine *machine);
    /* One that was named could not be opened; the message is out. Returns the
     * status, or a greater one. May be NULL. */
    int (*missed)(void *opaque, const char *name, int status);
    void *opaque;
};

/* Opens those machines one after the other, all where n is 0, without their
 * manifests. Returns the greatest status. After a signal, none follows. */
int vm_each_machine(const struct vm_options *options, char *const *names,
                    unsigned n, const struct vm_work *work);

/* The number of a time, "2026-11-23 14:00", "2026-11-23T14:00:00Z" or
 * "@SECONDS"; without Z in local time. Usage error else. */
uint64_t vm_parse_time(const char *text, const char *what);

#endif
