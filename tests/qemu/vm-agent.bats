# lbvm freezes a guest for the point in time, and the guest's agent dies, hangs or
# lies: the guest never stays frozen, nothing is left in QEMU, and the next backup is
# incremental. fakeagent.py plays the agent, of a machine in a QEMU.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu
load ../cli/backup
load ../cli/vm
load machine

freeze=guest-fsfreeze-freeze
thaw=guest-fsfreeze-thaw

setup() {
    machine_setup
}

teardown() {
    machine_teardown
}

# machine KIND: it was backed up, and has changed since.
machine() {
    use "$1"
    new_disks 16M a
    launch qemu -S -m 32 -device virtio-scsi-pci,id=bus \
        -blockdev driver=qcow2,node-name=a,file.driver=file,file.filename="$PWD/a.qcow2" \
        -device scsi-hd,drive=a,id=dev-a,share-rw=on
    write 1
    backup
    write 2
}

write() {
    [ "$(ask qemu human-monitor-command "{\"command-line\":
        \"qemu-io -d dev-a \\\"write -P $1 $1M 1M\\\"\"}")" = '""' ]
}

# agent [OPTION]...: instead of the one before.
agent() {
    if [ -s agent.pid ]; then
        kill -KILL "$(<agent.pid)"
        await ended agent
    fi
    rm -f agent agent.log
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/cli/fakeagent.py" agent "$@" \
        >>agent.out 2>&1 </dev/null 3>&- 4>&- &
    echo $! >agent.pid
    await test -S agent
}

thawed() {
    [ "$(grep '^now' agent.log | tail -n 1)" = 'now thawed' ]
}

was_frozen() {
    grep -q '^now frozen' agent.log
}

# refused MESSAGE OPTION...: an agent, for which no backup is made.
refused() {
    local n
    n=$(n_backups)
    agent "${@:2}"
    run_expect 1 lbvm backup web1 --qmp=s/qemu --quiesce=require --agent=agent
    expect_stderr "lbvm: $1"
    await thawed
    [ "$(n_backups)" = "$n" ]
    expect_nothing_left qemu
}

# accepted MESSAGE OPTION...: an agent, for which the backup is not quiesced.
accepted() {
    agent "${@:2}"
    run_expect 0 lbvm backup web1 --qmp=s/qemu --quiesce=try --agent=agent
    expect_stderr "lbvm: $1"
    await thawed
    [ "$(lbvm show --json web1 | jq .quiesced)" = false ]
    expect_nothing_left qemu
}

goes_on() {
    agent
    run_expect 0 lbvm backup web1 --qmp=s/qemu --quiesce=require --agent=agent
    expect_stderr ''
    was_frozen
    thawed
    [ "$(lbvm show --json web1 | jq .quiesced)" = true ]
    [ "$(kinds)" = incremental ]
    expect_nothing_left qemu
}

# as guests' agents fail; after each of it all is well again
fails() {
    local gone='agent: the connection to the guest agent was closed'
    local maybe="the guest's file systems may still be frozen"
    local lost="agent: the guest's file systems were thawed by somebody else"
    local no="{\"error\": {\"desc\": \"no\"}}"
    local on='going on without freezing the guest'
    machine "$1"
    refused "$gone" --close-at $freeze
    refused "$maybe: $gone" --close-at $thaw
    refused "agent: $freeze: no" --answer "$freeze=$no"
    refused "$maybe: agent: $thaw: no" --answer "$thaw=$no"
    refused "$lost" --thaws-itself
    goes_on
    accepted "$gone; $on" --close-at $freeze
    accepted "agent: $freeze: no; $on" --answer "$freeze=$no"
    accepted "web1: $lost" --thaws-itself
    goes_on
}

# proxy HOW: a monitor s/proxy, which does so at the point in time.
proxy() {
    local command=transaction
    [ $kind != patched ] || command=livebackup-begin
    rm -f go-on s/proxy
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/cli/qmpproxy.py" s/proxy s/qemu \
        $command "$1" lbvm.pid >/dev/null 2>proxy.err </dev/null 3>&- 4>&- &
    await test -S s/proxy
}

# freezing_backup [OPTION]...: through the proxy; it goes on.
freezing_backup() {
    agent
    bash -c 'echo $$ >lbvm.pid; exec lbvm backup web1 --qmp=s/proxy \
        --quiesce=require --agent=agent "$@"' freezing_backup "$@" \
        >lbvm.out 2>lbvm.err </dev/null 3>&- 4>&- &
    lbvm=$!
    await was_frozen
}

# ended_with STATUS
ended_with() {
    status=0
    wait $lbvm || status=$?
    rm lbvm.pid
    [ $status = "$1" ] || fail "lbvm ends with $status:" "$(cat lbvm.err)"
    [ "$(n_backups)" = 1 ]
}

# QEMU's answer takes longer than the guest may be frozen.
hangs() {
    machine "$1"
    proxy late
    freezing_backup --freeze-limit=1
    await thawed
    touch go-on
    ended_with 1
    [ "$(<lbvm.err)" = 'lbvm: agent: the guest was thawed after 1 second, the time limit' ]
    expect_nothing_left qemu
    goes_on
}

# lbvm is killed at the point in time, the guest frozen.
killed() {
    machine "$1"
    proxy kill
    freezing_backup --freeze-limit=600
    await thawed
    ended_with 137
    [ "$1" != patched ] || ask qemu livebackup-end "{success: false, \"job-id\":
        $(ask qemu query-livebackup | jq '.[0]."job-id"')}" >/dev/null
    goes_on
}

@test "patched QEMU: the agent dies, refuses and lies" {
    with_each fails patched
}

@test "stock QEMU: the agent dies, refuses and lies" {
    with_each fails stock stock-10
}

@test "patched QEMU: thawed in time, where QEMU hangs" {
    with_each hangs patched
}

@test "stock QEMU: thawed in time, where QEMU hangs" {
    with_each hangs stock stock-10
}

@test "patched QEMU: thawed at once, where lbvm is killed" {
    with_each killed patched
}

@test "stock QEMU: thawed at once, where lbvm is killed" {
    with_each killed stock stock-10
}
