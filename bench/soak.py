#!/usr/bin/env python3
# Copyright (c) the kestrel.py authors. MIT License, see LICENSE.
"""A long run in which much goes wrong, and a checker that knows what must come of it.

    python3 bench/soak.py --seconds 3600

Producers put numbered items; consumers open and close them and die with some in their hands;
waiters leave before an item comes; items expire and move on; one queue has fanout children;
the server is told to reload, stopped, and killed (SIGKILL) again and again. In the end all
queues are drained, and of each queue is told, in Jepsen's terms:

    attempted      puts that were begun
    acknowledged   of these, answered STORED
    received       items that came, each counted once
    recovered      of these, those whose put was not acknowledged: the answer was lost
    lost           acknowledged and never received: there must be none
    unexpected     received and never put: there must be none
    duplicated     came again after their close had been acknowledged: there must be none
    again          came again because a reader died, or the server: as it is meant
    out of order   of a queue with one producer and one consumer: there must be none

The exit status is 1 if what must not be is there.
"""

import argparse
import collections
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))
import kestrel

CONFIG = """
[server]
memcache_port = %d
queue_path = %s
admin_port = off
expiration_timer_frequency = 1s
[queue]
default_journal_size = 256kb
max_memory_size = 512kb
max_journal_size = 2mb
min_journal_compact_delay = 1s
[queue brief]
max_age = 500ms
expire_to_queue = late
"""

ATTEMPTED, ACKNOWLEDGED, RECEIVED, CLOSED, DOUBT = 1, 2, 4, 8, 16


class Book:
    """What was put into one queue and what came out of one; a byte of flags an item."""

    def __init__(self, name):
        self.name = name
        self.flags = bytearray()
        self.lock = threading.Lock()
        self.counts = collections.Counter()
        self.last = -1                   # the last one that came, where the order counts

    def put(self, serial, flag):
        with self.lock:
            if serial >= len(self.flags):
                self.flags.extend(bytes(serial + 1 - len(self.flags)))
            self.flags[serial] |= flag

    def received(self, serial, in_order=False):
        with self.lock:
            if serial >= len(self.flags) or not self.flags[serial] & ATTEMPTED:
                self.counts["unexpected"] += 1
                return
            flags = self.flags[serial]
            if flags & CLOSED:
                self.counts["duplicated"] += 1
            elif flags & RECEIVED:
                self.counts["again"] += 1
            if in_order and serial < self.last:
                self.counts["out of order"] += 1
            self.last = max(self.last, serial)
            self.flags[serial] |= RECEIVED

    def verdict(self):
        """What is to be told, in order."""
        def number(having, lacking=0):
            return sum(1 for flags in self.flags if flags & having == having
                       and not flags & lacking)
        told = {"attempted": number(ATTEMPTED), "acknowledged": number(ACKNOWLEDGED),
                "received": number(RECEIVED), "recovered": number(RECEIVED, ACKNOWLEDGED),
                "lost": number(ACKNOWLEDGED, RECEIVED)}
        return {**told, **{key: self.counts[key] for key in (
            "unexpected", "duplicated", "again", "out of order")}}


class Daemon:
    """The server, started again on the same port and spool whenever it is gone."""

    def __init__(self, directory, python):
        self.python = python
        self.log = open(os.path.join(directory, "log"), "ab")
        self.config = os.path.join(directory, "kestrel.conf")
        with kestrel.serve() as server:      # a port that is free
            self.port = server.port
        with open(self.config, "w") as file:
            file.write(CONFIG % (self.port, os.path.join(directory, "spool")))
        self.process = None
        self.starts = collections.Counter()
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [self.python, kestrel.__file__, "-c", self.config], stderr=self.log)
        self.starts["start"] += 1

    def disturb(self, number):
        self.starts[signal.Signals(number).name] += 1
        self.process.send_signal(number)
        if number != signal.SIGHUP:
            self.process.wait(60)
            self.start()

    def size(self):
        """(resident megabytes, open files), where the system tells."""
        try:
            with open("/proc/%d/status" % self.process.pid) as file:
                resident = int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024
            return resident, len(os.listdir("/proc/%d/fd" % self.process.pid))
        except (OSError, TypeError):         # no /proc, or it has just ended
            return 0, 0


