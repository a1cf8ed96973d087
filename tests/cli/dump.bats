# lbdump: full dumps, and the options that all dumps have.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

@test "a full dump restores to what the guest reads" {
    new_disk disk.qcow2 20M
    change disk.qcow2 'write -P 1 0 100k' 'write -P 2 1000k 3M' \
        'write -z 2M 64k' 'write -P 3 20479k 1k'
    now=$(content disk.qcow2)
    dump full.lbz disk.qcow2
    good_image disk.qcow2
    expect_content "$now" disk.qcow2
    expect_restores "$now" full.lbz
    [ "$(header_of full.lbz .kind)" = full ]
    [ "$(header_of full.lbz .image_uuid)" = "$(status_of disk.qcow2 .image_uuid)" ]
    [ "$(uuid_of full.lbz)" = "$(status_of disk.qcow2 .checkpoints[0].uuid)" ]
}

@test "a dump to standard output is confirmed in a file, not in a pipe" {
    new_disk disk.qcow2 5M
    run_to full.lbz 0 lbdump disk.qcow2
    expect_stderr ''
    good_archives full.lbz
    [ "$(status_of disk.qcow2 .checkpoints[0].confirmed)" = true ]
    run_expect 0 bash -c 'lbdump disk.qcow2 | cat >piped.lbz'
    read -r root uuid < <(lbz root piped.lbz)
    expect_stderr "lbdump: disk.qcow2: the archive went into a pipe, so its checkpoint is not confirmed; when it is safe: lbctl confirm disk.qcow2 $uuid $root"
    [ "$(status_of disk.qcow2 .checkpoints[1].confirmed)" = false ]
    run_expect 0 bash -c 'lbdump --trust-pipe disk.qcow2 | cat >trusted.lbz'
    expect_stderr ''
    [ "$(status_of disk.qcow2 .checkpoints[2].confirmed)" = true ]
    good_archives piped.lbz trusted.lbz
    good_image disk.qcow2
}

@test "where livebackup is off a full dump works and says how to turn it on" {
    qemu-img create -q -f qcow2 disk.qcow2 5M
    qemu_write disk.qcow2 1M 1M 5
    expect_untouched disk.qcow2 run_expect 0 lbdump -o full.lbz disk.qcow2
    expect_stderr 'lbdump: disk.qcow2: livebackup is off, so this dump is not followed by incrementals; turn it on with: lbctl enable disk.qcow2'
    good_archives full.lbz
    expect_restores "$(content disk.qcow2)" full.lbz
    expect_untouched disk.qcow2 run_expect 0 lbdump -q -o two.lbz disk.qcow2
    expect_stderr ''
    expect_untouched disk.qcow2 run_expect 0 \
        lbdump --auto -o auto.lbz disk.qcow2
    expect_stderr_has "lbdump: disk.qcow2: full: livebackup is off; turn it on with 'lbctl enable'"
    [ "$(grep -c 'livebackup is off' <<<"$stderr")" = 1 ]
    run_expect 3 lbdump --incremental -o incr.lbz disk.qcow2
    expect_stderr "lbdump: disk.qcow2: an incremental is not possible: livebackup is off; turn it on with 'lbctl enable'; make a full dump, or use --auto"
    expect_absent incr.lbz
}

@test "-o never replaces a file without --force, and leaves no part of one" {
    new_disk disk.qcow2 5M
    echo precious >full.lbz
    expect_untouched disk.qcow2 run_expect 2 lbdump -o full.lbz disk.qcow2
    expect_stderr 'lbdump: full.lbz: already exists; --force replaces it'
    [ "$(cat full.lbz)" = precious ]
    dump full.lbz disk.qcow2 --force
    expect_untouched disk.qcow2 run_expect 1 \
        lbdump -o nowhere/full.lbz disk.qcow2
    expect_stderr 'lbdump: nowhere/full.lbz: No such file or directory'
    mkdir folder
    expect_untouched disk.qcow2 run_expect 1 lbdump -o folder disk.qcow2
    expect_stderr 'lbdump: folder: Is a directory'
    [ "$(status_of disk.qcow2 '.checkpoints | length')" = 1 ]
}

