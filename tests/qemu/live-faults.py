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
import random
import shutil

from daemon import Daemon, Dead, Refused
from powerloss import losses
from qemulib import (Disk, Failure, NIGHTLY, claim, dump, each,
                     expect_claims_kept, expect_no_errors, img, lbext, main,
                     oracle_trust, read, remove, run, session, shim_environment,
                     verdict_of, workplace, write)

RUNNING, BROKEN = 1, 3
OTHER_BOOT = "11111111-1111-4111-8111-111111111111"
TAKEN_UP = []   # kinds of archives, by check_kill


class Guest(Daemon):
    """With one disk; the guest writes to it."""

    def __init__(self, folder, env=None):
        self.disk = os.path.join(folder, "disk.qcow2")
        self.orig = os.path.join(folder, "disk.orig.qcow2")
        super().__init__(
            folder, "--blockdev", f"file,node-name=file,filename={self.disk}",
            "--blockdev", "qcow2,node-name=disk,file=file,discard=unmap",
            "--export", "nbd,id=disk,node-name=disk,writable=on", env=env)

    def begin(self, label="live", **arguments):
        # Of another label than the archives that this is held against.
        return self.qmp("livebackup-begin", job_id="live", label=label,
                        disks=[{"device": "disk"}], **arguments)

    def end(self, success=True):
        self.qmp("livebackup-end", job_id="live", success=success,
                 roots=[{"device": "disk", "root": "00" * 8}])

    def write(self, *commands):
        """Through the export; each must succeed."""
        if self.stream is None:
            self.connect()
        url = f"nbd+unix:///disk?socket={os.path.join(self.folder, 'nbd')}"
        try:
            session("P", ["-f", "raw", url], *commands)
        except Failure:
            if self.is_dead(0.5):
                raise Dead() from None
            raise


def two_backups(guest):
    """A full and an incremental one, with writes to all kinds of units."""
    guest.write("write -P 31 100k 4k")
    guest.begin()
    guest.write("write -P 32 0 4k", "write -P 33 2M 100k",
                "write -z 3M 64k", "write -P 34 6M 4k", "write -P 35 8191k 1k")
    guest.qmp("livebackup-release", job_id="live", device="disk",
               ranges=[{"offset": 1 << 20, "bytes": 1 << 20}])
    guest.write("write -P 36 1M 8k")
    guest.end()
    # On the archive that everything is held against.
    guest.begin(mode="incremental", label="main")
    guest.write("write -P 37 2M 4k", "write -P 38 5M 4k")
    guest.end(False)
    guest.close()


def prepared(name="base"):
    """A folder with a disk, its archive, and writes since."""
    base = os.path.abspath(name)
    if not os.path.exists(base):
        path = Disk("8M").make(base)
        session("P", path, "write -P 1 0 200k", "write -P 2 3M 64k")
        dump(path, os.path.join(base, "full.lbz"))
        session("P", path, "write -P 4 2M 8k")
        img("P", "convert", "-O", "raw", path, os.path.join(base, "content"))
    folder = os.path.join(workplace(), "live")
    if os.path.exists(folder):
        shutil.rmtree(folder)
    shutil.copytree(base, folder)
    return folder


class Content(bytearray):
    """What the guest reads, in the end of `prepared`."""

    def __init__(self):
        super().__init__(read(os.path.abspath("base/content")))

    def write(self, *areas):
        """(offset, length, byte)"""
        for offset, length, byte in areas:
            self[offset:offset + length] = bytes([byte]) * length
        return self


def two_points_in_time():
    """Those of two_backups, by the kind of their archives."""
    content = Content().write((100 << 10, 4096, 31))
    full = bytes(content)
    content.write((0, 4096, 32), (2 << 20, 100 << 10, 33),
                  (3 << 20, 64 << 10, 0), (6 << 20, 4096, 34),
                  (8191 << 10, 1024, 35), (1 << 20, 8192, 36))
    return {"full": full, "incremental": bytes(content)}


def take_up(folder):
    """The kind and the content of an interrupted backup, or None, None and what
    was said."""
    path, left, raw = (os.path.join(folder, name) for name in
                       ("disk.qcow2", "left.lbz", "left.raw"))
    result = run(["lbdump", "--interrupted", "--copy", "--json", "--force",
                  "--threads=1", "-o", left, path])
    if result.status == 3:
        return None, None, result.err
    kind = json.loads(result.expect(0).out)["kind"]
    chain = [left] if kind == "full" else [os.path.join(folder, "full.lbz"),
                                           left]
    run(["lbrestore", "--quiet", "--force", "-o", raw, *chain]).expect(0)
    return kind, read(raw), result.err


