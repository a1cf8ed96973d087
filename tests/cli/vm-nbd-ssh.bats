# lbvm backup --nbd through ssh, with a real sshd: the monitor of a machine in a
# stock QEMU comes by a Unix socket, its disks by a TCP port.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm
load ssh
load stock

setup() {
    stock_setup
    mkdir -m 700 there there/scratch
    # as in vm-nbd.bats: its files have names that mean others here
    # shellcheck disable=SC2034
    images=$PWD/there images_there=/proc/self/cwd
    serve_ssh
    nbd=$(free_port)
    way=("--nbd=127.0.0.1:$nbd" --nbd-listen=127.0.0.2
         --scratch=/proc/self/cwd/scratch)
}

teardown() {
    end_tunnel
    stop_ssh
    stock_teardown
}

# tunnel: to QEMU's monitor at s/tunnel, to its NBD server at $nbd.
tunnel() {
    rm -f s/tunnel
    # shellcheck disable=SC2086
    $LBVM_SSH -p "$port" -N -o ExitOnForwardFailure=yes \
        -L "$folder/tunnel:$folder/qmp" \
        -L "127.0.0.1:$nbd:127.0.0.2:$nbd" 127.0.0.1 \
        >ssh.out 2>&1 </dev/null 3>&- 4>&- &
    echo $! >tunnel.pid
    for ((i = 0; i < 400; i++)); do
        [ ! -S s/tunnel ] || return 0
        sleep 0.05
    done
    fail "no tunnel:" "$(cat ssh.out)"
}

end_tunnel() {
    if [ -s tunnel.pid ]; then
        kill "$(<tunnel.pid)" 2>/dev/null || true
        wait "$(<tunnel.pid)" 2>/dev/null || true
        rm tunnel.pid
    fi
}

backup() {
    run_expect 0 lbvm backup web1 --qmp=s/tunnel "${way[@]}"
}

@test "the monitor and the disks through a tunnel" {
    machine
    tunnel
    backup
    expect_disk vda
    expect_disk vdb
    guest vda 'write -P 3 7M 1M'
    guest vdb 'write -z 1M 3M'
    backup
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
    expect_disk vdb
    expect_nothing_left
    [ "$(bitmaps | wc -l)" = 2 ]
}

@test "the tunnel ends meanwhile: the next backup clears, and is incremental" {
    machine
    tunnel
    backup
    guest vda 'write -P 3 7M 1M'
    begin_backup --full --qmp=s/tunnel "${way[@]}" --rate-limit=1M
    end_tunnel
    status=0
    wait $lbvm || status=$?
    [ $status = 1 ] || fail "status $status" "$(cat log)"
    # the guest does not mind
    guest vda 'write -P 4 6M 3M'
    tunnel
    backup
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
    expect_disk vdb
    expect_nothing_left
    [ "$(bitmaps | wc -l)" = 2 ]
}
