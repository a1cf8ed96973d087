# Freezing a guest for a moment: it never stays frozen, whatever its agent does
# and whatever becomes of us. fakeagent.py plays the agent.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers

guestctl=$abs_top_builddir/tests/unit/guestctl
freeze=guest-fsfreeze-freeze
thaw=guest-fsfreeze-thaw
sync=guest-sync-delimited

teardown() {
    local file
    for file in fake.pid ctl.pid; do
        if [ -s "$file" ]; then
            kill -KILL "$(<"$file")" 2>/dev/null || true
        fi
    done
}

# await COMMAND...: until it succeeds.
await() {
    for ((i = 0; i < 400; i++)); do
        if "$@" 2>/dev/null; then
            return
        fi
        sleep 0.05
    done
    fail "in vain: $*" "$(tail -n 50 agent.log ctl.out ctl.err)"
}

# agent [OPTION]...: an agent behind ./agent.
agent() {
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/cli/fakeagent.py" agent "$@" \
        >fake.out 2>&1 </dev/null 3>&- 4>&- &
    echo $! >fake.pid
    await test -S agent
}

# quiesce POLICY LIMIT PATIENCE: from begin to end.
quiesce() {
    "$guestctl" quiesce "$1" "$2" "$3" agent </dev/null
}

# hold POLICY LIMIT PATIENCE: begins; release ends it.
hold() {
    mkfifo order
    "$guestctl" quiesce "$1" "$2" "$3" agent <order >ctl.out 2>ctl.err \
        3>&- 4>&- &
    echo $! >ctl.pid
    exec 9>order
    await grep -q frozen ctl.out
}

release() {
    echo >&9
    exec 9>&-
    wait "$(<ctl.pid)"
}

# expect_log LINE...: what the agent was asked, and did.
expect_log() {
    diff <(printf '%s\n' "$@") agent.log || fail "the agent was asked for more"
}

thawed() {
    [ "$(grep -E '^now' agent.log | tail -n 1)" = 'now thawed' ]
}

gone() {
    [ "$(tail -n 1 agent.log)" = gone ]
}

# --------------------------------------------------------------------- well

@test "the guest is frozen, and thawed" {
    agent
    run_expect 0 quiesce require 0 0
    expect_output $'frozen\nkept'
    expect_stderr ''
    await gone
    expect_log $sync $freeze 'now frozen' guest-fsfreeze-status $thaw \
        'now thawed' gone
}

@test "it is frozen as long as we want it" {
    agent
    hold require 0 0
    expect_log $sync $freeze 'now frozen'
    release
    grep -qx kept ctl.out
    await thawed
}

@test "what is left in the channel from others is passed over" {
    agent --stale
    run_expect 0 quiesce require 0 0
    expect_output $'frozen\nkept'
}

# ------------------------------------------------------------------ thawing

@test "it is thawed when we are killed" {
    agent
    hold require 600 0
    kill -KILL "$(<ctl.pid)"
    await thawed
    await gone
}

@test "it is thawed when we are told to stop while it freezes" {
    agent --silent-at $freeze
    "$guestctl" quiesce require 600 600 agent >ctl.out 2>ctl.err 3>&- 4>&- &
    echo $! >ctl.pid
    await grep -q 'now frozen' agent.log
    kill -TERM "$(<ctl.pid)"
    status=0
    wait "$(<ctl.pid)" || status=$?
    [ "$status" -eq 1 ]
    [ "$(<ctl.err)" = 'guestctl: interrupted' ]
}

@test "a signal to all of our group does not end who thaws" {
    agent
    mkfifo order
    setsid "$guestctl" quiesce require 600 0 agent <order >ctl.out 2>ctl.err \
        3>&- 4>&- &
    echo $! >ctl.pid
    exec 9>order
    await grep -q frozen ctl.out
    kill -KILL -"$(<ctl.pid)"
    await thawed
}

@test "it is thawed after the time limit, and we are told" {
    agent
    hold require 1 0
    await thawed
    release
    [ "$(tail -n 1 ctl.out)" = \
        'agent: the guest was thawed after 1 second, the time limit' ]
    await gone
    expect_log $sync $freeze 'now frozen' $thaw 'now thawed' gone
}

@test "nobody that reads our output waits for who thaws" {
    agent --hang-at $thaw
    run_expect 1 quiesce require 0 1
    expect_output frozen
    expect_stderr "guestctl: the guest's file systems may still be frozen: \
agent: the guest agent does not answer to $thaw"
}

@test "who is killed while it keeps the guest frozen is found out" {
    agent
    hold require 600 0
    kill -KILL "$(pgrep -P "$(<ctl.pid)")"
    release
    [ "$(tail -n 1 ctl.out)" = \
        'agent: the process that keeps the guest frozen was killed' ]
    thawed
}

@test "nothing of ours stays open in who thaws" {
    agent
    exec 8>lock
    flock 8
    hold require 600 0
    exec 8>&-
    guardian=$(pgrep -P "$(<ctl.pid)")
    ls -l "/proc/$guardian/fd" >fds
    [ "$(grep -c /dev/null fds)" -eq 3 ]
    [ "$(grep -c socket: fds)" -eq 2 ]
    [ "$(grep -c -e '->' fds)" -eq 5 ]
    release
}

# ------------------------------------------------------------ no such agent

@test "without the socket nothing is frozen" {
    run_expect 1 quiesce require 0 0
    expect_output ''
    expect_stderr 'guestctl: agent: No such file or directory'
}

@test "where freezing is only tried, no agent is a message" {
    run_expect 0 quiesce try 0 0
    expect_output 'not frozen'
    expect_stderr 'guestctl: agent: No such file or directory; going on without freezing the guest'
}

