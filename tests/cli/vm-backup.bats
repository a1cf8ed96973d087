# lbvm backup: all disks of a machine, at one point in time, into a repository.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm
load fakeqemu

# The newest backup's ID; the archives' kinds in the order of the disks.
newest() {
    lbvm show --json web1 | jq -r .id
}

kinds() {
    lbvm show --json web1 |
        jq -r '[.disks[] | if .parent then "incremental" else "full" end] |
               join(" ")'
}

reason() {
    jq -r ".disks[${1:-0}].reason" "repo/web1/backups/$(newest).json"
}

# expect_disk DISK FILE: the newest backup of it restores to that raw content, by
# the oracle and by lbrestore.
expect_disk() {
    local chain
    vmrepo check repo
    mapfile -t chain < <(vmrepo chain repo web1 "$(newest)" "$1")
    good_archives "${chain[@]}"
    run_expect 0 lbrestore --quiet --force -o restored.raw "${chain[@]}"
    cmp restored.raw "$2"
}

raw() {
    qemu-img convert -f qcow2 -O raw "$1" "$1.raw"
    echo "$1.raw"
}

backup() {
    run_expect 0 lbvm backup web1 "$@"
}

two_disks() {
    some_disk system.qcow2
    new_disk data.qcow2 20M
}

# ------------------------------------------------------------ a stopped machine

@test "in full, then what has changed, each disk" {
    two_disks
    backup system.qcow2 data.qcow2
    expect_stderr 'lbvm: web1: system: a full backup: the repository has no backup of this disk yet
lbvm: web1: data: a full backup: the repository has no backup of this disk yet'
    expect_disk system "$(raw system.qcow2)"
    for i in 1 2 3; do
        change system.qcow2 "write -P $i ${i}M 300k"
        backup system.qcow2 data.qcow2
        expect_stderr ''
        [ "$(kinds)" = 'incremental incremental' ]
        expect_disk system "$(raw system.qcow2)"
        expect_disk data "$(raw data.qcow2)"
    done
    [ "$(lbvm list --json web1 | jq '.backups | length')" = 4 ]
    good_image system.qcow2
}

@test "the checkpoints are confirmed, under the repository's own label" {
    two_disks
    backup system.qcow2 data.qcow2
    label=$(jq -r .label repo/repository.json)
    [[ "$label" == lbvm-???????? ]]
    lbctl status --json data.qcow2 >status
    [ "$(jq -r '.checkpoints[] | [.label, .confirmed] | join(" ")' status)" = \
      "$label true" ]
}

