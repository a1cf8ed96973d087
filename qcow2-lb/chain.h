/* A chain of archives read as one state (docs/lbz-format.md, "Chains and
 * merging").
 *
 * Members are ordered by their parent links, whatever the order of the
 * arguments. The newest wins block by block; frames of older members are
 * given with the live mask that remains. A chain holds one page of one member
 * at a time, and a descriptor of each: the soft limit of the process's
 * descriptors is raised where it is too low for that.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_CHAIN_H
#define QLB_CHAIN_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"
#include "lbz_reader.h"

struct qlb_chain;

enum qlb_chain_flags {
    QLB_CHAIN_NEED_FULL = 1, /* QLB_E_UNTRUSTED where the oldest member is an
                                incremental (its parent is named) */
    QLB_CHAIN_ALLOW_INDEX = 2, /* members may be indexes: no content is read */
};

/* Opens the archives and orders them. at: the member to end with (NULL: the
 * only leaf). QLB_E_UNTRUSTED, naming files and UUIDs, where a parent is
 * missing, an archive belongs to another image, two archives have the same
 * UUID (but a full one stands for an incremental), there are several leaves
 * (those covered by another member aside; all leaves are listed with time),
 * the links run in a circle, or `at` is not among them. Archives that are not
 * on the path to the leaf are left out.
 * QLB_E_USAGE where members have different digest algorithms, or one is an
 * index (and that is not allowed). QLB_E_DAMAGED as
 * the reader. Messages about one archive begin with its path. */
struct qlb_chain *qlb_chain_open(const char *const *paths, unsigned n_paths,
                                 const struct qlb_uuid *at, unsigned flags,
                                 struct qlb_error *err);
void qlb_chain_close(struct qlb_chain *chain);

unsigned qlb_chain_members(const struct qlb_chain *chain);
/* 0 is the oldest. */
const struct qlb_lbz_reader *qlb_chain_member(const struct qlb_chain *chain,
                                              unsigned i);

/* Archives that were given but are not on the path; NULL at the end. */
const char *qlb_chain_unused(const struct qlb_chain *chain, unsigned i);

/* Header of the archive that stands for the whole chain (merge rules); an
 * index where a member is one. */
const struct qlb_lbz_header *qlb_chain_header(const struct qlb_chain *chain);

struct qlb_chain_frame {
    unsigned member;
    struct qlb_lbz_entry entry; /* as in the member's page, but `live` is the
                                   mask that is left, and block_digests points
                                   to `digests`, digest to
                                   `compressed_digest` */
    uint8_t compressed_digest[QLB_DIGEST_MAX];
    uint8_t digests[QLB_LBZ_STRIPE_BLOCKS * QLB_DIGEST_MAX];
};

struct qlb_chain_page {
    uint64_t number;
    unsigned n_frames, n_runs;
    struct qlb_chain_frame *frames; /* ordered by first live block */
    struct qlb_lbz_run *runs;       /* ascending, joined; none in a full */
};

/* The next page that has content: 1, 0 at the end, -1. The page belongs to
 * the chain and is valid until the next call. */
int qlb_chain_next_page(struct qlb_chain *chain,
                        const struct qlb_chain_page **page,
                        struct qlb_error *err);

/* The next page is the first that has content at or after `number`, be that
 * further on or back. */
void qlb_chain_seek(struct qlb_chain *chain, uint64_t number);

/* The number of the first page at or after `number` that some member has
 * (UINT64_MAX: none); no page is read. */
int qlb_chain_find_page(struct qlb_chain *chain, uint64_t number,
                        uint64_t *found, struct qlb_error *err);

/* That page alone, so that damage to others does not matter: 1, and *page is
 * valid as above (it may be empty); 0: no member has it, and none has one
 * before *next (UINT64_MAX: the end); -1. */
int qlb_chain_page_at(struct qlb_chain *chain, uint64_t number,
                      const struct qlb_chain_page **page, uint64_t *next,
                      struct qlb_error *err);

#endif
