# lbdump nbd://...: what NBD servers export.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

uri='nbd+unix:///?socket=s'
one=11111111-1111-4111-8111-111111111111
two=22222222-2222-4222-8222-222222222222
three=33333333-3333-4333-8333-333333333333

teardown() {
    stop
}

# The server goes, if there is one.
stop() {
    local pid
    if [ -s server.pid ]; then
        pid=$(<server.pid)
        kill "$pid" 2>/dev/null || true
        while kill -0 "$pid" 2>/dev/null; do
            sleep 0.02
        done
    fi
    rm -f server.pid s
}

# qemu_nbd [OPTION]... IMAGE: stock qemu-nbd exports it for reading, at ./s.
qemu_nbd() {
    stop
    qemu-nbd --fork --pid-file="$PWD/server.pid" -t -r -k "$PWD/s" "$@" \
        >server.out 2>&1 </dev/null 3>&- 4>&- || fail "$(cat server.out)"
}

# nbd_kit ARGUMENT...: nbdkit at ./s.
nbd_kit() {
    stop
    nbdkit -P "$PWD/server.pid" -U "$PWD/s" "$@" \
        >server.out 2>&1 </dev/null 3>&- 4>&- || fail "$(cat server.out)"
}

# some_disk IMAGE: data, zeroes, compressed clusters and holes.
some_disk() {
    qemu-img create -q -f qcow2 "$1" "${2:-10M}"
    change "$1" 'write -P 1 0 3M' 'write -P 2 5M 200k' \
        'write -c -P 3 6M 1M' 'write -z 1M 128k' 'write -P 4 9900k 100k'
}

# pull ARCHIVE [OPTION]...: quiet, and judged by the oracle and by zstd.
pull() {
    run_expect 0 lbdump -o "$1" "${@:2}" "$uri"
    expect_output ''
    expect_stderr ''
    good_archives "$1"
}

# pull_changes ARCHIVE PARENT [OPTION]...: an incremental on the parent's archive,
# by the bitmap b.
pull_changes() {
    pull "$1" --bitmap=b --parent="$(uuid_of "$2")" \
        --image-uuid="$(header_of "$2" .image_uuid)" "${@:3}"
}

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
