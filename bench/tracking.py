#!/usr/bin/python3
"""Measure what dirty tracking costs a guest that writes.

tracking.py --stock DIR --patched DIR --load NBDLOAD --dir DIR [-n RUNS]
            [--small]

Writes of 4 KiB at random places and of 64 KiB in sequence go through
qemu-storage-daemon (direct I/O, 16 at a time, over NBD) to images whose
clusters are all allocated. The cases:

    stock         the stock QEMU, livebackup off
    again         the same once more, in a process of its own: how far two equal
                  cases are apart is how far the others can be told apart
    off           the patched QEMU, livebackup off
    bitmap        the patched QEMU, a stock persistent bitmap, all bits set
    on            the patched QEMU, livebackup on, all bits set
    clean-bitmap  as 'bitmap', each write the first to its granule
    clean-on      as 'on', each write the first to its granule

A disk shared with others is now fast, now slow, by more than what is to be told
apart. So the cases take turns in slices of some 20 ms (see nbdload.c), in an
order that is mixed anew for each turn; what is compared is a slice with the one
beside it that did the same writes. The daemons are started anew for each run.
The images of 'bitmap' and 'on' change places with each run; the first three
cases share one image.

Prints, for each run of each case, a line for report.py: row, case, the 99th
percentile of the latency in us, CPU time of the daemon in us for a write, and
the writes per second of each slice.

Copyright (C) 2026 The qcow2 livebackup authors
SPDX-License-Identifier: GPL-2.0-or-later
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

GRANULE = 65536
PATTERNS = {"random": 4096, "sequential": GRANULE}
SLICE = {"random": 512, "sequential": 256}     # writes
STEADY = ["stock", "again", "off", "bitmap", "on"]
CLEAN = ["clean-bitmap", "clean-on"]
DAEMON_WAIT = 30    # seconds


def run(*command, input=""):
    """Run a command; what it said is shown if it fails."""
    done = subprocess.run([str(word) for word in command], text=True,
                          input=input, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, check=False)
    if done.returncode != 0:
        sys.exit(f"tracking.py: {' '.join(map(str, command))}: status "
                 f"{done.returncode}\n{done.stdout[-2000:]}"
                 f"{done.stderr[-2000:]}")
    return done.stdout


def choose_aio(programs, image):
    """The best of the kernel's interfaces that both builds can use."""
    for aio in ("io_uring", "native"):
        node = f"driver=file,filename={image},cache.direct=on,aio={aio}"
        if all(subprocess.run([program / "qemu-img", "info", "--image-opts",
                               node], capture_output=True, check=False)
               .returncode == 0 for program in programs):
            return aio
    return "threads"


