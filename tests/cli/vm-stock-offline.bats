# lbvm backup of a stopped machine that a stock QEMU ran before: what the bitmaps in
# its images tell counts there, too.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm
load stock

setup() {
    untrusted="livebackup is off; turn it on with 'lbctl enable', and what follows is incremental"
    stock_setup
}

backup() {
    run_expect 0 lbvm backup web1 --qmp=s/qmp "$@"
}

offline() {
    run_expect 0 lbvm backup web1 vda=vda.qcow2 vdb=vdb.qcow2 "$@"
}

# expect_full REASON: of vda; vdb is an incremental.
expect_full() {
    expect_stderr "lbvm: web1: vda: a full backup: $1"
    [ "$(kinds)" = 'full incremental' ]
    expect_disk vda
    expect_disk vdb
}

# The name of the bitmap in vda.
bitmap() {
    qemu-img info --output=json vda.qcow2 |
        jq -r '."format-specific".data.bitmaps[0].name'
}

# stopped: a machine that was backed up, has changed, and was shut down.
stopped() {
    machine
    backup
    guest vda 'write -P 3 7M 1M'
    guest vdb 'write -z 3M 200k'
    stop
}

# A program of the stock QEMU's writes to vda; and to the model of it.
write_stopped() {
    qemu-io -f qcow2 -c "$1" vda.qcow2 >/dev/null
    qemu-io -f raw -c "$1" vda.model >/dev/null
}

@test "the chain of a running machine goes on while it is stopped, and after" {
    stopped
    offline
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
    expect_disk vdb
    # what a stock program changes is tracked
    write_stopped 'write -P 5 30M 64k'
    offline
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
    start
    guest vda 'write -P 6 9M 1M'
    backup
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
    expect_disk vdb
    [ "$(bitmaps | wc -l)" = 2 ]
    stop
    run_expect 0 lbvm prune --keep-last=1
    expect_disk vda
    expect_disk vdb
    qemu_check vda.qcow2
}

@test "nothing is written to the images" {
    stopped
    sha256sum vda.qcow2 vdb.qcow2 >before
    offline
    sha256sum --quiet -c before
}

@test "a QEMU that was killed: in full" {
    machine
    backup
    stop
    # of one image alone: it is open for writing when the kill comes
    qemu-io -f qcow2 -c 'write -P 3 7M 1M' -c 'sigraise 9' vda.qcow2 \
        >/dev/null 2>&1 || true
    qemu-io -f raw -c 'write -P 3 7M 1M' vda.model >/dev/null
    offline
    expect_full "$untrusted"
}

@test "a bitmap that was cleared, removed, or has stopped" {
    stopped
    name=$(bitmap)
    cp vda.qcow2 good.qcow2
    qemu-img bitmap --clear vda.qcow2 "$name"
    offline
    expect_full 'the disk was shrunk since, or its bitmap cleared'
    cp good.qcow2 vda.qcow2
    qemu-img bitmap --disable vda.qcow2 "$name"
    offline
    expect_full "$untrusted"
    cp good.qcow2 vda.qcow2
    qemu-img bitmap --remove vda.qcow2 "$name"
    offline
    expect_full "$untrusted"
}

@test "a disk that has grown: what is new counts; one that was cut: in full" {
    stopped
    qemu-img resize -q vda.qcow2 50M
    truncate -s 50M vda.model
    write_stopped 'write -P 4 45M 1M'
    offline
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
    qemu-img resize -q --shrink vda.qcow2 20M
    qemu-img resize -q vda.qcow2 40M
    truncate -s 20M vda.model
    truncate -s 40M vda.model
    offline
    expect_full 'the disk was shrunk since, or its bitmap cleared'
}

@test "a program that knows nothing of bitmaps: in full" {
    stopped
    # what such a one does: it clears the autoclear bits, then writes
    "$ORACLE_PYTHON" -c 'with open("vda.qcow2", "r+b") as f:
    f.seek(88)
    f.write(bytes(8))'
    offline
    expect_full "$untrusted"
}

@test "livebackup turned on while it is stopped: a full one, then its own" {
    stopped
    run_expect 0 lbctl enable vda.qcow2
    offline
    [ "$(kinds)" = 'full incremental' ]
    expect_disk vda
    write_stopped 'write -P 5 30M 64k'
    offline
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
    # and the running one goes on from its own bitmap
    start
    guest vda 'write -P 6 9M 1M'
    backup
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
}
