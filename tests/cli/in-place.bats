# lbrestore --in-place: the disk becomes what it was, and the chain goes on.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load in_place

# A disk and the archives 0.lbz to 2.lbz, each after some changes; changes after
# the last one. Arguments go to qemu-img create.
make_history() {
    qemu-img create -q -f qcow2 "$@" disk.qcow2 "${size:-40M}"
    run_expect 0 lbctl enable disk.qcow2
    guest disk.qcow2 'write -P 1 0 6M' 'write -P 2 20M 200k'
    run_expect 0 lbdump -q -o 0.lbz disk.qcow2
    guest disk.qcow2 'write -P 3 1M 300k' 'write -z 20M 64k' \
        'write -P 4 30M 64k'
    run_expect 0 lbdump -q --incremental -o 1.lbz disk.qcow2
    guest disk.qcow2 'write -P 5 1M 64k' 'discard 2M 1M' 'write -P 6 31M 2M'
    run_expect 0 lbdump -q --incremental -o 2.lbz disk.qcow2
    guest disk.qcow2 'write -P 7 0 4k' 'write -P 8 2M 64k' \
        'write -P 9 36M 70k' 'discard 31M 64k'
}

# roll_back ARGUMENT...: quietly; the summary is in $output.
roll_back() {
    run_expect 0 lbrestore -q --json --in-place disk.qcow2 "$@"
    [ "$stderr" = "" ] || fail "$stderr"
}

# expect_summary FILTER VALUE
expect_summary() {
    [ "$(jq -r "$1" <<<"$output")" = "$2" ] || fail "$1 is not $2: $output"
}

# expect_checkpoints N: so many, all trusted, and nothing has changed since the
# newest, the canaries aside.
expect_checkpoints() {
    run_expect 0 lbctl status --json disk.qcow2
    [ "$(jq -c '[(.checkpoints | length), all(.checkpoints[]; .trusted),
                 .checkpoints[-1].confirmed, .checkpoints[-1].changed_bytes]' \
            <<<"$output")" = "[$1,true,true,131072]" ] || fail "$output"
}

