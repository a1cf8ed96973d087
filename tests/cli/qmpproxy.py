# A monitor in front of a monitor, for one client: what it forwards goes wrong
# at the N-th command.
#
#   qmpproxy.py SOCKET MONITOR N HOW [PID-FILE]
#
# N counts the client's commands from 1, or is the name of one; HOW: "refuse" answers
# it with an error itself; "unanswered" forwards it, and closes the connection; "kill"
# and "term" send that signal to the process in PID-FILE when QEMU has done it, before
# the answer; "late" holds the answer back until there is a file `go-on`; "old" has
# each answer about the version say 8.2. Prints how many commands there were when the
# client has gone.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

import json
import os
import signal
import socket
import sys
import time


def open_monitor(path):
    monitor = socket.socket(socket.AF_UNIX)
    monitor.connect(path)
    return monitor.makefile("rw", encoding="utf-8")


def answer_of(monitor):
    while True:
        line = monitor.readline()
        if line == "" or "event" not in json.loads(line):
            return line


def put(client, text):
    try:
        client.write(text)
        client.flush()
    except OSError:
        pass


def serve(client, monitor, n, how, pid_file):
    put(client, answer_of(monitor))
    count = 0
    while True:
        try:
            line = client.readline()
        except OSError:
            line = ""
        if line == "":
            return count
        count += 1
        command = json.loads(line)["execute"]
        meant = n in (str(count), command)
        if meant and how == "refuse":
            put(client, json.dumps({
                "id": json.loads(line).get("id"),
                "error": {"class": "GenericError", "desc": "refused"},
            }) + "\n")
            continue
        monitor.write(line)
        monitor.flush()
        answer = answer_of(monitor)
        if how == "old" and command == "query-version":
            answer = json.dumps(dict(json.loads(answer), **{"return": {
                "qemu": {"major": 8, "minor": 2, "micro": 0},
                "package": ""}})) + "\n"
        elif meant:
            if how == "unanswered":
                return count
            if how == "late":
                while not os.path.exists("go-on"):
                    time.sleep(0.02)
                put(client, answer)
                continue
            with open(pid_file, encoding="ascii") as f:
                pid = int(f.read())
            os.kill(pid, signal.SIGKILL if how == "kill" else signal.SIGTERM)
        put(client, answer)


def main():
    path, target, n, how = sys.argv[1:5]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    connection, _ = listener.accept()
    listener.close()
    os.unlink(path)
    with connection:
        client = connection.makefile("rw", encoding="utf-8")
        print(serve(client, open_monitor(target), n, how,
                    sys.argv[5] if len(sys.argv) > 5 else None))
    sys.stdout.flush()


main()
