"""The tests of kestrel.py.

    python3 test_kestrel.py            # installs pytest into ./.venv if it is missing
    python3 -m pytest test_kestrel.py  # with the pytest that is there

They follow the sections of kestrel.py: each is tested at its own door (the configuration
by files, journals by their bytes, queues by calls with a made-up `now`, sessions by the
bytes that go in and come out), then the server in a thread of this process with faults
injected, and last the daemon as a process, over sockets, with signals and kill -9.
"""

import contextlib
import errno
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

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

HERE = os.path.dirname(os.path.abspath(kestrel.__file__))
NOW = 1790000000000                       # the made-up time of day, in milliseconds


def config_of(path, text="", **overrides):
    """A Config from the text of a file; its spool is in `path` unless it says otherwise."""
    file = path / "kestrel.conf"
    file.write_text(text)
    overrides.setdefault("queue_path", str(path / "spool"))
    os.makedirs(str(path / "spool"), exist_ok=True)
    return kestrel.Config(str(file), overrides)


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
    assert config.server.listen_address == "127.0.0.1"
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
    ("[server]\n\nport = 5\n", 3, "unknown setting port in [server]"),
    ("[server]\nmax_items = 5\n", 2, "unknown setting max_items"),
    ("# hello\n[servers]\n", 2, "unknown section [servers]"),
    ("[queue a]\nmax_items = 5\nmax_items = 6\n", 3, "max_items is set twice"),
    ("[queue a]\n[queue]\n[queue a]\n", 3, "[queue a] is there twice"),
    ("[queue a]\n[queue]\n[queue  a]\n", 3, "there twice"),
    ("[queue a]\nmax_age = 5\n[queue b]\nmax_age = 1h\n", 2, "max_age: '5' is not a time"),
    ("[queue b]\nmax_age = 1h\n[queue a]\nMax_Age: soon\n", 4, "max_age: 'soon'"),
    ("[queue a/b]\n", 1, "'/' in the name"),
    ("max_items = 5\n", 1, "before the first [section]"),
    ("[queue]\nwhat\n", 2, "neither"),
    ("[alias a]\n", 1, "destination_queues is missing"),
    ("[alias a]\ndestination_queues = b, c d\n[queue a]\n", 1, "both an alias and a queue"),
    ("[alias a]\ndestination_queues = b\n[alias b]\ndestination_queues = c\n", 2,
     "b is an alias itself"),
    ("[DEFAULT]\nmax_items = 5\n", 1, "unknown section [DEFAULT]"),
])
def test_config_errors_name_file_line_and_key(tmp_path, text, line, words):
    with pytest.raises(kestrel.ConfigError) as caught:
        config_of(tmp_path, text)
    assert str(caught.value).startswith("%s:%d: " % (tmp_path / "kestrel.conf", line))
    assert words in str(caught.value)


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


# == Journal ==============================================================================

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


def addx(data, add_time=NOW, expiry=0):
    return ADDX_HEAD.pack(2, len(data) + 16, add_time, expiry) + data


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
    for item in iter(lambda: queue.remove(now=now), None):
        found.append(item.data)
    queue.close()
    return found


