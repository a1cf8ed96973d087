# lbvm list, show and verify: what a repository has, and whether it is whole.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm

plan='1000000:-,- 1003600:0,0 1007200:1,- 1010800:2,2'

@test "list tells the machines" {
    synth "$plan"
    vmrepo synth repo db '2000000:-' >/dev/null
    run_expect 0 lbvm list --json
    [ "$(jq -c '.machines[] | [.machine, .backups, .time]' <<<"$output")" = \
      '["db",1,2000000]
["web1",4,1010800]' ]
    run_expect 0 lbvm list
    [[ "${output%%$'\n'*}" = 'db  1 backup  '*'  newest 1970-01-24T03:33:20Z' ]]
    run_expect 0 lbvm list --repository=repo
}

@test "list tells the backups of a machine, and not what is kept for others" {
    synth "$plan"
    edit 1 '.kept_for = "others"'
    edit 2 '.quiesced = true'
    run_expect 0 lbvm list web1
    expect_stderr ''
    [ "$(wc -l <<<"$output")" = 3 ]
    expect_output_has "${ids[0]}  1970-01-12T13:46:40Z  " \
        ' vda (full), vdb (full)' '  quiesced  vda (incremental), vdb (full)'
    run_expect 0 lbvm list --json web1
    [ "$(jq -c '.backups[] | [.id, .quiesced, .disks[].kind]' \
        <<<"$output")" = "[\"${ids[0]}\",false,\"full\",\"full\"]
[\"${ids[2]}\",true,\"incremental\",\"full\"]
[\"${ids[3]}\",false,\"incremental\",\"incremental\"]" ]
    [ "$(jq '.backups[0].bytes == (.backups[0].disks | map(.bytes) | add)' \
        <<<"$output")" = true ]
}

@test "show tells a backup and its chains" {
    synth "$plan"
    run_expect 0 lbvm show --json web1
    [ "$(jq -r .id <<<"$output")" = "${ids[3]}" ]
    [ "$(jq -r '.disks[0].chain[].archive' <<<"$output" |
        sed 's|^|repo/web1/|')" = "$(vmrepo chain repo web1 "${ids[3]}" vda)" ]
    [ "$(jq -r '.disks[1].chain | map(.kind) | join(" ")' \
        <<<"$output")" = 'full incremental' ]
    run_expect 0 lbvm show web1 "${ids[0]}"
    expect_output_has "${ids[0]}" 'disk vda: 1.5 MiB, full' 'source        images'
    run_expect 1 lbvm show web1 nonsense
    expect_stderr "lbvm: repo/web1: has no backup 'nonsense'; 'lbvm list' shows them"
    rm "$(archive_of 0 vda)"
    run_expect 3 lbvm show web1
    expect_stderr "lbvm: $(archive_of 0 vda): is missing: the chain of disk 'vda' is broken"
}

@test "what is no repository or no machine is named" {
    run_expect 1 lbvm list
    expect_stderr 'lbvm: repo: is no repository: it has no repository.json'
    synth "$plan"
    run_expect 1 lbvm list web2
    expect_stderr "lbvm: repo: has no backups of a machine 'web2'"
    run_expect 2 lbvm list ../repo/web1
    expect_stderr_has "'../repo/web1' is no name of a machine"
    run_expect 2 env -u LBVM_REPOSITORY lbvm verify
    expect_stderr_has '--repository=PLACE is wanted, or LBVM_REPOSITORY in the environment'
}

@test "a manifest that leads outside is refused by all commands" {
    synth "$plan"
    edit 1 '.disks[0].archive = "../web2/archives/x.lbz"'
    for command in 'list web1' 'show web1' 'verify web1' \
                   'prune --keep-last=1 web1'; do
        expect_unchanged run_expect 4 lbvm $command
        expect_stderr "lbvm: $(manifest_of 1): disk 'vda': 'archive' is no file of the machine's folder 'archives'"
    done
}

@test "verify reads all archives, and records that they were good" {
    synth "$plan"
    run_expect 0 lbvm verify
    expect_output 'web1: 8 of 8 archives were read and are good'
    expect_stderr ''
    [ "$(jq '.archives | length' repo/web1/verified.json)" = 8 ]
    vmrepo check repo
    run_expect 0 lbvm verify --quiet web1
    expect_output ''
    run_expect 0 lbvm verify --json --id="${ids[1]}" web1
    [ "$(jq -c '.machines[0] | [.good, .verified, .damaged]' <<<"$output")" = \
      '[true,4,[]]' ]
}

@test "verify names a damaged archive, and the backups that need it" {
    synth "$plan"
    archive=$(archive_of 1 vda)
    flip "$archive" $(($(stat -c %s "$archive") / 2))
    run_expect 4 lbvm verify --json
    expect_stderr_has "lbvm: $archive: " \
        "lbvm: web1: ${archive#repo/web1/} is needed by: ${ids[1]}, ${ids[2]}, ${ids[3]}"
    [ "$(jq -c '.machines[0] | [.good, .verified, .damaged[0].backups]' \
        <<<"$output")" = \
      "[false,8,[\"${ids[1]}\",\"${ids[2]}\",\"${ids[3]}\"]]" ]
    [ "$(jq '.archives | length' repo/web1/verified.json)" = 7 ]
    run_expect 0 lbvm verify --id="${ids[0]}" web1
    run_expect 4 lbvm verify --id="${ids[3]}" web1
}

@test "verify finds what is missing, cut, or another archive" {
    synth "$plan"
    archive=$(archive_of 1 vdb)
    mv "$archive" away
    run_expect 4 lbvm verify
    expect_stderr "lbvm: $archive: is missing
lbvm: web1: ${archive#repo/web1/} is needed by: ${ids[1]}"
    head -c -1 away >"$archive"
    run_expect 4 lbvm verify
    expect_stderr_has "lbvm: $archive: has $(stat -c %s "$archive") bytes, and not the $(stat -c %s away) that were written"
    mv away "$archive"
    # a good archive in the place of another
    other=$(archive_of 2 vdb)
    cp "$other" "$archive"
    edit 1 ".disks[1].bytes = $(stat -c %s "$other")"
    run_expect 4 lbvm verify
    expect_stderr_has "lbvm: $archive: is not the archive that the backup's manifest tells of"
}

@test "verify finds a parent that is in no backup" {
    synth "$plan"
    parent=$(jq -r '.disks[0].checkpoint' "$(manifest_of 0)")
    rm "$(manifest_of 0)"
    run_expect 4 lbvm verify
    expect_stderr_has "lbvm: $(archive_of 1 vda): its parent $parent is in no backup" \
        "lbvm: $(archive_of 1 vdb): its parent "
}

@test "archives of different digests are no chain" {
    new_disk disk.qcow2 4M
    run_expect 0 lbvm backup -q web1 vda=disk.qcow2
    run_expect 0 lbvm backup --digest=sha256 web1 vda=disk.qcow2
    expect_stderr 'lbvm: web1: vda: a full backup: the last backup has the digest xxh3-128, and not sha256'
    run_expect 0 lbvm backup -q --digest=sha256 web1 vda=disk.qcow2
    run_expect 0 lbvm list --json web1
    [ "$(jq -r '.backups[].disks[0].kind' <<<"$output" | paste -sd' ')" = \
      'full full incremental' ]
    vmrepo check repo
    # as some other writer may have done it
    id=$(jq -r '.backups[2].id' <<<"$output")
    first=$(jq -r '.backups[0].id' <<<"$output")
    jq ".disks[0].parent = $(jq '.disks[0].checkpoint' \
        "repo/web1/backups/$first.json")" "repo/web1/backups/$id.json" >m
    mv m "repo/web1/backups/$id.json"
    archive=$(jq -r '.disks[0].archive' "repo/web1/backups/$id.json")
    run_expect 4 lbvm verify
    expect_stderr_has "lbvm: repo/web1/$archive: has another digest than its parent, and can't be read together with it"
    run_expect 3 lbvm show web1
    expect_stderr "lbvm: repo/web1: disk 'vda': $archive has another digest than its parent, and can't be read together with it"
    run_expect 3 lbvm prune --keep-last=1
    expect_stderr "lbvm: repo/web1: disk 'vda': $archive has another digest than its parent, and can't be read together with it"
}

@test "samples come round to all archives" {
    synth "$plan"
    for n in 2 4 6 8; do
        run_expect 0 lbvm verify --sample=25
        expect_output 'web1: 2 of 8 archives were read and are good'
        [ "$(jq '.archives | length' repo/web1/verified.json)" = $n ]
        # as if that had been a day ago
        jq '.archives |= map_values(.time -= 86400)' repo/web1/verified.json >v
        mv v repo/web1/verified.json
    done
    # the two that waited for longest, again
    oldest=$(jq -c '[.archives[].time] | sort' repo/web1/verified.json)
    run_expect 0 lbvm verify --sample=25
    [ "$(jq -c '[.archives[].time] | sort | .[0:6]' \
        repo/web1/verified.json)" = "$(jq -c '.[2:8]' <<<"$oldest")" ]
    # one that is bad is looked at each time
    archive=$(archive_of 3 vdb)
    flip "$archive" $(($(stat -c %s "$archive") / 2))
    run_expect 4 lbvm verify
    run_expect 4 lbvm verify --sample=1
}

@test "a record that is nonsense is no record" {
    synth "$plan"
    for text in '' '[]' '{"archives": 7}' \
                '{"archives": {"archives/x": 7}}'; do
        printf '%s' "$text" >repo/web1/verified.json
        run_expect 0 lbvm verify --sample=50
        [ "$(jq '.archives | length' repo/web1/verified.json)" = 4 ]
    done
    # a time to come would put the archive off until then
    run_expect 0 lbvm verify
    jq '.archives |= map_values(.time += 86400)' repo/web1/verified.json >v
    mv v repo/web1/verified.json
    run_expect 0 lbvm verify --sample=50
    [ "$(jq '.archives | length' repo/web1/verified.json)" = 4 ]
}

@test "several machines are verified, the bad ones not in the others' way" {
    synth "$plan"
    vmrepo synth repo db '2000000:-' >/dev/null
    vmrepo synth repo zoo '2000000:-' >/dev/null
    rm repo/db/archives/*
    run_expect 4 lbvm verify
    expect_output 'web1: 8 of 8 archives were read and are good
zoo: 1 of 1 archives were read and are good'
    run_expect 0 lbvm verify zoo web1
    run_expect 2 lbvm verify --id=x zoo web1
    expect_stderr_has '--id is of one MACHINE, 2 given'
}

@test "locks keep a pruning and who reads archives apart" {
    synth "$plan"
    flock -s repo/web1/lock lbvm verify -q
    run_expect 5 flock repo/web1/lock lbvm verify
    expect_stderr_has 'lbvm: repo/web1: a pruning of it is at work'
    run_expect 5 flock -s repo/web1/lock lbvm prune --keep-last=1
    expect_stderr_has 'lbvm: repo/web1: its archives are being read by another lbvm'
    run_expect 5 flock repo/web1/backup.lock lbvm prune --keep-last=1
    expect_stderr_has 'lbvm: repo/web1: a backup or a pruning of it is at work'
    flock repo/web1/lock lbvm list web1
    flock repo/web1/lock flock repo/web1/backup.lock \
        lbvm prune --dry-run --keep-last=1
}
