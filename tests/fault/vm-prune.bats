# lbvm prune, killed, failing or stopped at any of its writes and deletions:
# what is listed restores, and the next pruning ends the work. lbvm verify,
# likewise.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load fault

@test "killed in a pruning" {
    claim vmprune.py killed
}

@test "errors in a pruning" {
    claim vmprune.py failed
}

@test "a signal in a pruning" {
    claim vmprune.py stopped
}

@test "a signal or an error in a verification" {
    claim vmprune.py verify
}
