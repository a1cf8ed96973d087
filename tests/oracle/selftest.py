# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests the oracle against itself, zstd, qemu-img and qemu-io.

An oracle that is wrong is worse than none: what it makes must be accepted by
programs that we did not write, what it reads must equal what they read, and
each rule must be seen to refuse something.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import unittest
import uuid

import hostile
import hostile_archives
import lbext
import lborig
import lbz
import qcow2

BLOCK = lbz.BLOCK
QEMU = shutil.which("qemu-img") and shutil.which("qemu-io")
UUIDS = [str(uuid.UUID(int=n, version=4)) for n in range(1, 40)]
BOOT = str(uuid.UUID(int=0xB007, version=4))
OTHER_BOOT = str(uuid.UUID(int=0xB008, version=4))
DEVICE = 77


class TemporaryDirectory(unittest.TestCase):
    """Each test runs in a directory of its own."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="oracle-")
        self.addCleanup(directory.cleanup)
        old = os.getcwd()
        os.chdir(directory.name)
        self.addCleanup(os.chdir, old)

    def tool(self, module, *args, status=0):
        """Run a command of the oracle; return its standard output."""
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), \
                contextlib.redirect_stderr(errors):
            result = module.main([str(arg) for arg in args])
        self.assertEqual(result, status, out.getvalue() + errors.getvalue())
        return out.getvalue()

    def run_program(self, *args, status=0):
        """Run a program of others; return its output."""
        done = subprocess.run(args, stdout=subprocess.PIPE, timeout=50,
                              stderr=subprocess.STDOUT, text=True)
        self.assertEqual(done.returncode, status, done.stdout)
        return done.stdout


def write_file(name, data):
    """Write a whole file."""
    with open(name, "wb") as file:
        file.write(data)


def read_file(name):
    """Read a whole file."""
    with open(name, "rb") as file:
        return file.read()


# --------------------------------------------------------------------------
# Archives
# --------------------------------------------------------------------------

class Disk:
    """A model of a disk that is backed up: content, and the archives."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.content = {}              # block -> bytes, absent: zero
        self.size = self.random_size()
        self.dirty = set()
        self.clip = lbz.NO_CLIP
        self.parent = None
        self.parent_size = 0
        self.archives = []             # (spec, content, size)

    def random_size(self):
        """Some blocks, seldom a whole number of them."""
        return (self.random.randrange(1, 60) * BLOCK
                + self.random.choice((0, 512, 1000)))

    def blocks(self):
        """Number of blocks of the disk."""
        return -(-self.size // BLOCK)

    def step(self):
        """Something that a guest, or an operator, does."""
        choice = self.random.random()
        if choice < 0.2:
            self.resize(self.random_size())
            return
        for _ in range(self.random.randrange(1, 12)):
            block = self.random.randrange(self.blocks())
            if choice < 0.4:
                self.content.pop(block, None)
            else:
                self.content[block] = self.cut(
                    block, lbz.seeded_block(self.random.random()))
            self.dirty.add(block)

    def cut(self, block, data):
        """Zeroes behind the end of the disk."""
        return data[:max(self.size - block * BLOCK, 0)].ljust(BLOCK, b"\0")

    def resize(self, size):
        """Shrinking drops content for ever."""
        self.size = size
        self.clip = min(self.clip, size)
        for block in list(self.content):
            if block * BLOCK >= size:
                del self.content[block]
                self.dirty.discard(block)
            else:
                self.content[block] = self.cut(block, self.content[block])
        if size % BLOCK:
            self.dirty.add(size // BLOCK)
        self.dirty = {block for block in self.dirty if block * BLOCK < size}

    def backup(self, full):
        """Append an archive's description."""
        own = str(uuid.UUID(int=self.random.getrandbits(128), version=4))
        which = self.content if full else self.dirty
        blocks = []
        for block in sorted(which):
            item = {"offset": block * BLOCK, "kind": "zero"}
            if block in self.content:
                name = f"{own}.{block}"
                write_file(name, self.content[block])
                item.update(kind="data", file=name, at=0)
            blocks.append(item)
        spec = {"kind": "full" if full else "incremental",
                "virtual_size": self.size, "backup_uuid": own,
                "digest": self.random.choice(("xxh3", "sha256")),
                "group": self.random.randrange(1, 17), "blocks": blocks}
        if not full:
            spec["parent_uuid"] = self.parent
            if self.clip < self.size:
                spec["clip"] = self.clip
        self.parent, self.dirty = own, set()
        self.clip = lbz.NO_CLIP
        self.archives.append((spec, dict(self.content), self.size))


class ArchiveTest(TemporaryDirectory):
    """lbz.py"""

    def make(self, name, spec):
        """Generate an archive through the command line."""
        write_file("spec.json", json.dumps(spec).encode())
        self.tool(lbz, "make", "-o", name, "spec.json")

    def refusal(self, data):
        """The exception that reading `data` raises."""
        write_file("refused.lbz", data)
        with self.assertRaises(lbz.Damaged) as caught:
            lbz.Archive("refused.lbz")
        return caught.exception

    def test_good_archives_are_accepted_by_zstd_too(self):
        for name, spec in hostile_archives.GOOD.items():
            with self.subTest(name):
                write_file("good.lbz", hostile_archives.make(spec))
                self.assertEqual(self.tool(lbz, "verify", "good.lbz"), "")
                self.run_program("zstd", "-tq", "good.lbz")

    def test_every_damage_is_refused(self):
        for name, (spec, mention) in hostile_archives.DAMAGED.items():
            with self.subTest(name):
                error = self.refusal(hostile_archives.make(spec))
                self.assertNotIsInstance(error, lbz.Unsupported)
                self.assertRegex(str(error), "(?i)" + mention)

    def test_what_is_newer_is_unsupported(self):
        for name, (spec, mention) in hostile_archives.UNSUPPORTED.items():
            with self.subTest(name):
                error = self.refusal(hostile_archives.make(spec))
                self.assertIsInstance(error, lbz.Unsupported)
                self.assertRegex(str(error), "(?i)" + mention)

    def test_every_flipped_byte_is_detected(self):
        data = hostile_archives.make(hostile_archives.incremental(
            clip=100000, virtual_size=34 * BLOCK))
        for at in range(len(data)):
            flipped = bytearray(data)
            flipped[at] ^= 1 << at % 8
            self.refusal(bytes(flipped))

    def test_every_truncation_is_detected(self):
        data = hostile_archives.make(hostile_archives.incremental())
        for length in range(len(data)):
            self.refusal(data[:length])

    def test_structures_cover_every_byte_once(self):
        for name, spec in hostile_archives.GOOD.items():
            with self.subTest(name):
                data = hostile_archives.make(spec)
                write_file("good.lbz", data)
                position = 0
                for span in json.loads(self.tool(lbz, "structures",
                                                 "good.lbz")):
                    self.assertEqual(span["offset"], position, span["name"])
                    position += span["length"]
                self.assertEqual(position, len(data))

    def test_verify_says_what_and_where(self):
        write_file("bad.lbz", hostile_archives.make(
            hostile_archives.field("header.kind", 2)))
        out = self.tool(lbz, "verify", "bad.lbz", status=4)
        self.assertRegex(out, r"^bad\.lbz: damaged: kind .* at 33\n$")

    def test_root_is_in_the_dump(self):
        self.make("a.lbz", hostile_archives.full())
        root, own = self.tool(lbz, "root", "a.lbz").split()
        dump = json.loads(self.tool(lbz, "dump", "a.lbz"))
        self.assertEqual(dump["root_digest"], root)
        self.assertEqual(dump["header"]["backup_uuid"], own)

    def test_random_chains_restore_to_the_model(self):
        for seed in range(12):
            with self.subTest(seed=seed):
                self.check_random_chain(Disk(seed))

    def check_random_chain(self, disk):
        """A full and some incrementals, each state restored."""
        names = []
        for number in range(5):
            for _ in range(disk.random.randrange(4)):
                disk.step()
            disk.backup(full=number == 0)
            names.append(f"{number}.lbz")
            self.make(names[-1], disk.archives[-1][0])
        shuffled = disk.random.sample(names, len(names))
        for spec, content, size in disk.archives:
            self.tool(lbz, "restore", "-o", "out.raw", "--at",
                      spec["backup_uuid"], *shuffled)
            wanted = b"".join(content.get(block, bytes(BLOCK)) for block
                              in range(-(-size // BLOCK)))[:size]
            self.assertTrue(read_file("out.raw") == wanted)

    def test_chains_that_are_not_there(self):
        self.make("full.lbz", {"backup_uuid": UUIDS[0]})
        self.make("left.lbz", {"kind": "incremental", "backup_uuid": UUIDS[1],
                               "parent_uuid": UUIDS[0]})
        self.make("right.lbz", {"kind": "incremental",
                                "backup_uuid": UUIDS[2],
                                "parent_uuid": UUIDS[0]})
        self.make("over.lbz", {"kind": "incremental", "backup_uuid": UUIDS[3],
                               "parent_uuid": UUIDS[0],
                               "covered": UUIDS[1:3]})
        restore = ("restore", "-o", "out.raw")
        self.tool(lbz, *restore, "full.lbz", "left.lbz")
        self.tool(lbz, *restore, "full.lbz", "left.lbz", "right.lbz",
                  status=3)
        self.tool(lbz, *restore, "full.lbz", "left.lbz", "right.lbz",
                  "over.lbz")
        self.tool(lbz, *restore, "left.lbz", status=3)
        self.tool(lbz, *restore, "--at", UUIDS[2], "full.lbz", "left.lbz",
                  status=3)
        self.tool(lbz, *restore, "full.lbz", "full.lbz", status=3)


# --------------------------------------------------------------------------
# qcow2
# --------------------------------------------------------------------------

VARIANTS = (
    ("compat=0.10", True), ("compat=1.1", True), ("cluster_size=512", True),
    ("cluster_size=4k,refcount_bits=1", True), ("cluster_size=2M", True),
    ("refcount_bits=2", False), ("refcount_bits=8", False),
    ("refcount_bits=64", True), ("extended_l2=on", True),
    ("extended_l2=on,cluster_size=16k", True),
    ("compression_type=zstd", True), ("lazy_refcounts=on", False),
    ("preallocation=metadata", False), ("data_file=d.raw", False),
    ("data_file=d.raw,data_file_raw=on", False),
)


@unittest.skipUnless(QEMU, "no qemu-img")
class Qcow2Test(TemporaryDirectory):
    """qcow2.py against QEMU"""

    def setUp(self):
        super().setUp()
        noise = random.Random(1)
        with open("source.raw", "wb") as file:
            file.truncate((9 << 20) + 3 * 512)
            for _ in range(40):
                file.seek(noise.randrange(8 << 20))
                file.write(noise.randbytes(noise.randrange(3000))
                           + b"repeated" * noise.randrange(9000))
            file.seek(1 << 20)
            file.write(b"under the zeroes" * 20000)

    def assert_same(self, image):
        """Our reading of an image equals QEMU's."""
        self.run_program("qemu-img", "convert", "-f", "qcow2", "-O", "raw",
                         image, "qemu.raw")
        self.tool(qcow2, "read", image, "-o", "ours.raw")
        wanted = read_file("qemu.raw")
        self.assertTrue(read_file("ours.raw") == wanted, image)
        self.assertEqual(self.tool(qcow2, "sha", image).strip(),
                         hashlib.sha256(wanted).hexdigest())

    def assert_refcounts(self, image, leaks=False):
        """Our check finds nothing."""
        found = json.loads(self.tool(qcow2, "refcheck", image))
        self.assertEqual(found["corruptions"], [])
        self.assertEqual(bool(found["leaks"]), leaks)

    def test_variants_read_back_equal(self):
        for options, compressible in VARIANTS:
            for flags in ((), ("-c",)) if compressible else ((),):
                with self.subTest(options, flags=flags):
                    for name in ("a.qcow2", "d.raw"):
                        if os.path.exists(name):
                            os.remove(name)
                    self.run_program(
                        "qemu-img", "convert", *flags, "-f", "raw", "-O",
                        "qcow2", "-o", options, "source.raw", "a.qcow2")
                    self.assert_same("a.qcow2")
                    self.assert_refcounts("a.qcow2")

    def make_overlay(self, options, name, below, below_format):
        """An overlay with data, zeroes and discards, larger than below."""
        self.run_program("qemu-img", "create", "-q", "-f", "qcow2", "-o",
                         options, "-b", below, "-F", below_format, name,
                         "10M")
        self.run_program(
            "qemu-io", "-f", "qcow2", "-c", "write -P 1 65k 3k",
            "-c", "write -z 1M 129k", "-c", "write -P 2 3000k 300k",
            "-c", "write -z -u 3100k 20k", "-c", "write -c -P 3 4M 64k",
            "-c", "discard 5M 200k", "-c", "write -P 4 9999k 1k", name)

    def test_backing_chains_read_back_equal(self):
        for options in ("compat=1.1", "extended_l2=on", "cluster_size=1k"):
            with self.subTest(options):
                self.make_overlay(options, "mid.qcow2", "source.raw", "raw")
                self.make_overlay("compat=1.1", "top.qcow2", "mid.qcow2",
                                  "qcow2")
                self.run_program("qemu-io", "-f", "qcow2", "-c",
                                 "write -P 9 2M 1k", "top.qcow2")
                for name in ("mid.qcow2", "top.qcow2"):
                    self.assert_same(name)
                    self.assert_refcounts(name)

    def test_snapshots_leave_the_active_layer_readable(self):
        self.run_program("qemu-img", "convert", "-O", "qcow2", "source.raw",
                         "a.qcow2")
        for number in range(2):
            self.run_program("qemu-img", "snapshot", "-c", f"s{number}",
                             "a.qcow2")
            self.run_program("qemu-io", "-f", "qcow2", "-c",
                             f"write -P {number + 5} {number}M 300k",
                             "a.qcow2")
        self.assert_same("a.qcow2")
        self.assert_refcounts("a.qcow2")

    def test_refcheck_finds_leak_and_corruption(self):
        image = hostile.Builder()
        image.put(hostile.REFBLOCK + 2 * 9, 1, 2)
        write_file("leak.qcow2", image.build())
        self.assert_refcounts("leak.qcow2", leaks=True)
        image = hostile.Builder()
        image.put(hostile.REFBLOCK + 2 * 6, 0, 2)
        write_file("corrupt.qcow2", image.build())
        self.tool(qcow2, "refcheck", "corrupt.qcow2", status=4)
        write_file("overlap.qcow2", hostile.patched(
            hostile.L2, hostile.L2 | qcow2.COPIED).build())
        self.tool(qcow2, "refcheck", "overlap.qcow2", status=4)

    def test_hostile_images_get_their_verdict(self):
        self.tool(qcow2, "hostile", ".")
        with open("manifest.json") as file:
            manifest = json.load(file)
        for name, wanted in manifest.items():
            with self.subTest(name):
                self.check_verdict(name + ".qcow2", wanted)

    def survive(self, path):
        """Commands that don't read content may fail, but by a message."""
        for module, command in ((qcow2, "refcheck"), (lbext, "show"),
                                (lbext, "check"), (lbext, "trust")):
            with contextlib.redirect_stdout(io.StringIO()), \
                    contextlib.redirect_stderr(io.StringIO()):
                self.assertIn(module.main([command, path]), (0, 1, 4))

    def check_verdict(self, path, wanted):
        """Open, read, and evaluate trust."""
        verdict, message, content = "ok", "", None
        try:
            content = qcow2.sha256_of(qcow2.Image(path))
        except qcow2.Refused as error:
            verdict, message = "refuse", str(error)
        except qcow2.ReadError as error:
            verdict, message = "read-error", str(error)
        self.survive(path)
        if wanted["verdict"] == "any":
            return
        self.assertEqual(verdict, wanted["verdict"], message)
        self.assertEqual(content, wanted.get("sha256"))
        self.assertTrue(re.search(wanted["mention"], message, re.I), message)
        if "trust" in wanted:
            trust = lbext.Trust(qcow2.Header(path), BOOT, DEVICE).evaluate()
            self.assertEqual(trust["keyword"], wanted["trust"])
            for checkpoint in trust["checkpoints"]:
                self.assertEqual(checkpoint["keyword"],
                                 wanted["trust_checkpoint"])


# --------------------------------------------------------------------------
# Livebackup extension
# --------------------------------------------------------------------------

class ExtensionCase(TemporaryDirectory):
    """disk.qcow2, and what one does with it."""

    def setUp(self):
        super().setUp()
        write_file("disk.qcow2", hostile.Builder().build())

    def prepare(self, checkpoints=2, image="disk.qcow2"):
        """Livebackup on, with some checkpoints."""
        self.tool(lbext, "enable", image)
        for number in range(checkpoints):
            self.tool(lbext, "add", image, UUIDS[number], "main",
                      "--confirmed")

    def poke(self, *edits):
        """Edit the image."""
        args = [word for edit in edits for word in ("--set", edit)]
        self.tool(lbext, "poke", "disk.qcow2", *args)

    def trust(self, image="disk.qcow2"):
        """(keyword of the image, [keyword of each checkpoint])."""
        found = json.loads(self.tool(lbext, "trust", image, "--boot-id", BOOT,
                                     "--dev", DEVICE))
        return (found["keyword"],
                [point["keyword"] for point in found["checkpoints"]])


class ExtensionTest(ExtensionCase):
    """lbext.py"""

    def test_known_checksums(self):
        self.assertEqual(lbext.crc32c(b"123456789"), 0xE3069283)
        self.assertEqual(lbext.fnv1a(b"a"), 0xAF63DC4C8601EC8C)

    def test_generated_images_keep_every_must(self):
        self.prepare(0)
        self.tool(lbext, "check", "disk.qcow2")
        self.assertEqual(self.trust()[0], "no-checkpoint")
        for number in range(32):
            self.tool(lbext, "add", "disk.qcow2", UUIDS[number], f"l{number}")
            self.tool(lbext, "check", "disk.qcow2")
            self.tool(qcow2, "refcheck", "disk.qcow2")
        self.tool(lbext, "add", "disk.qcow2", UUIDS[32], "main", status=1)
        self.assertEqual(self.trust(), ("trusted", ["trusted"] * 32))

    def test_check_finds_what_is_broken(self):
        self.prepare()
        for edit, undo in (("autoclear.livebackup=0",
                            "autoclear.livebackup=1"),
                           ("device=1", "device=0"),
                           ("bits[0]=-0", "bits[0]=+0"),
                           ("bitmap[0].auto=1", "bitmap[0].auto=0"),
                           ("begun=1", "begun=0")):
            with self.subTest(edit):
                self.poke(edit)
                self.tool(lbext, "check", "disk.qcow2", status=4)
                self.poke(undo)
                self.tool(lbext, "check", "disk.qcow2")

    def test_a_stale_checksum_is_damage(self):
        self.prepare()
        self.tool(lbext, "poke", "disk.qcow2", "--keep-crc", "--set",
                  "generation=99")
        self.assertEqual(self.trust()[0], "extension-damaged")

    def test_rules_of_the_image(self):
        for edits, keyword in (
                (["extension.type=0x12345678"], "off"),
                (["version=2"], "unsupported"),
                (["flags=0x80000000"], "extension-damaged"),
                (["autoclear.bitmaps=0"], "bitmaps-dropped"),
                (["bitmaps.directory_offset=8"], "directory-damaged"),
                (["bitmap[0].name=lb-x"], "unlisted-bitmap"),
                (["incompatible.dirty=1", "autoclear.livebackup=0"],
                 "not-closed"),
                (["incompatible.dirty=1"], "trusted"),
                (["backing_digest=1"], "backing-changed"),
                (["backing_stat_digest=1"], "backing-modified"),
                (["data_stat_digest=1"], "data-file-modified"),
                (["data_stat_digest=1", "autoclear.livebackup=0"], "trusted"),
                (["data_stat_digest=1", f"boot_id={BOOT}",
                  f"device={DEVICE}"], "trusted")):
            with self.subTest(edits):
                write_file("disk.qcow2", hostile.Builder().build())
                self.prepare()
                self.poke(*edits)
                self.assertEqual(self.trust()[0], keyword)

    def test_earlier_rules_come_first(self):
        self.prepare()
        edits = ["data_stat_digest=1", "backing_stat_digest=1",
                 "backing_digest=1", "bitmap[0].name=lb-x",
                 "autoclear.bitmaps=0", "version=2"]
        keywords = ["data-file-modified", "backing-modified",
                    "backing-changed", "unlisted-bitmap", "bitmaps-dropped",
                    "unsupported"]
        for edit, keyword in zip(edits, keywords):
            self.poke(edit)
            self.assertEqual(self.trust()[0], keyword)

    def test_rules_of_a_checkpoint(self):
        last = hostile.DISK_SIZE // 65536 - 1
        good = "trusted"
        for edit, keywords in (
                ("bitmap[1].type=2", ["bitmap-missing"] * 2),
                ("bitmap[0].granularity_bits=17", ["bitmap-missing", good]),
                ("bitmap[0].table_size=2", ["bitmap-missing", good]),
                ("bitmap[0].auto=1", ["bitmap-disabled", good]),
                ("bitmap[1].auto=0", ["bitmap-disabled"] * 2),
                ("bitmap[0].in_use=1", ["in-use", good]),
                ("bitmap[1].in_use=1", ["in-use"] * 2),
                ("bits[0]=-0", ["canary", good]),
                (f"bits[1]=-{last}", ["canary"] * 2),
                ("table[0].0=0", ["canary", good]),
                ("table[0].0=1", [good, good])):
            with self.subTest(edit):
                write_file("disk.qcow2", hostile.Builder().build())
                self.prepare()
                self.poke(edit)
                self.assertEqual(self.trust(), (good, keywords))

    def test_the_table_of_bits_and_boot_ids(self):
        this, other = f"boot_id={BOOT}", f"boot_id={OTHER_BOOT}"
        here, there = f"device={DEVICE}", f"device={DEVICE + 1}"
        good = "trusted"
        # B, P, U, boot id and device, sync, keyword; None: any
        rows = ((0, None, None, [], None, "bitmaps-dropped"),
                (1, None, 0, [], None, good),
                (1, None, 1, [], None, "in-use"),
                (1, None, 0, [this, here], None, good),
                (1, None, 1, [this, here], None, "in-use"),
                (1, None, None, [this, there], 0, "moved-open"),
                (1, None, 0, [this, there], 1, good),
                (1, None, None, [other, here], 0, "power-loss"),
                (1, None, 0, [other, here], 1, good),
                (1, None, 1, [other, here], 1, "in-use"))
        for b, p, u, recorded, sync, keyword in rows:
            for p_now in (0, 1) if p is None else (p,):
                for u_now in (0, 1) if u is None else (u,):
                    for sync_now in (0, 1) if sync is None else (sync,):
                        self.check_row([
                            f"bitmap[1].in_use={u_now}",
                            f"flags={sync_now}", *recorded,
                            f"autoclear.livebackup={p_now}",
                            f"autoclear.bitmaps={b}"], keyword)

    def check_row(self, edits, keyword):
        """One combination."""
        with self.subTest(edits):
            write_file("disk.qcow2", hostile.Builder().build())
            self.prepare()
            self.poke(*edits)
            image, points = self.trust()
            self.assertEqual(points[-1], keyword)
            self.assertIn(image, ("trusted", keyword))

    def test_changed_is_the_or_from_a_checkpoint_on(self):
        self.prepare(3)
        self.poke("bits[0]=+3", "bits[1]=+4,+9", "bits[2]=+5")
        granule = 65536

        def changed(number):
            found = json.loads(self.tool(lbext, "changed", "disk.qcow2",
                                         UUIDS[number]))
            return [(start // granule, length // granule)
                    for start, length in found]

        self.assertEqual(changed(0), [(0, 1), (3, 3), (9, 1), (15, 1)])
        self.assertEqual(changed(1), [(0, 1), (4, 2), (9, 1), (15, 1)])
        self.assertEqual(changed(2), [(0, 1), (5, 1), (15, 1)])
        self.tool(lbext, "changed", "disk.qcow2", UUIDS[9], status=1)

    def test_above_the_smallest_size_all_has_changed(self):
        self.prepare()
        self.poke("record[1].virtual_size=589824")
        found = json.loads(self.tool(lbext, "changed", "disk.qcow2",
                                     UUIDS[0]))
        self.assertEqual(found[-1], [589824, hostile.DISK_SIZE - 589824])

    def test_the_backing_file_is_watched(self):
        write_file("below.raw", b"x" * 1000)
        write_file("disk.qcow2",
                   hostile.Builder().backed(b"below.raw", b"raw").build())
        self.prepare()
        self.assertEqual(self.trust()[0], "trusted")
        os.utime("below.raw", ns=(0, 5))
        self.assertEqual(self.trust()[0], "backing-modified")
        self.poke("backing_stat_digest=backing-stat")
        self.assertEqual(self.trust()[0], "trusted")
        os.remove("below.raw")
        self.assertEqual(self.trust()[0], "backing-modified")

    def test_enable_wants_room_in_4096_bytes(self):
        image = hostile.Builder()
        image.extensions = hostile.extension(0x12345678, b"x" * 1800)
        write_file("disk.qcow2", image.build())
        self.tool(lbext, "enable", "disk.qcow2", status=1)


@unittest.skipUnless(QEMU, "no qemu-img")
class ExtensionAndQemuTest(ExtensionCase):
    """lbext.py and stock QEMU on the same image"""

    def create(self, options="compat=1.1", size="3G"):
        """An image of QEMU's with livebackup on."""
        self.run_program("qemu-img", "create", "-q", "-f", "qcow2", "-o",
                         options, "disk.qcow2", size)
        self.qemu_io("write 1M 100k")
        self.prepare()

    def qemu_io(self, *commands):
        """Run qemu-io on the image."""
        args = [word for command in commands for word in ("-c", command)]
        self.run_program("qemu-io", "-f", "qcow2", *args, "disk.qcow2")

    def qemu_img(self, *args):
        """Run qemu-img on the image."""
        return self.run_program("qemu-img", *args)

    def assert_sound(self):
        """No leak, no error, by QEMU's check and by ours."""
        self.qemu_img("check", "-q", "disk.qcow2")
        found = json.loads(self.tool(qcow2, "refcheck", "disk.qcow2"))
        self.assertEqual(found, {"corruptions": [], "leaks": []})

    def test_qemu_finds_no_fault_and_goes_on_tracking(self):
        for options in ("compat=1.1", "cluster_size=4k,refcount_bits=64",
                        "cluster_size=4k,refcount_bits=1", "extended_l2=on",
                        "cluster_size=2M", "lazy_refcounts=on"):
            with self.subTest(options):
                self.create(options)
                self.assert_sound()
                self.tool(lbext, "check", "disk.qcow2")
                self.qemu_io("write 2G 100k", "discard 2561M 64k")
                self.assert_sound()
                self.assertEqual(self.trust(), ("trusted", ["trusted"] * 2))
                found = json.loads(self.tool(lbext, "changed", "disk.qcow2",
                                             UUIDS[0]))
                self.assertIn([2 << 30, 128 << 10], found)
                self.assertIn([2561 << 20, 64 << 10], found)
                shown = json.loads(self.tool(lbext, "show", "disk.qcow2"))
                self.assertFalse(shown["autoclear"]["livebackup"])
                self.assertTrue(shown["autoclear"]["bitmaps"])
                os.remove("disk.qcow2")

    def test_refcount_tables_grow(self):
        self.create("cluster_size=4k,refcount_bits=64", "64M")
        writer = lbext.Writer("disk.qcow2")
        before = len(writer.table)
        writer.end = before * 512 - 3
        writer.file.truncate(writer.end << writer.bits)
        writer.close()
        for number in range(2, 9):
            self.tool(lbext, "add", "disk.qcow2", UUIDS[number], "main")
            self.assert_sound()
        self.assertGreater(len(lbext.Writer("disk.qcow2").table), before)

    def test_stock_commands_that_spoil_the_bits_are_noticed(self):
        newest = "lb-" + UUIDS[1]
        oldest = "lb-" + UUIDS[0]
        resize = ("resize", "-q", "disk.qcow2")
        for commands, keywords in (
                ([("bitmap", "--clear", "disk.qcow2", newest)],
                 ["canary"] * 2),
                ([("bitmap", "--clear", "disk.qcow2", oldest)],
                 ["canary", "trusted"]),
                ([("bitmap", "--disable", "disk.qcow2", newest)],
                 ["bitmap-disabled"] * 2),
                ([("bitmap", "--enable", "disk.qcow2", oldest)],
                 ["bitmap-disabled", "trusted"]),
                ([("bitmap", "--remove", "disk.qcow2", oldest)],
                 ["bitmap-missing", "trusted"]),
                ([("bitmap", "--remove", "disk.qcow2", newest),
                  ("bitmap", "--add", "disk.qcow2", newest)],
                 ["canary"] * 2),
                ([(*resize, "--shrink", "2G")], ["canary"] * 2),
                ([(*resize, "--shrink", "2G"), (*resize, "3G")],
                 ["canary"] * 2),
                ([(*resize, "4G")], ["trusted"] * 2),
                ([("bitmap", "--add", "disk.qcow2", "lb-mine")],
                 ["unlisted-bitmap"] * 2),
                ([("rebase", "-u", "-b", "other.raw", "-F", "raw",
                   "disk.qcow2")], ["backing-changed"] * 2)):
            with self.subTest(commands):
                self.create()
                for command in commands:
                    self.qemu_img(*command)
                self.assertEqual(self.trust()[1], keywords)
                os.remove("disk.qcow2")

    def test_a_grown_disk_has_changed_above_its_old_size(self):
        self.create()
        self.qemu_img("resize", "-q", "disk.qcow2", "4G")
        found = json.loads(self.tool(lbext, "changed", "disk.qcow2",
                                     UUIDS[1]))
        self.assertEqual(found[-1], [(3 << 30) - 65536, (1 << 30) + 65536])

    def test_a_killed_stock_writer_leaves_in_use(self):
        self.create()
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 1M", "-c",
                        "sigraise 9", "disk.qcow2"],
                       stdout=subprocess.DEVNULL)
        self.assertEqual(self.trust()[1], ["in-use"] * 2)

    def test_bits_that_need_a_cluster_get_one(self):
        self.create("cluster_size=4k")
        self.poke("bits[0]=+40000", "bits[1]=+12")
        self.assert_sound()
        found = json.loads(self.tool(lbext, "changed", "disk.qcow2",
                                     UUIDS[0]))
        self.assertIn([40000 * 65536, 65536], found)

    def test_foreign_bitmaps_are_left_alone(self):
        self.create()
        self.qemu_img("bitmap", "--add", "disk.qcow2", "theirs")
        self.tool(lbext, "add", "disk.qcow2", UUIDS[2], "main")
        self.assert_sound()
        shown = json.loads(self.tool(lbext, "show", "disk.qcow2"))
        self.assertIn("theirs", [one["name"] for one in shown["bitmaps"]])
        self.assertEqual(self.trust(), ("trusted", ["trusted"] * 3))


# The header of a disk of 10 GiB + 513 bytes; tests/unit/test_orig.c has the
# same.
GOLDEN_ORIG = bytes.fromhex(
    "514649fb00000003" "0000000000000000" "0000000000000010"
    "0000000280000201" "0000000000000015" "0000000000020000"
    "0000000000010000" "0000000100000000" "0000000000000000"
    "0000000000000001" "0000000000000000" "0000000000000000"
    "0000000400000068" "4c424f5200000060" "00000001f46701ae"
    "0000000000010000" "101112131415161718191a1b1c1d1e1f"
    "202122232425262728292a2b2c2d2e2f" "303132333435363738393a3b3c3d3e3f"
    "4041424344454647" "505152535455565758595a5b5c5d5e5f"
    "0000000000000000" "0000000000000000")


class Originals(TemporaryDirectory):
    """lborig.py."""

    TABLES = 0x30000      # 21 L2 tables
    CLUSTERS = 0x180000

    def write(self, *edits):
        """An orig with these (offset, bytes) written over it."""
        tables = b"".join((1 << 63 | self.TABLES + n * 65536).to_bytes(
            8, "big") for n in range(21))
        with open("disk.orig.qcow2", "wb") as file:
            for at, data in ((0, GOLDEN_ORIG), (0x20000, tables)) + edits:
                file.seek(at)
                file.write(data)
            file.truncate(max(self.CLUSTERS, file.seek(0, os.SEEK_END)))

    def entry(self, cluster, value):
        """The edit that makes this the entry of a cluster."""
        return self.TABLES + 8 * cluster, value.to_bytes(8, "big")

    def test_what_is_saved_is_shown(self):
        self.write(self.entry(3, 1), self.entry(
            163840, 1 << 63 | self.CLUSTERS))
        self.assertEqual(self.tool(lborig, "check", "disk.orig.qcow2"), "")
        shown = json.loads(self.tool(lborig, "show", "disk.orig.qcow2"))
        self.assertEqual(shown["size"], (10 << 30) + 513)
        self.assertEqual(shown["time"], 0x4041424344454647)
        self.assertEqual(shown["image_uuid"],
                         "10111213-1415-1617-1819-1a1b1c1d1e1f")
        self.assertEqual(shown["saved"],
                         [[3 << 16, "zero"], [10 << 30, "data"]])

    def test_what_is_wrong_is_found(self):
        for at, data in (
                (27, b"\3"), (32, b"\1"), (39, b"\x16"), (79, b"\0"),
                (111, b"\x50"), (115, b"\2"), (116, b"\0"), (120, b"\1"),
                (160, b"\0"), (200, b"\1"), (211, b"\1"),
                (0x10000, b"\1"), (0x20000, b"\0"), self.entry(0, 2),
                self.entry(0, self.CLUSTERS),
                self.entry(0, 1 << 63 | self.TABLES),
                self.entry(0, 1 << 63 | self.CLUSTERS + 512),
                self.entry(0, 3 << 62 | self.CLUSTERS)):
            with self.subTest(at=at, data=data):
                self.write((at, data))
                self.assertIn("not so", self.tool(
                    lborig, "check", "disk.orig.qcow2", status=4))
        self.write((104, b"M"))
        self.tool(lborig, "check", "disk.orig.qcow2", status=1)

    @unittest.skipUnless(QEMU, "needs qemu-img and qemu-io")
    def test_qemu_reads_what_is_saved(self):
        self.write(self.entry(1, 1),
                   self.entry(2, 1 << 63 | self.CLUSTERS),
                   (self.CLUSTERS, b"\xab" * 65536))
        out = self.run_program(
            "qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0 0 128k",
            "-c", "read -P 0xab 128k 64k", "disk.orig.qcow2")
        self.assertNotIn("failed", out)
        self.run_program("qemu-img", "check", "-q", "-r", "all",
                         "disk.orig.qcow2")
        self.run_program("qemu-img", "check", "-q", "disk.orig.qcow2")


if __name__ == "__main__":
    unittest.main()
