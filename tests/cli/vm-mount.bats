# lbvm mount and umount: the disks of a backup as files.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm
load mounts

# Three backups of two disks, an hour apart.
three_backups() {
    synth '1790000000:-,- 1790003600:0,0 1790007200:1,1'
}

# expect_shown NUMBER DISK: m/DISK.img is what that backup has, by the oracle.
expect_shown() {
    [ "$(stat -c %s "m/$2.img") $(sha256sum <"m/$2.img" | cut -d' ' -f1)" = \
        "$(awk -v id="${ids[$1]}" -v disk="$2" \
            '$1 == id && $2 == disk { print $3, $4 }' content)" ] ||
        fail "m/$2.img is not disk $2 of ${ids[$1]}"
}

expect_gone() {
    run_expect 0 lbvm umount "${1:-m}"
    expect_stderr ''
    [ "$(ls -A m)" = '' ]
    expect_nothing_runs
}

@test "every backup, byte for byte, until umount" {
    local n
    three_backups
    for n in 0 1 2; do
        expect_unchanged run_expect 0 lbvm mount -o m web1 "${ids[n]}"
        expect_output 'm/vda.img
m/vdb.img'
        expect_shown $n vda
        expect_shown $n vdb
        expect_gone
    done
    run_expect 0 lbvm mount --json --disk=vdb --at=@1790003600 -o m/ web1
    [ "$(jq -c '[.machine, .id, .folder, (.disks[] | .name, .file)]' \
        <<<"$output")" = "[\"web1\",\"${ids[1]}\",\"m\",\"vdb\",\"m/vdb.img\"]" ]
    expect_shown 1 vdb
    expect_gone m/
}

@test "what is shown stays, though it is pruned" {
    three_backups
    run_expect 0 lbvm mount -o m web1 "${ids[1]}"
    run_expect 0 lbvm prune --keep-last=1 web1
    run_expect 0 lbvm list --json web1
    [ "$(jq -r '.backups[].id' <<<"$output")" = "${ids[2]}" ]
    expect_shown 1 vda
    expect_shown 1 vdb
    expect_gone
}

@test "--writable: it is forgotten what was written" {
    three_backups
    expect_unchanged run_expect 0 lbvm mount --writable -o m web1
    cp m/vda.img was
    printf hello | dd of=m/vda.img bs=1 seek=1000 conv=notrunc status=none
    [ "$(dd if=m/vda.img bs=1 skip=1000 count=5 status=none)" = hello ]
    expect_gone
    run_expect 0 lbvm mount -o m web1
    cmp m/vda.img was
    [ "$(stat -c %A m/vda.img)" = -r--r--r-- ]
    run_expect 1 dd if=was of=m/vda.img conv=notrunc
    expect_gone
}

@test "a folder that shows one already" {
    three_backups
    run_expect 0 lbvm mount --disk=vdb -o m web1 "${ids[0]}"
    run_expect 1 lbvm mount -o m web1
    expect_stderr 'lbvm: m/vdb.img: File exists'
    # and of that one nothing is left
    [ "$(ls m)" = 'vdb.img
vdb.log' ]
    expect_shown 0 vdb
    expect_gone
}

@test "one that is being read stays; the others go" {
    three_backups
    run_expect 0 lbvm mount -o m web1
    exec 8<m/vda.img
    run_expect 5 lbvm umount m
    expect_stderr 'lbvm: m/vda.img: is being read'
    [ "$(ls m)" = 'vda.img
vda.log' ]
    exec 8<&-
    expect_gone
}

@test "what is nobody's mount is left alone" {
    mkdir m
    echo mine >m/my.img
    : >m/empty.img
    run_expect 1 lbvm umount m
    expect_stderr 'lbvm: m: no backup is shown there'
    [ "$(cat m/my.img)" = mine ]
    [ -e m/empty.img ]
    run_expect 1 lbvm umount nothing
    expect_stderr 'lbvm: nothing: No such file or directory'
    run_expect 2 lbvm umount
    expect_stderr "lbvm: one FOLDER is wanted, 0 given
Try 'lbvm umount --help'."
    run_expect 2 lbvm mount web1
    expect_stderr "lbvm: -o FOLDER is wanted
Try 'lbvm mount --help'."
}

@test "what serves it is killed: umount clears it" {
    local who
    three_backups
    for who in nbdkit nbdfuse; do
        run_expect 0 lbvm mount -o m web1
        pkill -KILL -f "^$who .*$PWD/m/" || pkill -KILL -f "^$who .*file=$PWD/" ||
            pkill -KILL -f "^$who m/"
        expect_gone
    done
}

@test "damage: an error where it is, and a line in the log" {
    local archive
    new_disk vda.qcow2 8M
    head -c 1M /dev/urandom >noise
    change vda.qcow2 "write -s noise 0 1M" "write -s noise 4M 1M"
    run_expect 0 lbvm backup -q web1 vda.qcow2
    ids=("$(lbvm show --json web1 | jq -r .id)")
    archive=$(archive_of 0 vda)
    flip "$archive" 300000
    run_expect 0 lbvm mount -o m web1
    run dd if=m/vda.img of=/dev/null bs=64k count=1
    [ "$status" = 1 ]
    grep -q "$archive.*damaged" m/vda.log
    cmp <(dd if=m/vda.img bs=1M skip=4 count=1 status=none) noise
    expect_gone
}

@test "no plugin, no nbdfuse: nothing is left" {
    three_backups
    LBVM_NBDKIT_PLUGIN=/nothing run_expect 1 lbvm mount -o m web1
    expect_stderr_has 'lbvm: m/vda.img: can'"'"'t be shown: ' '/nothing'
    [ "$(ls -A m)" = '' ]
    mkdir bin
    ln -s "$(command -v lbvm)" bin
    printf '#!/bin/sh\nexit 9\n' >bin/nbdfuse
    chmod +x bin/nbdfuse
    PATH=$PWD/bin:$PATH run_expect 1 lbvm mount -o m web1
    expect_stderr "lbvm: m/vda.img: can't be shown: nbdfuse has ended"
    [ "$(ls -A m)" = '' ]
}
