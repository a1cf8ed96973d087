# A guest with QEMU's own agent stands still for a moment, and goes on whatever
# happens: through the agent's socket, and through libvirt.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load ../cli/helpers
load ../cli/libvirt

guestctl=$abs_top_builddir/tests/unit/guestctl
: "${QLB_GUEST:=$abs_top_builddir/guest}"

setup_file() {
    bash "$abs_top_srcdir/tests/guest/prepare.sh" "$QLB_GUEST"
    start_libvirtd
}

teardown_file() {
    stop_libvirtd
}

setup() {
    helpers_setup
    here=$PWD
    mkfs.ext4 -q disk.raw 64M
    make_initrd
}

teardown() {
    local file
    for file in ctl.pid qemu.pid; do
        if [ -s "$file" ]; then
            kill -KILL "$(<"$file")" 2>/dev/null || true
        fi
    done
    remove guest
}

# make_initrd: what was prepared, the agent with its libraries, busybox, init.
make_initrd() {
    ldd "$QLB_GUEST/qemu-ga" | grep -o '/[^ ]*' >libraries
    "$ORACLE_PYTHON" -B - "$abs_top_srcdir/tests/guest" "$QLB_GUEST" \
        >initrd <<'END'
import sys

here, guest = sys.argv[1:]
sys.path.insert(0, here)
from initrd import DIRECTORY, PROGRAM, archive


def read(path):
    with open(path, "rb") as file:
        return file.read()


with open("libraries", encoding="utf-8") as file:
    libraries = sorted({line.strip() for line in file})
folders = {"bin", "mnt", "run", "sys"}
for path in libraries:
    parts = path.strip("/").split("/")[:-1]
    folders |= {"/".join(parts[:n + 1]) for n in range(len(parts))}
sys.stdout.buffer.write(read(guest + "/initrd.agent") + archive(
    [(folder, DIRECTORY, b"") for folder in sorted(folders)]
    + [(path.strip("/"), PROGRAM, read(path)) for path in libraries]
    + [("bin/busybox", PROGRAM, read("/bin/busybox")),
       ("bin/qemu-ga", PROGRAM, read(guest + "/qemu-ga")),
       ("init", PROGRAM, read(here + "/agent-init.sh"))]))
END
}

# await COMMAND...: until it succeeds.
await() {
    for ((i = 0; i < 2400; i++)); do
        if "$@" 2>/dev/null; then
            return
        fi
        sleep 0.05
    done
    fail "in vain: $*" "$(tail -n 5 guest.log ctl.out ctl.err qemu.log)"
}

# ------------------------------------------------------------------ the guest

# start_qemu: its agent is behind ./agent; lines to ./serial.in are run in it.
start_qemu() {
    mkfifo serial.in serial.out
    qemu-system-x86_64 -nodefaults -display none -machine pc -accel tcg \
        -m 192 -kernel "$QLB_GUEST/vmlinuz" -initrd initrd \
        -append 'console=ttyS0 panic=-1 quiet' -serial file:console \
        -chardev pipe,id=serial,path=serial -serial chardev:serial \
        -drive file=disk.raw,format=raw,if=virtio \
        -device virtio-serial -chardev \
        socket,id=agent,path=agent,server=on,wait=off \
        -device virtserialport,chardev=agent,name=org.qemu.guest_agent.0 \
        >qemu.log 2>&1 </dev/null 3>&- 4>&- &
    echo $! >qemu.pid
    exec 7<>serial.in
    cat <>serial.out >guest.log 3>&- 4>&- 7>&- &
    echo $! >ctl.pid
    await grep -q '^tick 3 ' guest.log
    await answers agent
    reach=(agent)
}

