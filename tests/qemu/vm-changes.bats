# A machine that changes between backups, and while one runs: it is reset, killed and
# migrated, and disks come and go. The next backup is right, and incremental where
# there is trust; the guest writes all the time, and nothing is left in QEMU.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu
load ../cli/backup
load ../cli/vm
load machine

setup() {
    machine_setup
}

teardown() {
    machine_teardown
}

# The machine runs its firmware, which finds nothing to boot; the monitor writes as a
# guest would, for which the devices share their disks.
start() {
    launch "$1" -m 32 -device virtio-scsi-pci,id=bus \
        -blockdev "$(blockdev a)" -device scsi-hd,drive=a,id=dev-a,share-rw=on \
        -blockdev "$(blockdev b)" -device scsi-hd,drive=b,id=dev-b,share-rw=on \
        "${@:2}"
}

blockdev() {
    jq -nc --arg node "$1" --arg file "$PWD/$1.qcow2" '{driver: "qcow2",
        "node-name": $node, discard: "unmap", file: {driver: "file",
        filename: $file, discard: "unmap"}}'
}

# guest NAME DISK COMMAND...: of qemu-io, and on the model of the disk.
guest() {
    local command said
    for command in "${@:3}"; do
        said=$(ask "$1" human-monitor-command "$(jq -nc --arg line \
            "qemu-io -d dev-$2 \"$command\"" '{"command-line": $line}')")
        [ "$said" = '""' ] || fail "$command: $said"
        qemu-io -f raw -c "$command" "$2.model" >/dev/null
    done
}

# machine KIND: runs; it was backed up once, and has changed since.
machine() {
    use "$1"
    new_disks 40M a b
    truncate -s 40M a.model b.model
    start qemu
    guest qemu a 'write -P 1 0 9M'
    guest qemu b 'write -P 2 1M 9M'
    backup
    guest qemu a 'write -P 3 3M 3M' 'write -z 1M 1M'
    guest qemu b 'write -P 4 2M 4M' 'discard 9M 512k'
}

# then_is NOW...: what the disks are now, as DISK.then.
then_is() {
    local disk
    for disk; do
        cp "$disk.model" "$disk.then"
    done
}

# expect_newest KINDS DISK=FILE...: of the newest backup, in the order of its disks.
# What that said is still in `stderr` afterwards.
expect_newest() {
    local pair chain said=$stderr
    vmrepo check repo
    [ "$(kinds)" = "$1" ] || fail "$(kinds) is not $1:" "$stderr"
    [ "$(lbvm show --json web1 | jq -r '.disks[].name' | sort)" = \
        "$(printf '%s\n' "${@:2}" | cut -d= -f1 | sort)" ]
    for pair in "${@:2}"; do
        mapfile -t chain < <(vmrepo chain repo web1 \
            "$(lbvm show --json web1 | jq -r .id)" "${pair%%=*}")
        run_expect 0 lbrestore --quiet --force -o restored.raw "${chain[@]}"
        cmp restored.raw "${pair#*=}"
    done
    stderr=$said
}

# next_backup KINDS DISK...: after more writes, over the monitor `qemu`.
next_backup() {
    local disk
    for disk in "${@:2}"; do
        guest qemu "$disk" 'write -P 9 12M 300k' 'write -P 8 1M 100k'
    done
    backup
    expect_newest "$1" $(for disk in "${@:2}"; do echo $disk=$disk.model; done)
}

# take_place: the QEMU `new` is `qemu` from now on.
take_place() {
    mv s/new s/qemu
    mv s/new-2 s/qemu-2
    mv new.pid qemu.pid
}

# ------------------------------------------------------------------- what happens

# migrate STATUS: the machine to another QEMU, `new`, which shares the disks.
migrate() {
    start new -incoming "unix:s/migration"
    ask qemu migrate '{uri: "unix:s/migration"}'
    await reached completed failed
    reached "$1" || fail "$(ask qemu query-migrate)"
}

# reached STATUS...: the migration has one of these.
reached() {
    ask qemu query-migrate |
        jq -e --args '.status | IN($ARGS.positional[])' "$@"
} >/dev/null

plug() {
    ask qemu blockdev-add "$(blockdev "$1")" >/dev/null
    ask qemu device_add "{driver: \"scsi-hd\", drive: \"$1\", id: \"dev-$1\",
        \"share-rw\": true}" >/dev/null
}

