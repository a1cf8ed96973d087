#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Patched and stock QEMUs in turn on one disk, and docs/trust.md after each.

A stock QEMU keeps the extension, clears our autoclear bit and tracks as the
standard has it; what a session of either leaves is computed by a model of the
documents (class Model) and compared with what lbctl, `qemu-img info` and the
independent reader say.  Where the answer is 'trusted', the incremental must
restore to what the guest reads.
"""

import os
import random
import shutil
import sys
import zlib

from qemulib import (Disk, Failure, NIGHTLY, STOCK, call, claim, copy, dump,
                     each, expect_chain_is, expect_claims_kept,
                     expect_no_errors, img, main, oracle_trust,
                     random_commands, read, remove, run, session, sh,
                     verdict_of, workplace)
import lbext
import qcow2

# --------------------------------------------------------------------------
# A model
# --------------------------------------------------------------------------


class Model:
    """P, boot id and IN_USE as the documents have them after each session.

    in_use: of each bitmap, oldest first.  The parent of the next incremental
    is the first checkpoint.
    """

    def __init__(self, checkpoints=1):
        self.promises = True
        self.open_here = False      # the boot id is that of this boot
        self.in_use = [False] * checkpoints

    def copy(self):
        """For another branch of the history."""
        other = Model()
        other.promises, other.open_here = self.promises, self.open_here
        other.in_use = list(self.in_use)
        return other

    @property
    def keyword(self):
        """Rule 16; the others don't apply here."""
        return "in-use" if any(self.in_use) else "trusted"

    def session(self, who, killed):
        """What docs/consistency.md (P) and the standard (S) promise."""
        if who == "P":
            self.patched(killed)
        else:
            self.promises = False
            if killed:
                self.in_use = [True] * len(self.in_use)

    def patched(self, killed):
        """A session, or bitmaps that nobody trusts again."""
        if self.keyword != "trusted":
            self.promises = False
            self.in_use = [True] * len(self.in_use)
            return
        self.promises = True
        self.open_here = killed

    def dumped(self):
        """A dump has added a checkpoint, which is the parent now."""
        self.promises, self.open_here = True, False
        self.in_use = [False]

    def expect(self, path):
        """The file says the same, and only this."""
        trust, verdict = oracle_trust(path)
        header = trust.image
        if not header.autoclear_features & qcow2.AUTOCLEAR_BITMAPS:
            raise Failure("the standard autoclear bit is clear")
        promises = bool(header.autoclear_features
                        & lbext.AUTOCLEAR_LIVEBACKUP)
        if promises != self.promises:
            raise Failure(f"autoclear bit 62 is {promises}")
        entries = {entry["name"]: entry for entry in header.bitmaps()}
        found = [bool(entries[lbext.bitmap_name(record)]["flags"]
                      & qcow2.BITMAP_IN_USE) for record in trust.live.records]
        if found[-len(self.in_use):] != self.in_use:
            raise Failure(f"IN_USE: {found}, expected {self.in_use}")
        if self.promises:
            here = trust.live.fixed["boot_id"] != lbext.ZERO_UUID
            if here != self.open_here:
                raise Failure(f"a boot id is recorded: {here}")
        return verdict


# --------------------------------------------------------------------------
# Mixes of sessions
# --------------------------------------------------------------------------

DISKS = {
    "plain": Disk("8M", "4k"),
    "two": Disk("8M", "4k", checkpoints=2),
    "fine": Disk("40M", 512, cluster_size=4096, checkpoints=2),
    "coarse": Disk("5000192", "2M", cluster_size="64k", extended_l2="on"),
    "data": Disk("8M", "64k", data="@/disk.data"),
    "overlay": Disk("9M", "64k", backing=("mid.qcow2", "qcow2"), by="S7"),
    "sync": Disk("8M", "64k", sync=True, checkpoints=2),
}

SESSIONS = tuple((who, killed) for who in ("P", "S7", "S10")
                 for killed in (False, True))
# A dump that adds a checkpoint, where it can; one that is full where it must.
DUMP, AUTO = ("D", None), ("A", None)


def label(step):
    """As P, S7k (killed), D (dumped)."""
    return step[0] + ("k" if step[1] else "")