def expect_left(folder, contents):
    """What a killed QEMU left of a backup is the point in time, or refused as
    long as there is a reason."""
    fixed = oracle_trust(os.path.join(folder, "disk.qcow2"))[0].live.fixed
    kind, content, said = take_up(folder)
    if fixed["state"] == RUNNING and not fixed["overwritten"]:
        if kind is None:
            raise Failure(f"could not be taken up: {said}")
        if content != contents[kind]:
            raise Failure(f"what was left of the {kind} backup is wrong")
    elif kind is not None:
        raise Failure(f"taken up, with {fixed}")
    return kind


def expect_goes_on(folder, keywords=("trusted",)):
    """Nothing was forgotten, and the next backup can be made."""
    path = os.path.join(folder, "disk.qcow2")
    chain = [os.path.join(folder, "full.lbz")]
    found = expect_claims_kept(path, chain)
    if found not in keywords:
        raise Failure(f"not trusted: {found}")
    expect_no_errors(path)
    with Guest(folder) as guest:
        guest.begin()
        guest.write("write -P 41 4M 64k")
        if oracle_trust(path)[0].live.fixed["state"] != RUNNING:
            raise Failure("a running backup is not shown in the image")
        guest.end()
        if os.path.exists(guest.orig):
            raise Failure("the orig is still there")
        guest.close()
    if found == "trusted":
        expect_claims_kept(path, chain, "trusted")


def total(path, what=two_backups):
    """How many calls there are without a fault."""
    folder = prepared()
    count = os.path.join(folder, "count")
    with Guest(folder, shim_environment(path=folder + path,
                                         count_file=count)) as guest:
        what(guest)
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
        with Guest(folder, shim_environment(path=folder + "/", at=n,
                                             kind=kind)) as guest:
            two_backups(guest)
        raise Failure("nobody was killed")
    except Dead:
        pass
    TAKEN_UP.append(expect_left(folder, two_points_in_time()))
    expect_goes_on(folder)


@claim
def kill():
    """At each call of begin, run and end."""
    each(points("/", ("kill-before", "torn", "kill-after")), check_kill)
    for kind in ("full", "incremental"):
        if TAKEN_UP.count(kind) < 5:
            raise Failure(f"only {TAKEN_UP.count(kind)} {kind} backups were "
                          "taken up")


def check_orig_error(item):
    """The guest does not notice; the backup is broken, or was not begun."""
    _, kind, n = item
    folder = prepared()
    fault = shim_environment(path=folder + "/disk.orig.qcow2", at=n, kind=kind)
    refused = []
    with Guest(folder, fault) as guest:
        for step in (lambda: guest.write("write -P 31 100k 4k"),
                     guest.begin,
                     lambda: guest.write("write -P 32 0 4k",
                                          "write -P 33 2M 100k",
                                          "write -z 3M 64k"),
                     lambda: guest.write("write -P 34 6M 4k"),
                     guest.end):
            try:
                step()
            except Refused as error:
                refused.append(str(error))
        running = guest.qmp("query-livebackup")
        guest.close()
    if running or os.path.exists(guest.orig):
        raise Failure(f"the backup has not ended: {running}")
    if len(refused) == 2:
        if "Could not" not in refused[0] or \
                refused[1] != "There is no backup 'live'":
            raise Failure(f"begin: {refused}")
    elif refused != ["Backup 'live' is broken"]:
        raise Failure(f"refused: {refused}")
    elif "could not save an original" not in guest.said():
        raise Failure(f"it does not say why: {guest.said()}")
    expect_goes_on(folder)


def one_backup(guest):
    """What check_orig_error does, without an error."""
    guest.write("write -P 31 100k 4k")
    guest.begin()
    guest.write("write -P 32 0 4k", "write -P 33 2M 100k", "write -z 3M 64k")
    guest.write("write -P 34 6M 4k")
    guest.end()
    guest.close()


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
    with Guest(folder, fault) as guest:
        guest.begin(on_cbw_error="break-guest-write")
        try:
            guest.write("write -P 32 0 4M")
        except Failure:
            pass
        else:
            raise Failure("the guest's write has succeeded")
        phase = guest.qmp("query-livebackup")[0]["phase"]
        if phase != "running":
            raise Failure(f"the backup is {phase}")
        guest.end()
        guest.close()
    expect_goes_on(folder)


@claim
def orig_hangs():
    """The guest waits for the timeout at the most, the monitor answers."""
    number = total("/disk.orig.qcow2", one_backup)
    folder = prepared()
    go_on = os.path.join(folder, "go-on")
    fault = shim_environment(path=folder + "/disk.orig.qcow2", at=number - 3,
                             kind="hang", go_on=go_on)
    with Guest(folder, fault) as guest:
        guest.begin(cbw_timeout=1)
        # It hangs in one of these, which all succeed.
        guest.write("write -P 32 0 4k", "write -P 33 2M 100k",
                    "write -z 3M 64k", "write -P 34 6M 4k")
        found = guest.qmp("query-livebackup")[0]
        if found["phase"] != "broken":
            raise Failure(f"the backup is {found['phase']}")
        state = oracle_trust(guest.disk)[0].live.fixed["state"]
        if state != BROKEN:
            raise Failure(f"the image's state is {state}")
        try:
            guest.end()
            raise Failure("a broken backup has ended well")
        except Refused as error:
            if str(error) != "Backup 'live' is broken":
                raise Failure(str(error)) from error
        # It hangs still.
        guest.write("write -P 35 5M 4k")
        if guest.qmp("query-livebackup") or os.path.exists(guest.orig):
            raise Failure("the backup has not ended")
        write(go_on, b"")
        guest.close()
    expect_goes_on(folder)


