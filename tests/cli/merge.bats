# lbmerge: one archive that stands for many.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup

# A full archive 0.lbz and incrementals 1.lbz to N.lbz; state[n] is the content
# at each. Zeroes come and go.
make_chain() {
    local n
    new_disk disk.qcow2 20M
    head -c 6M /dev/urandom >noise
    qemu-io -f qcow2 -c 'write -s noise 0 6M' -c 'write -P 1 10M 3M' disk.qcow2
    dump 0.lbz disk.qcow2
    state[0]=$(content disk.qcow2)
    for ((n = 1; n <= $1; n++)); do
        change disk.qcow2 "write -P $((n + 1)) $((n * 700))k 70k" \
            "write -z -u $((10 + n % 3))M 128k" \
            "write -P $((n + 100)) $((19 * 1024 - n * 64))k 64k"
        dump $n.lbz disk.qcow2 --incremental
        state[n]=$(content disk.qcow2)
    done
}

# The compressed bytes of each frame, as digests.
frames() {
    local archive
    for archive; do
        lbz dump "$archive"
    done | jq -r '.pages[].frames[].compressed_digest' | sort -u
}

@test "a full archive and incrementals become a full one, in any order" {
    make_chain 3
    run_expect 0 lbmerge -o a.lbz 0.lbz 1.lbz 2.lbz 3.lbz
    expect_output ''
    expect_stderr ''
    run_to b.lbz 0 lbmerge 2.lbz 0.lbz 3.lbz 1.lbz
    cmp a.lbz b.lbz
    good_archives a.lbz
    expect_restores "${state[3]}" a.lbz
    [ "$(header_of a.lbz .kind)" = full ]
    for field in backup_uuid image_uuid time label virtual_size; do
        [ "$(header_of a.lbz .$field)" = "$(header_of 3.lbz .$field)" ]
    done
    # covered: all but the newest
    [ "$(header_of a.lbz '.covered | sort | join(" ")')" = \
      "$(for n in 0 1 2; do uuid_of $n.lbz; done | sort | paste -sd' ')" ]
    run_expect 0 lbverify --image=disk.qcow2 a.lbz
}

@test "globs sort incr10 before incr2, and that does not matter" {
    make_chain 11
    mv 0.lbz base.lbz
    for n in {1..11}; do
        mv $n.lbz incr$n.lbz
    done
    run_to full.lbz 0 lbmerge base.lbz incr*.lbz
    good_archives full.lbz
    expect_restores "${state[11]}" full.lbz
    expect_restores "${state[11]}" base.lbz incr*.lbz
    run_expect 0 lbverify base.lbz incr*.lbz
}

@test "the next incremental goes on from a merged archive" {
    make_chain 2
    run_expect 0 lbmerge -o full.lbz 0.lbz 1.lbz 2.lbz
    change disk.qcow2 'write -P 77 1M 100k' 'write -z 3M 128k'
    dump 3.lbz disk.qcow2 --incremental
    expect_restores "$(content disk.qcow2)" full.lbz 3.lbz
    run_expect 0 lbmerge -o full2.lbz full.lbz 3.lbz
    good_archives full2.lbz
    expect_restores "$(content disk.qcow2)" full2.lbz
}

@test "incrementals alone become one incremental, zeroes included" {
    make_chain 4
    run_expect 0 lbmerge -o mid.lbz 3.lbz 2.lbz
    good_archives mid.lbz
    [ "$(header_of mid.lbz .kind)" = incremental ]
    [ "$(header_of mid.lbz .parent_uuid)" = "$(uuid_of 1.lbz)" ]
    [ "$(uuid_of mid.lbz)" = "$(uuid_of 3.lbz)" ]
    [ "$(lbz dump mid.lbz | jq .trailer.zero_blocks)" -ge 2 ]
    expect_restores "${state[3]}" 0.lbz 1.lbz mid.lbz
    expect_restores "${state[4]}" 0.lbz 1.lbz mid.lbz 4.lbz
    run_expect 0 lbmerge -o all.lbz 1.lbz mid.lbz 4.lbz
    good_archives all.lbz
    expect_restores "${state[4]}" 0.lbz all.lbz
    # an incremental that zeroes what the full has, and nothing else
    qemu-io -f qcow2 -c 'write -z 0 20M' disk.qcow2
    dump z.lbz disk.qcow2 --incremental
    run_expect 0 lbmerge -o allz.lbz all.lbz z.lbz
    good_archives allz.lbz
    [ "$(lbz dump allz.lbz | jq .trailer.zero_blocks)" = 320 ]
    expect_restores "$(content disk.qcow2)" 0.lbz allz.lbz
    run_expect 0 lbmerge -o fullz.lbz 0.lbz allz.lbz
    good_archives fullz.lbz
    [ "$(lbz dump fullz.lbz | jq .trailer.frame_count)" = 0 ]
    expect_restores "$(content disk.qcow2)" fullz.lbz
}

