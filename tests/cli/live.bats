# lbdump --qmp: disks of a running QEMU, whose part fakeqemu.py plays.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load fakeqemu

whole=(qmp_capabilities livebackup-begin livebackup-end gone)
whole_found=(qmp_capabilities query-named-block-nodes livebackup-begin
             livebackup-end gone)

# --------------------------------------------------------------- content

@test "a full dump holds what the disk was when the backup began" {
    some_disk disk.qcow2
    fake --writes 60 disk=disk.qcow2
    run_expect 0 lbdump --qmp=qmp --disk=disk -o full.lbz
    expect_output ''
    expect_stderr ''
    expect_commands "${whole[@]}"
    expect_at_T disk.qcow2 full.lbz
    run_expect 0 lbctl status --json disk.qcow2
    [ "$(jq -r '.checkpoints[-1].confirmed' <<<"$output")" = true ]
    [ "$(jq -r '.checkpoints[-1].uuid' <<<"$output")" = "$(uuid_of full.lbz)" ]
    [ ! -e disk.orig.qcow2 ]
}

@test "the header is that of an offline dump of the checkpoint" {
    some_disk disk.qcow2
    fake disk=disk.qcow2
    run_expect 0 lbdump --qmp=qmp --disk=disk --chain=hourly --json -o full.lbz
    jq -e '.disks[0].confirmed and .disks[0].kind == "full" and
           .disks[0].device == "disk" and .time == 1700000000' <<<"$output"
    [ "$(jq -r .set <<<"$output")" = "$(header_of full.lbz .set_uuid)" ]
    [ "$(header_of full.lbz .time)" = 1700000000 ]
    [ "$(header_of full.lbz .label)" = hourly ]
    [ "$(header_of full.lbz .image_uuid)" = \
        "$(status_of disk.qcow2 .image_uuid)" ]
    [ "$(argument livebackup-begin .label)" = hourly ]
    [ "$(argument livebackup-begin .mode)" = full ]
    [ "$(argument livebackup-end '.roots[0].root')" = \
        "$(lbz root full.lbz | cut -c 1-16)" ]
}

@test "an incremental holds what had changed, and names what it covers" {
    some_disk disk.qcow2
    dump full.lbz disk.qcow2
    change disk.qcow2 'write -P 7 2M 300k' 'write -z 0 256k' \
        'write -P 8 8M 64k' 'discard 5M 64k'
    lbdump -q --incremental disk.qcow2 | cat >lost.lbz
    change disk.qcow2 'write -P 9 4M 64k'
    fake --writes 60 --junk disk=disk.qcow2
    run_expect 0 lbdump --qmp=qmp --disk=disk --incremental -o 1.lbz
    expect_stderr ''
    expect_commands "${whole[@]}"
    [ "$(header_of 1.lbz .parent_uuid)" = "$(uuid_of full.lbz)" ]
    [ "$(header_of 1.lbz '.covered | join(" ")')" = "$(uuid_of lost.lbz)" ]
    expect_at_T disk.qcow2 full.lbz 1.lbz
    [ "$(stat -c %s 1.lbz)" -lt 20000 ]
}

@test "what changes while it is read is read as it was" {
    head -c 36M /dev/urandom >noise
    for seed in 1 2 3; do
        rm -f disk.qcow2
        new_disk disk.qcow2 48M
        change disk.qcow2 'write -s noise 6M 36M' 'write -P 1 46M 1M'
        fake --seed $seed --go-on --junk --writes 5 disk=disk.qcow2
        run_expect 0 lbdump --qmp=qmp --disk=disk --rate-limit=20M -o $seed.lbz
        expect_stderr ''
        expect_commands "${whole[@]}"
        expect_at_T disk.qcow2 $seed.lbz
        grep -q livebackup-release qmp.log
    done
}

@test "clusters, granules and units of every size" {
    n=0
    for how in '4k 4K' '4k 64K' '64k 1M' '64k 4M' '2M 64K' '64k 64K 1'; do
        # shellcheck disable=SC2086
        set -- $how
        n=$((n + 1))
        qemu-img create -q -f qcow2 \
            -o "cluster_size=$1${3:+,extended_l2=on}" $n.qcow2 9999k
        run_expect 0 lbctl enable --granularity="$2" $n.qcow2
        change $n.qcow2 'write -P 1 0 3M' 'write -P 2 9900k 99k' \
            'write -z 1M 64k'
        fake --writes 20 --junk d=$n.qcow2
        run_expect 0 lbdump --qmp=qmp --disk=d -o $n.lbz
        expect_stderr ''
        expect_at_T $n.qcow2 $n.lbz
    done
}

