/* The archive format on disk.
 *
 * Parsing follows one order: what bounds memory first, then the digest, then
 * every field against its rule, then use.  Blocks of a page are tracked as one
 * 16-bit mask for each stripe, since no frame crosses a stripe: a collision
 * is a single AND.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "lbz_format.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "bitmap.h"
#include "byteorder.h"
#include "checked.h"

/* ---- errors ---- */

int lbz_damaged(struct qlb_error *err, uint64_t offset, const char *fmt, ...)
{
    va_list ap;
    size_t used;

    qlb_fail(err, QLB_E_DAMAGED, "damaged at offset %" PRIu64 ": ", offset);
    used = strlen(err->message);
    va_start(ap, fmt);
    vsnprintf(err->message + used, sizeof(err->message) - used, fmt, ap);
    va_end(ap);
    return -1;
}

const char *lbz_range(uint64_t guest_offset, uint64_t n_blocks, char *text)
{
    snprintf(text, LBZ_RANGE_TEXT, "guest range 0x%" PRIx64 "-0x%" PRIx64,
             guest_offset, guest_offset + n_blocks * QLB_LBZ_BLOCK - 1);
    return text;
}

static const char *page_range(uint64_t number, char *text)
{
    if (number >= LBZ_PAGE_NUMBER_END) {
        snprintf(text, LBZ_RANGE_TEXT, "an impossible guest range");
        return text;
    }
    return lbz_range(number << LBZ_PAGE_BITS, QLB_LBZ_PAGE_BLOCKS, text);
}

void lbz_drop_name(struct qlb_error *err, const char *name)
{
    size_t length = strlen(name);
    char *message = err->message;

    if (strncmp(message, name, length) == 0 &&
        strncmp(message + length, ": ", 2) == 0) {
        memmove(message, message + length + 2,
                strlen(message + length + 2) + 1);
    }
}

/* ---- skippable frames ---- */

void lbz_skippable_to_disk(uint32_t size, uint8_t *p)
{
    put_le32(p, LBZ_SKIPPABLE_MAGIC);
    put_le32(p + 4, size);
}

bool lbz_skippable_from_disk(const uint8_t *p, uint32_t *size)
{
    *size = get_le32(p + 4);
    return get_le32(p) == LBZ_SKIPPABLE_MAGIC;
}

bool lbz_kind_is(const uint8_t *payload, const char *kind)
{
    return memcmp(payload, kind, LBZ_KIND_SIZE) == 0;
}

/* ---- header ---- */

