#!/bin/busybox sh
# The init of a guest with QEMU's agent: writes to a file on its disk, /dev/vda,
# for ever, and says all the time how often it could. What comes from the other
# side of the serial line is run.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for number in $(ls /modules | sort -n); do
    insmod "/modules/$number" 2>/dev/null
done
exec >/dev/ttyS1 2>&1
stty raw -echo </dev/ttyS1
until [ -b /dev/vda ] && [ -e "$(echo /dev/vport*p*)" ]; do
    sleep 0.1
done
mount -t ext4 /dev/vda /mnt || exec sleep 999999

agent() {
    mkdir -p /run
    qemu-ga --method=virtio-serial --path="$(echo /dev/vport*p*)" \
        --pidfile=/run/qemu-ga.pid --statedir=/run >/dev/null 2>&1 &
    agent=$!
}

agent
echo 0 >/count
n=0
while :; do
    n=$((n + 1))
    echo "$n" >/mnt/file
    echo "$n" >/count
    sleep 0.1
done &

ticks=0
while sleep 0.2; do
    ticks=$((ticks + 1))
    echo "tick $ticks $(cat /count)"
done &

while read -r line; do
    eval "$line"
    echo "done $line"
done </dev/ttyS1