@test "a single archive merges to itself" {
    make_chain 1
    run_expect 0 lbmerge -o a.lbz 0.lbz
    run_expect 0 lbmerge -o b.lbz 1.lbz
    good_archives a.lbz b.lbz
    expect_restores "${state[1]}" a.lbz b.lbz
    cmp 0.lbz a.lbz
    cmp 1.lbz b.lbz
}

@test "compressed frames are moved, not recompressed" {
    make_chain 3
    run_expect 0 lbmerge --json -o full.lbz 0.lbz 1.lbz 2.lbz 3.lbz
    moved=$(jq .frames_moved <<<"$output")
    rewritten=$(jq .frames_rewritten <<<"$output")
    frames 0.lbz 1.lbz 2.lbz 3.lbz >before
    frames full.lbz >after
    comm -12 before after >same
    comm -13 before after >new
    [ "$(lbz dump full.lbz | jq .trailer.frame_count)" = $((moved + rewritten)) ]
    [ "$(wc -l <new)" -le "$rewritten" ]
    [ "$(wc -l <same)" -ge 6 ]
    # no frame with less than half of its blocks live is left
    [ "$(lbz dump full.lbz | jq '[.pages[].frames[] |
         select((.block_digests | length) * 2 < .blocks)] | length')" = 0 ]
    # but some with dead blocks
    [ "$(lbz dump full.lbz | jq '[.pages[].frames[] |
         select((.block_digests | length) < .blocks)] | length')" -ge 1 ]
}

@test "--compact leaves no dead block" {
    make_chain 3
    run_expect 0 lbmerge --json -o full.lbz 0.lbz 1.lbz 2.lbz 3.lbz
    run_expect 0 lbmerge --json --compact -o tight.lbz 0.lbz 1.lbz 2.lbz 3.lbz
    [ "$(jq .frames_rewritten <<<"$output")" -ge 2 ]
    good_archives tight.lbz
    [ "$(lbz dump tight.lbz | jq '[.pages[].frames[] |
         select((.block_digests | length) < .blocks)] | length')" = 0 ]
    [ "$(stat -c %s tight.lbz)" -lt "$(stat -c %s full.lbz)" ]
    expect_restores "${state[3]}" tight.lbz
    run_expect 0 lbmerge --compact --level=19 -o tighter.lbz full.lbz
    good_archives tighter.lbz
    expect_restores "${state[3]}" tighter.lbz
}

