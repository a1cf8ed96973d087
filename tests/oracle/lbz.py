#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Independent implementation of the archive format, made from its text alone.

Everything here follows docs/lbz-format.md and nothing else, so that it can
judge the C implementation.  It is strict and slow: a file is always read front
to back and compared with its own index.

    lbz.py verify FILE...            every "must"; exit 4 where one is broken
    lbz.py dump FILE                 all structures as JSON
    lbz.py restore -o RAW FILE...    a chain to a sparse raw file [--at UUID]
    lbz.py structures FILE           [{name, offset, length}] of every field
    lbz.py root FILE                 root digest and backup UUID
    lbz.py index -o FILE FILE...     the index of a chain [--at UUID]
    lbz.py make -o FILE SPEC.json    an archive, also a hostile one
    lbz.py hostile DIR               hostile archives and DIR/manifest.json
                                     (see hostile_archives.py)

The description that `make` takes is explained at class Maker.

Exit: 0 done, 1 runtime error, 2 usage, 3 no such chain, 4 damaged.
"""

import argparse
import hashlib
import json
import mmap
import os
import random
import re
import sys
import uuid

import xxhash
import zstandard

from layout import Layout, ZERO_UUID, printable, to_raw

BLOCK = 65536
STRIPE_BLOCKS = 16
PAGE_BLOCKS = 4096
PAGE_RANGE = BLOCK * PAGE_BLOCKS
NO_CLIP = 2**64 - 1
MAX_VIRTUAL_SIZE = 2**56
MAX_COVERED = 1024
MAX_COMPRESSED = 2**20 + 2**16
MAX_ZERO_RUNS = 2048
MAX_DATA_RUNS = 2048
MAX_PAGES = 2**20
FEATURE_INDEX = 1
SKIPPABLE_MAGIC = 0x184D2A5B
ZSTD_MAGIC = 0xFD2FB528
LABEL_PATTERN = re.compile(rb"[A-Za-z0-9._-]+\Z")

DIGEST_NAMES = {"xxh3": 1, "sha256": 2}
DIGEST_SIZES = {1: 16, 2: 32}


class Damaged(Exception):
    """A broken "must", at a file offset."""

    def __init__(self, what, offset):
        super().__init__(f"{what} at {offset}")
        self.what = what
        self.offset = offset


class Unsupported(Damaged):
    """Something that a later version may mean."""


class NoContent(Exception):
    """An index where content is wanted."""


class NoChain(Exception):
    """The given archives don't make up the state that was asked for."""


def digest(algorithm, data):
    """H() of the specification."""
    if algorithm == 1:
        return xxhash.xxh3_128_digest(data)
    return hashlib.sha256(data).digest()


