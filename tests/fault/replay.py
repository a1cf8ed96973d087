#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""replay.py LOG BASE DIR: the images that a power loss may leave."""
import random
import sys

PAGE = 4096


def read_log(path):
    """Epochs between syncs, each a list of pages (offset, bytes)."""
    data = open(path, "rb").read()
    epochs, pos = [[]], 0
    while pos < len(data):
        end = data.index(b"\n", pos)
        words = data[pos:end].split()
        pos = end + 1
        if words[0] == b"S":
            epochs.append([])
        if words[0] != b"W":
            continue
        offset, length = int(words[1]), int(words[2])
        while length > 0:
            n = min(length, PAGE - offset % PAGE)
            epochs[-1].append((offset, data[pos:pos + n]))
            pos, offset, length = pos + n, offset + n, length - n
    return epochs


def apply(image, pages):
    for offset, data in pages:
        if len(image) < offset + len(data):
            image.extend(bytes(offset + len(data) - len(image)))
        image[offset:offset + len(data)] = data


def main():
    log, base, directory = sys.argv[1:]
    random.seed(1)
    done, number = bytearray(open(base, "rb").read()), 0
    for pages in read_log(log):
        for keep in (0, 0.1, 0.5, 0.5, 0.9):
            image = bytearray(done)
            apply(image, [p for p in pages if random.random() < keep])
            with open("%s/%d.qcow2" % (directory, number), "wb") as file:
                file.write(image)
            number += 1
        for page in pages if len(pages) < 8 else []:
            image = bytearray(done)
            apply(image, [page])
            with open("%s/%d.qcow2" % (directory, number), "wb") as file:
                file.write(image)
            number += 1
        apply(done, pages)
    print(number)


main()
