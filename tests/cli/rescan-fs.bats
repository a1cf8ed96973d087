# A disk with a real file system, whose tracking is lost: what a rescan dumps
# restores to a file system in which its own checker finds nothing.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load filesystem

# expect_chain KIND N: the archives up to N.lbz restore to that file system, by
# the oracle too.
expect_chain() {
    local n chain=()
    for n in $(seq 0 "$2"); do
        chain+=("$n.lbz")
    done
    expect_restores "$(content "$2.raw" raw)" "${chain[@]}"
    run_expect 0 lbrestore -q --force -o now.raw "${chain[@]}"
    cmp now.raw "$2.raw"
    "check_$1" now.raw "files$2"
}

# each_rescan KIND
each_rescan() {
    local n
    for n in 0 1 2 3; do
        make_files "files$n" "$n"
        "make_$1" "files$n" "$n.raw"
    done
    qemu-img create -q -f qcow2 disk.qcow2 320M
    run_expect 0 lbctl enable disk.qcow2
    run_expect 0 qemu-img convert -n -f raw -O qcow2 0.raw disk.qcow2
    run_expect 0 lbdump -q -o 0.lbz disk.qcow2
    for n in 1 2; do
        run_expect 0 qemu-img convert -n -f raw -O qcow2 $n.raw disk.qcow2
        # the host went down with the image open
        lbext poke disk.qcow2 --set flags=0 --set device=77 \
            --set boot_id=11111111-1111-4111-8111-111111111111
        run_expect 3 lbdump -q --incremental -o no.lbz disk.qcow2
        run_expect 0 lbdump -q --incremental --rescan -o $n.lbz ./[0-9].lbz \
            disk.qcow2
        good_archives $n.lbz
        good_image disk.qcow2
        expect_chain "$1" $n
    done
    # and the next one goes by the bitmaps
    run_expect 0 qemu-img convert -n -f raw -O qcow2 3.raw disk.qcow2
    run_expect 0 lbdump -q --incremental -o 3.lbz disk.qcow2
    expect_chain "$1" 3
}

@test "ext4" {
    each_rescan ext4
}

@test "xfs" {
    each_rescan xfs
}
