# A rollback in place that is killed, or whose writes fail, at any of its writes:
# the old disk, one that nobody takes for good, or the new one; and running it
# again ends it.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load fault
load ../cli/in_place

setup() {
    helpers_setup
    shim=$abs_top_builddir/tests/fault/shim.so
    [ -e "$shim" ] || fail "no $shim: make check builds it"
}

# A disk with two archives, changes since, and all that makes work: clusters
# that a snapshot shares, compressed ones, zeroes and holes.
make_disk() {
    qemu-img create -q -f qcow2 "$@" base.qcow2 24M
    lbctl enable base.qcow2
    guest base.qcow2 'write -P 1 0 3M' 'write -P 2 8M 128k' \
        "write -c -P 3 10M ${packed:-64k}"
    lbdump -q -o full.lbz base.qcow2
    guest base.qcow2 'write -P 4 64k 128k' 'discard 8M 64k'
    lbdump -q --incremental -o incr.lbz base.qcow2
    guest base.qcow2 'write -P 5 0 70k' "write -c -P 6 5M ${packed:-64k}" \
        'write -P 7 10M 4k' 'write -P 8 8M 64k'
    qemu-img snapshot -c kept base.qcow2
    guest base.qcow2 'write -P 9 1M 64k' 'write -z 128k 64k' \
        'write -P 10 16M 64k'
    chain=(full.lbz incr.lbz)
}

# attempt ARGUMENTS...: a rollback of now.qcow2 under the shim.
attempt() {
    status=0
    (
        env QLB_FAULT_PATH=now.qcow2 "$@" LD_PRELOAD="$shim" \
            ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
            lbrestore -q --threads=1 "${options[@]}" --in-place now.qcow2 \
            "${chain[@]}" >out 2>message </dev/null || exit $?
    ) 2>/dev/null || status=$?
}

# What the snapshot holds, as kept.raw.
read_snapshot() {
    cp "$1" kept.qcow2
    lbctl disable kept.qcow2
    qemu-img snapshot -a kept kept.qcow2
    qemu-img convert -f qcow2 -O raw kept.qcow2 kept.raw
}

# The snapshot is left alone.
expect_snapshot() {
    read_snapshot "$1"
    cmp kept-before.raw kept.raw || fail "the snapshot of $1 has changed"
}

# No error in the metadata, and leaks at the worst.
expect_no_worse_than_leaks() {
    local found=0
    qemu-img check -f qcow2 "$1" >check.out 2>&1 || found=$?
    case $found in
        0|3) ;;
        *) cat check.out >&2; fail "$2: qemu-img check gives $found" ;;
    esac
}

is_marked() {
    [ "$(od -An -tx1 -j72 -N1 "$1")" = " 40" ]
}

# judge WHAT: now.qcow2 is old, unfinished or new; ended, it is new.
judge() {
    if is_marked now.qcow2; then
        # Eight programs; that the mark is there is seen each time.
        ((seen_unfinished % 8)) || expect_unfinished now.qcow2
        unmark now.qcow2 looked.qcow2
        expect_no_worse_than_leaks looked.qcow2 "$1"
        expect_snapshot looked.qcow2
        seen_unfinished=$((seen_unfinished + 1))
    else
        expect_no_worse_than_leaks now.qcow2 "$1"
        qemu-img convert -f qcow2 -O raw now.qcow2 now.raw
        cmp -s now.raw old.raw || cmp -s now.raw new.raw ||
            fail "$1: neither the old disk nor the new one"
    fi
    run_expect 0 lbrestore -q "${options[@]}" --in-place now.qcow2 "${chain[@]}"
    qemu-img convert -f qcow2 -O raw now.qcow2 now.raw
    cmp now.raw new.raw || fail "$1: run again, it is not the new disk"
    # What was leaked before the mark was set, or behind it.
    run_expect 0 lbctl recover now.qcow2
    qemu_check now.qcow2
    expect_snapshot now.qcow2
    expect_trusted now.qcow2
}

