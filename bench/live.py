#!/usr/bin/python3
"""Measure what a backup costs a guest that writes.

live.py --patched DIR --stock DIR --dir DIR --disk IMAGE [--seconds N]
        [--small] [--markdown] [--only WAY]

The guest is fio's nbd engine: 4 KiB random writes over a range that holds data,
through qemu-storage-daemon with direct I/O.  It runs twice: 16 writes under way
with all it has ("busy"), and 1,000 writes a second ("paced").  Each way of
backup is measured against the same guest just before it.  The ways:

    ours          livebackup, full, lbdump --qmp (level 1, two threads)
    ours, 10 %    the same, incremental: a tenth of the disk has changed
    durable       as ours, and what was begun survives a power loss
    blockdev      stock QEMU, blockdev-backup sync=full to qcow2
    compressed    the same, zstd
    fleecing      stock QEMU, copy-before-write, lbdump reads over NBD
    snapshot      stock QEMU, external snapshot, lbdump reads the base, then
                  block-commit, for a minute at the most: where the guest
                  writes faster than that, it has no end

Each starts from a fresh copy of the disk.  Prints a table, and how long
livebackup-begin takes for four disks, each with a guest.

Copyright (C) 2026 The qcow2 livebackup authors
SPDX-License-Identifier: GPL-2.0-or-later
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

COMMIT_SECONDS = 60

GUESTS = {
    "busy": ["--iodepth=16"],
    "paced": ["--iodepth=16", "--rate_iops=1000", "--rate_process=poisson"],
}


def run(*command, **options):
    """A command that must succeed."""
    return subprocess.run([str(word) for word in command], check=True,
                          stdout=subprocess.DEVNULL, **options)


def forget(image):
    """Out of the page cache."""
    with open(image, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Daemon:
    """qemu-storage-daemon with some disks: disk, disk1...; top: what is put on
    the node that is exported, so that a filter can come between."""

    def __init__(self, programs, images, runtime, top=""):
        self.qmp_path = runtime / "qmp"
        self.nbd_path = runtime / "nbd"
        disks = []
        for number, image in enumerate(images):
            name = f"disk{number or ''}"
            disks += [
                "--blockdev", f"file,node-name={name}-file,filename={image},"
                              "cache.direct=on,aio=io_uring",
                "--blockdev", f"qcow2,node-name={name},file={name}-file,"
                              "cache.direct=on,discard=unmap",
                *(["--blockdev", f"raw,node-name={name}{top},file={name}"]
                  if top else []),
                "--export", f"nbd,id={name},node-name={name}{top},"
                            f"name={name},writable=on"]
        for path in (self.qmp_path, self.nbd_path):
            path.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [programs / "qemu-storage-daemon",
             "--nbd-server", f"addr.type=unix,addr.path={self.nbd_path}",
             *disks,
             "--chardev", f"socket,id=qmp,path={self.qmp_path},server=on,"
                          "wait=off",
             # A second one for the client of the backup
             "--chardev", f"socket,id=qmp2,path={self.qmp_path}2,server=on,"
                          "wait=off",
             "--monitor", "qmp", "--monitor", "qmp2"],
            stdin=subprocess.DEVNULL)
        for _ in range(1000):
            try:
                client = socket.socket(socket.AF_UNIX)
                client.connect(str(self.qmp_path))
                break
            except OSError:
                time.sleep(0.01)
        self.stream = client.makefile("rw")
        self.events = []
        self.stream.readline()
        self.qmp("qmp_capabilities")

    def qmp(self, command, **arguments):
        arguments = {key.replace("_", "-"): value
                     for key, value in arguments.items()}
        self.stream.write(json.dumps({"execute": command,
                                      "arguments": arguments}) + "\n")
        self.stream.flush()
        while True:
            answer = json.loads(self.stream.readline())
            if "error" in answer:
                sys.exit(f"live.py: {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
            self.events.append(answer)

    def wait_for(self, event, status=None):
        """Of a job, that goes well; status: which one it has then."""
        while True:
            answer = (self.events.pop(0) if self.events
                      else json.loads(self.stream.readline()))
            data = answer.get("data", {})
            if answer.get("event") == event and \
                    status in (None, data.get("status")):
                if "error" in data:
                    sys.exit(f"live.py: {data['error']}")
                return

    def create(self, path, size, **options):
        """An empty qcow2 image, as the node 'target'."""
        for job, create in (
                ("c0", {"driver": "file", "filename": str(path), "size": 0}),
                ("c1", {"driver": "qcow2", "file": "target-file",
                        "size": size, **options})):
            self.qmp("blockdev-create", job_id=job, options=create)
            self.wait_for("JOB_STATUS_CHANGE", "concluded")
            self.qmp("job-dismiss", id=job)
            if job == "c0":
                self.qmp("blockdev-add", driver="file", filename=str(path),
                         node_name="target-file")

    def size(self):
        """Of the disk, in bytes."""
        nodes = self.qmp("query-named-block-nodes", flat=True)
        return next(node["image"]["virtual-size"] for node in nodes
                    if node["node-name"] == "disk")

    def written(self):
        """Bytes that it has caused to be written."""
        text = pathlib.Path(f"/proc/{self.process.pid}/io").read_text()
        return int(text.split("write_bytes: ")[1].split()[0])

    def close(self):
        self.process.terminate()
        self.process.wait()


class Guest:
    """fio, from now until it is stopped."""

    def __init__(self, daemon, kind, runtime, size, disk="disk"):
        self.log = runtime / f"rate-{disk}"
        for path in runtime.glob(f"rate-{disk}_*"):
            path.unlink()
        self.process = subprocess.Popen(
            ["fio", "--name=guest", "--ioengine=nbd",
             f"--uri=nbd+unix:///{disk}?socket={daemon.nbd_path}",
             "--rw=randwrite", "--bs=4k", f"--size={size}", "--norandommap",
             "--time_based", "--runtime=3600", "--output-format=json",
             f"--write_iops_log={self.log}", "--log_avg_msec=1000",
             *GUESTS[kind]],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def stop(self):
        """Its figures."""
        self.process.send_signal(signal.SIGINT)
        text = self.process.communicate()[0]
        write = json.loads(text[text.index("{"):])["jobs"][0]["write"]
        rates = [int(line.split(",")[1])
                 for line in open(f"{self.log}_iops.1.log", encoding="ascii")]
        percentile = write["clat_ns"]["percentile"]
        return {"rate": write["iops"],
                "slowest": min(rates[1:-1], default="-"),
                "p50": percentile["50.000000"] / 1e6,
                "p99": percentile["99.000000"] / 1e6,
                "p99.9": percentile["99.900000"] / 1e6,
                "max": write["clat_ns"]["max"] / 1e6}


class Ours:
    """lbdump beside the patched QEMU."""

    stock = False
    top = ""

    def __init__(self, *options):
        self.options = options

    @staticmethod
    def prepare(bench, image):
        bench.img("amend", "-f", "qcow2", "-o", "livebackup=on", image)

    def dump(self, daemon, target, *options):
        run("lbdump", "-q", f"--qmp={daemon.qmp_path}2", "--disk=disk",
            "--threads=2", *options, "-o", f"{target}.lbz")

    def just_before(self, bench, daemon, target):
        """An incremental needs a parent, and a tenth that has changed since:
        what the guest wrote while it was measured is everywhere."""
        if "--incremental" in self.options:
            self.dump(daemon, f"{target}.parent")
            bench.change_tenth(daemon)

    def backup(self, daemon, target):
        self.dump(daemon, target, *self.options)


class Stock:
    """A way of the stock QEMU, which needs no more than the disk."""

    stock = True
    top = ""

    @staticmethod
    def prepare(bench, image):
        """Nothing."""

    @staticmethod
    def just_before(bench, daemon, target):
        """Nothing."""


class Blockdev(Stock):
    """QEMU's own job."""

    def __init__(self, compress):
        self.compress = compress

    def backup(self, daemon, target):
        options = {"compression-type": "zstd"} if self.compress else {}
        daemon.create(target, daemon.size(), **options)
        daemon.qmp("blockdev-add", driver="qcow2", file="target-file",
                   node_name="target")
        daemon.qmp("blockdev-backup", job_id="b", device="disk",
                   target="target", sync="full", compress=self.compress)
        daemon.wait_for("BLOCK_JOB_COMPLETED")
        os.sync()


