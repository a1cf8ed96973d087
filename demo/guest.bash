# The second half of the demonstration: a guest that is backed up while it runs.
#
# A kernel of the distribution boots in the patched QEMU (without KVM) and writes
# to the disk all the while. To have something to compare with, it is stopped for
# a moment around the begin of each backup, and the disk copied; a backup needs
# no such thing.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

firmware=()
for folder in /usr/share/seabios /usr/share/qemu; do
    if [ -d "$folder" ]; then
        firmware+=(-L "$folder")
    fi
done

# make_initrd: what was prepared, with busybox and the init.
make_initrd() {
    python3 -B - "$demo" "$QLB_GUEST/initrd.ext4" >initrd <<'END'
import sys

demo, modules = sys.argv[1:]
sys.path.insert(0, demo + "/../tests/guest")
from initrd import DIRECTORY, PROGRAM, archive


def read(path):
    with open(path, "rb") as file:
        return file.read()


sys.stdout.buffer.write(read(modules) + archive([
    ("bin", DIRECTORY, b""), ("mnt", DIRECTORY, b""),
    ("bin/busybox", PROGRAM, read("/bin/busybox")),
    ("init", PROGRAM, read(demo + "/init.sh"))]))
END
}

# start_guest FORMAT FILE: with that disk.
start_guest() {
    rm -f monitor.in monitor.out guest.log
    mkfifo monitor.in monitor.out
    qemu-system-x86_64 "${firmware[@]}" -nodefaults -display none \
        -machine pc -accel tcg -m 192 -kernel "$QLB_GUEST/vmlinuz" \
        -initrd initrd -append 'console=ttyS0 panic=-1 quiet' \
        -serial file:console -serial file:guest.log \
        -blockdev driver=file,node-name=file,filename="$2" \
        -blockdev driver="$1",node-name=disk,file=file,discard=unmap \
        -device virtio-blk-pci,drive=disk \
        -qmp unix:backup.qmp,server=on,wait=off \
        -chardev pipe,id=monitor,path=monitor -mon monitor \
        >log 2>&1 &
    guest_pid=$!
    # opened for both, so that nobody waits for the other end
    exec {monitor}<>monitor.in
    cat <>monitor.out >monitor.log &
    reader_pid=$!
    await 'the guest does not boot' grep -q '^up' guest.log
}

# await TEXT COMMAND...: until it succeeds.
await() {
    local text=$1 end=$((SECONDS + 120))
    shift
    until "$@" 2>/dev/null; do
        [ "$SECONDS" -lt "$end" ] && kill -0 "$guest_pid" 2>/dev/null ||
            fail "$text"
        sleep 0.05
    done
}

hmp() {
    printf '%s\n' "$*" >&"$monitor"
}

times_paused() {
    grep -a -c 'VM status: paused' monitor.log || true
}

freeze() {
    local before
    before=$(times_paused)
    hmp stop
    hmp info status
    is_paused() { [ "$(times_paused)" -gt "$before" ]; }
    await 'the guest does not stop' is_paused
}

checkpoints() {
    lbctl status --json disk.qcow2 | jq '.checkpoints | length'
}

# live N COMMAND: a backup, and the disk as it was at its point in time.
live() {
    local number=$1 before thaw_pid
    before=$(checkpoints)
    is_begun() { [ "$(checkpoints)" -gt "$before" ]; }
    freeze
    qemu-img convert -U -f qcow2 -O raw disk.qcow2 "then$number.raw"
    { await 'the backup does not begin' is_begun; hmp cont; } &
    thaw_pid=$!
    step "live$number.lbz" "$2"
    wait "$thaw_pid"
}

stop_guest() {
    if [ -n "${guest_pid:-}" ]; then
        kill "$guest_pid" 2>/dev/null || true
        wait "$guest_pid" 2>/dev/null || true
        kill "$reader_pid" 2>/dev/null || true
        guest_pid=
    fi
}

# The least that it wrote in a second, and all.
say_what_it_wrote() {
    tr -d '\r' <guest.log | awk '
        /^[0-9]+$/ {
            if (seen++ > 1 && (least == "" || $1 - last < least)) {
                least = $1 - last
            }
            last = $1
        }
        END { print "  (the guest wrote " last " files, at least " least \
                    " in each second)" }'
}

# The journal is played back as when a machine has lost power.
sound_after_replay() {
    cp "$1" replayed.raw
    e2fsck -f -y replayed.raw || [ $? -le 1 ]
    e2fsck -f -n replayed.raw
}

# machine_backup ARGUMENTS: of the whole machine, into a repository.
machine_backup() {
    step - "lbvm backup -q $1"
}

demonstrate_machine() {
    headline "The whole machine, in a repository: while it runs, and stopped"
    export LBVM_REPOSITORY=$PWD/backups
    machine_backup '--qmp=backup.qmp web1'
    sleep 2
    machine_backup '--qmp=backup.qmp web1'
    sleep 1
    machine_backup '--qmp=backup.qmp web1'
    stop_guest
    machine_backup 'web1 disk.qcow2'
    step - 'lbvm prune --keep-last=3 web1'
    step - 'lbvm verify web1'
    step restored/disk.qcow2 'lbvm restore -q -o restored web1'
    proof 'restored disk = the stopped machine'"'"'s, byte by byte' \
        qemu-img compare -f qcow2 -F qcow2 restored/disk.qcow2 disk.qcow2
}

# A file out of a backup, as anybody; and a guest that runs on it, without a
# restore.
demonstrate_opening() {
    local name
    headline "A backup is opened at once: for one file, and for a guest to boot"
    name=$(cd expected && find . -type f -size +64k ! -name '* *' | sort |
        sed -n '1s/^.//p')
    step - "lbvm ls web1 ${name%/*} | grep ${name##*/}"
    step file "lbvm cat web1 $name > file"
    proof 'the file is what was put in' cmp file "expected$name"
    step - 'lbvm mount --writable -o opened web1'
    printf '  $ qemu-system-x86_64 ... -drive file=opened/disk.img,format=raw\n'
    start_guest raw opened/disk.img
    proof 'the guest writes to its disk, which is the backup' \
        await 'the guest does not write' grep -q '^[1-9]' guest.log
    stop_guest
    step - 'lbvm umount opened'
    step - 'lbvm verify web1'
}

demonstrate_guest() {
    local number archives=''
    make_initrd
    headline "A guest boots with the disk, and is backed up while it runs"
    start_guest qcow2 disk.qcow2
    printf '  (it writes all the while, and is paused for a moment at the begin\n'
    printf '  of each backup only so that there is something to compare with)\n'
    sleep 2
    live 0 'lbdump --qmp=backup.qmp -o live0.lbz'
    sleep 3
    live 1 'lbdump --qmp=backup.qmp --incremental -o live1.lbz'
    sleep 3
    live 2 'lbdump --qmp=backup.qmp --incremental -o live2.lbz'
    sleep 2
    say_what_it_wrote
    demonstrate_machine
    demonstrate_opening

    headline "Its disk of each point in time"
    for number in 0 1 2; do
        archives+=" live$number.lbz"
        step "then$number.qcow2" "lbrestore -o then$number.qcow2$archives"
        proof 'it equals what the guest had then, byte by byte' \
            qemu-img compare -f qcow2 -F raw "then$number.qcow2" \
            "then$number.raw"
        proof 'its file system: e2fsck finds nothing, once the journal is replayed' \
            sound_after_replay "then$number.raw"
        rm "then$number.raw" "then$number.qcow2" replayed.raw
    done
    step incr4.lbz 'lbdump --incremental disk.qcow2 > incr4.lbz'
}
