# Runs the unittest file(s) named on the command line and reports them as TAP.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

import importlib.util
import os
import sys
import unittest


class TapResult(unittest.TestResult):
    """One line for each test method; a failed subTest fails its method."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.reported = False

    def line(self, word, test, directive="", detail=""):
        self.count += 1
        self.reported = True
        print(f"{word} {self.count} - {test.id()}{directive}")
        self.diagnose(detail)

    def diagnose(self, detail):
        for row in detail.splitlines():
            print("# " + row)
        sys.stdout.flush()

    def startTest(self, test):
        super().startTest(test)
        self.reported = False

    def stopTest(self, test):
        super().stopTest(test)
        if not self.reported:
            # unittest is silent: a subTest failed; or the test is marked as
            # expected to fail, which none may be
            self.line("not ok", test)

    def addSuccess(self, test):
        self.line("ok", test)

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.line("not ok", test, detail=self.failures[-1][1])

    def addError(self, test, err):
        super().addError(test, err)
        self.line("not ok", test, detail=self.errors[-1][1])

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            detail = self._exc_info_to_string(err, test)
            self.diagnose(f"{subtest}\n{detail}")

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.line("ok", test, directive=f" # SKIP {reason}")


def load(path):
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    name = os.path.splitext(os.path.basename(path))[0].replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return unittest.defaultTestLoader.loadTestsFromModule(module)


def main(paths):
    suite = unittest.TestSuite(load(path) for path in paths)
    print(f"1..{suite.countTestCases()}")
    result = TapResult()
    suite.run(result)
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
