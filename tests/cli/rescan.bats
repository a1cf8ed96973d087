# lbdump --rescan: a true incremental where the tracking can't be trusted, by
# comparing the disk with the digests of its archives.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

teardown() {
    let_go
}

# A disk with a full archive and an incremental, 0.lbz and 1.lbz.
two_backups() {
    new_disk disk.qcow2 "${1:-20M}"
    change disk.qcow2 'write -P 1 0 6M' 'write -P 2 8M 2M'
    dump 0.lbz disk.qcow2
    change disk.qcow2 'write -P 3 1M 200k' 'write -z 8M 128k'
    dump 1.lbz disk.qcow2 --incremental
}

# The host went down with the image open: what was written may lack its bits.
lose_power() {
    lbext poke "$1" --set flags=0 --set device=77 \
        --set boot_id=11111111-1111-4111-8111-111111111111
}

rescan() {
    run_expect 0 lbdump -q --incremental --rescan -o "$1" "${@:3}" "$2"
    expect_output ''
    expect_stderr ''
    good_archives "$1"
}

@test "after a power loss, an incremental of what differs; the next one trusts" {
    two_backups
    change disk.qcow2 'write -P 4 2M 64k' 'write -z 3M 1M' \
        'write -P 5 15M 64k'
    lose_power disk.qcow2
    run_expect 3 lbdump --incremental -o no.lbz disk.qcow2
    run_expect 0 lbdump --json --incremental --rescan -o 2.lbz \
        1.lbz 0.lbz disk.qcow2
    expect_stderr "lbdump: disk.qcow2: checkpoints that can't be trusted are dropped: the host went down while the image was open (power-loss)"
    # neither more nor less than what differs: no canaries
    [ "$(jq -c '[.kind, .data_bytes, .zero_bytes, .confirmed]' \
        <<<"$output")" = '["incremental",131072,1048576,true]' ]
    good_archives 2.lbz
    good_image disk.qcow2
    [ "$(header_of 2.lbz .parent_uuid)" = "$(uuid_of 1.lbz)" ]
    expect_restores "$(content disk.qcow2)" 0.lbz 1.lbz 2.lbz
    change disk.qcow2 'write -P 6 4M 64k'
    dump 3.lbz disk.qcow2 --incremental
    [ "$(header_of 3.lbz .parent_uuid)" = "$(uuid_of 2.lbz)" ]
    expect_restores "$(content disk.qcow2)" 0.lbz 1.lbz 2.lbz 3.lbz
}

@test "the usage, word for word" {
    two_backups
    lose_power disk.qcow2
    change disk.qcow2 'write -P 4 2M 64k'
    run_expect 0 bash -c 'lbdump --incremental --rescan 0.lbz 1.lbz disk.qcow2 > 2.lbz'
    good_archives 2.lbz
    good_image disk.qcow2
    expect_restores "$(content disk.qcow2)" 0.lbz 1.lbz 2.lbz
}

