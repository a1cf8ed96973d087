# lbvm backup of a machine in a stock QEMU, that of the distribution: dirty bitmaps,
# fleecing, NBD.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm
load stock

setup() {
    stock_setup
}

backup() {
    run_expect 0 lbvm backup web1 --qmp=s/qmp "$@"
}

@test "in full, then what has changed; one bitmap stays for each disk" {
    machine
    expect_incrementals expect_nothing_left
}

@test "the point in time is exact while the guest writes" {
    machine
    expect_exact_point expect_nothing_left
}

@test "the chain goes on over restarts of the guest" {
    machine
    backup
    guest vda 'write -P 3 7M 1M'
    stop
    start
    guest vda 'write -P 4 9M 1M'
    backup
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
    stop
}

@test "a stopped machine is one in full, and the chain goes on after it" {
    machine
    backup
    stop
    run_expect 0 lbvm backup web1 vda.qcow2 vdb.qcow2
    start
    guest vda 'write -P 4 9M 1M'
    backup
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
}

@test "two repositories have bitmaps of their own" {
    machine
    backup
    LBVM_REPOSITORY=weekly run_expect 0 lbvm backup web1 --qmp=s/qmp
    for i in 1 2; do
        guest vda "write -P 4 ${i}M 1M"
        backup
        [ "$(kinds)" = 'incremental incremental' ]
    done
    LBVM_REPOSITORY=weekly run_expect 0 lbvm backup web1 --qmp=s/qmp
    expect_stderr ''
    [ "$(bitmaps | wc -l)" = 4 ]
    expect_disk vda
}

@test "a bitmap that is gone: in full, with the reason" {
    machine
    backup
    monitor "$(jq -nc --arg name "$(bitmaps | head -n 1)" '{execute:
        "block-dirty-bitmap-remove", arguments: {node: "vdb", name: $name}}')" \
        "$(jq -nc --arg name "$(bitmaps | tail -n 1)" '{execute:
        "block-dirty-bitmap-remove", arguments: {node: "vdb", name: $name}}')" \
        >removed
    backup
    expect_stderr 'lbvm: web1: vdb: a full backup: the image has no checkpoint of a backup in the repository that can be trusted'
    [ "$(kinds)" = 'incremental full' ]
    expect_disk vdb
}

@test "QEMU is killed meanwhile: no backup, and the next is in full" {
    machine
    backup
    begin_backup --full --qmp=s/qmp --rate-limit=1M
    kill -KILL "$(<pid)"
    status=0
    wait $lbvm || status=$?
    [ $status = 1 ] || fail "$(cat log)"
    [ "$(lbvm list --json web1 | jq '.backups | length')" = 1 ]
    rm pid
    # what QEMU had not written yet is lost
    for disk in vda vdb; do
        qemu-img convert -f qcow2 -O raw $disk.qcow2 $disk.then
    done
    start
    backup
    [ "$(kinds)" = 'full full' ]
    expect_disk vda vda.then
    expect_disk vdb vdb.then
    [ "$(find . -name '.lbvm*')" = '' ]
}

@test "lbvm is killed meanwhile: the next one clears what is left" {
    machine
    backup
    guest vda 'write -P 3 2M 4M'
    begin_backup --full --qmp=s/qmp --rate-limit=1M
    LBVM_REPOSITORY=other run_expect 5 lbvm backup web1 --qmp=s/second
    expect_stderr 'lbvm: clearing what a backup has left: another lbvm is backing up this machine; try again when that has ended'
    kill -KILL $lbvm
    wait $lbvm || true
    backup
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
    expect_nothing_left
}

@test "an NBD server of somebody else is left alone" {
    machine
    monitor '{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "s/nbd"}}}}' >/dev/null
    run_expect 5 lbvm backup web1 --qmp=s/qmp
    expect_stderr "lbvm: QEMU's NBD server is used by somebody else, as by a migration; try again when that has ended"
    [ -S s/nbd ]
    monitor '{"execute": "nbd-server-stop"}' >/dev/null
    expect_nothing_left
    backup
    expect_disk vda
}

