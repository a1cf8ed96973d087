# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kill test is made of, on top of tests/fault/faultlib.py:

    Machine     a QEMU that can be killed
    Disk        an image with its chain of archives, and the judge of both
    Workload    what writer.c does in a guest, computed once more
"""

import json
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from copy import copy as shallow_copy

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "fault"))

# pylint: disable=wrong-import-position
from faultlib import (BUILD, Failure, PATIENCE, TOP, copy, remove,  # noqa
                      run, sh, status_of)
import initrd  # noqa: E402
import lbext  # noqa: E402
import qcow2  # noqa: E402

QEMU = os.environ.get("QLB_QEMU", os.path.join(
    os.environ.get("QLB_QEMU_ROOT", os.path.join(TOP, "build-qemu")),
    "stage", "bin"))
GUEST = os.environ.get("QLB_GUEST", os.path.join(BUILD, "guest"))
WRITER = os.path.join(BUILD, "tests", "guest", "writer")
SEED = int(os.environ.get("QLB_SEED", "1"))
SECTOR = 512
KIB = 1 << 10
MIB = 1 << 20
DIRTY = 1                      # incompatible feature of a qcow2 image
BOOT_ID = lbext.this_boot()


def note(text):
    """A line for the log."""
    for line in text.splitlines():
        print("# " + line, flush=True)


def program(name):
    """Path of a program of the patched QEMU."""
    path = os.path.join(QEMU, name)
    if not os.access(path, os.X_OK):
        raise Failure(f"there is no {path}; './setup qemu' builds it")
    return path


# --------------------------------------------------------------------------
# Machines
# --------------------------------------------------------------------------

class Machine:
    """A QEMU, with QMP on its standard input and output."""

    def __init__(self, *argv, env=None):
        self.argv = [str(word) for word in argv]
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, env=dict(os.environ, **(env or {})))

    def error(self, what):
        """A Failure with what QEMU said."""
        return Failure(f"{what}\n  {' '.join(self.argv)}\n"
                       f"{self.complaints()}")

    def complaints(self):
        """Standard error."""
        self.errors.seek(0)
        return self.errors.read().decode("utf-8", "backslashreplace")

    def say(self, command, **arguments):
        """Send a command of QMP."""
        line = json.dumps({"execute": command, "arguments": arguments})
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.error(f"QEMU is gone before {command}") from None

    def ask(self, command, **arguments):
        """Send a command, and wait until it was done."""
        self.say(command, **arguments)
        while True:
            line = self.process.stdout.readline()
            if not line:
                raise self.error(f"QEMU is gone in {command}")
            answer = json.loads(line)
            if "error" in answer:
                raise self.error(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def io(self, drive, command):
        """A command of qemu-io on a drive."""
        said = self.ask("human-monitor-command",
                        **{"command-line": f'qemu-io {drive} "{command}"'})
        if said:
            raise self.error(f"{command}: {said}")

    def kill(self):
        """SIGKILL.  Returns whether it still lived; it may have ended well
        before, and in no other way."""
        self.process.kill()
        return self.wait()

    def wait(self):
        """Wait for its end; as kill()."""
        try:
            status = self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise self.error("QEMU hangs") from None
        finally:
            self.process.stdin.close()
            self.process.stdout.close()
        if status not in (0, -signal.SIGKILL):
            raise self.error(f"QEMU ended with status {status}")
        if self.complaints():
            raise self.error("QEMU complains")
        return status != 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.errors.close()


def firmware():
    """Where a QEMU that was installed without its firmware finds it."""
    if os.path.exists(os.path.join(QEMU, "..", "share", "qemu",
                                   "bios-256k.bin")):
        return []
    return [word for folder in ("/usr/share/seabios", "/usr/share/qemu")
            if os.path.isdir(folder) for word in ("-L", folder)]


BARE = ("-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio")


def small_machine(disk):
    """No guest; the disk is drive "d"."""
    return Machine(program("qemu-system-x86_64"), *BARE, "-machine", "none",
                   "-S", "-drive", f"if=none,id=d,format=qcow2,file={disk}")


def storage_daemon(disk):
    """The disk is node "d"."""
    return Machine(program("qemu-storage-daemon"),
                   "--blockdev", "driver=qcow2,node-name=d,discard=unmap,"
                   f"file.driver=file,file.filename={disk}",
                   "--chardev", "stdio,id=c", "--monitor", "chardev=c")


def guest_initrd(folder):
    """The guest's first file system: modules, and writer as init."""
    path = os.path.join(folder, "initrd")
    for needed in (os.path.join(GUEST, "vmlinuz"),
                   os.path.join(GUEST, "initrd")):
        if not os.path.exists(needed):
            raise Failure(f"there is no {needed}; "
                          "tests/guest/prepare.sh makes it")
    with open(path, "wb") as out:
        with open(os.path.join(GUEST, "initrd"), "rb") as file:
            out.write(file.read())
        with open(WRITER, "rb") as file:
            out.write(initrd.archive([("init", initrd.PROGRAM, file.read())]))
    return path


