#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""An application that keeps related records on two disks.

    pairs.py write SOCKET FIRST SECOND    until SIGTERM, as a client of NBD exports
    pairs.py check FIRST.raw SECOND.raw   whether these are of one point in time

Record n is written to the first disk and, once that is answered, to the second one.
So at any time the second has as many as the first, or one less. Records go round in
SLOTS places.
"""

import signal
import socket
import struct
import sys

SLOTS, STEP = 700, 24 << 10


def connect(path, name):
    """A connection in which requests can be sent."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    greeting = sock.recv(18, socket.MSG_WAITALL)
    if greeting[:16] != b"NBDMAGICIHAVEOPT":
        raise RuntimeError(f"no NBD server: {greeting}")
    sock.sendall(struct.pack(">I", 3) + b"IHAVEOPT" +
                 struct.pack(">II", 1, len(name)) + name.encode())
    sock.recv(10, socket.MSG_WAITALL)
    return sock


def write(sock, number):
    """One record, and its answer."""
    data = struct.pack(">Q", number) * 64
    sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, number,
                             number % SLOTS * STEP, len(data)) + data)
    magic, error, handle = struct.unpack(">IIQ",
                                         sock.recv(16, socket.MSG_WAITALL))
    if (magic, error, handle) != (0x67446698, 0, number):
        raise RuntimeError(f"the write of {number} gave {error}")


def work(path, *names):
    """Until it is told to stop."""
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    disks = [connect(path, name) for name in names]
    number = 0
    while not stop:
        number += 1
        for disk in disks:
            write(disk, number)


def records(path):
    """The number in each slot."""
    with open(path, "rb") as file:
        for slot in range(SLOTS):
            file.seek(slot * STEP)
            numbers = set(struct.unpack(">64Q", file.read(512)))
            if len(numbers) != 1:
                sys.exit(f"{path}: slot {slot} is torn: {numbers}")
            yield numbers.pop()


def check(*paths):
    """The newest record of each; all others follow from it."""
    newest = []
    for path in paths:
        found = list(records(path))
        last = max(found)
        for slot, number in enumerate(found):
            wanted = last - (last - slot) % SLOTS
            if number != max(wanted, 0):
                sys.exit(f"{path}: slot {slot} has {number} where the newest "
                         f"is {last}")
        newest.append(last)
    first, second = newest
    print(first, second)
    if first == 0 or first - second not in (0, 1):
        sys.exit(f"records up to {first} and {second}: not of one time")


if __name__ == "__main__":
    {"write": work, "check": check}[sys.argv[1]](*sys.argv[2:])
