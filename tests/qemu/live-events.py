#!/usr/bin/python3
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""What else happens to a machine while lbdump backs its disk up.

A qemu-system-x86_64 without a processor stands for the machine, a client of its
NBD server for the guest.  Whatever happens, the dump is right or it fails, the
guest loses nothing, and the next backup is incremental and right.
"""

import os
import shutil
import subprocess
import time

from daemon import Daemon
from qemulib import (Disk, Failure, PATIENCE, claim, dump, expect_chain_is,
                     expect_no_errors, img, main, run, session, workplace)

SIZE = "24M"


class Machine(Daemon):
    """With one disk, exported to the guest as 'disk'."""

    PROGRAM = ("qemu-system-x86_64", "-nodefaults", "-display", "none",
               "-machine", "pc", "-accel", "qtest", "-m", "16",
               "-L", "/usr/share/seabios", "-L", "/usr/share/qemu")
    SERVERS = ("-mon", "qmp,mode=control")

    def __init__(self, folder, device):
        self.events = []
        self.disk = os.path.join(folder, "disk.qcow2")
        self.orig = os.path.join(folder, "disk.orig.qcow2")
        super().__init__(
            folder, "-chardev", "socket,id=dump,path=dump,server=on,wait=off",
            "-mon", "dump,mode=control",
            "-blockdev", f"file,node-name=file,filename={self.disk}",
            "-blockdev", "qcow2,node-name=disk,file=file,discard=unmap",
            *(["-device", "virtio-blk-pci,drive=disk,share-rw=on"]
              if device else []))
        self.qmp("nbd-server-start",
                 addr={"type": "unix", "data": {"path": "nbd"}})
        self.export("disk")

    def export(self, node):
        """To the guest."""
        self.qmp("block-export-add", type="nbd", id="guest", node_name=node,
                 name="disk", writable=True)

    def unexport(self):
        """The guest has gone."""
        self.qmp("block-export-del", id="guest", mode="hard")
        self.wait_for("BLOCK_EXPORT_DELETED")

    def event(self, event):
        self.events.append(event)

    def wait_for(self, name, **data):
        """An event with these data."""
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["event"] == name and \
                        data.items() <= event["data"].items():
                    return event["data"]
            message = self.line()
            if "event" in message:
                self.events.append(message)

    def write(self, *commands):
        """Each must succeed."""
        session("P", ["-f", "raw", "nbd+unix:///disk?socket="
                      + os.path.join(self.folder, "nbd")], *commands)

    def create(self, name, **options):
        """An empty image of the disk's size, as the node 'other'."""
        path = os.path.join(self.folder, name)
        img("P", "create", "-q", "-f", "qcow2", path, SIZE)
        self.qmp("blockdev-add", driver="qcow2", node_name="other",
                 file={"driver": "file", "filename": path}, **options)


def machine(device=False):
    """With a full archive of the disk, and writes since.  device: the machine
    has it, too; else nobody but the guest."""
    folder = os.path.join(workplace(), "machine")
    shutil.rmtree(folder, ignore_errors=True)
    path = Disk(SIZE).make(folder)
    session("P", path, "write -P 1 0 12M", "write -P 2 15M 3M")
    dump(path, os.path.join(folder, "full.lbz"))
    session("P", path, "write -P 3 2M 5M")
    return Machine(folder, device)


