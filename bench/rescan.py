#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""lbdump --rescan and --audit beside xxhsum -H2 over the same bytes.

    rescan.py [-n ROUNDS] [--size MIB] FOLDER

The disk has that much (default: 4096 MiB) that does not compress, of which 16
MiB have changed; all of it is in the page cache.  The peers take turns in each
round, with one thread and with as many as there are processors; xxhsum then
hashes as many pieces of the image at once.  Printed is, as a table in Markdown,
the best and the median of the rounds, and each way's ratio to xxhsum with as
many threads, round by round, in the median.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import time

THREADS = len(os.sched_getaffinity(0))


def run(*command):
    """Run it; it must succeed."""
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def prepare(size):
    """disk.qcow2, and 0.lbz of what it was."""
    noise = random.Random(1)
    with open("disk.raw", "wb") as file:
        for _ in range(size):
            file.write(noise.randbytes(1 << 20))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "disk.raw",
        "disk.qcow2")
    os.unlink("disk.raw")
    run("lbctl", "enable", "disk.qcow2")
    run("lbdump", "-q", "--force", "-o", "0.lbz", "disk.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 3 {size // 2}M 16M",
        "disk.qcow2")


def seconds(*commands):
    """How long they take, all at once."""
    start = time.monotonic()
    processes = [subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL)
                 for command in commands]
    if any([process.wait() for process in processes]):
        raise RuntimeError(f"{commands[0][0]} failed")
    return time.monotonic() - start


def xxhsum(threads):
    """The image, in as many pieces."""
    if threads == 1:
        return seconds(("xxhsum", "-H2", "disk.qcow2"))
    return seconds(*[("xxhsum", "-H2", f"piece.{n}")
                     for n in range(threads)])


def rescan(threads):
    """The image stays as it is, so that each round does the same."""
    return seconds(("lbdump", "-q", "--copy", "--force", "--incremental",
                    "--rescan", f"--threads={threads}", "-o", "1.lbz",
                    "0.lbz", "disk.qcow2"))


def audit(threads):
    """All of the disk."""
    return seconds(("lbdump", "-q", "--audit", f"--threads={threads}",
                    "0.lbz", "disk.qcow2"))


def cut():
    """piece.0 and so on: the image in as many as there are processors."""
    size = -(-os.path.getsize("disk.qcow2") // THREADS)
    with open("disk.qcow2", "rb") as file:
        for n in range(THREADS):
            with open(f"piece.{n}", "wb") as piece:
                for _ in range(-(-size // (1 << 20))):
                    piece.write(file.read(1 << 20))


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=5)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("folder")
    arguments = parser.parse_args()
    os.makedirs(arguments.folder, exist_ok=True)
    os.chdir(arguments.folder)
    if not os.path.exists("piece.0"):
        prepare(arguments.size)
        cut()
    ways = [("xxhsum -H2", xxhsum), ("rescan", rescan), ("audit", audit)]
    print("| what | threads | best s | median s | to xxhsum |\n"
          "| --- | --- | --- | --- | --- |")
    for threads in sorted({1, THREADS}):
        rounds = [[way(threads) for _, way in ways]
                  for _ in range(arguments.n)]
        for i, (name, _) in enumerate(ways):
            times = [times[i] for times in rounds]
            ratio = statistics.median(times[i] / times[0]
                                      for times in rounds)
            print(f"| {name} | {threads} | {min(times):.2f} | "
                  f"{statistics.median(times):.2f} | {ratio:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