class Fleecing(Stock):
    """What the guest overwrites goes to a scratch image; the same reader, over
    NBD."""

    top = "-top"

    @staticmethod
    def reopen(daemon, below):
        daemon.qmp("blockdev-reopen", options=[
            {"driver": "raw", "node-name": "disk-top", "file": below}])

    def backup(self, daemon, target):
        daemon.create(target, daemon.size())
        daemon.qmp("blockdev-add", driver="qcow2", file="target-file",
                   node_name="target")
        daemon.qmp("blockdev-add", driver="copy-before-write", file="disk",
                   target="target", node_name="cbw")
        self.reopen(daemon, "cbw")
        daemon.qmp("blockdev-add", driver="snapshot-access", file="cbw",
                   node_name="then")
        daemon.qmp("block-export-add", type="nbd", id="then",
                   node_name="then", name="then")
        run("lbdump", "-q", "--threads=2", "-o", f"{target}.lbz",
            f"nbd+unix:///then?socket={daemon.nbd_path}")
        daemon.qmp("block-export-del", id="then", mode="hard")
        daemon.wait_for("BLOCK_EXPORT_DELETED")
        daemon.qmp("blockdev-del", node_name="then")
        self.reopen(daemon, "disk")


class Snapshot(Stock):
    """The guest goes on in an overlay, which is committed in the end."""

    def backup(self, daemon, target):
        base = target.parent / "live.qcow2"
        daemon.create(target, daemon.size())
        daemon.qmp("blockdev-add", driver="qcow2", file="target-file",
                   node_name="target", backing=None)
        daemon.qmp("blockdev-snapshot", node="disk", overlay="target")
        run("lbdump", "-q", "--copy", "--threads=2", "-o", f"{target}.lbz",
            base)
        daemon.qmp("block-commit", job_id="commit", device="target")
        for _ in range(COMMIT_SECONDS * 10):
            if daemon.qmp("query-block-jobs")[0]["ready"]:
                daemon.qmp("block-job-complete", device="commit")
                daemon.wait_for("BLOCK_JOB_COMPLETED")
                return
            time.sleep(0.1)


