# lbvm backup --nbd: of a machine in a stock QEMU on another host, whose disks are
# read over TCP with TLS.
#
# The other host's files have names that mean others here: QEMU calls its own folder
# /proc/self/cwd. What lbvm finds by these names is not what QEMU has.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load vm
load stock
load tls

setup() {
    stock_setup
    mkdir -m 700 far far/scratch
    images=$PWD/far
    images_there=/proc/self/cwd
    port=$(free_port)
    # not what lbvm is to read
    qemu-img create -q -f qcow2 vda.qcow2 40M
    qemu-img create -q -f qcow2 vdb.qcow2 40M
}

backup() {
    run_expect 0 lbvm backup web1 --qmp=s/qmp "${way[@]}" "$@"
}

# plain: the options; with_keys, with_certificates: those, and of QEMU ($tls).
plain() {
    way=("--nbd=127.0.0.1:$port" --scratch=/proc/self/cwd/scratch)
    tls=()
}

with_keys() {
    mkdir -p keys
    quiet psktool -u alice -p keys/keys.psk
    plain
    way+=(--tls-creds=tls --tls-username=alice --tls-psk-file=keys/keys.psk)
    tls=(-object "tls-creds-psk,id=tls,endpoint=server,dir=$PWD/keys")
}

with_certificates() {
    authority good
    certificate good server 'cn = far' 'ip_address = 127.0.0.1' tls_www_server
    certificate good client 'cn = backup' tls_www_client
    plain
    way+=(--tls-creds=tls --tls-certificates=good)
    tls=(-object "tls-creds-x509,id=tls,endpoint=server,dir=$PWD/good,verify-peer=on")
}

# Nothing in QEMU; of the overlays there are empty files, one for each disk.
expect_clean() {
    expect_nothing_left
    monitor '{"execute": "nbd-server-stop"}' | tail -n 1 | grep -q 'not running'
    [ "$(find far/scratch -type f -size +0)" = '' ]
    [ "$(find far/scratch -type f | wc -l)" -le 2 ]
}

expect_refused() {
    expect_stderr "lbvm: $1"
    expect_clean
    [ "$(bitmaps | wc -l)" = "${2:-2}" ]
}

@test "with certificates: in full, then what has changed" {
    with_certificates
    machine "${tls[@]}"
    expect_incrementals expect_clean
}

@test "with a key: in full, then what has changed" {
    with_keys
    machine "${tls[@]}"
    backup
    expect_disk vda
    guest vda 'write -P 3 7M 1M'
    backup
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
    expect_clean
}

@test "the point in time is exact while the guest writes" {
    with_keys
    machine "${tls[@]}"
    expect_exact_point expect_clean
}

refused="can't connect: the server has ended the TLS handshake; does it take our certificate or key?"

# fails STATUS MESSAGE [OPTION]...: with these options, and nothing is left.
fails() {
    run_expect "$1" lbvm backup web1 --qmp=s/qmp "${@:3}"
    expect_output ''
    expect_stderr "lbvm: $2"
    expect_clean
    [ "$(bitmaps | wc -l)" = 2 ]
    [ "$(lbvm list --json web1 | jq '.backups | length')" = 1 ]
}

# The failures before have cost nothing.
expect_next_is_right() {
    guest vda 'write -P 77 7M 1M'
    backup
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vda
    expect_disk vdb
    expect_clean
}

@test "certificates that one side does not trust" {
    with_certificates
    authority other
    certificate other client 'cn = backup' tls_www_client
    mkdir wrong-server wrong-client
    cp good/client-* other/ca-cert.pem wrong-server
    cp other/client-* good/ca-cert.pem wrong-client
    machine "${tls[@]}"
    backup
    fails 1 "127.0.0.1:$port: can't connect: the server's certificate is not trusted, or not for this host" \
        "${way[@]}" --tls-certificates=wrong-server
    fails 1 "127.0.0.1:$port: $refused" \
        "${way[@]}" --tls-certificates=wrong-client
    # the certificate is not for that name
    fails 1 "127.0.0.2:$port: can't connect: the server's certificate is not trusted, or not for this host" \
        "${way[@]}" "--nbd=127.0.0.2:$port"
    expect_next_is_right
}