class Soak:
    def __init__(self, options, daemon):
        self.options = options
        self.daemon = daemon
        self.producing = True
        self.errors = []
        # source -> the books of the queues whose items are compared with what it was given
        self.books = {"work": [Book("work")], "order": [Book("order")], "brief": [Book("brief")],
                      "fan": [Book("fan"), Book("fan+a"), Book("fan+b")]}
        self.serials = collections.Counter()
        self.lock = threading.Lock()
        self.last = time.monotonic()         # when an item came last

    def connect(self):
        """A client, as soon as there is a server."""
        while True:
            try:
                return kestrel.Client(port=self.daemon.port)
            except OSError:
                time.sleep(0.02)

    def produce(self, queue, chances):
        client = self.connect()
        while self.producing:
            with self.lock:
                serial = self.serials[queue]
                self.serials[queue] += 1
            for book in self.books[queue]:
                book.put(serial, ATTEMPTED)
            data = b"%d " % serial + b"x" * int(10 ** chances.uniform(0, 3.6))
            try:
                if client.put(queue, data):
                    for book in self.books[queue]:
                        book.put(serial, ACKNOWLEDGED)
            except OSError:
                client.close()
                client = self.connect()
            time.sleep(chances.expovariate(self.options.rate))
        client.close()

    def consume(self, queue, book, chances, dies=0.0, in_order=False):
        client = self.connect()
        while self.producing or time.monotonic() < self.last + self.options.patience:
            try:
                data = client.get(queue, 0.3, "/open")
                if data is None:
                    continue
                self.last = time.monotonic()
                serial = int(data.split(b" ", 1)[0])
                book.received(serial, in_order)
                if chances.random() < dies:
                    client.close()
                    client = self.connect()
                    continue
                client.get(queue, 0, "/close")
                book.put(serial, CLOSED)
            except OSError:
                client.close()
                client = self.connect()
        client.close()

    def leave(self, chances):
        """Wait for items and go before they come; none may be given to the dead."""
        while self.producing:
            with contextlib.suppress(OSError):
                client = self.connect()
                client._sock.sendall(b"get %b/t=1000/open\r\n" % chances.choice(
                    [b"work", b"fan+a", b"nothing"]))
                time.sleep(chances.uniform(0, 0.05))
                client.close()

    def guarded(self, call, *arguments):
        try:
            call(*arguments)
        except Exception as error:           # told in the end, and then the run has failed
            self.errors.append("%s: %r" % (call.__name__, error))

    def run(self):
        options = self.options

        def chances():
            return random.Random(options.seed + len(calls))

        calls = []
        for queue in ("work", "work", "fan", "brief", "order"):
            calls.append((self.produce, queue, chances()))
        for _ in range(3):
            calls.append((self.consume, "work", self.books["work"][0], chances(), 0.05))
        for book in self.books["fan"]:
            calls.append((self.consume, book.name, book, chances(), 0.02))
        for queue in ("brief", "late"):
            calls.append((self.consume, queue, self.books["brief"][0], chances(), 0.02))
        calls.append((self.consume, "order", self.books["order"][0], chances(), 0.0, True))
        calls.append((self.leave, chances()))
        with self.connect() as client:       # children get what is put once they are there
            for name in ("fan+a", "fan+b"):
                client.get(name)
        threads = [threading.Thread(target=self.guarded, args=call) for call in calls]
        for thread in threads:
            thread.start()
        sizes = self.disturb_all(random.Random(options.seed))
        self.producing = False
        self.last = time.monotonic()
        for thread in threads:
            thread.join()
        return self.report(sizes)

    def disturb_all(self, chances):
        """Let it run for its time, with a disturbance every now and then."""
        sizes = []
        end = time.monotonic() + self.options.seconds
        while time.monotonic() < end:
            pause = min(chances.uniform(0, 2 * self.options.every), end - time.monotonic())
            time.sleep(max(0, pause))
            if self.daemon.process.poll() is not None:
                self.errors.append("the server has ended: %s" % self.daemon.process.returncode)
                self.daemon.start()
            sizes.append(self.daemon.size())
            if len(sizes) % 20 == 0:
                print("%5d s to go: %s; %.1f MB, %d files" % (
                    max(0, end - time.monotonic()), dict(self.serials), *sizes[-1]), flush=True)
            number, = chances.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], [6, 2, 2])
            if number == signal.SIGHUP:      # which it must be up to hear
                self.connect().close()
            self.daemon.disturb(number)
        return sizes

    def report(self, sizes):
        good = not self.errors
        for error in self.errors:
            print("ERROR: %s" % error)
        with self.connect() as client:
            stats = client.stats()
        for key, value in stats.items():
            if key.endswith(("_items", "_open_transactions")) and key.startswith("queue_") and (
                    not key.endswith(("total_items", "expired_items", "mem_items"))
                    and value != "0"):
                print("ERROR: in the end %s is %s" % (key, value))
                good = False
        for books in self.books.values():
            for book in books:
                told = book.verdict()
                print("%-6s %s" % (book.name, ", ".join("%d %s" % (value, key)
                                                       for key, value in told.items())))
                good = good and not any(told[key] for key in (
                    "lost", "unexpected", "duplicated", "out of order"))
        print("disturbed: %s" % dict(self.daemon.starts))
        half = len(sizes) // 2
        for name, part in (("first", sizes[:half]), ("second", sizes[half:])):
            if part:
                print("%s half: at most %.1f MB resident, %d open files" % (
                    name, max(size for size, _ in part), max(files for _, files in part)))
        self.daemon.log.flush()
        with open(self.daemon.log.name) as log:
            traces = log.read().count("Traceback")
        if traces:
            print("ERROR: %d tracebacks in the log" % traces)
        print("OK" if good and not traces else "FAILED")
        return good and not traces


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--every", type=float, default=3,
                        help="seconds between two disturbances, on average")
    parser.add_argument("--rate", type=float, default=100, help="items a second of a producer")
    parser.add_argument("--patience", type=float, default=5,
                        help="seconds without an item after which a queue is empty")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--python", default=sys.executable, help="to run the server with")
    options = parser.parse_args()
    print("seed %d" % options.seed)
    with tempfile.TemporaryDirectory() as directory:
        daemon = Daemon(directory, options.python)
        try:
            good = Soak(options, daemon).run()
            if not good:
                with open(daemon.log.name) as log:
                    print("".join(log.readlines()[-500:]))
        finally:
            daemon.process.kill()
            daemon.process.wait()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
