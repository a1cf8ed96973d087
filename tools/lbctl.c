/* lbctl: livebackup of an image: on, off, its checkpoints, recovery.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

enum {
    OPT_GRANULARITY = TOOL_OPT_LONG, OPT_SYNC, OPT_JSON, OPT_KEEP, OPT_CHAIN,
    OPT_FORCE,
};

/* ---- enable, disable ---- */

static const struct tool_option enable_options[] = {
    { "granularity", OPT_GRANULARITY, "SIZE",
      "unit of tracking, a power of two, 4K to 2G (default: 64K)" },
    { "sync", OPT_SYNC, NULL,
      "track so that it also survives a power loss (patched QEMU)" },
    TOOL_COMMON_OPTIONS
};

static const struct tool enable_tool = {
    .name = "lbctl enable",
    .synopsis = "[OPTION]... DISK",
    .summary = "Turns livebackup on in the qcow2 image DISK.",
    .options = enable_options,
};

static const char *one_disk(int argc, char **argv)
{
    if (argc - optind != 1) {
        tool_usage("one DISK is wanted, %d given", argc - optind);
    }
    return argv[optind];
}

static unsigned granularity_bits(const char *text)
{
    uint64_t size = tool_parse_size(text, "--granularity");

    if (size < 4096 || size > UINT64_C(1) << 31 || (size & (size - 1)) != 0) {
        tool_usage("--granularity: '%s' is no power of two from 4K to 2G",
                   text);
    }
    return (unsigned)__builtin_ctzll(size);
}

static int enable(int argc, char **argv)
{
    unsigned bits = 0;
    uint32_t flags = 0;
    struct qlb_image *image;
    struct qlb_error err;
    const char *path;
    int option, status = 0;

    while ((option = tool_getopt(&enable_tool, argc, argv)) != -1) {
        if (option == OPT_GRANULARITY) {
            bits = granularity_bits(optarg);
        } else {
            flags |= QLB_EXT_SYNC;
        }
    }
    path = one_disk(argc, argv);
    image = qlb_image_open(path, QLB_IMAGE_WRITE, &err);
    if (image == NULL || qlb_image_enable(image, bits, flags, &err) < 0) {
        status = tool_fail(path, &err);
    }
    qlb_image_close(image);
    return status;
}

static const struct tool_option plain_options[] = { TOOL_COMMON_OPTIONS };

static const struct tool disable_tool = {
    .name = "lbctl disable",
    .synopsis = "DISK",
    .summary = "Turns livebackup off: removes its bitmaps and its extension. "
               "The next dump is a\nfull one.",
    .options = plain_options,
};

static int disable(int argc, char **argv)
{
    struct qlb_image *image;
    struct qlb_error err;
    const char *path;
    int status = 0;

    while (tool_getopt(&disable_tool, argc, argv) != -1) {
    }
    path = one_disk(argc, argv);
    image = qlb_image_open(path, QLB_IMAGE_WRITE, &err);
    if (image == NULL || qlb_image_disable(image, &err) < 0) {
        status = tool_fail(path, &err);
    }
    qlb_image_close(image);
    return status;
}

/* ---- status ---- */

static const struct tool_option status_options[] = {
    { "json", OPT_JSON, NULL, "print it in JSON" },
    TOOL_COMMON_OPTIONS
};

static const struct tool status_tool = {
    .name = "lbctl status",
    .synopsis = "[--json] DISK",
    .summary = "Shows whether livebackup is on, and each checkpoint: its time, "
               "label, whether it\nis confirmed, what changed since, and "
               "whether that is trusted.",
    .options = status_options,
};

static const char *const backup_states[] = { "none", "running", "interrupted",
                                             "broken" };

static json_t *json_trust(enum qlb_trust trust)
{
    json_t *object = json_object();

    json_object_set_new(object, "trusted", json_boolean(trust ==
                                                        QLB_TRUSTED));
    json_object_set_new(object, "keyword",
                        trust == QLB_TRUSTED
                            ? json_null()
                            : json_string(qlb_trust_keyword(trust)));
    json_object_set_new(object, "reason",
                        trust == QLB_TRUSTED
                            ? json_null()
                            : json_string(qlb_trust_reason(trust)));
    return object;
}

