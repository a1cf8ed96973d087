# A writer of checkpoints that is killed at any of its writes and syncs leaves
# the old state or the new one, nothing worse than leaks, and recover mends it.
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
    [ -e "$shim" ] || fail "no $shim: make check builds it"
}

# A disk with content, a bitmap of somebody else, and two checkpoints of ours
# with changes after each. Arguments go to qemu-img create.
make_disk() {
    qemu-img create -q -f qcow2 "$@" base.qcow2 256M
    qemu-io -f qcow2 -c 'write -P 1 0 4M' base.qcow2 >/dev/null
    qemu-img bitmap --add base.qcow2 other
    "$imagectl" enable base.qcow2 12
    "$imagectl" add base.qcow2 $U1 main
    "$imagectl" confirm base.qcow2 0
    qemu-io -f qcow2 -c 'write -P 2 8M 64k' -c 'write -P 2 200M 1M' \
        base.qcow2 >/dev/null
    "$imagectl" add base.qcow2 $U2 main
    qemu-io -f qcow2 -c 'write -P 3 8M 4k' -c 'write -P 3 100M 1M' \
        base.qcow2 >/dev/null
}

# Everything that counts as the state of an image.
state_of() {
    "$imagectl" status "$1"
    qemu-img info -f qcow2 --output=json "$1" |
        jq -cS '."format-specific".data.bitmaps'
    "$imagectl" changes "$1" 0 2>&1 | sed 's/^imagectl: [^:]*: //'
}

# Leaks alone: 3, and no corruption.
expect_no_worse_than_leaks() {
    local status=0
    qemu-img check -f qcow2 "$1" >check.out 2>&1 || status=$?
    case $status in
        0|3) ;;
        *) cat check.out >&2; fail "$2: qemu-img check gives $status" ;;
    esac
}

# each_kill DISK VERB...: kills imagectl VERB at each write and sync.
each_kill() {
    local disk=$1 verb=$2 total n kind old new now
    shift 2
    cp "$disk" new.qcow2
    QLB_FAULT_PATH=new.qcow2 QLB_FAULT_COUNT_FILE=total LD_PRELOAD=$shim \
        ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
        "$imagectl" "$verb" new.qcow2 "$@" >/dev/null
    total=$(cat total)
    [ "$total" -ge 2 ] || fail "$verb: only $total writes and syncs"
    qemu_check new.qcow2
    old=$(state_of "$disk") new=$(state_of new.qcow2)
    [ "$old" != "$new" ] || [ "$verb" = recover ] || fail "$verb does nothing"
    for kind in kill-before torn kill-after; do
        for ((n = 1; n <= total; n++)); do
            cp "$disk" now.qcow2
            local status=0
            QLB_FAULT_PATH=now.qcow2 QLB_FAULT_AT=$n QLB_FAULT_KIND=$kind \
                LD_PRELOAD=$shim \
                ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
                "$imagectl" "$verb" now.qcow2 "$@" >/dev/null || status=$?
            [ "$status" -eq 137 ] ||
                fail "$verb, $kind at $n: status $status, not a kill"
            expect_no_worse_than_leaks now.qcow2 "$verb, $kind at $n"
            now=$(state_of now.qcow2)
            if [ "$now" != "$old" ] && [ "$now" != "$new" ]; then
                printf '%s\n' "old: $old" "new: $new" "now: $now" >&2
                fail "$verb, $kind at $n: neither the old state nor the new"
            fi
            "$imagectl" recover now.qcow2 >/dev/null ||
                fail "$verb, $kind at $n: recover fails"
            qemu_check now.qcow2
        done
    done
}

@test "killed while it enables" {
    qemu-img create -q -f qcow2 base.qcow2 256M
    qemu-img bitmap --add base.qcow2 other
    each_kill base.qcow2 enable
}

@test "killed while it adds the first checkpoint" {
    qemu-img create -q -f qcow2 base.qcow2 256M
    "$imagectl" enable base.qcow2
    each_kill base.qcow2 add $U1 main
}

@test "killed while it adds a checkpoint" {
    make_disk
    each_kill base.qcow2 add $U3 main
}

@test "killed while it adds a checkpoint, clusters of 4 KiB" {
    make_disk -o cluster_size=4k
    each_kill base.qcow2 add $U3 main
}

@test "killed while it confirms" {
    make_disk
    each_kill base.qcow2 confirm 1
}

@test "killed while it folds" {
    make_disk
    each_kill base.qcow2 fold 1
}

@test "killed while it folds, clusters of 4 KiB" {
    make_disk -o cluster_size=4k
    each_kill base.qcow2 fold 1
}

@test "killed while it drops the oldest" {
    make_disk
    each_kill base.qcow2 fold 0
}

@test "killed while it disables" {
    make_disk
    each_kill base.qcow2 disable
}

