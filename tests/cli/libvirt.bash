# A libvirtd of the test's own, in its session mode: nothing of the machine's
# libvirt is touched. A test file begins with
#     load helpers
#     load libvirt
#     setup_file() { start_libvirtd; }
#     teardown_file() { stop_libvirtd; }
#
# root would get libvirt's system mode, whose folders are the machine's; so root
# becomes somebody else, who may do the same, in a user namespace.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

# Its sockets have paths that must be short.
start_libvirtd() {
    local other=()
    if [ "$(id -u)" -eq 0 ]; then
        other=(unshare --user --map-user=1000 --map-group=1000)
    fi
    libvirt_folder=$(mktemp -d /tmp/lbvm.XXXXXX)
    export libvirt_folder
    mkdir "$libvirt_folder"/{run,config,cache,data}
    printf '%s\n' 'stdio_handler = "file"' 'security_driver = "none"' \
        >"$libvirt_folder/qemu.conf"
    mkdir -p "$libvirt_folder/config/libvirt"
    mv "$libvirt_folder/qemu.conf" "$libvirt_folder/config/libvirt"
    env HOME="$libvirt_folder" XDG_RUNTIME_DIR="$libvirt_folder/run" \
        XDG_CONFIG_HOME="$libvirt_folder/config" \
        XDG_CACHE_HOME="$libvirt_folder/cache" \
        XDG_DATA_HOME="$libvirt_folder/data" \
        "${other[@]}" libvirtd --timeout=0 \
        >"$libvirt_folder/log" 2>&1 </dev/null 3>&- 4>&- &
    echo $! >"$libvirt_folder/pid"
    uri="qemu+unix:///session?socket=$libvirt_folder/run/libvirt/libvirt-sock"
    export uri
    for ((i = 0; i < 400; i++)); do
        if virsh -q -c "$uri" list >/dev/null 2>&1; then
            return
        fi
        sleep 0.05
    done
    cat "$libvirt_folder/log" >&2
    echo 'libvirtd does not start' >&2
    return 1
}

stop_libvirtd() {
    local name
    for name in $(virsh -q -c "$uri" list --name); do
        virsh -q -c "$uri" destroy "$name" >/dev/null || true
    done
    kill "$(<"$libvirt_folder/pid")" 2>/dev/null || true
    wait
    rm -rf "$libvirt_folder"
}

virsh_() {
    virsh -q -c "$uri" "$@"
}

# define NAME DEVICE...: a domain without KVM, with these devices in XML, and with
# $memory MiB; $boot is XML of what it boots.
define() {
    local name=$1
    shift
    cat >"$name.xml" <<END
<domain type='qemu'>
  <name>$name</name>
  <memory unit='MiB'>${memory:-32}</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type>${boot:-}</os>
  <devices>
    <emulator>$(command -v qemu-system-x86_64)</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <video><model type='none'/></video>
    $*
  </devices>
</domain>
END
    virsh_ define "$name.xml" >/dev/null
}

# remove NAME: whatever state it is in.
remove() {
    virsh_ destroy "$1" >/dev/null 2>&1 || true
    virsh_ undefine "$1" >/dev/null 2>&1 || true
}

# disk TARGET BUS FILE [MORE]: a qcow2 disk in XML.
disk() {
    printf "<disk type='file' device='disk'>
        <driver name='qemu' type='%s'/>
        <source file='%s'/><target dev='%s' bus='%s'/>%s</disk>\n" \
        "${format:-qcow2}" "$3" "$1" "$2" "${4:-}"
}
