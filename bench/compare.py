#!/usr/bin/env python3
# Copyright (c) the kestrel.py authors. MIT License, see LICENSE.
"""How fast kestrel.py is beside redis and beanstalkd, as far as these are on this machine.

    cc -O2 -o /tmp/qload bench/qload.c -lpthread          # the load generator
    python3 bench/compare.py --qload /tmp/qload
    python3 bench/compare.py --qload /tmp/qload --only put-get flood --rounds 9
    python3 bench/compare.py --qload /tmp/qload --python python3.8 --python pypy3
    python3 bench/compare.py --qload /tmp/qload --floor bench/floor.py     # a bare loop
    python3 bench/compare.py                              # with bench/load.py, slow to drive

All servers run at the same time and are driven in turns, so that a noisy machine is as
noisy for each. What is printed are medians: operations a second, the ratio of kestrel.py to
the others, and the processor time of the server for an operation, user + system.
"""

import argparse
import collections
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
DAEMON = os.path.join(HERE, os.pardir, "kestrel.py")
LOAD = os.path.join(HERE, "load.py")

# What the load generators call the servers' protocols.
KINDS = {"kestrel": "mc", "redis": "redis", "beanstalkd": "bs", "floor": "mc"}

# What was measured: operations a second, and the microseconds of processor time that the server
# took for each, in user mode and in the system.
Figure = collections.namedtuple("Figure", "rate user system")


class Peer:
    """A server, started with a port and a directory of its own."""

    def __init__(self, name, python, durable, work, floor):
        self.name = name
        self.python = python
        self.kind = KINDS[name.split()[0]]
        directory = tempfile.mkdtemp(dir=work)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        port = str(self.port)
        if name == "floor":
            command = [sys.executable, os.path.abspath(floor), port, os.path.join(directory, "spool")]
        elif self.kind == "mc":
            config = os.path.join(directory, "kestrel.conf")
            with open(config, "w") as file:
                file.write("[server]\nadmin_port = off\nmemcache_port = %s\nqueue_path = %s\n"
                           % (port, os.path.join(directory, "spool")))
                if durable:
                    file.write("[queue default]\nsync_journal = 0\n")
            command = [python, DAEMON, "-c", config]
        elif self.kind == "redis":
            command = ["redis-server", "--bind", "127.0.0.1", "--port", port, "--save", "",
                       "--appendonly", "yes",
                       "--appendfsync", "always" if durable else "everysec"]
        else:
            command = ["beanstalkd", "-l", "127.0.0.1", "-p", port, "-b", directory,
                       "-f", "0" if durable else "50"]
        self.process = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise OSError("%s does not start" % self.name) from None
                time.sleep(0.05)

    def measure(self, count, run):
        """Return the Figure of run(), which does `count` operations and returns their rate."""
        before = self._used()
        rate = run()
        return Figure(rate, *[(now - then) / count for then, now in zip(before, self._used())])

    def _used(self):
        with open("/proc/%d/stat" % self.process.pid) as file:
            fields = file.read().rpartition(")")[2].split()
        return [int(ticks) * 1e6 / os.sysconf("SC_CLK_TCK") for ticks in fields[11:13]]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


class Qload:
    """The load generator in C."""

    def __init__(self, path, scale):
        self.path = path
        self.scale = scale

    def __call__(self, peer, mode, clients, count, *more):
        if peer.name == "floor":         # it knows no open reads and no waits
            mode = mode.replace("rflood", "flood")
            more = [word for word in more if word not in ("-T", "0")]
        count = max(1, int(count * self.scale))
        return peer.measure(count, lambda: self._figure(
            self._start(peer, mode, clients, count, *more), r"ops/s=(\d+)"))

    def misses(self, peer, clients):
        """Gets of an empty queue: they go on until an item comes."""
        process = self._start(peer, "get", clients, 1, "-T", "0")
        time.sleep(2 * self.scale)
        self._figure(self._start(peer, "put", 1, 1), "ops/s=(\\d+)")
        line = process.stdout.read()
        process.stdout = None
        self._figure(process, "", line)
        rate = int(re.search(r"miss=(\d+)", line)[1]) / float(re.search(r"sec=([\d.]+)", line)[1])
        return Figure(rate, None, None)

    def _start(self, peer, mode, clients, count, *more):
        return subprocess.Popen(
            [self.path, "-p", str(peer.port), "-k", peer.kind, "-m", mode, "-c", str(clients),
             "-n", str(count), *more], stdout=subprocess.PIPE, text=True)

    def _figure(self, process, pattern, out=None):
        if out is None:
            out = process.communicate()[0]
        if process.wait():
            raise OSError("qload: %s" % out)
        return float(re.search(pattern, out)[1]) if pattern else None


