# lbvm restore and lbvm export: the disks of a backup, all or none of them.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm

teardown() {
    let_go
}

# Three backups of two disks, an hour apart.
three_backups() {
    synth '1790000000:-,- 1790003600:0,0 1790007200:1,1'
}

# sum_of NUMBER DISK: what the backup's disk must restore to.
sum_of() {
    awk -v id="${ids[$1]}" -v disk="$2" \
        '$1 == id && $2 == disk { print $3, $4 }' content
}

# expect_disk NUMBER DISK FILE [FORMAT]: restored as the oracle says.
expect_disk() {
    qemu-img convert -f "${4:-qcow2}" -O raw "$3" judged.raw
    run_command=(sum_of "$1" "$2")
    [ "$(stat -c %s judged.raw) $(sha256sum <judged.raw | cut -d' ' -f1)" = \
        "$(sum_of "$1" "$2")" ] || fail "$3 is not disk $2 of ${ids[$1]}"
}

# give_definition NUMBER TEXT: the backup has that definition.
give_definition() {
    printf '%s\n' "$2" >"repo/web1/definitions/${ids[$1]}.xml"
    edit "$1" ".definition = \"definitions/${ids[$1]}.xml\""
}

# Two backups of images, whose archives have frames that are all needed; $first
# is what vdb was at the first.
with_frames() {
    local disk
    for disk in vda vdb; do
        new_disk $disk.qcow2 2M
        qemu_write $disk.qcow2 0 100k 7
    done
    run_expect 0 lbvm backup -q web1 vda.qcow2 vdb.qcow2
    ids=("$(lbvm show --json web1 | jq -r .id)")
    first=$(content vdb.qcow2)
    for disk in vda vdb; do
        qemu_write $disk.qcow2 1M 100k 8
    done
    run_expect 0 lbvm backup -q web1 vda.qcow2 vdb.qcow2
    ids+=("$(lbvm show --json web1 | jq -r .id)")
}

# damage NUMBER DISK: a bit of the archive's first frame.
damage() {
    local archive offset
    archive=$(archive_of "$1" "$2")
    offset=$(lbz structures "$archive" |
        jq -e '.[] | select(.name == "frame[0]").offset')
    flip "$archive" $((offset + 12))
}

# ------------------------------------------------------------------- restore

