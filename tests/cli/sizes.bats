# Disks that grow and shrink, and sizes that are no multiple of anything.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

# shrink IMAGE SIZE: as by a program that keeps the canaries: the granule that
# becomes the last one is marked in every bitmap.
shrink() {
    local uuid granularity
    qemu-img resize -q -f qcow2 --shrink "$1" "$2"
    granularity=$(status_of "$1" .granularity)
    for uuid in $(status_of "$1" '.checkpoints[].uuid'); do
        lbext poke "$1" --set "bits[$uuid]=+$((($2 - 1) / granularity))"
    done
}

# grow IMAGE SIZE: the same for growing: all from the old end on is marked.
grow() {
    local uuid granularity old bits n
    old=$(status_of "$1" .virtual_size)
    granularity=$(status_of "$1" .granularity)
    qemu-img resize -q -f qcow2 "$1" "$2"
    bits=
    for ((n = old / granularity; n * granularity < $2; n++)); do
        bits+=,+$n
    done
    for uuid in $(status_of "$1" '.checkpoints[].uuid'); do
        lbext poke "$1" --set "bits[$uuid]=${bits#,}"
    done
}

@test "sizes that are no multiple of 64K" {
    for kind in 512:64K 4096:4K 65024:64K 66048:1M 1000448:4K 33554944:64K; do
        rm -rf ./*
        size=${kind%:*}
        qemu-img create -q -f qcow2 disk.qcow2 "$size"
        run_expect 0 lbctl enable --granularity=${kind#*:} disk.qcow2
        change disk.qcow2 "write -P 1 0 $size"
        dump 0.lbz disk.qcow2
        change disk.qcow2 "write -P 2 $((size - 512)) 512"
        dump 1.lbz disk.qcow2 --incremental
        two=$(content disk.qcow2)
        change disk.qcow2 "write -z $((size - 512)) 512"
        dump 2.lbz disk.qcow2 --incremental
        good_image disk.qcow2
        expect_restores "$two" 0.lbz 1.lbz
        expect_restores "$(content disk.qcow2)" 0.lbz 1.lbz 2.lbz
        run_expect 0 lbmerge -o m.lbz 0.lbz 1.lbz 2.lbz
        good_archives m.lbz
        run_expect 0 lbverify --image=disk.qcow2 m.lbz
    done
}

@test "a disk of size 0 can be dumped and restored" {
    qemu-img create -q -f qcow2 disk.qcow2 0
    run_expect 0 lbdump -q -o full.lbz disk.qcow2
    good_archives full.lbz
    run_expect 0 lbverify --image=disk.qcow2 full.lbz
    run_expect 0 lbmerge -o m.lbz full.lbz
    good_archives m.lbz
    run_expect 0 lbrestore -o r.qcow2 m.lbz
    qemu_check r.qcow2
    [ "$(content r.qcow2)" = "$(content disk.qcow2)" ]
    run_expect 0 lbrestore -o r.raw m.lbz
    [ -f r.raw ] && [ ! -s r.raw ]
    run_expect 0 bash -c 'cat m.lbz | lbrestore --force -o r.raw -'
}

@test "a size in the header that is no multiple of 512 is what QEMU makes of it" {
    new_disk disk.qcow2 1M
    qemu_write disk.qcow2 0 1M 7
    lbext poke disk.qcow2 --set header.size=100300
    [ "$(qemu-img info --output=json disk.qcow2 | jq '."virtual-size"')" = 99840 ]
    run_expect 0 lbdump -q --copy -o full.lbz disk.qcow2
    good_archives full.lbz
    run_expect 0 lbrestore -o r.raw full.lbz
    expect_content "$(content disk.qcow2)" r.raw raw
}

@test "grown by a stock program: still an incremental" {
    for granularity in 4K 64K 1M; do
        rm -rf ./*
        qemu-img create -q -f qcow2 disk.qcow2 1000448
        run_expect 0 lbctl enable --granularity=$granularity disk.qcow2
        change disk.qcow2 'write -P 1 0 1000448'
        dump 0.lbz disk.qcow2
        state0=$(content disk.qcow2)
        qemu-img resize -q -f qcow2 disk.qcow2 20000256
        same_trust disk.qcow2
        dump 1.lbz disk.qcow2 --incremental
        state1=$(content disk.qcow2)
        change disk.qcow2 'write -P 2 977k 3k' 'write -P 3 19531k 512'
        qemu-img resize -q -f qcow2 disk.qcow2 20M
        change disk.qcow2 'write -P 4 20000k 64k'
        dump 2.lbz disk.qcow2 --incremental
        good_image disk.qcow2
        expect_restores "$state0" 0.lbz
        expect_restores "$state1" 0.lbz 1.lbz
        expect_restores "$(content disk.qcow2)" 0.lbz 1.lbz 2.lbz
        run_expect 0 lbmerge -o m.lbz 1.lbz 2.lbz
        good_archives m.lbz
        expect_restores "$(content disk.qcow2)" 0.lbz m.lbz
    done
}

@test "shrunk by a stock program: not trusted, said so, and nothing is written" {
    new_disk disk.qcow2 10M
    qemu_write disk.qcow2 0 10M 1
    dump 0.lbz disk.qcow2
    qemu-img resize -q -f qcow2 --shrink disk.qcow2 5M
    same_trust disk.qcow2
    for command in '--incremental' "--since=$(uuid_of 0.lbz)" \
        '--copy --incremental'; do
        # shellcheck disable=SC2086
        expect_untouched disk.qcow2 run_expect 3 \
            lbdump $command -o never.lbz disk.qcow2
        expect_stderr_has 'lbdump: disk.qcow2: an incremental is not possible: ' \
            '(canary)'
    done
    # grown back, too
    qemu-img resize -q -f qcow2 disk.qcow2 10M
    expect_untouched disk.qcow2 run_expect 3 \
        lbdump --incremental -o never.lbz disk.qcow2
    expect_stderr_has '(canary)'
    expect_absent never.lbz
    run_expect 0 lbdump --auto -o 1.lbz disk.qcow2
    expect_stderr_has 'lbdump: disk.qcow2: full: '
    good_image disk.qcow2
    expect_restores "$(content disk.qcow2)" 1.lbz
}

@test "shrunk by a program that keeps the canaries: an incremental" {
    for size in 5242880 5000192; do
        rm -rf ./*
        new_disk disk.qcow2 10M
        qemu_write disk.qcow2 0 10M 1
        dump 0.lbz disk.qcow2
        qemu_write disk.qcow2 1M 64k 2
        dump 1.lbz disk.qcow2 --incremental
        shrink disk.qcow2 $size
        same_trust disk.qcow2
        [ "$(status_of disk.qcow2 .checkpoints[0].keyword)" = null ]
        dump 2.lbz disk.qcow2 --incremental
        good_image disk.qcow2
        expect_restores "$(content disk.qcow2)" 0.lbz 1.lbz 2.lbz
        run_expect 0 lbmerge -o m.lbz 1.lbz 2.lbz
        good_archives m.lbz
        expect_restores "$(content disk.qcow2)" 0.lbz m.lbz
        run_expect 0 lbmerge -o f.lbz 0.lbz m.lbz
        good_archives f.lbz
        run_expect 0 lbverify --image=disk.qcow2 f.lbz
    done
}

@test "shrunk and grown again: what was cut off does not come back" {
    for size in 5242880 5000192; do
        rm -rf ./*
        new_disk disk.qcow2 10M
        qemu_write disk.qcow2 0 10M 1
        dump 0.lbz disk.qcow2
        shrink disk.qcow2 $size
        dump 1.lbz disk.qcow2 --incremental
        shrunk=$(content disk.qcow2)
        grow disk.qcow2 10485760
        change disk.qcow2 'write -P 3 8M 100k'
        dump 2.lbz disk.qcow2 --incremental
        good_image disk.qcow2
        expect_restores "$shrunk" 0.lbz 1.lbz
        expect_restores "$(content disk.qcow2)" 0.lbz 1.lbz 2.lbz
        # in one archive, by a merge and by a differential: the clip
        run_expect 0 lbmerge -o m.lbz 1.lbz 2.lbz
        good_archives m.lbz
        [ "$(header_of m.lbz .clip)" = $size ]
        expect_restores "$(content disk.qcow2)" 0.lbz m.lbz
        run_expect 0 lbmerge -o f.lbz 0.lbz 1.lbz 2.lbz
        good_archives f.lbz
        [ "$(header_of f.lbz .clip)" = null ]
        expect_restores "$(content disk.qcow2)" f.lbz
        dump d.lbz disk.qcow2 --copy --since="$(uuid_of 0.lbz)"
        [ "$(header_of d.lbz .clip)" = $size ]
        expect_restores "$(content disk.qcow2)" 0.lbz d.lbz
    done
}

@test "shrunk and grown between two checkpoints: all of it is a change" {
    new_disk disk.qcow2 10M
    qemu_write disk.qcow2 0 10M 1
    dump 0.lbz disk.qcow2
    shrink disk.qcow2 5000192
    grow disk.qcow2 9000448
    same_trust disk.qcow2
    dump 1.lbz disk.qcow2 --incremental
    good_image disk.qcow2
    expect_restores "$(content disk.qcow2)" 0.lbz 1.lbz
}

@test "a differential over disks of many sizes" {
    new_disk disk.qcow2 10000384
    qemu_write disk.qcow2 0 9M 1
    dump 0.lbz disk.qcow2
    n=0
    for size in 4000256 12000256 3000320 3000832 8000512; do
        n=$((n + 1))
        if [ $size -lt "$(status_of disk.qcow2 .virtual_size)" ]; then
            shrink disk.qcow2 $size
        else
            grow disk.qcow2 $size
        fi
        change disk.qcow2 "write -P 1$n $((size - 1024)) 1k" \
            "write -P 2$n $((n * 300))k 10k"
        dump $n.lbz disk.qcow2 --incremental
        state[n]=$(content disk.qcow2)
    done
    good_image disk.qcow2
    for n in 1 2 3 4 5; do
        expect_restores "${state[n]}" --at "$(uuid_of $n.lbz)" ?.lbz
    done
    for n in 0 1 2 3 4; do
        dump d$n.lbz disk.qcow2 --copy --since="$(uuid_of $n.lbz)"
        chain=$(seq -f %.0f.lbz 0 $n)
        # shellcheck disable=SC2086
        expect_restores "${state[5]}" $chain d$n.lbz
    done
    for n in 1 2 3 4; do
        run_expect 0 lbmerge -q -o m.lbz $(seq -f %.0f.lbz $n 5)
        good_archives m.lbz
        # shellcheck disable=SC2046
        expect_restores "${state[5]}" $(seq -f %.0f.lbz 0 $((n - 1))) m.lbz
        rm m.lbz
    done
}
