#!/usr/bin/python3
"""Compare lbvm with what it is made of: vm.py --dir DIR [-n RUNS] [--small]

Two tables, contenders in turn, medians:

    backup   a machine of four disks, in full: 'lbvm backup' against four lbdump
             at once, each with a file for its archive (required: 1.10)
    prune    a full backup and 24 incrementals become one: 'lbvm prune' against
             cp of the archive that remains, and a sync of it (required: 1.50)

The disks hold files of /usr. The programs are those in $PATH. Before each run
memory is taken and given back, so that no contender pays for pages that the
host of a virtual machine has taken away meanwhile.

Copyright (C) 2026 The qcow2 livebackup authors
SPDX-License-Identifier: GPL-2.0-or-later
"""

import argparse
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

DISKS = 4
INCREMENTALS = 24
MIB = 1 << 20


def run(*command, **kwargs):
    done = subprocess.run([str(word) for word in command], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          check=False, **kwargs)
    if done.returncode != 0:
        sys.exit(f"vm.py: {' '.join(map(str, command))}: status "
                 f"{done.returncode}: {done.stderr}")
    return done.stdout


def fill(path, size, skip):
    """A raw file of that size with files of /usr, after so many bytes."""
    tar = subprocess.Popen(["tar", "-C", "/usr", "-cf", "-", "lib", "share"],
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with open(path, "wb") as file:
        while skip > 0:
            skip -= len(tar.stdout.read(min(skip, MIB)))
        while size > 0:
            data = tar.stdout.read(min(size, MIB))
            if not data:
                break
            file.write(data)
            size -= len(data)
        file.truncate(file.tell() + size)
    tar.kill()
    tar.wait()


def make_disks(folder, size):
    disks = []
    for i in range(DISKS):
        disk = folder / f"vd{'abcd'[i]}.qcow2"
        disks.append(disk)
        if not disk.exists():
            raw = folder / "raw"
            fill(raw, size, i * size)
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk)
            run("lbctl", "enable", disk)
            raw.unlink()
    return disks


def quiet_machine():
    """What was written before is on its way; pages of memory are at hand."""
    os.sync()
    held = bytearray(2 << 30)
    for offset in range(0, len(held), 4096):
        held[offset] = 1
    del held


def timed(function, *arguments):
    quiet_machine()
    start = time.monotonic()
    function(*arguments)
    return time.monotonic() - start


# ---- a machine of four disks ----

def backup(folder, disks):
    run("lbvm", "backup", "-q", "--full", f"--repository={folder / 'repo'}",
        "web1", *disks)


def dumps(folder, disks):
    """At once, sharing the processors as lbvm has them shared."""
    jobs = [subprocess.Popen(["lbdump", "-q", "--copy", "-o",
                              folder / f"{disk.stem}.lbz", disk])
            for disk in disks]
    if any([job.wait() for job in jobs]):
        sys.exit("vm.py: lbdump failed")


def compare_backup(folder, disks, runs):
    times = {"lbvm": [], "lbdump": []}
    for n in range(runs + 1):
        for name, function in ("lbvm", backup), ("lbdump", dumps):
            shutil.rmtree(folder / "out", ignore_errors=True)
            (folder / "out").mkdir()
            seconds = timed(function, folder / "out", disks)
            if n > 0:
                times[name].append(seconds)
    report("a machine of four disks, in full", times, "lbvm backup",
           "four lbdump at once", 1.10)


# ---- pruning ----

def make_repository(folder, disk):
    repository = folder / "prune"
    if repository.exists():
        return repository
    copy = folder / "changing.qcow2"
    shutil.copy(disk, copy)
    for i in range(INCREMENTALS + 1):
        run("lbvm", "backup", "-q", f"--repository={repository}", "web1", copy)
        commands = []
        for k in range(4):
            commands += ["-c", f"write -s {disk} {(i * 37 + k * 59) % 250}M 4M"]
        run("qemu-io", *commands, copy)
    copy.unlink()
    return repository


def prune(repository):
    run("lbvm", "prune", "-q", "--keep-last=1", f"--repository={repository}")


def copy_synced(archive, out):
    run("cp", archive, out)
    run("sync", out)


def compare_prune(folder, disk, runs):
    times = {"lbvm": [], "cp": []}
    repository = make_repository(folder, disk)
    for n in range(runs + 1):
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir()
        run("cp", "-a", repository, folder / "out" / "repo")
        pruned = timed(prune, folder / "out" / "repo")
        archive, = (folder / "out" / "repo" / "web1" / "archives").iterdir()
        copied = timed(copy_synced, archive, folder / "out" / "copy")
        if n > 0:
            times["lbvm"].append(pruned)
            times["cp"].append(copied)
    report("24 incrementals pruned", times, "lbvm prune",
           "cp of the result, and sync", 1.50)


def report(title, times, ours, peer, limit):
    mine, theirs = [statistics.median(values) for values in times.values()]
    ratio = mine / theirs
    verdict = "met" if ratio <= limit else "MISSED"
    print(f"| {title} | {ours} | {mine:.2f} |  |  |  |")
    print(f"|  | {peer} | {theirs:.2f} | {ratio:.2f} | {limit:.2f} | "
          f"{verdict} |", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=pathlib.Path, required=True)
    parser.add_argument("-n", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    disks = make_disks(options.dir, (64 if options.small else 512) * MIB)
    print("| what | by | median s | ours/this | required |  |\n"
          "| --- | --- | ---: | ---: | ---: | --- |", flush=True)
    compare_backup(options.dir, disks, options.n)
    compare_prune(options.dir, disks[0], options.n)


if __name__ == "__main__":
    main()
