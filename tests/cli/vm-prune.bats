# lbvm prune: what is kept restores to what it was, and the rest is gone.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm

@test "300 hourly backups become 7 daily and 4 weekly ones" {
    new_disk disk.qcow2 4M
    vmrepo dump repo web1 disk.qcow2 300 3600 1790000000 >content
    # Monday 2026-09-21 14:13:20 to Sunday 2026-10-04 01:13:20
    run_expect 0 lbvm prune --keep-daily=7 --keep-weekly=4 web1
    expect_stderr ''
    # the 4th and six days before, all of one week; then that before
    mapfile -t kept < <(cut -d' ' -f1 content | grep -E \
        '^(20261004T01|20261003T23|20261002T23|20261001T23|20260930T23|20260929T23|20260928T23|20260927T23)')
    [ "${#kept[@]}" = 8 ]
    expect_kept "${kept[@]}"
    [ "$(find repo/web1/archives repo/web1/backups -type f | wc -l)" = 16 ]
    run_expect 0 lbvm verify
    # and the next backup goes on from the newest
    run_expect 0 lbvm prune --keep-last=1
    expect_kept "${kept[7]}"
}

@test "fifty days, pruned each night: 7 daily and 4 weekly ones, each restored" {
    new_disk disk.qcow2 4M
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/cli/vm_long_prune.py" \
        disk.qcow2 content
    mapfile -t kept < <(cut -d' ' -f1 content)
    [ "${#kept[@]}" = 11 ]
    expect_kept "${kept[@]}"
    while read -r id _ _ sum; do
        run_expect 0 lbvm restore -q --format=raw -o "restored-$id" web1 "$id"
        [ "$(cat "restored-$id"/* | sha256sum | cut -d' ' -f1)" = "$sum" ]
    done <content
    run_expect 0 lbvm verify
}

@test "backups of lbvm go on after a pruning" {
    new_disk disk.qcow2 4M
    for n in 1 2 3 4 5; do
        change disk.qcow2 "write -P $n $((n * 100))k 300k" 'write -z 0 64k'
        run_expect 0 lbvm backup -q web1 vda=disk.qcow2
        state[n]=$(content disk.qcow2)
    done
    run_expect 0 lbvm prune --keep-last=2
    expect_output_has 'web1: 2 kept, 3 dropped; '
    vmrepo check repo
    change disk.qcow2 'write -P 77 1M 100k'
    state[6]=$(content disk.qcow2)
    run_expect 0 lbvm backup --json web1 vda=disk.qcow2
    [ "$(jq .disks[0].parent <<<"$output")" != null ]
    run_expect 0 lbvm list --json web1
    [ "$(jq -r '.backups[].disks[0].kind' <<<"$output" | paste -sd' ')" = \
      'full incremental incremental' ]
    n=4
    for id in $(jq -r '.backups[].id' <<<"$output"); do
        mapfile -t chain < <(vmrepo chain repo web1 "$id" vda)
        expect_restores "${state[n]}" "${chain[@]}"
        n=$((n + 1))
    done
    run_expect 0 lbvm verify
}

@test "frames are moved, all archives that are dropped in one pass" {
    synth '1000000:- 1003600:0 1007200:1 1010800:2 1014400:3'
    zstd_frames() {
        "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/oracle/lbz.py" dump "$1" |
            jq -r '.pages[].frames[].compressed_digest'
    }
    for n in 0 1 2 3; do
        zstd_frames "$(archive_of $n vda)"
    done | sort -u >before
    run_expect 0 lbvm prune --json --keep-last=2
    [ "$(jq -c '.machines[0] | [.archives_merged, .dry_run]' \
        <<<"$output")" = '[3,false]' ]
    expect_kept "${ids[3]}" "${ids[4]}"
    zstd_frames "$(archive_of 3 vda)" | sort -u >after
    [ "$(comm -13 before after)" = '' ]
    [ -s after ]
}

@test "only what is dropped in between is merged" {
    synth '1000000:-,- 1003600:0,0 1007200:1,1 1010800:2,- 1100000:3,3 1200000:4,4'
    full=$(sha256sum "$(archive_of 0 vda)")
    edit 0 '.time = 1000000'
    run_expect 0 lbvm prune --keep-daily=3
    # the newest of each of three days
    expect_kept "${ids[3]}" "${ids[4]}" "${ids[5]}"
    [ "$(jq -c '[.disks[].parent]' "$(manifest_of 3)")" = '[null,null]' ]
    [ ! -e "${full##* }" ]
}