@test "keys that QEMU does not know" {
    with_keys
    quiet psktool -u alice -p other.psk
    quiet psktool -u bob -p other.psk
    machine "${tls[@]}"
    backup
    fails 1 "127.0.0.1:$port: $refused" "${way[@]}" --tls-psk-file=other.psk
    fails 1 "127.0.0.1:$port: $refused" "${way[@]}" --tls-psk-file=other.psk \
        --tls-username=bob
    run_expect 1 lbvm backup web1 --qmp=s/qmp "${way[@]}" --tls-psk-file=none
    expect_stderr_has "lbvm: 127.0.0.1:$port: can't connect: " \
        'No such file or directory'
    expect_clean
    expect_next_is_right
}

@test "credentials that QEMU does not have, or not for a server" {
    with_keys
    machine "${tls[@]}" \
        -object "tls-creds-psk,id=client,endpoint=client,username=alice,dir=$PWD/keys"
    backup
    fails 1 "s/qmp: nbd-server-start: No TLS credentials with id 'none'" \
        "${way[@]}" --tls-creds=none
    fails 1 "s/qmp: nbd-server-start: Expected TLS credentials for a server endpoint" \
        "${way[@]}" --tls-creds=client
    expect_next_is_right
}

@test "credentials that let in anybody" {
    with_certificates
    machine "${tls[@]}" -object "tls-creds-anon,id=anon,endpoint=server" \
        -object "tls-creds-x509,id=open,endpoint=server,dir=$PWD/good,verify-peer=off"
    backup
    for id in anon open; do
        fails 2 "127.0.0.1: with QEMU's credentials '$id' anybody could read the disks meanwhile; they want tls-creds-x509 with verify-peer=on, or tls-creds-psk" \
            "${way[@]}" --tls-creds=$id
    done
    expect_next_is_right
}

@test "a client that QEMU's list does not have" {
    with_certificates
    machine "${tls[@]}" \
        -object '{"qom-type": "authz-list", "id": "nobody", "policy": "deny", "rules": []}' \
        -object '{"qom-type": "authz-list", "id": "us", "policy": "deny", "rules": [{"match": "CN=backup", "policy": "allow", "format": "exact"}]}'
    backup --tls-authz=us
    run_expect 1 lbvm backup web1 --qmp=s/qmp "${way[@]}" --tls-authz=nobody
    expect_stderr_has "lbvm: 127.0.0.1:$port: can't connect: "
    expect_clean
    expect_next_is_right
}

@test "a server that speaks no TLS is not talked to" {
    with_keys
    machine "${tls[@]}"
    backup
    qemu-nbd --fork --pid-file="$PWD/other.pid" -t -r -b 127.0.0.1 -p "$port" \
        -x '' -f qcow2 vda.qcow2 >other.out 2>&1 </dev/null 3>&- 4>&-
    run_expect 1 lbvm backup web1 --qmp=s/qmp "${way[@]}" --nbd-listen=127.0.0.2
    other=$(<other.pid)
    kill "$other"
    while kill -0 "$other" 2>/dev/null; do sleep 0.05; done
    expect_stderr_has "lbvm: 127.0.0.1:$port: can't connect: " TLS
    expect_clean
    expect_next_is_right
}

@test "plain text does not leave the host unasked" {
    plain
    machine
    backup
    [ "$(kinds)" = 'full full' ]
    expect_disk vda
    fails 2 '192.0.2.1: the disks would be read in plain text; --tls-creds=ID is wanted, or a tunnel that ends on this host, or --nbd-plain' \
        "${way[@]}" --nbd=192.0.2.1
    fails 1 "192.0.2.1: QEMU's host does not have the address 192.0.2.1; --nbd-listen=ADDRESS is wanted" \
        "${way[@]}" --nbd=192.0.2.1 --nbd-plain
    expect_next_is_right
}

@test "a port, or a server, that is somebody else's" {
    with_keys
    machine "${tls[@]}"
    backup
    "$ORACLE_PYTHON" -c '
import socket, sys, time
s = socket.socket()
s.bind(("127.0.0.1", int(sys.argv[1])))
s.listen()
print(flush=True)
time.sleep(1000)' "$port" >listens 2>&1 </dev/null 3>&- 4>&- &
    listener=$!
    until [ -s listens ]; do sleep 0.05; done
    fails 5 "127.0.0.1: port $port is in use there; --nbd=127.0.0.1:PORT-PORT gives a choice" \
        "${way[@]}"
    backup "--nbd=127.0.0.1:$port-$((port + 9))"
    [ "$(kinds)" = 'incremental incremental' ]
    kill $listener
    wait $listener || true
    monitor "{\"execute\": \"nbd-server-start\", \"arguments\": {\"addr\": {\"type\": \"unix\", \"data\": {\"path\": \"$folder/nbd\"}}}}" >answers
    run_expect 5 lbvm backup web1 --qmp=s/qmp "${way[@]}"
    expect_stderr "lbvm: QEMU's NBD server is used by somebody else, as by a migration; try again when that has ended"
    monitor '{"execute": "nbd-server-stop"}' | tail -n 1 >answers
    [ "$(cat answers)" = '{"return": {}}' ]
    expect_next_is_right
}

