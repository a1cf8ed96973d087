# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests with a patched QEMU share, on top of tests/fault/faultlib.py.

Three QEMUs: "P" is ours, with the livebackup patches; "S7" and "S10" are stock
ones.  They are found where ./setup puts them (QLB_QEMU_ROOT), or in QLB_QEMU,
QLB_STOCK_QEMU_7 and QLB_STOCK_QEMU_10.  Where no QEMU 7.2 is packaged, S7 is the
one that is installed.
"""

import json
import os
import re
import signal
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "fault"))

# pylint: disable=wrong-import-position
from faultlib import (Failure, NIGHTLY, PATIENCE, Result, SHIM, TOP,  # noqa
                      claim, copy, each, main, read, remove, run, sh,
                      shim_environment, workplace, write)
import lbext  # noqa: E402
import qcow2  # noqa: E402

ORACLE = os.path.join(TOP, "tests", "oracle")


def folder_of(variable, *defaults):
    """The first folder that has a qemu-img."""
    if variable in os.environ:
        defaults = (os.environ[variable],)
    for folder in defaults:
        if os.access(os.path.join(folder, "qemu-img"), os.X_OK):
            return folder
    return None


BUILT = os.environ.get("QLB_QEMU_ROOT", os.path.join(TOP, "build-qemu"))
FOLDERS = {
    "P": folder_of("QLB_QEMU", os.path.join(BUILT, "stage", "bin")),
    "S7": folder_of("QLB_STOCK_QEMU_7",
                    os.path.join(BUILT, "stock-7.2", "usr", "bin"),
                    "/usr/bin"),
    "S10": folder_of("QLB_STOCK_QEMU_10",
                     os.path.join(BUILT, "stock-10.0", "usr", "bin"),
                     "/usr/bin")}
STOCK = ("S7", "S10")
SIGKILL = "sigraise 9"


def program(who, name):
    """Path of a program of one of the QEMUs."""
    if FOLDERS[who] is None:
        raise Failure(f"there is no QEMU {who}; './setup check' gets it")
    return os.path.join(FOLDERS[who], name)


def folder_in(argv):
    """That of the image, as QEMU looks for data files in the current one."""
    for word in argv:
        if os.path.isabs(word) and os.path.isdir(os.path.dirname(word)):
            return os.path.dirname(word)
    return None


def call(who, name, *argv, died_of=None, may_die_of=None, env=None,
         status=(0,)):
    """Run a program of a QEMU; death by any other signal is a failure."""
    full = [program(who, name), *argv]
    try:
        done = subprocess.run(
            full, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, timeout=PATIENCE, check=False,
            cwd=folder_in(argv), env=dict(os.environ, **(env or {})))
    except subprocess.TimeoutExpired as error:
        raise Failure(f"hangs: {' '.join(full)}") from error
    result = Result(full, done.returncode, done.stdout,
                    done.stderr.decode("utf-8", "backslashreplace"))
    wanted = None if died_of is None else -died_of
    if may_die_of is not None and result.status == -may_die_of:
        return result
    if (result.status < 0 or wanted is not None) and result.status != wanted:
        raise Failure(f"expected death by {died_of}\n{result}\n"
                      f"{done.stdout.decode()}")
    if wanted is None and status is not None:
        result.expect(*status)
    return result


def img(who, *argv, **how):
    """qemu-img"""
    return call(who, "qemu-img", *argv, **how)


def complaints(result):
    """Lines of qemu-io that tell of a failure; it ends with 0 all the same."""
    text = result.out.decode("utf-8", "backslashreplace") + result.err
    return [line for line in text.splitlines()
            if re.search("rror|failed|cannot|annot ", line)
            and "warning:" not in line]


def session(who, path, *commands, killed=False, **how):
    """qemu-io opens the image for writing, and runs commands; in the end it
    closes the image, or is killed."""
    # A sync takes longer than all else; without a power loss it is the same.
    argv = ["-t", "unsafe", "-f", "qcow2"] if isinstance(path, str) else []
    for command in commands + ((SIGKILL,) if killed else ()):
        argv += ["-c", command]
    argv += [path] if isinstance(path, str) else list(path)
    if not commands and not killed:
        argv = ["-c", "length", *argv]
    # What is allocated already can't be written compressed.
    may_fail = sum(command.startswith("write -c") for command in commands)
    result = call(who, "qemu-io", *argv, status=(0, 1) if may_fail else (0,),
                  died_of=signal.SIGKILL if killed else None, **how)
    lines = complaints(result)
    while may_fail and "write failed: Input/output error" in lines:
        lines.remove("write failed: Input/output error")
        may_fail -= 1
    if lines:
        raise Failure(f"{lines}\n{result}\n{result.out.decode()}")
    return result


# --------------------------------------------------------------------------
# Trust, by all who know it
# --------------------------------------------------------------------------

BOOT_ID = read("/proc/sys/kernel/random/boot_id").decode().strip()


def oracle_trust(path):
    """lbext's Trust, evaluated, and its verdict."""
    trust = lbext.Trust(qcow2.Header(path), BOOT_ID, os.stat(path).st_dev)
    return trust, trust.evaluate()


