# lbdump --audit: changes that no bitmap knows of are an alarm.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

backed_up() {
    new_disk disk.qcow2 20M
    change disk.qcow2 'write -P 1 0 16M'
    dump 0.lbz disk.qcow2
    change disk.qcow2 'write -P 3 1M 200k'
    dump 1.lbz disk.qcow2 --incremental
}

# Where the cluster of that guest offset lies in the file.
behind_the_image() {
    local at
    at=$(qemu-img map -f qcow2 --output=json disk.qcow2 |
        jq "[.[] | select(.start <= $1 and .start + .length > $1)][0] |
            .offset + $1 - .start")
    printf 'missed' | dd of=disk.qcow2 bs=1 seek="$at" conv=notrunc status=none
}

@test "a share and a seed want an audit" {
    new_disk disk.qcow2 2M
    for option in --share=5 --seed=7; do
        run_expect 2 lbdump "$option" -o x.lbz disk.qcow2
        name=${option%=*}
        expect_stderr "lbdump: $name is for --audit
Try 'lbdump --help'."
        expect_absent x.lbz
    done
}

@test "tracked changes are no alarm, whatever the share" {
    backed_up
    change disk.qcow2 'write -P 4 5M 64k' 'write -z 7M 1M'
    for share in 100 50 1; do
        expect_untouched disk.qcow2 run_expect 0 lbdump -q --audit \
            --share=$share 0.lbz 1.lbz disk.qcow2
        expect_output ''
        expect_stderr ''
    done
}

@test "a change behind the image's back: its range, and status 6" {
    backed_up
    change disk.qcow2 'write -P 4 5M 64k'
    behind_the_image 3145728
    behind_the_image $((5 * 1048576))
    behind_the_image $((9 * 1048576))
    expect_untouched disk.qcow2 run_expect 6 lbdump --audit \
        0.lbz 1.lbz disk.qcow2
    expect_stderr 'lbdump: disk.qcow2: ALARM: changed, but not tracked: 0x300000-0x30ffff
lbdump: disk.qcow2: ALARM: changed, but not tracked: 0x900000-0x90ffff
lbdump: disk.qcow2: ALARM: 2 blocks of 64 KiB have changed and were not tracked: the incrementals since the newest archive lack them; make a full dump, or use --rescan'
    # what it advises to do gives a right backup
    run_expect 0 lbdump -q --incremental --rescan -o 2.lbz \
        0.lbz 1.lbz disk.qcow2
    good_archives 2.lbz
    expect_restores "$(content disk.qcow2)" 0.lbz 1.lbz 2.lbz
    run_expect 0 lbdump --audit 0.lbz 1.lbz 2.lbz disk.qcow2
    expect_stderr ''
}

@test "a seed gives the same share again; shares differ, and find in the end" {
    backed_up
    behind_the_image 3145728
    found=0
    for seed in {1..40}; do
        first=$(lbdump --audit --share=30 --seed=$seed \
            0.lbz 1.lbz disk.qcow2 2>&1) && status=0 || status=$?
        again=$(lbdump --audit --share=30 --seed=$seed \
            0.lbz 1.lbz disk.qcow2 2>&1) || true
        [ "$first" = "$again" ]
        [[ "$first" == "lbdump: disk.qcow2: looking at 30%, --seed=$seed"* ]]
        [ "$status" = 0 ] || [ "$status" = 6 ]
        [ "$status" = 0 ] || found=$((found + 1))
    done
    [ "$found" -gt 2 ]
    [ "$found" -lt 30 ]
}

@test "without trust, or without the checkpoint, nothing is audited" {
    backed_up
    uuid=$(uuid_of 1.lbz)
    run_expect 0 lbrestore -q -o old.qcow2 0.lbz
    run_expect 3 lbdump --audit 0.lbz 1.lbz old.qcow2
    expect_stderr "lbdump: old.qcow2: the image has no checkpoint $uuid, that of the newest archive"
    lbext poke disk.qcow2 --set flags=0 --set device=77 \
        --set boot_id=11111111-1111-4111-8111-111111111111
    expect_untouched disk.qcow2 run_expect 3 lbdump --audit \
        0.lbz 1.lbz disk.qcow2
    expect_stderr_has '(power-loss)'
}

@test "what does not go with --audit" {
    run_expect 2 lbdump --audit disk.qcow2
    expect_stderr_has '--audit wants the archives of the disk, and DISK behind them'
    run_expect 2 lbdump --audit --incremental 0.lbz disk.qcow2
    expect_stderr_has '--audit makes no dump; it excludes the options for one'
    run_expect 2 lbdump --audit --share=0 0.lbz disk.qcow2
    expect_stderr_has '--share'
}
