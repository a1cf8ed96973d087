#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""lbvm backup of a stopped machine, killed or failing at any of its writes.

A machine of two disks was backed up once, and has changed since. Each case backs up
a copy of it, with its repository, under one fault. Afterwards what is listed must
be whole, and the next backup incremental for both disks, and right.
"""

import os
import shutil
import signal
import sys

from faultlib import (Failure, NIGHTLY, SANITIZED, claim, each, main, run,
                      shim_environment, workplace)
import vmrepo

OPS = "write,sync,truncate,rename,unlink"
DISKS = ["a", "b"]


def lbvm(path, command, *arguments, **options):
    """In the folder that holds disks and repository."""
    return run(["lbvm", command, f"--repository={path}/repo", *arguments],
               **options)


def back_up(path, **options):
    return lbvm(path, "backup", "-q", "--threads=1", "m",
                *[f"{path}/{disk}.qcow2" for disk in DISKS], **options)


def write(path, disk, number, offset):
    run(["qemu-io", "-f", "qcow2", "-c", f"write -P {number} {offset} 200k",
         f"{path}/{disk}.qcow2"]).expect(0)


class Base:
    """What is prepared once."""

    def __init__(self):
        self.path = os.path.abspath("base")
        os.mkdir(self.path)
        for number, disk in enumerate(DISKS):
            image = f"{self.path}/{disk}.qcow2"
            run(["qemu-img", "create", "-q", "-f", "qcow2", image,
                 "8M"]).expect(0)
            run(["lbctl", "enable", image]).expect(0)
            write(self.path, disk, number + 1, "1M")
        back_up(self.path).expect(0)
        for number, disk in enumerate(DISKS):
            write(self.path, disk, number + 3, f"{number + 2}M")
        path = self.copy()
        counter = os.path.join(workplace(), "count")
        back_up(path, env=shim_environment(op=OPS, count_file=counter,
                                           path=path)).expect(0)
        with open(counter, encoding="ascii") as file:
            self.total = int(file.read())
        self.expect_right(path, 2)

    def copy(self):
        path = os.path.join(workplace(), "machine")
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.path, path)
        return path

    @staticmethod
    def expect_whole(path):
        """How many backups are listed; each is whole."""
        machine = vmrepo.Machine(vmrepo.Repository(f"{path}/repo"), "m")
        machine.check()
        return machine

    def expect_right(self, path, listed):
        """The newest backup is incremental, and what the disks are."""
        machine = self.expect_whole(path)
        if len(machine.listed()) not in (listed, listed + 1):
            raise Failure(f"{len(machine.listed())} backups are listed")
        if machine.leftovers():
            raise Failure(f"leftovers: {machine.leftovers()}")
        newest = lbvm(path, "show", "--json", "m").expect(0).json()
        target = f"{path}/restored"
        lbvm(path, "restore", "-q", "-o", target, "m").expect(0)
        for disk, entry in zip(DISKS, newest["disks"]):
            if entry["parent"] is None:
                raise Failure(f"{disk}: in full: {entry['reason']}")
            run(["qemu-img", "compare", "-q", f"{path}/{disk}.qcow2",
                 f"{target}/{disk}.qcow2"]).expect(0)
            run(["qemu-img", "check", "-q", "-f", "qcow2",
                 f"{path}/{disk}.qcow2"]).expect(0, 3)


def cases(base, kinds):
    """kinds: name -> each how many-th call."""
    if base.total < 40:
        raise Failure(f"the shim has seen {base.total} calls alone")
    for kind, step in kinds.items():
        step = 1 if NIGHTLY else step * (4 if SANITIZED else 1)
        for n in range(1, base.total + 1, step):
            yield f"{kind} at {n} of {base.total}", base, kind, n


def go_on(base, path):
    """The next backup, after more changes."""
    base.expect_whole(path)
    write(path, "a", 9, "5M")
    back_up(path).expect(0)
    base.expect_right(path, 2)


def check_killed(case):
    _, base, kind, n = case
    path = base.copy()
    back_up(path, env=shim_environment(op=OPS, at=n, kind=kind, path=path),
            died_of=signal.SIGKILL)
    go_on(base, path)


@claim
def killed():
    """At every write, sync, rename and deletion."""
    each(cases(Base(), {"kill-before": 1, "torn": 4, "kill-after": 4}),
         check_killed)


def check_failed(case):
    _, base, kind, n = case
    path = base.copy()
    back_up(path, env=shim_environment(op=OPS, at=n, kind=kind,
                                       path=path)).expect(0, 1)
    go_on(base, path)


@claim
def failed():
    """Each of these calls fails, alone or with all that follow."""
    each(cases(Base(), {"eio": 2, "enospc-on": 4}), check_failed)


if __name__ == "__main__":
    sys.exit(main())
