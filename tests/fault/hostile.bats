# Images and archives that somebody made to harm: the documented status and a
# message, in bounded memory and time, and never death by a signal.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load fault

@test "hostile archives" {
    claim hostile_files.py hostile-archives-are-refused
}

@test "archives of another maker" {
    claim hostile_files.py good-archives-of-another-maker
}

@test "chains that loop, or have twins" {
    claim hostile_files.py absurd-chains
}

@test "hostile images: a copy, and a comparison with it" {
    claim hostile_files.py hostile-images-dumped
}

@test "hostile images: an incremental" {
    claim hostile_files.py hostile-images-dumped-incrementally
}

@test "hostile images: a dump that adds a checkpoint" {
    claim hostile_files.py hostile-images-dumped-in-full
}

@test "hostile images: lbctl" {
    claim hostile_files.py hostile-images-controlled
}

@test "hostile images: rolled back in place" {
    claim hostile_files.py hostile-images-rolled-back
}
