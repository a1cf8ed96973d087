/* What lbvm reaches a guest by, one part at a time, for tests:
 *
 *     guestctl active URI                      names of the domains that run
 *     guestctl running|xml|disks URI DOMAIN
 *     guestctl freeze|thaw URI DOMAIN          how many file systems
 *     guestctl qmp URI DOMAIN COMMAND [JSON]   what QEMU returns
 *     guestctl has URI DOMAIN COMMAND
 *     guestctl quiesce require|try LIMIT PATIENCE SOCKET
 *     guestctl quiesce require|try LIMIT PATIENCE URI DOMAIN
 *         says "frozen" or "not frozen", waits for a line, says "kept" or why
 *     guestctl hooks MACHINE LIMIT STATUS COMMAND
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vm/domain.h"
#include "vm/hooks.h"
#include "vm/quiesce.h"

static int print_active(const char *uri, struct qlb_error *err)
{
    char **names;
    unsigned n;

    if (domain_list_active(uri, &names, &n, err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < n; i++) {
        puts(names[i]);
        free(names[i]);
    }
    free(names);
    return 0;
}

static int print_disks(struct domain *domain, struct qlb_error *err)
{
    struct domain_disk *disks;
    unsigned n;

    if (domain_disks(domain, &disks, &n, err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < n; i++) {
        printf("%s %s %s\n", disks[i].target, disks[i].file,
               disks[i].node == NULL ? "-" : disks[i].node);
    }
    domain_free_disks(disks, n);
    return 0;
}

static int print_xml(struct domain *domain, struct qlb_error *err)
{
    char *xml = domain_xml(domain, err);

    if (xml == NULL) {
        return -1;
    }
    fputs(xml, stdout);
    free(xml);
    return 0;
}

static int print_running(struct domain *domain, struct qlb_error *err)
{
    bool running;

    if (domain_is_running(domain, &running, err) < 0) {
        return -1;
    }
    puts(running ? "running" : "shut off");
    return 0;
}

static int print_count(struct domain *domain, bool freeze,
                       struct qlb_error *err)
{
    unsigned n;

    if ((freeze ? domain_freeze(domain, &n, err)
                : domain_thaw(domain, &n, err)) < 0) {
        return -1;
    }
    printf("%u\n", n);
    return 0;
}

static int call_qmp(struct domain *domain, int argc, char **argv,
                    struct qlb_error *err)
{
    struct qmp *qmp = domain_qmp(domain, err);
    json_t *answer;

    if (qmp == NULL) {
        return -1;
    }
    if (strcmp(argv[1], "has") == 0) {
        puts(qmp_has_command(qmp, argv[4]) ? "yes" : "no");
        qmp_close(qmp);
        return 0;
    }
    answer = qmp_call(qmp, argv[4],
                      argc > 5 ? json_loads(argv[5], 0, NULL) : NULL, err);
    if (answer != NULL) {
        json_dumpf(answer, stdout, JSON_COMPACT | JSON_ENCODE_ANY);
        putchar('\n');
    }
    fprintf(stderr, "%s\n", qmp_was_answered(qmp) ? "answered" : "no answer");
    qmp_close(qmp);
    json_decref(answer);
    return answer == NULL ? -1 : 0;
}

static int run_domain(int argc, char **argv, struct qlb_error *err)
{
    struct domain *domain = domain_open(argv[2], argv[3], err);
    int ret = -1;

    if (domain == NULL) {
        return -1;
    }
    if (strcmp(argv[1], "running") == 0) {
        ret = print_running(domain, err);
    } else if (strcmp(argv[1], "xml") == 0) {
        ret = print_xml(domain, err);
    } else if (strcmp(argv[1], "disks") == 0) {
        ret = print_disks(domain, err);
    } else if (argc > 4) {
        ret = call_qmp(domain, argc, argv, err);
    } else {
        ret = print_count(domain, strcmp(argv[1], "freeze") == 0, err);
    }
    domain_close(domain);
    return ret;
}

static int freeze_and_thaw(const struct quiesce_options *options,
                           struct qlb_error *err)
{
    struct quiesce *quiesce = quiesce_begin(options, err);
    bool kept;

    if (quiesce == NULL) {
        return -1;
    }
    puts(quiesce_is_frozen(quiesce) ? "frozen" : "not frozen");
    fflush(stdout);
    getchar();
    err->message[0] = '\0';
    if (quiesce_end(quiesce, &kept, err) < 0) {
        return -1;
    }
    puts(kept ? "kept" : err->message);
    return 0;
}

static int ask_status(struct qmp *qmp, struct qlb_error *err)
{
    json_t *answer = qmp_call(qmp, "query-status", NULL, err);

    json_decref(answer);
    return answer == NULL ? -1 : 0;
}

/* As lbvm does: its connection is there, and in use, before and after. */
static int quiesce_domain(const struct quiesce_options *options,
                          struct qlb_error *err)
{
    struct domain *domain = domain_open(options->uri, options->domain, err);
    struct qmp *qmp = domain == NULL ? NULL : domain_qmp(domain, err);
    int ret = -1;

    if (qmp != NULL && ask_status(qmp, err) == 0 &&
        freeze_and_thaw(options, err) == 0) {
        ret = ask_status(qmp, err);
    }
    qmp_close(qmp);
    domain_close(domain);
    return ret;
}

static int run_quiesce(int argc, char **argv, struct qlb_error *err)
{
    struct quiesce_options options = {
        .policy = strcmp(argv[2], "try") == 0 ? QUIESCE_TRY : QUIESCE_REQUIRE,
        .limit = (unsigned)atoi(argv[3]),
        .patience = (unsigned)atoi(argv[4]),
        .agent = argc == 6 ? argv[5] : NULL,
        .uri = argc == 6 ? NULL : argv[5],
        .domain = argc == 6 ? NULL : argv[6],
    };

    return argc == 6 ? freeze_and_thaw(&options, err)
                     : quiesce_domain(&options, err);
}

static int run_hooks(char **argv, struct qlb_error *err)
{
    struct hooks hooks = {
        .machine = argv[2],
        .limit = (unsigned)atoi(argv[3]),
        .command = argv[5],
    };
    struct qlb_error first;
    int status = atoi(argv[4]), ret = hooks_before(&hooks, &first);

    if (ret == 0 && status == 0) {
        ret = hooks_thawed(&hooks, &first);
    }
    if (hooks_after(&hooks, ret < 0 ? QLB_E_RUNTIME : status, err) < 0) {
        tool_fail(NULL, err);
    }
    *err = first;
    return ret;
}

static int run(int argc, char **argv, struct qlb_error *err)
{
    if (argc == 3 && strcmp(argv[1], "active") == 0) {
        return print_active(argv[2], err);
    }
    if (argc >= 6 && strcmp(argv[1], "quiesce") == 0) {
        return run_quiesce(argc, argv, err);
    }
    if (argc == 6 && strcmp(argv[1], "hooks") == 0) {
        return run_hooks(argv, err);
    }
    if (argc >= 4) {
        return run_domain(argc, argv, err);
    }
    return qlb_fail(err, QLB_E_USAGE, "see the top of guestctl.c");
}

int main(int argc, char **argv)
{
    struct qlb_error err;

    tool_begin("guestctl");
    return run(argc, argv, &err) < 0 ? tool_fail(NULL, &err) : 0;
}