@test "the newest backup, with its definition" {
    three_backups
    give_definition 2 '<domain/>'
    run_expect 0 lbvm restore -o out web1
    expect_stderr ''
    expect_output_has "web1: vda: out/vda.qcow2
web1: vdb: out/vdb.qcow2
web1: definition: out/web1.xml
web1: ${ids[2]}: 2 disks restored, "
    [ "$(ls -A out)" = "vda.qcow2
vdb.qcow2
web1.xml" ]
    for disk in vda vdb; do
        expect_disk 2 $disk out/$disk.qcow2
        good_image out/$disk.qcow2
    done
    [ "$(cat out/web1.xml)" = '<domain/>' ]
}

@test "an older one: by ID, by the start of one, by time" {
    three_backups
    run_expect 0 lbvm restore -q -o a web1 "${ids[0]}"
    expect_output ''
    expect_disk 0 vda a/vda.qcow2
    run_expect 0 lbvm restore -q -o b/ web1 "${ids[1]%????}"
    expect_disk 1 vdb b/vdb.qcow2
    run_expect 0 lbvm restore -q -o c --at @1790007199 web1
    expect_disk 1 vda c/vda.qcow2
    run_expect 1 lbvm restore -o d --at @1789999999 web1
    expect_stderr 'lbvm: repo/web1: has no backup of 2026-09-21T14:13:19Z or before it'
    run_expect 1 lbvm restore -o d web1 2031
    expect_stderr "lbvm: repo/web1: has no backup '2031'; 'lbvm list' shows them"
    expect_absent d
}

@test "some of the disks" {
    three_backups
    run_expect 0 lbvm restore -q --disk vdb -o out web1
    [ "$(ls -A out)" = vdb.qcow2 ]
    expect_disk 2 vdb out/vdb.qcow2
    run_expect 1 lbvm restore --disk vdb --disk vdc -o new web1
    expect_stderr "lbvm: web1: ${ids[2]} has no disk 'vdc'; it has 'vda', 'vdb'"
    run_expect 2 lbvm restore --disk vdb --disk vdb -o new web1
    expect_stderr "lbvm: disk 'vdb' is named twice"
    expect_absent new
}

@test "a summary in JSON" {
    three_backups
    give_definition 2 '<domain/>'
    run_expect 0 lbvm restore --json -o out web1
    jq -e --arg id "${ids[2]}" '.machine == "web1" and .id == $id and
        .time == 1790007200 and .definition == "out/web1.xml" and
        [.disks[] | .name, .file, .format, .size] ==
        ["vda", "out/vda.qcow2", "qcow2", 1572864,
         "vdb", "out/vdb.qcow2", "qcow2", 1572864]' <<<"$output"
    [ "$(jq -r '.disks[].checkpoint' <<<"$output")" = \
        "$(jq -r '.disks[].checkpoint' "$(manifest_of 2)")" ]
}

@test "as raw disks" {
    three_backups
    run_expect 0 lbvm restore -q --format raw -o out web1
    expect_disk 2 vda out/vda.qcow2 raw
}

@test "what exists stays, unless it is to be replaced" {
    three_backups
    give_definition 2 '<domain/>'
    mkdir out
    echo precious >out/vdb.qcow2
    run_expect 1 lbvm restore -o out web1
    expect_stderr 'lbvm: out/vdb.qcow2: already exists; --force replaces it'
    [ "$(ls -A out)" = vdb.qcow2 ]
    [ "$(cat out/vdb.qcow2)" = precious ]
    rm out/vdb.qcow2
    echo precious >out/web1.xml
    run_expect 1 lbvm restore -o out web1
    expect_stderr 'lbvm: out/web1.xml: already exists; --force replaces it'
    [ "$(ls -A out)" = web1.xml ]
    run_expect 0 lbvm restore -q --force -o out web1
    expect_disk 2 vdb out/vdb.qcow2
    [ "$(cat out/web1.xml)" = '<domain/>' ]
    run_expect 0 lbvm restore -q --force -o out web1
}

@test "a disk that a guest uses is not replaced, and no other either" {
    three_backups
    run_expect 0 lbvm restore -q -o out web1 "${ids[0]}"
    hold_open out/vdb.qcow2
    run_expect 5 lbvm restore -q --force -o out web1
    expect_stderr 'lbvm: out/vdb.qcow2: the image is in use by another process'
    let_go
    expect_disk 0 vda out/vda.qcow2
    [ "$(ls -A out)" = "vda.qcow2
vdb.qcow2" ]
}

@test "a missing link: nothing is begun" {
    three_backups
    missing=$(archive_of 1 vdb)
    rm "$missing"
    run_expect 3 lbvm restore -o out web1
    expect_stderr "lbvm: disk 'vdb': $missing: is missing: the chain of disk 'vdb' is broken
lbvm: web1: 'lbvm verify web1' tells which backups are whole; an ID chooses an older one, --disk disks that are"
    expect_absent out
    run_expect 0 lbvm restore -q --disk vda -o out web1
    expect_disk 2 vda out/vda.qcow2
}

@test "a damaged archive: no disk gets its name, and no folder is left" {
    with_frames
    damage 1 vdb
    for threads in 1 2 8; do
        run_expect 4 lbvm restore --threads $threads -o out web1
        expect_stderr_has "lbvm: disk 'vdb': $(archive_of 1 vdb): damaged at offset " \
            "lbvm: web1: 'lbvm verify web1' tells which backups are whole"
        expect_absent out
    done
    mkdir out
    echo old >out/vda.qcow2
    run_expect 4 lbvm restore --force -o out web1
    [ "$(ls -A out)" = vda.qcow2 ]
    [ "$(cat out/vda.qcow2)" = old ]
    # what is before is whole
    run_expect 0 lbvm restore -q --force -o out web1 "${ids[0]}"
    expect_content "$first" out/vdb.qcow2
}

@test "an archive that the manifest does not tell of is refused" {
    three_backups
    cp "$(archive_of 0 vda)" "$(archive_of 0 vdb)"
    run_expect 3 lbvm restore -o out web1
    expect_stderr_has "lbvm: disk 'vdb': "
    edit 2 '.disks[0].root = ("0" * 32)'
    run_expect 4 lbvm restore --disk vda -o out web1
    expect_stderr_has "lbvm: disk 'vda': $(archive_of 2 vda): is not the archive that the backup's manifest tells of"
    expect_absent out
}

@test "a definition that is lost" {
    three_backups
    give_definition 2 '<domain/>'
    rm repo/web1/definitions/*
    run_expect 4 lbvm restore -o out web1
    expect_stderr_has "lbvm: repo/web1/definitions/${ids[2]}.xml: the machine's definition is missing; --no-definition restores the disks without it"
    expect_absent out
    run_expect 0 lbvm restore -q --no-definition -o out web1
    [ "$(ls -A out)" = "vda.qcow2
vdb.qcow2" ]
}

@test "two images of the same name go by the disks' names" {
    three_backups
    edit 2 '.disks[0].filename = "/a/disk.qcow2" |
            .disks[1].filename = "/b/disk.qcow2" | .disks[1].name = "vd/b"'
    run_expect 0 lbvm restore -q -o out web1
    [ "$(ls -A out)" = "vd_b.qcow2
vda.qcow2" ]
    # the same name whichever are restored
    run_expect 0 lbvm restore -q --disk vda -o one web1
    [ "$(ls -A one)" = vda.qcow2 ]
    # a file that has no name of its own, and one that collides
    edit 2 '.disks[0].filename = "/images/.." |
            .disks[1].filename = "/images/vda.qcow2"'
    run_expect 1 lbvm restore -o new web1
    expect_stderr "lbvm: new/vda.qcow2: would be both disk 'vda' and disk 'vd/b'; restore them one by one, with --disk"
    give_definition 2 '<domain/>'
    edit 2 '.disks[0].filename = "/images/web1.xml"'
    run_expect 1 lbvm restore -o new web1
    expect_stderr "lbvm: new/web1.xml: would be both disk 'vda' and the definition; use --no-definition"
    expect_absent new
}

@test "nothing leaves the folder, whatever a manifest says" {
    three_backups
    edit 2 '.disks[0].filename = "../../../evil.qcow2" | .disks[1].filename = "x/"'
    mkdir -p deep/er
    run_expect 0 lbvm restore -q -o deep/er/out web1
    [ "$(find deep -type f | sort)" = "deep/er/out/evil.qcow2
deep/er/out/vdb.qcow2" ]
}

@test "in their original place" {
    new_disk vda.qcow2 2M
    new_disk vdb.qcow2 3M
    qemu_write vda.qcow2 0 100k 7
    run_expect 0 lbvm backup -q web1 vda.qcow2 vdb.qcow2
    was=$(content vda.qcow2)
    run_expect 1 lbvm restore --in-original-place web1
    expect_stderr "lbvm: $PWD/vda.qcow2: already exists; --force replaces it"
    mv vda.qcow2 lost.qcow2
    run_expect 0 lbvm restore --in-original-place --disk vda web1
    expect_output_has "web1: vda: $PWD/vda.qcow2"
    expect_content "$was" vda.qcow2
    good_image vda.qcow2
    qemu_write vda.qcow2 1M 64k 9
    run_expect 0 lbvm restore --in-original-place --force web1
    expect_content "$was" vda.qcow2
    # where they are not known
    manifest=$(echo repo/web1/backups/*.json)
    jq '.disks[0].filename = "vda.qcow2"' "$manifest" >edited.json
    mv edited.json "$manifest"
    run_expect 1 lbvm restore --in-original-place --force web1
    expect_stderr "lbvm: disk 'vda': where it was, 'vda.qcow2', is no path of a file; use -o FOLDER"
}

@test "after a restore the next backup is an incremental" {
    new_disk vda.qcow2 2M
    run_expect 0 lbvm backup -q web1 vda.qcow2
    qemu_write vda.qcow2 0 100k 7
    run_expect 0 lbvm backup -q web1 vda.qcow2
    mv vda.qcow2 lost.qcow2
    run_expect 0 lbvm restore -q --in-original-place web1
    qemu_write vda.qcow2 1M 64k 9
    run_expect 0 lbvm backup -q web1 vda.qcow2
    expect_stderr ''
    run_expect 0 lbvm show --json web1
    [ "$(jq -r '.disks[0].kind' <<<"$output")" = incremental ]
    [ "$(jq '.disks[0].chain | length' <<<"$output")" = 3 ]
    run_expect 0 lbvm restore -q -o out web1
    expect_same vda.qcow2 qcow2 out/vda.qcow2 qcow2
}

@test "while a pruning is at work, and while another restore is" {
    three_backups
    exec {lock}>repo/web1/lock
    flock -x "$lock"
    run_expect 5 lbvm restore -o out web1
    expect_stderr_has 'lbvm: repo/web1: a pruning of it is at work'
    flock -u "$lock"
    flock -s "$lock"
    run_expect 0 lbvm restore -q -o out web1
    exec {lock}>&-
}

@test "killed at any moment: only whole disks have names" {
    three_backups
    for n in {1..12}; do
        rm -rf out
        mkdir out
        # the n-th of the calls that write, sync or name a file
        run_expect signal:KILL strace -f -q -o trace \
            -e trace=pwrite64,fsync,renameat2 \
            -e "inject=pwrite64,fsync,renameat2:signal=KILL:when=$n" \
            lbvm restore -q --threads 1 -o out web1
        for file in out/*.qcow2; do
            if [ -e "$file" ]; then
                expect_disk 2 "$(basename "$file" .qcow2)" "$file"
            fi
        done
    done
    run_expect 0 lbvm restore -q --force -o out web1
}

@test "interrupted, or without space: nothing is left" {
    with_frames
    lbvm restore --rate-limit 1 --threads 2 -o out web1 2>messages \
        3>&- 4>&- &
    pid=$!
    while ! compgen -G 'out/.vdb.qcow2.*.tmp' >/dev/null; do
        kill -0 $pid
        sleep 0.02
    done
    kill -TERM $pid
    status=0
    wait $pid || status=$?
    [ "$status" -eq 1 ]
    grep -qx "lbvm: disk 'vd[ab]': interrupted" messages
    [ "$(wc -l <messages)" = 1 ]
    expect_absent out
    run_expect 1 bash -c 'ulimit -f 100; exec lbvm restore -o out web1'
    expect_stderr_has "lbvm: disk 'vd" ": out/vd" "File too large"
    expect_absent out
}

@test "what is wrong on the command line" {
    three_backups
    run_expect 2 lbvm restore web1
    expect_stderr "lbvm: -o FOLDER or --in-original-place is wanted
Try 'lbvm restore --help'."
    run_expect 2 lbvm restore -o out --in-original-place web1
    expect_stderr_has 'lbvm: -o and --in-original-place are not wanted both'
    run_expect 2 lbvm restore -o out
    expect_stderr_has 'lbvm: a MACHINE and at most one ID are wanted, 0 words given'
    run_expect 2 lbvm restore -o out --at @5 web1 2026
    expect_stderr_has 'lbvm: an ID and --at are not wanted both'
    run_expect 2 lbvm restore -o '' web1
    expect_stderr_has "lbvm: -o: '' is no folder"
    run_expect 1 lbvm restore -o out web2
    expect_stderr "lbvm: repo: has no backups of a machine 'web2'"
    echo file >file
    run_expect 1 lbvm restore -o file web1
    expect_stderr 'lbvm: file: Not a directory'
    run_expect 1 lbvm restore -o no/where web1
    expect_stderr 'lbvm: no/where: No such file or directory'
}

# -------------------------------------------------------------------- export

@test "export: one disk, in the format of the name or the one that is given" {
    three_backups
    run_expect 0 lbvm export --disk vdb -o x.qcow2 web1
    expect_output ''
    expect_stderr ''
    expect_disk 2 vdb x.qcow2
    good_image x.qcow2
    run_expect 0 lbvm export --disk vdb -o x.raw web1 "${ids[0]}"
    expect_disk 0 vdb x.raw raw
    run_expect 0 lbvm export --disk vda --format raw -o y.qcow2 \
        --at @1790003600 web1
    expect_disk 1 vda y.qcow2 raw
    run_expect 2 lbvm export --disk vda -o x.raw web1
    expect_stderr 'lbvm: x.raw: already exists; --force replaces it'
    run_expect 0 lbvm export --force --disk vda -o x.raw web1
    expect_disk 2 vda x.raw raw
}

@test "export: raw through a pipe, and to a file that is sparse" {
    three_backups
    for n in 0 1 2; do
        for disk in vda vdb; do
            run_expect 0 bash -c \
                'lbvm export --disk "$0" web1 "$1" | cat >p.raw' \
                $disk "${ids[n]}"
            expect_stderr ''
            expect_disk $n $disk p.raw raw
        done
    done
    run_to f.raw 0 lbvm export --disk vda --json web1
    cmp f.raw <(lbvm export --disk vda web1)
    jq -e '.file == null and .format == "raw" and .name == "vda"' <<<"$stderr"
    # appended to a file that is empty
    : >a.raw
    run_expect 0 bash -c 'lbvm export --disk vda web1 >>a.raw'
    cmp f.raw a.raw
    run_expect 2 bash -c 'lbvm export --disk vda web1 >>a.raw'
    expect_stderr 'lbvm: standard output: the file is not empty, and a disk can'\''t be appended to it'
    cmp f.raw a.raw
}

@test "export: a disk of odd size that shrank and grew, in one stream" {
    new_disk vda.qcow2 5000192
    qemu_write vda.qcow2 4M 805888 3
    run_expect 0 lbvm backup -q web1 vda.qcow2
    for i in {1..9}; do
        # overlaps frames of the archives before, in the middle of each
        change vda.qcow2 "write -P $((i + 10)) $((i * 130))k 64k" \
            "write -z $((4200 + i * 10))k 64k"
        run_expect 0 lbvm backup -q web1 vda.qcow2
    done
    qemu-img convert -f qcow2 -O raw vda.qcow2 want.raw
    run_to got.raw 0 lbvm export web1
    cmp want.raw got.raw
    lbvm export web1 | cmp - want.raw
    [ "$(stat -c %b got.raw)" -lt "$(($(stat -c %s got.raw) / 512))" ]
}

@test "export: what fails is no disk" {
    with_frames
    damage 1 vda
    run_to x.raw 4 lbvm export --disk vda web1
    [ ! -s x.raw ]
    expect_stderr_has "lbvm: $(archive_of 1 vda): damaged at offset "
    run_expect 4 lbvm export --disk vda -o x.qcow2 web1
    expect_absent x.qcow2
    run_expect 1 bash -c 'lbvm export --disk vdb web1 >/dev/full'
    expect_stderr 'lbvm: standard output: writing: No space left on device'
    run_expect 1 bash -c 'set -o pipefail; lbvm export --disk vdb web1 | :'
    expect_stderr 'lbvm: standard output: writing: Broken pipe'
}

@test "export: what is wrong on the command line" {
    three_backups
    run_expect 2 lbvm export web1
    expect_stderr "lbvm: web1: ${ids[2]} has 2 disks; --disk=NAME is wanted"
    run_expect 2 lbvm export --disk vda --format qcow2 web1
    expect_stderr "lbvm: a qcow2 image can't be written to standard output; use -o FILE, or --format=raw
Try 'lbvm export --help'."
    run_expect 2 script -qec 'lbvm export --disk vda web1' /dev/null
    expect_output_has "a disk is not written to a terminal; redirect it, or use -o FILE"
    run_expect 1 lbvm export --disk vdx web1
    expect_stderr "lbvm: web1: ${ids[2]} has no disk 'vdx'; it has 'vda', 'vdb'"
}
