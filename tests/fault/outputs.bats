# Outputs that can't take what is written: full, closed, broken, read-only. A
# clear error, status 1, nothing left, the checkpoints as before.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load ../cli/helpers

# disk.qcow2 with 3 MiB that do not compress and a confirmed checkpoint, its
# archive full.lbz, and changes.
setup() {
    helpers_setup
    head -c 3M /dev/urandom >noise
    qemu-img create -q -f qcow2 disk.qcow2 64M
    qemu-io -f qcow2 -c 'write -s noise 1M 3M' disk.qcow2 >/dev/null
    lbctl enable disk.qcow2
    lbdump -q -o full.lbz disk.qcow2
    qemu-io -f qcow2 -c 'write -s noise 10M 3M' disk.qcow2 >/dev/null
    state_before=$(lbctl status --json disk.qcow2)
}

# The image is as it was, and the next incremental has every change.
expect_nothing_lost() {
    [ "$(lbctl status --json disk.qcow2)" = "$state_before" ] ||
        fail "the checkpoints have changed:" "$state_before" \
             "$(lbctl status --json disk.qcow2)"
    qemu_check disk.qcow2
    rm -f next.lbz restored.qcow2
    run_expect 0 lbdump -q --incremental -o next.lbz disk.qcow2
    run_expect 0 lbrestore -q -o restored.qcow2 full.lbz next.lbz
    run_expect 0 qemu-img compare disk.qcow2 restored.qcow2
    [ "$output" = 'Images are identical.' ] || fail "$output"
}

# in_shell STATUS SCRIPT: redirections of its own.
in_shell() {
    run_expect "$1" bash -c "$2"
}

@test "lbdump to /dev/full" {
    in_shell 1 'exec lbdump --incremental disk.qcow2 >/dev/full'
    expect_stderr 'lbdump: standard output: writing: No space left on device'
    expect_nothing_lost
}

@test "lbdump with closed standard output does not write into the image" {
    for fds in '>&-' '<&- >&-'; do
        in_shell 1 "exec lbdump --incremental disk.qcow2 $fds"
        expect_stderr_has 'lbdump: standard output: '
    done
    in_shell 1 'exec lbdump --incremental disk.qcow2 <&- >&- 2>&-'
    expect_nothing_lost
}

@test "a message with closed standard error does not go into the image" {
    in_shell 3 'exec lbdump --since=11111111-1111-4111-8111-111111111111 \
        disk.qcow2 2>&- >dump.lbz'
    in_shell 3 'exec lbctl confirm disk.qcow2 \
        11111111-1111-4111-8111-111111111111 \
        00000000000000000000000000000000 2>&-'
    expect_nothing_lost
}

@test "lbdump into a pipe whose other end goes away" {
    in_shell 1 'lbdump --incremental disk.qcow2 | head -c 1000 >/dev/null
        exit "${PIPESTATUS[0]}"'
    expect_stderr 'lbdump: standard output: writing: Broken pipe'
    expect_nothing_lost
}

@test "lbmerge into a pipe whose other end goes away" {
    in_shell 1 'lbmerge full.lbz | head -c 1000 >/dev/null
        exit "${PIPESTATUS[0]}"'
    expect_stderr 'lbmerge: standard output: writing: Broken pipe'
}

@test "a limit on the size of files" {
    in_shell 1 'ulimit -f 1024
        exec lbdump --incremental -o new.lbz disk.qcow2'
    expect_stderr_has 'lbdump: new.lbz: ' 'File too large'
    expect_absent new.lbz
    in_shell 1 'ulimit -f 1024; exec lbdump --incremental disk.qcow2 >new.lbz'
    expect_stderr_has 'lbdump: standard output: ' 'File too large'
    [ ! -s new.lbz ] || fail "a part of an archive is left"
    rm new.lbz
    in_shell 1 'ulimit -f 1024; exec lbmerge -o merged.lbz full.lbz'
    expect_stderr_has 'lbmerge: merged.lbz: ' 'File too large'
    expect_absent merged.lbz
    for target in new.qcow2 new.raw; do
        in_shell 1 "ulimit -f 1024; exec lbrestore -o $target full.lbz"
        expect_stderr_has "lbrestore: $target: " 'File too large'
        expect_absent "$target"
    done
    in_shell 1 'ulimit -f 1024; lbverify -o stored.lbz - <full.lbz'
    expect_stderr_has 'File too large'
    expect_absent stored.lbz
    expect_nothing_lost
}

@test "the image may not grow" {
    # 1024 blocks of 1 KiB, far less than the image has
    in_shell 1 'ulimit -f 1024
        lbdump --incremental disk.qcow2 | cat >/dev/null
        exit "${PIPESTATUS[0]}"'
    expect_stderr_has 'lbdump: disk.qcow2: ' 'File too large'
    run_expect 0 lbctl recover disk.qcow2
    expect_nothing_lost
}

