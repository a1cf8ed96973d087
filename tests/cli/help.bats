# What the tools say of themselves, the manual and the completion agree; what is
# wrong on a command line is named.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers

tools=(lbctl lbdump lbmerge lbverify lbrestore lbvm)
# programs with options of their own: the commands of lbctl and lbvm are such
programs=(lbctl lbdump lbmerge lbverify lbrestore lbvm
          "lbctl enable" "lbctl disable" "lbctl status" "lbctl confirm"
          "lbctl prune" "lbctl recover"
          "lbvm backup" "lbvm list" "lbvm show" "lbvm verify" "lbvm prune"
          "lbvm restore" "lbvm export" "lbvm init-timer")

# manual NAME: the page of the section 1 as plain text.
manual() {
    mandoc -T ascii -O width=78 "$abs_top_srcdir/man/$1.1" | sed 's/.\x08//g'
}

# manual_section NAME SECTION [SUBSECTION]: the lines of it.
manual_section() {
    manual "$1" | awk -v section="$2" -v subsection="${3:-}" '
        /^[A-Z]/ { in_section = $0 == section; sub_now = ""; next }
        /^   [^ ]/ { sub_now = substr($0, 4); next }
        in_section && (subsection == "" || sub_now == subsection)'
}

# The left column of --help, as in '-o, --output=FILE'.
help_options() {
    "$@" --help | sed -n -E 's/^  ( +|-., )(--[^ ]+).*/\1\2/p' |
        sed 's/^ *//' | sort
}

# The tags of option lists, in the same form. Before them is an empty line or a
# heading, so a line of text that happens to begin with an option is none.
tags() {
    awk '!text && /^     -/; { text = /^     / }' |
        grep -o -E '^     (-., )?--[a-z-]+(=[A-Z]+)?' | sed 's/^ *//' | sort
}

# manual_options TOOL [COMMAND]
manual_options() {
    if [ "$1" != lbctl ] && [ "$1" != lbvm ]; then
        manual "$1" | tags
        return
    fi
    {
        manual_section "$1" OPTIONS
        if [ "$#" -gt 1 ]; then
            manual_section "$1" COMMANDS "$2"
        fi
    } | tags
}

# The lines behind 'Usage:', without it and without indentation.
help_synopsis() {
    "$@" --help | sed -n -e '/^$/q' -e 's/^Usage: //' -e 's/^ *//' -e p
}

# expect_equal WHAT EXPECTED GOT: neither empty nor different.
expect_equal() {
    if [ -z "$2" ] || [ "$2" != "$3" ]; then
        fail "$1:" "$(diff <(printf '%s\n' "$2") <(printf '%s\n' "$3"))"
    fi
}

# ------------------------------------------------------------------- manual

@test "the manual has every option of --help, and no other" {
    for program in "${programs[@]}"; do
        # shellcheck disable=SC2086
        expect_equal "$program: --help (<) and manual (>) differ" \
            "$(help_options $program)" "$(manual_options $program)"
    done
}

@test "the manual's synopsis is that of --help" {
    for tool in lbdump lbmerge lbverify lbrestore; do
        expect_equal "$tool: --help (<) and manual (>) differ" \
            "$(help_synopsis "$tool")" \
            "$(manual_section "$tool" SYNOPSIS | sed -n 's/^ *\(.\)/\1/p')"
    done
}

@test "the manual has the commands of --help, and their synopses" {
    for tool in lbctl lbvm; do
        commands=$("$tool" --help |
            sed -n '/^Commands:/,/^$/s/^  \([a-z-]*\) .*/\1/p')
        expect_equal "$tool: commands" "$commands" \
            "$(manual "$tool" | sed -n '/^COMMANDS/,/^EXIT/s/^   \([a-z]\)/\1/p')"
        expect_equal "$tool: synopses" \
            "$(for command in $commands; do
                   help_synopsis "$tool" "$command"
               done)" \
            "$(manual_section "$tool" SYNOPSIS | sed -n 's/^ *\(.\)/\1/p')"
    done
}

@test "the manual has every exit status" {
    for tool in "${tools[@]}"; do
        statuses=$(seq 0 5)
        if [ "$tool" = lbmerge ]; then
            statuses=$(seq 0 4) # it opens no image
        elif [ "$tool" = lbdump ] || [ "$tool" = lbvm ]; then
            statuses=$(seq 0 6) # the alarm of --audit
        fi
        expect_equal "$tool: status expected (<), documented (>)" \
            "$statuses" "$(manual_section "$tool" "EXIT STATUS" |
                sed -n 's/^     \([0-9]\) .*/\1/p')"
    done
}

