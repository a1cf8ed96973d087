# nbdkit-lbz-plugin: a chain of archives as a disk.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

setup() {
    helpers_setup
    plugin=$abs_top_builddir/nbdkit/.libs/nbdkit-lbz-plugin.so
    # A plugin that was built with a sanitizer wants it in nbdkit.
    sanitizer=$(ldd "$plugin" | sed -n 's/.*=> \(.*libasan[^ ]*\) .*/\1/p')
}

# lbz_kit ARGUMENT...: nbdkit with the plugin. What it runs is without the
# sanitizer, under which QEMU's coroutines hang.
lbz_kit() {
    local arguments=() argument before=
    for argument; do
        [ "$before" != --run ] || argument="unset LD_PRELOAD; $argument"
        arguments+=("$argument")
        before=$argument
    done
    LD_PRELOAD=$sanitizer ASAN_OPTIONS=detect_leaks=0 timeout 120 \
        nbdkit -U - --log=stderr "$plugin" "${arguments[@]}"
}

# expect_disk RAW ARGUMENT...: what the plugin serves is that, for several that
# read at once, for one that asks for extents, and for QEMU.
expect_disk() {
    local raw=$1
    shift
    rm -f copied.raw converted.raw
    run_expect 0 lbz_kit "$@" --run '
        [ "$(nbdinfo --size "$uri")" = '"$(stat -c %s "$raw")"' ] &&
        nbdcopy --connections=4 "$uri" copied.raw &&
        qemu-img convert -f raw -O raw "$uri" converted.raw'
    cmp copied.raw "$raw"
    cmp converted.raw "$raw"
}

# history: disk.qcow2, and a chain of seven archives in c/; n.raw is what the
# oracle restores from the first n.
history() {
    local step
    mkdir c
    new_disk disk.qcow2 600M
    change disk.qcow2 'write -P 1 0 3M' 'write -P 2 290M 5M' \
        'write -P 3 599M 1M'
    dump c/0.lbz disk.qcow2
    for step in 1 2 3 4 5 6; do
        change disk.qcow2 "write -P 1$step ${step}M 70k" "write -z 29${step}M 200k" \
            "write -P 2$step $((step * 45))M 64k"
        case $step in
            3) qemu-img resize -q disk.qcow2 700000768 ;;
            5) qemu-img resize -q disk.qcow2 800M ;;
        esac
        dump c/$step.lbz disk.qcow2 --incremental
    done
}

# ------------------------------------------------------------------ it serves

@test "every point of a chain, byte for byte" {
    history
    for n in 0 2 3 4 6; do
        archives=(c/[0-$n].lbz)
        lbz restore -o oracle.raw "${archives[@]}"
        run_expect 0 lbrestore --quiet --force -o ours.raw "${archives[@]}"
        cmp ours.raw oracle.raw
        expect_disk oracle.raw "${archives[@]}"
    done
    qemu-img convert -f qcow2 -O raw disk.qcow2 disk.raw
    cmp oracle.raw disk.raw
    # any order, and one that isn't the newest
    lbz restore -o oracle.raw c/0.lbz c/1.lbz
    uuid=$(lbverify --receipt c/1.lbz | cut -d' ' -f1)
    expect_disk oracle.raw c/3.lbz c/0.lbz c/2.lbz c/1.lbz "at=$uuid"
}

@test "with the least memory, and with more than the disk has" {
    "$ORACLE_PYTHON" -c 'import random, sys
sys.stdout.buffer.write(random.Random(7).randbytes(100 << 20))' >random.raw
    qemu-img convert -f raw -O qcow2 random.raw disk.qcow2
    run_expect 0 lbctl enable disk.qcow2
    dump base.lbz disk.qcow2
    for cache in 32M 1G; do
        expect_disk random.raw base.lbz "cache=$cache"
    done
    # pages and frames, the decoders, and what nbdkit itself has
    "$ORACLE_PYTHON" -c 'import random
for at in random.Random(8).sample(range(100 << 8), 400):
    print(f"aio_read -q {at << 12} 4k")
print("aio_flush")' >reads
    for load in 'nbdcopy --connections=4 "$uri" null:' \
        'qemu-io -r -f raw "$uri" <reads >/dev/null'; do
        run_expect 0 lbz_kit base.lbz cache=32M -f -P pid --run "$load"' &&
            grep VmHWM "/proc/$(cat pid)/status"'
        if [ -z "$sanitizer" ]; then
            kib=$(grep -o '[0-9]* kB' <<<"$output" | cut -d' ' -f1)
            [ "$kib" -lt $(((32 + 24) << 10)) ] || fail "$load: $output"
        fi
    done
}

