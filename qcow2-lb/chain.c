/* A chain of archives read as one state.
 *
 * A page of the state is made from the newest member down: a mask of the
 * blocks that are decided stands for all that is newer, so one page of one
 * member is in memory at a time, whatever the number of members. Behind each
 * member its floor decides the blocks above it: what is older is not seen
 * through them. Pages that are decided are not even loaded from the members
 * below.
 *
 * Each member keeps its descriptor; where the soft limit of descriptors is
 * too low for that, it is raised as far as the hard one allows.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "chain.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "checked.h"

#define PAGE_STRIPES (QLB_LBZ_PAGE_BLOCKS / QLB_LBZ_STRIPE_BLOCKS)
#define NO_PAGE UINT64_MAX
#define NONE UINT32_MAX
/* Descriptors that are left to everything else. */
#define SPARE_DESCRIPTORS 64

/* An archive that was given. */
struct given {
    char *path;
    struct qlb_lbz_reader *reader;
    const struct qlb_lbz_header *header;
    unsigned parent; /* index, NONE: not given (or a full) */
    bool has_child, covered, on_path;
    bool replaced; /* by a full archive of the same state */
};

struct member {
    const char *path;
    struct qlb_lbz_reader *reader; /* owned by the chain's `given` */
    uint64_t floor;                /* bytes */
    uint64_t next;   /* first page at or after the chain's; NO_PAGE: none */
};

struct qlb_chain {
    struct given *given;
    unsigned n_given;
    struct member *members;
    unsigned n_members;
    const char **unused;
    unsigned n_unused;
    struct qlb_lbz_header header;
    size_t digest_size;

    uint64_t cursor;           /* the next page to look at */
    struct qlb_lbz_page source; /* of the member in turn */
    struct qlb_chain_page page;
    unsigned frames_capacity;
    uint16_t decided[PAGE_STRIPES], zero[PAGE_STRIPES];
};

static int out_of_memory(struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_RUNTIME, "out of memory");
}

/* ---- opening ---- */