class Node:
    """A disk after some steps."""

    def __init__(self, disk, folder):
        """With content, its base, a full archive and the checkpoints."""
        self.folder = folder
        self.steps = ()
        self.model = Model(disk.checkpoints)
        if os.path.exists(folder):
            shutil.rmtree(folder)
        os.makedirs(folder)
        if disk.backing:
            make_chain(folder)
        disk.make(folder)
        session("P", self.path, "write -P 1 0 200k", "write -P 2 3M 64k",
                "write -z 4M 64k")
        dump(self.path, os.path.join(folder, "0.lbz"))
        self.archives = 1
        for number in range(1, disk.checkpoints):
            session("S10", self.path, f"write -P {50 + number} 1M 8k",
                    "write -P 51 4100k 20k")
            # It arrives nowhere, so it is no parent.
            run(["lbdump", "-q", "--incremental", self.path]).expect(0)

    @property
    def path(self):
        """Of the image."""
        return os.path.join(self.folder, "disk.qcow2")

    @property
    def chain(self):
        """The archives that restore the last checkpoint."""
        return [os.path.join(self.folder, f"{number}.lbz")
                for number in range(self.archives)]

    def child(self, step):
        """A copy that goes one step further.  Data files have absolute names,
        so disks with one can't be copied."""
        node = Node.__new__(Node)
        node.folder = f"{self.folder}-{label(step)}"
        shutil.copytree(self.folder, node.folder)
        node.archives = self.archives
        node.model = self.model.copy()
        node.steps = self.steps
        node.go(step)
        return node

    def go(self, step):
        """The step, and what must hold then."""
        self.steps += (step,)
        try:
            if step[0] in ("D", "A"):
                self.dump(step[0] == "A")
            else:
                dice = random.Random(zlib.crc32(repr(self.steps).encode()))
                session(step[0], self.path, *random_commands(
                    dice, self.path, 1 + dice.randrange(4)), killed=step[1])
                self.model.session(*step)
            self.model.expect(self.path)
            expect_claims_kept(self.path, self.chain, self.model.keyword)
            expect_no_errors(self.path)
        except Failure as failure:
            raise Failure(f"after {' '.join(map(label, self.steps))}: "
                          f"{failure}") from failure

    def dump(self, auto):
        """A dump that adds a checkpoint, or is refused."""
        trusted = self.model.keyword == "trusted"
        if trusted:
            dump(self.path, f"{self.folder}/{self.archives}.lbz",
                 "--auto" if auto else "--incremental")
            self.archives += 1
        elif auto:
            for archive in self.chain:
                remove(archive)
            dump(self.path, f"{self.folder}/0.lbz", "--auto")
            self.archives = 1
        else:
            before = read(self.path)
            dump(self.path, f"{self.folder}/{self.archives}.lbz",
                 "--incremental", status=3)
            if read(self.path) != before:
                raise Failure("a refused incremental has changed the image")
            return
        self.model.dumped()
        expect_chain_is(self.path, self.chain)


def walk(node, depth):
    """All sequences of sessions from here."""
    for step in SESSIONS if depth else ():
        child = node.child(step)
        walk(child, depth - 1)
        shutil.rmtree(child.folder)


@claim
def all_sequences():
    """Every sequence of three sessions, each closed or killed."""
    root = Node(DISKS["two"], os.path.abspath("root"))

    def from_here(case):
        _, first, second = case
        folder = os.path.join(workplace(), "tree")
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        start = Node.__new__(Node)
        vars(start).update(vars(root), folder=os.path.join(folder, "x"))
        shutil.copytree(root.folder, start.folder)
        start = start.child(first).child(second)
        walk(start, 2 if NIGHTLY else 1)

    each([(f"{label(first)} {label(second)}", first, second)
          for first in SESSIONS for second in SESSIONS], from_here)


def sequences_of(name):
    """Of a disk other than the plain one: some, with dumps in between."""
    dice = random.Random(name)
    steps = SESSIONS + (("P", False), ("P", True), DUMP, AUTO)
    for number in range(200 if NIGHTLY else 10):
        length = dice.randrange(3, 7)
        yield (f"{name} {number}", DISKS[name],
               [dice.choice(steps) for _ in range(length)])


def check_sequence(case):
    """One of them."""
    name, disk, steps = case
    node = Node(disk, os.path.join(workplace(), name.split()[0]))
    for step in steps:
        node.go(step)