static json_t *json_checkpoint(struct qlb_image *image, unsigned i)
{
    const struct qlb_checkpoint *c = &qlb_image_ext(image)->checkpoints[i];
    json_t *object = json_trust(qlb_image_trust_since(image, i));
    struct qlb_error err;
    uint64_t changed;

    json_object_set_new(object, "uuid", tool_json_uuid(&c->uuid));
    json_object_set_new(object, "time", json_integer((json_int_t)c->time));
    json_object_set_new(object, "label", json_string(c->label));
    json_object_set_new(object, "confirmed", json_boolean(c->confirmed));
    json_object_set_new(object, "virtual_size",
                        json_integer((json_int_t)c->virtual_size));
    json_object_set_new(object, "changed_bytes",
        qlb_image_changed_bytes(image, i, &changed, &err) < 0
            ? json_null() : json_integer((json_int_t)changed));
    return object;
}

static json_t *json_backup(const struct qlb_ext *ext)
{
    json_t *object;

    if (ext->state == QLB_STATE_NONE) {
        return json_null();
    }
    object = json_object();
    json_object_set_new(object, "state",
                        json_string(backup_states[ext->state]));
    json_object_set_new(object, "set", tool_json_uuid(&ext->set_uuid));
    json_object_set_new(object, "begin",
                        json_integer((json_int_t)ext->begin_time));
    return object;
}

static int status_json(struct qlb_image *image, const char *path)
{
    const struct qlb_ext *ext = qlb_image_ext(image);
    const struct qlb_disk *disk = qlb_image_disk(image);
    json_t *object = json_trust(qlb_image_trust(image));
    json_t *checkpoints = json_array();

    json_object_set_new(object, "disk", json_string(path));
    json_object_set_new(object, "on", json_boolean(qlb_image_trust(image) !=
                                                   QLB_TRUST_OFF));
    /* Without its backing file the disk can't be opened, but told of. */
    json_object_set_new(object, "virtual_size",
                        disk == NULL ? json_null()
                                     : json_integer((json_int_t)
                                                    qlb_disk_size(disk)));
    if (ext != NULL) {
        json_object_set_new(object, "image_uuid",
                            tool_json_uuid(&ext->image_uuid));
        json_object_set_new(object, "granularity",
            json_integer((json_int_t)(UINT64_C(1) << ext->granularity_bits)));
        json_object_set_new(object, "sync",
                            json_boolean(ext->flags & QLB_EXT_SYNC));
        json_object_set_new(object, "backup", json_backup(ext));
        for (unsigned i = 0; i < ext->n_checkpoints; i++) {
            json_array_append_new(checkpoints, json_checkpoint(image, i));
        }
    }
    json_object_set_new(object, "checkpoints", checkpoints);
    return tool_print_json(object, false) < 0 ? QLB_E_RUNTIME : 0;
}

static void print_checkpoint(struct qlb_image *image, unsigned i)
{
    const struct qlb_checkpoint *c = &qlb_image_ext(image)->checkpoints[i];
    enum qlb_trust trust = qlb_image_trust_since(image, i);
    char uuid[QLB_UUID_TEXT], time[32], size[16] = "?";
    struct qlb_error err;
    uint64_t changed;

    if (qlb_image_changed_bytes(image, i, &changed, &err) == 0) {
        tool_format_size(changed, size);
    }
    printf("%s  %s  %-10s  %-11s  changed since: %-10s  %s\n",
           qlb_uuid_format(&c->uuid, uuid), tool_format_time(c->time, time),
           c->label, c->confirmed ? "confirmed" : "unconfirmed", size,
           trust == QLB_TRUSTED ? "trusted" : qlb_trust_keyword(trust));
    if (trust != QLB_TRUSTED && trust != qlb_image_trust(image)) {
        printf("  not trusted: %s\n", qlb_trust_reason(trust));
    }
}

/* Whether a backup is called running, and nobody runs it. */
static bool is_left(const struct qlb_ext *ext, const char *path)
{
    struct qlb_error err;
    struct qlb_image *image = NULL;

    if (ext->state == QLB_STATE_RUNNING) {
        image = qlb_image_open(path, 0, &err);
    }
    qlb_image_close(image);
    return image != NULL;
}