class WithoutOthers(lbext.Trust):
    """Of the image alone: `qemu-img info` opens no file that it names."""

    def rule_10(self):
        """Backing files."""

    def rule_11(self):
        """Data file."""


def driver_keyword(path, other_files=False):
    """What the driver tells, by the oracle's rules: of the newest checkpoint,
    as that is what it writes to; and of bitmaps that are in use."""
    kind = lbext.Trust if other_files else WithoutOthers
    trust = kind(qcow2.Header(path), BOOT_ID, os.stat(path).st_dev)
    verdict = trust.evaluate()
    if verdict["keyword"] != "trusted":
        return verdict["keyword"]
    last = len(verdict["checkpoints"]) - 1
    for j in range(last, -1, -1):
        rules = sorted(trust.bitmap_rules(j))
        keyword = rules[0][1] if rules else "trusted"
        if keyword == "in-use" or (j == last and keyword != "trusted"):
            return keyword
    return "trusted"


def info_of(who, path):
    """format-specific.data of `qemu-img info`."""
    result = img(who, "info", "-f", "qcow2", "--output=json", path)
    return json.loads(result.out)["format-specific"]["data"]


def verdict_of(path):
    """The keyword of what changed since the parent of the next incremental,
    on which lbctl, the driver and the oracle agree; and lbctl's status."""
    status = run(["lbctl", "status", "--json", path]).expect(0).json()
    verdict = oracle_trust(path)[1]
    ours = (status["keyword"] or "trusted",
            [(c["uuid"], c["label"], c["confirmed"],
              c["keyword"] or "trusted") for c in status["checkpoints"]])
    theirs = (verdict["keyword"],
              [(c["uuid"], c["label"], c["confirmed"], c["keyword"])
               for c in verdict["checkpoints"]])
    if ours != theirs:
        raise Failure(f"lbctl: {ours}\noracle: {theirs}")
    expect_driver_agrees(path, status)
    if status["keyword"]:
        return status["keyword"], status
    confirmed = [c for c in status["checkpoints"] if c["confirmed"]]
    if not confirmed:
        return "no-checkpoint", status
    return confirmed[-1]["keyword"] or "trusted", status


