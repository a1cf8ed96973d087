#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""A patched QEMU is killed, or can't write, at each call of a session.

The shim of tests/fault makes the n-th write, sync or truncate of an operation
kill the process (before it, after it, or with the write torn at 4 KiB), or
fail.  Killed, the image must be trusted, and the incremental complete;
docs/consistency.md has no exception.  After an error it must be complete, or
refused.
"""

import json
import os
import shutil
import signal
import sys

from qemulib import (Disk, Failure, NIGHTLY, call, claim, dump, each,
                     expect_claims_kept, expect_no_errors, img, main,
                     oracle_trust, read, run, session, shim_environment,
                     verdict_of, workplace)
import lbext

# --------------------------------------------------------------------------
# Operations
# --------------------------------------------------------------------------

WRITES = ("write -P 11 5M 4k", "write -P 12 1M 100k", "flush",
          "write -P 13 7000k 70k", "write -z 3M 64k", "write -P 14 512 512")


class Operation:
    """One command of the patched QEMU on a prepared disk.

    fresh: the newest bitmap has never been written by a patched QEMU.  also:
    keywords that a kill may leave beside 'trusted', as the documents say.
    repair: a kill may leave refcounts to repair, as with any qcow2 image.
    """

    def __init__(self, tool, argv, disk=None, fresh=False, also=(),
                 prepare=(), repair=False):
        self.tool = tool
        self.argv = argv
        self.disk = disk or Disk("8M", "4k")
        self.fresh = fresh
        self.also = also
        self.prepare = prepare
        self.repair = repair

    def make(self, folder):
        """The disk with an archive, and an incremental that was lost."""
        os.makedirs(folder)
        if self.disk.backing:
            img("S10", "create", "-q", "-f", "qcow2",
                os.path.join(folder, "base.qcow2"), "8M")
            session("S10", os.path.join(folder, "base.qcow2"),
                    "write -P 33 1M 3M")
        path = self.disk.make(folder)
        session("P", path, "write -P 1 0 200k", "write -P 2 3M 64k")
        for step in self.prepare:
            img("P", *step.replace("@", path).split())
        session("P", path, "write -P 3 1M 64k")
        dump(path, os.path.join(folder, "full.lbz"))
        session("P", path, "write -P 4 2M 8k")
        run(["lbdump", "-q", "--incremental", path]).expect(0)
        if not self.fresh:
            session("P", path, "write -P 5 2100k 8k")

    def run(self, folder, env, **how):
        """On the disk in that folder."""
        path = os.path.join(folder, "disk.qcow2")
        argv = []
        if self.tool == "qemu-io":
            argv = ["-f", "qcow2"]
            for command in self.argv:
                argv += ["-c", command]
            argv.append(path)
        else:
            argv = [word.replace("@", path) for word in self.argv]
        return call("P", self.tool, *argv, env=env, **how)


FINE = Disk("40M", 512, cluster_size=4096)
LAZY = Disk("8M", "4k", lazy_refcounts="on")
SYNC = Disk("8M", "4k", sync=True)
DATA = Disk("8M", "4k", data="@/disk.data")
OVERLAY = Disk("8M", "4k", backing=("base.qcow2", "qcow2"))

OPERATIONS = {
    "first-session": Operation("qemu-io", WRITES, fresh=True),
    "session": Operation("qemu-io", WRITES),
    "fine": Operation("qemu-io", WRITES + ("write -P 15 20M 3M",), FINE,
                      fresh=True),
    "lazy": Operation("qemu-io", WRITES, LAZY, repair=True),
    "sync": Operation("qemu-io", WRITES, SYNC, fresh=True),
    "data": Operation("qemu-io", WRITES, DATA, fresh=True),
    "discard": Operation("qemu-io", (
        "discard 0 128k", "flush", "write -zu 1M 64k", "discard 2M 64k",
        "flush")),
    "grow": Operation("qemu-io", (
        "write -P 16 100k 4k", "truncate 12345856", "write -P 15 11M 64k")),
    "shrink": Operation("qemu-io", (
        "write -P 16 100k 4k", "truncate 1500k", "write -P 15 1M 64k")),
    "grow-fine": Operation("qemu-io", ("truncate 60M", "write -P 9 50M 64k"),
                           FINE),
    "snapshot": Operation("qemu-img", ["snapshot", "-c", "one", "@"],
                          repair=True),
    "revert": Operation("qemu-img", ["snapshot", "-a", "one", "@"],
                        prepare=("snapshot -c one @",), fresh=True,
                        repair=True),
    "delete": Operation("qemu-img", ["snapshot", "-d", "one", "@"],
                        prepare=("snapshot -c one @",), repair=True),
    "amend": Operation("qemu-img", ["amend", "-o", "livebackup_sync=on",
                                    "@"]),
    "off": Operation("qemu-img", ["amend", "-o", "livebackup=off", "@"],
                     also=("off",)),
    "bitmap": Operation("qemu-img", ["bitmap", "--add", "@", "other"]),
    # What is written to the base changes it: rule 10.
    "commit": Operation("qemu-img", ["commit", "-q", "@"], OVERLAY,
                        also=("backing-modified",)),
    "rebase": Operation("qemu-img", ["rebase", "-b", "", "@"], OVERLAY,
                        also=("backing-changed",)),
}


class Case:
    """An operation, prepared once."""

    def __init__(self, name):
        self.name = name
        self.operation = OPERATIONS[name]
        self.base = os.path.abspath(f"base-{name}")
        if not os.path.exists(self.base):
            self.operation.make(self.base)

    def folder(self):
        """A fresh copy; of what has absolute names, made anew."""
        folder = os.path.join(workplace(), self.name)
        if os.path.exists(folder):
            shutil.rmtree(folder)
        if self.operation.disk.data:
            self.operation.make(folder)
        else:
            shutil.copytree(self.base, folder)
        return folder

    def fault(self, folder, **fault):
        """Environment of the shim, for this folder's disk."""
        return shim_environment(path=folder + "/", **fault)

    def total(self):
        """How many calls there are without a fault."""
        folder = self.folder()
        count = os.path.join(os.path.dirname(folder), "count")
        self.operation.run(folder, self.fault(folder, count_file=count))
        total = int(read(count))
        if total < 3:
            raise Failure(f"{self.name}: only {total} calls")
        return total


