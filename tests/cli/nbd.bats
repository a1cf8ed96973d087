# lbdump nbd://...: what NBD servers export.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load nbd

# --------------------------------------------------------------- content

@test "a full dump of what qemu-nbd exports" {
    some_disk disk.qcow2
    qemu_nbd -f qcow2 disk.qcow2
    pull full.lbz
    expect_restores "$(content disk.qcow2)" full.lbz
}

@test "incrementals by a persistent bitmap, and their merge" {
    some_disk disk.qcow2
    qemu-img bitmap --add disk.qcow2 b
    qemu_nbd -f qcow2 disk.qcow2
    pull full.lbz
    full=$(content disk.qcow2)
    stop
    change disk.qcow2 'write -P 7 2M 300k' 'write -z 0 256k' \
        'write -P 8 8M 64k' 'discard 5M 64k'
    qemu_nbd -f qcow2 -B b disk.qcow2
    pull_changes 1.lbz full.lbz
    first=$(content disk.qcow2)
    stop
    change disk.qcow2 'write -P 9 9M 1000k' 'write -z 2M 64k'
    qemu_nbd -f qcow2 -B b disk.qcow2
    # b still tracks what has changed since the full one
    pull_changes 2.lbz full.lbz --covered="$(uuid_of 1.lbz)"
    expect_restores "$full" full.lbz
    expect_restores "$first" full.lbz 1.lbz
    expect_restores "$(content disk.qcow2)" full.lbz 2.lbz
    run_expect 0 lbmerge -o merged.lbz full.lbz 1.lbz 2.lbz
    good_archives merged.lbz
    expect_restores "$(content disk.qcow2)" merged.lbz
}

# -------------------------------------------------------------- identity

@test "the header is what the options say" {
    some_disk disk.qcow2
    qemu-img bitmap --add disk.qcow2 b
    qemu_nbd -f qcow2 -B b disk.qcow2
    pull full.lbz --uuid=$one --image-uuid=$two --set=$three --time=1700000000 \
        --chain=offsite --digest=sha256
    lbz dump full.lbz | jq -c '.header | [.backup_uuid, .image_uuid, .set_uuid,
        .time, .label, .kind, .covered]' >got
    echo "[\"$one\",\"$two\",\"$three\",1700000000,\"offsite\",\"full\",[]]" |
        diff - got
    pull 1.lbz --bitmap=b --uuid=$two --image-uuid=$two --parent=$one \
        --covered=$three --covered=${three/3/4} --digest=sha256
    lbz dump 1.lbz | jq -c '.header | [.backup_uuid, .image_uuid, .parent_uuid,
        .set_uuid, .label, .kind, .covered]' >got
    echo "[\"$two\",\"$two\",\"$one\",\"00000000-0000-0000-0000-000000000000\",\"main\",\"incremental\",[\"$three\",\"${three/3/4}\"]]" |
        diff - got
    run_expect 2 lbdump --bitmap=b --uuid=$one --image-uuid=$two \
        --parent=$one -o x.lbz "$uri"
    expect_stderr "lbdump: $uri: no archive can be made: the archive is its own parent"
    expect_absent x.lbz
}

@test "without options the identity is random, and the time is now" {
    some_disk disk.qcow2
    qemu_nbd -f qcow2 disk.qcow2
    before=$(date +%s)
    pull 1.lbz
    pull 2.lbz
    after=$(date +%s)
    [ "$(header_of 1.lbz .set_uuid)" = 00000000-0000-0000-0000-000000000000 ]
    for field in backup_uuid image_uuid; do
        [ "$(header_of 1.lbz .$field)" != "$(header_of 2.lbz .$field)" ]
        [ "$(header_of 1.lbz .$field)" != "$(header_of 1.lbz .set_uuid)" ]
    done
    [ "$(header_of 1.lbz .time)" -ge "$before" ]
    [ "$(header_of 2.lbz .time)" -le "$after" ]
}