def short_digest(data):
    """The checksum of a record: the low 32 bits of XXH3-64."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


# --------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------

SKIPPABLE = Layout("little", ("magic", 4, "int"), ("payload_size", 4, "int"))

HEADER = Layout(
    "little",
    ("kind_name", 4, "raw"), ("version", 2, "int"), ("reserved6", 2, "int"),
    ("incompatible", 8, "int"), ("compatible", 8, "int"),
    ("digest_algorithm", 1, "int"), ("kind", 1, "int"),
    ("block_bits", 1, "int"), ("label_length", 1, "int"),
    ("covered_count", 4, "int"), ("virtual_size", 8, "int"),
    ("clip", 8, "int"), ("time", 8, "int"), ("reserved56", 8, "int"),
    ("image_uuid", 16, "uuid"), ("backup_uuid", 16, "uuid"),
    ("parent_uuid", 16, "uuid"), ("set_uuid", 16, "uuid"),
    ("label", 22, "raw"), ("reserved150", 10, "raw"))

RECORD = Layout(
    "little",
    ("kind_name", 4, "raw"), ("compressed_size", 4, "int"),
    ("guest_offset", 8, "int"), ("blocks", 2, "int"), ("live", 2, "int"),
    ("checksum", 4, "int"))

PAGE = Layout(
    "little",
    ("kind_name", 4, "raw"), ("frame_count", 4, "int"), ("number", 8, "int"),
    ("run_count", 4, "int"), ("data_count", 4, "int"),
    ("reserved24", 8, "int"))

ENTRY = Layout(
    "little",
    ("record_offset", 8, "int"), ("compressed_size", 4, "int"),
    ("first_block", 2, "int"), ("blocks", 2, "int"), ("live", 2, "int"),
    ("reserved18", 6, "raw"))

RUN = Layout("little", ("first_block", 2, "int"), ("length", 2, "int"))

TRAILER = Layout(
    "little",
    ("kind_name", 4, "raw"), ("reserved4", 4, "int"),
    ("page_count", 8, "int"), ("data_blocks", 8, "int"),
    ("zero_blocks", 8, "int"), ("frame_count", 8, "int"),
    ("compressed_total", 8, "int"), ("reserved48", 16, "raw"))

DIRECTORY = Layout(
    "little",
    ("page_number", 8, "int"), ("page_offset", 8, "int"),
    ("payload_size", 4, "int"), ("reserved20", 4, "int"))

TAIL = Layout(
    "little",
    ("trailer_offset", 8, "int"), ("payload_size", 4, "int"),
    ("end_mark", 4, "raw"))


# --------------------------------------------------------------------------
# zstd frames, walked by hand: their shape is part of the format
# --------------------------------------------------------------------------

def zstd_frame_shape(frame, offset):
    """Check that `frame` is exactly one zstd frame; return its content size.

    Checks what the format demands: content size and checksum present, no
    dictionary, no byte behind the frame.
    """
    def need(end):
        if end > len(frame):
            raise Damaged("zstd frame is cut off", offset)

    need(5)
    if int.from_bytes(frame[:4], "little") != ZSTD_MAGIC:
        raise Damaged("no zstd frame", offset)
    descriptor = frame[4]
    single_segment = descriptor >> 5 & 1
    position = 5 + (0 if single_segment else 1)
    dictionary_size = (0, 1, 2, 4)[descriptor & 3]
    need(position + dictionary_size)
    if any(frame[position:position + dictionary_size]):
        raise Damaged("zstd frame wants a dictionary", offset + position)
    position += dictionary_size
    size_flag = descriptor >> 6
    field_size = (single_segment, 2, 4, 8)[size_flag]
    if field_size == 0:
        raise Damaged("zstd frame without content size", offset + 4)
    if not descriptor >> 2 & 1:
        raise Damaged("zstd frame without content checksum", offset + 4)
    need(position + field_size)
    content_size = int.from_bytes(frame[position:position + field_size],
                                  "little")
    if field_size == 2:
        content_size += 256
    position = zstd_blocks_end(frame, position + field_size, offset)
    need(position + 4)
    if position + 4 != len(frame):
        raise Damaged("bytes behind the zstd frame", offset + position + 4)
    return content_size


def zstd_blocks_end(frame, position, offset):
    """Skip the blocks of a zstd frame."""
    last = False
    while not last:
        if position + 3 > len(frame):
            raise Damaged("zstd frame is cut off", offset)
        head = int.from_bytes(frame[position:position + 3], "little")
        last = head & 1
        kind = head >> 1 & 3
        if kind == 3:
            raise Damaged("reserved zstd block type", offset + position)
        position += 3 + (1 if kind == 1 else head >> 3)
    return position


def zstd_decompress(frame, size, offset):
    """Decompress a frame whose shape has been checked."""
    try:
        content = zstandard.ZstdDecompressor().decompress(frame)
    except zstandard.ZstdError as error:
        raise Damaged(f"zstd frame can't be decompressed ({error})",
                      offset) from error
    if len(content) != size:
        raise Damaged("zstd frame has another size", offset)
    return content


# --------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------

class Frame:
    """A zstd frame of disk content, as its record tells."""

    def __init__(self, record_offset, record):
        self.record_offset = record_offset
        self.data_offset = record_offset + SKIPPABLE.size + RECORD.size
        self.compressed_size = record["compressed_size"]
        self.guest_block = record["guest_offset"] // BLOCK
        self.blocks = record["blocks"]
        self.live = record["live"]
        self.compressed_digest = b""
        self.block_digests = {}        # guest block -> digest

    @property
    def live_blocks(self):
        """The guest block numbers that the frame speaks for, ascending."""
        return [self.guest_block + i for i in range(self.blocks)
                if self.live >> i & 1]

    @property
    def end(self):
        """File offset behind the frame."""
        return self.data_offset + self.compressed_size


class Page:
    """An index page and the frames before it.

    In an index there are no frames, but DATA runs.
    """

    def __init__(self, offset, payload_size, values):
        self.offset = offset
        self.payload_size = payload_size
        self.values = values
        self.number = values["number"]
        self.frames = []
        self.runs = []                 # (first guest block, length)
        self.data_runs = []            # the same
        self.run_digests = {}          # guest block -> digest
        self.digest = b""


class Archive:
    """A whole archive, read front to back and checked.

    With deep=False frames are not decompressed here; read_block() always
    checks what it reads.
    """

    def __init__(self, path, deep=True):
        self.path = path
        self.deep = deep
        self.data = map_file(path)
        self.pages = []
        self.trailer = None
        self.trailer_offset = 0
        self.directory = []
        self.root = b""
        self._cached = (None, b"")
        position = self._read_header()
        self._read_body(position)
        self.present = None

    # -- primitives

    def _bytes(self, offset, size, what):
        if offset + size > len(self.data):
            raise Damaged(f"{what} is cut off", offset)
        return self.data[offset:offset + size]

    def _skippable(self, offset, what):
        """Return (payload offset, payload size) of a skippable frame."""
        head = SKIPPABLE.decode(self._bytes(offset, SKIPPABLE.size, what))
        if head["magic"] != SKIPPABLE_MAGIC:
            raise Damaged(f"no skippable frame where {what} should be", offset)
        if head["payload_size"] < 4:
            raise Damaged("skippable frame without a kind", offset + 4)
        start = offset + SKIPPABLE.size
        self._bytes(start, head["payload_size"], what)
        return start, head["payload_size"]

    def _digest(self, data):
        return digest(self.algorithm, data)

    # -- header

    def _read_header(self):
        start, size = self._skippable(0, "the header")
        if self.data[start:start + 4] != b"LBZH":
            raise Damaged("not an archive: no LBZH", start)
        if size < HEADER.size:
            raise Damaged("header too short", 4)
        self.header = header = HEADER.decode(self.data, start)
        self._check_header_support(start)
        covered_count = header["covered_count"]
        if covered_count > MAX_COVERED:
            raise Damaged("too many covered checkpoints",
                          start + HEADER.offset_of("covered_count"))
        expected = HEADER.size + 16 * covered_count + self.digest_size
        if size != expected:
            raise Damaged(f"header payload has {size} bytes, not {expected}",
                          4)
        payload = self.data[start:start + size]
        if self._digest(payload[:-self.digest_size]) != \
                payload[-self.digest_size:]:
            raise Damaged("header digest differs",
                          start + size - self.digest_size)
        self.header_payload = payload
        self.covered = [
            str(uuid.UUID(bytes=payload[at:at + 16]))
            for at in range(HEADER.size, size - self.digest_size, 16)]
        check_reserved(HEADER, self.data, start, 0)
        check_header_values(header, self.covered, start)
        return start + size

    def _check_header_support(self, start):
        header = self.header
        if header["version"] != 1:
            raise Unsupported(f"format version {header['version']}", start + 4)
        unknown = header["incompatible"] & ~FEATURE_INDEX
        self.is_index = bool(header["incompatible"] & FEATURE_INDEX)
        if unknown:
            bit = (unknown & -unknown).bit_length() - 1
            raise Unsupported(f"incompatible feature bit {bit}", start + 8)
        self.algorithm = header["digest_algorithm"]
        if self.algorithm not in DIGEST_SIZES:
            raise Unsupported(f"digest algorithm {self.algorithm}", start + 24)
        self.digest_size = DIGEST_SIZES[self.algorithm]

    # -- frames and pages

    def _read_body(self, position):
        """Read records, frames and pages up to and with the trailer."""
        frames = []
        while True:
            start, size = self._skippable(position,
                                          "a record, page or trailer")
            kind = self.data[start:start + 4]
            if kind == b"LBZR" and not self.is_index:
                frames.append(self._read_frame(position, start, size))
                position = frames[-1].end
            elif kind == b"LBZP":
                self._read_page(position, start, size, frames)
                frames = []
                position = start + size
            elif kind == b"LBZT":
                if frames:
                    raise Damaged("frames without a page", position)
                self._read_trailer(position, start, size)
                return
            else:
                raise Damaged(f"unknown kind {kind!r}", start)

    def _read_frame(self, offset, start, size):
        if size != RECORD.size:
            raise Damaged("record of another size", offset + 4)
        payload = self.data[start:start + size]
        record = RECORD.decode(payload)
        if short_digest(payload[:20]) != record["checksum"]:
            raise Damaged("record checksum differs", start + 20)
        check_record_values(record, start)
        frame = Frame(offset, record)
        for block in frame.live_blocks:
            if block * BLOCK >= self.header["virtual_size"]:
                raise Damaged("live block above the virtual size", start + 8)
        compressed = self._bytes(frame.data_offset, frame.compressed_size,
                                 "zstd frame")
        frame.compressed_digest = self._digest(compressed)
        size = zstd_frame_shape(compressed, frame.data_offset)
        if size != frame.blocks * BLOCK:
            raise Damaged("zstd frame's content size is not the record's",
                          frame.data_offset)
        if self.deep:
            self._hash_blocks(frame, zstd_decompress(compressed, size,
                                                     frame.data_offset))
        return frame

    def _hash_blocks(self, frame, content):
        """Digest the live blocks, and check the padding of the last one."""
        size = self.header["virtual_size"]
        for block in frame.live_blocks:
            at = (block - frame.guest_block) * BLOCK
            data = content[at:at + BLOCK]
            frame.block_digests[block] = self._digest(data)
            if (block + 1) * BLOCK > size and any(data[size % BLOCK:]):
                raise Damaged("last block is not padded with zeroes",
                              frame.data_offset)

    def _read_page(self, offset, start, size, frames):
        if size < PAGE.size + self.digest_size:
            raise Damaged("page too short", offset + 4)
        payload = self.data[start:start + size]
        values = PAGE.decode(payload)
        check_page_counts(values, start, self.is_index)
        entry_size = (RUN.size if self.is_index
                      else ENTRY.size + self.digest_size)
        expected = (PAGE.size + values["frame_count"] * entry_size
                    + values["run_count"] * RUN.size
                    + values["data_count"] * self.digest_size
                    + self.digest_size)
        if size != expected:
            raise Damaged(f"page payload has {size} bytes, not {expected}",
                          offset + 4)
        page = Page(offset, size, values)
        page.digest = payload[-self.digest_size:]
        if self._digest(payload[:-self.digest_size]) != page.digest:
            raise Damaged("page digest differs",
                          start + size - self.digest_size)
        check_reserved(PAGE, payload, 0, start)
        self._check_page_number(page, start)
        if self.is_index:
            position = self._read_data_runs(page, payload, start)
            position = self._read_runs(page, payload, start, position)
            self._read_run_digests(page, payload, position)
        else:
            position = self._check_entries(page, payload, start, frames)
            position = self._read_runs(page, payload, start, position)
            self._check_block_digests(page, payload, start, position)
        self.pages.append(page)

    def _check_page_number(self, page, start):
        if self.pages and page.number <= self.pages[-1].number:
            raise Damaged("pages don't ascend", start + 8)
        if page.number * PAGE_RANGE >= self.header["virtual_size"]:
            raise Damaged("page above the virtual size", start + 8)

    def _check_entries(self, page, payload, start, frames):
        """Compare the entries with the frames that were read."""
        if page.values["frame_count"] != len(frames):
            raise Damaged("page has another number of frames than stand "
                          "before it", start + 4)
        position = PAGE.size
        taken = set()
        last_first = -1
        for frame in frames:
            entry = ENTRY.decode(payload, position)
            check_reserved(ENTRY, payload, position, start)
            check_entry(entry, frame, page, start + position)
            stored = payload[position + ENTRY.size:
                             position + ENTRY.size + self.digest_size]
            if stored != frame.compressed_digest:
                raise Damaged("compressed digest differs", frame.data_offset)
            first_live = frame.live_blocks[0]
            if first_live <= last_first:
                raise Damaged("frames are not in the order of their first "
                              "live blocks", start + position)
            last_first = first_live
            if not taken.isdisjoint(frame.live_blocks):
                raise Damaged("live blocks of two frames coincide",
                              start + position)
            taken.update(frame.live_blocks)
            page.frames.append(frame)
            position += ENTRY.size + self.digest_size
        if len(taken) != page.values["data_count"]:
            raise Damaged("number of live blocks differs", start + 20)
        return position

    def _read_runs(self, page, payload, start, position):
        if page.values["run_count"] and self.header["kind"] == 0:
            raise Damaged("ZERO run in a full archive", start + 16)
        live = {block for frame in page.frames for block in frame.live_blocks}
        for first, length in page.data_runs:
            live.update(range(first, first + length))
        count = page.values["run_count"]
        for at, first, length in self._runs(page, payload, position, count,
                                            "ZERO"):
            if any(block in live for block in range(first, first + length)):
                raise Damaged("ZERO run contains a live DATA block",
                              start + at)
            page.runs.append((first, length))
        return position + count * RUN.size

    def _runs(self, page, payload, position, count, what):
        """Yield (position, first guest block, length) of each, checked."""
        base = page.number * PAGE_BLOCKS
        end_before = -1
        for _ in range(count):
            run = RUN.decode(payload, position)
            first, length = run["first_block"], run["length"]
            at = page.offset + SKIPPABLE.size + position
            if not 1 <= length <= PAGE_BLOCKS or first + length > PAGE_BLOCKS:
                raise Damaged(f"{what} run leaves its page range", at)
            if first <= end_before:
                raise Damaged(f"{what} runs touch or don't ascend", at)
            end_before = first + length
            if (base + end_before - 1) * BLOCK >= self.header["virtual_size"]:
                raise Damaged(f"{what} run above the virtual size", at)
            yield position, base + first, length
            position += RUN.size

    def _read_data_runs(self, page, payload, start):
        count = page.values["frame_count"]
        for _, first, length in self._runs(page, payload, PAGE.size, count,
                                           "DATA"):
            page.data_runs.append((first, length))
        if sum(run[1] for run in page.data_runs) != page.values["data_count"]:
            raise Damaged("number of DATA blocks differs", start + 20)
        return PAGE.size + count * RUN.size

    def _read_run_digests(self, page, payload, position):
        for first, length in page.data_runs:
            for block in range(first, first + length):
                page.run_digests[block] = payload[
                    position:position + self.digest_size]
                position += self.digest_size

    def _check_block_digests(self, page, payload, start, position):
        blocks = sorted((block, frame) for frame in page.frames
                        for block in frame.live_blocks)
        for block, frame in sorted(blocks, key=lambda pair: pair[0]):
            stored = payload[position:position + self.digest_size]
            if not self.deep:
                frame.block_digests[block] = stored
            elif frame.block_digests[block] != stored:
                raise Damaged(f"digest of guest block {block} differs",
                              start + position)
            position += self.digest_size

    # -- trailer

    def _read_trailer(self, offset, start, size):
        fixed = TRAILER.size + self.digest_size + TAIL.size
        if size < fixed:
            raise Damaged("trailer too short", offset + 4)
        payload = self.data[start:start + size]
        self.trailer_offset = offset
        self.trailer = trailer = TRAILER.decode(payload)
        count = trailer["page_count"]
        if count > MAX_PAGES:
            raise Damaged("too many pages", start + 8)
        entry_size = DIRECTORY.size + self.digest_size
        if size != fixed + count * entry_size:
            raise Damaged("trailer payload has another size than its counts "
                          "give", offset + 4)
        root_at = size - TAIL.size - self.digest_size
        self.root = payload[root_at:root_at + self.digest_size]
        if self._digest(self.header_payload + payload[:root_at]) != self.root:
            raise Damaged("root digest differs", start + root_at)
        check_reserved(TRAILER, payload, 0, start)
        self._check_totals(start)
        self._check_directory(payload, start)
        self._check_tail(payload, offset, start, size)
        if start + size != len(self.data):
            raise Damaged("bytes behind the trailer", start + size)

    def _check_totals(self, start):
        frames = [frame for page in self.pages for frame in page.frames]
        seen = {
            "page_count": len(self.pages),
            "data_blocks": sum(page.values["data_count"]
                               for page in self.pages),
            "zero_blocks": sum(run[1] for p in self.pages for run in p.runs),
            "frame_count": len(frames),
            "compressed_total": sum(f.compressed_size for f in frames),
        }
        for name, value in seen.items():
            if self.trailer[name] != value:
                raise Damaged(f"trailer's {name} is {self.trailer[name]}, "
                              f"not {value}", start + TRAILER.offset_of(name))

    def _check_directory(self, payload, start):
        position = TRAILER.size
        for page in self.pages:
            entry = DIRECTORY.decode(payload, position)
            check_reserved(DIRECTORY, payload, position, start)
            stored = payload[position + DIRECTORY.size:
                             position + DIRECTORY.size + self.digest_size]
            for name, value in (("page_number", page.number),
                                ("page_offset", page.offset),
                                ("payload_size", page.payload_size)):
                if entry[name] != value:
                    raise Damaged(
                        f"directory's {name} is not the page's",
                        start + position + DIRECTORY.offset_of(name))
            if stored != page.digest:
                raise Damaged("directory's page digest differs",
                              start + position + DIRECTORY.size)
            self.directory.append(entry)
            position += DIRECTORY.size + self.digest_size

    def _check_tail(self, payload, offset, start, size):
        at = size - TAIL.size
        tail = TAIL.decode(payload, at)
        if tail["end_mark"] != b"LBZE":
            raise Damaged("no LBZE", start + at + 12)
        if tail["payload_size"] != size:
            raise Damaged("trailer size at the end differs", start + at + 8)
        if tail["trailer_offset"] != offset:
            raise Damaged("trailer offset at the end differs", start + at)

    # -- content

    def index(self):
        """{guest block: Frame (of an index Page), or None for ZERO}."""
        if self.present is None:
            self.present = {}
            for page in self.pages:
                for first, length in page.runs:
                    for block in range(first, first + length):
                        self.present[block] = None
                for block in page.run_digests:
                    self.present[block] = page
                for frame in page.frames:
                    for block in frame.live_blocks:
                        self.present[block] = frame
        return self.present

    @property
    def floor(self):
        """The smaller of clip and virtual size."""
        return min(self.header["clip"], self.header["virtual_size"])

    def read_block(self, block):
        """Content of a DATA block; its digest is checked."""
        if self.is_index:
            raise NoContent(f"{self.path} is an index")
        frame = self.index()[block]
        if self._cached[0] is not frame:
            compressed = self.data[frame.data_offset:frame.end]
            self._cached = (frame, zstd_decompress(
                compressed, frame.blocks * BLOCK, frame.data_offset))
        at = (block - frame.guest_block) * BLOCK
        data = self._cached[1][at:at + BLOCK]
        if self._digest(data) != frame.block_digests[block]:
            raise Damaged(f"digest of guest block {block} differs",
                          frame.data_offset)
        return data


def map_file(path):
    """The bytes of a file; b"" if it is empty."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def check_reserved(layout, data, start, file_offset):
    """Reserved bytes must be zero."""
    for name, position, size, _ in layout.fields:
        if name.startswith("reserved"):
            if any(data[start + position:start + position + size]):
                raise Damaged("reserved bytes are not zero",
                              file_offset + start + position)


