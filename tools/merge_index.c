/* The index of a chain of archives: its digests without its content.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "merge_chain.h"

#include <string.h>

static int write_page(struct qlb_lbz_writer *writer,
                      const struct qlb_chain_page *page, struct qlb_error *err)
{
    uint64_t start = page->number * QLB_LBZ_PAGE;

    for (unsigned i = 0; i < page->n_frames; i++) {
        const struct qlb_lbz_entry *entry = &page->frames[i].entry;

        if (qlb_lbz_writer_digests(
                writer, start + (uint64_t)entry->first * QLB_LBZ_BLOCK,
                entry->n_blocks, entry->live, entry->block_digests,
                err) < 0) {
            return -1;
        }
    }
    for (unsigned i = 0; i < page->n_runs; i++) {
        const struct qlb_lbz_run *run = &page->runs[i];

        if (qlb_lbz_writer_zero(writer,
                                start + (uint64_t)run->first * QLB_LBZ_BLOCK,
                                run->count, err) < 0) {
            return -1;
        }
    }
    return 0;
}

static int write_index(struct qlb_chain *chain, struct qlb_lbz_writer *writer,
                       struct merge_result *result, struct qlb_error *err)
{
    const struct qlb_chain_page *page;
    int ret;

    while ((ret = qlb_chain_next_page(chain, &page, err)) > 0) {
        if (tool_stop) {
            return qlb_fail(err, QLB_E_RUNTIME, "interrupted");
        }
        if (write_page(writer, page, err) < 0) {
            return -1;
        }
    }
    if (ret < 0 || qlb_lbz_writer_seal(writer, result->root, err) < 0) {
        return -1;
    }
    return qlb_lbz_writer_finish(writer, &result->totals, err);
}

int merge_index(struct qlb_chain *chain, struct qlb_outfile *out,
                struct merge_result *result, struct qlb_error *err)
{
    struct qlb_lbz_header header = *qlb_chain_header(chain);
    struct qlb_lbz_writer *writer;
    int ret = -1;

    memset(result, 0, sizeof(*result));
    header.index = true;
    writer = qlb_lbz_writer_new(out, &header, err);
    if (writer != NULL) {
        ret = write_index(chain, writer, result, err);
    }
    qlb_lbz_writer_free(writer);
    return ret;
}