@test "an agent that does not answer is asked for nothing" {
    agent --hang-at $sync
    run_expect 1 quiesce require 0 1
    expect_stderr 'guestctl: agent: the guest agent does not answer'
    await gone
    expect_log $sync gone
    run_expect 0 quiesce try 0 1
    expect_output 'not frozen'
    expect_stderr 'guestctl: agent: the guest agent does not answer; going on without freezing the guest'
}

@test "a connection that is closed is an error" {
    agent --die-at $sync
    run_expect 1 quiesce require 0 0
    expect_stderr 'guestctl: agent: the connection to the guest agent was closed'
}

@test "an agent that dies once it has frozen is told to thaw when it is back" {
    agent --close-at $freeze
    run_expect 1 quiesce require 0 0
    expect_output ''
    expect_stderr 'guestctl: agent: the connection to the guest agent was closed'
    await thawed
    await gone
}

@test "an agent that dies as it thaws is told again when it is back" {
    agent --close-at $thaw
    run_expect 1 quiesce require 0 0
    expect_output frozen
    expect_stderr "guestctl: the guest's file systems may still be frozen: \
agent: the connection to the guest agent was closed"
    twice() { [ "$(grep -cx $thaw agent.log)" -eq 2 ]; }
    await twice
}

@test "an agent that refuses to thaw is asked until it does" {
    agent --answer "$thaw={\"error\": {\"desc\": \"not now\"}}"
    run_expect 1 quiesce require 0 0
    expect_stderr "guestctl: the guest's file systems may still be frozen: \
agent: $thaw: not now"
    thrice() { [ "$(grep -cx $thaw agent.log)" -ge 3 ]; }
    await thrice
    kill "$(<fake.pid)"
}

@test "an answer that comes byte by byte is none, and thaws" {
    agent --trickle-at $freeze
    run_expect 1 quiesce require 0 1
    expect_output ''
    expect_stderr "guestctl: agent: the guest agent does not answer to $freeze"
    await thawed
}

# ------------------------------------------------------------------ lying

@test "an agent that answers to others alone is none" {
    agent --wrong-id
    run_expect 1 quiesce require 0 1
    expect_stderr 'guestctl: agent: the guest agent does not answer'
    await gone
    expect_log $sync gone
}

@test "an answer without end to the first question is an error" {
    agent --huge-at $sync
    run_expect 1 quiesce require 0 0
    expect_stderr "guestctl: agent: the guest agent's answer is too long"
}

@test "an answer without end to freezing is an error, and thaws" {
    agent --huge-at $freeze
    run_expect 1 quiesce require 0 0
    expect_output ''
    expect_stderr "guestctl: agent: the guest agent's answer is too long"
    await thawed
}

@test "nonsense as the answer to freezing is an error, and thaws" {
    local text
    for text in 'nonsense' '[]' '{}' '{"return": "2"}' '{"return": -1}' \
            '{"return": 1e99}' '{"error": 5}' '{"error": {"desc": ""}}' \
            '{"return": 99999999999}'; do
        rm -f agent
        agent --answer "$freeze=$text"
        run_expect 1 quiesce require 0 0
        expect_output ''
        expect_stderr "guestctl: agent: $freeze: the guest agent's answer is \
not what it should be"
        await thawed
        kill "$(<fake.pid)"
    done
}

@test "what the agent says of its failure is told, in one line" {
    agent --answer \
        "$freeze={\"error\": {\"class\": \"x\", \"desc\": \"no\\n\\u001b[2J%s\"}}"
    run_expect 1 quiesce require 0 0
    expect_stderr "guestctl: agent: $freeze: no??[2J%s"
    await thawed
}

@test "an agent that froze nothing has not frozen" {
    agent --file-systems 0
    run_expect 1 quiesce require 0 0
    expect_output ''
    expect_stderr 'guestctl: agent: the guest agent froze no file system'
    await gone
    run_expect 0 quiesce try 0 0
    expect_output 'not frozen'
}

@test "an agent that never answers to freezing is told to thaw" {
    agent --silent-at $freeze
    run_expect 1 quiesce require 0 1
    expect_stderr "guestctl: agent: the guest agent does not answer to $freeze"
    await thawed
    await gone
    [ "$(tail -n 4 agent.log | head -n 3)" = \
        "$sync"$'\n'"$thaw"$'\n''now thawed' ]
}

@test "a guest that somebody else has thawed was not kept frozen" {
    agent --thaws-itself
    run_expect 0 quiesce require 0 0
    expect_output $'frozen\nagent: the guest\'s file systems were thawed by somebody else'
}

@test "fewer file systems thawed than frozen were not kept frozen" {
    agent --answer "$thaw={\"return\": 1}"
    run_expect 0 quiesce require 0 0
    expect_output $'frozen\nagent: the guest\'s file systems were thawed by somebody else'
}

@test "an agent that thaws only when it is asked again is asked again" {
    agent --silent-at $thaw
    run_expect 1 quiesce require 0 1
    expect_stderr "guestctl: the guest's file systems may still be frozen: \
agent: the guest agent does not answer to $thaw"
    twice() { [ "$(grep -cx $thaw agent.log)" -eq 2 ]; }
    await twice
    await gone
}

@test "an agent that answers twice is not believed, and thaws" {
    agent --twice-at $freeze
    run_expect 1 quiesce require 0 0
    expect_output frozen
    expect_stderr "guestctl: the guest's file systems may still be frozen: \
agent: $thaw: the guest agent's answer is not what it should be"
    await thawed
}