class Guest(Machine):
    """A guest that runs writer.c; its log is in a file."""

    def __init__(self, folder, disk, workload, setting):
        self.log = os.path.join(folder, "guest.log")
        remove(self.log)
        self.threads = workload.config["threads"]
        queues = setting.get("queues", 1)
        device = f"virtio-blk-pci,drive=d,num-queues={queues}"
        objects = []
        if setting.get("iothread"):
            objects = ["-object", "iothread,id=t"]
            device += ",iothread=t"
        direct = setting.get("cache", "writeback") == "none"
        super().__init__(
            program("qemu-system-x86_64"), *firmware(), *BARE,
            "-machine", "pc", "-accel", "tcg", "-m", "128",
            "-smp", queues, *objects,
            "-kernel", os.path.join(GUEST, "vmlinuz"),
            "-initrd", guest_initrd(folder),
            "-append", "console=ttyS0 panic=-1 quiet "
            + workload.command_line(),
            "-serial", "file:" + os.path.join(folder, "console.log"),
            "-serial", "file:" + self.log,
            "-blockdev", json.dumps({
                "driver": "qcow2", "node-name": "d", "discard": "unmap",
                "detect-zeroes": setting.get("detect-zeroes", "off"),
                "cache": {"direct": direct},
                "file": {"driver": "file", "filename": disk,
                         "aio": setting.get("aio", "threads"),
                         "discard": "unmap", "cache": {"direct": direct}}}),
            "-device", device)

    def lines(self):
        """The whole lines that it has said last."""
        if not os.path.exists(self.log):
            return []
        with open(self.log, "rb") as file:
            file.seek(max(0, os.path.getsize(self.log) - 4096))
            text = file.read().decode("ascii", "replace")
        lines = text[:text.rfind("\n") + 1].splitlines()
        for line in lines:
            if line.startswith("failed"):
                raise self.error(f"the guest: {line}")
        return lines

    def wait_for(self, requests):
        """Until that many requests are done; 0: right before the first."""
        end = time.monotonic() + PATIENCE
        while not self.lines() or self.done() < requests:
            if self.process.poll() is not None:
                raise self.error("QEMU ended by itself")
            if time.monotonic() > end:
                raise self.error("the guest does not go on, see console.log")
            time.sleep(0.001)

    def told(self):
        """[(done, safe)]: how many requests of each thread were done at least,
        and how many of these were covered by a flush."""
        counts = [line.split() for line in self.lines()
                  if line[:1].isdigit()]
        # the first line that was read may have lost its begin
        if not counts or len(counts[-1]) != self.threads:
            return [(0, 0)] * self.threads
        return [tuple(map(int, word.split("/"))) for word in counts[-1]]

    def done(self):
        """How many requests in all."""
        return sum(done for done, _ in self.told())


# --------------------------------------------------------------------------
# What the guest writes
# --------------------------------------------------------------------------

MASK = (1 << 64) - 1
SECTOR_HEAD = struct.Struct("<5Q")
MAGIC = 0x314c4c494b424c51
WRITE, ZERO, DISCARD, FLUSH = range(4)
# Requests that may have been under way, or done and not yet told: many more
# than happen while a line goes through the serial port.
UNTOLD = 300