def check_header_values(header, covered, start):
    """Ranges and relations of the header's fields."""
    def refuse(what, field):
        raise Damaged(what, start + HEADER.offset_of(field))

    if header["kind"] > 1:
        refuse("kind is neither full nor incremental", "kind")
    full = header["kind"] == 0
    if header["block_bits"] != 16:
        refuse("block size is not 2^16", "block_bits")
    length = header["label_length"]
    if not 1 <= length <= 22:
        refuse("label length out of range", "label_length")
    if not LABEL_PATTERN.match(header["label"][:length]):
        refuse("label has a character that is not allowed", "label")
    if any(header["label"][length:]):
        refuse("label is not padded with zeroes", "label")
    if header["virtual_size"] > MAX_VIRTUAL_SIZE:
        refuse("virtual size out of range", "virtual_size")
    clip = header["clip"]
    if clip != NO_CLIP and (full or clip >= header["virtual_size"]):
        refuse("clip out of range", "clip")
    if header["backup_uuid"] == ZERO_UUID:
        refuse("backup UUID is zero", "backup_uuid")
    if (header["parent_uuid"] == ZERO_UUID) != full:
        refuse("parent UUID does not fit the kind", "parent_uuid")
    if header["parent_uuid"] == header["backup_uuid"]:
        refuse("the archive is its own parent", "parent_uuid")
    if ZERO_UUID in covered:
        raise Damaged("a covered checkpoint is zero", start + HEADER.size)
    if len(set(covered)) != len(covered):
        raise Damaged("covered checkpoints repeat", start + HEADER.size)
    if {header["backup_uuid"], header["parent_uuid"]} & set(covered):
        raise Damaged("the archive covers itself or its parent",
                      start + HEADER.size)