static int status_text(struct qlb_image *image, const char *path)
{
    const struct qlb_ext *ext = qlb_image_ext(image);
    enum qlb_trust trust = qlb_image_trust(image);
    char text[32];

    if (trust == QLB_TRUST_OFF) {
        printf("%s: livebackup is off\n", path);
    } else if (ext == NULL) {
        printf("%s: livebackup is on, not trusted: %s (%s)\n", path,
               qlb_trust_reason(trust), qlb_trust_keyword(trust));
    } else {
        printf("%s: livebackup is on, granularity %s%s\n", path,
               tool_format_size(UINT64_C(1) << ext->granularity_bits, text),
               ext->flags & QLB_EXT_SYNC ? ", sync" : "");
        if (trust != QLB_TRUSTED) {
            printf("%s: %s (%s)\n",
                   trust == QLB_TRUST_NO_CHECKPOINT ? "next dump: full"
                                                    : "not trusted",
                   qlb_trust_reason(trust), qlb_trust_keyword(trust));
        }
        if (ext->state != QLB_STATE_NONE) {
            printf("backup %s since %s%s\n", backup_states[ext->state],
                   tool_format_time(ext->begin_time, text),
                   is_left(ext, path)
                       ? ", but no QEMU has the image open; see lbdump "
                         "--interrupted" : "");
        }
        for (unsigned i = 0; i < ext->n_checkpoints; i++) {
            print_checkpoint(image, i);
        }
    }
    return tool_flush_stdout();
}

static int status(int argc, char **argv)
{
    struct qlb_image *image;
    struct qlb_error err;
    const char *path;
    bool json = false;
    int ret;

    while (tool_getopt(&status_tool, argc, argv) != -1) {
        json = true;
    }
    path = one_disk(argc, argv);
    /* A running QEMU may have it open: what is shown is of this moment. */
    image = qlb_image_open(path, QLB_IMAGE_NO_LOCK, &err);
    if (image == NULL) {
        return tool_fail(path, &err);
    }
    ret = json ? status_json(image, path) : status_text(image, path);
    qlb_image_close(image);
    return ret;
}

/* ---- opening for a change of checkpoints ---- */

/* An image whose list can be read; NULL with the status in *status. */
static struct qlb_image *open_list(const char *path, int *status)
{
    struct qlb_error err;
    struct qlb_image *image = qlb_image_open(path, QLB_IMAGE_WRITE, &err);

    if (image != NULL && qlb_image_ext(image) == NULL) {
        enum qlb_trust trust = qlb_image_trust(image);

        qlb_fail(&err, QLB_E_UNTRUSTED, "%s (%s)", qlb_trust_reason(trust),
                 qlb_trust_keyword(trust));
        qlb_image_close(image);
        image = NULL;
    }
    if (image == NULL) {
        *status = tool_fail(path, &err);
    }
    return image;
}

static int find_checkpoint(const struct qlb_image *image, const char *path,
                           const struct qlb_uuid *uuid, int *status)
{
    int i = qlb_ext_find(qlb_image_ext(image), uuid);
    char text[QLB_UUID_TEXT];

    if (i < 0) {
        tool_message("%s: the image has no checkpoint %s; 'lbctl status' "
                     "lists them", path, qlb_uuid_format(uuid, text));
        *status = QLB_E_UNTRUSTED;
    }
    return i;
}

/* ---- confirm ---- */

static const struct tool confirm_tool = {
    .name = "lbctl confirm",
    .synopsis = "DISK UUID ROOTDIGEST",
    .summary = "Confirms a checkpoint: its archive is known to be safe. UUID "
               "and ROOTDIGEST are\nwhat 'lbverify --receipt' prints where "
               "the archive arrived.",
    .options = plain_options,
};

/* Whether the text is the root digest of which the image knows the first
 * bytes. */
static bool root_matches(const char *text, const uint8_t known[8])
{
    static const uint8_t unknown[8];
    size_t length = strlen(text);
    char expected[17];

    if ((length != 32 && length != 64) ||
        strspn(text, "0123456789abcdefABCDEF") != length) {
        tool_usage("'%s' is no root digest", text);
    }
    qlb_hex(known, 8, expected);
    return memcmp(known, unknown, 8) == 0 ||
           strncasecmp(text, expected, 16) == 0;
}

static int confirm(int argc, char **argv)
{
    struct qlb_image *image;
    struct qlb_uuid uuid;
    struct qlb_error err;
    const char *path;
    int i, status = 0;

    while (tool_getopt(&confirm_tool, argc, argv) != -1) {
    }
    if (argc - optind != 3) {
        tool_usage("DISK, UUID and ROOTDIGEST are wanted");
    }
    path = argv[optind];
    uuid = tool_parse_uuid(argv[optind + 1], "UUID");
    root_matches(argv[optind + 2], (const uint8_t[8]) { 0 });
    image = open_list(path, &status);
    if (image == NULL) {
        return status;
    }
    i = find_checkpoint(image, path, &uuid, &status);
    if (i >= 0 && !root_matches(argv[optind + 2],
                                qlb_image_ext(image)->checkpoints[i].root)) {
        tool_message("%s: the root digest is not that of the archive of %s; "
                     "it did not arrive whole", path, argv[optind + 1]);
        status = QLB_E_DAMAGED;
    } else if (i >= 0 && qlb_image_confirm(image, (unsigned)i, &err) < 0) {
        status = tool_fail(path, &err);
    }
    qlb_image_close(image);
    return status;
}

