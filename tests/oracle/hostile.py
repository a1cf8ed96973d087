# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Hostile qcow2 images: each has one absurdity, all else about it is sound.

write_all(DIR) writes NAME.qcow2 for each, companion files, and manifest.json:

    NAME: {"verdict": ..., "mention": ..., "sha256": ..., "trust": ...,
           "trust_checkpoint": ...}

verdict: what a program must do that reads the whole disk
    "refuse"      doesn't open the image
    "read-error"  opens it and fails where the damage is
    "ok"          reads it; the content has the given "sha256"
    "any"         the standard does not say; only a crash or a hang is wrong
  Whichever it is, death by a signal is never a refusal.  The images are to be
  read from within DIR, since some name other files.
mention: regular expression, to be matched without regard to case, that the
    message of a refusal or an error should match.
trust, trust_checkpoint: the keyword of trust.md for the image, or for each of
    its checkpoints, where the image has livebackup on.
"""

import hashlib
import json
import os
import zlib

import zstandard

import lbext
from layout import ZERO_UUID
from qcow2 import (BITMAPS, COMPRESSED, COPIED, EXT_BACKING_FORMAT,
                   EXT_BITMAPS, EXT_DATA_FILE, EXT_END, EXT_FEATURE_NAMES,
                   EXTENSION, FEATURE, HEADER2, HEADER3, round_up)

BITS = 12
CLUSTER = 1 << BITS
DISK_SIZE = 1 << 20
CHECKPOINTS = ("11111111-1111-4111-8111-111111111111",
               "22222222-2222-4222-8222-222222222222")

# Where the pieces of a plain image are.
REFTABLE, REFBLOCK, L1, L2, DATA0, DATA1 = (n * CLUSTER for n in range(1, 7))
FILE_SIZE = 7 * CLUSTER


def extension(kind, data, length=None):
    """Bytes of a header extension."""
    length = len(data) if length is None else length
    return (EXTENSION.encode({"type": kind, "length": length})
            + data.ljust(round_up(len(data), 8), b"\0"))


class Builder:
    """A plain image of 1 MiB whose first two clusters have data."""

    def __init__(self, **header):
        self.header = {
            "magic": 0x514649FB, "version": 3, "cluster_bits": BITS,
            "size": DISK_SIZE, "l1_size": 1, "l1_table_offset": L1,
            "refcount_table_offset": REFTABLE, "refcount_table_clusters": 1,
            "refcount_order": 4, "header_length": 112}
        self.header.update(header)
        self.compression_type = 0
        self.extensions = b""
        self.end_marker = True
        self.backing = None
        self.data = bytearray(FILE_SIZE)
        for cluster in range(FILE_SIZE // CLUSTER):
            self.put(REFBLOCK + 2 * cluster, 1, 2)
        self.put(REFTABLE, REFBLOCK)
        self.put(L1, L2 | COPIED)
        self.put(L2, DATA0 | COPIED)
        self.put(L2 + 8, DATA1 | COPIED)
        self.fill(DATA0, b"\x11" * CLUSTER)
        self.fill(DATA1, b"\x22" * CLUSTER)

    def put(self, offset, value, size=8):
        """Store a big-endian number."""
        self.fill(offset, value.to_bytes(size, "big"))

    def fill(self, offset, data):
        """Store bytes, the file grows as needed."""
        if len(self.data) < offset:
            self.data += bytes(offset - len(self.data))
        self.data[offset:offset + len(data)] = data

    def compressed(self, payload, sectors=None):
        """Make guest cluster 0 a compressed one, its data last in the
        file."""
        offset = FILE_SIZE
        self.put(REFBLOCK + 2 * (offset // CLUSTER), 1, 2)
        self.put(REFBLOCK + 2 * (DATA0 // CLUSTER), 0, 2)
        self.fill(offset, payload)
        if sectors is None:
            sectors = (len(payload) + 511) // 512
        self.put(L2, COMPRESSED | (sectors - 1) << 62 - (BITS - 8) | offset)
        return self

    def zstd(self):
        """Compressed clusters are zstd."""
        self.header["incompatible_features"] = 8
        self.compression_type = 1
        return self

    def backed(self, name, backing_format=b"qcow2"):
        """Set the backing file."""
        if backing_format is not None:
            self.extensions += extension(EXT_BACKING_FORMAT, backing_format)
        self.backing = name
        return self

    def build(self):
        """Bytes of the file."""
        layout = HEADER2 if self.header["version"] == 2 else HEADER3
        head = self.extensions
        if self.end_marker:
            head += extension(EXT_END, b"")
        length = HEADER2.size if layout is HEADER2 else 112
        header = dict(self.header)
        if self.backing is not None:
            header.setdefault("backing_file_offset", length + len(head))
            header.setdefault("backing_file_size", len(self.backing))
            head += self.backing
        raw = layout.encode(header)
        if layout is HEADER3:
            raw += bytes([self.compression_type]) + bytes(7)
        out = bytearray(self.data)
        whole = raw + head
        out[:len(whole)] = whole
        return bytes(out)


class Set:
    """Writes images and collects the manifest."""

    def __init__(self, directory):
        self.directory = directory
        self.manifest = {}

    def path(self, name):
        """Path of a file of the set."""
        return os.path.join(self.directory, name)

    def add(self, name, image, verdict, mention="", **more):
        """Write an image (a Builder, or bytes)."""
        data = image.build() if isinstance(image, Builder) else image
        with open(self.path(name + ".qcow2"), "wb") as file:
            file.write(data)
        self.manifest[name] = dict(verdict=verdict, mention=mention, **more)

    def companion(self, name, data):
        """Write another file."""
        with open(self.path(name), "wb") as file:
            file.write(data)


def content_digest(*clusters):
    """SHA-256 of a disk that begins with these clusters."""
    return hashlib.sha256(b"".join(clusters).ljust(DISK_SIZE,
                                                   b"\0")).hexdigest()


PLAIN = content_digest(b"\x11" * CLUSTER, b"\x22" * CLUSTER)
CLUSTER_AB = (b"abcdefgh" * CLUSTER)[:CLUSTER]


def raw_deflate(data):
    """Deflate without a header, as qcow2 has it."""
    worker = zlib.compressobj(9, zlib.DEFLATED, -12)
    return worker.compress(data) + worker.flush()


def add_header_images(images):
    """Fields of the header."""
    plain = Builder()
    images.add("plain", plain, "ok", sha256=PLAIN)
    images.add("empty-file", b"", "refuse")
    images.add("cut-header", plain.build()[:50], "refuse")
    images.add("cut-header-v3", plain.build()[:90], "refuse")
    images.add("cut-behind-header", plain.build()[:CLUSTER], "refuse",
               "L1|refcount|beyond|end of")
    images.add("magic", Builder(magic=0x514649FA), "refuse",
               "not a qcow2|magic|format")
    for version in (0, 1, 4):
        images.add(f"version-{version}", Builder(version=version), "refuse",
                   "version")
    for bits in (0, 8, 22, 63, 64, 0xFFFFFFFF):
        images.add(f"cluster-bits-{bits}", Builder(cluster_bits=bits),
                   "refuse", "cluster")
    for order in (7, 64, 0xFFFFFFFF):
        images.add(f"refcount-order-{order}", Builder(refcount_order=order),
                   "refuse", "refcount")
    for length in (0, 72, 103, 105, CLUSTER + 8, 0xFFFFFFF8):
        images.add(f"header-length-{length}", Builder(header_length=length),
                   "refuse", "header")
    for name, size in (("2-63", 2**63), ("2-64-1", 2**64 - 1),
                       ("2-62", 2**62)):
        images.add(f"size-{name}", Builder(size=size), "refuse",
                   "size|large|L1")
    for method, word in ((1, "AES|encrypt"), (2, "LUKS|encrypt"),
                         (3, "encrypt|crypt")):
        images.add(f"encryption-{method}", Builder(crypt_method=method),
                   "refuse", word)
    images.add("dirty-bit", Builder(incompatible_features=1), "ok",
               sha256=PLAIN)
    images.add("corrupt-bit", Builder(incompatible_features=2), "refuse",
               "corrupt")
    named = Builder(incompatible_features=1 << 40)
    named.extensions = extension(EXT_FEATURE_NAMES, FEATURE.encode(
        {"type": 0, "bit": 40, "name": "frobnicated tables"}))
    images.add("incompatible-bit-40", named, "refuse", "frobnicated tables")
    images.add("incompatible-bit-63", Builder(incompatible_features=1 << 63),
               "refuse", "63")
    images.add("compatible-bit-40", Builder(compatible_features=1 << 40),
               "ok", sha256=PLAIN)


def add_table_images(images):
    """L1, refcount table, snapshot table."""
    for name, fields in (
            ("l1-huge", {"l1_size": 0xFFFFFFFF}),
            ("l1-huge-for-a-huge-disk", {"l1_size": 0xFFFFFFFF,
                                         "size": 2**53}),
            ("l1-beyond-eof", {"l1_table_offset": 1 << 40}),
            ("l1-unaligned", {"l1_table_offset": L1 + 512}),
            ("l1-offset-2-63", {"l1_table_offset": 1 << 63}),
            ("l1-offset-wraps", {"l1_table_offset": 2**64 - CLUSTER}),
            ("l1-missing", {"l1_size": 0}),
            ("l1-too-small", {"size": 1 << 30})):
        images.add(name, Builder(**fields), "refuse", "L1")
    images.add("refcount-table-huge",
               Builder(refcount_table_clusters=0xFFFFFFFF), "refuse",
               "refcount")
    images.add("refcount-table-unaligned",
               Builder(refcount_table_offset=REFTABLE + 512), "refuse",
               "refcount")
    images.add("refcount-table-beyond-eof",
               Builder(refcount_table_offset=1 << 40), "any")
    images.add("refcount-table-none", Builder(refcount_table_clusters=0),
               "any")
    images.add("snapshots-huge", Builder(nb_snapshots=0xFFFFFFFF,
                                         snapshots_offset=FILE_SIZE),
               "refuse", "snapshot")
    images.add("snapshots-unaligned", Builder(nb_snapshots=1,
                                              snapshots_offset=L2 + 8),
               "refuse", "snapshot")
    images.add("snapshots-beyond-eof", Builder(nb_snapshots=1,
                                               snapshots_offset=1 << 40),
               "any")
    absurd = Builder(nb_snapshots=1, snapshots_offset=FILE_SIZE)
    absurd.fill(FILE_SIZE, b"\xff" * CLUSTER)
    images.add("snapshot-entry-absurd", absurd, "any")


def patched(offset, value, **header):
    """A plain image with one number changed."""
    image = Builder(**header)
    image.put(offset, value)
    return image


def add_mapping_images(images):
    """L1 and L2 entries."""
    images.add("l2-table-beyond-eof", patched(L1, 1 << 40 | COPIED),
               "read-error", "L2")
    images.add("l2-table-unaligned", patched(L1, L2 + 512 | COPIED),
               "read-error", "L2|align")
    images.add("l1-entry-reserved-bits", patched(L1, L2 | COPIED | 1 << 60),
               "any")
    images.add("l2-entry-beyond-eof", patched(L2, 1 << 40 | COPIED),
               "read-error", "beyond|end of|EOF|past|outside")
    images.add("l2-entry-at-eof", patched(L2, FILE_SIZE | COPIED),
               "read-error", "beyond|end of|EOF|past|outside")
    images.add("l2-entry-unaligned", patched(L2, DATA0 + 512 | COPIED),
               "read-error", "align")
    images.add("l2-entry-reserved-bits", patched(L2, DATA0 | COPIED | 4),
               "any")
    images.add("l2-table-is-l1-table", patched(L1, L1 | COPIED), "any")
    images.add("l2-maps-itself", patched(L2, L2 | COPIED), "any")
    images.add("l2-maps-refcounts", patched(L2, REFBLOCK | COPIED), "any")
    overlap = content_digest(b"\x22" * CLUSTER, b"\x22" * CLUSTER)
    images.add("two-clusters-overlap", patched(L2, DATA1 | COPIED), "ok",
               sha256=overlap)
    images.add("zero-flag-in-v2", patched(L2, DATA0 | COPIED | 1, version=2),
               "read-error", "zero|reserved|version")
    zeroed = content_digest(bytes(CLUSTER), b"\x22" * CLUSTER)
    images.add("zero-flag", patched(L2, DATA0 | COPIED | 1), "ok",
               sha256=zeroed)
    images.add("zero-flag-with-offset-beyond-eof",
               patched(L2, 1 << 40 | COPIED | 1), "any")
    images.add("cut-in-the-last-cluster", Builder().build()[:-100], "ok",
               sha256=content_digest(b"\x11" * CLUSTER,
                                     b"\x22" * (CLUSTER - 100)))
    images.add("extended-l2-small-clusters",
               Builder(incompatible_features=16), "refuse",
               "cluster|extended|subcluster")
    add_subcluster_images(images)


def add_subcluster_images(images):
    """Extended L2 entries, which want clusters of 16 KiB."""
    cluster = 1 << 14

    def image(entry, bitmap):
        found = Builder(incompatible_features=16, cluster_bits=14,
                        refcount_table_offset=cluster,
                        l1_table_offset=3 * cluster)
        found.data = bytearray(6 * cluster)
        found.put(cluster, 2 * cluster)
        for number in range(6):
            found.put(2 * cluster + 2 * number, 1, 2)
        found.put(3 * cluster, 4 * cluster | COPIED)
        found.put(4 * cluster, entry)
        found.put(4 * cluster + 8, bitmap)
        found.fill(5 * cluster, b"\x33" * cluster)
        return found

    data = 5 * cluster | COPIED
    images.add("subclusters", image(data, 0x3 | 0xC << 32), "ok",
               sha256=content_digest(b"\x33" * 1024))
    images.add("subcluster-both-zero-and-data", image(data, 1 | 1 << 32),
               "read-error", "subcluster")
    images.add("subcluster-without-cluster", image(0, 1), "read-error",
               "subcluster|cluster")


def add_compressed_images(images):
    """Compressed clusters."""
    deflated = raw_deflate(CLUSTER_AB)
    noise = bytes(range(7, 256, 3)) * 6
    good = content_digest(CLUSTER_AB, b"\x22" * CLUSTER)
    bomb = raw_deflate(bytes(1 << 26))
    after_bomb = content_digest(bytes(CLUSTER), b"\x22" * CLUSTER)
    images.add("deflate", Builder().compressed(deflated), "ok", sha256=good)
    images.add("deflate-garbage", Builder().compressed(b"\xff" * 600),
               "read-error", "compress|inflate|deflate")
    images.add("deflate-noise", Builder().compressed(noise), "read-error",
               "compress|inflate|deflate")
    images.add("deflate-too-short",
               Builder().compressed(raw_deflate(CLUSTER_AB[:1000])),
               "read-error", "compress|inflate|deflate|short")
    images.add("deflate-bomb", Builder().compressed(bomb[:3000], 6), "ok",
               sha256=after_bomb)
    stored = zlib.compressobj(0, zlib.DEFLATED, -12)
    stored = stored.compress(CLUSTER_AB) + stored.flush()
    images.add("compressed-cut-by-eof", Builder().compressed(stored[:1000], 9),
               "read-error", "compress|inflate|deflate|short|end of")
    images.add("compressed-count-past-eof", Builder().compressed(deflated, 16),
               "any")
    images.add("compressed-beyond-eof",
               patched(L2, COMPRESSED | 1 << 40), "read-error",
               "compress|beyond|end of")
    images.add("compressed-offset-2-56",
               patched(L2, COMPRESSED | 1 << 57), "read-error",
               "compress|beyond|end of")
    zstd = zstandard.ZstdCompressor().compress(CLUSTER_AB)
    images.add("zstd", Builder().zstd().compressed(zstd), "ok", sha256=good)
    images.add("zstd-garbage", Builder().zstd().compressed(noise),
               "read-error", "compress|zstd")
    images.add("zstd-cut", Builder().zstd().compressed(
        zstandard.ZstdCompressor().compress(os.urandom(CLUSTER))[:2000], 4),
        "read-error", "compress|zstd|short")
    images.add("zstd-too-short", Builder().zstd().compressed(
        zstandard.ZstdCompressor().compress(CLUSTER_AB[:1000])),
        "read-error", "compress|zstd|short")
    images.add("zstd-bomb", Builder().zstd().compressed(
        zstandard.ZstdCompressor().compress(bytes(1 << 26))), "any")
    images.add("zstd-huge-window", Builder().zstd().compressed(
        b"\x28\xb5\x2f\xfd\x00\xf8" + bytes(500)), "any")
    images.add("deflate-in-zstd-image", Builder().zstd().compressed(deflated),
               "read-error", "compress|zstd")
    add_compression_type_images(images)


def add_compression_type_images(images):
    """The field and its feature bit."""
    images.add("compression-bit-without-type",
               Builder(incompatible_features=8), "refuse", "compression")
    for name, kind, bit in (("compression-type-without-bit", 1, 0),
                            ("compression-type-2", 2, 8),
                            ("compression-type-255", 255, 8)):
        image = Builder(incompatible_features=bit)
        image.compression_type = kind
        images.add(name, image, "refuse", "compression")


def add_extension_images(images):
    """The extension area."""
    for name, length in (("past-cluster", CLUSTER), ("huge", 0xFFFFFFFF),
                         ("wraps", 0xFFFFFFF9), ("2-31", 1 << 31)):
        image = Builder()
        image.extensions = extension(0x12345678, b"x" * 8, length)
        images.add(f"extension-{name}", image, "refuse", "extension")
    over_name = Builder().backed(b"plain.qcow2")
    over_name.extensions += extension(0x12345678, b"x" * 8, 64)
    over_name.end_marker = False
    images.add("extension-over-backing-name", over_name, "refuse",
               "extension")
    unended = Builder()
    unended.extensions = extension(0x12345678, b"x" * (CLUSTER - 112 - 8))
    images.add("extensions-without-end", unended, "ok", sha256=PLAIN)
    twice = Builder().backed(b"plain.qcow2")
    twice.extensions += extension(EXT_BACKING_FORMAT, b"raw")
    images.add("backing-format-twice", twice, "any")
    odd = Builder()
    odd.extensions = extension(EXT_FEATURE_NAMES, b"\1\2\3")
    images.add("feature-table-odd-length", odd, "ok", sha256=PLAIN)


def add_backing_images(images):
    """Backing files.  The overlays have cluster 2 from below."""
    below = Builder()
    below.put(L2 + 16, DATA1 | COPIED)
    images.add("backing-good", Builder().backed(b"below.qcow2"), "ok",
               sha256=content_digest(b"\x11" * CLUSTER, b"\x22" * CLUSTER,
                                     b"\x22" * CLUSTER))
    images.companion("below.qcow2", below.build())
    images.companion("below.raw", b"\x44" * (3 * CLUSTER - 50))
    images.add("backing-raw-short", Builder().backed(b"below.raw", b"raw"),
               "ok", sha256=content_digest(
                   b"\x11" * CLUSTER, b"\x22" * CLUSTER,
                   b"\x44" * (CLUSTER - 50)))
    images.add("backing-without-format", Builder().backed(b"below.qcow2",
                                                          None),
               "refuse", "format")
    images.add("backing-format-unknown", Builder().backed(b"below.raw",
                                                          b"frobfs"),
               "refuse", "frobfs|format")
    images.add("backing-format-wrong", Builder().backed(b"below.raw"),
               "refuse", "below.raw|qcow2")
    images.add("backing-missing", Builder().backed(b"not-there.qcow2"),
               "refuse", "not-there")
    images.add("backing-nbd", Builder().backed(b"nbd://localhost/x", b"raw"),
               "refuse", "nbd|protocol|backing")
    images.add("backing-json", Builder().backed(
        b'json:{"driver":"null-co"}', b"raw"), "refuse",
        "json|protocol|backing")
    images.add("backing-zero-byte", Builder().backed(b"below\0.qcow2"),
               "refuse", "backing|below")
    for name, fields in (
            ("offset-past-cluster", {"backing_file_offset": CLUSTER + 8}),
            ("offset-2-63", {"backing_file_offset": 1 << 63}),
            ("offset-wraps", {"backing_file_offset": 2**64 - 4}),
            ("length-past-cluster", {"backing_file_size": 1000,
                                     "backing_file_offset": CLUSTER - 100}),
            ("length-1024", {"backing_file_size": 1024}),
            ("length-2-32-1", {"backing_file_size": 0xFFFFFFFF})):
        images.add(f"backing-name-{name}",
                   Builder(**fields).backed(b"below.qcow2"), "refuse",
                   "backing")
    images.add("backing-name-in-header",
               Builder(backing_file_offset=8).backed(b"below.qcow2"), "any")
    loops = "loop|chain|cycle|itself|recurs|deep|again"
    images.add("backing-loop-itself",
               Builder().backed(b"backing-loop-itself.qcow2"), "refuse",
               loops)
    images.add("backing-loop-a", Builder().backed(b"backing-loop-b.qcow2"),
               "refuse", loops)
    images.add("backing-loop-b", Builder().backed(b"backing-loop-a.qcow2"),
               "refuse", loops)


def data_file_image(name=b"data.raw", autoclear=0):
    """An image with an external data file."""
    image = Builder(incompatible_features=4, autoclear_features=autoclear)
    if name is not None:
        image.extensions = extension(EXT_DATA_FILE, name)
    image.put(L2, COPIED)
    image.put(L2 + 8, CLUSTER | COPIED)
    return image


def add_data_file_images(images):
    """External data files."""
    images.companion("data.raw", (b"\x55" * CLUSTER + b"\x66" * CLUSTER)
                     .ljust(DISK_SIZE, b"\0"))
    good = content_digest(b"\x55" * CLUSTER, b"\x66" * CLUSTER)
    images.add("data-file", data_file_image(), "ok", sha256=good)
    images.add("data-file-raw", data_file_image(autoclear=2), "ok",
               sha256=good)
    images.add("data-file-bit-without-name", data_file_image(None), "refuse",
               "data file|data-file")
    images.add("data-file-missing", data_file_image(b"not-there.raw"),
               "refuse", "not-there")
    images.add("data-file-nbd", data_file_image(b"nbd://localhost/x"),
               "refuse", "nbd|protocol|data")
    without_bit = Builder()
    without_bit.extensions = extension(EXT_DATA_FILE, b"data.raw")
    images.add("data-file-name-without-bit", without_bit, "any")
    moved = data_file_image()
    moved.put(L2, CLUSTER | COPIED)
    images.add("data-file-other-offset", moved, "read-error", "data")
    compressed = data_file_image().compressed(raw_deflate(CLUSTER_AB))
    images.add("data-file-compressed", compressed, "read-error", "compress")
    images.add("data-file-raw-with-backing",
               data_file_image(autoclear=2).backed(b"below.qcow2"), "any")
    images.add("data-file-raw-bit-alone", Builder(autoclear_features=2),
               "any")
    images.add("data-file-is-itself",
               data_file_image(b"data-file-is-itself.qcow2"), "any")


def add_bitmap_images(images):
    """Livebackup is on; the directory or the extension is absurd."""
    missing, damaged = "bitmap-missing", "directory-damaged"
    listed = f"bitmap[{CHECKPOINTS[1]}]"
    first = f"bitmap[{CHECKPOINTS[0]}]"
    second_name = f"lb-{CHECKPOINTS[1]}"
    for name, edits, trust in (
            ("good", {}, None),
            ("directory-huge", {"bitmaps.directory_size": 1 << 60}, damaged),
            ("directory-size-2-64-1",
             {"bitmaps.directory_size": 2**64 - 1}, damaged),
            ("directory-cut", {"bitmaps.directory_size": 100}, damaged),
            ("directory-too-long", {"bitmaps.directory_size": 136}, damaged),
            ("directory-unaligned",
             {"bitmaps.directory_offset": 512}, damaged),
            ("directory-beyond-eof",
             {"bitmaps.directory_offset": 1 << 40}, damaged),
            ("directory-offset-wraps",
             {"bitmaps.directory_offset": 2**64 - CLUSTER}, damaged),
            ("count-0", {"bitmaps.nb_bitmaps": 0}, damaged),
            ("count-huge", {"bitmaps.nb_bitmaps": 0xFFFFFFFF}, damaged),
            ("count-one-more", {"bitmaps.nb_bitmaps": 3}, damaged),
            ("name-twice", {first + ".name": second_name}, damaged),
            ("name-size-0", {first + ".name_size": 0}, damaged),
            ("name-size-huge", {listed + ".name_size": 0xFFFF}, damaged),
            ("extra-data-huge",
             {listed + ".extra_data_size": 0xFFFFFFFF}, damaged),
            ("reserved-flags", {listed + ".flags": 0x80000002}, damaged),
            ("extension-gone", {"bitmaps.type": 0x23852876},
             "bitmaps-dropped"),
            ("bit-clear", {"autoclear.bitmaps": 0}, "bitmaps-dropped"),
            ("unlisted", {"count": 1, "zero-record": 1}, "unlisted-bitmap"),
    ):
        add_livebackup_image(images, "bitmap-" + name, edits, trust=trust)
    for name, edits in (
            ("table-unaligned", {listed + ".table_offset": 512}),
            ("table-beyond-eof", {listed + ".table_offset": 1 << 40}),
            ("table-offset-wraps",
             {listed + ".table_offset": 2**64 - CLUSTER}),
            ("table-empty", {listed + ".table_size": 0}),
            ("table-huge", {listed + ".table_size": 0xFFFFFFFF}),
            ("granularity-63", {listed + ".granularity_bits": 63}),
            ("granularity-255", {listed + ".granularity_bits": 255}),
            ("type-0", {listed + ".type": 0}),
            ("data-unaligned", {f"table[{CHECKPOINTS[1]}].0": 512}),
            ("data-beyond-eof", {f"table[{CHECKPOINTS[1]}].0": 1 << 40}),
            ("data-reserved-bits", {f"table[{CHECKPOINTS[1]}].0": 2}),
    ):
        add_livebackup_image(images, "bitmap-" + name, edits,
                             trust_checkpoint=missing)
    add_damaged_livebackup_images(images)


def add_damaged_livebackup_images(images):
    """Our extension's own fields."""
    damaged = "extension-damaged"
    other = "33333333-3333-4333-8333-333333333333"
    for name, edits, trust in (
            ("off", {"extension.type": 0x12345678}, "off"),
            ("version-2", {"version": 2}, "unsupported"),
            ("version-0", {"version": 0}, "unsupported"),
            ("checksum", {"crc": 1}, damaged),
            ("flags", {"flags": 4}, damaged),
            ("state-4", {"state": 4}, damaged),
            ("byte-13", {"overwritten": 2}, damaged),
            ("count-33", {"count": 33}, damaged),
            ("count-0xffff", {"count": 0xFFFF}, damaged),
            ("count-less-than-records", {"count": 1}, damaged),
            ("count-more-than-records", {"count": 3}, damaged),
            ("granularity-8", {"granularity_bits": 8}, damaged),
            ("granularity-32", {"granularity_bits": 32}, damaged),
            ("reserved", {"reserved120": 1}, damaged),
            ("record-zero-uuid", {"record[0].uuid": ZERO_UUID}, damaged),
            ("record-same-uuid", {"record[0].uuid": CHECKPOINTS[1]}, damaged),
            ("record-flags", {"record[0].flags": 2}, damaged),
            ("record-no-label", {"record[0].label": ""}, damaged),
            ("record-label", {"record[0].label": "a/b"}, damaged),
            ("record-label-gap", {"record[0].label": "hex:610062"}, damaged),
            ("record-of-another", {"record[1].uuid": other},
             "unlisted-bitmap"),
            ("no-checkpoints", {"count": 0, "zero-record": 0},
             "no-checkpoint"),
    ):
        add_livebackup_image(images, "livebackup-" + name, edits, trust=trust)