def check_record_values(record, start):
    """Ranges of a record's fields."""
    if not 1 <= record["compressed_size"] <= MAX_COMPRESSED:
        raise Damaged("compressed size out of range", start + 4)
    if record["guest_offset"] % BLOCK:
        raise Damaged("guest offset is not aligned", start + 8)
    if not 1 <= record["blocks"] <= STRIPE_BLOCKS:
        raise Damaged("number of blocks out of range", start + 16)
    first = record["guest_offset"] // BLOCK % STRIPE_BLOCKS
    if first + record["blocks"] > STRIPE_BLOCKS:
        raise Damaged("frame crosses a stripe", start + 8)
    if record["live"] == 0 or record["live"] >> record["blocks"]:
        raise Damaged("live mask out of range", start + 18)


def check_page_counts(values, start, is_index):
    """Ranges of a page's counts."""
    for name, maximum in (("frame_count", MAX_DATA_RUNS if is_index
                           else PAGE_BLOCKS),
                          ("run_count", MAX_ZERO_RUNS),
                          ("data_count", PAGE_BLOCKS)):
        if values[name] > maximum:
            raise Damaged(f"page's {name} out of range",
                          start + PAGE.offset_of(name))
    if values["frame_count"] + values["run_count"] == 0:
        raise Damaged("page without content", start + 4)


