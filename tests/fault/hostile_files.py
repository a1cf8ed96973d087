#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Hostile images and archives of the oracle, through the tools.

A tool either does its work or refuses, with the documented status and a
message: never a signal, and never more memory or time than is sound.
"""

import hashlib
import json
import os
import random
import shutil
import sys

from faultlib import (Failure, claim, copy, each, expect_absent,
                      expect_no_worse_than_leaks, main, read, remove, run,
                      thin, workplace, write)
import hostile
import hostile_archives
import lbz
import zstandard

# --------------------------------------------------------------------------
# Archives
# --------------------------------------------------------------------------


def archives():
    """(path, verdict, mention, is it full) of every hostile archive."""
    if not os.path.exists("archives"):
        hostile_archives.write_all("archives")
        add_large_archives()
    with open("archives/manifest.json") as file:
        manifest = json.load(file)
    for name, entry in sorted(manifest.items()):
        yield f"archives/{name}.lbz", entry["verdict"], entry["mention"]


def add_large_archives():
    """What must cost neither memory nor time."""
    with open("archives/manifest.json") as file:
        manifest = json.load(file)

    def add(name, spec, verdict, mention=""):
        write(f"archives/{name}.lbz", lbz.Maker(spec).make())
        manifest[name] = {"verdict": verdict, "mention": mention}

    stripe = 16 * lbz.BLOCK
    # A frame of a few hundred bytes that unpacks to much more than it says.
    bomb = zstandard.ZstdCompressor(write_checksum=True).compress(
        bytes(256 << 20))
    add("frame-bomb", hostile_archives.one_frame(
        raw=bomb.hex(), blocks=[{"fill": 0}]), "damaged")
    stream = zstandard.ZstdCompressor(
        write_checksum=True, write_content_size=False).compress(
            bytes(256 << 20))
    add("frame-bomb-of-unknown-size", hostile_archives.one_frame(
        raw=stream.hex(), blocks=[{"fill": 0}]), "damaged")
    # Many pages far apart, each with one block.
    step = 2**56 // 2000 // lbz.PAGE_RANGE * lbz.PAGE_RANGE
    add("pages-far-apart", {"virtual_size": 2**56, "blocks": [
        {"offset": n * step, "fill": 1} for n in range(2000)]}, "ok")
    # As many frames and runs as a page can have.
    add("page-full-of-frames", {"virtual_size": lbz.PAGE_RANGE, "group": 1,
                                "blocks": [{"offset": 0, "count": 4096,
                                            "fill": 1}]}, "ok")
    add("page-full-of-runs", {
        "kind": "incremental", "virtual_size": lbz.PAGE_RANGE,
        "runs": {"0": [[2 * n, 1] for n in range(2048)]}}, "ok")
    add("masks-that-alternate", {
        "virtual_size": lbz.PAGE_RANGE,
        "frames": [{"offset": n * stripe, "blocks": [
            {"fill": 1, "live": (block % 2) == half} for block in range(16)]}
            for n in range(256) for half in (0, 1)]}, "ok")
    # A directory that is said to be huge in a file that is not.
    add("directory-of-2-20-pages", hostile_archives.field(
        "trailer.page_count", 2**20), "damaged")
    with open("archives/manifest.json", "w") as file:
        json.dump(manifest, file)


# A merge moves compressed frames as they are.
NOT_READ_BY_MERGE = ("block-digest", "frame-")
# Through the index nobody visits what lies between pages and trailer, nor
# needs the totals; the content is right.
NOT_READ_BY_INDEX = ("gap-before-trailer", "index-gap", "index-totals",
                     "trailer-compressed_total",
                     "trailer-data_blocks", "trailer-frame_count",
                     "trailer-zero_blocks")

STATUS = {"ok": (0,), "damaged": (4,), "unsupported": (1,), "any": (0, 4)}


def is_incremental(path):
    """By the header's kind, if there is one."""
    return read(path)[33:34] == b"\1"


def is_index(path):
    """By its name."""
    return os.path.basename(path).startswith("index-")


