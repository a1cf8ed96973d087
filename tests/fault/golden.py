#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that are kept for ever, in tests/golden/.

Those in accepted/ must stay readable and mean what they meant: the manifest
has the receipt of each archive, the digest of the disk that each chain
restores to, and content and checkpoints of each image.  Those in rejected/
must be refused by the same command with the same status and message; where a
message is changed on purpose, so is the manifest.  Files called oracle-... and
the rejected archives were made by the independent implementation.
"""

import hashlib
import json
import os
import shutil
import sys

from faultlib import (Failure, TOP, claim, expect_absent, expect_sound, main,
                      read, remove, run)
import lbz


def fetch(kind):
    """Copies of the golden files, and their manifest."""
    folder = os.path.join(TOP, "tests", "golden", kind)
    for name in os.listdir(folder):
        shutil.copyfile(os.path.join(folder, name), name)
    return json.loads(read("manifest.json"))


def expect_digest(path, wanted):
    """Content of a raw disk."""
    found = hashlib.sha256(read(path)).hexdigest()
    if found != wanted:
        raise Failure(f"{path}: content is {found}, was {wanted}")


@claim
def accepted_archives():
    """Receipts and content."""
    manifest = fetch("accepted")
    for name, receipt in manifest["archives"].items():
        for source in (name, "-"):
            result = run(["lbverify", "--receipt", source], stdin=name)
            if result.expect(0).out.decode().strip() != receipt:
                raise Failure(f"{name}: {result.out}, was {receipt}")
        archive = lbz.Archive(name)
        if f"{archive.header['backup_uuid']} {archive.root.hex()}" != receipt:
            raise Failure(f"{name}: the oracle disagrees")
    for chain in manifest["chains"]:
        remove("restored.raw", "out.lbz")
        run(["lbrestore", "-q", "-o", "restored.raw",
             *chain["archives"]]).expect(0)
        expect_digest("restored.raw", chain["sha256"])
        remove("restored.raw")
        run(["lbmerge", "-q", "-o", "out.lbz",
             *chain["archives"]]).expect(0)
        run(["lbrestore", "-q", "-o", "restored.raw", "out.lbz"]).expect(0)
        expect_digest("restored.raw", chain["sha256"])


@claim
def accepted_images():
    """Content and checkpoints."""
    manifest = fetch("accepted")
    for name, wanted in manifest["images"].items():
        status = run(["lbctl", "status", "--json", name]).expect(0).json()
        checkpoints = [{key: checkpoint[key] for key in wanted_one}
                       for checkpoint, wanted_one in
                       zip(status["checkpoints"], wanted["checkpoints"])]
        if (status["keyword"] != wanted["keyword"]
                or status["image_uuid"] != wanted["image_uuid"]
                or len(status["checkpoints"]) != len(wanted["checkpoints"])
                or checkpoints != wanted["checkpoints"]):
            raise Failure(f"{name}: {json.dumps(status)}")
        remove("dump.lbz", "restored.raw")
        run(["lbdump", "-q", "--copy", "-o", "dump.lbz", name]).expect(0)
        run(["lbrestore", "-q", "-o", "restored.raw", "dump.lbz"]).expect(0)
        expect_digest("restored.raw", wanted["sha256"])
        remove("next.lbz")
        run(["lbdump", "-q", "--incremental", "-o", "next.lbz",
             name]).expect(0)
        expect_sound(name)


@claim
def rejected():
    """Status and message of each."""
    for name, wanted in fetch("rejected").items():
        result = run([*wanted["argv"], name]).expect(wanted["status"])
        if result.err.splitlines() != wanted["message"]:
            raise Failure(f"was {wanted['message']}\n{result}")
        expect_absent("never.lbz")


if __name__ == "__main__":
    sys.exit(main())
