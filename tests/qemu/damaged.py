#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Damaged extensions, bitmap directories and tables, in a patched QEMU.

The guest's data is neither refused nor changed because of them; lbctl,
`qemu-img info` and the independent reader say that nothing is trusted; a repair
and `lbctl recover` mend them, and a full dump begins a new chain.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys

from qemulib import (Disk, Failure, NIGHTLY, call, claim, copy,
                     driver_keyword, dump, each, expect_chain_is,
                     expect_claims_kept, img, info_of, main, oracle_trust,
                     read, remove, run, session, workplace)
import hostile
import lbext
import qcow2

# --------------------------------------------------------------------------
# Images of the oracle
# --------------------------------------------------------------------------


def images(wanted):
    """(name, entry of the manifest) of the hostile images that are wanted."""
    if not os.path.exists("images"):
        hostile.write_all("images")
    manifest = json.loads(read("images/manifest.json"))
    return sorted((name, entry) for name, entry in manifest.items()
                  if wanted(name))


def is_ours(name):
    """Damage in what belongs to livebackup."""
    return name.startswith(("bitmap-", "livebackup-"))


def with_companions(name):
    """The image beside the files that it may name."""
    folder = os.path.join(workplace(), "images")
    if not os.path.exists(folder):
        shutil.copytree("images", folder)
    target = os.path.join(folder, name + ".qcow2")
    copy(f"images/{name}.qcow2", target)
    return target


def content(path, who="P"):
    """What the guest reads."""
    raw = path + ".raw"
    img(who, "convert", "-f", "qcow2", "-O", "raw", path, raw)
    data = read(raw)
    remove(raw)
    return data


def expect_untrusted(path, keyword=None):
    """By all three; and no incremental.  What only one of them can look at is
    no matter: but none may be the one that trusts it."""
    status = run(["lbctl", "status", "--json", path]).expect(0).json()
    verdict = oracle_trust(path)[1]
    ours = said_by([status] + status["checkpoints"])
    theirs = said_by([verdict] + verdict["checkpoints"])
    if ours != theirs:
        raise Failure(f"lbctl: {ours}, oracle: {theirs}")
    if keyword is not None and keyword not in ours:
        raise Failure(f"lbctl: {ours}, expected {keyword}")
    info = info_of("P", path).get("livebackup")
    driver = info["trust"] if info else "off"
    # One bad entry is the whole directory's to QEMU.
    if driver not in (driver_keyword(path), "directory-damaged"):
        raise Failure(f"driver: {driver}, oracle: {driver_keyword(path)}")
    result = run(["lbdump", "--copy", "--incremental", path])
    parent = [c["keyword"] for c in status["checkpoints"] if c["confirmed"]]
    if ours[0] != "trusted" or not parent or parent[-1]:
        result.expect(3)
        return False
    return True


def write_to(path, killed=False):
    """Half a KiB at 66048; it may complain, but not fail."""
    argv = ["-f", "qcow2", "-c", "write -P 9 66048 512", "-c", "flush"]
    done = call("P", "qemu-io", *argv,
                *(["-c", "sigraise 9"] if killed else []), path,
                died_of=signal.SIGKILL if killed else None)
    if not killed and b"wrote 512/512" not in done.out:
        raise Failure(f"the guest can't write\n{done}")


def said_by(objects):
    """Keywords."""
    return [found["keyword"] or "trusted" for found in objects]


def check_damaged(case):
    """Opened for reading, for writing; mended."""
    name, entry = case
    path = with_companions(name)
    good = entry["trust"] == "trusted" == entry["trust_checkpoint"]
    keyword = (entry["trust"] if entry["trust"] != "trusted"
               else entry["trust_checkpoint"])
    before = content(path)
    if hashlib.sha256(before).hexdigest() != entry["sha256"]:
        raise Failure("the guest reads something else")
    if expect_untrusted(path, keyword) != good:
        raise Failure("an incremental is possible" if not good else
                      "no incremental is possible")
    session("P", path, "read 0 512")
    write_to(path)
    after = bytearray(before)
    after[66048:66560] = bytes([9]) * 512
    if content(path) != after:
        raise Failure("a write has changed something else")
    if expect_untrusted(path) and not good:
        raise Failure("trusted after a write")
    if not good:
        expect_mended(path, entry, after)


def expect_mended(path, entry, after):
    """By check and recover, and then a full dump."""
    img("P", "check", "-q", "-r", "all", "-f", "qcow2", path,
        status=(0, 1, 2, 3))
    recovered = run(["lbctl", "recover", path])
    if entry["trust"] == "unsupported":
        # Of another version: nobody may write it.
        recovered.expect(1, 3)
        return
    if entry["trust"] == "off":
        recovered.expect(0)
        return
    recovered.expect(0)
    img("S10", "check", "-q", "-f", "qcow2", path)
    if content(path) != after:
        raise Failure("a repair has changed the guest's data")
    full = path + ".lbz"
    dump(path, full)
    session("P", path, "write -P 7 1024 4096", killed=True)
    session("S7", path, "write -P 6 131072 512")
    expect_claims_kept(path, [full], "trusted")