@test "a backup that several go on from is held, and goes when that ends" {
    # 1 has two children: 2, and 3 (of a restored image)
    synth '1000000:- 1003600:0 1007200:1 1010800:1 1014400:3'
    run_expect 0 lbvm prune --json --keep-last=3
    [ "$(jq -r '.machines[0].backups[] | .action' <<<"$output" |
        paste -sd' ')" = 'drop hold keep keep keep' ]
    expect_kept "${ids[2]}" "${ids[3]}" "${ids[4]}"
    [ "$(jq -r .kept_for "$(manifest_of 1)")" = \
      "its archives are needed by ${ids[2]}, ${ids[3]}" ]
    expect_unchanged run_expect 0 lbvm prune --keep-last=3
    expect_output_has 'web1: 3 kept, 0 dropped, 1 held for others'
    run_expect 1 lbvm show web1 "${ids[1]}"
    run_expect 0 lbvm prune --keep-last=1
    expect_kept "${ids[4]}"
    [ ! -e "$(manifest_of 1)" ]
}

@test "a disk that several go on from holds all disks of its backup" {
    synth '1000000:-,- 1003600:0,0 1007200:1,1 1010800:1,2 1014400:3,3'
    run_expect 0 lbvm prune --keep-last=3
    expect_kept "${ids[2]}" "${ids[3]}" "${ids[4]}"
    [ "$(jq -c '.disks | map(.name)' "$(manifest_of 1)")" = '["vda","vdb"]' ]
    # a branch that ends is no reason
    run_expect 0 lbvm prune --keep-last=2
    expect_kept "${ids[3]}" "${ids[4]}"
}

