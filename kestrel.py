#!/usr/bin/env python3
# Copyright (c) the kestrel.py authors. MIT License, see LICENSE.
"""kestrel.py: Twitter's Kestrel message queue, rebuilt as one file of plain Python.

A daemon that speaks the memcache text protocol, Kestrel's own text and Thrift protocols, and
HTTP to whoever watches it; each key is a durable FIFO queue.

    python3 kestrel.py                    # port 22133, journals in ./spool
    python3 kestrel.py -c kestrel.conf

or, inside another program, one durable queue alone:

    queue = kestrel.Queue("work", path="spool")       # a directory that exists
    queue.add(b"hello")
    item = queue.remove(open=True)        # item.data == b"hello"
    queue.confirm(item.xid)
    queue.close()

The file is read from top to bottom; no section refers to one below its own:

     1  Configuration   settings, their units and defaults, the config file, users' rights
     2  Access          password hashes, logins
     3  Records         items, records as bytes, damage
     4  Journal         the files of one queue
     5  Queue           items in order, open reads, waiters, limits, expiry
     6  Broker          all queues by name: fanout, aliases, moves, status, statistics
     7  Protocols       memcache, text, Thrift: bytes in, bytes out; no sockets, clock, files
     8  Admin           HTTP, metrics, the web page
     9  Server          sockets, timers, fsync, signals: one turn of the loop
    10  From Python     clients of one server or several, and a server in a thread
    11  Command line    main(), tools for journals and spools, the commands that are a client

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
    delayed item    one that is not available before a certain time
    dead letter     an item that came back too often, and is moved to another queue
    passed file     a journal file with no waiting items left
    pack            a small file in the place of passed ones, with what is kept of them
    check sum       the CRC-32 of what is written at a time, in the CHECK that closes it
    mark            a CHECK of no bytes: check sums begin or end there
    ends            of a file: how many items its checked records added at the tail of the queue,
                    and took from and put back to its head, counted on from its first mark
    task            a generator that does long work in bounded steps
    turn            one iteration of the event loop

One turn reads the ready sockets, each once, and lets the sessions change the queues in memory,
writes each changed journal with one write, begins the fsyncs that are wanted (on a worker
thread), sends the answers that are safe, one send a connection as a rule, and at last runs the
tasks, each a step. Reading and tasks stop after some milliseconds; the next turn goes on there.
Time is read once a turn and handed down as `now`.

The path of a set, from recv to send: Server.turn(), Connection.ready(), Session.feed(),
MemcacheSession._parse() and store(), Queue.add(); Queue.write() with Journal.plan() and write();
Server._answer(). A get has do_get() and Queue.remove() in the place of store() and add(). This
code runs for every command, so measure whatever you add to it. What cannot be done at once goes
through store_in_steps() and get_in_steps(); gets of several keys, or with options that Kestrel
does not have, through get_beyond().

What fails is undone, in memory and in the files, back to the last safe position, before anybody
is told: a refused command has not happened, and what was acknowledged before stays.

Two clocks: `now` is the time of day in milliseconds of the epoch, for items (add
time, expiry) only; whatever waits is timed by the server on the monotonic clock.
"""

import sys

if sys.version_info < (3, 8):
    sys.exit("kestrel.py needs Python 3.8 or newer; this is %s" % sys.version.split()[0])

# What few servers use is imported where it is used: that saves a quarter of the start, and 7 MB.
import argparse
import array
import base64
import collections
import configparser
import contextlib
import copy
import errno
import fcntl
import functools
import gc
import glob
import heapq
import io
import ipaddress
import itertools
import json
import logging
import operator
import os
import queue as queues
import re
import resource
import select
import selectors
import signal
import socket
import stat
import struct
import threading
import time
import types
import urllib.parse
import weakref
import zlib
from http import HTTPStatus

TYPE_CHECKING = False                    # of the module typing, whose import takes long
if TYPE_CHECKING:
    import ssl
    from typing import Iterable, Iterator

__version__ = "1.0.0"
__all__ = ["Client", "Config", "ConfigError", "Queue", "QueueConfig", "Server", "ServerError",
           "dump_records", "serve"]

log = logging.getLogger("kestrel")
trace = logging.getLogger("kestrel.trace")    # what enable_trace and enable_session_trace tell


# == 1. Configuration =====================================================================
#
# The settings, their units and defaults, and the config file they come from. A setting
# carries Kestrel's name in snake_case. Times are held in milliseconds, busy_poll in
# microseconds, sizes in bytes. The certificates and passwords that settings name are read here
# too, so that mistakes in them are reported like those in the config file. Which user may use which
# queue follows from the settings alone.
# Knows configparser, units and TLS sockets; no queues, no other sockets.

UNLIMITED = (1 << 63) - 1

# The longest queue name, in bytes: a file name less the longest suffix of a journal file.
MAX_NAME = 255 - len(".1790000000000.pack")

# What each status refuses: (reads, writes). WRITEAVOID only asks clients to put elsewhere.
STATUSES = {
    "UP": (False, False),
    "WRITEAVOID": (False, False),
    "READONLY": (False, True),
    "QUIESCENT": (True, True),
}

class ConfigError(Exception):
    """Settings that cannot be used. Its text says where and why, a line for each mistake:
    `file:line: why`."""


_NOT_IN_NAMES = re.compile("[./~\0- \x7f-\x9f]")


def check_name(name):
    """Return `name` when it can name a queue, else raise ValueError with the reason."""
    if not name:
        raise ValueError("the name of a queue is empty")
    if len(os.fsencode(name)) > MAX_NAME:
        raise ValueError("the name of a queue is longer than %d bytes" % MAX_NAME)
    if name == "lost+found":
        raise ValueError("lost+found is where damaged journals are kept")
    bad = _NOT_IN_NAMES.search(name)
    if bad:
        raise ValueError("%s in the name of a queue" % ascii(bad[0]))
    return name


# How a kind of setting is read from text and written as text.
Kind = collections.namedtuple("Kind", "parse show")

_SIZES = {"": 1, "b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}
_TIMES = {"ms": 1, "s": 1000, "m": 60 * 1000, "h": 3600 * 1000, "d": 86400 * 1000}


def _number_of(what, units, low=0, high=UNLIMITED, **words):
    """Return the kind of a number with one of the units, or of a word that stands for a value.
    what: what an error calls it. A value is shown as the first word that stands for it."""
    def parse(text):
        text = text.lower()
        if text in words:
            return words[text]
        match = re.fullmatch("([0-9]+) *([a-z]*)", text)
        is_zero = match and not text.strip("0")        # it needs no unit
        if not match or not is_zero and match[2] not in units:
            raise ValueError("%r is not %s" % (text, what))
        number = 0 if is_zero else int(match[1]) * units[match[2]]
        if number > UNLIMITED:
            raise ValueError("the number is too large")
        if not low <= number <= high:
            raise ValueError("not from %s to %s" % (show(low), show(high)))
        return number

    def show(number):
        for word, value in words.items():
            if value == number:
                return word
        unit = max((unit for unit in units if number and number % units[unit] == 0),
                   key=units.get, default="")
        return "%d%s" % (number // units.get(unit, 1), unit)

    return Kind(parse, show)


def _one_of(*words):
    """Return the kind of one of these words."""
    def parse(text):
        if text.lower() not in words:
            raise ValueError("%r is none of: %s" % (text, ", ".join(filter(None, words))))
        return text.lower()
    return Kind(parse, str)


def _list_of(parse):
    """Return the kind of words with commas or blanks between them. parse: reads one of them."""
    return Kind(lambda text: tuple(map(parse, filter(None, re.split("[ ,\n]+", text)))),
                lambda values: ", ".join(map(str, values)))


def _parse_flag(text):
    flag = configparser.ConfigParser.BOOLEAN_STATES.get(text.lower())
    if flag is None:
        raise ValueError("%r is neither true nor false" % text)
    return flag


def _parse_text(text):
    if not text:
        raise ValueError("the value is empty")
    return text


def _parse_address(text):
    address = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if not re.fullmatch(r"unix:.+|(?![0-9.]+$)[A-Za-z0-9.-]+", address):
        try:
            ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            raise ValueError("%r is not a host, IP address or unix:PATH (the port is a separate "
                             "setting)" % address) from None
    return address


def _parse_addresses(text):
    addresses = _list_of(_parse_address).parse(text)
    if not addresses:
        raise ValueError("there is no address")
    for address in addresses:
        if addresses.count(address) > 1:
            raise ValueError("duplicate %s" % address)
    return addresses


def _parse_mode(text):
    if not re.fullmatch("0?[0-7]{3}", text):
        raise ValueError("%r is not a mode such as 0600 or 0660" % text)
    return int(text, 8)


_SIZE = "a size such as 512, 64kb, 16mb or 1gb"
_TIME = "a time such as 100ms, 30s, 5m, 1h or 1d"
_WHOLE = "a whole number from 1"
SIZE = _number_of(_SIZE, _SIZES)
SIZE_LIMIT = _number_of(_SIZE, _SIZES, 1, unlimited=UNLIMITED)
ITEM_SIZE = _number_of(_SIZE, _SIZES, 1, 1 << 30)
LINE_SIZE = _number_of(_SIZE, _SIZES, 512, 1 << 20)
MEMORY = _number_of(_SIZE, _SIZES, **{"auto": None, "0": UNLIMITED})
TIME = _number_of(_TIME, _TIMES)
SHORT_TIME = _number_of("a time such as 100us or 1ms", {"us": 1, "ms": 1000})
TIME_OR_NEVER = _number_of(_TIME, _TIMES, never=None)
# Kestrel's older configurations say 0 where they mean that a thing never times out.
TIMEOUT = _number_of(_TIME, _TIMES, **{"never": None, "0": None})
COUNT = _number_of(_WHOLE, {"": 1}, 1)
COUNT_LIMIT = _number_of(_WHOLE, {"": 1}, 1, unlimited=UNLIMITED)
PORT = _number_of("a port", {"": 1}, 0, 65535)
PORT_OR_OFF = _number_of("a port", {"": 1}, 0, 65535, off=None)
ADMIN_PORT = _number_of("a port", {"": 1}, 0, 65535, **{"off": None, "0": None})
FLAG = Kind(_parse_flag, lambda flag: "true" if flag else "false")
TEXT = Kind(_parse_text, str)
TEXT_OR_NONE = Kind(str, str)
STATUS = _one_of(*map(str.lower, STATUSES))
NAME = Kind(lambda text: check_name(text) if text else None, lambda name: name or "")
NAMES = Kind(lambda text: _list_of(check_name).parse(text) or check_name(""), ", ".join)
WORDS = _list_of(str)
ADDRESSES = Kind(_parse_addresses, ", ".join)
NETWORKS = _list_of(ipaddress.ip_network)
FLAG_OR_NETWORKS = Kind(
    lambda text: FLAG.parse(text) if text.lower() in configparser.ConfigParser.BOOLEAN_STATES
    else NETWORKS.parse(text) or FLAG.parse(text),
    lambda value: FLAG.show(value) if isinstance(value, bool) else NETWORKS.show(value))
MODE = Kind(_parse_mode, "{:04o}".format)

# What each section of the config file may set: name -> (kind, default as written).
SERVER_SETTINGS = {
    "listen": (ADDRESSES, "127.0.0.1"),
    "socket_mode": (MODE, "0600"),
    "allow": (NETWORKS, ""),
    "proxy_protocol": (NETWORKS, ""),
    "tls_cert": (TEXT_OR_NONE, ""),
    "tls_key": (TEXT_OR_NONE, ""),
    "tls_client_ca": (TEXT_OR_NONE, ""),
    "auth_file": (TEXT_OR_NONE, ""),
    "admin_hosts": (WORDS, ""),
    "admin_commands": (_one_of("", "local", "all", "none"), ""),
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
    "max_queues": (COUNT_LIMIT, "100000"),
    "max_children": (COUNT_LIMIT, "1000"),
    "max_line": (LINE_SIZE, "8kb"),
    "max_item_size": (ITEM_SIZE, "128mb"),
    "max_memory": (MEMORY, "auto"),
    "max_output_buffer": (SIZE, "1mb"),
    "min_free_space": (SIZE, "64mb"),
    "send_timeout": (TIMEOUT, "1m"),
    "connection_limit_refuse_writes": (COUNT_LIMIT, "unlimited"),
    "connection_limit_refuse_reads": (COUNT_LIMIT, "unlimited"),
    "default_status": (STATUS, "up"),
    "status_file": (TEXT_OR_NONE, ""),
    "status_change_grace_period": (TIME, "0"),
    "status_command": (TEXT_OR_NONE, ""),
    "scrub_interval": (TIME_OR_NEVER, "never"),
    "enable_session_trace": (FLAG_OR_NETWORKS, "false"),
    "log_level": (_one_of("debug", "info", "warning", "error"), "info"),
    "log_file": (TEXT_OR_NONE, ""),
    "value_key": (_one_of("asked", "queue"), "asked"),
    "flush_all_reply": (_one_of("kestrel", "memcached"), "kestrel"),
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
    "check_journal": (FLAG, "true"),
    "expire_to_queue": (NAME, ""),
    "max_expire_sweep": (COUNT_LIMIT, "unlimited"),
    "fanout_only": (FLAG, "false"),
    "max_queue_age": (TIMEOUT, "never"),
    "open_transaction_timeout": (TIMEOUT, "never"),
    "max_deliveries": (COUNT_LIMIT, "unlimited"),
    "dead_letter_queue": (NAME, ""),
    "keep_flags": (FLAG, "true"),
    "enable_trace": (FLAG, "false"),
    "put_users": (WORDS, ""),
    "get_users": (WORDS, ""),
}
ALIAS_SETTINGS = {
    "destination_queues": (NAMES, None),
}

# Kestrel's names of settings that do more here.
_OLD_NAMES = {"listen_address": "listen"}

# The [server] settings that change at once with a reload.
RELOADED = ("allow", "proxy_protocol", "tls_cert", "tls_key", "tls_client_ca", "admin_commands",
            "log_level", "log_file", "enable_session_trace")


_USER = re.compile(r"([^\s,:]+):(pbkdf2\$[1-9][0-9]{0,6}\$(?:[0-9a-f]{2})+\$[0-9a-f]{64})")


def _setting_of(key):
    """Return the name of the setting that a key of the config file stands for."""
    return _OLD_NAMES.get(key.lower(), key.lower())


def _defaults(settings):
    return {key: kind.parse(default) for key, (kind, default) in settings.items()}


_QUEUE_DEFAULTS = _defaults(QUEUE_SETTINGS)


def _shown(settings, values):
    return ["%s = %s" % (key, kind.show(values[key])) for key, (kind, _) in settings.items()]


def _hint(key, settings):
    """Return what an error says about the unknown name of a setting: what may be meant."""
    for section, others in (("server", SERVER_SETTINGS), ("queue", QUEUE_SETTINGS)):
        if key in others:
            return "; it belongs in [%s]" % section
    import difflib
    near = ([name for name in settings if name.endswith("_" + key)]        # `port`, say
            or difflib.get_close_matches(key, settings, 1))
    return "; did you mean %s?" % near[0] if near else ""


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
        """Return each setting as `key = value`, as in the config file."""
        return _shown(QUEUE_SETTINGS, vars(self))


@functools.lru_cache(maxsize=None)
def tls_socket_class():
    """Return the class of TLS sockets."""
    import ssl

    class TLSSocket(ssl.SSLSocket):
        """A TLS socket that behaves like a plain non-blocking one: the handshake is part of the
        first reads."""

        _is_over = False                 # it has been shut down

        def recv(self, size):
            if self._is_over:
                return super().recv(size)    # not decrypted: nobody looks at it
            try:
                return self.read(size)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise BlockingIOError from None
            except ValueError as error:      # the client had gone before the socket was wrapped
                raise ConnectionError(str(error)) from None

        def send(self, data):
            try:
                # Some versions of OpenSSL reject empty data.
                return super().send(data) if data else 0
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise BlockingIOError from None

        def sendmsg(self, buffers):
            # After SSLWantWriteError OpenSSL expects the same bytes again, or more.
            return self.send(b"".join(buffers))

        def shutdown(self, how):
            self._say_goodbye()
            super().shutdown(how)

        def close(self):
            self._say_goodbye()
            super().close()

        def _say_goodbye(self):
            with contextlib.suppress(OSError, ValueError):
                self.unwrap()                # send close_notify, without waiting for the reply
            self._is_over = True

    return TLSSocket


# How many pairs of a user and a queue are remembered for each right.
_MOST_PERMITTED = 10000


class Config:
    """Everything that a config file says. `server` holds the [server] settings, `tls` an
    ssl.SSLContext or None, `users` {name: what hash_password() has made}, None if there is no
    auth_file.

    `path` is an INI file (configparser), None for the defaults. `overrides` are [server]
    settings as text, which take precedence over the file's. Raises ConfigError.
    """

    def __init__(self, path: "str | None" = None,
                 overrides: "dict[str, str] | None" = None) -> None:
        self.path = path
        self.overrides = overrides or {}
        self.permitted = {"put_users": set(), "get_users": set()}      # (user, key), see permit()
        self.aliases = {}
        self._queues = {}                # what the sections of queues say, by name
        self._queue_configs = {}         # (names of sections) -> QueueConfig, see queue()
        self._lines = []
        self._mistakes = []              # (why, header, key or None)
        server = {}
        for header, texts in self._sections():
            kind, _, name = header.partition(" ")
            name = name.strip()
            if header == "server":
                server = self._values(header, SERVER_SETTINGS, texts)
            elif kind == "queue":
                self._add(header, self._queues, name,
                          self._values(header, QUEUE_SETTINGS, texts))
            elif kind == "alias" and name:
                alias = self._values(header, ALIAS_SETTINGS, texts)
                if not texts:
                    self._note("destination_queues is missing", header)
                self._add(header, self.aliases, name, alias.get("destination_queues"))
            else:
                self._note("unknown section [%s]; there are [server], [queue], [queue NAME] "
                           "and [alias NAME]" % header, header)
        server.update(self._values("command line", SERVER_SETTINGS, self.overrides))
        # The checks that follow compare settings. With a default in the place of a bad one they
        # would report mistakes that nobody has made.
        self._raise_mistakes()
        self.given = server.keys()       # the [server] settings that are not just defaults
        self.server = Values(**{**_defaults(SERVER_SETTINGS), **server})
        self._check_aliases()
        self._check_server()
        self.tls = self._read_tls()
        self.users = self._read_auth_file()
        self._check_queues()
        self._raise_mistakes()

    def queue(self, name):
        """Return the QueueConfig of `name`: built-in, then [queue], [queue q], [queue q+child].
        Queues to which the same sections apply share one."""
        sections = tuple([section for section in dict.fromkeys(("", name.partition("+")[0], name))
                          if section in self._queues])
        config = self._queue_configs.get(sections)
        if config is None:
            values = {}
            for section in sections:
                values.update(self._queues[section])
            config = self._queue_configs[sections] = QueueConfig(**values)
        return config

    def may(self, user, right, name, seen=()):
        """Return whether a user may use a queue, which need not exist. right: put_users or
        get_users."""
        users = getattr(self.queue(name), right)
        if users and user not in users:
            return False
        # A child of an alias gets what is put to all queues of the alias. One of these may itself
        # be a child of the alias.
        parent, is_child, _ = name.partition("+")
        return not is_child or all(
            self.may(user, right, other, (*seen, name))
            for other in self.aliases.get(parent, ()) if other not in (*seen, name))

    def permit(self, right, user, key):
        """Remember in `permitted` that a user may use a queue. key: its name, or the bytes that
        stand for it in a command."""
        known = self.permitted[right]
        if len(known) >= _MOST_PERMITTED:
            known.clear()
        known.add((user, key))

    def lines(self):
        """Return the effective settings as lines of a config file."""
        lines = ["[server]", *_shown(SERVER_SETTINGS, vars(self.server)), "",
                 "[queue]", *self.queue("").lines()]
        for name in sorted(filter(None, self._queues)):
            lines += ["", "[queue %s]" % name, *self.queue(name).lines()]
        for name, destinations in sorted(self.aliases.items()):
            lines += ["", "[alias %s]" % name,
                      "destination_queues = " + NAMES.show(destinations)]
        return lines

    def _sections(self):
        """Return (header, {key: text}) of each section of the file."""
        if self.path is None:
            return []
        parser = configparser.ConfigParser(
            interpolation=None, default_section="", inline_comment_prefixes=("#",),
            empty_lines_in_values=False)
        parser.optionxform = _setting_of
        bad = {}                         # number of a line -> why
        try:
            with open(self.path, encoding="utf-8-sig") as file:
                self._lines = file.read().split("\n")
            bad = {number: "a NUL in the file"
                   for number, line in enumerate(self._lines, 1) if "\0" in line}
            if not bad:
                parser.read_file(iter(line + "\n" for line in self._lines), self.path)
                return [(header, dict(parser[header])) for header in parser.sections()]
        except OSError as error:
            raise ConfigError("%s: %s" % (self.path, error.strerror)) from None
        except UnicodeDecodeError as error:
            raise ConfigError("%s: not UTF-8 text: %s" % (self.path, error)) from None
        except configparser.DuplicateSectionError as error:
            bad[error.lineno] = "duplicate section [%s]" % error.section
        except configparser.DuplicateOptionError as error:
            bad[error.lineno] = "%s is set twice in [%s]" % (error.option, error.section)
        except configparser.MissingSectionHeaderError as error:
            bad[error.lineno] = "neither a [section] nor a setting in one"
        except configparser.ParsingError as error:
            bad = dict.fromkeys([number for number, _ in error.errors],
                                "neither [section] nor key = value")
        finally:
            # A parser and its sections form cycles, and the garbage collector is off.
            for one in [*parser.values(), parser]:
                vars(one).clear()
        raise ConfigError("\n".join("%s:%d: %s" % (self.path, *line) for line in bad.items()))

    def _values(self, header, settings, texts):
        """Return {name: value} of the settings in a section."""
        values = {}
        for key, text in texts.items():
            if key not in settings:
                self._note("unknown setting %s in [%s]%s" % (key, header, _hint(key, settings)),
                           header, key)
            else:
                try:
                    values[key] = settings[key][0].parse(text)
                except ValueError as error:
                    self._note("%s: %s" % (key, error), header, key)
        return values

    def _check_aliases(self):
        """Note aliases of aliases, queues that they name twice, and names of queues."""
        for name, destinations in self.aliases.items():
            header = "alias " + name
            if name in self._queues:
                self._note("%s is both an alias and a queue" % name, header)
            for other in dict.fromkeys(destinations):
                why = ("is an alias itself" if other in self.aliases else
                       "is named twice" if destinations.count(other) > 1 else "")
                if why:
                    self._note("destination_queues: %s %s" % (other, why), header,
                               "destination_queues")

    def _check_server(self):
        """Note [server] settings that contradict each other, or do not fit this machine."""
        settings = self.server
        ports = {}
        for key in ("memcache_port", "text_port", "thrift_port", "admin_port"):
            port = getattr(settings, key)
            if port and port in ports and (key != "admin_port" or key in self.given):
                self._note("%s: %d is the %s too" % (key, port, ports[port]), "server", key)
            ports[port] = key
        paths = [(key, getattr(settings, key)) for key in ("log_file", "status_file")]
        paths += [("listen", address[5:]) for address in settings.listen
                  if address.startswith("unix:")]
        for key, path in paths:
            directory = os.path.dirname(path) or "."
            where = "command line" if key in self.overrides else "server"
            if not path:
                continue
            if not os.path.isdir(directory):
                self._note("%s: there is no directory %s" % (key, directory), where, key)
            elif key != "listen" and "." not in os.path.basename(path) and (
                    os.path.abspath(directory) == os.path.abspath(settings.queue_path)):
                self._note("%s: a file of this name in the spool would be taken for a queue" % key,
                           where, key)

    def _check_queues(self):
        """Note queues whose items would be moved to themselves, or nowhere, and users of queues
        that the auth_file does not have."""
        knows_users = self.users is not None or not self.server.auth_file     # else it is bad
        for name, values in self._queues.items():
            header = ("queue " + name).strip()
            for key in ("expire_to_queue", "dead_letter_queue"):
                target = values.get(key)
                if target and name and name in self.aliases.get(target, (target,)):
                    self._note("%s: items of %s would go to itself" % (key, name), header, key)
            if values.get("max_deliveries", UNLIMITED) != UNLIMITED and not (
                    self.queue(name).dead_letter_queue):
                self._note("max_deliveries: it needs a dead_letter_queue", header,
                           "max_deliveries")
            for key in ("put_users", "get_users"):
                for user in values.get(key, ()) if knows_users else ():
                    if user not in (self.users or ()):
                        self._note("%s: there is no %s" % (
                            key, "auth_file" if self.users is None
                            else "%s in the auth_file" % user), header, key)

    def _read_tls(self):
        """Return the ssl.SSLContext of the ports, None without a tls_cert."""
        settings = self.server
        given = {key: getattr(settings, key) for key in ("tls_cert", "tls_key", "tls_client_ca")}
        if not any(given.values()):
            return None
        import ssl
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sslsocket_class = tls_socket_class()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)      # not on PyPy
        for key, path in given.items():
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
                    # Without `password`, OpenSSL would ask for one at the terminal.
                    context.load_cert_chain(settings.tls_cert, path, password=lambda: "")
            except ssl.SSLError as error:
                return self._note("%s: %s has no %s: %s" % (key, path, lacks, error), "server",
                                  key)
            except (OSError, ValueError) as error:
                return self._note("%s: %s" % (key, error), "server", key)
        return context

    def _read_auth_file(self):
        """Return {name: password hash} of the auth_file, None without one, or if it is bad."""
        path = self.server.auth_file
        if not path:
            return None
        for key in ("text_port", "thrift_port"):
            if getattr(self.server, key) is not None:
                self._note("auth_file: clients of %s cannot log in there; turn it off" % key,
                           "server", "auth_file")
        users = {}
        try:
            with open(path, encoding="utf-8-sig") as file:
                for number, line in enumerate(map(str.strip, file), 1):
                    match = _USER.fullmatch(line)
                    if match and match[1] not in users:
                        users[match[1]] = match[2]
                    elif line and not line.startswith("#"):
                        return self._note(
                            "auth_file %s:%d: not NAME:HASH with a new name, and what "
                            "--hash-password prints" % (path, number), "server", "auth_file")
        except (OSError, UnicodeDecodeError) as error:
            return self._note("auth_file %s: %s" % (path, error), "server", "auth_file")
        return users

    def _add(self, header, known, name, values):
        """Keep the values of a [queue NAME] or [alias NAME]; note a name that cannot be used."""
        if name in known:
            self._note("duplicate section [%s]" % header, header)
        if name:
            try:
                check_name(name)
            except ValueError as error:
                self._note(str(error), header)
        known[name] = values

    def _note(self, why, header, key=None):
        """Note a mistake in a section, or in one of its settings."""
        self._mistakes.append((why, header, key))

    def _raise_mistakes(self):
        """Raise ConfigError if mistakes have been noted."""
        if not self._mistakes:
            return
        places, section = {}, ""
        for number, text in enumerate(self._lines, 1):
            match = re.match(r"\[(.+)\]", text.strip())
            section = match[1] if match else section
            key = None if match else _setting_of(re.split("[=:]", text)[0].strip())
            for header in (section, " ".join(section.split())):
                places.setdefault((header, key), "%s:%d" % (self.path, number))
        raise ConfigError("\n".join("%s: %s" % (places.get((header, key), header), why)
                                    for why, header, key in self._mistakes))


# == 2. Access ============================================================================
#
# Password hashes and logins. (The broker knows which user may use which queue.) Knows names and
# passwords; no queues, no sockets.

# The delay after a wrong password, per host, and how many logins of a host may queue.
_LOGIN_REST_MS = 1000
_LOGINS = 100

# The longest name and password, in bytes; how long a client may take to send them, or for the
# TLS handshake.
MAX_LOGIN = 1024
LOGIN_MS = 60000


def hash_password(password, salt=None, rounds=200000):
    """Hash a password (bytes) for an auth_file: PBKDF2 (RFC 8018) with HMAC-SHA256, written as
    `pbkdf2$rounds$salt$digest`. Deliberately slow: about 0.1 s of processor time."""
    import hashlib
    salt = salt or os.urandom(16)
    digest = hashlib.pbkdf2_hmac("sha256", password, salt, rounds)
    return "pbkdf2$%d$%s$%s" % (rounds, salt.hex(), digest.hex())


def is_password(password, stored):
    """Return whether a password (bytes) matches what hash_password() has returned."""
    import hmac
    _, rounds, salt, _ = stored.split("$")
    made = hash_password(password, bytes.fromhex(salt), int(rounds))
    return hmac.compare_digest(made, stored)


# The password of an unknown user is checked against this, so that it takes as long.
_NOBODY = "pbkdf2$200000$%032d$%064d" % (0, 0)


# A password to be checked, see Logins.check().
_Login = collections.namedtuple("_Login", "client name password done")


class Logins:
    """Checks names and passwords on a worker thread: those of a host one after the other, and at
    most one wrong one per host and second. Right passwords are cached.

    broker: has `config` with the users, `aside(work, done)`, which runs work() on a thread and
    then done(error) on the loop, and `later`, see Alone.
    """

    def __init__(self, broker):
        self._broker = broker
        self._key = os.urandom(32)
        self._known = set()              # keyed digests of passwords that were right
        self._lines = {}                 # host -> list of _Logins, the first is being checked

    def check(self, client, name, password, done):
        """Call done(user): the name as text if that is its password (both bytes), else None.
        client: has `who`, `peer.host`, `at_end` (it will say no more) and `is_over()` (nobody
        waits for the answer)."""
        host, login = client.peer.host, _Login(client, name, password, done)
        line = self._lines.get(host)
        if self._digest(name, password) in self._known:
            done(os.fsdecode(name))
        elif line is None:
            self._lines[host] = [login]
            self._go_on(host)
        else:
            line.append(login)
            if len(line) > _LOGINS:          # drop the last that has hung up, or this one
                last = next((one for one in line[:0:-1] if one.client.at_end), login)
                line.remove(last)
                last.done(None)

    def _stored(self, name):
        return self._broker.config.users.get(os.fsdecode(name), _NOBODY)

    def _digest(self, name, password):
        import hmac
        stored = self._stored(name)      # so that a changed password is not known any more
        return hmac.new(self._key, b"%b %b" % (stored.encode(), password), "sha256").digest()

    def _go_on(self, host):
        """Check the next password of a host."""
        # Those that have hung up come last: most of them do not wait for the answer.
        line = self._lines[host] = sorted(
            (one for one in self._lines[host] if not one.client.is_over()),
            key=lambda one: one.client.at_end)
        if not line:
            del self._lines[host]
            return
        login = line[0]
        digest = self._digest(login.name, login.password)
        if digest in self._known:
            self._finish(host, digest)
        else:
            self._broker.aside(
                functools.partial(self._learn, digest, login.password, self._stored(login.name)),
                lambda error: self._finish(host, digest))

    def _learn(self, digest, password, stored):
        if is_password(password, stored):
            self._known.add(digest)

    def _finish(self, host, digest):
        login = self._lines[host].pop(0)
        name, is_right = os.fsdecode(login.name), digest in self._known
        if not is_right:
            # Only known names are logged: a client that has not logged in may have sent an item.
            log.warning("%s: wrong password for %s", login.client.who,
                        name if self._stored(login.name) != _NOBODY else "an unknown user")
        login.done(name if is_right else None)
        self._broker.later(0 if is_right else _LOGIN_REST_MS,
                           functools.partial(self._go_on, host))


# == 3. Records ===========================================================================
#
# Items, the records that stand for what was done with them, and damage to records. The format
# is Kestrel's own (2.1 to 2.4, net.lag.kestrel.Journal) so that a spool can be taken over and
# handed back. A journal is a sequence of operations; the queue is empty at its start, and doing
# each operation in order gives the queue. Knows the bytes of one file; no queues, no clients.


def _now(now=None):
    """Return `now`, or the time of day in milliseconds if that is None."""
    return time.time_ns() // 1000000 if now is None else now


class Place:
    """Where the data of an item is: in which JournalFile, at which offset, how many bytes. All
    copies of an item share it, so that it can be moved. crc: the CRC-32 of the data, and of `head`
    bytes before it; None if it is not known."""

    __slots__ = ("file", "offset", "size", "head", "crc")

    def __init__(self, file, offset, size, head=0, crc=None):
        self.file = file
        self.offset = offset
        self.size = size
        self.head = head
        self.crc = crc


class Item:
    """One item of a queue.

    data: bytes; None while it is only on disk, at `place`. flags: the memcache client's 32 bits.
    add_time and expiry: milliseconds of the epoch, expiry 0 for none. deliveries: how often it was
    handed out and came back. xid: the number of the latest open read of it. cas: the number that
    `gets` gave it, None if none did. place: the Place of its data, if it was read from there.
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

    def __repr__(self):
        return "<Item xid=%d data=%.80r>" % (self.xid, self.data)

    def stub(self):
        """Return a copy without the data, which is read again from `place` when it is needed."""
        stub = Item(None, self.add_time, self.expiry, self.flags, self.deliveries)
        stub.xid, stub.cas, stub.place = self.xid, self.cas, self.place
        if self.place and self.data is not None and self.place.crc is None:
            self.place.head, self.place.crc = 0, zlib.crc32(self.data)
        return stub


# What of a queue is paused: puts (1), gets (2), or both, in words.
PAUSED_IN, PAUSED_OUT = 1, 2
PAUSES = ("no", "in", "out", "in and out")

# The memory overhead of an item in bytes, as measured with CPython 3.8 to 3.13.
ITEM_COST = 200

# The opcodes. This server writes ADDX, REMOVE, SAVE_XID, OPEN, CONFIRM, UNREMOVE, and ADDF for an
# item with flags or deliveries; it only reads the others of Kestrel. CHECK closes each write, see
# below. Those from 12 on are for what Kestrel does not have: CONTINUEF moves an item that is open
# or delayed to the tail, DELAY makes an open read a delayed item, ADD_DELAYED adds one, PAUSE
# pauses a queue, PUT_BACK is an UNREMOVE that does not count as a delivery.
ADD, REMOVE, ADDX, OPEN_NEXT, SAVE_XID = 0, 1, 2, 3, 4
UNREMOVE, CONFIRM, ADD_XID, CONTINUE, OPEN, ADDF = 5, 6, 7, 8, 9, 10
CHECK, CONTINUEF, DELAY, ADD_DELAYED, PAUSE, PUT_BACK = 11, 12, 13, 14, 15, 16

# The opcodes of the records that read_run() reads.
_IN_RUNS = frozenset([ADDX, ADDF, ADD_DELAYED, CHECK])

# Operations that have no opcode of their own. FLUSH: as many REMOVEs as there are waiting items.
# TO_TAIL, DUE_TAIL: CONTINUEF of an open read, or of a delayed item whose time has come. DUE_HEAD:
# UNREMOVE of such an item. DROP: CONFIRM of all delayed items.
FLUSH, TO_TAIL, DUE_TAIL, DUE_HEAD, DROP = -1, -2, -3, -4, -5

OPCODE_NAMES = {
    ADD: "ADD", REMOVE: "REMOVE", ADDX: "ADDX", OPEN_NEXT: "REMOVE_TENTATIVE",
    SAVE_XID: "SAVE_XID", UNREMOVE: "UNREMOVE", CONFIRM: "CONFIRM_REMOVE", ADD_XID: "ADD_XID",
    CONTINUE: "CONTINUE", OPEN: "REMOVE_TENTATIVE_XID", ADDF: "ADDF", CHECK: "CHECK",
    CONTINUEF: "CONTINUEF",
    DELAY: "DELAY", ADD_DELAYED: "ADD_DELAYED", PAUSE: "PAUSE", PUT_BACK: "PUT_BACK",
    FLUSH: "FLUSH",
    TO_TAIL: "CONTINUEF", DUE_TAIL: "CONTINUEF", DUE_HEAD: "UNREMOVE", DROP: "FLUSH",
}

# What comes before the data: opcode, xid, time when it is due, size, add time, expiry, flags and
# deliveries, as far as the opcode has them. `size` counts all bytes after it.
_HEADS = {
    ADD: struct.Struct("<Bii"),
    ADDX: struct.Struct("<Biqq"),
    ADD_XID: struct.Struct("<Biiqq"),
    CONTINUE: struct.Struct("<Biiqq"),
    ADDF: struct.Struct("<BiqqII"),
    CONTINUEF: struct.Struct("<BiiqqII"),
    ADD_DELAYED: struct.Struct("<BiqiqqII"),
}
_ADDX = _HEADS[ADDX]                   # that most items have
_LONGEST_HEAD = max(head.size for head in _HEADS.values())
_FLAGS = struct.Struct("<II")          # at the end of a longer head: flags, deliveries
_XID = struct.Struct("<Bi")
_DELAY = struct.Struct("<Biq")
_CHECK = struct.Struct("<BIIQ")
_SUM = struct.Struct("<IIQ")           # a CHECK without its opcode

# An item that is not available before `due`, milliseconds of the epoch; xid: the number that it is
# known by. Then it goes to the head, from which it came, or to the tail.
Delayed = collections.namedtuple("Delayed", "due xid item to_head")

# A larger count of deliveries means a corrupt record; none is written.
_MOST_DELIVERIES = 1000000

_READ_SIZE = 1 << 17
_LARGE = 1 << 20                # bytes of a write that is not done on the loop's thread
_STEP_SIZE = 1 << 20            # bytes that a task reads or writes in one step
# How many bytes of a journal are read at a time when it is loaded. The C library returns the memory
# of larger pieces to the system each time, which makes a start a quarter longer.
_LOAD_SIZE = 1 << 18

# The stand-in for a lost item in a repaired journal. No client is given it.
LOST = Item(b"", 0, 1)


# -- check sums
#
# A CHECK closes each write. It has the number of bytes since the last CHECK, their CRC-32, and the
# *ends*: how many items the records of this file that have check sums added to the tail of the
# queue (24 bits), took from its head (24 bits) and put back there (16 bits). A CHECK of no bytes is
# a *mark*: check sums begin after it if there were none before it, and end there if there were. So
# it is known which bytes must have a check sum, how many items were moved by those that are
# damaged, and whether writes are missing between two others. A CHECK covers at most 2 * _SPAN
# bytes, or one operation. A file in which a turn added two items, and the next opened one of them:
#
#     CHECK 0, 0 0 0     ADDX ADDX CHECK 90, 2 0 0     OPEN CHECK 5, 2 1 0
#
# If the second write is damaged, the ends before and after it still tell that it added two items.
# In the code the ends are one number, so a sum or a difference does for all three. The CRC of a
# mark covers its ends; that of another CHECK does not, so its ends may be wrong alone.

_SPAN = 1 << 18
_MOST_ENDS = (1 << 64) - 1
_OPCODE_CHECK = bytes([CHECK])
_CUT_OUT = 1 << 18              # how many items may be missing where no bytes look damaged,
_CUT_OUT_LAST = 1 << 12         # and before the last write of a file, whose ends may be wrong
_MISPLACED = 1 << 16            # how many bytes may be in a wrong place

# The first mark of a pack, and of a file that is begun while all is written anew, has other ends
# than 0. In place of the put-backs it has one of these bits, and below it the last 14 bits of how
# many items an older file has added: for a pack the last file that it stands for, for a file begun
# anew the one before it. So a lost end of that file is noticed, see _lost_tail(). Later CHECKs have
# the bits too, and tell which kind of file it is even if that mark is damaged.
_PACK, _BEGUN_ANEW = 1 << 14, 1 << 15

# Numbers of open reads from _ASIDE on are for items whose REMOVEs are lost. _LOST is for lost items
# that are put back.
_ASIDE, _LOST = 0x7f000000, 0x7fffffff


def _mark_sum(begins, ends):
    """Return the CRC in the mark where check sums begin, or end."""
    return zlib.crc32(ends.to_bytes(8, "little")) ^ (0 if begins else 0xffffffff)


def _mark(begins, ends):
    return _CHECK.pack(CHECK, 0, _mark_sum(begins, ends), ends)


def _moved(ends, moves):
    """Return the ends after some moves, see _MOVES; before them if `moves` is negative."""
    return ends + moves & _MOST_ENDS


def _go_on(ends, added, taken, back):
    """Return the ends after so many more items were added, taken and put back."""
    return _moved(ends, (added << 40) + (taken << 16) + back)


def _between(ends, after):
    """Return how many items were (added, taken, put back) between these ends."""
    moves = _moved(after, -ends)
    return moves >> 40, moves >> 16 & 0xffffff, moves & 0xffff


def _added(ends):
    """Return how many items were added, of these ends."""
    return ends >> 40


def _first_ends(waiting, added):
    """Return the ends in the first mark of a file that is begun while all is written anew. waiting:
    how many items wait then. added: how many items the file before it has added in all."""
    return _go_on(_BEGUN_ANEW + (added % _PACK if waiting else 0), waiting, 0, 0)


def _after_check(check, ends):
    """Return the ends after a CHECK, None if check sums end there. check: (bytes, CRC, ends) of it.
    ends: before it, None if there were no check sums."""
    return check[2] if check[0] or ends is None else None


# How much the records move the ends.
_MOVES = collections.defaultdict(
    int, [(opcode, 1 << 40) for opcode in (ADD, ADDX, ADD_XID, CONTINUE, ADDF, CONTINUEF)]
    + [(opcode, 1 << 16) for opcode in (REMOVE, OPEN_NEXT, OPEN)]
    + [(opcode, 1) for opcode in (UNREMOVE, PUT_BACK)])


def is_lost(item):
    """Return whether the item stands for one that was lost."""
    return item.expiry == 1 and not item.add_time and not item.data


class Damage(Exception):
    """There is no whole record at byte `offset` of a journal. torn: the file just ends there. file:
    the JournalFile, if the reader cannot know it."""

    def __init__(self, offset, why, torn, file=None):
        super().__init__("%s at byte %d" % (why, offset))
        self.offset = offset
        self.why = why
        self.torn = torn
        self.file = file


def read_records(file, piece=_READ_SIZE, take_run=None, ends=None):
    """Yield (opcode, xid, item, end offset) for each record of the open binary `file`, which
    is read in pieces of `piece` bytes, enough for a head.

    The item is None and the xid 0 where the record has none; for DELAY and ADD_DELAYED the xid is
    a tuple (xid, due), for PAUSE what is paused, for CHECK a tuple (bytes, CRC, ends). Raises
    Damage at the first byte from which no whole record can be read; at the first record whose check
    sum is wrong, which is known after the record has been yielded; at a CHECK whose sum is right,
    but whose ends do not follow from those before it. ends: at the beginning of `file`, if there
    must be check sums from there on. take_run: called with (data, pos, the offset of data in the
    file, the index in data of what the next CHECK covers or None, the ends at pos) where several
    records follow that read_run() may read. It returns (where it has stopped reading, where the
    last CHECK that it has read ends or None, how many items it has read).
    """
    data, pos, base = b"", 0, 0           # data[pos] is the byte base + pos of the file
    span = 0                              # the next CHECK covers data[span:]
    unpack_addx = _ADDX.unpack_from
    checked = ends is not None
    ends = ends or 0                      # by what has been read
    opcode = ADDX                        # as if an item stood before the first record
    while True:
        if len(data) - pos < _LONGEST_HEAD:
            done = span if checked else pos
            more = file.read(max(piece, len(data) - done))
            if more:
                data = data[done:] + more
                base, pos, span = base + done, pos - done, 0
            elif pos == len(data):
                if checked and pos > span:
                    raise Damage(base + span, "no check sum", torn=True)
                return
        last, opcode = opcode, data[pos]
        xid = 0
        try:
            if take_run and opcode in _IN_RUNS and last in _IN_RUNS:       # perhaps very many
                end, closed, count = take_run(data, pos, base, span if checked else None, ends)
                span = closed or span
                if end > pos:
                    pos = end
                    ends += count << 40
                    continue
            if opcode == ADDX:               # as a rule
                _, size, add_time, expiry = unpack_addx(data, pos)
                item, start, size = Item(None, add_time, expiry), pos + 21, size - 16
            elif opcode in _HEADS:
                item, xid, start, size = _parse_head(data, pos)
                if item.deliveries > _MOST_DELIVERIES:      # an ADDX with a flipped bit
                    raise Damage(base + pos, "impossible count of deliveries", torn=False)
            else:
                if opcode in (OPEN, CONFIRM, UNREMOVE, SAVE_XID, PAUSE, PUT_BACK):
                    _, xid = _XID.unpack_from(data, pos)
                    pos += 4
                elif opcode == CHECK:
                    _, *xid = _CHECK.unpack_from(data, pos)
                    size, crc, after = xid
                    if size != (pos - span if checked else 0) or crc != (
                            zlib.crc32(memoryview(data)[span:pos]) if size
                            else _mark_sum(not checked, after)):
                        raise Damage(base + (span if checked else pos), "wrong check sum", False)
                    if checked and after != ends & _MOST_ENDS:
                        raise Damage(base + pos, "write out of sequence", False)
                    ends = after
                    checked = size > 0 or not checked
                    pos += _CHECK.size - 1
                    span = pos + 1
                elif opcode == DELAY:
                    _, *xid = _DELAY.unpack_from(data, pos)
                    pos += 12
                elif opcode not in (REMOVE, OPEN_NEXT):
                    raise Damage(base + pos, "unknown opcode %d" % opcode, torn=False)
                pos += 1
                ends += _MOVES[opcode]
                yield opcode, xid, None, base + pos
                continue
        except struct.error:
            raise Damage(base + pos, "record cut short", torn=True) from None
        if size < 0:
            zeros = opcode == ADD and _only_zeros(data[pos:], file)
            raise Damage(base + pos, "zeros" if zeros else "impossible size", zeros)
        end = start + size
        if end > len(data):
            done = span if checked else pos
            data = data[done:] + file.read(max(piece, end - len(data)))
            base, pos, span = base + done, pos - done, 0
            start, end = start - done, end - done
            if end > len(data):
                raise Damage(base + pos, "record cut short", torn=True)
        item.data = data[start:end]
        pos = end
        ends += _MOVES[opcode]
        yield opcode, xid, item, base + pos


def read_run(data, pos, span, ends, items, room, delayed):
    """Read the whole records at data[pos:] that add items, with the CHECKs between them. Append
    the items to `items`, as many as `room` bytes of memory have room for, or skip all that follow
    if it is None; append each Delayed to `delayed`.

    span: where what the next CHECK covers begins, None if there are none. ends: at data[pos].
    Return (the end of the last record, the number of items apart from delayed ones, the size of
    their data, the last CHECK: (its end, how many items are before it, the ends in it), or None).
    Of a CHECK that covers nothing but skipped items the check sum is looked at when they are read,
    here only how much it covers, and the ends.
    """
    unpack, unpack_check, crc32 = _ADDX.unpack_from, _SUM.unpack_from, zlib.crc32
    unpack_flags, unpack_delayed = _FLAGS.unpack_from, _HEADS[ADD_DELAYED].unpack_from
    count = closed = 0
    used = 0                             # of the room
    if items is None:
        room = UNLIMITED
    skipped = False                      # whether what the next CHECK covers was only skipped
    view, whole = memoryview(data), len(data)
    first = span = whole if span is None else span           # no CHECK covers less than nothing
    with contextlib.suppress(struct.error):      # of a record that is cut short
        while pos < whole:                   # the sizes of _HEADS and _CHECK stand as numbers here
            opcode = data[pos]
            if opcode == ADDX or opcode == ADDF:
                _, length, add_time, expiry = unpack(data, pos)
                start, end = pos + 21, pos + 5 + length
                flags = deliveries = 0
                if opcode == ADDF:
                    flags, deliveries = unpack_flags(data, start)
                    start += 8
                    if deliveries > _MOST_DELIVERIES:
                        break
                cost = end - start + ITEM_COST
                if not start <= end <= whole or used + cost > room:
                    break
                if items is not None:
                    items.append(Item(data[start:end], add_time, expiry, flags, deliveries))
                count += 1
                used += cost
                pos = end
            elif opcode == CHECK:
                covers, crc, after = unpack_check(data, pos + 1)
                if covers != pos - span or after - ends != count << 40 or covers == 0 or (
                        not skipped and crc32(view[span:pos]) != crc):
                    break                        # read_records() looks closer
                pos = span = pos + 17
                closed = count
                skipped = items is None
            elif opcode == ADD_DELAYED:
                _, xid, due, length, add_time, expiry, flags, deliveries = unpack_delayed(data, pos)
                start, end = pos + 41, pos + 17 + length
                if not start <= end <= whole or deliveries > _MOST_DELIVERIES:
                    break
                item = Item(data[start:end], add_time, expiry, flags, deliveries)
                delayed.append(Delayed(due, xid, item, False))
                skipped = False
                pos = end
            else:
                break
    return pos, count, used - count * ITEM_COST, None if span == first else (span, closed, after)


def _only_zeros(data, file):
    while data:
        if data.count(0) != len(data):
            return False
        data = file.read(_READ_SIZE)
    return True


def _parse_head(data, pos=0):
    """Return (item without data, xid, where its data begins, its size) of the record at data[pos]
    that adds an item. Raises struct.error if the head is not whole."""
    head = _HEADS[data[pos]]
    _, *fields = head.unpack_from(data, pos)
    xid = uncounted = 0                  # uncounted: the size does not include it
    if data[pos] in (ADD_XID, CONTINUE, CONTINUEF):
        xid, *fields = fields
        uncounted = 4
    elif data[pos] == ADD_DELAYED:
        xid, fields = fields[:2], fields[2:]
        uncounted = 12
    size, *fields = fields
    if data[pos] == ADD:
        fields = 0, fields[0] * 1000
    item = Item(None, *fields)
    if data[pos] == ADD_XID:
        item.xid = xid                   # that the OPEN_NEXT of it will have
    return item, xid, pos + head.size, size - (head.size - 5 - uncounted)


def _head(item, size, deliveries=0):
    """Return the head of the record that adds an item with `size` bytes of data."""
    if item.flags or deliveries:
        return _HEADS[ADDF].pack(ADDF, size + 24, item.add_time, item.expiry, item.flags,
                                 min(deliveries, _MOST_DELIVERIES))
    return _ADDX.pack(ADDX, size + 16, item.add_time, item.expiry)


def _delayed_head(delayed, size, deliveries=0):
    """Return the head of the record that adds a delayed item."""
    item = delayed.item
    return _HEADS[ADD_DELAYED].pack(ADD_DELAYED, delayed.xid, delayed.due, size + 24,
                                    item.add_time, item.expiry, item.flags,
                                    min(deliveries, _MOST_DELIVERIES))


def _encode(ops, ends=0):
    """Return (the records of operations as a list of byte strings, the ends after them)."""
    if ops and ops[0][0] == ops[-1][0] == REMOVE and {op[0] for op in ops} == {REMOVE}:
        return [b"\1" * len(ops)], _go_on(ends, 0, len(ops), 0)     # saves 8 % of a pipelined get
    chunks = []
    added = taken = back = 0             # as _MOVES would say; without a look-up it is faster
    pack = _XID.pack
    for opcode, item, xid in ops:        # those of most records first
        if opcode == ADDX:
            data = item.data
            chunks += _head(item, len(data)), data
            added += 1
        elif opcode == REMOVE:
            chunks.append(b"\1")
            taken += 1
        elif opcode == CONFIRM:
            chunks.append(pack(CONFIRM, xid))
        elif opcode == OPEN:
            chunks.append(pack(OPEN, xid))
            taken += 1
        elif 0 < opcode < OPEN:
            chunks.append(pack(opcode, xid))
            back += opcode == UNREMOVE
        else:
            chunks += _encode_rare(opcode, item, xid)
            added += opcode in (TO_TAIL, DUE_TAIL)
            taken += xid if opcode == FLUSH else 0
            back += opcode in (PUT_BACK, DUE_HEAD)
    return chunks, _go_on(ends, added, taken, back)


def _encode_checked(ops, ends):
    """As _encode(), with CHECKs."""
    chunks, after = _encode(ops, ends)
    size = sum(map(len, chunks))
    if size > _SPAN and len(ops) > 1:
        half = len(ops) // 2
        first, ends = _encode_checked(ops[:half], ends)
        second, ends = _encode_checked(ops[half:], ends)
        return first + second, ends
    return _checked(chunks, size, after), after


def _checked(chunks, size, ends):
    """Return records, and the CHECK for them, as a list of byte strings."""
    if size > _SPAN:
        crc = 0
        for chunk in chunks:
            crc = zlib.crc32(chunk, crc)
        return [*chunks, _CHECK.pack(CHECK, size, crc, ends)]
    data = bytearray().join(chunks)
    data += _CHECK.pack(CHECK, size, zlib.crc32(data), ends)
    return [data]


def _encode_rare(opcode, item, xid):
    """Return the records of an operation that Kestrel does not have, or of a flush."""
    if opcode == FLUSH:
        return [b"\1" * xid]
    if opcode in (PAUSE, PUT_BACK):
        return [_XID.pack(opcode, xid)]
    if opcode == DROP:                   # of perhaps a million
        records = bytearray([CONFIRM]) * 5 * len(item)
        numbers = struct.pack("<%di" % len(item), *item)
        for byte in range(4):
            records[byte + 1::5] = numbers[byte::4]
        return [records]
    if opcode == DELAY:
        return [_DELAY.pack(DELAY, xid, item.due)]
    if opcode == DUE_HEAD:
        return [_XID.pack(UNREMOVE, xid)]
    if opcode == ADD_DELAYED:
        return [_delayed_head(item, len(item.item.data)), item.item.data]
    if opcode == DUE_TAIL:
        item = item.item
    return [_HEADS[CONTINUEF].pack(CONTINUEF, xid, len(item.data) + 24, item.add_time, item.expiry,
                                   item.flags, min(item.deliveries, _MOST_DELIVERIES)), item.data]


# -- damage
#
# Where reading fails, good records may follow: records that are plausible, and can be read to the
# end of the file. Where there are check sums they say what is damaged; where there are none, it is
# guessed in which way one change has led the reader astray.

# Plausible times lie between 2005 and 2100.
_PLAUSIBLE_TIMES = range(1104537600000, 4102444800000)

# Where a record that adds an item may begin: opcode, (xid,) size, a plausible time.
_LIKELY_START = re.compile(rb"(?=[\x02\x0a].{9}[\1-\3]\0\0|[\x07\x08\x0c].{13}[\1-\3]\0\0"
                           rb"|\x0e.{21}[\1-\3]\0\0)", re.S)

# Where reading records without check sums failed. begin: the offset. torn: the file just ends
# there. last, last_end: the last record before it that adds an item, or the first of several
# doubtful ones in a row, and where these end; last is None if there is none. plausible: whether
# it is. mean: the average size of the records that add items there.
_Failure = collections.namedtuple("_Failure", "begin torn last last_end plausible mean")


def _is_plausible(opcode, xid, item):
    if item is None:
        if opcode == DELAY:
            return xid[0] > 0 and xid[1] in _PLAUSIBLE_TIMES
        return opcode in (REMOVE, OPEN_NEXT, CHECK) or xid > 0 or opcode == PAUSE and xid == 0
    return opcode != ADD and (is_lost(item) or (
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


def _read_doubtful(data, start, stop=None):
    """Read records without check sums from data[start] on, until that fails or one would begin at
    data[stop]. Return the _Failure."""
    begin, torn = start, False
    last, last_end, plausible = None, 0, True
    items = size = 0
    data.seek(start)
    try:
        for opcode, xid, item, end in read_records(data):
            if begin == stop:
                break
            end += start
            if item is not None:
                is_plausible = _is_plausible(opcode, xid, item)
                if is_plausible or last is None or plausible:
                    last = begin
                last_end, plausible = end, is_plausible
                items += 1
                size += end - begin
            begin = end
    except Damage as damage:
        torn = damage.torn
    return _Failure(begin, torn, last, last_end, plausible, size // items if items else 0)


def _guess(data, at):
    """Return where the damage begins that made reading fail, where it ends, and how many items
    are lost. at: the _Failure."""
    if at.last is not None:
        # The size of the last record was raised, so that it has swallowed good ones.
        inside = [match.start()
                  for match in _LIKELY_START.finditer(data, at.last + 1, at.begin + 17)
                  if match.start() < at.begin]
        if not at.plausible or any(_is_good(data, start, at.begin) for start in inside):
            for start in inside:
                if _is_good(data, start):
                    return at.last, start, 1
    end = _next_good(data, at.begin)
    if at.last is not None and end < len(data):
        # One bit of its size is wrong, and reading failed within its data. In the head of another
        # record there would be a time as a rule.
        size, = struct.unpack_from("<i", data, at.last + 1)
        if at.last_end == at.begin and not at.plausible or (
                data[at.last] == ADDX and bin(size ^ (end - at.last - 5)).count("1") == 1
                and not re.search(rb"[\1-\3]\0\0", data[at.begin:min(at.begin + 40, end)])):
            return at.last, end, 1
    size = end - at.begin
    if at.torn and end == len(data) or size < _ADDX.size:
        return at.begin, end, 0
    return at.begin, end, max(1, size // (at.mean or size))


def _count_moves(data, begin=0):
    """Return (by how much the records from byte `begin` of an open file on move the ends; where the
    next CHECK begins, or what cannot be read)."""
    moves, at = 0, begin
    data.seek(begin)
    with contextlib.suppress(Damage):
        for opcode, _, _, end in read_records(data, 4096):
            if opcode == CHECK:
                break
            moves += _MOVES[opcode]
            at = begin + end
    return moves, at


# Where check sums are right again. begin: where what the first right CHECK covers begins. end:
# where that CHECK ends. ends: what the ends may be at `begin`: by this CHECK, and by the next one,
# if that is right too. Since the CRC does not cover them, either may be wrong. Those of a mark are
# sure, and given twice. There are none at the end of a file without a CHECK. is_checked: whether
# there must be check sums from `begin` on.
_Resumption = collections.namedtuple("_Resumption", "begin end ends is_checked")


def _resumptions(data, start):
    """Yield a _Resumption for each CHECK from `start` on that is right for what it covers."""
    at = data.find(_OPCODE_CHECK, start)
    while at >= 0 and at + _CHECK.size <= len(data):
        _, size, crc, ends = _CHECK.unpack_from(data, at)
        begin, end = at - size, at + _CHECK.size
        if size == 0:
            for begins in (True, False):
                if crc == _mark_sum(begins, ends):
                    yield _Resumption(at, end, (ends, ends), not begins)
        elif begin >= start and _may_cover(data, begin, at) and zlib.crc32(data[begin:at]) == crc:
            moves, stop = _count_moves(data, begin)
            by_next = _ends_by_next(data, end)
            if stop == at:
                yield _Resumption(begin, end, tuple(
                    _moved(one, -moves) for one in (ends, by_next) if one is not None), True)
        at = data.find(_OPCODE_CHECK, at + 1)


def _resume(data, begin, before=None):
    """Return the _Resumption from `begin` on, which may be at the end of the file.

    before: the ends at `begin`. The place that goes on from these is sought, or else the one where
    the fewest items are missing. What comes before it is in a wrong place, and counts as damaged.
    """
    best = fewest = None
    last = len(data)                         # no better one is sought beyond
    for found in _resumptions(data, begin):
        if before is None or not (found.is_checked or best):
            return found
        if not found.is_checked or found.begin > last:
            break
        # A write just here, whose ends no other CHECK confirms: perhaps nothing else is wrong.
        is_doubtful = found.begin == begin and len(found.ends) == 1
        most = _CUT_OUT_LAST if is_doubtful else _CUT_OUT + found.begin - begin
        missing = min((sum(_between(*pair)) for pair in _likely((before,), found.ends, most)),
                      default=None)
        if is_doubtful and (missing is None or found.end < len(data) or _is_flipped(
                int.from_bytes(data[found.end - 8:found.end], "little"),
                _moved(before, -found.ends[0]))):
            best, fewest = found._replace(ends=(before,)), 1       # one that misses none is better
        elif missing is not None and (best is None or missing < fewest):
            best, fewest = found, missing
            if not missing:
                break
        if best and last == len(data):
            last = found.end + _MISPLACED
    if best:
        return best
    end = len(data)
    if end - begin > _CHECK.size and data[end - _CHECK.size] == CHECK:
        _, size, _, ends = _CHECK.unpack_from(data, end - _CHECK.size)
        if size == end - _CHECK.size - begin:          # only what it covers is damaged
            return _Resumption(end, end, (ends,), True)
    return _Resumption(end, end, (), False)


def _is_nearly(data, expected):
    """Return whether the bytes differ from those expected in a few bits only. With more than 4 of
    them, other records could be taken for these: they have zeros in the same places, and may have
    been cut short."""
    wrong = int.from_bytes(data, "little") ^ int.from_bytes(expected, "little")
    return bin(wrong).count("1") <= 4


def _is_flipped(ends, off):
    """Return whether ends that are off by so much differ in one bit of what was taken from the
    head, or put back. If such moves are missing, those that follow took other items than they
    seem to; to believe that of a flipped bit would cost an item."""
    wrong = ends ^ _moved(ends, off)
    return wrong & wrong - 1 == 0 and 0 < wrong < 1 << 40


def _may_cover(data, start, at):
    """Return whether the bytes data[start:at] are not too many for a CHECK."""
    if at - start <= 2 * _SPAN or data[start] in (REMOVE, CONFIRM):   # of a flush
        return True
    head = data[start:start + _LONGEST_HEAD]
    if head[0] in _HEADS:
        _, _, begin, size = _parse_head(head)
        return start + begin + size == at
    return False


def _ends_by_next(data, begin):
    """Return the ends at data[begin] by the next CHECK, None if there is none that is right."""
    moves, at = _count_moves(data, begin)
    if data[at:at + 1] == _OPCODE_CHECK and at + _CHECK.size <= len(data):
        _, size, crc, ends = _CHECK.unpack_from(data, at)
        if crc == _mark_sum(True, ends) if size == 0 else (
                size == at - begin and crc == zlib.crc32(data[begin:at])):
            return _moved(ends, -moves)
    return None


def _likely(before, after, most):
    """Return the pairs of what the ends may be before and after something, with fewer than `most`
    items added, taken and put back in between. With more, what follows is in a wrong place."""
    return [pair for pair in itertools.product(before, after) if max(_between(*pair)) < most]


def _moved_between(data, begin, before, end, after):
    """Return the ends before and after the damaged records from data[begin] to data[end], and how
    many items these (added, took, put back). before, after: what the ends may be there. Say 5 2 0
    before; and after 40 damaged bytes 6 2 0 by the first CHECK that is right, but 70 2 0 by the
    next one. There is no room for 65 items in 40 bytes: so they added one item."""
    def rank(pair):
        added, taken, back = _between(*pair)
        has_no_room = (added > (end - begin) // _ADDX.size
                       or taken + 5 * back > end - begin)        # a REMOVE, an UNREMOVE
        return has_no_room, added + taken + back

    if not after:                            # nothing follows that could take these items
        return before[-1], None, (0, 0, 0)
    likely = _likely(before, after, _CUT_OUT + end - begin)
    if likely:
        pair = min(likely, key=rank)
        return (*pair, _between(*pair))
    # All of these are wrong. What can be read says how many, and the rest may be one item.
    damaged = data[begin:max(begin, end - _CHECK.size)]
    moves, stop = _count_moves(io.BytesIO(damaged))
    added, taken, back = _between(0, moves)
    return before[-1], after[0], (added + (stop < len(damaged)), taken, back)


# A damaged piece of a file, and why. lost: how many items may have been added there. taken, back:
# how many were taken from the head and put back there, as far as that can be known. before, after:
# the ends before and after it, None where there are no check sums. unclosed: how many good bytes
# before it have no right CHECK.
Cut = collections.namedtuple("Cut", "begin end why lost taken back before after unclosed",
                             defaults=(0, 0, 0, None, None, 0))


def find_damage(file, start=0, ends=None, begins=0):
    """Return a Cut for each damaged piece of an open journal file from byte `start` on. ends: at
    `start`, if there must be check sums from there on. begins: the ends in the first mark, if they
    are not 0."""
    if start >= os.fstat(file.fileno()).st_size:       # an empty file cannot be mapped
        return []
    import mmap
    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        return list(_cuts(data, start, ends, begins))


def _cuts(data, start, ends, begins):
    """Yield what find_damage() returns. data: an mmap of the file."""
    known = None                         # the ends in the last CHECK, None if there was none
    while True:
        closed = start                       # where the last CHECK ends
        data.seek(start)
        try:
            for opcode, xid, _, end in read_records(data, ends=ends):
                if opcode == CHECK:
                    closed = start + end
                    ends, known = _after_check(xid, ends), xid[2]
            return
        except Damage as damage:
            why, at = damage.why, start + damage.offset
        if ends is not None:
            known = ends
            cut = _cut_checked(data, closed, at, why, ends)
        else:
            cut = _cut_unchecked(data, closed, why, known, begins)
        yield cut
        start, ends = cut.end, cut.after


def _cut_checked(data, closed, at, why, ends):
    """Return the Cut where there are check sums. closed: where the last right CHECK ends. at: where
    reading failed. ends: at `closed`."""
    begin, before = closed, ends
    if _is_nearly(data[closed:closed + _CHECK.size], _mark(False, ends)):
        end = min(closed + _CHECK.size, len(data))
        found = _Resumption(end, end, (ends,), False)
    else:
        found = _resume(data, closed, ends)
        if found.begin == closed and ends in found.ends:       # only those in the CHECK are wrong
            begin, before = at, _moved(ends, _count_moves(io.BytesIO(data[closed:at]))[0])
            found = _resume(data, at + 1, before)
    end = found.begin
    _, after, moves = _moved_between(data, begin, (before,), end, found.ends)
    return Cut(begin, end, why, *moves, before, after if found.is_checked else None, begin - closed)


def _cut_unchecked(data, closed, why, known, begins):
    """Return the Cut where there are no check sums. closed: where they ended. known: the ends
    there, from which they go on at the next mark; None before the first mark, whose ends are
    `begins`, or 0."""
    found = _resume(data, closed)
    limit = found.begin
    if not found.is_checked:
        at = _read_doubtful(data, closed)
        begin, end, lost = _guess(data, at)
        if begin >= limit:                   # it has swallowed the mark
            begin = at.last if at.last is not None and at.last < limit else closed
        return Cut(begin, min(end, limit), why, lost)
    mark = limit - _CHECK.size               # where the mark must be; it is damaged too
    at = _read_doubtful(data, closed, mark)
    begin = at.begin
    if begin != mark:
        if at.last is not None and (not at.plausible or begin >= limit):
            begin = at.last
        if not closed + _CHECK.size <= begin < limit:
            begin = closed
    low = found.ends[0] & 0xffff
    if low & -_PACK == _PACK:            # a pack, which puts nothing back: its mark has the same
        begins = low
    before = (0, begins) if known is None else (known,)
    if begin == mark:                    # only the mark is damaged: nothing was moved there
        before += found.ends
    before, after, moves = _moved_between(data, begin, before, limit, found.ends)
    # Only at the beginning of a file are the ends known without check sums before it.
    return Cut(begin, limit, why, *moves, None if begin else before, after)


def read_good(path):
    """Yield (opcode, xid, item, begin, end) for each good record of a journal file, and a Cut for
    each damaged piece. Where there are check sums, records are yielded after their CHECK has been
    read. Raises OSError."""
    cuts, start, ends = None, 0, None
    with open(path, "rb") as file:
        while True:
            file.seek(start)
            pending, begin = [], start
            try:
                for opcode, xid, item, end in read_records(file, ends=ends):
                    pending.append((opcode, xid, item, begin, start + end))
                    begin = start + end
                    if opcode == CHECK:
                        ends = _after_check(xid, ends)
                    if opcode == CHECK or ends is None:
                        yield from pending
                        pending = []
                return
            except Damage as damage:
                why = damage.why
                if cuts is None:
                    cuts = iter(find_damage(file))
            cut = next(cuts, None)
            if cut is None:                  # what was just being written is there by now
                size = os.path.getsize(path)
                if size:                     # else the file has been emptied
                    yield Cut(pending[0][3] if pending else begin, size, why)
                return
            yield from (record for record in pending if record[4] <= cut.begin)
            yield cut
            start, ends = cut.end, cut.after


def dump_records(path: str) -> "Iterator[dict]":
    """Yield each record of a journal file as a dict, and what is damaged in it as one with
    the key `damage`. The file is only read. Raises OSError."""
    for record in read_good(path):
        if type(record) is Cut:
            yield {"offset": record.begin, "damage": record.why,
                   "bytes": record.end - record.begin}
            continue
        opcode, xid, item, begin, _ = record
        found = {"offset": begin, "operation": OPCODE_NAMES[opcode]}
        if opcode == CHECK:
            found.update(zip(("bytes", "crc32", "position"), xid))
        elif opcode in (DELAY, ADD_DELAYED):
            found["xid"], found["due"] = xid
        elif opcode == PAUSE:
            found["paused"] = PAUSES[xid & 3]
        elif opcode not in (REMOVE, OPEN_NEXT, ADD, ADDX, ADDF):
            found["xid"] = xid
        if item is not None:
            found.update(add_time=item.add_time, expiry=item.expiry, size=len(item.data),
                         data=item.data)
            if opcode in (ADDF, CONTINUEF, ADD_DELAYED):
                found.update(flags=item.flags, deliveries=item.deliveries)
        yield found


# == 4. Journal ===========================================================================
#
# The files of one queue: appending to them, cutting back what failed, fsync, rotation, putting
# new files in the place of old ones, repair, and reading behind. Knows records and files, and
# the positions of operations; no clients, no other queues.
#
# A *task* is a generator that does long work in bounded steps. Where it yields None it is to be
# resumed in a later turn; where it yields a call, the call may block: it is made on a worker
# thread, and the OSError that it returns or raises, if any, is thrown into the task.


class WrongSum(OSError):
    """The data of an item does not have the check sum that it should have."""


class LostTail(Exception):
    """A power failure has cost a journal file its end, but not the next file. This is known when
    operations at the head begin in the next one. args: the file, how many items the lost end added,
    and how many items wait then that should not; if negative, how many are missing."""


class Unclear(OSError):
    """Operations failed, and it is not known whether they are in the files."""


def _why(error):
    """Return what went wrong, from an OSError, on one line."""
    return "%s: %s" % (os.path.basename(error.filename or "journal"), error.strerror or error)


def _bare(error):
    """Return a copy of an OSError without its traceback, which would keep every frame alive:
    the daemon runs without the garbage collector."""
    return type(error)(error.errno, error.strerror, error.filename)


def run_task(task):
    """Run a task to its end at once. Raises what it raises."""
    error = None
    with contextlib.suppress(StopIteration):
        while True:
            try:
                call = task.throw(error) if error else next(task)
            finally:
                error = None             # its traceback has this frame: they would be a cycle
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
        with contextlib.suppress(OSError):             # it is closed nevertheless
            os.close(fd)


def _open_journal(path, flags=0):
    """Open a file of a journal for writing. Raises OSError, also if it is not a regular file:
    opening a pipe waits for another process, and a device does not keep what is written."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise OSError(errno.EINVAL, "not a regular file", path)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | flags, 0o600)


def _lock(fd, how, path):
    """Lock an open file, as flock() does, without waiting; return its descriptor. Raises OSError,
    and closes the descriptor, if another process holds the lock."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, "held by another process", path) from None
    return fd


def _identity(status):
    return status.st_dev, status.st_ino


def _discard(path):
    """Delete an unfinished file. If that fails it is deleted at the next start."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def _write_all(fd, chunks, offset, size):
    """Write byte strings of `size` bytes in all at `offset`, also if the kernel writes less than
    it is given."""
    if size < _LARGE and os.pwrite(
            fd, chunks[0] if len(chunks) == 1 else b"".join(chunks), offset) == size:
        return                               # as a rule
    # Joining chunks costs less than many calls; copying large ones does not.
    for piece in itertools.chain.from_iterable(
            group if large else [b"".join(group)]
            for large, group in itertools.groupby(chunks, lambda chunk: len(chunk) >= _LARGE)):
        done = os.pwrite(fd, piece, offset)
        while done < len(piece):
            done += os.pwrite(fd, memoryview(piece)[done:], offset + done)
        offset += done


def _write_and_close(writes):
    """Make several writes (fd, chunks, offset, size), in the worker."""
    try:
        for write in writes:
            _write_all(*write)
    finally:
        _close_all([write[0] for write in writes])


def _pieces_of(fd, begin, end, path):
    """Yield the bytes from `begin` to `end` of an open file in pieces, each in a list. Raises
    OSError."""
    for offset in range(begin, end, _STEP_SIZE):
        size = min(_STEP_SIZE, end - offset)
        piece = os.pread(fd, size, offset)
        if len(piece) < size:
            raise OSError(errno.EIO, "the file has become shorter", path)
        yield [piece]


def _load(item, fd, offset, size, head, crc):
    try:
        begin = os.pread(fd, head, offset - head) if head else b""
        data = os.pread(fd, size, offset)
    finally:
        os.close(fd)
    if len(data) < size:
        raise WrongSum(errno.EIO, "the file has become shorter")
    if crc is not None and zlib.crc32(data, zlib.crc32(begin)) != crc:
        raise WrongSum(errno.EIO, "the data of an item has the wrong check sum")
    item.data = data


# The name of the queue, and the number of an older file or of a packed one.
_JOURNAL_NAME = re.compile(r"([^.~]+)(?:\.(0|-?[1-9][0-9]*)(\.pack)?|~~[0-9]+)?", re.S)


# A directory in the copy of a spool, until a server uses it. While the files of the copy are being
# changed, what is to become of them is noted there: a list of (path, the path then, None if it is
# to be deleted, its size then), relative to the spool.
COPY_MARK = ".copy"


def note_files(directory, files):
    """Note in a copy what is to become of its files, in place of an earlier note."""
    marks = os.path.join(directory, COPY_MARK)
    note = os.path.join(marks, "pass")
    _raise(_fsync_directory(directory))      # it names files that are there
    with open(note + "~", "w", encoding="ascii") as file:
        json.dump(files, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(note + "~", note)
    _raise(_fsync_directory(marks))


def change_files(directory, files):
    """Let the files of a copy become what is to become of them. Raises OSError; then it can be done
    again."""
    for old, new, size in files:
        path = os.path.join(directory, old)
        with contextlib.suppress(FileNotFoundError):   # it has been done before
            if new is None:
                os.unlink(path)
            elif new != old:
                os.rename(path, os.path.join(directory, new))
            elif os.path.getsize(path) > size:
                with open(path, "r+b") as file:
                    file.truncate(size)
                    os.fsync(file.fileno())
    _raise(_fsync_directory(directory))


def finish_copy(directory):
    """Do what is noted in a copy, if it is one: then it is what it was after the last pass of the
    copying that was finished. Raises OSError."""
    marks = os.path.join(directory, COPY_MARK)
    notes = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        notes = os.listdir(marks)
    for note in notes:
        path = os.path.join(marks, note)
        if "~" not in note:
            with open(path, encoding="ascii") as file:
                change_files(directory, json.load(file))
        os.unlink(path)
    if notes:
        _raise(_fsync_directory(marks))


# A directory in a spool that is locked while a copy is made, since it was last touched.
COPY_LOCK = ".copying"

# How long a server waits for a copy before it moves items, in seconds.
COPY_SECONDS = 10


def is_being_copied(directory):
    """Return whether no item may leave a queue of a spool for another one, since a copy is being
    made that may have the other one already."""
    path = os.path.join(directory, COPY_LOCK)
    try:
        if abs(time.time() - os.stat(path).st_mtime) > COPY_SECONDS:
            return False                     # it was made, or hangs
        os.close(_lock(os.open(path, os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_EX, path))
        return False
    except OSError as error:                 # as a rule there is no such directory
        return error.errno == errno.EWOULDBLOCK or is_short_of_descriptors(error)


def find_journals(directory, only=None):
    """Return {queue name: [numbers of its older files]} of a spool, tidied up on the way.

    Unfinished files are deleted and packed files take the place of what they stand for. Other
    files are left alone, with a warning, and so are directories, without one. A queue whose files
    cannot be tidied up has None in place of the numbers. only: the name of the one queue to look
    at, whose errors are raised. Raises OSError when the directory cannot be read.
    """
    finish_copy(directory)
    found = {}
    packs = []
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        match = _JOURNAL_NAME.fullmatch(entry.name)
        if entry.is_dir() or only is not None and not (match and match[1] == only):
            continue
        why = "not a journal"
        with contextlib.suppress(ValueError):
            name = check_name(match[1] if match else "")
            why = None if entry.is_file() else "not a regular file"
        if why:
            log.warning("%s: %s, left alone", entry.path, why)
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
        numbers = found[name]
        if numbers is None:                  # an earlier pack of it has failed
            continue
        path = os.path.join(directory, name)
        pack = "%s.%d.pack" % (path, last)
        try:
            for number in [number for number in numbers if number <= last]:
                os.unlink("%s.%d" % (path, number))
                numbers.remove(number)
            _raise(_fsync_directory(directory))
            if os.path.getsize(pack):
                os.rename(pack, "%s.%d" % (path, last))
                numbers.append(last)
            else:                            # the queue was being deleted
                os.unlink(pack)
                if not numbers and not os.path.exists(path):
                    del found[name]
        except OSError as error:
            if only is not None:
                raise
            log.error("queue %s cannot be loaded: %s: %s", name, pack, error.strerror)
            found[name] = None
    error = _fsync_directory(directory) if packs else None
    if error:                                # it will be done again at the next start
        log.error("%s: %s", directory, error.strerror)
    for numbers in filter(None, found.values()):
        numbers.sort()
    return found


def is_short_of_descriptors(error):
    """Return whether a call failed because too many files are open, here or in the system."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


def _raise(error):
    try:
        if error:
            raise error
    finally:
        del error                        # its traceback has this frame: they would be a cycle


def _lost_path(directory, path, suffix):
    """Return the path in lost+found for what was in a file. A long name is cut short: a file
    system takes 255 bytes."""
    name = os.path.basename(path)
    while len(os.fsencode(name + suffix)) > 255:
        name = name[:-1]
    return os.path.join(directory, name + suffix)


def put_aside(directory, name):
    """Move the files of a queue, of which nothing has been read, to lost+found. Raises OSError."""
    lost = os.path.join(directory, "lost+found")
    path = os.path.join(directory, name)
    paths = ["%s.%d" % (path, number) for number in find_journals(directory, name).get(name, ())]
    for old in paths + [path]:
        if os.path.exists(old):
            os.makedirs(lost, 0o700, exist_ok=True)
            new = _lost_path(lost, old, ".%d" % _unique_number())
            os.rename(old, new)
            log.warning("%s: from before keep_journal was false, moved to %s", old, new)


_newest_number = 0


def _unique_number(above=0):
    """Return a number for a file: the time in milliseconds, or more, so that it is greater than
    `above` and than any number before. So what is left of a deleted queue is never taken for
    new."""
    global _newest_number
    _newest_number = max(_now(), above + 1, _newest_number + 1)
    return _newest_number


class Budget:
    """What the queues of a server share: memory for items, and descriptors for files.

    memory: the bytes that items in memory take, see ITEM_COST. most_memory: with so many, queues
    begin to leave items on disk, or refuse them if they cannot. most_files: how many journal
    files may be open; the one that was opened first is closed for another.
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
    identifies the file that was opened under that path. checked: whether there must be a check sum
    for what follows. begins, ends: the ends in the first mark, or those that it should have, and
    in the last CHECK.
    """

    __slots__ = ("path", "number", "size", "waiting", "inode", "fd", "checked", "begins", "ends")

    def __init__(self, path, number):
        self.path = path
        self.number = number
        self.size = 0
        self.waiting = 0
        self.inode = None
        self.fd = None                   # while open for writing, see Budget
        self.checked = False
        self.begins = self.ends = 0

    def is_there(self):
        """Return whether the file is still there under its name. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            return _identity(os.stat(self.path)) == self.inode
        return False

    def age(self):
        """Return what files are sorted by, the oldest first."""
        return self.number is None, self.number


# A batch of operations on its way to the files. shares: (file, records as byte strings, their size,
# the ends then, how many waiting items are accounted to it then) of each file that gets some; bare
# tuples save 0.4 us. size: of all. passed: how many files are passed then. kept: what there is when
# the last of them is passed, a Kept. checked: whether it has CHECKs.
Plan = collections.namedtuple("Plan", "shares size passed kept checked")

# What commit() has done. before: a FileState, as it was before, of each file changed.
Write = collections.namedtuple("Write", "position before passed")
FileState = collections.namedtuple("FileState", "file size waiting checked ends")

# What is kept of files that have been passed. held: {xid: open read or Delayed}. counts: {id of an
# item: its count of deliveries}, of those that have one: the counts of the items go on, and newer
# files have what raised them. items: all that wait, if everything is written anew.
Kept = collections.namedtuple("Kept", "held counts items", defaults=[()])

# What else a pack says of a queue: the last xid, what is paused; whether deliveries are counted on
# the disk, whether there are to be CHECKs.
QueueState = collections.namedtuple("QueueState", "last_xid paused counts_deliveries checked")

# Files have been passed with the operation at `position`, those up to `number`. kept: of them.
Passing = collections.namedtuple("Passing", "position number kept")

# An fsync under way, of all that has been written up to `position`.
Sync = collections.namedtuple("Sync", "position files directory")

# How many more items wait after each operation apart from FLUSH; which of them append an item, and
# which go to the current file. The others go to the file that has the head.
_WAITING_AFTER = {
    ADDX: 1, REMOVE: -1, OPEN: -1, UNREMOVE: 1, CONFIRM: 0, TO_TAIL: 1, DUE_TAIL: 1, DUE_HEAD: 1,
    PUT_BACK: 1, DELAY: 0, ADD_DELAYED: 0, DROP: 0, PAUSE: 0}
_APPENDED = frozenset((ADDX, TO_TAIL, DUE_TAIL))
_IN_CURRENT = _APPENDED | {ADD_DELAYED, DROP, PAUSE}
_AT_HEAD = frozenset((REMOVE, OPEN_NEXT, OPEN, UNREMOVE, PUT_BACK))      # as opcodes


def _lost_tail(count, begins, added):
    """Return what a file has lost at its end, as in the args of LostTail. count: how many items
    wait at its end. begins: the ends in the first mark of the next file, see _first_ends(). added:
    how many items it has added, None if it is a pack, in which nothing was taken. Say it has added
    7 items, and 5 wait; but by the next file it had added 8, and 4 waited. So its lost end added 1
    item, and took 2, which wait now: 5 + 1 - 4."""
    waiting = _added(begins)
    if not waiting:
        return 0, count
    surplus = (count - waiting + (1 << 23)) % (1 << 24) - (1 << 23)       # from 24 bits
    if added is None:
        lost = max(0, -surplus)
    else:
        lost = (begins - added) % _PACK
        lost = lost if lost < _PACK // 2 else 0        # else it is negative
    return lost, surplus + lost


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

    older: the numbers of the older files, None to look for them. lock: whether to lock the
    directory against servers, and each open file against others who do so, for a queue without a
    server.
    """

    def __init__(self, directory, name, older, budget, lock):
        self.directory = directory
        self.path = os.path.join(directory, name)
        self.budget = budget
        self.lock = None                     # the descriptor of the locked directory
        self.passed = []
        self.files = []
        self.directory_changed = False       # it has to be fsynced
        self.unsynced = set()                # files written to since the last fsync began
        self.torn = set()                    # files to be cut before anything is written
        self.writes = []                     # a Write for each that is not safe
        self.passings = []                   # Passings whose files are still there
        try:
            if lock:
                fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                self.lock = _lock(fd, fcntl.LOCK_SH, directory)
            if older is None:
                older = find_journals(directory, name).get(name, ())
            for number in older:
                file = JournalFile("%s.%d" % (self.path, number), number)
                file.size = os.stat(file.path).st_size
                self.files.append(file)
            self.add_current()
        except BaseException:
            self.close()                     # others may open it then
            raise
        self.size = sum(file.size for file in self.files)      # of all files together

    @property
    def current(self):
        """The file to which items are added."""
        return self.files[-1]

    def add_current(self, flags=0):
        """Open the current file, made if it is new. Raises OSError."""
        file = JournalFile(self.path, None)
        file.size = self._opened(file, _open_journal(self.path, os.O_CREAT | flags))
        self.files.append(file)
        if len(self.files) > 2:              # nothing will be written to it for long
            self.budget.close(self.files[-2])
        # It may have been created just before a crash.
        self.directory_changed = self.directory_changed or not file.size

    def _opened(self, file, fd):
        """Take an open file; return its size."""
        if self.lock is not None:
            _lock(fd, fcntl.LOCK_EX, file.path)
        file.fd = fd
        status = os.fstat(fd)
        file.inode = _identity(status)
        self.budget.opened(file)
        return status.st_size

    def _open(self, file):
        """Return the descriptor of a file. Raises OSError, ESTALE if it is not there any more,
        and Damage if it has another size than it should have."""
        if file.fd is None:
            inode = file.inode
            try:
                size = self._opened(file, _open_journal(file.path))
            except FileNotFoundError:
                raise self._lost(file) from None
            if inode not in (None, file.inode):
                file.inode = inode
                self.budget.close(file)
                raise self._lost(file)
            if file not in self.torn and size != file.size:
                self.budget.close(file)
                if self.lock is not None:
                    raise OSError(errno.EBUSY, "changed by another process", file.path)
                raise Damage(min(size, file.size), "size changed", False, file)
        return file.fd

    @staticmethod
    def _lost(file):
        return OSError(errno.ESTALE, "removed or replaced by another process", file.path)

    # -- reading

    def read(self, file, take_run):
        """Yield the records of one file, as read_records() does. Raises Damage."""
        is_open = file.fd is not None
        if is_open and file.size < _READ_SIZE:         # as most are if there are many
            source = io.BytesIO(os.pread(file.fd, file.size + 1, 0))
        else:
            source = open(file.fd if is_open else file.path, "rb", 0, closefd=not is_open)
        with source:
            source.seek(0)
            yield from read_records(source, min(_LOAD_SIZE, file.size + 1), take_run)

    def load_call(self, item):
        """Return the call that gives a stub its data back. Raises OSError, as does the call."""
        # By the time of the call the file may have another name, and the data another place.
        place = item.place
        if place.file.path is None:
            raise WrongSum(errno.EIO, "the item was damaged, and a pack has dropped it", self.path)
        fd = os.open(place.file.path, os.O_RDONLY | os.O_CLOEXEC)
        return functools.partial(_load, item, fd, place.offset, place.size, place.head, place.crc)

    def loaded(self, stub):
        """Return a copy of a stub with its data; the stub stays one. Raises OSError."""
        item = stub.stub()
        self.load_call(item)()
        return item

    def account(self, at_head, count):
        """Account the waiting items to the files after a replay. The `waiting` of each is how many
        items it adds. at_head: the last file that does something to the head of the queue. count:
        how many items wait."""
        head = self.files.index(at_head)
        at_head.waiting = count - sum(file.waiting for file in self.files[head + 1:])
        while head < len(self.files) - 1 and not self.files[head].waiting:
            head += 1
        self.passed, self.files = self.files[:head], self.files[head:]

    # -- writing

    def plan(self, ops, count, held, checked):
        """Return the Plan for a batch of operations. count: how many items wait after it.
        held: a function that returns what is kept under a number after it, the open reads and
        the Delayed. checked: whether it is written with CHECKs."""
        files = self.files
        if len(files) == 1:
            share = self._share(files[0], ops, count, checked)
            return Plan((share,), share[2], 0, None, checked)
        # Say 2 items wait in files[0] and 1 in files[1], the current one, and the batch is REMOVE,
        # ADDX, REMOVE, OPEN. Both REMOVEs go to files[0], which is passed with the second one. The
        # ADDX goes to files[1], and so does the OPEN, of the item that waited there: 1 is left.
        last = len(files) - 1
        head = after = 0                     # which file has the head, since the operation `after`
        waiting = {head: files[head].waiting, last: files[last].waiting}
        shares = {}                          # like `waiting`, by the numbers of the files
        for index, op in enumerate(ops):
            while not waiting[head] and head < last:
                head, after = head + 1, index
                waiting.setdefault(head, files[head].waiting)
            opcode = op[0]
            if opcode == FLUSH:
                for number in range(head, len(files)):
                    left = waiting.get(number, files[number].waiting)
                    if left:
                        shares.setdefault(number, []).append((FLUSH, None, left))
                    waiting[number] = 0
                continue
            number = last if opcode in _IN_CURRENT else head
            shares.setdefault(number, []).append(op)
            waiting[number] += _WAITING_AFTER[opcode]
        while not waiting[head] and head < last:
            head, after = head + 1, len(ops)
            waiting.setdefault(head, files[head].waiting)
        done = [self._share(files[number], shares[number], waiting[number], checked)
                for number in sorted(shares)]
        return Plan(done, sum(share[2] for share in done), head,
                    _kept_before(held(), ops[after:]) if head else None, checked)

    @staticmethod
    def _share(file, ops, waiting, checked):
        """Return the share of a file, see Plan."""
        ends = file.ends
        if checked:
            chunks, ends = _encode_checked(ops, ends)
        else:
            chunks, _ = _encode(ops)
        if file.checked != checked:
            chunks.insert(0, _mark(checked, file.ends))
        return file, chunks, sum(map(len, chunks)), ends, waiting

    def write(self, plan):
        """Write what is planned, one write a file. Raises OSError; cut() is then due."""
        begun = []
        try:
            for file, chunks, size, *_ in plan.shares:
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
            for file, chunks, size, *_ in plan.shares:
                writes.append((os.dup(self._open(file)), chunks, file.size, size))
        except (OSError, Damage):
            _close_all([write[0] for write in writes])
            raise
        return functools.partial(_write_and_close, writes)

    def commit(self, plan, position, safe):
        """Make a written batch count. position: of its last operation. safe: whether that is
        safe by now, so that go_back() will not undo it."""
        if not safe:
            self.writes.append(Write(position, [
                FileState(file, file.size, file.waiting, file.checked, file.ends)
                for file, *_ in plan.shares], plan.passed))
        for file, _, size, ends, waiting in plan.shares:
            file.ends, file.waiting, file.checked = ends, waiting, plan.checked
            file.size += size
            self.size += size
            self.unsynced.add(file)
        if plan.passed:
            self._pass(plan.passed, position, plan.kept)

    def _pass(self, count, position, kept):
        self.passed += self.files[:count]
        del self.files[:count]
        self.passings.append(Passing(position, self.passed[-1].number, kept))

    def pass_all(self, position, safe, kept):
        """Have everything written anew: pack() will put what is kept, which is all that there is,
        into one file in place of all but the current one, which is empty."""
        if not safe:
            self.writes.append(Write(position, [FileState(self.current, 0, 0, False, 0)],
                                     len(self.files) - 1))
        if not self.passed and len(self.files) == 1:           # there is nothing yet
            self.passed.append(JournalFile(None, self._next_number()))
        self.current.waiting = len(kept.items)
        # Its first mark says how many wait, and how many the file before it has added in all: none
        # if that is empty, without its own mark.
        older = (self.passed + self.files)[-2]
        self.current.begins = self.current.ends = _first_ends(
            len(kept.items), _added(older.ends) if older.size else 0)
        self._pass(len(self.files) - 1, position, kept)

    def forget(self, safe):
        """Drop what go_back() would need for the operations up to `safe`."""
        self.writes = [write for write in self.writes if write.position > safe]

    def go_back(self, safe):
        """Make the files count as they did at this position; cut() is then due."""
        while self.writes and self.writes[-1].position > safe:
            write = self.writes.pop()
            for file, size, waiting, file.checked, file.ends in write.before:
                self.size += size - file.size
                file.size, file.waiting = size, waiting
                self.torn.add(file)
            if write.passed:
                self.files[:0] = self.passed[-write.passed:]
                del self.passed[-write.passed:]
        while self.passings and self.passings[-1].position > safe:
            self.passings.pop()

    def correct(self, file, size, ends, lost):
        """Let go_back() go back to what a file is since its repair, before which it had this size
        and these ends, and `lost` items more. What is not safe is behind what was damaged."""
        for write in self.writes:
            write.before[:] = [one if one.file is not file else one._replace(
                size=one.size + file.size - size, waiting=one.waiting - lost,
                ends=_moved(one.ends, file.ends - ends)) for one in write.before]

    def cut(self):
        """Cut off what failed or undone operations have left. Raises OSError."""
        # The newest first: what is done to the head there builds on the files before it.
        for file in sorted(self.torn, key=JournalFile.age, reverse=True):
            os.ftruncate(self._open(file), file.size)
            self.torn.discard(file)
            self.unsynced.add(file)

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
        self.unsynced = set()
        self.directory_changed = False
        return functools.partial(fsync_all, fds), sync

    def sync_failed(self, sync):
        """Schedule the files of a failed fsync for another one."""
        self.unsynced.update(file for file in sync.files if file.path)
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
            with contextlib.suppress(FileNotFoundError):       # another process has removed it
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
        self.unsynced.discard(file)

    def _remove(self, file):
        """A task: delete a file that has been passed."""
        fds = []
        if file.path:
            fds = self._unlink(file)
            self.size -= file.size
        file.path = None
        self.unsynced.discard(file)
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
            del passings[0]
        return passings[0] if passings and passings[0].position <= safe else None

    def pack(self, passing, state):
        """A task: put one file in place of those that have been passed. state: a
        QueueState. Raises OSError; then it can be done again."""
        old = [file for file in self.passed if file.number <= passing.number]
        # An earlier try may have deleted all of them, and failed at the last fsync.
        if old and (passing.kept.held or passing.kept.items or state.paused):
            path = "%s.%d" % (self.path, passing.number)
            pack = next((file for file in old if file.path == path + ".pack"),   # tried before
                        JournalFile(path + ".pack", passing.number))
            pack.ends = old[-1].ends         # it stands for that
            places = []
            yield from self._write_file(pack, self._pieces(
                passing.kept, state, places, _PACK + _added(pack.ends) % _PACK))
            rest = self.passed[len(old):]
            old = [file for file in old if file is not pack]
            self.passed = old + [pack] + rest
            for place, offset, crc in places:
                place.file, place.offset, place.head, place.crc = pack, offset, 0, crc
            yield self._sync_directory()
            for file in old:
                yield from self._remove(file)
            yield self._sync_directory()
            os.rename(pack.path, path)
            pack.path = path
            self.budget.close(pack)
            yield self._sync_directory()
        else:
            # Nothing is kept of them. The oldest goes first: operations on items that are not
            # there any more are ignored, so a queue that ended empty is still empty.
            for file in old:
                yield from self._remove(file)
                yield self._sync_directory()
        if self.passings and self.passings[0] is passing:
            del self.passings[0]

    def _pieces(self, kept, state, places, begins):
        """Yield the records of a pack in pieces. places: filled with (Place, new offset, CRC of
        the data) for each item that has one. begins: the ends in its first mark, which tell of the
        last file that it stands for."""
        ends = begins
        chunks, size = [], 0                 # the next piece
        offset = 0                           # where it ends
        if state.checked:
            yield [_mark(True, begins)]
            offset = _CHECK.size
        for opcode, records, place in self._records(kept, state):
            length = sum(map(len, records))
            if chunks and size + length > _SPAN:       # a large one has a CHECK of its own
                yield _checked(chunks, size, ends) if state.checked else chunks
                chunks, size = [], 0
                offset += _CHECK.size if state.checked else 0
            if place:
                head, data = records
                places.append((place, offset + len(head), zlib.crc32(data)))
            ends = _moved(ends, _MOVES[opcode])
            chunks += records
            size += length
            offset += length
        yield _checked(chunks, size, ends) if state.checked else chunks
        if state.checked:
            yield [_mark(False, ends)]       # nothing is missing, see Replay

    def _records(self, kept, state):
        """Yield (opcode, byte strings, Place of the item or None) of each record of a pack."""
        yield SAVE_XID, [_XID.pack(SAVE_XID, state.last_xid)], None
        if state.paused:
            yield PAUSE, [_XID.pack(PAUSE, state.paused)], None
        for xid, item in itertools.chain(kept.held.items(), ((0, one) for one in kept.items)):
            delayed = None
            if type(item) is Delayed:
                delayed, item = item, item.item
            try:
                data = item.data if item.data is not None else self.loaded(item).data
            except WrongSum as error:
                log.warning("%s: %s; it is dropped", item.place.file.path, error.strerror)
                data, item, delayed = b"", LOST, None
            count = kept.counts.get(id(item), 0) if state.counts_deliveries else 0
            if delayed and not delayed.to_head:
                yield ADD_DELAYED, [_delayed_head(delayed, len(data), count), data], item.place
                continue
            yield ADDX, [_head(item, len(data), count), data], item.place
            if xid:
                yield OPEN, [_XID.pack(OPEN, xid)], None
            if delayed:
                yield DELAY, [_DELAY.pack(DELAY, xid, delayed.due)], None

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
                yield from self._write_file(
                    file, _pieces_of(source, 0, file.size, file.path))
                yield self._sync_directory()
            finally:
                os.close(source)

    # -- repair

    def repair(self, file, start=0, ends=None):
        """Cut what is damaged out of a file, from byte `start` on, and keep it in lost+found.
        Return (how many pieces were cut out, how many items are added from `start` on then). ends:
        at `start`, if there must be check sums from there on.

        Stand-ins take the place of the items that may have been lost, or put back: the REMOVE of
        such an item will take a stand-in, and not a good item. Items that were taken are open
        reads until the end of the replay, and come back.
        """
        with open(file.path, "rb") as source:
            cuts = find_damage(source, start, ends, file.begins)
            length = os.fstat(source.fileno()).st_size
            for cut in cuts:
                where = ", where %d items may have been," % cut.lost if cut.lost else ""
                done = "some writes%s are missing there" % where
                if cut.end > cut.begin:
                    done = "%d bytes cut out%s and kept in %s" % (
                        cut.end - cut.begin, where, self.keep(file, source, cut.begin, cut.end))
                log.warning("%s: %s at byte %d; %s", file.path, cut.why, cut.begin, done)
            stands = sum(cut.lost + cut.taken + cut.back for cut in cuts)
            is_torn = len(cuts) == 1 and cuts[0].end >= length and not (stands or cuts[0].unclosed)
            if cuts and not is_torn:
                self._write_file_now(file, self._good_pieces(source, length, cuts))
            else:
                if is_torn:
                    length = cuts[0].begin
                    os.truncate(file.path, length)
                self.size += length - file.size
                file.size = length
        # There may be more damage, where what was cut out has led the reader astray.
        added = 0
        with open(file.path, "rb") as source, contextlib.suppress(Damage):
            source.seek(start)
            file.checked, file.ends = ends is not None, ends or 0
            for opcode, xid, item, _ in read_records(source, ends=ends):
                if opcode == CHECK:
                    ends = _after_check(xid, ends)
                    file.checked, file.ends = ends is not None, xid[2]
                added += item is not None and opcode != ADD_DELAYED
        return len(cuts), added

    def set_aside(self, file, added, count):
        """Append stand-ins for `added` lost items to a file, and make `count` items open reads:
        the records that took them are lost, and those of newer files are not meant for them. They
        come back at the end of the replay. If `count` is negative, put back so many stand-ins."""
        log.warning("%s: its end is lost, but not that of a newer file; %d items come back",
                    file.path, max(0, count))
        ops = [(ADDX, LOST, 0)] * added + [(UNREMOVE, None, _LOST)] * -count + [
            (OPEN, None, _ASIDE + number) for number in range(count)]
        _, chunks, size, *_ = self._share(file, ops, 0, True)
        fd = _open_journal(file.path)        # whatever its size is by now
        try:
            _write_all(fd, chunks, file.size, size)
            os.fsync(fd)
        finally:
            os.close(fd)
        file.size += size
        self.size += size

    def replace_missing(self, file, lost):
        """Put a file with stand-ins for `lost` items in the place of one that has disappeared:
        those items are in memory, and will be taken."""
        self._write_file_now(file, [[_head(LOST, 0) * lost]])
        file.checked = False

    def _write_file_now(self, file, pieces):
        run_task(self._write_file(file, pieces))
        _raise(_fsync_directory(self.directory))

    @staticmethod
    def _good_pieces(source, size, cuts):
        """Yield what is good of a damaged file of that size, which is open as `source`, and the
        stand-ins for the rest, in pieces."""
        fd, path = source.fileno(), source.name
        done, aside = 0, _ASIDE
        for cut in cuts:
            yield from _pieces_of(fd, done, cut.begin, path)
            # In this order, whatever theirs was: so none is taken later that was never taken.
            stands = [(ADDX, LOST, 0)] * cut.lost + [
                (OPEN, None, aside + number) for number in range(cut.taken)] + [
                (UNREMOVE, None, _LOST)] * cut.back
            ends = cut.before
            if cut.begin == 0 and (ends is not None or cut.end == size):
                ends = ends or 0             # it may well have had check sums
                yield [_mark(True, ends)]
            if cut.unclosed:                 # only the ends were wrong in the CHECK there
                crc = zlib.crc32(os.pread(fd, cut.unclosed, cut.begin - cut.unclosed))
                yield [_CHECK.pack(CHECK, cut.unclosed, crc, ends)]
            if ends is None:
                yield _encode(stands)[0]
            elif stands:
                chunks, ends = _encode_checked(stands, ends)
                yield chunks
            # Check sums end here if what follows has none, or does not go on from these ends; then
            # they begin again. Nothing has to be said at the end of the file.
            if ends not in (None, cut.after) and (cut.after is not None or cut.end < size):
                yield [_mark(False, ends)]
            if cut.after not in (None, ends):
                yield [_mark(True, cut.after)]
            done, aside = cut.end, aside + cut.taken
        yield from _pieces_of(fd, done, size, path)

    def keep(self, file, source, begin, end):
        """Copy bytes of a file, which is open as `source`, into lost+found; return the path."""
        directory = os.path.join(self.directory, "lost+found")
        os.makedirs(directory, 0o700, exist_ok=True)
        kept = _lost_path(directory, file.path, ".%d.%d" % (begin, _unique_number()))
        with open(kept, "xb", opener=functools.partial(os.open, mode=0o600)) as target:
            source.seek(begin)
            for offset in range(begin, end, _STEP_SIZE):
                target.write(source.read(min(_STEP_SIZE, end - offset)))
            target.flush()
            os.fsync(target.fileno())
        return kept

    # -- the end

    def close(self):
        """Close the files."""
        for file in self.passed + self.files:
            self.budget.close(file)
        self._unlock()

    def _unlock(self):
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def delete(self):
        """Remove the files: all of them, or none. Return a task that finishes what can be
        finished later, or None. Raises OSError, and then nothing has changed.

        One file goes with one unlink. Several go with one rename, of an empty file that stands
        for all of them; what is left of them then is deleted now, or at the next start.
        """
        files = self.passed + self.files
        if len(files) == 1:
            fds = self._unlink(files[0])
            self._unlock()
            self.unsynced = set()
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
        self._unlock()
        self.passed = files + [JournalFile(pack, number)]
        self.files = []
        self.unsynced = set()
        return self.clear()

    def clear(self):
        """A task: delete what delete() has left, and at last the file that stands for it."""
        yield self._sync_directory()
        for file in self.passed[:-1]:
            yield from self._remove(file)
        yield self._sync_directory()
        yield from self._remove(self.passed[-1])


def kept_now(held, items=(), less=()):
    """Return the Kept of these open reads and Delayed, and items. less: {id of an item: how many of
    its deliveries are counted by what follows in the files}."""
    counts = {id(item): item.deliveries for item in items if item.deliveries}
    for one in held.values():
        item = one.item if type(one) is Delayed else one
        count = item.deliveries - (less[id(item)] if less else 0)
        count -= item is not one and one.to_head       # the DELAY in the pack counts it
        if count > 0:
            counts[id(item)] = count
    return Kept(held, counts, items)


def _kept_before(held, ops):
    """Return the Kept before some operations. held: the open reads and the Delayed after these,
    which is changed.

    Files are passed in the middle of a batch, and until it is written all of it may be undone;
    so what was there then is found by going backwards from the end. Say the open reads are 7 and 8
    after OPEN 7, UNREMOVE 3, OPEN 8: before, 3 was open, and had come back once less.
    """
    less = collections.Counter()
    for opcode, item, xid in reversed(ops):
        if opcode in (OPEN, ADD_DELAYED):
            del held[xid]
        elif opcode in (CONFIRM, UNREMOVE, PUT_BACK, TO_TAIL, DUE_TAIL, DUE_HEAD):
            held[xid] = item
        elif opcode == DELAY:
            held[xid] = item = item.item
        elif opcode == DROP:
            held.update(item)
        if opcode in (UNREMOVE, TO_TAIL, DELAY):       # which count a delivery
            less[id(item)] += 1
    return kept_now(dict(sorted(held.items())), (), less)


class ReadBehind:
    """Reads the items of a queue that are not in memory: those after byte `offset` of `file`,
    without the first `skip` of them. If there are check sums it begins after the last CHECK of
    `file` so far. ends: in the CHECK that ends at `offset`, if there must be check sums from there
    on, else None. fresh: the items behind all of these, which are still to be written.

    older: the files in front of those of the journal, for a spool whose newer files take items
    from older ones: the items of all these are accounted to files[0], see Journal.account().
    Kestrel leaves such a spool when it was reading behind.
    """

    def __init__(self, journal, file, offset, skip):
        self._journal = journal
        self.file = file
        self.offset = offset
        self.skip = skip
        self.ends = file.ends if file.checked else None
        self.fresh = []
        self.older = ()

    def go_back(self):
        """Go back to the end of the file, if the file was cut off before `offset`. What followed
        had been read."""
        if self.offset > self.file.size:
            self.offset = self.file.size
            self.ends = self.file.ends if self.file.checked else None

    def read(self, most, size):
        """Return the next items, at most `most` of them, from a piece of about `size` bytes of
        the journal; none at its end. Raises OSError, and Damage where `file` is damaged."""
        items = []
        piece = size
        while not items:
            data = b""
            left = self.file.size - self.offset if self.file.path else 0
            if left > 0:                     # what a failed write has left may follow
                fd = os.open(self.file.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    left = min(left, os.fstat(fd).st_size - self.offset)
                    data = os.pread(fd, min(piece, max(0, left)), self.offset)
                finally:
                    os.close(fd)
            if not data:
                if not self._go_to_next_file():
                    break
            elif not (self._take(data, left, most, size, items)
                      or self._take_large(data, left, items)):
                piece *= 2                   # up to where the CHECK is
        return items

    def _take(self, data, left, most, size, items):
        """Take the items of a piece, where there must be check sums only those with a right one.
        Return whether anything could be taken."""
        skip, ends = self.skip, self.ends
        taken = skip, 0, ends                # where to go on: what to skip after which offset
        found = []                           # the items behind that
        try:
            for opcode, xid, item, done in read_records(
                    io.BytesIO(data), ends=ends):
                if opcode == CHECK:
                    ends = _after_check(xid, ends)
                elif item is not None and opcode != ADD_DELAYED:
                    if skip:
                        skip -= 1
                    else:
                        length = len(item.data)
                        item.place = Place(self.file, self.offset + done - length, length)
                        found.append(item)
                if opcode == CHECK or ends is None:
                    room = most - len(items)
                    if len(data) > size:         # a piece larger than what there is room for
                        sizes = itertools.accumulate(len(one.data) for one in found)
                        room = min(room, 1 + sum(end < size for end in sizes))
                    items += found[:room]
                    if len(found) > room:        # go on from the same offset, behind these
                        taken = taken[0] + room, *taken[1:]
                        break
                    found = []
                    taken = skip, done, ends
                    if len(items) == most:
                        break
        except Damage as damage:
            # The file was written whole: a record that ends beyond it is damaged.
            if not damage.torn or len(data) >= left:
                del items[:]
                raise
        self.skip, done, self.ends = taken
        self.offset += done
        return bool(items) or done > 0

    def _take_large(self, data, left, items):
        """Take an item that is larger than a piece, without its data, whose check sum is compared
        when the data is read. Return whether there is such an item."""
        if data[0] not in _HEADS:
            return False
        item, _, start, size = _parse_head(data)
        if start + size <= len(data):
            return False
        if start + size > left:
            raise Damage(self.offset, "record cut short", torn=True)
        head, crc = 0, None
        if self.ends is not None:
            with open(self.file.path, "rb") as source:
                source.seek(self.offset + start + size)
                check = source.read(_CHECK.size)
            if len(check) < _CHECK.size or _CHECK.unpack(check)[:2] != (CHECK, start + size):
                if size <= _SPAN:
                    return False             # others may be closed together with it
                raise Damage(self.offset, "wrong check sum", torn=False)
            head = start
            _, _, crc, ends = _CHECK.unpack(check)
            if ends != _moved(self.ends, _MOVES[data[0]]):
                raise Damage(self.offset, "write out of sequence", torn=False)
            self.ends = ends
        if data[0] == ADD_DELAYED:
            pass
        elif self.skip:
            self.skip -= 1
        else:
            item.place = Place(self.file, self.offset + start, size, head, crc)
            items.append(item)
        self.offset += start + size + (_CHECK.size if head else 0)
        return True

    def _go_to_next_file(self):
        """Go on with the file after this one, which may have been packed since; False if there
        is none."""
        last = self.file.number
        for file in itertools.chain(self.older, self._journal.files):
            if last is not None and (file.number is None or file.number > last):
                self.file, self.offset, self.skip, self.ends = file, 0, 0, None
                return True
        return False


# == 5. Queue =============================================================================
#
# One queue: items in order, open reads, waiters, limits, expiry, and the journal that records
# each change. A queue can be used alone. It knows no sockets, no protocols, no other queues: it
# hands what expires to its host, and tells the host when there is something to write.

# How many items or queues one step of a task looks at.
SWEEP_STEP = 1000

# How much memory each queue may use even when the server has reached max_memory, in bytes.
MEMORY_FLOOR = 1 << 18

# How much the memory of a queue may change before it is counted again, in bytes.
_MEMORY_STEP = 1 << 12

# What it costs to free an item, in bytes that could be freed instead.
_FREE_COST = 1 << 10

# How long a write that found no descriptors left is put off, in milliseconds.
_NO_DESCRIPTOR_MS = 50

# How long after a failure the server tries again by itself, in milliseconds.
RETRY_MS = 1000

# How long waiters wait before more of a run of expired items is dropped, in milliseconds.
_SWEEP_MS = 1

# The longest time until an alarm for a delayed item, in milliseconds: the clock may be set.
_LONGEST_NAP_MS = 10000

# How often the log says how far the loading of a queue has got.
_PROGRESS_SECONDS = 3


class Waiter:
    """A read that waits for an item of one of `queues`. deliver: called once, with the queue and
    the item, or with None and None when one of the queues is gone."""

    __slots__ = ("deliver", "open", "peek", "queues")

    def __init__(self, deliver, open=False, peek=False):
        self.deliver = deliver
        self.open = open
        self.peek = peek
        self.queues = []

    def take(self, queue, item):
        """Deliver an item of a queue, or None and None; wait no longer."""
        self.cancel()
        self.deliver(queue, item)

    def cancel(self):
        """Wait no longer."""
        for queue in self.queues:
            queue.waiters.pop(self, None)
        self.queues = []


class Alone:
    """The host of a queue that is used without a server: everything is done at once.

    A server has another host, with the same attributes:

    changed(queue)          there is something for queue.write() to do
    failed(queue, error)    operations of the queue have been undone
    unreadable(queue, error)
                            items that are only on disk cannot be read
    timed_out(queue, xids)  open reads go back, since their time is over
    start(task)             run a task
    work(call, done)        make a blocking call on another thread, then call done with its OSError
                            or None; None if there is no other thread
    later(ms, call)         make a call after that time; return a function that cancels it; None
                            if there are no timers, and so no later turns
    moves                   None, or has these. bury(queue, item, now, setting): move an open read,
                            whose item has expired or was handed out too often, to the queue that
                            this setting names. is_burying_much(queue): return whether no more
                            should be moved for now. stuck: the queues whose expired items cannot
                            be moved for now
    sweep_limit             how many expired items a read drops at once
    locks_files             whether to keep other processes out
    budget                  see Budget
    """

    later = moves = work = None
    sweep_limit = UNLIMITED
    locks_files = True

    def __init__(self):
        self.budget = Budget()

    def changed(self, queue):
        queue.write_now()

    def failed(self, queue, error):
        pass                                 # the caller gets the error

    unreadable = timed_out = failed

    def start(self, task):
        run_task(task)


class History:
    """The positions of a queue's operations, and the calls that wait for them.

    Each operation has a position: its number in the history of the queue. `logged`, `written`
    and `durable` are the last positions in memory, handed to the kernel and fsynced. `safe` is
    the last one that may be acknowledged: with sync_journal = 0 what is durable, else what is
    written. `undone` are the positions that were given up last. What must not happen before a
    change is safe is left to when_safe().
    """

    def __init__(self):
        self.safe = self.written = self.durable = 0
        self.undone = range(0)
        self.ops = []                        # (opcode, item, xid) of what is still to be written
        self.unsafe = []                     # those that are being written, or wait for an fsync
        self.writing = None                  # the Plan that the worker writes
        # (position, call) of when_safe(), in order, and of when_durable(): deques once there are
        # any, since an empty deque takes 760 bytes.
        self._pending = self.syncing = ()

    @property
    def logged(self):
        """The position of the last operation."""
        return self.safe + len(self.unsafe) + len(self.ops)

    def when_safe(self, call, position=None):
        """Call `call` with None when all operations so far, or up to a position, are safe; or with
        an OSError when they have been undone."""
        if position is None:
            position = self.logged
        if position <= self.safe:
            call(None)
            return
        pending = self._pending = self._pending or collections.deque()
        index = len(pending)
        while index and pending[index - 1][0] > position:
            index -= 1
        pending.insert(index, (position, call))

    def when_durable(self, call):
        """Call `call` with None when all operations so far are durable, whatever sync_journal is;
        or with an OSError when they have been undone."""
        if self.logged <= self.durable:
            call(None)
        else:
            self.syncing = self.syncing or collections.deque()
            self.syncing.append((self.logged, call))

    def advance(self, position):
        """Note that all operations up to a position are safe."""
        if position > self.safe:
            del self.unsafe[:position - self.safe]
            self.safe = position

    def settle(self):
        """Make the calls that waited for what is now safe, or durable."""
        while self._pending and self._pending[0][0] <= self.safe:
            self._pending.popleft()[1](None)
        while self.syncing and self.syncing[0][0] <= self.durable:
            self.syncing.popleft()[1](None)

    def go_back(self):
        """Give up the operations that are not safe; their positions are not used again. Return
        them, and a function that makes the calls that waited for them, with an OSError or None."""
        ops = self.unsafe + self.ops
        logged = self.logged
        pending, self._pending = list(self._pending), ()
        while self.syncing and self.syncing[-1][0] > self.safe:
            pending.append(self.syncing.pop())
        if self.durable == self.safe:
            self.durable = logged
        # Those of several failures, if nothing became safe in between.
        begin = self.undone.start if self.undone.stop == self.safe + 1 else self.safe + 1
        self.undone = range(begin, logged + 1)
        self.safe = self.written = logged
        self.ops, self.unsafe = [], []

        def tell(error):
            for _, call in pending:
                call(error)

        return ops, tell

    def forget(self):
        """Treat all operations so far as safe: they will never be written to the disk."""
        _, tell = self.go_back()
        self.undone = range(0)
        self.durable = self.safe
        tell(None)
        self.settle()


class Delays:
    """The items of a queue that are not available yet.

    items: {xid: Delayed}. due: a heap of (due, xid), which may have entries of items that are gone.
    ready: the Delayed for the head that are due and have left the heap, in their order; they too
    may be gone. alarm: None, or (when the next is due, a function that cancels the alarm for it),
    or (0, a function that cancels the alarm for the rest of those that are due). bytes, memory:
    the size of their data, and what they take of the memory. dying: the xids of open reads that no
    client can end: on their way to the dead_letter_queue, or safe in another queue.
    """

    def __init__(self):
        self.items = {}
        self.due = []
        self.ready = []
        self.alarm = None
        self.bytes = self.memory = 0
        self.dying = set()

    def add(self, delayed):
        """Add a Delayed."""
        due, xid, item, _ = delayed
        self.items[xid] = delayed
        heapq.heappush(self.due, (due, xid))
        self.bytes += _size(item)
        self.memory += _cost(item)

    def recount(self):
        """Derive `due`, `bytes` and `memory` from `items`."""
        self.ready = []
        self.due = [(each.due, xid) for xid, each in self.items.items()]
        heapq.heapify(self.due)
        self.bytes = sum([_size(each.item) for each in self.items.values()])
        self.memory = sum([_cost(each.item) for each in self.items.values()])

    def pop(self, xid):
        """Remove and return the one of that number; None if there is none."""
        delayed = self.items.pop(xid, None)
        if delayed:
            self.bytes -= _size(delayed.item)
            self.memory -= _cost(delayed.item)
        return delayed

    def next_due(self):
        """Return when the next is due, None if there is none."""
        due, ready = self.due, self.ready
        while ready and not self.holds(ready[-1]):
            ready.pop()
        if ready:
            return ready[-1].due
        while due and (due[0][1] not in self.items or self.items[due[0][1]].due != due[0][0]):
            heapq.heappop(due)
        return due[0][0] if due else None

    def holds(self, delayed):
        """Return whether a Delayed is still there."""
        return self.items.get(delayed.xid) is delayed

    def pop_due(self, now):
        """Remove the next one that is due from the heap, and return it; None if there is none."""
        while self.due and self.due[0][0] <= now:
            due, xid = heapq.heappop(self.due)
            if xid in self.items and self.items[xid].due == due:
                return self.items[xid]
        return None

    def clear(self):
        """Remove all. The caller may keep the old `items`, `due` and `ready`: they are not
        emptied."""
        self.items, self.due, self.ready = {}, [], []
        self.bytes = self.memory = 0


class Queue:
    """A durable FIFO queue.

    name: see check_name. path: the directory of its journal, None to keep the queue in memory
    only. config: a QueueConfig. older: the numbers of its older journal files, None to look for
    them. host: see Alone.

    Every method that takes `now` (milliseconds of the epoch) reads the clock itself when
    it is None. When a queue is used alone, each change has been written when the method returns,
    and fsynced if sync_journal is 0; a change that cannot be written is undone and raises
    OSError. A server collects the changes of a turn instead, and calls write().

    A failure undoes all operations that are not safe, see History, in memory and in the files.

    Past max_memory_size only the head of the queue is in memory; the rest is read from the
    journal as the queue drains:

        items (in memory) | on disk only | _behind.fresh (on their way there)
    """

    def __init__(self, name: str, path: "str | None" = None,
                 config: "QueueConfig | None" = None, older: "Iterable[int] | None" = None,
                 host=None, now: "int | None" = None) -> None:
        self.name = check_name(name)
        self.path = path
        self.host = host or Alone()
        self.items = collections.deque()     # the waiting items in memory, the head first
        self.opens = {}                      # xid -> item, the oldest open read first
        self.waiters = collections.OrderedDict()     # a set, in the order they are served
        self.count = 0                       # how many items wait
        self.bytes = 0                       # data of the waiting items
        self.memory = 0                      # what `items` take, see ITEM_COST
        self.open_memory = 0                 # what `opens` and `delays` take
        self.delays = Delays()
        self.paused = 0                      # PAUSED_IN, PAUSED_OUT or both
        self.xid = 0                         # the last one used
        self.closed = False
        self.counters = Values(
            create_time=_now(now), age=0, total_items=0, expired_items=0, discarded=0,
            total_flushes=0, transactions=0, canceled_transactions=0, put_bytes=0, get_bytes=0,
            get_hits=0, get_misses=0, put_rate=0.0, get_rate=0.0, fsync_usec=0, dead_letters=0,
            journal_rewrites=0, journal_rotations=0)
        self.history = History()
        self._counted = 0                    # how much memory the server counts for this queue,
        self._allowance = 0                  # and how much it may use
        self._behind = None                  # the ReadBehind of what is not in memory
        self._loading = None                 # the head item that the worker reads, or (that, why
                                             # it cannot be read)
        self._is_serving_again = False       # whether an alarm is set to serve the waiters
        self._alarms = {}                    # xid -> (what cancels its timeout, the timeout)
        self._overdue = []                   # xids whose time is over
        self.journal = None
        self.upkeep = Upkeep(self)
        self.config = config or QueueConfig()
        self._set_limits()
        self.count_memory()
        if path is not None and self.config.keep_journal:
            self.journal = self._new_journal(older)
            try:
                self._load()
                self.count_memory()
            except BaseException:
                self.journal.close()
                raise

    def _new_journal(self, older):
        return Journal(self.path, self.name, older, self.host.budget, self.host.locks_files)

    def configure(self, config):
        """Change the settings."""
        self.config = config
        self._set_limits()
        self.count_memory()
        if self.path is None or config.keep_journal == (self.journal is not None):
            return
        try:
            if config.keep_journal:
                self.history.forget()        # all that there is will be written first
                put_aside(self.path, self.name)
                self.journal = self._new_journal(())
                self.upkeep.renew()
            else:
                self._give_up_journal()
        except OSError as error:
            log.error("keep_journal of %s: %s", self.name, error.strerror)

    def _give_up_journal(self):
        if self._behind:
            log.warning("keep_journal of %s stays: the queue is larger than its memory; "
                        "reload when it has shrunk", self.name)
            return
        for item in self._in_memory():
            self.data_of(item)
            item.place = None                # it cannot be read again later
        task = self.journal.delete()
        self.upkeep.stop()
        self.history.forget()
        if task:
            self.host.start(self._clear(task, self.journal.path))
        self.journal = self.history.writing = None
        self.upkeep = Upkeep(self)           # of the next journal

    # -- adding and taking

    def add(self, data: bytes, flags: int = 0, expiry: int = 0,
            now: "int | None" = None) -> bool:
        """Append an item; False when the queue is full or the item too large for it.

        flags: 32 bits given back with the item. expiry: milliseconds of the epoch from
        which on it is not handed out any more, 0 for none. Raises OSError if memory is short.
        """
        config = self.config
        if now is None:
            now = _now()
        if type(data) is not bytes:
            data = _as_bytes(data)
        if expiry or flags:
            _check_numbers(expiry, flags)
            if not config.keep_flags:
                flags = 0
        size = len(data)
        if size > config.max_item_size:
            return False
        cost = size + ITEM_COST
        if self._behind is None and self.memory + self.open_memory + cost > self._allowance:
            self._fall_behind(cost)
        if self._limits and self._is_full() and not self._make_room(now):
            self._catch_up()
            return False
        item = Item(data, now, expiry, flags)
        if self._behind:
            self._behind.fresh.append(item)
        else:
            self.items.append(item)
            self.memory += cost
        self.count += 1
        self.bytes += size
        counters = self.counters
        counters.total_items += 1
        counters.put_bytes += size
        ops = self.history.ops
        if ops:                          # as _log() does, without a call
            ops.append((ADDX, item, 0))
        else:
            self._log(ADDX, item)
        if self.waiters:
            self._serve(now)
        return True

    def add_later(self, data: bytes, delay: int, flags: int = 0, expiry: int = 0,
                  now: "int | None" = None) -> bool:
        """Append an item, as add() does, that is available after `delay` milliseconds only. It is
        in memory until then. Raises OSError if there is no memory for it."""
        now = _now(now)
        data = _as_bytes(data)
        _check_numbers(expiry, flags, delay)
        size = len(data)
        if size > self.config.max_item_size or not self._make_room(now):
            return False
        self.check_delays(size)
        self.xid = xid = self._next_xid()
        delayed = Delayed(now + delay, xid, Item(
            data, now, expiry, flags if self.config.keep_flags else 0), False)
        self.counters.total_items += 1
        self.counters.put_bytes += size
        self._hold(delayed, now)
        self._log(ADD_DELAYED, delayed, xid)
        return True

    def check_delays(self, size):
        """Raise OSError if there is no memory for a delayed item of `size` bytes."""
        self.count_memory()
        if self.open_memory + size + ITEM_COST > self._allowance:
            raise OSError(errno.ENOMEM, "out of memory for delayed items", self.name)

    def _make_room(self, now):
        """If the queue is full, drop expired items, and with discard_old_when_full older ones.
        Return whether there is room for one more item then."""
        config = self.config
        if self.paused & PAUSED_IN:
            return False
        if self._is_full():
            self.discard_expired(now, min(config.max_expire_sweep, self.host.sweep_limit))
        while self._is_full():
            if not config.discard_old_when_full or not self.count:
                return False
            if self.items or self._refill():
                self.counters.discarded += 1
                self._log(REMOVE, self._pop(False))
        return True

    def _is_full(self):
        return self._limits is not None and (
            self.count >= self._limits[0] or self.bytes >= self._limits[1])

    def _set_limits(self):
        """Derive how many items may wait and how large they may be, None if there is no limit:
        delayed items count too; whether remove() and peek() have only the head to look at; and up
        to which size a journal needs no upkeep as long as there are items."""
        config, delays = self.config, self.delays
        self._small = min(config.max_memory_size, config.max_journal_size)
        self._is_plain = not (delays.items or self.paused)
        if self.paused & PAUSED_IN:
            self._limits = 0, 0
        elif config.max_items == config.max_size == UNLIMITED:
            self._limits = None
        else:
            self._limits = config.max_items - len(delays.items), config.max_size - delays.bytes

    def remove(self, open: bool = False, now: "int | None" = None,
               even_paused: bool = False) -> "Item | None":
        """Take the head item; return None if there is none. open: leave it open until it is
        confirmed or aborted by its number, item.xid. even_paused: do so whatever pause() said.

        With a server it may return None though there are items, see has_more(): many at the head
        have expired, or the worker reads a large one. Then call it again. Raises OSError when
        the item cannot be read.
        """
        if now is None:
            now = _now()
        if not self._is_plain:
            self._release(now)
            if self.paused & PAUSED_OUT and not even_paused:
                return None
        if not self.items and not (self.count and self._refill()):
            return None
        head = self.items[0]
        if (head.expiry or self.config.max_age) and self._is_expired(head, now):
            if not self._sweep(now):
                return None
            head = self.items[0]
        if head.data is not None and self._behind is None:
            item = self.items.popleft()      # as _take() does: this makes a get 3 % faster
            size = len(item.data)
            self.count -= 1
            self.bytes -= size
            self.memory -= size + ITEM_COST
        else:
            try:
                if head.data is None and self._is_loading(head):
                    return None
                item = self._pop()
            except WrongSum:
                self._lose_head()
                return self.remove(open, now, even_paused)
            size = len(item.data)
        counters = self.counters
        counters.age = now - item.add_time if now > item.add_time else 0
        counters.get_hits += 1
        counters.get_bytes += size
        if open:
            counters.transactions += 1
            self._open(item)
        else:
            ops = self.history.ops
            if ops:                          # as _log() does, without a call
                ops.append((REMOVE, item, 0))
            else:
                self._log(REMOVE, item)
        return item

    def peek(self, now: "int | None" = None) -> "Item | None":
        """Return the head item, which stays where it is, or None, as remove() does."""
        now = _now(now)
        if not self._is_plain:
            self._release(now)
        if not self.count or not (self.items or self._refill()):
            return None
        if self._is_expired(self.items[0], now) and not self._sweep(now):
            return None
        try:
            self.data_of(self.items[0])
        except WrongSum:
            self._lose_head()
            return self.peek(now)
        return self.items[0]

    def browse(self, most: int = UNLIMITED,
               now: "int | None" = None) -> "Iterator[list[Item]]":
        """Yield the first items, at most `most`, in lists; all stay where they are. What changes
        meanwhile may be seen or not. Raises OSError."""
        now = _now(now)
        if not self._is_plain:
            self._release(now)
        journal = self.journal

        def is_there(item):                  # once it has been taken its file may be removed
            return item.data is not None or item.place.file.path and not self.closed

        unread = self._unread
        reader = copy.copy(self._behind)
        fresh = list(itertools.islice(reader.fresh, most)) if reader else []
        items = list(itertools.islice(self.items, most))
        while True:
            for some in _steps(items):
                yield [item if item.data is not None else journal.loaded(item)
                       for item in some if not self._is_expired(item, now) and is_there(item)]
            most -= len(items)
            if unread <= 0 or most <= 0 or self.closed:
                break
            try:
                items = reader.read(min(unread, most), _READ_SIZE)
            except Damage as damage:
                raise OSError(errno.EIO, damage.why, reader.file.path) from None
            if not items:
                break
            unread -= len(items)
        yield [item for item in fresh[:max(0, most)] if not self._is_expired(item, now)]

    def has_more(self, peek):
        """Return whether there are items, so that remove(), or peek(), is worth another call."""
        return self.count > 0 and (peek or not self.paused & PAUSED_OUT)

    def is_head(self, item):
        """Return whether an item is the one at the head."""
        return bool(self.items) and self.items[0] is item

    def _sweep(self, now):
        """Drop expired items before a read. Return whether there is an item to read then."""
        self.discard_expired(now, self.host.sweep_limit)
        return (self.count and (self.items or self._refill())
                and not self._is_expired(self.items[0], now))

    def confirm(self, xid: int, is_moved: bool = False) -> bool:
        """Finish an open read. Return False if there is none of that number, or its item is on its
        way to another queue. is_moved: it is safe there."""
        if xid in self.delays.dying and not is_moved:
            return False
        item = self._end_read(xid)
        if item is None:
            return False
        if is_moved:
            self.delays.dying.add(xid)       # also if this is undone
        self._log(CONFIRM, item, xid)
        if xid in self._alarms:
            self._silence_alarm(xid)
        return True

    def abort(self, *xids: int, now: "int | None" = None, orphaned: bool = False, delay: int = 0,
              tail: bool = False, counted: bool = True) -> int:
        """Put open reads back at the head, the first one given in front of the others. Return how
        many there were.

        orphaned: no caller waits for the result, so try again after a failure. delay: put them
        back after that many milliseconds. tail: put them at the tail, at once. counted: they had
        been handed out; what comes back too often goes to the dead_letter_queue.
        """
        known = [xid for xid in dict.fromkeys(xids) if xid in self.opens
                 and not (counted and xid in self.delays.dying)]
        now = _now(now)
        most = self.config.max_deliveries if counted and self.host.moves and (
            self.config.dead_letter_queue not in (None, self.name)) else UNLIMITED
        if tail:
            for xid in known:
                self.data_of(self.opens[xid])
        for xid in known if tail or delay else reversed(known):
            item = self.opens[xid]
            if item.deliveries + 1 >= most:
                self.delays.dying.add(xid)   # it stays open until it is safe there
            else:
                item.deliveries += counted   # as the record says
                self._end_read(xid)
                self.counters.canceled_transactions += 1
                if delay:
                    delayed = Delayed(now + delay, xid, item, True)
                    self._hold(delayed, now)
                    self._log(DELAY, delayed, xid)
                elif tail:
                    self._append_again(item)
                    self._log(TO_TAIL, item, xid)
                else:
                    self._push(item)
                    self._log(UNREMOVE if counted or self.config.max_deliveries == UNLIMITED
                              else PUT_BACK, item, xid)
            if xid in self._alarms:
                self._silence_alarm(xid)
        for xid in known:
            if xid in self.delays.dying:
                self.history.when_safe(functools.partial(
                    self._let_die, xid, self.opens[xid], now))
        if known:
            if orphaned:
                self.history.when_safe(functools.partial(self._abort_again, known, counted))
            if self.waiters:
                self._serve(now)
        return len(known)

    def _abort_again(self, xids, counted, error):
        if error and self.host.later:
            self.host.later(RETRY_MS, functools.partial(
                self.abort, *xids, orphaned=True, counted=counted))

    def _let_die(self, xid, item, now, error):
        """Have an open read moved to the dead_letter_queue; or, if its abort has been undone, let
        it be open as before."""
        if not error:
            self.host.start(self._bury(xid, item, now))
        elif self.opens.get(xid) is item:
            self.delays.dying.discard(xid)
            self.touch(xid)

    def _bury(self, xid, item, now):
        """A task: move an open read to the dead_letter_queue, unless it has ended."""
        yield
        if self.opens.get(xid) is item and not self.closed:
            log.warning("queue %s: an item of %d bytes came back %d times, and goes to %s",
                        self.name, _size(item), item.deliveries + 1, self.config.dead_letter_queue)
            self.counters.dead_letters += 1
            item.xid = xid
            self.host.moves.bury(self, item, now, "dead_letter_queue")

    # -- delays and pauses

    def pause(self, what: int = PAUSED_IN | PAUSED_OUT) -> None:
        """Refuse puts (PAUSED_IN), let gets find nothing (PAUSED_OUT), or both, or neither (0).
        It stays so over restarts."""
        if what != self.paused:
            before, self.paused = self.paused, what
            self._set_limits()
            self._log(PAUSE, before, what)
            if self.waiters:
                self._serve(_now())

    def touch(self, xid: int) -> bool:
        """Start the timeout of an open read anew. Return False if there is none of that number."""
        _, timeout = self._alarms.get(xid, (None, None))
        if xid in self._overdue:
            self._overdue.remove(xid)
        if timeout:
            self.limit(xid, timeout)
        return self.is_open(xid)

    def is_open(self, xid):
        """Return whether a read is open, and not on its way to the dead_letter_queue."""
        return xid in self.opens and xid not in self.delays.dying

    def held(self):
        """Return the open reads and the delayed items as {xid: Item or Delayed}."""
        return {**self.opens, **self.delays.items}

    def _in_memory(self):
        """Yield the items that are in memory and not on their way to the journal."""
        return itertools.chain(self.opens.values(), self.items, (
            delayed.item for delayed in self.delays.items.values()))

    def _hold(self, delayed, now):
        """Keep an item until it is due."""
        self.delays.add(delayed)
        self.open_memory += _cost(delayed.item)
        self._set_limits()
        self._watch_delays(now)

    def _unhold(self, delayed):
        """Keep an item no longer."""
        self.delays.pop(delayed.xid)
        self.open_memory -= _cost(delayed.item)
        self._set_limits()

    def _watch_delays(self, now):
        """See to it that the next delayed item is released in time."""
        due, alarm = self.delays.next_due(), self.delays.alarm
        if due is not None and not (alarm and alarm[0] <= due):
            self._set_alarm(due, now)

    def _set_alarm(self, due, now):
        """Have delayed items released then. due: 0 for those that an earlier release has left."""
        if self.host.later:
            if self.delays.alarm:
                self.delays.alarm[1]()
            self.delays.alarm = due, self.host.later(min(max(0, due - now), _LONGEST_NAP_MS),
                                                     self._release_now)

    def _release_now(self):
        self.delays.alarm = None
        if not self.closed:
            now = _now()
            self._release(now)
            self._watch_delays(now)
            self._serve(now)

    def _release(self, now):
        """Put the delayed items that are due where they belong, some at a time; an alarm goes on
        with the rest in the next turn.

        Those for the head come to stand in the order in which they are due. So all that are due
        have to be known first; then the last one goes back first. A read that comes in between
        finds what is there by then: one that was due later, or nothing. This does not serve the
        waiters, since one of them may be being served: the alarm will.
        """
        delays = self.delays
        due = delays.next_due()
        if due is None or due > now or delays.alarm and delays.alarm[0] == 0:
            return
        limit = room = self.host.sweep_limit
        found = {}                           # what was undone may be in the heap twice
        while room > 0:
            delayed = delays.pop_due(now)
            if delayed is None:
                break
            found[delayed.xid] = delayed
            room -= .25 if delayed.to_head else 1      # most of the work is to put it back
        some = [delayed for delayed in found.values() if not delayed.to_head]
        delays.ready += [delayed for delayed in found.values() if delayed.to_head]
        while room > 0 and delays.ready and len(some) < limit:     # all that are due are known
            some.append(delays.ready.pop())
        try:
            # One after the other: without a server each is written at once.
            for delayed in filter(delays.holds, some):
                self._unhold(delayed)
                if delayed.to_head:
                    self._push(delayed.item)
                else:
                    self._append_again(delayed.item)
                self._log(DUE_HEAD if delayed.to_head else DUE_TAIL, delayed, delayed.xid)
        finally:                             # what could not be written is due as before
            for delayed in filter(delays.holds, some):
                heapq.heappush(delays.due, delayed[:2])
            due = delays.next_due()
            if due is not None and due <= now:
                self._set_alarm(0, now)
            self._watch_delays(now)

    def _append_again(self, item):
        """Append a copy of an item that was open or delayed. Its record is written anew, later,
        with the count of deliveries that it has now."""
        data, item = item.data, item.stub()
        item.data, item.place = data, None
        if self._behind is None and self.journal and (
                self.memory + self.open_memory + _cost(item) > self._allowance):
            self._fall_behind(_cost(item))
        if self._behind:
            self._behind.fresh.append(item)
        else:
            self.items.append(item)
            self.memory += _cost(item)
        self.count += 1
        self.bytes += len(item.data)

    def flush(self) -> None:
        """Drop all waiting and delayed items. Open reads stay open."""
        self.counters.total_flushes += 1
        history, new = self.history, []      # in one write: all of it is done, or nothing
        gone = []                            # arguments of _let_go()
        if self.delays.items:
            self.open_memory -= self.delays.memory
            gone.append((self.delays.items, self.delays.memory))
            gone += (self.delays.due, 0), (self.delays.ready, 0)
            new.append((DROP, self.delays.items, 0))
            self.delays.clear()
            self._set_limits()
        before = self.items, self._behind, self.count, self.bytes, self.memory
        if self.count:
            new.append((FLUSH, before, self.count))
            gone.append((self.items, self.memory))
            self._drop_items()
        is_first = not history.ops
        history.ops += new
        if new and is_first or self.journal and self.journal.torn:
            self.host.changed(self)          # what was undone may come back: write() says so
        for one in gone:
            history.when_safe(functools.partial(self._let_go, *one))

    def _let_go(self, items, memory, error=None):
        """Free items that are not needed any more: in steps if that takes long."""
        cost = memory + _FREE_COST * len(items)
        if not error and cost > 4 * _STEP_SIZE:
            self.host.start(_free(items, cost))

    def _drop_items(self):
        self.items, self._behind = collections.deque(), None
        self.count = self.bytes = self.memory = 0

    def _drop_all(self):
        self._drop_items()
        self.opens.clear()
        self.delays.clear()
        self.open_memory = 0

    def discard_expired(self, now: "int | None" = None, limit: "int | None" = None) -> int:
        """Drop expired items at the head, at most `limit` (default: max_expire_sweep), or move
        them to expire_to_queue. Return how many there were."""
        now = _now(now)
        count = size = 0
        if limit is None:
            limit = self.config.max_expire_sweep
        moves = self.host.moves and self.config.expire_to_queue not in (None, self.name)
        while count < limit and self.count and (self.items or self._refill()) and (
                self._is_expired(self.items[0], now)):
            if self.host.later and (size > 4 * _STEP_SIZE or moves and (
                    self.host.moves.is_burying_much(self))):
                break                        # it comes back in another turn
            count += 1
            try:
                item = self._pop(moves)
            except WrongSum:
                self._lose_head()
                continue
            size += _size(item)
            if moves and not is_lost(item):
                # Open until it is safe elsewhere, so that a crash cannot lose it.
                self._open(item)
                self._stop_alarm(item.xid)
                self.host.moves.bury(self, self.opens[item.xid], now, "expire_to_queue")
            else:
                self._log(REMOVE, item)
        self.counters.expired_items += count
        return count

    # -- waiting

    def wait(self, waiter):
        """Let `waiter` have the next item that comes, after those that wait already; peeks come
        first, since they take nothing."""
        self.waiters[waiter] = None
        if waiter.peek:
            self.waiters.move_to_end(waiter, last=False)
        waiter.queues.append(self)
        if self.count:                       # what is at the head has expired, as a rule
            self._serve_again(_SWEEP_MS)

    def dismiss_waiters(self):
        """Tell all waiters that nothing will come."""
        while self.waiters:
            next(iter(self.waiters)).take(None, None)

    def _serve(self, now):
        while self.waiters:
            waiter = next(iter(self.waiters))
            if self.paused & PAUSED_OUT and not waiter.peek:
                return
            try:
                item = self.peek(now) if waiter.peek else self.remove(waiter.open, now)
            except OSError as error:         # while reading behind: they wait on
                log.error("%s: cannot be read: %s", self.journal.path, error.strerror)
                self._serve_again(RETRY_MS)
                return
            if item is None:
                if self.count and not self._loading:             # a run of expired ones
                    is_stuck = self.host.moves and self in self.host.moves.stuck
                    self._serve_again(RETRY_MS if is_stuck else _SWEEP_MS)
                return
            waiter.take(self, item)

    def _serve_again(self, delay):
        """Serve the waiters after that time. There is one alarm, however many items come
        meanwhile."""
        if self.host.later and not self._is_serving_again:
            self._is_serving_again = True
            self.host.later(delay, self._go_on_serving)

    def _go_on_serving(self):
        self._is_serving_again = False
        self.recover()

    # -- the journal

    def write(self):
        """Write the operations so far.

        The worker writes a large batch, if there is a worker, and what comes after it waits.
        Raises OSError when the write fails; all operations that are not safe are then undone.
        """
        journal = self.journal
        if self.closed or self.history.writing:
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
            plan = journal.plan(ops, self.count, self.held, self.config.check_journal)
            if plan.size >= _LARGE and self.host.work:
                call = journal.write_call(plan)
            else:
                call = None
                journal.write(plan)
        except (OSError, MemoryError, Damage) as error:
            if isinstance(error, Damage):
                error = self._size_changed(error.file)
            error = error and _as_os_error(error, journal.path)
            is_partial = plan and journal.torn       # then there is something to cut off at once
            if not error or is_short_of_descriptors(error) and self.host.work and not is_partial:
                self.host.later(_NO_DESCRIPTOR_MS, functools.partial(self.host.changed, self))
                return
            raise self._go_back(error, plan is not None) from None
        if self.config.enable_trace:
            self._trace(ops)
        history, behind = self.history, self._behind
        position = history.logged
        history.ops = []
        if call:
            history.unsafe += ops
            self.history.writing = plan
            self.host.work(call, functools.partial(
                self._wrote, journal, plan, position, behind, len(behind.fresh) if behind else 0))
            return
        if self.config.sync_journal == 0 or history.unsafe:
            history.unsafe += ops
        else:
            history.safe = position          # as a rule
        if behind:
            behind.fresh.clear()
        self._commit(plan, position)

    def _commit(self, plan, position):
        """Account for a batch that has been written."""
        history, journal = self.history, self.journal
        history.written = position
        if self.config.sync_journal != 0 and history.unsafe:
            history.advance(position)
            journal.forget(position)
        journal.commit(plan, position, history.safe >= position)
        history.settle()
        # As a rule there are items, and the journal is small: no upkeep is due.
        if not self.count or journal.size > self._small or journal.passings:
            self.upkeep.check()

    def _wrote(self, journal, plan, position, behind, count, error):
        """Handle the result of the worker's write of a plan."""
        if self.closed or self.journal is not journal:
            return                           # a reload has taken it away
        self.history.writing = None
        failure, self.upkeep.failure = self.upkeep.failure, None
        if error:
            journal.torn.update(file for file, *_ in plan.shares)
            self._go_back(error, True)
        else:
            if behind:                       # also of those flushed since: that may be undone
                del behind.fresh[:count]
            self._commit(plan, position)
        if failure:
            self.sync_failed(*failure)
        self.host.changed(self)

    def is_synced(self):
        """Return whether the journal is fsynced at all."""
        return self.config.sync_journal is not None and self.host.later is not None

    def when_lasting(self, call):
        """Call `call` with None when no power failure can undo the operations so far: when they are
        fsynced, which begins at once, or safe if the journal is never fsynced; or with an OSError
        when they have been undone."""
        if self.is_synced():
            self.host.changed(self)
            self.history.when_durable(call)
        else:
            self.history.when_safe(call)

    def begin_sync(self):
        """Return the call that fsyncs what has been written, and the Sync to give to synced() or
        sync_failed() after it. Raises OSError."""
        return self.journal.begin_sync(self.history.written)

    def needs_sync(self):
        """Return whether begin_sync() has something to do. It may be an fsync of no files: what was
        written to a file that has been packed since is on the disk."""
        return (self.journal is not None and self.upkeep.renewing is None
                and (self.journal.needs_sync() or self.history.durable < self.history.written))

    def synced(self, sync):
        """Note that an fsync has succeeded."""
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
        """Undo the operations that wait for an fsync that has failed, or could not begin. Write
        anew what has been acknowledged and may be lost by now. sync: None if it did not begin."""
        history = self.history
        if self.journal is None:
            return
        if self.closed:
            if sync is None or sync.position > history.safe:     # it was for the removal
                _, tell = history.go_back()
                tell(Unclear(error.errno, error.strerror, error.filename))
            return
        if sync:
            self.journal.sync_failed(sync)
        if self.history.writing:             # the worker would write behind what is cut
            self.upkeep.failure = sync, error
            return
        self._go_back(error, is_doubtful=history.durable < history.safe)

    def _go_back(self, error, was_written=False, is_doubtful=False):
        """Undo all operations that are not safe. Return the error to report, Unclear if the files
        may still contain them. was_written: whether any may be in the files. is_doubtful:
        whether safe operations may be lost by now."""
        was_written = was_written or bool(self.history.unsafe)
        safe = self.history.safe
        ops, tell = self.history.go_back()
        self._undo(ops)
        self.journal.go_back(safe)
        if self._behind:
            self._behind.go_back()
        error = type(error)(error.errno, error.strerror, error.filename or self.journal.path)
        if error.errno == errno.ESTALE:      # a file has lost its name: nothing is to be cut
            if self.upkeep.renewing is None:
                log.error("%s: %s; the queue is written anew", error.filename, error.strerror)
            is_doubtful = True
        elif was_written:
            try:
                self.journal.cut()
            except OSError as failure:
                log.error("%s: cannot be cut back: %s", self.journal.path, failure.strerror)
                error = Unclear(error.errno, error.strerror, error.filename)
        if is_doubtful and self.upkeep.renewing is None:
            self.upkeep.renew()              # first: the calls below may begin new operations
        self.host.failed(self, error)
        tell(error)
        return error

    def pack(self) -> None:
        """Replace all files of the queue by a minimal one. For a queue that is used alone. Raises
        OSError."""
        if self._behind:
            raise OSError(errno.ENOMEM, "larger than max_memory_size", self.journal.path)
        run_task(self.upkeep.rewrite())
        passing = self.journal.next_passing(self.history.safe)
        if passing:
            run_task(self.journal.pack(passing, self.state()))
        self.journal.adopt_pack()

    def make_plain(self):
        """Give up what Kestrel cannot store, for pack(), in memory only: if pack() fails, nothing
        has changed in the files. Return [(what that was, how often)]. For a queue that is used
        alone, and is in memory."""
        delayed = sorted(self.delays.items.values())   # the next due first
        for one in delayed:
            self._unhold(one)
            if not one.to_head:
                self._append_again(one.item)
        for one in reversed(delayed):
            if one.to_head:
                self._push(one.item)
        flags = deliveries = 0
        for item in self.items:
            flags += item.flags != 0
            deliveries += item.deliveries != 0
            item.flags = item.deliveries = 0
        paused, self.paused = self.paused, 0
        return [("items whose flags are dropped", flags), ("delayed items that are available now",
                                                           len(delayed)),
                ("items whose count of deliveries is dropped", deliveries),
                ("pauses that end", int(paused > 0))]

    def state(self):
        """Return the QueueState, with `paused` as it is after the safe operations: later ones
        may be undone."""
        history = self.history
        paused = next((before for opcode, before, _ in itertools.chain(history.unsafe, history.ops)
                       if opcode == PAUSE), self.paused)
        return QueueState(self.xid, paused, self.config.max_deliveries != UNLIMITED,
                          self.config.check_journal)

    def recover(self, now=None):
        """Write and serve the waiters, after a failure that may be over."""
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
        """Drop all items and remove the files. Raises OSError, and then nothing has changed."""
        task = self.journal.delete() if self.journal else None
        self.closed = True
        self.upkeep.stop()
        self.upkeep.renewing = None
        self._let_go(self.items, self.memory)
        self._drop_all()
        for xid in list(self._alarms):
            self._stop_alarm(xid)
        self.count_memory()
        self.history.forget()
        self.dismiss_waiters()
        if task:
            self.host.start(self._clear(task, self.journal.path))
        if self.journal and self.config.sync_journal == 0:
            self.history.unsafe = [None]     # this stands for the removal until that is durable
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
        """Read the journal, and repair it and read it again while it is damaged. Raises OSError if
        a repair does not help."""
        repaired = None
        while True:
            replay = Replay(self)
            try:
                replay.run()
                break
            except LostTail as lost:
                self.journal.set_aside(*lost.args)
            except Damage as damage:
                file = damage.file or replay.file
                if repaired == (file, file.size, damage.offset):
                    raise OSError(errno.EIO, "damaged, and cannot be repaired", file.path) from None
                self.journal.repair(file)
                repaired = file, file.size, damage.offset
            self._drop_all()
            self.xid = self.paused = 0
        self._take_over()

    def _take_over(self):
        """Prepare what the journal has said for use: reads that were open go back."""
        if self._behind:
            self._behind.older = self.journal.passed[:]
            self._catch_up()
        if self.delays.items:
            self.delays.recount()
            self._watch_delays(_now())
        self.open_memory = sum(map(_cost, self.opens.values())) + self.delays.memory
        if self.delays.items or self.paused:
            self._set_limits()
        if self.opens:
            self.abort(*self.opens, orphaned=True)
            self.counters.canceled_transactions = 0

    # -- memory

    def count_memory(self):
        """Update the server's count of memory and the allowance of this queue, which then stays as
        it is, for a turn as a rule."""
        budget = self.host.budget
        used = self.memory + self.open_memory
        budget.memory += used - self._counted
        self._counted = used
        self._allowance = self.config.max_memory_size
        left = used + budget.most_memory - budget.memory
        if left < self._allowance:
            self._allowance = min(self._allowance, max(left, MEMORY_FLOOR))

    def check_memory(self, size):
        """Raise OSError if the server has no memory left for an item of `size` bytes, and there is
        no journal to leave it in."""
        if not self.journal:
            self.count_memory()
            cost = self.memory + self.open_memory + size + ITEM_COST
            if self._allowance < cost and self._allowance < self.config.max_memory_size:
                raise OSError(errno.ENOMEM, "out of memory", self.name)

    def _fall_behind(self, cost):
        """Leave items in the journal from here on, if there is no memory for an item of that cost.
        Raises OSError if there is no journal and the server has no memory left."""
        self.check_memory(cost - ITEM_COST)
        self.count_memory()
        if self.journal and self.upkeep.renewing is None and (
                self.memory + self.open_memory + cost > self._allowance) and (
                self.items or self._allowance < self.config.max_memory_size):
            history, current = self.history, self.journal.current
            # Those which are still to be written there are in memory: the reader skips them.
            unwritten = history.unsafe[history.written - history.safe:] + history.ops
            pending = sum(op[0] in _APPENDED for op in unwritten)
            self._behind = ReadBehind(self.journal, current, current.size, pending)

    @property
    def _unread(self):
        """How many items are only on disk."""
        return self.count - len(self.items) - (len(self._behind.fresh) if self._behind else 0)

    def _refill(self):
        """Read more of the items that are not in memory. Return whether there are any in
        memory then. Raises OSError."""
        while self._unread > 0:
            file = self._behind.file
            try:
                found = self._read_more()
            except Damage:
                self._mend(self._behind.file)
            except FileNotFoundError as error:
                self._mend_missing(error)
            else:
                if self._behind.file is not file or not found:
                    self._check_count(file, found)
                if found:
                    break
        self._catch_up()
        return bool(self.items)

    def _read_more(self):
        """Read some of the items that are not in memory, and return how many. Raises OSError
        and Damage."""
        self.count_memory()
        # A quarter for the items, another for their data; the first half is still there.
        room = self._allowance // 4
        try:
            items = self._behind.read(min(self._unread, max(1, room // ITEM_COST)),
                                      max(4096, min(_STEP_SIZE, room)))
        except (OSError, MemoryError) as error:
            error = _as_os_error(error, self.journal.path)
            self.host.unreadable(self, error)
            raise error from None
        self.items.extend(items)
        self.memory += sum(map(_cost, items))
        return len(items)

    def _catch_up(self):
        """End being behind if all waiting items are in memory."""
        if not self._behind or self._unread:
            return
        # Nobody could tell how large the items were that have been lost to damage.
        fresh, self._behind = self._behind.fresh, None
        self.bytes = sum(map(_size, itertools.chain(self.items, fresh)))
        self.items.extend(fresh)
        self.memory += sum(map(_cost, fresh))

    def _size_changed(self, file):
        """Mend a file of the wrong size. Return the error if that fails; or ESTALE, so that
        everything is written anew, if all items are in memory."""
        if not self._behind:
            return OSError(errno.ESTALE, "changed by another process", file.path)
        try:
            self._mend(file)
        except (OSError, MemoryError) as error:
            return error
        return None

    def _mend(self, file):
        """Repair a file while the queue is behind. Raises OSError."""
        behind, writing = self._behind, self.history.writing
        if self.upkeep.renewing is not None or (
                writing and file in [one for one, *_ in writing.shares]):
            raise OSError(errno.EAGAIN, "damaged, and repaired in a moment", file.path)
        self.journal.cut()                   # what was refused must not be found again
        start, ends = (behind.offset, behind.ends) if file is behind.file else (0, None)
        for item in self._in_memory():
            if item.place and item.place.file is file and item.place.offset >= start:
                self.data_of(item)           # its offset will change
                item.place = None
        size, old_ends = file.size, file.ends
        cuts, there = self.journal.repair(file, start, ends)
        if not cuts and file.size == size:
            raise OSError(errno.EIO, "cannot be read, though nothing is damaged", file.path)
        lost = self._count_lost(file, there)
        self._lose(file, lost)
        self.journal.correct(file, size, old_ends, lost)

    def _count_lost(self, file, there):
        """Return how many unread items a file has lost by a repair. there: how many it has now,
        without those in front of what the repair has looked at."""
        behind, files = self._behind, self.journal.files
        if file in behind.older or file is files[0] and behind.file in behind.older:
            return 0                         # counted together, corrected at the end of files[0]
        if file is not behind.file and behind.file in files[files.index(file):]:
            return 0                         # all of it has been read
        if file is not behind.file:
            return file.waiting - there
        behind.skip = min(behind.skip, there)          # the first ones have been read
        return self._unread_of(file) - (there - behind.skip)

    def _mend_missing(self, error):
        """Go on without a file to be read behind that has disappeared. Raises OSError."""
        file = self._behind.file
        lost = self._unread_of(file)
        log.error("%s: %s; %d items are lost", file.path, error.strerror,
                  file.waiting if file in self._behind.older else lost)
        self.journal.replace_missing(file, max(0, file.waiting - lost))
        if self._behind.offset:
            self._behind.offset = file.size
        self._lose(file, lost)

    def _check_count(self, file, found):
        """Correct the counts at the end of a file, if it had more or fewer items than it should
        have had, since another process has changed it. found: how many were read after that end,
        from the file that is being read now; 0 if there are no more."""
        files = self.journal.files
        new = self._behind.file
        if found and (new is files[0] or new not in files):
            return                           # counted at the end of files[0], or right: passed
        if file in self._behind.older:
            file = files[0]
        # What was found, and what is unread now, should be what waits in `new` and behind it.
        after = files[files.index(new):] if found else []
        lost = self._unread + found - sum(other.waiting for other in after)
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
        """Return how many of the unread items should be in this file, not in those after it; 0
        of one that is not counted for itself."""
        if file in self._behind.older:
            return 0
        files = self.journal.files
        after = files[files.index(file) + 1:] if file in files else files
        return self._unread - sum(other.waiting for other in after)

    def _lose(self, file, count):
        """Count items that are lost from a file. How large they were is not known for now."""
        self.bytes -= self.bytes * count // (self.count or 1)
        self.count -= count
        file.waiting -= count

    def _is_loading(self, head):
        """Read the data of the head item, a stub. Return True if the worker is still reading it.
        Raises OSError."""
        loading, self._loading = self._loading, None
        if isinstance(loading, tuple) and loading[0] is head:
            _raise(_bare(loading[1]))
        if head.place.size < _LARGE or not self.host.work:
            self.data_of(head)
            return False
        if loading is not head:
            loaded = head.stub()
            self.host.work(self.journal.load_call(loaded),
                           functools.partial(self._loaded, head, loaded))
        self._loading = head
        return True

    def _loaded(self, head, loaded, error):
        if self._loading is head:
            self._loading = (head, error) if error else None
            if not error and self.items and self.items[0] is head and head.data is None:
                head.data = loaded.data
                self.memory += len(head.data)
            self.host.later(0, self.recover)

    def data_of(self, item):
        """Return the data of an item in memory, read again if need be. Raises OSError."""
        if item.data is None:
            try:
                self.journal.load_call(item)()
            except MemoryError as error:
                raise _as_os_error(error, self.journal.path) from None
            if self.opens.get(item.xid) is item:
                self.open_memory += len(item.data)
            elif item.xid in self.delays.items and self.delays.items[item.xid].item is item:
                self.open_memory += len(item.data)
                self.delays.memory += len(item.data)
            else:
                self.memory += len(item.data)
        return item.data

    def _lose_head(self):
        """Drop the head item, a stub whose data is damaged. Raises OSError."""
        place = self.items[0].place
        if place.file.path:                  # else a pack has dropped it
            with open(place.file.path, "rb") as source:
                kept = self.journal.keep(place.file, source, place.offset - place.head,
                                         place.offset + place.size)
            log.warning("%s: the item of %d bytes at byte %d has the wrong check sum; it is "
                        "dropped and kept in %s", place.file.path, place.size, place.offset, kept)
        self._log(REMOVE, self._take())

    # -- single steps

    def _pop(self, load=True):
        """Take the head item, of which there is one in memory. Raises OSError."""
        if self._behind and self.memory <= self._allowance // 2:
            self._refill()
        if load:
            self.data_of(self.items[0])
        return self._take()

    def _take(self):
        item = self.items.popleft()
        self.count -= 1
        if item.data is None:
            self.bytes -= item.place.size
            self.memory -= ITEM_COST
        else:
            size = len(item.data)
            self.bytes -= size
            self.memory -= size + ITEM_COST
        return item

    def _push(self, item):
        self.items.appendleft(item)
        self.count += 1
        self.bytes += _size(item)
        self.memory += _cost(item)

    def _is_expired(self, item, now):
        if item.expiry and item.expiry <= now:
            return True
        max_age = self.config.max_age
        return bool(max_age) and item.add_time + max_age <= now

    def _next_xid(self):
        xid = self.xid + 1
        while xid in self.opens or xid in self.delays.items or xid >= _ASIDE:
            xid = xid + 1 if xid < _ASIDE - 1 else 1
        return xid

    def _open(self, item):
        self.xid = item.xid = xid = self._next_xid()
        kept = item
        if item.place and self.memory + self.open_memory > self._allowance:
            kept = item.stub()               # it can be read again if it comes back
        self.opens[xid] = kept
        self.open_memory += _cost(kept)
        if self.config.open_transaction_timeout:
            self.limit(xid, self.config.open_transaction_timeout)
        self._log(OPEN, kept, xid)

    def _end_read(self, xid):
        """Take an item out of `opens`, and return it; None if there is none of that number."""
        item = self.opens.pop(xid, None)
        if item is not None:
            self.open_memory -= _cost(item)
            if self.delays.dying:
                self.delays.dying.discard(xid)
        return item

    def limit(self, xid, timeout):
        """Have an open read aborted after `timeout` milliseconds (None: never), whatever the
        settings say."""
        self._stop_alarm(xid)
        if timeout and self.host.later:
            cancel = self.host.later(timeout, functools.partial(self._time_out, xid, timeout // 10))
            self._alarms[xid] = cancel, timeout

    def _stop_alarm(self, xid):
        cancel, _ = self._alarms.pop(xid, (None, 0))
        if cancel:
            cancel()

    def _silence_alarm(self, xid):
        """Stop the alarm of an open read that has ended; keep its timeout until that is safe."""
        self._alarms[xid][0]()
        self.history.when_safe(lambda error: error or self._alarms.pop(xid, None))

    def _time_out(self, xid, delay):
        # Reads that time out soon after go back together with it, so that they keep their order.
        self._overdue.append(xid)
        if len(self._overdue) == 1:
            self.host.later(delay, self._abort_overdue)

    def _abort_overdue(self):
        overdue, self._overdue = self._overdue, []
        self.host.timed_out(self, overdue)
        self.abort(*overdue, orphaned=True)

    def _log(self, opcode, item, xid=0):
        ops = self.history.ops
        is_first = not ops
        ops.append((opcode, item, xid))
        if is_first:
            self.host.changed(self)

    def _trace(self, ops):
        for opcode, item, xid in ops:
            trace.info("queue %s: %s%s", self.name, OPCODE_NAMES[opcode],
                       " %d items" % (xid or len(item)) if opcode in (FLUSH, DROP)
                       else " " + PAUSES[xid] if opcode == PAUSE
                       else " xid=%d" % xid if xid else " %d bytes" % len(item.data or b""))

    def _undo(self, ops):
        for opcode, item, xid in reversed(ops):
            if opcode == ADDX:
                self._undo_append(item)
                self.counters.total_items -= 1
                self.counters.put_bytes -= len(item.data)
            elif opcode == REMOVE:
                self._push(item)
            elif opcode == OPEN:
                self._push(self._end_read(xid))
                self._stop_alarm(xid)
            elif opcode in (UNREMOVE, PUT_BACK, CONFIRM, TO_TAIL, DELAY):
                if opcode in (UNREMOVE, PUT_BACK):
                    self._take()             # it may be a copy, see _open()
                elif opcode == TO_TAIL:
                    self._undo_append(item)
                elif opcode == DELAY:
                    self._unhold(item)
                    item = item.item
                if opcode not in (CONFIRM, PUT_BACK):
                    item.deliveries = max(0, item.deliveries - 1)
                item.xid = xid               # it may have been opened again since
                self.opens[xid] = item
                self.open_memory += _cost(item)
                self.touch(xid)
            elif opcode in (DUE_HEAD, DUE_TAIL):
                if opcode == DUE_HEAD:
                    self._take()
                else:
                    self._undo_append(item.item)
                self._hold(item, _now())
            elif opcode == ADD_DELAYED:
                self._unhold(item)
                self.counters.total_items -= 1
                self.counters.put_bytes -= _size(item.item)
            elif opcode == DROP:
                for delayed in item.values():
                    self._hold(delayed, _now())
            elif opcode == PAUSE:
                self.paused = item
            else:                            # FLUSH
                self.items, self._behind, self.count, self.bytes, self.memory = item
        self._catch_up()
        self.opens = dict(sorted(self.opens.items()))      # the oldest first, as before
        self._set_limits()

    def _undo_append(self, item):
        if self._behind and self._behind.fresh:
            self._behind.fresh.pop()
        elif self.count == len(self.items):
            self.memory -= _cost(self.items.pop())
        self.count -= 1
        self.bytes -= len(item.data)


def _as_bytes(data):
    """Return bytes, or what can be taken for them, as bytes. Raises TypeError."""
    try:
        return bytes(memoryview(data))
    except TypeError:
        raise TypeError("data must be bytes, not %s" % type(data).__name__) from None


def _as_os_error(error, path):
    """Return an OSError as it is; for a MemoryError, the OSError that stands for it."""
    if isinstance(error, MemoryError):
        return OSError(errno.ENOMEM, "out of memory", path)
    return error


def _check_numbers(expiry, flags, delay=0):
    """Raise ValueError if one of these does not fit into a record."""
    if not (abs(expiry) < 1 << 63 and 0 <= flags < 1 << 32 and 0 <= delay < 1 << 62):
        raise ValueError("expiry %d, flags %d or delay %d cannot be kept" % (expiry, flags, delay))


def _free(items, cost):
    """A task: empty a container, a little in each step. cost: of all its items, see _FREE_COST."""
    pop = items.popitem if isinstance(items, dict) else items.pop
    step = max(1, 4 * _STEP_SIZE * len(items) // cost)
    while items:
        for _ in range(min(step, len(items))):
            pop()
        yield


def _later(xid, other):
    """Return the one of two numbers of open reads that was used later. They start over at 1; 0 is
    older than all others."""
    if not xid or other and (other - xid) % _ASIDE < _ASIDE // 2:
        return other
    return xid


def _steps(items):
    """Yield lists of successive items: SWEEP_STEP items or some megabytes at most, or one larger
    item."""
    some, size = [], 0
    for item in items:
        if some and (size + _size(item) > 4 * _STEP_SIZE or len(some) == SWEEP_STEP):
            yield some
            some, size = [], 0
        some.append(item)
        size += _size(item)
    yield some


def _size(item):
    """Return the size of an item's data in bytes."""
    return item.place.size if item.data is None else len(item.data)


def _cost(item):
    """Return what an item takes of the memory."""
    return ITEM_COST + (0 if item.data is None else len(item.data))


class Replay:
    """One reading of the journal of a queue, which does what its records say.

    file: the file that is read. Its `waiting` counts the items that it adds.
    """

    def __init__(self, queue):
        self.queue = queue
        self.file = None
        self._older = None              # the file before it
        self._at_head = queue.journal.files[0]   # the last file that does something to the head
        self._pack = None               # the last file that is a pack
        self._is_own = False            # whether a CHECK was read: Kestrel writes none
        self._lost_tail = ()            # what is missing at the end of `_older`, see LostTail
        self._closed = 0, 0             # where the last CHECK ends, how many were added before it
        self._latest = 0                # xid of what goes to the tail, or is delayed
        self._ignored = 0               # operations on items that are not there
        self._owed = 0                  # see _do()
        self._look = 0                  # the offset at which to look at the clock
        self._told = time.monotonic()   # when the log was told how far the replay has got

    def run(self):
        """Do what the journal says. Raises Damage, and LostTail."""
        queue, journal = self.queue, self.queue.journal
        for self._older, self.file in zip([None, *journal.files], journal.files):
            self._read()
        if self._ignored:
            log.warning("%s: %d operations on items that are not there, ignored",
                        journal.path, self._ignored)
        journal.account(self._at_head, queue.count)
        # An OPEN may be written in front of what is done to the tail: never with the same xid.
        queue.xid = _later(queue.xid, self._latest)

    def _read(self):
        """Do what one file says."""
        queue, file, older = self.queue, self.file, self._older
        file.begins = _first_ends(queue.count, 0 if older is None else (
            older.begins if older is self._pack else _added(older.ends)))      # see _PACK
        file.checked, file.ends, file.waiting = False, 0, 0
        self._closed = 0, 0
        self._look = 0
        for opcode, xid, item, end in queue.journal.read(file, self._take_run):
            if end > self._look:
                self._tell(end)
            if opcode == REMOVE and queue.count:       # as a rule
                self._at_head = file
                self._pop()
            elif opcode == CHECK:
                self._check(end, *xid)
            elif item is not None and opcode != ADD_DELAYED:
                self._append(opcode, xid, item, end)
            else:
                self._do(opcode, xid, item)

    def _take_run(self, data, pos, base, span, ends):
        """Append the items that read_run() reads, as far as there is memory. Return what
        read_records() asks for."""
        queue = self.queue
        items = queue.items if queue._behind is None else None
        delayed = []
        end, count, size, last = read_run(
            data, pos, span, ends, items, queue._allowance - queue.memory, delayed)
        if items is not None:
            queue.memory += size + count * ITEM_COST
        queue.count += count
        queue.bytes += size
        if last:
            self._close(base + last[0], self.file.waiting + last[1], last[2])
        self.file.waiting += count
        if delayed:
            fresh = {each.xid: each for each in delayed}
            queue.delays.items.update(fresh)
            # The highest, or the last if the numbers have started over among these.
            self._latest = _later(_later(self._latest, max(fresh)), delayed[-1].xid)
        if base + end > self._look:
            self._tell(base + end)
        return end, last and last[0], count

    def _tell(self, offset):
        """Tell the log how far the replay has got, once in a while."""
        self._look = offset + _STEP_SIZE // 4
        if time.monotonic() > self._told + _PROGRESS_SECONDS:
            self._told = time.monotonic()
            queue, files = self.queue, self.queue.journal.files
            done = offset + sum(file.size for file in files[:files.index(self.file)])
            log.info("loading %s: %d %%, %d items", queue.name, 100 * done // queue.journal.size,
                     queue.count)

    def _check(self, end, covers, _, ends):
        """Note what a CHECK says."""
        file, older = self.file, self._older
        if not file.checked:             # the first mark of a file, or a later one, which tells
            self._lost_tail = ()         # nothing of the end of the file before
        if end == _CHECK.size:           # it is the first record, see Journal.pass_all()
            file.begins = ends
            if ends:
                self._at_head = file
            # Of a file that ends without check sums nobody can know whether its end is there.
            if older is not None and (older.checked or not older.size):
                self._lost_tail = _lost_tail(
                    self.queue.count, ends, None if older is self._pack else _added(older.ends))
        file.checked = covers > 0 or not file.checked
        self._close(end, file.waiting, ends)

    def _close(self, end, count, ends):
        if self._at_head is self.file and any(self._lost_tail):
            raise LostTail(self._older, *self._lost_tail)
        self._closed = end, count
        self._is_own = True
        self.file.ends = ends

    def _append(self, opcode, xid, item, end):
        """Append the item of a record that ends there."""
        queue, file = self.queue, self.file
        if opcode in (CONTINUE, CONTINUEF):
            self._latest = _later(self._latest, xid)
            self._ignored += self._end(xid) is None
        cost = len(item.data) + ITEM_COST
        if queue._behind is None and queue.memory + cost > queue._allowance and (
                queue.items or queue._allowance < queue.config.max_memory_size):
            begin = end - len(item.data) - _HEADS[opcode].size
            offset, before = self._closed if file.checked else (begin, file.waiting)
            queue._behind = ReadBehind(queue.journal, file, offset, file.waiting - before)
        file.waiting += 1
        if queue._behind is None:
            queue.items.append(item)
            queue.memory += cost
        queue.count += 1
        queue.bytes += len(item.data)

    def _end(self, xid):
        """Remove an open read or a Delayed, and return it; None if there is none."""
        return self.queue.opens.pop(xid, None) or self.queue.delays.items.pop(xid, None)

    def _pop(self):
        """Take the head item, whose data may have to be read again."""
        queue = self.queue
        if not queue.items:
            try:
                queue._read_more()
            except Damage as damage:
                damage.file = queue._behind.file
                raise
        return queue._take()

    def _do(self, opcode, xid, item):
        """Do what a record says that neither adds an item nor is a REMOVE of one."""
        queue = self.queue
        if opcode == ADD_DELAYED:
            number, due = xid
            queue.delays.items[number] = Delayed(due, number, item, False)
            self._latest = _later(self._latest, number)
        elif opcode == PAUSE:
            queue.paused = xid
        elif opcode == SAVE_XID:
            queue.xid, self._pack = xid, self.file
        elif opcode == OPEN and xid >= _ASIDE and not queue.count:
            self._owed += 1             # it took an item that a later UNREMOVE puts back
        elif opcode == UNREMOVE and xid == _LOST and self._owed:
            self._owed -= 1
        else:
            if opcode in _AT_HEAD:
                self._at_head = self.file
            self._ignored += not self._redo(opcode, xid)

    def _redo(self, opcode, xid):
        """Do what a record says about the head or an open read; return False if there is no such
        item."""
        queue, opens, delayed = self.queue, self.queue.opens, self.queue.delays.items
        if opcode in (OPEN, OPEN_NEXT) and queue.count:
            item = self._pop()
            if opcode == OPEN_NEXT:
                xid = item.xid or queue._next_xid()
            if xid < _ASIDE:
                queue.xid = xid
            else:                       # two files may have been repaired
                xid = _ASIDE + len(opens)
                while xid in opens:
                    xid += 1
            opens[xid] = item
        elif opcode == CONFIRM:
            return self._end(xid) is not None
        elif opcode in (UNREMOVE, PUT_BACK) and xid in opens:
            item = opens.pop(xid)
            item.deliveries += opcode == UNREMOVE
            queue._push(item)
        elif opcode == UNREMOVE and xid in delayed:
            queue._push(delayed.pop(xid).item)
        elif opcode in (UNREMOVE, PUT_BACK) and (self._is_own or xid == _LOST):
            # The item that was put back is lost: this server never names one that was not there.
            # If it was taken again, that must not cost another item.
            queue._push(Item(LOST.data, LOST.add_time, LOST.expiry))
            return xid == _LOST
        elif opcode == DELAY and xid[0] in opens:
            item = opens.pop(xid[0])
            item.deliveries += 1
            delayed[xid[0]] = Delayed(xid[1], xid[0], item, True)
        else:
            return False
        return True


class Upkeep:
    """Keeps the journal of a queue small, and writes it anew after a failed fsync: one task
    at a time.

    error: what ended the last task; it is tried again after RETRY_MS. renewing: None unless
    everything has to be written anew before anything else is written; then all that there was when
    this was found, a Kept; or () if the queue was behind, so that its files have to be copied.
    failure: None, or the arguments of sync_failed(), to be called after the write in hand.
    """

    def __init__(self, queue):
        self._queue = weakref.ref(queue)     # a strong one would make a cycle
        self.task = None
        self.error = None
        self.renewing = None
        self.failure = None
        self._rewrite_above = 0              # smaller journals are not rewritten for now

    @property
    def queue(self):
        """The queue whose journal this keeps."""
        return self._queue()

    def can_write(self):
        """Return whether write() may go on. Operations wait while everything is written anew; if
        that has failed, write() goes on, to refuse them."""
        if self.error and not self.queue.host.later:
            self.check()                     # without a server it is tried now
        return self.renewing is None or self.error is not None

    def check(self):
        """Begin the task that is due, unless one is under way."""
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
        if self.renewing is not None:
            return self._renew()
        if journal.passings:
            # What was in them may have gone on to newer files, which must not be lost alone.
            passing = journal.next_passing(
                queue.history.durable if queue.is_synced() else queue.history.safe)
            if passing:
                return journal.pack(passing, queue.state())
        if queue.count or queue.opens or queue.delays.items:
            if journal.current.size > config.max_memory_size:
                return self._rotate()
            if journal.size > max(config.max_journal_size, self._rewrite_above) and not (
                    queue._behind or journal.passings):
                return self._compact()
        elif (journal.current.size and journal.size >= config.default_journal_size
              and not journal.passings):
            return self.rewrite()
        return None

    def _attend(self, task):
        """A task: run the one given, and note its end."""
        try:
            yield from task
        except Exception as error:
            if not isinstance(error, (OSError, MemoryError)):
                log.exception("unexpected, while a journal was rewritten")
            self._failed(error if isinstance(error, OSError) else OSError(
                errno.ENOMEM, "out of memory or unexpected, see the log"))
        else:
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
        while self.renewing is None and (queue.history.ops or queue.history.writing):
            yield None                       # until memory is what is in the files
        queue.journal.add_current(os.O_EXCL)

    def rewrite(self):
        """A task: write all that there is anew, in place of the files there are now."""
        queue = self.queue
        yield from self._open_fresh()
        history = queue.history
        if queue._behind is None:
            queue.journal.pass_all(
                history.written, history.safe >= history.written, self._all())

    def _all(self):
        return kept_now(self.queue.held(), list(self.queue.items))

    def _compact(self):
        """A task: rewrite a journal that has grown too large, once for each doubling, and at most
        once in min_journal_compact_delay."""
        queue = self.queue
        yield from self.rewrite()
        queue.counters.journal_rewrites += 1
        held = sum(map(_size, queue.opens.values())) + queue.delays.bytes
        doubled = 2 * (queue.bytes + held + ITEM_COST * (queue.count + len(queue.opens)))
        self._rewrite_above = doubled
        if queue.host.later:
            self._rewrite_above = UNLIMITED
            queue.host.later(queue.config.min_journal_compact_delay, functools.partial(
                setattr, self, "_rewrite_above", doubled))

    def renew(self):
        """Have everything written anew before anything else is written: the files may not be on
        the disk, or differ from what is in memory. There must be no unwritten operations."""
        self.stop()
        queue = self.queue
        self.renewing = () if queue._behind else self._all()
        queue.counters.journal_rewrites += 1
        self.check()

    def _renew(self):
        queue = self.queue
        journal = queue.journal
        if self.renewing:
            current = journal.current        # perhaps the fresh one of an earlier try
            if current.number is not None or current.size or not current.is_there():
                yield from self._open_fresh()
            journal.passings.clear()         # of that try
            journal.pass_all(queue.history.written, True, self.renewing)
            yield from journal.pack(journal.passings[-1], queue.state())
            journal.torn.clear()
            journal.unsynced.clear()
        else:
            yield from journal.copy()
        queue.history.durable = queue.history.written
        queue.history.settle()
        self.renewing = None
        if queue.history.ops:
            queue.host.changed(queue)
        queue.recover()

    def finish(self):
        """Do at once what has to be done before the journal is closed. Raises OSError."""
        if self.renewing is not None:
            self.stop()
            run_task(self._renew())

    def stop(self):
        """Give up the task."""
        task, self.task = self.task, None
        self.error = None
        if task and not task.gi_running:
            task.close()


# == 6. Broker ============================================================================
#
# All queues by name: which queues a name leads to (fanout children, aliases), where expired
# items go, the status, the counters and the table of statistics. The sessions of all protocols
# ask the broker for what their clients want. It knows queues and the configuration; no sockets,
# no protocols.

# Where the items put under a name go. queues: first the `targets`, which decide the answer, then
# the fanout children, which get what they can take.
Route = collections.namedtuple("Route", "targets queues")

# An item that was opened as `xid` at `now`, to be moved to another queue: because a client asked
# for it, or it has expired, or came back too often. expiry: the one it gets there.
Leaving = collections.namedtuple("Leaving", "item xid expiry now")

# How many items are moved from one queue to another at a time, and how many bytes; how long a move
# waits for a large item that is being read, in milliseconds.
_MOVE_STEP = 200
_MOVE_SIZE = 4 << 20
_LOADING_MS = 5

# How many queues are reported on, or configured anew, in one step of a task: about a millisecond.
QUEUES_STEP = 25

# How often rates are taken, in seconds, and how many samples of a queue are kept.
SAMPLE_SECONDS = 5
SAMPLES = 120


# How many fresh values there may be before they are counted.
_MOST_FRESH = 1000


class Histogram:
    """Counts whole numbers by size: bucket n counts those of n bits. New values are appended to
    `fresh`, and counted together: that takes a third of the time."""

    def __init__(self):
        self.fresh = []
        self.buckets = [0] * 128             # no time is longer
        self.total = self.longest = self.recent = 0     # recent: since take_recent()

    def count(self):
        """Count the fresh values. Return how many values there were in all."""
        if self.fresh:
            for bits, count in collections.Counter(map(int.bit_length, self.fresh)).items():
                self.buckets[bits] += count
            self.total += sum(self.fresh)
            self.recent = max(self.recent, *self.fresh)
            self.longest = max(self.longest, self.recent)
            self.fresh.clear()
        return sum(self.buckets)

    def take_recent(self):
        """Return the longest since the last call."""
        self.count()
        recent, self.recent = self.recent, 0
        return recent

    def figures(self):
        """Return the values of Kestrel's metrics, by name. Percentiles are the upper bounds of
        buckets, so they are right within a factor of two."""
        count = self.count()
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


# One line of the statistics. name: in `stats`. kind, ostrich, metric: "gauge" or "counter", the
# name in /stats.json (Kestrel's own) and the name in /metrics; None where it is not shown there.
# get: a function of the queue, or of the broker, and the time. help: what it is.
Stat = collections.namedtuple("Stat", "name kind ostrich metric get help")


def _read_stats(lines, **functions):
    """Return the Stats that lines of text describe, their fields in order. "=" stands for the name.
    get is an attribute ("counters." is the counter of that name), or one of the functions."""
    def stat(name, kind, ostrich, metric, get, what):
        if ostrich == "=":
            ostrich = name
        attribute = operator.attrgetter(get + name if get.endswith(".") else get)
        return Stat(name, kind, ostrich, metric,
                    functions.get(get) or (lambda one, now: attribute(one)), what)

    return [stat(*(field.strip() or None for field in line.split("|")))
            for line in lines.strip().split("\n")]


# No new name may end like one of Kestrel's: clients find queues by the ends of names.
QUEUE_STATS = _read_stats("""
items | gauge | = | items | count | Waiting items.
bytes | gauge | = | bytes | bytes | Data of the waiting items, in bytes.
total_items | counter | put_items | put_items_total | counters. | Items put.
logsize | gauge | journal_size | journal_bytes | logsize | Size of the journal files.
expired_items | counter | = | expired_items_total | counters. | Items that expired.
mem_items | gauge | = | memory_items | mem_items | Items in memory.
mem_bytes | gauge | = | memory_bytes | mem_bytes | Data of the items in memory, in bytes.
age | gauge | age_msec | age_seconds | age | How long the item read last had waited.
discarded | counter | = | discarded_items_total | counters. | Items dropped for newer ones.
waiters | gauge | = | waiters | waiting | Reads that wait for an item.
open_transactions | gauge | = | open_reads | open | Open reads.
transactions | counter | = | opened_reads_total | counters. | Reads opened.
canceled_transactions | counter | = | aborted_reads_total | counters. | Reads whose item went back.
total_flushes | counter | flushes | flushes_total | counters. | Flushes.
journal_rewrites | counter | = | journal_rewrites_total | counters. | Rewrites of the journal.
journal_rotations | counter | = | journal_rotations_total | counters. | Full journal files.
create_time | gauge | = | created_timestamp_seconds | counters. | When it was created or loaded.
head_wait | gauge | head_age_msec | head_age_seconds | head_wait | Wait of the item at the head.
bytes_put | counter | put_bytes | put_bytes_total | counters.put_bytes | Data of the items put.
bytes_taken | counter | get_bytes | get_bytes_total | counters.get_bytes | Data of the items taken.
get_hits | counter | get_items_hit | get_items_total | counters. | Items taken.
get_misses | counter | get_items_miss | get_misses_total | counters. | Gets that found no item.
put_rate | | | | put_rate | Items put a second.
get_rate | | | | get_rate | Items taken a second.
fsync_usec | gauge | = | fsync_seconds | counters. | How long the last fsync took.
delayed | gauge | = | delayed_items | delayed | Items that are not available yet.
paused | gauge | = | paused | paused | 1 while puts are paused, 2 while gets are, 3 while both are.
dead_letters | counter | = | dead_letters_total | counters. | Moved to the dead_letter_queue.
""", logsize=lambda q, now: q.journal.size if q.journal else 0,
    mem_items=lambda q, now: len(q.items),
    mem_bytes=lambda q, now: q.memory - ITEM_COST * len(q.items),
    age=lambda q, now: q.counters.age if q.count else 0,
    waiting=lambda q, now: len(q.waiters),
    open=lambda q, now: len(q.opens),
    delayed=lambda q, now: len(q.delays.items),
    head_wait=lambda q, now: (
        max(0, now - q.items[0].add_time) if q.items and not is_lost(q.items[0]) else 0),
    put_rate=lambda q, now: round(q.counters.put_rate, 1),
    get_rate=lambda q, now: round(q.counters.get_rate, 1))

SERVER_STATS = _read_stats("""
uptime | gauge | = | uptime_seconds | uptime | Seconds since the start.
time | | | | time | Seconds of the epoch.
version | | | | version | The version.
curr_items | gauge | items | items | items | Waiting items, in all queues.
total_items | counter | = | items_put_total | put_items | Items put, in all queues.
bytes | gauge | = | bytes | bytes | Data of the waiting items, in bytes.
reserved_memory_ratio | gauge | = | reserved_memory_ratio | reserved | Memory that queues may take.
curr_connections | gauge | connections | connections | clients | Open connections.
total_connections | counter | = | connections_total | stats. | Connections ever.
cmd_get | counter | = | gets_total | gets | Gets.
cmd_set | counter | = | sets_total | stats. | Sets.
cmd_peek | counter | = | peeks_total | stats. | Peeks.
get_hits | counter | = | get_hits_total | hits | Gets that found an item.
get_misses | counter | = | get_misses_total | stats. | Gets that found none.
bytes_read | counter | = | received_bytes_total | stats. | Bytes from clients.
bytes_written | counter | = | sent_bytes_total | stats. | Bytes to clients.
queue_creates | counter | = | queue_creates_total | stats. | Queues created.
queue_deletes | counter | = | queue_deletes_total | stats. | Queues deleted.
queue_expires | counter | = | queue_expires_total | stats. | Queues deleted by max_queue_age.
put_rate | | | | put_rate | Items put a second.
get_rate | | | | get_rate | Items taken a second.
max_turn_usec | | | | turn | The longest turn since the last stats.
max_fsync_usec | | | | fsync | The longest fsync since the last stats.
trouble | | | | trouble | Why puts or gets are refused, or none.
""", uptime=lambda b, now: int(b.uptime()),
    time=lambda b, now: now // 1000,
    version=lambda b, now: __version__,
    items=lambda b, now: b.totals().items,
    put_items=lambda b, now: b.totals().put_items,
    bytes=lambda b, now: b.totals().bytes,
    clients=lambda b, now: len(b.clients),
    hits=lambda b, now: b.latency.count(),
    gets=lambda b, now: b.latency.count() + b.stats.get_misses,
    reserved=lambda b, now: "%.3f" % (
        b.totals().reserved / (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))),
    put_rate=lambda b, now: round(b.stats.put_rate, 1),
    get_rate=lambda b, now: round(b.stats.get_rate, 1),
    turn=lambda b, now: b.metrics["turn_usec"].take_recent(),
    fsync=lambda b, now: b.metrics["fsync_usec"].take_recent(),
    trouble=lambda b, now: b.why_not_readable() or b.why_not_writable() or "none")

# The broker's metrics: name -> the name in /metrics, and what it is.
METRICS = {
    "turn_usec": ("turn_seconds", "Turns of the loop."),
    "fsync_usec": ("fsync_seconds", "Fsyncs of journals."),
    "delivery_latency_msec": ("delivery_latency_seconds", "How long items had waited."),
}


# The last failure of a journal. what: written, fsynced or read is what it cannot be. when: in
# seconds, as Broker.uptime().
Failure = collections.namedtuple("Failure", "what error when")

# Sums over all queues: waiting items, their bytes, items put, memory that they may take.
Totals = collections.namedtuple("Totals", "items bytes put_items reserved")


class Account:
    """What the broker knows of a queue: the share of its totals that it has counted for the queue,
    when the queue was made, and samples of its rates."""

    def __init__(self, born):
        self.born = born                     # in seconds, as Broker.uptime()
        self.counted = Totals(0, 0, 0, 0)
        self.sampled = (0, 0)                # items put, items taken at the last sample
        self.history = array.array("f")      # items, put rate, get rate; items, ...


class Moves:
    """Items on their way from one queue to another: expired items, dead letters, and what clients
    move. An item is open in its queue until it is safe in the other. A move is a generator, which
    yields what it waits for: a queue, whose operations so far have to be safe; a function that
    calls back, as Queue.when_lasting() does; or some milliseconds. It is sent the error, if any."""

    def __init__(self, broker):
        self._broker = broker
        self._buried = collections.Counter()      # setting -> bytes of items on their way
        self._moving = {}                 # (queue, setting) -> [the Leaving that are on their way]
        self.stuck = set()                # queues whose expired items cannot be moved for now

    def bury(self, queue, item, now, setting):
        """Move an open item to the queue that a setting names, behind those that are on their way
        there already."""
        self._buried[setting] += _size(item)
        leaving = Leaving(item, item.xid, 0, now)
        if (queue, setting) in self._moving:
            self._moving[queue, setting].append(leaving)
        else:
            self._moving[queue, setting] = [leaving]
            self._advance(self._move(queue, setting))

    def is_burying_much(self, queue):
        """Return whether no more expired items of a queue should be moved for now: those on their
        way take much memory, or cannot be moved."""
        return self._buried["expire_to_queue"] > _MOVE_SIZE or queue in self.stuck

    def _advance(self, move, error=None):
        """Go on with a move until it has to wait again."""
        with contextlib.suppress(StopIteration):
            asks = move.send(error)
            while isinstance(asks, Queue) and asks.history.logged <= asks.history.safe:
                asks = move.send(None)
            if isinstance(asks, Queue):
                asks = asks.history.when_safe
            if callable(asks):
                asks(lambda error: self._broker.start(self._go_on(move, error)))
            elif self._broker.later:         # else there are no later turns: it ends here
                self._broker.later(asks, functools.partial(self._advance, move))

    def _go_on(self, move, error):
        """A task: go on with a move. It does not go on at once, while queues are being written and
        clients have not yet been told of the result: a failure of the move would be taken for it.
        """
        self._advance(move, error)
        yield

    def _move(self, source, setting):
        """Move open items, some at a time. They stay open until they are safe in all the queues
        they go to. What fails on the way is undone or tried again, and after a crash they are here,
        or there, or in both places."""
        moving = self._moving[source, setting]
        is_told = False
        try:
            yield source                     # more of them come in this turn
            while moving:
                batch, size = [], 0
                for leaving in moving[:_MOVE_STEP]:
                    if size < _MOVE_SIZE:
                        batch.append(leaving)
                        size += _size(leaving.item)
                yield source
                yield from self._wait_for_copy()
                still = self._still_open(source, batch)
                count, error = yield from self._put_as_set(source, still, setting)
                yield from self._confirm_moved(source, [leaving.xid for leaving in still[:count]])
                moving[:len(batch)] = left = still[count:]     # the others are there, or not open
                self._buried[setting] -= size - self._size_of(left)
                if error:
                    if not is_told:
                        log.error("queue %s: items cannot be moved (%s): %s", source.name, setting,
                                  _why(error) if isinstance(error, OSError) else error)
                    is_told = True
                    if setting == "expire_to_queue":
                        self.stuck.add(source)
                    yield RETRY_MS           # so that a failing disk does not make the loop spin
                    self.stuck.discard(source)
                    # Expired items go back, and the next read finds them expired. So does a damaged
                    # item: the next read drops it. Dead letters are tried again while they may go.
                    if setting == "expire_to_queue" or isinstance(error, WrongSum) or not getattr(
                            source.config, setting):
                        break
                elif self._broker.later:
                    yield 0                  # others come in between
        finally:
            del self._moving[source, setting]
            self._buried[setting] -= self._size_of(moving)
        xids = [leaving.xid for leaving in self._still_open(source, moving)]
        if setting == "expire_to_queue":
            source.counters.expired_items -= len(xids)         # they will be counted again
        source.abort(*xids, orphaned=True, counted=False)

    @staticmethod
    def _size_of(moving):
        return sum([_size(leaving.item) for leaving in moving])

    @staticmethod
    def _still_open(source, moving):
        """Return those whose OPEN has not been undone. They may have been opened again since, under
        another number."""
        return [leaving for leaving in moving if source.opens.get(leaving.xid) is leaving.item]

    def _put_as_set(self, source, moving, setting):
        """Put items where a setting says. Return how many are there, and the error that keeps the
        next one out of the first queue, if any."""
        if not moving:
            return 0, None
        broker, key = self._broker, os.fsencode(getattr(source.config, setting) or "")
        try:
            queues = (broker.routes.get(key) or broker.route(key, moving[-1].now)).queues
        except (OSError, ValueError) as failure:     # there is no such setting since a reload
            return 0, failure
        if not queues:                       # fanout_only, without children
            return len(moving), None
        count, error = yield from self._put_moved(source, moving, queues, setting)
        if count < len(moving) and not error:
            error = OSError(errno.EDQUOT, "it does not take it", queues[0].name)
        return count, error

    def _put_moved(self, source, moving, queues, setting=None):
        """Put items into the first of these queues, as many as it takes, and copies of these into
        the others. Return how many are in the first, and the error, if any. Copies are tried again
        until they are safe, unless a client asked for the move (setting is None) and can be told of
        the error. If a queue is deleted meanwhile, the items in it are not put again."""
        first, *others = queues
        if first.closed:
            return 0, OSError(errno.ESTALE, "it was deleted", first.name)
        must_fit = setting != "expire_to_queue" or first.paused & PAUSED_IN
        count, error = self._add_moved(source, first, moving, must_fit)
        failure = yield first.when_lasting       # no power failure may take them from both
        if failure:
            return 0, failure
        for queue in others:
            left = moving[:count] if queue is not source else []     # a child would have it again
            while left and not queue.closed:
                added, problem = self._add_moved(source, queue, left, False)
                failure = yield queue.when_lasting
                left = left if failure else left[added:]
                if failure or problem:
                    if setting is None:
                        error = failure or problem
                        break
                    yield RETRY_MS
        yield from self._wait_for_copy()         # else it might have them in none of the queues
        return count, error

    def _wait_for_copy(self):
        """Wait while a copy is being made: before items are put, so that they are in one place
        meanwhile, and again before they are confirmed, since a copy may have begun by then."""
        while is_being_copied(self._broker.spool):
            yield _LOADING_MS

    @staticmethod
    def _add_moved(source, queue, moving, must_fit):
        """Add items to a queue. If it is full, stop if they must fit, else drop the item. Return
        how many items are done with, and the error that it stopped at, if any."""
        for count, (item, _, expiry, now) in enumerate(moving):
            try:
                is_added = queue.add(source.data_of(item), item.flags, expiry, now)
            except OSError as failure:
                return count, failure
            if not is_added and must_fit:
                return count, None
            if not is_added:
                log.warning("queue %s is full: an item that moves there from %s is dropped",
                            queue.name, source.name)
        return len(moving), None

    @staticmethod
    def _confirm_moved(source, xids):
        """Confirm items that are safe elsewhere, again and again until that is safe too."""
        while any([source.confirm(xid, True) for xid in xids]):
            error = yield source
            if not error:
                break
            yield RETRY_MS
        source.delays.dying.difference_update(xids)

    def move(self, source, dest, most, now, done):
        """Move waiting items of one queue to another, at most `most`, the oldest first; then call
        done((how many, OSError or None)). The move ends early if the other queue is full."""
        self._advance(self._move_many(source, dest, most, now, done))

    def _move_many(self, source, dest, most, now, done):
        """Move items as _move() does, some at a time."""
        moved, error = 0, None
        queues = [dest, *self._broker.children.get(dest.name, ())]
        while moved < most and source.count and not (
                error or source.closed or dest.closed or self._broker.stopping):
            yield from self._wait_for_copy()
            batch, size = [], 0
            try:
                while len(batch) < min(_MOVE_STEP, most - moved) and size < _MOVE_SIZE:
                    item = source.remove(True, now, even_paused=True)
                    if item is None:
                        break
                    source.limit(item.xid, None)
                    batch.append(Leaving(item, item.xid, item.expiry, now))
                    size += len(item.data)
            except OSError as failure:
                error = failure
            if not batch:
                if not error and source.count and source in self.stuck:
                    error = OSError(errno.EBUSY, "its expired items cannot be moved", source.name)
                elif not error and source.count:
                    yield _LOADING_MS        # a run of expired items, or a large one is being read
                continue
            failure = yield source
            if failure:                      # they are at the head again
                error = failure
                break
            count, failure = yield from self._put_moved(source, batch, queues)
            error = failure or error
            xids = [leaving.xid for leaving in batch]
            source.abort(*xids[count:], orphaned=True, counted=False)
            self._advance(self._confirm_moved(source, xids[:count]))
            moved += count
            error = (yield source) or error
            if count < len(batch):           # the other queue is full
                break
            if self._broker.later:
                yield 0                      # others come in between
        done((moved, error))


class Broker:
    """All queues of a server, and the host of these queues, see Alone.

    config: a Config; the spool is its queue_path. later: see Alone. uptime: a function that
    returns seconds of a monotonic clock. Loads every queue of the spool. Raises OSError when the
    spool cannot be read.

    After each turn write() writes what has changed. The server runs the `tasks`, resumes the
    sessions in `woken`, stops when `stopping` has been set, and sets `work` when it has a worker.
    """

    work = None
    locks_files = False                   # the spool is locked
    sweep_limit = SWEEP_STEP

    def __init__(self, config, later=None, now=None, budget=None, uptime=lambda: 0):
        self.config = config
        self.settings = config.server
        self.later = later
        self.uptime = uptime
        self.budget = budget or Budget()
        self.queues = {}
        self.routes = {}                  # key -> what route() found
        self.takers = {}                  # key -> the queue, if there is one only
        self.known_lines = {}             # memcache command line -> what it means, see _learn()
        self.children = {}                # name of a parent -> its fanout children
        self.dirty = []                   # queues with something to write
        self.changed = self.dirty.append
        self.tasks = collections.deque()
        self.start = self.tasks.append
        self.woken = []
        # How much load a session may pile up in this turn: with more, its next command waits until
        # all answers have been sent.
        self.share = self.settings.max_output_buffer
        self.stopping = False
        self.logins = Logins(self)
        self.aside = None                 # Worker.submit of a thread for slow calls, or None
        self.stats = Values(
            total_connections=0, cmd_set=0, cmd_peek=0,
            get_misses=0, bytes_read=0, bytes_written=0, queue_creates=0,
            queue_deletes=0, queue_expires=0, put_rate=0.0, get_rate=0.0)
        self.metrics = {name: Histogram() for name in METRICS}
        self.latency = self.metrics["delivery_latency_msec"]
        self._accounts = {}               # queue -> Account
        self._uncounted = set()           # queues that have changed since totals()
        self._totals = Totals(0, 0, 0, 0)
        self._cas = itertools.count(1)
        self.clients = {}                 # session -> (its number, when it came)
        self.numbered = {}                # number -> session
        self.reloaded = []                # calls to be made after each reload
        self.failing = {}                 # queue -> Failure, while its journal fails
        self.refused = collections.Counter()      # reason -> commands refused for it
        self.scrubbed = None              # (files, damaged files, when) of the last scrub
        self.free_space = None            # bytes left for the spool, None until that is known
        self.low_space = ""               # why nothing can be put, if these are too few
        self._failed = {}                 # queue -> OSError, since the last write()
        self._overdue = {}                # queue -> xids that have timed out, to be logged
        self._reloads = []                # (who, done) of each reload that was asked for
        self._strangers = set()           # (host, what it did) that the log has told of
        self._grace = lambda: None        # cancels the end of the grace period of the status
        self.moves = Moves(self)
        self._read_status()
        self.spool = os.path.abspath(self.settings.queue_path)
        self._unloaded = find_journals(self.spool)
        now = _now(now)
        for name in sorted(name for name, older in self._unloaded.items() if older is not None):
            try:
                self._create(name, now)
            except OSError as error:
                log.error("queue %s cannot be loaded: %s", name, error)
        for name in config.aliases.keys() & self.queues.keys():
            log.warning("the alias %s hides the queue of that name", name)

    # -- names

    def find(self, name):
        """Return the queue of that name, or None."""
        return None if name in self.config.aliases else self.queues.get(name)

    def queue(self, name, now=None, who="the server"):
        """Return the queue of that name, created if it is new; None for an alias. who: the client
        that asks for it, for the log. Raises OSError."""
        if name in self.config.aliases:
            return None
        queue = self.queues.get(name)
        if queue is None:
            self._check_room(name)
            queue = self._create(name, now)
            self.stats.queue_creates += 1
            log.info("queue %s created by %s", name, who)
        return queue

    def _check_room(self, name):
        """Raise OSError if there are too many queues, or children of a queue, for one more."""
        count = len(self.queues)
        if count >= self.settings.max_queues:
            raise OSError(errno.EDQUOT, "there are %d queues (max_queues)" % count, name)
        parent, is_child, _ = name.partition("+")
        count = len(self.children.get(parent, ()))
        if is_child and count >= self.settings.max_children:
            raise OSError(errno.EDQUOT, "%s has %d children (max_children)" % (parent, count), name)

    def targets(self, key):
        """Return the names of the queues that `key` (bytes) stands for: its own, or those of an
        alias. Raises ValueError when it cannot name a queue."""
        name = check_name(os.fsdecode(key))
        return self.config.aliases.get(name, (name,))

    def route(self, key, now=None, who="the server"):
        """Return where the items put under `key` (bytes) go. Raises ValueError when it cannot
        name a queue, OSError when a queue cannot be created."""
        queues = [self.queue(name, now, who) for name in self.targets(key)]
        targets = [queue for queue in queues
                   if not queue.config.fanout_only or "+" in queue.name]
        parents = dict.fromkeys([os.fsdecode(key), *(queue.name for queue in queues)])
        copies = [child for parent in parents for child in self.children.get(parent, ())
                  if child.name not in self.config.aliases and child not in targets]
        route = self.routes[key] = Route(targets, targets + copies)
        if len(route.queues) == len(targets) == 1:
            self.takers[key] = targets[0]
        return route

    def _forget_routes(self):
        self.routes.clear()
        self.takers.clear()

    def _create(self, name, now):
        older = self._unloaded.get(name, ())
        if older is None:                 # its files could not be tidied up
            older = find_journals(self.spool, name)[name]
        queue = Queue(name, self.spool, self.config.queue(name), older, self, now)
        if self._unloaded.pop(name, None) is not None and not queue.journal:
            log.warning("queue %s: keep_journal is false, its journal stays unread", name)
        self.queues[name] = queue
        self._accounts[queue] = Account(self.uptime())
        self._count(queue)
        parent, is_child, _ = name.partition("+")
        if is_child:
            self.children.setdefault(parent, []).append(queue)
            self._forget_routes()
        return queue

    # -- what clients ask for

    def cas(self, item):
        """Return the cas number of an item, which no other item has."""
        if item.cas is None:
            item.cas = next(self._cas)
        return item.cas

    def flush(self, queue, who):
        """Drop all waiting items of a queue."""
        log.info("queue %s flushed of %d items by %s", queue.name, queue.count, who)
        queue.flush()

    def delete(self, queue, who="the server"):
        """Remove a queue and its journal. Raises OSError."""
        count = queue.count
        queue.delete()
        log.info("queue %s deleted with %d items by %s", queue.name, count, who)
        self.stats.queue_deletes += 1
        for session in self.clients:         # they would keep it in memory
            session.open_reads.pop(queue, None)
        del self.queues[queue.name]
        self._count(queue)
        del self._accounts[queue]
        self._forget_routes()
        parent, is_child, _ = queue.name.partition("+")
        if is_child:
            self.children[parent].remove(queue)
            if not self.children[parent]:
                del self.children[parent]

    # -- status

    def set_status(self, word, who="the server"):
        """Change the status. Raises ValueError if there is no such status."""
        if word.upper() not in STATUSES:
            raise ValueError("%r is none of: %s" % (word, ", ".join(STATUSES).lower()))
        self.status = word.upper()
        log.info("the status is %s, by %s", self.status, who)
        # What the status allows is allowed at once, what it refuses after the grace period.
        self._grace()
        refused = STATUSES[self.status]
        grace = self.settings.status_change_grace_period
        if grace and self.later:
            self._grace = self.later(grace, functools.partial(self._refuse, refused))
            refused = [new and old for new, old in zip(refused, self._refused)]
        self._refuse(refused)

    def admit(self, session):
        """Note that a client has come."""
        self.stats.total_connections += 1
        number = self.stats.total_connections
        self.clients[session] = number, self.uptime()
        self.numbered[number] = session
        self._count_clients()

    def dismiss(self, session):
        """Note that a client has gone."""
        number, _ = self.clients.pop(session)
        del self.numbered[number]
        self._count_clients()

    def _count_clients(self):
        settings = self.settings
        if (settings.connection_limit_refuse_reads != UNLIMITED
                or settings.connection_limit_refuse_writes != UNLIMITED):
            self._refuse(self._refused)

    def note_stranger(self, peer, why):
        """Log that a client wants something else than this port offers, once a host."""
        if len(self._strangers) < 1000 and (peer.host, why) not in self._strangers:
            self._strangers.add((peer.host, why))
            log.info("%s %s", peer.name, why)

    def _refuse(self, refused):
        """Set `refuses_reads` and `refuses_writes` to the reasons, or to "". refused: whether the
        status refuses reads, and writes, by now."""
        self._refused = refused
        settings = self.settings
        limits = settings.connection_limit_refuse_reads, settings.connection_limit_refuse_writes
        self.refuses_reads, self.refuses_writes = [
            "the server is %s" % self.status.lower() if is_refused
            else "there are more than %d connections" % limit
            if len(self.clients) > limit else ""
            for is_refused, limit in zip(refused, limits)]

    def _read_status(self):
        word, path = self.settings.default_status, self.settings.status_file
        if path:
            try:
                with open(path, encoding="ascii", errors="replace") as file:
                    saved = file.read().strip()
                STATUSES[saved.upper()]
                word = saved
            except FileNotFoundError:
                pass
            except (OSError, KeyError) as error:
                log.error("status_file %s: %s; the status is %s", path, error, word)
        self.status = self._saved_status = word.upper()
        self._refuse(STATUSES[self.status])

    def _save_status(self):
        self._saved_status = self.status
        path = self.settings.status_file
        if path:
            try:
                with open(path + "~", "w", encoding="ascii") as file:
                    file.write(self.status + "\n")
                os.replace(path + "~", path)
            except OSError as error:
                log.error("status_file %s: %s", path, error.strerror)

    # -- reloading

    def reload(self, who, done=lambda error: None):
        """Read the config file again, in steps, then call done(None); or done(ConfigError) if
        nothing has changed. Reloads that are asked for while one is under way are done as one."""
        self._reloads.append((who, done))
        if len(self._reloads) == 1:
            self.start(self._reload())

    def _reload(self):
        """A task: reload for those who have asked so far, until all have been told."""
        done = 0                             # they stay in the list, so that no second task starts
        try:
            while done < len(self._reloads):
                asked = self._reloads[done:]
                done += len(asked)
                found = []
                error = ConfigError("unexpected, see the log")
                try:
                    yield functools.partial(self._read_config, found)
                    config, error = found
                    if config:
                        yield from self._take_config(config)
                        log.info("%s reloaded by %s", config.path or "the default settings",
                                 ", ".join(dict.fromkeys(who for who, _ in asked)))
                    else:
                        for mistake in str(error).split("\n"):
                            log.error("reload: %s; nothing has been changed", mistake)
                finally:
                    for _, call in asked:
                        call(error)
        finally:
            self._reloads.clear()

    def _read_config(self, found):
        try:
            found += Config(self.config.path, self.config.overrides), None
        except ConfigError as error:
            found += None, error.with_traceback(None)

    def _take_config(self, config):
        """Go on with another Config, in steps."""
        held = vars(self.settings)
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
        config.server = self.settings
        self.config = config
        self.known_lines.clear()             # they know of aliases
        self._forget_routes()
        for count, queue in enumerate(list(self.queues.values()), 1):
            if not queue.closed:
                queue.configure(config.queue(queue.name))
                self._count(queue)
            if count % QUEUES_STEP == 0:
                yield
        self._forget_routes()                # fanout_only may be another
        for call in self.reloaded:
            call()

    # -- expiry

    def discard_expired(self, queue, now, limit=UNLIMITED):
        """Drop expired items at the head of a queue. A generator: it yields how many after each
        step."""
        while limit > 0 and not queue.closed:
            dropped = queue.discard_expired(now, min(limit, SWEEP_STEP))
            if not dropped:
                break
            limit -= dropped
            yield dropped

    def sweep(self, now):
        """A task: drop expired items, and delete queues older than their max_queue_age."""
        for count, queue in enumerate(list(self.queues.values()), 1):
            try:
                for _ in self.discard_expired(queue, now, queue.config.max_expire_sweep):
                    yield
            except OSError as error:
                log.error("queue %s: expired items not dropped: %s", queue.name, error)
            max_age = queue.config.max_queue_age
            if max_age and not (queue.count or queue.opens or queue.delays.items or queue.waiters
                                or queue.paused or queue.closed) and (
                    self.uptime() - self._accounts[queue].born >= max_age / 1000):
                try:
                    self.delete(queue, "max_queue_age")
                    self.stats.queue_expires += 1
                    self.stats.queue_deletes -= 1
                except OSError as error:
                    log.error("queue %s: %s", queue.name, error)
                yield
            if count % SWEEP_STEP == 0:
                yield

    # -- writing

    def write(self):
        """Write every journal that has something to write. Return the queues written and, as
        {queue: OSError}, those of which operations have been undone since the last call."""
        if len(self.latency.fresh) + len(self.metrics["turn_usec"].fresh) > _MOST_FRESH:
            for histogram in self.metrics.values():
                histogram.count()
        written = []
        for queue in self.dirty:             # more may come: open reads go back
            try:
                queue.write()
                written.append(queue)
            except OSError:
                pass                         # failed() has it
            except Exception:
                log.exception("unexpected, in the queue %s", queue.name)
                self._failed.setdefault(queue, OSError(errno.EIO, "unexpected, see the log"))
        self._uncounted.update(self.dirty)
        self.dirty.clear()
        failed, self._failed = self._failed, {}
        if self.status is not self._saved_status:
            self._save_status()
        return written, failed

    def failed(self, queue, error):
        """Note that the operations of a queue that were not safe have been undone."""
        if not isinstance(self._failed.get(queue), Unclear):   # else what is said stays true
            self._failed[queue] = _bare(error)
        self.note_failure(queue, error, "written")

    def unreadable(self, queue, error):
        """Note that items of a queue that are only on disk cannot be read."""
        self.note_failure(queue, error, "read")

    def timed_out(self, queue, xids):
        """Have the clients logged whose open reads go back, since their time is over."""
        if not self._overdue:
            self.start(self._log_overdue())
        self._overdue.setdefault(queue, set()).update(xids)

    def _log_overdue(self):
        """A task: look once for all clients with open reads that have timed out in this turn."""
        overdue, self._overdue = self._overdue, {}
        for number, session in enumerate(list(self.clients), 1):
            for queue in overdue.keys() & session.open_reads.keys():
                count = len(overdue[queue].intersection(session.open_reads[queue]))
                if count:
                    log.warning("%s: %d open reads of %s have timed out", session.who, count,
                                queue.name)
            if number % SWEEP_STEP == 0:
                yield

    def note_failure(self, queue, error, what):
        """Note that a journal cannot be written, fsynced or read; log it the first time."""
        if queue in self.failing:
            what = self.failing[queue].what
        else:
            log.error("the journal of %s cannot be %s: %s", queue.name, what, _why(error))
        self.failing[queue] = Failure(what, _bare(error), self.uptime())

    def forget_failures(self, seconds):
        """Forget the failures of journals that have not failed for so long."""
        for queue, failure in list(self.failing.items()):
            if queue.closed or self.uptime() > failure.when + seconds:
                del self.failing[queue]
                if not queue.closed:
                    log.info("the journal of %s can be %s again", queue.name, failure.what)

    def trouble(self):
        """Return which journal fails and why, or "" if none does."""
        for queue, failure in self.failing.items():
            return "the journal of %s cannot be %s: %s" % (
                queue.name, failure.what, _why(failure.error))
        return ""

    def why_not_readable(self):
        """Return why clients should read elsewhere, "" if all is well."""
        return self.refuses_reads or self._will_refuse(0) or self.trouble()

    def why_not_writable(self):
        """Return why clients should put elsewhere, "" if all is well."""
        return self.refuses_writes or self._will_refuse(1) or self.trouble() or self.low_space

    def _will_refuse(self, what):
        """Return why reads (0) or writes (1) are refused after the grace period, "" if not."""
        return "the server is %s" % self.status.lower() if STATUSES[self.status][what] else ""

    def take_free_space(self, size):
        """Note how many bytes are free for the spool."""
        self.free_space = size
        least = self.settings.min_free_space
        if size >= least:
            if self.low_space:
                log.info("%s: enough space for puts again", self.spool)
            self.low_space = ""
        elif not self.low_space:
            log.error("%s: %s free, puts are refused until it is more than %s (min_free_space)",
                      self.spool, SIZE.show(size >> 20 << 20), SIZE.show(least))
            self.low_space = "there is no space for more: less than %s free (min_free_space)" % (
                SIZE.show(least))

    # -- statistics

    def _count(self, queue):
        """Bring the totals up to date with a queue."""
        account = self._accounts[queue]
        new = (0, 0, queue.counters.total_items, 0) if queue.closed else (
            queue.count, queue.bytes, queue.counters.total_items, queue.config.max_memory_size)
        old = account.counted
        if new != old:
            account.counted = new
            self._totals = Totals(*[total + after - before for total, after, before in zip(
                self._totals, new, old)])

    def totals(self):
        """Return the Totals of all queues."""
        self._uncounted.update(self.dirty)
        for queue in self._uncounted:
            if not queue.closed:
                self._count(queue)
        self._uncounted.clear()
        return self._totals

    def sample(self, seconds):
        """A task: take the rates of all queues. seconds: since the last sample."""
        put_rate = get_rate = 0.0
        for count, queue in enumerate(list(self.queues.values()), 1):
            if queue.closed:                 # deleted since the last step
                continue
            account, counters = self._accounts[queue], queue.counters
            before = account.sampled
            account.sampled = after = counters.total_items, counters.get_hits
            counters.put_rate, counters.get_rate = [
                max(0, new - old) / seconds for new, old in zip(after, before)]
            put_rate += counters.put_rate
            get_rate += counters.get_rate
            history = account.history
            if history or queue.count or after != before:        # an idle queue has none
                history.extend([queue.count, counters.put_rate, counters.get_rate])
                del history[:-3 * SAMPLES]
            if count % SWEEP_STEP == 0:
                yield
        self.stats.put_rate, self.stats.get_rate = put_rate, get_rate

    def history(self, queue):
        """Return the last samples of a queue, as lists [items, put rate, get rate], the oldest
        first."""
        values = self._accounts[queue].history
        return [[round(value, 1) for value in values[at:at + 3]]
                for at in range(0, len(values), 3)]

    def server_stats(self, now):
        """Return the server's own statistics, as (name, value) pairs."""
        return [(one.name, one.get(self, now)) for one in SERVER_STATS]

    def queue_stats(self, queue, now):
        """Return the statistics of a queue, as (name, value) pairs; `children` if it has any."""
        children = self.children.get(queue.name)
        return [(one.name, one.get(queue, now)) for one in QUEUE_STATS] + (
            [("children", ",".join(child.name for child in children))] if children else [])


# == 7. Protocols =========================================================================
#
# What clients say and what they are told. A session is fed bytes and answers with bytes in `out`.
# It asks the broker, and never touches a socket, a clock or a file, so that every case can be
# tried without one.
#
# A client is in one state, which follows from what it has sent and what it waits for:
#
#   state      input is          goes on when
#   READY      run as it comes   it sends more
#   RECEIVING  kept              the rest of a command comes
#   WAITING    kept              an item comes, or time_out() is called
#   WORKING    kept              resume() is called: in a later turn, or for what it asked for
#   HELD       kept              its answers are safe, or its question (a password) is answered
#   FULL       kept              sent() is called: `out` holds all that may wait there
#   ENDING     thrown away       never; it is closed when `out` has been sent
#   CLOSED     thrown away       never
#
# A command that waits is a generator. It yields None to go on in a later turn, a Waiter to wait
# for an item, or a function whose result comes later: it is called with a callback, and what the
# callback is given is sent into the generator. The session is then put into broker.woken.
#
# A command whose work grows with the number of queues, or that creates or deletes files, begins
# with a `yield`: it runs as a task, a step at a time, after the other clients have been served.

READY, RECEIVING, WAITING, WORKING, HELD, FULL, ENDING, CLOSED = (
    "ready", "receiving", "waiting", "working", "held", "full", "ending", "closed")

# The latest expiry; later ones are reduced to it. (The journal has 64 bits.)
_LATEST = 1 << 62

# The numbers that are not negative, those that are positive, and the delays that an item may have,
# in milliseconds: up to a hundred years.
_FROM_0, _FROM_1 = range(10 ** 20), range(1, 10 ** 20)
_DELAYS = range(36525 * 86400000 + 1)

# What a command adds to the load of its session besides the size of its answer.
_COMMAND_COST = 1 << 10

# The delivery of an item that is logged, because the earlier ones have all failed.
_OFTEN = 5

# While more queues than this have something to write, each session runs one command a turn.
_MOST_DIRTY = 50


class Refused(Exception):
    """A command that is answered with an error. kind: ERROR, CLIENT_ERROR or SERVER_ERROR, or the
    number that HTTP or Thrift has for it. close: whether the connection is closed then. skip: how
    many bytes of a data block are thrown away. reason: the name that it is counted under."""

    def __init__(self, kind, why, close=False, skip=0, reason="client"):
        super().__init__(why)
        self.kind = kind
        self.why = why
        self.close = close
        self.skip = skip
        self.reason = reason


def _name(word):
    """Return the name of a queue (bytes) as text. Raises Refused."""
    try:
        return check_name(os.fsdecode(word))
    except ValueError as error:
        raise Refused("CLIENT_ERROR", str(error)) from None


def _number(word, what, allowed=None, close=False):
    """Return a whole number (bytes) as int. allowed: a range that it must be in. Raises
    Refused."""
    if word.lstrip(b"-").isdigit() and word.rfind(b"-") <= 0 and len(word) <= 20:
        number = int(word)
        if allowed is None or number in allowed:
            return number
    raise Refused("CLIENT_ERROR", "bad %s" % what, close)


def _batches(items, size):
    """Yield the items in lists of that size; the last one may be shorter."""
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])


# The other side of a connection. name: for the log. host: all clients of a host share its limits.
# local: whether it is on this machine. ip: its ipaddress, None on a UNIX socket.
Peer = collections.namedtuple("Peer", "name host local ip", defaults=[None])


# Protocols of clients that have come to the wrong port: reason of the refusal -> in words.
_FOREIGN = {"binary memcache": "memcache's binary protocol: it has to use the text protocol",
            "TLS": "TLS to a port without TLS (tls_cert)", "binary": "an unknown protocol",
            "PROXY": "the PROXY protocol, but is not among those in proxy_protocol"}


def _reason(error):
    """Return the name that a command is counted under if it failed with this OSError."""
    return errno.errorcode.get(error.errno, "EIO")


class Session:
    """One client, in whatever protocol: its input, its answers, its open reads and waits.

    What the server uses: feed(), hang_up(), resume(), time_out(), settle(), take(), sent(),
    turn_away(), close(), the attributes that follow and those explained in __init__():

    timeout      milliseconds after which time_out() is to be called; the server resets it to None

    A protocol has _parse(data), which runs the commands in `data` and returns how far it has got,
    _say_error(error), which answers with a Refused, and _failure(why, answer), which returns an
    error in the place of an answer; `answer` is None if the command in hand has none yet. The
    answer to a command that wants none is b"".
    """

    NOTHING = b""                       # the answer to a read that finds no item
    idle_timeout = None                 # milliseconds; client_timeout may be shorter
    hangs_up = True                     # after errors that say `close`, see Refused
    is_stranger = False                 # the client has still to log in
    _opened = itertools.count()         # numbers the open reads of all clients

    def __init__(self, broker, peer=Peer("a client", "", True)):
        self.broker = broker
        self.peer = peer
        self.user = None                # its name, if there is an auth_file and it has logged in
        self.now = 0                    # of the latest call
        self.state = READY
        self.out = []                   # answers to be sent, in order
        self.load = 0                   # their size, and what else the commands have cost
        self.touched = []               # (queue, index in out, count, whole), see _rest_on()
        self.holds = 0                  # how many queues have to be safe before answers are sent
        # queue -> {xid: (when it was opened here, its number, position)}, the oldest first
        self.open_reads = {}
        self.command = None             # the generator of the command in hand,
        self.asks = None                # what it has yielded,
        self._given = None              # and what it is given next
        self.timeout = None
        # (queue, xid, index in out, what open_reads had, position) of what was closed by commands
        # whose answers have not been sent
        self.ended = []
        self._kept = None               # a BytesIO of input that has not been run, if any
        self._needed = 0                # the length from which on it is worth looking at again
        self.at_end = False             # the client will send no more

    @property
    def who(self):
        """The client, for the log."""
        return self.peer.name if self.user is None else "%s (%s)" % (self.peer.name, self.user)

    @property
    def unparsed(self):
        """The number of bytes of input that are kept."""
        return self._kept.tell() if self._kept else 0

    def is_over(self):
        """Return whether the client has gone, or is sent nothing more than what is in `out`."""
        return self.state in (ENDING, CLOSED)

    # -- the state

    def _update(self):
        """Derive the state from what the session waits for."""
        if self.state is ENDING or self.state is CLOSED:
            return
        if self.load > self.broker.share:
            self.state = FULL
        elif self.command is not None:
            self.state = (WORKING if self.asks is None else
                          WAITING if type(self.asks) is Waiter else HELD)
        elif self.holds:
            self.state = HELD
        elif self._kept is not None and self._kept.tell() >= self._needed:
            self.state = WORKING
        else:
            self.state = READY if self._kept is None and not self._needed else RECEIVING

    def _end_if_done(self):
        """Derive the state when nothing is being run. After a hang-up, end the session if there is
        nothing left to do."""
        self._update()
        if self.at_end and self.state is WAITING and self._kept is not None:
            self.time_out()                  # the commands behind the wait are still run
        elif self.at_end and self.state in (READY, RECEIVING, WAITING):
            self.end()

    def end(self):
        """Run no more commands, and put open reads back. The connection is closed when all answers
        have been sent; that includes an item which was taken for the client in this turn."""
        given, self._given = self._given, None
        if self.state is not CLOSED:
            if given is not None:
                self._go_on(given)
            self.state = ENDING
        self._drop_command()
        self._kept, self._needed = None, 0
        reads, self.open_reads = self.open_reads, {}
        task = self._put_all_back(reads)
        with contextlib.suppress(StopIteration):
            next(task)
            self.broker.start(task)

    def _put_all_back(self, reads):
        """A task: put open reads back, some at a time. reads: like `open_reads`."""
        count = 0
        for queue, xids in reads.items():
            xids = list(xids)
            while xids:                      # the last ones first: the others come in front
                if count >= SWEEP_STEP or count and len(self.broker.dirty) > _MOST_DIRTY:
                    count = 0
                    yield
                some = xids[-SWEEP_STEP:]
                del xids[-SWEEP_STEP:]
                queue.abort(*some, now=self.now, orphaned=True)
                count += len(some)

    def close(self, now):
        """Note that the connection is closed. Open reads go back, and so do those that were closed
        if that is undone."""
        self.now = now
        self.state = CLOSED
        self.end()
        for queue, xid, *_, position in self.ended:
            queue.history.when_safe(functools.partial(self._put_back, queue, xid), position)

    @staticmethod
    def _put_back(queue, xid, error):
        if queue.is_open(xid):               # its end has been undone
            queue.abort(xid, orphaned=True)

    # -- input

    def feed(self, data, now):
        """Take bytes that the client sent, and run every whole command in them."""
        self.now = now
        if self.state is READY and not self.load:      # as a rule
            pos = self._parse(data)
            if pos != len(data) or self._needed:
                self._stop(data, pos)
        elif not self.is_over():
            self._keep(data)
            if self.state in (READY, RECEIVING) and self._kept.tell() >= self._needed:
                self._update()               # it may have to read its answers first
                if self.state is WORKING:
                    self._run_kept()

    def hang_up(self, now):
        """Note that the client will send no more. Its commands are still run and answered, but
        none of them waits for an item."""
        self.now = now
        self.at_end = True
        self._end_if_done()

    def resume(self, now):
        """Go on with the command in hand, or with the input that has been kept."""
        self.now = now
        if self.state is WORKING:
            if self.command is not None:
                given, self._given = self._given, None
                self._go_on(given)
            if self.state is WORKING and self.command is None:
                self._run_kept()
        if self.at_end:
            self._end_if_done()

    def _stop(self, data, pos):
        """Keep the input from data[pos] on, which has not been run, and derive the state."""
        if not self.is_over():
            if pos < len(data):
                self._keep(data[pos:])
            if self.state is READY and self.load <= self.broker.share and self._kept is not None:
                self._needed = max(self._needed, self._kept.tell() + 1)      # it needs more
            self._end_if_done()

    def _run_kept(self):
        data = self._kept.getvalue()
        self._kept, self._needed = None, 0
        self.state = READY
        self._stop(data, self._parse(data))

    def _keep(self, data):
        if self._kept is None:
            self._kept = io.BytesIO()
        self._kept.write(data)

    def _pass_turn(self):
        """Defer the next command to the next turn."""
        self.load = self.broker.share + 1

    # -- commands that wait

    def _begin(self, command):
        """Run a generator as the command in hand, up to where it has to wait."""
        self.command = command
        self._go_on(None)

    def _go_on(self, given):
        command = self.command
        try:
            self.asks = asks = command.send(given)
            if asks is not None and type(asks) is not Waiter:
                asks(functools.partial(self._wake, command))
        except StopIteration:
            self._drop_command()
        except Unclear:                  # nobody knows what has become of what it waited for
            self.close(self.now)
        except (Refused, OSError) as error:
            self._drop_command()
            self._refuse(error)
        self._update()

    def _wake(self, command, given):
        """Give the command in hand what it has asked for: it goes on in this turn, or the next."""
        if self.command is command:
            self.asks, self._given = None, given
            self.broker.woken.append(self)
            self._update()

    def _drop_command(self):
        command, asks = self.command, self.asks
        self.command = self.asks = self._given = self.timeout = None
        if type(asks) is Waiter:
            asks.cancel()
        if command is not None and not command.gi_running:
            command.close()

    def _deliver(self, queue, item):
        if item is not None:
            # Now: the change is written in this turn, though the answer may come in the next.
            self._rest_on(queue, item if self.asks.peek else True)
            if self.asks.open:
                self._note_open(queue, item)
        self._wake(self.command, (queue, item))

    def time_out(self):
        """End the current wait without an item."""
        if type(self.asks) is Waiter:
            self.asks.take(None, None)

    # -- output

    def _say(self, answer):
        """Answer the command in hand."""
        self.load += len(answer) + _COMMAND_COST
        self.out.append(answer)

    def _rest_on(self, queue, whole=True):
        """Make the next answer depend on the journal of a queue: it is sent when what has been
        done is safe, and is an error if that fails. whole: False in a get of many keys, where it is
        no error; or the item that was peeked at: the answer stays true as long as that is at the
        head. An entry of `touched` is about out[index:index + count]: an error takes its place, or
        nothing if `whole` is False, for what is a part of a longer answer."""
        self.touched.append((queue, len(self.out), int(whole is not False), whole))

    def _refuse(self, error):
        """Answer a command with what went wrong, a Refused or an OSError."""
        if isinstance(error, OSError):
            if self._has_ended(len(self.out)):
                log.error("%s finds no item: %s", self.who, _why(error))
                self._say(self.NOTHING)
                return
            error = Refused("SERVER_ERROR", _why(error), reason=_reason(error))
        self.broker.refused[error.reason] += 1
        if error.reason in _FOREIGN:
            self.broker.note_stranger(self.peer, "speaks " + _FOREIGN[error.reason])
        self._say_error(error)
        if error.close and self.hangs_up:
            self.end()

    def take(self):
        """Return the answers to be sent, and forget them."""
        out, self.out, self.touched = self.out, [], []
        if self.ended:
            # The answer of the command in hand will be the first of the next ones.
            self.ended = [] if self.command is None else [
                (queue, xid, 0, read, position)
                for queue, xid, index, read, position in self.ended if index == len(out)]
        return out

    def sent(self):
        """Note that all that was taken has been sent."""
        self.load = 0
        if self.state is FULL:
            self._end_if_done()

    def settle(self, failed, unsafe):
        """Put errors in the place of answers that rest on a failed journal, and hold those that
        rest on operations which are not safe yet. failed: {queue: OSError}. unsafe: {queue: the
        position of its last operation}. Called in the turn in which these were written."""
        entries, self.touched = self.touched, []
        queues = {entry[0] for entry in entries}
        if failed:
            if any(isinstance(failed.get(queue), Unclear) for queue in queues):
                self.close(self.now)         # nobody knows what has become of them
                return
            self._fail(failed, entries)
        queues.intersection_update(unsafe)
        if queues:
            self.holds += len(queues)
            for queue in queues:
                queue.history.when_safe(
                    functools.partial(self._release, queue, entries), unsafe[queue])
            self._update()

    def _release(self, queue, entries, error):
        """Release the answers that waited for a queue, or fail them."""
        self.holds -= 1
        if isinstance(error, Unclear):
            self.close(self.now)
        elif error and self.state is not CLOSED:       # else `out` has gone
            self._fail({queue: error}, entries)
        self._update()
        if not self.holds:
            self.broker.woken.append(self)   # to be sent, and resumed

    def _fail(self, failed, entries):
        """Put errors in the place of answers that rest on a journal which could not be written or
        fsynced. entries: a part of `touched`."""
        for queue, index, count, whole in entries:
            if not count or queue not in failed or (
                    isinstance(whole, Item) and queue.is_head(whole)):
                continue
            if index == len(self.out):                 # by the command in hand
                self._drop_command()
                self.out.append(None)
                self.broker.woken.append(self)         # it goes on behind that, or ends
            self.broker.refused[_reason(failed[queue])] += 1
            said = self.out[index]
            error = (b"" if said == b"" else self.NOTHING if self._has_ended(index)
                     else self._failure(_why(failed[queue]), said))
            self.out[index:index + count] = [error if whole else b""] + [b""] * (count - 1)
        for queue in failed:
            # All is as it was before: a read that has timed out is not open either, but stays.
            undone = queue.history.undone
            mine = {xid: read for other, xid, _, read, position in self.ended
                    if other is queue and position in undone}
            mine.update(self.open_reads.pop(queue, ()))
            mine = {xid: read for xid, read in mine.items() if read[2] not in undone}
            if mine:
                self.open_reads[queue] = mine
        self._update()

    def _has_ended(self, index):
        """Return whether the command of an answer has closed a read, and this has not been undone.
        Then it is not refused, though it finds no item: an error says that the read is open."""
        undone = [position in queue.history.undone
                  for queue, _, at, _, position in self.ended if at == index]
        return bool(undone) and not any(undone)

    def turn_away(self, error):
        """Refuse the command in hand, or the part of one that has come; drop all other input, and
        end. A command that waits is not answered: what it has done before may stay."""
        if self.asks is None and self._given is None:
            self._refuse(error)
        self.end()

    # -- what a client may do

    def _check_writes(self):
        self._check_status(self.broker.refuses_writes, "written")

    def _check_reads(self):
        self._check_status(self.broker.refuses_reads, "read")

    def _check_status(self, why, what):
        if why:
            raise Refused("SERVER_ERROR", "%s: nothing can be %s" % (why, what), close=True,
                          reason="status")

    def _check_admin(self, command):
        """Check that this client may give a command that is not for everybody."""
        settings = self.broker.settings
        rule = settings.admin_commands
        if rule == "none":
            self._deny("%s is turned off (admin_commands)" % command)
        if not self.peer.local and (rule == "local" or not rule and command == "shutdown" and not (
                settings.allow_remote_shutdown)):
            self._deny("%s is for clients on this machine only (admin_commands)" % command)

    def _check_user(self, right, *names):
        """Check that the client may use these queues. right: put_users or get_users."""
        config = self.broker.config
        if config.users is not None:
            for name in names:
                if (self.user, name) not in config.permitted[right]:
                    if not config.may(self.user, right, name):
                        self._deny("%s is not among the %s of %s" % (self.user, right, name))
                    config.permit(right, self.user, name)

    def _check_put(self, key):
        """Check that the client may put items under a key. Raises Refused."""
        config = self.broker.config
        if (self.user, key) not in config.permitted["put_users"]:
            _name(key)
            self._check_user("put_users", *self.broker.targets(key))
            config.permit("put_users", self.user, key)

    def _deny(self, why):
        log.warning("%s is denied: %s", self.who, why)
        raise Refused("CLIENT_ERROR", why, reason="denied")

    def _check_opens(self, queue, plain, closing=0):
        """Check that the client may open one more read of a queue, or read it plainly, when so many
        have been closed."""
        if plain and self._reads_of(queue):
            raise Refused("ERROR", "close the open read of %s first" % queue.name, close=True)
        if not self._may_open(queue, closing):
            raise Refused("ERROR", "too many open reads of %s; limit=%d" % (
                queue.name, self.broker.settings.max_open_transactions), close=True)

    def _may_open(self, queue, closing=0):
        """Return whether the client may open one more read of a queue, when the oldest `closing`
        have been closed."""
        limit = self.broker.settings.max_open_transactions
        # Those that have timed out do not count, but looking for them takes long.
        return (len(self.open_reads.get(queue, ())) - closing < limit
                or len(self._reads_of(queue, closing)) < limit)

    def _reads_of(self, queue, skip=0):
        """Return the xids that are open here, without the oldest ones and those that have timed
        out."""
        return list(filter(queue.is_open,
                           itertools.islice(self.open_reads.get(queue, ()), skip, None)))

    # -- reading

    def _next(self, queues, opening, peek, wait):
        """Return the first of these queues that has an item, and the item; or (None, None) if
        there is none, or none comes in time. queues: may contain None, for a queue that does not
        exist. A generator, since it may have to wait."""
        moves, naps = self.broker.moves, RETRY_MS // _LOADING_MS
        while True:
            for number, queue in enumerate(queues, 1):
                if queue and not queue.closed:
                    item = queue.peek(self.now) if peek else queue.remove(opening, self.now)
                    if item is not None:
                        if opening:
                            self._note_open(queue, item)
                        return queue, item
                if number % QUEUES_STEP == 0:
                    yield
            queues = [queue for queue in queues if queue and not queue.closed]
            more = [queue for queue in queues if queue.has_more(peek)]
            # Whether all the heads have expired, and cannot be moved yet.
            is_late = self.broker.later and more and all(map(moves.is_burying_much, more))
            if more and not is_late:
                yield None                   # a run of expired items, or a large one is being read
            elif is_late and not wait and naps and not moves.stuck.issuperset(more):
                naps -= 1
                yield lambda wake: self.broker.later(_LOADING_MS, functools.partial(wake, None))
            elif wait and queues:
                waiter = Waiter(self._deliver, opening, peek)
                for queue in queues:
                    queue.wait(waiter)
                return (yield waiter)
            else:
                return None, None

    def _read_each(self, queue, count, wait, peek, say):
        """Open up to `count` items of a queue, or peek at them, and call say(item) for each. wait:
        milliseconds for all of them. Return what the last read found."""
        item = None
        if wait > 0:
            self.timeout = wait
        while count > 0 and (peek or self._may_open(queue)):
            _, item = yield from self._next([queue], not peek, peek, wait > 0)
            self._count_read(queue, item, peek)
            if item is None:
                break
            say(item)
            count -= 1
            if self.load > self.broker.share:
                yield
        return item

    def _note_open(self, queue, item):
        """Note that the client has opened a read."""
        self.open_reads.setdefault(queue, {})[item.xid] = (
            self.now, next(self._opened), queue.history.logged)
        if item.deliveries == _OFTEN - 1:
            log.warning("%s is given an item of %s that has come back %d times", self.who,
                        queue.name, item.deliveries)

    def _end_reads(self, queue, count, confirm, whole=True, **how):
        """Close or abort the oldest open reads of a queue here; return how many were open. how:
        see Queue.abort()."""
        reads = self.open_reads.get(queue, {})
        xids = list(itertools.islice(reads, count))
        ended = (sum(map(queue.confirm, xids)) if confirm
                 else queue.abort(*xids, now=self.now, **how))
        history = queue.history
        if history.ops or history.unsafe:    # else nothing of it can be undone
            self._rest_on(queue, whole)
        for xid in xids:
            self.ended.append((queue, xid, len(self.out), reads.pop(xid), history.logged))
        if not reads:
            self.open_reads.pop(queue, None)
        return ended

    def _confirm(self, queue, count):
        """Close the oldest open reads of a queue; none, and return False, if there are fewer."""
        reads = self._reads_of(queue) if queue else []
        if len(reads) < count:
            return False
        if count > 0:
            self.open_reads[queue] = {xid: self.open_reads[queue][xid] for xid in reads}
            self._end_reads(queue, count, True)
        return True

    def _count_read(self, queue, item, peek=False):
        """Count a read that has found an item, or None."""
        if peek:
            self.broker.stats.cmd_peek += 1
        elif item is not None:
            self.broker.latency.fresh.append(queue.counters.age)
        else:
            self.broker.stats.get_misses += 1
            if queue:
                queue.counters.get_misses += 1

    # -- what all protocols can do, most of it as generators

    def _queue(self, name):
        """Return the queue of that name, created if it is new; None for an alias."""
        queue = self.broker.find(name)
        if queue is None:
            yield
            queue = self.broker.queue(name, self.now, self.who)
        return queue

    def _route(self, key):
        """Return the route of a key, its queues created if they are new. Raises Refused."""
        broker = self.broker
        if key not in broker.routes:
            _name(key)
            if not all(target in broker.queues for target in broker.targets(key)):
                yield
        return broker.routes.get(key) or broker.route(key, self.now, self.who)

    def _put(self, route, items, flags=0, expiry=0, delay=0):
        """Put items into every queue of a route, in steps; return how many were taken by all
        targets. delay: see Queue.add_later(). Raises OSError if the memory is used up; then the
        item is in none."""
        broker = self.broker
        if broker.low_space and any(queue.journal for queue in route.queues):
            raise Refused("SERVER_ERROR", broker.low_space, reason="ENOSPC")
        count = cost = 0
        for item in items:
            broker.stats.cmd_set += 1
            for queue in route.queues:
                queue.check_memory(len(item))
                if delay:
                    queue.check_delays(len(item))
            if any([queue.paused & PAUSED_IN for queue in route.targets]):
                broker.refused["paused"] += 1
                continue
            stored = True
            for number, queue in enumerate(route.queues):
                # Not before the first: tasks of a thousand others may run in between.
                if cost > _STEP_SIZE or cost and len(broker.dirty) > _MOST_DIRTY:
                    cost = 0
                    yield
                taken = False                # if it was deleted since the last step
                if not queue.closed:
                    taken = (queue.add_later(item, delay, flags, expiry, self.now) if delay
                             else queue.add(item, flags, expiry, self.now))
                    self._rest_on(queue)
                    cost += len(item) + _COMMAND_COST
                stored &= taken or number >= len(route.targets)
            count += stored
            if not stored:
                broker.refused["full"] += 1
        return count

    def _queues(self, names=None):
        """Yield the queues that have these names; all queues by default."""
        broker = self.broker
        for name in sorted(broker.queues) if names is None else names:
            queue = broker.find(name)
            if queue:
                yield queue

    def _clients(self, queue=None):
        """Yield a dict for each client that is connected. queue: only those clients that have
        open reads of it are wanted, and only these reads are counted."""
        for session, (number, came) in list(self.broker.clients.items()):
            protocol, _, address = session.peer.name.partition(" client ")
            reads = [one for other, one in session.open_reads.items()
                     if one and queue in (None, other)]
            if reads or queue is None:
                yield {
                    "id": number, "address": address, "user": session.user, "protocol": protocol,
                    "state": session.state, "seconds": int(self.broker.uptime() - came),
                    "open_reads": sum(map(len, reads)),
                    "oldest_open_seconds": max([(self.now - next(iter(one.values()))[0]) // 1000
                                                for one in reads], default=None),
                    "waits_for": ",".join(queue.name for queue in session.asks.queues)
                    if session.state is WAITING else None}

    def _flush(self, name):
        """Flush the queue of that name, if there is one."""
        queue = self.broker.find(name)
        self._check_writes()
        if queue:
            self._check_user("get_users", name)
            self.broker.flush(queue, self.who)
            self._rest_on(queue)

    def _check_all_queues(self):
        """Check that the client may drop what is in any queue."""
        yield
        for number, name in enumerate(list(self.broker.queues), 1):
            self._check_user("get_users", name)
            if number % SWEEP_STEP == 0:
                yield

    def _flush_all(self, command):
        self._check_admin(command)
        self._check_writes()
        yield from self._check_all_queues()
        for number, queue in enumerate(self._queues(), 1):
            if queue.count or queue.delays.items or (
                    queue.history.safe < queue.history.logged) or (
                    queue.journal and queue.journal.torn):
                self.broker.flush(queue, self.who)
                self._rest_on(queue)
            if number % QUEUES_STEP == 0 or len(self.broker.dirty) > _MOST_DIRTY:
                yield

    def _delete(self, name, command="delete"):
        """Delete the queue of that name, if there is one."""
        self._check_admin(command)
        self._check_writes()
        queue = self.broker.find(name)
        if queue:
            self._check_user("get_users", name)
            yield
            if not queue.closed:
                self.broker.delete(queue, self.who)
                self._rest_on(queue)

    def _move(self, name, dest, most=UNLIMITED):
        """Move waiting items of one queue to another; return how many. Raises Refused."""
        self._check_reads()
        self._check_writes()
        self._check_user("get_users", name)
        self._check_user("put_users", dest)
        source = self.broker.find(name)
        target = yield from self._queue(dest)
        if target is None or target is source or most < 0:
            raise Refused("CLIENT_ERROR", "move takes two queues, and a number of items")
        if source is None:
            raise Refused("CLIENT_ERROR", "there is no queue %s" % name)
        if target.config.fanout_only and "+" not in dest:
            raise Refused("CLIENT_ERROR", "%s is fanout_only: it keeps no items" % dest)
        moved, error = yield functools.partial(
            self.broker.moves.move, source, target, min(most, source.count), self.now)
        if error:
            raise Refused("SERVER_ERROR", "%s; %d were moved" % (_why(error), moved),
                          reason=_reason(error))
        return moved

    def _pause(self, name, what):
        """Pause puts, gets, both or neither of a queue. Raises Refused."""
        self._check_admin("pause")
        self._check_writes()
        self._check_user("get_users", name)
        self._check_user("put_users", name)
        queue = self.broker.find(name)
        if queue is None:
            raise Refused("CLIENT_ERROR", "there is no queue %s" % name)
        queue.pause(what)
        log.info("queue %s %s by %s", name, "paused (%s)" % PAUSES[what] if what else "resumed",
                 self.who)
        self._rest_on(queue)

    def _kick(self, number):
        """Hang up on a client; return whether there is one of that number."""
        session = self.broker.numbered.get(number)
        if session:
            log.info("%s: kicked by %s", session.who, self.who)
            session.end()
            self.broker.woken.append(session)
        return session is not None

    def _set_status(self, word, command="status"):
        self._check_admin(command)
        try:
            self.broker.set_status(word, self.who)
        except ValueError as error:
            raise Refused("CLIENT_ERROR", str(error)) from None

    def _reload(self):
        self._check_admin("reload")
        error = yield functools.partial(self.broker.reload, self.who)
        if error:                            # the log has the other mistakes
            raise Refused("SERVER_ERROR", str(error).partition("\n")[0])

    def _log_in(self, name, password):
        """Set `user` to the name if that is its password (both bytes), else to None."""
        self.user = None
        self.user = yield functools.partial(self.broker.logins.check, self, name, password)

    def _shutdown(self):
        self._check_admin("shutdown")
        log.info("told to shut down by %s", self.who)
        self.broker.stopping = True
        self.end()


class LineSession(Session):
    """One client of a protocol whose commands are lines of words. It has a method do_<word> for
    each command; here are those that these protocols share, and a protocol sets their answers."""

    FLUSHED = DELETED = CHANGED = STATUS = VERSION = b""

    def _reply(self, words, answer):
        self._say(answer)

    def do_flush(self, words):
        """flush <queue>"""
        self._flush(self._named(words))
        self._reply(words, self.FLUSHED)

    def do_delete(self, words):
        """delete <queue>"""
        yield from self._delete(self._named(words))
        self._reply(words, self.DELETED)

    def do_status(self, words):
        """status [<word>]"""
        if len(words) > 1:
            self._set_status(words[1].decode("ascii", "replace"))
            self._say(self.CHANGED)
        else:
            self._say(self.STATUS % self.broker.status.encode())

    def do_version(self, words):
        self._say(self.VERSION % __version__.encode())

    def do_shutdown(self, words):
        self._shutdown()

    def do_quit(self, words):
        self.end()


# A key of a get. text: as it was sent. name: of the queue. wait: milliseconds. Kestrel has nothing
# of what follows. count: how many items. others: the names of further queues. timeout:
# milliseconds after which the read goes back. delay: milliseconds until an aborted item is
# available again. tail: whether it goes to the tail. touch: whether the timeout starts again.
# info: whether the answer has the time, expiry and deliveries of each item.
ReadKey = collections.namedtuple(
    "ReadKey", "text name wait open close abort peek count others timeout delay tail touch info",
    defaults=(0, False, False, False, False, 1, (), None, 0, False, False, False))
_KESTREL_FIELDS = 7

# A get. key: None if there are several. with_cas: it is a gets.
Get = collections.namedtuple("Get", "key keys with_cas")

# The line of a set whose data block is to come. expiry: as it was sent. answer: if all goes well.
# delay: milliseconds until the item is available. sync: whether it has to be durable.
Block = collections.namedtuple("Block", "key flags expiry answer size delay sync")


def parse_key(text):
    """Return the ReadKey of `q/t=500/open` and the like. Raises Refused."""
    queue, *given = text.split(b"/")
    words, options, others = set(), {}, {}
    for word in given:
        name, is_option, value = word.partition(b"=")
        name = name.lower()
        if not is_option:
            words.add(name)
        elif name == b"or":
            others[_name(value)] = None
        else:
            options[name] = value
    opening, closing, abort, peek, tail, touch, info = (
        word in words
        for word in (b"open", b"close", b"abort", b"peek", b"tail", b"touch", b"info"))
    if peek + abort + touch + (opening or closing) > 1:
        raise Refused("CLIENT_ERROR", "open, close, abort and peek cannot be combined like this")
    wait = _number(options.get(b"t", b"0"), "timeout")
    name = _name(queue)
    others.pop(name, None)
    count = min(_number(options.get(b"n", b"1"), "number of items (n=)", _FROM_1), UNLIMITED)
    timeout = _number(options[b"timeout"], "timeout", _FROM_1) if b"timeout" in options else None
    delay = _number(options.get(b"delay", b"0"), "delay", _DELAYS)
    if timeout and not opening or (delay or tail) and not abort or delay and tail:
        raise Refused("CLIENT_ERROR", "timeout= needs open; delay= or tail needs abort")
    return ReadKey(text, name, wait, opening, closing, abort, peek, count, tuple(others), timeout,
                   delay, tail, touch, info)


def _parse_get(words):
    """Return the Get of `get <key> [<key> ...]`. Raises Refused."""
    if len(words) < 2:
        raise Refused("CLIENT_ERROR", "get needs the name of a queue")
    keys = [parse_key(word) for word in words[1:]]
    return Get(keys[0] if len(keys) == 1 else None, keys, len(words[0]) == 4)


def _parse_block(words):
    """Return the Block of `set <queue> <flags> <expiry> <bytes> [noreply]`. Raises Refused, with
    the size of the data block to be skipped: that comes whatever is wrong with its line."""
    name = words[0].decode().lower()
    if len(words) < 5:
        raise Refused("CLIENT_ERROR", "%s needs a queue, flags, expiry and byte count" % name,
                      close=True)
    # After a key with a blank in it, another word is the byte count: data would be run as commands.
    if name == "set" and (len(words) > 6 or len(words) == 6 and words[5] != b"noreply"):
        raise Refused("CLIENT_ERROR", "more words than set has", close=True)
    size = _number(words[4], "byte count", _FROM_0, close=True)
    if name != "set":
        raise Refused("CLIENT_ERROR", "%s has no meaning for a queue" % name, skip=size + 2)
    try:
        flags = _number(words[2], "flags", range(1 << 32))
        key, *options = words[1].split(b"/")
        delay, sync = 0, False
        for option in options:
            if option.lower() == b"sync":
                sync = True
            elif option.lower().startswith(b"delay="):
                delay = _number(option[6:], "delay", _DELAYS)
            else:
                raise Refused("CLIENT_ERROR", "set knows the options delay= and sync")
        return Block(key, flags, _number(words[3], "expiry"),
                     b"" if _is_silent(words) else b"STORED\r\n", size, delay, sync)
    except Refused as error:
        error.skip = size + 2
        raise


# The commands with a data block, and those of memcached that have none.
_BLOCKS = (b"set", b"add", b"replace", b"append", b"prepend", b"cas")
_MEMCACHED = (b"incr decr touch gat gats mg md mn ma me slabs lru lru_crawler watch cache_memlimit"
              b" misbehave debug extstore refresh_certs").split()


def _when_all(waits, call):
    """Call `call` when all of `waits`, such as the when_safe of several queues, have called back:
    with None, or with an OSError that one of them has reported, an Unclear if there is one. All
    are asked at once, since a queue soon forgets what it has undone."""
    found = []

    def settled(error):
        found.append(error)
        if len(found) == len(waits):
            call(max(found, key=lambda error: (isinstance(error, Unclear), bool(error))))

    for wait in waits:
        wait(settled)


def _lines(begin, between, pairs):
    """Return a line of text for each (name, value) pair."""
    return "".join(["%s%s%s%s\r\n" % (begin, name, between, value) for name, value in pairs])


def _is_silent(words):
    """Return whether the words of a command line ask for no answer."""
    if not words or words[-1] != b"noreply":
        return False
    name = words[0].lower()
    return (name in _BLOCKS or name in (b"flush_all", b"verbosity", b"incr", b"decr", b"touch")
            or name in (b"delete", b"flush") and len(words) > 2)         # else it is the queue


def _check_byte(byte):
    """Raise Refused if no command can begin with `byte`: TLS and the binary protocol of memcached
    do."""
    if byte == b"\x80" or byte < b" " and byte not in b"\t\r\n":
        raise Refused("ERROR", "this protocol is not supported", close=True, reason={
            b"\x80": "binary memcache", b"\x16": "TLS"}.get(byte, "binary"))


def _value_key(settings, key, name):
    """Return what VALUE shows of a key, whose item comes from the queue of that name."""
    return os.fsencode(name) if settings.value_key == "queue" else key.text


def _parse_line(line, config):
    """Return the method of MemcacheSession that does a command line, its argument, and the size
    of the data block that has to come first, None for no block. The argument of store() and
    do_get() is a tuple, which takes less time than the fields of a namedtuple. Raises Refused."""
    _check_byte(line[:1])
    words = line.split()
    if not words:
        raise Refused("ERROR", "")
    name = words[0].lower()
    if name in (b"get", b"gets"):
        get = _parse_get(words)
        key = get.key
        if not key or key != ReadKey(*key[:_KESTREL_FIELDS]):
            return MemcacheSession.get_beyond, get, None
        if key.peek or get.with_cas or key.name in config.aliases:
            return MemcacheSession.get_in_steps, get, None
        ends = key.close or key.abort
        shown = _value_key(config.server, key, key.name)
        head = b"VALUE %b 0 %%d\r\n" % shown.replace(b"%", b"%%")
        return MemcacheSession.do_get, (get, key.name, key.wait, key.open, ends, head), None
    if name in _BLOCKS:
        block = _parse_block(words)
        if block.delay or block.sync:
            return MemcacheSession.store_in_steps, block, block.size
        return MemcacheSession.store, (block, *block[:4]), block.size
    method = getattr(MemcacheSession, "do_" + name.decode("latin-1"), None)
    if method:
        return method, words, None
    if name in _MEMCACHED:
        raise Refused("ERROR", "")
    raise Refused("ERROR", "unknown command", close=True,    # its data would be run as commands
                  reason="PROXY" if words[0] == b"PROXY" else "client")


# The number of command lines whose meaning is kept, and their greatest length.
_MOST_KNOWN = 4096
_LONGEST_KNOWN = 120


class MemcacheSession(LineSession):
    """One client of the memcache text protocol, as Kestrel speaks it.

    With an auth_file the client logs in first, as to memcached (its doc/protocol.txt,
    Authentication): the first command is a set, under any key, of `name password`.
    """

    FLUSHED = CHANGED = NOTHING = b"END\r\n"
    DELETED, STATUS, VERSION = b"DELETED\r\n", b"%b\r\n", b"VERSION %b\r\n"

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        # Command line -> what it means. A stranger has none, so that _learn() checks each line.
        self._lines = {} if self.is_stranger else self.broker.known_lines
        self._skip = 0                  # bytes of a refused data block still to come
        # (command, its argument, size) of the data block that is still to come
        self._block = None
        self._words = ()                # of the command in hand, if it waits

    @property
    def is_stranger(self):
        """Whether the client has still to log in."""
        return self.broker.config.users is not None and self.user is None

    def _parse(self, data):
        pos, end = 0, len(data)
        broker = self.broker
        while True:
            try:
                eol = data.find(b"\n", pos)
                if eol < 0:
                    line = b""
                    self._check_start(data, pos)
                    break
                line = data[pos:eol]
                pos = eol + 1
                command, asked, size = self._lines.get(line) or self._learn(line)
                if size is None:
                    waits = command(self, asked)
                else:
                    stop = pos + size
                    if stop + 2 > end:
                        self._block = command, asked, size
                        self._words = line.split()
                        self._needed = size + 2
                        break
                    if not data.startswith(b"\r\n", stop):
                        raise Refused("CLIENT_ERROR", "bad data chunk", close=True)
                    item = data[pos:stop]
                    pos = stop + 2
                    waits = command(self, asked, item)
                if waits:
                    self._words = line.split()
                    self._begin(waits)
            except (Refused, OSError) as error:
                self._words = line.split()
                self._refuse(error)
                pos = self._pass_over(pos, end) or end         # 0: it was not a whole line
            if pos == end or self.state is not READY or self.load > broker.share:
                break
            if len(broker.dirty) > _MOST_DIRTY:
                self._pass_turn()
                break
        return pos

    def _learn(self, line):
        """Return what _parse_checked() returns. It is kept, since clients send the same lines
        again and again."""
        if self.is_stranger:
            return self._parse_first(line)
        known = self._lines
        parsed = self._parse_checked(line, self.broker.settings.max_item_size)
        if len(line) <= _LONGEST_KNOWN:
            if len(known) >= _MOST_KNOWN:
                known.clear()
            known[line] = parsed
        return parsed

    def _parse_first(self, line):
        """Return what _parse_checked() returns for the first command of a client that has to log
        in: that is the login, or quit."""
        if line.lower().split()[:1] not in ([b"set"], [b"quit"]):
            raise Refused("CLIENT_ERROR", "unauthenticated", close=True)
        command, asked, size = self._parse_checked(line, MAX_LOGIN)
        return (command if size is None else MemcacheSession._do_log_in), asked, size

    def _parse_checked(self, line, most):
        """Return what _parse_line() returns. Raises Refused, also for a line that is too long, or
        a data block of more than `most` bytes."""
        if len(line.rstrip(b"\r")) > self.broker.settings.max_line:
            raise Refused("CLIENT_ERROR", "line too long", close=True)
        parsed = _parse_line(line, self.broker.config)
        size = parsed[2]
        if size is not None and size > most:
            raise Refused("SERVER_ERROR", "object too large for cache", skip=size + 2)
        return parsed

    def _pass_over(self, pos, end):
        """Skip what has come of a refused data block, from `pos` to `end`; return where the next
        command begins, or `end`. The rest of the block is skipped when it comes."""
        skipped = min(self._skip, end - pos)
        self._skip -= skipped
        if self._skip:
            self._needed = 1
        return pos + skipped

    def _run_kept(self):
        if self._skip:
            data = self._kept.getvalue()
            self._kept, self._needed = None, 0
            self._stop(data, self._pass_over(0, len(data)))
        if self._block:
            self._finish_block()
        if self._kept is not None and self.command is None and (
                self.state in (READY, RECEIVING, WORKING)):
            super()._run_kept()

    def _finish_block(self):
        """Store a data block that is complete now, without another copy."""
        (command, asked, size), self._block = self._block, None
        self._kept.seek(size)
        rest = self._kept.read()
        self._kept.truncate(size)
        item = self._kept.getvalue()
        self._kept, self._needed = None, 0
        if rest[2:]:
            self._keep(rest[2:])
        try:
            if rest[:2] != b"\r\n":
                raise Refused("CLIENT_ERROR", "bad data chunk", close=True)
            waits = command(self, asked, item)
            if waits:
                self._begin(waits)
        except (Refused, OSError) as error:
            self._refuse(error)
        self._update()

    def _check_start(self, data, pos):
        """Check that the rest of the input can become a line."""
        if len(data) - pos > self.broker.settings.max_line + 1:
            raise Refused("CLIENT_ERROR", "line too long", close=True)
        _check_byte(data[pos:pos + 1])

    def turn_away(self, error):
        if self.command is None and not self._block:
            self._words = ()
        super().turn_away(error)

    def _reply(self, words, answer):
        """Answer a command, which may have asked for no answer."""
        self._say(b"" if _is_silent(words) else answer)

    def _say_error(self, error):
        line = "%s %s" % (error.kind, error.why) if error.why else error.kind
        self._reply(self._words, line.encode("utf-8", "surrogateescape") + b"\r\n")
        self._skip = error.skip
        if self.is_stranger:
            self.end()

    def _failure(self, why, answer):
        if answer is None and _is_silent(self._words):
            return b""
        return b"SERVER_ERROR %b\r\n" % os.fsencode(why)

    # -- storing

    def store(self, asked, data):
        """set <queue> <flags> <expiry> <bytes>: done at once if that is possible."""
        block, key, flags, expiry, answer = asked
        broker = self.broker
        queue = broker.takers.get(key)
        if queue is None or broker.refuses_writes or broker.low_space:
            return self.store_in_steps(block, data)
        if broker.config.users is not None:
            self._check_put(key)
        if expiry:
            expiry = self._expiry(expiry)
        broker.stats.cmd_set += 1
        if not queue.add(data, flags, expiry, self.now):
            broker.refused["full"] += 1
            answer = answer and b"NOT_STORED\r\n"
        out = self.out
        # A client that wants no answer waits too: it must not send more than can be written.
        self.touched.append((queue, len(out), 1, True))
        out.append(answer)
        self.load += _COMMAND_COST
        return None

    def _expiry(self, expiry):
        """Return an expiry in milliseconds of the epoch, from relative or absolute seconds; the
        limits are Kestrel's and the journal's."""
        expiry *= 1000
        if expiry < 1000000 * 1000:
            expiry += self.now
        return min(max(expiry, 1), _LATEST)

    def store_in_steps(self, block, data):
        """set <queue> <flags> <expiry> <bytes>, also with options that Kestrel does not have."""
        if self.broker.config.users is not None:
            self._check_put(block.key)
        self._check_writes()
        expiry = block.expiry and self._expiry(block.expiry)
        route = yield from self._route(block.key)
        stored = yield from self._put(route, [data], block.flags, expiry, block.delay)
        if block.sync and route.queues:
            for queue in route.queues:       # what was written before may still need an fsync
                self.broker.changed(queue)
            error = yield functools.partial(
                _when_all, [queue.history.when_durable for queue in route.queues])
            if error:
                raise error
        self._say(block.answer if stored else block.answer and b"NOT_STORED\r\n")

    def _do_log_in(self, _, data):
        name, _, password = data.partition(b" ")
        yield from self._log_in(name, password)
        if self.user is None:
            raise Refused("CLIENT_ERROR", "authentication failure", close=True)
        self._lines = self.broker.known_lines
        self._reply(self._words, b"STORED\r\n")

    # -- reading

    def do_get(self, asked):
        """get <key>: answered at once if that is possible."""
        get, name, wait, opening, ending, head = asked
        broker = self.broker
        queue = broker.queues.get(name)
        if queue is None:
            return self.get_in_steps(get)
        if (ending or self.open_reads or broker.refuses_reads or broker.config.users is not None
                and (self.user, name) not in broker.config.permitted["get_users"]
                ) and not self._begin_read(get.key, queue):
            self._say(b"END\r\n")
            return None
        item = queue.remove(opening, self.now)
        if item is None:
            if wait > 0 or queue.has_more(False):
                return self.get_in_steps(get, begun=True)
            self._count_read(queue, None)
            self._say(b"END\r\n")
            return None
        if opening:
            self._note_open(queue, item)
        broker.latency.fresh.append(queue.counters.age)
        if item.flags:
            self._give(get, get.key, queue, item)
            return None
        # This is what _give() does then, without its call: that takes 3 % of the time of a get.
        data = item.data
        size = len(data)
        out = self.out
        self.touched.append((queue, len(out), 3, True))
        out += head % size, data, b"\r\nEND\r\n"
        self.load += size + _COMMAND_COST
        return None

    def _begin_read(self, key, queue):
        """Do what a key asks for before an item is read; return whether one is to be read.
        queue: None if there is none of that name."""
        opening, closing = key.open, key.close
        ends = closing or key.abort
        if opening or not ends:              # checked first: what is refused has closed nothing
            broker = self.broker
            if broker.refuses_reads:
                self._check_reads()
            if broker.config.users is not None:
                self._check_user("get_users", key.name)
            if len(self.open_reads.get(queue, ())) > ends and not key.peek:
                self._check_opens(queue, plain=not opening, closing=int(ends))
        if ends and queue:
            self._end_reads(queue, 1, closing)
        return opening or not ends

    def get_in_steps(self, get, begun=False):
        """get <key>, also one that has to wait. begun: whether _begin_read() has been called."""
        key = get.key
        queue = self.broker.find(key.name)
        if not begun and not self._begin_read(key, queue):
            self._say(b"END\r\n")
            return
        if queue is None and not key.peek:
            queue = yield from self._queue(key.name)
        if key.wait > 0:
            self.timeout = key.wait
        _, item = yield from self._next([queue], key.open, key.peek, key.wait > 0)
        self._count_read(queue, item, key.peek)
        self._give(get, key, queue, item)

    def get_beyond(self, get):
        """get <key> [<key> ...]: several keys, or options that Kestrel does not have."""
        rests_on = []
        many = get._replace(key=None)        # how items are given
        for number, key in enumerate(get.keys, 1):
            try:
                rests_on += yield from self._get_key(many, key)
            except OSError as error:
                if get.key or isinstance(error, Unclear):
                    raise
                log.error("get of many keys: %s", _why(error))
            if not get.key and (self.load > self.broker.share or number % QUEUES_STEP == 0):
                yield
        if get.key:
            for queue in dict.fromkeys(rests_on):
                self._rest_on(queue)
        self._say(b"END\r\n")

    def _get_key(self, get, key):
        """Do what one of several keys asks for; return the queues that the end of the answer rests
        on, as the items in it do."""
        names = (key.name, *key.others)
        queues = list(filter(None, map(self.broker.find, names)))
        changed = {}
        ends = key.close or key.abort or key.touch
        if key.open or not ends:             # checked first: what is refused has closed nothing
            self._check_reads()
            self._check_user("get_users", *names)
        if ends:
            changed = self._end_beyond(queues, key)
            # After that the answer does not rest on them: later failures are of other commands.
            if changed and not key.touch:
                error = yield functools.partial(
                    _when_all, [queue.history.when_safe for queue in changed])
                # If only some of it has been undone, no answer tells the client what.
                if error and not all([position in queue.history.undone
                                      for queue, position in changed.items()]):
                    raise Unclear(error.errno, error.strerror, error.filename)
                if error:                # whatever the other keys give
                    raise error if isinstance(error, Unclear) else Refused(
                        "SERVER_ERROR", _why(error), reason=_reason(error))
            if not key.open:
                return []
        if key.peek:
            yield from self._browse(get, key, queues)
            return []
        queues = []
        for name in names:
            queue = yield from self._queue(name)
            if queue:
                queues.append(queue)
        given = yield from self._read_beyond(get, key, queues)
        return [] if changed else given      # the reads are closed, and that is safe: no error

    def _browse(self, get, key, queues):
        """Show the first items of the first of these queues that has any."""
        if key.wait > 0:
            self.timeout = key.wait
        queue, item = yield from self._next(queues, False, True, key.wait > 0)
        self._count_read(queue, item, peek=True)
        if item is None:
            return
        if key.count == 1 or not queue.count:          # another client took it after the wait
            self._give(get, key, queue, item)
            return
        for items in queue.browse(key.count, self.now):
            for item in items:
                self._give(get, key, queue, item)
                if self.load > self.broker.share:
                    yield
            yield

    def _read_beyond(self, get, key, queues):
        """Give up to key.count items of the first of these queues that have any; return the queue
        of each, or [] if some were given in an earlier turn."""
        if not key.close:                    # else it is too late to refuse it
            for queue in queues:
                self._check_opens(queue, plain=not key.open)
        queues = [queue for queue in dict.fromkeys(queues)
                  if not key.open or self._may_open(queue)]
        given = []
        while len(given) < key.count:
            wait = not given and key.wait > 0
            if wait:
                self.timeout = key.wait
            try:
                queue, item = yield from self._next(queues, key.open, False, wait)
            except OSError as error:
                if not given:
                    raise
                log.error("get of many items: %s", _why(error))          # they are not lost
                break
            if item is None:
                break
            given.append(queue)
            self._count_read(queue, item)
            if key.timeout:
                limit = queue.config.open_transaction_timeout or key.timeout
                queue.limit(item.xid, min(key.timeout, limit))
            self._give(get, key, queue, item)
            if len(given) == 1:
                turn = self.touched          # settle() and take() put a new list in its place
            # The queues in front of it have no items. They are not tried again for each item,
            # unless this one has come after a wait, since others may have come meanwhile.
            if not wait:
                del queues[:queues.index(queue)]
            if key.open and not self._may_open(queue):
                queues.remove(queue)
            if self.load > self.broker.share:
                yield
        if not given:
            self._count_read(queues[0] if queues else None, None)
        return given if not given or self.touched is turn else []

    def _end_beyond(self, queues, key):
        """Close, abort or touch the oldest open reads of these queues; return the queues that had
        any, as {queue: position}."""
        def reads_of(queue):                 # the oldest first; no two have the same number
            for xid, (_, number, _) in self.open_reads[queue].items():
                # One that has timed out cannot be touched any more.
                if not key.touch or queue.is_open(xid):
                    yield number, queue, xid

        queues = [queue for queue in dict.fromkeys(queues) if queue in self.open_reads]
        self.load += len(queues) * _COMMAND_COST
        ended = {}
        for _, queue, xid in itertools.islice(heapq.merge(*map(reads_of, queues)), key.count):
            ended.setdefault(queue, []).append(xid)
        for queue, xids in ended.items():
            if key.touch:
                for xid in xids:
                    queue.touch(xid)
            else:
                self._end_reads(queue, len(xids), key.close, False, delay=key.delay, tail=key.tail)
        return {queue: queue.history.logged for queue in ended}

    def _give(self, get, key, queue, item):
        """Answer a key with an item, or with END if it is None."""
        if item is None:
            self._say(b"END\r\n")
            return
        whole = get.key is not None
        out = self.out
        size = len(item.data)
        head = b"VALUE %b %d %d\r\n" % (
            _value_key(self.broker.settings, key, queue.name), item.flags, size)
        if get.with_cas:
            head = b"%b %d\r\n" % (head[:-2], self.broker.cas(item))
        elif key.info:
            head = b"%b %d %d %d\r\n" % (head[:-2], item.add_time, item.expiry, item.deliveries)
        self.touched.append((queue, len(out), 3, item if key.peek and whole else whole))
        out += head, item.data, b"\r\nEND\r\n" if whole else b"\r\n"
        self.load += size + _COMMAND_COST

    def do_monitor(self, words):
        """monitor <queue> <seconds> [<items>]"""
        if not 3 <= len(words) <= 4:
            raise Refused("CLIENT_ERROR", "monitor needs a queue and a number of seconds")
        name = _name(words[1])
        seconds = _number(words[2], "number of seconds")
        count = _number(words[3], "number of items") if len(words) == 4 else UNLIMITED
        self._check_reads()
        self._check_user("get_users", name)
        key = ReadKey(words[1], name, open=True)
        queue = yield from self._queue(name)
        yield from self._read_each(
            queue, count, seconds * 1000, False,
            lambda item: self._give(Get(key, [key], False), key, queue, item))
        self._say(b"END\r\n")

    def do_confirm(self, words):
        """confirm <queue> <count>"""
        if len(words) != 3:
            raise Refused("CLIENT_ERROR", "confirm needs a queue and a number of items")
        queue = self.broker.find(_name(words[1]))
        count = _number(words[2], "number of items", _FROM_0)
        self._say(b"END\r\n" if self._confirm(queue, count) else b"ERROR\r\n")

    # -- administration

    def _named(self, words):
        """Return the name of the queue that a command is about. Raises Refused."""
        if len(words) < 2:
            raise Refused("CLIENT_ERROR", "%s needs the name of a queue" % words[0].decode())
        rest = words[2:]
        if rest[:1] == [b"0"]:           # a time, in old versions of memcached
            del rest[0]
        if rest not in ([], [b"noreply"]):
            raise Refused("CLIENT_ERROR", "%s takes one name" % words[0].decode())
        return _name(words[1])

    def do_flush_all(self, words):
        yield from self._flush_all("flush_all")
        stock = self.broker.settings.flush_all_reply == "memcached"
        self._reply(words, b"OK\r\n" if stock else b"Flushed all queues.\r\n")

    def do_flush_expired(self, words):
        return self._flush_expired([self._named(words)])

    def do_flush_all_expired(self, words):
        return self._flush_expired(None)

    def _flush_expired(self, names):
        self._check_writes()
        if names is None:
            yield from self._check_all_queues()
        else:
            self._check_user("get_users", *names)
        total = 0
        for number, queue in enumerate(self._queues(names), 1):
            for dropped in self.broker.discard_expired(queue, self.now):
                total += dropped
                self._rest_on(queue)
                yield
            if number % SWEEP_STEP == 0:
                yield
        self._say(b"%d\r\n" % total)

    def do_list(self, words):
        """list [<prefix>]"""
        if len(words) > 2:
            raise Refused("CLIENT_ERROR", "list takes one prefix")
        prefix = os.fsdecode(words[1]) if len(words) > 1 else ""
        return self._report(
            "QUEUE %s %d %d %d %d\r\n" % (queue.name, queue.count, queue.bytes, len(queue.opens),
                                        len(queue.waiters))
            if queue.name.startswith(prefix) else "" for queue in self._queues())

    def do_move(self, words):
        """move <queue> <queue> [<items>]"""
        if not 3 <= len(words) <= 4:
            raise Refused("CLIENT_ERROR", "move needs two queues")
        most = _number(words[3], "number of items") if len(words) == 4 else UNLIMITED
        moved = yield from self._move(_name(words[1]), _name(words[2]), most)
        self._say(b"%d\r\n" % moved)

    def do_pause(self, words):
        """pause <queue> [in | out]"""
        what = {(): PAUSED_IN | PAUSED_OUT, (b"in",): PAUSED_IN, (b"out",): PAUSED_OUT}.get(
            tuple(word.lower() for word in words[2:]))
        if what is None or len(words) < 2:
            raise Refused("CLIENT_ERROR", "pause takes one queue, and in or out")
        name = _name(words[1])
        queue = self.broker.find(name)
        self._pause(name, what | (queue.paused if queue else 0))
        self._say(b"END\r\n")

    def do_resume(self, words):
        """resume <queue>"""
        if len(words) != 2:
            raise Refused("CLIENT_ERROR", "resume takes one queue")
        self._pause(_name(words[1]), 0)
        self._say(b"END\r\n")

    def do_clients(self, words):
        """clients"""
        self._check_admin("clients")
        return self._report(
            "CLIENT %s\r\n" % " ".join(
                "-" if value is None else str(value).replace(" ", "%20")
                for name, value in row.items() if name != "oldest_open_seconds")
            for row in self._clients())

    def do_kick(self, words):
        """kick <client>"""
        self._check_admin("kick")
        number = _number(words[1], "number of a client") if len(words) == 2 else 0
        self._reply(words, b"OK\r\n" if self._kick(number) else b"NOT_FOUND\r\n")

    def do_stats(self, words):
        return self._report(self._all_stats())

    def _all_stats(self):
        yield _lines("STAT ", " ", self.broker.server_stats(self.now))
        for queue in self._queues():
            yield _lines("STAT queue_%s_" % queue.name, " ",
                         self.broker.queue_stats(queue, self.now))

    def do_dump_stats(self, words):
        return self._dump(words, lambda queue: self.broker.queue_stats(queue, self.now))

    def do_dump_config(self, words):
        return self._dump(words, lambda queue: [
            line.split(" = ", 1) for line in queue.config.lines()])

    def _dump(self, words, pairs):
        names = list(dict.fromkeys(map(os.fsdecode, words[1:]))) or None
        return self._report(
            "queue '%s' {\r\n%s}\r\n" % (queue.name, _lines("  ", "=", pairs(queue)))
            for queue in self._queues(names))

    def _report(self, pieces):
        """Answer with the pieces of text of a generator, some in each turn, and END."""
        yield
        for some in _batches(itertools.chain(pieces, ["END\r\n"]), QUEUES_STEP):
            self._say(os.fsencode("".join(some)))
            yield

    def do_reload(self, words):
        yield from self._reload()
        self._say(b"Reloaded config.\r\n")

    def do_verbosity(self, words):
        self._reply(words, b"OK\r\n")


# The longest item that can be put as a line of text; the most items, and bytes, of one put.
MAX_TEXT_ITEM = 1 << 20
MAX_TEXT_ITEMS = 1024
MAX_TEXT_PUT = 16 << 20


class TextSession(LineSession):
    """One client of Kestrel's text protocol (net.lag.kestrel.TextHandler): lines that end in a
    newline, items without one. (There is no login at this port: Config does not allow it together
    with an auth_file.)"""

    FLUSHED = DELETED = CHANGED = b"+0\n"
    STATUS = VERSION = b":%b\n"
    NOTHING = b"*\n"

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._put_begun = None          # (words, items) of a put that is still to end

    def _parse(self, data):
        pos = 0
        settings = self.broker.settings
        while self.state is READY and self.load <= self.broker.share:
            words, items = self._put_begun or (None, None)
            if pos and items is None and len(self.broker.dirty) > _MOST_DIRTY:
                self._pass_turn()
                break
            limit = settings.max_line if items is None else min(
                MAX_TEXT_ITEM, settings.max_item_size)
            eol = data.find(b"\n", pos, pos + limit + 2)
            try:
                if eol < 0:
                    if len(data) - pos > limit + 1:
                        raise Refused("CLIENT_ERROR", "Line too long.", close=True)
                    if self.unparsed > MAX_TEXT_PUT:
                        raise Refused("CLIENT_ERROR", "Items are too large together; limit=%d"
                                      % MAX_TEXT_PUT, close=True)
                    self._needed = int(items is not None)
                    break
                line = data[pos:eol]
                pos = eol + 1
                waits = None
                if items is None:
                    waits = self._command(line.split())
                elif line in (b"", b"\r"):
                    self._put_begun = None
                    is_put = words and words[0].lower() == b"put"
                    waits = self._put_items(words, items) if is_put else self._command(words)
                elif len(items) == MAX_TEXT_ITEMS:
                    raise Refused("CLIENT_ERROR", "Too many items; limit=%d" % MAX_TEXT_ITEMS,
                                  close=True)
                else:
                    items.append(line)
                if waits:
                    self._begin(waits)
            except (Refused, OSError) as error:
                self._refuse(error)
        return pos

    def _command(self, words):
        if words and words[-1].endswith(b":"):             # items follow
            words[-1] = words[-1][:-1]
            self._put_begun = list(filter(None, words)), []
            return None
        name = words[0].lower().decode("latin-1") if words else ""
        method = getattr(self, "do_" + name, None)
        if method is None:
            # A web page could have a browser send items, or commands, as the body of a POST.
            raise Refused("CLIENT_ERROR", " ".join(["Unknown command:", *map(
                os.fsdecode, words[:1])]), close=name in ("post", "host:"))
        return method(words)

    def _say_error(self, error):
        self._say(self._failure(error.why, None))

    def _failure(self, why, answer):
        return b"-%b\n" % os.fsencode(why)

    def _named(self, words):
        if len(words) < 2:
            raise Refused("CLIENT_ERROR", "Queue name required.")
        return _name(words[1])

    def _number_at(self, words, place, what, default=0):
        try:
            return _number(words[place], what) if len(words) > place else default
        except Refused:
            raise Refused("CLIENT_ERROR", "Error parsing %s." % what) from None

    @property
    def unparsed(self):
        return super().unparsed + (sum(map(len, self._put_begun[1])) if self._put_begun else 0)

    def end(self):
        self._put_begun = None
        super().end()

    # -- commands

    def _put_items(self, words, items):
        """put <queue> [<milliseconds>]: and the items, up to an empty line"""
        self._named(words)
        expiry = self._number_at(words, 2, "expiration time")
        self._check_writes()
        if len(words) > 2:
            expiry = min(max(self.now + expiry, 1), _LATEST)
        route = yield from self._route(words[1])
        count = yield from self._put(route, items, 0, expiry)
        self._say(b"+%d\n" % count)

    def do_put(self, words):
        self._named(words)
        self._say(b"+0\n")

    def do_get(self, words):
        """get <queue> [<milliseconds>]: closes the read before, and opens the next"""
        return self._read_items(words, 1)

    def do_peek(self, words):
        """peek <queue> [<milliseconds>]"""
        return self._read_items(words, 1, peek=True)

    def do_monitor(self, words):
        """monitor <queue> <milliseconds> [<items>]"""
        count = self._number_at(words, 3, "count", UNLIMITED)
        return self._read_items(words, max(count, 1), monitor=True)

    def _read_items(self, words, count, peek=False, monitor=False):
        name = self._named(words)
        wait = self._number_at(words, 2, "timeout")
        self._check_reads()
        queue = self.broker.find(name) if peek else (yield from self._queue(name))
        if queue and not peek and not monitor:
            if not self._may_open(queue, closing=1):
                raise Refused("CLIENT_ERROR", "Too many open transactions; limit=%d"
                              % self.broker.settings.max_open_transactions)
            self._end_reads(queue, 1, True)

        def say(item):
            self._rest_on(queue, item if peek else True)
            self._say(b":%b\n" % item.data)

        last = yield from self._read_each(queue, count, wait, peek, say)
        if last is None or monitor:
            self._say(self.NOTHING)

    def do_confirm(self, words):
        """confirm <queue> <count>"""
        if len(words) < 3 or not words[2].isdigit() or len(words[2]) > 20:
            raise Refused("CLIENT_ERROR", "Queue name & count required.")
        count = int(words[2])
        if not self._confirm(self.broker.find(_name(words[1])), count):
            raise Refused("CLIENT_ERROR", "Not that many transactions open.")
        self._say(b"+%d\n" % count)


# The types and kinds of messages of Thrift's binary protocol.
_BOOL, _BYTE, _DOUBLE, _I16, _I32, _I64, _STRING, _STRUCT, _MAP, _SET, _LIST = (
    2, 3, 4, 6, 8, 10, 11, 12, 13, 14, 15)
_CALL, _REPLY, _EXCEPTION, _ONEWAY = 1, 2, 3, 4
_UNKNOWN_METHOD, _INTERNAL_ERROR, _PROTOCOL_ERROR = 1, 6, 7
_STRICT = -0x7fff0000                    # 0x80010000, and the kind of message
_THRIFT_NUMBERS = {_BOOL: struct.Struct(">b"), _BYTE: struct.Struct(">b"),
                   _DOUBLE: struct.Struct(">d"), _I16: struct.Struct(">h"),
                   _I32: struct.Struct(">i"), _I64: struct.Struct(">q")}

# By how many bytes a frame of a Thrift client may be larger than the largest item.
_FRAME_EXTRA = 64 << 10

# The most items, and the most bytes, that one get of a Thrift client is given.
_MOST_ITEMS = 2000
_MOST_BYTES = 16 << 20

# The most values in one call of a Thrift client, and what a call adds to the load.
_MOST_VALUES = 10100
_CALL_COST = 4 << 10

# The numbers of kestrel.thrift's enum Status.
_THRIFT_STATUSES = {"QUIESCENT": 1, "READONLY": 2, "UP": 3, "WRITEAVOID": 3}


def _thrift_value(kind, data, pos, left, depth=0):
    """Return the value at data[pos] and where it ends. A struct becomes a dict of
    {field: (kind, value)}. left: a list with the number of values that may still come. Raises
    ValueError and struct.error."""
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

    hangs_up = False

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._head = None               # (strict, name, sequence number, oneway) of the call
        # queue -> xids that go back by themselves; it does not keep a deleted queue in memory.
        self._lent = weakref.WeakKeyDictionary()

    def _parse(self, data):
        pos = 0
        most = self.broker.settings.max_item_size + _FRAME_EXTRA
        while self.state is READY and self.load <= self.broker.share and len(data) - pos >= 4:
            if pos and len(self.broker.dirty) > _MOST_DIRTY:
                self._pass_turn()
                break
            size, = struct.unpack_from(">i", data, pos)
            if not 0 < size <= most:
                log.warning("%s sent a frame of %d bytes; closed", self.who, size)
                self.end()
                break
            end = pos + 4 + size
            if len(data) < end:
                self._needed = 4 + size
                break
            self._call(data[pos + 4:end])
            pos = end
        return pos

    def _call(self, frame):
        self.load += _CALL_COST
        try:
            self._head, kind, pos = _thrift_head(frame)
        except (ValueError, struct.error):
            self.end()
            return
        name = self._head[1].decode("utf-8", "replace")
        try:
            if name not in _THRIFT_METHODS or kind not in (_CALL, _ONEWAY):
                raise Refused(_UNKNOWN_METHOD, "unknown method %s" % name)
            waits = getattr(self, "do_" + name)(*_thrift_arguments(name, frame, pos))
            if waits:
                self._begin(waits)
        except (Refused, OSError) as error:
            self._refuse(error)

    def _answer(self, result):
        """Answer the call in hand with the fields of its result."""
        self._say(_thrift_frame(self._head, _REPLY, result))

    def _say_error(self, error):
        kind = error.kind if isinstance(error.kind, int) else _INTERNAL_ERROR
        self._say(self._failure(error.why, None, kind))

    def _failure(self, why, answer, kind=_INTERNAL_ERROR):
        """Return a TApplicationException, in the place of an answer, or of the one to come."""
        head = self._head if answer is None else _thrift_head(answer[4:])[0]
        return _thrift_frame(head, _EXCEPTION,
                             _string_field(1, os.fsencode(why)) + _i32_field(2, kind))

    def turn_away(self, error):
        if self.command is None:             # there is no call to be answered
            self.end()
        else:
            super().turn_away(error)

    def _fail(self, failed, entries):
        ended = [(queue, xid) for queue, xid, *_ in self.ended if queue in failed]
        super()._fail(failed, entries)
        # The items of a get that could not be confirmed go back: the client has no ids of them.
        for queue in failed:
            xids = [xid for other, xid in ended if other is queue and queue.is_open(xid)]
            for xid in xids:
                del self.open_reads[queue][xid]
            queue.abort(*xids, orphaned=True)

    # -- the methods of the service

    def do_put(self, key, items, expiration):
        self._check_writes()
        if any(len(item) > self.broker.settings.max_item_size for item in items):
            raise Refused("SERVER_ERROR", "object too large for cache")
        expiry = self.now + expiration if expiration > 0 else 0
        route = yield from self._route(key)
        count = yield from self._put(route, items, 0, expiry)
        self._answer(_i32_field(0, count))

    def do_get(self, name, most, timeout, auto_abort):
        """Get up to `most` items. auto_abort: in how many milliseconds they go back if they are
        not confirmed, 0 if they are taken for good."""
        self._check_reads()
        wait, most, auto_abort = timeout > 0, min(most, _MOST_ITEMS), max(auto_abort, 0)
        if wait:
            self.timeout = timeout
        queue = yield from self._queue(_name(name))
        # Open, so that they go back if the client leaves, or if a later step fails.
        opening = wait or auto_abort > 0 or most > 1
        if auto_abort and queue:
            most = min(most, self._room(queue))
        items = []
        size = 0
        try:
            while queue and len(items) < most and size < _MOST_BYTES:
                _, item = yield from self._next([queue], opening, False, wait)
                if item is None:
                    break
                if opening:
                    queue.limit(item.xid, None)        # it must not time out while others come
                items.append(item)
                size += len(item.data)
                self._rest_on(queue)
        except BaseException:
            if queue:
                queue.abort(*self.open_reads.pop(queue, ()), orphaned=True)
            raise
        for xid, read in self.open_reads.pop(queue, {}).items():
            if auto_abort:
                self._lent.setdefault(queue, []).append(xid)
                queue.limit(xid, min(auto_abort, queue.config.open_transaction_timeout
                                     or auto_abort))
            else:
                queue.confirm(xid)
                self.ended.append((queue, xid, None, read, queue.history.logged))
        if queue:
            self._rest_on(queue)
        self._count_read(queue, items[0] if items else None)
        self._answer(
            struct.pack(">bhbi", _LIST, 0, _STRUCT, len(items)) + b"".join([
                _string_field(1, item.data)
                + struct.pack(">bhqb", _I64, 2, item.xid if auto_abort else 0, 0)
                for item in items]))

    def _room(self, queue):
        """Return how many more items of a queue the client may have that go back by themselves.
        Raises Refused if it may have none."""
        lent = list(filter(queue.is_open, self._lent.pop(queue, ())))
        if lent:
            self._lent[queue] = lent
        limit = self.broker.settings.max_open_transactions
        if len(lent) >= limit:
            raise Refused("ERROR", "too many open reads of %s; limit=%d" % (queue.name, limit))
        return limit - len(lent)

    def do_confirm(self, name, ids):
        self._end_ids(name, ids, lambda queue, xids: sum(map(queue.confirm, xids)))

    def do_abort(self, name, ids):
        self._end_ids(name, ids, lambda queue, xids: queue.abort(*sorted(xids), now=self.now))

    def _end_ids(self, name, ids, end):
        queue = self.broker.find(_name(name))
        count = 0
        if queue:
            count = end(queue, list(dict.fromkeys(ids)))
            self._rest_on(queue)
        self._answer(_i32_field(0, count))

    def do_peek(self, name):
        self._check_reads()
        queue = self.broker.find(_name(name))
        _, item = yield from self._next([queue], False, True, False)
        self._count_read(queue, item, True)
        stats = collections.defaultdict(int, self.broker.queue_stats(queue, self.now)
                                        if queue else ())
        if item is not None:
            self._rest_on(queue, item)
        self._answer(
            struct.pack(">bh", _STRUCT, 0)
            + (_string_field(1, item.data) if item is not None else b"")
            + b"".join([struct.pack(">bhq", _I64, field, stats[key]) for field, key in enumerate(
                ("items", "bytes", "logsize", "age"), 2)])
            + _i32_field(6, stats["waiters"]) + _i32_field(7, stats["open_transactions"])
            + b"\0")

    def do_flush_queue(self, name):
        self._flush(_name(name))
        self._answer(b"")

    def do_flush_all_queues(self):
        yield from self._flush_all("flush_all_queues")
        self._answer(b"")

    def do_delete_queue(self, name):
        yield from self._delete(_name(name), "delete_queue")
        self._answer(b"")

    def do_current_status(self):
        self._answer(_i32_field(0, _THRIFT_STATUSES[self.broker.status]))

    def do_set_status(self, number):
        word = next((word for word, known in _THRIFT_STATUSES.items() if known == number),
                    "status %d" % number)
        self._set_status(word, "set_status")
        self._answer(b"")

    def do_get_version(self):
        self._answer(_string_field(0, __version__.encode()))


def _thrift_head(frame):
    """Return ((strict, name, sequence number, oneway), kind of message, where its struct begins).
    Raises ValueError and struct.error."""
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


def _thrift_arguments(name, frame, pos):
    """Return the arguments of a call, from the struct at frame[pos]. Raises Refused."""
    try:
        fields, _ = _thrift_value(_STRUCT, frame, pos, [_MOST_VALUES])
    except (ValueError, struct.error) as error:
        raise Refused(_PROTOCOL_ERROR, str(error)) from None
    values = []
    for number, (kind, of, default) in enumerate(_THRIFT_METHODS[name], 1):
        given, value = fields.get(number, (kind, default))
        if given != kind or value is None:
            raise Refused(_PROTOCOL_ERROR, "field %d of %s is missing, or of another type"
                          % (number, name))
        if of and not all(type(one) is of for one in value):
            raise Refused(_PROTOCOL_ERROR,
                          "items must be binary" if of is bytes else "ids must be integers")
        values.append(value)
    return values


def _thrift_frame(head, kind, fields):
    """Return a message, a struct of these fields, in answer to the call of this head; b"" if the
    call is oneway."""
    strict, name, number, oneway = head
    if oneway:
        return b""
    head = (struct.pack(">ii", _STRICT | kind, len(name)) + name + struct.pack(">i", number)
            if strict else
            struct.pack(">i", len(name)) + name + struct.pack(">bi", kind, number))
    return struct.pack(">i", len(head) + len(fields) + 1) + head + fields + b"\0"


def _string_field(field, data):
    return struct.pack(">bhi", _STRING, field, len(data)) + data


def _i32_field(field, number):
    return struct.pack(">bhi", _I32, field, number)


# The arguments of the methods: Thrift's type, Python's type of the elements of a list or set, and
# the default, None if it must be given.
_THRIFT_NAME = _STRING, None, None
_THRIFT_IDS = _SET, int, None
_THRIFT_METHODS = {
    "put": (_THRIFT_NAME, (_LIST, bytes, None), (_I32, None, 0)),
    "get": (_THRIFT_NAME, (_I32, None, None), (_I32, None, 0), (_I32, None, 0)),
    "confirm": (_THRIFT_NAME, _THRIFT_IDS),
    "abort": (_THRIFT_NAME, _THRIFT_IDS),
    "peek": (_THRIFT_NAME,),
    "flush_queue": (_THRIFT_NAME,),
    "flush_all_queues": (),
    "delete_queue": (_THRIFT_NAME,),
    "current_status": (),
    "set_status": ((_I32, None, None),),
    "get_version": (),
}


# == 8. Admin =============================================================================
#
# HTTP for those who watch the server: figures, metrics, checks for load balancers, a page for a
# browser. A session like the others: bytes in, bytes out. Knows HTTP and the broker; no sockets.

# The longest head of an HTTP request, and the longest body.
MAX_HEAD = 16384
MAX_BODY = 65536

# How many bytes of an item the page shows, and how many items of a queue.
_SHOWN = 2000
_SHOWN_ITEMS = 20

# The statistics in the page's table of queues.
_SHOWN_STATS = [one for one in QUEUE_STATS if one.name in (
    "items", "bytes", "logsize", "waiters", "open_transactions", "delayed", "head_wait",
    "put_rate", "get_rate")]

_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
_HTML = "text/html; charset=utf-8"
# https://prometheus.io/docs/instrumenting/exposition_formats/
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

# Factors that convert a value to seconds, by the end of its name in /stats.json.
_SCALES = {"usec": 1e-6, "msec": 1e-3, "time": 1e-3}

# How many pieces of a report are put together before other work gets its turn, and how many
# figures are one piece of /stats.json.
_LINES_STEP, _FIGURES_STEP = 400, 20


def _shown_name(name):
    """Return a printable, unambiguous form of the name of a queue: no name has a slash in it."""
    return re.sub("[\udc80-\udcff]", lambda match: "/x%02x" % (ord(match[0]) - 0xdc00), name)


def _label(name):
    """Return the label with the name of a queue in the Prometheus text format."""
    return '{queue="%s"}' % (
        _shown_name(name).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n"))


def _key_of(name):
    """Return the name of a queue as the page puts it into a query."""
    return urllib.parse.quote(os.fsencode(name), safe="")


def _scale(name):
    return _SCALES.get(name.rpartition("_")[2], 1)


# A request. query: {parameter: [its values]}. headers: by name in lower case. keep_alive: the
# connection stays open after the answer. chunked: the client knows HTTP/1.1.
HttpRequest = collections.namedtuple(
    "HttpRequest", "method path query headers keep_alive chunked body")

# What is answered when a request cannot be understood.
_NO_REQUEST = HttpRequest("GET", "", {}, {}, False, False, b"")


def _parse_request(head):
    """Return the HttpRequest that has this head, without its body, and the size of the body.
    Raises ValueError."""
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not re.fullmatch(r"HTTP/1\.[01]", words[2]):
        raise ValueError("not a request of HTTP/1.1: %.100r" % first)
    headers = {}
    for text in lines:
        name, colon, value = text.partition(":")
        if (not colon or not re.fullmatch(r"[!#-'*+.^-z|~A-Z0-9-]+", name)
                or re.search("[\r\n\0]", value)):
            raise ValueError("not a header: %.100r" % text)
        name = name.lower()
        if name in headers and name in ("content-length", "host", "origin", "sec-fetch-site"):
            raise ValueError("duplicate %s" % name)
        headers[name] = value.strip(" \t")
    if not re.fullmatch("[0-9]{1,18}", headers.get("content-length", "0")):
        raise ValueError("bad Content-Length")
    if "transfer-encoding" in headers:
        raise ValueError("a body must have a Content-Length here")
    parts = urllib.parse.urlsplit(words[1])
    # Unquoted bytes are taken as they are. A + is no blank: it is part of the name of a child.
    query = os.fsdecode(parts.query.encode("latin-1")).replace("+", "%2B")
    is_new = words[2] == "HTTP/1.1"
    keep_alive = is_new and "close" not in headers.get("connection", "").lower()
    return HttpRequest(
        words[0], parts.path, urllib.parse.parse_qs(query, errors="surrogateescape"), headers,
        keep_alive, is_new, b""), int(headers.get("content-length", 0))


class AdminSession(Session):
    """One client of the admin port: HTTP/1.1 (RFC 9112), as much of it as monitoring, load
    balancers and a browser need. Requests are answered one after the other."""

    hangs_up = False
    idle_timeout = 60000
    _request = _NO_REQUEST               # the one in hand

    def _parse(self, data):
        pos = 0
        while self.state is READY and self.load <= self.broker.share:
            self._request = _NO_REQUEST
            try:
                while data[pos:pos + 2] == b"\r\n":        # RFC 9112, 2.2
                    pos += 2
                end = data.find(b"\r\n\r\n", pos, pos + MAX_HEAD)
                line = data[pos:data.find(b"\n", pos, pos + MAX_HEAD) + 1]
                if data[pos:] and not data[pos:pos + 1].isalpha() or line and b"HTTP/" not in line:
                    raise ValueError("not a request of HTTP/1.1")    # TLS, or a memcache client
                if end < 0 and data.find(b"\n\n", pos, pos + MAX_HEAD) >= 0:
                    raise ValueError("lines end in CRLF")    # nothing else would come
                if end < 0:
                    if len(data) - pos >= MAX_HEAD:
                        self._respond(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
                    break
                request, size = _parse_request(data[pos:end])
            except ValueError as error:
                self._respond(HTTPStatus.BAD_REQUEST, str(error))
                break
            if size > MAX_BODY:
                self._respond(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
                break
            stop = end + 4 + size
            if len(data) < stop:
                self._needed = stop - pos    # so this place is reached once for a request
                if request.chunked and request.headers.get("expect", "").lower() == "100-continue":
                    self._say(b"HTTP/1.1 100 Continue\r\n\r\n")
                break
            self._request = request._replace(body=data[end + 4:stop])
            pos = stop
            self._begin(self._serve())
        return pos

    def _serve(self):
        """Answer the request in hand: a generator."""
        path = self._request.path
        method, call = _ADMIN_PATHS.get(path, (None, None))
        allowed = ("POST",) if method == "POST" else ("GET", "HEAD")
        if call is None:
            self._respond(HTTPStatus.NOT_FOUND)
        elif self._request.method not in allowed:
            self._respond(HTTPStatus.METHOD_NOT_ALLOWED, header="Allow: " + ", ".join(allowed))
        elif (method == "POST" or path in _READING) and not self._is_from_here():
            self._respond(HTTPStatus.FORBIDDEN, "only pages of this server may ask for this, "
                          "under one of its names (admin_hosts)")
        elif self.broker.config.users is not None and path not in _PROBES and not (
                yield from self._is_known()):
            self._respond(HTTPStatus.UNAUTHORIZED,
                          header='WWW-Authenticate: Basic realm="kestrel"')
        else:
            told = call(self)
            if isinstance(told, types.GeneratorType):
                told = yield from told
            if isinstance(told, dict):
                self._respond(HTTPStatus.OK, json.dumps(told), _JSON)
            elif told is not None:
                self._respond(HTTPStatus.OK, told)

    def _is_from_here(self):
        """Return whether the request comes from a page of this server, or from no page at all. A
        page of another site that a user has open could send requests in the user's name, even
        under a host name that the site's owner has pointed at this server (DNS rebinding)."""
        headers = self._request.headers
        host = headers.get("host", "")
        try:
            name = urllib.parse.urlsplit("//" + host).hostname or "localhost"
            origin = urllib.parse.urlsplit(headers.get("origin", "//" + host)).netloc
        except ValueError:                   # not the address of a page of this server
            return False
        try:
            ipaddress.ip_address(name)       # without DNS, nobody else can point it here
        except ValueError:
            settings = self.broker.settings
            if name.lower() not in ("localhost", os.uname().nodename.lower(),
                                    *map(str.lower, settings.listen + settings.admin_hosts)):
                return False
        return headers.get("sec-fetch-site", "none") in ("same-origin", "none") and origin == host

    def _is_known(self):
        """Return whether the request has a valid name and password (RFC 7617)."""
        self.user = None
        scheme, _, token = self._request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                name, _, password = base64.b64decode(token, validate=True).partition(b":")
            except ValueError:
                return False
            yield from self._log_in(name, password)
        return self.user is not None

    # -- answers

    def _respond(self, status, body=None, kind=_TEXT, header=None):
        """Answer the request in hand. body: bytes, or text; None for what the status says."""
        if not isinstance(body, bytes):
            text = (status.phrase if body is None else body).rstrip("\n") + "\n"
            body = text.encode("utf-8", "backslashreplace")
        head = self._head(status, kind, "Content-Length: %d" % len(body), header)
        self._say(head + (b"" if self._request.method == "HEAD" else body))
        if not self._request.keep_alive:
            self.end()

    def _head(self, status, kind, *headers):
        lines = ["HTTP/1.1 %d %s" % (status, status.phrase), "Content-Type: " + kind,
                 "Cache-Control: no-store", "X-Content-Type-Options: nosniff",
                 *filter(None, headers)]
        if kind == _HTML:
            lines.append("Content-Security-Policy: " + _page_policy())
        if not self._request.keep_alive or self.is_over():
            lines.append("Connection: close")
        return "\r\n".join(lines + ["", ""]).encode()

    def _stream(self, kind, pieces, step=_LINES_STEP):
        """Answer with the pieces of text of a generator, `step` in each turn, so that a report is
        never in memory as a whole."""
        self._say(self._head(HTTPStatus.OK, kind,
                             "Transfer-Encoding: chunked" if self._request.chunked else None))
        yield
        if self._request.method != "HEAD":
            for some in _batches(pieces, step):
                data = "".join(some).encode("utf-8", "backslashreplace")
                if data:                     # a chunk of nothing would be the end
                    self._say(b"%x\r\n%b\r\n" % (len(data), data) if self._request.chunked
                              else data)
                yield
            if self._request.chunked:
                self._say(b"0\r\n\r\n")
        if not self._request.keep_alive:
            self.end()

    def _say_error(self, error):
        self._respond(
            error.kind if isinstance(error.kind, HTTPStatus) else
            HTTPStatus.FORBIDDEN if error.reason == "denied" else
            HTTPStatus.BAD_REQUEST if error.kind == "CLIENT_ERROR" else
            HTTPStatus.SERVICE_UNAVAILABLE if error.close else HTTPStatus.INTERNAL_SERVER_ERROR,
            error.why)

    def _failure(self, why, answer):
        return b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: %d\r\n\r\n%b\n" % (
            len(os.fsencode(why)) + 1, os.fsencode(why))

    # -- what is asked for

    # Each returns its answer, or is a generator that does: text, a dict that is sent as JSON, or
    # None if it has answered itself.

    def _probe(self, why):
        if why:
            self._respond(HTTPStatus.SERVICE_UNAVAILABLE, why)
        return None if why else "OK"

    def _figures(self):
        """Yield all figures by the names of Kestrel's metrics, as (kind, (name, value) pairs)."""
        yield "counters", self._figures_of("counter")
        yield "gauges", self._figures_of("gauge")
        yield "labels", [("status", self.broker.status), ("version", __version__)]
        yield "metrics", [(name, one.figures()) for name, one in self.broker.metrics.items()]

    def _figures_of(self, kind):
        for one in SERVER_STATS:
            if one.kind == kind:
                yield one.ostrich, json.loads(str(one.get(self.broker, self.now)))
        for queue in self._queues():
            name = _shown_name(queue.name)
            for one in QUEUE_STATS:
                if one.kind == kind:
                    yield "q/%s/%s" % (name, one.ostrich), one.get(queue, self.now)

    def _json_pieces(self):
        before = "{"
        for kind, pairs in self._figures():
            yield '%s"%s":{' % (before, kind)
            before = ""
            for some in _batches(pairs, _FIGURES_STEP):      # one by one takes three times as long
                yield before + json.dumps(dict(some), separators=(",", ":"))[1:-1]
                before = ","
            yield "}"
        yield "}\n"

    def _text_pieces(self):
        for kind, pairs in self._figures():
            yield "%s:\n" % kind
            for name, value in pairs:
                if isinstance(value, dict):
                    value = ", ".join("%s=%s" % pair for pair in value.items())
                yield "  %s: %s\n" % (name, value)

    def _metric_lines(self):
        broker, now = self.broker, self.now
        yield from _metric("build_info", "gauge", "The version.", [
            ('{version="%s",python="%s"}' % (
                __version__, ".".join(map(str, sys.version_info[:3]))), 1)])
        yield from _metric("status", "gauge", "1 for the status that the server has.", [
            ('{status="%s"}' % status.lower(), int(status == broker.status))
            for status in STATUSES])
        yield from _metric("refused_total", "counter", "Commands refused, by the reason.", [
            ('{reason="%s"}' % reason, count) for reason, count in sorted(broker.refused.items())])
        if broker.free_space is not None:
            yield from _metric("spool_free_bytes", "gauge", "Bytes left for the spool.",
                               [("", broker.free_space)])
        if broker.scrubbed:
            files, damaged, when = broker.scrubbed
            for name, value, what in (("files", files, "Journal files"),
                                      ("damaged_files", damaged, "Damaged journal files"),
                                      ("timestamp_seconds", when // 1000, "The time")):
                yield from _metric("scrub_" + name, "gauge", what + " of the last scrub.",
                                   [("", value)])
        yield from _metric(
            "journal_failed", "gauge", "1 while the journal of a queue cannot be written or read.",
            ((_label(queue.name), 1) for queue in list(broker.failing)))
        for one in SERVER_STATS:
            if one.kind:
                yield from _metric(one.metric, one.kind, one.help, [("", one.get(broker, now))])
        for key, (name, what) in METRICS.items():
            samples = _histogram(broker.metrics[key], _scale(key))
            yield from _metric(name, "histogram", what, samples)
        queues = []
        for queue in self._queues():
            queues.append((_label(queue.name), queue))
            yield ""                         # it takes several steps if there are many
        for one in QUEUE_STATS:
            if one.kind:
                name, get, scale = "queue_" + one.metric, one.get, _scale(one.ostrich)
                yield from _metric(name, one.kind, one.help, ())
                line = "kestrel_" + name + "%s %.12g\n"
                for some in _batches(queues, QUEUES_STEP):       # this halves the time
                    yield from [line % (label, get(queue, now) * scale) for label, queue in some]

    # -- for the page

    def _page_pieces(self):
        broker = self.broker
        head = json.dumps({
            "version": __version__, "uptime": int(broker.uptime()),
            "put_rate": round(broker.stats.put_rate, 1),
            "get_rate": round(broker.stats.get_rate, 1),
            "status": broker.status, "connections": len(broker.clients),
            "items": broker.totals().items, "host": os.uname().nodename,
            "trouble": broker.why_not_readable() or broker.why_not_writable()})
        yield head[:-1] + ', "queues": '
        yield from _json_list(map(self._queue_row, self._queues()))
        yield "}\n"

    def _queue_row(self, queue):
        """Return what the page's table shows of a queue."""
        row = {one.name: one.get(queue, self.now) for one in _SHOWN_STATS}
        row.update(name=_shown_name(queue.name), key=_key_of(queue.name),
                   paused=PAUSES[queue.paused], failing=queue in self.broker.failing,
                   children=len(self.broker.children.get(queue.name, ())))
        return row

    def _connections(self):
        self._check_admin("clients")
        return self._stream(_JSON, _json_list(self._clients()))

    def _history_json(self):
        queues = self._queues(self._request.query.get("queue", [])[:QUEUES_STEP * 4])
        return {_key_of(queue.name): self.broker.history(queue) for queue in queues}

    def _first_items(self, most, shown):
        """Return the queue that the request names, and what shown() returns of its first items."""
        self._check_reads()
        queue = self._asked_queue()
        self._check_user("get_users", queue.name)
        while queue.discard_expired(self.now, SWEEP_STEP):
            yield
        found = []
        for some in queue.browse(most, self.now):
            found += map(shown, some)
            del some                         # before more is read
            yield
        if queue.closed:
            raise Refused(HTTPStatus.NOT_FOUND, "the queue has been deleted")
        return queue, found

    def _peek(self):
        _, rows = yield from self._first_items(1, self._item_row)
        return {"item": rows[0] if rows else None}

    def _item_row(self, item):
        """Return what the page shows of an item."""
        begin = item.data[:_SHOWN]
        return {"bytes": len(item.data), "flags": item.flags, "deliveries": item.deliveries,
                "age_msec": max(0, self.now - item.add_time),
                "expires_msec": max(0, item.expiry - self.now) if item.expiry else None,
                "text": begin.decode("utf-8", "backslashreplace"),
                "base64": base64.b64encode(begin).decode()}

    def _queue_json(self):
        """Return all that the page shows of one queue."""
        queue, rows = yield from self._first_items(_SHOWN_ITEMS, self._item_row)
        return {
            "name": _shown_name(queue.name), "key": _key_of(queue.name),
            "paused": PAUSES[queue.paused], "settings": queue.config.lines(),
            "stats": dict(self.broker.queue_stats(queue, self.now)),
            "children": [_shown_name(child.name)
                         for child in self.broker.children.get(queue.name, ())],
            "items": rows, "readers": list(self._clients(queue)),
            "history": self.broker.history(queue)}

    def _item(self):
        """Answer with the data of one of the first items."""
        number = self._asked("n", "0")
        number = int(number) if re.fullmatch("[0-9]{1,4}", number) else _SHOWN_ITEMS
        place = itertools.count()
        _, items = yield from self._first_items(
            min(number + 1, _SHOWN_ITEMS),
            lambda item: item.data if next(place) == number else None)
        if number >= len(items):
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such item")
        self._respond(HTTPStatus.OK, items[number], "application/octet-stream",
                      "Content-Disposition: attachment; filename=item")

    # -- what changes something

    def _asked(self, name, default=None):
        """Return a parameter of the request. Raises Refused if it is missing, and must not be."""
        value = self._request.query.get(name, [default])[0]
        if value is None:
            raise Refused("CLIENT_ERROR", "the parameter %s is missing" % name)
        return value

    def _asked_queue(self):
        """Return the queue that the request names. Raises Refused."""
        queue = self.broker.find(self._asked("queue"))
        if queue is None:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such queue")
        return queue

    def _post_flush(self):
        self._flush(self._asked_queue().name)
        return "flushed"

    def _post_delete(self):
        yield from self._delete(self._asked_queue().name)
        return "deleted"

    def _post_put(self):
        """Put the body as an item into the queue that the request names, made if it is new."""
        self._check_writes()
        key = os.fsencode(self._asked("queue"))
        self._check_put(key)
        route = yield from self._route(key)
        if not (yield from self._put(route, [self._request.body])):
            raise Refused("CLIENT_ERROR", "the queue is full or paused", reason="full")
        return "stored"

    def _post_move(self):
        dest = _name(os.fsencode(self._asked("dest")))
        moved = yield from self._move(self._asked_queue().name, dest)
        return "%d moved" % moved

    def _post_pause(self):
        queue = self._asked_queue()
        what = self._asked("what", "in and out")
        if what not in PAUSES:
            raise Refused("CLIENT_ERROR", "what is one of: " + ", ".join(PAUSES))
        self._pause(queue.name, PAUSES.index(what))
        return "paused: %s" % PAUSES[queue.paused]

    def _post_kick(self):
        self._check_admin("kick")
        if not self._kick(_number(os.fsencode(self._asked("id")), "id")):
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such client")
        return "closed"

    def _change_status(self, word):
        self._set_status(word)
        return self.broker.status.lower()

    def _post_reload(self):
        yield from self._reload()
        return "reloaded"

    def _post_shutdown(self):
        self._shutdown()
        return "stopping"


def _metric(name, kind, what, samples):
    """Yield the lines of a metric in the Prometheus text format. samples: (what follows the name,
    value) pairs."""
    yield "# HELP kestrel_%s %s\n# TYPE kestrel_%s %s\n" % (name, what, name, kind)
    for labels, value in samples:
        yield "kestrel_%s%s %s\n" % (name, labels, value)


def _histogram(histogram, scale):
    """Yield the samples of a Histogram. scale: the factor that converts its values to seconds."""
    histogram.count()
    seen = 0
    for bits, count in enumerate(histogram.buckets):
        seen += count
        if bits <= histogram.longest.bit_length():
            yield '_bucket{le="%.9g"}' % (((1 << bits) - 1) * scale), seen
    yield '_bucket{le="+Inf"}', seen
    yield "_count", seen
    yield "_sum", "%.9g" % (histogram.total * scale)


def _json_list(rows):
    """Yield a list in JSON, an element at a time."""
    yield "["
    comma = ""
    for row in rows:
        yield comma + json.dumps(row)
        comma = ",\n"
    yield "]"


# What can be requested: path -> (method, the function that is called with the session).
_ADMIN_PATHS = {
    "/": ("GET", lambda session: session._respond(HTTPStatus.OK, _PAGE, _HTML)),
    "/ping": ("GET", lambda session: "pong"),
    "/status": ("GET", lambda session: session.broker.status),
    "/readable": ("GET", lambda session: session._probe(session.broker.why_not_readable())),
    "/writable": ("GET", lambda session: session._probe(session.broker.why_not_writable())),
    "/stats.json": ("GET", lambda session: session._stream(
        _JSON, session._json_pieces(), _LINES_STEP // _FIGURES_STEP)),
    "/stats.txt": ("GET", lambda session: session._stream(_TEXT, session._text_pieces())),
    "/metrics": ("GET", lambda session: session._stream(_PROMETHEUS, session._metric_lines())),
    "/queues.json": ("GET", lambda session: session._stream(_JSON, session._page_pieces())),
    "/history.json": ("GET", AdminSession._history_json),
    "/connections.json": ("GET", AdminSession._connections),
    "/peek": ("GET", AdminSession._peek),
    "/queue.json": ("GET", AdminSession._queue_json),
    "/item": ("GET", AdminSession._item),
    "/put": ("POST", AdminSession._post_put),
    "/move": ("POST", AdminSession._post_move),
    "/pause": ("POST", AdminSession._post_pause),
    "/kick": ("POST", AdminSession._post_kick),
    "/set_status": ("POST", lambda session: session._change_status(session._asked("to"))),
    "/flush": ("POST", AdminSession._post_flush),
    "/delete": ("POST", AdminSession._post_delete),
    "/reload": ("POST", AdminSession._post_reload),
    "/quiesce": ("POST", lambda session: session._change_status("quiescent")),
    "/shutdown": ("POST", AdminSession._post_shutdown),
}

# Paths that show items: not for pages of other sites.
_READING = ("/peek", "/queue.json", "/item")

# Paths for load balancers, which have no password.
_PROBES = ("/ping", "/readable", "/writable")

# The page at /. It fetches /queues.json and the like, and shows what it gets as text only.
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Kestrel</title>
<link rel="icon" href="data:,">
<style>
:root { --ink: #1d2733; --soft: #5b6672; --line: #e2e6ea; --edge: #7d8791; --back: #fff;
  --tint: #f5f7f9; --in: #1769aa; --out: #b4540a; --bad: #b3261e; --good: #1d6b35 }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe5ea; --soft: #9aa7b3; --line: #2c353e;
  --edge: #6f7c88; --back: #14191e; --tint: #1b2127; --in: #6cb6ff; --out: #f0a35e;
  --bad: #ff8a80; --good: #7fd197 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; color: var(--ink);
  background: var(--back); font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.25rem; margin: 0 } h2 { font-size: 1.15rem; margin: 0; overflow-wrap: anywhere }
h3 { font-size: 1rem; margin: 1rem 0 .25rem }
header, .facts, .bar { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: baseline }
.bar { gap: .5rem; margin: .5rem 0 }
.facts { margin: 1rem 0; padding: 0 }
.facts div { min-width: 6rem }
dt, th, .soft { color: var(--soft); font-size: .85rem; font-weight: normal }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums }
.bad { color: var(--bad); font-weight: 600 } .good { color: var(--good) }
.some { color: var(--out); font-weight: 600 }
input, button, select, textarea { font: inherit; color: inherit; background: var(--back);
  border: 1px solid var(--edge); border-radius: .3rem; padding: .25rem .6rem }
textarea { width: 100%; min-height: 6rem }
button { cursor: pointer }
button:hover { background: var(--tint) }
button.danger { color: var(--bad); border-color: var(--bad) }
:focus-visible { outline: 2px solid var(--in); outline-offset: 1px }
.wide { overflow-x: auto; margin-top: .75rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left; white-space: normal;
  overflow-wrap: anywhere; min-width: 9rem; width: 30% }
#table td:first-child, #table th:first-child { position: sticky; left: 0; background: var(--back) }
th button, td:first-child button { border: 0; padding: 0; background: none; color: inherit;
  text-align: inherit }
td:first-child button { text-decoration: underline; text-decoration-color: var(--edge) }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
tbody tr:hover { background: var(--tint) }
td svg { display: block; width: 130px; height: 30px; overflow: visible; margin-left: auto }
path { fill: none; stroke-width: 1.3; vector-effect: non-scaling-stroke }
.depth { stroke: var(--soft) } .in { stroke: var(--in) } .out { stroke: var(--out) }
.key { display: inline-block; width: .9em; height: .2em; vertical-align: middle }
.narrow { display: none }
@media (max-width: 40rem) {
  button, input, select { min-height: 44px; min-width: 44px }
  .narrow { display: inline-block }
  #table, #table tbody { display: block }
  #table thead { display: none }
  #table th, #table td { border: 0; padding: .1rem 0; width: auto }
  #table tr { display: grid; grid-template-columns: repeat(4, 1fr); padding: .6rem 0;
    border-bottom: 1px solid var(--line) }
  td svg { margin-left: 0 }
  #table td { text-align: left; position: static }
  #table td:first-child, #table td:last-child { grid-column: 1 / -1 }
  td[data-title]:not(:first-child)::before { content: attr(data-title); display: block;
    color: var(--soft); font-size: .8rem } }
dialog { color: inherit; background: var(--back); border: 1px solid var(--edge);
  border-radius: .5rem; width: min(60rem, 96vw); max-height: 94vh }
#dialog { width: min(34rem, 92vw) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 40vh; overflow: auto;
  background: var(--tint); padding: .5rem; margin: .25rem 0 }
#chart { width: 100%; height: 11rem; display: block }
#chart text { fill: var(--soft); font-size: 11px }
</style>
<header>
  <h1>Kestrel <span id="host"></span> <span id="version" class="soft"></span></h1>
  <strong id="status">&hellip;</strong>
  <span class="soft" id="answer"></span>
  <span id="problem" class="bad" role="alert"></span>
</header>
<dl class="facts" id="facts"></dl>
<div class="bar">
  <label>Filter <input id="filter" type="search" autocomplete="off"></label>
  <label class="narrow">Sort by <select id="sort"></select></label>
  <button id="up">Status up</button> <button id="quiesce" class="danger">Quiesce</button>
  <span class="soft" id="shown" role="status"></span>
</div>
<div class="wide"><table id="table">
  <thead><tr id="heads"></tr></thead>
  <tbody id="queues"></tbody>
</table></div>
<p class="soft">Charts, the last ten minutes:
  <span class="key" style="background: var(--soft)"></span> items,
  <span class="key" style="background: var(--in)"></span> put a second,
  <span class="key" style="background: var(--out)"></span> got a second. The two rates share a
  scale.</p>
<details id="clients"><summary>Clients</summary><div class="wide"><table>
  <thead><tr id="client-heads"></tr></thead><tbody id="client-rows"></tbody></table></div></details>
<dialog id="view" aria-labelledby="name">
  <div class="bar"><h2 id="name"></h2> <span id="queue-state"></span>
    <button id="close" style="margin-left: auto">Close</button></div>
  <p class="soft" id="facts-of"></p>
  <svg id="chart" role="img" aria-label="items and rates, the last ten minutes"></svg>
  <p class="soft" id="hover" aria-live="off">&nbsp;</p>
  <div class="bar" id="actions"></div>
  <h3>First items</h3><div id="items"></div>
  <h3>Open reads</h3><div id="readers"></div>
  <details><summary>Settings in force</summary><pre id="settings"></pre></details>
</dialog>
<dialog id="dialog"><p id="question"></p><textarea id="text" hidden></textarea>
  <p class="bar"><button id="no">Cancel</button> <button id="yes"></button></p></dialog>
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
const columns = [["Queue", "name", x => x], ["Items", "items"], ["Bytes", "bytes", bytes],
  ["Oldest", "head_wait", ms => ms ? time(ms / 1000) : "–"], ["Put/s", "put_rate"],
  ["Got/s", "get_rate"], ["Open", "open_transactions"], ["Delayed", "delayed"],
  ["Waiters", "waiters"], ["Journal", "logsize", bytes]]
// The address says what is shown, so that a link to it can be shared.
const wish = new URLSearchParams(location.search)
let data = null, charts = {}, answered = 0, stopped = false, turn = 0, pressed = false
const known = new Map()                  // key of a queue -> its row
function remember(name, value) {
  if (value) wish.set(name, value)
  else wish.delete(name)
  history.replaceState(null, "", "?" + wish)
}
const sort = () => (columns.find(([title, key]) => key === wish.get("sort")) || columns[0])[1]
const down = () => wish.get("down") === "1"
function make(tag, text, parent) {
  const one = document.createElement(tag)
  one.textContent = text
  if (parent) parent.append(one)
  return one
}
function draw(tag, attributes, parent) {
  const one = document.createElementNS("http://www.w3.org/2000/svg", tag)
  for (const name in attributes) one.setAttribute(name, attributes[name])
  parent.append(one)
  return one
}
function set(one, text, kind) {
  if (one.textContent !== text) one.textContent = text
  if (kind) one.className = kind
}
function button(title, act, parent, danger) {
  const one = make("button", title, parent)
  one.onclick = act
  if (danger) one.className = "danger"
  return one
}
for (const [title, key] of columns) {
  const head = make("th", "", at("heads"))
  head.dataset.key = key
  button(title, () => order(key, sort() === key ? !down() : key !== "name"), head)
  make("option", title, at("sort")).value = key
}
make("th", "Ten minutes", at("heads"))
function order(key, isDown) {
  remember("sort", key)
  remember("down", isDown ? "1" : "")
  show()
}
at("sort").onchange = () => order(at("sort").value, at("sort").value !== "name")
function plot(svg, samples, width, height) {
  const [items, put, got] = [0, 1, 2].map(n => samples.map(sample => sample[n]))
  const most = Math.max(1, ...items), rate = Math.max(1, ...put, ...got)
  const lines = [["depth", items, most], ["in", put, rate], ["out", got, rate]]
  svg.replaceChildren()
  for (const [kind, values, top] of samples.length > 1 ? lines : [])
    draw("path", {class: kind, d: values.map((value, n) => (n ? "L" : "M")
      + (width - width * (values.length - 1 - n) / 119).toFixed(1) + " "
      + (height - 1 - (height - 2) * value / top).toFixed(1)).join("")}, svg)
  return [most, rate]
}
function rows() {
  const wanted = at("filter").value.toLowerCase(), by = sort()
  const found = data.queues.filter(queue => queue.name.toLowerCase().includes(wanted))
  found.sort((a, b) => (a[by] > b[by]) - (a[by] < b[by]) || (a.key > b.key) - 0.5)
  if (down()) found.reverse()
  return found
}
function row(queue) {
  let one = known.get(queue.key)
  if (!one) {
    one = make("tr", "")
    for (const [title] of columns) make("td", "", one).dataset.title = title
    button("", () => look(queue.key), one.firstChild)
    make("span", "", one.firstChild)
    draw("svg", {role: "img", "aria-label": "items and rates of " + queue.name},
      make("td", "", one))
    known.set(queue.key, one)
  }
  columns.forEach(([title, key, text = number.format], n) =>
    set(n ? one.children[n] : one.firstChild.firstChild, text(queue[key])))
  set(one.firstChild.lastChild, queue.failing ? " (failing)"
    : queue.paused !== "no" ? ` (paused: ${queue.paused})` : "", queue.failing ? "bad" : "some")
  plot(one.lastChild.firstChild, charts[queue.key] || [], 130, 30)
  return one
}
const facts = ["Up", "Connections", "Queues", "Items", "Put/s", "Got/s"].map(name => {
  const both = make("div", "", at("facts"))
  make("dt", name, both)
  return make("dd", "", both)
})
function show() {
  if (!data) return
  set(at("version"), data.version)
  set(at("host"), data.host)
  document.title = `${data.host}: Kestrel, ${data.status.toLowerCase()}`
  set(at("status"), data.status.toLowerCase(),
    {UP: "good", QUIESCENT: "bad"}[data.status] || "some")
  const values = [data.connections, data.queues.length, data.items, data.put_rate, data.get_rate]
  const texts = [time(data.uptime), ...values.map(number.format)]
  facts.forEach((one, n) => set(one, texts[n]))
  for (const head of at("heads").children)
    head.setAttribute("aria-sort", head.dataset.key !== sort() ? "none"
      : down() ? "descending" : "ascending")
  at("sort").value = sort()
  const found = rows()
  set(at("shown"), !data.queues.length
    ? "No queues yet: the first put or get of a name creates one."
    : !found.length ? "No queue of that name."
    : found.length > MOST_ROWS ? MOST_ROWS + " of " + found.length + " shown." : "")
  const wanted = found.slice(0, MOST_ROWS).map(row), body = at("queues")
  // A row that is pressed, or has text selected, stays where it is.
  if (pressed || !getSelection().isCollapsed && body.contains(getSelection().anchorNode)) return
  if (wanted.length !== body.children.length || wanted.some((one, n) => one !== body.children[n])) {
    const focused = document.activeElement
    body.replaceChildren(...wanted)
    if (body.contains(focused)) focused.focus()
  }
  for (const [key, one] of known) if (!one.isConnected) known.delete(key)
}
addEventListener("pointerdown", () => { pressed = true })
for (const end of ["pointerup", "pointercancel", "blur"])
  addEventListener(end, () => setTimeout(() => { pressed = false }))
async function fetched(path, options) {
  const answer = await fetch(path, {signal: AbortSignal.timeout(5000), ...options})
  if (!answer.ok) throw Object.assign(new Error((await answer.text()).trim()),
    {status: answer.status})
  return answer
}
function why(error) {
  return error.status === 401 ? "Your login is not valid any more: reload the page to log in."
    : error.status === 403 ? "You may not do this: " + error.message
    : error.status ? `The server says ${error.status}: ${error.message}`
    : "The server does not answer."
}
function ask(question, yes, act, {danger, text} = {}) {
  at("question").textContent = question
  at("text").hidden = text === undefined
  at("text").value = text || ""
  at("no").textContent = yes ? "Cancel" : "Close"
  at("yes").hidden = !yes
  at("yes").textContent = yes
  at("yes").className = danger ? "danger" : ""
  at("yes").onclick = () => { at("dialog").close(); act(at("text").value) }
  at("dialog").showModal()
}
at("no").onclick = () => at("dialog").close()
async function post(path, body) {
  try { await fetched(path, {method: "POST", body}) }
  catch (error) { ask(why(error), "", null) }
  await refresh()
}
at("up").onclick = () => post("set_status?to=up")
at("quiesce").onclick = () => ask("Refuse all puts and gets of all clients? Status up ends it.",
  "Quiesce", () => post("quiesce"), {danger: true})

// -- one queue

let viewed = null, opened = new Set()
function look(key) {
  viewed = key
  opened = new Set()
  remember("queue", key)
  at("items").replaceChildren()
  set(at("name"), (data.queues.find(queue => queue.key === key) || {name: key}).name)
  if (!at("view").open) at("view").showModal()
  view()
}
at("view").onclose = () => { viewed = null; remember("queue", "") }
at("close").onclick = () => at("view").close()
function text(item) {
  const data = Uint8Array.from(atob(item.base64), one => one.charCodeAt(0))
  try {
    const words = new TextDecoder("utf-8", {fatal: true}).decode(data,
      {stream: data.length < item.bytes})
    try { return JSON.stringify(JSON.parse(words), null, 2) } catch (error) { return words }
  } catch (error) {
    const lines = []
    for (let n = 0; n < data.length; n += 16) {
      const part = [...data.slice(n, n + 16)]
      lines.push(n.toString(16).padStart(6, "0") + "  "
        + part.map(one => one.toString(16).padStart(2, "0")).join(" ").padEnd(49)
        + part.map(one => one > 31 && one < 127 ? String.fromCharCode(one) : ".").join(""))
    }
    return lines.join("\\n")
  }
}
function item(one, n, key) {
  const box = make("details", "")
  make("summary", `${n + 1}. ${bytes(one.bytes)}, has waited ${time(one.age_msec / 1000)}`
    + (one.deliveries ? `, came back ${one.deliveries} times` : "")
    + (one.flags ? `, flags ${one.flags}` : "")
    + (one.expires_msec === null ? "" : `, expires in ${time(one.expires_msec / 1000)}`), box)
  make("pre", text(one), box)
  const shown = atob(one.base64).length
  const note = make("p", shown < one.bytes
    ? `The first ${number.format(shown)} of ${number.format(one.bytes)} bytes. ` : "", box)
  const link = make("a", "Download", note)
  link.href = `item?queue=${key}&n=${n}`
  link.download = "item"
  box.open = opened.has(n)
  box.ontoggle = () => box.open ? opened.add(n) : opened.delete(n)
  return box
}
function axis(chart, samples) {
  const width = chart.clientWidth || 600, height = chart.clientHeight || 170
  const [most, rate] = plot(chart, samples, width, height - 16)
  const words = [["start", 2, 11, number.format(most) + " items"],
    ["end", width - 2, 11, number.format(rate) + " a second"],
    ["start", 2, height - 2, "10 min ago"], ["end", width - 2, height - 2, "now"]]
  for (const [anchor, x, y, text] of words)
    draw("text", {"text-anchor": anchor, x, y}, chart).textContent = text
  chart.onpointermove = event => {
    const box = chart.getBoundingClientRect()
    const back = Math.round((1 - (event.clientX - box.left) / box.width) * 119)
    const sample = samples[samples.length - 1 - back]
    set(at("hover"), sample ? `${time(back * 5)} ago: ${number.format(sample[0])} items, `
      + `${number.format(sample[1])} put and ${number.format(sample[2])} got a second` : "\\u00a0")
  }
}
async function view() {
  const key = viewed
  let queue
  try { queue = await (await fetched("queue.json?queue=" + key)).json() }
  catch (error) {
    if (viewed === key) set(at("queue-state"), why(error), "bad")
    return
  }
  if (viewed !== key) return
  const stats = queue.stats, paused = queue.paused !== "no"
  set(at("name"), queue.name)
  set(at("queue-state"), paused ? "paused: " + queue.paused : "running", paused ? "some" : "good")
  set(at("facts-of"), `${number.format(stats.items)} items, ${bytes(stats.bytes)}; `
    + `${number.format(stats.delayed)} delayed, ${number.format(stats.open_transactions)} open, `
    + `${number.format(stats.waiters)} waiters; journal ${bytes(stats.logsize)}`
    + (queue.children.length ? "; children: " + queue.children.join(", ") : ""))
  set(at("settings"), queue.settings.join("\\n"))
  if (getSelection().isCollapsed && !pressed)
    at("items").replaceChildren(...queue.items.length
      ? queue.items.map((one, n) => item(one, n, key)) : [make("p", "No item waits.")])
  at("readers").replaceChildren(...queue.readers.length ? queue.readers.map(one => make("p",
    `${one.user || one.address} (${one.protocol}, client ${one.id}): ${one.open_reads} open, `
    + `the oldest for ${time(one.oldest_open_seconds)}`)) : [make("p", "None.")])
  const children = queue.children.join(", "), count = `${number.format(stats.items)} items`
  const also = children ? ` Its children ${children} keep theirs.` : ""
  const actions = [["Publish", () => ask(`An item for ${queue.name}, and its children:`, "Put",
      text => post("put?queue=" + key, text), {text: ""})],
    ["Move", () => ask(`Move the ${count} of ${queue.name} to which queue?`, "Move",
      dest => post(`move?queue=${key}&dest=${encodeURIComponent(dest.trim())}`), {text: ""})],
    [paused ? "Resume" : "Pause", () => paused ? post(`pause?queue=${key}&what=no`)
      : ask(`Pause ${queue.name}: refuse puts, and let gets find nothing?`, "Pause",
        () => post("pause?queue=" + key))],
    ["Flush", () => ask(`Drop the ${count} of ${queue.name}? They are gone then.` + also, "Flush",
      () => post("flush?queue=" + key), {danger: true}), true],
    ["Delete", () => ask(`Delete ${queue.name} with its ${count}? They are gone then.` + also,
      "Delete", async () => { await post("delete?queue=" + key); at("view").close() },
      {danger: true}), true]]
  actions.forEach(([title, act, danger], n) => {
    const one = at("actions").children[n] || button("", null, at("actions"), danger)
    set(one, title)
    one.onclick = act
  })
  axis(at("chart"), queue.history)     // last, when it is known whether there is a scroll bar
}

// -- the clients

const client_columns = ["id", "address", "user", "protocol", "state", "seconds", "open_reads",
  "oldest_open_seconds", "waits_for"]
for (const name of client_columns) make("th", name.replaceAll("_", " "), at("client-heads"))
async function clients() {
  let list
  try { list = await (await fetched("connections.json")).json() }
  catch (error) { list = []; set(at("problem"), why(error)) }
  if (pressed) return
  at("client-rows").replaceChildren(...list.slice(0, MOST_ROWS).map(client => {
    const one = make("tr", "")
    for (const name of client_columns) make("td", client[name] ?? "–", one)
    button("Close", () => ask(`Hang up on client ${client.id}, ${client.address}? `
      + "Its open reads go back.", "Hang up", () => post("kick?id=" + client.id),
      {danger: true}), make("td", "", one), true)
    return one }))
}
at("clients").ontoggle = () => at("clients").open && clients()

// -- again and again

async function refresh() {
  try {
    data = await (await fetched("queues.json")).json()
    answered = Date.now()
    if (turn++ % 2 === 0) {
      const wanted = rows().slice(0, MOST_ROWS)
      for (let n = 0; n < wanted.length; n += 50)
        Object.assign(charts, await (await fetched("history.json?"
          + wanted.slice(n, n + 50).map(queue => "queue=" + queue.key).join("&"))).json())
    }
  } catch (error) {
    set(at("problem"), why(error))
    set(at("status"), "unreachable", "bad")
    document.title = "Kestrel, unreachable"
    stopped = error.status === 401
    return
  }
  set(at("problem"), data.trouble)
  show()
  if (viewed) await view()
  if (at("clients").open) await clients()
}
function tell_age() {
  set(at("answer"), answered ? `last answer ${time((Date.now() - answered) / 1000)} ago` : "")
}
setInterval(tell_age, 1000)
at("filter").value = wish.get("filter") || ""
at("filter").oninput = () => { remember("filter", at("filter").value); show() }
async function always() {
  if (!document.hidden) { await refresh(); tell_age() }
  if (!stopped) setTimeout(always, EVERY)
}
always().then(() => data && wish.get("queue") && look(wish.get("queue")))
</script>
</html>
"""


def _page_policy():
    """Return a Content-Security-Policy that lets only the page's own script run."""
    import hashlib
    script = _PAGE.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return ("default-src 'none'; script-src 'sha256-%s'; style-src 'unsafe-inline'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'" % digest)


# == 9. Server ============================================================================
#
# Sockets, time, fsync, signals: the loop that feeds the sessions and sends their answers. Knows
# nothing of records or of command words.

# How long a turn feeds clients, and how long it runs tasks then, in seconds. The next turn does
# the rest.
_FEED_SECONDS = 0.006
_WORK_SECONDS = 0.005

# How many waits in a row must have been shorter than busy_poll, and have ended with one event, for
# the next to be polled.
_SHORT_WAITS = 4

# How many events are handled between two looks at the clock.
_EVENTS_STEP = 8

# Failures of TLS: a part of OpenSSL's reason -> what the client does. Clients of the first two can
# read an answer without TLS.
_TLS_FAILURES = {
    "WRONG_VERSION_NUMBER": "speaks no TLS to a port with TLS:",
    "HTTP_REQUEST": "speaks plain HTTP to a port with TLS:",
    "UNKNOWN_CA": "does not trust the certificate:",
    "CERTIFICATE_UNKNOWN": "does not trust the certificate:",
    "BAD_CERTIFICATE": "does not trust the certificate:",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "has no certificate (tls_client_ca):",
    "CERTIFICATE_VERIFY_FAILED": "has a certificate that tls_client_ca does not sign:",
    "UNSUPPORTED_PROTOCOL": "speaks too old a version of TLS:",
    "": "fails in TLS:"}

# How many TLS handshakes a turn does, since each takes a millisecond, and with how many queues to
# write a turn stops feeding clients.
_GREETINGS = 4
_MOST_WRITES = 150

# How much is read from a socket at a time. The socket of a waiting client is not read while it
# has more unparsed input than that.
_CHUNK = 1 << 16

# Larger answers are sent without being joined.
_BIG = 1 << 16

# With a larger load in one turn the output of a client is counted before it is sent.
_UNCOUNTED = 1 << 18

# The most that is sent to a client in a turn; how many pieces one sendmsg() takes (IOV_MAX).
_MOST_SENT = 1 << 17
_MAX_VECTOR = 1024

# How often the server looks whether a waiting client has gone, while its socket is not read, and
# how long a client may take to read its last answers.
_LOOK_SECONDS = 1
_LINGER_SECONDS = 1

# The header of the PROXY protocol: how it begins in version 2; how long it is at most in version
# 1, and, after the first 16 bytes, in version 2.
_PROXY_2 = b"\r\n\r\n\0\r\nQUIT\n"
_LONGEST_PROXY_1 = 107
_LONGEST_PROXY_2 = 4096

# When a silent TCP connection is probed, how often, and how many probes may go unanswered.
_KEEPALIVE = {"TCP_KEEPIDLE": 120, "TCP_KEEPINTVL": 30, "TCP_KEEPCNT": 4}

# How many new clients a listener takes in a turn, and how long it rests after an accept() that
# failed.
_ACCEPTS = 256
_ACCEPT_AGAIN_SECONDS = 1

# How long a status_command may run.
_ANNOUNCE_SECONDS = 30

# Seconds without a failure before a journal counts as recovered, and how often the log names those
# that have not.
_CALM_SECONDS = 3
_REMIND_SECONDS = 60

# After how long a disk that does not answer counts as failing.
_HANG_SECONDS = 10

# How many queues are fsynced at once, since each takes descriptors, and after how many milliseconds
# an fsync that lacked them is tried again.
_SYNCS = 64
_SYNC_AGAIN_MS = 50

# How many descriptors the server needs besides those of connections, journals and fsyncs.
_OTHER_FILES = 20

# How long the server waits for fsyncs when it stops.
_LAST_SECONDS = 30

# The protocols; the port of each is set by memcache_port and so on.
_PROTOCOLS = {"memcache": MemcacheSession, "text": TextSession, "thrift": ThriftSession,
              "admin": AdminSession}


def _guard(call, *arguments):
    """Make a call, and log any exception that it raises."""
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
        """Make `call` at `when`, or as soon after as run() is called; return its entry."""
        entry = [when, next(self._serial), call]
        heapq.heappush(self._heap, entry)
        return entry

    def cancel(self, entry):
        """Do not make that call. Its entry is removed when it is due, or when half of all are
        cancelled."""
        if entry[2] is None:
            return
        entry[2] = None
        self._cancelled += 1
        if self._cancelled * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2] is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def wait(self, mono):
        """Return the seconds until there may be something to do, None if there is nothing."""
        # An hour at most: select() cannot wait for years.
        return min(max(0, self._heap[0][0] - mono), 3600) if self._heap else None

    def run(self, mono):
        """Make the calls that are due. What they schedule is for a later turn."""
        first_new = next(self._serial)
        while self._heap and self._heap[0][0] <= mono and self._heap[0][1] < first_new:
            entry = heapq.heappop(self._heap)
            call, entry[2] = entry[2], None
            if call:
                _guard(call)
            else:
                self._cancelled -= 1


class Worker:
    """A thread for calls that block, above all fsync, so that the loop never does.

    wake: called from the thread after each of them.
    """

    def __init__(self, wake):
        self.done = collections.deque()  # (done, OSError or None) of what has returned
        self.unfinished = 0              # what has been submitted and not been taken from there
        self._wake = wake
        self._jobs = queues.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    def submit(self, work, done):
        """Run work(), which returns or raises an OSError or returns None, on the thread; then have
        take_results() call done(error)."""
        self.unfinished += 1
        self._jobs.put((work, done))

    def take_results(self):
        """Call done(error) for all work that has returned, see submit()."""
        while self.done:
            done, error = self.done.popleft()
            self.unfinished -= 1
            _guard(done, error)

    def stop(self, seconds):
        """End the thread when all that was submitted has been done; wait at most `seconds`."""
        self._jobs.put(None)
        self._thread.join(seconds)

    def _run(self):
        for work, done in iter(self._jobs.get, None):
            try:
                error = work()
            except OSError as failure:
                error = _bare(failure)
            except Exception:                          # it must not end the thread
                log.exception("unexpected, on the worker thread")
                error = OSError(errno.EIO, "unexpected, see the log")
            self.done.append((done, error))
            self._wake()


def _timed(call, times):
    """Make a call, and append the seconds that it took to `times`."""
    start = time.monotonic()
    try:
        return call()
    finally:
        times.append(time.monotonic() - start)


class Poller:
    """Waits for events of sockets, and for interrupt().

    An event is (what was registered for the socket, whether there is something to read; else it
    can be written). epoll is used directly where there is one: selectors takes three times as long
    for each event, which is 2 to 5 % of the time that a command takes, and for each new client.
    """

    def __init__(self, busy_poll):
        if hasattr(select, "epoll"):     # not on every system
            self._selector = select.epoll()
            self._poll = self._selector.poll           # as (descriptor, events) pairs
            self._read, self._write = select.EPOLLIN, select.EPOLLOUT
        else:
            self._selector = selectors.DefaultSelector()
            self._poll = lambda timeout, _: [
                (key.fd, events) for key, events in self._selector.select(timeout)]
            self._read, self._write = selectors.EVENT_READ, selectors.EVENT_WRITE
        self._watched = {}               # descriptor -> (what was registered for it, events)
        self._busy_poll = busy_poll      # seconds
        self._short_waits = 0            # how many in a row, see wait()
        self._left, self._right = socket.socketpair()
        self._left.setblocking(False)
        self._right.setblocking(False)
        self.watch(self._left, self)

    def poll(self, timeout):
        """Return the events that there are, or that come within `timeout` seconds (None: for
        ever)."""
        watched, write = self._watched, self._write
        # An error, or the end of the connection, is there to be read.
        return [(watched[fd][0], mask != write) for fd, mask in self._poll(timeout, len(watched))]

    def wait(self, timeout):
        """Wait for events, at most `timeout` seconds (None: for ever).

        Sleeping and waking up takes longer than most commands. While the waits are short and end
        with one event, as with a client that answers at once, it is cheaper not to sleep. With
        many clients it is not: while it sleeps more events come, which share the cost of a turn.
        """
        wait = self.poll
        start = time.monotonic()
        events = None
        if self._short_waits >= _SHORT_WAITS:
            while not events and time.monotonic() < start + self._busy_poll:
                events = wait(0)
        # The wait of a process that is stopped and continued ends without events: look again.
        events = events or wait(timeout) or wait(0)
        is_short = len(events) == 1 and time.monotonic() < start + self._busy_poll
        self._short_waits = self._short_waits + 1 if is_short else 0
        return events

    def watch(self, sock, data, read=True, write=False):
        """Watch a socket. read, write: whether to return an event when it can be read, or written.
        data: what poll() returns with the event."""
        mask = (self._read if read else 0) | (self._write if write else 0)
        fd = sock.fileno()
        if fd not in self._watched:
            if mask:
                self._selector.register(fd, mask)
                self._watched[fd] = data, mask
        elif not mask:
            self._selector.unregister(fd)
            del self._watched[fd]
        elif self._watched[fd][1] != mask:
            self._selector.modify(fd, mask)
            self._watched[fd] = data, mask

    def forget(self, sock):
        """Watch a socket no longer."""
        self.watch(sock, None, False)

    def interrupt(self):
        """End a wait, or the next one. From any thread, or a signal handler."""
        with contextlib.suppress(OSError):   # full: it will turn; closed: it has stopped
            self._right.send(b"\0")

    def ready(self, readable):
        """Discard what interrupt() has sent."""
        with contextlib.suppress(BlockingIOError):
            self._left.recv(4096)

    def fileno(self):
        """Return what signal.set_wakeup_fd() can be given."""
        return self._right.fileno()

    def close(self):
        """Close the selector; sockets are closed by their owners."""
        self._selector.close()
        self._left.close()
        self._right.close()


class Syncs:
    """Fsyncs of journals on the worker, at most one of each queue at a time, and the watch over
    journals that fail."""

    def __init__(self, server):
        self._server = server
        self._planned = set()            # queues that have a timer for their next fsync
        self.wanted = {}                 # queues to be fsynced, in order; an ordered set
        self._running = {}               # queues that are being fsynced -> since when
        self._is_looking = False         # the worker runs _look_at()

    def is_idle(self):
        """Return whether no fsync is wanted or under way."""
        return not (self.wanted or self._running)

    def written(self, queue):
        """Schedule the fsync of a journal that has been written, as sync_journal says, or at once
        if somebody waits for it."""
        delay, history = queue.config.sync_journal, queue.history
        if history.safe < history.written or history.syncing:
            self.wanted[queue] = None
        elif delay is not None and queue not in self._planned:
            self._planned.add(queue)
            self._server.later(delay, functools.partial(self._due, queue))

    def start(self):
        """Begin the fsyncs that are wanted, as many as there may be, but no second one of a queue:
        that waits for the first, and is for all that has been written by then."""
        for queue in list(self.wanted):
            if len(self._running) >= _SYNCS:
                break
            if queue in self._running:
                continue
            del self.wanted[queue]
            if not queue.needs_sync():
                continue
            try:
                call, sync = queue.begin_sync()
            except OSError as error:
                if is_short_of_descriptors(error):
                    self._server.later(_SYNC_AGAIN_MS, functools.partial(self._due, queue))
                    continue
                # It is treated as an fsync that has failed.
                call, sync = functools.partial(_bare, error), None
            self._running[queue], times = self._server.mono, []
            self._server.worker.submit(functools.partial(_timed, call, times),
                                       functools.partial(self._synced, queue, sync, times))

    def _due(self, queue):
        self._planned.discard(queue)
        self.wanted[queue] = None

    def _synced(self, queue, sync, times, error):
        del self._running[queue]
        queue.counters.fsync_usec = int(times[0] * 1e6)
        self._server.broker.metrics["fsync_usec"].fresh.append(queue.counters.fsync_usec)
        if not error:
            queue.synced(sync)
            return
        if not queue.closed:
            self._server.broker.note_failure(queue, error, "fsynced")
            self._server.later(RETRY_MS, functools.partial(self._due, queue))
        queue.sync_failed(sync, error)

    def look(self):
        """Look how much space is free and, while journals fail, whether they still do. The server
        has to try itself: load balancers have sent the clients elsewhere."""
        broker, mono = self._server.broker, self._server.mono
        for queue in list(broker.failing):
            queue.recover(self._server.now)
        for queue, since in self._running.items():
            if mono > since + _HANG_SECONDS:
                broker.note_failure(queue, OSError(
                    errno.ETIMEDOUT, "the disk hangs: an fsync takes more than %d s"
                    % _HANG_SECONDS, queue.journal and queue.journal.path), "fsynced")
        if not self._is_looking:
            self._is_looking, found = True, []
            self._server.worker.submit(
                functools.partial(_look_at, broker.spool, bool(broker.failing), found),
                functools.partial(self._looked, found))

    def _looked(self, found, error):
        broker = self._server.broker
        self._is_looking = False
        if found:
            broker.take_free_space(*found)
        if error:
            for queue, failure in broker.failing.items():
                broker.failing[queue] = failure._replace(when=broker.uptime())
        broker.forget_failures(_CALM_SECONDS)

    def remind(self):
        """Log that journals fail, if some do."""
        broker = self._server.broker
        if broker.failing:
            log.error("%s; %s of %s are free; %d journals fail; clients are told SERVER_ERROR, "
                      "nothing acknowledged is lost, service resumes by itself", broker.trouble(),
                      SIZE.show((broker.free_space or 0) >> 20 << 20), broker.spool,
                      len(broker.failing))


def _look_at(spool, is_failing, found):
    """Append to `found` how many bytes are free for the spool. is_failing: also try to write there.
    Raises OSError."""
    status = os.statvfs(spool)
    found.append(status.f_bavail * status.f_frsize)
    if is_failing:
        path = os.path.join(spool, "kestrel~~0")       # which a start would delete
        fd = _open_journal(path, os.O_CREAT)
        try:
            _write_all(fd, [bytes(4096)], 0, 4096)
            os.fsync(fd)
        finally:
            os.close(fd)
            os.unlink(path)


def _first_of(pieces, size):
    """Return the first `size` bytes, or as many as one sendmsg() takes, as a list of pieces."""
    taken = []
    for piece in pieces[:_MAX_VECTOR]:
        if size <= 0:
            break
        taken.append(memoryview(piece)[:size])
        size -= len(piece)
    return taken


def _scrub(spool, found):
    """Read all journals of a spool in another process, which leaves the processor to others, and
    append what verify_file() returns for each file to `found`; blocks. Raises OSError."""
    import subprocess
    done = subprocess.run([sys.executable, os.path.abspath(__file__), "--verify", spool, "--json"],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    found += map(json.loads, done.stdout.splitlines())
    if done.returncode and not any(one["damage"] for one in found):
        raise OSError(errno.EIO, "--verify ends with status %d, see standard error"
                      % done.returncode)


def _run_status_command(command, status, endpoints):
    """Run a status_command; blocks."""
    import shlex
    import subprocess
    try:
        subprocess.run([*shlex.split(command), status, *endpoints], check=True,
                       timeout=_ANNOUNCE_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log.error("status_command: %s", error)


class Connection:
    """A client's socket and the session on it.

    place() arranges what the state of the session asks for: which events the socket is watched
    for, and when tick() is called.

        state      the socket is read                 tick() comes at
        READY      yes                                client_timeout; the end of LOGIN_MS
        RECEIVING  yes                                likewise; send_timeout
        WAITING    until _CHUNK bytes are unparsed    the end of the wait
        WORKING    likewise
        HELD       likewise
        FULL       likewise
        ENDING     yes, what comes is thrown away     all has been sent: after _LINGER_SECONDS
        CLOSED     no

    While the client does not take its answers, tick() comes after send_timeout. While it waits
    and its socket is not read, tick() comes each second, to see whether it has gone or has
    half-closed its connection.
    """

    def __init__(self, server, sock, session):
        self.server = server
        self.sock = sock
        self.session = session
        server.broker.admit(session)
        self.since = server.mono
        self.last_active = server.mono   # when it said something, or took some of its answers
        self.is_traced = False
        # Whether place() has nothing to do while the client is READY or, for a moment, HELD:
        # nothing is kept, unsent or traced, and no alarm has to be set.
        self.is_plain = True
        self.buffered = 0                # bytes of input and output that server.buffered counts
        self.unsent = []                 # answers that the kernel has not taken yet
        self._deadline = 0               # when a wait, or the lingering, ends
        self._looked = 0                 # when _look() was called last
        self._alarm = None               # the entry of tick() in server.timers
        self._finished = False           # the socket has been shut down
        self._in_tasks = False           # _work() is among the server's tasks
        if hasattr(sock, "do_handshake"):
            server.greeting.add(self)
            self.is_plain = False
        self.set_trace()
        if self.is_traced:
            trace.info("%s: connected", session.who)
        server.poller.watch(sock, self)
        self._set_alarm()

    def set_trace(self):
        """Trace what is said, if enable_session_trace says so."""
        wanted = self.server.broker.settings.enable_session_trace
        self.is_traced = wanted if isinstance(wanted, bool) else (
            _is_among(self.session.peer.ip, wanted))
        if self.is_traced:
            self.is_plain = False

    def ready(self, readable):
        """Read the socket, or have answers sent: it can be read or written."""
        session, server = self.session, self.server
        server.active.append(self)
        if not readable:
            return
        try:
            data = self.sock.recv(_CHUNK)
        except BlockingIOError:
            if self in server.greeting and self.sock.version():
                server.greeting.remove(self)
            return
        except OSError as error:         # closed, or reset: it will take no answers either
            if hasattr(error, "reason"):               # it is an ssl.SSLError
                why = str(error.reason or error)
                words = next(words for part, words in _TLS_FAILURES.items() if part in why)
                server.broker.note_stranger(session.peer, "%s %s" % (words, why))
                if self in server.greeting and why in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
                    self._answer_in_plain()
                    return
            self.close()
            return
        if not data:
            session.hang_up(server.now)
            return
        server.broker.stats.bytes_read += len(data)
        if self.is_plain:                # as a rule
            self.last_active = server.mono
        else:
            server.greeting.discard(self)
            if not self.unsent:          # else it is up to the client to take that
                self.last_active = server.mono
            if self.is_traced:
                trace.info("%s: says %r", session.who, data[:200])
        session.feed(data, server.now)
        if session.load > _UNCOUNTED:
            self.count_buffers()

    def _answer_in_plain(self):
        """Tell a client that speaks no TLS what is wrong, and hang up."""
        self.server.greeting.discard(self)
        self.sock = socket.socket(fileno=self.sock.detach())
        self.sock.setblocking(False)
        self.session.turn_away(Refused("CLIENT_ERROR", "this port takes TLS only"))

    def resume(self):
        """Go on with a session that can go on."""
        session, server = self.session, self.server
        server.active.append(self)
        session.resume(server.now)
        if session.load > _UNCOUNTED:
            self.count_buffers()

    def _work(self):
        """A task: go on with a long command, a step at a time."""
        while self.session.state is WORKING:
            self.server.visit(self, Connection.resume)
            yield
        self._in_tasks = False
        self.server.active.append(self)      # it may be WORKING again

    def flush(self, failed=(), unsafe=()):
        """Send the answers that are safe, as far as the kernel takes them, and arrange what comes
        next. failed, unsafe: see Session.settle()."""
        session = self.session
        # Also when nothing has failed: a failure in a later turn would be taken for one of what a
        # command that goes on has written already.
        if failed or unsafe or session.holds or session.touched and not session.out:
            session.settle(failed, unsafe)
        if session.state is CLOSED:
            self.close()
            return
        if session.out and not session.holds:
            if self.is_traced:
                trace.info("%s: is told %r", session.who, b"".join(session.out)[:200])
            self.unsent += session.take()
        if self.unsent:
            try:
                self.server.broker.stats.bytes_written += self._send_much()
                self.last_active = self.server.mono
            except BlockingIOError:
                pass
            except OSError:
                self.close()
                return
        if not self.unsent and not session.out:
            session.sent()
        # A HELD client may have sent more input: place() counts it, and reads no more than a limit.
        if (session.state not in (READY, HELD) or not self.is_plain or self.unsent
                or self.buffered or session.unparsed or session.at_end):
            self.place()

    def _send_much(self):
        """Send as much as the kernel takes, and as is fair to the others; return how much."""
        unsent, left = self.unsent, _MOST_SENT
        if sum(map(len, unsent)) < _BIG:     # as a rule
            data = b"".join(unsent)
            count = self.sock.send(data) if data else 0
            unsent[:] = [memoryview(data)[count:]] if count < len(data) else ()
            return count
        while unsent and left:
            # Joining small answers is cheaper than a vector of them.
            if sum(map(len, unsent)) < _BIG + _COMMAND_COST * len(unsent):
                unsent[:] = [b"".join(unsent)]
            try:
                count = self.sock.sendmsg(_first_of(unsent, left))
            except BlockingIOError:
                if left < _MOST_SENT:
                    break
                raise
            left -= count
            while unsent and count >= len(unsent[0]):
                count -= len(unsent.pop(0))
            if count:
                unsent[0] = memoryview(unsent[0])[count:]
        return _MOST_SENT - left

    # -- the state

    def place(self):
        """Arrange what the state of the client asks for."""
        session, server = self.session, self.server
        state = session.state
        if session.timeout is not None:
            self._deadline = server.mono + session.timeout / 1000
            session.timeout = None
        if state is ENDING and not (session.out or self.unsent):
            self._finish()
            if session.state is CLOSED:
                return
        elif state is WORKING and not self._in_tasks:
            self._in_tasks = True
            server.broker.start(self._work())
        if state is WAITING:
            server.waiting.add(self)
        else:
            server.waiting.discard(self)
        self.count_buffers()
        if session.state is CLOSED:          # it was the greediest client
            return
        self.is_plain = state is READY and not (
            self.buffered or session.at_end or self.is_traced or self in server.greeting)
        server.poller.watch(self.sock, self, self._is_read(), bool(self.unsent))
        self._set_alarm()

    def _is_read(self):
        """Return whether the socket is to be read."""
        session = self.session
        return not session.at_end and (
            session.state in (READY, RECEIVING, ENDING) or session.unparsed <= _CHUNK)

    def _deadlines(self):
        """Yield (when, what is done then) for each time that matters in this state."""
        session, settings = self.session, self.server.broker.settings
        timeout = settings.send_timeout
        if self.unsent:
            if timeout:
                yield self.last_active + timeout / 1000, functools.partial(
                    self._give_up, "is not reading its answers")
        elif self._finished:
            yield self._deadline, self.close
        elif session.state in (READY, RECEIVING):
            if timeout and session.state is RECEIVING:
                yield self.last_active + timeout / 1000, functools.partial(
                    self._give_up, "has sent half a command")
            for timeout in (settings.client_timeout, session.idle_timeout):
                if timeout:
                    yield self.last_active + timeout / 1000, self.close
        if session.is_stranger or self in self.server.greeting:
            yield self.since + LOGIN_MS / 1000, self.close
        if session.state is WAITING:
            yield self._deadline, session.time_out
            if not self._is_read():
                yield self._looked + _LOOK_SECONDS, self._look

    def _set_alarm(self):
        """Have tick() called at the next of these times."""
        server = self.server
        due = min([when for when, _ in self._deadlines()], default=None)
        # One entry on the heap serves one wait after the other, as a rule.
        if due is not None and (self._alarm is None or due < self._alarm[0]):
            if self._alarm:
                server.timers.cancel(self._alarm)
            self._alarm = server.timers.at(due, functools.partial(
                server.visit, self, Connection.tick))

    def tick(self):
        """Do what is due."""
        self._alarm = None
        self.is_plain = False                # flush() calls place(), which sets the next alarm
        for when, call in list(self._deadlines()):
            if when <= self.server.mono and self.session.state is not CLOSED:
                call()
        if self.session.state is not CLOSED:
            self._set_alarm()

    def _look(self):
        """Read the socket to its end if the client has gone, or will send no more. Nothing else
        shows that while the socket is not watched."""
        self._looked = self.server.mono
        poll = select.poll()
        poll.register(self.sock, getattr(select, "POLLRDHUP", 0))
        while self.session.state is WAITING and poll.poll(0):
            before = self.session.unparsed
            self.ready(True)
            if self.session.unparsed == before:        # more of a TLS record is to come
                break

    def _give_up(self, why):
        log.warning("%s %s; closed after send_timeout", self.session.who, why)
        self.close()

    def count_buffers(self):
        """Tell the server how much memory the unparsed input and unsent output take."""
        session = self.session
        size = session.unparsed
        if session.out or self.unsent:
            size += sum(map(len, session.out)) + sum(map(len, self.unsent))
        change = size - self.buffered
        if change:
            self.buffered = size
            self.server.count_buffers(change)

    def refuse(self):
        """Hang up on the client, since there is no memory left for its input and output."""
        log.error("%s: out of memory", self.session.who)
        if self.unsent or self.session.out:
            self.close()
        else:
            self.session.turn_away(Refused("SERVER_ERROR", "out of memory", reason="ENOMEM"))
            self.server.active.append(self)
            self.count_buffers()

    # -- the end

    def _finish(self):
        """Shut down the socket: all has been sent. The client has a moment to read it: if a socket
        is closed with unread input, the kernel discards what the client has not read yet."""
        if self.session.at_end:
            self.close()
        elif not self._finished:
            self._finished = True
            self._deadline = self.server.mono + _LINGER_SECONDS
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self.close()

    def close(self):
        """Let go of the client; its open reads go back."""
        session, server = self.session, self.server
        session.close(server.now)
        if server.connections.pop(session, None):
            self.unsent = []
            session.take()
            self.count_buffers()
            server.poller.forget(self.sock)
            if self._alarm:
                server.timers.cancel(self._alarm)
            self.sock.close()
            server.waiting.discard(self)
            server.greeting.discard(self)
            server.broker.dismiss(session)
            if self.is_traced:
                trace.info("%s: closed", session.who)


def _parse_proxy_header(data):
    """Parse the header of HAProxy's PROXY protocol, version 1 or 2. Return (the address of the
    client, None if the proxy speaks for itself; the size of the header), or None if `data` is not
    all of it. Raises ValueError."""
    if not _PROXY_2.startswith(data[:len(_PROXY_2)]):
        end = data.find(b"\r\n", 0, _LONGEST_PROXY_1)
        words = data[:max(end, 0)].decode("ascii", "replace").split(" ")
        if not b"PROXY ".startswith(data[:6]) or end < 0 and len(data) >= _LONGEST_PROXY_1:
            raise ValueError("no header of the PROXY protocol")
        if end < 0:
            return None
        if words[1:2] == ["UNKNOWN"]:
            return None, end + 2
        if (len(words) != 6 or words[1] not in ("TCP4", "TCP6") or "%" in words[2]
                or not re.fullmatch("[0-9]{1,5}", words[4])):
            raise ValueError("a bad header of the PROXY protocol")
        return (str(ipaddress.ip_address(words[2])), int(words[4])), end + 2
    if len(data) < 16:
        return None
    command, family, size = struct.unpack_from(">BBH", data, len(_PROXY_2))
    if command not in (0x20, 0x21) or size > _LONGEST_PROXY_2:
        raise ValueError("a bad header of the PROXY protocol")
    if len(data) < 16 + size:
        return None
    length = {0x11: 4, 0x21: 16}.get(family)           # TCP over IPv4 and IPv6
    if command == 0x20 or length is None:              # a check of the proxy's own
        return None, 16 + size
    if size < 2 * length + 4:
        raise ValueError("a bad header of the PROXY protocol")
    port, = struct.unpack_from(">H", data, 16 + 2 * length)
    return (str(ipaddress.ip_address(data[16:16 + length])), port), 16 + size


class Introduction:
    """A connection of a proxy, until the header has come that says for whom it speaks. No more than
    that is read: what follows may be TLS."""

    def __init__(self, listener, sock, address):
        self._listener = listener
        self._sock = sock
        self._address = address
        self._head = b""                 # what has come of the header
        server = listener.server
        server.introductions.add(self)
        server.poller.watch(sock, self)
        self._alarm = server.timers.at(server.mono + LOGIN_MS / 1000, self.close)

    def ready(self, readable):
        """Read the header, as far as it has come."""
        try:
            more = self._sock.recv(_LONGEST_PROXY_2 + 16 - len(self._head), socket.MSG_PEEK)
            found = _parse_proxy_header(self._head + more)
            size = found[1] - len(self._head) if found else len(more)
            self._head += self._sock.recv(size)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            self._listener.server.broker.note_stranger(
                Peer("%s proxy %s" % (self._listener.protocol, _name_of(self._address)),
                     self._address[0], False), "is closed: %s" % error)
            self.close()
            return
        if found:
            self._leave()
            self._listener.admit(self._sock, self._address, found[0])
        elif not more:
            self.close()

    def _leave(self):
        server = self._listener.server
        server.introductions.discard(self)
        server.timers.cancel(self._alarm)
        server.poller.forget(self._sock)

    def close(self):
        """Hang up."""
        self._leave()
        self._sock.close()


class Listener:
    """A port on which clients of one protocol come in. Raises OSError."""

    def __init__(self, server, sock, protocol, is_inherited):
        self.server = server
        self.sock = sock
        self.protocol = protocol
        self._is_inherited = is_inherited
        self.address = sock.getsockname()
        self.name = _name_of(self.address)
        sock.setblocking(False)
        if isinstance(self.address, tuple):
            _tune(sock)
        with _listening_on(self.name):       # another process may have been faster
            sock.listen(server.broker.settings.connection_backlog)
        self._start()

    def is_local(self):
        """Return whether only clients of this machine can come in."""
        return not isinstance(self.address, tuple) or _ip_of(self.address[0]).is_loopback

    def ready(self, readable):
        """Accept pending connections."""
        server = self.server
        end = server.mono + _FEED_SECONDS
        for _ in range(_ACCEPTS):
            try:
                sock, address = self.sock.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                log.error("cannot accept connections for a moment: %s", error.strerror)
                server.poller.forget(self.sock)
                server.timers.at(server.mono + _ACCEPT_AGAIN_SECONDS, self._start)
                return
            sock.setblocking(False)
            proxies = server.broker.settings.proxy_protocol
            if proxies and isinstance(address, tuple) and _is_among(_ip_of(address[0]), proxies):
                if not self._is_full(sock):
                    Introduction(self, sock, address)
            else:
                self.admit(sock, address)
            if time.monotonic() > end:
                return

    def admit(self, sock, address, client=None):
        """Make an accepted socket a Connection, unless it is refused. client: the address of the
        client, if the other side is a proxy that has told it."""
        server = self.server
        config = server.broker.config
        allow = config.server.allow
        name, host, local, ip = self.name, self.name, True, None         # of a UNIX socket
        if isinstance(address, tuple):
            ip = _ip_of(address[0])
            # A client that comes from the very address that it connects to is on this machine.
            local = _host_of(ip) == _THIS_MACHINE or ip == _ip_of(sock.getsockname()[0])
            if client:
                ip, address = _ip_of(client[0]), client
                local = local and ip.is_loopback
            if allow and not _is_among(ip, allow):
                self._refuse(sock, "%s is not among those in allow" % ip)
                return
            host = _host_of(ip)
            name = _name_of(address)
        if self._is_full(sock):
            return
        if config.tls and ip:
            try:
                sock = config.tls.wrap_socket(sock, True, do_handshake_on_connect=False)
            except OSError:                            # gone already
                sock.close()
                return
        session = _PROTOCOLS[self.protocol](
            server.broker, Peer("%s client %s" % (self.protocol, name), host, local, ip))
        connection = server.connections[session] = Connection(server, sock, session)
        if connection not in server.greeting:
            # As a rule its first command is there already: this saves a turn.
            server.visit(connection, Connection.ready, True)

    def _is_full(self, sock):
        """Refuse a socket if there are too many connections, and return whether that is so."""
        server = self.server
        count = len(server.connections) + len(server.introductions)
        if count >= server.broker.settings.max_connections:
            self._refuse(sock, "max_connections")
        elif count >= server.most_connections:
            self._refuse(sock, "the limit of open files")
        else:
            return False
        return True

    def _refuse(self, sock, why):
        log.error("%s: %d connections, another is refused", why, len(self.server.connections))
        sock.close()

    def _start(self):
        if self.sock.fileno() >= 0:
            self.server.poller.watch(self.sock, self)

    def close(self):
        """Take no more clients."""
        self.server.poller.forget(self.sock)
        self.sock.close()
        if isinstance(self.address, str) and not self._is_inherited:
            with contextlib.suppress(OSError):
                os.unlink(self.address)


class Server:
    """The daemon: listeners, connections and the loop. Raises OSError when it cannot start.

    run() serves until stop() is called. given: {protocol: [listening socket]} of ports that are
    open already. notify: is called with each message for systemd, see sd_notify(3).
    """

    def __init__(self, config, given=(), notify=lambda text: None):
        self.notify = notify
        self.timers = Timers()
        self.connections = {}            # Session -> Connection
        self.introductions = set()       # of proxies
        self.active = []                 # connections that may have something to send
        self.waiting = set()             # connections whose sessions wait for an item
        self.greeting = set()            # those whose TLS handshake is not done yet
        self.buffered = 0                # unparsed input and unsent output of all connections
        self.mono = time.monotonic()
        self.now = _now()
        self.reload_wanted = False
        self._events = []                # those that the last turn had no time for
        self._unsafe = {}                # queues with operations that are not safe, see _commit()
        self._announced = None           # the status that the status_command was run with last
        with contextlib.ExitStack() as stack:          # what is open when the rest fails
            self._open(config, dict(given), stack)
            stack.pop_all()
        self._plan_sweep()
        self._plan_sample()
        self.every(RETRY_MS, self.syncs.look)
        self.every(_REMIND_SECONDS * 1000, self.syncs.remind)

    def _open(self, config, given, stack):
        """Open the spool and the ports, load the queues, start the threads. stack: an ExitStack
        that undoes it."""
        settings = config.server
        spool = os.path.abspath(settings.queue_path)
        self._spool = _lock_spool(spool)
        stack.callback(os.close, self._spool)
        finish_copy(spool)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(spool, COPY_MARK))   # it is no copy any more
        sockets = _bind_all(config, given, stack)
        log.info("kestrel.py %s, journals in %s", __version__, spool)
        self.most_connections, most_files = _share_descriptors()
        most_memory = settings.max_memory or _usable_memory() * 3 // 4
        started = self.mono
        self.broker = Broker(config, self.later, self.now, Budget(most_memory, most_files),
                             lambda: self.mono - started)
        self.poller = Poller(0 if _cores() == 1 else settings.busy_poll / 1e6)
        stack.callback(self.poller.close)
        self.syncs = Syncs(self)
        self.listeners = [Listener(self, sock, protocol, protocol in given)
                          for sock, protocol in sockets]
        self._workers = {}               # Worker -> how long its last work is waited for
        self.worker = self._start_worker(_LAST_SECONDS)
        self.broker.work = self.worker.submit
        self.broker.reloaded.append(self._set_traces)
        if config.users is not None:     # password hashes take long, and must not delay fsyncs
            self.broker.aside = self._start_worker(_LAST_SECONDS).submit
        # What these do may take long: nobody waits for it at the end.
        self._announcer = self._start_worker(0) if settings.status_command else None
        if settings.scrub_interval:
            self.later(settings.scrub_interval,
                       functools.partial(self._scrub, self._start_worker(0)))

    def _start_worker(self, last_seconds):
        worker = Worker(self.interrupt)
        self._workers[worker] = last_seconds
        return worker

    @property
    def port(self):
        """The memcache port, None if there are UNIX sockets only."""
        return next((one.address[1] for one in self.listeners if one.protocol == "memcache"
                     and isinstance(one.address, tuple)), None)

    # -- one turn of the loop

    def run(self):
        """Serve until the broker is stopped, then stop cleanly."""
        for listener in self.listeners:
            log.info("listening on %s for %s clients; %d queues, %d items", listener.name,
                     listener.protocol, len(self.broker.queues), self.broker.totals().items)
        settings = self.broker.settings
        if any(STATUSES[self.broker.status]):
            log.warning("the status is %s, by status_file or default_status: `status up` ends that",
                        self.broker.status)
        open_to_all = [one.name for one in self.listeners if not one.is_local()]
        if open_to_all and not (settings.allow or settings.auth_file or settings.tls_client_ca):
            log.warning("anybody who can reach %s can read and write all queues: see the "
                        "settings allow, auth_file and tls_client_ca", ", ".join(open_to_all))
        self.notify("READY=1\n" + self._summary())
        self.interrupt()                     # the first turn has something to begin
        while not self.broker.stopping:
            self.turn()
        self.notify("STOPPING=1")
        self._stop()

    def stop(self):
        """Have run() stop. From any thread, or a signal handler."""
        self.broker.stopping = True
        self.interrupt()

    def interrupt(self):
        """Make the loop turn. From any thread, or a signal handler."""
        self.poller.interrupt()

    def _summary(self):
        return "STATUS=%s: %d queues, %d items, %d connections" % (
            self.broker.status.lower(), len(self.broker.queues), self.broker.totals().items,
            len(self.connections))

    def turn(self):
        """Wait for events and handle them, as far as there is time."""
        broker = self.broker
        clock = time.monotonic
        if self._events or broker.dirty or broker.tasks or broker.woken or self.active:
            events = self._next_events()
        else:                                # as a rule
            events = self.poller.wait(self.timers.wait(clock()))
        self.mono = clock()
        self.now = _now()
        if self.waiting or self.greeting:
            events = self._in_order(events)
        # The more there are, the less is done for each.
        broker.share = broker.settings.max_output_buffer // max(
            1, len(events) + len(broker.woken) + len(broker.tasks) - 1)
        end = self.mono + _FEED_SECONDS
        done = 0
        while done < len(events):
            if done and (clock() > end or len(broker.dirty) > _MOST_WRITES):
                break
            for one, readable in events[done:done + _EVENTS_STEP]:
                try:
                    one.ready(readable)
                except Exception as error:
                    self._unexpected(one, error)
            done += _EVENTS_STEP
        self._events = events[done:]
        if not self._events:             # a client that spoke in time is heard before its timer
            self.timers.run(self.mono)
        if self.reload_wanted:
            self.reload_wanted = False
            self._reload()
        if broker.woken:
            self._resume_woken()
        self._commit()
        if broker.tasks:
            self._run_tasks()
        broker.metrics["turn_usec"].fresh.append(int((clock() - self.mono) * 1e6))

    def _next_events(self):
        """Return the events of a turn that has something to do in any case: those left over
        from the last one, or new ones."""
        events = self._events
        if not events or self.waiting:
            fresh = self.poller.poll(0)
            if not events:
                return fresh
            # Of those who wait, hang-ups must be known before items come.
            known = {one for one, _ in events}
            events += [event for event in fresh
                       if event[0] in self.waiting and event[0] not in known]
        return events

    def _in_order(self, events):
        """Return the events, those of waiting clients first, since one that has hung up must not be
        given an item, and a few handshakes last, since they take long. poll() returns the other
        handshakes again."""
        first, others, greetings = [], [], []
        for event in events:
            (first if event[0] in self.waiting else greetings if event[0] in self.greeting
             else others).append(event)
        return first + others + greetings[:_GREETINGS]

    def later(self, delay_ms, call):
        """Make a call after so many milliseconds; return a function that cancels it."""
        entry = self.timers.at(self.mono + delay_ms / 1000, call)
        return functools.partial(self.timers.cancel, entry)

    def every(self, delay_ms, call):
        """Make a call now, and then every so many milliseconds."""
        self.later(delay_ms, functools.partial(self.every, delay_ms, call))
        call()

    def visit(self, connection, method, *arguments):
        """Call a method of a connection; what is unexpected costs its client only."""
        try:
            method(connection, *arguments)
        except Exception as error:
            self._unexpected(connection, error)

    def _unexpected(self, one, error):
        if isinstance(one, Introduction):
            log.error("unexpected, closed", exc_info=error)
            _guard(one.close)
        elif not isinstance(one, Connection):
            log.error("unexpected", exc_info=error)
        elif isinstance(error, MemoryError):
            _guard(one.refuse)
        else:
            log.error("%s: unexpected, closed", one.session.who, exc_info=error)
            _guard(one.close)

    def _resume_woken(self):
        for session in self.broker.woken:              # which may wake others
            connection = self.connections.get(session)
            if connection:
                self.visit(connection, Connection.resume)
        self.broker.woken.clear()

    def count_buffers(self, change):
        """Count unparsed input and unsent output of a connection. They may take the memory that
        queues leave, and a quarter of max_memory in any case: else hang up on the greediest."""
        budget = self.broker.budget
        self.buffered += change
        budget.memory += change
        while budget.memory > budget.most_memory and self.buffered > budget.most_memory // 4:
            # Of those with about as much, the one that has not moved for the longest time.
            most = max(one.buffered for one in self.connections.values())
            self.visit(min((one for one in self.connections.values() if one.buffered * 4 >= most),
                           key=lambda one: one.last_active), Connection.refuse)

    def _run_tasks(self):
        """Run each task a step, as long as there is time. It comes last in a turn, when all
        that has been logged has been written."""
        tasks = self.broker.tasks
        end = time.monotonic() + _WORK_SECONDS
        for _ in range(len(tasks)):
            self._step(tasks.popleft())
            if time.monotonic() > end or len(self.broker.dirty) > _MOST_DIRTY:
                break

    def _step(self, task, error=None):
        """Run a task one step. error: of the call that it asked for, if that failed."""
        try:
            # A task that was closed meanwhile, with its queue, has no frame any more.
            work = task.throw(error) if error and task.gi_frame else next(task)
        except StopIteration:
            return
        except Exception:
            log.exception("unexpected, in a task")
            return
        finally:
            del error                    # its traceback has this frame: they would be a cycle
        if work:
            self.worker.submit(work, functools.partial(self._step, task))
        else:
            self.broker.tasks.append(task)

    def _set_traces(self):
        for connection in self.connections.values():
            connection.set_trace()

    def _plan_sweep(self):
        frequency = self.broker.settings.expiration_timer_frequency
        if frequency:
            self.later(frequency, lambda: self.broker.start(self._sweep()))

    def _sweep(self):
        try:
            yield from self.broker.sweep(self.now)
        finally:
            self._plan_sweep()

    def _plan_sample(self):
        self.later(SAMPLE_SECONDS * 1000, functools.partial(self._sample, self.mono))

    def _sample(self, since):
        self.broker.start(self.broker.sample(self.mono - since))
        self._plan_sample()
        self.notify(self._summary())

    def _reload(self):
        self.notify("RELOADING=1\nMONOTONIC_USEC=%d" % (time.monotonic_ns() // 1000))
        self.broker.reload("SIGHUP", lambda error: self.notify("READY=1\n" + self._summary()))

    def _announce(self):
        """Run the status_command if the status has changed since the last run, and that has
        ended."""
        worker, status = self._announcer, self.broker.status
        if not worker.unfinished and status != self._announced:
            self._announced = status
            worker.submit(functools.partial(
                _run_status_command, self.broker.settings.status_command, status,
                ["%s=%s" % (one.protocol, one.name) for one in self.listeners]),
                lambda error: None)

    def _scrub(self, worker):
        """Have all journals read and their check sums verified."""
        found = []
        log.info("reading all journals (scrub_interval)")
        worker.submit(functools.partial(_scrub, self.broker.spool, found),
                      functools.partial(self._scrubbed, worker, found, self.mono))

    def _scrubbed(self, worker, found, since, error):
        damaged = [one for one in found if one["damage"]]
        for one in damaged:
            log.error("%s: %d damaged pieces, the first at byte %d (%s); --verify tells more",
                      one["file"], len(one["damage"]), one["damage"][0]["begin"],
                      one["damage"][0]["why"])
        if error:
            log.error("scrub_interval: %s", error.strerror)
        else:
            log.info("%d journal files read in %d s, %d are damaged", len(found),
                     self.mono - since, len(damaged))
            self.broker.scrubbed = len(found), len(damaged), self.now
        self.later(self.broker.settings.scrub_interval, functools.partial(self._scrub, worker))

    # -- writing, fsyncing, answering

    def _commit(self):
        for worker in self._workers:
            if worker.done:
                worker.take_results()
        written, failed = self.broker.write()
        for queue in written:
            self.syncs.written(queue)
            if queue.history.unsafe or queue.history.ops:
                self._unsafe[queue] = None             # the position follows
        if self._unsafe:
            # Up to the positions that answers depend on by now: what comes later may fail alone.
            self._unsafe = {queue: queue.history.logged for queue in self._unsafe
                            if queue.history.unsafe or queue.history.ops}
        if self.syncs.wanted:
            self.syncs.start()               # they run while answers are sent
        if self._announcer:
            self._announce()
        # Check every answer whose operations were written in this turn: a later failure of the
        # same queue would be taken for the failure of these operations.
        active, self.active = self.active, []
        if self.broker.woken:
            active += [self.connections[session] for session in self.broker.woken
                       if session in self.connections]
        self._answer(active, failed, self._unsafe)
        if self.broker.woken:            # the others have nothing more to do
            self.broker.woken = [one for one in self.broker.woken
                                 if one.state is WORKING or one.at_end]

    def _answer(self, connections, failed, unsafe):
        """Send these clients their answers. failed, unsafe: see Session.settle()."""
        mono = self.mono
        is_plain = not (failed or unsafe)
        written = 0
        for connection in connections:
            session = connection.session
            try:
                if not (is_plain and connection.is_plain and session.state is READY
                        and session.load < _BIG):
                    connection.flush(failed, unsafe)
                    continue
                # As a rule there is just one small answer, or several. This is what flush() does
                # then, without its calls.
                data = b"".join(session.out)
                session.out, session.touched = [], []
                if session.ended:
                    session.ended = []
                try:
                    count = connection.sock.send(data) if data else 0
                    connection.last_active = mono
                except OSError:              # flush() will see why
                    count = 0
                written += count
                if count == len(data):
                    session.load = 0
                else:
                    connection.unsent = [memoryview(data)[count:]]
                    connection.flush()
            except Exception as error:
                self._unexpected(connection, error)
        self.broker.stats.bytes_written += written

    # -- the end

    def _stop(self):
        """Answer those that wait, put open reads back, and leave all journals on the disk."""
        for listener in self.listeners:
            listener.close()
        for queue in self.broker.queues.values():
            queue.dismiss_waiters()
        self._resume_woken()
        end = time.monotonic() + _LAST_SECONDS
        while time.monotonic() < end:        # an answer may wait for one fsync after the other
            self._commit()
            for _ in range(len(self.broker.tasks)):
                self._step(self.broker.tasks.popleft())
            if not (self.worker.unfinished or self.broker.dirty) and self.syncs.is_idle():
                break
            time.sleep(0.001)
        for worker, seconds in self._workers.items():
            worker.stop(seconds)
        self.broker.work = None              # from here on blocking calls are made at once
        self._commit()                       # takes the last results of the workers
        for queue in self.broker.queues.values():
            queue.abort(*queue.opens)        # in the order of all, not connection by connection
        end = time.monotonic() + 1           # for clients that have not taken all answers
        while time.monotonic() < end:
            sending = [one for one in self.connections.values() if one.unsent]
            if not sending:
                break
            self.poller.poll(.1)
            for connection in sending:
                connection.flush()
        for one in [*self.connections.values(), *self.introductions]:
            one.close()
        self.broker.write()
        for queue in self.broker.queues.values():
            try:
                queue.close()
            except OSError as error:
                log.error("the journal of %s: %s", queue.name, _why(error))
        self.poller.close()
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
    """Return the number of processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:                             # not on every system
        return os.cpu_count()


@functools.lru_cache(maxsize=1024)       # the same clients come again and again
def _ip_of(host):
    """Return the ipaddress of a host as sockets name it, an IPv4-mapped one as IPv4."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    return getattr(ip, "ipv4_mapped", None) or ip


def _is_among(ip, networks):
    """Return whether an ipaddress is in one of the networks. None, of a UNIX socket, is not."""
    return ip is not None and any(ip in network for network in networks)


_THIS_MACHINE = "this machine"


@functools.lru_cache(maxsize=1024)
def _host_of(ip):
    """Return the key of limits per host: the IPv4 address, or the /64 of an IPv6 address."""
    if ip.is_loopback:
        return _THIS_MACHINE
    return str(ip) if ip.version == 4 else ip.exploded[:19]


def _name_of(address):
    """Return the address of a socket in words."""
    if not isinstance(address, tuple):       # the name of an abstract one begins with a NUL
        return "unix:" + os.fsdecode(address).replace("\0", "@")
    return ("[%s]:%d" if ":" in address[0] else "%s:%d") % address[:2]


@contextlib.contextmanager
def _listening_on(name):
    """Say in any OSError that a `with` block raises which address cannot be listened on."""
    try:
        yield
    except OSError as error:
        holder = ""
        if error.errno == errno.EADDRINUSE and not name.startswith("unix:"):
            holder = _port_holder(int(name.rpartition(":")[2]))
        raise OSError(error.errno, "cannot listen on %s: %s%s" % (
            name, error.strerror or error, holder)) from None


def _port_holder(port):
    """Return " (process 123, its name)" for the process that listens on a TCP port, "" if that
    cannot be known, see proc(5)."""
    wanted = set()
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(path) as file:
            rows = [line.split() for line in file]
            wanted.update("socket:[%s]" % row[9] for row in rows[1:]
                          if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port)
    for path in glob.glob("/proc/[0-9]*/fd/*") if wanted else ():
        with contextlib.suppress(OSError):
            if os.readlink(path) in wanted:
                return _process(path.split("/")[2])
    return ""


def _lock_holder(fd):
    """As _port_holder(), for the process that has locked the directory of a descriptor."""
    with contextlib.suppress(OSError), open("/proc/locks") as file:
        inode = str(os.fstat(fd).st_ino)
        for row in map(str.split, file):
            if row[1] == "FLOCK" and row[5].rpartition(":")[2] == inode:
                return _process(row[4])
    return ""


def _process(pid):
    name = ""
    with contextlib.suppress(OSError), open("/proc/%s/comm" % pid) as file:
        name = ", " + file.read().strip()
    return " (process %s%s)" % (pid, name)


def _bind_all(config, given, stack):
    """Open all ports; return (socket, protocol) of each. given: see Server. stack: an ExitStack
    that closes them."""
    bound = []
    for protocol in _PROTOCOLS:
        setting = protocol + "_port"
        try:
            socks = given.get(protocol) or _bind_each(
                config.server, protocol == "memcache", getattr(config.server, setting))
        except OSError as error:
            if setting != "admin_port" or setting in config.given:
                raise
            log.warning("no admin port: %s", error.strerror)
            continue
        for sock in socks:
            stack.callback(sock.close)
            bound.append((sock, protocol))
    return bound


def _bind_each(settings, with_unix, port):
    """Return a socket for each address that a protocol listens on; those that this machine does
    not have are left out if there is another. Raises OSError."""
    bound = []
    missing = None
    with contextlib.ExitStack() as stack:    # what is open when the rest fails
        for address in settings.listen:
            if address.startswith("unix:"):
                if with_unix:
                    bound.append(stack.enter_context(
                        _bind_unix(address[5:], settings.socket_mode)))
            elif port is not None:
                try:
                    bound.append(stack.enter_context(
                        _bind(address, port, "0.0.0.0" in settings.listen)))
                except OSError as error:
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise
                    missing = error
        if missing and not bound:
            raise missing
        stack.pop_all()
    if missing:
        log.warning("%s", missing.strerror)
    return bound


def _tune(sock):
    """Set what the sockets that a listening TCP socket accepts inherit from it: the kernel finds
    out whether silent clients are still there, and sends at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):        # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _bind(address, port, ipv6_only):
    with _listening_on(_name_of((address, port))), contextlib.ExitStack() as stack:
        family, _, _, _, name = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and ipv6_only:    # :: is IPv4 too, as a rule
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(name)
        stack.pop_all()
    return sock


def _bind_unix(path, mode):
    with _listening_on(_name_of(path)), contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        _remove_stale(path)
        sock.bind(path)
        os.chmod(path, mode)                           # nobody can come in before listen()
        stack.pop_all()
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
        except BlockingIOError:                        # the backlog of another server is full
            pass


def _lock_spool(path):
    """Make the spool directory if need be and lock it; return its descriptor."""
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
        holder = _lock_holder(fd)
        os.close(fd)
        raise OSError(error.errno, "the spool %s is held by another server%s: stop it, or use "
                      "another spool" % (path, holder)) from None
    return fd


# == 10. From Python =======================================================================
#
# For programs that have this file beside them: a server in a thread, and clients of one server or
# of several. (A queue without any server is Queue itself, see section 5.)


# How many items are put before the answers are read, and taken before they are closed.
_PUT_AT_ONCE = 50


class ServerError(Exception):
    """An error that a server has answered with."""


def _word(text):
    """Return a text that is part of a command. Raises ValueError if it would be more."""
    if re.search(r"\s", text):
        raise ValueError("%r is not one word" % text)
    return text


def _many(count):
    """Return the option of a get for so many items: none for one, as Kestrel does not know it."""
    return "" if count == 1 else "/n=%d" % count


def _host_and_port(server, port=22133):
    """Return the two parts of HOST:PORT; `port` if that has none. Raises ValueError."""
    if server.startswith("unix:") or not re.search(r"(^[^:]*|\]):[^:]*$", server):
        return server.strip("[]"), port
    host, _, port = server.rpartition(":")
    return host.strip("[]"), PORT.parse(port)


class Client:
    """A blocking connection to a server, over the memcache protocol. Times are seconds.

        with kestrel.Client() as client:
            client.put("jobs", b"one")
            with client.open("jobs", timeout=5) as data:
                ...                              # finished, or put back if this raises

    host: or `unix:PATH`, or a list of servers, see Cluster. timeout: how long an answer may take.
    user, password: for a server with an auth_file. tls: an ssl.SSLContext for a server with TLS.
    Where items are read, `queue` may be a list of queues: the first that has an item is read.

    Raises ServerError, and OSError when the connection fails. The next call connects anew, unless
    an item is open: that has gone back. What has been sent is never sent again, since nobody knows
    whether it was done: an item may be stored though put() has failed.
    """

    def __new__(cls, host: "str | list[str]" = "127.0.0.1", *arguments: object,
                **options: object) -> "Client":
        """Return a Cluster for a list of servers."""
        return super().__new__(Cluster if isinstance(host, (list, tuple)) else cls)

    def __init__(self, host: "str | list[str]" = "127.0.0.1", port: int = 22133,
                 timeout: float = 30, user: "str | None" = None, password: str = "",
                 tls: "ssl.SSLContext | None" = None) -> None:
        self._arguments = host, port, timeout, user, password, tls
        self._timeout = self._connect_timeout = timeout
        self._tls = tls
        self._opened = {}                # key of the queues of which items are open -> how many
        self._sock = self._file = None
        self._is_closed = False
        self._connect()

    def _connect(self):
        host, port, _, user, password, _ = self._arguments
        try:
            if host.startswith("unix:"):
                self._sock = socket.socket(socket.AF_UNIX)
                self._sock.settimeout(self._connect_timeout)
                self._sock.connect(host[5:])
            else:
                self._sock = socket.create_connection((host, port), self._connect_timeout)
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                import ssl
                try:
                    self._sock = self._tls.wrap_socket(self._sock, server_hostname=host)
                except (ssl.SSLError, ConnectionError) as error:
                    if getattr(error, "reason", None) == "WRONG_VERSION_NUMBER":
                        raise ConnectionError("the server speaks no TLS there") from None
                    if isinstance(error, (
                            ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError)):
                        raise ConnectionError("the server has closed the connection: perhaps it "
                                              "speaks no TLS there") from None
                    raise
            self._file = self._sock.makefile("rb")
            if user is not None:
                login = os.fsencode("%s %s" % (user, password))
                try:                     # under a name that no queue can have
                    self._ask(b"set .login 0 0 %d\r\n%b\r\n" % (len(login), login))
                except ServerError as error:
                    if "name of a queue" in str(error):
                        raise ServerError("the server has no auth_file, and wants no login"
                                          ) from None
                    raise
        except BaseException:
            self._hang_up()
            raise

    # -- putting

    def put(self, queue: str, data: bytes, expiry: int = 0, flags: int = 0, delay: float = 0,
            sync: bool = False) -> bool:
        """Put an item; return False if the queue does not take it. expiry: in seconds from now,
        or at that time of the epoch, 0 for never. delay: the item is available after so many
        seconds. sync: return when it has been fsynced."""
        return self._ask(self._set(queue, data, expiry, flags, delay, sync)) == b"STORED"

    def put_many(self, queue: str, items: "Iterable[bytes]", expiry: int = 0,
                 flags: int = 0) -> int:
        """Put items without waiting for the answer to each; return how many the queue has taken.
        Raises ServerError for the first that was refused, when all have been answered."""
        taken, refused = 0, None
        for batch in _batches(items, _PUT_AT_ONCE):
            answers, error, failure = self._put_batch(queue, batch, expiry, flags)
            taken += sum(answers)
            refused = refused or error
            if failure:                      # after some refusals the server hangs up
                raise refused or failure
        if refused:
            raise refused
        return taken

    def _put_batch(self, queue, batch, *how):
        """Put items at once. Return (whether each was taken, as far as the server has answered; the
        first ServerError or None; the OSError that ended it or None)."""
        answers, refused = [], None
        try:
            self._send(b"".join([self._set(queue, data, *how) for data in batch]))
            for _ in batch:
                try:
                    answers.append(self._try(self._line) == b"STORED")
                except ServerError as error:
                    answers.append(False)
                    refused = refused or error
        except OSError as error:
            return answers, refused, error
        return answers, refused, None

    def _set(self, queue, data, expiry, flags, delay=0, sync=False):
        data = _as_bytes(data)
        options = b"/delay=%d" % (delay * 1000) if delay else b""
        return b"set %b%b%b %d %d %d\r\n%b\r\n" % (
            self._name(queue), options, b"/sync" if sync else b"", flags, expiry, len(data), data)

    # -- taking

    def get(self, queue: "str | list[str]", timeout: float = 0,
            options: str = "") -> "bytes | None":
        """Take the next item, waiting for it if need be; None if there is none. options: such
        as "/open" or "/close/open"."""
        self._check_closed(queue)
        return next(iter(self._get(queue, timeout, options)), None)

    def get_many(self, queue: "str | list[str]", count: int, timeout: float = 0) -> "list[bytes]":
        """Take up to so many items; wait for the first one if need be."""
        self._check_closed(queue)
        return self._get(queue, timeout, _many(count))

    def peek(self, queue: "str | list[str]") -> "bytes | None":
        """Return the item at the head, which stays there; None if there is none."""
        return next(iter(self._get(queue, 0, "/peek")), None)

    def peek_many(self, queue: "str | list[str]", count: int) -> "list[bytes]":
        """Return up to so many items from the head on; all stay."""
        return self._get(queue, 0, "/peek" + _many(count))

    def export(self, queue: str, count: "int | None" = None,
               take: bool = False) -> "Iterator[dict]":
        """Yield items, all or so many, as dicts: data, flags, add_time and expiry (milliseconds of
        the epoch, 0 for never), and how often each has come back. They stay, unless `take` is true:
        then fifty at a time are taken, when the next fifty are asked for. This uses a connection of
        its own."""
        left = UNLIMITED if count is None else count
        with Client(*self._arguments) as other:
            while left > 0:
                most = min(left, _PUT_AT_ONCE) if take else left
                rows = other._rows(queue, most, b"open" if take else b"peek")
                rows = list(rows) if take else rows
                yield from rows
                if not take or not rows:
                    break
                left -= len(rows)
                other._get(queue, 0, "/close" + _many(len(rows)))

    def _rows(self, queue, count, how):
        """Yield items as export() does. Kestrel sends the data and flags only."""
        self._send(b"get %b/n=%d/info/%b\r\n" % (self._keys(queue), count, how))
        for words, data in self._blocks(self._line()):
            flags, _, add_time, expiry, deliveries = [*map(int, words[2:7]), 0, 0, 0][:5]
            yield {"data": data, "flags": flags, "add_time": add_time, "expiry": expiry,
                   "deliveries": deliveries}

    def _check_closed(self, queue):
        names = self._keys(queue).split(b"/or=")
        if any(name in key.split(b"/or=") for key in self._opened for name in names):
            raise ValueError("an item of %s is open here; use another client" % queue)

    def _get(self, queue, timeout, options):
        return self._ask(b"get %b/t=%d%b\r\n" % (
            self._keys(queue), timeout * 1000, _word(options).encode()), self._items, timeout)

    @contextlib.contextmanager
    def open(self, queue: "str | list[str]", timeout: float = 0,
             limit: "float | None" = None) -> "Iterator[bytes | None]":
        """Open the next item, or None, for a `with` block: it is closed when the block ends, and
        goes back to the head of its queue if the block raises an exception. limit: it goes back
        after so many seconds, see touch()."""
        with self.open_many(queue, 1, timeout, limit) as items:
            yield items[0] if items else None

    @contextlib.contextmanager
    def open_many(self, queue: "str | list[str]", count: int, timeout: float = 0,
                  limit: "float | None" = None) -> "Iterator[list[bytes]]":
        """Open up to so many items for a `with` block, as open() does."""
        self._check_closed(queue)
        options = "" if limit is None else "/timeout=%d" % (limit * 1000)
        client, items = self._find(queue, timeout, "/open" + _many(count) + options)
        with client._holding(queue, items) if items else contextlib.nullcontext():
            yield items

    def _find(self, queue, timeout, options):
        """Return the Client that has read some items, and the items."""
        return self, self._get(queue, timeout, options)

    @contextlib.contextmanager
    def _holding(self, queue, items):
        """Close `items`, which are open, at the end of a `with` block, or put them back."""
        key = self._keys(queue)
        self._opened[key] = len(items)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError, ServerError):          # then they go back anyway
                self._end(queue, "/abort")
            raise
        else:
            self._end(queue, "/close")
        finally:
            self._opened.pop(key, None)

    def work(self, queue: "str | list[str]", timeout: float = 0) -> "Iterator[bytes]":
        """Yield items, until none comes for `timeout`. Each is closed when the next
        one is asked for; the last one goes back if the loop is left before (a generator that is
        kept in a variable has to be closed for that)."""
        self._check_closed(queue)
        key = self._keys(queue)
        items = self._get(queue, timeout, "/open")
        with self._holding(queue, items):
            while items:
                yield items[0]
                items = self._get(queue, timeout, "/close/open" if self._opened[key] else "/open")
                self._opened[key] = len(items)

    def abort(self, queue: "str | list[str]", delay: float = 0, tail: bool = False) -> None:
        """Give back what is open of a queue, before the `with` block or the step of work() ends:
        to the head, after so many seconds, or to the tail."""
        self._end(queue, "/abort" + ("/delay=%d" % (delay * 1000) if delay else "")
                  + ("/tail" if tail else ""))

    def touch(self, queue: "str | list[str]") -> None:
        """Let the time limit of what is open of a queue start anew."""
        count = self._opened.get(self._keys(queue))
        if count:
            self._get(queue, 0, "/touch" + _many(count))

    def _end(self, queue, how):
        """Close or abort what is open of a queue."""
        key = self._keys(queue)
        count = self._opened.get(key)
        if count:
            self._get(queue, 0, how + _many(count))
            self._opened[key] = 0

    # -- administration

    def stats(self) -> "dict[str, str]":
        """Return the answer to the command `stats`."""
        return dict(line.split(" ", 1) for line in self._table("stats", "STAT "))

    def queues(self, prefix: str = "") -> "list[tuple]":
        """Return [(name, items, bytes, open reads, waiters)] of the queues whose names begin with
        `prefix`."""
        rows = [line.rsplit(" ", 4) for line in self._table(
            ("list " + _word(prefix)).strip(), "QUEUE ")]
        return [(name, *map(int, numbers)) for name, *numbers in rows]

    def names(self, stats: "dict[str, str] | None" = None) -> "list[str]":
        """Return the names of all queues; also of Kestrel's own server. stats: what stats() has
        returned, if it was called already."""
        end = "_open_transactions"
        return [key[len("queue_"):-len(end)] for key in stats or self.stats()
                if key.startswith("queue_") and key.endswith(end)]

    def clients(self) -> "list[list[str]]":
        """Return who is connected: number, address, user, protocol, state, seconds, open reads,
        and the queue that is waited for."""
        return [line.split(" ") for line in self._table("clients", "CLIENT ")]

    def kick(self, number: int) -> bool:
        """Hang up on a client; False if there is none of that number."""
        return self._ask(b"kick %d\r\n" % int(number)) == b"OK"

    def move(self, queue: str, dest: str, count: "int | None" = None) -> int:
        """Move waiting items, all or so many, to another queue; return how many were moved."""
        return int(self._ask(b"move %b %b%b\r\n" % (
            self._name(queue), self._name(dest), b"" if count is None else b" %d" % count)))

    def pause(self, queue: str, what: str = "") -> None:
        """Pause a queue: refuse puts ("in"), let gets find nothing ("out"), or both."""
        self._ask(b"pause %b %b\r\n" % (self._name(queue), _word(what).encode()))

    def resume(self, queue: str) -> None:
        """End a pause."""
        self._ask(b"resume %b\r\n" % self._name(queue))

    def status(self, word: "str | None" = None) -> str:
        """Return the status of the server, or set it to that word."""
        if word is None:
            return os.fsdecode(self._ask(b"status\r\n"))
        self._ask(b"status %b\r\n" % _word(word).encode())
        return word.upper()

    def version(self) -> str:
        """Return the version of the server."""
        return os.fsdecode(self._ask(b"version\r\n")).partition(" ")[2]

    def flush(self, queue: str) -> None:
        """Drop all that waits in a queue."""
        self._ask(b"flush %b\r\n" % self._name(queue))

    def delete(self, queue: str) -> None:
        """Delete a queue and its journal."""
        self._ask(b"delete %b\r\n" % self._name(queue))

    def close(self) -> None:
        """Hang up; what is open goes back."""
        self._is_closed = True
        self._hang_up()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- the connection

    def _hang_up(self):
        for one in filter(None, (self._file, self._sock)):
            one.close()
        self._sock = self._file = None

    def _name(self, queue):
        return os.fsencode(check_name(os.fsdecode(queue)))

    def _keys(self, queue):
        """Return the key of a get: of one queue, or of several."""
        names = queue if isinstance(queue, (list, tuple)) else [queue]
        return b"/or=".join(map(self._name, names))

    def _ask(self, command, read=lambda line: line, timeout=0):
        """Send a command; return read(the first line of the answer)."""
        self._send(command, timeout)
        return self._try(lambda: read(self._line()))

    def _send(self, command, timeout=0):
        self._connect_again()
        self._sock.settimeout(self._timeout + timeout)
        try:
            self._try(lambda: self._sock.sendall(command))
        except BrokenPipeError:
            raise ConnectionError("the server has closed the connection") from None

    def _connect_again(self):
        """Connect anew if the connection was lost."""
        if self._is_closed:
            raise ConnectionError("this client is closed")
        if self._has_hung_up():
            self._hang_up()
            if any(self._opened.values()):
                raise ConnectionError("the connection was lost; what was open goes back")
            self._connect()

    def _has_hung_up(self):
        """Return whether the server has closed the connection, or it has failed before."""
        waits = BlockingIOError
        if self._tls:
            import ssl
            waits = ssl.SSLWantReadError
        try:
            if self._sock:
                self._sock.settimeout(0)
                self._sock.recv(1)           # no answer is due
        except waits:
            return False
        except OSError:
            pass
        return True

    def _try(self, call):
        """Make a call, and hang up if it fails."""
        try:
            return call()
        except ServerError:
            raise
        except BaseException:                # it would give the rest of the answer to the next
            self._hang_up()
            raise

    def _line(self):
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the server has closed the connection")
        if line.startswith(b"HTTP/"):
            raise ConnectionError("this is a port for HTTP; memcache_port is another one")
        if line.partition(b" ")[0].strip() in (b"ERROR", b"CLIENT_ERROR", b"SERVER_ERROR"):
            raise ServerError(os.fsdecode(line).strip())
        return line[:-2]

    def _items(self, line):
        return [data for _, data in self._blocks(line)]

    def _blocks(self, line):
        """Yield (the words of its VALUE line, data) for each item of an answer."""
        while line != b"END":
            words = line.split(b" ")
            if words[0] != b"VALUE" or len(words) < 4 or not words[3].isdigit():
                raise ConnectionError("%r is no answer to a get" % line[:80])
            data = self._file.read(int(words[3]) + 2)
            if not data.endswith(b"\r\n") or len(data) < int(words[3]) + 2:
                raise ConnectionError("the server has closed the connection")
            yield words, data[:-2]
            line = self._line()

    def _table(self, command, begin):
        """Return the lines of an answer up to END, without what all begin with."""
        def read(line):
            lines = []
            while line != b"END":
                lines.append(os.fsdecode(line)[len(begin):])
                line = self._line()
            return lines

        return self._ask(os.fsencode(command) + b"\r\n", read)


# For a Cluster: how long a server may take to accept a connection; how long a peek at a server
# waits for an item; how often servers with TLS are asked instead.
_CONNECT_SECONDS = 1
_WATCH_SECONDS = 30
_TLS_POLL_SECONDS = 0.05

# A server that has failed is left alone for at least so many seconds, and for so many times as
# long as the failure has taken.
_REST_SECONDS, _REST_FACTOR = 1, 10


def _shuffled(members):
    import random                        # which a server does not need
    return random.sample(members, len(members))


class _Member:
    """One server of a Cluster."""

    def __init__(self, arguments):
        self._arguments = arguments
        self.address = "%s:%s" % arguments[:2]
        self.clients = {}                # whether it is for waiting -> a Client, once it is needed
        self.watched = None              # the key of a peek that has not been answered yet
        self.rests_until = 0             # when it may be asked again, as time.monotonic()

    @contextlib.contextmanager
    def asking(self, watching=False):
        """Yield a Client: for commands, or for waiting. If it cannot connect, or the `with` block
        fails, leave the server alone for a while. Raises OSError and ServerError."""
        began = time.monotonic()
        try:
            if watching not in self.clients:
                host, port, timeout, *rest = self._arguments
                client = Client(host, port, min(timeout, _CONNECT_SECONDS), *rest)
                client._timeout = timeout
                self.clients[watching] = client
            yield self.clients[watching]
        except (OSError, ServerError) as error:
            now = time.monotonic()
            if isinstance(error, OSError) or str(error).startswith("SERVER_ERROR"):
                self.rests_until = now + max(_REST_SECONDS, _REST_FACTOR * (now - began))
            self.stop_watching()
            raise

    def stop_watching(self):
        """Give up a peek that has not been answered."""
        self.watched = None
        if True in self.clients:
            self.clients.pop(True).close()

    def close(self):
        """Hang up."""
        while self.clients:
            self.clients.popitem()[1].close()


class Cluster(Client):
    """A Client of several servers that know nothing of each other: `Client(["10.0.0.1",
    "10.0.0.2:22134"])`.

    A put goes to any of them, and to another one if that refuses it or fails: so each queue is on
    all of them, and only roughly in order. An item may be put twice if the connection is lost
    before the answer: `perhaps_twice` counts such items, and a warning is logged. Gets ask all
    servers, in any order, and wait for all at once. A server that has failed is left alone for a
    while. All other methods raise TypeError: use a Client of one server.

    Raises OSError when no server can be reached; ServerError where all have refused.
    """

    def __init__(self, host: "list[str]", port: int = 22133, timeout: float = 5,
                 user: "str | None" = None, password: str = "",
                 tls: "ssl.SSLContext | None" = None) -> None:
        if not host:
            raise ValueError("there is no server in the list")
        self.perhaps_twice = 0
        self._tls = tls
        self._is_closed = False
        self._members = [_Member((*_host_and_port(server, port), timeout, user, password, tls))
                         for server in host]

    def put(self, queue: str, data: bytes, expiry: int = 0, flags: int = 0, delay: float = 0,
            sync: bool = False) -> bool:
        """Put an item on one of the servers; return False if none has taken it."""
        return self._put(queue, [data], expiry, flags, delay, sync) == 1

    def put_many(self, queue: str, items: "Iterable[bytes]", expiry: int = 0,
                 flags: int = 0) -> int:
        """Put items, a batch on a server; return how many were taken."""
        return sum(self._put(queue, batch, expiry, flags)
                   for batch in _batches(items, _PUT_AT_ONCE))

    def _put(self, queue, items, *how):
        """Put items on one server, and those that it does not take on the next one, and so on;
        return how many were taken."""
        left, failure, unknown = items, None, None
        for member in self._in_any_order(also_resting=True):
            try:
                with member.asking() as client:
                    client._connect_again()
            except (OSError, ServerError) as error:    # nothing was sent
                failure = error
                continue
            tried = left
            try:
                with member.asking() as client:
                    answers, refused, lost = client._put_batch(queue, tried, *how)
                    left = [item for item, is_taken in itertools.zip_longest(tried, answers)
                            if not is_taken]
                    if refused and (not lost or not answers[-1]):    # some refuse, and hang up
                        raise refused
                    if lost:
                        raise lost
                failure = None
            except ServerError as error:
                if not str(error).startswith("SERVER_ERROR"):
                    raise
                failure = error
            except OSError as error:
                failure = unknown = error
                self.perhaps_twice += len(tried) - len(answers)
                log.warning("the connection to %s was lost before the answer to a put: what was "
                            "put may be there, and is put elsewhere", member.address)
            if not left:
                return len(items)
        if unknown or failure:
            raise unknown or failure
        return len(items) - len(left)

    def _in_any_order(self, also_resting=False):
        """Return the servers in random order, without those that are left alone; also_resting: with
        these at the end."""
        if self._is_closed:
            raise ConnectionError("this client is closed")
        now = time.monotonic()
        members = sorted(_shuffled(self._members), key=lambda member: member.rests_until > now)
        return [member for member in members if also_resting or member.rests_until <= now]

    def _get(self, queue, timeout, options):
        if {"open", "close", "abort", "touch"} & set(options.lower().split("/")):
            raise TypeError("the next call may ask another server: use open() or work()")
        return self._find(queue, timeout, options)[1]

    def export(self, queue: str, count: "int | None" = None,
               take: bool = False) -> "Iterator[dict]":
        """Raise TypeError, as all methods do that are about one server."""
        self._send(b"")

    def _find(self, queue, timeout, options):
        """Return (the Client that has read items, the items), (None, []) if there are none."""
        end = time.monotonic() + timeout
        members = self._in_any_order(also_resting=True)
        failure, reached = None, False
        while True:
            for member in members:
                if reached and member.rests_until > time.monotonic():
                    continue
                try:
                    with member.asking() as client:
                        items = client._get(queue, 0, options)
                except (OSError, ServerError) as error:
                    if str(error).startswith("CLIENT_ERROR"):
                        raise
                    failure = error
                    continue
                reached = True
                if items:
                    return client, items
            if time.monotonic() >= end:
                if not reached:
                    raise failure
                return None, []
            members = self._wait(queue, end)

    def _wait(self, queue, end):
        """Wait until there is an item, or the time is up; return the servers to ask then."""
        key = self._keys(queue)
        while time.monotonic() < end:
            left = end - time.monotonic()
            if self._tls:                    # whose sockets can be readable without an answer
                time.sleep(min(left, _TLS_POLL_SECONDS))
                break
            found, watched = [], {}
            for member in self._in_any_order():
                try:
                    if member.watched not in (None, key):
                        member.stop_watching()
                    with member.asking(True) as client:
                        if member.watched is None:
                            client._send(b"get %b/peek/t=%d\r\n" % (key, 1000 * min(
                                left, _WATCH_SECONDS)), _WATCH_SECONDS)
                            member.watched = key
                        client._sock.settimeout(client._timeout)
                        watched[client._sock] = member
                except (OSError, ServerError):
                    pass
            if not watched:
                time.sleep(min(left, _REST_SECONDS))
                continue
            with selectors.DefaultSelector() as selector:
                for sock, member in watched.items():
                    selector.register(sock, selectors.EVENT_READ, member)
                ready = [key.data for key, _ in selector.select(min(left, _REST_SECONDS))]
            for member in ready:
                member.watched = None
                try:
                    with member.asking(True) as client:
                        if client._try(lambda client=client: client._items(client._line())):
                            found.append(member)
                except OSError:
                    pass
                except ServerError as error:
                    if not str(error).startswith("SERVER_ERROR"):
                        raise
            if found:
                return _shuffled(found)
        return self._in_any_order()

    def work(self, queue: "str | list[str]", timeout: float = 0) -> "Iterator[bytes]":
        """Yield items, as Client.work() does."""
        while True:
            with self.open_many(queue, 1, timeout) as items:
                if not items:
                    return
                yield items[0]

    def abort(self, queue: "str | list[str]", delay: float = 0, tail: bool = False) -> None:
        """Give back what is open of a queue."""
        for client in self._connected():
            client.abort(queue, delay, tail)

    def touch(self, queue: "str | list[str]") -> None:
        """Let the time limit of what is open of a queue start anew."""
        for client in self._connected():
            client.touch(queue)

    def _connected(self):
        return [member.clients[False] for member in self._members if False in member.clients]

    def _check_closed(self, queue):
        for client in self._connected():
            client._check_closed(queue)

    def _send(self, command, timeout=0):
        raise TypeError("this has to be asked of one server")

    def close(self) -> None:
        """Hang up; what is open goes back."""
        self._is_closed = True
        for member in self._members:
            member.close()


@contextlib.contextmanager
def serve(port: int = 0, spool: "str | None" = None, config: "str | None" = None,
          settings: "dict[str, dict] | None" = None) -> "Iterator[Server]":
    """Run a server on 127.0.0.1 in a thread for a `with` block, which gets the Server; its `port`
    is a free one if `port` is 0.

        with kestrel.serve() as server, kestrel.Client(port=server.port) as client:
            client.put("q", b"x")

    spool: the directory of the journals, None for one that is deleted in the end. config: the
    path of a config file. settings: in its place, what would stand in it, as {"server":
    {"max_queues": 5}, "queue jobs": {"max_items": 100}}. There is an admin port only if these set
    it. Raises ConfigError, and OSError when it cannot start.
    """
    import tempfile
    with contextlib.ExitStack() as stack:
        if settings:
            file = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".conf"))
            for section, values in settings.items():
                file.write("[%s]\n" % section)
                file.writelines("%s = %s\n" % pair for pair in values.items())
            file.flush()
            config = file.name
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


# == 11. Command line ======================================================================
#
# What `python3 kestrel.py` does: arguments, logging, signals, exit status; the tools that read,
# pack and copy journals without asking a server; and the commands that ask a running one.


_LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"

# How many log lines that differ only in their details pass in how many seconds.
_REPEATS = 20
_REPEAT_SECONDS = 10


def main(arguments=None):
    """Run the daemon, or the tool or command that the arguments ask for; return the exit status.
    `arguments` default to the command line's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            if arguments and arguments[0] in _COMMANDS:
                return _run_command(*arguments)
            options = _parse_options(arguments)
            logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, handlers=[LogStream()])
            if options.tool:
                function, _, _ = _TOOLS[options.tool]
                return function(options) or 0
            server = _start_server(_read_config(options))
        finally:
            print(end="", flush=True)        # so that its errors come here, after --help too
    except ConfigError as error:
        _complain(str(error))
        return os.EX_CONFIG              # systemd does not start it again, see kestrel.service
    except OSError as error:
        if error.filename != _STDOUT:
            return _fail(1, "%s%s" % (error.filename + ": " if error.filename else "",
                                      error.strerror or error))
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())     # it is flushed again at the end
        if error.errno == errno.EPIPE:       # nobody reads the pipe any more: `| head`
            return 0
        return _fail(2, "%s: %s" % (_STDOUT, error.strerror))
    server.run()
    return 0


def _read_config(options):
    """Return the Config that the options ask for. Raises ConfigError."""
    return Config(options.config, {key: value for key, value in vars(options).items()
                                   if key in SERVER_SETTINGS and value is not None})


def _start_server(config):
    """Return a Server that is ready to run as a daemon. Raises ConfigError and OSError."""
    # A collection looks at every item in memory, which takes a tenth of a second for half a
    # million of them, and finds nothing: there are no cycles.
    gc.disable()
    try:
        _set_up_log(config.server)
    except OSError as error:                 # systemd would start it again and again
        raise ConfigError("kestrel.py: %s: %s" % (error.filename, error.strerror)) from None
    _handle_first_signals()
    _raise_file_limit()
    server = Server(config, _inherited(config), _notify)
    server.broker.reloaded.append(functools.partial(_set_up_log_again, config.server))
    _handle_signals(server)
    watchdog = int(os.environ.get("WATCHDOG_USEC", 0))
    if watchdog and os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
        # Twice as often as systemd wants it, in milliseconds.
        server.every(watchdog // 2000, lambda: server.notify("WATCHDOG=1"))
    return server


def _fail(status, why):
    """Tell why on standard error; return the exit status."""
    _complain("kestrel.py: %s" % why)
    return status


def _complain(text):
    """Print lines on standard error, as errors for systemd's journal."""
    for line in text.splitlines():
        print("<3>" + line if _logs_to_systemd() else line, file=sys.stderr)


@contextlib.contextmanager
def _naming(name):
    """Set the `filename` of any OSError that a `with` block raises."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), name) from None


_STDOUT = "standard output"


class Output(io.FileIO):
    """Standard output. Its errors name it, so that they are not taken for the server's."""

    def write(self, data):
        with _naming(_STDOUT):
            return super().write(data)


def _argument_type(parse):
    """Return a function as a type for argparse: users are told the text of its ValueError."""
    def convert(text):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _parse_options(arguments):
    """Return the options of the daemon and the tools. Exits if they make no sense."""
    parser = argparse.ArgumentParser(
        prog="kestrel.py", usage="%(prog)s [options]\n       %(prog)s COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="A tiny, durable queue that speaks memcache: without a command, the daemon.",
        epilog="commands (COMMAND --help says more):\n" + "\n".join(
            "  %-8s %s" % (name, what) for name, (_, what, _) in _COMMANDS.items()))
    parser.add_argument("-c", metavar="FILE", dest="config", help="the config file to read")
    parser.add_argument("--listen", metavar="ADDRESSES",
                        help="the addresses to listen on (default 127.0.0.1)")
    parser.add_argument("--port", dest="memcache_port",
                        help="the port for memcache clients (default 22133)")
    parser.add_argument("--spool", metavar="DIRECTORY", dest="queue_path",
                        help="where the journals are (default ./spool)")
    tools = parser.add_argument_group("tools").add_mutually_exclusive_group()
    for name, (_, paths, what) in _TOOLS.items():
        tools.add_argument("--" + name, action="store_const", const=name, dest="tool",
                           help=(paths and paths + ": ") + what)
    parser.add_argument("paths", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true",
                        help="with --dump: a JSON object for each record, with all of its data; "
                             "with --verify: for each file")
    parser.add_argument("--kestrel", action="store_true",
                        help="with --pack: as Kestrel 2.x can read it, without flags, delays, "
                             "pauses and check sums")
    parser.add_argument("--every", metavar="TIME", type=_argument_type(TIME.parse),
                        help="with --copy: again and again, such as each 1s")
    parser.add_argument("--version", action="version", version="kestrel.py " + __version__)
    first = "".join(arguments[:1]).partition("=")[0]
    if first in ("--server", "--user", "--tls", "--cafile"):
        parser.error("%s comes after the command" % first)
    options = parser.parse_args(arguments)
    for name, tools in (("json", ("dump", "verify")), ("kestrel", ("pack",)), ("every", ("copy",))):
        if getattr(options, name) and options.tool not in tools:
            parser.error("--%s goes with --%s" % (name, " and --".join(tools)))
    _, paths, _ = _TOOLS.get(options.tool, (None, "", None))
    count, most = len(options.paths), len(paths.split())
    if count < most or count > most > 0 and not paths.endswith("..."):
        parser.error("--%s takes %s" % (options.tool, paths))
    if count and not paths:
        name = options.paths[0]
        parser.error(("%s takes options of its own, after it; these are the server's"
                      if name in _COMMANDS else "there is no command %s") % name)
    return options


def _dump(options):
    """Print what is in journal files; the exit status is 1 if one of them is damaged."""
    status = 0
    for path in options.paths:
        for record in dump_records(path):
            if "damage" in record:
                status = 1
            if options.json:
                if "data" in record:
                    record.update(_in_json(record.pop("data")))
                print(json.dumps({"file": path, **record}))
            elif "damage" in record:
                print("%10d %s: %s; %s" % (
                    record["offset"], path, record["damage"],
                    "%d bytes are damaged" % record["bytes"] if record["bytes"]
                    else "some writes are missing"))
            else:
                if "data" in record:
                    record["data"] = repr(record["data"][:40])[1:]
                print("%10d %-20s %s" % (record.pop("offset"), record.pop("operation"), " ".join(
                    "%s=%s" % pair for pair in record.items())))
    return status


def _in_json(data):
    """Return data as an entry of a JSON object: `data` if it is text, else `base64`."""
    try:
        return {"data": data.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


# How often a file that ends within a write is read before that counts as damage.
_VERIFY_TRIES = 5


def verify_file(path: str) -> dict:
    """Return what is good in a journal file: how many of its `bytes` are `checked` by check sums,
    and the numbers of `records` and of `items` added; `damage` is a list of dicts: begin, end, why,
    and how many items may be `lost` there. The file is only read. Raises OSError."""
    for _ in range(_VERIFY_TRIES):
        found = {"file": path, "bytes": os.path.getsize(path), "checked": 0, "records": 0,
                 "items": 0, "damage": []}
        for record in read_good(path):
            if type(record) is Cut:
                found["damage"].append({"begin": record.begin, "end": record.end,
                                        "why": record.why, "lost": record.lost})
            else:
                opcode, xid, item, _, end = record
                found["bytes"] = max(end, found["bytes"])
                found["records"] += 1
                found["items"] += item is not None
                if opcode == CHECK:
                    found["checked"] += xid[0] + _CHECK.size
        if not found["damage"] or found["damage"][0]["end"] < found["bytes"]:
            break
        time.sleep(0.1)                      # perhaps a server is just writing there
    return found


def _journal_names(spool):
    """Return {queue: {number of the file, None for the current one: its name}} of a spool: the
    files that count, see find_journals(), the oldest first."""
    found, packs = {}, []
    for entry in os.scandir(spool):
        match = _JOURNAL_NAME.fullmatch(entry.name)
        if match and "~" not in entry.name and entry.is_file():
            files = found.setdefault(match[1], {})
            if match[3]:
                packs.append((files, int(match[2]), entry))
            else:
                files[int(match[2]) if match[2] else None] = entry.name
    for files, last, entry in sorted(packs, key=lambda pack: pack[1]):
        for number in [number for number in files if number is not None and number <= last]:
            del files[number]
        try:
            name = entry.name if entry.stat().st_size else None
        except FileNotFoundError:            # a server has just given it the name of a file
            name = entry.name[:-len(".pack")]
        if name:
            files[last] = name
    return {queue: dict(sorted(files.items(), key=lambda pair: (pair[0] is None, pair[0])))
            for queue, files in found.items()}


def _verify(options):
    """Print which journal files of a spool are good; the exit status is 1 if one is not."""
    with contextlib.suppress(OSError):       # a server may be using it; systemd may forbid that
        os.nice(19)
    spool, = options.paths
    status = 0
    for _, files in sorted(_journal_names(spool).items()):
        for name in files.values():
            try:
                found = verify_file(os.path.join(spool, name))
            except FileNotFoundError:        # a server has packed it meanwhile
                continue
            status |= bool(found["damage"])
            if options.json:
                print(json.dumps(found), flush=True)
                continue
            print("%s %s: %d records, %d items, %d bytes, %d of them with check sums" % (
                "BAD" if found["damage"] else "ok ", name, found["records"], found["items"],
                found["bytes"], found["checked"]))
            for one in found["damage"]:
                where = ("bytes %(begin)d to %(end)d are damaged" if one["end"] > one["begin"]
                         else "some writes are missing at byte %(begin)d")
                print(("     %(why)s: " + where + "; %(lost)d items may be lost") % one)
    return status


# -- copies of a spool
#
# A journal file only grows, until it is replaced as a whole. So a copy of its first bytes is what
# it was at some time, and a copy of all files of a queue, each as long as it was at one moment, is
# the queue of that moment. Files of different moments are not: an operation on the head would meet
# another item. So a pass that is broken off leaves each queue as it was, or as it is to be: if more
# than one of its files changes, it is first noted how to go back, and then, when all is there, what
# is to be done. find_journals() does what is noted.

# How often the files of a queue are opened anew if they change meanwhile.
_COPY_TRIES = 60

# How many passes are made at most until one takes less than COPY_SECONDS. The first may take long;
# the others copy only what has changed since.
_PASSES = 4


def copy_spool(source: str, dest: str) -> int:
    """Bring the copy of a spool up to date, which a server may be using; return how many bytes were
    copied. No server may use the copy, see _lock_spool(). Each queue is copied as it is at a moment
    of its own. Raises OSError, also if what is at `dest` is no copy, or a server has used it: it
    would be deleted."""
    there = _journal_names(source)
    mark = os.path.join(dest, COPY_MARK)
    if os.path.samefile(source, dest):
        raise OSError(errno.EINVAL, "the spool and its copy are the same", dest)
    if not os.path.isdir(mark):
        if os.listdir(dest):
            raise OSError(errno.ENOTEMPTY, "this is no copy, or a server has used it: move it "
                          "away, or copy to an empty directory", dest)
        os.mkdir(mark)
    if not any(there.values()) and any(_journal_names(dest).values()):
        raise OSError(errno.ENOENT, "there are no journals, but the copy has some: is this the "
                      "right spool?", source)
    find_journals(dest)                      # finish what was broken off
    copied = 0
    for _ in range(_PASSES):
        began = time.time(), time.monotonic()
        lock = _hold_moves(source)
        try:
            copied += _copy_queues(source, dest)
        finally:
            os.close(lock)
        # The server goes by the time of day, which may have been set meanwhile.
        now = time.time(), time.monotonic()
        if all(-1 < end - begin < COPY_SECONDS - 1 for begin, end in zip(began, now)):
            return copied
    raise OSError(errno.EAGAIN, "copying takes so long that what a server has moved from one queue "
                  "to another meanwhile may be missing", source)


def _hold_moves(spool):
    """Have the server that uses a spool move no items between queues for now: an item that goes
    from a queue that is copied later to one that has been copied would be missing in the copy.
    Return a descriptor, which is to be closed."""
    path = os.path.join(spool, COPY_LOCK)
    try:
        if not os.path.isdir(path):
            os.mkdir(path)
            os.chmod(path, 0o777)            # the server, or the next copier, may be another user
        os.utime(path)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, "%s: %s" % (path, error.strerror)) from None
        _warn_of_moves(path, error.strerror)
        return os.open(spool, os.O_RDONLY | os.O_CLOEXEC)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_SH)           # a server holds it for a moment only
    return fd


@functools.lru_cache(maxsize=None)       # once, however many passes are made
def _warn_of_moves(path, why):
    log.warning("%s: %s; if a server uses that spool, what it moves from one queue to another "
                "during a pass may be missing until the next", path, why)


def _copy_queues(source, dest):
    """Bring the copies of all queues up to date, or of none: an item may have been moved from one
    to another. Return how many bytes were copied."""
    copied, done = 0, []
    inodes, there, have = _current_inodes(source), _journal_names(source), _journal_names(dest)
    try:
        for name in sorted(set(there) | set(have)):
            files = _open_at_one_moment(source, name, inodes.get(name), there.get(name, {}))
            try:
                pieces, changes = _prepare_copy(name, files, dest, have.get(name, {}))
                if changes and not done:     # what to go back to
                    note_files(dest, [
                        (file, file, os.path.getsize(os.path.join(dest, file)))
                        for found in have.values() for file in found.values()])
                done += changes
                copied += sum(_copy_rest(fd, size, path) for path, fd, size in pieces)
            finally:
                _close_all([fd for _, fd, _ in files])
        if done:
            note_files(dest, done)
            finish_copy(dest)
    except BaseException:
        find_journals(dest)                  # undo it
        raise
    return copied


def _current_inodes(spool):
    """Return {queue: inode of its current file}."""
    return {entry.name: entry.inode() for entry in os.scandir(spool) if "." not in entry.name}


def _open_at_one_moment(spool, name, inode, found):
    """Return [(number, descriptor, size)] of the files of a queue, the oldest first, as they were
    at one moment; [] if there is no such queue. inode: of its current file, before the files were
    looked for; found: {number: name} of them. Raises OSError."""
    for attempt in range(_COPY_TRIES):
        opened = []
        try:
            for number, file in found.items():
                opened.append((number, os.open(os.path.join(spool, file),
                                               os.O_RDONLY | os.O_CLOEXEC)))
            sizes = [os.fstat(fd).st_size for _, fd in opened]
            same = [_identity(os.stat(os.path.join(spool, file))) == _identity(os.fstat(fd))
                    for file, (_, fd) in zip(found.values(), opened)]
            current = [os.fstat(fd).st_ino for number, fd in opened if number is None] or [None]
            # New files come with another one that is renamed or deleted. A current file that is
            # still the same was there all the time: no other one has been given a number since.
            rests = sizes == [os.fstat(fd).st_size for _, fd in opened]
            if all(same) and current == [inode] and (rests or attempt > _COPY_TRIES // 2):
                return [(number, fd, size) for (number, fd), size in zip(opened, sizes)]
        except FileNotFoundError:
            pass
        _close_all([fd for _, fd in opened])
        time.sleep(0.001 * attempt)
        inode, found = _current_inodes(spool).get(name), _journal_names(spool).get(name, {})
    raise OSError(errno.EAGAIN, "the files of this queue do not come to rest",
                  os.path.join(spool, name))


def _prepare_copy(name, files, dest, have):
    """Prepare the copy of one queue. Return [(path, descriptor, size)]: what is to be copied there,
    behind what is there; and what is to become of its files then, as note_files() takes it; both
    empty if nothing has changed. files: see _open_at_one_moment(). have: {number: name} of its
    files in the copy."""
    def file_of(number):
        return name if number is None else "%s.%d" % (name, number)

    at, used = {}, set()
    for number, fd, size in files:
        at[number] = "%s~~%d" % (name, _unique_number())       # find_journals() would delete it
        old = number if number in have else None               # the current one has a number now
        path = os.path.join(dest, file_of(old))
        if old in have and old not in used and _begins_with(fd, size, path):
            used.add(old)
            if old == number:
                at[number] = file_of(number)
            else:
                with contextlib.suppress(OSError):             # not on every file system
                    os.link(path, os.path.join(dest, at[number]))
    gone = set(have) - set(at)
    if not gone and all(at[number] == file_of(number) and size == os.path.getsize(
            os.path.join(dest, at[number])) for number, _, size in files):
        return [], []
    return [(os.path.join(dest, at[number]), fd, size) for number, fd, size in files], [
        *((at[number], file_of(number), size) for number, _, size in files),
        *((file_of(number), None, 0) for number in gone)]


def _begins_with(fd, size, path):
    """Return whether a journal file of this size begins with what is at `path`."""
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        begin = max(0, length - _READ_SIZE)
        return length <= size and file.read(_READ_SIZE) == os.pread(
            fd, min(length, _READ_SIZE), 0) and (
                os.pread(file.fileno(), _READ_SIZE, begin) == os.pread(fd, length - begin, begin))


def _copy_rest(fd, size, path):
    """Append what is missing of the first bytes of a file, and fsync it."""
    target = _open_journal(path, os.O_CREAT)
    try:
        done = begin = os.fstat(target).st_size
        while done < size:
            piece = os.pread(fd, min(_STEP_SIZE, size - done), done)
            if not piece:
                raise OSError(errno.EIO, "it has become shorter", path)
            _write_all(target, [piece], done, len(piece))
            done += len(piece)
        if done > begin:
            os.fsync(target)
        return done - begin
    finally:
        os.close(target)


def _copy(options):
    """Copy a spool once, or again and again: then a failure is logged after the first pass, and the
    next pass tries again."""
    source, dest = options.paths
    if not os.path.isdir(source):
        raise OSError(errno.ENOENT, "%s: there is no such spool" % source)
    lock = _lock_spool(dest)
    trouble = None                       # why the last pass failed, "" if it did not
    try:
        while True:
            try:
                copied = copy_spool(source, dest)
                if copied or options.every is None:
                    log.info("%s: %d bytes copied to %s", source, copied, dest)
                trouble = ""
            except OSError as error:
                if trouble is None:
                    raise
                if str(error) != trouble:
                    trouble = str(error)
                    log.error("%s: cannot be copied to %s: %s; trying again", source, dest, trouble)
            if options.every is None:
                return
            time.sleep(options.every / 1000)
    except KeyboardInterrupt:
        pass
    finally:
        os.close(lock)


def _check_whole(path):
    """Raise OSError if a journal file is damaged. It may be no journal at all."""
    try:
        with open(path, "rb") as file:
            for _ in read_records(file):
                pass
    except Damage as damage:
        if not damage.torn or not damage.offset:
            raise OSError(errno.EINVAL, "%s: %s. Nothing was changed; if this is a journal, the "
                          "next start of a server repairs it" % (path, damage)) from None


def _pack(options):
    """Replace the journals of an unused queue with one file."""
    path, = options.paths
    path = os.path.abspath(path)             # one that ends with / would be a directory
    directory, name = os.path.split(path)
    os.listdir(directory)                # there must be one: _lock_spool() would make it
    spool = _lock_spool(directory)
    try:
        older = find_journals(directory, name).get(name)
        if older is None:
            raise OSError(errno.ENOENT, "%s: there is no such queue" % path)
        for file in [*("%s.%d" % (path, number) for number in older), path]:
            if os.path.exists(file):
                _check_whole(file)
        host = Alone()
        host.locks_files = False             # the spool is locked
        queue = Queue(name, directory, QueueConfig(
            max_memory_size=UNLIMITED, check_journal=not options.kestrel), older, host)
        before = queue.journal.size
        given_up = queue.make_plain() if options.kestrel else ()
        queue.pack()
        for what, count in given_up:
            if count:
                log.warning("%s: %s: %d", path, what, count)
        log.info("%s: %d items, %d bytes before, %d bytes now", path, queue.count, before,
                 queue.journal.size)
        queue.close()
    finally:
        os.close(spool)


# -- commands that talk to a server

def _connect(options, timeout=30, server=None):
    """Return a Client of a server, by default the one of the options. Raises OSError, which names
    the server."""
    server = server or options.server
    host, port = _host_and_port(server)
    tls = options.cafile
    if options.tls and not tls:
        import ssl
        tls = ssl.create_default_context()
    with _naming(server):
        return Client(host, port, timeout, options.user, options.password, tls)


def _password(user):
    """Return the password of a user. Raises EOFError if there is none, and nobody to ask."""
    if user is None or "KESTREL_PASSWORD" in os.environ:
        return os.environ.get("KESTREL_PASSWORD", "")
    import getpass
    import warnings
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")   # without a terminal it would read standard input
            return getpass.getpass("password of %s: " % user)
    except (getpass.GetPassWarning, EOFError):
        raise EOFError("no password: set $KESTREL_PASSWORD") from None


def _show(options, names, rows):
    """Print a table, or a JSON object for each row."""
    if options.json:
        for row in rows:
            print(json.dumps(dict(zip(names, row))))
    else:
        _show_table(names, rows)


def _show_table(names, rows):
    widths = [max(map(len, map(str, column))) for column in zip(names, *rows)]
    for row in (names, *rows):
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())


def _command_put(client, options):
    if options.item:
        items = map(os.fsencode, options.item)
    elif options.whole:
        items = [sys.stdin.buffer.read()]
    else:
        items = (line.rstrip(b"\n") for line in sys.stdin.buffer)
    _put_all(options, ((client.put(options.queue, item, options.expiry, 0, options.delay,
                                   options.sync), 1) for item in items))


def _put_all(options, puts, show=lambda done: None):
    """Put items, and return how many. puts: a generator that puts some at each step, and yields
    (how many of them were taken, how many they were). show: called with how many were put so far.
    Raises ValueError when some are not taken."""
    done = 0
    try:
        for taken, count in puts:
            done += taken
            if taken < count:
                raise ValueError("%s is full or paused, or the item is too large; %d items were put"
                                 % (options.queue, done))
            show(done)
    except (OSError, ServerError, KeyboardInterrupt):
        if done:                             # so that they are not put again
            print("kestrel.py: at least %d items were put; then:" % done, file=sys.stderr)
        raise
    return done


def _command_get(client, options):
    done = 0
    while done < options.n:                  # open until printed
        with client.open_many(options.queue, min(options.n - done, _PUT_AT_ONCE),
                              options.wait) as items:
            for item in items:
                _print_item(item)
        done += len(items)
        if not items:
            break
    return int(not done)


def _command_peek(client, options):
    items = client.peek_many(options.queue, options.n)
    for item in items:
        _print_item(item)
    return int(not items)


def _command_export(client, options):
    """Print items as JSON objects, a line each, and take them with --take."""
    show, done = _progress(_count_of(client, options)), 0
    for done, row in enumerate(client.export(options.queue, options.count, options.take), 1):
        print(json.dumps({**_in_json(row.pop("data")), **row}), flush=options.take)
        show(done)
    show(done, True)


def _command_import(client, options):
    """Put what export has printed."""
    bad = None

    def rows():
        nonlocal bad
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                row = json.loads(line)
                data = (row["data"].encode() if "data" in row
                        else base64.b64decode(row["base64"], validate=True))
                row = {"data": data, "flags": int(row.get("flags", 0)),
                       "expiry": int(row.get("expiry", 0))}
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError,
                    RecursionError):
                bad = number
                return                       # what comes before it is put
            yield row

    show = _progress(None)
    done = _put_all(options, _put_exported(client, options.queue, rows()), show)
    show(done, True)
    if bad:
        raise ValueError("line %d is not what export prints; the %d items before it were put" % (
            bad, done))


def _put_exported(client, queue, rows):
    """Put items as export() yields them, with their flags and expiries; yield (how many were taken,
    of how many) for each batch."""
    for (flags, expiry), same in itertools.groupby(
            rows, lambda row: (row["flags"], -(-row["expiry"] // 1000))):
        for batch in _batches((row["data"] for row in same), _PUT_AT_ONCE):
            yield client.put_many(queue, batch, expiry, flags), len(batch)


def _waiting(client, queue):
    """Return how many items of a queue wait. Raises ValueError if there is no such queue."""
    for name, items, *_ in client.queues(queue):
        if name == queue:
            return items
    raise ValueError("there is no queue %s" % queue)


def _count_of(client, options):
    """Return how many items a command is about."""
    waiting = _waiting(client, options.queue)
    return waiting if options.count is None else min(waiting, options.count)


def _progress(total):
    """Return a function to call with the number of items done, which shows it on a terminal after
    the first second. total: of how many, None if that is unknown."""
    began, shown = time.monotonic(), None

    def show(done, is_end=False):
        nonlocal shown
        now = time.monotonic()
        if sys.stderr.isatty() and (
                now > began + 1 if shown is None else is_end or now > shown + 0.2):
            shown = now
            share = done / total if total else 0
            bar = "[%-30s] %3d %% " % ("#" * int(30 * share), 100 * share) if total else ""
            sys.stderr.write("\r%s%d items, %d a second%s" % (
                bar, done, done / (now - began), "\n" if is_end else ""))
            sys.stderr.flush()

    return show


def _print_item(item):
    sys.stdout.buffer.write(item + b"\n")
    sys.stdout.buffer.flush()


_QUEUE_COLUMNS = "queue", "items", "bytes", "open", "waiters", "delayed", "paused"


def _queue_rows(client, stats, prefix=""):
    """Return the rows of a table of queues; stats: as Client.stats() returns them."""
    return [(*row, int(stats.get("queue_%s_delayed" % row[0], 0)),
             PAUSES[int(stats.get("queue_%s_paused" % row[0], 0))])
            for row in client.queues(prefix)]


def _command_list(client, options):
    _show(options, _QUEUE_COLUMNS, _queue_rows(client, client.stats(), options.prefix or ""))


def _command_stats(client, options):
    stats = client.stats()
    for name, value in stats.items():
        if re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?", value) and name != "version":
            stats[name] = json.loads(value)
    if options.queue:
        begin = "queue_%s_" % options.queue
        names = {one.name for one in QUEUE_STATS} | {"children"}      # and not of queue_q_other
        stats = {name[len(begin):]: value for name, value in stats.items()
                 if name.startswith(begin) and name[len(begin):] in names}
        if not stats:
            raise ValueError("there is no queue %s" % options.queue)
    if options.json:
        print(json.dumps(stats))
    else:
        _show_table(("name", "value"), list(stats.items()))


def _command_top(client, options):
    """Show the deepest queues, anew each second, until it is interrupted."""
    import shutil
    before, then = {}, 0
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                client = client or _connect(options)
                stats = client.stats()
                rows, mono = _queue_rows(client, stats), time.monotonic()
                head = "%s  %s  %s items  up %s s" % (
                    options.server, client.status(), stats["curr_items"], stats["uptime"])
                if stats.get("trouble", "none") != "none":
                    head += "\n" + _red(stats["trouble"])
                taken = {row[0]: int(stats.get("queue_%s_get_hits" % row[0], 0)) for row in rows}
                rows = [(*row, round((taken[row[0]] - before[row[0]]) / (mono - then), 1)
                         if row[0] in before else "") for row in rows]
                before, then = taken, mono
            except (OSError, ServerError) as error:
                client, head = None, _red("%s  %s" % (options.server, error))
                rows = []
            rows.sort(key=lambda row: row[-1 if options.by == "rate" else 1] or 0, reverse=True)
            lines = max(1, shutil.get_terminal_size().lines - 4)     # not all know their size
            sys.stdout.write("\33[H\33[2J" + head + "\n\n")
            _show_table((*_QUEUE_COLUMNS, "gets/s"), rows[:lines])
            sys.stdout.flush()
            time.sleep(1)


def _red(text):
    return "\33[31m%s\33[0m" % text if sys.stdout.isatty() else text


def _command_move(client, options):
    total, moved = _count_of(client, options), 0
    show = _progress(total)
    while moved < total:
        batch = client.move(options.queue, options.dest, min(total - moved, _MOVED_AT_ONCE))
        moved += batch
        show(moved)
        if not batch:
            break
    show(moved, True)
    print(moved)


def _command_drain(client, options):
    """Move all that waits to other servers, each queue to one of them."""
    with contextlib.ExitStack() as stack:
        others, stats = [], client.stats()
        for server in options.to:
            with _naming(server):
                other = stack.enter_context(_connect(options, server=server))
                between = other.stats()
            before, stats = stats, client.stats()
            if _is_same_server(before, between, stats):
                raise ValueError("%s is the server that is drained" % server)
            others.append((server, other))
        names = options.queues or client.names(stats)
        for name in names:
            if "queue_%s_items" % name not in stats:
                raise ValueError("there is no queue %s" % name)
        names = sorted(names, key=lambda name: "+" in name)    # parents have no children there yet
        targets = dict(zip(names, itertools.cycle(others)))

        def waiting():
            return {name: int(stats.get("queue_%s_items" % name, 0)) for name in names}

        moved, left, why = 0, waiting(), {}      # why a queue stays
        show = _progress(sum(left.values()))
        while any(left.values()):
            before = moved
            parents = set()
            for server, other in others:
                with _naming(server):
                    parents |= {name.partition("+")[0] for name in other.names() if "+" in name}
            for name in names:
                if left[name] and name in parents:             # they would be given its items, too
                    why.setdefault(name, "it has children there already")
                if left[name] and name not in why:
                    try:
                        for count in _drained(client, name, *targets[name], left[name]):
                            moved += count
                            show(moved)
                    except (ServerError, ValueError) as error:
                        why[name] = str(error)
            stats = client.stats()
            left = waiting()
            if moved == before:              # those are paused
                break
        show(moved, True)
    print(moved)
    still = ["%s of %s: %s%s" % (
        words, name, stats[key], " (%s)" % why[name] if name in why else "")
             for name in names for key, words in (
        ("queue_%s_items" % name, "items"), ("queue_%s_open_transactions" % name, "open reads"),
        ("queue_%s_delayed" % name, "delayed items")) if int(stats.get(key, 0))]
    if still:
        raise ValueError("left behind: %s" % "; ".join(still))


def _is_same_server(before, between, after):
    """Return whether three answers to `stats` come from one server, whatever its addresses: its
    counters only grow. The second answer came over a connection made since the first."""
    def counts(key):
        return [int(stats.get(key, 0)) for stats in (before, between, after)]

    connections = counts("total_connections")
    return connections[0] < connections[1] and all(
        numbers == sorted(numbers)
        for numbers in (connections, counts("total_items"), counts("bytes_read")))


def _drained(client, name, server, other, count):
    """Move so many items of a queue to another server, of which `other` is a client; yield how many
    were moved for each batch. They are opened, and closed when they are stored there. Raises
    ValueError when some are not taken."""
    while count > 0:
        rows = list(client._rows(name, min(count, _PUT_AT_ONCE), b"open"))
        if not rows:
            break
        with client._holding(name, rows), _naming(server):
            for taken, most in _put_exported(other, name, rows):
                if taken < most:
                    raise ValueError("it is full or paused at %s; what it has taken of the last "
                                     "%d items will be there twice" % (server, len(rows)))
        count -= len(rows)
        yield len(rows)


def _command_flush(client, options):
    waiting = _waiting(client, options.queue)
    return _if_sure(options, "Drop all %d items of %s?" % (waiting, options.queue), client.flush)


def _command_delete(client, options):
    _waiting(client, options.queue)          # is there such a queue?
    return _if_sure(options, "Delete %s and all its items?" % options.queue, client.delete)


def _if_sure(options, question, call):
    """Make a call for the queue, after a question at a terminal unless there is --yes; return the
    exit status."""
    if not options.yes and sys.stdin.isatty():
        try:
            answer = input(question + " [y/N] ")
        except EOFError:
            raise EOFError("no answer: use --yes") from None
        if answer.lower() != "y":
            return 1
    call(options.queue)
    return 0


def _command_ping(client, options):
    print("kestrel.py %s at %s is %s" % (client.version(), options.server, client.status()))


def _command_clients(client, options):
    rows = [[int(cell) if cell.isdecimal() else cell for cell in row] for row in client.clients()]
    _show(options, ("id", "address", "user", "protocol", "state", "seconds", "open_reads",
                    "waits_for"), rows)


def _command_kick(client, options):
    if not client.kick(options.id):
        raise ValueError("there is no client %d" % options.id)


_count = _argument_type(COUNT.parse)


@_argument_type
def _server(text):
    """Return the address of a server as it is."""
    _host_and_port(text)
    return text


@_argument_type
def _authorities(path):
    """Return an ssl.SSLContext that trusts the certificates of a file."""
    import ssl
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as error:
        raise ValueError("%s: %s" % (path, error.strerror)) from None


@_argument_type
def _seconds(text):
    """Return a number of seconds to wait."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1e9:
            return float(text)
    raise ValueError("%r is no number of seconds" % text)


# How long `ping` waits: a health check has to find out that a server hangs.
_PING_SECONDS = 5

# How many items are moved before the progress is shown.
_MOVED_AT_ONCE = 10000


def _argument(name, **how):
    """Return the arguments of ArgumentParser.add_argument()."""
    return name, how


_QUEUE = _argument("queue")
_N = _argument("-n", type=_count, default=1, metavar="N", help="at most so many items (1)")
_COUNT = _argument("-n", type=_count, dest="count", metavar="N", help="so many items (all)")
_YES = _argument("--yes", action="store_true", help="do not ask")
_JSON_ROWS = _argument("--json", action="store_true", help="print JSON objects, not a table")

# The commands: name -> (function, what it does, its arguments). A function is called with a Client
# and the options, and returns the exit status, None for 0.
_COMMANDS = {
    "put": (_command_put, "put items, or each line of standard input", [
        _QUEUE, _argument("item", nargs="*"),
        _argument("--whole", action="store_true", help="all of standard input is one item"),
        _argument("--expiry", type=int, default=0, metavar="SECONDS",
                  help="seconds until it expires"),
        _argument("--delay", type=_seconds, default=0, metavar="SECONDS",
                  help="when it becomes available"),
        _argument("--sync", action="store_true", help="wait until it is on the disk")]),
    "get": (_command_get, "take items, and print each with a newline", [
        _QUEUE, _N, _argument("--wait", type=_seconds, default=0, metavar="SECONDS",
                              help="wait so long for an item")]),
    "peek": (_command_peek, "print the first items, which stay", [_QUEUE, _N]),
    "list": (_command_list, "the queues, or those that begin so", [
        _argument("prefix", nargs="?"), _JSON_ROWS]),
    "stats": (_command_stats, "figures of the server, or of a queue", [
        _argument("queue", nargs="?"), _JSON_ROWS]),
    "top": (_command_top, "the queues, anew each second", [
        _argument("--by", choices=["depth", "rate"], default="depth",
                  help="sort by items (depth), or by gets a second")]),
    "move": (_command_move, "move items to another queue", [_QUEUE, _argument("dest"), _COUNT]),
    "drain": (_command_drain, "move all items, or those of some queues, to other servers", [
        _argument("queues", nargs="*"),
        _argument("--to", action="append", required=True, type=_server, metavar="HOST:PORT",
                  help="where to; each queue goes to one of several")]),
    "pause": (lambda client, options: client.pause(options.queue, options.what or ""),
              "stop puts (in), gets (out), or both", [
                  _QUEUE, _argument("what", nargs="?", choices=["in", "out"])]),
    "resume": (lambda client, options: client.resume(options.queue), "end a pause", [_QUEUE]),
    "export": (_command_export, "print items as JSON, a line each", [
        _QUEUE, _COUNT, _argument("--take", action="store_true",
                                  help="take the items, each once it is printed")]),
    "import": (_command_import, "put what export has printed, from standard input", [_QUEUE]),
    "flush": (_command_flush, "drop all items of a queue", [_QUEUE, _YES]),
    "delete": (_command_delete, "delete a queue", [_QUEUE, _YES]),
    "status": (lambda client, options: print(client.status(options.word)),
               "what the server lets in; set it", [
                   _argument("word", nargs="?", type=str.lower,
                             choices=[name.lower() for name in STATUSES])]),
    "ping": (_command_ping, "whether it answers, for health checks", []),
    "clients": (_command_clients, "who is connected", [_JSON_ROWS]),
    "kick": (_command_kick, "hang up on a client", [_argument("id", type=int)]),
}


def _run_command(name, *arguments):
    """Run a command; return the exit status: 0 done, 1 refused or not found, 2 usage, 3 no
    connection."""
    function, what, wanted = _COMMANDS[name]
    if sys.stdout is None:                # it is closed: a get would lose what it takes
        return _fail(2, "there is no standard output")
    parser = argparse.ArgumentParser(prog="kestrel.py " + name, description=what)
    for word, how in wanted:
        parser.add_argument(word, **how)
    parser.add_argument("--server", metavar="HOST:PORT", type=_server, default=os.environ.get(
        "KESTREL_SERVER") or "127.0.0.1:22133",
                        help="or unix:PATH; $KESTREL_SERVER, else 127.0.0.1:22133")
    parser.add_argument("--user", help="its password is $KESTREL_PASSWORD, or is asked for")
    parser.add_argument("--tls", action="store_true", help="speak TLS")
    parser.add_argument("--cafile", metavar="FILE", type=_authorities,
                        help="whose certificates to trust, with TLS")
    options = parser.parse_intermixed_args(arguments)
    try:
        options.password = _password(options.user)
        with _connect(options, _PING_SECONDS if name == "ping" else 30) as client:
            return function(client, options) or 0
    except EOFError as error:
        return _fail(2, str(error))
    except OSError as error:
        if error.filename == _STDOUT:
            raise
        return _fail(1 if name == "ping" else 3,
                     "%s: %s" % (error.filename or options.server, error.strerror or error))
    except (ServerError, ValueError) as error:
        return _fail(1, error)


# -- without a server

# What _convert() looks for in a Scala file: the begin and the end of an object or of a block, a
# setting and the whole of its value. A line that begins with a dot goes on with the one before.
_SCALA = re.compile(r"""(?P<begin>(?:new\s+(?P<object>\w+)[^{\n]*)?\{)|(?P<end>\})
    |(?P<key>[\w.]+)\s*=\s*(?!new\b|\s)
     (?P<value>(?:(?:Some|List|Set)\([^)]*\)|"[^"]*"|[^\n;{}"]|\n(?=\s*\.))+)""", re.S | re.X)
_SCALA_COMMENT = re.compile(r'("[^"\n]*")|//[^\n]*|/\*.*?\*/', re.S)

# Kestrel's names that are others here, but for their capitals.
_SCALA_NAMES = {
    "listenAddress": "listen", "memcacheListenPort": "memcache_port",
    "textListenPort": "text_port", "thriftListenPort": "thrift_port",
    "admin.httpPort": "admin_port", "http_port": "admin_port"}
_SCALA_UNITS = {
    None: "", "millisecond": "ms", "milli": "ms", "second": "s", "minute": "m", "hour": "h",
    "day": "d", "byte": "", "kilobyte": "kb", "megabyte": "mb", "gigabyte": "gb"}


def _convert(options):
    """Print a kestrel.conf for the production.scala of a Kestrel; what is not understood is a
    comment in it."""
    path, = options.paths
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        text = _SCALA_COMMENT.sub(lambda match: match[1] or " ", file.read())
    sections = {"server": [], "queue": []}
    objects = [("", [])]                     # (class, its settings) of those that are open
    for match in _SCALA.finditer(text):
        if match["begin"]:
            objects.append((match["object"] or "block", []))
        elif match["key"]:
            objects[-1][1].append((match["key"], match["value"]))
        elif match["end"] and len(objects) > 1:
            kind, settings = objects.pop()
            header = "server"
            if kind in ("QueueBuilder", "AliasBuilder"):
                name = _plain(dict(settings).get("name", ""))
                if name:
                    header = kind[:5].lower() + " " + name
                else:
                    kind += " without a plain name:"
            for key, value in settings:
                if key == "name" and header != "server":
                    continue
                at = header
                if key.startswith("default."):
                    key, at = key[8:], "queue"
                sections.setdefault(at, []).append(_converted(kind, at, key, value))
            if not settings and kind not in (
                    "block", "KestrelConfig", "QueueBuilder", "AliasBuilder"):
                sections["server"].append("# not taken over: %s" % kind)
    if not any(sections.values()):
        return _fail(1, "%s: no settings of Kestrel are in it" % path)
    for header, lines in sections.items():
        print("\n".join(["[%s]" % header, *lines, ""]))
    return None


def _converted(kind, header, key, value):
    """Return the line of a config file for a setting of a Scala file."""
    known = {"s": SERVER_SETTINGS, "q": QUEUE_SETTINGS, "a": ALIAS_SETTINGS}[header[0]]
    name = _SCALA_NAMES.get(key, re.sub("([A-Z])", r"_\1", key).lower())
    text = _plain(value)
    if text is not None and name in known and kind in ("KestrelConfig", "QueueBuilder",
                                                       "AliasBuilder"):
        words = ("unlimited", "never", "") if text in ("None", "Int.MaxValue", "Long.MaxValue",
                                                       "Duration.MaxValue") else (text,)
        for word in words:
            with contextlib.suppress(ValueError):
                known[name][0].parse(word)
                return "%s = %s" % (name, word)
    return "# not taken over: %s %s = %s" % (kind, key, " ".join(value.split()))


def _plain(value):
    """Return a value of a Scala file as a config file has it, None if it takes a Scala to tell:
    text, a constant, a number or a product of numbers, with a unit or without, or some of these."""
    value = value.strip()
    several = re.fullmatch(r"(?:Some|List|Set)\((.*)\)", value, re.S)
    if several:
        parts = [_plain(part) for part in several[1].split(",")]
        return None if None in parts else ", ".join(parts)
    if re.fullmatch(r'"[^"]*"|true|false|None|(Int|Long|Duration)\.MaxValue', value):
        return value.strip('"')
    number = re.fullmatch(r"([0-9]+(?:\s*\*\s*[0-9]+)*)(?:L|\s*\.\s*([a-z]+?)s?)?", value)
    if not number or number[2] not in _SCALA_UNITS:
        return None
    product = functools.reduce(operator.mul, map(int, number[1].split("*")))
    return "%d%s" % (product, _SCALA_UNITS[number[2]])


def _hash_password(options):
    """Ask for a password, and print what stands for it in an auth_file."""
    import getpass
    try:
        password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    except (EOFError, KeyboardInterrupt):
        password = ""
    if not password:
        return _fail(1, "there is no password")
    print(hash_password(os.fsencode(password)))
    return None


def _check(options):
    """Print the settings in force."""
    print("\n".join(_read_config(options).lines()))


# The tools: name -> (function, the paths that it takes, what it does). A function is called with
# the options, and returns the exit status, None for 0.
_TOOLS = {
    "dump": (_dump, "JOURNAL...", "print the records of journal files, a line each"),
    "pack": (_pack, "SPOOL/QUEUE", "write the journals of a queue that no server holds as one "
             "minimal file"),
    "verify": (_verify, "SPOOL", "read all journals of a spool, which a server may be using, say "
               "which are good, and exit with 0 if all are"),
    "copy": (_copy, "SPOOL DEST", "copy a spool, which a server may be using, or bring the copy up "
             "to date"),
    "hash-password": (_hash_password, "", "ask for a password (or read a line), and print what an "
                      "auth_file has in its place"),
    "convert": (_convert, "production.scala", "print a Kestrel's production.scala as a "
                "kestrel.conf"),
    "check": (_check, "", "check the config file, and print the effective settings"),
}


class LogStream(logging.Handler):
    """Logs to standard error. If nobody reads the pipe, so that a write would block, lines are
    dropped and counted: a log must not stop the service."""

    _dropped = 0

    def emit(self, record):
        self.write(self.format(record))

    def write(self, line):
        """Write a line, or drop it."""
        if self._dropped:
            line = "%d log lines dropped, since nobody read them\n%s" % (self._dropped, line)
        data = (line + "\n").encode("utf-8", "backslashreplace")
        try:
            fd = sys.stderr.fileno()
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            for at in range(0, len(data), select.PIPE_BUF):      # that much does not block
                if not poll.poll(0):
                    raise BlockingIOError
                os.write(fd, data[at:at + select.PIPE_BUF])
            self._dropped = 0
        except (OSError, ValueError):    # it would block, or is closed
            self._dropped += 1


class LogFile(LogStream):
    """Logs to a file, which is opened for each line since it may be renamed meanwhile; to standard
    error while that fails. Raises OSError when it fails at first."""

    def __init__(self, path):
        super().__init__()
        self._path = os.path.abspath(path)
        self._append("")

    def emit(self, record):
        line = self.format(record)
        try:
            self._append(line + "\n")
        except (OSError, MemoryError) as error:
            self.write("log_file: %s: %s" % (_as_os_error(error, self._path), line))

    def _append(self, text):
        # Names of queues are any bytes. O_NONBLOCK: a pipe without a reader must not block.
        with open(self._path, "a", encoding="utf-8", errors="backslashreplace",
                  opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK, 0o666)) as file:
            file.write(text)


def _logs_to_systemd():
    """Return whether standard error goes to systemd's journal, see systemd.exec(5)."""
    stream = os.environ.get("JOURNAL_STREAM")
    if not stream:
        return False
    status = os.fstat(2)
    return stream == "%d:%d" % (status.st_dev, status.st_ino)


def _set_priority(record):
    """Set the priority that a record has for syslog(3)."""
    record.priority = 3 if record.levelno >= logging.ERROR else 7 - record.levelno // 10
    return True


def _set_up_log(settings):
    """Log as the settings say. Raises OSError."""
    root = logging.getLogger()
    with _naming("log_file " + settings.log_file):
        handler = LogFile(settings.log_file) if settings.log_file else LogStream()
    text = _LOG_FORMAT
    if not settings.log_file and _logs_to_systemd():
        handler.addFilter(_set_priority)
        text = "<%(priority)d>%(levelname)s %(message)s"       # see sd-daemon(3)
    handler.setFormatter(logging.Formatter(text))
    handler.addFilter(_repeats())
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())


def _set_up_log_again(settings):
    """Log as the settings say after a reload, or as before."""
    try:
        _set_up_log(settings)
    except OSError as error:
        log.error("reload: %s: %s", error.filename, error.strerror)


def _repeats():
    """Return a filter of log records that lets _REPEATS of a kind pass in _REPEAT_SECONDS."""
    seen = {}                            # message without its arguments -> [since, how many]

    def admit(record):
        if record.name == trace.name:
            return True
        key, now = record.msg, time.monotonic()
        since, count = seen.get(key, (now - _REPEAT_SECONDS, 0))
        if now >= since + _REPEAT_SECONDS:
            if count > _REPEATS:
                record.msg, record.args = "%s (and %d more like this since)" % (
                    record.getMessage(), count - _REPEATS), ()
            since, count = now, 0
        seen[key] = since, count + 1
        return count < _REPEATS

    return admit


def _inherited(config):
    """Return {protocol: [socket]} of the sockets that systemd passes on, see sd_listen_fds(3).
    Raises ConfigError."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    given = {}
    for number in range(int(os.environ["LISTEN_FDS"])):
        sock = socket.socket(fileno=3 + number)
        sock.set_inheritable(False)
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
            # Not if it would block: the service goes on, though nobody hears of it.
            sock.sendto(text.encode(), socket.MSG_DONTWAIT, address.replace("@", "\0", 1)
                        if address.startswith("@") else address)


def _raise_file_limit():
    """Raise the limit of open files as far as possible: each connection takes one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:             # more than the system knows
        log.warning("the limit of open files stays: %s", error)
    log.info("up to %d open files, a connection is one",
             resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _stop_loading(number, frame):
    log.info("%s: stopped while loading", signal.Signals(number).name)
    # An exception might be raised in a finalizer, where it is ignored.
    os._exit(0)


def _ignore(number, frame):
    log.info("%s: ignored", signal.Signals(number).name)


def _handle_first_signals():
    """Handle signals while the spool is loaded: the process can just end then."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop_loading)
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, _ignore)


def _handle_signals(server):
    """Handle signals while the server runs."""
    def stop(number, frame):
        log.info("%s: stopping", signal.Signals(number).name)
        server.stop()

    def reload(number, frame):
        server.reload_wanted = True

    signal.set_wakeup_fd(server.poller.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, reload)


def _prepare_streams():
    """Open /dev/null in the place of standard streams that are closed, so that no file or socket
    takes their descriptors. sys.stdout stays None: a get must not take what it cannot print."""
    fd = 0
    while fd <= 2:
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)
    sys.stdin = sys.stdin or open(0)
    sys.stderr = sys.stderr or open(2, "w")
    if sys.stdout:                       # names of queues are any bytes
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(Output(1, "w", closefd=False)), sys.stdout.encoding,
            "surrogateescape",
            line_buffering=sys.stdout.line_buffering or sys.stdout.write_through)


if __name__ == "__main__":
    _prepare_streams()
    try:
        sys.exit(main())
    except KeyboardInterrupt:            # a shell ends its loop only if the signal ends the program
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