@test "the image is read past the page cache where QEMU does so" {
    some_disk disk.qcow2
    fake --writes 40 --direct disk=disk.qcow2
    # what finds leaks does not work under strace
    run_expect 0 env ASAN_OPTIONS=detect_leaks=0 strace -f -o trace -e trace=openat \
        lbdump --qmp=qmp --disk=disk -o full.lbz
    expect_at_T disk.qcow2 full.lbz
    grep '/disk.qcow2"' trace >opened
    run_expect 1 grep -v O_DIRECT opened
    [ "$(grep -c . opened)" = 2 ]
    run_expect 1 grep '/disk.orig.qcow2".*O_DIRECT' trace
}

@test "a backing file and an external data file" {
    qemu-img create -q -f qcow2 base.qcow2 10M
    change base.qcow2 'write -P 5 0 10M'
    new_disk disk.qcow2 10M -b base.qcow2 -F qcow2
    change disk.qcow2 'write -P 6 1M 1M' 'write -z 3M 1M'
    fake --writes 40 disk=disk.qcow2
    run_expect 0 lbdump --qmp=qmp --disk=disk -o full.lbz
    expect_at_T disk.qcow2 full.lbz
    new_disk ext.qcow2 10M -o data_file=ext.raw
    change ext.qcow2 'write -P 6 1M 1M' 'write -z 3M 1M'
    # its guest knows no data but that in the image
    fake disk=ext.qcow2
    run_expect 0 lbdump --qmp=qmp --disk=disk -o ext.lbz
    expect_at_T ext.qcow2 ext.lbz
}

@test "what is released begins with the disk and has no gap" {
    some_disk disk.qcow2
    fake disk=disk.qcow2
    run_expect 0 lbdump --qmp=qmp --disk=disk --rate-limit=3M -o full.lbz
    expect_at_T disk.qcow2 full.lbz
    jq -s -e '[.[] | select(.execute == "livebackup-release") |
               .arguments.ranges[0]] |
              .[0].offset == 0 and
              ([.[] | .offset + .bytes][:-1] == [.[] | .offset][1:])' qmp.log
}

# ------------------------------------------------------------ several disks

@test "all disks with livebackup on, each in a file of its name" {
    some_disk a.qcow2
    some_disk b.qcow2
    fake --writes 30 sda=a.qcow2 sdb=b.qcow2
    mkdir out
    run_expect 0 lbdump --qmp=qmp -o out/
    expect_stderr ''
    expect_commands "${whole_found[@]}"
    [ "$(ls -A out)" = $'sda.lbz\nsdb.lbz' ]
    expect_at_T a.qcow2 out/sda.lbz
    expect_at_T b.qcow2 out/sdb.lbz
    [ "$(header_of out/sda.lbz .set_uuid)" = \
        "$(header_of out/sdb.lbz .set_uuid)" ]
    [ "$(argument livebackup-end '.roots | length')" = 2 ]
}

@test "disks and files pair in their order" {
    new_disk a.qcow2 1M
    new_disk b.qcow2 2M
    fake sda=a.qcow2 sdb=b.qcow2
    run_expect 0 lbdump --qmp=qmp --disk=sdb -o 1.lbz --disk=sda -o 2.lbz
    [ "$(header_of 1.lbz .virtual_size)" = 2097152 ]
    [ "$(header_of 2.lbz .virtual_size)" = 1048576 ]
}

@test "disks are dumped at once, as many as there are threads" {
    for name in a b c; do
        some_disk $name.qcow2
    done
    fake --writes 20 a=a.qcow2 b=b.qcow2 c=c.qcow2
    run_expect 0 lbdump --qmp=qmp --threads=2 --rate-limit=4M -o ./
    jq -r 'select(.execute == "livebackup-release") | .arguments.device' \
        qmp.log >order
    [[ "$(uniq order | tr '\n' ' ')" == *"a b a "* ]]
    for name in a b c; do
        expect_at_T $name.qcow2 $name.lbz
    done
}

@test "an error leaves no archive of any disk" {
    some_disk a.qcow2
    some_disk b.qcow2
    fake --die-at livebackup-release sda=a.qcow2 sdb=b.qcow2
    mkdir out
    run_expect 1 lbdump --qmp=qmp --rate-limit=2M -o out/
    expect_stderr 'lbdump: qmp: QEMU has closed the connection'
    [ -z "$(ls -A out)" ]
}

