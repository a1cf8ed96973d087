# Checkpoints on images of a stock QEMU: what it tracks, what it spoils, and
# what of other people stays as it is. The second implementation judges too.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers

U1=11111111-1111-4111-8111-111111111111
U2=22222222-2222-4222-8222-222222222222
U3=33333333-3333-4333-8333-333333333333

setup() {
    helpers_setup
    imagectl=$abs_top_builddir/tests/unit/imagectl
}

lbext() {
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/oracle/lbext.py" "$@"
}

# expect_trust KEYWORD IMAGE: of what changed since the oldest checkpoint, by
# both implementations.
expect_trust() {
    local ours oracle
    ours=$("$imagectl" status "$2" | jq -r '
        if .trust == "trusted" then .checkpoints[0].trust else .trust end')
    oracle=$(lbext trust "$2" | jq -r '
        if .keyword == "trusted" then .checkpoints[0].keyword
        else .keyword end')
    [ "$ours" = "$1" ] || fail "expected $1, got $ours (oracle: $oracle)"
    [ "$oracle" = "$1" ] || fail "expected $1, the oracle says $oracle"
}

# The oracle finds every "must" kept.
expect_sound() {
    run_expect 0 lbext check "$1"
}

# expect_changes IMAGE INDEX TEXT
expect_changes() {
    run_expect 0 "$imagectl" changes "$1" "$2"
    expect_output "$3"
}

make_disk() {
    qemu-img create -q -f qcow2 "$@"
    "$imagectl" enable disk.qcow2
    "$imagectl" add disk.qcow2 $U1 main
    qemu_write disk.qcow2 16M 64k
    "$imagectl" add disk.qcow2 $U2 main
    qemu_write disk.qcow2 32M 64k
    expect_trust trusted disk.qcow2
}

@test "stock QEMU tracks in the newest bitmap, granule by granule" {
    qemu-img create -q -f qcow2 disk.qcow2 1G
    "$imagectl" enable disk.qcow2
    "$imagectl" add disk.qcow2 $U1 main
    expect_sound disk.qcow2
    qemu_write disk.qcow2 100M 1M
    qemu_write disk.qcow2 530000000 1
    expect_changes disk.qcow2 0 "0 65536
104857600 1048576
529989632 65536
1073676288 65536"
    "$imagectl" add disk.qcow2 $U2 main
    qemu_write disk.qcow2 700M 4k
    expect_changes disk.qcow2 1 "0 65536
734003200 65536
1073676288 65536"
    expect_changes disk.qcow2 0 "0 65536
104857600 1048576
529989632 65536
734003200 65536
1073676288 65536"
    "$imagectl" fold disk.qcow2 1
    expect_sound disk.qcow2
    expect_changes disk.qcow2 0 "0 65536
104857600 1048576
529989632 65536
734003200 65536
1073676288 65536"
    qemu_write disk.qcow2 800M 4k
    expect_changes disk.qcow2 0 "0 65536
104857600 1048576
529989632 65536
734003200 65536
838860800 65536
1073676288 65536"
    qemu_check disk.qcow2
}

# Everything the tools do, with each width and cluster size. Other people's
# bitmaps: one with bits, one disabled, one left in use.
@test "refcount widths, cluster sizes, other people's bitmaps" {
    for options in refcount_bits={1,2,4,8,16,32,64} \
                   cluster_size={4k,8k,16k,32k,128k,256k,512k,1M,2M} \
                   cluster_size=4k,refcount_bits=64 \
                   extended_l2=on data_file=data.raw lazy_refcounts=on; do
        rm -f disk.qcow2 data.raw
        qemu-img create -q -f qcow2 -o $options disk.qcow2 300M
        qemu-img bitmap --add -g 4k disk.qcow2 one
        qemu-img bitmap --add --disable disk.qcow2 two
        qemu_write disk.qcow2 1M 8M
        lbext show disk.qcow2 | jq '[.bitmaps[] |
            select(.name | startswith("lb-") | not)]' >before
        "$imagectl" enable disk.qcow2 14
        "$imagectl" add disk.qcow2 $U1 main
        "$imagectl" add disk.qcow2 $U2 main
        expect_sound disk.qcow2
        qemu_check disk.qcow2
        lbext show disk.qcow2 | jq '[.bitmaps[] |
            select(.name | startswith("lb-") | not)]' >after
        cmp before after || fail "$options: other bitmaps changed"
        qemu_write disk.qcow2 123M 16k
        expect_changes disk.qcow2 0 "0 16384
128974848 16384
314556416 16384"
        "$imagectl" add disk.qcow2 $U3 main
        "$imagectl" confirm disk.qcow2 2
        "$imagectl" fold disk.qcow2 1
        "$imagectl" fold disk.qcow2 0
        expect_sound disk.qcow2
        qemu_check disk.qcow2
        expect_trust trusted disk.qcow2
        run_expect 0 "$imagectl" recover disk.qcow2
        expect_output "dropped 0 freed 0 cleared 0"
        "$imagectl" disable disk.qcow2
        qemu_check disk.qcow2
        lbext show disk.qcow2 | jq '[.bitmaps[]]' >after
        qemu-img info -f qcow2 --output=json disk.qcow2 >info
        [ "$(jq '."format-specific".data.bitmaps | length' info)" -eq 2 ] ||
            fail "$options: $(cat info)"
        run_expect 0 qemu-io -f qcow2 -c 'read -P 1 1M 8M' disk.qcow2
        [[ "$output" != *failed* ]] || fail "$options: $output"
    done
}