def check_archive(case):
    """One archive through everything that reads archives."""
    path, verdict, mention = case
    wanted = STATUS[verdict]
    result = run(["lbverify", "--threads=2", path], bounded=True)
    result.expect(*wanted)
    # All reasons are documented; the mention says which one is meant.
    if verdict in ("damaged", "unsupported"):
        result.mentions(f"^lbverify: {path}: .*")
        result.mentions(f"(?i){mention}")
    by_pipe = run(["lbverify", "--threads=2", "-"], stdin=path, bounded=True)
    by_pipe.expect(*wanted)
    if verdict == "any" and by_pipe.status != result.status:
        raise Failure(f"two answers\n{result}\n{by_pipe}")
    merged = os.path.join(workplace(), "merged.lbz")
    remove(merged)
    name = os.path.basename(path)
    moved = verdict == "damaged" and name.startswith(NOT_READ_BY_MERGE)
    skipped = name.startswith(NOT_READ_BY_INDEX)
    kind = ["--index-only"] if is_index(path) else []
    result = run(["lbmerge", "-q", "--threads=2", "-o", merged, *kind, path],
                 bounded=True).expect(*wanted,
                                      *((0,) if moved or skipped else ()))
    if result.status != 0:
        expect_absent(merged)
    elif verdict != "any":
        # What a merge moves unread is as damaged as before, and found.
        run(["lbverify", merged], bounded=True).expect(4 if moved else 0)
    check_restore(path, verdict, wanted)


def check_restore(path, verdict, wanted):
    """To both formats, from a file and a pipe."""
    # A disk may be too large for a qcow2 image or for the file system.
    wanted = (3,) if verdict == "ok" and is_incremental(path) else wanted
    if verdict in ("ok", "any"):
        wanted += (1, 2, 3)
    if is_index(path):
        # What has no content is refused before its damage is met.
        wanted = (1, 2, 3, 4)
    for name in ("restored.raw", "restored.qcow2"):
        target = os.path.join(workplace(), name)
        for source in (path, "-"):
            remove(target)
            by_index = source == path and os.path.basename(path).startswith(
                NOT_READ_BY_INDEX)
            result = run(["lbrestore", "-q", "--threads=2", "-o", target,
                          source], stdin=path, bounded=True)
            # An incremental alone is refused before its damage is met.
            result.expect(*wanted, *((3,) if is_incremental(path) else ()),
                          *((0,) if by_index else ()))
            if result.status != 0:
                expect_absent(target)


@claim
def hostile_archives_are_refused():
    """With the documented status, in bounded memory and time."""
    each(thin(archives(), 2), check_archive)


@claim
def good_archives_of_another_maker():
    """What the oracle makes is read as the oracle reads it."""
    for path, verdict, _ in list(archives()):
        archive = lbz.Archive(path, deep=False) if verdict == "ok" else None
        if (archive is None or archive.header["kind"] != 0 or archive.is_index
                or archive.header["virtual_size"] > 1 << 40):
            continue
        run(["lbrestore", "-q", "-o", "ours.raw", path]).expect(0)
        with open("theirs.raw", "wb") as out:
            lbz.restore_chain(lbz.select_chain([archive], None), out)
        if digest_of("ours.raw") != digest_of("theirs.raw"):
            raise Failure(f"{path}: restored content differs")
        remove("ours.raw", "theirs.raw")


@claim
def absurd_chains():
    """Loops, twins, thousands of covered ones: status 3 and no more."""
    def make(name, number, parent, **more):
        spec = {"kind": "full" if parent is None else "incremental",
                "virtual_size": lbz.BLOCK, "backup_uuid": uuid_of(number),
                "image_uuid": uuid_of(0xFFFF),
                "blocks": [{"offset": 0, "fill": number}]}
        if parent is not None:
            spec["parent_uuid"] = uuid_of(parent)
        spec.update(more)
        write(name, lbz.Maker(spec).make())
        return name

    chains = {
        "a loop": [make("a1.lbz", 1, 2), make("a2.lbz", 2, 1)],
        "twins": [make("c1.lbz", 1, None), make("c2.lbz", 1, None)],
        "no parent": [make("d1.lbz", 1, None), make("d2.lbz", 3, 2)],
        "another image": [make("e1.lbz", 1, None),
                          make("e2.lbz", 2, 1, image_uuid=uuid_of(0xEEEE))],
        "all cover each other": [
            make("f0.lbz", 1, None),
            make("f1.lbz", 2, 1, covered=[uuid_of(3)]),
            make("f2.lbz", 3, 1, covered=[uuid_of(2)])],
    }

    def check(case):
        _, files = case
        target = os.path.join(workplace(), "out")
        for argv in (["lbmerge", "-o", target], ["lbrestore", "-o", target],
                     ["lbverify"]):
            remove(target)
            run([*argv, *files], bounded=True).expect(3)
            expect_absent(target)

    each(chains.items(), check)
    # A long chain is fine.
    files = [make("g0.lbz", 1, None)]
    files += [make(f"g{n}.lbz", n + 1, n) for n in range(1, 200)]
    random.Random(1).shuffle(files)
    run(["lbmerge", "-q", "-o", "long.lbz", *files], bounded=True).expect(0)
    run(["lbverify", "long.lbz"]).expect(0)


