# lbdump nbd://... and servers that fail, leave, hang or lie.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load nbd

# fails STATUS MESSAGE [OPTION]...: no archive, neither under a name nor in part.
fails() {
    once "$@"
    echo -n >x.lbz
    run_to x.lbz "$1" lbdump --threads=1 "${@:3}" "$uri"
    expect_message "$2"
    [ ! -s x.lbz ]
    rm x.lbz
}

# once STATUS MESSAGE [OPTION]...: with a server that does not survive it.
once() {
    run_expect "$1" lbdump --threads=1 "${@:3}" -o x.lbz "$uri"
    expect_output ''
    expect_message "$2"
    expect_absent x.lbz
}

noise() {
    head -c "${1:-5M}" /dev/urandom >disk
}

# ------------------------------------------------------------ connecting

@test "no server, no URI that libnbd knows, no export" {
    fails 1 "can't connect: *: No such file or directory"
    uri=nbd://localhost:1/disk
    fails 1 "can't connect: *: Connection refused"
    uri=nbd+pigeon://localhost/disk
    fails 1 "can't connect: *: Invalid argument"
    uri='nbd+unix:///?socket=s'
    noise 1M
    qemu_nbd -f raw -x disk disk
    fails 1 "can't connect: *: No such file or directory"
    stop
    "$ORACLE_PYTHON" -c '
import socket
s = socket.socket(socket.AF_UNIX)
s.bind("s")
s.listen(5)
for i in range(2):
    c = s.accept()[0]
    c.sendall(b"220 mail" * 2)
    c.recv(1)' 3>&- 4>&- &
    while [ ! -S s ]; do sleep 0.02; done
    fails 1 "can't connect: *magic*"
}

@test "a bitmap that the server does not offer is status 3" {
    noise 1M
    changes=(--bitmap=b --parent=$one --image-uuid=$two)
    problem='the server does not offer the meta context qemu:dirty-bitmap:b for this export'
    qemu_nbd -f raw disk
    fails 3 "$problem" "${changes[@]}"
    nbd_kit --no-sr memory 1M
    fails 3 "$problem" "${changes[@]}"
    nbd_kit --filter=noextents memory 1M
    fails 3 'the server does not offer the meta context acme:b for this export' \
        "${changes[@]}" --bitmap=acme:b
    # its other context is not that
    fake_nbd --data disk --context base:allocation=0:1
    fails 3 "$problem" "${changes[@]}"
}

@test "a server whose disk changes its size" {
    noise
    fake_nbd --data disk --multi --grow
    run_expect 1 lbdump --threads=2 -o x.lbz "$uri"
    expect_stderr "lbdump: $uri: the size of the export has changed"
    expect_absent x.lbz
    fake_nbd --size $(((1 << 56) + 1))
    fails 1 'the export is larger than an archive can hold'
}

# ---------------------------------------------------------------- errors

@test "an error of the server is told with its offset" {
    noise
    nbd_kit --filter=error file disk error-pread=EIO error-pread-rate=100%
    fails 1 'reading at offset 0: Input/output error'
    nbd_kit --filter=error file disk error-extents=EPERM \
        error-extents-rate=100%
    fails 1 'block status at offset 0: Operation not permitted'
    # shellcheck disable=SC2016
    nbd_kit eval get_size='echo 5M' \
        pread='if [ $4 -ge 3145728 ]; then echo ENOMEM no >&2; exit 1; fi
               head -c $3 /dev/zero'
    for threads in 1 4; do
        fails 1 'reading at offset 3145728: Cannot allocate memory' \
            --threads=$threads
    done
    nbd_kit --filter=blocksize-policy file disk blocksize-minimum=1 \
        blocksize-preferred=512 blocksize-maximum=64K \
        blocksize-error-policy=error
    pull full.lbz
    fake_nbd --data disk --lie read-error --at 2000000
    fails 1 'reading at offset 1048576: Input/output error'
    # it may say more exactly where
    fake_nbd --data disk --lie read-error-at --at 2000000
    fails 1 'reading at offset 1572864: Input/output error'
    fake_nbd --data disk --lie status-error \
        --context qemu:dirty-bitmap:b=1:1
    fails 1 'block status at offset 0: Operation not permitted' \
        --bitmap=b --parent=$one --image-uuid=$two
}