@test "33 checkpoints: the list folds" {
    qemu-img create -q -f qcow2 disk.qcow2 64M
    "$imagectl" enable disk.qcow2
    for n in $(seq 10 50); do
        "$imagectl" add disk.qcow2 ${n}111111-1111-4111-8111-111111111111 main
        [ "$n" != 10 ] || "$imagectl" confirm disk.qcow2 0
        qemu_write disk.qcow2 $((n - 9))M 64k
    done
    qemu_check disk.qcow2
    [ "$("$imagectl" status disk.qcow2 | jq '.checkpoints | length')" -eq 32 ]
    # The oldest is the newest confirmed one: it stays, with all that changed.
    [ "$("$imagectl" status disk.qcow2 | jq -r '.checkpoints[0].uuid')" = \
        10111111-1111-4111-8111-111111111111 ]
    [ "$("$imagectl" changes disk.qcow2 0 | wc -l)" -eq 43 ]
    "$imagectl" fold disk.qcow2 0
    expect_sound disk.qcow2
    qemu_check disk.qcow2
}

@test "growth is a change, as is the granule of the old end" {
    make_disk disk.qcow2 $((64 * 1024 * 1024 + 512))
    qemu-img resize -q -f qcow2 disk.qcow2 80M
    expect_changes disk.qcow2 1 "0 65536
33554432 65536
67108864 16777216"
    [ "$(lbext changed disk.qcow2 $U2 | jq -c .)" = \
        "[[0,65536],[33554432,65536],[67108864,16777216]]" ]
}

@test "shrunk by a stock program: canary" {
    make_disk disk.qcow2 64M
    qemu-img resize -q --shrink -f qcow2 disk.qcow2 48M
    expect_trust canary disk.qcow2
    qemu-img resize -q -f qcow2 disk.qcow2 64M
    expect_trust canary disk.qcow2
    run_expect 3 "$imagectl" add disk.qcow2 $U3 main
    expect_stderr_has canary
    "$imagectl" add-drop disk.qcow2 $U3 main
    expect_sound disk.qcow2
    qemu_check disk.qcow2
    expect_trust trusted disk.qcow2
}