@test "several disks want a folder" {
    new_disk a.qcow2 1M
    new_disk b.qcow2 1M
    fake sda=a.qcow2 sdb=b.qcow2
    run_expect 2 lbdump --qmp=qmp -o all.lbz
    expect_stderr 'lbdump: 2 disks have livebackup on, but -o names one file; use -o FOLDER/, or --disk'
    fake sda=a.qcow2 sdb=b.qcow2
    run_expect 2 lbdump --qmp=qmp
    expect_stderr "lbdump: 2 disks have livebackup on, and don't all go to standard output; use -o FOLDER/, or --disk"
    expect_commands qmp_capabilities query-named-block-nodes gone
}

# ------------------------------------------------------------------- pipes

@test "to a pipe: the checkpoint stays unconfirmed" {
    some_disk disk.qcow2
    fake --writes 20 disk=disk.qcow2
    run_expect 0 bash -c 'lbdump --qmp=qmp --disk=disk | cat >full.lbz'
    read -r root uuid < <(lbz root full.lbz)
    image=$PWD/disk.qcow2
    expect_stderr "lbdump: $image: the archive went into a pipe, so its checkpoint is not confirmed; when it is safe, and QEMU no longer has the disk open: lbctl confirm $image $uuid $root"
    expect_at_T disk.qcow2 full.lbz
    expect_commands "${whole[@]}"
    [ "$(argument livebackup-end .success)" = true ]
    [ "$(argument livebackup-end .roots)" = null ]
    [ "$(status_of disk.qcow2 '.checkpoints[-1].confirmed')" = false ]
    run_expect 0 lbctl confirm disk.qcow2 "$uuid" "$root"
}

@test "--trust-pipe confirms" {
    new_disk disk.qcow2 1M
    fake disk=disk.qcow2
    run_expect 0 bash -c 'lbdump --qmp=qmp --trust-pipe | cat >full.lbz'
    expect_stderr ''
    [ "$(argument livebackup-end '.roots[0].device')" = disk ]
}

@test "a pipe that breaks ends the backup as failed" {
    new_disk disk.qcow2 10M
    head -c 9M /dev/urandom >noise
    change disk.qcow2 'write -s noise 0 9M'
    fake disk=disk.qcow2
    run_expect 1 bash -c 'set -o pipefail
        lbdump --qmp=qmp | head -c 100000 >/dev/null'
    expect_stderr 'lbdump: standard output: writing: Broken pipe'
    expect_commands "${whole_found[@]}"
    [ "$(argument livebackup-end .success)" = false ]
}

@test "a pipe that stands still keeps the lease" {
    new_disk disk.qcow2 10M
    head -c 9M /dev/urandom >noise
    change disk.qcow2 'write -s noise 0 9M'
    fake disk=disk.qcow2
    run_expect 0 bash -c 'lbdump -q --qmp=qmp | { sleep 12; cat >full.lbz; }'
    expect_at_T disk.qcow2 full.lbz
    [ "$(grep -c query-livebackup qmp.log)" -ge 3 ]
}

# -------------------------------------------------------------------- modes

@test "--auto is incremental where there is trust" {
    some_disk disk.qcow2
    dump full.lbz disk.qcow2
    change disk.qcow2 'write -P 7 2M 300k'
    fake --writes 20 disk=disk.qcow2
    run_expect 0 lbdump --qmp=qmp --auto -o 1.lbz
    expect_stderr 'lbdump: disk: incremental: the tracked changes are trusted'
    expect_at_T disk.qcow2 full.lbz 1.lbz
}

@test "--auto is full where QEMU says that there is no trust, and says why" {
    some_disk disk.qcow2
    fake --writes 20 disk=disk.qcow2
    run_expect 0 lbdump --qmp=qmp --auto -o 1.lbz
    expect_stderr "lbdump: disk: full: Node 'disk' has no confirmed checkpoint of this label"
    expect_at_T disk.qcow2 1.lbz
    expect_commands qmp_capabilities query-named-block-nodes \
        livebackup-begin livebackup-end gone
}

@test "--incremental without trust is status 3" {
    some_disk disk.qcow2
    fake disk=disk.qcow2
    run_expect 3 lbdump --qmp=qmp --incremental -o 1.lbz
    expect_stderr "lbdump: qmp: livebackup-begin: Node 'disk' has no confirmed checkpoint of this label; make a full dump, or use --auto"
    expect_absent 1.lbz
    expect_commands qmp_capabilities query-named-block-nodes \
        livebackup-begin gone
}