@test "where the disk has grown or was cut, and where both happened" {
    for sizes in 25M 21000192 11M 9000448 '5000192 20M' '9M 8400384 23000064'
    do
        rm -f ./*
        two_backups 20971008
        for size in $sizes; do
            qemu-img resize -q --shrink -f qcow2 disk.qcow2 "$size"
        done
        change disk.qcow2 'write -P 4 2M 64k'
        lose_power disk.qcow2
        rescan 2.lbz disk.qcow2 0.lbz 1.lbz
        good_image disk.qcow2
        expect_restores "$(content disk.qcow2)" 0.lbz 1.lbz 2.lbz
        run_expect 0 lbmerge -o merged.lbz 0.lbz 1.lbz 2.lbz
        expect_restores "$(content disk.qcow2)" merged.lbz
    done
}

@test "a stock program that drops the bitmaps, a clone and a restored disk" {
    two_backups
    cp disk.qcow2 clone.qcow2
    run_expect 0 lbrestore -q -o restored.qcow2 0.lbz 1.lbz
    for disk in disk clone restored; do
        change $disk.qcow2 'write -P 4 2M 64k'
        # as a program leaves it that knows no bitmaps
        lbext poke $disk.qcow2 --set autoclear.bitmaps=0 \
            --set autoclear.livebackup=0
        [ "$(status_of $disk.qcow2 .keyword)" = bitmaps-dropped ]
        rescan $disk.lbz $disk.qcow2 0.lbz 1.lbz
        # the stock program has lost the clusters of the bitmaps
        run_expect 0 lbctl recover $disk.qcow2
        good_image $disk.qcow2
        expect_restores "$(content $disk.qcow2)" 0.lbz 1.lbz $disk.lbz
    done
}

@test "--auto trusts where it can, compares where not, else dumps in full" {
    two_backups
    change disk.qcow2 'write -P 4 2M 64k'
    run_expect 0 lbdump --auto --rescan -o 2.lbz 0.lbz 1.lbz disk.qcow2
    expect_stderr 'lbdump: disk.qcow2: incremental: the tracked changes are trusted'
    lose_power disk.qcow2
    run_expect 0 lbdump --auto --rescan -o 3.lbz 0.lbz 1.lbz 2.lbz disk.qcow2
    expect_stderr 'lbdump: disk.qcow2: incremental, by comparing the disk with its archives: the host went down while the image was open (power-loss)'
    expect_restores "$(content disk.qcow2)" 0.lbz 1.lbz 2.lbz 3.lbz
    lose_power disk.qcow2
    run_expect 0 lbdump --auto --rescan -o 4.lbz 1.lbz 2.lbz disk.qcow2
    expect_stderr "lbdump: disk.qcow2: full: 1.lbz: its parent $(uuid_of 0.lbz) is not among the archives given"
    expect_restores "$(content disk.qcow2)" 4.lbz
}

@test "a wrong chain, and one of another disk: status 3, nothing is written" {
    two_backups
    new_disk other.qcow2 20M
    dump other.lbz other.qcow2
    lose_power disk.qcow2
    expect_untouched disk.qcow2 run_expect 3 \
        lbdump --incremental --rescan -o no.lbz \
        1.lbz disk.qcow2
    expect_stderr "lbdump: 1.lbz: its parent $(uuid_of 0.lbz) is not among the archives given"
    expect_untouched disk.qcow2 run_expect 3 \
        lbdump --incremental --rescan -o no.lbz \
        other.lbz disk.qcow2
    expect_stderr "lbdump: disk.qcow2: the archives are of another disk: image UUID $(header_of other.lbz .image_uuid), not $(header_of 0.lbz .image_uuid)"
    run_expect 0 lbctl disable other.qcow2
    expect_untouched other.qcow2 run_expect 3 \
        lbdump --incremental --rescan -o no.lbz \
        other.lbz other.qcow2
    expect_stderr 'lbdump: other.qcow2: livebackup is off, so nothing tells whether this is the disk that the archives are of'
    [ ! -e no.lbz ]
}

@test "a damaged archive: status 4; its own base as the output: status 2" {
    two_backups
    head -c -1 1.lbz >cut.lbz
    expect_untouched disk.qcow2 run_expect 4 \
        lbdump --incremental --rescan -o no.lbz \
        0.lbz cut.lbz disk.qcow2
    [ ! -e no.lbz ]
    cp 1.lbz same.lbz
    expect_untouched disk.qcow2 run_expect 2 \
        lbdump --incremental --rescan --force \
        -o 1.lbz 0.lbz 1.lbz disk.qcow2
    expect_stderr 'lbdump: 1.lbz: is one of the archives that the dump goes on from'
    cmp 1.lbz same.lbz
}

@test "a disk that is open elsewhere: status 5" {
    two_backups
    hold_open disk.qcow2
    run_expect 5 lbdump --incremental --rescan -o no.lbz 0.lbz 1.lbz disk.qcow2
    [ ! -e no.lbz ]
}

@test "what does not go with --rescan" {
    run_expect 2 lbdump --rescan -o x 0.lbz disk.qcow2
    expect_stderr_has '--rescan wants --incremental or --auto'
    run_expect 2 lbdump --incremental --rescan -o x disk.qcow2
    expect_stderr_has '--rescan wants the archives of the disk, and DISK behind them'
    run_expect 2 lbdump --incremental --rescan --chain=a -o x 0.lbz disk.qcow2
    expect_stderr_has '--rescan keeps the label of the archives; it excludes --chain'
    run_expect 2 lbdump --auto --rescan --qmp=s -o x 0.lbz disk.qcow2
    expect_stderr_has 'it excludes --qmp and --interrupted'
}
