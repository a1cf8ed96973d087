# Our tools and the driver read what the other writes; the independent reader is
# the judge.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu

@test "lbctl, qemu-img and the oracle agree, on disks of many geometries" {
    claim agree.py geometries
}

@test "lbctl, qemu-img and the oracle agree, on more of them" {
    claim agree.py other-geometries
}
