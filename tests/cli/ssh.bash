# A real sshd on loopback, and one that isn't there. A test begins with
#     load helpers
#     load backup
#     load vm
#     load ssh
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

# serve_ssh [LINE]...: sshd at 127.0.0.1, with these lines in its configuration;
# $LBVM_SSH is an ssh that it lets in, and $far a repository there.
serve_ssh() {
    local i
    [ -e key ] || ssh-keygen -q -t ed25519 -N '' -f key
    [ -e host_key ] || ssh-keygen -q -t ed25519 -N '' -f host_key
    cp key.pub authorized_keys
    if [ "$(id -u)" = 0 ]; then
        mkdir -p /run/sshd # which sshd wants from root alone
    fi
    for ((i = 0; i < 20; i++)); do
        port=$(free_port)
        sshd_config "$@" >sshd_config
        stop_ssh
        rm -f sshd.pid
        /usr/sbin/sshd -f sshd_config -E sshd.log </dev/null 3>&- 4>&- || continue
        if wait_for_sshd; then
            break
        fi
    done
    [ "$i" -lt 20 ] || fail "$(cat sshd.log)"
    echo "[127.0.0.1]:$port $(cat host_key.pub)" >known_hosts
    export LBVM_SSH="ssh -F none -i $PWD/key -o IdentitiesOnly=yes -o UserKnownHostsFile=$PWD/known_hosts"
    far=ssh://127.0.0.1:$port$PWD/far
}

sshd_config() {
    printf '%s\n' "Port $port" "ListenAddress 127.0.0.1" \
        "HostKey $PWD/host_key" "PidFile $PWD/sshd.pid" \
        "AuthorizedKeysFile $PWD/authorized_keys" "StrictModes no" \
        "UsePAM no" "PasswordAuthentication no" "PermitRootLogin yes" \
        "SetEnv PATH=$PATH" "$@"
}

wait_for_sshd() {
    local i
    for ((i = 0; i < 100; i++)); do
        if [ -s sshd.pid ]; then
            return 0
        fi
        if grep -q 'already in use' sshd.log; then
            return 1
        fi
        sleep 0.05
    done
    return 1
}

stop_ssh() {
    if [ -s sshd.pid ]; then
        kill "$(cat sshd.pid)" || true
        rm -f sshd.pid
    fi
}

teardown() {
    stop_ssh
}

# fake_ssh [SHELL-COMMAND]: $LBVM_SSH runs what it is given here, with what that
# command (default: cat) lets through of its input; $far is a repository there.
fake_ssh() {
    printf '%s\n' '#!/bin/bash' 'while [ "$1" != -- ]; do shift; done' \
        "exec < <(${1:-cat}); exec bash -c \"\$3\"" >fake_ssh
    chmod +x fake_ssh
    export LBVM_SSH=$PWD/fake_ssh
    far=ssh://backup@far.example$PWD/far
}
