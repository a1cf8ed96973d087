# lbdump nbds://...: over TLS, with certificates and with keys.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

load helpers
load backup
load nbd
load tls

refused="can't connect: the server has ended the TLS handshake; does it take our certificate or key?"

# serve_tcp [OPTION]...: qemu-nbd exports disk.qcow2 at a free $port.
serve_tcp() {
    local i
    stop
    for ((i = 0; i < 20; i++)); do
        port=$(free_port)
        if qemu-nbd --fork --pid-file="$PWD/server.pid" -t -r -e 10 \
            -b 127.0.0.1 -p "$port" -f qcow2 "$@" disk.qcow2 \
            >server.out 2>&1 </dev/null 3>&- 4>&-; then
            return
        fi
    done
    fail "$(cat server.out)"
}

fails() {
    run_expect 1 lbdump -o x.lbz "$uri"
    expect_output ''
    expect_message "$1"
    expect_absent x.lbz
}

x509() {
    printf 'tls-creds-x509,id=tls,endpoint=server,dir=%s,verify-peer=on' \
        "$PWD/$1"
}

make_certificates() {
    authority good
    certificate good server 'cn = localhost' 'dns_name = localhost' \
        tls_www_server
    certificate good client 'cn = backup' tls_www_client
    # one that nobody knows, and what it has signed
    authority other
    certificate other client 'cn = backup' tls_www_client
}

@test "with certificates, over TCP" {
    make_certificates
    some_disk disk.qcow2
    qemu-img bitmap --add disk.qcow2 b
    serve_tcp --object "$(x509 good)" --tls-creds tls -B b
    uri="nbds://localhost:$port/?tls-certificates=good"
    pull full.lbz --threads=4
    expect_restores "$(content disk.qcow2)" full.lbz
    pull_changes 1.lbz full.lbz --threads=4
    expect_restores "$(content disk.qcow2)" full.lbz 1.lbz
}

@test "over TLS without certificates of clients" {
    make_certificates
    mkdir ca-alone
    cp good/ca-cert.pem ca-alone
    some_disk disk.qcow2
    serve_tcp --tls-creds tls \
        --object "tls-creds-x509,id=tls,endpoint=server,dir=$PWD/good,verify-peer=off"
    uri="nbds://localhost:$port/?tls-certificates=ca-alone"
    pull full.lbz
    expect_restores "$(content disk.qcow2)" full.lbz
}

@test "a certificate that one side does not trust" {
    make_certificates
    some_disk disk.qcow2
    serve_tcp --object "$(x509 good)" --tls-creds tls
    # the server's, signed by somebody else
    mkdir wrong-server wrong-client
    cp good/client-* other/ca-cert.pem wrong-server
    uri="nbds://localhost:$port/?tls-certificates=wrong-server"
    fails "can't connect: the server's certificate is not trusted, or not for this host"
    # ours
    cp other/client-* good/ca-cert.pem wrong-client
    uri="nbds://localhost:$port/?tls-certificates=wrong-client"
    fails "$refused"
    # none at all
    uri="nbds://localhost:$port/?tls-certificates=nowhere"
    fails "can't connect: *"
}

@test "a certificate for another host" {
    make_certificates
    rm good/server-*
    certificate good server 'cn = other.example' 'dns_name = other.example' \
        tls_www_server
    some_disk disk.qcow2
    serve_tcp --object "$(x509 good)" --tls-creds tls
    uri="nbds://localhost:$port/?tls-certificates=good"
    fails "can't connect: the server's certificate is not trusted, or not for this host"
}

@test "with a key that both sides have" {
    mkdir keys
    quiet psktool -u alice -p keys/keys.psk
    quiet psktool -u alice -p other.psk
    some_disk disk.qcow2
    qemu-img bitmap --add disk.qcow2 b
    qemu_nbd -f qcow2 -e 10 -B b --tls-creds tls \
        --object "tls-creds-psk,id=tls,endpoint=server,dir=$PWD/keys" \
        disk.qcow2
    uri='nbds+unix://alice@/?socket=s&tls-psk-file=keys/keys.psk'
    pull full.lbz
    expect_restores "$(content disk.qcow2)" full.lbz
    pull_changes 1.lbz full.lbz
    uri='nbds+unix://alice@/?socket=s&tls-psk-file=other.psk'
    fails "$refused"
    uri='nbds+unix://bob@/?socket=s&tls-psk-file=other.psk'
    fails "can't connect: *"
    uri='nbds+unix://alice@/?socket=s&tls-psk-file=none.psk'
    fails "can't connect: *: No such file or directory"
}

@test "only one side wants TLS" {
    mkdir keys
    quiet psktool -u alice -p keys/keys.psk
    some_disk disk.qcow2
    qemu_nbd -f qcow2 --tls-creds tls \
        --object "tls-creds-psk,id=tls,endpoint=server,dir=$PWD/keys" \
        disk.qcow2
    fails "can't connect: *TLS*"
    qemu_nbd -f qcow2 disk.qcow2
    uri='nbds+unix://alice@/?socket=s&tls-psk-file=keys/keys.psk'
    fails "can't connect: *TLS*"
}
