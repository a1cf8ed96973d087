/* lbmerge: merges a chain of archives into one.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "merge_chain.h"

enum {
    OPT_AT = TOOL_OPT_LONG, OPT_COMPACT, OPT_FORCE, OPT_LEVEL, OPT_THREADS,
    OPT_PROGRESS, OPT_JSON, OPT_INDEX_ONLY,
};

static const struct tool_option options[] = {
    { "at", OPT_AT, "UUID", "end with that archive (where there are several)" },
    { "compact", OPT_COMPACT, NULL,
      "rewrite all frames that hold superseded blocks" },
    { "index-only", OPT_INDEX_ONLY, NULL,
      "write the digests alone, for lbdump --rescan and --audit" },
    { "output", 'o', "FILE",
      "write to FILE, whole or not at all; it may be one of the inputs" },
    { "force", OPT_FORCE, NULL, "replace FILE where it exists" },
    { "level", OPT_LEVEL, "N",
      "zstd level of frames that are rewritten (default: 1)" },
    { "threads", OPT_THREADS, "N", "threads (default: one per processor)" },
    { "progress", OPT_PROGRESS, NULL, "show progress, also without a terminal" },
    { "quiet", 'q', NULL, "show neither progress nor notes" },
    { "json", OPT_JSON, NULL, "print a summary in JSON" },
    TOOL_COMMON_OPTIONS
};

static const struct tool tool = {
    .name = "lbmerge",
    .synopsis = "[OPTION]... ARCHIVE... > MERGED\n"
                "       lbmerge [OPTION]... -o MERGED ARCHIVE...",
    .summary = "Merges a full archive and incrementals into one full archive, "
               "or incrementals\nalone into one incremental. Parent links "
               "order them, not their arguments.",
    .options = options,
};

struct lbmerge {
    const char *const *inputs;
    unsigned n_inputs;
    const char *output;
    bool force, quiet, json, index_only;
    const char *content_option; /* of no sense for an index; NULL: none given */
    bool has_at;
    struct qlb_uuid at;
    struct merge_options options;

    struct qlb_chain *chain;
    struct qlb_outfile *out;
    struct merge_result result;
};

/* ---- set-up ---- */

static bool same_file(const struct stat *a, const char *path)
{
    struct stat b;

    return stat(path, &b) == 0 && a->st_dev == b.st_dev &&
           a->st_ino == b.st_ino;
}

/* Whether the output is one of the inputs, which it may replace. */
static bool output_is_input(const struct lbmerge *m, const struct stat *st)
{
    for (unsigned i = 0; i < m->n_inputs; i++) {
        if (same_file(st, m->inputs[i])) {
            return true;
        }
    }
    return false;
}

/* Before anything is read: the shell has emptied such a file already, so that
 * what reading it says would mislead. */
static int check_stdout(const struct lbmerge *m, struct qlb_error *err)
{
    struct stat st;

    if (m->output == NULL && fstat(STDOUT_FILENO, &st) == 0 &&
        S_ISREG(st.st_mode) && output_is_input(m, &st)) {
        return qlb_fail(err, QLB_E_USAGE, "standard output is one of the "
                        "inputs; use -o FILE to replace it");
    }
    return 0;
}

/* An index may replace the index that it was made from, but no archive, whose
 * content would be lost. */
static int check_replaced(const struct lbmerge *m, const struct stat *st,
                          struct qlb_error *err)
{
    for (unsigned i = 0; i < qlb_chain_members(m->chain); i++) {
        const struct qlb_lbz_reader *member = qlb_chain_member(m->chain, i);

        if (qlb_lbz_reader_header(member)->index &&
            same_file(st, qlb_lbz_reader_name(member))) {
            return 0;
        }
    }
    return qlb_fail(err, QLB_E_USAGE, "%s: is one of the archives, whose "
                    "content would be lost; name another file for the index",
                    m->output);
}

static int open_output(struct lbmerge *m, struct qlb_error *err)
{
    unsigned flags = m->force ? QLB_OUTFILE_FORCE : 0;
    struct stat st;

    if (m->output == NULL) {
        m->out = tool_open_stdout(err);
    } else {
        if (stat(m->output, &st) == 0 && output_is_input(m, &st)) {
            if (m->index_only && check_replaced(m, &st, err) < 0) {
                return -1;
            }
            flags |= QLB_OUTFILE_FORCE;
        }
        m->out = qlb_outfile_create(m->output, flags, err);
    }
    return m->out == NULL ? -1 : 0;
}

static void release(struct lbmerge *m)
{
    qlb_outfile_close(m->out);
    qlb_chain_close(m->chain);
}