def start_lbdump(vm, archive):
    """It goes on for some seconds; returns when the backup has begun."""
    lbdump = subprocess.Popen(
        ["lbdump", f"--qmp={vm.folder}/dump", "--disk=disk",
         "--incremental", "--rate-limit=4M", "--quiet", "-o", archive],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not vm.qmp("query-livebackup") and lbdump.poll() is None:
        time.sleep(0.01)
    return lbdump


def backup_during(happens, status=0, next_by="disk", device=False):
    """lbdump runs; the guest writes; it happens; the guest writes.  next_by: the
    node that the next backup is of, None: what happens has closed the disk."""
    with machine(device) as vm:
        then = os.path.join(vm.folder, "then.qcow2")
        archive = os.path.join(vm.folder, "1.lbz")
        shutil.copy(vm.disk, then)
        lbdump = start_lbdump(vm, archive)
        vm.write("write -P 11 0 1M", "write -P 12 3M 3M", "write -z 1M 64k")
        happens(vm)
        said = lbdump.communicate(timeout=PATIENCE)[1].decode()
        if lbdump.returncode != status:
            raise Failure(f"lbdump ends with {lbdump.returncode}: {said}")
        if vm.qmp("query-livebackup") or os.path.exists(vm.orig):
            raise Failure("the backup has not ended")
        chain = [os.path.join(vm.folder, "full.lbz")]
        if status == 0:
            chain.append(archive)
            expect_chain_is(then, chain)
        expect_next(vm, chain, next_by)


def expect_next(vm, chain, node):
    """The next backup is incremental and right."""
    archive = os.path.join(vm.folder, "2.lbz")
    if node:
        vm.write("write -P 13 20M 1M")
        run(["lbdump", f"--qmp={vm.folder}/dump", f"--disk={node}",
             "--incremental", "-o", archive]).expect(0)
    vm.close()
    if not node:
        run(["lbdump", "--incremental", "-o", archive, vm.disk]).expect(0)
    expect_chain_is(vm.disk, [*chain, archive])
    expect_no_errors(vm.disk)


@claim
def nothing():
    """What the others are held against."""
    backup_during(lambda vm: vm.write("write -P 14 5M 3M"))


@claim
def paused_and_reset():
    """The dump goes on."""
    def happens(vm):
        vm.qmp("stop")
        vm.qmp("cont")
        vm.qmp("system_reset")
        vm.write("write -P 14 5M 3M")
    backup_during(happens, device=True)


@claim
def copied():
    """By jobs of QEMU's own that only read the disk."""
    def happens(vm):
        vm.create("copy.qcow2")
        vm.qmp("blockdev-backup", job_id="copy", device="disk",
               target="other", sync="full")
        vm.write("write -P 14 5M 3M")
        vm.wait_for("BLOCK_JOB_COMPLETED")
        vm.qmp("blockdev-mirror", job_id="mirror", device="disk",
               target="other", sync="full")
        vm.wait_for("BLOCK_JOB_READY")
        vm.write("write -P 15 6M 3M")
        vm.qmp("block-job-cancel", device="mirror")
        vm.wait_for("BLOCK_JOB_COMPLETED")
        vm.qmp("blockdev-del", node_name="other")
    backup_during(happens)


@claim
def migrated():
    """The disk is given to another QEMU: the backup is given up."""
    def happens(vm):
        vm.unexport()
        vm.qmp("migrate", uri=f"file:{vm.folder}/state")
        status = {"status": "setup"}
        while status["status"] not in ("completed", "failed"):
            time.sleep(0.01)
            status = vm.qmp("query-migrate")
        if status["status"] == "failed":
            raise Failure(f"it fails: {status}")
    backup_during(happens, status=1, next_by=None, device=True)


@claim
def unplugged():
    """The disk goes: the backup is given up."""
    def happens(vm):
        vm.unexport()
        vm.qmp("blockdev-del", node_name="disk")
    backup_during(happens, status=1, next_by=None)


@claim
def quit_meanwhile():
    """QEMU ends in order."""
    with machine() as vm:
        archive = os.path.join(vm.folder, "1.lbz")
        lbdump = start_lbdump(vm, archive)
        vm.write("write -P 11 0 1M", "write -P 12 3M 3M")
        vm.close()
        lbdump.communicate(timeout=PATIENCE)
        if lbdump.returncode != 1 or os.path.exists(archive):
            raise Failure(f"lbdump ends with {lbdump.returncode}")
        run(["lbdump", "--incremental", "-o", archive, vm.disk]).expect(0)
        expect_chain_is(vm.disk, [os.path.join(vm.folder, "full.lbz"),
                                  archive])


@claim
def snapshot_and_commit():
    """An overlay comes, which gives the backup up, and goes."""
    def happens(vm):
        vm.unexport()
        vm.create("overlay.qcow2", backing=None)
        vm.qmp("blockdev-snapshot", node="disk", overlay="other")
        vm.export("other")
        vm.write("write -P 14 5M 3M", "write -P 15 0 64k")
        vm.qmp("block-commit", job_id="commit", device="other")
        vm.wait_for("BLOCK_JOB_READY")
        vm.qmp("block-job-complete", device="commit")
        vm.wait_for("BLOCK_JOB_COMPLETED")
        vm.unexport()
        vm.export("disk")
    backup_during(happens, status=1)


if __name__ == "__main__":
    raise SystemExit(main())