@test "a scratch folder that is none" {
    with_keys
    machine "${tls[@]}"
    backup
    run_expect 1 lbvm backup web1 --qmp=s/qmp "${way[@]}" --scratch=/nowhere
    expect_stderr_has 'lbvm: /nowhere/lbvm-' '.overlay: QEMU: ' \
        'No such file or directory'
    expect_clean
    fails 2 "--nbd wants --scratch=FOLDER, an absolute path on QEMU's host, of a folder that only QEMU's user may enter" \
        "${way[@]}" --scratch=scratch
    expect_next_is_right
}

@test "options that don't go together" {
    refuse() {
        run_expect 2 lbvm backup web1 "${@:2}"
        expect_stderr "lbvm: $1
Try 'lbvm backup --help'."
    }
    refuse "--nbd-... and --tls-... go with --nbd=HOST" --qmp=q --tls-creds=t
    refuse "for TLS QEMU has to have credentials, too: --tls-creds=ID" \
        --qmp=q --nbd=h --tls-certificates=/c
    refuse "--nbd-plain and --tls-creds exclude each other" \
        --qmp=q --nbd=h --tls-creds=t --nbd-plain
    refuse "--tls-certificates and --tls-psk-file exclude each other" \
        --qmp=q --nbd=h --tls-creds=t --tls-certificates=/c --tls-psk-file=/p
    refuse "--tls-username goes with --tls-psk-file" \
        --qmp=q --nbd=h --tls-creds=t --tls-username=u
    refuse "--durable and --nbd exclude each other" --qmp=q --nbd=h --durable
    refuse "--nbd is for a machine that runs; it wants --qmp or --domain" \
        --nbd=h /disk.qcow2
    for host in '' a/b 'a b' ::1 '[::1' '[]' u@h; do
        refuse "--nbd: '$host' is not HOST[:PORT[-PORT]]; an IPv6 address is [ADDRESS]" \
            --qmp=q "--nbd=$host"
    done
    for ports in '' 0 65536 1:2 1-; do
        run_expect 2 lbvm backup web1 --qmp=q "--nbd=h:$ports"
    done
    refuse "--nbd: the last port: '1' is no number from 2 to 65535" \
        --qmp=q --nbd=h:2-1
}

# cut BYTES: a backup in full, whose connection ends after so many; its status.
cut() {
    rm -f proxy.out
    "$ORACLE_PYTHON" -B "$abs_top_srcdir/tests/cli/tcpproxy.py" "$port" "$1" \
        >proxy.out 2>proxy.err </dev/null 3>&- 4>&- &
    proxy=$!
    until [ -s proxy.out ]; do
        kill -0 $proxy || fail "$(cat proxy.err)"
        sleep 0.02
    done
    status=0
    lbvm backup web1 --full --qmp=s/qmp "${way[@]}" --nbd-listen=127.0.0.2 \
        >cut.out 2>cut.err </dev/null 3>&- 4>&- || status=$?
    kill $proxy 2>/dev/null || true
    wait $proxy 2>/dev/null || true
}

@test "the connection is cut: no backup, and the next is incremental" {
    with_keys
    machine "${tls[@]}"
    backup
    head -c 3000000 /dev/urandom >noise
    guest vdb "write -s $PWD/noise 20M 3000000"
    backup
    before=$(lbvm list --json web1 | jq '.backups | length')
    for bytes in 1 200 1000 2000 4000 10000 6000000 17000000; do
        cut $bytes
        [ $status = 1 ] || fail "$bytes: status $status" "$(cat cut.err)"
        [ "$(wc -l <cut.err)" = 1 ]
        [ "$(lbvm list --json web1 | jq '.backups | length')" = "$before" ]
        expect_clean
        [ "$(bitmaps | wc -l)" = 2 ]
        guest vda "write -P $((bytes % 199)) $((bytes % 30))M 100k"
    done
    cut 100000000
    [ $status = 0 ] || fail "$(cat cut.err)"
    expect_disk vdb
    expect_next_is_right
}

