#!/usr/bin/python3
"""What a disk image holds, by the map of qemu-img.

allocated.py content IMAGE           write the content of all data extents, in
                                     the order of the disk, to standard output
allocated.py offsets IMAGE N SEED    print N distinct random offsets, multiples
                                     of 64 KiB, of places that hold data

Only images whose data lie uncompressed in the image itself.

Copyright (C) 2026 The qcow2 livebackup authors
SPDX-License-Identifier: GPL-2.0-or-later
"""

import json
import os
import random
import subprocess
import sys

BLOCK = 65536


def data_extents(image):
    done = subprocess.run(["qemu-img", "map", "--output=json", image],
                          check=True, stdout=subprocess.PIPE)
    for extent in json.loads(done.stdout):
        if extent["data"]:
            yield extent["start"], extent["length"], extent["offset"]


def write_content(image):
    out = sys.stdout.buffer
    with open(image, "rb", buffering=0) as file:
        for _, length, offset in data_extents(image):
            while length > 0:
                piece = os.pread(file.fileno(), min(length, 1 << 20), offset)
                if not piece:
                    sys.exit(f"allocated.py: {image}: ends in an extent")
                out.write(piece)
                offset += len(piece)
                length -= len(piece)
    out.flush()


def print_offsets(image, number, seed):
    offsets = []
    for start, length, _ in data_extents(image):
        first = -(-start // BLOCK)
        offsets.extend(range(first, (start + length) // BLOCK))
    for block in random.Random(seed).sample(offsets, number):
        print(block * BLOCK)


def main():
    match sys.argv[1:]:
        case ["content", image]:
            write_content(image)
        case ["offsets", image, number, seed]:
            print_offsets(image, int(number), int(seed))
        case _:
            sys.exit(__doc__)


main()
