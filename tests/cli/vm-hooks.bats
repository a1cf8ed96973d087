# The commands that run before and after a backup.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers

guestctl=$abs_top_builddir/tests/unit/guestctl

# Appends what it is told to events; does as the file named like the event says.
setup() {
    helpers_setup
    cat >hook <<'EOF'
echo "$LBVM_MACHINE $LBVM_EVENT $LBVM_STATUS" >>events
if [ -e "on.$LBVM_EVENT" ]; then
    . "./on.$LBVM_EVENT"
fi
EOF
}

# hooks STATUS: those of a backup that ends with that status.
hooks() {
    "$guestctl" hooks web "${limit:-0}" "$1" '. ./hook'
}

expect_events() {
    diff <(printf '%s\n' "$@") events
}

@test "before, after thawing, and after the backup" {
    run_expect 0 hooks 0
    expect_output ''
    expect_stderr ''
    expect_events 'web pre-freeze 0' 'web post-thaw 0' 'web post-backup 0'
}

@test "a backup that fails is told with its status, after thawing" {
    run_expect 0 hooks 4
    expect_events 'web pre-freeze 0' 'web post-thaw 0' 'web failed 4'
}

@test "a hook that fails before stops the backup, and the others still run" {
    echo 'exit 3' >on.pre-freeze
    run_expect 1 hooks 0
    expect_stderr 'guestctl: web: the pre-freeze hook ended with status 3: . ./hook'
    expect_events 'web pre-freeze 0' 'web post-thaw 0' 'web failed 1'
}

@test "a command that is not there is an error" {
    run_expect 1 "$guestctl" hooks web 0 0 ./absent
    expect_stderr_has 'web: the pre-freeze hook ended with status 127: ./absent'
}

@test "a hook that fails after thawing is told, and the last one runs" {
    echo 'kill -KILL $$' >on.post-thaw
    run_expect 1 hooks 0
    expect_stderr 'guestctl: web: the post-thaw hook was killed by signal 9: . ./hook'
    expect_events 'web pre-freeze 0' 'web post-thaw 0' 'web failed 1'
}

@test "what a hook prints goes to standard error, and it reads nothing" {
    echo 'echo said; cat; echo more >&2' >on.pre-freeze
    run_expect 0 bash -c 'echo input | "$@"' sh "$guestctl" hooks web 0 0 \
        '. ./hook'
    expect_output ''
    expect_stderr $'said\nmore'
}

@test "a hook has no descriptor of ours" {
    # no pipe in the hook: its shell would have that open
    echo 'ls -l /proc/$$/fd >listing' >on.pre-freeze
    run_expect 0 bash -c 'exec 7<hook 8>lock; "$@"' sh "$guestctl" hooks web \
        0 0 'sh ./hook'
    sed -n 's/.* \([0-9]*\) ->.*/\1/p' listing >fds
    # the shell opens what it reads the script from
    [ "$(grep -c -x -E '[3-8]' fds)" -eq 0 ]
    [ "$(grep -c -x -E '[0-2]' fds)" -eq 3 ]
}

@test "a hook that is too slow is ended with all that it started" {
    cat >on.pre-freeze <<'EOF'
trap '' TERM
sh -c 'trap "" TERM; echo $$ >child; while :; do sleep 1; done' &
while [ ! -s child ]; do :; done
wait
EOF
    limit=1 run_expect 1 hooks 0
    expect_stderr 'guestctl: web: the pre-freeze hook was ended after 1 second: . ./hook'
    expect_events 'web pre-freeze 0' 'web post-thaw 0' 'web failed 1'
    # killed, and perhaps not yet waited for
    state=$(sed -n 's/^State:\t\(.\).*/\1/p' "/proc/$(<child)/status") || true
    [[ "$state" = '' || "$state" = Z ]]
}

@test "who is told to stop ends the first hook, and runs the others" {
    echo 'sleep 600' >on.pre-freeze
    "$guestctl" hooks web 0 0 '. ./hook' 2>err 3>&- &
    pid=$!
    for ((i = 0; i < 400; i++)); do
        [ ! -s events ] || break
        sleep 0.05
    done
    kill -TERM "$pid"
    status=0
    wait "$pid" || status=$?
    [ "$status" -eq 1 ]
    [ "$(<err)" = 'guestctl: interrupted' ]
    expect_events 'web pre-freeze 0' 'web post-thaw 0' 'web failed 1'
}