def expect_driver_agrees(path, status):
    """`qemu-img info` of the patched QEMU; and its qemu-io, where other files
    matter and can be opened."""
    info = info_of("P", path).get("livebackup")
    if not status["on"] or info is None:
        if status["on"] or info is not None:
            raise Failure(f"lbctl: on is {status['on']}, driver: {info}")
        return
    keyword = driver_keyword(path)
    seen = {"trusted": info["trusted"], "trust": info["trust"]}
    want = {"trusted": keyword == "trusted", "trust": keyword}
    for theirs, ours in (("granularity", "granularity"), ("sync", "sync"),
                         ("image-uuid", "image_uuid")):
        seen[theirs] = info.get(theirs)
        want[theirs] = status[ours]
    if keyword == status["keyword"]:
        seen["reason"] = info["reason"]
        want["reason"] = status["reason"]
    seen["checkpoints"] = [
        [c["uuid"], c["time"], c["label"], c["confirmed"], c["virtual-size"]]
        for c in info.get("checkpoints", [])]
    want["checkpoints"] = [
        [c["uuid"], c["time"], c["label"], c["confirmed"], c["virtual_size"]]
        for c in status["checkpoints"]]
    if seen != want:
        raise Failure(f"driver: {json.dumps(seen)}\n"
                      f"lbctl:  {json.dumps(want)}")
    if status["keyword"] in ("backing-modified", "data-file-modified"):
        keyword = driver_keyword(path, other_files=True)
        opened = call("P", "qemu-io", "-r", "-f", "qcow2", "-c", "info", path,
                      status=(0, 1))
        if opened.status == 0 and (f"trust: {keyword}\n"
                                   not in opened.out.decode()):
            raise Failure(f"driver, with other files: not {keyword}\n"
                          f"{opened.out.decode()}")


def expect_sound(path, leaks=False):
    """No rule for writers is broken, the digests of other files included;
    and a stock QEMU finds neither errors nor leaks (or only those)."""
    header = qcow2.Header(path)
    broken = [sentence for sentence in lbext.broken_musts(header)
              # QEMU writes no such table into clusters of 4 KiB.
              if "feature name" not in sentence
              or header.cluster_size > 4096]
    if broken:
        raise Failure("; ".join(broken))
    img("S10", "check", "-q", "-f", "qcow2", path,
        status=(0, 3) if leaks else (0,))


def expect_claims_kept(path, chain, keyword=None, whole=NIGHTLY):
    """The point of all: what is called trusted misses nothing, and what is
    not is refused, with its keyword.  Leaves the image as it is.

    chain: the archives so far.  keyword: the expected one, or None.  whole:
    compare through a restore and a stock qemu-img as well.
    """
    found, status = verdict_of(path)
    if keyword is not None and found != keyword:
        raise Failure(f"{os.path.basename(path)} is {found}, not {keyword}\n"
                      f"{json.dumps(status)}")
    archive = path + ".now.lbz"
    before = os.stat(path).st_mtime_ns
    # Into a pipe, so that it need not sync.
    result = run(["lbdump", "--copy", "--incremental", "--threads=1", path])
    if found != "trusted":
        result.expect(3)
        if found not in ("off", "no-checkpoint"):
            result.mentions(rf"\({found}\)")
        if result.out:
            raise Failure(f"{found}, and still there is an archive")
    else:
        write(archive, result.expect(0).out)
        expect_chain_is(path, [*chain, archive], whole)
    if os.stat(path).st_mtime_ns != before:
        raise Failure("somebody has written to the image")
    return found


def expect_chain_is(path, chain, whole=True):
    """The archives restore to what the guest reads."""
    run(["lbverify", "-q", f"--image={path}", *chain]).expect(0)
    if whole:
        restored = path + ".restored"
        remove(restored)
        run(["lbrestore", "-q", "--threads=1", "-o", restored,
             *chain]).expect(0)
        expect_same(path, restored, f"the restored disk differs: {chain}")
        remove(restored)


def expect_same(left, right, what, left_format="qcow2", right_format="qcow2"):
    """The guest reads the same from both, and both have the same size."""
    same = img("S10", "compare", "-f", left_format, "-F", right_format, left,
               right, status=None)
    # It only warns of zeroes behind the end of the other.
    if same.status != 0 or b"ismatch" in same.out or same.err:
        raise Failure(f"{what}\n{same.out.decode()}{same.err}")