@test "what is zero is told, and the disk may be huge" {
    new_disk disk.qcow2 1T
    change disk.qcow2 'write -P 1 1M 64k' 'write -P 2 1000G 1M'
    dump base.lbz disk.qcow2
    run_expect 0 lbz_kit base.lbz --run 'nbdinfo --map --json "$uri"'
    [ "$(jq -c '.[] | [.offset, .length, .type]' <<<"$output")" = \
'[0,1048576,3]
[1048576,65536,0]
[1114112,1073740709888,3]
[1073741824000,1048576,0]
[1073742872576,25768755200,3]' ]
}

@test "a file system in it is read, and with cow written" {
    truncate -s 64M fs.raw
    mkdir files
    seq 100000 >files/numbers
    mkfs.ext4 -q -d files fs.raw
    qemu-img convert -f raw -O qcow2 fs.raw disk.qcow2
    run_expect 0 lbctl enable disk.qcow2
    dump base.lbz disk.qcow2
    run_expect 0 lbz_kit base.lbz --run 'nbdcopy "$uri" served.raw'
    run_expect 0 e2fsck -fn served.raw
    run_expect 0 debugfs -R 'cat numbers' served.raw
    [ "$output" = "$(seq 100000)" ]
    run_expect 0 lbz_kit --filter=cow base.lbz --run '
        qemu-io -f raw -c "write -P 9 1M 100k" -c "read -P 9 1M 100k" "$uri"'
    [[ "$output" != *failed* ]]
    lbz verify base.lbz
}

@test "frames of another size are as good, and told by the archive alone" {
    history
    mv disk.qcow2 d.qcow2
    for size in 64K 128K 192K; do
        run_expect 0 lbdump -q --copy --frame=$size --force -o f.lbz d.qcow2
        good_archives f.lbz
        [ "$(lbz dump f.lbz | jq '[.pages[].frames[].blocks] | max')" -eq \
            $((${size%K} / 64)) ]
        lbz restore -o oracle.raw f.lbz
        qemu-img convert -f qcow2 -O raw d.qcow2 d.raw
        cmp oracle.raw d.raw
        expect_disk oracle.raw f.lbz
    done
    for size in 0 32K 100K 2M; do
        run_expect 2 lbdump --frame=$size -o f.lbz d.qcow2
        expect_stderr_has "--frame: '$size' is no multiple of 64K up to 1M"
    done
}

@test "sha256 as the digest" {
    new_disk disk.qcow2 20M
    change disk.qcow2 'write -P 1 1M 3M'
    dump base.lbz disk.qcow2 --digest=sha256
    lbz restore -o oracle.raw base.lbz
    expect_disk oracle.raw base.lbz
}

# ------------------------------------------------------------------- it fails

@test "damage is an error where it is, and nowhere else" {
    new_disk disk.qcow2 20M
    change disk.qcow2 'write -P 1 0 1M' 'write -P 2 5M 1M' 'write -P 3 9M 1M'
    dump base.lbz disk.qcow2
    # a byte within the second frame's compressed bytes
    at=$(lbz structures base.lbz |
         jq '[.[] | select(.name | test("frame"; "i")) | .offset + .length] | .[1] - 3')
    flip base.lbz "$at"
    run_expect 0 lbz_kit base.lbz --run '
        qemu-io -r -f raw -c "read -P 1 0 1M" -c "read -P 3 9M 1M" \
            -c "read -P 0 12M 1M" "$uri" && ! qemu-io -r -f raw -c "read 5M 4k" "$uri"'
    [[ "$output" != *'verification failed'* ]]
    [[ "$output" == *'read failed: Input/output error'* ]]
    [[ "$stderr" == *"base.lbz: "* ]] || fail "$stderr"
    [[ "$stderr" == *0x500000-0x5fffff* ]] || fail "$stderr"
}

@test "a damaged index page is an error for its range alone" {
    new_disk disk.qcow2 900M
    change disk.qcow2 'write -P 1 300M 1M' 'write -P 2 800M 1M'
    dump base.lbz disk.qcow2
    # the first page of the index is of 256M to 512M
    at=$(lbz structures base.lbz |
         jq '.[] | select(.name == "page[0].digest") | .offset')
    flip base.lbz "$at"
    run_expect 0 lbz_kit base.lbz --run '
        qemu-io -r -f raw -c "read -P 0 0 1M" -c "read -P 0 255M 1M" \
            -c "read -P 0 512M 1M" -c "read -P 2 800M 1M" "$uri" &&
        ! qemu-io -r -f raw -c "read 300M 4k" "$uri" &&
        ! qemu-io -r -f raw -c "read 256M 4k" "$uri"'
    [[ "$output" != *'verification failed'* ]]
    [ "$(grep -c 'read failed: Input/output error' <<<"$output")" = 2 ]
    [[ "$stderr" == *"base.lbz: "*0x10000000* ]] || fail "$stderr"
}

@test "an archive that is cut while it is served; one that is removed" {
    new_disk disk.qcow2 20M
    change disk.qcow2 'write -P 1 0 1M' 'write -P 2 15M 1M'
    dump base.lbz disk.qcow2
    cp base.lbz cut.lbz
    run_expect 0 lbz_kit cut.lbz --run '
        qemu-io -r -f raw -c "read -P 1 0 4k" "$uri" && : >cut.lbz &&
        ! qemu-io -r -f raw -c "read -P 2 15M 4k" "$uri"'
    [[ "$output" == *'read failed: Input/output error'* ]]
    run_expect 0 lbz_kit base.lbz --run '
        rm base.lbz && qemu-io -r -f raw -c "read -P 2 15M 1M" "$uri"'
    [[ "$output" != *failed* ]]
}

@test "no chain, no archive, no such parameter" {
    history
    run_expect 1 lbz_kit c/0.lbz c/2.lbz --run true
    expect_stderr_has 'its parent'
    run_expect 1 lbz_kit c/1.lbz --run true
    expect_stderr_has 'is not among the archives given'
    run_expect 1 lbz_kit disk.qcow2 --run true
    expect_stderr_has 'not an lbz archive'
    # nbdkit itself says it; it does not get to its end under a sanitizer
    if [ -z "$sanitizer" ]; then
        run_expect 1 lbz_kit missing.lbz --run true
        expect_stderr_has 'missing.lbz: No such file or directory'
    fi
    run_expect 1 lbz_kit --run true
    expect_stderr_has 'no archive is given: nbdkit lbz BASE.lbz INCR.lbz...'
    run_expect 1 lbz_kit c/0.lbz at=x --run true
    expect_stderr_has 'at=x: is no UUID'
    run_expect 1 lbz_kit c/0.lbz cache=1M --run true
    expect_stderr_has 'cache=1M: at least 32M are wanted'
    run_expect 1 lbz_kit c/0.lbz other=1 --run true
    expect_stderr_has "unknown parameter 'other'"
}
