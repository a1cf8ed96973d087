#!/usr/bin/python3
"""Backs up the instances of an OpenStack compute host, each hour or so.

Nova leaves in each libvirt domain what instance it is (<nova:instance>, and the
domain's UUID is the instance's). This runs lbvm for each of them, some at a time,
and prints what became of it as one JSON object a line, for a controller to take up.
A machine of the repository is called by the instance's UUID: so its backups stay
together where it is renamed, or moved to another host with the same repository.

docs/cloud-controller.md tells more. An example: take it, and change it.

Copyright (C) 2026 The qcow2 livebackup authors
SPDX-License-Identifier: GPL-2.0-or-later
"""

import argparse
import concurrent.futures
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

NOVA = "{http://openstack.org/xmlns/libvirt/nova/1.1}"
BUSY = 5  # lbvm's status where somebody else is at work; try again


def run(*command):
    """Status, standard output and standard error."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          check=False)
    return done.returncode, done.stdout, done.stderr


class Instance:
    """A domain that Nova has made."""

    def __init__(self, domain, options):
        self.domain = domain
        self.options = options
        virsh = ["virsh", "-q"]
        if options.connect:
            virsh += ["-c", options.connect]
        status, xml, error = run(*virsh, "dumpxml", domain)
        if status:
            raise RuntimeError(error.strip())
        tree = ElementTree.fromstring(xml)
        self.uuid = tree.findtext("uuid")
        self.nova = tree.find(f"metadata/{NOVA}instance")
        self.name = None
        if self.nova is not None:
            self.name = self.nova.findtext(NOVA + "name")

    def lbvm(self, command, *arguments):
        """Runs one, and returns its status, result, and messages."""
        status, output, error = run(
            "lbvm", command, "--json", "--repository",
            self.options.repository, *arguments)
        return status, json.loads(output) if output else None, error

    def back_up(self):
        """What the controller is told."""
        where = ["--connect", self.options.connect] \
            if self.options.connect else []
        status, manifest, error = self.lbvm(
            "backup", "--quiet", "--quiesce=try", *where,
            "--domain", self.domain, self.uuid)
        result = {"instance": self.uuid, "name": self.name, "status": status}
        if status:
            result["error"] = error.strip()
            return result
        result["backup"] = manifest["id"]
        result["bytes"] = sum(disk["bytes"] for disk in manifest["disks"])
        result["full"] = {disk["name"]: disk["reason"]
                          for disk in manifest["disks"]
                          if disk["parent"] is None}
        status, _, error = self.lbvm("prune", *self.options.keep, self.uuid)
        if status:
            result["prune_status"] = status
            result["prune_error"] = error.strip()
        return result


def instances(options):
    """Those that run on this host."""
    virsh = ["virsh", "-q"] + (["-c", options.connect]
                               if options.connect else [])
    status, names, error = run(*virsh, "list", "--name")
    if status:
        sys.exit(f"virsh list: {error.strip()}")
    for name in names.split():
        instance = Instance(name, options)
        if instance.nova is not None:
            yield instance


def main():
    """The exit status is the greatest of lbvm's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repository", required=True)
    parser.add_argument("--connect", help="libvirt's connection")
    parser.add_argument("--jobs", type=int, default=2,
                        help="instances at a time (default: 2)")
    parser.add_argument("--keep", action="append", metavar="RULE=N",
                        help="as hourly=24 (default: hourly=24 daily=7 "
                        "weekly=4)")
    options = parser.parse_args()
    options.keep = ["--keep-" + rule for rule in
                    options.keep or ["hourly=24", "daily=7", "weekly=4"]]
    worst = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        todo = list(instances(options))
        for attempt in range(2):
            again = []
            for instance, result in zip(todo, pool.map(Instance.back_up,
                                                       todo)):
                if result["status"] == BUSY and attempt == 0:
                    again.append(instance)
                    continue
                worst = max(worst, result["status"])
                print(json.dumps(result), flush=True)
            todo = again
    return worst


if __name__ == "__main__":
    sys.exit(main())
