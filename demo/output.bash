# What the demonstration prints, and how it fails.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

fail() {
    printf 'demo: %s\n' "$*" >&2
    if [ -s log ]; then
        tail -n 20 log >&2
    fi
    exit 1
}

if [ -t 1 ]; then
    bold=$'\e[1m' plain=$'\e[0m' green=$'\e[1;32m'
else
    bold='' plain='' green=''
fi

size() {
    stat -c %s "$1" | awk '{ printf "%.1f MiB", $1 / 1048576 }'
}

headline() {
    printf '%s%s%s\n' "$bold" "$*" "$plain"
}

now() {
    printf '%s' "${EPOCHREALTIME/[.,]/}"
}

# step FILE COMMAND: run the command line, print it with the time it took and
# with the size of FILE, its result ('-': none).
step() {
    local begin end what=''
    begin=$(now)
    bash -c "set -euo pipefail; $2" >log 2>&1 || fail "failed: $2"
    end=$(now)
    if [ "$1" != - ]; then
        what=$(size "$1")
    fi
    printf '  $ %-49s %11s %7s s\n' "$2" "$what" \
        "$(awk -v us="$((end - begin))" 'BEGIN { printf "%.2f", us / 1e6 }')"
}

# proof TEXT COMMAND...: run it, say that it went well.
proof() {
    local text=$1
    shift
    "$@" >log 2>&1 || fail "not so: $text ($*)"
    printf '  %-70s %sok%s\n' "$text" "$green" "$plain"
}
