# lbvm backup of a machine in a stock QEMU, that of the distribution: dirty bitmaps,
# fleecing, NBD. The processor stands still; the monitor writes as the guest would,
# for which the devices share their disks.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm

setup() {
    helpers_setup
    # sockets have short paths
    folder=$(mktemp -d /tmp/lbvm.XXXXXX)
    ln -s "$folder" s
}

teardown() {
    if [ -s pid ]; then
        kill -KILL "$(<pid)" || true
        wait "$(<pid)" || true
    fi 2>/dev/null
    rm -rf "$folder"
}

# start: QEMU with the disks vda (a drive) and vdb (a node), and two monitors.
start() {
    rm -f s/qmp s/second
    qemu-system-x86_64 -S -machine pc,accel=tcg -m 32 -display none -nodefaults \
        -chardev socket,id=m0,path=s/qmp,server=on,wait=off \
        -mon chardev=m0,mode=control \
        -chardev socket,id=m1,path=s/second,server=on,wait=off \
        -mon chardev=m1,mode=control -object iothread,id=io \
        -drive if=none,id=vda,format=qcow2,file="$PWD/vda.qcow2" \
        -device virtio-blk-pci,drive=vda,share-rw=on,id=dev-vda \
        -blockdev driver=qcow2,node-name=vdb,file.driver=file,file.filename="$PWD/vdb.qcow2" \
        -device virtio-blk-pci,drive=vdb,iothread=io,share-rw=on,id=dev-vdb \
        >qemu.out 2>&1 </dev/null 3>&- 4>&- &
    echo $! >pid
    for ((i = 0; i < 400; i++)); do
        [ ! -S s/second ] || return 0
        sleep 0.05
    done
    fail "QEMU does not start:" "$(cat qemu.out)"
}

stop() {
    local pid
    pid=$(<pid)
    rm pid
    monitor '{"execute": "quit"}' >/dev/null
    while kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
}

# monitor COMMAND...: over the second monitor; answers, one a line.
monitor() {
    "$ORACLE_PYTHON" -c '
import json, socket, sys
with socket.socket(socket.AF_UNIX) as s:
    s.connect("s/second")
    with s.makefile("rw", encoding="utf-8") as f:
        f.readline()
        for command in [json.dumps({"execute": "qmp_capabilities"})] + sys.argv[1:]:
            f.write(command + "\n")
            f.flush()
            answer = {"event": 1}
            while "event" in answer:
                answer = json.loads(f.readline())
            print(json.dumps(answer))
' "$@"
}

# guest DISK COMMAND: a command of qemu-io; and on the model of the disk.
guest() {
    local answer
    answer=$(monitor "$(jq -nc --arg line "qemu-io -d /machine/peripheral/dev-$1/virtio-backend \"$2\"" \
        '{execute: "human-monitor-command", arguments: {"command-line": $line}}')" |
        tail -n 1)
    [ "$(jq -r .return <<<"$answer")" = '' ] || fail "$2: $answer"
    qemu-io -f raw -c "$2" "$1.model" >/dev/null
}

machine() {
    for disk in vda vdb; do
        qemu-img create -q -f qcow2 $disk.qcow2 40M
        truncate -s 40M $disk.model
    done
    start
    guest vda 'write -P 1 0 5M'
    guest vdb 'write -P 2 1M 9M'
}

backup() {
    run_expect 0 lbvm backup web1 --qmp=s/qmp "$@"
}

kinds() {
    lbvm show --json web1 |
        jq -r '[.disks[] | if .parent then "incremental" else "full" end] |
               join(" ")'
}

# expect_disk DISK [RAW]: the newest backup of it restores to the model.
expect_disk() {
    local chain
    vmrepo check repo
    mapfile -t chain < <(vmrepo chain repo web1 \
        "$(lbvm show --json web1 | jq -r .id)" "$1")
    good_archives "${chain[@]}"
    run_expect 0 lbrestore --quiet --force -o restored.raw "${chain[@]}"
    cmp restored.raw "${2:-$1.model}"
}

