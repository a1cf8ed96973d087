#!/bin/busybox sh
# The init of the demonstration's guest: writes files to its disk, /dev/vda, for
# ever, and says each second how many there were.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
# Modules that need each other are in their order; some are there already.
for number in $(ls /modules | sort -n); do
    insmod "/modules/$number" 2>/dev/null
done
exec >/dev/ttyS1 2>&1
until [ -b /dev/vda ]; do
    sleep 0.1
done
mount -t ext4 /dev/vda /mnt || exec sleep 999999
mkdir -p /mnt/guest
echo 0 >/count
echo up

while sleep 1; do
    cat /count
done &

n=0
while :; do
    n=$((n + 1))
    # 250 files that are written again and again: new ones, and in place
    file=/mnt/guest/$((n % 250))
    { echo "$n"; head -c $((n % 7 * 10000 + 3000)) /dev/urandom; } >"$file"
    if [ $((n % 20)) = 0 ]; then
        rm -f "/mnt/guest/$(((n + 100) % 250))"
        sync
    fi
    echo "$n" >/count
done
