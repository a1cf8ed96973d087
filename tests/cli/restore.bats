# lbrestore: where to, in which format, and never over what is there.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

setup() {
    helpers_setup
    loop=''
}

teardown() {
    let_go
    [ -z "$loop" ] || losetup -d "$loop"
}

# A chain of three archives, and $now.
make_chain() {
    new_disk disk.qcow2 20M
    qemu_write disk.qcow2 0 10M 1
    dump base.lbz disk.qcow2
    change disk.qcow2 'write -P 2 3M 64k' 'write -z 5M 1M'
    dump incr1.lbz disk.qcow2 --incremental
    change disk.qcow2 'write -P 3 15M 100k' 'write -P 4 5M 4k'
    dump incr2.lbz disk.qcow2 --incremental
    now=$(content disk.qcow2)
}

@test "the format follows the name, unless it is given" {
    make_chain
    for name in a.qcow2 a.img a.raw a a.vmdk; do
        run_expect 0 lbrestore -o $name base.lbz incr?.lbz
        expect_output ''
        expect_stderr ''
        case $name in
            a.img | a.raw) expect_content "$now" $name raw ;;
            *) expect_content "$now" $name; good_image $name ;;
        esac
    done
    run_expect 0 lbrestore --format=raw -o b.qcow2 base.lbz incr?.lbz
    expect_content "$now" b.qcow2 raw
    run_expect 0 lbrestore --format=qcow2 -o b.raw base.lbz incr?.lbz
    good_image b.raw
    expect_content "$now" b.raw
    run_expect 2 lbrestore --format=vmdk -o c base.lbz
    expect_stderr_has "lbrestore: --format: 'vmdk' is neither qcow2 nor raw"
}

@test "no existing file is touched without --force" {
    make_chain
    echo precious >file.qcow2
    expect_untouched file.qcow2 run_expect 2 \
        lbrestore -o file.qcow2 base.lbz incr?.lbz
    expect_stderr 'lbrestore: file.qcow2: already exists; --force replaces it'
    ln -s file.qcow2 link.qcow2
    expect_untouched file.qcow2 run_expect 2 \
        lbrestore -o link.qcow2 base.lbz incr?.lbz
    run_expect 0 lbrestore --force -o link.qcow2 base.lbz incr?.lbz
    [ -L link.qcow2 ]
    good_image file.qcow2
    expect_content "$now" file.qcow2
    mkdir folder
    run_expect 2 lbrestore --force -o folder base.lbz
    expect_stderr 'lbrestore: folder: neither a regular file nor a block device'
    run_expect 1 lbrestore -o nowhere/disk.qcow2 base.lbz
    expect_stderr 'lbrestore: nowhere/disk.qcow2: No such file or directory'
}

@test "an archive that is read is never replaced" {
    make_chain
    for name in base.lbz incr2.lbz; do
        expect_untouched $name run_expect 2 \
            lbrestore --force -o $name base.lbz incr?.lbz
        expect_stderr "lbrestore: $name: is one of the archives"
    done
}

@test "a disk that a guest uses is not replaced, even with --force" {
    make_chain
    hold_open disk.qcow2
    expect_untouched disk.qcow2 run_expect 5 \
        lbrestore --force -o disk.qcow2 base.lbz incr?.lbz
    expect_stderr 'lbrestore: disk.qcow2: the image is in use by another process'
    let_go
    run_expect 0 lbrestore --force -o disk.qcow2 base.lbz
    good_image disk.qcow2
}

@test "a damaged archive leaves nothing under the final name" {
    make_chain
    cp incr1.lbz good.lbz
    offset=$(lbz structures incr1.lbz |
        jq '.[] | select(.name == "frame[1]") | .offset')
    printf '\377\377\377' | dd of=incr1.lbz bs=1 seek=$((offset + 12)) \
        conv=notrunc status=none
    run_expect 4 lbrestore -o new.qcow2 base.lbz incr?.lbz
    expect_stderr_has "lbrestore: incr1.lbz: damaged at offset "
    expect_absent new.qcow2
    echo old >old.qcow2
    expect_untouched old.qcow2 run_expect 4 \
        lbrestore --force -o old.qcow2 base.lbz incr?.lbz
    # an older state is whole
    run_expect 0 lbrestore --at "$(uuid_of base.lbz)" -o new.qcow2 \
        base.lbz incr?.lbz
    expect_stderr 'lbrestore: incr1.lbz: not needed, left out
lbrestore: incr2.lbz: not needed, left out'
}

