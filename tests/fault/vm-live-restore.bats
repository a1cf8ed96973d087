# lbvm restore --live that is killed, or whose writes fail, at any of its writes
# before the machine can be started: no disk looks whole, and the same command goes
# on. What comes later, tests/qemu/vm-live-restore.bats has.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load fault
load ../cli/backup
load ../cli/vm

setup() {
    helpers_setup
    shim=$abs_top_builddir/tests/fault/shim.so
    [ -e "$shim" ] || fail "no $shim: make check builds it"
    plugin=$abs_top_builddir/nbdkit/.libs/nbdkit-lbz-plugin.so
    export LBVM_NBDKIT_PLUGIN=$plugin
    # A plugin that was built with a sanitizer wants it in nbdkit.
    sanitizer=$(ldd "$plugin" | sed -n 's/.*=> \(.*libasan[^ ]*\) .*/\1/p')
    for disk in vda vdb; do
        new_disk $disk.qcow2 5M
        change $disk.qcow2 'write -P 1 1M 100k'
    done
    run_expect 0 lbvm backup -q web1 vda.qcow2 vdb.qcow2
    id=$(lbvm show --json web1 | jq -r .id)
    jq '.definition = "definitions/web1.json"' "repo/web1/backups/$id.json" >edited
    mv edited "repo/web1/backups/$id.json"
    mkdir -p repo/web1/definitions
    echo '{}' >repo/web1/definitions/web1.json
    for disk in vda vdb; do
        qemu-img convert -f qcow2 -O raw $disk.qcow2 $disk.model
    done
}

teardown() {
    if [ -s pid ]; then
        kill -KILL "$(<pid)" 2>/dev/null || true
    fi
}

# serve [VARIABLE=VALUE]...: lbvm, in that environment, until the machine can be
# started, or it ends.
serve() {
    local i
    : >out
    env ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
        LD_PRELOAD="$sanitizer" "$@" \
        lbvm restore --live -o restored web1 >out 2>message </dev/null 3>&- 4>&- &
    echo $! >pid
    for ((i = 0; i < 2400; i++)); do
        if grep -q 'can be started' out || ! kill -0 "$(<pid)" 2>/dev/null; then
            return
        fi
        sleep 0.02
    done
    fail "nothing is served" "$(cat out message)"
}

# Its status in $status.
end() {
    status=0
    kill -TERM "$(<pid)" 2>/dev/null || true
    wait "$(<pid)" || status=$?
    rm pid
}

# expect_unfinished WHAT: whatever there is names the backup as its backing file.
expect_unfinished() {
    local file
    for file in restored/*.qcow2; do
        [ -e "$file" ] || continue
        qemu-img info --output=json "$file" | jq -r '."backing-filename"' |
            grep -q '/restored/\.lbvm-live/[01]"' || fail "$1: $file looks whole"
    done
}

# expect_goes_on WHAT: the same command, and the disks are right.
expect_goes_on() {
    local disk
    serve
    grep -q 'can be started' out || fail "$1:" "$(cat message)"
    [ -e restored/web1.json ]
    for disk in vda vdb; do
        qemu-img compare -q -f raw -F qcow2 $disk.model restored/$disk.qcow2 ||
            fail "$1: $disk is another disk"
    done
    end
    [ "$status" = 1 ]
}

# under [VARIABLE=VALUE]...: serve under the shim.
under() {
    rm -rf restored
    serve LD_PRELOAD="$shim${sanitizer:+:$sanitizer}" QLB_FAULT_PATH=restored/ \
        QLB_FAULT_OP=write,sync,truncate,rename,unlink "$@"
}

# each_step KIND STATUS: the N-th write, for all N, is one of that KIND. Those that
# are not needed (to delete a socket that is not there) do no harm.
each_step() {
    local n total ended=0
    under QLB_FAULT_COUNT_FILE=total
    end
    total=$(<total)
    for ((n = 1; n <= total; n++)); do
        under QLB_FAULT_KIND="$1" QLB_FAULT_AT=$n
        if ! grep -q 'can be started' out; then
            wait "$(<pid)" && status=0 || status=$?
            [ "$status" = "$2" ] || fail "$1 at $n: status $status" "$(cat message)"
            ended=$((ended + 1))
        fi
        end
        expect_unfinished "$1 at $n"
        expect_goes_on "$1 at $n"
    done
    [ $ended -gt 20 ] || fail "$ended of $total"
}

@test "killed before any of its writes" {
    each_step kill-before 137
}

@test "killed after any of its writes" {
    each_step kill-after 137
}

@test "killed in the middle of any of its writes" {
    each_step torn 137
}

@test "each of its writes and syncs can fail" {
    each_step eio 1
}