@claim
def damaged_images():
    """Each of the oracle's."""
    each(images(is_ours), check_damaged)


def check_other(case):
    """As a stock QEMU of the same version takes it."""
    name, _ = case
    for argv in (["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 64k"],
                 ["qemu-io", "-f", "qcow2", "-c", "write -P 3 512 512"],
                 ["qemu-img", "check", "-f", "qcow2"],
                 ["qemu-img", "info", "-f", "qcow2"],
                 ["qemu-img", "check", "-r", "all", "-f", "qcow2"]):
        found = {}
        for who in ("S10", "P"):
            path = with_companions(name)
            found[who] = call(who, *argv, path, status=None)
        if found["S10"].status != found["P"].status:
            raise Failure(f"stock: {found['S10']}\nours: {found['P']}")


@claim
def other_hostile_images():
    """Of what has nothing to do with livebackup nothing changes."""
    # A loop of backing files takes any QEMU a minute.
    each(images(lambda name: not is_ours(name) and "loop" not in name),
         check_other)


# --------------------------------------------------------------------------
# Random damage
# --------------------------------------------------------------------------

def make_base():
    """A disk with two checkpoints and an archive.  Returns its path and the
    places that hold what is ours: [(offset, length)]."""
    folder = os.path.abspath("base")
    path = Disk("3M", 512, cluster_size=4096).make(folder)
    session("P", path, "write -P 1 0 3M")
    dump(path, os.path.join(folder, "full.lbz"))
    session("P", path, "write -P 2 1M 8k")
    run(["lbdump", "-q", "--incremental", path]).expect(0)
    session("P", path, "write -P 3 2M 8k")
    trust = oracle_trust(path)[0]
    image = trust.image
    extension = image.bitmaps_extension()
    at = [offset for kind, offset, _ in image.extensions
          if kind == qcow2.EXT_BITMAPS][0]
    places = [(trust.live.offset, 128 + 3 * 64), (trust.live.offset, 128),
              (at, qcow2.BITMAPS.size),
              (extension["directory_offset"], extension["directory_size"])]
    for entry in image.bitmaps():
        places.append((entry["table_offset"], entry["table_size"] * 8))
    return path, places


def stock_alone_refuses(path):
    """A name that does not begin with lb- any more, as 'l' and a zero byte, is
    that of a bitmap of others, for which QEMU refuses to write."""
    names = [entry["name"] for entry in oracle_bitmaps(path)]
    if not any(b"\0" in name[:3] for name in names):
        return False
    trial = path + ".trial"
    copy(path, trial)
    return call("S10", "qemu-io", "-f", "qcow2", "-c", "write 0 512", trial,
                status=(0, 1)).status == 1


def oracle_bitmaps(path):
    """Entries of the directory, if it can be read."""
    try:
        return qcow2.Header(path).bitmaps()
    except qcow2.BitmapError:
        return []


def verdict_by_lbctl(path):
    """Keyword of the image."""
    return run(["lbctl", "status", "--json", path]).expect(0).json()["keyword"]


def spoil(path, places, dice):
    """A few bytes; the checksum is made right, or not."""
    with open(path, "r+b") as file:
        for _ in range(dice.choice((1, 1, 2, 5))):
            offset, length = dice.choice(places)
            file.seek(offset + dice.randrange(length))
            file.write(bytes([dice.choice((0, 1, 255, dice.randrange(256)))]))
    if dice.random() < .8:
        try:
            lbext.Poker(path).fix_crc()
        except Exception:  # pylint: disable=broad-except
            pass


@claim
def random_damage():
    """All agree, and the guest's data is whatever it was."""
    base, places = make_base()
    before = content(base)

    def check(seed):
        dice = random.Random(seed)
        folder = os.path.join(workplace(), "random")
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        path = os.path.join(folder, "disk.qcow2")
        copy(base, path)
        spoil(path, places, dice)
        if verdict_by_lbctl(path) == "unsupported":
            return              # the directory is not ours then
        if "padding" in oracle_trust(path)[1]["why"]:
            return              # QEMU does not look at it
        if stock_alone_refuses(path):
            return
        trusted = expect_untrusted(path)
        if content(path) != before:
            raise Failure("the guest reads something else")
        write_to(path, dice.random() < .3)
        after = bytearray(before)
        after[66048:66560] = bytes([9]) * 512
        if content(path) != after:
            raise Failure("a write has changed something else")
        if expect_untrusted(path) and not trusted:
            raise Failure("trusted after a write")
        img("P", "check", "-q", "-r", "all", "-f", "qcow2", path,
            status=(0, 1, 2, 3))
        if content(path) != after:
            raise Failure("a repair has changed the guest's data")
        if run(["lbctl", "recover", path]).status == 0:
            full = path + ".lbz"
            dump(path, full)
            expect_chain_is(path, [full])

    each([(f"seed {seed}",) for seed in range(2000 if NIGHTLY else 150)],
         lambda case: check(case[0]))


if __name__ == "__main__":
    sys.exit(main())