@test "an archive is never written over the disk itself" {
    new_disk disk.qcow2 5M
    expect_untouched disk.qcow2 run_expect 2 \
        lbdump --force -o disk.qcow2 disk.qcow2
    expect_stderr 'lbdump: disk.qcow2: is the disk itself, or a file that it consists of'
    # shellcheck disable=SC2094
    expect_untouched disk.qcow2 run_expect 2 \
        bash -c 'lbdump disk.qcow2 1<>disk.qcow2'
    expect_stderr 'lbdump: standard output: is the disk itself, or a file that it consists of'
    ln disk.qcow2 other-name
    expect_untouched disk.qcow2 run_expect 2 \
        lbdump --force -o other-name disk.qcow2
    expect_stderr 'lbdump: other-name: is the disk itself, or a file that it consists of'
    qemu-img create -q -f qcow2 -b disk.qcow2 -F qcow2 top.qcow2
    expect_untouched disk.qcow2 run_expect 2 \
        lbdump -q --force -o disk.qcow2 top.qcow2
    expect_stderr 'lbdump: disk.qcow2: is the disk itself, or a file that it consists of'
}

@test "--copy leaves the image byte-identical, even if it is read-only" {
    new_disk disk.qcow2 10M
    qemu_write disk.qcow2 1M 1M 1
    dump full.lbz disk.qcow2
    qemu_write disk.qcow2 3M 100k 2
    chmod a-w disk.qcow2
    if [ "$(id -u)" = 0 ]; then # who may write anything
        mkdir low && cp --preserve=all disk.qcow2 low && chown -R 65534 low
        as=(setpriv --reuid=65534 --regid=65534 --clear-groups)
        cd low
        cp ../full.lbz . 
        chown 65534 .
    else
        as=()
    fi
    expect_untouched disk.qcow2 run_expect 0 \
        "${as[@]}" lbdump --copy -o copy.lbz disk.qcow2
    expect_stderr ''
    expect_untouched disk.qcow2 run_expect 0 \
        "${as[@]}" lbdump --copy --incremental -o incr.lbz disk.qcow2
    expect_stderr ''
    expect_untouched disk.qcow2 run_expect 1 \
        "${as[@]}" lbdump --incremental -o never.lbz disk.qcow2
    expect_stderr 'lbdump: disk.qcow2: Permission denied'
    expect_absent never.lbz
    chmod u+w disk.qcow2
    good_archives copy.lbz incr.lbz
    now=$(content disk.qcow2)
    expect_restores "$now" copy.lbz
    expect_restores "$now" full.lbz incr.lbz

    # a branch: the next incremental has the same parent, and all changes
    qemu_write disk.qcow2 6M 100k 3
    dump next.lbz disk.qcow2 --incremental
    [ "$(header_of next.lbz .parent_uuid)" = "$(uuid_of full.lbz)" ]
    expect_restores "$(content disk.qcow2)" full.lbz next.lbz
    run_expect 3 lbverify full.lbz incr.lbz next.lbz
    expect_stderr_has 'the archives end in 2 different states'
}

