# An archive on standard output begins and ends with its file: offsets in it
# count from the file's first byte, and its trailer is found at the last one.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

setup() {
    helpers_setup
    new_disk disk.qcow2 5M
    qemu_write disk.qcow2 1M 1M 5
}

refused='standard output: the file is not empty, and an archive can'\''t be appended to it'

@test "lbdump neither appends to a file nor confirms what it can't write" {
    echo precious >file
    for redirection in '>>' '1<>'; do
        expect_untouched disk.qcow2 run_expect 2 \
            bash -c "lbdump disk.qcow2 $redirection file"
        expect_stderr "lbdump: $refused"
        [ "$(cat file)" = precious ]
    done
    expect_untouched disk.qcow2 run_expect 2 \
        bash -c '{ echo precious; lbdump disk.qcow2; } >file'
    [ "$(cat file)" = precious ]
    [ "$(status_of disk.qcow2 '.checkpoints | length')" = 0 ]
}

@test "lbmerge does not append either" {
    dump full.lbz disk.qcow2
    echo precious >file
    run_expect 2 bash -c 'lbmerge full.lbz >>file'
    expect_stderr "lbmerge: $refused"
    [ "$(cat file)" = precious ]
}

@test "an empty file may be appended to" {
    run_expect 0 bash -c 'lbdump -q disk.qcow2 >>full.lbz'
    good_archives full.lbz
    [ "$(status_of disk.qcow2 '.checkpoints[0].confirmed')" = true ]
    run_expect 0 bash -c 'lbmerge full.lbz >>merged.lbz'
    good_archives merged.lbz
}
