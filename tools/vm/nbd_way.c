/* The way to a QEMU on another host.
 *
 * QEMU is told to listen on the numeric address that HOST has here: that host
 * may know its own name as one of the loopback.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/nbd_way.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define DEFAULT_PORT 10809u /* IANA's for NBD */
#define LETTERS "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
#define DIGITS "0123456789"

/* ---- options ---- */

_Noreturn static void no_host(const char *text)
{
    tool_usage("--nbd: '%s' is not HOST[:PORT[-PORT]]; an IPv6 address is "
               "[ADDRESS]", text);
}

/* Sets *rest behind the host. */
static size_t host_length(const char *text, const char **rest)
{
    size_t len;

    if (*text == '[') {
        len = 1 + strspn(text + 1, DIGITS "abcdefABCDEF:.");
        if (len == 1 || text[len] != ']') {
            no_host(text);
        }
        len++;
    } else {
        len = strspn(text, LETTERS DIGITS "-._");
    }
    *rest = text + len;
    if (len == 0 || (**rest != '\0' && **rest != ':')) {
        no_host(text);
    }
    return len;
}

static void parse_ports(struct nbd_way *way, const char *ports)
{
    const char *dash = strchr(ports, '-');
    char first[8];
    size_t len = dash == NULL ? strlen(ports) : (size_t)(dash - ports);

    if (len >= sizeof(first)) {
        tool_usage("--nbd: '%s' is no port", ports);
    }
    memcpy(first, ports, len);
    first[len] = '\0';
    way->first = tool_parse_number(first, "--nbd: the port", 1, 65535);
    way->last = dash == NULL ? way->first
                             : tool_parse_number(dash + 1,
                                                 "--nbd: the last port",
                                                 way->first, 65535);
}

static void parse_host(struct nbd_way *way, const char *text)
{
    const char *rest;
    size_t len = host_length(text, &rest);

    free(way->host);
    way->host = strndup(text, len);
    if (way->host == NULL) {
        tool_message("%s", strerror(ENOMEM));
        exit(QLB_E_RUNTIME);
    }
    way->first = way->last = DEFAULT_PORT;
    if (*rest == ':') {
        parse_ports(way, rest + 1);
    }
}

bool nbd_way_take_option(struct nbd_way *way, int option)
{
    switch (option) {
    case NBD_WAY_OPT:
        parse_host(way, optarg);
        return true;
    case NBD_WAY_OPT_LISTEN:
        way->listen = optarg;
        return true;
    case NBD_WAY_OPT_PLAIN:
        way->plain = true;
        return true;
    case NBD_WAY_OPT_CREDS:
        way->creds = optarg;
        return true;
    case NBD_WAY_OPT_AUTHZ:
        way->authz = optarg;
        return true;
    case NBD_WAY_OPT_CERTIFICATES:
        way->certificates = optarg;
        return true;
    case NBD_WAY_OPT_USERNAME:
        way->username = optarg;
        return true;
    case NBD_WAY_OPT_PSK_FILE:
        way->psk_file = optarg;
        return true;
    default:
        return false;
    }
}

void nbd_way_check(const struct nbd_way *way)
{
    bool ours = way->certificates != NULL || way->username != NULL ||
                way->psk_file != NULL;

    if (way->host == NULL) {
        if (ours || way->listen != NULL || way->plain || way->creds != NULL ||
            way->authz != NULL) {
            tool_usage("--nbd-... and --tls-... go with --nbd=HOST");
        }
        return;
    }
    if (way->creds == NULL && (ours || way->authz != NULL)) {
        tool_usage("for TLS QEMU has to have credentials, too: "
                   "--tls-creds=ID");
    }
    if (way->creds != NULL && way->plain) {
        tool_usage("--nbd-plain and --tls-creds exclude each other");
    }
    if (way->certificates != NULL && way->psk_file != NULL) {
        tool_usage("--tls-certificates and --tls-psk-file exclude each "
                   "other");
    }
    if (way->username != NULL && way->psk_file == NULL) {
        tool_usage("--tls-username goes with --tls-psk-file");
    }
}

