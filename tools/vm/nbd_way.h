/* The way to a QEMU on another host: its NBD server listens at a TCP port, with
 * TLS, and we connect to it. There is no way back to plain text: that is what
 * was asked for, or an error.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_NBD_WAY_H
#define VM_NBD_WAY_H

#include "qmp.h"

struct nbd_way {
    char *host;             /* that we connect to; NULL: QEMU is on this one */
    unsigned first, last;   /* ports: the first that is free */
    const char *listen;     /* address that QEMU listens on; NULL: host's */
    bool plain;             /* without TLS, over a network */
    /* QEMU's: identifiers of objects that it has; NULL: none. */
    const char *creds, *authz;
    /* Ours; NULL: what libnbd finds. */
    const char *certificates, *username, *psk_file;
};

enum { NBD_WAY_OPT = TOOL_OPT_LONG + 0x900, NBD_WAY_OPT_LISTEN,
       NBD_WAY_OPT_PLAIN, NBD_WAY_OPT_CREDS, NBD_WAY_OPT_AUTHZ,
       NBD_WAY_OPT_CERTIFICATES, NBD_WAY_OPT_USERNAME, NBD_WAY_OPT_PSK_FILE };

#define NBD_WAY_OPTIONS                                                      \
    { "nbd", NBD_WAY_OPT, "HOST",                                            \
      "QEMU is on another host, HOST[:PORT[-PORT]]: read it over NBD" },     \
    { "nbd-listen", NBD_WAY_OPT_LISTEN, "ADDRESS",                           \
      "where QEMU is to listen (default: the address of HOST)" },            \
    { "nbd-plain", NBD_WAY_OPT_PLAIN, NULL,                                  \
      "without TLS, also where anybody can read it on the way" },            \
    { "tls-creds", NBD_WAY_OPT_CREDS, "ID",                                  \
      "QEMU's object of TLS credentials" },                                  \
    { "tls-authz", NBD_WAY_OPT_AUTHZ, "ID",                                  \
      "QEMU's object that tells which clients may come" },                   \
    { "tls-certificates", NBD_WAY_OPT_CERTIFICATES, "FOLDER",                \
      "with our certificates (default: libnbd's)" },                         \
    { "tls-username", NBD_WAY_OPT_USERNAME, "NAME",                          \
      "whose key it is in the file (default: ours)" },                       \
    { "tls-psk-file", NBD_WAY_OPT_PSK_FILE, "FILE", "with our key" }

/* Takes the option if it is one of these. Usage errors. */
bool nbd_way_take_option(struct nbd_way *way, int option);
/* Usage error where they don't go together. */
void nbd_way_check(const struct nbd_way *way);
void nbd_way_release(struct nbd_way *way);

/* Whether it may be gone: QLB_E_USAGE where plain text would leave the host. */
int nbd_way_allow(const struct nbd_way *way, struct qlb_error *err);

/* Starts QEMU's NBD server at the first port that is free. An error of QEMU's
 * that it has one is left as it is. */
int nbd_way_serve(const struct nbd_way *way, struct qmp *qmp, unsigned *port,
                  struct qlb_error *err);
/* For the caller to free; NULL: no memory. */
char *nbd_way_uri(const struct nbd_way *way, unsigned port,
                  const char *export);

#endif