# The second disk's export is there: the point in time has been.
until_begun() {
    for ((i = 0; i < 400; i++)); do
        if monitor '{"execute": "query-block-exports"}' | grep -q 'lbvm-.*-1"'; then
            return
        fi
        sleep 0.05
    done
    fail "no backup begins:" "$(cat log)"
}

# Nothing of the backup remains in QEMU, nor beside the images.
expect_nothing_left() {
    [ "$(monitor '{"execute": "query-jobs"}' | tail -n 1)" = '{"return": []}' ]
    [ "$(monitor '{"execute": "query-block-exports"}' | tail -n 1)" = '{"return": []}' ]
    monitor '{"execute": "query-named-block-nodes"}' | tail -n 1 >nodes
    [ "$(jq '[.return[]."node-name" | select(startswith("lbvm"))] | length' nodes)" = 0 ]
    [ "$(find . -name '.lbvm*')" = '' ]
}

bitmaps() {
    monitor '{"execute": "query-named-block-nodes"}' | tail -n 1 |
        jq -r '[.return[]."dirty-bitmaps" // [] | .[].name] | unique | .[]'
}

@test "in full, then what has changed; one bitmap stays for each disk" {
    machine
    backup
    expect_disk vda
    expect_disk vdb
    for i in 3 4 5; do
        guest vda "write -P $i ${i}M 300k"
        guest vdb "write -z ${i}M 100k"
        backup
        expect_stderr ''
        [ "$(kinds)" = 'incremental incremental' ]
        expect_disk vda
        expect_disk vdb
        expect_nothing_left
        [ "$(bitmaps | wc -l)" = 2 ]
    done
    stop
    qemu_check vda.qcow2
}

@test "the point in time is exact while the guest writes" {
    machine
    backup
    guest vda 'write -P 3 2M 4M'
    guest vdb 'write -P 4 2M 4M'
    cp vda.model vda.then
    cp vdb.model vdb.then
    lbvm backup web1 --qmp=s/qmp --rate-limit=4M >log 2>&1 3>&- 4>&- &
    lbvm=$!
    until_begun
    for i in 1 2 3 4 5 6 7 8 9; do
        guest vda "write -P 9 ${i}M 300k"
        guest vdb "write -P 9 ${i}500k 100k"
    done
    wait $lbvm
    expect_disk vda vda.then
    expect_disk vdb vdb.then
    backup
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
    expect_disk vdb
}

@test "the chain goes on over restarts of the guest" {
    machine
    backup
    guest vda 'write -P 3 7M 1M'
    stop
    start
    guest vda 'write -P 4 9M 1M'
    backup
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
    stop
}

@test "a stopped machine is one in full, and the chain goes on after it" {
    machine
    backup
    stop
    run_expect 0 lbvm backup web1 vda.qcow2 vdb.qcow2
    start
    guest vda 'write -P 4 9M 1M'
    backup
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
}

@test "two repositories have bitmaps of their own" {
    machine
    backup
    LBVM_REPOSITORY=weekly run_expect 0 lbvm backup web1 --qmp=s/qmp
    for i in 1 2; do
        guest vda "write -P 4 ${i}M 1M"
        backup
        [ "$(kinds)" = 'incremental incremental' ]
    done
    LBVM_REPOSITORY=weekly run_expect 0 lbvm backup web1 --qmp=s/qmp
    expect_stderr ''
    [ "$(bitmaps | wc -l)" = 4 ]
    expect_disk vda
}

@test "a bitmap that is gone: in full, with the reason" {
    machine
    backup
    monitor "$(jq -nc --arg name "$(bitmaps | head -n 1)" '{execute:
        "block-dirty-bitmap-remove", arguments: {node: "vdb", name: $name}}')" \
        "$(jq -nc --arg name "$(bitmaps | tail -n 1)" '{execute:
        "block-dirty-bitmap-remove", arguments: {node: "vdb", name: $name}}')" \
        >removed
    backup
    expect_stderr 'lbvm: web1: vdb: a full backup: the image has no checkpoint of a backup in the repository that can be trusted'
    [ "$(kinds)" = 'incremental full' ]
    expect_disk vdb
}

