# Images that are valid or nearly so, but say something absurd or ambiguous.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers

# fold_onto_one_cluster IMAGE: every entry of its L1 table, and of the one L2
# table there is, refers to the same cluster; the file ends behind that.
fold_onto_one_cluster() {
    "$ORACLE_PYTHON" - "$1" <<'PYTHON'
import struct, sys
with open(sys.argv[1], "r+b") as image:
    header = image.read(112)
    entries, = struct.unpack(">I", header[36:40])
    l1, = struct.unpack(">Q", header[40:48])
    image.seek(l1)
    entry = image.read(8)
    image.seek(l1)
    image.write(entry * entries)
    l2 = struct.unpack(">Q", entry)[0] & 0xfffffffffffe00
    image.seek(l2)
    cluster = image.read(8)
    image.seek(l2)
    image.write(cluster * 8192)
    host = struct.unpack(">Q", cluster)[0] & 0xfffffffffffe00
    image.truncate(max(l2, host) + 65536)
PYTHON
}

@test "a small file that maps a tebibyte over and over is damaged" {
    qemu-img create -q -f qcow2 disk.qcow2 1T
    qemu_write disk.qcow2 0 64k 5
    run_expect 0 lbdump -q -o good.lbz disk.qcow2
    fold_onto_one_cluster disk.qcow2
    run_expect 4 lbdump -q -o base.lbz disk.qcow2
    expect_stderr \
        'lbdump: disk.qcow2: the image maps more data than its files can hold'
    expect_absent base.lbz
    run_expect 4 lbverify -q --image disk.qcow2 good.lbz
    expect_stderr_has \
        'lbverify: disk.qcow2: the image maps more data than its files can hold'
}

@test "a relative data file is found as QEMU finds it, or beside the image" {
    mkdir images
    qemu-img create -q -f qcow2 -o data_file=data.raw images/disk.qcow2 1M
    qemu_write images/disk.qcow2 0 64k 7
    run_expect 0 lbdump -q -o here.lbz images/disk.qcow2
    mv data.raw images/
    run_expect 0 lbdump -q -o there.lbz images/disk.qcow2
    for archive in here there; do
        run_expect 0 lbrestore -q -o $archive.raw $archive.lbz
    done
    cmp here.raw there.raw
    [ "$(head -c 65536 here.raw | tr -d '\007' | wc -c)" = 0 ]
}

@test "a relative data file that means two files is refused" {
    mkdir images
    qemu-img create -q -f qcow2 -o data_file=data.raw images/disk.qcow2 1M
    cp data.raw images/
    run_expect 1 lbdump -q -o base.lbz images/disk.qcow2
    expect_stderr "lbdump: images/disk.qcow2: the data file name 'data.raw' \
is relative, and means one file in the image's folder and another in the \
working directory; change to the folder that QEMU runs in"
    expect_absent base.lbz
}

@test "recover ends where tables refer to each other over and over" {
    qemu-img create -q -f qcow2 disk.qcow2 1T
    qemu_write disk.qcow2 0 64k 5
    run_expect 0 lbctl enable disk.qcow2
    fold_onto_one_cluster disk.qcow2
    run_expect 4 lbctl recover disk.qcow2
    expect_stderr_has 'an L1 table that refers to an L2 table twice'
}
