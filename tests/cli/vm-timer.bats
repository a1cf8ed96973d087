# lbvm init-timer, and the units of systemd that it is for.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm

setup() {
    helpers_setup
    unset LBVM_METRICS LBVM_REPOSITORY
}

# The shipped units in u/, with the program that was built.
units() {
    local unit
    mkdir u
    cp "$abs_top_srcdir"/systemd/*.timer u/
    for unit in "$abs_top_srcdir"/systemd/*.service.in; do
        sed "s|@bindir@|$abs_top_builddir/tools|" "$unit" \
            >"u/$(basename "$unit" .in)"
    done
}

# judge UNIT: systemd finds nothing to say about it.
judge() {
    SYSTEMD_UNIT_PATH=$PWD/u: run_expect 0 systemd-analyze --man=no verify "$1"
    expect_output ''
    expect_stderr ''
}

init_timer() {
    run_expect 0 lbvm init-timer --root root --repository "$PWD/repo" "$@"
    expect_stderr ''
}

# job COMMAND: what the unit's ExecStart does, for web1. Of what systemd reads in
# an environment file init-timer uses what a shell reads alike.
job() {
    run_expect 0 bash -c 'set -a
. root/etc/lbvm/web1.conf
name=LBVM_${0^^}
eval "words=(${!name})"
exec lbvm "$0" web1 "${words[@]}"' "$1"
}

@test "the units are good" {
    units
    count=0
    for unit in u/*; do
        judge "${unit#u/}"
        count=$((count + 1))
    done
    [ $count -eq 6 ]
    # systemd would say what it does not understand
    echo Bogus=1 >>u/lbvm-prune@.service
    SYSTEMD_UNIT_PATH=$PWD/u: run_expect 0 systemd-analyze --man=no \
        verify lbvm-prune@.service
    expect_stderr_has "Unknown key"
}

@test "what is written, and what is to be run" {
    init_timer --metrics /var/lib/m/web1.prom web1 --qmp=/run/web1.sock \
        --level 3 -q --scratch /fast
    expect_output 'systemctl --root=root enable lbvm-backup@web1.timer lbvm-prune@web1.timer lbvm-verify@web1.timer'
    [ "$(cat root/etc/lbvm/web1.conf)" = "# Of lbvm-backup@web1.service, lbvm-prune@ and lbvm-verify@; see lbvm(1).
LBVM_REPOSITORY=\"$PWD/repo\"
LBVM_METRICS=\"/var/lib/m/web1.prom\"
LBVM_BACKUP=\"--qmp=/run/web1.sock --level 3 -q --scratch /fast\"
LBVM_PRUNE=\"--keep-hourly=24 --keep-daily=7 --keep-weekly=4 --keep-monthly=12\"
LBVM_VERIFY=\"--sample=15\"" ]
    [ "$(find root -type f | wc -l)" = 4 ]
    grep -qx "ReadWritePaths=\"-$PWD/repo\" \"-/var/lib/m\" \"-/fast\" " \
        root/etc/systemd/system/lbvm-backup@web1.service.d/lbvm.conf
    units
    cp -r root/etc/systemd/system/* u/
    for what in backup prune verify; do
        judge "lbvm-$what@web1.service"
    done
}

@test "the jobs do what they are for, whatever the paths are called" {
    mkdir '50% of it'
    new_disk '50% of it/a b.qcow2' 2M
    new_disk c=d.qcow2 2M
    init_timer --keep-last 1 --sample 100 web1 "vda=$PWD/50% of it/a b.qcow2" \
        "$PWD/c=d.qcow2"
    units
    cp -r root/etc/systemd/system/* u/
    judge lbvm-backup@web1.service
    grep -qF "\"-$PWD/50%% of it\" \"-$PWD\"" \
        root/etc/systemd/system/lbvm-backup@web1.service.d/lbvm.conf
    job backup
    job backup
    expect_output_has '2 disks, 0 in full'
    job verify
    expect_output 'web1: 4 of 4 archives were read and are good'
    job prune
    expect_output_has 'web1: 1 kept, 1 dropped'
}

@test "jobs for a repository on another host may use the network" {
    run_expect 0 lbvm init-timer --root root --metrics /m/web1.prom \
        --repository ssh://backup@nas/srv/backups web1 --qmp=/run/web1.sock
    expect_stderr ''
    grep -qx 'LBVM_REPOSITORY="ssh://backup@nas/srv/backups"' \
        root/etc/lbvm/web1.conf
    units
    cp -r root/etc/systemd/system/* u/
    for what in backup prune verify; do
        judge "lbvm-$what@web1.service"
        conf=root/etc/systemd/system/lbvm-$what@web1.service.d/lbvm.conf
        grep -qx PrivateNetwork=no "$conf"
        grep -qx 'ReadWritePaths="-/m" ' "$conf"
        ! grep -q RequiresMountsFor "$conf" || fail "$(cat "$conf")"
    done
}

@test "what exists stays, unless it is to be replaced" {
    init_timer web1 --qmp=/a
    cp -r root before
    run_expect 1 lbvm init-timer --root root --repository /r web1 --qmp=/b
    expect_stderr 'lbvm: root/etc/lbvm/web1.conf: already exists; --force replaces it'
    diff -r root before
    rm root/etc/lbvm/web1.conf
    run_expect 1 lbvm init-timer --root root --repository /r web1 --qmp=/b
    expect_stderr 'lbvm: root/etc/systemd/system/lbvm-backup@web1.service.d/lbvm.conf: already exists; --force replaces it'
    init_timer --force web1 --qmp=/b
    grep -qx 'LBVM_BACKUP="--qmp=/b"' root/etc/lbvm/web1.conf
    # another machine's are others
    init_timer web2 --qmp=/a
}

@test "what a job could not use is refused" {
    refuse() {
        local text=$1
        shift
        run_expect 2 lbvm init-timer --root root --repository /r "$@"
        expect_output ''
        expect_stderr "lbvm: $text
Try 'lbvm init-timer --help'."
    }
    refuse "IMAGE: 'disk.qcow2' must begin with /: a job of systemd has no other folder to begin in" \
        web1 vda=disk.qcow2
    refuse "qmp: 'a.sock' must begin with /: a job of systemd has no other folder to begin in" \
        web1 --qmp a.sock
    refuse "--repository: 'r' must begin with /: a job of systemd has no other folder to begin in" \
        --repository r web1 --qmp=/a
    refuse "--metrics: 'm' must begin with /: a job of systemd has no other folder to begin in" \
        --metrics m web1 --qmp=/a
    refuse "scratch: 'x' must begin with /: a job of systemd has no other folder to begin in" \
        web1 --qmp=/a --scratch x
    refuse "tls-psk-file: 'x' must begin with /: a job of systemd has no other folder to begin in" \
        web1 --qmp=/a --tls-psk-file x
    refuse "--repository is wanted before MACHINE: it is not of the backup alone" \
        web1 --qmp=/a --repository=/x
    refuse "'--bogus' is no option of lbvm backup" web1 --bogus
    refuse "'-' is no option of lbvm backup" web1 -
    refuse "option '--qmp' wants an argument" web1 --qmp
    refuse "a MACHINE is wanted, and what 'lbvm backup' is told of it, as --qmp=SOCKET" \
        web1
    refuse "'../x' is no name of a machine" ../x --qmp=/a
    for path in "/a'b" '/a"b' '/a\b' '/a$b' '/a`b'; do
        refuse "ARGUMENT: '$path' has a character that can't be in an environment file: quotes, \\, \$, \`, or control characters" \
            web1 "$path"
    done
    refuse "ARGUMENT: '' is empty, or no UTF-8" web1 ''
    run_expect 2 lbvm init-timer --root root --repository /r web1 $'/a\nb'
    run_expect 2 lbvm init-timer --root root --repository /r web1 $'/a\xff'
    expect_absent root
}

@test "--enable has systemd start the timers" {
    units
    mkdir -p root/usr/lib/systemd
    cp -r u root/usr/lib/systemd/system
    run_expect 0 lbvm init-timer --enable --root root --repository /r \
        web1 --qmp=/a
    expect_output ''
    [ "$(ls root/etc/systemd/system/timers.target.wants)" = \
        'lbvm-backup@web1.timer
lbvm-prune@web1.timer
lbvm-verify@web1.timer' ]
    # where that fails
    rm root/usr/lib/systemd/system/*
    run_expect 1 lbvm init-timer --enable --root root --repository /r \
        web2 --qmp=/a
    expect_stderr_has "lbvm: 'systemctl --root=root enable' failed; the files are written"
    [ -s root/etc/lbvm/web2.conf ]
    run_expect 1 env PATH="$abs_top_builddir/tools" lbvm init-timer --enable \
        --root root --repository /r web3 --qmp=/a
    expect_stderr 'lbvm: systemctl: No such file or directory'
}