@test "lbvm is killed meanwhile: the next one clears what is left" {
    with_keys
    machine "${tls[@]}"
    backup
    guest vda 'write -P 3 2M 4M'
    begin_backup --full --qmp=s/qmp "${way[@]}" --rate-limit=1M
    # one on QEMU's host, and another one on some other
    busy='lbvm: clearing what a backup has left: another lbvm is backing up this machine over NBD; try again when that has ended. (Where its host has died, QEMU'"'"'s command nbd-server-stop lets go of it.)'
    LBVM_REPOSITORY=other run_expect 5 lbvm backup web1 --qmp=s/second
    expect_stderr "$busy"
    LBVM_REPOSITORY=other run_expect 5 lbvm backup web1 --qmp=s/second \
        "${way[@]}"
    expect_stderr "$busy"
    [ "$(find far/scratch -type f | wc -l)" = 2 ]
    kill -KILL $lbvm
    wait $lbvm || true
    expect_next_is_right
    [ "$(bitmaps | wc -l)" = 2 ]
}

@test "one on QEMU's own host clears what a killed one has left" {
    with_keys
    machine "${tls[@]}"
    backup
    begin_backup --full --qmp=s/qmp "${way[@]}" --rate-limit=1M
    kill -KILL $lbvm
    wait $lbvm || true
    mkdir here
    run_expect 0 lbvm backup web1 --qmp=s/qmp --scratch=here
    expect_stderr ''
    [ "$(kinds)" = 'incremental incremental' ]
    expect_disk vdb
    expect_clean
    [ "$(bitmaps | wc -l)" = 2 ]
}

@test "what one on QEMU's own host does is left alone" {
    with_keys
    machine "${tls[@]}"
    backup
    mkdir here
    begin_backup --full --qmp=s/qmp --scratch=here --rate-limit=1M
    LBVM_REPOSITORY=other run_expect 5 lbvm backup web1 --qmp=s/second \
        "${way[@]}"
    expect_stderr_has 'lbvm: clearing what a backup has left: QEMU has a backup of an lbvm on its own host, in ' \
        '; if that has died, the next one there clears it'
    wait $lbvm || fail "$(cat log)"
    expect_next_is_right
}

@test "QEMU is killed meanwhile: no backup, and the next is in full" {
    with_keys
    machine "${tls[@]}"
    backup
    begin_backup --full --qmp=s/qmp "${way[@]}" --rate-limit=1M
    kill -KILL "$(<pid)"
    status=0
    wait $lbvm || status=$?
    [ $status = 1 ] || fail "$(cat log)"
    rm pid
    for disk in vda vdb; do
        qemu-img convert -f qcow2 -O raw far/$disk.qcow2 $disk.then
    done
    start "${tls[@]}"
    backup
    [ "$(kinds)" = 'full full' ]
    expect_disk vda vda.then
    expect_disk vdb vdb.then
    expect_clean
}

# As nothing_left_now and nothing_left_after_next, which see for the rest.
clean_now() {
    nothing_left_now "$1"
    expect_clean || fail "command $1:" "$(cat through.err)" "$(ls -l far/scratch)"
}

clean_after_next() {
    nothing_left_after_next "$1"
    expect_clean || fail "command $1:" "$(cat through.err)" "$(ls -l far/scratch)"
}

@test "QEMU refuses a command, whichever: nothing is left" {
    with_keys
    machine "${tls[@]}"
    backup
    every 1 2 refuse '0 1 5' clean_now
    expect_disk vda
}

@test "lbvm is killed at any command: the next one clears what is left" {
    with_keys
    machine "${tls[@]}"
    backup
    every 1 4 kill '137' clean_after_next
    expect_disk vda
}

@test "lbvm is told to stop at any command: nothing is left" {
    with_keys
    machine "${tls[@]}"
    backup
    every 2 5 term '0 1' clean_now
    expect_disk vda
}

@test "the tunnel is lost at any command: the next one clears what is left" {
    with_keys
    machine "${tls[@]}"
    backup
    every 3 4 unanswered '0 1' clean_after_next
    expect_disk vda
}