@test "several leaves are listed, and --at chooses" {
    make_chain 2
    dump copy.lbz disk.qcow2 --copy --incremental
    state[2]=$(content disk.qcow2)
    qemu_write disk.qcow2 2M 64k 9
    dump 3.lbz disk.qcow2 --incremental
    run_expect 3 lbmerge -o full.lbz ./*.lbz
    expect_stderr_has 'lbmerge: the archives end in 2 different states; choose one with --at UUID: ' \
        "$(uuid_of 3.lbz) (./3.lbz, " "$(uuid_of copy.lbz) (./copy.lbz, "
    expect_absent full.lbz
    run_expect 0 lbmerge --at "$(uuid_of copy.lbz)" -o full.lbz ./*.lbz
    expect_stderr 'lbmerge: ./3.lbz: not needed, left out'
    [ "$(uuid_of full.lbz)" = "$(uuid_of copy.lbz)" ]
    expect_restores "${state[2]}" full.lbz
    rm full.lbz
    run_expect 0 lbmerge -q --at "$(uuid_of 1.lbz)" -o one.lbz ./*.lbz
    expect_stderr ''
    expect_restores "${state[1]}" one.lbz
}

@test "covered checkpoints are no leaves, also when their archive turns up late" {
    make_chain 1
    qemu_write disk.qcow2 2M 64k 201
    lbdump -q --incremental disk.qcow2 | cat >late.lbz
    qemu_write disk.qcow2 3M 64k 202
    dump 2.lbz disk.qcow2 --incremental
    run_expect 0 lbmerge -o full.lbz ./*.lbz
    expect_stderr 'lbmerge: ./late.lbz: not needed, left out'
    expect_restores "$(content disk.qcow2)" full.lbz
    # nor are members of a merge that stand beside it, where the full archive
    # stands for the incremental of the same UUID
    run_expect 0 lbmerge -o again.lbz full.lbz 0.lbz 1.lbz 2.lbz late.lbz
    expect_stderr 'lbmerge: 0.lbz: not needed, left out
lbmerge: 1.lbz: not needed, left out
lbmerge: 2.lbz: not needed, left out
lbmerge: late.lbz: not needed, left out'
    cmp full.lbz again.lbz
}

@test "the output may replace an input" {
    make_chain 2
    run_expect 0 lbmerge -o 0.lbz 0.lbz 1.lbz 2.lbz
    expect_stderr ''
    good_archives 0.lbz
    expect_restores "${state[2]}" 0.lbz
    # another file is not replaced
    echo precious >other.lbz
    expect_untouched other.lbz run_expect 2 lbmerge -o other.lbz 0.lbz
    expect_stderr 'lbmerge: other.lbz: already exists; --force replaces it'
    run_expect 0 lbmerge --force -o other.lbz 0.lbz
    cmp 0.lbz other.lbz
}

@test "the output is not what the shell has emptied" {
    make_chain 1
    run_expect 2 bash -c 'lbmerge 0.lbz 1.lbz >1.lbz'
    expect_stderr 'lbmerge: standard output is one of the inputs; use -o FILE to replace it'
}

@test "a missing or foreign link is named" {
    make_chain 3
    run_expect 3 lbmerge -o x.lbz 0.lbz 1.lbz 3.lbz
    expect_stderr "lbmerge: 3.lbz: its parent $(uuid_of 2.lbz) is not among the archives given"
    qemu-img create -q -f qcow2 foreign.qcow2 20M
    lbctl enable foreign.qcow2
    dump foreign.lbz foreign.qcow2
    run_expect 3 lbmerge -o x.lbz 0.lbz 1.lbz foreign.lbz
    expect_stderr "lbmerge: foreign.lbz: belongs to the image $(header_of foreign.lbz .image_uuid); 0.lbz belongs to $(header_of 0.lbz .image_uuid)"
    run_expect 3 lbmerge -o x.lbz 0.lbz 1.lbz ./1.lbz
    expect_stderr "lbmerge: ./1.lbz: has the same UUID as 1.lbz, $(uuid_of 1.lbz); give only one of them"
    other=11111111-2222-4333-8444-555555555555
    run_expect 3 lbmerge --at=$other -o x.lbz 0.lbz 1.lbz
    expect_stderr "lbmerge: no archive with the UUID $other was given"
    qemu_write disk.qcow2 0 64k 9
    dump sha.lbz disk.qcow2 --incremental --digest=sha256
    run_expect 2 lbmerge -o x.lbz ?.lbz sha.lbz
    expect_stderr 'lbmerge: 0.lbz: has another digest algorithm than sha.lbz; archives of one chain that are read together must have the same'
    expect_absent x.lbz
    run_expect 2 lbmerge -o x.lbz
    expect_stderr_has 'lbmerge: at least one ARCHIVE is wanted'
    run_expect 2 script -q -e -c 'lbmerge 0.lbz' /dev/null
    expect_output_has 'lbmerge: an archive is not written to a terminal'
}

@test "damage in a frame that is moved is found, and named" {
    make_chain 1
    offset=$(lbz structures 0.lbz |
        jq '.[] | select(.name == "frame[2]") | .offset')
    printf '\0\0\0\0' | dd of=0.lbz bs=1 seek=$((offset + 100)) \
        conv=notrunc status=none
    run_expect 4 lbmerge -o x.lbz 0.lbz 1.lbz
    expect_stderr_has 'lbmerge: 0.lbz: damaged at offset '
    expect_absent x.lbz
    run_to y.lbz 4 lbmerge 0.lbz 1.lbz
    [ ! -s y.lbz ]
}

@test "--json has all that the manual names" {
    make_chain 2
    run_expect 0 lbmerge --json -o full.lbz 0.lbz 1.lbz 2.lbz
    expect_stderr ''
    read -r root uuid < <(lbz root full.lbz)
    jq -e --arg uuid "$uuid" --arg root "$root" \
        --argjson bytes "$(stat -c %s full.lbz)" '
        keys == ["archive", "archive_bytes", "frames_moved",
            "frames_rewritten", "index", "kind", "members", "parent", "root_digest",
            "uuid", "virtual_size"] and
        .archive == "full.lbz" and .kind == "full" and .members == 3 and
        .uuid == $uuid and .parent == null and .virtual_size == 20971520 and
        .archive_bytes == $bytes and .root_digest == $root' <<<"$output"
    run_to incr.lbz 0 lbmerge --json 1.lbz 2.lbz
    jq -e --arg parent "$(uuid_of 0.lbz)" '.archive == null and
        .kind == "incremental" and .members == 2 and .parent == $parent' \
        <<<"$stderr"
}

@test "SHA-256 chains merge, threads don't change a byte" {
    new_disk disk.qcow2 20M
    qemu_write disk.qcow2 0 10M 3
    dump 0.lbz disk.qcow2 --digest=sha256
    qemu_write disk.qcow2 1M 200k 4
    dump 1.lbz disk.qcow2 --digest=sha256 --incremental
    for threads in 1 2 9; do
        run_expect 0 lbmerge --threads=$threads -o m$threads.lbz ?.lbz
        cmp m1.lbz m$threads.lbz
    done
    good_archives m1.lbz
    expect_restores "$(content disk.qcow2)" m1.lbz
}
