#!/usr/bin/python3
"""Print the table of a benchmark: report.py [--markdown] results.tsv

A line of results.tsv is: row, contender, and for a run its microseconds, user
and system seconds and the peak memory of its largest process in KiB; for a size
its bytes; for 'about' a text; what tracking.py adds is described there. The
tables below are the only place that knows what must be reached.

Copyright (C) 2026 The qcow2 livebackup authors
SPDX-License-Identifier: GPL-2.0-or-later
"""

import collections
import statistics
import sys

# row: (title, ours, {peer: limit of ours/peer, or None})
COMPARED = {
    "dump": ("full dump", "lbdump",
             {"qemu-img": 0.60, "nbdcopy": None, "zstd": 1.0}),
    "restore": ("restore to qcow2", "lbrestore", {"best": 0.5}),
    "verify": ("verify", "lbverify", {"zstd": 1 / 3}),
    "merge": ("merge of a full and 7 incrementals", "lbmerge",
              {"cp": 1.5, "recompress": None}),
    "incremental": ("incremental, 1 TiB and 10 TiB", "10T", {"1T": 1.2}),
}
MERGE_CPU = 0.10
INCREMENTAL_SECONDS = 1.0
ARCHIVE_SIZE = 1.02
MEMORY_KIB = 64 * 1024
MEMORY = {
    "memory-disk": "memory, this disk",
    "memory-wide": "memory, 16 TiB virtual, ten million extents",
}
PEERS = {
    "qemu-img": "qemu-img convert",
    "qemu-img-m8": "qemu-img convert -m 8 -W",
    "nbdcopy": "nbdcopy",
    "recompress": "zstd -d, zstd -1",
    "1T": "lbdump --incremental, 1 TiB",
    "10T": "lbdump --incremental, 10 TiB",
}
# case: (title, the case beside it, least ratio of the writes per second)
TRACKING = {
    "stock": ("stock QEMU", None, None),
    "again": ("stock QEMU again", "stock", None),
    "off": ("patched, livebackup off", "stock", 0.98),
    "bitmap": ("patched, stock bitmap", "stock", None),
    "on": ("patched, livebackup on", "bitmap", 0.97),
    "clean-bitmap": ("stock bitmap, granules clean", None, None),
    "clean-on": ("livebackup on, granules clean", "clean-bitmap", 0.70),
}
NOISE = 0.01    # more between 'again' and 'stock', and the rest means little
TRACKING_ROWS = {
    "tracking-random": "writes of 4 KiB, random",
    "tracking-sequential": "writes of 64 KiB, sequential",
}
TRACKING_HEAD = ["what", "by", "writes/s", "p99 us", "CPU us",
                 "ratio to", "ratio (runs)", "required", ""]
HEAD = ["what", "by", "median s", "min s", "CPU s", "MiB",
        "ours/this", "required", ""]


class Run:
    def __init__(self, fields):
        self.seconds = int(fields[0]) / 1e6
        self.cpu = float(fields[1]) + float(fields[2])
        self.kib = int(fields[3])


class Contender:
    def __init__(self, name, runs):
        self.name = name
        self.median = statistics.median(run.seconds for run in runs)
        self.min = min(run.seconds for run in runs)
        self.cpu = statistics.median(run.cpu for run in runs)
        self.kib = max(run.kib for run in runs)

    def cells(self, title=""):
        return [title, PEERS.get(self.name, self.name), f"{self.median:.2f}",
                f"{self.min:.2f}", f"{self.cpu:.2f}", f"{self.kib / 1024:.1f}"]


def verdict(value, limit):
    return "met" if value <= limit else "MISSED"


def ratio_cells(ours, theirs, limit):
    ratio = ours / theirs
    if limit is None:
        return [f"{ratio:.2f}", "", ""]
    return [f"{ratio:.2f}", f"{limit:.2f}", verdict(ratio, limit)]


def compared_lines(row, contenders):
    title, our_name, limits = COMPARED[row]
    ours = contenders.pop(our_name)
    best = min(contenders.values(), key=lambda peer: peer.median, default=ours)
    yield ours.cells(title) + [""] * 3
    for name, peer in contenders.items():
        limit = limits.get(name)
        if "best" in limits and peer is best:
            limit = limits["best"]
        yield peer.cells() + ratio_cells(ours.median, peer.median, limit)
    if row == "merge":
        cpu = contenders["recompress"].cpu
        yield (["", "its CPU time", "", "", "", ""] +
               ratio_cells(ours.cpu, cpu, MERGE_CPU))
    if row == "incremental":
        first = contenders["1T"].median
        yield ["", "1 TiB, seconds", "", "", "", "", f"{first:.2f}",
               f"{INCREMENTAL_SECONDS:.2f}",
               verdict(first, INCREMENTAL_SECONDS)]


