#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Independent implementation of the livebackup header extension.

Made from docs/livebackup-extension.md and docs/trust.md alone.

    lbext.py show IMG                 header, extensions, checkpoints, bitmaps
    lbext.py check IMG                every "must"; exit 4 where one is broken
    lbext.py trust IMG [--boot-id HEX] [--dev N]
                                      the trust table: keywords as JSON
    lbext.py changed IMG UUID         [[offset, length]] changed since then
    lbext.py enable IMG [--granularity BYTES]
    lbext.py add IMG UUID LABEL [--confirmed] [--time N]
                                      a new newest checkpoint
    lbext.py poke IMG --set FIELD=VALUE... [--keep-crc]
                                      edit any field, see class Poker

Exit: 0 done, 1 refused or I/O error, 2 usage, 4 a "must" is broken.
"""

import argparse
import json
import os
import re
import sys
import time
import uuid

import qcow2
from layout import Layout, ZERO_UUID, printable
from qcow2 import (AUTOCLEAR_BITMAPS, BITMAP, BITMAP_AUTO, BITMAP_IN_USE,
                   BITMAPS, BitmapError, EXT_BITMAPS, EXT_DATA_FILE,
                   EXT_FEATURE_NAMES, EXTENSION, FEATURE, HEADER3,
                   INCOMPAT_DIRTY, Refused, round_up)

EXT_LIVEBACKUP = 0x4C424B50
AUTOCLEAR_LIVEBACKUP = 1 << 62
FEATURE_TYPE_AUTOCLEAR = 2
FEATURE_NAME = b"livebackup"
END_LIMIT = 4096
MIN_CLUSTER = 4096
MAX_CHECKPOINTS = 32
FLAG_SYNC = 1
FLAG_DURABLE = 2
STATES = ("none", "running", "interrupted", "broken")
NAME_PREFIX = b"lb-"
LABEL_PATTERN = re.compile(rb"[A-Za-z0-9._-]{1,22}\0*\Z")

FIXED = Layout(
    "big",
    ("version", 4, "int"), ("crc", 4, "int"), ("flags", 4, "int"),
    ("state", 1, "int"), ("overwritten", 1, "int"), ("count", 2, "int"),
    ("granularity_bits", 4, "int"), ("reserved20", 4, "int"),
    ("generation", 8, "int"), ("image_uuid", 16, "uuid"),
    ("boot_id", 16, "uuid"), ("device", 8, "int"),
    ("backing_digest", 8, "int"), ("backing_stat_digest", 8, "int"),
    ("data_stat_digest", 8, "int"), ("set_uuid", 16, "uuid"),
    ("begun", 8, "int"), ("reserved120", 8, "int"))

RECORD = Layout(
    "big",
    ("uuid", 16, "uuid"), ("time", 8, "int"), ("virtual_size", 8, "int"),
    ("root_prefix", 8, "int"), ("flags", 2, "int"), ("label", 22, "raw"))

DATA_SIZE = FIXED.size + MAX_CHECKPOINTS * RECORD.size
CONFIRMED = 1


class Damaged(Exception):
    """The extension is damaged."""


class UnsupportedVersion(Exception):
    """The extension has another version."""


# --------------------------------------------------------------------------
# Checksums
# --------------------------------------------------------------------------

def _crc32c_table():
    """Castagnoli polynomial, reflected."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


CRC_TABLE = _crc32c_table()


def crc32c(data):
    """CRC-32C of RFC 3720."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def fnv1a(data):
    """FNV-1a of 64 bits, never 0."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value or 1


def extension_crc(data):
    """Checksum over the extension's data, its own field taken as zero."""
    at = FIXED.offset_of("crc")
    return crc32c(data[:at] + bytes(4) + data[at + 4:])


# --------------------------------------------------------------------------
# What the image is now
# --------------------------------------------------------------------------

def backing_digest(image):
    """Name and format of the backing file."""
    if image.backing_name is None:
        return 0
    return fnv1a(image.backing_name + b"\0"
                 + (image.backing_format or b"") + b"\0")


def stat_bytes(path):
    """Size and mtime of a file, as they enter a digest."""
    status = os.stat(path)
    if os.path.isfile(path):
        size, mtime = status.st_size, status.st_mtime_ns
    else:
        with open(path, "rb") as file:
            size, mtime = file.seek(0, os.SEEK_END), 0
    return size.to_bytes(8, "big") + mtime.to_bytes(8, "big")


def data_file_path(image):
    """Path of the external data file, or None."""
    name = image.extension(EXT_DATA_FILE)
    if not image.has_data_file or not name:
        return None
    return image.related_path(name)


def data_stat_digest(image):
    """Of the image's own external data file."""
    path = data_file_path(image)
    return fnv1a(stat_bytes(path)) if path else 0


def backing_stat_digest(image):
    """Of every file of the backing chain, nearest first."""
    data = b""
    seen = {os.path.realpath(image.path)}
    while image.backing_name is not None:
        path = image.related_path(image.backing_name)
        if os.path.realpath(path) in seen:
            raise Refused("backing chain loops")
        seen.add(os.path.realpath(path))
        data += stat_bytes(path)
        if image.backing_format != b"qcow2":
            break
        image = qcow2.Header(path)
        if data_file_path(image):
            data += stat_bytes(data_file_path(image))
    return fnv1a(data) if data else 0


