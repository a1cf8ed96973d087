/* A chain of archives as a disk that is read at random.
 *
 * Two caches, each dropping what was used longest ago: of index pages (256 MiB
 * of the disk each), as compact copies of what the chain makes of its members;
 * and of decompressed frames, whose sum is limited. One lock for both; frames are
 * read and decompressed without it. A frame that two want is decompressed once: the slot
 * is `loading` meanwhile, and who comes second waits.
 *
 * What is held: `refs` counts who uses a page or a slot just now. Each thread
 * holds one of each at most, so there is always somebody who goes on.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "chain_disk.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define NO_FRAME UINT16_MAX
/* A frame that is read: its record and its compressed bytes. */
#define PACKED_SIZE (QLB_LBZ_FRAME_MAX + 32)

/* A frame, as the page of a chain lists it. */
struct frame {
    unsigned member;
    struct qlb_lbz_entry entry; /* its digests are in the page's */
};

struct page {
    struct page *next;    /* of the list, in no order */
    uint64_t number;
    uint64_t until;       /* the pages from number on to here are alike: more
                             than one only where there is nothing in them */
    uint64_t used;        /* when, in uses */
    unsigned refs;
    size_t bytes;
    unsigned n_frames;
    struct frame *frames;
    uint8_t *digests;
    uint16_t *frame_of;   /* block of the page -> frame; NULL: nothing there */
};

/* A decompressed frame. */
struct slot {
    struct slot *next;    /* of the same hash */
    struct slot *older, *newer; /* in the order of use */
    uint64_t page;
    unsigned frame;
    unsigned refs;
    bool loading;
    size_t size;          /* bytes of blocks */
    uint8_t *blocks;
};

struct worker {
    struct worker *next;
    struct qlb_lbz_decoder *decoder;
    uint8_t *packed;
};

struct chain_disk {
    struct qlb_chain *chain; /* its pages: under chain_lock */
    pthread_mutex_t chain_lock;
    uint64_t size, n_pages;
    enum qlb_digest_type digest;
    size_t digest_size;

    pthread_mutex_t lock;    /* of all below; taken after chain_lock */
    pthread_cond_t changed;
    uint64_t uses;
    struct page *pages;
    size_t page_bytes, page_limit;
    struct slot **slots;     /* by hash */
    size_t n_hashes;         /* a power of two */
    struct slot *oldest, *newest;
    size_t slot_bytes, slot_limit;
    struct worker *workers;  /* those that are idle */
};

static int out_of_memory(struct qlb_error *err)
{
    return qlb_fail_errno(err, ENOMEM, "reading the archives");
}