def size_lines(sizes):
    def mib(name):
        return f"{sizes[name] / 2**20:.1f}"

    blank = [""] * 3
    yield ["size of the archive", "lbdump", *blank, mib("lbdump"), *blank]
    yield (["", "zstd -1 of the same bytes", *blank, mib("zstd")] +
           ratio_cells(sizes["lbdump"], sizes["zstd"], ARCHIVE_SIZE))


def memory_lines(row, contenders):
    title = MEMORY[row]
    for contender in contenders.values():
        yield contender.cells(title) + [
            "", f"{MEMORY_KIB // 1024} MiB",
            verdict(contender.kib, MEMORY_KIB)]
        title = ""


class Writer:
    """The runs of one case of tracking."""

    def __init__(self, runs):
        self.p99 = statistics.median(float(run[0]) for run in runs)
        self.cpu = statistics.median(float(run[1]) for run in runs)
        self.runs = [[float(rate) for rate in run[2:]] for run in runs]
        self.rate = statistics.median(map(statistics.median, self.runs))

    def ratios(self, other):
        """Of each run: the median of its slices, each with its neighbour."""
        return [statistics.median(a / b for a, b in zip(ours, theirs))
                for ours, theirs in zip(self.runs, other.runs)]


def tracking_lines(row, entries):
    writers = {who: Writer(runs) for who, runs in entries.items()}
    heading = TRACKING_ROWS[row]
    for who, (title, other, least) in TRACKING.items():
        writer = writers[who]
        cells = [heading, title, f"{writer.rate:.0f}", f"{writer.p99:.0f}",
                 f"{writer.cpu:.1f}"]
        heading = ""
        if other is None:
            yield cells + [""] * 4
            continue
        ratios = writer.ratios(writers[other])
        ratio = statistics.median(ratios)
        cells += [other, f"{ratio:.3f} ({min(ratios):.3f} to "
                         f"{max(ratios):.3f})"]
        if who == "again":
            quiet = abs(ratio - 1) <= NOISE
            cells += [f"1 +- {NOISE}", "quiet" if quiet else "TOO NOISY"]
        elif least is None:
            cells += ["", ""]
        else:
            cells += [f"{least:.2f}", "met" if ratio >= least else "MISSED"]
        yield cells


def table(results):
    for row, entries in results.items():
        if row == "size":
            sizes = {who: int(values[0][0]) for who, values in entries.items()}
            yield from size_lines(sizes)
            continue
        contenders = {who: Contender(who, [Run(value) for value in values])
                      for who, values in entries.items()}
        if row in COMPARED:
            yield from compared_lines(row, contenders)
        elif row in MEMORY:
            yield from memory_lines(row, contenders)


def print_markdown(head, lines):
    print("\n| " + " | ".join(head) + " |")
    print("| --- | --- |" + " ---: |" * 6 + " --- |")
    for line in lines:
        print("| " + " | ".join(line) + " |")


def print_plain(head, lines):
    print()
    widths = [max(len(line[i]) for line in [head] + lines)
              for i in range(len(head))]
    for line in [head] + lines:
        cells = [cell.ljust(width) if i < 2 or i == 8 else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(line, widths))]
        print("  ".join(cells).rstrip())


def main():
    arguments = sys.argv[1:]
    show, bullet = print_plain, ""
    if arguments[:1] == ["--markdown"]:
        show, bullet = print_markdown, "- "
        del arguments[0]
    if len(arguments) != 1:
        sys.exit(__doc__)
    results = collections.defaultdict(lambda: collections.defaultdict(list))
    with open(arguments[0], encoding="utf-8") as file:
        for line in file:
            row, who, *values = line.rstrip("\n").split("\t")
            results[row][who].append(values)
    for who, values in results.pop("about", {}).items():
        print(f"{bullet}{who}: {values[0][0]}")
    writes = {row: results.pop(row) for row in TRACKING_ROWS if row in results}
    if results:
        show(HEAD, list(table(results)))
    if writes:
        show(TRACKING_HEAD, [line for row, entries in writes.items()
                             for line in tracking_lines(row, entries)])


main()
