#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""A random history of a disk and its backups; every state must come back.

    random_history.py SEED [GENERATIONS]      in an empty folder

Each generation changes the disk with stock QEMU tools (writes, zeroes,
discards, snapshots, resizes) and makes an archive of a random kind; in between
checkpoints are confirmed late, pruned, recovered, archives are merged, and the disk is
rolled back to one of them. What
the guest read at each archive's time is kept as a digest. In the end every
archive is restored by lbrestore and by the independent implementation.

The same seed gives the same history. Prints nothing; the first surprise ends
it, with the last commands on standard error.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import uuid

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)),
                                "..", "oracle"))
import lbext  # noqa: E402
import lbz  # noqa: E402
import qcow2  # noqa: E402

DISK = "disk.qcow2"
KINDS = {"incremental": 8, "piped": 4, "since": 3, "auto": 3, "full": 1,
         "trust-pipe": 2, "copy": 2, "weekly": 3, "stdout": 2}


class Surprise(Exception):
    """Something else than was expected."""


class History:
    """The disk, its archives, and what is expected of them."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.log = []
        self.archives = {}     # path -> {"uuid", "parent", "content"}
        self.pending = []      # (uuid, root) of archives that were piped
        self.number = 0
        self.snapshots = 0

    # -- commands

    def run(self, *command, status=0, stdout=None):
        """Run it; it must end with that status. Returns its output."""
        self.log.append(" ".join(command))
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, check=False, text=True,
            stdout=stdout or subprocess.PIPE, stderr=subprocess.PIPE)
        if result.returncode != status:
            raise Surprise(f"status {result.returncode}, not {status}: "
                           f"{result.stderr}")
        if command[0] == "qemu-io" and (
                "rror" in result.stdout or "failed" in result.stdout):
            raise Surprise(result.stdout)
        return result.stdout

    def status(self):
        """What lbctl says, which the oracle must confirm."""
        ours = json.loads(self.run("lbctl", "status", "--json", DISK))
        theirs = lbext.Trust(
            qcow2.Header(DISK), str(uuid.UUID(lbext.this_boot())),
            os.stat(DISK).st_dev).evaluate()

        def key(verdict):
            return [verdict["keyword"] or "trusted"] + [
                (c["uuid"], c["label"], c["confirmed"],
                 c["keyword"] or "trusted") for c in verdict["checkpoints"]]
        if key(ours) != key(theirs):
            raise Surprise(f"lbctl: {key(ours)}, oracle: {key(theirs)}")
        for checkpoint in ours["checkpoints"]:
            if checkpoint["trusted"]:
                changed = sum(length for _, length in lbext.changed_since(
                    qcow2.Header(DISK), checkpoint["uuid"]))
                if changed != checkpoint["changed_bytes"]:
                    raise Surprise(f"changed since {checkpoint}: {changed}")
        return ours

    def judge(self, wrote=False):
        """The image is sound, and follows our rules if we wrote last."""
        report = json.loads(self.run("qemu-img", "check", "-f", "qcow2",
                                     "--output=json", DISK))
        if any(report.get(key) for key in
               ("check-errors", "corruptions", "leaks")):
            raise Surprise(f"qemu-img check: {report}")
        image = qcow2.Header(DISK)
        ours = image.autoclear_features & lbext.AUTOCLEAR_LIVEBACKUP
        broken = list(lbext.broken_musts(image)) if ours or wrote else []
        if broken:
            raise Surprise(f"rules broken: {broken}")

    def content(self, path=DISK, form="qcow2"):
        """Digest and size of what the guest reads."""
        if form != "raw":
            self.run("qemu-img", "convert", "-f", form, "-O", "raw", path,
                     "content.raw")
            path = "content.raw"
        with open(path, "rb") as file:
            return (hashlib.file_digest(file, "sha256").hexdigest()
                    if hasattr(hashlib, "file_digest")
                    else hashlib.sha256(file.read()).hexdigest(),
                    os.path.getsize(path))

    # -- changes of the disk

    def create(self):
        """A disk of any shape."""
        size = self.random.randrange(2 << 20, 24 << 20, 512)
        cluster = self.random.choice(["4k", "64k", "64k", "512k", "2M"])
        options = f"cluster_size={cluster}"
        if cluster != "4k" and self.random.random() < 0.3:
            options += ",extended_l2=on"
        if self.random.random() < 0.2:
            options += ",lazy_refcounts=on"
        self.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options,
                 DISK, str(size))
        self.run("qemu-img", "bitmap", "--add", DISK, "theirs")
        self.run("lbctl", "enable", "--granularity=" + self.random.choice(
            ["4K", "64K", "64K", "256K", "2M"]), DISK)
        self.judge(wrote=True)

    def size(self):
        """Virtual size."""
        return qcow2.Header(DISK).size

    def write(self):
        """Some writes, zeroes and discards."""
        size = self.size()
        commands = []
        for _ in range(self.random.randint(1, 6)):
            length = min(self.random.choice([512, 4096, 65536, 300032,
                                             1 << 20]), size)
            offset = self.random.randrange(0, size - length + 1, 512)
            if self.random.random() < 0.4:
                offset -= offset % 65536
            kind = self.random.choice(
                ["write -P {p}"] * 4 + ["write -z", "write -z -u", "discard",
                                        "write -P 0"])
            commands += ["-c", kind.format(p=self.random.randint(1, 255))
                         + f" {offset} {length}"]
        self.run("qemu-io", "-d", "unmap", "-f", "qcow2", *commands, DISK)

    def snapshot(self):
        """An internal snapshot comes, or goes."""
        if self.snapshots and self.random.random() < 0.5:
            self.run("qemu-img", "snapshot", "-d", f"s{self.snapshots}", DISK)
            self.snapshots -= 1
        else:
            self.snapshots += 1
            self.run("qemu-img", "snapshot", "-c", f"s{self.snapshots}", DISK)

    def mark(self, first, end):
        """Set the granules of [first, end) in all of our bitmaps."""
        live = lbext.read_livebackup(qcow2.Header(DISK))
        bits = live.fixed["granularity_bits"]
        if ((end - first) >> bits) * len(live.records) > 500:
            return               # the oracle sets bits one by one
        poker = lbext.Poker(DISK)
        for record in live.records:
            poker.poke(f"bits[{record['uuid']}]", ",".join(
                f"+{n}" for n in range(first >> bits, (end - 1 >> bits) + 1)))
        poker.fix_crc()

    def resize(self):
        """Grown by stock, or resized by who keeps the canaries."""
        if self.snapshots:       # a shrink is refused then
            return
        old = self.size()
        new = self.random.randrange(1 << 20, 24 << 20, 512)
        if self.random.random() < 0.3:
            new += -new % (1 << 20)
        trusted = self.status()["trusted"]
        self.run("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", DISK,
                 str(new))
        if new == old or (new > old and self.random.random() < 0.7):
            return
        if trusted and self.random.random() < 0.85:
            self.mark(min(new - 1, old), new)

    def change(self):
        """A few of these."""
        for action in self.random.choices(
                [self.write, self.snapshot, self.resize], [10, 1, 2],
                k=self.random.randint(1, 3)):
            action()
        if self.random.random() < 0.9:
            self.write()
        self.judge()

    # -- archives

    def new_path(self):
        """Names that sort in no useful way."""
        self.number += 1
        return f"{self.random.randrange(1000):03d}-{self.number}.lbz"

    def add(self, path, content):
        """Keep what a dump made."""
        archive = lbz.Archive(path, deep=self.random.random() < 0.3)
        parent = archive.header["parent_uuid"]
        self.archives[path] = {
            "uuid": archive.header["backup_uuid"], "content": content,
            "parent": None if parent == lbz.ZERO_UUID else parent}
        if archive.header["virtual_size"] != content[1]:
            raise Surprise(f"{path}: another virtual size")
        return archive

    def options_of(self, kind, status):
        """Options of a dump, its label, and whether it must succeed."""
        label = "weekly" if kind == "weekly" else "main"
        confirmed = [c for c in status["checkpoints"]
                     if c["confirmed"] and c["label"] == label]
        possible = bool(confirmed) and confirmed[-1]["trusted"]
        if kind == "weekly":
            return ["--chain=weekly", "--auto"], True
        if kind == "since" and status["checkpoints"]:
            chosen = self.random.choice(status["checkpoints"])
            return ["--since=" + chosen["uuid"]], chosen["trusted"]
        if kind == "auto":
            return ["--auto"], True
        if kind == "full":
            return [], True
        options = ["--incremental"]
        if kind == "copy":
            options.append("--copy")
        if kind == "trust-pipe":
            options.append("--trust-pipe")
        return options, possible

    def dump(self):
        """An archive of a random kind; where it can't be, --auto."""
        status = self.status()
        kind = self.random.choices(list(KINDS), KINDS.values())[0]
        options, possible = self.options_of(kind, status)
        content = self.content()
        path = self.new_path()
        command = ["lbdump", "-q", *options]
        if self.random.random() < 0.3:
            command.append("--threads=" + self.random.choice("123"))
        if not possible:
            before = self.content(DISK, "raw")
            self.run(*command, "-o", path, DISK, status=3)
            if self.content(DISK, "raw") != before or os.path.exists(path):
                raise Surprise("a refused dump left something")
            kind, command = "auto", ["lbdump", "-q", "--auto"]
        if kind in ("piped", "trust-pipe"):
            self.log.append(" ".join(command) + f" {DISK} | cat >{path}")
            subprocess.run(["bash", "-c", 'set -o pipefail; out=$1; shift; '
                            '"$@" | cat >"$out"', "-", path, *command, DISK],
                           check=True)
        elif kind == "stdout":
            with open(path, "wb") as file:
                self.run(*command, DISK, stdout=file)
        else:
            self.run(*command, "-o", path, DISK)
        archive = self.add(path, content)
        if kind == "piped":
            self.pending.append((archive.header["backup_uuid"],
                                 archive.root.hex()))
        self.expect_checkpoint(kind, archive)
        self.judge(wrote=kind != "copy")

    def expect_checkpoint(self, kind, archive):
        """The newest one is that of the archive, but for copies."""
        newest = self.status()["checkpoints"][-1:]
        if kind == "copy":
            return
        if (not newest or newest[0]["uuid"] != archive.header["backup_uuid"]
                or newest[0]["confirmed"] != (kind != "piped")
                or not newest[0]["trusted"]):
            raise Surprise(f"checkpoint after {kind}: {newest}")

    # -- what an operator does now and then

    def confirm(self):
        """An archive that was piped turns out to be safe."""
        if not self.pending:
            return
        chosen = self.pending.pop(self.random.randrange(len(self.pending)))
        status = self.status()
        if chosen[0] in [c["uuid"] for c in status["checkpoints"]] and \
                status["trusted"]:
            self.run("lbctl", "confirm", DISK, *chosen)
            self.judge(wrote=True)

    def prune(self):
        """Old checkpoints go."""
        if self.status()["trusted"] and all(
                c["trusted"] for c in self.status()["checkpoints"]):
            self.run("lbctl", "prune", "--keep=%d" %
                     self.random.randint(1, 3), DISK)
            self.judge()

    def recover(self):
        """Nothing that is trusted is dropped."""
        trusted = [c["uuid"] for c in self.status()["checkpoints"]
                   if c["trusted"]]
        self.run("lbctl", "recover", DISK)
        self.judge()
        if [c["uuid"] for c in self.status()["checkpoints"]] != trusted:
            raise Surprise("recover dropped what was trusted")

    def chain_of(self, path):
        """Paths from a full archive to this one; None where one is lost."""
        by_uuid = {a["uuid"]: p for p, a in self.archives.items()
                   if "merged" not in a}
        chain = [path]
        while self.archives[chain[0]]["parent"]:
            parent = by_uuid.get(self.archives[chain[0]]["parent"])
            if parent is None:
                return None
            chain.insert(0, parent)
        return chain

    def merge(self):
        """A part of a chain becomes one archive, kept beside it."""
        originals = [p for p, a in self.archives.items() if "merged" not in a]
        chain = self.chain_of(self.random.choice(originals))
        if chain is None or len(chain) < 2:
            return
        first = self.random.randrange(len(chain) - 1)
        members = chain[first:]
        content = self.archives[chain[-1]]["content"]
        self.random.shuffle(members)
        path = self.new_path()
        options = self.random.choice([[], [], ["--compact"]])
        self.run("lbmerge", *options, "-o", path, *members)
        self.add(path, content)
        self.archives[path]["merged"] = True

    def roll_back(self):
        """The disk becomes what it was at some archive's time."""
        path = self.random.choice(
            [p for p, a in self.archives.items() if "merged" not in a])
        chain = self.chain_of(path)
        if chain is None:
            return
        want = self.archives[path]
        others = self.random.sample(
            [p for p, a in self.archives.items() if "merged" not in a
             and p not in chain and self.chain_of(p)],
            self.random.choice([0, 0, 1]) if len(self.archives) >
            len(chain) + 5 else 0)
        for other in others:
            chain += [p for p in self.chain_of(other) if p not in chain]
        self.random.shuffle(chain)
        options = self.random.choice([[], [], [], ["--rescan"]])
        self.run("lbrestore", "-q", "--at", want["uuid"], *options,
                 "--in-place", DISK, *chain)
        if self.content() != want["content"]:
            raise Surprise(f"rolled back to {path}: {self.content()}, not "
                           f"{want['content']}")
        self.judge(wrote=True)
        # It is confirmed now, whether it was piped or not.
        self.pending = [p for p in self.pending if p[0] != want["uuid"]]
        newest = self.status()["checkpoints"][-1]
        if newest["uuid"] != want["uuid"] or not newest["trusted"] or \
                not newest["confirmed"]:
            raise Surprise(f"rolled back to {path}: {newest}")

    # -- the end

    def restore(self, path):
        """By both implementations."""
        chain = self.chain_of(path)
        if chain is None:
            return
        want = self.archives[path]["content"]
        self.random.shuffle(chain)
        for name in ("r.raw", "o.raw", "r.qcow2"):
            if os.path.exists(name):
                os.unlink(name)
        self.run("lbrestore", "-o", "r.raw", *chain)
        archives = [lbz.Archive(p, deep=False) for p in chain]
        with open("o.raw", "wb") as out:
            lbz.restore_chain(lbz.select_chain(archives, None), out)
        if self.random.random() < 0.3:
            self.run("lbrestore", "-o", "r.qcow2", *chain)
            self.run("qemu-img", "check", "-q", "-f", "qcow2", "r.qcow2")
            self.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw",
                     "r.qcow2", "r.raw")
        for name in ("r.raw", "o.raw"):
            got = self.content(name, "raw")
            if got != want:
                raise Surprise(f"{path}: {name} is {got}, not {want}, from "
                               f"{chain}")

    def live(self, generations):
        """The whole history."""
        self.create()
        for _ in range(generations):
            self.change()
            self.dump()
            for action in self.random.choices(
                    [self.confirm, self.prune, self.recover, self.merge,
                     self.roll_back],
                    [4, 1, 1, 3, 3], k=self.random.choice([0, 1, 1, 2])):
                action()
        newest = list(self.archives)[-1]
        self.run("lbverify", newest)
        self.run("zstd", "-q", "-t", *self.archives)
        for path in self.archives:
            self.restore(path)
        bitmaps = json.loads(self.run(
            "qemu-img", "info", "--output=json", DISK))
        if "theirs" not in [
                b["name"] for b in
                bitmaps["format-specific"]["data"]["bitmaps"]]:
            raise Surprise("another one's bitmap is gone")


def main(argv):
    """One history."""
    seed = int(argv[1])
    history = History(seed)
    try:
        history.live(int(argv[2]) if len(argv) > 2 else 30)
    except (Surprise, lbz.Damaged, lbz.NoChain) as surprise:
        print(f"random_history.py: seed {seed}: {surprise}",
              *history.log[-12:], sep="\n  ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
