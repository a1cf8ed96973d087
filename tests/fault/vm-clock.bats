# lbvm with a clock that goes back, and forth: backups follow each other as they were
# made.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load ../cli/helpers
load ../cli/backup
load ../cli/vm

day=86400

# at SECONDS COMMAND...: with a clock that is wrong by so much.
at() {
    QLB_FAULT_CLOCK=$1 LD_PRELOAD=$abs_top_builddir/tests/fault/shim.so \
        ASAN_OPTIONS=verify_asan_link_order=0 "${@:2}"
}

# backup SECONDS: the n-th, of new content.
backup() {
    n=$((n + 1))
    qemu_write disk.qcow2 "$n"M 300k "$n"
    state[n]=$(content disk.qcow2)
    at "$1" run_expect 0 lbvm backup --json web1 vda=disk.qcow2
    id[n]=$(jq -r .id <<<"$output")
    made[n]=$(jq .time <<<"$output")
}

# expect_restored N [OPTION]...
expect_restored() {
    rm -rf restored
    run_expect 0 lbvm restore -q -o restored web1 "${@:2}"
    expect_content "${state[$1]}" restored/disk.qcow2
}

setup() {
    helpers_setup
    new_disk disk.qcow2 16M
    n=0
    backup 0
    for seconds in $day $((-20 * day)) $((-20 * day)) $((3 * day)) 0; do
        backup $seconds
        expect_stderr ''
    done
}

listed() {
    lbvm list --json web1 | jq -r '.backups[].id' | paste -sd' '
}

@test "backups go on as incrementals, and are listed as they were made" {
    vmrepo check repo
    [ $((made[1] - made[3])) -gt $((19 * day)) ]
    [ "$(listed)" = "${id[*]}" ]
    [ "$(jq -s 'sort_by(.sequence) | [.[] | .disks[0].parent != null]' -c \
        repo/web1/backups/*.json)" = '[false,true,true,true,true,true]' ]
    [ "$(jq -s 'sort_by(.sequence) | [.[].id] | join(" ")' -r \
        repo/web1/backups/*.json)" = "${id[*]}" ]
    expect_restored 6
    for k in 1 2 3 4 5; do
        expect_restored $k "${id[$k]}"
    done
    run_expect 0 lbvm verify
}

@test "restore by time goes by what the clock said" {
    expect_restored 4 --at="$(date -u -d "@$((made[4] + 5 * day))" '+%F %T')"
    expect_restored 2 --at="$(date -u -d "@$((made[2] + 3600))" '+%F %T')"
    expect_restored 5 --at="$(date -u -d "@$((made[5] + 3600))" '+%F %T')"
}

@test "a pruning spares what was made last, whatever the clock says" {
    run_expect 0 lbvm prune --keep-last=1 web1
    # the newest by the clock, and the newest
    [ "$(listed)" = "${id[5]} ${id[6]}" ]
    vmrepo check repo
    expect_restored 6
    expect_restored 5 "${id[5]}"
    backup $((-30 * day))
    [ "$(lbvm show --json web1 | jq '.disks[0].parent != null')" = true ]
    expect_restored 7
}

@test "the clock goes back while a backup is made" {
    qemu_write disk.qcow2 9M 300k 77
    n=$((n + 1))
    state[n]=$(content disk.qcow2)
    QLB_FAULT_CLOCK_STEP=-100000 at 0 run_expect 0 lbvm backup --json web1 \
        vda=disk.qcow2
    [ "$(jq '.finished < .time' <<<"$output")" = true ]
    vmrepo check repo
    expect_restored $n
    backup 0
    expect_restored $n
    run_expect 0 lbvm verify
}