# --------------------------------------------------------------------------
# Reading the extension
# --------------------------------------------------------------------------

class LiveBackup:
    """The decoded extension of an image."""

    def __init__(self, fixed, records, offset):
        self.fixed = fixed
        self.records = records         # oldest first
        self.offset = offset           # of the data in the file

    def encode(self):
        """Bytes of the extension, checksum right."""
        self.fixed["count"] = len(self.records)
        self.fixed["crc"] = 0
        data = FIXED.encode(self.fixed) + b"".join(
            RECORD.encode(record) for record in self.records)
        data = data.ljust(DATA_SIZE, b"\0")
        self.fixed["crc"] = extension_crc(data)
        return FIXED.encode(self.fixed) + data[FIXED.size:]


def read_livebackup(image):
    """The extension, or None.  Raises Damaged, UnsupportedVersion."""
    found = [(offset, data) for kind, offset, data in image.extensions
             if kind == EXT_LIVEBACKUP]
    if not found:
        return None
    if len(found) > 1:
        raise Damaged("the extension is there twice")
    offset, data = found[0]
    if len(data) < 4:
        raise Damaged("the extension has another length")
    version = int.from_bytes(data[:4], "big")
    if version != 1:
        raise UnsupportedVersion(f"the extension has version {version}")
    if len(data) != DATA_SIZE:
        raise Damaged("the extension has another length")
    fixed = FIXED.decode(data)
    if extension_crc(data) != fixed["crc"]:
        raise Damaged("the checksum differs")
    check_fixed(fixed)
    records = []
    for i in range(MAX_CHECKPOINTS):
        at = FIXED.size + i * RECORD.size
        if i < fixed["count"]:
            records.append(RECORD.decode(data, at))
        elif any(data[at:at + RECORD.size]):
            raise Damaged(f"unused record {i} is not zero")
    check_records(records)
    return LiveBackup(fixed, records, offset)


def check_fixed(fixed):
    """Ranges of the fixed part."""
    if fixed["flags"] & ~(FLAG_SYNC | FLAG_DURABLE):
        raise Damaged("unknown flags")
    if fixed["state"] >= len(STATES):
        raise Damaged("state out of range")
    if fixed["overwritten"] > 1:
        raise Damaged("byte 13 out of range")
    if fixed["count"] > MAX_CHECKPOINTS:
        raise Damaged("too many checkpoints")
    if not 9 <= fixed["granularity_bits"] <= 31:
        raise Damaged("granularity out of range")
    if fixed["reserved20"] or fixed["reserved120"]:
        raise Damaged("reserved bytes are not zero")


def check_records(records):
    """Ranges of the records."""
    for i, record in enumerate(records):
        if record["uuid"] == ZERO_UUID:
            raise Damaged(f"record {i} has no UUID")
        if record["flags"] & ~CONFIRMED:
            raise Damaged(f"record {i} has unknown flags")
        if not LABEL_PATTERN.match(record["label"]):
            raise Damaged(f"record {i} has an invalid label")
    if len({record["uuid"] for record in records}) != len(records):
        raise Damaged("two records have the same UUID")


def bitmap_name(record):
    """Name of a checkpoint's bitmap."""
    return NAME_PREFIX + record["uuid"].encode()


def last_canary(image, record):
    """Granule number of the last canary's byte, None on an empty disk."""
    size = min(image.size, record["virtual_size"])
    return size - 1 if size else None


# --------------------------------------------------------------------------
# Trust
# --------------------------------------------------------------------------

