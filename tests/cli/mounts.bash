# What lbvm shows as files, with the plugin of this build. A test loads it behind
# vm.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

export LBVM_NBDKIT_PLUGIN=$abs_top_builddir/nbdkit/.libs/nbdkit-lbz-plugin.so

# expect_nothing_runs: no server of ours is left, nor what it was mounted on.
expect_nothing_runs() {
    local i
    for ((i = 0; i < 400; i++)); do
        pgrep -f "file=$PWD/" >/dev/null || break
        sleep 0.05
    done
    ! pgrep -a -f "file=$PWD/"
    ! grep -F " $PWD/" /proc/mounts
    [ "$(find "${TMPDIR:-/tmp}" -maxdepth 1 -name 'lbvm.??????' -newer start)" = '' ]
}

setup() {
    helpers_setup
    : >start
}

teardown() {
    let_go
    grep -o " $PWD/[^ ]*" /proc/mounts | while read -r path; do
        umount -l "$path"
    done
}