def check_entry(entry, frame, page, at):
    """A frame entry must repeat the record, and belong to the page."""
    base = page.number * PAGE_BLOCKS
    if not base <= frame.guest_block < base + PAGE_BLOCKS:
        raise Damaged("frame outside the page range", frame.record_offset)
    for name, value in (("record_offset", frame.record_offset),
                        ("compressed_size", frame.compressed_size),
                        ("first_block", frame.guest_block - base),
                        ("blocks", frame.blocks), ("live", frame.live)):
        if entry[name] != value:
            raise Damaged(f"frame entry's {name} is not the record's",
                          at + ENTRY.offset_of(name))


# --------------------------------------------------------------------------
# dump, structures
# --------------------------------------------------------------------------

def dump_frame(frame, base):
    """A frame as JSON."""
    return {
        "record_offset": frame.record_offset,
        "data_offset": frame.data_offset,
        "compressed_size": frame.compressed_size,
        "guest_offset": frame.guest_block * BLOCK,
        "first_block": frame.guest_block - base,
        "blocks": frame.blocks,
        "live": frame.live,
        "compressed_digest": frame.compressed_digest.hex(),
        "block_digests": {str(block * BLOCK): frame.block_digests[block].hex()
                          for block in frame.live_blocks},
    }


def dump_archive(archive):
    """The whole archive as JSON."""
    pages = []
    for page in archive.pages:
        pages.append({
            "offset": page.offset,
            "payload_size": page.payload_size,
            "number": page.number,
            "digest": page.digest.hex(),
            "frames": [dump_frame(frame, page.number * PAGE_BLOCKS)
                       for frame in page.frames],
            "zero_runs": [{"guest_offset": first * BLOCK,
                           "length": length * BLOCK}
                          for first, length in page.runs],
        })
        if archive.is_index:
            pages[-1]["data_runs"] = [
                {"guest_offset": first * BLOCK, "length": length * BLOCK}
                for first, length in page.data_runs]
            pages[-1]["block_digests"] = {
                str(block * BLOCK): value.hex()
                for block, value in sorted(page.run_digests.items())}
    header = printable(archive.header)
    header["covered"] = archive.covered
    header["kind"] = ("full", "incremental")[archive.header["kind"]]
    header["digest_algorithm"] = {v: k for k, v in DIGEST_NAMES.items()}[
        archive.algorithm]
    if header["clip"] == NO_CLIP:
        header["clip"] = None
    return {
        "header": header,
        "pages": pages,
        "trailer": dict(printable(archive.trailer),
                        offset=archive.trailer_offset,
                        directory=[printable(e) for e in archive.directory]),
        "root_digest": archive.root.hex(),
        "size": len(archive.data),
    }


def structure_spans(archive):
    """Yield (name, offset, length) for each field, in file order."""
    d = archive.digest_size
    yield from SKIPPABLE.spans(0, "header.skippable")
    yield from HEADER.spans(8, "header")
    position = 8 + HEADER.size
    for i in range(len(archive.covered)):
        yield f"header.covered[{i}]", position, 16
        position += 16
    yield "header.digest", position, d
    number = 0
    for p, page in enumerate(archive.pages):
        for frame in page.frames:
            prefix = f"record[{number}]"
            yield from SKIPPABLE.spans(frame.record_offset,
                                       prefix + ".skippable")
            yield from RECORD.spans(frame.record_offset + 8, prefix)
            yield f"frame[{number}]", frame.data_offset, frame.compressed_size
            number += 1
        yield from page_spans(page, f"page[{p}]", d)
    yield from trailer_spans(archive, d)


def page_spans(page, prefix, d):
    """Fields of one page."""
    yield from SKIPPABLE.spans(page.offset, prefix + ".skippable")
    yield from PAGE.spans(page.offset + 8, prefix)
    position = page.offset + 8 + PAGE.size
    for i in range(len(page.frames)):
        yield from ENTRY.spans(position, f"{prefix}.entry[{i}]")
        yield f"{prefix}.entry[{i}].digest", position + ENTRY.size, d
        position += ENTRY.size + d
    for i in range(len(page.data_runs)):
        yield from RUN.spans(position, f"{prefix}.data_run[{i}]")
        position += RUN.size
    for i in range(len(page.runs)):
        yield from RUN.spans(position, f"{prefix}.run[{i}]")
        position += RUN.size
    for i in range(page.values["data_count"]):
        yield f"{prefix}.block_digest[{i}]", position, d
        position += d
    yield f"{prefix}.digest", position, d


def trailer_spans(archive, d):
    """Fields of the trailer."""
    offset = archive.trailer_offset
    yield from SKIPPABLE.spans(offset, "trailer.skippable")
    yield from TRAILER.spans(offset + 8, "trailer")
    position = offset + 8 + TRAILER.size
    for i in range(len(archive.directory)):
        yield from DIRECTORY.spans(position, f"trailer.directory[{i}]")
        yield (f"trailer.directory[{i}].digest", position + DIRECTORY.size, d)
        position += DIRECTORY.size + d
    yield "trailer.root_digest", position, d
    yield from TAIL.spans(position + d, "trailer.tail")


# --------------------------------------------------------------------------
# Chains
# --------------------------------------------------------------------------

def select_chain(archives, at, partial=False):
    """Return [full, ..., newest] by parent links alone.

    Without `at` there must be one leaf, covered ones aside. partial: the
    oldest may be an incremental.
    """
    by_uuid = {}
    for archive in sorted(archives, key=lambda a: a.header["kind"]):
        own = archive.header["backup_uuid"]
        other = by_uuid.setdefault(own, archive)
        if other is not archive and (
                archive.header["kind"] == other.header["kind"]):
            raise NoChain(f"{archive.path} and {other.path} "
                          f"have the same UUID {own}")
    newest = at or single_leaf(list(by_uuid.values()))
    chain = []
    want = newest
    while True:
        if want not in by_uuid:
            raise NoChain(f"archive {want} is missing")
        archive = by_uuid[want]
        if archive in chain:
            raise NoChain("parent links form a loop")
        chain.append(archive)
        want = archive.header["parent_uuid"]
        if archive.header["kind"] == 0 or (partial and want not in by_uuid):
            return chain[::-1]


def single_leaf(archives):
    """UUID of the only archive that is no parent and is not covered."""
    parents = {a.header["parent_uuid"] for a in archives}
    covered = {u for a in archives for u in a.covered}
    leaves = [a.header["backup_uuid"] for a in archives
              if a.header["backup_uuid"] not in parents | covered]
    if len(leaves) != 1:
        raise NoChain("one newest archive is wanted, there are: "
                      + (", ".join(leaves) or "none"))
    return leaves[0]


