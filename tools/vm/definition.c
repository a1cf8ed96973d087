/* What QEMU tells of a machine.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/definition.h"

#include <errno.h>

static const struct {
    const char *key, *command;
} questions[] = {
    { "name", "query-name" },
    { "uuid", "query-uuid" },
    { "qemu", "query-version" },
    { "status", "query-status" },
    { "cpus", "query-cpus-fast" },
    { "memory", "query-memory-size-summary" },
    { "block", "query-block" },
};

/* A storage daemon has no such command, and an old QEMU not all. */
static int ask(struct qmp *qmp, json_t *definition, unsigned i,
               struct qlb_error *err)
{
    json_t *answer = qmp_call(qmp, questions[i].command, NULL, err);

    if (answer == NULL && !qmp_was_answered(qmp)) {
        return -1;
    }
    json_object_set_new(definition, questions[i].key,
                        answer == NULL ? json_null() : answer);
    return 0;
}

char *definition_of_qemu(struct qmp *qmp, struct qlb_error *err)
{
    json_t *definition = json_object();
    char *text = NULL;
    int ret = 0;

    for (unsigned i = 0;
         ret == 0 && i < sizeof(questions) / sizeof(questions[0]); i++) {
        ret = ask(qmp, definition, i, err);
    }
    if (ret == 0) {
        text = json_dumps(definition, JSON_INDENT(2));
        if (text == NULL) {
            qlb_fail_errno(err, ENOMEM, "the machine's definition");
        }
    }
    json_decref(definition);
    return text;
}