# plug_drive DISK: with a node that goes with its device.
plug_drive() {
    [ "$(ask qemu human-monitor-command "{\"command-line\": \"drive_add 0 \
if=none,id=$1,format=qcow2,discard=unmap,file=$PWD/$1.qcow2\"}")" = '"OK\r\n"' ]
    ask qemu device_add "{driver: \"scsi-hd\", drive: \"$1\", id: \"dev-$1\",
        \"share-rw\": true}" >/dev/null
}

# unplug DISK: its device; remove DISK: its node.
unplug() {
    ask qemu device_del "{id: \"dev-$1\"}" >/dev/null
}

remove() {
    ask qemu blockdev-del "{\"node-name\": \"$1\"}" >/dev/null
}

# ------------------------------------------------------------------------- claims

reset_() {
    machine "$1"
    ask qemu system_reset >/dev/null
    guest qemu a 'write -P 5 20M 1M'
    then_is a b
    begin_backup
    ask qemu system_reset >/dev/null
    guest qemu a 'write -P 6 2M 4M'
    guest qemu b 'write -P 6 2M 4M'
    end_backup 0
    expect_stderr ''
    expect_newest 'incremental incremental' a=a.then b=b.then
    expect_nothing_left qemu
    next_backup 'incremental incremental' a b
}

migrated() {
    machine "$1"
    migrate completed
    run_expect 5 lbvm backup web1 --qmp=s/qemu
    expect_stderr 'lbvm: s/qemu: the machine was migrated from here, and its disks are in use by another QEMU'
    guest new a 'write -P 5 20M 1M'
    quit_machine qemu
    take_place
    next_backup 'incremental incremental' a b
    expect_stderr ''
    expect_nothing_left qemu
    [ "$(n_backups)" = 2 ]
}

# migrated_meanwhile KIND: the patched QEMU gives the backup up; a stock one the
# migration, and the guest goes on.
migrated_meanwhile() {
    machine "$1"
    then_is a b
    begin_backup
    guest qemu a 'write -P 6 2M 4M'
    if [ "$1" = patched ]; then
        migrate completed
        end_backup 1
        expect_stderr_has 'the backup was broken: it was interrupted'
        expect_nothing_left qemu
        guest new b 'write -P 7 2M 4M'
        quit_machine qemu
        take_place
    else
        migrate failed
        guest qemu b 'write -P 7 2M 4M'
        end_backup 0
        expect_newest 'incremental incremental' a=a.then b=b.then
        kill_machine new || true
    fi
    expect_nothing_left qemu
    next_backup 'incremental incremental' a b
    expect_stderr ''
}

# migrating KIND: no backup is begun until it is decided.
migrating() {
    machine "$1"
    ask qemu migrate-set-capabilities '{capabilities: [{state: true,
        capability: "pause-before-switchover"}]}'
    start new -incoming "unix:s/migration"
    ask qemu migrate '{uri: "unix:s/migration"}'
    await reached pre-switchover
    run_expect 5 lbvm backup web1 --qmp=s/qemu
    expect_stderr 'lbvm: s/qemu: the machine is being migrated; try again when that has ended'
    run_expect 5 lbvm backup web1 --qmp=s/new
    expect_stderr 'lbvm: s/new: the machine is being migrated; try again when that has ended'
    ask qemu migrate_cancel
    await reached cancelled
    expect_nothing_left qemu
    next_backup 'incremental incremental' a b
    expect_stderr ''
}

plugged() {
    machine "$1"
    new_disks 20M c d
    truncate -s 20M c.model d.model
    plug c
    guest qemu c 'write -P 5 2M 4M'
    then_is a b c
    begin_backup
    plug d
    guest qemu c 'write -P 6 2M 4M'
    guest qemu d 'write -P 6 2M 4M'
    end_backup 0
    expect_stderr 'lbvm: web1: c: a full backup: the repository has no backup of this disk yet'
    expect_newest 'incremental incremental full' a=a.then b=b.then c=c.then
    expect_nothing_left qemu
    next_backup 'incremental incremental incremental full' a b c d
    expect_stderr 'lbvm: web1: d: a full backup: the repository has no backup of this disk yet'
    next_backup 'incremental incremental incremental incremental' a b c d
}

