# lbmerge --index-only: the digests of a chain, which a disk is held against.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

# disk.qcow2 with 0.lbz, 1.lbz and 2.lbz, and what came after them.
history() {
    new_disk disk.qcow2 600M
    change disk.qcow2 'write -P 1 0 6M' 'write -P 2 300M 2M' \
        'write -P 3 599M 64k'
    dump 0.lbz disk.qcow2
    change disk.qcow2 'write -P 4 1M 200k' 'write -z 300M 128k'
    dump 1.lbz disk.qcow2 --incremental
    qemu-img resize -q -f qcow2 disk.qcow2 700000256
    change disk.qcow2 'write -P 5 650M 64k' 'write -z 2M 1M'
    dump 2.lbz disk.qcow2 --incremental
    change disk.qcow2 'write -P 6 2M 64k' 'write -z 4M 1M' 'write -P 7 640M 64k'
}

lose_power() {
    lbext poke "$1" --set flags=0 --set device=77 \
        --set boot_id=11111111-1111-4111-8111-111111111111
}

# make_index FILE ARCHIVE...
make_index() {
    run_expect 0 lbmerge -q --index-only -o "$@"
    expect_output ''
    expect_stderr ''
    good_archives "$1"
}

@test "the usage, word for word; a rescan as with the archives themselves" {
    history
    cp disk.qcow2 copy.qcow2
    lose_power disk.qcow2
    lose_power copy.qcow2
    run_expect 0 bash -c 'lbmerge --index-only 0.lbz 1.lbz 2.lbz > index.lbz'
    good_archives index.lbz
    for which in 'disk 0.lbz 1.lbz 2.lbz' 'copy index.lbz'; do
        read -r name chain <<<"$which"
        # shellcheck disable=SC2086
        run_expect 0 lbdump -q --json --incremental --rescan -o $name.lbz \
            $chain $name.qcow2
        jq -c '[.kind, .parent, .data_bytes, .zero_bytes, .confirmed]' \
            <<<"$output" >$name.json
        good_archives $name.lbz
        good_image $name.qcow2
        expect_restores "$(content $name.qcow2)" 0.lbz 1.lbz 2.lbz $name.lbz
    done
    cmp disk.json copy.json
    [ "$(<copy.json)" = "[\"incremental\",\"$(uuid_of 2.lbz)\",131072,1048576,true]" ]
    # the archives are not needed, and what follows goes on from it
    change copy.qcow2 'write -P 8 1M 64k'
    dump 4.lbz copy.qcow2 --incremental
    expect_restores "$(content copy.qcow2)" 0.lbz 1.lbz 2.lbz copy.lbz 4.lbz
}

@test "it is small, and the header is that of the merge" {
    history
    make_index index.lbz 0.lbz 1.lbz 2.lbz
    lbmerge -q -o merged.lbz 0.lbz 1.lbz 2.lbz
    [ "$(lbz dump index.lbz | jq -cS '.header | del(.incompatible)')" = \
        "$(lbz dump merged.lbz | jq -cS '.header | del(.incompatible)')" ]
    # 16 bytes for each of its blocks, and the structures
    blocks=$(lbz dump index.lbz | jq '[.pages[].block_digests[]] | length')
    [ "$(stat -c %s index.lbz)" -lt $((blocks * 16 + 1000)) ]
}

@test "it grows with the next incrementals, and is the same whatever the way" {
    history
    make_index all.lbz 0.lbz 1.lbz 2.lbz
    make_index first.lbz 0.lbz
    make_index second.lbz first.lbz 1.lbz
    make_index third.lbz second.lbz 2.lbz
    cmp third.lbz all.lbz
    make_index tail.lbz 2.lbz 1.lbz
    make_index whole.lbz 0.lbz tail.lbz
    cmp whole.lbz all.lbz
    make_index first.lbz --force 1.lbz first.lbz
    cmp first.lbz second.lbz
    lbmerge -q -o merged.lbz 0.lbz 1.lbz 2.lbz
    make_index of-merged.lbz merged.lbz
    cmp of-merged.lbz all.lbz
    run_expect 0 bash -c 'lbmerge -q --index-only 0.lbz 1.lbz 2.lbz --at "$0" |
        cat > piped.lbz' "$(uuid_of 1.lbz)"
    cmp piped.lbz second.lbz
}

@test "it is what the oracle makes of the archives" {
    history
    make_index ours.lbz 0.lbz 1.lbz 2.lbz
    lbz index -o theirs.lbz 0.lbz 1.lbz 2.lbz
    cmp ours.lbz theirs.lbz
    make_index ours.lbz --force 1.lbz 2.lbz
    lbz index -o theirs.lbz 1.lbz 2.lbz
    cmp ours.lbz theirs.lbz
}

@test "an empty disk, changes to zero alone, and sha256" {
    new_disk disk.qcow2 20M
    dump 0.lbz disk.qcow2 --digest=sha256
    make_index index.lbz 0.lbz
    change disk.qcow2 'write -P 1 1M 1M'
    dump 1.lbz disk.qcow2 --incremental --digest=sha256
    change disk.qcow2 'write -z 1M 1M'
    dump 2.lbz disk.qcow2 --incremental --digest=sha256
    make_index zeroes.lbz 2.lbz
    make_index index.lbz --force index.lbz 1.lbz zeroes.lbz
    change disk.qcow2 'write -P 3 19M 64k'
    lose_power disk.qcow2
    run_expect 0 lbdump -q --incremental --rescan --digest=sha256 -o 3.lbz \
        index.lbz disk.qcow2
    expect_restores "$(content disk.qcow2)" 0.lbz 1.lbz 2.lbz 3.lbz
}

