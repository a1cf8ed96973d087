#!/usr/bin/env bats
# qemu-patches/ can be applied where it should be.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu

# series and git_in
top=$abs_top_srcdir build=${QLB_QEMU_ROOT%-qemu}
. "$abs_top_srcdir/qemu-patches/build.bash"
qemu=$QLB_QEMU_ROOT

# git_here ARGS...: git as it is for everybody.
git_here() {
    GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 \
        GIT_AUTHOR_NAME=test GIT_AUTHOR_EMAIL=test \
        GIT_COMMITTER_NAME=test GIT_COMMITTER_EMAIL=test \
        git "$@"
}

# The files that the series changes or makes.
touched() {
    series | sed "s|^|$qemu_patches/|" |
        xargs -d '\n' sed -n 's|^diff --git a/\([^ ]*\) b/.*|\1|p' | sort -u
}

# expect_applies FOLDER: every patch, in turn, as git am has it: no fuzz. What a
# later QEMU has mended in the same way is left out.
expect_applies() {
    local file patch
    git_here init -q repo
    touched | while IFS= read -r file; do
        if [ -e "$1/$file" ]; then
            mkdir -p "repo/$(dirname "$file")"
            cp "$1/$file" "repo/$file"
        fi
    done
    git_here -C repo add -A -f
    git_here -C repo commit -q --allow-empty -m base
    for patch in $(series); do
        if ! git_here -C repo apply -R --check "$qemu_patches/$patch"; then
            run_expect 0 git_here -C repo am -q "$qemu_patches/$patch"
        fi
    done
}

# unpack_touched TARBALL: what the series touches, in ./tree. New files are not
# there, and make tar complain.
unpack_touched() {
    mkdir tree
    touched | sed 's|^|*/|' |
        tar -xf "$1" -C tree --strip-components=1 --wildcards -T - \
            2>/dev/null || true
}

# the_newest: the folder of the newest QEMU 10.0 that was got.
the_newest() {
    local folder
    for folder in "$QLB_QEMU_ROOT"/download/*/; do
        echo "$(cat "$folder/version") $folder"
    done | sort -V | tail -n 1 | cut -d ' ' -f 2
}

@test "the series names each of the patches once" {
    cd "$qemu_patches"
    [ "$(series | LC_ALL=C sort)" = "$(printf '%s\n' *.patch | LC_ALL=C sort)" ]
}

@test "the patches are as ./setup qemu-rebase writes them" {
    local patch zero='From 0\{40\} Mon Sep 17 00:00:00 2001'
    for patch in $(series); do
        head -n 1 "$qemu_patches/$patch" | grep -q -x "$zero" ||
            fail "$patch: not with --zero-commit"
        grep -q '^Subject: \[PATCH\] ' "$qemu_patches/$patch" ||
            fail "$patch: not with -N"
        ! grep -q -x -e '-- ' "$qemu_patches/$patch" ||
            fail "$patch: not with --no-signature"
        grep -q '^Signed-off-by: ' "$qemu_patches/$patch" ||
            fail "$patch: no Signed-off-by"
    done
}

@test "QEMU's checkpatch finds no error in the patches" {
    local patch
    cd "$QLB_QEMU_ROOT/source"
    for patch in $(series); do
        run perl scripts/checkpatch.pl --terse "$qemu_patches/$patch"
        # nothing at all is said of a patch that it has nothing to say of
        [[ -z "$output" || "$output" == *'total: 0 errors,'* ]] ||
            fail "$output"
    done
}

@test "the series applies to its base" {
    find_base
    unpack_touched "$qemu_tarball"
    expect_applies tree
}

@test "the series applies to the newest 10.0 as QEMU released it" {
    unpack_touched "$(the_newest)"/qemu_*.orig.tar.*
    expect_applies tree
}

@test "the series applies to the newest 10.0 with Debian's patches" {
    local dsc
    dsc=$(echo "$(the_newest)"/*.dsc)
    [ -e "$dsc" ] || skip "the mirror has no packaging of it"
    run_expect 0 dpkg-source --no-check -x "$dsc" tree
    expect_applies tree
}
