# Damaged extensions, bitmap directories and tables: a patched QEMU neither
# refuses nor changes the guest's data, nobody trusts them, and they are mended.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu

@test "damage in what is ours costs the bits, not the disk" {
    claim damaged.py damaged-images
}

@test "images that have nothing to do with us are taken as by a stock QEMU" {
    claim damaged.py other-hostile-images
}

@test "random damage in what is ours" {
    claim damaged.py random-damage
}