@test "no room for the archives: no backup, and nothing is left" {
    machine
    backup
    guest vda 'write -P 3 2M 4M'
    head -c 300000 /dev/urandom >noise
    guest vda "write -s $PWD/noise 4M 300000"
    run_expect 1 bash -c 'ulimit -f 16; exec lbvm backup web1 --qmp=s/qmp'
    expect_nothing_left
    [ "$(lbvm list --json web1 | jq '.backups | length')" = 1 ]
    backup
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
}

@test "a disk in an iothread of an old QEMU: refused, before anything is begun" {
    thread=,iothread=io
    machine
    backup --disk=vda
    through 0 old
    [ $status = 3 ]
    [ "$(<through.err)" = 'lbvm: vdb: it is in an iothread, and a QEMU older than 9.0 may crash when such a disk was read; take it out of the iothread, or name the other disks with --disk' ]
    expect_nothing_left
    [ "$(bitmaps | wc -l)" = 1 ]
    through 0 old --disk=vda
    [ $status = 0 ] || fail "$(cat through.err)"
    expect_disk vda
}

@test "only the disks that are asked for" {
    machine
    backup --disk=vdb
    [ "$(lbvm show --json web1 | jq -r '[.disks[].name] | join(" ")')" = vdb ]
    run_expect 1 lbvm backup web1 --qmp=s/qmp --disk=nobody
    expect_stderr 'lbvm: nobody: QEMU has no such disk'
    run_expect 2 lbvm backup --durable web1 --qmp=s/qmp
    expect_stderr_has '--durable wants a QEMU with livebackup'
}

@test "QEMU refuses a command, whichever: nothing is left" {
    machine
    backup
    every 1 1 refuse '0 1 5' nothing_left_now
    expect_disk vda
}

@test "lbvm is told to stop at any command: nothing is left" {
    machine
    backup
    every 1 2 term '0 1' nothing_left_now
    expect_disk vda
}

@test "lbvm is killed at any command: the next one clears what is left" {
    machine
    backup
    every 1 2 kill '137' nothing_left_after_next
    expect_disk vda
}

@test "the connection is lost at any command: the next one clears what is left" {
    machine
    backup
    every 2 3 unanswered '0 1' nothing_left_after_next
    expect_disk vda
}

@test "lbvm and QEMU are killed: the scratch folder goes with the next backup" {
    machine
    backup
    guest vda 'write -P 3 2M 4M'
    begin_backup --full --qmp=s/qmp --rate-limit=1M
    kill -KILL $lbvm "$(<pid)"
    wait $lbvm || true
    rm pid
    start
    backup
    expect_nothing_left
    [ "$(bitmaps | wc -l)" = 2 ]
}

resize() {
    [ "$(monitor "{\"execute\": \"block_resize\", \"arguments\": {\"node-name\": \"$1\", \"size\": $(($2 << 20))}}" |
        tail -n 1)" = '{"return": {}}' ]
    truncate -s "$2M" vdb.model
}

@test "a disk that was shrunk and has grown again: in full, with the reason" {
    machine
    guest vdb 'write -P 7 30M 2M'
    backup
    resize vdb 20
    resize vdb 40
    backup
    expect_stderr 'lbvm: web1: vdb: a full backup: the disk was shrunk since, or its bitmap cleared'
    [ "$(kinds)" = 'incremental full' ]
    expect_disk vdb
    backup
    [ "$(kinds)" = 'incremental incremental' ]
    resize vdb 60
    backup
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vdb
    resize vdb 30
    backup
    [ "$(kinds)" = 'incremental full' ]
    expect_disk vdb
}

@test "a bitmap that was cleared: in full, with the reason" {
    machine
    backup
    guest vdb 'write -P 7 30M 2M'
    name=$(monitor '{"execute": "query-named-block-nodes"}' | tail -n 1 |
        jq -r '.return[] | select(."node-name" == "vdb") | ."dirty-bitmaps"[].name')
    monitor "{\"execute\": \"block-dirty-bitmap-clear\", \"arguments\": {\"node\": \"vdb\", \"name\": \"$name\"}}" >/dev/null
    backup
    expect_stderr 'lbvm: web1: vdb: a full backup: the disk was shrunk since, or its bitmap cleared'
    [ "$(kinds)" = 'incremental full' ]
    expect_disk vdb
}
