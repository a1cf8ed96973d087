#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Archives with flipped bytes, cut and lengthened, through the tools."""

import os
import random
import re
import sys

from faultlib import (Failure, NIGHTLY, SANITIZED, claim, each, expect_absent,
                      guest, main, make_disk, read, run, sh, thin, workplace,
                      write)
import lbz

NAMES = ("full", "incremental", "sha256", "masked")


def pattern_file(path, seed, length):
    """Content of which half does not compress."""
    noise = random.Random(seed)
    data = b"".join(noise.randbytes(2048) + bytes([seed]) * 2048
                    for _ in range(length // 4096))
    write(path, data)


def make_archives():
    """full.lbz, incremental.lbz (zeroes too), sha256.lbz, and masked.lbz: a
    full one merged so that frames hold dead blocks."""
    if os.path.exists("masked.lbz"):
        return
    pattern_file("pattern", 7, 384 << 10)
    make_disk("disk.qcow2", "600M")
    guest("disk.qcow2", "write -s pattern 0 384k", "write -P 5 700k 8k",
          "write -P 6 513M 128k")
    run(["lbctl", "enable", "disk.qcow2"]).expect(0)
    run(["lbdump", "-q", "-o", "full.lbz", "disk.qcow2"]).expect(0)
    run(["lbdump", "-q", "--copy", "--digest=sha256", "-o", "sha256.lbz",
         "disk.qcow2"]).expect(0)
    guest("disk.qcow2", "write -P 9 64k 64k", "write -P 8 300M 4k",
          "write -z 513M 64k")
    run(["lbdump", "-q", "--incremental", "-o", "incremental.lbz",
         "disk.qcow2"]).expect(0)
    run(["lbmerge", "-q", "-o", "masked.lbz", "full.lbz",
         "incremental.lbz"]).expect(0)
    masked = lbz.Archive("masked.lbz")
    if not any(bin(frame.live).count("1") < frame.blocks
               for page in masked.pages for frame in page.frames):
        raise Failure("masked.lbz has no dead block")


class Structures:
    """Where the records, frames and pages of an archive are."""

    def __init__(self, path):
        self.spans = list(lbz.structure_spans(lbz.Archive(path)))
        self.pieces = {}
        for name, offset, length in self.spans:
            piece = name.partition(".")[0]
            begin, end = self.pieces.get(piece, (offset, offset))
            self.pieces[piece] = (begin, max(end, offset + length))

    def piece_at(self, offset):
        """(name, begin, end) of the piece that holds a byte."""
        for name, (begin, end) in self.pieces.items():
            if begin <= offset < end:
                return name, begin, end
        raise Failure(f"no structure at {offset}")


def expect_located(result, file, piece, begin, end):
    """The message names file, offset and, for content, the guest range."""
    # Without its first bytes nothing tells that it is an archive.
    if re.search(f"^lbverify: {re.escape(file)}: not an lbz archive$",
                 result.err, re.MULTILINE) and piece == "header":
        return
    result.mentions(f"^lbverify: {re.escape(file)}: damaged at offset ")
    offsets = [int(text) for text in
               re.findall(r"damaged at offset (\d+)", result.err)]
    if not any(begin <= offset < end for offset in offsets):
        raise Failure(f"offset {offsets}, damaged is [{begin}, {end})\n"
                      f"{result}")
    if piece.startswith(("record", "frame", "page")):
        result.mentions(r"guest range 0x[0-9a-f]+-0x[0-9a-f]+")


def check_index(path, piece=None, begin=0, end=0):
    """lbverify of a file."""
    result = run(["lbverify", "--threads=1", path]).expect(4)
    if piece is not None:
        expect_located(result, path, piece, begin, end)


def check_pipe(path, located=True):
    """lbverify of standard input, storing it."""
    stored = os.path.join(workplace(), "stored.lbz")
    result = run(["lbverify", "--threads=1", "-o", stored, "-"],
                 stdin=path).expect(4)
    result.mentions(r"^lbverify: standard input: (damaged at offset \d+: |"
                    "not an lbz archive)" if located else "")
    expect_absent(stored)


def check_restore(path, parents=()):
    """lbrestore of a chain that ends with the file."""
    target = os.path.join(workplace(), "restored.qcow2")
    run(["lbrestore", "--threads=1", "-o", target, *parents,
         path]).expect(4).mentions(re.escape(path))
    expect_absent(target)


def check_restore_pipe(path):
    """lbrestore from standard input."""
    target = os.path.join(workplace(), "restored.raw")
    run(["lbrestore", "--threads=1", "-o", target, "-"],
        stdin=path).expect(4).mentions("^lbrestore: standard input: ")
    expect_absent(target)


def check_merge(path, parents=()):
    """lbmerge, which reads all that is live of its inputs."""
    target = os.path.join(workplace(), "merged.lbz")
    run(["lbmerge", "--threads=1", "-o", target, *parents,
         path]).expect(4).mentions(re.escape(path))
    expect_absent(target)


def check_all(name, path, piece=None, begin=0, end=0):
    """Every way in which a damaged archive is read."""
    parents = ("full.lbz",) if name == "incremental" else ()
    check_index(path, piece, begin, end)
    check_pipe(path)
    check_restore(path, parents)
    if not parents:
        check_restore_pipe(path)
    check_merge(path, parents)


def check_flip(case):
    """One byte of an archive is another."""
    _, name, data, offset, value, (piece, begin, end) = case
    damaged = bytearray(data)
    damaged[offset] ^= value
    path = os.path.join(workplace(), "damaged.lbz")
    write(path, damaged)
    check_all(name, path, piece, begin, end)


def flips(name, places):
    """Cases of one archive: (offset, value) of each flip."""
    data = read(name + ".lbz")
    structures = Structures(name + ".lbz")
    for offset, value in places(structures, data):
        piece = structures.piece_at(offset)
        yield (f"{name}.lbz, byte {offset} of {len(data)} in {piece[0]} "
               f"changed by {value:#x}",
               name, data, offset, value, piece)


@claim
def sound_archives():
    """The other claims would pass with tools that refuse everything."""
    make_archives()
    for name in NAMES:
        parents = ["full.lbz"] if name == "incremental" else []
        path = name + ".lbz"
        run(["lbverify", path]).expect(0)
        run(["lbverify", "-"], stdin=path).expect(0)
        run(["lbrestore", "-o", f"{name}.qcow2", *parents, path]).expect(0)
        if not parents:
            run(["lbrestore", "-o", f"{name}.raw", "-"], stdin=path).expect(0)
        run(["lbmerge", "-o", f"{name}.merged", *parents, path]).expect(0)


@claim
def flips_in_structures():
    """One flipped byte in every field of every structure."""
    make_archives()
    rng = random.Random(1)

    def one_of_each(structures, _):
        for _, offset, length in thin(structures.spans, 3):
            if length > 0:
                yield (offset + rng.randrange(length),
                       1 << rng.randrange(8))

    each((case for name in NAMES for case in flips(name, one_of_each)),
         check_flip)


@claim
def flips_at_random():
    """A thousand flipped bytes, anywhere."""
    make_archives()
    rng = random.Random() if NIGHTLY else random.Random(2)
    count = 100 if SANITIZED else 1250 if NIGHTLY else 275

    def anywhere(_, data):
        for _ in range(count):
            yield rng.randrange(len(data)), rng.randrange(1, 256)

    each((case for name in NAMES for case in flips(name, anywhere)),
         check_flip)


def small_archive():
    """One frame of one block."""
    data = lbz.Maker({"virtual_size": 1 << 20,
                      "blocks": [{"offset": 0, "fill": 3}]}).make()
    write("small.lbz", data)
    run(["lbverify", "small.lbz"]).expect(0)
    return data


def check_cut(case):
    """The archive ends too early."""
    _, name, data = case
    path = os.path.join(workplace(), "cut.lbz")
    write(path, data)
    check_all(name, path)


@claim
def cuts_of_any_length():
    """All lengths of a small archive, some of larger ones."""
    make_archives()
    rng = random.Random() if NIGHTLY else random.Random(3)
    data = small_archive()
    cases = [(f"small.lbz cut to {n}", "small", data[:n])
             for n in thin(range(len(data)), 8)]
    for name in NAMES:
        data = read(name + ".lbz")
        for _ in range(25 if SANITIZED else 50):
            n = rng.randrange(len(data))
            cases.append((f"{name}.lbz cut to {n}", name, data[:n]))
    each(cases, check_cut)


@claim
def bytes_behind():
    """Something follows the trailer."""
    make_archives()
    tails = {"zero": b"\0", "zeroes": bytes(4096), "text": b"more\n",
             "skippable frame": bytes.fromhex("5b2a4d1800000000"),
             "zstd frame": bytes.fromhex("28b52ffd2400010000"),
             "end mark": read("full.lbz")[-16:]}
    cases = []
    for name in NAMES:
        data = read(name + ".lbz")
        tails["archive"] = data
        cases += [(f"{name}.lbz and {what}", name, data + tail)
                  for what, tail in tails.items()]
    each(cases, check_cut)


def guest_ranges(text):
    """What lbverify says of guest ranges."""
    return [(int(first, 16), int(last, 16)) for first, last in
            re.findall(r"guest range 0x([0-9a-f]+)-0x([0-9a-f]+)", text)]


@claim
def several_damages():
    """All frames are checked, also behind a damaged one."""
    make_archives()
    structures = Structures("full.lbz")
    frames = [frame for page in lbz.Archive("full.lbz").pages
              for frame in page.frames]
    damaged = bytearray(read("full.lbz"))
    hurt = [frames[0], frames[-1]]
    for frame in hurt:
        damaged[frame.data_offset + frame.compressed_size // 2] ^= 1
    write("two.lbz", damaged)
    result = run(["lbverify", "two.lbz"]).expect(4)
    wanted = [(frame.guest_block * lbz.BLOCK,
               (frame.guest_block + frame.blocks) * lbz.BLOCK - 1)
              for frame in hurt]
    if guest_ranges(result.err) != wanted:
        raise Failure(f"not the ranges {wanted}\n{result}")

    # A page of which nothing is known, and a frame of another page.
    damaged = bytearray(read("full.lbz"))
    damaged[structures.pieces["page[0]"][0] + 60] ^= 1
    damaged[frames[-1].data_offset + 9] ^= 1
    write("page.lbz", damaged)
    result = run(["lbverify", "page.lbz"]).expect(4)
    if guest_ranges(result.err) != [(0, lbz.PAGE_RANGE - 1), wanted[1]]:
        raise Failure(f"not page and frame\n{result}")

    # The archives behind a damaged one.
    result = run(["lbverify", "two.lbz", "incremental.lbz",
                  "page.lbz"]).expect(4)
    if len(guest_ranges(result.err)) != 4:
        raise Failure(f"not all files are checked\n{result}")


@claim
def refuses_parts_of_a_chain():
    """A damaged parent, a sound child: nothing is restored."""
    make_archives()
    damaged = bytearray(read("full.lbz"))
    frame = lbz.Archive("full.lbz").pages[0].frames[0]
    damaged[frame.data_offset + 30] ^= 0x10
    write("parent.lbz", damaged)
    for argv in (["lbrestore", "-o", "restored.qcow2"],
                 ["lbmerge", "-o", "merged.lbz"],
                 ["lbverify"],
                 ["lbverify", "--image", "disk.qcow2"]):
        run([*argv, "parent.lbz", "incremental.lbz"]).expect(4).mentions(
            r"parent\.lbz: damaged at offset \d+: .*guest range 0x0-0x")
    expect_absent("restored.qcow2")
    expect_absent("merged.lbz")
    write("kept.qcow2", b"what was there before")
    run(["lbrestore", "--force", "-o", "kept.qcow2", "parent.lbz",
         "incremental.lbz"]).expect(4)
    if read("kept.qcow2") != b"what was there before":
        raise Failure("the file that --force would replace has changed")


@claim
def damage_on_standard_output():
    """lbmerge to a redirected file leaves nothing that looks like an
    archive."""
    make_archives()
    damaged = bytearray(read("full.lbz"))
    frame = lbz.Archive("full.lbz").pages[-1].frames[-1]
    damaged[frame.data_offset + 3] ^= 0x10
    write("bad.lbz", damaged)
    with open("out.lbz", "wb") as out:
        run(["lbmerge", "bad.lbz"], stdout=out).expect(4)
    if os.path.getsize("out.lbz") != 0:
        raise Failure("a part of the merged archive is left")
    sh("rm", "out.lbz")


if __name__ == "__main__":
    sys.exit(main())
