#!/bin/bash
# Everything that the tests need is here: a missing tool must fail, and not make
# other tests skip or fail with a riddle.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

count=0

report() { # report STATUS NAME [HINT]
    count=$((count + 1))
    if [ "$1" -eq 0 ]; then
        echo "ok $count - $2"
    else
        echo "not ok $count - $2"
        echo "# ${3:-'./setup build' installs it}"
    fi
}

# qemu-io is in qemu-utils, mkfs.ext4, e2fsck and debugfs in e2fsprogs, mkfs.xfs
# and xfs_repair in xfsprogs, certtool and psktool in gnutls-bin, sshd in
# openssh-server, libvirtd in libvirt-daemon, virsh in libvirt-clients
PATH=$PATH:/usr/sbin:/sbin
for tool in bats busybox certtool cmp debugfs e2fsck jq libvirtd mandoc \
            mkfs.ext4 mkfs.xfs nbdcopy nbdfuse nbdinfo nbdkit nm psktool qemu-img \
            qemu-io qemu-nbd qemu-system-x86_64 ssh sshd strace \
            systemd-analyze virsh xfs_repair xxhsum zstd; do
    command -v "$tool" >/dev/null
    report $? "$tool is installed"
done

[ -w /dev/fuse ]
report $? "/dev/fuse can be used" "'modprobe fuse', and access to it, are wanted"

[ "$HAVE_CMOCKA" = yes ]
report $? "the library was configured with cmocka"

[ "$HAVE_LIBVIRT" = yes ]
report $? "lbvm was configured with libvirt"

[ "$HAVE_NBDKIT" = yes ]
report $? "the plugin for nbdkit was configured"

"$ORACLE_PYTHON" -c 'import xxhash, zstandard' 2>/dev/null
report $? "$ORACLE_PYTHON has xxhash and zstandard"

qemu-img --version | grep -q .
report $? "qemu-img runs"

# have_qemu FOLDER NAME: all of its programs run there.
have_qemu() {
    local program
    for program in qemu-img qemu-io qemu-nbd qemu-storage-daemon \
                   qemu-system-x86_64; do
        "$1/$program" --version >/dev/null 2>&1
        report $? "$program of $2 runs" "'./setup check' gets $2"
    done
}

if [ -n "$QLB_QEMU_TESTS$QLB_STOCK_7_TESTS" ]; then
    have_qemu "$QLB_QEMU" "the patched QEMU"
    have_qemu "$QLB_STOCK_QEMU_10" "stock QEMU 10.0"
fi
if [ -n "$QLB_STOCK_7_TESTS" ]; then
    have_qemu "$QLB_STOCK_QEMU_7" "stock QEMU 7.2"
fi

echo "1..$count"