# expect_trusted IMAGE: nothing has changed since the archive.
expect_trusted() {
    run_expect 0 lbctl status --json "$1"
    [ "$(jq -r '.checkpoints[-1] |
                "\(.uuid) \(.confirmed) \(.trusted) \(.changed_bytes)"' \
            <<<"$output")" = "$(uuid_of "${chain[-1]}") true true $canaries" ] ||
        fail "$output"
}

prepare() {
    seen_unfinished=0
    canaries=131072
    qemu-img convert -f qcow2 -O raw base.qcow2 old.raw
    read_snapshot base.qcow2
    mv kept.raw kept-before.raw
    lbrestore -q -o new.raw "${chain[@]}"
    cp base.qcow2 now.qcow2
    attempt QLB_FAULT_COUNT_FILE=total
    [ "$status" -eq 0 ] || fail "$(cat message)"
    total=$(cat total)
    [ "$total" -ge 12 ] || fail "only $total writes and syncs"
    qemu_check now.qcow2
    expect_content now.qcow2 "${chain[@]}"
    expect_trusted now.qcow2
    expect_follows now.qcow2 "${chain[@]}"
}

kill_at() {
    cp base.qcow2 now.qcow2
    attempt QLB_FAULT_AT="$2" QLB_FAULT_KIND="$1"
    [ "$status" -eq 137 ] || fail "$1 at $2: status $status"
    judge "$1 at $2"
}

# Behind a write is before the next one.
each_kill() {
    local n
    prepare
    for ((n = 1; n <= total; n++)); do
        kill_at kill-before "$n"
        ((n % 2)) || kill_at torn "$n"
    done
    kill_at kill-after "$total"
    [ "$seen_unfinished" -ge $((total / 2)) ] ||
        fail "seen unfinished but $seen_unfinished times"
    expect_follows now.qcow2 "${chain[@]}"
}

@test "killed while it rolls back by the bitmaps" {
    make_disk
    options=()
    each_kill
}

@test "killed while it rolls back by the digests" {
    make_disk -o cluster_size=4k
    options=(--rescan)
    each_kill
}

@test "killed while it rolls back extended L2 entries" {
    packed=128k
    make_disk -o extended_l2=on,cluster_size=128k
    options=()
    each_kill
}

@test "killed while the disk gets its old size" {
    make_disk
    options=()
    qemu-img snapshot -d kept base.qcow2
    qemu-img resize -q -f qcow2 base.qcow2 900M
    guest base.qcow2 'write -P 11 800M 128k' 'write -P 12 23M 2M'
    qemu-img snapshot -c kept base.qcow2
    each_kill
}

@test "a failing write or sync leaves it unfinished, or the old disk" {
    make_disk
    options=()
    prepare
    for kind in eio enospc enospc-on; do
        for ((n = 1; n <= total; n++)); do
            cp base.qcow2 now.qcow2
            attempt QLB_FAULT_AT=$n QLB_FAULT_KIND=$kind
            case $status in
                0) cp new.raw old-or-new.raw ;;
                1) grep -q 'Input/output error\|No space left' message ||
                       fail "$kind at $n: $(cat message)"
                   ! is_marked now.qcow2 || grep -qx "lbrestore: now.qcow2: the \
rollback is not finished; run it again" message ||
                       fail "$kind at $n: $(cat message)" ;;
                *) fail "$kind at $n: status $status" ;;
            esac
            judge "$kind at $n"
        done
    done
}

@test "another point can be chosen after a kill" {
    make_disk
    options=()
    prepare
    target=$(uuid_of full.lbz)
    lbrestore -q -o full.raw full.lbz
    for ((n = 1; n <= total; n += 3)); do
        cp base.qcow2 now.qcow2
        attempt QLB_FAULT_AT=$n QLB_FAULT_KIND=kill-after
        run_expect 0 lbrestore -q --at "$target" --in-place now.qcow2 \
            "${chain[@]}"
        qemu-img convert -f qcow2 -O raw now.qcow2 now.raw
        cmp now.raw full.raw || fail "killed at $n: not the full archive's disk"
        run_expect 0 lbctl recover now.qcow2
        qemu_check now.qcow2
    done
}

# What was synced is there, and of what was written since any pages.
@test "power lost while it rolls back" {
    make_disk
    options=()
    prepare
    cp base.qcow2 now.qcow2
    attempt QLB_FAULT_LOG_FILE="$PWD/log"
    [ "$status" -eq 0 ] || fail "$(cat message)"
    mkdir lost
    number=$("$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/fault/replay.py" log \
        base.qcow2 lost)
    [ "$number" -gt 40 ] || fail "only $number images"
    # One in three: many are alike.
    for ((n = 0; n < number; n += 3)); do
        cp "lost/$n.qcow2" now.qcow2
        judge "power loss, image $n"
    done
    [ "$seen_unfinished" -gt 10 ] || fail "$seen_unfinished"
}