class Trust:
    """Evaluates the trust table for an image."""

    def __init__(self, image, boot_id, device):
        self.image = image
        self.boot_id = boot_id
        self.device = device
        self.live = None
        self.bitmaps = {}

    def evaluate(self):
        """Return the verdicts as a dict for JSON."""
        rule, keyword, why = self.image_rule()
        checkpoints = []
        for i, record in enumerate(self.live.records if self.live else ()):
            if rule:
                failed = [(rule, keyword)]
            else:
                failed = self.checkpoint_rules(i)
            checkpoints.append({
                "uuid": record["uuid"],
                "label": record["label"].rstrip(b"\0").decode("latin-1"),
                "confirmed": bool(record["flags"] & CONFIRMED),
                "rule": failed[0][0] if failed else None,
                "keyword": failed[0][1] if failed else "trusted",
                "all_keywords": sorted({k for _, k in failed})})
        return {"rule": rule, "keyword": keyword or "trusted", "why": why,
                "checkpoints": checkpoints,
                "parents": self.parents(checkpoints)}

    def parents(self, checkpoints):
        """{label: UUID of its newest confirmed checkpoint, or None}."""
        parents = {}
        for checkpoint in checkpoints:
            parents.setdefault(checkpoint["label"], None)
            if checkpoint["confirmed"]:
                parents[checkpoint["label"]] = checkpoint["uuid"]
        return parents

    def image_rule(self):
        """(number, keyword, why) of the first rule that applies, or
        (None, None, "")."""
        for number, rule in enumerate((
                self.rule_1_to_4, self.rule_5, self.rule_6, self.rule_7,
                self.rule_8, self.rule_9, self.rule_10, self.rule_11,
                self.rule_12, self.rule_13), 4):
            found = rule()
            if found:
                return (number,) + found if len(found) == 2 else found
        return None, None, ""

    def rule_1_to_4(self):
        """Is there an extension, and can it be used?"""
        try:
            self.live = read_livebackup(self.image)
        except UnsupportedVersion as error:
            return 2, "unsupported", str(error)
        except Damaged as error:
            return 3, "extension-damaged", str(error)
        if self.live is None:
            return 1, "off", "no livebackup extension"
        if not self.live.records:
            return "no-checkpoint", "the list is empty"
        return None

    def rule_5(self):
        """Standard autoclear bit."""
        if not self.image.autoclear_features & AUTOCLEAR_BITMAPS:
            return "bitmaps-dropped", "autoclear bit 0 is clear"
        if self.image.extension(EXT_BITMAPS) is None:
            return "bitmaps-dropped", "no bitmaps extension"
        return None

    def rule_6(self):
        """Directory."""
        try:
            entries = self.image.bitmaps()
        except BitmapError as error:
            return "directory-damaged", str(error)
        for entry in entries:
            if entry["flags"] & ~7:
                return "directory-damaged", "reserved flags are set"
        self.bitmaps = {entry["name"]: entry for entry in entries}
        return None

    def rule_7(self):
        """Bitmaps of ours that nobody listed."""
        listed = {bitmap_name(record) for record in self.live.records}
        for name in self.bitmaps:
            if name.startswith(NAME_PREFIX) and name not in listed:
                return "unlisted-bitmap", name.decode("latin-1")
        return None

    @property
    def promises(self):
        """P: did the last writer keep livebackup's promises?"""
        return bool(self.image.autoclear_features & AUTOCLEAR_LIVEBACKUP)

    def rule_8(self):
        """Dirty bit."""
        if (self.image.incompatible_features & INCOMPAT_DIRTY
                and not self.promises):
            return "not-closed", "the dirty bit is set"
        return None

    def rule_9(self):
        """Name and format of the backing file."""
        if backing_digest(self.image) != self.live.fixed["backing_digest"]:
            return "backing-changed", "name or format differ"
        return None

    def rule_10(self):
        """Files of the backing chain."""
        try:
            now = backing_stat_digest(self.image)
        except (OSError, Refused) as error:
            return "backing-modified", str(error)
        if now != self.live.fixed["backing_stat_digest"]:
            return "backing-modified", "size or mtime differ"
        return None

    @property
    def clean(self):
        """Is no boot id recorded?"""
        return self.live.fixed["boot_id"] == ZERO_UUID

    @property
    def sync(self):
        """Does the writer sync its bits?"""
        return bool(self.live.fixed["flags"] & FLAG_SYNC)

    def rule_11(self):
        """External data file."""
        if not self.promises or not self.clean:
            return None
        try:
            now = data_stat_digest(self.image)
        except (OSError, Refused) as error:
            return "data-file-modified", str(error)
        if now != self.live.fixed["data_stat_digest"]:
            return "data-file-modified", "size or mtime differ"
        return None

    def rule_12(self):
        """Another boot."""
        if (not self.clean and not self.sync
                and self.live.fixed["boot_id"] != self.boot_id):
            return "power-loss", "the boot id differs"
        return None

    def rule_13(self):
        """Another mount."""
        if (not self.sync
                and self.live.fixed["boot_id"] == self.boot_id
                and self.live.fixed["device"] != self.device):
            return "moved-open", "the device differs"
        return None

    def checkpoint_rules(self, first):
        """[(number, keyword)] of the rules that speak against a checkpoint,
        by number and then from the checkpoint to the newest."""
        failed = []
        for j in range(first, len(self.live.records)):
            failed += self.bitmap_rules(j)
        return sorted(failed, key=lambda pair: pair[0])

    def bitmap_rules(self, j):
        """[(number, keyword)] for one bitmap."""
        record = self.live.records[j]
        entry = self.bitmaps.get(bitmap_name(record))
        if entry is None or not self.is_well_formed(entry):
            return [(14, "bitmap-missing")]
        failed = []
        newest = j == len(self.live.records) - 1
        if bool(entry["flags"] & BITMAP_AUTO) != newest:
            failed.append((15, "bitmap-disabled"))
        if entry["flags"] & BITMAP_IN_USE:
            failed.append((16, "in-use"))
        if not self.has_canaries(entry, record):
            failed.append((17, "canary"))
        return failed

    def is_well_formed(self, entry):
        """Rule 14 for a bitmap that is there."""
        if (entry["type"] != 1 or entry["extra_data_size"]
                or entry["granularity_bits"]
                != self.live.fixed["granularity_bits"]):
            return False
        try:
            self.image.bitmap_table(entry)
        except BitmapError:
            return False
        return True

    def has_canaries(self, entry, record):
        """Are the bits of the first and the last granule set?"""
        last = last_canary(self.image, record)
        if last is None:
            return True
        wanted = {0, last >> entry["granularity_bits"]}
        for start, count in self.image.bitmap_ranges(entry):
            wanted -= {bit for bit in wanted if start <= bit < start + count}
        return not wanted


