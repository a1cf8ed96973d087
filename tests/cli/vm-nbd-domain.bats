# lbvm backup --domain --nbd: the monitor comes from a libvirt, which may be that
# of another host; the disks come over NBD.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm
load libvirt
load tls

setup_file() {
    start_libvirtd
}

teardown_file() {
    stop_libvirtd
}

teardown() {
    remove web1
}

# qmp COMMAND [ARGUMENTS]: past lbvm.
qmp() {
    virsh_ qemu-monitor-command web1 \
        "{\"execute\": \"$1\", \"arguments\": ${2:-{\}}}"
}

@test "a domain, in full, and then what has changed" {
    mkdir -m 700 keys scratch
    quiet psktool -u alice -p keys/keys.psk
    port=$(free_port)
    qemu-img create -q -f qcow2 a.qcow2 16M
    qemu-io -c 'write -P 1 0 5M' a.qcow2 >/dev/null
    define web1 "$(disk vda virtio "$PWD/a.qcow2")"
    virsh_ start web1 >/dev/null
    qmp object-add "{\"qom-type\": \"tls-creds-psk\", \"id\": \"tls\",
        \"endpoint\": \"server\", \"dir\": \"$PWD/keys\"}" >/dev/null
    for kind in full incremental; do
        run_expect 0 lbvm backup --domain=web1 --connect="$uri" \
            --nbd="127.0.0.1:$port" --tls-creds=tls --tls-username=alice \
            --tls-psk-file=keys/keys.psk --scratch="$PWD/scratch"
        [ "$(lbvm show --json web1 |
            jq -r '.disks[] | if .parent then "incremental" else "full" end')" = $kind ]
        [ "$(find scratch -type f -size +0)" = '' ]
        [ "$(qmp query-block-exports | jq -c .return)" = '[]' ]
    done
    expect_stderr ''
    virsh_ destroy web1 >/dev/null
    run_expect 0 lbvm restore -q -o restored web1
    expect_same a.qcow2 qcow2 restored/a.qcow2 qcow2
    ls restored/web1.xml
}
