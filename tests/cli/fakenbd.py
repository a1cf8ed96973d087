#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Plays an NBD server that says what no honest one does.

    fakenbd.py SOCKET [OPTION]...

Its disk holds the file --data, or zeroes.  Each context (--context
NAME=FLAGS:LENGTH,...) is told as given, the last extent up to the end of the
disk.  One line of JSON for each connection and request goes to SOCKET.log, as
it arrives.  What it does wrong is told by --lie, and begins with the first
request of that kind at or behind the offset --at.
"""

import argparse
import json
import os
import socket
import struct
import threading
import time

OPT_MAGIC = b"IHAVEOPT"
REPLY_MAGIC = 0x3e889045565a9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668e33ef

OPT_EXPORT_NAME, OPT_ABORT, OPT_GO = 1, 2, 7
OPT_STRUCTURED, OPT_SET_META = 8, 10
REP_ACK, REP_INFO, REP_META = 1, 3, 4
REP_UNSUPPORTED = 0x80000001

FLAG_HAS_FLAGS, FLAG_READ_ONLY, FLAG_MULTI_CONN = 1, 2, 0x100
CMD_READ, CMD_DISC, CMD_BLOCK_STATUS = 0, 2, 7
DONE = 1
NONE, OFFSET_DATA, OFFSET_HOLE, BLOCK_STATUS = 0, 1, 2, 5
ERROR, ERROR_OFFSET = 0x8001, 0x8002
EPERM, EIO = 1, 5


class Gone(Exception):
    """The client has left, or is to be left."""


class Server:
    def __init__(self, options):
        self.options = options
        self.data = b""
        if options.data:
            with open(options.data, "rb") as file:
                self.data = file.read()
        self.size = options.size or len(self.data)
        self.contexts = [parse_context(text) for text in options.context]
        self.log_file = open(options.socket + ".log", "w", buffering=1)
        self.connections = 0
        self.lock = threading.Lock()

    def log(self, **what):
        with self.lock:
            self.log_file.write(json.dumps(what) + "\n")

    def run(self):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.options.socket)
        listener.listen(64)
        while True:
            client = listener.accept()[0]
            self.connections += 1
            if self.connections > self.options.clients:
                if self.options.refuse:
                    client.close()
                    continue
                time.sleep(1000)
            number = self.connections
            self.log(connection=number)
            threading.Thread(target=self.serve, args=(client, number),
                             daemon=True).start()

    def serve(self, client, number):
        try:
            Connection(self, client, number).run()
        except (Gone, OSError):
            client.close()


def parse_context(text):
    name, extents = text.rsplit("=", 1)
    return name, [tuple(int(n, 0) for n in e.split(":"))
                  for e in extents.split(",")]


class Connection:
    def __init__(self, server, client, number):
        self.server = server
        self.options = server.options
        self.client = client
        self.number = number
        self.structured = False
        self.contexts = {}  # id: extents
        self.size = server.size
        if self.options.grow and number > 1:
            self.size += 65536

    def receive(self, length):
        data = b""
        while len(data) < length:
            more = self.client.recv(length - len(data))
            if not more:
                raise Gone
            data += more
        return data

    def send(self, data):
        self.client.sendall(data)

    def run(self):
        if self.options.lie == "silent":
            time.sleep(1000)
        self.send(b"NBDMAGIC" + OPT_MAGIC + struct.pack(">H", 3))
        self.receive(4)
        while not self.option():
            pass
        while True:
            self.request()

    # ---- options

    def reply(self, option, kind, data=b""):
        self.send(struct.pack(">QIII", REPLY_MAGIC, option, kind, len(data))
                  + data)

    def option(self):
        magic, option, length = struct.unpack(">8sII", self.receive(16))
        data = self.receive(length)
        assert magic == OPT_MAGIC
        if option == OPT_STRUCTURED and not self.options.simple:
            self.structured = True
            self.reply(option, REP_ACK)
        elif option == OPT_SET_META and self.structured:
            self.set_contexts(option, data)
        elif option == OPT_GO:
            self.go(option)
            return True
        elif option == OPT_ABORT:
            self.reply(option, REP_ACK)
            raise Gone
        else:
            self.reply(option, REP_UNSUPPORTED)
        return False

    def set_contexts(self, option, data):
        at = 4 + struct.unpack_from(">I", data)[0]
        n = struct.unpack_from(">I", data, at)[0]
        at += 4
        self.contexts = {}
        for _ in range(n):
            length = struct.unpack_from(">I", data, at)[0]
            wanted = data[at + 4:at + 4 + length].decode()
            at += 4 + length
            for number, (name, extents) in enumerate(self.server.contexts):
                if name == wanted:
                    self.contexts[number] = extents
                    self.reply(option, REP_META,
                               struct.pack(">I", number) + name.encode())
                    self.server.log(context=name, of=self.number)
        self.reply(option, REP_ACK)

    def go(self, option):
        flags = FLAG_HAS_FLAGS | FLAG_READ_ONLY
        if self.options.multi:
            flags |= FLAG_MULTI_CONN
        self.reply(option, REP_INFO,
                   struct.pack(">HQH", 0, self.size, flags))
        if self.options.block:
            sizes = [int(n) for n in self.options.block.split(",")]
            self.reply(option, REP_INFO, struct.pack(">HIII", 3, *sizes))
        self.reply(option, REP_ACK)

    # ---- requests

    def chunk(self, cookie, kind, data=b"", flags=DONE):
        self.send(struct.pack(">IHHQI", CHUNK_MAGIC, flags, kind, cookie,
                              len(data)) + data)

    def request(self):
        magic, _, kind, cookie, offset, length = struct.unpack(
            ">IHHQQI", self.receive(28))
        assert magic == REQUEST_MAGIC
        if kind == CMD_DISC:
            raise Gone
        self.server.log(request={CMD_READ: "read",
                                 CMD_BLOCK_STATUS: "status"}[kind],
                        offset=offset, length=length, of=self.number)
        if offset + length > self.options.at:
            if self.options.lie == "close":
                # as a process that was killed
                os._exit(0)
            if self.options.lie == "hang":
                time.sleep(1000)
        if kind == CMD_READ:
            self.read(cookie, offset, length)
        else:
            self.status(cookie, offset, length)

    def content(self, offset, length):
        part = self.server.data[offset:offset + length]
        return part + bytes(length - len(part))

    def read(self, cookie, offset, length):
        lie = self.options.lie if offset + length > self.options.at else None
        start = struct.pack(">Q", offset)
        data = self.content(offset, length)
        half = length // 2
        if lie == "read-magic":
            self.send(b"\0" * 16)
        elif lie == "read-cookie":
            self.chunk(cookie + 7, OFFSET_DATA, start + data)
        elif lie == "read-short":
            self.chunk(cookie, OFFSET_DATA, start + data[:half])
        elif lie == "read-beyond":
            self.chunk(cookie, OFFSET_DATA,
                       struct.pack(">Q", offset + half) + data)
        elif lie == "read-hole":
            self.chunk(cookie, OFFSET_HOLE,
                       start + struct.pack(">I", 2 * length))
        elif lie == "read-nothing":
            self.chunk(cookie, NONE)
        elif lie == "read-cut":
            self.chunk(cookie, OFFSET_DATA, start + data[:half], 0)
            os._exit(0)
        elif lie == "read-error":
            self.chunk(cookie, ERROR, struct.pack(">IH", EIO, 4) + b"dust")
        elif lie == "read-error-at":
            self.chunk(cookie, OFFSET_DATA, start + data[:half], 0)
            self.chunk(cookie, ERROR_OFFSET,
                       struct.pack(">IH", EIO, 0)
                       + struct.pack(">Q", offset + half))
        elif not self.structured:
            self.send(struct.pack(">IIQ", SIMPLE_MAGIC, 0, cookie) + data)
        elif length > 1 and not any(data[half:]):
            # as sparse as QEMU's, and out of order
            self.chunk(cookie, OFFSET_HOLE,
                       struct.pack(">QI", offset + half, length - half), 0)
            self.chunk(cookie, OFFSET_DATA, start + data[:half])
        else:
            self.chunk(cookie, OFFSET_DATA, start + data)

    def extents_of(self, extents, offset, end):
        """(flags, length) of what lies in the range; the last may be long."""
        at, found = 0, []
        for i, (flags, length) in enumerate(extents):
            stop = self.size if i == len(extents) - 1 else at + length
            if stop > offset and at < end:
                first = max(at, offset)
                last = stop if self.options.long else min(stop, end)
                found.append((flags, min(last - first, 0xfffff000)))
            at = stop
        return found[:self.options.extents]

    def status(self, cookie, offset, length):
        lie = self.options.lie if offset + length > self.options.at else None
        if lie == "status-error":
            self.chunk(cookie, ERROR, struct.pack(">IH", EPERM, 0))
            return
        for number, extents in self.contexts.items():
            found = self.extents_of(extents, offset, offset + length)
            if lie == "status-zero":
                found = [(0, 0)] + found
            elif lie == "status-beyond":
                found[-1] = (0, self.size + 512 - offset)
            elif lie == "status-unaligned":
                found[0] = (0, 100)
            elif lie == "status-foreign":
                number += 50
            elif lie == "status-empty":
                found = []
            data = struct.pack(">I", number) + b"".join(
                struct.pack(">II", size, flags) for flags, size in found)
            if lie == "status-odd":
                data += b"\0\0\0\1"
            if lie != "status-nothing":
                self.chunk(cookie, BLOCK_STATUS, data, 0)
            if lie == "status-twice":
                self.chunk(cookie, BLOCK_STATUS, data, 0)
        self.chunk(cookie, NONE)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("--data")
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--context", action="append", default=[])
    parser.add_argument("--simple", action="store_true",
                        help="no structured replies")
    parser.add_argument("--multi", action="store_true",
                        help="allow for many connections")
    parser.add_argument("--clients", type=int, default=1000,
                        help="so many; others wait")
    parser.add_argument("--refuse", action="store_true",
                        help="others are turned away")
    parser.add_argument("--grow", action="store_true",
                        help="the disk is larger from the second client on")
    parser.add_argument("--block", help="MINIMUM,PREFERRED,MAXIMUM")
    parser.add_argument("--extents", type=int, default=10**6,
                        help="at most so many in an answer")
    parser.add_argument("--long", action="store_true",
                        help="the last extent does not end with the request")
    parser.add_argument("--lie")
    parser.add_argument("--at", type=int, default=0)
    Server(parser.parse_args()).run()


main()