# start_domain: of libvirt, called guest.
start_domain() {
    memory=192
    boot="<kernel>$QLB_GUEST/vmlinuz</kernel><initrd>$here/initrd</initrd>
        <cmdline>console=ttyS0 panic=-1 quiet</cmdline>"
    define guest "$(format=raw disk vda virtio "$here/disk.raw")" \
        "<serial type='file'><source path='$here/console'/></serial>" \
        "<serial type='file'><source path='$here/guest.log'/></serial>" \
        "<channel type='unix'><target type='virtio'
             name='org.qemu.guest_agent.0'/></channel>"
    virsh_ start guest
    await grep -q '^tick 3 ' guest.log
    await virsh_ domtime guest >/dev/null
    reach=("$uri" guest)
}

# answers SOCKET: the agent has started.
answers() {
    "$guestctl" quiesce require 0 1 "$1" </dev/null >ctl.out 2>ctl.err
}

# guest COMMAND: done in it.
guest() {
    echo "$1" >&7
    await grep -q "^done $1" guest.log
}

ticks() {
    tr -d '\r' <guest.log | sed -n 's/^tick \([0-9]*\) [0-9]*$/\1/p' | tail -n 1
}

# count_at TICK
count_at() {
    tr -d '\r' <guest.log | sed -n "s/^tick $1 \([0-9]*\)$/\1/p"
}

reached() { [ "$(ticks)" -ge "$1" ]; }

# stands_still: over ten ticks, after what was under way.
stands_still() {
    local now
    now=$(ticks)
    await reached $((now + 13))
    [ "$(count_at $((now + 3)))" -eq "$(count_at $((now + 13)))" ]
}

grown() { [ "$(count_at "$(ticks)")" -gt "$1" ]; }

# goes_on: beyond what it had written, which the next tick but one knows.
goes_on() {
    local now
    now=$(ticks)
    await reached $((now + 2))
    await grown "$(count_at $((now + 2)))"
}

hold() {
    mkfifo order
    "$guestctl" quiesce require "$1" 0 "${reach[@]}" <order >ctl.out \
        2>ctl.err 3>&- 4>&- 7>&- &
    ctl=$!
    exec 9>order
    await grep -q frozen ctl.out
}

release() {
    echo >&9
    exec 9>&-
    wait "$ctl"
}

# ------------------------------------------------------------------- claims

frozen_and_thawed() {
    goes_on
    hold 600
    stands_still
    release
    goes_on
    grep -qx kept ctl.out
}

killed() {
    hold 600
    stands_still
    kill -KILL "$ctl"
    goes_on
}

too_late() {
    hold 1
    goes_on
    release
    grep -q 'was thawed after 1 second, the time limit' ctl.out
}

@test "agent: the guest stands still until it is thawed" {
    start_qemu
    frozen_and_thawed
}

@test "agent: it goes on when we are killed" {
    start_qemu
    killed
}

@test "agent: it goes on after the time limit" {
    start_qemu
    too_late
}

@test "agent: one that hangs, or is not there, is found out and freezes nothing later" {
    start_qemu
    guest 'kill -STOP $agent'
    run_expect 1 "$guestctl" quiesce require 0 1 agent
    expect_stderr 'guestctl: agent: the guest agent does not answer'
    guest 'kill -CONT $agent'
    goes_on
    guest 'kill -KILL $agent'
    run_expect 1 "$guestctl" quiesce require 0 1 agent
    expect_stderr 'guestctl: agent: the guest agent does not answer'
    guest agent
    await answers agent
    goes_on
}

@test "libvirt: the guest stands still until it is thawed" {
    start_domain
    frozen_and_thawed
}

@test "libvirt: it goes on when we are killed" {
    start_domain
    killed
}

@test "libvirt: it goes on after the time limit" {
    start_domain
    too_late
}

@test "libvirt: somebody else who thaws is found out" {
    start_domain
    hold 600
    virsh_ domfsthaw guest >/dev/null
    release
    [ "$(tail -n 1 ctl.out)" = \
        "guest: the guest's file systems were thawed by somebody else" ]
}
