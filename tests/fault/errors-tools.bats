# Full disks, failing disks, short transfers and signals.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load fault

@test "any write or sync of lbctl fails" {
    claim faults.py fail-control
}

@test "any read, write or sync of a merge fails" {
    claim faults.py fail-merge
}

@test "any read, write or sync of a restore fails" {
    claim faults.py fail-restore
}

@test "any read, write or sync of storing from a pipe fails" {
    claim faults.py fail-store
}

@test "an unreadable sector of an archive is no damage" {
    claim faults.py fail-verify
}

@test "short and interrupted reads and writes go on" {
    claim faults.py short-transfers
}

@test "SIGINT and SIGTERM stop a dump" {
    claim faults.py signals-stop-a-dump
}

@test "SIGINT stops lbverify" {
    claim faults.py signals-stop-lbverify
}

@test "a second signal leaves no temporary file either" {
    claim faults.py second-signal
}

@test "SIGINT and SIGTERM stop a merge, a restore and storing" {
    claim faults.py signals-stop-merge-and-restore
}