@test "cleared, removed, disabled, enabled, killed: named, dropped by recover" {
    make_disk disk.qcow2 64M
    for spoil in "canary --clear lb-$U1" "bitmap-missing --remove lb-$U1" \
                 "bitmap-disabled --disable lb-$U2" \
                 "bitmap-disabled --enable lb-$U1" \
                 "unlisted-bitmap --add lb-$U3"; do
        read -r keyword verb name <<<"$spoil"
        cp disk.qcow2 spoilt.qcow2
        qemu-img bitmap $verb spoilt.qcow2 "$name"
        expect_trust "$keyword" spoilt.qcow2
        run_expect 3 "$imagectl" changes spoilt.qcow2 0
        expect_stderr_has "$keyword"
        run_expect 3 "$imagectl" fold spoilt.qcow2 1
        run_expect 3 "$imagectl" add spoilt.qcow2 $U3 main
        run_expect 0 "$imagectl" recover spoilt.qcow2
        [[ "$output" != "dropped 0 "* ]] || fail "$spoil: $output"
        expect_sound spoilt.qcow2
        qemu_check spoilt.qcow2
    done
    # A QEMU that is killed while it has the image open.
    cp disk.qcow2 spoilt.qcow2
    qemu-io -f qcow2 -c 'write 1M 64k' -c abort spoilt.qcow2 \
        >/dev/null 2>&1 || true
    expect_trust in-use spoilt.qcow2
    # A confirm must not make it look well.
    "$imagectl" confirm spoilt.qcow2 0
    expect_trust in-use spoilt.qcow2
    "$imagectl" fold spoilt.qcow2 0
    expect_trust in-use spoilt.qcow2
    run_expect 0 "$imagectl" recover spoilt.qcow2
    expect_output "dropped 1 freed 0 cleared 0"
    qemu_check spoilt.qcow2
}

@test "what rules 5 to 13 reject is not made to look well" {
    qemu-img create -q -f qcow2 base.qcow2 64M
    make_disk -b base.qcow2 -F qcow2 disk.qcow2
    cp disk.qcow2 good.qcow2
    qemu_write base.qcow2 0 64k
    expect_trust backing-modified disk.qcow2
    run_expect 3 "$imagectl" confirm disk.qcow2 0
    run_expect 3 "$imagectl" fold disk.qcow2 0
    run_expect 3 "$imagectl" add disk.qcow2 $U3 main
    expect_trust backing-modified disk.qcow2
    cmp <(head -c 4096 disk.qcow2) <(head -c 4096 good.qcow2)
    mv base.qcow2 away.qcow2
    expect_trust backing-modified disk.qcow2
    mv away.qcow2 base.qcow2
    "$imagectl" add-drop disk.qcow2 $U3 main
    expect_trust trusted disk.qcow2
    expect_sound disk.qcow2
    cp base.qcow2 other.qcow2
    qemu-img rebase -u -F qcow2 -b other.qcow2 disk.qcow2
    expect_trust backing-changed disk.qcow2
    run_expect 0 "$imagectl" recover disk.qcow2
    expect_sound disk.qcow2
    qemu_check disk.qcow2
}

# A program that knows no bitmaps may have given their clusters away.
@test "bitmaps that were dropped are not freed, but counted again" {
    make_disk disk.qcow2 64M
    lbext poke disk.qcow2 --set autoclear.bitmaps=0 \
        --set autoclear.livebackup=0
    expect_trust bitmaps-dropped disk.qcow2
    cp disk.qcow2 recovered.qcow2
    "$imagectl" add-drop disk.qcow2 $U3 main
    expect_trust trusted disk.qcow2
    run qemu-img check -f qcow2 disk.qcow2
    [ "$status" -eq 3 ]
    run_expect 0 "$imagectl" recover disk.qcow2
    expect_sound disk.qcow2
    qemu_check disk.qcow2
    run_expect 0 "$imagectl" recover recovered.qcow2
    qemu_check recovered.qcow2
    expect_sound recovered.qcow2
}

