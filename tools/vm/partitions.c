/* The partitions of a disk.
 *
 * Sources: UEFI 2.10, chapter 5 (GPT); the kernel's block/partitions/msdos.c for
 * how logical ones are counted.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/partitions.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

enum { SECTOR = 512, MBR_ENTRIES = 446, MBR_ENTRY = 16 };
/* A table says how large an entry is, and how many there are. */
enum { GPT_ENTRY_MIN = 128, GPT_ENTRY_MAX = 4096, GPT_ENTRIES_MAX = 1024 };

struct table {
    int fd;
    uint64_t size;
    struct partition *list;
    unsigned n;
};

static uint32_t get_le32(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 |
           (uint32_t)p[3] << 24;
}

static uint64_t get_le64(const uint8_t *p)
{
    return get_le32(p) | (uint64_t)get_le32(p + 4) << 32;
}

/* 1; 0 where the disk ends before; -1. */
static int read_at(const struct table *table, void *buf, size_t len,
                   uint64_t offset, struct qlb_error *err)
{
    size_t done = 0;

    if (offset > table->size || table->size - offset < len) {
        return 0;
    }
    while (done < len) {
        ssize_t n = pread(table->fd, (char *)buf + done, len - done,
                          (off_t)(offset + done));

        if (n < 0 && errno != EINTR) {
            return qlb_fail_errno(err, errno, "reading the partition table");
        }
        if (n == 0) {
            return 0;
        }
        done += n < 0 ? 0 : (size_t)n;
    }
    return 1;
}

/* In units, of so many bytes. */
static void add(struct table *table, unsigned number, uint64_t first,
                uint64_t count, unsigned unit)
{
    uint64_t units = table->size / unit;

    if (table->n < PARTITIONS_MAX && first > 0 && first < units &&
        count > 0 && count <= units - first) {
        table->list[table->n++] = (struct partition) {
            .number = number, .offset = first * unit, .length = count * unit,
        };
    }
}

/* ---- GPT ---- */

static int read_entries(struct table *table, const uint8_t *header,
                        unsigned unit, struct qlb_error *err)
{
    static const uint8_t unused[16];
    uint64_t at = get_le64(header + 72);
    uint32_t n = get_le32(header + 80), size = get_le32(header + 84);
    uint8_t entry[GPT_ENTRY_MIN];
    int ret = 1;

    if (size < GPT_ENTRY_MIN || size > GPT_ENTRY_MAX ||
        at > table->size / unit) {
        return 1;
    }
    for (uint32_t i = 0; i < n && i < GPT_ENTRIES_MAX && ret > 0; i++) {
        ret = read_at(table, entry, sizeof(entry),
                      at * unit + (uint64_t)i * size, err);
        if (ret > 0 && memcmp(entry, unused, sizeof(unused)) != 0) {
            uint64_t first = get_le64(entry + 32);

            add(table, i + 1, first, get_le64(entry + 40) - first + 1, unit);
        }
    }
    return ret < 0 ? -1 : 1;
}

/* 1: there is one. Its sectors are those of the disk, which we are not told. */
static int read_gpt(struct table *table, struct qlb_error *err)
{
    for (unsigned unit = SECTOR; unit <= 8 * SECTOR; unit *= 8) {
        uint8_t header[SECTOR];
        int ret = read_at(table, header, sizeof(header), unit, err);

        if (ret < 0) {
            return -1;
        }
        if (ret > 0 && memcmp(header, "EFI PART", 8) == 0) {
            return read_entries(table, header, unit, err);
        }
    }
    return 0;
}

/* ---- MBR ---- */

static bool is_extended(uint8_t type)
{
    return type == 0x05 || type == 0x0f || type == 0x85;
}

static int read_mbr_sector(const struct table *table, uint8_t *sector,
                           uint64_t lba, struct qlb_error *err)
{
    int ret = read_at(table, sector, SECTOR, lba * SECTOR, err);

    return ret <= 0 ? ret : sector[510] == 0x55 && sector[511] == 0xaa;
}

/* Each has its own table, whose second entry tells where the next one is: only
 * further on, so that there is an end. */
static int read_logical(struct table *table, uint64_t extended,
                        struct qlb_error *err)
{
    uint8_t sector[SECTOR];
    const uint8_t *entry = sector + MBR_ENTRIES, *link = entry + MBR_ENTRY;
    uint64_t at = extended;
    unsigned number = 5;

    for (;;) {
        int ret = read_mbr_sector(table, sector, at, err);
        uint64_t next;

        if (ret <= 0) {
            return ret;
        }
        if (entry[4] != 0) {
            add(table, number++, at + get_le32(entry + 8),
                get_le32(entry + 12), SECTOR);
        }
        next = extended + get_le32(link + 8);
        if (!is_extended(link[4]) || next <= at ||
            number > PARTITIONS_MAX) {
            return 0;
        }
        at = next;
    }
}

static int read_mbr(struct table *table, struct qlb_error *err)
{
    uint8_t sector[SECTOR];
    uint64_t extended = 0;
    int ret = read_mbr_sector(table, sector, 0, err);

    if (ret <= 0) {
        return ret;
    }
    for (unsigned i = 0; i < 4; i++) {
        const uint8_t *entry = sector + MBR_ENTRIES + MBR_ENTRY * i;

        if (is_extended(entry[4])) {
            extended = get_le32(entry + 8);
        } else if (entry[4] != 0) {
            add(table, i + 1, get_le32(entry + 8), get_le32(entry + 12),
                SECTOR);
        }
    }
    return extended == 0 ? 0 : read_logical(table, extended, err);
}

int partitions_read(int fd, uint64_t size,
                    struct partition list[PARTITIONS_MAX],
                    struct qlb_error *err)
{
    struct table table = { .fd = fd, .size = size, .list = list };
    int ret = read_gpt(&table, err);

    if (ret == 0) {
        ret = read_mbr(&table, err);
    }
    return ret < 0 ? -1 : (int)table.n;
}
