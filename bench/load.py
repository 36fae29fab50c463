#!/usr/bin/env python3
# Copyright (c) the kestrel.py authors. MIT License, see LICENSE.
"""Kestrel's load tests, over the memcache protocol, against any server that speaks it; put-many
and flood also against redis and beanstalkd, to compare.

    python3 bench/load.py put-many -c 100 -n 10000
    python3 bench/load.py flood -c 10 -n 20000
    python3 bench/load.py many-clients -c 100 -n 2000 -k 30
    python3 bench/load.py packing -n 20000
    python3 bench/load.py leaky-reader -n 5000

Each flushes its queue first, checks what it received and not only how fast, and ends with
exit status 1 when something was lost, invented or out of order. `load.py TEST --help` tells
the options, which are Kestrel's as far as they make sense here.
"""

import argparse
import collections
import os
import random
import socket
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))
import kestrel

# How long nothing has to come before a test gives up, in seconds.
PATIENCE = 15


class Client(kestrel.Client):
    def __init__(self, options):
        super().__init__(options.host, options.port, PATIENCE * 2)

    def put(self, queue, data):
        if not super().put(queue, data):
            raise ConnectionError("set was answered NOT_STORED")

    def count(self, queue):
        return int(self.stats().get("queue_%s_items" % queue, 0))


class Peer:
    """A blocking connection to a server of another kind, with the methods used here."""

    def __init__(self, options):
        self.sock = socket.create_connection((options.host, options.port), timeout=PATIENCE * 2)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.sock.makefile("rb")

    def ask(self, command):
        self.sock.sendall(command)
        return self.file.readline()

    def data(self, size):
        return self.file.read(size + 2)[:-2]

    def close(self):
        self.file.close()
        self.sock.close()


class RedisClient(Peer):
    """The same with a list of a redis server."""

    def _call(self, *words):
        words = [word if isinstance(word, bytes) else word.encode() for word in words]
        return self.ask(b"*%d\r\n" % len(words) + b"".join(
            [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]))

    def put(self, queue, data):
        answer = self._call("LPUSH", queue, data)
        if not answer.startswith(b":"):
            raise ConnectionError("LPUSH was answered %r" % answer)

    def get(self, queue, timeout=0):
        if timeout:
            answer = self._call("BRPOP", queue, "%.3f" % timeout)
            if answer.startswith(b"*2"):
                self.data(int(self.file.readline()[1:]))      # the name of the list
                answer = self.file.readline()
        else:
            answer = self._call("RPOP", queue)
        size = int(answer[1:])
        return self.data(size) if size >= 0 else None

    def flush(self, queue):
        self._call("DEL", queue)

    def count(self, queue):
        return int(self._call("LLEN", queue)[1:])


class BeanstalkClient(Peer):
    """The same with the default tube of a beanstalkd, which is taken as it is."""

    def put(self, queue, data):
        answer = self.ask(b"put 0 0 60 %d\r\n%b\r\n" % (len(data), data))
        if not answer.startswith(b"INSERTED"):
            raise ConnectionError("put was answered %r" % answer)

    def get(self, queue, timeout=0):
        words = self.ask(b"reserve-with-timeout %d\r\n" % (timeout > 0)).split()
        if words[0] != b"RESERVED":
            return None
        data = self.data(int(words[2]))
        self.ask(b"delete %b\r\n" % words[1])
        return data

    def flush(self, queue):
        pass

    def count(self, queue):
        size = int(self.ask(b"stats-tube default\r\n").split()[1])
        return int(self.data(size).split(b"current-jobs-ready: ")[1].split()[0])


CLIENTS = {"mc": Client, "redis": RedisClient, "bs": BeanstalkClient}


class Check:
    """What was put and what came, from all threads; says what is wrong in the end."""

    def __init__(self):
        self.put = collections.Counter()
        self.got = collections.Counter()
        self.count = 0                   # how many came
        self.errors = []
        self.lock = threading.Lock()
        self.last = time.monotonic()     # when something came last

    def received(self, data):
        with self.lock:
            self.got[data] += 1
            self.count += 1
            self.last = time.monotonic()

    def is_idle(self):
        return time.monotonic() - self.last > PATIENCE

    def verdict(self):
        """Print what has come and what is wrong with it; whether all is well."""
        lost = self.put - self.got
        extra = sum((self.got - self.put).values())
        unknown = sum(self.got[data] for data in self.got.keys() - self.put.keys())
        print("%d put, %d received, %d lost, %d twice, %d unknown" % (
            sum(self.put.values()), self.count, len(lost), extra - unknown, unknown))
        for error in self.errors[:10]:
            print("ERROR: %s" % error)
        good = not (lost or extra or self.errors)
        print("OK" if good else "FAILED")
        return good


