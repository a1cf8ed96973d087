#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Backups of disks that are written to with all that the writers have.

    live-stress.py [--rounds N] [--seed S] [--disks N] [--writers N]
                   [--size MIB] [--cluster BYTES] [--granularity BYTES]
                   [--extended] [--data-file] [--backing] [--compressed]

Processes write numbered sectors to the exports of a qemu-storage-daemon, and
note when each request was sent and answered.  Backup after backup is made of
the disks, and each point in time is read beside the daemon as
docs/live-backup.md tells other processes to, by a reader made from that text:
early and late in the backup, or after the daemon was killed.

What must hold of a point in time T: a request that is seen in any sector was
sent before T; one that is not seen where it should be was answered after T.
One T, within the time that livebackup-begin took, must do for all sectors of
all disks.  So nothing is lost, early, or out of order, across disks too.  Of
an incremental backup only the granules of its set are read, the others are
those of its parent: so the set must cover every change.
"""

import argparse
import array
import fcntl
import mmap
import os
import random
import select
import shutil
import signal
import socket
import struct
import sys
import time

from daemon import Daemon, Dead, Refused
from qemulib import Failure, expect_no_errors, img, lbext, qcow2, remove
import lborig

SECTOR = 512
NEVER = 1 << 62
RUNNING = 1
HEAD = struct.Struct(">4sIQQQ")
ZERO = bytes(SECTOR)
PREFILLED = 1
WRITE, ZEROES, DISCARD, FLUSH = "write", "zeroes", "discard", "flush"
KINDS = (WRITE, ZEROES, DISCARD, FLUSH)


def sectors(disk, first, count, number):
    """Content that says what it is."""
    return b"".join(HEAD.pack(b"QLBS", disk, sector, number, number) * 16
                    for sector in range(first, first + count))


def number_in(disk, sector, data):
    """The number of a sector's content, 0 of zeroes, None of anything else."""
    if data == ZERO:
        return 0
    number = int.from_bytes(data[16:24], "big")
    return number if data == sectors(disk, sector, 1, number) else None


def shown(disk, sector, data):
    """The number, or what is in its place."""
    number = number_in(disk, sector, data)
    return str(number) if number is not None else (
        f"{data[:24].hex()}... {'' if data[:32] * 16 == data else 'mixed'}")


# --------------------------------------------------------------------------
# The guests
# --------------------------------------------------------------------------

class Nbd:
    """A connection to an export, for several requests at once."""

    COMMANDS = {WRITE: 1, FLUSH: 3, DISCARD: 4, ZEROES: 6}

    def __init__(self, name):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect("nbd")
        self.pending = b""
        if self.take(18)[:16] != b"NBDMAGICIHAVEOPT":
            raise OSError("not an NBD server")
        name = name.encode()
        self.socket.sendall(struct.pack(
            ">I8sIII", 3, b"IHAVEOPT", 7, len(name) + 6, len(name))
            + name + b"\0\0")
        reply = 0
        while reply != 1:
            _, _, reply, length = struct.unpack(">QIII", self.take(20))
            self.take(length)
            if reply >> 31:
                raise OSError(f"the export is refused: {reply:x}")

    def take(self, count):
        """Exactly so many bytes."""
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise ConnectionError("closed")
            data += piece
        return data

    def send(self, kind, handle, offset, length, data=b"", flags=0):
        """A request."""
        self.socket.sendall(struct.pack(
            ">IHHQQI", 0x25609513, flags, self.COMMANDS[kind], handle, offset,
            length) + data)

    def replies(self):
        """[(handle, error)], at least one."""
        self.pending += self.socket.recv(1 << 16) or b"closed"
        if self.pending.endswith(b"closed"):
            raise ConnectionError("closed")
        whole = len(self.pending) // 16 * 16
        found = [(handle, error) for _, error, handle
                 in struct.iter_unpack(">IIQ", self.pending[:whole])]
        self.pending = self.pending[whole:]
        return found