@claim
def sequences_with_dumps():
    """Disks of other kinds, dumps in between."""
    each([case for name in DISKS for case in sequences_of(name)],
         check_sequence)



# --------------------------------------------------------------------------
# What spoils the bits, and what does not
# --------------------------------------------------------------------------

# By rule, for what follows the first keyword.
RULES = ("off", "unsupported", "extension-damaged", "no-checkpoint",
         "bitmaps-dropped", "directory-damaged", "unlisted-bitmap",
         "not-closed", "backing-changed", "backing-modified",
         "data-file-modified", "power-loss", "moved-open", "bitmap-missing",
         "bitmap-disabled", "in-use", "canary")
SPOILS = []
HARMLESS = []
OVERLAY = Disk("8M", "4k", backing=("mid.qcow2", "qcow2"), checkpoints=2)
LAZY = Disk("8M", "4k", lazy_refcounts="on", checkpoints=2)


def make_chain(folder):
    """mid.qcow2 over base.qcow2, which has a data file."""
    base, mid = (os.path.join(folder, name)
                 for name in ("base.qcow2", "mid.qcow2"))
    remove(os.path.join(folder, "base.data"))
    img("S10", "create", "-q", "-f", "qcow2", "-o",
        f"data_file={folder}/base.data", base, "8M")
    session("S10", base, "write -P 33 1M 3M")
    img("S10", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F",
        "qcow2", mid)
    session("S10", mid, "write -P 34 2M 1M")
    copy(mid, os.path.join(folder, "other.qcow2"))


class Spoilt(Node):
    """A disk, whole, and what is done to it."""

    def __init__(self, disk, folder):
        self.make_backing = disk.backing is not None
        super().__init__(disk, folder)

    def bitmap(self, index):
        """Name of a checkpoint's bitmap."""
        return "lb-" + verdict_of(self.path)[1]["checkpoints"][index]["uuid"]

    def file(self, name):
        """Beside the image."""
        return os.path.join(self.folder, name)


def spoil(keyword, disk="two", who=STOCK, then=None):
    """Register do(who, node), after which keyword holds.  then: the keyword
    after a stock QEMU has written, where that is another."""
    def register(function):
        SPOILS.append((function.__name__.replace("_", "-"), keyword, disk,
                       who, then or keyword, function))
        return function
    return register


def harmless(disk="two", who=("P",) + STOCK):
    """Register do(who, node), which takes no trust away."""
    def register(function):
        HARMLESS.append((function.__name__.replace("_", "-"), disk, who,
                         function))
        return function
    return register


def bitmap(who, node, *verbs):
    """qemu-img bitmap"""
    img(who, "bitmap", *verbs[:-1], "-f", "qcow2", node.path, verbs[-1])


def resize(who, node, size):
    """qemu-img resize"""
    img(who, "resize", "-q", "--shrink", "-f", "qcow2", node.path, size)


@spoil("canary")
def shrink(who, node):
    """The canary of the last granule is behind the new end."""
    resize(who, node, "5M")


@spoil("canary")
def shrink_and_grow(who, node):
    """What was cut off comes back without bits."""
    resize(who, node, "5M")
    resize(who, node, "8M")


@spoil("canary")
def shrink_and_grow_more(who, node):
    """The same."""
    resize(who, node, "5M")
    resize(who, node, "12M")


@spoil("canary")
def shrink_and_grow_less(who, node):
    """The same, to a size in between."""
    resize(who, node, "5M")
    resize(who, node, "7M")


@spoil("canary")
def grow_and_shrink_more(who, node):
    """The way down counts."""
    resize(who, node, "12M")
    resize(who, node, "5M")


@spoil("canary")
def truncate_by_qemu_io(who, node):
    """Not only qemu-img can."""
    session(who, node.path, "truncate 5M", "truncate 8M")


@spoil("canary")
def clear_the_newest(who, node):
    """bitmap --clear"""
    bitmap(who, node, "--clear", node.bitmap(1))


@spoil("canary")
def clear_the_oldest(who, node):
    """bitmap --clear"""
    bitmap(who, node, "--clear", node.bitmap(0))


