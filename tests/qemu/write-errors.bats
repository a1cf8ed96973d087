# A patched QEMU is killed at any of its writes, or can't write: what is trusted
# misses nothing, and after a kill it is trusted.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu

setup() {
    helpers_setup
    need_shim
}

@test "killed at any call of a session: trusted, complete" {
    claim writes.py kill-sessions
}

@test "killed at any call of a resize: trusted, complete" {
    claim writes.py kill-resizes
}

@test "killed at any call that makes, reverts to or deletes a snapshot" {
    claim writes.py kill-snapshots
}

@test "killed at any call of amend, bitmap, commit, rebase" {
    claim writes.py kill-others
}

@test "any one call fails: complete, or refused" {
    claim writes.py one-error
}

@test "from any call on all fail: complete, or refused" {
    claim writes.py errors-from-then-on
}

@test "the chunks of the bitmap are bad: the guest goes on, and it is shown" {
    claim writes.py bad-sectors-under-bits
}
