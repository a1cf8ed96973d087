# lbverify: every archive, the chain, and a disk against it.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

make_chain() {
    new_disk disk.qcow2 20M
    qemu_write disk.qcow2 0 10M 1
    dump base.lbz disk.qcow2
    change disk.qcow2 'write -P 2 3M 64k' 'write -z 5M 1M'
    dump incr1.lbz disk.qcow2 --incremental
    change disk.qcow2 'write -P 3 15M 100k' 'write -P 4 5M 4k'
    dump incr2.lbz disk.qcow2 --incremental
}

# spoil ARCHIVE STRUCTURE [SKIP]: flip a bit of a byte of it.
spoil() {
    local offset byte
    [ -e "$1.good" ] || cp "$1" "$1.good"
    offset=$(lbz structures "$1.good" | jq --arg name "$2" \
        '.[] | select(.name == $name) | .offset')
    spoiled=$((offset + ${3:-0}))
    byte=$(od -An -tu1 -j$spoiled -N1 "$1")
    printf "$(printf '\\%03o' $((byte ^ 16)))" |
        dd of="$1" bs=1 seek=$spoiled conv=notrunc status=none
}

@test "a good chain is good, and nothing is printed" {
    make_chain
    run_expect 0 lbverify base.lbz incr1.lbz incr2.lbz
    expect_output ''
    expect_stderr ''
    run_expect 0 lbverify incr2.lbz
    run_expect 0 lbverify incr2.lbz incr1.lbz
    expect_output ''
    expect_stderr ''
}