def changed_since(image, wanted):
    """[(offset, length)] that may have changed since a checkpoint."""
    live = read_livebackup(image)
    uuids = [record["uuid"] for record in live.records] if live else []
    if wanted not in uuids:
        raise Refused(f"no checkpoint {wanted}")
    records = live.records[uuids.index(wanted):]
    entries = {entry["name"]: entry for entry in image.bitmaps()}
    granularity = 1 << live.fixed["granularity_bits"]
    ranges = []
    for record in records:
        if bitmap_name(record) not in entries:
            raise Refused(f"checkpoint {record['uuid']} has no bitmap")
        ranges += [(start * granularity, count * granularity) for start, count
                   in image.bitmap_ranges(entries[bitmap_name(record)])]
        # Above the smaller size all has changed by rule.
        size = min(image.size, record["virtual_size"])
        if size < image.size:
            ranges.append((size, image.size - size))
    joined = []
    for start, length in qcow2.merged_ranges(ranges, image.size):
        qcow2.add_range(joined, start, length)
    return joined


# --------------------------------------------------------------------------
# show, check
# --------------------------------------------------------------------------

def show_bitmap(image, entry):
    """A bitmap as JSON."""
    shown = {"name": entry["name"].decode("latin-1"),
             "flags": entry["flags"],
             "in_use": bool(entry["flags"] & BITMAP_IN_USE),
             "auto": bool(entry["flags"] & BITMAP_AUTO),
             "type": entry["type"],
             "granularity_bits": entry["granularity_bits"],
             "table_offset": entry["table_offset"],
             "table_size": entry["table_size"],
             "extra_data_size": entry["extra_data_size"]}
    try:
        shown["granules"] = image.bitmap_ranges(entry)
    except BitmapError as error:
        shown["error"] = str(error)
    return shown


def show_image(image):
    """All of it as JSON."""
    shown = {
        "header": dict(image.fields),
        "file_size": image.file_size,
        "autoclear": {
            "bitmaps": bool(image.autoclear_features & AUTOCLEAR_BITMAPS),
            "livebackup": bool(image.autoclear_features
                               & AUTOCLEAR_LIVEBACKUP)},
        "backing_file": os.fsdecode(image.backing_name or b"") or None,
        "extensions": [{"type": f"0x{kind:08x}", "offset": offset,
                        "length": len(data)}
                       for kind, offset, data in image.extensions],
        "feature_names": image.feature_names(),
    }
    try:
        live = read_livebackup(image)
        shown["livebackup"] = live and dict(
            printable(live.fixed), offset=live.offset,
            state=STATES[live.fixed["state"]],
            records=[printable(record) for record in live.records])
    except (Damaged, UnsupportedVersion) as error:
        shown["livebackup_error"] = str(error)
    try:
        extension = image.bitmaps_extension()
        shown["bitmaps_extension"] = extension and printable(extension)
        shown["bitmaps"] = [show_bitmap(image, entry)
                            for entry in image.bitmaps()]
    except BitmapError as error:
        shown["bitmaps_error"] = str(error)
    return shown


def broken_musts(image):
    """Yield a sentence for each "must" that an image breaks, which was
    written by programs that know livebackup."""
    try:
        live = read_livebackup(image)
    except (Damaged, UnsupportedVersion) as error:
        yield str(error)
        return
    if live is None:
        yield "no livebackup extension"
        return
    if image.version != 3:
        yield "the image has not version 3"
    if image.cluster_size < MIN_CLUSTER:
        yield "clusters are smaller than 4096 bytes"
    if live.offset + DATA_SIZE > END_LIMIT:
        yield "the extension ends behind byte 4096"
    yield from broken_bits(image, live)
    try:
        entries = {entry["name"]: entry for entry in image.bitmaps()}
    except BitmapError as error:
        yield str(error)
        return
    yield from broken_bitmaps(image, live, entries)


def broken_bits(image, live):
    """Autoclear bits, feature name table, clean state."""
    if not image.autoclear_features & AUTOCLEAR_LIVEBACKUP:
        yield "autoclear bit 62 is clear"
    if live.records and not image.autoclear_features & AUTOCLEAR_BITMAPS:
        yield "autoclear bit 0 is clear"
    if (FEATURE_TYPE_AUTOCLEAR, 62,
            FEATURE_NAME.decode()) not in image.feature_names():
        yield "no entry for bit 62 in the feature name table"
    fixed = live.fixed
    if fixed["boot_id"] == ZERO_UUID:
        if fixed["device"]:
            yield "a device without a boot id"
        if fixed["state"] == STATES.index("running"):
            yield "a running backup without a boot id"
        if fixed["backing_stat_digest"] != backing_stat_digest(image):
            yield "the backing stat digest differs"
        if fixed["data_stat_digest"] != data_stat_digest(image):
            yield "the data file stat digest differs"
    if fixed["state"] == 0 and (fixed["set_uuid"] != ZERO_UUID
                                or fixed["begun"]):
        yield "set UUID or time of a backup that is not there"
    if fixed["backing_digest"] != backing_digest(image):
        yield "the backing digest differs"


