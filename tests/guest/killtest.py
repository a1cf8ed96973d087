#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""The kill test: QEMU is killed, and no change is lost to the next backup.

Each time the disk is then compared, byte for byte, with what its chain of
archives and one more incremental restore; the image must be trusted and have
no damage beyond leaks; every changed granule must have its bit, and none that
nobody wrote.

QLB_SEED=N chooses other moments and other writes; QLB_QEMU is the folder of
the patched QEMU, QLB_GUEST that of the guest (prepare.sh).  What was found
wrong is kept in $TMPDIR, as a kill can't be repeated.
"""

import ctypes
import errno
import os
import random
import shutil
import sys
import time

from guestlib import (Disk, Failure, Guest, KIB, MIB, Machine, SECTOR, SEED,
                      Workload, note, program, small_machine, storage_daemon)
# after it: guestlib knows where this is
from faultlib import (NIGHTLY, claim, each, main, read, shim_environment,
                      workplace)


# --------------------------------------------------------------------------
# A guest
# --------------------------------------------------------------------------

# Where clusters are allocated already a write can be seen at once, and not only
# when the tables are written.
ALLOCATED = ("-o", "preallocation=metadata")

# How the guest's disk is made, what it is attached to, and how it is written.
# A stripe below the granularity: threads meet in a granule.
SETTINGS = {
    "plain": {"disk": {}, "workload": {}},
    "small-granules": {
        "disk": {"granularity": 4 * KIB, "options": ALLOCATED},
        "cache": "none", "aio": "native", "iothread": True, "queues": 2,
        "workload": {"threads": 8, "stripe": 2 * KIB, "largest": 2 * KIB}},
    "small-clusters": {
        "disk": {"options": ("-o", "cluster_size=4k,lazy_refcounts=on")},
        "cache": "none", "detect-zeroes": "unmap",
        "workload": {"threads": 8, "stripe": 16 * KIB, "unit": 4 * KIB,
                     "largest": 16 * KIB}},
    "sync": {
        "disk": {"sync": True,
                 "options": (*ALLOCATED, "-o",
                             "extended_l2=on,cluster_size=128k")},
        "queues": 2, "iothread": True,
        "workload": {"stripe": 256 * KIB, "largest": 256 * KIB}},
    "io_uring": {
        "disk": {"granularity": 16 * KIB, "options": ALLOCATED},
        "cache": "none", "aio": "io_uring",
        "workload": {"threads": 6, "stripe": 8 * KIB, "largest": 8 * KIB}},
}
GUEST_DISK = 384 * MIB


class Killer:
    """Boots guests on one disk, and kills them."""

    def __init__(self, name, seed):
        self.name = name
        self.setting = SETTINGS[name]
        self.random = random.Random(f"{name} {seed}")
        self.disk = Disk(name, self.random.getrandbits(64), GUEST_DISK,
                         **self.setting["disk"])

    def boot_and_kill(self, how, lose_a_bit=False):
        """One guest; how: early (its first writes), late, or closing."""
        disk = self.disk
        workload = Workload(self.random.getrandbits(63), GUEST_DISK,
                            **self.setting["workload"])
        if how == "early":
            requests = self.random.choice([0, 1, 8, 40])
        else:
            requests = self.random.randrange(100, 2000)
        delay = self.random.uniform(0, 0.06 if how == "closing" else
                                    0.01 if requests else 0.1)
        with Guest(disk.folder, disk.path, workload, self.setting) as guest:
            if how == "closing":
                guest.ask("qmp_capabilities")
            guest.wait_for(requests)
            if how == "closing":
                guest.say("quit")
            time.sleep(delay)
            lived = guest.kill()
            told = guest.told()
        what = (f"{self.name}, {how}, {delay:.4f} s after "
                + ("quit" if how == "closing" else f"request {requests}"))
        if how != "closing" and not lived:
            raise Failure(f"{what}: QEMU ended before it was killed")
        workload.replay(told)
        disk.may_change(workload.touched)
        written = []
        commit = self.random.random() < 0.6 and not lose_a_bit
        disk.judge(what, commit,
                   lambda now, old: (
                       written.append(workload.check(now, old)),
                       lose_a_bit and disk.expect_lost_bit_is_found()))
        if how != "closing" and not disk.session:
            raise Failure(f"{what}: the image was not in a session")
        note(f"{what}: {sum(done for done, _ in told)} requests done, "
             f"{sum(safe for _, safe in told)} safe, {written[0]} sectors "
             f"written; {disk.figures}; "
             + ("in a session" if disk.session else "closed"))


def kill_guests(plan):
    """plan: [(setting, [how, ...])]; at least one of them is late."""
    note(f"QLB_SEED={SEED}")
    shown = False
    for name, moments in plan:
        killer = Killer(name, SEED)
        for how in moments:
            # once, show that the judge would see it
            lose_a_bit = not shown and how == "late"
            killer.boot_and_kill(how, lose_a_bit)
            shown = shown or lose_a_bit


@claim
def guest():
    """Guests are killed; by night, a hundred."""
    if NIGHTLY:
        chance = random.Random(f"nightly {SEED}")
        kill_guests([(name, chance.choices(["early", "late", "closing"], k=25))
                     for name in SETTINGS if name != "io_uring"])
    else:
        kill_guests([("plain", ["late", "closing"]),
                     ("small-granules", ["early", "late"]),
                     ("small-clusters", ["late"]),
                     ("sync", ["late", "early"])])


@claim
def guest_io_uring():
    """The same, with io_uring."""
    kill_guests([("io_uring", ["late"] * (10 if NIGHTLY else 1))])


@claim
def io_uring_works():
    """Not every host lets a program use it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(425, 0, None)      # io_uring_setup; invalid where it works
    if ctypes.get_errno() in (errno.ENOSYS, errno.EPERM):
        raise Failure("this host refuses io_uring")


