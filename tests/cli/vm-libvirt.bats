# The domains of a real libvirt, with a QEMU as it is.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load libvirt

guestctl=$abs_top_builddir/tests/unit/guestctl

setup_file() {
    start_libvirtd
}

teardown_file() {
    stop_libvirtd
}

setup() {
    helpers_setup
    here=$PWD
    qemu-img create -q -f qcow2 a.qcow2 16M
}

teardown() {
    virsh_ list --all --name | while read -r name; do
        [ -z "$name" ] || remove "$name"
    done
}

# ctl WHAT DOMAIN [ARGUMENT]...
ctl() {
    local what=$1
    shift
    "$guestctl" "$what" "$uri" "$@"
}

# qmp DOMAIN COMMAND [ARGUMENTS]: past lbvm.
qmp() {
    virsh_ qemu-monitor-command "$1" \
        "{\"execute\": \"$2\", \"arguments\": ${3:-{\}}}"
}

# node_of DOMAIN FILE: that of the format, above the one of the file.
node_of() {
    qmp "$1" query-named-block-nodes '{"flat": true}' |
        jq -r --arg file "$2" '.return[] | select(.drv == "file" and
            .image.filename == $file)."node-name"' |
        sed 's/storage/format/'
}

# --------------------------------------------------------------- finding it

@test "domains that run are listed by name" {
    define b
    define a
    define off
    run_expect 0 "$guestctl" active "$uri"
    expect_output ''
    virsh_ start b
    virsh_ start a --paused
    run_expect 0 "$guestctl" active "$uri"
    expect_output $'a\nb'
    expect_stderr ''
}

@test "a domain is found by name and by UUID, running or not" {
    define web
    run_expect 0 ctl running web
    expect_output 'shut off'
    virsh_ start web --paused
    run_expect 0 ctl running web
    expect_output running
    run_expect 0 ctl running "$(virsh_ domuuid web)"
    expect_output running
}

@test "what libvirt complains of is told once" {
    run_expect 1 ctl running none
    expect_stderr "guestctl: none: libvirt: Domain not found: no domain with matching name 'none'"
    uri="qemu+unix:///session?socket=$here/none"
    run_expect 1 ctl running none
    expect_stderr "guestctl: $uri: libvirt: Failed to connect socket to '$here/none': No such file or directory"
    run_expect 1 "$guestctl" active "$uri"
    expect_stderr "guestctl: $uri: libvirt: Failed to connect socket to '$here/none': No such file or directory"
}

# -------------------------------------------------------------------- disks

@test "the disks are those that the guest may write to, on any bus" {
    local name
    for name in b c d base raw; do
        qemu-img create -q -f qcow2 "$name.qcow2" 16M
    done
    qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2
    define web "$(disk vda virtio "$here/a.qcow2")" \
        "$(disk sda scsi "$here/b.qcow2")" \
        "<controller type='scsi' model='virtio-scsi'/>" \
        "$(disk hda ide "$here/c.qcow2" "<serial>x</serial>")" \
        "$(disk vdb virtio "$here/top.qcow2")" \
        "$(disk vdc virtio "$here/d.qcow2" '<readonly/>')" \
        "$(format=raw disk vdd virtio "$here/raw.qcow2")" \
        "<disk type='file' device='cdrom'><driver name='qemu' type='qcow2'/>
         <target dev='hdc' bus='ide'/><readonly/></disk>"
    run_expect 0 ctl disks web
    sort <<<"$output" >off
    diff off - <<END
hda $here/c.qcow2 -
sda $here/b.qcow2 -
vda $here/a.qcow2 -
vdb $here/top.qcow2 -
END
    virsh_ start web --paused
    run_expect 0 ctl disks web
    expect_stderr ''
    sort <<<"$output" >on
    diff on - <<END
hda $here/c.qcow2 $(node_of web "$here/c.qcow2")
sda $here/b.qcow2 $(node_of web "$here/b.qcow2")
vda $here/a.qcow2 $(node_of web "$here/a.qcow2")
vdb $here/top.qcow2 $(node_of web "$here/top.qcow2")
END
    [ "$(cut -d ' ' -f 3 on | sort -u | grep -c -x 'libvirt-[0-9]*-format')" \
        -eq 4 ]
}

@test "a domain without disks has none" {
    define web
    run_expect 0 ctl disks web
    expect_output ''
    virsh_ start web --paused
    run_expect 0 ctl disks web
    expect_output ''
}

@test "after a snapshot it is the new file" {
    define web "$(disk vda virtio "$here/a.qcow2")"
    virsh_ start web --paused
    virsh_ snapshot-create-as web s --disk-only --no-metadata \
        --diskspec "vda,file=$here/s.qcow2" >/dev/null
    run_expect 0 ctl disks web
    expect_output "vda $here/s.qcow2 $(node_of web "$here/s.qcow2")"
}

# put_filter: between web's first disk and its node $node.
put_filter() {
    qmp web blockdev-add "{\"driver\": \"copy-on-read\", \"node-name\": \
        \"filter\", \"file\": \"$node\"}" | jq -e 'has("return")'
    qmp web qom-set '{"path": "/machine/peripheral/virtio-disk0",
        "property": "drive", "value": "filter"}' | jq -e 'has("return")'
    [ "$(qmp web query-block | jq -r '.return[].inserted.drv')" = copy-on-read ]
}

