#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Archives that the kernel unpacks into its first file system (cpio, newc).

    initrd.py TREE OUTPUT MODULE...

takes kernel modules, and those that they depend on, out of an unpacked package:
they become /modules/1, /modules/2, ... in the order of loading.  Modules that
are built into the kernel are left out, and those with a '?' behind their name
where the kernel has none.
"""

import glob
import gzip
import lzma
import os
import re
import sys

DIRECTORY = 0o040755
PROGRAM = 0o100755
CHARACTER = 0o020600


def entry(number, name, mode, data=b"", device=(0, 0)):
    """One file of an archive."""
    path = name.encode() + b"\0"
    fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0]
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return padded(head) + padded(data)


def padded(data):
    """Up to a multiple of four."""
    return data + bytes(-len(data) % 4)


def archive(files):
    """An archive of [(name, mode, data)] or [(name, mode, data, device)]."""
    out = [entry(number, *file) for number, file in enumerate(files, 1)]
    return b"".join(out) + entry(0, "TRAILER!!!", 0)


# --------------------------------------------------------------------------
# Modules
# --------------------------------------------------------------------------

def unpacked(path):
    """The module itself."""
    with open(path, "rb") as file:
        data = file.read()
    if path.endswith(".xz"):
        return lzma.decompress(data)
    if path.endswith(".gz"):
        return gzip.decompress(data)
    return data


class Modules:
    """The modules of a kernel's package."""

    def __init__(self, tree):
        found = (glob.glob(os.path.join(tree, "lib/modules/*"))
                 + glob.glob(os.path.join(tree, "usr/lib/modules/*")))
        if len(found) != 1:
            raise SystemExit(f"initrd.py: modules of one kernel: {found}")
        self.paths = {}
        for folder, _, names in os.walk(found[0]):
            for name in names:
                match = re.fullmatch(r"(.+)\.ko(?:\.xz|\.gz)?", name)
                if match:
                    self.paths[plain(match[1])] = os.path.join(folder, name)
        with open(os.path.join(found[0], "modules.builtin"),
                  encoding="ascii") as file:
            self.builtin = {plain(os.path.basename(line.strip())[:-3])
                            for line in file}

    def in_order(self, names):
        """The bytes of these modules, each after those that it needs."""
        order = {}

        def add(name):
            name = plain(name)
            if name in order or name in self.builtin:
                return
            if name not in self.paths:
                raise SystemExit(f"initrd.py: no module {name}")
            data = unpacked(self.paths[name])
            for needed in re.findall(rb"(?<!\w)depends=([\w,-]*)\0", data):
                for other in filter(None, needed.decode().split(",")):
                    add(other)
            order[name] = data

        for name in names:
            if not name.endswith("?") or plain(name[:-1]) in self.paths:
                add(name.rstrip("?"))
        return list(order.values())


def plain(name):
    """Files and modules mix - and _."""
    return name.replace("-", "_")


def main(tree, output, *names):
    """See above."""
    modules = Modules(tree).in_order(names)
    files = [("dev", DIRECTORY, b""), ("proc", DIRECTORY, b""),
             # the kernel opens it for init before anything is mounted
             ("dev/console", CHARACTER, b"", (5, 1)),
             ("modules", DIRECTORY, b"")]
    files += [(f"modules/{number}", PROGRAM, data)
              for number, data in enumerate(modules, 1)]
    with open(output, "wb") as file:
        file.write(archive(files))


if __name__ == "__main__":
    main(*sys.argv[1:])
