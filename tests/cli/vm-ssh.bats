# lbvm with a repository on another host, through ssh.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm
load ssh

setup() {
    helpers_setup
    export LBVM_REPOSITORY=
    export TMPDIR=$PWD/temporary
    mkdir temporary
}

backup() {
    run_expect 0 lbvm backup --repository="$far" web1 disk.qcow2
}

# What the oracle finds on the other host is sound, and what the newest backup
# restores to is the disk.
expect_disk() {
    local id chain
    vmrepo check far
    id=$(lbvm list --repository=far --json web1 | jq -r '.backups[-1].id')
    mapfile -t chain < <(vmrepo chain far web1 "$id" disk)
    good_archives "${chain[@]}"
    run_expect 0 lbrestore --quiet --force -o restored.raw "${chain[@]}"
    qemu-img convert -f qcow2 -O raw disk.qcow2 disk.raw
    cmp restored.raw disk.raw
}

kind() {
    lbvm show --repository=far --json web1 |
        jq -r '.disks[0] | if .parent then "incremental" else "full" end'
}

# Bytes that don't compress: so many MiB.
random_disk() {
    "$ORACLE_PYTHON" -c 'import random, sys
sys.stdout.buffer.write(random.Random(7).randbytes(int(sys.argv[1]) << 20))' \
        "$1" >random.raw
    qemu-img convert -f raw -O qcow2 random.raw disk.qcow2
    run_expect 0 lbctl enable disk.qcow2
}

expect_nothing_left() {
    [ -z "$(find far -name '.*.tmp')" ]
    expect_output_of_list
    [ -z "$(ls -A temporary)" ] || fail "$(find temporary)"
}

expect_output_of_list() {
    run_expect 0 lbvm list --repository="$far"
}

# ------------------------------------------------------------------ it works

@test "back up, list, show, restore and export through a real sshd" {
    serve_ssh
    new_disk disk.qcow2 20M
    change disk.qcow2 'write -P 7 1M 3M'
    backup
    expect_stderr 'lbvm: web1: disk: a full backup: the repository has no backup of this disk yet'
    expect_disk
    for i in 1 2 3; do
        change disk.qcow2 "write -P $i ${i}M 300k" "write -z 3M 200k"
        backup
        expect_stderr ''
        [ "$(kind)" = incremental ]
        expect_disk
    done
    run_expect 0 lbvm list --repository="$far"
    expect_output_has 'web1  4 backups'
    run_expect 0 lbvm list --repository="$far" --json web1
    [ "$output" = "$(lbvm list --repository=far --json web1)" ]
    run_expect 0 lbvm show --repository="$far" --json web1
    [ "$output" = "$(lbvm show --repository=far --json web1)" ]
    run_expect 0 lbvm restore --repository="$far" -o out web1
    run_expect 0 qemu-img compare -q out/disk.qcow2 disk.qcow2
    run_expect 0 lbvm export --repository="$far" --format=raw --disk=disk -o disk.out web1
    cmp disk.out disk.raw
    expect_nothing_left
}

@test "a checkpoint is confirmed when its archive is on the other host" {
    fake_ssh
    new_disk disk.qcow2 20M
    backup
    [ "$(lbctl status --json disk.qcow2 |
         jq -r '.checkpoints[] | [.label, .confirmed] | join(" ")')" = \
      "$(jq -r .label far/repository.json) true" ]
}

@test "verify and prune run where the repository is" {
    serve_ssh
    new_disk disk.qcow2 20M
    for i in 1 2 3; do
        change disk.qcow2 "write -P $i ${i}M 300k"
        backup
    done
    run_expect 0 lbvm verify --repository="$far"
    expect_output 'web1: 3 of 3 archives were read and are good'
    run_expect 0 lbvm prune --repository="$far" --keep-last=1 --json -- web1
    [ "$(jq -r '.machines[0].machine' <<<"$output")" = web1 ]
    [ "$(lbvm list --repository=far --json web1 | jq '.backups | length')" = 1 ]
    expect_disk
    run_expect 0 lbvm verify --repository="$far" --metrics=prom web1
    grep -q '^lbvm_last_status{machine="web1",.*command="verify"} 0$' prom ||
        fail "$(cat prom)"
    run_expect 1 lbvm verify --repository="$far" web2
    expect_stderr "lbvm: $PWD/far: has no backups of a machine 'web2'"
}

