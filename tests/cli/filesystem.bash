# Real file systems in a raw file, made of a folder, and judged by their own
# checkers. A test loads it behind helpers.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

# make_files FOLDER SEED: some of several sizes.
make_files() {
    local n
    mkdir "$1"
    for n in 1 3000 70000 2000000; do
        yes "$2 of $n" | head -c "$n" >"$1/file-$n"
    done
    printf '%s\n' "$2" >"$1/name"
}

make_ext4() { # FOLDER IMAGE
    rm -f "$2"
    run_expect 0 mkfs.ext4 -q -d "$1" "$2" 320M
}

check_ext4() { # IMAGE FOLDER
    run_expect 0 e2fsck -fn "$1"
    rm -rf out
    mkdir out
    run_expect 0 debugfs -R "rdump / out" "$1"
    rmdir out/lost+found
    diff -r "$2" out
}

make_xfs() { # FOLDER IMAGE
    local file
    {
        printf '/dev/null\n0 0\nd--755 0 0\n'
        for file in "$1"/*; do
            printf '%s ---644 0 0 %s\n' "${file##*/}" "$file"
        done
        printf '$\n'
    } >protofile
    rm -f "$2"
    truncate -s 320M "$2"
    run_expect 0 mkfs.xfs -q -p protofile "$2"
}

check_xfs() { # IMAGE
    run_expect 0 xfs_repair -n -f "$1"
}
