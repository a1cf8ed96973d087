#!/bin/bash
# Every file of the tree is in a list of a Makemodule.am: what is in none is
# missing in the tarball, and a test that is in none never runs.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

set -u
cd "$abs_top_srcdir" || exit 1

files() {
    if [ -e .git ] && command -v git >/dev/null; then
        git -c safe.directory='*' ls-files
    else
        find . -type f | sed 's|^\./||'
    fi | grep -E '^(completion|demo|docs|man|qcow2-lb|qemu-patches|systemd|tests|tools|bench)/'
}

words() {
    cat Makefile.am ./*/Makemodule.am ./*/*/Makemodule.am 2>/dev/null |
        sed 's/#.*//; s/\\$//' | tr -s ' \t' '\n\n'
}

# A listed folder (tests/golden) brings its files along; a unit test is listed
# without its extension.
echo "1..1"
sinners=$(files | grep -v -E '(^|/)(Makemodule\.am|.*\.pc(\.in)?|\.gitignore)$' |
    awk 'NR == FNR { listed[$0] = 1; next }
         {
             name = $0
             while (name != "" && !(name in listed)) {
                 plain = name
                 sub(/\.c$/, "", plain)
                 if (plain in listed) {
                     break
                 }
                 if (!sub(/\/[^\/]*$/, "", name)) {
                     name = ""
                 }
             }
             if (name == "") {
                 print
             }
         }' <(words) -)
if [ -z "$sinners" ]; then
    echo "ok 1 - every file is in a list"
else
    echo "not ok 1 - every file is in a list"
    printf '%s\n' "$sinners" | sed 's/^/# not listed: /'
fi