static bool label_is_sound(const char *label)
{
    static const char allowed[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                  "abcdefghijklmnopqrstuvwxyz0123456789._-";
    size_t length = strlen(label);

    return length >= 1 && length <= QLB_LBZ_LABEL_MAX &&
           strspn(label, allowed) == length;
}

/* 1024 UUIDs make half a million comparisons: half a millisecond, and no
 * memory that could be short. */
static const char *covered_problem(const struct qlb_lbz_header *header)
{
    const struct qlb_uuid *covered = header->covered;

    if (header->n_covered > QLB_LBZ_COVERED_MAX) {
        return "there are too many covered checkpoints";
    }
    for (unsigned i = 0; i < header->n_covered; i++) {
        if (qlb_uuid_is_zero(&covered[i])) {
            return "a covered checkpoint is zero";
        }
        if (qlb_uuid_equal(&covered[i], &header->uuid) ||
            qlb_uuid_equal(&covered[i], &header->parent)) {
            return "the archive or its parent is among the covered "
                   "checkpoints";
        }
        for (unsigned k = 0; k < i; k++) {
            if (qlb_uuid_equal(&covered[i], &covered[k])) {
                return "a covered checkpoint is listed twice";
            }
        }
    }
    return NULL;
}

const char *lbz_header_problem(const struct qlb_lbz_header *header)
{
    if (qlb_digest_size(header->digest) == 0) {
        return "the digest algorithm is unknown";
    }
    if (!label_is_sound(header->label)) {
        return "the chain label is not 1 to 22 letters, digits, '.', '_' "
               "or '-'";
    }
    if (header->virtual_size > LBZ_VIRTUAL_SIZE_MAX) {
        return "the virtual size is above 2^56";
    }
    if (qlb_uuid_is_zero(&header->uuid)) {
        return "the backup UUID is zero";
    }
    if (header->incremental == qlb_uuid_is_zero(&header->parent)) {
        return header->incremental ? "an incremental without a parent"
                                   : "a full archive with a parent";
    }
    if (qlb_uuid_equal(&header->parent, &header->uuid)) {
        return "the archive is its own parent";
    }
    if (header->clip != QLB_LBZ_NO_CLIP &&
        (!header->incremental || header->clip >= header->virtual_size)) {
        return header->incremental
                   ? "the clip is not less than the virtual size"
                   : "a full archive with a clip";
    }
    return covered_problem(header);
}

size_t lbz_header_size(const struct qlb_lbz_header *header)
{
    return LBZ_HEADER_COVERED + (size_t)LBZ_UUID_SIZE * header->n_covered +
           qlb_digest_size(header->digest);
}

void lbz_header_to_disk(const struct qlb_lbz_header *header, uint8_t *p)
{
    size_t label_length = strlen(header->label);
    size_t end = LBZ_HEADER_COVERED;

    memset(p, 0, LBZ_HEADER_COVERED);
    memcpy(p, LBZ_KIND_HEADER, LBZ_KIND_SIZE);
    put_le16(p + LBZ_HEADER_VERSION, LBZ_VERSION);
    put_le64(p + LBZ_HEADER_INCOMPATIBLE,
             header->index ? LBZ_FEATURE_INDEX : 0);
    p[LBZ_HEADER_DIGEST] = (uint8_t)header->digest;
    p[LBZ_HEADER_INCREMENTAL] = header->incremental;
    p[LBZ_HEADER_BLOCK_BITS] = LBZ_BLOCK_BITS;
    p[LBZ_HEADER_LABEL_LENGTH] = (uint8_t)label_length;
    put_le32(p + LBZ_HEADER_N_COVERED, header->n_covered);
    put_le64(p + LBZ_HEADER_VIRTUAL_SIZE, header->virtual_size);
    put_le64(p + LBZ_HEADER_CLIP, header->clip);
    put_le64(p + LBZ_HEADER_TIME, header->time);
    memcpy(p + LBZ_HEADER_IMAGE_UUID, &header->image_uuid, LBZ_UUID_SIZE);
    memcpy(p + LBZ_HEADER_UUID, &header->uuid, LBZ_UUID_SIZE);
    memcpy(p + LBZ_HEADER_PARENT, &header->parent, LBZ_UUID_SIZE);
    memcpy(p + LBZ_HEADER_SET, &header->set, LBZ_UUID_SIZE);
    memcpy(p + LBZ_HEADER_LABEL, header->label, label_length);
    for (unsigned i = 0; i < header->n_covered; i++) {
        memcpy(p + end, &header->covered[i], LBZ_UUID_SIZE);
        end += LBZ_UUID_SIZE;
    }
    qlb_digest(header->digest, p, end, p + end);
}

static bool ends_with_digest(enum qlb_digest_type type, const uint8_t *p,
                             size_t size)
{
    size_t digest_size = qlb_digest_size(type);
    uint8_t digest[QLB_DIGEST_MAX];

    if (digest_size == 0 || size <= digest_size) {
        return false;
    }
    qlb_digest(type, p, size - digest_size, digest);
    return memcmp(digest, p + size - digest_size, digest_size) == 0;
}

/* A digest under either algorithm tells an archive of a later version, which
 * is whole, from one of ours with a flipped bit. */
static int check_header_support(const uint8_t *p, size_t size,
                                struct qlb_error *err)
{
    uint64_t features = get_le64(p + LBZ_HEADER_INCOMPATIBLE) &
                        ~LBZ_FEATURE_INDEX;
    unsigned version = get_le16(p + LBZ_HEADER_VERSION);
    unsigned algorithm = p[LBZ_HEADER_DIGEST];

    if (ends_with_digest(algorithm, p, size)) {
        if (version == LBZ_VERSION && features == 0) {
            return 0;
        }
    } else if (!ends_with_digest(QLB_DIGEST_XXH3_128, p, size) &&
               !ends_with_digest(QLB_DIGEST_SHA256, p, size)) {
        return lbz_damaged(err, 0, "the header does not match its digest");
    }
    if (version != LBZ_VERSION) {
        return qlb_fail(err, QLB_E_RUNTIME,
                        "unsupported archive format version %u", version);
    }
    if (features != 0) {
        return qlb_fail(err, QLB_E_RUNTIME,
                        "unsupported incompatible feature: bit %d",
                        __builtin_ctzll(features));
    }
    if (qlb_digest_size(algorithm) == 0) {
        return qlb_fail(err, QLB_E_RUNTIME,
                        "unsupported digest algorithm %u", algorithm);
    }
    return lbz_damaged(err, 0, "the header does not match its digest");
}

static bool header_reserved_is_zero(const uint8_t *p)
{
    return qlb_bits_all_zero(p + LBZ_HEADER_RESERVED_1, 2) &&
           qlb_bits_all_zero(p + LBZ_HEADER_RESERVED_2, 8) &&
           qlb_bits_all_zero(p + LBZ_HEADER_RESERVED_3, 10);
}

/* The fields that the struct holds no other way round. */
static int check_header_encoding(const uint8_t *p, size_t size,
                                 struct qlb_error *err)
{
    unsigned label_length = p[LBZ_HEADER_LABEL_LENGTH];
    uint32_t n_covered = get_le32(p + LBZ_HEADER_N_COVERED);
    size_t digest_size = qlb_digest_size(p[LBZ_HEADER_DIGEST]);

    if (!header_reserved_is_zero(p)) {
        return lbz_damaged(err, 0, "reserved bytes of the header are set");
    }
    if (p[LBZ_HEADER_INCREMENTAL] > 1) {
        return lbz_damaged(err, 0, "the header has the unknown kind %u",
                           p[LBZ_HEADER_INCREMENTAL]);
    }
    if (p[LBZ_HEADER_BLOCK_BITS] != LBZ_BLOCK_BITS) {
        return lbz_damaged(err, 0, "the header has blocks of 2^%u bytes",
                           p[LBZ_HEADER_BLOCK_BITS]);
    }
    if (n_covered > QLB_LBZ_COVERED_MAX ||
        size != LBZ_HEADER_COVERED + (size_t)LBZ_UUID_SIZE * n_covered +
                    digest_size) {
        return lbz_damaged(err, 0, "the header's size %zu does not fit %u "
                           "covered checkpoints", size, n_covered);
    }
    if (label_length > QLB_LBZ_LABEL_MAX ||
        memchr(p + LBZ_HEADER_LABEL, 0, label_length) != NULL ||
        !qlb_bits_all_zero(p + LBZ_HEADER_LABEL + label_length,
                           QLB_LBZ_LABEL_MAX - label_length)) {
        return lbz_damaged(err, 0, "the header's chain label has not the "
                           "length that it says");
    }
    return 0;
}

int lbz_header_from_disk(const uint8_t *p, size_t size,
                         struct qlb_lbz_header *header,
                         struct qlb_error *err)
{
    const char *problem;

    memset(header, 0, sizeof(*header));
    if (check_header_support(p, size, err) < 0 ||
        check_header_encoding(p, size, err) < 0) {
        return -1;
    }
    header->digest = p[LBZ_HEADER_DIGEST];
    header->incremental = p[LBZ_HEADER_INCREMENTAL];
    header->index = get_le64(p + LBZ_HEADER_INCOMPATIBLE) & LBZ_FEATURE_INDEX;
    memcpy(header->label, p + LBZ_HEADER_LABEL, p[LBZ_HEADER_LABEL_LENGTH]);
    header->virtual_size = get_le64(p + LBZ_HEADER_VIRTUAL_SIZE);
    header->clip = get_le64(p + LBZ_HEADER_CLIP);
    header->time = get_le64(p + LBZ_HEADER_TIME);
    memcpy(&header->image_uuid, p + LBZ_HEADER_IMAGE_UUID, LBZ_UUID_SIZE);
    memcpy(&header->uuid, p + LBZ_HEADER_UUID, LBZ_UUID_SIZE);
    memcpy(&header->parent, p + LBZ_HEADER_PARENT, LBZ_UUID_SIZE);
    memcpy(&header->set, p + LBZ_HEADER_SET, LBZ_UUID_SIZE);
    header->n_covered = get_le32(p + LBZ_HEADER_N_COVERED);
    if (header->n_covered > 0) {
        header->covered = calloc(header->n_covered, LBZ_UUID_SIZE);
        if (header->covered == NULL) {
            return qlb_fail(err, QLB_E_RUNTIME, "out of memory");
        }
        memcpy(header->covered, p + LBZ_HEADER_COVERED,
               (size_t)LBZ_UUID_SIZE * header->n_covered);
    }
    problem = lbz_header_problem(header);
    if (problem != NULL) {
        lbz_header_release(header);
        return lbz_damaged(err, 0, "in the header: %s", problem);
    }
    return 0;
}

int lbz_header_copy(const struct qlb_lbz_header *from,
                    struct qlb_lbz_header *to)
{
    *to = *from;
    to->covered = NULL;
    if (from->n_covered > 0) {
        to->covered = calloc(from->n_covered, LBZ_UUID_SIZE);
        if (to->covered == NULL) {
            to->n_covered = 0;
            return -1;
        }
        memcpy(to->covered, from->covered,
               (size_t)LBZ_UUID_SIZE * from->n_covered);
    }
    return 0;
}

void lbz_header_release(struct qlb_lbz_header *header)
{
    free(header->covered);
    header->covered = NULL;
    header->n_covered = 0;
}

/* ---- record ---- */

const char *lbz_shape_problem(unsigned first, unsigned n_blocks,
                              unsigned live)
{
    if (n_blocks < 1 || n_blocks > QLB_LBZ_STRIPE_BLOCKS) {
        return "a frame has an impossible number of blocks";
    }
    if (first % QLB_LBZ_STRIPE_BLOCKS + n_blocks > QLB_LBZ_STRIPE_BLOCKS) {
        return "a frame crosses a stripe";
    }
    if (live == 0 || live >> n_blocks != 0) {
        return "a frame has an impossible live mask";
    }
    return NULL;
}

static uint32_t record_checksum(const uint8_t *p)
{
    return (uint32_t)XXH3_64bits(p, LBZ_RECORD_CHECKSUM);
}

void lbz_record_to_disk(const struct lbz_record *record, uint8_t *p)
{
    lbz_skippable_to_disk(LBZ_RECORD_SIZE, p);
    p += LBZ_SKIPPABLE_SIZE;
    memcpy(p, LBZ_KIND_RECORD, LBZ_KIND_SIZE);
    put_le32(p + LBZ_RECORD_FRAME_SIZE, record->size);
    put_le64(p + LBZ_RECORD_OFFSET, record->offset);
    put_le16(p + LBZ_RECORD_N_BLOCKS, record->n_blocks);
    put_le16(p + LBZ_RECORD_LIVE, record->live);
    put_le32(p + LBZ_RECORD_CHECKSUM, record_checksum(p));
}

int lbz_record_from_disk(const uint8_t *p, uint64_t file_offset,
                         const struct qlb_lbz_header *header,
                         struct lbz_record *record, struct qlb_error *err)
{
    const char *problem;
    uint64_t last;

    if (get_le32(p + LBZ_RECORD_CHECKSUM) != record_checksum(p)) {
        return lbz_damaged(err, file_offset,
                           "a frame's record does not match its checksum");
    }
    record->size = get_le32(p + LBZ_RECORD_FRAME_SIZE);
    record->offset = get_le64(p + LBZ_RECORD_OFFSET);
    record->n_blocks = get_le16(p + LBZ_RECORD_N_BLOCKS);
    record->live = get_le16(p + LBZ_RECORD_LIVE);
    if (record->size < 1 || record->size > QLB_LBZ_FRAME_MAX) {
        return lbz_damaged(err, file_offset,
                           "a frame's record has the size %u", record->size);
    }
    if (record->offset % QLB_LBZ_BLOCK != 0 ||
        record->offset >= LBZ_VIRTUAL_SIZE_MAX) {
        return lbz_damaged(err, file_offset, "a frame's record has the "
                           "impossible guest offset 0x%" PRIx64,
                           record->offset);
    }
    problem = lbz_shape_problem(
        (unsigned)(record->offset / QLB_LBZ_BLOCK % QLB_LBZ_PAGE_BLOCKS),
        record->n_blocks, record->live);
    if (problem != NULL) {
        return lbz_damaged(err, file_offset, "record of guest offset 0x%"
                           PRIx64 ": %s", record->offset, problem);
    }
    last = record->offset +
           (uint64_t)lbz_last_live(0, record->live) * QLB_LBZ_BLOCK;
    if (last >= header->virtual_size) {
        return lbz_damaged(err, file_offset, "a frame's record reaches "
                           "behind the end of the disk: guest offset 0x%"
                           PRIx64, last);
    }
    return 0;
}

/* ---- page ---- */

void qlb_lbz_page_init(struct qlb_lbz_page *page)
{
    memset(page, 0, sizeof(*page));
}

void qlb_lbz_page_release(struct qlb_lbz_page *page)
{
    free(page->entries);
    free(page->runs);
    free(page->payload);
    qlb_lbz_page_init(page);
}

void lbz_entry_to_disk(const struct qlb_lbz_entry *entry, size_t digest_size,
                       uint8_t *p)
{
    memset(p, 0, LBZ_ENTRY_DIGEST);
    put_le64(p + LBZ_ENTRY_RECORD_OFFSET, entry->record_offset);
    put_le32(p + LBZ_ENTRY_FRAME_SIZE, entry->size);
    put_le16(p + LBZ_ENTRY_FIRST, entry->first);
    put_le16(p + LBZ_ENTRY_N_BLOCKS, entry->n_blocks);
    put_le16(p + LBZ_ENTRY_LIVE, entry->live);
    memcpy(p + LBZ_ENTRY_DIGEST, entry->digest, digest_size);
}

void lbz_run_to_disk(const struct qlb_lbz_run *run, uint8_t *p)
{
    put_le16(p + LBZ_RUN_FIRST, run->first);
    put_le16(p + LBZ_RUN_COUNT, run->count);
}

void lbz_page_to_disk(const struct qlb_lbz_page *page, uint8_t *p)
{
    memset(p, 0, LBZ_PAGE_ENTRIES);
    memcpy(p, LBZ_KIND_PAGE, LBZ_KIND_SIZE);
    put_le32(p + LBZ_PAGE_N_FRAMES, page->n_entries);
    put_le64(p + LBZ_PAGE_NUMBER, page->number);
    put_le32(p + LBZ_PAGE_N_RUNS, page->n_runs);
    put_le32(p + LBZ_PAGE_N_LIVE, page->n_live);
}

size_t lbz_page_size(unsigned n_frames, unsigned n_runs, unsigned n_live,
                     size_t digest_size)
{
    return LBZ_PAGE_ENTRIES + n_frames * (LBZ_ENTRY_DIGEST + digest_size) +
           (size_t)n_runs * LBZ_RUN_SIZE + (n_live + 1) * digest_size;
}

size_t lbz_index_page_size(unsigned n_data_runs, unsigned n_runs,
                           unsigned n_live, size_t digest_size)
{
    return lbz_page_size(0, n_data_runs + n_runs, n_live, digest_size);
}

size_t lbz_page_max(size_t digest_size)
{
    return lbz_page_size(LBZ_PAGE_FRAMES_MAX, LBZ_PAGE_RUNS_MAX,
                         QLB_LBZ_PAGE_BLOCKS, digest_size);
}

/* What the array held is lost. */
static int reserve_array(void *array, size_t count, size_t size,
                         struct qlb_error *err)
{
    void **p = array;

    free(*p);
    *p = calloc(count == 0 ? 1 : count, size);
    if (*p == NULL) {
        return qlb_fail(err, QLB_E_RUNTIME, "out of memory");
    }
    return 0;
}

int lbz_page_reserve(struct qlb_lbz_page *page, size_t payload_size,
                     struct qlb_error *err)
{
    page->payload_size = payload_size;
    if (payload_size <= page->payload_capacity) {
        return 0;
    }
    page->payload_capacity = 0;
    payload_size = round_up(payload_size, 4096);
    if (reserve_array(&page->payload, payload_size, 1, err) < 0) {
        return -1;
    }
    page->payload_capacity = payload_size;
    return 0;
}

/* What a page in the making shares between its checks. */
struct page_parser {
    struct qlb_lbz_page *page;
    const struct qlb_lbz_header *header;
    size_t digest_size;
    unsigned n_blocks;                  /* of the page below the disk's end */
    unsigned n_first;                   /* frames, or DATA runs of an index */
    uint16_t data[LBZ_PAGE_STRIPES];    /* live blocks of each stripe */
    unsigned n_marked;                  /* in them, of an index */
    bool interleaved; /* live blocks of two frames alternate */
    struct qlb_error *err;
};

static int page_damaged(struct page_parser *parser, const char *what)
{
    char range[LBZ_RANGE_TEXT];

    return lbz_damaged(parser->err, parser->page->file_offset,
                       "index page of %s: %s",
                       page_range(parser->page->number, range), what);
}

/* What the counts make, where they may be: 0 where not. */
static size_t expected_size(const struct page_parser *parser,
                            uint32_t n_frames, uint32_t n_runs,
                            uint32_t n_live)
{
    bool index = parser->header->index;

    if (n_frames > (index ? LBZ_PAGE_RUNS_MAX : LBZ_PAGE_FRAMES_MAX) ||
        n_runs > LBZ_PAGE_RUNS_MAX || n_live > QLB_LBZ_PAGE_BLOCKS) {
        return 0;
    }
    return (index ? lbz_index_page_size : lbz_page_size)(
        n_frames, n_runs, n_live, parser->digest_size);
}

static int parse_page_counts(struct page_parser *parser)
{
    struct qlb_lbz_page *page = parser->page;
    const uint8_t *p = page->payload;
    uint32_t n_frames = get_le32(p + LBZ_PAGE_N_FRAMES);
    uint32_t n_runs = get_le32(p + LBZ_PAGE_N_RUNS);
    uint32_t n_live = get_le32(p + LBZ_PAGE_N_LIVE);
    uint64_t start, blocks;

    if (page->number >= LBZ_PAGE_NUMBER_END ||
        page->number << LBZ_PAGE_BITS >= parser->header->virtual_size) {
        return page_damaged(parser, "it lies behind the end of the disk");
    }
    start = page->number << LBZ_PAGE_BITS;
    blocks = div_round_up(parser->header->virtual_size - start,
                          QLB_LBZ_BLOCK);
    parser->n_blocks = (unsigned)min_u64(blocks, QLB_LBZ_PAGE_BLOCKS);
    if (page->payload_size !=
        expected_size(parser, n_frames, n_runs, n_live)) {
        return page_damaged(parser, "its size does not fit its counts");
    }
    if (n_frames + n_runs == 0) {
        return page_damaged(parser, "it is empty");
    }
    if (n_runs > 0 && !parser->header->incremental) {
        return page_damaged(parser, "zero runs in a full archive");
    }
    if (!qlb_bits_all_zero(p + LBZ_PAGE_RESERVED, 8)) {
        return page_damaged(parser, "reserved bytes are set");
    }
    parser->n_first = n_frames;
    page->n_runs = n_runs;
    page->n_live = n_live;
    return 0;
}

static int parse_entry(struct page_parser *parser, const uint8_t *p,
                       struct qlb_lbz_entry *entry)
{
    unsigned stripe, mask;
    const char *problem;

    entry->record_offset = get_le64(p + LBZ_ENTRY_RECORD_OFFSET);
    entry->size = get_le32(p + LBZ_ENTRY_FRAME_SIZE);
    entry->first = get_le16(p + LBZ_ENTRY_FIRST);
    entry->n_blocks = get_le16(p + LBZ_ENTRY_N_BLOCKS);
    entry->live = entry->record_live = get_le16(p + LBZ_ENTRY_LIVE);
    entry->digest = p + LBZ_ENTRY_DIGEST;
    if (!qlb_bits_all_zero(p + LBZ_ENTRY_RESERVED, 6)) {
        return page_damaged(parser, "reserved bytes of a frame are set");
    }
    if (entry->size < 1 || entry->size > QLB_LBZ_FRAME_MAX) {
        return page_damaged(parser, "a frame has an impossible size");
    }
    if (entry->first >= QLB_LBZ_PAGE_BLOCKS) {
        return page_damaged(parser, "a frame has an impossible place");
    }
    problem = lbz_shape_problem(entry->first, entry->n_blocks, entry->live);
    if (problem != NULL) {
        return page_damaged(parser, problem);
    }
    if (lbz_last_live(entry->first, entry->live) >= parser->n_blocks) {
        return page_damaged(parser,
                            "a frame reaches behind the end of the disk");
    }
    stripe = entry->first / QLB_LBZ_STRIPE_BLOCKS;
    mask = (unsigned)entry->live << entry->first % QLB_LBZ_STRIPE_BLOCKS;
    if (parser->data[stripe] & mask) {
        return page_damaged(parser, "live blocks of two frames coincide");
    }
    parser->data[stripe] |= (uint16_t)mask;
    return 0;
}

/* Order in the guest and in the file. */
static int check_neighbours(struct page_parser *parser,
                            const struct qlb_lbz_entry *before,
                            const struct qlb_lbz_entry *entry)
{
    unsigned first = lbz_first_live(entry->first, entry->live);

    if (first <= lbz_first_live(before->first, before->live)) {
        return page_damaged(parser, "its frames are not in order");
    }
    if (first < lbz_last_live(before->first, before->live)) {
        parser->interleaved = true;
    }
    if (entry->record_offset - before->record_offset !=
        (uint64_t)LBZ_RECORD_SPACE + before->size) {
        return page_damaged(parser,
                            "a frame is not right behind the one before it");
    }
    return 0;
}

static int parse_entries(struct page_parser *parser)
{
    struct qlb_lbz_page *page = parser->page;
    const uint8_t *p = page->payload + LBZ_PAGE_ENTRIES;
    unsigned live = 0;

    page->n_entries = parser->n_first;
    if (reserve_array(&page->entries, page->n_entries,
                      sizeof(*page->entries), parser->err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < page->n_entries; i++) {
        struct qlb_lbz_entry *entry = &page->entries[i];

        if (parse_entry(parser, p, entry) < 0 ||
            (i > 0 && check_neighbours(parser, entry - 1, entry) < 0)) {
            return -1;
        }
        live += (unsigned)__builtin_popcount(entry->live);
        p += LBZ_ENTRY_DIGEST + parser->digest_size;
    }
    if (live != page->n_live) {
        return page_damaged(parser,
                            "its number of live blocks is not its frames'");
    }
    if (page->n_entries > 0) {
        const struct qlb_lbz_entry *last =
            &page->entries[page->n_entries - 1];

        if (page->file_offset - last->record_offset !=
                (uint64_t)LBZ_RECORD_SPACE + last->size ||
            page->entries[0].record_offset >= page->file_offset) {
            return page_damaged(parser,
                                "it is not right behind its last frame");
        }
    }
    return 0;
}

static bool run_meets_data(const struct page_parser *parser,
                           const struct qlb_lbz_run *run)
{
    for (unsigned block = run->first; block < run->first + run->count;
         block++) {
        if (parser->data[block / QLB_LBZ_STRIPE_BLOCKS] >>
                block % QLB_LBZ_STRIPE_BLOCKS & 1) {
            return true;
        }
    }
    return false;
}

/* The next ZERO or DATA run; *end: where the one before ended, -1 if there is
 * none, and then where this one does. */
static int parse_run(struct page_parser *parser, const uint8_t *p, bool zero,
                     int *end, struct qlb_lbz_run *run)
{
    run->first = get_le16(p + LBZ_RUN_FIRST);
    run->count = get_le16(p + LBZ_RUN_COUNT);
    if (run->count == 0 ||
        run->first + run->count > (int)parser->n_blocks) {
        return page_damaged(parser, zero
                            ? "a zero run has an impossible place"
                            : "a data run has an impossible place");
    }
    if (run->first <= *end) {
        return page_damaged(parser, zero
                            ? "its zero runs are not in order"
                            : "its data runs are not in order");
    }
    *end = run->first + run->count;
    return 0;
}

static int parse_runs(struct page_parser *parser)
{
    struct qlb_lbz_page *page = parser->page;
    size_t n_first = parser->n_first;
    const uint8_t *p = page->payload + LBZ_PAGE_ENTRIES +
                       (parser->header->index
                            ? n_first * LBZ_RUN_SIZE
                            : n_first * (LBZ_ENTRY_DIGEST +
                                         parser->digest_size));
    int end = -1;

    if (reserve_array(&page->runs, page->n_runs, sizeof(*page->runs),
                      parser->err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < page->n_runs; i++, p += LBZ_RUN_SIZE) {
        struct qlb_lbz_run *run = &page->runs[i];

        if (parse_run(parser, p, true, &end, run) < 0) {
            return -1;
        }
        if (run_meets_data(parser, run)) {
            return page_damaged(parser, "a zero run contains a live block");
        }
    }
    return 0;
}

/* ---- page of an index ---- */

static void mark_data(struct page_parser *parser,
                      const struct qlb_lbz_run *run)
{
    for (unsigned block = run->first; block < run->first + run->count;
         block++) {
        parser->data[block / QLB_LBZ_STRIPE_BLOCKS] |=
            (uint16_t)(1u << block % QLB_LBZ_STRIPE_BLOCKS);
    }
    parser->n_marked += run->count;
}

/* An entry for each stripe that has a DATA block, as if it were one frame. */
static int entries_of_stripes(struct page_parser *parser)
{
    static const uint8_t no_digest[QLB_DIGEST_MAX];
    struct qlb_lbz_page *page = parser->page;

    if (reserve_array(&page->entries, LBZ_PAGE_STRIPES,
                      sizeof(*page->entries), parser->err) < 0) {
        return -1;
    }
    page->n_entries = 0;
    for (unsigned i = 0; i < LBZ_PAGE_STRIPES; i++) {
        struct qlb_lbz_entry *entry = &page->entries[page->n_entries];

        if (parser->data[i] == 0) {
            continue;
        }
        entry->first = (uint16_t)(i * QLB_LBZ_STRIPE_BLOCKS);
        entry->n_blocks = QLB_LBZ_STRIPE_BLOCKS;
        entry->live = entry->record_live = parser->data[i];
        entry->digest = no_digest;
        page->n_entries++;
    }
    return 0;
}

static int parse_data_runs(struct page_parser *parser)
{
    const uint8_t *p = parser->page->payload + LBZ_PAGE_ENTRIES;
    struct qlb_lbz_run run;
    int end = -1;

    for (unsigned i = 0; i < parser->n_first; i++, p += LBZ_RUN_SIZE) {
        if (parse_run(parser, p, false, &end, &run) < 0) {
            return -1;
        }
        mark_data(parser, &run);
    }
    if (parser->n_marked != parser->page->n_live) {
        return page_damaged(parser,
                            "its number of live blocks is not its runs'");
    }
    return entries_of_stripes(parser);
}

/* ---- block digests ---- */

/* Block digests stand in the order of the blocks; an entry's must stand
 * together. That differs only where frames interleave: then a copy in the
 * order of the entries goes behind the payload. */
static int regroup_digests(struct page_parser *parser, size_t table)
{
    struct qlb_lbz_page *page = parser->page;
    size_t digest_size = parser->digest_size;
    uint8_t *to, *grown;
    uint16_t rank[QLB_LBZ_PAGE_BLOCKS];
    unsigned n = 0;

    grown = realloc(page->payload, page->payload_size +
                                       page->n_live * digest_size);
    if (grown == NULL) {
        return qlb_fail(parser->err, QLB_E_RUNTIME, "out of memory");
    }
    page->payload = grown;
    page->payload_capacity = page->payload_size + page->n_live * digest_size;
    for (unsigned block = 0; block < QLB_LBZ_PAGE_BLOCKS; block++) {
        rank[block] = (uint16_t)n;
        n += parser->data[block / QLB_LBZ_STRIPE_BLOCKS] >>
                 block % QLB_LBZ_STRIPE_BLOCKS & 1;
    }
    to = page->payload + page->payload_size;
    for (unsigned i = 0; i < page->n_entries; i++) {
        struct qlb_lbz_entry *entry = &page->entries[i];

        entry->digest = page->payload + LBZ_PAGE_ENTRIES +
                        i * (LBZ_ENTRY_DIGEST + digest_size) +
                        LBZ_ENTRY_DIGEST;
        entry->block_digests = to;
        for (unsigned live = entry->live; live != 0; live &= live - 1) {
            unsigned block = lbz_first_live(entry->first, live);

            memcpy(to, page->payload + table + rank[block] * digest_size,
                   digest_size);
            to += digest_size;
        }
    }
    return 0;
}

static int link_block_digests(struct page_parser *parser)
{
    struct qlb_lbz_page *page = parser->page;
    size_t table = page->payload_size -
                   (page->n_live + 1) * parser->digest_size;
    const uint8_t *p = page->payload + table;

    if (parser->interleaved) {
        return regroup_digests(parser, table);
    }
    for (unsigned i = 0; i < page->n_entries; i++) {
        page->entries[i].block_digests = p;
        p += (unsigned)__builtin_popcount(page->entries[i].live) *
             parser->digest_size;
    }
    return 0;
}

int lbz_page_from_disk(struct qlb_lbz_page *page,
                       const struct qlb_lbz_header *header,
                       struct qlb_error *err)
{
    struct page_parser parser = {
        .page = page, .header = header, .err = err,
        .digest_size = qlb_digest_size(header->digest),
    };

    page->n_entries = page->n_runs = page->n_live = 0;
    if (page->payload_size < lbz_page_size(0, 0, 0, parser.digest_size) ||
        !lbz_kind_is(page->payload, LBZ_KIND_PAGE)) {
        return lbz_damaged(err, page->file_offset,
                           "there should be an index page");
    }
    page->number = get_le64(page->payload + LBZ_PAGE_NUMBER);
    if (!ends_with_digest(header->digest, page->payload,
                          page->payload_size)) {
        return page_damaged(&parser, "it does not match its digest");
    }
    if (parse_page_counts(&parser) < 0 ||
        (header->index ? parse_data_runs : parse_entries)(&parser) < 0 ||
        parse_runs(&parser) < 0 || link_block_digests(&parser) < 0) {
        page->n_entries = page->n_runs = page->n_live = 0;
        return -1;
    }
    return 0;
}

/* ---- trailer ---- */

void lbz_dir_entry_to_disk(const struct lbz_dir_entry *entry,
                           size_t digest_size, uint8_t *p)
{
    memset(p, 0, LBZ_DIR_DIGEST);
    put_le64(p + LBZ_DIR_NUMBER, entry->number);
    put_le64(p + LBZ_DIR_FILE_OFFSET, entry->file_offset);
    put_le32(p + LBZ_DIR_PAYLOAD_SIZE, entry->payload_size);
    memcpy(p + LBZ_DIR_DIGEST, entry->digest, digest_size);
}

int lbz_dir_entry_from_disk(const uint8_t *p, uint64_t file_offset,
                            const struct qlb_lbz_header *header,
                            struct lbz_dir_entry *entry,
                            struct qlb_error *err)
{
    size_t digest_size = qlb_digest_size(header->digest);

    entry->number = get_le64(p + LBZ_DIR_NUMBER);
    entry->file_offset = get_le64(p + LBZ_DIR_FILE_OFFSET);
    entry->payload_size = get_le32(p + LBZ_DIR_PAYLOAD_SIZE);
    memcpy(entry->digest, p + LBZ_DIR_DIGEST, digest_size);
    if (!qlb_bits_all_zero(p + LBZ_DIR_RESERVED, 4)) {
        return lbz_damaged(err, file_offset,
                           "reserved bytes of the directory are set");
    }
    if (entry->number >= LBZ_PAGE_NUMBER_END ||
        entry->number << LBZ_PAGE_BITS >= header->virtual_size) {
        return lbz_damaged(err, file_offset, "the directory lists page %"
                           PRIu64 ", behind the end of the disk",
                           entry->number);
    }
    if (entry->payload_size < lbz_page_size(0, 0, 0, digest_size) ||
        entry->payload_size > lbz_page_max(digest_size)) {
        return lbz_damaged(err, file_offset, "the directory gives page %"
                           PRIu64 " the size %u", entry->number,
                           entry->payload_size);
    }
    return 0;
}

uint64_t lbz_trailer_size(uint64_t n_pages, size_t digest_size)
{
    return LBZ_TRAILER_DIRECTORY + n_pages * (LBZ_DIR_DIGEST + digest_size) +
           digest_size + LBZ_END_SIZE;
}

void lbz_trailer_to_disk(const struct lbz_trailer *trailer, uint8_t *p)
{
    memset(p, 0, LBZ_TRAILER_DIRECTORY);
    memcpy(p, LBZ_KIND_TRAILER, LBZ_KIND_SIZE);
    put_le64(p + LBZ_TRAILER_N_PAGES, trailer->n_pages);
    put_le64(p + LBZ_TRAILER_DATA_BLOCKS, trailer->data_blocks);
    put_le64(p + LBZ_TRAILER_ZERO_BLOCKS, trailer->zero_blocks);
    put_le64(p + LBZ_TRAILER_FRAMES, trailer->frames);
    put_le64(p + LBZ_TRAILER_COMPRESSED, trailer->compressed);
}

int lbz_trailer_from_disk(const uint8_t *p, uint64_t payload_size,
                          uint64_t file_offset, size_t digest_size,
                          struct lbz_trailer *trailer, struct qlb_error *err)
{
    if (!lbz_kind_is(p, LBZ_KIND_TRAILER)) {
        return lbz_damaged(err, file_offset, "there should be the trailer");
    }
    trailer->n_pages = get_le64(p + LBZ_TRAILER_N_PAGES);
    trailer->data_blocks = get_le64(p + LBZ_TRAILER_DATA_BLOCKS);
    trailer->zero_blocks = get_le64(p + LBZ_TRAILER_ZERO_BLOCKS);
    trailer->frames = get_le64(p + LBZ_TRAILER_FRAMES);
    trailer->compressed = get_le64(p + LBZ_TRAILER_COMPRESSED);
    if (trailer->n_pages > LBZ_PAGES_MAX ||
        payload_size != lbz_trailer_size(trailer->n_pages, digest_size)) {
        return lbz_damaged(err, file_offset, "the trailer's size %" PRIu64
                           " does not fit %" PRIu64 " pages", payload_size,
                           trailer->n_pages);
    }
    if (!qlb_bits_all_zero(p + LBZ_TRAILER_RESERVED_1, 4) ||
        !qlb_bits_all_zero(p + LBZ_TRAILER_RESERVED_2, 16)) {
        return lbz_damaged(err, file_offset,
                           "reserved bytes of the trailer are set");
    }
    return 0;
}

void lbz_end_to_disk(uint64_t trailer_offset, uint32_t payload_size,
                     uint8_t *p)
{
    put_le64(p + LBZ_END_OFFSET, trailer_offset);
    put_le32(p + LBZ_END_PAYLOAD_SIZE, payload_size);
    memcpy(p + LBZ_END_KIND, LBZ_KIND_END, LBZ_KIND_SIZE);
}

bool lbz_end_from_disk(const uint8_t *p, uint64_t *trailer_offset,
                       uint32_t *payload_size)
{
    *trailer_offset = get_le64(p + LBZ_END_OFFSET);
    *payload_size = get_le32(p + LBZ_END_PAYLOAD_SIZE);
    return lbz_kind_is(p + LBZ_END_KIND, LBZ_KIND_END);
}

int lbz_check_totals(const struct lbz_trailer *trailer,
                     const struct lbz_trailer *counted, uint64_t file_offset,
                     struct qlb_error *err)
{
    const struct {
        const char *what;
        uint64_t said, counted;
    } totals[] = {
        {"pages", trailer->n_pages, counted->n_pages},
        {"data blocks", trailer->data_blocks, counted->data_blocks},
        {"zero blocks", trailer->zero_blocks, counted->zero_blocks},
        {"frames", trailer->frames, counted->frames},
        {"compressed bytes", trailer->compressed, counted->compressed},
    };

    for (size_t i = 0; i < sizeof(totals) / sizeof(totals[0]); i++) {
        if (totals[i].said != totals[i].counted) {
            return lbz_damaged(err, file_offset, "the trailer counts %" PRIu64
                               " %s; there are %" PRIu64, totals[i].said,
                               totals[i].what, totals[i].counted);
        }
    }
    return 0;
}

void lbz_count_page(struct lbz_trailer *counted,
                    const struct qlb_lbz_page *page)
{
    counted->n_pages++;
    counted->data_blocks += page->n_live;
    for (unsigned i = 0; i < page->n_entries; i++) {
        counted->frames += page->entries[i].size > 0;
        counted->compressed += page->entries[i].size;
    }
    for (unsigned i = 0; i < page->n_runs; i++) {
        counted->zero_blocks += page->runs[i].count;
    }
}