@test "QEMU is killed meanwhile: no backup, and the next is in full" {
    machine
    backup
    lbvm backup --full web1 --qmp=s/qmp --rate-limit=1M >log 2>&1 3>&- 4>&- &
    lbvm=$!
    until_begun
    kill -KILL "$(<pid)"
    status=0
    wait $lbvm || status=$?
    [ $status = 1 ] || fail "$(cat log)"
    [ "$(lbvm list --json web1 | jq '.backups | length')" = 1 ]
    rm pid
    # what QEMU had not written yet is lost
    for disk in vda vdb; do
        qemu-img convert -f qcow2 -O raw $disk.qcow2 $disk.then
    done
    start
    backup
    [ "$(kinds)" = 'full full' ]
    expect_disk vda vda.then
    expect_disk vdb vdb.then
    [ "$(find . -name '.lbvm*')" = '' ]
}

@test "lbvm is killed meanwhile: the next one clears what is left" {
    machine
    backup
    guest vda 'write -P 3 2M 4M'
    lbvm backup --full web1 --qmp=s/qmp --rate-limit=1M >log 2>&1 3>&- 4>&- &
    lbvm=$!
    until_begun
    LBVM_REPOSITORY=other run_expect 5 lbvm backup web1 --qmp=s/second
    expect_stderr 'lbvm: clearing what a backup has left: another lbvm is backing up this machine; try again when that has ended'
    kill -KILL $lbvm
    wait $lbvm || true
    backup
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
    expect_nothing_left
}

@test "an NBD server of somebody else is left alone" {
    machine
    monitor '{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "s/nbd"}}}}' >/dev/null
    run_expect 5 lbvm backup web1 --qmp=s/qmp
    expect_stderr "lbvm: QEMU's NBD server is used by somebody else, as by a migration; try again when that has ended"
    [ -S s/nbd ]
    monitor '{"execute": "nbd-server-stop"}' >/dev/null
    expect_nothing_left
    backup
    expect_disk vda
}

@test "no room for the archives: no backup, and nothing is left" {
    machine
    backup
    guest vda 'write -P 3 2M 4M'
    head -c 300000 /dev/urandom >noise
    guest vda "write -s $PWD/noise 4M 300000"
    run_expect 1 bash -c 'ulimit -f 16; exec lbvm backup web1 --qmp=s/qmp'
    expect_nothing_left
    [ "$(lbvm list --json web1 | jq '.backups | length')" = 1 ]
    backup
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
}

@test "only the disks that are asked for" {
    machine
    backup --disk=vdb
    [ "$(lbvm show --json web1 | jq -r '[.disks[].name] | join(" ")')" = vdb ]
    run_expect 1 lbvm backup web1 --qmp=s/qmp --disk=nobody
    expect_stderr 'lbvm: nobody: QEMU has no such disk'
    run_expect 2 lbvm backup --durable web1 --qmp=s/qmp
    expect_stderr_has '--durable wants a QEMU with livebackup'
}

# through N HOW: a backup whose monitor goes wrong at the N-th command; its
# status in $status, the number of commands in $commands.
through() {
    rm -f s/proxy lbvm.pid commands
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/cli/qmpproxy.py" s/proxy s/qmp \
        "$1" "$2" lbvm.pid >commands 2>proxy.err </dev/null 3>&- 4>&- &
    local proxy=$! i
    for ((i = 0; i < 400; i++)); do
        [ ! -S s/proxy ] || break
        sleep 0.02
    done
    status=0
    bash -c 'echo $$ >lbvm.pid; exec lbvm backup web1 --qmp=s/proxy' \
        >through.out 2>through.err </dev/null 3>&- 4>&- || status=$?
    wait $proxy || fail "$(cat proxy.err)"
    commands=$(<commands)
}

