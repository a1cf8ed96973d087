/*
 * Writes to several NBD exports in turn, and tells how long it took.
 *
 * usage: nbdload NAME SOCKET...
 *
 * Connects to the export NAME of the server behind each unix socket. Standard
 * input is the plan, numbers in text: for each slice the number of the socket
 * (from 0), the bytes of a write, how many writes, and their offsets. Slices
 * run one after the other, each with DEPTH writes under way; a slice ends with
 * its last reply, so that nothing of it burdens the next. Prints the
 * nanoseconds of each slice, and at the end a line 'p99 N' for each socket: the
 * 99th percentile of the latencies of all its writes, in nanoseconds.
 *
 * Other load generators take a quarter of a second to go from one job to the
 * next. A disk that others use too changes its pace within that time.
 *
 * Copyright (C) 2026 The qcow2 livebackup authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define DEPTH 16
#define MAX_SERVERS 16
#define MAX_WRITE (1u << 20)
#define MAX_WRITES (1u << 20)
#define MAX_OPTION 4096

#define NBD_OPTION_MAGIC 0x49484156454f5054ull
#define NBD_OPTION_REPLY_MAGIC 0x3e889045565a9ull
#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_REPLY_MAGIC 0x67446698u
#define NBD_FIXED_NO_ZEROES 3
#define NBD_OPT_GO 7
#define NBD_REP_ACK 1
#define NBD_REP_INFO 3
#define NBD_CMD_WRITE 1
#define NBD_CMD_DISC 2

struct option {
    uint64_t magic;
    uint32_t option;
    uint32_t length;
} __attribute__((packed));

struct option_reply {
    uint64_t magic;
    uint32_t option;
    uint32_t type;
    uint32_t length;
} __attribute__((packed));

struct request {
    uint32_t magic;
    uint16_t flags;
    uint16_t type;
    uint64_t handle;
    uint64_t offset;
    uint32_t length;
} __attribute__((packed));

struct reply {
    uint32_t magic;
    uint32_t error;
    uint64_t handle;
} __attribute__((packed));

struct server {
    int fd;
    uint32_t *latencies;
    size_t count;
    size_t room;
};

struct slice {
    struct server *server;
    uint32_t bytes;
    size_t count;
    uint64_t offsets[MAX_WRITES];
    uint64_t begins[DEPTH]; /* of the writes under way, by their handle */
};

static unsigned char payload[MAX_WRITE];
static struct slice slice;

static void __attribute__((noreturn, format(printf, 1, 2)))
die(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    fputs("nbdload: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

static uint64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static void receive_all(int fd, void *buffer, size_t length)
{
    ssize_t got;

    if (length == 0) {
        return;
    }
    got = recv(fd, buffer, length, MSG_WAITALL);
    if (got < 0 || (size_t)got != length) {
        die("the server hung up: %s", got < 0 ? strerror(errno) : "end");
    }
}

/* Send both parts; each vector is used up. */
static void send_all(int fd, struct iovec *parts, int count)
{
    while (count > 0) {
        struct msghdr message = {
            .msg_iov = parts, .msg_iovlen = (size_t)count
        };
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);

        if (sent < 0 && errno == EINTR) {
            continue;
        }
        if (sent < 0) {
            die("the server hung up: %s", strerror(errno));
        }
        while (count > 0 && (size_t)sent >= parts->iov_len) {
            sent -= (ssize_t)parts->iov_len;
            parts++;
            count--;
        }
        if (count > 0) {
            parts->iov_base = (char *)parts->iov_base + sent;
            parts->iov_len -= (size_t)sent;
        }
    }
}

static void send_one(int fd, void *buffer, size_t length)
{
    struct iovec part = { .iov_base = buffer, .iov_len = length };

    send_all(fd, &part, 1);
}

static void send_go(int fd, const char *name)
{
    uint32_t length = (uint32_t)strlen(name);
    uint32_t name_length = htobe32(length);
    uint16_t no_infos = 0;
    struct option go = {
        .magic = htobe64(NBD_OPTION_MAGIC),
        .option = htobe32(NBD_OPT_GO),
        .length = htobe32(4 + length + 2),
    };
    struct iovec parts[] = {
        { .iov_base = &go, .iov_len = sizeof(go) },
        { .iov_base = &name_length, .iov_len = 4 },
        { .iov_base = (void *)(uintptr_t)name, .iov_len = length },
        { .iov_base = &no_infos, .iov_len = 2 },
    };

    send_all(fd, parts, 4);
}

/* NBD's fixed newstyle handshake, without structured replies. */
static void handshake(int fd, const char *name)
{
    unsigned char greeting[18];
    uint32_t flags = htobe32(NBD_FIXED_NO_ZEROES);
    uint32_t type;

    receive_all(fd, greeting, sizeof(greeting));
    if (memcmp(greeting, "NBDMAGICIHAVEOPT", 16) != 0) {
        die("not an NBD server");
    }
    send_one(fd, &flags, sizeof(flags));
    send_go(fd, name);
    do {
        unsigned char data[MAX_OPTION];
        struct option_reply reply;
        uint32_t length;

        receive_all(fd, &reply, sizeof(reply));
        type = be32toh(reply.type);
        length = be32toh(reply.length);
        if (be64toh(reply.magic) != NBD_OPTION_REPLY_MAGIC ||
            length > sizeof(data) ||
            (type != NBD_REP_ACK && type != NBD_REP_INFO)) {
            die("the server does not export '%s'", name);
        }
        receive_all(fd, data, length);
    } while (type != NBD_REP_ACK);
}

static void server_connect(struct server *server, const char *path,
                           const char *name)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };

    if (strlen(path) >= sizeof(address.sun_path)) {
        die("%s: too long", path);
    }
    strcpy(address.sun_path, path);
    server->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (server->fd < 0 || connect(server->fd, (struct sockaddr *)&address,
                                  sizeof(address)) != 0) {
        die("%s: %s", path, strerror(errno));
    }
    handshake(server->fd, name);
}

