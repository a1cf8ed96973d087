#!/bin/bash
# Compares our tools with their peers: on the same disk, in turn, in one run.
#
# The disk holds 4 GiB of real files (from /usr) and 1 GiB of random bytes in an
# ext4 file system of 20 GiB; it is made once and kept in the working directory,
# as are the archives and images that the rows begin with. Each row reads its
# inputs once (so that they are cached), then runs its contenders in turn, the
# first round not counted. Where our tool syncs what it writes, the peer's time
# includes a sync of its output. results.tsv gets one line for each run; the
# table is made from it by report.py, which also knows what is required. How
# tracking is measured is written in tracking.py.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

set -euo pipefail
export LC_ALL=C.UTF-8

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
all_rows=(dump size restore verify merge incremental memory tracking)
rows=()
settings=()    # options that the table's reader must know
runs=5
small=0
markdown=0
work=
out=
qemu=${QLB_QEMU:-$here/../build-qemu/stage/bin}
stock_qemu=${QLB_STOCK_BUILD:-$here/../build-qemu/plain-stage/bin}

usage() {
    cat <<'END'
Usage: bench/run.sh [OPTION]...     (./setup bench [OPTION]... builds first)

  -n N         runs of each contender (default: 5)
  --only ROW   only that row; may be repeated. Rows: dump size restore verify
               merge incremental memory tracking; and live, vm and recovery,
               left out unless asked for
  --small      a tenth of the size, to try things out
  --dir DIR    keep disks and archives there (default: build/bench; 30 GiB)
  --out DIR    let the contenders write there (default: out in that directory)
  --markdown   print the table for docs/benchmark.md

live, vm and recovery print tables of their own: what a backup costs a guest that
writes (fio is the guest), ours and those of a stock QEMU; lbvm with a machine of
four disks, and pruning; and the plugin of nbdkit, rescans, and rollbacks in place,
of which there is no --small.

tracking compares the patched QEMU in $QLB_QEMU with a stock one of the same
source and configuration in $QLB_STOCK_BUILD (default: stage/bin and
plain-stage/bin in build-qemu); where they are missing it is left out, unless
asked for.
END
}

die() {
    printf 'bench: %s\n' "$*" >&2
    exit 1
}

say() {
    printf '== %s\n' "$*" >&2
}

# Print the first program of the two builds of QEMU that does not exist.
missing_qemu() {
    local program
    for program in {"$qemu","$stock_qemu"}/{qemu-img,qemu-storage-daemon} \
            "$stock_qemu/qemu-io"; do
        if [ ! -x "$program" ]; then
            printf '%s\n' "$program"
            return
        fi
    done
}

parse_options() {
    while [ "$#" -gt 0 ]; do
        case $1 in
            -n) runs=${2:?"-n wants a number"}; settings+=(-n "$2"); shift ;;
            --only) rows+=("${2:?"--only wants a row"}")
                    settings+=(--only "$2"); shift ;;
            --small) small=1; settings+=(--small) ;;
            --dir) work=${2:?"--dir wants a directory"}; shift ;;
            --out) out=${2:?"--out wants a directory"}; shift ;;
            --markdown) markdown=1 ;;
            -h | --help) usage; exit 0 ;;
            *) usage >&2; exit 2 ;;
        esac
        shift
    done
    if [ "${#rows[@]}" -eq 0 ]; then
        rows=("${all_rows[@]}")
        if [ -n "$(missing_qemu)" ]; then
            say "tracking is left out: there is no $(missing_qemu)"
            unset 'rows[-1]'
        fi
    fi
    local row
    for row in "${rows[@]}"; do
        case " ${all_rows[*]} live vm recovery " in
            *" $row "*) ;;
            *) die "no row is called '$row'" ;;
        esac
    done
}