class Claims:
    """Which clusters requests are under way to, of all writers.

    While QEMU writes to a cluster that a discard frees, somebody else may get
    that cluster, and zeroes may be lost beside a write that makes a copy of
    their cluster: this is so in stock QEMU too.  So a request that zeroes or
    discards has its clusters for itself.
    """

    def __init__(self, args):
        self.clusters = -(-args.size // args.cluster)
        self.per_cluster = args.cluster // SECTOR
        self.size = args.disks * self.clusters
        self.writers = range(args.writers)
        # Two tables for each writer, who alone counts in them.
        self.shared = mmap.mmap(-1, 2 * args.writers * self.size)
        self.lock = None

    def open(self):
        """In the writer's process: locks are those of a process."""
        self.lock = open("claims", "wb")

    def take(self, writer, disk, first, count, frees):
        """Whether a request may go; returns its claim, or None."""
        base = disk * self.clusters
        start = base + first // self.per_cluster
        end = base + (first + count - 1) // self.per_cluster + 1
        fcntl.lockf(self.lock, fcntl.LOCK_EX)
        try:
            for other in self.writers:
                for table in (0, 1) if frees else (1,):
                    at = (2 * other + table) * self.size
                    if any(self.shared[at + start:at + end]):
                        return None
            at = (2 * writer + frees) * self.size
            self.count(at + start, at + end, 1)
        finally:
            fcntl.lockf(self.lock, fcntl.LOCK_UN)
        return at + start, at + end

    def count(self, start, end, step):
        """A claim comes or goes."""
        for at in range(start, end):
            self.shared[at] += step


class Writer:
    """A process that writes to all disks until it is told to stop, or the
    server is gone.  Its log: of each request the disk, kind, first sector,
    number of sectors, number, when it was sent and answered (or NEVER)."""

    FIELDS = 7

    def __init__(self, args, claims, index, seed, base):
        self.args = args
        self.claims = claims
        self.claimed = {}
        self.record_to = 0 if index == 0 else None
        self.index = index
        self.random = random.Random(seed)
        self.number = base + index
        self.log = array.array("Q")
        self.stopped = False
        self.depth = self.random.choice([1, 2, 4, 8, 16, 16, 24, 32])
        # Not too many of those that take long to check.
        self.whole = args.cluster // SECTOR
        if self.random.random() * self.whole > 128:
            self.whole = 128
        self.last = args.size // SECTOR - 8        # for the record
        self.hot = self.random.randrange(self.last - 512)

    def run(self, path):
        """All of it; the exit status."""
        signal.signal(signal.SIGTERM, self.stop)
        status = 0
        connections = []
        self.claims.open()
        try:
            for disk in range(self.args.disks):
                for _ in range(self.random.choice([1, 1, 2])):
                    connections.append((disk, Nbd(f"disk{disk}")))
            status = self.work(connections)
        except (ConnectionError, FileNotFoundError):
            status = 3
        with open(path, "wb") as file:
            self.log.tofile(file)
        return status

    def stop(self, *_):
        """What was sent is waited for."""
        self.stopped = True

    def work(self, connections):
        """Keep every connection busy."""
        poll = select.poll()
        by_fd = {}
        for disk, nbd in connections:
            poll.register(nbd.socket, select.POLLIN)
            by_fd[nbd.socket.fileno()] = (disk, nbd)
        busy = dict.fromkeys(by_fd, 0)
        while True:
            self.record(connections, busy)
            for fd, (disk, nbd) in by_fd.items():
                while (not self.stopped and busy[fd] < self.depth
                       and self.request(disk, nbd)):
                    busy[fd] += 1
            if self.stopped and not any(busy.values()):
                return 0
            # Somebody may have been in the way.
            for fd, _ in poll.poll(2):
                disk, nbd = by_fd[fd]
                for handle, error in nbd.replies():
                    if error:
                        print(f"request {handle} fails: {error}",
                              list(self.log[handle * 7:handle * 7 + 7]),
                              file=sys.stderr)
                        return 1
                    self.log[handle * 7 + 6] = time.monotonic_ns()
                    busy[fd] -= 1
                    if handle in self.claimed:
                        self.claims.count(*self.claimed.pop(handle), -1)
                    if self.log[handle * 7 + 2] == self.last:
                        self.record_to = (disk + 1) % self.args.disks

    def record(self, connections, busy):
        """The next record to the next disk, once the one before has its."""
        if self.stopped or self.record_to is None:
            return
        for disk, nbd in connections:
            if disk == self.record_to:
                if self.send(disk, nbd, WRITE, self.last, 8):
                    busy[nbd.socket.fileno()] += 1
                    self.record_to = None
                break

    def send(self, disk, nbd, kind, first, count, flags=0):
        """Note it and send it, if nobody is in the way; tell whether."""
        handle = len(self.log) // self.FIELDS
        frees = kind in (DISCARD, ZEROES)
        if kind != FLUSH:
            claim = self.claims.take(self.index, disk, first, count, frees)
            if claim is None:
                return False
            self.claimed[handle] = claim
        self.number += self.args.writers
        data = (sectors(disk, first, count, self.number) if kind == WRITE
                else b"")
        self.log.extend((disk, KINDS.index(kind), first, count, self.number,
                         time.monotonic_ns(), NEVER))
        nbd.send(kind, handle, first * SECTOR, count * SECTOR, data, flags)
        return True

    def request(self, disk, nbd):
        """Any."""
        draw = self.random.random()
        if draw < 0.02:
            return self.send(disk, nbd, FLUSH, 0, 0)
        kind, flags = WRITE, 0
        if draw < 0.7:
            count, step = 8, 8
        elif draw < 0.85:
            count, step = self.random.randrange(1, 24), 1
        elif draw < 0.88:
            count, step = self.random.randrange(1, 300), 1
        else:
            kind = ZEROES if draw < 0.95 else DISCARD
            flags = self.random.choice([0, 2]) if kind == ZEROES else 0
            step = self.random.choice([1, 8, 128, self.whole])
            count = step * self.random.choice([1, 1, 1, 2, 3])
        count = min(count, self.last)
        if self.random.random() < 0.4:
            first = self.hot + self.random.randrange(512)
        else:
            first = self.random.randrange(self.last)
        first = min(first, self.last - count) // step * step
        return self.send(disk, nbd, kind, first, count, flags)


# --------------------------------------------------------------------------
# The daemon
# --------------------------------------------------------------------------

class Guests(Daemon):
    """The disks, each in an iothread of its own; whatever goes wrong here is a
    failure."""

    def __init__(self, args):
        arguments = []
        for i in range(args.disks):
            arguments += ["--object", f"iothread,id=io{i}",
                          "--blockdev",
                          f"file,node-name=file{i},discard=unmap,"
                          f"filename={os.path.abspath(name_of(i))}",
                          "--blockdev",
                          f"qcow2,node-name=disk{i},file=file{i},"
                          "discard=unmap",
                          "--export", f"nbd,id=disk{i},node-name=disk{i},"
                          f"writable=on,iothread=io{i}"]
        super().__init__(os.getcwd(), *arguments)
        self.connect()

    def event(self, event):
        if event["event"] == "LIVEBACKUP_BROKEN":
            raise Failure(f"broken: {event}")

    def qmp(self, command, **arguments):
        try:
            return super().qmp(command, **arguments)
        except Refused as error:
            raise Failure(f"{command} {arguments}: {error}") from error
        except Dead as error:
            raise Failure(f"the daemon is gone in {command}: "
                          f"{self.process.returncode}\n{self.said()}") \
                from error


def name_of(disk):
    """The image."""
    return f"disk{disk}.qcow2"


# --------------------------------------------------------------------------
# Reading a point in time, by docs/live-backup.md
# --------------------------------------------------------------------------

class Entries:
    """An L2 table of which each entry is read when it is asked for."""

    def __init__(self, image, offset):
        self.image = image
        self.offset = offset

    def __getitem__(self, index):
        size = self.image.l2_entry_size
        data = self.image.pread(self.offset + index * size, size)
        words = struct.unpack(f">{size // 8}Q", data.ljust(size, b"\0"))
        return words if len(words) == 2 else (words[0], None)


class Unbuffered:
    """The data file; others write to it."""

    size = NEVER

    def __init__(self, path):
        self.fd = os.open(path, os.O_RDONLY)

    def read(self, offset, length):
        """Bytes; zeroes behind the end."""
        return os.pread(self.fd, length, offset).ljust(length, b"\0")

    def close(self):
        """Close it."""
        os.close(self.fd)


class LiveImage(qcow2.Image):
    """An image that others write to: nothing is remembered but the header,
    and its size is not either."""

    def __init__(self, path):
        self.fd = os.open(path, os.O_RDONLY)
        super().__init__(path)
        self.file_size = NEVER
        if self.data_file:
            path = self.data_file.path
            self.data_file.file.close()
            self.data_file = Unbuffered(path)

    def pread(self, offset, length):
        return os.pread(self.fd, length, offset)

    def close(self):
        """Close all files."""
        os.close(self.fd)
        self.file.close()
        if self.data_file:
            self.data_file.close()
        backing = self.backing
        while backing is not None:
            backing.file.close()
            backing = getattr(backing, "backing", None)

    def l2_table(self, l1_index):
        value = self.l1[l1_index]
        if value & qcow2.L1_RESERVED:
            raise qcow2.ReadError(f"L1 entry {l1_index} has reserved bits")
        offset = value & qcow2.OFFSET_MASK
        return Entries(self, offset) if offset else None

    def read_l1(self, first, last):
        """Entries of the L1 table."""
        found = self.read_table(self.l1_table_offset + first * 8,
                                last - first + 1)
        self.l1[first:last + 1] = found
        return found


class Reader:
    """Reads the disk at the point in time; of what is no longer being written
    to, without the orig."""

    def __init__(self, path, orig=None):
        self.image = LiveImage(path)
        self.fd = self.orig = None
        self.step = 1 << 20
        if orig:
            self.fd = os.open(orig, os.O_RDONLY)
            self.orig = lborig.Orig(os.pread(self.fd, 4096, 0))
            if self.orig.broken:
                raise Failure(f"{orig}: {self.orig.broken}")
            self.step = 1 << self.orig.header["cluster_bits"]
        self.step = max(self.step, self.image.cluster_size)
        self.bad = []

    def close(self):
        """Close all files."""
        self.image.close()
        if self.fd is not None:
            os.close(self.fd)

    def read(self, wanted, draw):
        """{number of the orig's cluster: bytes}; wanted: ascending."""
        found = {}
        at = 0
        while at < len(wanted):
            count = 1
            most = draw.randrange(1, 9)
            while (at + count < len(wanted) and count < most
                   and wanted[at + count] == wanted[at] + count):
                count += 1
            found.update(self.stretch(wanted[at], count))
            at += count
        return found

    def stretch(self, first, count):
        """Some clusters of the orig, by the steps of the text."""
        image = self.image
        per_l1 = image.cluster_size * image.l2_entries
        first_l1 = first * self.step // per_l1
        last_l1 = (min((first + count) * self.step, image.size) - 1) // per_l1
        for _ in range(1000):
            before = image.read_l1(first_l1, last_l1)
            found, bad = {}, {}
            for number in range(first, first + count):
                try:
                    found[number] = self.from_image(number)
                except qcow2.ReadError as error:
                    bad[number] = error
            for number in range(first, first + count) if self.orig else ():
                data = self.from_orig(number)
                if data is not None:
                    found[number] = data
                    bad.pop(number, None)
            if image.read_l1(first_l1, last_l1) == before:
                if bad and self.orig:
                    raise Failure(f"{image.path}: {bad}")
                for number in bad:
                    found[number] = self.piecemeal(number)
                return found
        raise Failure(f"{image.path}: the L1 table changes all the time")

    def from_image(self, number):
        """Step 1 of a cluster of the orig."""
        at = number * self.step
        return self.image.read(at, min(self.step, self.image.size - at))

    def piecemeal(self, number):
        """What can be read of it, and note the rest."""
        size, data = self.image.cluster_size, []
        end = min((number + 1) * self.step, self.image.size)
        for at in range(number * self.step, end, size):
            try:
                data.append(self.image.read(at, min(size, end - at)))
            except qcow2.ReadError:
                self.bad.append(at)
                data.append(b"\xff" * min(size, end - at))
        return b"".join(data)

    def entry(self, number):
        """An L2 entry of the orig."""
        at = self.orig.l2_offset + number * 8
        return int.from_bytes(os.pread(self.fd, 8, at), "big")

    def from_orig(self, number):
        """Step 2 of a cluster, or None."""
        entry = self.entry(number)
        if not entry:
            return None
        again = self.entry(number)
        while again != entry:
            entry, again = again, self.entry(number)
        size = min(self.step, self.image.size - number * self.step)
        if entry == 1:
            return bytes(size)
        offset = entry & ~qcow2.COPIED
        if (not entry & qcow2.COPIED or offset % self.step
                or offset < self.orig.data_offset):
            raise Failure(f"{self.image.path}: the orig has entry {entry:x}")
        data = os.pread(self.fd, self.step, offset).ljust(self.step, b"\0")
        if any(data[size:]):
            raise Failure(f"{self.image.path}: the part of the last cluster "
                          "behind the end of the disk is not zero")
        return data[:size]


def live_of(path):
    """The extension, as it is in the file now."""
    image = qcow2.Header(path)
    try:
        return lbext.read_livebackup(image)
    finally:
        image.file.close()


def set_of(path, parent, checkpoint):
    """[(offset, length)] that changed since the parent, as the bitmaps from
    its own to the one before the set's checkpoint tell."""
    image = qcow2.Header(path)
    live = lbext.read_livebackup(image)
    uuids = [record["uuid"] for record in live.records]
    entries = {entry["name"]: entry for entry in image.bitmaps()}
    granularity = 1 << live.fixed["granularity_bits"]
    ranges = []
    for record in live.records[uuids.index(parent):uuids.index(checkpoint)]:
        ranges += [(start * granularity, count * granularity) for start, count
                   in image.bitmap_ranges(entries[lbext.bitmap_name(record)])]
    image.file.close()
    return list(qcow2.merged_ranges(ranges, image.size))


# --------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------

class Version:
    """What a request made of its sectors.

    wrote: its number, 0 for zeroes.  counts: it must be seen, once it was
    answered; a discard of a part of a cluster may do nothing, and so may what
    a kill has cut short.
    """

    __slots__ = ("sent", "answered", "wrote", "counts", "what")

    def __init__(self, sent, answered, wrote, counts=True, what="prefilled"):
        self.sent = sent
        self.answered = answered
        self.wrote = wrote
        self.counts = counts
        self.what = what

    def __str__(self):
        answered = self.answered if self.answered < NEVER else "never"
        return (f"{self.what} {self.wrote} (sent {self.sent}, "
                f"answered {answered})")


class Model:
    """What each sector of each disk may hold."""

    def __init__(self, args):
        self.args = args
        self.count = args.size // SECTOR
        self.flushed = [0] * args.disks
        self.disks = [[[Version(0, 0, prefilled(args, sector))]
                       for sector in range(self.count)]
                      for _ in range(args.disks)]

    def take(self, log):
        """The requests of a writer."""
        cluster = self.args.cluster // SECTOR
        for at in range(0, len(log), Writer.FIELDS):
            disk, kind, first, count, number, sent, answered = \
                log[at:at + Writer.FIELDS]
            kind = KINDS[kind]
            if kind == FLUSH:
                if answered < NEVER:
                    self.flushed[disk] = max(self.flushed[disk], sent)
                continue
            what = (f"{kind} of {first}+{count}" if kind == WRITE
                    else f"{kind} {number} of {first}+{count}")
            version = Version(sent, answered, number if kind == WRITE else 0,
                              True, what)
            perhaps = Version(sent, answered, version.wrote, False, what)
            whole = range(first, first + count)
            if kind == DISCARD:
                whole = range(-(-first // cluster) * cluster,
                              (first + count) // cluster * cluster)
            lists = self.disks[disk]
            for sector in range(first, first + count):
                lists[sector].append(version if sector in whole else perhaps)

    def forget(self):
        """What can't be seen any more; nothing is under way."""
        for disk in self.disks:
            for sector, versions in enumerate(disk):
                if len(versions) > 1:
                    newest = max(v.sent for v in versions if v.counts)
                    disk[sector] = [v for v in versions
                                    if v.answered >= newest]

    def check(self, points, begun, returned, about=lambda *_: ""):
        """One T must do for all sectors.  points: [bytes] of the disks;
        about: tells more of a disk's sector."""
        low = (begun, "livebackup-begin was sent")
        high = (returned, "livebackup-begin has returned")
        zeroes = []
        for disk, data in enumerate(points):
            for sector, versions in enumerate(self.disks[disk]):
                part = data[sector * SECTOR:sector * SECTOR + SECTOR]
                number = number_in(disk, sector, part)
                where = f"disk {disk}, sector {sector}"
                if number == 0:
                    if len(versions) > 1 or versions[0].wrote:
                        zeroes.append((where, versions))
                    continue
                seen = [v for v in versions if v.wrote == number]
                if not seen:
                    raise Failure(strange(where, number, part, versions)
                                  + about(disk, sector))
                seen = seen[0]
                if seen.sent > low[0]:
                    low = (seen.sent, f"{where} has {seen}")
                for other in versions if len(versions) > 1 else ():
                    if (other.sent > seen.answered and other.counts
                            and other.answered < high[0]):
                        high = (other.answered, f"{where} has {seen} and "
                                f"misses {other}")
        if low[0] > high[0]:
            raise Failure(f"no point in time:\n  {low[0]} at the earliest: "
                          f"{low[1]}\n  {high[0]} at the latest: {high[1]}")
        for where, versions in zeroes:
            if not any(zero_lasts(v, versions, low[0], high[0])
                       for v in reversed(versions) if v.wrote == 0):
                raise Failure(f"{where} is zero between {low} and {high}\n  "
                              + "\n  ".join(map(str, versions)))

    def after_kill(self, disk, data, bad, durable):
        """What stays of a killed daemon's caches is the new beginning.
        Returns the clusters that must be written anew, as they are not what
        anybody wrote there: QEMU gives away what was discarded, or replaced by
        a copy, before the table that refers to it is in the file."""
        now = time.monotonic_ns()
        anew = {at // self.args.cluster for at in bad}
        for sector, versions in enumerate(self.disks[disk]):
            part = data[sector * SECTOR:sector * SECTOR + SECTOR]
            number = number_in(disk, sector, part)
            seen = [v for v in versions if v.wrote == number]
            if number == 0 and any(v.answered == NEVER for v in versions):
                # QEMU may zero what it is about to write to.
                seen = [Version(now, now, 0)]
            if not seen:
                settled = [v for v in versions if v.answered < durable]
                if len(settled) == len(versions):
                    raise Failure("after the kill: " + strange(
                        f"disk {disk}, sector {sector}", number, part,
                        versions))
                anew.add(sector * SECTOR // self.args.cluster)
                number = 0
            elif not any(all(other.sent <= v.answered or not other.counts
                             or other.answered >= durable
                             for other in versions) for v in seen):
                raise Failure(f"after the kill: disk {disk}, sector {sector} "
                              f"has {seen[0]}, settled at {durable}\n  "
                              + "\n  ".join(map(str, versions)))
            self.disks[disk][sector] = [Version(0, now, number,
                                                what="left by the kill,")]
        return sorted(anew)

    def rewrite(self, disk, clusters, number):
        """Write whole clusters, so that their content is known again."""
        if not clusters:
            return
        nbd = Nbd(f"disk{disk}")
        per_cluster = self.args.cluster // SECTOR
        for cluster in clusters:
            first = cluster * per_cluster
            count = min(per_cluster, self.count - first)
            sent = time.monotonic_ns()
            nbd.send(WRITE, 0, first * SECTOR, count * SECTOR,
                     sectors(disk, first, count, number))
            if nbd.replies() != [(0, 0)]:
                raise Failure("writing anew fails")
            version = Version(sent, time.monotonic_ns(), number,
                              what="written anew,")
            for sector in range(first, first + count):
                self.disks[disk][sector] = [version]
        nbd.socket.close()


def zero_lasts(version, versions, low, high):
    """Whether its zeroes can be seen at a time between low and high."""
    start = max(version.sent, low)
    if start > high:
        return False
    after = version.answered
    for other in versions:
        if other.sent > after and other.answered < start and other.counts:
            return False
    return True


def strange(where, number, part, versions):
    """The text for content that nobody wrote there lately."""
    return (f"{where} has {number if number else part[:48]}, which is none "
            "of\n  " + "\n  ".join(map(str, versions[-20:])))


def prefilled(args, sector):
    """The number that a sector has in the beginning."""
    if not (args.backing or args.compressed or args.filled):
        return 0
    return PREFILLED if sector >> 8 & 3 else 0


# --------------------------------------------------------------------------
# Rounds
# --------------------------------------------------------------------------

class Stress:
    """Disks, a daemon, and backup after backup."""

    def __init__(self, args):
        self.args = args
        self.random = random.Random(args.seed)
        self.model = Model(args)
        self.daemon = None
        self.writers = []
        self.number = 1 << 20
        # Of each disk {UUID of a checkpoint: content}.
        self.points = [{} for _ in range(args.disks)]
        self.mode = "full"
        self.what = "plain"
        self.before = None
        self.counted = {"full": 0, "incremental": 0, "since": 0, "killed": 0,
                        "failed": 0, "released": 0, "requests": 0,
                        "saved": 0, "anew": 0}
        for disk in range(args.disks):
            self.make(disk)

    def make(self, disk):
        """An image, with what was asked for."""
        args = self.args
        raw = f"raw{disk}"
        with open(raw, "wb") as file:
            file.truncate(args.size)
            for sector in range(args.size // SECTOR):
                if prefilled(args, sector):
                    file.seek(sector * SECTOR)
                    file.write(sectors(disk, sector, 1, PREFILLED))
        options = ["livebackup=on", f"cluster_size={args.cluster}",
                   f"livebackup_granularity={args.granularity}"]
        if args.extended:
            options.append("extended_l2=on")
        if args.data_file:
            options.append(f"data_file={os.path.abspath(f'data{disk}')}")
        argv = ["create", "-q", "-f", "qcow2", "-o", ",".join(options)]
        if args.backing:
            img("P", "convert", "-q", "-f", "raw", "-O", "qcow2", raw,
                f"base{disk}.qcow2")
            argv += ["-b", f"base{disk}.qcow2", "-F", "qcow2"]
        img("P", *argv, name_of(disk), str(args.size))
        if not args.backing:
            img("P", "convert", "-q", "-n", "-f", "raw", "-O", "qcow2",
                *(["-c"] if args.compressed else []), raw, name_of(disk))
        remove(raw)

    def start_writers(self):
        """Processes of their own: this one's lock shall not slow them."""
        claims = Claims(self.args)
        for index in range(self.args.writers):
            seed = self.random.getrandbits(32)
            path = f"requests{index}"
            remove(path)
            pid = os.fork()
            if pid == 0:
                status = 2
                try:
                    status = Writer(self.args, claims, index, seed,
                                    self.number).run(path)
                finally:
                    os._exit(status)
            self.writers.append((pid, path))
        self.number += 1 << 28

    def stop_writers(self, killed=False):
        """All that they did."""
        for pid, _ in self.writers:
            os.kill(pid, signal.SIGTERM)
        bad = [status for pid, _ in self.writers
               if (status := os.waitstatus_to_exitcode(
                   os.waitpid(pid, 0)[1])) not in ((0, 3) if killed else (0,))]
        writers, self.writers = self.writers, []
        for _, path in writers:
            log = array.array("Q")
            if os.path.exists(path):
                with open(path, "rb") as file:
                    log.frombytes(file.read())
            self.counted["requests"] += len(log) // Writer.FIELDS
            self.model.take(log)
        if bad:
            raise Failure(f"writers end with {bad}")

    def close(self):
        """Nothing goes on."""
        for pid, _ in self.writers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if self.daemon:
            self.daemon.kill()

    def run(self):
        """All rounds, and what is there in the end."""
        for number in range(self.args.rounds):
            if self.daemon is None:
                self.daemon = Guests(self.args)
            try:
                self.round(number)
            except Failure as failure:
                raise Failure(f"round {number}, {self.mode}, {self.what}, "
                              f"before it {self.before}: "
                              f"{failure}; {self.counted}"
                              ) from None
        if self.daemon:
            self.daemon.close()
        now = time.monotonic_ns()
        contents = []
        for disk in range(self.args.disks):
            reader = Reader(name_of(disk))
            contents.append(self.joined(reader, self.everything(reader)))
            reader.close()
            expect_no_errors(name_of(disk), "P")
        self.model.check(contents, now, now)

    def everything(self, reader):
        """{cluster of the orig: bytes} of the whole disk."""
        return reader.read(list(range(-(-self.args.size // reader.step))),
                           self.random)

    @staticmethod
    def joined(_, pieces):
        """The disk."""
        return b"".join(pieces[number] for number in sorted(pieces))

    def pause(self, most):
        """Let the writers go on."""
        time.sleep(self.random.random() * most)

    def choose_mode(self):
        """The mode, and the parent for 'since'."""
        if self.mode != "full" or not all(self.points):
            return {"mode": "full"}
        if self.args.disks == 1 and self.random.random() < 0.3:
            known = [record["uuid"] for record in live_of(name_of(0)).records]
            if len(known) == lbext.MAX_CHECKPOINTS:
                known = known[2:]       # one of them makes room
            since = [uuid for uuid in known if uuid in self.points[0]]
            if since:
                return {"mode": "since", "since": self.random.choice(since)}
        return {"mode": "incremental"}

    def round(self, number):
        """One backup."""
        args, draw = self.args, self.random
        self.before = (self.mode, self.what)
        kill = draw.random() < args.kills and number != args.rounds - 1
        release = not kill and draw.random() < 0.4
        success = not kill and draw.random() < 0.7
        how = self.choose_mode()
        self.mode = how["mode"]
        self.counted[self.mode] += 1
        self.what = ("killed" if kill else "released" if release
                     else "plain") + (" and failed" if not success else "")
        self.start_writers()
        self.pause(0.12)
        begun = time.monotonic_ns()
        answer = self.daemon.qmp(
            "livebackup-begin", job_id="stress",
            disks=[{"device": f"disk{i}"} for i in range(args.disks)], **how)
        returned = time.monotonic_ns()
        backups = [Backup(self, i, answer, answer["disks"][i])
                   for i in range(args.disks)]
        try:
            self.pause(0.03)
            if kill and draw.random() < 0.5:
                self.daemon.kill()      # before anything was read
            for backup in backups:
                backup.read_early()
            if release:
                self.release(backups)
            self.pause(0.1)
            if kill:
                self.daemon.kill()
                self.stop_writers(killed=True)
            for backup in backups:
                backup.read_late()
            if not kill:
                self.counted["saved"] += sum(
                    disk["units-saved"] for disk in
                    self.daemon.qmp("query-livebackup")[0]["disks"])
                self.end(success)
                self.pause(0.03)
                self.stop_writers()
            self.model.check(
                [backup.content for backup in backups], begun, returned,
                lambda disk, sector: backups[disk].tell(sector))
        finally:
            for backup in backups:
                backup.reader.close()
        for backup in backups:
            # Any that the image still has can become a parent.
            points = self.points[backup.disk]
            if success:
                points[backup.about["checkpoint"]] = backup.content
            known = {record["uuid"] for record
                     in live_of(name_of(backup.disk)).records}
            self.points[backup.disk] = {uuid: content for uuid, content
                                        in points.items() if uuid in known}
        if kill:
            self.recover(begun)
        self.model.forget()

    def end(self, success):
        """By the client."""
        if not success:
            self.counted["failed"] += 1
        self.daemon.qmp("livebackup-end", job_id="stress", success=success,
                        roots=[{"device": f"disk{i}", "root": "0f" * 8}
                               for i in range(self.args.disks)])
        for disk in range(self.args.disks):
            if os.path.exists(f"disk{disk}.orig.qcow2"):
                raise Failure("the orig is still there")

    def release(self, backups):
        """Some of what was read."""
        self.counted["released"] += 1
        for backup in backups:
            ranges = backup.some_ranges()
            if ranges:
                self.daemon.qmp("livebackup-release", job_id="stress",
                                device=f"disk{backup.disk}", ranges=[
                                    {"offset": offset, "bytes": length}
                                    for offset, length in ranges])

    def recover(self, begun):
        """After a kill."""
        self.counted["killed"] += 1
        self.daemon = None
        anew = []
        for disk in range(self.args.disks):
            expect_no_errors(name_of(disk), "P")
            reader = Reader(name_of(disk))
            data = self.joined(reader, self.everything(reader))
            anew.append(self.model.after_kill(
                disk, data, reader.bad,
                max(begun, self.model.flushed[disk])))
            reader.close()
        self.daemon = Guests(self.args)
        self.number += 1
        for disk, clusters in enumerate(anew):
            self.counted["anew"] += len(clusters)
            self.model.rewrite(disk, clusters, self.number)


class Backup:
    """The backup of one disk, as its client reads it."""

    def __init__(self, stress, disk, answer, about):
        self.stress = stress
        self.disk = disk
        self.about = about
        self.set = answer["set"]
        self.reader = Reader(name_of(disk), about["orig"])
        self.check_orig()
        self.released = set()
        self.early = {}
        self.content = None
        size, step = stress.args.size, self.reader.step
        if "parent" in about:
            if about["parent"] not in stress.points[disk]:
                raise Failure(f"the parent is {about['parent']}, of "
                              f"{list(stress.points[disk])}")
            self.changed = set_of(name_of(disk), about["parent"],
                                  about["checkpoint"])
            self.wanted = sorted({
                number for offset, length in self.changed
                for number in range(offset // step,
                                    (offset + length - 1) // step + 1)})
        else:
            self.changed = [(0, size)]
            self.wanted = list(range(-(-size // step)))

    def check_orig(self):
        """It is that of this backup."""
        args, data = self.stress.args, self.reader.orig.data
        unit = max(args.granularity, args.cluster, 65536)
        if (data["set_uuid"] != self.set
                or data["checkpoint_uuid"] != self.about["checkpoint"]
                or data["unit"] != unit or self.about["unit"] != unit
                or self.reader.orig.header["size"] != args.size):
            raise Failure(f"the orig of {self.about} says {data}")

    def read_early(self):
        """All of the set."""
        self.early = self.reader.read(self.wanted, self.stress.random)
        self.check_state()

    def read_late(self):
        """What was not released again; it must be the same."""
        late = self.reader.read([number for number in self.wanted
                                 if number not in self.released],
                                self.stress.random)
        self.check_state()
        for number, data in late.items():
            if not self.same(number, data, self.early[number]):
                raise Failure(self.difference(number, data))
        self.compose()

    def same(self, number, late, early):
        """Where the set has it."""
        if late == early:
            return True
        start = number * self.reader.step
        return all(
            late[max(offset - start, 0):max(offset + length - start, 0)]
            == early[max(offset - start, 0):max(offset + length - start, 0)]
            for offset, length in self.changed)

    def difference(self, number, late):
        """Between the two readings."""
        base = number * self.reader.step // SECTOR
        early = self.early[number]
        lines = []
        for i in range(len(late) // SECTOR):
            parts = [data[i * SECTOR:i * SECTOR + SECTOR]
                     for data in (early, late)]
            if parts[0] != parts[1]:
                lines.append(f"sector {base + i}: " + ", then ".join(
                    shown(self.disk, base + i, part) for part in parts))
        return (f"disk {self.disk}, cluster {number} of the orig, entry "
                f"{self.reader.entry(number):x}: two readings differ in "
                f"{len(lines)} sectors\n  " + "\n  ".join(lines[:20]))

    def check_state(self):
        """Step 4."""
        fixed = live_of(name_of(self.disk)).fixed
        if fixed["state"] != RUNNING or fixed["set_uuid"] != self.set:
            raise Failure(f"disk {self.disk}: the state is {fixed['state']}, "
                          f"of set {fixed['set_uuid']}, not {self.set}")

    def compose(self):
        """The parent's content, and the set's over it."""
        size, step = self.stress.args.size, self.reader.step
        content = bytearray(
            self.stress.points[self.disk][self.about["parent"]]
            if "parent" in self.about else bytes(size))
        for offset, length in self.changed:
            end = offset + length
            while offset < end:
                number, within = divmod(offset, step)
                count = min(step - within, end - offset)
                content[offset:offset + count] = \
                    self.early[number][within:within + count]
                offset += count
        self.content = bytes(content)

    def tell(self, sector):
        """Where its content is from."""
        at = sector * SECTOR
        number, within = divmod(at, self.reader.step)
        text = [f"in the set: "
                f"{any(o <= at < o + n for o, n in self.changed)}"]
        if number in self.early:
            text.append(f"entry {self.reader.entry(number):x}, read: " + shown(
                self.disk, sector, self.early[number][within:within + SECTOR]))
        if "parent" in self.about:
            text.append("parent: " + shown(
                self.disk, sector, self.stress.points[self.disk]
                [self.about["parent"]][at:at + SECTOR]))
        now = self.reader.stretch(number, 1)[number]
        text.append("image: " + shown(self.disk, sector,
                                      now[within:within + SECTOR]))
        return "\n  " + "; ".join(text)

    def some_ranges(self):
        """Of what was read; whole units of them are not read again."""
        draw, step = self.stress.random, self.reader.step
        size = self.stress.args.size
        ranges = []
        for number in self.wanted:
            if draw.random() < 0.5:
                offset = number * step
                ranges.append((offset, min(step, size - offset)))
                self.released.add(number)
        return ranges


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int,
                        default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--disks", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--size", type=int, default=6, help="MiB")
    parser.add_argument("--odd-end", action="store_true",
                        help="the last cluster is a part of one")
    parser.add_argument("--cluster", type=int, default=65536)
    parser.add_argument("--granularity", type=int, default=65536)
    parser.add_argument("--kills", type=float, default=0.2)
    for name in ("extended", "data-file", "backing", "compressed", "filled"):
        parser.add_argument("--" + name, action="store_true")
    args = parser.parse_args(argv)
    args.size = (args.size << 20) + (12288 if args.odd_end else 0)
    return args


def main(argv):
    """Run it in a folder of its own."""
    args = parse(argv)
    folder = os.path.abspath(f"stress-{os.getpid()}")
    os.mkdir(folder)
    os.chdir(folder)
    stress = None
    try:
        stress = Stress(args)
        stress.run()
        print(f"seed {args.seed}: " + ", ".join(
            f"{count} {name}" for name, count in stress.counted.items()))
        return 0
    except Failure as failure:
        print(f"live-stress.py {' '.join(argv)} with seed {args.seed}:\n"
              f"{failure}", file=sys.stderr)
        return 1
    finally:
        if stress:
            stress.close()
        os.chdir("..")
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
