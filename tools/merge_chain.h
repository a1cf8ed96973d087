/* Merging a chain of archives into one, of lbmerge and lbvm; or its digests
 * into an index.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef MERGE_CHAIN_H
#define MERGE_CHAIN_H

#include "tool.h"

struct merge_options {
    bool compact; /* rewrite every frame that holds a superseded block */
    int level;    /* of frames that are rewritten */
    unsigned threads;
    enum tool_progress_mode progress;
};

struct merge_result {
    uint64_t moved, rewritten; /* frames */
    struct qlb_lbz_totals totals;
    uint8_t root[QLB_DIGEST_MAX];
};

/* Writes the archive that stands for the chain, which is read to its end. The
 * output is complete then, but not committed. */
int merge_chain(struct qlb_chain *chain, struct qlb_outfile *out,
                const struct merge_options *options,
                struct merge_result *result, struct qlb_error *err);

/* Writes the index of the chain, of which only index pages are read. */
int merge_index(struct qlb_chain *chain, struct qlb_outfile *out,
                struct merge_result *result, struct qlb_error *err);

#endif