@test "each point of a chain, newest first, with every shape of image" {
    for shape in cluster_size=64k cluster_size=4k cluster_size=2M \
                 extended_l2=on,cluster_size=64k lazy_refcounts=on \
                 refcount_bits=1; do
        rm -f ./*.lbz
        make_history -o "$shape"
        roll_back 2.lbz 0.lbz 1.lbz
        expect_summary .compared false
        expect_content disk.qcow2 0.lbz 1.lbz 2.lbz
        qemu_check disk.qcow2
        expect_follows disk.qcow2 0.lbz 1.lbz 2.lbz
        roll_back --at "$(uuid_of 1.lbz)" 0.lbz 1.lbz 2.lbz
        expect_summary .compared false
        expect_content disk.qcow2 0.lbz 1.lbz
        qemu_check disk.qcow2
        expect_follows disk.qcow2 0.lbz 1.lbz
        roll_back 0.lbz
        expect_summary .compared false
        expect_content disk.qcow2 0.lbz
        qemu_check disk.qcow2
        expect_follows disk.qcow2 0.lbz
    done
}

@test "it writes what has changed, and no more" {
    make_history
    roll_back 0.lbz 1.lbz 2.lbz
    # the first block and 31M; what was a hole is one again
    expect_summary .data_bytes $((2 * 65536))
    expect_checkpoints 3
    roll_back 0.lbz 1.lbz 2.lbz
    # the canary; the last block was never written to
    expect_summary .data_bytes 65536
    expect_checkpoints 3
    roll_back 0.lbz
    expect_checkpoints 1
}

@test "where the bitmaps are not trusted, by the digests; it says why" {
    make_history
    qemu-img bitmap --clear disk.qcow2 "lb-$(uuid_of 2.lbz)"
    run_expect 0 lbrestore --json --in-place disk.qcow2 0.lbz 1.lbz 2.lbz
    expect_stderr "lbrestore: disk.qcow2: a dirty bitmap was cleared, \
recreated or shrunk by a program that does not know livebackup (canary); the \
whole disk is compared with the archives"
    expect_summary .compared true
    expect_summary .data_bytes $((2 * 65536))
    expect_content disk.qcow2 0.lbz 1.lbz 2.lbz
    qemu_check disk.qcow2
    expect_checkpoints 1
    expect_follows disk.qcow2 0.lbz 1.lbz 2.lbz
}

@test "a point whose checkpoint is gone, by way of an earlier or a later one" {
    make_history
    first=$(uuid_of 1.lbz)
    cp disk.qcow2 before.qcow2
    # the newest one is gone: 1.lbz leads there
    run_expect 0 "$abs_top_builddir/tests/unit/imagectl" fold disk.qcow2 2
    roll_back 0.lbz 1.lbz 2.lbz
    expect_summary .compared false
    expect_content disk.qcow2 0.lbz 1.lbz 2.lbz
    qemu_check disk.qcow2
    expect_follows disk.qcow2 0.lbz 1.lbz 2.lbz
    # those before the newest are gone: 2.lbz leads back
    cp before.qcow2 disk.qcow2
    run_expect 0 lbctl prune --keep=1 disk.qcow2
    roll_back --at "$first" 0.lbz 1.lbz 2.lbz
    expect_summary .compared false
    expect_content disk.qcow2 0.lbz 1.lbz
    qemu_check disk.qcow2
    expect_follows disk.qcow2 0.lbz 1.lbz
    # and without it nothing does
    cp before.qcow2 disk.qcow2
    run_expect 0 lbctl prune --keep=1 disk.qcow2
    run_expect 0 lbrestore --in-place disk.qcow2 0.lbz 1.lbz
    expect_stderr "lbrestore: disk.qcow2: the image has no checkpoint that \
leads there; the whole disk is compared with the archives"
    expect_content disk.qcow2 0.lbz 1.lbz
    qemu_check disk.qcow2
    expect_follows disk.qcow2 0.lbz 1.lbz
}

@test "merged archives will do" {
    make_history
    run_expect 0 lbmerge -q -o merged.lbz 0.lbz 1.lbz 2.lbz
    roll_back merged.lbz
    expect_summary .compared false
    expect_content disk.qcow2 0.lbz 1.lbz 2.lbz
    expect_follows disk.qcow2 merged.lbz
}

@test "the disk gets the size that it had" {
    make_history
    for now in 10M 41M 39M 4G 40M; do
        qemu-img resize -q --shrink -f qcow2 disk.qcow2 "$now"
        guest disk.qcow2 'write -P 33 9M 1M'
        run_expect 0 lbrestore -q --in-place disk.qcow2 0.lbz 1.lbz 2.lbz
        [ "$(qemu-img info --output=json disk.qcow2 |
                jq '."virtual-size"')" = 41943040 ] || fail "not 40M"
        expect_content disk.qcow2 0.lbz 1.lbz 2.lbz
        qemu_check disk.qcow2
        expect_checkpoints 1
        expect_follows disk.qcow2 0.lbz 1.lbz 2.lbz
    done
}

@test "odd sizes" {
    size=$((5 * 1048576 + 512))
    for shape in cluster_size=4k cluster_size=2M; do
        rm -f ./*.lbz
        qemu-img create -q -f qcow2 -o "$shape" disk.qcow2 "$size"
        run_expect 0 lbctl enable disk.qcow2
        guest disk.qcow2 "write -P 1 0 $size"
        run_expect 0 lbdump -q -o 0.lbz disk.qcow2
        guest disk.qcow2 "write -P 2 0 $size"
        cp disk.qcow2 copy.qcow2
        roll_back 0.lbz
        expect_content disk.qcow2 0.lbz
        qemu_check disk.qcow2
        cp copy.qcow2 disk.qcow2
        qemu-img resize -q -f qcow2 disk.qcow2 $((size + 3 * 512))
        guest disk.qcow2 "write -P 3 $size 1536"
        run_expect 0 lbrestore -q --in-place disk.qcow2 0.lbz
        expect_content disk.qcow2 0.lbz
        qemu_check disk.qcow2
        # What was behind the end does not come back.
        qemu-img resize -q -f qcow2 disk.qcow2 $((size + 3 * 512))
        guest disk.qcow2 "read -P 0 $size 1536"
    done
}

@test "snapshots and a backing file are left alone" {
    qemu-img create -q -f qcow2 base.qcow2 40M
    guest base.qcow2 'write -P 99 0 40M'
    sum=$(sha256sum base.qcow2)
    make_history -b base.qcow2 -F qcow2
    qemu-img snapshot -c kept disk.qcow2
    qemu-img convert -f qcow2 -O raw -l snapshot.name=kept disk.qcow2 before.raw
    guest disk.qcow2 'write -P 10 0 8M'
    for chain in '0.lbz 1.lbz 2.lbz' '0.lbz'; do
        # shellcheck disable=SC2086
        roll_back $chain
        expect_summary .compared false
        # shellcheck disable=SC2086
        expect_content disk.qcow2 $chain
        qemu_check disk.qcow2
        # shellcheck disable=SC2086
        expect_follows disk.qcow2 $chain
        qemu-img convert -f qcow2 -O raw -l snapshot.name=kept disk.qcow2 \
            after.raw
        cmp before.raw after.raw
    done
    [ "$sum" = "$(sha256sum base.qcow2)" ] || fail "the base was written"
    qemu-img snapshot -d kept disk.qcow2
    qemu_check disk.qcow2
}

# dirty NAME: how many bytes a stock QEMU finds in a bitmap.
dirty() {
    rm -f nbd.socket
    qemu-nbd -r -t -k "$PWD/nbd.socket" -B "$1" -f qcow2 disk.qcow2 \
        >nbd.log 2>&1 </dev/null &
    local i server=$!
    for ((i = 0; i < 200; i++)); do
        [ ! -S nbd.socket ] || break
        sleep 0.05
    done
    qemu-img map --output=json --image-opts \
        "driver=nbd,server.type=unix,server.path=$PWD/nbd.socket,\
x-dirty-bitmap=qemu:dirty-bitmap:$1" |
        jq -c '[.[] | select(.data | not) | .length] | add'
    kill "$server"
    wait "$server" || true
}

@test "bitmaps of others that are enabled get all their bits" {
    make_history
    qemu-img bitmap --add disk.qcow2 enabled
    qemu-img bitmap --add --disable disk.qcow2 disabled
    guest disk.qcow2 'write -P 7 0 4k'
    roll_back 0.lbz 1.lbz 2.lbz
    qemu_check disk.qcow2
    [ "$(dirty enabled)" = 41943040 ] || fail "enabled: $(dirty enabled)"
    [ "$(dirty disabled)" = null ] || fail "disabled: $(dirty disabled)"
    qemu-img resize -q -f qcow2 disk.qcow2 9G
    run_expect 0 lbrestore -q --in-place disk.qcow2 0.lbz 1.lbz 2.lbz
    qemu_check disk.qcow2
    [ "$(dirty enabled)" = 41943040 ] || fail "enabled: $(dirty enabled)"
    [ "$(dirty disabled)" = 41943040 ] || fail "disabled: $(dirty disabled)"
}

# Another chain's checkpoints that are older stay, newer ones go.
@test "other chains go on where they can" {
    make_history
    run_expect 0 lbdump -q --chain=weekly -o w0.lbz disk.qcow2
    guest disk.qcow2 'write -P 11 3M 64k'
    run_expect 0 lbdump -q --incremental -o 3.lbz disk.qcow2
    guest disk.qcow2 'write -P 12 4M 64k'
    cp disk.qcow2 copy.qcow2
    roll_back 0.lbz 1.lbz 2.lbz 3.lbz
    run_expect 0 lbdump -q --chain=weekly --incremental -o w1.lbz disk.qcow2
    expect_content disk.qcow2 w0.lbz w1.lbz
    cp copy.qcow2 disk.qcow2
    roll_back 0.lbz 1.lbz 2.lbz
    run_expect 3 lbdump -q --chain=weekly --incremental -o w2.lbz disk.qcow2
    expect_absent w2.lbz
}

@test "an image of another disk is refused" {
    make_history
    cp disk.qcow2 mine.qcow2
    rm ./*.lbz
    make_history
    sum=$(sha256sum mine.qcow2)
    ours=$(lbctl status --json mine.qcow2 | jq -r .image_uuid)
    theirs=$(lbctl status --json disk.qcow2 | jq -r .image_uuid)
    run_expect 3 lbrestore --in-place mine.qcow2 0.lbz 1.lbz 2.lbz
    expect_stderr "lbrestore: mine.qcow2: the archives are of another disk: \
image UUID $theirs, not $ours"
    qemu-img create -q -f qcow2 off.qcow2 40M
    run_expect 3 lbrestore --in-place off.qcow2 0.lbz 1.lbz 2.lbz
    expect_stderr "lbrestore: off.qcow2: livebackup is off, so nothing tells \
whether this is the disk that the archives are of; if it is, add --force"
    run_expect 0 lbrestore -q --force --in-place off.qcow2 0.lbz 1.lbz 2.lbz
    expect_content off.qcow2 0.lbz 1.lbz 2.lbz
    qemu_check off.qcow2
    run_expect 0 lbctl status --json off.qcow2
    [ "$(jq .on <<<"$output")" = false ] || fail "$output"
}

@test "what can't be rolled back is refused, and nothing written" {
    make_history
    cp disk.qcow2 good.qcow2
    refuse() {
        local want=$1 image=$2 text=$3 sum
        sum=$(sha256sum "$image")
        run_expect "$want" lbrestore -q --force --in-place "$image" 0.lbz \
            1.lbz 2.lbz
        expect_stderr "lbrestore: $text"
        [ "$sum" = "$(sha256sum "$image")" ] || fail "$image was written to"
    }
    qemu-img create -q -f qcow2 -o data_file=d.raw,data_file_raw=on ext.qcow2 40M
    refuse 1 ext.qcow2 "ext.qcow2: a disk with an external data file can't be \
rolled back in place"
    qemu-img create -q -f qcow2 -o compat=0.10 v2.qcow2 40M
    refuse 1 v2.qcow2 "v2.qcow2: a rollback in place needs qcow2 version 3; \
convert the image with: qemu-img amend -f qcow2 -o compat=1.1 v2.qcow2"
    qemu-img create -q -f qcow2 -o cluster_size=512 small.qcow2 40M
    refuse 1 small.qcow2 "small.qcow2: a rollback in place needs clusters of \
4096 bytes or more"
    qemu-img create -q -f qcow2 -b good.qcow2 -F qcow2 over.qcow2 80M
    refuse 1 over.qcow2 "over.qcow2: the image has a backing file and the disk \
had another size then; such a disk can't be rolled back in place"
    truncate -s 40M raw.raw
    refuse 1 raw.raw "raw.raw: not a qcow2 image"
}

@test "a damaged archive is found before anything is written" {
    make_history
    sum=$(sha256sum disk.qcow2)
    size=$(stat -c %s 2.lbz)
    found=0
    for ((at = 100; at < size - 200; at += 40)); do
        cp 2.lbz damaged.lbz
        printf '\377\376\375' |
            dd of=damaged.lbz bs=1 seek=$at conv=notrunc status=none
        ! cmp -s 2.lbz damaged.lbz || continue
        run --separate-stderr lbrestore -q --rescan --in-place disk.qcow2 \
            0.lbz 1.lbz damaged.lbz
        [ "$status" -ne 0 ] || break
        [ "$status" -eq 4 ] || fail "status $status: $stderr"
        [ "$sum" = "$(sha256sum disk.qcow2)" ] || fail "written to: $at"
        found=$((found + 1))
    done
    [ "$found" -gt 3 ] || fail "only $found"
}

@test "an image that is in use is busy" {
    make_history
    mkfifo commands
    qemu-io -f qcow2 disk.qcow2 <commands >/dev/null 2>&1 &
    exec 7>commands
    echo 'read 0 512' >&7
    for ((i = 0; i < 100; i++)); do
        if lsof -p $! 2>/dev/null | grep -q disk.qcow2; then break; fi
        sleep 0.05
    done
    run_expect 5 lbrestore --in-place disk.qcow2 0.lbz 1.lbz 2.lbz
    expect_stderr \
        "lbrestore: disk.qcow2: the image is in use by another process"
    exec 7>&-
    wait
}

# counted COMMAND...: $read and $written, the bytes that it reads and writes.
counted() {
    local counts
    counts=$("$ORACLE_PYTHON" -B -c '
import subprocess, sys

def count():
    with open("/proc/self/io") as file:
        return [int(line.split()[1]) for line in file][:2]

before = count()
subprocess.run(sys.argv[1:], check=True, stdin=subprocess.DEVNULL)
print(*(b - a for a, b in zip(before, count())))
' "$@")
    read=${counts% *} written=${counts#* }
}

@test "a disk of 1 TiB costs what has changed" {
    size=1T
    qemu-img create -q -f qcow2 disk.qcow2 1T
    run_expect 0 lbctl enable disk.qcow2
    first=() again=()
    for ((n = 0; n < 200; n++)); do
        at=$(((n * 5 * 1024 + n % 7) * 1024 * 1024))
        first+=("write -P $((n + 1)) $at 128k")
        [ $((n % 2)) -ne 0 ] || again+=("write -P 3 $at 64k")
    done
    guest disk.qcow2 "${first[@]}" 'write -P 201 500M 64M'
    run_expect 0 lbdump -q -o 0.lbz disk.qcow2
    cp disk.qcow2 before.qcow2
    guest disk.qcow2 "${again[@]}"
    counted lbrestore -q --threads=2 --in-place disk.qcow2 0.lbz
    # 100 blocks, written once and read back once; less than as much again for
    # tables and index pages, at whose cost each block is on its own
    [ "$written" -lt $((100 * 65536 + 1048576)) ] || fail "written: $written"
    [ "$written" -gt $((100 * 65536)) ] || fail "written: $written"
    [ "$read" -lt $((2 * 100 * 65536)) ] || fail "read: $read"
    qemu_check disk.qcow2
    run_expect 0 qemu-img compare -f qcow2 -F qcow2 before.qcow2 disk.qcow2
}

@test "usage" {
    run_expect 2 lbrestore --in-place disk.qcow2
    expect_stderr_has "lbrestore: at least one ARCHIVE is wanted"
    run_expect 2 lbrestore --in-place disk.qcow2 -o other.qcow2 a.lbz
    expect_stderr_has "lbrestore: --in-place does not go with -o or --format"
    run_expect 2 lbrestore --in-place disk.qcow2 --format raw a.lbz
    expect_stderr_has "lbrestore: --in-place does not go with -o or --format"
    run_expect 2 lbrestore --rescan -o disk.qcow2 a.lbz
    expect_stderr_has "lbrestore: --rescan goes with --in-place"
    run_expect 2 lbrestore --in-place disk.qcow2 -
    expect_stderr_has "lbrestore: --in-place can't read an ARCHIVE from a pipe"
}
