# Repositories of lbvm. A test begins with
#     load helpers
#     load backup
#     load vm
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

export LBVM_REPOSITORY=repo

# The second implementation, made from docs/repository.md.
vmrepo() {
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/oracle/vmrepo.py" "$@"
}

# synth PLAN: the repository `repo` with backups of machine `web1`; see
# vmrepo.py. The file `content` tells what each must restore to, ids[n] its ID.
synth() {
    rm -rf repo
    vmrepo synth repo web1 "$1" >content
    mapfile -t ids < <(cut -d' ' -f1 content | uniq)
}

# expect_kept ID...: these backups are listed, no others; each restores, by the
# oracle and by lbrestore, to what it was; nothing is left over.
expect_kept() {
    local id disk size sum chain
    vmrepo check repo
    run_expect 0 lbvm list --json web1
    [ "$(jq -r '.backups[].id' <<<"$output")" = "$(printf '%s\n' "$@")" ]
    for id; do
        grep "^$id " content
    done >want
    vmrepo content repo web1 >got
    diff want got
    while read -r id disk size sum; do
        mapfile -t chain < <(vmrepo chain repo web1 "$id" "$disk")
        lbrestore -q --force -o disk.raw "${chain[@]}"
        [ "$(stat -c %s disk.raw)" = "$size" ]
        [ "$(sha256sum <disk.raw | cut -d' ' -f1)" = "$sum" ]
    done <want
}

# expect_unchanged COMMAND...: no file of the repository is another.
expect_unchanged() {
    local before
    before=$(repo_state)
    "$@"
    [ "$(repo_state)" = "$before" ] || fail "the repository has changed"
}

repo_state() {
    find repo -type f ! -name lock ! -name backup.lock -print0 | sort -z |
        xargs -0 sha256sum
}

# archive_of NUMBER DISK: the path of its archive; manifest_of NUMBER.
manifest_of() {
    echo "repo/web1/backups/${ids[$1]}.json"
}

archive_of() {
    echo "repo/web1/$(jq -r --arg disk "$2" \
        '.disks[] | select(.name == $disk).archive' "$(manifest_of "$1")")"
}

# edit NUMBER FILTER: the manifest, changed by jq.
edit() {
    jq "$2" "$(manifest_of "$1")" >edited.json
    mv edited.json "$(manifest_of "$1")"
}
