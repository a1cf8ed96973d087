# lbvm --metrics: what monitoring is told of each command.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm

setup() {
    helpers_setup
    unset LBVM_METRICS
}

# value NAME [LABEL=VALUE]...: of the one sample that has these labels.
value() {
    local line pattern="^$1{" label
    shift
    line=$(grep "$pattern" m.prom)
    for label; do
        line=$(grep -F "${label%%=*}=\"${label#*=}\"" <<<"$line")
    done
    [ "$(wc -l <<<"$line")" -eq 1 ]
    printf '%s\n' "${line##* }"
}

@test "backup, verify and prune tell how they ended" {
    new_disk vda.qcow2 2M
    for _ in 1 2 3; do
        run_expect 0 lbvm backup -q --metrics m.prom web1 vda.qcow2
    done
    begun=$(lbvm show --json web1 | jq .time)
    [ "$(value lbvm_last_success_timestamp_seconds command=backup)" -ge "$begun" ]
    [ "$(value lbvm_last_status "repository=$PWD/repo" machine=web1)" = 0 ]
    [ "$(value lbvm_chain_length disk=vda)" = 3 ]
    [ "$(value lbvm_backup_bytes disk=vda)" = \
        "$(lbvm show --json web1 | jq '.disks[0].bytes')" ]
    value lbvm_backup_duration_seconds machine=web1
    # all machines, and the repository by another name
    run_expect 0 lbvm verify -q --metrics m.prom --repository ./repo/
    [ "$(value lbvm_last_status command=verify)" = 0 ]
    [ "$(value lbvm_last_verified_timestamp_seconds machine=web1)" -ge "$begun" ]
    run_expect 0 lbvm prune -q --metrics m.prom --keep-last 1 --dry-run
    run_expect 1 grep -q 'command="prune"' m.prom
    run_expect 0 lbvm prune -q --metrics m.prom --keep-last 1
    [ "$(value lbvm_last_status command=prune)" = 0 ]
    [ "$(value lbvm_chain_length disk=vda)" = 1 ]
    [ "$(grep -c '^lbvm_last_status{' m.prom)" = 3 ]
}

@test "a failure is told, and the last success stays" {
    new_disk vda.qcow2 2M
    export LBVM_METRICS=m.prom
    run_expect 0 lbvm backup -q web1 vda.qcow2
    was=$(value lbvm_last_success_timestamp_seconds command=backup)
    run_expect 1 lbvm backup -q web1 missing.qcow2
    [ "$(value lbvm_last_status command=backup)" = 1 ]
    [ "$(value lbvm_last_success_timestamp_seconds command=backup)" = "$was" ]
    [ "$(value lbvm_chain_length disk=vda)" = 1 ]
    truncate -s 100 repo/web1/archives/*
    run_expect 4 lbvm verify -q web1
    [ "$(value lbvm_last_status command=verify)" = 4 ]
    run_expect 1 grep -q lbvm_last_verified m.prom
    exec {lock}>repo/web1/backup.lock
    flock -x "$lock"
    run_expect 5 lbvm backup -q web1 vda.qcow2
    [ "$(value lbvm_last_status command=backup)" = 5 ]
    exec {lock}>&-
    # a repository that is gone
    mv repo gone
    : >repo
    run_expect 1 lbvm backup -q web1 vda.qcow2
    [ "$(value lbvm_last_status command=backup)" = 1 ]
    run_expect 1 lbvm verify -q web1
    [ "$(value lbvm_last_status command=verify)" = 1 ]
    run_expect 1 lbvm prune -q --keep-last=1 web1
    [ "$(value lbvm_last_status command=prune)" = 1 ]
    # a machine that is not in there
    rm repo
    mv gone repo
    run_expect 4 lbvm verify -q web1
    run_expect 1 lbvm verify -q web2
    [ "$(value lbvm_last_status machine=web2 command=verify)" = 1 ]
}

@test "a file that can't be written is no success, and the backup is there" {
    new_disk vda.qcow2 2M
    run_expect 1 lbvm backup -q --metrics no/m.prom web1 vda.qcow2
    expect_stderr 'lbvm: no/m.prom: No such file or directory'
    [ "$(lbvm list --json web1 | jq '.backups | length')" = 1 ]
    # nothing is asked for
    LBVM_METRICS='' run_expect 0 lbvm backup -q web1 vda.qcow2
}
