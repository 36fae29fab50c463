#!/usr/bin/env python3
# Copyright (c) the kestrel.py authors. MIT License, see LICENSE.
"""The least that Python can do: a queue server to measure kestrel.py against, not to use.

    python3 bench/floor.py PORT SPOOL

A bare `selectors` loop that knows `set` and `get` (options are passed over), keeps a deque, and
appends to a journal, with one write a queue and one send a connection a turn, as kestrel.py does.
It has no other features, checks nothing, and never reads its journals.
"""

import collections
import os
import selectors
import socket
import struct
import sys
import time

pack_head = struct.Struct("<BIqq").pack


class Queue:
    def __init__(self, path):
        self.items = collections.deque()
        self.bytes = 0
        self.unwritten = []
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


class Server:
    def __init__(self, port, spool):
        os.makedirs(spool, exist_ok=True)
        self.spool = spool
        self.queues = {}
        self.dirty = []                  # queues with something to write
        self.active = []                 # connections with answers to send
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)

    def queue(self, name):
        if name not in self.queues:
            self.queues[name] = Queue(os.path.join(self.spool, os.fsdecode(name)))
        return self.queues[name]

    def accept(self, now):
        sock, _ = self.listener.accept()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(sock, selectors.EVENT_READ, Connection(self, sock).ready)

    def run(self):
        select = self.selector.select
        while True:
            events = select()
            now = int(time.time() * 1000)
            for key, _ in events:
                key.data(now)
            for queue in self.dirty:
                os.write(queue.fd, b"".join(queue.unwritten))
                queue.unwritten.clear()
            self.dirty.clear()
            for connection in self.active:
                try:
                    connection.send(b"".join(connection.out))
                except OSError:
                    pass                 # the next recv() sees that it has gone
                connection.out.clear()
            self.active.clear()


class Connection:
    __slots__ = ("server", "sock", "recv", "send", "dirty", "active", "data", "out")

    def __init__(self, server, sock):
        self.server = server
        self.sock = sock
        self.recv = sock.recv
        self.send = sock.send
        self.dirty = server.dirty
        self.active = server.active
        self.data = b""                  # what is not yet a whole command
        self.out = []

    def ready(self, now):
        try:
            data = self.recv(1 << 18)
        except OSError:
            data = b""
        if not data:
            self.server.selector.unregister(self.sock)
            self.sock.close()
            return
        if self.data:
            data = self.data + data
        queues, out = self.server.queues, self.out
        end = len(data)
        pos = 0
        while pos < end:
            eol = data.find(b"\n", pos)
            if eol < 0:
                break
            words = data[pos:eol].split()
            if words[0] == b"set":
                stop = eol + 1 + int(words[4])
                if stop + 2 > end:
                    break
                item = data[eol + 1:stop]
                pos = stop + 2
                queue = queues.get(words[1]) or self.server.queue(words[1])
                queue.items.append((now, 0, item))
                queue.bytes += len(item)
                unwritten = queue.unwritten
                if not unwritten:
                    self.dirty.append(queue)
                unwritten.append(pack_head(2, len(item) + 16, now, 0))
                unwritten.append(item)
                out.append(b"STORED\r\n")
            else:
                pos = eol + 1
                name = words[1].partition(b"/")[0]     # options are passed over
                queue = queues.get(name) or self.server.queue(name)
                if queue.items:
                    item = queue.items.popleft()[2]
                    queue.bytes -= len(item)
                    unwritten = queue.unwritten
                    if not unwritten:
                        self.dirty.append(queue)
                    unwritten.append(b"\1")
                    out.append(b"VALUE %b 0 %d\r\n%b\r\nEND\r\n" % (name, len(item), item))
                else:
                    out.append(b"END\r\n")
        self.data = data[pos:]
        self.active.append(self)


if __name__ == "__main__":
    Server(int(sys.argv[1]), sys.argv[2]).run()