class Load:
    """bench/load.py in the place of qload: it takes most of the time itself."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, peer, mode, clients, count, *more):
        tests = {"put": ["put-many"], "flood": ["flood"], "rflood": ["flood", "-r"]}
        if mode not in tests or more:
            return None
        count = int(count * self.scale / 10)
        return peer.measure(count, lambda: float(re.search(r"(\d+) items/s", subprocess.run(
            [sys.executable, LOAD, *tests[mode], "-p", str(peer.port), "-k", peer.kind,
             "-c", str(clients), "-n", str(count)],
            stdout=subprocess.PIPE, text=True, check=True).stdout)[1]))

    def misses(self, peer, clients):
        return None


def put_get(load, peer, *arguments):
    yield "put", load(peer, "put", *arguments)
    yield "get", load(peer, "get", *arguments)


def flood(load, peer, *arguments):
    yield "flood", load(peer, "flood", *arguments)


def reliable(load, peer, *arguments):
    yield "flood, plain", load(peer, "flood", *arguments)
    yield "flood, reliable", load(peer, "rflood", *arguments)


def churn(load, peer, *arguments):
    yield "connect, put, close", load(peer, "churn", *arguments)
    load(peer, "get", 10, arguments[1])  # what it has put, in no table


def polls(load, peer, clients, count):
    load(peer, "put", clients, count)
    yield "get, hits", load(peer, "get", clients, count, "-T", "0")
    yield "get, misses", load.misses(peer, clients)


# name: (what it does, its arguments for the load generator, whether the servers fsync, which
# of them it makes sense for, what it is called)
WORKS = {
    "put-get": (put_get, (100, 100000), False, KINDS, "100 connections"),
    "flood": (flood, (100, 100000), False, KINDS, "50 producers, 50 consumers"),
    "reliable": (reliable, (100, 100000), False, ["kestrel", "floor"], "50 producers, 50 consumers"),
    "drain": (put_get, (16, 100000), False, KINDS, "16 connections"),
    "one": (put_get, (1, 30000), False, KINDS, "one connection"),
    "pair": (flood, (2, 30000), False, KINDS, "one producer, one consumer"),
    "pipelined": (put_get, (4, 200000, "-P", "50"), False, KINDS, "4 connections, 50 deep"),
    "churn": (churn, (16, 20000), False, KINDS, "16 at a time"),
    "churn-500": (churn, (500, 20000), False, KINDS, "500 at a time"),
    "durable": (put_get, (100, 20000), True, KINDS, "100 connections, each put fsynced"),
    "polls": (polls, (100, 100000), False, ["kestrel"], "100 connections"),
}


def measure(options, work, directory):
    """{what is measured: {server: [figure of each round]}}"""
    call, arguments, durable, kinds, _ = WORKS[work]
    pythons = options.python or [sys.executable]
    names = [("kestrel" if len(pythons) == 1 else "kestrel " + os.path.basename(python), python)
             for python in pythons]
    names += [(name, None) for name, program in (
        ("redis", "redis-server"), ("beanstalkd", "beanstalkd"))
        if name in kinds and name not in options.without and shutil.which(program)]
    if options.floor and not durable and "floor" in kinds:
        names.append(("floor", sys.executable))
    load = Qload(options.qload, options.scale) if options.qload else Load(options.scale)
    peers = []
    figures = {}
    try:
        for name, python in names:
            peers.append(Peer(name, python, durable, directory, options.floor))
        for _ in range(options.rounds):
            for peer in peers:
                for what, figure in call(load, peer, *arguments):
                    if figure is not None:
                        figures.setdefault(what, {}).setdefault(peer.name, []).append(figure)
    finally:
        for peer in peers:
            peer.stop()
    return figures


def report(work, figures):
    for what, servers in figures.items():
        cells = []
        first = None
        for name, measured in servers.items():
            rate = statistics.median(figure.rate for figure in measured)
            cell = "%s %s" % (name, format(round(rate), ","))
            if first:
                cell += " (%.2f)" % (first / rate)
            first = first or rate
            if measured[0].user is not None:
                cell += ", %.1f + %.1f" % tuple(
                    statistics.median(time) for time in list(zip(*measured))[1:])
            cells.append(cell)
        print("| %s, %s | %s |" % (what, WORKS[work][4], " | ".join(cells)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--qload", help="the path of qload, a load generator in C")
    parser.add_argument("--python", action="append",
                        help="the Python to run kestrel.py with; may be given several times")
    parser.add_argument("--floor", metavar="PATH", help="with --qload: a server that does the "
                        "least, such as bench/floor.py, to be started as PATH PORT SPOOL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1, help="how much work a round is")
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--without", nargs="+", default=[], choices=["redis", "beanstalkd"])
    options = parser.parse_args()
    print("Operations a second (kestrel divided by it), microseconds of the processor for each, "
          "user + system; medians of %d rounds." % options.rounds)
    with tempfile.TemporaryDirectory() as directory:
        for work in options.only:
            report(work, measure(options, work, directory))


if __name__ == "__main__":
    sys.exit(main())