@test "from a pipe: one full archive" {
    make_chain
    run_expect 0 lbmerge -o full.lbz base.lbz incr?.lbz
    for name in p.qcow2 p.raw; do
        run_expect 0 bash -c 'cat full.lbz | lbrestore -o "$0" -' $name
        expect_stderr ''
    done
    good_image p.qcow2
    expect_content "$now" p.qcow2
    expect_content "$now" p.raw raw
    # a file as standard input will do, too
    run_expect 0 bash -c 'lbrestore --force -o p.qcow2 - <full.lbz'
    expect_content "$now" p.qcow2

    run_expect 3 bash -c 'cat incr1.lbz | lbrestore -o q.qcow2 -'
    expect_stderr "lbrestore: standard input: an incremental; restoring needs its parent $(uuid_of base.lbz) too, so name files"
    run_expect 4 bash -c 'head -c 1000 full.lbz | lbrestore -o q.qcow2 -'
    expect_stderr_has 'lbrestore: standard input: '
    run_expect 4 bash -c ': | lbrestore -o q.qcow2 -'
    expect_stderr_has 'lbrestore: standard input: '
    run_expect 3 bash -c 'cat full.lbz | lbrestore --at "$0" -o q.qcow2 -' \
        "$(uuid_of base.lbz)"
    run_expect 2 lbrestore -o q.qcow2 - incr1.lbz
    expect_stderr_has "lbrestore: standard input ('-') must be the only ARCHIVE"
    expect_absent q.qcow2
}

@test "incrementals alone, or with a gap, can't be restored" {
    make_chain
    run_expect 3 lbrestore -o x.qcow2 incr1.lbz incr2.lbz
    expect_stderr "lbrestore: incr1.lbz: its parent $(uuid_of base.lbz) is not among the archives given"
    run_expect 3 lbrestore -o x.qcow2 base.lbz incr2.lbz
    expect_stderr "lbrestore: incr2.lbz: its parent $(uuid_of incr1.lbz) is not among the archives given"
    other=11111111-2222-4333-8444-555555555555
    run_expect 3 lbrestore --at $other -o x.qcow2 base.lbz
    expect_stderr "lbrestore: no archive with the UUID $other was given"
    run_expect 1 lbrestore -o x.qcow2 base.lbz missing.lbz
    expect_stderr 'lbrestore: missing.lbz: No such file or directory'
    run_expect 2 lbrestore -o x.qcow2
    expect_stderr_has 'lbrestore: at least one ARCHIVE is wanted'
    run_expect 2 lbrestore base.lbz
    expect_stderr_has 'lbrestore: -o DISK is wanted'
    expect_absent x.qcow2
}

