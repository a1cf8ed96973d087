# lbvm backup --nbd of the patched QEMU, which then goes the way of a stock one.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu
load ../cli/backup
load ../cli/vm
load ../cli/tls
load machine

setup() {
    machine_setup
}

teardown() {
    machine_teardown
}

# machine KIND: it runs its firmware; the monitor writes as a guest would.
machine() {
    use "$1"
    new_disks 40M a
    truncate -s 40M a.model
    mkdir -m 700 keys scratch
    quiet psktool -u alice -p keys/keys.psk
    port=$(free_port)
    launch qemu -m 32 -device virtio-scsi-pci,id=bus \
        -blockdev "driver=qcow2,node-name=a,file.driver=file,file.filename=$PWD/a.qcow2" \
        -device scsi-hd,drive=a,id=dev-a,share-rw=on \
        -object "tls-creds-psk,id=tls,endpoint=server,dir=$PWD/keys"
    guest 'write -P 1 0 9M'
}

# guest COMMAND: of qemu-io, and on the model of the disk.
guest() {
    [ "$(ask qemu human-monitor-command "$(jq -nc --arg line \
        "qemu-io -d dev-a \"$1\"" '{"command-line": $line}')")" = '""' ]
    qemu-io -f raw -c "$1" a.model >/dev/null
}

far_backup() {
    backup "--nbd=127.0.0.1:$port" --tls-creds=tls --tls-username=alice \
        --tls-psk-file=keys/keys.psk --scratch="$PWD/scratch"
}

# expect_newest KIND: of the newest backup, which restores to the model.
expect_newest() {
    local chain
    vmrepo check repo
    [ "$(kinds)" = "$1" ] || fail "$(kinds) is not $1:" "$stderr"
    mapfile -t chain < <(vmrepo chain repo web1 \
        "$(lbvm show --json web1 | jq -r .id)" a)
    run_expect 0 lbrestore --quiet --force -o restored.raw "${chain[@]}"
    cmp restored.raw a.model
}

# Each way goes on from its own last one: the image has the checkpoints of both.
both_ways() {
    machine "$1"
    backup
    expect_newest full
    far_backup
    expect_newest full
    for n in 1 2; do
        guest "write -P 2$n ${n}M 1M"
        backup
        expect_newest incremental
        guest "write -P 3$n 1${n}M 1M"
        far_backup
        expect_newest incremental
        expect_stderr ''
    done
    quit_machine qemu
    [ "$(lbctl status --json a.qcow2 | jq -r .trusted)" = true ]
    "$QLB_QEMU/qemu-img" check -q a.qcow2
}

@test "from this host and from another, one after the other" {
    with_each both_ways patched
}