@test "a connection that is lost leaves no archive" {
    noise
    fake_nbd --data disk --lie close --at 3000000
    once 1 'the connection was lost: the server has closed it'
    fake_nbd --data disk --lie read-cut --at 3000000
    once 1 'the connection was lost: the server has closed it'
    fake_nbd --data disk --lie close --at 3000000 \
        --context base:allocation=0:1
    once 1 'the connection was lost: the server has closed it'
    # of several, with requests under way
    for threads in 2 7; do
        fake_nbd --data disk --multi --lie close --at 3000000
        run_expect 1 lbdump --threads=$threads -o x.lbz "$uri"
        expect_message 'the connection was lost: *'
        expect_absent x.lbz
    done
}

@test "a server that is killed" {
    noise 20M
    nbd_kit --filter=delay file disk delay-read=100ms
    run_expect 1 bash -c "lbdump --threads=2 -o x.lbz '$uri' & dump=\$!
        sleep 0.5
        kill -KILL \$(<server.pid)
        wait \$dump"
    expect_message 'the connection was lost: *'
    expect_absent x.lbz
}

# ------------------------------------------------------------------ lies

@test "a server that lies about content" {
    noise
    while IFS='|' read -r lie message; do
        fake_nbd --data disk --lie "$lie" --at 3000000
        fails 1 "$message"
    done <<'END'
read-short|reading at offset 2097152: Input/output error
read-nothing|reading at offset 2097152: Input/output error
read-magic|the connection was lost: *
read-cookie|the connection was lost: *
read-beyond|the connection was lost: *
read-hole|the connection was lost: *
END
}

@test "a server that lies about its blocks" {
    noise
    while IFS='|' read -r lie message; do
        fake_nbd --data disk --lie "$lie" --at 3000000 --extents 1 \
            --block 512,4096,1048576 \
            --context base:allocation=0:2097152,0:1048576,0:1 \
            --context qemu:dirty-bitmap:b=0:2097152,1:1048576,1:1
        fails 1 "$message"
        fails 1 "$message" --bitmap=b --parent=$one --image-uuid=$two
    done <<'END'
status-zero|block status at offset 0: the answer has an extent of length 0
status-beyond|block status at offset 0: the answer has an extent beyond the end of the export
status-unaligned|block status at offset 0: the answer has an extent that is no multiple of the block size
status-twice|block status at offset 0: the answer has two lists of extents
status-nothing|block status at offset 0: the answer has no extent
status-foreign|block status at offset 0: the answer has no extent
status-empty|the connection was lost: *
status-odd|the connection was lost: *
END
    fake_nbd --data disk --context qemu:dirty-bitmap:b=0:65536,5:1
    fails 1 'block status at offset 65536: flags 0x5, which no dirty bitmap has' \
        --bitmap=b --parent=$one --image-uuid=$two
}

# ----------------------------------------------------------- hanging ones

# stopped SIGNAL [OPTION]...: it ends while it waits for the server. Where that
# is, the server's log tells, or the time (where it has said nothing yet).
stopped() {
    run_expect 1 bash -c "lbdump ${*:2} -o x.lbz '$uri' & pid=\$!
        for ((i = 0; i < 100; i++)); do
            ! grep -q request s.log || break
            sleep 0.01
        done
        sleep 0.2
        kill -$1 \$pid
        wait \$pid"
    expect_stderr "lbdump: $uri: interrupted"
    expect_absent x.lbz
}

@test "signals end it while the server hangs" {
    noise
    for signal in INT TERM HUP; do
        fake_nbd --data disk --lie hang
        stopped $signal
        fake_nbd --data disk --lie hang --at 3000000 --multi
        stopped $signal --threads=4
        fake_nbd --data disk --lie hang --context base:allocation=0:1
        stopped $signal
        fake_nbd --data disk --lie silent
        stopped $signal
        # another connection that is not answered
        fake_nbd --data disk --multi --clients 1
        stopped $signal --threads=2
    done
}

@test "a second signal ends it also behind a pipe that stands still" {
    noise 9M
    nbd_kit file disk
    mkfifo pipe
    run_expect signal:TERM bash -c "lbdump '$uri' >pipe & pid=\$!
        exec 5<pipe
        sleep 0.5
        kill \$pid
        sleep 0.2
        kill \$pid
        wait \$pid"
}