@test "missing and foreign parents, duplicates, several leaves are named" {
    make_chain
    run_expect 3 lbverify base.lbz incr2.lbz
    expect_stderr "lbverify: incr2.lbz: its parent $(uuid_of incr1.lbz) is not among the archives given"
    cp incr1.lbz again.lbz
    run_expect 3 lbverify base.lbz incr1.lbz incr2.lbz again.lbz
    expect_stderr "lbverify: again.lbz: has the same UUID as incr1.lbz, $(uuid_of incr1.lbz); give only one of them"
    rm again.lbz
    qemu-img create -q -f qcow2 foreign.qcow2 20M
    lbctl enable foreign.qcow2
    dump foreign.lbz foreign.qcow2
    run_expect 3 lbverify base.lbz foreign.lbz
    expect_stderr "lbverify: foreign.lbz: belongs to the image $(header_of foreign.lbz .image_uuid); base.lbz belongs to $(header_of base.lbz .image_uuid)"
    rm foreign.lbz
    dump leaf.lbz disk.qcow2 --copy --incremental
    qemu_write disk.qcow2 2M 64k 9
    dump incr3.lbz disk.qcow2 --incremental
    run_expect 3 lbverify ./*.lbz
    expect_stderr_has 'lbverify: the archives end in 2 different states; choose one with --at UUID: ' \
        "$(uuid_of incr3.lbz) (./incr3.lbz, " "$(uuid_of leaf.lbz) (./leaf.lbz, "
    run_expect 0 lbverify --at "$(uuid_of leaf.lbz)" ./*.lbz
    expect_stderr 'lbverify: ./incr3.lbz: not part of the chain'
    rm incr3.lbz leaf.lbz
    # a differential covers what lies between, which is then no leaf
    dump since.lbz disk.qcow2 --copy --since="$(uuid_of base.lbz)"
    run_expect 0 lbverify base.lbz incr1.lbz incr2.lbz since.lbz
    expect_stderr 'lbverify: incr1.lbz: not part of the chain
lbverify: incr2.lbz: not part of the chain'
    run_expect 0 lbverify -q base.lbz incr1.lbz incr2.lbz since.lbz
    expect_stderr ''
}

@test "--image: equal" {
    make_chain
    expect_untouched disk.qcow2 run_expect 0 \
        lbverify --image=disk.qcow2 base.lbz incr1.lbz incr2.lbz
    expect_output ''
    expect_stderr ''
    # an image that was never backed up, but reads the same
    qemu-img convert -f qcow2 -O qcow2 -c disk.qcow2 other.qcow2
    run_expect 0 lbverify --image other.qcow2 base.lbz incr1.lbz incr2.lbz
}

@test "--image: every range that differs is named" {
    make_chain
    change disk.qcow2 'write -P 9 1M 64k' 'write -P 9 1088k 1k' \
        'write -P 9 3M 1k' 'write -P 0 15M 100k' 'write -P 5 20479k 1k'
    run_expect 4 lbverify --image=disk.qcow2 base.lbz incr1.lbz incr2.lbz
    expect_stderr 'lbverify: disk.qcow2: differs from the chain in 0x100000-0x11ffff
lbverify: disk.qcow2: differs from the chain in 0x300000-0x30ffff
lbverify: disk.qcow2: differs from the chain in 0xf00000-0xf1ffff
lbverify: disk.qcow2: differs from the chain in 0x13f0000-0x13fffff
lbverify: disk.qcow2: 6 blocks of 64 KiB differ from the chain'
    # the state in between is not that of the disk either
    run_expect 4 lbverify --at "$(uuid_of base.lbz)" --image=disk.qcow2 ./*.lbz
    qemu-img resize -q -f qcow2 disk.qcow2 21M
    run_expect 4 lbverify --image=disk.qcow2 base.lbz incr1.lbz incr2.lbz
    expect_stderr 'lbverify: disk.qcow2: has 22020096 bytes, the chain 20971520'
}

@test "--image: only the first 20 ranges are named, all are counted" {
    make_chain
    for n in {0..29}; do
        change disk.qcow2 "write -P 9 $((n * 200))k 1k"
    done
    run_expect 4 lbverify --image=disk.qcow2 base.lbz incr1.lbz incr2.lbz
    [ "$(grep -c 'differs from the chain in' <<<"$stderr")" = 20 ]
    expect_stderr_has 'lbverify: disk.qcow2: 30 blocks of 64 KiB differ from the chain'
}

@test "--image wants a chain that begins with a full archive" {
    make_chain
    run_expect 3 lbverify --image=disk.qcow2 incr1.lbz incr2.lbz
    expect_stderr "lbverify: incr1.lbz: its parent $(uuid_of base.lbz) is not among the archives given"
    run_expect 1 lbverify --image=missing.qcow2 base.lbz
    expect_stderr 'lbverify: missing.qcow2: No such file or directory'
}

@test "damage is named by file, offset and guest range, and the rest is checked" {
    make_chain
    spoil base.lbz 'frame[1]' 40
    one=$spoiled
    spoil base.lbz 'frame[7]' 40
    spoil incr2.lbz 'frame[0]' 40
    frame() {
        lbz structures "$1.good" |
            jq ".[] | select(.name == \"$2\") | .offset"
    }
    run_expect 4 lbverify ./*.lbz
    [ "${#stderr_lines[@]}" = 3 ]
    [[ "${stderr_lines[0]}" == 'lbverify: ./base.lbz: damaged at offset '* ]]
    [[ "${stderr_lines[0]}" == *'0x100000-0x1fffff'* ]]
    [[ "${stderr_lines[1]}" == *'0x700000-0x7fffff'* ]]
    [[ "${stderr_lines[2]}" == 'lbverify: ./incr2.lbz: damaged at offset '* ]]
    named=$(sed 's/.*at offset \([0-9]*\).*/\1/' <<<"${stderr_lines[0]}")
    [ "$named" -le "$one" ]
    [ "$named" -ge $(($(frame base.lbz 'frame[1]') - 40)) ]
    run_expect 4 lbverify --json -q ./*.lbz
    [ "$(jq -c '[.good, .archives[].good]' <<<"$output")" = \
      '[false,false,true,false]' ]
}

@test "a damaged header, page, trailer, a cut, a tail: found" {
    make_chain
    for structure in header.virtual_size record[0].live page[0].number \
        'page[0].entry[0].digest' trailer.data_blocks trailer.tail.end_mark; do
        cp base.lbz bad.lbz
        cp base.lbz bad.lbz.good
        spoil bad.lbz "$structure"
        run_expect 4 lbverify bad.lbz
        expect_stderr_has 'lbverify: bad.lbz: '
        run_expect 4 bash -c 'cat bad.lbz | lbverify -'
        expect_stderr_has 'lbverify: standard input: '
    done
    size=$(stat -c %s base.lbz)
    for cut in 0 1 100 $((size / 2)) $((size - 1)); do
        head -c "$cut" base.lbz >bad.lbz
        run_expect 4 lbverify bad.lbz
        run_expect 4 bash -c 'cat bad.lbz | lbverify -'
    done
    cp base.lbz bad.lbz
    echo >>bad.lbz
    run_expect 4 lbverify bad.lbz
    run_expect 4 bash -c 'cat bad.lbz | lbverify -'
    echo text >bad.lbz
    run_expect 4 lbverify bad.lbz
    expect_stderr 'lbverify: bad.lbz: not an lbz archive'
}

@test "the highest status counts, and a file that is missing is one of many" {
    make_chain
    run_expect 1 lbverify missing.lbz base.lbz
    expect_stderr 'lbverify: missing.lbz: No such file or directory'
    spoil incr1.lbz 'frame[0]' 20
    run_expect 4 lbverify incr1.lbz missing.lbz base.lbz
    expect_stderr_has 'lbverify: incr1.lbz: damaged' 'lbverify: missing.lbz: No such'
}

@test "--json has all that the manual names" {
    make_chain
    run_expect 0 lbverify --json base.lbz incr1.lbz
    jq -e --arg base "$(uuid_of base.lbz)" --arg incr "$(uuid_of incr1.lbz)" \
        --arg root "$(lbz root incr1.lbz | cut -d' ' -f1)" '
        keys == ["archives", "good"] and .good and
        (.archives | length) == 2 and
        (.archives[0] | keys == ["archive", "good", "index", "label", "parent",
            "root_digest", "time", "uuid"] and .parent == null and
            .uuid == $base) and
        (.archives[1] | .archive == "incr1.lbz" and .good and
            .uuid == $incr and .parent == $base and .label == "main" and
            .root_digest == $root)' <<<"$output"
    # a chain with a gap: each is good, all together are not
    run_expect 3 lbverify --json base.lbz incr2.lbz
    jq -e '(.good | not) and .archives[0].good and .archives[1].good' \
        <<<"$output"
    echo text >bad.lbz
    run_expect 4 lbverify --json bad.lbz
    jq -e '(.good | not) and (.archives == [{archive: "bad.lbz",
           good: false}])' <<<"$output"
}

@test "wrong usage" {
    make_chain
    run_expect 2 lbverify
    expect_stderr_has 'lbverify: at least one ARCHIVE is wanted'
    run_expect 2 lbverify -o x.lbz base.lbz
    expect_stderr_has "lbverify: -o stores what comes through standard input: ARCHIVE must be '-'"
    run_expect 2 lbverify - base.lbz
    expect_stderr_has "lbverify: standard input ('-') must be the only ARCHIVE, without --image and --at"
    run_expect 2 lbverify --image=disk.qcow2 -
    run_expect 2 lbverify --at=x base.lbz
    expect_stderr_has "lbverify: --at: 'x' is no UUID"
}
