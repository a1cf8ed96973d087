# lbctl: livebackup on and off, what status shows, prune and recover.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

teardown() {
    let_go
}

@test "enable and disable leave an image that QEMU and the oracle accept" {
    qemu-img create -q -f qcow2 disk.qcow2 10M
    qemu_write disk.qcow2 1M 3M 7
    before=$(content disk.qcow2)
    run_expect 0 lbctl enable disk.qcow2
    expect_output ''
    expect_stderr ''
    good_image disk.qcow2
    expect_content "$before" disk.qcow2
    dump full.lbz disk.qcow2
    good_image disk.qcow2
    run_expect 0 lbctl disable disk.qcow2
    expect_output ''
    expect_stderr ''
    qemu_check disk.qcow2
    expect_content "$before" disk.qcow2
    run_expect 0 lbctl status disk.qcow2
    expect_output 'disk.qcow2: livebackup is off'
    [ "$(lbext trust disk.qcow2 | jq -r .keyword)" = off ]
    [ "$(qemu-img info --output=json disk.qcow2 |
         jq '."format-specific".data.bitmaps')" = null ]
}

@test "enabling what is on, and disabling what is off, is a usage error" {
    new_disk disk.qcow2 1M
    expect_untouched disk.qcow2 run_expect 2 lbctl enable disk.qcow2
    expect_stderr 'lbctl: disk.qcow2: livebackup is on already'
    run_expect 0 lbctl disable disk.qcow2
    expect_untouched disk.qcow2 run_expect 2 lbctl disable disk.qcow2
    expect_stderr 'lbctl: disk.qcow2: livebackup is off already'
}

@test "enable refuses what can't have it, says what to do, and writes nothing" {
    qemu-img create -q -f qcow2 -o compat=0.10 v2.qcow2 1M
    expect_untouched v2.qcow2 run_expect 2 lbctl enable v2.qcow2
    expect_stderr "lbctl: v2.qcow2: livebackup needs qcow2 version 3; convert the image with: qemu-img amend -f qcow2 -o compat=1.1 v2.qcow2"
    qemu-img amend -f qcow2 -o compat=1.1 v2.qcow2
    run_expect 0 lbctl enable v2.qcow2
    good_image v2.qcow2

    qemu-img create -q -f qcow2 -o cluster_size=2048 small.qcow2 1M
    expect_untouched small.qcow2 run_expect 2 lbctl enable small.qcow2
    expect_stderr 'lbctl: small.qcow2: livebackup needs clusters of 4096 bytes or more, the image has 2048'

    qemu-img create -q -f qcow2 empty.qcow2 0
    expect_untouched empty.qcow2 run_expect 2 lbctl enable empty.qcow2
    expect_stderr 'lbctl: empty.qcow2: the disk has size 0'

    echo text >text.qcow2
    run_expect 1 lbctl enable text.qcow2
    expect_stderr 'lbctl: text.qcow2: not a qcow2 image'
    run_expect 1 lbctl enable missing.qcow2
    expect_stderr 'lbctl: missing.qcow2: No such file or directory'
}

@test "the granularity is what was asked for, 4K to 2G, and nothing else" {
    for granularity in 4K 8K 64K 1M 2M 2G; do
        rm -f disk.qcow2
        qemu-img create -q -f qcow2 disk.qcow2 10M
        run_expect 0 lbctl enable --granularity=$granularity disk.qcow2
        run_expect 0 lbctl status --json disk.qcow2
        [ "$(jq .granularity <<<"$output")" = \
            "$(numfmt --from=iec $granularity)" ]
        dump full.lbz disk.qcow2 --force
        good_image disk.qcow2
    done
    qemu-img create -q -f qcow2 other.qcow2 10M
    for granularity in 2K 4G 5000 -64K 64k 0 '' 64KB; do
        expect_untouched other.qcow2 \
            run_expect 2 lbctl enable "--granularity=$granularity" other.qcow2
        expect_stderr_has "lbctl: --granularity: '$granularity' is no "
    done
}

