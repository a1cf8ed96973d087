# What the shared libraries export, and what the one for QEMU needs.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import re
import subprocess
import unittest

TOP = os.environ.get("abs_top_srcdir") or os.path.dirname(
    os.path.dirname(os.path.abspath(__file__)))
BUILD = os.environ.get("abs_top_builddir") or os.path.join(TOP, "build")

PUBLIC = "qcow2lb.h"  # it includes all other public headers
CORE = ["bitmap.h", "bitmap_ext.h", "cbw.h", "orig.h", "uuid.h", PUBLIC]

# libqcow2lb-core is plain computing: no I/O, no allocation, no threads.
CORE_MAY_CALL = re.compile(
    r"_*(mem|str)\w+|v?snprintf|__v?snprintf_chk|abort|__assert_fail"
    r"|__stack_chk_fail|__cxa_finalize|__gmon_start__|_ITM_\w+|__ctype_\w+")


def read(*path):
    with open(os.path.join(TOP, "qcow2-lb", *path), encoding="utf-8") as file:
        return file.read()


def declared(headers):
    """The functions with our prefix that these headers declare."""
    names = set()
    for header in headers:
        text = re.sub(r"/\*.*?\*/", "", read(header), flags=re.DOTALL)
        text = re.sub(r"^\s*#(.*\\\n)*.*$", "", text, flags=re.MULTILINE)
        text = text.replace('extern "C" {', "")
        while re.search(r"\{[^{}]*\}", text):  # inline functions, structs
            text = re.sub(r"\{[^{}]*\}", ";", text)
        for statement in text.split(";"):
            match = re.match(r"\s*(?!static|typedef)\w[^()]*?\b(qlb_\w+)\s*\(",
                             statement)
            if match:
                names.add(match[1])
    return names


def public_headers():
    return re.findall(r'^#include "(.*)"', read(PUBLIC),
                      flags=re.MULTILINE) + [PUBLIC]


def core_headers():
    return [header for header in CORE if header in public_headers()]


def listed(library):
    """The names in the version script."""
    text = read(library + ".map")
    return set(re.findall(r"^\s+(\w[\w*]*);", text, flags=re.MULTILINE))


def symbols(library, option):
    path = os.path.join(BUILD, "qcow2-lb", ".libs", library + ".so")
    if not os.path.exists(path):
        raise unittest.SkipTest("configured with --disable-shared")
    table = subprocess.run(["nm", "-D", option, path], check=True,
                           stdout=subprocess.PIPE, text=True).stdout
    return {re.sub(r"@.*", "", line.split()[-1])
            for line in table.splitlines()
            if line.split()[-2] != "A"}


class Exports(unittest.TestCase):

    def compare(self, what, names, where, others):
        missing = sorted(names - others)
        if missing:
            self.fail(f"{what}, not {where}: " + ", ".join(missing))

    def check_list(self, library, headers):
        names = declared(headers)
        self.compare("declared", names, f"in {library}.map", listed(library))
        self.compare(f"in {library}.map", listed(library), "declared", names)

    def test_the_list_of_the_library_is_its_public_headers(self):
        self.check_list("libqcow2lb", public_headers())

    def test_the_list_of_the_core_is_its_headers(self):
        self.check_list("libqcow2lb-core", core_headers())

    def test_the_library_exports_nothing_else(self):
        self.compare("exported", symbols("libqcow2lb", "--defined-only"),
                     "listed", listed("libqcow2lb"))

    def test_the_core_exports_nothing_else(self):
        self.compare("exported", symbols("libqcow2lb-core", "--defined-only"),
                     "listed", listed("libqcow2lb-core"))

    def test_the_core_has_all_that_it_lists(self):
        self.compare("listed", listed("libqcow2lb-core"), "exported",
                     symbols("libqcow2lb-core", "--defined-only"))

    def test_the_core_only_computes(self):
        called = {name
                  for name in symbols("libqcow2lb-core", "--undefined-only")
                  if not CORE_MAY_CALL.fullmatch(name)}
        self.compare("called by the core", called, "allowed", set())


if __name__ == "__main__":
    unittest.main()