# --------------------------------------------------------------------------
# Without a guest
# --------------------------------------------------------------------------

DISKS = {
    "default": {},
    "small-granules": {"granularity": 4 * KIB, "options": ALLOCATED},
    "small-clusters": {"options": ("-o", "cluster_size=4k")},
    "sync": {"sync": True, "options": ALLOCATED},
}
SMALL_DISK = 64 * MIB


class Writes:
    """Patterns that are written to a disk, and were not judged yet."""

    def __init__(self, disk):
        self.disk = disk
        self.pending = []      # (pattern, offset, length)

    def add(self, pattern, offset, length):
        """A pattern of 0 stands for zeroes, or a discard."""
        self.pending.append((pattern, offset, length))
        self.disk.may_change([(offset, length)])
        return pattern, offset, length

    def random(self, chance, count):
        """Some new ones, which may overlap."""
        found = []
        for _ in range(count):
            length = chance.choice([4, 8, 64, 64, 128, 256])
            found.append(self.add(chance.randrange(256),
                                  self.disk.somewhere(length) * KIB,
                                  length * KIB))
        return found

    def judge(self, what, commit):
        """What was written is there, or what was there before."""
        self.disk.judge(what, commit, self.check)
        self.pending = []

    def check(self, now, old):
        """For Disk.judge()."""
        allowed = {}
        for pattern, offset, length in self.pending:
            for sector in range(offset // SECTOR,
                                (offset + length) // SECTOR):
                allowed.setdefault(sector, set()).add(pattern)
        for sector, patterns in allowed.items():
            at = sector * SECTOR
            data = now[at:at + SECTOR]
            # discarded and not flushed: see Workload.replay()
            if 0 not in patterns and data != old[at:at + SECTOR] and not any(
                    data == bytes([pattern]) * SECTOR
                    for pattern in patterns):
                raise Failure(f"sector {sector} holds neither what was there "
                              "nor what was written")


class Aimer:
    """Kills at random moments of opening, writing and closing, one after the
    other on one disk."""

    def __init__(self, name, seed):
        self.name = name
        self.random = random.Random(f"{name} {seed}")
        self.disk = Disk(f"aimed-{name}", self.random.getrandbits(64),
                         SMALL_DISK, **DISKS[name])
        self.writes = Writes(self.disk)
        self.in_session = 0
        self.usual = {}

    def usually(self, kind, measure):
        """How long it takes, undisturbed: the longest of three."""
        if kind not in self.usual:
            self.usual[kind] = max(measure() for _ in range(3))
        return self.usual[kind]

    def judge(self, what):
        """After each kill."""
        self.writes.judge(f"{self.name}: {what}", self.random.random() < 0.4)
        self.in_session += self.disk.session

    def opening(self):
        """Killed while it opens the image, or shortly after."""
        start = self.random.choice([small_machine, storage_daemon])
        # bits that may be lost
        written = self.writes.random(self.random, self.random.randrange(3))
        if written:
            self.disk.qemu_io(*(command_of(*write) for write in written))

        def measure():
            begin = time.monotonic()
            with start(self.disk.path) as machine:
                machine.ask("qmp_capabilities")
                end = time.monotonic()
                machine.ask("quit")
                machine.wait()
            return end - begin

        # at first it loads its libraries
        delay = (self.random.uniform(0.3, 1.2)
                 * self.usually(start.__name__, measure))
        with start(self.disk.path) as machine:
            time.sleep(delay)
            machine.kill()
        self.judge(f"{start.__name__}, {delay:.4f} s after its start")

    def closing(self):
        """Killed after QMP's quit, with requests under way."""
        def measure():
            with small_machine(self.disk.path) as machine:
                self.submit(machine, 3)
                begin = time.monotonic()
                machine.ask("quit")
                machine.wait()
                return time.monotonic() - begin

        delay = self.random.uniform(0, 1.2 * self.usually("closing", measure))
        with small_machine(self.disk.path) as machine:
            self.submit(machine, self.random.randrange(7))
            machine.say("quit")
            time.sleep(delay)
            machine.kill()
        self.judge(f"closing, {delay:.4f} s after quit")

    def submit(self, machine, count):
        """Begin to write, and don't wait for it."""
        machine.ask("qmp_capabilities")
        for pattern, offset, length in self.writes.random(self.random, count):
            machine.io("d", f"aio_write -q -P {pattern} {offset} {length}")

    def writing(self):
        """Killed in a short life of opening, writing, closing."""
        def start():
            commands = []
            for write in self.writes.random(self.random,
                                            self.random.randrange(1, 9)):
                commands += ["-c", command_of(*write)]
            return Machine(program("qemu-io"), "-f", "qcow2", *commands,
                           self.disk.path)

        def measure():
            begin = time.monotonic()
            with start() as machine:
                machine.wait()
            return time.monotonic() - begin

        delay = (self.random.uniform(0.3, 1.1)
                 * self.usually("writing", measure))
        with start() as machine:
            time.sleep(delay)
            machine.kill()
        self.judge(f"writing, {delay:.4f} s after its start")


def command_of(pattern, offset, length):
    """A command of qemu-io."""
    if pattern:
        return f"write -q -P {pattern} {offset} {length}"
    return f"write -q -zu {offset} {length}"


def aim(kind, count):
    """count kills on each disk."""
    note(f"QLB_SEED={SEED}")
    seeds = range(SEED, SEED + (10 if NIGHTLY else 1))

    def chain(case):
        _, name, seed = case
        aimer = Aimer(name, seed)
        for _ in range(count):
            getattr(aimer, kind)()
        note(f"{kind}, {name}, seed {seed}: {count} kills, "
             f"{aimer.in_session} in a session; at last {aimer.disk.figures}")
        shutil.rmtree(aimer.disk.folder)

    for seed in seeds:
        each([(f"{name}, seed {seed}", name, seed) for name in DISKS], chain)


@claim
def opening():
    """QEMU is killed while it opens a disk."""
    aim("opening", 12)


@claim
def closing():
    """QEMU is killed while it closes a disk."""
    aim("closing", 12)


@claim
def writing():
    """QEMU is killed in a short life."""
    aim("writing", 12)


# --------------------------------------------------------------------------
# At every write
# --------------------------------------------------------------------------

LIFE = [(11, 1 * MIB, 64 * KIB), (12, 1 * MIB + 32 * KIB, 4 * KIB),
        (13, 20 * MIB - 4 * KIB, 8 * KIB), (0, 30 * MIB, 128 * KIB),
        (14, 63 * MIB, MIB), (15, 30 * MIB + 4 * KIB, 4 * KIB)]


class EveryWrite:
    """A life of qemu-io on a disk; it ends at one of its calls that write."""

    def __init__(self, name):
        self.name = name
        self.base = Disk(f"base-{name}", f"every write {SEED}", SMALL_DISK,
                         **DISKS[name])
        # some bits are there already
        self.base.qemu_io("write -P 77 5M 192k")
        self.base.accept([(5 * MIB, 192 * KIB)])

    def live(self, disk, **fault):
        """Returns whether it was killed."""
        argv = [word for write in LIFE
                for word in ("-c", command_of(*write))]
        argv += ["-c", f"discard -q {10 * MIB} {256 * KIB}", "-c", "flush"]
        with Machine(program("qemu-io"), "-f", "qcow2", "-d", "unmap", *argv,
                     disk.path, env=shim_environment(path="disk.qcow2",
                                                     **fault)) as machine:
            return machine.wait()

    def cases(self):
        """(label, kind, n) for each kill."""
        disk = self.base.clone(f"count-{self.name}", 0)
        count = disk.file("count")
        self.live(disk, count_file=count)
        total = int(read(count))
        if total < 30:
            raise Failure(f"{self.name}: only {total} calls")
        note(f"{self.name}: {total} calls")
        for kind in ("kill-before", "torn", "kill-after"):
            step = 1 if NIGHTLY or kind == "kill-before" else 3
            for n in range(1, total + 1, step):
                yield f"{self.name}, {kind} at {n} of {total}", kind, n

    def check(self, case):
        """One kill."""
        label, kind, n = case
        disk = self.base.clone(os.path.join(workplace(), self.name), label)
        writes = Writes(disk)
        for write in [*LIFE, (0, 10 * MIB, 256 * KIB)]:
            writes.add(*write)
        self.live(disk, at=n, kind=kind)
        writes.judge(label, True)


@claim
def every_write():
    """QEMU is killed at each of its writes."""
    for name in DISKS if NIGHTLY else ("default", "small-granules"):
        case = EveryWrite(name)
        each(case.cases(), case.check)


# --------------------------------------------------------------------------
# The judge
# --------------------------------------------------------------------------

@claim
def lost_bit():
    """Where a bit is missing after a kill, this is found."""
    for name in DISKS:
        disk = Disk(f"lost-{name}", f"lost bit {SEED}", SMALL_DISK,
                    **DISKS[name])
        writes = Writes(disk)
        with small_machine(disk.path) as machine:
            machine.ask("qmp_capabilities")
            for pattern, offset, length in writes.random(
                    random.Random(SEED), 5):
                machine.io("d", f"write -q -P {pattern} {offset} {length}")
            machine.kill()
        writes.judge(f"{name}: killed after writes", False)
        disk.expect_lost_bit_is_found()


if __name__ == "__main__":
    sys.exit(main())