@spoil("bitmap-disabled")
def disable_the_newest(who, node):
    """bitmap --disable"""
    bitmap(who, node, "--disable", node.bitmap(1))


@spoil("bitmap-disabled")
def enable_the_oldest(who, node):
    """bitmap --enable"""
    bitmap(who, node, "--enable", node.bitmap(0))


@spoil("bitmap-missing")
def remove_the_newest(who, node):
    """bitmap --remove"""
    bitmap(who, node, "--remove", node.bitmap(1))


@spoil("bitmap-missing")
def remove_the_oldest(who, node):
    """bitmap --remove"""
    bitmap(who, node, "--remove", node.bitmap(0))


@spoil("canary")
def recreate(who, node):
    """A new one of the same name and granularity."""
    name = node.bitmap(1)
    bitmap(who, node, "--remove", name)
    bitmap(who, node, "--add", "-g", "4096", name)


@spoil("bitmap-missing")
def recreate_coarser(who, node):
    """Of another granularity."""
    name = node.bitmap(1)
    bitmap(who, node, "--remove", name)
    bitmap(who, node, "--add", "-g", "65536", name)


@spoil("unlisted-bitmap")
def add_one_of_ours(who, node):
    """A name that only we may use."""
    bitmap(who, node, "--add",
           "lb-11111111-1111-4111-8111-111111111111")


@spoil("in-use")
def killed_stock(who, node):
    """A stock session that was not closed."""
    session(who, node.path, "write -P 9 1M 64k", "flush", killed=True)


@spoil("not-closed", disk=LAZY, then="in-use")
def killed_lazy(who, node):
    """With lazy refcounts the rule of the image comes first; a stock QEMU
    repairs the image when it opens it, and leaves the bitmaps in use."""
    session(who, node.path, "write -P 9 6M 64k", killed=True)


@spoil("in-use", disk=LAZY)
def killed_lazy_and_repaired(who, node):
    """The dirty bit is gone."""
    session(who, node.path, "write -P 9 6M 64k", killed=True)
    img(who, "check", "-r", "all", "-f", "qcow2", node.path,
        status=(0, 1, 2, 3))


@spoil("bitmaps-dropped")
def older_program(_, node):
    """One that knows no bitmaps has written."""
    poker = lbext.Poker(node.path)
    poker.poke("autoclear.bitmaps", "0")
    poker.poke("autoclear.livebackup", "0")


@spoil("backing-changed", disk=OVERLAY)
def rebase_unsafe(who, node):
    """To a copy."""
    img(who, "rebase", "-u", "-f", "qcow2", "-b", "other.qcow2", "-F",
        "qcow2", node.path)


@spoil("backing-changed", disk=OVERLAY)
def rebase_to_none(who, node):
    """No backing file any more."""
    img(who, "rebase", "-u", "-f", "qcow2", "-b", "", node.path)


@spoil("backing-changed", disk=OVERLAY)
def rebase_to_another_format(who, node):
    """The same file, read otherwise."""
    img(who, "rebase", "-u", "-f", "qcow2", "-b", "mid.qcow2", "-F", "raw",
        node.path)


@spoil("backing-changed")
def rebase_to_some(who, node):
    """A disk that had none gets one."""
    make_chain(node.folder)
    img(who, "rebase", "-u", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2",
        node.path)


@spoil("backing-changed", disk=OVERLAY, who=STOCK)
def rebase_by_stock(who, node):
    """The content is the same; the name in our digest is not."""
    img(who, "rebase", "-f", "qcow2", "-b", "other.qcow2", "-F", "qcow2",
        node.path)


@spoil("backing-modified", disk=OVERLAY)
def commit(who, node):
    """The base gets what the overlay has, which is emptied."""
    img(who, "commit", "-q", "-f", "qcow2", node.path)


@spoil("backing-modified", disk=OVERLAY)
def commit_and_keep(who, node):
    """The overlay is not emptied."""
    img(who, "commit", "-q", "-d", "-f", "qcow2", node.path)


@spoil("backing-modified", disk=OVERLAY)
def commit_below(who, node):
    """Between two backing files."""
    img(who, "commit", "-q", "-f", "qcow2", node.file("mid.qcow2"))


@spoil("backing-modified", disk=OVERLAY, who=("P",) + STOCK)
def base_written(who, node):
    """Under its overlay."""
    session(who, node.file("mid.qcow2"), "write -P 77 6M 64k")


