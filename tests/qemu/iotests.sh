#!/bin/bash
# The tests that the series adds to QEMU's own (tests/qemu-iotests/tests/
# livebackup-*), run by QEMU's runner on the patched QEMU.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

set -u
if [ -z "${abs_top_srcdir:-}" ]; then
    abs_top_srcdir=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
fi
root=${QLB_QEMU_ROOT:-$abs_top_srcdir/build-qemu}
programs=${QLB_QEMU:-$root/stage/bin}
scratch=${TMPDIR:-/var/tmp}/iotests.$$
trap 'rm -rf "$scratch"' EXIT

cd "$root/build/tests/qemu-iotests" || {
    echo "1..1"
    echo "not ok 1 - QEMU is built"
    echo "# './setup qemu' builds it"
    exit 1
}
tests=()
for test in "$root"/source/tests/qemu-iotests/tests/livebackup-*; do
    case $test in
        *.out | *\*) ;;
        *) tests+=("${test##*/}") ;;
    esac
done
if [ "${#tests[@]}" -eq 0 ]; then
    echo "1..0 # SKIP the series has no tests of its own yet"
    exit
fi

# Paths of sockets must be short. An emulator in its build folder looks for the
# firmware there, hence the staged one.
TMPDIR=/tmp TEST_DIR=$scratch QEMU_PROG=$programs/qemu-system-x86_64 \
    ./check -tap -qcow2 "${tests[@]}" </dev/null 2>&1 |
    awk '
        /^(not )?ok / { n++; sub(/ qcow2 /, " " n " - ") }
        / # SKIP/ { $0 = "not ok " n " - " $4 " can be run here" }
        /^1\.\./ { planned = 1 }
        { print }
        END { if (!planned) print "1..1\nnot ok 1 - the runner began" }'