@test "what QEMU says of a lack of trust is status 3" {
    some_disk disk.qcow2
    for text in "can't be backed up incrementally: there is no checkpoint to go on from" \
            'has no such checkpoint' 'livebackup is off'; do
        fake --refuse "livebackup-begin=Node 'disk' $text" disk=disk.qcow2
        run_expect 3 lbdump --qmp=qmp --incremental -o 1.lbz
        expect_stderr "lbdump: qmp: livebackup-begin: Node 'disk' $text; make a full dump, or use --auto"
    done
}

@test "--since goes on from any checkpoint" {
    some_disk disk.qcow2
    dump 0.lbz disk.qcow2
    change disk.qcow2 'write -P 7 2M 300k'
    dump 1.lbz disk.qcow2 --incremental
    change disk.qcow2 'write -P 8 8M 300k'
    fake --writes 20 disk=disk.qcow2
    run_expect 0 lbdump --qmp=qmp --since="$(uuid_of 0.lbz)" -o 2.lbz
    [ "$(header_of 2.lbz .parent_uuid)" = "$(uuid_of 0.lbz)" ]
    [ "$(header_of 2.lbz '.covered | join(" ")')" = "$(uuid_of 1.lbz)" ]
    expect_at_T disk.qcow2 0.lbz 2.lbz
}

# ------------------------------------------------------------------ failures

@test "a backup that is broken in the end gives no archive" {
    some_disk disk.qcow2
    fake --break-after livebackup-begin disk=disk.qcow2
    run_expect 1 lbdump --qmp=qmp -o full.lbz
    expect_stderr "lbdump: $PWD/disk.qcow2: the backup was broken: an original could not be saved"
    expect_absent full.lbz
    expect_commands "${whole_found[@]}"
    [ "$(argument livebackup-end .success)" = false ]
    [ "$(status_of disk.qcow2 '.checkpoints[-1].confirmed')" = false ]
}

@test "a backup that breaks while it is read gives no archive" {
    some_disk disk.qcow2
    fake --break-after livebackup-release disk=disk.qcow2
    run_expect 1 lbdump --qmp=qmp --rate-limit=2M -o full.lbz
    expect_stderr "lbdump: $PWD/disk.qcow2: the backup was broken: an original could not be saved"
    expect_absent full.lbz
}

@test "an original that is damaged is an error" {
    some_disk disk.qcow2
    fake --bad-entry 2097152 disk=disk.qcow2
    run_expect 4 lbdump --qmp=qmp -o full.lbz
    expect_stderr "lbdump: $PWD/disk.orig.qcow2: damaged entry for guest offset 2097152"
    expect_absent full.lbz
    [ "$(argument livebackup-end .success)" = false ]
}

@test "an error of the image counts where the orig has nothing" {
    some_disk disk.qcow2
    fake --bad-image 2097152 disk=disk.qcow2
    run_expect 4 lbdump --qmp=qmp -o full.lbz
    expect_stderr "lbdump: $PWD/disk.qcow2: damaged L2 entry 0x3f00000000000200 for guest offset 2097152: reserved bits"
    expect_absent full.lbz
    [ "$(argument livebackup-end .success)" = false ]
}

@test "an error of the image counts only where it is to be read" {
    some_disk disk.qcow2
    dump full.lbz disk.qcow2
    change disk.qcow2 'write -P 7 5M 300k'
    fake --writes 20 --bad-image 2097152 disk=disk.qcow2
    run_expect 0 lbdump --qmp=qmp --incremental -o 1.lbz
    expect_at_T disk.qcow2 full.lbz 1.lbz
}

@test "QEMU refuses" {
    some_disk disk.qcow2
    fake --refuse 'livebackup-begin=no space for the orig' disk=disk.qcow2
    run_expect 1 lbdump --qmp=qmp --auto -o full.lbz
    expect_stderr 'lbdump: qmp: livebackup-begin: no space for the orig'
    fake --refuse 'livebackup-release=it is over' disk=disk.qcow2
    run_expect 1 lbdump --qmp=qmp --rate-limit=2M -o full.lbz
    expect_stderr 'lbdump: qmp: livebackup-release: it is over'
    expect_commands "${whole_found[@]}"
    [ "$(argument livebackup-end .success)" = false ]
    expect_absent full.lbz
}

@test "a checkpoint that could not be confirmed leaves the archive" {
    some_disk disk.qcow2
    fake --refuse 'livebackup-end=no space' disk=disk.qcow2
    run_expect 1 lbdump --qmp=qmp -o full.lbz
    expect_stderr 'lbdump: the archive is complete, but its checkpoint could not be confirmed: qmp: livebackup-end: no space'
    expect_at_T disk.qcow2 full.lbz
}

