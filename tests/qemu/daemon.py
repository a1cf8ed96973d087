# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""A qemu-storage-daemon that stands for the guest's QEMU."""

import json
import os
import signal
import socket
import subprocess
import time

from qemulib import Failure, PATIENCE, program, read, remove


class Dead(Exception):
    """The daemon was killed."""


class Refused(Exception):
    """A command failed."""


class Daemon:
    """With its monitor and its NBD server at 'qmp' and 'nbd' in a folder, where
    it runs; arguments: what else it gets."""

    PROGRAM = ("qemu-storage-daemon",)
    SERVERS = ("--monitor", "qmp",
               "--nbd-server", "addr.type=unix,addr.path=nbd")

    def __init__(self, folder, *arguments, env=None):
        self.folder = folder
        for name in ("qmp", "nbd"):
            remove(os.path.join(folder, name))
        self.log = os.path.join(folder, "log")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [program("P", self.PROGRAM[0]), *self.PROGRAM[1:],
                 "--chardev", "socket,id=qmp,path=qmp,server=on,wait=off",
                 *self.SERVERS, *arguments],
                cwd=folder, env=dict(os.environ, **(env or {})),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.stream = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def connect(self):
        """To the monitor, which is there once the disks are open."""
        end = time.monotonic() + PATIENCE
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE)
        # The path of a socket must be short.
        here = os.open(self.folder, os.O_PATH)
        while True:
            try:
                client.connect(f"/proc/self/fd/{here}/qmp")
                break
            except OSError:
                if self.is_dead():
                    raise Dead() from None
                if self.process.poll() is not None or time.monotonic() > end:
                    raise Failure("the daemon does not start\n"
                                  + self.said()) from None
                time.sleep(0.01)
        os.close(here)
        self.stream = client.makefile("rw")
        client.close()
        self.qmp("qmp_capabilities")

    def line(self):
        """What the monitor says next."""
        try:
            line = self.stream.readline()
        except OSError as error:
            raise Dead() from error
        if not line:
            self.process.wait(PATIENCE)
            raise Dead()
        return json.loads(line)

    def event(self, event):
        """One was sent, beside an answer."""

    def qmp(self, command, **arguments):
        """What the command returns, or Refused, or Dead."""
        if self.stream is None:
            self.connect()
        arguments = {key.replace("_", "-"): value
                     for key, value in arguments.items()}
        try:
            self.stream.write(json.dumps({"execute": command,
                                          "arguments": arguments}) + "\n")
            self.stream.flush()
        except OSError as error:
            raise Dead() from error
        answer = self.line()
        # A monitor that is connected to as it starts may greet twice.
        while "event" in answer or "QMP" in answer:
            if "event" in answer:
                self.event(answer)
            answer = self.line()
        if "error" in answer:
            raise Refused(f"{answer['error']['desc']}")
        return answer["return"]

    def is_dead(self, patience=0):
        """Whether it was killed; a connection is lost a moment before."""
        try:
            return self.process.wait(patience) == -signal.SIGKILL
        except subprocess.TimeoutExpired:
            return False

    def kill(self):
        """Whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.stream:
            self.stream.close()

    def close(self):
        """In order."""
        self.qmp("quit")
        if self.process.wait(PATIENCE) != 0:
            raise Failure(f"the daemon ends with {self.process.returncode}\n"
                          + self.said())
        self.kill()

    def said(self):
        """The end of what it and its predecessors said."""
        return read(self.log).decode("utf-8", "backslashreplace")[-4000:]
