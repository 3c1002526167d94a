"""One process's part of a broker: threads, connections, forks, its end."""

import resource
import threading

import psutil
import pytest

from syncstream import Hub
from syncstream.errors import (
    Unavailable,
)
from tests.brokers.postgresql.waits import LIMIT, backends
from tests.brokers.sinks import Told, listening
from tests.support.descriptors import open_files
from tests.support.pairs import check_script
from tests.support.waits import await_true


def test_one_connection_listens(server, schema, make):
    """However many subscribe to a hub; each hub has its own."""
    hub = Hub(broker=make())
    subscriptions = [hub.subscribe(f"c:{number}") for number in range(50)]
    for subscription in subscriptions:
        subscription.read(0)
    # They listen; a moment later they have looked for the first time.
    tails = f"%{schema}.tail%"
    await_true(lambda: backends(server, query=tails) == 1)
    hubs = [Hub(broker=make(connections=1)) for _ in range(2)]
    for each in hubs:
        subscription = each.subscribe("a")
        subscription.read(0)
        subscriptions.append(subscription)
    await_true(lambda: backends(server, query=tails) == 3)
    hub.publish("a", "x")
    for subscription in subscriptions[50:]:
        assert [event.data for event in subscription.read(LIMIT)] == ["x"]
    for each in (hub, *hubs):
        each.close()
    await_true(lambda: backends(server) == 0)


def test_no_thread_is_left(make):
    """It is `Unavailable`, and told of when there is one."""
    broker, told = make(), Told()
    broker.attach(told)
    before = threading.stack_size(1 << 46)  # bytes, which no machine has
    try:
        for _ in range(2):
            with pytest.raises(Unavailable, match="cannot start a thread"):
                broker.watch("a")
    finally:
        threading.stack_size(before)
    broker.watch("a")
    broker.publish([("a", b"x")])
    await_true(lambda: told.payloads == [b"x"])


def test_no_descriptor_is_left(make):
    """It is `Unavailable`, as the hub expects, and told of when there is one."""
    broker, told = make(), Told()
    broker.attach(told)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(Unavailable, match="Too many open files"):
            broker.watch("a")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    broker.watch("a")
    broker.publish([("a", b"x")])
    await_true(lambda: told.payloads == [b"x"])


def test_close_leaves_nothing(server, make):
    """No thread, no descriptor, no connection; and nothing can be done after it."""
    own = psutil.Process()
    before, threads = open_files(), own.num_threads()
    for _ in range(3):
        broker = make()
        listening(broker, "a")
        broker.publish([("a", b"x")])
        broker.close()
        broker.close()
        with pytest.raises(Unavailable, match="closed"):
            broker.publish([("a", b"x")])
        broker.watch("b")
    await_true(lambda: not open_files() - before, lambda: open_files() - before)
    # Fewer: what earlier tests have left may end meanwhile.
    await_true(lambda: own.num_threads() <= threads)
    await_true(lambda: backends(server) == 0)


FORK = """
import os, sys
mode, url, schema = sys.argv[1:4]
if mode == "gevent":
    from gevent import monkey
    monkey.patch_all()
import threading
from syncstream import Hub
from syncstream.brokers.postgresql import PostgreSQLBroker
hub = Hub(broker=PostgreSQLBroker(url, schema=schema, publish_timeout=20.0))
mine = hub.subscribe("a")
mine.read(0)
hub.publish("a", "before")
assert [e.data for e in mine.read(10)] == ["before"]
children = []
for number in range(3):
    pid = os.fork()
    if not pid:
        # A subscription of its own, and the one that it has inherited.
        other = hub.subscribe("a", after="start")
        assert [e.data for e in other.read(10)][0] == "before"
        hub.publish("a", f"child {number}")
        found = []
        while len(found) < 3:
            found += [e.data for e in mine.read(10)]
        assert sorted(found) == ["child 0", "child 1", "child 2"], found
        hub.close()
        sys.stdout.flush()
        os._exit(0)
    children.append(pid)
found = []
while len(found) < 3:
    events = mine.read(10)
    assert events
    found += [e.data for e in events]
assert sorted(found) == ["child 0", "child 1", "child 2"], found
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
hub.publish("a", "after")
assert [e.data for e in mine.read(10)] == ["after"]
hub.close()
"""


