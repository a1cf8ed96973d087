# Disks in a storage daemon with livebackup, and a guest that writes to them. A
# test begins with
#     load qemu
#     load ../cli/backup
#     load live
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

teardown() {
    if [ -s qsd.pid ]; then
        kill -KILL "$(<qsd.pid)" 2>/dev/null || true
    fi
}

# serve NAME[,PROPERTY]...: a storage daemon has NAME.qcow2 open for writing,
# and exports it as NAME.
serve() {
    local arguments=() disk name
    for disk; do
        name=${disk%%,*}
        arguments+=(
            --blockdev "driver=qcow2,node-name=$disk,file.driver=file,file.filename=$name.qcow2"
            --export "type=nbd,id=e-$name,node-name=$name,name=$name,writable=on")
    done
    "$QLB_QEMU/qemu-storage-daemon" --daemonize --pidfile qsd.pid \
        --chardev socket,id=m,path=qmp,server=on,wait=off --monitor chardev=m \
        --nbd-server addr.type=unix,addr.path=nbd "${arguments[@]}" 3>&- 4>&-
}

# guest NAME COMMAND...: of qemu-io.
guest() {
    local name=$1 arguments=()
    shift
    for command; do
        arguments+=(-c "$command")
    done
    qemu-io -f raw "${arguments[@]}" "nbd+unix:///$name?socket=nbd" >/dev/null
}

# keep NAME: what the guest reads now, in NAME.raw.
keep() {
    qemu-img convert -f raw -O raw "nbd+unix:///$1?socket=nbd" "$1.raw"
}

make_disks() {
    head -c 40M /dev/urandom >noise
    for name in a b; do
        "$QLB_QEMU/qemu-img" create -q -f qcow2 -o livebackup=on $name.qcow2 96M
        "$QLB_QEMU/qemu-io" -f qcow2 -c 'write -s noise 0 40M' \
            -c 'write -P 3 60M 2M' $name.qcow2 >/dev/null
    done
}

# Starts when the backup has begun.
write_meanwhile() {
    while [ ! -e "$1.orig.qcow2" ]; do
        sleep 0.02
    done
    for i in 1 2 3 4 5 6; do
        guest "$1" "write -P $i $((i * 5))M 3M" "write -z $((i * 4))M 1M" \
            "discard ${i}M 128k" "write -P 7 $((60 + i))M 200k"
    done
}
