# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""What the fault tests share: running a tool under a fault, and judging it.

A script registers its claims with @claim and ends with main(); a bats test
calls `SCRIPT CLAIM`.  All work is done in the current folder.  A claim runs
its many cases in parallel and reports every case that failed, by name.
"""

import concurrent.futures
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.environ.get("abs_top_srcdir", os.path.dirname(os.path.dirname(HERE)))
BUILD = os.environ.get("abs_top_builddir", os.path.join(TOP, "build"))
TOOLS = os.path.join(BUILD, "tools")
SHIM = os.path.join(BUILD, "tests", "fault", "shim.so")
NIGHTLY = os.environ.get("QLB_NIGHTLY") == "1"

sys.path.insert(0, os.path.join(TOP, "tests", "oracle"))

# A tool that takes longer hangs.
PATIENCE = 120
# What a tool may map, threads' stacks and arenas included.
ADDRESS_SPACE = 400 << 20


def is_sanitized():
    """Whether the tools were built with the sanitizers."""
    with open(os.path.join(TOOLS, "lbverify"), "rb") as file:
        return b"__asan_init" in file.read()


SANITIZED = is_sanitized()


class Failure(Exception):
    """What a case found."""


class Result:
    """How a program ended."""

    def __init__(self, argv, status, out, err):
        self.argv = argv
        self.status = status
        self.out = out
        self.err = err

    def __str__(self):
        err = self.err if len(self.err) < 1500 else self.err[:1500] + "..."
        return (f"  {' '.join(self.argv)}\n  status {self.status}, "
                f"standard error: {err.rstrip() or '(empty)'}")

    def expect(self, *statuses):
        """The status is one of these."""
        if self.status not in statuses:
            raise Failure(f"expected status {statuses}\n{self}")
        return self

    def mentions(self, pattern):
        """Standard error matches the pattern."""
        if re.search(pattern, self.err, re.MULTILINE) is None:
            raise Failure(f"expected in standard error: {pattern}\n{self}")
        return self

    def json(self):
        """Standard output."""
        return json.loads(self.out)


def tool(name):
    """Path of a built tool."""
    return os.path.join(TOOLS, name)


def shim_environment(**fault):
    """Environment with the shim: at=, op=, kind=, path=, count_file=."""
    environment = {"LD_PRELOAD": SHIM}
    for key, value in fault.items():
        environment["QLB_FAULT_" + key.upper()] = str(value)
    return environment


def environment_of(extra):
    """The environment of a tool."""
    environment = dict(os.environ, **(extra or {}))
    options = "verify_asan_link_order=0:abort_on_error=1"
    if extra and "LD_PRELOAD" in extra:
        if not os.path.exists(SHIM):
            raise Failure(f"no {SHIM}: make check builds it")
        # the checker stops threads, which a killed or killing one is not
        options += ":detect_leaks=0"
    environment["ASAN_OPTIONS"] = options
    return environment


def run(argv, stdin=None, stdout=subprocess.PIPE, env=None, bounded=False,
        died_of=None, may_die_of=None):
    """Run a tool or program to its end.

    stdin: path or None; died_of: the signal that must have ended it;
    may_die_of: one that may have.  Death by another, a complaint of a
    sanitizer and a hang are failures whatever the caller expects.  bounded:
    limit its memory.
    """
    argv = [tool(argv[0]) if argv[0].startswith("lb") else argv[0], *argv[1:]]
    full = argv
    if bounded and not SANITIZED:
        full = ["prlimit", f"--as={ADDRESS_SPACE}", "--core=0", "--", *argv]
    with open(stdin or os.devnull, "rb") as source:
        try:
            done = subprocess.run(full, stdin=source, stdout=stdout,
                                  stderr=subprocess.PIPE, timeout=PATIENCE,
                                  env=environment_of(env), check=False)
        except subprocess.TimeoutExpired as error:
            raise Failure(f"hangs: {' '.join(argv)}") from error
    out = done.stdout if isinstance(done.stdout, bytes) else b""
    return judge(Result(argv, done.returncode, out,
                        done.stderr.decode("utf-8", "backslashreplace")),
                 died_of, may_die_of)


def judge(result, died_of=None, may_die_of=None):
    """Refuse what no caller may expect."""
    if "Sanitizer" in result.err or "runtime error:" in result.err:
        raise Failure(f"a sanitizer complains\n{result}")
    wanted = None if died_of is None else -died_of
    if may_die_of is not None and result.status == -may_die_of:
        return result
    if result.status < 0 or wanted is not None:
        if result.status != wanted:
            raise Failure(f"expected death by {died_of}\n{result}")
    return result


def sh(*argv, status=(0,), env=None):
    """Run a program that is not under test."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=PATIENCE, env=env)
    if done.returncode not in status:
        raise Failure(f"{' '.join(argv)}: status {done.returncode}\n"
                      f"{done.stdout.decode()}{done.stderr.decode()}")
    return done


