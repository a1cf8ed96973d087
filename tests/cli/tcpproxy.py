# A network between an NBD client and its server, which is cut.
#
#   tcpproxy.py PORT BYTES
#
# Forwards connections to 127.0.0.1:PORT to 127.0.0.2:PORT. When BYTES have come
# from there, all connections are reset, and no further one is taken. The server
# is not told of it, until the proxy is killed.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

import selectors
import signal
import socket
import struct
import sys


def accept(selector, listener, port):
    client, _ = listener.accept()
    try:
        server = socket.create_connection(("127.0.0.2", port))
    except OSError:
        client.close()
        return
    selector.register(client, selectors.EVENT_READ, (server, False))
    selector.register(server, selectors.EVENT_READ, (client, True))


def forward(selector, source, target):
    """How many bytes have been."""
    try:
        data = source.recv(16384)
        if data:
            target.sendall(data)
            return len(data)
    except OSError:
        pass
    for end in (source, target):
        selector.unregister(end)
        end.close()
    return 0


def reset(selector):
    for key in list(selector.get_map().values()):
        if key.data is None or key.data[1]:
            continue
        key.fileobj.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                               struct.pack("ii", 1, 0))
        key.fileobj.close()


def main():
    port, left = int(sys.argv[1]), int(sys.argv[2])
    selector = selectors.DefaultSelector()
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(50)
    print("ready", flush=True)
    selector.register(listener, selectors.EVENT_READ, None)
    while left > 0:
        for key, _ in selector.select():
            if key.data is None:
                accept(selector, listener, port)
            elif key.fileobj.fileno() >= 0:
                target, counts = key.data
                n = forward(selector, key.fileobj, target)
                left -= n if counts else 0
    listener.close()
    reset(selector)
    signal.pause()


main()