static void note_unused(const struct lbmerge *m)
{
    const char *path;

    for (unsigned i = 0; !m->quiet &&
         (path = qlb_chain_unused(m->chain, i)) != NULL; i++) {
        tool_message("%s: not needed, left out", path);
    }
}

static int merge(struct lbmerge *m, struct qlb_error *err)
{
    if (check_stdout(m, err) < 0) {
        return -1;
    }
    m->chain = qlb_chain_open(m->inputs, m->n_inputs,
                              m->has_at ? &m->at : NULL,
                              m->index_only ? QLB_CHAIN_ALLOW_INDEX : 0, err);
    if (m->chain == NULL) {
        return -1;
    }
    note_unused(m);
    if (open_output(m, err) < 0) {
        return -1;
    }
    if ((m->index_only
             ? merge_index(m->chain, m->out, &m->result, err)
             : merge_chain(m->chain, m->out, &m->options, &m->result,
                           err)) < 0) {
        return -1;
    }
    return qlb_outfile_commit(m->out, err);
}

static int print_summary(const struct lbmerge *m)
{
    const struct qlb_lbz_header *header = qlb_chain_header(m->chain);
    json_t *summary = json_object();

    json_object_set_new(summary, "archive",
                        m->output == NULL ? json_null()
                                          : json_string(m->output));
    json_object_set_new(summary, "kind",
        json_string(header->incremental ? "incremental" : "full"));
    json_object_set_new(summary, "index", json_boolean(m->index_only));
    json_object_set_new(summary, "members",
        json_integer((json_int_t)qlb_chain_members(m->chain)));
    json_object_set_new(summary, "uuid", tool_json_uuid(&header->uuid));
    json_object_set_new(summary, "parent", tool_json_uuid(&header->parent));
    json_object_set_new(summary, "virtual_size",
                        json_integer((json_int_t)header->virtual_size));
    json_object_set_new(summary, "frames_moved",
                        json_integer((json_int_t)m->result.moved));
    json_object_set_new(summary, "frames_rewritten",
                        json_integer((json_int_t)m->result.rewritten));
    json_object_set_new(summary, "archive_bytes",
                        json_integer((json_int_t)m->result.totals.archive_size));
    json_object_set_new(summary, "root_digest",
                        tool_json_hex(m->result.root,
                                      qlb_digest_size(header->digest)));
    return tool_print_json(summary, m->output == NULL);
}

static void parse_option(struct lbmerge *m, int option)
{
    switch (option) {
    case OPT_AT:
        m->has_at = true;
        m->at = tool_parse_uuid(optarg, "--at");
        break;
    case OPT_COMPACT:
        m->content_option = "compact";
        m->options.compact = true;
        break;
    case OPT_INDEX_ONLY:
        m->index_only = true;
        break;
    case 'o':
        m->output = optarg;
        break;
    case OPT_FORCE:
        m->force = true;
        break;
    case OPT_LEVEL:
        m->content_option = "level";
        m->options.level = (int)tool_parse_number(optarg, "--level", 1, 19);
        break;
    case OPT_THREADS:
        m->options.threads = tool_parse_number(optarg, "--threads", 1, 256);
        break;
    case OPT_PROGRESS:
        m->options.progress = PROGRESS_ON;
        break;
    case 'q':
        m->quiet = true;
        break;
    case OPT_JSON:
        m->json = true;
        break;
    }
}

static void parse_options(struct lbmerge *m, int argc, char **argv)
{
    int option;

    while ((option = tool_getopt(&tool, argc, argv)) != -1) {
        parse_option(m, option);
    }
    if (m->quiet) {
        m->options.progress = PROGRESS_OFF;
    }
    if (optind == argc) {
        tool_usage("at least one ARCHIVE is wanted");
    }
    if (m->index_only && m->content_option != NULL) {
        tool_usage("--%s is for content; it excludes --index-only",
                   m->content_option);
    }
    m->inputs = (const char *const *)&argv[optind];
    m->n_inputs = (unsigned)(argc - optind);
    if (m->output == NULL && isatty(STDOUT_FILENO)) {
        tool_usage("an archive is not written to a terminal; redirect it, or "
                   "use -o FILE");
    }
}

int main(int argc, char **argv)
{
    struct lbmerge m = {
        .options = { .level = 1, .threads = tool_default_threads() },
    };
    struct qlb_error err;
    int status = 0;

    tool_begin("lbmerge");
    parse_options(&m, argc, argv);
    if (merge(&m, &err) < 0) {
        status = tool_fail(NULL, &err);
        tool_discard_stdout(m.output == NULL ? m.out : NULL);
    } else if (m.json && print_summary(&m) < 0) {
        status = QLB_E_RUNTIME;
    }
    release(&m);
    return status;
}