static void server_disconnect(struct server *server)
{
    struct request request = {
        .magic = htobe32(NBD_REQUEST_MAGIC), .type = htobe16(NBD_CMD_DISC)
    };

    send_one(server->fd, &request, sizeof(request));
    close(server->fd);
}

static void note_latency(struct server *server, uint64_t nanoseconds)
{
    if (server->count == server->room) {
        server->room = server->room ? server->room * 2 : MAX_WRITES;
        server->latencies = realloc(server->latencies, server->room *
                                    sizeof(*server->latencies));
        if (!server->latencies) {
            die("no memory");
        }
    }
    server->latencies[server->count++] =
        nanoseconds < UINT32_MAX ? (uint32_t)nanoseconds : UINT32_MAX;
}

static void send_write(uint64_t offset, uint64_t handle)
{
    struct request request = {
        .magic = htobe32(NBD_REQUEST_MAGIC),
        .type = htobe16(NBD_CMD_WRITE),
        .handle = handle,
        .offset = htobe64(offset),
        .length = htobe32(slice.bytes),
    };
    struct iovec parts[] = {
        { .iov_base = &request, .iov_len = sizeof(request) },
        { .iov_base = payload, .iov_len = slice.bytes },
    };

    slice.begins[handle] = now();
    send_all(slice.server->fd, parts, 2);
}

/* Wait for a reply; return the handle, which is free again. */
static uint64_t receive_reply(void)
{
    struct reply reply;

    receive_all(slice.server->fd, &reply, sizeof(reply));
    if (be32toh(reply.magic) != NBD_REPLY_MAGIC || reply.handle >= DEPTH) {
        die("the server's reply makes no sense");
    }
    if (reply.error != 0) {
        die("a write failed: error %" PRIu32, be32toh(reply.error));
    }
    note_latency(slice.server, now() - slice.begins[reply.handle]);
    return reply.handle;
}

static void slice_run(void)
{
    size_t sent = 0;
    size_t done;

    while (sent < DEPTH && sent < slice.count) {
        send_write(slice.offsets[sent], sent);
        sent++;
    }
    for (done = 0; done < slice.count; done++) {
        uint64_t handle = receive_reply();

        if (sent < slice.count) {
            send_write(slice.offsets[sent++], handle);
        }
    }
}

/* Read the plan of a slice; return 0 at the end. */
static int slice_read(struct server *servers, size_t server_count)
{
    size_t server, i;

    if (scanf("%zu", &server) != 1) {
        return 0;
    }
    if (scanf("%" SCNu32 "%zu", &slice.bytes, &slice.count) != 2 ||
        server >= server_count || slice.bytes > MAX_WRITE ||
        slice.count > MAX_WRITES) {
        die("the plan makes no sense");
    }
    slice.server = &servers[server];
    for (i = 0; i < slice.count; i++) {
        if (scanf("%" SCNu64, &slice.offsets[i]) != 1) {
            die("the plan breaks off");
        }
    }
    return 1;
}

static int compare_latencies(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a;
    uint32_t y = *(const uint32_t *)b;

    return x < y ? -1 : x > y;
}

static void print_p99(struct server *server)
{
    uint32_t p99 = 0;

    if (server->count > 0) {
        qsort(server->latencies, server->count, sizeof(*server->latencies),
              compare_latencies);
        p99 = server->latencies[(server->count - 1) * 99 / 100];
    }
    printf("p99 %" PRIu32 "\n", p99);
}

int main(int argc, char **argv)
{
    static struct server servers[MAX_SERVERS];
    size_t count, i;

    if (argc < 3 || argc - 2 > MAX_SERVERS) {
        die("usage: nbdload NAME SOCKET...");
    }
    count = (size_t)argc - 2;
    srand(1);
    for (i = 0; i < sizeof(payload); i++) {
        payload[i] = (unsigned char)(rand() >> 8);
    }
    for (i = 0; i < count; i++) {
        server_connect(&servers[i], argv[i + 2], argv[1]);
    }
    while (slice_read(servers, count)) {
        uint64_t begin = now();

        slice_run();
        printf("%" PRIu64 "\n", now() - begin);
    }
    for (i = 0; i < count; i++) {
        server_disconnect(&servers[i]);
        print_p99(&servers[i]);
        free(servers[i].latencies);
    }
    return fclose(stdout) == 0 ? 0 : 1;
}
