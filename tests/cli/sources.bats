# Images of all kinds, from the first dump to the restored disk.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

# A full dump, two changes with incrementals, restores; on disk.qcow2 of at
# least 8M as it is.
round_trip() {
    run_expect 0 lbctl enable disk.qcow2
    good_image disk.qcow2
    dump 0.lbz disk.qcow2
    zero=$(content disk.qcow2)
    change disk.qcow2 'write -P 101 1000k 300k' 'write -z 3M 200k' \
        'discard 5M 1M' 'write -P 102 8191k 1k'
    dump 1.lbz disk.qcow2 --incremental
    good_image disk.qcow2
    change disk.qcow2 'write -P 103 3100k 10k' 'write -P 104 0 4k'
    dump 2.lbz disk.qcow2 --incremental
    good_image disk.qcow2
    expect_restores "$zero" 0.lbz
    expect_restores "$(content disk.qcow2)" 0.lbz 1.lbz 2.lbz
    run_expect 0 lbmerge -o m.lbz 0.lbz 1.lbz 2.lbz
    run_expect 0 lbverify --image=disk.qcow2 m.lbz
    run_expect 0 lbctl disable disk.qcow2
    qemu_check disk.qcow2
    rm -f ./?.lbz
}

@test "cluster sizes from 4K to 2M, refcount widths, lazy refcounts" {
    for options in cluster_size=4k,refcount_bits=1 cluster_size=8k \
        cluster_size=64k,lazy_refcounts=on,refcount_bits=64 \
        cluster_size=512k,refcount_bits=8 cluster_size=2M \
        preallocation=metadata preallocation=full; do
        rm -f disk.qcow2
        qemu-img create -q -f qcow2 -o $options disk.qcow2 8M
        qemu_write disk.qcow2 500k 2M 5
        round_trip
    done
}

@test "extended L2 entries" {
    for size in 16k 64k 2M; do
        rm -f disk.qcow2
        qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=$size \
            disk.qcow2 8M
        change disk.qcow2 'write -P 1 10k 1k' 'write -P 2 3M 100k' \
            'write -z 3080k 4k'
        round_trip
    done
}

@test "compressed images, deflate and zstd" {
    qemu-img create -q -f qcow2 source.qcow2 8M
    change source.qcow2 'write -P 7 0 3M' 'write -P 8 4M 1500k'
    for type in zlib zstd; do
        qemu-img convert -f qcow2 -O qcow2 -c -o compression_type=$type \
            source.qcow2 disk.qcow2
        round_trip
    done
}

@test "compressed writes are tracked" {
    new_disk disk.qcow2 8M
    qemu_write disk.qcow2 0 4M 1
    dump 0.lbz disk.qcow2
    change disk.qcow2 'write -c -P 9 5M 64k' 'write -c -P 10 6M 64k'
    dump 1.lbz disk.qcow2 --incremental
    good_image disk.qcow2
    expect_restores "$(content disk.qcow2)" 0.lbz 1.lbz
}

@test "backing chains of qcow2 and raw" {
    head -c 6M /dev/urandom >base.raw
    qemu-img create -q -f qcow2 -b base.raw -F raw mid.qcow2 7M
    change mid.qcow2 'write -P 3 2M 1M' 'write -z 3M 100k'
    qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 disk.qcow2 8M
    change disk.qcow2 'write -P 4 2500k 10k'
    round_trip
}

@test "a backing file that changes costs the trust" {
    qemu-img create -q -f qcow2 base.qcow2 8M
    qemu_write base.qcow2 0 4M 1
    qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 disk.qcow2
    run_expect 0 lbctl enable disk.qcow2
    dump 0.lbz disk.qcow2
    qemu_write base.qcow2 1M 64k 2
    same_trust disk.qcow2
    expect_untouched disk.qcow2 run_expect 3 \
        lbdump --incremental -o x.lbz disk.qcow2
    expect_stderr_has '(backing-modified)'
    qemu-img rebase -q -u -f qcow2 -b '' disk.qcow2
    same_trust disk.qcow2
    run_expect 3 lbdump --incremental -o x.lbz disk.qcow2
    expect_stderr_has '(backing-changed)'
    run_expect 0 lbdump -q --auto -o 1.lbz disk.qcow2
    good_image disk.qcow2
    expect_restores "$(content disk.qcow2)" 1.lbz
}

@test "external data files, raw and not" {
    for raw in on off; do
        rm -f disk.qcow2 data.file
        qemu-img create -q -f qcow2 \
            -o data_file=data.file,data_file_raw=$raw disk.qcow2 8M
        change disk.qcow2 'write -P 1 1M 2M'
        round_trip
    done
}

@test "internal snapshots stay, and the active layer is what is dumped" {
    qemu-img create -q -f qcow2 disk.qcow2 8M
    change disk.qcow2 'write -P 1 1M 2M'
    qemu-img snapshot -c one disk.qcow2
    change disk.qcow2 'write -P 2 2M 2M'
    qemu-img convert -q -f qcow2 -l snapshot.name=one -O raw disk.qcow2 one.raw
    round_trip
    qemu-img convert -q -f qcow2 -l snapshot.name=one -O raw disk.qcow2 again.raw
    cmp one.raw again.raw
    run_expect 0 lbctl enable disk.qcow2
    dump 0.lbz disk.qcow2
    qemu-img snapshot -c two disk.qcow2
    change disk.qcow2 'write -P 3 0 1M'
    dump 1.lbz disk.qcow2 --incremental
    expect_restores "$(content disk.qcow2)" 0.lbz 1.lbz
    good_image disk.qcow2
    qemu-img snapshot -d one disk.qcow2
    good_snapshots=$(qemu-img snapshot -l disk.qcow2 | grep -c two)
    [ "$good_snapshots" = 1 ]
    qemu_check disk.qcow2
}

