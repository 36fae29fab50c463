"""Try every method of the Thrift service with thriftpy2, against a server of its own.

    python3 .ci/thrift_check.py        # in an environment that has thriftpy2
"""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time

import thriftpy2
from thriftpy2.protocol import TBinaryProtocolFactory
from thriftpy2.rpc import make_client
from thriftpy2.thrift import TApplicationException
from thriftpy2.transport import TFramedTransportFactory

IDL = """
struct Item { 1: binary data  2: i64 id }
struct QueueInfo {
  1: optional binary head_item  2: i64 items  3: i64 bytes  4: i64 journal_bytes
  5: i64 age  6: i32 waiters  7: i32 open_transactions
}
enum Status { NOT_CONFIGURED = 0, QUIESCENT = 1, READ_ONLY = 2, UP = 3 }
service Kestrel {
  i32 put(1: string queue_name, 2: list<binary> items, 3: i32 expiration_msec = 0)
  list<Item> get(1: string queue_name, 2: i32 max_items, 3: i32 timeout_msec = 0,
                 4: i32 auto_abort_msec = 0)
  i32 confirm(1: string queue_name, 2: set<i64> ids)
  i32 abort(1: string queue_name, 2: set<i64> ids)
  QueueInfo peek(1: string queue_name)
  void flush_queue(1: string queue_name)
  void flush_all_queues()
  void delete_queue(1: string queue_name)
  Status current_status()
  void set_status(1: Status status)
  string get_version()
}
"""


def check(port, thrift, strict):
    def client():
        return make_client(
            thrift.Kestrel, "127.0.0.1", port, timeout=20000,
            proto_factory=TBinaryProtocolFactory(strict_read=strict, strict_write=strict),
            trans_factory=TFramedTransportFactory())

    one, other = client(), client()
    assert re.fullmatch(r"\d+\.\d+\.\d+", one.get_version())
    assert one.put("work", [b"1", b"2\0\xff", b"3"], 0) == 3
    taken = one.get("work", 2, 0, 0)
    assert [(item.data, item.id) for item in taken] == [(b"1", 0), (b"2\0\xff", 0)]
    assert one.put("work", [b"4"], 60000) == 1
    first, second = one.get("work", 10, 0, 60000)
    assert (first.data, second.data) == (b"3", b"4") and first.id != second.id
    info = one.peek("work")
    assert (info.head_item, info.items, info.open_transactions) == (None, 0, 2)
    assert other.confirm("work", {first.id, 12345}) == 1       # from another connection
    assert other.abort("work", {second.id}) == 1
    info = one.peek("work")
    assert (info.head_item, info.items, info.bytes, info.waiters) == (b"4", 1, 1, 0)
    assert info.journal_bytes > 0
    opened, = one.get("work", 1, 0, 200)                       # goes back by itself
    one.close()
    one = client()
    start = time.monotonic()
    assert [item.data for item in other.get("work", 1, 10000, 0)] == [b"4"]
    assert time.monotonic() - start < 5 and other.confirm("work", {opened.id}) == 0
    start = time.monotonic()
    assert one.get("work", 1, 300, 0) == [] and time.monotonic() - start >= 0.3
    threading.Timer(0.2, other.put, ("work", [b"5", b"6"], 0)).start()
    assert [item.data for item in one.get("work", 2, 10000, 0)] == [b"5", b"6"]
    threading.Timer(0.2, other.put, ("work", [b"7"], 0)).start()
    assert [item.data for item in one.get("work", 2, 600, 0)] == [b"7"]
    one.put("work", [b"8"], 0)
    one.flush_queue("work")
    assert one.peek("work").items == 0
    one.put("work", [b"9"], 0)
    one.flush_all_queues()
    assert one.peek("work").items == 0
    one.delete_queue("work")
    assert one.current_status() == thrift.Status.UP
    one.set_status(thrift.Status.READ_ONLY)
    assert one.current_status() == thrift.Status.READ_ONLY
    try:
        one.put("work", [b"x"], 0)
    except TApplicationException as error:
        assert "readonly" in error.message
    else:
        raise AssertionError("put while read-only")
    one.set_status(thrift.Status.UP)
    one.close()
    other.close()


def main():
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with tempfile.TemporaryDirectory() as path:
        with open(path + "/kestrel.thrift", "w") as file:
            file.write(IDL)
        with open(path + "/kestrel.conf", "w") as file:
            file.write("[server]\nmemcache_port = 0\nthrift_port = 0\nqueue_path = %s/spool\n" % path)
        process = subprocess.Popen(
            [sys.executable, here + "/kestrel.py", "-c", path + "/kestrel.conf"],
            stderr=subprocess.PIPE, universal_newlines=True)
        try:
            for line in process.stderr:
                match = re.search(r"listening on 127.0.0.1:(\d+) for thrift", line)
                if match:
                    break
            thrift = thriftpy2.load(path + "/kestrel.thrift", module_name="kestrel_thrift")
            for strict in (True, False):
                check(int(match[1]), thrift, strict)
        finally:
            process.terminate()
            assert process.wait(20) == 0
            process.stderr.close()
    print("thriftpy2: every method works, strict and not")


if __name__ == "__main__":
    main()