@test "QEMU goes away" {
    some_disk disk.qcow2
    cp disk.qcow2 before.qcow2
    for command in livebackup-begin livebackup-release query-livebackup; do
        cp before.qcow2 disk.qcow2
        fake --die-at $command disk=disk.qcow2
        run_expect 1 lbdump --qmp=qmp --rate-limit=2M -o full.lbz
        expect_stderr 'lbdump: qmp: QEMU has closed the connection'
        expect_absent full.lbz
    done
}

@test "SIGTERM and SIGINT end the backup as failed" {
    some_disk disk.qcow2
    for signal in TERM INT; do
        fake disk=disk.qcow2
        run_expect 1 bash -c "lbdump --qmp=qmp --rate-limit=1M -o full.lbz &
            pid=\$!
            while [ ! -e disk.orig.qcow2 ]; do sleep 0.02; done
            sleep 0.5
            kill -$signal \$pid
            wait \$pid"
        expect_stderr "lbdump: $PWD/disk.qcow2: interrupted"
        expect_absent full.lbz
        expect_commands "${whole_found[@]}"
        [ "$(argument livebackup-end .success)" = false ]
        [ ! -e disk.orig.qcow2 ]
    done
}

@test "SIGTERM ends the backup also behind a pipe that stands still" {
    new_disk disk.qcow2 10M
    head -c 9M /dev/urandom >noise
    change disk.qcow2 'write -s noise 0 9M'
    fake disk=disk.qcow2
    mkfifo pipe
    run_expect 1 bash -c 'lbdump --qmp=qmp >pipe & pid=$!
        exec 5<pipe
        while [ ! -e disk.orig.qcow2 ]; do sleep 0.02; done
        sleep 0.5
        kill $pid
        while [ -e disk.orig.qcow2 ]; do sleep 0.02; done
        cat <&5 >part
        wait $pid'
    expect_stderr "lbdump: $PWD/disk.qcow2: interrupted"
    [ "$(argument livebackup-end .success)" = false ]
}

@test "no monitor, or none of QEMU's" {
    run_expect 1 lbdump --qmp=nowhere -o x.lbz
    expect_stderr 'lbdump: nowhere: No such file or directory'
    "$ORACLE_PYTHON" -c '
import socket
s = socket.socket(socket.AF_UNIX)
s.bind("other")
s.listen(1)
c = s.accept()[0]
c.sendall(b"220 mail\r\n")
c.recv(1)' 3>&- 4>&- &
    while [ ! -S other ]; do sleep 0.02; done
    sleep 0.2
    run_expect 1 lbdump --qmp=other -o x.lbz
    expect_stderr 'lbdump: other: what answers there is no QMP monitor'
    expect_absent x.lbz
}

@test "an existing file is not replaced, nor the disk with --force" {
    new_disk disk.qcow2 1M
    echo precious >there.lbz
    fake disk=disk.qcow2
    run_expect 2 lbdump --qmp=qmp -o there.lbz
    expect_stderr 'lbdump: there.lbz: already exists; --force replaces it'
    expect_commands qmp_capabilities query-named-block-nodes gone
    fake disk=disk.qcow2
    run_expect 2 lbdump --qmp=qmp --force -o disk.qcow2
    expect_stderr 'lbdump: disk.qcow2: is the disk itself, or a file that it consists of'
    [ "$(argument livebackup-end .success)" = false ]
}

# --------------------------------------------------------------------- usage

@test "usage errors of --qmp" {
    wrong() {
        run_expect 2 lbdump "${@:2}"
        expect_stderr "lbdump: $1
Try 'lbdump --help'."
    }
    wrong '--disk names a disk of a running QEMU; it wants --qmp' \
        --disk=a -o x disk.qcow2
    wrong '--qmp finds the disks itself, or by --disk; DISK is not wanted' \
        --qmp=qmp -o x disk.qcow2
    wrong '--qmp excludes --copy' --qmp=qmp --copy -o x
    wrong '--qmp excludes --overlay' --qmp=qmp --overlay -o x
    wrong '-o FOLDER/ is for all disks; no other -o is wanted' \
        --qmp=qmp -o x/ -o y
    wrong 'several times -o want as many times --disk; or use -o FOLDER/' \
        --qmp=qmp -o x -o y
    wrong '2 times --disk, but 1 times -o; or use -o FOLDER/' \
        --qmp=qmp --disk=a --disk=b -o x
    wrong "several disks don't go to standard output; use -o FOLDER/" \
        --qmp=qmp --disk=a --disk=b
}
