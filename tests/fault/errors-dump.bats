# Full disks and failing disks under lbdump: a clear error, nothing under the
# final name, the checkpoints as before, and no change lost to the next dump.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load fault

@test "any write or sync of a full dump fails" {
    claim faults.py fail-full
}

@test "any write or sync of an incremental fails" {
    claim faults.py fail-incremental
}

@test "any write of a dump to a redirected file fails" {
    claim faults.py fail-redirect
}

@test "any write of a dump to a pipe fails" {
    claim faults.py fail-pipe
}

@test "any read of a dump or of lbctl fails" {
    claim faults.py unreadable-sectors
}
