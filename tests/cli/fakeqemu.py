#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Plays the part of a QEMU with livebackup, and of its guest.

Made from docs/live-backup.md alone: a QMP monitor on a Unix socket for one
client, which changes the images in place.  The guest writes wherever it likes
between livebackup-begin and livebackup-end, after saving what is still to be
saved; what was released it overwrites without.  The content of each disk at
the point in time is left in IMAGE.at-T, the commands in qmp.log.

The images must be closed, and have livebackup on.  Their refcounts are wrong
afterwards.

    fakeqemu.py SOCKET NAME=IMAGE... [option]...
"""

import argparse
import json
import os
import random
import socket
import sys
import threading
import time
import uuid

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)),
                                "..", "oracle"))
import lbext  # pylint: disable=wrong-import-position
import qcow2  # pylint: disable=wrong-import-position

COPIED = 1 << 63
JUNK = 0x3F00000000000200   # reserved bits of an L2 entry
ZERO_UUID = str(uuid.UUID(int=0))


class Refused(Exception):
    """An error reply."""


def poke(path, **fields):
    """Change fields of the extension."""
    poker = lbext.Poker(path)
    for name, value in fields.items():
        poker.poke(name, str(value))
    poker.fix_crc()


def check_since(mode, since):
    """Of all disks, and of each."""
    if since is not None and mode not in ("since", "auto"):
        raise Refused("'since' goes with modes 'since' and 'auto' only")


class Orig:
    """The file of originals, byte by byte as the specification has it."""

    def __init__(self, path, disk, set_uuid, checkpoint, now):
        self.cluster = min(disk.unit, 2 << 20)
        l1_entries = max(1, -(-disk.size // (self.cluster
                                             * (self.cluster // 8))))
        l1_size = qcow2.round_up(l1_entries * 8, self.cluster)
        self.l2 = 2 * self.cluster + l1_size
        self.end = self.l2 + l1_entries * self.cluster
        header = bytearray(b"QFI\xfb")
        for value, size in (
                (3, 4), (0, 8), (0, 4), (self.cluster.bit_length() - 1, 4),
                (disk.size, 8), (0, 4), (l1_entries, 4),
                (2 * self.cluster, 8), (self.cluster, 8), (1, 4), (0, 4),
                (0, 8), (1, 8), (0, 8), (0, 8), (4, 4), (104, 4)):
            header += value.to_bytes(size, "big")
        extension = bytearray()
        for value, size in ((1, 4), (0, 4), (disk.unit, 8)):
            extension += value.to_bytes(size, "big")
        for text in (disk.image_uuid, set_uuid, checkpoint):
            extension += uuid.UUID(text).bytes
        extension += now.to_bytes(8, "big")
        extension += uuid.UUID(disk.parent or ZERO_UUID).bytes + bytes(8)
        extension[4:8] = lbext.crc32c(bytes(extension)).to_bytes(4, "big")
        header += (0x4C424F52).to_bytes(4, "big") + (96).to_bytes(4, "big")
        header += extension + bytes(8)
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.pwrite(self.fd, bytes(header), 0)
        os.pwrite(self.fd, b"".join(
            (self.l2 + i * self.cluster | COPIED).to_bytes(8, "big")
            for i in range(l1_entries)), 2 * self.cluster)
        os.truncate(self.fd, self.end)

    def save(self, offset, content):
        """One unit: data, then the entries."""
        entries = b""
        for at in range(0, len(content), self.cluster):
            data = content[at:at + self.cluster].ljust(self.cluster, b"\0")
            if any(data):
                os.pwrite(self.fd, data, self.end)
                entries += (self.end | COPIED).to_bytes(8, "big")
                self.end += self.cluster
            else:
                entries += (1).to_bytes(8, "big")
        os.pwrite(self.fd, entries, self.l2 + offset // self.cluster * 8)


class Disk:
    """A disk, and the guest that writes to it."""

    def __init__(self, name, path, options):
        self.name = name
        self.path = os.path.abspath(path)
        self.orig_path = self.path.removesuffix(".qcow2") + ".orig.qcow2"
        self.options = options
        self.random = random.Random(options.seed)
        self.lock = threading.Lock()
        self.running = self.broken = False
        self.parent = self.full_reason = None

    def info(self):
        """An element of the answer of query-named-block-nodes."""
        livebackup = {"trusted": True}
        if os.path.exists(self.path):
            live = lbext.read_livebackup(qcow2.Header(self.path))
            livebackup["image-uuid"] = live.fixed["image_uuid"]
            livebackup["checkpoints"] = [{"uuid": record["uuid"]}
                                         for record in live.records]
        return {"node-name": self.name, "drv": "qcow2", "ro": False,
                "file": self.path,
                "image": {"filename": self.path, "format": "qcow2",
                          "format-specific": {
                              "type": "qcow2",
                              "data": {"compat": "1.1",
                                       "livebackup": livebackup}}}}

    def find_parent(self, mode, since, label):
        """The checkpoint to go on from; None with 'full'."""
        live = lbext.read_livebackup(qcow2.Header(self.path))
        if mode == "full":
            return None
        if since is not None:
            if since not in [r["uuid"] for r in live.records]:
                raise Refused(f"Node '{self.name}' has no such checkpoint")
            return since
        found = [r["uuid"] for r in live.records if r["flags"] & 1
                 and r["label"].rstrip(b"\0").decode() == label]
        if not found:
            raise Refused(f"Node '{self.name}' has no confirmed checkpoint of "
                          "this label")
        return found[-1]

    def decide(self, mode, since, label):
        """Whether it is incremental; refuses with modes but auto."""
        self.parent = self.full_reason = None
        if mode == "since" and since is None:
            raise Refused("Mode 'since' wants 'since'")
        check_since(mode, since)
        try:
            self.parent = self.find_parent(mode, since, label)
        except Refused as reason:
            if mode != "auto":
                raise
            self.full_reason = str(reason)

    def begin(self, label, set_uuid, now):
        """The steps of the specification; the guest stands still."""
        image = qcow2.Image(self.path)
        self.size = image.size
        self.cluster = image.cluster_size
        live = lbext.read_livebackup(image)
        self.image_uuid = live.fixed["image_uuid"]
        self.unit = max(1 << live.fixed["granularity_bits"],
                        image.cluster_size, 65536)
        self.content = image.read(0, self.size)
        with open(self.path + ".at-T", "wb") as file:
            file.write(self.content)
        self.protected = set(range(-(-self.size // self.unit)))
        if self.parent is not None:
            self.protected = {
                unit for start, length
                in lbext.changed_since(image, self.parent)
                for unit in range(start // self.unit,
                                  -(-(start + length) // self.unit))}
        self.in_set, self.saved, self.released = len(self.protected), 0, 0
        self.checkpoint = str(uuid.uuid4())
        self.orig = Orig(self.orig_path, self, set_uuid, self.checkpoint, now)
        lbext.add_checkpoint(self.path, {
            "uuid": self.checkpoint, "label": label.encode(), "time": now,
            "root_prefix": 0, "flags": 0})
        poke(self.path, state=1, set_uuid=set_uuid, begun=now,
             boot_id=lbext.this_boot(), device=os.stat(self.path).st_dev)
        header = qcow2.Header(self.path)
        self.l1, self.l2_entries = header.l1_table_offset, header.l2_entries
        self.extended = header.extended_l2
        self.fd = os.open(self.path, os.O_RDWR)
        self.running = True

    def describe(self):
        """Disk, as the specification names it."""
        answer = {"device": self.name, "node-name": self.name,
                  "filename": self.path, "orig": self.orig_path,
                  "checkpoint": self.checkpoint, "size": self.size,
                  "unit": self.unit, "direct": self.options.direct,
                  "units-in-set": self.in_set, "units-saved": self.saved,
                  "units-released": self.released, "broken": self.broken}
        if self.parent is not None:
            answer["parent"] = self.parent
        if self.full_reason is not None:
            answer["full-reason"] = self.full_reason
        return answer

    # -- the guest

    def append(self, data):
        """At the end of the image; returns where."""
        at = qcow2.round_up(os.fstat(self.fd).st_size, self.cluster)
        os.pwrite(self.fd, data.ljust(self.cluster, b"\0"), at)
        return at

    def entry_offset(self, cluster):
        """Where the L2 entry of a cluster is; makes the table."""
        l1_index, l2_index = divmod(cluster, self.l2_entries)
        at = self.l1 + 8 * l1_index
        table = int.from_bytes(os.pread(self.fd, 8, at), "big") & ~COPIED
        if table == 0:
            table = self.append(b"")
            os.pwrite(self.fd, (table | COPIED).to_bytes(8, "big"), at)
        return table + (16 if self.extended else 8) * l2_index

    def change_cluster(self, cluster):
        """In place and elsewhere, to zero, away, or half done: an entry that
        means nothing."""
        at = self.entry_offset(cluster)
        old = int.from_bytes(os.pread(self.fd, 8, at), "big")
        noise = self.random.randbytes(self.cluster)
        kind = self.random.choice(["data", "data", "zero", "none", "junk"])
        if kind == "zero":
            words = (0, 0xFFFFFFFF << 32) if self.extended else (1, 0)
        elif kind == "none":
            words = (0, 0)
        elif kind == "junk" and self.options.junk:
            words = (JUNK, 0)
        else:
            if old & COPIED and not old & 1:
                os.pwrite(self.fd, noise, old & ~COPIED)
            words = (self.append(noise) | COPIED, 0xFFFFFFFF)
        os.pwrite(self.fd, b"".join(
            word.to_bytes(8, "big")
            for word in words[:2 if self.extended else 1]), at)

    def write(self, unit):
        """The guest changes a unit; its original is saved first."""
        with self.lock:
            if not self.running or (self.broken and unit in self.protected):
                return
            start = unit * self.unit
            end = min(start + self.unit, self.size)
            if unit in self.protected:
                self.orig.save(start, self.content[start:end])
                self.protected.discard(unit)
                self.saved += 1
            for cluster in range(start // self.cluster,
                                 -(-end // self.cluster)):
                self.change_cluster(cluster)

    def write_some(self, count):
        """Anywhere, in and out of the set."""
        for _ in range(count):
            self.write(self.random.randrange(-(-self.size // self.unit)))

    def damage(self):
        """An entry that nobody may write."""
        at = self.options.bad_entry
        if at is not None:
            os.pwrite(self.orig.fd, JUNK.to_bytes(8, "big"),
                      self.orig.l2 + at // self.orig.cluster * 8)
        at = self.options.bad_image
        if at is not None:
            os.pwrite(self.fd, JUNK.to_bytes(8, "big"),
                      self.entry_offset(at // self.cluster))

    # -- the backup

    def release(self, ranges):
        """Whole units are no longer protected; the guest overwrites some."""
        units = []
        with self.lock:
            for area in ranges:
                first = -(-area["offset"] // self.unit)
                end = area["offset"] + area["bytes"]
                last = (-(-end // self.unit) if end >= self.size
                        else end // self.unit)
                units += range(first, last)
            self.released += len(self.protected.intersection(units))
            self.protected.difference_update(units)
        for unit in units[::3] if not self.options.still else []:
            self.write(unit)

    def break_it(self):
        """An original could not be saved."""
        with self.lock:
            poke(self.path, state=3)
            self.broken = True

    def end(self, success, root):
        """Header, then the orig."""
        with self.lock:
            self.running = False
            os.close(self.fd)
            live = lbext.read_livebackup(qcow2.Header(self.path))
            index = [r["uuid"] for r in live.records].index(self.checkpoint)
            fields = {"state": 0, "set_uuid": ZERO_UUID, "begun": 0,
                      "boot_id": ZERO_UUID, "device": 0}
            if success and root is not None:
                fields[f"record[{index}].flags"] = 1
                fields[f"record[{index}].root_prefix"] = int(root, 16)
            poke(self.path, **fields)
            os.unlink(self.orig_path)


class Monitor:
    """QMP, for one client."""

    def __init__(self, options):
        self.options = options
        self.disks = {}
        for word in options.disks:
            name, _, path = word.partition("=")
            self.disks[name] = Disk(name, path, options)
        self.job = None
        self.log = open("qmp.log", "w", encoding="utf-8", buffering=1)

    def serve(self):
        """Until the client has gone."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.options.socket + ".new")
        listener.listen(1)
        os.rename(self.options.socket + ".new", self.options.socket)
        self.stream = listener.accept()[0].makefile("rw", encoding="utf-8")
        self.send({"QMP": {"version": {}, "capabilities": ["oob"]}})
        for line in self.stream:
            request = json.loads(line)
            self.log.write(json.dumps(request) + "\n")
            self.answer(request)
        self.log.write('{"execute": "gone"}\n')

    def send(self, message):
        """One object a line, as QEMU does."""
        self.stream.write(json.dumps(message) + "\r\n")
        self.stream.flush()

    def event(self, name, **data):
        """Clients skip them."""
        self.send({"event": name, "data": data,
                   "timestamp": {"seconds": 1, "microseconds": 0}})

    def answer(self, request):
        """Executes one command."""
        command = request["execute"]
        if command == self.options.die_at:
            os._exit(0)
        try:
            if command in self.options.refuse:
                raise Refused(self.options.refuse[command])
            function = getattr(self, command.replace("-", "_"), None)
            if function is None:
                raise Refused(f"The command {command} has not been found")
            result = function(request.get("arguments", {}))
        except Refused as error:
            self.send({"error": {"class": "GenericError",
                                 "desc": str(error)}, "id": request["id"]})
            return
        self.event("RTC_CHANGE", offset=0)
        self.send({"return": result, "id": request["id"]})
        if command == self.options.break_after:
            for disk in self.running:
                disk.break_it()
            self.event("LIVEBACKUP_BROKEN", reason="no space")

    def qmp_capabilities(self, _):
        """Nothing to negotiate."""
        return {}

    def query_commands(self, _):
        """Not all, but that which tells whether there is livebackup."""
        return [{"name": "quit"}, {"name": "livebackup-begin"}]

    def query_named_block_nodes(self, arguments):
        """The disks, the file below one, and a read-only one."""
        if not arguments["flat"]:
            raise Refused("this would be long")
        base = dict(Disk("base", "base.qcow2", self.options).info(), ro=True)
        return [disk.info() for disk in self.disks.values()] + [
            base, {"node-name": "file0", "drv": "file", "ro": False,
                   "file": "x", "image": {"filename": "x"}}]

    def livebackup_begin(self, arguments):
        """One point in time for all disks."""
        mode = arguments.get("mode", "full")
        label = arguments.get("label", "default")
        names = [entry["device"] for entry in arguments["disks"]]
        check_since(mode, arguments.get("since"))
        for entry in arguments["disks"]:
            name = entry["device"]
            if name not in self.disks:
                raise Refused(f"Cannot find device='' nor node-name='{name}'")
            own = entry if "mode" in entry or "since" in entry else arguments
            self.disks[name].decide(entry.get("mode", mode),
                                    own.get("since"), label)
        self.job = arguments["job-id"]
        self.set_uuid = arguments.get("set", str(uuid.uuid4()))
        self.running = [self.disks[name] for name in names]
        for disk in self.running:
            disk.begin(label, self.set_uuid, self.options.time)
        self.event("LIVEBACKUP_BEGUN", **{"job-id": self.job})
        for disk in self.running:
            disk.write_some(self.options.writes)
            disk.damage()
            if self.options.go_on:
                threading.Thread(target=self.guest, args=(disk,),
                                 daemon=True).start()
        return {"set": self.set_uuid, "time": self.options.time,
                "disks": [disk.describe() for disk in self.running]}

    @staticmethod
    def guest(disk):
        """Goes on writing."""
        while disk.running:
            disk.write_some(1)
            time.sleep(0.001)

    def check_job(self, arguments):
        """Only the job that was begun."""
        if arguments["job-id"] != self.job:
            raise Refused("no such job")

    def livebackup_release(self, arguments):
        """The client has these ranges."""
        self.check_job(arguments)
        self.disks[arguments["device"]].release(arguments["ranges"])
        return {}

    def livebackup_end(self, arguments):
        """Confirmed where a root is given."""
        self.check_job(arguments)
        roots = {entry["device"]: entry["root"]
                 for entry in arguments.get("roots", [])}
        for disk in self.running:
            disk.end(arguments["success"], roots.get(disk.name))
        self.job = None
        self.event("LIVEBACKUP_ENDED", success=arguments["success"])
        return {}

    def query_livebackup(self, _):
        """All jobs; there may be none."""
        if self.job is None:
            return []
        broken = any(disk.broken for disk in self.running)
        return [{"job-id": self.job, "set": self.set_uuid,
                 "phase": "broken" if broken else "running",
                 **({"reason": "no space"} if broken else {}),
                 "disks": [disk.describe() for disk in self.running]}]


def main():
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("disks", nargs="+", metavar="NAME=IMAGE")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--time", type=int, default=1700000000)
    parser.add_argument("--still", action="store_true",
                        help="the guest writes nothing to what is released")
    parser.add_argument("--writes", type=int, default=0,
                        help="of the guest before livebackup-begin returns")
    parser.add_argument("--go-on", action="store_true",
                        help="the guest writes until the backup ends")
    parser.add_argument("--junk", action="store_true",
                        help="it leaves entries that no reader can decode")
    parser.add_argument("--bad-entry", type=int, metavar="OFFSET",
                        help="damage the orig there")
    parser.add_argument("--bad-image", type=int, metavar="OFFSET",
                        help="damage the image there")
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--refuse", action="append", default=[],
                        metavar="COMMAND=TEXT")
    parser.add_argument("--die-at", metavar="COMMAND")
    parser.add_argument("--break-after", metavar="COMMAND")
    options = parser.parse_args()
    options.refuse = dict(word.split("=", 1) for word in options.refuse)
    Monitor(options).serve()


if __name__ == "__main__":
    main()