def logged_backup(mode, durable):
    """A backup under a guest with many writes at a time, killed in the end: the
    folder, the log, how much of it there was when the backup had begun."""
    folder = prepared()
    log = os.path.join(folder, "log.shim")
    with Guest(folder, shim_environment(path=folder + "/disk",
                                         log_file=log)) as guest:
        guest.write("write -P 31 100k 4k")
        guest.begin(label="main", mode=mode, durable=durable)
        begun = os.path.getsize(log)
        guest.write(*(f"aio_write -q -P {50 + i} {i * 331}k {1 + i * 7}k"
                      for i in range(24)), "aio_flush")
        guest.write("write -P 33 2M 100k", "flush")
    return folder, log, begun


def check_losses(mode, durable=True, unsynced=()):
    """How many losses there are after begin, and how many leave the point in
    time."""
    folder, log, begun = logged_backup(mode, durable)
    content = Content().write((100 << 10, 4096, 31))
    files = {"disk.qcow2": read(os.path.abspath("base/disk.qcow2")),
             "disk.orig.qcow2": None}
    number = good = 0
    for at, save in losses(log, files, random.Random(1), unsynced):
        remove(*(os.path.join(folder, name) for name in files))
        save(folder)
        poker = lbext.Poker(os.path.join(folder, "disk.qcow2"))
        poker.poke("boot_id", OTHER_BOOT)
        poker.fix_crc()
        try:
            kind, left, said = take_up(folder)
        except Failure as failure:
            kind, left, said = "none", None, str(failure)
        right = kind == mode and left == content
        if not right and (kind is not None or at > begun) and not unsynced:
            raise Failure(f"lost at {at}, begun at {begun}: {kind} {said}")
        number += at > begun
        good += right and at > begun
    return number, good


@claim
def power_loss():
    """A durable backup can be taken up whatever a power loss leaves."""
    for mode in ("full", "incremental"):
        number, _ = check_losses(mode)
        if number < 20:
            raise Failure(f"{mode}: only {number} losses")
        number, good = check_losses(mode, unsynced=("disk.orig.qcow2",))
        if good == number:
            raise Failure(f"{mode}: it is good without syncs")
        number, good = check_losses(mode, durable=False, unsynced=("log",))
        if good:
            raise Failure(f"{mode}: taken up, and not durable")


@claim
def hidden_changes():
    """A stock QEMU writes to what was left; our tools write the header after
    it, which looks well then: nothing is taken up."""
    for durable in (False, True):
        for tool in (["lbdump", "--quiet", "--incremental", "-o", "@.lbz", "@"],
                     ["lbctl", "confirm", "@", "UUID", "00" * 16]):
            for writer in (None, "S10"):
                folder = prepared()
                path = os.path.join(folder, "disk.qcow2")
                with Guest(folder) as guest:
                    info = guest.begin(durable=durable)["disks"][0]
                    guest.write("write -P 32 0 4k")
                if writer:
                    session(writer, path, "write -P 99 1M 64k")
                run([word.replace("@", path).replace(
                    "UUID", info["checkpoint"]) for word in tool]).expect(0)
                kind, content, said = take_up(folder)
                if kind and content != Content():
                    raise Failure(f"{tool[:2]}, {writer}: taken up wrongly")
                # A new list takes the boot id away.
                whole = not writer and (durable or tool[1] == "confirm")
                if bool(kind) != whole:
                    raise Failure(f"{tool[:2]}, {writer}, {durable}: {said}")
                expect_no_errors(path)


@claim
def killed_while_it_runs():
    """What a backup that was cut short leaves is trusted."""
    folder = prepared()
    with Guest(folder) as guest:
        guest.begin()
        guest.write("write -P 32 0 4k")
    path = os.path.join(folder, "disk.qcow2")
    found, status = verdict_of(path)
    if found != "trusted":
        raise Failure(f"{found}: {json.dumps(status)}")
    said = run(["lbctl", "recover", path]).expect(0).out.decode()
    if not said.endswith(", an interrupted backup given up, its originals "
                         "deleted\n") or os.path.exists(path[:-6]
                                                        + ".orig.qcow2"):
        raise Failure(f"recover: {said}")
    if take_up(folder)[2] != f"lbdump: {path}: no backup was interrupted\n":
        raise Failure("taken up after recover")
    run(["lbctl", "recover", path]).expect(0)
    expect_goes_on(folder)


if __name__ == "__main__":
    raise SystemExit(main())
