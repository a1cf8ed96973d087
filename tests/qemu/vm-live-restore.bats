# lbvm restore --live: a machine runs on its backup, and has its disks whole in the
# end, whoever is killed meanwhile; and nothing that isn't whole looks so.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load qemu
load ../cli/backup
load ../cli/vm
load machine

setup() {
    machine_setup
    plugin=$abs_top_builddir/nbdkit/.libs/nbdkit-lbz-plugin.so
    export LBVM_NBDKIT_PLUGIN=$plugin
    # A plugin that was built with a sanitizer wants it in nbdkit.
    sanitizer=$(ldd "$plugin" | sed -n 's/.*=> \(.*libasan[^ ]*\) .*/\1/p')
}

teardown() {
    machine_teardown
}

# two_backups: of web1; in NAME.model is what the disks are at the second.
two_backups() {
    local disk
    head -c 3M /dev/urandom >noise
    for disk in vda vdb; do
        new_disk $disk.qcow2 24M
        change $disk.qcow2 'write -s noise 1M 3M' 'write -P 1 12M 1M'
    done
    run_expect 0 lbvm backup -q web1 vda.qcow2 vdb.qcow2
    change vda.qcow2 'write -P 2 2M 100k' 'write -P 3 20M 1M' 'write -z 12M 64k'
    change vdb.qcow2 'write -P 4 0 300k'
    run_expect 0 lbvm backup -q web1 vda.qcow2 vdb.qcow2
    mapfile -t ids < <(lbvm list --json web1 | jq -r '.backups[].id')
    for disk in vda vdb; do
        qemu-img convert -f qcow2 -O raw $disk.qcow2 $disk.model
        rm $disk.qcow2
    done
}

# serve [OPTION]...: lbvm, until the machine can be started.
serve() {
    rm -f live.out
    LD_PRELOAD=$sanitizer ASAN_OPTIONS=detect_leaks=0 \
        lbvm restore --live -o r "$@" web1 >live.out 2>live.err </dev/null 3>&- 4>&- &
    echo $! >live.pid
    await is_served || fail "nothing is served:" "$(cat live.out live.err)"
}

is_served() {
    grep -q 'can be started' live.out || ended live
}

# served_ends STATUS: by itself, or by the signal that it was sent.
served_ends() {
    local status=0
    wait "$(<live.pid)" || status=$?
    rm live.pid
    stderr=$(<live.err) output=$(<live.out)
    [ "$status" = "$1" ] || fail "lbvm ends with $status:" "$stderr"
}

# start: the machine, which stands still; the monitor writes as the guest would.
start() {
    launch qemu -S -m 32 -object iothread,id=io \
        -drive if=none,id=vda,format=qcow2,file=r/vda.qcow2 \
        -device virtio-blk-pci,drive=vda,share-rw=on,id=dev-vda \
        -blockdev driver=qcow2,node-name=vdb,discard=unmap,file.driver=file,file.filename="$PWD/r/vdb.qcow2" \
        -device virtio-blk-pci,drive=vdb,share-rw=on,iothread=io,id=dev-vdb
}

# guest DISK COMMAND...: of qemu-io, and on the model of the disk.
guest() {
    local command said
    for command in "${@:2}"; do
        said=$(ask qemu human-monitor-command "$(jq -nc --arg line \
            "qemu-io -d /machine/peripheral/dev-$1/virtio-backend \"$command\"" \
            '{"command-line": $line}')")
        [ "$said" = '""' ] || fail "$command: $said"
        ! grep -q failed qemu.out || fail "$command: $(cat qemu.out)"
        qemu-io -f raw -c "$command" "$1.model" >/dev/null
    done
}

# said TEXT: by the lbvm that serves.
said() {
    grep -qF -- "$1" live.err
}

