# The qcow2 reader gives what a stock qemu-img gives, byte for byte; what it
# can't read it refuses by name; and hostile images get an error, no more.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers

setup() {
    helpers_setup
    cat=$abs_top_builddir/tests/unit/qcow2cat
    [ -x "$cat" ] || make -C "$abs_top_builddir" tests/unit/qcow2cat >&2
}

# create IMAGE SIZE [OPTION...]
create() {
    local image=$1 size=$2
    shift 2
    rm -f "$image"
    qemu-img create -q -f qcow2 "$@" "$image" "$size"
}

# scribble IMAGE COMMAND...: qemu-io commands, all of which must succeed.
scribble() {
    local image=$1 command args=()
    shift
    for command; do
        args+=(-c "$command")
    done
    run --separate-stderr qemu-io -f qcow2 "${args[@]}" "$image" </dev/null
    if [ "$status" -ne 0 ] || [[ "$output$stderr" == *failed* ]]; then
        fail "qemu-io: $output $stderr"
    fi
}

# All ways in which a guest changes a disk of 5 MiB, off any border.
usual_scribble() {
    scribble "$1" "write -P 1 0 100k" "write -P 2 300k 37k" \
        "write -z 400k 64k" "write -z -u 600k 128k" "write -P 3 1M 2M" \
        "discard 1100k 300k" "write -P 4 3900k 5k" "write -P 9 4100k 512"
}

# same IMAGE: the whole disk, read in steps of several sizes, also such that
# lie across clusters.
same() {
    local step
    qemu-img convert -f qcow2 -O raw "$1" expected.raw
    for step in 1048576 3584 70000; do
        "$cat" -s "$step" "$1" | cmp - expected.raw ||
            fail "$1 differs, read in steps of $step"
    done
}

# Data, zero by metadata, as qemu-img map has it (which also tells by which
# file; depth and offset don't matter here).
same_extents() {
    "$cat" -m "$1" | awk '{ print $1, $2, $3 == "data" ? "data" : "zero" }' \
        >ours
    qemu-img map -f qcow2 --output=json "$1" |
        jq -r '.[] | "\(.start) \(.length) \(if .data then "data" else "zero" end)"' |
        awk '{ if (n && $3 == type) { len += $2 }
               else { if (n) print start, len, type
                      start = $1; len = $2; type = $3 }
               n++ }
             END { print start, len, type }' >theirs
    diff -u theirs ours || fail "extents of $1 differ"
}

@test "every cluster size, versions 2 and 3" {
    for compat in 0.10 1.1; do
        for size in 512 1k 2k 4k 8k 16k 32k 64k 128k 256k 512k 1M 2M; do
            create d 5M -o "compat=$compat,cluster_size=$size"
            usual_scribble d
            same d
            same_extents d
        done
    done
}

@test "every refcount width" {
    for bits in 1 2 4 8 16 32 64; do
        create d 5M -o "refcount_bits=$bits"
        usual_scribble d
        same d
    done
}

@test "disks that don't end with a cluster" {
    for size in 512 1024 65024 66048 5000192; do
        create d "$size"
        same d
        scribble d "write -P 7 0 $size"
        same d
    done
}

@test "an empty disk of 0 bytes" {
    create d 0
    run_expect 0 "$cat" d
    expect_output ""
}

@test "compressed clusters, deflate and zstd, of every cluster size" {
    head -c 3000000 "$(command -v qemu-img)" >content.raw
    for type in zlib zstd; do
        for size in 512 4k 64k 2M; do
            qemu-img convert -c -f raw -O qcow2 \
                -o "compression_type=$type,cluster_size=$size" content.raw d
            same d
            scribble d "write -P 5 100k 300k" "write -z 1M 70k"
            same d
        done
    done
}

@test "single compressed writes between plain ones" {
    for type in zlib zstd; do
        create d 5M -o "compression_type=$type"
        usual_scribble d
        scribble d "write -c -P 8 3M 64k" "write -c -P 9 4224k 64k" \
            "write -P 10 3100k 3k"
        same d
    done
}

@test "zero clusters, plain and preallocated" {
    for size in 4k 64k; do
        create d 5M -o "cluster_size=$size"
        scribble d "write -P 1 0 5M" "write -z 1M 1M" "write -z -u 3M 1M"
        same d
        same_extents d
    done
    for how in metadata falloc full; do
        create d 5M -o "preallocation=$how"
        same d
        scribble d "write -P 1 100k 1M"
        same d
    done
}

@test "extended L2 entries" {
    for size in 16k 64k 2M; do
        create base 5M -o "extended_l2=on,cluster_size=$size"
        usual_scribble base
        same base
        same_extents base
        create d 8M -b base -F qcow2 -o "extended_l2=on,cluster_size=$size"
        same d
        scribble d "write -P 20 13k 5k" "write -z 100k 7k" \
            "write -P 22 4990k 40k" "write -z -u 1M 1M" "discard 2M 300k"
        same d
        same_extents d
    done
}