/* ---- prune ---- */

static const struct tool_option prune_options[] = {
    { "keep", OPT_KEEP, "N",
      "keep the N newest confirmed ones of each label (default: 1)" },
    { "chain", OPT_CHAIN, "NAME", "prune only checkpoints of that label" },
    { "force", OPT_FORCE, NULL,
      "take away the newest confirmed one of its label, too" },
    TOOL_COMMON_OPTIONS
};

static const struct tool prune_tool = {
    .name = "lbctl prune",
    .synopsis = "[OPTION]... DISK [UUID]...",
    .summary = "Takes checkpoints away: those named, or those older than the "
               "newest confirmed\nones of their label. What changed since the "
               "others is not lost.",
    .options = prune_options,
};

/* How many confirmed checkpoints of the same label are newer than i. */
static unsigned confirmed_after(const struct qlb_ext *ext, unsigned i)
{
    unsigned n = 0;

    for (unsigned j = i + 1; j < ext->n_checkpoints; j++) {
        n += ext->checkpoints[j].confirmed &&
             strcmp(ext->checkpoints[j].label, ext->checkpoints[i].label) == 0;
    }
    return n;
}

/* Takes one away and says which. */
static int fold(struct qlb_image *image, const char *path, unsigned i)
{
    struct qlb_uuid uuid = qlb_image_ext(image)->checkpoints[i].uuid;
    char text[QLB_UUID_TEXT];
    struct qlb_error err;

    if (qlb_image_fold(image, i, &err) < 0) {
        return tool_fail(path, &err);
    }
    printf("%s: %s taken away\n", path, qlb_uuid_format(&uuid, text));
    return 0;
}

static int prune_by_age(struct qlb_image *image, const char *path,
                        const char *label, unsigned keep)
{
    unsigned i = 0;
    int status = 0;

    while (status == 0 && i < qlb_image_ext(image)->n_checkpoints) {
        const struct qlb_ext *ext = qlb_image_ext(image);

        if ((label != NULL &&
             strcmp(ext->checkpoints[i].label, label) != 0) ||
            confirmed_after(ext, i) < keep) {
            i++;
        } else {
            status = fold(image, path, i);
        }
    }
    return status;
}

/* What losing the newest confirmed checkpoint i of its label costs. */
static const char *loss(const struct qlb_ext *ext, unsigned i)
{
    for (unsigned j = 0; j < i; j++) {
        if (ext->checkpoints[j].confirmed &&
            strcmp(ext->checkpoints[j].label, ext->checkpoints[i].label) ==
                0) {
            return "the next incremental goes on from an older one";
        }
    }
    return "the next dump is a full one";
}

static int prune_named(struct qlb_image *image, const char *path,
                       const char *text, bool force)
{
    struct qlb_uuid uuid = tool_parse_uuid(text, "UUID");
    const struct qlb_ext *ext = qlb_image_ext(image);
    int status = 0;
    int i = find_checkpoint(image, path, &uuid, &status);

    if (i < 0) {
        return status;
    }
    if (!force &&
        i == qlb_ext_newest_confirmed(ext, ext->checkpoints[i].label)) {
        tool_message("%s: %s is the newest confirmed checkpoint of chain "
                     "'%s': without it %s; --force takes it away", path, text,
                     ext->checkpoints[i].label, loss(ext, (unsigned)i));
        return QLB_E_UNTRUSTED;
    }
    return fold(image, path, (unsigned)i);
}

