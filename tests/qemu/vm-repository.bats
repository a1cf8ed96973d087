# lbvm backup of a machine that runs, whose repository is full, read-only, or goes
# away while it is written to: no half backup is in the list, nothing is left in QEMU,
# and the next backup is incremental, and right.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu
load ../cli/backup
load ../cli/vm
load machine

export LBVM_REPOSITORY=mnt/repo

setup() {
    machine_setup
}

teardown() {
    umount -l keep mnt 2>/dev/null || true
    machine_teardown
}

# machine KIND: with a disk, and a repository of a few MiB that is mounted; it was
# backed up, and has changed since, by more than there is room for.
machine() {
    use "$1"
    new_disks 64M a
    head -c 8M /dev/urandom >noise
    launch qemu -S -m 32 -device virtio-scsi-pci,id=bus \
        -blockdev driver=qcow2,node-name=a,file.driver=file,file.filename="$PWD/a.qcow2" \
        -device scsi-hd,drive=a,id=dev-a,share-rw=on
    truncate -s 64M a.model
    mkdir mnt
    mount -t tmpfs -o size=6M tmpfs mnt
    guest 'write -P 1 1M 2M'
    backup
    guest "write -s $PWD/noise 4M 8M"
    one=$(lbvm list --json web1)
}

guest() {
    local said
    said=$(ask qemu human-monitor-command "$(jq -nc --arg line \
        "qemu-io -d dev-a \"$1\"" '{"command-line": $line}')")
    [ "$said" = '""' ] || fail "$1: $said"
    qemu-io -f raw -c "$1" a.model >/dev/null
}

room() {
    mount -o remount,rw,size=64M mnt
}

# expect_none: no backup came of it.
expect_none() {
    [ "$(lbvm list --json web1)" = "$one" ] || fail "$(lbvm list web1)"
    expect_nothing_left qemu
    guest 'write -P 5 40M 1M'
}

# expect_next: the next backup is incremental, and right; nothing else is there.
expect_next() {
    local chain
    backup
    expect_stderr ''
    [ "$(kinds)" = incremental ]
    expect_nothing_left qemu
    vmrepo check mnt/repo
    mapfile -t chain < <(vmrepo chain mnt/repo web1 \
        "$(lbvm show --json web1 | jq -r .id)" a)
    lbrestore --quiet -o restored.raw "${chain[@]}"
    cmp restored.raw a.model
    [ "$(ls -A mnt/repo/web1/archives | wc -l)" = "$(n_backups)" ]
    [ "$(find mnt -name '*.tmp')" = '' ]
    run_expect 0 lbvm verify
    umount mnt
}

full() {
    machine "$1"
    run_expect 1 lbvm backup web1 --qmp=s/qemu
    expect_stderr_has 'lbvm: mnt/repo/web1/archives/' ': No space left on device'
    expect_none
    vmrepo check mnt/repo
    # and once more
    run_expect 1 lbvm backup web1 --qmp=s/qemu
    expect_none
    vmrepo check mnt/repo
    room
    expect_next
}

read_only() {
    machine "$1"
    room
    mount -o remount,ro mnt
    run_expect 1 lbvm backup web1 --qmp=s/qemu
    expect_stderr_has 'lbvm: mnt/repo/web1' ': Read-only file system'
    expect_none
    room
    expect_next
}

# Who has the files open writes on; but nothing gets its name.
renamed() {
    machine "$1"
    room
    begin_backup
    mv mnt/repo mnt/other
    guest 'write -P 6 5M 1M'
    end_backup 1
    expect_stderr_has 'lbvm: mnt/repo/web1/archives/' ': No such file or directory'
    mv mnt/other mnt/repo
    expect_none
    expect_next
}

unmounted() {
    machine "$1"
    room
    mkdir keep
    mount --bind mnt keep
    begin_backup
    umount -l mnt
    guest 'write -P 6 5M 1M'
    end_backup 1
    expect_stderr_has 'lbvm: mnt/repo/web1/archives/' ': No such file or directory'
    expect_absent mnt/repo
    mount --move keep mnt
    expect_none
    expect_next
}

# Whoever comes second is told so, whatever its repository is.
two_at_once() {
    machine "$1"
    room
    begin_backup
    run_expect 5 lbvm backup web1 --qmp=s/qemu
    [[ "$stderr" == 'lbvm: mnt/repo/web1: '*"a backup or a pruning of it is at work (process $(<lbvm.pid)"* ]] ||
        fail "$stderr"
    LBVM_REPOSITORY=elsewhere run_expect 5 lbvm backup web1 --qmp=s/qemu-2
    case $kind in
        patched) expect_stderr "lbvm: s/qemu-2: livebackup-begin: Node 'a' has a backup running already" ;;
        *) expect_stderr 'lbvm: clearing what a backup has left: another lbvm is backing up this machine; try again when that has ended' ;;
    esac
    end_backup 0
    [ "$(kinds)" = incremental ]
    guest 'write -P 6 5M 1M'
    expect_next
    LBVM_REPOSITORY=elsewhere run_expect 1 lbvm show web1
}

@test "patched QEMU: a repository that is full" {
    with_each full patched
}

@test "stock QEMU: a repository that is full" {
    with_each full stock stock-10
}

@test "patched QEMU: a repository that is read-only" {
    with_each read_only patched
}

@test "stock QEMU: a repository that is read-only" {
    with_each read_only stock stock-10
}

@test "patched QEMU: a repository that is renamed meanwhile" {
    with_each renamed patched
}

@test "stock QEMU: a repository that is renamed meanwhile" {
    with_each renamed stock stock-10
}

@test "patched QEMU: a repository that is unmounted meanwhile" {
    with_each unmounted patched
}

@test "stock QEMU: a repository that is unmounted meanwhile" {
    with_each unmounted stock stock-10
}

@test "patched QEMU: two backups at once, to one repository and to two" {
    with_each two_at_once patched
}

@test "stock QEMU: two backups at once, to one repository and to two" {
    with_each two_at_once stock stock-10
}