def points(case, kinds, step=1):
    """(label, case, kind, n): each n, or one of so many, in turn with one of
    the kinds; by night each with all of them."""
    total = case.total()
    for turn, n in enumerate(range(1, total + 1, 1 if NIGHTLY else step)):
        for index, kind in enumerate(kinds):
            if NIGHTLY or turn % len(kinds) == index:
                yield f"{case.name}, {kind} at {n} of {total}", case, kind, n


# --------------------------------------------------------------------------
# Kills
# --------------------------------------------------------------------------

def check_kill(item):
    """Trusted and complete, and so it goes on."""
    _, case, kind, n = item
    folder = case.folder()
    path = os.path.join(folder, "disk.qcow2")
    run_faulty(case, folder, kind, n, died_of=signal.SIGKILL)
    chain = [os.path.join(folder, "full.lbz")]
    keyword = expect_claims_kept(path, chain)
    if keyword != "trusted" and keyword not in case.operation.also:
        raise Failure(f"not trusted: {keyword}")
    if case.operation.repair:
        img("P", "check", "-q", "-r", "all", "-f", "qcow2", path,
            status=(0, 2, 3))
    expect_no_errors(path)
    session("P", path, "write -P 21 600k 4k", "write -P 22 1200k 70k")
    after = expect_claims_kept(path, chain)
    if after != "trusted" and keyword == "trusted":
        raise Failure(f"not trusted in the next session: {after}")


def run_faulty(case, folder, kind, n, **how):
    """The operation with a fault."""
    return case.operation.run(folder, case.fault(folder, at=n, kind=kind),
                              **how)


def killed(*names):
    """At each call."""
    each([point for name in names
          for point in points(Case(name),
                              ("kill-before", "torn", "kill-after"))],
         check_kill)


@claim
def kill_sessions():
    """Open, write, close."""
    killed("first-session", "session", "fine", "lazy", "sync", "data",
           "discard")


@claim
def kill_resizes():
    """One write of the header switches."""
    killed("grow", "shrink", "grow-fine")


@claim
def kill_snapshots():
    """Internal ones: made, gone back to, deleted."""
    killed("snapshot", "revert", "delete")


@claim
def kill_others():
    """What else writes to the header or to other files."""
    killed("amend", "off", "bitmap", "commit", "rebase")



# --------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------

def check_error(item):
    """Complete, or refused; and a full dump begins anew."""
    _, case, kind, n = item
    kind, _, end = kind.partition(" ")
    folder = case.folder()
    path = os.path.join(folder, "disk.qcow2")
    fault = shim_environment(at=n, kind=kind, path=folder + "/disk.qcow2")
    operation = case.operation
    if end == "killed":
        operation = Operation(operation.tool, (*operation.argv, "sigraise 9"))
    operation.run(folder, fault, status=(0, 1),
                  may_die_of=signal.SIGKILL if end else None)
    if img("S10", "check", "-f", "qcow2", path,
           status=(0, 1, 2, 3)).status in (1, 2):
        # An error may cost any QEMU the image; that is not about backups.
        return
    chain = [os.path.join(folder, "full.lbz")]
    keyword = expect_claims_kept(path, chain)
    if keyword not in ("trusted", "in-use", *case.operation.also):
        raise Failure(f"{keyword} is nothing that the documents tell")
    for who in ("P", "S10"):
        session(who, path, "write -P 21 600k 4k")
        after = expect_claims_kept(path, chain)
        if after == "trusted" != keyword:
            raise Failure(f"{keyword} at first, trusted after {who}")
    img("P", "check", "-q", "-r", "all", "-f", "qcow2", path,
        status=(0, 2, 3))
    expect_mended(folder)


