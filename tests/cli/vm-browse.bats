# lbvm ls and cat: single files out of a backup.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm
load mounts

# a_tree: the files that are to be found, in ./tree; and ext4 with them, fs.raw.
a_tree() {
    mkdir -p tree/etc "tree/a folder"
    echo '/dev/vda / ext4' >tree/etc/fstab
    head -c 3000001 /dev/urandom >"tree/a folder/with \"quotes\" & more"
    : >tree/empty
    ln -s etc/fstab tree/link
    run_expect 0 mkfs.ext4 -q -d tree "${@:2}" fs.raw "${1:-32M}"
}

# back_up NAME RAW: a backup of the machine web1 with that disk.
back_up() {
    qemu-img convert -f raw -O qcow2 "$2" "$1.qcow2"
    run_expect 0 lbctl enable "$1.qcow2"
    run_expect 0 lbvm backup -q web1 "$1.qcow2"
}

# expect_tree [OPTION]...: all of it can be read.
expect_tree() {
    run_expect 0 lbvm ls "$@" web1 /
    expect_output 'a folder/
empty
etc/
link
lost+found/'
    run_expect 0 lbvm ls "$@" web1 '/a folder'
    expect_output 'with "quotes" & more'
    lbvm cat "$@" web1 '/a folder/with "quotes" & more' >got
    cmp got "tree/a folder/with \"quotes\" & more"
    lbvm cat "$@" web1 /empty >got
    cmp got tree/empty
    run_expect 0 lbvm cat "$@" web1 /etc/fstab
    expect_output '/dev/vda / ext4'
    expect_nothing_runs
}

@test "a disk that is one file system" {
    a_tree
    back_up vda fs.raw
    expect_tree
    expect_tree --disk=vda
    run_expect 0 lbvm ls --json web1 /etc
    [ "$(jq -c '.entries[] | [.name, .type, .size, .mode, .uid]' \
        <<<"$output")" = '["fstab","file",16,420,0]' ]
    [ "$(jq -r '"\(.machine) \(.disk) \(.path)"' <<<"$output")" = \
        'web1 vda /etc' ]
}

@test "an older backup has what was in it" {
    local id
    a_tree
    back_up vda fs.raw
    id=$(lbvm show --json web1 | jq -r .id)
    echo new >new
    run_expect 0 debugfs -w -R 'write new new' fs.raw
    qemu-img convert -n -f raw -O qcow2 fs.raw vda.qcow2
    run_expect 0 lbvm backup -q web1 vda.qcow2
    run_expect 0 lbvm cat web1 /new
    expect_output new
    expect_tree_of_first() {
        run_expect 1 lbvm cat web1 "$id" /new
        expect_stderr "lbvm: disk 'vda': /new: File not found by ext2_lookup"
    }
    expect_tree_of_first
}

@test "partitions: MBR, logical ones, GPT" {
    a_tree
    head -c 2M /dev/urandom >noise
    for kind in mbr gpt; do
        rm -rf repo
        "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/cli/partitioned.py" $kind \
            disk.raw noise noise fs.raw
        back_up vda disk.raw
        expect_tree
        case $kind in
            mbr) expect_tree --partition=6 ;;
            gpt) expect_tree --partition=4 ;;
        esac
        run_expect 1 lbvm ls --partition=1 web1 /
        expect_stderr "lbvm: disk 'vda': that partition has no ext2, ext3 or ext4 file system; 'lbvm mount' shows the disk as a whole"
        run_expect 1 lbvm ls --partition=9 web1 /
    done
}

@test "several file systems, none, a table that leads back to itself" {
    a_tree 8M
    for kind in mbr loop; do
        rm -rf repo
        "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/cli/partitioned.py" $kind \
            disk.raw fs.raw fs.raw fs.raw
        back_up vda disk.raw
        run_expect 2 lbvm ls web1 /
        expect_stderr "lbvm: disk 'vda': there are file systems in several partitions; --partition is wanted: 1, 5, 6"
        expect_tree --partition=5
    done
    rm -rf repo
    head -c 2M /dev/urandom >noise
    back_up vda noise
    run_expect 1 lbvm cat web1 /etc/fstab
    expect_stderr "lbvm: disk 'vda': there is no ext2, ext3 or ext4 file system; 'lbvm mount' shows the disk as a whole"
    expect_nothing_runs
}

@test "what is no file, and what is not there" {
    a_tree
    back_up vda fs.raw
    run_expect 1 lbvm cat web1 /etc
    expect_stderr "lbvm: disk 'vda': /etc: is no file, but: directory"
    run_expect 1 lbvm cat web1 /link
    expect_stderr "lbvm: disk 'vda': /link: is no file, but: symlink"
    run_expect 1 lbvm cat web1 /nothing
    expect_stderr "lbvm: disk 'vda': /nothing: File not found by ext2_lookup"
    run_expect 1 lbvm ls web1 /etc/fstab
    expect_stderr "lbvm: disk 'vda': /etc/fstab: is no folder, but: regular"
    run_expect 2 lbvm cat web1 etc
    expect_stderr "lbvm: 'etc': a PATH begins with a slash, and has no newline
Try 'lbvm cat --help'."
    run_expect 1 lbvm cat --disk=vdb web1 /etc/fstab
    expect_nothing_runs
}

# What a guest wrote shortly before the point in time is in the journal alone.
@test "a journal is replayed, and the backup stays as it was" {
    local block
    a_tree
    block=$(debugfs -R 'blocks /etc/fstab' fs.raw 2>/dev/null)
    printf '%-4096s' 'from the journal' >page
    printf 'jo\njw -b %d page\njc\n' "${block%% *}" >script
    run_expect 0 debugfs -w -f script fs.raw
    back_up vda fs.raw
    expect_unchanged run_expect 0 lbvm cat web1 /etc/fstab
    expect_output 'from the journal'
}

@test "damage where the file is: status 4, and it is told" {
    local archive
    a_tree
    back_up vda fs.raw
    ids=("$(lbvm show --json web1 | jq -r .id)")
    archive=$(archive_of 0 vda)
    # most of the archive is the file of noise
    flip "$archive" $(($(stat -c %s "$archive") / 2))
    run_to got 4 lbvm cat web1 '/a folder/with "quotes" & more'
    expect_stderr_has "lbvm: disk 'vda': $PWD/$archive: damaged at offset " \
        ' does not match its digest'
    expect_nothing_runs
    run_expect 0 lbvm cat web1 /etc/fstab
}