static uint64_t min_length(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* ---- workers ---- */

static void free_worker(struct worker *worker)
{
    if (worker != NULL) {
        qlb_lbz_decoder_free(worker->decoder);
        free(worker->packed);
        free(worker);
    }
}

static int add_worker(struct chain_disk *disk, struct qlb_error *err)
{
    struct worker *worker = calloc(1, sizeof(*worker));

    if (worker == NULL || (worker->packed = malloc(PACKED_SIZE)) == NULL) {
        free_worker(worker);
        return out_of_memory(err);
    }
    worker->decoder = qlb_lbz_decoder_new(err);
    if (worker->decoder == NULL) {
        free_worker(worker);
        return -1;
    }
    worker->next = disk->workers;
    disk->workers = worker;
    return 0;
}

/* The lock is held. */
static struct worker *take_worker(struct chain_disk *disk)
{
    struct worker *worker;

    while (disk->workers == NULL) {
        pthread_cond_wait(&disk->changed, &disk->lock);
    }
    worker = disk->workers;
    disk->workers = worker->next;
    return worker;
}

static void give_worker(struct chain_disk *disk, struct worker *worker)
{
    worker->next = disk->workers;
    disk->workers = worker;
    pthread_cond_broadcast(&disk->changed);
}

/* ---- pages ---- */

static void free_page(struct page *page)
{
    if (page != NULL) {
        free(page->frames);
        free(page->digests);
        free(page->frame_of);
        free(page);
    }
}

static void map_frame(struct page *page, unsigned i)
{
    const struct qlb_lbz_entry *entry = &page->frames[i].entry;

    for (unsigned block = 0; block < entry->n_blocks; block++) {
        if (entry->live >> block & 1) {
            page->frame_of[entry->first + block] = (uint16_t)i;
        }
    }
}

/* What the chain reuses for its next page is copied. */
static int copy_frames(struct page *page, const struct qlb_chain_page *from,
                       size_t digest_size, struct qlb_error *err)
{
    size_t n_digests = from->n_frames;
    uint8_t *to;

    for (unsigned i = 0; i < from->n_frames; i++) {
        n_digests += (size_t)__builtin_popcount(from->frames[i].entry.live);
    }
    page->frames = calloc(from->n_frames, sizeof(*page->frames));
    page->digests = malloc(n_digests * digest_size);
    page->frame_of = malloc(QLB_LBZ_PAGE_BLOCKS * sizeof(*page->frame_of));
    if (page->frames == NULL || page->digests == NULL ||
        page->frame_of == NULL) {
        return out_of_memory(err);
    }
    page->n_frames = from->n_frames;
    page->bytes += from->n_frames * sizeof(*page->frames) +
                   n_digests * digest_size +
                   QLB_LBZ_PAGE_BLOCKS * sizeof(*page->frame_of);
    memset(page->frame_of, 0xff,
           QLB_LBZ_PAGE_BLOCKS * sizeof(*page->frame_of));
    to = page->digests;
    for (unsigned i = 0; i < from->n_frames; i++) {
        struct frame *frame = &page->frames[i];
        size_t n;

        frame->member = from->frames[i].member;
        frame->entry = from->frames[i].entry;
        n = (size_t)__builtin_popcount(frame->entry.live) * digest_size;
        memcpy(to, frame->entry.digest, digest_size);
        memcpy(to + digest_size, frame->entry.block_digests, n);
        frame->entry.digest = to;
        frame->entry.block_digests = to + digest_size;
        to += digest_size + n;
        map_frame(page, i);
    }
    return 0;
}

/* chain_lock is held. A page that no member has stands for all up to the next
 * one that some member has; that one is not read, it may be damaged. */
static struct page *load_page(struct chain_disk *disk, uint64_t number,
                              struct qlb_error *err)
{
    const struct qlb_chain_page *from = NULL;
    struct page *page = calloc(1, sizeof(*page));
    uint64_t next;
    int ret;

    if (page == NULL) {
        out_of_memory(err);
        return NULL;
    }
    page->number = number;
    page->until = number + 1;
    page->bytes = sizeof(*page);
    ret = qlb_chain_page_at(disk->chain, number, &from, &next, err);
    if (ret == 0) {
        page->until = min_length(next, disk->n_pages);
    } else if (ret > 0 && from->n_frames > 0) {
        ret = copy_frames(page, from, disk->digest_size, err);
    }
    if (ret < 0) {
        free_page(page);
        return NULL;
    }
    return page;
}

/* The lock is held. */
static struct page *find_page(struct chain_disk *disk, uint64_t number)
{
    struct page *page = disk->pages;

    while (page != NULL && (number < page->number || number >= page->until)) {
        page = page->next;
    }
    if (page != NULL) {
        page->refs++;
        page->used = ++disk->uses;
    }
    return page;
}

static struct page **oldest_page(struct chain_disk *disk)
{
    struct page **oldest = NULL;

    for (struct page **at = &disk->pages; *at != NULL; at = &(*at)->next) {
        if ((*at)->refs == 0 &&
            (oldest == NULL || (*at)->used < (*oldest)->used)) {
            oldest = at;
        }
    }
    return oldest;
}

static void trim_pages(struct chain_disk *disk)
{
    struct page **oldest;

    while (disk->page_bytes > disk->page_limit &&
           (oldest = oldest_page(disk)) != NULL) {
        struct page *page = *oldest;

        *oldest = page->next;
        disk->page_bytes -= page->bytes;
        free_page(page);
    }
}

/* Held until it is put. */
static struct page *get_page(struct chain_disk *disk, uint64_t number,
                             struct qlb_error *err)
{
    struct page *page;

    pthread_mutex_lock(&disk->lock);
    page = find_page(disk, number);
    pthread_mutex_unlock(&disk->lock);
    if (page != NULL) {
        return page;
    }
    pthread_mutex_lock(&disk->chain_lock);
    pthread_mutex_lock(&disk->lock);
    page = find_page(disk, number); /* another thread was faster */
    pthread_mutex_unlock(&disk->lock);
    if (page == NULL && (page = load_page(disk, number, err)) != NULL) {
        pthread_mutex_lock(&disk->lock);
        page->refs = 1;
        page->used = ++disk->uses;
        page->next = disk->pages;
        disk->pages = page;
        disk->page_bytes += page->bytes;
        trim_pages(disk);
        pthread_mutex_unlock(&disk->lock);
    }
    pthread_mutex_unlock(&disk->chain_lock);
    return page;
}

static void put_page(struct chain_disk *disk, struct page *page)
{
    pthread_mutex_lock(&disk->lock);
    page->refs--;
    trim_pages(disk);
    pthread_mutex_unlock(&disk->lock);
}

/* ---- frames ---- */

static const char *member_name(const struct chain_disk *disk, unsigned member)
{
    return qlb_lbz_reader_name(qlb_chain_member(disk->chain, member));
}

static int decode(const struct chain_disk *disk, struct worker *worker,
                  uint64_t page_offset, const struct frame *frame,
                  uint8_t *blocks, struct qlb_error *err)
{
    const struct qlb_lbz_entry *entry = &frame->entry;
    uint64_t offset = page_offset + (uint64_t)entry->first * QLB_LBZ_BLOCK;

    if (qlb_lbz_reader_frame(qlb_chain_member(disk->chain, frame->member),
                             entry, page_offset, worker->packed, err) < 0 ||
        qlb_lbz_decode_at(worker->decoder, entry->record_offset, offset,
                          worker->packed + 32, entry->size, entry->n_blocks,
                          blocks, err) < 0 ||
        qlb_lbz_check_blocks(disk->digest, entry, page_offset, blocks,
                             err) < 0) {
        return qlb_error_prefix(err, "%s", member_name(disk, frame->member));
    }
    return 0;
}

/* The lock is held, as for all that follows but get_slot and put_slot. */
static struct slot **slot_place(struct chain_disk *disk, uint64_t page,
                                unsigned frame)
{
    uint64_t hash = (page << 16 | frame) * UINT64_C(0x9e3779b97f4a7c15);
    struct slot **at = &disk->slots[hash >> 32 & (disk->n_hashes - 1)];

    while (*at != NULL && ((*at)->page != page || (*at)->frame != frame)) {
        at = &(*at)->next;
    }
    return at;
}

static void unlink_use(struct chain_disk *disk, struct slot *slot)
{
    *(slot->older != NULL ? &slot->older->newer : &disk->oldest) =
        slot->newer;
    *(slot->newer != NULL ? &slot->newer->older : &disk->newest) =
        slot->older;
}

static void link_newest(struct chain_disk *disk, struct slot *slot)
{
    slot->older = disk->newest;
    slot->newer = NULL;
    *(slot->older != NULL ? &slot->older->newer : &disk->oldest) = slot;
    disk->newest = slot;
}

/* Its blocks become the caller's. */
static uint8_t *drop_slot(struct chain_disk *disk, struct slot *slot)
{
    uint8_t *blocks = slot->blocks;

    *slot_place(disk, slot->page, slot->frame) = slot->next;
    unlink_use(disk, slot);
    disk->slot_bytes -= slot->size;
    free(slot);
    return blocks;
}

/* Until there is room for so many bytes, those that nobody uses go, which were
 * used longest ago first; memory of the same size is kept in *spare. False: the
 * rest is in use. */
static bool make_room(struct chain_disk *disk, size_t size, uint8_t **spare)
{
    struct slot *slot = disk->oldest;

    while (disk->slot_bytes + size > disk->slot_limit) {
        struct slot *newer;
        bool fits;
        uint8_t *blocks;

        while (slot != NULL && slot->refs > 0) {
            slot = slot->newer;
        }
        if (slot == NULL) {
            return false;
        }
        newer = slot->newer;
        fits = slot->size == size && *spare == NULL;
        blocks = drop_slot(disk, slot);
        if (fits) {
            *spare = blocks;
        } else {
            free(blocks);
        }
        slot = newer;
    }
    return true;
}

/* One for that frame, which is in use, and loading; its blocks are the spare
 * ones, if there are any. NULL: out of memory. */
static struct slot *add_slot(struct chain_disk *disk, uint64_t page,
                             unsigned frame, size_t size, uint8_t *spare)
{
    struct slot *slot = calloc(1, sizeof(*slot));

    if (slot == NULL ||
        (slot->blocks = spare != NULL ? spare : malloc(size)) == NULL) {
        free(slot);
        free(spare);
        return NULL;
    }
    slot->page = page;
    slot->frame = frame;
    slot->size = size;
    slot->refs = 1;
    slot->loading = true;
    *slot_place(disk, page, frame) = slot;
    link_newest(disk, slot);
    disk->slot_bytes += size;
    return slot;
}

/* The lock is let go of meanwhile. A frame that is damaged is looked at again by
 * each who wants it: the archive may be on a network. */
static struct slot *load_slot(struct chain_disk *disk,
                              const struct page *page, unsigned frame,
                              size_t size, uint8_t *spare,
                              struct qlb_error *err)
{
    struct slot *slot = add_slot(disk, page->number, frame, size, spare);
    struct worker *worker;
    int ret;

    if (slot == NULL) {
        out_of_memory(err);
        return NULL;
    }
    worker = take_worker(disk);
    pthread_mutex_unlock(&disk->lock);
    ret = decode(disk, worker, page->number * QLB_LBZ_PAGE,
                 &page->frames[frame], slot->blocks, err);
    pthread_mutex_lock(&disk->lock);
    give_worker(disk, worker);
    slot->loading = false;
    if (ret < 0) {
        free(drop_slot(disk, slot));
        slot = NULL;
    }
    pthread_cond_broadcast(&disk->changed);
    return slot;
}

/* Held until it is put. */
static struct slot *get_slot(struct chain_disk *disk, const struct page *page,
                             unsigned frame, struct qlb_error *err)
{
    size_t size = (size_t)page->frames[frame].entry.n_blocks * QLB_LBZ_BLOCK;
    uint8_t *spare = NULL;
    struct slot *slot;

    pthread_mutex_lock(&disk->lock);
    for (;;) {
        slot = *slot_place(disk, page->number, frame);
        if (slot != NULL && !slot->loading) {
            slot->refs++;
            unlink_use(disk, slot);
            link_newest(disk, slot);
            break;
        }
        if (slot == NULL && make_room(disk, size, &spare)) {
            slot = load_slot(disk, page, frame, size, spare, err);
            spare = NULL;
            break;
        }
        free(spare);
        spare = NULL;
        pthread_cond_wait(&disk->changed, &disk->lock);
    }
    pthread_mutex_unlock(&disk->lock);
    return slot;
}

static void put_slot(struct chain_disk *disk, struct slot *slot)
{
    pthread_mutex_lock(&disk->lock);
    slot->refs--;
    pthread_cond_broadcast(&disk->changed);
    pthread_mutex_unlock(&disk->lock);
}

/* ---- reading ---- */

/* How many of the page's blocks from there on have that frame, at most n. */
static unsigned same_frame(const struct page *page, unsigned block, unsigned n)
{
    unsigned frame = page->frame_of[block], count = 1;

    while (count < n && page->frame_of[block + count] == frame) {
        count++;
    }
    return count;
}

/* A run within one frame, or one that has none; *length is cut to it. */
static int read_run(struct chain_disk *disk, const struct page *page,
                    uint8_t *buf, uint64_t inside, uint64_t *length,
                    struct qlb_error *err)
{
    unsigned block = (unsigned)(inside / QLB_LBZ_BLOCK);
    unsigned last = (unsigned)((inside + *length - 1) / QLB_LBZ_BLOCK);
    unsigned n = same_frame(page, block, last - block + 1);
    unsigned index = page->frame_of[block];
    uint64_t end = (uint64_t)(block + n) * QLB_LBZ_BLOCK;
    struct slot *slot;

    if (end - inside < *length) {
        *length = end - inside;
    }
    if (index == NO_FRAME) {
        memset(buf, 0, *length);
        return 0;
    }
    slot = get_slot(disk, page, index, err);
    if (slot == NULL) {
        return -1;
    }
    memcpy(buf, slot->blocks + (inside - (uint64_t)QLB_LBZ_BLOCK *
                                             page->frames[index].entry.first),
           *length);
    put_slot(disk, slot);
    return 0;
}

int chain_disk_read(struct chain_disk *disk, void *buf, uint64_t offset,
                    uint64_t length, struct qlb_error *err)
{
    uint8_t *to = buf;
    int ret = 0;

    while (ret == 0 && length > 0) {
        struct page *page = get_page(disk, offset / QLB_LBZ_PAGE, err);
        uint64_t run;

        if (page == NULL) {
            return -1;
        }
        if (page->frame_of == NULL) {
            run = min_length(length, page->until * QLB_LBZ_PAGE - offset);
            memset(to, 0, run);
        } else {
            uint64_t inside = offset - page->number * QLB_LBZ_PAGE;

            run = min_length(length, QLB_LBZ_PAGE - inside);
            ret = read_run(disk, page, to, inside, &run, err);
        }
        put_page(disk, page);
        to += run;
        offset += run;
        length -= run;
    }
    return ret;
}

int chain_disk_extent(struct chain_disk *disk, uint64_t offset,
                      uint64_t length, bool *data, uint64_t *run,
                      struct qlb_error *err)
{
    struct page *page = get_page(disk, offset / QLB_LBZ_PAGE, err);
    unsigned block;
    uint64_t end;

    if (page == NULL) {
        return -1;
    }
    if (page->frame_of == NULL) {
        *data = false;
        end = page->until * QLB_LBZ_PAGE;
    } else {
        block = (unsigned)(offset % QLB_LBZ_PAGE / QLB_LBZ_BLOCK);
        *data = page->frame_of[block] != NO_FRAME;
        while (block < QLB_LBZ_PAGE_BLOCKS &&
               (page->frame_of[block] != NO_FRAME) == *data) {
            block++;
        }
        end = page->number * QLB_LBZ_PAGE + (uint64_t)block * QLB_LBZ_BLOCK;
    }
    put_page(disk, page);
    *run = min_length(length, end - offset);
    return 0;
}

/* ---- opening ---- */

/* A quarter is for pages; the rest, less what the workers have, for frames. */
static int divide_memory(struct chain_disk *disk, uint64_t memory,
                         unsigned threads, struct qlb_error *err)
{
    uint64_t rest;

    disk->page_limit = memory / 4;
    for (unsigned i = 0; i < threads; i++) {
        if (add_worker(disk, err) < 0) {
            return -1;
        }
    }
    rest = memory - disk->page_limit - threads * (uint64_t)(2 * PACKED_SIZE);
    disk->slot_limit = rest;
    disk->n_hashes = 1;
    while (disk->n_hashes < rest / QLB_LBZ_BLOCK) {
        disk->n_hashes *= 2;
    }
    disk->slots = calloc(disk->n_hashes, sizeof(struct slot *));
    return disk->slots == NULL ? out_of_memory(err) : 0;
}

static int open_disk(struct chain_disk *disk, const char *const *paths,
                     unsigned n_paths, const struct qlb_uuid *at,
                     uint64_t memory, unsigned threads, struct qlb_error *err)
{
    const struct qlb_lbz_header *header;

    disk->chain = qlb_chain_open(paths, n_paths, at, QLB_CHAIN_NEED_FULL,
                                 err);
    if (disk->chain == NULL) {
        return -1;
    }
    header = qlb_chain_header(disk->chain);
    disk->size = header->virtual_size;
    disk->n_pages = disk->size / QLB_LBZ_PAGE +
                    (disk->size % QLB_LBZ_PAGE != 0);
    disk->digest = header->digest;
    disk->digest_size = qlb_digest_size(header->digest);
    return divide_memory(disk, memory, threads, err);
}

struct chain_disk *chain_disk_open(const char *const *paths, unsigned n_paths,
                                   const struct qlb_uuid *at, uint64_t memory,
                                   unsigned threads, struct qlb_error *err)
{
    struct chain_disk *disk = calloc(1, sizeof(*disk));

    if (disk == NULL) {
        out_of_memory(err);
        return NULL;
    }
    pthread_mutex_init(&disk->chain_lock, NULL);
    pthread_mutex_init(&disk->lock, NULL);
    pthread_cond_init(&disk->changed, NULL);
    if (open_disk(disk, paths, n_paths, at, memory, threads, err) < 0) {
        chain_disk_close(disk);
        return NULL;
    }
    return disk;
}

void chain_disk_close(struct chain_disk *disk)
{
    if (disk == NULL) {
        return;
    }
    while (disk->pages != NULL) {
        struct page *page = disk->pages;

        disk->pages = page->next;
        free_page(page);
    }
    while (disk->oldest != NULL) {
        free(drop_slot(disk, disk->oldest));
    }
    free(disk->slots);
    while (disk->workers != NULL) {
        struct worker *worker = disk->workers;

        disk->workers = worker->next;
        free_worker(worker);
    }
    qlb_chain_close(disk->chain);
    pthread_cond_destroy(&disk->changed);
    pthread_mutex_destroy(&disk->lock);
    pthread_mutex_destroy(&disk->chain_lock);
    free(disk);
}

uint64_t chain_disk_size(const struct chain_disk *disk)
{
    return disk->size;
}
