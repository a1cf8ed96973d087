# What the bats files of this folder share.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load ../cli/helpers

# claim NAME: check it in the folder of the test. What it notes goes to the log,
# as it tells the seed, and what the kills hit.
claim() {
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/guest/killtest.py" "$1" \
        </dev/null | sed -u 's/^\(# \)*/# /' >&3
    return "${PIPESTATUS[0]}"
}
