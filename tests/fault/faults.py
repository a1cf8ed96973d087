#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""Faults, signals and kills at every call of every operation that writes.

Each operation runs on a copy of a folder that was prepared once; the shim
injects one fault at its n-th call, for every n.  Afterwards the image must be
in a state that is allowed, a stock qemu-img must find nothing worse than a
leak, `lbctl recover` must mend that, and the chain must go on: the guest
writes, the next dump is made, and restored with the archives that are whole
it must equal the disk.
"""

import json
import os
import signal
import sys

from faultlib import (Failure, NIGHTLY, SANITIZED, claim, copy, each,
                      expect_absent, expect_no_worse_than_leaks, expect_same,
                      expect_sound, guest, main, make_disk, read,
                      remove_temporaries, run, sh, shim_environment,
                      state_of, status_of, workplace)
import lbext
import qcow2

# --------------------------------------------------------------------------
# Operations
# --------------------------------------------------------------------------


class Operation:
    """A command line on the files of a prepared folder.

    argv: "@x" stands for the path of the folder's file x.  output: the file
    that -o or a redirection makes.  to: "file" (-o), "redirect", "pipe" or
    None.
    """

    def __init__(self, prepare, argv, output=None, to=None, checkpoint=False,
                 receipt=0, stdin=None):
        self.prepare = prepare
        self.argv = argv
        self.output = output
        self.to = to
        self.checkpoint = checkpoint
        self.receipt = receipt
        self.stdin = stdin

    def run(self, folder, **how):
        """Run it in a folder; how: see run()."""
        argv = [os.path.join(folder, word[1:]) if word[0] == "@" else word
                for word in self.argv]
        if self.stdin:
            how["stdin"] = os.path.join(folder, self.stdin)
        if self.receipt:
            argv += receipt(folder)[:self.receipt]
        if self.to in ("redirect", "pipe"):
            path = os.path.join(folder, self.output)
            with open(path, "wb") as out:
                if self.to == "redirect":
                    return run(argv, stdout=out, **how)
                result = run(argv, **how)
                out.write(result.out)
                return result
        return run(argv, **how)


def prepare_plain(folder):
    """A disk with content, livebackup off."""
    disk = os.path.join(folder, "disk.qcow2")
    make_disk(disk)
    guest(disk, "write -P 1 0 200k", "write -P 2 3M 64k",
          "write -P 3 40M 128k")
    return disk


def prepare_enabled(folder):
    """No checkpoint yet."""
    disk = prepare_plain(folder)
    run(["lbctl", "enable", disk]).expect(0)
    return disk


def prepare_chain(folder):
    """A full archive, an incremental that went into a pipe, changes."""
    disk = prepare_enabled(folder)
    run(["lbdump", "-q", "-o", os.path.join(folder, "full.lbz"),
         disk]).expect(0)
    guest(disk, "write -P 4 64k 64k", "write -z 3M 64k")
    lost = run(["lbdump", "-q", "--json", "--incremental", disk]).expect(0)
    with open(os.path.join(folder, "receipt"), "w") as file:
        summary = json.loads(lost.err)
        file.write(f"{summary['uuid']} {summary['root_digest']}")
    with open(os.path.join(folder, "piped.lbz"), "wb") as file:
        file.write(lost.out)
    guest(disk, "write -P 5 41M 4k")
    return disk


def prepare_leaks(folder):
    """A chain and leaked clusters."""
    disk = prepare_chain(folder)
    run(["lbdump", "-q", "-o", os.path.join(folder, "killed.lbz"), disk],
        env=shim_environment(at=5, kind="kill-before", path="disk.qcow2"),
        died_of=signal.SIGKILL)
    remove_temporaries(os.path.join(folder, "killed.lbz"))
    sh("qemu-img", "check", "-f", "qcow2", disk, status=(3,))
    return disk


def prepare_untrusted(folder):
    """The bits of one checkpoint were cleared by somebody else."""
    disk = prepare_leaks(folder)
    sh("qemu-img", "bitmap", "--clear", disk, "lb-" + receipt(folder)[0])
    return disk


def receipt(folder):
    """UUID and root digest of the archive that went into a pipe."""
    return read(os.path.join(folder, "receipt")).decode().split()


def prepare_archives(folder):
    """full.lbz, incr1.lbz, incr2.lbz, and what they restore to."""
    disk = prepare_enabled(folder)
    run(["lbdump", "-q", "-o", os.path.join(folder, "full.lbz"),
         disk]).expect(0)
    for n in (1, 2):
        guest(disk, f"write -P {4 + n} {64 * n}k 64k", f"write -P {n} 50M 8k")
        run(["lbdump", "-q", "--incremental", "-o",
             os.path.join(folder, f"incr{n}.lbz"), disk]).expect(0)
    return disk


def prepare_old_disk(folder):
    """A chain, and an older disk.raw that a restore replaces."""
    prepare_archives(folder)
    run(["lbrestore", "-q", "-o", os.path.join(folder, "old.qcow2"),
         os.path.join(folder, "full.lbz")]).expect(0)


def prepare_old_copy(folder):
    """A chain, and an older archive under the name that is stored to."""
    prepare_archives(folder)
    copy(os.path.join(folder, "incr1.lbz"),
         os.path.join(folder, "stored.lbz"))


DUMP = ["lbdump", "-q", "--threads=1"]
IMAGE_OPERATIONS = {
    "enable": Operation(prepare_plain, ["lbctl", "enable", "@disk.qcow2"]),
    "full": Operation(prepare_enabled, [*DUMP, "-o", "@new.lbz",
                                        "@disk.qcow2"],
                      "new.lbz", "file", True),
    "incremental": Operation(
        prepare_chain, [*DUMP, "--incremental", "-o", "@new.lbz",
                        "@disk.qcow2"], "new.lbz", "file", True),
    "redirect": Operation(prepare_chain, [*DUMP, "--incremental",
                                          "@disk.qcow2"],
                          "new.lbz", "redirect", True),
    "pipe": Operation(prepare_chain, [*DUMP, "--incremental", "@disk.qcow2"],
                      "new.lbz", "pipe", True),
    "confirm": Operation(prepare_chain, ["lbctl", "confirm", "@disk.qcow2"],
                         receipt=2),
    "prune": Operation(prepare_chain, ["lbctl", "prune", "@disk.qcow2"],
                       receipt=1),
    "disable": Operation(prepare_chain, ["lbctl", "disable", "@disk.qcow2"]),
    "recover": Operation(prepare_leaks, ["lbctl", "recover", "@disk.qcow2"]),
    "recover-untrusted": Operation(prepare_untrusted,
                                   ["lbctl", "recover", "@disk.qcow2"]),
}
ARCHIVE_OPERATIONS = {
    "merge": Operation(prepare_archives, [
        "lbmerge", "-q", "--threads=1", "-o", "@full.lbz", "@full.lbz",
        "@incr1.lbz", "@incr2.lbz"], "full.lbz", "file"),
    "restore": Operation(prepare_old_disk, [
        "lbrestore", "-q", "--threads=1", "--force", "-o", "@old.qcow2",
        "@full.lbz", "@incr1.lbz", "@incr2.lbz"], "old.qcow2", "file"),
    "store": Operation(prepare_old_copy, [
        "lbverify", "-q", "--threads=1", "--force", "-o", "@stored.lbz", "-"],
        "stored.lbz", "file", stdin="full.lbz"),
}


class Case:
    """One operation with one fault, in a folder of its own."""

    def __init__(self, name, operation):
        self.name = name
        self.operation = operation
        self.base = os.path.abspath(f"base-{name}")
        if not os.path.exists(self.base):
            os.mkdir(self.base)
            operation.prepare(self.base)
        self.old = None
        disk = os.path.join(self.base, "disk.qcow2")
        if os.path.exists(disk):
            self.old = state_of(disk)

    def folder(self):
        """A fresh copy of the prepared files."""
        folder = os.path.join(workplace(), self.name)
        os.makedirs(folder, exist_ok=True)
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
        for name in os.listdir(self.base):
            copy(os.path.join(self.base, name), os.path.join(folder, name))
        return folder

    def total(self, **fault):
        """How many calls a whole run makes."""
        folder = self.folder()
        count = os.path.join(folder, "count")
        self.operation.run(folder, env=shim_environment(
            count_file=count, **fault)).expect(0)
        total = int(read(count))
        if total < 2:
            raise Failure(f"{self.name}: only {total} calls")
        return total


def archives_in(folder):
    """The archives that verify."""
    return [name for name in sorted(os.listdir(folder))
            if name.endswith(".lbz") and name != "next.lbz"
            and run(["lbverify", os.path.join(folder, name)]).status == 0]


def checkpoints_of(disk):
    """[(UUID, confirmed, keyword)]"""
    return [(c["uuid"], c["confirmed"], c["keyword"])
            for c in status_of(disk)["checkpoints"]]


def expect_trust_agrees(disk):
    """The independent implementation comes to the same verdict."""
    boot_id = read("/proc/sys/kernel/random/boot_id").decode().strip()
    theirs = lbext.Trust(qcow2.Header(disk), boot_id,
                         os.stat(disk).st_dev).evaluate()
    ours = status_of(disk)
    if ((ours["keyword"] or "trusted") != theirs["keyword"]
            or [(c["uuid"], c["confirmed"], c["keyword"] or "trusted")
                for c in ours["checkpoints"]]
            != [(c["uuid"], c["confirmed"], c["keyword"])
                for c in theirs["checkpoints"]]):
        raise Failure(f"trust differs:\n{json.dumps(ours)}\n"
                      f"{json.dumps(theirs)}")


def expect_chain_goes_on(folder, archives):
    """Mend, write, dump, restore, compare."""
    disk = os.path.join(folder, "disk.qcow2")
    expect_no_worse_than_leaks(disk)
    expect_trust_agrees(disk)
    run(["lbctl", "recover", disk]).expect(0)
    expect_sound(disk)
    guest(disk, "write -P 90 128k 4k", "write -P 91 20M 64k",
          "write -z 40M 64k")
    following = os.path.join(folder, "next.lbz")
    summary = run(["lbdump", "-q", "--json", "--auto", "--threads=1", "-o",
                   following, disk]).expect(0).json()
    restored = os.path.join(folder, "restored.qcow2")
    # A full archive needs no others, and where livebackup was off before is of
    # another image.
    chain = [os.path.join(folder, name) for name in archives
             if summary["kind"] == "incremental"]
    run(["lbrestore", "-q", "--threads=1", "--at", summary["uuid"], "-o",
         restored, *chain, following]).expect(0)
    expect_same(disk, "qcow2", restored, "qcow2")
    expect_sound(disk)
    return summary


def expect_allowed_state(case, folder, failed):
    """The old list of checkpoints, or the new one; failed: none of the new
    is left, unless its archive is whole."""
    disk = os.path.join(folder, "disk.qcow2")
    old = checkpoints_of(os.path.join(case.base, "disk.qcow2"))
    now = checkpoints_of(disk)
    if not case.operation.checkpoint:
        return
    if now[:len(old)] != old or len(now) > len(old) + 1:
        raise Failure(f"checkpoints were {old}, are {now}")
    added = now[len(old):]
    whole = case.operation.output in archives_in(folder)
    if added and added[0][1] and not (
            whole and case.operation.to != "pipe"):
        raise Failure("a checkpoint is confirmed, its archive is not whole")
    if failed and added and not whole:
        raise Failure("a failed dump has left its checkpoint")
    if failed and not added and state_of(disk) != case.old:
        raise Failure("a failed dump has changed the image:\n"
                      f"{case.old}\n{state_of(disk)}")


# --------------------------------------------------------------------------
# Kills
# --------------------------------------------------------------------------

def calls(total, keep):
    """1 to total; with the sanitizers, or where there are many, fewer."""
    if NIGHTLY:
        return range(1, total + 1)
    step = keep * (4 if SANITIZED else 1)
    return sorted(set(range(1, total + 1, step)) | {total})


def kill_cases(name, operation):
    """(label, Case, kind, n) for every kill."""
    case = Case(name, operation)
    total = case.total()
    for kind in ("kill-before", "torn", "kill-after"):
        keep = 3 if kind == "kill-after" else 1
        for n in calls(total, keep):
            yield f"{name}, {kind} at {n} of {total}", case, kind, n


def check_killed_writer(item):
    """An operation on an image dies."""
    _, case, kind, n = item
    folder = case.folder()
    case.operation.run(folder, env=shim_environment(at=n, kind=kind),
                       died_of=signal.SIGKILL)
    output = case.operation.output
    if case.operation.to == "file":
        path = os.path.join(folder, output)
        if os.path.exists(path):
            run(["lbverify", path]).expect(0)
        remove_temporaries(path)
    expect_allowed_state(case, folder, failed=False)
    expect_chain_goes_on(folder, archives_in(folder))


def killed(name):
    """All kills of one operation."""
    each(kill_cases(name, IMAGE_OPERATIONS[name]), check_killed_writer)


@claim
def kill_enable():
    """lbctl enable"""
    killed("enable")


@claim
def kill_full():
    """lbdump -o, with a checkpoint"""
    killed("full")


@claim
def kill_incremental():
    """lbdump --incremental -o"""
    killed("incremental")


@claim
def kill_redirect():
    """lbdump --incremental > file"""
    killed("redirect")


@claim
def kill_pipe():
    """lbdump --incremental | ..."""
    killed("pipe")


@claim
def kill_confirm():
    """lbctl confirm"""
    killed("confirm")


@claim
def kill_prune():
    """lbctl prune"""
    killed("prune")


@claim
def kill_disable():
    """lbctl disable"""
    killed("disable")


@claim
def kill_recover():
    """lbctl recover, of leaks and of an untrusted checkpoint"""
    killed("recover")
    killed("recover-untrusted")


def whole_states(case):
    """Content of the output before and after a whole run."""
    path = os.path.join(case.base, case.operation.output)
    folder = case.folder()
    case.operation.run(folder).expect(0)
    new = os.path.join(case.base, "..", f"new-{case.name}")
    copy(os.path.join(folder, case.operation.output), new)
    return path, new


def expect_old_or_new(case, folder, old, new):
    """The output is one or the other, whole."""
    path = os.path.join(folder, case.operation.output)
    if path.endswith(".qcow2"):
        expect_sound(path)
        for known in (old, new):
            try:
                expect_same(path, "qcow2", known, "qcow2")
                break
            except Failure:
                continue
        else:
            raise Failure("neither the old disk nor the new one")
        expect_trust_agrees(path)
    elif read(path) not in (read(old), read(new)):
        raise Failure("neither the old archive nor the new one")


def each_kill_of_archives(name):
    """A killed merge or restore."""
    operation = ARCHIVE_OPERATIONS[name]
    cases = list(kill_cases(name, operation))
    old, new = whole_states(cases[0][1])

    def check(item):
        _, case, kind, n = item
        folder = case.folder()
        operation.run(folder, env=shim_environment(at=n, kind=kind),
                      died_of=signal.SIGKILL)
        expect_old_or_new(case, folder, old, new)
        for other in ("incr1.lbz", "incr2.lbz"):
            if read(os.path.join(folder, other)) != read(
                    os.path.join(case.base, other)):
                raise Failure(f"{other} has changed")

    each(cases, check)


@claim
def kill_merge():
    """lbmerge -o that replaces an input"""
    each_kill_of_archives("merge")


@claim
def kill_restore():
    """lbrestore --force"""
    each_kill_of_archives("restore")


@claim
def kill_store():
    """lbverify -o --force, from a pipe"""
    each_kill_of_archives("store")


# --------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------

WRITES = "write,sync,truncate,rename"
ERRORS = r"Input/output error|No space left on device"


def error_cases(name, operation, kinds, ops, keep=1):
    """(label, Case, fault) for every error."""
    case = Case(name, operation)
    total = case.total(op=ops)
    for kind in kinds:
        for n in calls(total, keep):
            yield (f"{name}, {kind} at {n} of {total} ({ops})", case,
                   {"at": n, "kind": kind, "op": ops})


def check_failed_writer(item):
    """An operation on an image meets an error."""
    _, case, fault = item
    folder = case.folder()
    result = case.operation.run(folder, env=shim_environment(**fault))
    result.expect(0, 1)
    path = os.path.join(folder, case.operation.output or "none")
    if result.status == 1:
        result.mentions(r"^lb[a-z]+: ").mentions(ERRORS)
        if case.operation.to == "file" and os.path.exists(path):
            run(["lbverify", path]).expect(0)
        elif case.operation.to == "file":
            expect_absent(path)
        # Where all fails from then on, no undo is possible.
        expect_allowed_state(case, folder,
                             failed=not fault["kind"].endswith("-on"))
    elif case.operation.to == "file":
        run(["lbverify", path]).expect(0)
    expect_chain_goes_on(folder, archives_in(folder))


def failing(name, kinds=("eio", "enospc-on"), ops=WRITES, keep=1):
    """All errors of one operation."""
    each(error_cases(name, IMAGE_OPERATIONS[name], kinds, ops, keep),
         check_failed_writer)


@claim
def fail_full():
    """lbdump -o"""
    failing("full")


@claim
def fail_incremental():
    """lbdump --incremental -o"""
    failing("incremental")


@claim
def fail_redirect():
    """lbdump --incremental > file"""
    failing("redirect", keep=2)


@claim
def fail_pipe():
    """lbdump --incremental | ..."""
    failing("pipe", keep=2)


@claim
def fail_control():
    """lbctl enable, confirm, prune, disable, recover"""
    for name in ("enable", "confirm", "prune", "disable", "recover",
                 "recover-untrusted"):
        failing(name)


@claim
def unreadable_sectors():
    """Every n-th read fails."""
    for name in ("full", "incremental", "confirm", "prune", "recover"):
        failing(name, ("eio",), "read", keep=1 if name != "full" else 2)


def check_failed_archive(item):
    """A merge or restore meets an error."""
    _, case, fault, old, new = item
    folder = case.folder()
    result = case.operation.run(folder, env=shim_environment(**fault))
    result.expect(0, 1)
    if result.status == 1:
        result.mentions(r"^lb[a-z]+: ").mentions(ERRORS)
    expect_old_or_new(case, folder, old, new)
    for name in os.listdir(folder):
        if name.startswith("."):
            raise Failure(f"{name} is left")


def failing_archives(name):
    """All errors of a merge or restore."""
    operation = ARCHIVE_OPERATIONS[name]
    cases = [*error_cases(name, operation, ("eio", "enospc-on"), WRITES),
             *error_cases(name, operation, ("eio",), "read")]
    old, new = whole_states(cases[0][1])
    each([(*case, old, new) for case in cases], check_failed_archive)


@claim
def fail_merge():
    """lbmerge -o that replaces an input"""
    failing_archives("merge")


@claim
def fail_restore():
    """lbrestore --force"""
    failing_archives("restore")


@claim
def fail_store():
    """lbverify -o --force, from a pipe"""
    failing_archives("store")


@claim
def fail_verify():
    """An unreadable sector is no damage."""
    case = Case("merge", ARCHIVE_OPERATIONS["merge"])
    path = os.path.join(case.base, "full.lbz")
    run(["lbverify", path], env=shim_environment(
        op="read", path="full.lbz", count_file="count")).expect(0)
    total = int(read("count"))

    def check(n):
        env = shim_environment(op="read", path="full.lbz", at=n, kind="eio")
        run(["lbverify", "--threads=1", path], env=env).expect(1).mentions(
            rf"^lbverify: {path}: .*Input/output error")

    each(range(1, total + 1), check)


# --------------------------------------------------------------------------
# What is no error
# --------------------------------------------------------------------------

def check_harmless(item):
    """Short transfers and interrupted calls go on."""
    _, case, fault = item
    folder = case.folder()
    case.operation.run(folder, env=shim_environment(**fault)).expect(0)
    if case.operation.to is not None:
        path = os.path.join(folder, case.operation.output)
        if path.endswith(".lbz"):
            run(["lbverify", path]).expect(0)
    if case.name in IMAGE_OPERATIONS:
        expect_sound(os.path.join(folder, "disk.qcow2"))
        expect_chain_goes_on(folder, archives_in(folder))


@claim
def short_transfers():
    """Half of the bytes, or EINTR, at every n-th read or write."""
    cases = []
    for name in ("incremental", "pipe", "prune"):
        for ops in ("write", "read"):
            cases += error_cases(name, IMAGE_OPERATIONS[name],
                                 ("short", "eintr"), ops, 3)
    for name, operation in ARCHIVE_OPERATIONS.items():
        for ops in ("write", "read"):
            cases += error_cases(name, operation, ("short", "eintr"), ops, 2)
    each(cases, check_harmless)


# --------------------------------------------------------------------------
# Signals
# --------------------------------------------------------------------------

def check_stopped_writer(item):
    """SIGTERM or SIGINT: stopped, or too late to stop."""
    _, case, fault = item
    folder = case.folder()
    result = case.operation.run(folder, env=shim_environment(**fault))
    result.expect(0, 1)
    path = os.path.join(folder, case.operation.output or "none")
    if result.status == 1:
        result.mentions(r"^lb[a-z]+: .*interrupted")
        if case.operation.to == "file" and case.operation.checkpoint:
            expect_absent(path)
        expect_allowed_state(case, folder, failed=True)
    else:
        run(["lbverify", path]).expect(0)
    expect_chain_goes_on(folder, archives_in(folder))


@claim
def signals_stop_a_dump():
    """At every n-th write."""
    cases = []
    for name in ("full", "incremental", "redirect", "pipe"):
        for kind in ("term", "int"):
            cases += error_cases(name, IMAGE_OPERATIONS[name], (kind,),
                                 WRITES, 2)
    each(cases, check_stopped_writer)


@claim
def signals_stop_lbverify():
    """Told as such wherever it comes, and no archive is called damaged."""
    case = Case("merge", ARCHIVE_OPERATIONS["merge"])
    files = [os.path.join(case.base, name)
             for name in ("full.lbz", "incr1.lbz", "incr2.lbz")]
    run(["lbverify", "--threads=1", *files], env=shim_environment(
        op="read", path=".lbz", count_file="count")).expect(0)
    total = int(read("count"))
    statuses = set()

    def check(n):
        result = run(["lbverify", "--threads=1", "--receipt", *files],
                     env=shim_environment(op="read", path=".lbz", at=n,
                                          kind="int"))
        statuses.add(result.expect(0, 1).status)
        if result.status == 1:
            result.mentions("^lbverify: .*interrupted")
        elif result.out.count(b"\n") != len(files):
            raise Failure(f"not all are receipted\n{result}")

    each(range(1, total + 1), check)
    if statuses != {0, 1}:
        raise Failure(f"statuses are {statuses}")


@claim
def second_signal():
    """It ends the program at once; no temporary file is left even then."""
    case = Case("incremental", IMAGE_OPERATIONS["incremental"])
    total = case.total(op=WRITES)
    statuses = set()

    def check(item):
        _, n = item
        folder = case.folder()
        # The signals come before the n-th write and each one after it: the
        # second meets the writes that undo.
        result = case.operation.run(
            folder, may_die_of=signal.SIGTERM,
            env=shim_environment(at=n, kind="term-on", op=WRITES))
        statuses.add(result.expect(0, 1, -signal.SIGTERM).status)
        path = os.path.join(folder, case.operation.output)
        if os.path.exists(path):
            run(["lbverify", path]).expect(0)
        else:
            expect_absent(path)
        expect_allowed_state(case, folder, failed=False)
        expect_chain_goes_on(folder, archives_in(folder))

    each([(f"term from {n} of {total} on", n) for n in calls(total, 1)],
         check)
    if -signal.SIGTERM not in statuses:
        raise Failure("no second signal has met a write")


def check_stopped_archive(item):
    """A merge or restore is stopped."""
    _, case, fault, old, new = item
    folder = case.folder()
    result = case.operation.run(folder, env=shim_environment(**fault))
    result.expect(0, 1)
    if result.status == 1:
        result.mentions(r"^lb[a-z]+: .*interrupted")
    expect_old_or_new(case, folder, old, new)
    for name in os.listdir(folder):
        if name.startswith("."):
            raise Failure(f"{name} is left")


@claim
def signals_stop_merge_and_restore():
    """The old file or the new one, and no temporary file."""
    for name, operation in ARCHIVE_OPERATIONS.items():
        cases = list(error_cases(name, operation, ("term", "int"), WRITES))
        old, new = whole_states(cases[0][1])
        each([(*case, old, new) for case in cases], check_stopped_archive)


if __name__ == "__main__":
    sys.exit(main())