@test "the manual pages are free of warnings" {
    for page in "$abs_top_srcdir"/man/*.[1-9]; do
        run_expect 0 mandoc -T lint -W warning "$page"
        expect_output ''
        if command -v groff >/dev/null; then
            run_expect 0 groff -mandoc -ww -z "$page"
            expect_stderr ''
        fi
    done
}

@test "every page that a page of ours names is there" {
    sed -n -E 's/^\.Xr ((lb|qcow2-)[a-z0-9-]*) ([0-9]).*/\1.\3/p' \
        "$abs_top_srcdir"/man/*.[1-9] | sort -u >named
    [ -s named ]
    while read -r page; do
        [ -e "$abs_top_srcdir/man/$page" ] || fail "man/$page does not exist"
    done <named
}

# The indented commands of the README's tour.
readme_tour() {
    sed -n '/^A quick tour/,/^Exit statuses/s/^    //p' "$abs_top_srcdir/README"
}

manual_tour() {
    sed -n '/^\.Sh A TOUR/,/^\.Sh PIPES/p' \
        "$abs_top_srcdir/man/qcow2-livebackup.7" |
        sed -n '/^\.Bd/,/^\.Ed/{/^\./!p}'
}

@test "the tour of the README works word for word" {
    readme_tour >tour
    grep -q lbrestore tour
    # its first line wants the patched QEMU
    PATH=${QLB_QEMU:-$abs_top_srcdir/build-qemu/stage/bin}:$PATH \
        run_expect 0 bash -e tour
    expect_stderr ''
    expect_same disk.qcow2 qcow2 lost.qcow2 qcow2
    qemu_check disk.qcow2
}

@test "the tour of the manual works word for word" {
    manual_tour >tour
    sed -i 's/^lbrestore -o/mv disk.qcow2 lost.qcow2; &/' tour
    grep -q lbmerge tour
    qemu-img create -q -f qcow2 disk.qcow2 1G
    qemu_write disk.qcow2 1M 3M 7
    run_expect 0 bash -e tour
    expect_stderr ''
    expect_same disk.qcow2 qcow2 lost.qcow2 qcow2
    run_expect 0 lbverify --image=disk.qcow2 base.lbz
}

# ---------------------------------------------------------------- --version

@test "--version names tool, package and version" {
    version=$(sed -n 's/^AC_INIT(\[[^]]*\], \[\([^]]*\)\].*/\1/p' \
        "$abs_top_srcdir/configure.ac")
    for program in "${programs[@]}"; do
        # shellcheck disable=SC2086
        run_expect 0 $program --version
        expect_output "${program%% *} (qcow2 livebackup) $version"
        expect_stderr ''
    done
}

# ------------------------------------------------------------- usage errors

# expect_usage PROGRAM TEXT: standard error has this, and where to look; the
# program may be 'lbctl COMMAND'.
expect_usage() {
    expect_output ''
    expect_stderr "${1%% *}: $2
Try '$1 --help'."
}

@test "an unknown option is named" {
    for program in "${programs[@]}"; do
        # shellcheck disable=SC2086
        run_expect 2 $program --no-such-option
        expect_usage "$program" \
            "unknown or ambiguous option '--no-such-option'"
    done
}

@test "an ambiguous option is named" {
    run_expect 2 lbdump --inc --pro --o x --t x
    expect_usage lbdump "unknown or ambiguous option '--o'"
}

@test "a wrong option is named wherever it stands" {
    run_expect 2 lbdump disk.qcow2 --bogus
    expect_usage lbdump "unknown or ambiguous option '--bogus'"
    run_expect 2 lbdump disk.qcow2 -x
    expect_usage lbdump "unknown option '-x'"
    run_expect 2 lbdump --copy=3 disk.qcow2
    expect_usage lbdump "option '--copy=3' takes no argument"
}

@test "a missing argument is named" {
    for tool in lbdump lbmerge lbverify lbrestore; do
        run_expect 2 "$tool" --output
        expect_usage "$tool" "option '--output' wants an argument"
        run_expect 2 "$tool" -o
        expect_usage "$tool" "option '-o' wants an argument"
    done
    run_expect 2 lbctl enable --granularity
    expect_usage 'lbctl enable' "option '--granularity' wants an argument"
}

