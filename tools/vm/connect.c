/* From what the operator names to a source of its disks.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/connect.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qmp.h"
#include "vm/domain.h"
#include "vm/nbd_way.h"

static struct source *no_memory(const char *what, struct qlb_error *err)
{
    qlb_fail_errno(err, ENOMEM, "%s", what);
    return NULL;
}

/* ---- a monitor ---- */

/* What the answer to a question has under a key; "": nothing, or a storage daemon,
 * which has no such command. */
static int ask_text(struct qmp *qmp, const char *command, const char *key,
                    char text[32], struct qlb_error *err)
{
    json_t *answer = qmp_call(qmp, command, NULL, err);
    const char *value = json_string_value(json_object_get(answer, key));

    snprintf(text, 32, "%s", value == NULL ? "" : value);
    json_decref(answer);
    return answer != NULL || qmp_was_answered(qmp) ? 0 : -1;
}

/* Whether the disks are this QEMU's to read.  Those of a machine that was migrated
 * are another's: what is read here is no point in time of them.  And a migration
 * that ends while a backup runs breaks one of the two. */
static int check_migration(struct qmp *qmp, const char *target,
                           struct qlb_error *err)
{
    static const char *const over[] = { "", "none", "completed", "failed",
                                        "cancelled" };
    char status[32], migration[32];
    bool moving = true;

    if (ask_text(qmp, "query-status", "status", status, err) < 0 ||
        ask_text(qmp, "query-migrate", "status", migration, err) < 0) {
        return -1;
    }
    for (size_t i = 0; i < sizeof(over) / sizeof(over[0]); i++) {
        moving = moving && strcmp(migration, over[i]) != 0;
    }
    if (strcmp(status, "postmigrate") == 0) {
        return qlb_fail(err, QLB_E_BUSY, "%s: the machine was migrated from "
                        "here, and its disks are in use by another QEMU",
                        target);
    }
    if (moving || strcmp(status, "inmigrate") == 0) {
        return qlb_fail(err, QLB_E_BUSY, "%s: the machine is being migrated; "
                        "try again when that has ended", target);
    }
    return 0;
}

/* A QEMU with livebackup, or a stock one. Names are what people call the nodes;
 * NULL: these are names of both. */
static struct source *open_qmp(const struct connect_options *options,
                               struct qmp *qmp, const char *target,
                               char *const *nodes, char *const *names,
                               unsigned n, struct qlb_error *err)
{
    /* The way of a stock one needs no files of QEMU's host. */
    bool patched = options->nbd == NULL &&
                   qmp_has_command(qmp, "livebackup-begin");
    struct source *source;

    if (check_migration(qmp, target, err) < 0 ||
        (options->nbd != NULL && nbd_way_allow(options->nbd, err) < 0)) {
        qmp_close(qmp);
        return NULL;
    }
    if (!patched && options->durable) {
        qlb_fail(err, QLB_E_USAGE, "%s: --durable wants a QEMU with "
                 "livebackup", target);
        qmp_close(qmp);
        return NULL;
    }
    source = patched ? source_qemu_new(qmp, target, nodes, names, n,
                                       options->durable)
                     : source_stock_new(qmp, nodes, names, n,
                                        options->scratch, options->nbd);
    return source != NULL ? source : no_memory(target, err);
}

static struct source *open_socket(const struct connect_options *options,
                                  struct qlb_error *err)
{
    struct qmp *qmp = qmp_connect(options->socket, err);

    return qmp == NULL ? NULL
                       : open_qmp(options, qmp, options->socket,
                                  options->disks, NULL, options->n_disks,
                                  err);
}

/* ---- a domain ---- */

static void free_words(char **words, unsigned n)
{
    for (unsigned i = 0; words != NULL && i < n; i++) {
        free(words[i]);
    }
    free(words);
}

static bool is_wanted(const struct connect_options *options,
                      const char *target)
{
    for (unsigned i = 0; i < options->n_disks; i++) {
        if (strcmp(options->disks[i], target) == 0) {
            return true;
        }
    }
    return options->n_disks == 0;
}