WAYS = {
    "ours": Ours(),
    "ours, 10 %": Ours("--incremental"),
    "durable": Ours("--durable"),
    "blockdev": Blockdev(False),
    "compressed": Blockdev(True),
    "fleecing": Fleecing(),
    "snapshot": Snapshot(),
}


class Bench:
    def __init__(self, options, runtime):
        self.options = options
        self.runtime = runtime
        self.dir = options.dir
        self.size = (400 if options.small else 4096) << 20

    def img(self, *words):
        run(self.options.patched / "qemu-img", *words)

    def change_tenth(self, daemon):
        """Of the range that the guest writes to."""
        step = 4 << 20
        words = [word for offset in range(0, self.size // 10, step)
                 for word in ("-c", f"write -P 99 {offset} {step}")]
        run(self.options.patched / "qemu-io", "-f", "raw", *words,
            f"nbd+unix:///disk?socket={daemon.nbd_path}")

    def measure(self, name, kind):
        """One way, one guest: figures before and during."""
        way = WAYS[name]
        image = self.dir / "live.qcow2"
        target = self.dir / "backup.qcow2"
        for path in self.dir.glob("*.lbz"):
            path.unlink()
        for path in (image, target):
            path.unlink(missing_ok=True)
        shutil.copyfile(self.options.disk, image)
        way.prepare(self, image)
        forget(image)
        programs = self.options.stock if way.stock else self.options.patched
        daemon = Daemon(programs, [image], self.runtime, way.top)
        try:
            return self.before_and_during(way, kind, daemon, target)
        finally:
            daemon.close()

    def before_and_during(self, way, kind, daemon, target):
        with Guest(daemon, kind, self.runtime, self.size) as guest:
            time.sleep(self.options.seconds)
            before = guest.stop()
        way.just_before(self, daemon, target)
        written = daemon.written()
        with Guest(daemon, kind, self.runtime, self.size) as guest:
            if kind == "paced":
                time.sleep(0.5)     # the other would change too much
            start = time.monotonic()
            way.backup(daemon, target)
            seconds = time.monotonic() - start
            during = guest.stop()
        during["seconds"] = seconds
        during["written"] = (daemon.written() - written) >> 20
        return before, during


    def pause(self, rounds=20, disks=4):
        """How long livebackup-begin takes for some disks at once, in ms, each
        with a paced guest: the quickest, the median, the slowest; and how long a
        write takes meanwhile, at the most."""
        images = [self.dir / f"pause{number}.qcow2" for number in range(disks)]
        for image in images:
            self.img("create", "-q", "-f", "qcow2", "-o", "livebackup=on",
                     image, f"{self.size}")
        daemon = Daemon(self.options.patched, images, self.runtime)
        names = [f"disk{number or ''}" for number in range(disks)]
        times = []
        try:
            with contextlib.ExitStack() as stack:
                guests = [stack.enter_context(
                    Guest(daemon, "paced", self.runtime, 64 << 20, name))
                    for name in names]
                time.sleep(2)
                for _ in range(rounds):
                    start = time.monotonic()
                    daemon.qmp("livebackup-begin", job_id="b", disks=[
                        {"device": name} for name in names])
                    times.append((time.monotonic() - start) * 1000)
                    daemon.qmp("livebackup-end", job_id="b", success=True)
                    time.sleep(0.2)
                longest = max(guest.stop()["max"] for guest in guests)
        finally:
            daemon.close()
            for image in images:
                image.unlink()
        times.sort()
        return times[0], times[rounds // 2], times[-1], longest


HEAD = ["way", "guest", "writes/s before", "during", "ratio", "slowest second",
        "p50 ms", "p99 ms", "p99.9 ms", "longest ms", "time s",
        "MiB written by QEMU"]


def line_of(name, kind, before, during):
    return [name, kind, f"{before['rate']:.0f}", f"{during['rate']:.0f}",
            f"{during['rate'] / before['rate']:.2f}", f"{during['slowest']}",
            f"{during['p50']:.2f}", f"{during['p99']:.1f}",
            f"{during['p99.9']:.1f}", f"{during['max']:.0f}",
            f"{during['seconds']:.1f}", f"{during['written']}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patched", type=pathlib.Path, required=True)
    parser.add_argument("--stock", type=pathlib.Path, required=True)
    parser.add_argument("--dir", type=pathlib.Path, required=True)
    parser.add_argument("--disk", type=pathlib.Path, required=True,
                        help="a qcow2 image that holds data")
    parser.add_argument("--seconds", type=float, default=8,
                        help="of the guest before the backup")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", action="append", choices=list(WAYS))
    options = parser.parse_args()
    print("| " + " | ".join(HEAD) + " |")
    print("| " + " | ".join("---" for _ in HEAD) + " |")
    with tempfile.TemporaryDirectory(prefix="lb") as runtime:
        bench = Bench(options, pathlib.Path(runtime))
        for name in options.only or WAYS:
            for kind in GUESTS:
                line = line_of(name, kind, *bench.measure(name, kind))
                print("| " + " | ".join(line) + " |", flush=True)
        print()
        print("livebackup-begin for four disks, 20 times: {:.1f} ms at the "
              "least, median {:.1f} ms, {:.1f} ms at the most; the longest "
              "write of their guests {:.1f} ms".format(*bench.pause()))


if __name__ == "__main__":
    main()