def run_all(check, calls):
    """Run the calls in threads of their own until all are done; the seconds it took."""
    def guarded(call):
        try:
            call()
        except Exception as error:       # told in the verdict, and then the test has failed
            check.errors.append("%s: %s" % (type(error).__name__, error))

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - start


def item(options, name, serial):
    return (b"%b-%d-" % (name, serial)).ljust(options.bytes, b"x")


def tell(what, count, seconds):
    print("%s %d items in %d msec (%.1f usec/item, %d items/s)" % (
        what, count, seconds * 1000, seconds * 1e6 / max(count, 1), count / max(seconds, 1e-9)))


def tell_times(times):
    times.sort()
    if times:
        print("Transactions: min=%d; max=%d; median=%d; average=%d usec" % (
            times[0] * 1e6, times[-1] * 1e6, times[len(times) // 2] * 1e6,
            sum(times) / len(times) * 1e6))
        print("Transactions distribution: " + " ".join(
            "%g%%=%d" % (share, times[min(len(times) - 1, int(len(times) * share / 100))] * 1e6)
            for share in (5, 10, 25, 50, 75, 90, 95, 99, 99.9)))


def put_many(options, queue):
    """Put items with many clients at once, then see that all are there."""
    print("Put %d items of %d bytes to %s:%d in %s using %d clients" % (
        options.items, options.bytes, options.host, options.port, options.queue, options.clients))
    check, times = Check(), []

    def put(number):
        client = options.client(options)
        for serial in range(number, options.items, options.clients):
            data = item(options, b"put", serial)
            start = time.monotonic()
            client.put(queue, data)
            times.append(time.monotonic() - start)
            with check.lock:
                check.put[data] += 1
        client.close()

    seconds = run_all(check, [lambda number=number: put(number)
                              for number in range(options.clients)])
    tell("Put", len(times), seconds)
    tell_times(times)
    client = options.client(options)
    if client.count(queue) != options.items:
        check.errors.append("the queue holds %d items" % client.count(queue))
    for data in iter(lambda: client.get(queue), None):
        check.received(data)
    return check.verdict()


def flood(options, queue):
    """Each producer puts its items as fast as it can, as many consumers take them."""
    pairs = max(1, options.clients // 2)
    share = options.items // pairs
    print("Flood %d items of %d bytes through %s with %d producers and %d consumers%s" % (
        share * pairs, options.bytes, options.queue, pairs, pairs,
        ", reliably" if options.reliable else ""))
    check = Check()
    client = options.client(options)
    for serial in range(options.prefill):
        client.put(queue, item(options, b"prefill", serial))
        check.put[item(options, b"prefill", serial)] += 1
    total = share * pairs + options.prefill

    def produce(number):
        client = options.client(options)
        for serial in range(share):
            data = item(options, b"p%d" % number, serial)
            client.put(queue, data)
            with check.lock:
                check.put[data] += 1
        client.close()

    def consume():
        client = options.client(options)
        reliable = ["/close/open"] if options.reliable else []
        last = {}                        # of each producer; a consumer sees them in order
        while check.count < total and not check.is_idle():
            data = client.get(queue, 0.2, *reliable)
            if data is not None:
                name, serial = data.split(b"-")[:2]
                if int(serial) <= last.get(name, -1):
                    check.errors.append("%r came after %d" % (data[:30], last[name]))
                last[name] = int(serial)
                check.received(data)
        if options.reliable:
            client.get(queue, 0, "/close")
        client.close()

    seconds = run_all(check, [lambda number=number: produce(number) for number in range(pairs)]
                      + [consume] * pairs)
    tell("Received", check.count, seconds)
    return check.verdict()


def many_clients(options, queue):
    """Many clients wait for the few items of one producer, reliably; some of them die with an
    item in their hands."""
    print("%d clients wait for %d items, one every %d msec; %d %% die with one" % (
        options.clients, options.items, options.sleep, options.kill))
    check = Check()
    killed = []

    def produce():
        client = options.client(options)
        for serial in range(options.items):
            data = item(options, b"item", serial)
            with check.lock:
                check.put[data] += 1
            client.put(queue, data)
            time.sleep(options.sleep / 1000)
        client.close()

    def consume():
        client = options.client(options)
        while len(check.got) < options.items and not check.is_idle():
            data = client.get(queue, options.timeout / 1000, "/open")
            if data is None:
                continue
            if random.random() * 100 < options.kill:
                killed.append(data)
                client.close()
                client = options.client(options)
                continue
            client.get(queue, 0, "/close")
            check.received(data)
        client.close()

    seconds = run_all(check, [produce] + [consume] * options.clients)
    tell("Received", check.count, seconds)
    print("%d clients were killed" % len(killed))
    return check.verdict()


def packing(options, queue):
    """Keep a backlog while much goes through the queue, and watch its journal."""
    print("%d cycles of %d items of %d bytes over a backlog of %d" % (
        options.cycles, options.items, options.bytes, options.prefill))
    check = Check()
    client = options.client(options)
    waiting = collections.deque()
    serial = 0
    start = time.monotonic()
    for cycle in range(options.cycles):
        for _ in range(options.items + (options.prefill if cycle == 0 else 0)):
            data = item(options, b"item", serial)
            serial += 1
            client.put(queue, data)
            check.put[data] += 1
            waiting.append(data)
        for _ in range(options.items):
            data = client.get(queue)
            expected = waiting.popleft()
            if data != expected:
                check.errors.append("%r came instead of %r" % (data and data[:30], expected[:30]))
            check.received(data)
        stats = client.stats()
        print("cycle %d: journal of %.1f MB, backlog of %.1f MB" % (
            cycle + 1, int(stats["queue_%s_logsize" % queue]) / 1e6, int(stats["queue_%s_bytes" % queue]) / 1e6))
    for data in iter(lambda: client.get(queue), None):
        check.received(data)
    tell("Passed", serial, time.monotonic() - start)
    return check.verdict()


def leaky_reader(options, queue):
    """Readers forget some of the items that they have opened; these come back when the server
    sees that nobody cares for them any more, and every item is finished in the end."""
    print("%d readers of %d items forget %g %% of them for %d msec" % (
        options.clients, options.items, options.leak, options.timeout))
    check = Check()
    client = options.client(options)
    for serial in range(options.items):
        client.put(queue, item(options, b"item", serial))
        check.put[item(options, b"item", serial)] += 1
    leaked = []

    def read():
        client = options.client(options)
        forgotten = collections.deque()      # (when to hang up, client)
        while len(check.got) < options.items and not check.is_idle():
            while forgotten and forgotten[0][0] < time.monotonic():
                forgotten.popleft()[1].close()
            data = client.get(queue, 0.1, "/open")
            if data is None:
                continue
            if random.random() * 100 < options.leak:
                leaked.append(data)
                forgotten.append((time.monotonic() + options.timeout / 1000, client))
                client = options.client(options)
            else:
                client.get(queue, 0, "/close")
                check.received(data)
        for _, one in forgotten:
            one.close()
        client.close()

    seconds = run_all(check, [read] * options.clients)
    tell("Finished", len(check.got), seconds)
    print("%d reads were forgotten" % len(leaked))
    return check.verdict()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    tests = parser.add_subparsers(dest="test", metavar="TEST", required=True)

    def test(call, clients, items, *more):
        one = tests.add_parser(call.__name__.replace("_", "-"), help=call.__doc__.split("\n")[0],
                               description=call.__doc__)
        for option, name, kind, default, text in (
                ("-a", "host", str, "127.0.0.1", "address of the server"),
                ("-p", "port", int, 22133, "its memcache port"),
                ("-q", "queue", str, "spam", "name of the queue, which is flushed first"),
                ("-c", "clients", int, clients, "how many clients"),
                ("-n", "items", int, items, "how many items"),
                ("-b", "bytes", int, 1024, "size of an item"), *more):
            one.add_argument(option, "--" + name, type=kind, default=default,
                             help="%s (default %s)" % (text, default))
        one.set_defaults(call=call, kind="mc")
        return one

    put = test(put_many, 100, 10000)
    pairs = test(flood, 2, 10000, ("-P", "prefill", int, 0, "items put before it begins"))
    pairs.add_argument("-r", "--reliable", action="store_true", help="read with open and close")
    for one in put, pairs:
        one.add_argument("-k", "--kind", choices=CLIENTS,
                         help="what the server speaks: memcache, redis or beanstalkd")
    test(many_clients, 100, 1000,
         ("-t", "timeout", int, 1000, "milliseconds that a read waits"),
         ("-s", "sleep", int, 1, "milliseconds between two puts"),
         ("-k", "kill", int, 0, "percent of the reads after which the client dies"))
    test(packing, 1, 20000, ("-P", "prefill", int, 1000, "items that stay in the queue"),
         ("-C", "cycles", int, 10, "how often the items go through the queue"))
    test(leaky_reader, 10, 5000,
         ("-t", "timeout", int, 200, "milliseconds until a forgotten connection is closed"),
         ("-l", "leak", float, 1, "percent of the reads that are forgotten"))
    options = parser.parse_args()
    options.client = CLIENTS[options.kind]
    queue = options.queue
    try:
        client = options.client(options)
        client.flush(queue)
        client.close()
        return 0 if options.call(options, queue) else 1
    except (OSError, kestrel.ServerError) as error:
        print("%s:%d: %s" % (options.host, options.port, error), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