void nbd_way_release(struct nbd_way *way)
{
    free(way->host);
    way->host = NULL;
}

/* ---- addresses ---- */

static struct addrinfo *addresses_of(const struct nbd_way *way,
                                     struct qlb_error *err)
{
    struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *found = NULL;
    size_t len = strlen(way->host);
    char *name = *way->host == '[' ? strndup(way->host + 1, len - 2)
                                   : strdup(way->host);
    int ret = name == NULL ? EAI_MEMORY
                           : getaddrinfo(name, NULL, &hints, &found);

    free(name);
    if (ret != 0) {
        qlb_fail(err, QLB_E_RUNTIME, "%s: %s", way->host, gai_strerror(ret));
        return NULL;
    }
    return found;
}

static bool is_loopback(const struct sockaddr *address)
{
    if (address->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)address;

        return ntohl(in->sin_addr.s_addr) >> 24 == 127;
    }
    return address->sa_family == AF_INET6 &&
           IN6_IS_ADDR_LOOPBACK(
               &((const struct sockaddr_in6 *)address)->sin6_addr);
}

int nbd_way_allow(const struct nbd_way *way, struct qlb_error *err)
{
    struct addrinfo *addresses;
    bool here = true;

    if (way->creds != NULL || way->plain) {
        return 0;
    }
    addresses = addresses_of(way, err);
    if (addresses == NULL) {
        return -1;
    }
    for (struct addrinfo *a = addresses; a != NULL; a = a->ai_next) {
        here = here && is_loopback(a->ai_addr);
    }
    freeaddrinfo(addresses);
    return here ? 0
                : qlb_fail(err, QLB_E_USAGE, "%s: the disks would be read in "
                           "plain text; --tls-creds=ID is wanted, or a tunnel "
                           "that ends on this host, or --nbd-plain",
                           way->host);
}

/* Numeric, for the caller to free. */
static char *listen_on(const struct nbd_way *way, struct qlb_error *err)
{
    char text[NI_MAXHOST];
    struct addrinfo *addresses;
    char *copy = NULL;
    int ret;

    if (way->listen != NULL) {
        copy = strdup(way->listen);
    } else {
        addresses = addresses_of(way, err);
        if (addresses == NULL) {
            return NULL;
        }
        ret = getnameinfo(addresses->ai_addr, addresses->ai_addrlen, text,
                          sizeof(text), NULL, 0, NI_NUMERICHOST);
        freeaddrinfo(addresses);
        if (ret != 0) {
            qlb_fail(err, QLB_E_RUNTIME, "%s: %s", way->host,
                     gai_strerror(ret));
            return NULL;
        }
        copy = strdup(text);
    }
    if (copy == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", way->host);
    }
    return copy;
}

/* ---- the server ---- */

/* What the object of QEMU's credentials has, for the caller to release; NULL:
 * there is none, which is QEMU's to say. */
static json_t *creds_have(const struct nbd_way *way, struct qmp *qmp,
                          const char *property)
{
    struct qlb_error ignored;
    json_t *value = NULL;
    char *path;

    if (asprintf(&path, "/objects/%s", way->creds) >= 0) {
        value = qmp_call(qmp, "qom-get",
                         json_pack("{s:s, s:s}", "path", path, "property",
                                   property), &ignored);
        free(path);
    }
    return value;
}

/* TLS alone keeps nobody out. */
static int check_creds(const struct nbd_way *way, struct qmp *qmp,
                       struct qlb_error *err)
{
    json_t *type = creds_have(way, qmp, "type");
    json_t *verify = creds_have(way, qmp, "verify-peer");
    const char *name = json_string_value(type);
    bool open = name != NULL &&
                (strcmp(name, "tls-creds-anon") == 0 ||
                 (strcmp(name, "tls-creds-x509") == 0 &&
                  json_is_false(verify)));

