# A rollback in place and the patched QEMU: it refuses an unfinished one, and goes
# on tracking behind a finished one.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu
load ../cli/in_place

setup() {
    helpers_setup
    need_shim
    shim=$abs_top_builddir/tests/fault/shim.so
    PATH=$QLB_QEMU:$PATH
    qemu-img create -q -f qcow2 -o livebackup=on disk.qcow2 40M
    guest disk.qcow2 'write -P 1 0 6M'
    run_expect 0 lbdump -q -o 0.lbz disk.qcow2
    guest disk.qcow2 'write -P 2 1M 300k' 'discard 2M 1M'
    run_expect 0 lbdump -q --incremental -o 1.lbz disk.qcow2
    guest disk.qcow2 'write -P 3 1M 64k' 'write -P 4 30M 1M'
}

@test "an unfinished rollback is refused by the patched QEMU and a stock one" {
    QLB_FAULT_PATH=disk.qcow2 QLB_FAULT_AT=9 QLB_FAULT_KIND=kill-after \
        LD_PRELOAD=$shim \
        ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
        run_expect signal:KILL lbrestore -q --in-place disk.qcow2 0.lbz 1.lbz
    expect_unfinished disk.qcow2
    PATH=$QLB_STOCK_QEMU_10:$PATH expect_unfinished disk.qcow2
    run_expect 0 lbrestore -q --in-place disk.qcow2 0.lbz 1.lbz
    expect_content disk.qcow2 0.lbz 1.lbz
}

@test "behind it the patched QEMU tracks on" {
    run_expect 0 lbrestore -q --json --in-place disk.qcow2 0.lbz 1.lbz
    [ "$(jq .compared <<<"$output")" = false ] || fail "$output"
    qemu_check disk.qcow2
    expect_content disk.qcow2 0.lbz 1.lbz
    guest disk.qcow2 'write -P 5 10M 64k'
    run_expect 0 lbctl status --json disk.qcow2
    [ "$(jq -c '[.checkpoints[-1].trusted, .checkpoints[-1].changed_bytes]' \
            <<<"$output")" = "[true,$((3 * 65536))]" ] || fail "$output"
    run_expect 0 lbdump -q --incremental -o 2.lbz disk.qcow2
    expect_content disk.qcow2 0.lbz 1.lbz 2.lbz
}

@test "a disk whose QEMU was killed is rolled back by its bitmaps" {
    qemu-io -f qcow2 -c 'write -P 6 5M 64k' -c 'write -P 7 20M 64k' \
        -c 'sigraise 9' disk.qcow2 >/dev/null 2>&1 </dev/null || true
    run_expect 0 lbrestore -q --json --in-place disk.qcow2 0.lbz 1.lbz
    [ "$(jq .compared <<<"$output")" = false ] || fail "$output"
    qemu_check disk.qcow2
    expect_content disk.qcow2 0.lbz 1.lbz
    expect_follows disk.qcow2 0.lbz 1.lbz
}
