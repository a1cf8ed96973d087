#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""A backup of a running guest meets kills and errors.

A qemu-storage-daemon stands for the guest's QEMU, qemu-io for the guest.  The
shim of tests/fault makes the n-th write, sync or truncate of the daemon kill
it, fail or hang.  Whatever happens: what the image calls trusted is complete,
the guest goes on where docs/live-backup.md says so, and the next backup can be
made.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time

from qemulib import (Disk, Failure, NIGHTLY, PATIENCE, dump, each,
                     claim, expect_claims_kept, expect_no_errors, main,
                     oracle_trust, program, read, remove, session,
                     shim_environment, verdict_of, workplace, write)

RUNNING, BROKEN = 1, 3


class Dead(Exception):
    """The daemon was killed."""


class Refused(Exception):
    """A command failed."""


class Daemon:
    """qemu-storage-daemon with one disk; 'guest' writes to it."""

    def __init__(self, folder, env=None):
        self.folder = folder
        self.disk = os.path.join(folder, "disk.qcow2")
        self.orig = os.path.join(folder, "disk.orig.qcow2")
        self.monitor = os.path.join(folder, "qmp")
        self.export = os.path.join(folder, "nbd")
        for path in (self.monitor, self.export):
            remove(path)
        self.log = open(os.path.join(folder, "log"), "wb")
        self.process = subprocess.Popen(
            [program("P", "qemu-storage-daemon"),
             "--blockdev", f"file,node-name=file,filename={self.disk}",
             "--blockdev", "qcow2,node-name=disk,file=file,discard=unmap",
             "--nbd-server", "addr.type=unix,addr.path=nbd",
             "--export", "nbd,id=disk,node-name=disk,writable=on",
             "--chardev", "socket,id=qmp,path=qmp,server=on,wait=off",
             "--monitor", "qmp"],
            cwd=folder, env=dict(os.environ, **(env or {})),
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.stream = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.stream:
            self.stream.close()
        self.log.close()

    def connect(self):
        """To the monitor, which is there once the disk is open."""
        end = time.monotonic() + PATIENCE
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE)
        here = os.open(self.folder, os.O_PATH)
        try:
            while True:
                try:
                    client.connect(f"/proc/self/fd/{here}/qmp")
                    break
                except OSError:
                    if self.process.poll() is not None:
                        raise Dead() from None
                    if time.monotonic() > end:
                        raise Failure("the daemon does not start") from None
                    time.sleep(0.01)
        finally:
            os.close(here)
        self.stream = client.makefile("rw")
        client.close()
        self.line()
        self.qmp("qmp_capabilities")

    def line(self):
        try:
            line = self.stream.readline()
        except OSError as error:
            raise Dead() from error
        if not line:
            self.process.wait(PATIENCE)
            raise Dead()
        return json.loads(line)

    def qmp(self, command, **arguments):
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
            answer = self.line()
        if "error" in answer:
            raise Refused(answer["error"]["desc"])
        if "return" not in answer:
            raise Failure(f"{command}: {answer}")
        return answer["return"]

    def begin(self, **arguments):
        # Of another label than the archives that this is held against.
        return self.qmp("livebackup-begin", job_id="live", label="live",
                        disks=[{"device": "disk"}], **arguments)

    def end(self, success=True):
        self.qmp("livebackup-end", job_id="live", success=success,
                 roots=[{"device": "disk", "root": "00" * 8}])

    def guest(self, *commands):
        """Writes through the export, each of which must succeed."""
        if self.stream is None:
            self.connect()
        url = f"nbd+unix:///disk?socket={self.export}"
        try:
            session("P", ["-f", "raw", url], *commands)
        except Failure:
            if self.is_dead():
                raise Dead() from None
            raise

    def is_dead(self):
        """A connection is lost a moment before the process is."""
        try:
            return self.process.wait(0.5) == -signal.SIGKILL
        except subprocess.TimeoutExpired:
            return False

    def close(self):
        self.qmp("quit")
        if self.process.wait(PATIENCE) != 0:
            raise Failure(f"the daemon ends with {self.process.returncode}: "
                          f"{self.said()}")

    def said(self):
        return read(self.log.name).decode("utf-8", "backslashreplace")


