# lbdump --interrupted: what a QEMU leaves that was killed during a backup.
# fakeqemu.py plays its part.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load fakeqemu

# leave [OPTION]...: a backup of disk.qcow2 is begun, the guest writes, and QEMU
# dies. LBDUMP: what else lbdump gets.
leave() {
    fake --writes 60 --die-at query-livebackup "$@" disk=disk.qcow2
    run_expect 1 lbdump --qmp=qmp "${LBDUMP[@]}" -o gone.lbz
    expect_absent gone.lbz
    rm -f qmp
}

# lost WHY: nothing can be dumped, and nothing changes.
lost() {
    cp disk.qcow2 before.qcow2
    run_expect 3 lbdump --interrupted -o left.lbz disk.qcow2
    expect_stderr "lbdump: disk.qcow2: $1"
    expect_absent left.lbz
    cmp disk.qcow2 before.qcow2
}

LBDUMP=()

# ------------------------------------------------------------------- content

@test "a full backup is taken up, and an incremental goes on from it" {
    some_disk disk.qcow2
    leave
    uuid=$(status_of disk.qcow2 '.checkpoints[-1].uuid')
    run_expect 0 lbctl status disk.qcow2
    [[ "$output" == *"
backup running since 2023-11-14T22:13:20Z, but no QEMU has the image open; see lbdump --interrupted
"* ]]
    run_expect 0 lbdump --interrupted -o left.lbz disk.qcow2
    expect_output ''
    expect_stderr ''
    expect_at_T disk.qcow2 left.lbz
    [ "$(uuid_of left.lbz)" = "$uuid" ]
    [ "$(header_of left.lbz .time)" = 1700000000 ]
    [ "$(status_of disk.qcow2 '.checkpoints[-1].confirmed')" = true ]
    [ "$(status_of disk.qcow2 .backup)" = null ]
    expect_absent disk.orig.qcow2
    rm left.lbz
    lost 'no backup was interrupted'
    run_expect 0 lbdump -q --incremental -o next.lbz disk.qcow2
    [ "$(header_of next.lbz .parent_uuid)" = "$uuid" ]
}

@test "an incremental backup is taken up as one, with its label" {
    some_disk disk.qcow2
    dump 0.lbz disk.qcow2 --chain weekly
    change disk.qcow2 'write -P 7 2M 300k' 'write -z 0 64k'
    dump other.lbz disk.qcow2
    change disk.qcow2 'write -P 8 8M 300k'
    LBDUMP=(--incremental --chain=weekly)
    leave
    run_expect 0 lbdump --interrupted -o 1.lbz disk.qcow2
    expect_at_T disk.qcow2 0.lbz 1.lbz
    [ "$(header_of 1.lbz .label)" = weekly ]
    [ "$(header_of 1.lbz .parent_uuid)" = "$(uuid_of 0.lbz)" ]
}

@test "2 MiB clusters, extended L2 entries, an odd size" {
    for options in cluster_size=2M extended_l2=on; do
        rm -f disk.qcow2
        new_disk disk.qcow2 9999k -o $options
        change disk.qcow2 'write -P 1 0 3M' 'write -P 2 5M 200k' \
            'write -z 1M 128k' 'write -P 4 9900k 99k'
        leave --junk
        run_expect 0 lbdump --interrupted --force -o left.lbz disk.qcow2
        expect_at_T disk.qcow2 left.lbz
    done
}

# ----------------------------------------------------------- confirming it

@test "into a pipe: it stays unconfirmed, and can be dumped again" {
    some_disk disk.qcow2
    leave
    cp disk.qcow2 before.qcow2
    run_expect 0 bash -c 'lbdump --interrupted disk.qcow2 | cat >left.lbz'
    [[ "$stderr" == "lbdump: disk.qcow2: the archive went into a pipe, so its checkpoint is not confirmed; when it is safe: lbctl confirm disk.qcow2 $(uuid_of left.lbz) "* ]]
    expect_at_T disk.qcow2 left.lbz
    cmp disk.qcow2 before.qcow2
    run_expect 0 bash -c 'lbdump --interrupted --trust-pipe disk.qcow2 |
        cat >left.lbz'
    expect_at_T disk.qcow2 left.lbz
    [ "$(status_of disk.qcow2 '.checkpoints[-1].confirmed')" = true ]
    expect_absent disk.orig.qcow2
}

@test "--copy changes nothing, and needs no write access" {
    some_disk disk.qcow2
    leave
    cp disk.qcow2 before.qcow2
    run_expect 0 lbdump --interrupted --copy --json -o left.lbz disk.qcow2
    expect_stderr ''
    expect_at_T disk.qcow2 left.lbz
    cmp disk.qcow2 before.qcow2
    [ -e disk.orig.qcow2 ]
    run_expect 0 lbdump --interrupted --json -o again.lbz disk.qcow2
    [ "$(jq -r '"\(.kind) \(.checkpoint) \(.confirmed)"' <<<"$output")" = \
        'full true true' ]
    cmp left.lbz again.lbz
}

@test "a durable backup outlives the host's restart; no incremental goes on" {
    some_disk disk.qcow2
    dump 0.lbz disk.qcow2
    change disk.qcow2 'write -P 7 2M 300k'
    LBDUMP=(--incremental)
    leave
    lbext poke disk.qcow2 --set flags=2 --set device=77 \
        --set boot_id=11111111-1111-4111-8111-111111111111
    cp disk.qcow2 before.qcow2
    run_expect 0 lbdump --interrupted -o 1.lbz disk.qcow2
    expect_stderr 'lbdump: disk.qcow2: no incremental can go on from this archive: the host went down while the image was open (power-loss)'
    expect_at_T disk.qcow2 0.lbz 1.lbz
    cmp disk.qcow2 before.qcow2
}

# ------------------------------------------------------------------- refused

@test "what is no longer what it was is refused" {
    some_disk disk.qcow2
    dump 0.lbz disk.qcow2
    leave
    cp disk.qcow2 left.qcow2
    cp disk.orig.qcow2 left.orig.qcow2
    renew() {
        cp left.qcow2 disk.qcow2
        cp left.orig.qcow2 disk.orig.qcow2
    }
    poked() {
        renew
        lbext poke disk.qcow2 --set "$1"
        lost "the interrupted backup is lost: $2"
    }
    poked state=2 'the image was opened for writing since'
    poked state=3 'an original could not be saved'
    poked overwritten=1 'what had been released was overwritten'
    poked boot_id=11111111-1111-4111-8111-111111111111 \
        'the host was restarted, and the backup was not durable'
    poked device=77 'the image was moved, and the backup was not durable'
    poked autoclear.livebackup=0 \
        'another program has opened the image for writing since'
    renew
    change disk.qcow2 'write -P 9 0 64k'
    lost 'the interrupted backup is lost: another program has opened the image for writing since'
    renew
    rm disk.orig.qcow2
    lost 'the interrupted backup is lost: its originals are gone'
}

@test "originals of another backup, of another program, damaged ones" {
    some_disk disk.qcow2
    leave
    cp disk.orig.qcow2 other.orig.qcow2
    leave
    refused() {
        run_expect "$1" lbdump --interrupted --orig=other.orig.qcow2 \
            -o left.lbz disk.qcow2
        expect_stderr "lbdump: other.orig.qcow2: $2"
        expect_absent left.lbz
    }
    refused 3 'holds the originals of another backup'
    cp disk.orig.qcow2 other.orig.qcow2
    flip other.orig.qcow2 130
    refused 4 'the header is damaged'
    cp disk.qcow2 other.orig.qcow2
    refused 1 'holds no originals'
    mv disk.orig.qcow2 elsewhere
    run_expect 0 lbdump --interrupted --orig=elsewhere -o left.lbz disk.qcow2
    expect_at_T disk.qcow2 left.lbz
    expect_absent elsewhere
}

@test "a changed backing file, an image in use, the disk as the archive" {
    qemu-img create -q -f raw base.raw 10M
    qemu-img create -q -f qcow2 -b base.raw -F raw disk.qcow2
    run_expect 0 lbctl enable disk.qcow2
    change disk.qcow2 'write -P 1 0 3M'
    dump 0.lbz disk.qcow2
    leave
    run_expect 2 lbdump --interrupted --force -o disk.orig.qcow2 disk.qcow2
    expect_stderr 'lbdump: disk.orig.qcow2: is the disk itself, or a file that it consists of'
    HOLD_WRITABLE=off hold_open disk.qcow2 read-only=on
    run_expect 5 lbdump --interrupted -o left.lbz disk.qcow2
    expect_stderr 'lbdump: disk.qcow2: the image is in use by another process'
    let_go
    expect_absent left.lbz
    printf x | dd of=base.raw conv=notrunc status=none
    touch -d '2 hours ago' base.raw
    lost 'the interrupted backup is lost: a backing file was changed or is missing'
}

@test "usage errors of --interrupted" {
    wrong() {
        run_expect 2 lbdump "${@:2}"
        expect_stderr "lbdump: $1
Try 'lbdump --help'."
    }
    wrong '--interrupted is for a QEMU that is gone; it excludes --qmp' \
        --interrupted --qmp=qmp -o x
    for mode in --incremental --auto --overlay; do
        wrong '--interrupted dumps what the backup was begun for; it excludes --incremental, --since, --auto and --overlay' \
            --interrupted $mode -o x disk.qcow2
    done
    wrong '--interrupted keeps the label of the backup; it excludes --chain' \
        --interrupted --chain=a -o x disk.qcow2
    wrong '--orig names saved originals; it wants --interrupted' \
        --orig=y -o x disk.qcow2
    wrong '--durable is for a running QEMU; it wants --qmp' \
        --durable -o x disk.qcow2
    wrong 'one DISK is wanted, 0 given' --interrupted -o x
}

@test "a rollback in place gives it up" {
    some_disk disk.qcow2
    dump 0.lbz disk.qcow2
    change disk.qcow2 'write -P 7 2M 300k'
    leave
    [ -e disk.orig.qcow2 ]
    run_expect 0 lbrestore -q --in-place disk.qcow2 0.lbz
    expect_stderr ''
    expect_absent disk.orig.qcow2
    [ "$(status_of disk.qcow2 .backup)" = null ]
    [ "$(status_of disk.qcow2 '.checkpoints[-1].uuid')" = "$(uuid_of 0.lbz)" ]
    lost 'no backup was interrupted'
}
