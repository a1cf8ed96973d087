# What the bats files of this folder share: claims that a Python script checks,
# with a patched QEMU and stock ones; qemulib.py tells where they are found.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load ../cli/helpers

# claim SCRIPT NAME: run it in the folder of the test.
claim() {
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/qemu/$1" "$2" </dev/null
}