@spoil("backing-modified", disk=OVERLAY, who=("P",) + STOCK)
def base_of_base_written(who, node):
    """Two levels down, into its data file."""
    session(who, node.file("base.qcow2"), "write -P 77 1M 64k")


@spoil("backing-modified", disk=OVERLAY, who=("P",))
def data_file_of_base_written(_, node):
    """Not by any driver."""
    sh("dd", "if=/dev/zero", "conv=notrunc", "bs=1", "count=1",
       "of=" + node.file("base.data"))


@spoil("backing-modified", disk=OVERLAY, who=("P",))
def base_replaced(_, node):
    """Another file of that name."""
    os.utime(node.file("other.qcow2"))
    os.rename(node.file("other.qcow2"), node.file("mid.qcow2"))


@spoil("data-file-modified", disk="data", who=("P",), then="trusted")
def data_file_written(_, node):
    """Without any driver.  A stock QEMU clears bit 62, and then nobody can
    tell: docs/trust.md, the last paragraph."""
    sh("dd", "if=/dev/zero", "conv=notrunc", "bs=1", "count=1",
       "of=" + node.file("disk.data"))


def later(keyword):
    """After a patched QEMU has opened the image for writing: it has marked
    the bitmaps, which shows where no earlier rule does."""
    if keyword in ("not-closed", "data-file-modified", "trusted"):
        return "in-use"         # they ask for bit 62, and for the dirty bit
    return min(keyword, "in-use", key=RULES.index)


def spoilt_node(disk, place):
    """In a folder of this thread."""
    disk = DISKS.get(disk, disk)
    folder = os.path.join(workplace(), place)
    return Spoilt(disk, folder)


# By whom, killed; "all": by all of them in turn.
OPENED_LATER = (None, ("P", False), ("P", True), ("S7", False),
                ("S10", False), ("S10", True), "all")


def check_spoil(case):
    """Spoilt, then opened by each; the keyword stays a reason; mended."""
    name, keyword, disk, then, who, function = case
    for index, after in enumerate(OPENED_LATER):
        if not NIGHTLY and index not in (
                0, zlib.crc32(name.encode()) % len(OPENED_LATER)):
            continue
        node = spoilt_node(disk, "spoilt")
        function(who, node)
        try:
            expect_claims_kept(node.path, node.chain, keyword)
        except Failure as failure:
            raise Failure(f"at once: {failure}") from failure
        if after is not None:
            check_after(name, node, keyword, then, after)
        expect_mended(node)


def check_after(name, node, keyword, then, after):
    """Somebody else opens the image for writing."""
    who, killed = after if after != "all" else ("P", False)
    session(who, node.path, "write -P 99 1500k 70k", killed=killed)
    if who == "P":
        # It tracks on in the newest one, if that is good.
        want = keyword if "oldest" in name else later(keyword)
    else:
        want = later(then) if killed else then
    try:
        if want != "trusted":
            expect_claims_kept(node.path, node.chain, want)
        if after == "all":
            session("S10", node.path, "write -P 98 2500k 70k")
            session("P", node.path, "write -P 97 3500k 70k")
            expect_claims_kept(node.path, node.chain, want)
    except Failure as failure:
        raise Failure(f"after {after}: {failure}") from failure


def expect_mended(node):
    """recover drops what can't be trusted, and a full dump begins anew."""
    if "not-closed" in verdict_of(node.path)[0]:
        img("P", "check", "-q", "-r", "all", "-f", "qcow2", node.path,
            status=(0, 2, 3))
    run(["lbctl", "recover", node.path]).expect(0)
    img("S10", "check", "-q", "-f", "qcow2", node.path)
    full = node.file("again.lbz")
    dump(node.path, full)
    session("P", node.path, "write -P 96 100k 300k", killed=True)
    session("P", node.path, "discard 1M 1M")
    session("S7", node.path, "write -P 95 4M 4k")
    expect_claims_kept(node.path, [full], "trusted")


def spoilt(*keywords):
    """By one of these rules."""
    each([(f"{name}, {who}", keyword, disk, then, who, function)
          for name, keyword, disk, whos, then, function in SPOILS
          for who in whos if keyword in keywords], check_spoil)