@test "a missing operand is named" {
    run_expect 2 lbctl
    expect_usage lbctl "a COMMAND is wanted: enable, disable, status, \
confirm, prune or recover"
    for command in enable disable status recover; do
        run_expect 2 lbctl "$command"
        expect_usage "lbctl $command" "one DISK is wanted, 0 given"
        run_expect 2 lbctl "$command" a b
        expect_usage "lbctl $command" "one DISK is wanted, 2 given"
    done
    run_expect 2 lbctl confirm disk.qcow2
    expect_usage 'lbctl confirm' "DISK, UUID and ROOTDIGEST are wanted"
    run_expect 2 lbctl prune
    expect_usage 'lbctl prune' "a DISK is wanted"
    run_expect 2 lbdump
    expect_usage lbdump "one DISK is wanted, 0 given"
    run_expect 2 lbmerge
    expect_usage lbmerge "at least one ARCHIVE is wanted"
    run_expect 2 lbverify
    expect_usage lbverify "at least one ARCHIVE is wanted"
    run_expect 2 lbrestore a.lbz
    expect_usage lbrestore "-o DISK is wanted"
    run_expect 2 lbrestore -o disk.qcow2
    expect_usage lbrestore "at least one ARCHIVE is wanted"
}

@test "an unknown command is named" {
    run_expect 2 lbctl stauts disk.qcow2
    expect_usage lbctl "unknown command 'stauts'"
}

@test "an argument that does not fit is named" {
    run_expect 2 lbdump --since yesterday disk.qcow2
    expect_usage lbdump "--since: 'yesterday' is no UUID"
    run_expect 2 lbdump --level=20 disk.qcow2
    expect_usage lbdump "--level: '20' is no number from 1 to 19"
    run_expect 2 lbdump --rate-limit=fast disk.qcow2
    expect_usage lbdump \
        "--rate-limit: 'fast' is no size (as 65536, 64K, 10M, 2G)"
    run_expect 2 lbdump --digest=md5 disk.qcow2
    expect_usage lbdump "--digest: 'md5' is neither xxh3 nor sha256"
    run_expect 2 lbdump --chain='a b' disk.qcow2
    expect_usage lbdump "--chain: 'a b' is no label: 1 to 22 of the \
characters A-Z a-z 0-9 . _ -"
    run_expect 2 lbctl enable --granularity=3000 disk.qcow2
    expect_usage 'lbctl enable' "--granularity: '3000' is no power of two from 4K to 2G"
    run_expect 2 lbrestore --format=vmdk -o disk.vmdk a.lbz
    expect_usage lbrestore "--format: 'vmdk' is neither qcow2 nor raw"
}

@test "options that exclude each other are named" {
    run_expect 2 lbdump --incremental --auto disk.qcow2
    expect_usage lbdump "--incremental, --since, --auto and --overlay exclude \
each other"
    run_expect 2 lbverify -o x.lbz a.lbz
    expect_usage lbverify "-o stores what comes through standard input: \
ARCHIVE must be '-'"
    run_expect 2 lbverify - a.lbz
    expect_usage lbverify "standard input ('-') must be the only ARCHIVE, \
without --image and --at"
}

# --------------------------------------------------------------- completion

