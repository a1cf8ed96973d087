# Archives and images that are kept for ever are read, or refused, as they were.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load fault

@test "archives that were accepted" {
    claim golden.py accepted-archives
}

@test "images that were accepted" {
    claim golden.py accepted-images
}

@test "files that were rejected, with the message they had" {
    claim golden.py rejected
}
