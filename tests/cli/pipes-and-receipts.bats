# Archives that go through pipes: receipts, confirmation, --trust-pipe.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

setup() {
    helpers_setup
    new_disk disk.qcow2 10M
    qemu_write disk.qcow2 0 5M 1
}

@test "the manual's line: dump, store elsewhere, confirm" {
    mkdir far
    n=0
    for kind in '' --incremental --incremental; do
        n=$((n + 1))
        change disk.qcow2 "write -P 1$n ${n}M 100k"
        # shellcheck disable=SC2086
        receipt=$(lbdump -q $kind disk.qcow2 |
                  lbverify --receipt -o far/$n.lbz -) &&
            lbctl confirm disk.qcow2 $receipt
        [ "$receipt" = "$(uuid_of far/$n.lbz) $(lbz root far/$n.lbz | cut -d' ' -f1)" ]
        [ "$(status_of disk.qcow2 '.checkpoints[-1].confirmed')" = true ]
    done
    good_image disk.qcow2
    good_archives far/*.lbz
    expect_restores "$(content disk.qcow2)" far/*.lbz
}

@test "a receipt of stored archives is what confirm wants, too" {
    lbdump -q disk.qcow2 | cat >full.lbz
    run_expect 0 lbverify --receipt full.lbz
    # shellcheck disable=SC2086
    run_expect 0 lbctl confirm disk.qcow2 $output
    dump incr.lbz disk.qcow2 --incremental
    run_expect 0 lbverify --receipt full.lbz incr.lbz
    expect_output "$(for a in full incr; do
        lbz root $a.lbz | awk '{ print $2, $1 }'; done)"
    # with --json the summary goes elsewhere
    run_expect 0 lbverify --receipt --json full.lbz
    [ "${#lines[@]}" = 1 ]
    jq -e .good <<<"$stderr"
}

@test "SHA-256 receipts" {
    receipt=$(lbdump -q --digest=sha256 disk.qcow2 |
              lbverify --receipt -o full.lbz -)
    [ "${#receipt}" = $((36 + 1 + 64)) ]
    # shellcheck disable=SC2086
    run_expect 0 lbctl confirm disk.qcow2 $receipt
    good_archives full.lbz
}

@test "what did not arrive whole gets no receipt, and no name" {
    lbdump -q disk.qcow2 | cat >full.lbz
    run_expect 4 bash -c 'head -c 2000 full.lbz | lbverify --receipt -o x.lbz -'
    expect_output ''
    expect_absent x.lbz
    flip full.lbz 600
    run_expect 4 bash -c 'cat full.lbz | lbverify --receipt -o x.lbz -'
    expect_output ''
    expect_absent x.lbz
    run_expect 4 lbverify --receipt full.lbz
    expect_output ''
    # the sender: the next incremental is none, the full did not arrive
    run_expect 3 lbdump --incremental -o y.lbz disk.qcow2
    expect_stderr_has '(no-checkpoint)'
}

@test "the receiver replaces nothing without --force" {
    lbdump -q disk.qcow2 | cat >full.lbz
    echo precious >there.lbz
    expect_untouched there.lbz run_expect 2 \
        bash -c 'lbverify --receipt -o there.lbz - <full.lbz'
    expect_stderr 'lbverify: there.lbz: already exists; --force replaces it'
    expect_output ''
    run_expect 0 bash -c 'lbverify --receipt --force -o there.lbz - <full.lbz'
    cmp full.lbz there.lbz
}

@test "a receiver that dies is an error, and the checkpoints are as before" {
    dump full.lbz disk.qcow2
    head -c 5M /dev/urandom >noise
    qemu-io -f qcow2 -c 'write -s noise 0 5M' disk.qcow2
    before=$(status_of disk.qcow2 '[.checkpoints[].uuid] | join(" ")')
    run_expect 1 bash -c 'set -o pipefail
        lbdump --incremental disk.qcow2 | head -c 100000 >/dev/null'
    expect_stderr 'lbdump: standard output: writing: Broken pipe'
    [ "$(status_of disk.qcow2 '[.checkpoints[].uuid] | join(" ")')" = "$before" ]
    qemu_check disk.qcow2
    dump incr.lbz disk.qcow2 --incremental
    expect_restores "$(content disk.qcow2)" full.lbz incr.lbz
}

@test "unconfirmed archives are gone over by the next incremental" {
    dump 0.lbz disk.qcow2
    for n in 1 2 3; do
        change disk.qcow2 "write -P 2$n ${n}M 64k"
        lbdump -q --incremental disk.qcow2 | cat >$n.lbz
        [ "$(header_of $n.lbz .parent_uuid)" = "$(uuid_of 0.lbz)" ]
        state[n]=$(content disk.qcow2)
    done
    # the second did arrive: confirmed late, it becomes the parent
    read -r root uuid < <(lbz root 2.lbz)
    run_expect 0 lbctl confirm disk.qcow2 "$uuid" "$root"
    change disk.qcow2 'write -P 30 4M 64k'
    dump 4.lbz disk.qcow2 --incremental
    [ "$(header_of 4.lbz .parent_uuid)" = "$uuid" ]
    [ "$(header_of 4.lbz '.covered | join(" ")')" = "$(uuid_of 3.lbz)" ]
    expect_restores "$(content disk.qcow2)" 0.lbz 2.lbz 4.lbz
    expect_restores "${state[3]}" 0.lbz 3.lbz
    expect_restores "${state[1]}" --at "$(uuid_of 1.lbz)" 0.lbz 1.lbz 2.lbz 4.lbz
    good_image disk.qcow2
}

@test "--trust-pipe confirms, and the gap is mended by --since" {
    dump 0.lbz disk.qcow2
    qemu_write disk.qcow2 1M 64k 21
    lbdump -q --trust-pipe --incremental disk.qcow2 | cat >/dev/null
    qemu_write disk.qcow2 2M 64k 22
    lbdump -q --trust-pipe --incremental disk.qcow2 | cat >2.lbz
    run_expect 3 lbverify 0.lbz 2.lbz
    expect_stderr_has 'its parent '
    dump 3.lbz disk.qcow2 --since="$(uuid_of 0.lbz)"
    expect_restores "$(content disk.qcow2)" 0.lbz 3.lbz
}

@test "merged on the way, restored from the pipe" {
    dump 0.lbz disk.qcow2
    qemu_write disk.qcow2 1M 64k 21
    dump 1.lbz disk.qcow2 --incremental
    run_expect 0 bash -c 'lbmerge 0.lbz 1.lbz | lbrestore -o r.qcow2 -'
    expect_stderr ''
    good_image r.qcow2
    expect_content "$(content disk.qcow2)" r.qcow2
    run_expect 0 bash -c 'lbdump --copy disk.qcow2 | lbrestore -o s.qcow2 -'
    expect_content "$(content disk.qcow2)" s.qcow2
}
