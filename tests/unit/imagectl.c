/* Changes the checkpoints of an image as the tools do, one step at a time, for
 * tests of crashes:
 *
 *     imagectl enable|enable-sync IMAGE [GRANULARITY_BITS]
 *     imagectl disable|recover|status IMAGE
 *     imagectl add|add-drop|add-undo IMAGE UUID LABEL
 *     imagectl confirm|fold|changes IMAGE INDEX
 *     imagectl allocate IMAGE COUNT    (reserve clusters, for nothing)
 *
 * status prints one line of JSON; changes a line "OFFSET LENGTH" for each
 * range. The exit status is the library's error code.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "image.h"
#include "qcow2_alloc.h"

static int print_status(struct qlb_image *image, struct qlb_error *err)
{
    const struct qlb_ext *ext = qlb_image_ext(image);

    printf("{\"trust\": \"%s\"", qlb_trust_keyword(qlb_image_trust(image)));
    if (ext != NULL) {
        printf(", \"generation\": %" PRIu64 ", \"state\": %d, "
               "\"checkpoints\": [", ext->generation, (int)ext->state);
        for (unsigned i = 0; i < ext->n_checkpoints; i++) {
            char text[QLB_UUID_TEXT];
            uint64_t bytes;

            if (qlb_image_changed_bytes(image, i, &bytes, err) < 0) {
                return -1;
            }
            printf("%s{\"uuid\": \"%s\", \"label\": \"%s\", "
                   "\"confirmed\": %s, \"trust\": \"%s\", \"changed\": %"
                   PRIu64 "}", i > 0 ? ", " : "",
                   qlb_uuid_format(&ext->checkpoints[i].uuid, text),
                   ext->checkpoints[i].label,
                   ext->checkpoints[i].confirmed ? "true" : "false",
                   qlb_trust_keyword(qlb_image_trust_since(image, i)), bytes);
        }
        printf("]");
    }
    printf("}\n");
    return 0;
}

static int print_changes(struct qlb_image *image, unsigned i,
                         struct qlb_error *err)
{
    struct qlb_changes *changes = qlb_image_changes(image, i, err);
    uint64_t offset = 0, length = 0;
    int ret;

    if (changes == NULL) {
        return -1;
    }
    do {
        offset += length;
        ret = qlb_changes_next(changes, offset, &offset, &length, err);
        if (ret == 0 && length > 0) {
            printf("%" PRIu64 " %" PRIu64 "\n", offset, length);
        }
    } while (ret == 0 && length > 0);
    qlb_changes_free(changes);
    return ret;
}

static int recover(struct qlb_image *image, struct qlb_error *err)
{
    struct qlb_recovery recovery;

    if (qlb_image_recover(image, &recovery, err) < 0) {
        return -1;
    }
    printf("dropped %u freed %" PRIu64 " cleared %d\n",
           recovery.dropped_checkpoints, recovery.freed_clusters,
           recovery.cleared_state);
    return 0;
}

static int add(struct qlb_image *image, const char *verb, char **argv,
               struct qlb_error *err)
{
    struct qlb_checkpoint checkpoint = { .time = 1700000000 };

    if (!qlb_uuid_parse(argv[0], &checkpoint.uuid)) {
        return qlb_fail(err, QLB_E_USAGE, "bad UUID");
    }
    snprintf(checkpoint.label, sizeof(checkpoint.label), "%s", argv[1]);
    if (qlb_image_add_checkpoint(image, &checkpoint,
                                 strcmp(verb, "add-drop") == 0, err) < 0) {
        return -1;
    }
    return strcmp(verb, "add-undo") == 0 ? qlb_image_undo_add(image, err) : 0;
}

static int allocate(const char *path, const char *count,
                    struct qlb_error *err)
{
    struct qlb_blkio *io = qlb_blkio_open(path, QLB_BLKIO_WRITE, err);
    struct qlb_qcow2_header *header =
        io ? qlb_qcow2_header_read(io, true, err) : NULL;
    struct qlb_alloc *alloc =
        header ? qlb_alloc_open(io, header, err) : NULL;
    int ret = alloc == NULL ? -1 : 0;
    uint64_t offset;

    for (unsigned long n = strtoul(count, NULL, 10); n > 0 && ret == 0; n--) {
        ret = qlb_alloc_clusters(alloc, 1, &offset, err);
    }
    if (ret == 0) {
        ret = qlb_alloc_commit(alloc, err);
    }
    qlb_alloc_close(alloc);
    qlb_qcow2_header_free(header);
    qlb_blkio_close(io);
    return ret;
}

static int run(struct qlb_image *image, const char *verb, int argc,
               char **argv, struct qlb_error *err)
{
    unsigned number = argc > 0 ? (unsigned)strtoul(argv[0], NULL, 10) : 0;

    if (strncmp(verb, "enable", 6) == 0) {
        return qlb_image_enable(image, number,
                                strcmp(verb, "enable-sync") == 0
                                    ? QLB_EXT_SYNC : 0, err);
    }
    if (strcmp(verb, "disable") == 0) {
        return qlb_image_disable(image, err);
    }
    if (strcmp(verb, "recover") == 0) {
        return recover(image, err);
    }
    if (strcmp(verb, "status") == 0) {
        return print_status(image, err);
    }
    if (strncmp(verb, "add", 3) == 0 && argc == 2) {
        return add(image, verb, argv, err);
    }
    if (strcmp(verb, "confirm") == 0 && argc == 1) {
        return qlb_image_confirm(image, number, err);
    }
    if (strcmp(verb, "fold") == 0 && argc == 1) {
        return qlb_image_fold(image, number, err);
    }
    if (strcmp(verb, "changes") == 0 && argc == 1) {
        return print_changes(image, number, err);
    }
    return qlb_fail(err, QLB_E_USAGE, "unknown command");
}

int main(int argc, char **argv)
{
    struct qlb_error err = { .code = QLB_OK };
    struct qlb_image *image = NULL;
    unsigned flags;
    int ret;

    if (argc < 3) {
        fprintf(stderr, "imagectl: COMMAND IMAGE [ARGUMENT...]\n");
        return QLB_E_USAGE;
    }
    flags = strcmp(argv[1], "status") == 0 || strcmp(argv[1], "changes") == 0
                ? 0 : QLB_IMAGE_WRITE;
    if (strcmp(argv[1], "allocate") == 0 && argc == 4) {
        ret = allocate(argv[2], argv[3], &err);
    } else {
        image = qlb_image_open(argv[2], flags, &err);
        ret = image == NULL ? -1
                            : run(image, argv[1], argc - 3, argv + 3, &err);
    }
    qlb_image_close(image);
    if (ret < 0) {
        fprintf(stderr, "imagectl: %s\n", err.message);
        return (int)err.code;
    }
    return 0;
}
