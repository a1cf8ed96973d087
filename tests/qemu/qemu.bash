# What the bats files of this folder share. They find
#
#   $QLB_QEMU            the patched programs: qemu-img, qemu-io, qemu-nbd,
#                        qemu-storage-daemon, qemu-system-x86_64
#   $QLB_STOCK_QEMU_10   those of the distribution's QEMU 10.0
#   $QLB_STOCK_QEMU_7    those of its QEMU 7.2 (Debian 12 only)
#   $QLB_QEMU_ROOT       the folder that ./setup made them in
#
# `make check` sets them; for `bats tests/qemu/x.bats` in a checkout they are
# guessed.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load ../cli/helpers

: "${QLB_QEMU_ROOT:=$abs_top_srcdir/build-qemu}"
: "${QLB_QEMU:=$QLB_QEMU_ROOT/stage/bin}"
: "${QLB_STOCK_QEMU_10:=$QLB_QEMU_ROOT/stock-10.0/usr/bin}"
: "${QLB_STOCK_QEMU_7:=$QLB_QEMU_ROOT/stock-7.2/usr/bin}"
export QLB_QEMU_ROOT QLB_QEMU QLB_STOCK_QEMU_10 QLB_STOCK_QEMU_7

# claim SCRIPT NAME: a Python script checks it, in the folder of the test.
claim() {
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/qemu/$1" "$2" </dev/null
}

# need_shim: the scripts preload it.
need_shim() {
    local shim=$abs_top_builddir/tests/fault/shim.so
    [ -e "$shim" ] || fail "no $shim: make check builds it"
}
