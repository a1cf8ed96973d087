# A backup of a running guest meets kills and errors: no change is forgotten, the
# guest goes on, and the next backup can be made.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu

setup() {
    helpers_setup
    shim=$abs_top_builddir/tests/fault/shim.so
    [ -e "$shim" ] || fail "no $shim: make check builds it"
}

@test "killed at any call of begin, run and end: trusted, complete" {
    claim live_faults.py kill
}

@test "killed while a backup runs: the image is trusted" {
    claim live_faults.py killed-while-it-runs
}

@test "originals can't be saved: the guest goes on, the backup is broken" {
    claim live_faults.py orig-errors
}

@test "originals can't be saved: the guest's write fails, if asked for" {
    claim live_faults.py guest-writes-fail-if-asked
}

@test "the orig hangs: the guest waits for the timeout, the monitor answers" {
    claim live_faults.py orig-hangs
}