def broken_bitmaps(image, live, entries):
    """Bitmaps and list must agree."""
    # What is recorded counts as this boot and this device.
    trust = Trust(image, live.fixed["boot_id"], live.fixed["device"])
    trust.live, trust.bitmaps = live, entries
    for j, record in enumerate(live.records):
        for _, keyword in trust.bitmap_rules(j):
            yield f"bitmap of {record['uuid']}: {keyword}"
    listed = {bitmap_name(record) for record in live.records}
    for name in entries:
        if name.startswith(NAME_PREFIX) and name not in listed:
            yield f"bitmap {name.decode('latin-1')} is not listed"


# --------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------

class Writer:
    """An image open for writing: clusters are allocated at the end of the
    file, and the header is written anew."""

    def __init__(self, path):
        self.image = qcow2.Header(path)
        self.file = open(path, "r+b")
        self.bits = self.image.cluster_bits
        self.size = self.image.cluster_size
        self.end = -(-self.image.file_size // self.size)
        self.order = self.image.refcount_order
        self.table_offset = self.image.refcount_table_offset
        self.table = self.image.read_table(
            self.table_offset,
            self.image.refcount_table_clusters * self.size // 8)
        self.moved_table = {}          # header fields of a table that grew

    def pwrite(self, offset, data):
        """Write bytes of the file."""
        self.file.seek(offset)
        self.file.write(data)

    def pread(self, offset, length):
        """Read bytes, zeroes behind the end."""
        self.file.seek(offset)
        return self.file.read(length).ljust(length, b"\0")

    def close(self):
        """Make the file end with a cluster."""
        self.file.flush()
        if os.path.getsize(self.image.path) < self.end << self.bits:
            self.file.truncate(self.end << self.bits)
        self.file.close()

    # -- refcounts

    def allocate(self, count):
        """Offset of `count` new clusters, refcounts set."""
        first = self.end
        self.end += count
        for cluster in range(first, first + count):
            self.set_refcount(cluster, 1)
        return first << self.bits

    def free(self, offset, length):
        """Set the refcounts of a span to 0."""
        for cluster in range(offset >> self.bits,
                             -(-(offset + length) >> self.bits)):
            self.set_refcount(cluster, 0)

    def set_refcount(self, cluster, value):
        """Store a refcount; makes its block if there is none."""
        per_block = self.size * 8 >> self.order
        index, within = divmod(cluster, per_block)
        if index >= len(self.table):
            self.grow_table()
        if not self.table[index]:
            block = self.end
            self.end += 1
            self.table[index] = block << self.bits
            self.pwrite(block << self.bits, bytes(self.size))
            self.pwrite(self.table_offset + index * 8,
                        self.table[index].to_bytes(8, "big"))
            self.set_refcount(block, 1)
        self.store_refcount(self.table[index], within, value)

    def store_refcount(self, block, within, value):
        """Write one entry of a refcount block."""
        width = 1 << self.order
        if width >= 8:
            step = width // 8
            self.pwrite(block + within * step, value.to_bytes(step, "big"))
            return
        at, shift = divmod(within * width, 8)
        byte = self.pread(block + at, 1)[0]
        byte = byte & ~(((1 << width) - 1) << shift) | value << shift
        self.pwrite(block + at, bytes([byte]))

    def grow_table(self):
        """Move the refcount table to the end of the file, with room to
        count twice as many clusters as there are."""
        per_block = self.size * 8 >> self.order
        old_offset, old_size = self.table_offset, len(self.table) * 8
        entries = 2 * (self.end // per_block + 2)
        clusters = -(-entries * 8 // self.size)
        first = self.end
        self.end += clusters
        self.table += [0] * (clusters * self.size // 8 - len(self.table))
        self.table_offset = first << self.bits
        self.pwrite(self.table_offset, b"".join(
            value.to_bytes(8, "big") for value in self.table))
        for cluster in range(first, first + clusters):
            self.set_refcount(cluster, 1)
        self.moved_table = {"refcount_table_offset": self.table_offset,
                            "refcount_table_clusters": clusters}
        self.free(old_offset, old_size)

    # -- header

    def write_header(self, extensions, autoclear):
        """Write header, extensions [(type, data)] and backing name."""
        image = self.image
        head = bytearray(self.pread(0, image.header_length))
        body = b""
        for kind, data in extensions:
            body += EXTENSION.encode({"type": kind, "length": len(data)})
            body += data.ljust(round_up(len(data), 8), b"\0")
        body += EXTENSION.encode({})
        fields = dict(self.moved_table, autoclear_features=autoclear)
        name = image.backing_name
        if name is not None:
            fields["backing_file_offset"] = image.header_length + len(body)
            body += name
        for field, value in fields.items():
            at = HEADER3.offset_of(field)
            raw = HEADER3.encode_field(field, value)
            head[at:at + len(raw)] = raw
        whole = bytes(head) + body
        if len(whole) > self.size:
            raise Refused("the header doesn't fit into a cluster")
        self.pwrite(0, whole.ljust(self.size, b"\0"))


def with_feature_name(image):
    """Feature name table with our entry."""
    table = image.extension(EXT_FEATURE_NAMES) or b""
    table = table[:len(table) // FEATURE.size * FEATURE.size]
    if not any((kind, bit) == (FEATURE_TYPE_AUTOCLEAR, 62)
               for kind, bit, _ in image.feature_names()):
        table += FEATURE.encode({"type": FEATURE_TYPE_AUTOCLEAR, "bit": 62,
                                 "name": FEATURE_NAME})
    return table


def extensions_with(image, live, bitmaps):
    """The image's extensions, with ours, feature name, and bitmaps (its
    data; None if there are no bitmaps) as given."""
    found = [(kind, data) for kind, _, data in image.extensions
             if kind not in (EXT_LIVEBACKUP, EXT_BITMAPS, EXT_FEATURE_NAMES)]
    found.append((EXT_FEATURE_NAMES, with_feature_name(image)))
    found.append((EXT_LIVEBACKUP, live.encode()))
    if bitmaps is not None:
        found.append((EXT_BITMAPS, bitmaps))
    return found


def clean_state(image, live):
    """Set the fields of an image that is closed cleanly."""
    live.fixed.update(
        boot_id=ZERO_UUID, device=0, backing_digest=backing_digest(image),
        backing_stat_digest=backing_stat_digest(image),
        data_stat_digest=data_stat_digest(image),
        generation=live.fixed["generation"] + 1)


def enable(path, granularity):
    """Turn livebackup on; no checkpoint yet."""
    writer = Writer(path)
    image = writer.image
    if image.version != 3 or image.cluster_size < MIN_CLUSTER:
        raise Refused("version 3 and clusters of 4096 bytes are needed")
    if any(kind == EXT_LIVEBACKUP for kind, _, _ in image.extensions):
        raise Refused("livebackup is on already")
    bits = granularity.bit_length() - 1
    if granularity != 1 << bits or not 9 <= bits <= 31:
        raise Refused("granularity must be a power of two, 2^9 to 2^31")
    consistent = image.autoclear_features & AUTOCLEAR_BITMAPS
    live = LiveBackup({"version": 1, "granularity_bits": bits,
                       "generation": 0, "image_uuid": str(uuid.uuid4())},
                      [], 0)
    clean_state(image, live)
    # Room for a bitmaps extension is needed from the start.
    needed = image.header_length + EXTENSION.size + sum(
        EXTENSION.size + round_up(len(data), 8) for _, data
        in extensions_with(image, live, bytes(BITMAPS.size)))
    if needed > END_LIMIT:
        raise Refused("the header extensions don't fit into 4096 bytes")
    bitmaps = image.extension(EXT_BITMAPS) if consistent else None
    writer.write_header(
        extensions_with(image, live, bitmaps),
        image.autoclear_features & 3 | AUTOCLEAR_LIVEBACKUP)
    writer.close()


def encode_bitmap_entry(entry):
    """Bytes of a directory entry."""
    data = BITMAP.encode(dict(entry, name_size=len(entry["name"]),
                              extra_data_size=len(entry["extra"])))
    data += entry["extra"] + entry["name"]
    return data.ljust(round_up(len(data), 8), b"\0")


def new_bitmap(writer, live, record):
    """Allocate a bitmap with canaries; return its directory entry."""
    image = writer.image
    bits = live.fixed["granularity_bits"]
    granules = -(-image.size >> bits)
    per_cluster = writer.size * 8
    count = -(-granules // per_cluster)
    last = last_canary(image, record)
    canaries = {0, last >> bits} if last is not None else set()
    table = [0] * count
    for index in sorted({bit // per_cluster for bit in canaries}):
        data = bytearray(writer.size)
        for bit in canaries:
            if bit // per_cluster == index:
                data[bit % per_cluster // 8] |= 1 << bit % 8
        table[index] = writer.allocate(1)
        writer.pwrite(table[index], bytes(data))
    offset = 0
    if count:
        clusters = -(-count * 8 // writer.size)
        offset = writer.allocate(clusters)
        writer.pwrite(offset, b"".join(
            value.to_bytes(8, "big")
            for value in table).ljust(clusters * writer.size, b"\0"))
    return {"table_offset": offset, "table_size": count, "flags": BITMAP_AUTO,
            "type": 1, "granularity_bits": bits, "extra": b"",
            "name": bitmap_name(record)}


def add_checkpoint(path, record):
    """Add a newest checkpoint; its bitmap takes over tracking."""
    writer = Writer(path)
    image = writer.image
    live = read_livebackup(image)
    if live is None:
        raise Refused("livebackup is off")
    if len(live.records) == MAX_CHECKPOINTS:
        raise Refused("there are 32 checkpoints")
    record["virtual_size"] = image.size
    consistent = image.autoclear_features & AUTOCLEAR_BITMAPS
    if live.records and not consistent:
        raise Refused("the bitmaps are not consistent")
    entries = image.bitmaps() if consistent else []
    old = image.bitmaps_extension() if consistent else None
    newest = bitmap_name(live.records[-1]) if live.records else None
    for entry in entries:
        if entry["name"] == newest:
            entry["flags"] &= ~BITMAP_AUTO
    entries.append(new_bitmap(writer, live, record))
    directory = b"".join(encode_bitmap_entry(entry) for entry in entries)
    offset = writer.allocate(-(-len(directory) // writer.size))
    writer.pwrite(offset, directory)
    live.records.append(record)
    check_records(live.records)
    clean_state(image, live)
    bitmaps = BITMAPS.encode({"nb_bitmaps": len(entries),
                              "directory_size": len(directory),
                              "directory_offset": offset})
    writer.write_header(
        extensions_with(image, live, bitmaps),
        image.autoclear_features & 3 | AUTOCLEAR_BITMAPS
        | AUTOCLEAR_LIVEBACKUP)
    if old:
        writer.free(old["directory_offset"], old["directory_size"])
    writer.close()


# --------------------------------------------------------------------------
# poke
# --------------------------------------------------------------------------

class Poker:
    """Edits fields in place; the extension's checksum is made right after.

    FIELD is one of
      header.NAME             field of the qcow2 header
      autoclear.bitmaps, autoclear.livebackup, incompatible.dirty   0 or 1
      NAME                    field of the extension's fixed part
      record[N].NAME          field of a record
      bitmaps.NAME            field of the bitmaps extension
      bitmap[N or NAME].NAME  field of a directory entry; "name" as well
      bitmap[N or NAME].in_use, .auto    0 or 1
      bits[N or NAME]         +BIT or -BIT, several with commas
      table[N or NAME].I      entry I of a bitmap's table
      extension.type          type of our extension (so it is gone)
      raw.OFFSET              hex bytes anywhere in the file
    VALUE is a number (any base), a UUID, or hex:... as the field wants;
    "new" makes a random UUID, "backing", "backing-stat" and "data-stat"
    compute the digest as it is now.
    """

    def __init__(self, path):
        self.path = path
        self.image = qcow2.Header(path)

    def poke(self, field, value):
        """Apply one edit."""
        self.image = qcow2.Header(self.path)
        match = re.fullmatch(r"(\w+)\[([^\]]+)\](?:\.(\w+))?", field)
        if match:
            self.poke_indexed(*match.groups(), value)
            return
        group, _, name = field.rpartition(".")
        if group == "header":
            self.field(HEADER3, 0, name, value)
        elif group in ("autoclear", "incompatible"):
            bit = {"bitmaps": 0, "livebackup": 62, "dirty": 0}[name]
            self.flag(HEADER3, 0, group + "_features", bit, value)
        elif group == "bitmaps":
            self.field(BITMAPS, self.extension_offset(EXT_BITMAPS), name,
                       value)
        elif field == "extension.type":
            at = self.extension_offset(EXT_LIVEBACKUP) - EXTENSION.size
            self.write(at, int(value, 0).to_bytes(4, "big"))
        elif group == "raw":
            self.write(int(name, 0), bytes.fromhex(value))
        elif group == "":
            self.field(FIXED, self.extension_offset(EXT_LIVEBACKUP), name,
                       value)
        else:
            raise ValueError(f"no such field: {field}")

    def poke_indexed(self, group, index, name, value):
        """Fields of records and bitmaps."""
        if group == "record":
            at = (self.extension_offset(EXT_LIVEBACKUP) + FIXED.size
                  + int(index) * RECORD.size)
            self.field(RECORD, at, name, value)
            return
        entry = self.bitmap(index)
        if group == "bits":
            for part in value.split(","):
                self.bit(entry, int(part[1:], 0), part[0] == "+")
        elif group == "table":
            self.write(entry["table_offset"] + 8 * int(name),
                       int(value, 0).to_bytes(8, "big"))
        elif group == "bitmap" and name == "name":
            at = entry["position"] + BITMAP.size + entry["extra_data_size"]
            self.write(at, value.encode()[:entry["name_size"]].ljust(
                entry["name_size"], b"_"))
        elif group == "bitmap" and name in ("in_use", "auto"):
            self.flag(BITMAP, entry["position"], "flags",
                      {"in_use": 0, "auto": 1}[name], value)
        elif group == "bitmap":
            self.field(BITMAP, entry["position"], name, value)
        else:
            raise ValueError(f"no such field: {group}[{index}]")

    def write(self, offset, data):
        """Write bytes of the file."""
        with open(self.path, "r+b") as file:
            file.seek(offset)
            file.write(data)

    def extension_offset(self, kind):
        """Where an extension's data begins."""
        for found, offset, _ in self.image.extensions:
            if found == kind:
                return offset
        raise ValueError(f"no extension 0x{kind:08x}")

    def bitmap(self, index):
        """Directory entry by number or name."""
        entries = self.image.bitmaps()
        for number, entry in enumerate(entries):
            name = entry["name"].decode("latin-1")
            if index in (str(number), name, name.removeprefix("lb-")):
                return entry
        raise ValueError(f"no bitmap {index}")

    def field(self, layout, start, name, value):
        """Write a field of a structure."""
        at, _, kind = layout.find(name)
        if value == "new":
            value = str(uuid.uuid4())
        elif value in ("backing", "backing-stat", "data-stat"):
            value = {"backing": backing_digest,
                     "backing-stat": backing_stat_digest,
                     "data-stat": data_stat_digest}[value](self.image)
        elif kind == "int":
            value = int(value, 0)
        self.write(start + at, layout.encode_field(name, value))

    def flag(self, layout, start, name, bit, value):
        """Set or clear one bit of a field."""
        at, size, _ = layout.find(name)
        old = int.from_bytes(self.image.pread(start + at, size), "big")
        new = old & ~(1 << bit) | int(value) << bit
        self.write(start + at, new.to_bytes(size, "big"))

    def bit(self, entry, number, value):
        """Set or clear a bit of a bitmap; allocates a cluster if needed."""
        writer = Writer(self.path)
        per_cluster = writer.size * 8
        at = entry["table_offset"] + 8 * (number // per_cluster)
        word = int.from_bytes(writer.pread(at, 8), "big")
        if word < 2:
            cluster = writer.allocate(1)
            writer.pwrite(cluster, bytes([255 * word]) * writer.size)
            writer.pwrite(at, cluster.to_bytes(8, "big"))
            self.store_moved_table(writer)
            word = cluster
        byte_at = word + number % per_cluster // 8
        byte = writer.pread(byte_at, 1)[0]
        mask = 1 << number % 8
        writer.pwrite(byte_at, bytes([byte | mask if value
                                      else byte & ~mask]))
        writer.close()

    def store_moved_table(self, writer):
        """Tell the header where a refcount table went that grew."""
        for field, value in writer.moved_table.items():
            writer.pwrite(HEADER3.offset_of(field),
                          HEADER3.encode_field(field, value))

    def fix_crc(self):
        """Make the extension's checksum right, if there is one."""
        self.image = qcow2.Header(self.path)
        for kind, offset, data in self.image.extensions:
            if kind == EXT_LIVEBACKUP and len(data) == DATA_SIZE:
                self.write(offset + FIXED.offset_of("crc"),
                           extension_crc(data).to_bytes(4, "big"))


# --------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------

def print_json(value):
    """To standard output."""
    json.dump(value, sys.stdout, indent=1)
    print()


def this_boot():
    """Boot id of this host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def command_show(args):
    """Print everything."""
    print_json(show_image(qcow2.Header(args.image)))
    return 0


def command_check(args):
    """Print what is broken."""
    broken = list(broken_musts(qcow2.Header(args.image)))
    for sentence in broken:
        print(f"{args.image}: {sentence}")
    return 4 if broken else 0


def command_trust(args):
    """Print the verdicts."""
    boot_id = str(uuid.UUID(args.boot_id or this_boot()))
    device = os.stat(args.image).st_dev if args.dev is None else args.dev
    print_json(Trust(qcow2.Header(args.image), boot_id, device).evaluate())
    return 0


def command_changed(args):
    """Print what changed."""
    print_json(changed_since(qcow2.Header(args.image),
                             str(uuid.UUID(args.uuid))))
    return 0


def command_enable(args):
    """Turn livebackup on."""
    enable(args.image, args.granularity)
    return 0


def command_add(args):
    """Add a checkpoint."""
    add_checkpoint(args.image, {
        "uuid": str(uuid.UUID(args.uuid)), "label": args.label.encode(),
        "time": int(time.time()) if args.time is None else args.time,
        "root_prefix": args.root_prefix,
        "flags": CONFIRMED if args.confirmed else 0})
    return 0


def command_poke(args):
    """Edit fields."""
    poker = Poker(args.image)
    for edit in args.set:
        field, _, value = edit.partition("=")
        poker.poke(field, value)
    if not args.keep_crc:
        poker.fix_crc()
    return 0


def number(text):
    """A number of any base."""
    return int(text, 0)


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description="independent implementation of the livebackup extension")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name, run):
        sub = commands.add_parser(name)
        sub.add_argument("image")
        sub.set_defaults(run=run)
        return sub

    add("show", command_show)
    add("check", command_check)
    trust = add("trust", command_trust)
    trust.add_argument("--boot-id")
    trust.add_argument("--dev", type=number)
    add("changed", command_changed).add_argument("uuid")
    add("enable", command_enable).add_argument(
        "--granularity", type=number, default=65536)
    checkpoint = add("add", command_add)
    checkpoint.add_argument("uuid")
    checkpoint.add_argument("label")
    checkpoint.add_argument("--confirmed", action="store_true")
    checkpoint.add_argument("--time", type=number)
    checkpoint.add_argument("--root-prefix", type=number, default=0)
    poke = add("poke", command_poke)
    poke.add_argument("--set", action="append", required=True,
                      metavar="FIELD=VALUE")
    poke.add_argument("--keep-crc", action="store_true")
    return parser.parse_args(argv)


def main(argv):
    """Run a command; return its exit status."""
    args = parse_arguments(argv)
    try:
        return args.run(args)
    except (Refused, BitmapError, Damaged, UnsupportedVersion, OSError,
            ValueError, KeyError) as error:
        print(f"lbext.py: {args.image}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