@test "extended L2 entries beside compressed clusters" {
    for type in zlib zstd; do
        create d 5M -o "extended_l2=on,compression_type=$type"
        usual_scribble d
        scribble d "write -c -P 8 3M 64k" "write -c -P 9 4224k 64k" \
            "write -P 10 3100k 3k"
        same d
    done
}

@test "backing files of qcow2 and raw, shorter and longer than the overlay" {
    head -c 3000000 "$(command -v qemu-img)" >base.raw
    create mid 6M -b base.raw -F raw
    same mid
    scribble mid "write -P 20 13k 5k" "write -z 1M 300k"
    same mid
    create short 2M -b mid -F qcow2 -o cluster_size=4k
    scribble short "write -P 21 100k 3k"
    same short
    # What lies over a shorter file is zero, whatever is below that.
    create d 9M -b short -F qcow2
    same d
    scribble d "write -P 22 1900k 500k" "discard 0 100k"
    same d
    same_extents d
}

@test "names of backing files: relative to the image, absolute, file:" {
    mkdir -p a/b
    create a/base 1M
    scribble a/base "write -P 1 0 64k"
    create a/b/d 1M -b ../base -F qcow2
    same a/b/d
    create a/b/d 1M -b "$PWD/a/base" -F qcow2
    same a/b/d
    create a/b/d 1M -b "file:a/base" -F qcow2
    same a/b/d
    (cd / && "$cat" "$BATS_TEST_TMPDIR/a/base") | cmp - expected.raw
    cp a/base 'a/has:colon'
    create a/b/d 1M -b '../has:colon' -F qcow2
    same a/b/d
}

@test "external data files, raw and not" {
    for raw in on off; do
        rm -f d.data
        create d 5000192 -o "data_file=d.data,data_file_raw=$raw"
        same d
        usual_scribble d
        same d
        for how in metadata falloc full; do
            rm -f d.data
            create d 5000192 \
                -o "data_file=d.data,data_file_raw=$raw,preallocation=$how"
            same d
        done
    done
    rm -f d.data
    create d 5M -o "data_file=d.data,extended_l2=on"
    usual_scribble d
    same d
}

@test "the active layer of images with internal snapshots" {
    create d 5M
    usual_scribble d
    qemu-img snapshot -c one d
    scribble d "write -P 30 0 1M" "write -z 2M 1M"
    qemu-img snapshot -c two d
    scribble d "write -P 31 500k 1M" "discard 3M 1M"
    same d
    qemu-img snapshot -a one d
    same d
}

@test "images that were resized" {
    create d 4M -o cluster_size=512 # 32 KiB for each L1 entry
    scribble d "write -P 1 3M 100k"
    qemu-img resize -q d 20M
    scribble d "write -P 2 15M 100k"
    same d
    qemu-img resize -q --shrink d 3100k
    same d
}

@test "one layer alone" {
    create base 1M
    scribble base "write -P 1 0 1M"
    create d 1M -b base -F qcow2
    scribble d "write -P 2 64k 64k" "write -z 128k 64k"
    run_expect 0 "$cat" -n -m d
    expect_output "0 65536 hole
65536 65536 data
131072 65536 zero
196608 851968 hole"
}

@test "a raw image: holes of the file are zero" {
    truncate -s 1M d.raw
    head -c 65536 /dev/urandom |
        dd of=d.raw bs=64k seek=4 conv=notrunc status=none
    run_to got 0 "$cat" -r d.raw
    cmp got d.raw
    run_expect 0 "$cat" -r -m d.raw
    expect_output "0 262144 zero
262144 65536 data
327680 720896 zero"
}

@test "scanning an empty disk of 64 TiB needs no time to speak of" {
    create d 64T
    run_expect 0 timeout 5 "$cat" -m d
    expect_output "0 70368744177664 zero"
    create top 64T -b d -F qcow2 -o cluster_size=2M
    run_expect 0 timeout 5 "$cat" -m top
    expect_output "0 70368744177664 zero"
}

@test "the longest L1 table that QEMU takes" {
    create d 120G -o cluster_size=512
    scribble d "write -P 1 119G 1k"
    run_expect 0 timeout 5 "$cat" -m d
    expect_output "0 127775277056 zero
127775277056 1024 data
127775278080 1073740800 zero"
}

# refused STATUS IMAGE MESSAGE
refused() {
    run_expect "$1" "$cat" "$2"
    expect_stderr "qcow2cat: $3"
    expect_output ""
}

@test "encryption is refused by name" {
    # QEMU measures the CPU to make LUKS headers, and fails on some machines
    create d 1M
    printf '\0\0\0\2' | dd of=d bs=1 seek=32 conv=notrunc status=none
    refused 1 d "d: encrypted images (LUKS) are not supported"
    printf '\0\0\0\1' | dd of=d bs=1 seek=32 conv=notrunc status=none
    refused 1 d "d: encrypted images (AES) are not supported"
}

