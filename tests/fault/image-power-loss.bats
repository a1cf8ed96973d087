# A host that loses power keeps what was synced, and of what was written since
# any pages in any order: still the old state or the new one, leaks at worst.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load ../cli/helpers

U1=11111111-1111-4111-8111-111111111111
U2=22222222-2222-4222-8222-222222222222
U3=33333333-3333-4333-8333-333333333333

setup() {
    helpers_setup
    imagectl=$abs_top_builddir/tests/unit/imagectl
    shim=$abs_top_builddir/tests/fault/shim.so
    cat >replay.py <<'END'
"""replay.py LOG BASE DIR: the images that a power loss may leave."""
import random
import sys

PAGE = 4096


def read_log(path):
    """Epochs between syncs, each a list of pages (offset, bytes)."""
    data = open(path, "rb").read()
    epochs, pos = [[]], 0
    while pos < len(data):
        end = data.index(b"\n", pos)
        words = data[pos:end].split()
        pos = end + 1
        if words[0] == b"S":
            epochs.append([])
        if words[0] != b"W":
            continue
        offset, length = int(words[1]), int(words[2])
        while length > 0:
            n = min(length, PAGE - offset % PAGE)
            epochs[-1].append((offset, data[pos:pos + n]))
            pos, offset, length = pos + n, offset + n, length - n
    return epochs


def apply(image, pages):
    for offset, data in pages:
        if len(image) < offset + len(data):
            image.extend(bytes(offset + len(data) - len(image)))
        image[offset:offset + len(data)] = data


def main():
    log, base, directory = sys.argv[1:]
    random.seed(1)
    done, number = bytearray(open(base, "rb").read()), 0
    for pages in read_log(log):
        for keep in (0, 0.1, 0.5, 0.5, 0.9):
            image = bytearray(done)
            apply(image, [p for p in pages if random.random() < keep])
            with open("%s/%d.qcow2" % (directory, number), "wb") as file:
                file.write(image)
            number += 1
        for page in pages if len(pages) < 8 else []:
            image = bytearray(done)
            apply(image, [page])
            with open("%s/%d.qcow2" % (directory, number), "wb") as file:
                file.write(image)
            number += 1
        apply(done, pages)
    print(number)


main()
END
}

make_disk() {
    qemu-img create -q -f qcow2 "$@" base.qcow2 64M
    qemu-img bitmap --add base.qcow2 other
    "$imagectl" enable base.qcow2 12
    "$imagectl" add base.qcow2 $U1 main
    qemu_write base.qcow2 8M 64k
    "$imagectl" add base.qcow2 $U2 main
    qemu_write base.qcow2 30M 64k
}

# each_loss VERB...
each_loss() {
    local verb=$1 image old new now number
    shift
    cp base.qcow2 new.qcow2
    rm -rf log lost
    mkdir lost
    QLB_FAULT_PATH=new.qcow2 QLB_FAULT_LOG_FILE=$PWD/log LD_PRELOAD=$shim \
        ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
        "$imagectl" "$verb" new.qcow2 "$@" >/dev/null
    number=$("$ORACLE_PYTHON" -B replay.py log base.qcow2 lost)
    [ "$number" -gt 5 ] || fail "$verb: only $number images"
    old=$("$imagectl" status base.qcow2) new=$("$imagectl" status new.qcow2)
    for image in lost/*.qcow2; do
        local status=0
        qemu-img check -f qcow2 "$image" >check.out 2>&1 || status=$?
        case $status in
            0|3) ;;
            *) fail "$verb, $image: $(cat check.out)" ;;
        esac
        now=$("$imagectl" status "$image")
        [ "$now" = "$old" ] || [ "$now" = "$new" ] ||
            fail "$verb, $image: $now"
        "$imagectl" recover "$image" >/dev/null
        qemu_check "$image"
    done
}

@test "power lost while it adds a checkpoint" {
    make_disk
    each_loss add $U3 main
}

@test "power lost while it adds, clusters of 4 KiB, refcounts of 64 bits" {
    make_disk -o cluster_size=4k,refcount_bits=64
    each_loss add $U3 main
}

@test "power lost while it folds, confirms, disables" {
    make_disk -o cluster_size=4k
    each_loss fold 1
    each_loss fold 0
    each_loss confirm 1
    each_loss disable
}
