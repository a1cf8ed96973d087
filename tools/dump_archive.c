/* The archive that a dump makes: header, output, messages.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "dump_archive.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* ---- the header ---- */

void dump_archive_begin(struct dump_archive *archive,
                        const struct dump_request *request,
                        uint64_t virtual_size)
{
    struct qlb_lbz_header *header = &archive->header;

    *header = (struct qlb_lbz_header) {
        .digest = request->dump.digest,
        .virtual_size = virtual_size,
        .clip = QLB_LBZ_NO_CLIP,
        .covered = archive->covered,
    };
    snprintf(header->label, sizeof(header->label), "%s", request->label);
}

/* Checkpoints of the same label between the parent and this one; the clip is
 * the smallest size in between, where the disk has grown since. */
void dump_archive_increment(struct dump_archive *archive,
                            const struct qlb_ext *ext, unsigned since,
                            unsigned until, uint64_t smallest)
{
    struct qlb_lbz_header *header = &archive->header;
    const struct qlb_checkpoint *parent = &ext->checkpoints[since];

    if (smallest > header->virtual_size) {
        smallest = header->virtual_size;
    }
    header->incremental = true;
    header->parent = parent->uuid;
    for (unsigned i = since + 1; i < until; i++) {
        const struct qlb_checkpoint *c = &ext->checkpoints[i];

        if (c->virtual_size < smallest) {
            smallest = c->virtual_size;
        }
        if (strcmp(c->label, header->label) == 0) {
            archive->covered[header->n_covered++] = c->uuid;
        }
    }
    if (smallest < header->virtual_size && smallest < parent->virtual_size) {
        header->clip = smallest;
    }
}

/* ---- the output ---- */

int dump_archive_open(struct dump_archive *archive,
                      const struct dump_request *request,
                      struct qlb_error *err)
{
    if (archive->path == NULL) {
        archive->out = tool_open_stdout(err);
    } else if (request->create != NULL) {
        archive->out = request->create(request->create_opaque, archive->path,
                                       err);
    } else {
        archive->out = qlb_outfile_create(archive->path,
                                          request->force ? QLB_OUTFILE_FORCE
                                                         : 0, err);
    }
    return archive->out == NULL ? -1 : 0;
}

bool dump_archive_stat(const struct dump_archive *archive, struct stat *st)
{
    return (archive->path != NULL ? stat(archive->path, st)
                                  : fstat(STDOUT_FILENO, st)) == 0;
}

int dump_archive_is_disk(const struct dump_archive *archive,
                         struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_USAGE, "%s: is the disk itself, or a file that "
                    "it consists of", archive->path != NULL
                                          ? archive->path : "standard output");
}

bool dump_archive_is_safe(const struct dump_archive *archive,
                          const struct dump_request *request)
{
    return qlb_outfile_is_stored(archive->out) || request->trust_pipe;
}

bool dump_archive_is_named(const struct dump_archive *archive,
                           const struct qlb_error *err)
{
    const char *path = archive->path != NULL ? archive->path
                                             : "standard output";

    return tool_names(err, path) ||
           (archive->out != NULL &&
            tool_names(err, qlb_outfile_name(archive->out)));
}

void dump_archive_close(struct dump_archive *archive)
{
    qlb_lbz_writer_free(archive->writer);
    qlb_outfile_close(archive->out);
}

/* ---- ranges ---- */

int dump_whole_disk(void *archive, uint64_t offset, uint64_t *start,
                    uint64_t *length, struct qlb_error *err)
{
    const struct dump_archive *a = archive;

    (void)err;
    *start = offset;
    *length = a->header.virtual_size - offset;
    return 0;
}

void dump_cut_range(uint64_t size, uint64_t parent_size, uint64_t offset,
                    uint64_t *start, uint64_t *length)
{
    uint64_t last = size - size % QLB_LBZ_BLOCK;

    *length = 0;
    if (last < size && parent_size > size && offset < size) {
        *start = offset > last ? offset : last;
        *length = size - *start;
    }
}

/* ---- messages ---- */

void dump_hint_at_auto(struct qlb_error *err)
{
    size_t used = strlen(err->message);

    snprintf(err->message + used, sizeof(err->message) - used,
             "; make a full dump, or use --auto");
}

void dump_say_auto(const char *disk, bool incremental, const char *reason)
{
    if (incremental) {
        tool_message("%s: incremental: the tracked changes are trusted", disk);
    } else {
        tool_message("%s: full: %s", disk, reason);
    }
}

void dump_note_unconfirmed(const char *disk,
                           const struct dump_archive *archive,
                           const char *also)
{
    char uuid[QLB_UUID_TEXT], root[2 * QLB_DIGEST_MAX + 1];

    qlb_uuid_format(&archive->header.uuid, uuid);
    qlb_hex(archive->root, qlb_digest_size(archive->header.digest), root);
    tool_message("%s: the archive went into a pipe, so its checkpoint is not "
                 "confirmed; when it is safe%s: lbctl confirm %s %s %s",
                 disk, also, disk, uuid, root);
}

static void add_checkpoint_fields(json_t *summary,
                                  const struct dump_archive *archive,
                                  bool checkpoint)
{
    const struct qlb_lbz_header *header = &archive->header;

    json_object_set_new(summary, "uuid", tool_json_uuid(&header->uuid));
    json_object_set_new(summary, "parent", tool_json_uuid(&header->parent));
    json_object_set_new(summary, "image_uuid",
                        tool_json_uuid(&header->image_uuid));
    json_object_set_new(summary, "label", json_string(header->label));
    json_object_set_new(summary, "time",
                        json_integer((json_int_t)header->time));
    json_object_set_new(summary, "checkpoint", json_boolean(checkpoint));
    json_object_set_new(summary, "confirmed",
                        json_boolean(archive->confirmed));
}

json_t *dump_summary(const char *disk, const struct dump_archive *archive,
                     bool checkpoint, const char *reason)
{
    const struct qlb_lbz_header *header = &archive->header;
    const struct qlb_lbz_totals *totals = &archive->totals;
    json_t *summary = json_object();

    json_object_set_new(summary, "disk", json_string(disk));
    json_object_set_new(summary, "archive",
                        archive->path == NULL ? json_null()
                                              : json_string(archive->path));
    json_object_set_new(summary, "kind",
                        json_string(header->incremental ? "incremental"
                                                        : "full"));
    json_object_set_new(summary, "reason",
                        reason[0] == '\0' ? json_null()
                                          : json_string(reason));
    add_checkpoint_fields(summary, archive, checkpoint);
    json_object_set_new(summary, "virtual_size",
                        json_integer((json_int_t)header->virtual_size));
    json_object_set_new(summary, "data_bytes",
        json_integer((json_int_t)(totals->data_blocks * QLB_LBZ_BLOCK)));
    json_object_set_new(summary, "zero_bytes",
        json_integer((json_int_t)(totals->zero_blocks * QLB_LBZ_BLOCK)));
    json_object_set_new(summary, "archive_bytes",
                        json_integer((json_int_t)totals->archive_size));
    json_object_set_new(summary, "root_digest",
        tool_json_hex(archive->root, qlb_digest_size(header->digest)));
    json_object_set_new(summary, "seconds", json_real(archive->seconds));
    return summary;
}