@test "the summary" {
    some_disk disk.qcow2
    qemu-img bitmap --add disk.qcow2 b
    qemu_nbd -f qcow2 -B b disk.qcow2
    run_expect 0 lbdump --json --uuid=$one --image-uuid=$two -o full.lbz "$uri"
    expect_stderr ''
    read -r root uuid < <(lbz root full.lbz)
    jq -e --arg root "$root" --arg uuid "$uuid" --arg image $two \
        --arg uri "$uri" '.disk == $uri and .archive == "full.lbz" and
        .kind == "full" and .reason == null and .uuid == $uuid and
        .parent == null and .image_uuid == $image and .label == "main" and
        .checkpoint == false and .confirmed == false and
        .virtual_size == 10485760 and .root_digest == $root' <<<"$output"
    run_expect 0 bash -c "lbdump --json --bitmap=b --parent=$one --uuid=$three \
        --image-uuid=$two '$uri' | cat >1.lbz"
    read -r root uuid < <(lbz root 1.lbz)
    # nothing but the summary: no note that a confirmation is wanted
    jq -e --arg root "$root" --arg parent $one '.archive == null and
        .kind == "incremental" and .parent == $parent and
        .checkpoint == false and .confirmed == false and
        .root_digest == $root' <<<"$stderr"
}

# ----------------------------------------------------------------- usage

@test "usage errors" {
    wrong() {
        run_expect 2 lbdump "${@:2}"
        expect_stderr "lbdump: $1
Try 'lbdump --help'."
        expect_absent x.lbz
    }
    for option in --incremental --since=$one --auto --overlay \
            --interrupted; do
        wrong '--incremental, --since, --auto, --overlay and --interrupted are not for NBD exports; --bitmap dumps what has changed' \
            $option -o x.lbz "$uri"
    done
    for option in --copy --trust-pipe; do
        wrong "$option is not for NBD exports, whose disk lbdump does not write to" \
            $option -o x.lbz "$uri"
    done
    wrong '--qmp finds the disks itself, or by --disk; DISK is not wanted' \
        --qmp=qmp -o x.lbz "$uri"
    wrong '--disk names a disk of a running QEMU; it wants --qmp' \
        --disk=a -o x.lbz "$uri"
    wrong '--bitmap wants --parent: NBD does not tell since when the bitmap tracks changes, and an incremental must name the backup it goes on from' \
        --bitmap=b --image-uuid=$one -o x.lbz "$uri"
    wrong "--bitmap wants --image-uuid: that of the parent's archive, which all archives of a disk have" \
        --bitmap=b --parent=$one -o x.lbz "$uri"
    for option in --parent=$one --parent-size=1M --covered=$one; do
        wrong '--parent, --parent-size and --covered want --bitmap' \
            $option -o x.lbz "$uri"
    done
    for option in bitmap=b parent=$one parent-size=1M covered=$one uuid=$one \
            image-uuid=$one set=$one time=1; do
        wrong "--${option%%=*} is for NBD exports (nbd://HOST/EXPORT) alone" \
            "--$option" -o x.lbz disk.qcow2
    done
    wrong "--set: 'x' is no UUID" --set=x -o x.lbz "$uri"
    wrong "--uuid: the UUID of zeroes means none" \
        --uuid=00000000-0000-0000-0000-000000000000 -o x.lbz "$uri"
    wrong "--time: 'now' is no number from 0 to 4294967295" \
        --time=now -o x.lbz "$uri"
    wrong '--covered: at most 32 are possible' \
        $(for ((i = 0; i < 33; i++)); do echo --covered=$one; done) \
        -o x.lbz "$uri"
    wrong 'one DISK is wanted, 2 given' -o x.lbz "$uri" "$uri"
}

@test "a file may have a name that looks alike" {
    some_disk nbd.qcow2
    for name in nbd nbd: nbdx nbd+unix nbds; do
        mv nbd* $name
        run_expect 0 lbdump --copy -q -o x.lbz $name
        rm x.lbz
    done
}

# --------------------------------------------------------------- servers

# expect_raw ARCHIVE FILE: it restores to the bytes of the file.
expect_raw() {
    lbz restore -o oracle.raw "$1"
    cmp oracle.raw "$2"
    run_expect 0 lbrestore --quiet --force -o restored.raw "$1"
    cmp restored.raw "$2"
}

