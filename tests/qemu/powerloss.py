# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""What a power loss may leave of files, from the log of the fault shim.

A sync saves what was written before it began, once it is done.  Of what was
written since, any pages may be there, in any order.
"""

from qemulib import read, write

PAGE = 4096


def entries(log):
    """(place in the log, what, name, offset, bytes), None where there is
    none."""
    data, at = read(log), 0
    while at < len(data):
        end = data.index(b"\n", at)
        words = data[at:end].decode().split()
        at = end + 1
        if words[0] == "W":
            length = int(words[2])
            yield at, "W", words[3], int(words[1]), data[at:at + length]
            at += length
        else:
            yield at, words[0], words[1], None, None


def pages_of(offset, data):
    """Cut at multiples of PAGE."""
    while data:
        size = PAGE - offset % PAGE
        yield offset, data[:size]
        offset, data = offset + size, data[size:]


class File:
    """One that was written to."""

    def __init__(self, content=None):
        self.there = content is not None
        self.safe = bytearray(content or b"")
        self.pending = []
        self.promised = 0   # how much of it the sync under way will save

    def apply(self, content, pages):
        """In the order of writing."""
        for offset, data in pages:
            if len(content) < offset:
                content.extend(bytes(offset - len(content)))
            content[offset:offset + len(data)] = data
        return content

    def take(self, what, offset, data):
        """An entry of the log."""
        self.there = True
        if what == "W":
            self.pending += pages_of(offset, data)
        elif what == "S":
            self.promised = len(self.pending)
        else:
            self.apply(self.safe, self.pending[:self.promised])
            del self.pending[:self.promised]
            self.promised = 0

    def left(self, random, share):
        """As it may be found, with about that share of what is not safe."""
        return self.apply(bytearray(self.safe), [
            page for page in self.pending if random.random() < share])


def losses(log, files, random, unsynced=()):
    """Yield (place in the log, function that writes the files to a folder):
    what may be left before each sync, and after it.

    files: {name: content or None} before.  unsynced: whose syncs do nothing.
    """
    files = {name: File(content) for name, content in files.items()}
    for at, what, name, offset, data in entries(log):
        if name not in files or (what != "W" and name in unsynced):
            continue
        if what != "W":
            for share in (0, 0.5, 0.9) if what == "S" else (0, 1):
                def save(folder, share=share):
                    for each, file in files.items():
                        if file.there:
                            write(f"{folder}/{each}",
                                  file.left(random, share))
                yield at, save
        files[name].take(what, offset, data)
