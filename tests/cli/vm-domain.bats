# lbvm and the domains of a real libvirt: backed up while they run, and not; and
# restored. The QEMU is the distribution's.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load libvirt
load vm

setup_file() {
    start_libvirtd
}

teardown_file() {
    stop_libvirtd
}

setup() {
    helpers_setup
    for disk in a b; do
        new_disk $disk.qcow2 16M
    done
    change a.qcow2 'write -P 1 1M 3M'
    two_disks
}

# two_disks [MORE]
two_disks() {
    define web1 "$(disk vda virtio "$PWD/a.qcow2")" \
        "$(disk vdb virtio "$PWD/b.qcow2")" "$@"
}

teardown() {
    virsh_ list --all --name | while read -r name; do
        [ -z "$name" ] || remove "$name"
    done
}

backup() {
    run_expect 0 lbvm backup --connect="$uri" --domain=web1 "$@"
}

kinds() {
    lbvm show --json web1 |
        jq -r '[.disks[] | if .parent then "incremental" else "full" end] |
               join(" ")'
}

@test "the three commands of the README" {
    virsh_ start web1
    sed -n '/^A machine in three/,/^The first backup/s/^    //p' \
        "$abs_top_srcdir/README" >tour
    [ "$(grep -c '^lbvm' tour)" = 3 ]
    sed -i "s|/srv/|$PWD/|g; s|--domain|--connect='$uri' --domain|" tour
    run_expect 0 bash -e tour
    expect_output_has ' 2 disks, 2 in full, ' 'vda (full), vdb (full)' \
        'web1: definition: '
    virsh_ destroy web1
    for disk in a b; do
        qemu-img compare -q "$disk.qcow2" "restored/$disk.qcow2"
    done
    virsh_ undefine web1
    virsh_ define restored/web1.xml
    virsh_ start web1
}

@test "a domain runs, is stopped, and runs: its disks have the same names" {
    backup
    [ "$(kinds)" = 'full full' ]
    change a.qcow2 'write -P 2 2M 1M'
    backup
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    virsh_ start web1
    backup
    backup
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    virsh_ destroy web1
    vmrepo check repo
    run_expect 0 lbvm restore -o restored web1
    qemu-img compare -q a.qcow2 restored/a.qcow2
}

@test "a disk that is added is a full one; one that is taken out is left out" {
    virsh_ start web1
    backup
    virsh_ destroy web1
    new_disk c.qcow2 8M
    remove web1
    two_disks "$(disk vdc virtio "$PWD/c.qcow2")"
    virsh_ start web1
    backup
    [ "$(kinds)" = 'incremental incremental full' ]
    virsh_ destroy web1
    remove web1
    two_disks
    backup
    [ "$(lbvm show --json web1 | jq -r '[.disks[].name] | join(" ")')" = 'vda vdb' ]
}

@test "several domains: one that fails does not keep the others back" {
    run_expect 1 lbvm backup --connect="$uri" --domain=nobody --domain=web1
    expect_stderr_has 'nobody'
    [ "$(lbvm list --json web1 | jq '.backups | length')" = 1 ]
}

@test "--disk names targets" {
    backup --disk=vdb
    [ "$(lbvm show --json web1 | jq -r '[.disks[].name] | join(" ")')" = vdb ]
    run_expect 1 lbvm backup --connect="$uri" --domain=web1 --disk=sdz
    expect_stderr_has "web1: --disk names one that is no qcow2 disk"
}

@test "quiescing: without an agent an error, or a message" {
    virsh_ start web1
    run_expect 1 lbvm backup --connect="$uri" --domain=web1 --quiesce=require
    [ "$(lbvm list --json web1 | jq '.backups | length')" = 0 ]
    backup --quiesce=try
    [ "$(lbvm show --json web1 | jq .quiesced)" = false ]
    virsh_ destroy web1
    backup --quiesce=require
}
