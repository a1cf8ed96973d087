# NBD servers for the tests of lbdump nbd://..., at ./s. A test begins with
#     load helpers
#     load backup
#     load nbd
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
#
# shellcheck shell=bash disable=SC2034

uri='nbd+unix:///?socket=s'
one=11111111-1111-4111-8111-111111111111
two=22222222-2222-4222-8222-222222222222
three=33333333-3333-4333-8333-333333333333

teardown() {
    stop
}

# The server goes, if there is one.
stop() {
    local pid
    if [ -s server.pid ]; then
        pid=$(<server.pid)
        kill "$pid" 2>/dev/null || true
        while kill -0 "$pid" 2>/dev/null; do
            sleep 0.02
        done
    fi
    rm -f server.pid s
}

# qemu_nbd [OPTION]... IMAGE: stock qemu-nbd exports it for reading, at ./s.
qemu_nbd() {
    stop
    qemu-nbd --fork --pid-file="$PWD/server.pid" -t -r -k "$PWD/s" "$@" \
        >server.out 2>&1 </dev/null 3>&- 4>&- || fail "$(cat server.out)"
}

# nbd_kit ARGUMENT...: nbdkit at ./s.
nbd_kit() {
    stop
    nbdkit -P "$PWD/server.pid" -U "$PWD/s" "$@" \
        >server.out 2>&1 </dev/null 3>&- 4>&- || fail "$(cat server.out)"
}

# some_disk IMAGE: data, zeroes, compressed clusters and holes.
some_disk() {
    qemu-img create -q -f qcow2 "$1" "${2:-10M}"
    change "$1" 'write -P 1 0 3M' 'write -P 2 5M 200k' \
        'write -c -P 3 6M 1M' 'write -z 1M 128k' 'write -P 4 9900k 100k'
}

# pull ARCHIVE [OPTION]...: quiet, and judged by the oracle and by zstd.
pull() {
    run_expect 0 lbdump -o "$1" "${@:2}" "$uri"
    expect_output ''
    expect_stderr ''
    good_archives "$1"
}

# pull_changes ARCHIVE PARENT [OPTION]...: an incremental on the parent's archive,
# by the bitmap b.
pull_changes() {
    pull "$1" --bitmap=b --parent="$(uuid_of "$2")" \
        --image-uuid="$(header_of "$2" .image_uuid)" "${@:3}"
}

# fake_nbd OPTION...: one that says what no other does; what it is asked goes to
# s.log.
fake_nbd() {
    stop
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/cli/fakenbd.py" s "$@" \
        >server.out 2>&1 </dev/null 3>&- 4>&- &
    echo $! >server.pid
    for ((i = 0; i < 400; i++)); do
        if [ -S s ]; then
            return
        fi
        sleep 0.05
    done
    fail "the fake server does not start:" "$(cat server.out)"
}

# asked REQUEST: offset and length of each such request, ascending.
asked() {
    jq -r "select(.request == \"$1\") | \"\\(.offset) \\(.length)\"" s.log |
        sort -n
}

# connections: how many there were.
connections() {
    grep -c '"connection"' s.log
}

# expect_message MESSAGE: exactly that, about the export. A * stands for some
# words of libnbd's, which are others in each version; they tell why.
expect_message() {
    local want="lbdump: $uri: $1" pattern
    pattern=$(printf '%q' "$want")
    # shellcheck disable=SC2053
    if [[ "$stderr" == *$'\n'* ]] || [[ "$stderr" != ${pattern//\\\*/*} ]]; then
        show_run
        fail "--- expected stderr:" "$want"
    fi
}
