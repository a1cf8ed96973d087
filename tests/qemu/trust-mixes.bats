# A patched QEMU and stock ones in turn on one disk: docs/trust.md holds in every
# mix, and what is trusted misses nothing.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu

@test "every sequence of three sessions, each closed or killed" {
    claim mixes.py all-sequences
}

@test "sessions on disks of many kinds, with dumps in between" {
    claim mixes.py sequences-with-dumps
}

@test "a stock QEMU shrinks, clears, disables, removes, adds: named, mended" {
    claim mixes.py spoilt-bitmaps
}

@test "a stock QEMU is killed: named, mended" {
    claim mixes.py spoilt-by-a-kill
}

@test "other files were changed or exchanged: named, mended" {
    claim mixes.py spoilt-other-files
}

@test "what changes the disk in other ways stays trusted, and complete" {
    claim mixes.py not-spoilt
}
