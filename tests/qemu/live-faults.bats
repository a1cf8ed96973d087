# A backup of a running guest meets kills and errors: no change is forgotten, the
# guest goes on, and the next backup can be made.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu

setup() {
    helpers_setup
    need_shim
}

@test "killed at any call of begin, run and end: trusted, complete" {
    claim live-faults.py kill
}

@test "power lost during a durable backup: it can be taken up" {
    claim live-faults.py power-loss
}

@test "what a stock QEMU writes to what was left is not hidden by our tools" {
    claim live-faults.py hidden-changes
}

@test "killed while a backup runs: the image is trusted" {
    claim live-faults.py killed-while-it-runs
}

@test "originals can't be saved: the guest goes on, the backup is broken" {
    claim live-faults.py orig-errors
}

@test "originals can't be saved: the guest's write fails, if asked for" {
    claim live-faults.py guest-writes-fail-if-asked
}

@test "the orig hangs: the guest waits for the timeout, the monitor answers" {
    claim live-faults.py orig-hangs
}
