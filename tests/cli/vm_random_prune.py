# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Prunes random repositories with random policies, several times each.

What is kept must be what the oracle of retention says, restore to what it was,
and nothing may be left over. Held backups must be few: each has two children.
"""

import json
import os
import random
import shutil
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)),
                                "..", "oracle"))
import retention
import vmrepo

ROUNDS = 300 if os.environ.get("QLB_NIGHTLY") else 25


def random_plan(rng):
    """Mostly a chain; with branches, new full ones, and a clock that goes
    back."""
    n_disks = rng.randrange(1, 4)
    time, plan = rng.randrange(10 ** 9, 2 * 10 ** 9), []
    for number in range(rng.randrange(1, 25)):
        parents = []
        for _ in range(n_disks):
            parent = number - 1
            if rng.random() < 0.15:
                parent = rng.randrange(number) if number else None
            if rng.random() < 0.08 or number == 0:
                parent = None
            parents.append(parent)
        plan.append((time, parents))
        time += rng.choice([600, 3600, 40000, 90000])
        if rng.random() < 0.05:
            time -= 200000
    return plan


def prune(keep):
    arguments = [f"--keep-{name}={n}"
                 for name, n in zip(retention.NAMES, keep)]
    done = subprocess.run(["lbvm", "prune", "--json", "--repository=repo",
                           *arguments, "m"], stdout=subprocess.PIPE,
                          check=True)
    return json.loads(done.stdout)["machines"][0]


def expected(machine, keep):
    """IDs that must be listed afterwards."""
    listed = machine.listed()
    by_time = sorted(listed, key=lambda m: (m["time"], m["sequence"]))
    kept = retention.retention(keep, retention.Zone(0),
                               [m["time"] for m in by_time])
    return ({m["id"] for m, rule in zip(by_time, kept) if rule != "-"}
            | {listed[-1]["id"]})


def check(content, wanted, result):
    machine = vmrepo.Machine(vmrepo.Repository("repo"), "m")
    machine.check()
    if machine.leftovers():
        raise SystemExit(f"leftovers: {machine.leftovers()}")
    if {m["id"] for m in machine.listed()} != wanted:
        raise SystemExit("other backups are kept than the oracle says")
    if set(machine.contents("content.raw")) != {
            row for row in content if row[0] in wanted}:
        raise SystemExit("a backup restores differently")
    if len(machine.backups) > 2 * len(wanted) * len(
            machine.backups[0]["disks"]):
        raise SystemExit("too many are held")
    size = sum(d["bytes"] for m in machine.backups for d in m["disks"])
    if size != result["bytes_after"]:
        raise SystemExit("bytes_after is wrong")
    for manifest in machine.backups:
        if "kept_for" not in manifest:
            continue
        keys = {(d["image"], d["checkpoint"]) for d in manifest["disks"]}
        children = [d for m in machine.backups for d in m["disks"]
                    if (d["image"], d["parent"]) in keys]
        if len(children) < 2:
            raise SystemExit(f"{manifest['id']} is held for nothing")


def main():
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        shutil.rmtree("repo", ignore_errors=True)
        machine = vmrepo.Machine(vmrepo.Repository("repo"), "m", True)
        content = list(vmrepo.synth(machine, random_plan(rng), seed, 8))
        for _ in range(2):
            keep = [rng.choice([0, 0, 1, 2, 4]) for _ in retention.NAMES]
            if not any(keep):
                keep[0] = 3
            machine.load()
            wanted = expected(machine, keep)
            try:
                check(content, wanted, prune(keep))
            except SystemExit as reason:
                raise SystemExit(f"seed {seed}, {keep}: {reason}")


main()