@test "recover counts what snapshots, compression and preallocation refer to" {
    head -c 20M /dev/urandom >noise
    yes content | head -c 20M >text
    cat noise text noise text >raw
    for options in cluster_size=4k cluster_size=64k cluster_size=2M \
                   extended_l2=on compression_type=zstd refcount_bits=64; do
        rm -f disk.qcow2
        qemu-img convert -f raw -O qcow2 -c -o $options raw disk.qcow2
        qemu-img snapshot -c one disk.qcow2
        qemu-io -f qcow2 -c 'write -P 5 1M 3M' -c 'write -z 6M 3M' \
            disk.qcow2 >/dev/null
        qemu-img snapshot -c two disk.qcow2
        qemu-io -f qcow2 -c 'write -P 6 2M 3M' disk.qcow2 >/dev/null
        "$imagectl" enable disk.qcow2
        "$imagectl" add disk.qcow2 $U1 main
        run_expect 0 "$imagectl" recover disk.qcow2
        expect_output "dropped 0 freed 0 cleared 0"
        qemu_check disk.qcow2
    done
    for allocation in metadata falloc full; do
        rm -f disk.qcow2
        qemu-img create -q -f qcow2 -o preallocation=$allocation disk.qcow2 40M
        run_expect 0 "$imagectl" recover disk.qcow2
        expect_output "dropped 0 freed 0 cleared 0"
        qemu_check disk.qcow2
    done
}

@test "enable says what is in the way" {
    qemu-img create -q -f qcow2 -o compat=0.10 disk.qcow2 64M
    run_expect 2 "$imagectl" enable disk.qcow2
    expect_stderr_has "qemu-img amend" "compat=1.1"
    qemu-img amend -f qcow2 -o compat=1.1 disk.qcow2
    run_expect 0 "$imagectl" enable disk.qcow2
    run_expect 2 "$imagectl" enable disk.qcow2
    expect_stderr_has "on already"
    qemu-img create -q -f qcow2 -o cluster_size=2k disk.qcow2 64M
    run_expect 2 "$imagectl" enable disk.qcow2
    expect_stderr_has "4096 bytes or more, the image has 2048"
    qemu-img create -q -f qcow2 disk.qcow2 64T
    run_expect 2 "$imagectl" enable disk.qcow2
    expect_stderr_has "granularity"
    run_expect 0 "$imagectl" enable disk.qcow2 17
    run_expect 2 "$imagectl" enable disk.qcow2 32
}

@test "an image that is marked dirty is not written" {
    qemu-img create -q -f qcow2 -o lazy_refcounts=on disk.qcow2 64M
    "$imagectl" enable disk.qcow2
    "$imagectl" add disk.qcow2 $U1 main
    qemu-io -f qcow2 -c 'write 1M 64k' -c abort disk.qcow2 >/dev/null 2>&1 ||
        true
    expect_trust not-closed disk.qcow2
    cp disk.qcow2 before
    for verb in disable recover "add-drop" "confirm" "fold"; do
        case $verb in
            add*) arguments="$U2 main" ;;
            confirm|fold) arguments=0 ;;
            *) arguments= ;;
        esac
        run_expect 1 "$imagectl" $verb disk.qcow2 $arguments
        expect_stderr_has "qemu-img check -r all disk.qcow2"
    done
    cmp disk.qcow2 before
}

@test "adding a checkpoint to a disk of 10 TiB writes little" {
    qemu-img create -q -f qcow2 disk.qcow2 10T
    "$imagectl" enable disk.qcow2
    "$imagectl" add disk.qcow2 $U1 main
    before=$(stat -c %s disk.qcow2)
    "$imagectl" add disk.qcow2 $U2 main
    # two data clusters, a table, a directory
    [ $(($(stat -c %s disk.qcow2) - before)) -le $((4 * 65536)) ]
    qemu_check disk.qcow2
    expect_changes disk.qcow2 0 "0 65536
10995116212224 65536"
}
