/* The livebackup extension and the trust rules, without I/O.
 *
 * Part of libqcow2lb-core, which the patched QEMU links: libc only, no locks,
 * no threads, no allocation, no printing.  Sources: livebackup-extension.md
 * ("The extension's data"), trust.md (the numbered rules).
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_BITMAP_EXT_H
#define QLB_BITMAP_EXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "uuid.h"

#define QLB_EXT_SIZE 2176
#define QLB_MAX_CHECKPOINTS 32
#define QLB_LABEL_MAX 22
#define QLB_BITMAP_NAME_SIZE 40 /* "lb-", UUID, zero byte */

enum qlb_ext_flags { QLB_EXT_SYNC = 1, QLB_EXT_DURABLE = 2 };

enum qlb_backup_state {
    QLB_STATE_NONE = 0,
    QLB_STATE_RUNNING = 1,
    QLB_STATE_INTERRUPTED = 2,
    QLB_STATE_BROKEN = 3,
};

struct qlb_checkpoint {
    struct qlb_uuid uuid;
    uint64_t time;          /* seconds since 1970 */
    uint64_t virtual_size;  /* bytes */
    uint8_t root[8];        /* first bytes of the root digest, or zeroes */
    bool confirmed;
    char label[QLB_LABEL_MAX + 1];
};

struct qlb_ext {
    uint32_t flags;
    enum qlb_backup_state state;
    bool released;
    unsigned granularity_bits;
    uint64_t generation;
    struct qlb_uuid image_uuid;
    uint8_t boot_id[16];
    uint64_t device;
    uint64_t backing_digest, backing_stat_digest, data_file_stat_digest;
    struct qlb_uuid set_uuid;
    uint64_t begin_time;
    unsigned n_checkpoints;
    struct qlb_checkpoint checkpoints[QLB_MAX_CHECKPOINTS]; /* oldest first */
};

enum qlb_ext_verdict { QLB_EXT_GOOD, QLB_EXT_UNSUPPORTED, QLB_EXT_DAMAGED };

/* Decodes the extension's data and checks every value. */
enum qlb_ext_verdict qlb_ext_decode(const void *data, size_t size,
                                    struct qlb_ext *ext);
/* data: QLB_EXT_SIZE bytes; checksum last. Does not touch the generation. */
void qlb_ext_encode(const struct qlb_ext *ext, void *data);

bool qlb_label_valid(const char *label);
/* name: QLB_BITMAP_NAME_SIZE bytes. */
void qlb_bitmap_name(const struct qlb_uuid *checkpoint, char *name);
/* Whether a bitmap's name is one of ours ("lb-..."). */
bool qlb_bitmap_name_is_ours(const char *name, size_t length);

/* The list. Indexes count from the oldest; -1 where there is none. */
int qlb_ext_find(const struct qlb_ext *ext, const struct qlb_uuid *uuid);
int qlb_ext_newest_confirmed(const struct qlb_ext *ext, const char *label);
/* The checkpoint that is folded when a 33rd is added; -1 if none may be. keep:
 * one that must stay, or -1. */
int qlb_ext_foldable(const struct qlb_ext *ext, int keep);
/* Takes record i out of the list. */
void qlb_ext_remove(struct qlb_ext *ext, unsigned i);

/* FNV-1a of 64 bits; 0 becomes 1 in the final step. */
uint64_t qlb_fnv_start(void);
uint64_t qlb_fnv_update(uint64_t hash, const void *data, size_t len);
uint64_t qlb_fnv_u64(uint64_t hash, uint64_t value); /* 8 bytes, big-endian */
uint64_t qlb_fnv_final(uint64_t hash);
/* The backing digest; backing == NULL gives 0. */
uint64_t qlb_backing_digest(const char *backing, const char *format);

/* The last granule whose bit is a canary, for a checkpoint of that size on a
 * disk that has present_size now. Sizes in bytes, not 0. */
uint64_t qlb_canary_last(uint64_t checkpoint_size, uint64_t present_size,
                         unsigned granularity_bits);