def two_backups(daemon):
    """A full and an incremental one, with writes to all kinds of units."""
    daemon.guest("write -P 31 100k 4k")
    daemon.begin()
    daemon.guest("write -P 32 0 4k", "write -P 33 2M 100k",
                 "write -z 3M 64k", "write -P 34 6M 4k", "write -P 35 8191k 1k")
    daemon.qmp("livebackup-release", job_id="live", device="disk",
               ranges=[{"offset": 1 << 20, "bytes": 1 << 20}])
    daemon.guest("write -P 36 1M 8k")
    daemon.end()
    daemon.begin(mode="incremental")
    daemon.guest("write -P 37 2M 4k", "write -P 38 5M 4k")
    daemon.end(False)
    daemon.close()


def prepared(name="base"):
    """A folder with a disk, its archive, and writes since."""
    base = os.path.abspath(name)
    if not os.path.exists(base):
        path = Disk("8M").make(base)
        session("P", path, "write -P 1 0 200k", "write -P 2 3M 64k")
        dump(path, os.path.join(base, "full.lbz"))
        session("P", path, "write -P 4 2M 8k")
    folder = os.path.join(workplace(), "live")
    if os.path.exists(folder):
        shutil.rmtree(folder)
    shutil.copytree(base, folder)
    return folder


def expect_goes_on(folder, keywords=("trusted",)):
    """Nothing was forgotten, and the next backup can be made."""
    path = os.path.join(folder, "disk.qcow2")
    chain = [os.path.join(folder, "full.lbz")]
    found = expect_claims_kept(path, chain)
    if found not in keywords:
        raise Failure(f"not trusted: {found}")
    expect_no_errors(path)
    with Daemon(folder) as daemon:
        daemon.begin()
        daemon.guest("write -P 41 4M 64k")
        if oracle_trust(path)[0].live.fixed["state"] != RUNNING:
            raise Failure("a running backup is not shown in the image")
        daemon.end()
        if os.path.exists(daemon.orig):
            raise Failure("the orig is still there")
        daemon.close()
    if found == "trusted":
        expect_claims_kept(path, chain, "trusted")


def total(path, what=two_backups):
    """How many calls there are without a fault."""
    folder = prepared()
    count = os.path.join(folder, "count")
    with Daemon(folder, shim_environment(path=folder + path,
                                         count_file=count)) as daemon:
        what(daemon)
    expect_goes_on(folder)
    return int(read(count))


def points(path, kinds):
    """(label, kind, n), each n in turn with one of the kinds, by night with
    all of them."""
    number = total(path)
    if number < 10:
        raise Failure(f"only {number} calls")
    for turn, n in enumerate(range(1, number + 1)):
        for index, kind in enumerate(kinds):
            if NIGHTLY or turn % len(kinds) == index:
                yield f"{kind} at {n} of {number}", kind, n


def check_kill(item):
    _, kind, n = item
    folder = prepared()
    try:
        with Daemon(folder, shim_environment(path=folder + "/", at=n,
                                             kind=kind)) as daemon:
            two_backups(daemon)
        raise Failure("nobody was killed")
    except Dead:
        pass
    expect_goes_on(folder)


@claim
def kill():
    """At each call of begin, run and end."""
    each(points("/", ("kill-before", "torn", "kill-after")), check_kill)