def forget(image):
    """Out of the page cache, where direct writes would have to find it."""
    with open(image, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Daemon:
    """A qemu-storage-daemon that exports one image over NBD."""

    def __init__(self, bench, name, programs, image, locking="on"):
        self.socket = bench.runtime / f"{name}.sock"
        self.log = bench.runtime / f"{name}.log"
        pidfile = bench.runtime / f"{name}.pid"
        pidfile.unlink(missing_ok=True)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [programs / "qemu-storage-daemon",
                 "--blockdev", f"driver=file,node-name=file,filename={image},"
                               f"cache.direct=on,aio={bench.aio},"
                               f"locking={locking}",
                 "--blockdev", "driver=qcow2,node-name=disk,file=file,"
                               "cache.direct=on",
                 "--nbd-server", f"addr.type=unix,addr.path={self.socket}",
                 "--export", "type=nbd,id=disk,node-name=disk,name=disk,"
                             "writable=on",
                 "--pidfile", pidfile],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        bench.daemons.append(self)
        end = time.monotonic() + DAEMON_WAIT
        while not pidfile.exists():     # made when all else is in place
            if self.process.poll() is not None or time.monotonic() > end:
                self.fail("does not start")
            time.sleep(0.01)

    def fail(self, what):
        text = self.log.read_text(errors="replace")[-2000:]
        sys.exit(f"tracking.py: qemu-storage-daemon {what}\n{text}")

    def cpu_seconds(self):
        """Of all its threads, past ones too."""
        stat = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()

    def close(self):
        """End as a guest's host does: bitmaps are stored."""
        self.stop()
        if self.process.returncode != 0:
            self.fail(f"ended with status {self.process.returncode}")


class Bench:
    def __init__(self, options):
        self.stock = options.stock
        self.patched = options.patched
        self.dir = options.dir
        self.runs = options.runs
        self.turns = 20 if options.small else 200
        self.size = (512 << 20) if options.small else (4 << 30)
        self.plain = self.dir / "plain.qcow2"
        self.pair = [self.dir / "pair0.qcow2", self.dir / "pair1.qcow2"]
        self.runtime = pathlib.Path(tempfile.mkdtemp(prefix="qlb-bench-"))
        self.load = options.load
        self.random = random.Random(1)
        self.daemons = []
        self.aio = None

    # ---------------------------------------------------------------- images

    def make_image(self, image):
        """Every cluster allocated and written, one after the other."""
        run(self.stock / "qemu-img", "create", "-q", "-f", "qcow2",
            "-o", "preallocation=falloc", image, self.size)
        step = 256 << 20
        commands = []
        for offset in range(0, self.size, step):
            commands += ["-c", f"write -q -P 85 {offset} {step}"]
        run(self.stock / "qemu-io", "-t", "none", "-f", "qcow2", *commands,
            image)

    def make_images(self):
        for image in (self.plain, *self.pair):
            self.make_image(image)
        self.aio = choose_aio([self.stock, self.patched], self.plain)
        run("sync", self.plain)

    def clean_pair(self, bitmap, on):
        """One with a stock bitmap, one with a checkpoint; no granule dirty."""
        for image in (bitmap, on):
            info = json.loads(run(self.patched / "qemu-img", "info",
                                  "--output=json", image))
            bitmaps = info["format-specific"]["data"].get("bitmaps", [])
            names = [entry["name"] for entry in bitmaps]
            if "stock" in names:
                run(self.patched / "qemu-img", "bitmap", "--remove", image,
                    "stock")
            elif names:
                run("lbctl", "disable", image)
        run(self.patched / "qemu-img", "bitmap", "--add", "-g", GRANULE,
            bitmap, "stock")
        run("lbctl", "enable", on)
        run("sh", "-c", 'exec lbdump -q --trust-pipe "$1" >/dev/null', "sh",
            on)
        if self.changed_bytes(on) > 2 * GRANULE:    # the canaries
            sys.exit("tracking.py: a new checkpoint has dirty granules")

    # ------------------------------------------------------------- measuring

    def measure(self, pattern, names, daemons, turns):
        """Each turn, a list of offsets, goes to all; print each one's line."""
        turns = list(turns)
        plan = []
        whose = []
        for offsets in turns:
            order = names[:]
            self.random.shuffle(order)
            text = " ".join(map(str, offsets))
            for name in order:
                plan.append(f"{names.index(name)} {PATTERNS[pattern]} "
                            f"{len(offsets)} {text}\n")
                whose.append(name)
        before = [daemons[name].cpu_seconds() for name in names]
        lines = run(self.load, "disk", *[daemons[name].socket
                                         for name in names],
                    input="".join(plan)).splitlines()
        writes = sum(map(len, turns))
        for i, name in enumerate(names):
            cpu = (daemons[name].cpu_seconds() - before[i]) / writes
            p99 = int(lines[len(plan) + i].split()[1])
            rates = [len(turns[j // len(names)]) * 1e9 / int(lines[j])
                     for j in range(len(plan)) if whose[j] == name]
            print(f"tracking-{pattern}", name, f"{p99 / 1000:.0f}",
                  f"{cpu * 1e6:.2f}", *(f"{rate:.0f}" for rate in rates),
                  sep="\t", flush=True)

    def steady_turns(self, pattern):
        """Offsets at random, or on and on through the disk."""
        bytes_, count = PATTERNS[pattern], SLICE[pattern]
        blocks = self.size // bytes_
        for turn in range(self.turns):
            if pattern == "random":
                yield [self.random.randrange(blocks) * bytes_
                       for _ in range(count)]
            else:
                yield [(turn * count + i) % blocks * bytes_
                       for i in range(count)]

    def clean_turns(self, pattern):
        """Each granule once."""
        offsets = list(range(0, self.size, GRANULE))
        if pattern == "random":
            self.random.shuffle(offsets)
        for first in range(0, len(offsets), SLICE[pattern]):
            yield offsets[first:first + SLICE[pattern]]

    # ------------------------------------------------------------------ runs

    def start_pair(self, bitmap, on):
        self.clean_pair(bitmap, on)
        for image in (self.plain, bitmap, on):
            forget(image)
        return {"clean-bitmap": Daemon(self, "bitmap", self.patched, bitmap),
                "clean-on": Daemon(self, "on", self.patched, on)}

    def changed_bytes(self, image):
        return json.loads(run("lbctl", "status", "--json", image))[
            "checkpoints"][-1]["changed_bytes"]

    def close_all(self, on):
        """End the daemons; make sure that what was measured did track."""
        while self.daemons:
            self.daemons.pop().close()
        changed = self.changed_bytes(on)
        if changed != self.size:
            sys.exit(f"tracking.py: {self.size} bytes were written, but "
                     f"{changed} are dirty")

    def one_run(self, number):
        bitmap, on = self.pair if number % 2 == 0 else self.pair[::-1]
        daemons = self.start_pair(bitmap, on)
        self.measure("random", CLEAN, daemons, self.clean_turns("random"))
        # All granules are dirty now.
        daemons["bitmap"] = daemons["clean-bitmap"]
        daemons["on"] = daemons["clean-on"]
        # Nothing allocates, so these change no metadata, and may be three.
        for name in ("stock", "again", "off"):
            programs = self.patched if name == "off" else self.stock
            daemons[name] = Daemon(self, name, programs, self.plain,
                                   locking="off")
        for pattern in PATTERNS:
            self.measure(pattern, STEADY, daemons, self.steady_turns(pattern))
        self.close_all(on)
        daemons = self.start_pair(bitmap, on)
        self.measure("sequential", CLEAN, daemons,
                     self.clean_turns("sequential"))
        self.close_all(on)

    def run(self):
        try:
            self.make_images()
            print("about", "tracking",
                  f"{self.size >> 20} MiB disks, direct I/O ({self.aio}), 16 "
                  f"writes under way; {self.runs} runs, each of {self.turns} "
                  "slices in turn", sep="\t", flush=True)
            for number in range(self.runs):
                self.one_run(number)
                print(f"\r   tracking: {number + 1} of {self.runs}", end="",
                      file=sys.stderr, flush=True)
            print(file=sys.stderr)
        finally:
            for daemon in self.daemons:
                daemon.stop()
            shutil.rmtree(self.runtime)
            for image in (self.plain, *self.pair):
                image.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(
        description="Measure what dirty tracking costs a guest that writes.")
    parser.add_argument("--stock", type=pathlib.Path, required=True,
                        help="programs of the stock QEMU")
    parser.add_argument("--patched", type=pathlib.Path, required=True,
                        help="programs of the patched QEMU")
    parser.add_argument("--load", type=pathlib.Path, required=True,
                        help="the program nbdload")
    parser.add_argument("--dir", type=pathlib.Path, required=True,
                        help="make images there")
    parser.add_argument("-n", dest="runs", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    Bench(options).run()


main()
