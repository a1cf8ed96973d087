#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""What nbdkit's plugin lbz gives, beside a restore and qemu-nbd.

    plugin.py [-n ROUNDS] [--plugin FILE] FOLDER

The disk has 1 GiB of mixed content: text that compresses, noise, and zeroes.
The chain has 24 archives.  The peers take turns in each round; everything is
in the page cache.  Printed are, as tables in Markdown, the best and the median
of the rounds: the sequential read of the chain (nbdcopy and lbrestore to raw),
the time to the first byte, and 4 KiB random reads at depth 16 (fio's engine
nbd), from the plugin and from qemu-nbd on a zstd-compressed qcow2.
"""

import argparse
import json
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import time

MEMBERS = 24
SIZE = 1 << 30
WORDS = [b"%s%d " % (w, n) for n in range(300)
         for w in (b"backup", b"of", b"a", b"disk", b"chain")]


def run(*command):
    """Run it; it must succeed. Its output."""
    return subprocess.run(command, check=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, text=True).stdout


def content():
    """disk.raw: in turn 2 MiB of text, 1 MiB of noise, 1 MiB of zeroes."""
    noise = random.Random(1)
    with open("disk.raw", "wb") as file:
        for at in range(0, SIZE, 4 << 20):
            file.seek(at)
            text = b"".join(noise.choices(WORDS, k=2 << 18))
            file.write(text[:2 << 20] + noise.randbytes(1 << 20))
        file.truncate(SIZE)


def prepare():
    """The chain c/*.lbz, and zstd.qcow2 of the same data."""
    content()
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "disk.raw",
        "disk.qcow2")
    run("lbctl", "enable", "disk.qcow2")
    os.makedirs("c", exist_ok=True)
    noise = random.Random(2)
    run("lbdump", "-q", "-o", "c/00.lbz", "disk.qcow2")
    for n in range(1, MEMBERS):
        writes = [f"write -P {n} {noise.randrange(SIZE >> 16) << 16} 64k"
                  for _ in range(40)]
        subprocess.run(["qemu-io", "-f", "qcow2", "disk.qcow2"], check=True,
                       input="\n".join(writes) + "\n", text=True,
                       stdout=subprocess.DEVNULL)
        run("lbdump", "-q", "--incremental", "-o", f"c/{n:02}.lbz",
            "disk.qcow2")
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-o",
        "compression_type=zstd", "disk.qcow2", "zstd.qcow2")


class Server:
    """A server of the disk behind the socket s."""

    def __init__(self, *command):
        if os.path.exists("s"):
            os.unlink("s")
        self.started = time.monotonic()
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        while not os.path.exists("s"):
            if self.process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended")
            time.sleep(0.001)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def plugin(arguments, *more):
    """nbdkit with the chain."""
    archives = [f"c/{n:02}.lbz" for n in range(MEMBERS)]
    return Server("nbdkit", "-f", "-U", "s", arguments.plugin, *archives,
                  *more)


def qemu_nbd():
    """The peer of random reads."""
    return Server("qemu-nbd", "-t", "-r", "-e", "4", "-k",
                  os.path.abspath("s"), "-f", "qcow2", "zstd.qcow2")


def seconds(*command):
    """How long it takes."""
    start = time.monotonic()
    run(*command)
    return time.monotonic() - start


URI = "nbd+unix:///?socket=s"


def restore(_):
    """lbrestore to raw, s."""
    archives = [f"c/{n:02}.lbz" for n in range(MEMBERS)]
    return seconds("lbrestore", "-q", "--force", "-o", "restored.raw",
                   *archives)


def copy(target):
    """nbdcopy from the plugin, s."""
    def way(arguments):
        with plugin(arguments):
            if os.path.exists(target):
                os.unlink(target)
            return seconds("nbdcopy", "--flush", URI, target)
    return way


def receive(connection, length):
    """Exactly so many bytes."""
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise RuntimeError("the server hung up")
        data += piece
    return data


def first_byte(arguments):
    """From the start of nbdkit to the first byte that a client has, s."""
    with plugin(arguments) as server:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect("s")
            receive(connection, 18)
            # no zeroes behind the answer; the default export
            connection.sendall(struct.pack(">IQII", 3, 0x49484156454f5054,
                                           1, 0))
            receive(connection, 10)
            connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0,
                                           4096))
            if receive(connection, 16)[4:8] != bytes(4):
                raise RuntimeError("the first read failed")
            receive(connection, 1)
            elapsed = time.monotonic() - server.started
            receive(connection, 4095)
            connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 2, 0,
                                           0))
            return elapsed


def random_reads(server):
    """Operations a second at depth 16."""
    def way(arguments):
        with server(arguments):
            run("fio", "--name=r", "--ioengine=nbd", f"--uri={URI}",
                "--rw=randread", "--bs=4k", "--iodepth=16",
                "--runtime=5", "--time_based", f"--size={SIZE}",
                "--randseed=1", "--output-format=json",
                "--output=fio.json")
        with open("fio.json") as file:
            return json.load(file)["jobs"][0]["read"]["iops"]
    return way


WAYS = [
    ("lbrestore to raw", "s", min, restore),
    ("nbdcopy to raw", "s", min, copy("copied.raw")),
    ("nbdcopy to null", "s", min, copy("null:")),
    ("first byte", "s", min, first_byte),
    ("random reads, qemu-nbd", "1/s", max, random_reads(lambda _: qemu_nbd())),
    ("random reads, plugin", "1/s", max, random_reads(plugin)),
    ("random reads, plugin, cache=2G", "1/s", max,
     random_reads(lambda arguments: plugin(arguments, "cache=2G"))),
]


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=3)
    parser.add_argument("--plugin", default="lbz")
    parser.add_argument("folder")
    arguments = parser.parse_args()
    os.makedirs(arguments.folder, exist_ok=True)
    os.chdir(arguments.folder)
    if not os.path.exists("zstd.qcow2"):
        prepare()
    results = {name: [] for name, *_ in WAYS}
    for _ in range(arguments.n):
        for name, _, _, way in WAYS:
            results[name].append(way(arguments))
    run("cmp", "copied.raw", "restored.raw")
    print("| what | unit | best | median |\n| --- | --- | --- | --- |")
    for name, unit, best, _ in WAYS:
        print(f"| {name} | {unit} | {best(results[name]):.3f} | "
              f"{statistics.median(results[name]):.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