static void allow_descriptors(unsigned n)
{
    rlim_t wanted = (rlim_t)n + SPARE_DESCRIPTORS;
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < wanted) {
        limit.rlim_cur = limit.rlim_max < wanted ? limit.rlim_max : wanted;
        /* If it can't be raised, opening tells. */
        (void)setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static int open_given(struct qlb_chain *chain, const char *const *paths,
                      unsigned n_paths, struct qlb_error *err)
{
    if (n_paths == 0) {
        return qlb_fail(err, QLB_E_USAGE, "no archive was given");
    }
    allow_descriptors(n_paths);
    chain->given = calloc(n_paths, sizeof(*chain->given));
    chain->members = calloc(n_paths, sizeof(*chain->members));
    chain->unused = calloc(n_paths, sizeof(*chain->unused));
    if (chain->given == NULL || chain->members == NULL ||
        chain->unused == NULL) {
        return out_of_memory(err);
    }
    for (unsigned i = 0; i < n_paths; i++) {
        struct given *given = &chain->given[i];

        chain->n_given = i + 1;
        given->parent = NONE;
        given->path = strdup(paths[i]);
        if (given->path == NULL) {
            return out_of_memory(err);
        }
        given->reader = qlb_lbz_reader_open(paths[i], err);
        if (given->reader == NULL) {
            return qlb_error_prefix(err, "%s", paths[i]);
        }
        given->header = qlb_lbz_reader_header(given->reader);
    }
    return 0;
}

void qlb_chain_close(struct qlb_chain *chain)
{
    if (chain == NULL) {
        return;
    }
    for (unsigned i = 0; i < chain->n_given; i++) {
        qlb_lbz_reader_close(chain->given[i].reader);
        free(chain->given[i].path);
    }
    qlb_lbz_page_release(&chain->source);
    free(chain->page.frames);
    free(chain->page.runs);
    free(chain->header.covered);
    free(chain->given);
    free(chain->members);
    free(chain->unused);
    free(chain);
}

/* ---- links ---- */

static int compare_uuid(const void *a, const void *b)
{
    return memcmp(a, b, sizeof(struct qlb_uuid));
}

/* A UUID and the archive that has it; sorted by UUID, of one UUID a full
 * archive first. */
struct named {
    struct qlb_uuid uuid;
    bool incremental;
    unsigned index;
};

static int compare_named(const void *a, const void *b)
{
    const struct named *x = a, *y = b;
    int order = compare_uuid(x, y);

    return order != 0 ? order : x->incremental - y->incremental;
}

static unsigned find_named(const struct named *names, unsigned n,
                           const struct qlb_uuid *uuid)
{
    const struct named *found = bsearch(uuid, names, n, sizeof(*names),
                                        compare_uuid);

    return found == NULL ? NONE : found->index;
}

static int check_same_image(const struct qlb_chain *chain,
                            struct qlb_error *err)
{
    const struct given *first = &chain->given[0];
    char image[QLB_UUID_TEXT], other[QLB_UUID_TEXT];

    for (unsigned i = 1; i < chain->n_given; i++) {
        const struct given *given = &chain->given[i];

        if (!qlb_uuid_equal(&given->header->image_uuid,
                            &first->header->image_uuid)) {
            return qlb_fail(err, QLB_E_UNTRUSTED, "%s: belongs to the image "
                            "%s; %s belongs to %s", given->path,
                            qlb_uuid_format(&given->header->image_uuid,
                                            other),
                            first->path,
                            qlb_uuid_format(&first->header->image_uuid,
                                            image));
        }
    }
    return 0;
}

/* Two archives of one UUID are of one state. A full one (of a merge) stands
 * for the incremental: so a merge may take the place of the base, and the
 * incrementals be removed afterwards. Of others nobody knows which is meant. */
static int check_distinct(struct qlb_chain *chain, const struct named *names,
                          struct qlb_error *err)
{
    char text[QLB_UUID_TEXT];

    for (unsigned i = 1; i < chain->n_given; i++) {
        unsigned a = names[i - 1].index, b = names[i].index;

        if (!qlb_uuid_equal(&names[i - 1].uuid, &names[i].uuid)) {
            continue;
        }
        if (names[i - 1].incremental || !names[i].incremental) {
            return qlb_fail(err, QLB_E_UNTRUSTED, "%s: has the same UUID as "
                            "%s, %s; give only one of them",
                            chain->given[a > b ? a : b].path,
                            chain->given[a > b ? b : a].path,
                            qlb_uuid_format(&names[i].uuid, text));
        }
        chain->given[b].replaced = true;
    }
    return 0;
}

/* Takes the replaced ones out; the number that is left. */
static unsigned drop_replaced(const struct qlb_chain *chain,
                              struct named *names)
{
    unsigned n = 0;

    for (unsigned i = 0; i < chain->n_given; i++) {
        if (!chain->given[names[i].index].replaced) {
            names[n++] = names[i];
        }
    }
    return n;
}

static void link_given(struct qlb_chain *chain, const struct named *names,
                       unsigned n_names)
{
    for (unsigned i = 0; i < chain->n_given; i++) {
        struct given *given = &chain->given[i];
        const struct qlb_lbz_header *header = given->header;

        if (given->replaced) {
            continue;
        }
        if (header->incremental) {
            given->parent = find_named(names, n_names, &header->parent);
        }
        if (given->parent != NONE) {
            chain->given[given->parent].has_child = true;
        }
        for (unsigned k = 0; k < header->n_covered; k++) {
            unsigned covered = find_named(names, n_names,
                                          &header->covered[k]);

            if (covered != NONE) {
                chain->given[covered].covered = true;
            }
        }
    }
}

/* Sorts the archives by UUID, for the look-ups, and links them. */
static int resolve_links(struct qlb_chain *chain, struct qlb_error *err)
{
    struct named *names = calloc(chain->n_given, sizeof(*names));
    int ret;

    if (names == NULL) {
        return out_of_memory(err);
    }
    for (unsigned i = 0; i < chain->n_given; i++) {
        names[i].uuid = chain->given[i].header->uuid;
        names[i].incremental = chain->given[i].header->incremental;
        names[i].index = i;
    }
    qsort(names, chain->n_given, sizeof(*names), compare_named);
    ret = check_distinct(chain, names, err);
    if (ret == 0) {
        unsigned n = drop_replaced(chain, names);

        link_given(chain, names, n);
    }
    free(names);
    return ret;
}

/* ---- the leaf ---- */

static bool is_leaf(const struct given *given)
{
    return !given->has_child && !given->covered && !given->replaced;
}

/* The archive that the links lead back to: a full one, or an incremental whose
 * parent was not given; NONE where they run in a circle. */
static unsigned find_root(const struct qlb_chain *chain, unsigned i)
{
    for (unsigned steps = 0; steps < chain->n_given; steps++) {
        if (chain->given[i].parent == NONE) {
            return i;
        }
        i = chain->given[i].parent;
    }
    return NONE;
}

static int parent_missing(const struct given *given, struct qlb_error *err)
{
    char text[QLB_UUID_TEXT];

    return qlb_fail(err, QLB_E_UNTRUSTED, "%s: its parent %s is not among "
                    "the archives given", given->path,
                    qlb_uuid_format(&given->header->parent, text));
}

static int runs_in_circle(const struct given *given, struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_UNTRUSTED, "%s: the parent links lead round in "
                    "a circle", given->path);
}