# every FIRST STEP HOW STATUSES CHECK: at each STEP-th command of a backup, from
# the FIRST on (at each one in nightly tests), what is left stands the CHECK.
every() {
    local n=$1 step=$2
    if [ -n "${QLB_NIGHTLY:-}" ]; then
        n=1 step=1
    fi
    while :; do
        guest vda "write -P $((n % 200 + 1)) ${n}00k 100k"
        through $n "$3"
        if [ "$commands" -lt $n ]; then
            [ $status = 0 ] || fail "$(cat through.err)"
            [ $n -gt 40 ]
            return
        fi
        case " $4 " in
            *" $status "*) ;;
            *) fail "command $n: status $status" "$(cat through.err)" ;;
        esac
        "$5" $n
        n=$((n + step))
    done
}

nothing_left() {
    expect_nothing_left ||
        fail "command $1:" "$(cat nodes through.err)" "$(ls -A)"
}

# Where it was the cleaning up that went wrong, the next one does it.
nothing_left_now() {
    if grep -q 'could not be confirmed' through.err; then
        nothing_left_after_next "$1"
    else
        nothing_left "$1"
        [ "$(bitmaps | wc -l)" = 2 ] || fail "command $1:" "$(bitmaps)"
    fi
}

nothing_left_after_next() {
    backup
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    nothing_left "$1"
    [ "$(bitmaps | wc -l)" = 2 ] || fail "command $1:" "$(bitmaps)"
}

@test "QEMU refuses a command, whichever: nothing is left" {
    machine
    backup
    every 1 1 refuse '0 1 5' nothing_left_now
    expect_disk vda
}

@test "lbvm is told to stop at any command: nothing is left" {
    machine
    backup
    every 1 2 term '0 1' nothing_left_now
    expect_disk vda
}

@test "lbvm is killed at any command: the next one clears what is left" {
    machine
    backup
    every 1 2 kill '137' nothing_left_after_next
    expect_disk vda
}

@test "the connection is lost at any command: the next one clears what is left" {
    machine
    backup
    every 2 3 unanswered '0 1' nothing_left_after_next
    expect_disk vda
}

@test "lbvm and QEMU are killed: the scratch folder goes with the next backup" {
    machine
    backup
    guest vda 'write -P 3 2M 4M'
    lbvm backup --full web1 --qmp=s/qmp --rate-limit=1M >log 2>&1 3>&- 4>&- &
    lbvm=$!
    until_begun
    kill -KILL $lbvm "$(<pid)"
    wait $lbvm || true
    rm pid
    start
    backup
    expect_nothing_left
    [ "$(bitmaps | wc -l)" = 2 ]
}

resize() {
    [ "$(monitor "{\"execute\": \"block_resize\", \"arguments\": {\"node-name\": \"$1\", \"size\": $(($2 << 20))}}" |
        tail -n 1)" = '{"return": {}}' ]
    truncate -s "$2M" vdb.model
}

@test "a disk that was shrunk and has grown again: in full, with the reason" {
    machine
    guest vdb 'write -P 7 30M 2M'
    backup
    resize vdb 20
    resize vdb 40
    backup
    expect_stderr 'lbvm: web1: vdb: a full backup: the disk was shrunk since, or its bitmap cleared'
    [ "$(kinds)" = 'incremental full' ]
    expect_disk vdb
    backup
    [ "$(kinds)" = 'incremental incremental' ]
    resize vdb 60
    backup
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vdb
    resize vdb 30
    backup
    [ "$(kinds)" = 'incremental full' ]
    expect_disk vdb
}

@test "a bitmap that was cleared: in full, with the reason" {
    machine
    backup
    guest vdb 'write -P 7 30M 2M'
    name=$(monitor '{"execute": "query-named-block-nodes"}' | tail -n 1 |
        jq -r '.return[] | select(."node-name" == "vdb") | ."dirty-bitmaps"[].name')
    monitor "{\"execute\": \"block-dirty-bitmap-clear\", \"arguments\": {\"node\": \"vdb\", \"name\": \"$name\"}}" >/dev/null
    backup
    expect_stderr 'lbvm: web1: vdb: a full backup: the disk was shrunk since, or its bitmap cleared'
    [ "$(kinds)" = 'incremental full' ]
    expect_disk vdb
}