    json_decref(type);
    json_decref(verify);
    return open ? qlb_fail(err, QLB_E_USAGE, "%s: with QEMU's credentials "
                           "'%s' anybody could read the disks meanwhile; "
                           "they want tls-creds-x509 with verify-peer=on, or "
                           "tls-creds-psk", way->host, way->creds)
                : 0;
}

static int serve_at(const struct nbd_way *way, struct qmp *qmp,
                    const char *address, unsigned port, struct qlb_error *err)
{
    json_t *arguments, *answer;
    char text[8];

    snprintf(text, sizeof(text), "%u", port);
    arguments = json_pack("{s:{s:s, s:{s:s, s:s}}}", "addr", "type", "inet",
                          "data", "host", address, "port", text);
    if (way->creds != NULL) {
        json_object_set_new(arguments, "tls-creds", json_string(way->creds));
    }
    if (way->authz != NULL) {
        json_object_set_new(arguments, "tls-authz", json_string(way->authz));
    }
    answer = qmp_call(qmp, "nbd-server-start", arguments, err);
    json_decref(answer);
    return answer == NULL ? -1 : 0;
}

static bool is_taken(const struct qlb_error *err)
{
    return strstr(err->message, "already in use") != NULL;
}

int nbd_way_serve(const struct nbd_way *way, struct qmp *qmp, unsigned *port,
                  struct qlb_error *err)
{
    char *address = NULL;
    int ret = -1;

    if (way->creds == NULL || check_creds(way, qmp, err) == 0) {
        address = listen_on(way, err);
    }
    if (address == NULL) {
        return -1;
    }
    for (*port = way->first; ; (*port)++) {
        ret = serve_at(way, qmp, address, *port, err);
        if (ret == 0 || !is_taken(err) || *port == way->last) {
            break;
        }
    }
    if (ret < 0 && is_taken(err)) {
        qlb_fail(err, QLB_E_BUSY, "%s: port %u is in use there; --nbd=%s:"
                 "PORT-PORT gives a choice", way->host, *port, way->host);
    } else if (ret < 0 && way->listen == NULL &&
               strstr(err->message, "Cannot assign") != NULL) {
        qlb_fail(err, QLB_E_RUNTIME, "%s: QEMU's host does not have the "
                 "address %s; --nbd-listen=ADDRESS is wanted", way->host,
                 address);
    }
    free(address);
    return ret;
}

/* ---- the URI ---- */

/* Appends the text, whose characters that mean something in a URI are escaped;
 * NULL: no memory, also what it is given. */
static char *escape(char *uri, const char *before, const char *text)
{
    size_t used, room;
    char *grown;

    if (uri == NULL || text == NULL) {
        return uri;
    }
    used = strlen(uri);
    room = used + strlen(before) + 3 * strlen(text) + 1;
    grown = realloc(uri, room);
    if (grown == NULL) {
        free(uri);
        return NULL;
    }
    used += (size_t)snprintf(grown + used, room - used, "%s", before);
    for (; *text != '\0'; text++) {
        bool plain = strchr(LETTERS DIGITS "-._~/", *text) != NULL;

        used += (size_t)snprintf(grown + used, room - used,
                                 plain ? "%c" : "%%%02X",
                                 (unsigned char)*text);
    }
    return grown;
}

char *nbd_way_uri(const struct nbd_way *way, unsigned port,
                  const char *export)
{
    char *uri = strdup(way->creds != NULL ? "nbds:" : "nbd:"), *more;

    uri = escape(uri, "//", way->username == NULL ? "" : way->username);
    if (uri == NULL ||
        asprintf(&more, "%s%s%s:%u", uri, way->username == NULL ? "" : "@",
                 way->host, port) < 0) {
        free(uri);
        return NULL;
    }
    free(uri);
    uri = escape(more, "/", export);
    uri = escape(uri, "?tls-certificates=", way->certificates);
    return escape(uri, "?tls-psk-file=", way->psk_file);
}