def expect_mended(folder):
    """recover drops what can't be trusted, and a full dump begins anew."""
    path = os.path.join(folder, "disk.qcow2")
    run(["lbctl", "recover", path]).expect(0)
    img("S10", "check", "-q", "-f", "qcow2", path)
    if verdict_of(path)[0] == "off":
        return
    full = os.path.join(folder, "again.lbz")
    dump(path, full)
    session("P", path, "write -P 96 100k 300k", killed=True)
    expect_claims_kept(path, [full], "trusted")


def failing(kinds, *names):
    """At every second call, by night at each."""
    each([point for name in names for point in points(Case(name), kinds, 2)],
         check_error)


@claim
def one_error():
    """One call fails."""
    failing(("eio", "enospc", "eio killed"), "first-session", "session",
            "fine", "data", "grow", "shrink")
    failing(("eio", "enospc"), "revert", "commit", "off", "snapshot")


@claim
def errors_from_then_on():
    """Nothing can be written any more, but to the data file."""
    failing(("eio-on", "enospc-on", "eio-on killed"), "first-session",
            "session", "fine", "data", "grow", "shrink")
    failing(("eio-on", "enospc-on"), "revert", "commit", "off", "snapshot")



# --------------------------------------------------------------------------
# Bad sectors where the bits are
# --------------------------------------------------------------------------

BAD_SECTORS = ("session", "grow-fine", "delete")


def bits_at(path):
    """Offsets of the newest bitmap's clusters, of the directory, and the size
    of a cluster."""
    trust = oracle_trust(path)[0]
    image = trust.image
    entry = trust.bitmaps[lbext.bitmap_name(trust.live.records[-1])]
    table = image.read_table(entry["table_offset"], entry["table_size"])
    return ([value & 0x00FFFFFFFFFFFE00 for value in table if value],
            image.bitmaps_extension()["directory_offset"],
            image.cluster_size)


def with_bad_sectors(path, places, errno, once):
    """Argument of qemu-io: writes that touch one of these bytes fail."""
    return "json:" + json.dumps({
        "driver": "qcow2",
        "file": {"driver": "blkdebug",
                 "image": {"driver": "file", "filename": path},
                 "inject-error": [
                     {"event": "none", "iotype": "write", "errno": errno,
                      "sector": place // 512, "once": once}
                     for place in places]}})


def check_bad_sectors(case):
    """The guest's write goes on; or fails, if the loss can't be shown."""
    _, name, errno, once, killed, directory_too = case
    folder = Case(name).folder()
    path = os.path.join(folder, "disk.qcow2")
    chain = [os.path.join(folder, "full.lbz")]
    clusters, directory, size = bits_at(path)
    bad = [place + step for place in clusters
           for step in range(0, size, 4096)]
    if directory_too:
        bad += range(directory, directory + size, 512)
    argv = []
    for command in ("write -P 11 5M 4k", "write -P 12 6M 100k", "flush",
                    "write -P 11 5M 4k", *(["sigraise 9"] if killed else [])):
        argv += ["-c", command]
    done = call("P", "qemu-io", *argv,
                with_bad_sectors(path, bad, errno, once), status=(0, 1),
                died_of=signal.SIGKILL if killed else None)
    out = done.out.decode()
    if directory_too:
        if "failed" not in out:
            raise Failure(f"a write that nobody will know of\n{out}{done}")
        expect_claims_kept(path, chain)
        return
    if out.count("wrote ") != 3 or "failed" in out:
        raise Failure(f"the guest's writes don't go on\n{out}{done}")
    if "livebackup: changes of" not in done.err:
        raise Failure(f"nobody is told\n{done}")
    expect_claims_kept(path, chain, "in-use")
    for byte, where, length in ((11, "5M", "4k"), (12, "6M", "100k")):
        session("S10", path, f"read -P {byte} {where} {length}")
    expect_no_errors(path)
    expect_mended(folder)


@claim
def bad_sectors_under_bits():
    """Once, and always; closed, or killed right behind."""
    for name in BAD_SECTORS:
        Case(name)
    each([(f"{name}, errno {errno}, once {once}, killed {killed}, directory "
           f"{directory}", name, errno, once, killed, directory)
          for name in BAD_SECTORS
          for errno, once in ((5, True), (28, False))
          for killed in (False, True)
          for directory in ((False,) if once else (False, True))],
         check_bad_sectors)


if __name__ == "__main__":
    sys.exit(main())
