# The far end of a repository on another host (ssh_session.h), for any POSIX
# shell: requests on standard input, answers on standard output.
#
# A request is a word and its arguments, each on a line of its own; data follow
# where that is told. A path that begins with ~/ is below the home folder. The
# answers:
#
#     ok N         and N bytes
#     no WHY TEXT  absent, exists, busy or failed, and one line of text
#
# An object is written to a temporary file that gets its name when it is synced.
# Locks are held as long as this shell lives.
#
# SPDX-License-Identifier: GPL-2.0-or-later

LC_ALL=C
export LC_ALL
limit=67108864 # bytes of what is read whole

ok() {
    printf "ok %d\n" "${#1}"
    printf "%s" "$1"
}

no() {
    printf "no %s " "$1"
    printf "%s" "$2" | tr "\n" " "
    printf "\n"
}

line() {
    IFS= read -r word || exit 0
}

path() {
    line
    case $word in
    "~/"*) word=$HOME/${word#"~/"} ;;
    esac
}

# "sync FILE" is younger than "sync".
settle() {
    if [ -z "$sync_one" ]; then
        sync / 2>/dev/null && sync_one=yes || sync_one=no
    fi
    if [ "$sync_one" = yes ]; then
        sync -- "$1"
    else
        sync
    fi
}

parent() {
    case $1 in
    */*) dir=${1%/*} ;;
    *) dir=. ;;
    esac
    [ -n "$dir" ] || dir=/
}

# publish TEMPORARY OBJECT REPLACE
publish() {
    settle "$1" || return
    if [ -d "$2" ]; then
        echo "is a folder" >&2
        return 1
    elif [ "$3" = yes ]; then
        mv -f -- "$1" "$2" || return
    elif ! ln -- "$1" "$2" 2>/dev/null; then
        if [ -e "$2" ]; then
            echo "exists already" >&2
            return 1
        fi
        mv -f -- "$1" "$2" || return # no links in this file system
    else
        rm -f -- "$1"
    fi
    parent "$2"
    settle "$dir"
}

make_folder() {
    if [ "$2" = own ]; then
        mkdir -m 700 -- "$1"
    else
        mkdir -- "$1"
    fi || return
    parent "$1"
    settle "$dir"
}

# read_whole FILE: sets $text; 1: failed, $text tells; 2: absent
read_whole() {
    if text=$(exec 2>&1; head -c $((limit + 1)) -- "$1" && printf x); then
        text=${text%x}
        [ "${#text}" -le "$limit" ] && return 0
        text="is too large"
        return 1
    fi
    [ -e "$1" ] || return 2
    return 1
}

answer_whole() {
    read_whole "$1"
    case $? in
    0) ok "$text" ;;
    2) no absent "" ;;
    *) no failed "$text" ;;
    esac
}

each() {
    if ! [ -d "$1" ]; then
        no failed "is no folder"
        return
    fi
    for file in "$1"/*"$2"; do
        [ -e "$file" ] || continue
        if read_whole "$file"; then
            ok "${file##*/}
$text"
        elif [ -e "$file" ]; then
            no failed "${file##*/}: $text"
            return
        fi
    done
    ok ""
}

# put OBJECT TEMPORARY REPLACE, the text is in $text
put() {
    printf "%s" "$text" >"$2" && publish "$2" "$1" "$3" && return
    rm -f -- "$2"
    return 1
}

# lock FILE DESCRIPTOR exclusive|shared
lock() {
    if ! command -v flock >/dev/null; then
        no failed "the command flock is missing there"
        return
    fi
    if ! [ -e "$1" ] && ! why=$( (exec 2>&1; : >>"$1") ); then
        if [ "$3" = shared ]; then
            ok "" # where there is none and none can be made, nobody prunes
        else
            no failed "$why"
        fi
        return
    fi
    if [ "$3" = shared ]; then
        why=$( (exec 2>&1; : <"$1") ) && eval "exec $2<\"\$1\""
    else
        why=$( (exec 2>&1; : >>"$1") ) && eval "exec $2>>\"\$1\""
    fi || {
        no failed "$why"
        return
    }
    flock -n --"$3" "$2"
    case $? in
    0) ok "" ;;
    1) no busy "" ;;
    *) no failed "flock does not work there" ;;
    esac
}

# Runs what follows; its messages are the text of a failure.
try() {
    if why=$("$@" 2>&1); then
        ok ""
    else
        no failed "$why"
    fi
}

printf "qcow2-livebackup 1\n"
while line; do
    case $word in
    make-folder)
        path; folder=$word; line
        if [ -d "$folder" ]; then
            ok ""
        else
            try make_folder "$folder" "$word"
        fi
        ;;
    list)
        path
        if why=$(exec 2>&1; ls -A -- "$word"); then
            ok "$why"
        else
            no failed "$why"
        fi
        ;;
    each)
        path; folder=$word; line
        each "$folder" "$word"
        ;;
    has)
        path
        if [ -e "$word" ] || [ -h "$word" ]; then
            ok ""
        else
            no absent ""
        fi
        ;;
    get)
        path
        answer_whole "$word"
        ;;
    put)
        path; object=$word; path; temporary=$word; line; replace=$word; line; size=$word
        text=$(head -c "$size"; printf x)
        text=${text%x}
        # A connection that broke: what came is not the object.
        [ "${#text}" -eq "$size" ] || exit 1
        try put "$object" "$temporary" "$replace"
        ;;
    touch)
        path
        if why=$(exec 2>&1; : >>"$word"); then
            ok ""
        else
            no failed "$why"
        fi
        ;;
    stream) # all that follows; then nothing more
        path
        if why=$(exec 2>&1; cat >"$word"); then
            settle "$word" && ok "$(wc -c <"$word")" ||
                no failed "it can not be synced"
        else
            rm -f -- "$word"
            no failed "$why"
        fi
        exit 0
        ;;
    publish)
        path; temporary=$word; path
        try publish "$temporary" "$word" no
        ;;
    delete)
        path
        if [ -d "$word" ]; then
            ok ""
        else
            try rm -f -- "$word"
        fi
        ;;
    sync)
        path
        try settle "$word"
        ;;
    fetch)
        path
        if ! [ -e "$word" ]; then
            no absent ""
        elif why=$(exec 2>&1; : <"$word" && wc -c <"$word"); then
            printf "ok %d\n" $((why))
            cat -- "$word"
        else
            no failed "$why"
        fi
        ;;
    lock)
        path; file=$word; line; descriptor=$word; line
        lock "$file" "$descriptor" "$word"
        ;;
    unlock)
        line
        eval "exec $word>&-"
        ok ""
        ;;
    run) # a count, and so many words: a program takes the place of this shell
        line; n=$word
        set --
        while [ "$n" -gt 0 ]; do
            path
            set -- "$@" "$word"
            n=$((n - 1))
        done
        exec "$@" </dev/null
        ;;
    *)
        no failed "this request is not known"
        ;;
    esac
done