def uuid_of(number):
    """A UUID that is recognised."""
    return f"00000000-0000-4000-8000-{number:012x}"


# --------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------

def images():
    """(name, entry of the manifest) of every hostile image."""
    if not os.path.exists("images"):
        hostile.write_all("images")
    with open("images/manifest.json") as file:
        return sorted(json.load(file).items())


def digest_of(path):
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def with_companions(name):
    """The image beside the files that it may name, in a folder of its own."""
    folder = os.path.join(workplace(), "images")
    if not os.path.exists(folder):
        shutil.copytree("images", folder)
    target = os.path.join(folder, name + ".qcow2")
    copy(f"images/{name}.qcow2", target)
    return target


def lacks_another(name):
    """Whether it is another file that is at fault, without which the state
    in this one can be told still: livebackup is off."""
    return name.startswith(("backing-", "data-file-"))


# Statuses of man pages: 1 not supported or I/O, 4 damaged.
READS = {"refuse": (1, 4), "read-error": (1, 4), "ok": (0,),
         "any": (0, 1, 4)}


def check_dump(case):
    """lbdump --copy and lbverify --image."""
    name, entry = case
    path = with_companions(name)
    archive = os.path.join(workplace(), "dump.lbz")
    remove(archive)
    before = read(path)
    result = run(["lbdump", "-q", "--copy", "--threads=2", "-o", archive,
                  path], bounded=True)
    result.expect(*READS[entry["verdict"]])
    if read(path) != before:
        raise Failure("--copy has written to the image")
    if result.status != 0:
        result.mentions(r"^lbdump: ")
        result.mentions(f"(?i){entry['mention']}")
        expect_absent(archive)
        compared = run(["lbverify", "--image", path, "plain.lbz"],
                       bounded=True)
        compared.expect(1, 4)
        return
    if "sha256" in entry:
        restored = os.path.join(workplace(), "restored.raw")
        remove(restored)
        run(["lbrestore", "-q", "-o", restored, archive]).expect(0)
        if digest_of(restored) != entry["sha256"]:
            raise Failure("the dumped content is not the disk's")
    run(["lbverify", "--image", path, archive], bounded=True).expect(0)


@claim
def hostile_images_dumped():
    """Content as the standard says, or a refusal."""
    cases = images()
    run(["lbdump", "-q", "--copy", "-o", "plain.lbz",
         "images/plain.qcow2"]).expect(0)
    each(thin(cases, 2), check_dump)


def check_incremental(case):
    """What lbdump makes of the hostile image's own checkpoints."""
    name, entry = case
    path = with_companions(name)
    archive = os.path.join(workplace(), "dump.lbz")
    remove(archive)
    before = read(path)
    trusted = entry.get("trust_checkpoint", "trusted") == "trusted"
    result = run(["lbdump", "--incremental", "--threads=2", "-o", archive,
                  path], bounded=True)
    if "trust" in entry and not (trusted and entry["trust"] == "trusted"):
        result.expect(3)
        keyword = (entry["trust"] if entry["trust"] != "trusted"
                   else entry["trust_checkpoint"])
        # These two have a sentence of their own.
        if keyword not in ("off", "no-checkpoint"):
            result.mentions(rf"\({keyword}\)")
    elif entry["verdict"] == "refuse" and not lacks_another(name):
        result.expect(1, 4)
    else:
        result.expect(0, 1, 3, 4)
    if result.status != 0:
        expect_absent(archive)
        if read(path) != before:
            raise Failure("a refused incremental has changed the image")


@claim
def hostile_images_dumped_incrementally():
    """No trust, no incremental, and no change."""
    each(thin(images(), 2), check_incremental)