# complete_line WORD...: what is offered for the last one, sorted, in $offered.
complete_line() {
    COMP_WORDS=("$@")
    COMP_CWORD=$(($# - 1))
    COMPREPLY=()
    # shellcheck disable=SC1090
    . "$abs_top_srcdir/completion/$1"
    "_$1" || true
    offered=$(printf '%s\n' "${COMPREPLY[@]}" | LC_ALL=C sort)
}

# expect_offered CANDIDATE...
expect_offered() {
    expect_equal "${COMP_WORDS[*]}: expected (<), offered (>)" \
        "$(printf '%s\n' "$@" | LC_ALL=C sort)" "$offered"
}

# A disk with three checkpoints, the last of them unconfirmed, in $uuids.
make_disk() {
    qemu-img create -q -f qcow2 disk.qcow2 64M
    lbctl enable disk.qcow2
    qemu_write disk.qcow2 1M 1M
    lbdump -o base.lbz disk.qcow2
    lbdump --incremental -o incr1.lbz disk.qcow2
    lbdump -q --incremental --chain main disk.qcow2 | cat >incr2.lbz
    mapfile -t uuids < <(lbctl status --json disk.qcow2 |
                         jq -r '.checkpoints[].uuid')
    [ "${#uuids[@]}" -eq 3 ]
}

@test "completion offers every option, and no other" {
    for program in "${programs[@]}"; do
        # shellcheck disable=SC2086
        complete_line $program -
        # shellcheck disable=SC2086
        expect_equal "$program: --help (<) and completion (>) differ" \
            "$(help_options $program | sed 's/=.*//; s/, /\n/' |
               LC_ALL=C sort)" "$offered"
    done
}

@test "completion offers the commands of lbctl" {
    complete_line lbctl ''
    expect_offered confirm disable enable prune recover status \
        --help --version
    complete_line lbctl e
    expect_offered enable
}

@test "completion offers what is in the repository of lbvm" {
    qemu-img create -q -f qcow2 disk.qcow2 1M
    for machine in web1 web2 db; do
        lbvm backup -q --repository repo $machine disk.qcow2
    done
    complete_line lbvm ''
    expect_offered backup cat export init-timer list ls mount prune restore \
        show umount verify --help --version
    export LBVM_REPOSITORY=repo
    complete_line lbvm restore ''
    expect_offered db web1 web2
    complete_line lbvm prune web1 w
    expect_offered web1 web2
    unset LBVM_REPOSITORY
    complete_line lbvm verify --repository repo d
    expect_offered db
    id=$(lbvm list --repository repo --json db | jq -r '.backups[0].id')
    complete_line lbvm restore --repository = repo -o out db ''
    expect_offered "$id"
    complete_line lbvm verify --repository repo db --id ''
    expect_offered "$id"
    complete_line lbvm backup --repository repo web1 d
    expect_offered disk.qcow2
}

@test "completion offers disks and archives, or else any file" {
    mkdir folder
    touch a.lbz b.lbz disk.qcow2 disk.img other
    complete_line lbdump ''
    expect_offered disk.img disk.qcow2 folder
    complete_line lbctl status d
    expect_offered disk.img disk.qcow2
    complete_line lbctl status --json d
    expect_offered disk.img disk.qcow2
    complete_line lbdump ot
    expect_offered other
    complete_line lbmerge ''
    expect_offered a.lbz b.lbz folder
    complete_line lbverify ''
    expect_offered - a.lbz b.lbz folder
    complete_line lbverify --image ''
    expect_offered disk.img disk.qcow2 folder
    complete_line lbrestore -o ''
    expect_offered disk.img disk.qcow2 folder
    complete_line lbdump -o a
    expect_offered a.lbz
}

@test "completion offers values of options" {
    complete_line lbdump --digest ''
    expect_offered sha256 xxh3
    complete_line lbdump --digest = s
    expect_offered sha256
    complete_line lbrestore --format =
    expect_offered qcow2 raw
}

@test "completion offers the checkpoints of the disk" {
    make_disk
    complete_line lbdump disk.qcow2 --since ''
    expect_offered "${uuids[@]}"
    complete_line lbdump disk.qcow2 --since = "${uuids[1]:0:8}"
    expect_offered "${uuids[1]}"
    complete_line lbctl prune disk.qcow2 ''
    expect_offered "${uuids[@]}"
    complete_line lbctl prune --keep 2 disk.qcow2 ''
    expect_offered "${uuids[@]}"
    complete_line lbctl confirm disk.qcow2 ''
    expect_offered "${uuids[2]}"
    complete_line lbdump disk.qcow2 --chain ''
    expect_offered main
}

@test "completion looks for the disk behind the cursor, too" {
    make_disk
    COMP_WORDS=(lbdump --since '' disk.qcow2)
    COMP_CWORD=2
    # shellcheck disable=SC1091
    . "$abs_top_srcdir/completion/lbdump"
    _lbdump || true
    offered=$(printf '%s\n' "${COMPREPLY[@]}" | LC_ALL=C sort)
    expect_offered "${uuids[@]}"
}

@test "completion offers the archives on the line for --at" {
    make_disk
    complete_line lbrestore -o x base.lbz incr1.lbz incr2.lbz --at ''
    expect_offered "${uuids[@]}"
}