@test "status shows each checkpoint with what is asked of it" {
    new_disk disk.qcow2 10M
    run_expect 0 lbctl status disk.qcow2
    expect_output_has 'disk.qcow2: livebackup is on, granularity 64.0 KiB' \
        'next dump: full' '(no-checkpoint)'
    dump full.lbz disk.qcow2
    qemu_write disk.qcow2 1M 64k
    lbdump -q --incremental disk.qcow2 | cat >incr.lbz
    qemu_write disk.qcow2 5M 100k
    run_expect 0 lbctl status disk.qcow2
    [ "${#lines[@]}" -eq 3 ]
    full=$(uuid_of full.lbz) incr=$(uuid_of incr.lbz)
    [[ "${lines[1]}" =~ ^$full\ \ [0-9-]{10}T[0-9:]{8}Z\ \ main\ +confirmed ]]
    [[ "${lines[1]}" == *'changed since: 320.0 KiB'*' trusted' ]]
    [[ "${lines[2]}" == "$incr "*' main '*' unconfirmed '*' changed since: 256.0 KiB'*' trusted' ]]

    run_expect 0 lbctl status --json disk.qcow2
    jq -e --arg full "$full" --arg incr "$incr" '
        .disk == "disk.qcow2" and .on and .trusted and .keyword == null and
        .reason == null and .virtual_size == 10485760 and
        (.image_uuid | length) == 36 and .granularity == 65536 and
        .sync == false and .backup == null and
        (.checkpoints | length) == 2 and
        (.checkpoints[0] | .uuid == $full and .label == "main" and
            .confirmed and .virtual_size == 10485760 and
            .changed_bytes == 327680 and .trusted and .keyword == null and
            .reason == null and (now - .time | . > -60 and . < 600)) and
        (.checkpoints[1] | .uuid == $incr and (.confirmed | not) and
            .changed_bytes == 262144)' <<<"$output"
}

@test "status of an image without livebackup" {
    qemu-img create -q -f qcow2 disk.qcow2 10M
    run_expect 0 lbctl status disk.qcow2
    expect_output 'disk.qcow2: livebackup is off'
    run_expect 0 lbctl status --json disk.qcow2
    jq -e '.on == false and .trusted == false and .keyword == "off" and
           .checkpoints == [] and .virtual_size == 10485760' <<<"$output"
}

@test "status works while QEMU has the image open, on a read-only file too" {
    new_disk disk.qcow2 10M
    dump full.lbz disk.qcow2
    chmod a-w disk.qcow2
    expect_untouched disk.qcow2 run_expect 0 lbctl status disk.qcow2
    chmod u+w disk.qcow2
    hold_open disk.qcow2
    run_expect 0 lbctl status --json disk.qcow2
    jq -e '.on and .trusted and .checkpoints[0].keyword == "in-use" and
           (.checkpoints[0].trusted | not)' <<<"$output"
    let_go
    same_trust disk.qcow2
}

@test "status tells of a missing backing file instead of giving up" {
    qemu-img create -q -f qcow2 base.qcow2 10M
    qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2
    run_expect 0 lbctl enable top.qcow2
    dump full.lbz top.qcow2
    mv base.qcow2 gone.qcow2
    run_expect 0 lbctl status top.qcow2
    expect_output_has '(backing-modified)'
    run_expect 0 lbctl status --json top.qcow2
    jq -e '.keyword == "backing-modified" and .virtual_size == null' \
        <<<"$output"
    run_expect 1 lbdump -o x.lbz top.qcow2
    expect_stderr_has 'base.qcow2: No such file or directory'
    run_expect 1 lbdump --copy -o x.lbz top.qcow2
    expect_stderr_has 'base.qcow2: No such file or directory'
    run_expect 3 lbdump --incremental -o x.lbz top.qcow2
    expect_stderr_has '(backing-modified)'
    expect_absent x.lbz
}