def check_orig_error(item):
    """The guest does not notice; the backup is broken, or was not begun."""
    _, kind, n = item
    folder = prepared()
    fault = shim_environment(path=folder + "/disk.orig.qcow2", at=n, kind=kind)
    refused = []
    with Daemon(folder, fault) as daemon:
        for step in (lambda: daemon.guest("write -P 31 100k 4k"),
                     daemon.begin,
                     lambda: daemon.guest("write -P 32 0 4k",
                                          "write -P 33 2M 100k",
                                          "write -z 3M 64k"),
                     lambda: daemon.guest("write -P 34 6M 4k"),
                     daemon.end):
            try:
                step()
            except Refused as error:
                refused.append(str(error))
        running = daemon.qmp("query-livebackup")
        daemon.close()
    if running or os.path.exists(daemon.orig):
        raise Failure(f"the backup has not ended: {running}")
    if len(refused) == 2:
        if "Could not" not in refused[0] or \
                refused[1] != "There is no backup 'live'":
            raise Failure(f"begin: {refused}")
    elif refused != ["Backup 'live' is broken"]:
        raise Failure(f"refused: {refused}")
    elif "could not save an original" not in daemon.said():
        raise Failure(f"it does not say why: {daemon.said()}")
    expect_goes_on(folder)


def one_backup(daemon):
    """What check_orig_error does, without an error."""
    daemon.guest("write -P 31 100k 4k")
    daemon.begin()
    daemon.guest("write -P 32 0 4k", "write -P 33 2M 100k", "write -z 3M 64k")
    daemon.guest("write -P 34 6M 4k")
    daemon.end()
    daemon.close()


@claim
def orig_errors():
    """No space, or an error, at each call on the orig."""
    number = total("/disk.orig.qcow2", one_backup)
    each([(f"{kind} at {n} of {number}", kind, n)
          for n in range(1, number + 1)
          for kind in ("enospc", "eio-on")], check_orig_error)


@claim
def guest_writes_fail_if_asked():
    """on-cbw-error: break-guest-write."""
    folder = prepared()
    number = total("/disk.orig.qcow2", one_backup)
    folder = prepared()
    fault = shim_environment(path=folder + "/disk.orig.qcow2", at=number,
                             kind="enospc-on")
    with Daemon(folder, fault) as daemon:
        daemon.begin(on_cbw_error="break-guest-write")
        try:
            daemon.guest("write -P 32 0 4M")
        except Failure:
            pass
        else:
            raise Failure("the guest's write has succeeded")
        phase = daemon.qmp("query-livebackup")[0]["phase"]
        if phase != "running":
            raise Failure(f"the backup is {phase}")
        daemon.end()
        daemon.close()
    expect_goes_on(folder)


@claim
def orig_hangs():
    """The guest waits for the timeout at the most, the monitor answers."""
    number = total("/disk.orig.qcow2", one_backup)
    folder = prepared()
    go_on = os.path.join(folder, "go-on")
    fault = shim_environment(path=folder + "/disk.orig.qcow2", at=number - 3,
                             kind="hang", go_on=go_on)
    with Daemon(folder, fault) as daemon:
        daemon.begin(cbw_timeout=1)
        # It hangs in one of these, which all succeed.
        daemon.guest("write -P 32 0 4k", "write -P 33 2M 100k",
                     "write -z 3M 64k", "write -P 34 6M 4k")
        found = daemon.qmp("query-livebackup")[0]
        if found["phase"] != "broken":
            raise Failure(f"the backup is {found['phase']}")
        state = oracle_trust(daemon.disk)[0].live.fixed["state"]
        if state != BROKEN:
            raise Failure(f"the image's state is {state}")
        write(go_on, b"")
        try:
            daemon.end()
            raise Failure("a broken backup has ended well")
        except Refused as error:
            if str(error) != "Backup 'live' is broken":
                raise Failure(str(error)) from error
        daemon.close()
    expect_goes_on(folder)


@claim
def killed_while_it_runs():
    """What a backup that was cut short leaves is trusted."""
    folder = prepared()
    with Daemon(folder) as daemon:
        daemon.begin()
        daemon.guest("write -P 32 0 4k")
    found, status = verdict_of(os.path.join(folder, "disk.qcow2"))
    if found != "trusted":
        raise Failure(f"{found}: {json.dumps(status)}")
    expect_goes_on(folder)


if __name__ == "__main__":
    raise SystemExit(main())