@test "--level, --threads, --digest and --rate-limit change nothing in the content" {
    new_disk disk.qcow2 8M
    head -c 3000000 /dev/urandom >noise
    qemu-io -f qcow2 -c 'write -s noise 1M 2900k' \
        -c 'write -P 65 5M 1M' disk.qcow2
    now=$(content disk.qcow2)
    n=0
    for options in '--level=1 --threads=1' '--level=19 --threads=2' \
        '--threads=256' '--digest=sha256' '--rate-limit=40M'; do
        n=$((n + 1))
        # shellcheck disable=SC2086
        dump $n.lbz disk.qcow2 $options
        expect_restores "$now" $n.lbz
    done
    [ "$(stat -c %s 2.lbz)" -le "$(stat -c %s 1.lbz)" ]
    for options in --level=0 --level=20 --level=x --threads=0 --threads=257 \
        --digest=md5 --rate-limit=fast --rate-limit=-1 \
        --chain= --chain='a b' --chain=12345678901234567890123 \
        --since=no-uuid; do
        expect_untouched disk.qcow2 run_expect 2 \
            lbdump -o never.lbz "$options" disk.qcow2
        expect_stderr_has "lbdump: ${options%%=*}: '${options#*=}' is " \
            "Try 'lbdump --help'."
    done
    expect_absent never.lbz
}

@test "kinds of dumps exclude each other" {
    new_disk disk.qcow2 8M
    for options in '--incremental --auto' '--auto --overlay' \
        '--incremental --incremental' \
        '--since=11111111-2222-4333-8444-555555555555 --incremental'; do
        # shellcheck disable=SC2086
        run_expect 2 lbdump $options -o x.lbz disk.qcow2
        expect_stderr_has 'lbdump: --incremental, --since, --auto and --overlay exclude each other'
    done
    run_expect 2 lbdump -o x.lbz
    expect_stderr_has 'lbdump: one DISK is wanted, 0 given'
    run_expect 2 lbdump -o x.lbz a b
    expect_stderr_has 'lbdump: one DISK is wanted, 2 given'
}

@test "--json has all that the manual names, where it says" {
    new_disk disk.qcow2 8M
    qemu_write disk.qcow2 1M 100k 1
    run_expect 0 lbdump --json -o full.lbz disk.qcow2
    expect_stderr ''
    read -r root uuid < <(lbz root full.lbz)
    jq -e --arg uuid "$uuid" --arg root "$root" \
        --argjson bytes "$(stat -c %s full.lbz)" \
        --arg image "$(status_of disk.qcow2 .image_uuid)" '
        keys == ["archive", "archive_bytes", "checkpoint", "confirmed",
            "data_bytes", "disk", "image_uuid", "kind", "label", "parent",
            "reason", "root_digest", "seconds", "time", "uuid",
            "virtual_size", "zero_bytes"] and
        .disk == "disk.qcow2" and .archive == "full.lbz" and
        .kind == "full" and .reason == null and .uuid == $uuid and
        .parent == null and .image_uuid == $image and .label == "main" and
        .checkpoint and .confirmed and .virtual_size == 8388608 and
        .data_bytes == 131072 and .zero_bytes == 0 and
        .archive_bytes == $bytes and .root_digest == $root and
        .seconds >= 0 and (now - .time | . > -60 and . < 600)' <<<"$output"

    change disk.qcow2 'write -P 2 3M 64k' 'write -z 1M 64k'
    run_to incr.lbz 0 lbdump --json --incremental --chain=main disk.qcow2
    jq -e --arg parent "$uuid" '.archive == null and .parent == $parent and
        .kind == "incremental" and .data_bytes == 65536 and
        .zero_bytes == 3 * 65536' <<<"$stderr"
    good_archives incr.lbz
    expect_restores "$(content disk.qcow2)" full.lbz incr.lbz
}

@test "--quiet shows nothing but errors" {
    qemu-img create -q -f qcow2 disk.qcow2 8M
    run_expect 0 lbdump -q -o a.lbz disk.qcow2
    expect_stderr ''
    lbctl enable disk.qcow2
    run_expect 0 bash -c 'lbdump --quiet disk.qcow2 | cat >b.lbz'
    expect_stderr ''
    run_expect 0 lbdump -q --auto -o c.lbz disk.qcow2
    expect_stderr ''
    run_expect 3 lbdump -q --incremental --chain=other -o d.lbz disk.qcow2
    expect_stderr_has "chain 'other' has no confirmed checkpoint"
}