@test "killed while it recovers from leaks" {
    make_disk
    QLB_FAULT_PATH=base.qcow2 QLB_FAULT_AT=7 QLB_FAULT_KIND=kill-before \
        LD_PRELOAD=$shim ASAN_OPTIONS=verify_asan_link_order=0 \
        "$imagectl" add base.qcow2 $U3 main || true
    run qemu-img check -f qcow2 base.qcow2
    [ "$status" -eq 3 ] || fail "the disk has no leaks to begin with"
    each_kill base.qcow2 recover
}

@test "killed while it drops what is not trusted" {
    make_disk
    qemu-img bitmap --clear base.qcow2 lb-$U1
    each_kill base.qcow2 recover
}

# Clusters of 512 bytes and refcounts of 64 bits: one more block after 64
# clusters, a larger table after 4096. qemu-img counts leaks up to the end of
# the file, so the state is what the guest reads.
@test "killed while refcount blocks are added and the table moves" {
    for count in 30 100 6000; do
        qemu-img create -q -f qcow2 -o cluster_size=512,refcount_bits=64 \
            base.qcow2 1M
        qemu_write base.qcow2 0 9k 7
        cp base.qcow2 new.qcow2
        QLB_FAULT_PATH=new.qcow2 QLB_FAULT_COUNT_FILE=total LD_PRELOAD=$shim \
            ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
            "$imagectl" allocate new.qcow2 $count
        for ((n = 1; n <= $(cat total); n++)); do
            # the blocks of 6000 clusters are alike: not each of them
            [ "$n" -lt 20 ] || [ "$n" -gt $(($(cat total) - 20)) ] || continue
            for kind in kill-before torn kill-after; do
                cp base.qcow2 now.qcow2
                QLB_FAULT_PATH=now.qcow2 QLB_FAULT_AT=$n QLB_FAULT_KIND=$kind \
                    LD_PRELOAD=$shim \
                    ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
                    run_expect signal:KILL "$imagectl" allocate now.qcow2 $count
                expect_no_worse_than_leaks now.qcow2 "$count, $kind at $n"
                "$imagectl" recover now.qcow2 >/dev/null
                qemu_check now.qcow2
                run_expect 0 qemu-io -f qcow2 -c 'read -P 7 0 9k' now.qcow2
                [[ "$output" != *failed* ]] || fail "$output"
            done
        done
    done
}

# Undo is an add and a fold in one run: a third state lies between.
@test "killed while it undoes an add" {
    make_disk
    cp base.qcow2 new.qcow2
    "$imagectl" add new.qcow2 $U3 main
    between=$(state_of new.qcow2)
    cp base.qcow2 new.qcow2
    QLB_FAULT_PATH=new.qcow2 QLB_FAULT_COUNT_FILE=total LD_PRELOAD=$shim \
        ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
        "$imagectl" add-undo new.qcow2 $U3 main
    qemu_check new.qcow2
    old=$(state_of base.qcow2) new=$(state_of new.qcow2)
    for ((n = 1; n <= $(cat total); n++)); do
        cp base.qcow2 now.qcow2
        QLB_FAULT_PATH=now.qcow2 QLB_FAULT_AT=$n QLB_FAULT_KIND=kill-after \
            LD_PRELOAD=$shim \
            ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
            run_expect signal:KILL "$imagectl" add-undo now.qcow2 $U3 main
        expect_no_worse_than_leaks now.qcow2 "undo at $n"
        now=$(state_of now.qcow2)
        [ "$now" = "$old" ] || [ "$now" = "$between" ] || [ "$now" = "$new" ] ||
            fail "undo, kill at $n: $now"
        "$imagectl" recover now.qcow2 >/dev/null
        qemu_check now.qcow2
    done
}

@test "a failing write or sync leaves the old state, or the new one" {
    make_disk
    cp base.qcow2 new.qcow2
    QLB_FAULT_PATH=new.qcow2 QLB_FAULT_COUNT_FILE=total LD_PRELOAD=$shim \
        ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
        "$imagectl" add new.qcow2 $U3 main
    old=$(state_of base.qcow2) new=$(state_of new.qcow2)
    for kind in eio enospc eio-on; do
        for ((n = 1; n <= $(cat total); n++)); do
            cp base.qcow2 now.qcow2
            status=0
            QLB_FAULT_PATH=now.qcow2 QLB_FAULT_AT=$n QLB_FAULT_KIND=$kind \
                LD_PRELOAD=$shim \
                ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
                "$imagectl" add now.qcow2 $U3 main 2>message || status=$?
            expect_no_worse_than_leaks now.qcow2 "$kind at $n"
            now=$(state_of now.qcow2)
            case $status in
                0) [ "$now" = "$new" ] || fail "$kind at $n: not the new" ;;
                1) [ "$now" = "$old" ] || [ "$now" = "$new" ] ||
                       fail "$kind at $n: $now"
                   grep -q 'Input/output error\|No space left' message ||
                       fail "$kind at $n: $(cat message)" ;;
                *) fail "$kind at $n: status $status" ;;
            esac
            "$imagectl" recover now.qcow2 >/dev/null
            qemu_check now.qcow2
        done
    done
}
