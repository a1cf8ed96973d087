# A machine of two disks in a QEMU, the patched one or a stock one, that lbvm backs
# up while it runs. A test begins with
#     load qemu             # in other folders: load ../qemu/qemu
#     load ../cli/backup
#     load ../cli/vm
#     load machine
# and has its claims tried by with_each.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

machine_setup() {
    helpers_setup
    folder=''
}

# with_each CLAIM KIND...: the claim, with a machine of each kind in a folder of its
# own. A stock QEMU 10 beside that of the distribution only by night.
with_each() {
    local claim=$1
    for kind in "${@:2}"; do
        if [ $kind = stock-10 ] && [ -z "${QLB_NIGHTLY:-}" ]; then
            continue
        fi
        mkdir $kind
        cd $kind
        # sockets have short paths
        folder=$(mktemp -d /tmp/lbvm.XXXXXX)
        ln -s "$folder" s
        $claim $kind
        machine_teardown
        cd ..
    done
}

machine_teardown() {
    local file
    for file in *.pid; do
        if [ -s "$file" ]; then
            kill -KILL "$(<"$file")" || true
            wait "$(<"$file")" || true
        fi
    done 2>/dev/null
    rm -rf ${folder:+"$folder"}
}

# use KIND: of QEMU: patched, stock (that of the distribution, which is the one in PATH) or
# stock-10.
use() {
    kind=$1
    disk_options=()
    case $kind in
        patched)
            qemu=$QLB_QEMU/qemu-system-x86_64
            disk_options=(-o livebackup=on)
            ;;
        stock) qemu=qemu-system-x86_64 ;;
        stock-10) qemu=$QLB_STOCK_QEMU_10/qemu-system-x86_64 ;;
    esac
}

# new_disks SIZE NAME...
new_disks() {
    local name img=qemu-img
    [ $kind != patched ] || img=$QLB_QEMU/qemu-img
    for name in "${@:2}"; do
        "$img" create -q -f qcow2 "${disk_options[@]}" "$name.qcow2" "$1"
    done
}

# launch NAME OPTION...: a QEMU with two monitors, s/NAME for lbvm and s/NAME-2,
# and NAME.pid.
launch() {
    local name=$1
    rm -f "s/$name" "s/$name-2"
    # a QEMU that was not installed finds its firmware there
    "$qemu" -L /usr/share/seabios -L /usr/share/qemu -nodefaults \
        -no-user-config -display none -machine pc,accel=tcg \
        -chardev "socket,id=m0,path=s/$name,server=on,wait=off" \
        -mon chardev=m0,mode=control \
        -chardev "socket,id=m1,path=s/$name-2,server=on,wait=off" \
        -mon chardev=m1,mode=control "${@:2}" \
        >>"$name.out" 2>&1 </dev/null 3>&- 4>&- &
    echo $! >"$name.pid"
    await test -S "s/$name-2" || fail "QEMU does not start:" "$(cat "$name.out")"
}

# await COMMAND...: until it succeeds.
await() {
    local i
    for ((i = 0; i < 2400; i++)); do
        if "$@" 2>/dev/null; then
            return
        fi
        sleep 0.05
    done
    fail "in vain: $*"
}

# ended NAME: that QEMU, or lbvm, is no more.
ended() {
    ! kill -0 "$(<"$1.pid")"
}

# kill_machine NAME: as the host's OOM killer does.
kill_machine() {
    kill -KILL "$(<"$1.pid")"
    await ended "$1"
    rm "$1.pid"
}

# quit_machine NAME: in order.
quit_machine() {
    monitor "$1" '{"execute": "quit"}' >/dev/null
    await ended "$1"
    rm "$1.pid"
}

# monitor NAME COMMAND...: over the second monitor; prints what the last returns.
monitor() {
    "$ORACLE_PYTHON" -c '
import json, socket, sys
with socket.socket(socket.AF_UNIX) as s:
    s.connect(sys.argv[1])
    with s.makefile("rw", encoding="utf-8") as f:
        f.readline()
        for command in [json.dumps({"execute": "qmp_capabilities"})] + sys.argv[2:]:
            f.write(command + "\n")
            f.flush()
            answer = {"event": 1}
            while "event" in answer:
                answer = json.loads(f.readline())
            if "error" in answer:
                sys.exit(command + ": " + answer["error"]["desc"])
print(json.dumps(answer["return"]))
' "s/$1-2" "${@:2}"
}

# ask NAME COMMAND [ARGUMENTS]: of QMP, with arguments as jq writes objects.
ask() {
    monitor "$1" "$(jq -nc --arg command "$2" \
        "{execute: \$command, arguments: ${3:-{\}}}")"
}

# ------------------------------------------------------------------- backups

# backup [OPTION]...: of the QEMU `qemu`.
backup() {
    run_expect 0 lbvm backup web1 --qmp=s/qemu "$@"
}

# begin_backup [OPTION]...: it waits when the point in time has been, until
# end_backup STATUS. In `stderr` is what it said.
begin_backup() {
    rm -f begun go-on
    lbvm backup web1 --qmp=s/qemu --hook='[ $LBVM_EVENT != post-thaw ] || {
        touch begun; until [ -e go-on ]; do sleep 0.02; done; }' "$@" \
        >lbvm.log 2>lbvm.err </dev/null 3>&- 4>&- &
    echo $! >lbvm.pid
    await test -e begun || fail "no backup begins:" "$(cat lbvm.err)"
}

end_backup() {
    local status=0
    touch go-on
    wait "$(<lbvm.pid)" || status=$?
    rm lbvm.pid
    stderr=$(<lbvm.err)
    [ "$status" = "$1" ] || fail "lbvm ends with $status:" "$stderr"
}

# n_backups: how many there are.
n_backups() {
    lbvm list --json web1 | jq '.backups | length'
}

# In the order of the disks' names.
kinds() {
    lbvm show --json web1 |
        jq -r '[.disks | sort_by(.name)[] | if .parent then "incremental" else "full" end] |
               join(" ")'
}

# expect_nothing_left NAME: of a backup, in QEMU and beside the images.
expect_nothing_left() {
    [ "$(ask "$1" query-jobs)" = '[]' ]
    [ "$(ask "$1" query-block-exports)" = '[]' ]
    [ $kind != patched ] || [ "$(ask "$1" query-livebackup)" = '[]' ]
    ask "$1" query-named-block-nodes >nodes
    [ "$(jq -c '[.[]."node-name" | select(startswith("lbvm"))]' nodes)" = '[]' ]
    # one bitmap for each disk that has one
    [ $kind = patched ] || [ "$(jq '[.[] | select(."dirty-bitmaps" | length > 1)] |
        length' nodes)" = 0 ]
    [ "$(find . -name '.lbvm*' -o -name '*.orig.qcow2')" = '' ]
}
