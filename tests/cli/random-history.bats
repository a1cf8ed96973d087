# Long random histories of a disk: see random_history.py.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers

history() {
    run_expect 0 "$ORACLE_PYTHON" -B \
        "$abs_top_srcdir/tests/cli/random_history.py" "$1" 30
    expect_output ''
    expect_stderr ''
}

@test "30 generations, seed 1: every one restores" {
    history 1
}

@test "30 generations, seed 2: every one restores" {
    history 2
}

@test "a short one, and many more by night" {
    seeds=3
    generations=8
    if [ "${QLB_NIGHTLY:-}" = 1 ]; then
        seeds=$(seq -s' ' 3 20)
        generations=30
    fi
    for seed in $seeds; do
        mkdir "$seed"
        cd "$seed"
        run_expect 0 "$ORACLE_PYTHON" -B \
            "$abs_top_srcdir/tests/cli/random_history.py" "$seed" $generations
        cd ..
        rm -r "$seed"
    done
}