set_sizes() {
    local scale=1
    if [ "$small" -eq 1 ]; then
        scale=10
    fi
    file_bytes=$(((4 << 30) / scale))
    random_mib=$((1024 / scale))
    disk_mib=$((20480 / scale))
    changes=$((1600 / scale))               # of 64 KiB
    extents=$((10000000 / scale))
    extents_size=$(((1 << 44) / (small ? 16 : 1)))
    if [ -z "$work" ]; then
        work=${BUILD:-$here/../build}/bench
    fi
    mkdir -p "$work"
    work=$(cd "$work" && pwd)
    top=$work
    if [ "$small" -eq 1 ]; then
        top=$work/small
    fi
    data=$top/data
    out=${out:-$top/out}
    mkdir -p "$data" "$out"
    results=$top/results.tsv
    log=$top/log
}

check_tools() {
    local tool
    for tool in lbctl lbdump lbmerge lbverify lbrestore qemu-img qemu-io \
            qemu-nbd nbdcopy zstd mke2fs python3 /usr/bin/time; do
        command -v "$tool" >/dev/null || die "$tool is not installed"
    done
    if [[ " ${rows[*]} " = *' tracking '* || " ${rows[*]} " = *' live '* ]]; then
        tool=$(missing_qemu)
        [ -z "$tool" ] || die "there is no $tool; see --help"
    fi
    if [[ " ${rows[*]} " =~ ' '(live|recovery)' ' ]]; then
        command -v fio >/dev/null || die "fio is not installed"
    fi
}

# ---------------------------------------------------------------- the inputs

# make_once FILE COMMAND...: the command makes $making, which becomes FILE.
make_once() {
    local target=$1 status
    shift
    if [ -e "$target" ]; then
        return
    fi
    say "making ${target#"$work"/}"
    making=$target.making
    rm -rf "$making"
    set +e # in a condition it would be off inside, too
    (set -e; "$@") >"$log" 2>&1
    status=$?
    set -e
    if [ "$status" -ne 0 ]; then
        tail -n 20 "$log" >&2
        die "failed: $*"
    fi
    sync "$making"
    mv "$making" "$target"
}

# Copy files of /usr into the folder $1, in an order that is mixed but always
# the same, again and again until there are enough bytes.
gather_files() {
    local stage=$1 left=$file_bytes round=0 got
    while [ "$left" -gt 0 ]; do
        mkdir -p "$stage/$round"
        (cd /usr && find . -xdev -type f -readable -size -200M -printf \
                '%s\t%p\n') | sort -t $'\t' -k 2 |
            shuf --random-source=<(yes "$round") |
            awk -F '\t' -v left="$left" -v sizes="$stage.bytes" '
                left > 0 { left -= $1; sum += $1; print $2 }
                END { printf "%.0f\n", sum >sizes }' >"$stage.list"
        tar -c -C /usr --ignore-failed-read -T "$stage.list" |
            tar -x -C "$stage/$round"
        got=$(cat "$stage.bytes")
        [ "$got" -gt 0 ] || die "/usr holds no files"
        left=$((left - got))
        round=$((round + 1))
    done
}

make_disk() {
    local stage=$top/stage
    rm -rf "$stage"
    mkdir -p "$stage"
    gather_files "$stage"
    head -c "${random_mib}M" /dev/urandom >"$stage/random"
    mke2fs -q -t ext4 -d "$stage" "$top/disk.raw" "${disk_mib}M"
    rm -rf "$stage" "$stage.list" "$stage.bytes"
    qemu-img convert -O qcow2 "$top/disk.raw" "$making"
    rm "$top/disk.raw"
}

make_zstd_disk() {
    qemu-img convert -c -O qcow2 -o compression_type=zstd -m 8 -W \
        "$data/disk.qcow2" "$making"
}

make_zst() {
    zstd -q -T2 -1 -o "$making" "$data/disk.qcow2"
}

# write_pieces IMAGE SEED OFFSET...: write 64 KiB to each, taken from the disk.
write_pieces() {
    local image=$1 seed=$2 pieces=$top/pieces i=0 offset
    shift 2
    rm -rf "$pieces"
    mkdir -p "$pieces"
    python3 "$here/allocated.py" content "$data/disk.qcow2" 2>/dev/null |
        tail -c "+$((seed * 40000000 + 1))" 2>/dev/null |
        head -c "$((changes * 65536))" |
        split -b 64K -a 5 -d - "$pieces/" || true
    for offset; do
        printf 'write -q -s %s/%05d %d 64k\n' "$pieces" "$i" "$offset"
        i=$((i + 1))
    done | qemu-io -f qcow2 "$image" >"$log"
    rm -rf "$pieces"
}

