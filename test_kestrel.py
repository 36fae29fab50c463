"""The tests of kestrel.py.

    python3 test_kestrel.py            # installs pytest into ./.venv if it is missing
    python3 -m pytest test_kestrel.py  # with the pytest that is there

Helpers come first, then the sections of kestrel.py: each is tested at its own door (the
configuration by files, journals by their bytes, queues by calls with a made-up `now`, sessions
by the bytes that go in and come out, the server in a thread of this process, the daemon as a
process with signals), each ending in its failures and limits. Last come crashes at any call,
disks that fail, and strangers who say anything.
"""

import base64
import atexit
import bisect
import collections
import contextlib
import copy
import errno
import functools
import gc
import hashlib
import ipaddress
import io
import itertools
import json
import logging
import math
import os
import pathlib
import py_compile
import random
import re
import resource
import select
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import types
import urllib.error
import urllib.parse
import urllib.request
import weakref

try:
    import pytest
except ImportError:
    if __name__ != "__main__":
        raise
    import venv
    venv.create(".venv", with_pip=True)
    subprocess.check_call([".venv/bin/pip", "install", "--quiet", "pytest"])
    os.execv(".venv/bin/python", [".venv/bin/python", *sys.argv])

import kestrel

try:
    socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    HAS_IPV6 = True
except OSError:
    HAS_IPV6 = False

HERE = os.path.dirname(os.path.abspath(kestrel.__file__))
NOW = 1790000000000                       # the made-up time of day, in milliseconds
FAR = NOW + 100000000                     # a time by which all delayed items are due


def _fsync(fd):
    """Fail where fsync does: what this process has written is there without it, and seen to be."""
    os.fstat(fd)


os.fsync = _fsync                         # the daemons have their own

# In memory, where that is possible: ext4 writes what replaces a file at once. With TMPDIR it is
# another directory, as /tmp on a disk.
with contextlib.suppress(OSError, AttributeError):
    _memory = os.statvfs("/dev/shm")
    if "TMPDIR" not in os.environ and not _memory.f_flag & os.ST_NOEXEC and (
            _memory.f_bavail * _memory.f_frsize > 1 << 30):
        tempfile.tempdir = "/dev/shm"

# == Helpers ==============================================================================


@pytest.fixture(scope="session", autouse=True)
def frozen():
    """What is there before the first test concerns no collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tmp_path(tmp_path_factory, request):
    """A directory; unless the test fails it is deleted at once, before it gets to the disk. The
    journals that were opened are closed, lest their descriptors add up. pytest's own tmp_path
    looks at the names of all earlier ones first, which takes longer than most tests do."""
    path = pathlib.Path(tempfile.mkdtemp(dir=str(tmp_path_factory.getbasetemp())))
    opened, failed, count = [], request.session.testsfailed, kestrel.Budget.opened
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kestrel.Budget, "opened", lambda budget, file: (
            opened.append((budget, file)), count(budget, file)))
        yield path
    for budget, file in opened:
        budget.close(file)
    if request.session.testsfailed == failed:
        shutil.rmtree(str(path))


def config_of(path, text="", **overrides):
    """A Config from the text of a file; its spool is in `path` unless it says otherwise."""
    file = path / "kestrel.conf"
    file.write_text(text)
    overrides.setdefault("queue_path", str(path / "spool"))
    if "admin_port" not in text:
        overrides.setdefault("admin_port", "off")
    os.makedirs(str(path / "spool"), exist_ok=True)
    return kestrel.Config(str(file), overrides)


def seeded():
    """A random generator whose seed is printed; set KESTREL_SEED to see that run again."""
    seed = int(os.environ.get("KESTREL_SEED", random.randrange(1 << 32)))
    print("seed", seed)
    return random.Random(seed)


def free_port():
    """A port that nothing has; nor will a client be given it meanwhile, as one from 32768 on."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def request(line, *headers, body=""):
    return "\r\n".join([line + " HTTP/1.1", "Host: [::1]:2223", *headers, "", body])


def responses(answer):
    """The (status, headers, body) of each response in what an AdminSession has said."""
    found = []
    while answer.strip("✂"):
        head, _, rest = answer.partition("\r\n\r\n")
        first, *lines = head.split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        if "Content-Length" in headers:
            size = int(headers["Content-Length"])
            body, answer = rest[:size], rest[size:]
        elif headers.get("Transfer-Encoding") == "chunked":
            body, answer = "", rest
            size = None
            while size != 0:
                line, _, answer = answer.partition("\r\n")
                size = int(line, 16)
                body += answer[:size]
                assert answer[size:size + 2] == "\r\n"
                answer = answer[size + 2:]
        else:
            body, answer = rest.rstrip("✂"), ""
        found.append((int(first.split()[1]), headers, body))
    return found


# Certificates that nobody trusts, with keys that everybody knows: an authority, and two for
# localhost that it has signed; the key of the first one again, with a password.
CA = """\
-----BEGIN CERTIFICATE-----
MIIBlDCCATugAwIBAgIUC2uH35v66W2vzFURp9X54qvZfRgwCgYIKoZIzj0EAwIw
FzEVMBMGA1UEAwwMa2VzdHJlbCB0ZXN0MCAXDTE1MDEwMTAwMDAwMFoYDzIxMTUw
MTAxMDAwMDAwWjAXMRUwEwYDVQQDDAxrZXN0cmVsIHRlc3QwWTATBgcqhkjOPQIB
BggqhkjOPQMBBwNCAATQrF4sobLcgyPBHBTZbR6dXiEVBj1pA+lkIp2CI6eEc27i
hZocr1lA3ZkZyRclhPMBbZACjaFaaFzKS4CLx/ZPo2MwYTAPBgNVHRMBAf8EBTAD
AQH/MB0GA1UdDgQWBBSErkm++smRb5qGNpX8yplfgs0tmjAfBgNVHSMEGDAWgBSE
rkm++smRb5qGNpX8yplfgs0tmjAOBgNVHQ8BAf8EBAMCAYYwCgYIKoZIzj0EAwID
RwAwRAIgN/fEkB/isaDMgL4sNK9xbwtU0w/uYKJgEmbVHWEGH68CIHAvnoVKir4X
nskSioXMTtejAf9Fd6ORSSaXYh9qlSS9
-----END CERTIFICATE-----
"""
ONE = """\
-----BEGIN CERTIFICATE-----
MIIBlDCCATugAwIBAgIUXzoWqyBlHGlEFCmAfSDZccy7+4cwCgYIKoZIzj0EAwIw
FzEVMBMGA1UEAwwMa2VzdHJlbCB0ZXN0MCAXDTE1MDEwMTAwMDAwMFoYDzIxMTUw
MTAxMDAwMDAwWjAOMQwwCgYDVQQDDANvbmUwWTATBgcqhkjOPQIBBggqhkjOPQMB
BwNCAASCafj/U4MU3Q4zqqWFj3PT3Nn95ZnSrsbgiIaVMFFvTcB2sxzfi476qpJp
UegCBUeW3V8dz6ZPTLU3NFq1Mu38o2wwajAMBgNVHRMBAf8EAjAAMB0GA1UdDgQW
BBTN0KHhbE5cMU3pqn4BJUxRmHWkOjAfBgNVHSMEGDAWgBSErkm++smRb5qGNpX8
yplfgs0tmjAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZIzj0EAwID
RwAwRAIgS1Gf6lAwwZhY/2jk8hq9UdpZpmb5duO5P7+2eQ6vevUCID3eeYE0N/Xa
rUxzpJ6iKWeJZKjsuTOI12a7YKvD6o0g
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg+YBZafaPaVbg80Qd
0LwscLFY3Ja6s8VDjDlxQGi/lnmhRANCAASCafj/U4MU3Q4zqqWFj3PT3Nn95ZnS
rsbgiIaVMFFvTcB2sxzfi476qpJpUegCBUeW3V8dz6ZPTLU3NFq1Mu38
-----END PRIVATE KEY-----
"""
TWO = """\
-----BEGIN CERTIFICATE-----
MIIBljCCATugAwIBAgIUUSRNUV2p5cUJGEoP4g53+DL5hHMwCgYIKoZIzj0EAwIw
FzEVMBMGA1UEAwwMa2VzdHJlbCB0ZXN0MCAXDTE1MDEwMTAwMDAwMFoYDzIxMTUw
MTAxMDAwMDAwWjAOMQwwCgYDVQQDDAN0d28wWTATBgcqhkjOPQIBBggqhkjOPQMB
BwNCAATFEpJAmuQ5NZZwAWH64eKl6GCTZOTjbFMyHI+5hAZTu695U8ORG/PQirKV
Srfia+AvJHJc3dOafsX1PwqU+VHJo2wwajAMBgNVHRMBAf8EAjAAMB0GA1UdDgQW
BBRjREtHxPi/MC+bPBU4MfuaLNs4KDAfBgNVHSMEGDAWgBSErkm++smRb5qGNpX8
yplfgs0tmjAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZIzj0EAwID
SQAwRgIhAMYN+oP95K3z0P66kjdqK3L5ZXymI+gt74xx28Vi+aUWAiEAv2Nb52F6
DcBSU8HtDMvofizN2aRxnd0i49PT96v65gs=
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgP3QNWuTYgeIHylQW
wHh8q/6Lfkm4eOM2q38FY40XuPShRANCAATFEpJAmuQ5NZZwAWH64eKl6GCTZOTj
bFMyHI+5hAZTu695U8ORG/PQirKVSrfia+AvJHJc3dOafsX1PwqU+VHJ
-----END PRIVATE KEY-----
"""
LOCKED = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIH0MF8GCSqGSIb3DQEFDTBSMDEGCSqGSIb3DQEFDDAkBBB+fz36cqIHa+s+aEzy
9Q7qAgIIADAMBggqhkiG9w0CCQUAMB0GCWCGSAFlAwQBKgQQbMdo5/QKzWuFvvb4
7MtZ1wSBkPJjIqY6kT4rLaQkXL24DYczQq4qiWz7LuFtS7JVwrf95Mirlh+ZM+WC
9i6cdtUwNa2ZFJGoaIBNcA/eZmv0hNR7IYXG2kCkW/IfTbFJcXrYB5lh6v0iYU2d
lxKEw9tkPffq0S0dB4vuSWd7QUEspKRP8F7gsQJSqQVSv7tsJmQltzMfSzmJCqPJ
+2RAeVPYXg==
-----END ENCRYPTED PRIVATE KEY-----
"""
SECRET = kestrel.hash_password(b"a secret", rounds=1)


def secured(path, text="", tls=True, **files):
    """Write what the settings name; returns the settings. bob and ann have passwords."""
    files = {"ca.pem": CA, "server.pem": ONE, "users": "bob:%s\nann:%s\n" % (SECRET, SECRET),
             **{name.replace("__", "."): content for name, content in files.items()}}
    for name, content in files.items():
        (path / name).write_text(content)
    return "[server]\nauth_file = %s\n%s" % (path / "users", text) + (
        "tls_cert = %s\n" % (path / "server.pem") if tls else "")


def tls_client(port, path, certificate=None):
    context = ssl.create_default_context(cafile=str(path / "ca.pem"))
    if certificate:
        context.load_cert_chain(str(certificate))
    client = Client(port)
    client.file.close()
    client.sock = context.wrap_socket(client.sock, server_hostname="localhost")
    client.file = client.sock.makefile("rb")
    return client


LOGIN = "set any 0 0 12\r\nbob a secret\r\n"


def delayed_record(xid, due, data, deliveries=0):
    return struct.pack("<BiqiqqII", 14, xid, due, len(data) + 24, NOW, 0, 0, deliveries) + data


def addx(data, add_time=NOW, expiry=0):
    return ADDX_HEAD.pack(2, len(data) + 16, add_time, expiry) + data


def plain(path):
    """The records of a journal file, without its CHECKs."""
    data, begin, found = path.read_bytes(), 0, b""
    for opcode, _, _, end in kestrel.read_records(io.BytesIO(data)):
        if opcode != kestrel.CHECK:
            found += data[begin:end]
        begin = end
    return found


def xid_record(opcode, xid):
    return struct.pack("<Bi", opcode, xid)


def spool_of(path, **files):
    """Write journal files; `__` in a name stands for a dot."""
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(content)
    return str(path)


def load(path, name="q", **settings):
    settings.setdefault("sync_journal", None)
    found = kestrel.find_journals(str(path))
    return kestrel.Queue(name, str(path), kestrel.QueueConfig(**settings),
                         found.get(name, ()), now=NOW)


def contents(queue, now=NOW):
    """Everything that a queue holds, in order; the queue is closed."""
    found = []
    for item in iter(lambda: queue.remove(now=now, even_paused=True), None):
        found.append(item.data)
    queue.close()
    return found


def contents_of(path, name="q", now=NOW):
    """What a server would find on a copy of the spool; the spool itself stays as it is."""
    copy = tempfile.mkdtemp()
    try:
        shutil.copytree(str(path), copy + "/spool")
        return contents(load(copy + "/spool", name), now)
    finally:
        shutil.rmtree(copy)


def step_of(task):
    """Run a task a step; return the OSError that came of the call it asked for, or None."""
    call = next(task, None)
    try:
        return call and call()
    except OSError as error:
        return error


class Bench:
    """What a server is for its queues, but by hand: what is to be done is collected in lists."""

    moves = work = None
    locks_files = False
    sweep_limit = kestrel.UNLIMITED

    def __init__(self):
        self.budget = kestrel.Budget()
        self.dirty, self.tasks, self.calls = [], [], []      # calls: those of later()
        self.changed, self.start = self.dirty.append, self.tasks.append

    def failed(self, queue, error):
        pass

    unreadable = timed_out = failed

    def later(self, delay, call):
        self.calls.append(call)
        return lambda: None

    def step(self):
        """Run the oldest task a step; False when there is none."""
        if not self.tasks:
            return False
        task = self.tasks.pop(0)
        error = step_of(task)
        with contextlib.suppress(StopIteration):
            if error:
                task.throw(error)
            if task.gi_frame:
                self.tasks.append(task)
        return True

    def run(self):
        """Run all tasks to their ends."""
        while self.tasks:
            kestrel.run_task(self.tasks.pop(0))


def sync(queue):
    """fsync what has been written."""
    call, sync = queue.begin_sync()
    assert call() is None
    queue.synced(sync)


def fail_sync(queue, number=errno.EIO):
    """An fsync of the queue fails."""
    call, sync = queue.begin_sync()
    call()
    queue.sync_failed(sync, OSError(number, os.strerror(number)))


def memory_queue(**settings):
    return kestrel.Queue("q", config=kestrel.QueueConfig(**settings), now=NOW)


def fill(queue, *data, **options):
    for item in data:
        assert queue.add(item, now=NOW, **options)


def take(queue, count, now=NOW, open=False):
    return [queue.remove(open, now) for _ in range(count)]


def data_of(items):
    return [item and item.data for item in items]


class FailingDisk:
    """Makes chosen calls of the journal fail as the kernel would: name -> errno. once: only
    the next of them. good: how many go well before."""

    def __init__(self, monkeypatch):
        self.failing = {}
        self.once = False
        self.good = 0
        for name in ("pwrite", "fsync", "ftruncate", "rename", "unlink", "open", "pread", "mkdir"):
            monkeypatch.setattr(kestrel.os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name, real):
        def call(*args, **options):
            code = self.failing.get(name)
            if code and self.good:
                self.good -= 1
            elif code:
                if self.once:
                    self.failing = {}
                if name == "pwrite":           # as far as it goes, and then no further
                    real(args[0], args[1][:3], args[2])
                raise OSError(code, os.strerror(code))
            return real(*args, **options)
        return call


@pytest.fixture
def disk(monkeypatch):
    return FailingDisk(monkeypatch)


def state_of(queue):
    return (data_of(queue.items), {xid: (item.data, item.deliveries)
                                   for xid, item in queue.opens.items()},
            queue.bytes, queue.counters.total_items, queue.paused, queue.open_memory,
            {xid: (one.due, one.item.data, one.to_head)
             for xid, one in queue.delays.items.items()}, queue.delays.bytes)


def broker_of(path, text="", **options):
    return kestrel.Broker(config_of(path, text), now=NOW, **options)


def put(broker, name, *data, expiry=0, now=NOW):
    """Put items as every session does; return whether each was taken."""
    session = kestrel.Session(broker)
    session.now = now
    route = broker.route(name.encode(), now)
    taken = []
    for item in data:
        steps = session._put(route, [item], 0, expiry)
        try:
            while True:
                next(steps)
        except StopIteration as stop:
            taken.append(stop.value == 1)
    return taken


def damage_item(queue, data):
    """Change a byte of an item in the journal of a queue."""
    for file in queue.journal.files:
        path = pathlib.Path(file.path)
        path.write_bytes(path.read_bytes().replace(data, b"#" + data[1:]))


def items_of(broker, name):
    return data_of(broker.queues[name].items)


def commit(broker, now):
    """What a turn does of it; returns what has been written, and what could not be."""
    written, failed = broker.write()
    for queue in written:
        if queue.history.syncing and queue.config.sync_journal:        # somebody waits for it
            sync(queue)
    for _ in range(len(broker.tasks)):
        task = broker.tasks.popleft()
        error = step_of(task)
        assert not error
        if task.gi_frame:
            broker.tasks.append(task)
    return written, failed


def run_tasks(broker):
    """Run all tasks to their ends."""
    while broker.tasks:
        kestrel.run_task(broker.tasks.popleft())


def reload(broker):
    """Reload the config file; returns the error, if any."""
    told = []
    broker.reload("a test", told.append)
    kestrel.run_task(broker.tasks.pop())
    return told[0]


def settle(broker, now=NOW):
    """Commit until nothing is on the way."""
    while broker.dirty:
        written, failed = commit(broker, now)
        assert not failed
    return broker


def sweep(broker, now):
    for _ in broker.sweep(now):
        pass


class Talk:
    """Sessions of one broker: each call feeds one of them and gives its answers."""

    def __init__(self, path, text="", session_type=kestrel.MemcacheSession):
        self.broker = broker_of(path, text)
        self.session_type = session_type
        self.sessions = {}
        self.now = NOW

    def session(self, name="client", local=True, who="a client", host=""):
        if name not in self.sessions:
            self.sessions[name] = self.session_type(self.broker, kestrel.Peer(who, host, local))
        return self.sessions[name]

    def __call__(self, text, name="client"):
        session = self.session(name)
        session.feed(text if isinstance(text, bytes) else text.encode(), self.now)
        return self.heard(name)

    def heard(self, name="client"):
        """What was said meanwhile; everybody's journals are written first."""
        session = self.session(name)
        answer = b""
        while True:
            assert not commit(self.broker, self.now)[1]
            state = session.state
            answer += b"".join(session.take())
            session.sent()
            session.resume(self.now)
            if session.state == state not in ("working", "full") and not (
                    session.out or self.broker.tasks or self.broker.dirty):
                break
        return answer.decode("latin-1") + ("✂" if session.is_over() else "")


@pytest.fixture
def talk(tmp_path):
    return Talk(tmp_path)


def set_(queue, data, head="0 0"):
    return "set %s %s %d\r\n%s\r\n" % (queue, head, len(data), data)


class Clock:
    """The `later` of a broker, with a time that is set by hand, in milliseconds."""

    def __init__(self):
        self.time = 0
        self.calls = []

    def __call__(self, delay, call):
        entry = (self.time + delay, len(self.calls), call)
        self.calls.append(entry)
        return lambda: entry in self.calls and self.calls.remove(entry)

    def reach(self, time):
        while self.calls and min(self.calls, key=lambda entry: entry[:2])[0] <= time:
            entry = min(self.calls, key=lambda entry: entry[:2])
            self.calls.remove(entry)
            self.time = entry[0]
            entry[2]()
        self.time = time


def refusals(broker):
    return bool(broker.refuses_reads), bool(broker.refuses_writes)


@pytest.fixture
def text(tmp_path):
    return Talk(tmp_path, "[server]\nmax_open_transactions = 3\n[queue small]\nmax_items = 2\n",
                kestrel.TextSession)


def field(kind, number, packed):
    return struct.pack(">bh", kind, number) + packed


def thrift_string(number, data):
    return field(11, number, struct.pack(">i", len(data)) + data)


def thrift_i32(number, value):
    return field(8, number, struct.pack(">i", value))


def thrift_strings(number, items):
    return field(15, number, struct.pack(">bi", 11, len(items)) + b"".join(
        struct.pack(">i", len(item)) + item for item in items))


def thrift_ids(number, ids):
    return field(14, number, struct.pack(">bi%dq" % len(ids), 10, len(ids), *ids))


def call(name, *fields, strict=True, kind=1, number=7):
    """A frame that calls a method."""
    head = (struct.pack(">Ii", 0x80010000 | kind, len(name)) + name + struct.pack(">i", number)
            if strict else struct.pack(">i", len(name)) + name + struct.pack(">bi", kind, number))
    message = head + b"".join(fields) + b"\0"
    return struct.pack(">i", len(message)) + message


def reply(name, *fields, **options):
    return call(name, *fields, kind=2, **options)


def exception(name, why, kind, **options):
    return call(name, thrift_string(1, why), thrift_i32(2, kind), kind=3, **options)


def thrift_items(*items):
    return field(15, 0, struct.pack(">bi", 12, len(items)) + b"".join(
        thrift_string(1, data) + field(10, 2, struct.pack(">q", xid)) + b"\0"
        for data, xid in items))


def thrift_put(name, *items, expiration=0):
    return call(b"put", thrift_string(1, name), thrift_strings(2, items), thrift_i32(3, expiration))


def thrift_get(name, most, timeout=0, auto_abort=0):
    return call(b"get", thrift_string(1, name), thrift_i32(2, most), thrift_i32(3, timeout),
                thrift_i32(4, auto_abort))


@pytest.fixture
def thrift(tmp_path):
    return Talk(tmp_path, "[queue small]\nmax_items = 2\n", kestrel.ThriftSession)


def heard_of(answer):
    return answer.encode("latin-1", "replace")


class Client:
    """A plain blocking connection to a server."""

    def __init__(self, port, address="127.0.0.1"):
        self.sock = socket.create_connection((address, port), timeout=20)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.sock.makefile("rb")

    def send(self, text):
        self.sock.sendall(text if isinstance(text, bytes) else text.encode())

    def line(self):
        return self.file.readline().decode("latin-1")

    def ask(self, text):
        """Send a command and read its one line of answer."""
        self.send(text)
        return self.line()

    def put(self, queue, data):
        return self.ask(b"set %b 0 0 %d\r\n%b\r\n" % (queue.encode(), len(data), data))

    def item(self):
        """The data of the answer to a get, None if there is no item; errors are raised."""
        line = self.line()
        if line == "END\r\n":
            return None
        if not line.startswith("VALUE "):
            raise ConnectionError("answered %r" % line)
        data = self.file.read(int(line.split()[3]) + 2)
        end = self.line()
        if end != "END\r\n":
            raise ConnectionError("answered %r" % end)
        return data[:-2]

    def get(self, key):
        self.send("get %s\r\n" % key)
        return self.item()

    def stats(self):
        self.send("stats\r\n")
        return dict(line.rstrip("\r\n").split(" ", 2)[1:] for line in iter(self.line, "END\r\n"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.file.close()
        self.sock.close()


class UnixClient(Client):
    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(path if isinstance(path, bytes) else str(path))
        self.file = self.sock.makefile("rb")


def stop(server):
    """Stop a Server that no thread runs."""
    server.broker.stopping = True
    server.run()


class ServerThread:
    """A server on a free port, run by a thread."""

    def __init__(self, path, text=""):
        self.server = kestrel.Server(config_of(path, text, memcache_port="0"))
        self.port = self.server.listeners[0].address[1]
        self.clients = []
        self.error = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        try:
            self.server.run()
        except BaseException as error:
            self.error = error
            raise

    def client(self):
        self.clients.append(Client(self.port))
        return self.clients[-1]

    def count_turns(self):
        """Return a list that becomes longer with each turn."""
        turns, turn = [], self.server.turn
        self.server.turn = lambda: turns.append(0) or turn()
        return turns

    def stop(self):
        self.server.broker.stopping = True
        self.server.interrupt()
        self.thread.join(20)
        for client in self.clients:
            client.close()
        assert self.error is None and not self.thread.is_alive()


@pytest.fixture
def serve(tmp_path):
    started = []

    def start(text=""):
        started.append(ServerThread(tmp_path, text))
        return started[-1]

    yield start
    for server in started:
        if server.thread.is_alive():
            server.stop()


@pytest.fixture
def skip(monkeypatch):
    """skip(seconds, server): so much time goes by at once; the server, which a thread runs, has
    begun a turn since."""
    def skip(seconds, server=None):
        nonlocal skipped
        skipped += seconds
        now = kestrel.time.monotonic()
        if server:
            server.interrupt()
            until(lambda: server.mono >= now)

    skipped = 0
    monkeypatch.setattr(kestrel, "time", types.SimpleNamespace(**{
        **vars(time), "monotonic": lambda: time.monotonic() + skipped, "sleep": skip}))
    return skip


@pytest.fixture
def short_path():
    """A directory whose name is short enough for the path of a UNIX socket."""
    path = tempfile.mkdtemp(prefix="k")
    yield type(pathlib.Path())(path)
    shutil.rmtree(path)


def until(condition):
    """Wait for something that another thread or process brings about."""
    deadline, pause = time.monotonic() + 20, 0.0001
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(pause)
        pause = min(2 * pause, 0.004)


class HeldFsync:
    """fsync waits until it is let go, then does what it is told: an errno, or None."""

    def __init__(self, monkeypatch):
        self.called, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.count = 0
        self.error = None
        self.threads = set()             # that called it
        self.armed = True
        real = os.fsync

        def fsync(fd):
            self.threads.add(threading.current_thread().name)
            if self.armed and threading.current_thread().name == "worker":
                self.count += 1
                self.called.release()
                assert self.go.acquire(timeout=20)
                if self.error:
                    raise OSError(self.error, os.strerror(self.error))
            real(fd)

        monkeypatch.setattr(kestrel.os, "fsync", fsync)

    def hold(self, client, text):
        """Send a command that calls fsync; it has."""
        client.send(text)
        assert self.called.acquire(timeout=20)

    def disarm(self):
        self.armed = False
        for _ in range(1000):
            self.go.release()


def nothing_comes(client):
    """Nothing is sent to it, though the server has some turns."""
    with Client(client.sock.getpeername()[1]) as other:
        for _ in range(5):
            assert other.ask("version\r\n") == "VERSION 1.0.0\r\n"
    poll = select.poll()
    poll.register(client.sock, select.POLLIN)
    assert not poll.poll(10)


@contextlib.contextmanager
def no_cycles(*kinds):
    """Check that nothing, or nothing of these kinds, is left for a garbage collector: the daemon
    runs without one."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
        gc.collect()
        found = collections.Counter(type(thing).__name__ for thing in gc.garbage
                                    if isinstance(thing, kinds or object))
        assert not found
    finally:
        gc.enable()
        gc.set_debug(0)
        gc.garbage.clear()
        gc.freeze()                          # the next one need not look at all this again


@functools.lru_cache(None)
def compiled():
    """kestrel.py, compiled once for all processes: that is half of what it takes to start one."""
    directory = tempfile.mkdtemp(prefix="kestrel-")
    atexit.register(shutil.rmtree, directory)
    return py_compile.compile(kestrel.__file__, os.path.join(directory, "kestrel.pyc"))


def command(*arguments):
    return [sys.executable, "-S", compiled(), *map(str, arguments)]      # nothing is installed


def run(*arguments, **options):
    """Run the program to its end; its exit status and what it printed."""
    done = subprocess.run(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=60, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def main(capsys, caplog):
    """Run the program in this process: its exit status, what it printed, what it told of."""
    caplog.set_level(logging.INFO)

    def main(*arguments):
        caplog.clear()
        status = kestrel.main([str(word) for word in arguments])
        out, err = capsys.readouterr()
        return status, out, caplog.text + err

    return main


def end_of(process):
    """Wait for it, more closely than wait() with a timeout does; return its exit status."""
    until(lambda: process.poll() is not None)
    return process.returncode


def is_served(port):
    """Whether a server lets clients in at that port."""
    with contextlib.suppress(ConnectionError), Client(port):
        return True


class Daemon:
    """kestrel.py as a process on a free port; its log is in `log`."""

    def __init__(self, path, text=None, most_files=None, most_memory=None, log=None):
        self.log = log or path / "log"
        self.log.write_text("")
        arguments = ["--port", 0, "--spool", path / "spool"]
        text = text or ""
        if "admin_port" not in text:         # something else may have the usual one
            text = "[server]\nadmin_port = off\n" + text.replace("[server]\n", "")
        (path / "kestrel.conf").write_text(text)
        arguments += ["-c", path / "kestrel.conf"]

        def limit():
            if most_files:
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(20, most_files), most_files))
            if most_memory:
                resource.setrlimit(resource.RLIMIT_AS, (most_memory, most_memory))

        with open(str(self.log), "ab") as log:
            self.process = subprocess.Popen(
                command(*arguments), stderr=log, cwd=str(path), preexec_fn=limit)
        until(self._is_up)
        self.port = int(re.search(r"listening on \S+:(\d+) ", self.log.read_text())[1])

    def _is_up(self):
        assert self.process.poll() is None, self.log.read_text()
        return "listening on" in self.log.read_text()

    def client(self):
        return Client(self.port)

    def end(self, number):
        """Send a signal that ends it; returns the exit status."""
        self.process.send_signal(number)
        return end_of(self.process)


@pytest.fixture
def daemon(tmp_path):
    started = []

    def start(*arguments, **options):
        started.append(Daemon(tmp_path, *arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


@pytest.fixture
def admin(tmp_path):
    return Talk(tmp_path, session_type=kestrel.AdminSession)


def ask(talk, *arguments, **options):
    """One request, its one response."""
    response, = responses(talk(request(*arguments, **options)))
    return response


def put_some(talk, name, *items):
    session = kestrel.MemcacheSession(talk.broker, kestrel.Peer("a test", "", True))
    for item in items:
        session.user = "bob"
        session.feed(b"set %b 0 0 %d\r\n%b\r\n" % (os.fsencode(name), len(item), item), talk.now)
        while not session.out:
            session.resume(talk.now)
        assert session.take() == [b"STORED\r\n"]
        session.sent()
    return session


# A queue name that is neither text nor harmless; it may come in a label, a header, a page.
WEIRD = os.fsdecode(b"a<b>\"&'\\\xff%")


def http(line, host, *headers):
    return "\r\n".join([line + " HTTP/1.1", *["Host: " + host] * bool(host), *headers, "", ""])


DEEP = "[queue]\nmax_memory_size = 64kb\nsync_journal = never\n"


def fill_deep(broker, name="q", expiry=0):
    for number in range(200):
        put(broker, name, b"%03d" % number * 300, expiry=expiry)
        commit(broker, NOW)
    assert broker.queues[name]._behind


class Door(Talk):
    """Sessions at a broker that has users; passwords are checked when pump() is called."""

    def __init__(self, path, monkeypatch, text="", session_type=kestrel.MemcacheSession):
        self.timers, self.checked, self.waiting = [], [], []
        check = kestrel.is_password
        monkeypatch.setattr(kestrel, "is_password", lambda password, stored: (
            self.checked.append(password) or check(password, stored)))
        self.broker = broker_of(
            path, secured(path, tls=False) + text,
            later=lambda delay, call: self.timers.append((delay, call)) or (lambda: None))
        self.broker.aside = lambda work, call: self.waiting.append((work, call))
        self.session_type = session_type
        self.sessions = {}
        self.now = NOW

    def pump(self):
        """Check what may be checked by now; returns how many passwords that took."""
        before = len(self.checked)
        while self.waiting or (0, ) in [timer[:1] for timer in self.timers]:
            if self.waiting:
                work, call = self.waiting.pop(0)
                call(work())
            at_once = [call for delay, call in self.timers if not delay]
            self.timers = [timer for timer in self.timers if timer[0]]
            for call in at_once:
                call()
        return len(self.checked) - before

    def rest(self):
        """The time goes by that is to pass after a wrong password."""
        timers, self.timers = self.timers, []
        for delay, call in timers:
            assert delay == 1000
            call()

    def say(self, text, name="client", **options):
        self.session(name, **options).feed(text.encode("latin-1"), self.now)

    def ask(self, text, name="client", **options):
        self.say(text, name, **options)
        self.pump()
        return self.heard(name)


@pytest.fixture
def door(tmp_path, monkeypatch):
    return functools.partial(Door, tmp_path, monkeypatch)


@contextlib.contextmanager
def turned_by_hand(path, text, count):
    """A Server that turns when it is told to, and so many clients that have come in."""
    server = kestrel.Server(config_of(path, text, memcache_port="0"))
    clients = [Client(server.port) for _ in range(count)]
    while len(server.connections) < count:
        server.turn()
    yield server, clients
    for client in clients:
        client.close()
    stop(server)


def turns_of(session, data):
    """Feed a session and give it one turn after the other, as the server does; yields what was
    said in each."""
    session.feed(data, NOW)
    for _ in range(1000):
        commit(session.broker, NOW)
        yield session.take()
        session.sent()
        if session.state != "working":
            return
        session.resume(NOW)
    assert False, "it does not come to an end"


# The promises of DESIGN.md; @promise(number) marks the tests that fail when one is broken.
PROMISES = {
    1: "an answer comes after its record",
    2: "a refused command has not happened",
    3: "a crash at any instant loses nothing acknowledged",
    4: "an item is never handed to the dead",
    5: "memory, disk and descriptors are bounded",
    6: "damage is contained",
    7: "order",
}


def promise(number):
    """Mark a test that fails when a promise of DESIGN.md is broken."""
    assert number in PROMISES
    return lambda test: test


# == Configuration ========================================================================


@pytest.mark.parametrize("text, size", [
    ("0", 0), ("512", 512), ("512b", 512), ("64kb", 65536), ("16mb", 16 << 20),
    ("16MB", 16 << 20), ("2 gb", 2 << 30), ("1tb", 1 << 40)])
def test_sizes(text, size):
    assert kestrel.SIZE.parse(text) == size
    assert kestrel.SIZE.parse(kestrel.SIZE.show(size)) == size


@pytest.mark.parametrize("text, time_ms", [
    ("0", 0), ("0s", 0), ("100ms", 100), ("30s", 30000), ("5m", 300000), ("1h", 3600000),
    ("1d", 86400000), ("1500ms", 1500)])
def test_times(text, time_ms):
    assert kestrel.TIME.parse(text) == time_ms
    assert kestrel.TIME.parse(kestrel.TIME.show(time_ms)) == time_ms


@pytest.mark.parametrize("kind, text", [
    (kestrel.SIZE, "16 megs"), (kestrel.SIZE, "-1"), (kestrel.SIZE, ""), (kestrel.SIZE, "mb"),
    (kestrel.SIZE, "1.5mb"), (kestrel.TIME, "100"), (kestrel.TIME, "5 years"),
    (kestrel.TIME, ""), (kestrel.COUNT, "0"), (kestrel.COUNT, "1e3"), (kestrel.PORT, "65536"),
    (kestrel.FLAG, "maybe"), (kestrel.NAME, "a/b"), (kestrel.TEXT, "")])
def test_bad_values(kind, text):
    with pytest.raises(ValueError):
        kind.parse(text)


def test_defaults_are_kestrels():
    config = kestrel.Config()
    assert config.server.listen == ("127.0.0.1",)
    assert config.server.memcache_port == 22133
    assert config.server.max_open_transactions == 100
    assert config.server.client_timeout is None
    queue = config.queue("q")
    assert (queue.max_items, queue.max_size, queue.max_item_size) == (kestrel.UNLIMITED,) * 3
    assert queue.default_journal_size == 16 << 20
    assert queue.max_memory_size == 128 << 20
    assert queue.max_journal_size == 1 << 30
    assert queue.min_journal_compact_delay == 60000
    assert queue.sync_journal == 100
    assert queue.keep_journal and queue.keep_flags
    assert not queue.discard_old_when_full and not queue.fanout_only
    assert queue.max_age is None and queue.expire_to_queue is None


def test_inheritance(tmp_path):
    config = config_of(tmp_path, """
[queue]
max_items = 10
max_age = 1h
[queue orders]
max_items = 20      # a comment
sync_journal = 0
[queue orders+audit]
max_items = 30
sync_journal = never
""")
    assert config.queue("other").max_items == 10
    assert config.queue("other").sync_journal == 100
    assert (config.queue("orders").max_items, config.queue("orders").sync_journal) == (20, 0)
    assert config.queue("orders+x").max_items == 20
    audit = config.queue("orders+audit")
    assert (audit.max_items, audit.sync_journal, audit.max_age) == (30, None, 3600000)


@pytest.mark.parametrize("text, line, words", [
    ("[server]\n\nport = 5\n", 3, "unknown setting port in [server]; did you mean memcache_port?"),
    ("[server]\ntimeout = 5\n", 2, "did you mean client_timeout?"),
    ("[server]\nmax_items = 5\n", 2, "unknown setting max_items"),
    ("# hello\n[servers]\n", 2, "unknown section [servers]"),
    ("[queue a]\nmax_items = 5\nmax_items = 6\n", 3, "max_items is set twice"),
    ("[queue a]\n[queue]\n[queue a]\n", 3, "duplicate section [queue a]"),
    ("[queue a]\n[queue]\n[queue  a]\n", 3, "duplicate section"),
    ("[queue a]\nmax_age = 5\n[queue b]\nmax_age = 1h\n", 2, "max_age: '5' is not a time"),
    ("[queue b]\nmax_age = 1h\n[queue a]\nMax_Age: soon\n", 4, "max_age: 'soon'"),
    ("[queue]\nmax_age = %sd\n" % ("9" * 400), 2, "max_age: the number is too large"),
    ("[queue]\nmax_size = %sgb\n" % ("9" * 400), 2, "max_size: the number is too large"),
    ("[server]\n\nauth_file = x\0y\n", 3, "a NUL in the file"),
    ("[queue a/b]\n", 1, "'/' in the name"),
    ("max_items = 5\n", 1, "neither a [section] nor a setting in one"),
    ("[queue]\nwhat\n", 2, "neither"),
    ("[alias a]\n", 1, "destination_queues is missing"),
    ("[alias a]\ndestination_queues = b, c d\n[queue a]\n", 1, "both an alias and a queue"),
    ("[alias a]\ndestination_queues = b\n[alias b]\ndestination_queues = c\n", 2,
     "b is an alias itself"),
    ("[alias a]\ndestination_queues = b, c, b\n", 2, "b is named twice"),
    ("[DEFAULT]\nmax_items = 5\n", 1, "unknown section [DEFAULT]"),
    ("[server]\nmemcache_prot = 5\n", 2, "in [server]; did you mean memcache_port?"),
    ("[queue]\nmax_itmes = 5\n", 2, "in [queue]; did you mean max_items?"),
    ("[queue]\ntext_port = 5\n", 2, "in [queue]; it belongs in [server]"),
    ("[server]\nmax_items = 5\n", 2, "in [server]; it belongs in [queue]"),
    ("[server]\nthrift_port = 5\ntext_port = 5\n", 2, "thrift_port: 5 is the text_port too"),
    ("[server]\ntext_port = 22133\n", 2, "text_port: 22133 is the memcache_port too"),
    ("[server]\n\nlisten = 999.1.1.1\n", 3, "listen: '999.1.1.1' is not a host"),
    ("[server]\nlisten = 127.0.0.1, 1::2::3\n", 2, "listen: '1::2::3' is not a host"),
    ("[server]\nlog_file = /no/such/log\n", 2, "log_file: there is no directory /no/such"),
    ("[server]\nstatus_file = /no/such/file\n", 2, "status_file: there is no directory"),
    ("[server]\nlisten = unix:/no/such/sock\n", 2, "listen: there is no directory /no/such"),
    ("[queue a]\nmax_size = 0\n", 2, "max_size: not from 1 to"),
    ("[queue a]\nmax_item_size = 0b\n", 2, "max_item_size: not from 1 to"),
    ("[queue a]\nexpire_to_queue = a\n", 2, "items of a would go to itself"),
    ("[alias b]\ndestination_queues = c a\n[queue a]\nexpire_to_queue = b\n", 4,
     "items of a would go to itself"),
])
def test_config_errors_name_file_line_and_key(tmp_path, text, line, words):
    with pytest.raises(kestrel.ConfigError) as caught:
        config_of(tmp_path, text)
    assert str(caught.value).startswith("%s:%d: " % (tmp_path / "kestrel.conf", line))
    assert words in str(caught.value)


@pytest.mark.parametrize("key, name, is_mistake", [
    ("log_file", "log", True), ("status_file", "status", True), ("log_file", "kestrel.log", False)])
def test_files_that_would_be_taken_for_queues(tmp_path, key, name, is_mistake):
    """The next start took the log for a damaged journal."""
    text = "[server]\n%s = %s\n" % (key, tmp_path / "spool" / name)
    with pytest.raises(kestrel.ConfigError) if is_mistake else contextlib.nullcontext() as caught:
        config_of(tmp_path, text)
    if is_mistake:
        assert str(caught.value) == "%s:2: %s: a file of this name in the spool would be taken " \
            "for a queue" % (tmp_path / "kestrel.conf", key)


def test_the_spool_may_be_the_working_directory():
    assert kestrel.Config(None, {"queue_path": "."}).server.log_file == ""


@pytest.mark.parametrize("text, mistakes", [
    # Each setting and each section by itself,
    ("[server]\nmemcache_prot = 5\ntext_port = many\n[queues]\n[alias a]\n[queue a/b]\nmax_age = 5\n",
     [(2, "unknown setting memcache_prot in [server]; did you mean memcache_port?"),
      (3, "text_port: 'many' is not a port"), (4, "unknown section [queues]"),
      (5, "destination_queues is missing"), (7, "max_age: '5' is not a time"),
      (6, "'/' in the name of a queue")]),
    # then what several of them make a mistake of; only then, since text_port may be meant well.
    ("[server]\nthrift_port = 2222\ntext_port = 2222\nlog_file = /no/such/log\n"
     "listen_address = unix:/no/way\ntls_key = x\nauth_file = /no/users\n"
     "[queue a]\nput_users = eve\nexpire_to_queue = a\nmax_deliveries = 2\n"
     "[alias a]\ndestination_queues = b\n[alias c]\ndestination_queues = b a\n",
     [(12, "a is both an alias and a queue"), (15, "destination_queues: a is an alias itself"),
      (2, "thrift_port: 2222 is the text_port too"), (4, "log_file: there is no directory /no/such"),
      (5, "listen: there is no directory /no"), (6, "tls_key: it needs a tls_cert"),
      (7, "auth_file: clients of text_port cannot log in"),
      (7, "auth_file: clients of thrift_port cannot log in"), (7, "auth_file /no/users: "),
      (11, "max_deliveries: it needs a dead_letter_queue")]),
    ("[server]\nthrift_port = 2222\ntext_port = 2222\nmax_lines = 5\n",
     [(4, "unknown setting max_lines in [server]; did you mean max_line?")]),
    ("[queue]\nput_users = ann, eve\nget_users = eve\n",
     [(2, "put_users: there is no auth_file"), (2, "put_users: there is no auth_file"),
      (3, "get_users: there is no auth_file")]),
    # Where there are no settings to be read:
    ("[queue]\nwhat\nmax_age = 1h\nelse\n", [(2, "neither [section]"), (4, "neither [section]")]),
    ("[queue]\nmax_age = \0\n\0\n", [(2, "a NUL in the file"), (3, "a NUL in the file")]),
])
def test_all_mistakes_of_a_config_file_are_told(tmp_path, text, mistakes):
    with pytest.raises(kestrel.ConfigError) as caught:
        config_of(tmp_path, text)
    lines = str(caught.value).split("\n")
    assert len(lines) == len(mistakes), lines
    for line, (number, why) in zip(lines, mistakes):
        assert line.startswith("%s:%d: %s" % (tmp_path / "kestrel.conf", number, why))


def test_a_mistake_of_the_command_line_is_not_looked_for_in_the_file(tmp_path):
    for text in "", "[server]\nlisten = ::1\n":
        with pytest.raises(kestrel.ConfigError) as caught:
            config_of(tmp_path, text, listen="unix:/no/such/sock")
        assert str(caught.value) == "command line: listen: there is no directory /no/such"
    with pytest.raises(kestrel.ConfigError) as caught:
        config_of(tmp_path, "[server]\nlisten = *\n", listen="::/0", memcache_port="many")
    file, *command = str(caught.value).split("\n")
    assert file.startswith("%s:2: listen: '*' is not" % (tmp_path / "kestrel.conf"))
    assert [line.partition(" '")[0] for line in command] == [
        "command line: listen:", "command line: memcache_port:"]


def test_config_that_is_no_text(tmp_path):
    (tmp_path / "bad").write_bytes(b"[server]\n\xff\xfe")
    with pytest.raises(kestrel.ConfigError, match="UTF-8"):
        kestrel.Config(str(tmp_path / "bad"))
    with pytest.raises(kestrel.ConfigError, match="No such file"):
        kestrel.Config(str(tmp_path / "missing"))


def test_example_documents_every_setting_with_its_default():
    path = os.path.join(HERE, "kestrel.conf.example")
    with open(path) as file:
        text = file.read()
    sections = re.split(r"(?m)^#?\[(.+)\]$", text)
    by_name = dict(zip(sections[1::2], sections[2::2]))
    for name, settings in (("server", kestrel.SERVER_SETTINGS),
                           ("queue", kestrel.QUEUE_SETTINGS)):
        written = dict(re.findall(r"(?m)^(\w+) *= *(.*?)$", by_name[name]))
        assert written == {key: default for key, (_, default) in settings.items()}
        for key in settings:
            assert re.search(r"(?m)^#.*\n(#.*\n)*%s =" % key, by_name[name]), key
    assert "destination_queues" in text
    kestrel.Config(path)


def test_effective_settings_are_a_config_file(tmp_path):
    config = config_of(tmp_path, """
[server]
memcache_port = 5555
client_timeout = 90s
[queue]
max_size = 3mb
[queue a]
expire_to_queue = b
[queue a+c]
keep_flags = no
[alias all]
destination_queues = a b
""")
    (tmp_path / "again").write_text("\n".join(config.lines()))
    again = kestrel.Config(str(tmp_path / "again"))
    assert again.lines() == config.lines()
    assert again.server == config.server
    assert again.queue("a+c") == config.queue("a+c")
    assert again.aliases == {"all": ("a", "b")}


def test_overrides_go_before_the_file(tmp_path):
    config = config_of(tmp_path, "[server]\nmemcache_port = 1\n", memcache_port="2")
    assert config.server.memcache_port == 2
    with pytest.raises(kestrel.ConfigError, match="command line: memcache_port"):
        kestrel.Config(overrides={"memcache_port": "many"})


def test_a_mark_at_the_start_of_the_config_file(tmp_path):
    (tmp_path / "conf").write_bytes(b"\xef\xbb\xbf[queue]\nmax_items = 3\n")
    assert kestrel.Config(str(tmp_path / "conf")).queue("q").max_items == 3


@pytest.mark.parametrize("text, words", [
    ("listen =", "there is no address"),
    ("listen = ::1, 127.0.0.1 ::1", "duplicate ::1"),
    ("listen = 127.0.0.1:22133", "'127.0.0.1:22133' is not a host, IP address or unix:PATH"),
    ("listen = [::1]:22133", "'[::1]:22133' is not a host"), ("listen = *", "'*' is not a host"),
    ("listen = 10.0.0.0/8", "'10.0.0.0/8' is not"), ("listen = /run/k.sock", "'/run/k.sock' is not"),
    ("listen = unix:", "'unix:' is not a host"),
    ("listen_address = ::1\nlisten = ::1", "listen is set twice in [server]"),
    ("socket_mode = rw", "'rw' is not a mode"),
    ("admin_commands = some", "'some' is none of: local, all, none"),
    ("socket_mode = 7777", "'7777' is not a mode"),
    ("tls_key = x", ":2: tls_key: it needs a tls_cert"),
    ("tls_client_ca = x", ":2: tls_client_ca: it needs a tls_cert"),
    ("tls_cert = {path}/missing", "tls_cert: [Errno 2] No such file or directory: '{path}/missing'"),
    ("tls_cert = {path}/users", ":2: tls_cert: {path}/users has no key, without"),
    ("tls_cert = {path}/ca.pem", ":2: tls_cert: {path}/ca.pem has no key"),
    ("tls_cert = {path}/server.pem\ntls_key = {path}/two.pem", ":3: tls_key: {path}/two.pem has no"),
    ("tls_cert = {path}/server.pem\ntls_key = {path}/locked.pem", ":3: tls_key: {path}/locked.pem"),
    ("tls_cert = {path}/server.pem\ntls_key = {path}/missing", ":3: tls_key: [Errno 2] No such"),
    ("tls_cert = {path}/server.pem\ntls_client_ca = {path}/users",
     ":3: tls_client_ca: {path}/users has no certificate: "),
    ("auth_file = {path}/missing", ":2: auth_file {path}/missing: "),
    ("auth_file = {path}/bad", "{path}/bad:3: not NAME:HASH"),
    ("auth_file = {path}/twice", "{path}/twice:2: not NAME:HASH with a new name"),
    ("auth_file = {path}/binary", ":2: auth_file {path}/binary: "),
    ("auth_file = {path}/users\ntext_port = 0", "clients of text_port cannot log in there"),
    ("auth_file = {path}/users\nthrift_port = 0", "clients of thrift_port cannot"),
    ("auth_file = {path}/users\n[queue  q]\nput_users = ann, eve", ":4: put_users: there is no eve"),
    ("[queue]\nget_users = ann", ":3: get_users: there is no auth_file"),
])
def test_mistakes_of_who_may_come_in_are_told(tmp_path, text, words):
    secured(tmp_path, two__pem=TWO, locked__pem=LOCKED, bad="# users\n\nbob:secret\n",
            twice="bob:%s\nbob:%s\n" % (SECRET, SECRET))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(kestrel.ConfigError) as caught:
        config_of(tmp_path, "[server]\n" + text.replace("{path}", str(tmp_path)) + "\n")
    assert words.replace("{path}", str(tmp_path)) in str(caught.value)


def test_addresses_to_listen_on(tmp_path):
    config = config_of(tmp_path, "[server]\nlisten = 10.0.0.1, [::1] unix:/run/k.sock\n"
                       "socket_mode = 0660\n")
    assert config.server.listen == ("10.0.0.1", "::1", "unix:/run/k.sock")
    assert config.server.socket_mode == 0o660
    assert "listen = 10.0.0.1, ::1, unix:/run/k.sock" in config.lines()
    assert "socket_mode = 0660" in config.lines()
    # Kestrel's name for it.
    assert config_of(tmp_path, "[server]\nlisten_address = ::\n").server.listen == ("::",)


# == Access ===============================================================================


@pytest.mark.parametrize("said, answer", [
    (LOGIN, "STORED\r\n"),
    (LOGIN + "version\r\nset q 0 0 1\r\nx\r\nget q\r\n",
     "STORED\r\nVERSION 1.0.0\r\nSTORED\r\nVALUE q 0 1\r\nx\r\nEND\r\n"),
    (LOGIN.replace("12", "12 noreply") + "version\r\n", "VERSION 1.0.0\r\n"),
    (LOGIN.replace("bob", "eve"), "CLIENT_ERROR authentication failure\r\n✂"),
    (LOGIN.replace("bob a", "bob A") + "version\r\n", "CLIENT_ERROR authentication failure\r\n✂"),
    ("set any 0 0 3\r\nbob\r\n", "CLIENT_ERROR authentication failure\r\n✂"),
    ("set any 0 0 0\r\n\r\n", "CLIENT_ERROR authentication failure\r\n✂"),
    ("set any 0 0 12\r\nbob a secret!!", "CLIENT_ERROR bad data chunk\r\n✂"),
    ("version\r\n" + LOGIN, "CLIENT_ERROR unauthenticated\r\n✂"),
    ("get q\r\n", "CLIENT_ERROR unauthenticated\r\n✂"),
    ("shutdown\r\n", "CLIENT_ERROR unauthenticated\r\n✂"),
    ("delete noreply\r\n", "CLIENT_ERROR unauthenticated\r\n✂"),
    ("add any 0 0 12\r\nbob a secret\r\n", "CLIENT_ERROR unauthenticated\r\n✂"),
    ("set any 0 0 1025\r\n", "SERVER_ERROR object too large for cache\r\n✂"),
    ("set any 0 0 100000000\r\n", "SERVER_ERROR object too large for cache\r\n✂"),
    ("set any 0 x 12\r\nbob a secret\r\n", "CLIENT_ERROR bad expiry\r\n✂"),
    ("set\r\nversion\r\n", "CLIENT_ERROR set needs a queue, flags, expiry and byte count\r\n✂"),
    ("\r\nversion\r\n", "CLIENT_ERROR unauthenticated\r\n✂"),
    ("SET any 0 0 12\nbob a secret\r\nset q 0 0 2000\r\n" + "x" * 2000 + "\r\n",
     "STORED\r\nSTORED\r\n"),
    ("x" * 9000, "CLIENT_ERROR line too long\r\n✂"),
    ("quit\r\n", "✂"), ("POST / HTTP/1.1\r\n", "CLIENT_ERROR unauthenticated\r\n✂"),
    ("\x80", "ERROR this protocol is not supported\r\n✂")])
def test_the_first_command_is_the_login(door, said, answer):
    in_memory = "[queue]\nkeep_journal = false\n"
    assert door(in_memory).ask(said) == answer
    pieces = door(in_memory)
    for char in said:
        pieces.say(char)
        pieces.pump()
        pieces.session().resume(NOW)
    assert pieces.heard("client") == answer
    assert not pieces.broker.stopping


def test_a_stranger_may_not_say_what_others_have_said(door):
    door = door("[queue]\nkeep_journal = false\n")
    said = "get q\r\n" + set_("q", "x") + "version\r\n"
    assert door.ask(LOGIN + said, "bob") == "STORED\r\nEND\r\nSTORED\r\nVERSION 1.0.0\r\n"
    assert door.ask("get q\r\n", "one") == "CLIENT_ERROR unauthenticated\r\n✂"
    assert door.ask("version\r\n", "two") == "CLIENT_ERROR unauthenticated\r\n✂"
    assert door.ask(set_("q", "x"), "three") == "CLIENT_ERROR authentication failure\r\n✂"
    assert door.ask(LOGIN + said, "bob again") == (
        "STORED\r\nVALUE q 0 1\r\nx\r\nEND\r\nSTORED\r\nVERSION 1.0.0\r\n")


@pytest.mark.parametrize("cut", [20, 25, 30, len(LOGIN)])
def test_the_login_may_come_in_pieces_with_commands_behind_it(door, cut):
    door = door("[queue]\nkeep_journal = false\n")
    said = LOGIN + "version\r\nget q\r\n"
    door.say(said[:cut])
    door.pump()
    door.say(said[cut:])
    door.pump()
    assert door.heard() == "STORED\r\nVERSION 1.0.0\r\nEND\r\n"


def test_a_login_may_be_longer_than_an_item(door):
    door = door("max_item_size = 3b\n[queue]\nkeep_journal = false\n")
    assert door.ask(LOGIN + set_("q", "1234") + set_("q", "123")) == (
        "STORED\r\nSERVER_ERROR object too large for cache\r\nSTORED\r\n")


def test_what_was_said_with_the_login_before_a_half_close_is_done(door):
    door = door("[queue]\nkeep_journal = false\n")
    door.say(LOGIN + set_("q", "1") + "get q/peek\r\n")
    door.session().hang_up(NOW)
    assert not door.session().is_over()
    door.pump()
    assert door.heard() == "STORED\r\nSTORED\r\nVALUE q/peek 0 1\r\n1\r\nEND\r\n✂"
    assert items_of(door.broker, "q") == [b"1"]


def test_what_has_been_right_is_known_again(door, tmp_path):
    door = door()
    assert door.ask(LOGIN) == "STORED\r\n" and len(door.checked) == 1
    assert door.ask(LOGIN, "another") == "STORED\r\n" and len(door.checked) == 1
    # Another password for the same name does not profit from it.
    assert "failure" in door.ask(LOGIN.replace("a s", "b s"), "third")
    # One that has been changed is not known any more.
    (tmp_path / "users").write_text("bob:%s\n" % kestrel.hash_password(b"new", rounds=1))
    reload(door.broker)
    door.rest()
    assert "failure" in door.ask(LOGIN, "fourth")
    door.rest()
    assert door.ask("set any 0 0 7\r\nbob new\r\n", "fifth") == "STORED\r\n"


def test_unknown_names_take_as_long_as_wrong_passwords(door):
    door = door()
    assert "failure" in door.ask(LOGIN.replace("bob", "eve"))
    assert door.checked == [b"a secret"]


def test_a_host_with_a_wrong_password_waits_for_its_next_try(door, caplog):
    door = door()
    wrong = LOGIN.replace("a s", "b s")
    for number in range(5):
        door.say(wrong, "bad%d" % number, host="10.0.0.1")
    door.say(LOGIN, "late", host="10.0.0.1")
    assert door.pump() == 1
    assert "failure" in door.heard("bad0") and door.heard("bad1") == ""
    assert door.pump() == 0
    # Another host does not wait.
    assert door.ask(LOGIN, "other", host="10.0.0.2") == "STORED\r\n"
    # Nor does who is known by now, though from a host that has to.
    assert door.ask(LOGIN, "known", host="10.0.0.1") == "STORED\r\n"
    for number in range(1, 5):
        door.rest()
        assert door.pump() == 1
        assert "failure" in door.heard("bad%d" % number)
    door.rest()
    door.pump()
    assert door.heard("late") == "STORED\r\n"
    door.rest()
    door.pump()
    assert not door.broker.logins._lines and not door.timers
    assert caplog.text.count("a client: wrong password for bob\n") == 5


def test_those_who_have_hung_up_do_not_hold_up_the_logins_of_their_host(door):
    door = door()
    for number in range(150):
        name = "gone%d" % number
        door.say(LOGIN.replace("a s", "b s"), name)
        door.session(name).hang_up(NOW)
    door.say(LOGIN, "good")
    door.pump()
    door.rest()
    door.pump()
    assert door.heard("good") == "STORED\r\n"


def test_a_host_can_keep_only_so_many_waiting(door, monkeypatch):
    monkeypatch.setattr(kestrel, "_LOGINS", 3)
    door = door()
    for number in range(6):
        door.say(LOGIN.replace("a s", "b s"), str(number))
    assert ["failure" in door.heard(str(number)) for number in range(6)] == [False] * 3 + [True] * 3
    assert door.pump() == 1


def test_a_client_that_left_while_its_password_was_checked(door):
    door = door()
    door.say(LOGIN)
    door.session().close(NOW)
    assert door.pump() == 1
    assert door.session().take() == []


def test_users_of_a_queue(door):
    door = door("[queue work]\nput_users = bob\nget_users = ann\n[queue open]\n"
                "[alias both]\ndestination_queues = open work\n")
    for name in ("bob", "ann"):
        assert door.ask(LOGIN.replace("bob", name), name) == "STORED\r\n"
    may_not_put = "CLIENT_ERROR ann is not among the put_users of work\r\n"
    assert door(set_("work", "x"), "ann") == may_not_put
    assert door(set_("work+copy", "x"), "ann") == may_not_put.replace("work", "work+copy")
    assert door(set_("both", "x"), "ann") == may_not_put
    assert "work" not in door.broker.queues and "open" not in door.broker.queues
    assert door(set_("work", "x"), "bob") == door(set_("both", "y"), "bob") == "STORED\r\n"
    assert door(set_("open", "z"), "ann") == "STORED\r\n"
    assert door(set_("work", "x"), "ann") == may_not_put         # also when others have used it
    may_not_get = "CLIENT_ERROR bob is not among the get_users of work\r\n"
    for command in ("get work", "gets work", "get work/open", "get work/peek", "get work/t=5",
                    "monitor work 1", "delete work", "flush work", "flush_all"):
        assert door(command + "\r\n", "bob") == may_not_get, command
    assert door("get work+spy\r\n", "bob") == may_not_get.replace("work", "work+spy")
    assert "work+spy" not in door.broker.queues
    assert door("get open work\r\n", "bob") == "VALUE open 0 1\r\ny\r\n" + may_not_get
    assert items_of(door.broker, "work") == [b"x", b"y"]
    assert door("get work/peek\r\n", "ann") == "VALUE work/peek 0 1\r\nx\r\nEND\r\n"
    assert door("get work/open\r\nget work/close\r\nflush work\r\ndelete work\r\n", "ann") == (
        "VALUE work/open 0 1\r\nx\r\nEND\r\nEND\r\nEND\r\nDELETED\r\n")


def test_a_right_that_a_reload_takes_away_is_gone_at_once(door):
    """Also one that has been used: it is known then."""
    door = door("[queue work]\n")
    assert door.ask(LOGIN, "bob") == "STORED\r\n"
    for _ in range(2):
        assert door(set_("work", "x"), "bob") == "STORED\r\n"
        assert door("get work\r\n", "bob") == "VALUE work 0 1\r\nx\r\nEND\r\n"
    with open(door.broker.config.path, "a") as file:
        file.write("\n[queue]\nput_users = ann\nget_users = ann\n")
    assert reload(door.broker) is None
    assert door(set_("work", "x"), "bob") == (
        "CLIENT_ERROR bob is not among the put_users of work\r\n")
    assert door("get work\r\n", "bob") == "CLIENT_ERROR bob is not among the get_users of work\r\n"


def test_users_whose_rights_are_known_are_forgotten_when_they_are_many(door, monkeypatch):
    monkeypatch.setattr(kestrel, "_MOST_PERMITTED", 3)
    door = door("[queue q4]\nput_users = ann\n")
    assert door.ask(LOGIN, "bob") == "STORED\r\n"
    for number in [*range(10), *range(10)]:
        assert (door(set_("q%d" % number, "x"), "bob") == "STORED\r\n") is (number != 4)
        assert len(door.broker.config.permitted["put_users"]) <= 3


def test_rights_to_the_children_of_an_alias(door):
    """They get what is put to all of its queues."""
    door = door("[queue work]\nget_users = ann\n[alias all]\ndestination_queues = open work\n")
    for name in ("bob", "ann"):
        assert door.ask(LOGIN.replace("bob", name), name) == "STORED\r\n"
    assert door("get all+spy\r\n", "bob") == (
        "CLIENT_ERROR bob is not among the get_users of all+spy\r\n")
    assert "all+spy" not in door.broker.queues
    assert door("get all+copy\r\n" + set_("all", "x") + "get all+copy\r\n", "ann") == (
        "END\r\nSTORED\r\nVALUE all+copy 0 1\r\nx\r\nEND\r\n")


def test_dropping_what_has_expired_is_a_matter_of_get_users(door):
    door = door("[queue work]\nget_users = ann\n")
    put(door.broker, "work", b"x", expiry=NOW - 1)
    assert door.ask(LOGIN, "bob") == "STORED\r\n"
    for command in ("flush_expired work\r\n", "flush_all_expired\r\n"):
        assert door(command, "bob") == "CLIENT_ERROR bob is not among the get_users of work\r\n"
    assert items_of(door.broker, "work") == [b"x"]


def test_the_admin_port_denies_queues_of_any_name(door):
    name = os.fsdecode(b"work+\xff")
    door = door("[queue work]\nget_users = ann\n", session_type=kestrel.AdminSession)
    door.broker.queue(name, NOW)
    for line in ("GET /peek", "POST /flush", "POST /delete"):
        door.say(request(line + "?queue=work%2B%ff", "Authorization: Basic Ym9iOmEgc2VjcmV0"))
        door.pump()
        assert responses(door.heard())[0][0] == 403
    assert name in door.broker.queues


def test_a_hash_is_salted_and_slow():
    stored = kestrel.hash_password(b"x")
    assert stored != kestrel.hash_password(b"x")
    assert int(stored.split("$")[1]) >= 200000
    assert kestrel.is_password(b"x", stored) and not kestrel.is_password(b"y", stored)
    assert not kestrel.is_password(b"0", kestrel._NOBODY)
    # Made by another program: hashlib.pbkdf2_hmac of OpenSSL's, and RFC 7914's test vector.
    assert kestrel.hash_password(b"passwd", b"salt", 1).endswith(
        "$55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc")


def test_what_is_denied_and_done_is_told_with_the_name(door, caplog):
    caplog.set_level("INFO")
    door = door("[queue work]\nput_users = ann\n")
    door.broker.config.server.admin_commands = "local"
    assert door.ask(LOGIN, "bob", who="memcache client 10.0.0.1:5", local=False) == "STORED\r\n"
    door("set work 0 0 1 noreply\r\nx\r\nflush_all\r\n", "bob")
    assert door.ask(LOGIN.replace("bob", "ann"), "ann", who="one") == "STORED\r\n"
    door("status readonly\r\nreload\r\n", "ann")
    assert [record.getMessage() for record in caplog.records if record.levelname != "DEBUG"] == [
        "memcache client 10.0.0.1:5 (bob) is denied: bob is not among the put_users of work",
        "memcache client 10.0.0.1:5 (bob) is denied: flush_all is for clients on this machine only "
        "(admin_commands)",
        "the status is READONLY, by one (ann)",
        "reload: admin_commands is empty now",
        "%s reloaded by one (ann)" % door.broker.config.path]


def test_what_somebody_wanted_to_put_is_not_in_the_log_for_a_name(door, caplog):
    """A client that has not logged in again after it was cut off."""
    assert "failure" in door().ask(set_("q", "secret things"))
    assert "wrong password for an unknown user" in caplog.text and "secret" not in caplog.text


# == Records ==============================================================================


# Journals that a Kestrel 2.4.1 has written.
ADDX_HEAD = struct.Struct("<Biqq")
KESTREL_241 = {
    # a opened, aborted, opened, closed; b and c opened, b aborted, c closed; then d e f
    "aborted": bytes.fromhex(
        "0211000000b59f11fca10100000000000000000000610211000000b79f11fca10100000000000000"
        "000000620211000000b89f11fca10100000000000000000000630211000000b89f11fca101000000"
        "00000000000000640211000000b89f11fca10100000000000000000000650211000000b99f11fca1"
        "01000000000000000000006609010000000501000000090200000006020000000903000000090400"
        "000005030000000604000000"),
    # five items, flush, one item
    "flushed": bytes.fromhex(
        "0212000000999e11fca10100000000000000000000663002120000009c9e11fca101000000000000"
        "00000000663102120000009d9e11fca10100000000000000000000663202120000009f9e11fca101"
        "0000000000000000000066330212000000a09e11fca1010000000000000000000066340101010101"
        "021b0000009f9f11fca1010000000000000000000061667465722d666c757368"),
    # three items, three gets
    "emptied": bytes.fromhex(
        "02120000009b9b11fca1010000000000000000000065300212000000a09b11fca101000000000000"
        "0000000065310212000000a29b11fca101000000000000000000006532010101"),
    # two items by fan, one of its own
    "fan+two": bytes.fromhex(
        "0212000000f4a811fca1010000000000000000000046310212000000fba811fca101000000000000"
        "000000004632021a000000fda911fca101000000000000000000006469726563742d74776f"),
    # held-open was open during a rewrite and at the end; w7 and its dots were taken
    "rewritten": bytes.fromhex(
        "021900000058ba11fca1010000000000000000000068656c642d6f70656e0901000000023e010000"
        "d0bc11fca101000000000000000000007737") + b"." * 300 + bytes.fromhex(
        "01021500000005bd11fca1010000000000000000000066696e616c"),
}


@pytest.mark.parametrize("name, expected", [
    ("aborted", [b"b", b"d", b"e", b"f"]), ("flushed", [b"after-flush"]), ("emptied", []),
    ("fan+two", [b"F1", b"F2", b"direct-two"]), ("rewritten", [b"held-open", b"final"])])
def test_journals_of_kestrel(tmp_path, name, expected):
    spool_of(tmp_path, **{name: KESTREL_241[name]})
    assert contents(load(tmp_path, name)) == expected


def test_every_opcode_is_read(tmp_path):
    """ADD, REMOVE, ADDX, OPEN_NEXT, SAVE_XID, UNREMOVE, CONFIRM, ADD_XID, CONTINUE, OPEN,
    ADDF; three reads are open at the end."""
    journal = b"".join([
        struct.pack("<Bii", 0, 4 + 3, 0) + b"old",
        struct.pack("<Bii", 0, 4 + 5, 1999999999) + b"old-x",
        xid_record(4, 70),
        b"\1",                                             # old
        b"\3",                                             # old-x open as 71
        addx(b"a"), addx(b"b"), addx(b"c"), addx(b"d"),
        xid_record(9, 80), b"\3",                          # a open as 80, b as 81
        xid_record(5, 80),                                 # a is back
        struct.pack("<Biiqq", 8, 81, 16 + 1, NOW, 0) + b"e",      # b confirmed, e added
        xid_record(9, 90), xid_record(6, 90),              # a done
        struct.pack("<Biiqq", 7, 5, 16 + 1, NOW, 0) + b"f",
        struct.pack("<BiqqII", 10, 24 + 1, NOW, 0, 7, 3) + b"g",
        xid_record(9, 91),                                 # c
        b"\1\1",                                           # d, e
        b"\3",                                             # f, under the xid 5 it carries
    ])
    spool_of(tmp_path, q=journal)
    queue = load(tmp_path)
    assert [item.data for item in queue.items] == [b"old-x", b"c", b"f", b"g"]
    last = queue.items[-1]
    assert (last.flags, last.deliveries, last.add_time) == (7, 3, NOW)
    assert queue.items[0].expiry == 1999999999000
    assert queue.bytes == 5 + 1 + 1 + 1
    queue.close()
    # The three open reads are back in the order in which they were opened, on record too.
    assert plain(tmp_path / "q") == journal + b"".join(
        xid_record(5, xid) for xid in (5, 91, 71))
    assert contents(load(tmp_path)) == [b"old-x", b"c", b"f", b"g"]


def test_opens_without_a_number_are_counted(tmp_path):
    """Kestrel 2.4.1 takes 0 for each of these and loses items."""
    spool_of(tmp_path, q=addx(b"a") + addx(b"b") + addx(b"c") + b"\3\3\3" + xid_record(6, 2))
    assert contents(load(tmp_path)) == [b"a", b"c"]


def test_operations_on_nothing_are_ignored_with_one_line(tmp_path, caplog):
    spool_of(tmp_path, q=b"\1\1" + xid_record(5, 9) + xid_record(6, 9) + addx(b"a"))
    assert contents(load(tmp_path)) == [b"a"]
    assert len(caplog.records) == 1 and "4 operations" in caplog.text


def damaged(kind, journal, place):
    if kind == "flip":
        return journal[:place] + bytes([journal[place] ^ 0xff]) + journal[place + 1:]
    if kind == "zero":
        return (journal[:place] + bytes(8) + journal[place + 8:])[:len(journal)]
    if kind == "cut":
        return journal[:place] + journal[place + 5:]
    return journal[:place] + b"\xee\x11\xee" + journal[place:]


@promise(6)
@pytest.mark.parametrize("kept", range(len(addx(b"second"))))
def test_a_torn_tail_is_cut_off_and_kept(tmp_path, caplog, kept):
    good = addx(b"first") + xid_record(9, 1) + xid_record(5, 1)
    torn = addx(b"second")[:kept]
    spool_of(tmp_path, q=good + torn)
    queue = load(tmp_path)
    assert queue.journal.current.size == len(good)
    queue.add(b"third", now=NOW)
    assert contents(queue) == [b"first", b"third"]
    if torn:
        assert "%d bytes cut out" % kept in caplog.text
        lost, = (tmp_path / "lost+found").iterdir()
        assert lost.name.startswith("q.%d." % len(good)) and lost.read_bytes() == torn


@pytest.mark.parametrize("name", ["n" * kestrel.MAX_NAME, "\xfc" * (kestrel.MAX_NAME // 2),
                                  os.fsdecode(b"\xff" * kestrel.MAX_NAME)])
def test_what_is_cut_out_of_a_queue_with_a_long_name_is_kept(tmp_path, name):
    """The name in lost+found was longer than what file systems take: the queue did not load."""
    for number in ("", ".1790000000000"):
        (tmp_path / (name + number)).write_bytes(addx(b"a") + b"\2\xff")
    assert contents(load(tmp_path, name)) == [b"a", b"a"]
    lost = sorted((tmp_path / "lost+found").iterdir())
    assert [path.read_bytes() for path in lost] == [b"\2\xff"] * 2
    assert all(path.name.startswith(name[:100]) for path in lost)
    kestrel.put_aside(str(tmp_path), name)
    assert len(os.listdir(str(tmp_path / "lost+found"))) == 3


def test_zeros_at_the_end_are_a_torn_tail(tmp_path, caplog):
    spool_of(tmp_path, q=addx(b"a") + bytes(5000))
    assert contents(load(tmp_path)) == [b"a"]
    assert "zeros" in caplog.text and "5000 bytes" in caplog.text


@promise(6)
@pytest.mark.parametrize("kind", ["flip", "zero", "cut", "insert"])
def test_damage_at_any_place_costs_what_stands_there(tmp_path, caplog, kind):
    """Everything but the record that is damaged, and at the worst its neighbours, is given,
    in order; what was cut out is kept, and a second start finds nothing to repair."""
    caplog.set_level("WARNING")
    items = [b"item%02d-" % number + b"abc\1\2\x09z" * (number % 4) for number in range(12)]
    journal = b"".join(map(addx, items))
    ends = [len(b"".join(map(addx, items[:number + 1]))) for number in range(len(items))]
    for place in range(0, len(journal), 1 if kind == "flip" else 5):
        path = tmp_path / str(place)
        path.mkdir()
        spool_of(path, q=damaged(kind, journal, place))
        caplog.clear()
        found = contents(load(path))
        hit = next(number for number, end in enumerate(ends) if place < end)
        near = items[max(0, hit - 1):hit + 2]
        assert [item for item in found if item in items and item not in near] == [
            item for item in items if item not in near], place
        if kind == "flip" and place < ends[hit] - len(items[hit]):       # in the head
            lost = [item for item in items if item not in found]
            assert lost in ([], [items[hit]]) and set(found) <= set(items), place
        if "cut o" in caplog.text:
            assert os.listdir(str(path / "lost+found"))
            caplog.clear()
            load(path).close()
            assert not caplog.text


def test_what_follows_damage_stays_in_step(tmp_path):
    """An item that is lost still takes the REMOVE that was meant for it."""
    good = [addx(b"item%d" % number) for number in range(10)]
    broken = good[1][:5] + b"\xff" * 8 + good[1][13:]
    broken = b"\xfd" + broken[1:]
    spool_of(tmp_path, q=good[0] + broken + b"".join(good[2:]) + b"\1\1\1")
    assert contents(load(tmp_path)) == [b"item%d" % number for number in range(3, 10)]


@promise(6)
def test_damage_at_random_places_of_a_large_journal(tmp_path):
    """What was not hit is given, in order; of what was hit at most its own data is changed."""
    chance = seeded()
    items = [b"%06d" % number + bytes(chance.getrandbits(8) for _ in range(
        int(2 ** chance.uniform(0, 14)))) for number in range(600)]
    journal = bytearray(b"".join(map(addx, items)))
    ends = list(itertools.accumulate(len(addx(item)) for item in items))
    hit = set()
    for place in sorted(chance.sample(range(1000, len(journal) - 200), 40), reverse=True):
        length = chance.choice([1, 2, 8, 64])
        # An item that has lost some of its data makes up for it from what follows; with too
        # many bytes, the record before may be held for the damaged one, or the one before that
        # where two places are near each other.
        end = ends[bisect.bisect(ends, place + length)]
        hit.update(range(bisect.bisect(ends, place) - 2, bisect.bisect(ends, end + length) + 1))
        kind = chance.choice(["flip", "zero", "cut", "insert"])
        noise = bytes(chance.randrange(1, 256) for _ in range(length))
        if kind == "flip":
            noise = bytes(a ^ b for a, b in zip(noise, journal[place:]))
        journal[place:place + length * (kind != "insert")] = {
            "zero": bytes(length), "cut": b""}.get(kind, noise)
    spool_of(tmp_path, q=bytes(journal))
    found = contents(load(tmp_path))
    numbers = [int(item[:6]) for item in found if item in set(items)]
    assert numbers == sorted(set(numbers))
    # A byte that was put in may read as a REMOVE, which takes one from the head.
    assert set(range(3, len(items))) - set(numbers) <= hit
    changed = [item for item in found if item not in set(items)]
    assert len(changed) <= len(hit)


def test_two_damaged_places_in_two_files(tmp_path, caplog):
    good = [addx(b"item%d" % number) for number in range(30)]
    files = []
    for number in (0, 10, 20):
        part = good[number:number + 10]
        part[3] = b"\xee" * len(part[3])
        part[7] = part[7][:9]
        files.append(b"".join(part))
    spool_of(tmp_path, q__1=files[0], q__2=files[1], q=files[2])
    assert contents(load(tmp_path)) == [
        b"item%d" % number for number in range(30) if number % 10 not in (3, 7)]
    assert len(os.listdir(str(tmp_path / "lost+found"))) == 6
    assert caplog.text.count("kept in") == 6
    for name in os.listdir(str(tmp_path / "lost+found")):
        assert " at byte %s; " % name.split(".")[-2] in caplog.text


def test_stand_ins_for_lost_items_are_given_to_nobody(tmp_path):
    spool_of(tmp_path, q=addx(b"a") + b"\xee" * 100 + addx(b"b") + addx(b"c"))
    queue = load(tmp_path, expire_to_queue="late")
    buried = []
    queue.host.moves = types.SimpleNamespace(
        bury=lambda *moved: buried.append(moved), is_burying_much=lambda queue: False)
    assert data_of(take(queue, 4)) == [b"a", b"b", b"c", None]
    assert not buried and not queue.opens
    queue.close()


def test_records_over_the_bounds_of_a_read(tmp_path, monkeypatch):
    monkeypatch.setattr(kestrel, "_READ_SIZE", 64)
    chances = random.Random(5)
    data = [bytes(chances.randrange(200)) for _ in range(100)]
    spool_of(tmp_path, q=b"".join(addx(item) + xid_record(9, number + 1)
                                  + xid_record(5, number + 1)
                                  for number, item in enumerate(data)))
    assert contents(load(tmp_path)) == data


def test_only_one_process_may_hold_a_journal(tmp_path):
    queue = load(tmp_path)
    with pytest.raises(OSError, match="held by another process"):
        load(tmp_path)
    other = load(tmp_path, "other")
    queue.close()
    load(tmp_path).close()
    other.close()


@pytest.mark.parametrize("files", [1, 2])
def test_a_queue_without_a_server_and_a_server_keep_each_other_out(tmp_path, files):
    """Both wrote to the same file."""
    if files == 2:
        spool_of(tmp_path, q__1=addx(b"older"))
    queue = load(tmp_path)
    with pytest.raises(OSError, match="is held by another server"):
        kestrel._lock_spool(str(tmp_path))
    queue.delete()
    lock = kestrel._lock_spool(str(tmp_path))
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="held by another process"):
        load(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == fds
    os.close(lock)
    load(tmp_path).close()
    os.close(kestrel._lock_spool(str(tmp_path)))


def test_a_queue_without_a_server_finds_its_older_files(tmp_path):
    """They were left out, and what was taken then was taken from them at the next start of a
    server."""
    spool_of(tmp_path, q__7=addx(b"1"), q__31=addx(b"2"), q=addx(b"3"))
    queue = kestrel.Queue("q", str(tmp_path))
    assert data_of(take(queue, 2)) == [b"1", b"2"]
    queue.close()
    assert contents(load(tmp_path)) == [b"3"]


def test_what_is_written(tmp_path):
    queue = load(tmp_path)
    queue.add(b"a", now=NOW)
    queue.add(b"b", flags=9, expiry=NOW + 5, now=NOW + 1)
    first = queue.remove(open=True, now=NOW)
    queue.abort(first.xid)
    queue.remove(now=NOW)
    queue.confirm(queue.remove(open=True, now=NOW).xid)
    queue.add(b"c", now=NOW)
    queue.add(b"d", now=NOW)
    queue.flush()
    assert plain(tmp_path / "q") == b"".join([
        addx(b"a"), struct.pack("<BiqqII", 10, 25, NOW + 1, NOW + 5, 9, 0) + b"b",
        xid_record(9, 1), xid_record(5, 1), b"\1", xid_record(9, 2), xid_record(6, 2),
        addx(b"c"), addx(b"d"), b"\1\1"])
    queue.close()


# == Journal ==============================================================================


def test_older_files_are_read_in_numeric_order(tmp_path):
    spool_of(tmp_path, q=b"\1" + addx(b"5"), q__900=addx(b"1") + addx(b"2"),
             q__1000=addx(b"3"), q__20000=addx(b"4"))
    queue = load(tmp_path)
    assert queue.journal.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert contents(queue) == [b"2", b"3", b"4", b"5"]


def test_pack_stands_for_the_files_before_it(tmp_path):
    spool_of(tmp_path, q=addx(b"c"), q__900=addx(b"old"), q__1000=addx(b"old"),
             q__1001=addx(b"b"), q__1000__pack=addx(b"a"), **{"q~~1002": b"\2junk"})
    queue = load(tmp_path)
    assert sorted(os.listdir(str(tmp_path))) == ["q", "q.1000", "q.1001"]
    assert contents(queue) == [b"a", b"b", b"c"]


def test_files_that_are_no_journals_are_left_alone(tmp_path, caplog):
    spool_of(tmp_path, good=addx(b"x"), cars__old=b"1", **{".hidden": b"2", "a b": b"3"})
    (tmp_path / "lost+found").mkdir()
    assert kestrel.find_journals(str(tmp_path)) == {"good": []}
    assert len(caplog.records) == 3
    assert (tmp_path / "cars.old").read_bytes() == b"1"


def test_an_empty_queue_starts_over_with_a_fresh_file(tmp_path):
    spool_of(tmp_path, q__1=addx(b"x"), q=b"\1")
    queue = load(tmp_path, default_journal_size=100)
    for _ in range(4):
        queue.add(b"12345678", now=NOW)
        item = queue.remove(open=True, now=NOW)
        assert queue.journal.current.size > 0
        queue.confirm(item.xid)
    assert os.listdir(str(tmp_path)) == ["q"]
    assert queue.journal.current.size == (tmp_path / "q").stat().st_size < 100
    queue.add(b"last", now=NOW)
    assert contents_of(tmp_path) == [b"last"]
    queue.close()


def test_a_large_item_is_written_without_being_copied(tmp_path):
    queue = load(tmp_path)
    data = os.urandom(3 << 20)
    queue.add(data, now=NOW)
    for size in (0, 1, 70000):
        queue.add(data[:size], now=NOW)
    assert contents_of(tmp_path) == [data, b"", data[:1], data[:70000]]
    queue.close()


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(kestrel.os, "pwrite", lambda fd, data, offset: real(
        fd, data[:7], offset))
    queue = load(tmp_path)
    queue.add(b"0123456789" * 10, now=NOW)
    queue.add(b"", now=NOW)
    assert contents_of(tmp_path) == [b"0123456789" * 10, b""]
    queue.close()


def test_going_back_only_what_kestrel_reads_is_written(tmp_path):
    """A life without flags leaves nothing that Kestrel 2.4 does not know."""
    chances = seeded()
    for number in range(8):
        path = tmp_path / str(number)
        path.mkdir()
        life = Life(path, chances, checked=False)
        life.delays = False
        for _ in range(150):
            for _ in range(chances.randrange(12)):
                life.change()
            life.write()
            life.bench.step()
            for name in os.listdir(str(path)):
                assert re.fullmatch(r"q|q\.[0-9]+(\.pack)?|q~~[0-9]+", name)
                if "~" not in name:
                    with open(str(path / name), "rb") as file:
                        for opcode, _, _, _ in kestrel.read_records(file):
                            assert opcode in (1, 2, 4, 5, 6, 9)
        life.queue.close()


def test_a_pack_that_cannot_be_finished_is_tried_again(tmp_path, disk):
    """At each of its steps, and nothing is lost by it."""
    for failing in ("open", "pwrite", "fsync", "rename", "unlink"):
        for good_steps in range(8):
            path = tmp_path / ("%s%d" % (failing, good_steps))
            path.mkdir()
            bench = Bench()
            queue = kestrel.Queue(
                "q", str(path), kestrel.QueueConfig(max_memory_size=1000, sync_journal=None),
                host=bench, now=NOW)
            fill(queue, *[b"%d" % number * 30 for number in range(100, 140)])
            queue.write()
            opened = queue.remove(open=True, now=NOW)
            queue.write()
            while not queue.journal.passings:
                queue.add(b"y" * 90, now=NOW)
                queue.remove(now=NOW)
                queue.write()
                if not queue.journal.passings:
                    bench.run()
            for steps in range(50):
                disk.failing = {failing: errno.EIO} if steps >= good_steps else {}
                bench.step()
            disk.failing = {}
            while bench.calls:
                bench.calls.pop(0)()
            before = [opened.data] + [item.data for item in queue.items]
            assert contents_of(path)[:len(before)] == before
            bench.run()
            assert contents_of(path)[:len(before)] == before
            assert len(queue.journal.passed) <= 1 and not queue.journal.passings
            queue.close()


def test_a_write_that_lacks_a_descriptor_for_its_second_file_is_not_put_off(tmp_path, disk):
    """What is in the first file by then is cut off, before anything else can fail."""
    queue = turn_queue(tmp_path, max_memory_size=500)
    bench = queue.host
    bench.work = lambda call, done: None
    items = [b"%d" % number * 30 for number in range(20)]
    for item in items:
        queue.add(item, now=NOW)
        queue.write()
        bench.run()
    queue.remove(now=NOW)
    queue.add(b"x", now=NOW)
    bench.budget.close(queue.journal.current)
    disk.failing = {"open": errno.EMFILE}
    with contextlib.suppress(OSError):
        queue.write()
    disk.failing = {"ftruncate": errno.EIO}
    with contextlib.suppress(OSError):
        queue.write()
    disk.failing = {}
    assert not queue.history.ops and contents_of(tmp_path) == items
    queue.close()


def test_a_pause_after_the_last_fsync_of_a_removal_has_failed(tmp_path, disk):
    """There is nothing left that a pack could stand for, and upkeep goes on."""
    bench = Bench()
    queue = kestrel.Queue("q", str(tmp_path), kestrel.QueueConfig(
        default_journal_size=10, sync_journal=None), host=bench, now=NOW)
    fill(queue, b"1")
    queue.remove(now=NOW)
    queue.write()
    while bench.step():
        if queue.journal.passings:
            disk.failing = {"fsync": errno.EIO}
    assert queue.upkeep.error and queue.journal.passings and os.listdir(str(tmp_path)) == ["q"]
    disk.failing = {}
    queue.pause()
    queue.write()
    while bench.calls:
        bench.calls.pop(0)()
    bench.run()
    assert not queue.upkeep.error and not queue.journal.passings
    queue.close()
    assert load(tmp_path).paused == kestrel.PAUSED_IN | kestrel.PAUSED_OUT


def test_both_renames_of_a_pack_can_fail_and_rotation_is_tried_again(tmp_path, disk):
    """Rotation needs one rename and the creation of a file; each of them fails once."""
    for failing in ("rename", "open", "fsync"):
        path = tmp_path / failing
        path.mkdir()
        queue = turn_queue(path, max_memory_size=500)
        bench = queue.host
        items = []
        for number in range(20):
            items.append(b"%d" % number * 30)
            queue.add(items[-1], now=NOW)
            queue.write()
            disk.failing, disk.once = {failing: errno.EIO}, True
            bench.step()
            bench.step()
            disk.failing = {}
            assert contents_of(path) == items
            while bench.calls:
                bench.calls.pop(0)()
            bench.run()
        assert len(queue.journal.files) >= 3
        assert data_of(take(queue, 20)) == items
        queue.close()


def test_an_fsync_under_way_keeps_nobody_from_the_file(tmp_path):
    """Duplicates of descriptors once kept the lock of a file that was closed meanwhile."""
    queue = turn_queue(tmp_path, sync_journal=100)
    queue.add(b"1", now=NOW)
    queue.write()
    call, under_way = queue.begin_sync()
    queue.host.budget.close(queue.journal.current)
    queue.add(b"2", now=NOW)
    queue.write()
    assert call() is None
    queue.synced(under_way)
    queue.close()
    assert contents_of(tmp_path) == [b"1", b"2"]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("failing", ["unlink", "rename", "open", "fsync"])
def test_delete_is_all_or_nothing(tmp_path, disk, several, failing):
    """From one of its calls on all of that kind fail."""
    items = [b"%d" % number * 50 for number in range(10)]
    outcomes = set()
    for good in range(9):
        path = tmp_path / str(good)
        path.mkdir()
        queue = turn_queue(path, max_memory_size=300 if several else 10000)
        for item in items:
            queue.add(item, now=NOW)
            queue.write()
            queue.host.run()
        assert (len(queue.journal.files) > 1) == several
        disk.failing, disk.good = {failing: errno.EIO}, good
        try:
            queue.delete()
            queue.host.run()
            outcomes.add("gone")
            expected = []
        except OSError:
            outcomes.add("as it was")
            queue.add(b"more", now=NOW)
            expected = items + [b"more"]
        disk.failing = {}
        if expected:
            queue.write()
            assert data_of(take(queue, 11)) == expected
        assert contents_of(path) == expected
    assert "gone" in outcomes and (failing == "fsync" or "as it was" in outcomes or (
        failing, several) in (("unlink", True), ("rename", False), ("open", False)))


def test_a_queue_that_is_made_again_never_shows_an_old_item(tmp_path, disk):
    broker = broker_of(tmp_path, "[queue]\nmax_memory_size = 300\n")
    for number in range(10):
        put(broker, "q", b"old" * 30)
        commit(broker, NOW)
    assert len(broker.queues["q"].journal.files) > 1
    broker.delete(broker.queues["q"])
    disk.failing = {"unlink": errno.EIO}
    run_tasks(broker)                         # nothing can be deleted
    spool = tmp_path / "spool"
    for number in range(10):
        put(broker, "q", b"new" * 30)
        commit(broker, NOW)
    disk.failing = {}
    assert contents_of(spool, "q") == [b"new" * 30] * 10
    assert len(broker.queues["q"].journal.files) > 1
    broker.delete(broker.queues["q"])
    run_tasks(broker)
    assert contents_of(spool, "q") == []


def test_put_while_the_files_of_a_deleted_queue_are_deleted(tmp_path):
    broker = broker_of(tmp_path, "[queue]\nmax_memory_size = 300\n")
    for number in range(10):
        put(broker, "q", b"old" * 30)
        commit(broker, NOW)
    broker.delete(broker.queues["q"])
    for _ in range(20):
        put(broker, "q", b"new")
        commit(broker, NOW)
    run_tasks(broker)
    assert contents_of(tmp_path / "spool", "q") == [b"new"] * 20


def test_a_repair_that_fails_refuses_what_was_to_be_written(tmp_path, disk):
    items = [b"item%02d" % number for number in range(36)]
    queue = behind_three_files(tmp_path, items)
    while len(queue.journal.passed) < 1:
        queue.remove(now=NOW)
        queue.write()
    head = queue.journal.files[0]
    queue.host.budget.close(head)
    with open(head.path, "ab") as file:
        file.write(b"\xfe" * 50)
    queue.remove(now=NOW)
    count = queue.count
    disk.failing = {"open": errno.EIO}
    with pytest.raises(OSError):
        queue.write()
    disk.failing = {}
    assert queue.count == count + 1
    queue.remove(now=NOW)
    queue.write()
    for call in queue.host.calls:
        call()
    for again in queue.host.dirty:
        again.write()
    assert not queue.history.ops
    assert contents_of(tmp_path) == items[-count:]


def test_a_deleted_queue_does_not_come_back_empty(tmp_path):
    """The server was killed while the files of a deleted queue were being deleted."""
    spool = tmp_path / "spool"
    spool.mkdir()
    spool_of(spool, q__5=addx(b"a"), q__7=addx(b"b"))
    (spool / "q.7.pack").write_bytes(b"")
    assert broker_of(tmp_path).queues == {}
    assert os.listdir(str(spool)) == []


def test_a_write_costs_the_same_however_many_files_there_are(tmp_path):
    costs = []
    for number in (4, 400):
        path = tmp_path / str(number)
        path.mkdir()
        queue = turn_queue(path, max_memory_size=300, sync_journal=0)
        while len(queue.journal.files) < number:
            queue.add(b"x" * 320, now=NOW)
            queue.write()
            queue.host.run()
            sync(queue)
        def lone_put():
            queue.add(b"y", now=NOW)
            queue.write()
            sync(queue)
        lone_put()
        costs.append(calls_of(lone_put))
        queue.close()
    assert costs[1] <= costs[0] * 1.1


def calls_of(function):
    """How many Python functions are called, and loops gone through, by a call."""
    count = [0]
    sys.settrace(lambda *_: count.__setitem__(0, count[0] + 1) or (
        lambda *_: count.__setitem__(0, count[0] + 1)))
    try:
        function()
    finally:
        sys.settrace(None)
    return count[0]


def test_a_journal_that_somebody_else_has_changed_is_not_written_over(tmp_path):
    queue = turn_queue(tmp_path)
    queue.add(b"1", now=NOW)
    queue.write()
    queue.host.budget.close(queue.journal.current)
    queue.journal.lock = os.open(str(tmp_path), os.O_RDONLY)     # as of a queue without a server
    other = kestrel.Queue("q", str(tmp_path))
    other.add(b"3")
    with pytest.raises(OSError, match="held by another process"):
        kestrel.Queue("q", str(tmp_path))
    other.close()
    queue.add(b"2", now=NOW)
    with pytest.raises(OSError, match="changed by another process"):
        queue.write()
    assert contents_of(tmp_path) == [b"1", b"3"]


def test_what_is_repaired_is_for_its_owner_only(tmp_path):
    previous = os.umask(0)
    try:
        spool_of(tmp_path, q=addx(b"a") + b"\xee" * 50 + addx(b"b") * 3)
        contents(load(tmp_path))
    finally:
        os.umask(previous)
    lost, = (tmp_path / "lost+found").iterdir()
    assert os.stat(str(lost)).st_mode & 0o777 == 0o600
    assert os.stat(str(tmp_path / "q")).st_mode & 0o777 == 0o600


def test_journal_files_are_in_order_though_the_clock_was_set_back(tmp_path, wall):
    queue = turn_queue(tmp_path, max_memory_size=1000)
    sent = []
    for number in range(60):
        wall.offset -= 1000000
        sent.append(b"%03d" % number * 30)
        queue.add(sent[-1])
        queue.write()
        queue.host.run()
    assert len(queue.journal.files) > 5
    queue.close()
    assert contents(load(tmp_path)) == sent


# == Queue ================================================================================


@promise(7)
def test_fifo():
    queue = memory_queue()
    fill(queue, b"a", b"b", b"c")
    assert queue.peek(NOW).data == b"a"
    assert (queue.count, queue.bytes) == (3, 3)
    assert data_of(take(queue, 4)) == [b"a", b"b", b"c", None]
    assert (queue.count, queue.bytes, queue.counters.total_items) == (0, 0, 3)


def test_library_use(tmp_path):
    queue = kestrel.Queue("work", path=str(tmp_path))
    queue.add(b"hello")
    item = queue.remove(open=True)
    assert item.data == b"hello"
    assert queue.confirm(item.xid)
    assert not queue.confirm(item.xid)
    queue.close()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_aborted_reads_go_back_in_the_order_given(order):
    queue = memory_queue()
    fill(queue, b"a", b"b", b"c", b"d")
    xids = [item.xid for item in take(queue, 3, open=True)]
    assert queue.abort(*[xids[index] for index in order]) == 3
    assert data_of(take(queue, 4)) == [b"abc"[index:index + 1] for index in order] + [b"d"]
    assert queue.counters.canceled_transactions == 3


def test_a_closed_queue_takes_nothing(tmp_path):
    queue = kestrel.Queue("work", path=str(tmp_path))
    queue.add(b"x")
    queue.close()
    with pytest.raises(ValueError, match="closed"):
        queue.add(b"y")
    assert contents_of(tmp_path, "work") == [b"x"]


def test_xids_wrap_and_skip_open_ones():
    queue = memory_queue()
    fill(queue, *[b"x"] * 5)
    queue.xid = 0
    first = queue.remove(open=True, now=NOW)
    last = kestrel._ASIDE - 1                # from there on they are for those that are lost
    queue.xid = last - 1
    assert [item.xid for item in take(queue, 3, open=True)] == [last, 2, 3]
    assert first.xid == 1


def test_max_items_and_max_size():
    queue = memory_queue(max_items=2)
    fill(queue, b"a", b"b")
    assert not queue.add(b"c", now=NOW)
    queue.remove(now=NOW)
    assert queue.add(b"c", now=NOW)
    queue = memory_queue(max_size=10)
    fill(queue, b"12345", b"12345")
    assert not queue.add(b"", now=NOW)
    assert data_of(take(queue, 3)) == [b"12345", b"12345", None]


def test_max_item_size():
    queue = memory_queue(max_item_size=3)
    assert queue.add(b"123", now=NOW)
    assert not queue.add(b"1234", now=NOW)


def test_discard_old_when_full():
    queue = memory_queue(max_items=2, discard_old_when_full=True)
    fill(queue, b"a", b"b", b"c")
    assert queue.counters.discarded == 1
    assert data_of(take(queue, 3)) == [b"b", b"c", None]


def test_expired_items_make_room():
    queue = memory_queue(max_items=1)
    fill(queue, b"a", expiry=NOW + 10)
    assert not queue.add(b"b", now=NOW + 9)
    assert queue.add(b"b", now=NOW + 10)
    assert queue.counters.expired_items == 1


def test_expiry_is_to_the_millisecond():
    queue = memory_queue()
    fill(queue, b"a", b"b", expiry=NOW + 10)
    fill(queue, b"c")
    assert queue.remove(now=NOW + 9).data == b"a"
    assert queue.remove(now=NOW + 10).data == b"c"
    assert queue.counters.expired_items == 1
    assert queue.peek(NOW + 10) is None


def test_max_age_limits_what_the_client_asked_for():
    queue = memory_queue(max_age=100)
    fill(queue, b"a", b"b", expiry=NOW + 50)
    fill(queue, b"c", b"d", expiry=NOW + 200)
    fill(queue, b"e")
    assert queue.remove(now=NOW + 49).data == b"a"
    assert queue.remove(now=NOW + 50).data == b"c"
    assert queue.remove(now=NOW + 99).data == b"d"
    assert queue.remove(now=NOW + 100) is None


def test_discard_expired_within_its_limit():
    queue = memory_queue(max_expire_sweep=2)
    fill(queue, b"a", b"b", b"c", expiry=NOW + 1)
    assert queue.discard_expired(NOW) == 0
    assert queue.discard_expired(NOW + 1) == 2
    assert queue.discard_expired(NOW + 1) == 1


def test_flush_leaves_open_reads():
    queue = memory_queue()
    fill(queue, b"a", b"b", b"c")
    item = queue.remove(open=True, now=NOW)
    queue.flush()
    assert (queue.count, queue.bytes, queue.counters.total_flushes) == (0, 0, 1)
    queue.abort(item.xid)
    assert data_of(take(queue, 2)) == [b"a", None]


def test_flags_are_dropped_without_keep_flags():
    queue = memory_queue(keep_flags=False)
    fill(queue, b"a", flags=5)
    assert queue.remove(now=NOW).flags == 0


@promise(7)
def test_waiters_first_come_first_served():
    queue = memory_queue()
    served = []
    waiters = {name: kestrel.Waiter(lambda queue, item, name=name: served.append(
        (name, item and item.data)), peek=name == "c") for name in "abcde"}
    for name in "abcde":
        queue.wait(waiters[name])
    waiters["b"].cancel()
    fill(queue, b"1")                       # c only looks
    assert served == [("c", b"1"), ("a", b"1")]
    fill(queue, b"2")
    assert served[2:] == [("d", b"2")]
    queue.dismiss_waiters()
    assert served[3:] == [("e", None)]
    waiters["a"].cancel()
    assert not queue.waiters


@promise(7)
def test_an_aborted_item_goes_to_the_next_waiter():
    queue = memory_queue()
    fill(queue, b"a", b"b")
    xids = [item.xid for item in take(queue, 2, open=True)]
    served = []
    queue.wait(kestrel.Waiter(lambda queue, item: served.append(item.data)))
    queue.abort(*xids)
    assert served == [b"a"]
    assert data_of(take(queue, 2)) == [b"b", None]


def test_open_transaction_timeout():
    calls, cancelled = [], []

    def later(delay, call):
        calls.append((delay, call))
        return lambda: cancelled.append(call)

    config = kestrel.QueueConfig(open_transaction_timeout=500)
    bench = Bench()
    bench.later = later
    queue = kestrel.Queue("q", config=config, host=bench, now=NOW)
    fill(queue, b"a", b"b")
    late, quick = take(queue, 2, open=True)
    queue.confirm(quick.xid)
    assert cancelled == [calls[1][1]]
    assert calls[0][0] == 500
    calls[0][1]()
    calls[2][1]()                            # soon after, with those that are late too
    assert not queue.confirm(late.xid)
    assert queue.remove(now=NOW).data == b"a"


def test_what_is_added_is_bytes_of_its_own(tmp_path):
    for path in (None, str(tmp_path)):
        queue = kestrel.Queue("q", path)
        for wrong in ("text", 7, None):
            with pytest.raises(TypeError):
                queue.add(wrong)
        for expiry, flags in ((1 << 63, 0), (-(1 << 64), 0), (0, 1 << 32), (0, -1)):
            with pytest.raises(ValueError):
                queue.add(b"x", flags, expiry)
        data = bytearray(b"one")
        queue.add(data)
        data[:] = b"two"
        assert queue.remove().data == b"one" and queue.remove() is None
        queue.close()


class Life:
    """A queue with tiny limits, and what it should hold."""

    def __init__(self, path, chances, checked=None):
        self.path = str(path)
        self.chances = chances
        self.checked = checked               # whether there are CHECKs; None: now and then
        self.settings = dict(
            max_memory_size=chances.choice([300, 1000, 5000]),
            default_journal_size=chances.choice([200, 1000]),
            max_journal_size=chances.choice([1500, 5000, 20000]),
            min_journal_compact_delay=0, sync_journal=chances.choice([None, 0]))
        self.serial = 0
        self.bias = 0.5
        self.now = NOW
        self.waiting, self.opens = collections.deque(), {}
        self.delayed = {}                    # xid -> (due, xid, data, to_head)
        self.moves = 0                       # how many items have come back elsewhere
        self.delays = chances.random() < 0.5
        self.rotations = self.rewrites = 0
        self.open()

    def open(self):
        self.bench = Bench()
        checked = self.chances.random() < 0.7 if self.checked is None else self.checked
        self.queue = kestrel.Queue(
            "q", self.path, kestrel.QueueConfig(check_journal=checked, **self.settings),
            kestrel.find_journals(self.path).get("q", ()), self.bench, NOW)

    def release(self):
        """What is due by now is put where it belongs."""
        due = sorted(one for one in self.delayed.values() if one[0] <= self.now)
        for _, xid, data, to_head in due:
            del self.delayed[xid]
            if not to_head:
                self.waiting.append(data)
        self.waiting.extendleft(data for _, _, data, to_head in reversed(due) if to_head)
        self.moves += len(due)
        self.queue.peek(self.now)

    def change(self):
        chances, queue, waiting, opens = self.chances, self.queue, self.waiting, self.opens
        self.release()
        action = chances.random()
        if self.delays and chances.random() < 0.3:
            self.change_beyond(action)
        elif action < self.bias * 0.7:
            data = self.next_item()
            queue.add(data, now=self.now)
            waiting.append(data)
        elif action < 0.8:
            opening = chances.random() < 0.5
            item = queue.remove(opening, now=self.now)
            if item is None and queue._loading:
                return                       # the worker reads it
            assert (item and item.data) == (waiting.popleft() if waiting else None)
            if item and opening:
                opens[item.xid] = item.data
        elif action < 0.97 and opens:
            xid = chances.choice(list(opens))
            if chances.random() < 0.6:
                assert queue.confirm(xid)
                del opens[xid]
            else:
                queue.abort(xid)
                waiting.appendleft(opens.pop(xid))
        elif action > 0.995:
            queue.flush()
            waiting.clear()
            self.delayed.clear()

    def next_item(self):
        self.serial += 1
        return b"%d-%b" % (self.serial, b"x" * self.chances.randrange(
            self.chances.choice([5, 60, 200])))

    def change_beyond(self, action):
        """A change that Kestrel has not."""
        chances, queue = self.chances, self.queue
        delay = chances.randrange(1, 200)
        if action < self.bias * 0.5:
            data = self.next_item()
            with contextlib.suppress(OSError):         # there is no memory for it
                queue.add_later(data, delay, now=self.now)
                self.delayed[queue.xid] = self.now + delay, queue.xid, data, False
        elif action < 0.6 and self.opens:
            xid = chances.choice(list(self.opens))
            if chances.random() < 0.5:
                queue.abort(xid, tail=True, now=self.now)
                self.waiting.append(self.opens.pop(xid))
                self.moves += 1
            else:
                queue.abort(xid, delay=delay, now=self.now)
                self.delayed[xid] = self.now + delay, xid, self.opens.pop(xid), True
        elif action > 0.9:
            queue.pause(chances.choice([0, kestrel.PAUSED_IN]))       # not asked here
            queue.pause(0)
        else:
            self.now += chances.randrange(30)

    def write(self):
        self.queue.write()
        if self.settings["sync_journal"] == 0 and self.chances.random() < 0.5:
            sync(self.queue)

    def check(self):
        queue = self.queue
        assert queue.count == len(self.waiting)
        assert queue.bytes == sum(map(len, self.waiting))
        assert queue.memory == sum(map(kestrel._cost, queue.items))
        assert queue.open_memory == sum(map(kestrel._cost, queue.opens.values())) + (
            queue.delays.memory)
        assert {(due, xid, to_head) for due, xid, _, to_head in self.delayed.values()} == {
            (one.due, one.xid, one.to_head) for one in queue.delays.items.values()}
        assert queue.delays.bytes == sum(len(data) for _, _, data, _ in self.delayed.values())
        queue.count_memory()
        assert self.bench.budget.memory == queue.memory + queue.open_memory
        assert sum(len(item.data or b"") for item in queue.items) <= (
            self.settings["max_memory_size"] + 5000 + sum(
                len(item.data or b"") for item in queue.opens.values()))

    def check_disk(self):
        assert contents_of(self.path, now=FAR) == on_disk(self.state())

    def state(self):
        """What waits, is open and delayed, without what has expired; the last item's number; how
        many came back elsewhere."""
        return ([data for data in self.waiting if not data.endswith(b"expired")],
                dict(self.opens), dict(self.delayed), self.serial, self.moves)

    def restart(self):
        self.queue.close()
        self.waiting.extendleft(reversed(list(self.opens.values())))
        self.opens.clear()
        self.open()


def on_disk(state):
    """What a restart finds, in order, once all that is delayed is due."""
    waiting, opens, delayed, _, _ = state
    due = sorted(delayed.values())
    return ([data for _, _, data, to_head in due if to_head] + list(opens.values())
            + list(waiting) + [data for _, _, data, to_head in due if not to_head])


def test_a_queue_with_tiny_limits_lives_as_one_in_memory_would(tmp_path):
    """Random changes, through read-behind, rotation, packing, rewriting and restarts; at
    any moment the files alone tell what the queue holds."""
    chances = seeded()
    rotations = rewrites = 0
    most = int(os.environ.get("KESTREL_LIVES", 6))
    for number in itertools.takewhile(
            lambda number: number < most or not (rotations and rewrites), range(100)):
        path = tmp_path / str(number)
        path.mkdir()
        life = Life(path, chances)
        for _ in range(chances.randrange(50, 300)):
            if chances.random() < 0.05:
                life.bias = chances.random()
            for _ in range(chances.randrange(12)):
                life.change()
            life.check()
            if chances.random() < 0.9:
                life.write()
                for _ in range(chances.randrange(3)):
                    if life.bench.step() and chances.random() < 0.5:
                        life.check_disk()
            if chances.random() < 0.01:
                rotations += life.queue.counters.journal_rotations
                rewrites += life.queue.counters.journal_rewrites
                life.queue.write()
                life.restart()
        life.write()
        life.check_disk()
        rotations += life.queue.counters.journal_rotations
        rewrites += life.queue.counters.journal_rewrites
        life.queue.close()
        shutil.rmtree(str(path))
    assert rotations and rewrites


def flow(queue, bench, turns, opened=None):
    """A steady flow: each turn puts ten items and takes ten, by open and close."""
    largest = 0
    for _ in range(turns):
        for _ in range(10):
            queue.add(b"x" * 100, now=NOW)
            item = queue.remove(open=True, now=NOW)
            if opened is not None and not opened:
                opened.append(item.xid)
            else:
                queue.confirm(item.xid)
        queue.write()
        bench.step()
        largest = max(largest, queue.journal.size)
    return largest


@promise(5)
@pytest.mark.parametrize("backlog", [0, 50, 1000])
def test_disk_use_follows_the_backlog_and_not_its_history(tmp_path, backlog):
    """Many times max_memory_size goes through; one read stays open all the time."""
    bench, opened = Bench(), []
    queue = kestrel.Queue(
        "q", str(tmp_path), kestrel.QueueConfig(
            max_memory_size=20000, max_journal_size=80000, default_journal_size=4000,
            sync_journal=None), host=bench, now=NOW)
    for _ in range(backlog // 50):
        fill(queue, *[b"x" * 100] * 50)
        queue.write()
        bench.run()
    largest = flow(queue, bench, 1000, opened)
    assert queue.counters.total_items * 100 >= 50 * 20000
    assert largest < backlog * 121 + 80000 + 2 * 20000
    assert len(os.listdir(str(tmp_path))) < backlog * 121 / 20000 + 6
    assert queue.memory <= 20000 + 4096
    queue.confirm(opened[0])
    while queue.count:
        queue.remove(now=NOW)
        flow(queue, bench, 1)
    for _ in range(50):
        flow(queue, bench, 1)
    assert queue.journal.size < 4000 + 20 * 150
    queue.close()


def test_a_deep_queue_is_opened_and_drained_within_its_memory(tmp_path):
    settings = dict(max_memory_size=30000)
    queue = load(tmp_path, **settings)
    for number in range(3000):
        queue.add(b"%d" % number + b"x" * 100, now=NOW)
    queue.close()
    queue = load(tmp_path, **settings)
    assert queue.count == 3000 and queue.memory <= 30000
    for number in range(3000):
        assert queue.remove(now=NOW).data.startswith(b"%dx" % number)
        assert queue.memory <= 30000
    assert queue.count == queue.bytes == queue.memory == 0
    queue.close()


def test_loading_a_large_queue_tells_how_far_it_is(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(kestrel, "_PROGRESS_SECONDS", -1)
    spool_of(tmp_path, q__1=addx(b"x" * 100) * 30000, q=b"\1" * 1000 + addx(b"x" * 100) * 10000)
    load(tmp_path).close()
    told = [re.fullmatch(r"loading q: (\d+) %, (\d+) items", record.getMessage()).groups()
            for record in caplog.records]
    told = [(int(share), int(count)) for share, count in told]
    assert len(told) >= 5 and told == sorted(told)
    assert all(abs(share - count / 400) <= 3 for share, count in told)


@pytest.mark.parametrize("memory", [1 << 20, 3000, 1])
def test_runs_of_items_are_loaded_as_single_records_are(tmp_path, monkeypatch, memory):
    """However the file is cut into pieces, whole or damaged, in memory or not. What a check sum
    proves bad of items that stay on disk is found when they are read."""
    chances = seeded()
    for _ in range(25):
        count = ends = 0
        checked = chances.random() < .6
        content = kestrel._mark(True, 0) if checked else b""
        begin = len(content)
        for _ in range(chances.randrange(60)):
            kind = chances.random()
            if checked and kind > .6 and len(content) > begin:
                content += kestrel._checked([content[begin:]], len(content) - begin, ends)[0][-17:]
                begin = len(content)
                continue
            taken = kind < .2 and count
            if .2 < kind < .3:
                content += delayed_record(chances.randrange(1, 30), NOW + 1 + chances.randrange(99),
                                          b"abcd", chances.choice([0, 5]))
                continue
            if taken:
                content += b"\1"
            elif kind < .4:
                content += struct.pack("<BiqqII", 10, 27, NOW, 0, 7, chances.choice([0, 2])) + b"abc"
            else:
                content += addx(os.urandom(chances.choice([0, 1, 20, 300])))
            count += -1 if taken else 1
            ends = kestrel._go_on(ends, not taken, bool(taken), 0)
        is_damaged = chances.random() < .4 and content
        if is_damaged:
            at = chances.randrange(len(content))
            content = content[:at] + bytes([chances.randrange(256)]) + content[at + 1:]
        found = []
        for in_runs in (True, False):
            with monkeypatch.context() as patch:
                patch.setattr(kestrel, "_LOAD_SIZE", chances.choice([64, 500, 1 << 17]))
                if not in_runs:
                    patch.setattr(kestrel, "read_run",
                                  lambda data, pos, *arguments: (pos, 0, 0, None))
                path = tmp_path / str(in_runs)
                path.mkdir(exist_ok=True)
                shutil.rmtree(path / "lost+found", ignore_errors=True)
                spool_of(path, q=content)
                queue = load(path, max_memory_size=memory)
                later = queue.delays
                found.append((queue.count, queue.bytes, queue.memory, queue.xid, later.bytes,
                              later.memory, sorted(later.due),
                              [file.waiting for file in queue.journal.files],
                              [(item.data, item.flags, item.deliveries) for item in
                               iter(lambda: queue.remove(now=NOW), None)],
                              [(each.due, each.item.data, each.item.deliveries)
                               for _, each in sorted(later.items.items())]))
                queue.close()
        assert found[0][-2:] == found[1][-2:]
        assert found[0] == found[1] or is_damaged and checked


def test_read_behind_reads_in_large_pieces(tmp_path, monkeypatch):
    queue = turn_queue(tmp_path, max_memory_size=4 << 20)
    for number in range(15000):
        queue.add(b"x" * 1000, now=NOW)
    queue.write()
    reads = []
    real = os.pread
    monkeypatch.setattr(kestrel.os, "pread",
                        lambda fd, size, offset: reads.append(size) or real(fd, size, offset))
    assert len(take(queue, 15000)) == 15000
    assert len(reads) < 20 and sorted(reads)[1] >= 1 << 20
    queue.write()
    queue.close()


@promise(1)
@pytest.mark.parametrize("limit", ["max_items", "max_size"])
def test_a_refused_item_does_not_leave_the_queue_behind(tmp_path, limit):
    """The next item that was stored was taken for the refused one, and was gone; an empty queue
    was rewritten without end."""
    queue = turn_queue(tmp_path, max_memory_size=2000, default_journal_size=1000, **{limit: 1})
    assert queue.add(b"a" * 3000, now=NOW) and not queue.add(b"b" * 3000, now=NOW)
    queue.write()
    for data in (b"c", b"d"):
        take(queue, 1)
        queue.write()
        for _ in range(30):
            queue.host.step()
        assert not queue.host.tasks
        assert queue.add(data, now=NOW) and not queue.add(b"b" * 3000, now=NOW)
        queue.write()
        assert queue.items[0].data == data
    queue.close()
    assert len(os.listdir(str(tmp_path))) < 3 and contents_of(tmp_path) == [b"d"]


def test_a_queue_of_which_nothing_is_on_disk_only_is_loaded_as_such(tmp_path):
    queue = load(tmp_path, max_memory_size=3000)
    fill(queue, *[b"x" * 1000] * 6)
    take(queue, 1, open=True)
    take(queue, 5)
    queue.journal.close()
    queue = load(tmp_path, max_memory_size=3000)
    assert queue.count == 1 and not queue._behind
    queue.close()


@pytest.mark.parametrize("host", [None, Bench])
def test_a_journal_is_rewritten_for_each_doubling_only(tmp_path, host):
    """It was rewritten again and again when what it holds is larger than max_journal_size."""
    queue = kestrel.Queue("q", str(tmp_path), kestrel.QueueConfig(
        max_memory_size=20000, max_journal_size=20000, min_journal_compact_delay=0,
        sync_journal=None), host=host and host(), now=NOW)
    fill(queue, *[b"x" * 50000] * 8)
    xids = [item.xid for item in take(queue, 8, open=True)]
    for _ in range(50):
        queue.write()
        if host:
            while queue.host.calls:
                queue.host.calls.pop()()
            queue.host.step()
    assert queue.counters.journal_rewrites <= 4
    assert queue.abort(*xids) == 8 and len(data_of(take(queue, 8))) == 8
    queue.close()


@promise(6)
def test_expired_items_in_front_of_one_whose_data_is_on_disk_only(tmp_path):
    """The item came without its data, which was an exception, and was gone."""
    queue = load(tmp_path, max_memory_size=5000)
    fill(queue, *[b"x" * 1000] * 8)
    fill(queue, b"short", expiry=NOW + 5)
    fill(queue, b"y" * 9000, b"last")
    assert data_of(take(queue, 8)) == [b"x" * 1000] * 8
    assert data_of(take(queue, 3, NOW + 10)) == [b"y" * 9000, b"last", None]
    queue.close()


@promise(6)
@pytest.mark.parametrize("records, taken", [
    (b"\1" * 3, 3), (b"\1" * 25, 25), (xid_record(9, 5) + xid_record(6, 5), 1),
    (xid_record(9, 5), 0), (xid_record(9, 5) + b"\1" + xid_record(5, 5), 1),
    (xid_record(5, 5), 0), (xid_record(6, 5) + addx(b"more"), 0)],
    ids=["removes", "many", "confirm", "open", "unremove", "ignored", "ignored-and-added"])
@pytest.mark.parametrize("lives", [1, 3, 100])
def test_a_spool_of_kestrel_whose_newest_file_takes_from_older_ones(tmp_path, records, taken,
                                                                    lives):
    """As Kestrel leaves it when it was reading behind; items of the other files were lost."""
    items = [b"item%02d" % number + b"." * 100 for number in range(40)]
    spool_of(tmp_path, **{"q__%d" % number: b"".join(map(addx, items[number * 10:][:10]))
                          for number in range(4)}, q=records)
    expected = items[taken:]
    if b"\5\5" in records and taken:        # the second is taken while the first is open
        expected = items[:1] + items[2:]
    if records.endswith(b"more"):
        expected.append(b"more")
    found = []
    while len(found) < 100:
        queue = load(tmp_path, max_memory_size=1000)
        assert queue.count == len(expected) - len(found)
        found += filter(None, data_of(take(queue, -(-40 // lives))))
        opened = queue.remove(open=True, now=NOW)
        if opened and not len(found) % 2:
            queue.confirm(opened.xid)
            found.append(opened.data)
        queue.close()
        if not opened:
            break
    assert found == expected
    assert contents_of(tmp_path) == []


def test_an_item_that_carries_its_xid_keeps_it_on_disk(tmp_path):
    """ADD_XID, of a file that Kestrel 1.x rewrote: the item came back, though confirmed."""
    spool_of(tmp_path, q=addx(b"x" * 1000) * 9 + struct.pack("<Biiqq", 7, 55, 21, NOW, 0)
             + b"tried" + b"\1" * 9 + b"\3" + xid_record(6, 55) + addx(b"last"))
    assert contents(load(tmp_path, max_memory_size=2000)) == [b"last"]


@promise(6)
def test_a_spool_of_kestrel_of_which_a_file_is_damaged_and_one_missing(tmp_path, caplog):
    items = [b"item%02d" % number + b"." * 100 for number in range(60)]
    spool_of(tmp_path, **{"q__%d" % number: b"".join(map(addx, items[number * 10:][:10]))
                          for number in range(6)}, q=b"\1" * 3)
    queue = load(tmp_path, max_memory_size=1000)
    (tmp_path / "q.2").write_bytes(b"".join(map(addx, items[20:24])) + b"\xff" * 40
                                   + b"".join(map(addx, items[25:30])))
    (tmp_path / "q.4").unlink()
    fill(queue, b"new")
    found = []
    while queue.count:
        item = queue.remove(now=NOW)
        if item and not kestrel.is_lost(item):
            found.append(item.data)
        assert len(found) < 100
    assert found == items[3:24] + items[25:40] + items[50:] + [b"new"]
    queue.close()
    assert contents_of(tmp_path) == []


def test_delayed_items_survive_all_that_happens_to_their_files(tmp_path):
    """Rotation, packing, restarts and a deep backlog in front."""
    settings = dict(max_memory_size=20000, max_journal_size=30000, default_journal_size=100)
    queue = load(tmp_path, **settings)
    for number in range(60):
        queue.add_later(b"late%02d" % number, 1000 - number, flags=number, now=NOW)
        fill(queue, b"%02d" % number + b"." * 100)
        queue.confirm(queue.remove(open=True, now=NOW).xid)
        if number < 8:
            fill(queue, b"held%02d" % number)
            queue.abort(queue.remove(open=True, now=NOW).xid, delay=500 + number, now=NOW)
        if number % 20 == 19:
            fill(queue, *[b"+" * 1000] * 30)
            assert queue.upkeep.queue._behind
            queue.close()
            queue = load(tmp_path, **settings)
            assert len(queue.delays.items) == number + 9
            take(queue, 30)
    assert queue.count == 0
    found = take(queue, 68, NOW + 1000)
    assert data_of(found) == [b"held%02d" % number for number in range(8)] + [
        b"late%02d" % number for number in reversed(range(60))]
    assert [item.flags for item in found[8:]] == list(reversed(range(60)))
    queue.close()
    assert contents_of(tmp_path, now=FAR) == []


def test_a_delayed_item_that_is_in_two_files_is_there_once(tmp_path):
    """A pack keeps all that is delayed, also what has been added to the current file."""
    spool_of(tmp_path, q__1=delayed_record(5, NOW + 5, b"late"),
             q=delayed_record(5, NOW + 5, b"late") + addx(b"x"))
    queue = load(tmp_path)
    assert queue.delays.bytes == 4 and queue.open_memory == 4 + kestrel.ITEM_COST
    assert data_of(take(queue, 3, NOW + 5)) == [b"x", b"late", None]
    queue.close()


def test_a_delayed_item_among_items_that_stay_on_disk_is_checked_when_it_is_loaded(tmp_path):
    content, ends = kestrel._mark(True, 0), 0
    for number in range(9):
        write = [addx(b"%d" % number * 100), addx(b"y")]
        if number == 6:
            write[1:1] = [delayed_record(5, NOW + 5, b"late")]
        ends = kestrel._go_on(ends, 2, 0, 0)
        content += kestrel._checked(write, sum(map(len, write)), ends)[0]
    spool_of(tmp_path, q=content)
    queue = load(tmp_path, max_memory_size=1)
    assert queue._behind and data_of(take(queue, 19, NOW + 5)).count(b"late") == 1
    queue.close()
    spool_of(tmp_path, q=content.replace(b"late", b"lbte"))
    queue = load(tmp_path, max_memory_size=1)
    assert data_of(take(queue, 16, NOW + 5)) == [
        data for number in range(9) if number != 6 for data in (b"%d" % number * 100, b"y")]
    assert not queue.delays.items and not queue.count
    queue.close()


@pytest.mark.parametrize("adds", [
    addx(b"x") * 3 + delayed_record(5, NOW, b"late", 1000001),
    addx(b"x") * 3 + struct.pack("<BiqqII", 10, 27, NOW, 0, 7, 1000001) + b"abc"],
    ids=["ADD_DELAYED", "ADDF"])
def test_an_impossible_count_of_deliveries_is_damage_in_a_run_of_records_too(tmp_path, adds):
    spool_of(tmp_path, q=adds + addx(b"y") * 9)
    queue = load(tmp_path)
    assert set(data_of(take(queue, 13, NOW))) <= {b"x", b"y", None}
    assert os.listdir(str(tmp_path / "lost+found"))
    queue.close()


def checked_file(path, turns):
    """Write a journal; turns: for each write a function that is given the queue. Return for each
    write (where it begins, the data of the items in it)."""
    queue = kestrel.Queue("q", str(path), kestrel.QueueConfig(sync_journal=None), host=Bench(),
                          now=NOW)
    writes = []
    for turn in turns:
        begin = queue.journal.size
        turn(queue)
        items = [op[1].data for op in queue.history.ops if op[0] == kestrel.ADDX]
        queue.write()
        writes.append((begin, items))
    queue.journal.close()
    return writes


def one_of_each(chances):
    """Writes of all kinds."""
    def put(number, count=1):
        return lambda queue: fill(queue, *[b"%03d-%d " % (number, one) + bytes(
            chances.randrange(256) for _ in range(chances.randrange(60))) for one in range(count)])

    turns = [put(number, 1 + number % 3) for number in range(12)]
    turns[5:5] = [lambda queue: take(queue, 2), lambda queue: take(queue, 1, open=True)]
    turns[9:9] = [lambda queue: queue.confirm(1), lambda queue: take(queue, 1, open=True),
                  lambda queue: queue.abort(2, now=NOW)]
    turns[12:12] = [lambda queue: queue.add(b"flags", 7, now=NOW), lambda queue: take(queue, 1)]
    return turns


def survivors_of(path, data):
    """What is delivered from a journal of these bytes."""
    shutil.rmtree(str(path), ignore_errors=True)
    path.mkdir()
    (path / "q").write_bytes(data)
    return contents(load(path))


def check_survivors(found, items, writes, hit, after):
    """Nothing is delivered that was never put; of what was to be delivered only the items of the
    writes that were hit are missing; what comes back had been taken."""
    assert not set(found) - set(items), "wrong data"
    in_hit = {item for begin, these in writes if begin in hit for item in these}
    assert not set(after) - set(found) - in_hit, "missing: %s" % [
        item[:6] for item in set(after) - set(found) - in_hit]
    assert len(set(found)) == len(found)


def test_one_flipped_bit_costs_at_most_one_write(tmp_path):
    """Some bits of a journal; every one with KESTREL_ALL_BITS."""
    chances = seeded()
    writes = checked_file(tmp_path, one_of_each(chances))
    data = (tmp_path / "q").read_bytes()
    items = [item for _, these in writes for item in these] + [b"flags"]
    after = survivors_of(tmp_path / "good", data)
    begins = [begin for begin, _ in writes] + [len(data)]
    every = "KESTREL_ALL_BITS" in os.environ
    for byte in range(0 if every else chances.randrange(8), len(data), 1 if every else 8):
        for bit in range(8) if every else (chances.randrange(8),):
            broken = bytearray(data)
            broken[byte] ^= 1 << bit
            found = survivors_of(tmp_path / "bad", broken)
            hit = max(begin for begin in begins if begin <= byte)
            try:
                check_survivors(found, items, writes + [(hit, [b"flags"])], {hit}, after)
            except AssertionError as error:
                raise AssertionError("bit %d of byte %d (write at %d): %s" % (
                    bit, byte, hit, error))
            kept = tmp_path / "bad" / "lost+found"
            assert kept.exists() or found == after


@pytest.mark.parametrize("how", [
    "zeros", "cut out", "put in", "put in again", "swapped", "shortened"])
def test_damaged_pages_cost_at_most_the_writes_in_them(tmp_path, how):
    """Nothing wrong is delivered, and nothing is lost of other writes; also where whole writes are
    cut out, moved or put in again, so that each check sum is right."""
    chances = seeded()
    writes = checked_file(tmp_path, one_of_each(chances) * 3)
    data = (tmp_path / "q").read_bytes()
    items = [item for _, these in writes for item in these] + [b"flags"]
    after = survivors_of(tmp_path / "good", data)
    begins = [begin for begin, _ in writes]
    for number in range(20):
        size = chances.choice([16, 64, 512])
        begin = chances.randrange(kestrel._CHECK.size, len(data) - 2 * size)
        end = begin + size
        if number % 2:                       # whole writes
            first = chances.randrange(1, len(begins) - 7)
            begin, middle, end = begins[first], *sorted(
                begins[first + count] for count in chances.sample(range(1, 7), 2))
        else:
            middle = end
            end += size if how == "swapped" else 0
        broken = bytearray(data)
        if how == "zeros":
            broken[begin:end] = bytes(end - begin)
        elif how == "cut out":
            del broken[begin:end]
        elif how == "put in":
            broken[begin:begin] = bytes(chances.randrange(256) for _ in range(size))
        elif how == "put in again":
            at = chances.choice(begins[1:] if number % 2 else range(kestrel._CHECK.size, len(data)))
            broken[at:at] = data[begin:end]
            begin = end = at
        elif how == "swapped":
            broken[begin:end] = data[middle:end] + data[begin:middle]
        else:
            del broken[begin:]
            end = len(data)
        hit = {one for one, next_one in zip(begins, begins[1:] + [len(data)])
               if one <= end and next_one > begin - 17}
        found = survivors_of(tmp_path / "bad", broken)
        in_hit = {item for one, these in writes if one in hit for item in these} | {b"flags"}
        assert not set(found) - set(items), (begin, size)
        missing = [item[:6] for item in set(after) - set(found) - in_hit]
        assert not missing, (begin, end, missing)


def test_damage_of_one_of_several_files_costs_what_is_in_it(tmp_path):
    """Puts and takes of one write go to different files, and the newer one becomes the head."""
    items = [b"%02d" % number + b"x" * 40 for number in range(60)]
    queue = turn_queue(tmp_path, max_memory_size=600)
    for number, item in enumerate(items):
        fill(queue, item)
        if number > 20:
            take(queue, 1)
        queue.write()
        for _ in range(20):
            queue.host.step()
    paths = [path for path in tmp_path.iterdir() if path.is_file()]
    good = contents_of(tmp_path)
    queue.journal.close()
    assert len(paths) > 2 and len(good) == 21
    for path in paths:
        data = path.read_bytes()
        for item in items:
            if item in data:
                path.write_bytes(data.replace(item, item[:-1] + b"?"))
                found = contents_of(tmp_path)
                assert set(good) - set(found) <= {item} and set(found) <= set(items)
                path.write_bytes(data)


def test_no_age_is_shown_of_what_stands_for_a_lost_item(tmp_path):
    checked_file(tmp_path, [lambda queue: fill(queue, b"a"), lambda queue: fill(queue, b"b")])
    data = (tmp_path / "q").read_bytes()
    (tmp_path / "q").write_bytes(data.replace(b"\0a", b"\0?"))
    queue = load(tmp_path)
    stats = {one.name: one for one in kestrel.QUEUE_STATS}
    assert stats["head_wait"].get(queue, NOW + 5) == 0
    assert data_of(take(queue, 1)) == [b"b"]
    queue.close()


def test_a_mixed_file_is_checked_where_there_are_check_sums(tmp_path):
    for number, setting in enumerate([False, True, False, True]):
        queue = load(tmp_path, check_journal=setting)
        fill(queue, b"%da" % number, b"%db" % number)
        queue.close()
    data = (tmp_path / "q").read_bytes()
    names = [record["operation"] for record in kestrel.dump_records(str(tmp_path / "q"))]
    assert names == ["ADDX"] * 2 + ["CHECK", "ADDX", "CHECK", "ADDX", "CHECK", "CHECK"] + [
        "ADDX"] * 2 + ["CHECK", "ADDX", "CHECK", "ADDX", "CHECK"]
    assert contents(load(tmp_path)) == [b"%d%c" % (number, one) for number in range(4)
                                        for one in b"ab"]
    for where, lost in ((b"1b", [b"1b"]), (b"2a", []), (b"3a", [b"3a"])):
        broken = data.replace(where, b"??")
        found = survivors_of(tmp_path / "bad", broken)
        assert (b"??" in found) == (not lost)        # without a check sum nobody can know
        assert [item for item in found if item != b"??"] == [
            b"%d%c" % (number, one) for number in range(4) for one in b"ab"
            if b"%d%c" % (number, one) != where]


def checked_journal(*writes, waiting=0, before=0):
    """The bytes of a journal file; writes: of operations; waiting: how many items of older files
    wait when operations at the head begin in it; before: how many the last of those has added."""
    ends = kestrel._go_on(0, waiting, 0, kestrel._BEGUN_ANEW + before if waiting else 0)
    data = kestrel._mark(True, ends)
    for ops in writes:
        chunks, ends = kestrel._encode_checked(ops, ends)
        data += b"".join(chunks)
    return data


@promise(6)
@pytest.mark.parametrize("lost", range(4))
def test_a_file_that_has_lost_its_end_costs_only_what_was_not_fsynced(tmp_path, lost):
    """A power failure, and the kernel had written the newer file first."""
    older = [add_records(b"a", b"b", b"c"), remove_records(1), [(kestrel.OPEN, None, 5)],
             remove_records(1)]
    newer = [add_records(b"d", b"e", b"f"), remove_records(1),
             [(kestrel.UNREMOVE, None, 5)] + remove_records(1)]
    (tmp_path / "q.1").write_bytes(checked_journal(*older[:4 - lost]))
    (tmp_path / "q").write_bytes(checked_journal(*newer))
    # d, and b which was put back, were taken after all that is lost.
    expected = [[], [b"c"], [b"b", b"c"], [b"a", b"b", b"c"]][lost] + [b"e", b"f"]
    queue = load(tmp_path)
    queue.journal.close()
    assert contents_of(tmp_path) == expected
    assert contents(load(tmp_path)) == expected and contents_of(tmp_path) == []


def remove_records(count):
    return [(kestrel.REMOVE, None, 0)] * count


def add_records(*datas):
    return [(kestrel.ADDX, kestrel.Item(data, NOW), 0) for data in datas]


@promise(6)
def test_a_damaged_mark_costs_no_items_whatever_ends_it_had(tmp_path):
    """A file that was begun without check sums: what its ends should be may not be known."""
    ends = kestrel._first_ends(3, 5)
    good = addx(b"d")
    checks, _ = kestrel._encode_checked([(kestrel.REMOVE, None, 0)], ends)
    mark = kestrel._mark(True, ends)
    for place in range(len(mark)):
        path = tmp_path / str(place)
        path.mkdir()
        spool_of(path, **{"q.1": addx(b"a") + addx(b"b") + addx(b"c"),
                          "q": good + damaged("flip", mark, place) + b"".join(checks)})
        assert contents(load(path)) == [b"b", b"c", b"d"]


@promise(6)
def test_a_lost_open_costs_no_item_where_check_sums_have_ended(tmp_path):
    items, ends = kestrel._encode_checked([(kestrel.ADDX, kestrel.Item(data, NOW), 0)
                                           for data in (b"a", b"b")], 0)
    open_a, after = kestrel._encode_checked([(kestrel.OPEN, None, 1)], ends)
    data = kestrel._mark(True, 0) + b"".join(items)
    place = len(data) + 2
    data += b"".join(open_a) + kestrel._mark(False, after) + xid_record(5, 1) + b"\1"
    spool_of(tmp_path, q=damaged("flip", data, place))
    queue = load(tmp_path)
    assert sorted(contents(queue)) == [b"a", b"b"]     # that of the damaged write comes back


@promise(3)
def test_a_write_cut_short_is_not_taken_for_a_damaged_mark(tmp_path):
    """One in a hundred was, where it began with few bits: then the rest of it was believed, and
    took items of others."""
    torn = xid_record(9, 48) + addx(b"expired", 0, 1) + b"\1" * 3 + addx(b"new")
    for count in range(1, 100):
        (tmp_path / "q").write_bytes(checked_journal(add_records(*[b"a"] * count)) + torn)
        assert len(contents(load(tmp_path))) == count


@pytest.mark.parametrize("taken", [0, 3])
def test_a_bit_of_a_mark_costs_no_item(tmp_path, taken):
    """Where check sums begin or end in the middle of a file, for a setting was changed. Some bits;
    every one with KESTREL_ALL_BITS."""
    def checked(count, ends):
        chunks, ends = kestrel._encode_checked(
            add_records(b"c%d" % count, b"C") + remove_records(taken), ends)
        return b"".join(chunks), ends

    def unchecked(letter):
        return b"".join(kestrel._encode(add_records(*[letter * number for number in range(9)]))[0])

    first, ends = checked(1, 0)
    second, after = checked(2, ends)
    begin, end, again = kestrel._mark(True, 0), kestrel._mark(False, ends), kestrel._mark(True, ends)
    parts = [unchecked(b"u"), begin, first, end, unchecked(b"v"), again, second]
    spool_of(tmp_path, q=b"".join(parts))
    expected = contents_of(tmp_path)
    assert len(expected) == 22 - 2 * taken
    bits = range(17 * 8)
    if "KESTREL_ALL_BITS" not in os.environ:
        bits = [*range(8), *seeded().sample(bits[8:], 12)]
    for number, mark in ((1, begin), (3, end), (5, again)):
        for bit in bits:
            flipped = bytearray(mark)
            flipped[bit // 8] ^= 1 << bit % 8
            spool_of(tmp_path, q=b"".join(parts[:number] + [flipped] + parts[number + 1:]))
            assert contents_of(tmp_path) == expected, (number, bit)


@pytest.mark.parametrize("last, expected", [
    (add_records(b"d"), [b"b", b"c", b"d"]), (remove_records(1), [b"c"]),
    ([(kestrel.OPEN, None, 8)], [b"b", b"c"]), ([(kestrel.SAVE_XID, None, 8)], [b"b", b"c"])])
def test_a_bit_of_the_ends_in_a_check_sum_costs_no_item(tmp_path, caplog, last, expected):
    """What it covers is proved right by the sum; only the CHECK is written anew. `last` is the last
    write, for which no later one can tell that."""
    writes = [add_records(b"a", b"b"), remove_records(1), [(kestrel.OPEN, None, 7)],
              add_records(b"c"), [(kestrel.UNREMOVE, None, 7)], last]
    data = checked_journal(*writes)
    spool_of(tmp_path, q=data)
    assert contents_of(tmp_path) == expected
    bits = range(64)
    if "KESTREL_ALL_BITS" not in os.environ:
        bits = [*seeded().sample(bits, 2), 16]         # one take more
    for count in range(1, len(writes) + 1):
        end = len(checked_journal(*writes[:count]))
        for bit in bits:
            broken = bytearray(data)
            broken[end - 8 + bit // 8] ^= 1 << bit % 8
            spool_of(tmp_path, q=broken)
            load(tmp_path).journal.close()
            assert "write out of sequence at byte" in caplog.text
            caplog.clear()
            assert contents_of(tmp_path) == expected, (count, bit)
            assert not caplog.text, "it was mended for good"


def test_tools_tell_of_writes_that_are_missing(tmp_path, main):
    data = checked_journal(add_records(b"a"), add_records(b"b"), add_records(b"c"))
    size = len(data) - 17
    spool_of(tmp_path, q=data[:17 + size // 3] + data[17 + size // 3 * 2:])
    _, told, _ = main("--verify", tmp_path)
    assert "write out of sequence: some writes are missing at byte 56; 1 items may be lost" in told
    assert "write out of sequence; some writes are missing" in main("--dump", tmp_path / "q")[1]


@promise(3)
@pytest.mark.parametrize("missing, expected", [
    (0, [b"c", b"d", b"e"]), (1, [b"c", b"d", b"e"]), (2, [b"a", b"b", b"c", b"d", b"e"]),
    (3, [b"d", b"e"]), (4, [b"c", b"e"])])
def test_a_write_that_is_cut_out_costs_nothing_of_others(tmp_path, caplog, missing, expected):
    """All check sums are right then. Later takes took items of other writes: they took the next
    ones."""
    writes = [add_records(b"a"), add_records(b"b"), remove_records(2), add_records(b"c"),
              add_records(b"d"), add_records(b"e")]
    ends, parts = 0, []
    for ops in writes:
        chunks, ends = kestrel._encode_checked(ops, ends)
        parts.append(b"".join(chunks))
    del parts[missing]
    spool_of(tmp_path, q=kestrel._mark(True, 0) + b"".join(parts))
    for _ in range(2):
        assert contents_of(tmp_path) == expected
    assert "write out of sequence at byte" in caplog.text and "are missing there" in caplog.text


@pytest.mark.parametrize("covers", [17, 39, 34])
def test_a_check_of_what_has_been_checked_already_is_damage(tmp_path, covers):
    """It is right for the bytes before it. The queue is loaded once it is cut out: it was put in
    again, for ever; where check sums had ended it was a struct.error."""
    records, ends = kestrel._encode_checked(add_records(b"a"), 0)
    data = kestrel._mark(True, 0) + b"".join(records)
    if covers == 34:
        data += kestrel._mark(False, ends)
    spool_of(tmp_path, q=data + kestrel._CHECK.pack(
        kestrel.CHECK, covers, kestrel.zlib.crc32(data[-covers:]), ends))
    for _ in range(2):
        assert contents_of(tmp_path) == [b"a"]


def test_a_repair_that_does_not_help_ends(tmp_path, monkeypatch):
    """So that no queue keeps the server from starting."""
    monkeypatch.setattr(kestrel.Journal, "repair", lambda *_: 1)
    spool_of(tmp_path, q=addx(b"a") + b"\xee" * 100 + addx(b"b"))
    with pytest.raises(OSError, match="cannot be repaired"):
        load(tmp_path)


def test_journals_that_were_joined_are_read_one_after_the_other(tmp_path):
    data = checked_journal(add_records(b"a", b"b"), remove_records(1))
    spool_of(tmp_path, q=data + data)
    for _ in range(2):
        assert contents_of(tmp_path) == [b"a", b"b"]     # the second one takes b of the first


@promise(6)
def test_a_file_of_which_nothing_reached_the_disk(tmp_path):
    """The takes and put-backs in it are lost; the newer one goes on from there."""
    opens = [(kestrel.OPEN, None, number) for number in (1, 2)]
    (tmp_path / "q.1").write_bytes(checked_journal(add_records(b"a", b"b", b"c"), opens))
    (tmp_path / "q.2").write_bytes(b"")              # UNREMOVE 1, OPEN 3, REMOVE of c
    (tmp_path / "q").write_bytes(checked_journal(
        add_records(b"d", b"e"), [(kestrel.UNREMOVE, None, 3)] + remove_records(2)))
    for _ in range(2):
        assert contents_of(tmp_path) == [b"a", b"b", b"c", b"e"]


@promise(6)
@pytest.mark.parametrize("lost, expected", [(0, [b"c", b"d"]), (1, [b"a", b"c", b"d"])])
def test_takes_are_in_a_newer_file_while_all_is_written_anew(tmp_path, lost, expected):
    """That says how many items should wait by then."""
    (tmp_path / "q.1").write_bytes(checked_journal(
        add_records(b"a", b"b", b"c"), remove_records(1))[:-18 if lost else None])
    (tmp_path / "q").write_bytes(checked_journal(
        add_records(b"d"), remove_records(1), waiting=2, before=3))
    for _ in range(2):
        assert contents_of(tmp_path) == expected


@promise(6)
@pytest.mark.parametrize("lost, expected", [(0, [b"f"]), (1, [b"b", b"f"]), (2, [b"a", b"f"])])
def test_items_were_added_and_taken_where_the_end_is_lost(tmp_path, lost, expected):
    """While all is written anew: what was taken later was not what had been waiting before."""
    (tmp_path / "q.1").write_bytes(checked_journal(*[
        add_records(b"a"), add_records(b"b", b"c") + remove_records(1),
        add_records(b"d", b"e") + remove_records(1)][:3 - lost]))
    (tmp_path / "q").write_bytes(checked_journal(
        add_records(b"f"), remove_records(3), waiting=3, before=5))
    for _ in range(2):
        assert contents_of(tmp_path) == expected


@promise(1)
@pytest.mark.parametrize("how", [{"tail": True}, {"delay": 5}, {}])
def test_an_item_that_came_back_ever_so_often_is_no_damage(tmp_path, how):
    """It was taken for a corrupt record at the next start, and cut out."""
    queue = turn_queue(tmp_path, max_deliveries=5000000)
    fill(queue, b"a")
    queue.items[0].deliveries = kestrel._MOST_DELIVERIES
    queue.abort(queue.remove(open=True, now=NOW).xid, now=NOW, **how)
    queue.write()
    queue.journal.close()
    assert contents_of(tmp_path, now=FAR) == [b"a"]
    kestrel.Queue("q", str(tmp_path), kestrel.QueueConfig(max_deliveries=5000000), now=FAR).pack()
    assert contents_of(tmp_path, now=FAR) == [b"a"]


@promise(5)
def test_what_cannot_be_read_though_nothing_is_damaged_is_said_so(tmp_path, monkeypatch):
    """Mending it again and again kept the server busy for ever."""
    queue = turn_queue(tmp_path, max_memory_size=2000)
    fill(queue, *[b"%d" % number for number in range(3000)])
    queue.write()

    def fail(*_):
        raise kestrel.Damage(0, "made up", torn=False)

    monkeypatch.setattr(kestrel.ReadBehind, "read", fail)
    with pytest.raises(OSError, match="nothing is damaged"):
        while True:
            queue.remove(now=NOW)
            queue.write()


@promise(1)
def test_a_flush_that_is_larger_than_a_piece_is_read_behind(tmp_path, monkeypatch):
    """It was taken for damage, mended, and met again, for ever."""
    monkeypatch.setattr(kestrel, "_SPAN", 50)
    queue = turn_queue(tmp_path, max_memory_size=2000)
    fill(queue, *[b"%d" % number for number in range(6000)])
    queue.write()
    queue.flush()
    fill(queue, b"after")
    queue.write()
    queue.journal.close()
    monkeypatch.setattr(kestrel.Queue, "_mend", None)
    assert contents(load(tmp_path, max_memory_size=2000)) == [b"after"]


@promise(6)
def test_more_items_wait_than_a_mark_has_bits_for(tmp_path):
    (tmp_path / "q.1").write_bytes(checked_journal(add_records(b"a", b"b")))
    (tmp_path / "q").write_bytes(checked_journal(remove_records(1), waiting=(1 << 24) + 2, before=2))
    assert contents_of(tmp_path) == [b"b"]


@promise(6)
@pytest.mark.parametrize("is_pack", [False, True])
def test_damage_where_a_file_begins_while_all_is_written_anew(tmp_path, is_pack):
    """How many items wait in older files is known from these."""
    older = checked_journal(add_records(b"a", b"b", b"c"))
    newer = checked_journal(add_records(b"d") + remove_records(1), remove_records(1),
                            add_records(b"e"), waiting=3, before=3)
    if is_pack:                              # in the place of a file that had added five
        begins = kestrel._PACK + 5
        older = kestrel._mark(True, begins) + b"".join(kestrel._encode_checked(
            [(kestrel.SAVE_XID, None, 0)] + add_records(b"a", b"b", b"c"), begins)[0]) + (
                kestrel._mark(False, kestrel._go_on(begins, 3, 0, 0)))
        newer = checked_journal(add_records(b"d") + remove_records(1), remove_records(1),
                                add_records(b"e"), waiting=3, before=5)
    first = len(newer) - 17 - 22 - 18        # the bytes of the mark and the first write
    for kind in [*range(17 * 8), "zeros"]:
        data = bytearray(newer)
        if kind == "zeros":
            data[:first] = bytes(first)
        else:
            data[kind // 8] ^= 1 << kind % 8
        (tmp_path / "q.1").write_bytes(older)
        (tmp_path / "q").write_bytes(data)
        # With zeros the first take is lost too, and what it took comes back.
        expected = [b"a", b"c", b"e"] if kind == "zeros" else [b"c", b"d", b"e"]
        assert contents_of(tmp_path) == expected, kind


@promise(6)
def test_a_restart_while_all_is_written_anew(tmp_path):
    """Nothing was taken since: the newer file is the head all the same, as it says."""
    (tmp_path / "q.1").write_bytes(checked_journal(add_records(b"a", b"b")))
    (tmp_path / "q").write_bytes(checked_journal([(kestrel.PAUSE, None, 0)], waiting=2, before=2))
    queue = load(tmp_path)
    fill(queue, b"c", b"d")
    assert data_of(take(queue, 3)) == [b"a", b"b", b"c"]
    queue.close()
    for _ in range(2):
        assert contents_of(tmp_path) == [b"d"]


@promise(3)
def test_check_sums_begin_again_while_all_is_written_anew(tmp_path):
    """After a crash amid that the end of the older file seemed to be lost, and what had been taken
    came back."""
    queue = turn_queue(tmp_path, sync_journal=100)
    fill(queue, *[b"%d" % number * 600 for number in range(10)])
    queue.write()
    queue.configure(kestrel.QueueConfig(check_journal=False, max_journal_size=4000))
    while not queue.journal.passings:
        queue.write()
        queue.host.step()
    fill(queue, b"last")
    queue.write()
    queue.configure(kestrel.QueueConfig(check_journal=True, max_journal_size=4000))
    take(queue, 3)
    queue.write()
    assert contents_of(tmp_path) == data_of(queue.items)
    queue.close()


def test_a_bit_of_where_check_sums_begin_costs_nothing(tmp_path):
    """Each write was damaged without it, and cut out of its own."""
    checked_file(tmp_path, one_of_each(seeded()))
    data = bytearray((tmp_path / "q").read_bytes())
    good = survivors_of(tmp_path / "good", data)
    for bit in range(17 * 8):
        data[bit // 8] ^= 1 << bit % 8
        assert survivors_of(tmp_path / "bad", data) == good
        assert len(os.listdir(str(tmp_path / "bad" / "lost+found"))) == 1
        data[bit // 8] ^= 1 << bit % 8


@promise(6)
def test_a_file_that_is_repaired_while_it_is_read_behind_is_written_to(tmp_path):
    """There were check sums in it without a beginning, and what was good was taken for damaged."""
    queue = turn_queue(tmp_path, max_memory_size=600, default_journal_size=300,
                       max_journal_size=5000)
    items = [b"%02d" % number + b"x" * 40 for number in range(60)]
    for item in items:
        fill(queue, item)
        queue.write()
        for _ in range(20):
            queue.host.step()
    path = max((one for one in tmp_path.iterdir() if one.name != "q"), key=str)
    data = path.read_bytes()
    hit = {item for item in items if item in data}
    path.write_bytes(bytes(100) + data[100:])
    found = []
    while len(found) < 70:
        found += data_of(take(queue, 1))
        queue.write()
        for _ in range(20):
            queue.host.step()
    queue.journal.close()
    found = list(filter(None, found))
    assert set(items) - set(found) <= hit and found == sorted(set(found))
    assert contents_of(tmp_path) == []


def writes_of(path):
    """The writes of a journal file as (begin, end, the items in it)."""
    found, begin, items = [], 0, set()
    with open(path, "rb") as file:
        for opcode, _, item, end in kestrel.read_records(file):
            items |= {item and item.data}
            if opcode == kestrel.CHECK:
                found.append((begin, end, items))
                begin, items = end, set()
    return found


@promise(6)
@pytest.mark.parametrize("serial", range(8))
def test_damage_to_any_file_costs_the_writes_that_are_hit(tmp_path, serial):
    """Whatever the queue did before; started on it, or running."""
    chances = seeded()
    (tmp_path / "spool").mkdir()
    life = Life(tmp_path / "spool", chances, checked=True)
    for _ in range(chances.randrange(20, 120)):
        for _ in range(chances.randrange(12)):
            life.change()
        life.write()
        life.bench.step()
    life.queue.journal.close()
    good = contents_of(tmp_path / "spool", now=FAR)
    files = {path: writes_of(path) for path in (tmp_path / "spool").iterdir()
             if path.is_file() and path.stat().st_size}
    for trial in range(6 if files else 0):
        path, writes = chances.choice(sorted(files.items()))
        data = bytearray(path.read_bytes())
        begin = chances.randrange(len(data))
        kind = chances.choice(["bit", "page of 512", "page of 4096", "end"])
        end = len(data)
        if kind == "bit":
            data[begin] ^= 1 << chances.randrange(8)
            end = begin + 1
        elif kind == "end":
            del data[begin:]
        else:
            size = int(kind[8:])
            begin -= begin % size
            end = min(len(data), begin + size)
            data[begin:end] = bytes(end - begin)
        hit = set().union(*[items for one, after, items in writes if one < end and after > begin])
        bad = tmp_path / str(trial)
        shutil.copytree(str(tmp_path / "spool"), str(bad))
        (bad / path.name).write_bytes(data)
        found = contents_of(bad, now=FAR)
        missing = set(good) - set(found) - hit
        assert not missing, (path.name, begin, kind)
        queue = load(bad, max_memory_size=chances.choice([300, 10000]))
        queue.journal.close()                # it is repaired by now
        assert set(contents_of(bad, now=FAR)) == set(found)


def test_no_read_is_opened_under_a_number_that_a_later_file_ends(tmp_path):
    """It would end that one, and the item would be lost."""
    spool_of(tmp_path, q__1=b"".join(addx(b"%d" % number) for number in range(3)),
             q=delayed_record(1, NOW, b"late")
             + struct.pack("<BiiqqII", 12, 1, 28, NOW, 0, 0, 0) + b"late")
    queue = load(tmp_path)
    assert take(queue, 1, open=True)[0].xid > 1
    queue.journal.close()
    assert contents_of(tmp_path) == [b"0", b"1", b"2", b"late"]


@pytest.mark.parametrize("to_tail", ["delayed", "opened"])
def test_numbers_of_reads_that_have_started_over_are_not_given_again(tmp_path, to_tail):
    """They were, after a restart, if there was a delayed item from before that: an item was lost."""
    queue = turn_queue(tmp_path, max_memory_size=2000, sync_journal=100)
    items = [b"%d" % number * 30 for number in range(100, 160)]
    for item in items:
        queue.add(item, now=NOW)
        queue.write()
        queue.host.run()
    queue.xid = kestrel._ASIDE - 2
    queue.add_later(b"delayed", 1000, now=NOW)        # _ASIDE - 1
    if to_tail == "delayed":
        queue.add_later(b"last", 10, now=NOW)         # 1
        queue.write()
        queue.peek(NOW + 10)
    else:
        items.append(items.pop(0))
        item = queue.remove(open=True, now=NOW)       # 1
        queue.write()
        queue.abort(item.xid, now=NOW, tail=True)
    queue.write()
    queue.journal.close()
    queue = load(tmp_path)
    assert queue.remove(open=True, now=NOW).xid == 2
    queue.journal.close()
    assert contents_of(tmp_path)[:len(items)] == items
    assert [one.item.data for one in queue.delays.items.values()] == [b"delayed"]


def test_what_fails_later_is_no_answer_to_what_was_written(tmp_path, disk, monkeypatch):
    """A set that waits for its fsync; that ends in the turn in which another one fails."""
    goes_on, fsync = threading.Event(), os.fsync
    with turned_by_hand(tmp_path, "[server]\nmin_free_space = 0\n[queue]\nsync_journal = never\n",
                        2) as (server, (client, other)):
        client.send("set q 0 0 1\r\na\r\n")
        while "q" not in server.broker.queues or server.broker.queues["q"].journal.unsynced == set():
            server.turn()
        assert client.line() == "STORED\r\n"
        monkeypatch.setattr(os, "fsync", lambda fd: (goes_on.wait(20), fsync(fd)))
        client.send("set q/sync 0 0 1\r\nx\r\n")
        while not server.broker.queues["q"].history.syncing:
            server.turn()
        disk.failing = {"pwrite": errno.ENOSPC}
        other.send("set q 0 0 1\r\ny\r\n")
        done = len(server.worker.done)
        goes_on.set()
        until(lambda: len(server.worker.done) > done)
        server.turn()                        # both are there in this one
        disk.failing = {}
        for _ in range(10):
            server.interrupt()
            server.turn()
        assert other.line().startswith("SERVER_ERROR") and client.line() == "STORED\r\n"


def test_who_waits_for_an_fsync_hears_that_it_was_undone(tmp_path, disk):
    queue = turn_queue(tmp_path)
    fill(queue, b"a")
    told = []
    queue.history.when_durable(told.append)
    disk.failing = {"pwrite": errno.ENOSPC}
    with pytest.raises(OSError):
        queue.write()
    assert [error.errno for error in told] == [errno.ENOSPC] and not queue.history.syncing
    queue.close()


def test_delayed_items_are_dumped_and_packed(tmp_path):
    queue = load(tmp_path)
    queue.add_later(b"late", 50, flags=3, now=NOW)
    fill(queue, b"a")
    queue.abort(queue.remove(open=True, now=NOW).xid, delay=70, now=NOW)
    queue.pause(kestrel.PAUSED_IN)
    records = list(kestrel.dump_records(str(tmp_path / "q")))
    assert [(record["operation"], record.get("due")) for record in records
            if record["operation"] != "CHECK"] == [
        ("ADD_DELAYED", NOW + 50), ("ADDX", None), ("REMOVE_TENTATIVE_XID", None),
        ("DELAY", NOW + 70), ("PAUSE", None)]
    queue.pack()
    queue.close()
    assert os.listdir(str(tmp_path)) == ["q"]
    queue = load(tmp_path)
    assert queue.paused == kestrel.PAUSED_IN
    assert data_of(take(queue, 3, NOW + 60)) == [b"late", None, None]
    assert data_of(take(queue, 2, NOW + 70)) == [b"a", None]
    queue.close()


def test_many_delayed_items_do_not_slow_the_queue_down():
    """Counted, not timed: what a get and a put look at does not grow with their number."""
    queue = memory_queue()
    for number in range(4000):
        queue.add_later(b"", 1000 + (number * 7919) % 4000, now=NOW)
    looks = []
    heap = queue.delays.due
    queue.delays.next_due = lambda: looks.append(1) or heap[0][0]
    for _ in range(1000):
        fill(queue, b"x")
        assert take(queue, 1)[0].data == b"x"
    assert len(looks) <= 2000
    del queue.delays.next_due
    assert len(data_of(iter(lambda: queue.remove(now=NOW + 3000), None))) > 1800
    assert queue.delays.next_due() > NOW + 3000


def test_items_larger_than_a_piece_are_read_behind(tmp_path):
    queue = load(tmp_path, max_memory_size=5000)
    data = [bytes([number]) * (number * 3000) for number in range(10)]
    fill(queue, *data)
    assert queue.memory < 10000
    assert data_of(take(queue, 11)) == data + [None]
    queue.close()


@promise(5)
def test_items_larger_than_a_piece_that_were_written_together_are_read_behind(tmp_path):
    """The first one was taken for damaged, as it has no check sum of its own, and stayed there."""
    queue = turn_queue(tmp_path, max_memory_size=kestrel.MEMORY_FLOOR)
    items = [bytes([65 + number]) * 100000 for number in range(8)]
    fill(queue, *items)
    queue.write()
    assert data_of(take(queue, 8)) == items
    queue.close()


@promise(2)
def test_a_damaged_item_that_cannot_be_kept_stays(tmp_path, disk):
    """It was gone from memory but not from the journal: the item behind it came back."""
    queue = turn_queue(tmp_path, max_memory_size=5000)
    fill(queue, b"a", b"b" * 300000, b"c", b"d")
    queue.write()
    damage_item(queue, b"b" * 300000)
    assert queue.remove(now=NOW).data == b"a"
    disk.failing = {"mkdir": errno.ENOSPC}
    with pytest.raises(OSError):
        queue.remove(now=NOW)
    disk.failing = {}
    assert queue.remove(now=NOW).data == b"c"
    queue.write()
    assert contents_of(tmp_path) == [b"d"]
    queue.close()


def turn_queue(path, **settings):
    """A queue as a server holds it: nothing is written before write()."""
    settings.setdefault("sync_journal", None)
    return kestrel.Queue("q", str(path), kestrel.QueueConfig(**settings), host=Bench(), now=NOW)


@pytest.mark.parametrize("change", [
    lambda q, xids: q.add(b"new", now=NOW),
    lambda q, xids: q.remove(now=NOW),
    lambda q, xids: q.remove(open=True, now=NOW),
    lambda q, xids: q.confirm(xids[1]),
    lambda q, xids: q.abort(xids[1], xids[0]),
    lambda q, xids: q.flush(),
    lambda q, xids: q.discard_expired(NOW + 1000000),
    lambda q, xids: q.abort(xids[0], tail=True),
    lambda q, xids: (q.configure(kestrel.QueueConfig(
        sync_journal=None, max_deliveries=9, dead_letter_queue="dead")),
                     q.abort(xids[0], counted=False)),
    lambda q, xids: q.abort(xids[1], delay=5, now=NOW),
    lambda q, xids: q.add_later(b"late", 5, now=NOW),
    lambda q, xids: (q.abort(xids[1], delay=5, now=NOW), q.add_later(b"late", 4, now=NOW),
                     q.peek(NOW + 5)),
    lambda q, xids: (q.abort(xids[1], delay=5, now=NOW), q.flush()),
    lambda q, xids: q.pause(kestrel.PAUSED_IN),
    lambda q, xids: (q.pause(), q.pause(0)),
])
def test_a_failed_write_undoes_what_it_concerned(tmp_path, disk, change):
    queue = turn_queue(tmp_path)
    fill(queue, b"a", b"b", b"c", b"d", b"e", expiry=NOW + 10000)
    xids = [item.xid for item in take(queue, 2, open=True)]
    queue.write()
    before = state_of(queue)
    change(queue, xids)
    change(queue, xids)
    disk.failing = {"pwrite": errno.ENOSPC}
    with pytest.raises(OSError):
        queue.write()
    assert state_of(queue) == before
    disk.failing = {}
    assert contents_of(tmp_path) == [b"a", b"b", b"c", b"d", b"e"]
    change(queue, xids)                                   # and now it works
    queue.write()
    queue.close()


def test_a_tail_that_cannot_be_cut_at_once_is_cut_before_the_next_write(tmp_path, disk):
    queue = turn_queue(tmp_path)
    fill(queue, b"a")
    queue.write()
    fill(queue, b"lost")
    disk.failing = {"pwrite": errno.EIO, "ftruncate": errno.EIO}
    for _ in range(2):
        with pytest.raises(OSError):
            queue.write()
        fill(queue, b"lost too")
    disk.failing = {}
    with contextlib.suppress(OSError):
        queue.write()
    assert contents_of(tmp_path) == [b"a", b"lost too"]
    queue.close()


@promise(2)
def test_random_changes_with_random_failures(tmp_path, disk):
    """Whatever fails on the way, the journal tells what the queue holds."""
    chances = seeded()
    queue = turn_queue(tmp_path, default_journal_size=2000)
    for turn in range(300):
        for _ in range(chances.randrange(6)):
            action = chances.randrange(8)
            if action < 3:
                queue.add(b"%d" % chances.randrange(10 ** chances.randrange(1, 9)), now=NOW)
            elif action == 3:
                queue.remove(now=NOW)
            elif action == 4:
                queue.remove(open=True, now=NOW)
            elif queue.opens:
                xid = chances.choice(list(queue.opens))
                queue.confirm(xid) if action == 5 else queue.abort(xid)
        if chances.random() < 0.3:
            disk.failing = {"pwrite": errno.ENOSPC}
            if chances.random() < 0.3:
                disk.failing["ftruncate"] = errno.EIO
        with contextlib.suppress(OSError):
            queue.write()
        disk.failing = {}
        if turn % 10 == 0 and not queue.journal.torn:
            opens = [item.data for item in queue.opens.values()]
            assert contents_of(tmp_path) == opens + data_of(queue.items)
    queue.write()
    queue.close()


def test_reads_nobody_waits_for_are_put_back_after_a_failed_write(tmp_path, disk):
    queue = turn_queue(tmp_path)
    fill(queue, b"a", b"b", b"c")
    xids = [item.xid for item in take(queue, 2, open=True)]
    queue.write()
    queue.abort(*xids, orphaned=True)
    disk.failing = {"pwrite": errno.EIO}
    with pytest.raises(OSError):
        queue.write()
    assert list(queue.opens) == xids
    disk.failing = {}
    for call in queue.host.calls:
        call()
    assert not queue.opens and data_of(queue.items) == [b"a", b"b", b"c"]
    queue.write()
    assert contents_of(tmp_path) == [b"a", b"b", b"c"]
    queue.close()


def test_discarded_and_expired_items_are_off_the_record_too(tmp_path):
    queue = load(tmp_path, max_items=2, discard_old_when_full=True)
    fill(queue, b"a", b"b", b"c")
    assert contents_of(tmp_path) == [b"b", b"c"]
    fill(queue, b"d", b"e", expiry=NOW + 1)
    assert queue.discard_expired(NOW + 1) == 2
    fill(queue, b"f")
    assert contents_of(tmp_path) == [b"f"]
    queue.close()


def test_a_failed_fsync_undoes_what_waited_for_it_in_memory_and_in_the_file(tmp_path, disk):
    queue = turn_queue(tmp_path, sync_journal=0)
    fill(queue, b"a", b"b", b"c")
    item = queue.remove(open=True, now=NOW)
    queue.write()
    sync(queue)
    fill(queue, b"d")
    queue.remove(now=NOW)
    queue.write()
    fail_sync(queue)
    assert state_of(queue)[:2] == ([b"b", b"c"], {item.xid: (b"a", 0)})
    assert contents_of(tmp_path) == [b"a", b"b", b"c"]
    fill(queue, b"e")
    queue.confirm(item.xid)
    queue.write()
    assert contents_of(tmp_path) == [b"b", b"c", b"e"]
    queue.close()


class Deep:
    """A queue of several files most of which is not in memory, as a server holds it."""

    def __init__(self, path, max_memory_size=2000, **settings):
        self.bench = Bench()
        self.items = [b"%d" % number * 30 for number in range(100, 160)]
        self.queue = kestrel.Queue(
            "q", str(path), kestrel.QueueConfig(max_memory_size=max_memory_size, **settings),
            host=self.bench, now=NOW)
        for item in self.items:
            self.queue.add(item, now=NOW)
            self.queue.write()
            self.bench.run()
        sync(self.queue)
        assert len(self.queue.journal.files) > 2 and self.queue._behind


def test_a_failed_fsync_takes_back_that_a_file_was_passed(tmp_path):
    deep = Deep(tmp_path, sync_journal=0)
    queue = deep.queue
    first = queue.journal.files[0]
    queue.remove(open=True, now=NOW)
    while first in queue.journal.files:
        queue.remove(now=NOW)
        queue.write()
    assert queue.journal.passings and not deep.bench.tasks
    fail_sync(queue)
    deep.bench.run()
    assert contents_of(tmp_path) == deep.items and not queue.opens
    assert data_of(take(queue, len(deep.items))) == deep.items
    queue.write()
    sync(queue)
    deep.bench.run()
    assert contents_of(tmp_path) == []
    queue.close()


@pytest.mark.parametrize("checked", [True, False])
def test_a_failed_fsync_takes_back_what_was_read_behind(tmp_path, checked):
    """It was read up to records that were cut off, and went on amid those that came in their
    place."""
    deep = Deep(tmp_path, sync_journal=0, max_memory_size=2400, check_journal=checked)
    queue = deep.queue
    sizes = {file: file.size for file in queue.journal.files}
    while queue._behind.offset <= sizes[queue._behind.file]:
        queue.remove(now=NOW)
        queue.write()
    fail_sync(queue)
    for expected in deep.items:
        deep.bench.run()
        item = queue.remove(open=True, now=NOW)
        assert item.data == expected
        queue.write()
        queue.confirm(item.xid)
        queue.write()
        sync(queue)
    assert contents_of(tmp_path) == [] and not (tmp_path / "lost+found").exists()


@promise(2)
@pytest.mark.parametrize("before, after", [(0, kestrel.PAUSED_OUT), (kestrel.PAUSED_OUT, 0)])
def test_a_pause_that_is_refused_is_in_no_pack(tmp_path, before, after):
    """A pack that was written meanwhile had it, and so had the queue after a restart."""
    deep = Deep(tmp_path, sync_journal=0)
    queue = deep.queue
    with_pause = queue.journal.current
    queue.pause(before)
    for item in deep.items:
        queue.add(item, now=NOW)
        queue.write()
        deep.bench.run()
    queue.remove(True, NOW, even_paused=True)         # so that there is something to pack
    while with_pause in queue.journal.files:
        queue.remove(False, NOW, even_paused=True)
        queue.write()
    call, under_way = queue.begin_sync()
    call()
    queue.pause(after)
    queue.write()
    queue.synced(under_way)
    deep.bench.run()
    assert queue.journal.passed              # the pack
    fail_sync(queue)
    deep.bench.run()
    assert queue.paused == before
    queue.close()
    assert load(tmp_path).paused == before


def test_a_failed_fsync_has_every_file_in_doubt_written_anew(tmp_path):
    deep = Deep(tmp_path)
    queue = deep.queue
    rotated = queue.journal.current
    while rotated is queue.journal.current:
        queue.add(b"x" * 90, now=NOW)
        queue.write()
        deep.bench.run()
    inode = os.stat(rotated.path).st_ino
    fail_sync(queue)
    deep.bench.run()
    assert os.stat(rotated.path).st_ino != inode
    assert contents_of(tmp_path)[:len(deep.items)] == deep.items
    queue.close()


def test_an_abort_while_everything_is_written_anew_is_counted_once(tmp_path):
    """The new file had counted it already when its record came: after a restart it was two."""
    queue = turn_queue(tmp_path, sync_journal=100, max_deliveries=3)
    fill(queue, b"a")
    xid = queue.remove(open=True, now=NOW).xid
    queue.write()
    fail_sync(queue)
    queue.abort(xid, now=NOW)
    queue.host.run()
    queue.write()
    queue.journal.close()
    assert load(tmp_path, max_deliveries=3).items[0].deliveries == queue.items[0].deliveries == 1


@promise(3)
def test_a_journal_that_was_written_anew_is_rewritten_at_once(tmp_path):
    """Nothing was written in between: after a crash amid the second time the end of a file seemed
    to be lost, and what had been taken came back."""
    unfinished = 0
    for steps in range(25):
        path = tmp_path / str(steps)
        path.mkdir()
        queue = turn_queue(path, sync_journal=100, max_journal_size=4000)
        fill(queue, *[b"%d" % number * 600 for number in range(10)])
        queue.write()
        fail_sync(queue)
        for _ in range(steps):
            queue.host.step()
        if queue.upkeep.renewing is None:
            unfinished += queue.host.step()
            take(queue, 3)
            queue.write()
            sync(queue)
            assert contents_of(path) == data_of(queue.items)
        queue.close()
    assert unfinished > 5


def test_a_change_is_undone_though_nothing_can_be_read(tmp_path, disk):
    deep = Deep(tmp_path)
    queue = deep.queue
    queue.config.max_memory_size = 100000             # so that it would read on at once
    item = queue.remove(open=True, now=NOW)
    queue.write()
    queue.abort(item.xid, now=NOW)
    queue.config.max_memory_size = 1000000
    disk.failing = {"pwrite": errno.EIO, "open": errno.EIO}
    with pytest.raises(OSError):
        queue.write()
    assert list(queue.opens) == [item.xid]
    disk.failing = {}
    queue.abort(item.xid, now=NOW)
    assert data_of(take(queue, len(deep.items))) == deep.items


def test_a_late_retry_starts_no_second_chore(tmp_path, disk):
    deep = Deep(tmp_path)
    queue = deep.queue
    queue.add(b"x", now=NOW)
    queue.write()
    deep.items.append(b"x")
    fail_sync(queue)
    disk.failing = {"open": errno.EIO}
    deep.bench.run()
    assert len(deep.bench.calls) == 1                 # tries again in a while
    disk.failing = {}
    queue.upkeep.renew()                              # but this comes first
    assert len(deep.bench.tasks) == 1
    for call in deep.bench.calls:
        call()
    assert len(deep.bench.tasks) == 1
    deep.bench.run()
    assert data_of(take(queue, len(deep.items))) == deep.items
    queue.close()


def behind_three_files(path, items, size=21):
    """A queue of one item in memory and the others in q.1, q.2 and q, with a third in each."""
    third = len(items) // 3
    spool_of(path, q__1=b"".join(map(addx, items[:third])),
             q__2=b"".join(map(addx, items[third:2 * third])),
             q=b"".join(map(addx, items[2 * third:])))
    queue = kestrel.Queue("q", str(path), kestrel.QueueConfig(max_memory_size=300), (1, 2), Bench(),
                          NOW)
    assert queue.count == len(items) and len(queue.items) < third
    return queue


@promise(6)
@pytest.mark.parametrize("kind", ["flip", "zero", "cut", "insert"])
def test_damage_that_is_met_while_reading_behind(tmp_path, caplog, kind):
    """As at the start: the good items that follow come once, in order, the others are kept."""
    items = [b"item%02d-" % number + b"abc\1\2\x09z" * (number % 4) for number in range(36)]
    journal = b"".join(map(addx, items[12:24]))
    ends = [len(b"".join(map(addx, items[12:number + 1]))) for number in range(12, 24)]
    for place in range(0, len(journal), 17):
        path = tmp_path / str(place)
        path.mkdir()
        queue = behind_three_files(path, items)
        (path / "q.2").write_bytes(damaged(kind, journal, place))
        caplog.clear()
        found = []
        while queue.count:
            item = queue.remove(now=NOW)
            if item and not kestrel.is_lost(item):
                found.append(item.data)
            if len(found) % 9 == 0:
                queue.write()
                queue.host.run()
        hit = 12 + next(number for number, end in enumerate(ends) if place < end)
        near = items[max(0, hit - 1):hit + 2]
        assert [item for item in found if item in items and item not in near] == [
            item for item in items if item not in near], place
        assert len(set(found)) == len(found)
        if "cut o" in caplog.text:           # else a time was changed
            assert os.listdir(str(path / "lost+found")), place
        queue.add(b"last", now=NOW)
        queue.write()
        assert queue.bytes == 4 and contents_of(path) == [b"last"], place
        queue.close()


def test_a_file_that_is_emptied_while_it_is_read_behind(tmp_path):
    """That was the end of the server."""
    items = [b"item%02d" % number for number in range(36)]
    queue = behind_three_files(tmp_path, items)
    (tmp_path / "q.2").write_bytes(b"")
    found = []
    for _ in range(60):
        found += filter(None, data_of(take(queue, 1)))
        queue.write()
        queue.host.run()
    assert found == items[:12] + items[24:]
    assert contents_of(tmp_path) == []


def test_a_large_item_is_loaded_from_where_it_was_when_that_began(tmp_path, monkeypatch):
    """While the worker reads it a pack moves it to another place."""
    monkeypatch.setattr(kestrel, "_LARGE", 100)
    queue = turn_queue(tmp_path, max_memory_size=1000)
    work = collections.deque()
    queue.host.work = lambda *call: work.append(call)

    def work_on():
        while work:
            call, done = work.popleft()
            done(call())
        queue.host.run()

    items = [b"%02d" % number * 100 for number in range(40)]
    for item in items:
        queue.add(item, now=NOW)
        queue.write()
        work_on()
    packed = []
    while not packed:
        queue.remove(open=True, now=NOW)
        queue.write()
        while work:
            call, done = work.popleft()
            done(call())
        packed = [item for item in queue.opens.values() if item.data is None
                  and item.place.file in queue.journal.passed and queue.journal.passings]
    last = packed[-1]
    queue.abort(last.xid, now=NOW)
    assert queue.remove(now=NOW) is None      # the worker is to read it
    queue.host.run()                          # but first the file is packed
    while work:
        call, done = work.popleft()
        done(call())
    assert queue.remove(now=NOW).data == items[last.xid - 1]
    queue.host.work = None
    queue.close()


def test_keep_journal_is_turned_off_during_a_large_write(tmp_path):
    queue = turn_queue(tmp_path)
    work = []
    queue.host.work = lambda *call: work.append(call)
    queue.add(b"x" * (2 << 20), now=NOW)
    queue.write()
    queue.configure(kestrel.QueueConfig(keep_journal=False))
    for number in range(2):
        queue.add(b"y", now=NOW)
        queue.write()
        if work:
            call, done = work.pop()
            done(call())
    assert queue.history.safe == queue.history.logged and queue.count == 3
    assert os.listdir(str(tmp_path)) == []


def test_a_queue_does_not_fall_behind_while_it_is_written_anew(tmp_path):
    """It would look for its items in a file that is being replaced."""
    queue = turn_queue(tmp_path, max_memory_size=300)
    fill(queue, b"1" * 50)
    queue.write()
    queue.upkeep.renew()
    items = [b"1" * 50] + [b"%d" % number * 50 for number in range(2, 9)]
    fill(queue, *items[1:])
    queue.write()
    queue.host.run()
    queue.write()
    queue.host.run()
    assert data_of(take(queue, 9)) == items + [None]


def test_a_file_that_disappears_while_it_is_read_behind(tmp_path, caplog):
    items = [b"item%02d" % number for number in range(36)]
    queue = behind_three_files(tmp_path, items)
    queue.remove(now=NOW)
    (tmp_path / "q.2").unlink()
    found = []
    while queue.count:
        item = queue.remove(now=NOW)
        if item and not kestrel.is_lost(item):
            found.append(item.data)
        queue.write()
        queue.host.run()
    assert found == items[1:12] + items[24:]
    assert "12 items are lost" in caplog.text
    assert contents_of(tmp_path) == []
    queue.close()


@promise(6)
def test_damage_of_one_queue_costs_the_server_nothing(serve, tmp_path):
    """It was the end of the daemon once."""
    server = serve("[queue]\nmax_memory_size = 40kb\nsync_journal = never\n")
    client = server.client()
    items = [b"%06d" % number * 60 for number in range(600)]
    for item in items:                       # each in a write of its own
        assert client.put("q", item) == "STORED\r\n"
    second = sorted((tmp_path / "spool").glob("q.*"))[1]
    data = bytearray(second.read_bytes())
    data[10 * len(addx(items[0])) + 3] ^= 0x55
    second.write_bytes(data)
    found = []
    for _ in range(601):
        item = client.get("q")
        if item is not None:
            found.append(item)
    lost = set(items) - set(found)
    assert len(lost) <= 1 and found == [item for item in items if item not in lost]
    assert client.put("r", b"x") == "STORED\r\n"
    server.stop()
    assert contents_of(tmp_path / "spool") == []


def test_a_delete_waits_for_its_own_fsync(tmp_path):
    """One that began before tells nothing of it, whether it succeeds or fails."""
    for number in (None, errno.EIO):
        path = tmp_path / str(number)
        path.mkdir()
        queue = turn_queue(path, max_memory_size=300, sync_journal=0)
        queue.host.work = lambda call, done: None
        for _ in range(5):
            queue.add(b"x" * 100, now=NOW)
            queue.write()
            queue.host.run()
        call, under_way = queue.begin_sync()
        queue.delete()
        told = []
        queue.history.when_safe(told.append)
        call()
        if number:
            queue.sync_failed(under_way, OSError(number, "failed"))
        else:
            queue.synced(under_way)
        assert told == []
        sync(queue)
        assert told == [None]


def test_memory_that_runs_out_in_a_task_is_asked_for_again(tmp_path, monkeypatch):
    queue = turn_queue(tmp_path, max_memory_size=500)
    real = kestrel._write_all

    def fail(*args):
        monkeypatch.setattr(kestrel, "_write_all", real)
        raise MemoryError

    opened = []
    for number in range(40):
        queue.add(b"%02d" % number * 30, now=NOW)
        if number % 3 == 0:
            opened.append(queue.remove(open=True, now=NOW).data)
        else:
            queue.remove(now=NOW)
        queue.write()
        if queue.journal.passings and number < 30:
            monkeypatch.setattr(kestrel, "_write_all", fail)
        queue.host.run()
        while queue.host.calls:
            queue.host.calls.pop(0)()
    queue.host.run()
    assert not queue.journal.passings and not queue.upkeep.error
    assert contents_of(tmp_path)[:len(opened)] == opened


def test_a_failed_confirmation_keeps_its_timeout(tmp_path, disk):
    queue = turn_queue(tmp_path)
    queue.add(b"a", now=NOW)
    item = queue.remove(open=True, now=NOW)
    queue.limit(item.xid, 100)
    queue.write()
    queue.confirm(item.xid)
    disk.failing = {"pwrite": errno.ENOSPC}
    with pytest.raises(OSError):
        queue.write()
    disk.failing = {}
    assert item.xid in queue._alarms
    while queue.host.calls:
        queue.host.calls.pop(0)()
    queue.write()
    assert not queue.opens and queue.count == 1 and not queue._alarms


def test_zeros_that_are_met_while_reading_behind(tmp_path):
    items = [b"item%02d" % number for number in range(36)]
    queue = behind_three_files(tmp_path, items)
    data = (tmp_path / "q.2").read_bytes()
    (tmp_path / "q.2").write_bytes(data[:100] + bytes(10000) + data[-100:])
    found = []
    for _ in range(100):
        item = queue.remove(now=NOW)
        if item and not kestrel.is_lost(item):
            found.append(item.data)
        queue.write()
        queue.host.run()
        while queue.host.calls:
            queue.host.calls.pop(0)()
    assert found[:12] == items[:12] and found[-12:] == items[-12:]
    assert queue.count == 0 and contents_of(tmp_path) == []


def test_opened_items_count_as_memory_and_need_not_stay_in_it(tmp_path):
    queue = load(tmp_path, max_memory_size=20000)
    items = [bytes([number]) * 5000 for number in range(60)]
    fill(queue, *items)
    opened = take(queue, 60, open=True)
    assert data_of(opened) == items
    xids = [item.xid for item in opened]
    del opened
    assert queue.open_memory < 60 * kestrel.ITEM_COST + 30000
    held = [item.data for item in queue.opens.values() if item.data is not None]
    assert sum(map(len, held)) <= 25000
    queue.abort(*xids)
    assert queue.memory < 60 * kestrel.ITEM_COST + 30000
    assert data_of(take(queue, 61)) == items + [None]
    queue.close()


@promise(5)
def test_max_memory_is_shared_by_all_queues(tmp_path):
    """A hundred queues of which each could have all of it, and more on disk."""
    broker = broker_of(tmp_path, "[queue]\nsync_journal = never\n"
                                 "[queue plain]\nkeep_journal = false\n")
    broker.budget.most_memory = most = 4 << 20
    floor = 100 * kestrel.MEMORY_FLOOR
    names = ["q%d" % number for number in range(100)]
    for turn in range(20):
        for name in names:
            put(broker, name, *[b"%d" % turn * 3000] * 4)
        commit(broker, NOW)
    assert most / 2 < broker.budget.memory < most + floor
    assert sum(queue.bytes for queue in broker.queues.values()) > 5 * most
    with pytest.raises(OSError, match="out of memory"):
        for number in range(2000):
            put(broker, "plain", b"x" * 10000)
            commit(broker, NOW)
    assert broker.queues["plain"].memory <= kestrel.MEMORY_FLOOR
    for name in names:
        queue = broker.queues[name]
        got = take(queue, 80)
        assert data_of(got) == [b"%d" % (number // 4) * 3000 for number in range(80)]
        commit(broker, NOW)
    assert broker.budget.memory <= kestrel.MEMORY_FLOOR


class FullTable:
    """A listening socket in a system that has no descriptors left for `times` clients."""

    def __init__(self, sock, number, times):
        self.sock, self.number, self.times, self.asked = sock, number, times, 0

    def __getattr__(self, name):
        return getattr(self.sock, name)

    def accept(self):
        self.asked += 1
        if self.times:
            self.times -= 1
            raise OSError(self.number, os.strerror(self.number))
        return self.sock.accept()


def test_journals_make_room_when_descriptors_are_short(daemon):
    server = daemon("[queue]\nsync_journal = never\n", most_files=60)
    with server.client() as client:
        for number in range(300):
            assert client.put("q%d" % number, b"x") == "STORED\r\n"
        for number in range(300):
            assert client.put("q%d" % number, b"y") in ("STORED\r\n",
                "SERVER_ERROR q%d: Too many open files\r\n" % number)
        clients = [server.client() for _ in range(12)]
        for other in clients:
            assert other.ask("version\r\n") == "VERSION 1.0.0\r\n"
            other.close()
        assert int(client.stats()["curr_items"]) > 580


def test_deleted_queues_leave_nothing_to_do(tmp_path):
    """Their small files are gone at once; those that are large are freed by the worker."""
    broker = broker_of(tmp_path)
    for number in range(5):
        put(broker, "q", b"x" * (1 << 21 if number == 4 else 10))
        commit(broker, NOW)
        before = len(os.listdir("/dev/fd"))
        broker.delete(broker.queues["q"])
        assert len(os.listdir("/dev/fd")) == before - (number < 4)
        assert len(broker.tasks) == (number == 4)
    broker.tasks.popleft().__next__()()
    assert len(os.listdir("/dev/fd")) == before - 1


def test_a_failed_write_leaves_no_cycle(tmp_path, disk):
    """What it held would stay for good: the daemon runs without the garbage collector."""
    talk = Talk(tmp_path)
    talk(set_("q", "1"))
    with no_cycles(OSError, kestrel.Item):
        for failing in ("pwrite", "fsync"):
            disk.failing = {failing: errno.ENOSPC}
            session = kestrel.MemcacheSession(talk.broker)
            session.feed(set_("q", "2").encode(), NOW)
            session.settle(commit(talk.broker, NOW)[1], set())
            kestrel.fsync_all([os.dup(0)])
            session.close(NOW)
            disk.failing = {}
        del session


def test_rotated_files_are_not_kept_open(tmp_path):
    queue = turn_queue(tmp_path, max_memory_size=1000)
    for number in range(300):
        queue.add(b"x" * 100, now=NOW)
        queue.write()
        queue.host.run()
    assert len(queue.journal.files) > 10
    assert sum(file.fd is not None for file in queue.journal.files) <= 2
    sync(queue)
    queue.close()


def test_the_count_of_deliveries_is_undone_with_what_was_counted(tmp_path, disk):
    """The item was opened again meanwhile, as a copy without its data."""
    bench = Bench()
    queue = kestrel.Queue("q", str(tmp_path), kestrel.QueueConfig(max_memory_size=700), (), bench)
    fill(queue, *(digit * 300 for digit in (b"1", b"2", b"3", b"4")))
    queue.write()
    take(queue, 1)
    item = queue.remove(open=True, now=NOW)
    assert item.data == b"2" * 300 and item.place        # it was read behind
    queue.abort(item.xid, delay=10, now=NOW)
    take(queue, 1, open=True)
    queue.write()
    delayed, = queue.delays.items.values()
    again = queue.remove(open=True, now=NOW + 10)
    queue.abort(again.xid, now=NOW + 10)
    assert again.deliveries == 2
    queue.configure(kestrel.QueueConfig(max_memory_size=0))
    queue.remove(open=True, now=NOW + 10)
    assert [item.data for item in queue.opens.values()] == [b"3" * 300, None]
    disk.failing = {"pwrite": errno.EIO}
    with pytest.raises(OSError):
        queue.write()
    assert list(queue.delays.items.values()) == [delayed] and delayed.item.deliveries == 1


def test_what_is_done_on_hearing_of_a_failure_is_written_once(tmp_path):
    """Everything is written anew, since it may not be on the disk, and not with what is done
    then: that is written after it."""
    bench = Bench()
    queue = kestrel.Queue("q", str(tmp_path), kestrel.QueueConfig(sync_journal=100), (), bench)
    fill(queue, b"1", b"2")
    item = queue.remove(open=True, now=NOW)
    queue.write()
    queue.confirm(item.xid)
    queue.history.when_safe(lambda error: error and queue.abort(item.xid, now=NOW))
    fail_sync(queue)
    assert data_of(queue.items) == [b"1", b"2"]
    queue.write()
    bench.run()
    queue.write()
    assert contents_of(tmp_path) == [b"1", b"2"]
    take(queue, 2)
    queue.write()
    assert contents_of(tmp_path) == []


def test_a_put_is_taken_though_there_is_no_memory_for_who_waits(tmp_path, monkeypatch):
    bench = Bench()
    queue = kestrel.Queue("q", str(tmp_path), kestrel.QueueConfig(max_memory_size=1000), (), bench)
    fill(queue, *[b"x" * 900] * 4)
    queue.write()
    take(queue, 1)
    got = []
    queue.pause(kestrel.PAUSED_OUT)
    queue.wait(kestrel.Waiter(lambda queue, item: got.append(item)))
    queue.paused = 0                                     # who waits is not served yet
    pread = os.pread

    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(kestrel.os, "pread", fail)
    assert queue.add(b"5", now=NOW) and not got
    with pytest.raises(OSError) as caught:
        queue.remove(now=NOW)
    assert caught.value.errno == errno.ENOMEM
    monkeypatch.setattr(kestrel.os, "pread", pread)
    queue.recover(NOW)
    assert data_of(got) == [b"x" * 900]


def test_keep_journal_is_turned_off_while_all_is_written_anew(tmp_path):
    bench = Bench()
    queue = kestrel.Queue("q", str(tmp_path), kestrel.QueueConfig(sync_journal=100), (), bench)
    fill(queue, b"1")
    queue.write()
    fail_sync(queue)
    assert queue.upkeep.renewing is not None
    queue.configure(kestrel.QueueConfig(keep_journal=False))
    bench.run()
    assert not os.listdir(str(tmp_path)) and queue.upkeep.renewing is None
    fill(queue, b"2")
    queue.write()
    assert data_of(queue.items) == [b"1", b"2"]


def test_who_waits_for_an_fsync_hears_of_it_though_the_file_was_packed_meanwhile(tmp_path):
    bench = Bench()
    queue = kestrel.Queue("q", str(tmp_path), kestrel.QueueConfig(
        sync_journal=None, max_memory_size=200, default_journal_size=1 << 20), (), bench)
    fill(queue, b"1" * 300)
    queue.write()
    bench.run()                                          # it goes on with another file
    fill(queue, b"2")
    queue.write()
    call, under_way = queue.begin_sync()
    take(queue, 1)
    told = []
    queue.history.when_durable(told.append)
    queue.write()
    assert len(queue.journal.passed) == 1
    bench.run()
    assert not queue.journal.passed and call() is None and not told
    queue.synced(under_way)
    assert queue.needs_sync() and not told
    sync(queue)
    assert told == [None] and not queue.needs_sync()


@promise(3)
def test_a_file_is_not_dropped_before_what_went_on_from_it_is_fsynced(tmp_path):
    """An item that was at the tail again was lost in a power failure, though it had been fsynced:
    a pack had taken it out of the old file, and the new one did not reach the disk."""
    bench = Bench()
    queue = kestrel.Queue("q", str(tmp_path), kestrel.QueueConfig(
        sync_journal=100, max_memory_size=200, default_journal_size=1 << 20), (), bench)
    fill(queue, b"1", b"2" * 300)
    opened = queue.remove(open=True, now=NOW)
    queue.write()
    bench.run()                                          # it goes on with another file
    sync(queue)
    fsynced = os.path.getsize(str(tmp_path / "q"))
    queue.abort(opened.xid, tail=True)
    queue.write()
    take(queue, 1)
    queue.write()
    bench.run()
    shutil.copytree(str(tmp_path), str(tmp_path / "crashed"))
    os.truncate(str(tmp_path / "crashed" / "q"), fsynced)
    assert b"1" in contents_of(tmp_path / "crashed")
    sync(queue)
    bench.run()
    assert not queue.journal.passed and contents_of(tmp_path) == [b"1"]
    queue.close()


def test_a_large_item_that_could_not_be_opened_is_read_later(tmp_path, monkeypatch, disk):
    """It counted as one that a worker was reading, for ever: nobody was given anything."""
    for name in ("_LARGE", "_SPAN"):
        monkeypatch.setattr(kestrel, name, 10000)
    bench, jobs = Bench(), []
    bench.work = lambda call, done: jobs.append((call, done))
    queue = kestrel.Queue("q", str(tmp_path), kestrel.QueueConfig(max_memory_size=20000), (), bench)
    fill(queue, *[b"x" * 19000] * 3)
    queue.write()
    call, done = jobs.pop()
    done(call())
    take(queue, 1)
    assert queue._refill() and queue.items[0].data is None
    disk.failing, disk.once = {"open": errno.EMFILE}, True
    with pytest.raises(OSError):
        queue.remove(now=NOW)
    assert queue.remove(now=NOW) is None
    call, done = jobs.pop()
    done(call())
    assert queue.remove(now=NOW).data == b"x" * 19000


def test_a_flush_during_a_large_write_is_undone(tmp_path, monkeypatch, disk):
    """What had been on its way to the disk counted twice, and an item was given twice."""
    monkeypatch.setattr(kestrel, "_LARGE", 500)
    bench, jobs = Bench(), []
    bench.work = lambda call, done: jobs.append((call, done))
    queue = kestrel.Queue("q", str(tmp_path), kestrel.QueueConfig(max_memory_size=1000), (), bench)

    def write(*data):
        fill(queue, *data)
        queue.write()

    def work():
        call, done = jobs.pop()
        done(call())

    write(b"1" * 900, b"2" * 900)
    work()
    bench.run()                              # it goes on with another file
    write(b"3" * 900, b"x")
    work()
    write(b"4" * 900, b"y")
    queue.flush()                            # while the worker writes these
    work()
    disk.failing, disk.once = {"pwrite": errno.ENOSPC}, True
    with pytest.raises(OSError):
        queue.write()
    assert queue.count == 6
    assert [item.data[:1] for item in take(queue, 6)] == [b"1", b"2", b"3", b"x", b"4", b"y"]
    assert queue.count == 0 and queue.remove(now=NOW) is None
    queue.write()
    assert contents_of(tmp_path) == []


# == Broker ===============================================================================


def test_fanout_children_get_a_copy_of_what_comes_later(tmp_path):
    broker = broker_of(tmp_path, "[queue fan+full]\nmax_items = 1\n")
    put(broker, "fan", b"0")
    broker.queue("fan+one", NOW)
    put(broker, "fan", b"1")
    broker.queue("fan+full", NOW)
    assert put(broker, "fan", b"2", b"3") == [True, True]
    put(broker, "fan+one", b"4")
    assert items_of(broker, "fan") == [b"0", b"1", b"2", b"3"]
    assert items_of(broker, "fan+one") == [b"1", b"2", b"3", b"4"]
    assert items_of(broker, "fan+full") == [b"2"]
    assert dict(broker.queue_stats(broker.queues["fan"], NOW))["children"] == "fan+one,fan+full"
    broker.delete(broker.queues["fan+one"])
    put(broker, "fan", b"5")
    assert "fan+one" not in broker.queues
    broker.delete(broker.queues["fan"])
    assert items_of(broker, "fan+full") == [b"2"]
    assert put(broker, "fan+full", b"6") == [False]


def test_fanout_only(tmp_path):
    broker = broker_of(tmp_path, "[queue fan]\nfanout_only = true\n")
    assert put(broker, "fan", b"0") == [True]
    broker.queue("fan+one", NOW)
    put(broker, "fan", b"1")
    put(broker, "fan+one", b"2")
    assert (items_of(broker, "fan"), items_of(broker, "fan+one")) == ([], [b"1", b"2"])


def test_aliases(tmp_path):
    broker = broker_of(tmp_path, """
[alias all]
destination_queues = a, b, c+x
[queue b]
max_items = 1
""")
    broker.queue("a+copy", NOW)
    assert put(broker, "all", b"1", b"2") == [True, False]
    assert {name: items_of(broker, name) for name in broker.queues} == {
        "a": [b"1", b"2"], "a+copy": [b"1", b"2"], "b": [b"1"], "c+x": [b"1", b"2"]}
    assert broker.queue("all", NOW) is None and broker.find("all") is None


def test_an_alias_of_its_own_children_puts_each_item_once(tmp_path):
    broker = broker_of(tmp_path, "[alias events]\n"
                                 "destination_queues = events+archive, events+live\n")
    assert put(broker, "events", b"1", b"2") == [True, True]
    assert items_of(broker, "events+archive") == items_of(broker, "events+live") == [b"1", b"2"]
    for user in (None, "bob"):
        assert broker.config.may(user, "put_users", "events+archive")


def test_rights_of_aliases_that_lead_to_each_other(tmp_path):
    config = config_of(tmp_path, secured(tmp_path, tls=False) + "[alias a]\n"
                       "destination_queues = b+x, c\n[alias b]\ndestination_queues = a+y\n"
                       "[queue c]\nput_users = ann\n")
    assert config.may("ann", "put_users", "a+y") and config.may("ann", "put_users", "b+x")
    assert not config.may("bob", "put_users", "a+y")


@promise(5)
def test_there_are_so_many_queues_and_children(tmp_path):
    broker = broker_of(tmp_path, "[server]\nmax_queues = 4\nmax_children = 2\n")
    for name in ("a", "a+1", "a+2"):
        broker.queue(name)
    with pytest.raises(OSError, match=r"a has 2 children \(max_children\)"):
        broker.queue("a+3")
    broker.queue("b")
    with pytest.raises(OSError, match=r"there are 4 queues \(max_queues\)"):
        broker.queue("c")
    broker.delete(broker.queues["a+1"])
    broker.queue("a+3")
    assert put(broker, "a", b"x") == [True]


def test_totals_follow_every_change(tmp_path):
    broker = broker_of(tmp_path, "[queue]\nmax_memory_size = 1kb\n[queue b]\n"
                                 "keep_journal = false\n")
    chances = seeded()

    def expected():
        queues = broker.queues.values()
        return (sum(queue.count for queue in queues), sum(queue.bytes for queue in queues),
                sum(queue.config.max_memory_size for queue in queues))

    for _ in range(2000):
        name = chances.choice("abcd")
        queue = broker.queue(name, NOW)
        what = chances.random()
        if what < .6:
            put(broker, name, b"x" * chances.randrange(300), expiry=NOW + chances.randrange(3))
        elif what < .8:
            item = queue.remove(True, NOW + chances.randrange(3))
            if item:
                (queue.confirm if what < .7 else queue.abort)(item.xid)
        elif what < .81:
            queue.flush()
        elif what < .82:
            broker.delete(queue)
        elif what < .9:
            settle(broker)
        totals = broker.totals()
        assert (totals.items, totals.bytes, totals.reserved) == expected()


def test_a_reload_that_fails_unexpectedly_is_answered_and_tried_again(tmp_path, monkeypatch):
    broker = broker_of(tmp_path)
    queue = broker.queue("q")
    told = []
    monkeypatch.setattr(kestrel.Queue, "configure", lambda self, config: 1 / 0)
    broker.reload("a client", told.append)
    with pytest.raises(ZeroDivisionError):
        kestrel.run_task(broker.tasks.pop())
    assert len(told) == 1
    monkeypatch.undo()
    assert reload(broker) is None and queue.config


def test_reloads_that_are_asked_for_at_once_are_done_as_one(tmp_path, caplog):
    caplog.set_level("INFO")
    broker = broker_of(tmp_path)
    told = []
    for number in range(50):
        broker.reload("client %d" % number, told.append)
    task = broker.tasks.pop()
    read = next(task)
    assert not broker.tasks and not told
    broker.reload("a late one", told.append)         # the file may have changed since
    read()
    again = next(task)
    assert told == [None] * 50
    again()
    assert next(task, "over") == "over" and told == [None] * 51
    assert caplog.text.count("reloaded by") == 2


def test_expired_items_move_to_expire_to_queue(tmp_path):
    broker = broker_of(tmp_path, """
[queue work]
expire_to_queue = late
max_age = 100ms
[queue late]
max_age = 50ms
[queue]
expire_to_queue = late
""")
    put(broker, "work", b"1", b"2", expiry=NOW + 10)
    put(broker, "work", b"3")
    assert broker.queues["work"].remove(now=NOW + 10).data == b"3"
    settle(broker, NOW + 10)
    late = broker.queues["late"]
    assert data_of(late.items) == [b"1", b"2"]
    assert contents_of(tmp_path / "spool", "work") == []
    assert late.peek(NOW + 59).data == b"1"
    assert late.peek(NOW + 60) is None       # it leads to itself: they are gone


def test_expired_items_move_along_aliases_and_to_fanout_children(tmp_path):
    broker = broker_of(tmp_path, """
[queue work]
expire_to_queue = all
[queue only]
fanout_only = true
[alias all]
destination_queues = late, only
""")
    broker.queue("late+copy", NOW)
    broker.queue("only+copy", NOW)
    put(broker, "work", b"1", expiry=NOW + 10)
    broker.queues["work"].discard_expired(NOW + 10)
    settle(broker, NOW + 10)
    assert [items_of(broker, name) for name in ("late", "late+copy", "only+copy", "work")] == [
        [b"1"], [b"1"], [b"1"], []]
    assert "only" not in broker.queues or items_of(broker, "only") == []


@promise(6)
def test_a_damaged_item_that_expires_is_dropped_and_holds_nothing_up(tmp_path):
    """It was to be moved, which failed with each read of the queue."""
    broker = broker_of(tmp_path, "[queue work]\nmax_memory_size = 20000\nexpire_to_queue = late\n")
    put(broker, "work", *[letter * 300000 for letter in (b"a", b"b", b"c")], expiry=NOW + 10)
    put(broker, "work", b"last")
    settle(broker)
    work = broker.queues["work"]
    damage_item(work, b"b" * 300000)
    assert work.remove(now=NOW).data == b"a" * 300000
    assert work.remove(now=NOW + 10).data == b"last"
    settle(broker, NOW + 10)
    assert items_of(broker, "late") == [b"c" * 300000]
    assert len(os.listdir(str(tmp_path / "spool" / "lost+found"))) == 1


@promise(6)
def test_a_damaged_dead_letter_is_dropped_and_holds_nothing_up(tmp_path):
    """It was only on disk while it was open, and its move was tried again and again."""
    clock = Clock()
    broker = broker_of(tmp_path, "[queue work]\nmax_memory_size = 20000\nmax_deliveries = 1\n"
                                 "dead_letter_queue = dead\n", later=clock)
    put(broker, "work", *[letter * 300000 for letter in (b"a", b"b", b"c")])
    settle(broker)
    work = broker.queues["work"]
    xids = [item.xid for item in take(work, 3, open=True)]
    assert work.opens[xids[1]].data is None
    damage_item(work, b"b" * 300000)
    work.abort(*xids, now=NOW)
    for _ in range(3):
        settle(broker)
        run_tasks(broker)
        clock.reach(clock.time + 1000)
    assert items_of(broker, "dead") == [b"a" * 300000]
    last = work.remove(open=True, now=NOW)
    assert last.data == b"c" * 300000
    work.abort(last.xid, now=NOW)
    settle(broker)
    run_tasks(broker)
    settle(broker)
    assert broker.queues["dead"].count == 2 and not work.count and not work.opens


def test_a_child_that_takes_a_part_of_what_moves_gets_the_rest_later(tmp_path):
    """It was given all of it again each second, as long as it could not take the rest."""
    clock = Clock()
    budget = kestrel.Budget(most_memory=300000)
    broker = broker_of(tmp_path, "[queue work]\nexpire_to_queue = late\n"
                                 "[queue late+child]\nkeep_journal = false\n",
                       later=clock, budget=budget)
    put(broker, "late+child", b"1")
    put(broker, "work", b"2", b"x" * 400000, expiry=NOW + 10)
    settle(broker)
    broker.queues["work"].discard_expired(NOW + 10)
    for _ in range(5):
        settle(broker)
        clock.reach(clock.time + 1000)
    assert items_of(broker, "late+child") == [b"1", b"2"]
    budget.most_memory = kestrel.UNLIMITED
    for _ in range(2):
        clock.reach(clock.time + 1000)
        settle(broker)
    assert items_of(broker, "late+child") == [b"1", b"2", b"x" * 400000]
    assert broker.queues["late"].count == 2 and not broker.queues["work"].opens


def test_a_delay_queue(tmp_path):
    """Items that expire wait their time in another queue and come back from there."""
    broker = broker_of(tmp_path, "[queue work]\nexpire_to_queue = delay\n"
                                 "[queue delay]\nmax_age = 10s\nexpire_to_queue = work\n")
    put(broker, "work", b"1", expiry=NOW + 1)
    broker.queues["work"].discard_expired(NOW + 1000)
    settle(broker, NOW + 1000)
    assert (items_of(broker, "work"), items_of(broker, "delay")) == ([], [b"1"])
    assert broker.queues["delay"].peek(NOW + 10999).data == b"1"
    assert broker.queues["delay"].peek(NOW + 11000) is None
    settle(broker, NOW + 11000)
    assert (items_of(broker, "work"), items_of(broker, "delay")) == ([b"1"], [])
    assert broker.queues["work"].peek(NOW + 99000).data == b"1"


def test_children_have_settings_of_their_own_and_are_deleted_alone(tmp_path):
    broker = broker_of(tmp_path, "[queue a]\nmax_items = 5\n[queue a+b]\nmax_items = 1\n"
                                 "keep_flags = false\n")
    for name in ("a", "a+b", "a+c"):
        broker.queue(name, NOW)
    put(broker, "a", b"1", b"2")
    assert [items_of(broker, name) for name in ("a", "a+b", "a+c")] == [
        [b"1", b"2"], [b"1"], [b"1", b"2"]]
    broker.delete(broker.queues["a+b"])
    put(broker, "a", b"3")
    assert "a+b" not in broker.queues and items_of(broker, "a+c") == [b"1", b"2", b"3"]
    broker.delete(broker.queues["a"])
    assert items_of(broker, "a+c") == [b"1", b"2", b"3"]
    put(broker, "a", b"4")                       # is made anew, and its child is still one
    assert items_of(broker, "a") == [b"4"] and items_of(broker, "a+c")[-1] == b"4"


@promise(3)
def test_what_expires_in_a_child_goes_to_its_parent(tmp_path):
    """It came back to the child as its copy, and did not expire any more."""
    broker = broker_of(tmp_path, "[queue q+a]\nexpire_to_queue = q\n")
    broker.queue("q+a", NOW)
    put(broker, "q", b"1", expiry=NOW + 10)
    assert sum(broker.discard_expired(broker.queues["q+a"], NOW + 10)) == 1
    settle(broker, NOW + 10)
    assert items_of(broker, "q") == [b"1", b"1"] and items_of(broker, "q+a") == []


def test_a_move_loses_nothing_wherever_it_stops(tmp_path):
    broker = broker_of(tmp_path, "[queue work]\nexpire_to_queue = late\n")
    put(broker, "work", b"1", expiry=NOW + 10)
    commit(broker, NOW)
    broker.queues["work"].discard_expired(NOW + 10)
    states = []
    for queue in broker.dirty:
        queue.write()
        spool = tmp_path / "spool"
        states.append((contents_of(spool, "work"), contents_of(spool, "late")))
        run_tasks(broker)
    assert states == [([b"1"], []), ([b"1"], [b"1"]), ([], [b"1"])]


def test_a_move_is_confirmed_when_it_is_as_safe_as_its_answer_must_be(tmp_path):
    broker = broker_of(tmp_path, """
[queue work]
expire_to_queue = late
[queue late]
sync_journal = 0
""")
    put(broker, "work", b"1", expiry=NOW + 10)
    commit(broker, NOW)
    broker.queues["work"].discard_expired(NOW + 10)
    for _ in range(5):
        commit(broker, NOW + 10)
    late, work = broker.queues["late"], broker.queues["work"]
    assert len(work.opens) == late.count == 1
    sync(late)
    commit(broker, NOW + 10)
    assert not work.opens


def test_a_move_that_cannot_be_written_is_taken_back(tmp_path, disk):
    broker = broker_of(tmp_path, "[queue work]\nexpire_to_queue = late\n")
    put(broker, "work", b"1", expiry=NOW + 10)
    commit(broker, NOW)
    calls = []
    broker.later = lambda delay, call: calls.append(call)
    late = broker.queue("late")

    def fail():
        disk.failing = {"pwrite": errno.ENOSPC}
        kestrel.Queue.write(late)

    late.write = fail
    broker.queues["work"].discard_expired(NOW + 10)
    commit(broker, NOW + 10)                  # open on record,
    commit(broker, NOW + 10)                  # but not put into late
    del late.write
    disk.failing = {}
    calls.pop()()
    settle(broker, NOW + 10)
    assert items_of(broker, "work") == [b"1"] and items_of(broker, "late") == []


def test_sweep_drops_expired_items_and_old_queues(tmp_path):
    clock = [0]
    broker = broker_of(tmp_path, """
[queue]
max_queue_age = 1m
[queue a]
max_expire_sweep = 2
""", uptime=lambda: clock[0])
    put(broker, "a", b"1", b"2", b"3", expiry=NOW + 10)
    put(broker, "b", b"1", b"2", b"3", expiry=NOW + 10)
    broker.queue("idle", NOW)
    broker.queue("waited", NOW).wait(kestrel.Waiter(lambda queue, item: None))
    sweep(broker, NOW + 10)
    assert (broker.queues["a"].count, broker.queues["b"].count) == (1, 0)
    assert len(broker.queues) == 4
    settle(broker)
    clock[0] = 60
    sweep(broker, NOW + 10)                  # the time of day does not matter
    assert list(broker.queues) == ["waited"]
    assert broker.stats.queue_expires == 3
    assert os.listdir(str(tmp_path / "spool")) == ["waited"]


def test_a_paused_queue_is_not_deleted_for_its_age(tmp_path):
    """The next put made it again, not paused."""
    clock = [0]
    broker = broker_of(tmp_path, "[queue]\nmax_queue_age = 1m\n", uptime=lambda: clock[0])
    broker.queue("q", NOW).pause()
    clock[0] = 60
    sweep(settle(broker), NOW)
    assert put(broker, "q", b"x") == [False]
    broker.queues["q"].pause(0)
    sweep(settle(broker), NOW)
    assert not broker.queues


def test_reload_changes_queues_at_once(tmp_path, caplog):
    broker = broker_of(tmp_path, "")
    put(broker, "a", b"1")
    config_of(tmp_path, "[server]\nmemcache_port = 1\n[queue]\nmax_items = 1\n"
                        "[alias all]\ndestination_queues = a b\n")
    reload(broker)
    assert put(broker, "a", b"2") == [False]
    assert put(broker, "all", b"3") == [False]
    assert items_of(broker, "b") == [b"3"]
    assert "memcache_port changes with the next start only" in caplog.text
    config_of(tmp_path, "[queue]\nmax_items = 5\n") and (
        tmp_path / "kestrel.conf").write_text("[queue]\nmax_items = x\n")
    assert isinstance(reload(broker), kestrel.ConfigError)
    assert put(broker, "a", b"2") == [False]
    caplog.clear()
    (tmp_path / "kestrel.conf").write_text("[queue]\nmax_items = x\nmax_age = y\n")
    reload(broker)
    assert [re.sub(".*kestrel.conf", "", line)[:13] for line in caplog.messages] == [
        ":2: max_items", ":3: max_age: "]


def test_a_spool_is_loaded_again(tmp_path):
    broker = broker_of(tmp_path)
    put(broker, "a", b"1", b"2")
    put(broker, "a+b", b"3")
    settle(broker)
    for queue in broker.queues.values():
        queue.close()
    broker = broker_of(tmp_path)
    assert sorted(broker.queues) == ["a", "a+b"]
    put(broker, "a", b"4")
    assert (items_of(broker, "a"), items_of(broker, "a+b")) == (
        [b"1", b"2", b"4"], [b"3", b"4"])


def test_a_status_refuses_after_its_grace(tmp_path):
    clock = Clock()
    broker = broker_of(tmp_path, "[server]\nstatus_change_grace_period = 5s\n", later=clock)
    broker.set_status("readonly")
    assert broker.status == "READONLY" and refusals(broker) == (False, False)
    # Health checks are told at once, so that nobody comes who would be refused.
    assert (broker.why_not_readable(), broker.why_not_writable()) == ("", "the server is readonly")
    clock.reach(4000)
    broker.set_status("quiescent")                # the time of readonly starts anew with it
    clock.reach(5000)
    assert refusals(broker) == (False, False)
    clock.reach(9000)
    assert refusals(broker) == (True, True)
    broker.set_status("readonly")                 # lets reads in at once, refuses writes still
    assert refusals(broker) == (False, True)
    broker.set_status("up")
    assert refusals(broker) == (False, False)
    clock.reach(99000)
    assert refusals(broker) == (False, False)


def test_the_status_is_kept_in_a_file(tmp_path, caplog):
    file = tmp_path / "status"
    settings = "[server]\ndefault_status = readonly\nstatus_file = %s\n" % file
    broker = broker_of(tmp_path, settings)
    assert broker.status == "READONLY" and refusals(broker) == (False, True)
    broker.set_status("up")
    broker.set_status("quiescent")
    broker.write()
    assert file.read_text() == "QUIESCENT\n"
    assert broker_of(tmp_path, settings).status == "QUIESCENT"
    file.write_text("nonsense")
    assert broker_of(tmp_path, settings).status == "READONLY"
    assert "status_file" in caplog.text
    caplog.clear()
    (tmp_path / "none").mkdir()
    broker = broker_of(tmp_path, "[server]\nstatus_file = %s/none/status\n" % tmp_path)
    (tmp_path / "none").rmdir()
    broker.set_status("readonly")
    broker.write()
    assert broker.status == "READONLY" and "No such file" in caplog.text


def test_connection_limits(tmp_path):
    talk = Talk(tmp_path, "[server]\nconnection_limit_refuse_writes = 2\n"
                          "connection_limit_refuse_reads = 3\n")
    for number, expected in enumerate((
            (False, False), (False, False), (False, True), (True, True))):
        talk.broker.admit(talk.session(number))
        assert refusals(talk.broker) == expected
    assert talk("get q\r\n") == (
        "SERVER_ERROR there are more than 3 connections: nothing can be read\r\n✂")
    talk.broker.dismiss(talk.session(0))
    talk.broker.dismiss(talk.session(2))
    assert refusals(talk.broker) == (False, False)
    assert talk(set_("q", "1"), "other") == "STORED\r\n"


def test_what_is_done_to_a_queue_can_be_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    talk = Talk(tmp_path, "[queue q]\nenable_trace = true\n")
    caplog.clear()
    talk(set_("q", "12") + set_("r", "12") + "get q/open\r\nget q/abort\r\nflush q\r\n")
    assert [record.getMessage() for record in caplog.records if " by " not in record.getMessage()
            ] == ["queue q: ADDX 2 bytes", "queue q: REMOVE_TENTATIVE_XID xid=1",
                  "queue q: UNREMOVE xid=1", "queue q: FLUSH 1 items"]
    (tmp_path / "kestrel.conf").write_text("")
    talk("reload\r\n")
    caplog.clear()
    talk(set_("q", "12"))
    assert not caplog.records


def test_keep_journal_changes_at_once(tmp_path, caplog):
    spool = tmp_path / "spool"
    talk = Talk(tmp_path)
    talk(set_("q", "1") + set_("q", "2") + "get q/open\r\n")

    def reload(settings):
        (tmp_path / "kestrel.conf").write_text(settings)
        assert talk("reload\r\n") == "Reloaded config.\r\n"
        run_tasks(talk.broker)

    reload("[queue q]\nkeep_journal = false\n")
    assert not (spool / "q").exists()
    assert talk(set_("q", "3") + "get q/close\r\nget q/open\r\n").endswith("2\r\nEND\r\n")
    reload("[queue q]\nkeep_journal = true\n")
    assert talk(set_("q", "4") + set_("q", "5")) == "STORED\r\nSTORED\r\n"
    assert contents_of(spool) == [b"2", b"3", b"4", b"5"]
    assert talk("get q/close\r\n") == "END\r\n"
    assert contents_of(spool) == [b"3", b"4", b"5"]
    reload("[queue q]\nkeep_journal = false\n")
    assert os.listdir(str(spool)) == []


def test_a_deep_queue_keeps_its_journal(tmp_path, caplog):
    talk = Talk(tmp_path, "[queue]\nmax_memory_size = 1kb\n")
    talk("".join(set_("q", "x" * 100 + str(number)) for number in range(20)))
    (tmp_path / "kestrel.conf").write_text("[queue]\nmax_memory_size = 1kb\nkeep_journal=false\n")
    talk("reload\r\n")
    assert "keep_journal of q stays" in caplog.text
    assert talk.broker.queues["q"].count == 20
    assert contents_of(tmp_path / "spool") == [b"x" * 100 + b"%d" % one for one in range(20)]


def test_items_that_were_read_behind_are_kept_whole_without_a_journal(tmp_path):
    """One that was opened while memory was short was left to a file that was gone."""
    deep = Deep(tmp_path)
    queue = deep.queue
    while queue._behind:
        queue.remove(now=NOW)
    left = data_of(queue.items)
    queue.configure(kestrel.QueueConfig(keep_journal=False, max_memory_size=2000))
    assert queue.journal is None
    fill(queue, *deep.items)                 # more than there is memory for
    queue.abort(queue.remove(open=True, now=NOW).xid, now=NOW)
    assert contents(queue) == left + deep.items


@promise(3)
def test_keep_journal_turned_on_is_safe_at_each_moment(tmp_path):
    """Nothing is acknowledged before the first file is complete; and then it is in it."""
    broker = broker_of(tmp_path, "[queue]\nkeep_journal = false\n")
    put(broker, "q", *[b"%d" % number * 20 for number in range(100)])
    commit(broker, NOW)
    config_of(tmp_path, "")
    reload(broker)
    queue, spool = broker.queues["q"], tmp_path / "spool"
    assert queue.remove(now=NOW).data == b"0" * 20
    put(broker, "q", b"new")
    told = []
    queue.history.when_safe(told.append)
    steps = 0
    while broker.tasks or broker.dirty:
        assert not broker.write()[1]
        if told:
            assert contents_of(spool, "q") == data_of(queue.items)
        for _ in range(len(broker.tasks)):
            task = broker.tasks.popleft()
            assert not step_of(task)
            if task.gi_frame:
                broker.tasks.append(task)
        steps += 1
    assert told == [None] and steps > 4
    assert contents_of(spool, "q") == data_of(queue.items) and queue.items[-1].data == b"new"


def test_a_move_whose_confirmation_fails_is_confirmed_later(tmp_path, disk):
    broker = broker_of(tmp_path, "[queue]\nsync_journal = never\n"
                                 "[queue work]\nexpire_to_queue = late\n")
    calls = []
    broker.later = lambda delay, call: calls.append(call)
    put(broker, "work", b"1", expiry=NOW + 10)
    commit(broker, NOW)
    work = broker.queues["work"]
    confirm = work.confirm

    def fail(*arguments):
        work.confirm = confirm
        disk.failing, disk.once = {"pwrite": errno.EIO}, True
        return confirm(*arguments)

    work.confirm = fail
    work.discard_expired(NOW + 10)
    for _ in range(3):
        commit(broker, NOW + 10)
    late = broker.queues["late"]
    assert late.remove(now=NOW + 10).data == b"1" and len(work.opens) == 1
    while calls:
        calls.pop()()
        settle(broker, NOW + 10)
    assert not work.opens and not late.count
    spool = tmp_path / "spool"
    assert contents_of(spool, "work") == contents_of(spool, "late") == []


@promise(3)
def test_a_power_failure_takes_no_item_from_both_queues(tmp_path):
    """One could: the end of the item in the one was fsynced before the item in the other."""
    clock = Clock()
    broker = broker_of(tmp_path, later=clock)
    put(broker, "q", b"1")
    q, r = broker.queues["q"], broker.queue("r", NOW)
    told = []
    broker.moves.move(q, r, 1, NOW, told.append)
    for _ in range(3):
        broker.write()
        run_tasks(broker)
    assert r.count == len(q.opens) == 1 and not told
    sync(r)
    for _ in range(3):
        broker.write()
        run_tasks(broker)
        clock.reach(clock.time + 1)
    assert told == [(1, None)] and not q.opens


@promise(7)
def test_an_item_that_is_opened_again_is_moved_once(tmp_path, disk):
    """Its first open read was undone while it waited for others to be moved."""
    clock = Clock()
    broker = broker_of(tmp_path, "[queue]\nsync_journal = never\n"
                                 "[queue work]\nexpire_to_queue = late\n", later=clock)
    put(broker, "work", b"1", expiry=NOW + 10)
    put(broker, "work", b"2", expiry=NOW + 20)
    work, late = broker.queues["work"], broker.queue("late", NOW)
    settle(broker)
    work.discard_expired(NOW + 10)
    for queue in (work, late):
        queue.write()
        run_tasks(broker)
    disk.failing = {"pwrite": errno.ENOSPC}
    broker.write()
    assert late.count == len(work.opens) == 1         # it is confirmed later
    work.discard_expired(NOW + 20)
    broker.write()
    assert work.count == len(work.opens) == 1
    disk.failing = {}
    work.discard_expired(NOW + 20)
    for _ in range(3):
        settle(broker)
        clock.reach(clock.time + 1000)
    assert items_of(broker, "late") == [b"1", b"2"] and not work.opens and not any(broker.moves._buried.values())


@pytest.mark.parametrize("failing", ["work", "late"])
def test_a_move_is_made_once_though_fsyncs_fail(tmp_path, failing):
    broker = broker_of(tmp_path, "[queue]\nsync_journal = 0\n"
                                 "[queue work]\nexpire_to_queue = late\n")
    calls = []
    broker.later = lambda delay, call: calls.append(call)
    put(broker, "work", b"1", expiry=NOW + 10)
    commit(broker, NOW)
    queues = {"work": broker.queues["work"], "late": broker.queue("late", NOW)}
    for queue in queues.values():
        sync(queue)
    queues["work"].discard_expired(NOW + 10)
    failed = False
    for _ in range(20):
        broker.write()
        for name, queue in queues.items():
            if queue.history.written > queue.history.durable:
                if name == failing and not failed:
                    fail_sync(queue)
                    failed = True
                else:
                    sync(queue)
        run_tasks(broker)
        for call in calls:
            call()
        del calls[:]
        queues["work"].discard_expired(NOW + 10)
    assert failed and not queues["work"].count and not queues["work"].opens
    assert data_of(queues["late"].items) == [b"1"]
    spool = tmp_path / "spool"
    assert (contents_of(spool, "work"), contents_of(spool, "late")) == ([], [b"1"])


@promise(2)
@pytest.mark.parametrize("sync_journal", ["never", "0"])
def test_a_move_ends_when_the_other_queue_is_deleted_meanwhile(tmp_path, sync_journal):
    """It put the items into the deleted queue and waited for these to be safe, for good."""
    broker = broker_of(tmp_path, "[queue]\nsync_journal = %s\n" % sync_journal)
    put(broker, "work", b"a", b"b")
    put(broker, "other", b"c")
    queues = [broker.queues["work"], broker.queues["other"]]

    def turn():
        commit(broker, NOW)
        for queue in queues:
            if sync_journal == "0" and queue.needs_sync():
                sync(queue)

    turn()
    told = []
    broker.moves.move(*queues, 10, NOW, told.append)
    broker.delete(queues[1])
    for _ in range(5):
        turn()
    (moved, error), = told
    assert moved == 0 and error.errno == errno.ESTALE
    assert items_of(broker, "work") == [b"a", b"b"] and not queues[0].opens


@promise(3)
@pytest.mark.parametrize("sync_journal", ["never", "0"])
def test_what_has_moved_to_a_queue_that_is_deleted_then_does_not_come_back(tmp_path, sync_journal):
    """It was put back, though clients had had it from the other queue: it was given twice."""
    broker = broker_of(tmp_path, "[queue]\nsync_journal = %s\n" % sync_journal)
    put(broker, "work", b"a", b"b")
    work, other = broker.queues["work"], broker.queue("other", NOW)
    told = []
    broker.moves.move(work, other, 10, NOW, told.append)
    while not other.count:
        commit(broker, NOW)
        if sync_journal == "0" and work.needs_sync():
            sync(work)
    assert other.remove(now=NOW).data == b"a" and len(work.opens) == 2
    broker.delete(other)
    for _ in range(5):
        commit(broker, NOW)
        if sync_journal == "0" and work.needs_sync():
            sync(work)
    assert told == [(2, None)]
    assert not work.count and not work.opens


def test_samples_are_bounded_and_cost_nothing_where_nothing_happens(admin):
    broker = admin.broker
    broker.queue("idle", NOW)
    put_some(admin, "q", b"1")
    for _ in range(kestrel.SAMPLES + 10):
        list(broker.sample(5))
    assert len(broker.history(broker.queues["q"])) == kestrel.SAMPLES
    assert broker.history(broker.queues["idle"]) == []
    assert broker.queues["q"].counters.put_rate == 0
    broker.delete(broker.queues["q"])
    assert len(broker._accounts) == 1


def test_percentiles_of_a_histogram():
    histogram = kestrel.Histogram()
    assert set(histogram.figures().values()) == {0}
    histogram.fresh += range(1000)
    figures = histogram.figures()
    assert (figures["count"], figures["average"], figures["maximum"]) == (1000, 499.5, 999)
    for share, value in (("p50", 500), ("p90", 900), ("p99", 990), ("p9999", 999)):
        assert value <= figures[share] <= 2 * value and figures[share] <= 999
    assert histogram.take_recent() == 999 and histogram.take_recent() == 0
    histogram.fresh.append(3)
    assert histogram.take_recent() == 3


@pytest.mark.parametrize("sync", ["never", "0"])
def test_reads_that_were_open_go_back_though_the_disk_was_full_at_the_start(
        tmp_path, disk, caplog, monkeypatch, sync):
    monkeypatch.setattr(kestrel, "RETRY_MS", 20)
    spool_of(tmp_path, q=addx(b"a") + xid_record(9, 1))
    disk.failing = {"pwrite": errno.ENOSPC}
    server = kestrel.Server(config_of(
        tmp_path, "[queue]\nsync_journal = %s\n" % sync, memcache_port="0",
        queue_path=str(tmp_path)))
    server.interrupt()
    server.turn()
    queue = server.broker.queues["q"]
    assert "the journal of q cannot be written" in caplog.text and not queue.count
    disk.failing = {}
    while not queue.count or queue.history.safe < queue.history.logged:
        server.turn()
    stop(server)
    assert contents(load(tmp_path)) == [b"a"]


def test_what_is_stored_does_not_fail_with_a_move(tmp_path, disk):
    """It is not gone on with while queues are written: one that had been written was written
    again, and clients took its failure for that of what they had done."""
    talk = Talk(tmp_path)
    talk(set_("q", "1"))
    broker, session = talk.broker, talk.session()
    broker.moves.move(broker.queues["q"], broker.queue("r", NOW), 1, NOW, lambda result: None)
    session.feed(set_("q", "2").encode(), NOW)
    disk.failing, disk.good = {"pwrite": errno.ENOSPC}, 2
    _, failed = broker.write()
    session.settle(failed, set())
    assert b"".join(session.take()) == b"STORED\r\n"


@promise(2)
def test_what_may_be_in_the_file_stays_unclear_when_more_fails_in_the_turn(tmp_path, disk):
    """It was refused, and was there after a restart."""
    talk = Talk(tmp_path)
    queue, session = talk.broker.queue("q", NOW), talk.session()
    commit(talk.broker, NOW)
    session.feed(set_("q", "x").encode(), NOW)
    disk.failing = {"ftruncate": errno.EIO}
    write = queue.journal.write

    def half(plan):                          # all of it is written, and yet that fails
        write(plan)
        queue.journal.torn.add(queue.journal.current)
        talk.broker.changed(queue)           # somebody does more
        raise OSError(errno.EIO, "injected")

    queue.journal.write = half
    _, failed = talk.broker.write()
    session.settle(failed, {})
    assert session.state == "closed"         # nothing of `out` is sent


def test_what_is_put_to_a_queue_that_is_deleted_meanwhile_is_not_stored(tmp_path):
    """In the second of two steps; max_queue_age deletes a queue that has just become empty."""
    clock = Clock()
    broker = broker_of(tmp_path, "[queue q]\nmax_queue_age = 1s\n", later=clock,
                       uptime=lambda: clock.time / 1000)
    session = kestrel.Session(broker)
    session.now = NOW
    steps = session._put(broker.route(b"q", NOW), [b"x" * (1 << 20)] * 2)
    next(steps)
    settle(broker)
    assert broker.queues["q"].remove(now=NOW).data
    settle(broker)
    clock.time = 2000
    sweep(broker, NOW)
    assert "q" not in broker.queues
    with pytest.raises(StopIteration) as stop:
        next(steps)
    assert stop.value.value == 1             # the other is not there


# == Protocols: memcache ==================================================================


# The commands of memcached without a data block.
MEMCACHED = "incr decr touch gat gats mg md mn ma me slabs lru lru_crawler watch".split()

ANSWERS = [
    # set
    ("set q 0 0 5\r\nhello\r\n", "STORED\r\n"),
    ("set q 0 0 5\nhello\r\n", "STORED\r\n"),
    ("SET q  0 0\t5  \r\nhello\r\n", "STORED\r\n"),
    ("set q 0 0 0\r\n\r\n", "STORED\r\n"),
    ("set q 0 0 5 noreply\r\nhello\r\nget q\r\n", "VALUE q 0 5\r\nhello\r\nEND\r\n"),
    ("set noreply 0 0 1\r\nx\r\nflush noreply\r\ndelete noreply\r\n",
     "STORED\r\nEND\r\nDELETED\r\n"),
    ("delete noreply noreply\r\nflush_all noreply\r\nversion\r\n", "VERSION 1.0.0\r\n"),
    ("set q 4294967295 0 1\r\nx\r\nget q\r\n",
     "STORED\r\nVALUE q 4294967295 1\r\nx\r\nEND\r\n"),
    ("set q 0 0 5\r\nhello!\r\nversion\r\n", "CLIENT_ERROR bad data chunk\r\n✂"),
    ("set q 0 0 5 noreply\r\nhello!\r\n", "✂"),
    ("set q 0 0 x\r\n", "CLIENT_ERROR bad byte count\r\n✂"),
    ("set q 0 0 -1\r\n", "CLIENT_ERROR bad byte count\r\n✂"),
    ("set q 0 0 1e1\r\n", "CLIENT_ERROR bad byte count\r\n✂"),
    ("set q 0 0\r\n", "CLIENT_ERROR set needs a queue, flags, expiry and byte count\r\n✂"),
    ("set my queue 0 0 13\r\ndelete jobs\r\n\r\n", "CLIENT_ERROR more words than set has\r\n✂"),
    ("set my q 0 0 5 noreply\r\nflush\r\n", "✂"),
    ("set q 0 0 5 norepli\r\nflush\r\n", "CLIENT_ERROR more words than set has\r\n✂"),
    ("set q x 0 2\r\nab\r\nversion\r\n", "CLIENT_ERROR bad flags\r\nVERSION 1.0.0\r\n"),
    ("set q -1 0 2\r\nab\r\nversion\r\n", "CLIENT_ERROR bad flags\r\nVERSION 1.0.0\r\n"),
    ("set q 4294967296 0 2\r\nab\r\n", "CLIENT_ERROR bad flags\r\n"),
    ("set q 0 soon 2\r\nab\r\nversion\r\n", "CLIENT_ERROR bad expiry\r\nVERSION 1.0.0\r\n"),
    ("set q x 0 2 noreply\r\nab\r\nversion\r\n", "VERSION 1.0.0\r\n"),
    ("set q 0 0 134217729\r\n" + "x" * 99, "SERVER_ERROR object too large for cache\r\n"),
    ("set a/b 0 0 7\r\nversion\r\nversion\r\n",
     "CLIENT_ERROR set knows the options delay= and sync\r\nVERSION 1.0.0\r\n"),
    ("set a.b 0 0 1\r\nx\r\n", "CLIENT_ERROR '.' in the name of a queue\r\n"),
    ("set a~b 0 0 1\r\nx\r\n", "CLIENT_ERROR '~' in the name of a queue\r\n"),
    ("set a\x01b 0 0 1\r\nx\r\n", "CLIENT_ERROR '\\x01' in the name of a queue\r\n"),
    ("set a\xc2\x85b 0 0 1\r\nx\r\n", "CLIENT_ERROR '\\x85' in the name of a queue\r\n"),
    ("set lost+found 0 0 1\r\nx\r\n",
     "CLIENT_ERROR lost+found is where damaged journals are kept\r\n"),
    ("set %s 0 0 1\r\nx\r\n" % ("n" * 236), "STORED\r\n"),
    ("set %s 0 0 1\r\nx\r\n" % ("n" * 237),
     "CLIENT_ERROR the name of a queue is longer than 236 bytes\r\n"),
    # get
    ("get q\r\n", "END\r\n"),
    ("get  q  \n", "END\r\n"),
    ("get q/t=0\r\n", "END\r\n"),
    ("get q/t=-5\r\n", "END\r\n"),
    ("set q 0 0 1\r\nx\r\nget q/OPEN\r\nget q/Abort\r\n",
     "STORED\r\nVALUE q/OPEN 0 1\r\nx\r\nEND\r\nEND\r\n"),
    ("get q/peek\r\n", "END\r\n"),
    ("get q/close\r\n", "END\r\n"),
    ("get q/abort\r\n", "END\r\n"),
    ("get\r\n", "CLIENT_ERROR get needs the name of a queue\r\n"),
    ("get q/t=x\r\nversion\r\n", "CLIENT_ERROR bad timeout\r\nVERSION 1.0.0\r\n"),
    ("get q/t=\r\nversion\r\n", "CLIENT_ERROR bad timeout\r\nVERSION 1.0.0\r\n"),
    ("get /open\r\n", "CLIENT_ERROR the name of a queue is empty\r\n"),
    ("get a.b\r\n", "CLIENT_ERROR '.' in the name of a queue\r\n"),
    ("get %s\r\n" % ("n" * 237),
     "CLIENT_ERROR the name of a queue is longer than 236 bytes\r\n"),
    *[("get q/%s\r\nversion\r\n" % options, "CLIENT_ERROR open, close, abort and peek cannot "
       "be combined like this\r\nVERSION 1.0.0\r\n") for options in (
        "peek/open", "open/peek", "peek/close", "abort/open", "abort/close", "peek/abort")],
    # the rest
    ("delete q\r\n", "DELETED\r\n"),
    ("delete q 0\r\n", "DELETED\r\n"),
    ("delete q 0 noreply\r\nversion\r\n", "VERSION 1.0.0\r\n"),
    *[(word + " my queue\r\nversion\r\n",
       "CLIENT_ERROR %s takes one name\r\nVERSION 1.0.0\r\n" % word.split()[0])
      for word in ("delete", "flush", "flush_expired", "delete q 0", "flush q noreply")],
    ("delete q noreply\r\nversion\r\n", "VERSION 1.0.0\r\n"),
    ("delete\r\n", "CLIENT_ERROR delete needs the name of a queue\r\n"),
    ("flush q\r\n", "END\r\n"),
    ("flush_all\r\n", "Flushed all queues.\r\n"),
    ("flush_all 0 what\r\n", "Flushed all queues.\r\n"),
    ("flush_all 0 noreply\r\nversion\r\n", "VERSION 1.0.0\r\n"),
    ("flush_expired q\r\n", "0\r\n"),
    ("flush_all_expired\r\n", "0\r\n"),
    ("confirm q 1\r\n", "ERROR\r\n"),
    ("confirm q x\r\n", "CLIENT_ERROR bad number of items\r\n"),
    ("confirm q\r\n", "CLIENT_ERROR confirm needs a queue and a number of items\r\n"),
    ("monitor q\r\n", "CLIENT_ERROR monitor needs a queue and a number of seconds\r\n"),
    ("monitor q x\r\n", "CLIENT_ERROR bad number of seconds\r\n"),
    ("monitor q 1 x\r\n", "CLIENT_ERROR bad number of items\r\n"),
    ("reload\r\n", "Reloaded config.\r\n"),
    ("status\r\n", "UP\r\n"),
    ("status readonly\r\nstatus\r\n", "END\r\nREADONLY\r\n"),
    ("status off\r\n", "CLIENT_ERROR 'off' is none of: up, writeavoid, readonly, quiescent\r\n"),
    ("version\r\n", "VERSION 1.0.0\r\n"),
    ("verbosity 1\r\n", "OK\r\n"),
    ("verbosity 1 noreply\r\nversion\r\n", "VERSION 1.0.0\r\n"),
    ("quit\r\nversion\r\n", "✂"),
    ("shutdown\r\nversion\r\n", "✂"),
    *[("%s q 0 0 7\r\nversion\r\nversion\r\n" % word,
       "CLIENT_ERROR %s has no meaning for a queue\r\nVERSION 1.0.0\r\n" % word)
      for word in ("add", "replace", "append", "prepend")],
    ("cas q 0 0 7 99\r\nversion\r\nversion\r\n",
     "CLIENT_ERROR cas has no meaning for a queue\r\nVERSION 1.0.0\r\n"),
    ("add q 0 0 7 noreply\r\nversion\r\nversion\r\n", "VERSION 1.0.0\r\n"),
    ("add q 0 0\r\n", "CLIENT_ERROR add needs a queue, flags, expiry and byte count\r\n✂"),
    ("".join(word + " q 1\r\n" for word in MEMCACHED), "ERROR\r\n" * len(MEMCACHED)),
    ("what\r\nversion\r\n", "ERROR unknown command\r\n✂"),
    ("ms foo 11 T10\r\ndelete jobs\r\n", "ERROR unknown command\r\n✂"),
    *[(line + "\r\nflush_all\r\n", "ERROR unknown command\r\n✂") for line in (
        "POST / HTTP/1.1", "Host: here", "Content-Type: text/plain", "x=1&y=2", "{", "EHLO me")],
    *[(byte + "get q\nflush_all\n", "ERROR this protocol is not supported\r\n✂")
      for byte in "\x00\x01\x0b\x0c\x16\x1f\x80"],
    ("\x16\x03\x01\x02\x00\x01", "ERROR this protocol is not supported\r\n✂"),
    ("touch q 1 noreply\r\nversion\r\n", "VERSION 1.0.0\r\n"),
    ("\r\n\n \r\nversion\r\n", "ERROR\r\n" * 3 + "VERSION 1.0.0\r\n"),
    ("incr " + "x" * 8187 + "\r\nversion\r\n", "ERROR\r\nVERSION 1.0.0\r\n"),
    ("x" * 8193 + "\r\nversion\r\n", "CLIENT_ERROR line too long\r\n✂"),
    ("x" * 8194, "CLIENT_ERROR line too long\r\n✂"),
    ("\x80\x00\x00\x05\x00", "ERROR this protocol is not supported\r\n✂"),
    ("\x80\x00\x00\n\x00", "ERROR this protocol is not supported\r\n✂"),
]


@pytest.mark.parametrize("sent, answer", ANSWERS)
def test_answers(talk, sent, answer):
    assert talk(sent.encode("latin-1")) == answer


@pytest.mark.parametrize("sent, answer", ANSWERS)
def test_answers_to_single_bytes(talk, sent, answer):
    heard = ""
    for byte in sent.encode("latin-1"):
        heard = heard.rstrip("✂") + talk(bytes([byte]))
    assert heard == answer


def test_get_gives_back_key_flags_and_data(talk):
    talk(set_("q", "one", "7 0") + set_("q", "two") + set_("q", "3\r\nEND\r\n"))
    assert talk("get q\r\n") == "VALUE q 7 3\r\none\r\nEND\r\n"
    assert talk("get q/t=10/what\r\n") == "VALUE q/t=10/what 0 3\r\ntwo\r\nEND\r\n"
    assert talk("get q\r\n") == "VALUE q 0 8\r\n3\r\nEND\r\n\r\nEND\r\n"
    assert talk(set_("50%d%%", "x") + "get 50%d%%\r\n") == (
        "STORED\r\nVALUE 50%d%% 0 1\r\nx\r\nEND\r\n")


def test_keep_flags_off(tmp_path):
    talk = Talk(tmp_path, "[queue q]\nkeep_flags = off\n")
    assert talk(set_("q", "x", "7 0") + "get q\r\n") == "STORED\r\nVALUE q 0 1\r\nx\r\nEND\r\n"


@pytest.mark.parametrize("expiry, lives", [
    ("0", 10 ** 15), ("10", 10000), ("999999", 999999000), ("-1", 0),
    (str(NOW // 1000 + 5), 5000), ("1000000", 0), ("99999999999999999999", 10 ** 15)])
def test_expiration(talk, expiry, lives):
    talk(set_("q", "x", "0 " + expiry))
    if lives:
        talk.now = NOW + lives - 1
        assert talk("get q/peek\r\n") == "VALUE q/peek 0 1\r\nx\r\nEND\r\n"
    if lives < 10 ** 15:
        talk.now = NOW + lives
        assert talk("get q\r\n") == "END\r\n"


def test_not_stored(tmp_path):
    talk = Talk(tmp_path, "[queue q]\nmax_items = 1\n[queue s]\nmax_item_size = 3\n")
    assert talk(set_("q", "a") + set_("q", "version") + "version\r\n") == (
        "STORED\r\nNOT_STORED\r\nVERSION 1.0.0\r\n")
    assert talk(set_("s", "1234") + set_("s", "123")) == "NOT_STORED\r\nSTORED\r\n"
    assert talk("set s 0 0 4 noreply\r\n1234\r\nversion\r\n") == "VERSION 1.0.0\r\n"


def test_a_large_item_is_in_memory_once_while_it_arrives(talk):
    talk(set_("q", "") + "get q\r\n")
    session = talk.session()
    size = 16 << 20
    data = os.urandom(size)
    tracemalloc.start()
    try:
        session.feed(b"set q 0 0 %d\r\n" % size, NOW)
        for at in range(0, size, 1 << 16):
            session.feed(data[at:at + (1 << 16)], NOW)
        session.feed(b"\r\nversion\r\n", NOW)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert b"".join(session.out) == b"STORED\r\nVERSION 1.0.0\r\n"
    assert talk.broker.queues["q"].remove(now=NOW).data == data
    assert peak < 1.5 * size


def test_too_large_a_block_is_swallowed_without_being_kept(talk):
    session = talk.session()
    assert talk("set q 0 0 200000000\r\n") == "SERVER_ERROR object too large for cache\r\n"
    block = b"version\r\n" * 8000
    for _ in range(200000000 // len(block)):
        session.feed(block, NOW)
        assert session.unparsed < 100 and not session.out
    talk(b"x" * (200000000 % len(block)) + b"\r\n")
    assert talk("version\r\n") == "VERSION 1.0.0\r\n"


def test_gets_gives_each_item_a_number_of_its_own(talk):
    talk(set_("q", "a") + set_("q", "b"))
    first = talk("gets q/peek\r\n")
    assert re.fullmatch(r"VALUE q/peek 0 1 \d+\r\na\r\nEND\r\n", first)
    assert first.split()[4] == talk("gets q\r\n").split()[4]
    assert first.split()[4] != talk("gets q\r\n").split()[4]


def test_get_of_many_keys(talk):
    talk(set_("a", "1") + set_("c", "3"))
    assert talk("get a b c\r\n") == "VALUE a 0 1\r\n1\r\nVALUE c 0 1\r\n3\r\nEND\r\n"
    assert talk("get a b c\r\n") == "END\r\n"
    talk(set_("a", "1"))
    assert "CLIENT_ERROR" in talk("get a b/t=x c\r\n")
    assert talk("get a\r\n") == "VALUE a 0 1\r\n1\r\nEND\r\n"


@promise(7)
def test_get_of_many_keys_waits_for_one_after_the_other(talk):
    assert talk("get a/t=50 b c/t=60\r\n") == ""
    session = talk.session()
    assert session.timeout == 50
    session.timeout = None
    talk(set_("c", "3"), "other")
    talk(set_("a", "1"), "other")
    assert talk.heard() == "VALUE a/t=50 0 1\r\n1\r\nVALUE c/t=60 0 1\r\n3\r\nEND\r\n"
    assert session.timeout is None
    assert talk("get a/t=50 c/t=60\r\n") == ""
    session.time_out()
    assert talk.heard() == "" and session.timeout == 60
    session.time_out()
    assert talk.heard() == "END\r\n"


def test_waiting_get(talk):
    assert talk("get q/t=500\r\nversion\r\n") == ""
    assert talk.session().timeout == 500
    assert talk(set_("q", "x"), "other") == "STORED\r\n"
    assert talk.heard() == "VALUE q/t=500 0 1\r\nx\r\nEND\r\nVERSION 1.0.0\r\n"
    talk("get q/t=500\r\nversion\r\n")
    talk.session().time_out()
    assert talk.heard() == "END\r\nVERSION 1.0.0\r\n"
    assert not talk.broker.queues["q"].waiters


def test_waiting_peek(talk):
    talk(set_("q", "x") + "get q\r\n", "other")
    assert talk("get q/peek/t=500\r\n") == ""
    talk(set_("q", "x"), "other")
    assert talk.heard() == "VALUE q/peek/t=500 0 1\r\nx\r\nEND\r\n"
    assert talk("get q\r\n") == "VALUE q 0 1\r\nx\r\nEND\r\n"


def test_a_waiter_that_has_gone_gets_nothing(talk):
    talk("get q/t=500\r\n", "gone")
    talk("get q/t=500\r\n", "next")
    talk.session("gone").close(NOW)
    talk(set_("q", "x"), "other")
    assert talk.heard("next").startswith("VALUE q/t=500 0 1\r\nx")
    assert talk.heard("gone") == "✂"


def test_open_close_abort(talk):
    talk(set_("q", "a") + set_("q", "b") + set_("q", "c"))
    assert talk("get q/open\r\n") == "VALUE q/open 0 1\r\na\r\nEND\r\n"
    assert talk("get q/peek\r\n", "other") == "VALUE q/peek 0 1\r\nb\r\nEND\r\n"
    assert talk("get q/abort\r\n") == "END\r\n"
    assert talk("get q/open/t=10\r\n") == "VALUE q/open/t=10 0 1\r\na\r\nEND\r\n"
    assert talk("get q/close/open\r\n") == "VALUE q/close/open 0 1\r\nb\r\nEND\r\n"
    assert talk("get q/t=100/open/close\r\n") == "VALUE q/t=100/open/close 0 1\r\nc\r\nEND\r\n"
    assert talk("get q/close\r\n") == "END\r\n"
    assert contents_of(talk.broker.spool) == []
    assert talk.broker.queues["q"].counters.transactions == 4


def test_close_acts_on_the_oldest_open_read_of_that_queue(talk):
    talk(set_("q", "a") + set_("q", "b") + set_("r", "c"))
    talk("get q/open\r\nget r/open\r\nget q/open\r\n")
    talk("get q/close\r\n")
    assert [item.data for item in talk.broker.queues["q"].opens.values()] == [b"b"]
    talk("get q/abort\r\nget q/close\r\n")
    assert items_of(talk.broker, "q") == [b"b"]
    assert len(talk.broker.queues["r"].opens) == 1


def test_a_plain_get_with_a_read_open(talk):
    talk(set_("q", "a") + "get q/open\r\n")
    answer = talk("get q\r\nversion\r\n")
    assert answer.startswith("ERROR ") and answer.endswith("\r\n✂")
    talk.session().close(NOW)
    assert items_of(talk.broker, "q") == [b"a"]


def test_too_many_open_reads(tmp_path):
    talk = Talk(tmp_path, "[server]\nmax_open_transactions = 2\n")
    talk(set_("q", "a") * 4 + set_("r", "a") + "get q/open\r\nget q/open\r\nget r/open\r\n")
    answer = talk("get q/open\r\nversion\r\n")
    assert answer.startswith("ERROR too many open") and answer.endswith("limit=2\r\n✂")


@promise(3)
def test_open_reads_of_a_client_that_leaves_go_back_in_order(talk):
    talk("".join(set_("q", data) for data in "abcdef"))
    talk("get q/open\r\n" * 3)
    talk("get q/open\r\n", "other")
    talk.session().close(NOW)
    assert items_of(talk.broker, "q") == [b"a", b"b", b"c", b"e", b"f"]
    talk("get q/abort\r\n", "other")
    talk("get q/open/t=100\r\n" * 6, "last")
    talk("get q/open/t=100\r\n", "waiting")
    talk.session("last").close(NOW)
    assert talk.heard("waiting") == "VALUE q/open/t=100 0 1\r\nd\r\nEND\r\n"
    assert contents_of(talk.broker.spool) == [b"d", b"a", b"b", b"c", b"e", b"f"]


def test_reads_create_a_queue_and_the_rest_does_not(talk):
    talk("get a\r\nget b+c/t=1\r\nmonitor d 0\r\nget e/close/open\r\n")
    talk("flush f\r\ndelete g\r\nconfirm h 1\r\nget i/close\r\nget j/abort\r\nget k/peek\r\n"
         "stats l\r\ndump_stats m\r\nflush_expired n\r\n")
    talk.session().time_out()
    talk.heard()
    talk.session().time_out()
    talk.heard()
    assert sorted(talk.broker.queues) == ["a", "b+c", "d", "e"]
    assert sorted(os.listdir(talk.broker.spool)) == ["a", "b+c", "d", "e"]


def test_value_key_is_the_name_of_the_queue_if_that_is_asked_for(tmp_path):
    talk = Talk(tmp_path, "[server]\nvalue_key = queue\n")
    talk(set_("q", "1") * 4)
    assert talk("get q/t=10/open\r\n") == "VALUE q 0 1\r\n1\r\nEND\r\n"
    assert talk("get r q/peek\r\n") == "VALUE q 0 1\r\n1\r\nEND\r\n"
    assert re.fullmatch("VALUE q 0 1 \\d+\r\n1\r\nEND\r\n", talk("gets q/close/open\r\n"))
    assert talk("monitor q 0\r\n") == "VALUE q 0 1\r\n1\r\nEND\r\n" * 2 + "END\r\n"


def test_confirm_is_all_or_nothing(talk):
    talk(set_("q", "1") * 5 + "monitor q 0 3\r\n")
    assert talk("confirm q 4\r\n") == "ERROR\r\n"
    assert len(talk.broker.queues["q"].opens) == 3
    assert talk("confirm q 2\r\nconfirm q 1\r\n") == "END\r\nEND\r\n"
    assert not talk.broker.queues["q"].opens


def test_no_new_statistic_looks_like_one_of_another_queue():
    kestrels = QUEUE_STATS[:QUEUE_STATS.index("create_time") + 1]
    for name in QUEUE_STATS[len(kestrels):] + ["children"]:
        assert not re.search("_(items|bytes|total_items|logsize|expired_items|mem_items|mem_bytes|"
                             "age|discarded|waiters|open_transactions)$", "_" + name)


@pytest.mark.parametrize("session_type, said, answers", [
    (kestrel.MemcacheSession, "stats\r\ndelete no\r\nset c 0 0 1\r\nx\r\nversion\r\n",
     "DELETED\r\nSTORED\r\nVERSION 1.0.0\r\n✂"),
    (kestrel.MemcacheSession, "set c 0 0 1\r\nx\r\nget no/peek\r\nget a b\r\nreload\r\nversion\r\n",
     "STORED\r\nEND\r\nEND\r\nReloaded config.\r\nVERSION 1.0.0\r\n✂"),
    (kestrel.MemcacheSession, "reload\r\nset c 0 0 1\r\nx\r\nget w/t=5000\r\nversion\r\n",
     "Reloaded config.\r\nSTORED\r\nEND\r\nVERSION 1.0.0\r\n✂"),
    (kestrel.MemcacheSession, "get w/t=1\r\nmonitor w 5\r\nget v/or=w/t=9\r\nset c 0 0 1\r\nx\r\n",
     "END\r\nEND\r\nEND\r\nSTORED\r\n✂"),
    (kestrel.MemcacheSession, "set c 0 0 1\r\nx\r\nget w/t=5000\r\n", "STORED\r\n✂"),
    (kestrel.TextSession, "get nn\nput k:\na\n\nput k:\nb\n\nput c:\nx\n\nversion\n",
     "*\n+1\n+1\n+1\n:1.0.0\n✂"),
    (kestrel.ThriftSession, (call(b"flush_all_queues") + thrift_put(b"c", b"x")
                             + call(b"get_version")).decode("latin-1"), "1.0.0\x00✂"),
    (kestrel.AdminSession, request("POST /reload") + request("GET /ping") + request("GET /status"),
     "UP\n✂")])
def test_all_that_was_said_before_a_half_close_is_done(tmp_path, session_type, said, answers):
    talk = Talk(tmp_path, session_type=session_type)
    session = talk.session()
    session.feed(said.encode("latin-1"), NOW)
    session.hang_up(NOW)
    assert talk.heard().endswith(answers)
    assert session_type is kestrel.AdminSession or items_of(talk.broker, "c") == [b"x"]


@pytest.mark.parametrize("command", [
    "get noreply\r\n", "confirm noreply\r\n", "get a/t=x noreply\r\n", "monitor noreply\r\n"])
def test_only_commands_that_have_noreply_are_silent(talk, command):
    assert talk(command + "version\r\n").count("\r\n") == 2


@pytest.mark.parametrize("command", ["get q/t=1000\r\n", "monitor q 10\r\n"])
def test_a_read_in_hand_ends_when_its_queue_is_deleted(talk, command):
    """Before it waits, too: here it is dropping a run of expired items."""
    for waiting in (False, True):
        put(talk.broker, "q", *[b"late"] * (0 if waiting else 2500), expiry=NOW + 1)
        session = talk.session("reader %s" % waiting)
        session.feed(command.encode(), NOW + 10)
        assert session.state == ("waiting" if waiting else "working")
        assert talk("delete q\r\n") == "DELETED\r\n"
        assert talk.heard("reader %s" % waiting) == "END\r\n"
        assert "q" not in talk.broker.queues
        route = talk.broker.route(b"q", NOW)


def test_a_command_without_an_answer_fails_alone(talk, disk):
    """What fails of it is not blamed on the next command, and is not told."""
    talk(set_("other", "1"))
    session = talk.session()
    session.feed(b"set new 0 0 1 noreply\r\nx\r\nget other\r\nflush new noreply\r\nversion\r\n", NOW)
    session.resume(NOW)
    for queue in talk.broker.dirty:
        disk.failing = {"pwrite": errno.ENOSPC} if queue.name == "new" else {}
        with contextlib.suppress(OSError):
            queue.write()
    disk.failing = {}
    session.settle(talk.broker.write()[1], set())
    assert b"".join(session.take()) == b"VALUE other 0 1\r\n1\r\nEND\r\nVERSION 1.0.0\r\n"


def test_a_peek_stays_true_though_a_put_of_that_turn_fails(talk, disk):
    talk(set_("q", "1"))
    disk.failing = {"pwrite": errno.ENOSPC}
    putter, peeker, both = map(talk.session, ("putter", "peeker", "both"))
    putter.feed(set_("q", "2").encode(), NOW)
    peeker.feed(b"get q/peek\r\nget none/peek\r\n", NOW)
    peeker.resume(NOW)
    putter.feed(set_("new", "3").encode(), NOW)
    putter.resume(NOW)
    both.feed(b"get new/peek\r\n", NOW)
    failed = commit(talk.broker, NOW)[1]
    for session in (putter, peeker, both):
        session.settle(failed, set())
    assert b"".join(putter.take()) == (b"SERVER_ERROR q: No space left on device\r\n"
                                       b"SERVER_ERROR new: No space left on device\r\n")
    assert b"".join(peeker.take()) == b"VALUE q/peek 0 1\r\n1\r\nEND\r\nEND\r\n"
    assert b"".join(both.take()) == b"SERVER_ERROR new: No space left on device\r\n"


def test_an_item_for_very_many_children_is_put_in_steps(tmp_path, disk):
    talk = Talk(tmp_path, "[queue]\nkeep_journal = false\n[queue fan+full]\nmax_items = 1\n")
    for number in range(400):
        talk.broker.queue("fan+%d" % number, NOW)
    talk.broker.queue("fan+full", NOW)
    talk.broker.queue("fan", NOW)
    session = talk.session()
    session.feed((set_("fan", "1") + set_("fan", "2") + "version\r\n").encode(), NOW)
    steps = 0
    while session.state == "working":
        before = sum(queue.count for queue in talk.broker.queues.values())
        commit(talk.broker, NOW)
        session.resume(NOW)
        assert sum(queue.count for queue in talk.broker.queues.values()) - before < 110
        steps += 1
    assert steps >= 8
    assert b"".join(session.take()) == b"STORED\r\nSTORED\r\nVERSION 1.0.0\r\n"
    assert {items_of(talk.broker, name)[-1] for name in talk.broker.queues} == {b"1", b"2"}
    assert items_of(talk.broker, "fan+399") == [b"1", b"2"]
    talk.broker.delete(talk.broker.queues["fan+7"])        # while the next is under way
    assert talk(set_("fan", "3")) == "STORED\r\n"


def test_alias_over_the_wire(tmp_path):
    talk = Talk(tmp_path, "[alias all]\ndestination_queues = a, b\n")
    assert talk(set_("all", "x")) == "STORED\r\n"
    assert talk("get all\r\nget all/t=100\r\nget all/open\r\nget all/peek\r\n") == "END\r\n" * 4
    assert talk("flush all\r\ndelete all\r\n") == "END\r\nDELETED\r\n"
    assert talk("get a b\r\n").count("VALUE") == 2


def test_an_alias_hides_a_queue_of_its_name(tmp_path, caplog):
    spool = tmp_path / "spool"
    spool.mkdir()
    spool_of(spool, all=addx(b"x"))
    talk = Talk(tmp_path, "[alias all]\ndestination_queues = a\n")
    assert "hides" in caplog.text
    assert talk("get all\r\nget all/peek\r\n") == "END\r\nEND\r\n"
    assert talk("delete all\r\n") == "DELETED\r\n" and (spool / "all").exists()


def test_who_has_answers_to_read_is_heard_as_far_as_his_share_goes(talk):
    session = talk.session()
    for _ in range(2):
        session.feed(b"version\r\n", NOW)
    assert len(session.out) == 2 and session.state == "ready"
    talk.broker.share = 100                  # there are more clients now
    session.feed(b"version\r\n", NOW)
    assert len(session.out) == 2 and session.state == "full"
    session.take()
    session.sent()
    session.resume(NOW)
    assert session.out == [b"VERSION 1.0.0\r\n"]


def test_a_reload_that_makes_a_queue_an_alias(tmp_path):
    """Of lines that the server has seen before, too."""
    talk = Talk(tmp_path, "")
    assert talk(set_("all", "x") * 2 + "get all\r\n").endswith("VALUE all 0 1\r\nx\r\nEND\r\n")
    config_of(tmp_path, "[alias all]\ndestination_queues = a\n")
    assert reload(talk.broker) is None
    assert talk("get all\r\n" + set_("all", "y") + "get a\r\n") == (
        "END\r\nSTORED\r\nVALUE a 0 1\r\ny\r\nEND\r\n")
    config_of(tmp_path, "")
    assert reload(talk.broker) is None
    assert talk(set_("all", "z") + "get all\r\nget a\r\n") == (
        "STORED\r\nVALUE all 0 1\r\nx\r\nEND\r\nEND\r\n")


def test_a_child_made_after_the_first_set(talk):
    talk(set_("fan", "1") + "get fan+one\r\n" + set_("fan", "2"))
    assert talk("get fan+one\r\n") == "VALUE fan+one 0 1\r\n2\r\nEND\r\n"
    talk("delete fan+one\r\n" + set_("fan", "3"))
    assert talk("get fan+one\r\n") == "END\r\n"


def test_monitor_and_confirm(talk):
    talk("".join(set_("q", data) for data in "abcd"))
    assert talk("monitor q 10 2\r\nversion\r\n") == (
        "VALUE q 0 1\r\na\r\nEND\r\nVALUE q 0 1\r\nb\r\nEND\r\nEND\r\nVERSION 1.0.0\r\n")
    assert talk("confirm q 1\r\n") == "END\r\n"
    assert talk("confirm q 5\r\n") == "ERROR\r\n"
    assert len(talk.broker.queues["q"].opens) == 1
    assert talk("confirm q 0\r\nconfirm q 1\r\n") == "END\r\nEND\r\n"
    assert talk("monitor q 10\r\n").count("VALUE") == 2
    assert talk.session().timeout == 10000
    talk(set_("q", "e"), "other")
    assert talk.heard() == "VALUE q 0 1\r\ne\r\nEND\r\n"
    talk.session().time_out()
    assert talk.heard() == "END\r\n"
    assert talk("confirm q 3\r\n") == "END\r\n"
    assert contents_of(talk.broker.spool) == []


def test_monitor_ends_when_too_many_are_open(tmp_path):
    talk = Talk(tmp_path, "[server]\nmax_open_transactions = 2\n")
    talk("".join(set_("q", data) for data in "abcd"))
    answer = talk("monitor q 10\r\n")
    assert answer.count("VALUE") == 2 and answer.endswith("END\r\nEND\r\n")


def test_flush_all_reply(tmp_path):
    talk = Talk(tmp_path, "[server]\nflush_all_reply = memcached\n")
    talk(set_("a", "x") + set_("b", "x"))
    assert talk("flush_all\r\n") == "OK\r\n"
    assert items_of(talk.broker, "a") == items_of(talk.broker, "b") == []


def test_flush_all_drops_delayed_items_too(talk):
    """A queue that had nothing else was left out."""
    assert talk("set q/delay=1000 0 0 1\r\na\r\nflush_all\r\n").endswith("queues.\r\n")
    talk.now += 1000
    assert talk("get q\r\n") == "END\r\n"


def test_flush_and_delete(talk):
    talk(set_("q", "a") + set_("q", "b"))
    assert talk("flush q\r\nget q\r\n") == "END\r\nEND\r\n"
    talk(set_("q", "a") + set_("q", "b") + "get q/open\r\n")
    talk("get q/close\r\nget q/t=100\r\nget q/t=100\r\n", "other")
    assert talk("delete q\r\nget q/close\r\n") == "DELETED\r\nEND\r\n"
    assert "END\r\n" in talk.heard("other")
    assert "queue_q_items" not in talk("stats\r\n")
    assert talk("get q\r\n") == "END\r\n"


def test_flush_expired(talk):
    talk(set_("q", "a", "0 1") + set_("q", "b", "0 2") + set_("q", "c") + set_("r", "d", "0 1"))
    talk.now += 1000
    assert talk("flush_expired q\r\n") == "1\r\n"
    talk.now += 1000
    assert talk("flush_all_expired\r\n") == "2\r\n"
    assert items_of(talk.broker, "q") == [b"c"]


@pytest.mark.parametrize("status, reads, writes", [
    ("up", True, True), ("writeavoid", True, True), ("readonly", True, False),
    ("quiescent", False, False)])
def test_status(talk, status, reads, writes):
    talk(set_("q", "a") * 3 + "get q/open\r\n")
    assert talk("status %s\r\nstatus\r\n" % status) == "END\r\n%s\r\n" % status.upper()
    assert talk("get q/close\r\n") == "END\r\n"
    for command, allowed in [
            ("get q\r\n", reads), ("get q/peek\r\n", reads), ("monitor q 0\r\n", reads),
            (set_("q", "b"), writes), ("flush q\r\n", writes), ("delete q\r\n", writes)]:
        name = "client of " + command
        answer = talk(command, name)
        if allowed:
            assert "ERROR" not in answer
        else:
            assert re.fullmatch(r"SERVER_ERROR the server is \w+: .+\r\n✂", answer)
    assert talk("status up\r\nversion\r\n") == "END\r\nVERSION 1.0.0\r\n"


def test_shutdown_is_for_this_machine(tmp_path):
    talk = Talk(tmp_path)
    talk.session("far", local=False)
    assert talk("shutdown\r\n", "far").startswith("CLIENT_ERROR")
    assert not talk.broker.stopping
    assert talk("shutdown\r\n") == "✂" and talk.broker.stopping
    talk = Talk(tmp_path / "..", "[server]\nallow_remote_shutdown = true\n")
    talk.session("far", local=False)
    assert talk("shutdown\r\n", "far") == "✂" and talk.broker.stopping


def test_reload_with_a_mistake(talk, tmp_path):
    (tmp_path / "kestrel.conf").write_text("[queue]\nmax_items = lots\n")
    assert talk("reload\r\n") == (
        "SERVER_ERROR %s/kestrel.conf:2: max_items: 'lots' is not a whole number from 1"
        "\r\n" % tmp_path)


QUEUE_STATS = """items bytes total_items logsize expired_items mem_items mem_bytes age discarded
waiters open_transactions transactions canceled_transactions total_flushes journal_rewrites
journal_rotations create_time head_wait bytes_put bytes_taken get_hits get_misses put_rate get_rate
fsync_usec delayed paused dead_letters""".split()
SERVER_STATS = """uptime time version curr_items total_items bytes reserved_memory_ratio
curr_connections total_connections cmd_get cmd_set cmd_peek get_hits get_misses bytes_read
bytes_written queue_creates queue_deletes queue_expires put_rate get_rate max_turn_usec
max_fsync_usec trouble""".split()


def test_stats(talk):
    talk(set_("fan", "abc") + "get fan+one\r\nget fan\r\nget fan\r\nget fan/peek\r\n")
    talk.now = NOW + 5000
    lines = talk("stats fan\r\n").split("\r\n")
    assert lines[-2:] == ["END", ""]
    names = [line.split(" ")[1] for line in lines[:-2]]
    assert names[:len(SERVER_STATS)] == SERVER_STATS
    rest = names[len(SERVER_STATS):]
    fan = ["queue_fan_" + name for name in QUEUE_STATS]
    assert rest[:len(fan)] == fan and rest[len(fan):].index("queue_fan_children") >= 0
    assert rest[-len(QUEUE_STATS):] == ["queue_fan+one_" + name for name in QUEUE_STATS]
    assert all(re.fullmatch(r"STAT \S+ \S+", line) for line in lines[:-2])
    stats = dict(line.split(" ")[1:] for line in lines[:-2])
    assert (stats["uptime"], stats["version"], stats["queue_fan_children"]) == (
        "0", "1.0.0", "fan+one")
    assert (stats["cmd_get"], stats["get_hits"], stats["get_misses"]) == ("3", "1", "2")
    assert (stats["cmd_set"], stats["cmd_peek"], stats["queue_creates"]) == ("1", "1", "2")


def test_age_is_how_long_the_item_read_last_had_waited(talk):
    talk(set_("q", "a") + set_("q", "b"))
    talk.now += 1234
    talk("get q\r\n")
    assert "STAT queue_q_age 1234\r\n" in talk("stats\r\n")
    talk("get q\r\n")
    assert "STAT queue_q_age 0\r\n" in talk("stats\r\n")


def test_dump_stats_and_dump_config(talk):
    talk(set_("b", "x") + set_("a", "x"))
    answer = talk("dump_stats\r\n")
    assert answer.startswith("queue 'a' {\r\n  items=1\r\n  bytes=1\r\n")
    assert answer.index("queue 'b' {\r\n  items=1\r\n") > 0 and answer.endswith("}\r\nEND\r\n")
    assert talk("dump_stats b nope\r\n").count("queue") == 1
    answer = talk("dump_config a\r\n")
    assert answer.startswith("queue 'a' {\r\n  max_items=unlimited\r\n")
    assert "\r\n  sync_journal=100ms\r\n" in answer and answer.endswith("}\r\nEND\r\n")


def test_a_queue_that_cannot_be_made_costs_only_itself(talk, disk):
    talk(set_("good", "x"))
    disk.failing = {"open": errno.EMFILE}
    assert re.fullmatch("SERVER_ERROR .*Too many open files\r\nSTORED\r\n",
                        talk(set_("new", "x") + set_("good", "y")))
    assert talk("get new\r\nget good\r\n").startswith("SERVER_ERROR")
    disk.failing = {}
    assert talk(set_("new", "x")) == "STORED\r\n"


def test_output_is_not_piled_up(talk):
    data = "x" * 300000
    talk(set_("q", data) * 8)
    session = talk.session()
    session.feed(b"get q\r\n" * 8, NOW)
    for left in (4, 0):
        assert talk.broker.queues["q"].count == left
        assert sum(b"VALUE" in piece for piece in session.take()) == 4
        session.sent()                               # the next ones
        session.resume(NOW)
    assert not session.out


def test_small_answers_are_not_piled_up_either(talk):
    session = talk.session()
    turns = list(turns_of(session, b"dump_stats q\r\n" * 10 + b"stats\r\n" * 100))
    assert len(turns) > 20
    assert max(sum(map(len, said)) for said in turns) < 2 * session.broker.share
    assert b"".join(itertools.chain(*turns)).count(b"END\r\n") == 110


def test_a_read_that_timed_out_does_not_stand_in_the_way(talk):
    talk(set_("q", "a") + set_("q", "b") + "get q/open\r\n")
    queue = talk.broker.queues["q"]
    queue.abort(*queue.opens)                # as its timeout does
    assert talk("get q\r\n") == "VALUE q 0 1\r\na\r\nEND\r\n"


def test_an_alias_that_hides_a_fanout_child(tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    spool_of(spool, **{"orders+audit": addx(b"x")})
    talk = Talk(tmp_path, "[alias orders+audit]\ndestination_queues = a\n")
    assert talk(set_("orders", "1")) == "STORED\r\n"


@pytest.mark.parametrize("ask, answer", [
    ("get q\r\n", "VALUE q 0 4\r\nlast\r\nEND\r\n"),
    ("get q/t=50\r\n", "VALUE q/t=50 0 4\r\nlast\r\nEND\r\n"),
    ("get q/peek\r\n", "VALUE q/peek 0 4\r\nlast\r\nEND\r\n"),
    ("get none q/open\r\n", "VALUE q/open 0 4\r\nlast\r\nEND\r\n"),
    ("monitor q 0 1\r\n", "VALUE q 0 4\r\nlast\r\nEND\r\nEND\r\n"),
    ("flush_expired q\r\n", "2500\r\n"),
    ("flush_all_expired\r\n", "2500\r\n"),
])
def test_a_mass_expiry_is_dropped_some_in_each_turn(talk, monkeypatch, ask, answer):
    """However many have expired, no turn drops more than two thousand, and a read that meets
    them is answered with what is behind them."""
    talk("get none\r\n")
    put(talk.broker, "q", *map(b"%d".__mod__, range(2500)), expiry=NOW + 1)
    put(talk.broker, "q", b"last")
    commit(talk.broker, NOW)
    talk.now += 10
    session = talk.session()
    session.feed(ask.encode(), talk.now)
    queue = talk.broker.queues["q"]
    dropped = [2501 - queue.count]
    while session.state == "working":
        assert not commit(talk.broker, talk.now)[1]
        before = queue.count
        session.resume(talk.now)
        dropped.append(before - queue.count)
    assert max(dropped) <= 2000 and sum(dropped) >= 2500
    assert talk("version\r\n") == answer + "VERSION 1.0.0\r\n"
    assert dict(talk.broker.server_stats(NOW))["cmd_get"] == 1 + ask.startswith(("get", "monitor")) * (
        "peek" not in ask) + ask.startswith("get none")


def test_a_get_that_closes_meets_a_mass_expiry(talk):
    """The read that it closes is closed once, though the get goes on in later turns."""
    for data in ("1", "2"):
        talk(set_("q", data) + "get q/open\r\n")
    put(talk.broker, "q", *[b"late"] * 2500, expiry=NOW + 1)
    talk.now += 10
    assert talk("get q/close/open\r\n") == "END\r\n"
    assert [item.data for item in talk.broker.queues["q"].opens.values()] == [b"2"]


def test_a_flush_of_many_queues_of_which_one_fails(talk, disk, monkeypatch):
    monkeypatch.setattr(kestrel, "QUEUES_STEP", 1)
    for name in "abc":
        talk(set_(name, "1"))
    session = talk.session()
    session.feed(b"flush_all\r\n", NOW)
    for failing in ({}, {}, {"pwrite": errno.ENOSPC}, {}):
        disk.failing = failing
        session.settle(commit(talk.broker, NOW)[1], set())
        session.resume(NOW)
    assert b"".join(session.take()) == b"SERVER_ERROR b: No space left on device\r\n"
    assert [items_of(talk.broker, name) for name in "abc"] == [[], [b"1"], [b"1"]]


def test_a_client_that_leaves_amid_a_job(talk):
    for number in range(150):
        talk("get q%d\r\n" % number)
    session = talk.session("other")
    session.feed(b"stats\r\n", NOW)
    session.resume(NOW)
    assert session.state == "working"
    session.close(NOW)
    session.resume(NOW)
    assert session.state == "closed" and not session.command


def test_expire_to_queue_taken_away_while_items_are_on_the_way(talk, tmp_path):
    (tmp_path / "kestrel.conf").write_text("[queue work]\nexpire_to_queue = late\n")
    talk("reload\r\n" + set_("work", "1", "0 -1"))
    (tmp_path / "kestrel.conf").write_text("")
    calls = []
    talk.broker.later = lambda delay, call: calls.append(call)
    session = talk.session()
    session.feed(b"flush_expired work\r\n", NOW)
    session.resume(NOW)
    reload(talk.broker)
    assert talk.heard() == "1\r\n"
    calls.pop()()
    assert items_of(talk.broker, "work") == [b"1"]


def conversation(chances):
    """A random stretch of what clients say."""
    said = []
    for _ in range(chances.randrange(1, 40)):
        queue = chances.choice(["a", "b", "b+c"])
        said.append(chances.choice([
            set_(queue, "x" * chances.randrange(50), "%d 0" % chances.randrange(3)),
            set_(queue, "y\r\nget b\r\n"),
            "set %s 0 0 3 noreply\r\nabc\r\n" % queue,
            "get %s\r\n" % queue, "get %s/close/open\r\n" % queue, "get a b b+c\r\n",
            "get %s/abort\r\n" % queue, "get %s/peek\r\n" % queue, "what\r\n",
            "confirm %s 2\r\n" % queue, "flush %s\r\n" % queue, "add x 0 0 2\r\nab\r\n"]))
    return "".join(said).encode()


@promise(7)
def test_input_in_any_pieces_gives_the_same_answers(tmp_path):
    chances = seeded()
    for number in range(30):
        sent = conversation(chances)
        paths = [tmp_path / ("%s%d" % (kind, number)) for kind in ("whole", "pieces")]
        for path in paths:
            path.mkdir()
        whole, pieces = map(Talk, paths)
        expected = whole(sent)
        heard = ""
        while sent:
            size = chances.randrange(1, 30)
            heard = heard.rstrip("✂") + pieces(sent[:size])
            sent = sent[size:]
        assert heard == expected


def test_the_data_block_of_a_large_item_is_not_joined_again_and_again(talk):
    session = talk.session()
    session.feed(b"set q 0 0 1000000\r\n", NOW)
    joins = []
    parse = session._parse
    session._parse = lambda data, now: joins.append(len(data)) or parse(data, now)
    for _ in range(1000):
        session.feed(b"x" * 1000, NOW)
    session.feed(b"\r\n", NOW)
    assert len(joins) <= 2
    assert talk.heard() == "STORED\r\n"


def test_open_reads_can_be_closed_while_quiescent(talk):
    talk(set_("q", "1") + set_("q", "2") + "get q/open\r\nstatus quiescent\r\n")
    assert talk("get q/close\r\n") == "END\r\n"
    assert not talk.broker.queues["q"].opens


@promise(2)
@pytest.mark.parametrize("text, get, close", [
    ("", "get q/close/open", True), ("", "get q/close/open/n=2", True), ("", "get q/abort", False),
    ("max_open_transactions = 1", "get q/or=other/close/open", True)])
def test_a_close_that_is_refused_closes_nothing(tmp_path, text, get, close):
    """The item was gone, though the client was told that it had not been closed."""
    talk = Talk(tmp_path, "[server]\n%s\n" % text)
    talk(set_("q", "1") + set_("q", "2") + set_("other", "3"))
    talk("get q/open\r\nget other/open\r\n" + ("" if text else "status quiescent\r\n"))
    queue, answer = talk.broker.queues["q"], talk(get + "\r\n")
    if text:                                 # it takes the oldest read of both
        assert answer.startswith("VALUE q") and len(queue.opens) == 1
    elif close:
        assert answer.startswith("SERVER_ERROR the server is quiescent")
        assert queue.count + len(queue.opens) == 2
    else:
        assert answer == "END\r\n" and queue.count == 2


def test_what_may_be_opened_counts_what_is_closed_before(tmp_path):
    talk = Talk(tmp_path, "[server]\nmax_open_transactions = 1\n")
    put(talk.broker, "q", b"1", b"2", b"3")
    assert "1" in talk("get q/open\r\n") and "2" in talk("get q/close/open\r\n")
    assert talk("get q/open\r\n").startswith("ERROR too many")
    talk.session_type = kestrel.TextSession
    assert [talk("get q\n", "text") for _ in range(3)] == [":2\n", ":3\n", "*\n"]


@pytest.mark.parametrize("rule, local, refused", [
    ("", True, []), ("", False, ["shutdown"]), ("all", False, []), ("local", True, []),
    ("local", False, "all"), ("none", True, "all"), ("none", False, "all")])
@pytest.mark.parametrize("session_type, commands", [
    (kestrel.MemcacheSession, {
        "shutdown": "shutdown\r\n", "reload": "reload\r\n", "flush_all": "flush_all\r\n",
        "delete": "delete q\r\n", "status": "status readonly\r\n"}),
    (kestrel.TextSession, {"shutdown": "shutdown\n", "delete": "delete q\n",
                           "status": "status readonly\n"}),
    (kestrel.ThriftSession, {
        "delete_queue": call(b"delete_queue", thrift_string(1, b"q")),
        "flush_all_queues": call(b"flush_all_queues"),
        "set_status": call(b"set_status", struct.pack(">bhi", 8, 1, 2))}),
    (kestrel.AdminSession, {
        name: request("POST /%s?queue=q" % path) for name, path in (
            ("shutdown", "shutdown"), ("reload", "reload"), ("delete", "delete"),
            ("status", "quiesce"))})])
def test_admin_commands(tmp_path, rule, local, refused, session_type, commands):
    for name, command in commands.items():
        talk = Talk(tmp_path, "[server]\nadmin_commands = %s\n[queue]\nkeep_journal = false\n"
                    % rule, session_type)
        put_some(talk, "q", b"x")
        talk.session("client", local=local)
        answer = talk(command)
        if refused == "all" or name in refused:
            assert "%s is " % name in answer
            assert "turned off" in answer or "for clients on this machine only" in answer
            assert items_of(talk.broker, "q") == [b"x"] and talk.broker.status == "UP"
            assert not talk.broker.stopping
        else:
            assert "only" not in answer and "turned off" not in answer
            assert (talk.broker.stopping or "elo" in answer or talk.broker.status != "UP"
                    or "q" not in talk.broker.queues or not items_of(talk.broker, "q"))
    # What only asks is for everybody.
    assert Talk(tmp_path, "[server]\nadmin_commands = none\n")("status\r\n") == "UP\r\n"


def test_a_browser_cannot_be_made_to_post_commands(talk, text):
    """A page of anywhere can have it send a POST to any port of this machine."""
    body = "POST / HTTP/1.1\r\nHost: here\r\n\r\n"
    assert talk(set_("q", "1") + body + "flush_all\r\n").endswith("ERROR unknown command\r\n✂")
    assert talk("host: here\r\nflush_all\r\n", "second").endswith("✂")
    assert items_of(talk.broker, "q") == [b"1"]
    assert text(body + "flush q\r\n").endswith("✂")


@pytest.mark.parametrize("session_type, command, other, answer", [
    (kestrel.MemcacheSession, b"monitor q 1 150\r\n", (b"ver", b"sion\r\n"), b"VERSION 1.0.0\r\n"),
    (kestrel.MemcacheSession, b"get " + b"q " * 150 + b"\r\n", (b"ver", b"sion\r\n"),
     b"VERSION 1.0.0\r\n"),
    (kestrel.TextSession, b"monitor q 1000 150\n", (b"ver", b"sion\n"), b":1.0.0\n"),
    (kestrel.ThriftSession, thrift_get(b"q", 150, 0, 1000),
     (call(b"get_version")[:9], call(b"get_version")[9:]),
     reply(b"get_version", thrift_string(0, b"1.0.0")))])
def test_a_command_that_fails_is_not_in_hand_any_more(
        tmp_path, disk, session_type, command, other, answer):
    talk = Talk(tmp_path, "[server]\nmax_open_transactions = 1000\n" + DEEP, session_type)
    fill_deep(talk.broker)
    disk.failing = {"open": errno.EMFILE}
    session = talk.session()
    for _ in range(20):                      # as far as what is in memory goes
        session.feed(command, NOW)
        while session.state == "working":
            session.resume(NOW)
        if any(b"Too many open files" in said for said in session.out):
            break
        if command.startswith(b"get "):
            break
    disk.failing = {}
    commit(talk.broker, NOW)
    session.take()
    session.feed(other[0], NOW)
    assert session.take() == []
    session.feed(other[1], NOW)
    assert b"".join(session.take()) == answer


def test_limits_of_a_session(tmp_path):
    talk = Talk(tmp_path, "[server]\nmax_line = 600b\nmax_item_size = 1kb\n")
    assert talk("get %s\r\n" % ("k" * 595)).startswith("CLIENT_ERROR the name of a queue is longer")
    assert talk("get %s\r\n" % ("k" * 597), "long") == "CLIENT_ERROR line too long\r\n✂"
    assert talk(set_("q", "x" * 1024)) == "STORED\r\n"
    assert talk(set_("q", "x" * 1025) + "version\r\n") == (
        "SERVER_ERROR object too large for cache\r\nVERSION 1.0.0\r\n")


@pytest.mark.parametrize("command, session_type", [
    ("get %s\r\n" % " ".join(["q/peek"] * 500), kestrel.MemcacheSession),
    ("monitor q 10 90\r\n", kestrel.MemcacheSession),
    ("monitor q 10000 90\n", kestrel.TextSession)])
def test_one_command_that_says_much_says_it_in_pieces(tmp_path, command, session_type):
    talk = Talk(tmp_path, "[server]\nmax_output_buffer = 10kb\n", session_type)
    put_some(talk, "q", *[b"x" * 3000] * 90)
    session = talk.session()
    session.feed(command.encode() + b"version\r\n", NOW)
    answer = b""
    for said in turns_of(session, b""):
        assert sum(map(len, said)) < 20000
        answer += b"".join(said)
    assert answer.count(b"x" * 3000) == (500 if command.startswith("get") else 90)
    assert answer.endswith((b"END\r\nVERSION 1.0.0\r\n", b"*\n:1.0.0\n"))


@pytest.mark.parametrize("number", ["9" * 20, "9" * 30, "9" * 400, "9" * 5000, "-" + "9" * 19])
def test_numbers_of_any_length_harm_nothing(tmp_path, number):
    text = Talk(tmp_path, session_type=kestrel.TextSession)
    for command in ("put q %s:\nx\n\n", "get q %s\n", "monitor q 1 %s\n", "monitor q %s\n",
                    "confirm q %s\n"):
        text(command % number, command)
        text.session(command).close(NOW)
    session = kestrel.MemcacheSession(text.broker)
    for command in ("set q %s 0 1\r\nx\r\n", "set q 0 %s 1\r\nx\r\n", "get q/t=%s\r\n",
                    "monitor q %s\r\n", "monitor q 1 %s\r\n", "confirm q %s\r\n",
                    "verbosity %s\r\n", "set q 0 0 %s\r\n"):
        session.feed((command % number).encode(), NOW)
        session.time_out()
        session.resume(NOW)
        commit(text.broker, NOW)
        session.take()
    admin = kestrel.AdminSession(text.broker)
    admin.feed(request("POST /reload", "Content-Length: " + number).encode(), NOW)
    assert admin.is_over() and b" 4" in admin.out[0]


def test_one_large_item_for_many_readers_is_in_memory_once(talk):
    data = "x" * 300000
    talk(set_("q", data))
    item = talk.broker.queues["q"].items[0]
    for number in range(3):
        session = talk.session("reader %d" % number)
        session.feed(b"get q/peek\r\n", NOW)
        assert any(piece is item.data for piece in session.out)


@promise(5)
@pytest.mark.parametrize("silent", ["", " noreply"])
def test_a_client_sends_no_more_while_what_it_put_cannot_be_fsynced(tmp_path, silent):
    """Without answers it filled the memory, which no limit counted."""
    talk = Talk(tmp_path, "[queue]\nsync_journal = 0\n")
    talk("get q\r\n")
    session, queue = talk.session(), talk.broker.queues["q"]
    session.feed(b"set q 0 0 1%b\r\nx\r\n" % silent.encode(), NOW)
    commit(talk.broker, NOW)
    session.settle({}, {queue: queue.history.logged})
    assert session.state == "held"
    sync(queue)
    assert session.state == "ready" and b"".join(session.take()) == (
        b"" if silent else b"STORED\r\n")


@pytest.mark.parametrize("command", [
    b"get q\r\n", b"set q 0 0 1\r\nx\r\n", b"version\r\n", b"set q 0 0 1 noreply\r\nx\r\n",
    b"get q/close\r\n", b"incr q 1\r\n"])
def test_a_pipeline_of_small_commands_takes_many_turns(talk, command):
    talk(set_("q", "x") + "get q\r\n")
    session = talk.session("another")
    before = talk.broker.queues["q"].counters.total_items
    turns = list(turns_of(session, command * 5000))
    assert 5 <= len(turns) < 50
    assert max(map(len, turns)) < 1500 and sum(map(len, turns)) == 5000
    if command.startswith(b"set"):
        assert talk.broker.queues["q"].counters.total_items == before + 5000


def test_gets_of_very_many_keys_take_many_turns(talk):
    put_some(talk, "q", *[b"x"] * 5)
    session = talk.session()
    turns = list(turns_of(session, (b"get " + b"none " * 1500 + b"q\r\n") * 5))
    assert len(turns) >= 7
    assert b"".join(itertools.chain(*turns)) == b"VALUE q 0 1\r\nx\r\nEND\r\n" * 5


@pytest.mark.parametrize("command", [
    b"set new%d 0 0 1\r\nx\r\n", b"set new%d 0 0 1 noreply\r\nx\r\n", b"get new%d\r\n",
    b"delete old%d\r\n"])
def test_new_and_deleted_queues_take_many_turns(talk, command):
    for number in range(60):
        put_some(talk, "old%d" % number, b"x")
    counts = [len(talk.broker.queues)]
    for _ in turns_of(talk.session(), b"".join([command % number for number in range(60)])):
        counts.append(len(talk.broker.queues))
    steps = [abs(after - before) for before, after in zip(counts, counts[1:])]
    assert max(steps) < 20 and sum(steps) == 60


@pytest.mark.parametrize("protocol, command", [
    ("memcache", b"set q%d 0 0 1 noreply\r\nx\r\n"), ("memcache", b"get q%d\r\n"),
    ("memcache", None), ("text", b"put q%d:\nx\n\n")])
def test_a_turn_writes_so_many_queues(tmp_path, protocol, command):
    talk = Talk(tmp_path, "[queue]\nkeep_journal = true\nsync_journal = never\n", {
        "memcache": kestrel.MemcacheSession, "text": kestrel.TextSession}[protocol])
    for number in range(200):
        put_some(talk, "q%d" % number, b"x")
        commit(talk.broker, NOW)
    data = (b"".join([command % number for number in range(200)]) if command else
            b"get " + b" ".join([b"q%d" % number for number in range(200)]) + b"\r\n")
    session = talk.session()
    session.feed(data, NOW)
    most = kestrel._MOST_DIRTY + 1 if command else kestrel.QUEUES_STEP
    assert len(talk.broker.dirty) == most
    # Another one has its turn all the same.
    talk.broker.route(b"other")
    other = talk.session("other")
    other.feed(b"put other:\n1\n\nput other:\n2\n\n" if protocol == "text"
               else b"set other 0 0 1\r\n1\r\nset other 0 0 1\r\n2\r\n", NOW)
    other.resume(NOW)
    assert items_of(talk.broker, "other")[:1] == [b"1"]
    commit(talk.broker, NOW)
    session.sent()
    other.sent()
    other.resume(NOW)
    assert items_of(talk.broker, "other") == [b"1", b"2"]
    for _ in turns_of(session, b""):
        assert len(talk.broker.dirty) <= most
    counts = {queue.count for name, queue in talk.broker.queues.items() if name != "other"}
    assert counts == {2 if b"x" in data else 0}


def test_a_job_waits_for_a_client_that_takes_nothing(tmp_path):
    talk = Talk(tmp_path, "[server]\nmax_output_buffer = 100kb\n[queue]\nkeep_journal = false\n")
    for number in range(1000):
        talk.broker.queue("q%d" % number, NOW)
    session = talk.session()
    session.feed(b"dump_stats\r\n", NOW)
    for _ in range(100):
        session.resume(NOW)
    assert session.state == "full" and sum(map(len, session.out)) < 300000
    assert sum(map(len, itertools.chain(*turns_of(session, b"")))) > 300000


def test_one_queue_is_dumped_once(talk):
    put_some(talk, "q", b"x")
    assert talk("dump_stats q q q\r\n").count("queue 'q'") == 1


def test_long_lines_are_not_kept(talk):
    for number in range(50):
        talk("get %s\r\n" % " ".join(["k%d" % number] * 60))
    assert not talk.broker.known_lines


def test_an_item_for_many_children_counts_for_as_many(talk):
    for number in range(100):
        talk("get parent+%d\r\n" % number)
    turns = list(turns_of(talk.session(), b"set parent 0 0 1\r\nx\r\n" * 100))
    assert len(turns) >= 10 and sum(map(len, turns)) == 100


def test_a_put_for_many_children_is_stored_in_pieces(text):
    for number in range(100):
        text("get parent+%d\n" % number)
    turns = list(turns_of(text.session(), b"put parent:\n" + b"x\n" * 100 + b"\n"))
    assert len(turns) >= 9 and b"".join(itertools.chain(*turns)) == b"+100\n"


def test_a_monitor_does_not_count_what_has_timed_out(talk):
    put_some(talk, "q", *[b"x"] * 3)
    session = talk.session()
    talk.broker.config.server.max_open_transactions = 2
    talk("monitor q 0 2\r\n")
    talk.broker.queues["q"].abort(*talk.broker.queues["q"].opens)
    assert talk("monitor q 0 1\r\n").count("VALUE") == 1 and session.open_reads


def test_a_client_keeps_no_queues_that_are_deleted_while_it_has_open_reads(serve):
    """They stayed in memory for as long as the client did, and their reads were counted as open."""
    server = serve("[queue]\nsync_journal = never\n")          # no fsync keeps them in memory
    client, other = server.client(), server.client()
    for deleting in client, other:
        client.put("q", b"x")
        assert client.get("q/open") == b"x"
        queue = weakref.ref(server.server.broker.queues["q"])
        assert deleting.ask("delete q\r\n") == "DELETED\r\n"
        other.send("clients\r\n")
        assert [line.split()[7] for line in iter(other.line, "END\r\n")] == ["0", "0"]
        client.stats()
        until(lambda: queue() is None)
        assert client.get("q/close") is None


# -- what Kestrel has not


def values(*items, key="q"):
    """The answer to a get that has found these items."""
    return "".join("VALUE %s 0 %d\r\n%s\r\n" % (key, len(item), item)
                   for item in items) + "END\r\n"


def put_all(talk, queue, *items):
    assert talk("".join(set_(queue, item) for item in items)) == "STORED\r\n" * len(items)


def test_many_items_at_once(talk):
    put_all(talk, "q", "a", "b", "c", "d", "e", "f", "g")
    assert talk("get q/n=2\r\n") == values("a", "b", key="q/n=2")
    assert talk("get q/peek/n=9\r\n") == values("c", "d", "e", "f", "g", key="q/peek/n=9")
    assert talk("get q/open/n=2\r\n") == values("c", "d", key="q/open/n=2")
    assert talk("get q/close/n=2/open\r\n") == values("e", "f", key="q/close/n=2/open")
    assert talk("get q/abort/n=9\r\n") == "END\r\n"
    assert talk("get q/n=9 other/n=2 q\r\n") == values("e", "f", "g", key="q/n=9")
    assert talk("get q/n=3\r\nget q/close/n=3\r\nget q/peek/n=3\r\n") == "END\r\n" * 3
    assert not talk.broker.queues["q"].opens and talk.broker.latency.count() == 9


def test_a_wait_for_many_ends_with_the_first(talk):
    assert talk("get q/n=3/open/t=500\r\n") == ""
    talk(set_("q", "a") + set_("q", "b"), "other")
    heard = talk.heard()
    assert heard == values("a", "b", key="q/n=3/open/t=500")
    assert talk("get q/n=3/close\r\n") == "END\r\n" and not talk.broker.queues["q"].opens
    talk("get q/n=3/t=500\r\n")
    talk.session().time_out()
    assert talk.heard() == "END\r\n"


def test_many_open_reads_are_limited(tmp_path):
    talk = Talk(tmp_path, "[server]\nmax_open_transactions = 3\n")
    put_all(talk, "q", "a", "b", "c", "d", "e")
    assert talk("get q/open/n=2\r\n") == values("a", "b", key="q/open/n=2")
    assert talk("get q/open/n=2\r\n") == values("c", key="q/open/n=2")
    assert talk("get q/open/n=2\r\n") == "ERROR too many open reads of q; limit=3\r\n✂"
    assert items_of(talk.broker, "q") == [b"a", b"b", b"c", b"d", b"e"]


@pytest.mark.parametrize("key", ["q/peek/n=2", "q/peek/or=r", "r/or=q/peek"])
def test_a_peek_at_several_passes_over_expired_items(talk, key):
    put(talk.broker, "q", *[b"late"] * 3, expiry=NOW + 1)
    put(talk.broker, "q", b"a", b"b")
    put(talk.broker, "r", b"late", expiry=NOW + 1)
    talk.now += 10
    shown = ["a", "b"] if "n=2" in key else ["a"]
    assert talk("get %s\r\n" % key) == values(*shown, key=key)
    assert talk("get %s r/peek\r\n" % key) == values(*shown, key=key)


def test_a_get_of_several_queues_passes_over_one_that_cannot_be_read(talk, monkeypatch):
    def fail(self, *arguments):
        if self.name == "b":
            raise OSError(errno.EIO, "Input/output error", "b")
        return remove(self, *arguments)

    for name in "abc":
        put_all(talk, name, name)
    remove = kestrel.Queue.remove
    monkeypatch.setattr(kestrel.Queue, "remove", fail)
    assert talk("get a/n=2 b/n=2 c\r\n") == (
        "VALUE a/n=2 0 1\r\na\r\nVALUE c 0 1\r\nc\r\nEND\r\n")
    assert talk("get b/n=2\r\n") == "SERVER_ERROR b: Input/output error\r\n"


@pytest.mark.parametrize("command", ["monitor q 0", "get q/open/n=500"])
def test_each_of_many_open_reads_is_not_looked_at_again_for_the_next(tmp_path, command):
    class Opens(dict):
        looks = 0

        def __contains__(self, xid):
            self.looks += 1
            return super().__contains__(xid)

    talk = Talk(tmp_path, "[server]\nmax_open_transactions = 1000\n")
    put_all(talk, "q", *["x"] * 500)
    opens = talk.broker.queues["q"].opens = Opens()
    assert talk(command + "\r\n").count("VALUE") == len(opens) == 500
    assert opens.looks < 5000


def test_a_large_answer_of_many_items_is_given_in_pieces(tmp_path):
    talk = Talk(tmp_path, "[server]\nmax_output_buffer = 5000\n")
    put_all(talk, "q", *["x" * 1000] * 50)
    session = talk.session()
    session.feed(b"get q/n=50\r\n", NOW)
    assert session.load < 9000 and talk.broker.queues["q"].count > 40
    assert talk.heard() == values(*["x" * 1000] * 50, key="q/n=50")


@promise(2)
def test_many_items_that_cannot_be_written_are_not_given(talk, disk):
    put_all(talk, "q", "a", "b", "c")
    session = talk.session()
    session.feed(b"get q/n=2\r\nversion\r\n", NOW)
    disk.failing = {"pwrite": errno.ENOSPC}
    session.settle(talk.broker.write()[1], set())
    assert b"".join(session.take()).split(b"\r\n")[:2] == [
        b"SERVER_ERROR q: No space left on device", b"VERSION 1.0.0"]
    disk.failing = {}
    assert items_of(talk.broker, "q") == [b"a", b"b", b"c"]


@pytest.mark.parametrize("place", [0, 50, 99])
def test_a_get_of_many_items_of_many_queues_tries_each_queue_once(talk, monkeypatch, place):
    names = ["q%d" % number for number in range(100)]
    for name in names:
        talk.broker.queue(name)
    put_all(talk, names[place], *["x"] * 60)
    tried, remove = [], kestrel.Queue.remove
    monkeypatch.setattr(kestrel.Queue, "remove", lambda queue, *arguments: (
        tried.append(queue), remove(queue, *arguments))[1])
    key = "/or=".join(names) + "/open/n=%d"
    session = talk.session()
    session.feed(b"get %b\r\n" % (key % 50).encode(), NOW)
    assert len(tried) < 80                             # the rest is done in later turns
    assert talk.heard() == values(*["x"] * 50, key=key % 50)
    assert len(tried) == place + 50
    tried.clear()
    assert talk("get %s\r\n" % (key % 20)) == values(*["x"] * 10, key=key % 20)
    assert len(tried) == place + 10 + 100 - place


def test_a_queue_that_is_named_twice_gives_no_more_than_the_limit(tmp_path):
    talk = Talk(tmp_path, "[server]\nmax_open_transactions = 2\n")
    put_all(talk, "q", *"abc")
    put_all(talk, "r", *"de")
    key = "q/or=q/or=r/or=q/open/n=5"
    assert talk("get %s\r\n" % key) == values(*"abde", key=key)


def test_the_oldest_open_reads_of_many_queues_are_found_quickly(tmp_path, monkeypatch):
    """Counted, not timed; and what it costs is counted too, so that others have their turn."""
    talk = Talk(tmp_path)
    names = ["q%d" % number for number in range(50)]
    for name in names:
        put_all(talk, name, *"abcd")
    for name in names[::-1] * 4:
        talk("get %s/open\r\n" % name)
    looks, is_open = [], kestrel.Queue.is_open
    monkeypatch.setattr(kestrel.Queue, "is_open", lambda queue, xid: (
        looks.append(xid), is_open(queue, xid))[1])
    session = talk.session()
    key = "/or=".join(names + names[:1])
    session.feed(b"get %b/touch/n=3\r\n" % key.encode(), NOW)
    assert len(looks) < 70 and session.load > 50000
    assert talk.heard() == "END\r\n"
    monkeypatch.undo()
    assert talk("get %s/close/n=120\r\n" % key) == "END\r\n"
    assert [len(talk.broker.queues[name].opens) for name in names] == [2] * 30 + [1] * 20


def test_after_a_wait_the_first_queue_comes_first_again(talk):
    key = "high/or=low/t=500/n=4"
    assert talk("get %s\r\n" % key) == ""
    talk(set_("low", "a") + set_("low", "b") + set_("high", "c") + set_("high", "d"), "other")
    assert talk.heard() == values(*"acdb", key=key)


def test_the_first_of_several_queues(talk):
    put_all(talk, "high", "1")
    put_all(talk, "low", "2", "3")
    key = "high/or=low/or=Bulk"
    assert talk("get %s\r\nget %s/open\r\n" % (key, key)) == (
        values("1", key=key) + values("2", key=key + "/open"))
    put_all(talk, "high", "4")
    assert talk("get %s/close/open\r\n" % key) == values("4", key=key + "/close/open")
    put_all(talk, "Bulk", "5")
    assert talk("get %s/open/n=2\r\n" % key) == values("3", "5", key=key + "/open/n=2")
    assert talk("get %s/abort\r\n" % key) == "END\r\n"        # the oldest, of high
    assert items_of(talk.broker, "high") == [b"4"] and not items_of(talk.broker, "low")
    assert talk("get %s/abort/n=5\r\n" % key) == "END\r\n"
    assert items_of(talk.broker, "low") == [b"3"] and items_of(talk.broker, "Bulk") == [b"5"]
    assert talk("get high/or=a.b\r\n") == "CLIENT_ERROR '.' in the name of a queue\r\n"


@pytest.mark.parametrize("name", ["high", "low"])
def test_a_wait_at_several_queues(talk, name):
    assert talk("get high/or=low/t=500\r\n") == ""
    assert [row["waits_for"] for row in talk.session()._clients()] == []
    talk(set_(name, "x"), "other")
    assert talk.heard() == values("x", key="high/or=low/t=500")
    assert not any(queue.waiters for queue in talk.broker.queues.values())
    talk("get high/or=low/t=500/open\r\n")
    talk(set_("low", "y"), "other")
    assert talk.heard() == values("y", key="high/or=low/t=500/open")
    assert talk("get high/or=low/close\r\n") == "END\r\n"
    talk("get high/or=low/t=500\r\n")
    talk.session().close(NOW)
    assert not any(queue.waiters for queue in talk.broker.queues.values())


@pytest.mark.parametrize("name", ["high", "low"])
def test_a_wait_at_several_queues_ends_when_one_is_deleted(talk, name):
    """It waited on at the other, and did not see what came to the deleted one made again."""
    talk("get high/or=low/t=500\r\n")
    talk("delete %s\r\n" % name, "other")
    assert talk.heard() == "END\r\n"
    assert not any(queue.waiters for queue in talk.broker.queues.values())
    talk("get high/or=low/t=500\r\n")
    talk(set_(name, "x"), "other")
    assert talk.heard() == values("x", key="high/or=low/t=500")


def timed_talk(path, text=""):
    talk = Talk(path, text)
    talk.clock = talk.broker.later = Clock()
    return talk


def test_a_read_with_a_timeout_of_its_own(tmp_path):
    talk = timed_talk(tmp_path, "[queue strict]\nopen_transaction_timeout = 1s\n")
    put_all(talk, "q", "a")
    put_all(talk, "strict", "b", "c")
    assert talk("get q/open/timeout=3000\r\n") == values("a", key="q/open/timeout=3000")
    talk("get strict/open/timeout=9000\r\nget strict/open/timeout=500\r\n")
    talk.clock.reach(600)
    assert items_of(talk.broker, "strict") == [b"c"]
    talk.clock.reach(1200)
    assert items_of(talk.broker, "strict") == [b"b", b"c"]
    talk.clock.reach(2900)
    assert talk("get q/touch\r\n") == "END\r\n"
    talk.clock.reach(5800)
    assert items_of(talk.broker, "q") == [] and talk("get q/touch/n=5\r\n") == "END\r\n"
    talk.clock.reach(9200)
    assert items_of(talk.broker, "q") == [b"a"]
    assert talk("get q/touch\r\nget nothing/touch\r\n") == "END\r\n" * 2


def test_giving_back_after_a_while_or_at_the_tail(tmp_path):
    talk = timed_talk(tmp_path)
    put_all(talk, "q", "a", "b", "c")
    talk("get q/open\r\n")
    assert talk("get q/abort/tail\r\nget q/open\r\nget q/abort/delay=5000\r\n") == (
        "END\r\n" + values("b", key="q/open") + "END\r\n")
    assert items_of(talk.broker, "q") == [b"c", b"a"]
    assert dict(talk.broker.queue_stats(talk.broker.queues["q"], NOW))["delayed"] == 1
    talk.now = NOW + 4999
    assert talk("get q\r\n") == values("c")
    talk.now += 1
    assert talk("get q\r\nget q\r\nget q\r\n") == values("b") + values("a") + "END\r\n"


def test_delayed_items(tmp_path, monkeypatch):
    talk = timed_talk(tmp_path)
    assert talk("set q/delay=60000 7 0 4\r\nlate\r\nset q/delay=10 0 1 4\r\nsoon\r\n"
                + set_("q", "now")) == "STORED\r\n" * 3
    assert talk("get q\r\nget q\r\n") == values("now") + "END\r\n"
    talk("get q/t=90000\r\n", "waits")
    monkeypatch.setattr(kestrel, "_now", lambda now=None: NOW + 20 if now is None else now)
    talk.clock.reach(10)
    assert talk.heard("waits") == values("soon", key="q/t=90000")
    talk("get q/t=90000\r\n", "waits")
    monkeypatch.setattr(kestrel, "_now", lambda now=None: NOW + 60000 if now is None else now)
    talk.clock.reach(10010)                  # alarms are never set for long
    assert talk.heard("waits") == "VALUE q/t=90000 7 4\r\nlate\r\nEND\r\n"


def test_a_delayed_item_may_expire_meanwhile(talk):
    talk("set q/delay=5000 0 2 4\r\ngone\r\nset q/delay=5000 0 9 4\r\nhere\r\n")
    talk.now += 5000
    assert talk("get q\r\nget q\r\n") == values("here") + "END\r\n"


def test_delayed_items_count_for_the_limits(tmp_path):
    talk = Talk(tmp_path, "[queue q]\nmax_items = 2\n[queue r]\nmax_size = 10\n")
    late = "set %s/delay=5000 0 0 9\r\n123456789\r\n"
    for name in "qr":
        assert talk(late % name * 3) == "STORED\r\n" * 2 + "NOT_STORED\r\n"
        assert talk(set_(name, "x")) == "NOT_STORED\r\n"
        assert talk("flush %s\r\n" % name + set_(name, "x")) == "END\r\nSTORED\r\n"
    talk.now += 5000
    assert talk("get q\r\nget q\r\n") == values("x") + "END\r\n"


def test_delayed_items_have_their_share_of_the_memory(tmp_path):
    talk = Talk(tmp_path, "[queue]\nmax_memory_size = 3000\n")
    late = "set q/delay=5000 0 0 1000\r\n%s\r\n" % ("x" * 1000)
    assert talk(late * 3) == "STORED\r\n" * 2 + (
        "SERVER_ERROR q: out of memory for delayed items\r\n")
    put_all(talk, "q", *["y" * 1000] * 20)
    assert talk.broker.queues["q"].memory < 3000
    talk.now += 5000
    assert talk("get q\r\n" * 22) == values("y" * 1000) * 20 + values("x" * 1000) * 2
    assert talk.broker.queues["q"].open_memory == 0


def test_children_and_aliases_of_delayed_and_synced_items(tmp_path):
    talk = Talk(tmp_path, "[queue]\nsync_journal = never\n"
                "[alias both]\ndestination_queues = a, b\n")
    talk("get fan+one\r\n")
    assert talk("set fan/delay=50 0 0 1\r\nx\r\nset both/delay=50/sync 0 0 1\r\ny\r\n")
    queues = talk.broker.queues
    assert {name: len(queues[name].delays.items) for name in queues} == {
        "fan": 1, "fan+one": 1, "a": 1, "b": 1}
    sync(queues["a"])
    assert talk.heard() == ""
    sync(queues["b"])
    assert talk.heard() == "STORED\r\n"
    talk.now += 50
    assert talk("get fan+one fan a b\r\n") == "".join(
        "VALUE %s 0 1\r\n%s\r\n" % pair
        for pair in (("fan+one", "x"), ("fan", "x"), ("a", "y"), ("b", "y"))) + "END\r\n"


def test_stored_after_fsync(tmp_path):
    """Whatever sync_journal says; other clients, and other items of this one, do not wait."""
    talk = Talk(tmp_path, "[queue]\nsync_journal = never\n")
    assert talk("set q/sync 0 0 1\r\nx\r\nversion\r\n") == ""
    queue = talk.broker.queues["q"]
    assert talk(set_("q", "y"), "other") == "STORED\r\n" and queue.history.syncing
    fail_sync(queue)                         # then all is written anew
    talk.broker.write()
    assert talk.heard() == "STORED\r\nVERSION 1.0.0\r\n"
    assert not queue.history.syncing and items_of(talk.broker, "q") == [b"x", b"y"]
    assert talk("set q/SYNC 0 0 1\r\nz\r\n") == ""
    sync(queue)
    assert talk.heard() == "STORED\r\n"
    talk("set q/sync 0 0 1\r\nw\r\n")
    talk("delete q\r\n", "other")
    assert talk.heard() == "STORED\r\n"


def test_pausing(talk):
    put_all(talk, "q", "a")
    assert talk("pause q in\r\n" + set_("q", "b") + "get q\r\n") == (
        "END\r\nNOT_STORED\r\n" + values("a"))
    assert talk("resume q\r\n" + set_("q", "b") + "pause q out\r\nget q\r\nget q/open\r\n"
                + set_("q", "c")) == "END\r\nSTORED\r\n" + "END\r\n" * 3 + "STORED\r\n"
    assert talk("get q/peek\r\n") == values("b", key="q/peek")
    assert talk("get q/t=500\r\n", "waits") == ""
    assert talk("resume q\r\n") == "END\r\n" and talk.heard("waits") == values(
        "b", key="q/t=500")
    assert talk("pause q\r\nget q\r\n" + set_("q", "d")) == "END\r\n" * 2 + "NOT_STORED\r\n"
    assert dict(talk.broker.queue_stats(talk.broker.queues["q"], NOW))["paused"] == 3
    assert talk("move q r\r\nget r\r\n") == "1\r\n" + values("c", key="r")
    assert talk("pause q up\r\npause\r\nresume q r\r\npause no\r\nresume no\r\n") == (
        "CLIENT_ERROR pause takes one queue, and in or out\r\n"
        "CLIENT_ERROR pause takes one queue, and in or out\r\n"
        "CLIENT_ERROR resume takes one queue\r\n"
        "CLIENT_ERROR there is no queue no\r\nCLIENT_ERROR there is no queue no\r\n")


def test_a_peek_waits_for_the_next_item_of_a_paused_queue(talk):
    """It slept through it; a get that waits in front of it still does not find it."""
    talk("get q\r\npause q out\r\n")
    assert talk("get q/t=500\r\n", "get") == talk("get q/peek/t=500\r\n", "peek") == ""
    put_all(talk, "q", "x")
    assert talk.heard("peek") == values("x", key="q/peek/t=500") and talk.heard("get") == ""
    talk("resume q\r\n")
    assert talk.heard("get") == values("x", key="q/t=500")


def test_a_pause_is_kept_over_restarts_and_rewrites(tmp_path):
    for how in ("as it is", "rewritten", "rotated"):
        path = tmp_path / how
        path.mkdir()
        queue = turn_queue(path, max_memory_size=500, default_journal_size=0)
        fill(queue, b"x")
        queue.pause(kestrel.PAUSED_OUT)
        queue.write()
        if how == "rewritten":
            queue.remove(now=NOW, even_paused=True)
        elif how == "rotated":
            fill(queue, *[b"y" * 100] * 20)
            queue.write()
            queue.host.run()
            take_all = [queue.remove(now=NOW, even_paused=True) for _ in range(20)]
            assert all(take_all)
        queue.write()
        queue.host.run()
        queue.close()
        queue = load(path)
        assert queue.paused == kestrel.PAUSED_OUT and queue.remove(now=NOW) is None
        queue.pause(0)
        queue.pack()
        queue.close()
        queue = load(path)
        assert queue.paused == 0
        queue.pause()
        queue.pack()
        queue.close()
        queue = load(path)
        assert queue.paused == 3
        queue.close()


DEADLY = "[queue work]\nmax_deliveries = 3\ndead_letter_queue = dead\n"


@pytest.mark.parametrize("how", ["abort", "tail", "delay", "hang-up", "timeout", "restart", "rewrite"])
def test_what_comes_back_too_often_is_a_dead_letter(tmp_path, caplog, how):
    text = DEADLY + ("open_transaction_timeout = 50\n" if how == "timeout" else "").replace(
        "50", "50ms") + "default_journal_size = 1\nmax_journal_size = 1\n"
    talk = timed_talk(tmp_path, text)
    put_all(talk, "work", "poison")
    for time in range(1, 4):
        assert talk("get work/open\r\n") == values("poison", key="work/open")
        if how in ("abort", "rewrite"):
            talk("get work/abort\r\n")
        elif how == "tail":
            talk("get work/abort/tail\r\n")
        elif how == "delay":
            talk("get work/abort/delay=5\r\n")
            talk.now += 5
        elif how == "hang-up":
            talk.sessions.pop("client").close(NOW)
        elif how == "timeout":
            talk.clock.reach(100 * time)
        if how in ("restart", "rewrite"):
            settle(talk.broker)
            if how == "rewrite":
                queue = talk.broker.queues["work"]
                kestrel.run_task(queue.upkeep.rewrite())
                talk.broker.dirty.append(queue)
                settle(talk.broker)
                run_tasks(talk.broker)
            for queue in talk.broker.queues.values():
                queue.close() if how == "rewrite" else queue.journal.close()
            talk = timed_talk(tmp_path, text)
        put_all(talk, "other", "x")
    talk.clock.reach(10000)
    talk.heard()
    assert talk("get work\r\nget dead\r\n") == "END\r\n" + values("poison", key="dead")
    assert "an item of 6 bytes came back 3 times, and goes to dead" in caplog.text
    assert not talk.broker.queues["work"].opens
    if how not in ("restart", "rewrite"):
        assert talk.broker.queues["work"].counters.dead_letters == 1


def test_dead_letters_that_are_not_taken_stay_open(tmp_path, caplog):
    """And are tried again; nothing is lost by it."""
    talk = timed_talk(tmp_path, DEADLY + "[queue dead]\nmax_items = 1\n")
    put_all(talk, "dead", "full")
    put_all(talk, "work", "a")
    for _ in range(3):
        talk("get work/open\r\nget work/abort\r\n")
    assert talk("get work\r\n") == "END\r\n" and len(talk.broker.queues["work"].opens) == 1
    assert "cannot be moved (dead_letter_queue): dead: it does not take it" in caplog.text
    talk("get dead\r\n")
    for second in range(1, 9):
        talk.clock.reach(second * 1000)
        talk.heard()
    assert items_of(talk.broker, "dead") == [b"a"] and not talk.broker.queues["work"].opens
    assert contents_of(tmp_path / "spool", "work") == []


def test_items_expire_to_a_queue_that_only_has_children(tmp_path):
    """There are none, so they go nowhere: they were tried for ever."""
    talk = timed_talk(tmp_path, "[queue f]\nfanout_only = true\n"
                                "[queue q]\nmax_age = 1s\nexpire_to_queue = f\n")
    put_all(talk, "q", "a")
    talk.now += 5000
    assert talk("get q\r\n") == "END\r\n"
    talk.clock.reach(9000)
    talk.heard()
    assert not talk.broker.queues["q"].held() and not talk.broker.queues["q"].count


def test_a_read_of_several_queues_waits_for_the_one_whose_expired_items_cannot_be_moved(tmp_path):
    """It looked at the last of them, and so kept the loop busy."""
    talk = timed_talk(tmp_path, "[queue work]\nmax_age = 1s\nexpire_to_queue = late\n"
                                "[queue late]\nmax_items = 1\n")
    put_all(talk, "late", "full")
    put_all(talk, "work", *["x"] * 3 * kestrel.SWEEP_STEP)
    talk("pause late in\r\n")
    talk.now += 5000
    session = talk.session()
    session.feed(b"get work/or=other/t=500\r\n", talk.now)
    turns = 0
    while session.state == "working" and turns < 100:
        turns += 1
        commit(talk.broker, talk.now)
        session.resume(talk.now)
    assert turns < 10 and session.state == "waiting"


def test_a_read_ends_in_time_though_what_has_expired_cannot_be_moved(tmp_path, monkeypatch):
    """It took naps until it could be, whatever its timeout; a move did so too."""
    monkeypatch.setattr(kestrel, "_MOVE_SIZE", 1000)
    talk = timed_talk(tmp_path, "[queue work]\nexpire_to_queue = late\n")
    put_all(talk, "late", "x")
    put_some(talk, "work", *[b"x" * 500] * 20)
    for item in talk.broker.queues["work"].items:
        item.expiry = 1
    put_all(talk, "work", "good")
    talk("pause late in\r\n")

    def ask(text, name="client", seconds=5):
        answer = talk(text, name)
        for _ in range(200 * seconds):
            if not answer:
                talk.clock.reach(talk.clock.time + 5)
                answer = talk.heard(name)
        return answer

    assert ask("get work\r\n") == "END\r\n"
    assert ask("move work there\r\n") == (
        "SERVER_ERROR work: its expired items cannot be moved; 0 were moved\r\n")
    assert ask("get work/t=100\r\n", "waits too") == ""
    talk.session("waits too").time_out()
    assert talk.heard("waits too") == "END\r\n"
    assert ask("get work/t=9000\r\n", "waits too") == ""
    alarms = len(talk.clock.calls)
    put_some(talk, "work", *[b"y"] * 50)
    assert len(talk.clock.calls) < alarms + 5          # there was one more for each
    work, served = talk.broker.queues["work"], []
    serve = work._serve
    monkeypatch.setattr(work, "_serve", lambda now: served.append(now) or serve(now))
    assert ask("", "waits too", seconds=3) == ""
    assert 1 < len(served) < 20                        # it was tried each millisecond
    talk("resume late\r\n")
    assert ask("", "waits too") == values("good", key="work/t=9000")


def test_a_read_ends_in_time_though_a_move_does_not(tmp_path, monkeypatch):
    """It took naps for as long as an fsync does."""
    monkeypatch.setattr(kestrel, "_MOVE_SIZE", 1000)
    talk = timed_talk(tmp_path, "[queue q]\nmax_age = 1s\nexpire_to_queue = late\n"
                                "[queue late]\nsync_journal = 0\n")
    put_all(talk, "q", "x" * 2000, "y" * 2000)
    talk.now += 2000
    session = talk.session()
    session.feed(b"get q\r\n", talk.now)
    for _ in range(500):
        talk.broker.write()
        talk.clock.reach(talk.clock.time + 5)
        session.resume(talk.now)
    assert b"".join(session.take()) == b"END\r\n"


def test_dead_letters_that_wait_for_room_do_not_hold_up_what_expires(tmp_path, monkeypatch):
    """More than 4 MB of them did, in all queues; but they take no more memory than before."""
    monkeypatch.setattr(kestrel, "_MOVE_SIZE", 1000)
    talk = timed_talk(tmp_path, DEADLY.replace("3", "1")
                      + "[queue q]\nmax_age = 1s\nexpire_to_queue = late\n")
    put_all(talk, "dead", "x")
    put_all(talk, "work", "x" * 2000)
    put_all(talk, "q", "y")
    talk("pause dead in\r\nget work/open\r\nget work/abort\r\n")
    talk.now += 2000
    put_all(talk, "q", "z")
    assert talk("get q\r\n") == values("z")
    assert items_of(talk.broker, "late") == [b"y"]


def test_dead_letters_that_wait_for_room_are_tried_one_at_a_time_in_order(tmp_path, monkeypatch):
    """Each tried for itself, each second: 30,000 of them kept the loop busy, and came in any
    order."""
    talk = timed_talk(tmp_path, DEADLY.replace("3", "1") + "[queue dead]\nmax_items = 1\n")
    items = ["%02d" % number for number in range(40)]
    put_all(talk, "work", *items)
    put_all(talk, "dead", "full")
    talk("get work/open/n=40\r\nget work/abort/n=40\r\n")
    tries, add = [], kestrel.Queue.add
    monkeypatch.setattr(kestrel.Queue, "add", lambda *args: tries.append(args) or add(*args))
    found = []
    for second in range(1, 60):
        before = len(tries)
        talk.clock.reach(second * 1000)
        talk.heard()
        assert len(tries) - before <= 3
        found += items_of(talk.broker, "dead")
        talk("get dead\r\n")
    assert found == [b"full", *map(str.encode, items)]
    assert not talk.broker.queues["work"].opens
    assert not any(talk.broker.moves._buried.values())


@promise(1)
def test_a_dead_letter_is_moved_once_whatever_aborts_it_again(tmp_path):
    talk = timed_talk(tmp_path, DEADLY.replace("3", "1"))
    put_all(talk, "work", "a", "b")
    queue = talk.broker.queues["work"]
    xids = [item.xid for item in take(queue, 2, open=True)]
    assert queue.abort(*xids, now=NOW) == 2 and queue.abort(*xids, now=NOW) == 0
    queue.abort(*queue.opens)                # as a server does that stops
    talk.heard()
    talk.clock.reach(1)
    talk.heard()
    assert items_of(talk.broker, "dead") == [b"a", b"b"] and not queue.opens
    assert not queue.delays.dying


def test_each_copy_counts_for_itself(tmp_path):
    talk = Talk(tmp_path, "[queue]\nmax_deliveries = 1\ndead_letter_queue = dead\n"
                          "[alias dead]\ndestination_queues = d1, d2\n")
    talk("get fan+one\r\n")
    put_all(talk, "fan", "x")
    talk("get fan+one/open\r\nget fan+one/abort\r\n")
    assert items_of(talk.broker, "fan") == [b"x"] and items_of(talk.broker, "fan+one") == []
    assert items_of(talk.broker, "d1") == items_of(talk.broker, "d2") == [b"x"]
    talk("get d1/open\r\nget d1/abort\r\n")      # not put to itself for ever
    assert len(items_of(talk.broker, "d1")) + len(talk.broker.queues["d1"].opens) == 1


def test_the_log_names_who_gets_what_has_often_come_back(talk, caplog):
    put_all(talk, "q", "x")
    for _ in range(7):
        talk("get q/open\r\nget q/abort\r\n")
    assert caplog.text.count("a client is given an item of q that has come back 4 times") == 1


def test_no_count_is_written_where_none_is_asked_for(tmp_path):
    """So that Kestrel can read it."""
    queue = load(tmp_path)
    fill(queue, b"x", b"y")
    queue.abort(queue.remove(open=True, now=NOW).xid)
    queue.remove(open=True, now=NOW)
    queue.pack()
    assert queue.items[0].data == b"y" and queue.opens[2].deliveries == 1
    queue.close()
    assert {record["operation"] for record in kestrel.dump_records(str(tmp_path / "q"))} <= {
        "SAVE_XID", "ADDX", "REMOVE_TENTATIVE_XID", "UNREMOVE", "CHECK"}


@pytest.mark.parametrize("said, heard", [
    ("get q/n=0", "bad number of items (n=)"),
    ("get q/n=-5", "bad number of items (n=)"),
    ("get q/n=1e3", "bad number of items (n=)"),
    ("get q/n=" + "9" * 30, "bad number of items (n=)"),
    ("get q/open/timeout=0", "bad timeout"),
    ("get q/open/timeout=soon", "bad timeout"),
    ("get q/timeout=5", "timeout= needs open; delay= or tail needs abort"),
    ("get q/close/delay=5", "timeout= needs open; delay= or tail needs abort"),
    ("get q/tail", "timeout= needs open; delay= or tail needs abort"),
    ("get q/abort/tail/delay=5", "timeout= needs open; delay= or tail needs abort"),
    ("get q/abort/delay=-1", "bad delay"),
    ("get q/abort/delay=" + "9" * 18, "bad delay"),
    ("get q/touch/open", "open, close, abort and peek cannot be combined like this"),
    ("get q/touch/peek", "open, close, abort and peek cannot be combined like this"),
    ("get q/or=", "the name of a queue is empty"),
    ("set q/delay=x 0 0 1\r\nx", "bad delay"),
    ("set q/delay=-5 0 0 1\r\nx", "bad delay"),
    ("set q/delay=%s 0 0 1\r\nx" % ("9" * 18), "bad delay"),
    ("set q/later 0 0 1\r\nx", "set knows the options delay= and sync"),
    ("set a.b/sync 0 0 1\r\nx", "'.' in the name of a queue"),
])
def test_what_makes_no_sense_beyond_kestrel_is_refused(talk, said, heard):
    put_all(talk, "q", "a")
    assert talk(said + "\r\nversion\r\n") == "CLIENT_ERROR %s\r\nVERSION 1.0.0\r\n" % heard
    assert items_of(talk.broker, "q") == [b"a"]


@pytest.mark.parametrize("said", [
    "get q/n=%d/peek" % (1 << 62), "get q/n=%d" % (1 << 62), "get q/open/n=%d" % (1 << 62),
    "get q/open/timeout=%d" % (1 << 62), "set q/delay=3155760000000 0 0 1\r\nx"])
def test_large_numbers_beyond_kestrel_are_taken(talk, said):
    put_all(talk, "q", "a")
    assert talk(said + "\r\n").endswith(("END\r\n", "STORED\r\n"))


def test_users_have_no_more_rights_beyond_kestrel(tmp_path):
    text = secured(tmp_path, tls=False) + (
        "[queue a]\nget_users = ann\nput_users = ann\n[queue b]\nget_users = bob\n")
    talk = Talk(tmp_path, text)
    talk.session().user = "bob"
    for said in ("get a/n=2", "get b/or=a", "get a/peek/n=2", "set a/delay=5 0 0 1\r\nx",
                 "set a/sync 0 0 1\r\nx"):
        assert "bob is not among the" in talk(said + "\r\n"), said
    talk("set b/sync 0 0 1\r\nx\r\n")
    assert not talk.broker.queues.get("a") or not talk.broker.queues["a"].count


# -- its failures


def test_calls_that_calls_schedule_come_in_another_turn():
    """A run of expired items was gone on with in the same turn for ever."""
    timers = kestrel.Timers()
    made = []
    timers.at(1, lambda: (made.append(1), timers.at(1, lambda: made.append(2))))
    timers.run(1)
    assert made == [1] and timers.wait(1) == 0
    timers.run(1)
    assert made == [1, 2]


@promise(1)
def test_what_is_due_is_in_the_journal_at_each_moment(tmp_path, disk):
    """Without a server each change is written at once, and files are packed in between."""
    queue = load(tmp_path, max_memory_size=5000)
    fill(queue, *[b"%d" % number * 700 for number in range(4)])
    queue.abort(*[item.xid for item in take(queue, 4, open=True)], delay=10, now=NOW)
    fill(queue, b"x" * 1200)
    take(queue, 1)
    while len(os.listdir(str(tmp_path))) < 2:
        queue.pause(1 - queue.paused)
    queue.pause(0)
    queue.add_later(b"late", 20, now=NOW)
    queue.add_later(b"later", 20, now=NOW)
    disk.failing = {"pwrite": errno.ENOSPC}
    with pytest.raises(OSError):
        queue.peek(NOW + 20)
    assert len(queue.delays.items) == 6
    disk.failing = {}
    assert queue.peek(NOW + 20).data == b"0" * 700
    queue.close()
    assert contents_of(tmp_path) == [b"%d" % number * 700 for number in range(4)] + [
        b"late", b"later"]


@promise(2)
def test_items_that_cannot_be_read_stay_open_for_their_client(tmp_path, disk):
    talk = Talk(tmp_path, "[queue]\nmax_memory_size = 2kb\n")
    put_all(talk, "q", *["%02d" % number * 500 for number in range(30)])
    assert talk("get q/open/n=20\r\n").count("VALUE") == 20
    disk.failing = {"pread": errno.EIO}
    assert talk("get q/abort/tail/n=20\r\n").startswith("SERVER_ERROR")
    disk.failing = {}
    assert talk("get q/abort/tail/n=20\r\n") == "END\r\n"
    assert not talk.broker.queues["q"].opens and talk("get q/n=30\r\n").count("VALUE") == 30


@promise(2)
def test_many_items_of_which_some_cannot_be_read_are_not_lost(tmp_path, disk):
    talk = Talk(tmp_path, "[queue]\nmax_memory_size = 20kb\n")
    put_all(talk, "q", *["%02d" % number * 500 for number in range(60)])
    disk.failing = {"pread": errno.EIO}
    first = talk("get q/n=50\r\n")
    assert first.endswith("END\r\n") and 0 < first.count("VALUE") < 50
    disk.failing = {}
    assert first.count("VALUE") + talk("get q/n=60\r\n").count("VALUE") == 60


@promise(2)
def test_a_dead_letter_waits_for_nothing_but_its_queue(tmp_path):
    """Whatever else of its old queue is undone."""
    talk = timed_talk(tmp_path, DEADLY.replace("3", "1") + "sync_journal = 0\n")
    queue = talk.broker.queue("work", NOW)
    queue.add(b"bad", now=NOW)
    xid = queue.remove(open=True, now=NOW).xid
    queue.write()
    sync(queue)
    queue.abort(xid, now=NOW)
    queue.add(b"other", now=NOW)
    for _ in range(3):                       # it is on its way when the fsync of the other fails
        commit(talk.broker, NOW)
    fail_sync(queue)
    assert xid in queue.opens and queue.count == 0
    for second in range(1, 9):
        talk.broker.write()
        run_tasks(talk.broker)
        for one in talk.broker.queues.values():
            if one.needs_sync():
                sync(one)
        talk.clock.reach(second * 1000)
    assert not queue.opens and items_of(talk.broker, "dead") == [b"bad"]


@promise(2)
def test_an_answer_does_not_fail_with_what_is_done_after_it_was_written(tmp_path):
    """By one who left in the same turn, say. It was told SERVER_ERROR, and the item was there."""
    talk = Talk(tmp_path, "[queue]\nsync_journal = 0\n")
    queue = talk.broker.queue("q", NOW)
    session = talk.session()
    session.feed(set_("q", "x").encode(), NOW)
    commit(talk.broker, NOW)
    unsafe = {queue: queue.history.logged}
    call, under_way = queue.begin_sync()
    put(talk.broker, "q", b"later")
    queue.history.when_safe(lambda error: None)
    session.settle({}, unsafe)
    assert session.state == "held" and call() is None
    queue.synced(under_way)
    commit(talk.broker, NOW)
    fail_sync(queue)
    assert session.take() == [b"STORED\r\n"] and items_of(talk.broker, "q") == [b"x"]


def test_a_kick_looks_at_no_other_client(talk):
    class Clients(dict):
        def __iter__(self):
            raise AssertionError("all of them")

        items = keys = values = __iter__

    broker = talk.broker
    broker.clients = Clients()
    for name in ("one", "two"):
        broker.admit(talk.session(name))
    assert talk("kick 3\r\nkick 2\r\n", "one") == "NOT_FOUND\r\nOK\r\n"
    assert talk.session("two").is_over() and not talk.session("one").is_over()
    broker.dismiss(talk.session("two"))
    assert talk("kick 2\r\n", "one") == "NOT_FOUND\r\n"


def test_all_reads_that_time_out_in_a_turn_are_logged_in_one_look_at_the_clients(tmp_path, caplog):
    class Reads(dict):
        looks = 0

        def keys(self):
            Reads.looks += 1
            return super().keys()

        get = None

    talk = timed_talk(tmp_path, "[queue]\nopen_transaction_timeout = 100ms\n")
    names = ["q%d" % number for number in range(20)]
    for number in range(30):
        session = talk.session(number)
        talk.broker.admit(session)
        for name in names[number:]:
            talk("%sget %s/open\r\n" % (set_(name, "x"), name), number)
        session.open_reads = Reads(session.open_reads)
    talk.clock.reach(120)
    settle(talk.broker)
    assert Reads.looks == 30 and caplog.text.count(" 1 open reads of q") == 210
    assert not talk.broker.queues["q19"].opens and talk.broker.queues["q19"].count == 20


def with_many_open_reads(path, how):
    """A session with open reads of 120 queues, or 2,500 of one."""
    talk = Talk(path, "[server]\nmax_open_transactions = 5000\n")
    names = ["q"] if how == "one queue" else ["q%d" % number for number in range(120)]
    items = [b"%d" % number for number in range(2500 if how == "one queue" else 3)]
    session = talk.session()
    session.now = NOW
    for name in names:
        put(talk.broker, name, *items)
        queue = talk.broker.queues[name]
        for item in take(queue, len(items), open=True):
            session._note_open(queue, item)
    settle(talk.broker)
    return talk, session, [talk.broker.queues[name] for name in names], items


@pytest.mark.parametrize("how", ["one queue", "many queues"])
def test_many_open_reads_of_a_client_that_leaves_go_back_in_steps(tmp_path, how):
    talk, session, queues, items = with_many_open_reads(tmp_path, how)
    session.close(NOW)
    steps = 0
    while talk.broker.tasks or talk.broker.dirty:
        assert len(talk.broker.dirty) <= 51
        assert sum([len(queue.history.ops) for queue in queues]) <= 1000
        commit(talk.broker, NOW)
        steps += 1
    assert steps >= 3 and not session.open_reads
    for queue in queues:
        assert data_of(queue.items) == items and not queue.opens


def test_a_queue_is_deleted_while_many_open_reads_go_back(tmp_path):
    talk, session, queues, items = with_many_open_reads(tmp_path, "many queues")
    session.close(NOW)
    talk.broker.delete(queues[0])
    talk.broker.delete(queues[-1])
    settle(talk.broker)
    run_tasks(talk.broker)
    assert [data_of(queue.items) for queue in queues] == [[]] + [items] * 118 + [[]]


@promise(3)
def test_the_server_stops_while_many_open_reads_go_back(tmp_path):
    talk, session, queues, items = with_many_open_reads(tmp_path, "one queue")
    session.close(NOW)
    assert talk.broker.tasks
    for queue in queues:                               # as Server._stop() does
        queue.abort(*queue.opens, now=NOW)
    run_tasks(talk.broker)
    talk.broker.write()
    assert data_of(queues[0].items) == items


def with_an_open_read(tmp_path):
    """A session that has an item of q open, which is safe."""
    talk = Talk(tmp_path, "[queue]\nsync_journal = 0\n")
    queue, session = talk.broker.queue("q", NOW), talk.session()
    session.feed(set_("q", "x").encode() + b"get q/open\r\n", NOW)
    commit(talk.broker, NOW)
    sync(queue)
    session.take()
    return talk, queue, session


@promise(2)
@pytest.mark.parametrize("ask", ["set q/sync 0 0 1\r\ny\r\n", "get q/close/n=2\r\n"])
def test_who_waits_for_what_may_have_happened_is_hung_up_on(tmp_path, disk, ask):
    """It was told SERVER_ERROR, and what it had put was there afterwards."""
    talk, queue, session = with_an_open_read(tmp_path)
    session.feed(ask.encode(), NOW)
    commit(talk.broker, NOW)
    disk.failing = {"ftruncate": errno.EIO}
    fail_sync(queue)
    session.resume(NOW)
    assert session.is_over() and not session.take()


@promise(2)
@pytest.mark.parametrize("ask", ["set q/sync 0 0 1\r\ny\r\n", "get q/close/n=2\r\n",
                                 "get q/close/open/t=1000\r\n"])
def test_a_client_is_not_told_of_a_failure_while_what_it_did_becomes_safe(tmp_path, ask):
    talk, queue, session = with_an_open_read(tmp_path)
    session.feed(ask.encode(), NOW)
    session.turn_away(kestrel.Refused("SERVER_ERROR", "out of memory"))
    assert session.is_over() and not session.take()


def test_an_item_is_stored_in_all_queues_after_their_fsyncs(tmp_path):
    """The second was waited for when nothing would fsync it any more."""
    talk = Talk(tmp_path, "[queue]\nsync_journal = never\n[alias al]\ndestination_queues = x, y\n")
    assert talk("set al/sync 0 0 1\r\n1\r\n") == ""
    for queue in talk.broker.queues.values():
        assert queue.history.syncing
        sync(queue)
    assert talk.heard() == "STORED\r\n"


def test_deliveries_are_counted_once_over_packs_and_restarts(tmp_path):
    settings = dict(max_deliveries=9, dead_letter_queue="dead")
    queue = load(tmp_path, **settings)
    fill(queue, b"x", b"y")
    queue.abort(queue.remove(open=True, now=NOW).xid, delay=10, now=NOW)
    for _ in range(3):
        queue.pack()
        queue.close()
        queue = load(tmp_path, **settings)
        assert [one.item.deliveries for one in queue.delays.items.values()] == [1]
    queue.close()


def test_what_was_handed_to_nobody_is_not_counted(tmp_path):
    """A move to a full queue puts items back: they were dead letters after a restart."""
    settings = dict(max_deliveries=9, dead_letter_queue="dead")
    queue = load(tmp_path, **settings)
    fill(queue, b"a")
    for _ in range(3):
        queue.abort(queue.remove(open=True, now=NOW).xid, counted=False)
    queue.close()
    queue = load(tmp_path, **settings)
    assert queue.peek(NOW).deliveries == 0 and contents_of(tmp_path) == [b"a"]
    queue.close()


def test_deliveries_are_counted_once_though_a_write_is_late(tmp_path):
    settings = dict(max_deliveries=9, dead_letter_queue="dead")
    queue = turn_queue(tmp_path, **settings)
    fill(queue, b"a")
    for _ in range(2):                       # to the tail, and back to the head, in one write
        queue.abort(queue.remove(open=True, now=NOW).xid, tail=True, now=NOW)
        queue.abort(queue.remove(open=True, now=NOW).xid, now=NOW)
    queue.write()
    queue.close()
    queue = load(tmp_path, **settings)
    assert queue.peek(NOW).deliveries == 4
    queue.close()


@promise(2)
def test_a_flush_drops_all_or_nothing(tmp_path, disk):
    """Also without a server, where each change is written at once."""
    queue = load(tmp_path)
    fill(queue, b"a", b"b")
    queue.add_later(b"late", 5, now=NOW)
    disk.failing = {"pwrite": errno.ENOSPC}
    with pytest.raises(OSError):
        queue.flush()
    assert queue.count == 2 and len(queue.delays.items) == 1
    disk.good = 1                            # one write does all of it
    queue.flush()
    disk.failing = {}
    queue.close()
    assert contents_of(tmp_path, now=FAR) == []


def test_deliveries_are_counted_once_though_a_pack_is_late(tmp_path):
    settings = dict(max_deliveries=9, dead_letter_queue="dead", max_memory_size=300)
    queue = turn_queue(tmp_path, **settings)
    fill(queue, b"a" * 400)
    item = queue.remove(open=True, now=NOW)
    queue.write()
    while len(os.listdir(str(tmp_path))) < 2:
        queue.host.step()
    fill(queue, b"b" * 200)
    queue.write()
    queue.abort(item.xid, now=NOW)
    queue.write()
    queue.host.run()
    queue.write()
    queue.close()
    queue = load(tmp_path, **settings)
    assert queue.peek(NOW).deliveries == 1
    queue.close()


def test_what_is_on_its_way_to_the_dead_letters_cannot_be_closed(tmp_path, disk):
    """An item was closed, and a dead letter all the same."""
    talk = timed_talk(tmp_path, DEADLY.replace("3", "1"))
    put_all(talk, "work", "a")
    work, dead = talk.broker.queues["work"], talk.broker.queue("dead", NOW)
    xid = work.remove(open=True, now=NOW).xid
    settle(talk.broker)
    work.abort(xid, now=NOW, orphaned=True)           # its time is over
    assert not work.confirm(xid)
    disk.failing, disk.once, disk.good = {"pwrite": errno.ENOSPC}, True, 1
    for _ in range(5):
        commit(talk.broker, NOW)
    assert not disk.failing and dead.count == 1       # it is there, and its end here was undone
    assert xid in work.opens and not work.confirm(xid)
    talk.clock.reach(2000)
    settle(talk.broker)
    assert dead.count == 1 and not work.opens and not work.delays.dying


def test_the_close_of_a_read_that_was_opened_in_the_same_failed_write_is_refused(talk, disk):
    """It was END, and the item came again."""
    put_all(talk, "q", "a", "b")
    assert talk("get q/open\r\n") == values("a", key="q/open")
    disk.failing = {"pwrite": errno.ENOSPC}
    session = talk.session()
    session.feed(b"get q/close\r\nget q/open\r\nget q/close\r\n", NOW)
    session.settle(talk.broker.write()[1], {})
    assert b"".join(session.take()) == 3 * b"SERVER_ERROR q: No space left on device\r\n"
    queue = talk.broker.queues["q"]
    assert [item.data for item in queue.opens.values()] == [b"a"]
    assert [item.data for item in queue.items] == [b"b"]


@pytest.mark.parametrize("is_undone", [False, True])
def test_an_abort_that_is_undone_makes_no_dead_letter(tmp_path, disk, is_undone):
    """The client was told of a failure, and the item was a dead letter all the same; the client
    still seemed to have it, and closed that instead of the next item."""
    talk = timed_talk(tmp_path, DEADLY.replace("3", "1"))
    put_all(talk, "work", "a", "b")
    work, dead = talk.broker.queues["work"], talk.broker.queue("dead", NOW)
    assert values("a", "b", key="work/open/n=2") == talk("get work/open/n=2\r\n")
    session, other = talk.session(), talk.session("other")
    aborts, puts = (session, b"get work/abort\r\n"), (other, set_("work", "c").encode())
    for one, command in (puts, aborts) if is_undone else (aborts, puts):
        one.feed(command, NOW)
    disk.failing = {"pwrite": errno.ENOSPC}
    _, failed = talk.broker.write()
    for one in (session, other):
        one.settle(failed, set())
    assert (b"".join(session.take()) == b"END\r\n") != is_undone
    disk.failing = {}
    for _ in range(3):
        run_tasks(talk.broker)
        settle(talk.broker)
    assert list(session.open_reads[work]) == list(work.opens)
    assert (items_of(talk.broker, "dead") == [b"a"]) != is_undone
    assert talk("get work/close/n=2\r\n") == "END\r\n"
    assert not (work.opens or work.delays.dying or work.count)


def test_a_read_that_has_timed_out_for_the_last_time_does_not_stand_in_the_way(tmp_path):
    """The dead_letter_queue takes nothing for now."""
    talk = timed_talk(tmp_path, DEADLY.replace("3", "1"))
    put_all(talk, "work", "a", "b", "c")
    talk.broker.queue("dead", NOW)
    talk("pause dead in\r\n")
    assert values("a", key="work/open/timeout=10") == talk("get work/open/timeout=10\r\n")
    talk.clock.reach(talk.clock.time + 20)
    assert talk("get work\r\n") == values("b", key="work")
    assert talk("get work/open\r\n") == values("c", key="work/open")
    assert talk("confirm work 2\r\n") == "ERROR\r\n"
    assert len(talk.broker.queues["work"].opens) == 2


def test_a_last_delivery_that_is_undone_does_not_count(tmp_path, disk):
    """It left the count one higher, each time."""
    talk = timed_talk(tmp_path, DEADLY)
    put_all(talk, "work", "a")
    queue = talk.broker.queues["work"]
    queue.items[0].deliveries = 2
    queue.abort(queue.remove(open=True, now=NOW).xid, now=NOW)
    disk.failing = {"pwrite": errno.ENOSPC}
    talk.broker.write()
    assert data_of(queue.items) == [b"a"] and queue.items[0].deliveries == 2


def test_dead_letters_come_in_order_and_are_told_of_once(tmp_path, caplog):
    talk = timed_talk(tmp_path, DEADLY.replace("3", "1") + "[queue dead]\nmax_items = 1\n")
    put_all(talk, "work", "0", "1", "2")
    talk("get work/open/n=3\r\nget work/abort/n=3\r\n")
    for second in range(1, 12):
        talk.clock.reach(second * 1000)
        talk.heard()
        if second % 3 == 0:
            assert talk("get dead\r\n") == values(str(second // 3 - 1), key="dead")
    assert caplog.text.count("came back 1 times") == 3
    assert talk.broker.queues["work"].counters.dead_letters == 3


@promise(1)
@pytest.mark.parametrize("key", ["q", "q/open"])
def test_a_waiter_is_given_one_item_though_a_delayed_one_is_due_too(tmp_path, key):
    """In the turn of a put it was given both: one was lost, and the putter hung up on."""
    talk = timed_talk(tmp_path)
    assert talk("set q/delay=50 0 0 4\r\nlate\r\n") == "STORED\r\n"
    assert talk("get %s/t=1000\r\n" % key, "waiter") == ""
    talk.now += 50
    assert talk(set_("q", "now")) == "STORED\r\n"
    talk.clock.reach(50)
    found = [talk.heard("waiter"), talk("get %s/t=1000\r\n" % key, "another")]
    assert sorted(found) == sorted(values(data, key=key + "/t=1000") for data in ("late", "now"))


def aborted_with_a_delay(path, count):
    talk = timed_talk(path)
    items = [b"%04d" % number for number in range(count)]
    put_some(talk, "q", *items)
    queue = talk.broker.queues["q"]
    xids = [item.xid for item in take(queue, count, open=True)]
    settle(talk.broker)
    queue.abort(*xids, now=NOW, delay=1000)
    talk.clock.time += 1000
    return talk, queue, items


@pytest.mark.parametrize("steps", [1.5, 5.5])
def test_many_reads_that_were_aborted_with_a_delay_come_back_in_order(tmp_path, steps):
    """A part at a time. Those beyond the first thousand came in front of these."""
    talk, queue, items = aborted_with_a_delay(tmp_path, int(steps * kestrel.SWEEP_STEP))
    counts = [0]
    while talk.clock.calls:
        talk.clock.calls.pop()[2]()
        counts.append(queue.count)
        settle(talk.broker)
    assert max(after - before for before, after in zip(counts, counts[1:])) <= kestrel.SWEEP_STEP
    assert not queue.delays.alarm and not queue.delays.ready
    assert data_of(take(queue, len(items) + 1)) == items + [None]


def test_many_reads_in_a_turn_release_what_was_delayed_once(tmp_path):
    """The first of them puts as much back as is done in a turn; an alarm does the rest."""
    step = kestrel.SWEEP_STEP
    talk, queue, items = aborted_with_a_delay(tmp_path, 3 * step)
    assert data_of(take(queue, 3, now=NOW + 1000)) == items[-step:-step + 3]
    for _ in range(5):                                 # these have been due as long
        queue.add_later(b"", 1, now=NOW)
        queue.peek(NOW + 1000)
    assert queue.count == step - 3 and len(talk.clock.calls) == 1
    talk.clock.calls.pop()[2]()
    assert data_of(take(queue, 1, now=NOW + 1000)) == [items[step + 5]]
    talk.clock.reach(10 ** 9)
    assert not queue.delays.items and queue.count == 3 * step + 1


@pytest.mark.parametrize("gone", ["flush", "undone"])
def test_what_is_due_may_be_gone_before_it_is_put_back(tmp_path, disk, gone):
    talk, queue, items = aborted_with_a_delay(tmp_path, 2 * kestrel.SWEEP_STEP)
    if gone == "flush":
        settle(talk.broker)
    queue.peek(NOW + 1000)
    assert queue.count and queue.delays.ready
    if gone == "flush":
        queue.flush()
        queue.add_later(b"x", 5, now=NOW)
        items = [b"x"]
    else:
        disk.failing = {"pwrite": errno.ENOSPC}
        assert talk.broker.write()[1]
        disk.failing = {}
        assert not queue.count and not queue.delays.items
        queue.abort(*queue.opens, now=NOW)
    talk.clock.reach(10 ** 9)
    assert data_of(take(queue, len(items) + 1)) == items + [None]


@pytest.mark.parametrize("steps", range(1, 5))
def test_what_was_delayed_is_put_back_in_order_after_a_failure(tmp_path, disk, steps):
    talk, queue, items = aborted_with_a_delay(tmp_path, 3 * kestrel.SWEEP_STEP)
    settle(talk.broker)
    for _ in range(steps):
        talk.clock.calls and talk.clock.calls.pop()[2]()
    disk.failing = {"pwrite": errno.ENOSPC}
    assert talk.broker.write()[1]
    disk.failing = {}
    assert not queue.count and len(queue.delays.items) == len(items)
    while queue.delays.items:
        queue._release_now()
    assert data_of(take(queue, len(items) + 1)) == items + [None]


def test_what_is_looked_at_may_be_on_disk_only(tmp_path):
    queue = load(tmp_path, max_memory_size=2000)
    fill(queue, *[b"%d" % number * 1500 for number in range(5)])
    take(queue, 1)
    assert [item.data[:1] for some in queue.browse(9, NOW) for item in some] == [
        b"1", b"2", b"3", b"4"]
    queue.close()


@pytest.mark.parametrize("how", ["flush", "delete"])
def test_large_items_that_are_dropped_while_they_are_looked_at(tmp_path, how):
    """Their file was gone: the client that peeked at them was hung up on."""
    talk = Talk(tmp_path, "[queue]\nmax_memory_size = 1mb\n")
    put_some(talk, "q", *[b"x" * 2000000] * 8)
    queue = talk.broker.queues["q"]
    for _ in range(6):
        queue.remove(open=True, now=NOW)
        settle(talk.broker)
    queue.abort(*queue.opens, now=NOW)
    settle(talk.broker)
    run_tasks(talk.broker)
    assert queue.items[-1].data is None
    found = queue.browse(9, NOW)
    next(found)
    talk("%s q\r\n" % how)
    for _ in range(5):
        settle(talk.broker)
        run_tasks(talk.broker)
    put_some(talk, "q", b"new")
    assert b"new" not in [item.data for some in found for item in some]


def test_a_delayed_item_is_stored_in_all_queues_or_in_none(tmp_path):
    talk = Talk(tmp_path, "[queue]\nmax_memory_size = 2kb\n[alias al]\ndestination_queues = x, y\n")
    talk("set y/delay=5000 0 0 1500\r\n%s\r\n" % ("y" * 1500))
    assert talk("set al/delay=5000 0 0 700\r\n%s\r\n" % ("z" * 700)).startswith("SERVER_ERROR y:")
    assert not talk.broker.queues["x"].delays.items


def test_a_paused_queue_gives_nothing_to_its_children(talk):
    talk("get a+k\r\n" + set_("a", "1") + "pause a in\r\n")
    assert talk(set_("a", "2")) == "NOT_STORED\r\n" and items_of(talk.broker, "a+k") == [b"1"]


def test_a_touch_is_heard_to_the_last(tmp_path):
    """Those that time out go back together, a little later."""
    talk = timed_talk(tmp_path)
    put_all(talk, "q", "a")
    talk("get q/open/timeout=2000\r\n")
    talk.clock.reach(2080)
    assert talk("get q/touch\r\n") == "END\r\n"
    talk.clock.reach(4000)
    assert items_of(talk.broker, "q") == []
    talk.clock.reach(4400)
    assert items_of(talk.broker, "q") == [b"a"]


def test_reads_of_several_queues_end_in_their_order(talk):
    """Whatever queue they were opened of, and with which command."""
    for number in range(3):
        put_all(talk, "a", "a%d" % number)
        put_all(talk, "b", "b%d" % number)
    talk("get b/open\r\nget a/open\r\nget a/or=b/open\r\nget b/open\r\n")
    talk("get a/or=b/close/n=2\r\n")
    talk("get a/or=b/abort\r\n")
    assert items_of(talk.broker, "a") == [b"a1", b"a2"]
    talk("get a/or=b/abort\r\n")
    assert items_of(talk.broker, "b") == [b"b1", b"b2"]
    assert not talk.session().open_reads


def failing_turn(talk, disk, *names):
    """A turn in which nothing can be written; what each client is told."""
    disk.failing = {"pwrite": errno.EIO}
    _, failed = commit(talk.broker, NOW)
    disk.failing = {}
    assert failed
    for name in names:
        talk.session(name).settle(failed, set())
    return [b"".join(talk.session(name).take()) for name in names]


@promise(2)
@pytest.mark.parametrize("refused", [b"get a/close\r\n", b"get a/abort\r\n", b"set a 0 0 1\r\nx\r\n"])
def test_reads_of_several_queues_end_in_their_order_after_a_failure(talk, disk, refused):
    """What was refused took its queue to the end of that order, so that a later close removed the
    item of another queue."""
    put_all(talk, "a", "a0")
    put_all(talk, "b", "b0")
    talk("get a/open\r\nget b/open\r\n")
    talk.session().feed(refused, NOW)
    assert failing_turn(talk, disk, "client") == [b"SERVER_ERROR a: Input/output error\r\n"]
    talk("get b/or=a/close\r\n")
    talk("get b/or=a/abort\r\n")
    assert (items_of(talk.broker, "a"), items_of(talk.broker, "b")) == ([], [b"b0"])


def with_a_read_timed_out(tmp_path, then=""):
    """A Talk whose client has opened a0 of the queue a, which also has a1, and done `then`; the
    read has timed out since."""
    talk = timed_talk(tmp_path)
    put_all(talk, "a", "a0", "a1")
    talk("get a/open/timeout=50\r\n" + then)
    talk.clock.reach(100)
    assert talk("get a/peek\r\n") == values("a0", key="a/peek")
    return talk


@promise(2)
def test_a_read_that_has_timed_out_is_still_the_oldest_after_a_failure(tmp_path, disk):
    """A close of it does nothing: it closed the next one, which its worker had not finished."""
    talk = with_a_read_timed_out(tmp_path, "get a/open\r\n")
    talk.session().feed(b"get a/open\r\nset a 0 0 1\r\nx\r\n", NOW)
    assert failing_turn(talk, disk, "client") == [b"SERVER_ERROR a: Input/output error\r\n" * 2]
    assert talk("get a/close\r\n") == "END\r\n"
    talk("get a/abort\r\n")
    assert items_of(talk.broker, "a") == [b"a1", b"a0"]
    assert not talk.session().open_reads


@promise(2)
@pytest.mark.parametrize("timed_out", [False, True])
def test_reads_that_are_not_open_any_more_may_fail_to_be_closed(tmp_path, disk, timed_out):
    """The connection was closed, though all had been undone: its other reads went back."""
    if timed_out:
        talk = with_a_read_timed_out(tmp_path)
    else:
        talk = timed_talk(tmp_path)
        put_all(talk, "a", "a0", "a1")
    put_all(talk, "other", "b0")
    talk("get other/open\r\n")
    talk.session().feed(b"get a/open\r\nget a/close/n=2\r\n", NOW)
    heard = failing_turn(talk, disk, "client")
    talk.session().resume(NOW)
    heard += [b"".join(talk.session().take())]
    assert b"".join(heard) == b"SERVER_ERROR a: Input/output error\r\n" * 2
    assert talk("get a/close/n=2\r\n") == "END\r\n"
    assert items_of(talk.broker, "a") == [b"a0", b"a1"]
    assert len(talk.broker.queues["other"].opens) == 1


@promise(2)
def test_the_close_of_a_read_that_has_timed_out_may_fail_and_be_tried_again(tmp_path, disk):
    """It closed the next one, which its worker had not finished."""
    talk = with_a_read_timed_out(tmp_path, "get a/open\r\n")
    talk.session().feed(b"set a 0 0 1\r\nx\r\nget a/close\r\n", NOW)
    assert failing_turn(talk, disk, "client") == [b"SERVER_ERROR a: Input/output error\r\n" * 2]
    assert talk("get a/close\r\n") == "END\r\n"
    talk("get a/abort\r\n")
    assert sorted(items_of(talk.broker, "a")) == [b"a0", b"a1"]


@promise(2)
def test_the_latest_read_has_timed_out_and_stays_in_its_place_after_a_failure(tmp_path, disk):
    talk = with_a_read_timed_out(tmp_path)
    talk.session().feed(b"set a 0 0 1\r\nx\r\n", NOW)
    failing_turn(talk, disk, "client")
    assert talk("get a/open\r\n") == values("a0", key="a/open")
    assert talk("get a/close\r\n") == "END\r\n"
    talk("get a/abort\r\n")
    assert items_of(talk.broker, "a") == [b"a0", b"a1"]


@promise(2)
def test_a_read_of_a_queue_in_memory_is_closed_though_the_next_queue_cannot_be_read(
        tmp_path, disk):
    """The answer was an error, which says that the read is open."""
    talk = Talk(tmp_path, "[queue m]\nkeep_journal = false\n[queue r]\nmax_memory_size = 1kb\n")
    put_all(talk, "m", "m0")
    put_all(talk, "r", *["x" * 100] * 40)
    talk("get m/open\r\n")
    talk("get r\r\n" * 4)                  # the others are on the disk only
    disk.failing = {"pread": errno.EIO}
    session = talk.session()
    session.feed(b"get m/close/open/or=r\r\n", NOW)
    commit(talk.broker, NOW)
    session.resume(NOW)
    assert b"".join(session.take()) == b"END\r\n"
    assert not talk.broker.queues["m"].opens


@promise(2)
@pytest.mark.parametrize("how", ["close", "abort/tail"])
@pytest.mark.parametrize("failing", [0, 1])
def test_reads_of_several_queues_that_cannot_all_be_closed(talk, disk, how, failing):
    """The answer was END if the last of the queues had failed while the first was still waited
    for. An error would be wrong too: the next close would be of other reads."""
    put_all(talk, "a", "a0")
    put_all(talk, "b", "b0", "b1")
    talk("get a/open\r\nget b/open/n=2\r\n")
    session = talk.session()
    session.feed(b"get a/or=b/%b/n=2\r\n" % how.encode(), NOW)
    disk.failing, disk.once, disk.good = {"pwrite": errno.EIO}, True, failing
    written, failed = commit(talk.broker, NOW)
    assert len(written) == len(failed) == 1
    session.settle(failed, set())
    session.resume(NOW)
    assert session.state == "closed" and not session.take()
    kept = how != "close"
    assert items_of(talk.broker, "a") == [b"a0"] * (kept or failing == 0)
    assert sorted(items_of(talk.broker, "b")) == [b"b0"] * (kept or failing == 1) + [b"b1"]


@promise(2)
def test_reads_of_several_queues_none_of_which_can_be_closed(talk, disk):
    put_all(talk, "a", "a0")
    put_all(talk, "b", "b0")
    talk("get a/open\r\nget b/open\r\n")
    talk.session().feed(b"get a/or=b/close/n=2\r\n", NOW)
    disk.failing = {"pwrite": errno.EIO}
    _, failed = commit(talk.broker, NOW)
    disk.failing = {}
    talk.session().settle(failed, set())
    talk.session().resume(NOW)
    assert b"".join(talk.session().take()).startswith(b"SERVER_ERROR")
    assert talk("get a/or=b/close/n=2\r\n") == "END\r\n"
    assert not talk.broker.queues["a"].opens and not talk.broker.queues["b"].opens


@promise(2)
@pytest.mark.parametrize("how, open_reads, waiting", [
    ("close/n=2", 0, 0), ("abort/n=2", 0, 2), ("abort/tail", 1, 1), ("close/or=r/n=2", 0, 0)])
def test_what_was_closed_is_not_refused_since_something_else_fails(
        talk, disk, how, open_reads, waiting):
    """It was safe, and another client failed in the turn of its answer: the client was told that
    what it had closed was open, and it was gone."""
    put(talk.broker, "q", b"1", b"2")
    talk("get q/open/n=2\r\n")
    session, queue = talk.session(), talk.broker.queues["q"]
    session.feed(b"get q/%b\r\n" % how.encode(), NOW)
    assert session.state == "held" and commit(talk.broker, NOW)[0] == [queue]
    session.settle({}, set())
    session.resume(NOW)
    talk.session("other").feed(set_("q", "x").encode(), NOW)
    assert failing_turn(talk, disk, "client", "other") == [
        b"END\r\n", b"SERVER_ERROR q: Input/output error\r\n"]
    assert (len(queue.opens), queue.count) == (open_reads, waiting)


@promise(2)
@pytest.mark.parametrize("protocol", ["memcache", "text"])
@pytest.mark.parametrize("is_said", [True, False])
@pytest.mark.parametrize("before", [b"", b"version\n"])
def test_what_was_closed_is_not_refused_since_the_next_item_fails(
        tmp_path, disk, protocol, is_said, before):
    """The item came in a later turn, when the read before it had been closed for good, and what
    came before it in the same packet had been answered."""
    talk = Talk(tmp_path, session_type=kestrel._PROTOCOLS[protocol])
    put(talk.broker, "q", b"1")
    key, again, nothing = {
        "memcache": ("get q/open\r\n", b"get q/close/open/t=9000\r\n", b"END\r\n"),
        "text": ("get q\n", b"get q 9000\n", b"*\n")}[protocol]
    assert "1" in talk(key)
    session, queue = talk.session(), talk.broker.queues["q"]
    session.feed(before + again, NOW)
    commit(talk.broker, NOW)
    session.settle({}, set())
    if before:
        assert b"1.0" in b"".join(session.take())
        session.sent()
    assert session.state == "waiting" and not queue.opens
    queue.add(b"2", now=NOW)
    if is_said:
        session.resume(NOW)
    assert failing_turn(talk, disk, "client") == [nothing]
    assert not session.command and not queue.opens and not session.open_reads and not queue.count


@promise(2)
def test_what_was_closed_is_not_refused_since_the_next_item_cannot_be_read(talk, monkeypatch):
    put(talk.broker, "q", b"1", b"2")
    talk("get q/open\r\nget q/open\r\n")

    def fail(*arguments):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(kestrel.Queue, "remove", fail)
    assert talk("version\r\nget q/close/open/n=1\r\n").endswith("\r\nEND\r\n")
    assert talk("get q/close/open\r\n") == "END\r\n" and not talk.broker.queues["q"].opens
    assert talk("get q/close/open\r\n") == "SERVER_ERROR journal: no\r\n"


@promise(2)
@pytest.mark.parametrize("how", ["n=2", "open/n=2", "n=3"])
@pytest.mark.parametrize("failing", range(6))
def test_what_was_given_in_an_earlier_turn_is_not_refused(tmp_path, disk, how, failing):
    """The client had the items, and was told SERVER_ERROR: who raises an error for that throws
    them away."""
    talk = Talk(tmp_path, "[server]\nmax_output_buffer = 0\n")
    put(talk.broker, "q", b"1", b"2")
    commit(talk.broker, NOW)
    session, queue, told = talk.session(), talk.broker.queues["q"], b""
    session.feed(b"get q/%b\r\n" % how.encode(), NOW)
    for turn in range(8):
        if turn == failing:
            queue.add(b"of another client", now=NOW)
            disk.failing = {"pwrite": errno.EIO}
        _, failed = commit(talk.broker, NOW)
        assert bool(failed) == (turn == failing)
        disk.failing = {}
        session.settle(failed, set())
        told += b"".join(session.take())
        session.sent()
        session.resume(NOW)
    assert session.state == "ready" and told.count(b"VALUE") + queue.count == 2
    assert told.endswith(b"END\r\n") or b"VALUE" not in told


@promise(2)
def test_a_close_that_is_undone_is_refused_together_with_the_read(talk, disk):
    put(talk.broker, "q", b"1", b"2")
    talk("get q/open\r\n")
    talk.session().feed(b"get q/close/open\r\n", NOW)
    assert failing_turn(talk, disk, "client") == [b"SERVER_ERROR q: Input/output error\r\n"]
    assert data_of(talk.broker.queues["q"].opens.values()) == [b"1"]


def test_who_waits_to_peek_hears_nothing_of_a_failed_put_either(talk, disk):
    """The head of the answer was an error, and its rest came behind that."""
    talk(set_("q", "1"))
    waits, other = talk.session("waits"), talk.session("other")
    other.feed(b"get q/open\r\n", NOW)
    waits.feed(b"get q/peek/t=1000\r\n", NOW)
    waits.resume(NOW)
    assert waits.state == "waiting"
    disk.failing = {"pwrite": errno.ENOSPC}
    _, failed = talk.broker.write()          # it is at the head again
    other.settle(failed, set())
    talk.broker.queues["q"].recover(NOW)
    waits.resume(NOW)
    other.feed(set_("q", "2").encode(), NOW)
    _, failed = talk.broker.write()
    waits.settle(failed, set())
    assert b"".join(waits.take()) == b"VALUE q/peek/t=1000 0 1\r\n1\r\nEND\r\n"


def test_a_close_that_is_safe_does_not_fail_with_what_others_do_then(talk, disk):
    """It is answered in the turn after it has been written."""
    talk(set_("q", "1"))
    talk("get q/open\r\n")
    session, other = talk.session(), talk.session("other")
    session.feed(b"get q/close/n=2\r\n", NOW)
    assert not talk.broker.write()[1]
    session.settle({}, set())
    other.feed(set_("q", "2").encode(), NOW)
    session.resume(NOW)
    disk.failing = {"pwrite": errno.ENOSPC}
    _, failed = talk.broker.write()
    session.settle(failed, set())
    other.settle(failed, set())
    assert b"".join(other.take()).startswith(b"SERVER_ERROR ")
    assert not talk.broker.queues["q"].opens and b"".join(session.take()) == b"END\r\n"


def test_a_get_of_several_queues_does_not_fail_with_those_that_gave_nothing(talk, disk):
    talk(set_("q", "1") + set_("r", "2"))
    talk("get r\r\n")
    session, other = talk.session(), talk.session("other")
    session.feed(b"get r/or=q\r\n", NOW)
    other.feed(set_("r", "3").encode(), NOW)
    talk.broker.queues["q"].write()
    disk.failing = {"pwrite": errno.ENOSPC}
    _, failed = talk.broker.write()
    session.settle(failed, set())
    assert b"".join(session.take()) == b"VALUE r/or=q 0 1\r\n1\r\nEND\r\n"
    assert not talk.broker.queues["q"].count


def test_what_comes_back_when_a_put_fails_is_given_to_who_waits(tmp_path):
    """The client that has put has closed its side; its open read goes back, but not while queues
    are written: who is given that item would be told of a failure that was there before."""
    talk = Talk(tmp_path, "[queue]\nsync_journal = 0\n")
    broker = talk.broker
    queue = broker.queue("q", NOW)
    leaves, waits = talk.session("leaves"), talk.session("waits")
    queue.add(b"1", now=NOW)
    leaves.feed(b"get q/open\r\n", NOW)
    broker.write()
    sync(queue)
    leaves.take()
    waits.feed(b"get q/t=1000\r\n", NOW)
    waits.resume(NOW)
    queue.pause(kestrel.PAUSED_OUT)
    leaves.feed(set_("q", "2").encode(), NOW)
    broker.write()
    leaves.settle({}, {queue: queue.history.logged})
    leaves.hang_up(NOW)
    assert leaves.state == "held"
    fail_sync(queue)                         # the pause is undone, too
    for _ in range(2):
        _, failed = broker.write()
        for session in (leaves, waits):
            session.settle(failed, {queue: queue.history.logged})
        for session in (leaves, waits):
            session.resume(NOW)
    broker.write()
    waits.settle({}, {queue: queue.history.logged})
    sync(queue)
    assert b"".join(leaves.take()).startswith(b"SERVER_ERROR ") and leaves.is_over()
    assert b"".join(waits.take()) == b"VALUE q/t=1000 0 1\r\n1\r\nEND\r\n"


# == Protocols: text ======================================================================


TEXT_ANSWERS = [
    ("put work:\none\ntwo\n\n", "+2\n"),
    ("PUT work:\none\n\nget work\n", "+1\n:one\n"),
    ("put work:\none\n\r\nget work\r\n", "+1\n:one\n"),
    ("put work:\n\n", "+0\n"),
    ("put work\n", "+0\n"),
    ("put small:\none\ntwo\nthree\n\n", "+2\n"),
    ("put work 5000:\none\n\nget work\n", "+1\n:one\n"),
    ("put work 0:\none\n\nget work\n", "+1\n*\n"),
    ("put work soon:\none\n\nget work\n", "-Error parsing expiration time.\n*\n"),
    ("put:\none\n\n", "-Queue name required.\n"),
    ("put a.b:\none\n\n", "-'.' in the name of a queue\n"),
    ("get work\n", "*\n"),
    ("get work 0\nget work -5\n", "*\n*\n"),
    ("get\n", "-Queue name required.\n"),
    ("get work soon\n", "-Error parsing timeout.\n"),
    ("put work:\none\n\npeek work\npeek work\npeek none\n", "+1\n:one\n:one\n*\n"),
    ("put work:\n1\n2\n3\n4\n\nmonitor work 0 2\nconfirm work 2\n", "+4\n:1\n:2\n*\n+2\n"),
    ("put work:\n1\n\nmonitor work 0\n", "+1\n:1\n*\n"),
    ("put work:\n1\n2\n3\n4\n\nmonitor work 0\nget work\n",
     "+4\n:1\n:2\n:3\n*\n:4\n"),
    ("confirm work 1\n", "-Not that many transactions open.\n"),
    ("confirm work\nconfirm\nconfirm work x\n", "-Queue name & count required.\n" * 3),
    ("put work:\n1\n\nflush work\nget work\n", "+1\n+0\n*\n"),
    ("put work:\n1\n\ndelete work\ndelete work\nget work\n", "+1\n+0\n+0\n*\n"),
    ("flush\n", "-Queue name required.\n"),
    ("status\nstatus readonly\nstatus\n", ":UP\n+0\n:READONLY\n"),
    ("status odd\n", "-'odd' is none of: up, writeavoid, readonly, quiescent\n"),
    ("status readonly\nput work:\n1\n\n",
     "+0\n-the server is readonly: nothing can be written\n✂"),
    ("version\n", ":1.0.0\n"),
    ("nonsense here\n", "-Unknown command: nonsense\n"),
    ("\n", "-Unknown command:\n"),
    ("strange work:\nitem\n\nversion\n", "-Unknown command: strange\n:1.0.0\n"),
    ("quit\nversion\n", "✂"),
    ("x" * 9000, "-Line too long.\n✂"),
    ("put work:\n" + "x\n" * 1025 + "\n", "-Too many items; limit=1024\n✂"),
    ("put work:\n" + "x\n" * 1024 + "\n", "+1024\n"),
]


@pytest.mark.parametrize("sent, answer", TEXT_ANSWERS)
def test_text_answers(text, sent, answer):
    assert text(sent) == answer


@pytest.mark.parametrize("sent, answer", TEXT_ANSWERS[:30])
def test_text_answers_to_single_bytes(text, sent, answer):
    heard = "".join(text(byte) for byte in sent)
    assert heard.replace("✂", "") == answer.replace("✂", "")


def test_a_text_get_finishes_the_one_before(text):
    text("put work:\n1\n2\n3\n\n")
    queue = text.broker.queues["work"]
    assert text("get work\nget work\n") == ":1\n:2\n"
    assert data_of(queue.opens.values()) == [b"2"]
    text.session().close(NOW)
    assert items_of(text.broker, "work") == [b"2", b"3"]


def test_too_many_open_reads_of_a_text_client(text):
    text("put work:\n1\n2\n3\n4\n5\n\nmonitor work 0\n")
    text.broker.config.server.max_open_transactions = 2
    assert text("get work\n") == "-Too many open transactions; limit=2\n"


def test_text_clients_wait(text):
    assert text("get work 1000\nversion\n", "one") == ""
    assert text.session("one").timeout == 1000
    assert text("put work:\nit\n\n") == "+1\n"
    assert text.heard("one") == ":it\n:1.0.0\n"
    assert text("monitor work 1000 2\n", "one") == ""
    text("put work:\n1\n\n")
    assert text.heard("one") == ":1\n"
    text.session("one").time_out()
    assert text.heard("one") == "*\n"


def test_a_text_client_over_a_failing_disk(text, disk):
    text("put work:\n1\n\n")
    disk.failing = {"pwrite": errno.ENOSPC}
    session = text.session()
    session.feed(b"put work:\n2\n\nget work\nversion\n", NOW)
    session.settle(commit(text.broker, NOW)[1], set())
    assert b"".join(session.take()) == (
        b"-work: No space left on device\n" * 2 + b":1.0.0\n")
    disk.failing = {}
    assert text("get work\n") == ":1\n"


def test_a_text_get_of_an_alias(tmp_path):
    text = Talk(tmp_path, "[alias all]\ndestination_queues = a, b\n", kestrel.TextSession)
    assert text("put all:\n1\n\nget all 100\nget b\n") == "+1\n*\n:1\n"


def test_shutdown_of_a_text_client(text):
    assert text("shutdown\n") == "✂" and text.broker.stopping


def test_a_pipeline_of_text_commands_takes_many_turns(text):
    turns = list(turns_of(text.session(), b"get q\n" * 5000))
    assert len(turns) >= 5 and max(map(len, turns)) < 1500 and sum(map(len, turns)) == 5000


def test_a_text_put_has_its_limit_and_is_stored_in_pieces(text, monkeypatch):
    line = b"x" * (1 << 20) + b"\n"
    turns = list(turns_of(text.session(), b"put q:\n" + line * 10 + b"\nversion\n"))
    assert len(turns) > 5 and b"".join(itertools.chain(*turns)) == b"+10\n:1.0.0\n"
    session = text.session("greedy")
    session.feed(b"put q:\n" + line * 17, NOW)
    assert session.take()[0].startswith(b"-Items are too large together") and session.is_over()


def test_large_items_by_text_and_thrift(tmp_path):
    limits = "[server]\nmax_item_size = 1kb\n"
    text = Talk(tmp_path, limits, kestrel.TextSession)
    assert text("put q:\n%s\n\n" % ("x" * 1024)) == "+1\n"
    assert text("put q:\n%s\n\n" % ("x" * 1026)).startswith("-Line too long")
    thrift = Talk(tmp_path, limits + "[queue]\nkeep_journal = false\n", kestrel.ThriftSession)
    assert "too large" in thrift(thrift_put(b"q", b"x" * 10, b"x" * 1025))
    assert "q" not in thrift.broker.queues or not thrift.broker.queues["q"].count


# == Protocols: Thrift ====================================================================


THRIFT_ANSWERS = [
    (thrift_put(b"q", b"1", b"\0\xff"), reply(b"put", thrift_i32(0, 2))),
    (thrift_put(b"small", b"1", b"2", b"3"), reply(b"put", thrift_i32(0, 2))),
    (call(b"put", thrift_strings(2, [b"1"]), thrift_string(1, b"q"), strict=False, number=-1),
     reply(b"put", thrift_i32(0, 1), strict=False, number=-1)),
    (thrift_put(b"a.b", b"1"), exception(b"put", b"'.' in the name of a queue", 6)),
    (thrift_put(b"", b"1"), exception(b"put", b"the name of a queue is empty", 6)),
    (thrift_put(b"q", b"1") + thrift_get(b"q", 5), reply(b"put", thrift_i32(0, 1))
     + reply(b"get", thrift_items((b"1", 0)))),
    (thrift_put(b"q", b"1", b"2") + thrift_get(b"q", 1, 0, 1000),
     reply(b"put", thrift_i32(0, 2)) + reply(b"get", thrift_items((b"1", 1)))),
    (thrift_get(b"q", 5), reply(b"get", thrift_items())),
    (thrift_get(b"q", 0, 1000), reply(b"get", thrift_items())),
    (thrift_get(b"q", -1, 1000), reply(b"get", thrift_items())),
    (call(b"confirm", thrift_string(1, b"none"), thrift_ids(2, [1])),
     reply(b"confirm", thrift_i32(0, 0))),
    (call(b"abort", thrift_string(1, b"none"), thrift_ids(2, [])),
     reply(b"abort", thrift_i32(0, 0))),
    (call(b"delete_queue", thrift_string(1, b"none")), reply(b"delete_queue")),
    (call(b"flush_queue", thrift_string(1, b"none")), reply(b"flush_queue")),
    (call(b"flush_all_queues"), reply(b"flush_all_queues")),
    (call(b"current_status"), reply(b"current_status", thrift_i32(0, 3))),
    (call(b"set_status", thrift_i32(1, 1)) + call(b"current_status") + thrift_get(b"q", 1),
     reply(b"set_status") + reply(b"current_status", thrift_i32(0, 1))
     + exception(b"get", b"the server is quiescent: nothing can be read", 6)),
    (call(b"set_status", thrift_i32(1, 0)), exception(
        b"set_status", b"'status 0' is none of: up, writeavoid, readonly, quiescent", 6)),
    (call(b"get_version"), reply(b"get_version", thrift_string(0, b"1.0.0"))),
    (call(b"get_version", kind=4) + call(b"get_version"),      # oneway is not answered
     reply(b"get_version", thrift_string(0, b"1.0.0"))),
    (call(b"nonsense", thrift_i32(1, 1)), exception(b"nonsense", b"unknown method nonsense", 1)),
    (call(b"get_version", kind=2), exception(b"get_version", b"unknown method get_version", 1)),
    (call(b"peek", thrift_i32(1, 5)),
     exception(b"peek", b"field 1 of peek is missing, or of another type", 7)),
    (call(b"put", thrift_string(1, b"q"), thrift_ids(2, [5])),
     exception(b"put", b"field 2 of put is missing, or of another type", 7)),
    (call(b"put", thrift_string(1, b"q"), field(15, 2, struct.pack(">bii", 8, 1, 5))),
     exception(b"put", b"items must be binary", 7)),
    (call(b"peek", field(11, 1, struct.pack(">i", 1000))),
     exception(b"peek", b"impossible size 1000", 7)),
    (call(b"peek", field(11, 1, struct.pack(">i", -1))),
     exception(b"peek", b"impossible size -1", 7)),
    (call(b"peek", field(15, 1, struct.pack(">bi", 2, 1 << 30))),
     exception(b"peek", b"impossible count 1073741824", 7)),
    (call(b"peek", field(99, 1, b"")), exception(b"peek", b"unknown type 99", 7)),
    (call(b"peek", b"\x0c\0\1" * 40), exception(b"peek", b"nested too deeply", 7)),
    (call(b"peek", thrift_string(1, b"none"), field(13, 9, struct.pack(">bbi", 8, 2, 1) + b"12345"),
          field(4, 10, b"12345678"), field(2, 11, b"1"), field(6, 12, b"12")),
     reply(b"peek", field(12, 0, b"".join(field(10, n, bytes(8)) for n in range(2, 6))
                          + thrift_i32(6, 0) + thrift_i32(7, 0) + b"\0"))),
]


@pytest.mark.parametrize("sent, answer", THRIFT_ANSWERS)
def test_thrift_answers(thrift, sent, answer):
    assert heard_of(thrift(sent)) == answer


@pytest.mark.parametrize("sent, answer", THRIFT_ANSWERS[:8])
def test_thrift_answers_to_single_bytes(thrift, sent, answer):
    assert b"".join(heard_of(thrift(sent[at:at + 1])) for at in range(len(sent))) == answer


@pytest.mark.parametrize("sent", [
    struct.pack(">i", -1), struct.pack(">i", 0), struct.pack(">i", (128 << 20) + (64 << 10) + 1),
    b"GET / HTTP/1.0\r\n\r\n", struct.pack(">i", 3) + b"abc",
    struct.pack(">iI", 8, 0x80020001) + b"1234", struct.pack(">ii", 8, 100) + b"1234",
])
def test_thrift_frames_that_cannot_be_followed(thrift, sent):
    assert thrift(sent) == "✂"


def test_a_thrift_client_peeks(thrift):
    thrift(thrift_put(b"q", b"one", b"two") + thrift_get(b"q", 1, 0, 1000))
    logsize = thrift.broker.queues["q"].journal.size
    assert heard_of(thrift(call(b"peek", thrift_string(1, b"q")))) == reply(
        b"peek", field(12, 0, thrift_string(1, b"two") + b"".join(
            field(10, number, struct.pack(">q", value))
            for number, value in ((2, 1), (3, 3), (4, logsize), (5, 0)))
            + thrift_i32(6, 0) + thrift_i32(7, 1) + b"\0"))


def test_a_thrift_get_waits_until_it_has_enough(thrift):
    thrift(thrift_put(b"q", b"1"))
    assert thrift(thrift_get(b"q", 3, 1000) + call(b"get_version"), "one") == ""
    session = thrift.session("one")
    assert session.timeout == 1000 and len(thrift.broker.queues["q"].opens) == 1
    thrift(thrift_put(b"q", b"2"))
    assert thrift.heard("one") == ""
    thrift(thrift_put(b"q", b"3", b"4"))
    assert heard_of(thrift.heard("one")) == (
        reply(b"get", thrift_items((b"1", 0), (b"2", 0), (b"3", 0)))
        + reply(b"get_version", thrift_string(0, b"1.0.0")))
    assert not thrift.broker.queues["q"].opens
    thrift(thrift_get(b"q", 3, 1000), "one")
    session.time_out()
    assert heard_of(thrift.heard("one")) == reply(b"get", thrift_items((b"4", 0)))


def test_items_of_a_thrift_get_in_hand_do_not_time_out(tmp_path):
    thrift = Talk(tmp_path, "[queue]\nopen_transaction_timeout = 100ms\n",
                  kestrel.ThriftSession)
    clock = thrift.broker.later = Clock()
    thrift(thrift_put(b"q", b"1"))
    assert thrift(thrift_get(b"q", 3, 10000), "one") == ""
    for moment in range(50, 2000, 50):
        clock.reach(moment)
        assert thrift.heard("one") == ""
    thrift.session("one").time_out()
    assert heard_of(thrift.heard("one")) == reply(b"get", thrift_items((b"1", 0)))
    assert not thrift.broker.queues["q"].opens and not thrift.broker.queues["q"].count


def test_thrift_reads_that_go_back_by_themselves_are_bounded(tmp_path):
    thrift = Talk(tmp_path, "[server]\nmax_open_transactions = 3\n[queue]\n"
                            "open_transaction_timeout = 1s\n", kestrel.ThriftSession)
    clock = thrift.broker.later = Clock()
    thrift(thrift_put(b"q", *[b"x"] * 9))
    queue = thrift.broker.queues["q"]
    thrift(thrift_get(b"q", 2, 0, 60000))
    thrift(thrift_get(b"q", 5, 0, 60000))
    assert len(queue.opens) == 3
    assert heard_of(thrift(thrift_get(b"q", 1, 0, 60000))) == exception(
        b"get", b"too many open reads of q; limit=3", 6)
    assert heard_of(thrift(thrift_get(b"q", 1))) == reply(b"get", thrift_items((b"x", 0)))
    clock.reach(1000)
    clock.reach(1200)
    assert not queue.opens and queue.count == 8       # sooner than the client has asked for
    thrift(thrift_get(b"q", 5, 0, 60000))
    assert len(queue.opens) == 3


def test_a_thrift_get_that_fails_after_its_first_items_gives_them_back(tmp_path, disk):
    thrift = Talk(tmp_path, "[queue]\nmax_age = 10ms\n", kestrel.ThriftSession)
    for number in range(3):
        thrift(thrift_put(b"q", b"%d" % number))
    thrift.now += 5
    thrift(thrift_put(b"q", *[b"late"] * 3, expiration=-1))
    session = thrift.session()
    queue = thrift.broker.queues["q"]
    read, reads = queue.remove, []
    queue.remove = lambda *arguments: reads.append(0) or (
        read(*arguments) if len(reads) != 3 else None)             # as while a large one is read
    session.feed(thrift_get(b"q", 5), NOW)
    assert not commit(thrift.broker, NOW)[1] and session.state == "working"
    disk.failing = {"pwrite": errno.ENOSPC}
    session.resume(NOW)
    session.settle(commit(thrift.broker, NOW)[1], set())
    assert "No space left" in b"".join(session.take()).decode("latin-1")
    disk.failing = {}
    commit(thrift.broker, NOW)
    assert not queue.opens and items_of(thrift.broker, "q")[:3] == [b"0", b"1", b"2"]


def test_a_thrift_put_of_too_large_an_item_creates_no_queue(tmp_path):
    thrift = Talk(tmp_path, "[server]\nmax_item_size = 1kb\n", kestrel.ThriftSession)
    assert "too large" in thrift(thrift_put(b"q", b"1", b"x" * 1025))
    assert not thrift.broker.queues


def test_a_thrift_client_that_leaves_while_it_waits(thrift):
    thrift(thrift_put(b"q", b"1", b"2"))
    thrift(thrift_get(b"q", 3, 1000), "one")
    thrift.session("one").close(NOW)
    assert items_of(thrift.broker, "q") == [b"1", b"2"]
    assert not thrift.broker.queues["q"].opens and not thrift.broker.queues["q"].waiters


def test_thrift_reads_outlive_their_connection_and_go_back_by_themselves(tmp_path):
    thrift = Talk(tmp_path, session_type=kestrel.ThriftSession)
    clock = thrift.broker.later = Clock()
    thrift(thrift_put(b"q", b"1", b"2", b"3"))
    thrift(thrift_get(b"q", 2, 0, 1000), "one")
    thrift(thrift_get(b"q", 1, 0, 5000), "two")
    queue = thrift.broker.queues["q"]
    for name in ("one", "two"):
        thrift.session(name).close(NOW)
    assert list(queue.opens) == [1, 2, 3]
    assert heard_of(thrift(call(b"confirm", thrift_string(1, b"q"), thrift_ids(2, [3, 3, 9])))
                    ) == reply(b"confirm", thrift_i32(0, 1))
    clock.reach(1000)
    clock.reach(1100)
    assert items_of(thrift.broker, "q") == [b"1", b"2"] and not queue.opens
    thrift(thrift_get(b"q", 2, 0, 1000))
    assert heard_of(thrift(call(b"abort", thrift_string(1, b"q"), thrift_ids(2, [5, 4])))
                    ) == reply(b"abort", thrift_i32(0, 2))
    assert items_of(thrift.broker, "q") == [b"1", b"2"]
    clock.reach(9999)
    assert items_of(thrift.broker, "q") == [b"1", b"2"]


def test_a_thrift_put_can_expire(thrift):
    thrift(thrift_put(b"q", b"1", expiration=1000))
    thrift.now += 999
    assert thrift.broker.queues["q"].peek(thrift.now)
    thrift.now += 1
    assert heard_of(thrift(thrift_get(b"q", 1))) == reply(b"get", thrift_items())


def test_a_thrift_client_over_a_failing_disk(thrift, disk):
    thrift(thrift_put(b"q", b"1", b"2"))
    thrift.session("waits").feed(thrift_get(b"q", 3, 1000), NOW)
    commit(thrift.broker, NOW)
    session = thrift.session()
    session.feed(thrift_put(b"r", b"2") + call(b"get_version", number=8), NOW)
    disk.failing = {"pwrite": errno.ENOSPC}
    session.resume(NOW)
    session.settle(commit(thrift.broker, NOW)[1], set())
    session.resume(NOW)
    assert b"".join(session.take()) == (
        exception(b"put", b"r: No space left on device", 6)
        + reply(b"get_version", thrift_string(0, b"1.0.0"), number=8))
    session = thrift.session("waits")
    disk.failing = {}
    session.settle(
        {thrift.broker.queues["q"]: OSError(errno.EIO, "Input/output error", "q")}, set())
    assert b"".join(session.take()) == exception(b"get", b"q: Input/output error", 6)
    assert thrift.heard("waits") == ""
    assert items_of(thrift.broker, "q") == [b"1", b"2"]


def test_a_thrift_get_meets_a_mass_expiry(thrift):
    thrift(thrift_put(b"q", *[b"late"] * 2500, expiration=1))
    thrift(thrift_put(b"q", b"last"))
    thrift.now += 10
    session = thrift.session()
    session.feed(thrift_get(b"q", 1), thrift.now)
    assert session.state == "working" and thrift.broker.queues["q"].count >= 1500
    assert heard_of(thrift.heard()) == reply(b"get", thrift_items((b"last", 0)))


def test_a_thrift_get_of_very_much_gives_a_part_of_it(thrift, monkeypatch):
    monkeypatch.setattr(kestrel, "_MOST_ITEMS", 3)
    thrift(thrift_put(b"q", *[b"x"] * 5))
    assert heard_of(thrift(thrift_get(b"q", 1000))) == reply(b"get", thrift_items(*[(b"x", 0)] * 3))
    monkeypatch.setattr(kestrel, "_MOST_BYTES", 1)
    assert heard_of(thrift(thrift_get(b"q", 2))) == reply(b"get", thrift_items((b"x", 0)))


def test_thrift_calls_of_very_many_values_are_refused_and_long_puts_take_many_turns(thrift):
    session = thrift.session()
    said = list(turns_of(session, thrift_put(b"q", *[b"%d" % number for number in range(5000)])))
    assert len(said) >= 5 and [len(answers) for answers in said[:-1]] == [0] * (len(said) - 1)
    assert thrift.broker.queues["q"].count == 5000
    for frame in (thrift_put(b"q", *[b"x"] * 20000),
                  call(b"get_version", *[field(8, 1, bytes(4))] * 20000),
                  call(b"get_version", field(15, 1, b"\x0f" + struct.pack(">i", 300) + (
                      b"\x02" + struct.pack(">i", 300) + bytes(300)) * 300))):
        answer = thrift(frame)
        assert "more than 10100 values in a call" in answer
    assert thrift.broker.queues["q"].count == 5000
    small = list(turns_of(session, call(b"get_version") * 2000))
    assert max(map(len, small)) < 400 and sum(map(len, small)) == 2000


@pytest.mark.parametrize("kind, number", [(4, struct.pack(">d", 1.0)), (11, struct.pack(">i", 0))])
@pytest.mark.parametrize("method", [b"confirm", b"abort"])
def test_thrift_ids_are_integers(thrift, kind, number, method):
    put_some(thrift, "q", b"x")
    assert thrift(thrift_get(b"q", 1, 0, 1000))
    ids = field(14, 2, struct.pack(">bi", kind, 1) + number)
    assert "ids must be integers" in thrift(call(method, thrift_string(1, b"q"), ids))
    assert list(thrift.broker.queues["q"].opens) == [1]
    assert not commit(thrift.broker, NOW)[1]


def test_a_thrift_client_keeps_no_queues_that_are_deleted(thrift):
    """They stayed in memory for as long as the client did."""
    with no_cycles():
        for number in range(3):
            thrift(thrift_put(b"q", b"x") + thrift_get(b"q", 1, 0, 1000))
            queue = weakref.ref(thrift.broker.queues["q"])
            thrift(call(b"delete_queue", thrift_string(1, b"q")))
            thrift.broker.totals()
            assert queue() is None


# == Admin ================================================================================


@pytest.mark.parametrize("path, body", [
    ("/ping", "pong\n"), ("/status", "UP\n"), ("/readable", "OK\n"), ("/writable", "OK\n"),
    ("/ping?what=ever", "pong\n")])
def test_admin_plain_answers(admin, path, body):
    status, headers, told = ask(admin, "GET " + path)
    assert (status, told) == (200, body)
    assert headers["Content-Type"].startswith("text/plain") and "Connection" not in headers
    status, headers, told = responses(admin(request("HEAD " + path)) + " " * len(body))[0]
    assert status == 200 and int(headers["Content-Length"]) == len(body) and not told.strip()


@pytest.mark.parametrize("word, readable, writable", [
    ("up", 200, 200), ("readonly", 200, 503), ("writeavoid", 200, 200), ("quiescent", 503, 503)])
def test_admin_tells_load_balancers_the_status(admin, word, readable, writable):
    admin.broker.set_status(word)
    assert ask(admin, "GET /readable")[0] == readable
    assert ask(admin, "GET /writable")[0] == writable
    assert ask(admin, "GET /status")[2] == word.upper() + "\n"


BAD_REQUESTS = [
    ("nonsense\r\n\r\n", 400), ("GET /ping\r\n\r\n", 400), ("GET /ping HTTP/2.0\r\n\r\n", 400),
    ("GET  /ping HTTP/1.1\r\n\r\n", 400), (request("GET /ping", "No colon"), 400),
    (request("GET /ping", "Bad name : x"), 400), (request("GET /ping", " folded: x"), 400),
    (request("GET /ping", "Host: there"), 400),
    (request("POST /reload", "Content-Length: x"), 400),
    (request("POST /reload", "Content-Length: -1"), 400),
    (request("POST /reload", "Content-Length: 2", "Content-Length: 2", body="ab"), 400),
    (request("POST /reload", "Transfer-Encoding: chunked", body="0\r\n\r\n"), 400),
    (request("POST /reload", "Content-Length: 99999999"), 413),
    (request("GET http://[/"), 400), ("stats\r\n", 400), ("get q/t=500\n", 400),
    (request("GET /" + "x" * 20000), 431), (request("GET /ping", "X: " + "x" * 20000), 431),
]


@pytest.mark.parametrize("text, status", BAD_REQUESTS)
def test_a_bad_http_request_is_told_so_and_hung_up_on(admin, text, status):
    answer = admin(text + request("GET /ping"))
    assert answer.endswith("✂")
    (told, headers, _), = responses(answer)
    assert told == status and headers["Connection"] == "close"


@pytest.mark.parametrize("text", [
    "GET /ping HTTP/1.0\n\n", "GET /ping HTTP/1.1\nHost: localhost\n\n"])
def test_lines_that_end_in_no_crlf_are_told_of_at_once(admin, text):
    """By hand, or of a simple check, which heard nothing for a minute."""
    answer = admin(text)
    assert answer.startswith("HTTP/1.1 400 ") and answer.endswith(
        "\r\n\r\nlines end in CRLF\n✂")


@pytest.mark.parametrize("line, status", [
    ("GET /nothing", 404), ("POST /ping", 405), ("PUT /ping", 405), ("GET /reload", 405),
    ("GET /flush?queue=q", 405), ("DELETE /", 405), ("POST /flush", 400),
    ("POST /put", 400), ("POST /kick", 400), ("POST /kick?id=x", 400), ("POST /set_status", 400),
    ("POST /flush?queue=nope", 404), ("POST /kick?id=99", 404),
    ("POST /delete?queue=nope", 404), ("GET /peek?queue=nope", 404)])
def test_requests_that_make_no_sense_leave_the_connection_open(admin, line, status):
    first, second = responses(admin(request(line) + request("GET /ping")))
    assert (first[0], second[0]) == (status, 200)
    assert first[1].get("Allow") == ({405: "POST" if "GET" in line else "GET, HEAD"}.get(status))


def test_http_connections_are_kept_as_asked_for(admin):
    assert admin(request("GET /ping", "Connection: close")).endswith("✂")
    assert admin("GET /ping HTTP/1.0\r\n\r\n", "old").endswith("✂")
    assert not admin(request("GET /ping"), "new").endswith("✂")
    session = admin.session("new")
    assert len(responses(admin(request("GET /ping") * 50, "new"))) == 50
    assert len(responses(admin("\r\n" + request(
        "POST /nothing", "Content-Length: 9", body="GET / x\r\n") + request("GET /ping"),
        "new"))) == 2
    assert not session.is_over() and not session.unparsed


def test_http_in_any_pieces_gives_the_same_answers(admin):
    text = (request("GET /status") + request("POST /nothing", "Content-Length: 3", body="abc")
            + request("GET /ping"))
    whole = admin(text)
    for size in (1, 2, 7):
        answers = [admin(text[at:at + size], "in %d" % size) for at in range(0, len(text), size)]
        assert "".join(answers) == whole


def test_a_client_that_asks_before_it_sends_a_body_is_told_to_go_on(admin):
    """It waited, a second as a rule."""
    head = request("POST /put?queue=q", "Expect: 100-Continue", "Content-Length: 3")
    for size in (1, 5, len(head)):
        told = [admin(head[at:at + size], "in %d" % size) for at in range(0, len(head), size)]
        assert "".join(told) == told[-1] == "HTTP/1.1 100 Continue\r\n\r\n"
        assert [admin(byte, "in %d" % size) for byte in "ab"] == ["", ""]
        assert responses(admin("c", "in %d" % size))[0][0] == 200
    assert responses(admin(head + "abc"))[0][0] == 200 and items_of(admin.broker, "q") == [b"abc"] * 4
    assert admin(head.replace("1.1", "1.0"), "old") == ""


def test_what_changes_something_is_posted_and_from_here(admin, tmp_path):
    put_some(admin, "q", b"1", b"2")
    put_some(admin, WEIRD, b"1")
    status, _, why = ask(admin, "POST /flush?queue=q", "Origin: http://elsewhere")
    assert status == 403 and "pages of this server" in why
    assert ask(admin, "POST /flush?queue=q", "Origin: null")[0] == 403
    assert admin.broker.queues["q"].count == 2
    assert ask(admin, "POST /flush?queue=q", "Origin: http://[::1]:2223")[0] == 200
    assert admin.broker.queues["q"].count == 0
    weird = urllib.parse.quote(os.fsencode(WEIRD))
    assert ask(admin, "POST /delete?queue=" + weird)[0] == 200
    assert set(admin.broker.queues) == {"q"}
    (tmp_path / "kestrel.conf").write_text("[queue q]\nmax_items = 1\n")
    assert ask(admin, "POST /reload")[0] == 200
    assert admin.broker.queues["q"].config.max_items == 1
    (tmp_path / "kestrel.conf").write_text("[queue q]\nmax_items = x\n")
    status, _, why = ask(admin, "POST /reload")
    assert status == 500 and ":2: max_items" in why
    assert ask(admin, "POST /quiesce")[0] == 200
    assert admin.broker.status == "QUIESCENT"
    assert ask(admin, "POST /flush?queue=q")[0] == 503
    assert ask(admin, "GET /peek?queue=q")[0] == 503
    session = admin.session("far", local=False)
    assert responses(admin(request("POST /shutdown"), "far"))[0][0] == 403
    assert not admin.broker.stopping and not session.is_over()
    assert admin(request("POST /shutdown")).endswith("✂")
    assert admin.broker.stopping


def test_posts_move_pause_and_put(admin):
    put_some(admin, "q", b"1", b"2")
    assert ask(admin, "POST /move?queue=q&dest=r")[2] == "2 moved\n"
    assert items_of(admin.broker, "r") == [b"1", b"2"]
    assert ask(admin, "GET /item?queue=r&n=1")[2] == "2"
    assert ask(admin, "GET /item?queue=r&n=2")[0] == 404
    for what, told in (("&what=out", "out"), ("", "in and out"), ("&what=in", "in")):
        assert ask(admin, "POST /pause?queue=q" + what)[2] == "paused: %s\n" % told
    assert ask(admin, "POST /pause?queue=q&what=never")[0] == 400
    assert ask(admin, "POST /put?queue=q")[2] == "the queue is full or paused\n"
    assert ask(admin, "POST /pause?queue=q&what=no")[2] == "paused: no\n"
    assert ask(admin, "POST /put?queue=q")[2] == "stored\n"
    assert items_of(admin.broker, "q") == [b""]


@pytest.mark.parametrize("host, headers, status", [
    ("127.0.0.1:2223", [], 200), ("localhost", [], 200), ("[::1]", [], 200), ("10.1.2.3", [], 200),
    ("", [], 200), ("Queues.Example:2223", [], 200), (os.uname().nodename, [], 200),
    ("evil.example", [], 403), ("127.0.0.1.evil.example:2223", [], 403),
    ("localhost.evil.example", [], 403), ("evil.example", ["Origin: http://evil.example"], 403),
    ("localhost", ["Origin: http://localhost"], 200), ("localhost", ["Origin: http://other"], 403),
    ("localhost", ["Sec-Fetch-Site: same-origin"], 200), ("localhost", ["Sec-Fetch-Site: none"], 200),
    ("localhost", ["Sec-Fetch-Site: cross-site"], 403), ("localhost", ["Sec-Fetch-Site: same-site"], 403)])
@pytest.mark.parametrize("line", ["POST /flush?queue=q", "POST /quiesce", "GET /peek?queue=q"])
def test_pages_of_elsewhere_change_and_see_nothing(tmp_path, line, host, headers, status):
    admin = Talk(tmp_path, "[server]\nadmin_hosts = queues.example\n", kestrel.AdminSession)
    put_some(admin, "q", b"x")
    assert responses(admin(http(line, host, *headers)))[0][0] == status
    assert (admin.broker.status, admin.broker.queues["q"].count) == (
        "QUIESCENT" if "quiesce" in line and status == 200 else "UP",
        0 if "flush" in line and status == 200 else 1)
    assert responses(admin(http("GET /metrics", host, *headers)))[0][0] == 200


def test_reports_come_in_pieces_however_the_client_wants_them(admin):
    for number in range(60):
        put_some(admin, "q%d" % number, b"x")
    for path in ("/stats.json", "/stats.txt", "/metrics", "/queues.json"):
        whole = ask(admin, "GET " + path)[2]
        old = admin("GET %s HTTP/1.0\r\n\r\n" % path, "old" + path)
        assert old.endswith("✂") and "chunked" not in old and "Connection: close" in old
        body = old.partition("\r\n\r\n")[2].rstrip("✂")
        assert len(body) == len(whole) or abs(len(body) - len(whole)) < 50
        assert "q59" in body
        head = admin(request("HEAD " + path))
        assert head.endswith("\r\n\r\n") and head.count("\r\n\r\n") == 1
        first, second = responses(admin(request("GET " + path) + request("GET /ping")))
        assert second[2] == "pong\n"


def test_an_http_flush_that_cannot_be_written_is_told_so(admin, disk):
    put_some(admin, "q", b"1")
    admin.heard()
    disk.failing = {"pwrite": errno.ENOSPC}
    session = admin.session()
    session.feed(request("POST /flush?queue=q").encode(), NOW)
    session.settle(commit(admin.broker, NOW)[1], set())
    (status, _, why), = responses(b"".join(session.take()).decode())
    assert status == 500 and "No space left" in why
    assert admin.broker.queues["q"].count == 1


def test_stats_json_has_kestrels_names(admin):
    session = put_some(admin, "q", b"123", b"45")
    put_some(admin, WEIRD, b"1")
    session.feed(b"get q\r\nget none\r\nget q/open\r\n", NOW + 3000)
    session.resume(NOW + 3000)
    commit(admin.broker, NOW)
    admin.now += 10000
    stats = json.loads(ask(admin, "GET /stats.json")[2])
    assert stats["labels"] == {"status": "UP", "version": "1.0.0"}
    counters, gauges = stats["counters"], stats["gauges"]
    assert [counters[name] for name in ("cmd_set", "cmd_get", "get_hits", "get_misses")] == [
        3, 3, 2, 1]
    assert [counters["q/q/" + name] for name in (
        "put_items", "put_bytes", "get_items_hit", "get_bytes", "transactions")] == [2, 5, 2, 5, 1]
    assert counters["q/none/get_items_miss"] == 1
    assert [gauges["q/q/" + name] for name in (
        "items", "bytes", "open_transactions", "age_msec")] == [0, 0, 1, 0]
    shown = WEIRD[:-2] + "/xff%"
    assert gauges["q/%s/items" % shown] == 1 and gauges["q/%s/head_age_msec" % shown] == 10000
    latency = stats["metrics"]["delivery_latency_msec"]
    assert latency["count"] == 2 and latency["average"] == 3000
    assert latency["minimum"] == latency["p50"] == latency["maximum"] == 3000
    told = ask(admin, "GET /stats.txt")[2]
    for line in ("counters:", "  cmd_set: 3", "  q/q/put_items: 2", "  status: UP"):
        assert line in told.split("\n")


def test_metrics_are_in_the_prometheus_text_format(admin):
    session = put_some(admin, "q", b"123", b"45")
    put_some(admin, WEIRD, b"1")
    session.feed(b"get q\r\n", NOW + 3)
    commit(admin.broker, NOW)
    admin.broker.metrics["turn_usec"].fresh.append(5)
    admin.broker.take_free_space(1 << 40)
    admin.broker.scrubbed = 3, 1, NOW
    admin.broker.note_failure(admin.broker.queues["q"], OSError(errno.EIO, "broken"), "written")
    told = ask(admin, "GET /metrics")[2]
    assert told.endswith("\n") and "\n\n" not in told
    helped, values, last = {}, {}, None
    for line in told.splitlines():
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert name not in helped            # one group of each
            helped[name] = last = name
        elif line.startswith("# TYPE "):
            assert line.split()[2] == last and line.split()[3] in ("gauge", "counter", "histogram")
        else:
            name, label, value = re.fullmatch(
                r'(\w+)(\{(?:,?\w+="(?:[^"\\\n]|\\[\\"n])*")+\})? (\S+)', line).groups()
            assert name.startswith(last)
            assert name == last or re.fullmatch("_(bucket|sum|count)", name[len(last):])
            values[name, label] = float(value)
    assert values["kestrel_queue_items", '{queue="q"}'] == 1
    assert values["kestrel_queue_put_items_total", '{queue="q"}'] == 2
    assert values["kestrel_queue_items", '{queue="a<b>\\"&\'\\\\/xff%"}'] == 1
    assert values["kestrel_queue_age_seconds", '{queue="q"}'] == 0.003
    assert values["kestrel_turn_seconds_count", None] == 1
    assert values["kestrel_spool_free_bytes", None] == 1 << 40
    assert (values["kestrel_scrub_files", None], values["kestrel_scrub_damaged_files", None]) == (3, 1)
    assert values["kestrel_scrub_timestamp_seconds", None] == NOW // 1000
    assert values["kestrel_journal_failed", '{queue="q"}'] == 1
    assert values["kestrel_status", '{status="up"}'] == 1
    assert values["kestrel_status", '{status="quiescent"}'] == 0
    assert values["kestrel_build_info", '{version="1.0.0",python="%s"}' % (
        ".".join(map(str, sys.version_info[:3])))] == 1
    assert values["kestrel_turn_seconds_sum", None] == 5e-6
    buckets = [value for (name, _), value in values.items()
               if name == "kestrel_turn_seconds_bucket"]
    assert buckets == sorted(buckets) and buckets[-1] == 1 and buckets[0] == 0


def test_long_reports_come_in_steps(admin):
    for number in range(250):
        admin.broker.queue("q%d" % number, NOW)
    session = admin.session()
    for path, least in (("stats.json", 10), ("stats.txt", 10), ("metrics", 10),
                        ("queues.json", 1)):
        said = list(turns_of(session, request("GET /" + path).encode()))
        assert len(said) > least and max(sum(map(len, one)) for one in said) < 100000
        assert "q249" in b"".join(itertools.chain(*said)).decode()


def test_reports_of_many_queues_come_to_their_end(admin):
    for number in range(1000):
        admin.broker.queue("q%d" % number, NOW)
    for path in ("stats.json", "stats.txt", "metrics", "queues.json"):
        said = b"".join(itertools.chain(*turns_of(admin.session(path),
                                                  request("GET /" + path).encode())))
        (status, _, body), = responses(said.decode())
        assert status == 200 and "q999" in body and body.endswith("\n"), path
        if path == "metrics":
            assert body.count('queue="q999"') == sum(bool(one.kind) for one in kestrel.QUEUE_STATS)


def test_what_the_page_asks_for(admin):
    session = put_some(admin, "q", b"1", b"2")
    put_some(admin, WEIRD, b"<script>\xff")
    session.feed(b"get q/open\r\n", NOW)
    list(admin.broker.sample(5))
    admin.broker.queues["q"].add_later(b"3", 1000, now=NOW)
    told = json.loads(ask(admin, "GET /queues.json")[2])
    assert (told["status"], told["items"], told["put_rate"]) == ("UP", 2, 0.6)
    rows = {row["name"]: row for row in told["queues"]}
    assert rows["q"]["items"] == 1 and rows["q"]["put_rate"] == 0.4
    assert rows["q"]["open_transactions"] == rows["q"]["delayed"] == 1
    key = rows[WEIRD[:-2] + "/xff%"]["key"]
    history = json.loads(ask(admin, "GET /history.json?queue=q&queue=none&queue=" + key)[2])
    assert history == {"q": [[1, 0.4, 0.2]], key: [[1, 0.2, 0]]}
    peeked = json.loads(ask(admin, "GET /peek?queue=" + key)[2])["item"]
    assert peeked == {"bytes": 9, "flags": 0, "age_msec": 0, "text": "<script>\\xff",
                      "deliveries": 0, "expires_msec": None, "base64": "PHNjcmlwdD7/"}
    assert json.loads(ask(admin, "GET /peek?queue=q")[2])["item"]["text"] == "2"
    assert admin.broker.queues["q"].count == 1


def test_queue_names_in_a_query(admin):
    for name in ("a+b", "größe", WEIRD):
        put_some(admin, name, name.encode("utf-8", "surrogateescape"))
    for query in ("a+b", "a%2Bb", "größe", "gr%C3%B6%C3%9Fe", urllib.parse.quote(os.fsencode(WEIRD))):
        assert ask(admin, "GET /peek?queue=" + query)[0] == 200
    status = responses(admin(b"\x16\x03\x01\x02\x00\x01"))[0][0]      # TLS says hello
    assert status == 400


def test_the_page_needs_nothing_from_elsewhere_and_runs_its_own_script_only(admin):
    status, headers, page = ask(admin, "GET /")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert set(re.findall(r"https?://[^\"]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in page and "insertAdjacent" not in page and "eval(" not in page
    script, = re.findall("<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode("latin-1")).digest()).decode()
    assert "script-src 'sha256-%s';" % digest in headers["Content-Security-Policy"]
    assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_large_items_are_shown_without_loading_all_of_them(tmp_path, monkeypatch):
    admin = Talk(tmp_path, "[queue]\nmax_memory_size = 4kb\n", session_type=kestrel.AdminSession)
    for number in range(20):
        put_some(admin, "q", bytes([65 + number]) * 600000)
        admin.broker.write()
    monkeypatch.setattr(kestrel, "_STEP_SIZE", 100000)
    loaded, most = [], []
    read = kestrel.Journal.loaded

    def count(journal, stub):
        item = read(journal, stub)
        loaded.append(weakref.ref(item, loaded.remove))
        most.append(len(loaded))
        return item

    class Item(kestrel.Item):
        __slots__ = ("__weakref__",)

    monkeypatch.setattr(kestrel, "Item", Item)
    monkeypatch.setattr(kestrel.Journal, "loaded", count)
    rows = json.loads(ask(admin, "GET /queue.json?queue=q")[2])["items"]
    assert [row["bytes"] for row in rows] == [600000] * 20
    assert [row["text"][0] for row in rows] == [chr(65 + number) for number in range(20)]
    assert ask(admin, "GET /item?queue=q&n=7")[2] == "H" * 600000
    assert most and max(most) <= 3, most


def test_connections_json(admin):
    waiting = kestrel.MemcacheSession(admin.broker, kestrel.Peer("memcache client a b", "h", True))
    admin.broker.admit(waiting)
    waiting.feed(b"get q/t=1000\r\n", NOW)
    waiting.resume(NOW)
    status, headers, told = ask(admin, "GET /connections.json")
    assert json.loads(told) == [{
        "id": 1, "address": "a b", "user": None, "protocol": "memcache", "state": "waiting",
        "seconds": 0, "open_reads": 0, "oldest_open_seconds": None, "waits_for": "q"}]
    admin.broker.settings.admin_commands = "none"
    assert ask(admin, "GET /connections.json")[0] == 403


def test_an_idle_admin_connection_is_closed(serve, monkeypatch):
    monkeypatch.setattr(kestrel.AdminSession, "idle_timeout", 30)
    port = free_port()
    server = serve("[server]\nadmin_port = %d\n" % port)
    client = server.client()
    with Client(port) as idle:
        idle.send("GET / HT")
        assert idle.line() == ""
    assert client.ask("version\r\n") == "VERSION 1.0.0\r\n"


def test_an_admin_port_that_is_taken(tmp_path, monkeypatch, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=r"cannot listen on 127.0.0.1:%d: Address already in use"
                           % port + (r" \(process %d, " % os.getpid()
                                     if os.path.exists("/proc/net/tcp") else "")):
            kestrel.Server(config_of(tmp_path, "[server]\nadmin_port = %d\n" % port,
                                     memcache_port="0"))
        monkeypatch.setitem(kestrel.SERVER_SETTINGS, "admin_port", (kestrel.ADMIN_PORT, str(port)))
        server = kestrel.Server(config_of(tmp_path, "# admin_port\n", memcache_port="0"))
        assert [listener.protocol for listener in server.listeners] == ["memcache"]
        assert "no admin port: cannot listen on 127.0.0.1:%d" % port in caplog.text
        server._stop()


def test_the_admin_port_asks_for_the_same_passwords(door):
    door = door("[queue work]\nget_users = ann\n", session_type=kestrel.AdminSession)
    put_some(door, "open", b"x")

    def ask(line, name=None, password="a secret", scheme="Basic"):
        token = base64.b64encode(("%s:%s" % (name, password)).encode()).decode()
        door.say(request(line, *["Authorization: %s %s" % (scheme, token)] * bool(name)))
        door.pump()
        response, = responses(door.heard())
        return response

    status, headers, _ = ask("GET /stats.json")
    assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="kestrel"')
    assert ask("GET /", "bob", scheme="Bearer")[0] == 401
    assert door.checked == [] and not door.timers      # nobody was wrong
    assert ask("POST /shutdown", "bob", "wrong")[0] == 401 and not door.broker.stopping
    door.rest()
    assert ask("GET /status", "bob")[0] == 200
    assert ask("GET /status")[0] == 401                # the next one on the connection
    for path in ("ping", "readable", "writable"):      # for load balancers
        assert ask("GET /" + path)[0] == 200
    assert ask("GET /metrics", "ann")[0] == 200
    assert ask("GET /peek?queue=open", "bob")[0] == 200
    kestrel.Broker.queue(door.broker, "work", NOW)
    for line in ("GET /peek?queue=work", "POST /flush?queue=work", "POST /delete?queue=work"):
        status, _, body = ask(line, "bob")
        assert (status, body) == (403, "bob is not among the get_users of work\n")
    assert ask("POST /delete?queue=work", "ann")[0] == 200
    door.say(request("GET /status", "Authorization: Basic %%%"))
    assert responses(door.heard())[0][0] == 401


def test_nothing_is_done_for_somebody_whose_password_is_still_to_be_checked(door):
    """Not for the one before on the same connection either, as behind a proxy, and though the
    session is released because the fsync is done that the answer before has waited for."""
    door = door(session_type=kestrel.AdminSession)
    put_some(door, "q", b"x")
    door.say(request("POST /flush?queue=q", "Authorization: Basic Ym9iOmEgc2VjcmV0"))
    door.pump()
    assert responses(door.heard())[0][0] == 200
    put_some(door, "q", b"y")
    door.say(request("POST /flush?queue=q", "Authorization: Basic Ym9iOndyb25n"))
    session = door.session()
    session.holds = 1
    session._release(door.broker.queues["q"], [], None)
    session.resume(NOW)
    assert door.heard() == "" and items_of(door.broker, "q") == [b"y"]
    door.pump()
    assert responses(door.heard())[0][0] == 401 and items_of(door.broker, "q") == [b"y"]


@pytest.mark.parametrize("path", ["/queue.json", "/peek"])
def test_a_queue_that_is_deleted_while_it_is_shown(admin, path):
    """The connection was cut off, with a traceback."""
    put_some(admin, "q", b"1", b"2")
    admin.session().feed(request("GET %s?queue=q" % path).encode(), NOW)
    admin.broker.delete(admin.broker.queues["q"], "a test")
    response, = responses(admin.heard())
    assert response[0] == 404


# == Server ===============================================================================


def test_timers():
    timers = kestrel.Timers()
    rung = []
    assert timers.wait(0) is None
    entries = [timers.at(when, lambda when=when: rung.append(when)) for when in (5, 3, 9, 3)]
    assert timers.wait(1) == 2
    timers.run(2.9)
    assert rung == []
    timers.cancel(entries[0])
    timers.cancel(entries[0])
    timers.run(8)
    assert rung == [3, 3]
    timers.run(100)
    assert rung == [3, 3, 9] and timers.wait(0) is None
    for _ in range(10000):
        timers.cancel(timers.at(1000, lambda: None))
    assert len(timers._heap) < 10


def test_put_and_get_over_a_socket(serve):
    client = serve().client()
    assert client.put("q", b"hello") == "STORED\r\n"
    assert client.get("q") == b"hello"
    assert client.get("q") is None


def test_text_clients_have_a_port_of_their_own(serve):
    server = serve("[server]\ntext_port = 0\n")
    with Client(server.server.listeners[1].address[1]) as text:
        text.send("get q 10000\n")
        assert server.client().put("q", b"one") == "STORED\r\n"
        assert text.line() == ":one\n"
        assert text.ask("version\n") == ":1.0.0\n"


def test_thrift_clients_have_a_port_of_their_own(serve):
    server = serve("[server]\nthrift_port = 0\n")
    with Client(server.server.listeners[1].address[1]) as client:
        sent = call(b"get_version")
        client.send(sent[:10])
        assert server.client().get("q") is None
        client.send(sent[10:])
        answer = reply(b"get_version", thrift_string(0, b"1.0.0"))
        assert client.file.read(len(answer)) == answer


def test_what_connections_say_can_be_logged(serve, caplog):
    caplog.set_level("INFO")
    server = serve("[server]\nenable_session_trace = true\n")
    with server.client() as client:
        port = client.sock.getsockname()[1]
        assert client.get("q") is None
    until(lambda: "closed" in caplog.text)
    assert [record.getMessage() for record in caplog.records
            if record.getMessage().startswith("memcache client")] == ["memcache client 127.0.0.1:%d: %s" % (port, what) for what in (
                "connected", "says b'get q\\r\\n'", "is told b'END\\r\\n'", "closed")]


def test_clients_of_a_unix_socket_are_in_no_network_that_is_traced(serve, short_path, caplog):
    caplog.set_level("INFO")
    server = serve("[server]\nlisten = 127.0.0.1, unix:%s\nenable_session_trace = 0.0.0.0/0\n" % (
        short_path / "sock"))
    for host in "127.0.0.1", "unix:%s" % (short_path / "sock"):
        with kestrel.Client(host, server.port) as client:
            assert client.get("q-" + host[:3]) is None
    until(lambda: not server.server.connections)
    assert "says b'get q-127" in caplog.text and "says b'get q-uni" not in caplog.text


def test_a_status_command_is_told_of_each_change(serve, tmp_path, caplog):
    script = tmp_path / "publish"
    script.write_text("#!/bin/sh\necho \"$*\" >> %s/told\n[ $2 != QUIESCENT ]\n" % tmp_path)
    script.chmod(0o755)
    told = tmp_path / "told"
    server = serve("[server]\nstatus_command = %s 'site one'\n" % script)
    client = server.client()
    for word in ("readonly", "quiescent", "up"):
        for each in ("up", "writeavoid") * 100 + (word,):
            assert client.ask("status %s\r\n" % each) == "END\r\n"
        until(lambda: told.exists() and told.read_text().endswith(
            "site one %s memcache=127.0.0.1:%d\n" % (word.upper(), server.port)))
    until(lambda: "status_command" in caplog.text)


def test_a_status_command_that_hangs_or_is_not_there(serve, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(kestrel, "_ANNOUNCE_SECONDS", 0.05)
    server = serve("[server]\nstatus_command = sh -c 'exec sleep 60'\n")
    assert server.client().put("q", b"1") == "STORED\r\n"
    until(lambda: "timed out" in caplog.text)
    server.stop()
    server = serve("[server]\nstatus_command = /no/such/program\n")
    until(lambda: "No such file" in caplog.text)
    assert server.client().get("q") == b"1"


def test_waiting_over_sockets(serve):
    server = serve()
    first, second, other = server.client(), server.client(), server.client()
    first.send("get q/t=20000\r\n")
    until(lambda: other.stats().get("queue_q_waiters") == "1")
    second.send("get q/t=20000\r\n")
    until(lambda: other.stats()["queue_q_waiters"] == "2")
    other.put("q", b"1")
    other.put("q", b"2")
    assert (first.item(), second.item()) == (b"1", b"2")


def test_a_timeout_is_kept_to(serve):
    client = serve().client()
    for wait in (30, 10, 60):                # also one that is sooner than the one before
        start = time.monotonic()
        assert client.get("q/t=%d" % wait) is None
        assert time.monotonic() - start >= wait / 1000 - 0.001


def test_a_short_wait_after_a_long_one_that_was_served(serve):
    server = serve()
    client, other = server.client(), server.client()
    client.send("get q/t=20000\r\n")
    until(lambda: other.stats().get("queue_q_waiters") == "1")
    other.put("q", b"x")
    assert client.item() == b"x"
    start = time.monotonic()
    assert client.get("q/t=30") is None
    assert time.monotonic() - start < 10


@promise(4)
def test_a_client_that_hangs_up_while_it_waits_costs_nothing(serve):
    server = serve()
    gone, half, other = server.client(), server.client(), server.client()
    gone.send("get q/t=20000\r\n")
    half.send("get q/t=20000\r\n")
    until(lambda: other.stats().get("queue_q_waiters") == "2")
    half.sock.shutdown(socket.SHUT_WR)
    assert half.line() == ""                 # closed, without an answer
    gone.close()
    until(lambda: other.stats()["queue_q_waiters"] == "0")
    other.put("q", b"x")
    assert other.get("q") == b"x"


@promise(4)
def test_hang_ups_of_a_turn_are_seen_before_its_items_are_handed_out(tmp_path):
    """A waiter hangs up and an item is put in the very same turn of the loop."""
    with turned_by_hand(tmp_path, "", 6) as (server, (putter, *waiters)):
        for client in waiters:
            client.send("get q/t=20000\r\n")
        while len(server.broker.queue("q").waiters) < len(waiters):
            server.turn()
        putter.send(b"set q 0 0 1\r\nx\r\n")
        for client in waiters[:-1]:
            client.close()
        poll = server.poller.poll            # the put is heard of first
        server.poller.poll = lambda timeout: sorted(
            poll(timeout), key=lambda event: event[0] in server.waiting)
        server.turn()
        assert waiters[-1].item() == b"x"


def test_what_a_reset_connection_still_had_to_say_takes_nothing(serve, monkeypatch):
    server = serve()
    client, other = server.client(), server.client()
    client.put("q", b"x")
    start, go = threading.Event(), threading.Event()
    read = kestrel.Broker._read_config
    monkeypatch.setattr(kestrel.Broker, "_read_config", lambda self, found: (
        start.set(), go.wait(20), read(self, found))[2])
    client.send("reload\r\n" + "get q\r\n" * 5)
    assert start.wait(20)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    until(lambda: other.stats()["curr_connections"] == "1")
    go.set()
    assert other.get("q") == b"x"


def test_open_reads_of_a_reset_connection_go_back(serve):
    server = serve()
    client, other = server.client(), server.client()
    for data in (b"a", b"b"):
        client.put("q", data)
    assert [client.get("q/open"), client.get("q/open")] == [b"a", b"b"]
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert [other.get("q/t=20000"), other.get("q/t=20000")] == [b"a", b"b"]


def test_an_answer_longer_than_the_socket_takes(serve):
    server = serve()
    client, other = server.client(), server.client()
    data = os.urandom(5 << 20)
    for _ in range(4):
        assert client.put("q", data) == "STORED\r\n"
    client.send("get q\r\n" * 4 + "version\r\n")
    assert other.put("r", b"x") == "STORED\r\n"        # meanwhile the others are served
    assert [client.item() for _ in range(4)] == [data] * 4
    assert client.line() == "VERSION 1.0.0\r\n"


def test_an_open_read_that_could_not_be_sent_goes_back(serve):
    server = serve()
    client, other = server.client(), server.client()
    client.put("q", os.urandom(20 << 20))
    client.send("get q/open\r\n")
    until(lambda: other.stats()["queue_q_open_transactions"] == "1")
    client.close()
    until(lambda: other.stats()["queue_q_items"] == "1")
    assert other.stats()["queue_q_open_transactions"] == "0"


def test_a_closed_session_is_heard_to_the_end(serve):
    client = serve().client()
    client.send("x" * 100000 + "\r\nversion\r\n" * 20000)
    assert client.line() == "CLIENT_ERROR line too long\r\n"
    assert client.line() == ""


def test_input_behind_a_wait_is_bounded(serve):
    server = serve()
    client, other = server.client(), server.client()
    client.sock.settimeout(0.05)
    client.send("get q/t=20000\r\n")
    with pytest.raises(OSError):             # the server reads no more, the socket fills
        for _ in range(1000):
            client.send("version\r\n" * 10000)
    assert int(other.stats()["bytes_read"]) < 1 << 20
    other.put("q", b"x")
    client.sock.settimeout(20)
    assert client.item() == b"x"
    assert client.line() == "VERSION 1.0.0\r\n"


def test_systems_without_epoll_are_served_too(serve, monkeypatch):
    monkeypatch.delattr(select, "epoll", raising=False)
    server = serve()
    getter, putter = server.client(), server.client()
    getter.send("get q/t=20000\r\n")
    until(lambda: server.server.waiting)
    data = b"x" * (8 << 20)                  # has to be waited for in both directions
    putter.put("q", data)
    assert getter.item() == data
    getter.send("version\r\n")
    getter.close()
    until(lambda: len(server.server.connections) == 1)


def test_a_client_that_hangs_up_before_its_fsync_does_not_make_the_loop_spin(serve, monkeypatch):
    held = HeldFsync(monkeypatch)
    server = serve("[queue]\nsync_journal = 0\n")
    client = server.client()
    held.armed = False
    client.put("q", b"1")                    # creates the queue, which takes another path
    held.armed = True
    client.send(set_("q", "2"))
    held.called.acquire()
    client.sock.shutdown(socket.SHUT_WR)
    connection, = server.server.connections.values()
    until(lambda: connection.session.at_end)
    turns = server.server.broker.metrics["turn_usec"]
    before = turns.count()
    time.sleep(0.05)
    assert turns.count() - before < 20
    held.go.release()
    assert client.line() == "STORED\r\n" and client.line() == ""


class Polls:
    """Poller.poll(), while a made-up clock goes on by `gap` until there is an event."""

    def __init__(self, clock):
        self.clock, self.gap, self.timeouts = clock, 0, []

    def __call__(self, timeout):
        self.timeouts.append(timeout)
        if timeout == 0:
            self.clock.now += 0.00001
            self.gap -= 0.00001
            return self.events if self.gap <= 0 else []
        self.clock.now += self.gap
        return self.events


@pytest.mark.parametrize("cores, busy_poll, polls", [(2, "100us", True), (1, "100us", False),
                                                     (2, "0", False)])
def test_the_server_does_not_sleep_while_waits_are_short(
        tmp_path, monkeypatch, cores, busy_poll, polls):
    clock = types.SimpleNamespace(monotonic=lambda: clock.now, time_ns=time.time_ns, now=100.0,
                                  sleep=time.sleep)
    monkeypatch.setattr(kestrel, "_cores", lambda: cores)
    server = kestrel.Server(config_of(
        tmp_path, "[server]\nbusy_poll = %s\n" % busy_poll, memcache_port="0"))
    monkeypatch.setattr(kestrel, "time", clock)
    poller = server.poller
    real, poller.poll = poller.poll, Polls(clock)

    def wait(gap, count=1):
        """Wait for events that come in so many microseconds: does it sleep, or poll?"""
        poller.poll.gap, poller.poll.events = gap / 1e6, ["event"] * count
        poller.poll.timeouts.clear()
        assert poller.wait(None) == poller.poll.events
        return {"poll" if timeout == 0 else "sleep" for timeout in poller.poll.timeouts}

    for _ in range(4):
        assert wait(50) == {"sleep"}
    assert wait(50) == ({"poll"} if polls else {"sleep"})
    assert wait(50) == ({"poll"} if polls else {"sleep"})
    assert wait(300) == ({"poll", "sleep"} if polls else {"sleep"})      # too long: it has slept
    for _ in range(4):
        assert wait(50) == {"sleep"}
    assert wait(50, 2) == ({"poll"} if polls else {"sleep"})
    for _ in range(4):                       # there are several: while it sleeps, more come
        assert wait(50, 2) == {"sleep"}
    assert wait(50) == {"sleep"}
    poller.poll = real
    server._stop()


def test_a_turn_sees_to_some_connections_and_the_next_to_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(kestrel, "_FEED_SECONDS", 0)
    monkeypatch.setattr(kestrel, "_EVENTS_STEP", 3)
    with turned_by_hand(tmp_path, "", 10) as (server, clients):
        for client in clients:
            client.send("set q 0 0 1\r\nx\r\n")
        # The worker may have something to tell as well.
        until(lambda: set(server.connections.values()) <= {one for one, _ in server.poller.poll(0)})
        queue, done = server.broker.queue("q"), [0]
        while queue.count < 10:
            server.turn()
            done.append(queue.count)
            assert 0 < done[-1] - done[-2] <= 3
        assert {client.line() for client in clients} == {"STORED\r\n"}


def test_large_files_are_let_go_of_by_another_thread(serve, monkeypatch):
    """To free them takes long."""
    monkeypatch.setattr(kestrel, "_STEP_SIZE", 1000)
    server = serve("[queue]\ndefault_journal_size = 1kb\n")
    client = server.client()
    closed = []

    def close_all(fds):
        closed.append((threading.current_thread().name, [os.fstat(fd).st_nlink for fd in fds]))
        for fd in fds:
            os.close(fd)

    monkeypatch.setattr(kestrel, "_close_all", close_all)
    client.put("q", b"x" * 2000)
    client.get("q")
    until(lambda: len(closed) == 1)
    until(lambda: len(os.listdir(server.server.broker.spool)) == 1)
    client.put("q", b"x" * 2000)
    client.ask("delete q\r\n")
    until(lambda: len(closed) == 2)
    assert closed == [("worker", [0]), ("worker", [0])]


def test_not_all_queues_are_fsynced_at_once(serve, monkeypatch):
    monkeypatch.setattr(kestrel, "_SYNCS", 3)
    server = serve("[queue]\nsync_journal = 0\n")
    held = HeldFsync(monkeypatch)
    clients = [server.client() for _ in range(10)]
    for number, client in enumerate(clients):
        client.send("set q%d 0 0 1\r\nx\r\n" % number)
    until(lambda: len(server.server.syncs.wanted) == 7)
    nothing_comes(clients[0])                # all of it was in one turn, or in some
    assert len(server.server.syncs._running) == 3 and len(server.server.syncs.wanted) == 7
    held.disarm()
    assert {client.line() for client in clients} == {"STORED\r\n"}


def test_what_waits_for_an_fsync_gets_it_though_a_reload_turns_them_off(serve, monkeypatch):
    """A large item had been written by the worker, and sync_journal was `never` before the fsync
    was planned: there was none, and the client waited for good."""
    monkeypatch.setattr(kestrel, "_LARGE", 100)
    client = serve("[queue]\nsync_journal = 0\n").client()
    client.put("q", b"x")
    wrote = kestrel.Queue._wrote

    def wrote_and_reloaded(queue, *result):
        wrote(queue, *result)
        queue.configure(kestrel.QueueConfig(sync_journal=None))

    monkeypatch.setattr(kestrel.Queue, "_wrote", wrote_and_reloaded)
    assert client.put("q", b"y" * 200) == "STORED\r\n"


def test_client_timeout_goes_on_after_an_answer_that_was_held(tmp_path, skip):
    """It was over while the answer waited for an fsync."""
    with turned_by_hand(tmp_path, "[server]\nclient_timeout = 60s\n[queue]\nsync_journal = 0\n",
                        1) as (server, (client,)):
        session, = [connection.session for connection in server.connections.values()]
        for state in "ready", "held":        # the first set creates the queue
            client.send(set_("q", "x"))
            while session.state != "held":
                server.turn()
            while session.state != state:
                server.turn()
        assert client.line() == "STORED\r\n"
        skip(61)
        while session.state == "held":
            server.turn()
        assert client.line() == "STORED\r\n" and len(server.connections) == 1
        skip(61)
        server.interrupt()                   # so that no turn waits
        server.turn()
        assert client.line() == ""


def test_a_session_forgets_the_reads_that_it_has_closed(tmp_path):
    with turned_by_hand(tmp_path, "", 1) as (server, (client,)):
        session, = [connection.session for connection in server.connections.values()]
        for command in (set_("q", "x"), "get q/open\r\n", "get q/close/open\r\n"):
            client.send(command)
            server.turn()
        assert client.line() == "STORED\r\n" and client.item() == b"x" and client.item() is None
        assert not (session.ended or session.open_reads or session.touched or session.out)


def test_client_timeout_starts_with_the_answer(tmp_path, skip):
    def turns(seconds):
        skip(seconds)
        for _ in range(2):
            server.interrupt()               # so that no turn waits
            server.turn()

    with turned_by_hand(tmp_path, "[server]\nclient_timeout = 60s\n", 1) as (server, (client,)):
        client.send("get q/t=600000\r\n")
        turns(1)
        turns(150)
        with Client(server.port) as other:
            turns(1)
            other.send("set q 0 0 1\r\nx\r\n")
            turns(1)
        assert client.item() == b"x"
        turns(54)
        client.send("version\r\n")
        turns(1)
        assert client.line() == "VERSION 1.0.0\r\n"
        turns(54)
        assert len(server.connections) == 1
        turns(7)
        assert client.line() == ""


def commands_of(session_type):
    return sorted(name for name in dir(session_type) if name.startswith("do_"))


def thrift_call_of(method):
    return call(method.encode(), *[
        {11: thrift_string, 8: thrift_i32, 15: thrift_strings, 14: thrift_ids}[kind](
            number, {11: b"q", 8: 1}.get(kind, []))
        for number, (kind, _, _) in enumerate(kestrel._THRIFT_METHODS[method], 1)])


# protocol -> (the method that raises, what calls it) of every command; what is sent creates and
# names a queue that is there already.
EVERY_COMMAND = {
    "memcache": [
        *[(name, name[3:].encode() + b" q\r\n") for name in commands_of(kestrel.MemcacheSession)],
        ("store", b"set q 0 0 1\r\nx\r\n"), ("store_in_steps", b"set new 0 0 1\r\nx\r\n"),
        ("get_in_steps", b"get new\r\n"), ("_next", b"get a b\r\n")],
    "text": [*[(name, name[3:].encode() + b" q 1\n") for name in commands_of(kestrel.TextSession)],
             ("_put_items", b"put q:\nx\n\n")],
    "thrift": [(name, thrift_call_of(name[3:])) for name in commands_of(kestrel.ThriftSession)],
    "admin": [(path, request("%s %s?queue=q" % (method, path)).encode())
              for path, (method, _) in sorted(kestrel._ADMIN_PATHS.items())],
}


@pytest.mark.parametrize("protocol", EVERY_COMMAND)
@pytest.mark.parametrize("after_a_wait", [False, True])
def test_an_unexpected_exception_costs_one_client(
        serve, monkeypatch, caplog, protocol, after_a_wait):
    server = serve("[server]\ntext_port = 0\nthrift_port = 0\nadmin_port = %d\n" % free_port())
    port, = [one.address[1] for one in server.server.listeners if one.protocol == protocol]
    other = server.client()
    assert other.put("q", b"x") == "STORED\r\n"

    def broken(self, *arguments):
        if after_a_wait:
            return broken_later()
        raise ZeroDivisionError("on purpose")

    def broken_later():
        yield
        raise ZeroDivisionError("on purpose")

    for name, sent in EVERY_COMMAND[protocol]:
        caplog.clear()
        server.server.broker.known_lines.clear()               # they name methods
        with monkeypatch.context() as patch, Client(port) as client:
            if protocol == "admin":
                patch.setitem(kestrel._ADMIN_PATHS, name, (kestrel._ADMIN_PATHS[name][0], broken))
            else:
                patch.setattr(kestrel._PROTOCOLS[protocol], name, broken)
            client.sock.settimeout(5)
            client.send(sent)
            assert client.file.read() == b"", name
        assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [
            ZeroDivisionError], name
        assert "%s client" % protocol in caplog.text and "unexpected, closed" in caplog.text
        assert other.ask("version\r\n") == "VERSION 1.0.0\r\n"


@promise(5)
def test_a_turn_reports_on_so_many_queues(tmp_path, monkeypatch):
    monkeypatch.setattr(kestrel, "_WORK_SECONDS", 0)
    with turned_by_hand(tmp_path, "", 20) as (server, clients):
        broker = server.broker
        for number in range(200):
            broker.queue("q%d" % number)
        broker.write()
        counted, stats = [], broker.queue_stats
        broker.queue_stats = lambda queue, now: counted.append(0) or stats(queue, now)
        for client in clients[:-1]:
            client.send("stats\r\n")
        pinged = turns = 0
        while sum(connection.session.state == "ready" and not connection.unsent
                  for connection in server.connections.values()) < 20 or not pinged:
            clients[-1].send("version\r\n")
            del counted[:]
            server.turn()
            pinged += clients[-1].line() == "VERSION 1.0.0\r\n"
            turns += 1
            assert len(counted) <= kestrel.QUEUES_STEP
            for client in clients[:-1]:
                client.sock.settimeout(0)
                with contextlib.suppress(BlockingIOError):
                    client.sock.recv(1 << 20)
        assert pinged == turns > 100


def test_a_small_command_does_not_wait_for_the_tasks_of_many(tmp_path):
    """Not even when the routes have to be looked up again, since queues come and go."""
    with turned_by_hand(tmp_path, "", 150) as (server, clients):
        clients[0].send(set_("q", "1") + "get q r\r\n")
        while len(server.broker.queues) < 2:
            server.turn()
        for number, client in enumerate(clients[1:]):
            client.send("".join("get c%d\r\nset c%d 0 0 1\r\nx\r\ndelete c%d\r\n" % (
                number, number, number) for _ in range(9)))
        while len(server.broker.tasks) < 100:
            server.turn()
        hits = server.broker.queues["q"].counters
        for number in range(10):
            server.broker._forget_routes()
            before = hits.get_hits
            for command in (set_("q", "1"), "get q r\r\n"):
                clients[0].send(command)
                server.turn()
                server.turn()
            assert hits.get_hits == before + 1 and server.broker.tasks


def test_a_status_that_changes_often_is_saved_and_told_once_a_turn(tmp_path, monkeypatch):
    saved = []
    replace = os.replace
    monkeypatch.setattr(kestrel.os, "replace", lambda *paths: saved.append(paths) or replace(*paths))
    with turned_by_hand(tmp_path, "[server]\nstatus_file = %s\n" % (tmp_path / "status"), 1) as (
            server, (client,)):
        client.send("status readonly\r\nstatus up\r\nstatus writeavoid\r\n" * 100)
        while server.broker.status != "WRITEAVOID":
            server.turn()
        assert [client.line() for _ in range(300)] == ["END\r\n"] * 300
        assert len(saved) <= 2 and (tmp_path / "status").read_text() == "WRITEAVOID\n"


@promise(5)
def test_a_greedy_client_that_has_made_no_call_costs_nobody_else(serve, caplog):
    server = serve("[server]\nmax_memory = 8mb\nthrift_port = 0\ntext_port = 0\n")
    ports = {one.protocol: one.address[1] for one in server.server.listeners}
    thrift, text, client = Client(ports["thrift"]), Client(ports["text"]), server.client()
    thrift.send(struct.pack(">i", 7000000) + b"x" * 4300000)
    until(lambda: server.server.buffered > 4200000)
    for number in range(1000):               # items of a put that is not complete count, too
        text.send(b"put q:\n" * (number == 0) + b"x" * 8000 + b"\n")
    assert thrift.file.read() == b""
    assert "out of memory" in caplog.text and "Traceback" not in caplog.text
    assert client.put("q", b"x" * 300000) == "STORED\r\n"
    until(lambda: server.server.buffered >= 8000000)
    text.close()
    until(lambda: server.server.buffered == 0)


def test_input_that_is_kept_counts_as_memory(serve, caplog):
    """The greediest client is refused; the others have their items stored."""
    server = serve("[server]\nmax_memory = 8mb\n")
    clients = [server.client() for _ in range(6)]
    for number, client in enumerate(clients):
        client.send(b"set q%d 0 0 %d\r\n" % (number, 3000000 if number == 2 else 800000)
                    + b"x" * (2900000 if number == 2 else 700000))
    until(lambda: server.server.buffered > 6300000)
    other = server.client()
    other.send(b"set other 0 0 3000000\r\n" + b"x" * 2200000)
    assert clients[2].line() == "SERVER_ERROR out of memory\r\n"
    assert clients[2].line() == ""
    assert server.server.buffered < 9 << 20
    for number in (0, 1):
        clients[number].send(b"x" * 100000 + b"\r\n")
        assert clients[number].line() == "STORED\r\n"
    for client in [other, *clients]:
        client.close()
    until(lambda: server.server.buffered == 0)


@promise(5)
def test_answers_that_nobody_reads_count_as_memory(serve, caplog):
    server = serve("[server]\nmax_memory = 30mb\nthrift_port = 0\nsend_timeout = never\n")
    client = server.client()
    client.put("q", b"x" * (5 << 20))
    port = server.server.listeners[1].address[1]
    greedy = [Client(port) for _ in range(12)]
    for one in greedy:
        one.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.send(call(b"peek", thrift_string(1, b"q")))
    until(lambda: "out of memory" in caplog.text)
    until(lambda: client.stats() and all(       # the kernel takes no more for these
        one.last_active < server.server.mono - 0.05 or not one.unsent
        for one in list(server.server.connections.values())))
    assert client.get("q") == b"x" * (5 << 20)
    assert server.server.buffered < 31 << 20
    for one in greedy:
        one.close()
    until(lambda: server.server.buffered == 0)


@promise(5)
@pytest.mark.parametrize("protocol, half", [
    ("memcache", b"set q 0 0 10\r\nabc"), ("memcache", b"get q"), ("memcache", b"set q 0 0 10\r\n"),
    ("memcache", b"set q 0 0 999999999\r\nabc"), ("text", b"put q:\nabc\n"), ("text", b"put"),
    ("thrift", b"\0\0\0\x50abc"), ("admin", b"GET / HT")])
def test_half_a_command_is_given_up_after_send_timeout(tmp_path, skip, protocol, half):
    server = kestrel.Server(config_of(
        tmp_path, "[server]\nsend_timeout = 60s\ntext_port = 0\nthrift_port = 0\n"
        "admin_port = %d\n" % free_port(), memcache_port="0"))
    port, = [one.address[1] for one in server.listeners if one.protocol == protocol]

    def turns(seconds):
        skip(seconds)
        for _ in range(3):
            server.interrupt()
            server.turn()

    with Client(port) as client:
        for byte in half:
            client.send(bytes([byte]))
            turns(50)                        # as long as something comes it may go on
            assert len(server.connections) == 1
        turns(50)
        assert len(server.connections) == 1
        turns(11)
        assert not server.connections
        client.file.read()
    stop(server)


@pytest.mark.parametrize("command, said", [
    ("flush_all\r\n", "Flushed all queues.\r\n"), ("flush q\r\n", "END\r\n")])
def test_what_rests_on_the_work_of_another_waits_for_it(serve, monkeypatch, command, said):
    server = serve("[queue]\nsync_journal = 0\n")
    client, other = server.client(), server.client()
    client.put("q", b"x")
    held = HeldFsync(monkeypatch)
    held.hold(client, "flush q\r\n")
    other.send(command)
    nothing_comes(other)
    held.error = errno.EIO
    held.go.release()
    assert client.line().startswith("SERVER_ERROR")
    held.error = None
    held.disarm()
    assert other.line().startswith("SERVER_ERROR")
    until(lambda: client.ask(command) == said)
    assert client.get("q") is None


def test_a_flush_of_an_empty_queue_whose_files_are_doubtful_is_refused(tmp_path, disk):
    talk = Talk(tmp_path, "[queue]\nsync_journal = never\n")
    talk.broker.later = lambda delay, call: lambda: None
    talk(set_("q", "1") + "get q\r\n")
    disk.failing = {"pwrite": errno.EIO, "ftruncate": errno.EIO}
    talk.session().feed(set_("q", "2").encode(), NOW)
    commit(talk.broker, NOW)
    assert talk.broker.queues["q"].journal.torn and not talk.broker.queues["q"].count
    for command in (b"flush q\r\n", b"flush_all\r\n"):
        session = talk.session(command)
        session.feed(command, NOW)
        session.resume(NOW)
        session.settle(commit(talk.broker, NOW)[1], set())
        assert b"".join(session.take()).startswith(b"SERVER_ERROR q: ")


def test_an_item_that_is_delivered_while_it_is_written_is_answered_when_it_is_safe(
        serve, monkeypatch):
    """The waiter is served by the commit itself: an expired item moves when its source is safe."""
    server = serve("[queue src]\nexpire_to_queue = dead\n[queue dead]\nsync_journal = 0\n")
    client, waiter = server.client(), server.client()
    client.send("get dead\r\nget src\r\nset src 0 -1 1\r\nx\r\n")
    assert [client.line() for _ in range(3)] == ["END\r\n", "END\r\n", "STORED\r\n"]
    waiter.send("get dead/t=20000\r\n")
    until(lambda: server.server.broker.queues["dead"].waiters)
    held = HeldFsync(monkeypatch)
    held.hold(client, "get src\r\n")
    nothing_comes(waiter)
    held.disarm()
    assert waiter.item() == b"x"


def test_an_item_that_is_undone_in_the_turn_of_its_delivery_is_not_given(serve, disk, monkeypatch):
    monkeypatch.setattr(kestrel, "RETRY_MS", 50)
    server = serve("[queue]\nsync_journal = never\n[queue src]\nexpire_to_queue = dead\n")
    client, waiter = server.client(), server.client()
    client.send("get dead\r\nget src\r\nset src 0 -1 1\r\nx\r\n")
    assert [client.line() for _ in range(3)] == ["END\r\n", "END\r\n", "STORED\r\n"]
    waiter.send("get dead/t=20000\r\n")
    dead = server.server.broker.queues["dead"]
    until(lambda: dead.waiters)

    def fail():
        del dead.write
        disk.failing = {"pwrite": errno.ENOSPC}
        try:
            dead.write()
        finally:
            disk.failing = {}

    dead.write = fail
    assert client.get("src") is None
    assert waiter.line() == "SERVER_ERROR dead: No space left on device\r\n"
    until(lambda: client.get("src") is None and client.get("dead") == b"x")       # it is moved again


@pytest.fixture
def fails_later(monkeypatch):
    """Makes the next fsync wait for `go`, and fail. called: a semaphore."""
    here = types.SimpleNamespace(armed=False, called=threading.Semaphore(0), go=threading.Event())
    real = os.fsync

    def fsync(fd):
        if here.armed:
            here.armed = False
            here.called.release()
            here.go.wait(20)
            raise OSError(errno.EIO, "the disk fails")
        real(fd)

    monkeypatch.setattr(kestrel.os, "fsync", fsync)
    return here


def leave(server, client, left):
    """Reset a connection; wait until the server has `left` others."""
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.file.close()
    client.sock.close()
    until(lambda: len(server.server.broker.clients) == left)


@promise(2)
def test_a_client_that_leaves_harms_nobody_who_waits_for_the_same_fsync(serve, fails_later):
    """What it had been told was gone when the fsync failed: others were never answered."""
    server = serve("[queue]\nsync_journal = 0\n")
    client, other = server.client(), server.client()
    assert other.put("q", b"0") == "STORED\r\n"
    fails_later.armed = True
    client.send("version\r\n" + set_("q", "1"))
    assert fails_later.called.acquire(timeout=20)
    other.send(set_("q", "2"))
    until(lambda: any(session.holds for session in server.server.broker.clients
                      if session.peer.name.endswith(":%d" % other.sock.getsockname()[1])))
    leave(server, client, 1)
    fails_later.go.set()
    assert other.line().startswith("SERVER_ERROR")
    assert other.put("q", b"3") == "STORED\r\n"
    assert [other.get("q") for _ in range(3)] == [b"0", b"3", None]


@promise(5)
@pytest.mark.parametrize("how", ["close", "abort"])
def test_a_read_whose_close_is_undone_when_its_client_has_left_goes_back(serve, fails_later, how):
    """It stayed open, and nobody could close it."""
    server = serve("[queue]\nsync_journal = 0\n")
    client, other = server.client(), server.client()
    assert other.put("q", b"a") == "STORED\r\n" and client.get("q/open") == b"a"
    fails_later.armed = True
    client.send("get q/%s\r\n" % how)
    assert fails_later.called.acquire(timeout=20)
    leave(server, client, 1)
    fails_later.go.set()
    until(lambda: data_of(server.server.broker.queues["q"].items) == [b"a"])
    assert not server.server.broker.queues["q"].opens


@pytest.mark.parametrize("key", ["q/close/open/timeout=60000/t=20000", "q/close r/close",
                                 "q/abort r/open", "q/close/n=2", "q/abort/tail"])
def test_a_close_that_is_undone_is_refused_whatever_the_options(serve, disk, key):
    """It was answered as done; the next close was then of the wrong item."""
    server = serve("[queue]\nsync_journal = never\n")
    client = server.client()
    assert client.put("q", b"a") == client.put("r", b"r") == "STORED\r\n"
    assert client.get("q/open") == b"a"
    disk.failing, disk.once = {"pwrite": errno.ENOSPC}, True
    assert client.ask("get %s\r\n" % key) == "SERVER_ERROR q: No space left on device\r\n"
    assert data_of(server.server.broker.queues["q"].opens.values()) == [b"a"]
    assert client.get("q/close") is None and not server.server.broker.queues["q"].opens


@pytest.mark.parametrize("key", ["full", "all"])
def test_a_put_with_sync_is_answered_though_nothing_is_left_to_be_written(serve, key):
    """A full queue, or more queues than are written in one turn: it waited for ever."""
    names = ["q%d" % number for number in range(60)]
    server = serve("[queue]\nsync_journal = never\n[queue full]\nmax_items = 1\n"
                   "[alias all]\ndestination_queues = %s\n" % ", ".join(names))
    client = server.client()
    assert client.put(key, b"a") == "STORED\r\n"
    assert client.ask(set_(key + "/sync", "b")) == (
        "NOT_STORED\r\n" if key == "full" else "STORED\r\n")


def test_timers_run_though_there_is_always_more_to_do(tmp_path, monkeypatch, skip):
    monkeypatch.setattr(kestrel, "_FEED_SECONDS", 0)
    monkeypatch.setattr(kestrel, "_EVENTS_STEP", 1)
    with turned_by_hand(tmp_path, "", 12) as (server, clients):
        clients[0].send("get q/t=50\r\n")
        for _ in range(50):
            for client in clients[1:]:
                client.send("version\r\n")
            server.turn()
            skip(0.002)
        clients[0].sock.settimeout(1)
        assert clients[0].item() is None


def test_a_server_that_cannot_start_lets_go_of_the_spool(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        text = "[server]\nadmin_port = %d\n" % taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            kestrel.Server(config_of(tmp_path, text, memcache_port="0"))
    with monkeypatch.context() as patch:
        patch.setattr(kestrel, "Broker", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            kestrel.Server(config_of(tmp_path, memcache_port="0"))
    server = kestrel.Server(config_of(tmp_path, memcache_port="0"))
    stop(server)


def test_silent_connections_are_probed(serve, short_path):
    server = serve("[server]\nlisten = 127.0.0.1 unix:%s\n" % (short_path / "sock"))
    with server.client() as client, UnixClient(short_path / "sock") as local:
        assert client.get("q") is None and local.get("q") is None
        for one in list(server.server.connections.values()):
            if one.sock.family == socket.AF_INET:
                assert one.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert one.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 120
                assert one.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_address_that_this_machine_does_not_have_is_left_out(tmp_path, caplog):
    server = kestrel.Server(config_of(
        tmp_path, "[server]\nlisten = 192.0.2.1, 127.0.0.1\n", memcache_port="0"))
    assert "cannot listen on 192.0.2.1:0" in caplog.text
    port = server.port
    stop(server)
    with pytest.raises(OSError, match="cannot listen on 192.0.2.1"):
        kestrel.Server(config_of(tmp_path, "[server]\nlisten = 192.0.2.1\n", memcache_port="0"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            kestrel.Server(config_of(tmp_path, "[server]\nlisten = 127.0.0.2, 127.0.0.1\n",
                                     memcache_port=str(port)))


def test_very_long_times(serve):
    server = serve("[server]\nclient_timeout = 365d\nexpiration_timer_frequency = 100d\n"
                   "[queue]\nsync_journal = 30d\nopen_transaction_timeout = 99d\n")
    client, other = server.client(), server.client()
    client.put("q", b"x")
    assert client.get("q/open") == b"x"
    other.send("get r/t=99999999999999\r\n")
    until(lambda: client.stats().get("queue_r_waiters") == "1")
    client.put("r", b"y")
    assert other.item() == b"y"


def test_sweeps_run_by_themselves(serve):
    server = serve("[server]\nexpiration_timer_frequency = 10ms\n"
                   "[queue q]\nmax_age = 1ms\nexpire_to_queue = dead\n")
    client = server.client()
    client.put("q", b"x")
    assert client.get("dead/t=20000") == b"x"
    until(lambda: client.stats()["queue_q_open_transactions"] == "0")


def test_open_transaction_timeout_over_a_socket(serve):
    server = serve("[queue]\nopen_transaction_timeout = 50ms\n")
    client, other = server.client(), server.client()
    for data in (b"1", b"2", b"3"):
        client.put("q", data)
    assert [client.get("q/open") for _ in range(3)] == [b"1", b"2", b"3"]
    assert [other.get("q/t=20000") for _ in range(3)] == [b"1", b"2", b"3"]
    assert client.get("q/close") is None
    stats = client.stats()
    assert (stats["queue_q_items"], stats["queue_q_open_transactions"]) == ("0", "0")


@promise(1)
def test_with_sync_journal_0_answers_wait_for_the_fsync_and_share_it(serve, monkeypatch):
    held = HeldFsync(monkeypatch)
    server = serve("[queue]\nsync_journal = never\n[queue safe]\nsync_journal = 0\n")
    clients = [server.client() for _ in range(20)]
    other = server.client()
    held.hold(clients[0], "set safe 0 0 1\r\nx\r\nversion\r\n")
    for client in clients[1:]:
        client.send("set safe 0 0 1\r\nx\r\n")
    until(lambda: other.stats()["queue_safe_items"] == "20")
    assert other.put("fast", b"x") == "STORED\r\n"       # nobody else waits
    assert other.get("fast") == b"x"
    nothing_comes(clients[0])
    nothing_comes(clients[1])
    held.disarm()
    assert [client.line() for client in clients] == ["STORED\r\n"] * 20
    assert clients[0].line() == "VERSION 1.0.0\r\n"
    assert held.threads == {"worker"}
    assert held.count <= 3                               # the directory's is one of them


@promise(1)
def test_with_sync_journal_0_a_new_name_is_fsynced_too(serve, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(kestrel.os, "fsync",
                        lambda fd: synced.append(os.readlink("/proc/self/fd/%d" % fd)) or real(fd))
    server = serve("[queue]\nsync_journal = 0\n")
    client = server.client()
    spool = server.server.broker.spool
    client.put("q", b"1")
    assert synced == [spool + "/q", spool]
    client.put("q", b"2")
    assert synced[2:] == [spool + "/q"]


@promise(1)
def test_a_plain_get_waits_for_the_fsync_of_its_record(serve, monkeypatch):
    server = serve("[queue]\nsync_journal = 0\n")
    client, waiting = server.client(), server.client()
    client.put("q", b"1")
    waiting.send("get r/t=20000\r\n")
    until(lambda: client.stats().get("queue_r_waiters") == "1")
    held = HeldFsync(monkeypatch)
    held.hold(client, "get q\r\nset r 0 0 1\r\n2\r\n")
    nothing_comes(client)
    held.disarm()
    assert client.item() == b"1"
    assert client.line() == "STORED\r\n"
    assert waiting.item() == b"2"


@promise(2)
def test_a_failed_fsync_is_told_and_service_resumes(serve, monkeypatch, tmp_path):
    server = serve("[queue]\nsync_journal = 0\n")
    client, other = server.client(), server.client()
    assert client.put("q", b"1") == "STORED\r\n"
    held = HeldFsync(monkeypatch)
    held.error = errno.EIO
    held.hold(client, "set q 0 0 1\r\n2\r\nget q/open\r\n")
    other.send("set q 0 0 1\r\n3\r\n")
    until(lambda: server.server.broker.stats.cmd_set >= 3)
    held.go.release()
    assert client.line().startswith("SERVER_ERROR ")
    assert client.line().startswith("SERVER_ERROR ")
    assert other.line().startswith("SERVER_ERROR ")
    assert contents_of(tmp_path / "spool")[:1] == [b"1"]
    held.error = None
    held.disarm()
    until(lambda: client.put("q", b"4") == "STORED\r\n")
    assert [client.get("q/open"), client.get("q/close/open")] == [b"1", b"4"]
    assert contents_of(tmp_path / "spool") == [b"4"]


def test_a_failed_fsync_of_acknowledged_records_writes_them_anew(
        serve, disk, tmp_path, monkeypatch):
    monkeypatch.setattr(kestrel, "RETRY_MS", 20)
    server = serve("[queue]\nsync_journal = 1ms\n")
    client = server.client()
    disk.failing = {"fsync": errno.EIO}
    assert client.put("q", b"1") == "STORED\r\n"
    inode = os.stat(str(tmp_path / "spool" / "q")).st_ino
    until(lambda: client.put("q", b"x").startswith("SERVER_ERROR"))
    assert client.get("q/peek") == b"1"                  # readers go on where they can
    disk.failing = {}
    until(lambda: client.put("q", b"2") == "STORED\r\n")
    path = tmp_path / "spool" / "q"
    until(lambda: path.exists() and path.stat().st_ino != inode)
    assert contents_of(tmp_path / "spool")[:1] == [b"1"]


@promise(2)
def test_a_full_disk_costs_nothing_that_was_acknowledged(serve, disk, tmp_path, caplog, skip):
    caplog.set_level("INFO")
    server = serve("[queue]\nsync_journal = never\n")
    client, other = server.client(), server.client()
    client.put("q", b"1")
    client.put("q", b"2")
    assert client.get("q/open") == b"1"
    disk.failing = {"pwrite": errno.ENOSPC}
    for _ in range(50):
        assert client.put("q", b"3") == "SERVER_ERROR q: No space left on device\r\n"
    client.send("get q/close\r\nget r/t=30\r\nget q/peek\r\n")
    assert client.line().startswith("SERVER_ERROR")      # still open
    assert client.item() is None
    assert client.item() == b"2"
    assert other.ask("get q\r\n").startswith("SERVER_ERROR")
    client.send("set q 0 0 1 noreply\r\nx\r\nversion\r\n")
    assert client.line() == "VERSION 1.0.0\r\n"
    assert len([one for one in caplog.records if one.levelname == "ERROR"]) == 1
    disk.failing = {}
    assert client.put("q", b"4") == "STORED\r\n"
    assert client.get("q/close") is None
    assert [other.get("q"), other.get("q"), other.get("q")] == [b"2", b"4", None]
    until(lambda: skip(1, server.server) or "can be written again" in caplog.text)
    assert contents_of(tmp_path / "spool") == []


def get_page(port, path):
    """Return the status and the text of an answer of the admin port."""
    try:
        with urllib.request.urlopen("http://127.0.0.1:%d%s" % (port, path)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_failing_disk_is_seen(serve, disk, caplog, skip):
    """By load balancers, metrics, the page, and the log, until it can be written again, though
    nobody puts anything meanwhile."""
    caplog.set_level("INFO")
    admin = free_port()
    server = serve("[server]\nadmin_port = %d\n[queue]\nsync_journal = never\n" % admin)
    client = server.client()
    client.put("q", b"1")
    assert get_page(admin, "/writable") == get_page(admin, "/readable") == (200, "OK\n")
    assert "kestrel_journal_failed{" not in get_page(admin, "/metrics")[1]
    disk.failing = {"pwrite": errno.ENOSPC}
    assert client.put("q", b"2").startswith("SERVER_ERROR")
    assert client.ask("get q\r\n").startswith("SERVER_ERROR")
    why = "the journal of q cannot be written: q: No space left on device"
    until(lambda: skip(10, server.server) or "service resumes by itself" in caplog.text)
    assert caplog.text.count("resumes") < caplog.text.count("cannot be written")
    assert get_page(admin, "/writable") == get_page(admin, "/readable") == (503, why + "\n")
    told = get_page(admin, "/metrics")[1]
    assert 'kestrel_journal_failed{queue="q"} 1\n' in told
    assert 'kestrel_refused_total{reason="ENOSPC"} 2\n' in told
    assert int(re.search(r"kestrel_spool_free_bytes (\d+)\n", told)[1]) > 0
    assert json.loads(get_page(admin, "/queues.json")[1])["trouble"] == why
    disk.failing = {}
    until(lambda: skip(1, server.server) or get_page(admin, "/writable")[0] == 200)
    assert json.loads(get_page(admin, "/queues.json")[1])["trouble"] == ""
    assert "the journal of q can be written again" in caplog.text
    assert client.get("q") == b"1"


def test_puts_are_refused_before_the_disk_is_full(serve, monkeypatch, caplog):
    monkeypatch.setattr(kestrel, "RETRY_MS", 20)
    free = types.SimpleNamespace(f_bavail=20, f_frsize=1 << 20, f_flag=0)
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    admin = free_port()
    server = serve("[server]\nadmin_port = %d\nmin_free_space = 10mb\n"
                   "[queue memory]\nkeep_journal = false\n" % admin)
    client = server.client()
    assert client.put("q", b"1") == client.put("q+child", b"1") == "STORED\r\n"
    assert client.put("alone", b"1") == "STORED\r\n"
    free.f_bavail = 9
    until(lambda: server.server.broker.low_space)
    why = "there is no space for more: less than 10mb free (min_free_space)"
    assert client.put("q", b"2") == "SERVER_ERROR %s\r\n" % why
    assert client.put("alone", b"2") == "SERVER_ERROR %s\r\n" % why
    assert client.put("new", b"2") == "SERVER_ERROR %s\r\n" % why
    assert client.put("memory", b"2") == "STORED\r\n"
    assert get_page(admin, "/writable") == (503, why + "\n")
    assert get_page(admin, "/readable")[0] == 200
    assert json.loads(get_page(admin, "/queues.json")[1])["trouble"] == why
    assert 'kestrel_refused_total{reason="ENOSPC"} 3\n' in get_page(admin, "/metrics")[1]
    assert client.get("q/open") == b"1" and client.get("q/close") is None     # gets go on
    free.f_bavail = 10
    until(lambda: not server.server.broker.low_space)
    assert client.put("q", b"3") == "STORED\r\n"
    assert "9mb free, puts are refused" in caplog.text


def test_items_that_cannot_be_read_are_seen(serve, disk, skip):
    admin = free_port()
    server = serve("[server]\nadmin_port = %d\n[queue]\nmax_memory_size = 64kb\n" % admin)
    client = server.client()
    for _ in range(30):
        client.put("q", b"x" * 10000)
    disk.failing = {"pread": errno.EIO}
    with pytest.raises(ConnectionError, match="Input/output error"):
        while client.get("q"):
            pass
    assert get_page(admin, "/readable") == (
        503, "the journal of q cannot be read: journal: Input/output error\n")
    disk.failing = {}
    until(lambda: skip(1, server.server) or get_page(admin, "/readable")[0] == 200)
    assert client.get("q") == b"x" * 10000


def test_list(talk):
    put_some(talk, "jobs", b"1", b"23")
    put_some(talk, "mail", b"1")
    talk("get jobs/open\r\n", "another")
    waiting = talk.session("third")
    waiting.feed(b"get jobs/open\r\nget jobs/open/t=1000\r\n", NOW)
    talk("get none/peek\r\n")
    assert talk("list\r\n") == "QUEUE jobs 0 0 2 1\r\nQUEUE mail 1 1 0 0\r\nEND\r\n"
    assert talk("list ma\r\n") == "QUEUE mail 1 1 0 0\r\nEND\r\n"
    assert talk("list x\r\nlist a b\r\n") == "END\r\nCLIENT_ERROR list takes one prefix\r\n"


def test_move(talk):
    put_some(talk, "q", *[b"%d" % number for number in range(500)])
    talk("get q/open\r\n", "another")
    assert talk("move q r 3\r\n") == "3\r\n"
    assert items_of(talk.broker, "r") == [b"1", b"2", b"3"]
    assert talk("move q r\r\n") == "496\r\n"
    assert items_of(talk.broker, "r") == [b"%d" % number for number in range(1, 500)]
    assert talk.broker.queues["q"].count == 0 and len(talk.broker.queues["q"].opens) == 1
    talk("get q/abort\r\n", "another")
    assert talk("move q r 0\r\nmove q r\r\nmove q r\r\n") == "0\r\n1\r\n0\r\n"


def test_a_move_from_a_child_to_its_parent(talk):
    """Each item came back to the child, as its copy."""
    talk("get q+a\r\nget q+b\r\n")
    put_some(talk, "q", b"1")
    talk("get q\r\nget q+b\r\n")
    assert talk("move q+a q\r\n") == "1\r\n"
    assert [items_of(talk.broker, name) for name in ("q", "q+a", "q+b")] == [[b"1"], [], [b"1"]]


def test_a_move_to_a_queue_that_is_only_fanned_out(tmp_path):
    """Its items stayed in it, where nobody looks for them."""
    talk = Talk(tmp_path, "[queue f]\nfanout_only = true\n")
    put_some(talk, "q", b"1")
    talk("get f+x\r\n")
    assert talk("move q f\r\n") == "CLIENT_ERROR f is fanout_only: it keeps no items\r\n"
    assert talk("move q f+x\r\n") == "1\r\n"


def test_move_goes_as_far_as_there_is_room(tmp_path):
    talk = Talk(tmp_path, "[queue r]\nmax_items = 3\n[alias all]\ndestination_queues = r\n")
    put_some(talk, "q", *b"abcde".split(b"x"), b"2", b"3", b"4", b"5")
    put_some(talk, "r+child")
    assert talk("move q r\r\n") == "3\r\n"
    assert items_of(talk.broker, "r") == [b"abcde", b"2", b"3"]
    assert items_of(talk.broker, "q") == [b"4", b"5"] and not talk.broker.queues["q"].opens
    for command in ("move q q", "move q all", "move none r", "move q r -1", "move q", "move q r x"):
        assert talk(command + "\r\n").startswith("CLIENT_ERROR"), command
    assert items_of(talk.broker, "q") == [b"4", b"5"]


@pytest.mark.parametrize("good", range(4))
def test_a_move_over_a_failing_disk_loses_nothing(talk, disk, good):
    put_some(talk, "q", b"1", b"2")
    talk.broker.queue("r", NOW)
    commit(talk.broker, NOW)
    disk.failing, disk.good, disk.once = {"pwrite": errno.ENOSPC}, good, True
    session = talk.session()
    session.feed(b"move q r\r\n", NOW)
    for _ in range(10):
        session.settle(commit(talk.broker, NOW)[1], set())
        session.resume(NOW)
    said = b"".join(session.take()).decode()
    found = items_of(talk.broker, "q") + items_of(talk.broker, "r")
    assert sorted(found) == [b"1", b"2"] or (      # it is closed when it can be written
        said == "" and len(talk.broker.queues["q"].opens) == 2 and len(found) == 2)
    assert said in ("", "2\r\n") or "No space left" in said and found == [b"1", b"2"]


@promise(1)
def test_a_move_is_answered_when_the_children_have_their_copies(tmp_path):
    talk = Talk(tmp_path, "[queue q]\nsync_journal = 0\n[queue r+child]\nsync_journal = 0\n")
    put_some(talk, "q", b"1", b"2")
    talk.broker.queue("r+child", NOW)
    queues, told = talk.broker.queues, []
    talk.broker.queue("r", NOW)
    talk.broker.moves.move(queues["q"], queues["r"], 9, NOW, told.append)
    for _ in range(4):
        talk.broker.write()
        run_tasks(talk.broker)
        assert not told and len(queues["q"].opens) == 2
        sync(queues["q"])                    # but not the child
    sync(queues["r+child"])
    run_tasks(talk.broker)
    talk.broker.write()
    assert not queues["q"].opens and not told
    sync(queues["q"])
    run_tasks(talk.broker)
    assert told == [(2, None)]
    assert items_of(talk.broker, "r+child") == items_of(talk.broker, "r") == [b"1", b"2"]


@promise(2)
def test_a_move_is_answered_though_it_cannot_be_finished(tmp_path, disk):
    """What has arrived is confirmed when the disk is well again; the client does not wait."""
    talk = timed_talk(tmp_path, "[queue]\nsync_journal = never\n")
    put_some(talk, "q", b"1", b"2")
    queues, told = talk.broker.queues, []
    talk.broker.queue("r", NOW)
    talk.broker.write()
    talk.broker.moves.move(queues["q"], queues["r"], 9, NOW, told.append)
    disk.failing, disk.good = {"pwrite": errno.ENOSPC}, 2      # open in q, and put to r
    for _ in range(4):
        talk.broker.write()
        run_tasks(talk.broker)
        talk.clock.reach(talk.clock.time + 1)
    assert [(moved, bool(error)) for moved, error in told] == [(2, True)]
    disk.failing = {}
    for second in range(1, 9):
        talk.clock.reach(second * 1000)
        talk.broker.write()
        run_tasks(talk.broker)
    assert not queues["q"].opens and not queues["q"].count
    assert items_of(talk.broker, "r") == [b"1", b"2"]


@promise(2)
def test_a_move_is_answered_though_a_child_cannot_take_its_copies(tmp_path, monkeypatch):
    """The client does not wait until it can."""
    talk = timed_talk(tmp_path, "[queue]\nsync_journal = never\n")
    put_some(talk, "q", b"1", b"2")
    queues, told = talk.broker.queues, []
    talk.broker.queue("r", NOW)
    talk.broker.queue("r+child", NOW)
    talk.broker.write()

    def add(*_):
        raise OSError(errno.ENOMEM, "out of memory", "r+child")

    monkeypatch.setattr(queues["r+child"], "add", add)
    talk.broker.moves.move(queues["q"], queues["r"], 9, NOW, told.append)
    for _ in range(9):
        talk.broker.write()
        run_tasks(talk.broker)
        talk.clock.reach(talk.clock.time + 1)
    (moved, error), = told
    assert error.errno == errno.ENOMEM and not queues["q"].opens
    assert items_of(talk.broker, "r") + items_of(talk.broker, "q") == [b"1", b"2"]
    assert queues["r"].count == moved


@pytest.mark.parametrize("to", ["", "late"])
def test_large_items_that_expire_are_dropped_a_few_at_a_time(tmp_path, monkeypatch, to):
    """However many a get meets: they are in memory until that is written."""
    monkeypatch.setattr(kestrel, "_STEP_SIZE", 10000)
    monkeypatch.setattr(kestrel, "_MOVE_SIZE", 10000)
    talk = timed_talk(tmp_path, "[queue]\nsync_journal = never\n"
                      "[queue q]\nmax_age = 1s\nexpire_to_queue = %s\n" % to
                      + "max_memory_size = 30000\n[queue late]\nmax_memory_size = 30000\n")
    put_some(talk, "q", *[b"x" * 5000] * 100)
    talk.now += 2000
    session, queue = talk.session(), talk.broker.queues["q"]
    session.feed(b"get q\r\n", talk.now)
    seen = [queue.count]
    while session.state in ("working", "held"):
        assert sum(kestrel._size(op[1]) for op in queue.history.ops if op[0] == 1) < 100000
        assert sum(map(kestrel._size, queue.opens.values())) < 60000
        talk.broker.write()
        run_tasks(talk.broker)
        talk.clock.reach(talk.clock.time + 5)
        session.resume(talk.now)
        seen.append(queue.count)
    assert len(seen) > 8 and seen[-1] == 0
    assert talk.heard() == "END\r\n"
    talk.clock.reach(talk.clock.time + 5)
    assert not to or talk.broker.queues["late"].count == 100


def test_expired_items_that_cannot_be_moved_keep_their_order(tmp_path):
    """And they are tried together, once a second."""
    talk = timed_talk(tmp_path, "[queue q]\nmax_age = 1s\nexpire_to_queue = late\n")
    put_some(talk, "q", *[b"%03d" % number for number in range(50)])
    assert talk("get late\r\npause late in\r\n") == "END\r\nEND\r\n"
    talk.now += 2000
    queue = talk.broker.queues["q"]
    tries = 0
    for number in range(1600):
        tries += queue.discard_expired(talk.now)
        talk.broker.write()
        talk.clock.reach(talk.clock.time + 2)
        if queue.count == 50:
            assert data_of(queue.items) == [b"%03d" % number for number in range(50)]
    assert tries <= 4 * 50
    talk("resume late\r\n")
    for _ in range(1600):
        queue.discard_expired(talk.now)
        talk.broker.write()
        talk.clock.reach(talk.clock.time + 2)
    assert data_of(talk.broker.queues["late"].items) == [b"%03d" % number for number in range(50)]
    assert not queue.opens and queue.count == 0 and queue.counters.expired_items == 50


def test_expired_items_are_moved_though_memory_is_short(tmp_path):
    """They are kept as stubs then, and stayed open for ever."""
    talk = timed_talk(tmp_path, "[queue]\nsync_journal = never\n"
                      "[queue q]\nmax_age = 1s\nexpire_to_queue = late\n"
                      "max_memory_size = 4kb\n")
    put_some(talk, "q", *[b"%03d" % number + b"x" * 500 for number in range(100)])
    talk.now += 2000
    for _ in range(200):
        talk.broker.queues["q"].discard_expired(talk.now)
        talk.broker.write()
        run_tasks(talk.broker)
        talk.clock.reach(talk.clock.time + 5)
    assert not talk.broker.queues["q"].opens and talk.broker.queues["q"].count == 0
    assert talk.broker.queues["late"].count == 100


def test_a_move_to_a_queue_without_memory_is_answered(tmp_path):
    talk = Talk(tmp_path, "[queue r]\nkeep_journal = false\n")
    talk.broker.budget.most_memory = 1 << 20
    put_some(talk, "q", *[b"x" * 50000] * 30)
    talk("get r\r\n")
    told = talk("move q r\r\n")
    assert told.startswith("SERVER_ERROR r: out of memory; ")
    moved = int(re.search(r"(\d+) were moved", told)[1])
    queues = talk.broker.queues
    assert queues["r"].count == moved and queues["q"].count == 30 - moved
    assert not queues["q"].opens


def test_clients_and_kick(serve):
    server = serve()
    one, two = server.client(), server.client()
    one.put("q", b"x")
    assert one.get("q/open") == b"x"
    two.send("get q/t=20000\r\n")
    until(lambda: server.server.waiting)
    lines = []
    one.send("clients\r\n")
    while not lines or lines[-1] != "END\r\n":
        lines.append(one.line())
    first, second, _ = lines
    assert re.fullmatch(r"CLIENT 1 127\.0\.0\.1:\d+ - memcache working \d+ 1 -\r\n", first)
    assert re.fullmatch(r"CLIENT 2 127\.0\.0\.1:\d+ - memcache waiting \d+ 0 q\r\n", second)
    with kestrel.Client(port=server.port) as client:
        assert [row[4] for row in client.clients()] == ["ready", "waiting", "working"]
    # What comes in the turn of its end has been taken for it.
    one.send("set q 0 0 1\r\ny\r\nkick 2\r\n")
    assert [one.line(), one.line()] == ["STORED\r\n", "OK\r\n"]
    assert two.sock.makefile("rb").read() == b"VALUE q/t=20000 0 1\r\ny\r\nEND\r\n"
    two.close()
    until(lambda: len(server.server.broker.clients) == 1)
    assert one.ask("kick 2\r\n") == "NOT_FOUND\r\n"
    assert one.ask("kick x\r\n").startswith("CLIENT_ERROR")
    one.send("kick 1\r\n")
    assert one.line() in ("OK\r\n", "")
    assert server.client().get("q/t=1000") == b"x"


@pytest.mark.parametrize("said, words", [
    (b"\x80\0\0\1\0\0\0\0", "speaks memcache's binary protocol"),
    (b"\x16\3\1\2\0\1\0\1", "speaks TLS to a port without TLS (tls_cert)"),
    (b"\0\0\0\5hello", "speaks an unknown protocol")])
def test_clients_of_another_protocol_leave_one_line(talk, caplog, said, words):
    caplog.set_level("INFO")
    for number in range(3):
        session = talk.session("client %d" % number)
        session.feed(said, NOW)
        assert session.is_over() and b"this protocol is not supported" in b"".join(session.out)
    talk.session("client of another host", host="192.0.2.9").feed(said, NOW)
    assert caplog.text.count(words) == 2
    assert sum(talk.broker.refused.values()) == 4


def test_reload_changes_logs_and_traces(daemon, tmp_path):
    text = "[server]\nlog_level = %s\nlog_file = %s\nenable_session_trace = %s\n"
    logs = [tmp_path / "one.log", tmp_path / "two.log"]
    server = daemon(text % ("info", logs[0], "false"), log=logs[0])
    with server.client() as client:
        assert client.put("q", b"secret") == "STORED\r\n"
        (tmp_path / "kestrel.conf").write_text(text % ("info", logs[1], "127.0.0.0/8"))
        assert client.ask("reload\r\n") == "Reloaded config.\r\n"
        client.put("q", b"traced")
        (tmp_path / "kestrel.conf").write_text(text % ("error", logs[1], "10.0.0.0/8"))
        assert client.ask("reload\r\n") == "Reloaded config.\r\n"
        client.put("new", b"untold")
        (tmp_path / "kestrel.conf").write_text(text % ("info", "/none/log", "true"))
        assert client.ask("reload\r\n").startswith("SERVER_ERROR")
    told = [log.read_text() for log in logs]
    assert "queue q created" in told[0] and "secret" not in told[0]
    assert "traced" in told[1] and "untold" not in told[1] and "queue new" not in told[1]


def test_the_log_says_whose_read_has_timed_out(serve, caplog):
    server = serve("[queue]\nopen_transaction_timeout = 20ms\n")
    slow, other = server.client(), server.client()
    slow.put("q", b"x")
    assert slow.get("q/open") == b"x"
    assert other.get("q/t=20000") == b"x"
    said = "memcache client 127.0.0.1:%d: 1 open reads of q have timed out" % (
        slow.sock.getsockname()[1])
    until(lambda: said in caplog.text)


def test_refusals_are_counted_by_reason(talk):
    talk(set_("q", "1"))
    talk.broker.queues["q"].configure(kestrel.QueueConfig(max_items=1))
    talk(set_("q", "2") + "get a b/open/abort\r\n")
    talk.broker.set_status("readonly")
    talk(set_("q", "3"), "another")
    assert talk.broker.refused == {"full": 1, "client": 1, "status": 1}


def test_an_item_is_fsynced_that_asks_for_it(serve):
    server = serve("[queue]\nsync_journal = never\n")
    client = server.client()
    assert client.ask("set q/sync 0 0 1\r\nx\r\n") == "STORED\r\n"
    assert server.server.broker.queues["q"].history.durable == 1


@promise(2)
def test_a_disk_that_hangs_is_one_that_fails(serve, monkeypatch, caplog):
    """Load balancers are told; when it goes on, all is well again."""
    for name, value in (("_HANG_SECONDS", 0.05), ("RETRY_MS", 10), ("_CALM_SECONDS", 0.05)):
        monkeypatch.setattr(kestrel, name, value)
    server = serve("[queue]\nsync_journal = 0\n")
    goes_on = threading.Event()
    real = os.fsync
    monkeypatch.setattr(kestrel.os, "fsync", lambda fd: goes_on.wait(20) and real(fd))
    client = server.client()
    client.send(set_("q", "x"))
    broker = server.server.broker
    until(lambda: "the disk hangs" in broker.why_not_writable())
    goes_on.set()
    assert client.line() == "STORED\r\n"
    until(lambda: not broker.why_not_writable())


def test_a_start_that_refuses_says_how_to_end_that(tmp_path, caplog):
    server = kestrel.Server(config_of(
        tmp_path, "[server]\nmemcache_port = 0\ndefault_status = quiescent\n"))
    stop(server)
    assert "the status is QUIESCENT" in caplog.text and "`status up` ends that" in caplog.text


@promise(2)
@pytest.mark.parametrize("sync", ["never", "0", "20ms"])
def test_a_disk_that_fails_in_every_way(serve, disk, tmp_path, monkeypatch, caplog, sync):
    """Calls fail at random while queues rotate, are packed, rewritten and read behind: each
    answer is true, and what was acknowledged is there in the end, and after a restart."""
    caplog.set_level("CRITICAL")
    monkeypatch.setattr(kestrel, "RETRY_MS", 10)
    chances = seeded()
    server = serve("[queue]\nsync_journal = %s\nmax_memory_size = 3000\nmax_journal_size = 9000\n"
                   "default_journal_size = 500\nmin_journal_compact_delay = 5ms\n" % sync)
    client = server.client()
    queues = {name: collections.deque() for name in "abc"}
    failed = unclear = 0
    for serial in range(1200):
        if serial % 60 == 0:
            disk.failing = {} if chances.random() < 0.4 else {
                name: chances.choice([errno.ENOSPC, errno.EIO]) for name in chances.sample(
                    ["pwrite", "fsync", "ftruncate", "rename", "unlink", "open"], 2)}
            bias = chances.random()
        name = chances.choice("abc")
        items = queues[name]
        if chances.random() < bias:
            data = b"%d-" % serial + b"x" * chances.randrange(300)
            answer = client.put(name, data)
            if answer == "STORED\r\n":
                items.append(data)
            elif answer == "":               # what failed could not be cut off
                client = server.client()
                unclear += 1
            else:
                assert answer.startswith("SERVER_ERROR ")
                failed += 1
        else:
            try:
                data = client.get(name)
            except ConnectionError as error:
                failed += 1
                if "SERVER_ERROR " not in str(error):
                    assert "answered ''" in str(error)
                    client = server.client()
                    unclear += 1
            else:
                assert data == (items.popleft() if items else None)
    print(failed, "failed", unclear, "unclear", server.server.broker.server_stats(NOW))
    assert failed > 10
    disk.failing = {}
    for name, items in queues.items():
        until(lambda: client.put(name, b"last") == "STORED\r\n")
        items.append(b"last")
        for _ in range(len(items) // 2):
            assert client.get(name) == items.popleft()
    server.stop()
    for name, items in queues.items():
        assert contents_of(tmp_path / "spool", name) == list(items)


def test_get_of_many_keys_passes_over_a_queue_that_fails(serve, monkeypatch):
    server = serve("[queue]\nsync_journal = never\n")
    client = server.client()
    for name in ("a", "b"):
        client.put(name, name.encode())
    real = os.pwrite
    bad = server.server.broker.queues["a"].journal.current.fd

    def pwrite(fd, *rest):
        if fd == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, *rest)

    monkeypatch.setattr(kestrel.os, "pwrite", pwrite)
    client.send("get a b\r\n")
    assert client.item() == b"b"
    monkeypatch.setattr(kestrel.os, "pwrite", real)
    assert client.get("a") == b"a"


def test_open_reads_of_a_client_that_left_while_the_disk_was_full(serve, disk, monkeypatch):
    monkeypatch.setattr(kestrel, "RETRY_MS", 20)
    server = serve("[queue]\nsync_journal = never\n")
    client, other = server.client(), server.client()
    client.put("q", b"1")
    client.get("q/open")
    disk.failing = {"pwrite": errno.ENOSPC}
    client.close()
    until(lambda: server.server.broker.failing)
    disk.failing = {}
    assert other.get("q/t=20000") == b"1"


def test_an_earlier_fsync_does_not_release_later_answers(serve, monkeypatch):
    """An item is delivered to a client whose earlier answers are held already."""
    server = serve("[queue]\nsync_journal = 0\n")
    client, other = server.client(), server.client()
    client.put("q", b"1")
    client.put("r", b"1")
    client.get("r")
    held = HeldFsync(monkeypatch)
    held.hold(client, "set q 0 0 1\r\n2\r\nget r/t=20000\r\n")  # of q
    other.send("set r 0 0 1\r\n3\r\n")               # delivered to the held client
    until(lambda: server.server.broker.queues["r"].count == 0)
    held.go.release()
    assert held.called.acquire(timeout=20)           # of r
    nothing_comes(other)
    nothing_comes(client)
    held.disarm()
    assert client.line() == "STORED\r\n" and client.item() == b"3"
    assert other.line() == "STORED\r\n"


def test_sync_journal_changes_at_once(serve, tmp_path, monkeypatch):
    server = serve("[queue]\nsync_journal = never\n")
    client, other = server.client(), server.client()
    held = HeldFsync(monkeypatch)
    assert client.put("q", b"1") == "STORED\r\n"
    (tmp_path / "kestrel.conf").write_text("[queue]\nsync_journal = 0\n")
    assert other.ask("reload\r\n") == "Reloaded config.\r\n"
    held.hold(client, "set q 0 0 1\r\n2\r\n")
    nothing_comes(client)
    held.disarm()
    assert client.line() == "STORED\r\n"


def test_what_nobody_waits_for_is_fsynced_too(serve):
    server = serve("[queue]\nsync_journal = 0\nexpire_to_queue = late\n"
                   "[queue late]\nsync_journal = 0\n")
    client = server.client()
    assert [client.get(name) for name in ("q", "r", "late")] == [None] * 3
    queue = server.server.broker.queues.get
    client.send("set q 0 0 1 noreply\r\nx\r\n" * 100)
    until(lambda: queue("q").count == 100 and queue("q").history.safe == queue("q").history.logged)
    client.send("set r 0 -1 1\r\nx\r\nget r\r\n")
    assert (client.line(), client.item()) == ("STORED\r\n", None)
    until(lambda: queue("late").count == 1 and not queue("r").opens)


def test_a_close_rests_on_its_record_though_the_next_read_waits(serve, monkeypatch, disk):
    server = serve("[queue]\nsync_journal = never\n")
    client, other = server.client(), server.client()
    client.put("q", b"1")
    assert client.get("q/open") == b"1"
    disk.failing = {"pwrite": errno.ENOSPC}
    client.send("get q/close/open/t=20000\r\n")
    assert client.line().startswith("SERVER_ERROR")
    disk.failing = {}
    assert client.get("q/close/open/t=10") is None   # still its own, and now closed
    assert other.stats()["queue_q_open_transactions"] == "0"
    assert other.get("q") is None


def test_a_failed_fsync_of_what_a_client_left_behind(serve, monkeypatch):
    server = serve("[queue]\nsync_journal = 0\n")
    client, other = server.client(), server.client()
    client.put("q", b"1")
    assert client.get("q/open") == b"1"
    held = HeldFsync(monkeypatch)
    held.error = errno.EIO
    client.close()
    assert held.called.acquire(timeout=20)
    held.go.release()
    held.error = None
    held.disarm()
    assert other.get("q/t=20000") == b"1"


def test_answers_in_hand_are_not_taken_back_by_a_later_failure(serve, monkeypatch, disk):
    """A held client's answer rests on a record that is written; the next write fails."""
    server = serve("[queue]\nsync_journal = never\n[queue safe]\nsync_journal = 0\n")
    client, other = server.client(), server.client()
    client.put("safe", b"1")
    held = HeldFsync(monkeypatch)
    held.hold(client, "set safe 0 0 1\r\n2\r\nget q/t=20000\r\n")
    assert other.put("q", b"x") == "STORED\r\n"      # delivered to the held client
    disk.failing = {"pwrite": errno.ENOSPC}
    assert other.put("q", b"y").startswith("SERVER_ERROR")
    disk.failing = {}
    held.disarm()
    assert client.line() == "STORED\r\n" and client.item() == b"x"


def test_the_loop_rests_while_answers_are_held(serve, monkeypatch):
    server = serve("[queue]\nsync_journal = 0\n")
    client, other = server.client(), server.client()
    data = os.urandom(50000)
    client.put("q", data)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.settimeout(20)
    slow.connect(("127.0.0.1", server.port))
    answer = b"VALUE q/peek 0 50000\r\n" + data + b"\r\nEND\r\n"
    owed = 0
    while not any(one.unsent for one in list(server.server.connections.values())):
        slow.sendall(b"get q/peek\r\n")                # until the socket takes no more
        client.stats()
        owed += len(answer)
    until(lambda: int(client.stats()["cmd_peek"]) * len(answer) == owed)
    held = HeldFsync(monkeypatch)
    slow.sendall(b"set q 0 0 1\r\nx\r\n")
    assert held.called.acquire(timeout=20)
    while owed:                                        # what is safe is sent all the same
        owed -= len(slow.recv(min(owed, 1 << 20)))
    turns = server.count_turns()
    server.server.interrupt()
    time.sleep(0.05)
    assert len(turns) < 20
    held.disarm()
    assert slow.recv(100) == b"STORED\r\n"
    slow.close()


def test_what_a_held_client_sends_on_is_counted_and_limited(serve, monkeypatch):
    server = serve("[queue]\nsync_journal = 0\n")
    client = server.client()
    client.put("q", b"0")
    held = HeldFsync(monkeypatch)
    held.hold(client, "set q 0 0 1\r\n1\r\n")
    client.sock.settimeout(0.1)
    with pytest.raises(socket.timeout):                # the kernel's buffers are full
        for _ in range(200):
            client.send(b"version\r\n" * 10000)
    connection, = server.server.connections.values()
    until(lambda: 0 < connection.session.unparsed < connection.buffered)
    assert connection.buffered < 3 * kestrel._CHUNK
    held.disarm()
    client.sock.settimeout(20)
    assert client.line() == "STORED\r\n"


def test_answers_that_are_not_read_are_limited_though_commands_come_one_by_one(serve):
    server = serve("[server]\nmax_output_buffer = 200kb\n")
    client = server.client()
    for _ in range(150):
        client.put("q", bytes(100000))
    stats = server.server.broker.stats
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        slow.connect(("127.0.0.1", server.port))
        for _ in range(120):
            wanted = stats.bytes_read + len(b"get q\r\n")
            slow.sendall(b"get q\r\n")
            until(lambda: stats.bytes_read == wanted)
        assert max(one.session.load for one in server.server.connections.values()) < 500000


def test_running_out_of_descriptors_only_delays(serve, monkeypatch):
    """Neither an fsync nor a write fails for it."""
    monkeypatch.setattr(kestrel, "_SYNC_AGAIN_MS", 5)
    monkeypatch.setattr(kestrel, "_NO_DESCRIPTOR_MS", 5)
    server = serve("[queue]\nsync_journal = 0\n")
    client = server.client()
    client.put("q", b"1")
    failures = []

    def exhaust(name):
        real = getattr(os, name)

        def fail(*args):
            if threading.current_thread() is server.thread and len(failures) < 5:
                failures.append(name)
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(*args)

        monkeypatch.setattr(kestrel.os, name, fail)

    exhaust("dup")
    assert client.put("q", b"2") == "STORED\r\n"
    assert failures == ["dup"] * 5
    del failures[:]
    server.server.broker.budget.close(server.server.broker.queues["q"].journal.current)
    exhaust("open")
    assert client.put("q", b"3") == "STORED\r\n"
    assert failures == ["open"] * 5
    assert [client.get("q") for _ in range(4)] == [b"1", b"2", b"3", None]


def test_a_monitor_keeps_its_time_though_it_was_held(serve, monkeypatch, skip):
    server = serve("[queue]\nsync_journal = 0\n")
    client, other = server.client(), server.client()
    client.put("q", b"1")
    held = HeldFsync(monkeypatch)
    held.hold(client, "monitor q 1\r\n")      # opens 1, and is held beyond its time
    skip(1.1)
    held.disarm()
    assert client.item() == b"1"
    assert client.item() is None


def test_idle_timers_go_with_their_connection(serve):
    server = serve("[server]\nclient_timeout = 1h\n")
    client = server.client()
    for _ in range(50):
        server.client().close()
    until(lambda: client.stats()["total_connections"] == "51")
    until(lambda: client.stats()["curr_connections"] == "1")
    assert len(server.server.timers._heap) < 10


def test_what_clients_leave_behind_is_in_no_cycle(serve):
    server = serve()
    with no_cycles():
        for _ in range(3):
            leaver, stayer = Client(server.port), Client(server.port)
            assert stayer.put("q", b"1") == "STORED\r\n"
            assert leaver.get("q/open") == b"1"
            leaver.close()
            assert stayer.get("q/t=5000") == b"1"
            assert stayer.get("q/t=5") is None
            assert stayer.ask("delete q\r\n") == "DELETED\r\n"
            stayer.send("get q/t=5000\r\n")
            until(lambda: "q" in server.server.broker.queues
                  and server.server.broker.queues["q"].waiters)
            stayer.close()
            until(lambda: not server.server.connections)


def test_deleted_queues_and_failures_leave_no_cycle(tmp_path, disk):
    broker = broker_of(tmp_path, "[queue]\nsync_journal = 0\n")
    put(broker, "q", b"x")
    run_tasks(settle(broker))
    with no_cycles():
        for number in range(3):
            queue = broker.queue("new%d" % number, NOW)
            put(broker, queue.name, b"x")
            commit(broker, NOW)
            broker.delete(queue)
            broker._forget_routes()
            del queue
            run_tasks(broker)
            commit(broker, NOW)
            disk.failing = {"fsync": errno.EIO}
            with contextlib.suppress(OSError):
                broker.queues["q"].sync_now()
            with contextlib.suppress(OSError):
                kestrel._raise(OSError("x"))
            disk.failing = {}
            run_tasks(broker)
            commit(broker, NOW)


@pytest.mark.parametrize("session_type, answers", [
    (kestrel.MemcacheSession, ANSWERS), (kestrel.TextSession, TEXT_ANSWERS),
    (kestrel.ThriftSession, THRIFT_ANSWERS),
    (kestrel.AdminSession, [(request(line), 0) for line in (
        "GET /metrics", "GET /stats.json", "GET /queues.json", "POST /reload", "GET /nothing",
        "POST /flush?queue=q", "GET /peek?queue=q", "HEAD /stats.txt")]
     + [("nonsense\r\n\r\n", 0)])], ids=lambda part: getattr(part, "__name__", ""))
def test_no_command_and_no_error_leaves_a_cycle(tmp_path, session_type, answers):
    talk = Talk(tmp_path, session_type=session_type)
    for sent, _ in answers:
        talk(sent if isinstance(sent, bytes) else sent.encode("latin-1"), "before")
        talk.sessions.clear()
    with no_cycles():
        for sent, _ in answers:
            sent = sent if isinstance(sent, bytes) else sent.encode("latin-1")
            talk(sent, "client")
            session = talk.sessions.pop("client")
            session.close(NOW)
            del session


@pytest.mark.parametrize("text", ["[queue a]\nmax_items = 5\n[alias b]\ndestination_queues = a\n",
                                  "[queue a]\nmax_items = x\n", "nonsense\n", "[a]\nb = c\n",
                                  "[queue]\n[queue]\n"])
def test_reloads_leave_no_cycle(tmp_path, text):
    broker = broker_of(tmp_path)
    broker.queue("a")
    (tmp_path / "kestrel.conf").write_text(text)
    reload(broker)
    with no_cycles():
        for _ in range(3):
            reload(broker)


def test_a_queue_deleted_under_the_server(serve, tmp_path):
    server = serve()
    client = server.client()
    client.put("q", b"x")
    os.unlink(str(tmp_path / "spool" / "q"))
    client.send("set q 0 0 1\r\ny\r\ndelete q\r\nset r 0 0 1\r\nz\r\n")
    assert [client.line() for _ in range(3)] == ["STORED\r\n", "DELETED\r\n", "STORED\r\n"]
    assert plain(tmp_path / "spool" / "r").endswith(b"\0z")
    assert client.get("r") == b"z"


def test_stopping_answers_those_who_wait(serve, tmp_path):
    server = serve("[queue]\nsync_journal = 0\n")
    client, waiting, monitor = server.client(), server.client(), server.client()
    for data in (b"1", b"2"):
        client.put("q", data)
    client.get("q/open")
    waiting.send("get r/t=20000\r\n")
    monitor.send("monitor s 20\r\n")
    until(lambda: client.stats().get("queue_r_waiters") == "1")
    until(lambda: client.stats().get("queue_s_waiters") == "1")
    server.stop()
    assert waiting.sock and contents_of(tmp_path / "spool") == [b"1", b"2"]


@promise(2)
@pytest.mark.parametrize("then_full", [False, True])
@pytest.mark.parametrize("stop", ["killed", "stopped"])
def test_refused_commands_have_not_happened(serve, disk, tmp_path, then_full, stop):
    server = serve("[queue]\nsync_journal = 0\n")
    client, reader = server.client(), server.client()
    spool = tmp_path / "spool"
    assert client.put("q", b"A") == client.put("q", b"B") == "STORED\r\n"
    assert client.put("r", b"1") == "STORED\r\n"
    assert reader.get("r/open") == b"1"

    def check():
        failing, disk.failing = disk.failing, {}
        assert contents_of(spool, "q") == [b"A", b"B"] and contents_of(spool, "r") == [b"1"]
        disk.failing = failing

    disk.failing, disk.once = {"fsync": errno.EIO}, then_full
    for command, queue in (("get q\r\n", "q"), (set_("q", "C"), "q"),
                           ("get r/close\r\n", "r"), ("flush q\r\n", "q")):
        answerer = reader if queue == "r" else client
        assert answerer.ask(command).startswith("SERVER_ERROR "), command
        if then_full:
            disk.failing, disk.once = {"pwrite": errno.ENOSPC}, False
        check()
    if stop == "stopped":
        server.stop()
    check()
    if stop == "killed":
        disk.failing = {}
        until(lambda: client.put("q", b"C") == "STORED\r\n")
        assert [client.get("q") for _ in range(3)] == [b"A", b"B", b"C"]


@pytest.mark.parametrize("sync, failing", [("never", "pwrite"), ("0", "fsync")])
def test_an_unclear_outcome_is_told_to_nobody(serve, disk, sync, failing):
    """What could not be written can also not be cut off: the client is disconnected."""
    server = serve("[queue]\nsync_journal = %s\n" % sync)
    client, other = server.client(), server.client()
    assert client.put("q", b"1") == "STORED\r\n"
    disk.failing = {failing: errno.EIO, "ftruncate": errno.EIO}
    assert client.put("q", b"2") == ""
    assert other.put("q", b"3") == "SERVER_ERROR q: Input/output error\r\n"
    assert other.put("r", b"x") == ""
    disk.failing = {}
    other = server.client()
    assert other.put("q", b"4") == "STORED\r\n"
    assert [other.get("q") for _ in range(3)] == [b"1", b"4", None]


@promise(1)
def test_deleted_is_answered_when_it_is_durable(serve, monkeypatch):
    server = serve("[queue]\nsync_journal = 0\n")
    client = server.client()
    client.put("q", b"x")
    held = HeldFsync(monkeypatch)
    held.hold(client, "delete q\r\n")
    nothing_comes(client)
    held.disarm()
    assert client.line() == "DELETED\r\n"


@pytest.mark.parametrize("how", ["unlinked", "replaced"])
@pytest.mark.parametrize("sync", ["0", "1ms", "never"])
def test_a_journal_that_loses_its_name_is_written_anew(serve, tmp_path, caplog, how, sync):
    server = serve("[queue]\nsync_journal = %s\n" % sync)
    client = server.client()
    path = tmp_path / "spool" / "q"
    assert client.put("q", b"1") == client.put("q", b"2") == "STORED\r\n"
    until(lambda: sync == "never" or not server.server.broker.queues["q"].needs_sync()
          and not server.server.syncs._running)
    path.unlink()
    if how == "replaced":
        path.write_bytes(b"not a journal")
    expected = [b"1", b"2"]
    for number in range(20):
        data = b"more%d" % number
        if client.put("q", data) == "STORED\r\n":
            expected.append(data)
    if sync != "never":
        until(lambda: "written anew" in caplog.text)
        until(lambda: client.put("q", b"last") == "STORED\r\n")
        expected.append(b"last")
        assert contents_of(tmp_path / "spool") == expected
    server.stop()
    assert contents_of(tmp_path / "spool") == expected
    assert caplog.text.count("written anew") == 1


def test_a_large_set_and_get_leave_the_loop_to_others(serve, monkeypatch):
    """Writing and reading it are left to the worker; meanwhile others are served."""
    server = serve("[queue]\nsync_journal = never\nmax_memory_size = 1mb\n")
    client, other = server.client(), server.client()
    other.put("q", b"x")
    data = os.urandom(5 << 20)
    client.put("big", b"small")
    gate, waiting = threading.Event(), threading.Event()
    threads = set()

    def slow(name):
        real = getattr(os, name)

        def call(fd, what, *rest):
            if max(what if isinstance(what, int) else len(what), 0) > 1 << 20:
                threads.add(threading.current_thread().name)
                waiting.set()
                assert gate.wait(20)
            return real(fd, what, *rest)

        monkeypatch.setattr(kestrel.os, name, call)

    slow("pwrite")
    slow("pread")
    client.send(b"set big 0 0 %d\r\n%b\r\nget big\r\nget big\r\n" % (len(data), data))
    assert waiting.wait(20)
    for _ in range(20):
        assert other.get("q/open") == b"x" and other.get("q/abort") is None
    other.send("set big 0 0 4\r\nlate\r\n")       # waits for what comes before it
    assert other.get is not None
    gate.set()
    assert client.line() == "STORED\r\n"
    assert other.line() == "STORED\r\n"
    assert client.item() == b"small"
    assert client.item() == data
    assert threads == {"worker"}
    assert client.get("big") == b"late"


def test_a_large_set_that_fails_is_undone_with_all_that_followed(serve, disk):
    server = serve("[queue]\nsync_journal = never\n")
    client, other = server.client(), server.client()
    assert client.put("q", b"1") == "STORED\r\n"
    disk.failing, disk.once = {"pwrite": errno.ENOSPC}, True
    assert client.put("q", b"x" * (3 << 20)) == "SERVER_ERROR q: No space left on device\r\n"
    assert other.put("q", b"2") == "STORED\r\n"
    assert [other.get("q") for _ in range(3)] == [b"1", b"2", None]


def test_what_is_no_file_is_left_alone(serve, tmp_path, caplog):
    """A pipe named like a queue once kept the server from starting, without a word."""
    spool = tmp_path / "spool"
    spool.mkdir()
    os.mkfifo(str(spool / "pipe"))
    (spool / "link").symlink_to(spool / "pipe")
    (spool / "null").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.getcwd()
        os.chdir(str(spool))                 # the path may be too long for a socket
        try:
            sock.bind("sock")
        finally:
            os.chdir(here)
    server = serve("")
    client = server.client()
    for name in ("pipe", "link", "null", "sock"):
        assert "%s: not a regular file, left alone" % (spool / name) in caplog.text
        assert client.put(name, b"x") == "SERVER_ERROR %s: not a regular file\r\n" % name
    assert client.put("q", b"x") == "STORED\r\n" and client.get("q") == b"x"


def test_a_queue_that_cannot_be_read_stops_nobody(tmp_path, disk, caplog):
    calls = []
    config = config_of(tmp_path, DEEP + "[queue brief]\nmax_items = 300\nexpire_to_queue = late\n"
                       "[queue late]\nmax_items = 150\ndiscard_old_when_full = true\n")
    broker = kestrel.Broker(config, lambda delay, call: calls.append(call) or (lambda: None), NOW)
    fill_deep(broker, "brief", NOW + 5)
    fill_deep(broker, "q", NOW + 5)
    fill_deep(broker, "late")
    disk.failing = {"open": errno.EMFILE}
    list(broker.sweep(NOW + 10))
    for _ in range(3):
        commit(broker, NOW + 10)
    assert "not dropped" in caplog.text and "cannot be moved" in caplog.text
    disk.failing = {}
    for _ in range(5):
        list(broker.sweep(NOW + 10))
        while calls:
            calls.pop(0)()
        commit(broker, NOW + 10)
    assert broker.queues["q"].count == 0


def test_a_waiter_that_cannot_be_served_is_served_later(tmp_path, disk):
    queue = turn_queue(tmp_path, max_memory_size=1000)
    calls = queue.host.calls
    for number in range(60):
        queue.add(b"%d" % number * 100, expiry=NOW + 5, now=NOW)
    queue.write()
    got = []
    queue.wait(kestrel.Waiter(lambda queue, item: got.append(item)))
    disk.failing = {"open": errno.EMFILE}
    queue.add(b"good", now=NOW + 10)         # behind what has expired and cannot be read
    assert got == [] and queue.waiters
    disk.failing = {}
    queue.write()
    while calls and not got:
        calls.pop(0)()
    assert [item.data for item in got] == [b"good"]


def test_the_worker_outlives_what_it_does():
    woken = threading.Semaphore(0)
    worker = kestrel.Worker(woken.release)

    def fail():
        raise OSError(errno.EIO, "no")

    worker.submit(fail, "first")
    worker.submit(lambda: None, "second")
    assert woken.acquire(timeout=20) and woken.acquire(timeout=20)
    assert [(call, error and error.errno) for call, error in worker.done] == [
        ("first", errno.EIO), ("second", None)]
    worker.stop(20)


def test_no_turn_is_made_for_a_job_that_is_held(serve, monkeypatch):
    server = serve("[queue]\nsync_journal = 0\n")
    client, other = server.client(), server.client()
    for name in "abc":
        client.put(name, b"x")
    held = HeldFsync(monkeypatch)
    held.hold(client, "flush_all\r\n")
    other.ask("version\r\n")
    turns = server.count_turns()
    for _ in range(20):
        other.ask("version\r\n")
    assert len(turns) < 100
    held.disarm()
    assert client.line() == "Flushed all queues.\r\n"


def test_a_half_closed_client_gets_the_whole_of_a_long_answer(serve):
    port = free_port()
    server = serve("[server]\nadmin_port = %d\n" % port)
    client = server.client()
    for number in range(150):
        client.put("q%d" % number, b"x")
    for command, at, end in ((b"stats\r\n", server.port, b"END\r\n"),
                             (request("GET /metrics").encode(), port, b"\n"),
                             (b"flush_all\r\n", server.port, b"Flushed all queues.\r\n")):
        with Client(at) as one:
            one.send(command)
            one.sock.shutdown(socket.SHUT_WR)
            assert one.file.read().endswith(end)
    assert client.stats()["curr_items"] == "0"
    until(lambda: client.stats()["curr_connections"] == "1")


def test_commands_behind_a_wait_that_failed_are_answered(serve, disk):
    server = serve("[queue]\nsync_journal = never\n")
    client = server.client()
    client.put("q", b"1")
    client.get("q/open")
    disk.failing = {"pwrite": errno.ENOSPC}
    client.send("get q/close/open/t=60000\r\nversion\r\n")
    assert client.line() == "SERVER_ERROR q: No space left on device\r\n"
    assert client.line() == "VERSION 1.0.0\r\n"
    disk.failing = {}


def test_the_end_waits_for_answers_that_wait_for_one_fsync_after_the_other(serve, monkeypatch):
    server = serve("[queue]\nsync_journal = 0\n")
    first, second = server.client(), server.client()
    held = HeldFsync(monkeypatch)
    held.hold(first, "set q 0 0 1\r\nx\r\n")
    second.send("set q 0 0 1\r\ny\r\n")
    until(lambda: server.server.syncs.wanted)
    server.server.broker.stopping = True
    server.server.interrupt()
    until(lambda: not server.server.listeners[0].sock.fileno() >= 0)
    held.disarm()
    assert first.line() == second.line() == "STORED\r\n"


def test_a_delete_that_fails_leaves_no_lock(serve, disk):
    server = serve("[queue]\nsync_journal = never\n")
    client = server.client()
    client.put("q", b"x")
    disk.failing = {"unlink": errno.EIO}
    assert client.ask("delete q\r\n").startswith("SERVER_ERROR")
    disk.failing = {}
    assert client.put("q", b"y") == "STORED\r\n"


def test_keep_journal_that_cannot_begin_writes_nothing_behind_the_old(tmp_path, disk):
    talk = Talk(tmp_path)
    talk(set_("q", "old"))
    for queue in talk.broker.queues.values():
        queue.close()
    talk = Talk(tmp_path, "[queue]\nkeep_journal = false\n")
    talk(set_("q", "1"))
    (tmp_path / "kestrel.conf").write_text("")
    disk.failing = {"rename": errno.EIO}
    reload(talk.broker)
    run_tasks(talk.broker)
    disk.failing = {}
    assert talk.broker.queues["q"].journal is None
    assert contents_of(tmp_path / "spool") == [b"old"]
    reload(talk.broker)
    run_tasks(talk.broker)
    assert talk(set_("q", "2")) == "STORED\r\n"
    assert contents_of(tmp_path / "spool") == [b"1", b"2"]
    lost, = (tmp_path / "spool" / "lost+found").iterdir()       # nobody has read what is in it
    assert addx(b"old")[-3:] in lost.read_bytes()


def test_who_comes_from_an_address_of_this_machine_is_local(serve):
    server = serve("[server]\nlisten = 0.0.0.0\nadmin_commands = local\n")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.99", 9))           # nothing is sent
            client = Client(server.port, probe.getsockname()[0])
    except OSError:                          # a machine without any
        client = server.client()
    with client:
        assert client.ask("reload\r\n") == "Reloaded config.\r\n"


def test_a_server_with_passwords_and_tls(serve, tmp_path):
    port = free_port()
    server = serve(secured(tmp_path, "admin_port = %d\n" % port))
    clients = [tls_client(server.port, tmp_path) for _ in range(3)]
    good, bad, silent = clients
    assert good.ask(LOGIN) == "STORED\r\n"
    assert good.put("q", b"x" * (8 << 20)) == "STORED\r\n"
    assert good.get("q") == b"x" * (8 << 20)
    assert good.get("q/t=1") is None
    assert bad.ask("get q\r\n") == "CLIENT_ERROR unauthenticated\r\n"
    assert bad.line() == ""
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    token = base64.b64encode(b"bob:a secret").decode()
    with urllib.request.urlopen(urllib.request.Request(
            "https://localhost:%d/ping" % port, headers={"Authorization": "Basic " + token}),
            context=context) as answer:
        assert answer.read() == b"pong\n"
    with kestrel.Client("localhost", server.port, user="ann", password="a secret",
                        tls=context) as client:
        client.put("q", b"y")
        with client.open("q") as data:
            assert data == b"y"
    with pytest.raises(kestrel.ServerError, match="authentication failure"):
        kestrel.Client("localhost", server.port, user="ann", password="x", tls=context)
    with pytest.raises(ssl.SSLError):        # a certificate that it cannot know
        kestrel.Client("localhost", server.port, tls=ssl.create_default_context())
    for client in clients:
        client.close()
    assert server.thread.is_alive()


def test_the_end_of_a_tls_connection_is_told(serve, tmp_path):
    """Else it could be cut short by somebody else."""
    server = serve(secured(tmp_path))
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    with context.wrap_socket(Client(server.port).sock, server_hostname="localhost",
                             suppress_ragged_eofs=False) as sock:
        sock.sendall(LOGIN.encode() + b"version\r\nquit\r\n")
        said = b""
        for piece in iter(lambda: sock.recv(1000), b""):
            said += piece
        assert said == b"STORED\r\nVERSION 1.0.0\r\n"


def test_who_does_not_log_in_has_to_go_and_who_does_may_stay(serve, tmp_path, skip):
    server = serve(secured(tmp_path, "client_timeout = 1h\n"))
    mute, shy, good = Client(server.port), tls_client(server.port, tmp_path), tls_client(
        server.port, tmp_path)
    assert good.ask(LOGIN) == "STORED\r\n"
    for char in "set any 0 0 12\r\nbob a secre":      # a byte now and then is not enough
        shy.send(char)
        skip(2, server.server)
    assert good.ask("version\r\n") == "VERSION 1.0.0\r\n"
    assert len(server.server.connections) == 3
    skip(10, server.server)
    assert shy.line() == mute.line() == ""
    skip(1000, server.server)
    assert good.ask("version\r\n") == "VERSION 1.0.0\r\n"
    for client in (mute, shy, good):
        client.close()


def test_who_hangs_up_before_the_password_is_checked_is_not_kept(serve, tmp_path, monkeypatch):
    go_on, checked = threading.Semaphore(0), []
    monkeypatch.setattr(kestrel, "is_password", lambda password, stored: (
        checked.append(password), go_on.acquire(timeout=20))[1])
    server = serve(secured(tmp_path, tls=False))
    clients = [Client(server.port) for _ in range(5)]
    for client in clients:
        client.send(LOGIN)
    until(lambda: checked and len(server.server.broker.logins._lines["this machine"]) == 5)
    for client in clients:
        client.close()
    until(lambda: all(one.session.at_end for one in list(server.server.connections.values())))
    go_on.release()
    until(lambda: not server.server.broker.logins._lines and not server.server.connections)
    assert len(checked) == 1
    with Client(server.port) as client:                # known by now
        client.send(LOGIN + "version\r\n")
        client.sock.shutdown(socket.SHUT_WR)
        assert client.file.read() == b"STORED\r\nVERSION 1.0.0\r\n"


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_tls_versions_and_client_certificates(serve, tmp_path, version):
    (tmp_path / "two.pem").write_text(TWO)
    server = serve(secured(tmp_path, "tls_client_ca = %s\n" % (tmp_path / "ca.pem"))
                   .replace("auth_file", "#"))
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with pytest.raises((ssl.SSLError, ConnectionError)):
        with kestrel.Client("localhost", server.port, tls=context) as client:
            client.stats()
    context.load_cert_chain(str(tmp_path / "two.pem"))
    with kestrel.Client("localhost", server.port, tls=context) as client:
        assert client.put("q", b"x") and client.get("q") == b"x"


def test_nothing_is_read_from_a_socket_that_was_gone_before_tls_began():
    """Older Pythons (before CVE-2023-40217 was mended) give such a socket what came in plain."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslsocket_class = kestrel.tls_socket_class()
    with socket.socket() as sock, pytest.raises(ConnectionError):
        context.wrap_socket(sock, True, do_handshake_on_connect=False).recv(100)


def test_handshakes_come_last_and_a_few_a_turn():
    server = types.SimpleNamespace(waiting={"w1", "w2"}, greeting=set("abcdefgh"))
    events = [(one, True) for one in ["a", "b", "c", "r1", "d", "w1", "e", "f", "r2", "w2"]]
    assert [one for one, _ in kestrel.Server._in_order(server, events)] == [
        "w1", "w2", "r1", "r2", "a", "b", "c", "d"]


def test_many_handshakes_at_once_are_all_made(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(kestrel, "_GREETINGS", 1)
    server = serve(secured(tmp_path))
    first = tls_client(server.port, tmp_path)
    assert first.ask(LOGIN) == "STORED\r\n"
    clients = []

    def come():
        clients.append(tls_client(server.port, tmp_path))
        clients[-1].send(LOGIN)

    threads = [threading.Thread(target=come) for _ in range(10)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        assert first.ask("version\r\n") == "VERSION 1.0.0\r\n"
    for thread in threads:
        thread.join()
    for client in clients:
        assert client.line() == "STORED\r\n"
        client.close()
    first.close()
    with Client(server.port):
        until(lambda: server.server.greeting)
    until(lambda: not (server.server.greeting or server.server.connections))


def test_a_client_of_tls_may_be_idle_from_the_first(serve, tmp_path, skip):
    """Only the handshake has to come in time: it was hung up on, as no client in plain is."""
    server = serve(secured(tmp_path).replace("auth_file", "# auth_file"))
    with tls_client(server.port, tmp_path) as client, Client(server.port) as silent:
        until(lambda: len(server.server.connections) == 2)
        skip(kestrel.LOGIN_MS / 1000, server.server)
        assert silent.line() == ""
        assert client.ask("version\r\n") == "VERSION 1.0.0\r\n"


@pytest.mark.parametrize("how", ["quit", "stop", "timeout", "half-close"])
def test_a_client_of_tls_can_tell_the_end_from_an_attack(serve, tmp_path, skip, how):
    """A server that stopped, or closed an idle connection, said no close_notify."""
    server = serve(secured(tmp_path, "client_timeout = 1m\n").replace("auth_file", "# auth_file"))
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as plain:
        with context.wrap_socket(plain, server_hostname="localhost",
                                 suppress_ragged_eofs=False) as client:
            client.sendall(b"version\r\n")
            assert client.recv(100) == b"VERSION 1.0.0\r\n"
            if how == "half-close":
                client.unwrap()              # waits for that of the other side
                return
            if how == "quit":
                client.sendall(b"quit\r\n")
            elif how == "stop":
                server.stop()
            else:
                skip(60, server.server)
            assert client.recv(100) == b""   # it would raise an error


def test_passwords_are_checked_while_journals_are_fsynced(serve, tmp_path, monkeypatch):
    go_on, checking = threading.Semaphore(0), threading.Semaphore(0)
    server = serve(secured(tmp_path, tls=False) + "[queue]\nsync_journal = 0\n")
    good, late = server.client(), server.client()
    assert good.ask(LOGIN) == "STORED\r\n"
    monkeypatch.setattr(kestrel, "is_password", lambda password, stored: (
        checking.release(), go_on.acquire(timeout=20))[1])
    late.send(LOGIN.replace("a s", "b s"))
    assert checking.acquire(timeout=20)
    assert good.put("q", b"x") == "STORED\r\n"
    go_on.release()
    assert late.line() == "STORED\r\n"


def test_older_tls_and_none_at_all_are_refused(serve, tmp_path, caplog):
    caplog.set_level("INFO")
    server = serve(secured(tmp_path))
    with Client(server.port) as plain:       # it was reset, and nobody knew why
        plain.send("set q 0 0 100000\r\n" + "x" * 100000 + "\r\nversion\r\n")
        assert plain.file.read() == b"CLIENT_ERROR this port takes TLS only\r\n"
    until(lambda: re.search("memcache client 127.0.0.1:[0-9]+ speaks no TLS to a port with TLS:",
                            caplog.text))
    assert server.server.broker.config.tls.minimum_version == ssl.TLSVersion.TLSv1_2
    for client in (Client(server.port), Client(server.port)):    # neither says anything
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    with tls_client(server.port, tmp_path) as client:
        assert client.ask(LOGIN) == "STORED\r\n"


def test_a_reload_brings_new_certificates_and_users(serve, tmp_path, caplog):
    server = serve(secured(tmp_path))

    def presents():
        with tls_client(server.port, tmp_path) as client:
            return dict(field for group in client.sock.getpeercert()["subject"]
                        for field in group)["commonName"]

    before = tls_client(server.port, tmp_path)
    assert before.ask(LOGIN) == "STORED\r\n" and presents() == "one"
    (tmp_path / "server.pem").write_text("nothing")
    assert "SERVER_ERROR" in before.ask("reload\r\n")
    assert presents() == "one"
    (tmp_path / "server.pem").write_text(TWO)
    (tmp_path / "users").write_text("eve:%s\n" % SECRET)
    assert before.ask("reload\r\n") == "Reloaded config.\r\n"
    assert presents() == "two"
    assert before.ask("version\r\n") == "VERSION 1.0.0\r\n"
    with tls_client(server.port, tmp_path) as client:
        assert client.ask(LOGIN.replace("bob", "eve")) == "STORED\r\n"
    with tls_client(server.port, tmp_path) as client:
        assert "failure" in client.ask(LOGIN)
    before.close()


def test_a_reload_can_change_allow_and_admin_commands_but_not_the_users_file(
        serve, tmp_path, caplog):
    server = serve("[server]\nallow = 127.0.0.1\n")
    client = server.client()
    assert client.ask("version\r\n") == "VERSION 1.0.0\r\n"
    text = secured(tmp_path, "allow = 10.0.0.1\nadmin_commands = none\n", tls=False)
    (tmp_path / "kestrel.conf").write_text(text)
    assert client.ask("reload\r\n") == "Reloaded config.\r\n"
    assert "auth_file changes with the next start only" in caplog.text
    assert "allow changes" not in caplog.text
    assert server.server.broker.config.users is None
    assert client.ask("reload\r\n") == "CLIENT_ERROR reload is turned off (admin_commands)\r\n"
    with server.client() as other, contextlib.suppress(ConnectionError):
        other.send("version\r\n")
        assert other.line() == ""
    assert client.ask("version\r\n") == "VERSION 1.0.0\r\n"


def test_tls_clients_leave_nothing_behind(serve, tmp_path):
    server = serve(secured(tmp_path))
    with no_cycles(kestrel.Connection, kestrel.Session, kestrel.tls_socket_class()):
        for number in range(5):
            with tls_client(server.port, tmp_path) as client:
                client.ask(LOGIN if number % 2 else "get q\r\n")
            with Client(server.port) as client, contextlib.suppress(ConnectionError):
                client.ask("version\r\n")
        until(lambda: not server.server.connections)


def test_a_unix_socket(serve, short_path, caplog):
    caplog.set_level("INFO")
    path = short_path / "k.sock"
    server = serve("[server]\nlisten = 127.0.0.1, unix:%s\nsocket_mode = 0620\n"
                   "allow = 10.0.0.1\nadmin_commands = local\n" % path)
    assert os.stat(str(path)).st_mode & 0o777 == 0o620
    with UnixClient(path) as client:
        assert client.put("q", b"x") == "STORED\r\n" and client.get("q") == b"x"
        assert client.ask("flush_all\r\n") == "Flushed all queues.\r\n"    # it is local
        assert client.ask("reload\r\n") == "Reloaded config.\r\n"
    assert "queue q created by memcache client unix:%s\n" % path in caplog.text
    with kestrel.Client("unix:%s" % path) as client:
        client.put("q", b"y")
        assert client.get("q") == b"y"
    server.stop()
    assert not path.exists()


def test_unix_sockets_that_are_left_in_use_or_no_sockets(tmp_path, short_path):
    path = short_path / "k.sock"
    text = "[server]\nlisten = unix:%s\n" % path
    left = socket.socket(socket.AF_UNIX)     # of a server that was killed
    left.bind(str(path))
    left.close()
    server = kestrel.Server(config_of(tmp_path, text, memcache_port="0"))
    assert server.port is None and len(server.listeners) == 1
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(OSError, match="cannot listen on unix:%s: Address already in use" % path):
        kestrel.Server(config_of(other, text))
    stop(server)
    assert not path.exists()
    path.write_text("something else")
    with pytest.raises(OSError, match="cannot listen on unix:.*: there is something else"):
        kestrel.Server(config_of(other, text))
    assert path.read_text() == "something else"
    with pytest.raises(OSError, match="cannot listen on unix:.*too long"):
        kestrel.Server(config_of(other, "[server]\nlisten = unix:%s\n" % (short_path / ("x" * 200))))


def test_a_second_server_does_not_take_the_socket_of_one_that_is_loading(tmp_path, short_path):
    """It is bound before the journals are read, and listens after."""
    path = short_path / "k.sock"
    config = config_of(tmp_path, "[server]\nlisten = unix:%s\n" % path)
    held = kestrel._lock_spool(config.server.queue_path)
    with pytest.raises(OSError, match="held by another server" + (
            r" \(process %d, " % os.getpid() if os.path.exists("/proc/locks") else "")):
        kestrel.Server(config)
    os.close(held)
    assert not path.exists()


def test_several_addresses_and_protocols(serve, short_path):
    text = free_port()
    other = "::1" if HAS_IPV6 else "127.0.0.2"
    server = serve("[server]\nlisten = 127.0.0.1, %s, unix:%s\ntext_port = %d\n" % (
        other, short_path / "k", text))
    other_name = "[::1]" if HAS_IPV6 else other
    assert [(one.protocol, one.name.rpartition(":")[0]) for one in server.server.listeners] == [
        ("memcache", "127.0.0.1"), ("memcache", other_name), ("memcache", "unix"),
        ("text", "127.0.0.1"), ("text", other_name)]
    for address in ("127.0.0.1", other):
        with Client(text, address) as client:
            assert client.ask("version\n") == ":1.0.0\n"


def test_every_address_of_both_kinds(tmp_path):
    addresses = ["0.0.0.0", "::"][:1 + HAS_IPV6]
    server = kestrel.Server(config_of(
        tmp_path, "[server]\nlisten = %s\n" % ", ".join(addresses), memcache_port="0"))
    assert [one.address[0] for one in server.listeners] == addresses
    for one in server.listeners[1:]:         # with the port of the first one it is in its way else
        assert one.sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
    stop(server)


@pytest.mark.parametrize("address, settings, warned", [
    ("127.0.0.1", "", 0), ("0.0.0.0", "", 1), ("0.0.0.0", "allow = 127.0.0.1", 0),
    ("0.0.0.0", "auth_file = {path}/users", 0), ("0.0.0.0", "tls_cert = {path}/server.pem", 1),
    ("0.0.0.0", "tls_cert = {path}/server.pem\ntls_client_ca = {path}/ca.pem", 0)])
def test_one_warning_if_there_is_no_rule_of_access(
        serve, tmp_path, caplog, address, settings, warned):
    secured(tmp_path)
    server = serve("[server]\nlisten = %s\nadmin_port = %d\n%s\n" % (
        address, free_port(), settings.replace("{path}", str(tmp_path))))
    until(lambda: not server.server.active and server.server.listeners)
    server.stop()
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == warned
    assert ("anybody who can reach 0.0.0.0" in caplog.text) == bool(warned)


def test_a_client_that_takes_nothing_is_closed_and_its_items_go_back(serve, caplog, skip):
    server = serve("[server]\nmax_output_buffer = 64kb\n")
    client, greedy = server.client(), server.client()
    greedy.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.put("q", b"x" * (8 << 20))
    greedy.send("get q/open\r\n")
    until(lambda: skip(10, server.server) or "is not reading its answers" in caplog.text)
    assert client.get("q") == b"x" * (8 << 20)
    assert client.stats()["curr_connections"] == "1"


def test_a_client_that_speaks_but_takes_nothing_is_closed(tmp_path, skip):
    with turned_by_hand(tmp_path, "[server]\nsend_timeout = 60s\n", 1) as (server, (client,)):
        put_some(server, "q", b"x" * (8 << 20))
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection, = server.connections.values()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.send(b"get q/peek\r\n")
        before, left = -1, 0
        while not left or left != before:    # until the kernel takes no more of the answer
            before = left
            for _ in range(50):
                server.interrupt()
                server.turn()
            time.sleep(0.005)
            left = sum(map(len, connection.unsent))
        for number in range(8):
            assert number > 5 or len(server.connections) == 1
            skip(10)
            with contextlib.suppress(OSError):
                client.send(b"v")
            for _ in range(3):
                server.interrupt()
                server.turn()
        assert not server.connections


def test_send_timeout_begins_when_a_part_of_the_answer_is_taken(tmp_path, skip):
    """It began when the client had asked, though the answer had waited for the disk since."""
    with turned_by_hand(tmp_path, "[server]\nsend_timeout = 60s\n", 1) as (server, (client,)):
        connection, = server.connections.values()
        real, taken = connection.sock, []

        class Sock:
            def __getattr__(self, name):
                return getattr(real, name)

            def send(self, data):
                if taken:
                    raise BlockingIOError
                taken.append(data)
                return 1

        connection.sock = Sock()
        connection.session.out.append(b"END\r\n")
        connection.last_active -= 100
        server._answer([connection], {}, {})
        assert connection.unsent == [b"ND\r\n"] and connection.last_active == server.mono
        connection.sock = real


@pytest.mark.parametrize("with_tls", [False, True])
def test_a_client_that_takes_its_answer_slowly_is_not_closed(serve, tmp_path, skip, with_tls):
    server = serve((secured(tmp_path) if with_tls else "[server]\n") + "send_timeout = 20s\n")
    slow = tls_client(server.port, tmp_path) if with_tls else server.client()
    assert not with_tls or slow.ask(LOGIN) == "STORED\r\n"
    slow.put("q", b"x" * (4 << 20))
    connection, = server.server.connections.values()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    slow.send("get q\r\n")
    left = 4 << 20
    while left > 0:
        data = slow.sock.recv(1 << 16)
        assert data
        left -= len(data)
        skip(0.5, server.server)             # longer in all than send_timeout
    slow.close()


@pytest.mark.parametrize("allow, served", [
    ("", True), ("127.0.0.1", True), ("127.0.0.0/8, ::1", True), ("10.0.0.0/8", False)])
def test_only_those_in_allow_come_in(serve, caplog, allow, served):
    port = free_port()
    server = serve("[server]\nallow = %s\nadmin_port = %d\n" % (allow, port))
    for number in (server.port, port):
        with Client(number) as client, contextlib.suppress(ConnectionError):
            client.send("GET /ping HTTP/1.1\r\n\r\n" if number == port else "version\r\n")
            assert bool(client.line()) == served
    assert ("127.0.0.1 is not among those in allow" in caplog.text) == (not served)
    assert server.thread.is_alive()


PROXY_2 = b"\r\n\r\n\0\r\nQUIT\n"
V6 = bytes(15) + b"\1"


@pytest.mark.parametrize("header, found", [
    (b"PROXY TCP4 10.1.2.3 10.0.0.1 5678 22133\r\n", ("10.1.2.3", 5678)),
    (b"PROXY TCP6 2001:db8::7 ::1 5678 22133\r\n", ("2001:db8::7", 5678)),
    (b"PROXY UNKNOWN\r\n", None), (b"PROXY UNKNOWN ff:: ::1 1 2\r\n", None),
    (PROXY_2 + b"\x21\x11\0\x0c\x0a\1\2\3\x0a\0\0\1\x16\x2e\x56\x75", ("10.1.2.3", 5678)),
    (PROXY_2 + b"\x21\x11\0\x0f\x0a\1\2\3\x0a\0\0\1\x16\x2e\x56\x75\4\0\0", ("10.1.2.3", 5678)),
    (PROXY_2 + b"\x21\x21\0\x24" + V6 + V6 + b"\x16\x2e\x56\x75", ("::1", 5678)),
    (PROXY_2 + b"\x20\0\0\0", None), (PROXY_2 + b"\x21\0\0\2ab", None),
    (PROXY_2 + b"\x21\x31\0\xd8" + bytes(216), None),
    (b"PROXY TCP4 10.1.2.3 10.0.0.1 5678\r\n", ValueError), (b"PROXYTCP4 \r\n", ValueError),
    (b"PROXY TCP4 name 10.0.0.1 5678 22133\r\n", ValueError), (b"version\r\n", ValueError),
    (b"PROXY TCP4 10.1.2.3 10.0.0.1 -1 22133\r\n", ValueError),
    (b"PROXY TCP6 fe80::1%a\nb ::1 1 22133\r\n", ValueError),
    (b"PROXY TCP4 10.1.2.3 10.0.0.1 x 22133\r\n", ValueError), (b"\x16\3\1", ValueError),
    (b"PROXY " + b"x" * 101, ValueError), (PROXY_2 + b"\x22\x11\0\x0c", ValueError),
    (PROXY_2 + b"\x11\x11\0\x0c", ValueError), (PROXY_2 + b"\x21\x11\xff\0", ValueError),
    (PROXY_2 + b"\x21\x11\0\4\0\0\0\0", ValueError)])
def test_the_header_of_the_proxy_protocol(header, found):
    """Whole, and however many of its bytes have come."""
    if found is ValueError:
        with pytest.raises(ValueError):
            kestrel._parse_proxy_header(header)
    else:
        assert kestrel._parse_proxy_header(header + b"version\r\n") == (found, len(header))
        for size in range(len(header)):
            assert kestrel._parse_proxy_header(header[:size]) is None


@pytest.mark.parametrize("with_tls", [False, True])
def test_clients_behind_a_proxy_are_known(serve, tmp_path, caplog, with_tls):
    """On all ports, in pieces, for the log, `clients` and `allow`; with TLS it comes before that."""
    caplog.set_level("INFO")
    ports = {name: free_port() for name in (("admin",) if with_tls else ("text", "thrift", "admin"))}
    text = secured(tmp_path, "".join("%s_port = %d\n" % pair for pair in ports.items()),
                   tls=with_tls) if with_tls else "[server]\n" + "".join(
                       "%s_port = %d\n" % pair for pair in ports.items())
    server = serve(text + "proxy_protocol = 127.0.0.1\nallow = 10.0.0.0/8, ::1\n")

    def come(port, header):
        client = Client(port)
        for byte in range(len(header)):
            client.send(header[byte:byte + 1])
        if with_tls:
            client.file.close()
            client.sock = ssl.create_default_context(cafile=str(tmp_path / "ca.pem")).wrap_socket(
                client.sock, server_hostname="localhost")
            client.file = client.sock.makefile("rb")
        return client

    first = come(server.port, b"PROXY TCP4 10.1.2.3 10.0.0.1 5678 22133\r\n")
    second = come(server.port, PROXY_2 + b"\x21\x21\0\x24" + V6 + V6 + b"\0\7\0\1")
    for client in (first, second):
        assert not with_tls or client.ask(LOGIN) == "STORED\r\n"
        assert client.put("q", b"x") == "STORED\r\n"
    first.send("clients\r\n")
    who = [line.split()[2] for line in iter(first.line, "END\r\n")]
    assert who == ["10.1.2.3:5678", "[::1]:7"]
    with come(ports["admin"], b"PROXY TCP4 10.9.9.9 10.0.0.1 1 2\r\n") as client:
        assert client.ask("GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n").split()[1] == "200"
    if not with_tls:
        with come(ports["text"], b"PROXY UNKNOWN\r\n") as client:    # its own: not in allow
            assert client.file.read() == b""
        with come(ports["text"], b"PROXY TCP4 10.1.2.3 10.0.0.1 1 2\r\n") as client:
            assert client.ask("version\n").startswith(":")
        with come(ports["thrift"], b"PROXY TCP4 10.1.2.3 10.0.0.1 1 2\r\n") as client:
            assert client.sock.send(b"\0\0\0\4")        # of a frame
        for begin in ("version\r\n", "PROXY TCP4 11.1.2.3 10.0.0.1 1 2\r\nversion\r\n"):
            with Client(server.port) as client, contextlib.suppress(ConnectionError):
                client.send(begin)
                assert client.file.read() == b""
        for told in ("127.0.0.1 is not among those in allow", "11.1.2.3 is not among those",
                     "is closed: no header of the PROXY protocol"):
            until(lambda told=told: told in caplog.text)
    until(lambda: not server.server.introductions)


def test_a_proxy_that_is_not_named_is_not_believed(serve, caplog):
    caplog.set_level("INFO")
    server = serve("[server]\nproxy_protocol = 10.0.0.1\n")
    with Client(server.port) as client:
        client.send("PROXY TCP4 10.1.2.3 10.0.0.1 5678 22133\r\nset q 0 0 1\r\nx\r\n")
        assert client.file.read() == b"ERROR unknown command\r\n"
    with Client(server.port) as client:
        client.send(PROXY_2 + b"\x21\0\0\0")
        assert client.file.read().endswith(b"ERROR this protocol is not supported\r\n")
    assert "but is not among those in proxy_protocol" in caplog.text
    with Client(server.port) as client:
        assert client.get("q") is None


def test_proxies_that_say_nothing_count_as_connections(serve, skip):
    server = serve("[server]\nproxy_protocol = 127.0.0.1\nmax_connections = 3\n")
    silent = [Client(server.port) for _ in range(3)]
    until(lambda: len(server.server.introductions) == 3)
    with Client(server.port) as client, contextlib.suppress(ConnectionError):
        assert client.file.read() == b""
    skip(kestrel.LOGIN_MS / 1000, server.server)
    for client in silent:
        assert client.file.read() == b""     # closed after a while
    assert not server.server.introductions
    with Client(server.port) as client:
        assert client.ask("PROXY UNKNOWN\r\nversion\r\n").startswith("VERSION")
    with Client(server.port) as client:      # it is hung up on at the end
        client.send("PROXY ")
        until(lambda: any(one._head for one in list(server.server.introductions)))
        server.stop()
        assert client.file.read() == b""


def test_an_unexpected_error_costs_one_proxy(serve, monkeypatch, caplog):
    server = serve("[server]\nproxy_protocol = 127.0.0.1\n")
    with monkeypatch.context() as patch:
        patch.setattr(kestrel, "_parse_proxy_header", lambda data: 1 // 0)
        with Client(server.port) as client, contextlib.suppress(ConnectionError):
            client.send("PROXY UNKNOWN\r\n")
            assert client.file.read() == b""
    assert "ZeroDivisionError" in caplog.text and not server.server.introductions
    with Client(server.port) as client:
        assert client.ask("PROXY UNKNOWN\r\nversion\r\n").startswith("VERSION")
    caplog.clear()


def test_addresses_in_other_clothes():
    for text, ip in (("::ffff:10.1.2.3", "10.1.2.3"), ("fe80::1%eth0", "fe80::1"), ("::1", "::1")):
        assert kestrel._ip_of(text) == ipaddress.ip_address(ip)


def test_more_connections_than_there_may_be(serve, caplog):
    server = serve("[server]\nmax_connections = 3\n")
    clients = [server.client() for _ in range(3)]
    for client in clients:
        assert client.ask("version\r\n") == "VERSION 1.0.0\r\n"
    for _ in range(5):
        with pytest.raises(ConnectionError):
            if not server.client().ask("version\r\n"):
                raise ConnectionError
    assert caplog.text.count("max_connections: 3 connections, another is refused") == 5
    clients.pop().close()
    until(lambda: clients[0].stats()["curr_connections"] == "2")
    assert server.client().ask("version\r\n") == "VERSION 1.0.0\r\n"


@promise(5)
def test_only_so_many_journal_files_are_open(serve, monkeypatch):
    monkeypatch.setattr(kestrel, "_share_descriptors", lambda: (100, 5))
    server = serve("[queue]\nsync_journal = 1ms\n")
    client = server.client()
    for _ in range(3):
        for number in range(20):
            assert client.put("q%d" % number, b"x") == "STORED\r\n"
    journals = [queue.journal for queue in server.server.broker.queues.values()]
    assert sum(journal.current.fd is not None for journal in journals) == 5
    for number in range(20):
        assert [client.get("q%d" % number) for _ in range(4)] == [b"x", b"x", b"x", None]


def test_a_journal_that_cannot_be_opened_costs_only_its_queue(serve, tmp_path):
    (tmp_path / "spool" / "bad").mkdir(parents=True)
    client = serve().client()
    for _ in range(2):
        assert client.put("bad", b"x") == "SERVER_ERROR bad: Is a directory\r\n"
        assert client.ask("get bad\r\n") == "SERVER_ERROR bad: Is a directory\r\n"
        assert client.put("good", b"x") == "STORED\r\n" and client.get("good") == b"x"
    (tmp_path / "spool" / "bad").rmdir()
    assert client.put("bad", b"x") == "STORED\r\n" and client.get("bad") == b"x"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_no_descriptors_left_for_who_comes_in(serve, caplog, skip, number):
    """The client waits, and those who are there do not notice."""
    server = serve()
    good = server.client()
    assert good.ask("version\r\n") == "VERSION 1.0.0\r\n"
    listener = server.server.listeners[0]
    listener.sock = table = FullTable(listener.sock, number, 1)
    late = server.client()
    late.send("version\r\n")
    until(lambda: not table.times)
    for _ in range(20):
        assert good.ask("version\r\n") == "VERSION 1.0.0\r\n"
    assert caplog.text.count("cannot accept") == table.asked == 1
    assert os.strerror(number) in caplog.text
    skip(1, server.server)
    assert late.line() == "VERSION 1.0.0\r\n"


def test_half_commands_by_the_hundred(serve):
    server = serve("[server]\nmax_item_size = 1mb\n")
    client = server.client()
    halves = [b"g", b"get q", b"set q 0 0 100\r\nabc", b"set q 0 0 60000\r\n" + bytes(30000)]
    for number in range(400):
        server.client().send(halves[number % 4])
    until(lambda: client.stats()["curr_connections"] == "401")
    assert client.put("q", b"x") == "STORED\r\n" and client.get("q") == b"x"
    while len(server.clients) > 1:
        server.clients.pop().close()
    until(lambda: client.stats()["curr_connections"] == "1")
    assert client.stats()["curr_items"] == "0" and len(server.server.connections) == 1


def test_a_byte_now_and_then_is_no_idleness_and_costs_nobody(serve, skip):
    server = serve("[server]\nclient_timeout = 30s\n")
    slow, silent = server.client(), server.client()
    silent.send("get q")
    for char in "version\r\n":
        slow.send(char)
        skip(5, server.server)               # longer in all than client_timeout
    assert slow.line() == "VERSION 1.0.0\r\n"
    assert silent.line() == ""


def test_a_monitor_that_is_not_read_is_closed_and_its_items_go_back(serve, caplog):
    server = serve("[server]\nsend_timeout = 200ms\nmax_output_buffer = 64kb\n")
    client, greedy = server.client(), server.client()
    greedy.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for _ in range(40):
        client.put("q", b"x" * (1 << 19))
    greedy.send("monitor q 1000 40\r\n")
    until(lambda: client.stats()["queue_q_open_transactions"] != "0")
    most = 0
    while client.stats()["curr_connections"] == "2":
        most = max(most, int(client.stats()["queue_q_open_transactions"]))
    assert most < 30                         # as much as the sockets and the buffer hold
    assert client.stats()["queue_q_items"] == "40"
    assert "is not reading its answers" in caplog.text


def test_who_has_spoken_in_time_is_heard_though_many_are_at_once(tmp_path, monkeypatch, skip):
    """After a while in which the process did not run, say."""
    monkeypatch.setattr(kestrel, "_FEED_SECONDS", 0)
    monkeypatch.setattr(kestrel, "_EVENTS_STEP", 2)
    with turned_by_hand(tmp_path, "[server]\nclient_timeout = 300ms\n", 9) as (server, clients):
        for client in clients:
            client.send("version\r\n")
        skip(0.4)
        for _ in range(20):
            server.interrupt()                   # lest it waits for more
            server.turn()
        for client in clients:
            assert client.line() == "VERSION 1.0.0\r\n"


def test_a_turn_does_less_for_each_the_more_there_are(tmp_path):
    in_memory = "[queue]\nkeep_journal = false\n"
    with turned_by_hand(tmp_path, in_memory, 30) as (server, clients):
        for client in clients:
            client.send(b"set q 0 0 1 noreply\r\nx\r\n" * 2000)
        before = most = 0
        while before < 60000:
            server.turn()
            count = server.broker.queues["q"].count if "q" in server.broker.queues else 0
            most, before = max(most, count - before), count
        assert most < 3500


def test_each_task_takes_a_step_before_another_takes_two(tmp_path, monkeypatch):
    monkeypatch.setattr(kestrel, "_WORK_SECONDS", 0)
    steps = []

    def task(name):
        for _ in range(3):
            steps.append(name)
            yield

    with turned_by_hand(tmp_path, "", 0) as (server, _):
        for name in "abc":
            server.broker.start(task(name))
        while server.broker.tasks:
            server.turn()
    assert "".join(steps) == "abcabcabc"


def test_jobs_of_many_that_have_hung_up_are_done_in_turn_too(serve, monkeypatch):
    monkeypatch.setattr(kestrel, "_WORK_SECONDS", 0)
    server = serve()
    client = server.client()
    for number in range(150):
        client.put("q%d" % number, b"x")
    steps, resume = [0], kestrel.Session.resume
    turn = server.server.turn
    server.server.turn = lambda: steps.append(0) or turn()

    def counted(session, now):
        steps[-1] += session.command is not None
        resume(session, now)

    monkeypatch.setattr(kestrel.Session, "resume", counted)
    others = [server.client() for _ in range(10)]
    for other in others:
        other.send("stats\r\n")
        other.sock.shutdown(socket.SHUT_WR)
    for other in others:
        assert other.file.read().endswith(b"END\r\n")
    assert max(steps) <= 2


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_who_goes_while_it_waits_and_has_said_too_much_is_found_out(serve, monkeypatch, how):
    monkeypatch.setattr(kestrel, "_LOOK_SECONDS", 0.05)
    server = serve()
    client, gone = server.client(), server.client()
    gone.send(b"get q/t=100000\r\n" + b"version\r\n" * 9000)
    until(lambda: any(one.session.state == "waiting" and not one._is_read()
                      for one in list(server.server.connections.values())))
    if how == "reset":
        gone.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gone.close()
    until(lambda: client.stats()["curr_connections"] == "1")
    client.put("q", b"x")
    assert client.get("q") == b"x"


def test_all_that_was_said_before_a_half_close_is_answered_though_it_was_much(serve, monkeypatch):
    """What was still in the socket, when a wait was cut short, was not run, and took all answers
    with it: a socket that is closed with unread input is reset."""
    monkeypatch.setattr(kestrel, "_CHUNK", 1000)
    monkeypatch.setattr(kestrel, "_LOOK_SECONDS", 0.05)
    client = serve().client()
    client.send("get q/t=100000\r\n" + "set r 0 0 100\r\n%s\r\n" % ("x" * 100) * 200)
    client.sock.shutdown(socket.SHUT_WR)
    assert client.file.read() == b"END\r\n" + b"STORED\r\n" * 200


def test_a_half_closed_client_is_hung_up_on_when_its_last_command_fails(serve, disk):
    """It was answered, and stayed for good, with its open reads: nothing ran that would have seen
    that no more was to come. The command had to wait for another queue than the one that fails."""
    server = serve("[queue]\nsync_journal = 100ms\n")
    client, other = server.client(), server.client()
    client.put("q", b"x")
    client.ask("get r\r\n")
    client.ask("get r+child\r\n")
    client.send("get q/open\r\n")
    assert client.item() == b"x"
    disk.failing, disk.once = {"pwrite": errno.ENOSPC}, True
    client.send("get r/t=100000\r\nset r/sync 0 0 1\r\ny\r\n")
    client.sock.shutdown(socket.SHUT_WR)
    assert client.line() == "END\r\n" and client.line().startswith("SERVER_ERROR r")
    until(lambda: other.get("q") == b"x")
    assert client.file.read() == b""


def test_a_client_is_sent_so_much_in_a_turn(serve, monkeypatch):
    monkeypatch.setattr(kestrel, "_MOST_SENT", 5000)
    monkeypatch.setattr(kestrel, "_BIG", 2500)
    server = serve("[server]\nmax_output_buffer = 10mb\n")
    client = server.client()
    data = bytes(range(256)) * 4000
    client.put("q", data)
    turns = server.count_turns()
    assert client.get("q/peek") == data
    assert len(turns) > 200
    # Many small answers, and large ones between them.
    client.put("small", b"x" * 50)
    client.send(b"get small/peek\r\n" * 3000 + b"get q/peek\r\nget small/peek\r\n")
    for _ in range(3000):
        assert client.item() == b"x" * 50
    assert client.item() == data and client.item() == b"x" * 50


@pytest.mark.parametrize("data, items, answers", [
    (b"set q 0 0 1 noreply\r\nx\r\n" * 4000, 4000, 0),
    (b"set q 0 0 1\r\nx\r\n" * 4000, 4000, 4000),
    (b"".join(b"set new%d 0 0 1\r\nx\r\n" % number for number in range(50)), 50, 50),
    (b"flush q\r\nset q 0 0 1\r\nx\r\n", 1, 2),
    (b"flush_all noreply\r\n" + b"set q 0 0 1\r\nx\r\n" * 3000 + b"get ", 3000, 3000)])
@pytest.mark.parametrize("sync", ["never", "0"])
@pytest.mark.parametrize("how", ["closed", "half-closed"])
def test_what_was_said_before_the_end_is_done(serve, data, items, answers, sync, how):
    server = serve("[queue]\nsync_journal = %s\n" % sync)
    client, other = server.client(), server.client()
    if how == "closed":                      # who goes without an answer may be left without
        data = data.replace(b"0 1\r\n", b"0 1 noreply\r\n")
    other.send(data)
    if how == "half-closed":
        other.sock.shutdown(socket.SHUT_WR)
        assert other.file.read().count(b"\r\n") == answers
    until(lambda: client.stats()["total_connections"] == "2")
    other.close()
    until(lambda: client.stats()["curr_connections"] == "1")
    assert client.stats()["curr_items"] == str(items)


def test_what_has_expired_is_answered_with_when_it_is_written(serve, disk, tmp_path):
    """Nobody is given an item that is not on record where it has been moved to."""
    server = serve("[queue src]\nexpire_to_queue = dead\n[queue]\nsync_journal = never\n")
    client, waiting = server.client(), server.client()
    client.ask("set src 0 1 1\r\nx\r\n")
    server.server.broker.queues["src"].items[0].expiry = 1
    seen = []
    take = kestrel.Session.take

    def told(session):
        out = take(session)
        if any(b"VALUE dead" in piece for piece in out):
            seen.append(plain(tmp_path / "spool" / "dead"))
        return out

    kestrel.Session.take = told
    try:
        waiting.send("flush_expired src\r\nget dead/t=5000\r\n")
        assert waiting.line() == "1\r\n" and waiting.item() == b"x"
    finally:
        kestrel.Session.take = take
    assert len(seen) == 1 and seen[0].endswith(b"x\1")          # added and removed


def test_a_long_answer_is_sent_before_the_end(serve):
    server = serve()
    client = server.client()
    data = bytes(1 << 20)
    client.put("q", data)
    client.send("get q\r\nshutdown\r\n")
    assert client.item() == data
    server.thread.join(20)


def test_a_spool_that_is_held_costs_no_descriptor(tmp_path):
    config = config_of(tmp_path)
    held = kestrel._lock_spool(config.server.queue_path)
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        with pytest.raises(OSError, match="held by another server"):
            kestrel.Server(config)
    assert len(os.listdir("/dev/fd")) == before
    os.close(held)


def test_more_queues_than_open_files_at_the_start(daemon):
    server = daemon("[queue]\nsync_journal = never\n")
    with server.client() as client:
        for number in range(150):
            client.put("q%d" % number, b"x")
            client.get("q%d/open" % number)      # is put back, and on record, at the next start
    server.process.kill()
    server.process.wait()
    server = daemon("[queue]\nsync_journal = never\n", most_files=60)
    with server.client() as client:
        assert "cannot be loaded" not in server.log.read_text()
        assert client.stats()["curr_items"] == "150"


def test_to_send_nothing_over_tls_is_no_error(serve, tmp_path):
    server = serve(secured(tmp_path))
    with tls_client(server.port, tmp_path) as client:
        assert client.ask(LOGIN) == "STORED\r\n"
        connection, = server.server.connections.values()
        assert connection.sock.send(b"") == 0


@pytest.fixture
def wall(monkeypatch):
    """The time of day can be set: wall.offset is in milliseconds."""
    wall = types.SimpleNamespace(offset=0)
    now = kestrel._now
    monkeypatch.setattr(kestrel, "_now", lambda given=None: (
        now() + wall.offset if given is None else given))
    return wall


@pytest.mark.parametrize("offset", [-3600000, 3600000])
def test_what_waits_does_not_go_by_the_time_of_day(serve, wall, offset):
    server = serve("[server]\nclient_timeout = 1h\nexpiration_timer_frequency = 50ms\n"
                   "[queue]\nopen_transaction_timeout = 70ms\nsync_journal = 50ms\n")
    waiting, reader, client = server.client(), server.client(), server.client()
    client.put("q", b"x")
    start = time.monotonic()
    waiting.send("get other/t=70\r\n")
    assert reader.get("q/open") == b"x"
    assert client.ask("version\r\n") == "VERSION 1.0.0\r\n"
    wall.offset = offset
    assert client.get("q/t=10000") == b"x"             # when the read timed out
    assert time.monotonic() - start > 0.06
    assert waiting.item() is None
    assert time.monotonic() - start > 0.06
    assert client.put("other", b"y") == "STORED\r\n"
    assert waiting.get("other/t=10000") == b"y"
    stats = client.stats()
    assert not [key for key, value in stats.items() if value.startswith("-")]


def test_expiry_goes_by_the_time_of_day_and_survives_it(serve, wall):
    server = serve("[server]\nexpiration_timer_frequency = 20ms\n[queue aged]\nmax_age = 10m\n")
    client = server.client()

    def items():
        return client.stats()["curr_items"]

    assert client.ask("set q 0 600 1\r\nx\r\n") == client.put("aged", b"y") == "STORED\r\n"
    wall.offset = -3600000
    expired = server.server.broker.sweep             # a sweep has come and gone
    seen = []
    server.server.broker.sweep = lambda now: seen.append(1) or expired(now)
    until(lambda: len(seen) > 2)
    assert items() == "2"
    assert client.get("q/peek") == b"x" and client.stats()["queue_q_head_wait"] == "0"
    wall.offset = 3600000
    until(lambda: items() == "0")
    assert client.put("q", b"z") == "STORED\r\n"
    wall.offset = 0
    assert client.get("q") == b"z"
    assert client.stats()["queue_q_age"] == "0"


def test_a_process_that_was_stopped_for_a_while(daemon):
    server = daemon("[server]\nclient_timeout = 200ms\n")
    with server.client() as short, server.client() as long, server.client() as other:
        assert other.ask("version\r\n") == "VERSION 1.0.0\r\n"
        short.send("get q/t=100\r\n")
        long.send("get w/t=60000\r\n")
        other.send("stats\r\n")
        for line in iter(other.line, "END\r\n"):
            pass
        server.process.send_signal(signal.SIGSTOP)
        other.send("set w 0 0 1\r\nx\r\n")
        time.sleep(0.25)
        server.process.send_signal(signal.SIGCONT)
        assert short.item() is None
        assert other.line() == "STORED\r\n"          # it spoke in time
        assert long.item() == b"x"


# == From Python ==========================================================================


def test_an_import_does_nothing_else(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import logging, os, signal, sys, threading\n"
        "sys.path.insert(0, %r)\n"
        "before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]\n"
        "import kestrel\n"
        "assert before == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]\n"
        "assert threading.active_count() == 1 and not logging.getLogger().handlers\n"
        "assert os.listdir('.') == ['script.py'], os.listdir('.')\n" % os.path.dirname(compiled()))
    done = subprocess.run([sys.executable, "-B", str(script)], cwd=str(tmp_path),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"")


def test_a_server_in_a_thread_and_its_client():
    with kestrel.serve() as server:
        with kestrel.Client(port=server.port) as client:
            assert client.put("q", b"1", flags=7) and client.put("q", b"")
            assert client.get("q") == b"1" and client.get("q") == b"" and client.get("q") is None
            assert client.get("q", timeout=0.02) is None
            client.put("q", b"gone", expiry=-1)
            assert client.get("q") is None
            with pytest.raises(kestrel.ServerError, match="CLIENT_ERROR bad flags"):
                client.put("q", b"x", flags=-1)
            for name in ("a b", "a\r\nflush_all", "", "a/open"):
                for call in (client.get, client.flush, client.delete):
                    with pytest.raises(ValueError):
                        call(name)
            client.put("q", b"x")
            assert client.stats()["queue_q_items"] == "1"
            client.flush("q")
            assert client.stats()["queue_q_items"] == "0"
            client.delete("q")
            assert "queue_q_items" not in client.stats()
            spool = server.broker.spool
            assert os.path.isdir(spool)
    assert not os.path.exists(spool) and "kestrel" not in [
        thread.name for thread in threading.enumerate()]


def test_a_server_in_a_thread_keeps_what_it_is_to_keep(tmp_path):
    (tmp_path / "conf").write_text("[queue small]\nmax_items = 1\n")
    with kestrel.serve(spool=tmp_path / "spool", config=tmp_path / "conf") as server:
        with kestrel.Client(port=server.port) as client:
            assert client.put("small", b"1") and not client.put("small", b"2")
    with kestrel.serve(spool=tmp_path / "spool") as server:
        client = kestrel.Client(port=server.port)
        assert client.get("small") == b"1"
    with pytest.raises(OSError):
        client.get("small")
    client.close()


def test_open_finishes_an_item_or_puts_it_back():
    with kestrel.serve() as server, kestrel.Client(port=server.port) as client:
        with client.open("q") as data:
            assert data is None
        client.put("q", b"1")
        with pytest.raises(KeyError), client.open("q") as data:
            raise KeyError
        with client.open("q", timeout=5) as data:
            assert data == b"1"
            assert client.stats()["queue_q_open_transactions"] == "1"
        assert client.get("q") is None
        assert client.stats()["queue_q_open_transactions"] == "0"


def test_an_item_is_open_once_for_each_client():
    """The server's abort is about the oldest, so that nobody could say which one goes back."""
    with kestrel.serve() as server, kestrel.Client(port=server.port) as client:
        client.put("q", b"1")
        client.put("q", b"2")
        with client.open("q") as data:
            for call in (lambda: client.open("q").__enter__(), lambda: client.get("q"),
                         lambda: next(client.work("q"))):
                with pytest.raises(ValueError, match="open here"):
                    call()
            assert data == b"1"
        assert client.get("q") == b"2"


def test_a_client_that_was_interrupted_connects_anew():
    """What is left of the answer is not for the next command."""
    with kestrel.serve() as server:
        client = kestrel.Client(port=server.port)
        client.put("q", b"1")

        def interrupt(line):
            raise KeyboardInterrupt

        client._items = interrupt
        with pytest.raises(KeyboardInterrupt):
            client.peek("q")
        del client._items
        assert client.get("q") == b"1"
        assert server.broker.stats.total_connections == 2
        client.close()
        with pytest.raises(ConnectionError, match="this client is closed"):
            client.get("q")


def test_the_users_exception_comes_through_when_the_server_has_gone():
    with kestrel.serve() as server:
        client, other = kestrel.Client(port=server.port), kestrel.Client(port=server.port)
        client.put("q", b"1")
        client.put("r", b"1")
        opened, work = client.open("q"), other.work("r")
        assert opened.__enter__() == next(work) == b"1"
    error = KeyError("mine")
    assert not opened.__exit__(KeyError, error, None)
    with pytest.raises(KeyError, match="mine"):
        work.throw(error)


def test_work_goes_through_a_queue():
    with kestrel.serve() as server, kestrel.Client(port=server.port) as client:
        for number in range(5):
            client.put("q", b"%d" % number)
        for data in client.work("q"):
            if data == b"2":
                break
        assert client.stats()["queue_q_items"] == "3"
        assert client.stats()["queue_q_open_transactions"] == "0"
        assert list(client.work("q", timeout=0.01)) == [b"2", b"3", b"4"]
        assert client.stats()["queue_q_items"] == client.stats()["queue_q_open_transactions"] == "0"


@pytest.fixture
def servers():
    """Start servers with a client of each; returns (servers, clients)."""
    with contextlib.ExitStack() as stack:
        def start(*settings):
            started = [stack.enter_context(kestrel.serve(settings={"server": {}, "queue": one}))
                       for one in settings]
            return started, [stack.enter_context(kestrel.Client(port=server.port))
                             for server in started]

        yield start


def cluster_of(started, *others, **options):
    return kestrel.Client(["127.0.0.1:%d" % one.port for one in started] + list(others), **options)


def counts_of(clients, queue):
    return [int(client.stats().get("queue_%s_items" % queue, 0)) for client in clients]


@pytest.mark.parametrize("answer", [b"SSH-2.0-x\r\n", b"VALUE q 0 x\r\nEND\r\n",
                                    b"VALUE q 0 1\r\nabcd\r\n", b"VALUE q 0 -9\r\n"])
def test_a_server_that_answers_anything_else_is_one_that_fails(servers, answer):
    """It was an IndexError, and a client of several did not go on to another server."""
    class Other(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline():
                self.wfile.write(answer)

    started, (client,) = servers({})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, args=[0.01], daemon=True).start()
        port = other.server_address[1]
        with kestrel.Client(port=port, timeout=20) as wrong, pytest.raises(OSError):
            wrong.get("q")
        assert client.put("q", b"1")
        with kestrel.Client(["127.0.0.1:%d" % port, "127.0.0.1:%d" % started[0].port],
                            timeout=20) as both:
            assert both.get("q") == b"1"
        other.shutdown()


def test_a_client_of_several_servers(servers):
    started, clients = servers({}, {}, {})
    with cluster_of(started) as cluster:
        assert all(cluster.put("q", b"%d" % number) for number in range(60))
        assert cluster.put_many("q", [b"%d" % number for number in range(60, 400)]) == 340
        assert all(counts_of(clients, "q")) and sum(counts_of(clients, "q")) == 400
        found = [cluster.get("q") for _ in range(100)]
        with cluster.open_many("q", 5) as items:
            found += items
            assert sum(int(client.stats()["queue_q_open_transactions"])
                       for client in clients) == len(items)
            cluster.touch("q")
            with pytest.raises(ValueError, match="is open here"):
                cluster.get("q")
        found += cluster.work("q")
        assert sorted(map(int, found)) == list(range(400)) and cluster.get("q") is None
        assert not any(counts_of(clients, "q")) and cluster.perhaps_twice == 0
        with pytest.raises(TypeError, match="one server"):
            cluster.stats()
        cluster.put("q", b"again")
        with pytest.raises(KeyError), cluster.open("q"):
            raise KeyError                   # it goes back
        with cluster.open("q") as data:
            cluster.abort("q")
            assert data == b"again"
        assert cluster.peek("q") == b"again" and cluster.get_many("q", 9) == [b"again"]
        with cluster.open("q") as data:
            assert data is None


@pytest.mark.parametrize("number", [1, 2])
def test_an_item_that_is_open_under_several_names_is_not_closed_by_another(servers, number):
    """The close of the other one would have been for it: it was lost, the other done twice."""
    started, (client, *_) = servers(*[{}] * number)
    with cluster_of(started) if number > 1 else kestrel.Client(port=started[0].port) as reader:
        client.put_many("a", [b"one", b"two"])
        with pytest.raises(RuntimeError), reader.open(["a", "b"], timeout=5) as data:
            assert data == b"one"
            with pytest.raises(ValueError, match="is open here"), reader.open("a"):
                pass
            raise RuntimeError
        assert client.get_many("a", 10) == [b"one", b"two"]


def test_a_client_waits_for_several_servers_at_once(servers):
    """Nothing is held while it waits, and what it did not wait for any more takes nothing."""
    started, clients = servers({}, {}, {})
    with cluster_of(started) as cluster:
        assert cluster.get("q", timeout=0.01) is None
        for client in clients * 2:
            timer = threading.Timer(0.02, client.put, ("q", b"late"))
            timer.start()
            assert cluster.get("q", timeout=20) == b"late"
            timer.join()
        assert cluster.get("r", timeout=0.01) is None          # another queue
        clients[0].put("q", b"x")
        clients[1].put("r", b"y")
        assert (cluster.get("r", timeout=20), cluster.get("q", timeout=20)) == (b"y", b"x")
        assert not any(counts_of(clients, "q") + counts_of(clients, "r"))
    for server in started:                   # nobody waits any more
        until(lambda server=server: len(server.broker.clients) == 1)


def test_what_one_of_several_servers_refuses_is_put_on_another(servers):
    started, clients = servers({"max_items": 3}, {"max_item_size": 1}, {"max_items": 50})
    with cluster_of(started) as cluster:
        assert [cluster.put("q", b"xy") for _ in range(60)].count(True) == 53
        assert counts_of(clients, "q") == [3, 0, 50] and cluster.perhaps_twice == 0
        assert cluster.put_many("r", [b"xy"] * 70) == 53 and counts_of(clients, "r") == [3, 0, 50]
        with pytest.raises(kestrel.ServerError, match="CLIENT_ERROR"):
            cluster.put("q", b"x", flags=1 << 40)


def test_a_server_of_several_is_given_a_short_time_to_connect(serve, monkeypatch):
    """Also when it is connected to again: it may have gone with its machine."""
    server, timeouts = serve(), []
    connect = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: (
        timeouts.append(timeout) or connect(address, timeout)))
    with kestrel.Client(["127.0.0.1:%d" % server.port], timeout=7) as client:
        assert client.put("q", b"x")
        client._connected()[0]._hang_up()
        assert client.put("q", b"y") and timeouts == [1, 1]
        assert client._connected()[0]._sock.gettimeout() == 7


def test_servers_that_are_gone_or_hang_cost_their_share(servers, caplog):
    started, clients = servers({}, {})
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        other = "127.0.0.1:%d" % hangs.getsockname()[1]
        with cluster_of(started, other, "127.0.0.1:%d" % free_port(), timeout=0.2) as cluster:
            assert all(cluster.put("q", b"%d" % number) for number in range(100))
            assert cluster.perhaps_twice == 1          # nobody knows what that one has done
            assert "was lost before the answer to a put" in caplog.text
            assert sum(counts_of(clients, "q")) == 100
            assert sorted(map(int, cluster.work("q"))) == list(range(100))
        with kestrel.Client([other], timeout=0.1) as cluster, pytest.raises(OSError):
            cluster.put("q", b"x")
    with kestrel.Client(["127.0.0.1:%d" % free_port()]) as cluster:
        for call in (lambda: cluster.put("q", b"x"), lambda: cluster.get("q"),
                     lambda: cluster.get("q", timeout=0.01)):
            with pytest.raises(OSError):
                call()


@pytest.mark.parametrize("last_word, twice", [(b"SERVER_ERROR is readonly\r\n", 0), (b"", 40)])
def test_what_was_stored_is_not_put_again_when_a_server_hangs_up(servers, last_word, twice):
    """All of the batch was, and nobody was told."""
    class Breaks(socketserver.StreamRequestHandler):
        def handle(self):
            self.rfile.readline()
            self.wfile.write(b"STORED\r\n" * 10 + last_word)
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(1 << 16):
                pass

    started, (client,) = servers({})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Breaks) as breaks:
        breaks.daemon_threads = True
        threading.Thread(target=breaks.serve_forever, args=(0.01,)).start()
        try:
            with cluster_of(started, "127.0.0.1:%d" % breaks.server_address[1]) as cluster:
                cluster._members[0].rests_until = math.inf         # so the other one comes first
                assert cluster.put_many("q", [b"%d" % number for number in range(50)]) == 50
                assert cluster.perhaps_twice == twice
        finally:
            breaks.shutdown()
    assert client.get_many("q", 99) == [b"%d" % number for number in range(10, 50)]


def test_what_cannot_be_asked_of_several_servers(servers):
    started, _ = servers({})
    with pytest.raises(ValueError, match="no server"):
        kestrel.Client([])
    cluster = cluster_of(started)
    for call in (lambda: cluster.get("q", options="/open"),
                 lambda: cluster.get("q", options="/n=2/Open"), lambda: cluster.queues(),
                 lambda: cluster.export("q")):
        with pytest.raises(TypeError):
            call()
    cluster.close()
    for call in (lambda: cluster.put("q", b"x"), lambda: cluster.get("q")):
        with pytest.raises(ConnectionError, match="closed"):
            call()


def test_several_servers_over_tls(serve, tmp_path):
    """A socket can be readable though there is no answer."""
    server = serve(secured(tmp_path))
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    with kestrel.Client(["localhost:%d" % server.port], user="bob", password="a secret",
                        tls=context) as cluster, kestrel.Client(
                            "localhost", server.port, user="ann", password="a secret",
                            tls=context) as client:
        timer = threading.Timer(0.03, client.put, ("q", b"late"))
        timer.start()
        assert cluster.get("q", timeout=20) == b"late"
        timer.join()
    with kestrel.Client(["localhost:%d" % server.port], tls=context) as cluster:
        with pytest.raises(kestrel.ServerError, match="unauthenticated"):
            cluster.get("q", timeout=20)     # at once


def test_a_server_that_comes_back_is_used_again(servers, monkeypatch):
    monkeypatch.setattr(kestrel, "_REST_SECONDS", 0.05)
    monkeypatch.setattr(kestrel, "_REST_FACTOR", 0)
    port = free_port()
    started, clients = servers({})
    with cluster_of(started, "127.0.0.1:%d" % port) as cluster:
        for _ in range(2):
            assert all(cluster.put("q", b"x") for _ in range(20))
            with kestrel.serve(port):
                with kestrel.Client(port=port) as client:
                    until(lambda: cluster.put("q", b"x") and sum(counts_of([client], "q")))
                    assert cluster.get("none", timeout=0.01) is None
        left = sum(counts_of(clients, "q"))
        assert len(list(cluster.work("q"))) == left > 20


@pytest.mark.parametrize("server, found", [
    ("10.0.0.1", ("10.0.0.1", 7)), ("name:1", ("name", 1)), ("[::1]:2", ("::1", 2)),
    ("::1", ("::1", 7)), ("[::1]", ("::1", 7)), ("unix:/a:b", ("unix:/a:b", 7)),
    ("name:x", ValueError), ("name:70000", ValueError)])
def test_the_address_of_a_server(server, found):
    if found is ValueError:
        with pytest.raises(ValueError):
            kestrel._host_and_port(server, 7)
    else:
        assert kestrel._host_and_port(server, 7) == found


# == Command line =========================================================================


def test_clients_beyond_the_limit_of_open_files_are_refused(daemon):
    one = daemon(most_files=64)
    assert "up to 64 open files" in one.log.read_text()
    first = one.client()
    assert first.put("q", b"x") == "STORED\r\n"
    clients = [one.client() for _ in range(100)]
    served = []
    for client in clients:
        with contextlib.suppress(ConnectionError):
            if client.ask("version\r\n"):
                served.append(client)
    assert 10 < len(served) < 40
    assert first.get("q") == b"x"
    assert one.log.read_text().count(" refused") == kestrel._REPEATS
    for client in served:
        client.close()
    until(lambda: int(first.stats()["curr_connections"]) == 1)
    assert one.client().ask("version\r\n") == "VERSION 1.0.0\r\n"


def test_the_longest_turn_is_told_of_once(serve, monkeypatch, skip):
    server = serve()
    client = server.client()
    pwrite = os.pwrite

    def slow(*arguments):
        skip(0.5)                            # this is the long turn
        return pwrite(*arguments)

    monkeypatch.setattr(kestrel.os, "pwrite", slow)
    client.put("q", b"x")
    monkeypatch.setattr(kestrel.os, "pwrite", pwrite)
    assert int(client.stats()["max_turn_usec"]) >= 500000
    assert int(client.stats()["max_turn_usec"]) < 500000


def test_memory_that_runs_out_is_answered(daemon):
    server = daemon(most_memory=130 << 20)
    with server.client() as client:
        assert client.put("q", b"x") == "STORED\r\n"
        refused = 0
        for size in (50000000, 100000000):
            with server.client() as other:
                with contextlib.suppress(OSError):     # it may not read to the end
                    other.send(b"set big 0 0 %d\r\n" % size + b"x" * size + b"\r\n")
                answer = other.line()
                assert answer in ("STORED\r\n", "SERVER_ERROR out of memory\r\n")
                refused += answer != "STORED\r\n"
        assert refused
        assert client.get("q") == b"x"
        assert client.put("q", b"y") == "STORED\r\n" and client.get("q") == b"y"


def test_a_flood_of_connections_does_not_keep_queues_from_their_files(daemon):
    server = daemon("[queue]\nsync_journal = 0\n", most_files=64)
    with server.client() as client:
        for number in range(10):
            assert client.put("q%d" % number, b"1") == "STORED\r\n"
        flood = [server.client() for _ in range(100)]
        for number in range(20):
            assert client.put("q%d" % number, b"2") == "STORED\r\n"
        for number in range(10):
            assert [client.get("q%d" % number) for _ in range(3)] == [b"1", b"2", None]
        for one in flood:
            one.close()
        assert "Too many open files" not in server.log.read_text()


def test_version():
    assert run("--version") == (0, "kestrel.py 1.0.0\n", "")


def test_it_starts_with_no_set_up(tmp_path):
    """As `python3 kestrel.py` alone, but for the port, which may be taken here."""
    process = subprocess.Popen([sys.executable, kestrel.__file__, "--port", "0"], cwd=str(tmp_path),
                               stderr=subprocess.PIPE, universal_newlines=True)
    lines = []
    while "for memcache clients" not in "".join(lines[-1:]):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    process.terminate()
    assert end_of(process) == 0
    process.stderr.close()
    log = "".join(lines)
    assert "journals in %s" % (tmp_path.resolve() / "spool") in log
    assert re.search(r"up to \d+ open files", log)
    assert re.search(r"listening on 127\.0\.0\.1:\d+ ", log)
    assert kestrel.Config().server.memcache_port == 22133
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700


def test_check(tmp_path, main):
    (tmp_path / "good").write_text("[queue q]\nmax_items = 7\n")
    status, out, err = main("--check", "-c", tmp_path / "good", "--port", 5)
    assert (status, err) == (0, "")
    assert "memcache_port = 5\n" in out and "[queue q]\nmax_items = 7\n" in out
    (tmp_path / "bad").write_text("[queue q]\n\nmax_items = many\n")
    status, out, err = main("--check", "-c", tmp_path / "bad")
    assert (status, out) == (78, "")
    assert err.startswith("%s:3: max_items: 'many'" % (tmp_path / "bad"))
    assert main("-c", tmp_path / "bad")[0] == 78
    (tmp_path / "bad").write_text("[queue q]\nmax_items = many\nmax_age = old\n[server]\nport = 5\n")
    for check in ["--check"], []:
        status, out, err = main("-c", tmp_path / "bad", "--port", "many", *check)
        assert (status, out) == (78, "")
        assert [line.split(": ")[0] for line in err.splitlines()] == [
            "%s:%d" % (tmp_path / "bad", number) for number in (2, 3, 5)] + ["command line"]


def test_client_puts_many(tmp_path):
    settings = {"queue q": {"max_items": 120}, "queue tiny": {"max_item_size": 2, "keep_flags": True}}
    with kestrel.serve(settings=settings) as server, kestrel.Client(port=server.port) as client:
        assert client.put_many("q", (b"%d" % number for number in range(130))) == 120
        assert client.queues() == [("q", 120, 250, 0, 0)]
        assert client.put_many("q", []) == 0
        assert client.put_many("tiny", [b"1", b"123", b"45"]) == 2
        server.broker.set_status("readonly")
        with pytest.raises(kestrel.ServerError, match="readonly"):
            client.put_many("q", [b"x"] * 2)
    with pytest.raises(kestrel.ConfigError, match="max_itms"):
        with kestrel.serve(settings={"queue": {"max_itms": 1}}):
            pass


@pytest.mark.parametrize("data", ["text", 5, None])
def test_data_is_bytes(tmp_path, data):
    with kestrel.serve() as server, kestrel.Client(port=server.port) as client:
        for put in (client.put, lambda queue, data: client.put_many(queue, [data]),
                    lambda queue, data: load(tmp_path).add(data)):
            with pytest.raises(TypeError, match="data must be bytes, not %s" % type(data).__name__):
                put("q", data)
        assert client.put("q", bytearray(b"1")) and client.put("q", memoryview(b"2"))
        assert [client.get("q"), client.get("q"), client.get("q")] == [b"1", b"2", None]


def test_a_client_says_no_more_than_one_command():
    """What comes from elsewhere may be two lines."""
    with kestrel.serve() as server, kestrel.Client(port=server.port) as client:
        client.put("q", b"x")
        for call in (lambda: client.queues("q\r\nflush_all"), lambda: client.status("up\r\nflush_all"),
                     lambda: client.pause("q", "in\nflush_all"), lambda: client.get("q", 0, " q2"),
                     lambda: client.move("q", "q2\r\nflush_all"), lambda: client.get(["q", "a b"])):
            with pytest.raises(ValueError):
                call()
        assert client.get("q") == b"x"


def test_a_client_knows_what_the_server_does():
    with kestrel.serve() as server, kestrel.Client(port=server.port) as client:
        for number in range(5):
            client.put("q", b"%d" % number, sync=number == 0)
        assert client.peek_many("q", 3) == [b"0", b"1", b"2"] and client.get_many("q", 1) == [b"0"]
        with pytest.raises(KeyError), client.open_many(["none", "q"], 2) as items:
            assert items == [b"1", b"2"]
            raise KeyError
        with client.open_many("q", 2) as items:
            client.touch("q")
        assert items == [b"1", b"2"]
        with client.open("q", limit=30) as item:
            client.abort("q", tail=True)
        with client.open("q") as item:
            assert item == b"4"
            client.abort("q", delay=0.01)
        assert client.get("q") == b"3" and client.get("q", timeout=5) == b"4"
        client.put("q", b"late", delay=0.01)
        assert client.get_many(["q", "r"], 9, timeout=5) == [b"late"]
        client.put("q", b"1")
        client.put("q", b"2")
        for item in client.work("q"):
            if item == b"1":
                client.abort("q")
                break
        assert list(client.work("q")) == [b"1", b"2"]
        client.pause("q", "in")
        assert not client.put("q", b"x") and client.resume("q") is None and client.put("q", b"x")


def test_a_client_exports_what_it_can_import_again(tmp_path):
    settings = {"queue": {"max_memory_size": "3kb"}}
    with kestrel.serve(settings=settings) as server, kestrel.Client(port=server.port) as client:
        items = [b"%d" % number * 100 for number in range(100)]
        client.put_many("q", items, flags=3)
        assert [row["data"] for row in client.export("q")] == items        # most are on disk
        assert [row["data"] for row in client.export("q", 3)] == items[:3]
        rows = client.export("q", 70, take=True)
        assert next(rows)["flags"] == 3 and client.get("other") is None
        rows.close()                         # it goes back, with those behind it
        until(lambda: server.broker.queues["q"].count == 100)
        assert len(list(client.export("q", 70, take=True))) == 70
        assert client.get_many("q", 100) == items[70:]
        assert list(client.export("q", take=True)) == []


@promise(1)
def test_a_client_connects_anew_where_nothing_can_be_lost(serve, monkeypatch):
    monkeypatch.setattr(kestrel, "_LINGER_SECONDS", 0.02)
    server = serve()
    client = kestrel.Client(port=server.port)

    def numbers():
        return [number for number, _ in server.server.broker.clients.copy().values()]

    client.put("q", b"1")
    number = max(numbers())
    kick = server.client()
    kick.ask("kick %d\r\n" % number)
    until(lambda: number not in numbers())
    assert client.get("q") == b"1"           # it was idle: nothing has been lost
    client.put("q", b"2")
    with pytest.raises(ConnectionError, match="what was open goes back"), client.open("q"):
        number = max(numbers())
        kick.ask("kick %d\r\n" % number)
        until(lambda: number not in numbers())
        client.put("r", b"x")
    assert client.get("q") == b"2" and client.queues("r") == []
    client.close()


@pytest.fixture
def ask_server(serve, capfd, monkeypatch):
    """Run a command against a server; return its exit status and what it printed."""
    server = serve("[queue full]\nmax_items = 1\n")
    monkeypatch.setenv("KESTREL_SERVER", "127.0.0.1:%d" % server.port)

    def ask(*words, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = kestrel.main([str(word) for word in words])
        return status, capfd.readouterr().out

    ask.server = server
    ask.errors = lambda words: (kestrel.main(words), capfd.readouterr().err)
    return ask


def test_commands_put_and_get(ask_server):
    assert ask_server("put", "q", "one", "two") == (0, "")
    assert ask_server("put", "q", stdin=b"three\nfour") == (0, "")
    assert ask_server("put", "q", "--whole", stdin=b"five\nsix\n") == (0, "")
    assert ask_server("peek", "q") == (0, "one\n")
    assert ask_server("get", "q") == (0, "one\n")
    assert ask_server("get", "q", "-n", 3) == (0, "two\nthree\nfour\n")
    assert ask_server("get", "q", "-n", 3) == (0, "five\nsix\n\n")
    assert ask_server("get", "q", "--wait", "0.01") == ask_server("peek", "q") == (1, "")
    assert ask_server("put", "q", "--expiry", 100, "--sync", "x")[0] == 0
    assert ask_server.server.server.broker.queues["q"].items[0].expiry
    assert ask_server("put", "r", "--delay", "0.05", "y")[0] == 0
    assert ask_server("get", "r") == (1, "") and ask_server("get", "r", "--wait", 5) == (0, "y\n")
    for wait in ("inf", "-1", "nan", "1e12", "soon"):
        with pytest.raises(SystemExit):
            ask_server("get", "q", "--wait", wait)


def test_drain_moves_everything_to_others(servers, capfd):
    """In order, with flags and expiry; what stays is told."""
    started, (client, *others) = servers({}, {}, {"max_items": 100})
    names = ["127.0.0.1:%d" % server.port for server in started]
    drain = ["drain", "--server", names[0], "--to", names[1], "--to", names[2]]
    items = [b"%d" % number for number in range(120)]
    for queue in ("a", "c"):
        client.put_many(queue, items)
    client.put("b", b"flags", expiry=5000, flags=7)
    assert kestrel.main(drain + ["b"]) == 0 and capfd.readouterr().out == "1\n"
    row, = others[0].export("b")
    assert row["flags"] == 7 and 4990000 < row["expiry"] - kestrel._now() < 5001000
    client.put("d", b"later", delay=100)
    with client.open("b") as data:
        assert data is None
    client.put("e", b"x")
    client.get("e", options="/open")
    assert kestrel.main(drain + ["a", "d", "e"]) == 1
    out, err = capfd.readouterr()
    assert out == "120\n" and others[0].get_many("a", 500) == items
    assert "left behind: delayed items of d: 1; open reads of e: 1" in err
    assert kestrel.main(drain[:4] + [names[0], "a"]) == 1      # that is itself
    assert "is the server that is drained" in capfd.readouterr().err


def test_drain_names_the_server_that_cannot_be_reached(ask_server):
    """It named the other one."""
    ask_server("put", "q", "x")
    port = free_port()
    assert ask_server.errors(["drain", "--to", "127.0.0.1:%d" % port]) == (
        3, "kestrel.py: 127.0.0.1:%d: Connection refused\n" % port)


def test_a_certificate_that_is_not_trusted_is_a_failed_connection(serve, tmp_path, capfd):
    name = "localhost:%d" % serve(secured(tmp_path)).port
    assert kestrel.main(["list", "--tls", "--server", name]) == 3
    assert re.match("kestrel.py: %s: .*CERTIFICATE" % name, capfd.readouterr().err)


def test_drain_knows_the_server_that_it_drains_while_others_put(servers, monkeypatch, capfd):
    """It would move items to the tail of their own queue for ever. (Servers that have been started
    and asked alike are two.)"""
    started, (client, _) = servers({}, {})
    drain = ["drain", "--server", "127.0.0.1:%d" % started[0].port, "--to"]
    assert kestrel.main(drain + ["127.0.0.1:%d" % started[1].port]) == 0
    stats = kestrel.Client.stats

    def busy(self):
        client.put("q", b"x")
        return stats(self)

    monkeypatch.setattr(kestrel.Client, "stats", busy)
    assert kestrel.main(drain + ["localhost:%d" % started[0].port]) == 1
    assert "is the server that is drained" in capfd.readouterr().err


class OldKestrel(socketserver.StreamRequestHandler):
    """As much of Kestrel 2.4 as there is to empty a queue: it passes over options it does not know,
    and has no `list`."""

    def handle(self):
        opened = None
        for line in self.rfile:
            words = line.split()
            if words == [b"stats"]:
                answer = b"".join(b"STAT queue_old_%b %d\r\n" % (key, len(self.server.items)) for key in (
                    b"items", b"total_items", b"expired_items")) + (
                        b"STAT queue_old_open_transactions %d\r\nEND\r\n" % bool(opened))
            elif words[:1] == [b"get"]:
                name, *options = words[1].split(b"/")
                if b"close" in options:
                    opened = None
                answer = b"END\r\n"
                if b"open" in options and self.server.items:
                    opened = self.server.items.pop(0)
                    answer = b"VALUE %b 0 %d\r\n%b\r\nEND\r\n" % (name, len(opened), opened)
            else:
                answer = b"ERROR\r\n"
            self.wfile.write(answer)


def test_drain_empties_an_old_kestrel(servers, capfd):
    _, (client,) = servers({})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), OldKestrel) as old:
        old.daemon_threads = True
        old.items = [b"%d" % number for number in range(30)]
        threading.Thread(target=old.serve_forever, args=(0.01,)).start()
        try:
            assert kestrel.main(["drain", "--server", "127.0.0.1:%d" % old.server_address[1], "--to",
                                 "127.0.0.1:%d" % client._arguments[1]]) == 0
        finally:
            old.shutdown()
    assert capfd.readouterr().out == "30\n"
    assert client.get_many("old", 50) == [b"%d" % number for number in range(30)]


def test_drain_can_be_broken_off_and_begun_again(servers, capfd):
    started, (client, other) = servers({}, {"max_items": 70})
    drain = ["drain", "--server", "127.0.0.1:%d" % started[0].port,
             "--to", "127.0.0.1:%d" % started[1].port]
    items = [b"%d" % number for number in range(120)]
    client.put_many("a", items)
    client.put("z", b"goes on")
    assert kestrel.main(drain) == 1
    out, err = capfd.readouterr()
    assert out == "51\n" and "left behind: items of a: 70 (it is full or paused" in err
    assert other.get("z") == b"goes on"
    found = other.get_many("a", 500)
    assert found == items[:70]
    until(lambda: client.stats()["queue_a_open_transactions"] == "0")
    assert client.peek("a") == items[50]             # of a batch that was not stored whole
    for _ in range(9):
        kestrel.main(drain)
        found += other.get_many("a", 500)
    assert list(dict.fromkeys(found)) == items and counts_of([client], "a") == [0]
    other.put("a+child", b"")
    client.put("a", b"x")
    client.put("a+child", b"y")
    capfd.readouterr()
    assert kestrel.main(drain) == 1          # nothing is put twice into the child
    out, err = capfd.readouterr()
    assert out == "1\n" and "items of a: 1 (it has children there already)" in err
    assert other.get_many("a+child", 9) == [b"", b"y"]
    assert kestrel.main(drain + ["b"]) == 1 and "no queue b" in capfd.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_standard_output_that_fails_is_not_taken_for_the_server(ask_server, tmp_path):
    """It was the server that had no space left; what was not flushed was a traceback."""
    ask_server("put", "q", "1")
    spool_of(tmp_path, journal=addx(b"a"))
    with open("/dev/full", "w") as full:
        for words in (["get", "q"], ["export", "q", "--take"], ["export", "q"], ["list"], ["top"],
                      ["--dump", str(tmp_path / "journal")], ["--check"], ["--help"],
                      ["get", "--help"]):
            done = subprocess.run(command(*words), stdout=full, stderr=subprocess.PIPE, timeout=60)
            assert (done.returncode, done.stderr) == (
                2, b"kestrel.py: standard output: No space left on device\n"), words
    until(lambda: data_of(ask_server.server.server.broker.queues["q"].items) == [b"1"])


def test_a_password_is_not_read_from_what_is_to_be_put(ask_server):
    """Where there was no terminal, getpass took the first line."""
    environment = {key: value for key, value in os.environ.items() if key != "KESTREL_PASSWORD"}
    done = subprocess.run(command("put", "q", "--user", "bob"), input=b"1\n2\n", timeout=60,
                          stderr=subprocess.PIPE, env=environment, start_new_session=True)
    assert (done.returncode, done.stderr) == (
        2, b"kestrel.py: no password: set $KESTREL_PASSWORD\n")


def test_a_password_is_asked_for_once(serve, tmp_path, monkeypatch, capfd):
    """drain asked for that of each server, and top whenever it connected."""
    asked = []
    monkeypatch.delenv("KESTREL_PASSWORD", raising=False)
    monkeypatch.setattr("getpass.getpass", lambda question: asked.append(question) or "a secret")
    name = "127.0.0.1:%d" % serve(secured(tmp_path, tls=False)).port
    assert kestrel.main(["drain", "--user", "bob", "--server", name, "--to", name]) == 1
    assert "is the server that is drained" in capfd.readouterr().err
    assert asked == ["password of bob: "]


@promise(1)
def test_what_cannot_be_printed_goes_back(ask_server, monkeypatch):
    """It was taken first, and lost."""
    ask_server("put", "q", "1", "2", "3")
    monkeypatch.setattr(kestrel, "_print_item", lambda item: next(prints))
    for error in (OSError(errno.ENOSPC, "full"), KeyboardInterrupt()):
        def fail():
            yield
            raise error
        prints = fail()
        with pytest.raises(KeyboardInterrupt) if isinstance(error, KeyboardInterrupt) else (
                contextlib.nullcontext()):
            assert ask_server("get", "q", "-n", 3)[0]
    monkeypatch.undo()
    queues = ask_server.server.server.broker.queues
    until(lambda: data_of(queues["q"].items) == [b"1", b"2", b"3"])


def test_commands_export_and_import(ask_server, monkeypatch):
    ask_server("put", "q", "text", "--expiry", 1000)
    ask_server("put", "q", "--whole", stdin=b"\xff\n")
    status, told = ask_server("export", "q")
    rows = [json.loads(line) for line in told.splitlines()]
    assert status == 0 and rows[0]["data"] == "text" and rows[0]["expiry"] > rows[0]["add_time"]
    assert rows[1]["base64"] == "/wo=" and rows[1]["expiry"] == rows[1]["deliveries"] == 0
    assert ask_server("import", "r", stdin=told.encode()) == (0, "")
    assert json.loads(ask_server("export", "r")[1].splitlines()[0])["expiry"] - 1000 <= (
        rows[0]["expiry"])
    assert ask_server("export", "q", "--take")[1] == told and ask_server("export", "q") == (0, "")
    for line in ("no", "{}", "[]", '{"data": 5}', '{"base64": "!"}', '{"data": "x", "flags": "a"}',
                 '{"data": "x", "expiry": 1e999}', "[" * 100000):
        assert ask_server("import", "s", stdin=line.encode())[0] == 1
    for bad in b"no", b"\xff":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(
            b'{"data": "1"}\n{"data": "2"}\n%b\n' % bad), encoding="utf-8"))
        assert ask_server.errors(["import", "t"]) == (
            1, "kestrel.py: line 3 is not what export prints; the 2 items before it were put\n")
    assert ask_server("get", "t", "-n", 2) == (0, "1\n2\n")
    assert ask_server("get", "t", "-n", 3) == (0, "1\n2\n")
    ask_server("put", "t", "3")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert ask_server.errors(["export", "t", "--take"]) == (
            2, "kestrel.py: there is no standard output\n")
    assert ask_server("get", "t", "-n", 3) == (0, "3\n")
    assert ask_server("import", "full", stdin=told.encode())[0] == 1


def test_commands_pause_and_peek(ask_server):
    ask_server("put", "q", "1", "2", "3")
    assert ask_server("pause", "q", "out") == (0, "") and ask_server("get", "q") == (1, "")
    assert ask_server("peek", "q", "-n", 2) == (0, "1\n2\n")
    assert ask_server("resume", "q") == (0, "") and ask_server("get", "q") == (0, "1\n")
    assert ask_server("pause", "none")[0] == 1
    ask_server("put", "q_r", "x")
    assert ask_server("delete", "q", "--yes")[0] == 0
    for words in (["stats"], ["flush"], ["delete"], ["export"], ["move", "r"]):
        assert ask_server.errors([words[0], "q", *words[1:]]) == (
            1, "kestrel.py: there is no queue q\n")


def test_progress_is_shown_at_a_terminal_when_it_takes_long(monkeypatch):
    out, now = io.StringIO(), [0.0]
    out.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(kestrel.time, "monotonic", lambda: now[0])
    show = kestrel._progress(200)
    for now[0], done in ((0.5, 10), (1.5, 50), (1.6, 60), (2, 100)):
        show(done)
    show(200, True)
    assert out.getvalue().count("\r") == 3 and out.getvalue().startswith(
        "\r[#######                       ]  25 % 50 items, 33 a second")
    assert out.getvalue().endswith("100 % 200 items, 100 a second\n")
    monkeypatch.undo()


def test_commands_show_and_move(ask_server):
    ask_server("put", "jobs", "1", "23")
    assert ask_server("move", "jobs", "more", "-n", 1) == (0, "1\n")
    assert ask_server("move", "jobs", "more") == (0, "1\n")
    ask_server("pause", "jobs", "in")
    ask_server("put", "more", "--delay", 100, "x")
    assert ask_server("list") == (0, "queue  items  bytes  open  waiters  delayed  paused\n"
                                     "jobs   0      0      0     0        0        in\n"
                                     "more   2      3      0     0        1        no\n")
    assert [json.loads(line) for line in ask_server("list", "m", "--json")[1].splitlines()] == [
        {"queue": "more", "items": 2, "bytes": 3, "open": 0, "waiters": 0, "delayed": 1,
         "paused": "no"}]
    status, told = ask_server("stats", "more", "--json")
    told = json.loads(told)
    assert status == 0 and told["items"] == 2 and type(told["put_rate"]) is float
    assert re.search("^curr_items +2$", ask_server("stats")[1], re.M)
    assert ask_server("stats", "none")[0] == 1
    assert ask_server("flush", "more") == ask_server("delete", "more", "--yes") == (0, "")
    assert ask_server("delete", "more")[0] == 1
    assert ask_server("list")[1].count("\n") == 2


def test_commands_for_operators(ask_server):
    assert ask_server("status") == (0, "UP\n")
    assert re.fullmatch(r"kestrel.py \S+ at 127.0.0.1:\d+ is UP\n", ask_server("ping")[1])
    assert ask_server("status", "readonly") == (0, "READONLY\n")
    assert ask_server.errors(["put", "q", "x"]) == (
        1, "kestrel.py: SERVER_ERROR the server is readonly: nothing can be written\n")
    assert ask_server("status", "up") == (0, "UP\n")
    other = ask_server.server.client()
    assert other.ask("version\r\n").startswith("VERSION")
    client, *_ = [json.loads(line) for line in ask_server("clients", "--json")[1].splitlines()
                  if '"ready"' in line]
    assert client["address"].endswith(":%d" % other.sock.getsockname()[1])
    assert client["open_reads"] == 0
    assert ask_server("kick", client["id"]) == (0, "")
    assert other.line() == ""
    assert ask_server.errors(["kick", "12345"]) == (1, "kestrel.py: there is no client 12345\n")


def test_commands_tell_what_is_wrong(ask_server, monkeypatch, capfd):
    ask_server("put", "full", "1")
    assert ask_server.errors(["put", "full", "2"]) == (
        1, "kestrel.py: full is full or paused, or the item is too large; 0 items were put\n")
    assert ask_server.errors(["put", "a/b", "2"]) == (1, "kestrel.py: '/' in the name of a queue\n")
    for words in (["get"], ["get", "q", "-n", "x"], ["move", "q"], ["lst"], ["--dump"], ["kick", "x"],
                  ["status", "--json"], ["get", "q", "-n", "0"], ["status", "foo"],
                  ["list", "--server", "host:port"], ["list", "--cafile", "/none"],
                  ["list", "--cafile", kestrel.__file__], ["--json"], ["--every", "1s"],
                  ["--kestrel"], ["--verify"], ["--check", "--verify", "."], ["--convert", "x", "--pack", "y"],
                  ["--server", "localhost", "list"], ["-c", "kestrel.conf", "list"]):
        with pytest.raises(SystemExit) as stopped:
            kestrel.main(words)
        assert stopped.value.code == 2
    told = capfd.readouterr().err
    for words in ("there is no command lst", "argument -n: not from 1 to ", "'port' is not a port",
                  "--cafile: /none: No such file", "kestrel.py: [X509", "--json goes with --dump and --verify",
                  "--kestrel goes with --pack", "not allowed with argument", "--server comes after the command",
                  "list takes options of its own, after it"):
        assert words in told
    monkeypatch.setenv("KESTREL_SERVER", "127.0.0.1:%d" % free_port())
    assert ask_server.errors(["list"])[0] == 3
    assert ask_server.errors(["ping"])[0] == 1
    assert ask_server.errors(["list", "--server", "unix:/none"]) == (
        3, "kestrel.py: unix:/none: No such file or directory\n")


def test_commands_print_names_that_are_no_text_as_they_are(serve, tmp_path):
    """Python does so by itself only where the locale is C."""
    server = serve()
    assert server.client().ask(b"set \xff 0 0 1\r\nx\r\n") == "STORED\r\n"
    ask = ["--server", "127.0.0.1:%d" % server.port]
    for words in ["list", *ask], ["stats", *ask], ["--verify", str(tmp_path / "spool")]:
        done = subprocess.run(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"") and b"\xff" in done.stdout, words


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_as_dev_null(closed, tmp_path):
    def start(*words):
        return subprocess.Popen("exec %s %s" % (" ".join(map(str, command(*words))), closed),
                                shell=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    port = free_port()
    (tmp_path / "conf").write_text("[server]\nadmin_port = off\n")
    server = start("-c", tmp_path / "conf", "--port", port, "--spool", tmp_path / "spool")
    until(lambda: is_served(port) or server.poll() is not None)
    with kestrel.Client(port=port) as client:
        client.put_many("q", [b"1", b"2"])
        status = 2 if ">&- 2" in closed else 0   # without a standard output
        assert end_of(start("flush", "q", "--server", "127.0.0.1:%d" % port)) == status
        assert sum(row[1] for row in client.queues()) == status
        if "<" in closed:
            assert end_of(start("--hash-password")) == 1
        if closed == "<&-":
            for words in (["put", "q"], ["import", "q"]):
                assert end_of(start(*words, "--server", "127.0.0.1:%d" % port)) == 0
            assert client.get("q") is None
    server.terminate()
    assert end_of(server) == 0


def test_a_put_that_breaks_off_is_not_taken_for_a_pipe_that_nobody_reads(short_path, capfd):
    def server(listener):
        sock, _ = listener.accept()
        sock.recv(1000)
        sock.shutdown(socket.SHUT_RDWR)
        sock.close()

    path = str(short_path / "sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=server, args=(listener,))
        thread.start()
        status = kestrel.main(["put", "--server", "unix:" + path, "q", "x" * 3000000])
        thread.join()
    assert status == 3 and capfd.readouterr().err == (
        "kestrel.py: unix:%s: the server has closed the connection\n" % path)


@contextlib.contextmanager
def leaving_after(puts):
    """A server that says STORED so many times, and then leaves; its address."""
    def answer(listener):
        with listener.accept()[0] as sock, sock.makefile("rb") as file:
            left = puts
            for line in file:
                if line.startswith(b"set "):
                    if not left:
                        return
                    file.readline()
                    left -= 1
                sock.sendall(b"STORED\r\n" if line.startswith(b"set ") else b"END\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        yield "127.0.0.1:%d" % listener.getsockname()[1]
        thread.join()


def test_what_was_put_before_the_server_left_is_told(ask_server, monkeypatch, capfd):
    lost = "kestrel.py: %s: the server has closed the connection\n"
    for words, given, told in (
            (["put", "q"], b"1\n2\n3\n", "kestrel.py: at least 2 items were put; then:\n"),
            (["put", "q"], b"", ""), (["put", "q"], b"1\n2\n", "")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        with leaving_after(2) as name:
            status = kestrel.main(words + ["--server", name])
        assert (status, capfd.readouterr().err) == ((3, told + lost % name) if told else (0, ""))
    with leaving_after(50) as name:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"data": "1"}\n' * 70)))
        assert kestrel.main(["import", "q", "--server", name]) == 3
    assert capfd.readouterr().err == (
        "kestrel.py: at least 50 items were put; then:\n" + lost % name)


def test_drain_names_the_server_that_leaves(ask_server, capfd):
    """It named the one that was drained."""
    ask_server("put", "q", "1")
    with leaving_after(0) as name:
        assert kestrel.main(["drain", "--to", name]) == 3
    assert capfd.readouterr().err == "kestrel.py: %s: the server has closed the connection\n" % name
    until(lambda: data_of(ask_server.server.server.broker.queues["q"].items) == [b"1"])


def test_an_interrupt_ends_a_command_as_a_signal(ask_server):
    """Else a shell goes on with its loop."""
    process = subprocess.Popen(command("get", "q", "--wait", 60), stderr=subprocess.PIPE)
    until(lambda: "q" in ask_server.server.server.broker.queues)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == b"" and process.returncode == -signal.SIGINT


def test_clients_tell_that_it_is_the_wrong_port(serve):
    admin = free_port()
    server = serve("[server]\nadmin_port = %d\n" % admin)
    with kestrel.Client(port=admin) as client, pytest.raises(ConnectionError, match="for HTTP"):
        client.stats()
    with pytest.raises(ConnectionError, match="speaks no TLS"):
        kestrel.Client(port=server.port, tls=ssl.create_default_context())
    with socket.create_server(("127.0.0.1", 0)) as closes:
        threading.Thread(target=lambda: closes.accept()[0].close()).start()
        with pytest.raises(ConnectionError, match="perhaps it speaks no TLS there"):
            kestrel.Client(port=closes.getsockname()[1], tls=ssl.create_default_context())


def test_top_shows_queues_at_a_terminal_that_does_not_know_its_size(ask_server):
    """All but the last four, of a height of 0."""
    ask_server("put", "jobs", "x")
    master, slave = os.openpty()
    process = subprocess.Popen(command("top"), stdout=slave, stderr=slave)
    try:
        told = b""
        while b"jobs" not in told and told.count(b"gets/s") < 2:     # shown once, without a row
            told += os.read(master, 10000)
        assert b"jobs" in told
    finally:
        process.send_signal(signal.SIGINT)
        end_of(process)
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("tool", ["--verify", "--pack", "--convert"])
def test_a_tool_for_nothing_starts_no_server(tmp_path, monkeypatch, capsys, tool):
    """Such as --verify "$SPOOL" where that is not set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kestrel, "Server", None)
    assert kestrel.main([tool, ""]) == 1 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err.startswith("kestrel.py: ")


def test_top_survives_a_restart(serve, short_path, monkeypatch, capfd):
    text = "[server]\nlisten = unix:%s\n" % (short_path / "socket")
    server = serve(text)
    with kestrel.Client("unix:%s" % (short_path / "socket")) as client:
        client.put("jobs", b"1")
        client.put("jobs", b"2")
    told = []

    def sleep(seconds):
        told.append(capfd.readouterr().out)
        if len(told) == 1:
            server.stop()
        elif len(told) == 2:
            serve(text)
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(kestrel, "time", types.SimpleNamespace(
        sleep=sleep, monotonic=time.monotonic, time_ns=time.time_ns))
    assert kestrel.main(["top", "--server", "unix:%s" % (short_path / "socket")]) == 0
    assert re.search("^jobs +2 +2 ", told[0], re.M) and re.search("^jobs +2 +2 ", told[2], re.M)
    assert not re.search("^jobs", told[1], re.M)
    assert re.search("closed|Broken pipe|reset|No such file|refused", told[1])


def test_dump(tmp_path, main):
    good = addx(b"a\r\nb", NOW, NOW + 5) + xid_record(9, 7) + b"\1" + struct.pack(
        "<BiqqII", 10, 25, NOW, 0, 9, 2) + b"x"
    spool_of(tmp_path, q=good, bad=good + b"\xff" * 10)
    status, out, err = main("--dump", tmp_path / "q")
    assert (status, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["0", "ADDX", "add_time=%d" % NOW, "expiry=%d" % (NOW + 5), "size=4",
         "data='a\\r\\nb'"],
        ["25", "REMOVE_TENTATIVE_XID", "xid=7"], ["30", "REMOVE"],
        ["31", "ADDF", "add_time=%d" % NOW, "expiry=0", "size=1", "data='x'", "flags=9",
         "deliveries=2"]]
    status, out, err = main("--json", "--dump", tmp_path / "q", tmp_path / "bad")
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 1 and len(records) == 9
    assert records[0]["data"] == "a\r\nb" and records[3]["data"] == "x"
    assert records[1] == {"file": str(tmp_path / "q"), "offset": 25, "xid": 7,
                          "operation": "REMOVE_TENTATIVE_XID"}
    assert records[-1]["offset"] == len(good) and records[-1]["bytes"] == 10
    assert (tmp_path / "bad").read_bytes() == good + b"\xff" * 10
    assert main("--dump", "--json", tmp_path / "q", tmp_path / "bad")[1] == out
    assert main("--dump", tmp_path / "none")[0] == 1
    spool_of(tmp_path, middle=good + b"\xff" * 10 + good)
    status, out, err = main("--dump", tmp_path / "middle")
    assert status == 1 and len(out.splitlines()) == 9
    assert "10 bytes are damaged" in out
    spool_of(tmp_path, binary=addx(b"\xff" * 100))
    assert json.loads(main("--dump", "--json", tmp_path / "binary")[1])["base64"] == (
        base64.b64encode(b"\xff" * 100).decode())


def test_pack_a_queue_that_is_not_in_use(tmp_path, main):
    spool = tmp_path / "spool"
    spool.mkdir()
    spool_of(spool, q__5=addx(b"a") + addx(b"b") + addx(b"c"), q__9=b"\1" + addx(b"d"),
             q=xid_record(9, 3) + xid_record(6, 3), empty=addx(b"x") + b"\1")
    status, out, err = main("--pack", spool / "q")
    assert status == 0 and "2 items" in err
    assert sorted(os.listdir(str(spool))) == ["empty", "q"]
    assert plain(spool / "q") == xid_record(4, 3) + addx(b"c") + addx(b"d")
    assert main("--pack", spool / "empty")[0] == 0
    assert (spool / "empty").read_bytes() == b""
    assert main("--pack", spool / "none")[0] == 1


@pytest.mark.parametrize("slash", ["", "/"])
def test_what_is_no_journal_is_not_packed(tmp_path, main, slash):
    for name, data in [("passwd", b"root:x:0:0::/root:/bin/sh\n"), ("text", b"\n  x\n"),
                       ("damaged", addx(b"a") + b"\xff" + addx(b"b"))]:
        (tmp_path / name).write_bytes(data)
        status, out, err = main("--pack", str(tmp_path / name) + slash)
        assert status == 1 and "Nothing was changed" in err
        assert (tmp_path / name).read_bytes() == data
    assert sorted(os.listdir(str(tmp_path))) == ["damaged", "passwd", "text"]
    (tmp_path / "torn").write_bytes(addx(b"a") + b"\1" + addx(b"b")[:-1])
    assert main("--pack", tmp_path / "torn")[0] == 0 and (tmp_path / "torn").read_bytes() == b""


def test_a_queue_that_a_server_holds_is_not_packed(daemon, tmp_path, main):
    spool = tmp_path / "spool"
    spool.mkdir()
    spool_of(spool, q=addx(b"c") + addx(b"d"))
    server = daemon()
    status, out, err = main("--pack", spool / "q")
    assert status == 1 and "held by another server" in err
    assert main("--dump", spool / "q")[0] == 0
    with server.client() as client:
        assert [client.get("q"), client.get("q"), client.get("q")] == [b"c", b"d", None]


def test_what_keeps_it_from_starting_is_told_in_one_line(daemon, tmp_path):
    running = daemon()
    (tmp_path / "file").write_text("")
    for arguments, words in [
            (["--port", running.port, "--spool", tmp_path / "other"], "in use"),
            (["--port", 0, "--spool", tmp_path / "spool"], "held by another"),
            (["--port", 0, "--spool", tmp_path / "file"], "cannot use the spool"),
            (["--port", 0, "--spool", "/proc/spool"], "cannot use the spool"),
            (["--listen", "192.0.2.1", "--port", 0, "--spool", tmp_path / "s"], "cannot listen"),
            (["--port", "x"], "memcache_port: "), (["-c", tmp_path / "missing"], "No such file")]:
        status, out, err = run(*arguments, cwd=str(tmp_path))
        lines = [line for line in err.splitlines() if not re.search(" INFO |no admin port", line)]
        assert len(lines) == 1 and words in lines[0], err
        # The unit starts it again, but not over its configuration.
        assert status == (78 if words in ("memcache_port: ", "No such file") else 1)


def test_a_read_only_file_system_is_named(tmp_path, monkeypatch):
    class Status:
        f_flag = os.ST_RDONLY

    monkeypatch.setattr(kestrel.os, "statvfs", lambda path: Status)
    with pytest.raises(OSError) as caught:
        kestrel._lock_spool(str(tmp_path))
    assert caught.value.errno == errno.EROFS and "Read-only" in str(caught.value)


@pytest.mark.parametrize("files, expected", [
    ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "max\n",
      "/sys/fs/cgroup/a/memory.max": "1000000\n"}, 1000000),
    ({"/proc/self/cgroup": "5:memory:/c\n4:cpu:/c\n",
      "/sys/fs/cgroup/memory/c/memory.limit_in_bytes": "2000000\n"}, 2000000),
    ({}, None)])
def test_how_much_memory_there_is(monkeypatch, files, expected):
    """What the machine has, what its cgroup allows, or RLIMIT_AS: the least of them."""
    def fake_open(path, **_):
        if path not in files:
            raise FileNotFoundError(path)
        return io.StringIO(files[path])

    monkeypatch.setattr(kestrel, "open", fake_open, raising=False)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(kestrel.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert kestrel._usable_memory() == (expected or machine)
    monkeypatch.setattr(kestrel.resource, "getrlimit", lambda _: (5000, 5000))
    assert kestrel._usable_memory() == 5000


@pytest.mark.parametrize("address, host", [
    ("127.0.0.1", "this machine"), ("127.9.9.9", "this machine"), ("::1", "this machine"),
    ("10.1.2.3", "10.1.2.3"), ("2001:db8:0:1:2:3:4:5", "2001:0db8:0000:0001")])
def test_whose_passwords_are_checked_one_after_the_other(address, host):
    assert kestrel._host_of(ipaddress.ip_address(address)) == host


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_clean_stop(daemon, tmp_path, number):
    server = daemon()
    with server.client() as client, server.client() as waiting, server.client() as opened:
        client.put("q", b"1")
        client.put("q", b"2")
        assert opened.get("q/open") == b"1"
        client.put("q", b"3")
        client.put("q", b"4")
        assert [client.get("q/open"), opened.get("q/open")] == [b"2", b"3"]
        waiting.send("get r/t=20000\r\n")
        until(lambda: client.stats().get("queue_r_waiters") == "1")
        start = time.monotonic()
        assert server.end(number) == 0
        assert time.monotonic() - start < 2
        assert waiting.item() is None and waiting.line() == ""
    assert "stopped" in server.log.read_text() and "Traceback" not in server.log.read_text()
    assert plain(tmp_path / "spool" / "q").endswith(
        b"".join(xid_record(5, xid) for xid in (3, 2, 1)))
    assert contents_of(tmp_path / "spool") == [b"1", b"2", b"3", b"4"]


def test_sighup_reloads(daemon, tmp_path):
    server = daemon("[queue]\nmax_items = 1\n")
    with server.client() as client:
        assert client.put("q", b"1") == "STORED\r\n"
        assert client.put("q", b"2") == "NOT_STORED\r\n"
        (tmp_path / "kestrel.conf").write_text("[queue]\nmax_items = 2\n")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "reloaded" in server.log.read_text())
        assert client.put("q", b"2") == "STORED\r\n"
        (tmp_path / "kestrel.conf").write_text("[queue]\nmax_items = x\n")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "kestrel.conf:2: max_items" in server.log.read_text())
        assert client.put("q", b"3") == "NOT_STORED\r\n"


def test_everything_is_loaded_before_the_port_opens(daemon, tmp_path):
    (tmp_path / "spool").mkdir()
    spool_of(tmp_path / "spool", q=addx(b"x" * 100) * 30000 + addx(b"last"))
    server = daemon()
    with server.client() as client:
        assert client.stats()["queue_q_items"] == "30001"


@promise(3)
def test_nothing_acknowledged_is_lost_by_kill_9(daemon):
    """Clients put numbered items and take them with open and close while the server is
    killed at random moments and started again on the same spool."""
    chances = seeded()
    put, closed = set(), set()               # acknowledged
    maybe_closed = set()                     # sent, without an answer
    serials = [0] * 4
    problems = []

    def produce(client, number):
        while True:
            item = b"%d-%d" % (number, serials[number])
            serials[number] += 1
            if client.put("q", item * 20) != "STORED\r\n":
                return
            put.add(item)

    def consume(client, seen):
        """`seen`: producer -> the last of its items that this life of the server gave."""
        key, held = "q/open/t=50", None
        while True:
            client.send("get %s\r\n" % key)
            if held:
                maybe_closed.add(held)
            data = client.item()             # raises when the server has gone
            if held:
                closed.add(held)
            held = None
            if data:
                held = data[:len(data) // 20]
                producer, serial = map(int, held.split(b"-"))
                if held in closed:
                    problems.append("%r came back" % held)
                if serial <= seen.get(producer, -1):
                    problems.append("%r came after %d" % (held, seen[producer]))
                seen[producer] = serial
                key = "q/close/open/t=50"
            else:
                key = "q/open/t=50"

    def live(work, *arguments):
        with contextlib.suppress(OSError), server.client() as client:
            work(client, *arguments)

    for _ in range(int(os.environ.get("KESTREL_KILL_ROUNDS", 6))):
        server = daemon()
        threads = [threading.Thread(target=live, args=(produce, number)) for number in range(4)]
        threads += [threading.Thread(target=live, args=(consume, {})) for _ in range(4)]
        for thread in threads:
            thread.start()
        enough = len(closed) + chances.randrange(100, 600)
        until(lambda: len(closed) >= enough)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        for thread in threads:
            thread.join(20)
    assert not problems, problems[:10]
    with daemon().client() as client:
        left = [data[:len(data) // 20] for data in iter(lambda: client.get("q"), None)]
    assert len(left) == len(set(left)), "an item came twice"
    assert not closed & set(left), "a closed item came back"
    assert not put - closed - maybe_closed - set(left), "an acknowledged item is lost"
    for number in range(4):
        mine = [int(item.split(b"-")[1]) for item in left if item.startswith(b"%d-" % number)]
        assert mine == sorted(mine), "out of order"


def test_systemd_is_told(tmp_path, daemon, monkeypatch):
    with tempfile.TemporaryDirectory() as short, socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(os.path.join(short, "notify"))
        told.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", os.path.join(short, "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        one = daemon("[queue]\n")
        words = []

        def hear(word):
            while not any(line.startswith(word) for line in words):
                words.extend(told.recv(4096).decode().split("\n"))
            found = next(line for line in words if line.startswith(word))
            words.remove(found)
            return found

        hear("READY=1")
        assert hear("STATUS=") == "STATUS=up: 0 queues, 0 items, 0 connections"
        hear("WATCHDOG=1")
        hear("WATCHDOG=1")
        one.client().put("q", b"x")
        one.process.send_signal(signal.SIGHUP)
        hear("RELOADING=1")
        assert int(hear("MONOTONIC_USEC=").split("=")[1]) > 0
        hear("READY=1")
        assert "1 queues, 1 items" in hear("STATUS=")
        assert one.end(signal.SIGTERM) == 0
        hear("STOPPING=1")


def test_a_systemd_that_does_not_listen_does_not_stop_the_service(tmp_path, daemon, monkeypatch):
    """The loop waited for it to read what it had been told."""
    with tempfile.TemporaryDirectory() as short, socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(os.path.join(short, "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", os.path.join(short, "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "2000")
        one = daemon("[server]\nadmin_port = off\n")
        client = one.client()
        with pytest.raises(BlockingIOError):
            while True:                      # until there is room for no more
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as another:
                    another.sendto(b"x", socket.MSG_DONTWAIT, os.path.join(short, "notify"))
        for _ in range(20):
            assert client.put("q", b"x") == "STORED\r\n"
        assert one.end(signal.SIGTERM) == 0


def activated(path, socks, names):
    """The daemon, with the settings in path / "conf" and these sockets, as by systemd."""
    def pass_on():
        for number, sock in enumerate(socks):
            os.dup2(sock.fileno(), 100 + number)
        for number in range(len(socks)):
            os.dup2(100 + number, 3 + number)

    with open(str(path / "log"), "wb") as log:
        return subprocess.Popen(
            ["sh", "-c", 'export LISTEN_PID=$$; exec "$@"', "sh", *command(
                "-c", path / "conf", "--port", 0, "--spool", path / "spool")],
            preexec_fn=pass_on, pass_fds=range(3, 3 + len(socks)), stderr=log,
            env={**os.environ, "LISTEN_FDS": str(len(socks)), "LISTEN_FDNAMES": ":".join(names)})


def test_sockets_that_systemd_passes_on(tmp_path, short_path):
    names = ["memcache", "admin", "unknown", "unknown"]
    socks = [socket.socket() for _ in names[:3]] + [socket.socket(socket.AF_UNIX)]
    for sock in socks:
        sock.bind(("127.0.0.1", 0) if sock.family == socket.AF_INET else str(short_path / "sock"))
        sock.listen(5)
    ports = [sock.getsockname()[1] for sock in socks]
    (tmp_path / "conf").write_text("[server]\ntext_port = %d\n" % ports[2])
    waiting = Client(ports[0])               # before there is a server
    process = activated(tmp_path, socks, names)
    try:
        for sock in socks:
            sock.close()
        assert waiting.put("q", b"x") == "STORED\r\n"
        with urllib.request.urlopen("http://127.0.0.1:%d/ping" % ports[1]) as answer:
            assert answer.read() == b"pong\n"
        with Client(ports[2]) as text:
            assert text.ask("get q\n") == ":x\n"
        with UnixClient(short_path / "sock") as client:
            assert client.ask("version\r\n") == "VERSION 1.0.0\r\n"
        assert (tmp_path / "log").read_text().count("listening on") == 4
    finally:
        waiting.close()
        process.terminate()
        assert end_of(process) == 0
    assert (short_path / "sock").exists()              # it is systemd's


def test_an_abstract_socket_that_systemd_passes_on(tmp_path):
    """Its name is bytes, which no name of a file is."""
    (tmp_path / "conf").write_text("[server]\nadmin_port = off\n")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("\0kestrel-test-%d" % os.getpid())
        sock.listen(5)
        process = activated(tmp_path, [sock], [""])
        try:
            with UnixClient(sock.getsockname()) as client:
                assert client.ask("version\r\n") == "VERSION 1.0.0\r\n"
        finally:
            process.terminate()
            assert end_of(process) == 0
    assert "listening on unix:@kestrel-test-" in (tmp_path / "log").read_text()


def test_a_text_socket_of_systemd_does_not_go_with_passwords(tmp_path):
    (tmp_path / "conf").write_text(secured(tmp_path, tls=False))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        assert end_of(activated(tmp_path, [sock], ["text"])) == 78
    assert "there is a socket for text clients" in (tmp_path / "log").read_text()


def test_a_log_file_that_was_moved_away_is_opened_anew(daemon, tmp_path):
    one = daemon("[server]\nlog_file = %s\n" % (tmp_path / "kestrel.log"),
                 log=tmp_path / "kestrel.log")
    client = one.client()
    client.put("first", b"x")
    os.rename(str(tmp_path / "kestrel.log"), str(tmp_path / "kestrel.log.1"))
    client.put("second", b"x")
    client.ask("delete first\r\n")
    told = (tmp_path / "kestrel.log").read_text()
    port = client.sock.getsockname()[1]
    assert "queue second created by memcache client 127.0.0.1:%d\n" % port in told
    assert "queue first deleted with 1 items by memcache client 127.0.0.1:%d\n" % port in told
    assert "queue first created" in (tmp_path / "kestrel.log.1").read_text()


def test_a_log_file_that_cannot_be_opened_anew_harms_nothing(daemon, tmp_path):
    (tmp_path / "logs").mkdir()
    one = daemon("[server]\nlog_file = %s\n" % (tmp_path / "logs" / "k"),
                 log=tmp_path / "logs" / "k")
    client = one.client()
    os.rename(str(tmp_path / "logs"), str(tmp_path / "moved"))
    assert client.put("a", b"x") == "STORED\r\n"
    one.process.send_signal(signal.SIGHUP)
    assert client.ask("delete a\r\n") == "DELETED\r\n"
    (tmp_path / "logs").mkdir()
    assert client.ask(b"set \xff 0 0 1\r\nx\r\n") == "STORED\r\n"
    assert "queue \\udcff created" in (tmp_path / "logs" / "k").read_text()
    assert one.end(signal.SIGTERM) == 0
    assert "Traceback" not in (tmp_path / "moved" / "k").read_text()


def test_a_log_file_that_is_a_pipe_without_a_reader_stops_nobody(daemon, tmp_path):
    os.mkfifo(str(tmp_path / "pipe"))
    reader = os.open(str(tmp_path / "pipe"), os.O_RDONLY | os.O_NONBLOCK)
    client = daemon().client()
    with open(str(tmp_path / "kestrel.conf"), "a") as conf:
        conf.write("log_file = %s\n" % (tmp_path / "pipe"))
    client.ask("reload\r\n")
    assert client.put("a", b"x") == "STORED\r\n"
    assert b"queue a created" in os.read(reader, 65536)
    os.close(reader)
    assert client.put("b", b"x") == "STORED\r\n"
    reader = os.open(str(tmp_path / "pipe"), os.O_RDONLY | os.O_NONBLOCK)
    assert client.put("c", b"x") == "STORED\r\n"
    assert b"queue c created" in os.read(reader, 65536)
    os.close(reader)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_log_file_on_a_full_disk_harms_nothing_and_is_changed_by_a_reload(daemon, tmp_path):
    text = "[server]\nadmin_port = off\nlog_file = %s\n"
    one = daemon(text % "/dev/full", log=tmp_path / "errors")
    with one.client() as client:
        assert client.put("a", b"x") == "STORED\r\n"
        (tmp_path / "kestrel.conf").write_text(text % (tmp_path / "log"))
        assert client.ask("reload\r\n") == "Reloaded config.\r\n"
        assert client.put("b", b"x") == "STORED\r\n"
    assert one.end(signal.SIGTERM) == 0
    told, log = one.log.read_text(), (tmp_path / "log").read_text()
    assert re.search("log_file: .*No space left on device: .* queue a created", told)
    assert "Traceback" not in told and "queue b created" not in told
    assert "queue b created" in log


def test_a_log_file_that_there_is_no_memory_to_open_stops_nothing(tmp_path, monkeypatch, capfd):
    handler = kestrel.LogFile(str(tmp_path / "log"))

    def append(text):
        raise MemoryError

    monkeypatch.setattr(handler, "_append", append)
    handler.handle(logging.makeLogRecord({"msg": "hello"}))
    assert re.fullmatch("log_file: .*out of memory: .*/log': hello\n", capfd.readouterr().err)


def test_a_log_that_nobody_reads_stops_nothing(tmp_path):
    port = free_port()
    (tmp_path / "conf").write_text("[server]\nenable_session_trace = true\nadmin_port = off\n")
    process = subprocess.Popen(command("-c", tmp_path / "conf", "--port", port, "--spool",
                                       tmp_path / "spool"), stderr=subprocess.PIPE)
    try:
        until(lambda: is_served(port))
        with Client(port) as client:
            for number in range(1000):
                assert client.put("q", b"x" * 150) == "STORED\r\n"
            assert client.stats()["queue_q_items"] == "1000"
            seen = process.stderr.read1(1 << 20)
            assert client.put("q", b"x") == "STORED\r\n"
        process.terminate()
        seen += process.stderr.read()
        assert end_of(process) == 0
        lines = seen.decode().splitlines()
        assert any(re.fullmatch(r"[1-9]\d+ log lines dropped, since nobody read them", line)
                   for line in lines)
        assert lines[-1].endswith("stopped") and b"Traceback" not in seen
    finally:
        process.kill()
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_spool_loads_ends_it_at_once(tmp_path, number):
    (tmp_path / "spool").mkdir()
    spool_of(tmp_path / "spool", q=(addx(b"x" * 10) + b"\1") * 1000000)
    with open(str(tmp_path / "log"), "wb") as log:
        process = subprocess.Popen(command("--port", free_port(), "--spool", tmp_path / "spool"),
                                   stderr=log)
    until(lambda: "journals in" in (tmp_path / "log").read_text())
    for ignored in (signal.SIGHUP, signal.SIGUSR1):
        process.send_signal(ignored)
    process.send_signal(number)
    assert end_of(process) == 0
    log = (tmp_path / "log").read_text()
    assert "stopped while loading" in log and "listening" not in log and "Traceback" not in log


def test_other_signals_are_logged_and_ignored(daemon):
    one = daemon()
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        one.process.send_signal(number)
        until(lambda: "%s: ignored" % number.name in one.log.read_text())
    with one.client() as client:
        assert client.put("q", b"x") == "STORED\r\n"
    assert one.end(signal.SIGTERM) == 0


def test_log_level(tmp_path, main):
    (tmp_path / "conf").write_text("[server]\nlog_file = /no/such/place\n")
    status, _, err = main("-c", tmp_path / "conf")
    assert status == 78 and "log_file: there is no directory /no/such" in err
    (tmp_path / "conf").write_text("[server]\nlog_file = %s\n" % tmp_path)
    status, _, err = main("-c", tmp_path / "conf")
    assert status == 78 and err == "kestrel.py: log_file %s: Is a directory\n" % tmp_path
    (tmp_path / "conf").write_text("[server]\nlog_level = loud\n")
    status, _, err = main("-c", tmp_path / "conf")
    assert status == 78 and "log_level" in err
    port = free_port()
    (tmp_path / "conf").write_text("[server]\nlog_level = error\nadmin_port = 0\n")
    with open(str(tmp_path / "log"), "wb") as log:
        process = subprocess.Popen(command(
            "-c", tmp_path / "conf", "--port", port, "--spool", tmp_path / "spool"), stderr=log)
    until(lambda: is_served(port))
    with Client(port) as client:
        assert client.put("q", b"x") == "STORED\r\n"
    process.terminate()
    assert end_of(process) == 0
    assert (tmp_path / "log").read_text() == ""


def test_log_lines_that_repeat_are_limited(monkeypatch):
    admit = kestrel._repeats()

    def line(message, seconds, *arguments, name="kestrel"):
        monkeypatch.setattr(kestrel, "time", types.SimpleNamespace(monotonic=lambda: seconds))
        record = logging.LogRecord(name, logging.INFO, "", 0, message, arguments, None)
        return record.getMessage() if admit(record) else None

    passed = [line("queue %s created", 100 + number / 1000, number) for number in range(1000)]
    assert list(filter(None, passed)) == ["queue %d created" % number
                                          for number in range(kestrel._REPEATS)]
    assert line("another", 101) == "another"
    assert line("queue %s created", 120, "q") == (
        "queue q created (and %d more like this since)" % (1000 - kestrel._REPEATS))
    assert line("queue %s created", 121, "r") == "queue r created"
    assert all(line("said", 100, name="kestrel.trace") for _ in range(1000))


def test_hash_password_on_the_command_line(main, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a secret\n"))
    status, out, err = main("--hash-password")
    assert status == 0 and err == ""
    assert kestrel.is_password(b"a secret", out.strip())
    assert main("--hash-password") == (1, "", "kestrel.py: there is no password\n")


def test_spool_and_files_are_for_their_owner_only(daemon, tmp_path):
    previous = os.umask(0)
    try:
        server = daemon()
        with server.client() as client:
            client.put("q", b"x")
    finally:
        os.umask(previous)
    assert os.stat(str(tmp_path / "spool")).st_mode & 0o777 == 0o700
    assert os.stat(str(tmp_path / "spool" / "q")).st_mode & 0o777 == 0o600


SCALA = '''
new KestrelConfig {
  listenAddress = "0.0.0.0"
  memcacheListenPort = 22133
  textListenPort = None
  thriftListenPort = Some(2229)
  queuePath = "/var/spool/kestrel"  // where = they are
  clientTimeout = 30.seconds
  /* maxOpenTransactions = 5 */
  default.maxJournalSize = 1.gigabyte
  default.syncJournal = Duration.MaxValue
  admin.httpPort = 2223
  admin.statsNodes = new StatsConfig {
    reporters = new TimeSeriesCollectorConfig
  }
  queues = new QueueBuilder {
    name = "weather"
    maxAge = 1800.seconds
    maxItems = 1500000
  } :: new QueueBuilder {
    name = "transient"
    keepJournal = false
    maxSize = Long.MaxValue
    disableAggressiveRewrites = true
  }
  aliases = new AliasBuilder {
    name = "all"
    destinationQueues = List("a", "b+c")
  }
  loggers = new LoggerConfig { level = Level.INFO }
}
'''


def test_verify_says_what_is_good(tmp_path, capsys, skip):
    queue = load(tmp_path)
    fill(queue, b"a", b"b")
    queue.close()
    spool_of(tmp_path, old=addx(b"x"), torn=addx(b"x") + b"\2\1", lost__found=b"")
    assert kestrel.main(["--verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok  old: 1 records, 1 items, 22 bytes, 0 of them with check sums",
        "ok  q: 5 records, 2 items, 95 bytes, 95 of them with check sums",
        "BAD torn: 1 records, 1 items, 24 bytes, 0 of them with check sums",
        "     record cut short: bytes 22 to 24 are damaged; 0 items may be lost"]
    data = bytearray((tmp_path / "q").read_bytes())
    data[38] ^= 1                            # an a
    (tmp_path / "q").write_bytes(data)
    os.unlink(str(tmp_path / "torn"))
    assert kestrel.main(["--verify", str(tmp_path), "--json"]) == 1
    old, found = map(json.loads, capsys.readouterr().out.splitlines())
    assert not old["damage"] and found["damage"] == [
        {"begin": 17, "end": 56, "why": "wrong check sum", "lost": 1}]
    assert (found["items"], found["records"], found["checked"]) == (1, 3, 56)    # what follows, too
    dumped = list(kestrel.dump_records(str(tmp_path / "q")))
    assert [record.get("operation") for record in dumped] == ["CHECK", None, "ADDX", "CHECK"]
    assert dumped[1] == {"offset": 17, "damage": "wrong check sum", "bytes": 39}
    assert [record["offset"] for record in dumped] == [0, 17, 56, 78]
    assert (tmp_path / "q").read_bytes() == data
    assert contents(load(tmp_path)) == [b"b"]
    assert kestrel.main(["--verify", str(tmp_path)]) == 0


def test_a_file_that_is_renamed_while_a_spool_is_listed(tmp_path, monkeypatch):
    """--verify and --copy failed when a server renamed a packed file at that moment."""
    spool_of(tmp_path, **{"q": addx(b"b"), "q.5.pack": addx(b"a")})
    scandir = os.scandir

    def renamed(path):
        entries = list(scandir(path))
        monkeypatch.setattr(os, "scandir", scandir)
        os.rename(str(tmp_path / "q.5.pack"), str(tmp_path / "q.5"))
        return entries

    monkeypatch.setattr(os, "scandir", renamed)
    assert kestrel._journal_names(str(tmp_path)) == {"q": {5: "q.5", None: "q"}}
    assert not (tmp_path / "q.5.pack").exists()


def test_a_file_that_is_written_to_while_it_is_dumped(tmp_path, monkeypatch, skip):
    """Its last write was not whole, and is when it is looked at again."""
    spool_of(tmp_path, q=addx(b"a") + addx(b"b")[:-1])
    find_damage = kestrel.find_damage

    def written(data):
        with open(str(tmp_path / "q"), "ab") as file:
            file.write(b"b")
        monkeypatch.setattr(kestrel, "find_damage", find_damage)
        return iter([])

    monkeypatch.setattr(kestrel, "find_damage", written)
    assert [(record["offset"], record.get("damage")) for record in kestrel.dump_records(
        str(tmp_path / "q"))] == [(0, None), (22, "record cut short")]
    spool_of(tmp_path, q=addx(b"a") + addx(b"b")[:-1])
    monkeypatch.setattr(kestrel, "find_damage", written)
    found = kestrel.verify_file(str(tmp_path / "q"))
    assert not found["damage"] and found["items"] == 2


def test_a_scrub_tells_of_damage(serve, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(kestrel, "__file__", compiled())       # it starts in no time
    server = serve("[server]\nscrub_interval = 50ms\nadmin_port = %d\n" % free_port())
    caplog.set_level(logging.INFO)
    client = server.client()
    client.put("q", b"hello")
    until(lambda: re.search("1 journal files read in [0-9]+ s, 0 are damaged", caplog.text))
    with open(str(tmp_path / "spool" / "q"), "r+b") as file:
        file.seek(40)
        file.write(b"?")
    until(lambda: "1 are damaged" in caplog.text)
    assert "spool/q: 1 damaged pieces, the first at byte 17 (wrong check sum)" in caplog.text
    assert server.server.broker.scrubbed[:2] == (1, 1)


def test_a_scrub_that_cannot_read_tells_so(serve, tmp_path, caplog, monkeypatch):
    """It said that 0 files were damaged."""
    monkeypatch.setattr(kestrel, "__file__", str(tmp_path / "nothing"))
    server = serve("[server]\nscrub_interval = 50ms\n")
    until(lambda: "scrub_interval: --verify ends with status 2" in caplog.text)
    assert server.server.broker.scrubbed is None


def test_a_scrub_needs_no_right_to_be_nice(tmp_path, monkeypatch, capsys):
    """The unit's SystemCallFilter forbids it."""
    def nice(increment):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(kestrel.os, "nice", nice)
    fill(load(tmp_path), b"x")
    assert kestrel.main(["--verify", str(tmp_path)]) == 0 and "1 items" in capsys.readouterr().out


def test_a_queue_is_packed_for_kestrel(tmp_path, caplog):
    queue = load(tmp_path)
    queue.add(b"flags", 5, now=NOW)
    fill(queue, b"a", b"b")
    queue.abort(queue.remove(open=True, now=NOW).xid, delay=10 ** 9, now=NOW)
    queue.add_later(b"late", 10 ** 9, now=NOW)
    queue.pause(kestrel.PAUSED_IN)
    queue.close()
    caplog.set_level(logging.INFO)
    assert kestrel.main(["--pack", "--kestrel", str(tmp_path / "q")]) == 0
    for words in ("items whose flags are dropped: 1", "delayed items that are available now: 2",
                  "pauses that end: 1"):
        assert words in caplog.text
    with open(str(tmp_path / "q"), "rb") as file:
        assert {record[0] for record in kestrel.read_records(file)} == {2, 4}
    assert contents(load(tmp_path)) == [b"flags", b"a", b"b", b"late"]


def test_what_cannot_be_packed_for_kestrel_stays_as_it_is(tmp_path, monkeypatch, main):
    """The delayed items were available after a failure."""
    queue = load(tmp_path)
    fill(queue, b"a", b"b", b"c")
    for delay in (10 ** 9, 2 * 10 ** 9):
        queue.abort(queue.remove(open=True, now=NOW).xid, delay=delay, now=NOW)
    queue.add_later(b"late", 10 ** 9, now=NOW)
    queue.close()
    pwrite = os.pwrite

    def fail(fd, data, offset):
        if offset == 0:                      # what is written anew
            raise OSError(errno.EFBIG, "File too large")
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        assert main("--pack", "--kestrel", tmp_path / "q")[0] == 1
    assert contents_of(tmp_path) == [b"c"]
    queue = load(tmp_path)
    assert len(queue.delays.items) == 3
    queue.close()
    assert main("--pack", "--kestrel", tmp_path / "q")[0] == 0
    assert contents(load(tmp_path)) == [b"a", b"b", b"c", b"late"]


def test_a_copy_of_a_spool_that_is_in_use(tmp_path):
    """Whatever happens to the files: the copy is the queue at some moment of the copying."""
    chances = seeded()
    source, dest = tmp_path / "source", tmp_path / "dest"
    for path in (source, dest):
        path.mkdir()
    life = Life(source, chances, checked=True)
    seen = set()
    for number in range(40):
        for _ in range(chances.choice([3, 40])):
            life.change()
            if chances.random() < .3:
                life.write()
                life.bench.step()
        life.write()
        life.bench.step()
        if chances.random() < .1:
            life.restart()
        copied = kestrel.copy_spool(str(source), str(dest))
        assert kestrel.copy_spool(str(source), str(dest)) == 0 <= copied
        assert contents_of(dest) == contents_of(source)
        seen.update(os.listdir(str(dest)))
    assert len(seen) > 1                     # it was rotated, or rewritten
    life.queue.close()
    life.queue.delete()
    with pytest.raises(OSError, match="is this the right spool"):
        kestrel.copy_spool(str(source), str(dest))
    (source / "other").write_bytes(addx(b"x"))
    kestrel.copy_spool(str(source), str(dest))
    assert sorted(os.listdir(str(dest))) == [".copy", "other"]


def test_only_what_is_a_copy_is_overwritten(tmp_path, main):
    (tmp_path / "spool").mkdir()
    spool_of(tmp_path / "spool", q=addx(b"x"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    for dest, words in (("mine", "this is no copy"), ("spool", "are the same")):
        with pytest.raises(OSError, match=words):
            kestrel.copy_spool(str(tmp_path / "spool"), str(tmp_path / dest))
    assert (tmp_path / "mine" / "notes").read_text() == "mine"
    assert main("--copy", tmp_path / "spool", tmp_path / "dest")[0] == 0
    assert main("--copy", tmp_path / "spool", tmp_path / "dest")[0] == 0
    with kestrel.serve(spool=str(tmp_path / "dest")) as server, kestrel.Client(
            port=server.port) as client:
        assert client.get("q") == b"x" and client.put("q", b"new")
    status, _, err = main("--copy", tmp_path / "spool", tmp_path / "dest")
    assert status == 1 and "a server has used it" in err
    assert contents_of(tmp_path / "dest") == [b"new"]


def test_no_password_is_put_where_none_is_wanted(serve):
    server = serve()
    with pytest.raises(kestrel.ServerError, match="wants no login"):
        kestrel.Client(port=server.port, user="ann", password="secret")
    assert not server.server.broker.queues


@pytest.mark.parametrize("failing", ["rename", "unlink", "fsync", "pwrite", "open"])
def test_a_copy_that_is_broken_off_can_be_loaded(tmp_path, monkeypatch, failing):
    """At each of its steps: what had been safe when the last whole copy began is there, or has
    been taken since."""
    chances = seeded()
    source, dest = tmp_path / "source", tmp_path / "dest"
    for path in (source, dest):
        path.mkdir()
    queue = kestrel.Queue("q", str(source), kestrel.QueueConfig(
        max_memory_size=3000, sync_journal=None), now=NOW)
    for number in range(8):
        for one in range(chances.randrange(30)):
            fill(queue, b"%03d-%02d" % (number, one) + b"x" * 50)
        take(queue, chances.randrange(30))
        for attempt in range(8):
            left, call = [attempt], getattr(os, failing)

            def fail(*arguments, **options):
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.EIO, "broken off")
                return call(*arguments, **options)

            with monkeypatch.context() as patch, contextlib.suppress(OSError):
                patch.setattr(os, failing, fail)
                kestrel.copy_spool(str(source), str(dest))
            waiting = [item.data for item in itertools.chain(
                queue.items, queue._behind.fresh if queue._behind else [])]
            found = contents_of(dest) if os.listdir(str(dest)) else []
            assert [item for item in found if item in waiting] == [
                item for item in waiting if item in found]
        kestrel.copy_spool(str(source), str(dest))
        assert contents_of(dest) == contents_of(source)
    queue.close()


@pytest.mark.parametrize("change", ["to the tail", "delayed", "packed"])
@pytest.mark.parametrize("full", [True, False])
def test_a_copy_is_as_before_or_after_a_pass_wherever_that_ends(tmp_path, monkeypatch, change,
                                                                 full):
    """Old items were lost from the copy: the file that had them was deleted before the one with
    what became of them was there. And those that followed: they were taken in their place."""
    source, dest = tmp_path / "source", tmp_path / "dest"
    source.mkdir()
    dest.mkdir()
    queue = kestrel.Queue("q", str(source), kestrel.QueueConfig(
        max_memory_size=3000, sync_journal=None), now=NOW)
    fill(queue, b"precious", *(b"%03d" % number + b"x" * 100 for number in range(60)))
    held = queue.remove(open=True, now=NOW).xid
    kestrel.copy_spool(str(source), str(dest))
    old = contents_of(dest)
    assert len(os.listdir(str(dest))) > 2
    if change == "packed":
        queue.close()
        assert kestrel.main(["--pack", str(source / "q")]) == 0
    else:
        fill(queue, b"y" * 3000, b"a", b"b")
        queue.abort(held, tail=change == "to the tail", now=NOW,
                    delay=10 ** 6 if change == "delayed" else 0)
        take(queue, 61)
        opened = queue.remove(open=True, now=NOW)
        assert opened.data == b"a"
        take(queue, 1)
        queue.close()
    new = contents_of(source)
    shutil.copytree(str(dest), str(tmp_path / "old"))
    found = []
    for left in itertools.count():
        shutil.rmtree(str(dest))
        shutil.copytree(str(tmp_path / "old"), str(dest))
        with monkeypatch.context() as patch:
            for name in ("pwrite",) if full else ("pwrite", "rename", "unlink", "fsync"):
                def fail(*arguments, call=getattr(os, name)):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise OSError(errno.EIO, "broken off")
                    return call(*arguments)

                patch.setattr(os, name, fail)
            try:
                kestrel.copy_spool(str(source), str(dest))
                break
            except OSError:
                pass
        assert not full or not [name for name in os.listdir(str(dest)) if "~" in name]
        found.append(contents_of(dest))
        assert found[-1] == old or found[-1] == new and not full
    assert contents_of(dest) == new and found[0] == old and len(found) > (0 if full else 10)
    assert not os.listdir(str(dest / ".copy"))


def test_a_server_finishes_a_pass_of_a_copy_that_was_broken_off(tmp_path):
    for name in ("q.1", "q"):
        (tmp_path / name).write_bytes(addx(b"a") + addx(b"b"))
    (tmp_path / ".copy").mkdir()
    kestrel.note_files(str(tmp_path), [("q.1", None, 0), ("q", "q", len(addx(b"a")))])
    with kestrel.serve(spool=str(tmp_path)) as server, kestrel.Client(port=server.port) as client:
        assert client.get("q") == b"a" and client.get("q") is None
    assert sorted(os.listdir(str(tmp_path))) == ["q"]


@promise(1)
def test_a_warm_copy_takes_over_when_a_machine_is_lost(daemon, tmp_path):
    """As the README has it: a copy again and again; a server on it has what was there by then."""
    server = daemon()
    copying = subprocess.Popen(command("--copy", tmp_path / "spool", tmp_path / "warm", "--every",
                                       "20ms"), stderr=subprocess.DEVNULL)
    try:
        with server.client() as client:
            for number in range(20):
                assert client.put("q", b"%d" % number) == "STORED\r\n"
                assert client.put("r", b"%d" % number) == "STORED\r\n"
            assert client.get("q") == b"0" and client.get("r/open") == b"0"
            until(lambda: all((tmp_path / "warm" / name).is_file()
                              and (tmp_path / "warm" / name).read_bytes()
                              == (tmp_path / "spool" / name).read_bytes() for name in "qr"))
        server.end(signal.SIGKILL)
        assert copying.poll() is None
    finally:
        copying.kill()
        copying.wait()
    os.rename(str(tmp_path / "spool"), str(tmp_path / "lost"))
    os.rename(str(tmp_path / "warm"), str(tmp_path / "spool"))
    with daemon().client() as client:
        assert [client.get("q") for _ in range(20)] == [b"%d" % number for number in range(1, 20)] + [
            None]
        assert client.get("r") == b"0"       # it was open


def test_a_pass_of_a_copy_that_fails_is_made_again(tmp_path, monkeypatch, caplog):
    """A full disk for a moment ended `--copy --every`."""
    queue = load(tmp_path)
    (tmp_path / "warm").mkdir()
    passes, copy = [], kestrel.copy_spool

    def copy_spool(source, dest):
        passes.append(None)
        if len(passes) in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device", dest)
        return copy(source, dest)

    def sleep(seconds):
        if len(passes) == 4:
            raise KeyboardInterrupt
        queue.add(b"%d" % len(passes), now=NOW)

    monkeypatch.setattr(kestrel, "copy_spool", copy_spool)
    monkeypatch.setattr(kestrel.time, "sleep", sleep)
    assert kestrel.main(["--copy", str(tmp_path), str(tmp_path / "warm"), "--every", "1s"]) == 0
    queue.close()
    assert contents_of(tmp_path / "warm") == [b"1", b"2", b"3"]
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1 and "No space left" in told[0] and "trying again" in told[0]


def test_a_copy_of_a_server_that_works(serve, tmp_path):
    """Nothing that was stored when the last pass began is missing, but what has been taken."""
    server = serve("[queue]\nmax_memory_size = 20kb\ndefault_journal_size = 4kb\n")
    client, stop = server.client(), threading.Event()
    stored, taken, failures = [], [], []

    def work():
        number = 0
        while not stop.is_set():
            number += 1
            if client.put("q", b"%06d" % number + b"x" * 200) == "STORED\r\n":
                stored.append(b"%06d" % number)
            if number % 3 == 0:
                taken.append((client.get("q") or b"")[:6])
            if number % 50 == 0:
                client.put("other", b"x")
                client.ask("delete other\r\n")

    thread = threading.Thread(target=work)
    thread.start()
    dest = tmp_path / "dest"
    dest.mkdir()
    for number in range(20):
        until(lambda number=number: len(taken) > 3 * number)
        before, gone = len(stored), len(taken)
        kestrel.copy_spool(str(tmp_path / "spool"), str(dest))
        after = len(taken) + 1
        found = [item[:6] for item in contents_of(dest, "q")]
        if not set(stored[:before]) - set(taken[:]) - set(found) - set(stored[gone:after]) == set():
            failures.append((before, gone, len(found)))
    stop.set()
    thread.join()
    assert not failures and len(taken) > 50


def test_a_copy_lacks_no_item_that_is_moved_during_a_pass(serve, tmp_path):
    """From a queue that is copied later to one that has been copied, through several queues."""
    chances = seeded()
    names, dest = "abcd", tmp_path / "dest"
    dest.mkdir()
    server = serve("[queue b]\nmax_age = 1ms\nexpire_to_queue = a\n"
                   "[queue c]\nmax_deliveries = 1\ndead_letter_queue = b\n")
    client, stop = server.client(), threading.Event()
    for number in range(300):
        client.put(chances.choice("acd"), b"%03d" % number)

    def work():
        while not stop.is_set():
            client.ask("move %s %s %d\r\n" % (*chances.sample(names, 2), chances.randrange(1, 100)))
            client.ask("flush_expired b\r\n")
            client.get("c/open")
            client.get("c/abort")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(12):
            kestrel.copy_spool(str(tmp_path / "spool"), str(dest))
            found = {item for name in names if (dest / name).exists()
                     for item in contents_of(dest, name)}
            assert len(found) == 300
    finally:
        stop.set()
        thread.join()


def test_a_copy_holds_up_moves_while_it_is_made_unless_it_hangs(serve, tmp_path, monkeypatch):
    server = serve()
    client = server.client()
    assert client.put("a", b"x") == "STORED\r\n"
    spool, dest = tmp_path / "spool", tmp_path / "dest"
    dest.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(kestrel, "COPY_SECONDS", 0)
        with pytest.raises(OSError, match="copying takes so long"):
            kestrel.copy_spool(str(spool), str(dest))
    assert contents_of(dest, "a") == [b"x"]
    assert not kestrel.is_being_copied(str(spool))
    for hangs in (False, True):
        lock = kestrel._hold_moves(str(spool))
        if hangs:
            os.utime(str(spool / ".copying"), (time.time() - 11,) * 2)
        assert kestrel.is_being_copied(str(spool)) is not hangs
        client.send("move a b\r\n")
        if not hangs:
            assert server.client().get("b/t=50") is None
            assert not select.select([client.sock], [], [], .1)[0]
            os.close(lock)
        assert client.line() == "1\r\n"
        if hangs:
            os.close(lock)
        client.ask("move b a\r\n")


@promise(1)
@pytest.mark.parametrize("command", ["move a b", "get a"])
def test_a_move_looks_for_a_copy_before_and_after_all_queues_have_the_item(serve, monkeypatch,
                                                                            command):
    """It looked before the children had theirs."""
    server, seen = serve("[queue a]\nexpire_to_queue = b\n"), []
    client, queues = server.client(), server.server.broker.queues
    for name in ("b", "b+child"):
        client.put(name, b"x")
    client.ask("set a 0 %d 1\r\nx\r\n" % (0 if "move" in command else 1000001))       # in 1970
    monkeypatch.setattr(kestrel, "is_being_copied", lambda spool: seen.append(
        [len(queues[name].opens) + queues[name].count for name in ("a", "b", "b+child")]))
    assert client.ask(command + "\r\n") == ("1\r\n" if "move" in command else "END\r\n")
    until(lambda: not queues["a"].count and not queues["a"].opens)
    assert seen == [[1, 1, 1], [1, 2, 2]]


@promise(1)
def test_a_pass_that_is_broken_off_changes_no_queue_of_the_copy(tmp_path, monkeypatch):
    """An item that had been moved from a queue that was copied to one that was not was lost."""
    source, dest = tmp_path / "source", tmp_path / "dest"
    source.mkdir()
    dest.mkdir()
    queues = {name: kestrel.Queue(name, str(source)) for name in "abc"}
    fill(queues["a"], b"1", b"2")
    kestrel.copy_spool(str(source), str(dest))
    fill(queues["c"], *data_of(take(queues["a"], 2)))
    fill(queues["b"], b"3")
    prepare = kestrel._prepare_copy

    def broken_off(name, *arguments):
        if name == "c":
            shutil.copytree(str(dest), str(tmp_path / "killed"))      # as kill -9 leaves it
            raise OSError(errno.ENOSPC, "full")
        return prepare(name, *arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(kestrel, "_prepare_copy", broken_off)
        kestrel.copy_spool(str(source), str(dest))
    assert (dest / "a").stat().st_size < (tmp_path / "killed" / "a").stat().st_size
    for path in (dest, tmp_path / "killed"):
        assert [contents_of(path, name) for name in "abc"] == [[b"1", b"2"], [], []]
    kestrel.copy_spool(str(source), str(dest))
    assert [contents_of(dest, name) for name in "abc"] == [[], [b"3"], [b"1", b"2"]]
    for queue in queues.values():
        queue.close()


@pytest.mark.parametrize("step", [60, -60])
def test_a_pass_in_which_the_clock_is_set_is_made_again(tmp_path, monkeypatch, step):
    """A server that goes by the clock would not have waited."""
    source, dest = tmp_path / "source", tmp_path / "dest"
    source.mkdir()
    dest.mkdir()
    fill(load(source), b"x")
    passes, make = [], kestrel._copy_queues

    def counted(*arguments):
        passes.append(None)
        if len(passes) == 1:
            patch.setattr(kestrel.time, "time", lambda: real() + step)
        return make(*arguments)

    with monkeypatch.context() as patch:
        real = time.time
        patch.setattr(kestrel, "_copy_queues", counted)
        kestrel.copy_spool(str(source), str(dest))
    assert len(passes) == 2 and contents_of(dest) == [b"x"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_where_moves_cannot_be_held_up_a_copy_says_so_once(tmp_path, monkeypatch, caplog, number):
    source, dest = tmp_path / "source", tmp_path / "dest"
    source.mkdir()
    dest.mkdir()
    fill(load(source), b"x")
    make = os.mkdir

    def fail(path, *mode):
        if path.endswith(".copying"):
            raise OSError(number, os.strerror(number), path)
        make(path, *mode)

    with monkeypatch.context() as patch:
        patch.setattr(kestrel.os, "mkdir", fail)
        for _ in range(2):
            kestrel.copy_spool(str(source), str(dest))
    assert contents_of(dest) == [b"x"] and caplog.text.count(os.strerror(number)) == 1
    kestrel.copy_spool(str(source), str(dest))
    assert (source / ".copying").stat().st_mode & 0o777 == 0o777        # for any user


def test_convert(tmp_path, capsys):
    """What is printed for the configuration of a Kestrel is one of ours."""
    (tmp_path / "production.scala").write_bytes(b"// caf\xe9\n" + SCALA.encode())     # is not UTF-8
    assert kestrel.main(["--convert", str(tmp_path / "production.scala")]) == 0
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if line.startswith("#")] == [
        "# not taken over: StatsConfig", "# not taken over: LoggerConfig level = Level.INFO",
        "# not taken over: KestrelConfig textListenPort = None",
        "# not taken over: QueueBuilder disableAggressiveRewrites = true"]
    (tmp_path / "kestrel.conf").write_text(told)
    config = kestrel.Config(str(tmp_path / "kestrel.conf"))
    assert config.server.listen == ("0.0.0.0",) and config.server.thrift_port == 2229
    assert config.server.client_timeout == 30000 and config.server.queue_path.endswith("kestrel")
    assert config.queue("x").sync_journal is None and config.queue("x").max_journal_size == 1 << 30
    assert config.queue("weather").max_age == 1800000
    assert config.queue("weather").max_items == 1500000
    assert not config.queue("transient").keep_journal
    assert config.aliases == {"all": ("a", "b+c")}
    assert kestrel.main(["--convert", str(tmp_path / "none")]) == 1
    (tmp_path / "text").write_text("hello\n")
    assert kestrel.main(["--convert", str(tmp_path / "text")]) == 1


def test_convert_takes_over_whole_values_only(tmp_path, capsys):
    """The first factor of a product was taken over, and a call as if it were text."""
    (tmp_path / "scala").write_text('''new KestrelConfig {
        queuePath = sys.props("spool.dir"); maxOpenTransactions = 10 * 10
        clientTimeout = 30 /* of them */
            . seconds                   // "is 30s"
        default.maxMemorySize = 128 * 1024 * 1024; default.maxJournalSize = 1.gigabyte * 4
        default.maxAge = 1.day + 12.hours
        default.maxItems = if (isSmall) { 5 } else { 6 }
        default.maxItemSize =
            1000L
        default.expireToQueue = "a" + "b"
        queues = new QueueBuilder { name = "jobs"; keepJournal = !false
                                    fanoutOnly = true; expireToQueue = Some("old") } ::
                 new QueueBuilder { name = prefix + "x"; maxItems = 7 } :: Nil
        aliases = new AliasBuilder { name = "all"; destinationQueues = List("a", "b") ++
            more }
    }''')
    assert kestrel.main(["--convert", str(tmp_path / "scala")]) == 0
    assert [line.strip() for line in capsys.readouterr().out.splitlines() if line] == [
        "[server]", "# not taken over: QueueBuilder without a plain name: name = prefix + \"x\"",
        "# not taken over: QueueBuilder without a plain name: maxItems = 7",
        "# not taken over: KestrelConfig queuePath = sys.props(\"spool.dir\")",
        "max_open_transactions = 100", "client_timeout = 30s", "[queue]",
        "max_memory_size = 134217728",
        "# not taken over: KestrelConfig maxJournalSize = 1.gigabyte * 4",
        "# not taken over: KestrelConfig maxAge = 1.day + 12.hours",
        "# not taken over: KestrelConfig maxItems = if (isSmall)", "max_item_size = 1000",
        "# not taken over: KestrelConfig expireToQueue = \"a\" + \"b\"",
        "[queue jobs]", "# not taken over: QueueBuilder keepJournal = !false",
        "fanout_only = true", "expire_to_queue = old", "[alias all]",
        "# not taken over: AliasBuilder destinationQueues = List(\"a\", \"b\") ++"]


# == Crashes ==============================================================================


class Recorder:
    """Notes every call that changes the disk, so that the directory can be rebuilt as it
    was, or may have been, after each."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.files = {}                      # descriptor -> number of the file, "dir"
        self.names = {}                      # path -> number of the file
        self.serial = 0
        for name in ("open", "close", "pwrite", "ftruncate", "rename", "unlink", "fsync", "dup"):
            monkeypatch.setattr(kestrel.os, name, functools.partial(
                getattr(self, "_" + name), getattr(os, name)))

    def _open(self, real, path, flags, *mode):
        fd = real(path, flags, *mode)
        if flags & os.O_DIRECTORY or os.path.isdir(path):
            self.files[fd] = "dir"
        else:
            if path not in self.names:
                self.serial += 1
                self.names[path] = self.serial
                self.calls.append(("create", path, self.serial))
            self.files[fd] = self.names[path]
        return fd

    def _dup(self, real, fd):
        copy = real(fd)
        self.files[copy] = self.files[fd]
        return copy

    def _close(self, real, fd):
        self.files.pop(fd, None)
        real(fd)

    def _pwrite(self, real, fd, data, offset):
        self.calls.append(("write", self.files[fd], offset, bytes(data)))
        return real(fd, data, offset)

    def _ftruncate(self, real, fd, size):
        self.calls.append(("truncate", self.files[fd], size))
        real(fd, size)

    def _rename(self, real, old, new):
        self.calls.append(("rename", old, new))
        self.names[new] = self.names.pop(old)
        real(old, new)

    def _unlink(self, real, path):
        self.calls.append(("unlink", path))
        del self.names[path]
        real(path)

    def _fsync(self, real, fd):
        self.calls.append(("fsync", self.files[fd]))


class Disk:
    """What is on the disk after the recorded calls, and what would be after a power cut."""

    def __init__(self):
        self.names, self.data = {}, collections.defaultdict(bytes)
        self.safe_names, self.safe_data = {}, collections.defaultdict(bytes)

    def apply(self, call, cut=None):
        kind, *rest = call
        if kind == "create":
            self.names[rest[0]] = rest[1]
        elif kind == "write":
            number, offset, data = rest
            old = self.data[number].ljust(offset, b"\0")
            data = data[:cut]
            self.data[number] = old[:offset] + data + old[offset + len(data):]
        elif kind == "truncate":
            self.data[rest[0]] = self.data[rest[0]][:rest[1]]
        elif kind == "rename":
            self.names[rest[1]] = self.names.pop(rest[0])
        elif kind == "unlink":
            del self.names[rest[0]]
        elif rest[0] == "dir":
            self.safe_names = dict(self.names)
        else:
            self.safe_data[rest[0]] = self.data[rest[0]]

    def found(self, names, data):
        """What a server finds in a directory like that."""
        path = tempfile.mkdtemp()
        try:
            for name, number in names.items():
                with open(os.path.join(path, os.path.basename(name)), "wb") as file:
                    file.write(data[number])
            return contents(load(path), FAR)
        finally:
            shutil.rmtree(path)


NOTHING = [], {}, {}, 0, 0                   # a state, see Life.state()


def check_found(found, before, after):
    """Between two states, see Life.state(), `found` is what a crash may leave: nothing lost that
    was there all the time, nothing back that was gone, in order."""
    alive = [set(on_disk(state)) for state in (before, after)]
    assert len(found) == len(set(found)), "an item came twice"
    assert not (alive[0] & alive[1]) - set(found), "lost"
    for data in set(found) - alive[0]:
        assert int(data.split(b"-")[0]) > before[3], "%r came back" % data
    if before[4] != after[4]:
        return                               # they may have changed places
    stayed = set(before[0]) & set(after[0])
    orders = [[data for data in waiting if data in stayed] for waiting in (before[0], after[0])]
    if orders[0] == orders[1]:
        assert [data for data in found if data in stayed] == orders[0], "out of order"


@promise(3)
def test_a_crash_after_any_call_loses_nothing(tmp_path, monkeypatch, caplog):
    """A queue lives through adds, reads, expiry, rotation, packing, rewriting and
    read-behind. The directory is rebuilt as after a crash at each call that changed it, the
    last write also cut short, and, with sync_journal = 0, as a power cut would leave it."""
    caplog.set_level("ERROR")
    chances = seeded()
    everything = "KESTREL_ALL_CRASHES" in os.environ
    checked = 0
    for number in range(200 if everything else 12):
        path = tmp_path / str(number)
        path.mkdir()
        with monkeypatch.context() as patch:
            recorder = Recorder(patch)
            life = Life(path, chances)
            calls = recorder.calls
            for _ in range(60):
                for _ in range(chances.randrange(12)):
                    life.change()
                    if chances.random() < 0.05:
                        life.serial += 1
                        life.queue.add(b"%d-expired" % life.serial, expiry=1, now=0)
                        life.waiting.append(b"%d-expired" % life.serial)
                    while life.waiting and life.waiting[0].endswith(b"expired"):
                        life.waiting.popleft()
                        assert life.queue.discard_expired(life.now, 1) == 1
                calls.append(("reached", life.state()))
                life.queue.write()
                calls.append(("acknowledged", life.state()))
                if life.settings["sync_journal"] == 0 and chances.random() < 0.5:
                    sync(life.queue)
                    calls.append(("durable", life.state()))
                for _ in range(chances.randrange(3)):
                    life.bench.step()
            for task in life.bench.tasks:
                task.close()
            life.queue.journal.close()
        disk = Disk()
        before = after = durable = NOTHING
        share = 1 if everything else 0.05
        for call in calls:
            if call[0] == "reached":
                after = call[1]
                continue
            if call[0] == "acknowledged":
                before = call[1]
                continue
            if call[0] == "durable":
                durable = call[1]
                continue
            if call[0] == "write":
                length = len(call[3])
                cuts = {1, length // 2, length - 1, *(chances.randrange(length + 1)
                                                      for _ in range(3))}
                for cut in cuts:
                    if chances.random() < share:
                        torn = copy.deepcopy(disk)
                        torn.apply(call, cut)
                        check_found(disk.found(torn.names, torn.data), before, after)
                        checked += 1
            disk.apply(call)
            if chances.random() < share:
                check_found(disk.found(disk.names, disk.data), before, after)
                checked += 1
            if life.settings["sync_journal"] == 0 and chances.random() < share:
                check_found(disk.found(disk.safe_names, disk.safe_data), durable, after)
                check_found(disk.found(disk.names, disk.safe_data), durable, after)
                checked += 2
    print(checked, "states")
    assert checked > 200


class IllLife(Life):
    """A Life over a disk that fails, with a worker that takes its time for some writes. It notes
    among the recorded calls what the answers have said by then: what must be there, and the
    states that may have been reached as well."""

    def __init__(self, path, chances, recorder):
        self.acked = NOTHING
        self.history = []                    # states that are not safe yet
        self.unclear = []                    # those that could not be cut off
        self.calls = recorder.calls
        self.work = collections.deque()      # (call, done) of the worker
        super().__init__(path, chances)
        self.bench.failed = self.go_back
        if chances.random() < 0.5:
            self.bench.work = lambda *work: self.work.append(work)

    def tell(self):
        self.calls.append(("told", self.acked, self.unclear + self.history))

    def go_back(self, queue, error):
        waiting, opens, delayed, _, _ = self.acked
        self.waiting, self.opens = collections.deque(waiting), dict(opens)
        self.delayed = dict(delayed)
        self.unclear = self.unclear + self.history if self.queue.journal.torn else []
        self.history = []
        self.tell()

    def change(self):
        with contextlib.suppress(OSError):   # it cannot be read: nothing has changed
            super().change()

    def write(self):
        state = self.state()
        self.history.append(state)
        self.queue.history.when_safe(functools.partial(self.settled, state))
        self.tell()
        with contextlib.suppress(OSError):
            self.queue.write()
        if not self.queue.journal.torn:
            self.unclear = []
        self.tell()

    def settled(self, state, error):
        if not error:
            # Of what is unclear there may be something, though it was not taken since.
            self.acked = state if not self.unclear else state[:3] + self.acked[3:]
            self.history.remove(state)
            self.tell()

    def work_on(self):
        """Let the worker do the oldest call."""
        if self.work:
            call, done = self.work.popleft()
            error = None
            try:
                error = call()
            except OSError as failure:
                error = failure
            done(error)

    def sync(self):
        queue = self.queue
        if not queue.needs_sync():
            return
        sync = None
        try:
            call, sync = queue.begin_sync()
            error = call()
        except OSError as failure:
            error = failure
        if self.chances.random() < 0.3:
            self.write()                     # while it is under way
        if error:
            queue.sync_failed(sync, error)
        else:
            queue.synced(sync)


def check_told(found, acked, reached):
    """Whether what a restart finds is what the answers said."""
    if found == on_disk(acked):
        return
    assert reached, (found, acked)
    for state in reached:
        try:
            check_found(found, acked, state)
            return
        except AssertionError:
            if state is reached[-1]:
                raise


FAILING_CALLS = ["pwrite", "fsync", "ftruncate", "rename", "unlink", "open"]


@promise(2)
def test_contents_are_what_the_answers_said_whatever_fails(tmp_path, monkeypatch, caplog):
    """Calls fail, once or for a while; the server is killed after each call that changed the
    disk, or stopped while it still fails, and started on a good disk."""
    caplog.set_level("CRITICAL")
    chances = seeded()
    everything = "KESTREL_ALL_CRASHES" in os.environ
    checked = unclear = 0
    for number in range(150 if everything else 15):
        path = tmp_path / str(number)
        path.mkdir()
        with monkeypatch.context() as patch:
            recorder = Recorder(patch)
            disk = FailingDisk(patch)
            patch.setattr(kestrel, "_LARGE", 200)
            life = IllLife(path, chances, recorder)
            for _ in range(80):
                if chances.random() < 0.2:
                    disk.once = chances.random() < 0.5
                    disk.failing = {} if chances.random() < 0.3 else {
                        name: chances.choice([errno.EIO, errno.ENOSPC])
                        for name in chances.sample(FAILING_CALLS, chances.choice([1, 2]))}
                for _ in range(chances.randrange(6)):
                    life.change()
                life.write()
                if chances.random() < 0.7:
                    life.work_on()
                if chances.random() < 0.5:
                    life.sync()
                for _ in range(chances.randrange(3)):
                    life.bench.step()
                if chances.random() < 0.3:
                    calls, life.bench.calls = life.bench.calls, []
                    for call in calls:
                        if call != life.queue._release_now:            # it has another clock
                            call()
                unclear += bool(life.unclear)
            while life.work:
                life.work_on()
            life.bench.work = None
            life.write()
            recorder.calls.append("stopped")
            with contextlib.suppress(OSError):
                life.queue.close()           # it is stopped in the middle of it
        check_told(contents_of(path, now=FAR), life.acked, life.unclear + life.history)
        disk = Disk()
        told = None
        share = 1 if everything else 0.1
        for call in recorder.calls[:recorder.calls.index("stopped")]:
            if call[0] == "told":
                told = call[1:]
            else:
                disk.apply(call)
            if told and chances.random() < share:
                check_told(disk.found(disk.names, disk.data), *told)
                checked += 1
    print(checked, "states", unclear, "unclear")
    assert checked > 100 and (unclear or not everything)


# == Strangers ============================================================================


# Sessions that make sense, by the protocol: each a list of what is said. None of them shuts the
# server down, which is anybody's right on this machine.
SESSIONS = {
    "memcache": [
        [b"set q 0 0 5\r\nhello\r\n", b"get q\r\n", b"gets q/t=1\r\n", b"quit\r\n"],
        [b"set q 7 10 3 noreply\r\nabc\r\n", b"get q/open\r\n", b"get q/close/open\r\n",
         b"get q/abort\r\n", b"get q/peek\r\n"],
        [b"get q r+s w/t=3\r\n", b"monitor q 1 3\r\n", b"confirm q 2\r\n"],
        [b"set r 0 0 2000\r\n" + b"x" * 2000 + b"\r\n", b"flush r\r\n", b"flush_all\r\n",
         b"delete r\r\n", b"flush_expired q\r\n", b"flush_all_expired\r\n"],
        [b"stats\r\n", b"dump_stats\r\n", b"dump_config q\r\n", b"version\r\n", b"reload\r\n",
         b"status up\r\n", b"status\r\n", b"verbosity 1\r\n", b"add q 0 0 1\r\nx\r\n"],
    ],
    "text": [
        [b"put q:\none\ntwo\n\n", b"get q\n", b"get q 5\n", b"peek q\n", b"confirm q 1\n"],
        [b"put r 100:\n" + b"y" * 500 + b"\n\n", b"monitor r 5 2\n", b"flush r\n", b"delete r\n",
         b"status\n", b"status up\n", b"version\n", b"quit\n"],
    ],
    "thrift": [
        [thrift_put(b"q", b"one", b"two"), thrift_get(b"q", 2), thrift_get(b"q", 1, 5, 50),
         call(b"confirm", thrift_string(1, b"q"), thrift_ids(2, [1, 2]))],
        [call(b"peek", thrift_string(1, b"q")), call(b"get_version"), call(b"current_status"),
         call(b"abort", thrift_string(1, b"q"), thrift_ids(2, [1])),
         call(b"flush_queue", thrift_string(1, b"q")), call(b"nothing", strict=False)],
    ],
    "admin": [
        [request("GET /ping").encode(), request("GET /stats.json").encode(),
         request("GET /metrics").encode(), request("HEAD /").encode()],
        [request("POST /flush?queue=q", "Content-Length: 3", body="abc").encode(),
         request("GET /peek?queue=q%ff").encode(), request("GET /history.json?queue=q").encode(),
         request("POST /delete?queue=q", "Origin: http://[::1]:2223").encode()],
    ],
}


def mutated(chances, words):
    """What a session might have said if its client was broken, or wicked."""
    words = list(words)
    for _ in range(chances.randrange(4)):
        at = chances.randrange(len(words))
        word = bytearray(words[at])
        where = chances.randrange(len(word) + 1)
        kind = chances.randrange(10)
        if kind == 0:
            del word[where:]
        elif kind == 1:
            words.append(bytes(word))
        elif kind == 2:
            chances.shuffle(words)
            continue
        elif kind == 3 and word:
            word[where % len(word)] ^= 1 << chances.randrange(8)
        elif kind == 4:
            words[at:at] = [bytes(word)] * chances.randrange(2, 50)
            continue
        elif kind == 5:
            word = bytearray(re.sub(rb"[0-9]+", lambda match: chances.choice(
                [b"99999999999999999999999", b"-1", b"2147483648", b"0", b"1e9", match[0]]), word))
        elif kind == 6:
            word[where:where] = bytes(chances.randrange(1, 20))
        elif kind == 7:
            word[where:where] = chances.choice([b"a", b"/", b" ", b"\xff"]) * 9000
        elif kind == 8:
            word = word.replace(b"q", b"q/open/close/abort/peek/t=1/open"[:where + 2], 1)
        else:
            word[where:where] = chances.choice(list(SESSIONS.values()))[0][0]
        words[at] = bytes(word)
    # Nobody may tell it to stop, nor to refuse what the check asks for.
    return re.sub(rb"(?i)shutdown|readonly|quiescent|quiesce|writeavoid", b"nothing",
                  b"".join(words))


AUTHORIZED = b"Authorization: Basic " + base64.b64encode(b"bob:a secret") + b"\r\nHost: here"


def misbehave(chances, ports, tls):
    """One client: says something in pieces, hears some of the answers or none, and goes. tls: an
    ssl.SSLContext, for a server that wants to know who comes in, or None."""
    protocol = chances.choice([name for name in SESSIONS if name in ports])
    sessions = SESSIONS[protocol] if chances.random() < 0.95 else SESSIONS["memcache"]
    words = chances.choice(sessions)
    if tls and chances.random() < 0.8:
        words = [word.replace(b"Host: [::1]:2223", AUTHORIZED) for word in words]
        words = [LOGIN.encode()] * (protocol == "memcache") + words
    data = mutated(chances, words)
    sock = socket.create_connection(("127.0.0.1", ports[protocol]), timeout=20)
    try:
        if tls and chances.random() < 0.8:
            sock = tls.wrap_socket(sock, server_hostname="localhost")
        while data:
            size = chances.choice([len(data), chances.randrange(1, len(data) + 1)])
            with contextlib.suppress(BlockingIOError):
                sock.settimeout(1)
                sock.sendall(data[:size])
            data = data[size:]
            if chances.random() < 0.2:
                sock.settimeout(0.001)
                with contextlib.suppress(socket.timeout):
                    sock.recv(chances.choice([1, 100, 100000]))
        how = chances.randrange(4)
        if how == 0:                         # half-closed, and then it listens
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(5)
            while sock.recv(1 << 16):
                pass
        elif how == 1:                       # reset
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass                                 # it was closed on, which is a fair answer
    finally:
        sock.close()
    return protocol


@pytest.mark.parametrize("with_tls, share", [(False, 1), (True, 4)])
def test_strangers(serve, tmp_path, caplog, monkeypatch, with_tls, share):
    """Thousands of broken sessions of all protocols, while a good client is served; a share of
    them with TLS and passwords.

    KESTREL_STRANGERS=100000 makes it that many.
    """
    monkeypatch.setattr(kestrel, "_LOGIN_REST_MS", 1)
    chances = seeded()
    ports = {name: free_port() for name in (("admin",) if with_tls else ("text", "thrift", "admin"))}
    server = serve((secured(tmp_path) if with_tls else "[server]\n")
                   + "".join("%s_port = %d\n" % pair for pair in ports.items())
                   + "[queue]\nsync_journal = never\nmax_items = 1000\n")
    ports["memcache"] = server.port
    tls = ssl.create_default_context(cafile=str(tmp_path / "ca.pem")) if with_tls else None
    good = tls_client(server.port, tmp_path) if with_tls else server.client()
    if with_tls:
        assert good.ask(LOGIN) == "STORED\r\n"
    broker = server.server.broker
    count = int(os.environ.get("KESTREL_STRANGERS", 400)) // share
    sizes, slowest = [], 0
    for number in range(1, count + 1):
        protocol = misbehave(chances, ports, tls)
        start = time.monotonic()
        assert good.ask("version\r\n") == "VERSION 1.0.0\r\n", protocol
        slowest = max(slowest, time.monotonic() - start)
        if number % 100 == 0 or number == count:
            until(lambda: good.stats()["curr_connections"] == "1")
            stats = good.stats()
            assert not [key for key, value in stats.items() if value.startswith("-")]
            for name, queue in list(broker.queues.items()):
                # What a Thrift client has opened goes back at its time, not with the client.
                assert queue.opens.keys() <= queue._alarms.keys() and not queue.waiters, name
                assert good.ask(b"delete " + os.fsencode(name) + b"\r\n") == "DELETED\r\n"
            assert not server.server.waiting and not server.server.buffered
            sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert "Traceback" not in caplog.text and server.thread.is_alive()
    assert not [record for record in caplog.records if record.exc_info]
    print("%d sessions, slowest answer %.1f ms, resident %s" % (count, slowest * 1000, sizes[::20]))
    until(lambda: not broker.logins._lines)
    good.close()
    # Twice what it had with a tenth of them would be a leak.
    assert sizes[-1] < sizes[len(sizes) // 10] * 2


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", *(sys.argv[1:] or [os.path.abspath(__file__)])]))
