# Keys and certificates. A test begins with
#     load helpers
#     load tls
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
#
# shellcheck shell=bash

# quiet COMMAND...: what GnuTLS's tools say is shown if they fail.
quiet() {
    "$@" >tls.out 2>&1 </dev/null || fail "$(cat tls.out)"
}

# authority FOLDER: the key and certificate of one.
authority() {
    mkdir "$1"
    printf '%s\n' "cn = $1" ca cert_signing_key 'expiration_days = 3650' \
        >"$1/ca.info"
    quiet certtool --generate-privkey --key-type=rsa --bits=2048 \
        --outfile "$1/ca-key.pem"
    quiet certtool --generate-self-signed --load-privkey "$1/ca-key.pem" \
        --template "$1/ca.info" --outfile "$1/ca-cert.pem"
}

# certificate AUTHORITY NAME LINE...: of a server or client, in the same folder.
certificate() {
    local folder=$1 name=$2
    printf '%s\n' 'expiration_days = 3650' signing_key encryption_key \
        "${@:3}" >"$folder/$name.info"
    quiet certtool --generate-privkey --key-type=rsa --bits=2048 \
        --outfile "$folder/$name-key.pem"
    quiet certtool --generate-certificate --template "$folder/$name.info" \
        --load-ca-certificate "$folder/ca-cert.pem" \
        --load-ca-privkey "$folder/ca-key.pem" \
        --load-privkey "$folder/$name-key.pem" \
        --outfile "$folder/$name-cert.pem"
}