@test "prune says so where the other host has no lbvm" {
    fake_ssh
    new_disk disk.qcow2 20M
    backup
    sed -i '2i PATH=/usr/bin:/bin' fake_ssh
    run_expect 1 lbvm prune --repository="$far" --keep-last=1
    expect_stderr_has "lbvm: $far: 'lbvm prune' runs where the repository is, and that host has no lbvm"
}

@test "below the home folder of the other host" {
    fake_ssh 'cat'
    new_disk disk.qcow2 20M
    sed -i "2i HOME=$PWD" fake_ssh
    far=ssh://far.example/~/far
    backup
    expect_disk
    run_expect 0 lbvm verify --repository="$far"
}

@test "with bash, dash and busybox as the shell there" {
    new_disk disk.qcow2 20M
    for shell in bash dash busybox; do
        rm -rf far bin out
        mkdir bin
        ln -s "$(command -v $shell)" bin/sh
        fake_ssh
        sed -i "2i PATH=$PWD/bin:$PATH" fake_ssh
        for i in 1 2; do
            change disk.qcow2 "write -P $i ${i}M 300k"
            backup
        done
        expect_disk
        run_expect 0 lbvm restore --repository="$far" -o out web1
        run_expect 0 qemu-img compare -q out/disk.qcow2 disk.qcow2
        expect_nothing_left
    done
}

@test "archives and leftovers with odd names in the folder" {
    fake_ssh
    new_disk disk.qcow2 20M
    backup
    touch "far/web1/archives/a b'\$(touch x)\`touch y\`.lbz" \
        'far/web1/archives/-rf.lbz' 'far/web1/archives/*.lbz' \
        'far/web1/archives/note.txt'
    mkdir 'far/web1/archives/folder.lbz'
    change disk.qcow2 'write -P 9 1M 300k'
    backup
    [ -d far/web1/archives/folder.lbz ]
    [ -e far/web1/archives/note.txt ]
    rm -r far/web1/archives/{folder.lbz,note.txt}
    expect_disk
    expect_absent x y
}

@test "a path with blanks and signs that shells know" {
    fake_ssh
    new_disk disk.qcow2 20M
    name="a b'\"\$(touch x);&"
    far=ssh://far.example$PWD/$name
    backup
    expect_absent x
    run_expect 0 lbvm verify --repository="$name"
}

# ------------------------------------------------------------------- it fails

@test "no such port, and a host key that is not known" {
    serve_ssh
    run_expect 1 lbvm list --repository="ssh://127.0.0.1:1/far"
    expect_stderr 'lbvm: ssh://127.0.0.1:1/far: no connection: ssh: connect to host 127.0.0.1 port 1: Connection refused'
    : >known_hosts
    run_expect 1 lbvm list --repository="$far"
    expect_stderr "lbvm: $far: no connection: Host key verification failed."
}

@test "a key that is not let in" {
    serve_ssh
    : >authorized_keys
    run_expect 1 lbvm list --repository="$far"
    expect_stderr_has "lbvm: $far: no connection: "
    expect_stderr_has 'Permission denied (publickey'
}

@test "start-up files that print something" {
    fake_ssh
    sed -i '2i echo Welcome to far.example' fake_ssh
    run_expect 1 lbvm list --repository="$far"
    expect_stderr "lbvm: $far: the shell there says 'Welcome to far.example' before it is asked: its start-up files must print nothing where nobody sits"
}

@test "URLs that are none" {
    for url in ssh:// ssh://far.example ssh://far.example/; do
        run_expect 2 lbvm list --repository="$url"
        expect_stderr "lbvm: $url: has no path; ssh://[USER@]HOST[:PORT]/PATH is wanted"
    done
    run_expect 2 lbvm list --repository=ssh://far.example:x/far
    expect_stderr 'lbvm: ssh://far.example:x/far: the port is no number; ssh://[USER@]HOST[:PORT]/PATH is wanted'
    for url in ssh:///far ssh://-oProxyCommand=x/far ssh://me@-x/far 'ssh://a b/far'; do
        run_expect 2 lbvm list --repository="$url"
        expect_stderr "lbvm: $url: has no name of a host; ssh://[USER@]HOST[:PORT]/PATH is wanted"
    done
}

@test "no repository, and no folder to make one in" {
    fake_ssh
    new_disk disk.qcow2 20M
    run_expect 1 lbvm list --repository="$far"
    expect_stderr "lbvm: $far: is no repository: it has no repository.json"
    far=$far/in/there
    run_expect 1 lbvm backup --repository="$far" web1 disk.qcow2
    expect_stderr "lbvm: $far: the other host says: mkdir: cannot create directory '$PWD/far/in/there': No such file or directory"
}