static bool take(struct connection *wanted, const struct domain_disk *disk)
{
    unsigned i = wanted->n++;

    wanted->names[i] = strdup(disk->target);
    wanted->files[i] = strdup(disk->file);
    wanted->nodes[i] = strdup(disk->node == NULL ? "" : disk->node);
    return wanted->names[i] != NULL && wanted->files[i] != NULL &&
           wanted->nodes[i] != NULL;
}

static int choose(const struct connect_options *options,
                  const struct domain_disk *disks, unsigned n,
                  struct connection *wanted, struct qlb_error *err)
{
    bool good;

    wanted->names = calloc(n + 1, sizeof(char *));
    wanted->nodes = calloc(n + 1, sizeof(char *));
    wanted->files = calloc(n + 1, sizeof(char *));
    good = wanted->names != NULL && wanted->nodes != NULL &&
           wanted->files != NULL;
    for (unsigned i = 0; good && i < n; i++) {
        if (is_wanted(options, disks[i].target)) {
            good = take(wanted, &disks[i]);
        }
    }
    if (!good) {
        return qlb_fail_errno(err, ENOMEM, "%s", options->domain);
    }
    if (wanted->n == 0 || wanted->n < options->n_disks) {
        return qlb_fail(err, QLB_E_RUNTIME, "%s: %s", options->domain,
                        options->n_disks == 0
                        ? "has no qcow2 disk that it may write to"
                        : "--disk names one that is no qcow2 disk which it "
                          "may write to");
    }
    return 0;
}

static struct source *open_disks(const struct connect_options *options,
                                 struct domain *domain, bool running,
                                 const struct connection *wanted,
                                 struct qlb_error *err)
{
    struct source *source;
    struct qmp *qmp;

    if (running) {
        qmp = domain_qmp(domain, err);
        return qmp == NULL ? NULL
                           : open_qmp(options, qmp, options->domain,
                                      wanted->nodes, wanted->names,
                                      wanted->n, err);
    }
    source = source_images_new(wanted->names, wanted->files, wanted->n);
    return source != NULL ? source : no_memory(options->domain, err);
}

static int use_domain(struct connection *connection,
                      const struct connect_options *options,
                      struct domain *domain, struct qlb_error *err)
{
    struct domain_disk *disks = NULL;
    bool running;
    unsigned n = 0;
    char *xml = domain_xml(domain, err);

    if (xml != NULL && domain_is_running(domain, &running, err) == 0 &&
        domain_disks(domain, &disks, &n, err) == 0 &&
        choose(options, disks, n, connection, err) == 0) {
        connection->source = open_disks(options, domain, running, connection,
                                        err);
    }
    domain_free_disks(disks, n);
    if (connection->source == NULL) {
        free(xml);
        return -1;
    }
    connection->source->definition = xml;
    connection->source->definition_type = "xml";
    return 0;
}

static int open_domain(struct connection *connection,
                       const struct connect_options *options,
                       struct qlb_error *err)
{
    struct domain *domain = domain_open(options->uri, options->domain, err);
    int ret = -1;

    if (domain != NULL) {
        ret = use_domain(connection, options, domain, err);
        domain_close(domain);
    }
    return ret;
}

/* ---- any ---- */

int connect_open(struct connection *connection,
                 const struct connect_options *options, struct qlb_error *err)
{
    memset(connection, 0, sizeof(*connection));
    if (options->domain != NULL) {
        return open_domain(connection, options, err);
    }
    if (options->socket != NULL) {
        connection->source = open_socket(options, err);
    } else {
        connection->source = source_images_new(options->names,
                                               options->images,
                                               options->n_images);
        if (connection->source == NULL) {
            no_memory(options->images[0], err);
        }
    }
    return connection->source == NULL ? -1 : 0;
}

void connect_close(struct connection *connection)
{
    if (connection->source != NULL) {
        connection->source->ops->free(connection->source);
    }
    free_words(connection->names, connection->n);
    free_words(connection->nodes, connection->n);
    free_words(connection->files, connection->n);
    memset(connection, 0, sizeof(*connection));
}
