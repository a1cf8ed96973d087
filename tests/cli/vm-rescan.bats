# lbvm backup of a stopped machine whose bitmaps don't tell: its disks are
# compared with the repository's archives, instead of a full backup.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm

# Two backups of the machine web1 with the disk vda.
two_backups() {
    new_disk vda.qcow2 20M
    change vda.qcow2 'write -P 1 0 6M' 'write -P 2 8M 2M'
    run_expect 0 lbvm backup -q web1 vda.qcow2
    change vda.qcow2 'write -P 3 1M 200k'
    run_expect 0 lbvm backup -q web1 vda.qcow2
    mapfile -t ids < <(lbvm list --json web1 | jq -r '.backups[].id')
}

# The host went down with the image open.
lose_power() {
    lbext poke vda.qcow2 --set flags=0 --set device=77 \
        --set boot_id=11111111-1111-4111-8111-111111111111
}

power_loss='the host went down while the image was open (power-loss)'

# expect_newest KIND [REASON]: that is the newest backup, which restores to what
# the disk is; and the next one goes on from it, by the bitmaps.
expect_newest() {
    local disk
    run_expect 0 lbvm show --json web1
    disk=$(jq -c '.disks[0]' <<<"$output")
    [ "$(jq -r 'if .parent == null then "full" else "incremental" end' \
        <<<"$disk")" = "$1" ] || fail "$disk"
    [ "$(jq -r .reason <<<"$disk")" = "${2:-}" ] || fail "$disk"
    expect_restored
    change vda.qcow2 'write -P 9 19M 64k'
    run_expect 0 lbvm backup web1 vda.qcow2
    expect_stderr ''
    [ "$(lbvm show --json web1 | jq '.disks[0].parent')" = \
        "$(jq .checkpoint <<<"$disk")" ]
    expect_restored
    run_expect 0 lbvm verify -q web1
}

expect_restored() {
    rm -rf back
    run_expect 0 lbvm restore -q -o back web1
    [ "$(content back/vda.qcow2)" = "$(content vda.qcow2)" ]
}

@test "after a power loss" {
    two_backups
    change vda.qcow2 'write -P 4 2M 64k' 'write -z 3M 1M' 'write -P 5 15M 64k'
    lose_power
    run_expect 0 lbvm backup web1 vda.qcow2
    expect_stderr "lbvm: web1: vda: incremental, by comparing the disk with its archives: $power_loss"
    [ "$(jq '.disks[0].bytes' "repo/web1/backups/$(lbvm show --json web1 | jq -r .id).json")" -lt 8192 ]
    expect_newest incremental "$power_loss"
}

@test "after a foreign writer, and with another size" {
    two_backups
    qemu_write vda.qcow2 2M 64k 4
    qemu-img resize -q -f qcow2 vda.qcow2 25M
    # as by one that knows no bitmaps
    lbext poke vda.qcow2 --set autoclear.bitmaps=0 \
        --set autoclear.livebackup=0
    run_expect 0 lbvm backup web1 vda.qcow2
    expect_stderr_has 'lbvm: web1: vda: incremental, by comparing the disk with its archives: '
    reason=${stderr#*archives: }
    expect_newest incremental "$reason"
}

@test "an image whose checkpoints were lost, of an older backup restored" {
    two_backups
    run_expect 0 lbvm restore -q -o old web1 "${ids[0]}"
    mv old/vda.qcow2 vda.qcow2
    change vda.qcow2 'write -P 7 5M 64k'
    lose_power
    run_expect 0 lbvm backup web1 vda.qcow2
    expect_stderr "lbvm: web1: vda: incremental, by comparing the disk with its archives: $power_loss"
    expect_newest incremental "$power_loss"
}

@test "--full is full; and so is a disk of which nothing is known" {
    two_backups
    lose_power
    run_expect 0 lbvm backup --full web1 vda.qcow2
    expect_stderr ''
    expect_newest full
    lose_power
    LBVM_REPOSITORY=other run_expect 0 lbvm backup web1 vda.qcow2
    expect_stderr 'lbvm: web1: vda: a full backup: the repository has no backup of this disk yet'
}

# Where there is trust, nobody looks at old archives.
@test "damaged archives: a full backup, which says so; none while there is trust" {
    local archive
    two_backups
    archive=$(archive_of 0 vda)
    # the index is at the end
    flip "$archive" $(($(stat -c %s "$archive") - 400))
    change vda.qcow2 'write -P 4 2M 64k'
    run_expect 0 lbvm backup web1 vda.qcow2
    expect_stderr ''
    lose_power
    run_expect 0 lbvm backup web1 vda.qcow2
    expect_stderr_has "a full backup: $power_loss; and the disk can't be compared with its archives: " \
        "$archive" ': damaged'
    expect_stderr_has 'lbvm: '
    [ "$(lbvm show --json web1 | jq '.disks[0].parent')" = null ]
    expect_restored
    truncate -s 1000 "$(archive_of 1 vda)"
    lose_power
    run_expect 0 lbvm backup web1 vda.qcow2
    expect_stderr "lbvm: web1: vda: incremental, by comparing the disk with its archives: $power_loss"
    expect_restored
}

@test "a missing archive: a full backup" {
    two_backups
    rm "$(archive_of 0 vda)"
    lose_power
    run_expect 0 lbvm backup web1 vda.qcow2
    expect_stderr_has 'lbvm: web1: vda: a full backup: '
    [ "$(lbvm show --json web1 | jq '.disks[0].parent')" = null ]
    expect_restored
}

# miss OFFSET: the content there changes, and no bit.
miss() {
    local at
    at=$(qemu-img map --output=json vda.qcow2 | jq --argjson at "$1" '.[] |
        select(.start <= $at and $at < .start + .length) |
        .offset + $at - .start')
    printf 'missed' | dd of=vda.qcow2 bs=1 seek="$at" conv=notrunc status=none
}

@test "--audit: an alarm for what was not tracked, and a backup that has it" {
    two_backups
    change vda.qcow2 'write -P 4 2M 64k'
    run_expect 0 lbvm backup --audit=100% web1 vda.qcow2
    expect_stderr ''
    change vda.qcow2 'write -P 5 2M 64k'
    miss 4194304
    run_expect 6 lbvm backup --audit=100% --metrics=metrics web1 vda.qcow2
    expect_stderr_has "lbvm: $PWD/vda.qcow2: ALARM: 1 blocks of 64 KiB have changed and were not tracked" \
        'lbvm: web1: vda: incremental, by comparing the disk with its archives: an audit found changes that were not tracked (audit)'
    grep -q '^lbvm_last_status{.*} 6$' metrics
    expect_newest incremental \
        'an audit found changes that were not tracked (audit)'
    run_expect 0 lbvm backup --audit 100 web1 vda.qcow2
    expect_stderr ''
}

@test "--audit of what can't be audited is a note" {
    qemu-img create -q -f qcow2 plain.qcow2 1M
    run_expect 0 lbvm backup --audit=1% web1 plain.qcow2
    expect_stderr_has 'lbvm: web1: plain: not audited: only a stopped disk with livebackup can be, where its last backup is in a repository on this host'
    two_backups
    run_expect 0 lbvm backup -q --audit=1% web1 vda.qcow2
    expect_stderr ''
    lose_power
    run_expect 0 lbvm backup --audit=100% web1 vda.qcow2
    expect_stderr_has '(power-loss)' \
        'lbvm: web1: vda: incremental, by comparing'
    run_expect 2 lbvm backup --audit=0% web1 vda.qcow2
    run_expect 2 lbvm backup --audit=101% web1 vda.qcow2
}
