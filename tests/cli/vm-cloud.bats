# docs/examples/backup_instances.py, against a real libvirt.
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
}

teardown() {
    virsh_ list --all --name | while read -r name; do
        [ -z "$name" ] || remove "$name"
    done
}

# instance NAME DISPLAY: a domain as Nova makes one, running.
instance() {
    qemu-img create -q -f qcow2 "$1.qcow2" 16M
    qemu-io -f qcow2 -c 'write -P 7 1M 2M' "$1.qcow2" >/dev/null
    define "$1" "$(disk vda virtio "$PWD/$1.qcow2")"
    sed -i "s|<memory|<metadata><nova:instance xmlns:nova=\"http://openstack.org/xmlns/libvirt/nova/1.1\"><nova:name>$2</nova:name></nova:instance></metadata><memory|" \
        "$1.xml"
    sed -i "s|<name>|<uuid>$(virsh_ domuuid "$1")</uuid><name>|" "$1.xml"
    virsh_ define "$1.xml" >/dev/null
    virsh_ start "$1" >/dev/null
}

hourly() {
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/docs/examples/backup_instances.py" \
        --repository=repo --connect="$uri" "$@"
}

@test "all instances, each hour: in full once, pruned, and nothing else" {
    instance instance-00000001 web1
    instance instance-00000002 db1
    qemu-img create -q -f qcow2 other.qcow2 1M
    define other "$(disk vda virtio "$PWD/other.qcow2")"
    virsh_ start other
    run_expect 0 hourly --keep=last=2
    expect_stderr ''
    [ "$(jq -s -c 'map([.name, .status, (.full | keys)]) | sort' <<<"$output")" = \
      '[["db1",0,["vda"]],["web1",0,["vda"]]]' ]
    for _ in 1 2 3; do
        run_expect 0 hourly --keep=last=2
        [ "$(jq -s -c 'map([.name, .full]) | sort' <<<"$output")" = \
          '[["db1",{}],["web1",{}]]' ]
    done
    uuid=$(virsh_ domuuid instance-00000001)
    [ "$(lbvm list --json | jq '.machines | length')" = 2 ]
    [ "$(lbvm list --json "$uuid" | jq '.backups | length')" = 2 ]
    run_expect 0 lbvm restore -q -o restored "$uuid"
    qemu-img compare -q -U instance-00000001.qcow2 \
        restored/instance-00000001.qcow2
}

@test "an instance that fails is told, and the others are backed up" {
    instance instance-00000001 web1
    instance instance-00000002 db1
    uuid=$(virsh_ domuuid instance-00000001)
    run_expect 0 hourly
    rm -r "repo/$uuid"
    touch "repo/$uuid"
    run_expect 1 hourly
    [ "$(jq -s -c 'map([.name, .status]) | sort' <<<"$output")" = \
      '[["db1",0],["web1",1]]' ]
    [[ "$(jq -s -r 'map(.error // empty)[0]' <<<"$output")" == "lbvm: "* ]]
}