@pytest.mark.parametrize("mode", ["threads", "gevent"])
def test_forked_processes_have_their_own(server, schema, mode):
    """A hub that was used before the fork is used after it, on both sides."""
    check_script(FORK, mode, server.url, schema)


IDLE = """
import sys, threading, time
from syncstream import Hub
from syncstream.brokers.postgresql import PostgreSQLBroker
_, url, schema = sys.argv
hub = Hub(broker=PostgreSQLBroker(url, schema=schema, publish_timeout=20.0))
subscription = hub.subscribe("a")
subscription.read(0)
hub.publish("a", "x")
assert [event.data for event in subscription.read(10)] == ["x"]
before, began = time.process_time(), time.monotonic()
threading.Event().wait(4)
share = (time.process_time() - before) / (time.monotonic() - began)
assert share < 0.005, share
hub.close()
"""


def test_it_is_idle_when_nothing_happens(server, schema):
    """Less than half a percent of a core; in a process that does nothing else."""
    check_script(IDLE, server.url, schema)


DROPPED = """
import sys
_, mode, url, schema = sys.argv
if mode == "gevent":
    from gevent import monkey
    monkey.patch_all()
import gc, time
import psutil, psycopg
from syncstream import Hub
from syncstream.brokers.postgresql import PostgreSQLBroker
def call():
    hub = Hub(broker=PostgreSQLBroker(url, schema=schema, publish_timeout=20.0))
    hub.publish("a", "x")
    hub.subscribe("a").read(0)
    hub.publish("a", "y")
    return hub
call().close()
own = psutil.Process()
before = own.num_threads(), own.num_fds()
for _ in range(5):
    call()
deadline = time.monotonic() + 60
while own.num_threads() > before[0] or own.num_fds() > before[1]:
    assert time.monotonic() < deadline, (before, own.num_threads(), own.num_fds())
    gc.collect()  # the hub and its broker know each other
    time.sleep(0.05)
with psycopg.connect(url, autocommit=True) as connection:
    sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'dropped'"
    while connection.execute(sql).fetchone() != (1,):  # this one
        assert time.monotonic() < deadline, "connections must be closed"
        gc.collect()
        time.sleep(0.05)
"""


@pytest.mark.parametrize("mode", ["threads", "gevent"])
def test_what_is_dropped_leaves_nothing(server, schema, mode):
    """A hub of each call, that nobody closes: no connection, thread or descriptor."""
    check_script(DROPPED, mode, f"{server.url}?application_name=dropped", schema)


HELD = """
import gc, os, sys
import psutil
from syncstream.brokers.postgresql import PostgreSQLBroker
from tests.brokers.sinks import Told
from tests.support.waits import await_true
own = psutil.Process()
before = own.num_threads()
broker = PostgreSQLBroker(sys.argv[1], schema=sys.argv[2])
broker.attach(Told())
broker.watch("a")
assert own.num_threads() > before
end, ends = os.pipe()
child = os.fork()
if not child:
    os.close(ends)
    os.read(end, 1)
    os._exit(0)
del broker
gc.collect()
await_true(lambda: own.num_threads() <= before)
os.write(ends, b"x")
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_child_holds_no_listener_of_a_dropped_broker(server, schema):
    """It has inherited the pipe whose end would tell it."""
    check_script(HELD, server.url, schema)


HEIR = """
import os, sys, threading
from syncstream.brokers.postgresql import PostgreSQLBroker
from syncstream.errors import Unavailable
from tests.brokers.sinks import Told
from tests.support.waits import await_true
broker, told = PostgreSQLBroker(sys.argv[1], schema=sys.argv[2]), Told()
broker.attach(told)
broker.watch("a")
child = os.fork()
if not child:
    threading.stack_size(1 << 46)  # bytes, which no machine has
    try:
        broker.read("a", None)
    except Unavailable:
        pass
    else:
        raise AssertionError("it has started a thread")
    threading.stack_size(0)
    broker.read("a", None)
    await_true(lambda: told.resyncs == [None], timeout=5.0)
    broker.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert told.resyncs == []
broker.close()
"""


def test_a_child_that_could_not_listen_does_it_later(server, schema):
    """At its next request; what was stored since the fork is read."""
    check_script(HEIR, server.url, schema)
