/* Commands that run where the repository is.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/far.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vm/ssh_session.h"

enum { SHELL_HAS_NOT = 127 };

/* "lbvm", the arguments, the repository as it is called there, and no metrics,
 * which are written here: the last one given counts. */
static unsigned fill_words(const char **words, const char *path, int argc,
                           char **argv)
{
    int options = strcmp(argv[optind - 1], "--") == 0 ? optind - 1 : optind;
    unsigned n = 0;

    words[n++] = "lbvm";
    for (int i = 0; i < options; i++) {
        words[n++] = argv[i];
    }
    words[n++] = "--repository";
    words[n++] = path;
    words[n++] = "--metrics";
    words[n++] = "";
    for (int i = options; i < argc; i++) {
        words[n++] = argv[i];
    }
    return n;
}

static int run(const char *url, int argc, char **argv, struct qlb_error *err)
{
    const char **words = calloc((size_t)argc + 6, sizeof(*words));
    struct ssh_target target;
    int status = words == NULL ? qlb_fail_errno(err, ENOMEM, "%s", url)
                               : ssh_target_parse(&target, url, err);

    if (words != NULL) {
        if (status == 0) {
            unsigned n = fill_words(words, target.path, argc, argv);

            status = ssh_run(&target, url, words, n, err);
        }
        ssh_target_release(&target);
    }
    free(words);
    return status;
}

static int run_and_tell(const char *url, int argc, char **argv)
{
    struct qlb_error err;
    int status = run(url, argc, argv, &err);

    if (status < 0) {
        return tool_fail(NULL, &err);
    }
    if (status == SHELL_HAS_NOT) {
        tool_message("%s: 'lbvm %s' runs where the repository is, and that "
                     "host has no lbvm", url, argv[0]);
        return QLB_E_RUNTIME;
    }
    return tool_flush_stdout() != 0 ? QLB_E_RUNTIME : status;
}

int far_run(const struct vm_options *options, enum metrics_command command,
            int argc, char **argv)
{
    double begun = tool_clock();
    int status, noted;

    if (!store_is_remote(vm_repository(options))) {
        return -1;
    }
    status = noted = run_and_tell(vm_repository(options), argc, argv);
    for (int i = optind; i < argc; i++) {
        int one = outcome_note(options, command, argv[i], NULL, NULL, begun,
                               status);

        noted = one > noted ? one : noted;
    }
    return noted;
}
