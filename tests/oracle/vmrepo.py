#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""lbvm's repositories, from docs/repository.md alone.

    vmrepo.py dump REPO MACHINE IMAGE COUNT [STEP [START]]
        makes COUNT backups of an image of 4 MiB that changes in between, with
        lbdump, each STEP seconds (an hour) after the one before
    vmrepo.py synth REPO MACHINE PLAN
        makes backups without lbdump: PLAN is "TIME:PARENT[,PARENT]..." for
        each, separated by spaces, where PARENT is for each disk "-" (full), or
        the number of the backup, from 0, that it goes on from
    vmrepo.py check REPO
        judges every rule that can be seen from outside
    vmrepo.py content REPO MACHINE
        "ID DISK SIZE SHA256" of each listed backup, restored by the oracle
    vmrepo.py chain REPO MACHINE ID DISK
        the paths of the archives, the full one first

dump and synth print what `content` must print.
"""

import datetime
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import uuid

import lbz

BLOCK = 65536
MACHINE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
DIGESTS = {1: "xxh3-128", 2: "sha256"}


class Wrong(Exception):
    """A rule is broken."""


def write_object(path, data):
    """In one go."""
    temporary = os.path.join(os.path.dirname(path),
                             f".{os.path.basename(path)}.AbCdEf.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
    os.rename(temporary, path)


def to_json(value):
    return json.dumps(value, indent=1).encode()


def id_of(time, set_uuid):
    when = datetime.datetime.fromtimestamp(time, datetime.timezone.utc)
    return f"{when:%Y%m%dT%H%M%SZ}-{set_uuid[:8]}"


class Repository:

    def __init__(self, path, label="main"):
        self.path = path
        file = os.path.join(path, "repository.json")
        if not os.path.exists(file):
            os.makedirs(path, exist_ok=True)
            write_object(file, to_json({
                "format": "lbvm-repository", "version": 1,
                "uuid": str(uuid.uuid4()), "label": label}))
        with open(file, encoding="utf-8") as stream:
            self.about = json.load(stream)
        if (self.about["format"], self.about["version"]) != (
                "lbvm-repository", 1):
            raise Wrong("repository.json")
        self.label = self.about["label"]

    def machines(self):
        return [Machine(self, name) for name in sorted(os.listdir(self.path))
                if os.path.isdir(os.path.join(self.path, name, "backups"))]


class Machine:

    def __init__(self, repository, name, create=False):
        if MACHINE.fullmatch(name) is None:
            raise Wrong(f"a machine is called {name}")
        self.repository = repository
        self.name = name
        self.path = os.path.join(repository.path, name)
        if create:
            for folder in ("backups", "archives", "definitions"):
                os.makedirs(os.path.join(self.path, folder), exist_ok=True)
        self.load()

    def object(self, name):
        return os.path.join(self.path, name)

    def load(self):
        self.backups = []
        for name in os.listdir(self.object("backups")):
            if name.startswith(".") or not name.endswith(".json"):
                continue
            with open(self.object(f"backups/{name}"),
                      encoding="utf-8") as stream:
                manifest = json.load(stream)
            if (manifest["format"], manifest["version"]) != (
                    "lbvm-backup", 1):
                raise Wrong(f"{name}: format")
            if (manifest["id"] + ".json", manifest["machine"]) != (
                    name, self.name):
                raise Wrong(f"{name}: id or machine")
            self.backups.append(manifest)
        self.backups.sort(key=lambda m: m["sequence"])

    def listed(self):
        return [m for m in self.backups if "kept_for" not in m]

    def find(self, backup_id):
        return next(m for m in self.backups if m["id"] == backup_id)

    def chain(self, disk):
        """Disk entries, the full one first."""
        by_key = {(d["image"], d["checkpoint"]): d
                  for m in self.backups for d in m["disks"]}
        chain = [disk]
        while chain[0]["parent"] is not None:
            key = (disk["image"], chain[0]["parent"])
            if key not in by_key:
                raise Wrong(f"{disk['archive']}: no parent {key[1]}")
            if by_key[key] in chain:
                raise Wrong(f"{disk['archive']}: a circle")
            chain.insert(0, by_key[key])
        return chain

    def paths(self, disk):
        return [self.object(d["archive"]) for d in self.chain(disk)]

    def restore(self, disk, path):
        archives = [lbz.Archive(p, deep=False) for p in self.paths(disk)]
        with open(path, "wb") as out:
            lbz.restore_chain(archives, out)

    def add(self, time, disks, sequence=None, kept_for=None):
        """disks: (name, path of the archive, which is in archives/)"""
        set_uuid = str(uuid.uuid4())
        entries = []
        for name, path in disks:
            archive = lbz.Archive(path, deep=False)
            header = archive.header
            entries.append({
                "name": name, "filename": f"/images/{name}.qcow2",
                "checkpoint": header["backup_uuid"],
                "parent": header["parent_uuid"] if header["kind"] else None,
                "image": header["image_uuid"],
                "size": header["virtual_size"],
                "archive": f"archives/{os.path.basename(path)}",
                "bytes": os.path.getsize(path),
                "digest": DIGESTS[archive.algorithm],
                "root": archive.root.hex(), "reason": ""})
        if sequence is None:
            sequence = 1 + max([m["sequence"] for m in self.backups],
                               default=0)
        manifest = {
            "format": "lbvm-backup", "version": 1,
            "id": id_of(time, set_uuid), "machine": self.name,
            "sequence": sequence, "set": set_uuid, "time": time,
            "finished": time + 3, "label": self.repository.label,
            "source": "images", "quiesced": False, "definition": None,
            "disks": entries}
        if kept_for is not None:
            manifest["kept_for"] = kept_for
        write_object(self.object(f"backups/{manifest['id']}.json"),
                     to_json(manifest))
        self.backups.append(manifest)
        return manifest

    def check(self):
        """What docs/repository.md demands of a repository at rest."""
        named = []
        sequences = [m["sequence"] for m in self.backups]
        if len(set(sequences)) < len(sequences):
            raise Wrong("two backups have the same sequence")
        for manifest in self.backups:
            if manifest["id"] != id_of(manifest["time"], manifest["set"]):
                raise Wrong(f"{manifest['id']}: is no such ID")
            if not manifest["disks"]:
                raise Wrong(f"{manifest['id']}: no disks")
            for disk in manifest["disks"]:
                named.append(disk["archive"])
                self.check_disk(disk)
        if len(set(named)) < len(named):
            raise Wrong("an archive is named twice")
        return named

    def check_disk(self, disk):
        path = self.object(disk["archive"])
        archive = lbz.Archive(path)  # every structure, every digest
        header = archive.header
        told = (header["backup_uuid"], header["image_uuid"],
                header["parent_uuid"] if header["kind"] else None,
                header["virtual_size"], os.path.getsize(path),
                DIGESTS[archive.algorithm], archive.root.hex())
        wanted = tuple(disk[key] for key in (
            "checkpoint", "image", "parent", "size", "bytes", "digest",
            "root"))
        if told != wanted:
            raise Wrong(f"{path}: {told}, not {wanted}")
        self.chain(disk)

    def leftovers(self):
        """Objects that no manifest names."""
        named = {d["archive"] for m in self.backups for d in m["disks"]}
        named |= {m["definition"] for m in self.backups}
        found = {f"{folder}/{name}" for folder in ("archives", "definitions")
                 for name in os.listdir(self.object(folder))}
        found |= {f"backups/{name}"
                  for name in os.listdir(self.object("backups"))
                  if name.startswith(".")}
        return sorted(found - named)

    def contents(self, temporary):
        """(ID, disk, size, SHA-256) of what is listed."""
        for manifest in self.listed():
            for disk in manifest["disks"]:
                self.restore(disk, temporary)
                with open(temporary, "rb") as stream:
                    data = stream.read()
                yield (manifest["id"], disk["name"], len(data),
                       hashlib.sha256(data).hexdigest())
        if os.path.exists(temporary):
            os.unlink(temporary)


# --------------------------------------------------------------------------
# Making backups
# --------------------------------------------------------------------------

def dump(machine, image, count, step=3600, start=1790000000, seed=1):
    """With lbdump, of an image that livebackup is on in; yields content."""
    rng = random.Random(seed)
    size = 4 << 20
    content = bytearray(size)
    for number in range(count):
        commands = []
        for _ in range(rng.randrange(1, 4)):
            offset = rng.randrange(size // 4096) * 4096
            length = min(rng.randrange(1, 12) * 4096, size - offset)
            byte = rng.choice([0, rng.randrange(1, 256)])
            commands += ["-c", f"write -P {byte} {offset} {length}" if byte
                         else f"write -z {offset} {length}"]
            content[offset:offset + length] = bytes([byte]) * length
        subprocess.run(["qemu-io", "-f", "qcow2", *commands, image],
                       check=True, stdout=subprocess.DEVNULL)
        path = machine.object(f"archives/vda.{uuid.uuid4()}-0.lbz")
        # an image keeps 32 checkpoints; old ones are folded away
        subprocess.run(["lbdump", "-q", "--auto", "-o", path, image],
                       check=True, stdin=subprocess.DEVNULL)
        manifest = machine.add(start + number * step, [("vda", path)])
        yield (manifest["id"], "vda", size,
               hashlib.sha256(content).hexdigest())


def new_state(rng, before, blocks):
    """{block: seed, or None for ZERO} of some blocks, and the state after."""
    changes = {}
    if before is None:
        before = {}
    for block in rng.sample(range(blocks), rng.randrange(1, 5)):
        changes[block] = rng.choice([None, str(rng.random()),
                                     str(rng.random())])
    return changes, {**before, **changes}


def content_of(state, blocks):
    return b"".join(lbz.seeded_block(state[b]) if state.get(b)
                    else bytes(BLOCK) for b in range(blocks))


def synth(machine, plan, seed=1, blocks=24, names=None):
    """From a plan [(time, [parent or None, ...])]; yields content."""
    rng = random.Random(seed)
    images = {}
    made = []  # for each backup [(checkpoint, state)] of its disks
    for time, parents in plan:
        disks, row = [], []
        for number, parent in enumerate(parents):
            name = names[number] if names else f"vd{'abcdef'[number]}"
            image = images.setdefault(number, str(uuid.uuid4()))
            before = None if parent is None else made[parent][number]
            changes, state = new_state(rng, before and before[1], blocks)
            checkpoint = str(uuid.uuid4())
            spec = {"kind": "full" if parent is None else "incremental",
                    "virtual_size": blocks * BLOCK, "time": time,
                    "label": machine.repository.label, "image_uuid": image,
                    "backup_uuid": checkpoint, "blocks": []}
            if parent is not None:
                spec["parent_uuid"] = before[0]
            for block, value in sorted(changes.items()):
                if value is None and parent is None:
                    continue  # a full one has no ZERO
                spec["blocks"].append({
                    "offset": block * BLOCK, "count": 1,
                    **({"kind": "zero"} if value is None
                       else {"kind": "data", "seed": value})})
            path = machine.object(f"archives/{name}.{uuid.uuid4()}-0.lbz")
            write_object(path, lbz.Maker(spec).make())
            disks.append((name, path))
            row.append((checkpoint, state))
        made.append(row)
        manifest = machine.add(time, disks)
        for (name, _), (_, state) in zip(disks, row):
            data = content_of(state, blocks)
            yield (manifest["id"], name, len(data),
                   hashlib.sha256(data).hexdigest())


def parse_plan(text):
    plan = []
    for word in text.split():
        time, parents = word.split(":")
        plan.append((int(time), [None if p == "-" else int(p)
                                 for p in parents.split(",")]))
    return plan


def show(rows):
    for row in rows:
        print(*row)


def main(argv):
    command, repository = argv[1], Repository(argv[2])
    if command == "check":
        for machine in repository.machines():
            machine.check()
            if machine.leftovers():
                raise Wrong(f"leftovers: {machine.leftovers()}")
        return 0
    machine = Machine(repository, argv[3], command in ("dump", "synth"))
    if command == "dump":
        show(dump(machine, argv[4], *map(int, argv[5:])))
    elif command == "synth":
        show(synth(machine, parse_plan(argv[4])))
    elif command == "content":
        show(machine.contents(machine.object(f".content.{os.getpid()}")))
    elif command == "chain":
        disk = next(d for d in machine.find(argv[4])["disks"]
                    if d["name"] == argv[5])
        print("\n".join(machine.paths(disk)))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
