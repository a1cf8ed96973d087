# What else happens to a machine while its disk is backed up: the dump is right,
# or it fails; the next backup is incremental and right.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu

@test "nothing" {
    claim live-events.py nothing
}

@test "the machine is paused, and reset" {
    claim live-events.py paused-and-reset
}

@test "jobs of QEMU's own copy the disk" {
    claim live-events.py copied
}

@test "the machine migrates: the backup is given up" {
    claim live-events.py migrated
}

@test "an external snapshot: the backup is given up; its overlay is committed" {
    claim live-events.py snapshot-and-commit
}

@test "the disk is unplugged: the backup is given up" {
    claim live-events.py unplugged
}

@test "QEMU quits: the backup is given up" {
    claim live-events.py quit-meanwhile
}
