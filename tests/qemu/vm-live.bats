# lbvm backup of a machine in the patched QEMU, while it writes.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu
load ../cli/backup
load ../cli/vm
load live

backup() {
    run_expect 0 lbvm backup --qmp=qmp web1 "$@"
}

kinds() {
    lbvm show --json web1 |
        jq -r '[.disks[] | if .parent then "incremental" else "full" end] |
               join(" ")'
}

# expect_newest DISK...: the newest backup restores to what was kept of them.
expect_newest() {
    vmrepo check repo
    rm -rf restored
    run_expect 0 lbvm restore --quiet -o restored web1
    for disk; do
        qemu-img compare -q -f raw -F qcow2 "$disk.raw" "restored/$disk.qcow2"
    done
}

@test "two disks, in full and incrementally, while the guest writes" {
    make_disks
    serve a b,cache.direct=on,file.cache.direct=on
    for n in 1 2 3; do
        guest a "write -P $n 3M 5M" 'write -z 20M 3M'
        keep a
        keep b
        write_meanwhile b &
        backup --rate-limit=30M
        wait
        expect_newest a b
    done
    [ "$(kinds)" = 'incremental incremental' ]
    [ "$(lbctl status --json a.qcow2 |
        jq -r '[.checkpoints[].confirmed] | all')" = true ]
}

@test "related records on two disks: restored, they are of one time" {
    for name in a b; do
        "$QLB_QEMU/qemu-img" create -q -f qcow2 -o livebackup=on $name.qcow2 17M
    done
    serve a b
    pairs=$abs_top_srcdir/tests/qemu/pairs.py
    "$ORACLE_PYTHON" -B "$pairs" write nbd a b 3>&- 4>&- &
    writer=$!
    for n in 1 2 3 4 5 6 7 8; do
        backup -q
    done
    kill -TERM $writer
    wait $writer
    last=0
    for id in $(lbvm list --json web1 | jq -r '.backups[].id'); do
        for disk in a b; do
            lbvm export web1 "$id" --disk=$disk >$disk.raw
        done
        "$ORACLE_PYTHON" -B "$pairs" check a.raw b.raw >found
        read -r first _ <found
        [ "$first" -gt "$last" ] || fail "record $first, before it $last"
        last=$first
    done
    # of two times, they are not
    lbvm export web1 "$(lbvm list --json web1 | jq -r '.backups[0].id')" \
        --disk=b >b.raw
    if "$ORACLE_PYTHON" -B "$pairs" check a.raw b.raw; then
        fail "the check finds nothing"
    fi
}

@test "one disk has lost its trust: in full beside an incremental one" {
    make_disks
    serve a b
    backup
    guest a 'write -P 9 3M 5M'
    kill -KILL "$(<qsd.pid)"
    while kill -0 "$(<qsd.pid)" 2>/dev/null; do sleep 0.02; done
    "${QLB_STOCK_QEMU_10}/qemu-img" bitmap --clear -f qcow2 b.qcow2 \
        "lb-$(lbctl status --json b.qcow2 | jq -r '.checkpoints[0].uuid')"
    rm -f qmp nbd
    serve a b
    keep a
    keep b
    backup
    [ "$(kinds)" = 'incremental full' ]
    expect_stderr_has 'lbvm: web1: b: a full backup: '
    expect_newest a b
}

@test "QEMU and lbvm are killed: the next backup is incremental, and right" {
    make_disks
    serve a b
    backup
    guest a 'write -P 9 3M 5M'
    lbvm backup --qmp=qmp --rate-limit=1M web1 >log 2>&1 3>&- 4>&- &
    lbvm=$!
    until [ -e b.orig.qcow2 ]; do sleep 0.02; done
    guest b 'write -P 9 3M 5M'
    kill -KILL $lbvm "$(<qsd.pid)"
    wait $lbvm || true
    while kill -0 "$(<qsd.pid)" 2>/dev/null; do sleep 0.02; done
    rm -f qmp nbd
    serve a b
    guest a 'write -P 10 30M 1M'
    keep a
    keep b
    backup
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    [ "$(lbvm list --json web1 | jq '.backups | length')" = 2 ]
    expect_newest a b
    [ "$(find repo -name '*.tmp')" = '' ]
}

@test "the chain of a running machine goes on once it is stopped" {
    make_disks
    serve a b
    backup
    guest a 'write -P 9 3M 5M'
    keep a
    keep b
    pid=$(<qsd.pid)
    kill -TERM "$pid"
    while kill -0 "$pid" 2>/dev/null; do sleep 0.02; done
    run_expect 0 lbvm backup web1 a.qcow2 b.qcow2
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    expect_newest a b
}
