# lbdump --map=json: what has changed, for other programs.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

extents() {
    jq -c '.extents[] | [.start, .length, .type]' <<<"$output"
}

@test "the extents, since the newest checkpoint and since an older one" {
    new_disk disk.qcow2 20M
    change disk.qcow2 'write -P 1 0 10M'
    dump 0.lbz disk.qcow2
    change disk.qcow2 'write -P 2 3M 100k'
    dump 1.lbz disk.qcow2 --incremental
    change disk.qcow2 'write -z -u 5M 1M' 'write -P 3 6M 64k'
    expect_untouched disk.qcow2 run_expect 0 lbdump --map json disk.qcow2
    expect_stderr ''
    [ "$(jq -c '[.disk, .since, .virtual_size, .since_size]' <<<"$output")" = \
        "[\"disk.qcow2\",\"$(uuid_of 1.lbz)\",20971520,20971520]" ]
    # both ends are always in it: the canaries
    [ "$(extents)" = '[0,65536,"data"]
[5242880,1048576,"zero"]
[6291456,65536,"data"]
[20905984,65536,"zero"]' ]
    expect_untouched disk.qcow2 run_expect 0 lbdump --map=json \
        --since="$(uuid_of 0.lbz)" disk.qcow2
    [ "$(extents)" = '[0,65536,"data"]
[3145728,131072,"data"]
[5242880,1048576,"zero"]
[6291456,65536,"data"]
[20905984,65536,"zero"]' ]
}

@test "a copy that follows the map is the disk" {
    new_disk disk.qcow2 20M
    change disk.qcow2 'write -P 1 0 10M'
    dump 0.lbz disk.qcow2
    qemu-img convert -O raw disk.qcow2 copy.raw
    change disk.qcow2 'write -P 2 3M 100k' 'write -z 5M 1M' 'discard 9M 1M'
    qemu-img resize -q -f qcow2 disk.qcow2 25M
    change disk.qcow2 'write -P 7 24M 1M'
    qemu-img convert -O raw disk.qcow2 now.raw
    run_expect 0 lbdump --map=json disk.qcow2
    truncate -s "$(jq .virtual_size <<<"$output")" copy.raw
    while read -r start length type; do
        from=now.raw
        [ "$type" = data ] || from=/dev/zero
        dd if=$from of=copy.raw bs=64k conv=notrunc status=none \
            iflag=skip_bytes,count_bytes oflag=seek_bytes \
            skip="$start" seek="$start" count="$length"
    done < <(jq -r '.extents[] | "\(.start) \(.length) \(.type)"' \
        <<<"$output")
    cmp copy.raw now.raw
}

@test "without trust: status 3, and no map" {
    new_disk disk.qcow2 20M
    dump 0.lbz disk.qcow2
    lbext poke disk.qcow2 --set flags=0 --set device=77 \
        --set boot_id=11111111-1111-4111-8111-111111111111
    expect_untouched disk.qcow2 run_expect 3 lbdump --map=json disk.qcow2
    expect_output ''
    expect_stderr_has '(power-loss)'
}

@test "what does not go with --map" {
    run_expect 2 lbdump --map=xml disk.qcow2
    expect_stderr_has "--map: json is wanted, not 'xml'"
    run_expect 2 lbdump --map=json --auto disk.qcow2
    expect_stderr_has '--map makes no dump; it goes with --since and --chain alone'
}
