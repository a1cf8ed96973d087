# lbvm backs up a guest whose application keeps related records on two disks. What
# is restored shows whether all was of one point in time: the first disk has as many
# records as the second one, or one more, and all that were there before.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load ../qemu/qemu
load ../cli/backup
load ../cli/vm
load ../qemu/machine

: "${QLB_GUEST:=$abs_top_builddir/guest}"

setup_file() {
    bash "$abs_top_srcdir/tests/guest/prepare.sh" "$QLB_GUEST"
}

setup() {
    machine_setup
}

make_initrd() {
    "$ORACLE_PYTHON" -B - "$abs_top_srcdir/tests/guest" "$QLB_GUEST/initrd" \
        "$abs_top_builddir/tests/guest/recorder" >initrd <<'END'
import sys

sys.path.insert(0, sys.argv[1])
from initrd import PROGRAM, archive

with open(sys.argv[2], "rb") as modules, open(sys.argv[3], "rb") as program:
    sys.stdout.buffer.write(modules.read()
                            + archive([("init", PROGRAM, program.read())]))
END
}

teardown() {
    machine_teardown
}

is_old() {
    case $("$qemu" --version) in
        *' version '[78].*) ;;
        *) return 1 ;;
    esac
}

# start: the guest; its log goes on where it was. An old QEMU can't export disks of
# an iothread, so it is in none, unless `thread` says so.
start() {
    is_old || thread=,iothread=io
    make_initrd
    launch qemu -m 128 -kernel "$QLB_GUEST/vmlinuz" -initrd initrd \
        -append 'console=ttyS0 panic=-1 quiet' -serial file:console.log \
        -chardev file,id=log,path=guest.log,append=on -serial chardev:log \
        -object iothread,id=io \
        -blockdev driver=qcow2,node-name=a,file.driver=file,file.filename="$PWD/a.qcow2" \
        -device virtio-blk-pci,drive=a \
        -blockdev driver=qcow2,node-name=b,file.driver=file,file.filename="$PWD/b.qcow2" \
        -device virtio-blk-pci,drive=b${thread:-}
    await grown 0
}

# told: the last record that the guest says both disks have. The log's last line
# may be the beginning of a number.
told() {
    sed '$d' guest.log | tr -d '\r' | grep -x '[0-9]*' | tail -n 1
}

# grown N: it has written more than N. begins N: it has started N times.
grown() {
    [ "$(told)" -gt "$1" ]
}

begins() {
    [ "$(grep -c '^begin' guest.log)" -eq "$1" ]
}

goes_on() {
    ! grep '^failed' guest.log || fail "the guest fails"
    await grown $(($(told) + 100))
}

# before, after: around a backup. In `limits` is what its records must lie in.
before() {
    goes_on
    told >low
}

after() {
    local low high
    goes_on
    low=$(<low) high=$(told)
    echo "$(lbvm show --json web1 | jq -r .id) $low $high" >>limits
    expect_nothing_left qemu
}

# one_backup KINDS [OPTION]...
one_backup() {
    before
    backup --rate-limit=30M "${@:2}"
    after
    [ "$(kinds)" = "$1" ] || fail "$(kinds) is not $1:" "$stderr"
}

# expect_pairs: each backup restores to disks of one time, that of the backup.
expect_pairs() {
    local id low high first second disk
    vmrepo check repo
    [ "$(cut -d' ' -f1 limits)" = "$(lbvm list --json web1 |
        jq -r '.backups[].id')" ]
    while read -r id low high; do
        for disk in a b; do
            lbvm export web1 "$id" --disk=$disk >$disk.raw
        done
        pairs a.raw b.raw >found || fail "$id"
        read -r first second <found
        [ "$second" -ge "$low" ] || fail "$id: $second, but $low was written"
        [ "$first" -lt "$high" ] || fail "$id: $first, but $high came later"
    done <limits
}

pairs() {
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/qemu/pairs.py" check "$@"
}

# series KIND: of backups while the guest goes on.
series() {
    use "$1"
    new_disks 17M a b
    start
    one_backup 'full full'
    one_backup 'incremental incremental'
    one_backup 'incremental incremental'
    one_backup 'full full' --full
    one_backup 'incremental incremental'
    expect_pairs
    # of two times they are not
    lbvm export web1 "$(head -n 1 limits | cut -d' ' -f1)" --disk=b >b.raw
    if pairs a.raw b.raw; then
        fail "the check finds nothing"
    fi
}

# accidents KIND: resets and kills, between backups and while one runs.
accidents() {
    local again=full
    [ "$1" != patched ] || again=incremental
    use "$1"
    new_disks 17M a b
    start
    one_backup 'full full'
    ask qemu system_reset
    await begins 2
    one_backup 'incremental incremental'
    before
    begin_backup
    ask qemu system_reset
    await begins 3
    end_backup 0
    after
    [ "$(kinds)" = 'incremental incremental' ]
    kill_machine qemu
    start
    one_backup "$again $again"
    before
    begin_backup
    goes_on
    kill_machine qemu
    end_backup 1
    [ "$(n_backups)" = 4 ]
    start
    one_backup "$again $again"
    one_backup 'incremental incremental'
    expect_pairs
}

# in_iothread KIND: it is backed up, or else the guest goes on.
in_iothread() {
    use "$1"
    new_disks 17M a b
    thread=,iothread=io
    start
    before
    if is_old; then
        run_expect 3 lbvm backup web1 --qmp=s/qemu
        expect_stderr_has 'lbvm: b: it is in an iothread'
        backup --disk=a
    else
        backup
    fi
    after
}

@test "patched QEMU: related records on two disks are of one time" {
    with_each series patched
}

@test "stock QEMU: related records on two disks are of one time" {
    with_each series stock
}

@test "stock QEMU 10: related records on two disks are of one time" {
    QLB_NIGHTLY=1 with_each series stock-10
}

@test "stock QEMU: a disk in an iothread is backed up, or else the guest goes on" {
    with_each in_iothread stock
}

@test "patched QEMU: also where the guest is reset, and QEMU killed" {
    with_each accidents patched
}

@test "stock QEMU: also where the guest is reset, and QEMU killed" {
    with_each accidents stock stock-10
}
