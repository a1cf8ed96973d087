# A partitioned disk of files.
#
#   partitioned.py TABLE OUT FILE...
#
# TABLE is mbr (the first FILE is partition 1, all others are logical ones),
# loop (as mbr, but the last logical one leads back to the first), or gpt.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import struct
import sys

SECTOR = 512
GAP = 2048


def entry(kind, start, count):
    return struct.pack("<BxxxBxxxII", 0, kind, start, count)


def table(*entries):
    return (bytes(446) + b"".join(entries)).ljust(510, b"\0") + b"\x55\xaa"


def mbr(starts, counts, loop):
    """Sectors and where they are."""
    extended = starts[1] - GAP
    end = starts[-1] + counts[-1]
    yield 0, table(entry(0x83, starts[0], counts[0]),
                   entry(0x05, extended, end - extended))
    for n in range(1, len(starts)):
        link = entry(0, 0, 0)
        if n + 1 < len(starts):
            link = entry(0x05, starts[n + 1] - GAP - extended,
                         counts[n + 1] + GAP)
        elif loop:
            link = entry(0x05, 0, GAP)
        yield starts[n] - GAP, table(entry(0x83, GAP, counts[n]), link)


def gpt(starts, counts):
    yield 0, table(entry(0xEE, 1, 0xFFFFFFFF))
    yield 1, b"EFI PART".ljust(72, b"\0") + struct.pack("<QII", 2, 128, 128)
    for n, start in enumerate(starts):
        # the second entry is free
        number = n if n == 0 else n + 1
        sector, rest = divmod(number * 128, SECTOR)
        yield 2 + sector, (rest, b"\1" * 32 +
                           struct.pack("<QQ", start, start + counts[n] - 1))


def main():
    kind, out, *files = sys.argv[1:]
    counts = [os.path.getsize(name) // SECTOR for name in files]
    starts, at = [], GAP
    for count in counts:
        starts.append(at + GAP)
        at += GAP + count
    with open(out, "wb") as disk:
        disk.truncate((at + GAP) * SECTOR)
        for start, name in zip(starts, files):
            disk.seek(start * SECTOR)
            with open(name, "rb") as file:
                disk.write(file.read())
        parts = (gpt(starts, counts) if kind == "gpt"
                 else mbr(starts, counts, kind == "loop"))
        for sector, data in parts:
            rest, data = data if isinstance(data, tuple) else (0, data)
            disk.seek(sector * SECTOR + rest)
            disk.write(data)


main()