@test "the restored image goes on with incrementals" {
    make_chain
    run_expect 0 lbrestore -o new.qcow2 base.lbz incr1.lbz incr2.lbz
    good_image new.qcow2
    [ "$(status_of new.qcow2 '.checkpoints | length')" = 1 ]
    [ "$(status_of new.qcow2 .checkpoints[0].uuid)" = "$(uuid_of incr2.lbz)" ]
    [ "$(status_of new.qcow2 .checkpoints[0].confirmed)" = true ]
    [ "$(status_of new.qcow2 .image_uuid)" = "$(status_of disk.qcow2 .image_uuid)" ]
    change new.qcow2 'write -P 7 8M 64k' 'write -z 0 64k'
    after=$(content new.qcow2)
    dump incr3.lbz new.qcow2 --incremental
    [ "$(header_of incr3.lbz .parent_uuid)" = "$(uuid_of incr2.lbz)" ]
    expect_restores "$after" base.lbz incr?.lbz
    # the original goes its own way: another branch of the tree
    qemu_write disk.qcow2 12M 64k 8
    dump other.lbz disk.qcow2 --incremental
    expect_restores "$(content disk.qcow2)" --at "$(uuid_of other.lbz)" ./*.lbz
}

@test "an older point in time, and its own next incremental" {
    make_chain
    run_expect 0 lbrestore -q --at "$(uuid_of incr1.lbz)" -o new.qcow2 ./*.lbz
    [ "$(status_of new.qcow2 .checkpoints[0].uuid)" = "$(uuid_of incr1.lbz)" ]
    qemu_write new.qcow2 1M 64k 9
    dump branch.lbz new.qcow2 --incremental
    expect_restores "$(content new.qcow2)" base.lbz incr1.lbz branch.lbz
    run_expect 3 lbrestore -o x.qcow2 ./*.lbz
    expect_stderr_has 'the archives end in 2 different states; choose one with --at UUID:' \
        "$(uuid_of branch.lbz) (./branch.lbz, " "$(uuid_of incr2.lbz) (./incr2.lbz, "
}

@test "outputs are sparse" {
    new_disk disk.qcow2 1T
    change disk.qcow2 'write -P 1 500G 64k' 'write -P 1 900G 100k'
    dump full.lbz disk.qcow2
    run_expect 0 lbrestore -o r.raw full.lbz
    [ "$(stat -c %s r.raw)" = $((1 << 40)) ]
    [ "$(du -k r.raw | cut -f1)" -le 1024 ]
    run_expect 0 lbrestore -o r.qcow2 full.lbz
    [ "$(du -k r.qcow2 | cut -f1)" -le 4096 ]
    good_image r.qcow2
    run_expect 0 qemu-io -r -f raw -c 'read -P 1 500G 64k' \
        -c 'read -P 1 900G 100k' -c 'read -P 0 499G 64k' r.raw
    [[ "$output" != *erification* ]]
    run_expect 0 qemu-io -r -f qcow2 -c 'read -P 1 500G 64k' \
        -c 'read -P 1 900G 100k' -c 'read -P 0 499G 64k' r.qcow2
    [[ "$output" != *erification* ]]
}

@test "--json, --threads, --rate-limit, --progress" {
    make_chain
    run_expect 0 lbrestore --json --threads=1 --rate-limit=100M -o new.qcow2 \
        base.lbz incr?.lbz
    jq -e --arg uuid "$(uuid_of incr2.lbz)" '
        keys == ["data_bytes", "disk", "format", "time", "uuid",
            "virtual_size"] and
        .disk == "new.qcow2" and .format == "qcow2" and .uuid == $uuid and
        .virtual_size == 20971520 and .data_bytes > 9000000 and
        (now - .time | . > -60 and . < 600)' <<<"$output"
    expect_content "$now" new.qcow2
    run_expect 0 lbrestore --json --threads=7 -o new.raw base.lbz incr?.lbz
    [ "$(jq -r .format <<<"$output")" = raw ]
    expect_content "$now" new.raw raw
    run_expect 0 lbrestore -q --progress -o q.raw base.lbz incr?.lbz
    expect_stderr ''
}

# A loop device of the file: where the kernel has them, we must be able to.
attach() {
    [ -e /dev/loop-control ] || skip 'this kernel has no loop devices'
    loop=$(losetup --find --show "$1") || fail 'losetup failed'
}

@test "a block device is written in place, and zeroed where there is nothing" {
    make_chain
    head -c 21M /dev/urandom >device
    attach device
    expect_untouched device run_expect 2 lbrestore -o "$loop" base.lbz incr?.lbz
    expect_stderr "lbrestore: $loop: already exists; --force replaces it"
    run_expect 0 lbrestore --force -o "$loop" base.lbz incr?.lbz
    sync "$loop"
    head -c 20M device >first
    expect_content "$now" first raw
    run_expect 0 lbrestore --force --format=qcow2 -o "$loop" base.lbz incr?.lbz
    sync "$loop"
    qemu-img check -f qcow2 device
    expect_content "$now" device
}

@test "a block device that is too small, or in use, is left alone" {
    make_chain
    head -c 19M /dev/urandom >device
    attach device
    expect_untouched device run_expect 1 \
        lbrestore --force -o "$loop" base.lbz incr?.lbz
    expect_stderr "lbrestore: $loop: has 19922944 bytes, the disk needs 20971520"
    losetup -d "$loop"
    loop=''
    truncate -s 32M device
    mkfs.ext4 -q device
    attach device
    mkdir mnt
    mount "$loop" mnt
    run_expect 5 lbrestore --force -o "$loop" base.lbz incr?.lbz
    umount mnt
    expect_stderr "lbrestore: $loop: the device is in use"
}
