#!/usr/bin/python3
"""Write a qcow2 image with a great many extents that takes little space.

extents.py IMAGE SIZE EXTENTS

The image has SIZE bytes of virtual disk in clusters of 64 KiB. EXTENTS of them,
spread evenly, stand alone between clusters that are not allocated: every 256th
is data, the others are explicit zeroes. The data clusters share a pool of 64
host clusters with real reference counts (as clusters do that internal
snapshots have in common), so a stock 'qemu-img check' is content. The bitmap
'pattern' (granularity 64 KiB, not recording) has the bit of every extent set:
'qemu-img bitmap --merge' turns the extents into as many changes.

Copyright (C) 2026 The qcow2 livebackup authors
SPDX-License-Identifier: GPL-2.0-or-later
"""

import array
import os
import struct
import sys

CLUSTER = 65536
L2_ENTRIES = CLUSTER // 8
POOL = 64
DATA_EACH = 256
ZERO = 1
COPIED = 1 << 63


def clusters(size):
    return -(-size // CLUSTER)


def big_endian(values, size=None):
    values = array.array("Q", values)
    if sys.byteorder == "little":
        values.byteswap()
    return values.tobytes().ljust(size or 0, b"\0")


class Image:
    def __init__(self, path, size, extents):
        self.file = open(path, "wb")
        self.size = size
        self.guest_clusters = size // CLUSTER
        self.extents = extents
        self.step = self.guest_clusters // extents
        if self.step < 2 or size % (L2_ENTRIES * CLUSTER) != 0:
            sys.exit("extents.py: too many extents, or an odd size")
        self.n_l2 = self.guest_clusters // L2_ENTRIES
        self.n_bitmap = clusters(-(-self.guest_clusters // 8))
        self.lay_out()

    def lay_out(self):
        """One area after the other, after the header in the first cluster."""
        self.end = 1
        self.bitmap_directory = self.area(1)
        self.bitmap_table = self.area(clusters(8 * self.n_bitmap))
        self.bitmap = self.area(self.n_bitmap)
        self.l1 = self.area(clusters(8 * self.n_l2))
        self.l2 = self.area(self.n_l2)
        self.pool = self.area(POOL)
        self.reftable = self.area(1)
        blocks = 1
        while blocks * (CLUSTER // 2) < self.end + blocks:
            blocks += 1
        self.refblocks = self.area(blocks)
        self.n_refblocks = blocks

    def area(self, n):
        first = self.end
        self.end += n
        return first

    def write(self, cluster, data):
        os.pwrite(self.file.fileno(), data, cluster * CLUSTER)

    def write_header(self):
        directory_entry = struct.pack(
            ">QIIBBHI", self.bitmap_table * CLUSTER, self.n_bitmap, 0, 1, 16,
            len("pattern"), 0) + b"pattern"
        directory_entry += b"\0" * (-len(directory_entry) % 8)
        header = b"QFI\xfb" + struct.pack(
            ">IQIIQIIQQIIQQQQII", 3, 0, 0, 16, self.size, 0, self.n_l2,
            self.l1 * CLUSTER, self.reftable * CLUSTER, 1, 0, 0,
            0, 0, 1, 4, 104)
        header += struct.pack(">IIIIQQ", 0x23852875, 24, 1, 0,
                              len(directory_entry),
                              self.bitmap_directory * CLUSTER)
        self.write(0, header + b"\0" * 8)
        self.write(self.bitmap_directory, directory_entry)
        self.write(self.bitmap_table, big_endian(
            (self.bitmap + i) * CLUSTER for i in range(self.n_bitmap)))

    def write_mapping(self):
        """L1, L2 and the bitmap; returns references of each pool cluster."""
        references = [0] * POOL
        bitmap = bytearray(self.n_bitmap * CLUSTER)
        self.write(self.l1, big_endian(
            COPIED | (self.l2 + i) * CLUSTER for i in range(self.n_l2)))
        extent = 0
        for i in range(self.n_l2):
            table = array.array("Q", bytes(CLUSTER))
            cluster = extent * self.step
            while cluster < (i + 1) * L2_ENTRIES and extent < self.extents:
                bitmap[cluster >> 3] |= 1 << (cluster & 7)
                entry = ZERO
                if extent % DATA_EACH == 0:
                    which = extent // DATA_EACH % POOL
                    references[which] += 1
                    entry = (self.pool + which) * CLUSTER
                table[cluster % L2_ENTRIES] = entry
                extent += 1
                cluster += self.step
            self.write(self.l2 + i, big_endian(table))
        self.write(self.bitmap, bitmap)
        return references

    def write_pool(self):
        """Text of two kinds of words, about as compressible as programs."""
        for i in range(POOL):
            noise = os.urandom(CLUSTER // 4)
            self.write(self.pool + i, b"".join(
                b"%02x %02x%02x;" % (i, noise[j], noise[j + 1])
                for j in range(0, CLUSTER // 4, 2))[:CLUSTER])

    def write_refcounts(self, references):
        counts = array.array("H", [1] * self.end)
        for i, n in enumerate(references):
            counts[self.pool + i] = n
        if sys.byteorder == "little":
            counts.byteswap()
        self.write(self.refblocks,
                   counts.tobytes().ljust(self.n_refblocks * CLUSTER, b"\0"))
        self.write(self.reftable, big_endian(
            (self.refblocks + i) * CLUSTER for i in range(self.n_refblocks)))

    def make(self):
        self.write_header()
        self.write_pool()
        self.write_refcounts(self.write_mapping())
        self.file.truncate(self.end * CLUSTER)
        self.file.close()


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    Image(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])).make()


main()