@test "--progress shows bytes and rate without a terminal" {
    new_disk disk.qcow2 64M
    qemu_write disk.qcow2 0 64M 1
    run_expect 0 lbdump --progress -o full.lbz disk.qcow2
    [[ "$stderr" =~ lbdump:\ read\ [0-9.]+\ [KMG]iB.*,\ [0-9.]+\ [KMG]iB/s ]]
    run_expect 0 lbdump --progress -q -o quiet.lbz disk.qcow2
    expect_stderr ''
}

@test "--auto says which and why" {
    new_disk disk.qcow2 8M
    run_expect 0 lbdump --auto --json -o 1.lbz disk.qcow2
    expect_stderr_has 'lbdump: disk.qcow2: full: ' '(no-checkpoint)'
    [ "$(jq -r .kind <<<"$output")" = full ]
    [[ "$(jq -r .reason <<<"$output")" == *'(no-checkpoint)' ]]
    qemu_write disk.qcow2 1M 64k 1
    run_expect 0 lbdump --auto --json -o 2.lbz disk.qcow2
    expect_stderr 'lbdump: disk.qcow2: incremental: the tracked changes are trusted'
    [ "$(jq -r .reason <<<"$output")" = null ]
    [ "$(jq -r .parent <<<"$output")" = "$(uuid_of 1.lbz)" ]
    run_expect 0 lbdump --auto --chain=b -o 3.lbz disk.qcow2
    expect_stderr "lbdump: disk.qcow2: full: chain 'b' has no confirmed checkpoint (no-checkpoint)"

    qemu-img bitmap --clear disk.qcow2 "lb-$(uuid_of 3.lbz)"
    run_expect 3 lbdump --incremental -o never.lbz disk.qcow2
    expect_stderr_has 'lbdump: disk.qcow2: an incremental is not possible: ' \
        '(canary); make a full dump, or use --auto'
    expect_absent never.lbz
    run_expect 0 lbdump --auto -o 4.lbz disk.qcow2
    expect_stderr_has 'lbdump: disk.qcow2: full: ' '(canary)'
    good_image disk.qcow2
    good_archives ./*.lbz
    qemu_write disk.qcow2 2M 64k 2
    run_expect 0 lbdump --auto -o 5.lbz disk.qcow2
    expect_stderr 'lbdump: disk.qcow2: incremental: the tracked changes are trusted'
    expect_restores "$(content disk.qcow2)" 4.lbz 5.lbz
}

@test "a terminal gets no archive" {
    new_disk disk.qcow2 8M
    run_expect 2 script -q -e -c 'lbdump disk.qcow2' /dev/null
    expect_output_has 'lbdump: an archive is not written to a terminal; redirect it, or use -o FILE'
    [ "$(status_of disk.qcow2 '.checkpoints | length')" = 0 ]
}

@test "an image that needs a repair is refused before it is read" {
    new_disk disk.qcow2 8M -o lazy_refcounts=on
    dump full.lbz disk.qcow2
    # as a stock QEMU leaves it that was killed
    lbext poke disk.qcow2 --set incompatible.dirty=1 \
        --set autoclear.livebackup=0
    run_to out 1 bash -c 'lbdump disk.qcow2 | wc -c; exit ${PIPESTATUS[0]}'
    expect_stderr 'lbdump: disk.qcow2: the image was not closed cleanly and its refcounts may be wrong; repair it with: qemu-img check -r all disk.qcow2'
    [ "$(cat out)" = 0 ]
    run_expect 3 lbdump --incremental -o x.lbz disk.qcow2
    expect_stderr_has '(not-closed)'
    dump copy.lbz disk.qcow2 --copy
    qemu-img check -q -f qcow2 -r all disk.qcow2
    run_expect 0 lbdump -q --auto -o again.lbz disk.qcow2
    good_image disk.qcow2
}