static int prune(int argc, char **argv)
{
    const char *path, *label = NULL;
    unsigned keep = 0; /* not given */
    bool force = false;
    struct qlb_image *image;
    int option, status = 0;

    while ((option = tool_getopt(&prune_tool, argc, argv)) != -1) {
        if (option == OPT_KEEP) {
            keep = tool_parse_number(optarg, "--keep", 1, 32);
        } else if (option == OPT_CHAIN) {
            label = tool_parse_label(optarg, "--chain");
        } else {
            force = true;
        }
    }
    if (optind == argc) {
        tool_usage("a DISK is wanted");
    }
    path = argv[optind++];
    if (force && optind == argc) {
        tool_usage("--force wants the UUID of a checkpoint");
    }
    if ((keep != 0 || label != NULL) && optind < argc) {
        tool_usage("--keep and --chain choose checkpoints by age; they don't "
                   "go with a UUID");
    }
    for (int i = optind; i < argc; i++) {
        tool_parse_uuid(argv[i], "UUID");
    }
    image = open_list(path, &status);
    if (image == NULL) {
        return status;
    }
    if (optind == argc) {
        status = prune_by_age(image, path, label, keep == 0 ? 1 : keep);
    }
    for (; optind < argc && status == 0; optind++) {
        status = prune_named(image, path, argv[optind], force);
    }
    qlb_image_close(image);
    return status;
}

/* ---- recover ---- */

static const struct tool recover_tool = {
    .name = "lbctl recover",
    .synopsis = "DISK",
    .summary = "Mends what a crash left: frees leaked clusters, gives up an "
               "interrupted backup,\nand drops checkpoints that can't be "
               "trusted.",
    .options = plain_options,
};

/* 1: there was one. Locked as the image is, nobody needs it. */
static int remove_orig(const char *path, const struct qlb_image *image,
                       struct qlb_error *err)
{
    char *orig = qlb_live_default_orig(path);
    int ret;

    if (orig == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", path);
    }
    ret = qlb_live_remove_orig(orig, &qlb_image_ext(image)->image_uuid, err);
    free(orig);
    return ret;
}

static int print_recovery(const char *path, const struct qlb_image *image,
                          const struct qlb_recovery *recovery)
{
    struct qlb_error err;
    int removed = qlb_image_ext(image) == NULL
                      ? 0 : remove_orig(path, image, &err);

    printf("%s: %" PRIu64 " leaked clusters freed, %u checkpoints dropped%s%s\n",
           path, recovery->freed_clusters, recovery->dropped_checkpoints,
           recovery->cleared_state ? ", an interrupted backup given up" : "",
           removed > 0 ? ", its originals deleted" : "");
    return removed < 0 ? tool_fail(path, &err) : tool_flush_stdout();
}

static int recover(int argc, char **argv)
{
    struct qlb_recovery recovery;
    struct qlb_image *image;
    struct qlb_error err;
    const char *path;
    int status = 0;

    while (tool_getopt(&recover_tool, argc, argv) != -1) {
    }
    path = one_disk(argc, argv);
    image = qlb_image_open(path, QLB_IMAGE_WRITE, &err);
    if (image == NULL || qlb_image_recover(image, &recovery, &err) < 0) {
        status = tool_fail(path, &err);
    } else {
        status = print_recovery(path, image, &recovery);
    }
    qlb_image_close(image);
    return status;
}

/* ---- the program ---- */

static const struct {
    const struct tool *tool;
    int (*run)(int argc, char **argv);
} commands[] = {
    { &enable_tool, enable },   { &disable_tool, disable },
    { &status_tool, status },   { &confirm_tool, confirm },
    { &prune_tool, prune },     { &recover_tool, recover },
};

enum { N_COMMANDS = sizeof(commands) / sizeof(commands[0]) };

static const struct tool lbctl_tool = {
    .name = "lbctl",
    .synopsis = "COMMAND [OPTION]... DISK [ARGUMENT]...\n\n"
                "Commands:\n"
                "  enable    turn livebackup on\n"
                "  disable   turn it off\n"
                "  status    show it and its checkpoints\n"
                "  confirm   confirm a checkpoint whose archive is safe\n"
                "  prune     take old checkpoints away\n"
                "  recover   mend what a crash left",
    .summary = "Manages livebackup of a qcow2 image. 'lbctl COMMAND --help' "
               "tells more.",
    .options = plain_options,
};

int main(int argc, char **argv)
{
    tool_begin("lbctl");
    if (argc < 2 || argv[1][0] == '-') {
        tool_getopt(&lbctl_tool, argc, argv);
        tool_usage("a COMMAND is wanted: enable, disable, status, confirm, "
                   "prune or recover");
    }
    for (unsigned i = 0; i < N_COMMANDS; i++) {
        if (strcmp(strchr(commands[i].tool->name, ' ') + 1, argv[1]) == 0) {
            return commands[i].run(argc - 1, argv + 1);
        }
    }
    tool_usage("unknown command '%s'", argv[1]);
}
