# The layers of the library and the tools, as a test.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import re
import unittest

TOP = os.environ.get("abs_top_srcdir") or os.path.dirname(
    os.path.dirname(os.path.abspath(__file__)))

# Each module (file name without .c or .h) has a layer, and includes nothing
# above it. The first pattern that matches counts.
LAYERS = [
    (0, r"error|cleanup|bitrange|byteorder|checked|crc32c|uuid|version"),
    (1, r"blkio|outfile|digest|bitmap|pipeline"),
    (2, r"qcow2_\w+|lbz_\w+|cbw|orig|bitmap_ext"),
    (3, r"image(_\w+)?|chain|live"),
]

# (who, must not include what, why)
FORBIDDEN = [
    (r"qcow2_\w+|image(_\w+)?|live", r"lbz_\w+|chain",
     "only a tool joins images and archives"),
    (r"lbz_\w+|chain", r"qcow2_\w+|image(_\w+)?|live",
     "only a tool joins images and archives"),
    (r"qcow2_\w+|lbz_\w+|chain", r"bitmap_ext|cbw",
     "formats know nothing of checkpoints"),
]

# (who, may include these alone, why)
ONLY = [
    (r"bitmap_ext|cbw|orig",
     r"error|cleanup|bitrange|byteorder|checked|crc32c|uuid|bitmap",
     "QEMU links it: L0 and the bitmap algebra alone"),
]

# What the modules that QEMU links may not take from the C library's headers.
CORE = r"bitmap|bitmap_ext|bitrange|cbw|crc32c|orig|uuid|version"
CORE_SYSTEM = r"(assert|endian|errno|inttypes|limits|std\w+|string)\.h"

UMBRELLA = "qcow2lb"  # includes everything; for users of the library

# The library returns errors; it does not print, end the process, or look at
# how the process was started.
NOT_IN_LIBRARY = (
    "printf vprintf fprintf vfprintf dprintf vdprintf puts fputs putchar "
    "perror psignal stdout stderr err errx warn warnx "
    "exit _exit _Exit quick_exit atexit "
    "getenv secure_getenv setenv putenv environ argv "
    "program_invocation_name program_invocation_short_name getopt getopt_long"
).split()


def matches(pattern, name):
    return re.fullmatch(pattern, name) is not None


def layer(module):
    for number, pattern in LAYERS:
        if matches(pattern, module):
            return number
    return None


def module_of(path):
    return os.path.splitext(os.path.basename(path))[0]


def sources(folder):
    directory = os.path.join(TOP, folder)
    return [os.path.join(directory, name)
            for name in sorted(os.listdir(directory))
            if re.fullmatch(r"[^.].*\.[ch]", name)]


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def code_of(path):
    """The text without comments, strings and attributes of functions."""
    pattern = r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
    pattern += r"|__attribute__\(\(.*?\)\)"
    return re.sub(pattern, lambda m: "\n" * m[0].count("\n"), read(path),
                  flags=re.DOTALL)


def includes(path):
    """(line number, name, quoted) of each #include."""
    for number, line in enumerate(read(path).splitlines(), 1):
        match = re.match(r'\s*#\s*include\s*(["<])([^">]+)[">]', line)
        if match:
            yield number, match[2], match[1] == '"'


def at(path, number):
    return f"{os.path.relpath(path, TOP)}:{number}"


class Layers(unittest.TestCase):

    def library_includes(self):
        """(place, module, included module) for each include of our own."""
        for path in sources("qcow2-lb"):
            module = module_of(path)
            if module == UMBRELLA:
                continue
            for number, name, quoted in includes(path):
                if quoted or name.startswith("qcow2-lb/"):
                    yield at(path, number), module, module_of(name)

    def report(self, problems):
        if problems:
            self.fail("\n" + "\n".join(problems))

    def test_every_module_of_the_library_has_a_layer(self):
        self.report([
            f"{os.path.relpath(path, TOP)}: no layer in LAYERS"
            for path in sources("qcow2-lb")
            if module_of(path) != UMBRELLA and layer(module_of(path)) is None])

    def test_nothing_includes_upward(self):
        problems = []
        for place, module, other in self.library_includes():
            if other == UMBRELLA:
                if module != "version":
                    problems.append(f"{place}: includes the public header")
            elif layer(other) is None:
                problems.append(f"{place}: {other} is not in LAYERS")
            elif layer(module) is not None and layer(other) > layer(module):
                problems.append(f"{place}: {module} (L{layer(module)}) "
                                f"includes {other} (L{layer(other)})")
        self.report(problems)

    def test_images_archives_and_checkpoints_keep_apart(self):
        self.report([
            f"{place}: {module} includes {other}: {why}"
            for place, module, other in self.library_includes()
            for who, what, why in FORBIDDEN
            if matches(who, module) and matches(what, other)])

    def test_what_qemu_links_includes_l0_and_bitmap_alone(self):
        self.report([
            f"{place}: {module} includes {other}: {why}"
            for place, module, other in self.library_includes()
            for who, what, why in ONLY
            if matches(who, module) and module != other
            and not matches(what, other)])

    def test_what_qemu_links_needs_no_io_headers(self):
        self.report([
            f"{at(path, number)}: includes <{name}>"
            for path in sources("qcow2-lb")
            if matches(CORE, module_of(path))
            for number, name, quoted in includes(path)
            if not quoted and not matches(CORE_SYSTEM, name)
            and not name.startswith("qcow2-lb/")])

    def test_tools_include_the_public_header_and_their_own(self):
        problems = []
        own = {os.path.basename(path) for path in sources("tools")}
        for path in sources("tools"):
            for number, name, quoted in includes(path):
                ours = quoted or name.startswith("qcow2-lb/")
                name = os.path.basename(name)
                if ours and name != UMBRELLA + ".h" and name not in own:
                    problems.append(f"{at(path, number)}: includes {name}")
        self.report(problems)

    def test_the_library_neither_prints_nor_exits_nor_reads_argv(self):
        words = re.compile(r"(?<![\w.>])(" + "|".join(NOT_IN_LIBRARY)
                           + r")\b(?!\s*:)")
        problems = []
        for path in sources("qcow2-lb"):
            for number, line in enumerate(code_of(path).splitlines(), 1):
                for match in words.finditer(line):
                    if match[1] in ("err", "warn") and not re.match(
                            r"\s*\(", line[match.end():]):
                        continue  # a variable of that name
                    problems.append(f"{at(path, number)}: {match[1]}")
        self.report(problems)


if __name__ == "__main__":
    unittest.main()
