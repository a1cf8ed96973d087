#!/bin/bash
# An installation is complete: a program that knows only pkg-config builds with
# it, with the shared libraries and with nothing of the build tree.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

set -u
count=0
work=$TMPDIR/install.$$
mkdir -p "$work" || exit 1
trap 'rm -rf "$work"' EXIT

# try NAME COMMAND...: the test NAME is passed if COMMAND ends with 0.
try() {
    local name=$1
    shift
    count=$((count + 1))
    if "$@" >"$work/log" 2>&1 </dev/null; then
        echo "ok $count - $name"
    else
        echo "not ok $count - $name"
        tail -n 20 "$work/log" | sed 's/^/# /'
    fi
}

# The prefix of the configuration is below DESTDIR, wherever it is.
install_it() {
    env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL -u DESTDIR \
        make -C "$abs_top_builddir" install DESTDIR="$work/root"
}

flags() {
    PKG_CONFIG_PATH=$(dirname "$(find "$work/root" -name "$1.pc")") \
        PKG_CONFIG_SYSROOT_DIR=$work/root \
        pkg-config --cflags --libs "$1"
}

# build NAME PACKAGE COMPILER ARGS...
build() {
    local name=$1 package=$2
    shift 2
    # shellcheck disable=SC2046
    "$@" -Wall -Wextra -Werror -o "$work/$name" "$work/$name.c" \
        $(flags "$package")
}

run_it() {
    local libs
    libs=$(dirname "$(find "$work/root" -name "$2.so" -print -quit)")
    [ "$(LD_LIBRARY_PATH=$libs "$work/$1")" = "$3" ]
}

units_find_the_program() {
    local units unit program
    mapfile -t units < <(find "$work/root" -name 'lbvm-*.service')
    [ "${#units[@]}" -eq 3 ] || return 1
    for unit in "${units[@]}"; do
        program=$(sed -n 's/^ExecStart=\([^ ]*\) .*/\1/p' "$unit")
        [ -n "$program" ] && [ -x "$work/root$program" ] || return 1
        [ -e "${unit%.service}.timer" ] || return 1
    done
}

each_header_alone() {
    local header status=0 include
    include=$(dirname "$(find "$work/root" -name qcow2-lb -type d -path '*include*')")
    for header in "$include"/qcow2-lb/*.h; do
        echo "#include <qcow2-lb/${header##*/}>" >"$work/header.c"
        "${CC:-cc}" -std=gnu11 -Wall -Wextra -Werror -fsyntax-only \
            -I"$include" "$work/header.c" || status=1
    done
    return "$status"
}

cat >"$work/user.c" <<'EOF'
#include <qcow2-lb/qcow2lb.h>
#include <stdio.h>
int main(void)
{
    printf("%s\n", qlb_version());
    return 0;
}
EOF
cp "$work/user.c" "$work/core.c"
cp "$work/user.c" "$work/plusplus.c"

try "make install honours DESTDIR" install_it
try "the units of systemd find the installed program" units_find_the_program
try "each installed header stands alone" each_header_alone
version=$(pkg-config --modversion "$(find "$work/root" -name libqcow2lb.pc)")
try "a program builds with libqcow2lb" build user libqcow2lb "${CC:-cc}"
try "a program builds with libqcow2lb-core" build core libqcow2lb-core \
    "${CC:-cc}"
try "a C++ program builds with libqcow2lb" \
    build plusplus libqcow2lb "${CXX:-c++}" -x c++
if [ -n "$(find "$work/root" -name 'libqcow2lb.so')" ]; then
    try "the program runs with the shared library" \
        run_it user libqcow2lb "$version"
    try "the program runs with the shared core" \
        run_it core libqcow2lb-core "$version"
fi
echo "1..$count"