@claim
def spoilt_bitmaps():
    """Shrunk, cleared, disabled, removed, added, not known at all."""
    spoilt("canary", "bitmap-disabled", "bitmap-missing", "unlisted-bitmap",
           "bitmaps-dropped")


@claim
def spoilt_by_a_kill():
    """Not closed by a stock QEMU."""
    spoilt("in-use", "not-closed")


@claim
def spoilt_other_files():
    """Backing files changed or exchanged, data file written."""
    spoilt("backing-changed", "backing-modified", "data-file-modified")


# --------------------------------------------------------------------------
# What takes no trust away
# --------------------------------------------------------------------------

@harmless()
def grow(who, node):
    """Growth has changed by rule."""
    session(who, node.path, "truncate 12345856", "write -P 5 11M 64k",
            "write -P 6 8300k 1M")


@harmless()
def grow_twice_and_shrink(who, node):
    """As long as it does not become smaller than it was."""
    resize(who, node, "10M")
    session(who, node.path, "write -P 6 8300k 1M")
    resize(who, node, "12M")
    resize(who, node, "9M")
    resize(who, node, "11M")


@harmless(who=("P",))
def shrink_by_ours(who, node):
    """Ours keeps the canaries."""
    resize(who, node, "5M")


@harmless(who=("P",))
def shrink_and_grow_by_ours(who, node):
    """And what was cut off has changed."""
    resize(who, node, "1536k")
    resize(who, node, "8M")


@harmless(who=("P",))
def shrink_to_nothing_by_ours(who, node):
    """Whether that is refused or not: a stock QEMU can't have bitmaps on an
    empty disk, and must be able to open it."""
    call(who, "qemu-io", "-f", "qcow2", "-c", "truncate 0", node.path,
         status=(0, 1))
    for stock in STOCK:
        img(stock, "check", "-q", "-f", "qcow2", node.path)
    resize(who, node, "5000192")
    session(who, node.path, "write -P 4 4M 512")


@harmless()
def internal_snapshots(who, node):
    """Made, left by writes, deleted."""
    for name in ("one", "two"):
        img(who, "snapshot", "-q", "-c", name, node.path)
        session(who, node.path, "write -P 7 100k 300k", "write -z 3M 64k")
    img(who, "snapshot", "-q", "-d", "one", node.path)


@harmless(who=("P",))
def back_to_a_snapshot(who, node):
    """All has changed."""
    img(who, "snapshot", "-q", "-c", "one", node.path)
    session(who, node.path, "write -P 7 100k 300k", "write -P 8 6M 64k")
    img(who, "snapshot", "-q", "-a", "one", node.path)


@harmless(who=STOCK)
def back_to_a_snapshot_is_refused(who, node):
    """A stock QEMU has active bitmaps then; nothing may change behind them."""
    img(who, "snapshot", "-q", "-c", "one", node.path)
    session(who, node.path, "write -P 7 100k 300k")
    img(who, "snapshot", "-q", "-a", "one", node.path, status=(1,))


@harmless()
def bitmaps_of_others(who, node):
    """Added, merged into ours, removed."""
    bitmap(who, node, "--add", "-g", "65536", "other")
    session(who, node.path, "write -P 7 100k 300k")
    if who != "P":
        bitmap(who, node, "--merge", "other", node.bitmap(1))
    bitmap(who, node, "--clear", "other")
    session(who, node.path, "write -P 7 3M 300k")
    bitmap(who, node, "--remove", "other")


@harmless(who=("P",))
def ours_are_not_for_others(who, node):
    """qemu-img bitmap finds none of them."""
    for verb in ("--clear", "--disable", "--enable", "--remove"):
        for index in (0, 1):
            img(who, "bitmap", verb, "-f", "qcow2", node.path,
                node.bitmap(index), status=(1,))
    img(who, "bitmap", "--add", "-f", "qcow2", node.path,
        "lb-11111111-1111-4111-8111-111111111111", status=(1,))


@harmless()
def converted_onto(who, node):
    """qemu-img convert -n"""
    other = node.file("source.raw")
    with open(other, "wb") as file:
        file.write(b"source" * 100000)
        file.truncate(8 << 20)
    img(who, "convert", "-n", "-f", "raw", "-O", "qcow2", other, node.path)


