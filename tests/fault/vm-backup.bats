# lbvm backup, killed or failing at any of its writes: what is listed is whole, and
# the next backup is incremental, and right.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load fault

@test "killed in a backup" {
    claim vmbackup.py killed
}

@test "errors in a backup" {
    claim vmbackup.py failed
}
