#!/usr/bin/env bats
# Each patch of qemu-patches/ leaves a QEMU that can be built: for those who
# bisect. By night: it takes a quarter of an hour.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu

# the arguments of configure, and git_in
top=$abs_top_srcdir build=${QLB_QEMU_ROOT%-qemu}
. "$abs_top_srcdir/qemu-patches/build.bash"
qemu=$QLB_QEMU_ROOT

each_configure=("${qemu_configure[@]}" --enable-werror -Doptimization=0)

# step COMMIT TARGETS...: the tree of COMMIT, in $qemu/each/build.
step() {
    local commit=$1
    shift
    git_in each/source read-tree --reset -u "$commit"
    export PKG_CONFIG_PATH=$qemu/core/stage/lib/pkgconfig
    if [ "$(cat .setup-configured)" != "${each_configure[*]}" ]; then
        find . -mindepth 1 -delete
        run_expect 0 ../source/configure "${each_configure[@]}"
        printf '%s\n' "${each_configure[*]}" >.setup-configured
    fi
    # meson's lists first: the objects of new files are in them
    run_expect 0 ninja build.ninja
    run_expect 0 nice ninja "$@" $(objects "$commit")
}

# objects COMMIT: those of the sources that it touches, if anything builds them:
# the emulator as a whole would take too long.
objects() {
    local file
    git_in source diff --name-only "$1^" "$1" -- '*.c' |
        while IFS= read -r file; do
            if grep -q -F " ../source/$file" build.ninja; then
                printf '%s\n' "../source/$file^"
            fi
        done
}

@test "each patch builds by itself, without warnings" {
    local commit commits tools=(
        qemu-img qemu-io qemu-nbd storage-daemon/qemu-storage-daemon
    )
    mapfile -t commits < <(git_in source rev-list --reverse base..series)
    [ "${#commits[@]}" -eq "$(series | wc -l)" ]
    mkdir -p "$qemu/each/build" "$qemu/source.git/index-each"
    cd "$qemu/each/build"
    for commit in "${commits[@]}"; do
        git_in source show -s --format=%s "$commit"
        if git_in source diff --quiet "$commit^" "$commit" -- . \
                ':!docs' ':!tests/qemu-iotests' ':!MAINTAINERS'; then
            continue
        fi
        step "$commit" "${tools[@]}"
    done
    echo "without the library"
    run_expect 0 pyvenv/bin/meson configure -Dlivebackup=disabled
    step series "${tools[@]}"
    run_expect 0 pyvenv/bin/meson configure -Dlivebackup=auto
}
