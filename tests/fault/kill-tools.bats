# lbctl, lbmerge and lbrestore, killed at any of their writes: the old state or
# the new one, whole, and no change is lost to the next dump.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load fault

@test "killed in lbctl enable" {
    claim faults.py kill-enable
}

@test "killed in lbctl confirm" {
    claim faults.py kill-confirm
}

@test "killed in lbctl prune" {
    claim faults.py kill-prune
}

@test "killed in lbctl disable" {
    claim faults.py kill-disable
}

@test "killed in lbctl recover" {
    claim faults.py kill-recover
}

@test "killed in a merge that replaces an input" {
    claim faults.py kill-merge
}

@test "killed in a restore that replaces a disk" {
    claim faults.py kill-restore
}

@test "killed while it stores what comes through a pipe" {
    claim faults.py kill-store
}
