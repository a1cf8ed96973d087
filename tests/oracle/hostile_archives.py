# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Archives that a reader must accept or refuse, each for one reason.

write_all(DIR) writes NAME.lbz for each and manifest.json:

    NAME: {"verdict": "ok" | "damaged" | "unsupported" | "any",
           "mention": ...}

All digests and checksums of a bad archive are right unless they are the point,
so that a reader can't refuse it for a simpler reason.  "any": the
specification leaves it open; only a crash or a hang is wrong.  The mention is
a regular expression for the message, to be matched without regard to case.
"""

import json
import os
import uuid

import xxhash

import lbz
from lbz import BLOCK, Maker, PAGE_RANGE

PARENT = str(uuid.UUID(int=0xFA))
OWN = str(uuid.UUID(int=0xBA))
OTHER = str(uuid.UUID(int=0xC0))


def full(**changes):
    """A full archive: three frames, two pages, an odd size."""
    spec = {"virtual_size": PAGE_RANGE + 5 * BLOCK + 1000,
            "blocks": [{"offset": 0, "count": 2, "seed": "a"},
                       {"offset": 20 * BLOCK, "fill": 7},
                       {"offset": PAGE_RANGE + 5 * BLOCK, "fill": 9}]}
    spec.update(changes)
    return spec


def incremental(**changes):
    """An incremental with DATA and ZERO, and a frame with a dead block."""
    spec = {"kind": "incremental", "virtual_size": 40 * BLOCK,
            "covered": [OTHER],
            "blocks": [{"offset": 0, "kind": "zero", "count": 2},
                       {"offset": 4 * BLOCK, "kind": "zero"},
                       {"offset": 30 * BLOCK, "count": 2, "fill": 3}],
            "frames": [{"offset": 16 * BLOCK, "blocks": [
                {"fill": 1}, {"fill": 2, "live": False}, {"fill": 3}]}]}
    spec.update(changes)
    return spec


def field(name, value, base=full, **changes):
    """A base archive with one field overridden."""
    return base(override={name: value}, **changes)


def one_frame(override=(), **frame):
    """A full archive that is one frame of one block, changed as given."""
    return {"virtual_size": 64 * BLOCK, "override": dict(override),
            "frames": [dict({"offset": 0, "blocks": [{"fill": 5}]}, **frame)]}


def index(**changes):
    """An index of an incremental: DATA and ZERO runs, two pages."""
    spec = {"kind": "incremental", "index": True, "covered": [OTHER],
            "virtual_size": PAGE_RANGE + 5 * BLOCK + 1000,
            "blocks": [{"offset": 0, "count": 2, "seed": "a"},
                       {"offset": 2 * BLOCK, "kind": "zero"},
                       {"offset": 20 * BLOCK, "count": 20, "fill": 7},
                       {"offset": PAGE_RANGE + 5 * BLOCK, "fill": 9}]}
    spec.update(changes)
    return spec


def huge_window_frame():
    """A zstd frame of one block of zeroes that asks for a window of 2^41."""
    frame = (lbz.ZSTD_MAGIC.to_bytes(4, "little") + b"\x44\xf8"
             + (BLOCK - 256).to_bytes(2, "little")
             + (1 | 1 << 1 | BLOCK << 3).to_bytes(3, "little") + b"\0")
    checksum = xxhash.xxh64_intdigest(bytes(BLOCK)) & 0xFFFFFFFF
    return frame + checksum.to_bytes(4, "little")


GOOD = {
    "full": full(),
    "full-sha256": full(digest="sha256"),
    "incremental": incremental(),
    "incremental-sha256": incremental(digest="sha256"),
    "empty-disk": {"virtual_size": 0},
    "no-content": {"virtual_size": 2**56},
    "nothing-changed": {"kind": "incremental", "virtual_size": BLOCK},
    "only-zero": {"kind": "incremental", "virtual_size": PAGE_RANGE,
                  "blocks": [{"offset": 0, "kind": "zero", "count": 4096}]},
    "last-block-of-the-largest-disk": {
        "virtual_size": 2**56, "blocks": [{"offset": 2**56 - BLOCK,
                                           "fill": 1}]},
    "covered-1024": incremental(covered=[str(uuid.UUID(int=n + 5000))
                                         for n in range(1024)]),
    "label-22": full(label="ABCxyz.019_-0123456789"),
    "compatible-bit": field("header.compatible", 1 << 63),
    "clip-0": incremental(clip=0),
    "clip": incremental(clip=39 * BLOCK + 1),
    "image-uuid-zero": field("header.image_uuid", lbz.ZERO_UUID),
    "frames-of-one-block": full(group=1),
    "data-that-is-zero": one_frame(blocks=[{"fill": 0}]),
    "spans-overlap": {
        "virtual_size": 64 * BLOCK,
        "frames": [
            {"offset": 0, "blocks": [{"fill": 1}, {"fill": 2, "live": False},
                                     {"fill": 3}]},
            {"offset": BLOCK, "blocks": [{"fill": 4},
                                         {"fill": 5, "live": False}]}]},
    "span-begins-before-the-frame-before": {
        "virtual_size": 64 * BLOCK,
        "frames": [
            {"offset": BLOCK, "blocks": [{"fill": 1}]},
            {"offset": 0, "blocks": [{"fill": 2, "live": False},
                                     {"fill": 3, "live": False},
                                     {"fill": 4}]}]},
    "dead-block-under-zero": {
        "kind": "incremental", "virtual_size": 64 * BLOCK,
        "blocks": [{"offset": BLOCK, "kind": "zero"}],
        "frames": [{"offset": 0, "blocks": [{"fill": 1},
                                            {"fill": 2, "live": False}]}]},
    "dead-block-above-the-disk": {
        "virtual_size": BLOCK,
        "frames": [{"offset": 0, "blocks": [{"fill": 1},
                                            {"fill": 2, "live": False}]}]},
    "index-of-an-incremental": index(),
    "index-of-a-full": index(kind="full", covered=[], digest="sha256",
                             blocks=[{"offset": 15 * BLOCK, "count": 2,
                                      "seed": "b"}]),
    "index-of-zero-alone": index(blocks=[{"offset": 0, "kind": "zero"}]),
    "index-without-content": {"index": True, "virtual_size": BLOCK},
    "index-with-most-runs": index(
        data_runs={"0": [[2 * n, 1] for n in range(2048)]},
        blocks=[{"offset": 2 * n * BLOCK, "digest": "ab" * 16}
                for n in range(2048)]),
}

UNSUPPORTED = {
    "version-0": (field("header.version", 0), "version"),
    "version-2": (field("header.version", 2), "version"),
    "incompatible-bit-1": (field("header.incompatible", 2), r"\b1\b"),
    "incompatible-bits-0-and-1": (field("header.incompatible", 3),
                                  r"\b1\b"),
    "incompatible-bit-63": (field("header.incompatible", 1 << 63), "63"),
    "digest-algorithm-0": (field("header.digest_algorithm", 0), "digest"),
    "digest-algorithm-3": (field("header.digest_algorithm", 3), "digest"),
}

BAD_HEADER = {
    "no-LBZH": (field("header.kind_name", "LBZX"), ""),
    "header-magic": (field("header.skippable.magic", 0x184D2A5A), ""),
    "header-size-0": (field("header.skippable.payload_size", 0), ""),
    "header-size-huge": (field("header.skippable.payload_size", 0xFFFFFFFF),
                         ""),
    "header-digest": (field("header.digest", "hex:" + "00" * 16),
                      "digest|checksum"),
    "header-reserved-6": (field("header.reserved6", 1), "reserved|header"),
    "header-reserved-56": (field("header.reserved56", 1), "reserved|header"),
    "header-reserved-150": (field("header.reserved150", "hex:" + "00" * 9
                                  + "01"), "reserved|header"),
    "kind-2": (field("header.kind", 2), "kind"),
    "block-bits-15": (field("header.block_bits", 15), "block"),
    "label-length-0": (field("header.label_length", 0), "label"),
    "label-length-23": (field("header.label_length", 23), "label"),
    "label-short": (field("header.label_length", 3), "label"),
    "label-long": (field("header.label_length", 5), "label"),
    "label-slash": (full(label="a/b"), "label"),
    "label-newline": (full(label="main\n"), "label"),
    "covered-count": (field("header.covered_count", 2, incremental), ""),
    "covered-count-huge": (field("header.covered_count", 0xFFFFFFFF), ""),
    "covered-1025": (incremental(covered=[str(uuid.UUID(int=n + 5000))
                                          for n in range(1025)]), "cover"),
    "covered-twice": (incremental(covered=[OTHER, OTHER]), "cover"),
    "covered-itself": (incremental(covered=[OWN]), "cover"),
    "covered-parent": (incremental(covered=[PARENT]), "cover"),
    "size-above-2-56": ({"virtual_size": 2**56 + 1}, "size"),
    "clip-in-full": (full(clip=0), "clip"),
    "clip-is-size": (incremental(clip=40 * BLOCK), "clip"),
    "clip-above-size": (incremental(clip=2**64 - 2), "clip"),
    "backup-uuid-zero": (full(backup_uuid=lbz.ZERO_UUID), "uuid"),
    "full-with-parent": (full(parent_uuid=OTHER), "parent|full"),
    "incremental-without-parent": (incremental(parent_uuid=lbz.ZERO_UUID),
                                   "parent"),
    "ZERO-in-full": (full(runs={"0": [[100, 1]]}), "zero"),
}

BAD_RECORD = {
    "record-kind": (field("record[0].kind_name", "LBZX"), ""),
    "record-checksum": (dict(full(), keep_record_checksum=True), ""),
    "record-size-0": (field("record[0].compressed_size", 0), ""),
    "record-size-huge": (field("record[0].compressed_size", 0xFFFFFFFF), ""),
    "record-size-another": (field("record[0].compressed_size", 99,
                                  one_frame), ""),
    "record-unaligned": (field("record[0].guest_offset", 512), ""),
    "record-offset-huge": (field("record[0].guest_offset", 2**64 - BLOCK),
                           ""),
    "record-of-another-page": (field("record[0].guest_offset", PAGE_RANGE),
                               ""),
    "record-blocks-0": (field("record[0].blocks", 0), ""),
    "record-blocks-17": (field("record[0].blocks", 17), ""),
    "record-blocks-one-less": (full(override={
        "record[0].blocks": 1, "record[0].live": 1}), ""),
    "record-live-0": (field("record[0].live", 0), ""),
    "record-live-above": (field("record[0].live", 4), ""),
    "frame-crosses-stripe": (one_frame(
        offset=15 * BLOCK, blocks=[{"fill": 1}, {"fill": 2}]),
        "stripe|cross|MiB|record"),
    "live-block-above-the-disk": (one_frame(offset=64 * BLOCK), ""),
}

BAD_FRAME = {
    "frame-without-checksum": (one_frame(checksum=False), ""),
    "frame-without-size": (one_frame(content_size=False), ""),
    "frame-with-a-tail": (one_frame(append="00"), ""),
    "frame-twice": (one_frame(append="28b52ffd2400010000"), ""),
    "frame-and-skippable": (one_frame(append="5b2a4d1800000000"), ""),
    "frame-empty": (one_frame(raw=""), ""),
    "frame-garbage": (one_frame(raw="ff" * 100), ""),
    "frame-skippable": (one_frame(raw="5b2a4d1804000000" + "00" * 4), ""),
    "frame-cut": (one_frame(raw="28b52ffd64"), ""),
    "frame-of-another-size": (full(frames=[
        {"offset": 40 * BLOCK, "blocks": [{"fill": 1}, {"fill": 1}]}],
        override={"record[2].blocks": 3}), ""),
}

BAD_PAGE = {
    "page-kind": (field("page[0].kind_name", "LBZX"), ""),
    "page-digest": (field("page[0].digest", "hex:" + "00" * 16), ""),
    "page-reserved": (field("page[0].reserved24", 1), ""),
    "page-number": (field("page[0].number", 1), ""),
    "page-number-huge": (field("page[0].number", 2**64 - 1), ""),
    "page-frame-count": (field("page[0].frame_count", 1), ""),
    "page-frame-count-huge": (field("page[0].frame_count", 0xFFFFFFFF), ""),
    "page-run-count-huge": (field("page[0].run_count", 0xFFFFFFFF,
                                  incremental), ""),
    "page-data-count": (field("page[0].data_count", 2), ""),
    "page-data-count-huge": (field("page[0].data_count", 0xFFFFFFFF), ""),
    "page-empty": ({"virtual_size": BLOCK, "empty_pages": [0]}, ""),
    "pages-descend": ({
        "virtual_size": 3 * PAGE_RANGE, "keep_order": True,
        "frames": [{"offset": PAGE_RANGE, "blocks": [{"fill": 1}]},
                   {"offset": 0, "blocks": [{"fill": 1}]}]}, ""),
    "frames-descend": ({
        "virtual_size": 64 * BLOCK, "keep_order": True,
        "frames": [{"offset": 16 * BLOCK, "blocks": [{"fill": 1}]},
                   {"offset": 0, "blocks": [{"fill": 1}]}]}, ""),
    "live-blocks-coincide": ({
        "virtual_size": 64 * BLOCK,
        "frames": [{"offset": 0, "blocks": [{"fill": 1}, {"fill": 2}]},
                   {"offset": BLOCK, "blocks": [{"fill": 2}]}]}, ""),
    "block-digest": (field("page[0].block_digest[1]", "hex:" + "00" * 16),
                     "digest"),
    "entry-digest": (field("page[0].entry[0].digest", "hex:" + "00" * 16),
                     "digest"),
    "run-of-0": (incremental(runs={"0": [[5, 0]]}), ""),
    "run-leaves-the-page": (incremental(
        virtual_size=2 * PAGE_RANGE, runs={"0": [[4095, 2]]}), ""),
    "runs-touch": (incremental(runs={"0": [[5, 1], [6, 1]]}), ""),
    "runs-descend": (incremental(runs={"0": [[8, 1], [5, 1]]}), ""),
    "runs-overlap": (incremental(runs={"0": [[5, 3], [6, 1]]}), ""),
    "run-over-data": (incremental(runs={"0": [[15, 2]]}), ""),
    "run-above-the-disk": (incremental(runs={"0": [[39, 2]]}), ""),
}
for _name, _value in (("record_offset", 1), ("compressed_size", 1),
                      ("first_block", 1), ("blocks", 3), ("live", 1),
                      ("reserved18", "hex:000000000001")):
    BAD_PAGE[f"entry-{_name}"] = (field(f"page[0].entry[0].{_name}", _value),
                                  "")

BAD_INDEX = {
    "index-bit-of-an-archive": (field("header.incompatible", 1), ""),
    "index-lacks-its-bit": (field("header.incompatible", 0, index), ""),
    "index-gap-record": (index(frames=[
        {"offset": 40 * BLOCK, "blocks": [{"fill": 1}]}]), ""),
    "index-data-runs-touch": (index(
        data_runs={"0": [[0, 1], [1, 1], [20, 20]]}), ""),
    "index-data-runs-descend": (index(
        data_runs={"0": [[20, 20], [0, 2]]}), ""),
    "index-data-runs-overlap": (index(
        data_runs={"0": [[0, 2], [1, 20]]}), ""),
    "index-data-run-of-0": (index(
        data_runs={"0": [[0, 2], [10, 0], [20, 20]]}), ""),
    "index-data-run-leaves-the-page": (index(
        data_runs={"0": [[0, 2], [4095, 20]]}), ""),
    "index-data-run-above-the-disk": (index(
        data_runs={"1": [[6, 1]]}), ""),
    "index-data-run-over-zero": (index(
        data_runs={"0": [[1, 2], [20, 20]]}), ""),
    "index-data-count": (index(
        data_runs={"0": [[0, 1], [20, 20]]}), ""),
    "index-data-run-count": (field("page[0].frame_count", 1, index), ""),
    "index-data-run-count-huge": (field("page[0].frame_count", 2049, index),
                                  ""),
    "index-page-empty": (index(blocks=[], empty_pages=[0]), ""),
    "index-totals-frames": (field("trailer.frame_count", 1, index), ""),
    "index-totals-compressed": (field("trailer.compressed_total", 1, index),
                                ""),
    "index-page-digest": (field("page[0].digest", "hex:" + "00" * 16, index),
                          "digest"),
}

BAD_TRAILER = {
    "trailer-kind": (field("trailer.kind_name", "LBZX"), ""),
    "trailer-reserved-4": (field("trailer.reserved4", 1), ""),
    "trailer-reserved-48": (field("trailer.reserved48", "hex:" + "00" * 15
                                  + "01"), ""),
    "trailer-root-digest": (field("trailer.root_digest", "hex:" + "00" * 16),
                            "digest"),
    "trailer-end-mark": (field("trailer.tail.end_mark", "LBZX"), ""),
    "trailer-offset": (field("trailer.tail.trailer_offset", 8), ""),
    "trailer-offset-huge": (field("trailer.tail.trailer_offset", 2**64 - 8),
                            ""),
    "trailer-size": (field("trailer.tail.payload_size", 100), ""),
    "trailer-size-huge": (field("trailer.tail.payload_size", 0xFFFFFFFF), ""),
    "trailer-page-count": (field("trailer.page_count", 1), ""),
    "trailer-page-count-huge": (field("trailer.page_count", 2**63), ""),
    "directory-digest": (field("trailer.directory[1].digest",
                               "hex:" + "00" * 16), ""),
    "directory-reserved": (field("trailer.directory[0].reserved20", 1), ""),
}
for _name in ("data_blocks", "zero_blocks", "frame_count",
              "compressed_total"):
    BAD_TRAILER[f"trailer-{_name}"] = (field(f"trailer.{_name}", 77), "")
for _name in ("page_number", "page_offset", "payload_size"):
    BAD_TRAILER[f"directory-{_name}"] = (
        field(f"trailer.directory[1].{_name}", 5), "")

BAD_LAYOUT = {
    "empty-file": (full(truncate=0), ""),
    "header-alone": (full(truncate=8 + 176), ""),
    "cut-by-one": (full(cut=1), ""),
    "without-trailer": (full(cut="trailer"), ""),
    "bytes-behind": (full(append="00"), ""),
    "trailer-behind-trailer": (full(twice="trailer"), ""),
    "archive-behind-archive": (full(twice="header"), ""),
    "bytes-before": (full(insert={"header": "00"}), ""),
    "gap-before-record": (full(insert={"record[1]": "5b2a4d1800000000"}), ""),
    "gap-before-frame": (full(insert={"frame[1]": "5b2a4d1800000000"}), ""),
    "gap-before-page": (full(insert={"page[0]": "5b2a4d1800000000"}), ""),
    "gap-before-trailer": (full(insert={"trailer": "5b2a4d1804000000"
                                        "4c425a58"}), ""),
    "two-headers": (full(twice_header=True), ""),
}

# What the specification leaves open.
OPEN = {
    "last-block-not-padded": dict(one_frame(), virtual_size=100,
                                  no_padding=True),
    "parent-is-itself": incremental(parent_uuid=OWN),
    "covered-zero": incremental(covered=[lbz.ZERO_UUID]),
    "frame-with-huge-window": one_frame(raw=huge_window_frame().hex(),
                                        blocks=[{"fill": 0}]),
}

DAMAGED = {**BAD_HEADER, **BAD_RECORD, **BAD_FRAME, **BAD_PAGE,
           **BAD_INDEX, **BAD_TRAILER, **BAD_LAYOUT}


def make(spec):
    """Bytes of an archive; knows some more words than Maker."""
    data = Maker(spec).make()
    header_end = 8 + int.from_bytes(data[4:8], "little")
    trailer_at = int.from_bytes(data[-16:-8], "little")
    if spec.get("cut") == "trailer":
        data = data[:trailer_at]
    elif "cut" in spec:
        data = data[:-spec["cut"]]
    if spec.get("twice") == "trailer":
        data += data[trailer_at:]
    elif spec.get("twice") == "header":
        data += data
    if spec.get("twice_header"):
        data = data[:header_end] + data
    return data


def write_all(directory):
    """Write all archives and the manifest."""
    os.makedirs(directory, exist_ok=True)
    manifest = {}

    def write(name, spec, verdict, mention):
        with open(os.path.join(directory, name + ".lbz"), "wb") as file:
            file.write(make(spec))
        manifest[name] = {"verdict": verdict, "mention": mention}

    for name, spec in GOOD.items():
        write(name, spec, "ok", "")
    for name, (spec, mention) in UNSUPPORTED.items():
        write(name, spec, "unsupported", mention)
    for name, (spec, mention) in DAMAGED.items():
        write(name, spec, "damaged", mention)
    for name, spec in OPEN.items():
        write(name, spec, "any", "")
    with open(os.path.join(directory, "manifest.json"), "w") as file:
        json.dump(manifest, file, indent=1)
        file.write("\n")
