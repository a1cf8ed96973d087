# Disks are backed up, in full and incrementally, while processes write to them with
# all they have; the daemon is killed now and then. Every point in time is exact.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu

# stress ROUNDS OPTION...: eight rounds, by night ROUNDS; a thousand and more in all.
stress() {
    local rounds=8
    [ -z "${QLB_NIGHTLY:-}" ] || rounds=$1
    shift
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/qemu/live-stress.py" \
        --rounds "$rounds" "$@" </dev/null
}

@test "two disks, clusters of 64 KiB" {
    stress 220
}

@test "three disks, granules of 4 KiB, an end within a cluster" {
    stress 120 --disks 3 --size 4 --granularity 4096 --odd-end
}

@test "clusters of 4 KiB, with data" {
    stress 200 --cluster 4096 --granularity 65536 --filled --size 4
}

@test "clusters of 2 MiB, extended L2 entries" {
    stress 80 --cluster 2097152 --extended --size 9 --odd-end
}

@test "external data files, three writers, granules of 512 bytes" {
    stress 80 --data-file --filled --granularity 512 --writers 3
}

@test "a backing file, extended L2 entries, granules of 256 KiB" {
    stress 120 --backing --extended --granularity 262144
}

@test "compressed clusters, one disk" {
    stress 220 --compressed --disks 1
}
