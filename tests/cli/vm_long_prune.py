# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Fifty days of backups, pruned each night to 7 daily and 4 weekly ones.

    vm_long_prune.py IMAGE CONTENT

of an image with livebackup, into the repository `repo`: 300 backups, and by night
1200, one each hour.  After each pruning what is there must be what the oracle of
retention keeps of all backups that there ever were.  CONTENT gets what the kept
ones must restore to at the end, as `vmrepo.py dump` prints it.
"""

import os
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)),
                                "..", "oracle"))
import retention
import vmrepo

DAYS = 50
A_DAY = 24 if os.environ.get("QLB_NIGHTLY") else 6
KEEP = dict(zip(retention.NAMES, [0] * len(retention.NAMES)),
            daily=7, weekly=4)


def prune():
    subprocess.run(["lbvm", "prune", "--repository=repo",
                    "--keep-daily=7", "--keep-weekly=4", "web1"],
                   check=True, stdout=subprocess.DEVNULL)


def expected(made):
    """Of all (time, id): the IDs that are kept, and for which rule."""
    rules = retention.retention(KEEP.values(), retention.Zone(0),
                                [time for time, _ in made])
    kept = {made[i][1]: rule for i, rule in enumerate(rules) if rule != "-"}
    # the newest is always kept; here it is that of its day
    assert made[-1][1] in kept
    return kept


def main(image, output):
    machine = vmrepo.Machine(vmrepo.Repository("repo"), "web1",
                             True)
    rows, made = [], []
    for row in vmrepo.dump(machine, image, DAYS * A_DAY, 86400 // A_DAY):
        rows.append(row)
        made.append((machine.backups[-1]["time"], row[0]))
        if len(rows) % A_DAY:
            continue
        prune()
        machine.load()
        if {m["id"] for m in machine.listed()} != set(expected(made)):
            raise SystemExit(f"after {len(rows)}: others are kept than the "
                             "oracle says")
        if machine.leftovers():
            raise SystemExit(f"leftovers: {machine.leftovers()}")
    kept = expected(made)
    if sorted(kept.values()) != ["daily"] * 7 + ["weekly"] * 4:
        raise SystemExit(f"not 7 daily and 4 weekly ones: {kept}")
    with open(output, "w", encoding="ascii") as file:
        for row in rows:
            if row[0] in kept:
                print(*row, file=file)


main(*sys.argv[1:])
