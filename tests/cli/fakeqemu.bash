# A QEMU with livebackup, whose part fakeqemu.py plays. A test begins with
#     load helpers
#     load backup
#     load fakeqemu
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

teardown() {
    if [ -s fake.pid ]; then
        kill "$(<fake.pid)" 2>/dev/null || true
    fi
}

# fake [OPTION]... NAME=IMAGE...: a QEMU behind ./qmp.
fake() {
    rm -f qmp
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/cli/fakeqemu.py" qmp "$@" \
        >fake.out 2>&1 3>&- 4>&- &
    echo $! >fake.pid
    for ((i = 0; i < 400; i++)); do
        if [ -S qmp ]; then
            return
        fi
        sleep 0.05
    done
    fail "the fake QEMU does not start:" "$(cat fake.out)"
}

# expect_commands COMMAND...: what was asked of it, without what repeats.
expect_commands() {
    local got
    wait "$(<fake.pid)" || true
    got=$(jq -r .execute qmp.log |
          grep -v -E '^(livebackup-release|query-livebackup)$')
    if [ "$got" != "$(printf '%s\n' "$@")" ]; then
        fail "commands:" "$got" "$(cat fake.out)"
    fi
}

# argument COMMAND FILTER: of the last such command.
argument() {
    jq -r "select(.execute == \"$1\") | .arguments$2" qmp.log | tail -n 1
}

# expect_at_T IMAGE ARCHIVE...: they restore to what the disk was at the point in
# time.
expect_at_T() {
    local image=$1
    shift
    good_archives "$@"
    lbz restore -o oracle.raw "$@"
    cmp oracle.raw "$image.at-T"
    run_expect 0 lbrestore --quiet --force -o restored.raw "$@"
    cmp restored.raw "$image.at-T"
}

# some_disk IMAGE: data, zeroes, compressed clusters and holes, in 10 MiB.
some_disk() {
    new_disk "$1" 10M
    change "$1" 'write -P 1 0 3M' 'write -P 2 5M 200k' \
        'write -c -P 3 6M 1M' 'write -z 1M 128k' 'write -P 4 9900k 100k'
}
