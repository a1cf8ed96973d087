# A machine in a stock QEMU, that of the distribution. Its processor stands still;
# the monitor writes as the guest would, for which the devices share their disks.
# A test begins with
#     load helpers
#     load backup
#     load vm
#     load stock
# and has a setup of its own that begins with stock_setup, and a function backup,
# which runs lbvm with the options in the array way.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
#
# shellcheck shell=bash disable=SC2154

# Sockets have short paths: ./s is a folder with one. The images are in $images,
# where QEMU runs; it knows that folder as $images_there.
stock_setup() {
    helpers_setup
    folder=$(mktemp -d /tmp/lbvm.XXXXXX)
    ln -s "$folder" s
    images=$PWD
    images_there=$PWD
    way=()
}

stock_teardown() {
    if [ -s pid ]; then
        kill -KILL "$(<pid)" || true
        wait "$(<pid)" || true
    fi 2>/dev/null
    rm -rf "$folder"
}

teardown() {
    stock_teardown
}

# start [OPTION]...: QEMU with the disks vda (a drive) and vdb (a node), and two
# monitors. vdb is in an iothread, where QEMU can export such a disk, or `thread`
# says so.
start() {
    rm -f s/qmp s/second
    case $(qemu-system-x86_64 --version) in
        *' version '[78].*) ;;
        *) thread=,iothread=io ;;
    esac
    (cd "$images" && exec qemu-system-x86_64 -S -machine pc,accel=tcg -m 32 \
        -display none -nodefaults \
        -chardev socket,id=m0,path="$folder"/qmp,server=on,wait=off \
        -mon chardev=m0,mode=control \
        -chardev socket,id=m1,path="$folder"/second,server=on,wait=off \
        -mon chardev=m1,mode=control -object iothread,id=io \
        -drive if=none,id=vda,format=qcow2,file="$images_there/vda.qcow2" \
        -device virtio-blk-pci,drive=vda,share-rw=on,id=dev-vda \
        -blockdev driver=qcow2,node-name=vdb,file.driver=file,file.filename="$images_there/vdb.qcow2" \
        -device virtio-blk-pci,drive=vdb$thread,share-rw=on,id=dev-vdb "$@") \
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

# machine [OPTION]...: that, with new disks.
machine() {
    for disk in vda vdb; do
        qemu-img create -q -f qcow2 "$images/$disk.qcow2" 40M
        truncate -s 40M $disk.model
    done
    start "$@"
    guest vda 'write -P 1 0 5M'
    guest vdb 'write -P 2 1M 9M'
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

# begin_backup OPTION...: a backup that is at work, and its point in time has
# been: its process in $lbvm, what it says in log.
begin_backup() {
    lbvm backup web1 "$@" >log 2>&1 </dev/null 3>&- 4>&- &
    lbvm=$!
    until_begun
}

# expect_incrementals CHECK: in full, then what has changed, each disk; after each
# backup the CHECK holds, and one bitmap stays for each disk.
expect_incrementals() {
    local step
    backup
    expect_disk vda
    expect_disk vdb
    for step in 3 4 5; do
        guest vda "write -P $step ${step}M 300k"
        guest vdb "write -z ${step}M 100k"
        backup
        expect_stderr ''
        [ "$(kinds)" = 'incremental incremental' ]
        expect_disk vda
        expect_disk vdb
        "$1"
        [ "$(bitmaps | wc -l)" = 2 ]
    done
    stop
    qemu_check "$images/vda.qcow2"
}

# expect_exact_point CHECK: what the guest writes while a backup runs is in the
# next one, and not in it; the CHECK holds in between.
expect_exact_point() {
    local step
    backup
    guest vda 'write -P 3 2M 4M'
    guest vdb 'write -P 4 2M 4M'
    cp vda.model vda.then
    cp vdb.model vdb.then
    begin_backup --qmp=s/qmp "${way[@]}" --rate-limit=4M
    for step in 1 2 3 4 5 6 7 8 9; do
        guest vda "write -P 9 ${step}M 300k"
        guest vdb "write -P 9 ${step}500k 100k"
    done
    wait $lbvm
    expect_disk vda vda.then
    expect_disk vdb vdb.then
    "$1"
    backup
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
    expect_disk vdb
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

# through N HOW [OPTION]...: a backup whose monitor goes wrong at the N-th command; its
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
    bash -c 'echo $$ >lbvm.pid; exec lbvm backup web1 --qmp=s/proxy "$@"' \
        through "${way[@]}" "${@:3}" \
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
        through "$n" "$3"
        if [ "$commands" -lt "$n" ]; then
            [ "$status" = 0 ] || fail "$(cat through.err)"
            [ "$n" -gt 40 ]
            return
        fi
        case " $4 " in
            *" $status "*) ;;
            *) fail "command $n: status $status" "$(cat through.err)" ;;
        esac
        "$5" "$n"
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
