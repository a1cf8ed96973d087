# QEMU, killed while it opens, writes to and closes a disk, without a guest: the
# next incremental has all that changed, each time. See killtest.py.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load guest

@test "where a bit is missing after a kill, this is found" {
    claim lost-bit
}

@test "killed at each write of a short life" {
    claim every-write
}

@test "killed at random moments of opening" {
    claim opening
}

@test "killed at random moments of closing, with requests under way" {
    claim closing
}

@test "killed at random moments of a short life" {
    claim writing
}
