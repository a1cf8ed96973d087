#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Independent reader of the files that live backup saves originals in.

Made from docs/live-backup.md ("The orig") alone.

    lborig.py show ORIG     the extension, and [[offset, kind]] of what is
                            saved, kind "data" or "zero"; JSON
    lborig.py check ORIG    what of the file is not as specified; exit 4

Exit: 0 done, 1 no orig or an I/O error, 2 usage, 4 not as specified.
"""

import argparse
import json
import sys

import lbext
from layout import Layout, printable
from qcow2 import COPIED, EXTENSION, HEADER3, OFFSET_MASK

EXT_ORIG = 0x4C424F52
MAX_CLUSTER = 2 << 20
HEADER_SIZE = 104

DATA = Layout(
    "big",
    ("version", 4, "int"), ("crc", 4, "int"), ("unit", 8, "int"),
    ("image_uuid", 16, "uuid"), ("set_uuid", 16, "uuid"),
    ("checkpoint_uuid", 16, "uuid"), ("time", 8, "int"),
    ("parent_uuid", 16, "uuid"), ("reserved88", 8, "int"))


class NoOrig(Exception):
    """The file has no extension of ours."""


def round_up(number, step):
    """The next multiple."""
    return -(-number // step) * step


def expected_header(size, unit):
    """What the header of such an orig says, and where its data begins."""
    cluster = min(unit, MAX_CLUSTER)
    l1_size = max(1, -(-size // (cluster * (cluster // 8))))
    l2_offset = 2 * cluster + round_up(l1_size * 8, cluster)
    header = {
        "magic": 0x514649FB, "version": 3, "size": size,
        "cluster_bits": cluster.bit_length() - 1, "l1_size": l1_size,
        "l1_table_offset": 2 * cluster, "refcount_table_offset": cluster,
        "refcount_table_clusters": 1, "incompatible_features": 1,
        "refcount_order": 4, "header_length": HEADER_SIZE}
    return header, l2_offset, l2_offset + l1_size * cluster


class Orig:
    """An orig: header and extension decoded, `broken` what is wrong."""

    def __init__(self, data):
        self.header = HEADER3.decode(data)
        self.broken = []
        extension = EXTENSION.decode(data, HEADER_SIZE)
        start = HEADER_SIZE + EXTENSION.size
        if extension["type"] != EXT_ORIG:
            raise NoOrig("no extension of type LBOR after the header")
        self.data = DATA.decode(data, start)
        raw = bytes(data[start:start + DATA.size])
        self.must(extension["length"] == DATA.size,
                  "the extension is 96 bytes long")
        self.must(self.data["version"] == 1, "the version is 1")
        self.must(self.data["crc"] == lbext.crc32c(
            raw[:4] + bytes(4) + raw[8:]), "the checksum is right")
        self.must(self.data["reserved88"] == 0, "the reserved bytes are zero")
        self.must(not any(data[start + DATA.size:start + DATA.size + 8]),
                  "the end marker follows")
        unit = self.data["unit"]
        self.must(unit & (unit - 1) == 0 and 1 << 16 <= unit <= 1 << 31,
                  "the unit is a power of two, 64 KiB or more")
        self.l2_offset = self.data_offset = None
        if not self.broken:
            self.check_header(unit)

    def must(self, true, sentence):
        """Note what should be and is not."""
        if not true:
            self.broken.append("not so: " + sentence)

    def check_header(self, unit):
        """All of the header follows from the size and the unit."""
        expected, self.l2_offset, self.data_offset = expected_header(
            self.header["size"], unit)
        for name, value in self.header.items():
            self.must(value == expected.get(name, 0),
                      f"{name} is {expected.get(name, 0)}")

    def entries(self, pread):
        """Yield (guest offset, entry) of what is saved; checks the tables."""
        cluster = 1 << self.header["cluster_bits"]
        self.must(not any(pread(cluster, cluster)),
                  "the refcount table is zero")
        for table in range(self.header["l1_size"]):
            at = self.l2_offset + table * cluster
            entry = pread(self.header["l1_table_offset"] + 8 * table, 8)
            self.must(entry == (COPIED | at).to_bytes(8, "big"),
                      f"L1 entry {table} names its table")
            table_data = pread(at, cluster)
            if not any(table_data):
                continue
            for i in range(cluster // 8):
                entry = int.from_bytes(table_data[8 * i:8 * i + 8], "big")
                if entry:
                    self.check_entry(entry, cluster)
                    yield (table * (cluster // 8) + i) * cluster, entry

    def check_entry(self, entry, cluster):
        """Reads as zeroes, or a cluster of the data."""
        offset = entry & OFFSET_MASK
        self.must(entry == 1 or (
            entry == COPIED | offset and offset % cluster == 0
            and offset >= self.data_offset),
            f"an L2 entry may be {entry:#x}")


def load(path):
    """The orig and all its entries."""
    with open(path, "rb") as file:
        def pread(offset, length):
            file.seek(offset)
            return file.read(length).ljust(length, b"\0")

        orig = Orig(pread(0, 4096))
        entries = [] if orig.broken else list(orig.entries(pread))
    return orig, entries


def main(argv):
    """Run a command; return its exit status."""
    parser = argparse.ArgumentParser(description="reader of saved originals")
    parser.add_argument("command", choices=("show", "check"))
    parser.add_argument("orig")
    args = parser.parse_args(argv)
    try:
        orig, entries = load(args.orig)
    except (NoOrig, OSError) as error:
        print(f"lborig.py: {args.orig}: {error}", file=sys.stderr)
        return 1
    if args.command == "show":
        json.dump({"size": orig.header["size"], **printable(orig.data),
                   "saved": [[offset, "zero" if entry == 1 else "data"]
                             for offset, entry in entries]},
                  sys.stdout, indent=1)
        print()
        return 0
    for sentence in orig.broken:
        print(f"{args.orig}: {sentence}")
    return 4 if orig.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
