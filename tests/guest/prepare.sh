#!/bin/bash
# Makes a guest: DIR/vmlinuz, a kernel of the distribution, DIR/initrd, the
# modules that it needs to see a virtio disk, DIR/initrd.ext4, these and what it
# needs to mount ext4, DIR/initrd.agent, these and a channel to an agent, and
# DIR/qemu-ga, QEMU's agent. The program that runs as its init is added by others.
#
#     prepare.sh DIR
#
# Packages are downloaded and unpacked, not installed: nothing outside of DIR
# changes. Where DIR is complete there is nothing to do, and no network needed.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# The small one first: half the size, and boots faster.
packages=(linux-image-cloud-amd64 linux-image-amd64)
modules=(virtio_pci virtio_blk)
modules_ext4=("${modules[@]}" 'crc32c_generic?' ext4)
modules_agent=("${modules_ext4[@]}" 'virtio_console?')

die() {
    printf 'prepare.sh: %s\n' "$*" >&2
    exit 1
}

[ "$#" -eq 1 ] || die "usage: prepare.sh DIR"
mkdir -p "$1"
dir=$(cd "$1" && pwd)
# qemu-ga is the last to appear
if [ -s "$dir/vmlinuz" ] && [ -s "$dir/qemu-ga" ]; then
    exit 0
fi
for tool in apt-get dpkg python3; do
    command -v "$tool" >/dev/null || die "$tool is missing"
done

work=$(mktemp -d "$dir/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/deb" "$work/tree" "$work/state/lists/partial" \
    "$work/cache/archives/partial"

# Without the user _apt, who can't write here.
options=(-q)
if [ "$(id -u)" -eq 0 ]; then
    options+=(-o APT::Sandbox::User=root)
fi

# kernel_of META: the package that this one stands for.
kernel_of() {
    apt-cache "${options[@]}" show --no-all-versions "$1" 2>/dev/null |
        sed -n 's/^Depends: *\(linux-image-[^ ,]*\).*/\1/p' | head -n 1
}

download_kernel() {
    local meta kernel
    for meta in "${packages[@]}"; do
        kernel=$(kernel_of "$meta") || continue
        if [ -n "$kernel" ] &&
                (cd "$work/deb" && apt-get "${options[@]}" download "$kernel")
        then
            return 0
        fi
    done
    return 1
}

download() {
    download_kernel &&
        (cd "$work/deb" && apt-get "${options[@]}" download qemu-guest-agent)
}

if ! download >"$work/log" 2>&1; then
    # No lists, or of another day: fresh ones, for this download alone.
    options+=(-o "Dir::State::lists=$work/state/lists"
              -o "Dir::Cache=$work/cache")
    if ! { apt-get "${options[@]}" update && download; } >>"$work/log" 2>&1
    then
        cat "$work/log" >&2
        die "can't download a kernel (${packages[*]}) and qemu-guest-agent"
    fi
fi

for package in "$work"/deb/*.deb; do
    dpkg -x "$package" "$work/tree"
done
python3 -B "$here/initrd.py" "$work/tree" "$work/initrd" "${modules[@]}"
python3 -B "$here/initrd.py" "$work/tree" "$work/initrd.ext4" \
    "${modules_ext4[@]}"
python3 -B "$here/initrd.py" "$work/tree" "$work/initrd.agent" \
    "${modules_agent[@]}"
mv "$work"/tree/boot/vmlinuz-* "$dir/vmlinuz"
mv "$work/initrd" "$dir/initrd"
mv "$work/initrd.ext4" "$dir/initrd.ext4"
mv "$work/initrd.agent" "$dir/initrd.agent"
mv "$work/tree/usr/sbin/qemu-ga" "$dir/qemu-ga"