@test "a stock qemu-img does not go back to a snapshot under active bitmaps" {
    new_disk disk.qcow2 8M
    change disk.qcow2 'write -P 1 1M 2M'
    qemu-img snapshot -c one disk.qcow2
    change disk.qcow2 'write -P 2 2M 2M'
    dump 0.lbz disk.qcow2
    now=$(content disk.qcow2)
    run_expect 1 qemu-img snapshot -a one disk.qcow2
    expect_stderr_has 'Device has active dirty bitmaps'
    dump 1.lbz disk.qcow2 --incremental
    expect_restores "$now" 0.lbz 1.lbz
}

@test "other people's bitmaps survive everything" {
    new_disk disk.qcow2 8M
    qemu-img bitmap --add -g 128k disk.qcow2 theirs
    qemu-img bitmap --add --disable disk.qcow2 frozen
    change disk.qcow2 'write -P 1 1M 2M'
    bits() {
        qemu-img bitmap --add disk.qcow2 "$1.copy" -g 128k
        qemu-img bitmap --merge "$1" disk.qcow2 "$1.copy"
        qemu-img info --output=json disk.qcow2 | jq -c \
            --arg name "$1" '."format-specific".data.bitmaps[] |
            select(.name == $name)'
        qemu-img bitmap --remove disk.qcow2 "$1.copy"
    }
    theirs=$(bits theirs) frozen=$(bits frozen)
    dump 0.lbz disk.qcow2
    change disk.qcow2 'write -P 2 2M 2M'
    dump 1.lbz disk.qcow2 --incremental
    lbdump -q --incremental disk.qcow2 | cat >2.lbz
    run_expect 0 lbctl prune disk.qcow2
    run_expect 0 lbctl recover disk.qcow2
    good_image disk.qcow2
    [ "$(bits theirs)" = "$theirs" ]
    [ "$(bits frozen)" = "$frozen" ]
    # what theirs holds: 1M to 4M, through NBD
    qemu-nbd --fork --pid-file="$PWD/nbd.pid" -k "$PWD/nbd.sock" -r -f qcow2 \
        -B theirs disk.qcow2 3>&- 4>&-
    map=$(qemu-img map --output=json --image-opts \
        "driver=nbd,server.type=unix,server.path=$PWD/nbd.sock,x-dirty-bitmap=qemu:dirty-bitmap:theirs" |
        jq -c '[.[] | select(.data | not) | [.start, .length]]')
    kill "$(<nbd.pid)"
    while kill -0 "$(<nbd.pid)" 2>/dev/null; do sleep 0.02; done
    [ "$map" = '[[1048576,3145728]]' ]
    run_expect 0 lbctl disable disk.qcow2
    [ "$(qemu-img info --output=json disk.qcow2 |
         jq -c '[."format-specific".data.bitmaps[].name] | sort')" = \
      '["frozen","theirs"]' ]
    qemu_check disk.qcow2
}

@test "what can't be read correctly is refused by name" {
    qemu-img create -q -f qcow2 --object secret,id=s,data=x \
        -o encrypt.format=aes,encrypt.key-secret=s aes.qcow2 8M
    run_expect 1 lbdump -o x.lbz aes.qcow2
    expect_stderr_has 'lbdump: aes.qcow2: ' 'encrypt'
    qemu-img create -q -f qcow2 base.qcow2 8M
    qemu-img create -q -f qcow2 -u -b base.qcow2 -F qcow2 noformat.qcow2 8M
    "$ORACLE_PYTHON" - noformat.qcow2 <<'END'
import sys
data = bytearray(open(sys.argv[1], "rb").read())
at = data.index(bytes.fromhex("e2792aca"))
data[at:at + 4] = bytes.fromhex("12345678") # no longer a backing format
open(sys.argv[1], "wb").write(data)
END
    run_expect 1 lbdump -o x.lbz noformat.qcow2
    expect_stderr_has 'lbdump: noformat.qcow2: ' 'format'
    qemu-img create -q -f qcow2 corrupt.qcow2 8M
    lbext poke corrupt.qcow2 --keep-crc \
        --set header.incompatible_features=2
    run_expect 4 lbdump -o x.lbz corrupt.qcow2
    expect_stderr_has 'lbdump: corrupt.qcow2: ' 'corrupt'
    qemu-img create -q -f qcow2 future.qcow2 8M
    lbext poke future.qcow2 --keep-crc \
        --set header.incompatible_features=0x8000
    run_expect 1 lbdump -o x.lbz future.qcow2
    expect_stderr_has 'lbdump: future.qcow2: ' '15'
    truncate -s 8M raw.img
    run_expect 1 lbdump -o x.lbz raw.img
    expect_stderr 'lbdump: raw.img: not a qcow2 image'
    expect_absent x.lbz
}

@test "a path with blanks, quotes, leading dash and control characters" {
    mkdir "a b'c"
    cd "a b'c"
    new_disk 'd "e".qcow2' 1M
    dump 'f g.lbz' 'd "e".qcow2'
    run_expect 0 lbverify 'f g.lbz'
    run_expect 0 lbrestore -o $'new\nline.qcow2' 'f g.lbz'
    run_expect 2 lbrestore -o $'new\nline.qcow2' 'f g.lbz'
    expect_stderr 'lbrestore: new\x0aline.qcow2: already exists; --force replaces it'
    cp 'd "e".qcow2' ./-d.qcow2
    run_expect 0 lbdump -q --copy -o -o.lbz -- -d.qcow2
    good_archives ./-o.lbz
}
