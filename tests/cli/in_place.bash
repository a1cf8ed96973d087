# What the tests of a rollback in place share; `load` it behind helpers.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

# uuid_of ARCHIVE
uuid_of() {
    lbverify --json "$1" | jq -r ".archives[0].uuid"
}

# guest DISK COMMAND...: a stock QEMU writes.
guest() {
    local disk=$1 command
    shift
    run_command=(qemu-io -d unmap -f qcow2)
    for command; do
        run_command+=(-c "$command")
    done
    run_command+=("$disk")
    run --separate-stderr "${run_command[@]}" </dev/null
    if [ "$status" -ne 0 ] || [[ "$output$stderr" == *[Ee]rror* ]] ||
       [[ "$output" == *failed* ]]; then
        show_run
        fail "qemu-io could not write to $disk"
    fi
}

# unmark IMAGE COPY: without the mark of an unfinished rollback, so that a stock
# QEMU looks at it.
unmark() {
    cp "$1" "$2"
    printf '\0' | dd of="$2" bs=1 seek=72 conv=notrunc status=none
}

# expect_unfinished IMAGE: nobody takes it for good.
expect_unfinished() {
    local refusal="$1: a rollback was not finished, its content is of no point \
in time; run lbrestore --in-place again, or replace it with: lbrestore --force \
-o $1"
    local tool
    for tool in "lbctl status" "lbctl recover" "lbdump -o refused.lbz" \
                "lbctl disable"; do
        # shellcheck disable=SC2086
        run_expect 3 $tool "$1"
        expect_stderr "${tool%% *}: $refusal"
    done
    expect_absent refused.lbz
    run_expect 1 qemu-img convert -f qcow2 -O raw "$1" refused.raw
    expect_stderr_has \
        "feature(s): unfinished rollback: lbrestore --in-place"
    run_expect 1 qemu-img check -r all -f qcow2 "$1"
    expect_stderr_has \
        "feature(s): unfinished rollback: lbrestore --in-place"
}

# expect_content IMAGE [--at UUID] ARCHIVE...: byte for byte what the independent
# implementation restores from the archives, and no more.
expect_content() {
    local image=$1
    shift
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/oracle/lbz.py" restore \
        -o expected.raw "$@" >/dev/null || fail "the oracle restores nothing"
    run_expect 0 qemu-img convert -f qcow2 -O raw "$image" found.raw
    cmp expected.raw found.raw || fail "$image is not what $* hold"
    rm expected.raw found.raw
}

# expect_follows IMAGE ARCHIVE...: the next incremental is a true one on top of
# these, and small.
expect_follows() {
    local image=$1
    shift
    cp "$image" follows.qcow2
    guest follows.qcow2 'write -P 77 128k 4k'
    run_expect 0 lbdump -q --json --incremental -o follows.lbz follows.qcow2
    local at
    at=$(jq -r .uuid <<<"$output")
    [ "$(jq .data_bytes <<<"$output")" -le 4194304 ] || fail "$output"
    expect_content follows.qcow2 --at "$at" "$@" follows.lbz
    rm follows.lbz follows.qcow2
}