@test "an unknown incompatible feature is named" {
    create d 1M
    printf '\1' | dd of=d bs=1 seek=73 conv=notrunc status=none
    refused 1 d "d: unknown incompatible features: bit 48"
}

@test "an image marked corrupt is refused" {
    create d 1M
    printf '\2' | dd of=d bs=1 seek=79 conv=notrunc status=none
    refused 4 d \
        "d: the image is marked corrupt; repair it with: qemu-img check -r all d"
}

@test "a backing file without a recorded format is refused, with the remedy" {
    create base.img 1M
    create d 1M -o compat=1.1 -b base.img -F qcow2
    # QEMU no longer makes such images: the format becomes an unknown extension
    printf 'XXXX' | dd of=d bs=1 seek=112 conv=notrunc status=none
    refused 1 d "d: the backing file 'base.img' has no recorded format; record \
it with: qemu-img rebase -u -F FORMAT -b base.img d"
    qemu-img rebase -u -F qcow2 -b base.img d
    same d
}

@test "formats and protocols that are not supported are refused by name" {
    create d 1M -u -b base.vmdk -F vmdk
    refused 1 d "d: the backing file 'base.vmdk' has the format 'vmdk', which \
is not supported"
    create d 1M -u -b nbd://host/export -F raw
    refused 1 d "d: backing file 'nbd://host/export': the protocol 'nbd' is \
not supported"
    create d 1M -u -b 'json:{"driver":"qcow2"}' -F qcow2
    refused 1 d "d: backing file 'json:{\"driver\":\"qcow2\"}': the protocol \
'json' is not supported"
}

@test "a missing file of the chain is named, with who names it" {
    create d 1M -u -b missing -F qcow2
    refused 1 d "missing: No such file or directory (in the backing chain, \
named by d)"
    create d 1M -o data_file=data
    rm data
    refused 1 d "data: No such file or directory (the data file of d)"
}

@test "loops are refused, also by way of another name" {
    create a 1M
    ln a b
    qemu-img rebase -u -F qcow2 -b b a
    refused 1 a "b: appears twice in the backing chain of a (in the backing \
chain, named by a)"
    rm b
    create c 1M -b a -F qcow2 -u
    qemu-img rebase -u -F qcow2 -b c a
    refused 1 c "c: appears twice in the backing chain of c (in the backing \
chain, named by a)"
}

@test "a chain of 200 files is read, a longer one refused" {
    create 001 1M
    scribble 001 "write -P 1 0 64k"
    create top 1M -u -b 000 -F qcow2
    local i at
    at=$(grep -abo 000 top | tail -n 1 | cut -d: -f1)
    for i in {002..201}; do
        cp top "$i"
        printf '%03d' $((10#$i - 1)) |
            dd of="$i" bs=1 conv=notrunc status=none seek="$at"
    done
    run_to got 0 "$cat" 200
    "$cat" 001 | cmp - got
    refused 1 201 "201: the backing chain is longer than 200 files"
}

@test "data lost with the end of the file is an error, not zeroes" {
    create d 1M
    scribble d "write -P 1 0 1M"
    cp d whole
    truncate -s -100000 d
    run_expect 4 "$cat" d
    expect_stderr "qcow2cat: d: the file ends before the data at offset \
$((5 * 65536 + 15 * 65536)) (guest offset $((15 * 65536)))"
    # in the last cluster the rest is zero, as for QEMU
    cp whole d
    truncate -s -1000 d
    same d
}

@test "hostile images: the right verdict for each, and nothing worse" {
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/oracle/qcow2.py" hostile h
    cd h
    local name verdict mention sum n=0
    while IFS=$'\x1f' read -r name verdict mention sum; do
        n=$((n + 1))
        status=0
        timeout 20 "$cat" -s 65536 "$name.qcow2" </dev/null >got 2>errors ||
            status=$?
        stderr=$(<errors)
        case $verdict in
            refuse | read-error)
                [[ $status -eq 1 || $status -eq 4 ]] ||
                    fail "$name: status $status: $stderr"
                grep -qiE -- "$mention" <<<"$stderr" ||
                    fail "$name: $stderr"
                ;;
            ok)
                [ "$status" -eq 0 ] || fail "$name: status $status: $stderr"
                sha256sum got | grep -q "^$sum " ||
                    fail "$name: other content"
                ;;
            any)
                [[ $status -eq 0 || $status -eq 1 || $status -eq 4 ]] ||
                    fail "$name: status $status: $stderr"
                ;;
            *) fail "$name: verdict $verdict" ;;
        esac
        [[ $stderr != *Sanitizer* && $stderr != *"runtime error"* ]] ||
            fail "$name: $stderr"
    done < <(jq -r 'to_entries[] |
        [.key, .value.verdict, .value.mention, .value.sha256 // ""] |
        join("\u001f")' \
        manifest.json)
    [ "$n" -ge 100 ] || fail "only $n images"
}
