#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""The library and the driver read what the other writes.

On disks of many geometries: after each change by lbctl, lbdump or a QEMU,
`lbctl status`, `qemu-img info` and the independent reader say the same; what
was closed cleanly breaks no rule for writers, digests of other files included;
and what is trusted is complete.
"""

import os
import random
import shutil
import sys

from qemulib import (Disk, Failure, NIGHTLY, claim, dump, each,
                     expect_claims_kept, expect_sound, img, info_of, main,
                     random_commands, run, session, size_of,
                     verdict_of, workplace)

# --------------------------------------------------------------------------
# Geometries
# --------------------------------------------------------------------------

BASES = {"raw": ("base.raw", "raw"), "qcow2": ("low.qcow2", "qcow2"),
         "two": ("mid.qcow2", "qcow2"), "data": ("withdata.qcow2", "qcow2")}

DISKS = [
    Disk("8M"),
    Disk("8M", by="S7"),
    Disk("8M", by="S10", sync=True, checkpoints=2),
    Disk("5000192", 512, cluster_size=4096),
    Disk("70M", 512, cluster_size=4096, checkpoints=3),
    Disk("33M", "4k", cluster_size=8192, lazy_refcounts="on"),
    Disk("1073742336", "2M", cluster_size="2M"),
    Disk("1073742336", "64k", cluster_size="2M", checkpoints=2),
    Disk("3000000000", "2G", cluster_size="512k", by="S7"),
    Disk("512", "512"),
    Disk("63488", "64k", cluster_size=65536, checkpoints=32),
    Disk("9M", "128k", extended_l2="on", cluster_size="128k", checkpoints=2),
    Disk("9M", "4k", refcount_bits=1, checkpoints=2),
    Disk("9M", "4k", refcount_bits=64, compression_type="zstd"),
    Disk("8M", "4k", checkpoints=32),
    Disk("8M", "64k", checkpoints=35, by="S10"),
    Disk("8M", "64k", data="@/d.data"),
    Disk("8M", "64k", data="relative.data", checkpoints=2),
    Disk("8M", "64k", data="relative.data", data_file_raw="on"),
    Disk("8M", "64k", data="relative.data", by="S10", cluster_size=4096),
    Disk("8M", "64k", backing=BASES["raw"]),
    Disk("8M", "64k", backing=BASES["qcow2"], by="S7", checkpoints=2),
    Disk("12M", "4k", backing=BASES["two"], lazy_refcounts="on"),
    Disk("6M", "4k", backing=BASES["two"], by="S10", cluster_size=4096),
    Disk("8M", "64k", backing=BASES["data"], checkpoints=2),
    Disk("8M", "64k", backing=BASES["data"], data="relative.data"),
]


def random_disks(count):
    """More of them."""
    dice = random.Random("geometries")
    for _ in range(count):
        cluster = 1 << dice.randrange(12, 22)
        options = {"cluster_size": cluster}
        data = dice.choice([None, None, None, "@/d.data", "relative.data"])
        if data is None and cluster >= 16384 and dice.random() < .3:
            options["extended_l2"] = "on"
        if dice.random() < .3:
            options["lazy_refcounts"] = "on"
        elif dice.random() < .3 and data is None:
            options["refcount_bits"] = dice.choice([2, 8, 32, 64])
        granularity = 1 << dice.randrange(12, 32)
        yield Disk(str(dice.randrange(1, 1 << dice.randrange(10, 28)) * 512),
                   granularity, data=data,
                   backing=dice.choice([None, *BASES.values()]),
                   checkpoints=dice.choice([1, 2, 5]),
                   by=dice.choice(["P", "S7", "S10"]),
                   sync=dice.random() < .2, **options)


def make_bases(folder):
    """One of each kind."""
    def create(name, *argv):
        img("S10", "create", "-q", "-f", "qcow2", *argv[:-1],
            os.path.join(folder, name), argv[-1])
        session("S10", os.path.join(folder, name),
                f"write -P {len(name)} 1M 3M")
    with open(os.path.join(folder, "base.raw"), "wb") as file:
        file.write(b"raw" * 1000000)
        file.truncate(7 << 20)
    create("low.qcow2", "8M")
    create("mid.qcow2", "-b", "low.qcow2", "-F", "qcow2", "7M")
    create("withdata.qcow2", "-o", f"data_file={folder}/base.data", "8M")


# --------------------------------------------------------------------------
# What each of them goes through
# --------------------------------------------------------------------------

class Life:
    """One disk."""

    def __init__(self, disk, dice):
        self.disk = disk
        self.dice = dice
        self.done = []
        self.folder = os.path.join(workplace(), "agree")
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        make_bases(self.folder)
        self.path = disk.make(self.folder)
        self.chain = []
        self.piped = None
        self.leaks = False      # killed since the last repair

    def step(self, name, *args):
        """It, and that all agree then."""
        self.done.append(" ".join([name, *map(str, args)]))
        try:
            getattr(self, name)(*args)
            expect_claims_kept(self.path, self.chain,
                               whole=NIGHTLY or name == "dumped")
        except Failure as failure:
            raise Failure(f"{self.disk}: {'; '.join(self.done[-4:])}: "
                          f"{failure}") from failure

    def dumped(self, *options):
        """A dump into the chain."""
        archive = os.path.join(self.folder, f"{len(self.chain)}.lbz")
        dump(self.path, archive, *options)
        self.chain.append(archive)
        expect_sound(self.path, self.leaks)

    def dumped_into_a_pipe(self):
        """A checkpoint that is not confirmed."""
        result = run(["lbdump", "-q", "--incremental", "--json", self.path])
        self.piped = result.expect(0)
        expect_sound(self.path, self.leaks)

    def confirmed(self):
        """The last of those."""
        archive = os.path.join(self.folder, f"{len(self.chain)}.lbz")
        with open(archive, "wb") as file:
            file.write(self.piped.out)
        receipt = run(["lbverify", "--receipt", archive]).expect(0).out
        run(["lbctl", "confirm", self.path,
             *receipt.decode().split()]).expect(0)
        self.chain.append(archive)

    def session(self, who, killed=False):
        """Of a QEMU."""
        session(who, self.path, *random_commands(self.dice, self.path, 3),
                killed=killed)
        self.leaks |= killed
        if who == "P" and not killed:
            expect_sound(self.path, self.leaks)

    def closed(self):
        """Whatever was open or leaked is not any more."""
        img("P", "check", "-q", "-r", "all", "-f", "qcow2", self.path,
            status=(0, 2, 3))
        self.leaks = False
        session("P", self.path)
        run(["lbctl", "recover", self.path]).expect(0)
        expect_sound(self.path, self.leaks)

    def resized(self, who, size):
        """By a QEMU."""
        img(who, "resize", "-q", "--shrink", "-f", "qcow2", self.path,
            str(max(size // 512, 1) * 512))

    def amended(self, option):
        """What belongs to us."""
        img("P", "amend", "-f", "qcow2", "-o", option, self.path)
        key, value = option.split("=")
        status = verdict_of(self.path)[1]
        if key == "livebackup_sync" and status["sync"] != (value == "on"):
            raise Failure(f"sync is {status['sync']}")
        expect_sound(self.path, self.leaks)

    def snapshot(self, who, *argv):
        """An internal one."""
        img(who, "snapshot", "-q", *argv, self.path)

    def controlled(self, *argv):
        """lbctl"""
        run(["lbctl", *argv, self.path]).expect(0)

    def turned_off(self, who):
        """Nothing of ours is left."""
        if who == "P":
            img("P", "amend", "-f", "qcow2", "-o", "livebackup=off", self.path)
        else:
            run(["lbctl", "disable", self.path]).expect(0)
        img("S10", "check", "-q", "-f", "qcow2", self.path)
        if info_of("S10", self.path).get("bitmaps"):
            raise Failure("bitmaps are left")


def check_life(case):
    """All of it, in an order that differs."""
    name, disk = case
    life = Life(disk, random.Random(name))
    size = size_of(life.path)
    snapshots = not disk.data and disk.options.get("refcount_bits") != 1
    life.step("dumped")
    for number in range(1, disk.checkpoints):
        life.step("session", ("S10", "P", "S7")[number % 3])
        life.step(*(("dumped", "--incremental") if number % 3 == 0
                    else ("dumped_into_a_pipe",)))
    life.step("session", "P")
    life.step("session", "P", True)
    life.step("session", "S7")
    life.step("closed")
    life.step("amended", "livebackup_sync=on")
    life.step("session", "P")
    life.step("resized", "P", size + 70000)
    life.step("dumped_into_a_pipe")
    life.step("session", "P", True)
    life.step("resized", "S10", size + 3 * 65536 + 512)
    life.step("session", "S10")
    life.step("confirmed")
    life.step("session", "P")
    if snapshots:
        life.step("snapshot", "P", "-c", "one")
        life.step("session", "P")
        life.step("snapshot", "S7", "-c", "two")
        life.step("session", "S7")
    life.step("controlled", "prune", "--keep=2")
    life.step("resized", "P", size // 2)
    life.step("session", "P")
    if snapshots:
        life.step("snapshot", "S10", "-d", "two")
        life.step("closed")
    life.step("amended", "livebackup_sync=off")
    life.step("dumped", "--incremental")
    life.step("session", "P", True)
    life.step("resized", "P", size)
    life.step("closed")
    life.step("session", "S10")
    life.step("dumped", "--incremental")
    life.turned_off("P" if random.Random(name).random() < .5 else "lbctl")


def lives(part):
    """Half of the disks, so that no test is long."""
    disks = DISKS + list(random_disks(100 if NIGHTLY else 2))
    each([(f"{index}", disk) for index, disk in enumerate(disks)
          if index % 2 == part], check_life)


@claim
def geometries():
    """Some disks."""
    lives(0)


@claim
def other_geometries():
    """And more."""
    lives(1)


if __name__ == "__main__":
    sys.exit(main())
