#!/bin/bash
# The main job on a real disk: an ext4 file system with files of this machine is
# backed up, changed, backed up twice more, lost, and restored.
#
# The changes go through the patched QEMU, which tracks them, and is killed once:
# the file system is changed in a raw copy (by debugfs), and what differs is
# written to the qcow2 disk with qemu-io. So no step needs root, a kernel driver
# or KVM. At the end
# every file of the restored disk is compared with its original in a plain
# folder, and the disk with that raw copy.
#
# Then a guest boots from that disk, and is backed up while it runs: guest.sh.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

set -euo pipefail
export LC_ALL=C.UTF-8
demo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=demo/output.bash
. "$demo/output.bash"
# shellcheck source=demo/guest.bash
. "$demo/guest.bash"

disk_size=1G
file_bytes=$((300 << 20))
work=$(mktemp -d "${TMPDIR:-/var/tmp}/lbdemo.XXXXXX")
trap 'stop_guest; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP
cd "$work"

# ------------------------------------------------------- a disk with contents

# Real files, mixed but the same each time; kept as what is expected.
gather_files() {
    mkdir expected
    (cd /usr && find . -xdev -type f -readable -size +7k -size -8M \
        -printf '%s %p\n') |
        grep -v '[^A-Za-z0-9_./+ -]' | sort -k 2 |
        shuf --random-source=<(yes) |
        awk -v left="$file_bytes" '
            left > 0 { left -= $1; sub(/^[0-9]+ /, ""); print }' >list
    tar -c -C /usr -T list | tar -x -C expected
    chmod -R u+rwX expected
    rm list
}

make_disk() {
    gather_files
    mke2fs -q -t ext4 -d expected guest.raw "$disk_size" >log 2>&1
}

fill_disk() {
    qemu-img convert -n -f raw -O qcow2 guest.raw disk.qcow2
}

# ------------------------------------------------------------ what changes it

# change SEED [kill]: 40 files vanish, 40 get other contents, 40 and a folder
# come; in the folder 'expected' and, by debugfs, in the raw copy of the disk.
change() {
    local seed=$1 end=${2:-} name old
    cp guest.raw before.raw
    mapfile -t names < <(cd expected && find . -type f ! -name '* *' |
        sort | shuf -n 120 --random-source=<(yes "$seed"))
    printf 'mkdir new%s\n' "$seed" >script
    mkdir "expected/new$seed"
    for name in "${names[@]:0:40}"; do
        rm "expected/$name"
        printf 'rm %s\n' "$name" >>script
    done
    for name in "${names[@]:40:40}"; do
        old=expected/$name
        { echo "$seed"; tac "$old"; } >changed
        mv changed "$old"
        printf 'rm %s\nwrite %s %s\n' "$name" "$old" "$name" >>script
    done
    for name in "${names[@]:80:40}"; do
        old=new$seed/${name##*/}.gz
        gzip -c "expected/$name" >"expected/$old"
        printf 'write expected/%s %s\n' "$old" "$old" >>script
    done
    debugfs -w -f script guest.raw >log 2>&1
    e2fsck -f -n guest.raw >log 2>&1 || fail "debugfs left a damaged file system"
    write_differences "$end"
    rm -r before.raw script pieces
}

# write_differences [kill]: what differs between before.raw and guest.raw, 64 KiB
# by 64 KiB. With 'kill' QEMU gets SIGKILL instead of closing the disk.
write_differences() {
    local status=0
    mkdir pieces
    perl -e '
        open(my $old, "<:raw", "before.raw") or die;
        open(my $new, "<:raw", "guest.raw") or die;
        my ($a, $b);
        for (my $at = 0; read($new, $b, 65536); $at += 65536) {
            read($old, $a, 65536);
            next if $a eq $b;
            open(my $piece, ">:raw", "pieces/$at") or die;
            print $piece $b;
            close($piece) or die;
            print "write -q -s pieces/$at $at ", length($b), "\n";
        }' >writes
    changed=$(wc -l <writes | awk '{ printf "%.1f MiB", $1 / 16 }')
    if [ "$1" = kill ]; then
        echo 'sigraise 9' >>writes
    fi
    # a group, since it is bash that tells of the signal
    { qemu-io -f qcow2 disk.qcow2 <writes >log; } 2>>log || status=$?
    if [ "$1" = kill ]; then
        [ "$status" -eq 137 ] || fail "QEMU survived SIGKILL: status $status"
    else
        [ "$status" -eq 0 ] || fail "qemu-io: status $status"
    fi
    rm writes
}

# ---------------------------------------------------------------------- proof

same_files() {
    qemu-img convert -O raw disk.qcow2 restored.raw
    mkdir found
    debugfs -R 'rdump / found' restored.raw
    rmdir found/lost+found
    diff -r --no-dereference expected found
}

sound_file_system() {
    e2fsck -f -n restored.raw
}

main() {
    export PATH=$PATH:/usr/sbin:/sbin
    headline "A disk: ext4, $disk_size, with files from /usr"
    make_disk
    step - "qemu-img create -f qcow2 -o livebackup=on disk.qcow2 $disk_size"
    fill_disk
    printf '  %s files, disk.qcow2 takes %s\n' \
        "$(find expected -type f | wc -l)" "$(size disk.qcow2)"

    headline "Backup, and again after changes, in full only once"
    step base.lbz 'lbdump disk.qcow2 > base.lbz'
    change 1
    printf '  (120 files changed, deleted, added: %s)\n' "$changed"
    step incr1.lbz 'lbdump --incremental disk.qcow2 > incr1.lbz'
    change 2 kill
    printf '  (and 120 more: %s; then QEMU was killed with SIGKILL)\n' "$changed"
    step incr2.lbz 'lbdump --incremental disk.qcow2 > incr2.lbz'

    headline "The archives: verified, merged into one"
    step - 'lbverify base.lbz incr*.lbz'
    step full.lbz 'lbmerge base.lbz incr*.lbz > full.lbz'
    proof 'every archive is a plain zstd stream' zstd -q -t ./*.lbz

    headline "The disk is lost, and comes back"
    mv disk.qcow2 lost.qcow2
    step disk.qcow2 'lbrestore -o disk.qcow2 base.lbz incr*.lbz'
    step merged.qcow2 'lbrestore -o merged.qcow2 full.lbz'
    proof 'restored disk: qemu-img check finds nothing' \
        qemu-img check disk.qcow2
    proof 'restored disk = the original, byte by byte' \
        qemu-img compare -f qcow2 -F raw disk.qcow2 guest.raw
    proof 'restored from the merged archive = the same' \
        qemu-img compare merged.qcow2 lost.qcow2
    proof 'restored files = the files that were put in, one by one' same_files
    proof 'restored file system: e2fsck finds nothing' sound_file_system
    step incr3.lbz 'lbdump --incremental disk.qcow2 > incr3.lbz'
    demonstrate_guest
    printf '\n  $ lbvm list web1\n'
    lbvm list web1 | sed 's/^/  /'
    printf '%sThe restored disks equal the originals; %s%s\n' "$green" \
        "incrementals go on from them." "$plain"
}

main