def add_livebackup_image(images, name, edits, trust=None,
                         trust_checkpoint=None):
    """A plain image with two checkpoints, edited."""
    images.add(name, Builder(), "ok", sha256=PLAIN, trust=trust or "trusted",
               trust_checkpoint=trust_checkpoint or trust or "trusted")
    path = images.path(name + ".qcow2")
    lbext.enable(path, 65536)
    for checkpoint in CHECKPOINTS:
        lbext.add_checkpoint(path, {
            "uuid": checkpoint, "label": b"main", "time": 1700000000,
            "root_prefix": 0, "flags": lbext.CONFIRMED})
    poker = lbext.Poker(path)
    for field, value in edits.items():
        if field == "zero-record":
            at = poker.extension_offset(lbext.EXT_LIVEBACKUP)
            for index in range(value, 2):
                poker.write(at + lbext.FIXED.size
                            + index * lbext.RECORD.size,
                            bytes(lbext.RECORD.size))
        elif field == "bitmaps.type":
            poker.write(poker.extension_offset(EXT_BITMAPS) - EXTENSION.size,
                        value.to_bytes(4, "big"))
        else:
            poker.poke(field, str(value))
    if "crc" not in edits:
        poker.fix_crc()


def add_bitmap_only_images(images):
    """Bitmaps extension without livebackup."""
    images.add("bitmaps-bit-without-extension",
               Builder(autoclear_features=1), "any", trust="off")
    for name, data in (
            ("short", b"x" * 8),
            ("long", bytes(32)),
            ("absurd", b"\xff" * BITMAPS.size)):
        image = Builder(autoclear_features=1)
        image.extensions = extension(EXT_BITMAPS, data)
        images.add(f"bitmaps-extension-{name}", image, "any", trust="off")


def write_all(directory):
    """Write all images and the manifest."""
    os.makedirs(directory, exist_ok=True)
    images = Set(directory)
    for add in (add_header_images, add_table_images, add_mapping_images,
                add_compressed_images, add_extension_images,
                add_backing_images, add_data_file_images, add_bitmap_images,
                add_bitmap_only_images):
        add(images)
    with open(images.path("manifest.json"), "w") as file:
        json.dump(images.manifest, file, indent=1)
        file.write("\n")
