# A disk with a real file system is rolled back in place, also by way of a kill:
# the file system's own checker finds nothing, and its files are those of then.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load in_place
load filesystem

setup() {
    helpers_setup
    shim=$abs_top_builddir/tests/fault/shim.so
    [ -e "$shim" ] || fail "no $shim: make check builds it"
}

# The file system becomes the guest's, as a guest writes it.
put() {
    run_expect 0 qemu-img convert -n -f raw -O qcow2 "$1" disk.qcow2
}

# each_recovery KIND
each_recovery() {
    local n total
    for n in 0 1 2; do
        make_files "files$n" "$n"
        "make_$1" "files$n" "$n.raw"
    done
    qemu-img create -q -f qcow2 disk.qcow2 320M
    run_expect 0 lbctl enable disk.qcow2
    put 0.raw
    run_expect 0 lbdump -q -o 0.lbz disk.qcow2
    put 1.raw
    run_expect 0 lbdump -q --incremental -o 1.lbz disk.qcow2
    put 2.raw
    cp disk.qcow2 after.qcow2
    for n in 1 0; do
        run_expect 0 lbrestore -q --at "$(uuid_of $n.lbz)" \
            --in-place disk.qcow2 0.lbz 1.lbz
        expect_state "$1" "$n"
    done
    # From the image as it was, killed on the way.
    cp after.qcow2 disk.qcow2
    QLB_FAULT_PATH=disk.qcow2 QLB_FAULT_COUNT_FILE=total LD_PRELOAD=$shim \
        ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
        run_expect 0 lbrestore -q --in-place disk.qcow2 0.lbz 1.lbz
    total=$(cat total)
    for n in 5 $((total / 3)) $((total / 2)) $((total - 4)); do
        cp after.qcow2 disk.qcow2
        QLB_FAULT_PATH=disk.qcow2 QLB_FAULT_AT=$n QLB_FAULT_KIND=torn \
            LD_PRELOAD=$shim \
            ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
            run_expect signal:KILL lbrestore -q --in-place disk.qcow2 0.lbz 1.lbz
        run_expect 0 lbrestore -q --in-place disk.qcow2 0.lbz 1.lbz
        expect_state "$1" 1
    done
}

expect_state() {
    run_expect 0 qemu-img convert -f qcow2 -O raw disk.qcow2 now.raw
    cmp now.raw "$2.raw"
    "check_$1" now.raw "files$2"
}

@test "ext4" {
    each_recovery ext4
}

@test "xfs" {
    each_recovery xfs
}
