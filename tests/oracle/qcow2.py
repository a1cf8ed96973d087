#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Independent qcow2 reader, made from docs/interop/qcow2.txt of QEMU.

    qcow2.py read IMG -o RAW    content of the active layer, sparse
    qcow2.py sha IMG            SHA-256 of that content
    qcow2.py refcheck IMG       refcounts as they should be; JSON
    qcow2.py hostile DIR        images with one absurdity each, and
                                DIR/manifest.json (see hostile.py)

Strict: what the specification forbids is refused when the image is opened,
or is a read error where it touches only a part of the disk.  As in the
project, a backing file without a recorded format is refused, and so are
encryption, the corrupt bit and protocols in file names.  Tables and data that
begin behind the end of the file are errors, where QEMU reads zeroes.

Exit: 0 done, 1 refused or read error, 2 usage, 4 refcounts damaged (leaks
alone: 0).
"""

import argparse
import collections
import hashlib
import json
import os
import sys
import zlib

import zstandard

from layout import Layout

MAGIC = 0x514649FB
EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_ENCRYPTION = 0x0537BE77
EXT_DATA_FILE = 0x44415441
KNOWN_EXTENSIONS = {
    EXT_BACKING_FORMAT: "backing format", EXT_FEATURE_NAMES: "feature names",
    EXT_BITMAPS: "bitmaps", EXT_ENCRYPTION: "encryption",
    EXT_DATA_FILE: "data file"}

INCOMPAT_DIRTY = 1 << 0
INCOMPAT_CORRUPT = 1 << 1
INCOMPAT_DATA_FILE = 1 << 2
INCOMPAT_COMPRESSION = 1 << 3
INCOMPAT_EXTENDED_L2 = 1 << 4
INCOMPAT_KNOWN = (1 << 5) - 1
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_RAW_DATA = 1 << 1

OFFSET_MASK = 0x00FFFFFFFFFFFE00
COPIED = 1 << 63
COMPRESSED = 1 << 62
L1_RESERVED = 0x7F000000000001FF
L2_RESERVED = 0x3F000000000001FE

# Limits of QEMU that the specification names.
MAX_CLUSTER_BITS = 21
MAX_L1_BYTES = 32 << 20
MAX_REFTABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_BITMAPS = 65535
MAX_DIRECTORY = MAX_BITMAPS * 1088

HEADER2 = Layout(
    "big",
    ("magic", 4, "int"), ("version", 4, "int"),
    ("backing_file_offset", 8, "int"), ("backing_file_size", 4, "int"),
    ("cluster_bits", 4, "int"), ("size", 8, "int"),
    ("crypt_method", 4, "int"), ("l1_size", 4, "int"),
    ("l1_table_offset", 8, "int"), ("refcount_table_offset", 8, "int"),
    ("refcount_table_clusters", 4, "int"), ("nb_snapshots", 4, "int"),
    ("snapshots_offset", 8, "int"))

HEADER3 = Layout(
    "big",
    *((name, size, kind) for name, _, size, kind in HEADER2.fields),
    ("incompatible_features", 8, "int"), ("compatible_features", 8, "int"),
    ("autoclear_features", 8, "int"), ("refcount_order", 4, "int"),
    ("header_length", 4, "int"))

EXTENSION = Layout("big", ("type", 4, "int"), ("length", 4, "int"))

FEATURE = Layout("big", ("type", 1, "int"), ("bit", 1, "int"),
                 ("name", 46, "raw"))

BITMAPS = Layout(
    "big",
    ("nb_bitmaps", 4, "int"), ("reserved4", 4, "int"),
    ("directory_size", 8, "int"), ("directory_offset", 8, "int"))

BITMAP = Layout(
    "big",
    ("table_offset", 8, "int"), ("table_size", 4, "int"),
    ("flags", 4, "int"), ("type", 1, "int"), ("granularity_bits", 1, "int"),
    ("name_size", 2, "int"), ("extra_data_size", 4, "int"))

SNAPSHOT = Layout(
    "big",
    ("l1_table_offset", 8, "int"), ("l1_size", 4, "int"),
    ("id_size", 2, "int"), ("name_size", 2, "int"), ("seconds", 4, "int"),
    ("nanoseconds", 4, "int"), ("guest_clock", 8, "int"),
    ("vm_state_size", 4, "int"), ("extra_data_size", 4, "int"))

BITMAP_IN_USE = 1
BITMAP_AUTO = 2
BITMAP_EXTRA_COMPATIBLE = 4


class Refused(Exception):
    """The image can't be opened."""


class ReadError(Exception):
    """A part of the disk can't be read."""


