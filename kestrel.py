#!/usr/bin/env python3
# Copyright (c) the kestrel.py authors. MIT License, see LICENSE.
"""kestrel.py: Twitter's Kestrel message queue, rebuilt as one file of plain Python.

A daemon that speaks the memcache text protocol, Kestrel's own text and Thrift protocols, and
HTTP to whoever watches it; each key is a durable FIFO queue.

    python3 kestrel.py                    # port 22133, journals in ./spool
    python3 kestrel.py -c kestrel.conf

or, inside another program, one durable queue alone:

    queue = kestrel.Queue("work", path="/var/spool/kestrel")
    queue.add(b"hello")
    item = queue.remove(open=True)        # item.data == b"hello"
    queue.confirm(item.xid)
    queue.close()

The file is read from top to bottom; no section refers to one below its own:

    1  Configuration   settings, their units and defaults, the config file
    2  Records         items, records as bytes, damage
    3  Journal         the files of one queue
    4  Queue           items in order, open reads, waiters, limits, expiry
    5  Broker          all queues by name: fanout, aliases, status, stats
    6  Protocols       memcache, text, Thrift, HTTP: bytes in, bytes out; no sockets, clock, files
    7  Server          sockets, timers, fsync, signals: one turn of the loop
    8  From Python     a client, and a server in a thread
    9  Command line    main()

The words used here:

    item            one message
    waiting item    in the queue, available
    open read       an item handed out and not closed yet, named by its xid
    waiter          a read that waits for an item
    operation       one change of a queue; a record is an operation as bytes in a journal file
    position        the number of an operation in the history of its queue
    logged, written, durable
                    the last position in memory, handed to the kernel, fsynced
    safe            may be acknowledged: durable if sync_journal = 0, else written
    behind          of a queue: some waiting items are only on disk
    passed file     a journal file with no waiting items left
    task            a generator that does long work in bounded steps
    turn            one iteration of the event loop

One turn reads every ready socket once and lets the sessions change the queues in memory,
writes each changed journal with one write, begins the fsyncs that are wanted (on a worker
thread), sends the answers that are safe, one send a connection as a rule, and at last runs each
task a step. Time is read once a turn and handed down as `now`.

What fails is undone, in memory and in the files, back to the last safe position, before anybody
is told: a refused command has not happened, and what was acknowledged before stays.

Two clocks: `now` is the time of day in milliseconds of the epoch, for items (add
time, expiry) only; whatever waits is timed by the server on the monotonic clock.
"""

import argparse
import array
import base64
import collections
import configparser
import contextlib
import errno
import fcntl
import functools
import gc
import getpass
import hashlib
import heapq
import hmac
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import mmap
import os
import queue as queues
import re
import resource
import select
import selectors
import shlex
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from http import HTTPStatus

__version__ = "1.0.0"

log = logging.getLogger("kestrel")
trace = logging.getLogger("kestrel.trace")    # what enable_trace and enable_session_trace tell


# == 1. Configuration =====================================================================
#
# The settings, their units and defaults, and the config file they come from. A setting
# carries Kestrel's name in snake_case. Times are held in milliseconds, busy_poll in
# microseconds, sizes in bytes. What the settings name, certificates and passwords, is read here
# too, so that a mistake in it is one of the config file.
# Knows configparser and units; no queues, no sockets.

UNLIMITED = (1 << 63) - 1

# The longest queue name, in bytes: a file name less the longest suffix of a journal file.
MAX_NAME = 255 - len(".1790000000000.pack")

# What each status refuses: reads, writes. While it avoids writes, a server takes them.
STATUSES = {
    "UP": (False, False),
    "WRITEAVOID": (False, False),
    "READONLY": (False, True),
    "QUIESCENT": (True, True),
}

