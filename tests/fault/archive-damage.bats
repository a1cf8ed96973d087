# A flipped byte, a cut and bytes behind an archive are always found: status 4, a
# message with file, offset and guest range, nothing under the final name.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load fault

@test "sound archives are taken" {
    claim damage.py sound-archives
}

@test "a flipped byte in each structure" {
    claim damage.py flips-in-structures
}

@test "a flipped byte at a thousand random places" {
    claim damage.py flips-at-random
}

@test "a cut at any length" {
    claim damage.py cuts-of-any-length
}

@test "bytes behind the archive" {
    claim damage.py bytes-behind
}

@test "each of several damages is told, the rest is checked" {
    claim damage.py several-damages
}

@test "a damaged parent of a sound incremental" {
    claim damage.py refuses-parts-of-a-chain
}

@test "a merge to standard output leaves no part" {
    claim damage.py damage-on-standard-output
}
