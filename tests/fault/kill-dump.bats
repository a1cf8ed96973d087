# lbdump, killed at any of its writes: the image is in a state that is allowed,
# no archive that verifies is a part, and no change is lost to the next dump.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load fault

@test "killed in a full dump to a file" {
    claim faults.py kill-full
}

@test "killed in an incremental to a file" {
    claim faults.py kill-incremental
}

@test "killed in an incremental to a redirected file" {
    claim faults.py kill-redirect
}

@test "killed in an incremental to a pipe" {
    claim faults.py kill-pipe
}