@test "two repositories don't disturb each other" {
    two_disks
    backup data.qcow2
    LBVM_REPOSITORY=weekly run_expect 0 lbvm backup --chain weekly web1 data.qcow2
    for i in 1 2 3; do
        change data.qcow2 "write -P $i ${i}M 300k"
        backup data.qcow2
        expect_stderr ''
    done
    LBVM_REPOSITORY=weekly run_expect 0 lbvm backup web1 data.qcow2
    expect_stderr ''
    mapfile -t chain < <(vmrepo chain weekly web1 \
        "$(lbvm show --repository=weekly --json web1 | jq -r .id)" data)
    [ ${#chain[@]} = 2 ]
    lbz restore -o weekly.raw "${chain[@]}"
    cmp weekly.raw "$(raw data.qcow2)"
    LBVM_REPOSITORY=weekly run_expect 2 lbvm backup --chain monthly web1 data.qcow2
}

@test "a new disk is a full one, a grown one is not, a removed one is no error" {
    two_disks
    backup system.qcow2
    qemu-img resize -q -f qcow2 system.qcow2 12M
    change system.qcow2 'write -P 9 11M 1M'
    backup system.qcow2 data.qcow2
    expect_stderr 'lbvm: web1: data: a full backup: the repository has no backup of this disk yet'
    [ "$(kinds)" = 'incremental full' ]
    expect_disk system "$(raw system.qcow2)"
    backup data.qcow2
    expect_stderr ''
    [ "$(kinds)" = incremental ]
}

@test "names of disks: the file's, or as given; a name twice is an error" {
    two_disks
    mkdir other
    cp data.qcow2 other/data.qcow2
    backup a=system.qcow2 data.qcow2
    [ "$(lbvm show --json web1 | jq -r '[.disks[].name] | join(" ")')" = 'a data' ]
    run_expect 2 lbvm backup web1 data.qcow2 other/data.qcow2
    expect_stderr "lbvm: two disks are called 'data'; name them: NAME=IMAGE"
}

@test "a disk without livebackup is backed up in full each time, and told so" {
    qemu-img create -q -f qcow2 plain.qcow2 5M
    for _ in 1 2; do
        backup plain.qcow2
        expect_stderr "lbvm: web1: plain: a full backup: livebackup is off; turn it on with 'lbctl enable', and what follows is incremental"
    done
}

@test "a disk that lost its trust is compared, the others go on" {
    two_disks
    backup system.qcow2 data.qcow2
    qemu-img bitmap --clear data.qcow2 \
        "lb-$(lbctl status --json data.qcow2 | jq -r '.checkpoints[0].uuid')"
    change data.qcow2 'write -P 3 3M 1M'
    backup system.qcow2 data.qcow2
    [ "$(kinds)" = 'incremental incremental' ]
    [[ "$(reason 1)" == *'(canary)'* ]] || fail "$(reason 1)"
    expect_disk data "$(raw data.qcow2)"
}

@test "a repository that lost an archive gets a full one that needs none" {
    two_disks
    backup data.qcow2
    change data.qcow2 'write -P 3 3M 1M'
    backup data.qcow2
    rm "$(vmrepo chain repo web1 "$(newest)" data | head -n 1)"
    backup data.qcow2
    [ "$(kinds)" = full ]
    [[ "$(reason)" == *': is missing: the chain of disk '* ]] || fail "$(reason)"
    lbz restore -o oracle.raw "repo/web1/$(jq -r '.disks[0].archive' \
        "repo/web1/backups/$(newest).json")"
    cmp oracle.raw "$(raw data.qcow2)"
}

@test "a restored disk goes on from the backup it is of" {
    two_disks
    backup data.qcow2
    change data.qcow2 'write -P 3 3M 1M'
    backup data.qcow2
    mapfile -t chain < <(vmrepo chain repo web1 "$(newest)" data | head -n 1)
    rm data.qcow2
    lbrestore -q -o data.qcow2 "${chain[@]}"
    change data.qcow2 'write -P 4 5M 1M'
    backup data.qcow2
    expect_stderr ''
    [ "$(kinds)" = incremental ]
    expect_disk data "$(raw data.qcow2)"
}

@test "--full, and --json" {
    two_disks
    backup data.qcow2
    run_expect 0 lbvm backup --full --json -q web1 data.qcow2
    [ "$(jq -r '.disks[0].parent' <<<"$output")" = null ]
    cmp <(jq -S . <<<"$output") \
        <(jq -S . "repo/web1/backups/$(newest).json")
}

@test "the clock goes back: the newest is the one that was made last" {
    two_disks
    backup data.qcow2
    first=$(newest)
    later=$(date -u +%Y%m%dT%H%M%SZ -d '20 days')-${first##*-}
    jq --arg id "$later" '.id = $id | .finished += 1728000 |
            .time = ($id[:16] | strptime("%Y%m%dT%H%M%SZ") | mktime)' \
        "repo/web1/backups/$first.json" >"repo/web1/backups/$later.json"
    rm "repo/web1/backups/$first.json"
    change data.qcow2 'write -P 3 3M 1M'
    backup data.qcow2
    [ "$(newest)" != "$later" ]
    [ "$(kinds)" = incremental ]
    expect_disk data "$(raw data.qcow2)"
}

@test "what is in the way: another backup, a QEMU, a damaged manifest" {
    two_disks
    backup data.qcow2
    run_expect 5 flock repo/web1/backup.lock lbvm backup web1 data.qcow2
    [[ "$stderr" == 'lbvm: repo/web1: '*'a backup or a pruning of it is at work (process '* ]] || fail "$stderr"
    qemu-io -f qcow2 -c 'sleep 3000' data.qcow2 >/dev/null &
    holder=$!
    until grep -q "$(stat -c ':%i ' data.qcow2)" /proc/locks; do sleep 0.01; done
    run_expect 5 lbvm backup web1 data.qcow2
    kill "$holder"
    wait "$holder" || true
    [ "$(lbvm list --json web1 | jq '.backups | length')" = 1 ]
    echo '{' >repo/web1/backups/20260101T000000Z-00000000.json
    run_expect 4 lbvm backup web1 data.qcow2
}

@test "a backup that fails leaves none in the list, and loses nothing" {
    two_disks
    backup data.qcow2
    change data.qcow2 'write -P 3 3M 1M'
    head -c 100000 /dev/urandom >noise
    change data.qcow2 'write -s noise 4M 100000'
    run_expect 1 bash -c 'ulimit -f 8; exec lbvm backup web1 data.qcow2'
    [ "$(lbvm list --json web1 | jq '.backups | length')" = 1 ]
    backup data.qcow2
    [ "$(kinds)" = incremental ]
    expect_disk data "$(raw data.qcow2)"
    [ "$(find repo -name '*.tmp')" = '' ]
}

# ---------------------------------------------------------- a QEMU with livebackup

@test "a running machine, with its definition" {
    some_disk vda.qcow2
    # the fake does not track what it writes
    fake --still vda=vda.qcow2
    backup --qmp=qmp
    [ "$(jq -r .source "repo/web1/backups/$(newest).json")" = qemu ]
    jq -e . "repo/web1/$(jq -r .definition "repo/web1/backups/$(newest).json")" \
        >/dev/null
    expect_disk vda vda.qcow2.at-T
    wait
    change vda.qcow2 'write -P 3 3M 1M'
    fake --writes 20 vda=vda.qcow2
    backup --qmp=qmp
    expect_stderr ''
    [ "$(argument livebackup-begin '.disks[0].mode')" = auto ]
    [ "$(kinds)" = incremental ]
    expect_disk vda vda.qcow2.at-T
}

@test "a backup that breaks is none" {
    some_disk vda.qcow2
    fake --break-after livebackup-begin vda=vda.qcow2
    run_expect 1 lbvm backup --qmp=qmp web1
    [ "$(lbvm list --json web1 | jq '.backups | length')" = 0 ]
    expect_absent repo/web1/archives/*.lbz
}

# ------------------------------------------------------------------------ usage

@test "what is asked wrongly" {
    run_expect 2 lbvm backup web1 x.qcow2 --qmp=qmp
    expect_stderr_has '--qmp and --domain find the disks themselves'
    run_expect 2 lbvm backup --disk vda web1 x.qcow2
    expect_stderr_has 'they want --qmp or --domain'
    run_expect 2 lbvm backup --qmp=qmp --domain=web1
    expect_stderr_has '--qmp and --domain exclude each other'
    run_expect 2 lbvm backup --qmp=qmp --quiesce=try web1
    expect_stderr_has '--quiesce wants --agent'
    run_expect 2 lbvm backup --domain=a --domain=b web1
    run_expect 2 lbvm backup web1
    run_expect 2 lbvm backup
    run_expect 2 lbvm backup ../x a.qcow2
    unset LBVM_REPOSITORY
    run_expect 2 lbvm backup web1 a.qcow2
    expect_stderr_has '--repository=PLACE is wanted'
    [ ! -e repo/x ]
}