/* ISO 8601, UTC. */
static const char *format_time(uint64_t seconds, char *text, size_t size)
{
    time_t t = (time_t)seconds;
    struct tm tm;

    /* gmtime_r fails where the year does not fit; years of five digits and
     * more are no dates of backups. */
    if (seconds > INT64_MAX || gmtime_r(&t, &tm) == NULL ||
        tm.tm_year > 9999 - 1900 ||
        strftime(text, size, "%Y-%m-%dT%H:%M:%SZ", &tm) == 0) {
        snprintf(text, size, "@%" PRIu64, seconds);
    }
    return text;
}

/* As many leaves as the message has room for; the advice comes first. */
static int several_leaves(const struct qlb_chain *chain, unsigned n_leaves,
                          struct qlb_error *err)
{
    char uuid[QLB_UUID_TEXT], date[32];
    size_t used, size = sizeof(err->message);
    unsigned listed = 0;

    qlb_fail(err, QLB_E_UNTRUSTED, "the archives end in %u different states; "
             "choose one with --at UUID:", n_leaves);
    for (unsigned i = 0; i < chain->n_given; i++) {
        const struct given *given = &chain->given[i];
        int n;

        if (!is_leaf(given)) {
            continue;
        }
        used = strlen(err->message);
        n = snprintf(err->message + used, size - used, "%s %s (%s, %s)",
                     listed > 0 ? "," : "",
                     qlb_uuid_format(&given->header->uuid, uuid),
                     given->path,
                     format_time(given->header->time, date, sizeof(date)));
        if (n < 0 || (size_t)n >= size - used - sizeof(", and 4294967295 "
                                                       "more")) {
            snprintf(err->message + used, size - used, ", and %u more",
                     n_leaves - listed);
            break;
        }
        listed++;
    }
    return -1;
}

/* Several leaves are a choice, unless what sets them apart is an archive that
 * is missing: then the one that wants it is the better message. */
static int explain_leaves(const struct qlb_chain *chain, unsigned n_leaves,
                          unsigned flags, struct qlb_error *err)
{
    unsigned first_root = NONE, orphan = NONE;
    bool roots_differ = false;

    for (unsigned i = 0; i < chain->n_given; i++) {
        unsigned root;

        if (!is_leaf(&chain->given[i])) {
            continue;
        }
        root = find_root(chain, i);
        if (root == NONE) {
            return runs_in_circle(&chain->given[i], err);
        }
        roots_differ |= first_root != NONE && root != first_root;
        first_root = root;
        if (chain->given[root].header->incremental && orphan == NONE) {
            orphan = root;
        }
    }
    if (orphan != NONE &&
        (roots_differ || (flags & QLB_CHAIN_NEED_FULL))) {
        return parent_missing(&chain->given[orphan], err);
    }
    return several_leaves(chain, n_leaves, err);
}

static int find_leaf(const struct qlb_chain *chain,
                     const struct qlb_uuid *at, unsigned flags,
                     unsigned *leaf, struct qlb_error *err)
{
    unsigned n_leaves = 0;
    char text[QLB_UUID_TEXT];

    for (unsigned i = 0; i < chain->n_given; i++) {
        const struct given *given = &chain->given[i];

        if (at == NULL ? is_leaf(given)
                       : !given->replaced &&
                             qlb_uuid_equal(&given->header->uuid, at)) {
            *leaf = i;
            n_leaves++;
        }
    }
    if (n_leaves == 1) {
        return 0;
    }
    if (at != NULL) {
        return qlb_fail(err, QLB_E_UNTRUSTED,
                        "no archive with the UUID %s was given",
                        qlb_uuid_format(at, text));
    }
    if (n_leaves == 0) {
        return qlb_fail(err, QLB_E_UNTRUSTED, "%s: every archive is the "
                        "parent of another or covered by it; choose one with "
                        "--at UUID", chain->given[0].path);
    }
    return explain_leaves(chain, n_leaves, flags, err);
}