def contents_of(path, name="q"):
    """What a server would find on a copy of the spool; the spool itself stays as it is."""
    copy = tempfile.mkdtemp()
    try:
        shutil.copytree(str(path), copy + "/spool")
        return contents(load(copy + "/spool", name))
    finally:
        shutil.rmtree(copy)


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
    assert (tmp_path / "q").read_bytes() == journal + b"".join(
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


def test_older_files_are_read_in_numeric_order(tmp_path):
    spool_of(tmp_path, q=b"\1" + addx(b"5"), q__900=addx(b"1") + addx(b"2"),
             q__1000=addx(b"3"), q__20000=addx(b"4"))
    queue = load(tmp_path)
    assert queue.journal.total_size() == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert contents(queue) == [b"2", b"3", b"4", b"5"]


def test_pack_stands_for_the_files_before_it(tmp_path):
    spool_of(tmp_path, q=addx(b"c"), q__900=addx(b"old"), q__1000=addx(b"old"),
             q__1001=addx(b"b"), q__1000__pack=addx(b"a"), **{"q~~1002": b"\2junk"})
    assert contents(load(tmp_path)) == [b"a", b"b", b"c"]
    assert sorted(os.listdir(str(tmp_path))) == ["q", "q.1000", "q.1001"]


def test_files_that_are_no_journals_are_left_alone(tmp_path, caplog):
    spool_of(tmp_path, good=addx(b"x"), cars__old=b"1", **{".hidden": b"2", "a b": b"3"})
    (tmp_path / "lost+found").mkdir()
    assert kestrel.find_journals(str(tmp_path)) == {"good": []}
    assert len(caplog.records) == 3
    assert (tmp_path / "cars.old").read_bytes() == b"1"


@pytest.mark.parametrize("kept", range(len(addx(b"second"))))
def test_a_torn_tail_is_cut_off_and_kept(tmp_path, caplog, kept):
    good = addx(b"first") + xid_record(9, 1) + xid_record(5, 1)
    torn = addx(b"second")[:kept]
    spool_of(tmp_path, q=good + torn)
    queue = load(tmp_path)
    assert queue.journal.size == len(good)
    queue.add(b"third", now=NOW)
    assert contents(queue) == [b"first", b"third"]
    if torn:
        assert "%d bytes cut off" % kept in caplog.text
        lost, = (tmp_path / "lost+found").iterdir()
        assert lost.name.startswith("q.%d." % len(good)) and lost.read_bytes() == torn


def test_zeros_at_the_end_are_a_torn_tail(tmp_path, caplog):
    spool_of(tmp_path, q=addx(b"a") + bytes(5000))
    assert contents(load(tmp_path)) == [b"a"]
    assert "zeros" in caplog.text and "5000 bytes" in caplog.text


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
    queue.close()
    load(tmp_path).close()


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
    assert (tmp_path / "q").read_bytes() == b"".join([
        addx(b"a"), struct.pack("<BiqqII", 10, 25, NOW + 1, NOW + 5, 9, 0) + b"b",
        xid_record(9, 1), xid_record(5, 1), b"\1", xid_record(9, 2), xid_record(6, 2),
        addx(b"c"), addx(b"d"), b"\1\1"])
    queue.close()


def test_an_empty_queue_starts_over_with_a_fresh_file(tmp_path):
    spool_of(tmp_path, q__1=addx(b"x"), q=b"\1")
    queue = load(tmp_path, default_journal_size=100)
    for _ in range(4):
        queue.add(b"12345678", now=NOW)
        item = queue.remove(open=True, now=NOW)
        assert queue.journal.size > 0
        queue.confirm(item.xid)
    assert os.listdir(str(tmp_path)) == ["q"]
    assert queue.journal.size == (tmp_path / "q").stat().st_size < 100
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
    real = os.pwritev
    monkeypatch.setattr(kestrel.os, "pwritev", lambda fd, chunks, offset: real(
        fd, [b"".join(bytes(chunk) for chunk in chunks)[:7]], offset))
    queue = load(tmp_path)
    queue.add(b"0123456789" * 10, now=NOW)
    queue.add(b"", now=NOW)
    assert contents_of(tmp_path) == [b"0123456789" * 10, b""]
    queue.close()


# == Queue ================================================================================


def memory_queue(**settings):
    return kestrel.Queue("q", config=kestrel.QueueConfig(**settings), now=NOW)


def fill(queue, *data, **options):
    for item in data:
        assert queue.add(item, now=NOW, **options)


def take(queue, count, now=NOW, open=False):
    return [queue.remove(open, now) for _ in range(count)]


def data_of(items):
    return [item and item.data for item in items]


def test_fifo():
    queue = memory_queue()
    fill(queue, b"a", b"b", b"c")
    assert queue.peek(NOW).data == b"a"
    assert (queue.count, queue.bytes) == (3, 3)
    assert data_of(take(queue, 4)) == [b"a", b"b", b"c", None]
    assert (queue.count, queue.bytes, queue.total_items) == (0, 0, 3)


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
    assert queue.canceled_transactions == 3


def test_xids_wrap_and_skip_open_ones():
    queue = memory_queue()
    fill(queue, *[b"x"] * 5)
    queue.xid = 0
    first = queue.remove(open=True, now=NOW)
    queue.xid = 0x7ffffffe
    assert [item.xid for item in take(queue, 3, open=True)] == [0x7fffffff, 2, 3]
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
    assert queue.discarded == 1
    assert data_of(take(queue, 3)) == [b"b", b"c", None]


def test_expired_items_make_room():
    queue = memory_queue(max_items=1)
    fill(queue, b"a", expiry=NOW + 10)
    assert not queue.add(b"b", now=NOW + 9)
    assert queue.add(b"b", now=NOW + 10)
    assert queue.expired_items == 1


def test_expiry_is_to_the_millisecond():
    queue = memory_queue()
    fill(queue, b"a", b"b", expiry=NOW + 10)
    fill(queue, b"c")
    assert queue.remove(now=NOW + 9).data == b"a"
    assert queue.remove(now=NOW + 10).data == b"c"
    assert queue.expired_items == 1
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
    assert (queue.count, queue.bytes, queue.total_flushes) == (0, 0, 1)
    queue.abort(item.xid)
    assert data_of(take(queue, 2)) == [b"a", None]


def test_flags_are_dropped_without_keep_flags():
    queue = memory_queue(keep_flags=False)
    fill(queue, b"a", flags=5)
    assert queue.remove(now=NOW).flags == 0


def test_waiters_first_come_first_served():
    queue = memory_queue()
    served = []
    waiters = {name: kestrel.Waiter(lambda item, name=name: served.append(
        (name, item and item.data)), peek=name == "c") for name in "abcde"}
    for name in "abcde":
        queue.wait(waiters[name])
    queue.cancel(waiters["b"])
    fill(queue, b"1")
    assert served == [("a", b"1")]
    fill(queue, b"2")                       # c only looks
    assert served[1:] == [("c", b"2"), ("d", b"2")]
    queue.dismiss_waiters()
    assert served[3:] == [("e", None)]
    queue.cancel(waiters["a"])
    assert not queue.waiters


def test_an_aborted_item_goes_to_the_next_waiter():
    queue = memory_queue()
    fill(queue, b"a", b"b")
    xids = [item.xid for item in take(queue, 2, open=True)]
    served = []
    queue.wait(kestrel.Waiter(lambda item: served.append(item.data)))
    queue.abort(*xids)
    assert served == [b"a"]
    assert data_of(take(queue, 2)) == [b"b", None]


def test_open_transaction_timeout():
    calls, cancelled = [], []

    def later(delay, call):
        calls.append((delay, call))
        return lambda: cancelled.append(call)

    config = kestrel.QueueConfig(open_transaction_timeout=500)
    queue = kestrel.Queue("q", config=config, later=later, now=NOW)
    fill(queue, b"a", b"b")
    late, quick = take(queue, 2, open=True)
    queue.confirm(quick.xid)
    assert cancelled == [calls[1][1]]
    assert calls[0][0] == 500
    calls[0][1]()
    assert not queue.confirm(late.xid)
    assert queue.remove(now=NOW).data == b"a"


class FailingDisk:
    """Makes chosen calls of the journal fail as the kernel would: name -> errno."""

    def __init__(self, monkeypatch):
        self.failing = {}
        for name in ("pwritev", "fsync", "ftruncate", "rename", "unlink", "open"):
            monkeypatch.setattr(kestrel.os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name, real):
        def call(*args, **options):
            code = self.failing.get(name)
            if code:
                if name == "pwritev":           # as far as it goes, and then no further
                    real(args[0], [b"".join(args[1])[:3]], args[2])
                raise OSError(code, os.strerror(code))
            return real(*args, **options)
        return call


@pytest.fixture
def disk(monkeypatch):
    return FailingDisk(monkeypatch)


def state_of(queue):
    return (data_of(queue.items), {xid: item.data for xid, item in queue.opens.items()},
            queue.bytes, queue.total_items)


def turn_queue(path, **settings):
    """A queue as a server holds it: nothing is written before write()."""
    settings.setdefault("sync_journal", None)
    return kestrel.Queue("q", str(path), kestrel.QueueConfig(**settings),
                         dirty=lambda queue: None, now=NOW)


@pytest.mark.parametrize("change", [
    lambda q, xids: q.add(b"new", now=NOW),
    lambda q, xids: q.remove(now=NOW),
    lambda q, xids: q.remove(open=True, now=NOW),
    lambda q, xids: q.confirm(xids[1]),
    lambda q, xids: q.abort(xids[1], xids[0]),
    lambda q, xids: q.flush(),
    lambda q, xids: q.discard_expired(NOW + 1000000),
])
def test_a_failed_write_undoes_what_it_concerned(tmp_path, disk, change):
    queue = turn_queue(tmp_path)
    fill(queue, b"a", b"b", b"c", b"d", b"e", expiry=NOW + 10000)
    xids = [item.xid for item in take(queue, 2, open=True)]
    queue.write()
    before = state_of(queue)
    change(queue, xids)
    change(queue, xids)
    disk.failing = {"pwritev": errno.ENOSPC}
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
    disk.failing = {"pwritev": errno.EIO, "ftruncate": errno.EIO}
    for _ in range(2):
        with pytest.raises(OSError):
            queue.write()
        fill(queue, b"lost too")
    disk.failing = {}
    with contextlib.suppress(OSError):
        queue.write()
    assert contents_of(tmp_path) == [b"a", b"lost too"]
    queue.close()


def test_random_changes_with_random_failures(tmp_path, disk):
    """Whatever fails on the way, the journal tells what the queue holds."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chances = random.Random(seed)
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
        before = None
        if chances.random() < 0.3:
            disk.failing = {"pwritev": errno.ENOSPC}
            if chances.random() < 0.3:
                disk.failing["ftruncate"] = errno.EIO
        try:
            queue.write()
        except OSError:
            before = state_of(queue)
        disk.failing = {}
        if turn % 10 == 0:
            opens = [item.data for item in queue.opens.values()]
            assert contents_of(tmp_path) == opens + data_of(queue.items) or (
                before is not None and queue.journal._torn)
    queue.write()
    queue.close()


def test_reads_nobody_waits_for_are_put_back_after_a_failed_write(tmp_path, disk):
    queue = turn_queue(tmp_path)
    fill(queue, b"a", b"b", b"c")
    xids = [item.xid for item in take(queue, 2, open=True)]
    queue.write()
    queue.abort(*xids, orphaned=True)
    disk.failing = {"pwritev": errno.EIO}
    with pytest.raises(OSError):
        queue.write()
    assert list(queue.opens) == xids
    disk.failing = {}
    queue.recover(NOW)
    assert not queue.opens and data_of(queue.items) == [b"a", b"b", b"c"]
    queue.write()
    assert contents_of(tmp_path) == [b"a", b"b", b"c"]
    queue.close()


def test_a_failed_fsync_undoes_what_waited_for_it_and_writes_the_rest_anew(tmp_path, disk):
    queue = turn_queue(tmp_path, sync_journal=0)
    fill(queue, b"a", b"b", b"c")
    item = queue.remove(open=True, now=NOW)
    queue.write()
    fds, count = queue.begin_sync()
    for fd in fds:
        os.close(fd)
    queue.synced(count)
    fill(queue, b"d")
    queue.remove(now=NOW)
    queue.write()
    queue.sync_failed()
    assert state_of(queue)[:2] == ([b"b", b"c"], {item.xid: b"a"})
    fill(queue, b"refused")
    with pytest.raises(OSError, match="anew"):
        queue.write()
    queue.rewrite()
    queue.journal.adopt()
    fill(queue, b"e")
    queue.confirm(item.xid)
    queue.write()
    assert contents_of(tmp_path) == [b"b", b"c", b"e"]
    queue.close()
