# Backups of small disks, judged by the independent implementation in
# tests/oracle. A test begins with
#     load helpers
#     load backup
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

# The oracle's two programs.
lbz() {
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/oracle/lbz.py" "$@"
}

lbext() {
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/oracle/lbext.py" "$@"
}

# new_disk IMAGE SIZE [OPTION]...: a qcow2 image with livebackup on.
new_disk() {
    qemu-img create -q -f qcow2 "${@:3}" "$1" "$2"
    run_expect 0 lbctl enable "$1"
}

# change IMAGE COMMAND...: commands of qemu-io on the guest's disk.
change() {
    local image=$1 arguments=()
    shift
    for command; do
        arguments+=(-c "$command")
    done
    run_command=(qemu-io -f qcow2 "${arguments[@]}" "$image")
    run --separate-stderr "${run_command[@]}" </dev/null
    # qemu-io ends with 0 after a command that failed
    if [ "$status" -ne 0 ] || [ -n "$stderr" ] ||
        [[ "$output" == *rror* || "$output" == *failed* ]]; then
        show_run
        fail "qemu-io failed on $image"
    fi
}

# dump ARCHIVE IMAGE [OPTION]...: quiet, and judged by the oracle and by zstd.
dump() {
    run_expect 0 lbdump --quiet -o "$1" "${@:3}" "$2"
    expect_output ''
    expect_stderr ''
    good_archives "$1"
}

# good_archives ARCHIVE...: neither the oracle nor zstd finds a fault.
good_archives() {
    lbz verify "$@"
    zstd -q -t "$@"
}

# good_image IMAGE: QEMU finds no fault, the oracle no broken rule, and it and
# lbctl judge the tracked changes alike.
good_image() {
    qemu_check "$1"
    lbext check "$1"
    same_trust "$1"
}

# What the oracle says of an image, in the words of lbctl. One process, since
# most of the time of these tests goes into starting them.
oracle_status() {
    "$ORACLE_PYTHON" -B - "$abs_top_srcdir/tests/oracle" "$1" <<'END'
import json
import os
import sys
import uuid
sys.path.insert(0, sys.argv[1])
import lbext
import qcow2
path = sys.argv[2]
boot_id = str(uuid.UUID(lbext.this_boot()))
verdict = lbext.Trust(qcow2.Header(path), boot_id,
                      os.stat(path).st_dev).evaluate()
print(json.dumps({
    "keyword": verdict["keyword"],
    "checkpoints": [
        {"uuid": c["uuid"], "label": c["label"], "confirmed": c["confirmed"],
         "keyword": c["keyword"],
         "changed": None if c["keyword"] != "trusted" else sum(
             length for _, length in
             lbext.changed_since(qcow2.Header(path), c["uuid"]))}
        for c in verdict["checkpoints"]]},
    sort_keys=True, separators=(",", ":")))
END
}

same_trust() {
    local ours theirs
    run_expect 0 lbctl status --json "$1"
    ours=$(jq -Sc '{keyword: (.keyword // "trusted"), checkpoints:
        [.checkpoints[] | {uuid, label: .label, confirmed,
                           keyword: (.keyword // "trusted"),
                           changed: (if .trusted then .changed_bytes
                                     else null end)}]}' <<<"$output")
    theirs=$(oracle_status "$1")
    if [ "$ours" != "$theirs" ]; then
        fail "lbctl and the oracle disagree about $1:" "$ours" "$theirs"
    fi
}

# status_of IMAGE FILTER: of lbctl's status, as jq prints it raw.
status_of() {
    lbctl status --json "$1" | jq -r "$2"
}

# uuid_of ARCHIVE; header_of ARCHIVE FILTER: by the oracle.
uuid_of() {
    lbz root "$1" | cut -d' ' -f2
}

header_of() {
    lbz dump "$1" | jq -r ".header$2"
}

# content IMAGE [FORMAT]: the digest of what the guest reads, and the size.
content() {
    local raw
    raw=$(mktemp "$BATS_TEST_TMPDIR/content.XXXXXX")
    qemu-img convert -f "${2:-qcow2}" -O raw "$1" "$raw"
    printf '%s %s\n' "$(stat -c %s "$raw")" "$(sha256sum <"$raw")"
    rm -f "$raw"
}

# expect_content CONTENT IMAGE [FORMAT]: as an earlier content() said.
expect_content() {
    local now
    now=$(content "${@:2}")
    if [ "$now" != "$1" ]; then
        fail "$2 reads differently: $now, not $1"
    fi
}

# expect_restores CONTENT [OPTION]... ARCHIVE...: to qcow2, to raw, and by the
# oracle (which is given the same --at).
expect_restores() {
    local want=$1
    shift
    rm -f restored.qcow2 restored.raw oracle.raw
    run_expect 0 lbrestore --quiet -o restored.qcow2 "$@"
    expect_output ''
    expect_stderr ''
    expect_content "$want" restored.qcow2
    good_image restored.qcow2
    run_expect 0 lbrestore --quiet -o restored.raw "$@"
    expect_content "$want" restored.raw raw
    lbz restore -o oracle.raw "$@"
    expect_content "$want" oracle.raw raw
    rm -f restored.raw oracle.raw
}

# expect_untouched IMAGE COMMAND...: status 0 to 5 of the command is the
# caller's business ($status); the image is the same bytes as before.
expect_untouched() {
    local image=$1 before
    shift
    before=$(sha256sum <"$image")
    "$@"
    if [ "$(sha256sum <"$image")" != "$before" ]; then
        fail "$image was changed by: $*"
    fi
}

# hold_open IMAGE [PROPERTY]...: a QEMU has the image open until let_go, with
# further properties of -blockdev, as read-only=on. A test that uses it calls
# let_go in its teardown.
hold_open() {
    local properties=''
    for property in "${@:2}"; do
        properties+=,$property
    done
    qemu-storage-daemon --daemonize --pidfile "$BATS_TEST_TMPDIR/holder.pid" \
        --blockdev "driver=qcow2,node-name=held,file.driver=file,file.filename=$1$properties" \
        --nbd-server "addr.type=unix,addr.path=$BATS_TEST_TMPDIR/holder.sock" \
        --export type=nbd,id=e,node-name=held,writable="${HOLD_WRITABLE:-on}" \
        3>&- 4>&-
}

let_go() {
    local file=$BATS_TEST_TMPDIR/holder.pid pid
    if [ -s "$file" ]; then
        pid=$(<"$file")
        kill "$pid"
        while kill -0 "$pid" 2>/dev/null; do
            sleep 0.02
        done
        rm -f "$file"
    fi
}