/* ---- members ---- */

static uint64_t floor_of(const struct qlb_lbz_header *header)
{
    return min_u64(header->clip, header->virtual_size);
}

static int collect_members(struct qlb_chain *chain, unsigned leaf,
                           unsigned flags, struct qlb_error *err)
{
    unsigned root = find_root(chain, leaf);
    unsigned n = 1;

    if (root == NONE) {
        return runs_in_circle(&chain->given[leaf], err);
    }
    if ((flags & QLB_CHAIN_NEED_FULL) &&
        chain->given[root].header->incremental) {
        return parent_missing(&chain->given[root], err);
    }
    for (unsigned i = leaf; i != root; i = chain->given[i].parent) {
        n++;
    }
    chain->n_members = n;
    for (unsigned i = leaf; n > 0; i = chain->given[i].parent) {
        struct given *given = &chain->given[i];
        struct member *member = &chain->members[--n];

        given->on_path = true;
        member->path = given->path;
        member->reader = given->reader;
        member->floor = floor_of(given->header);
    }
    for (unsigned i = 0; i < chain->n_given; i++) {
        if (!chain->given[i].on_path) {
            chain->unused[chain->n_unused++] = chain->given[i].path;
        }
    }
    return 0;
}

static const struct qlb_lbz_header *
member_header(const struct qlb_chain *chain, unsigned i)
{
    return qlb_lbz_reader_header(chain->members[i].reader);
}

/* A merge moves digests of blocks; it can't turn one kind into another. */
static int check_same_digest(const struct qlb_chain *chain,
                             struct qlb_error *err)
{
    unsigned newest = chain->n_members - 1;

    for (unsigned i = 0; i < newest; i++) {
        if (member_header(chain, i)->digest !=
            member_header(chain, newest)->digest) {
            return qlb_fail(err, QLB_E_USAGE, "%s: has another digest "
                            "algorithm than %s; archives of one chain that "
                            "are read together must have the same",
                            chain->members[i].path,
                            chain->members[newest].path);
        }
    }
    return 0;
}

static int check_has_content(const struct qlb_chain *chain,
                             struct qlb_error *err)
{
    for (unsigned i = 0; i < chain->n_members; i++) {
        if (member_header(chain, i)->index) {
            return qlb_fail(err, QLB_E_USAGE, "%s: is an index, which has "
                            "digests and no content; the archives that it was "
                            "made from are wanted", chain->members[i].path);
        }
    }
    return 0;
}

/* ---- header of the merge ---- */

/* The newest UUIDs that were collected; filled from the end of `list`. */
struct covered_set {
    struct qlb_uuid sorted[QLB_LBZ_COVERED_MAX];
    struct qlb_uuid list[QLB_LBZ_COVERED_MAX];
    unsigned n;
};

