# Images that another process has open: exit 5, and nothing touched.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

setup() {
    helpers_setup
    new_disk disk.qcow2 10M
    qemu_write disk.qcow2 0 5M 1
    lbdump -q disk.qcow2 | cat >piped.lbz
    dump full.lbz disk.qcow2
    read -r root uuid < <(lbz root piped.lbz)
}

teardown() {
    let_go
}

@test "open for writing in QEMU: every tool but status refuses" {
    hold_open disk.qcow2
    while read -r -a command; do
        expect_untouched disk.qcow2 run_expect 5 "${command[@]}"
        expect_stderr "${command[0]}: disk.qcow2: the image is in use by another process"
        expect_output ''
    done <<END
lbctl enable disk.qcow2
lbctl disable disk.qcow2
lbctl confirm disk.qcow2 $uuid $root
lbctl prune disk.qcow2
lbctl recover disk.qcow2
lbdump -o x.lbz disk.qcow2
lbdump --incremental -o x.lbz disk.qcow2
lbdump --auto -o x.lbz disk.qcow2
lbdump --copy -o x.lbz disk.qcow2
lbdump disk.qcow2
lbverify --image=disk.qcow2 full.lbz
END
    expect_absent x.lbz
    expect_untouched disk.qcow2 run_expect 0 lbctl status disk.qcow2
    let_go
    dump incr.lbz disk.qcow2 --incremental
    good_image disk.qcow2
}

@test "open for reading in QEMU: --copy works, what writes is refused" {
    export HOLD_WRITABLE=off
    hold_open disk.qcow2 read-only=on
    expect_untouched disk.qcow2 run_expect 0 \
        lbdump --copy --incremental -o copy.lbz disk.qcow2
    expect_stderr ''
    good_archives copy.lbz
    expect_untouched disk.qcow2 run_expect 0 \
        lbverify --image=disk.qcow2 full.lbz copy.lbz
    expect_untouched disk.qcow2 run_expect 5 \
        lbdump --incremental -o x.lbz disk.qcow2
    expect_untouched disk.qcow2 run_expect 5 lbctl prune disk.qcow2
    expect_absent x.lbz
}

@test "our own tools exclude each other" {
    head -c 5M /dev/urandom >noise
    qemu-io -f qcow2 -c 'write -s noise 0 5M' disk.qcow2
    mkfifo pipe
    lbdump --quiet disk.qcow2 >pipe 3>&- &
    pid=$!
    exec {reader}<pipe
    head -c 1000 <&$reader >part # it has begun, and waits for the reader
    expect_untouched disk.qcow2 run_expect 5 lbdump -o x.lbz disk.qcow2
    expect_stderr 'lbdump: disk.qcow2: the image is in use by another process'
    expect_untouched disk.qcow2 run_expect 5 lbctl disable disk.qcow2
    # and QEMU does not open it meanwhile
    run_expect 1 qemu-io -f qcow2 -c 'write 0 64k' disk.qcow2
    expect_stderr_has 'Failed to get "'
    cat <&$reader >>part
    exec {reader}<&-
    wait $pid
    good_archives part
    good_image disk.qcow2
}

@test "two readers don't disturb each other" {
    head -c 5M /dev/urandom >noise
    qemu-io -f qcow2 -c 'write -s noise 0 5M' disk.qcow2
    mkfifo pipe
    lbdump --copy --quiet disk.qcow2 >pipe 3>&- &
    pid=$!
    exec {reader}<pipe
    head -c 1000 <&$reader >part
    run_expect 0 lbdump --copy -o x.lbz disk.qcow2
    run_expect 5 lbdump -o y.lbz disk.qcow2
    expect_absent y.lbz
    cat <&$reader >>part
    exec {reader}<&-
    wait $pid
    good_archives part x.lbz
}

@test "a backing file that a QEMU writes is a disk in use" {
    qemu-img create -q -f qcow2 -b disk.qcow2 -F qcow2 top.qcow2
    lbctl enable top.qcow2
    hold_open disk.qcow2
    for options in '' --copy --overlay; do
        # shellcheck disable=SC2086
        expect_untouched top.qcow2 run_expect 5 lbdump $options -o x.lbz top.qcow2
        expect_stderr_has 'disk.qcow2: the image is in use by another process'
    done
    expect_absent x.lbz
}

@test "an external data file that a QEMU writes is a disk in use" {
    qemu-img create -q -f qcow2 -o data_file=data.raw,data_file_raw=on ext.qcow2 5M
    lbctl enable ext.qcow2
    dump ext.lbz ext.qcow2
    qemu-storage-daemon --daemonize --pidfile "$BATS_TEST_TMPDIR/holder.pid" \
        --blockdev driver=file,node-name=held,filename=data.raw \
        --nbd-server "addr.type=unix,addr.path=$BATS_TEST_TMPDIR/holder.sock" \
        --export type=nbd,id=e,node-name=held,writable=on 3>&- 4>&-
    expect_untouched ext.qcow2 run_expect 5 lbdump --incremental -o x.lbz ext.qcow2
    expect_stderr_has 'data.raw: the image is in use by another process'
    expect_absent x.lbz
}