class Thread:
    """A thread of writer.c."""

    def __init__(self, config, number):
        self.config = config
        self.number = number
        self.random = (config["seed"] + number) & MASK
        self.cursor = 0

    def next(self):
        """splitmix64"""
        self.random = z = (self.random + 0x9e3779b97f4a7c15) & MASK
        z = ((z ^ z >> 30) * 0xbf58476d1ce4e5b9) & MASK
        z = ((z ^ z >> 27) * 0x94d049bb133111eb) & MASK
        return z ^ z >> 31

    def draw(self):
        """(kind, offset, length) of the next request."""
        c = self.config
        kind, where, at, length, shape = (self.next() for _ in range(5))
        kind %= 100
        stripes = c["area"] // c["stripe"] // c["threads"]
        units = c["stripe"] // c["unit"]
        if shape % 4 == 0:
            self.cursor = (self.cursor + 1) % stripes
        else:
            self.cursor = where % stripes
        at %= units
        if shape // 4 % 8 == 0:
            at = 0
            length = units
        else:
            length = 1 + length % (units - at)
        offset = ((self.cursor * c["threads"] + self.number) * c["stripe"]
                  + at * c["unit"])
        kind = (WRITE if kind < 80 else ZERO if kind < 88 else
                DISCARD if kind < 97 else FLUSH)
        return kind, offset, min(length * c["unit"], c["largest"])