def resolve_block(chain, block):
    """The member whose DATA the block is, or None where it reads as zero."""
    for archive in reversed(chain):
        index = archive.index()
        if block in index:
            return archive if index[block] is not None else None
        if block * BLOCK >= archive.floor:
            return None
    return None


def restore_chain(chain, out):
    """Write the state to the (empty, seekable) file `out`."""
    size = chain[-1].header["virtual_size"]
    out.truncate(size)
    blocks = set()
    for archive in chain:
        blocks.update(archive.index())
    for block in sorted(blocks):
        offset = block * BLOCK
        if offset >= size:
            break
        archive = resolve_block(chain, block)
        if archive is None:
            continue
        data = archive.read_block(block)[:size - offset]
        if any(data):
            out.seek(offset)
            out.write(data)


# --------------------------------------------------------------------------
# Index of a chain
# --------------------------------------------------------------------------

def merged_covered(chain, own, parent):
    """The list of covered checkpoints of a merge, oldest first."""
    covered = []
    for archive in reversed(chain):
        for name in [archive.header["backup_uuid"]] + archive.covered[::-1]:
            if name not in (own, parent) and name not in covered:
                covered.append(name)
    return covered[:MAX_COVERED][::-1]


def merged_clip(chain):
    """The clip of a merge, None if it has none."""
    size = chain[-1].header["virtual_size"]
    clip = min([archive.header["clip"] for archive in chain]
               + [archive.header["virtual_size"] for archive in chain[:-1]])
    return clip if chain[0].header["kind"] and clip < size else None


def state_of(chain, block):
    """Digest of a block, "zero" where a member says so, or None."""
    for archive in reversed(chain):
        found = archive.index().get(block, archive)
        if found is None:
            return "zero"
        if found is not archive:
            data = (found.run_digests if archive.is_index
                    else found.block_digests)
            return data[block]
        if block * BLOCK >= archive.floor:
            return None
    return None


def index_spec(chain):
    """What Maker is told for the index of a chain."""
    newest = chain[-1].header
    own, parent = newest["backup_uuid"], chain[0].header["parent_uuid"]
    blocks = []
    for block in sorted(set().union(*(a.index() for a in chain))):
        state = state_of(chain, block)
        if block * BLOCK >= newest["virtual_size"] or state is None:
            continue
        if state != "zero":
            blocks.append({"offset": block * BLOCK, "digest": state.hex()})
        elif chain[0].header["kind"]:
            blocks.append({"offset": block * BLOCK, "kind": "zero"})
    return {
        "index": True, "blocks": blocks, "parent_uuid": parent,
        "kind": ("full", "incremental")[chain[0].header["kind"]],
        "digest": {v: k for k, v in DIGEST_NAMES.items()}[
            newest["digest_algorithm"]],
        "virtual_size": newest["virtual_size"], "clip": merged_clip(chain),
        "time": newest["time"], "image_uuid": newest["image_uuid"],
        "backup_uuid": own, "set_uuid": newest["set_uuid"],
        "label": newest["label"][:newest["label_length"]].decode(),
        "covered": merged_covered(chain, own, parent)}


# --------------------------------------------------------------------------
# make
# --------------------------------------------------------------------------