@test "disks of every size" {
    head -c 1200000 /dev/urandom >noise
    for size in 0 1 511 512 513 65535 65536 65537 1000001 1048576 1048577; do
        head -c $size noise >disk
        nbd_kit file disk
        pull full.lbz
        expect_raw full.lbz disk
        [ "$(header_of full.lbz .virtual_size)" = $size ]
        rm full.lbz
    done
}

@test "servers with little to say" {
    head -c 3333333 /dev/urandom >disk
    truncate -s 5M disk
    printf noise | dd of=disk seek=5000000 bs=1 conv=notrunc status=none
    # neither extents, nor structured replies, nor several connections
    for how in --filter=noextents --no-sr '--filter=noparallel serialize=connections' \
            '--filter=nofilter' '--filter=multi-conn multi-conn-mode=disable'; do
        # shellcheck disable=SC2086
        set -- $how
        # filters come before the plugin, their parameters behind it
        nbd_kit "$1" file disk "${@:2}"
        pull full.lbz --threads=4
        expect_raw full.lbz disk
        rm full.lbz
    done
}

@test "the limits of the server's blocks are kept" {
    head -c 3M /dev/urandom >disk
    for sizes in '4096 65536 128K' '65536 65536 65536' '512 4096 32M' \
            '4096 2M 4M' '1 512 96K'; do
        # shellcheck disable=SC2086
        set -- $sizes
        nbd_kit --filter=blocksize-policy file disk blocksize-minimum=$1 \
            blocksize-preferred=$2 blocksize-maximum=$3 \
            blocksize-error-policy=error
        pull full.lbz
        expect_raw full.lbz disk
        rm full.lbz
    done
    fake_nbd --data disk --block 4096,65536,200704
    pull full.lbz --threads=1
    expect_raw full.lbz disk
    # what is preferred divides what is asked
    [ "$(asked read | head -n 8 | tr '\n' ,)" = \
        '0 196608,196608 196608,393216 196608,589824 196608,786432 196608,983040 65536,1048576 196608,1245184 196608,' ]
}

@test "a disk whose end is no multiple of the server's blocks" {
    head -c 100000 /dev/urandom >disk
    fake_nbd --data disk --block 4096,65536,65536 \
        --context base:allocation=0:98304,0:1
    pull full.lbz
    expect_raw full.lbz disk
}

@test "as many connections as threads, where the server allows for many" {
    head -c 9M /dev/urandom >disk
    fake_nbd --data disk --multi
    pull full.lbz --threads=4
    expect_raw full.lbz disk
    [ "$(connections)" = 4 ]
    fake_nbd --data disk
    pull one.lbz --threads=4
    [ "$(connections)" = 1 ]
    expect_raw one.lbz disk
    fake_nbd --data disk --multi
    pull many.lbz --threads=60
    [ "$(connections)" = 16 ]
    # the bitmap has one of its own
    fake_nbd --data disk --multi --context qemu:dirty-bitmap:b=1:1 \
        --context base:allocation=0:1
    pull_changes 1.lbz full.lbz --threads=3
    [ "$(connections)" = 4 ]
    [ "$(jq -c 'select(.context) | [.of, .context]' s.log | sort |
         tr '\n' ' ')" = '[1,"qemu:dirty-bitmap:b"] [2,"base:allocation"] [3,"base:allocation"] [4,"base:allocation"] ' ]
    expect_raw full.lbz disk
    fake_nbd --data disk --context qemu:dirty-bitmap:b=1:1 \
        --context base:allocation=0:1
    pull_changes 2.lbz full.lbz --threads=3
    [ "$(connections)" = 1 ]
}