@test "another backup of the machine is at work" {
    fake_ssh
    new_disk disk.qcow2 20M
    backup
    exec 9>far/web1/backup.lock
    flock -x 9
    run_expect 5 lbvm backup --repository="$far" web1 disk.qcow2
    expect_stderr "lbvm: $far/web1: a backup or a pruning of it is at work; try again when that has ended"
    exec 9>&-
    backup
}

@test "while one backs up there, another one says so" {
    serve_ssh
    random_disk 8
    lbvm backup --repository="$far" --rate-limit=1M web1 disk.qcow2 \
        >log 2>&1 </dev/null 3>&- 4>&- &
    first=$!
    for ((i = 0; i < 400; i++)); do
        [ -z "$(find far -name '.*.tmp' -size +64k 2>/dev/null)" ] || break
        sleep 0.05
    done
    [ "$i" -lt 400 ]
    new_disk other.qcow2 20M
    run_expect 5 lbvm backup --repository="$far" web1 other.qcow2
    run_expect 5 lbvm backup --repository=far web1 other.qcow2
    # and when it is killed, its lock goes, and what it wrote
    kill -KILL "$first"
    wait "$first" || true
    for ((i = 0; i < 400; i++)); do
        run lbvm backup --repository="$far" web1 disk.qcow2
        [ "$status" = 5 ] || break
        sleep 0.05
    done
    [ "$status" = 0 ]
    expect_disk
    expect_nothing_left
}

@test "the other host is full" {
    random_disk 4
    fake_ssh
    sed -i "2i trap '' XFSZ; ulimit -f 1000" fake_ssh
    run_expect 1 lbvm backup --repository="$far" web1 disk.qcow2
    expect_stderr_has 'the other host says: cat: write error: File too large'
    [ "$(lbvm list --repository=far --json web1 | jq '.backups | length')" = 0 ]
    [ -z "$(find far -name '*.lbz' -o -name '.*.tmp')" ]
    fake_ssh
    backup
    expect_disk
}

@test "what arrives is not what was sent" {
    random_disk 1
    fake_ssh "dd bs=1 count=300000 status=none"
    run_expect 1 lbvm backup --repository="$far" web1 disk.qcow2
    expect_stderr_has ': only '
    [ "$(lbvm list --repository=far --json web1 | jq '.backups | length')" = 0 ]
    fake_ssh
    backup
    expect_disk
}

@test "connections that break at any moment lose nothing" {
    local n step=700 done=no
    new_disk disk.qcow2 20M
    change disk.qcow2 'write -P 7 1M 3M'
    fake_ssh
    backup
    expect_disk
    for ((n = 4000; n < 40000; n += step)); do
        change disk.qcow2 "write -P $((n % 251)) $((n % 19))M 100k"
        fake_ssh "dd bs=1 count=$n status=none"
        run lbvm backup --repository="$far" web1 disk.qcow2
        # it breaks at the end, when all is done, or with a message
        if [ "$status" = 0 ]; then
            done=yes
        else
            [ "$status" = 1 ] || fail "$n: $output"
            [ "$done" = no ] || fail "$n: $output"
        fi
        fake_ssh
        backup
        [ "$(kind)" = incremental ]
        expect_disk
        [ "$done" = no ] || break
    done
    [ "$done" = yes ]
    [ -z "$(find far -name '.*.tmp')" ]
}

@test "an archive that is missing or damaged on the other host" {
    fake_ssh
    new_disk disk.qcow2 20M
    change disk.qcow2 'write -P 7 1M 3M'
    backup
    archive=$(find far -name '*.lbz')
    flip "$archive" 200
    run_expect 4 lbvm restore --repository="$far" -o out web1
    expect_stderr_has "${archive##*/}"
    rm "$archive"
    run_expect 3 lbvm restore --repository="$far" -o out web1
    expect_stderr_has "$far/web1/archives/${archive##*/}: is missing: the chain of disk 'disk' is broken"
    [ -z "$(ls -A temporary)" ]
    # and what comes next is a full one, with that reason
    change disk.qcow2 'write -P 8 1M 1M'
    backup
    expect_stderr_has 'a full backup: '
    [ "$(kind)" = full ]
}
