# lbdump --incremental and --since: the changes, all of them, zeroes included.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

@test "an incremental holds what changed, and only that" {
    new_disk disk.qcow2 20M
    qemu_write disk.qcow2 0 10M 1
    dump full.lbz disk.qcow2
    change disk.qcow2 'write -P 2 3M 64k' 'write -P 3 15M 64k'
    run_expect 0 lbdump -q --json --incremental -o incr.lbz disk.qcow2
    # both ends of the disk are always looked at: the canaries
    [ "$(jq '.data_bytes + .zero_bytes' <<<"$output")" = 262144 ]
    good_archives incr.lbz
    good_image disk.qcow2
    expect_restores "$(content disk.qcow2)" full.lbz incr.lbz
}

@test "an incremental of an image that did not change is nearly empty" {
    new_disk disk.qcow2 20M
    qemu_write disk.qcow2 0 10M 1
    dump full.lbz disk.qcow2
    dump incr.lbz disk.qcow2 --incremental
    [ "$(stat -c %s incr.lbz)" -lt 4096 ]
    dump incr2.lbz disk.qcow2 --incremental
    expect_restores "$(content disk.qcow2)" full.lbz incr.lbz incr2.lbz
}

@test "what was zeroed or discarded reads as zeroes after a restore" {
    for options in '' 'cluster_size=4k' 'cluster_size=2M' \
        'extended_l2=on,cluster_size=64k'; do
        rm -rf ./*
        new_disk disk.qcow2 12M ${options:+-o $options}
        qemu_write disk.qcow2 0 12M 171
        dump full.lbz disk.qcow2
        run_command=(qemu-io)
        qemu-io -f qcow2 -d unmap -c 'write -z 1M 512k' \
            -c 'write -z -u 2M 512k' -c 'discard 3M 512k' \
            -c 'write -P 0 4M 512k' -c 'write -z 5000k 3k' \
            -c 'discard 11M 1M' disk.qcow2
        now=$(content disk.qcow2)
        dump incr.lbz disk.qcow2 --incremental
        good_image disk.qcow2
        expect_restores "$now" full.lbz incr.lbz
        # and as zeroes, not as holes through which old data shows
        dump twice.lbz disk.qcow2 --incremental
        expect_restores "$now" full.lbz incr.lbz twice.lbz
        # a discard of less than a cluster does nothing
        [[ "$options" == *2M ]] ||
            [ "$(lbz dump incr.lbz | jq .trailer.data_blocks)" -le 3 ]
    done
}

@test "granularities from 4K to 2M give the same chain" {
    for granularity in 4K 16K 64K 128K 2M; do
        rm -rf ./*
        qemu-img create -q -f qcow2 disk.qcow2 33000000
        run_expect 0 lbctl enable --granularity=$granularity disk.qcow2
        change disk.qcow2 'write -P 1 0 20M'
        dump 0.lbz disk.qcow2
        change disk.qcow2 'write -P 2 1k 1k' 'write -P 3 8190k 4k' \
            'write -z 12M 1M' 'write -P 4 32999k 512'  || true
        dump 1.lbz disk.qcow2 --incremental
        one=$(content disk.qcow2)
        change disk.qcow2 'write -P 5 20000k 100k' 'write -P 6 60k 8k'
        dump 2.lbz disk.qcow2 --incremental
        good_image disk.qcow2
        expect_restores "$(content disk.qcow2)" 2.lbz 1.lbz 0.lbz
        expect_restores "$one" --at "$(uuid_of 1.lbz)" 0.lbz 1.lbz 2.lbz
    done
}

@test "--since goes back to any kept checkpoint, confirmed or not" {
    new_disk disk.qcow2 10M
    qemu_write disk.qcow2 0 5M 1
    dump full.lbz disk.qcow2
    qemu_write disk.qcow2 1M 64k 2
    lbdump -q --incremental disk.qcow2 | cat >piped.lbz
    qemu_write disk.qcow2 2M 64k 3
    dump incr.lbz disk.qcow2 --incremental
    qemu_write disk.qcow2 3M 64k 4
    now=$(content disk.qcow2)
    dump d0.lbz disk.qcow2 --copy --since="$(uuid_of full.lbz)"
    dump d1.lbz disk.qcow2 --copy --since="$(uuid_of piped.lbz)"
    dump d2.lbz disk.qcow2 --copy --since="$(uuid_of incr.lbz)"
    [ "$(header_of d1.lbz .parent_uuid)" = "$(uuid_of piped.lbz)" ]
    expect_restores "$now" full.lbz d0.lbz
    expect_restores "$now" full.lbz piped.lbz d1.lbz
    expect_restores "$now" full.lbz incr.lbz d2.lbz
    [ "$(header_of incr.lbz .parent_uuid)" = "$(uuid_of full.lbz)" ]

    # upper case is a UUID, too; and it adds a checkpoint like any dump
    upper=$(uuid_of full.lbz | tr a-f A-F)
    dump d3.lbz disk.qcow2 --since="$upper"
    [ "$(status_of disk.qcow2 '.checkpoints[-1].confirmed')" = true ]
    expect_restores "$now" full.lbz d3.lbz

    other=11111111-2222-4333-8444-555555555555
    expect_untouched disk.qcow2 run_expect 3 \
        lbdump --since=$other -o never.lbz disk.qcow2
    expect_stderr "lbdump: disk.qcow2: an incremental is not possible: the image has no checkpoint $other; 'lbctl status' lists them"
    expect_absent never.lbz
}

@test "without a confirmed checkpoint there is no incremental" {
    new_disk disk.qcow2 10M
    expect_untouched disk.qcow2 run_expect 3 \
        lbdump --incremental -o never.lbz disk.qcow2
    expect_stderr_has '(no-checkpoint); make a full dump, or use --auto'
    lbdump -q disk.qcow2 | cat >full.lbz
    expect_untouched disk.qcow2 run_expect 3 \
        lbdump --incremental -o never.lbz disk.qcow2
    expect_stderr "lbdump: disk.qcow2: an incremental is not possible: chain 'main' has no confirmed checkpoint (no-checkpoint); make a full dump, or use --auto"
    run_to never.lbz 3 lbdump --incremental disk.qcow2
    [ ! -s never.lbz ]
    read -r root uuid < <(lbz root full.lbz)
    run_expect 0 lbctl confirm disk.qcow2 "$uuid" "$root"
    dump incr.lbz disk.qcow2 --incremental
}

@test "an unconfirmed archive is covered, and needed by nobody" {
    new_disk disk.qcow2 10M
    qemu_write disk.qcow2 0 5M 1
    dump full.lbz disk.qcow2
    qemu_write disk.qcow2 1M 64k 2
    lbdump -q --incremental disk.qcow2 | cat >lost.lbz
    qemu_write disk.qcow2 2M 64k 3
    lbdump -q --incremental disk.qcow2 | cat >lost2.lbz
    qemu_write disk.qcow2 1M 4k 4
    dump incr.lbz disk.qcow2 --incremental
    now=$(content disk.qcow2)
    [ "$(lbz dump incr.lbz | jq -r '.header.covered | sort | join(" ")')" = \
      "$(printf '%s\n' "$(uuid_of lost.lbz)" "$(uuid_of lost2.lbz)" |
         sort | paste -sd' ')" ]
    expect_restores "$now" full.lbz incr.lbz
    # they turn up later: no riddle
    run_expect 0 lbrestore -o with.qcow2 full.lbz lost.lbz incr.lbz lost2.lbz
    expect_stderr 'lbrestore: lost.lbz: not needed, left out
lbrestore: lost2.lbz: not needed, left out'
    expect_content "$now" with.qcow2
    run_expect 0 lbverify full.lbz lost.lbz incr.lbz lost2.lbz
    expect_stderr 'lbverify: lost.lbz: not part of the chain
lbverify: lost2.lbz: not part of the chain'
}

@test "changes by a stock qemu-nbd are tracked like those of a guest" {
    new_disk disk.qcow2 10M
    qemu_write disk.qcow2 0 5M 1
    dump full.lbz disk.qcow2
    hold_open disk.qcow2
    qemu-io -f raw -c 'write -P 9 2M 70k' -c 'write -z 3M 64k' \
        "nbd+unix:///held?socket=$BATS_TEST_TMPDIR/holder.sock"
    let_go
    qemu_check disk.qcow2
    same_trust disk.qcow2
    dump incr.lbz disk.qcow2 --incremental
    expect_restores "$(content disk.qcow2)" full.lbz incr.lbz
}

@test "a killed QEMU costs the incremental, and is told" {
    new_disk disk.qcow2 10M
    dump full.lbz disk.qcow2
    hold_open disk.qcow2
    qemu-io -f raw -c 'write -P 9 2M 70k' -c flush \
        "nbd+unix:///held?socket=$BATS_TEST_TMPDIR/holder.sock"
    kill -KILL "$(<"$BATS_TEST_TMPDIR/holder.pid")"
    while kill -0 "$(<"$BATS_TEST_TMPDIR/holder.pid")" 2>/dev/null; do
        sleep 0.02
    done
    rm "$BATS_TEST_TMPDIR/holder.pid"
    same_trust disk.qcow2
    expect_untouched disk.qcow2 run_expect 3 \
        lbdump --incremental -o never.lbz disk.qcow2
    expect_stderr_has '(in-use)'
    run_expect 0 lbdump --auto -o full2.lbz disk.qcow2
    expect_stderr_has 'full: ' '(in-use)'
    good_image disk.qcow2
    expect_restores "$(content disk.qcow2)" full2.lbz
}

teardown() {
    let_go
}
