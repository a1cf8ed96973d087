# lbdump --qmp on the patched QEMU, with a guest that writes meanwhile.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu
load ../cli/backup
load live

expect_kept() {
    local name=$1
    shift
    good_archives "$@"
    run_expect 0 lbrestore --quiet --force -o restored.raw "$@"
    cmp restored.raw "$name.raw"
}

@test "full and incremental dumps while the guest writes" {
    make_disks
    serve a b,cache.direct=on,file.cache.direct=on
    keep a
    keep b
    mkdir full
    write_meanwhile b &
    run_expect 0 lbdump --qmp=qmp --rate-limit=30M -o full/
    expect_stderr ''
    wait
    expect_kept a full/a.lbz
    expect_kept b full/b.lbz
    guest b 'write -P 9 70M 1M'
    keep b
    write_meanwhile b &
    run_expect 0 lbdump --qmp=qmp --disk=b --incremental --rate-limit=10M \
        -o 1.lbz
    wait
    expect_kept b full/b.lbz 1.lbz
    [ ! -e b.orig.qcow2 ]
    guest b 'write -P 10 1M 64k'
    keep b
    run_expect 0 lbdump --qmp=qmp --disk=b --auto -o 2.lbz
    expect_stderr 'lbdump: b: incremental: the tracked changes are trusted'
    expect_kept b full/b.lbz 1.lbz 2.lbz
    [ "$(header_of 2.lbz .parent_uuid)" = "$(uuid_of 1.lbz)" ]
}

@test "an interrupted dump costs nothing but a checkpoint" {
    make_disks
    serve a
    run_expect 3 lbdump --qmp=qmp --incremental -o 0.lbz
    run_expect 0 lbdump --qmp=qmp -o 0.lbz
    # in the background timeout signals twice, and the second one kills
    run_expect 1 timeout --foreground --preserve-status 1 \
        lbdump --qmp=qmp --rate-limit=5M -o lost.lbz
    expect_stderr "lbdump: $PWD/a.qcow2: interrupted"
    expect_absent lost.lbz
    [ ! -e a.orig.qcow2 ]
    guest a 'write -P 9 70M 1M'
    keep a
    run_expect 0 bash -c 'lbdump --qmp=qmp --incremental | cat >1.lbz'
    expect_stderr_has 'its checkpoint is not confirmed'
    expect_kept a 0.lbz 1.lbz
    [ "$(header_of 1.lbz '.covered | length')" = 1 ]
    pid=$(<qsd.pid)
    kill "$pid"
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.02
    done
    read -r root uuid < <(lbz root 1.lbz)
    run_expect 0 lbctl confirm a.qcow2 "$uuid" "$root"
    [ "$(status_of a.qcow2 '[.checkpoints[].confirmed] | join(" ")')" = \
        'true false true' ]
    qemu_check a.qcow2
}

# qmp COMMAND [ARGUMENTS]: what it returns.
qmp() {
    "$ORACLE_PYTHON" - "$1" "${2:-{\}}" <<'END'
import json
import socket
import sys

client = socket.socket(socket.AF_UNIX)
client.connect("qmp")
stream = client.makefile("rw")
for command, arguments in (("qmp_capabilities", {}),
                           (sys.argv[1], json.loads(sys.argv[2]))):
    stream.write(json.dumps({"execute": command, "arguments": arguments}))
    stream.flush()
    answer = {}
    while "return" not in answer:
        answer = json.loads(stream.readline())
        if "error" in answer:
            sys.exit(answer["error"]["desc"])
print(json.dumps(answer["return"]))
END
}

# pull ARCHIVE MODE [OPTION]...: as a client on another host does.
pull() {
    local info bitmap url='nbd+unix:///then?socket=nbd'
    info=$(qmp livebackup-begin "{\"job-id\": \"pull\", \"mode\": \"$2\",
        \"disks\": [{\"device\": \"a\"}]}")
    bitmap=$(jq -r '.disks[0].bitmap' <<<"$info")
    qmp blockdev-add '{"driver": "snapshot-access", "file": "a",
        "node-name": "then"}' >/dev/null
    qmp block-export-add "{\"type\": \"nbd\", \"id\": \"then\",
        \"node-name\": \"then\", \"name\": \"then\",
        \"bitmaps\": [{\"node\": \"a\", \"name\": \"$bitmap\"}]}" >/dev/null
    if [ "$2" = incremental ]; then
        set -- "$@" --bitmap="$bitmap" \
            --parent="$(jq -r '.disks[0].parent' <<<"$info")"
    fi
    write_meanwhile a &
    run_expect 0 lbdump --json --rate-limit=20M -o "$1" "${@:3}" \
        --uuid="$(jq -r '.disks[0].checkpoint' <<<"$info")" \
        --image-uuid="$(lbctl status --json a.qcow2 | jq -r .image_uuid)" \
        "$url"
    root=$(jq -r .root_digest <<<"$output")
    wait $!
    qmp block-export-del '{"id": "then"}' >/dev/null
    until qmp blockdev-del '{"node-name": "then"}' >/dev/null 2>&1; do
        sleep 0.02
    done
    qmp livebackup-end "{\"job-id\": \"pull\", \"success\": true,
        \"roots\": [{\"device\": \"a\", \"root\": \"${root:0:16}\"}]}"
}

@test "pulled over NBD from QEMU itself, while the guest writes" {
    make_disks
    serve a
    keep a
    pull 0.lbz full
    expect_kept a 0.lbz
    guest a 'write -P 9 70M 1M' 'write -z 30M 1M'
    keep a
    pull 1.lbz incremental
    expect_kept a 0.lbz 1.lbz
    [ "$(status_of a.qcow2 '[.checkpoints[].confirmed] | join(" ")')" = \
        'true true' ]
    [ ! -e a.orig.qcow2 ]
}

@test "QEMU is killed while its disk is dumped" {
    make_disks
    serve a
    run_expect 1 bash -c 'lbdump --qmp=qmp --rate-limit=5M -o lost.lbz & pid=$!
        while [ ! -e a.orig.qcow2 ]; do sleep 0.02; done
        sleep 0.5
        kill -KILL "$(<qsd.pid)"
        wait $pid'
    expect_stderr 'lbdump: qmp: QEMU has closed the connection'
    expect_absent lost.lbz
}