@harmless()
def amended(who, node):
    """Options that have nothing to do with us."""
    img(who, "amend", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on",
        node.path)
    img(who, "amend", "-q", "-f", "qcow2", "-o",
        "lazy_refcounts=off,refcount_bits=64", node.path)
    session(who, node.path, "write -P 7 3M 300k")


@harmless()
def checked(who, node):
    """Nothing to repair."""
    img(who, "check", "-q", "-r", "all", "-f", "qcow2", node.path)
    session(who, node.path, "write -P 7 3M 300k")
    img(who, "check", "-q", "-r", "leaks", "-f", "qcow2", node.path)


@harmless(who=("P",))
def killed_and_checked(who, node):
    """The bits are in the file, and a repair knows them."""
    session(who, node.path, "write -P 7 100k 300k", "flush",
            "write -P 8 6M 64k", killed=True)
    img(who, "check", "-q", "-r", "all", "-f", "qcow2", node.path,
        status=(0, 2, 3))


@harmless(disk=LAZY, who=("P",))
def killed_lazy_ours(who, node):
    """Dirty, but every bit is there."""
    session(who, node.path, "write -P 7 100k 300k", "flush",
            "write -P 8 6M 64k", killed=True)


@harmless(disk=LAZY, who=("P",))
def killed_lazy_ours_and_checked(who, node):
    """Dirty, but every bit is there."""
    killed_lazy_ours(who, node)
    img(who, "check", "-q", "-r", "all", "-f", "qcow2", node.path,
        status=(0, 2, 3))


@harmless(disk=OVERLAY, who=("P",))
def commit_by_ours(who, node):
    """The content stays, and our digests are taken anew."""
    session(who, node.path, "write -P 7 5M 300k")
    img(who, "commit", "-q", "-f", "qcow2", node.path)


@harmless(disk=OVERLAY, who=("P",))
def commit_and_keep_by_ours(who, node):
    """The same, not emptied."""
    session(who, node.path, "write -P 7 5M 300k")
    img(who, "commit", "-q", "-d", "-f", "qcow2", node.path)


@harmless(disk=OVERLAY, who=("P",))
def rebase_by_ours(who, node):
    """The content stays."""
    session("S10", node.file("other.qcow2"), "write -P 9 0 1M",
            "discard 2M 64k")
    img(who, "rebase", "-q", "-f", "qcow2", "-b", "other.qcow2", "-F",
        "qcow2", node.path)


@harmless(disk=OVERLAY, who=("P",))
def flattened_by_ours(who, node):
    """No backing file any more."""
    img(who, "rebase", "-q", "-f", "qcow2", "-b", "", node.path)


@harmless()
def committed_into(who, node):
    """The disk is the base that an overlay is committed to."""
    overlay = node.file("top.qcow2")
    img(who, "create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2",
        overlay, "9M")
    session(who, overlay, "write -P 7 1M 3M", "write -z 100k 64k",
            "write -P 8 8500k 64k")
    img(who, "commit", "-q", "-f", "qcow2", overlay)


def check_harmless(case):
    """At once, and after what others do."""
    name, disk, who, function = case
    last = len(OPENED_LATER) - 1
    for index, after in enumerate(OPENED_LATER):
        if not NIGHTLY and index not in (
                0, zlib.crc32(name.encode()) % last):
            continue
        node = spoilt_node(disk, "harmless")
        function(who, node)
        try:
            expect_claims_kept(node.path, node.chain, "trusted")
        except Failure as failure:
            raise Failure(f"at once: {failure}") from failure
        if after is None or after == "all":
            continue
        keyword = "trusted" if after[0] == "P" or not after[1] else "in-use"
        try:
            session(after[0], node.path, "write -P 99 500k 70k",
                    "write -P 98 1M 70k", killed=after[1])
            expect_claims_kept(node.path, node.chain, keyword)
            expect_no_errors(node.path)
        except Failure as failure:
            raise Failure(f"after {after}: {failure}") from failure


@claim
def not_spoilt():
    """What a disk lives through."""
    each([(f"{name}, {who}", disk, who, function)
          for name, disk, whos, function in HARMLESS for who in whos],
         check_harmless)


if __name__ == "__main__":
    sys.exit(main())
