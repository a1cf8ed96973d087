# A host that loses power keeps what was synced, and of what was written since
# any pages in any order: still the old state or the new one, leaks at worst.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load ../cli/helpers

U1=11111111-1111-4111-8111-111111111111
U2=22222222-2222-4222-8222-222222222222
U3=33333333-3333-4333-8333-333333333333

setup() {
    helpers_setup
    imagectl=$abs_top_builddir/tests/unit/imagectl
    shim=$abs_top_builddir/tests/fault/shim.so
    replay=$abs_top_srcdir/tests/fault/replay.py
}

make_disk() {
    qemu-img create -q -f qcow2 "$@" base.qcow2 64M
    qemu-img bitmap --add base.qcow2 other
    "$imagectl" enable base.qcow2 12
    "$imagectl" add base.qcow2 $U1 main
    qemu_write base.qcow2 8M 64k
    "$imagectl" add base.qcow2 $U2 main
    qemu_write base.qcow2 30M 64k
}

# each_loss VERB...
each_loss() {
    local verb=$1 image old new now number
    shift
    cp base.qcow2 new.qcow2
    rm -rf log lost
    mkdir lost
    QLB_FAULT_PATH=new.qcow2 QLB_FAULT_LOG_FILE=$PWD/log LD_PRELOAD=$shim \
        ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
        "$imagectl" "$verb" new.qcow2 "$@" >/dev/null
    number=$("$ORACLE_PYTHON" -B "$replay" log base.qcow2 lost)
    [ "$number" -gt 5 ] || fail "$verb: only $number images"
    old=$("$imagectl" status base.qcow2) new=$("$imagectl" status new.qcow2)
    for image in lost/*.qcow2; do
        local status=0
        qemu-img check -f qcow2 "$image" >check.out 2>&1 || status=$?
        case $status in
            0|3) ;;
            *) fail "$verb, $image: $(cat check.out)" ;;
        esac
        now=$("$imagectl" status "$image")
        [ "$now" = "$old" ] || [ "$now" = "$new" ] ||
            fail "$verb, $image: $now"
        "$imagectl" recover "$image" >/dev/null
        qemu_check "$image"
    done
}

@test "power lost while it adds a checkpoint" {
    make_disk
    each_loss add $U3 main
}

@test "power lost while it adds, clusters of 4 KiB, refcounts of 64 bits" {
    make_disk -o cluster_size=4k,refcount_bits=64
    each_loss add $U3 main
}

@test "power lost while it folds, confirms, disables" {
    make_disk -o cluster_size=4k
    each_loss fold 1
    each_loss fold 0
    each_loss confirm 1
    each_loss disable
}