static void cover(struct covered_set *set,
                  const struct qlb_lbz_header *result,
                  const struct qlb_uuid *uuid)
{
    unsigned low = 0, high = set->n;

    if (set->n == QLB_LBZ_COVERED_MAX ||
        qlb_uuid_equal(uuid, &result->uuid) ||
        qlb_uuid_equal(uuid, &result->parent)) {
        return;
    }
    while (low < high) {
        unsigned middle = (low + high) / 2;
        int order = compare_uuid(&set->sorted[middle], uuid);

        if (order == 0) {
            return;
        }
        if (order < 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    memmove(&set->sorted[low + 1], &set->sorted[low],
            (set->n - low) * sizeof(*uuid));
    set->sorted[low] = *uuid;
    set->list[QLB_LBZ_COVERED_MAX - 1 - set->n] = *uuid;
    set->n++;
}

/* From the newest to the oldest, so that the oldest are left out. */
static int merge_covered(struct qlb_chain *chain, struct qlb_error *err)
{
    struct qlb_lbz_header *result = &chain->header;
    struct covered_set *set = calloc(1, sizeof(*set));

    if (set == NULL) {
        return out_of_memory(err);
    }
    for (unsigned i = chain->n_members; i-- > 0;) {
        const struct qlb_lbz_header *header = member_header(chain, i);

        cover(set, result, &header->uuid);
        for (unsigned k = header->n_covered; k-- > 0;) {
            cover(set, result, &header->covered[k]);
        }
    }
    if (set->n > 0) {
        result->covered = malloc(set->n * sizeof(*result->covered));
        if (result->covered == NULL) {
            free(set);
            return out_of_memory(err);
        }
        memcpy(result->covered, set->list + QLB_LBZ_COVERED_MAX - set->n,
               set->n * sizeof(*result->covered));
        result->n_covered = set->n;
    }
    free(set);
    return 0;
}

static int merge_headers(struct qlb_chain *chain, struct qlb_error *err)
{
    const struct qlb_lbz_header *oldest = member_header(chain, 0);
    unsigned newest = chain->n_members - 1;
    struct qlb_lbz_header *result = &chain->header;
    uint64_t clip;

    *result = *member_header(chain, newest);
    result->covered = NULL;
    result->n_covered = 0;
    result->incremental = oldest->incremental;
    result->parent = oldest->parent;
    clip = result->clip;
    for (unsigned i = 0; i < newest; i++) {
        clip = min_u64(clip, chain->members[i].floor);
        result->index |= member_header(chain, i)->index;
    }
    result->clip = result->incremental && clip < result->virtual_size
                       ? clip : QLB_LBZ_NO_CLIP;
    chain->digest_size = qlb_digest_size(result->digest);
    return merge_covered(chain, err);
}

static int open_chain(struct qlb_chain *chain, const char *const *paths,
                      unsigned n_paths, const struct qlb_uuid *at,
                      unsigned flags, struct qlb_error *err)
{
    unsigned leaf = 0;

    if (open_given(chain, paths, n_paths, err) < 0 ||
        check_same_image(chain, err) < 0 ||
        resolve_links(chain, err) < 0 ||
        find_leaf(chain, at, flags, &leaf, err) < 0 ||
        collect_members(chain, leaf, flags, err) < 0 ||
        check_same_digest(chain, err) < 0 ||
        (!(flags & QLB_CHAIN_ALLOW_INDEX) &&
         check_has_content(chain, err) < 0) ||
        merge_headers(chain, err) < 0) {
        return -1;
    }
    return 0;
}

struct qlb_chain *qlb_chain_open(const char *const *paths, unsigned n_paths,
                                 const struct qlb_uuid *at, unsigned flags,
                                 struct qlb_error *err)
{
    struct qlb_chain *chain = calloc(1, sizeof(*chain));

    if (chain == NULL) {
        out_of_memory(err);
        return NULL;
    }
    qlb_lbz_page_init(&chain->source);
    if (open_chain(chain, paths, n_paths, at, flags, err) < 0) {
        qlb_chain_close(chain);
        return NULL;
    }
    return chain;
}

unsigned qlb_chain_members(const struct qlb_chain *chain)
{
    return chain->n_members;
}

const struct qlb_lbz_reader *qlb_chain_member(const struct qlb_chain *chain,
                                              unsigned i)
{
    return i < chain->n_members ? chain->members[i].reader : NULL;
}

const char *qlb_chain_unused(const struct qlb_chain *chain, unsigned i)
{
    return i < chain->n_unused ? chain->unused[i] : NULL;
}

const struct qlb_lbz_header *qlb_chain_header(const struct qlb_chain *chain)
{
    return &chain->header;
}

/* ---- pages ---- */

/* Bits [first, first + count) of the masks; those that were clear before are
 * also set in `fresh`, which may be NULL. */
static void decide(struct qlb_chain *chain, unsigned first, unsigned count,
                   uint16_t *fresh)
{
    while (count > 0) {
        unsigned stripe = first / QLB_LBZ_STRIPE_BLOCKS;
        unsigned shift = first % QLB_LBZ_STRIPE_BLOCKS;
        unsigned n = QLB_LBZ_STRIPE_BLOCKS - shift;
        unsigned mask;

        n = n < count ? n : count;
        mask = ((1u << n) - 1) << shift;
        if (fresh != NULL) {
            fresh[stripe] |= (uint16_t)(mask & ~chain->decided[stripe]);
        }
        chain->decided[stripe] |= (uint16_t)mask;
        first += n;
        count -= n;
    }
}

static bool all_decided(const struct qlb_chain *chain)
{
    for (unsigned i = 0; i < PAGE_STRIPES; i++) {
        if (chain->decided[i] != 0xffff) {
            return false;
        }
    }
    return true;
}

static struct qlb_chain_frame *new_frame(struct qlb_chain *chain,
                                         struct qlb_error *err)
{
    struct qlb_chain_page *page = &chain->page;
    unsigned capacity = chain->frames_capacity;

    if (page->n_frames == capacity) {
        struct qlb_chain_frame *frames;

        capacity = capacity == 0 ? 256 : 2 * capacity;
        frames = realloc(page->frames, capacity * sizeof(*frames));
        if (frames == NULL) {
            out_of_memory(err);
            return NULL;
        }
        page->frames = frames;
        chain->frames_capacity = capacity;
    }
    return &page->frames[page->n_frames++];
}

/* What is left of a frame below the newer members. At most 4096 frames have a
 * block of their own, so memory is bounded. */
static int add_frame(struct qlb_chain *chain, unsigned member,
                     const struct qlb_lbz_entry *entry, unsigned live,
                     struct qlb_error *err)
{
    struct qlb_chain_frame *frame = new_frame(chain, err);
    const uint8_t *digest = entry->block_digests;
    uint8_t *to;

    if (frame == NULL) {
        return -1;
    }
    frame->member = member;
    frame->entry = *entry;
    frame->entry.live = (uint16_t)live;
    memcpy(frame->compressed_digest, entry->digest, chain->digest_size);
    to = frame->digests;
    for (unsigned rest = entry->live; rest != 0; rest &= rest - 1) {
        if (live & rest & -rest) {
            memcpy(to, digest, chain->digest_size);
            to += chain->digest_size;
        }
        digest += chain->digest_size;
    }
    return 0;
}

static int overlay_frames(struct qlb_chain *chain, unsigned member,
                          struct qlb_error *err)
{
    const struct qlb_lbz_page *source = &chain->source;

    for (unsigned i = 0; i < source->n_entries; i++) {
        const struct qlb_lbz_entry *entry = &source->entries[i];
        uint16_t *decided =
            &chain->decided[entry->first / QLB_LBZ_STRIPE_BLOCKS];
        unsigned shift = entry->first % QLB_LBZ_STRIPE_BLOCKS;
        unsigned live = entry->live & ~((unsigned)*decided >> shift);

        if (live != 0 && add_frame(chain, member, entry, live, err) < 0) {
            return -1;
        }
        *decided |= (uint16_t)(live << shift);
    }
    return 0;
}

/* Blocks of the page in the making that start below `size`. */
static unsigned blocks_below(const struct qlb_chain *chain, uint64_t size)
{
    uint64_t start = chain->page.number * QLB_LBZ_PAGE;

    if (size <= start) {
        return 0;
    }
    return (unsigned)min_u64(div_round_up(size - start, QLB_LBZ_BLOCK),
                             QLB_LBZ_PAGE_BLOCKS);
}

static int overlay_member(struct qlb_chain *chain, unsigned i,
                          struct qlb_error *err)
{
    struct member *member = &chain->members[i];
    unsigned below = blocks_below(chain, member->floor);

    if (member->next == chain->page.number) {
        if (qlb_lbz_reader_load_page(member->reader, chain->page.number,
                                     &chain->source, err) < 0) {
            return qlb_error_prefix(err, "%s", member->path);
        }
        if (overlay_frames(chain, i, err) < 0) {
            return -1;
        }
        for (unsigned k = 0; k < chain->source.n_runs; k++) {
            const struct qlb_lbz_run *run = &chain->source.runs[k];

            decide(chain, run->first, run->count, chain->zero);
        }
    }
    decide(chain, below, QLB_LBZ_PAGE_BLOCKS - below, NULL);
    return 0;
}

static int compare_frames(const void *a, const void *b)
{
    const struct qlb_lbz_entry *x = &((const struct qlb_chain_frame *)a)->entry;
    const struct qlb_lbz_entry *y = &((const struct qlb_chain_frame *)b)->entry;

    return x->first + __builtin_ctz(x->live) -
           (y->first + __builtin_ctz(y->live));
}

static void order_frames(struct qlb_chain *chain)
{
    struct qlb_chain_page *page = &chain->page;
    bool ordered = true;

    for (unsigned i = 1; i < page->n_frames && ordered; i++) {
        ordered = compare_frames(&page->frames[i - 1], &page->frames[i]) < 0;
    }
    if (!ordered) {
        qsort(page->frames, page->n_frames, sizeof(*page->frames),
              compare_frames);
    }
    for (unsigned i = 0; i < page->n_frames; i++) {
        struct qlb_chain_frame *frame = &page->frames[i];

        frame->entry.digest = frame->compressed_digest;
        frame->entry.block_digests = frame->digests;
    }
}

static int collect_runs(struct qlb_chain *chain, struct qlb_error *err)
{
    struct qlb_chain_page *page = &chain->page;
    unsigned start = QLB_LBZ_PAGE_BLOCKS;

    page->n_runs = 0;
    if (!chain->header.incremental) {
        return 0;
    }
    if (page->runs == NULL) {
        page->runs = calloc(QLB_LBZ_PAGE_BLOCKS / 2, sizeof(*page->runs));
        if (page->runs == NULL) {
            return out_of_memory(err);
        }
    }
    for (unsigned block = 0; block <= QLB_LBZ_PAGE_BLOCKS; block++) {
        bool zero = block < QLB_LBZ_PAGE_BLOCKS &&
                    (chain->zero[block / QLB_LBZ_STRIPE_BLOCKS] >>
                     block % QLB_LBZ_STRIPE_BLOCKS & 1);

        if (zero && start == QLB_LBZ_PAGE_BLOCKS) {
            start = block;
        } else if (!zero && start != QLB_LBZ_PAGE_BLOCKS) {
            page->runs[page->n_runs].first = (uint16_t)start;
            page->runs[page->n_runs].count = (uint16_t)(block - start);
            page->n_runs++;
            start = QLB_LBZ_PAGE_BLOCKS;
        }
    }
    return 0;
}

static int make_page(struct qlb_chain *chain, uint64_t number,
                     struct qlb_error *err)
{
    chain->page.number = number;
    chain->page.n_frames = 0;
    memset(chain->decided, 0, sizeof(chain->decided));
    memset(chain->zero, 0, sizeof(chain->zero));
    for (unsigned i = chain->n_members; i-- > 0;) {
        if (overlay_member(chain, i, err) < 0) {
            return -1;
        }
        if (all_decided(chain)) {
            break;
        }
    }
    order_frames(chain);
    return collect_runs(chain, err);
}

/* The first page, at or after the cursor, that a member has. */
static int find_next(struct qlb_chain *chain, uint64_t *number,
                     struct qlb_error *err)
{
    *number = NO_PAGE;
    for (unsigned i = 0; i < chain->n_members; i++) {
        struct member *member = &chain->members[i];
        int ret = 1;

        if (member->next < chain->cursor || chain->cursor == 0) {
            ret = qlb_lbz_reader_find_page(member->reader, chain->cursor,
                                           &member->next, err);
        }
        if (ret < 0) {
            return qlb_error_prefix(err, "%s", member->path);
        }
        if (ret == 0) {
            member->next = NO_PAGE;
        }
        *number = min_u64(*number, member->next);
    }
    return 0;
}

void qlb_chain_seek(struct qlb_chain *chain, uint64_t number)
{
    if (number < chain->cursor) {
        for (unsigned i = 0; i < chain->n_members; i++) {
            chain->members[i].next = 0;
        }
    }
    chain->cursor = number;
}

int qlb_chain_next_page(struct qlb_chain *chain,
                        const struct qlb_chain_page **page,
                        struct qlb_error *err)
{
    uint64_t number;

    do {
        if (find_next(chain, &number, err) < 0) {
            return -1;
        }
        if (number == NO_PAGE) {
            return 0;
        }
        if (make_page(chain, number, err) < 0) {
            return -1;
        }
        chain->cursor = number + 1;
    } while (chain->page.n_frames == 0 && chain->page.n_runs == 0);
    *page = &chain->page;
    return 1;
}

int qlb_chain_find_page(struct qlb_chain *chain, uint64_t number,
                        uint64_t *found, struct qlb_error *err)
{
    qlb_chain_seek(chain, number);
    return find_next(chain, found, err);
}

int qlb_chain_page_at(struct qlb_chain *chain, uint64_t number,
                      const struct qlb_chain_page **page, uint64_t *next,
                      struct qlb_error *err)
{
    qlb_chain_seek(chain, number);
    if (find_next(chain, next, err) < 0) {
        return -1;
    }
    if (*next != number) {
        return 0;
    }
    if (make_page(chain, number, err) < 0) {
        return -1;
    }
    chain->cursor = number + 1;
    *page = &chain->page;
    return 1;
}