@test "confirm wants the checkpoint and its own root digest" {
    new_disk disk.qcow2 10M
    lbdump -q disk.qcow2 | cat >full.lbz
    read -r root uuid < <(lbz root full.lbz)
    [ "$(status_of disk.qcow2 .checkpoints[0].confirmed)" = false ]

    expect_untouched disk.qcow2 run_expect 4 \
        lbctl confirm disk.qcow2 "$uuid" "0000${root:4}"
    expect_stderr "lbctl: disk.qcow2: the root digest is not that of the archive of $uuid; it did not arrive whole"
    other=11111111-2222-4333-8444-555555555555
    expect_untouched disk.qcow2 run_expect 3 \
        lbctl confirm disk.qcow2 $other "$root"
    expect_stderr "lbctl: disk.qcow2: the image has no checkpoint $other; 'lbctl status' lists them"
    expect_untouched disk.qcow2 run_expect 2 \
        lbctl confirm disk.qcow2 "$uuid" "${root:1}"
    expect_untouched disk.qcow2 run_expect 2 \
        lbctl confirm disk.qcow2 "$uuid-" "$root"
    expect_untouched disk.qcow2 run_expect 2 lbctl confirm disk.qcow2 "$uuid"

    run_expect 0 lbctl confirm disk.qcow2 "$uuid" "$root"
    [ "$(status_of disk.qcow2 .checkpoints[0].confirmed)" = true ]
    good_image disk.qcow2
    run_expect 0 lbctl confirm disk.qcow2 "$uuid" "$root"
    dump incr.lbz disk.qcow2 --incremental
    [ "$(header_of incr.lbz .parent_uuid)" = "$uuid" ]
}

@test "prune keeps the newest confirmed ones of each label" {
    new_disk disk.qcow2 10M
    dump a1.lbz disk.qcow2
    dump b1.lbz disk.qcow2 --chain=weekly
    qemu_write disk.qcow2 1M 64k 2
    dump a2.lbz disk.qcow2 --incremental
    qemu_write disk.qcow2 2M 64k 3
    dump a3.lbz disk.qcow2 --incremental
    lbdump -q --incremental disk.qcow2 | cat >unsafe.lbz

    run_expect 0 lbctl prune --keep=2 disk.qcow2
    expect_output "disk.qcow2: $(uuid_of a1.lbz) taken away"
    [ "$(status_of disk.qcow2 '[.checkpoints[].uuid] | join(" ")')" = \
      "$(uuid_of b1.lbz) $(uuid_of a2.lbz) $(uuid_of a3.lbz) $(uuid_of unsafe.lbz)" ]
    good_image disk.qcow2
    run_expect 0 lbctl prune disk.qcow2
    [ "$(status_of disk.qcow2 '[.checkpoints[].uuid] | join(" ")')" = \
      "$(uuid_of b1.lbz) $(uuid_of a3.lbz) $(uuid_of unsafe.lbz)" ]
    good_image disk.qcow2

    # what changed since the weekly one is still known, the folded included
    now=$(content disk.qcow2)
    dump b2.lbz disk.qcow2 --incremental --chain=weekly
    expect_restores "$now" b1.lbz b2.lbz
}

@test "prune by name spares the newest confirmed one, unless forced" {
    new_disk disk.qcow2 10M
    dump full.lbz disk.qcow2
    qemu_write disk.qcow2 1M 64k 2
    dump incr.lbz disk.qcow2 --incremental
    incr=$(uuid_of incr.lbz) full=$(uuid_of full.lbz)
    expect_untouched disk.qcow2 run_expect 3 lbctl prune disk.qcow2 "$incr"
    expect_stderr "lbctl: disk.qcow2: $incr is the newest confirmed checkpoint of chain 'main': without it the next incremental goes on from an older one; --force takes it away"
    qemu_write disk.qcow2 3M 64k 3
    run_expect 0 lbctl prune --force disk.qcow2 "$incr"
    good_image disk.qcow2
    now=$(content disk.qcow2)
    dump again.lbz disk.qcow2 --incremental
    [ "$(header_of again.lbz .parent_uuid)" = "$full" ]
    expect_restores "$now" full.lbz again.lbz
    run_expect 2 lbctl prune --chain='no label' disk.qcow2
    expect_stderr_has "lbctl: --chain: 'no label' is no label"
    run_expect 2 lbctl prune --force disk.qcow2
    expect_stderr_has 'lbctl: --force wants the UUID of a checkpoint'
    run_expect 2 lbctl prune --keep=2 disk.qcow2 "$full"
    expect_stderr_has 'lbctl: --keep and --chain choose checkpoints by age'
}

