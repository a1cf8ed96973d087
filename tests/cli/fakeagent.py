#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Plays the part of the QEMU guest agent, behind the socket of its channel.

Freezes nothing: "frozen" is a word.  Made from QEMU's documentation of the
agent's protocol.  It serves one client after the other, for ever; agent.log has
the commands, and what they left the guest in.

    fakeagent.py SOCKET [option]...
"""

import argparse
import json
import os
import socket
import time


class Agent:
    """A guest's agent."""

    def __init__(self, options):
        self.options = options
        self.frozen = 0
        self.hung = False
        self.client = None
        self.log = open("agent.log", "w", encoding="utf-8", buffering=1)

    def serve(self):
        """One client after the other."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.options.socket + ".new")
        listener.listen(8)
        os.rename(self.options.socket + ".new", self.options.socket)
        while True:
            self.client = listener.accept()[0]
            try:
                self.talk()
            except (BrokenPipeError, ConnectionResetError):
                pass
            self.client.close()
            self.log.write("gone\n")

    def talk(self):
        """Until the client has gone."""
        for line in self.client.makefile("rb"):
            if line.startswith(b"\xff"):
                self.send(b'{"error": {"class": "GenericError", "desc": '
                          b'"Invalid JSON syntax"}}\n')
            request = json.loads(line.lstrip(b"\xff"))
            self.answer(request["execute"], request.get("arguments", {}))

    def send(self, data):
        """As it is."""
        self.client.sendall(data)

    def reply(self, value):
        """One object a line."""
        self.send(json.dumps({"return": value}).encode() + b"\n")

    def answer(self, command, arguments):
        """Does a command, and then answers as the options have it."""
        options = self.options
        if self.hung:
            return
        self.log.write(command + "\n")
        if command == options.die_at:
            self.client.shutdown(socket.SHUT_RDWR)
            return
        value = getattr(self, command.replace("-", "_"))(arguments)
        if command == options.hang_at:
            self.hung = True
        elif command == options.silent_at:
            options.silent_at = None
        elif command == options.close_at:
            options.close_at = None
            self.client.shutdown(socket.SHUT_RDWR)
        elif command == options.trickle_at:
            while True:
                self.send(b" ")
                time.sleep(0.1)
        elif command == options.twice_at:
            self.reply(value)
            self.reply(value)
        elif command == options.huge_at:
            while True:
                self.send(b"x" * 65536)
        elif command in options.answer:
            self.send(options.answer[command])
        elif value is not None:
            self.reply(value)

    def state(self, frozen):
        """Counts file systems, as the agent does."""
        changed = abs(frozen - self.frozen)
        self.frozen = frozen
        self.log.write("now frozen\n" if frozen else "now thawed\n")
        return changed

    def guest_sync_delimited(self, arguments):
        """Perhaps after what was meant for others."""
        if self.options.stale:
            self.send(b'{"return": 7}\n\xff{"return": 12345}\n\xff{"retu\xff'
                      b'{"return": "x"}\n\xffnonsense\n{"return"')
        if self.options.wrong_id:
            arguments["id"] += 1
        self.send(b"\xff")
        return arguments["id"]

    def guest_fsfreeze_freeze(self, _):
        """How many file systems."""
        return self.state(self.options.file_systems)

    def guest_fsfreeze_thaw(self, _):
        """How many file systems."""
        return self.state(0)

    def guest_fsfreeze_status(self, _):
        """Of all."""
        if self.options.thaws_itself:
            self.state(0)
        return "frozen" if self.frozen else "thawed"


def main():
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("--file-systems", type=int, default=2)
    parser.add_argument("--stale", action="store_true",
                        help="the channel holds what others left there")
    parser.add_argument("--wrong-id", action="store_true")
    parser.add_argument("--thaws-itself", action="store_true")
    parser.add_argument("--hang-at", metavar="COMMAND",
                        help="does it, and says nothing from then on")
    parser.add_argument("--silent-at", metavar="COMMAND",
                        help="does it, and doesn't answer, once")
    parser.add_argument("--huge-at", metavar="COMMAND",
                        help="an answer without end")
    parser.add_argument("--die-at", metavar="COMMAND",
                        help="closes the connection")
    parser.add_argument("--close-at", metavar="COMMAND",
                        help="does it, and closes the connection, once")
    parser.add_argument("--trickle-at", metavar="COMMAND",
                        help="an answer of which a byte comes now and then")
    parser.add_argument("--twice-at", metavar="COMMAND",
                        help="answers it twice")
    parser.add_argument("--answer", action="append", default=[],
                        metavar="COMMAND=TEXT")
    options = parser.parse_args()
    options.answer = {command: text.encode() + b"\n" for command, text in
                      (word.split("=", 1) for word in options.answer)}
    Agent(options).serve()


if __name__ == "__main__":
    main()
