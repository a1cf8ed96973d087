# lbdump --overlay: for those who work with external snapshots.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

setup() {
    helpers_setup
    new_disk base.qcow2 20M
    qemu_write base.qcow2 0 10M 1
    dump 0.lbz base.qcow2
}

@test "the archive on top of the base's gives the overlay" {
    qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2
    change top.qcow2 'write -P 2 1M 100k' 'write -P 3 15M 64k' \
        'write -z 3M 1M' 'write -P 4 9000k 1k'
    cp base.qcow2 base.before
    expect_untouched top.qcow2 dump 1.lbz top.qcow2 --overlay
    cmp base.qcow2 base.before
    [ "$(header_of 1.lbz .parent_uuid)" = "$(uuid_of 0.lbz)" ]
    [ "$(header_of 1.lbz .image_uuid)" = "$(header_of 0.lbz .image_uuid)" ]
    expect_restores "$(content top.qcow2)" 0.lbz 1.lbz
    # only what is there, and the two canaries of the base
    [ "$(lbz dump 1.lbz | jq '.trailer | .data_blocks + .zero_blocks')" -le 25 ]
    # the next one has the same parent
    change top.qcow2 'write -P 5 2M 64k'
    dump 2.lbz top.qcow2 --overlay
    [ "$(header_of 2.lbz .parent_uuid)" = "$(uuid_of 0.lbz)" ]
    expect_restores "$(content top.qcow2)" 0.lbz 2.lbz
}

@test "what changed in the base before the snapshot is in it, too" {
    change base.qcow2 'write -P 6 5M 100k' 'write -z 6M 64k'
    qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2
    change top.qcow2 'write -P 2 1M 100k'
    dump 1.lbz top.qcow2 --overlay
    expect_restores "$(content top.qcow2)" 0.lbz 1.lbz
}

@test "cluster sizes, subclusters, zeroes over the base" {
    for options in cluster_size=4k cluster_size=2M \
        extended_l2=on,cluster_size=128k; do
        rm -f top.qcow2 1.lbz
        qemu-img create -q -f qcow2 -o $options -b base.qcow2 -F qcow2 top.qcow2
        change top.qcow2 'write -P 2 1001k 5k' 'write -z -u 4M 3M' \
            'write -P 0 8M 64k'
        dump 1.lbz top.qcow2 --overlay
        expect_restores "$(content top.qcow2)" 0.lbz 1.lbz
    done
}

@test "an overlay that is larger, or smaller, than its base" {
    for size in 30M 25000448 8M 8000512; do
        rm -f top.qcow2 1.lbz
        qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 $size
        change top.qcow2 'write -P 2 1001k 5k' 'write -P 3 7M 100k'
        dump 1.lbz top.qcow2 --overlay
        expect_restores "$(content top.qcow2)" 0.lbz 1.lbz
    done
}

@test "a base that was shrunk, under an overlay that grew: the clip" {
    qemu-img resize -q -f qcow2 --shrink base.qcow2 5000192
    lbext poke base.qcow2 --set "bits[$(uuid_of 0.lbz)]=+76"
    qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 20M
    change top.qcow2 'write -P 2 1001k 5k'
    dump 1.lbz top.qcow2 --overlay
    expect_restores "$(content top.qcow2)" 0.lbz 1.lbz
}

@test "an overlay of an overlay" {
    qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2
    lbctl enable mid.qcow2
    qemu_write mid.qcow2 1M 1M 2
    dump m0.lbz mid.qcow2
    qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2
    change top.qcow2 'write -P 3 3M 100k' 'write -z 1M 64k'
    dump m1.lbz top.qcow2 --overlay
    expect_restores "$(content top.qcow2)" m0.lbz m1.lbz
}

@test "--chain chooses the parent, --json and -o are as ever" {
    qemu_write base.qcow2 2M 64k 8
    dump w0.lbz base.qcow2 --chain=weekly
    qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2
    qemu_write top.qcow2 3M 64k 9
    run_expect 0 lbdump --overlay --chain=weekly --json -o w1.lbz top.qcow2
    jq -e --arg parent "$(uuid_of w0.lbz)" '.kind == "incremental" and
        .parent == $parent and .label == "weekly" and
        (.checkpoint | not) and (.confirmed | not)' <<<"$output"
    expect_restores "$(content top.qcow2)" w0.lbz w1.lbz
    run_to 1.lbz 0 lbdump --overlay top.qcow2
    good_archives 1.lbz
    expect_restores "$(content top.qcow2)" 0.lbz 1.lbz
}

@test "what can't be is refused" {
    expect_untouched base.qcow2 run_expect 2 \
        lbdump --overlay -o x.lbz base.qcow2
    expect_stderr 'lbdump: base.qcow2: --overlay wants an image with a backing file'
    qemu-img create -q -f qcow2 plain.qcow2 20M
    qemu-img create -q -f qcow2 -b plain.qcow2 -F qcow2 top.qcow2
    run_expect 3 lbdump --overlay -o x.lbz top.qcow2
    expect_stderr_has 'lbdump: top.qcow2: the backing image plain.qcow2 has no checkpoint: ' '(off)'
    truncate -s 20M plain.raw
    qemu-img create -q -f qcow2 -b plain.raw -F raw raw.qcow2
    run_expect 3 lbdump --overlay -o x.lbz raw.qcow2
    expect_stderr 'lbdump: raw.qcow2: the backing image plain.raw has no checkpoint: it is not a qcow2 image'
    lbctl enable plain.qcow2
    run_expect 3 lbdump --overlay -o x.lbz top.qcow2
    expect_stderr_has '(no-checkpoint)'
    qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 over.qcow2
    qemu-img bitmap --clear base.qcow2 "lb-$(uuid_of 0.lbz)"
    run_expect 3 lbdump --overlay -o x.lbz over.qcow2
    expect_stderr_has 'lbdump: over.qcow2: an incremental is not possible: ' \
        '(canary)'
    expect_absent x.lbz
}
