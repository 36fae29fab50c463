"""Tries what the README says of several servers with the real haproxy, nutcracker, php, pymemcache.

    python3 proxies_check.py README.md kestrel.py

10.0.0.1 to .3 are 127.0.0.11 to .13 here, so that the servers can have the same ports (Linux).
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

README, KESTREL = open(sys.argv[1], encoding="utf-8").read(), os.path.abspath(sys.argv[2])
WORK = tempfile.mkdtemp()
processes, servers = [], {}           # all, and those of the servers 1 to 3


def check(good, *what):
    if not good:
        sys.exit("FAILED: " + " ".join(map(str, what)))


def wait(what, test):
    begin = time.monotonic()
    while not test():
        check(time.monotonic() < begin + 6, what + ": not within 6 seconds")
        time.sleep(0.02)


def free_ports(count):
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


PORTS = dict(zip(("22133", "22134", "2223"), free_ports(3)))
PUT, GET = ("127.0.0.1", PORTS["22133"]), ("127.0.0.1", PORTS["22134"])
HOSTS = {number: ("127.0.0.1%d" % number, PORTS["22133"]) for number in (1, 2, 3)}


def block(mark, **more):
    """The fenced block with this mark in its first line, with the addresses and ports of here."""
    found = re.findall(r"^```\w+\n([^\n]*%s\n.*?)^```$" % re.escape(mark), README, re.M | re.S)
    check(len(found) == 1, len(found), "blocks", mark, "in the README")
    ports = dict(PORTS, **more)
    text = re.sub(r"\b10\.0\.0\.([123])\b", r"127.0.0.1\1", found[0])
    return re.sub(r"\b(%s)\b" % "|".join(ports), lambda match: str(ports[match[0]]), text)


def write(name, text):
    with open(os.path.join(WORK, name), "w") as file:
        file.write(text)
    return file.name


def start(*command, listens):
    """Start a process, and wait until it listens; its output goes to a file of its name."""
    with open(os.path.join(WORK, os.path.basename(command[0])), "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    processes.append(process)

    def is_up():
        check(process.poll() is None, command, "has ended")
        with socket.socket() as probe:
            return not probe.connect_ex(listens)
    wait("%s listens" % (command,), is_up)
    return process


def start_server(number):
    config = write("kestrel.conf", "[server]\nlisten = %s\nmemcache_port = %d\nadmin_port = %d\n"
                   "queue_path = %s/spool%d\n" % (*HOSTS[number], PORTS["2223"], WORK, number))
    servers[number] = start(sys.executable, KESTREL, "-c", config, listens=HOSTS[number])


def start_nutcracker(change="", to=""):
    """Start one, with a change in its config; return the addresses of its two pools."""
    loose, whole, stats = free_ports(3)
    config = block("nutcracker.yml", **{"22121": loose, "22122": whole}).replace(change, to)
    start("nutcracker", "-c", write("nutcracker.yml", config), "-s", str(stats), "-a", "127.0.0.1",
          "-o", WORK + "/nutcracker.log", "-p", WORK + "/pid", listens=("127.0.0.1", whole))
    return ("127.0.0.1", loose), ("127.0.0.1", whole)


def kill(process):
    process.kill()
    process.wait()


class Client:
    def __init__(self, address):
        self.socket = socket.create_connection(address, 10)
        self.input = self.socket.makefile("rb")

    def say(self, text):
        self.socket.sendall(text.encode() + b"\r\n")
        return self

    def answer(self):
        """The lines of an answer, data before its VALUE line; [] if the connection is closed."""
        lines = []
        try:
            while not lines or lines[-1].startswith(("VALUE ", "QUEUE ")):
                line = self.input.readline().decode()
                if not line:
                    return []
                if line.startswith("VALUE "):
                    lines.append(self.input.read(int(line.split()[3]) + 2).decode().strip())
                lines.append(line.strip())
        except ConnectionError:
            return []
        except socket.timeout:
            check(False, "no answer within 10 seconds, but", lines)
        return lines

    def ask(self, text):
        return " ".join(self.say(text).answer())

    def put(self, queue, data="x"):
        return self.ask("set %s 0 0 %d\r\n%s" % (queue, len(data), data))

    def get(self, key):
        """The items, or the answer if it is an error."""
        lines = self.say("get " + key).answer()
        return lines[:-1:2] if lines[-1:] == ["END"] else " ".join(lines)

    def close(self):
        """Hang up, and wait until the other side has done so, too."""
        self.socket.shutdown(socket.SHUT_WR)
        check(not self.input.read(), "an answer that nobody has asked for")


def places(queue):
    """The servers that have a queue, each with its numbers of items and open reads."""
    found = {}
    for number, address in HOSTS.items():
        for line in Client(address).say("list " + queue).answer()[:-1]:
            if line.split()[1] == queue:
                found[number] = int(line.split()[2]), int(line.split()[4])
    return found


def connect(address):
    """The number of a server, and a connection through haproxy to it."""
    client, name = Client(address), "seek-%d" % time.monotonic_ns()
    client.get(name)
    return min(places(name)), client


def connect_all(address):
    found = []
    wait("connections to all", lambda: found.append(connect(address)) or len(dict(found)) == 3)
    return dict(found)


def command_line(line):
    done = subprocess.run([sys.executable, KESTREL] + line.split()[2:], check=True,
                          stdout=subprocess.PIPE, universal_newlines=True)
    return done.stdout


def try_haproxy():
    config = block("haproxy.cfg")
    process = start("haproxy", "-db", "-f", write("haproxy.cfg", config), listens=GET)

    def told(what, count=1):
        with open(WORK + "/haproxy") as log:
            wait("haproxy: " + what, lambda: log.seek(0) or log.read().count(what) >= count)

    mine = connect_all(GET)
    for number in 1, 2, 2, 3, 1, 3:
        mine.pop(number).close()
        mine.update([connect(GET)])
        check(number in mine, "a new connection does not go to the server with the fewest")
    yield "a new connection goes to the server with the fewest"

    since, patient = time.monotonic(), mine[1].say("get patience/t=4500")
    producers, workers, items = connect_all(PUT), connect_all(GET), []
    for number in HOSTS:
        check(producers[number].put("backlog", "of %d" % number) == "STORED", "put")
        workers[number].say("get later/t=30000")
    readonly, listing, quiescent = block("# drain").splitlines()[1:]
    command_line(readonly)
    check([producers[number].put("backlog")[:12] for number in HOSTS]
          == ["STORED", "SERVER_ERROR", "STORED"], "puts while a server is readonly")
    told("put/k2 is DOWN")
    check({Client(PUT).put("backlog") for _ in range(12)} == {"STORED"}, "a put was refused")
    check(places("backlog")[2][0] == 1, "a readonly server gets puts")
    yield "a readonly server gets no more puts"
    wait("its items are read", lambda: items.extend(Client(GET).get("backlog")) or "of 2" in items)
    head, *rows = [row.split() for row in command_line(listing).splitlines()]
    for name in "items", "open", "delayed":
        check({row[head.index(name)] for row in rows} == {"0"}, name, rows)
    yield "its items are read"
    command_line(quiescent)
    check(workers[2].answer() == [], "who waits at a quiescent server is answered")
    told("get/k2 is DOWN")
    check(all(Client(GET).get("none") == [] for _ in range(12)), "a get was refused")
    yield "a quiescent server gets nothing, and those who wait there are disconnected"
    command_line(quiescent.replace("quiescent", "up"))
    told("put/k2 is UP")
    told("get/k2 is UP")
    check(patient.answer() == ["END"] and time.monotonic() > since + 4.4, "a waiting get was cut")
    yield "it is up again, and elsewhere a waiting get was not cut"

    producers, workers = connect_all(PUT), connect_all(GET)
    for number in HOSTS:
        producers[number].put("life", "of %d" % number)
    check(workers[2].get("life/open") == ["of 2"], "open")
    kill(servers[2])
    check(producers[2].answer() == [], "a client of a dead server is connected")
    check({Client(PUT).put("life") for _ in range(6)} == {"STORED"}, "a put was refused")
    yield "after kill -9 its clients put elsewhere"
    told("get/k2 is DOWN", 2)
    start_server(2)
    told("get/k2 is UP", 2)
    told("put/k2 is UP", 2)
    for number in 1, 3:
        wait("the others are empty", lambda: workers[number].get("life") == [])
    check(places("life")[2] == (1, 0), "what was open did not go back")
    wait("its items are read", lambda: Client(GET).get("life") == ["of 2"])
    yield "it is back, and its items are read by new connections"

    client, since = connect_all(PUT)[2], time.monotonic()
    servers[2].send_signal(signal.SIGSTOP)
    check(client.put("hung") == "" and Client(PUT).put("hung") == "STORED", "a server that hangs")
    check(time.monotonic() < since + 4.5, "a server that hangs is noticed too late")
    yield "the clients of one that hangs put elsewhere"
    servers[2].send_signal(signal.SIGCONT)
    told("put/k2 is UP", 3)
    for address in HOSTS.values():
        Client(address).put("own")
    Client(PUT).ask("flush own")
    check(sorted(places("own").values()) == [(0, 0), (1, 0), (1, 0)], "flush")
    kill(process)
    start("haproxy", "-db", "-f", write("haproxy.cfg", config.replace("1h", "1s")), listens=GET)
    check(Client(GET).get("none/t=5000") == "", "a waiting get is not cut by the timeouts")
    yield "flush reaches one server; a shorter timeout cuts a waiting get"


def try_random():
    puts, gets = Client(start_nutcracker()[0]), Client(start_nutcracker()[0])
    names, items = ["%02d" % number for number in range(40)], []
    check({puts.put("loose", name) for name in names} == {"STORED"}, "put")
    check(len(places("loose")) == 3, "not on all servers")
    wait("all items", lambda: items.extend(puts.get("loose")) or len(items) == len(names))
    check(sorted(items) == names, "not each item once")
    Client(HOSTS[1]).put("one")
    wait("an END of a server without it", lambda: puts.get("one/peek") == [])
    yield "all items of all servers"
    server = Client(HOSTS[2])
    server.put("drained")
    server.ask("status readonly")
    wait("a put is refused", lambda: puts.put("some").startswith("SERVER_ERROR"))
    wait("it is left out", lambda: {puts.put("some") for _ in range(20)} == {"STORED"})
    check(not any(puts.get("drained") for _ in range(20)), "it is not left out for gets")
    wait("a pool for gets reads it", lambda: gets.get("drained"))
    server.ask("status up")
    kill(servers[3])
    wait("it is left out", lambda: {puts.put("some") for _ in range(20)} == {"STORED"})
    start_server(3)
    Client(HOSTS[3]).ask("delete some")
    wait("it is used again", lambda: puts.put("some") == "STORED" and 3 in places("some"))
    yield "readonly and dead servers are left out, and come back"


def try_ketama():
    pool = start_nutcracker()[1]
    client, names = Client(pool), ["{jobs}", "{orders}", "{mail}", "{3}", "{4}", "{5}", "{6}"]
    for name in names:
        for option in "", "/n=2", "/t=1/open", "/close/open", "/abort", "/peek":
            client.put(name + "/delay=1")
            client.get(name + option)
        check(len(places(name)) == 1, name, "is on servers", places(name))
        client.ask("delete " + name)
    client.get("{jobs}+audit")
    client.put("{jobs}", "copied")
    client.put("{jobs}low", "low")
    check(client.get("{jobs}+audit") == ["copied"], "fanout")
    check(client.get("{jobs}high/or={jobs}low") == ["low"], "or=")
    client.put("jobs")
    check(any(not client.get("jobs/n=%d/peek" % number) for number in range(1, 20)), "no braces")
    yield "a queue in braces is on one server, whatever the options; others are not"
    for name in names:
        client.put(name)
    home = {name: min(places(name)) for name in names}
    check(len(set(home.values())) > 1, "all queues are on one server")
    kill(servers[home["{jobs}"]])
    wait("refused", lambda: client.put("{jobs}") == "SERVER_ERROR Connection refused")
    for name in names:
        check((client.put(name) == "STORED") == (home[name] != home["{jobs}"]), "put", name)
    start_server(home["{jobs}"])
    check(client.put("{jobs}", "new") == "STORED" and "new" in client.get("{jobs}/n=9"), "back")
    yield "the queues of a dead server are refused, and are there when it is back"


def answer_to(address, command, queue):
    """The answer to a command of the table, with all numbers in it made equal."""
    client = Client(address)
    client.put(queue, "one")
    client.put(queue, "two")
    if re.search("/close|/abort|/touch", command):
        client.get(queue + "/open")
    client.say(re.sub(r"\bq\b", queue, command))
    if re.search(r"^\w+ q\S* 0 -?\d 5", command):
        client.say("hello")
    if "noreply" in command:
        client.say("get %s/peek/n=9" % queue)
    said = re.sub(r"\d+", "N", " ".join(client.answer()).replace(queue, "q"))
    Client(address).get(queue + "/close/n=9")          # nothing stays open on a shared connection
    return said


def try_table():
    pool = start_nutcracker()[1]
    rows = re.search(r"\| through twemproxy \|\n.*\n((?:\|.*\n)+)", README)[1].splitlines()
    listed = [(command, row.split("|")[2].split()[0].strip(":"))
              for row in rows for command in re.findall("`([^`]*)`", row.split("|")[1])]
    for number, (command, verdict) in enumerate(listed):
        said = answer_to(pool, command, "{t%d}" % number)
        if verdict == "hangs":
            check(said == "", command, "is answered", said)
        else:
            expected = answer_to(HOSTS[1], command, "{d%d}" % number)
            check(said and said == expected, command, "is answered", said, "and not", expected)
    yield "%d commands pass or not as the table says" % len(listed)

    one, two = Client(pool), Client(pool)
    one.say("get {wait}/t=700")
    wait("it waits", lambda: places("{wait}"))
    since = time.monotonic()
    check(two.put("{wait}") == "STORED" and time.monotonic() > since + 0.5, "others do not wait")
    check(one.answer() == ["END"], "the end of waiting")
    check(one.ask("get {other}/t=5000") == "SERVER_ERROR Connection timed out", "timeout")
    Client(pool).say("get {gone}/t=1500")
    wait("it waits", lambda: places("{gone}"))
    Client(HOSTS[min(places("{gone}"))]).put("{gone}")
    check([*places("{gone}").values()] == [(0, 0)], "the item of a client that is gone is there")
    yield "a waiting get holds up others, is cut by the timeout, and can lose an item"
    one.put("{both}", "first")
    one.put("{both}", "second")
    check(one.get("{both}/open") + two.get("{both}/open") == ["first", "second"], "open")
    check(two.get("{both}/close") == [], "close")
    one.close()
    two.close()
    check([*places("{both}").values()] == [(0, 1)], "the item of a dead client has gone back")
    one = Client(pool)
    check(one.ask("get {both}") == "SERVER_ERROR Invalid argument", "get while open")
    wait("all is given back", lambda: [*places("{both}").values()] == [(1, 0)])
    check(one.get("{both}") == ["second"], "a close did not close the item of another client")
    one = Client(start_nutcracker("\n  timeout:", "\n  server_connections: 2\n  timeout:")[1])
    one.put("{pair}")
    check(one.get("{pair}/open") == ["x"] and one.get("{pair}/close") == [], "open, close")
    check([*places("{pair}").values()] == [(0, 1)], "closed by another connection")
    yield "reliable reads are those of all clients together"


def try_list(mark, *interpreter):
    """A program of the README that has a list of servers, with several queues."""
    def run(queue, change="", to=""):
        file = write("program", block(mark).replace(change, to).replace("jobs", queue))
        done = subprocess.run(interpreter + (file,), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True)
        return done.stdout

    home = {}
    for queue in ["%s%d" % (interpreter[0][-3:], number) for number in range(10)]:
        check(run(queue) == "resize 17.jpg\n", mark, queue, run(queue))
        check([*places(queue).values()] == [(0, 0)], queue, places(queue))
        home[queue] = min(places(queue))
    dead = home[queue]
    check(len(set(home.values())) > 1, "all queues are on one server")
    kill(servers[dead])
    for queue in home:
        check((run(queue) == "resize 17.jpg\n") == (home[queue] != dead), queue, run(queue))
    if mark == "# queues.py":
        said = run(queue, "queues.set(", "for _ in range(9):\n    try:\n        queues.get('jobs')\n"
                   "    except OSError as error:\n        print(error)\nqueues.set(")
        check(said.count("Connection refused\n") >= 9, "a queue has moved", said)
    start_server(dead)
    yield "each queue on one server; those of a dead server fail"


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("FAILED: not done within three minutes"))
    signal.alarm(180)
    parts = [("haproxy", try_haproxy()), ("twemproxy random", try_random()),
             ("twemproxy ketama", try_ketama()), ("twemproxy", try_table())]
    for name, mark, program, option, probe in (
            ("pymemcache", "# queues.py", sys.executable, "-c", "import pymemcache"),
            ("php", "<?php // queues.php", "php", "-r", "new Memcached();")):
        if shutil.which(program) and not subprocess.run(
                [program, option, probe], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            parts.append((name, try_list(mark, program)))
        else:
            print(name + ": not tried")
    try:
        for tool in "haproxy", "nutcracker":
            check(shutil.which(tool), "there is no", tool)
        for number in HOSTS:
            start_server(number)
        since = time.monotonic()
        for name, part in parts:
            for what in part:
                print("%s: %s (%.2f s)" % (name, what, time.monotonic() - since), flush=True)
                since = time.monotonic()
    finally:
        for process in processes:
            kill(process)
        shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