class Maker:
    """Generates an archive from a description, hostile ones included.

    The description is a JSON object; all of it is optional:

      kind "full" or "incremental"; virtual_size; clip; time; label; digest
      ("xxh3", "sha256"); image_uuid, backup_uuid, parent_uuid, set_uuid;
      covered (list); level (of zstd).

      blocks: [{"offset": bytes, "count": blocks, "kind": "data" or "zero",
                "fill": byte | "seed": any | "file": path [, "at": offset]}]
         data blocks that follow each other are put into one frame, up to
         "group" (16) blocks and never across a stripe.

      frames: [{"offset": bytes,
                "blocks": [{"fill"|"seed"|"file": ..., "live": true|false}],
                "raw": hex in place of the zstd frame,
                "checksum": false, "content_size": false,
                "append": hex that joins the compressed bytes}]
         frames of one's own, as after a merge; sorted in with the others.

      index: true   an index: of data blocks only digests are kept, which
         may be given as "digest" (hex) instead of the content;
      data_runs: {"PAGE": [[first, length], ...]}  DATA runs, verbatim.

      keep_order: true   frames and pages stand as given, not sorted.
      runs: {"PAGE": [[first, length], ...]}  ZERO runs of a page, verbatim.
      empty_pages: [PAGE, ...]  pages without content.

      override: {"FIELD": value}  a raw field, named as `structures` does,
         e.g. "header.version", "record[0].live", "page[1].entry[0].blocks",
         "trailer.tail.end_mark", "page[0].digest"; raw and digest fields
         take "hex:...".  Checksums and digests are computed after the
         override, and offsets and digests of what follows with them; so the
         archive breaks no other rule than the one meant.

      insert: {"header"|"record[N]"|"frame[N]"|"page[N]"|"trailer": hex}
         bytes before the piece;  append: hex  bytes at the end;
      truncate: N  length of the result.
    """

    def __init__(self, spec):
        self.spec = spec
        self.algorithm = DIGEST_NAMES[spec.get("digest", "xxh3")]
        self.digest_size = DIGEST_SIZES[self.algorithm]
        self.override = dict(spec.get("override", {}))
        self.out = bytearray()
        self.frame_number = 0
        self.page_number = 0
        self.directory = []
        self.is_index = spec.get("index", False)
        self.index_blocks = {}         # of an index: guest block -> digest
        self.totals = {"page_count": 0, "data_blocks": 0, "zero_blocks": 0,
                       "frame_count": 0, "compressed_total": 0}

    def make(self):
        """Return the bytes of the archive."""
        self._emit_header()
        pages = self._collect_pages()
        for number in (pages if self.spec.get("keep_order")
                       else sorted(pages)):
            self._emit_page(number, *pages[number])
        self._emit_trailer()
        self.out += bytes.fromhex(self.spec.get("append", ""))
        if self.override:
            raise ValueError("no such field: " + ", ".join(self.override))
        return bytes(self.out[:self.spec.get("truncate", len(self.out))])

    # -- primitives

    def _fields(self, layout, prefix, values):
        """Encode a structure, overrides applied."""
        values = dict(values)
        for name, _, _, _ in layout.fields:
            full = f"{prefix}.{name}"
            if full in self.override:
                values[name] = self.override.pop(full)
        return layout.encode(values)

    def _raw(self, name, value):
        """Bytes of a field outside of the layouts, override applied."""
        if name in self.override:
            return to_raw(self.override.pop(name))
        return value

    def _digest(self, name, data):
        return self._raw(name, digest(self.algorithm, data))

    def _insert(self, name):
        self.out += bytes.fromhex(self.spec.get("insert", {}).get(name, ""))

    def _emit(self, name, payload):
        """Append a skippable frame; return its offset."""
        offset = len(self.out)
        self.out += self._fields(SKIPPABLE, name + ".skippable", {
            "magic": SKIPPABLE_MAGIC, "payload_size": len(payload)})
        self.out += payload
        return offset

    # -- header

    def _emit_header(self):
        spec = self.spec
        self._insert("header")
        kind = {"full": 0, "incremental": 1}[spec.get("kind", "full")]
        label = spec.get("label", "main")
        covered = spec.get("covered", [])
        parent = spec.get("parent_uuid",
                          str(uuid.UUID(int=0xFA)) if kind else ZERO_UUID)
        clip = spec.get("clip")
        payload = self._fields(HEADER, "header", {
            "kind_name": b"LBZH", "version": 1,
            "incompatible": FEATURE_INDEX if self.is_index else 0,
            "digest_algorithm": self.algorithm, "kind": kind,
            "block_bits": 16, "label_length": len(label.encode()),
            "covered_count": len(covered),
            "virtual_size": spec.get("virtual_size", 0),
            "clip": NO_CLIP if clip is None else clip,
            "time": spec.get("time", 0),
            "image_uuid": spec.get("image_uuid", str(uuid.UUID(int=0x1A))),
            "backup_uuid": spec.get("backup_uuid", str(uuid.UUID(int=0xBA))),
            "parent_uuid": parent,
            "set_uuid": spec.get("set_uuid", ZERO_UUID), "label": label})
        for i, name in enumerate(covered):
            payload += self._raw(f"header.covered[{i}]", uuid.UUID(name).bytes)
        payload += self._digest("header.digest", payload)
        self.header_payload = payload
        self._emit("header", payload)

    # -- content

    def _content(self, block):
        """The 64 KiB of a block's description."""
        if "fill" in block:
            return bytes([block["fill"]]) * BLOCK
        if "file" in block:
            with open(block["file"], "rb") as file:
                file.seek(block.get("at", 0))
                return file.read(BLOCK).ljust(BLOCK, b"\0")
        return seeded_block(block.get("seed", 0))

    def _pad(self, number, data):
        """Zeroes behind the end of the disk."""
        room = self.spec.get("virtual_size", 0) - number * BLOCK
        if 0 < room < BLOCK and not self.spec.get("no_padding"):
            return data[:room].ljust(BLOCK, b"\0")
        return data

    def _blocks(self):
        """Expand "blocks": yield (number, description)."""
        for item in self.spec.get("blocks", []):
            for i in range(item.get("count", 1)):
                block = dict(item)
                if "seed" in block and i:
                    block["seed"] = f"{item['seed']}+{i}"
                if "file" in block:
                    block["at"] = item.get("at", item["offset"]) + i * BLOCK
                yield item["offset"] // BLOCK + i, block

    def _collect_pages(self):
        """{page number: (frames, runs)}, frames as (first block, spec)."""
        data, zero = {}, []
        for number, block in self._blocks():
            if block.get("kind", "data") == "zero":
                zero.append(number)
            else:
                data[number] = block
        pages = {}

        def page_of(number):
            return pages.setdefault(number, ([], []))

        if self.is_index:
            for number, block in data.items():
                self.index_blocks[number] = self._digest_of(number, block)
                page_of(number // PAGE_BLOCKS)
            data = {}
        for frame in self._grouped(data) + self.spec.get("frames", []):
            page_of(frame["offset"] // PAGE_RANGE)[0].append(frame)
        for number in sorted(set(zero)):
            runs = page_of(number // PAGE_BLOCKS)[1]
            first = number % PAGE_BLOCKS
            if runs and sum(runs[-1]) == first:
                runs[-1][1] += 1
            else:
                runs.append([first, 1])
        for number, runs in self.spec.get("runs", {}).items():
            page_of(int(number))[1][:] = runs
        for number in self.spec.get("empty_pages", []):
            page_of(number)
        if not self.spec.get("keep_order"):
            for frames, _ in pages.values():
                frames.sort(key=first_live_offset)
        return pages

    def _digest_of(self, number, block):
        if "digest" in block:
            return bytes.fromhex(block["digest"])
        return digest(self.algorithm, self._pad(number, self._content(block)))

    def _grouped(self, data):
        """Put consecutive blocks of one stripe together."""
        frames = []
        limit = self.spec.get("group", STRIPE_BLOCKS)
        previous = None
        for number in sorted(data):
            block = dict(data[number], live=True)
            if (frames and number == previous + 1
                    and number % STRIPE_BLOCKS
                    and len(frames[-1]["blocks"]) < limit):
                frames[-1]["blocks"].append(block)
            else:
                frames.append({"offset": number * BLOCK, "blocks": [block]})
            previous = number
        return frames

    def _compress(self, frame, content):
        if "raw" in frame:
            return bytes.fromhex(frame["raw"])
        compressor = zstandard.ZstdCompressor(
            level=self.spec.get("level", 3),
            write_checksum=frame.get("checksum", True),
            write_content_size=frame.get("content_size", True))
        if frame.get("content_size", True):
            compressed = compressor.compress(content)
        else:
            worker = compressor.compressobj()
            compressed = worker.compress(content) + worker.flush()
        return compressed + bytes.fromhex(frame.get("append", ""))

    def _emit_frame(self, frame):
        """Append record and frame; return (entry values, digests)."""
        name = f"record[{self.frame_number}]"
        first = frame["offset"] // BLOCK
        live, digests, content = 0, {}, b""
        for i, block in enumerate(frame["blocks"]):
            data = self._content(block)
            if block.get("live", True):
                data = self._pad(first + i, data)
                live |= 1 << i
                digests[first + i] = digest(self.algorithm, data)
            content += data
        compressed = self._compress(frame, content)
        self._insert(name)
        record = {"kind_name": b"LBZR", "compressed_size": len(compressed),
                  "guest_offset": frame["offset"],
                  "blocks": len(frame["blocks"]), "live": live}
        payload = self._fields(RECORD, name, record)
        if not self.spec.get("keep_record_checksum"):
            payload = payload[:20] + short_digest(payload[:20]).to_bytes(
                4, "little")
        offset = self._emit(name, payload)
        self._insert(f"frame[{self.frame_number}]")
        self.out += compressed
        self.frame_number += 1
        self.totals["frame_count"] += 1
        self.totals["compressed_total"] += len(compressed)
        # The entry repeats the record, what was overridden there included.
        written = RECORD.decode(payload)
        entry = {"record_offset": offset,
                 "compressed_size": written["compressed_size"],
                 "first_block": written["guest_offset"] // BLOCK % PAGE_BLOCKS,
                 "blocks": written["blocks"], "live": written["live"]}
        return entry, digest(self.algorithm, compressed), digests

    def _emit_page(self, number, frames, runs):
        name = f"page[{self.page_number}]"
        emitted = [self._emit_frame(frame) for frame in frames]
        digests, data_runs = {}, []
        for _, _, blocks in emitted:
            digests.update(blocks)
        if self.is_index:
            emitted = []
            digests = {block: value
                       for block, value in self.index_blocks.items()
                       if block // PAGE_BLOCKS == number}
            data_runs = self._data_runs(number, sorted(digests))
        payload = self._fields(PAGE, name, {
            "kind_name": b"LBZP",
            "frame_count": len(emitted) + len(data_runs),
            "number": number, "run_count": len(runs),
            "data_count": len(digests)})
        for i, (entry, compressed_digest, _) in enumerate(emitted):
            payload += self._fields(ENTRY, f"{name}.entry[{i}]", entry)
            payload += self._raw(f"{name}.entry[{i}].digest",
                                 compressed_digest)
        for kind, some in (("data_run", data_runs), ("run", runs)):
            for i, (first, length) in enumerate(some):
                payload += self._fields(RUN, f"{name}.{kind}[{i}]", {
                    "first_block": first, "length": length})
        for i, block in enumerate(sorted(digests)):
            payload += self._raw(f"{name}.block_digest[{i}]", digests[block])
        own_digest = self._digest(f"{name}.digest", payload)
        payload += own_digest
        self._insert(name)
        offset = self._emit(name, payload)
        self.page_number += 1
        self.totals["page_count"] += 1
        self.totals["data_blocks"] += len(digests)
        self.totals["zero_blocks"] += sum(run[1] for run in runs)
        written = PAGE.decode(payload)
        self.directory.append(({
            "page_number": written["number"], "page_offset": offset,
            "payload_size": len(payload)}, own_digest))

    def _data_runs(self, page, blocks):
        """[[first block of the page, length], ...] of an index."""
        if str(page) in self.spec.get("data_runs", {}):
            return self.spec["data_runs"][str(page)]
        runs = []
        for block in blocks:
            first = block % PAGE_BLOCKS
            if runs and sum(runs[-1]) == first:
                runs[-1][1] += 1
            else:
                runs.append([first, 1])
        return runs

    # -- trailer

    def _emit_trailer(self):
        self._insert("trailer")
        payload = self._fields(TRAILER, "trailer",
                               dict(self.totals, kind_name=b"LBZT"))
        for i, (entry, page_digest) in enumerate(self.directory):
            name = f"trailer.directory[{i}]"
            payload += self._fields(DIRECTORY, name, entry)
            payload += self._raw(f"{name}.digest", page_digest)
        payload += self._digest("trailer.root_digest",
                                self.header_payload + payload)
        payload += self._fields(TAIL, "trailer.tail", {
            "trailer_offset": len(self.out),
            "payload_size": len(payload) + TAIL.size, "end_mark": b"LBZE"})
        self._emit("trailer", payload)


def seeded_block(seed):
    """64 KiB that depend on the seed: the first half doesn't compress."""
    noise = random.Random(f"lbz block {seed}").randbytes(BLOCK // 2)
    return noise + bytes([noise[0]]) * (BLOCK // 2)


def first_live_offset(frame):
    """Sort key of a frame: the guest offset of its first live block."""
    for i, block in enumerate(frame["blocks"]):
        if block.get("live", True):
            return frame["offset"] + i * BLOCK
    return frame["offset"]


# --------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------

def command_verify(args):
    """Check each file for itself."""
    status = 0
    for path in args.files:
        try:
            Archive(path)
        except Unsupported as error:
            print(f"{path}: unsupported: {error}")
            status = 4
        except Damaged as error:
            print(f"{path}: damaged: {error}")
            status = 4
    return status


def command_dump(args):
    """Print all structures."""
    json.dump(dump_archive(Archive(args.file)), sys.stdout, indent=1)
    print()
    return 0


def command_structures(args):
    """Print where each field is."""
    spans = [{"name": name, "offset": offset, "length": length}
             for name, offset, length in structure_spans(Archive(args.file))
             if length]
    json.dump(spans, sys.stdout, indent=1)
    print()
    return 0


def command_root(args):
    """Print root digest and UUID."""
    archive = Archive(args.file)
    print(archive.root.hex(), archive.header["backup_uuid"])
    return 0


def command_restore(args):
    """Restore a chain."""
    archives = [Archive(path, deep=False) for path in args.files]
    chain = select_chain(archives, args.at and str(uuid.UUID(args.at)))
    with open(args.output, "wb") as out:
        restore_chain(chain, out)
    return 0


def command_index(args):
    """Write the index of a chain."""
    archives = [Archive(path, deep=False) for path in args.files]
    chain = select_chain(archives, args.at and str(uuid.UUID(args.at)),
                         partial=True)
    with open(args.output, "wb") as out:
        out.write(Maker(index_spec(chain)).make())
    return 0


def command_make(args):
    """Generate an archive."""
    with (sys.stdin if args.spec == "-" else open(args.spec)) as file:
        spec = json.load(file)
    with open(args.output, "wb") as out:
        out.write(Maker(spec).make())
    return 0


def command_hostile(args):
    """Write the hostile archives."""
    import hostile_archives
    hostile_archives.write_all(args.directory)
    return 0


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description="independent implementation of the archive format")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify")
    verify.add_argument("files", nargs="+")
    verify.set_defaults(run=command_verify)
    for name, run in (("dump", command_dump), ("root", command_root),
                      ("structures", command_structures)):
        sub = commands.add_parser(name)
        sub.add_argument("file")
        sub.set_defaults(run=run)
    for name, run in (("restore", command_restore), ("index", command_index)):
        sub = commands.add_parser(name)
        sub.add_argument("-o", dest="output", required=True)
        sub.add_argument("--at")
        sub.add_argument("files", nargs="+")
        sub.set_defaults(run=run)
    make = commands.add_parser("make")
    make.add_argument("-o", dest="output", required=True)
    make.add_argument("spec")
    make.set_defaults(run=command_make)
    hostile = commands.add_parser("hostile")
    hostile.add_argument("directory")
    hostile.set_defaults(run=command_hostile)
    return parser.parse_args(argv)


def main(argv):
    """Run a command; return its exit status."""
    args = parse_arguments(argv)
    try:
        return args.run(args)
    except Unsupported as error:
        print(f"lbz.py: unsupported: {error}", file=sys.stderr)
        return 4
    except Damaged as error:
        print(f"lbz.py: damaged: {error}", file=sys.stderr)
        return 4
    except NoContent as error:
        print(f"lbz.py: {error}", file=sys.stderr)
        return 2
    except NoChain as error:
        print(f"lbz.py: {error}", file=sys.stderr)
        return 3
    except (OSError, ValueError, OverflowError) as error:
        print(f"lbz.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