unplugged() {
    machine "$1"
    unplug b
    await remove b
    next_backup incremental a
    plug b
    next_backup 'incremental incremental' a b
    expect_stderr ''
    expect_nothing_left qemu
}

# unplugged_meanwhile KIND: the guest lets go of the disk, and the backup goes on.
# What then has the node removed, too: the patched QEMU gives the backup up; a stock
# one refuses it until that has ended.
unplugged_meanwhile() {
    machine "$1"
    then_is a b
    begin_backup
    guest qemu b 'write -P 6 2M 4M'
    unplug b
    guest qemu a 'write -P 6 2M 4M'
    if [ "$1" = patched ]; then
        await remove b
        end_backup 1
        expect_stderr_has 'the backup was broken: '
    else
        run remove b
        [[ "$output" == *"Node 'b' is busy"* ]] || fail "$output"
        end_backup 0
        expect_newest 'incremental incremental' a=a.then b=b.then
        expect_nothing_left qemu
        remove b
    fi
    expect_nothing_left qemu
    next_backup incremental a
    plug b
    next_backup 'incremental incremental' a b
    expect_stderr ''
}

# drive_unplugged_meanwhile KIND: its node goes with the device, and so does what a
# QEMU does with it.
drive_unplugged_meanwhile() {
    machine "$1"
    new_disks 20M c
    truncate -s 20M c.model
    plug_drive c
    guest qemu c 'write -P 5 2M 4M'
    next_backup 'incremental incremental full' a b c
    guest qemu c 'write -P 6 3M 4M'
    then_is a b c
    begin_backup
    guest qemu c 'write -P 7 2M 4M'
    unplug c
    guest qemu a 'write -P 6 2M 4M'
    end_backup 1
    expect_stderr_has 'the backup was broken: '
    expect_nothing_left qemu
    next_backup 'incremental incremental' a b
    plug_drive c
    next_backup 'incremental incremental incremental' a b c
    expect_stderr ''
}

# on_controller KIND: the disks of a controller in an iothread are in that, too.
on_controller() {
    use "$1"
    new_disks 16M a
    launch qemu -S -m 32 -object iothread,id=io \
        -device virtio-scsi-pci,id=bus,iothread=io \
        -blockdev "$(blockdev a)" -device scsi-hd,drive=a,id=dev-a
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/cli/qmpproxy.py" s/proxy s/qemu \
        0 old >/dev/null 2>proxy.err </dev/null 3>&- 4>&- &
    await test -S s/proxy
    run_expect 3 lbvm backup web1 --qmp=s/proxy
    expect_stderr_has 'lbvm: a: it is in an iothread'
    expect_nothing_left qemu
}

@test "stock QEMU: an old one with a controller in an iothread is refused" {
    with_each on_controller stock stock-10
}

@test "patched QEMU: a reset, between backups and in one" {
    with_each reset_ patched
}

@test "stock QEMU: a reset, between backups and in one" {
    with_each reset_ stock stock-10
}

@test "patched QEMU: migrated between backups" {
    with_each migrated patched
}

@test "stock QEMU: migrated between backups" {
    with_each migrated stock stock-10
}

@test "patched QEMU: migrated while a backup runs" {
    with_each migrated_meanwhile patched
}

@test "stock QEMU: migrated while a backup runs" {
    with_each migrated_meanwhile stock stock-10
}

@test "patched QEMU: no backup is begun while it is migrated" {
    with_each migrating patched
}

@test "stock QEMU: no backup is begun while it is migrated" {
    with_each migrating stock stock-10
}

@test "patched QEMU: disks are plugged in, between backups and in one" {
    with_each plugged patched
}

@test "stock QEMU: disks are plugged in, between backups and in one" {
    with_each plugged stock stock-10
}

@test "patched QEMU: a disk is unplugged, and comes back" {
    with_each unplugged patched
}

@test "stock QEMU: a disk is unplugged, and comes back" {
    with_each unplugged stock stock-10
}

@test "patched QEMU: a disk is unplugged while a backup runs" {
    with_each unplugged_meanwhile patched
}

@test "stock QEMU: a disk is unplugged while a backup runs" {
    with_each unplugged_meanwhile stock stock-10
}

@test "patched QEMU: a drive is unplugged while a backup runs" {
    with_each drive_unplugged_meanwhile patched
}

@test "stock QEMU: a drive is unplugged while a backup runs" {
    with_each drive_unplugged_meanwhile stock stock-10
}
