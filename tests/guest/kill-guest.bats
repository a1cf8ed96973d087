# A guest that writes checksummed patterns, killed with its QEMU: every time the
# next incremental has all that changed. See killtest.py; by night a hundred
# kills and more.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load guest

@test "killed while a guest writes, at its first writes, and closing" {
    claim guest
}

@test "killed while a guest writes, with io_uring" {
    if ! claim io-uring-works; then
        skip "this host refuses io_uring"
    fi
    claim guest-io-uring
}