_SIZES = {"": 1, "b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}
_TIMES = {"ms": 1, "s": 1000, "m": 60 * 1000, "h": 3600 * 1000, "d": 86400 * 1000}


class ConfigError(Exception):
    """A setting that cannot be used. Its text says where and why: `file:line: why`."""


def check_name(name):
    """Return `name` when it can name a queue, else raise ValueError with the reason."""
    if not name:
        raise ValueError("the name of a queue is empty")
    if len(os.fsencode(name)) > MAX_NAME:
        raise ValueError("the name of a queue is longer than %d bytes" % MAX_NAME)
    if name == "lost+found":
        raise ValueError("lost+found is where damaged journals are kept")
    for char in name:
        if char in "./~" or char <= " " or char == "\x7f":
            raise ValueError("%s in the name of a queue" % ascii(char))
    return name


def _within_bounds(number):
    if number > UNLIMITED:
        raise ValueError("the number is too large")
    return number


def _parse_size(text):
    match = re.fullmatch(r"([0-9]+) *([a-z]*)", text.lower())
    if not match or match[2] not in _SIZES:
        raise ValueError("%r is not a size such as 512, 64kb, 16mb or 1gb" % text)
    return _within_bounds(int(match[1]) * _SIZES[match[2]])


def _show_size(size):
    unit = max((unit for unit in _SIZES if size and size % _SIZES[unit] == 0),
               key=_SIZES.get, default="")
    return "%d%s" % (size // _SIZES[unit], unit if _SIZES[unit] > 1 else "")


def _within(least, most, size):
    if not least <= size <= most:
        raise ValueError("not from %s to %s" % (_show_size(least), _show_size(most)))
    return size


def _parse_integer(low, high):
    def parse(text):
        if not re.fullmatch("[0-9]+", text) or not low <= int(text) <= high:
            raise ValueError("%r is not a whole number from %d to %d" % (text, low, high))
        return int(text)
    return parse


def _parse_flag(text):
    flag = configparser.ConfigParser.BOOLEAN_STATES.get(text.lower())
    if flag is None:
        raise ValueError("%r is neither true nor false" % text)
    return flag


def _parse_text(text):
    if not text:
        raise ValueError("the value is empty")
    return text


def _parse_word(*words):
    def parse(text):
        if text.lower() not in words:
            raise ValueError("%r is none of: %s" % (text, ", ".join(filter(None, words))))
        return text.lower()
    return parse


def _parse_name_or_none(text):
    return check_name(text) if text else None


def _words(text):
    return tuple(filter(None, re.split("[ ,\n]+", text)))


def _parse_networks(text):
    return tuple(map(ipaddress.ip_network, _words(text)))


def _parse_names(text):
    return tuple(map(check_name, _words(text) or [""]))


def _parse_addresses(text):
    addresses = tuple(word[1:-1] if word.startswith("[") and word.endswith("]") else word
                      for word in _words(text))
    if not addresses:
        raise ValueError("there is no address")
    for address in addresses:
        if addresses.count(address) > 1:
            raise ValueError("%s is there twice" % address)
        if not re.fullmatch(r"unix:.+|[A-Za-z0-9.-]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[\w:.%]*", address):
            raise ValueError("%r is not a host, IP address or unix:PATH (without a port, which "
                             "is a setting of its own)" % address)
    return addresses


def _parse_mode(text):
    if not re.fullmatch("0?[0-7]{3}", text):
        raise ValueError("%r is not a mode such as 0600 or 0660" % text)
    return int(text, 8)


# How a kind of setting is read from text and written as text.
Kind = collections.namedtuple("Kind", "parse show")


def _or(word, value, kind):
    """The kind of setting that may also be `word`, which stands for `value`."""
    return Kind(lambda text: value if text.lower() == word else kind.parse(text),
                lambda held: word if held == value else kind.show(held))


def _time(units, examples):
    """The kind of a time: a number and one of the units, held in the smallest of them."""
    def parse(text):
        match = re.fullmatch(r"([0-9]+) *([a-z]*)", text.lower())
        if match and int(match[1]) == 0 and match[2] in ("", *units):
            return 0
        if not match or match[2] not in units:
            raise ValueError("%r is not a time such as %s" % (text, examples))
        return _within_bounds(int(match[1]) * units[match[2]])

    def show(held):
        unit = max((unit for unit in units if held % units[unit] == 0), key=units.get)
        return "%d%s" % (held // units[unit], unit) if held else "0"

    return Kind(parse, show)


SIZE = Kind(_parse_size, _show_size)
TIME = _time(_TIMES, "100ms, 30s, 5m, 1h or 1d")
SHORT_TIME = _time({"us": 1, "ms": 1000}, "100us or 1ms")
ITEM_SIZE = Kind(lambda text: _within(1, 1 << 30, _parse_size(text)), _show_size)
LINE_SIZE = Kind(lambda text: _within(512, 1 << 20, _parse_size(text)), _show_size)
COUNT = Kind(_parse_integer(1, UNLIMITED), str)
PORT = Kind(_parse_integer(0, 65535), str)
FLAG = Kind(_parse_flag, lambda flag: "true" if flag else "false")
TEXT = Kind(_parse_text, str)
TEXT_OR_NONE = Kind(str, str)
STATUS = Kind(_parse_word(*map(str.lower, STATUSES)), str)
NAME = Kind(_parse_name_or_none, lambda name: name or "")
NAMES = Kind(_parse_names, ", ".join)
USERS = Kind(_words, ", ".join)
ADDRESSES = Kind(_parse_addresses, ", ".join)
MODE = Kind(_parse_mode, "{:04o}".format)
NETWORKS = Kind(_parse_networks, lambda networks: ", ".join(map(str, networks)))
SIZE_LIMIT = _or("unlimited", UNLIMITED, SIZE)
COUNT_LIMIT = _or("unlimited", UNLIMITED, COUNT)
MEMORY = _or("auto", None, Kind(lambda text: _parse_size(text) or UNLIMITED,
                                lambda size: "0" if size == UNLIMITED else _show_size(size)))
PORT_OR_OFF = _or("off", None, PORT)
ADMIN_PORT = Kind(lambda text: PORT_OR_OFF.parse(text) or None, PORT_OR_OFF.show)
TIME_OR_NEVER = _or("never", None, TIME)
# Kestrel's older configurations say 0 where they mean that a thing never times out.
TIMEOUT = Kind(lambda text: TIME_OR_NEVER.parse(text) or None, TIME_OR_NEVER.show)

# What each section of the config file may set: name -> (kind, default as written).
SERVER_SETTINGS = {
    "listen": (ADDRESSES, "127.0.0.1"),
    "socket_mode": (MODE, "0600"),
    "allow": (NETWORKS, ""),
    "tls_cert": (TEXT_OR_NONE, ""),
    "tls_key": (TEXT_OR_NONE, ""),
    "tls_client_ca": (TEXT_OR_NONE, ""),
    "auth_file": (TEXT_OR_NONE, ""),
    "admin_commands": (Kind(_parse_word("", "local", "all", "none"), str), ""),
    "memcache_port": (PORT, "22133"),
    "text_port": (PORT_OR_OFF, "off"),
    "thrift_port": (PORT_OR_OFF, "off"),
    "admin_port": (ADMIN_PORT, "2223"),
    "queue_path": (TEXT, "spool"),
    "client_timeout": (TIMEOUT, "never"),
    "connection_backlog": (COUNT, "1024"),
    "busy_poll": (SHORT_TIME, "100us"),
    "expiration_timer_frequency": (TIMEOUT, "never"),
    "max_open_transactions": (COUNT, "100"),
    "max_connections": (COUNT_LIMIT, "unlimited"),
    "max_line": (LINE_SIZE, "8kb"),
    "max_item_size": (ITEM_SIZE, "128mb"),
    "max_memory": (MEMORY, "auto"),
    "max_output_buffer": (SIZE, "1mb"),
    "send_timeout": (TIMEOUT, "1m"),
    "connection_limit_refuse_writes": (COUNT_LIMIT, "unlimited"),
    "connection_limit_refuse_reads": (COUNT_LIMIT, "unlimited"),
    "default_status": (STATUS, "up"),
    "status_file": (TEXT_OR_NONE, ""),
    "status_change_grace_period": (TIME, "0"),
    "status_command": (TEXT_OR_NONE, ""),
    "enable_session_trace": (FLAG, "false"),
    "log_level": (Kind(_parse_word("debug", "info", "warning", "error"), str), "info"),
    "log_file": (TEXT_OR_NONE, ""),
    "flush_all_reply": (Kind(_parse_word("kestrel", "memcached"), str), "kestrel"),
    "allow_remote_shutdown": (FLAG, "false"),
}
QUEUE_SETTINGS = {
    "max_items": (COUNT_LIMIT, "unlimited"),
    "max_size": (SIZE_LIMIT, "unlimited"),
    "max_item_size": (SIZE_LIMIT, "unlimited"),
    "max_age": (TIMEOUT, "never"),
    "default_journal_size": (SIZE, "16mb"),
    "max_memory_size": (SIZE, "128mb"),
    "max_journal_size": (SIZE, "1gb"),
    "min_journal_compact_delay": (TIME, "1m"),
    "discard_old_when_full": (FLAG, "false"),
    "keep_journal": (FLAG, "true"),
    "sync_journal": (TIME_OR_NEVER, "100ms"),
    "expire_to_queue": (NAME, ""),
    "max_expire_sweep": (COUNT_LIMIT, "unlimited"),
    "fanout_only": (FLAG, "false"),
    "max_queue_age": (TIMEOUT, "never"),
    "open_transaction_timeout": (TIMEOUT, "never"),
    "keep_flags": (FLAG, "true"),
    "enable_trace": (FLAG, "false"),
    "put_users": (USERS, ""),
    "get_users": (USERS, ""),
}
ALIAS_SETTINGS = {
    "destination_queues": (NAMES, None),
}

# Kestrel's names of settings that do more here.
_OLD_NAMES = {"listen_address": "listen"}

# The [server] settings that change at once with a reload.
RELOADED = ("allow", "tls_cert", "tls_key", "tls_client_ca", "admin_commands")


def hash_password(password, salt=None, rounds=200000):
    """What stands for a password (bytes) in an auth_file: PBKDF2 (RFC 8018) with HMAC-SHA256, as
    `pbkdf2$rounds$salt$digest`. It takes a processor for a tenth of a second, on purpose."""
    salt = salt or os.urandom(16)
    digest = hashlib.pbkdf2_hmac("sha256", password, salt, rounds)
    return "pbkdf2$%d$%s$%s" % (rounds, salt.hex(), digest.hex())


def is_password(password, stored):
    """Whether hash_password() has made `stored` of the password (bytes)."""
    _, rounds, salt, _ = stored.split("$")
    made = hash_password(password, bytes.fromhex(salt), int(rounds))
    return hmac.compare_digest(made, stored)


_USER = re.compile(r"([^\s,:]+):(pbkdf2\$[1-9][0-9]{0,6}\$(?:[0-9a-f]{2})+\$[0-9a-f]{64})")


def _read_users(path):
    """{name: what hash_password() has made} of an auth_file. Raises ConfigError, OSError and
    UnicodeDecodeError."""
    users = {}
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(map(str.strip, file), 1):
            match = _USER.fullmatch(line)
            if match and match[1] not in users:
                users[match[1]] = match[2]
            elif line and not line.startswith("#"):
                raise ConfigError("%s:%d: not NAME:HASH with a new name, and what "
                                  "--hash-password prints" % (path, number))
    return users


def _defaults(settings):
    return {key: kind.parse(default) for key, (kind, default) in settings.items()}


_QUEUE_DEFAULTS = _defaults(QUEUE_SETTINGS)


def _shown(settings, values):
    return ["%s = %s" % (key, kind.show(values[key])) for key, (kind, _) in settings.items()]


class Values:
    """Named values. (The attributes of a types.SimpleNamespace take CPython twice as long.)"""

    def __init__(self, **values):
        self.__dict__.update(values)

    def __eq__(self, other):
        return vars(self) == vars(other)


class QueueConfig(Values):
    """The settings of one queue, as attributes; those not given have their defaults."""

    def __init__(self, **given):
        unknown = given.keys() - QUEUE_SETTINGS.keys()
        if unknown:
            raise TypeError("unknown settings: %s" % ", ".join(sorted(unknown)))
        super().__init__(**{**_QUEUE_DEFAULTS, **given})

    def lines(self):
        """Each setting as `key = value`, as it would stand in the config file."""
        return _shown(QUEUE_SETTINGS, vars(self))


class Config:
    """Everything that a config file says. `server` holds the [server] settings, `tls` an
    ssl.SSLContext or None, `users` {name: what hash_password() has made}, None if there is no
    auth_file.

    `path` is an INI file (configparser), None for the defaults. `overrides` are [server]
    settings, given as text, that go before the file's. Raises ConfigError.
    """

    def __init__(self, path=None, overrides=None):
        self.path = path
        self.overrides = overrides or {}
        self.aliases = {}
        self._queues = {}
        self._lines = []
        server, queues = {}, []
        for header, values in self._sections():
            kind, _, name = header.partition(" ")
            name = name.strip()
            if header == "server":
                server = self._values(header, SERVER_SETTINGS, values)
            elif kind == "queue":
                queues.append((header, self._values(header, QUEUE_SETTINGS, values)))
                self._add(header, self._queues, name, queues[-1][1])
            elif kind == "alias" and name:
                alias = self._values(header, ALIAS_SETTINGS, values)
                if not alias:
                    raise self._error("destination_queues is missing", header)
                self._add(header, self.aliases, name, alias["destination_queues"])
            else:
                raise self._error("unknown section [%s]; there are [server], [queue], "
                                  "[queue NAME] and [alias NAME]" % header, header)
        for name, destinations in self.aliases.items():
            if name in self._queues:
                raise self._error("%s is both an alias and a queue" % name, "alias " + name)
            for other in destinations:
                if other in self.aliases:
                    raise self._error("destination_queues: %s is an alias itself" % other,
                                      "alias " + name, "destination_queues")
        for key, text in self.overrides.items():
            try:
                server[key] = SERVER_SETTINGS[key][0].parse(text)
            except ValueError as error:
                raise ConfigError("command line: %s: %s" % (key, error)) from None
        self.given = server.keys()       # the [server] settings that are not just defaults
        self.server = Values(**{**_defaults(SERVER_SETTINGS), **server})
        self.tls = self._read_tls()
        self.users = self._read_auth_file()
        self._check_users(queues)

    def queue(self, name):
        """The QueueConfig of `name`: built-in, then [queue], [queue q], [queue q+child]."""
        values = dict(self._queues.get("", {}))
        for prefix in {name.partition("+")[0]: 1, name: 2}:
            values.update(self._queues.get(prefix, {}))
        return QueueConfig(**values)

    def lines(self):
        """The effective settings, as a config file that would bring them about."""
        lines = ["[server]", *_shown(SERVER_SETTINGS, vars(self.server)), "",
                 "[queue]", *self.queue("").lines()]
        for name in sorted(filter(None, self._queues)):
            lines += ["", "[queue %s]" % name, *self.queue(name).lines()]
        for name, destinations in sorted(self.aliases.items()):
            lines += ["", "[alias %s]" % name,
                      "destination_queues = " + NAMES.show(destinations)]
        return lines

    def _sections(self):
        """Yield (header, {key: text}) of each section of the file."""
        if self.path is None:
            return
        parser = configparser.ConfigParser(
            interpolation=None, default_section="", inline_comment_prefixes=("#",),
            empty_lines_in_values=False)
        try:
            with open(self.path, encoding="utf-8-sig") as file:
                self._lines = file.read().split("\n")
            for number, line in enumerate(self._lines, 1):
                if "\0" in line:
                    raise self._error("a NUL in the file", line=number)
            parser.read_file(iter(line + "\n" for line in self._lines), self.path)
        except OSError as error:
            raise ConfigError("%s: %s" % (self.path, error.strerror)) from None
        except UnicodeDecodeError as error:
            raise ConfigError("%s: not UTF-8 text: %s" % (self.path, error)) from None
        except configparser.DuplicateSectionError as error:
            raise self._error("section [%s] is there twice" % error.section,
                              line=error.lineno) from None
        except configparser.DuplicateOptionError as error:
            raise self._error("%s is set twice in [%s]" % (error.option, error.section),
                              line=error.lineno) from None
        except configparser.MissingSectionHeaderError as error:
            raise self._error("neither a [section] nor a setting in one",
                              line=error.lineno) from None
        except configparser.ParsingError as error:
            raise self._error("neither [section] nor key = value",
                              line=error.errors[0][0]) from None
        for header in parser.sections():
            yield header, dict(parser[header])

    def _values(self, header, settings, texts):
        values = {}
        for key, text in texts.items():
            name = _OLD_NAMES.get(key, key)
            if name not in settings:
                raise self._error("unknown setting %s in [%s]" % (key, header), header, key)
            if name in values:
                raise self._error("%s is the same as %s: set one of them" % tuple(
                    *_OLD_NAMES.items()), header, key)
            try:
                values[name] = settings[name][0].parse(text)
            except ValueError as error:
                raise self._error("%s: %s" % (key, error), header, key) from None
        return values

    def _read_tls(self):
        """The ssl.SSLContext for those who come in, None without a tls_cert."""
        settings = self.server
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)      # not on PyPy
        for key in ("tls_cert", "tls_key", "tls_client_ca"):
            path = getattr(settings, key)
            if not path:
                continue
            lacks = "key, without a password, to the certificate of tls_cert"
            try:
                if not settings.tls_cert:
                    raise ValueError("it needs a tls_cert")
                open(path).close()           # its error says what is wrong, those below do not
                if key == "tls_client_ca":
                    lacks = "certificate"
                    context.load_verify_locations(path)
                    context.verify_mode = ssl.CERT_REQUIRED
                elif key == "tls_key" or not settings.tls_key:
                    # Without a password it asks for one, at the terminal.
                    context.load_cert_chain(settings.tls_cert, path, password=lambda: "")
            except ssl.SSLError as error:
                raise self._error("%s: %s has no %s: %s" % (key, path, lacks, error), "server",
                                  key) from None
            except (OSError, ValueError) as error:
                raise self._error("%s: %s" % (key, error), "server", key) from None
        return context if settings.tls_cert else None

    def _read_auth_file(self):
        path = self.server.auth_file
        if not path:
            return None
        for key in ("text_port", "thrift_port"):
            if getattr(self.server, key) is not None:
                raise self._error("auth_file: clients of %s cannot say who they are; turn it off"
                                  % key, "server", "auth_file")
        try:
            return _read_users(path)
        except (OSError, UnicodeDecodeError) as error:
            raise self._error("auth_file %s: %s" % (path, error), "server", "auth_file") from None

    def _check_users(self, queues):
        """Who is named by these (header, settings) of queues must be known."""
        for header, values in queues:
            for key in ("put_users", "get_users"):
                for user in values.get(key, ()):
                    if user not in (self.users or ()):
                        raise self._error("%s: there is no %s" % (
                            key, "auth_file" if self.users is None
                            else "%s in the auth_file" % user), header, key)

    def _add(self, header, known, name, values):
        """Note what a [queue NAME] or [alias NAME] says, once for each name."""
        if name in known:
            raise self._error("section [%s] is there twice" % header, header)
        if name:
            try:
                check_name(name)
            except ValueError as error:
                raise self._error(str(error), header) from None
        known[name] = values

    def _error(self, why, header=None, key=None, line=None):
        """A ConfigError that names the file and the line of `header`, or of its `key`."""
        section = None
        for number, text in enumerate(self._lines, 1):
            match = re.match(r"\[(.+)\]", text.strip())
            section = match[1] if match else section
            if line is None and section == header and (
                    match if key is None
                    else re.split("[=:]", text)[0].strip().lower() == key):
                line = number
        return ConfigError("%s:%s: %s" % (self.path, line, why))


# == 2. Records ===========================================================================
#
# Items, the records that stand for what was done with them, and damage to records. The format
# is Kestrel's own (2.1 to 2.4, net.lag.kestrel.Journal) so that a spool can be taken over and
# handed back. A journal is a sequence of operations; the queue is empty at its start, and doing
# each operation in order gives the queue. Knows the bytes of one file; no queues, no clients.


def _now(now=None):
    """Return `now` itself, or the time of day in milliseconds where the caller has none."""
    return time.time_ns() // 1000000 if now is None else now


class Place:
    """Where the data of an item is: in which JournalFile, at which offset, how many bytes. All
    copies of an item share it, so that it can be moved."""

    __slots__ = ("file", "offset", "size")

    def __init__(self, file, offset, size):
        self.file = file
        self.offset = offset
        self.size = size


class Item:
    """One item of a queue.

    data: bytes; None while it is only on disk, at `place`. flags: the memcache client's 32 bits.
    add_time and expiry: milliseconds of the epoch, expiry 0 for none. deliveries: kept as
    journalled. xid: the number of the latest open read of it. cas: what `gets` told of it, None
    until asked. place: the Place of its data, if it was read from there.
    """

    __slots__ = ("data", "add_time", "expiry", "flags", "deliveries", "xid", "cas", "place")

    def __init__(self, data, add_time, expiry=0, flags=0, deliveries=0):
        self.data = data
        self.add_time = add_time
        self.expiry = expiry
        self.flags = flags
        self.deliveries = deliveries
        self.xid = 0
        self.cas = None
        self.place = None

    def stub(self):
        """Return a copy without the data, which is read again from `place` when it is needed."""
        stub = Item(None, self.add_time, self.expiry, self.flags, self.deliveries)
        stub.xid, stub.cas, stub.place = self.xid, self.cas, self.place
        return stub


# The opcodes. What this server writes is ADDX, REMOVE, SAVE_XID, OPEN, CONFIRM, UNREMOVE,
# and ADDF where flags or deliveries need it; the others it only reads.
ADD, REMOVE, ADDX, OPEN_NEXT, SAVE_XID = 0, 1, 2, 3, 4
UNREMOVE, CONFIRM, ADD_XID, CONTINUE, OPEN, ADDF = 5, 6, 7, 8, 9, 10

# An operation that stands for as many REMOVEs as there are waiting items; not an opcode.
FLUSH = -1

OPCODE_NAMES = {
    ADD: "ADD", REMOVE: "REMOVE", ADDX: "ADDX", OPEN_NEXT: "REMOVE_TENTATIVE",
    SAVE_XID: "SAVE_XID", UNREMOVE: "UNREMOVE", CONFIRM: "CONFIRM_REMOVE", ADD_XID: "ADD_XID",
    CONTINUE: "CONTINUE", OPEN: "REMOVE_TENTATIVE_XID", ADDF: "ADDF",
}

# What follows the opcode and stands before the data: xid, size, add time, expiry, flags
# and deliveries, as far as the opcode has them. `size` counts all that comes after it.
_HEADS = {
    ADD: struct.Struct("<ii"),
    ADDX: struct.Struct("<iqq"),
    ADD_XID: struct.Struct("<iiqq"),
    CONTINUE: struct.Struct("<iiqq"),
    ADDF: struct.Struct("<iqqII"),
}
_LONGEST_HEAD = 1 + max(head.size for head in _HEADS.values())
_XID = struct.Struct("<i")

_pack_addx = struct.Struct("<Biqq").pack
_pack_addf = struct.Struct("<BiqqII").pack
_pack_xid = struct.Struct("<Bi").pack

# A larger count of deliveries means a corrupt record.
_MOST_DELIVERIES = 1000000

_READ_SIZE = 1 << 20
_LARGE = 1 << 20                # bytes of a write that is not done on the loop's thread
_STEP_SIZE = 1 << 20            # bytes that a task reads or writes in one step

# What stands in a repaired journal for an item that was lost; nobody is ever given it.
LOST = Item(b"", 0, 1)


def is_lost(item):
    """Return whether the item stands for one that was lost."""
    return item.expiry == 1 and not item.add_time and not item.data


class Damage(Exception):
    """A journal does not go on with a whole record at `offset`. torn: it just ends early. file:
    the JournalFile, where the reader does not know it."""

    def __init__(self, offset, why, torn, file=None):
        super().__init__("%s at byte %d" % (why, offset))
        self.offset = offset
        self.why = why
        self.torn = torn
        self.file = file


def read_records(file, piece=_READ_SIZE):
    """Yield (opcode, xid, item, end offset) for each record of the open binary `file`, which
    is read in pieces of so many bytes.

    The item is None and the xid 0 where the record has none. Raises Damage at the first
    byte from which no whole record can be read.
    """
    data, pos, base = b"", 0, 0           # data[pos] is the byte base + pos of the file
    addx = _HEADS[ADDX]
    while True:
        if len(data) - pos < _LONGEST_HEAD:
            data = data[pos:] + file.read(piece)
            base += pos
            pos = 0
            if not data:
                return
        opcode = data[pos]
        xid = deliveries = flags = 0
        try:
            if opcode == REMOVE:
                pos += 1
                yield REMOVE, 0, None, base + pos
                continue
            if opcode in (OPEN, CONFIRM, UNREMOVE, SAVE_XID):
                xid, = _XID.unpack_from(data, pos + 1)
                pos += 5
                yield opcode, xid, None, base + pos
                continue
            if opcode == OPEN_NEXT:
                pos += 1
                yield OPEN_NEXT, 0, None, base + pos
                continue
            if opcode == ADDX:
                head = addx
                size, add_time, expiry = head.unpack_from(data, pos + 1)
                smallest = 16
            elif opcode == ADD:
                head = _HEADS[ADD]
                size, expiry = head.unpack_from(data, pos + 1)
                add_time, expiry, smallest = 0, expiry * 1000, 4
            elif opcode == ADDF:
                head = _HEADS[ADDF]
                size, add_time, expiry, flags, deliveries = head.unpack_from(data, pos + 1)
                smallest = 24
                if deliveries >= _MOST_DELIVERIES:           # an ADDX with a flipped bit
                    raise Damage(base + pos, "impossible count of deliveries", torn=False)
            elif opcode in _HEADS:
                head = _HEADS[opcode]
                xid, size, add_time, expiry = head.unpack_from(data, pos + 1)
                smallest = 16
            else:
                raise Damage(base + pos, "unknown opcode %d" % opcode, torn=False)
        except struct.error:
            raise Damage(base + pos, "record cut short", torn=True) from None
        start = pos + 1 + head.size
        end = start + size - smallest
        if size < smallest:
            zeros = opcode == ADD and _only_zeros(data[pos:], file)
            raise Damage(base + pos, "zeros" if zeros else "impossible size %d" % size, zeros)
        if end > len(data):
            more = file.read(max(piece, end - len(data)))
            data = data[pos:] + more
            start, end, base, pos = start - pos, end - pos, base + pos, 0
            if end > len(data):
                raise Damage(base, "record cut short", torn=True)
        item = Item(data[start:end], add_time, expiry, flags, deliveries)
        pos = end
        yield opcode, xid, item, base + pos


def _only_zeros(data, file):
    while data:
        if data.count(0) != len(data):
            return False
        data = file.read(_READ_SIZE)
    return True


def _parse_head(data):
    """Return (item without data, where its data begins, its size) of the record at the start of
    `data`; None if it adds no item, or its head is not whole."""
    head = _HEADS.get(data[0]) if data else None
    if head is None or len(data) < 1 + head.size:
        return None
    fields = head.unpack_from(data, 1)
    if data[0] in (ADD_XID, CONTINUE):
        fields = fields[1:]
    size, *fields = fields
    if data[0] == ADD:
        fields = 0, fields[0] * 1000
    counted = head.size - (8 if data[0] in (ADD_XID, CONTINUE) else 4)       # by the size
    if size < counted:
        return None
    return Item(None, *fields), 1 + head.size, size - counted


def _head(item, size):
    """Return the head of the record that adds an item with `size` bytes of data."""
    if item.flags or item.deliveries:
        return _pack_addf(ADDF, size + 24, item.add_time, item.expiry, item.flags,
                          item.deliveries)
    return _pack_addx(ADDX, size + 16, item.add_time, item.expiry)


def _encode(ops):
    """Return the records of operations as a list of byte strings."""
    chunks = []
    for opcode, item, xid in ops:
        if opcode == ADDX:
            chunks += _head(item, len(item.data)), item.data
        elif opcode == REMOVE:
            chunks.append(b"\1")
        elif opcode == FLUSH:
            chunks.append(b"\1" * xid)
        else:
            chunks.append(_pack_xid(opcode, xid))
    return chunks


def dump_records(path):
    """Yield each record of a journal file as a dict, and what is damaged in it as one with
    the key `damage`. The file is only read. Raises OSError."""
    with open(path, "rb") as file:
        offset = 0
        try:
            for opcode, xid, item, end in read_records(file):
                record = {"offset": offset, "operation": OPCODE_NAMES[opcode]}
                if opcode in (OPEN, CONFIRM, UNREMOVE, SAVE_XID, ADD_XID, CONTINUE):
                    record["xid"] = xid
                if item is not None:
                    record.update(add_time=item.add_time, expiry=item.expiry,
                                  size=len(item.data), data=repr(item.data[:40])[1:])
                    if opcode == ADDF:
                        record.update(flags=item.flags, deliveries=item.deliveries)
                yield record
                offset = end
        except Damage as damage:
            yield {"offset": damage.offset, "damage": str(damage),
                   "bytes": os.path.getsize(path) - damage.offset}


# -- damage
#
# Where reading fails, good records may follow. What a damaged record looked like cannot be
# known; each hypothesis below is one way in which a single change leads the reader astray. The
# first one that finds good records behind it wins. Records are good when they can be read to
# the end of the file and are plausible.

# Plausible times lie between 2005 and 2100.
_PLAUSIBLE_TIMES = range(1104537600000, 4102444800000)

# Where a record that adds an item may begin: opcode, (xid,) size, a plausible time.
_LIKELY_START = re.compile(rb"(?=[\x02\x0a].{9}[\1-\3]\0\0|[\x07\x08].{13}[\1-\3]\0\0)", re.S)

# Where reading failed. begin: the offset. torn: the file just ends there. last, last_end: the
# last record before it that adds an item, or the first of several doubtful ones in a row, and
# where these end; last is None if there is none. plausible: whether it is. mean: the average
# size of such records here.
_Failure = collections.namedtuple("_Failure", "begin torn last last_end plausible mean")


def _is_plausible(opcode, xid, item):
    if item is None:
        return opcode in (REMOVE, OPEN_NEXT) or xid > 0
    return opcode in (ADDX, ADDF, ADD_XID, CONTINUE) and (is_lost(item) or (
        item.add_time in _PLAUSIBLE_TIMES
        and (item.expiry == 0 or item.expiry in _PLAUSIBLE_TIMES)))


def _is_good(data, start, past=0):
    """Return whether plausible records can be read from data[start] on, up to one that ends
    beyond data[past] or the end of the file. The first one adds an item."""
    data.seek(start)
    first = True
    with contextlib.suppress(Damage):
        for opcode, xid, item, end in read_records(data, 4096):
            if not _is_plausible(opcode, xid, item) or first and item is None:
                return False
            if start + end > past:
                return True
            first = False
    return False


def _next_good(data, begin):
    """Return where good records begin again after `begin`, or the end of the file."""
    return next((match.start() for match in _LIKELY_START.finditer(data, begin + 1)
                 if _is_good(data, match.start())), len(data))


def _size_was_raised(data, at):
    """The last record has swallowed good ones, since its size was changed."""
    if at.last is None:
        return None
    inside = [match.start() for match in _LIKELY_START.finditer(data, at.last + 1, at.begin + 17)
              if match.start() < at.begin]
    if not inside or at.plausible and not any(_is_good(data, start, at.begin) for start in inside):
        return None
    end = next((start for start in inside if _is_good(data, start)), None)
    return end and (at.last, end, 1)


def _opcode_was_changed(data, at):
    """The opcode alone is wrong: good records follow after the size that is still there."""
    if data[at.begin] in _HEADS or len(data) - at.begin <= 21:
        return None
    size, add_time, expiry = _HEADS[ADDX].unpack_from(data, at.begin + 1)
    end = at.begin + 5 + size
    if _is_plausible(ADDX, 0, Item(b"", add_time, expiry)) and (
            at.begin + 21 <= end < len(data) and _is_good(data, end)):
        return at.begin, end, 1
    return None


def _size_was_lowered(data, at):
    """One bit of the last record's size is wrong, and reading failed within its data. In the
    head of another record there would be a time as a rule."""
    end = _next_good(data, at.begin)
    if at.last is None or end == len(data):
        return None
    size, = struct.unpack_from("<i", data, at.last + 1)
    if at.last_end == at.begin and not at.plausible or (
            data[at.last] == ADDX and bin(size ^ (end - at.last - 5)).count("1") == 1
            and not re.search(rb"[\1-\3]\0\0", data[at.begin:min(at.begin + 40, end)])):
        return at.last, end, 1
    return None


def _anything_else(data, at):
    """Nothing is known but where good records begin again."""
    end = _next_good(data, at.begin)
    if at.torn and end == len(data) or end - at.begin < 21:
        return at.begin, end, 0
    size = end - at.begin
    return at.begin, end, max(1, size // (at.mean or size))


_HYPOTHESES = _size_was_raised, _opcode_was_changed, _size_was_lowered, _anything_else


def find_damage(data, start=0):
    """Yield (begin, end, how many items may have been there, why) of each damaged piece of a
    journal file from byte `start` on. data: an mmap of the file."""
    while True:
        last, last_end, plausible, offset, items, size = None, 0, True, start, 0, 0
        data.seek(start)
        try:
            for opcode, xid, item, end in read_records(data):
                end += start
                if item is not None:
                    is_plausible = _is_plausible(opcode, xid, item)
                    if is_plausible or last is None or plausible:
                        last = offset
                    plausible = is_plausible
                    last_end = end
                    items += 1
                    size += end - offset
                offset = end
            return
        except Damage as damage:
            failure = _Failure(offset, damage.torn, last, last_end, plausible,
                               size // items if items else 0)
            why = damage.why
        begin, end, lost = next(filter(None, (
            hypothesis(data, failure) for hypothesis in _HYPOTHESES)))
        yield begin, end, lost, why
        start = end


# == 3. Journal ===========================================================================
#
# The files of one queue: appending to them, cutting back what failed, fsync, rotation, putting
# new files in the place of old ones, repair, and reading behind. Knows records and files, and
# the positions of operations; no clients, no other queues.
#
# A *task* is a generator that does long work in bounded steps. Where it yields None it is to be
# resumed in a later turn; where it yields a call, the call may block: it is made on a worker
# thread, and the OSError that it returns or raises, if any, is thrown into the task.


class Unclear(OSError):
    """Operations failed, and whether they are in the files cannot be said."""


def _bare(error):
    """Return a copy of an OSError without its traceback, which would keep every frame alive:
    the daemon runs without the garbage collector."""
    return type(error)(error.errno, error.strerror, error.filename)


def run_task(task):
    """Run a task to its end at once. Raises what it raises."""
    error = None
    with contextlib.suppress(StopIteration):
        while True:
            call = task.throw(error) if error else next(task)
            try:
                error = call and call()
            except OSError as failure:
                error = _bare(failure)


def fsync_all(fds):
    """fsync the descriptors and close them. Return the last OSError, None if all is well."""
    failure = None
    for fd in fds:
        try:
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            failure = _bare(error)
    return failure


def _fsync_directory(path):
    return fsync_all([os.open(path, os.O_RDONLY | os.O_CLOEXEC)])


def _close_all(fds):
    for fd in fds:
        with contextlib.suppress(OSError):             # it is closed all the same
            os.close(fd)


def _open_private(path, flags):
    """The opener of files that are for their owner only."""
    return os.open(path, flags, 0o600)


def _open_journal(path, flags=0):
    """Open a file of a journal for writing. Raises OSError, also for what is no file: a pipe
    would keep the opener waiting, and what is written to a device is gone."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise OSError(errno.EINVAL, "not a regular file", path)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | flags, 0o600)


def _identity(status):
    return status.st_dev, status.st_ino


def _discard(path):
    """Delete an unfinished file. If that fails it is deleted at the next start."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def _write_all(fd, chunks, offset, size):
    """Write byte strings of `size` bytes in all at `offset`, however often the kernel stops
    short."""
    # Joining chunks costs less than many calls; copying large ones does not.
    pieces = [b"".join(chunks)] if size < _LARGE else itertools.chain.from_iterable(
        group if large else [b"".join(group)]
        for large, group in itertools.groupby(chunks, lambda chunk: len(chunk) >= _LARGE))
    for piece in pieces:
        done = os.pwrite(fd, piece, offset)
        offset += done
        while done < len(piece):
            count = os.pwrite(fd, memoryview(piece)[done:], offset)
            offset += count
            done += count


def _write_and_close(writes):
    """Make several writes (fd, chunks, offset, size), in the worker."""
    try:
        for write in writes:
            _write_all(*write)
    finally:
        _close_all([write[0] for write in writes])


def _load(item, fd, offset, size):
    try:
        data = os.pread(fd, size, offset)
    finally:
        os.close(fd)
    if len(data) < size:
        raise OSError(errno.EIO, "the file has become shorter")
    item.data = data


def _copy(data, begin, end, target):
    for offset in range(begin, end, _STEP_SIZE):
        target.write(data[offset:min(end, offset + _STEP_SIZE)])


# The name of the queue, and the number of an older file or of a packed one.
_JOURNAL_NAME = re.compile(r"([^.~]+)(?:\.(0|-?[1-9][0-9]*)(\.pack)?|~~[0-9]+)?", re.S)


def find_journals(directory, only=None):
    """Return {queue name: [numbers of its older files]} of a spool, tidied up on the way.

    Unfinished files are deleted and packed files take the place of what they stand for. What is
    no journal is left alone, with a warning; so are directories. Of a queue whose files cannot
    be tidied up the numbers are None. only: the name of the one queue to look at, whose errors
    are raised. Raises OSError when the directory cannot be read.
    """
    found = {}
    packs = []
    changed = False
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        match = _JOURNAL_NAME.fullmatch(entry.name)
        if entry.is_dir() or only is not None and not (match and match[1] == only):
            continue
        try:
            name = check_name(match[1] if match else "")
            if not entry.is_file():
                raise ValueError("not a regular file")
        except ValueError as error:
            log.warning("%s: %s, left alone", entry.path,
                        error if match and not entry.is_file() else "not a journal")
            continue
        if "~" in entry.name:
            log.info("%s: deleted, an unfinished rewrite", entry.path)
            _discard(entry.path)
            continue
        numbers = found.setdefault(name, [])
        if match[3]:
            packs.append((int(match[2]), name))
        elif match[2]:
            numbers.append(int(match[2]))
    for last, name in sorted(packs):
        path = "%s.%d" % (os.path.join(directory, name), last)
        if found[name] is None:              # an earlier pack of it has failed
            continue
        changed = True
        try:
            for number in [number for number in found[name] if number <= last]:
                os.unlink("%s.%d" % (os.path.join(directory, name), number))
                found[name].remove(number)
            _raise(_fsync_directory(directory))
            if os.path.getsize(path + ".pack"):
                os.rename(path + ".pack", path)
                found[name].append(last)
            else:                            # the queue was being deleted
                os.unlink(path + ".pack")
                if not found[name] and not os.path.exists(os.path.join(directory, name)):
                    del found[name]
        except OSError as error:
            if only is not None:
                raise
            log.error("queue %s cannot be loaded: %s.pack: %s", name, path, error.strerror)
            found[name] = None
    error = _fsync_directory(directory) if changed else None
    if error:                                # it will be done again at the next start
        log.error("%s: %s", directory, error.strerror)
    for numbers in filter(None, found.values()):
        numbers.sort()
    return found


def is_short_of_descriptors(error):
    """Return whether a call failed only since too many files are open, here or in the system."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


def _raise(error):
    if error:
        raise error


def put_aside(directory, name):
    """Move the files of a queue, of which nothing has been read, to lost+found. Raises OSError."""
    lost = os.path.join(directory, "lost+found")
    for file in sorted(os.listdir(directory)):
        match = _JOURNAL_NAME.fullmatch(file)
        if match and match[1] == name and "~" not in file:
            os.makedirs(lost, 0o700, exist_ok=True)
            target = os.path.join(lost, "%s.%d" % (file, _unique_number()))
            os.rename(os.path.join(directory, file), target)
            log.warning("%s: from before keep_journal was false, moved to %s",
                        os.path.join(directory, file), target)


_newest_number = 0


def _unique_number(above=0):
    """Return the time in milliseconds as the number of a file, but one that is greater than
    `above` and than any before: what is left of a deleted queue is never taken for new."""
    global _newest_number
    _newest_number = max(_now(), above + 1, _newest_number + 1)
    return _newest_number


class Budget:
    """What the queues of a server share: memory for items, and descriptors for files.

    memory: the bytes that items in memory take, see ITEM_COST. most_memory: where queues begin
    to leave items on disk, and, where they cannot, refuse them. most_files: how many journal
    files are open at once; the one that was opened first is closed for another.
    """

    def __init__(self, most_memory=UNLIMITED, most_files=UNLIMITED):
        self.memory = 0
        self.most_memory = most_memory
        self.most_files = most_files
        self.files = {}                  # open JournalFiles, the one opened first first

    def opened(self, file):
        """Count a file that has been opened, and close another one if there are too many."""
        self.files[file] = None
        if len(self.files) > self.most_files:
            self.close(next(iter(self.files)))

    def close(self, file):
        """Close a file, if it is open."""
        if file.fd is not None:
            fd, file.fd = file.fd, None
            del self.files[file]
            os.close(fd)


class JournalFile:
    """One file of a journal.

    path: None once it has been deleted. number: None for the current one. size: how many of its
    bytes count. waiting: how many waiting items are accounted to it, see Journal. inode: what
    identifies the file that was opened under that path.
    """

    __slots__ = ("path", "number", "size", "waiting", "inode", "fd")

    def __init__(self, path, number, size=0):
        self.path = path
        self.number = number
        self.size = size
        self.waiting = 0
        self.inode = None
        self.fd = None                   # while open for writing, see Budget

    def is_there(self):
        """Return whether the file is still there under its name. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            return _identity(os.stat(self.path)) == self.inode
        return False

    def age(self):
        """Return what files are sorted by, the oldest first."""
        return self.number is None, self.number


# A batch of operations on its way to the files. shares: (file, records, their size) of each
# file that gets some. size: of all. waiting: {file: its count of waiting items then}. passed:
# how many files are passed then. opens: the reads that are open when the last of them is passed.
Plan = collections.namedtuple("Plan", "shares size waiting passed opens")

# What commit() has done. before: (file, size, count of waiting items) of each file changed.
Write = collections.namedtuple("Write", "position before passed")

# Files have been passed with the operation at `position`. Of those up to `number` these open
# reads and items are to be kept.
Passing = collections.namedtuple("Passing", "position number opens items")

# An fsync under way, of all that has been written up to `position`.
Sync = collections.namedtuple("Sync", "position files directory")

_WAITING_AFTER = {REMOVE: -1, OPEN: -1, UNREMOVE: 1, CONFIRM: 0}


class Journal:
    """The files of one queue.

        passed files | files[0] ... files[-1]
                       head         current

    Items are added to the last of `files`, the current one. Operations on the head item go to
    the first one, which holds that item, or to which it was put back. Replay reads the files in
    order, so the result is the same as with a single file. The counts of waiting items of
    `files` add up to that of the queue. A file that has none left has been *passed*: it moves to
    `passed`, and no later operation refers to its items, except to end reads that are open now.
    pack() puts these into one small file in place of all that have been passed. So the files on
    the disk follow the backlog and not its history, and a queue of one file, the usual case, has
    one write a turn.

    A batch of operations is written in two steps: plan() says what goes where, write() does
    it, perhaps on the worker thread, and commit() makes it count. Until then the sizes of the
    files are those before it, and cut() cuts off what is there beyond. What is committed but
    not safe is remembered in `writes`, so that go_back() can return to any safe position.

    lock: keep other processes out of the current file, for a queue without a server.
    """

    def __init__(self, directory, name, older=(), budget=None, lock=False):
        self.directory = directory
        self.name = name
        self.path = os.path.join(directory, name)
        self.budget = budget or Budget()
        self.lock = lock
        self.passed = []
        self.files = [JournalFile("%s.%d" % (self.path, number), number) for number in older]
        for file in self.files:
            file.size = os.stat(file.path).st_size
        self.directory_changed = False       # it has to be fsynced
        self.unsynced = {}                   # files written to since the last fsync began
        self.torn = set()                    # files to be cut before anything is written
        self.writes = collections.deque()    # a Write for each that is not safe
        self.passings = collections.deque()  # Passings whose files are still there
        self.add_current()
        self.size = sum(file.size for file in self.files)      # of all files together

    @property
    def current(self):
        """The file to which items are added."""
        return self.files[-1]

    def add_current(self, flags=0):
        """Open the current file, made if it is new. Raises OSError."""
        file = JournalFile(self.path, None)
        self._opened(file, _open_journal(self.path, os.O_CREAT | flags))
        file.size = os.fstat(file.fd).st_size
        self.files.append(file)
        if len(self.files) > 2:              # nothing will be written to it for long
            self.budget.close(self.files[-2])
        # It may have been created just before a crash.
        self.directory_changed = self.directory_changed or not file.size

    def _opened(self, file, fd):
        if self.lock:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(fd)
                raise OSError(error.errno, "held by another process", file.path) from None
        file.fd = fd
        file.inode = _identity(os.fstat(fd))
        self.budget.opened(file)

    def _open(self, file):
        """Return the descriptor of a file. Raises OSError, ESTALE if it is not there any more,
        and Damage if it has another size than it should have."""
        if file.fd is None:
            inode = file.inode
            try:
                self._opened(file, _open_journal(file.path))
            except FileNotFoundError:
                raise self._lost(file) from None
            if inode not in (None, file.inode):
                file.inode = inode
                self.budget.close(file)
                raise self._lost(file)
            size = os.fstat(file.fd).st_size
            if file not in self.torn and size != file.size:
                self.budget.close(file)
                if self.lock:
                    raise OSError(errno.EBUSY, "changed by another process", file.path)
                raise Damage(min(size, file.size), "size changed", False, file)
        return file.fd

    @staticmethod
    def _lost(file):
        return OSError(errno.ESTALE, "removed or replaced by somebody else", file.path)

    def has_fresh_current(self):
        """Return whether the current file is an empty one that is still there."""
        current = self.current
        return current.number is None and not current.size and current.is_there()

    # -- reading

    def read(self, file):
        """Yield the records of one file, as read_records does. Raises Damage."""
        with open(file.path, "rb") as source:
            yield from read_records(source)

    def load_call(self, item):
        """Return the call that gives a stub its data back. Raises OSError, as does the call."""
        # By the time of the call the file may have another name, and the data another place.
        place = item.place
        fd = os.open(place.file.path, os.O_RDONLY | os.O_CLOEXEC)
        return functools.partial(_load, item, fd, place.offset, place.size)

    def account(self, added, last_head, count):
        """After a replay: what waits in which file. added: how many items each file adds.
        last_head: the index of the last file that does something to the head of the queue.
        count: how many items wait."""
        for file, number in zip(self.files, added):
            file.waiting = number
        self.files[last_head].waiting = count - sum(added[last_head + 1:])
        while last_head < len(self.files) - 1 and not self.files[last_head].waiting:
            last_head += 1
        self.passed, self.files = self.files[:last_head], self.files[last_head:]

    # -- writing

    def plan(self, ops, count, opens):
        """Return the Plan for a batch of operations. count: how many items wait after it.
        opens: the reads open after it."""
        files = self.files
        if len(files) == 1:
            chunks = _encode(ops)
            size = sum(map(len, chunks))
            return Plan(((files[0], chunks, size),), size, {files[0]: count}, 0, None)
        shares = {}
        waiting = {}
        head = after = 0
        for index, op in enumerate(ops):
            while not waiting.get(head, files[head].waiting) and head < len(files) - 1:
                head += 1
                after = index
            opcode, item, xid = op
            if opcode == FLUSH:
                for number in range(head, len(files)):
                    left = waiting.get(number, files[number].waiting)
                    if left:
                        shares.setdefault(number, []).append((FLUSH, None, left))
                    waiting[number] = 0
                continue
            number = len(files) - 1 if opcode == ADDX else head
            shares.setdefault(number, []).append(op)
            waiting[number] = waiting.get(number, files[number].waiting) + (
                1 if opcode == ADDX else _WAITING_AFTER[opcode])
        while not waiting.get(head, files[head].waiting) and head < len(files) - 1:
            head += 1
            after = len(ops)
        shares = [(files[number], _encode(shares[number])) for number in sorted(shares)]
        shares = [(file, chunks, sum(map(len, chunks))) for file, chunks in shares]
        return Plan(shares, sum(size for _, _, size in shares),
                    {files[number]: left for number, left in waiting.items()},
                    head, _opens_before(opens, ops[after:]) if head else None)

    def write(self, plan):
        """Write what is planned, one write a file. Raises OSError; cut() is then due."""
        begun = []
        try:
            for file, chunks, size in plan.shares:
                fd = file.fd if file.fd is not None else self._open(file)
                begun.append(file)
                _write_all(fd, chunks, file.size, size)
        except (OSError, MemoryError, Damage) as error:
            self.torn.update(begun)
            if not isinstance(error, OSError):
                raise
            raise OSError(error.errno, error.strerror, file.path) from None

    def write_call(self, plan):
        """Return the call for the worker that writes what is planned. Raises OSError."""
        writes = []
        try:
            for file, chunks, size in plan.shares:
                writes.append((os.dup(self._open(file)), chunks, file.size, size))
        except (OSError, Damage):
            _close_all([write[0] for write in writes])
            raise
        return functools.partial(_write_and_close, writes)

    def tear(self, plan):
        """Mark the files of a plan as possibly half written."""
        self.torn.update(share[0] for share in plan.shares)

    def commit(self, plan, position, safe):
        """Make a written batch count. position: of its last operation. safe: whether that is
        safe now, so that nobody will go back."""
        if not safe:
            self.writes.append(Write(position, [
                (file, file.size, file.waiting) for file in plan.waiting], plan.passed))
        for file, _, size in plan.shares:
            file.size += size
            self.size += size
            self.unsynced[file] = None
        for file, count in plan.waiting.items():
            file.waiting = count
        if plan.passed:
            self._pass(plan.passed, position, plan.opens)

    def _pass(self, count, position, opens, items=()):
        self.passed += self.files[:count]
        del self.files[:count]
        self.passings.append(Passing(position, self.passed[-1].number, opens, items))

    def pass_all(self, position, safe, opens, items):
        """Have everything written anew: pack() will put these open reads, and the items, which
        are all that wait, into one file in place of all but the current one, which is empty."""
        if not safe:
            self.writes.append(Write(position, [(self.current, 0, 0)], len(self.files) - 1))
        if not self.passed and len(self.files) == 1:           # there is nothing yet
            self.passed.append(JournalFile(None, self._next_number()))
        self.current.waiting = len(items)
        self._pass(len(self.files) - 1, position, opens, items)

    def forget(self, safe):
        """Drop what go_back() would need for the operations up to `safe`."""
        while self.writes and self.writes[0].position <= safe:
            self.writes.popleft()

    def go_back(self, safe):
        """Make the files count as they did at this position; cut() is then due."""
        while self.writes and self.writes[-1].position > safe:
            write = self.writes.pop()
            for file, size, waiting in write.before:
                self.size += size - file.size
                file.size, file.waiting = size, waiting
                self.torn.add(file)
            if write.passed:
                self.files[:0] = self.passed[-write.passed:]
                del self.passed[-write.passed:]
        while self.passings and self.passings[-1].position > safe:
            self.passings.pop()

    def cut(self):
        """Cut off what failed or undone operations have left. Raises OSError."""
        # The newest first: what is done to the head there builds on the files before it.
        for file in sorted(self.torn, key=JournalFile.age, reverse=True):
            os.ftruncate(self._open(file), file.size)
            self.torn.discard(file)
            self.unsynced[file] = None

    # -- fsync

    def needs_sync(self):
        """Return whether something was written or renamed since the last fsync began."""
        return bool(self.unsynced or self.directory_changed)

    def begin_sync(self, position):
        """Return the call that fsyncs all that has been written, and the Sync of it.

        Raises OSError: ESTALE if one of the files is not there any more under its name.
        """
        # The oldest first: what is done to the head in one file builds on those before it.
        files = sorted(self.unsynced, key=JournalFile.age)
        fds = []
        try:
            for file in files:
                if not file.is_there():
                    raise self._lost(file)
                fds.append(os.dup(file.fd) if file.fd is not None
                           else os.open(file.path, os.O_RDONLY | os.O_CLOEXEC))
            if self.directory_changed:
                fds.append(os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            _close_all(fds)
            raise
        for file in files:
            if file is not self.files[0] and file is not self.files[-1]:
                self.budget.close(file)      # nothing will be written to it for long
        sync = Sync(position, files, self.directory_changed)
        self.unsynced = {}
        self.directory_changed = False
        return functools.partial(fsync_all, fds), sync

    def sync_failed(self, sync):
        """Schedule the files of a failed fsync for another one."""
        self.unsynced.update(dict.fromkeys(file for file in sync.files if file.path))
        self.directory_changed = self.directory_changed or sync.directory

    def _sync_directory(self):
        return functools.partial(_fsync_directory, self.directory)

    # -- new files for old

    def _next_number(self):
        return _unique_number(max([file.number for file in (self.passed + self.files)[-2:]
                                   if file.number is not None], default=0))

    def retire_current(self):
        """A task: give the current file a number, so that add_current() can open another one.
        Meanwhile it is still written to. Two renames would be one too many: a crash could
        leave the later of them alone on the disk."""
        self._number_current()
        yield self._sync_directory()

    def _number_current(self):
        current = self.current
        if current.number is None:           # else an earlier try came as far as this
            number = self._next_number()
            path = "%s.%d" % (self.path, number)
            with contextlib.suppress(FileNotFoundError):       # removed by somebody else
                os.rename(self.path, path)
            current.path, current.number = path, number

    def _open_temporary(self):
        """Return the path and descriptor of a new file that is deleted at the next start."""
        path = "%s~~%d" % (self.path, _unique_number())
        return path, _open_journal(path, os.O_CREAT | os.O_EXCL)

    def _write_file(self, file, pieces):
        """A task: put a new file, made of `pieces`, in the place of what is at file.path.

        pieces: yields lists of byte strings, one for each step. This is the only way in which
        files are replaced, so that a crash finds the old one or the whole of the new one.
        """
        temporary, fd = self._open_temporary()
        try:
            size = 0
            for chunks in pieces:
                length = sum(map(len, chunks))
                _write_all(fd, chunks, size, length)
                size += length
                yield None
            yield functools.partial(fsync_all, [os.dup(fd)])
            os.rename(temporary, file.path)
        except BaseException:                # also when the queue is deleted meanwhile
            os.close(fd)
            _discard(temporary)
            raise
        self.budget.close(file)
        self.size += size - file.size
        file.size = size
        self._opened(file, fd)
        self.torn.discard(file)
        self.unsynced.pop(file, None)

    def _remove(self, file):
        """A task: delete a file that has been passed."""
        fds = []
        if file.path:
            fds = self._unlink(file)
            self.size -= file.size
        file.path = None
        self.unsynced.pop(file, None)
        self.torn.discard(file)
        self.passed.remove(file)
        if fds:
            yield functools.partial(_close_all, fds)

    def _unlink(self, file):
        """Delete a file. Return the descriptors to be closed elsewhere: the last close of a
        large file takes long. Raises OSError."""
        fds = []
        if file.size >= _STEP_SIZE:
            with contextlib.suppress(OSError):
                fds.append(os.open(file.path, os.O_RDONLY | os.O_CLOEXEC))
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.path)
        except OSError:
            _close_all(fds)
            raise
        self.budget.close(file)
        return fds

    def next_passing(self, safe):
        """Return the Passing whose files may be packed, None if there is none."""
        passings = self.passings
        while len(passings) > 1 and passings[1].position <= safe:
            passings.popleft()
        return passings[0] if passings and passings[0].position <= safe else None

    def pack(self, passing, last_xid):
        """A task: put one file in place of those that have been passed. Raises OSError; then
        it can be done again."""
        old = [file for file in self.passed if file.number <= passing.number]
        if passing.opens or passing.items:
            path = "%s.%d" % (self.path, passing.number)
            pack = next((file for file in old if file.path == path + ".pack"),   # tried before
                        JournalFile(path + ".pack", passing.number))
            places = []
            yield from self._write_file(pack, self._pieces(passing, last_xid, places))
            rest = self.passed[len(old):]
            old = [file for file in old if file is not pack]
            self.passed = old + [pack] + rest
            for place, offset in places:
                place.file, place.offset = pack, offset
            yield self._sync_directory()
            for file in old:
                yield from self._remove(file)
            yield self._sync_directory()
            os.rename(pack.path, path)
            pack.path = path
            self.budget.close(pack)
            yield self._sync_directory()
        else:
            # Nothing is left of them. The oldest goes first: whatever is done to items
            # that are not there, a queue that ended empty ends empty.
            for file in old:
                yield from self._remove(file)
                yield self._sync_directory()
        if self.passings and self.passings[0] is passing:
            self.passings.popleft()

    def _pieces(self, passing, last_xid, places):
        """Yield the records of a pack in pieces. places: filled with (Place, new offset) for
        each item that has one."""
        chunks = [_pack_xid(SAVE_XID, last_xid)]
        size = offset = len(chunks[0])
        records = itertools.chain(((item, _pack_xid(OPEN, xid)) for xid, item in
                                   passing.opens.items()), ((item, b"") for item in passing.items))
        for item, end in records:
            data = item.data
            if data is None:
                loaded = item.stub()
                self.load_call(loaded)()
                data = loaded.data
            head = _head(item, len(data))
            if item.place:
                places.append((item.place, offset + len(head)))
            record = [head, data, end]
            chunks += record
            length = sum(map(len, record))
            offset += length
            size += length
            if size >= _STEP_SIZE:
                yield chunks
                chunks, size = [], 0
        yield chunks

    def adopt_pack(self):
        """Let the packed file be the current one, which nothing has been written to."""
        if self.passed:
            pack, = self.passed
            os.rename(pack.path, self.path)
            self.close()
            pack.path, pack.number, pack.waiting = self.path, None, self.current.waiting
            self.passed, self.files = [], [pack]
            self.directory_changed = True

    def copy(self):
        """A task: rewrite every file whose acknowledged records may not have reached the disk."""
        for file in sorted(self.unsynced, key=JournalFile.age):
            source = os.dup(file.fd) if file.fd is not None else os.open(
                file.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield from self._write_file(file, _pieces_of(source, file))
                yield self._sync_directory()
            finally:
                os.close(source)

    # -- repair

    def repair(self, file, start=0):
        """Cut what is damaged out of a file, from byte `start` on, and keep it in lost+found.

        In their place come records of items that have expired already, as many as may have
        been lost: each REMOVE of a lost item will take one of them, and not a good item.
        """
        if not os.path.getsize(file.path):   # which cannot be mapped
            self.size -= file.size
            file.size = 0
            return
        with open(file.path, "rb") as source, mmap.mmap(
                source.fileno(), 0, prot=mmap.PROT_READ) as data:
            cuts = list(find_damage(data, start))
            for begin, end, lost, why in cuts:
                log.warning(
                    "%s: %s at byte %d; %d bytes cut out%s and kept in %s", file.path, why,
                    begin, end - begin,
                    ", where %d items may have been," % lost if lost else "",
                    self._keep(file, data, begin, end))
            if len(cuts) == 1 and end == len(data) and not lost:      # a torn tail
                os.truncate(file.path, begin)
                self.size += begin - file.size
                file.size = begin
            elif cuts:
                self._write_file_now(file, self._good_pieces(data, cuts))
            else:                            # it has become longer
                self.size += len(data) - file.size
                file.size = len(data)

    def replace_missing(self, file, lost):
        """Put a file in the place of one that has disappeared. lost: for how many items of it,
        which are in memory, there will be REMOVEs."""
        self._write_file_now(file, [[_head(LOST, 0) * lost]])

    def _write_file_now(self, file, pieces):
        run_task(self._write_file(file, pieces))
        _raise(_fsync_directory(self.directory))

    @staticmethod
    def _good_pieces(data, cuts):
        done = 0
        for begin, end, lost, _ in cuts + [(len(data), len(data), 0, None)]:
            for offset in range(done, begin, _STEP_SIZE):
                yield [data[offset:min(begin, offset + _STEP_SIZE)]]
            yield [_head(LOST, 0) * lost]
            done = end

    def _keep(self, file, data, begin, end):
        directory = os.path.join(self.directory, "lost+found")
        os.makedirs(directory, 0o700, exist_ok=True)
        for serial in itertools.count():
            kept = os.path.join(directory, "%s.%d.%d" % (
                os.path.basename(file.path), begin, _now() + serial))
            with contextlib.suppress(FileExistsError), open(
                    kept, "xb", opener=_open_private) as target:
                _copy(data, begin, end, target)
                target.flush()
                os.fsync(target.fileno())
                return kept

    # -- the end

    def close(self):
        """Close the files."""
        for file in self.passed + self.files:
            self.budget.close(file)

    def delete(self):
        """Remove the files: all of them, or none. Return a task that finishes what can be
        finished later, or None. Raises OSError, and then nothing has changed.

        One file goes with one unlink. Several go with one rename, of an empty file that stands
        for all of them; what is left of them then is deleted now, or at the next start.
        """
        files = self.passed + self.files
        if len(files) == 1:
            fds = self._unlink(files[0])
            self.unsynced = {}
            return iter([functools.partial(_close_all, fds)]) if fds else None
        self._number_current()
        number = self.current.number
        pack = "%s.%d.pack" % (self.path, number)
        temporary, fd = self._open_temporary()
        os.close(fd)
        try:
            os.rename(temporary, pack)
        except OSError:
            _discard(temporary)
            raise
        self.passed = files + [JournalFile(pack, number)]
        self.files = []
        self.unsynced = {}
        return self.clear()

    def clear(self):
        """A task: delete what delete() has left, and at last the file that stands for it."""
        yield self._sync_directory()
        for file in self.passed[:-1]:
            yield from self._remove(file)
        yield self._sync_directory()
        yield from self._remove(self.passed[-1])


def _pieces_of(source, file):
    """Yield what counts of a file in pieces, read from a descriptor of it."""
    for offset in range(0, file.size, _STEP_SIZE):
        piece = os.pread(source, min(_STEP_SIZE, file.size - offset), offset)
        if len(piece) < min(_STEP_SIZE, file.size - offset):
            raise OSError(errno.EIO, "the file has become shorter", file.path)
        yield [piece]


def _opens_before(opens, ops):
    """Return the reads that were open before operations, of those that are open after them.

    Files are passed in the middle of a batch, and until it is written all of it may be undone;
    so what was open then is found by going backwards from the end.
    """
    opens = dict(opens)
    for opcode, item, xid in reversed(ops):
        if opcode == OPEN:
            del opens[xid]
        elif opcode in (CONFIRM, UNREMOVE):
            opens[xid] = item
    return dict(sorted(opens.items()))


class ReadBehind:
    """How far a journal has been read: the items that follow byte `offset` of `file`, but for
    the first `skip` of them, are not in memory."""

    def __init__(self, journal, file, offset, skip=0):
        self._journal = journal
        self.file = file
        self.offset = offset
        self.skip = skip

    def read(self, most, size):
        """Return the next items, at most `most` of them, from a piece of about `size` bytes of
        the journal; none at its end. Raises OSError, and Damage where `file` is damaged."""
        items = []
        while not items:
            data = b""
            left = self.file.size - self.offset if self.file.path else 0
            if left > 0:                     # what a failed write has left may follow
                fd = os.open(self.file.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    left = min(left, os.fstat(fd).st_size - self.offset)
                    data = os.pread(fd, min(size, max(0, left)), self.offset)
                finally:
                    os.close(fd)
            if not data:
                if not self._go_to_next_file():
                    break
            elif not self._take(data, left, most, items):
                self._take_large(data, left, items)
        return items

    def _take(self, data, left, most, items):
        """Take the items of a piece. Return whether there was a whole record in it."""
        done, skip, end = 0, self.skip, self.offset
        try:
            for _, _, item, done in read_records(io.BytesIO(data)):
                if item is not None and skip:
                    skip -= 1
                elif item is not None:
                    size = len(item.data)
                    item.place = Place(self.file, end + done - size, size)
                    items.append(item)
                    if len(items) == most:
                        break
        except Damage as damage:
            # The file was written whole: a record that ends beyond it is damaged.
            if not damage.torn or len(data) >= left:
                del items[:]
                raise
        self.skip = skip
        self.offset += done
        return done > 0

    def _take_large(self, data, left, items):
        """Take an item that is larger than a piece, without its data."""
        item, start, size = _parse_head(data) or (None, 0, left + 1)
        if start + size > left:
            raise Damage(self.offset, "record cut short", torn=True)
        if self.skip:
            self.skip -= 1
        else:
            item.place = Place(self.file, self.offset + start, size)
            items.append(item)
        self.offset += start + size

    def _go_to_next_file(self):
        """Go on with the file after this one, which may have been packed since; False if there
        is none."""
        last = self.file.number
        for file in self._journal.files:
            if last is not None and (file.number is None or file.number > last):
                self.file, self.offset = file, 0
                return True
        return False


# == 4. Queue =============================================================================
#
# One queue: items in order, open reads, waiters, limits, expiry, and the journal that records
# each change. Can be used alone. Knows no sockets, no protocols, no other queues: what expires
# is handed to its host, which is also told when there is something to write.


# What an item takes of the memory besides its data, in bytes: about that is what CPython 3.8
# to 3.13 were seen to need.
ITEM_COST = 200

# How much memory each queue may use though the server has reached max_memory, in bytes.
MEMORY_FLOOR = 1 << 18

# How much the memory of a queue may change before it is counted again, in bytes.
_MEMORY_STEP = 1 << 12

# What it costs to free an item, in bytes that could be freed instead.
_FREE_COST = 1 << 10

# How long a write that found no descriptors left is put off, in milliseconds.
_NO_DESCRIPTOR_MS = 50

# How long after a failure the next try is made without a client asking for it.
RETRY_MS = 1000

# How often the log says how far the loading of a queue has got.
_PROGRESS_SECONDS = 3


class Waiter:
    """A read that waits for an item. `deliver` is called once, with the item or None."""

    __slots__ = ("deliver", "open", "peek")

    def __init__(self, deliver, open=False, peek=False):
        self.deliver = deliver
        self.open = open
        self.peek = peek


class Alone:
    """The host of a queue that is used without a server: everything is done at once.

    A server has another one, with the same attributes:

    changed(queue)          there is something for queue.write() to do
    failed(queue, error)    operations of it have been undone
    start(task)             run a task
    work(call, done)        make a blocking call, then call done with its OSError or None
    later(ms, call)         make a call in that time; return what cancels it
    bury(queue, item, now)  an expired item is open, and is to be moved to another queue
    sweep_limit             how many expired items a read drops at once
    locks_files             whether to keep other processes out
    budget                  see Budget
    """

    later = bury = work = None
    sweep_limit = UNLIMITED
    locks_files = True

    def __init__(self):
        self.budget = Budget()

    def changed(self, queue):
        queue.write_now()

    def failed(self, queue, error):
        pass                                 # the caller gets the error

    def start(self, task):
        run_task(task)


class History:
    """The positions of a queue's operations, and who waits for them.

    Each operation has a position: its number in the history of the queue. `logged`, `written`
    and `durable` are the last positions in memory, handed to the kernel and fsynced. `safe` is
    the last one that may be acknowledged: with sync_journal = 0 what is durable, else what is
    written. Whoever must not act before a change is safe asks when_safe().
    """

    def __init__(self):
        self.safe = self.written = self.durable = 0
        self.ops = []                        # (opcode, item, xid) of what is not being written yet,
        self.unsafe = []                     # and of what is, but is not safe
        self._pending = collections.deque()  # (position, call) of when_safe()

    @property
    def logged(self):
        """The position of the last operation."""
        return self.safe + len(self.unsafe) + len(self.ops)

    def when_safe(self, call):
        """Make a call, with None, when all operations so far are safe; or, with an OSError,
        when they have been undone."""
        logged = self.safe + len(self.unsafe) + len(self.ops)
        if logged <= self.safe:
            call(None)
        else:
            self._pending.append((logged, call))

    def advance(self, position):
        """Note that all operations up to a position are safe."""
        if position > self.safe:
            del self.unsafe[:position - self.safe]
            self.safe = position

    def settle(self):
        """Make the calls that waited for what is safe now."""
        while self._pending and self._pending[0][0] <= self.safe:
            self._pending.popleft()[1](None)

    def go_back(self):
        """Give up the operations that are not safe, and return them. Their positions are
        skipped."""
        ops = self.unsafe + self.ops
        logged = self.logged
        if self.durable == self.safe:
            self.durable = logged
        self.safe = self.written = logged
        self.ops, self.unsafe = [], []
        return ops

    def tell(self, error):
        """Make the calls that waited for what has been undone."""
        pending, self._pending = self._pending, collections.deque()
        for _, call in pending:
            call(error)

    def forget(self):
        """Nothing is, or will be, on a disk of the operations so far: they are safe."""
        self.go_back()
        self.settle()


class Queue:
    """A durable FIFO queue.

    name: see check_name. path: the directory of its journal, None to keep it in memory
    only. config: a QueueConfig. older: numbers of its older journal files. host: see Alone.

    Every method that takes `now` (milliseconds of the epoch) reads the clock itself when
    it is None. Used alone, each change is in the kernel's hands when the method returns,
    and on the disk too if sync_journal is 0; a change that cannot be written is undone
    and raises OSError. A server collects the changes of a turn instead, and calls write().

    A failure undoes all operations that are not safe, see History, in memory and in the files.

    Past max_memory_size only the head of the queue is in memory; the rest is read from the
    journal as it drains:

        items (in memory) | on disk only | _fresh (on their way there)
    """

    def __init__(self, name, path=None, config=None, older=(), host=None, now=None):
        self.name = check_name(name)
        self.path = path
        self.host = host or Alone()
        self.items = collections.deque()     # what waits, the head first, as far as in memory
        self.opens = {}                      # xid -> item, the oldest open read first
        self.waiters = collections.OrderedDict()     # in order of coming; an ordered set
        self.count = 0                       # how many items wait; open reads do not count
        self.bytes = 0                       # data of the waiting items
        self.memory = 0                      # what `items` take, see ITEM_COST
        self.open_memory = 0                 # what `opens` take
        self.xid = 0                         # the last one used
        self.closed = False
        self.counters = Values(
            create_time=_now(now), age=0, total_items=0, expired_items=0, discarded=0,
            total_flushes=0, transactions=0, canceled_transactions=0, put_bytes=0, get_bytes=0,
            get_hits=0, get_misses=0, put_rate=0.0, get_rate=0.0, fsync_usec=0,
            journal_rewrites=0, journal_rotations=0)
        self.history = History()
        self._writing = None                 # the Plan that the worker writes
        self._failure = None                 # a failed fsync, to be seen to after that
        self._counted = 0                    # how much memory the server counts for this queue,
        self._allowance = 0                  # and how much it may use
        self._behind = None                  # the ReadBehind of what is not in memory
        self._fresh = collections.deque()    # items not written yet that are not in `items`
        self._loading = None                 # the head item that a worker reads, or (it, OSError)
        self._alarms = {}                    # xid -> (what cancels its timeout, the timeout)
        self._overdue = []                   # xids whose time is over
        self.journal = None
        self.upkeep = Upkeep(self)
        self.config = config or QueueConfig()
        self.count_memory()
        if path is not None and self.config.keep_journal:
            self.journal = self._new_journal(older)
            try:
                self._load()
                self.count_memory()
            except BaseException:
                self.journal.close()         # others may open it then
                raise

    def _new_journal(self, older):
        return Journal(self.path, self.name, older, self.host.budget, self.host.locks_files)

    def configure(self, config):
        """Go on with other settings."""
        keep_journal = self.config.keep_journal
        self.config = config
        self.count_memory()
        if self.path is None or config.keep_journal == keep_journal:
            return
        try:
            if config.keep_journal:
                self.history.forget()        # they are part of what is written first
                put_aside(self.path, self.name)
                self.journal = self._new_journal(())
                self.upkeep.renew()          # writes all that there is in memory
            else:
                self._give_up_journal()
        except OSError as error:
            log.error("keep_journal of %s: %s", self.name, error.strerror)
        self.config.keep_journal = self.journal is not None

    def _give_up_journal(self):
        if self._behind:
            log.warning("keep_journal of %s stays: the queue is larger than its memory; "
                        "reload when it has shrunk", self.name)
            return
        for item in itertools.chain(self.opens.values(), self.items):
            if item.data is None:
                self._load_data(item)
        task = self.journal.delete()
        self.upkeep.stop()
        self.history.forget()
        if task:
            self.host.start(self._clear(task, self.journal.path))
        self.journal = self._writing = self._failure = None

    # -- adding and taking

    def add(self, data, flags=0, expiry=0, now=None):
        """Append an item; False when the queue is full or the item too large for it.

        flags: 32 bits given back with the item. expiry: milliseconds of the epoch from
        which on it is not handed out any more, 0 for none. Raises OSError if memory is short.
        """
        config = self.config
        if now is None:
            now = _now()
        if type(data) is not bytes:
            data = bytes(memoryview(data))   # a TypeError for what is no bytes at all
        if (expiry or flags) and not (abs(expiry) < 1 << 63 and 0 <= flags < 1 << 32):
            raise ValueError("expiry %d or flags %d cannot be kept" % (expiry, flags))
        size = len(data)
        if size > config.max_item_size:
            return False
        cost = size + ITEM_COST
        if self.memory + self.open_memory + cost > self._allowance and self._behind is None:
            self._fall_behind(cost)
        if self.count >= config.max_items or self.bytes >= config.max_size:
            self.discard_expired(now, min(config.max_expire_sweep, self.host.sweep_limit))
            while self.count >= config.max_items or self.bytes >= config.max_size:
                if not config.discard_old_when_full or not self.count:
                    return False
                if self.items or self._refill():
                    self.counters.discarded += 1
                    self._log(REMOVE, self._pop(False))
        item = Item(data, now, expiry, flags if config.keep_flags else 0)
        if self._behind:
            self._fresh.append(item)
        else:
            self.items.append(item)
            self.memory += cost
        self.count += 1
        self.bytes += size
        counters = self.counters
        counters.total_items += 1
        counters.put_bytes += size
        self._log(ADDX, item)
        if self.waiters:
            self._serve(now)
        return True

    def remove(self, open=False, now=None):
        """Take the head item, or return None. `open`: only for a while; item.xid is then
        the number by which it is to be confirmed or aborted.

        With a server, None though there are items (`count`) means that many at the head have
        expired, or that the worker reads a large one: it is to be called again. Raises OSError
        when it cannot be read.
        """
        if now is None:
            now = _now()
        if not self.count or not (self.items or self._refill()):
            return None
        head = self.items[0]
        if ((head.expiry or self.config.max_age) and self._is_expired(head, now)
                and not self._sweep(now)):
            return None
        if head.data is None and self._is_loading(head):
            return None
        item = self._pop() if self._behind else self._take()
        counters = self.counters
        counters.age = now - item.add_time if now > item.add_time else 0
        counters.get_hits += 1
        counters.get_bytes += len(item.data)
        if open:
            counters.transactions += 1
            self._open(item)
        else:
            self._log(REMOVE, item)
        return item

    def peek(self, now=None):
        """Return the head item, which stays where it is, or None, as remove()."""
        now = _now(now)
        if not self.count or not (self.items or self._refill()):
            return None
        if self._is_expired(self.items[0], now) and not self._sweep(now):
            return None
        if self.items[0].data is None:
            self._load_data(self.items[0])
        return self.items[0]

    def _sweep(self, now):
        """Drop expired items before a read; return whether there is an item for it then."""
        self.discard_expired(now, self.host.sweep_limit)
        return (self.count and (self.items or self._refill())
                and not self._is_expired(self.items[0], now))

    def confirm(self, xid):
        """Finish an open read; False when there is none of that number."""
        item = self._end_read(xid)
        if item is None:
            return False
        self._log(CONFIRM, item, xid)
        if self._alarms and xid in self._alarms:
            self._silence_alarm(xid)
        return True

    def abort(self, *xids, now=None, orphaned=False):
        """Put open reads back at the head, the first one given in front of the others;
        return how many there were. `orphaned`: nobody waits to hear of it, so that it has
        to be done all the same after a failure."""
        known = [xid for xid in dict.fromkeys(xids) if xid in self.opens]
        for xid in reversed(known):
            item = self._end_read(xid)
            self._push(item)
            self.counters.canceled_transactions += 1
            self._log(UNREMOVE, item, xid)
            if xid in self._alarms:
                self._silence_alarm(xid)
        if known:
            if orphaned:
                self.history.when_safe(functools.partial(self._abort_again, known))
            if self.waiters:
                self._serve(_now(now))
        return len(known)

    def _abort_again(self, xids, error):
        if error and self.host.later:
            self.host.later(RETRY_MS, functools.partial(self.abort, *xids, orphaned=True))

    def flush(self):
        """Drop all waiting items. Open reads stay open."""
        self.counters.total_flushes += 1
        if self.count:
            held = self.items, self._fresh, self._behind, self.count, self.bytes, self.memory
            self._drop_items()
            self._log(FLUSH, held, held[3])
            self.history.when_safe(functools.partial(self._let_go, held[0], held[5]))

    def _let_go(self, items, memory, error=None):
        """Free the memory of items that are not needed any more: of many it takes long."""
        if not error and memory + _FREE_COST * len(items) > 4 * _STEP_SIZE:
            self.host.start(_free(items))

    def _drop_items(self):
        self.items, self._fresh, self._behind = collections.deque(), collections.deque(), None
        self.count = self.bytes = self.memory = 0

    def discard_expired(self, now=None, limit=None):
        """Take expired items from the head, at most `limit` (default: max_expire_sweep),
        and return how many there were."""
        now = _now(now)
        count = 0
        if limit is None:
            limit = self.config.max_expire_sweep
        moves = self.host.bury and self.config.expire_to_queue not in (None, self.name)
        while count < limit and self.count and (self.items or self._refill()) and (
                self._is_expired(self.items[0], now)):
            count += 1
            item = self._pop(moves)
            if moves and not is_lost(item):
                # Open until it is safe elsewhere, so that a crash cannot lose it.
                self._open(item)
                self._stop_alarm(item.xid)
                self.host.bury(self, item, now)
            else:
                self._log(REMOVE, item)
        self.counters.expired_items += count
        return count

    # -- waiting

    def wait(self, waiter):
        """Let `waiter` have the next item that comes, after those who wait already."""
        self.waiters[waiter] = None

    def cancel(self, waiter):
        """The waiter does not want an item any more; it is not called."""
        self.waiters.pop(waiter, None)

    def dismiss_waiters(self):
        """Tell every waiter that nothing will come."""
        while self.waiters:
            self.waiters.popitem(last=False)[0].deliver(None)

    def _serve(self, now):
        while self.waiters:
            waiter = next(iter(self.waiters))
            try:
                item = self.peek(now) if waiter.peek else self.remove(waiter.open, now)
            except OSError as error:         # while reading behind: they wait on
                log.error("%s: cannot be read: %s", self.journal.path, error.strerror)
                if self.host.later:
                    self.host.later(RETRY_MS, self.recover)
                return
            if item is not None:
                del self.waiters[waiter]
                waiter.deliver(item)
            elif self.count and self.host.later and not self._loading:
                self.host.later(0, self.recover)       # after a run of expired ones
                return
            elif not self.count or self._loading:
                return

    # -- the journal

    def write(self):
        """Hand the operations so far to the kernel.

        A large batch is handed to the worker, if there is one, and what comes after it waits.
        Raises OSError when that fails; all operations that are not safe have been undone then.
        """
        journal = self.journal
        if self.closed or self._writing:
            return                           # _wrote() comes back here
        if not -_MEMORY_STEP < self.memory + self.open_memory - self._counted < _MEMORY_STEP:
            self.count_memory()
        if journal is None:
            if self.config.enable_trace:
                self._trace(self.history.ops)
            self.history.forget()
            return
        upkeep = self.upkeep
        if upkeep.renewing is not None and not upkeep.can_write():
            return                           # it comes back here at its end
        ops = self.history.ops
        plan = None
        try:
            if upkeep.renewing is not None:
                raise upkeep.error
            if journal.torn:
                journal.cut()
            if not ops:
                upkeep.check()
                return
            plan = journal.plan(ops, self.count, self.opens)
            if plan.size >= _LARGE and self.host.work:
                call = journal.write_call(plan)
            else:
                call = None
                journal.write(plan)
        except (OSError, MemoryError, Damage) as error:
            if isinstance(error, Damage):
                error = self._size_changed(error.file)
            if isinstance(error, MemoryError):
                error = OSError(errno.ENOMEM, "out of memory", journal.path)
            if not error or is_short_of_descriptors(error) and self.host.work:
                self.host.later(_NO_DESCRIPTOR_MS, functools.partial(self.host.changed, self))
                return
            raise self._go_back(error, plan is not None) from None
        if self.config.enable_trace:
            self._trace(ops)
        history = self.history
        position = history.safe + len(history.unsafe) + len(ops)
        history.ops = []
        if call:
            history.unsafe += ops
            self._writing = plan
            self.host.work(call, functools.partial(
                self._wrote, journal, plan, position, self._fresh, len(self._fresh)))
            return
        if self.config.sync_journal == 0 or history.unsafe:
            history.unsafe += ops
        else:
            history.safe = position          # as a rule
        self._fresh.clear()
        self._commit(plan, position)

    def _commit(self, plan, position):
        """Make a batch that has been written count."""
        history = self.history
        history.written = position
        if self.config.sync_journal != 0 and history.unsafe:
            history.advance(position)
            self.journal.forget(position)
        self.journal.commit(plan, position, history.safe >= position)
        history.settle()
        self.upkeep.check()

    def _wrote(self, journal, plan, position, fresh, count, error):
        """The worker has written a plan, or failed."""
        if self.closed or self.journal is not journal:
            return                           # a reload has taken it away
        self._writing = None
        failure, self._failure = self._failure, None
        if error:
            self.journal.tear(plan)
            self._go_back(error, True)
        else:
            if fresh is self._fresh:         # else they have been flushed or read since
                for _ in range(count):
                    fresh.popleft()
            self._commit(plan, position)
        if failure:
            self.sync_failed(*failure)
        self.host.changed(self)

    def begin_sync(self):
        """Return the call that fsyncs what has been written, and the Sync to pass on to
        synced() then, or to sync_failed(). Raises OSError."""
        return self.journal.begin_sync(self.history.written)

    def needs_sync(self):
        """Return whether there is something that begin_sync() could begin."""
        return (self.journal is not None and self.upkeep.renewing is None
                and self.journal.needs_sync())

    def synced(self, sync):
        """An fsync has been done."""
        if self.journal is None or self.upkeep.renewing is not None:
            return                           # a reload has taken it away, or it is out of date
        history = self.history
        history.durable = max(history.durable, sync.position)
        history.advance(sync.position)
        self.journal.forget(history.safe)
        history.settle()
        if not self.closed:
            self.upkeep.check()

    def sync_failed(self, sync, error):
        """An fsync has failed, or could not begin: undo what waits for it. What has been
        acknowledged and may be lost by now is written anew. sync: None if it did not begin."""
        history = self.history
        if self.journal is None:
            return
        if self.closed:
            if sync is None or sync.position > history.safe:     # of the removal
                history.go_back()
                history.tell(Unclear(error.errno, error.strerror, error.filename))
            return
        if sync:
            self.journal.sync_failed(sync)
        if self._writing:                    # the worker would write behind what is cut
            self._failure = sync, error
            return
        is_doubtful = history.durable < history.safe
        self._go_back(error)
        if is_doubtful and self.upkeep.renewing is None:
            self.upkeep.renew()

    def _go_back(self, error, was_written=False):
        """Undo all operations that are not safe. Return the error to report, Unclear if the files
        may still contain them. was_written: whether any may have reached the files."""
        was_written = was_written or bool(self.history.unsafe)
        safe = self.history.safe
        self._undo(self.history.go_back())
        self.journal.go_back(safe)
        error = type(error)(error.errno, error.strerror, error.filename or self.journal.path)
        if error.errno == errno.ESTALE:      # what is in a file without a name does not matter
            if self.upkeep.renewing is None:
                log.error("%s: %s; the queue is written anew", error.filename, error.strerror)
                self.upkeep.renew()
        elif was_written:
            try:
                self.journal.cut()
            except OSError as failure:
                log.error("%s: cannot be cut back: %s", self.journal.path, failure.strerror)
                error = Unclear(error.errno, error.strerror, error.filename)
        self.host.failed(self, error)
        self.history.tell(error)
        return error

    def pack(self):
        """Write what the queue holds as one minimal file in place of all its files, at once.
        For a queue that is used alone. Raises OSError."""
        if self._behind:
            raise OSError(errno.ENOMEM, "larger than max_memory_size", self.journal.path)
        run_task(self.upkeep.rewrite())
        passing = self.journal.next_passing(self.history.safe)
        if passing:
            run_task(self.journal.pack(passing, self.xid))
        self.journal.adopt_pack()

    def recover(self, now=None):
        """After a failure: do what is still to be done and give waiters their items."""
        if not self.closed:
            if self.journal and self.journal.torn:
                self.host.changed(self)
            self._serve(_now(now))

    def close(self):
        """Write and fsync what has changed, and close the journal. Raises OSError."""
        if self.closed:
            return
        self.dismiss_waiters()
        try:
            if self.journal:
                self.write()
                self.upkeep.finish()
                try:
                    self.sync_now()
                except OSError:
                    if self.upkeep.renewing is None:
                        raise
                    self.upkeep.finish()
        finally:
            self.closed = True
            self.upkeep.stop()
            if self.journal:
                self.journal.close()

    def delete(self):
        """Forget all items and remove the files. Raises OSError, and then nothing has changed."""
        task = self.journal.delete() if self.journal else None
        self.closed = True
        self.upkeep.stop()
        self.upkeep.renewing = None
        self._let_go(self.items, self.memory)
        self._drop_items()
        for xid in list(self.opens):
            self._end_read(xid)
        for xid in list(self._alarms):
            self._stop_alarm(xid)
        self.count_memory()
        self.history.forget()
        self.dismiss_waiters()
        if task:
            self.host.start(self._clear(task, self.journal.path))
        if self.journal and self.config.sync_journal == 0:
            self.history.unsafe = [None]     # stands for the removal, until it is durable
            self.history.written = self.history.logged
            self.journal.directory_changed = True
            if self.host.work:
                self.host.changed(self)
            else:
                self.sync_now()

    @staticmethod
    def _clear(task, path):
        try:
            yield from task
        except OSError as error:
            log.error("%s: what is left of it is deleted later: %s", path, error.strerror)

    def write_now(self):
        """Write what has changed, and fsync it if sync_journal is 0. Raises OSError."""
        if self.closed:
            self.history.ops = []
            raise ValueError("the queue %s is closed" % self.name)
        self.write()
        if self.config.sync_journal == 0:
            self.sync_now()

    def sync_now(self):
        """fsync what has been written, at once. Raises OSError."""
        sync = None
        try:
            if not self.needs_sync():
                return
            call, sync = self.begin_sync()
            _raise(call())
        except OSError as error:
            self.sync_failed(sync, error)
            raise
        self.synced(sync)

    def _load(self):
        """Read the journal, as often as it takes to repair it."""
        while True:
            file = None
            try:
                for file in self._replay():
                    pass
                return
            except Damage:
                self.journal.repair(file)
                self._drop_items()
                self.opens.clear()
                self.xid = 0

    def _replay(self):
        """Do what the journal says; yield each file before it is read. Raises Damage."""
        opens = self.opens
        journal = self.journal
        ignored = 0
        added = []                      # how many items each file adds
        last_head = 0                   # the last file that does something to the head
        told = time.monotonic()
        done = 0                        # bytes of the files before this one
        records = 0
        for number, file in enumerate(journal.files):
            yield file
            added.append(0)
            offset = 0
            for opcode, xid, item, end in journal.read(file):
                records += 1
                if not records % 10000 and time.monotonic() > told + _PROGRESS_SECONDS:
                    told = time.monotonic()
                    log.info("loading %s: %d %%, %d items", self.name,
                             100 * (done + offset) // journal.size, self.count)
                if item is not None:
                    added[-1] += 1
                    if opcode == CONTINUE:
                        last_head = number
                        ignored += opens.pop(xid, None) is None
                    elif opcode == ADD_XID:
                        item.xid = xid       # that the OPEN_NEXT of it will have
                    self._append(item, file, offset)
                    offset = end
                    continue
                offset = end
                last_head = number
                if opcode == REMOVE and self.count:
                    self._replay_pop()
                elif opcode == OPEN and self.count:
                    opens[xid] = self._replay_pop()
                    self.xid = xid
                elif opcode == OPEN_NEXT and self.count:
                    item = self._replay_pop()
                    xid = item.xid or self._next_xid()
                    opens[xid] = item
                    self.xid = xid
                elif opcode == CONFIRM and xid in opens:
                    del opens[xid]
                elif opcode == UNREMOVE and xid in opens:
                    self._push(opens.pop(xid))
                elif opcode == SAVE_XID:
                    self.xid = xid
                else:
                    ignored += 1
            done += file.size
        if ignored:
            log.warning("%s: %d operations on items that are not there, ignored",
                        journal.path, ignored)
        journal.account(added, last_head, self.count)
        self.open_memory = sum(map(_cost, opens.values()))
        self.abort(*opens, orphaned=True)
        self.counters.canceled_transactions = 0

    def _replay_pop(self):
        """Take the head item, whose data may have to be read again."""
        if not self.items:
            self._read_more(self.count)
        return self._take()

    def _append(self, item, file, offset):
        """Append an item that stands at `offset` of a file of the journal."""
        cost = len(item.data) + ITEM_COST
        if self._behind is None and self.memory + cost > self._allowance and (
                self.items or self._allowance < self.config.max_memory_size):
            self._behind = ReadBehind(self.journal, file, offset)
        if self._behind is None:
            self.items.append(item)
            self.memory += cost
        self.count += 1
        self.bytes += len(item.data)

    # -- memory

    def count_memory(self):
        """Update the server's count of memory and the allowance of this queue, which stays as it
        is until the next call, as a rule for a turn."""
        budget = self.host.budget
        used = self.memory + self.open_memory
        budget.memory += used - self._counted
        self._counted = used
        self._allowance = self.config.max_memory_size
        left = used + budget.most_memory - budget.memory
        if left < self._allowance:
            self._allowance = min(self._allowance, max(left, MEMORY_FLOOR))

    def check_memory(self, size):
        """Raise OSError if the server has no memory left for an item of so many bytes, and it
        cannot be left in a journal."""
        if not self.journal:
            self.count_memory()
            cost = self.memory + self.open_memory + size + ITEM_COST
            if self._allowance < cost and self._allowance < self.config.max_memory_size:
                raise OSError(errno.ENOMEM, "out of memory", self.name)

    def _fall_behind(self, cost):
        """From here on leave items in the journal, if memory is used up for an item of that
        cost. Raises OSError if there is no journal and the server has no memory left."""
        self.check_memory(cost - ITEM_COST)
        self.count_memory()
        if self.journal and self.upkeep.renewing is None and (
                self.memory + self.open_memory + cost > self._allowance) and (
                self.items or self._allowance < self.config.max_memory_size):
            journal = self.journal
            history = self.history
            pending = sum(op[0] == ADDX for op in history.ops)     # written behind what is there
            if self._writing:
                pending += sum(
                    op[0] == ADDX for op in history.unsafe[history.written - history.safe:])
            self._behind = ReadBehind(journal, journal.current, journal.current.size, pending)

    def _refill(self):
        """Read more of the items that are not in memory. Return whether there are any in
        memory then. Raises OSError."""
        unread = self.count - len(self.items) - len(self._fresh)
        while unread > 0:
            file = self._behind.file
            try:
                found = self._read_more(unread)
            except Damage:
                self._mend(self._behind.file)
            except FileNotFoundError as error:
                self._mend_missing(error)
            else:
                if self._behind.file is not file or not found:
                    self._check_count(file, unread, found)
                if found:
                    break
            unread = self.count - len(self.items) - len(self._fresh)
        if self._behind and self.count == len(self.items) + len(self._fresh):
            self._catch_up()
        return bool(self.items)

    def _read_more(self, unread):
        """Read some of the items that are not in memory, and return how many. Raises OSError
        and Damage."""
        self.count_memory()
        # A quarter for the items, another for their data; the first half is still there.
        room = self._allowance // 4
        items = self._behind.read(min(unread, max(1, room // ITEM_COST)),
                                  max(4096, min(_STEP_SIZE, room)))
        self.items.extend(items)
        self.memory += sum(map(_cost, items))
        return len(items)

    def _catch_up(self):
        """All that waits is in memory again."""
        # If items were lost to damage on the way, nobody could tell how large they had been.
        self.bytes = sum(len(item.data) if item.data is not None else item.place.size
                         for item in itertools.chain(self.items, self._fresh))
        self.items.extend(self._fresh)
        self.memory += sum(map(_cost, self._fresh))
        self._fresh = collections.deque()
        self._behind = None

    def _size_changed(self, file):
        """Mend a file that has another size than it should have, or have everything written
        anew. Return the error to be told, None if there is none."""
        if not self._behind:
            return OSError(errno.ESTALE, "changed by somebody else", file.path)
        try:
            self._mend(file)
        except (OSError, MemoryError) as error:
            return error
        return None

    def _mend(self, file):
        """Repair a file while the queue is behind. Raises OSError."""
        behind, files = self._behind, self.journal.files
        if self._writing and file in self._writing.waiting or self.upkeep.renewing is not None:
            raise OSError(errno.EAGAIN, "damaged, and repaired in a moment", file.path)
        self.journal.cut()                   # what was refused must not be found again
        start = behind.offset if file is behind.file else 0
        for item in itertools.chain(self.opens.values(), self.items):
            if item.place and item.place.file is file and item.place.offset >= start:
                if item.data is None:        # its offset will change
                    self._load_data(item)
                item.place = None
        size = file.size
        self.journal.repair(file, start)
        lost = 0
        if file is behind.file or behind.file not in files[files.index(file):]:
            with open(file.path, "rb") as source, contextlib.suppress(Damage):
                source.seek(start)
                there = 0
                for _, _, item, _ in read_records(source):
                    there += item is not None
            lost = (self._unread_of(file) + behind.skip if file is behind.file
                    else file.waiting) - there
            self._lose(file, lost)
        for write in self.journal.writes:    # what is not safe is behind what is damaged
            write.before[:] = [
                (one, old + file.size - size, waiting - lost) if one is file
                else (one, old, waiting) for one, old, waiting in write.before]

    def _mend_missing(self, error):
        """The file that is to be read behind has disappeared: go on without it. Raises OSError."""
        file = self._behind.file
        lost = self._unread_of(file)
        log.error("%s: %s; %d items are lost", file.path, error.strerror, lost)
        self.journal.replace_missing(file, max(0, file.waiting - lost))
        self._behind.offset = file.size
        self._lose(file, lost)

    def _check_count(self, file, unread, found):
        """A file has been read to its end: correct the counts if it had more or fewer items
        than it should have had, since somebody else has changed it."""
        files = self.journal.files
        new = self._behind.file
        if found and new is files[0]:
            return                           # the file was passed, so that its count was right
        after = files[files.index(new):] if found else []
        lost = unread - sum(other.waiting for other in after)
        if lost:
            log.error("%s: %d items are missing", self.journal.path, lost)
            between = files[files.index(file) + 1 if file in files else 0:files.index(new)]
            if not found and new is not file:
                between.append(new)
            for other in between:            # nothing at all was found in these
                lost -= other.waiting
                self._lose(other, other.waiting)
            self._lose(file, lost)

    def _unread_of(self, file):
        """Return how many of the unread items should be in this file, not in those after it."""
        unread = self.count - len(self.items) - len(self._fresh)
        files = self.journal.files
        after = files[files.index(file) + 1:] if file in files else files
        return unread - sum(other.waiting for other in after)

    def _lose(self, file, count):
        """Count items that are lost from a file. How large they were is not known for now."""
        self.bytes -= self.bytes * count // (self.count or 1)
        self.count -= count
        file.waiting -= count

    def _is_loading(self, head):
        """Give the head item, a stub, its data back; True if a worker is at it. Raises OSError."""
        loading, self._loading = self._loading, None
        if isinstance(loading, tuple) and loading[0] is head:
            raise loading[1]
        if head.place.size < _LARGE or not self.host.work:
            self._load_data(head)
            return False
        self._loading = head
        if loading is not head:
            loaded = head.stub()
            self.host.work(self.journal.load_call(loaded),
                           functools.partial(self._loaded, head, loaded))
        return True

    def _loaded(self, head, loaded, error):
        if self._loading is head:
            self._loading = (head, error) if error else None
            if not error and self.items and self.items[0] is head and head.data is None:
                head.data = loaded.data
                self.memory += len(head.data)
            self.host.later(0, self.recover)

    def _load_data(self, item):
        """Read the data of a stub among `items` or `opens` again. Raises OSError."""
        self.journal.load_call(item)()
        if self.opens.get(item.xid) is item:
            self.open_memory += len(item.data)
        else:
            self.memory += len(item.data)

    # -- single steps

    def _pop(self, load=True):
        """Take the head item, of which there is one in memory. Raises OSError."""
        if self._behind and self.memory <= self._allowance // 2:
            self._refill()
        if self.items[0].data is None and load:
            self._load_data(self.items[0])
        return self._take()

    def _take(self):
        item = self.items.popleft()
        self.count -= 1
        size = len(item.data) if item.data is not None else item.place.size
        self.bytes -= size
        self.memory -= ITEM_COST if item.data is None else size + ITEM_COST
        return item

    def _push(self, item):
        self.items.appendleft(item)
        self.count += 1
        self.bytes += item.place.size if item.data is None else len(item.data)
        self.memory += _cost(item)

    def _is_expired(self, item, now):
        if item.expiry and item.expiry <= now:
            return True
        max_age = self.config.max_age
        return bool(max_age) and item.add_time + max_age <= now

    def _next_xid(self):
        xid = self.xid
        while True:
            xid = xid + 1 if xid < 0x7fffffff else 1
            if xid not in self.opens:
                return xid

    def _open(self, item):
        self.xid = item.xid = xid = self._next_xid()
        kept = item
        if item.place and self.memory + self.open_memory > self._allowance:
            kept = item.stub()               # it can be read again if it comes back
        self.opens[xid] = kept
        self.open_memory += _cost(kept)
        if self.config.open_transaction_timeout:
            self._start_alarm(xid, self.config.open_transaction_timeout)
        self._log(OPEN, kept, xid)

    def _end_read(self, xid):
        """Take an item out of `opens`, and return it; None if there is none of that number."""
        item = self.opens.pop(xid, None)
        if item is not None:
            self.open_memory -= _cost(item)
        return item

    def limit(self, xid, timeout):
        """Have an open read aborted in so many milliseconds, whatever the settings say."""
        self._stop_alarm(xid)
        self._start_alarm(xid, timeout)

    def _start_alarm(self, xid, timeout):
        if timeout and self.host.later:
            cancel = self.host.later(timeout, functools.partial(self._time_out, xid, timeout // 10))
            self._alarms[xid] = cancel, timeout

    def _stop_alarm(self, xid):
        cancel, _ = self._alarms.pop(xid, (None, 0))
        if cancel:
            cancel()

    def _silence_alarm(self, xid):
        """An open read has ended: stop its alarm, but keep its timeout until that is safe."""
        self._alarms[xid][0]()
        self.history.when_safe(lambda error: error or self._alarms.pop(xid, None))

    def _time_out(self, xid, delay):
        # Those that time out soon after go back together with it, to be in their order.
        self._overdue.append(xid)
        if len(self._overdue) == 1:
            self.host.later(delay, self._abort_overdue)

    def _abort_overdue(self):
        overdue, self._overdue = self._overdue, []
        self.abort(*overdue, orphaned=True)

    def _log(self, opcode, item, xid=0):
        ops = self.history.ops
        ops.append((opcode, item, xid))
        if len(ops) == 1:
            self.host.changed(self)

    def _trace(self, ops):
        for opcode, item, xid in ops:
            trace.info("queue %s: %s%s", self.name, OPCODE_NAMES.get(opcode, "FLUSH"),
                       " %d items" % xid if opcode == FLUSH
                       else " xid=%d" % xid if xid else " %d bytes" % len(item.data or b""))

    def _undo(self, ops):
        for opcode, item, xid in reversed(ops):
            if opcode == ADDX:
                if self._fresh:
                    self._fresh.pop()
                elif self.count == len(self.items):
                    self.memory -= _cost(self.items.pop())
                self.count -= 1
                self.bytes -= len(item.data)
                self.counters.total_items -= 1
                self.counters.put_bytes -= len(item.data)
            elif opcode == REMOVE:
                self._push(item)
            elif opcode == OPEN:
                self._push(self._end_read(xid))
                self._stop_alarm(xid)
            elif opcode in (UNREMOVE, CONFIRM):
                self.opens[xid] = self._take() if opcode == UNREMOVE else item
                self.open_memory += _cost(self.opens[xid])
                self._start_alarm(xid, self._alarms.get(xid, (None, 0))[1])
            else:
                (self.items, self._fresh, self._behind, self.count, self.bytes,
                 self.memory) = item
        if self._behind and self.count == len(self.items) + len(self._fresh):
            self._catch_up()
        self.opens = dict(sorted(self.opens.items()))      # the oldest first, as before

    def stats(self, now=None):
        """Return what there is to know of it, as (name, value) pairs: those under Kestrel's
        names, then what is new here. Ages are milliseconds, rates items a second."""
        now = _now(now)
        counters = self.counters
        return [
            ("items", self.count),
            ("bytes", self.bytes),
            ("total_items", counters.total_items),
            ("logsize", self.journal.size if self.journal else 0),
            ("expired_items", counters.expired_items),
            ("mem_items", len(self.items)),
            ("mem_bytes", self.memory - ITEM_COST * len(self.items)),
            ("age", counters.age if self.count else 0),
            ("discarded", counters.discarded),
            ("waiters", len(self.waiters)),
            ("open_transactions", len(self.opens)),
            ("transactions", counters.transactions),
            ("canceled_transactions", counters.canceled_transactions),
            ("total_flushes", counters.total_flushes),
            ("journal_rewrites", counters.journal_rewrites),
            ("journal_rotations", counters.journal_rotations),
            ("create_time", counters.create_time),
            ("head_age", max(0, now - self.items[0].add_time) if self.items else 0),
            ("put_bytes", counters.put_bytes),
            ("get_bytes", counters.get_bytes),
            ("get_hits", counters.get_hits),
            ("get_misses", counters.get_misses),
            ("put_rate", round(counters.put_rate, 1)),
            ("get_rate", round(counters.get_rate, 1)),
            ("fsync_usec", counters.fsync_usec),
        ]


def _free(items):
    """A task: take all items out of a deque, a few megabytes in each step."""
    while items:
        size = 0
        while items and size < 4 * _STEP_SIZE:
            size += _cost(items.popleft()) + _FREE_COST
        yield None


def _cost(item):
    """Return what an item takes of the memory."""
    return ITEM_COST + (0 if item.data is None else len(item.data))


class Upkeep:
    """Keeps the journal of a queue small, and writes it anew after a failed fsync: one task
    at a time.

    error: what ended the last task; it is tried again in a while. renewing: None, or the (open
    reads, items) of a journal that has to be written anew before anything else is written to
    it; () if the queue is behind, so that its files have to be copied.
    """

    def __init__(self, queue):
        self.queue = queue
        self.task = None
        self.error = None
        self.renewing = None
        self._rewrite_above = 0              # smaller journals are not rewritten for now

    def can_write(self):
        """Return whether write() may go on. While everything is written anew operations wait; if
        that has failed, write() goes on and refuses them."""
        if self.error and not self.queue.host.later:
            self.check()                     # without a server it is tried now
        return self.renewing is None or self.error is not None

    def check(self):
        """Begin what there is to do, unless something is being done."""
        if self.task is None and (self.error is None or not self.queue.host.later):
            self._begin()

    def _begin(self):
        task = self._choose()
        if task:
            self.task = self._attend(task)
            self.queue.host.start(self.task)

    def _choose(self):
        queue = self.queue
        journal = queue.journal
        config = queue.config
        if queue.count and journal.size <= config.max_memory_size and not journal.passings and (
                self.renewing is None and journal.size <= config.max_journal_size):
            return None                      # as a rule
        if self.renewing is not None:
            return self._renew()
        if journal.passings:
            passing = journal.next_passing(queue.history.safe)
            if passing:
                return journal.pack(passing, queue.xid)
        if queue.count or queue.opens:
            if journal.current.size > config.max_memory_size:
                return self._rotate()
            if journal.size > config.max_journal_size and not queue._behind and (
                    journal.size > self._rewrite_above and not journal.passings):
                return self._compact()
        elif journal.size and journal.size >= config.default_journal_size and not journal.passings:
            return self.rewrite()
        return None

    def _attend(self, task):
        """A task: the one given, and what follows from it."""
        try:
            yield from task
        except OSError as error:
            self._failed(error)
            return
        except Exception as error:
            if not isinstance(error, MemoryError):
                log.exception("unexpected, while a journal was rewritten")
            self._failed(OSError(errno.ENOMEM, "out of memory or unexpected, see the log"))
            return
        self.task = self.error = None
        self.check()

    def _failed(self, error):
        if self.error is None:
            log.error("%s: not rewritten: %s", self.queue.journal.path, error.strerror)
        self.task = None
        self.error = _bare(error)
        if self.queue.host.later:
            self.queue.host.later(RETRY_MS, self._try_again)
        if self.queue.history.ops:
            self.queue.host.changed(self.queue)        # they are refused

    def _try_again(self):
        if self.error and not self.task and not self.queue.closed and self.queue.journal:
            self._begin()
            if not self.task:
                self.error = None

    def _rotate(self):
        """A task: go on with a fresh current file."""
        yield from self._open_fresh()
        self.queue.counters.journal_rotations += 1

    def _open_fresh(self):
        queue = self.queue
        yield from queue.journal.retire_current()
        while self.renewing is None and (queue.history.ops or queue._writing):
            yield None                       # until memory is what is in the files
        queue.journal.add_current(os.O_EXCL)

    def rewrite(self):
        """A task: write all that there is anew, in place of all files there are now."""
        queue = self.queue
        yield from self._open_fresh()
        history = queue.history
        if queue._behind is None:
            queue.journal.pass_all(history.written, history.safe >= history.written,
                                   dict(queue.opens), list(queue.items))

    def _compact(self):
        """A task: rewrite a journal that has grown too large, at most once in
        min_journal_compact_delay, or, without a server, once for each doubling."""
        queue = self.queue
        yield from self.rewrite()
        queue.counters.journal_rewrites += 1
        if queue.host.later:
            self._rewrite_above = UNLIMITED
            queue.host.later(queue.config.min_journal_compact_delay, self._allow_rewrites)
        else:
            self._rewrite_above = 2 * (queue.memory + queue.open_memory)

    def _allow_rewrites(self):
        self._rewrite_above = 0

    def renew(self):
        """Have everything written anew before anything else is written: what is in the files
        may not be on the disk, or not be what is in memory. No operation may be unwritten."""
        self.stop()
        queue = self.queue
        self.renewing = () if queue._behind else (dict(queue.opens), list(queue.items))
        queue.counters.journal_rewrites += 1
        self.check()

    def _renew(self):
        queue = self.queue
        journal = queue.journal
        if self.renewing:
            if not journal.has_fresh_current():
                yield from self._open_fresh()
            journal.passings.clear()         # of an earlier try
            journal.pass_all(queue.history.written, True, *self.renewing)
            yield from journal.pack(journal.passings[-1], queue.xid)
            journal.torn.clear()
            journal.unsynced.clear()
        else:
            yield from journal.copy()
        queue.history.durable = queue.history.written
        self.renewing = None
        if queue.history.ops:
            queue.host.changed(queue)
        queue.recover()

    def finish(self):
        """Do at once what has to be done before the journal may be closed. Raises OSError."""
        if self.renewing is not None:
            self.stop()
            run_task(self._renew())

    def stop(self):
        """Give up the task."""
        task, self.task = self.task, None
        self.error = None
        if task and not task.gi_running:
            task.close()


# == 5. Broker ============================================================================
#
# All queues by name: which queues a name leads to (fanout children, aliases), where
# expired items go, status, counters. Whatever a client can ask for, in any protocol, is
# asked of the broker. Knows queues and the configuration; no sockets, no protocols.

# Where the items put under a name go: `targets` decide the answer, `copies` are the fanout
# children, which get what they can take; `queues` are both.
Route = collections.namedtuple("Route", "targets copies queues")

# How many items or queues a long job looks at before other work gets its turn.
SWEEP_STEP = 1000

# How long a host whose password was wrong has to wait for the next try, how many of one host may
# wait, and the password of somebody unknown, which takes as long to find wrong as any.
_LOGIN_REST_MS = 1000
_LOGINS = 100
_NOBODY = "pbkdf2$200000$%032d$%064d" % (0, 0)

# How often rates are taken, in seconds, and how many of the last samples are kept of a queue.
SAMPLE_SECONDS = 5
SAMPLES = 120


class Histogram:
    """How often whole numbers of each size were seen: bucket n counts those of n bits."""

    def __init__(self):
        self.buckets = [0] * 128             # no time is longer
        self.total = self.longest = self.recent = 0     # recent: the longest since the last asking

    def add(self, value):
        self.buckets[value.bit_length()] += 1
        self.total += value
        if value > self.recent:
            self.recent = value
            self.longest = max(self.longest, value)

    def take_recent(self):
        """The longest since this was asked last."""
        recent, self.recent = self.recent, 0
        return recent

    def figures(self):
        """Under the names that Kestrel's metrics had. Percentiles are within a factor of two:
        that far apart are the buckets."""
        count = sum(self.buckets)
        figures = {"count": count, "sum": self.total, "maximum": self.longest,
                   "average": round(self.total / count, 1) if count else 0}
        seen = 0
        shares = [("minimum", 0), ("p50", .5), ("p90", .9), ("p95", .95), ("p99", .99),
                  ("p999", .999), ("p9999", .9999)]
        for bits, number in enumerate(self.buckets):
            seen += number
            while shares and seen > count * shares[0][1]:
                figures[shares.pop(0)[0]] = min((1 << bits) - 1, self.longest)
        return {**dict.fromkeys([name for name, _ in shares], 0), **figures}


class Logins:
    """Who is who: checks names and passwords, aside from the loop, those of a host one after the
    other, and in a second only one that is wrong.

    To check a password takes long; one that has been right is known again at once.
    """

    def __init__(self, broker):
        self._broker = broker
        self._key = os.urandom(32)
        self._known = set()              # keyed digests of what has been right
        self._lines = {}                 # host -> deque of (session, name, password) that wait

    def check(self, session, name, password):
        """Have the session told, by identify(), who it is; name and password are bytes."""
        line = self._lines.get(session.host)
        if self._digest(name, password) in self._known:
            session.identify(os.fsdecode(name))
        elif line is None:
            self._lines[session.host] = collections.deque([(session, name, password)])
            self._go_on(session.host)
        elif len(line) < _LOGINS:
            line.append((session, name, password))
        else:
            session.identify(None)

    def _stored(self, name):
        return self._broker.config.users.get(os.fsdecode(name), _NOBODY)

    def _digest(self, name, password):
        stored = self._stored(name)      # so that one that has been changed is not known any more
        return hmac.new(self._key, b"%b %b" % (stored.encode(), password), "sha256").digest()

    def _go_on(self, host):
        """Check who comes next at a host."""
        line = self._lines[host]
        while line and line[0][0].closing:             # gone
            line.popleft()
        if not line:
            del self._lines[host]
            return
        _, name, password = line[0]
        digest, stored = self._digest(name, password), self._stored(name)
        if digest in self._known:
            self._finish(host, digest)
        else:
            self._broker.aside(functools.partial(self._learn, digest, password, stored),
                               lambda error, seconds: self._finish(host, digest))

    def _learn(self, digest, password, stored):
        if is_password(password, stored):
            self._known.add(digest)

    def _finish(self, host, digest):
        session, name, _ = self._lines[host].popleft()
        is_right = digest in self._known
        session.identify(os.fsdecode(name) if is_right else None)
        if is_right:
            self._broker.later(0, functools.partial(self._go_on, host))
        else:
            # Not any name: with a client that has not logged in that is what it wants to put.
            log.warning("%s: wrong password for %s", host, os.fsdecode(name)
                        if self._stored(name) != _NOBODY else "somebody unknown")
            self._broker.later(_LOGIN_REST_MS, functools.partial(self._go_on, host))


class Broker:
    """All queues of a server.

    config: a Config; the spool is its queue_path. later: see Queue. Loads every queue of
    the spool; raises OSError when the spool cannot be read.

    It is the host of its queues, see Alone. After each turn write() writes what has changed.
    `stats` holds the server's counters, `stopping` is set by whoever wants the server to stop,
    `tasks` are run by the server, `work` is set by it when there is a worker.
    """

    work = None
    locks_files = False                   # the spool is locked

    def __init__(self, config, later=None, now=None, budget=None):
        self.config = config
        self.later = later
        self.budget = budget or Budget()
        self.sweep_limit = SWEEP_STEP
        self.queues = {}
        self.routes = {}                  # what route() found
        self.children = {}                # parent -> names of its fanout children
        self.dirty = []                   # queues with something to write
        self.changed = self.dirty.append
        self.tasks = collections.deque()
        self.start = self.tasks.append
        self._failed = {}                 # queue -> OSError, since the last write()
        self.stopping = False
        self.started = _now(now)
        self.stats = Values(
            curr_connections=0, total_connections=0, cmd_get=0, cmd_set=0, cmd_peek=0,
            get_hits=0, get_misses=0, bytes_read=0, bytes_written=0, queue_creates=0,
            queue_deletes=0, queue_expires=0)
        self.logins = Logins(self)
        self.aside = None                 # has (work, call) done like a Worker, set by the server
        self.metrics = {                  # name -> what was seen of it
            "turn_usec": Histogram(), "fsync_usec": Histogram(),
            "delivery_latency_msec": Histogram()}
        self.put_rate = self.get_rate = 0.0       # items a second of all queues
        self._sampled = {}                # queue -> (items put, items got) at the last sample
        self._history = {}                # queue -> an array of its samples
        self.announce = lambda status: None       # told of each change of the status
        self._refused = (False, False)    # reads, writes: what the status refuses by now
        self._end_grace = lambda: None    # cancels that time
        # From so many connections on one more or less can make a difference.
        self._lowest_limit = min(config.server.connection_limit_refuse_reads,
                                 config.server.connection_limit_refuse_writes)
        self._restore_status()
        self.spool = os.path.abspath(config.server.queue_path)
        self._unloaded = find_journals(self.spool)
        for name in sorted(name for name, older in self._unloaded.items() if older is not None):
            try:
                self._create(name, self.started)
            except OSError as error:
                log.error("queue %s cannot be loaded: %s", name, error)
        for name in config.aliases.keys() & self.queues.keys():
            log.warning("the alias %s hides the queue of that name", name)
        self._cas = itertools.count(1)

    # -- names

    def find(self, name):
        """The queue of that name, or None if there is none."""
        return None if name in self.config.aliases else self.queues.get(name)

    def queue(self, name, now=None, who="the server"):
        """The queue of that name, made if it is new; None for an alias. who: for the log, who
        asks for it. Raises OSError."""
        if name in self.config.aliases:
            return None
        queue = self.queues.get(name)
        if queue is None:
            queue = self._create(name, now)
            self.stats.queue_creates += 1
            log.info("queue %s created by %s", name, who)
        return queue

    def targets(self, key):
        """The names of the queues that `key` (bytes) stands for: its own, or those of an alias.
        Raises ValueError when it cannot name a queue."""
        name = check_name(os.fsdecode(key))
        return self.config.aliases.get(name, (name,))

    def may(self, user, right, name):
        """Whether a user may use a queue, which need not exist. right: put_users or get_users."""
        queue = self.queues.get(name)
        config = queue.config if queue else self.config.queue(name)
        users = getattr(config, right)
        if users and user not in users:
            return False
        # A child of an alias gets what is put to all of its queues.
        parent, is_child, _ = name.partition("+")
        return not is_child or all(
            self.may(user, right, other) for other in self.config.aliases.get(parent, ()))

    def route(self, key, now=None, who="the server"):
        """Where the items put under `key` (bytes) go. Raises ValueError when it cannot name
        a queue, OSError when a queue cannot be made."""
        names = self.targets(key)
        name = os.fsdecode(key)
        targets = [self.queue(other, now, who) for other in names]
        copies = [self.queue(child, now, who)
                  for parent in dict.fromkeys([name] + [queue.name for queue in targets])
                  for child in self.children.get(parent, ())
                  if child not in self.config.aliases]
        targets = [queue for queue in targets
                   if not queue.config.fanout_only or "+" in queue.name]
        route = Route(targets, copies, targets + copies)
        self.routes[key] = route
        return route

    def _create(self, name, now):
        older = self._unloaded.get(name, ())
        if older is None:                 # its files could not be tidied up
            older = find_journals(self.spool, name)[name]
        queue = Queue(name, self.spool, self.config.queue(name), older, self, now)
        if self._unloaded.pop(name, None) is not None and not queue.journal:
            log.warning("queue %s: keep_journal is false, its journal stays unread", name)
        self.queues[name] = queue
        if "+" in name:
            self.children.setdefault(name.partition("+")[0], []).append(name)
            self.routes.clear()
        return queue

    # -- what clients ask for

    def put(self, route, data, flags, expiry, now):
        """Add an item to every queue of the route; False when a target refused it."""
        targets, copies, queues = route
        self.stats.cmd_set += 1
        if len(queues) > 1:                  # all of them, or none
            for queue in queues:
                queue.check_memory(len(data))
        stored = True
        for queue in targets:
            if not queue.add(data, flags, expiry, now):
                stored = False
        for queue in copies:
            queue.add(data, flags, expiry, now)
        return stored

    def cas(self, item):
        """A number that no other item has."""
        if item.cas is None:
            item.cas = next(self._cas)
        return item.cas

    def flush(self, queue, who):
        """Drop all that waits in a queue."""
        log.info("queue %s flushed of %d items by %s", queue.name, queue.count, who)
        queue.flush()

    def delete(self, queue, who="the server"):
        """Remove a queue and its journal. Raises OSError."""
        count = queue.count
        queue.delete()
        log.info("queue %s deleted with %d items by %s", queue.name, count, who)
        self.stats.queue_deletes += 1
        del self.queues[queue.name]
        self._sampled.pop(queue, None)
        self._history.pop(queue, None)
        self.routes.clear()
        parent = queue.name.partition("+")[0]
        if parent != queue.name:
            self.children[parent].remove(queue.name)

    def set_status(self, word, who="the server"):
        """Change the status. Raises ValueError if there is no such status."""
        if word.upper() not in STATUSES:
            raise ValueError("%r is none of: %s" % (word, ", ".join(STATUSES).lower()))
        self.status = word.upper()
        log.info("the status is %s, by %s", self.status, who)
        grace = self.config.server.status_change_grace_period
        # What it lets in it lets in at once; what it refuses, once clients could hear of it.
        self._end_grace()
        if grace and self.later:
            self._end_grace = self.later(grace, self.update_refusals)
        self.update_refusals(at_once=not (grace and self.later))
        self._save_status()
        self.announce(self.status)

    def count_connection(self, change):
        """A client has come (1) or gone (-1)."""
        self.stats.curr_connections += change
        self.stats.total_connections += change > 0
        if self.stats.curr_connections >= self._lowest_limit:
            self.update_refusals(at_once=False)

    def update_refusals(self, at_once=True):
        """Find out what is refused: `refuses_reads` and `refuses_writes` say why, or are
        empty. Asked when the status changes and when a connection comes or goes."""
        self._refused = [new and (at_once or old)
                         for new, old in zip(STATUSES[self.status], self._refused)]
        server = self.config.server
        limits = server.connection_limit_refuse_reads, server.connection_limit_refuse_writes
        self.refuses_reads, self.refuses_writes = [
            "the server is %s" % self.status.lower() if refused
            else "there are more than %d connections" % limit
            if self.stats.curr_connections > limit else ""
            for refused, limit in zip(self._refused, limits)]

    def _restore_status(self):
        word = self.config.server.default_status
        path = self.config.server.status_file
        if path:
            try:
                with open(path, encoding="ascii", errors="replace") as file:
                    word = file.read().strip()
                STATUSES[word.upper()]
            except FileNotFoundError:
                pass
            except (OSError, KeyError) as error:
                word = self.config.server.default_status
                log.error("status_file %s: %s; the status is %s", path, error, word)
        self.status = word.upper()
        self.update_refusals()

    def _save_status(self):
        path = self.config.server.status_file
        if path:
            try:
                with open(path + "~", "w", encoding="ascii") as file:
                    file.write(self.status + "\n")
                os.replace(path + "~", path)
            except OSError as error:
                log.error("status_file %s: %s", path, error.strerror)

    def reload(self, who="SIGHUP"):
        """Read the config file again. Raises ConfigError; then nothing has changed."""
        try:
            config = Config(self.config.path, self.config.overrides)
        except ConfigError as error:
            log.error("reload: %s; nothing has been changed", error)
            raise
        held = vars(self.config.server)
        for key, value in vars(config.server).items():
            if key in RELOADED:
                if held[key] != value:
                    log.warning("reload: %s is %s now", key,
                                SERVER_SETTINGS[key][0].show(value) or "empty")
                held[key] = value
            elif held[key] != value:
                log.warning("reload: %s changes with the next start only", key)
        if held["auth_file"] != config.server.auth_file:
            config.users = self.config.users
        config.server = self.config.server
        self.config = config
        self.routes.clear()
        for queue in self.queues.values():
            queue.configure(config.queue(queue.name))
        log.info("%s reloaded by %s", config.path or "the default settings", who)

    def discard_expired(self, queue, now, limit=UNLIMITED):
        """A long job: drop what has expired at the head of a queue. Yields how many, after
        each piece of it."""
        while limit > 0 and not queue.closed:
            dropped = queue.discard_expired(now, min(limit, SWEEP_STEP))
            if not dropped:
                break
            limit -= dropped
            yield dropped

    def sweep(self, now):
        """A task: drop what has expired, and queues older than their max_queue_age."""
        for count, queue in enumerate(list(self.queues.values()), 1):
            try:
                for _ in self.discard_expired(queue, now, queue.config.max_expire_sweep):
                    yield
            except OSError as error:
                log.error("queue %s: what has expired is not dropped: %s", queue.name, error)
            max_age = queue.config.max_queue_age
            if max_age and queue.counters.create_time + max_age <= now and not (
                    queue.count or queue.opens or queue.waiters or queue.closed):
                try:
                    self.delete(queue, "max_queue_age")
                except OSError as error:
                    log.error("queue %s: %s", queue.name, error)
                self.stats.queue_expires += 1
                self.stats.queue_deletes -= 1
            if count % SWEEP_STEP == 0:
                yield

    # -- what is to be written

    def write(self):
        """Write every journal that has something to write; return the queues written and, as
        {queue: OSError}, those of which operations have been undone since the last time."""
        written = []
        for queue in self.dirty:             # more may come while items move between queues
            try:
                queue.write()
                written.append(queue)
            except OSError:
                pass                         # failed() has it
            except Exception:
                log.exception("unexpected, in the queue %s", queue.name)
                self._failed[queue] = OSError(errno.EIO, "unexpected, see the log")
        self.dirty.clear()
        failed, self._failed = self._failed, {}
        return written, failed

    def failed(self, queue, error):
        """The operations of a queue that are not safe have been undone."""
        self._failed[queue] = _bare(error)

    def bury(self, queue, item, now):
        """Move an item that has expired, and is open now, to another queue."""
        self._advance(self._move(queue, item, now))

    def _advance(self, move, error=None):
        """Go on with a move, up to where it has to wait again."""
        with contextlib.suppress(StopIteration):
            queue = move.send(error)
            while queue and queue.history.logged <= queue.history.safe:
                queue = move.send(None)
            if queue:
                queue.history.when_safe(functools.partial(self._advance, move))
            elif self.later:
                self.later(RETRY_MS, functools.partial(self._advance, move))

    def _move(self, source, item, now):
        """Move an open item, in steps. Yield the queue that has to be safe before it goes on,
        and then be sent the error, if any; or None to go on in a while.

        It stays open until it is safe in all the queues it goes to: what fails on the way is
        undone, or tried again, and a crash finds it here, or there, or in both places.
        """
        xid = item.xid
        error = yield source
        if error:
            return                           # it is at the head again
        try:
            key = os.fsencode(source.config.expire_to_queue or "")
            targets = (self.routes.get(key) or self.route(key, now)).queues
            arrived = 0
            for queue in targets:
                while not queue.closed:
                    if not queue.add(item.data, item.flags, 0, now):
                        log.warning("queue %s is full: an expired item of %s is dropped",
                                    queue.name, source.name)
                    error = yield queue
                    if not error:
                        break
                    if not arrived:
                        raise error
                    yield None
                arrived += 1
        except (OSError, ValueError) as error:       # or there is no such setting since a reload
            log.error("queue %s: items that expired cannot be moved: %s", source.name, error)
            yield None                       # lest a disk that fails makes it go round and round
            source.abort(xid, orphaned=True)
            return
        while source.confirm(xid):
            error = yield source
            if not error:
                break
            yield None

    # -- telling
    # -- telling

    def sample(self, seconds):
        """A task: take the rates of all queues; so many seconds have passed since the last."""
        put_rate = get_rate = 0.0
        for count, queue in enumerate(list(self.queues.values()), 1):
            if queue.closed:                 # deleted since the last step
                continue
            before = self._sampled.get(queue, (0, 0))
            counters = queue.counters
            self._sampled[queue] = after = counters.total_items, counters.get_hits
            counters.put_rate, counters.get_rate = [
                max(0, new - old) / seconds for new, old in zip(after, before)]
            put_rate += counters.put_rate
            get_rate += counters.get_rate
            history = self._history.setdefault(queue, array.array("f"))
            if history or queue.count or after != before:        # nothing is kept of nothing
                history.extend([queue.count, counters.put_rate, counters.get_rate])
                del history[:-3 * SAMPLES]
            if count % SWEEP_STEP == 0:
                yield
        self.put_rate, self.get_rate = put_rate, get_rate

    def history(self, queue):
        """The last samples of a queue, as lists [items, put rate, get rate], the oldest first."""
        values = self._history.get(queue, ())
        return [[round(value, 1) for value in values[at:at + 3]]
                for at in range(0, len(values), 3)]

    def server_stats(self, now):
        """The server's own numbers, as (name, value) pairs under Kestrel's names. The longest
        turn of its loop and the longest fsync are those since the last asking."""
        queues = self.queues.values()
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        reserved = sum(queue.config.max_memory_size for queue in queues)
        return [
            ("uptime", max(0, now - self.started) // 1000),
            ("time", now // 1000),
            ("version", __version__),
            ("curr_items", sum(queue.count for queue in queues)),
            ("total_items", sum(queue.counters.total_items for queue in queues)),
            ("bytes", sum(queue.bytes for queue in queues)),
            ("reserved_memory_ratio", "%.3f" % (reserved / memory)),
            *vars(self.stats).items(),
            ("put_rate", round(self.put_rate, 1)),
            ("get_rate", round(self.get_rate, 1)),
            ("max_turn_usec", self.metrics["turn_usec"].take_recent()),
            ("max_fsync_usec", self.metrics["fsync_usec"].take_recent()),
        ]

    def queue_stats(self, queue, now):
        """A queue's numbers, as (name, value) pairs; `children` only if it has any."""
        children = self.children.get(queue.name)
        return queue.stats(now) + ([("children", ",".join(children))] if children else [])


# == 6. Protocols =========================================================================
#
# What clients say and what they are told. A session is fed bytes and answers with bytes in
# `out`; it asks the broker, and never touches a socket, a clock or a file, so that every
# case can be tried without one. What the server reads of a session:
#
#   out          byte strings to be sent, in order; take() takes them
#   load         what the commands since the last sending have cost, in bytes: their answers, and
#                more for what takes its time; set to 0 by the server when all has been sent
#   most_load    set by the server: with more load the next command waits for the next turn
#   touched      (queue, index in out, count, whole) of each answer that rests on a journal
#   held         between hold() and release(), while answers wait for an fsync, or a login for
#                its password to be checked
#   stalled      the next command has to wait: for an item, a job, an fsync, for ever. Only
#                resume() sees whether it still has to
#   waiter       while it waits for an item; is_asking: for a password to be checked
#   unparsed     how much input has been kept
#   timeout      milliseconds from now at which time_out() is to be called, then None again
#   job          a long command in hand, of which resume() does a piece; for the next turn
#   closing      nothing more is parsed; close when `out` has been sent
#   idle_timeout milliseconds, if client_timeout is not shorter

# What expires later than this expires then; the journal has 64 bits for it.
_LATEST = 1 << 62

# Answers are put together from here on without copying the data.
_BIG = 1 << 16

# What a command adds to the load of its session besides its answer, and what a queue does that is
# made or deleted: so many are done in a turn that others do not wait long.
_COMMAND_COST = 1 << 10
_QUEUE_COST = 1 << 17

# With so many queues to be written a turn does one command more of each session.
_MOST_DIRTY = 200


class Refused(Exception):
    """A command that is answered with an error line; `close`: and the end of the session."""

    def __init__(self, answer, close=False, skip=0):
        super().__init__(answer)
        self.answer = answer.encode("utf-8", "surrogateescape") + b"\r\n"
        self.close = close
        self.skip = skip


# What a key of a get asks for: `text` is the key as it was sent, `wait` milliseconds.
ReadKey = collections.namedtuple("ReadKey", "text name wait open close abort peek")


def parse_key(text):
    """The ReadKey of `q/t=500/open` and the like. Raises Refused."""
    name, *options = text.split(b"/")
    options = [option.lower() for option in options]
    wait = 0
    for option in options:
        if option.startswith(b"t="):
            wait = _number(option[2:], "timeout")
    opening, closing, abort, peek = (
        word in options for word in (b"open", b"close", b"abort", b"peek"))
    if peek + abort + (opening or closing) > 1:
        raise Refused("CLIENT_ERROR open, close, abort and peek do not go together here")
    return ReadKey(text, _name(name), wait, opening, closing, abort, peek)


def _why(error):
    """What went wrong, from an OSError, on one line."""
    return "%s: %s" % (os.path.basename(error.filename or "journal"), error.strerror or error)


def _name(word):
    try:
        return check_name(os.fsdecode(word))
    except ValueError as error:
        raise Refused("CLIENT_ERROR %s" % error) from None


def _number(word, what, close=False):
    if not word.lstrip(b"-").isdigit() or word.rfind(b"-") > 0 or len(word) > 20:
        raise Refused("CLIENT_ERROR bad %s" % what, close)
    return int(word)


# The data block of a set that is to come. expiry: as it was sent. words: the command line.
Block = collections.namedtuple("Block", "key flags expiry size words")

# A get: its ReadKeys, whether it has one only, and whether it is a gets.
Get = collections.namedtuple("Get", "keys whole with_cas")


def _parse_block(words):
    """The Block of `set <queue> <flags> <expiry> <bytes> [noreply]`. Raises Refused, which
    says what is to be skipped: the block comes whatever is wrong with its line."""
    name = words[0].decode().lower()
    if len(words) < 5:
        raise Refused("CLIENT_ERROR %s needs a queue, flags, expiry and byte count" % name,
                      close=True)
    size = _number(words[4], "byte count", close=True)
    if size < 0:
        raise Refused("CLIENT_ERROR bad byte count", close=True)
    if name != "set":
        raise Refused("CLIENT_ERROR %s has no meaning for a queue" % name, skip=size + 2)
    try:
        flags = _number(words[2], "flags")
        if not 0 <= flags <= 0xffffffff:
            raise Refused("CLIENT_ERROR bad flags")
        return Block(words[1], flags, _number(words[3], "expiry"), size, words)
    except Refused as error:
        error.skip = size + 2
        raise


def _parse_get(words):
    """The Get of `get <key> [<key> ...]`. Raises Refused."""
    if len(words) < 2:
        raise Refused("CLIENT_ERROR get needs the name of a queue")
    return Get([parse_key(word) for word in words[1:]], len(words) == 2, len(words[0]) == 4)


def _parse_line(line):
    """The method of MemcacheSession that a command line asks for, and what it is given."""
    words = line.split()
    name = words[0].lower() if words else b""
    command, parse = _COMMANDS.get(name, (MemcacheSession._unknown, None))
    return command, parse(words) if parse else words


# The same lines come again and again. Longer ones are not kept, lest they fill the memory.
_parse_line_cached = functools.lru_cache(maxsize=4096)(_parse_line)
_LINE_CACHED = 120


class Session:
    """One client, in whatever protocol: its input, its answers, its open reads and waits.

    broker: a Broker. local: whether the client is on this machine. who: its address, for the
    log. host: what it shares with others of its kind, see Logins. wake: called when the session
    has something to do or to say though it was not fed.

    A protocol has _parse(data, now), which runs the commands in `data` and returns how far it
    has got, _go_on(now), which goes on with a command that had to wait, _received(item), which
    takes the item that a read has waited for or None, _failure(why, answer), the bytes that
    take the place of an answer, _refuse(error), which says that a command failed, and _forget(),
    which drops the command in hand.
    """

    idle_timeout = None                 # milliseconds, if client_timeout is not shorter

    def __init__(self, broker, local=True, who="a client", host="", wake=lambda: None):
        self.broker = broker
        self.settings = broker.config.server
        self.local = local
        self.who = who
        self.host = host
        self.user = None                # its name, with an auth_file and once it has said it
        self.is_asking = False          # it is being found out who that is
        self.wake = wake
        self.out = []
        self.load = 0
        self.most_load = self.settings.max_output_buffer
        self._latency = broker.metrics["delivery_latency_msec"]
        self.touched = []
        self.timeout = None
        self.held = False
        self.closing = False
        self.stalled = False
        self.job = None
        self.waiter = None              # the Waiter, and the queue it waits for
        self.queue = None
        self.open_reads = {}            # queue -> its open xids here, the oldest first
        self._ended = []                # (queue, xid) closed since the last commit
        self._kept = None               # a BytesIO of input that has not been parsed, if any,
        self.unparsed = 0               # its length, and the length from which on it is
        self._needed = 0                # worth looking at again

    # -- input

    def feed(self, data, now):
        """Take bytes that the client sent, and act on every whole command in them."""
        if self.unparsed or self._needed or self.stalled:
            self._keep(data)
            if self.unparsed >= self._needed:
                self.resume(now)
        else:                            # as a rule
            pos = self._parse(data, now)
            if pos < len(data):
                self._keep(data[pos:])

    def _keep(self, data):
        if not self.unparsed:
            self._kept = io.BytesIO()
        self.unparsed += self._kept.write(data)

    def resume(self, now):
        """Go on with what can be done: in the next turn, after a wait, or with new input."""
        if self.held or self.closing:
            return
        try:
            if self.job and not self.is_full():
                self._work()
            if self.job or self.waiter or self.is_full():
                return
            self.stalled = False
            self._go_on(now)
        except (Refused, OSError) as error:
            self.stalled = False
            self._refuse(error)
        if self.unparsed and self.unparsed >= self._needed and not self.closing:
            data = self._kept.getvalue()
            self._kept, self.unparsed, self._needed = None, 0, 0
            pos = self._parse(data, now)
            if pos < len(data):
                self._keep(data[pos:])

    def is_full(self):
        """Whether so much has been done, or waits to be sent, that nothing more is to be parsed."""
        return self.load > self.most_load

    def _pass_turn(self):
        """Let the next command wait for the next turn: this one takes its time."""
        self.load = self.most_load + 1

    def _spare_others(self):
        """Let the next command wait for the next turn if this one has much to write."""
        if len(self.broker.dirty) > _MOST_DIRTY:
            self._pass_turn()

    def _is_to_pause(self):
        """Whether the command in hand is to go on when what it has said has been sent."""
        self._spare_others()
        self.stalled = self.stalled or self.is_full()
        return self.is_full()

    def hold(self):
        """Parse nothing more until release(): answers wait for an fsync."""
        self.held = self.stalled = True

    def release(self):
        """resume() may go on again."""
        self.held = self.is_asking

    def _begin(self, job):
        """Do a command in pieces, the first one now: `job` is a generator."""
        self.job = job
        self._work()
        if self.job:
            self.stalled = True

    def _put_off(self, job):
        """Do `job` in pieces from resume() on; then the command in hand goes on, if it is not done
        with that."""
        self.job = job
        self.stalled = True

    def _has_to_sweep(self, now):
        """Whether a read of the queue in hand has found none for a long run of expired items:
        they are dropped first, and it is to be tried again then."""
        queue = self.queue
        if queue and queue.count:
            self._put_off(self.broker.discard_expired(queue, now))
            return True
        return False

    def _end(self):
        """Parse nothing more, and close when all has been said."""
        self.closing = self.stalled = True

    def _work(self):
        try:
            next(self.job)
        except StopIteration:
            self.job = None
        except OSError:
            self.job = None
            raise

    def backlog(self):
        """Bytes that came and have not been parsed, though they could be but for a wait."""
        return self.unparsed if self.stalled or self.is_full() else 0

    # -- output

    def _say(self, answer, *queues):
        """Answer a command, one that changed these queues."""
        for queue in queues:
            self.touched.append((queue, len(self.out), 1, True))
        self.load += len(answer) + _COMMAND_COST
        self.out.append(answer)

    def fail(self, failed, since=0, until=None):
        """Answer with an error where a journal could not be written or fsynced. failed:
        {queue: OSError}. since, until: which entries of `touched` to look at."""
        for queue, index, count, whole in self.touched[since:until]:
            if queue in failed:
                if index == len(self.out) and count:   # of a command that is still in hand
                    self._give_up()
                # In a get of many keys a queue that failed is passed over instead.
                if count:
                    error = self._failure(_why(failed[queue]), self.out[index])
                    self.out[index:index + count] = [
                        error if whole else b""] + [b""] * (count - 1)
        for queue in failed:
            mine = [xid for other, xid in self._ended if other is queue]
            mine += self.open_reads.pop(queue, ())
            mine = [xid for xid in mine if xid in queue.opens]
            if mine:
                self.open_reads[queue] = mine

    def out_of_memory(self):
        """Refuse the command in hand, drop all other input, and end."""
        self._kept, self.unparsed, self._needed = None, 0, 0
        if self.waiter:
            self.queue.cancel(self.waiter)
            self.waiter = None
        self.job = None
        self._refuse(Refused("SERVER_ERROR out of memory", close=True))

    def _give_up(self):
        """End the command in hand, a read that waits or a job, without its answer."""
        if self.waiter:
            self.queue.cancel(self.waiter)
            self.waiter = None
        self.job = None
        self._forget()
        self.out.append(b"")
        self.wake()

    def take(self):
        """What is to be sent, which is then off the session's hands."""
        out, self.out = self.out, []
        self.touched.clear()
        self._ended.clear()
        return out

    def close(self, now):
        """The client has gone: its open reads go back to their queues."""
        self._end()
        self.job = None
        if self.waiter:
            self.queue.cancel(self.waiter)
            self.waiter = None
        for queue, xids in self.open_reads.items():
            queue.abort(*xids, now=now, orphaned=True)
        self.open_reads.clear()

    # -- reads and writes

    def _check_writes(self):
        if self.broker.refuses_writes:
            raise Refused("SERVER_ERROR %s: nothing can be written" % self.broker.refuses_writes,
                          close=True)

    def _check_reads(self):
        if self.broker.refuses_reads:
            raise Refused("SERVER_ERROR %s: nothing can be read" % self.broker.refuses_reads,
                          close=True)

    def _check_admin(self, command):
        """Whether a command may be given from here that is not for everybody."""
        rule = self.settings.admin_commands
        if rule == "none":
            self._deny("%s is turned off (admin_commands)" % command)
        if not self.local and (rule == "local" or not rule and command == "shutdown" and not (
                self.settings.allow_remote_shutdown)):
            self._deny("%s is taken from this machine only (admin_commands)" % command)

    def _deny(self, why):
        log.warning("%s is denied: %s", self.who, why)
        raise Refused("CLIENT_ERROR " + why)

    def _check_user(self, right, *names):
        """Whether the client may use these queues. right: put_users or get_users."""
        for name in names:
            if not self.broker.may(self.user, right, name):
                self._deny("%s is not among the %s of %s" % (self.user, right, name))

    def _check_all_queues(self):
        """Whether the client may drop what is in any queue."""
        if self.broker.config.users is not None:
            self._check_user("get_users", *self.broker.queues)

    def _new_queue(self, name, now):
        """The queue of that name, made if it is new; None for an alias. Raises OSError."""
        self.load += _QUEUE_COST
        return self.broker.queue(name, now, self.who)

    def _new_route(self, key, now):
        """The route of a key, its queues made if they are new. Raises ValueError and OSError."""
        self.load += _QUEUE_COST
        return self.broker.route(key, now, self.who)

    def _drop(self, queue, delete=False):
        """Drop all that waits in a queue, or the whole of it."""
        self._check_user("get_users", queue.name)
        if delete:
            self.load += _QUEUE_COST
            self.broker.delete(queue, self.who)
        else:
            self.broker.flush(queue, self.who)

    def _log_in(self, name, password):
        """Set `user` to the name if that is its password (both bytes), or None; nothing is parsed
        meanwhile, and _go_on() called then."""
        self.is_asking = True
        self._put_off(iter(()))          # nothing to do but to wait
        self.hold()
        self.broker.logins.check(self, name, password)

    def identify(self, user):
        """The user is known now; None if the password was wrong."""
        self.user = user
        self.who = self.who.partition(" (")[0] + ("" if user is None else " (%s)" % user)
        self.is_asking = False
        self.release()
        self.wake()

    def _reads_of(self, queue):
        """The xids open here; some may have timed out, which the client cannot know."""
        return [xid for xid in self.open_reads.get(queue, ()) if xid in queue.opens]

    def _change_status(self, word):
        self._check_admin("status")
        self._pass_turn()
        try:
            self.broker.set_status(word.decode("ascii", "replace"), self.who)
        except ValueError as error:
            raise Refused("CLIENT_ERROR %s" % error) from None

    def _check_opens(self, plain=False):
        """Whether the client may open one more read of the queue in hand, or read it plainly."""
        reads = self._reads_of(self.queue)
        limit = self.broker.config.server.max_open_transactions
        if reads and plain:
            raise Refused("ERROR close the open read of %s first" % self.queue.name, close=True)
        if len(reads) >= limit:
            raise Refused("ERROR too many open reads of %s; limit=%d" % (self.queue.name, limit),
                          close=True)

    def _end_reads(self, queue, count, confirm, now, whole=True):
        """Close or abort the oldest open reads of a queue here; the number that were open."""
        reads = self.open_reads.get(queue, [])
        xids = reads[:count]
        del reads[:count]
        if not reads:
            self.open_reads.pop(queue, None)
        self._ended += [(queue, xid) for xid in xids]
        self._rest_on(queue, whole)
        if confirm:
            return sum([queue.confirm(xid) for xid in xids])
        return queue.abort(*xids, now=now)

    def _rest_on(self, queue, whole=True):
        """The answer that is to come rests on the journal of a queue; unless `whole`, as in a
        get of many keys, it is not to blame if that fails."""
        self.touched.append((queue, len(self.out), int(whole), whole))

    def _wait(self, opening, peek=False):
        self.waiter = Waiter(self._deliver, opening, peek)
        self.stalled = True
        self.queue.wait(self.waiter)

    def _deliver(self, item):
        """An item for the waiting read, or None if the wait is over without one."""
        waiter, self.waiter = self.waiter, None
        self._received(item, waiter.peek)
        self.wake()

    def time_out(self):
        """The time that was asked for is over."""
        if self.waiter:
            self.queue.cancel(self.waiter)
            self._deliver(None)

    def _hit(self):
        """A get has been given an item of the queue in hand."""
        self.broker.stats.get_hits += 1
        self._latency.add(self.queue.counters.age)

    def _missed(self):
        """A get has found the queue in hand empty, or none of that name."""
        self.broker.stats.get_misses += 1
        if self.queue:
            self.queue.counters.get_misses += 1

    # -- what all protocols have

    def _flush_each(self, answer, *arguments):
        """A job: flush every queue, one in each turn, then call `answer`."""
        for queue in list(self.broker.queues.values()):
            if queue.count:
                self.broker.flush(queue, self.who)
                self._rest_on(queue)
                yield
        answer(*arguments)

    def _put_each(self, route, items, expiry, now, answer):
        """A job: put the items, some in each turn, then call `answer` with how many were taken."""
        count = size = 0
        for item in items:
            count += self.broker.put(route, item, 0, expiry, now)
            size += (len(item) + _COMMAND_COST) * len(route.queues)
            if size > _STEP_SIZE:
                size = 0
                for queue in route.queues:
                    self._rest_on(queue)
                yield
        answer(count)

    def _shutdown(self, words, now):
        self._check_admin("shutdown")
        log.info("told to shut down by %s", self.who)
        self.broker.stopping = True
        self._end()

    def _quit(self, words, now):
        self._end()

    def _refuse_http(self, words):
        """What a browser posts, sent here by a page, is not to be taken for commands."""
        if words and words[0].lower() in (b"post", b"host:"):
            raise Refused("ERROR this is not HTTP", close=True)


class MemcacheSession(Session):
    """One client of the memcache text protocol, as Kestrel speaks it."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._most_item = self.settings.max_item_size
        self._skip = 0                  # bytes of a refused data block still to come
        self._block = None              # the Block of a set without its data yet
        self._key = None                # the ReadKey that could not be answered at once
        self._keys = None               # a deque of those after it, in a get of many
        self._whole = True              # of the Get in hand
        self._with_cas = False
        self._monitor = None            # [name, number of items still wanted]

    def _parse(self, data, now):
        """Run the commands in `data`; the position up to which it has been used."""
        pos = 0
        dirty = self.broker.dirty
        while not (self.stalled or self.load > self.most_load):
            if pos and len(dirty) > _MOST_DIRTY:       # _spare_others(), without a call
                self._pass_turn()
                break
            if self._skip:
                skipped = min(self._skip, len(data) - pos)
                self._skip -= skipped
                pos += skipped
            line, block = b"", None
            try:
                eol = data.find(b"\n", pos)
                if eol < 0:
                    self._check_start(data[pos:])
                    break
                line = data[pos:eol]
                pos = eol + 1
                if len(line) <= _LINE_CACHED:
                    command, asked = _parse_line_cached(line)
                elif len(line.rstrip(b"\r")) > self.settings.max_line:
                    raise Refused("CLIENT_ERROR line too long", close=True)
                else:
                    command, asked = _parse_line(line)
                if command:
                    command(self, asked, now)
                    continue
                block = asked
                if block.size > self._most_item:
                    raise Refused("SERVER_ERROR object too large for cache",
                                  skip=block.size + 2)
                end = pos + block.size
                if len(data) < end + 2:
                    self._block = block
                    self._needed = block.size + 2
                    break
                if data[end:end + 2] != b"\r\n":
                    raise Refused("CLIENT_ERROR bad data chunk", close=True)
                item = data[pos:end]
                pos = end + 2
                self._store(block, item, now)
            except (Refused, OSError) as error:
                self._refuse(error, block.words if block else line.split())
        return pos

    def _finish_block(self, now):
        """The rest of a data block has come: store it, without another copy."""
        block, self._block = self._block, None
        self._kept.seek(block.size)
        rest = self._kept.read()
        self._kept.truncate(block.size)
        item = self._kept.getvalue()
        self._kept, self.unparsed, self._needed = None, 0, 0
        if rest[2:]:
            self._keep(rest[2:])
        try:
            if rest[:2] != b"\r\n":
                raise Refused("CLIENT_ERROR bad data chunk", close=True)
            self._store(block, item, now)
        except (Refused, OSError) as error:
            self._refuse(error, block.words)

    def _check_start(self, start):
        """What has come of a line must be able to become one."""
        if len(start) > self.settings.max_line + 1:
            raise Refused("CLIENT_ERROR line too long", close=True)
        if start[:1] == b"\x80":
            self._unknown([start], None)

    def _go_on(self, now):
        if self._block and self.unparsed >= self._needed:
            self._finish_block(now)
        key, self._key = self._key, None
        if self._keys is not None:
            self._keys.extendleft(filter(None, [key]))
            self._read_keys(now)
        elif key:
            self._read(key, now)
        elif self._monitor:
            self._watch(now)

    def _forget(self):
        self._key = self._keys = self._monitor = None

    def _reply(self, words, answer, *queues):
        """Answer a command that may have asked for silence."""
        # A queue may have that name.
        is_name = len(words) == 2 and words[0].lower() in (b"delete", b"flush")
        if not words or words[-1] != b"noreply" or is_name:
            self._say(answer, *queues)

    def _refuse(self, error, words=(b"",)):
        if isinstance(error, OSError):
            error = Refused("SERVER_ERROR %s" % _why(error))
        self._forget()
        self._reply(words, error.answer)
        self._skip = error.skip
        if error.close:
            self._end()

    def _failure(self, why, answer):
        return b"SERVER_ERROR %b\r\n" % os.fsencode(why)

    # -- storing

    def _store(self, block, data, now):
        key, flags, expiry, _, words = block
        broker = self.broker
        if broker.refuses_writes:
            self._check_writes()
        if expiry:
            # Relative or absolute seconds; the limits are Kestrel's and the journal's.
            expiry *= 1000
            if expiry < 1000000 * 1000:
                expiry += now
            expiry = min(max(expiry, 1), _LATEST)
        try:
            if broker.config.users is not None:
                self._check_user("put_users", *broker.targets(key))
            route = broker.routes.get(key) or self._new_route(key, now)
        except ValueError as error:
            raise Refused("CLIENT_ERROR %s" % error) from None
        stored = broker.put(route, data, flags, expiry, now)
        if words[-1] != b"noreply":
            out = self.out
            for queue in route.queues:
                self.touched.append((queue, len(out), 1, True))
            out.append(b"STORED\r\n" if stored else b"NOT_STORED\r\n")
        self.load += _COMMAND_COST * (len(route.queues) or 1)

    # -- reading

    def _get(self, asked, now):
        keys, self._whole, self._with_cas = asked
        if self._whole:
            self._read(keys[0], now)
        else:
            self._keys = collections.deque(keys)
            self._read_keys(now)

    def _read_keys(self, now):
        """Answer the keys of a get of many, up to one that has to wait."""
        try:
            while self._keys:
                key = self._keys.popleft()
                try:
                    self._read(key, now)
                except OSError as error:
                    log.error("get of many keys: %s", _why(error))
                if self._key or self._is_to_pause():
                    return
        except Refused:
            self._keys = None
            raise
        self._keys = None
        self.out.append(b"END\r\n")

    def _read(self, key, now):
        """Do what one key asks for, and answer it, unless it has to wait."""
        broker = self.broker
        stats = broker.stats
        _, name, wait, opening, closing, abort, peek = key
        if closing or abort:
            self.queue = queue = broker.find(name)
            if queue:
                self._end_reads(queue, 1, closing, now, self._whole)
            if not opening:
                self._give(key, None)
                return
        if broker.refuses_reads:
            self._check_reads()
        if broker.config.users is not None:
            self._check_user("get_users", name)
        if peek:
            self.queue = queue = broker.find(name)
            item = queue.peek(now) if queue else None
        else:
            self.queue = queue = broker.queues.get(name) or self._new_queue(name, now)
            if queue is None or name in broker.config.aliases:
                self._give(key, None)
                return
            if queue in self.open_reads:
                self._check_opens(plain=not opening)
            item = queue.remove(opening, now)
        if item is None and self._has_to_sweep(now):
            self._key = key._replace(close=False, abort=False)
            return
        if peek:
            stats.cmd_peek += 1
        else:
            stats.cmd_get += 1
        if item is not None:
            if not peek:
                self._hit()
        elif wait > 0 and queue:
            self._wait(opening, peek)
            self.timeout = wait
            self._key = key
            return
        elif not peek:
            self._missed()
        self._give(key, item)

    def _give(self, key, item):
        """The answer to one key of the get in hand; the item is None if there is none."""
        out = self.out
        if item is None:
            if self._whole:
                self._say(b"END\r\n")
            else:
                self.load += _COMMAND_COST
            return
        queue = self.queue
        whole = self._whole
        if key.open:
            self.open_reads.setdefault(queue, []).append(item.xid)
        data = item.data
        size = len(data)
        head = b"VALUE %b %d %d" % (key.text, item.flags, size)
        if self._with_cas:
            head = b"%b %d" % (head, self.broker.cas(item))
        pieces = (head, b"\r\n", data, b"\r\nEND\r\n" if whole else b"\r\n")
        if size < _BIG:
            self.touched.append((queue, len(out), 1, whole))
            out.append(b"".join(pieces))
        else:
            self.touched.append((queue, len(out), 4, whole))
            out += pieces
        self.load += size + _COMMAND_COST

    def _received(self, item, peek):
        if self._monitor:
            self._show(item)
            return
        if not peek:
            self._hit() if item is not None else self._missed()
        key, self._key = self._key, None
        self._give(key, item)

    def _start_monitor(self, words, now):
        # monitor <queue> <seconds> [<items>]
        if not 3 <= len(words) <= 4:
            raise Refused("CLIENT_ERROR monitor needs a queue and a number of seconds")
        name = _name(words[1])
        seconds = _number(words[2], "number of seconds")
        count = _number(words[3], "number of items") if len(words) == 4 else UNLIMITED
        self._check_reads()
        self._check_user("get_users", name)
        self.queue = self._new_queue(name, now)
        self._monitor = [words[1], count]
        self.timeout = max(0, seconds * 1000)
        self._watch(now)

    def _watch(self, now):
        """Show the monitor in hand what there is, up to where it has to wait."""
        limit = self.broker.config.server.max_open_transactions
        while self._monitor and not self._is_to_pause():
            if not self.queue or self._monitor[1] <= 0 or (
                    len(self._reads_of(self.queue)) >= limit):
                self._show(None)
                return
            item = self.queue.remove(True, now)
            if item is None and self._has_to_sweep(now):
                return
            self.broker.stats.cmd_get += 1
            if item is None:
                self._wait(True)
                return
            self._show(item)

    def _show(self, item):
        if item is None:
            self._monitor = None
            self.out.append(b"END\r\n")
        else:
            self._monitor[1] -= 1
            self._whole, self._with_cas = True, False
            self._give(ReadKey(self._monitor[0], "", 0, True, False, False, False), item)

    def _confirm(self, words, now):
        # confirm <queue> <count>
        if len(words) != 3:
            raise Refused("CLIENT_ERROR confirm needs a queue and a number of items")
        queue = self.broker.find(_name(words[1]))
        count = max(0, _number(words[2], "number of items"))
        ended = queue and self._end_reads(queue, count, True, now)
        self._say(b"END\r\n" if ended else b"ERROR\r\n")

    # -- administration

    def _queue_of(self, words):
        """The queue that a command names, None if it does not exist."""
        if len(words) < 2:
            raise Refused("CLIENT_ERROR %s needs the name of a queue" % words[0].decode())
        return self.broker.find(_name(words[1]))

    def _delete(self, words, now):
        queue = self._queue_of(words)
        self._check_admin("delete")
        self._check_writes()
        if queue:
            self._drop(queue, True)
        self._reply(words, b"DELETED\r\n", *filter(None, [queue]))

    def _flush(self, words, now):
        queue = self._queue_of(words)
        self._check_writes()
        if queue:
            self._drop(queue)
        self._reply(words, b"END\r\n", *filter(None, [queue]))

    def _flush_all(self, words, now):
        self._check_admin("flush_all")
        self._check_writes()
        self._check_all_queues()
        stock = self.broker.config.server.flush_all_reply == "memcached"
        self._begin(self._flush_each(
            self._reply, words, b"OK\r\n" if stock else b"Flushed all queues.\r\n"))

    def _flush_expired(self, words, now):
        queue = self._queue_of(words)
        self._check_writes()
        self._check_user("get_users", *[queue.name] if queue else [])
        self._begin(self._discard_expired([queue] if queue else [], now))

    def _flush_all_expired(self, words, now):
        self._check_writes()
        self._check_all_queues()
        self._begin(self._discard_expired(list(self.broker.queues.values()), now))

    def _discard_expired(self, queues, now):
        total = 0
        for queue in queues:
            for dropped in self.broker.discard_expired(queue, now):
                total += dropped
                self._rest_on(queue)
                if dropped >= SWEEP_STEP:
                    yield
        self._say(b"%d\r\n" % total)

    def _stats(self, words, now):
        self._say_pairs("STAT %s %s", self.broker.server_stats(now))
        self._put_off(self._list(sorted(self.broker.queues), lambda queue: self._say_pairs(
            "STAT queue_%s_%%s %%s" % queue.name.replace("%", "%%"),
            self.broker.queue_stats(queue, now))))

    def _dump_stats(self, words, now):
        self._dump(words, lambda queue: self.broker.queue_stats(queue, now))

    def _dump_config(self, words, now):
        self._dump(words, lambda queue: [
            line.split(" = ", 1) for line in queue.config.lines()])

    def _dump(self, words, pairs):
        def dump(queue):
            self._say(os.fsencode("queue '%s' {\r\n" % queue.name))
            self._say_pairs("  %s=%s", pairs(queue))
            self._say(b"}\r\n")
        names = list(dict.fromkeys(map(os.fsdecode, words[1:]))) or sorted(self.broker.queues)
        self._put_off(self._list(names, dump))

    def _list(self, names, say):
        """A job: say something of each of these queues, some in each turn."""
        for count, name in enumerate(names, 1):
            queue = self.broker.queues.get(name)
            if queue and name not in self.broker.config.aliases:
                say(queue)
            if count % (SWEEP_STEP // 10) == 0:
                yield
        self._say(b"END\r\n")

    def _say_pairs(self, line, pairs):
        self._say(os.fsencode("".join([(line + "\r\n") % tuple(pair) for pair in pairs])))

    def _reload(self, words, now):
        self._check_admin("reload")
        self._pass_turn()
        try:
            self.broker.reload(self.who)
        except ConfigError as error:
            raise Refused("SERVER_ERROR %s" % error) from None
        self._say(b"Reloaded config.\r\n")

    def _status(self, words, now):
        if len(words) < 2:
            self._say(self.broker.status.encode() + b"\r\n")
            return
        self._change_status(words[1])
        self._say(b"END\r\n")

    def _version(self, words, now):
        self._say(b"VERSION %b\r\n" % __version__.encode())

    def _verbosity(self, words, now):
        self._reply(words, b"OK\r\n")

    def _unknown(self, words, now):
        if words and words[0].startswith(b"\x80"):
            raise Refused("ERROR the binary protocol is not spoken here", close=True)
        self._refuse_http(words)
        self._reply(words, b"ERROR\r\n")


# Each command: the method that does it, and what reads its words for it, if anything does. A
# set has no method: it is done when its data block is there.
_COMMANDS = {
    b"get": (MemcacheSession._get, _parse_get),
    b"gets": (MemcacheSession._get, _parse_get),
    **dict.fromkeys([b"set", b"add", b"replace", b"append", b"prepend", b"cas"],
                    (None, _parse_block)),
    **{name: (command, None) for name, command in {
        b"monitor": MemcacheSession._start_monitor,
        b"confirm": MemcacheSession._confirm,
        b"delete": MemcacheSession._delete,
        b"flush": MemcacheSession._flush,
        b"flush_all": MemcacheSession._flush_all,
        b"flush_expired": MemcacheSession._flush_expired,
        b"flush_all_expired": MemcacheSession._flush_all_expired,
        b"stats": MemcacheSession._stats,
        b"dump_stats": MemcacheSession._dump_stats,
        b"dump_config": MemcacheSession._dump_config,
        b"reload": MemcacheSession._reload,
        b"status": MemcacheSession._status,
        b"version": MemcacheSession._version,
        b"verbosity": MemcacheSession._verbosity,
        b"shutdown": MemcacheSession._shutdown,
        b"quit": MemcacheSession._quit,
    }.items()},
}


# The longest name and password, in bytes, and how long a client has for them, and for TLS.
MAX_LOGIN = 1024
LOGIN_MS = 60000


class MemcacheLogin(MemcacheSession):
    """A client that has still to say who it is, as to memcached (its doc/protocol.txt,
    Authentication): the first command is a set, under any key, of `name password`. Then it is a
    MemcacheSession; whatever else it says is the end."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._most_item = MAX_LOGIN
        self._words = None              # of the command, while its password is being checked

    def _parse(self, data, now):
        eol = data.find(b"\n")
        if eol >= 0 and data[:eol].lower().split()[:1] not in ([b"set"], [b"quit"]):
            self._refuse(Refused("CLIENT_ERROR unauthenticated"))
        return super()._parse(data, now)

    def _store(self, block, data, now):
        self._words = block.words
        name, _, password = data.partition(b" ")
        self._log_in(name, password)

    def _go_on(self, now):
        if self._words is None:
            super()._go_on(now)
        elif self.user is None:
            self._refuse(Refused("CLIENT_ERROR authentication failure"))
        else:
            self.__class__ = MemcacheSession
            self._most_item = self.settings.max_item_size
            self._reply(self._words, b"STORED\r\n")

    def _refuse(self, error, words=(b"",)):
        super()._refuse(error, words)
        self._end()


# The longest item that can be put as a line of text, how many with one put, and how much.
MAX_TEXT_ITEM = 1 << 20
MAX_TEXT_ITEMS = 1024
MAX_TEXT_PUT = 16 << 20


class TextSession(Session):
    """One client of Kestrel's text protocol (net.lag.kestrel.TextHandler): lines that end in
    a newline, items without one."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._put = None                # [command words, items so far] of a put
        self._put_size = 0              # of these items together
        self._left = 0                  # items that the read in hand may still give
        self._waits = self._peeking = self._watching = False

    def _parse(self, data, now):
        pos = 0
        while not (self.stalled or self.is_full()):
            limit = self.settings.max_line if self._put is None else min(
                MAX_TEXT_ITEM, self.settings.max_item_size)
            eol = data.find(b"\n", pos, pos + limit + 2)
            try:
                if eol < 0:
                    if len(data) - pos > limit + 1:
                        raise Refused("CLIENT_ERROR Line too long.", close=True)
                    break
                line = data[pos:eol]
                pos = eol + 1
                if self._put is None:
                    self._command(line.split(), now)
                elif line not in (b"", b"\r"):
                    self._put[1].append(line)
                    self._put_size += len(line)
                else:
                    (words, items), self._put, self._put_size = self._put, None, 0
                    self._store(words, items, now)
                    self._spare_others()
                if self._put and len(self._put[1]) > MAX_TEXT_ITEMS:
                    raise Refused("CLIENT_ERROR Too many items; limit=%d" % MAX_TEXT_ITEMS,
                                  close=True)
                if self._put_size > MAX_TEXT_PUT:
                    raise Refused("CLIENT_ERROR Items are too large together; limit=%d" % (
                        MAX_TEXT_PUT), close=True)
            except (Refused, OSError) as error:
                self._refuse(error)
        return pos

    def _command(self, words, now):
        if words and words[-1].endswith(b":"):             # items follow
            words[-1] = words[-1][:-1]
            self._put = [list(filter(None, words)), []]
            return
        command = _TEXT_COMMANDS.get(words[0].lower()) if words else None
        if command is None:
            self._refuse_http(words)
            raise Refused("CLIENT_ERROR Unknown command: %s" % os.fsdecode(b" ".join(words[:1])))
        command(self, words, now)

    def _refuse(self, error):
        why = error.answer.split(b" ", 1)[1].strip() if isinstance(error, Refused) else (
            os.fsencode(_why(error)))
        self._forget()
        self._say(self._failure(os.fsdecode(why), b""))
        if isinstance(error, Refused) and error.close:
            self._end()

    def _failure(self, why, answer):
        return b"-%b\n" % os.fsencode(why)

    def _forget(self):
        self._left = 0

    def _name_in(self, words):
        if len(words) < 2:
            raise Refused("CLIENT_ERROR Queue name required.")
        return _name(words[1])

    def _milliseconds(self, word, what):
        try:
            return _number(word, what)
        except Refused:
            raise Refused("CLIENT_ERROR Error parsing %s." % what) from None

    # -- commands

    def _store(self, words, items, now):
        # put <queue> [<milliseconds>]: and the items, up to an empty line
        if not words or words[0].lower() != b"put":
            self._command(words, now)
            return
        self._name_in(words)
        expiry = self._milliseconds(words[2], "expiration time") if len(words) > 2 else None
        self._check_writes()
        route = self.broker.routes.get(words[1]) or self._new_route(words[1], now)
        expiry = 0 if expiry is None else min(max(now + expiry, 1), _LATEST)
        self._begin(self._put_each(route, items, expiry, now, lambda count: self._say(
            b"+%d\n" % count, *route.queues)))

    def _put_nothing(self, words, now):
        self._name_in(words)
        self._say(b"+0\n")

    def _get(self, words, now):
        # get <queue> [<milliseconds>]: finishes the read before and opens the next
        self._begin_read(words, 1, now)
        if self.queue:
            self._end_reads(self.queue, 1, True, now)
        self._go_on(now)

    def _peek(self, words, now):
        self._begin_read(words, 1, now, peeking=True)
        self._go_on(now)

    def _monitor(self, words, now):
        # monitor <queue> <milliseconds> [<items>]
        self._begin_read(words, self._milliseconds(words[3], "count") if len(words) > 3
                         else UNLIMITED, now, watching=True)
        self._go_on(now)

    def _begin_read(self, words, count, now, peeking=False, watching=False):
        name = self._name_in(words)
        wait = self._milliseconds(words[2], "timeout") if len(words) > 2 else 0
        self._check_reads()
        self.queue = self.broker.find(name)
        if self.queue is None and not peeking:
            self.queue = self._new_queue(name, now)
        self._left = max(count, 1)
        self._waits = wait > 0
        self._peeking, self._watching = peeking, watching
        if self._waits:
            self.timeout = wait

    def _go_on(self, now):
        limit = self.broker.config.server.max_open_transactions
        while self._left and not self._is_to_pause():
            queue = self.queue
            if queue and not self._peeking and len(self._reads_of(queue)) >= limit:
                self._left = 0
                if not self._watching:
                    raise Refused("CLIENT_ERROR Too many open transactions; limit=%d" % limit)
                self._say(b"*\n")
                return
            item = queue and (queue.peek(now) if self._peeking else queue.remove(True, now))
            if item is None and self._has_to_sweep(now):
                return
            if item is None and queue and self._waits:
                self._wait(not self._peeking, self._peeking)
                return
            self._received(item, self._peeking)

    def _received(self, item, peek):
        stats = self.broker.stats
        if peek:
            stats.cmd_peek += 1
        else:
            stats.cmd_get += 1
            self._hit() if item is not None else self._missed()
        if item is None:
            self._left = 0
            self._say(b"*\n")
            return
        if not peek:
            self.open_reads.setdefault(self.queue, []).append(item.xid)
        self._left -= 1
        self._say(b":%b\n" % item.data, self.queue)
        if self._watching and not self._left:
            self._say(b"*\n")

    def _confirm(self, words, now):
        # confirm <queue> <count>
        if len(words) < 3 or not words[2].isdigit() or len(words[2]) > 20:
            raise Refused("CLIENT_ERROR Queue name & count required.")
        queue = self.broker.find(_name(words[1]))
        count = int(words[2])
        reads = self._reads_of(queue)
        if len(reads) < count:
            raise Refused("CLIENT_ERROR Not that many transactions open.")
        if count:
            self.open_reads[queue] = reads
            self._end_reads(queue, count, True, now)
        self._say(b"+%d\n" % count)

    def _flush(self, words, now):
        queue = self.broker.find(self._name_in(words))
        self._check_writes()
        if queue:
            self._drop(queue)
        self._say(b"+0\n", *filter(None, [queue]))

    def _delete(self, words, now):
        queue = self.broker.find(self._name_in(words))
        self._check_admin("delete")
        self._check_writes()
        if queue:
            self._drop(queue, True)
        self._say(b"+0\n", *filter(None, [queue]))

    def _status(self, words, now):
        if len(words) < 2:
            self._say(b":%b\n" % self.broker.status.encode())
            return
        self._change_status(words[1])
        self._say(b"+0\n")

    def _version(self, words, now):
        self._say(b":%b\n" % __version__.encode())


# (There are no users at the text and Thrift ports: Config has them go without an auth_file.)
_TEXT_COMMANDS = {
    b"put": TextSession._put_nothing,
    b"get": TextSession._get,
    b"peek": TextSession._peek,
    b"monitor": TextSession._monitor,
    b"confirm": TextSession._confirm,
    b"flush": TextSession._flush,
    b"delete": TextSession._delete,
    b"status": TextSession._status,
    b"version": TextSession._version,
    b"shutdown": TextSession._shutdown,
    b"quit": TextSession._quit,
}


# The types and kinds of messages of Thrift's binary protocol.
_BOOL, _BYTE, _DOUBLE, _I16, _I32, _I64, _STRING, _STRUCT, _MAP, _SET, _LIST = (
    2, 3, 4, 6, 8, 10, 11, 12, 13, 14, 15)
_CALL, _REPLY, _EXCEPTION, _ONEWAY = 1, 2, 3, 4
_UNKNOWN_METHOD, _INTERNAL_ERROR, _PROTOCOL_ERROR = 1, 6, 7
_STRICT = -0x7fff0000                    # 0x80010000, and the kind of message
_THRIFT_NUMBERS = {_BOOL: struct.Struct(">b"), _BYTE: struct.Struct(">b"),
                   _DOUBLE: struct.Struct(">d"), _I16: struct.Struct(">h"),
                   _I32: struct.Struct(">i"), _I64: struct.Struct(">q")}

# How much a frame of a Thrift client may be larger than the largest item, in bytes.
_FRAME_EXTRA = 64 << 10

# How much one get of a Thrift client is given at most.
_MOST_ITEMS = 2000
_MOST_BYTES = 16 << 20

# How many values there may be in one call of a Thrift client, and what a call adds to the load.
_MOST_VALUES = 10100
_CALL_COST = 4 << 10

# The numbers of kestrel.thrift's enum Status.
_THRIFT_STATUSES = {"QUIESCENT": 1, "READONLY": 2, "UP": 3, "WRITEAVOID": 3}


def _thrift_value(kind, data, pos, left, depth=0):
    """Read a value from data[pos]: returns it and where it ends. A struct becomes a dict of
    {field: (kind, value)}. left: a list of how many values there may be still. Raises ValueError
    and struct.error."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError("more than %d values in a call" % _MOST_VALUES)
    if kind in _THRIFT_NUMBERS:
        number = _THRIFT_NUMBERS[kind]
        return number.unpack_from(data, pos)[0], pos + number.size
    if depth > 16:
        raise ValueError("nested too deeply")
    if kind == _STRING:
        size, = struct.unpack_from(">i", data, pos)
        end = pos + 4 + size
        if size < 0 or end > len(data):
            raise ValueError("impossible size %d" % size)
        return data[pos + 4:end], end
    if kind == _STRUCT:
        fields = {}
        while data[pos:pos + 1] != b"\0":
            of, field = struct.unpack_from(">bh", data, pos)
            value, pos = _thrift_value(of, data, pos + 3, left, depth + 1)
            fields[field] = of, value
        return fields, pos + 1
    if kind in (_SET, _LIST, _MAP):
        kinds = data[pos:pos + 1 + (kind == _MAP)]
        pos += len(kinds)
        count, = struct.unpack_from(">i", data, pos)
        pos += 4
        if not 0 <= count <= len(data) - pos:
            raise ValueError("impossible count %d" % count)
        values = []
        for _ in range(count):
            for of in kinds:
                value, pos = _thrift_value(of, data, pos, left, depth + 1)
                values.append(value)
        return values, pos
    raise ValueError("unknown type %d" % kind)


class ThriftSession(Session):
    """One client of Kestrel's Thrift service (kestrel.thrift of 2.4): framed transport, binary
    protocol, strict or not, as in https://thrift.apache.org/docs/ and its specification."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._head = None               # (strict, name, sequence number, oneway) of the call
        self._get = None                # the _Get in hand

    def _parse(self, data, now):
        pos = 0
        while not (self.stalled or self.is_full()) and len(data) - pos >= 4:
            size, = struct.unpack_from(">i", data, pos)
            if not 0 < size <= self.settings.max_item_size + _FRAME_EXTRA:
                log.warning("a Thrift client sent a frame of %d bytes; closed", size)
                self._end()
                break
            end = pos + 4 + size
            if len(data) < end:
                self._needed = 4 + size
                break
            self._call(data[pos + 4:end], now)
            pos = end
        return pos

    def _call(self, frame, now):
        self.load += _CALL_COST
        try:
            self._head, kind, pos = _thrift_head(frame)
        except (ValueError, struct.error):
            self._end()
            return
        try:
            method, kinds = _THRIFT_METHODS.get(self._head[1], (None, None))
            if method is None or kind not in (_CALL, _ONEWAY):
                name = self._head[1].decode("utf-8", "replace")
                self._except("unknown method %s" % name, _UNKNOWN_METHOD)
                return
            fields, _ = _thrift_value(_STRUCT, frame, pos, [_MOST_VALUES])
            values = []
            for field, (of, default) in enumerate(kinds, 1):
                of_given, value = fields.get(field, (of, default))
                if of_given != of or value is None:
                    raise ValueError("field %d of %s is missing, or of another type" % (
                        field, self._head[1].decode()))
                values.append(value)
            method(self, now, *values)
        except (ValueError, struct.error, TypeError) as error:
            self._except(str(error), _PROTOCOL_ERROR)
        except (Refused, OSError) as error:
            self._refuse(error)

    def _answer(self, result, *queues):
        """Answer the call in hand with the fields of its result."""
        strict, name, number, oneway = self._head
        frame = _thrift_frame(strict, name, number, _REPLY, result)
        self._say(b"" if oneway else frame, *queues)

    def _except(self, why, kind=_INTERNAL_ERROR):
        self._say(self._failure(why, b"", kind))

    def _refuse(self, error):
        self._forget()
        self._except(_why(error) if isinstance(error, OSError)
                     else os.fsdecode(error.answer).split(" ", 1)[1].strip())

    def _failure(self, why, answer, kind=_INTERNAL_ERROR):
        """A TApplicationException, in the place of an answer or of that to the call in hand."""
        strict, name, number, oneway = _thrift_head(answer[4:])[0] if answer else self._head
        if oneway:
            return b""
        return _thrift_frame(strict, name, number, _EXCEPTION, _string_field(1, os.fsencode(why))
                             + struct.pack(">bhi", _I32, 2, kind))

    def _find(self, name):
        return self.broker.find(_name(name))

    # -- the methods of the service

    def _put(self, now, name, items, expiration):
        self._check_writes()
        if not all(isinstance(item, bytes) for item in items):
            raise ValueError("items are to be binary")
        route = self.broker.routes.get(name)
        if route is None:
            _name(name)
            route = self._new_route(name, now)
        expiry = now + expiration if expiration > 0 else 0
        if any(len(item) > self.settings.max_item_size for item in items):
            raise Refused("SERVER_ERROR object too large for cache")
        self._begin(self._put_each(route, items, expiry, now, lambda count: self._answer(
            _i32_field(0, count), *route.queues)))

    def _start_get(self, now, name, most, timeout, auto_abort):
        self._check_reads()
        self.queue = self._find(name) or self._new_queue(_name(name), now)
        # Open while others are waited for, so that they go back if the client leaves.
        self._get = _Get(min(most, _MOST_ITEMS), timeout > 0, timeout > 0 or auto_abort > 0,
                         max(auto_abort, 0), [])
        if timeout > 0:
            self.timeout = timeout
        self._go_on(now)

    def _go_on(self, now):
        get, queue = self._get, self.queue
        if get is None:
            return
        size = sum(len(item.data) for item in get.items)
        while queue and len(get.items) < get.most and size < _MOST_BYTES:
            item = queue.remove(get.opening, now)
            if item is None and self._has_to_sweep(now):
                return
            if item is None and get.waits:
                self._wait(True)
                return
            if item is None:
                break
            self._take(item)
            size += len(item.data)
        self._finish_get()

    def _take(self, item):
        self._get.items.append(item)
        self._rest_on(self.queue)
        if self._get.opening:
            self.open_reads.setdefault(self.queue, []).append(item.xid)

    def _received(self, item, peek):
        if item is None:
            self._get = self._get._replace(waits=False)      # the time is over
        else:
            self._take(item)

    def _finish_get(self):
        (_, _, _, auto_abort, items), self._get = self._get, None
        queue = self.queue
        self.broker.stats.cmd_get += 1
        self._hit() if items else self._missed()
        for xid in self.open_reads.pop(queue, ()):
            if auto_abort:
                queue.limit(xid, auto_abort)
            else:
                self._ended.append((queue, xid))
                queue.confirm(xid)
        self._answer(
            struct.pack(">bhbi", _LIST, 0, _STRUCT, len(items)) + b"".join([
                _string_field(1, item.data)
                + struct.pack(">bhqb", _I64, 2, item.xid if auto_abort else 0, 0)
                for item in items]), *filter(None, [queue]))

    def _forget(self):
        # What the get in hand has opened goes back.
        if self._get:
            self.queue.abort(*self.open_reads.pop(self.queue, ()), orphaned=True)
            self._get = None

    def _check_ids(self, ids):
        if not all(type(one) is int for one in ids):
            raise ValueError("ids are to be integers")

    def _confirm(self, now, name, ids):
        self._check_ids(ids)
        queue = self._find(name)
        count = sum([queue.confirm(xid) for xid in dict.fromkeys(ids)]) if queue else 0
        self._answer(_i32_field(0, count), *filter(None, [queue]))

    def _abort(self, now, name, ids):
        self._check_ids(ids)
        queue = self._find(name)
        count = queue.abort(*sorted(set(ids)), now=now) if queue else 0
        self._answer(_i32_field(0, count), *filter(None, [queue]))

    def _peek(self, now, name):
        self._check_reads()
        queue = self._find(name)
        self.broker.stats.cmd_peek += 1
        item = queue.peek(now) if queue else None
        stats = collections.defaultdict(int, queue.stats() if queue else ())
        self._answer(
            struct.pack(">bh", _STRUCT, 0)
            + (_string_field(1, item.data) if item is not None else b"")
            + b"".join([struct.pack(">bhq", _I64, field, stats[key]) for field, key in enumerate(
                ("items", "bytes", "logsize", "age"), 2)])
            + _i32_field(6, stats["waiters"]) + _i32_field(7, stats["open_transactions"])
            + b"\0", *filter(None, [queue]))

    def _flush(self, now, name):
        queue = self._find(name)
        self._check_writes()
        if queue:
            self._drop(queue)
        self._answer(b"", *filter(None, [queue]))

    def _flush_all(self, now):
        self._check_admin("flush_all_queues")
        self._check_writes()
        self._begin(self._flush_each(self._answer, b""))

    def _delete(self, now, name):
        queue = self._find(name)
        self._check_admin("delete_queue")
        self._check_writes()
        if queue:
            self._drop(queue, True)
        self._answer(b"", *filter(None, [queue]))

    def _status(self, now):
        self._answer(_i32_field(0, _THRIFT_STATUSES[self.broker.status]))

    def _set_status(self, now, number):
        self._check_admin("set_status")
        word = {number: word for word, number in reversed(_THRIFT_STATUSES.items())}.get(number)
        self.broker.set_status(word or "status %d" % number, self.who)
        self._answer(b"")

    def _version(self, now):
        self._answer(_string_field(0, __version__.encode()))


# most: how many items it wants. waits: whether it may wait for them. opening: whether they
# are open for now. auto_abort: in how many milliseconds they go back if they are not confirmed,
# 0 if they are taken for good.
_Get = collections.namedtuple("_Get", "most waits opening auto_abort items")


def _thrift_head(frame):
    """((strict, name, sequence number, oneway), kind of message, where its struct begins)."""
    size, = struct.unpack_from(">i", frame)
    strict = size < 0
    if strict:
        if size & -0x10000 != _STRICT:
            raise ValueError("not the binary protocol")
        name, pos = _thrift_value(_STRING, frame, 4, [1])
        number, = struct.unpack_from(">i", frame, pos)
        kind, pos = size & 0xff, pos + 4
    else:
        name, pos = _thrift_value(_STRING, frame, 0, [1])
        kind, number = struct.unpack_from(">bi", frame, pos)
        pos += 5
    return (strict, name, number, kind == _ONEWAY), kind, pos


def _thrift_frame(strict, name, number, kind, fields):
    """A message: a struct of these fields."""
    head = (struct.pack(">ii", _STRICT | kind, len(name)) + name + struct.pack(">i", number)
            if strict else
            struct.pack(">i", len(name)) + name + struct.pack(">bi", kind, number))
    return struct.pack(">i", len(head) + len(fields) + 1) + head + fields + b"\0"


def _string_field(field, data):
    return struct.pack(">bhi", _STRING, field, len(data)) + data


def _i32_field(field, number):
    return struct.pack(">bhi", _I32, field, number)


# name -> (method, (type, default) of each of its arguments, None where it has to be given)
_THRIFT_METHODS = {
    b"put": (ThriftSession._put, ((_STRING, None), (_LIST, None), (_I32, 0))),
    b"get": (ThriftSession._start_get, ((_STRING, None), (_I32, None), (_I32, 0), (_I32, 0))),
    b"confirm": (ThriftSession._confirm, ((_STRING, None), (_SET, None))),
    b"abort": (ThriftSession._abort, ((_STRING, None), (_SET, None))),
    b"peek": (ThriftSession._peek, ((_STRING, None),)),
    b"flush_queue": (ThriftSession._flush, ((_STRING, None),)),
    b"flush_all_queues": (ThriftSession._flush_all, ()),
    b"delete_queue": (ThriftSession._delete, ((_STRING, None),)),
    b"current_status": (ThriftSession._status, ()),
    b"set_status": (ThriftSession._set_status, ((_I32, None),)),
    b"get_version": (ThriftSession._version, ()),
}


# The longest head of an HTTP request, and the longest body, which is not looked at.
MAX_HEAD = 16384
MAX_BODY = 65536

_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
_HTML = "text/html; charset=utf-8"

# What is told of the server and of each queue: stat, kind, name in /stats.json, name in
# /metrics, what it is. The names of the first kind are those of Kestrel's own Ostrich stats.
_SERVER_FIGURES = [
    ("uptime", "gauge", "uptime", "uptime_seconds", "Seconds since the start."),
    ("curr_items", "gauge", "items", "items", "Items that wait, in all queues."),
    ("bytes", "gauge", "bytes", "bytes", "Data of the items that wait, in bytes."),
    ("reserved_memory_ratio", "gauge", "reserved_memory_ratio", "reserved_memory_ratio",
     "What all queues may take of the memory of the machine."),
    ("curr_connections", "gauge", "connections", "connections", "Open connections."),
    ("total_connections", "counter", "total_connections", "connections_total",
     "Connections ever."),
    ("total_items", "counter", "total_items", "items_put_total", "Items put, in all queues."),
    ("cmd_get", "counter", "cmd_get", "gets_total", "Gets."),
    ("cmd_set", "counter", "cmd_set", "sets_total", "Sets."),
    ("cmd_peek", "counter", "cmd_peek", "peeks_total", "Peeks."),
    ("get_hits", "counter", "get_hits", "get_hits_total", "Gets that were given an item."),
    ("get_misses", "counter", "get_misses", "get_misses_total", "Gets that were not."),
    ("bytes_read", "counter", "bytes_read", "received_bytes_total", "Bytes from clients."),
    ("bytes_written", "counter", "bytes_written", "sent_bytes_total", "Bytes to clients."),
    ("queue_creates", "counter", "queue_creates", "queue_creates_total", "Queues created."),
    ("queue_deletes", "counter", "queue_deletes", "queue_deletes_total", "Queues deleted."),
    ("queue_expires", "counter", "queue_expires", "queue_expires_total",
     "Queues that went by max_queue_age."),
]
_QUEUE_FIGURES = [
    ("items", "gauge", "items", "items", "Items that wait."),
    ("bytes", "gauge", "bytes", "bytes", "Data of the items that wait, in bytes."),
    ("mem_items", "gauge", "mem_items", "memory_items", "Items in memory."),
    ("mem_bytes", "gauge", "mem_bytes", "memory_bytes", "Data of the items in memory, in bytes."),
    ("logsize", "gauge", "journal_size", "journal_bytes", "Size of the journal files."),
    ("age", "gauge", "age_msec", "age_seconds",
     "How long the item that was read last had waited."),
    ("head_age", "gauge", "head_age_msec", "head_age_seconds",
     "How long the item at the head has waited."),
    ("waiters", "gauge", "waiters", "waiters", "Gets that wait for an item."),
    ("open_transactions", "gauge", "open_transactions", "open_reads", "Reads that are open."),
    ("create_time", "gauge", "create_time", "created_timestamp_seconds",
     "When the queue was created or loaded."),
    ("fsync_usec", "gauge", "fsync_usec", "fsync_seconds", "How long the last fsync took."),
    ("total_items", "counter", "put_items", "put_items_total", "Items put."),
    ("put_bytes", "counter", "put_bytes", "put_bytes_total", "Data of the items put."),
    ("get_hits", "counter", "get_items_hit", "get_items_total", "Items taken."),
    ("get_bytes", "counter", "get_bytes", "get_bytes_total", "Data of the items taken."),
    ("get_misses", "counter", "get_items_miss", "get_misses_total", "Gets given no item."),
    ("expired_items", "counter", "expired_items", "expired_items_total", "Items that expired."),
    ("discarded", "counter", "discarded", "discarded_items_total",
     "Items dropped for newer ones in a full queue."),
    ("transactions", "counter", "transactions", "opened_reads_total", "Reads opened."),
    ("canceled_transactions", "counter", "canceled_transactions", "aborted_reads_total",
     "Open reads whose item went back."),
    ("total_flushes", "counter", "flushes", "flushes_total", "Flushes."),
    ("journal_rewrites", "counter", "journal_rewrites", "journal_rewrites_total",
     "Times the journal was written anew."),
    ("journal_rotations", "counter", "journal_rotations", "journal_rotations_total",
     "Times a journal file was full."),
]
# Of the broker's metrics: the name in /metrics, and what it is.
_METRICS = {
    "turn_usec": ("turn_seconds", "Turns of the loop."),
    "fsync_usec": ("fsync_seconds", "Fsyncs of journals."),
    "delivery_latency_msec": ("delivery_latency_seconds", "How long items had waited."),
}

# What a value is multiplied with to be in seconds, by the end of Kestrel's name for it.
_SCALES = {"usec": 1e-6, "msec": 1e-3, "time": 1e-3}


def _shown_name(name):
    """The name of a queue as text that can be shown anywhere, and is that of no other queue:
    no name has a slash in it."""
    return re.sub("[\udc80-\udcff]", lambda match: "/x%02x" % (ord(match[0]) - 0xdc00), name)


def _label(name):
    """The name of a queue as the value of a label in the Prometheus text format."""
    return _shown_name(name).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class AdminSession(Session):
    """One client of the admin port: HTTP/1.1 (RFC 9112), as much of it as monitoring, load
    balancers and a browser need. Requests come one after the other on a connection."""

    idle_timeout = 60000

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._method = "GET"             # of the request in hand
        self._keep_alive = False         # after the answer to it
        self._call = None                # what it asks for, while it is found out who asks
        self._query = {}

    def _parse(self, data, now):
        pos = 0
        while not (self.stalled or self.is_full()):
            self._method, self._keep_alive = "GET", False
            try:
                while data[pos:pos + 2] == b"\r\n":        # RFC 9112, 2.2
                    pos += 2
                end = data.find(b"\r\n\r\n", pos, pos + MAX_HEAD)
                if not data[pos:pos + 1].isalpha() and data[pos:]:
                    raise ValueError("not a request of HTTP/1.1")      # TLS, perhaps
                if end < 0:
                    if len(data) - pos >= MAX_HEAD:
                        self._respond(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
                    break
                line, headers = self._parse_head(data[pos:end])
                size = int(headers.get("content-length", 0))
                if size > MAX_BODY:
                    self._keep_alive = False
                    self._respond(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
                    break
                if len(data) < end + 4 + size:
                    self._needed = end + 4 + size - pos
                    break
                pos = end + 4 + size
                self._request(line[1], headers, now)
            except ValueError as error:
                self._keep_alive = False
                self._respond(HTTPStatus.BAD_REQUEST, str(error))
            except (Refused, OSError) as error:
                self._refuse(error)
        return pos

    def _parse_head(self, head):
        """The words of the request line, and the headers by name in lower case. Raises
        ValueError."""
        first, *lines = head.decode("latin-1").split("\r\n")
        line = first.split(" ")
        if len(line) != 3 or not re.fullmatch(r"HTTP/1\.[01]", line[2]):
            raise ValueError("not a request of HTTP/1.1: %.100r" % first)
        headers = {}
        for text in lines:
            name, colon, value = text.partition(":")
            if (not colon or not re.fullmatch(r"[!#-'*+.^-z|~A-Z0-9-]+", name)
                    or re.search("[\r\n\0]", value)):
                raise ValueError("not a header: %.100r" % text)
            if name.lower() in headers and name.lower() in ("content-length", "host", "origin"):
                raise ValueError("%s is there twice" % name)
            headers[name.lower()] = value.strip(" \t")
        if not headers.get("content-length", "0").isdigit() or len(
                headers.get("content-length", "")) > 18:
            raise ValueError("bad Content-Length")
        if "transfer-encoding" in headers:
            raise ValueError("a body must have a Content-Length here")
        self._method = line[0]
        self._keep_alive = line[2] == "HTTP/1.1" and (
            "close" not in headers.get("connection", "").lower())
        return line, headers

    def _request(self, target, headers, now):
        self._pass_turn()
        parts = urllib.parse.urlsplit(target)
        # As bytes, since so came what was not quoted; and in no name is a + a blank.
        query = os.fsdecode(parts.query.encode("latin-1")).replace("+", "%2B")
        self._query = urllib.parse.parse_qs(query, errors="surrogateescape")
        method, call = _ADMIN_PATHS.get(parts.path, (None, None))
        if call is None:
            self._respond(HTTPStatus.NOT_FOUND)
        elif self._method not in (("POST",) if method == "POST" else ("GET", "HEAD")):
            self._respond(HTTPStatus.METHOD_NOT_ALLOWED,
                          header="Allow: " + ("POST" if method == "POST" else "GET, HEAD"))
        elif method == "POST" and urllib.parse.urlsplit(
                headers.get("origin", "//" + headers.get("host", ""))).netloc != headers.get(
                    "host", ""):
            # A page of elsewhere, open in the browser of somebody who may come in here.
            self._respond(HTTPStatus.FORBIDDEN, "this is taken from pages of this server only")
        elif self.broker.config.users is None or parts.path in _PROBES:
            call(self, now)
        else:
            self._call = call
            scheme, _, token = headers.get("authorization", "").partition(" ")
            if scheme.lower() == "basic":              # RFC 7617
                name, _, password = base64.b64decode(token, validate=True).partition(b":")
                self._log_in(name, password)
            else:
                self.user = None
                self._go_on(now)

    # -- answers

    def _respond(self, status, text=None, kind=_TEXT, header=None, queues=()):
        """Answer the request in hand; text: None for what the status says."""
        body = (status.phrase if text is None else text).rstrip("\n") + "\n"
        body = body.encode("utf-8", "backslashreplace")
        head = ("HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n"
                "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n%s%s%s\r\n" % (
                    status, status.phrase, kind, len(body),
                    header + "\r\n" if header else "",
                    "Content-Security-Policy: %s\r\n" % _page_policy() if kind == _HTML else "",
                    "" if self._keep_alive else "Connection: close\r\n"))
        self._say(head.encode() + (b"" if self._method == "HEAD" else body), *queues)
        if not self._keep_alive:
            self._end()

    def _refuse(self, error):
        if isinstance(error, OSError):
            self._respond(HTTPStatus.INTERNAL_SERVER_ERROR, _why(error))
        else:
            self._respond(HTTPStatus.SERVICE_UNAVAILABLE if error.close else
                          HTTPStatus.FORBIDDEN, os.fsdecode(error.answer).split(" ", 1)[1].strip())

    def _failure(self, why, answer):
        return b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: %d\r\n\r\n%b\n" % (
            len(os.fsencode(why)) + 1, os.fsencode(why))

    def _go_on(self, now):
        call, self._call = self._call, None
        if call and self.user is None:
            self._respond(HTTPStatus.UNAUTHORIZED,
                          header='WWW-Authenticate: Basic realm="kestrel"')
        elif call:
            call(self, now)

    def _forget(self):
        pass

    # -- what is asked for

    def _page(self, now):
        self._respond(HTTPStatus.OK, _PAGE, _HTML)

    def _ping(self, now):
        self._respond(HTTPStatus.OK, "pong")

    def _status(self, now):
        self._respond(HTTPStatus.OK, self.broker.status)

    def _readable(self, now):
        self._tell_refusal(self.broker.refuses_reads)

    def _writable(self, now):
        self._tell_refusal(self.broker.refuses_writes)

    def _tell_refusal(self, why):
        self._respond(HTTPStatus.SERVICE_UNAVAILABLE if why else HTTPStatus.OK, why or None)

    def _each_queue(self, now, tell, finish):
        """A job: call `tell` with each queue and its stats, some in each turn, then `finish`."""
        for count, name in enumerate(sorted(self.broker.queues), 1):
            queue = self.broker.queues.get(name)
            if queue and name not in self.broker.config.aliases:
                tell(queue, dict(queue.stats(now)))
            if count % (SWEEP_STEP // 10) == 0:
                yield
        finish()

    def _report(self, now, line, finish):
        """Begin a job: line(name, value) of all there is to tell, under Kestrel's names, then
        finish({"counters": lines, "gauges": lines, "labels": lines, "metrics": lines})."""
        stats = dict(self.broker.server_stats(now))
        report = {"counters": [], "gauges": [],
                  "labels": [line("status", self.broker.status), line("version", __version__)],
                  "metrics": [line(name, metric.figures())
                              for name, metric in self.broker.metrics.items()]}
        for key, kind, name, _, _ in _SERVER_FIGURES:
            report[kind + "s"].append(line(name, json.loads(str(stats[key]))))

        def tell(queue, stats):
            for key, kind, name, _, _ in _QUEUE_FIGURES:
                report[kind + "s"].append(line(
                    "q/%s/%s" % (_shown_name(queue.name), name), stats[key]))

        self._put_off(self._each_queue(now, tell, lambda: finish(report)))

    def _stats_json(self, now):
        self._report(
            now, lambda name, value: "%s:%s" % (json.dumps(name), json.dumps(value)),
            lambda report: self._respond(HTTPStatus.OK, "{%s}" % ",".join(
                '"%s":{%s}' % (kind, ",".join(lines)) for kind, lines in report.items()), _JSON))

    def _stats_txt(self, now):
        self._report(
            now, lambda name, value: "  %s: %s" % (name, ", ".join(
                "%s=%s" % pair for pair in value.items()) if isinstance(value, dict) else value),
            lambda report: self._respond(HTTPStatus.OK, "\n".join(
                "%s:\n%s" % (kind, "\n".join(lines)) for kind, lines in report.items())))

    def _metrics(self, now):
        # https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4
        stats = dict(self.broker.server_stats(now))
        lines = []
        for key, kind, _, name, what in _SERVER_FIGURES:
            lines += _described("kestrel_" + name, kind, what)
            lines.append("kestrel_%s %s" % (name, stats[key]))
        for key, (name, what) in _METRICS.items():
            name, metric, seen = "kestrel_" + name, self.broker.metrics[key], 0
            lines += _described(name, "histogram", what)
            for bits, count in enumerate(metric.buckets):
                seen += count
                if bits <= metric.longest.bit_length():
                    lines.append('%s_bucket{le="%.9g"} %d' % (
                        name, ((1 << bits) - 1) * _scale(key), seen))
            lines += ['%s_bucket{le="+Inf"} %d' % (name, seen), "%s_count %d" % (name, seen),
                      "%s_sum %.9g" % (name, metric.total * _scale(key))]
        per_queue = {figure[0]: [] for figure in _QUEUE_FIGURES}

        def tell(queue, stats):
            label = _label(queue.name)
            for key, _, ostrich, name, _ in _QUEUE_FIGURES:
                per_queue[key].append('kestrel_queue_%s{queue="%s"} %.12g' % (
                    name, label, stats[key] * _scale(ostrich)))

        def finish():
            for key, kind, _, name, what in _QUEUE_FIGURES:
                if per_queue[key]:
                    lines.extend(_described("kestrel_queue_" + name, kind, what))
                    lines.extend(per_queue[key])
            self._respond(HTTPStatus.OK, "\n".join(lines),
                          "text/plain; version=0.0.4; charset=utf-8")

        self._put_off(self._each_queue(now, tell, finish))

    # -- for the page

    def _queues_json(self, now):
        stats = dict(self.broker.server_stats(now))
        facts = {key: stats[key] for key in ("version", "uptime", "put_rate", "get_rate")}
        facts.update(status=self.broker.status, connections=stats["curr_connections"],
                     items=stats["curr_items"])
        pieces = []

        def tell(queue, stats):
            row = {key: stats[key] for key in (
                "items", "bytes", "head_age", "put_rate", "get_rate", "open_transactions",
                "waiters", "logsize")}
            row.update(name=_shown_name(queue.name),
                       key=urllib.parse.quote(os.fsencode(queue.name), safe=""))
            pieces.append(json.dumps(row))

        self._put_off(self._each_queue(now, tell, lambda: self._respond(
            HTTPStatus.OK, '%s,"queues":[%s]}' % (
                json.dumps(facts)[:-1], ",".join(pieces)), _JSON)))

    def _history_json(self, now):
        history = {}
        for name in self._query.get("queue", [])[:SWEEP_STEP // 10]:
            queue = self.broker.find(name)
            if queue:
                history[urllib.parse.quote(os.fsencode(name), safe="")] = (
                    self.broker.history(queue))
        self._respond(HTTPStatus.OK, json.dumps(history), _JSON)

    def _peek(self, now):
        self._check_reads()
        queue = self._asked_queue()
        if queue:
            self._check_user("get_users", queue.name)
            item = queue.peek(now)
            self._respond(HTTPStatus.OK, json.dumps({"item": item and {
                "bytes": len(item.data), "flags": item.flags,
                "age_msec": max(0, now - item.add_time),
                "text": item.data[:2000].decode("utf-8", "backslashreplace")}}), _JSON)

    # -- what changes something

    def _asked_queue(self):
        """The queue that the request names, or None, which it has then been told."""
        queue = self.broker.find(self._query.get("queue", [""])[0])
        if queue is None:
            self._respond(HTTPStatus.NOT_FOUND, "there is no such queue")
        return queue

    def _flush(self, now):
        self._check_writes()
        queue = self._asked_queue()
        if queue:
            self._drop(queue)
            self._respond(HTTPStatus.OK, "flushed", queues=[queue])

    def _delete(self, now):
        self._check_admin("delete")
        self._check_writes()
        queue = self._asked_queue()
        if queue:
            self._drop(queue, True)
            self._respond(HTTPStatus.OK, "deleted", queues=[queue])

    def _reload(self, now):
        self._check_admin("reload")
        try:
            self.broker.reload(self.who)
        except ConfigError as error:
            self._respond(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        else:
            self._respond(HTTPStatus.OK, "reloaded")

    def _quiesce(self, now):
        self._check_admin("status")
        self.broker.set_status("quiescent", self.who)
        self._respond(HTTPStatus.OK, "quiescent")

    def _stop(self, now):
        self._shutdown([], now)
        self._keep_alive = False
        self._respond(HTTPStatus.OK, "stopping")


def _scale(name):
    return _SCALES.get(name.rpartition("_")[2], 1)


def _described(name, kind, what):
    return ["# HELP %s %s" % (name, what), "# TYPE %s %s" % (name, kind)]


# What is asked for, and what has to be POSTed.
_ADMIN_PATHS = {
    "/": ("GET", AdminSession._page),
    "/ping": ("GET", AdminSession._ping),
    "/status": ("GET", AdminSession._status),
    "/readable": ("GET", AdminSession._readable),
    "/writable": ("GET", AdminSession._writable),
    "/stats.json": ("GET", AdminSession._stats_json),
    "/stats.txt": ("GET", AdminSession._stats_txt),
    "/metrics": ("GET", AdminSession._metrics),
    "/queues.json": ("GET", AdminSession._queues_json),
    "/history.json": ("GET", AdminSession._history_json),
    "/peek": ("GET", AdminSession._peek),
    "/flush": ("POST", AdminSession._flush),
    "/delete": ("POST", AdminSession._delete),
    "/reload": ("POST", AdminSession._reload),
    "/quiesce": ("POST", AdminSession._quiesce),
    "/shutdown": ("POST", AdminSession._stop),
}

# What load balancers ask for, who have no password.
_PROBES = ("/ping", "/readable", "/writable")

# The page at /: it asks for /queues.json and /history.json, and shows what comes as text only.
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Kestrel</title>
<link rel="icon" href="data:,">
<style>
:root { --ink: #1d2733; --soft: #66727f; --line: #e2e6ea; --back: #fff; --tint: #f5f7f9;
  --in: #1769aa; --out: #b4540a; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe5ea; --soft: #93a0ac; --line: #2c353e;
  --back: #14191e; --tint: #1b2127; --in: #6cb6ff; --out: #f0a35e; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; color: var(--ink);
  background: var(--back); font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.25rem; margin: 0 }
header, .facts { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: baseline }
.facts { margin: 1rem 0; padding: 0 }
.facts div { min-width: 6rem }
dt, th, .soft, caption { color: var(--soft); font-size: .85rem; font-weight: normal }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums }
#problem { color: var(--bad); font-weight: 600 }
input, button { font: inherit; color: inherit; background: var(--back);
  border: 1px solid var(--line); border-radius: .3rem; padding: .25rem .6rem }
button { cursor: pointer }
button:hover { background: var(--tint) }
:focus-visible { outline: 2px solid var(--in); outline-offset: 1px }
.wide { overflow-x: auto; margin-top: .75rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left; white-space: normal;
  overflow-wrap: anywhere; min-width: 9rem; width: 30%; position: sticky; left: 0;
  background: var(--back) }
th button { border: 0; padding: 0; background: none; color: var(--soft) }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
tbody tr:hover { background: var(--tint) }
svg { display: block; width: 130px; height: 30px; overflow: visible }
path { fill: none; stroke-width: 1.3; vector-effect: non-scaling-stroke }
.depth { stroke: var(--soft) } .in { stroke: var(--in) } .out { stroke: var(--out) }
.key { display: inline-block; width: .9em; height: .2em; vertical-align: middle }
@media (max-width: 40rem) {
  table, thead, tbody { display: block }
  thead tr { display: flex; flex-wrap: wrap; gap: .2rem .9rem }
  th, td { border: 0; padding: .1rem 0; width: auto }
  th:empty { display: none }
  tbody tr { display: grid; grid-template-columns: repeat(4, 1fr); padding: .6rem 0;
    border-bottom: 1px solid var(--line) }
  td, td:first-child { text-align: left; position: static }
  td:first-child, td:last-child, td:nth-last-child(2) { grid-column: 1 / -1 }
  td[data-title]:not(:first-child)::before { content: attr(data-title); display: block;
    color: var(--soft); font-size: .8rem } }
dialog { color: inherit; background: var(--back); border: 1px solid var(--line);
  border-radius: .5rem; max-width: min(40rem, 92vw) }
dialog pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 50vh; overflow: auto;
  background: var(--tint); padding: .5rem }
dialog p:last-child { text-align: right; margin-bottom: 0 }
</style>
<header>
  <h1>Kestrel <span id="version" class="soft"></span></h1>
  <strong id="status">&hellip;</strong>
  <span id="problem" role="alert"></span>
</header>
<dl class="facts" id="facts"></dl>
<label>Filter <input id="filter" type="search" autocomplete="off"></label>
<span class="soft" id="shown" role="status"></span>
<div class="wide"><table>
  <thead><tr id="heads"></tr></thead>
  <tbody id="queues"></tbody>
</table></div>
<p class="soft">Charts, the last ten minutes:
  <span class="key" style="background: var(--soft)"></span> items,
  <span class="key" style="background: var(--in)"></span> put a second,
  <span class="key" style="background: var(--out)"></span> got a second; each to its own scale
  but for the two rates, which share one.</p>
<dialog id="dialog"><p id="question"></p><pre id="item" hidden></pre>
  <p><button id="no">Close</button> <button id="yes"></button></p></dialog>
<script>
"use strict"
const MOST_ROWS = 200, EVERY = 2000
const at = id => document.getElementById(id)
const number = new Intl.NumberFormat("en", {maximumFractionDigits: 1})
const bytes = n => { let unit = 0; while (n >= 1000 && unit < 4) { n /= 1024; unit++ }
  return number.format(n) + " " + ["B", "kB", "MB", "GB", "TB"][unit] }
const time = s => s < 1 ? Math.round(s * 1000) + " ms" : s < 120 ? Math.round(s) + " s"
  : s < 7200 ? Math.round(s / 60) + " min" : s < 172800 ? Math.round(s / 3600) + " h"
  : Math.round(s / 86400) + " d"
const columns = [["Queue", "name", x => x], ["Items", "items", number.format],
  ["Bytes", "bytes", bytes], ["Oldest", "head_age", ms => ms ? time(ms / 1000) : "–"],
  ["Put/s", "put_rate", number.format], ["Got/s", "get_rate", number.format],
  ["Open", "open_transactions", number.format], ["Waiters", "waiters", number.format],
  ["Journal", "logsize", bytes]]
let data = null, sort = "name", down = false, charts = {}, turn = 0
function make(tag, text, parent) {
  const one = document.createElement(tag)
  one.textContent = text
  if (parent) parent.append(one)
  return one
}
for (const [title, key] of columns) {
  const button = make("button", title, make("th", "", at("heads")))
  button.parentNode.dataset.key = key
  button.onclick = () => { down = sort === key ? !down : key !== "name"; sort = key; show() }
}
make("th", "Ten minutes", at("heads")); make("th", "", at("heads"))
function line(values, most, kind) {
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path")
  path.setAttribute("class", kind)
  path.setAttribute("d", values.map((value, n) => (n ? "L" : "M")
    + (130 - 130 * (values.length - 1 - n) / 119).toFixed(1) + " "
    + (29 - 28 * value / most).toFixed(1)).join(""))
  return path
}
function chart(queue) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg")
  const samples = charts[queue.key] || []
  const [items, put, got] = [0, 1, 2].map(n => samples.map(sample => sample[n]))
  svg.setAttribute("role", "img")
  svg.setAttribute("aria-label", "items and rates of " + queue.name)
  if (samples.length > 1) {
    const rate = Math.max(1, ...put, ...got)
    svg.append(line(items, Math.max(1, ...items), "depth"), line(put, rate, "in"),
      line(got, rate, "out"))
  }
  return svg
}
function rows() {
  const wanted = at("filter").value.toLowerCase()
  const found = data.queues.filter(queue => queue.name.toLowerCase().includes(wanted))
  found.sort((a, b) => (a[sort] > b[sort]) - (a[sort] < b[sort]) || (a.key > b.key) - 0.5)
  if (down) found.reverse()
  return found
}
function show() {
  at("version").textContent = data.version
  at("status").textContent = data.status.toLowerCase()
  const facts = [["Up", time(data.uptime)], ["Connections", number.format(data.connections)],
    ["Queues", number.format(data.queues.length)], ["Items", number.format(data.items)],
    ["Put/s", number.format(data.put_rate)], ["Got/s", number.format(data.get_rate)]]
  at("facts").replaceChildren(...facts.map(([name, value]) => {
    const both = document.createElement("div")
    make("dt", name, both); make("dd", value, both)
    return both }))
  for (const head of at("heads").children)
    head.setAttribute("aria-sort", head.dataset.key !== sort ? "none"
      : down ? "descending" : "ascending")
  const found = rows(), focused = document.activeElement && document.activeElement.dataset.focus
  at("shown").textContent = !data.queues.length
    ? "No queues yet: the first put or get of a name makes one."
    : !found.length ? "No queue of that name."
    : found.length > MOST_ROWS ? MOST_ROWS + " of " + found.length + " shown." : ""
  at("queues").replaceChildren(...found.slice(0, MOST_ROWS).map(queue => {
    const row = document.createElement("tr")
    for (const [title, key, text] of columns)
      make("td", text(queue[key]), row).dataset.title = title
    make("td", "", row).append(chart(queue))
    const cell = make("td", "", row)
    for (const [title, act] of [["Peek", peek], ["Flush", change], ["Delete", change]]) {
      const button = make("button", title, cell)
      button.dataset.focus = title + queue.key
      button.setAttribute("aria-label", title + " " + queue.name)
      button.onclick = () => act(queue, title)
      cell.append(" ")
    }
    return row }))
  if (focused) for (const one of document.querySelectorAll("[data-focus]"))
    if (one.dataset.focus === focused) one.focus()
}
function ask(question, yes, act, item) {
  at("question").textContent = question
  at("item").hidden = item === undefined
  at("item").textContent = item === undefined ? "" : item
  at("yes").hidden = !yes
  at("yes").textContent = yes
  at("yes").onclick = () => { at("dialog").close(); act() }
  at("dialog").showModal()
}
at("no").onclick = () => at("dialog").close()
async function fetched(path, options) {
  const answer = await fetch(path, options)
  if (!answer.ok) throw new Error(await answer.text())
  return answer
}
async function peek(queue) {
  const {item} = await (await fetched("peek?queue=" + queue.key)).json()
  ask(item ? `Head of ${queue.name}: ${bytes(item.bytes)}, waiting for `
    + time(item.age_msec / 1000) : `${queue.name} is empty.`, "", null, item ? item.text : undefined)
}
function change(queue, title) {
  ask(`${title} ${queue.name}, with ${number.format(queue.items)} items? They are gone then.`,
    title, async () => {
      try { await fetched(`${title.toLowerCase()}?queue=${queue.key}`, {method: "POST"}) }
      catch (error) { ask(error.message, "", null) }
      refresh() })
}
async function refresh() {
  try {
    data = await (await fetched("queues.json")).json()
    const wanted = rows().slice(0, 50).map(queue => "queue=" + queue.key).join("&")
    if (turn++ % 2 === 0 && wanted) charts = await (await fetched("history.json?" + wanted)).json()
  } catch (error) {
    at("problem").textContent = "The server does not answer" + (data ? "; this is old." : ".")
    at("status").textContent = "unreachable"
    return
  }
  at("problem").textContent = ""
  show()
}
at("filter").oninput = () => data && show()
async function always() { if (!document.hidden) await refresh(); setTimeout(always, EVERY) }
always()
</script>
</html>
"""


@functools.lru_cache(maxsize=None)
def _page_policy():
    """A Content-Security-Policy that lets the page's own script run, and no other."""
    script = _PAGE.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return ("default-src 'none'; script-src 'sha256-%s'; style-src 'unsafe-inline'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'" % digest)


# == 7. Server ============================================================================
#
# Sockets, time, fsync, signals: the loop that feeds the sessions and sends their answers.
# Knows nothing of records or of command words.

# So many waits in a row must have been shorter than busy_poll for the next to be polled.
_SHORT_WAITS = 4

# How long a status_command may run.
_ANNOUNCE_SECONDS = 30

# How long a journal must have been written without a failure to be called well.
_CALM_SECONDS = 3

# How many queues are being fsynced at once, each of which takes descriptors; and when it is
# tried again if there were none, in milliseconds.
_SYNCS = 64
_SYNC_AGAIN_MS = 50

# How many descriptors the server needs besides those of connections, journals and fsyncs.
_OTHER_FILES = 20

# How long fsyncs are waited for before the end.
_LAST_SECONDS = 30

# How many connections are seen to in a turn, of these how many TLS handshakes, for how long jobs
# in hand are, how many new ones by each listener, and how often the log tells of those refused.
_EVENTS = 1000
_GREETINGS = 8
_WORK_SECONDS = 0.005
_ACCEPTS = 256
_TELL_SECONDS = 10

# How often it is looked after clients who have said too much to be listened to.
_LOOK_SECONDS = 1

# IOV_MAX: how many pieces one sendmsg() takes.
_MAX_VECTOR = 1024

# How much is read from a socket at a time, and how much unparsed input a session that
# waits may pile up before its socket is left alone.
_CHUNK = 1 << 16

# How much is sent to a client in a turn, though it would take more.
_MOST_SENT = 1 << 17

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

# What is spoken at a port, which is set by memcache_port and so on.
_PROTOCOLS = {"memcache": MemcacheSession, "text": TextSession, "thrift": ThriftSession,
              "admin": AdminSession}


def _guard(call, *arguments):
    """Make a call. What nobody foresaw is logged, and does not end the server."""
    try:
        call(*arguments)
    except Exception:
        log.exception("unexpected")


class Timers:
    """Calls to be made at a time, on a heap. Times are seconds of the monotonic clock."""

    def __init__(self):
        self._heap = []                  # [when, serial, call or None if cancelled]
        self._serial = itertools.count()
        self._cancelled = 0

    def at(self, when, call):
        """Make `call` at `when`, or as soon after as run() is called; returns its entry."""
        entry = [when, next(self._serial), call]
        heapq.heappush(self._heap, entry)
        return entry

    def cancel(self, entry):
        """Do not make that call. Its entry goes at its time, or when half of them are such."""
        if entry[2] is None:
            return
        entry[2] = None
        self._cancelled += 1
        if self._cancelled * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2] is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def wait(self, mono):
        """Seconds until there may be something to do, None if there is nothing."""
        # An hour at most: select() cannot wait for years.
        return min(max(0, self._heap[0][0] - mono), 3600) if self._heap else None

    def run(self, mono):
        """Make the calls that are due."""
        while self._heap and self._heap[0][0] <= mono:
            entry = heapq.heappop(self._heap)
            call, entry[2] = entry[2], None
            if call:
                _guard(call)
            else:
                self._cancelled -= 1


class Worker:
    """A thread for calls that block, above all fsync, so that the loop never does.

    `done` is filled with (call, OSError or None, seconds that it took); `wake` is called
    after each, from the thread. `unfinished` counts what is not in `done` yet or still there.
    """

    def __init__(self, wake):
        self.done = collections.deque()
        self.unfinished = 0
        self._wake = wake
        self._jobs = queues.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    def submit(self, work, call):
        """Have `work` done, which returns an OSError or None; then pass on `call` and that."""
        self.unfinished += 1
        self._jobs.put((work, call))

    def take_results(self):
        """Make the calls for what has been done."""
        while self.done:
            call, error, seconds = self.done.popleft()
            self.unfinished -= 1
            _guard(call, error, seconds)

    def stop(self):
        """Finish what has been submitted and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self):
        for work, call in iter(self._jobs.get, None):
            start = time.monotonic()
            try:
                error = work()
            except OSError as failure:
                error = _bare(failure)
            except Exception:                          # it must not end the thread
                log.exception("unexpected, on the worker thread")
                error = OSError(errno.EIO, "unexpected, see the log")
            self.done.append((call, error, time.monotonic() - start))
            self._wake()


def _announce_all(command, endpoints, statuses):
    """Run the status_command with each status that comes; in a thread of its own."""
    for status in iter(statuses.get, None):
        try:
            subprocess.run([*shlex.split(command), status, *endpoints], check=True,
                           timeout=_ANNOUNCE_SECONDS, stdin=subprocess.DEVNULL)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            log.error("status_command: %s", error)


def _first_of(pieces, size):
    """The first `size` bytes, or so many as one sendmsg() takes, as a list of pieces."""
    taken = []
    for piece in pieces[:_MAX_VECTOR]:
        if size <= 0:
            break
        taken.append(memoryview(piece)[:size])
        size -= len(piece)
    return taken


class TLSSocket(ssl.SSLSocket):
    """A client's socket with TLS on it, which can be used as a plain one that does not block:
    the handshake is part of the first reads."""

    _is_over = False                 # after shutdown()

    def recv(self, size):
        if self._is_over:
            return super().recv(size)    # in plain, to be thrown away
        try:
            return self.read(size)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except ValueError as error:      # it was gone before it was wrapped, and so is not
            raise ConnectionError(str(error)) from None

    def send(self, data):
        try:
            return super().send(data) if data else 0       # to send nothing is an error to some
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def sendmsg(self, buffers):
        # To go on after a wait OpenSSL wants to see the same again, or more.
        return self.send(b"".join(buffers))

    def shutdown(self, how):
        with contextlib.suppress(OSError, ValueError):
            self.unwrap()                # says that this is the end, and does not wait for its echo
        self._is_over = True
        super().shutdown(how)


class Connection:
    """A client's socket and the session on it."""

    def __init__(self, server, sock, session):
        self.server = server
        self.sock = sock
        self.session = session
        session.wake = functools.partial(server.woken.append, self)
        self.holds = 0                   # how many queues have to be safe before answers go
        self.since = self.last_active = server.mono
        self.is_greeting = isinstance(sock, TLSSocket)         # the handshake is not done
        self._unsent = []
        self._watched = _READ
        self._checked = 0                # entries of session.touched seen by settle()
        self._deadline = self._alarm = self.idle_alarm = None
        self._send_alarm = self._look_alarm = None
        self._sent = 0                   # bytes sent since _watch_sending()
        self._at_end = False             # the client will send no more
        self._finished = False           # nothing more will be said
        self.is_paused = False           # it is not listened to, for it has said too much
        self.closed = False
        self.is_traced = server.config.server.enable_session_trace
        if self.is_traced:
            trace.info("%s: connected", session.who)
        server.selector.register(sock, self._watched, self)

    def is_idle(self):
        """Whether the next word is the client's."""
        return not (self.session.waiter or self.session.job or self.session.out or self.holds
                    or self._unsent)

    def is_sending(self):
        """Whether there are answers that the kernel has not taken yet."""
        return bool(self._unsent)

    def ready(self, mask):
        """The socket can be read or written."""
        if mask & _WRITE:
            self.flush()
        if not mask & _READ or self.closed:
            return
        try:
            data = self.sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError as error:         # reset: gone, like one that closed
            if isinstance(error, ssl.SSLError):
                log.info("%s: TLS: %s", self.session.who, error.reason or error)
            data = b""
        if not data:
            self._hang_up()
            return
        server = self.server
        server.broker.stats.bytes_read += len(data)
        self.last_active = server.mono
        self.is_greeting = False
        if self._at_end:                 # we have said all that we will
            return
        if self.is_traced:
            trace.info("%s: says %r", self.session.who, data[:200])
        session = self.session
        session.most_load = server.share
        session.feed(data, server.now)
        server.active.append(self)
        if session.stalled or session.unparsed or self.is_paused:
            self._after_feed()

    def resume(self):
        """The session can go on after a wait."""
        if not self.closed:
            self.server.waiting.discard(self)
            self.session.most_load = self.server.share
            self.session.resume(self.server.now)
            self.server.active.append(self)
            self._after_feed()
            session = self.session
            if self._at_end and not (session.job or session.held or session.is_full()
                                     or session.closing):
                self._hang_up()

    def _go_on(self):
        """Have the session resumed: in the time that there is for jobs, or in the next turn. One
        that is held is woken by its release."""
        if not self.session.job:
            self.session.wake()
        elif not self.session.held:
            self.server.working[self] = None

    def _after_feed(self):
        """See to what the session asks for: a timeout, and a pause in its input."""
        session = self.session
        if session.timeout is not None:
            self._deadline = self.server.mono + session.timeout / 1000
            session.timeout = None
            # One entry on the heap serves one wait after the other, as a rule.
            if self._alarm is None or self._deadline < self._alarm[0]:
                self._set_alarm()
        elif session.waiter and self._alarm is None:   # a monitor that waits once more
            self._set_alarm()
        if session.waiter:
            self.server.waiting.add(self)
        elif session.job and not (session.held or session.is_full()):  # else it is woken
            self.server.working[self] = None
        paused = session.backlog() > _CHUNK
        if paused != self.is_paused and not self._at_end:
            self.is_paused = paused
            self._watch(self._watched & ~_READ if paused
                        else self._watched | _READ)
        if session.waiter and paused and self._look_alarm is None:
            self._look_alarm = self.server.timers.at(
                self.server.mono + _LOOK_SECONDS, self._look)

    def give_up(self):
        """There is no memory for what the client has sent: tell it so, and close."""
        self.session.out_of_memory()
        self.server.active.append(self)

    def _look(self):
        """Nothing else tells that a client has gone while it waits and its socket is not read."""
        self._look_alarm = None
        if self.session.waiter and self.is_paused:
            poll = select.poll()
            poll.register(self.sock, getattr(select, "POLLRDHUP", 0))
            if poll.poll(0):
                self.close()
            else:
                self._look_alarm = self.server.timers.at(
                    self.server.mono + _LOOK_SECONDS, self._look)

    def _set_alarm(self):
        if self._alarm:
            self.server.timers.cancel(self._alarm)
        self._alarm = self.server.timers.at(self._deadline, self._ring)

    def _ring(self):
        self._alarm = None
        if self.session.waiter:
            if self._deadline <= self.server.mono:
                self.session.time_out()
            else:
                self._set_alarm()

    def _hang_up(self):
        """The client has closed its side. What it is owed by now is still sent."""
        session = self.session
        if not (session.waiter or session.is_asking) and (
                session.job or session.unparsed and not self._at_end):
            self._at_end = True              # resume() comes back here when that is done
            self._watch(self._watched & ~_READ)
            self._go_on()
            return
        self.session.close(self.server.now)
        if self.session.out or self._unsent:
            self._at_end = True
            self._watch(self._watched & ~_READ)
            self.server.active.append(self)
        else:
            self.close()

    def settle(self, failed, unsafe):
        """Put errors in the place of answers that rest on a failed journal, and hold those
        that rest on operations which are not safe yet."""
        session = self.session
        if self.closed:
            return
        since, self._checked = self._checked, len(session.touched)
        touched = {entry[0] for entry in session.touched[since:]}
        if failed:
            if any(isinstance(failed.get(queue), Unclear) for queue in touched):
                self.close()
                return
            session.fail(failed, since)
        touched &= unsafe
        if touched:
            self.holds += len(touched)
            for queue in touched:
                queue.history.when_safe(
                    functools.partial(self._release, queue, since, self._checked))
        if self.holds:
            session.hold()

    def _release(self, queue, since, until, error):
        """Operations that answers waited for are safe, or have been undone."""
        self.holds -= 1
        if self.closed:
            return
        if isinstance(error, Unclear):
            self.close()                     # nobody knows what has become of them
            return
        if error:
            self.session.fail({queue: error}, since, until)
        if not self.holds:
            self.session.release()
            self.session.wake()              # in the next turn: others are being released

    def flush(self):
        """Send the answers, as far as the kernel takes them."""
        session = self.session
        if self.closed:
            return
        if self.holds:
            self._checked = len(session.touched)
        elif session.out:
            self._checked = 0
            if self.is_traced:
                trace.info("%s: is told %r", self.session.who, b"".join(session.out)[:200])
            self._unsent += session.take()
        if self._unsent:
            try:
                self._send()
            except BlockingIOError:
                self._watch(self._watched | _WRITE)
                self._watch_sending()
                return
            except OSError:              # gone: the next read would have told
                self.close()
                return
        if self._watched & _WRITE:
            self._watch(self._watched & ~_WRITE)
        if session.is_full() or session.job:
            self._go_on()
        session.load = 0
        if session.closing and not (self.holds or self._finished):
            self._finish()

    def _send(self):
        unsent = self._unsent
        stats = self.server.broker.stats
        left = _MOST_SENT
        while unsent:
            # Joining small answers is cheaper than a vector of them.
            if len(unsent) > 1 and sum(map(len, unsent)) < _BIG:
                unsent[:] = [b"".join(unsent)]
            if len(unsent) == 1 and len(unsent[0]) <= left:
                count = self.sock.send(unsent[0])
            elif left:
                count = self.sock.sendmsg(_first_of(unsent, left))
            else:
                raise BlockingIOError          # the others first
            left -= count
            stats.bytes_written += count
            self._sent += count
            while unsent and count >= len(unsent[0]):
                count -= len(unsent.pop(0))
            if count:
                unsent[0] = memoryview(unsent[0])[count:]

    def _watch_sending(self):
        """Close the connection if it takes nothing of what is to be sent for send_timeout."""
        timeout = self.server.config.server.send_timeout
        if timeout and self._send_alarm is None:
            self._sent = 0
            self._send_alarm = self.server.timers.at(
                self.server.mono + timeout / 1000, self._check_sending)

    def _check_sending(self):
        self._send_alarm = None
        if self._unsent and not self._sent:
            log.warning("%s takes nothing of its answers; closed", self.session.who)
            self.close()
        elif self._unsent:
            self._watch_sending()

    def _finish(self):
        """All has been said. The client is given a moment to read it: to close a socket
        with unread input would take back what it has not read yet."""
        self.session.close(self.server.now)
        self._finished = True
        if self._at_end:
            self.close()
            return
        self._at_end = True
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self._watch(_READ)
        self.server.timers.at(self.server.mono + 1, self.close)

    def close(self):
        """Let go of the client; its open reads go back."""
        if not self.closed:
            self.closed = True
            self.session.close(self.server.now)
            self.session.wake = lambda: None     # no cycle is left for a garbage collector
            self._watch(0)
            for alarm in filter(None, (
                    self._alarm, self.idle_alarm, self._send_alarm, self._look_alarm)):
                self.server.timers.cancel(alarm)
            self.sock.close()
            self.server.connections.discard(self)
            self.server.waiting.discard(self)
            self.server.broker.count_connection(-1)
            if self.is_traced:
                trace.info("%s: closed", self.session.who)

    def _watch(self, mask):
        selector = self.server.selector
        if mask == self._watched:
            return
        if not mask:
            selector.unregister(self.sock)
        elif self._watched:
            selector.modify(self.sock, mask, self)
        else:
            selector.register(self.sock, mask, self)
        self._watched = mask


class Listener:
    """A port on which clients of one protocol come in. Raises OSError."""

    is_greeting = False                  # as a Connection may be

    def __init__(self, server, sock, protocol, session_type):
        self.server = server
        self.sock = sock
        self.protocol = protocol
        self.session_type = session_type
        self.address = sock.getsockname()
        self.name = _name_of(self.address)
        self._refused = 0                # connections refused since the log told of it,
        self._told = -_TELL_SECONDS      # and when that was
        try:
            sock.listen(server.config.server.connection_backlog)
        except OSError as error:         # another one has come first since
            raise _cannot_listen(error, self.name) from None
        self._start()

    def is_local(self):
        """Whether only clients of this machine can come in."""
        return isinstance(self.address, str) or _ip_of(self.address[0]).is_loopback

    def ready(self, mask):
        """Clients are at the door."""
        server = self.server
        for _ in range(_ACCEPTS):
            try:
                sock, address = self.sock.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                log.error("cannot accept connections for a second: %s", error.strerror)
                server.selector.unregister(self.sock)
                server.timers.at(server.mono + 1, self._start)
                return
            connection = self._admit(sock, address)
            if connection and not connection.is_greeting:
                connection.ready(_READ)      # its first word is there as a rule: saves a turn

    def _admit(self, sock, address):
        """The Connection of a client that has come, None if it may not come in."""
        server = self.server
        config = server.broker.config
        sock.setblocking(False)
        why = None
        local, host, name = True, self.name, self.name           # of a UNIX socket
        if isinstance(address, tuple):
            ip = _ip_of(address[0])
            if config.server.allow and not any(ip in network for network in config.server.allow):
                why = "%s is not among those in allow" % ip
            host = _host_of(ip)
            # One that comes from the address to which it comes is on this machine.
            local = ip.is_loopback or ip == _ip_of(sock.getsockname()[0])
            name = _name_of(address)
        if len(server.connections) >= config.server.max_connections:
            why = "max_connections"
        elif len(server.connections) >= server.most_connections:
            why = "the limit of open files"
        if why:
            sock.close()
            self._tell_refused(why)
            return None
        if config.tls and isinstance(address, tuple):
            config.tls.sslsocket_class = TLSSocket
            try:
                sock = config.tls.wrap_socket(sock, True, do_handshake_on_connect=False)
            except OSError:                            # gone already
                sock.close()
                return None
        session = self.session_type
        if config.users is not None and session is MemcacheSession:
            session = MemcacheLogin
        connection = Connection(server, sock, session(
            server.broker, local, "%s client %s" % (self.protocol, name), host))
        server.connections.add(connection)
        server.broker.count_connection(1)
        server.watch_idle(connection)
        return connection

    def _tell_refused(self, why):
        self._refused += 1
        if self.server.mono >= self._told + _TELL_SECONDS:
            log.error("%s: %d connections, %d refused", why, len(self.server.connections),
                      self._refused)
            self._told = self.server.mono
            self._refused = 0

    def _start(self):
        if self.sock.fileno() >= 0:
            self.server.selector.register(self.sock, _READ, self)

    def close(self):
        with contextlib.suppress(KeyError):            # out of descriptors at the moment
            self.server.selector.unregister(self.sock)
        self.sock.close()
        if isinstance(self.address, str) and self.protocol not in self.server.inherited:
            with contextlib.suppress(OSError):
                os.unlink(self.address)


class Server:
    """The daemon: listeners, connections and the loop. Raises OSError when it cannot start.

    run() serves until stop() is called. given: {protocol: [listening socket]} of ports that are
    open already. notify: told what systemd wants to know, see sd_notify(3).
    """

    is_greeting = False                  # as a Connection may be

    def __init__(self, config, given=(), notify=lambda text: None):
        self.config = config
        self.notify = notify
        self.inherited = dict(given)
        self._spool = _lock_spool(os.path.abspath(config.server.queue_path))
        try:
            sockets = self._bind_all()
        except OSError:
            os.close(self._spool)
            raise
        self.selector = selectors.DefaultSelector()
        self.timers = Timers()
        self.connections = set()
        self.active = []                 # connections that may have something to send
        self.woken = []                  # connections whose sessions can go on
        self.working = {}                # connections whose sessions have a job in hand
        self.waiting = set()             # connections whose sessions wait for an item
        self.mono = time.monotonic()
        self.now = _now()
        self.reload_wanted = False
        self._busy_poll = 0 if _cores() == 1 else config.server.busy_poll / 1e6
        self.share = 0                   # how much load a session may pile up in this turn
        self._short_waits = 0            # how many in a row, see _wait()
        self._events = []                # what select() told of and is still to be seen to
        self._planned = set()            # queues whose fsync has a time set
        self._wanted = {}                # queues to be fsynced, in order; an ordered set
        self._running = set()            # queues that are being fsynced
        self._failing = {}               # queue -> when writing its journal failed last
        self._recovering = set()         # queues whose recovery is planned
        log.info("kestrel.py %s, journals in %s", __version__,
                 os.path.abspath(config.server.queue_path))
        self.most_connections, most_files = _share_descriptors()
        most_memory = config.server.max_memory or _usable_memory() * 3 // 4
        self.broker = Broker(config, self.later, self.now, Budget(most_memory, most_files))
        self._turns = self.broker.metrics["turn_usec"]
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self.selector.register(self._wake_in, _READ, self)
        self._worker = Worker(self.interrupt)
        self.broker.work = self._work
        self.listeners = [
            Listener(self, sock, protocol, session) for sock, protocol, session in sockets]
        self._workers = [self._worker]
        if config.users is not None:         # what takes long for the processor delays no fsync
            self._workers.append(Worker(self.interrupt))
            self.broker.aside = self._workers[1].submit
        if config.server.status_command:
            statuses = queues.SimpleQueue()
            self.broker.announce = statuses.put
            threading.Thread(target=_announce_all, name="announcer", daemon=True, args=(
                config.server.status_command,
                ["%s=%s" % (one.protocol, one.name) for one in self.listeners],
                statuses)).start()
            statuses.put(self.broker.status)
        self._plan_sweep()
        self._sampled_at = self.mono
        self.later(SAMPLE_SECONDS * 1000, self._sample)
        # The memcache port, None if there are UNIX sockets only.
        self.port = next((one.address[1] for one in self.listeners if one.protocol == "memcache"
                          and isinstance(one.address, tuple)), None)

    def _bind_all(self):
        """(socket, protocol, type of session) of each address and port there is to be."""
        settings = self.config.server
        bound = []
        for protocol, session in _PROTOCOLS.items():
            setting = protocol + "_port"
            port = getattr(settings, setting)
            try:
                if protocol in self.inherited:
                    bound += [(sock, protocol, session) for sock in self.inherited[protocol]]
                    continue
                for address in settings.listen:
                    if address.startswith("unix:") and protocol == "memcache":
                        sock = _bind_unix(address[5:], settings.socket_mode)
                    elif address.startswith("unix:") or port is None:
                        continue
                    else:
                        sock = _bind(address, port, "0.0.0.0" in settings.listen)
                    bound.append((sock, protocol, session))
            except OSError as error:
                if setting != "admin_port" or setting in self.config.given:
                    for sock, _, _ in bound:
                        sock.close()
                    raise
                log.warning("no admin port: %s", error.strerror)
        return bound

    # -- one turn of the loop

    def run(self):
        """Serve until the broker is stopped, then stop cleanly."""
        for listener in self.listeners:
            log.info("listening on %s for %s clients; %d queues, %d items",
                     listener.name, listener.protocol, len(self.broker.queues),
                     sum(queue.count for queue in self.broker.queues.values()))
        settings = self.config.server
        open_to_all = [one.name for one in self.listeners if not one.is_local()]
        if open_to_all and not (settings.allow or settings.auth_file or settings.tls_client_ca):
            log.warning("anybody who can reach %s can read and write all queues: see the "
                        "settings allow, auth_file and tls_client_ca", ", ".join(open_to_all))
        self.notify("READY=1\n" + self._summary())
        while not self.broker.stopping:
            self.turn()
        self.notify("STOPPING=1")
        self._stop()

    def stop(self):
        """Have run() stop. From any thread, or a signal handler."""
        self.broker.stopping = True
        self.interrupt()

    def _summary(self):
        queues = self.broker.queues.values()
        return "STATUS=%s: %d queues, %d items, %d connections" % (
            self.broker.status.lower(), len(queues), sum(queue.count for queue in queues),
            len(self.connections))

    def turn(self):
        """Wait for events and see to all of them."""
        broker = self.broker
        busy = broker.dirty or broker.tasks or self.woken or self.working or self.active
        events = self._events or (self.selector.select(0) if busy else self._wait())
        self.mono = time.monotonic()
        self.now = _now()
        if self.waiting:
            # These first: one that has hung up must not be given an item.
            events.sort(key=lambda event: event[0].data not in self.waiting)
        # The more there are, the less is done for each.
        self.share = self.config.server.max_output_buffer // max(
            1, len(events) + len(self.woken) - 1)
        greetings = 0
        for key, mask in events[:_EVENTS]:
            if key.data.is_greeting:
                greetings += 1
                if greetings > _GREETINGS:
                    continue                           # select() will tell of it again
            try:
                key.data.ready(mask)
            except Exception as error:
                self._unexpected(key.data, error)
        self._events = events[_EVENTS:]
        if not self._events:             # who has spoken before its time was over is heard first
            self.timers.run(self.mono)
        if self.reload_wanted:
            self.reload_wanted = False
            self._reload()
        working, self.working = list(self.working), {}
        for number, connection in enumerate(working, 1):
            self._resume(connection)
            if time.monotonic() > self.mono + _WORK_SECONDS:   # the others are first in the next
                self.working = {**dict.fromkeys(working[number:]), **self.working}
                break
        self._resume_woken()
        self._commit()
        if broker.tasks:
            self._run_tasks()
        self._turns.add(int((time.monotonic() - self.mono) * 1e6))

    def _wait(self):
        """Wait for events, or the next timer.

        To be put to sleep and woken again takes longer than most commands. While the waits
        are short, as with a client that answers at once, it is cheaper not to sleep.
        """
        select = self.selector.select
        start = time.monotonic()
        if self._short_waits >= _SHORT_WAITS:
            while time.monotonic() < start + self._busy_poll:
                events = select(0)
                if events:
                    return events
        # The second look is for a process that was stopped, whose wait ends without one.
        events = select(self.timers.wait(time.monotonic())) or select(0)
        is_short = time.monotonic() < start + self._busy_poll
        self._short_waits = self._short_waits + 1 if is_short else 0
        return events

    def ready(self, mask):
        """Somebody has called interrupt(); what for is seen to in its turn."""
        with contextlib.suppress(BlockingIOError):
            self._wake_in.recv(4096)

    def interrupt(self):
        """Make the loop turn. From any thread, or a signal handler."""
        with contextlib.suppress(OSError):   # full: it will turn; closed: it has stopped
            self._wake_out.send(b"\0")

    def wakeup_fd(self):
        """What signal.set_wakeup_fd() can be given."""
        return self._wake_out.fileno()

    def later(self, delay_ms, call):
        """Make a call in that time; returns what cancels it."""
        entry = self.timers.at(self.mono + delay_ms / 1000, call)
        return functools.partial(self.timers.cancel, entry)

    def watch_idle(self, connection):
        """Close the connection once it has been idle for client_timeout, or what is usual, or has
        not logged in when the time for that is over."""
        session = connection.session
        if not connection.is_idle():
            connection.last_active = self.mono
        ends = [connection.last_active + timeout / 1000 for timeout in (
            self.config.server.client_timeout, session.idle_timeout) if timeout]
        if connection.is_greeting or isinstance(session, MemcacheLogin) and not session.is_asking:
            ends.append(connection.since + LOGIN_MS / 1000)
        if ends and min(ends) <= self.mono:
            connection.close()
        elif ends:
            connection.idle_alarm = self.timers.at(
                min(ends), functools.partial(self.watch_idle, connection))

    def _resume_woken(self):
        for connection in self.woken:                  # which may wake others
            self._resume(connection)
        self.woken.clear()

    def _resume(self, connection):
        try:
            connection.resume()
        except Exception as error:
            self._unexpected(connection, error)

    def _unexpected(self, one, error):
        """What nobody foresaw costs the client that it happened to, and nobody else."""
        if not isinstance(one, Connection):
            log.exception("unexpected")
        elif isinstance(error, MemoryError):
            log.error("%s: out of memory", one.session.who)
            one.give_up()
        else:
            log.exception("%s: unexpected, closed", one.session.who)
            one.close()

    def _run_tasks(self):
        """Run each task a step, as long as there is time. It comes last in a turn, when all
        that has been logged has been written."""
        tasks = self.broker.tasks
        end = time.monotonic() + _WORK_SECONDS
        for _ in range(len(tasks)):
            self._step(tasks.popleft())
            if time.monotonic() > end:
                break

    def _step(self, task, error=None, seconds=0):
        """Run a task one step; `error` is what came of the call that it asked for."""
        try:
            # A task that was closed meanwhile, with its queue, has no frame any more.
            work = task.throw(error) if error and task.gi_frame else next(task)
        except StopIteration:
            return
        except Exception:
            log.exception("unexpected, in a task")
            return
        if work:
            self._worker.submit(work, functools.partial(self._step, task))
        else:
            self.broker.tasks.append(task)

    def _work(self, call, done):
        self._worker.submit(call, lambda error, seconds: done(error))

    def _plan_sweep(self):
        frequency = self.config.server.expiration_timer_frequency
        if frequency:
            self.later(frequency, self._sweep)

    def _sweep(self):
        self.broker.start(self._swept())

    def _swept(self):
        try:
            yield from self.broker.sweep(self.now)
        finally:
            self._plan_sweep()

    def _sample(self):
        self.broker.start(self.broker.sample(self.mono - self._sampled_at))
        self._sampled_at = self.mono
        self.later(SAMPLE_SECONDS * 1000, self._sample)
        self.notify(self._summary())

    def keep_watch(self, delay_ms):
        """Tell systemd's watchdog so often that the loop turns."""
        self.notify("WATCHDOG=1")
        self.later(delay_ms, functools.partial(self.keep_watch, delay_ms))

    def _reload(self):
        self.notify("RELOADING=1\nMONOTONIC_USEC=%d" % (time.monotonic_ns() // 1000))
        with contextlib.suppress(ConfigError):         # the log has it
            self.broker.reload()
        self.notify("READY=1\n" + self._summary())

    # -- writing, fsyncing, answering

    def _commit(self):
        for worker in self._workers:
            if worker.done:
                worker.take_results()
        written, failed = self.broker.write()
        unsafe = set()
        for queue in written:
            self._note_success(queue)
            delay = queue.config.sync_journal
            if queue.history.safe < queue.history.logged:
                unsafe.add(queue)
            if delay == 0:
                self._wanted[queue] = None
            elif delay is not None and queue not in self._planned:
                self._planned.add(queue)
                self.later(delay, functools.partial(self._sync_due, queue))
        for queue, error in failed.items():
            self._note_failure(queue, error)
        if self._wanted and self.broker.work:
            self._start_syncs()              # they run while answers are sent
        # Check every answer whose operations were written in this turn: a later failure of the
        # same queue would be taken for the failure of these operations.
        active, self.active = self.active + self.woken, []
        for connection in active:
            try:
                if failed or unsafe:
                    connection.settle(failed, unsafe)
                connection.flush()
            except Exception as error:
                self._unexpected(connection, error)

    def _sync_due(self, queue):
        self._planned.discard(queue)
        self._wanted[queue] = None

    def _start_syncs(self):
        """Begin the fsyncs that are wanted, one at a time of each queue, the next for all that
        has been written since."""
        for queue in list(self._wanted):
            if len(self._running) >= _SYNCS:
                break
            if queue in self._running:
                continue
            del self._wanted[queue]
            if not queue.needs_sync():
                continue
            try:
                call, sync = queue.begin_sync()
            except OSError as error:
                if is_short_of_descriptors(error):
                    self.later(_SYNC_AGAIN_MS, functools.partial(self._sync_due, queue))
                    continue
                # It counts as one that has been done and has failed.
                call, sync = functools.partial(_bare, error), None
            self._running.add(queue)
            self._worker.submit(call, functools.partial(self._synced, queue, sync))

    def _synced(self, queue, sync, error, seconds):
        self._running.discard(queue)
        queue.counters.fsync_usec = int(seconds * 1e6)
        self.broker.metrics["fsync_usec"].add(queue.counters.fsync_usec)
        if error:
            self._sync_failed(queue, sync, error)
        else:
            queue.synced(sync)

    def _sync_failed(self, queue, sync, error):
        if not queue.closed:
            self._note_failure(queue, error, "fsynced")
            self.later(RETRY_MS, functools.partial(self._sync_due, queue))
        queue.sync_failed(sync, error)

    def _note_failure(self, queue, error, what="written"):
        """Say that a journal cannot be written, once, and see to it in a while."""
        if queue not in self._failing:
            log.error("the journal of %s cannot be %s: %s", queue.name, what, _why(error))
        self._failing[queue] = self.mono
        if queue not in self._recovering:
            self._recovering.add(queue)
            self.later(RETRY_MS, functools.partial(self._recover, queue))

    def _note_success(self, queue):
        # With a disk on the brink, one write fails and the next does not, over and over.
        if self._failing and self.mono > self._failing.get(queue, self.mono) + _CALM_SECONDS:
            del self._failing[queue]
            log.info("the journal of %s is written again", queue.name)

    def _recover(self, queue):
        self._recovering.discard(queue)
        if queue.closed:
            self._failing.pop(queue, None)
        else:
            queue.recover(self.now)

    # -- the end

    def _stop(self):
        """Answer those that wait, put open reads back, and leave all journals on the disk."""
        for listener in self.listeners:
            listener.close()
        for queue in self.broker.queues.values():
            queue.dismiss_waiters()
        self._resume_woken()
        self._wake_in.settimeout(1)
        end = time.monotonic() + _LAST_SECONDS
        while time.monotonic() < end:        # an answer may wait for one fsync after the other
            self._commit()
            for _ in range(len(self.broker.tasks)):
                self._step(self.broker.tasks.popleft())
            if not (self._worker.unfinished or self._wanted or self.broker.dirty):
                break
            if self._worker.unfinished:
                with contextlib.suppress(OSError):
                    self._wake_in.recv(4096)
        for worker in self._workers:
            worker.stop()
        self.broker.work = None                        # from here on all is done at once
        self._commit()                                 # what they had still to say
        for queue in self.broker.queues.values():
            queue.abort(*queue.opens)        # in the order of all, not connection by connection
        end = time.monotonic() + 1                     # for those who have answers still to take
        while time.monotonic() < end and any(one.is_sending() for one in self.connections):
            for key, mask in self.selector.select(.1):
                if mask & _WRITE:
                    key.data.flush()
        for connection in list(self.connections):
            connection.close()
        self.broker.write()
        for queue in self.broker.queues.values():
            try:
                queue.close()
            except OSError as error:
                log.error("the journal of %s: %s", queue.name, _why(error))
        self.selector.close()
        self._wake_in.close()
        self._wake_out.close()
        os.close(self._spool)
        log.info("stopped")


def _share_descriptors():
    """Return how many connections and how many journal files may be open at once, so that
    neither can use up the descriptors of the other."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return UNLIMITED, UNLIMITED
    files = max(4, limit // 4)
    return max(1, limit - files - 2 * min(_SYNCS, limit // 16) - _OTHER_FILES), files


def _usable_memory():
    """Return how much memory this process can have at most: what the machine has, or its
    cgroup, or its own limit allows, in bytes."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        sizes.append(limit)
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/cgroup", encoding="ascii", errors="replace") as file:
            for line in file:
                _, kinds, path = line.strip().split(":", 2)
                where = "/sys/fs/cgroup%s/%s" if not kinds else (
                    "/sys/fs/cgroup/memory%s/%s" if kinds == "memory" else None)
                while where and path:
                    for name in ("memory.max", "memory.limit_in_bytes"):
                        with contextlib.suppress(OSError, ValueError):
                            with open(where % (path.rstrip("/"), name),
                                      encoding="ascii") as limit:
                                sizes.append(int(limit.read()))
                    path = path.rstrip("/").rpartition("/")[0]
    return min(sizes)


def _cores():
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:                             # not on every system
        return os.cpu_count()


@functools.lru_cache(maxsize=1024)       # the same clients come again and again
def _ip_of(host):
    """The ipaddress of a host as sockets name it; an IPv4 one if it is that in IPv6's clothes."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    return getattr(ip, "ipv4_mapped", None) or ip


def _host_of(ip):
    """What all have in common who may be one: who has one IPv6 address has a network of them."""
    if ip.is_loopback:
        return "this machine"
    return str(ip) if ip.version == 4 else ip.exploded[:19]


def _name_of(address):
    """The address of a socket in words."""
    if isinstance(address, str):
        return "unix:" + address
    return ("[%s]:%d" if ":" in address[0] else "%s:%d") % address[:2]


def _cannot_listen(error, name):
    return OSError(error.errno, "cannot listen on %s: %s" % (name, error.strerror or error))


def _bind(address, port, ipv6_only):
    sock = None
    try:
        family, _, _, _, name = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)   # of all that it accepts
        if family == socket.AF_INET6 and ipv6_only:    # :: is IPv4 too, as a rule
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(name)
        sock.setblocking(False)
    except OSError as error:
        if sock:
            sock.close()
        raise _cannot_listen(error, _name_of((address, port))) from None
    return sock


def _bind_unix(path, mode):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(path)
        os.chmod(path, mode)                           # nobody can come in before listen()
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise _cannot_listen(error, _name_of(path)) from None
    return sock


def _remove_stale(path):
    """Remove a UNIX socket that nobody listens on: of a server that was killed."""
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise FileExistsError(errno.EEXIST, "there is something else")
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except BlockingIOError:                        # many are at the door of another server
            pass


def _lock_spool(path):
    """Make the spool directory if need be and lock it; returns its descriptor."""
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, "cannot use the spool %s: %s" % (path, error.strerror)
                      ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, "the spool %s is held by another server" % path) from None
    return fd


# == 8. From Python =======================================================================
#
# For programs that have this file beside them: a server in a thread, and a client. (A queue
# without any server is Queue itself, see section 4.)


class ServerError(Exception):
    """What a server answered in place of what was asked for."""


class Client:
    """A blocking connection to a server, over the memcache protocol. Times are seconds.

        with kestrel.Client() as client:
            client.put("jobs", b"one")
            with client.open("jobs", timeout=5) as data:
                ...                              # finished, or put back if this raises

    host: or `unix:PATH`. timeout: how long an answer may take. user, password: for a server with
    an auth_file. tls: an ssl.SSLContext for a server with TLS. Raises ServerError, and OSError
    when the connection fails; the client is of no more use then.
    """

    def __init__(self, host="127.0.0.1", port=22133, timeout=30, user=None, password="", tls=None):
        self._timeout = timeout
        self._opened = set()             # queues of which an item is open
        with contextlib.ExitStack() as stack:
            if host.startswith("unix:"):
                self._sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                self._sock.settimeout(timeout)
                self._sock.connect(host[5:])
            else:
                self._sock = stack.enter_context(socket.create_connection((host, port), timeout))
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls:
                self._sock = stack.enter_context(
                    tls.wrap_socket(self._sock, server_hostname=host))
            self._file = stack.enter_context(self._sock.makefile("rb"))
            if user is not None:
                login = os.fsencode("%s %s" % (user, password))
                self._ask(b"set login 0 0 %d\r\n%b\r\n" % (len(login), login))
            stack.pop_all()

    def put(self, queue, data, expiry=0, flags=0):
        """Put an item (bytes); False if the queue does not take it. expiry: in so many seconds,
        or at that time of the epoch, 0 for never."""
        return self._ask(b"set %b %d %d %d\r\n%b\r\n" % (
            self._name(queue), flags, expiry, len(data), data)) == b"STORED"

    def get(self, queue, timeout=0, options=""):
        """Take the next item, waiting for it if need be; None if there is none. options: such
        as "/open" or "/close/open"."""
        if queue in self._opened:
            raise ValueError("an item of %s is open here; use another client" % queue)
        return self._get(queue, timeout, options)

    def _get(self, queue, timeout, options):
        return self._ask(b"get %b/t=%d%b\r\n" % (
            self._name(queue), timeout * 1000, options.encode()), self._item, timeout)

    @contextlib.contextmanager
    def open(self, queue, timeout=0):
        """The next item, or None, for the time of a `with` block: it is finished when the block
        is, and goes back to the head of its queue if the block raises an exception."""
        data = self.get(queue, timeout, "/open")
        self._opened.add(queue)
        try:
            yield data
        except BaseException:
            with contextlib.suppress(OSError, ServerError):          # then it goes back anyway
                self._get(queue, 0, "/abort")
            raise
        else:
            if data is not None:
                self._get(queue, 0, "/close")
        finally:
            self._opened.discard(queue)

    def work(self, queue, timeout=0):
        """A generator of items, until none comes for `timeout`. Each is finished when the next
        one is asked for; the last one goes back if the loop is left before (a generator that is
        kept in a variable has to be closed for that)."""
        data = self.get(queue, timeout, "/open")
        self._opened.add(queue)
        try:
            while data is not None:
                yield data
                data = self._get(queue, timeout, "/close/open")
        except BaseException:
            with contextlib.suppress(OSError, ServerError):
                self._get(queue, 0, "/abort")
            raise
        finally:
            self._opened.discard(queue)

    def stats(self):
        """What the command `stats` tells, as a dict of str."""
        return self._ask(b"stats\r\n", self._stats)

    def flush(self, queue):
        """Drop all that waits in a queue."""
        self._ask(b"flush %b\r\n" % self._name(queue))

    def delete(self, queue):
        """Delete a queue and its journal."""
        self._ask(b"delete %b\r\n" % self._name(queue))

    def close(self):
        """Hang up; what is open goes back."""
        self._file.close()
        self._sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _name(self, queue):
        return os.fsencode(check_name(os.fsdecode(queue)))

    def _ask(self, command, read=lambda line: line, timeout=0):
        """What `read` makes of the first line of the answer to a command."""
        if self._file.closed:
            raise ConnectionError("this client is closed")
        try:
            self._sock.settimeout(self._timeout + timeout)
            self._sock.sendall(command)
            return read(self._line())
        except ServerError:
            raise
        except BaseException:                # it would give the rest of the answer to the next
            self.close()
            raise

    def _line(self):
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the server has closed the connection")
        if line.partition(b" ")[0].strip() in (b"ERROR", b"CLIENT_ERROR", b"SERVER_ERROR"):
            raise ServerError(os.fsdecode(line).strip())
        return line[:-2]

    def _item(self, line):
        if line == b"END":
            return None
        data = self._file.read(int(line.split(b" ")[3]) + 2)[:-2]
        self._line()
        return data

    def _stats(self, line):
        stats = {}
        while line != b"END":
            _, name, value = os.fsdecode(line).split(" ", 2)
            stats[name] = value
            line = self._line()
        return stats


@contextlib.contextmanager
def serve(port=0, spool=None, config=None):
    """Run a server on 127.0.0.1 in a thread for the time of a `with` block, which is given the
    Server; its `port` is a free one if `port` is 0.

        with kestrel.serve() as server, kestrel.Client(port=server.port) as client:
            client.put("q", b"x")

    spool: the directory of the journals, None for one that is deleted in the end. config: the
    path of a config file. It has no admin port, unless the file gives one. Raises ConfigError,
    and OSError when it cannot start.
    """
    with contextlib.ExitStack() as stack:
        if spool is None:
            spool = stack.enter_context(tempfile.TemporaryDirectory(prefix="kestrel-"))
        overrides = {"memcache_port": str(port), "queue_path": os.fspath(spool)}
        if "admin_port" not in Config(config).given:
            overrides["admin_port"] = "off"
        server = Server(Config(config, overrides))
        thread = threading.Thread(target=server.run, name="kestrel")
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()


# == 9. Command line ======================================================================
#
# What `python3 kestrel.py` does: arguments, logging, signals, exit status.


# Of log lines that differ in their details only so many are let through in so many seconds.
_REPEATS = 20
_REPEAT_SECONDS = 10


def main(arguments=None):
    """Run the daemon; returns the exit status. `arguments` default to the command line's."""
    parser = argparse.ArgumentParser(
        prog="kestrel.py", description="A tiny, durable queue that speaks memcache.")
    parser.add_argument("-c", metavar="FILE", dest="config", help="the config file to read")
    parser.add_argument("--listen", metavar="ADDRESSES",
                        help="the addresses to listen on (default 127.0.0.1)")
    parser.add_argument("--port", dest="memcache_port",
                        help="the port for memcache clients (default 22133)")
    parser.add_argument("--spool", metavar="DIRECTORY", dest="queue_path",
                        help="where the journals are (default ./spool)")
    parser.add_argument("--dump", metavar="JOURNAL", nargs="+",
                        help="print the records of journal files, a line each, and exit")
    parser.add_argument("--json", action="store_true",
                        help="with --dump: a JSON object for each record")
    parser.add_argument("--pack", metavar="SPOOL/QUEUE",
                        help="write the journals of a queue that no server holds as one "
                             "minimal file, and exit")
    parser.add_argument("--hash-password", action="store_true",
                        help="ask for a password (or read a line), print what an auth_file has "
                             "in its place, and exit")
    parser.add_argument("--check", action="store_true",
                        help="check the config file, print the effective settings, and exit")
    parser.add_argument("--version", action="version", version="kestrel.py " + __version__)
    options = parser.parse_args(arguments)
    overrides = {key: value for key, value in vars(options).items()
                 if key in SERVER_SETTINGS and value is not None}
    logging.basicConfig(level=logging.INFO, stream=sys.stderr,
                        format="%(asctime)s %(levelname)s %(message)s")
    try:
        if options.dump:
            return _dump(options.dump, options.json)
        if options.pack:
            return _pack(options.pack)
        if options.hash_password:
            return _hash_password()
        config = Config(options.config, overrides)
        if options.check:
            print("\n".join(config.lines()))
            return 0
        _set_up_log(config.server)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)   # while it loads there is nothing to reload
        _raise_file_limit()
        server = Server(config, _inherited(config), _notify)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print("kestrel.py: %s%s" % (error.filename + ": " if error.filename else "",
                                    error.strerror or error), file=sys.stderr)
        return 1
    _handle_signals(server)
    watchdog = int(os.environ.get("WATCHDOG_USEC", 0))
    if watchdog and os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
        server.keep_watch(watchdog // 2000)            # twice as often as it wants it
    # A collection looks at every item in memory, for a tenth of a second with half a million
    # of them, and finds nothing: what is let go of here is in no cycle.
    gc.disable()
    server.run()
    return 0


def _dump(paths, as_json):
    """Print what is in journal files; the exit status is 1 if one of them is damaged."""
    status = 0
    for path in paths:
        for record in dump_records(path):
            if "damage" in record:
                status = 1
            if as_json:
                print(json.dumps({"file": path, **record}))
            elif "damage" in record:
                print("%10d %s: %s; the last %d bytes are not read" % (
                    record["offset"], path, record["damage"], record["bytes"]))
            else:
                print("%10d %-20s %s" % (record.pop("offset"), record.pop("operation"), " ".join(
                    "%s=%s" % pair for pair in record.items())))
    return status


def _pack(path):
    """Write the journals of an unused queue as one file, which takes their place."""
    directory, name = os.path.split(os.path.abspath(path))
    spool = _lock_spool(directory)
    try:
        older = find_journals(directory).get(name)
        if older is None:
            raise OSError(errno.ENOENT, "%s: there is no such queue" % path)
        queue = Queue(name, directory, QueueConfig(max_memory_size=UNLIMITED), older)
        before = queue.journal.size
        queue.pack()
        log.info("%s: %d items, %d bytes before, %d bytes now", path, queue.count, before,
                 queue.journal.size)
        queue.close()
    finally:
        os.close(spool)
    return 0


def _hash_password():
    """Print what stands in an auth_file for a password."""
    try:
        password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    except (EOFError, KeyboardInterrupt):
        password = ""
    if not password:
        print("kestrel.py: there is no password", file=sys.stderr)
        return 1
    print(hash_password(os.fsencode(password)))
    return 0


class LogFile(logging.handlers.WatchedFileHandler):
    """A log file that harms nothing when it cannot be opened anew: its lines then go to
    standard error, until it can."""

    def emit(self, record):
        try:
            super().emit(record)
        except OSError as error:
            print("log_file: %s: %s" % (error, self.format(record)), file=sys.stderr)

    def _open(self):
        # Names of queues are any bytes.
        return open(self.baseFilename, self.mode, encoding="utf-8", errors="backslashreplace")


def _set_up_log(settings):
    """Log as the settings say. Raises OSError."""
    root = logging.getLogger()
    root.setLevel(settings.log_level.upper())
    if settings.log_file:
        try:
            handler = LogFile(settings.log_file)
        except OSError as error:
            raise OSError(error.errno, "log_file %s: %s" % (settings.log_file, error.strerror)
                          ) from None
        handler.setFormatter(root.handlers[0].formatter)
        root.handlers[:] = [handler]
    root.handlers[0].addFilter(_repeats())


def _repeats():
    """A filter of log records that lets only so many of a kind pass in a while."""
    seen = {}                            # message without its arguments -> [since, how many]

    def admit(record):
        if record.name == trace.name:
            return True
        key = record.msg
        since, count = seen.get(key, (record.created - _REPEAT_SECONDS, 0))
        if not since <= record.created < since + _REPEAT_SECONDS:   # or the clock was set
            if count > _REPEATS:
                record.msg, record.args = "%s (and %d more like this since)" % (
                    record.getMessage(), count - _REPEATS), ()
            since, count = record.created, 0
        seen[key] = since, count + 1
        return count < _REPEATS

    return admit


def _inherited(config):
    """{protocol: [socket]} of the sockets that systemd passes on, see sd_listen_fds(3). Raises
    ConfigError."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    given = {}
    for number in range(int(os.environ["LISTEN_FDS"])):
        sock = socket.socket(fileno=3 + number)
        sock.set_inheritable(False)
        sock.setblocking(False)
        # By its name, or by the port that the settings give a protocol; a UNIX socket has none.
        address = sock.getsockname()
        port = address[1] if isinstance(address, tuple) else -1
        protocol = next((protocol for protocol in _PROTOCOLS if protocol in names[number:number + 1]
                         or port == getattr(config.server, protocol + "_port")), "memcache")
        if config.users is not None and protocol in ("text", "thrift"):
            raise ConfigError("auth_file: there is a socket for %s clients, who cannot say who "
                              "they are" % protocol)
        given.setdefault(protocol, []).append(sock)
    return given


def _notify(text):
    """Tell systemd, if it wants to know, see sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(text.encode(), address.replace("@", "\0", 1)
                        if address.startswith("@") else address)


def _raise_file_limit():
    """Each connection takes a descriptor; take as many as this process may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:             # more than the system knows
        log.warning("the limit of open files stays: %s", error)
    log.info("up to %d open files, a connection is one",
             resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _handle_signals(server):
    def stop(number, frame):
        log.info("%s: stopping", signal.Signals(number).name)
        server.stop()

    def reload(number, frame):
        server.reload_wanted = True

    signal.set_wakeup_fd(server.wakeup_fd(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, reload)


if __name__ == "__main__":
    sys.exit(main())
