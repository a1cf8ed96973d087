#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""lbvm prune, killed or failing at any of its writes and deletions.

The oracle makes a repository once; each case prunes a copy of it under one
fault. Afterwards every backup that is still listed must restore to what it was,
all that the policy keeps must be listed, and a second pruning must end where
one without a fault does.
"""

import json
import os
import shutil
import signal
import sys

from faultlib import (Failure, NIGHTLY, SANITIZED, claim, each, main, run,
                      shim_environment, workplace)
import vmrepo

OPS = "write,sync,truncate,rename,unlink"

# Two disks. The newest of each of four days is kept; 2 must be held, since 3
# and what leads to 6 go on from it; the others are merged, 5 into 6 for one
# disk and into 8 for the other; the second disk begins anew in 6.
PLAN = [(1000000, [None, None]), (1003600, [0, 0]), (1007200, [1, 1]),
        (1010800, [2, 2]), (1100000, [2, 3]), (1103600, [4, 4]),
        (1107200, [5, None]), (1200000, [6, 6]), (1203600, [3, 5]),
        (1300000, [7, 7])]
KEPT = [3, 6, 8, 9]
ARGV = ["lbvm", "prune", "--threads=1", "--keep-daily=4"]


class Base:
    """What is prepared once."""

    def __init__(self):
        self.path = os.path.abspath("base")
        machine = vmrepo.Machine(vmrepo.Repository(self.path), "m", True)
        self.content = {}
        for row in vmrepo.synth(machine, PLAN, blocks=6):
            self.content.setdefault(row[0], set()).add(row)
        self.ids = [m["id"] for m in machine.backups]
        path = self.copy()
        counter = os.path.join(path, "..", "count")
        run([*ARGV, f"--repository={path}"],
            env=shim_environment(op=OPS, count_file=counter,
                                 path=path)).expect(0)
        with open(counter, encoding="ascii") as file:
            self.total = int(file.read())
        self.expect_done(path)

    def copy(self):
        path = os.path.join(workplace(), "repo")
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.path, path)
        return path

    def expect_sound(self, path):
        """What is listed restores; nothing that is kept is missing."""
        machine = vmrepo.Machine(vmrepo.Repository(path), "m")
        machine.check()
        listed = {m["id"] for m in machine.listed()}
        if not {self.ids[n] for n in KEPT} <= listed:
            raise Failure("a backup that is kept is gone")
        rows = set(machine.contents(os.path.join(path, "..", "content")))
        if rows != set().union(*(self.content[i] for i in listed)):
            raise Failure("a backup restores differently")
        return machine

    def expect_done(self, path):
        machine = self.expect_sound(path)
        if [m["id"] for m in machine.listed()] != [
                self.ids[n] for n in KEPT]:
            raise Failure("the pruning is not complete")
        if [m["id"] for m in machine.backups if "kept_for" in m] != [
                self.ids[2]]:
            raise Failure("others are held")
        if machine.leftovers():
            raise Failure(f"leftovers: {machine.leftovers()}")


def cases(base, kinds):
    """kinds: name -> each how many-th call."""
    if base.total < 60:
        raise Failure(f"the shim has seen {base.total} calls alone")
    for kind, step in kinds.items():
        step = 1 if NIGHTLY else step * (4 if SANITIZED else 1)
        for n in range(1, base.total + 1, step):
            yield f"{kind} at {n} of {base.total}", base, kind, n


def prune_again(base, path):
    run([*ARGV, f"--repository={path}"]).expect(0)
    base.expect_done(path)


def check_killed(case):
    _, base, kind, n = case
    path = base.copy()
    run([*ARGV, f"--repository={path}"],
        env=shim_environment(op=OPS, at=n, kind=kind, path=path),
        died_of=signal.SIGKILL)
    base.expect_sound(path)
    # who comes first may be a verification
    run(["lbvm", "verify", "-q", f"--repository={path}"]).expect(0)
    prune_again(base, path)


@claim
def killed():
    """At every write, sync, rename and deletion."""
    each(cases(Base(), {"kill-before": 1, "torn": 4, "kill-after": 4}),
         check_killed)


def check_failed(case):
    _, base, kind, n = case
    path = base.copy()
    run([*ARGV, f"--repository={path}"],
        env=shim_environment(op=OPS, at=n, kind=kind, path=path)).expect(0, 1)
    base.expect_sound(path)
    prune_again(base, path)


@claim
def failed():
    """Each of these calls fails, alone or with all that follow."""
    each(cases(Base(), {"eio": 1, "enospc-on": 3}),
         check_failed)


def check_stopped(case):
    _, base, kind, n = case
    path = base.copy()
    run([*ARGV, f"--repository={path}"],
        env=shim_environment(op=OPS, at=n, kind=kind, path=path)).expect(0, 1)
    if base.expect_sound(path).leftovers() != []:
        for name in os.listdir(os.path.join(path, "m", "archives")):
            if name.startswith("."):
                raise Failure(f"a temporary file was left: {name}")
    prune_again(base, path)


@claim
def stopped():
    """SIGTERM at each of these calls."""
    each(cases(Base(), {"term": 3}), check_stopped)


def check_reading(case):
    _, base, kind, n = case
    path = base.copy()
    # what is not read now was never
    result = run(["lbvm", "verify", "--threads=1", f"--repository={path}"],
                 env=shim_environment(op="read", at=n, kind=kind,
                                      path=".lbz")).expect(0, 1)
    base.expect_sound(path)
    record, good = os.path.join(path, "m", "verified.json"), 0
    if os.path.exists(record):
        with open(record, encoding="utf-8") as file:
            good = len(json.load(file)["archives"])
    archives = 2 * len(PLAN)
    if (result.status == 0) != (good == archives):
        raise Failure(f"{good} of {archives} were recorded\n{result}")
    if result.status == 1 and kind == "term":
        result.mentions(f"interrupted: {good} of {archives} archives")
    elif result.status == 1:
        result.mentions("Input/output error")
        result.mentions("is needed by: ")
        if good != archives - 1:
            raise Failure(f"{good} of {archives} were recorded")
    elif kind == "eio":
        raise Failure("an error was not told")
    run(["lbvm", "verify", "-q", f"--repository={path}"]).expect(0)


@claim
def verify():
    """A verification that is stopped, or can't read."""
    base = Base()
    path = base.copy()
    counter = os.path.join(path, "..", "count")
    run(["lbvm", "verify", f"--repository={path}"],
        env=shim_environment(op="read", count_file=counter,
                             path=".lbz")).expect(0)
    with open(counter, encoding="ascii") as file:
        base.total = int(file.read())
    each(cases(base, {"term": 3, "eio": 3}), check_reading)


if __name__ == "__main__":
    sys.exit(main())