@test "the newest backup is never dropped, also where the clock went back" {
    synth '1000000:- 1100000:0 1003600:1'
    run_expect 0 lbvm prune --json --keep-yearly=1
    [ "$(jq -c '.machines[0].backups[] | [.id, .action, .rule]' \
        <<<"$output")" = "[\"${ids[0]}\",\"drop\",null]
[\"${ids[1]}\",\"keep\",\"yearly\"]
[\"${ids[2]}\",\"keep\",\"newest\"]" ]
    expect_kept "${ids[1]}" "${ids[2]}"
}

@test "each chain label has a retention of its own" {
    synth '1000000:- 1003600:0 1007200:- 1010800:1 1014400:2'
    for n in 2 4; do
        edit $n '.label = "weekly"'
    done
    run_expect 0 lbvm prune --keep-last=1
    expect_kept "${ids[3]}" "${ids[4]}"
}

@test "--dry-run tells what would be done, and does nothing" {
    synth '1000000:- 1003600:0 1007200:1'
    expect_unchanged run_expect 0 lbvm prune --dry-run --keep-last=1
    expect_output "web1: drop ${ids[0]}
web1: drop ${ids[1]}
web1: keep ${ids[2]}: last
web1: 1 kept, 2 dropped (nothing was done)"
    expect_unchanged run_expect 0 lbvm prune --dry-run --json --keep-last=1
    [ "$(jq -c '.machines[0] | [.dry_run, .bytes_after]' <<<"$output")" = \
      '[true,null]' ]
}

@test "without a rule nothing is pruned" {
    synth '1000000:- 1003600:0'
    for arguments in '' '--keep-last=0' '--keep-daily=0 --dry-run'; do
        expect_unchanged run_expect 2 lbvm prune $arguments web1
        expect_stderr_has 'what is to be kept is wanted, as --keep-daily=7: without it, all backups but the newest would go'
    done
    run_expect 2 lbvm prune --keep-last=-1
    expect_stderr_has "--keep-last: '-1' is no number from 0 to 1000000"
}

@test "leftovers go, and nothing else does" {
    synth '1000000:- 1003600:0'
    touch repo/web1/archives/old.lbz repo/web1/archives/.x.lbz.aB3dEf.tmp \
        repo/web1/definitions/old.xml repo/web1/notes
    run_expect 0 lbvm prune --keep-last=5
    expect_output_has 'web1: 2 kept, 0 dropped; '
    expect_kept "${ids[@]}"
    [ -e repo/web1/notes ]
}

@test "definitions of dropped backups go too" {
    synth '1000000:- 1003600:0'
    for n in 0 1; do
        echo "<domain/>" >"repo/web1/definitions/${ids[$n]}.xml"
        edit $n ".definition = \"definitions/${ids[$n]}.xml\""
    done
    run_expect 0 lbvm prune --keep-last=1
    expect_kept "${ids[1]}"
    [ "$(ls repo/web1/definitions)" = "${ids[1]}.xml" ]
}

@test "a damaged archive stops the pruning, and nothing is deleted" {
    synth '1000000:- 1003600:0 1007200:1 1010800:2'
    archive=$(archive_of 1 vda)
    flip "$archive" $(($(stat -c %s "$archive") / 2))
    expect_unchanged run_expect 4 lbvm prune --keep-last=1
    expect_stderr_has "lbvm: $archive: "
    flip "$archive" $(($(stat -c %s "$archive") / 2))
    run_expect 0 lbvm prune --keep-last=1
    expect_kept "${ids[3]}"
}

@test "an archive in the place of another stops the pruning" {
    synth '1000000:- 1003600:0 1007200:1 1010800:2'
    edit 1 '.disks[0].root = "0123456789abcdef0123456789abcdef"'
    expect_unchanged run_expect 4 lbvm prune --keep-last=1
    expect_stderr "lbvm: $(archive_of 1 vda): is not the archive that the backup's manifest tells of"
    edit 1 '.disks[0].bytes += 1'
    expect_unchanged run_expect 4 lbvm prune --keep-last=1
    expect_stderr_has "lbvm: $(archive_of 1 vda): has "
}

@test "an incomplete chain stops the pruning, and nothing is deleted" {
    synth '1000000:- 1003600:0 1007200:1 1010800:2'
    mv "$(archive_of 1 vda)" away
    for keep in 1 4; do
        expect_unchanged run_expect 3 lbvm prune --keep-last=$keep
        expect_stderr "lbvm: $(archive_of 1 vda): is missing: the chain of disk 'vda' is broken"
    done
    mv away "$(archive_of 1 vda)"
    mv "$(manifest_of 0)" away
    expect_unchanged run_expect 3 lbvm prune --keep-last=1
    expect_stderr_has "lbvm: repo/web1: disk 'vda': the chain is broken: the parent "
    mv away "$(manifest_of 0)"
    # parents in a circle
    edit 0 ".disks[0].parent = $(jq '.disks[0].checkpoint' "$(manifest_of 3)")"
    expect_unchanged run_expect 4 lbvm prune --keep-last=1
    expect_stderr "lbvm: repo/web1: disk 'vda': the parents of its archives run in a circle"
}

@test "a broken backup that nobody needs is dropped like others" {
    synth '1000000:- 1003600:0 1007200:- 1010800:2'
    rm "$(archive_of 0 vda)"
    run_expect 0 lbvm prune --keep-last=2
    expect_kept "${ids[2]}" "${ids[3]}"
}

@test "random histories, branches and policies" {
    run_expect 0 "$ORACLE_PYTHON" -B \
        "$abs_top_srcdir/tests/cli/vm_random_prune.py"
    expect_stderr ''
}

# again NAME COMMAND...: until the file `stop` is there; its statuses, and what
# it said other than that it had to wait, are in NAME.statuses and NAME.errors.
again() {
    local name=$1
    shift
    while [ ! -e stop ]; do
        status=0
        "$@" >/dev/null 2>"$name.error" || status=$?
        echo $status >>"$name.statuses"
        grep -v 'try again when that has ended$' "$name.error" \
            >>"$name.errors" || true
    done
}

@test "backups, prunings, verifications and listings at the same time" {
    new_disk disk.qcow2 4M
    run_expect 0 lbvm backup -q web1 vda=disk.qcow2
    for command in 'prune --keep-last=3' 'verify --threads=1' 'list' 'show'; do
        again "${command%% *}" lbvm $command web1 </dev/null 3>&- &
    done
    for n in {1..25}; do
        qemu_write disk.qcow2 "${n}00k" 64k "$n"
        state[n]=$(content disk.qcow2)
        until run -0 lbvm backup -q web1 vda=disk.qcow2; do
            [ "$status" = 5 ]
        done 2>/dev/null
    done
    touch stop
    wait
    for name in prune verify list show; do
        [ ! -s $name.errors ] || fail "$name: $(cat $name.errors)"
        grep -q '^0$' $name.statuses
    done
    [ "$(sort -u prune.statuses verify.statuses | grep -vx '[05]')" = '' ]
    [ "$(sort -u list.statuses show.statuses)" = 0 ]
    run_expect 0 lbvm prune --keep-last=3
    vmrepo check repo
    run_expect 0 lbvm list --json web1
    n=23
    for id in $(jq -r '.backups[].id' <<<"$output"); do
        mapfile -t chain < <(vmrepo chain repo web1 "$id" vda)
        expect_restores "${state[n]}" "${chain[@]}"
        n=$((n + 1))
    done
    [ $n = 26 ]
}
