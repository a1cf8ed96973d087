#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""What a rollback in place takes, beside the other ways back.

    rollback.py [-n ROUNDS] FOLDER

The disk has 1 TiB, 4 GiB of it content that hardly compresses, all over it;
100 MiB of that change, in pieces of 64 KiB that lie apart.  Then each way back
is taken in turn: by the bitmaps, by the digests, and a full restore to a new
file.  Everything is in the page cache; each way ends with its sync.  The best
and the median of the rounds are printed as a table in Markdown, with the bytes
that were read and written by system calls.
"""

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import time

SPREAD = 128                     # pieces of content over the disk
PIECE = (4 << 30) // SPREAD
CHANGES = (100 << 20) // 65536


def run(*command):
    """Run it; it must succeed."""
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def qemu_io(disk, commands):
    """A stock QEMU runs these."""
    subprocess.run(["qemu-io", "-f", "qcow2", disk], check=True, text=True,
                   input="".join(f"{line}\n" for line in commands),
                   stdout=subprocess.DEVNULL)


def prepare():
    """disk.qcow2 with its archive full.lbz, and changes since."""
    noise = random.Random(1)
    with open("noise", "wb") as file:
        for _ in range(PIECE >> 20):
            file.write(noise.randbytes(1 << 20))
    run("qemu-img", "create", "-q", "-f", "qcow2", "disk.qcow2", "1T")
    run("lbctl", "enable", "disk.qcow2")
    step = (1 << 40) // SPREAD
    qemu_io("disk.qcow2", [f"write -s noise {n * step} {PIECE}"
                           for n in range(SPREAD)])
    run("lbdump", "-q", "-o", "full.lbz", "disk.qcow2")
    places = noise.sample(range(SPREAD * (PIECE >> 16)), CHANGES)
    qemu_io("disk.qcow2", [
        f"write -P {n % 255 + 1} "
        f"{place // (PIECE >> 16) * step + place % (PIECE >> 16) * 65536} 64k"
        for n, place in enumerate(places)])


def counted():
    """Bytes read and written so far, those of children that ended too."""
    with open("/proc/self/io") as file:
        return [int(line.split()[1]) for line in file][:2]


def measure(command):
    """Seconds, bytes read, bytes written."""
    before = counted()
    start = time.monotonic()
    run(*command)
    seconds = time.monotonic() - start
    return (seconds, *(b - a for a, b in zip(before, counted())))


WAYS = {
    "in place, by the bitmaps": ["lbrestore", "-q", "--in-place", "now.qcow2",
                                 "full.lbz"],
    "in place, by the digests": ["lbrestore", "-q", "--rescan", "--in-place",
                                 "now.qcow2", "full.lbz"],
    "full restore, to a new file": ["lbrestore", "-q", "-o", "new.qcow2",
                                    "full.lbz"],
}


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=3)
    parser.add_argument("folder")
    arguments = parser.parse_args()
    os.makedirs(arguments.folder, exist_ok=True)
    os.chdir(arguments.folder)
    if not os.path.exists("full.lbz"):
        prepare()
    print("| way back | best s | median s | MiB read | MiB written |\n"
          "| --- | --- | --- | --- | --- |")
    for name, command in WAYS.items():
        results = []
        for _ in range(arguments.n):
            for path in ("now.qcow2", "new.qcow2"):
                if os.path.exists(path):
                    os.unlink(path)
            if "now.qcow2" in command:
                shutil.copyfile("disk.qcow2", "now.qcow2")
            os.sync()
            results.append(measure(command))
        seconds = [r[0] for r in results]
        print(f"| {name} | {min(seconds):.2f} | "
              f"{statistics.median(seconds):.2f} | {results[0][1] >> 20} | "
              f"{results[0][2] >> 20} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