@test "prune --chain leaves other labels alone" {
    new_disk disk.qcow2 10M
    for n in 1 2 3; do
        dump a$n.lbz disk.qcow2
        dump b$n.lbz disk.qcow2 --chain=b
    done
    run_expect 0 lbctl prune --chain=b disk.qcow2
    [ "$(status_of disk.qcow2 '[.checkpoints[].label] | join(" ")')" = \
      'main main main b' ]
    good_image disk.qcow2
}

@test "the 33rd checkpoint folds the oldest that may go" {
    new_disk disk.qcow2 10M
    dump weekly.lbz disk.qcow2 --chain=weekly
    for n in $(seq 1 35); do
        change disk.qcow2 "write -P $n ${n}k 1k" \
            "write -P $n $((n * 200))k 1k"
        run_expect 0 lbdump -q --auto -o "$n.lbz" disk.qcow2
    done
    [ "$(status_of disk.qcow2 '.checkpoints | length')" = 32 ]
    [ "$(status_of disk.qcow2 .checkpoints[0].label)" = weekly ]
    good_image disk.qcow2
    now=$(content disk.qcow2)
    dump last.lbz disk.qcow2 --incremental --chain=weekly
    expect_restores "$now" weekly.lbz last.lbz
    good_archives ./*.lbz
    expect_restores "$now" {1..35}.lbz
}

@test "recover frees leaked clusters, and what is not trusted" {
    new_disk disk.qcow2 10M
    qemu_write disk.qcow2 1M 1M
    before=$(content disk.qcow2)
    dump full.lbz disk.qcow2
    expect_untouched disk.qcow2 run_expect 0 lbctl recover disk.qcow2
    expect_output 'disk.qcow2: 0 leaked clusters freed, 0 checkpoints dropped'
    # a cluster that nothing refers to: the tables of a bitmap lost in flight
    "$ORACLE_PYTHON" -B - "$abs_top_srcdir/tests/oracle" <<'END'
import sys
sys.path.insert(0, sys.argv[1])
import lbext
writer = lbext.Writer("disk.qcow2")
writer.allocate(3)
writer.close()
END
    run_expect 0 lbctl recover disk.qcow2
    expect_output 'disk.qcow2: 3 leaked clusters freed, 0 checkpoints dropped'
    good_image disk.qcow2
    qemu-img bitmap --clear disk.qcow2 "lb-$(uuid_of full.lbz)"
    run_expect 0 lbctl recover disk.qcow2
    expect_output 'disk.qcow2: 0 leaked clusters freed, 1 checkpoints dropped'
    good_image disk.qcow2
    expect_content "$before" disk.qcow2
    dump full2.lbz disk.qcow2
    qemu_write disk.qcow2 0 64k 9
    dump incr2.lbz disk.qcow2 --incremental
    expect_restores "$(content disk.qcow2)" full2.lbz incr2.lbz
}

@test "a command without its arguments, or an unknown one, is a usage error" {
    run_expect 2 lbctl
    expect_stderr_has 'lbctl: a COMMAND is wanted: enable, disable, status, confirm, prune or recover' "Try 'lbctl --help'."
    run_expect 2 lbctl format disk.qcow2
    expect_stderr_has "lbctl: unknown command 'format'"
    for command in enable disable status recover; do
        run_expect 2 lbctl $command
        expect_stderr_has 'lbctl: one DISK is wanted, 0 given'
        run_expect 2 lbctl $command a b
        expect_stderr_has 'lbctl: one DISK is wanted, 2 given'
    done
    run_expect 2 lbctl prune
    expect_stderr_has 'lbctl: a DISK is wanted'
    run_expect 2 lbctl enable --granularity
    expect_stderr_has "lbctl: option '--granularity' wants an argument"
    run_expect 2 lbctl status --jsno disk.qcow2
    expect_stderr_has "lbctl: unknown or ambiguous option '--jsno'"
}