class BitmapError(Exception):
    """The bitmap directory can't be read."""


def round_up(value, unit):
    """The next multiple of unit."""
    return -(-value // unit) * unit


def table_entries(data):
    """Integers of a table of 64-bit entries."""
    return [int.from_bytes(data[i:i + 8], "big")
            for i in range(0, len(data), 8)]


class RawFile:
    """A plain file, or block device, of disk content."""

    def __init__(self, path):
        self.path = path
        self.file = open(path, "rb")
        self.size = self.file.seek(0, os.SEEK_END)

    def read(self, offset, length):
        """Bytes; zeroes behind the end."""
        self.file.seek(offset)
        return self.file.read(length).ljust(length, b"\0")

    def content_ranges(self):
        """Yield (offset, length) outside of which there are zeroes."""
        position = 0
        fd = self.file.fileno()
        while position < self.size:
            try:
                start = os.lseek(fd, position, os.SEEK_DATA)
            except OSError:
                return
            position = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, position - start


class Header:
    """The header, its extensions and the strings; nothing beyond them."""

    def __init__(self, path):
        self.path = path
        self.file = open(path, "rb")
        self.file_size = self.file.seek(0, os.SEEK_END)
        self.fields = self._read_fields()
        self.cluster_bits = self.fields["cluster_bits"]
        self.cluster_size = 1 << self.cluster_bits
        self.extensions = self._read_extensions()
        self.snapshot_table_end = 0    # set by snapshots()
        self._check_features()
        self._check_geometry()
        self.backing_name = self._read_backing_name()

    def pread(self, offset, length):
        """Bytes of the file, fewer at its end."""
        self.file.seek(offset)
        return self.file.read(length)

    def __getattr__(self, name):
        """Header fields are attributes."""
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None

    def _read_fields(self):
        data = self.pread(0, HEADER3.size + 8)
        if len(data) < HEADER2.size:
            raise Refused("file is too short for a qcow2 header")
        fields = HEADER2.decode(data)
        if fields["magic"] != MAGIC:
            raise Refused("not a qcow2 image")
        if fields["version"] not in (2, 3):
            raise Refused(f"unsupported version {fields['version']}")
        bits = fields["cluster_bits"]
        if not 9 <= bits <= MAX_CLUSTER_BITS:
            raise Refused(f"cluster size 2^{bits} is not supported")
        if fields["version"] == 2:
            fields.update(incompatible_features=0, compatible_features=0,
                          autoclear_features=0, refcount_order=4,
                          header_length=HEADER2.size)
        else:
            if len(data) < HEADER3.size:
                raise Refused("header is cut off")
            fields = HEADER3.decode(data)
            length = fields["header_length"]
            if length < HEADER3.size or length % 8 or length > 1 << bits:
                raise Refused(f"header length {length} is invalid")
        fields["compression_type"] = (
            data[104] if fields["header_length"] > 104 and len(data) > 104
            else 0)
        return fields

    def _read_extensions(self):
        """[(type, offset of data, data)]; needed for errors, so first."""
        end = self.cluster_size
        if self.backing_file_offset:
            if self.backing_file_offset > end:
                raise Refused("backing file name is outside the first cluster")
            end = self.backing_file_offset
        found = []
        position = self.header_length
        while position + EXTENSION.size <= end:
            head = EXTENSION.decode(self.pread(position, EXTENSION.size))
            if head["type"] == EXT_END:
                break
            position += EXTENSION.size
            if head["length"] > end - position:
                raise Refused(f"header extension 0x{head['type']:08x} "
                              "is too long")
            data = self.pread(position, head["length"])
            if len(data) != head["length"]:
                raise Refused("header extension is cut off")
            if head["type"] in KNOWN_EXTENSIONS and any(
                    head["type"] == kind for kind, _, _ in found):
                raise Refused(f"header extension 0x{head['type']:08x} twice")
            found.append((head["type"], position, data))
            position += round_up(head["length"], 8)
        return found

    def extension(self, kind):
        """Data of the first extension of that type, or None."""
        for found, _, data in self.extensions:
            if found == kind:
                return data
        return None

    def feature_names(self):
        """[(type, bit, name)] of the feature name table."""
        table = self.extension(EXT_FEATURE_NAMES) or b""
        names = []
        for at in range(0, len(table) // FEATURE.size * FEATURE.size,
                        FEATURE.size):
            entry = FEATURE.decode(table, at)
            name = entry["name"].split(b"\0")[0].decode("utf-8", "replace")
            names.append((entry["type"], entry["bit"], name))
        return names

    def _check_features(self):
        unknown = self.incompatible_features & ~INCOMPAT_KNOWN
        if unknown:
            names = {bit: name for kind, bit, name in self.feature_names()
                     if kind == 0}
            words = [f"bit {bit}" + (f" ({names[bit]})" if bit in names
                                     else "")
                     for bit in range(64) if unknown >> bit & 1]
            raise Refused("unknown incompatible feature "
                          + ", ".join(words))
        if self.incompatible_features & INCOMPAT_CORRUPT:
            raise Refused("image is marked corrupt")
        if self.crypt_method:
            name = {1: "AES", 2: "LUKS"}.get(self.crypt_method, "unknown")
            raise Refused(f"image is encrypted ({name})")
        compression_bit = self.incompatible_features & INCOMPAT_COMPRESSION
        if bool(compression_bit) != bool(self.compression_type):
            raise Refused("compression type and its feature bit disagree")
        if self.compression_type > 1:
            raise Refused(f"unknown compression type {self.compression_type}")
        if (self.extension(EXT_DATA_FILE) is not None
                and not self.has_data_file):
            raise Refused("data file extension without its feature bit")
        if (self.autoclear_features & AUTOCLEAR_RAW_DATA
                and not self.has_data_file):
            raise Refused("raw external data bit without a data file")

    def _check_geometry(self):
        if self.size > 2**63 - 1:
            raise Refused("virtual size is too large")
        if self.refcount_order > 6:
            raise Refused(f"refcount order {self.refcount_order} is invalid")
        if self.extended_l2 and self.cluster_bits < 14:
            raise Refused("extended L2 entries want clusters of 16 KiB")
        needed = -(-self.size // (self.cluster_size * self.l2_entries))
        if self.l1_size < needed:
            raise Refused("L1 table is too small for the virtual size")
        self.check_table("L1 table", self.l1_table_offset, self.l1_size * 8,
                         MAX_L1_BYTES)
        self.check_table("refcount table", self.refcount_table_offset,
                         self.refcount_table_clusters * self.cluster_size,
                         MAX_REFTABLE_BYTES)
        if self.refcount_table_clusters == 0:
            raise Refused("no refcount table")
        if self.nb_snapshots > MAX_SNAPSHOTS:
            raise Refused("too many snapshots")
        if self.nb_snapshots:
            self.check_table("snapshot table", self.snapshots_offset,
                             self.nb_snapshots * SNAPSHOT.size, 64 << 20)
            if self.has_data_file:
                raise Refused("internal snapshots with an external data file")

    def check_table(self, what, offset, length, maximum):
        """Alignment, size and position of a contiguous table."""
        if length > maximum:
            raise Refused(f"{what} is too large")
        if offset % self.cluster_size:
            raise Refused(f"{what} is not aligned")
        if length and offset + length > round_up(self.file_size,
                                                 self.cluster_size):
            raise Refused(f"{what} is beyond the end of the file")

    def _read_backing_name(self):
        if not self.backing_file_offset:
            return None
        size = self.backing_file_size
        if size > 1023 or self.backing_file_offset + size > self.cluster_size:
            raise Refused("backing file name is outside the first cluster")
        if self.backing_file_offset < self.header_length:
            raise Refused("backing file name is inside the header")
        if self.autoclear_features & AUTOCLEAR_RAW_DATA:
            raise Refused("backing file with a raw external data file")
        name = self.pread(self.backing_file_offset, size)
        if len(name) != size:
            raise Refused("backing file name is cut off")
        if b"\0" in name:
            raise Refused("backing file name has a zero byte")
        return name or None

    @property
    def has_data_file(self):
        """Are guest clusters in another file?"""
        return bool(self.incompatible_features & INCOMPAT_DATA_FILE)

    @property
    def extended_l2(self):
        """Are there subclusters?"""
        return bool(self.incompatible_features & INCOMPAT_EXTENDED_L2)

    @property
    def l2_entry_size(self):
        """In bytes."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self):
        """Entries of an L2 table."""
        return self.cluster_size // self.l2_entry_size

    @property
    def backing_format(self):
        """Bytes of the backing format extension, or None."""
        return self.extension(EXT_BACKING_FORMAT)

    def related_path(self, name):
        """Path of a file that the header names."""
        text = os.fsdecode(name)
        if text.startswith("file:"):
            text = text[5:]
        elif ":" in text.split("/")[0]:
            raise Refused(f"file name {text} has a protocol")
        return os.path.join(os.path.dirname(self.path), text)

    # -- bitmaps

    def bitmaps_extension(self):
        """Decoded bitmaps extension, or None."""
        data = self.extension(EXT_BITMAPS)
        if data is None:
            return None
        if len(data) != BITMAPS.size:
            raise BitmapError("bitmaps extension has another length")
        return BITMAPS.decode(data)

    def bitmaps(self):
        """Entries of the bitmap directory, whatever the autoclear bit says.

        Each a dict of the fields, "name" (bytes) and "position" (file offset
        of the entry).  Raises BitmapError where the directory breaks the
        standard; values that a single bitmap has wrong are left to the
        caller.
        """
        extension = self.bitmaps_extension()
        if extension is None:
            return []
        size, offset = (extension["directory_size"],
                        extension["directory_offset"])
        if not 1 <= extension["nb_bitmaps"] <= MAX_BITMAPS:
            raise BitmapError("number of bitmaps is out of range")
        if extension["reserved4"]:
            raise BitmapError("reserved field is not zero")
        if not size or size > MAX_DIRECTORY:
            raise BitmapError("size of the bitmap directory is out of range")
        if offset % self.cluster_size or not offset:
            raise BitmapError("bitmap directory is not aligned")
        data = self.pread(offset, size) if offset < self.file_size else b""
        if len(data) != size:
            raise BitmapError("bitmap directory is beyond the end of the file")
        entries = []
        position = 0
        for _ in range(extension["nb_bitmaps"]):
            entry, position = read_bitmap_entry(data, position)
            entry["position"] += offset
            if any(e["name"] == entry["name"] for e in entries):
                raise BitmapError("two bitmaps have the same name")
            entries.append(entry)
        if position != size:
            raise BitmapError("bitmap directory has another size than its "
                              "entries")
        return entries

    def bitmap_table(self, entry):
        """Entries of a bitmap's table; BitmapError if it is no good."""
        if entry["granularity_bits"] > 63:
            raise BitmapError("granularity is out of range")
        bits = -(-self.size >> entry["granularity_bits"])
        wanted = -(-bits // (8 * self.cluster_size))
        if entry["table_size"] != wanted:
            raise BitmapError("bitmap table has another size than the disk "
                              "wants")
        offset, length = entry["table_offset"], entry["table_size"] * 8
        if offset % self.cluster_size or (length and not offset):
            raise BitmapError("bitmap table is not aligned")
        if length and offset + length > round_up(self.file_size,
                                                 self.cluster_size):
            raise BitmapError("bitmap table is beyond the end of the file")
        entries = table_entries(self.pread(offset, length).ljust(length,
                                                                 b"\0"))
        for value in entries:
            data_at = value & OFFSET_MASK
            if value & ~OFFSET_MASK & ~1 or (data_at and value & 1):
                raise BitmapError("bitmap table entry has reserved bits")
            if data_at % self.cluster_size or data_at >= self.file_size:
                raise BitmapError("bitmap data is out of range")
        return entries

    def bitmap_ranges(self, entry):
        """[(first bit, count)] of set bits, ascending, merged."""
        table = self.bitmap_table(entry)
        total = -(-self.size >> entry["granularity_bits"])
        per_cluster = self.cluster_size * 8
        ranges = []
        for index, value in enumerate(table):
            base = index * per_cluster
            count = min(per_cluster, total - base)
            if not value & OFFSET_MASK:
                if value & 1:
                    add_range(ranges, base, count)
                continue
            data = self.pread(value & OFFSET_MASK, self.cluster_size)
            for bit in set_bits(data, count):
                add_range(ranges, base + bit, 1)
        return ranges

    # -- snapshots

    def snapshots(self):
        """[(name, L1 offset, L1 entries)] of the snapshot table."""
        found = []
        position = self.snapshots_offset
        for _ in range(self.nb_snapshots):
            entry = SNAPSHOT.decode(self.pread(position, SNAPSHOT.size)
                                    .ljust(SNAPSHOT.size, b"\0"))
            name_at = position + SNAPSHOT.size + entry["extra_data_size"]
            strings = entry["id_size"] + entry["name_size"]
            if name_at + strings > self.file_size:
                raise Refused("snapshot table is beyond the end of the file")
            name = self.pread(name_at + entry["id_size"], entry["name_size"])
            self.check_table("snapshot's L1 table", entry["l1_table_offset"],
                             entry["l1_size"] * 8, MAX_L1_BYTES)
            found.append((name.decode("utf-8", "replace"),
                          entry["l1_table_offset"], entry["l1_size"]))
            position = round_up(name_at + strings, 8)
        self.snapshot_table_end = position
        return found

    def compressed_span(self, entry):
        """(host offset, bytes) of a compressed cluster."""
        bits = 62 - (self.cluster_bits - 8)
        offset = entry & ((1 << bits) - 1)
        sectors = (entry & (COMPRESSED - 1)) >> bits
        return offset, (sectors + 1) * 512 - offset % 512

    def read_table(self, offset, count):
        """`count` entries of 64 bits; zeroes behind the end of the file."""
        return table_entries(self.pread(offset, count * 8)
                             .ljust(count * 8, b"\0"))


def read_bitmap_entry(data, position):
    """Decode one directory entry; return (entry, position behind it)."""
    if position + BITMAP.size > len(data):
        raise BitmapError("bitmap directory is cut off")
    entry = BITMAP.decode(data, position)
    entry["position"] = position
    name_at = position + BITMAP.size + entry["extra_data_size"]
    end = round_up(name_at + entry["name_size"], 8)
    if end > len(data):
        raise BitmapError("bitmap directory is cut off")
    if not 1 <= entry["name_size"] <= 1023:
        raise BitmapError("bitmap name has a length that is out of range")
    if any(data[name_at + entry["name_size"]:end]):
        raise BitmapError("padding of the bitmap directory is not zero")
    entry["extra"] = data[position + BITMAP.size:name_at]
    entry["name"] = data[name_at:name_at + entry["name_size"]]
    return entry, end


def set_bits(data, count):
    """Numbers of the set bits of a bitmap cluster, below `count`."""
    for at, byte in enumerate(data[:-(-count // 8)]):
        if byte:
            for bit in range(8):
                if byte >> bit & 1 and at * 8 + bit < count:
                    yield at * 8 + bit


def add_range(ranges, start, count):
    """Append to a list of (start, count), joining neighbours."""
    if ranges and sum(ranges[-1]) == start:
        ranges[-1] = (ranges[-1][0], ranges[-1][1] + count)
    else:
        ranges.append((start, count))


class Image(Header):
    """An image that can be read: header, tables, data file, backing chain."""

    def __init__(self, path, seen=()):
        super().__init__(path)
        identity = os.path.realpath(path)
        if identity in seen:
            raise Refused(f"backing chain loops at {path}")
        self.l1 = self.read_table(self.l1_table_offset, self.l1_size)
        self.snapshots()
        self.data_file = self._open_data_file()
        self.backing = self._open_backing(seen + (identity,))
        self._l2_cached = (None, None)

    def _open_data_file(self):
        if not self.has_data_file:
            return None
        name = self.extension(EXT_DATA_FILE)
        if not name:
            raise Refused("the name of the data file is not recorded")
        try:
            return RawFile(self.related_path(name))
        except OSError as error:
            raise Refused(f"data file: {error}") from error

    def _open_backing(self, seen):
        if self.backing_name is None:
            return None
        backing_format = self.backing_format
        if not backing_format:
            raise Refused("backing file without a recorded format")
        path = self.related_path(self.backing_name)
        try:
            if backing_format == b"raw":
                return RawFile(path)
            if backing_format == b"qcow2":
                return Image(path, seen)
        except OSError as error:
            raise Refused(f"backing file: {error}") from error
        raise Refused("backing format "
                      + backing_format.decode("latin-1") + " is unsupported")

    # -- mapping

    def l2_table(self, l1_index):
        """[(entry, bitmap)] of an L2 table, or None; bitmap None without
        extended entries."""
        if self._l2_cached[0] == l1_index:
            return self._l2_cached[1]
        value = self.l1[l1_index]
        if value & L1_RESERVED:
            raise ReadError(f"L1 entry {l1_index} has reserved bits")
        offset = value & OFFSET_MASK
        table = None
        if offset:
            if offset % self.cluster_size:
                raise ReadError(f"L2 table {l1_index} is not aligned")
            if offset >= self.file_size:
                raise ReadError(f"L2 table {l1_index} is beyond the end of "
                                "the file")
            words = self.read_table(offset, self.cluster_size // 8)
            table = (list(zip(words[0::2], words[1::2])) if self.extended_l2
                     else [(word, None) for word in words])
        self._l2_cached = (l1_index, table)
        return table

    def content_ranges(self):
        """Yield (offset, length), whole clusters of this image and whatever
        of the backing file, outside of which the disk reads as zero."""
        if self.backing is not None:
            yield from self.backing.content_ranges()
        for l1_index in range(-(-self.size // (self.cluster_size
                                               * self.l2_entries))):
            table = self.l2_table(l1_index)
            for l2_index, (entry, bitmap) in enumerate(table or ()):
                if entry or bitmap:
                    guest = (l1_index * self.l2_entries + l2_index)
                    yield guest << self.cluster_bits, self.cluster_size

    def read(self, offset, length):
        """Bytes of the disk; zeroes behind its end."""
        out = []
        end = min(offset + length, self.size)
        position = offset
        while position < end:
            cluster = position >> self.cluster_bits
            within = position & (self.cluster_size - 1)
            count = min(self.cluster_size - within, end - position)
            content = self.read_cluster(cluster)
            if content is None:
                out.append(self._read_backing(position, count))
            else:
                out.append(content[within:within + count])
            position += count
        return b"".join(out).ljust(length, b"\0")

    def _read_backing(self, offset, length):
        if self.backing is None:
            return bytes(length)
        return self.backing.read(offset, length)

    def read_cluster(self, number):
        """Content of a guest cluster; None if it is the backing file's."""
        l1_index, l2_index = divmod(number, self.l2_entries)
        table = self.l2_table(l1_index)
        if table is None:
            return None
        entry, bitmap = table[l2_index]
        if entry & COMPRESSED:
            return self._read_compressed(entry, bitmap, number)
        if entry & L2_RESERVED or (entry & 1 and
                                   (self.version == 2 or self.extended_l2)):
            raise ReadError(f"L2 entry of cluster {number} has reserved bits")
        if self.extended_l2:
            return self._read_subclusters(entry, bitmap, number)
        if entry & 1:
            self._host_offset(entry, number)
            return bytes(self.cluster_size)
        if not self._is_allocated(entry):
            return None
        return self._read_host(self._host_offset(entry, number), 0,
                               self.cluster_size, number)

    def _is_allocated(self, entry):
        """Does a standard descriptor name a host cluster?"""
        return bool(entry & OFFSET_MASK
                    or (self.data_file and entry & COPIED))

    def _host_offset(self, entry, number):
        """Checked host offset of a standard descriptor."""
        offset = entry & OFFSET_MASK
        if offset % self.cluster_size:
            raise ReadError(f"cluster {number} is not aligned in the file")
        if (self.data_file and self._is_allocated(entry)
                and offset != number << self.cluster_bits):
            raise ReadError(f"cluster {number} has another place in the data "
                            "file")
        return offset

    def _read_host(self, host, within, length, number):
        """Bytes of a data cluster; its part behind the end of the file is
        zero, but it must begin before it."""
        source = self.data_file
        size = source.size if source else self.file_size
        if host >= size:
            raise ReadError(f"cluster {number} is beyond the end of the file")
        data = (source.read(host + within, length) if source
                else self.pread(host + within, length))
        return data.ljust(length, b"\0")

    def _read_subclusters(self, entry, bitmap, number):
        """A cluster with extended L2 entry, or None if all of it is the
        backing file's."""
        allocated, zero = bitmap & 0xFFFFFFFF, bitmap >> 32
        if allocated & zero:
            raise ReadError(f"cluster {number} has an invalid subcluster")
        if allocated and not self._is_allocated(entry):
            raise ReadError(f"cluster {number} has subclusters without a "
                            "host cluster")
        if not allocated and not zero:
            return None
        host = self._host_offset(entry, number)
        size = self.cluster_size // 32
        out = []
        for i in range(32):
            if allocated >> i & 1:
                out.append(self._read_host(host, i * size, size, number))
            elif zero >> i & 1:
                out.append(bytes(size))
            else:
                guest = (number << self.cluster_bits) + i * size
                out.append(self._read_backing(guest, size))
        return b"".join(out)

    def _read_compressed(self, entry, bitmap, number):
        if self.data_file:
            raise ReadError("compressed cluster with a data file")
        if entry & COPIED or bitmap:
            raise ReadError(f"L2 entry of cluster {number} has reserved bits")
        offset, length = self.compressed_span(entry)
        if offset >> 56 or offset >= self.file_size:
            raise ReadError(f"compressed cluster {number} is beyond the end "
                            "of the file")
        data = self.pread(offset, length)
        try:
            content = (self._inflate(data) if self.compression_type == 0
                       else self._unzstd(data))
        except (zlib.error, zstandard.ZstdError) as error:
            raise ReadError(f"compressed cluster {number}: {error}") from error
        if len(content) != self.cluster_size:
            raise ReadError(f"compressed cluster {number} is too short")
        return content

    def _inflate(self, data):
        return zlib.decompressobj(-15).decompress(data, self.cluster_size)

    def _unzstd(self, data):
        """Decompress until there is a cluster, over frames if need be."""
        reader = zstandard.ZstdDecompressor(
            max_window_size=1 << 27).stream_reader(data,
                                                   read_across_frames=True)
        out = b""
        while len(out) < self.cluster_size:
            piece = reader.read(self.cluster_size - len(out))
            if not piece:
                break
            out += piece
        return out


def merged_ranges(ranges, size):
    """Sort and join (offset, length) ranges, cut at size."""
    position = 0
    for offset, length in sorted(ranges):
        start, end = max(offset, position), min(offset + length, size)
        if end > start:
            yield start, end - start
            position = end


def chunks(image, unit=1 << 20):
    """Yield (offset, bytes) of what may be other than zero."""
    for offset, length in merged_ranges(image.content_ranges(), image.size):
        while length:
            count = min(length, unit)
            yield offset, image.read(offset, count)
            offset += count
            length -= count


def write_raw(image, out):
    """Write the disk to an empty file, with holes."""
    out.truncate(image.size)
    for offset, data in chunks(image):
        for at in range(0, len(data), 4096):
            piece = data[at:at + 4096]
            if any(piece):
                out.seek(offset + at)
                out.write(piece)


def sha256_of(image):
    """SHA-256 of the disk's content."""
    state = hashlib.sha256()
    zeroes = bytes(1 << 20)

    def skip(count):
        while count:
            state.update(zeroes[:min(count, len(zeroes))])
            count -= min(count, len(zeroes))

    position = 0
    for offset, data in chunks(image):
        skip(offset - position)
        state.update(data)
        position = offset + len(data)
    skip(image.size - position)
    return state.hexdigest()


# --------------------------------------------------------------------------
# Refcounts
# --------------------------------------------------------------------------

class RefCheck:
    """Recomputes the refcounts of an image and compares them."""

    def __init__(self, image):
        self.image = image
        self.wanted = collections.Counter()
        self.corruptions = []
        self.leaks = []
        self.copied = []               # (cluster, flag, what) to compare

    def use(self, offset, length, what):
        """Count one reference to every cluster of a span."""
        image = self.image
        if offset + length > round_up(image.file_size, image.cluster_size):
            self.corruptions.append(f"{what} at {offset} is beyond the end "
                                    "of the file")
            return
        first = offset >> image.cluster_bits
        last = (offset + max(length, 1) - 1) >> image.cluster_bits
        for cluster in range(first, last + 1):
            self.wanted[cluster] += 1

    def run(self):
        """Fill `corruptions` and `leaks`; return self."""
        image = self.image
        self.use(0, image.cluster_size, "header")
        self._use_l1(image.l1_table_offset, image.l1_size, "active", True)
        for name, offset, count in image.snapshots():
            self._use_l1(offset, count, f"snapshot {name}", False)
        if image.nb_snapshots:
            self.use(image.snapshots_offset,
                     image.snapshot_table_end - image.snapshots_offset,
                     "snapshot table")
        self._use_bitmaps()
        self._compare(self._use_refcounts())
        return self

    def _use_l1(self, offset, count, what, active):
        image = self.image
        if count:
            self.use(offset, count * 8, f"{what} L1 table")
        for index, value in enumerate(image.read_table(offset, count)):
            if value & L1_RESERVED:
                self.corruptions.append(f"{what} L1 entry {index} has "
                                        "reserved bits")
            table = value & OFFSET_MASK
            if not table:
                continue
            if table % image.cluster_size:
                self.corruptions.append(f"{what} L2 table {index} is not "
                                        "aligned")
                continue
            self.use(table, image.cluster_size, f"{what} L2 table {index}")
            if active:
                self._note_copied(table, value, f"L2 table {index}")
            self._use_l2(table, f"{what} L2 table {index}", active)

    def _use_l2(self, table, what, active):
        image = self.image
        step = 2 if image.extended_l2 else 1
        words = image.read_table(table, image.cluster_size // 8)[::step]
        for index, entry in enumerate(words):
            if entry & COMPRESSED:
                offset, length = image.compressed_span(entry)
                length = min(length, max(image.file_size - offset, 1))
                self.use(offset, length, f"{what}, compressed {index}")
                if entry & COPIED:
                    self.corruptions.append(f"{what}: compressed entry {index}"
                                            " has the copied flag")
                continue
            host = entry & OFFSET_MASK
            if entry & L2_RESERVED:
                self.corruptions.append(f"{what}: entry {index} has reserved "
                                        "bits")
            if not host or image.has_data_file:
                continue
            if host % image.cluster_size:
                self.corruptions.append(f"{what}: cluster {index} is not "
                                        "aligned")
                continue
            self.use(host, image.cluster_size, f"{what}, cluster {index}")
            if active:
                self._note_copied(host, entry, f"{what}, cluster {index}")

    def _note_copied(self, host, entry, what):
        """Remember to compare the copied flag with the refcount."""
        self.copied.append((host >> self.image.cluster_bits,
                            bool(entry & COPIED), what))

    def _use_bitmaps(self):
        image = self.image
        if not image.autoclear_features & AUTOCLEAR_BITMAPS:
            return
        try:
            entries = image.bitmaps()
        except BitmapError as error:
            self.corruptions.append(str(error))
            return
        if entries:
            extension = image.bitmaps_extension()
            self.use(extension["directory_offset"],
                     extension["directory_size"], "bitmap directory")
        for entry in entries:
            name = entry["name"].decode("utf-8", "replace")
            try:
                table = image.bitmap_table(entry)
            except BitmapError as error:
                self.corruptions.append(f"bitmap {name}: {error}")
                continue
            if table:
                self.use(entry["table_offset"], len(table) * 8,
                         f"table of bitmap {name}")
            for value in table:
                if value & OFFSET_MASK:
                    self.use(value & OFFSET_MASK, image.cluster_size,
                             f"data of bitmap {name}")

    def _use_refcounts(self):
        """Count refcount table and blocks; return {cluster: refcount}."""
        image = self.image
        count = image.refcount_table_clusters * image.cluster_size // 8
        self.use(image.refcount_table_offset, count * 8, "refcount table")
        found = {}
        per_block = image.cluster_size * 8 >> image.refcount_order
        table = image.read_table(image.refcount_table_offset, count)
        for index, block in enumerate(table):
            if not block:
                continue
            if block % image.cluster_size or block >= image.file_size:
                self.corruptions.append(f"refcount block {index} is out of "
                                        "place")
                continue
            self.use(block, image.cluster_size, f"refcount block {index}")
            data = image.pread(block, image.cluster_size).ljust(
                image.cluster_size, b"\0")
            for at, value in nonzero_refcounts(data, image.refcount_order):
                found[index * per_block + at] = value
        return found

    def _compare(self, found):
        for cluster in sorted(set(found) | set(self.wanted)):
            have, want = found.get(cluster, 0), self.wanted[cluster]
            if have != want:
                text = (f"cluster {cluster}: refcount {have}, "
                        f"{want} references")
                (self.leaks if have > want
                 else self.corruptions).append(text)
        for cluster, flag, what in self.copied:
            if flag != (found.get(cluster, 0) == 1):
                self.corruptions.append(f"{what}: copied flag is {int(flag)}, "
                                        f"refcount {found.get(cluster, 0)}")


def nonzero_refcounts(data, order):
    """Yield (index, refcount) of a refcount block."""
    width = 1 << order
    if width >= 8:
        step = width // 8
        for at in range(0, len(data), step):
            value = int.from_bytes(data[at:at + step], "big")
            if value:
                yield at // step, value
        return
    per_byte = 8 // width
    for at, byte in enumerate(data):
        for i in range(per_byte if byte else 0):
            value = byte >> i * width & (1 << width) - 1
            if value:
                yield at * per_byte + i, value


# --------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------

def command_read(args):
    """Write the content."""
    image = Image(args.image)
    with open(args.output, "wb") as out:
        write_raw(image, out)
    return 0


def command_sha(args):
    """Print a digest of the content."""
    print(sha256_of(Image(args.image)))
    return 0


def command_refcheck(args):
    """Print leaks and corruptions."""
    check = RefCheck(Header(args.image)).run()
    json.dump({"corruptions": check.corruptions, "leaks": check.leaks},
              sys.stdout, indent=1)
    print()
    return 4 if check.corruptions else 0


def command_hostile(args):
    """Write the hostile images."""
    import hostile
    hostile.write_all(args.directory)
    return 0


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description="independent qcow2 reader")
    commands = parser.add_subparsers(dest="command", required=True)
    read = commands.add_parser("read")
    read.add_argument("image")
    read.add_argument("-o", dest="output", required=True)
    read.set_defaults(run=command_read)
    for name, run in (("sha", command_sha), ("refcheck", command_refcheck)):
        sub = commands.add_parser(name)
        sub.add_argument("image")
        sub.set_defaults(run=run)
    sub = commands.add_parser("hostile")
    sub.add_argument("directory")
    sub.set_defaults(run=command_hostile)
    return parser.parse_args(argv)


def main(argv):
    """Run a command; return its exit status."""
    args = parse_arguments(argv)
    try:
        return args.run(args)
    except (Refused, ReadError, BitmapError, OSError) as error:
        name = getattr(args, "image", "")
        print(f"qcow2.py: {name}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
