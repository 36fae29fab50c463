"""A web shop's day: short connections put jobs through HAProxy, with the README's very
configuration, and workers take them reliably, while one server is killed with -9 and started
again, and another one is drained and replaced by a new kestrel.py. Fails if an acknowledged job is
lost, or a failed put does not succeed elsewhere within a second.

    python3 .ci/day_check.py
"""

import collections
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir)
PORTS = {"22133": None, "22134": None, "2223": None}
SECONDS, A_SECOND, PRODUCERS, WORKERS = 15, 200, 10, 6

stored, unknown, taken = set(), set(), collections.Counter()
failures, slowest = 0, 0.0
lock = threading.Lock()
is_over = threading.Event()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return str(sock.getsockname()[1])


def config():
    """The README's haproxy.cfg, with addresses and ports of this machine."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        text = re.search(r"^```haproxy\n(.*?)^```", file.read(), re.M | re.S)[1]
    text = re.sub(r"\b10\.0\.0\.([123])\b", r"127.0.0.1\1", text)
    return re.sub(r"\b(%s)\b" % "|".join(PORTS), lambda found: PORTS[found[0]], text)


class Server:
    """One of the servers, at 127.0.0.11 or 127.0.0.12."""

    def __init__(self, work, number):
        self.program = os.path.join(HERE, "kestrel.py")
        self.address = "127.0.0.1%d:%s" % (number, PORTS["22133"])
        self.config = os.path.join(work, "%d.conf" % number)
        with open(self.config, "w") as file:
            file.write("[server]\nlisten = 127.0.0.1%d\nmemcache_port = %s\nadmin_port = %s\n"
                       "queue_path = %s/%d\nstatus_change_grace_period = 3s\n" % (
                           number, PORTS["22133"], PORTS["2223"], work, number))
        self.start()

    def start(self):
        self.process = subprocess.Popen([sys.executable, self.program, "-c", self.config],
                                        stderr=subprocess.DEVNULL)
        while self.ask("ping").returncode:
            time.sleep(0.05)

    def ask(self, *words):
        return subprocess.run([sys.executable, self.program, *words, "--server", self.address],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def stop(self, number):
        self.process.send_signal(number)
        self.process.wait()


def produce(first):
    """Put a job at a time, each over a connection of its own, until it is stored."""
    global failures, slowest
    due = time.monotonic()
    for number in range(first, 1 << 30, PRODUCERS):
        if is_over.is_set():
            return
        time.sleep(max(0, due - time.monotonic()))
        due += PRODUCERS / A_SECOND
        job, failed_at = b"job %07d" % number, None
        while True:
            answer = b""
            try:
                with socket.create_connection(("127.0.0.1", int(PORTS["22133"])), 5) as sock:
                    sock.sendall(b"set jobs 0 0 %d\r\n%b\r\n" % (len(job), job))
                    answer = sock.recv(100)
            except OSError:
                pass
            if answer == b"STORED\r\n":
                break
            failed_at = failed_at or time.monotonic()
            with lock:
                failures += 1
                if not answer:
                    unknown.add(job)         # it may be stored
            time.sleep(0.05)
        with lock:
            stored.add(job)
            if failed_at:
                slowest = max(slowest, time.monotonic() - failed_at)


def work():
    """Take jobs reliably; hang up when there is none."""
    while True:
        try:
            with socket.create_connection(("127.0.0.1", int(PORTS["22134"])), 5) as sock:
                file = sock.makefile("rb")
                while True:
                    sock.sendall(b"get jobs/t=200/open\r\n")
                    line = file.readline()
                    if line == b"END\r\n" or not line.startswith(b"VALUE"):
                        break
                    job = file.readline()[:-2]
                    file.readline()
                    with lock:
                        taken[job] += 1
                    sock.sendall(b"get jobs/close\r\n")
                    if file.readline() != b"END\r\n":
                        break                # it comes again
        except OSError:
            time.sleep(0.05)
        if is_over.is_set() and not stored - set(taken):
            return


def main():
    PORTS.update((name, free_port()) for name in PORTS)
    with tempfile.TemporaryDirectory() as directory:
        servers = [Server(directory, number) for number in (1, 2)]
        path = os.path.join(directory, "haproxy.cfg")
        with open(path, "w") as file:
            file.write(config())
        proxy = subprocess.Popen(["haproxy", "-db", "-f", path], stderr=subprocess.DEVNULL)
        threads = [threading.Thread(target=produce, args=(number,), daemon=True)
                   for number in range(PRODUCERS)]
        threads += [threading.Thread(target=work, daemon=True) for _ in range(WORKERS)]
        try:
            time.sleep(3)                    # until its checks have found that the third is not there
            for thread in threads:
                thread.start()
            time.sleep(SECONDS / 5)
            servers[0].stop(signal.SIGKILL)
            time.sleep(SECONDS / 5)
            servers[0].start()
            time.sleep(SECONDS / 5)
            servers[1].ask("status", "readonly")
            while any(int(cell) for row in servers[1].ask("list").stdout.splitlines()[1:]
                      for cell in (row.split()[1], row.split()[3])):
                time.sleep(0.1)
            servers[1].stop(signal.SIGTERM)
            servers[1].program = os.path.join(directory, "kestrel.py")
            with open(os.path.join(HERE, "kestrel.py"), encoding="utf-8") as old:
                with open(servers[1].program, "w", encoding="utf-8") as new:
                    new.write(old.read().replace('__version__ = "', '__version__ = "9.'))
            servers[1].start()
            servers[1].ask("status", "up")
            assert b"kestrel.py 9." in servers[1].ask("ping").stdout
            time.sleep(SECONDS / 5)
            is_over.set()
            for thread in threads:
                thread.join(30)
        finally:
            for process in [proxy] + [server.process for server in servers]:
                process.kill()
                process.wait()
    lost, strange = stored - set(taken), set(taken) - stored - unknown
    twice = sum(count > 1 for count in taken.values())
    print("%d jobs stored, %d failed puts, at most %.2f s until one succeeded elsewhere, %d jobs "
          "twice, %d lost, %d never put" % (
              len(stored), failures, slowest, twice, len(lost), len(strange)))
    assert len(stored) > SECONDS * A_SECOND / 2, "too few"
    assert not lost and not strange and slowest < 1


main()
