# nbdkit-lbz-plugin: archives that stay on another host, which nbdkit's own plugin
# for ssh and nbdfuse show as files.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm
load ssh

teardown() {
    stop_ssh
    umount -q far/*.lbz || true
}

# show ARCHIVE: far/ARCHIVE is that of the other host.
show() {
    local i
    mkdir -p far
    : >"far/$1"
    nbdfuse "far/$1" [ nbdkit --exit-with-parent --readonly ssh \
        host=127.0.0.1 port="$port" known-hosts="$PWD/known_hosts" \
        identity="$PWD/key" path="$PWD/$1" ] >"$1.log" 2>&1 3>&- 4>&- &
    for ((i = 0; i < 400; i++)); do
        [ ! -s "far/$1" ] || return 0
        sleep 0.05
    done
    fail "$(cat "$1.log")"
}

@test "a chain is served from where it is" {
    new_disk disk.qcow2 64M
    head -c 3M /dev/urandom >noise
    change disk.qcow2 'write -P 1 0 3M' 'write -s noise 20M 3M'
    dump 0.lbz disk.qcow2
    change disk.qcow2 'write -P 2 1M 3M'
    dump 1.lbz disk.qcow2 --incremental
    serve_ssh 'Subsystem sftp internal-sftp'
    show 0.lbz
    show 1.lbz
    cmp 0.lbz far/0.lbz
    run_expect 0 nbdkit -U - \
        "$abs_top_builddir/nbdkit/.libs/nbdkit-lbz-plugin.so" \
        far/0.lbz far/1.lbz --run 'nbdcopy "$uri" got.raw'
    qemu-img convert -f qcow2 -O raw disk.qcow2 disk.raw
    cmp got.raw disk.raw
}