# expect_whole KIND: the disks are what they were, and what the guest wrote; nothing
# is left of the restore, and the next backup is right, and of that kind.
expect_whole() {
    local disk
    [ "$(ls -A r)" = 'vda.qcow2
vdb.qcow2' ] || fail "$(ls -A r)"
    for disk in vda vdb; do
        [ "$(qemu-img info --output=json r/$disk.qcow2 |
            jq -r '."backing-filename"')" = null ]
        qemu_check r/$disk.qcow2
        qemu-img compare -q -f raw -F qcow2 $disk.model r/$disk.qcow2
    done
    run_expect 0 lbvm backup -q web1 r/vda.qcow2 r/vdb.qcow2
    [ "$(kinds)" = "$1 $1" ]
    rm -rf again
    run_expect 0 lbvm restore -q -o again web1
    for disk in vda vdb; do
        qemu-img compare -q -f raw -F qcow2 $disk.model again/$disk.qcow2
    done
}

# expect_unfinished: while they are served, the disks are what they are to be.
expect_unfinished() {
    local disk
    for disk in vda vdb; do
        qemu-img info -U --output=json r/$disk.qcow2 |
            jq -r '."backing-filename"' | grep -q '\.lbvm-live/[01]"'
        qemu-img compare -U -q -f raw -F qcow2 $disk.model r/$disk.qcow2
    done
}

# ------------------------------------------------------------------ it comes back

@test "the guest writes from the first second, and the disks are whole in the end" {
    with_each comes_back patched stock stock-10
}

comes_back() {
    use "$1"
    two_backups
    serve --qmp=s/qemu
    [ "$(<live.out)" = "web1: vda: r/vda.qcow2
web1: vdb: r/vdb.qcow2
web1: ${ids[1]}: served; the machine can be started" ]
    start
    guest vda 'write -P 5 3M 1M' 'write -z 20M 100k' 'write -P 6 23M 1M'
    guest vdb 'write -P 7 100k 1000k' 'discard 12M 128k'
    served_ends 0
    expect_stderr ''
    [ "$(sort live.out)" = "web1: ${ids[1]}: 2 disks restored
web1: ${ids[1]}: served; the machine can be started
web1: vda: r/vda.qcow2
web1: vda: whole
web1: vdb: r/vdb.qcow2
web1: vdb: whole" ] || fail "$output"
    [ "$(ask qemu query-jobs)" = '[]' ]
    guest vda 'write -P 8 5M 100k'
    quit_machine qemu
    expect_whole incremental
}

# ------------------------------------------------------------------ kills

@test "lbvm, nbdkit and QEMU are killed, one by one and all: it goes on" {
    with_each goes_on patched stock stock-10
}

goes_on() {
    use "$1"
    two_backups
    serve --qmp=s/qemu --rate-limit=64K
    start
    guest vda 'write -P 5 3M 64k'
    await streams vda
    # what serves: QEMU waits for its successor
    kill -KILL "$(pgrep -f "^nbdkit .*$PWD/r/.lbvm-live/0 ")"
    await said "disk 'vda': nbdkit was killed by signal 9; starting it again"
    guest vda 'write -P 6 2000k 100'
    # QEMU: what the guest wrote and had flushed stays
    guest vda 'flush'
    guest vdb 'write -P 7 8M 1M' 'flush'
    kill_machine qemu
    expect_unfinished
    start
    guest vdb 'write -P 8 11M 1100k'
    await streams vdb
    # lbvm, and with it what serves
    kill_machine live
    [ "$(qemu-img info -U --output=json r/vda.qcow2 |
        jq -r '."backing-filename-format"')" = raw ]
    serve --qmp=s/qemu --rate-limit=64K
    guest vda 'write -P 9 1M 70k' 'flush'
    guest vdb 'flush'
    # all
    kill_machine live
    kill_machine qemu
    serve --qmp=s/qemu
    expect_unfinished
    start
    served_ends 0
    quit_machine qemu
    # QEMU was killed, so that its bitmaps are not trusted
    expect_whole full
}

# streams DISK: its job has begun.
streams() {
    local number=0
    [ "$1" = vda ] || number=1
    [ "$(ask qemu query-jobs | jq "[.[] | select(.id == \"lbvm-restore-$number\" and
        .\"current-progress\" > 0)] | length")" = 1 ]
}

@test "lbvm is killed when QEMU has done any of its commands: another goes on" {
    use patched
    two_backups
    folder=$(mktemp -d /tmp/lbvm.XXXXXX)
    ln -s "$folder" s
    cp vda.model vda.first
    cp vdb.model vdb.first
    for command in qmp_capabilities query-jobs query-named-block-nodes \
        block-stream human-monitor-command job-finalize; do
        rm -rf r
        cp vda.first vda.model
        cp vdb.first vdb.model
        serve
        kill_machine live
        serve --qmp=s/proxy
        start
        guest vda 'write -P 5 3M 1M'
        "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/cli/qmpproxy.py" s/proxy s/qemu \
            $command kill live.pid >commands 2>proxy.err </dev/null 3>&- 4>&-
        served_ends $((128 + 9))
        serve --qmp=s/qemu
        guest vdb 'write -P 6 12M 100k'
        served_ends 0
        [ "$(ask qemu query-jobs)" = '[]' ]
        quit_machine qemu
        expect_all_there
    done
}

expect_all_there() {
    for disk in vda vdb; do
        [ "$(qemu-img info --output=json r/$disk.qcow2 |
            jq -r '."backing-filename"')" = null ]
        qemu-img compare -q -f raw -F qcow2 $disk.model r/$disk.qcow2
    done
}

# ------------------------------------------------------------------ what it is not

@test "what is not whole is no disk to others" {
    use stock
    two_backups
    serve
    [ "$(stat -c %a r/.lbvm-live)" = 700 ]
    run_expect 5 lbvm restore --live -o r web1
    expect_stderr "lbvm: $PWD/r/.lbvm-live: another lbvm serves the disks of this folder"
    run_expect 5 lbvm prune --keep-last=1 web1
    expect_unfinished
    for at in served killed; do
        run_expect 1 lbdump -o x.lbz r/vda.qcow2
        expect_stderr_has "lbdump: r/vda.qcow2: " "json:"
        run_expect 1 lbvm backup web1 r/vda.qcow2
        expect_stderr_has 'json:'
        [ ! -e x.lbz ]
        [ "$(n_backups)" = 2 ]
        [ $at = killed ] || kill_machine live
    done
    run_expect 1 qemu-img convert -f qcow2 -O raw r/vda.qcow2 x
    run_expect 1 lbvm restore -o r web1
    expect_stderr 'lbvm: r/vda.qcow2: already exists; --force replaces it'
}

@test "it goes on with its own backup, not with a newer one, or not at all" {
    use stock
    two_backups
    serve
    kill_machine live
    sha256sum r/*.qcow2 >before
    new_disk vda.qcow2 24M
    run_expect 0 lbvm backup -q web1 vda.qcow2
    serve
    [ "$(tail -n 1 live.out)" = "web1: ${ids[1]}: served; the machine can be started" ]
    expect_unfinished
    kill "$(<live.pid)"
    served_ends 1
    expect_stderr 'lbvm: interrupted: 2 disks are unfinished; the same command goes on'
    # another one is asked for
    run_expect 1 lbvm restore --live -o r web1 "${ids[0]}"
    expect_stderr "lbvm: r: a restore of web1 ${ids[1]} was begun there, and is not finished"
    # a disk is gone
    mv r/vdb.qcow2 kept
    run_expect 1 lbvm restore --live -o r web1
    expect_stderr_has 'r/vdb.qcow2: is gone, and with it what the guest has written'
    mv kept r/vdb.qcow2
    # it is another one
    mv r/vda.qcow2 kept
    qemu-img create -q -f qcow2 -F raw -b "$PWD/vda.model" r/vda.qcow2
    run_expect 1 lbvm restore --live -o r web1
    expect_stderr_has 'r/vda.qcow2: its backing file is ' 'and not what is served here'
    mv kept r/vda.qcow2
    run_expect 0 lbvm prune -q --keep-last=1 web1
    run_expect 3 lbvm restore --live -o r web1
    expect_stderr_has "r: the disks there can't be finished without that backup"
    sha256sum --quiet -c before
}

@test "a damaged archive: the rest is served, and the disk is not finished" {
    use stock
    two_backups
    folder=$(mktemp -d /tmp/lbvm.XXXXXX)
    ln -s "$folder" s
    archive=$(archive_of 1 vda)
    flip "$archive" $(($(lbz structures "$archive" |
        jq -e '.[] | select(.name == "frame[0]").offset') + 12))
    serve --qmp=s/qemu
    start
    await said "disk 'vda': streaming has failed: an I/O error; it is served on"
    said "disk 'vda': $PWD/$archive: damaged at offset "
    await grep -q 'vdb: whole' live.out
    guest vda 'write -P 5 20M 1M'
    [ "$(ask qemu query-jobs)" = '[]' ]
    kill "$(<live.pid)"
    served_ends 4
    expect_stderr_has "lbvm: r/vda.qcow2: unfinished, and can't be finished: an archive is damaged"
    quit_machine qemu
    serve
    # from 16M on nothing is damaged
    qemu-img convert -U --image-opts driver=raw,offset=16M,file.driver=qcow2,file.file.filename=r/vda.qcow2 \
        -O raw x
    cmp x <(tail -c +$(((16 << 20) + 1)) vda.model)
    kill "$(<live.pid)"
    served_ends 1
}

@test "another program streams: a disk counts as whole when it is all in the file" {
    use stock
    two_backups
    folder=$(mktemp -d /tmp/lbvm.XXXXXX)
    ln -s "$folder" s
    serve --disk=vda
    launch qemu -S -m 32 -drive if=none,id=vda,format=qcow2,file=r/vda.qcow2 \
        -device virtio-blk-pci,drive=vda,share-rw=on,id=dev-vda
    ask qemu block-stream '{device: "vda", "job-id": "own"}'
    await said "r/vda.qcow2: has no backing file any more, but what is at "
    ! grep -q whole live.out
    guest vda flush
    served_ends 0
    quit_machine qemu
    qemu-img compare -q -f raw -F qcow2 vda.model r/vda.qcow2
}

@test "long zeroes are zeroes in the disk at once, and not asked for" {
    new_disk vda.qcow2 1100M
    change vda.qcow2 'write -P 1 600M 64k'
    run_expect 0 lbvm backup -q web1 vda.qcow2
    change vda.qcow2 'write -P 2 700M 64k' 'write -z 600M 64k'
    run_expect 0 lbvm backup -q web1 vda.qcow2
    serve
    qemu-img map -U -f qcow2 --output=json r/vda.qcow2 |
        jq -r '.[] | select(.depth == 0) |
            "\(.start / 1048576) \(.length / 1048576) \(.zero)"' >map
    # an archive always has the first and the last block
    [ "$(<map)" = "256 256 true
768 256 true" ] || fail "$(<map)"
    qemu-img compare -U -q -f qcow2 -F qcow2 vda.qcow2 r/vda.qcow2
    kill "$(<live.pid)"
    served_ends 1
}

@test "what can't be served is told, and leaves nothing" {
    two_backups
    run_expect 1 env LBVM_NBDKIT_PLUGIN=/no/plugin.so lbvm restore --live -o r web1
    expect_stderr_has "lbvm: disk 'vda': nbdkit ended with status 1: " /no/plugin.so
    [ ! -e r ]
    mkdir bin
    ln -s "$(command -v lbvm)" bin/lbvm
    run_expect 1 env PATH="$PWD/bin" lbvm restore --live -o r web1
    expect_stderr "lbvm: disk 'vda': nbdkit ended with status 127: nbdkit can't be started: No such file or directory"
    [ ! -e r ]
    deep=$(printf 'x%.0s' {1..100})
    run_expect 2 lbvm restore --live -o "$deep" web1
    expect_stderr "lbvm: $PWD/$deep/.lbvm-live/0: too long for the path of a socket"
    [ ! -e "$deep" ]
    mv "$(archive_of 1 vdb)" kept
    run_expect 3 lbvm restore --live -o r web1
    [ ! -e r ]
    mv kept "$(archive_of 1 vdb)"
    mkdir r
    echo mine >r/vdb.qcow2
    run_expect 1 lbvm restore --live -o r web1
    expect_stderr 'lbvm: r/vdb.qcow2: already exists; a live restore replaces nothing'
    [ "$(ls -A r) $(<r/vdb.qcow2)" = 'vdb.qcow2 mine' ]
}

@test "options that do not go together" {
    for option in --force --format=raw; do
        run_expect 2 lbvm restore --live $option -o r web1
        expect_stderr_has '--live goes with neither --in-original-place, --force nor --format=raw'
    done
    run_expect 2 lbvm restore --live --in-original-place web1
    run_expect 2 lbvm restore --qmp=s/qemu -o r web1
    expect_stderr_has '--qmp goes with --live'
}