@test "a folder that is missing" {
    run_expect 1 lbdump --incremental -o missing/new.lbz disk.qcow2
    expect_stderr 'lbdump: missing/new.lbz: No such file or directory'
    run_expect 1 lbmerge -o missing/new.lbz full.lbz
    expect_stderr 'lbmerge: missing/new.lbz: No such file or directory'
    run_expect 1 lbrestore -o missing/new.qcow2 full.lbz
    expect_stderr 'lbrestore: missing/new.qcow2: No such file or directory'
    in_shell 1 'exec lbverify -o missing/new.lbz - <full.lbz'
    expect_stderr 'lbverify: missing/new.lbz: No such file or directory'
    expect_nothing_lost
}

@test "a folder that is no folder, a name that is too long" {
    touch file
    run_expect 1 lbdump --incremental -o file/new.lbz disk.qcow2
    expect_stderr 'lbdump: file/new.lbz: Not a directory'
    name=$(printf '%0300d' 0)
    run_expect 1 lbdump --incremental -o "$name" disk.qcow2
    expect_stderr "lbdump: $name: File name too long"
    expect_nothing_lost
}

# Root may write anywhere, so the folder is on a file system that refuses.
@test "a folder that can't be written to" {
    run_expect 1 lbdump --incremental -o /proc/new.lbz disk.qcow2
    expect_stderr_has 'lbdump: /proc/new.lbz: '
    run_expect 1 lbrestore -o /proc/new.qcow2 full.lbz
    expect_stderr_has 'lbrestore: /proc/new.qcow2: '
    expect_nothing_lost
}

# The dump is in the middle of a write to a pipe that nobody reads: it fills
# whatever the speed of the machine.
stalled_dump() {
    mkfifo fifo
    "$@" >fifo 2>stalled.err &
    dump=$!
    exec {reader}<fifo
    # some bytes arrive, so the writer is past its opening
    head -c 4096 <&"$reader" >/dev/null
}

# Signals until it has ended: the second one interrupts the write for good.
expect_ended_by() {
    local status=0
    while kill "-$1" "$dump" 2>/dev/null; do
        sleep 0.01
    done
    wait "$dump" || status=$?
    exec {reader}<&-
    case $status in
        1) grep -q '^lbdump: .*interrupted' stalled.err ||
               fail "$(cat stalled.err)" ;;
        $((128 + $(kill -l "$1")))) ;;
        *) fail "status $status: $(cat stalled.err)" ;;
    esac
    expect_nothing_lost
}

@test "SIGINT ends a dump that waits for its reader" {
    stalled_dump lbdump -q --incremental disk.qcow2
    expect_ended_by INT
}

@test "SIGTERM ends a dump that waits for its reader" {
    stalled_dump lbdump -q --incremental disk.qcow2
    expect_ended_by TERM
}

@test "SIGTERM ends a dump with a rate limit at once" {
    lbdump -q --incremental --rate-limit=64K -o new.lbz disk.qcow2 \
        2>limited.err &
    dump=$!
    until compgen -G '.new.lbz.*' >/dev/null; do
        kill -0 "$dump" || fail "it has ended: $(cat limited.err)"
        sleep 0.01
    done
    kill -TERM "$dump"
    status=0
    wait "$dump" || status=$?
    [ "$status" -eq 1 ] || fail "status $status: $(cat limited.err)"
    grep -q '^lbdump: disk.qcow2: .*interrupted' limited.err ||
        fail "$(cat limited.err)"
    expect_absent new.lbz
    expect_nothing_lost
}

# The sanitizers reserve terabytes of addresses; their own allocator can refuse.
@test "a want of memory is told" {
    local limit room=10
    if grep -q __asan_init "$abs_top_builddir/tools/lbdump"; then
        limit=(env ASAN_OPTIONS=allocator_may_return_null=1)
        limit[1]+=:max_allocation_size_mb=1
    else
        # little more than the libraries take
        until prlimit --as="${room}000000" lbdump --version >/dev/null 2>&1 ||
                [ "$room" -gt 1000 ]; do
            room=$((room + 5))
        done
        limit=(prlimit --as="$((room + 5))000000")
    fi
    run_expect 1 "${limit[@]}" lbdump --threads=8 --incremental -o new.lbz \
        disk.qcow2
    expect_stderr_has 'lbdump: '
    expect_absent new.lbz
    expect_nothing_lost
}

@test "summaries that can't be written" {
    in_shell 1 'exec lbctl status disk.qcow2 >/dev/full'
    expect_stderr_has 'lbctl: ' 'No space left on device'
    in_shell 1 'exec lbctl status --json disk.qcow2 >/dev/full'
    expect_stderr_has 'lbctl: ' 'No space left on device'
    in_shell 1 'exec lbverify --receipt full.lbz >/dev/full'
    expect_stderr_has 'lbverify: ' 'No space left on device'
    in_shell 1 'exec lbverify --json full.lbz >/dev/full'
    expect_stderr_has 'lbverify: ' 'No space left on device'
}
