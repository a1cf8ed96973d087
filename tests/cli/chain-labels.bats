# lbdump --chain: chains of one disk that don't disturb each other.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

@test "two labels don't disturb each other" {
    new_disk disk.qcow2 12M
    qemu_write disk.qcow2 0 6M 1
    dump h0.lbz disk.qcow2 --chain=hourly
    qemu_write disk.qcow2 1M 64k 2
    dump w0.lbz disk.qcow2 --chain=weekly
    state[0]=$(content disk.qcow2)
    for n in 1 2 3; do
        change disk.qcow2 "write -P 1$n ${n}M 100k" "write -z $((n + 4))M 64k"
        dump h$n.lbz disk.qcow2 --chain=hourly --incremental
        state[n]=$(content disk.qcow2)
    done
    dump w1.lbz disk.qcow2 --chain=weekly --incremental
    qemu_write disk.qcow2 10M 100k 9
    dump h4.lbz disk.qcow2 --chain=hourly --incremental
    state[4]=$(content disk.qcow2)
    dump w2.lbz disk.qcow2 --chain=weekly --incremental
    good_image disk.qcow2

    for archive in h1:h0 h2:h1 h3:h2 h4:h3 w1:w0 w2:w1; do
        [ "$(header_of ${archive%:*}.lbz .parent_uuid)" = \
          "$(uuid_of ${archive#*:}.lbz)" ]
        [ "$(header_of ${archive%:*}.lbz .label)" = \
          "$(header_of ${archive#*:}.lbz .label)" ]
        # covered are checkpoints of the same label only
        [ "$(lbz dump ${archive%:*}.lbz | jq '.header.covered | length')" = 0 ]
    done
    for n in 1 2 3 4; do
        expect_restores "${state[n]}" --at "$(uuid_of h$n.lbz)" h?.lbz
    done
    expect_restores "${state[0]}" w0.lbz
    expect_restores "${state[3]}" w0.lbz w1.lbz
    expect_restores "${state[4]}" w?.lbz
    run_expect 0 lbverify h?.lbz
    run_expect 0 lbverify w?.lbz
    run_expect 3 lbverify ./*.lbz
    expect_stderr_has 'the archives end in 2 different states' \
        "$(uuid_of h4.lbz)" "$(uuid_of w2.lbz)"
}

@test "the default label is main, and all 22 characters of a label count" {
    new_disk disk.qcow2 4M
    dump a.lbz disk.qcow2
    [ "$(status_of disk.qcow2 .checkpoints[0].label)" = main ]
    dump b.lbz disk.qcow2 --chain=main --incremental
    long=ABCxyz.09_-ABCxyz.09_-
    dump c.lbz disk.qcow2 --chain=$long
    dump d.lbz disk.qcow2 --chain=$long --incremental
    [ "$(status_of disk.qcow2 .checkpoints[3].label)" = $long ]
    run_expect 3 lbdump --incremental --chain=${long%-} -o e.lbz disk.qcow2
    expect_stderr_has "chain '${long%-}' has no confirmed checkpoint"
    good_image disk.qcow2
    good_archives ./*.lbz
}

@test "an incremental of another label may be the parent by --since" {
    new_disk disk.qcow2 4M
    dump a.lbz disk.qcow2
    qemu_write disk.qcow2 1M 64k
    dump b.lbz disk.qcow2 --chain=other --since="$(uuid_of a.lbz)"
    qemu_write disk.qcow2 2M 64k
    dump c.lbz disk.qcow2 --chain=other --incremental
    [ "$(header_of c.lbz .parent_uuid)" = "$(uuid_of b.lbz)" ]
    expect_restores "$(content disk.qcow2)" a.lbz b.lbz c.lbz
}

@test "32 labels fill the image, and one more is refused with advice" {
    new_disk disk.qcow2 1M
    for n in {1..32}; do
        run_expect 0 lbdump -q --chain=c$n -o $n.lbz disk.qcow2
    done
    expect_untouched disk.qcow2 run_expect 2 \
        lbdump --chain=c33 -o 33.lbz disk.qcow2
    expect_stderr 'lbdump: disk.qcow2: the image has 32 checkpoints, each the newest confirmed one of its chain; prune one'
    expect_absent 33.lbz
    # before anything is read or written
    run_expect 0 bash -c 'lbdump --chain=c33 disk.qcow2 | wc -c'
    expect_output 0
    expect_stderr_has 'prune one'
    good_image disk.qcow2
    run_expect 0 lbctl prune --force disk.qcow2 "$(uuid_of 7.lbz)"
    dump 33.lbz disk.qcow2 --chain=c33
}