def dump(path, archive, *options, status=0):
    """lbdump that adds a checkpoint."""
    remove(archive)
    return run(["lbdump", "-q", "--threads=1", *options, "-o", archive,
                path]).expect(status)


def expect_no_errors(path, who="S10"):
    """Nothing worse than leaks; of images that were not closed, bitmaps that
    are in use are none either."""
    img(who, "check", "-f", "qcow2", path, status=(0, 3))


# --------------------------------------------------------------------------
# Disks
# --------------------------------------------------------------------------

class Disk:
    """How to make a disk for a test."""

    def __init__(self, size="8M", granularity=None, backing=None, data=None,
                 checkpoints=1, by="P", sync=False, **options):
        self.size = size
        self.granularity = granularity
        self.backing = backing          # file name, format
        self.data = data                # name of the data file
        self.checkpoints = checkpoints
        self.by = by                    # who turns livebackup on
        self.sync = sync
        self.options = options

    def __repr__(self):
        return " ".join(f"{key}={value}" for key, value
                        in {**vars(self), **self.options}.items()
                        if value and key != "options")

    def make(self, folder, name="disk.qcow2"):
        """In a folder that holds the backing file: the image with livebackup
        on, no checkpoint.  Returns its path."""
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, name)
        options = dict(self.options)
        if self.data:
            options["data_file"] = self.data.replace("@", folder)
            remove(os.path.join(folder, os.path.basename(self.data)))
        if self.by == "P":
            options["livebackup"] = "on"
            if self.granularity:
                options["livebackup_granularity"] = self.granularity
            if self.sync:
                options["livebackup_sync"] = "on"
        argv = ["create", "-q", "-f", "qcow2"]
        if options:
            argv += ["-o", ",".join(f"{key}={value}" for key, value
                                    in options.items())]
        if self.backing:
            argv += ["-b", self.backing[0], "-F", self.backing[1]]
        img("P" if self.by == "P" else self.by, *argv, path, self.size)
        if self.by != "P":
            run(["lbctl", "enable",
                 *([f"--granularity={str(self.granularity).upper()}"]
                   if self.granularity else []),
                 *(["--sync"] if self.sync else []), path]).expect(0)
        return path


def size_of(path):
    """Of the guest's disk."""
    return qcow2.Header(path).size


def random_commands(random, path, count=3, compress=True, keep_end=0):
    """Commands of qemu-io that change the disk somehow, but not its last
    keep_end bytes."""
    size = size_of(path) - keep_end
    header = qcow2.Header(path)
    compress &= not header.has_data_file
    commands = []
    while len(commands) < count:
        kind = random.choice(["write -P", "write -P", "write -P", "write -z",
                              "discard", "write -c", "write -zu", "flush",
                              "small"])
        length = min(random.choice([512, 4096, 65536, 200000, 1 << 20]),
                     max(size, 0)) // 512 * 512
        if length == 0:
            break
        offset = random.randrange((size - length) // 512 + 1) * 512
        if kind == "flush":
            commands.append("flush")
        elif kind == "small":
            commands.append(f"write -P {random.randrange(1, 256)} "
                            f"{random.randrange(size)} 1")
        elif kind == "write -c":
            offset = offset // header.cluster_size * header.cluster_size
            if not compress or offset + header.cluster_size > size:
                continue
            commands.append(f"write -c -P {random.randrange(1, 256)} {offset} "
                            f"{header.cluster_size}")
        elif kind == "write -P":
            commands.append(f"write -P {random.randrange(1, 256)} {offset} "
                            f"{length}")
        else:
            commands.append(f"{kind} {offset} {length}")
            # Killed before the flush, QEMU leaves tables that refer to what
            # it has cut out of the file; compressed, that is unreadable.
            commands += ["flush"] if kind != "write -z" else []
    return commands