# A full archive and seven incrementals, each of $changes blocks that held data.
make_chain() {
    local image=$top/chain.qcow2 i offsets
    mkdir -p "$making"
    cp "$data/disk.qcow2" "$image"
    lbctl enable "$image"
    lbdump -q -o "$making/base.lbz" "$image"
    for i in 1 2 3 4 5 6 7; do
        mapfile -t offsets < <(python3 "$here/allocated.py" offsets \
                                   "$data/disk.qcow2" "$changes" "$i")
        write_pieces "$image" "$i" "${offsets[@]}"
        lbdump -q --incremental -o "$making/incr$i.lbz" "$image"
    done
    rm "$image"
}

make_merged() {
    lbmerge -q -o "$making" "$data"/chain/*.lbz
}

# make_wide SIZE: an empty disk, dumped once, then changed at random places.
make_wide() {
    local offsets
    qemu-img create -q -f qcow2 "$making" "$1"
    lbctl enable "$making"
    lbdump -q "$making" >"$top/wide.lbz"
    rm "$top/wide.lbz"
    mapfile -t offsets < <(python3 -c '
import random, sys
blocks = int(sys.argv[1]) << 24
for block in random.Random(1).sample(range(blocks), int(sys.argv[2])):
    print(block << 16)' "${1%T}" "$changes")
    write_pieces "$making" 3 "${offsets[@]}"
}

# Ten million extents, and as many changes since the last dump.
make_extents() {
    local bitmap
    mkdir -p "$making"
    python3 "$here/extents.py" "$making/disk.qcow2" "$extents_size" "$extents"
    qemu-img check "$making/disk.qcow2"
    lbctl enable "$making/disk.qcow2"
    lbdump -q -o "$making/base.lbz" "$making/disk.qcow2"
    bitmap=$(qemu-img info --output=json "$making/disk.qcow2" | python3 -c '
import json, sys
info = json.load(sys.stdin)["format-specific"]["data"]
print(*[b["name"] for b in info["bitmaps"] if "auto" in b["flags"]])')
    qemu-img bitmap --merge pattern "$making/disk.qcow2" "$bitmap"
    qemu-img bitmap --remove "$making/disk.qcow2" pattern
}

need_disk() { make_once "$data/disk.qcow2" make_disk; }
need_zstd_disk() { need_disk; make_once "$data/zstd.qcow2" make_zstd_disk; }
need_zst() { need_disk; make_once "$data/disk.zst" make_zst; }
need_chain() { need_disk; make_once "$data/chain" make_chain; }
need_merged() { need_chain; make_once "$data/merged.lbz" make_merged; }
need_wide() { need_disk; make_once "$data/wide$1.qcow2" make_wide "$1"; }
need_extents() { make_once "$data/extents" make_extents; }

# ----------------------------------------------------------------- measuring

# record ROW WHO VALUE...
record() {
    local IFS=$'\t'
    printf '%s\n' "$*" >>"$results"
}

# read_once FILE...: into the page cache.
read_once() {
    cat -- "$@" >/dev/null
}

clear_out() {
    rm -rf "${out:?}"/*
    sync -f "$out"
}

# Row, contender, command: as one line of results.tsv. 'prepare' is a function
# that a row may define, run before each run.
measure() {
    local row=$1 who=$2 command=$3 begin end usage count=${4:-yes}
    clear_out
    prepare
    begin=${EPOCHREALTIME/./}
    /usr/bin/time -o "$top/usage" -f '%U %S %M' \
        bash -c "set -euo pipefail; cd $(printf %q "$out"); $command" \
        >"$log" 2>&1 </dev/null ||
        { tail -n 20 "$log" >&2; die "failed: $command"; }
    end=${EPOCHREALTIME/./}
    read -r -a usage <"$top/usage"
    if [ "$count" = yes ]; then
        record "$row" "$who" "$((end - begin))" "${usage[@]}"
    fi
}

prepare() { :; }

# compare ROW { WHO COMMAND }...: in turn, one uncounted round first.
compare() {
    local row=$1 run i count
    shift
    for ((run = 0; run <= runs; run++)); do
        count=yes
        if [ "$run" -eq 0 ]; then
            count=no
        fi
        for ((i = 1; i < $#; i += 2)); do
            measure "$row" "${!i}" "${@:i+1:1}" "$count"
        done
        printf '\r   %s: %d of %d' "$row" "$run" "$runs" >&2
    done
    printf '\n' >&2
}

# ---------------------------------------------------------------------- rows

row_dump() {
    need_disk
    local disk=$data/disk.qcow2
    read_once "$disk"
    compare dump \
        lbdump "exec lbdump -q --threads 2 -o a.lbz $disk" \
        qemu-img "qemu-img convert -c -O qcow2 -o compression_type=zstd \
                  -m 8 -W $disk a.qcow2; sync a.qcow2" \
        nbdcopy "nbdcopy -- [ qemu-nbd -r -f qcow2 $disk ] - |
                 zstd -q -T2 -1 -o a.zst; sync a.zst" \
        zstd "zstd -q -T2 -1 -o a.zst $disk; sync a.zst"
}

row_size() {
    need_chain
    read_once "$data/disk.qcow2"
    local bytes
    bytes=$(python3 "$here/allocated.py" content "$data/disk.qcow2" |
            zstd -q -1 | wc -c)
    record size lbdump "$(stat -c %s "$data/chain/base.lbz")"
    record size zstd "$bytes"
}

row_restore() {
    need_chain
    need_zstd_disk
    local disk=$data/zstd.qcow2 full=$data/chain/base.lbz
    read_once "$disk" "$full"
    compare restore \
        lbrestore "exec lbrestore -q --threads 2 -o a.qcow2 $full" \
        qemu-img "qemu-img convert -O qcow2 $disk a.qcow2; sync a.qcow2" \
        qemu-img-m8 "qemu-img convert -O qcow2 -m 8 -W $disk a.qcow2;
                     sync a.qcow2" \
        nbdcopy "nbdcopy -- [ qemu-nbd -r -f qcow2 $disk ] a.raw; sync a.raw"
}

row_verify() {
    need_chain
    need_zst
    read_once "$data/chain/base.lbz" "$data/disk.zst"
    compare verify \
        lbverify "exec lbverify -q --threads 2 $data/chain/base.lbz" \
        zstd "zstd -q -t $data/disk.zst"
}

row_merge() {
    need_merged
    local chain=$data/chain merged=$data/merged.lbz
    read_once "$chain"/*.lbz "$merged"
    compare merge \
        lbmerge "exec lbmerge -q --threads 2 -o a.lbz $chain/*.lbz" \
        cp "cp $merged a.lbz; sync a.lbz" \
        recompress "zstd -q -dc $merged | zstd -q -T2 -1 -o a.zst; sync a.zst"
}

# Each run begins with a copy of the image, since a dump adds a checkpoint.
copy_wide() {
    local tb
    for tb in 1 10; do
        cp --sparse=always "$data/wide${tb}T.qcow2" "$out"
    done
    sync -f "$out"
}

row_incremental() {
    need_wide 1T
    need_wide 10T
    eval "prepare() { copy_wide; }"
    compare incremental \
        1T "exec lbdump -q --threads 2 --incremental -o a.lbz wide1T.qcow2" \
        10T "exec lbdump -q --threads 2 --incremental -o a.lbz wide10T.qcow2"
    eval "prepare() { :; }"
}

row_memory() {
    need_chain
    need_extents
    local chain=$data/chain wide=$data/extents disk=$data/disk.qcow2
    read_once "$chain"/*.lbz "$disk" "$wide"/*
    measure memory-disk lbdump \
        "exec lbdump -q --threads 2 -o a.lbz $disk"
    measure memory-disk lbmerge \
        "exec lbmerge -q --threads 2 -o a.lbz $chain/*.lbz"
    measure memory-disk lbverify \
        "exec lbverify -q --threads 2 $chain/*.lbz"
    measure memory-disk lbrestore \
        "exec lbrestore -q --threads 2 -o a.qcow2 $chain/*.lbz"

    eval "prepare() { cp --sparse=always $wide/disk.qcow2 $out; }"
    measure memory-wide 'lbdump, full' \
        "exec lbdump -q --threads 2 -o a.lbz disk.qcow2"
    measure memory-wide 'lbdump, incremental' \
        "exec lbdump -q --threads 2 --incremental -o a.lbz disk.qcow2"
    cp "$out/a.lbz" "$top/incr.lbz"
    measure memory-wide lbctl "exec lbctl status disk.qcow2"
    eval "prepare() { :; }"
    local archives="$wide/base.lbz $top/incr.lbz"
    measure memory-wide lbmerge \
        "exec lbmerge -q --threads 2 -o a.lbz $archives"
    measure memory-wide lbverify "exec lbverify -q --threads 2 $archives"
    measure memory-wide lbrestore \
        "exec lbrestore -q --threads 2 -o a.qcow2 $archives"
    rm "$top/incr.lbz"
}

row_tracking() {
    local option=()
    if [ "$small" -eq 1 ]; then
        option=(--small)
    fi
    cc -O2 -Wall -Wextra -o "$top/nbdload" "$here/nbdload.c"
    clear_out
    python3 "$here/tracking.py" -n "$runs" "${option[@]}" \
        --stock "$stock_qemu" --patched "$qemu" --load "$top/nbdload" \
        --dir "$out" >>"$results"
}

row_live() {
    local option=()
    if [ "$small" -eq 1 ]; then
        option=(--small)
    fi
    need_disk
    clear_out
    python3 "$here/live.py" "${option[@]}" --stock "$stock_qemu" \
        --patched "$qemu" --disk "$data/disk.qcow2" --dir "$out"
}

row_vm() {
    local option=()
    if [ "$small" -eq 1 ]; then
        option=(--small)
    fi
    clear_out
    python3 "$here/vm.py" "${option[@]}" -n "$runs" --dir "$out"
}

row_recovery() {
    clear_out
    python3 "$here/plugin.py" -n "$runs" --plugin \
        "${BUILD:-$here/../build}/nbdkit/.libs/nbdkit-lbz-plugin.so" "$out"
    clear_out
    python3 "$here/rescan.py" -n "$runs" "$out"
    clear_out
    python3 "$here/rollback.py" -n "$runs" "$out"
}

about() {
    local what=$1
    shift
    record about "$what" "$*"
}

# What the table must say about where it was made.
describe() {
    local model
    model=$(awk -F ': *' '/^model name/ { print $2; exit }' /proc/cpuinfo)
    about command "./setup bench ${settings[*]}"
    about machine "$(nproc) processors (${model:-$(uname -m)})," \
        "$(awk '/MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' \
           /proc/meminfo), Linux $(uname -r | cut -d . -f 1,2)"
    about versions "$(lbdump --version | head -n 1)," \
        "$(qemu-img --version | head -n 1 | cut -d ' ' -f 1-3)," \
        "zstd $(zstd -V | grep -o 'v[0-9.]*' | head -n 1)," \
        "$(nbdcopy --version | head -n 1)"
    about disk "$disk_mib MiB virtual, $((file_bytes >> 20)) MiB of" \
        "files and $random_mib MiB of random bytes; $runs runs of each"
}

main() {
    parse_options "$@"
    set_sizes
    check_tools
    rm -f "$results"
    describe
    trap 'rm -rf "${out:?}"/* "$top"/pieces "$top"/stage' EXIT
    local row
    for row in "${rows[@]}"; do
        say "$row"
        "row_$row"
    done
    clear_out
    if [ "$markdown" -eq 1 ]; then
        python3 "$here/report.py" --markdown "$results"
    else
        python3 "$here/report.py" "$results"
    fi
}

main "$@"