@test "an audit by it finds what was not tracked" {
    history
    make_index index.lbz 0.lbz 1.lbz 2.lbz
    run_expect 0 lbdump -q --audit index.lbz disk.qcow2
    host=$(qemu-img map -f qcow2 --output=json disk.qcow2 |
        jq '.[] | select(.start == 314703872) | .offset')
    printf x | dd of=disk.qcow2 bs=1 seek=$((host + 70000)) conv=notrunc status=none
    run_expect 6 lbdump -q --audit index.lbz disk.qcow2
    expect_stderr_has 'ALARM: changed, but not tracked: 0x12c30000-0x12c3ffff'
}

@test "lbverify: alone, in a chain, through a pipe, against a disk" {
    history
    make_index index.lbz 0.lbz 1.lbz
    run_expect 0 lbverify index.lbz
    expect_stderr ''
    run_expect 0 lbverify index.lbz 2.lbz
    expect_stderr ''
    run_expect 0 lbverify --json index.lbz
    [ "$(jq -c '.archives[0] | [.good, .index, .uuid]' <<<"$output")" = \
        "[true,true,\"$(uuid_of 1.lbz)\"]" ]
    run_expect 0 bash -c 'lbverify - < index.lbz'
    expect_stderr ''
    run_expect 0 bash -c 'lbverify -o stored.lbz - < index.lbz'
    cmp stored.lbz index.lbz
    lbrestore -q -o restored.qcow2 0.lbz 1.lbz 2.lbz
    run_expect 0 lbverify --image=restored.qcow2 index.lbz 2.lbz
    change restored.qcow2 'write -P 9 1M 1'
    run_expect 4 lbverify --image=restored.qcow2 index.lbz 2.lbz
    expect_stderr_has 'differs from the chain in 0x100000-0x10ffff'
}

@test "what wants content refuses it and writes nothing" {
    history
    make_index index.lbz 0.lbz 1.lbz
    says='is an index, which has digests and no content; the archives that it was made from are wanted'
    run_expect 2 lbrestore -o out.qcow2 index.lbz 2.lbz
    expect_stderr "lbrestore: index.lbz: $says"
    run_expect 2 lbrestore -o out.qcow2 index.lbz
    expect_stderr "lbrestore: index.lbz: $says"
    run_expect 2 bash -c 'lbrestore -o out.qcow2 - < index.lbz'
    expect_stderr 'lbrestore: standard input: is an index, which has digests and no content'
    sha256sum disk.qcow2 >before
    run_expect 2 lbrestore --in-place disk.qcow2 index.lbz 2.lbz
    expect_stderr "lbrestore: index.lbz: $says"
    sha256sum --quiet -c before
    run_expect 2 lbmerge -o out.lbz index.lbz 2.lbz
    expect_stderr "lbmerge: index.lbz: $says"
    run_expect 1 nbdkit -U - --log=stderr \
        "$abs_top_builddir/nbdkit/.libs/nbdkit-lbz-plugin.so" index.lbz --run true
    expect_stderr_has "index.lbz: $says"
    [ ! -e out.qcow2 ] && [ ! -e out.lbz ]
    # an older one beside it is no harm
    run_expect 0 lbrestore -q -o out.qcow2 --at "$(uuid_of 0.lbz)" 0.lbz index.lbz
}

@test "damage anywhere in it is found, and nothing is written" {
    new_disk disk.qcow2 20M
    change disk.qcow2 'write -P 1 0 1M' 'write -P 2 5M 64k'
    dump 0.lbz disk.qcow2
    change disk.qcow2 'write -z 512k 64k'
    dump 1.lbz disk.qcow2 --incremental
    make_index index.lbz 0.lbz 1.lbz
    lose_power disk.qcow2
    sha256sum disk.qcow2 >before
    size=$(stat -c %s index.lbz)
    for ((at = 0; at < size; at += 7)); do
        cp index.lbz bad.lbz
        flip bad.lbz "$at"
        run lbverify -q bad.lbz
        [ "$status" -ne 0 ] || fail "a flip at $at goes unnoticed"
        run lbdump -q --incremental --rescan -o 2.lbz bad.lbz disk.qcow2
        [ "$status" -ne 0 ] || fail "a flip at $at goes into a rescan"
        [ ! -e 2.lbz ]
        sha256sum --quiet -c before
    done
}

@test "it takes the place of no archive that it is made from" {
    history
    make_index index.lbz 0.lbz 1.lbz
    sha256sum ./*.lbz >before
    ln 1.lbz link.lbz
    ln -s 0.lbz symbolic.lbz
    for target in 0.lbz 1.lbz link.lbz symbolic.lbz; do
        for force in '' --force; do
            # shellcheck disable=SC2086
            run_expect 2 lbmerge --index-only $force -o $target 0.lbz 1.lbz
            expect_stderr "lbmerge: $target: is one of the archives, whose content would be lost; name another file for the index"
        done
    done
    # one that is not needed, too
    run_expect 2 lbmerge -q --index-only --force -o 1.lbz 1.lbz index.lbz
    expect_stderr_has 'lbmerge: 1.lbz: is one of the archives'
    sha256sum --quiet -c before
    make_index index.lbz index.lbz 2.lbz
}

@test "what does not go with it" {
    history
    for option in --compact --level=3; do
        name=${option#--}
        run_expect 2 lbmerge --index-only "$option" -o index.lbz 0.lbz
        expect_stderr_has \
            "lbmerge: --${name%=*} is for content; it excludes --index-only"
    done
    [ ! -e index.lbz ]
    run_expect 0 lbmerge --json --index-only -o index.lbz 0.lbz 1.lbz
    [ "$(jq -c '[.kind, .index, .members, .frames_moved, .frames_rewritten]' \
        <<<"$output")" = '["full",true,2,0,0]' ]
}