class Workload:
    """What a guest may have done, given what it told."""

    def __init__(self, seed, area, threads=4, stripe=64 * KIB, unit=SECTOR,
                 largest=64 * KIB):
        self.config = {"seed": seed, "threads": threads, "stripe": stripe,
                       "unit": unit, "largest": largest, "area": area}

    def command_line(self):
        """For writer.c."""
        return " ".join(f"qlb.{key}={value}"
                        for key, value in self.config.items())

    def replay(self, told):
        """Compute what each sector may hold; told: see Guest.told().

        Of what no flush has covered qcow2 keeps the tables in memory, so a
        kill takes an allocation back, or not, each for itself.  What was
        discarded and not flushed may show anything: its clusters are given to
        others at once.

        self.allowed: {sector: set}, where a number is the request that wrote
        the sector, "old" stands for what was there before, "zero" and "any".
        """
        self.allowed = {}
        self.touched = []      # (offset, length) of all requests
        for number, (done, safe) in enumerate(told):
            thread = Thread(self.config, number)
            for request in range(done + UNTOLD):
                self.apply(request, *thread.draw(), request < safe)

    def apply(self, request, kind, offset, length, safe):
        """One request."""
        if kind == FLUSH:
            return
        self.touched.append((offset, length))
        new = request if kind == WRITE else "zero" if safe else "any"
        for sector in range(offset // SECTOR, (offset + length) // SECTOR):
            if safe and kind != DISCARD:
                self.allowed[sector] = {new}
            else:
                self.allowed.setdefault(sector, {"old"}).add(new)

    def check(self, now, old):
        """Every sector is what it may be.  now, old: bytes of the disk, after
        the run and before it.  Returns the number of sectors written."""
        written = 0
        wrong = []
        for sector, allowed in self.allowed.items():
            at = sector * SECTOR
            data = now[at:at + SECTOR]
            if data == old[at:at + SECTOR] and "old" in allowed:
                continue
            if not any(data):
                found = "zero"
            else:
                found = self.request_of(sector, data)
                written += 1
            if found not in allowed and "any" not in allowed:
                wrong.append(f"sector {sector} holds {found}, not one of "
                             f"{sorted(map(str, allowed))}")
        if wrong:
            raise Failure("\n".join([f"{len(wrong)} sectors are wrong",
                                     *wrong[:8]]))
        return written

    def request_of(self, sector, data):
        """The request that wrote it; None if it was none of ours."""
        magic, seed, thread, request, number = SECTOR_HEAD.unpack_from(data)
        adler, = struct.unpack_from("<I", data, SECTOR - 4)
        owner = (sector * SECTOR // self.config["stripe"]
                 % self.config["threads"])
        if ((magic, seed, thread, number)
                != (MAGIC, self.config["seed"], owner, sector)
                or adler != zlib.adler32(data[:SECTOR - 4])):
            return None
        return request


# --------------------------------------------------------------------------
# Disks
# --------------------------------------------------------------------------

def to_raw(image, path):
    """The content of a disk, as a stock QEMU reads it."""
    remove(path)
    sh("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, path)
    return path


def data_units(path, unit):
    """Numbers of the units that may hold something else than zeroes."""
    return {number for start, length in qcow2.RawFile(path).content_ranges()
            for number in range(start // unit, -(-(start + length) // unit))}


def differing(left, right, unit):
    """Numbers of the units in which two raw files differ."""
    if os.path.getsize(left) != os.path.getsize(right):
        raise Failure(f"{left} and {right} differ in size")
    # a larger step first, which is rarely needed in parts
    step = max(unit, MIB)
    found = set()
    with open(left, "rb", 0) as a, open(right, "rb", 0) as b:
        for large in data_units(left, step) | data_units(right, step):
            x = os.pread(a.fileno(), step, large * step)
            y = os.pread(b.fileno(), step, large * step)
            if x == y:
                continue
            first = large * (step // unit)
            found |= {first + i for i in range(-(-len(x) // unit))
                      if x[i * unit:(i + 1) * unit]
                      != y[i * unit:(i + 1) * unit]}
    return found


class Content:
    """The bytes of a raw file."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __enter__(self):
        return self.map

    def __exit__(self, *_):
        self.map.close()


def units_of(ranges, unit):
    """Numbers of the units that (offset, length) touch."""
    return {number for offset, length in ranges
            for number in range(offset // unit,
                                (offset + length - 1) // unit + 1)}


def in_session(path):
    """Whether the image says that it is open."""
    live = lbext.read_livebackup(qcow2.Header(path))
    return any(bytes.fromhex(live.fixed["boot_id"].replace("-", "")))


def some(numbers):
    """A few of them, for a message."""
    numbers = sorted(numbers)
    more = f", ... ({len(numbers)} in all)" if len(numbers) > 8 else ""
    return ", ".join(map(str, numbers[:8])) + more


class Disk:
    """An image with livebackup on, and the chain of its archives."""

    def __init__(self, folder, seed, size, granularity=64 * KIB, sync=False,
                 options=()):
        os.makedirs(folder, exist_ok=True)
        self.folder = os.path.abspath(folder)
        self.path = self.file("disk.qcow2")
        self.random = random.Random(seed)
        self.size = size
        self.granularity = granularity
        sh(program("qemu-img"), "create", "-q", "-f", "qcow2", *options, "-o",
           f"livebackup=on,livebackup_granularity={granularity},"
           f"livebackup_sync={'on' if sync else 'off'}", self.path, str(size))
        # something that stays, or is overwritten
        self.qemu_io(*(f"write -P {n % 255 + 1} {self.somewhere(64)}k 64k"
                       for n in range(size // MIB // 2)))
        self.chain = [self.file("base.lbz")]
        run(["lbdump", "-q", "-o", self.chain[0], self.path]).expect(0)
        self.archives = 0
        self.parent = to_raw(self.path, self.file("parent.raw"))
        self.now = self.file("now.raw")
        copy(self.parent, self.now)
        self.touched = set()    # granules since the parent, at the most
        self.kills = 0

    def clone(self, folder, seed):
        """The same in another folder, which is emptied."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder, copy_function=copy)
        other = shallow_copy(self)
        other.folder = os.path.abspath(folder)
        for name in ("path", "parent", "now"):
            setattr(other, name,
                    other.file(os.path.basename(getattr(self, name))))
        other.chain = [other.file(os.path.basename(path))
                       for path in self.chain]
        other.touched = set(self.touched)
        other.random = random.Random(seed)
        return other

    def accept(self, ranges):
        """The content as it is now, where these were written well."""
        self.may_change(ranges)
        to_raw(self.path, self.now)

    def file(self, name):
        """Path of a file in the disk's folder."""
        return os.path.join(self.folder, name)

    def somewhere(self, length):
        """An offset for that many KiB, in KiB, often aligned to 64."""
        at = self.random.randrange(0, self.size // KIB - length + 1, 4)
        return at if self.random.random() < 0.3 else at // 64 * 64

    def qemu_io(self, *commands):
        """The patched qemu-io runs them, and ends well."""
        argv = [program("qemu-io"), "-f", "qcow2"]
        for command in commands:
            argv += ["-c", command]
        done = sh(*argv, self.path)
        text = (done.stdout + done.stderr).decode()
        if "rror" in text or "failed" in text:
            raise Failure(f"qemu-io: {text}")

    def may_change(self, ranges):
        """What was done since the parent may have changed these."""
        self.touched |= units_of(ranges, self.granularity)

    # -- what a kill has left

    def faults(self, path, option="--copy"):
        """Everything that is wrong with the image and its chain, which lbdump
        adds to with this option."""
        faults = []
        self.check_image(path, faults)
        now = to_raw(path, self.file("new.raw"))
        self.check_bits(path, now, faults)
        archive = self.file("next.lbz")
        dump = run(["lbdump", "-q", "--json", "--incremental", "--force",
                    "-o", archive, option, path])
        if dump.status != 0:
            return faults + [f"lbdump: {dump}"]
        self.check_size(dump.json(), faults)
        chain = [*self.chain, archive]
        verify = run(["lbverify", "-q", f"--image={path}", *chain])
        if verify.status != 0:
            faults.append(f"lbverify: {verify}")
        self.check_restore(chain, now, faults)
        return faults

    def check_image(self, path, faults):
        """Trusted by the tools and by the oracle, and sound but for leaks."""
        status = status_of(path)
        theirs = lbext.Trust(qcow2.Header(path), BOOT_ID,
                             os.stat(path).st_dev).evaluate()
        for verdict in (status, *status["checkpoints"]):
            if not verdict["trusted"]:
                faults.append(f"lbctl: {verdict['keyword']}")
        for verdict in (theirs, *theirs["checkpoints"]):
            if verdict["keyword"] != "trusted":
                faults.append(f"oracle: {verdict['keyword']}")
        check = sh("qemu-img", "check", "-f", "qcow2", path,
                   status=(0, 1, 2, 3))
        self.leaks = check.returncode == 3
        if check.returncode not in (0, 3):
            said = (check.stdout + check.stderr).decode().splitlines()
            faults.append("\n".join(["qemu-img check:", *said[:12]]))

    def check_bits(self, path, now, faults):
        """What changed has its bit; nothing else has one that was not
        touched."""
        header = qcow2.Header(path)
        newest = lbext.read_livebackup(header).records[-1]["uuid"]
        dirty = units_of(lbext.changed_since(header, newest),
                         self.granularity)
        changed = differing(self.parent, now, self.granularity)
        last = (self.size - 1) // self.granularity
        lost = changed - dirty
        extra = dirty - self.touched - {0, last}
        strange = changed - self.touched
        if lost:
            faults.append(f"bits are lost: {some(lost)}")
        if extra:
            faults.append(f"bits of what nobody wrote: {some(extra)}")
        if strange:
            faults.append(f"changed, and nobody wrote there: {some(strange)}")
        self.figures = (f"{len(changed)} of {last + 1} granules changed, "
                        f"{len(dirty)} bits")
        self.dirty = dirty

    def check_size(self, summary, faults):
        """The incremental is not a full one in disguise."""
        largest = len(units_of(((unit * self.granularity, self.granularity)
                                for unit in self.dirty), 64 * KIB)) * 64 * KIB
        got = summary["data_bytes"] + summary["zero_bytes"]
        if summary["kind"] != "incremental" or got > largest:
            faults.append(f"the archive: {summary['kind']}, {got} bytes, "
                          f"where {largest} may have changed")

    def check_restore(self, chain, now, faults):
        """The chain is the disk, byte for byte."""
        restored = self.file("restored.raw")
        remove(restored)
        result = run(["lbrestore", "-q", "-o", restored, *chain])
        if result.status != 0:
            faults.append(f"lbrestore: {result}")
            return
        wrong = differing(now, restored, 4096)
        if wrong:
            faults.append("restored, it is another disk; blocks of 4 KiB: "
                          f"{some(wrong)}")
        remove(restored)

    def judge(self, what, commit, check=None):
        """After a kill; commit: the next chain link is made, too.

        check(now, old) looks at the content.
        """
        self.kills += 1
        self.session = in_session(self.path)
        faults = []
        try:
            if qcow2.Header(self.path).incompatible_features & DIRTY:
                self.repair(faults)
            faults = faults or self.faults(
                self.path, "--chain=main" if commit else "--copy")
            if not faults and check:
                with Content(self.file("new.raw")) as now, \
                        Content(self.now) as old:
                    check(now, old)
            if not faults and self.leaks:
                self.mend()
        except Failure as failure:
            faults = [str(failure)]
        if faults:
            raise Failure("\n".join([f"kill {self.kills}: {what}", *faults,
                                     self.keep()]))
        os.replace(self.file("new.raw"), self.now)
        if commit:
            self.add_to_chain()

    def repair(self, faults):
        """Lazy refcounts, of an image that was not closed."""
        status = status_of(self.path)
        if not status["trusted"]:
            faults.append(f"lbctl, before a repair: {status['keyword']}")
        sh(program("qemu-img"), "check", "-q", "-r", "all", "-f", "qcow2",
           self.path)

    def mend(self):
        """Leaks go; the bits stay, as the next judgement will show."""
        if self.random.random() < 0.5:
            run(["lbctl", "recover", self.path]).expect(0)
        else:
            sh(program("qemu-img"), "check", "-q", "-r", "leaks", "-f",
               "qcow2", self.path)
        sh("qemu-img", "check", "-f", "qcow2", self.path)

    def add_to_chain(self):
        """The archive that was just made; now and then they are folded."""
        self.archives += 1
        name = self.file(f"incr{self.archives}.lbz")
        os.replace(self.file("next.lbz"), name)
        self.chain.append(name)
        copy(self.now, self.parent)
        self.touched = set()
        if len(self.chain) > 4:
            run(["lbmerge", "-q", "--force", "-o", self.chain[0],
                 *self.chain]).expect(0)
            remove(*self.chain[1:])
            del self.chain[1:]

    def lose_a_bit(self, path):
        """Clear the bit of a granule that was changed; of a small one, those
        of its whole block, as archives hold blocks of 64 KiB."""
        changed = differing(self.parent, self.file("new.raw"),
                            self.granularity)
        per_block = max(1, 64 * KIB // self.granularity)
        last = (self.size - 1) // self.granularity
        blocks = {granule // per_block for granule in changed}
        block = self.random.choice(sorted(blocks - {0, last // per_block}))
        newest = lbext.read_livebackup(qcow2.Header(path)).records[-1]["uuid"]
        lbext.Poker(path).poke(f"bits[{newest}]", ",".join(
            f"-{block * per_block + i}" for i in range(per_block)))
        return block * per_block

    def expect_lost_bit_is_found(self):
        """The judge has the means to condemn: with one bit less he does."""
        damaged = self.file("damaged.qcow2")
        copy(self.path, damaged)
        if self.faults(damaged):
            raise Failure("a copy is already judged to be wrong")
        granule = self.lose_a_bit(damaged)
        faults = self.faults(damaged)
        found = [fault.split(":")[0] for fault in faults]
        wanted = ["bits are lost", "lbverify",
                  "restored, it is another disk; blocks of 4 KiB"]
        if found != wanted:
            raise Failure(f"the bit of granule {granule} was cleared, and "
                          f"this is all that was found: {faults}")
        remove(damaged)

    def keep(self):
        """Copy everything to where it outlives the test."""
        target = tempfile.mkdtemp(
            prefix="killed-", dir=os.environ.get("TMPDIR"))
        sh("cp", "-r", "--sparse=always", self.folder + "/.", target)
        return f"kept in {target}"
