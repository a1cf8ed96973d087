# The usage that must work word for word, on a disk of the reader's own; and the
# manual's tour.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

# The first line wants the patched qemu-img.
prepare() {
    PATH=${QLB_QEMU:-$abs_top_srcdir/build-qemu/stage/bin}:$PATH \
        run_expect 0 qemu-img create -f qcow2 -o livebackup=on disk.qcow2 20G
    qemu_write disk.qcow2 1G 3M 1
}

use() {
    run_expect 0 bash -c "$1"
    expect_output ''
    expect_stderr ''
}

@test "the usage lines, word for word" {
    prepare
    use 'lbdump disk.qcow2 > base.lbz'
    qemu_write disk.qcow2 2G 100k 2
    use 'lbdump --incremental disk.qcow2 > incr1.lbz'
    for n in {2..11}; do
        qemu_write disk.qcow2 ${n}G 100k $n
        use "lbdump --incremental disk.qcow2 > incr$n.lbz"
    done
    use 'lbmerge base.lbz incr*.lbz > full.lbz'
    use 'lbverify base.lbz incr*.lbz'
    mv disk.qcow2 lost.qcow2
    use 'lbrestore -o disk.qcow2 base.lbz incr*.lbz'
    good_archives ./*.lbz
    good_image lost.qcow2
    good_image disk.qcow2
    expect_same lost.qcow2 qcow2 disk.qcow2 qcow2
    use 'lbverify --image=lost.qcow2 full.lbz'
    use 'lbrestore -o again.qcow2 full.lbz'
    expect_same lost.qcow2 qcow2 again.qcow2 qcow2
}

@test "the tour of qcow2-livebackup(7)" {
    prepare
    use 'lbdump disk.qcow2 > base.lbz'
    qemu_write disk.qcow2 2G 100k 2
    use 'lbdump --incremental disk.qcow2 > incr1.lbz'
    qemu_write disk.qcow2 3G 100k 3
    use 'lbdump --incremental disk.qcow2 > incr2.lbz'
    run_expect 0 lbctl status disk.qcow2
    [ "$(grep -c ' trusted$' <<<"$output")" = 3 ]
    use 'lbverify --image=disk.qcow2 base.lbz incr*.lbz'
    mv disk.qcow2 lost.qcow2
    use 'lbrestore -o disk.qcow2 base.lbz incr*.lbz'
    qemu_write disk.qcow2 4G 100k 4
    use 'lbdump --incremental disk.qcow2 > incr3.lbz'
    use 'lbmerge -o base.lbz base.lbz incr*.lbz && rm incr*.lbz'
    use 'lbverify --image=disk.qcow2 base.lbz'
    qemu_write disk.qcow2 5G 100k 5
    use 'lbdump --incremental disk.qcow2 > incr4.lbz'
    use 'lbrestore -o last.qcow2 base.lbz incr*.lbz'
    expect_same last.qcow2 qcow2 disk.qcow2 qcow2
}

@test "the hourly script and the folding of qcow2-livebackup(7)" {
    mkdir web
    prepare
    for n in 1 2 3; do
        # the names must differ, and sort: the time is not waited for
        run_expect 0 lbdump --auto -q -o "web/2026112$n""T000000Z.lbz" disk.qcow2
        qemu_write disk.qcow2 ${n}00M 100k $n
    done
    run_expect 0 lbdump --auto -q -o web/20261124T000000Z.lbz disk.qcow2
    run_expect 0 bash -c 'cd web && archives=(*.lbz) && newest=${archives[-1]} &&
    lbverify "${archives[@]}" &&
    lbmerge -o "$newest" "${archives[@]}" &&
    rm -f "${archives[@]::${#archives[@]}-1}"'
    [ "$(ls web)" = 20261124T000000Z.lbz ]
    run_expect 0 lbverify --image=disk.qcow2 web/*.lbz
    qemu_write disk.qcow2 900M 100k 9
    run_expect 0 lbdump --auto -q -o web/20261125T000000Z.lbz disk.qcow2
    run_expect 0 lbverify --image=disk.qcow2 web/*.lbz
}

@test "the filter of lbctl(1) for what waits for a confirmation" {
    prepare
    lbdump -q disk.qcow2 | cat >a.lbz
    [ "$(lbctl status --json disk.qcow2 |
    jq -r '.checkpoints[] | select(.confirmed | not) | .uuid')" = \
        "$(uuid_of a.lbz)" ]
}
