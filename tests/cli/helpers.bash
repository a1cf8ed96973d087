# What the bats tests share. A test begins with
#     load helpers          # in tests/fault: load ../cli/helpers
# and works in a directory of its own, which is removed after it.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

bats_require_minimum_version 1.5.0

# `make check` sets these two; for `bats tests/cli/x.bats` in a checkout they
# are guessed.
if [ -z "${abs_top_srcdir:-}" ]; then
    abs_top_srcdir=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
fi
if [ -z "${abs_top_builddir:-}" ]; then
    abs_top_builddir=$abs_top_srcdir/build
fi
PATH=$abs_top_builddir/tools:$PATH:/usr/sbin:/sbin
: "${ORACLE_PYTHON:=/usr/bin/python3}"
export LC_ALL=C.UTF-8 TZ=UTC0

# A test with a setup() of its own calls `helpers_setup` first in it.
helpers_setup() {
    cd "$BATS_TEST_TMPDIR" || return 1
}

setup() {
    helpers_setup
}

# fail TEXT...: end the test, with the reason.
fail() {
    printf '%s\n' "$@" >&2
    return 1
}

# Show what the last command of run_expect gave.
show_run() {
    printf -- '--- command: %s\n' "${run_command[*]}"
    printf -- '--- status: %s\n' "$status"
    printf -- '--- stdout (first lines):\n'
    printf '%s\n' "$output" | head -n 40 | cat -v
    printf -- '--- stderr (first lines):\n'
    printf '%s\n' "$stderr" | head -n 40 | cat -v
} >&2

# run_expect STATUS COMMAND...: run it with no standard input; it must end with
# exactly STATUS. Afterwards $output is its standard output, $stderr its standard
# error. Standard output is a pipe. Death by a signal is never what was expected:
# its status (128 + N) has to be asked for by name, as 'signal:KILL'.
run_expect() {
    local want=$1
    shift
    run_command=("$@")
    case $want in
        signal:*) want=$((128 + $(kill -l "${want#signal:}"))) ;;
        *) [ "$want" -lt 126 ] || fail "run_expect: status $want: use signal:NAME" ||
            return 1 ;;
    esac
    # 'run' may leave the variables of an earlier call alone
    output='' stderr=''
    # binary output would only make bash warn about NUL bytes
    run --separate-stderr "$@" </dev/null
    if [ "$status" -ne "$want" ]; then
        show_run
        fail "expected exit status $want, got $status"
    fi
}

# run_to FILE STATUS COMMAND...: as run_expect, with standard output in FILE (an
# archive has NUL bytes, which $output cannot hold).
run_to() {
    local file=$1
    shift
    local want=$1
    shift
    run_expect "$want" bash -c 'out=$1; shift; exec "$@" >"$out"' \
        run_to "$file" "$@"
}

# expect_stderr TEXT: standard error of the last run_expect is exactly TEXT.
expect_stderr() {
    if [ "$stderr" != "$1" ]; then
        show_run
        fail "--- expected stderr:" "$1"
    fi
}

# expect_stderr_has TEXT...: each TEXT is part of it, literally.
expect_stderr_has() {
    local text
    for text; do
        if [[ "$stderr" != *"$text"* ]]; then
            show_run
            fail "--- expected in stderr:" "$text"
        fi
    done
}

# expect_output TEXT, expect_output_has TEXT...: the same for standard output.
expect_output() {
    if [ "$output" != "$1" ]; then
        show_run
        fail "--- expected stdout:" "$1"
    fi
}

expect_output_has() {
    local text
    for text; do
        if [[ "$output" != *"$text"* ]]; then
            show_run
            fail "--- expected in stdout:" "$text"
        fi
    done
}

# expect_same IMAGE FORMAT IMAGE FORMAT: the guest reads the same from both, and
# both have the same size.
expect_same() {
    run_command=(qemu-img compare -s -f "$2" -F "$4" "$1" "$3")
    run --separate-stderr "${run_command[@]}" </dev/null
    if [ "$status" -ne 0 ]; then
        show_run
        fail "$1 and $3 differ"
    fi
}

# expect_absent FILE...: no such file, and no temporary file left in its place.
expect_absent() {
    local file
    for file; do
        if [ -e "$file" ] || [ -L "$file" ]; then
            fail "$file exists"
        fi
        if compgen -G "$(dirname "$file")/.$(basename "$file").*" >/dev/null; then
            fail "a temporary file of $file was left:" \
                 "$(ls -la "$(dirname "$file")")"
        fi
    done
}

# qemu_check IMAGE: a stock qemu-img finds no error and no leak in it.
qemu_check() {
    run_command=(qemu-img check -f qcow2 --output=json "$1")
    run --separate-stderr "${run_command[@]}" </dev/null
    if [ "$status" -ne 0 ] || ! jq -e '
            (."check-errors" // 0) == 0 and
            (.corruptions // 0) == 0 and
            (.leaks // 0) == 0' <<<"$output" >/dev/null; then
        show_run
        fail "qemu-img check finds damage or leaks in $1"
    fi
}

# qemu_write IMAGE OFFSET LENGTH [PATTERN]: a stock QEMU writes to the guest's
# disk, as `qemu-io -c write` (units k, M, G).
qemu_write() {
    run_command=(qemu-io -f qcow2 -c "write -P ${4:-1} $2 $3" "$1")
    run --separate-stderr "${run_command[@]}" </dev/null
    if [ "$status" -ne 0 ] || [[ "$output$stderr" != *wrote* ]]; then
        show_run
        fail "qemu-io could not write to $1"
    fi
}

# flip FILE OFFSET: one bit of the file is another.
flip() {
    "$ORACLE_PYTHON" -c 'import sys
with open(sys.argv[1], "r+b") as f:
    f.seek(int(sys.argv[2]))
    byte = f.read(1)[0]
    f.seek(int(sys.argv[2]))
    f.write(bytes([byte ^ 1]))' "$1" "$2"
}

# A port of TCP that nobody has just now. Another process may be faster.
free_port() {
    "$ORACLE_PYTHON" -c '
import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])'
}