def check_full(case):
    """A full dump, which adds a checkpoint where it can."""
    name, entry = case
    path = with_companions(name)
    archive = os.path.join(workplace(), "dump.lbz")
    remove(archive)
    before = read(path)
    result = run(["lbdump", "--auto", "--threads=2", "-o", archive, path],
                 bounded=True)
    # Unknown flags mean something to somebody: no list is made over them.
    result.expect(0, *READS[entry["verdict"]], 4,
                  *((3,) if name == "bitmap-reserved-flags" else ()))
    if result.status != 0:
        result.mentions(r"^lbdump: ")
        # A refused dump leaves the checkpoints; leaks at the most.
        if entry["verdict"] == "refuse" and read(path) != before:
            raise Failure(f"a refused image has changed\n{result}")
        return
    if entry.get("trust") == "trusted":
        expect_no_worse_than_leaks(path)
    if is_full(archive):
        run(["lbverify", "--image", path, archive]).expect(0)


def is_full(path):
    """By the header's kind."""
    return read(path)[33] == 0


@claim
def hostile_images_dumped_in_full():
    """A dump that may write to the image."""
    each(thin(images(), 2), check_full)


def keywords(status):
    """Trust as `lbctl status --json` tells it: image, checkpoints."""
    return (status["keyword"] or "trusted",
            [checkpoint["keyword"] or "trusted"
             for checkpoint in status["checkpoints"]])


def check_control(case):
    """lbctl status, enable, recover, prune, confirm, disable."""
    name, entry = case
    path = with_companions(name)
    before = read(path)
    result = run(["lbctl", "status", "--json", path], bounded=True)
    # Only the reading of content can still fail.
    wanted = {"refuse": (1, 4), "any": (0, 1, 4)}
    result.expect(*wanted.get(entry["verdict"], (0,)),
                  *((0,) if lacks_another(name) else ()))
    run(["lbctl", "status", path], bounded=True).expect(result.status)
    if read(path) != before:
        raise Failure("status has written to the image")
    if result.status == 0 and "trust" in entry:
        image, checkpoints = keywords(result.json())
        if image != entry["trust"]:
            raise Failure(f"trust is {image}, not {entry['trust']}")
        for found in checkpoints:
            if entry["trust"] == "trusted" and found not in (
                    entry["trust_checkpoint"], "trusted"):
                raise Failure(f"a checkpoint is {found}")
        if checkpoints and entry["trust"] == "trusted" and (
                checkpoints[0] != entry["trust_checkpoint"]):
            raise Failure(f"the first checkpoint is {checkpoints[0]}")
    for argv in (["enable"], ["recover"], ["prune"], ["disable"],
                 ["confirm", hostile.CHECKPOINTS[0], "00" * 16],
                 ["prune", "--force", hostile.CHECKPOINTS[1]]):
        path = with_companions(name)
        changed = run(["lbctl", argv[0], path, *argv[1:]]
                      if argv[0] == "confirm"
                      else ["lbctl", argv[0],
                            *(word for word in argv[1:] if word[0] == "-"),
                            path,
                            *(word for word in argv[1:] if word[0] != "-")],
                      bounded=True)
        changed.expect(0, 1, 2, 3, 4)
        if changed.status != 0:
            changed.mentions("^lbctl")
            if read(path) != before:
                raise Failure(f"a refusal that changed the image\n{changed}")
        if result.status != 0 and changed.status == 0:
            raise Failure(f"an image that can't be read\n{changed}")


@claim
def hostile_images_controlled():
    """lbctl's answer, and nothing changed where it refuses."""
    each(thin(images(), 2), check_control)


def is_marked(path):
    """A rollback was begun and not finished."""
    return read(path)[72:73] == b"\x40"


def check_in_place(case):
    """lbrestore --in-place, to what plain.lbz holds."""
    name, _ = case
    for options in (["--rescan"], []):
        path = with_companions(name)
        before = read(path)
        rolled = run(["lbrestore", "-q", "--threads=2", "--force", *options,
                      "--in-place", path, "plain.lbz"], bounded=True)
        rolled.expect(0, 1, 3, 4)
        if rolled.status != 0:
            rolled.mentions("^lbrestore: ")
            if read(path) != before and not is_marked(path):
                raise Failure(f"a failure that changed the image\n{rolled}")
            if is_marked(path):
                rolled.mentions("the rollback is not finished; run it again")
            continue
        run(["lbverify", "--image", path, "plain.lbz"],
            bounded=True).expect(0)


@claim
def hostile_images_rolled_back():
    """The content of the archive, or a refusal."""
    cases = images()
    run(["lbdump", "-q", "--copy", "-o", "plain.lbz",
         "images/plain.qcow2"]).expect(0)
    each(thin(cases, 2), check_in_place)


if __name__ == "__main__":
    sys.exit(main())