@test "connections that can't be had are done without" {
    head -c 9M /dev/urandom >disk
    for how in '--refuse --clients 1' '--refuse --clients 2' '--clients 2'; do
        # shellcheck disable=SC2086
        fake_nbd --data disk --multi $how
        pull full.lbz --threads=4
        expect_raw full.lbz disk
        rm full.lbz
    done
    # the bitmap's then serves for all
    fake_nbd --data disk --multi --refuse --clients 1 \
        --context qemu:dirty-bitmap:b=1:1 --context base:allocation=3:1
    pull 1.lbz --bitmap=b --parent=$one --image-uuid=$two
    [ "$(asked read | wc -l)" = 9 ]
}

@test "what the server calls zero is not read" {
    head -c 3M /dev/urandom >disk
    truncate -s 8M disk
    # holes that don't read as zeroes are
    fake_nbd --data disk --multi \
        --context base:allocation=0:2097152,1:1048576,3:1048576,2:2097152,0:1
    pull full.lbz --threads=2
    expect_raw full.lbz disk
    [ "$(asked read | tr '\n' ,)" = \
        '0 1048576,1048576 1048576,2097152 1048576,6291456 1048576,7340032 1048576,' ]
}

@test "answers of one extent, and extents that go on behind the request" {
    head -c 3M /dev/urandom >disk
    truncate -s 20M disk
    spec=0:2097152,0:1048576,3:512,2:4194304,0:65536,3:1
    for how in '--extents 1' --long '--extents 1 --long'; do
        # shellcheck disable=SC2086
        fake_nbd --data disk $how --multi --context base:allocation=$spec \
            --context qemu:dirty-bitmap:b=0:4096,1:4096,0:8192,1:3145728,0:1
        pull full.lbz --threads=2
        expect_raw full.lbz disk
        pull_changes 1.lbz full.lbz
        lbz restore -o oracle.raw full.lbz 1.lbz
        cmp oracle.raw disk
        rm ./*.lbz
    done
}

@test "block status of large disks is asked in large windows" {
    size=$((1 << 40))
    fake_nbd --size $size --multi --context base:allocation=3:1
    pull full.lbz
    [ -z "$(asked read)" ]
    [ "$(asked status | wc -l)" = 1024 ]
    fake_nbd --size $size --multi --context base:allocation=3:1 \
        --context qemu:dirty-bitmap:b=0:$((size / 2)),1:1
    pull_changes 1.lbz full.lbz
    [ -z "$(asked read)" ]
    [ "$(asked status | wc -l)" = $((1024 + 512)) ]
    [ "$(lbz dump 1.lbz | jq .trailer.zero_blocks)" = $((size / 2 / 65536)) ]
}

@test "a bitmap of any granularity, and a context with another name" {
    qemu-img create -q -f qcow2 disk.qcow2 10M
    change disk.qcow2 'write -P 1 0 10M'
    qemu-img bitmap --add -g 512 disk.qcow2 b
    qemu_nbd -f qcow2 disk.qcow2
    pull full.lbz
    stop
    change disk.qcow2 'write -P 2 65024 1k' 'write -P 3 200000 1' \
        'write -z 131072 512' 'write -P 4 10485248 512'
    qemu_nbd -f qcow2 -B b disk.qcow2
    pull_changes 1.lbz full.lbz
    expect_restores "$(content disk.qcow2)" full.lbz 1.lbz
    [ "$(lbz dump 1.lbz | jq .trailer.data_blocks)" = 5 ]
    stop
    head -c 1M /dev/zero | tr '\0' x >other
    fake_nbd --data other --context acme:changes=0:65536,1:65536,0:1
    pull 2.lbz --bitmap=acme:changes --parent=$one --image-uuid=$two
    [ "$(asked read)" = '65536 65536' ]
}

@test "an incremental of a disk that has grown or was cut" {
    size=2048000
    head -c $size /dev/urandom >disk
    # parent's size, and what is read besides what has changed
    for case in '1024000:983040 65536' "$size:" "3000000:2031616 16384" \
            "983040:" ':2031616 16384'; do
        fake_nbd --data disk --context qemu:dirty-bitmap:b=0:1
        parent=${case%%:*}
        pull 1.lbz --bitmap=b --parent=$one --image-uuid=$two \
            ${parent:+--parent-size=$parent}
        [ "$(asked read)" = "${case#*:}" ]
        rm 1.lbz
    done
    # none of them is asked for twice
    fake_nbd --data disk --context qemu:dirty-bitmap:b=0:917504,1:70000,0:1
    pull 1.lbz --bitmap=b --parent=$one --image-uuid=$two --parent-size=1000K
    [ "$(asked read)" = '917504 131072' ]
    rm 1.lbz
    fake_nbd --data disk --context qemu:dirty-bitmap:b=0:2040000,1:1
    pull 1.lbz --bitmap=b --parent=$one --image-uuid=$two
    [ "$(asked read)" = '2031616 16384' ]
}

# A stock QEMU runs a guest and holds a point in time: what the guest overwrites
# is copied to a file first. The client may see what is in the bitmap alone.
fleece() {
    qemu-img create -q -f qcow2 fleece.qcow2 10M
    qemu-storage-daemon --daemonize --pidfile "$PWD/server.pid" \
        --blockdev driver=qcow2,node-name=disk,file.driver=file,file.filename="$1" \
        --blockdev driver=qcow2,node-name=fleece,file.driver=file,file.filename=fleece.qcow2 \
        --blockdev "driver=copy-before-write,node-name=cbw,file=disk,target=fleece$2" \
        --blockdev driver=snapshot-access,node-name=snap,file=cbw \
        --nbd-server addr.type=unix,addr.path="$PWD/s" \
        --export type=nbd,id=guest,node-name=cbw,name=guest,writable=on \
        --export type=nbd,id=snap,node-name=snap,name=snap,bitmaps.0.node=disk,bitmaps.0.name=b \
        >server.out 2>&1 </dev/null 3>&- 4>&- || fail "$(cat server.out)"
}

@test "a running guest, through stock QEMU's fleecing" {
    some_disk disk.qcow2
    qemu-img bitmap --add disk.qcow2 b
    qemu_nbd -f qcow2 disk.qcow2
    pull full.lbz
    stop
    change disk.qcow2 'write -P 7 2M 300k' 'write -z 4M 128k' \
        'write -P 8 10200k 40k'
    qemu-img bitmap --disable disk.qcow2 b
    now=$(content disk.qcow2)
    uri='nbd+unix:///snap?socket=s'
    for filter in '' ,bitmap.node=disk,bitmap.name=b; do
        cp disk.qcow2 guest.qcow2
        fleece guest.qcow2 "$filter"
        run_expect 0 qemu-io -f raw -c 'write -P 9 2100k 100k' \
            -c 'write -P 9 0 64k' -c 'discard 4M 64k' \
            'nbd+unix:///guest?socket=s'
        pull_changes 1.lbz full.lbz
        expect_restores "$now" full.lbz 1.lbz
        if [ -z "$filter" ]; then
            pull again.lbz
            expect_restores "$now" again.lbz
        fi
        stop
        rm -f 1.lbz again.lbz fleece.qcow2
    done
}

# ---------------------------------------------------------------- output

@test "to standard output, into a pipe and a file" {
    some_disk disk.qcow2
    qemu_nbd -f qcow2 disk.qcow2
    run_to full.lbz 0 lbdump "$uri"
    expect_stderr ''
    good_archives full.lbz
    expect_restores "$(content disk.qcow2)" full.lbz
    run_expect 0 bash -c "lbdump '$uri' | cat >pipe.lbz"
    expect_stderr ''
    expect_restores "$(content disk.qcow2)" pipe.lbz
}

@test "an existing file is not replaced without --force" {
    some_disk disk.qcow2
    qemu_nbd -f qcow2 disk.qcow2
    echo precious >there.lbz
    run_expect 2 lbdump -o there.lbz "$uri"
    expect_stderr 'lbdump: there.lbz: already exists; --force replaces it'
    [ "$(<there.lbz)" = precious ]
    pull there.lbz --force
}

@test "a broken pipe" {
    head -c 9M /dev/urandom >disk
    nbd_kit file disk
    run_expect 1 bash -c "set -o pipefail
        lbdump '$uri' | head -c 100000 >/dev/null"
    expect_stderr 'lbdump: standard output: writing: Broken pipe'
}