@test "below a filter it is the qcow2 node" {
    define web "$(disk vda virtio "$here/a.qcow2")"
    virsh_ start web --paused
    node=$(node_of web "$here/a.qcow2")
    put_filter
    run_expect 0 ctl disks web
    expect_output "vda $here/a.qcow2 $node"
}

@test "below a filter it is that, also with a backing file" {
    qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 top.qcow2
    define web "$(disk vda virtio "$here/top.qcow2")"
    virsh_ start web --paused
    node=$(node_of web "$here/top.qcow2")
    put_filter
    run_expect 0 ctl disks web
    expect_output "vda $here/top.qcow2 $node"
}

@test "a disk that is a volume of a pool is found where that is" {
    mkdir pool
    qemu-img create -q -f qcow2 pool/v.qcow2 16M
    virsh_ pool-create-as store dir --target "$here/pool" >/dev/null
    define web "<disk type='volume' device='disk'>
        <driver name='qemu' type='qcow2'/>
        <source pool='store' volume='v.qcow2'/>
        <target dev='vda' bus='virtio'/></disk>"
    run_expect 0 ctl disks web
    expect_output "vda $here/pool/v.qcow2 -"
    virsh_ start web --paused
    run_expect 0 ctl disks web
    expect_output "vda $here/pool/v.qcow2 $(node_of web "$here/pool/v.qcow2")"
    virsh_ pool-destroy store >/dev/null
}

@test "a disk that is elsewhere is not left out silently" {
    define web "<disk type='network' device='disk'>
        <driver name='qemu' type='qcow2'/>
        <source protocol='nbd' name='x'><host name='127.0.0.1'/></source>
        <target dev='vda' bus='virtio'/></disk>"
    run_expect 1 ctl disks web
    expect_stderr "guestctl: web: vda: the disk is no file of this machine, and can't be backed up"
}

# -------------------------------------------------------------- description

@test "the description makes the domain again, and holds no password" {
    define web "$(disk vda virtio "$here/a.qcow2")" \
        "<graphics type='vnc' port='5999' passwd='sesame'/>"
    virsh_ dumpxml web --security-info | grep -q sesame
    run_expect 0 ctl xml web
    [[ "$output" != *sesame* ]]
    printf '%s\n' "$output" >saved.xml
    virsh_ undefine web
    virsh_ define saved.xml >/dev/null
    run_expect 0 ctl disks web
    expect_output "vda $here/a.qcow2 -"
}

@test "that of a domain that runs is without what belongs to the run" {
    define web "$(disk vda virtio "$here/a.qcow2")"
    virsh_ start web --paused
    run_expect 0 ctl xml web
    expect_output_has "<source file='$here/a.qcow2'/>"
    [[ "$output" != *'<alias'* ]]
}

# ------------------------------------------------------------------ monitor

@test "commands go to its monitor, and errors come back" {
    define web
    virsh_ start web --paused
    run_expect 0 ctl qmp web query-status
    jq -e '.status == "prelaunch" or .status == "paused"' <<<"$output"
    expect_stderr answered
    run_expect 0 ctl qmp web human-monitor-command \
        '{"command-line": "info name"}'
    expect_output '"web\r\n"'
    run_expect 1 ctl qmp web nonsense
    expect_stderr $'answered\nguestctl: web: nonsense: The command nonsense has not been found'
}

@test "whether a command is there is told" {
    define web
    virsh_ start web --paused
    run_expect 0 ctl has web query-status
    expect_output yes
    run_expect 0 ctl has web livebackup-begin
    expect_output no
}

@test "a domain that does not run has no monitor" {
    define web
    run_expect 1 ctl qmp web query-status
    expect_stderr $'no answer\nguestctl: web: libvirt: Requested operation is not valid: domain is not running'
}

@test "who is told to stop does not wait for a QEMU that hangs" {
    define web
    virsh_ start web --paused
    pid=$(<"$libvirt_folder/run/libvirt/qemu/run/web.pid")
    kill -STOP "$pid"
    "$guestctl" qmp "$uri" web query-status 2>err 3>&- &
    ctl=$!
    # it is in the call when its connection has a thread that waits
    threads() { [ "$(ls "/proc/$ctl/task" | wc -l)" -gt 1 ]; }
    for ((i = 0; i < 400; i++)); do
        ! threads || break
        sleep 0.05
    done
    kill -TERM "$ctl"
    status=0
    wait "$ctl" || status=$?
    kill -CONT "$pid"
    [ "$status" -eq 1 ]
    [ "$(<err)" = $'no answer\nguestctl: interrupted' ]
}

# ----------------------------------------------------------------- freezing

channel="<channel type='unix'>
    <target type='virtio' name='org.qemu.guest_agent.0'/></channel>"

@test "without an agent in the guest nothing is frozen" {
    define web "$channel"
    virsh_ start web
    run_expect 1 "$guestctl" quiesce require 0 0 "$uri" web
    expect_output ''
    expect_stderr 'guestctl: web: libvirt: Guest agent is not responding: QEMU guest agent is not connected'
    run_expect 0 "$guestctl" quiesce try 0 0 "$uri" web
    expect_output 'not frozen'
    expect_stderr 'guestctl: web: libvirt: Guest agent is not responding: QEMU guest agent is not connected; going on without freezing the guest'
}

@test "without a channel for an agent nothing is frozen" {
    define web
    virsh_ start web
    run_expect 1 "$guestctl" quiesce require 0 0 "$uri" web
    expect_stderr 'guestctl: web: libvirt: argument unsupported: QEMU guest agent is not configured'
}