/* Why something is not trusted: the keywords of trust.md. */
enum qlb_trust {
    QLB_TRUSTED = 0,
    QLB_TRUST_OFF,
    QLB_TRUST_UNSUPPORTED,
    QLB_TRUST_EXTENSION_DAMAGED,
    QLB_TRUST_NO_CHECKPOINT,
    QLB_TRUST_BITMAPS_DROPPED,
    QLB_TRUST_DIRECTORY_DAMAGED,
    QLB_TRUST_UNLISTED_BITMAP,
    QLB_TRUST_NOT_CLOSED,
    QLB_TRUST_BACKING_CHANGED,
    QLB_TRUST_BACKING_MODIFIED,
    QLB_TRUST_DATA_FILE_MODIFIED,
    QLB_TRUST_POWER_LOSS,
    QLB_TRUST_MOVED_OPEN,
    QLB_TRUST_BITMAP_MISSING,
    QLB_TRUST_BITMAP_DISABLED,
    QLB_TRUST_IN_USE,
    QLB_TRUST_CANARY,
};

/* What is seen of an image besides its extension. */
struct qlb_trust_image {
    bool autoclear_bitmaps;    /* B, and the bitmaps extension is there */
    bool autoclear_livebackup; /* P */
    bool dirty;                /* incompatible bit 0 */
    bool directory_readable;
    bool unlisted_bitmap;
    uint8_t boot_id[16];       /* of this boot */
    uint64_t device;           /* of the file now */
    uint64_t backing_digest, backing_stat_digest, data_file_stat_digest;
};

/* What is seen of the bitmap of one checkpoint. */
struct qlb_trust_bitmap {
    bool present; /* found, of the right type and granularity, no extra data,
                     its table readable (rule 14) */
    bool automatic;
    bool in_use;
    bool first_canary, last_canary;
};

/* Rules 4 to 13. ext is one that was decoded well. */
enum qlb_trust qlb_trust_image(const struct qlb_ext *ext,
                               const struct qlb_trust_image *image);
/* Rules 14 to 17 for checkpoint i's own bitmap, not those after it. */
enum qlb_trust qlb_trust_bitmap(const struct qlb_ext *ext, unsigned i,
                                const struct qlb_trust_bitmap *bitmap);

/* Tracking writers: what they write, and when (consistency.md). */

/* A bitmap is written through in aligned chunks of so many bytes: a killed
 * process can't tear them. */
#define QLB_CHUNK_SIZE 4096
#define QLB_CHUNK_BITS (QLB_CHUNK_SIZE * UINT64_C(8))

struct qlb_granules {
    uint64_t first, count;
};

/* How many granules a disk has; the last one may be a part. */
uint64_t qlb_granule_count(uint64_t disk_size, unsigned granularity_bits);

/* The granules that a range of guest bytes touches. What lies behind the end
 * of the disk (the VM state of an internal snapshot) has none: count is 0. */
struct qlb_granules qlb_granules_of(uint64_t offset, uint64_t bytes,
                                    uint64_t disk_size,
                                    unsigned granularity_bits);

/* Whether all bits of the range are set.  Needs no lock beside
 * qlb_granules_mark: where it says yes, what the one who marked them did
 * before is visible. */
bool qlb_granules_marked(const uint8_t *bits, struct qlb_granules range);
/* Sets the bits of the range, byte by byte and atomically. */
void qlb_granules_mark(uint8_t *bits, struct qlb_granules range);

/* The write-through: finds the first chunk with a bit of the range that is
 * not in `persisted`, the bits that the file is known to hold.  Takes what it
 * went over, that chunk's part too, off the front of the range.  False: the
 * file holds all of it, and the guest's write may go on. */
bool qlb_writethrough_next(const uint8_t *persisted,
                           struct qlb_granules *range, uint64_t *chunk);

/* The fields of the extension while a tracking writer has the image open, and
 * when it has closed it. The generation goes up. */
void qlb_ext_begin_session(struct qlb_ext *ext, const uint8_t boot_id[16],
                           uint64_t device);
void qlb_ext_end_session(struct qlb_ext *ext);

/* Makes the bitmap of any checkpoint fit a disk of another size.  bits: room
 * for the larger of the two; what lies behind the old size is made anew. */
void qlb_bits_resize(uint8_t *bits, uint64_t old_size, uint64_t new_size,
                     unsigned granularity_bits);

const char *qlb_trust_keyword(enum qlb_trust trust);
/* One sentence for people: what is wrong, without a final dot. */
const char *qlb_trust_reason(enum qlb_trust trust);

#endif