# --------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------

def read(path):
    """All bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


def write(path, data):
    """Make a file."""
    with open(path, "wb") as file:
        file.write(data)


def remove(*paths):
    """Remove files that may be missing."""
    for path in paths:
        if os.path.exists(path):
            os.unlink(path)


def copy(source, target):
    """Copy a file, holes and time of change included."""
    remove(target)
    sh("cp", "--sparse=always", "--preserve=timestamps", source, target)


def expect_absent(path):
    """Neither the file nor a temporary one of it."""
    folder, base = os.path.split(os.path.abspath(path))
    for name in os.listdir(folder):
        if name == base or name.startswith(f".{base}."):
            raise Failure(f"{name} exists")


def remove_temporaries(path):
    """What a killed tool left of this output."""
    folder, base = os.path.split(os.path.abspath(path))
    for name in os.listdir(folder):
        if name.startswith(f".{base}."):
            os.unlink(os.path.join(folder, name))


# --------------------------------------------------------------------------
# Disks
# --------------------------------------------------------------------------

def make_disk(path, size="64M", *options):
    """An empty qcow2 image."""
    remove(path)
    sh("qemu-img", "create", "-q", "-f", "qcow2", *options, path, size)


def guest(path, *commands):
    """A stock QEMU runs commands of qemu-io on the guest's disk."""
    argv = ["qemu-io", "-f", "qcow2"]
    for command in commands:
        argv += ["-c", command]
    done = sh(*argv, path)
    text = (done.stdout + done.stderr).decode()
    if "rror" in text or "failed" in text:
        raise Failure(f"qemu-io: {text}")


def expect_same(left, left_format, right, right_format):
    """The guest reads the same from both."""
    done = sh("qemu-img", "compare", "-f", left_format, "-F", right_format,
              left, right)
    # Another size with zeroes behind it is the same to qemu-img.
    if b"ismatch" in done.stdout + done.stderr:
        raise Failure(done.stdout.decode() + done.stderr.decode())


def expect_sound(path):
    """A stock qemu-img finds neither error nor leak."""
    sh("qemu-img", "check", "-f", "qcow2", path)


def expect_no_worse_than_leaks(path):
    """A stock qemu-img finds no error."""
    sh("qemu-img", "check", "-f", "qcow2", path, status=(0, 3))


def status_of(path):
    """`lbctl status --json`."""
    return run(["lbctl", "status", "--json", path]).expect(0).json()


def state_of(path):
    """The checkpoints of an image, and what is listed of its bitmaps."""
    info = sh("qemu-img", "info", "-f", "qcow2", "--output=json", path)
    specific = json.loads(info.stdout)["format-specific"]["data"]
    status = status_of(path)
    del status["disk"]
    return json.dumps([status, specific.get("bitmaps")], sort_keys=True)


# --------------------------------------------------------------------------
# Claims
# --------------------------------------------------------------------------

CLAIMS = {}


def claim(function):
    """Register a claim under its name."""
    CLAIMS[function.__name__.replace("_", "-")] = function
    return function


def thin(cases, keep=4):
    """With the sanitizers, whose programs are slow: one of `keep` cases."""
    cases = list(cases)
    return cases[::keep] if SANITIZED else cases


class Workplace(threading.local):
    """A folder of its own for each thread."""

    folder = None

    def __call__(self):
        if self.folder is None:
            self.folder = os.path.abspath(f"work-{threading.get_ident()}")
            os.makedirs(self.folder, exist_ok=True)
        return self.folder


workplace = Workplace()


def each(cases, check):
    """check(case) in parallel for every case, a (name, ...) or a name."""
    cases = list(cases)
    if not cases:
        raise Failure("there is nothing to check")
    failures = []

    def attempt(case):
        name = case[0] if isinstance(case, tuple) else case
        try:
            check(case)
        except Failure as failure:
            failures.append(f"{name}: {failure}")
        except Exception as error:  # a test that breaks has not passed
            failures.append(f"{name}: {type(error).__name__}: {error}")

    workers = len(os.sched_getaffinity(0))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(attempt, cases))
    print(f"{len(cases)} cases, {len(failures)} failed")
    if failures:
        raise Failure("\n".join(failures[:15]))


def main():
    """Run the claim that the command line names."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if len(sys.argv) != 2 or sys.argv[1] not in CLAIMS:
        print(f"claims: {' '.join(CLAIMS)}", file=sys.stderr)
        return 2
    try:
        CLAIMS[sys.argv[1]]()
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    finally:
        for name in os.listdir("."):
            if name.startswith("work-"):
                shutil.rmtree(name)
    return 0
