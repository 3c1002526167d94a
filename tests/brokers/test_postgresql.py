"""Channels in PostgreSQL: the contract, its failures, and other people's transactions.

Everything is real: a server that the tests start, kill, cut off and restore.
"""

import contextlib
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import psutil
import psycopg
import pytest

from syncstream import Gap, Hub
from syncstream.brokers import open_broker
from syncstream.brokers.postgresql import PostgreSQLBroker, __main__, listener, pool
from syncstream.brokers.postgresql.schema import install, install_sql
from syncstream.errors import (
    Closed,
    Denied,
    PayloadTooLarge,
    Unavailable,
    Uncertain,
)
from syncstream.protocol import sse
from syncstream.runtime.journal import journal
from tests import ROOT
from tests.support.clock import Clock
from tests.support.pairs import check_script, come_and_go, read_for_the_newest
from tests.support.postgresql_server import Line, PostgreSQL
from tests.support.tcp_proxy import Proxy
from tests.support.waits import await_true

FORMATS = Path(__file__).parent / "formats"
LIMIT = 20.0  # seconds for what must happen; not what it may take

_numbers = itertools.count()


@pytest.fixture(scope="module")
def server():
    with PostgreSQL() as server:
        yield server


@pytest.fixture
def schema():
    """A name that no other test uses."""
    return f"s{next(_numbers)}"


@pytest.fixture
def make(server, schema):
    """What makes brokers of one schema; they are closed in the end."""
    made = []

    def make(url=None, **options):
        broker = PostgreSQLBroker(url or server.url, schema=schema, **options)
        made.append(broker)
        return broker

    yield make
    for broker in made:
        broker.close()


@pytest.fixture
def clock():
    with Clock() as clock:
        yield clock


@pytest.fixture
def line(server):
    with Line(server.port) as line:
        yield line


class Told:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.entries = []
        self.resyncs = []
        self.states = []
        self.denied = []

    def deliver(self, channel, entry):
        self.entries.append((channel, entry))

    def resync(self, channels):
        self.resyncs.append(channels)

    def state(self, is_up, reason):
        self.states.append((is_up, reason))

    def deny(self, name, reason):
        self.denied.append((name, reason))

    def payloads(self):
        return [entry.payload for _, entry in self.entries]


def listening(broker, *channels):
    """Attach a sink to a broker, and watch."""
    told = Told()
    broker.attach(told)
    for channel in channels:
        broker.watch(channel)
    return told


def read_until(subscription, data):
    """Return what a subscription has up to an event with this data."""
    found = []
    while not found or found[-1].data != data:
        events = subscription.read(LIMIT)
        assert events, f"waited {LIMIT} s in vain, after {found}"
        found += events
    return found


def publish_until_it_works(broker, item, limit=LIMIT):
    deadline = time.monotonic() + limit
    while True:
        try:
            return broker.publish([item])
        except Unavailable:
            assert time.monotonic() < deadline, "it must come back by itself"
            time.sleep(0.05)


def backends(server, name="syncstream", query="%"):
    """Count the connections of an application's name and last query."""
    ((count,),) = server.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        " AND query ILIKE %s",
        name,
        query,
    )
    return count


def waiting(server, name="syncstream"):
    """Count those connections that wait for a lock."""
    ((count,),) = server.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        " AND wait_event_type = 'Lock'",
        name,
    )
    return count


# The contract.

CONTRACT = """
import sys
if sys.argv[1] == "gevent":
    from gevent import monkey
    monkey.patch_all()
import itertools, weakref
import psycopg
from syncstream.brokers.postgresql import PostgreSQLBroker
from syncstream.testing import check_broker
_, mode, url, prefix, capacity = sys.argv
numbers, schemas = itertools.count(), weakref.WeakKeyDictionary()
def make(**options):
    options["publish_timeout"] = 20.0  # the machine may be busy
    schema = f"{prefix}_{next(numbers)}"
    broker = PostgreSQLBroker(url, schema=schema, **options)
    schemas[broker] = schema
    return broker
def remove(broker, channel, id):
    number = int(id.partition("-")[0], 16)
    with psycopg.connect(url) as connection:
        connection.execute(
            f"DELETE FROM {schemas[broker]}.event WHERE channel = %s AND off = %s",
            (channel, number),
        )
capacity = int(capacity)
new = lambda: make(capacity=capacity)
check_broker(new, capacity=capacity, rounds=60, remove=remove)
check_broker(lambda: make(max_age=0.3), max_age=0.3)
"""


@pytest.mark.parametrize(("mode", "capacity"), [("threads", "1000"), ("gevent", "100")])
def test_it_keeps_the_contract(server, schema, mode, capacity):
    """The whole suite, with much and little room, and by age."""
    check_script(CONTRACT, mode, server.url, schema, capacity)


class Family:
    """Processes that publish and subscribe; see tests/brokers/postgresql_child.py."""

    def __init__(self, server, schema, mode, processes, url=None, subscribers=6):
        self.server = server
        self.schema = schema
        self.mode = mode
        words = [mode, url or server.url, schema, "2", str(subscribers)]
        self.children = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.brokers.postgresql_child", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                text=True,
            )
            for _ in range(processes)
        ]
        self.killed = []

    def begin(self):
        for child in self.children:
            assert child.stdout.readline() == "ready\n"
        self._say("go")

    def _say(self, text):
        for child in self.children:
            child.stdin.write(f"{text}\n")
            child.stdin.flush()

    def kill_one(self):
        child = self.children.pop()
        child.kill()
        child.wait()
        self.killed.append(child.pid)
        child.stdin.close()
        child.stdout.close()

    def rows(self):
        return self.server.execute(
            f"SELECT channel, to_hex(off) || '-' || lpad(to_hex(nonce), 8, '0'),"
            f" convert_from(data, 'UTF8') FROM {self.schema}.event ORDER BY seq"
        )

    def end(self):
        """Stop them; check that everybody has got everything, once and in order.

        Returns:
            What the processes have printed.
        """
        self._say("stop")
        for child in self.children:
            assert child.stdout.readline() == "stopped\n"
        # What was in doubt may still be stored, after that: it does not count.
        logs = {}
        for channel, id, payload in self.rows():
            (event,) = sse.Decoder().feed(payload.encode())
            logs.setdefault(channel, []).append([id, event.data])
        heads = {channel: entries[-1][0] for channel, entries in logs.items()}
        self._say(json.dumps(heads))
        found = []
        for child in self.children:
            out, _ = child.communicate(timeout=60)
            assert child.returncode == 0
            found.append(json.loads(out))
        stored = Counter(data for log in logs.values() for _, data in log)
        assert set(stored.values()) <= {1}, "nothing may be stored twice"
        acked = {data for account in found for _, _, data in account["acked"]}
        maybe = {data for account in found for data in account["maybe"]}
        assert acked <= set(stored), "what was acknowledged must be there"
        pids = tuple(f"{pid}-" for pid in self.killed)
        beyond = {
            d for d in set(stored) - acked - maybe if not d.startswith(pids or " ")
        }
        assert not beyond, "what was refused must not be there"
        for account in found:
            for channel, got in account["got"]:
                assert got == logs.get(channel, []), (
                    f"each subscriber of {channel!r} must get all, once and in order"
                )
            assert account["slowest"] < 4, "publish must keep its time"
            assert account["closing"] < 2
        return found

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for child in self.children:
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()


@pytest.mark.parametrize("mode", ["threads", "gevent"])
@pytest.mark.parametrize("processes", [1, 4])
def test_processes_see_one_order(server, schema, mode, processes):
    """Everybody gets everything, once and in order, through drops and resumes."""
    with Family(server, schema, mode, processes) as family:
        family.begin()
        await_true(lambda: len(family.rows()) > 200)
        found = family.end()
    assert sum(account["refused"] for account in found) == 0
    assert not any(account["maybe"] for account in found)


def kill_server(server, line):
    server.kill()
    await_true(lambda: line.refused > 20)
    server.start()


def restart_server(server, line):
    server.stop()
    server.start()


def terminate_backends(server, line):
    for _ in range(5):
        server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'syncstream'"
        )
        time.sleep(0.1)


def cut(server, line):
    line.cut()
    await_true(lambda: line.refused > 100)
    line.mend()


def silence(server, line):
    line.silence()
    # Whatever was open has been given up, and tried anew, by all who had some.
    await_true(lambda: line.waiting > 8)
    line.mend()


FAULTS = [kill_server, restart_server, terminate_backends, cut, silence]


@pytest.mark.parametrize("mode", ["threads", "gevent"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_failures_lose_nothing(server, schema, line, mode, fault):
    """Of what was acknowledged, whatever has failed; and it all goes on by itself."""
    url = server.url_at(line.port)
    with Family(server, schema, mode, 2, url, subscribers=3) as family:
        family.begin()
        await_true(lambda: len(family.rows()) > 50)
        fault(server, line)
        before = len(family.rows())
        await_true(lambda: len(family.rows()) > before + 50)
        found = family.end()
    if mode == "gevent":
        # By much less than any wait that this takes; the machine may be busy.
        assert max(account["latest"] for account in found) < 0.5


@pytest.mark.parametrize("mode", ["threads", "gevent"])
def test_killed_processes_hold_nobody_up(server, schema, mode):
    """kill -9 in the middle of publishing: others go on, and nothing is doubled."""
    with Family(server, schema, mode, 4) as family:
        family.begin()
        for _ in range(3):
            before = len(family.rows())
            await_true(lambda before=before: len(family.rows()) > before + 50)
            family.kill_one()
        family.end()
    # Nor does anything go on that a killed one has begun, and hold its lock.
    free = f"SELECT count(*) FROM (SELECT FROM {schema}.state FOR UPDATE SKIP LOCKED) s"
    await_true(lambda: server.execute(free) == [(1,)])


# Failures, one by one.


def test_a_dead_server_is_told_of_in_time(make, line, clock):
    """Nothing was sent: Unavailable, within publish_timeout, and it comes back."""
    broker = make(f"postgresql://postgres@127.0.0.1:{line.port}/postgres")
    told = listening(broker, "a")
    broker.publish([("a", b"1")])
    await_true(lambda: told.payloads() == [b"1"])
    line.cut()
    for call in (lambda: broker.publish([("a", b"x")]), lambda: broker.read("a", "0")):
        began = clock()
        with pytest.raises(Unavailable):
            call()
        assert clock() - began < 1.5
    await_true(lambda: told.states)
    line.mend()
    publish_until_it_works(broker, ("a", b"2"))
    await_true(lambda: told.payloads() == [b"1", b"2"])
    assert [is_up for is_up, _ in told.states] == [False, True]
    # It went on where it was: nobody has to read anything anew.
    assert told.resyncs == []


def test_a_silent_server_is_told_of_in_time(make, line, clock, monkeypatch):
    """A black hole: kept connections are asked first, so nothing was sent."""
    broker = make(f"postgresql://postgres@127.0.0.1:{line.port}/postgres")
    monkeypatch.setattr(pool, "FRESH", 0.0)
    broker.publish([("a", b"1")])
    line.silence()
    began, began_here = time.monotonic(), clock()
    with pytest.raises(Unavailable):
        broker.publish([("a", b"x")])
    assert time.monotonic() - began > 1
    assert clock() - began_here < 3
    line.mend()
    publish_until_it_works(broker, ("a", b"2"))
    payloads = [entry.payload for entry in broker.read("a", "0").entries]
    assert payloads == [b"1", b"2"]


def test_a_lost_answer_is_uncertain(make, line, monkeypatch):
    """It was sent and not confirmed: it is stored once, and nobody tries again."""
    broker = make(f"postgresql://postgres@127.0.0.1:{line.port}/postgres")
    monkeypatch.setattr(pool, "FRESH", LIMIT)  # it is not asked whether it lives
    broker.publish([("a", b"1")])
    line.silence("out")
    with pytest.raises(Uncertain):
        broker.publish([("a", b"2")])
    line.mend()
    await_true(lambda: len(broker.read("a", "0").entries) == 2)
    publish_until_it_works(broker, ("a", b"3"))
    payloads = [entry.payload for entry in broker.read("a", "0").entries]
    assert payloads == [b"1", b"2", b"3"]


def test_who_waits_for_the_lock_is_told_that_nothing_was_stored(make, server, schema):
    """Somebody appends by himself, and stays in his transaction."""
    broker = make()
    broker.publish([("a", b"1")])
    with server.connect() as other, other.transaction():
        other.execute(f"SELECT {schema}.append('a', '2', 1000, NULL)")
        # After publish_timeout it would be Uncertain.
        with pytest.raises(Unavailable, match="statement timeout"):
            broker.publish([("a", b"x")])
        assert len(broker.read("a", "0").entries) == 1
    broker.publish([("a", b"3")])
    payloads = [entry.payload for entry in broker.read("a", "0").entries]
    assert payloads == [b"1", b"2", b"3"]


def test_busy_connections_are_waited_for(make, server, schema):
    """No more than allowed are opened; who gets none in time is told."""
    broker = make(connections=2)
    broker.publish([("a", b"1")])
    with server.connect() as other, other.transaction():
        other.execute(f"LOCK TABLE {schema}.channel")
        errors = []

        def publish():
            try:
                broker.publish([("a", b"x")])
            except (Unavailable, Uncertain) as error:  # maybe the answer came late
                errors.append(error)

        threads = [threading.Thread(target=publish) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
    assert len(errors) == 6
    assert sum(isinstance(error, Unavailable) for error in errors) >= 2
    # As many as before can be lent.
    with server.connect() as other, other.transaction():
        other.execute(f"LOCK TABLE {schema}.channel")
        threads = [threading.Thread(target=publish) for _ in range(2)]
        for thread in threads:
            thread.start()
        await_true(lambda: waiting(server) == 2)
    for thread in threads:
        thread.join(LIMIT)
    broker.publish([("a", b"2")])


def test_a_server_that_is_not_there_at_the_start(make, line, clock):
    """It is told of in time, and when it comes all is as if it had been there."""
    line.cut()
    broker = make(f"postgresql://postgres@127.0.0.1:{line.port}/postgres")
    began = clock()
    told = listening(broker, "a")
    assert clock() - began < 2
    with pytest.raises(Unavailable):
        broker.read("a", None)
    await_true(lambda: [is_up for is_up, _ in told.states] == [False])
    line.mend()
    await_true(lambda: [is_up for is_up, _ in told.states] == [False, True])
    # It may have missed some: who watches was told that it did not yet.
    assert told.resyncs == [None]
    broker.publish([("a", b"1")])
    await_true(lambda: told.payloads() == [b"1"])


def test_a_host_that_does_not_answer_leaves_time_for_the_next(make, server, line):
    """Each address of a connection string has its share of the time."""
    make().publish([("a", b"0")])  # to install takes a share, too
    line.silence()
    broker = make(
        f"postgresql://postgres@127.0.0.1:{line.port},127.0.0.1:{server.port}/postgres",
        publish_timeout=4.0,
    )
    broker.publish([("a", b"1")])
    with pytest.raises(Unavailable, match="no-such-host"):
        make("postgresql://no-such-host.invalid/x").publish([("a", b"x")])


def test_a_restored_backup_resets_who_has_what_it_lost(server):
    """And nobody else: ids that it has are complete."""
    with PostgreSQL() as server:
        hub = Hub(server.url)
        quiet = Hub(server.url)
        ids = hub.publish_many("a", ["1", "2", "3"])
        quiet.publish("b", "1")
        server.save("backup")
        lost = [publish_until_hub(hub, "a", data) for data in "45"]
        live = hub.subscribe("a", after=ids[2])
        assert [event.data for event in read_until(live, "5")] == ["4", "5"]
        untouched = quiet.subscribe("b")
        untouched.read(0)
        server.restore("backup")
        new = [publish_until_hub(hub, "a", data) for data in ("4'", "5'", "6'")]
        found = read_until(live, "6'")
        assert isinstance(found[0], Gap)
        assert [event.data for event in found[1:]] == ["1", "2", "3", "4'", "5'", "6'"]
        for id in lost:
            with contextlib.closing(hub.subscribe("a", after=id)) as subscription:
                first, *rest = read_until(subscription, "6'")
                assert isinstance(first, Gap)
                assert [event.id for event in rest] == [*ids, *new]
        for place, id in enumerate(ids):
            with contextlib.closing(hub.subscribe("a", after=id)) as subscription:
                found = read_until(subscription, "6'")
                assert [event.id for event in found] == [*ids[place + 1 :], *new]
        publish_until_hub(quiet, "b", "2")
        assert [event.data for event in untouched.read(LIMIT)] == ["2"]
        hub.close()
        quiet.close()


def publish_until_hub(hub, channel, data):
    """Publish, again if nothing was stored; return the id."""
    return publish_until_it_works(_Publishing(hub), (channel, data))


class _Publishing:
    def __init__(self, hub):
        self.hub = hub

    def publish(self, items):
        ((channel, data),) = items
        return self.hub.publish(channel, data)


@pytest.mark.parametrize(
    "how", ["DROP SCHEMA {} CASCADE", "TRUNCATE {0}.event, {0}.channel"]
)
def test_what_is_wiped_is_one_reset(server, schema, make, how):
    """Exactly one for each channel; then all goes on."""
    hub = Hub(broker=make())
    subscriptions = [hub.subscribe(name) for name in ("a", "b")]
    for subscription in subscriptions:
        subscription.read(0)
    for name in ("a", "b"):
        hub.publish_many(name, ["1", "2"])
    for subscription in subscriptions:
        found = read_until(subscription, "2")
        assert [event.data for event in found] == ["1", "2"]
    server.execute(how.format(schema))
    for name in ("a", "b"):
        publish_until_hub(hub, name, "3")
    for subscription in subscriptions:
        found = read_until(subscription, "3")
        assert [isinstance(event, Gap) for event in found] == [True, False]
    hub.close()


@pytest.mark.parametrize(
    "how",
    [
        "TRUNCATE {0}.event, {0}.channel",
        "DELETE FROM {0}.event; DELETE FROM {0}.channel",
        "TRUNCATE {0}.channel",
        "DELETE FROM {0}.channel",
    ],
)
def test_channels_that_somebody_deletes(server, schema, make, how):
    """Who knew them empty is not complete, nor who knows what they had then."""
    broker = make()
    empty, other = (broker.read(name, None).head for name in ("a", "b"))
    ids = broker.publish([("a", b"data: %d\n\n" % number) for number in range(3)])
    server.execute(how.format(schema))
    # One that is not there says nothing of those that are.
    now = broker.read("b", None).head
    server.execute(f"DELETE FROM {schema}.channel")
    assert broker.read("b", None).head == now != other
    (new,) = broker.publish([("a", b"data: new\n\n")])
    hub = Hub(broker=broker)
    for after in (empty, *ids):
        with contextlib.closing(hub.subscribe("a", after=after)) as subscription:
            found = read_until(subscription, "new")
            assert any(isinstance(event, Gap) for event in found)
    assert broker.read("a", new).complete
    hub.close()


# Connections, threads, processes.


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


def test_close_leaves_nothing(server, make):
    """No thread, no descriptor, no connection; and nothing can be done after it."""
    own = psutil.Process()
    before = own.num_fds(), own.num_threads()
    for _ in range(3):
        broker = make()
        listening(broker, "a")
        broker.publish([("a", b"x")])
        broker.close()
        broker.close()
        with pytest.raises(Unavailable, match="closed"):
            broker.publish([("a", b"x")])
        broker.watch("b")
    # Fewer: what earlier tests have left may end meanwhile.
    await_true(lambda: own.num_fds() <= before[0] and own.num_threads() <= before[1])
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
hub = Hub(broker=PostgreSQLBroker(url, schema=schema))
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
hub = Hub(broker=PostgreSQLBroker(sys.argv[1], schema=sys.argv[2]))
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


def test_listen_dsn(server, make, line, caplog):
    """Listening has a way of its own; where it hears nothing it says so, and works."""
    url = server.url_at(line.port)
    broker = make(url, listen_dsn=server.url)
    told = listening(broker, "a")
    broker.publish([("a", b"1")])
    await_true(lambda: told.payloads() == [b"1"])
    line.cut()
    with pytest.raises(Unavailable):
        broker.publish([("a", b"x")])
    # It hears, and cannot publish.
    assert [is_up for is_up, _ in told.states] == [False]
    line.mend()
    publish_until_it_works(broker, ("a", b"2"))
    await_true(lambda: [is_up for is_up, _ in told.states] == [False, True])


def test_deaf_listeners_say_so(server, schema, make, monkeypatch, caplog):
    """LISTEN does nothing behind some poolers: slow, and said, but nothing is lost."""
    monkeypatch.setattr(listener, "HEARTBEAT", 0.05)
    broker = make()
    told = listening(broker, "a")
    server.execute(
        f"CREATE OR REPLACE FUNCTION {schema}.pg_notify(text, text) RETURNS void"
        " LANGUAGE sql AS ''"
    )
    for place in ("append(text,bytea,bigint,double precision)",):
        server.execute(
            f"ALTER FUNCTION {schema}.{place} SET search_path = {schema}, pg_catalog"
        )
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            broker.publish([("a", b"%d" % number)])
            await_true(lambda number=number: len(told.entries) > number)
    journal().flush()
    assert [r.message for r in caplog.records if "listen_dsn" in r.message]


# What it keeps.


def test_long_payloads(make):
    """8000 bytes are no limit, nor are many of them; too many are refused."""
    broker = make(publish_timeout=LIMIT)
    told = listening(broker, "a")
    payloads = [bytes([number]) * (1 << 20) for number in range(30)]
    for start in range(0, 30, 10):
        broker.publish([("a", p) for p in payloads[start : start + 10]])
    await_true(lambda: len(told.entries) == len(payloads))
    assert told.payloads() == payloads
    found, last = [], "0"
    while entries := broker.read("a", last).entries:
        assert len(entries) <= 8
        found += [entry.payload for entry in entries]
        last = entries[-1].id
    assert found == payloads
    with pytest.raises(PayloadTooLarge):
        broker.publish([("a", b"x" * (1 << 20))] * 65)
    assert broker.read("a", None).head == last


@pytest.mark.parametrize(
    "name", ["x" * 200, "ü" * 200, "'\"\\{},$1%s", "日本:*語"[:-2]]
)
def test_any_name(make, name):
    """Of 200 characters, quotes and all; by itself and by a pattern."""
    broker = make()
    told = listening(broker, name, "#", "it's:*")
    broker.publish([(name, b"1"), ("it's:x", b"2")])
    await_true(lambda: len(told.entries) == 2)
    assert [channel for channel, _ in told.entries] == [name, "it's:x"]
    assert [entry.payload for entry in broker.read(name, "0").entries] == [b"1"]


@pytest.fixture
def database(server, schema, encoding):
    """The URL of a database of another encoding."""
    server.execute(f"CREATE DATABASE {schema} TEMPLATE template0 ENCODING '{encoding}'")
    return server.url_at(server.port, schema)


@pytest.mark.parametrize("encoding", ["LATIN1"])
def test_a_name_that_the_encoding_has_not_is_denied(database):
    """It deafens nobody else: clients may choose names."""
    with contextlib.closing(Hub(database)) as hub:
        heard = hub.subscribe("\xe9")
        assert heard.read(0) == []
        for name in ("\u65e5", "\u65e5:*"):
            hub.broker.watch(name)
        with pytest.raises(Closed, match="denied"):
            hub.subscribe("\u65e5").read(LIMIT)
        with pytest.raises(Denied, match="not published"):
            hub.publish("\u65e5", "x")
        hub.publish("\xe9", "1")
        assert [event.data for event in heard.read(LIMIT)] == ["1"]
        assert hub.stats()["up"]


@pytest.mark.parametrize("encoding", ["SQL_ASCII"])
def test_a_name_that_is_not_utf8_silences_nobody(database):
    """A server without an encoding has names of any bytes."""
    with contextlib.closing(Hub(database)) as hub:
        heard = hub.subscribe("\xe9"), hub.subscribe("#")
        assert [s.read(0) for s in heard] == [[], []]
        with psycopg.connect(database, autocommit=True) as connection:
            for text in ("data: x\n\n", "no event"):
                connection.execute(
                    "SELECT syncstream.append(E'\\377', %s::text::bytea, 9, 9)", [text]
                )
        hub.publish("\xe9", "1")
        for subscription in heard:
            assert read_until(subscription, "1")
        assert hub.stats()["up"]


@pytest.mark.parametrize("name", ["a", "b"], ids=["beyond the head", "no channel"])
def test_a_row_that_was_inserted_by_hand_is_passed(server, schema, make, name):
    """Without its channel's: the next event comes after it, as a hole."""
    broker = make()
    told = listening(broker, "a", "b")
    broker.publish([("a", b"1")])
    head = broker.read(name, None).head
    server.execute(
        f"INSERT INTO {schema}.event SELECT nextval('{schema}.event_seq'), %s,"
        " g, 7, 7, now(), 'x' FROM generate_series(2, 3) g",
        name,
    )
    (id,) = broker.publish([(name, b"2")])
    await_true(lambda: told.payloads() == [b"1", b"x", b"x", b"2"])
    page = broker.read(name, head)
    assert (page.entries[-1].id, page.head) == (id, id)
    assert not page.complete
    assert broker.read(name, id).complete


def test_many_names(make, monkeypatch):
    """Beyond some hundreds the listener reads all; each gets its own all the same."""
    monkeypatch.setattr(listener, "_MAX_NAMES", 3)
    broker = make()
    told = listening(broker, "a", "b")
    broker.publish([("a", b"1"), ("x", b"-")])
    for name in "cdef":
        broker.watch(name)
    broker.publish([("f", b"2"), ("x", b"-"), ("b", b"3")])
    await_true(lambda: told.payloads() == [b"1", b"2", b"3"])
    for name in "cdef":
        broker.unwatch(name)
    broker.publish([("f", b"-"), ("a", b"4")])
    await_true(lambda: told.payloads()[3:] == [b"4"])


def test_the_table_is_bounded(server, schema, make):
    """20,000 events leave what is kept, and the room that they had is used again."""
    broker = make(capacity=100)
    for number in range(200):
        broker.publish([(f"c{number % 10}", b"x" * 200)] * 100)
    ((rows,),) = server.execute(f"SELECT count(*) FROM {schema}.event")
    assert rows < 10 * (100 + 32)
    server.execute(f"VACUUM {schema}.event")
    sql = f"SELECT pg_total_relation_size('{schema}.event')"
    ((before,),) = server.execute(sql)
    for number in range(100):
        broker.publish([(f"c{number % 10}", b"x" * 200)] * 50)
    ((after,),) = server.execute(sql)
    assert after < 1.1 * before


def test_what_is_too_old_makes_room(server, schema, make):
    """Whoever publishes removes it, of other channels, too."""
    broker = make(max_age=0.2)
    broker.publish([("idle", b"x")] * 100)
    threading.Event().wait(0.3)
    broker.publish([("busy", b"x")] * 100)
    broker.publish([("busy", b"x")] * 100)
    ((rows,),) = server.execute(
        f"SELECT count(*) FROM {schema}.event WHERE channel = 'idle'"
    )
    assert rows == 0


def test_a_clock_that_goes_back(server, schema, make):
    """What is kept has no holes, whatever the server's clock does."""
    broker = make(max_age=3600)
    broker.publish([("a", b"1")])
    for table in ("event", "channel"):
        server.execute(f"UPDATE {schema}.{table} SET ts = ts + interval '1 day'")
    broker.publish([("a", b"2"), ("a", b"3")])
    assert len(broker.read("a", "0").entries) == 3


def test_channels_that_are_idle_for_long_are_forgotten(server, schema, make):
    """Then nobody who knew them, or their absence, is taken for complete."""
    broker = make()
    never = broker.read("idle", None).head
    (known,) = broker.publish([("idle", b"1")])
    server.execute(f"UPDATE {schema}.channel SET ts = ts - interval '2 days'")
    server.execute(f"UPDATE {schema}.state SET swept = swept - interval '2 hours'")
    server.execute(f"SELECT setval('{schema}.event_seq', 1020)")
    broker.publish([("busy", b"x")] * 10)
    names = server.execute(f"SELECT name FROM {schema}.channel")
    assert names == [("busy",)]
    fresh = broker.read("idle", None).head
    assert fresh not in (never, known)
    broker.publish([("idle", b"2")])
    for id in (never, known):
        page = broker.read("idle", id)
        assert not page.complete
        assert [entry.payload for entry in page.entries] == [b"2"]
    assert broker.read("idle", fresh).complete


# What was deleted, and who has not seen it.

FROZEN = """
import json, sys
from syncstream import Gap, Hub
from syncstream.brokers.postgresql import PostgreSQLBroker
_, url, schema, names = sys.argv
hub = Hub(broker=PostgreSQLBroker(url, schema=schema))
subscriptions = {name: hub.subscribe(name) for name in names.split(",")}
for subscription in subscriptions.values():
    subscription.read(0)
hub.publish("place", "newest that it knows")
assert subscriptions["place"].read(10)
print("ready", flush=True)
sys.stdin.readline()
def kind(event):
    return "reset" if isinstance(event, Gap) else event.data
# The one that is told last, when all others were.
assert subscriptions["place"].read(10)
found = {name: [kind(e) for e in s.read(1)] for name, s in subscriptions.items()}
print(json.dumps(found), flush=True)
hub.close()
"""


def test_what_was_deleted_while_a_process_was_frozen(server, schema, make):
    """Aged out, trimmed or deleted, with nothing newer in its channel: a reset each."""
    broker = make(max_age=60)
    names = ["aged", "deleted", "trimmed", "kept", "idle", "place"]
    words = [FROZEN, server.url, schema, ",".join(names)]
    with subprocess.Popen(
        [sys.executable, "-c", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    ) as child:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGSTOP)
        # What it saw last is of a time when the clock was ahead: that stays.
        later = f"UPDATE {schema}.event SET ts = ts + interval '1 day'"
        server.execute(later)
        broker.publish([("aged", b"data: 1\n\n")])
        earlier = f"UPDATE {schema}.event SET ts = ts - interval '1 hour' WHERE channel"
        server.execute(f"{earlier} = 'aged'")
        broker.publish([("deleted", b"data: 1\n\n"), ("kept", b"data: 1\n\n")])
        server.execute(f"DELETE FROM {schema}.event WHERE channel = 'deleted'")
        few = make(capacity=3)
        few.publish([("trimmed", b"data: %d\n\n" % n) for n in range(64)])
        left = "SELECT count(*) FROM {}.event WHERE channel IN ('aged', 'deleted')"
        assert server.execute(left.format(schema)) == [(0,)]
        child.send_signal(signal.SIGCONT)
        broker.publish([("place", b"data: last\n\n")])
        out, _ = child.communicate("go\n", timeout=LIMIT)
        assert child.returncode == 0
    found = json.loads(out)
    assert found == {
        "aged": ["reset"],
        "deleted": ["reset"],
        "trimmed": ["reset", "61", "62", "63"],
        "kept": ["1"],
        "idle": [],
        "place": [],
    }


def test_the_newest_are_found_without_the_rest(server, schema, make):
    """However many are kept, and whatever was deleted among them."""
    with contextlib.closing(Hub(broker=make())) as hub:
        assert read_for_the_newest(hub) == 1
    broker = make(capacity=5)
    assert broker.newest("a", 1) == (broker.read("a", None).head,) * 2
    ids = broker.publish([("a", b"data: %d\n\n" % number) for number in range(8)])
    assert broker.newest("a", 1) == (ids[6], ids[7])
    assert broker.newest("a", 100) == (ids[2], ids[7])  # not more than is kept
    server.execute(f"DELETE FROM {schema}.event WHERE off = 7")
    assert broker.newest("a", 2) == (ids[4], ids[7])


def test_who_comes_and_goes_evicts_nothing(make):
    """Each process tells of those of the others; events are kept."""
    here, there = (Hub(broker=make(capacity=3)) for _ in range(2))
    with contextlib.closing(here), contextlib.closing(there):
        come_and_go(here, there)


def test_a_hole_in_the_middle(server, schema, make):
    """What was deleted is not passed over; what follows it is all there."""
    broker = make()
    first, second, third, *rest = broker.publish(
        [("a", b"data: %d\n\n" % number) for number in range(5)]
    )
    server.execute(f"DELETE FROM {schema}.event WHERE off = 3")

    def read(after):
        page = broker.read("a", after)
        return page.complete, [entry.id for entry in page.entries]

    assert read(first) == (True, [second, *rest])  # who reads it sees the break
    assert read(second) == (False, rest)
    assert read(third) == (True, rest)
    assert read("3-00000000") == (False, [first, second, *rest])
    hub = Hub(broker=make())
    with contextlib.closing(hub.subscribe("a", after=second)) as subscription:
        reset, *events = subscription.read(LIMIT)
        assert isinstance(reset, Gap)
        assert reset.id == third
        assert [event.id for event in events] == rest
    hub.close()


# Other people's transactions.


def test_a_transaction_that_commits_is_seen_once(server, make):
    """After it has, in the order of commits; its ids are not known before."""
    broker = make(capacity=5000)
    told = listening(broker, "a")
    with server.connect() as first, server.connect() as second:
        with first.transaction():
            assert broker.publish([("a", b"late")], connection=first) == [None]
            with second.transaction():
                items = [("a", b"%d" % number) for number in range(1500)]
                broker.publish(items, connection=second)
            broker.publish([("a", b"between")])
        await_true(lambda: len(told.entries) == 1502)
    assert told.payloads() == [*(p for _, p in items), b"between", b"late"]
    page = broker.read("a", told.entries[-3][1].id)
    assert [entry.payload for entry in page.entries] == [b"between", b"late"]


def test_a_deletion_that_is_open_holds_nobody_up(server, schema, make):
    """Room is made later; and whoever deletes can publish in the same transaction."""
    broker = make(max_age=60, capacity=10)
    broker.publish([("idle", b"1"), ("old", b"1"), ("erased", b"1")])
    server.execute(
        f"UPDATE {schema}.event SET ts = ts - interval '1 hour'"
        " WHERE channel IN ('idle', 'old')"
    )
    with psycopg.connect(server.url) as connection:
        connection.execute(
            f"DELETE FROM {schema}.event WHERE channel IN ('old', 'erased')"
        )
        broker.publish([("erased", b"2")], connection=connection)
        for _ in range(2):  # more than after which room is made
            broker.publish([("a", b"x")] * 32)
    kept = f"SELECT channel FROM {schema}.event WHERE channel <> 'a' ORDER BY seq"
    assert server.execute(kept) == [("idle",), ("erased",)]
    broker.publish([("a", b"x")] * 32)
    assert server.execute(kept) == [("erased",)]


def test_a_publication_of_all_tables(server, schema, make):
    """Logical replication forbids to update tables without a key: all have one."""
    renewed = f"{schema}_1"
    server.execute(REVISION_1.replace("syncstream", renewed))
    for name in (schema, renewed):
        install(server.url, schema=name)
    keyless = (
        "SELECT c.relname FROM pg_class c WHERE c.relkind = 'r'"
        " AND c.relnamespace IN (%s::regnamespace, %s::regnamespace) AND NOT EXISTS"
        " (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)"
    )
    assert server.execute(keyless, schema, renewed) == []


@pytest.mark.parametrize(
    "options",
    [
        *({"max_age": bad} for bad in (0, -1.0, float("inf"), float("nan"), 1e12)),
        *({"capacity": bad} for bad in (0, -1, 2.5, 10**30)),
        *({"connections": bad} for bad in (0, 2.5)),
    ],
    ids=str,
)
def test_bounds_are_checked_at_construction(options):
    """Each would fail at every call, or at the commit of a transaction."""
    ((name, bound),) = options.items()
    error = TypeError if (name, bound) == ("capacity", 2.5) else ValueError
    with pytest.raises(error, match=f"{name} must be"):
        PostgreSQLBroker(**options)


def test_a_transaction_that_rolls_back_never_was(server, schema, make):
    """Nor was what a savepoint takes back; no number is burnt."""
    broker = make()
    told = listening(broker, "a")
    with server.connect() as connection:
        with contextlib.suppress(ZeroDivisionError), connection.transaction():
            broker.publish([("a", b"never")], connection=connection)
            raise ZeroDivisionError
        with connection.transaction():
            broker.publish([("a", b"1")], connection=connection)
            with contextlib.suppress(ZeroDivisionError), connection.transaction():
                broker.publish([("a", b"never")], connection=connection)
                raise ZeroDivisionError
            broker.publish([("a", b"2")], connection=connection)
    broker.publish([("a", b"3")])
    await_true(lambda: told.payloads() == [b"1", b"2", b"3"])
    numbers = [int(entry.id.partition("-")[0], 16) for _, entry in told.entries]
    assert numbers == [1, 2, 3]
    assert server.execute(f"SELECT count(*) FROM {schema}.outbox") == [(0,)]


def test_an_open_transaction_holds_nobody_up(server, make):
    """However long it is open, of the same channel, too."""
    broker = make()
    with server.connect() as connection, connection.transaction():
        broker.publish([("a", b"x")], connection=connection)
        for _ in range(20):
            broker.publish([("a", b"y")])  # who is held up gives up, and says so
        assert len(broker.read("a", "0").entries) == 20


def test_a_commit_that_waits_holds_nobody_up(server, schema, make):
    """A foreign key that is checked at the commit, and somebody who has its row."""
    broker = make()
    told = listening(broker, "a")
    broker.publish([("a", b"1")])
    server.execute(
        f"CREATE TABLE {schema}.parent (id integer PRIMARY KEY);"
        f"INSERT INTO {schema}.parent VALUES (1);"
        f"CREATE TABLE {schema}.child (parent integer"
        f" REFERENCES {schema}.parent DEFERRABLE INITIALLY DEFERRED)"
    )
    blocked = "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation"
    blocked += " JOIN pg_locks w ON w.pid = l.pid AND NOT w.granted"
    blocked += f" WHERE c.oid = '{schema}.parent'::regclass"
    with server.connect() as waiting, server.connect() as owner:
        owner.execute("BEGIN")
        owner.execute(f"SELECT FROM {schema}.parent FOR UPDATE")
        waiting.execute("BEGIN")
        broker.publish([("a", b"3")], connection=waiting)
        waiting.execute("SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL DEFERRED")
        broker.publish([("a", b"4")], connection=waiting)
        waiting.execute(f"INSERT INTO {schema}.child VALUES (1)")
        committing = threading.Thread(target=waiting.execute, args=("COMMIT",))
        committing.start()
        await_true(lambda: server.execute(blocked)[0][0] > 0)
        broker.publish([("a", b"2")])
        owner.execute("COMMIT")
        committing.join(LIMIT)
    await_true(lambda: told.payloads() == [b"1", b"2", b"3", b"4"])
    assert server.execute(f"SELECT count(*) FROM {schema}.outbox") == [(0,)]


def test_a_batch_is_one_without_a_transaction(server, schema, make):
    """All of it is stored, or nothing, however long it is."""
    broker = make(capacity=5000)
    broker.publish([("a", b"1")])
    server.execute(f"ALTER TABLE {schema}.outbox ADD CHECK (data <> 'bad')")
    items = [("a", b"%d" % number) for number in range(2, 3002)]
    with server.connect() as connection:
        with pytest.raises(psycopg.errors.CheckViolation):
            broker.publish([*items, ("a", b"bad")], connection=connection)
        assert len(broker.read("a", "0").entries) == 1
        broker.publish(items, connection=connection)
    page = broker.read("a", "0", 5000)
    assert [int(entry.payload) for entry in page.entries] == list(range(1, 3002))


def test_a_transaction_that_is_not_read_committed(server, make):
    """It fails at its commit where others came first; nothing is stored then."""
    broker = make()
    broker.publish([("a", b"1")])
    with server.connect() as connection:
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        broker.publish([("a", b"never")], connection=connection)
        broker.publish([("a", b"2")])
        with pytest.raises(psycopg.errors.SerializationFailure):
            connection.execute("COMMIT")
    payloads = [entry.payload for entry in broker.read("a", "0").entries]
    assert payloads == [b"1", b"2"]


def test_room_that_others_have_made_fails_no_commit(server, schema, make):
    """Nor a snapshot of before that: its channel is its own."""
    broker = make(max_age=60)
    broker.publish([("old", b"x")] * 30)
    server.execute(f"UPDATE {schema}.event SET ts = ts - interval '1 hour'")
    with server.connect() as connection:
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        broker.publish([("a", b"x")] * 32, connection=connection)
        broker.publish([("b", b"x")])
        # As the next one that publishes would, a little later.
        server.execute(f"DELETE FROM {schema}.event WHERE channel = 'old'")
        connection.execute("COMMIT")
    assert len(broker.read("a", "0").entries) == 32


def test_constraints_that_are_immediate(server, schema, make):
    """As Django's TestCase has them: the commit is awaited, and no lock is held."""
    broker = make()
    told = listening(broker, "a")
    with server.connect() as connection:
        with connection.transaction():
            broker.publish([("a", b"1"), ("a", b"2")], connection=connection)
            connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            broker.publish([("a", b"3")], connection=connection)
            connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            with contextlib.suppress(ZeroDivisionError), connection.transaction():
                broker.publish([("a", b"never")], connection=connection)
                connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
                raise ZeroDivisionError
            connection.execute(
                "SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL DEFERRED"
            )
            broker.publish([("a", b"4")], connection=connection)
            broker.publish([("a", b"before")])  # nobody holds it up
            await_true(lambda: told.payloads() == [b"before"])
        await_true(lambda: told.payloads() == [b"before", b"1", b"2", b"3", b"4"])
        with contextlib.suppress(ZeroDivisionError), connection.transaction():
            connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            broker.publish([("a", b"never")], connection=connection)
            raise ZeroDivisionError
        broker.publish([("a", b"5")], connection=connection)
    await_true(lambda: told.payloads()[5:] == [b"5"])
    assert server.execute(f"SELECT count(*) FROM {schema}.outbox") == [(0,)]


def test_a_connection_to_elsewhere(server, schema, make):
    """A clear word, and nothing is stored there."""
    names = ["", "bare", "copy", "other"]
    for name in names:
        template = f"TEMPLATE {schema}" if name == "copy" else ""
        server.execute(f"CREATE DATABASE {schema}{name} {template}")
        if name != "bare":
            install(server.url_at(server.port, schema + name), schema=schema)
        # Nobody may be in it while it is copied.
        await_true(
            lambda: (
                server.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname LIKE %s",
                    f"{schema}%",
                )
                == [(0,)]
            )
        )
    broker = make(server.url_at(server.port, schema))
    broker.publish([("a", b"1")])
    with (
        psycopg.connect(server.url_at(server.port, f"{schema}bare")) as connection,
        pytest.raises(Unavailable, match="is it the one of the hub"),
    ):
        broker.publish([("a", b"x")], connection=connection)
    for name in ("copy", "other"):
        with psycopg.connect(server.url_at(server.port, schema + name)) as connection:
            for pipeline in (contextlib.nullcontext(), connection.pipeline()):
                with pipeline, pytest.raises(ValueError, match="hub's database"):
                    broker.publish([("a", b"x")], connection=connection)
            # Its transaction goes on.
            sql = f"SELECT count(*) FROM {schema}.outbox"
            assert connection.execute(sql).fetchall() == [(0,)]
    url = server.url_at(server.port, schema)
    with psycopg.connect(url) as connection:
        connection.execute("SET session_replication_role = replica")
        with pytest.raises(ValueError, match="session_replication_role"):
            broker.publish([("a", b"x")], connection=connection)
    with pytest.raises(TypeError, match="connection must be Django's"):
        broker.publish([("a", b"x")], connection="postgresql://")
    nowhere = psycopg.AsyncConnection(psycopg.pq.PGconn.connect(server.url.encode()))
    with pytest.raises(TypeError, match="must not be async"):
        broker.publish([("a", b"x")], connection=nowhere)
    nowhere.pgconn.finish()
    assert len(broker.read("a", "0").entries) == 1


def test_a_server_that_was_restarted_is_the_same(server, schema, make):
    """To itself; a copy of it, which looks like that, is another one."""
    broker = make()
    broker.publish([("a", b"1")])
    sql = f"SELECT {schema}.identity()"
    before = server.execute(sql)
    server.stop()
    server.start()
    assert server.execute(sql) != before
    with server.connect() as connection:
        broker.publish([("a", b"2")], connection=connection)
    assert len(broker.read("a", "0").entries) == 2


def test_a_sequence_that_is_behind(server, schema, make):
    """Logical replication copies none, and some restore rows alone: all is told."""
    broker = make()
    told = listening(broker, "a")
    broker.publish([("a", b"0")] * 50)
    restart = f"ALTER SEQUENCE {schema}.event_seq RESTART"
    for count, sql in ((51, ""), (52, f"DELETE FROM {schema}.event")):
        server.execute(f"{restart};{sql}")
        broker.publish([("a", b"1")])
        await_true(lambda count=count: len(told.entries) == count)


def test_the_lock_is_the_schemas_own(server, schema, make):
    """Nobody holds up publishers who may not publish himself."""
    broker = make()
    broker.publish([("a", b"1")])
    server.execute(f"CREATE ROLE r{schema} LOGIN")
    url = server.url.replace("postgres@", f"r{schema}@")
    server.execute(f"GRANT USAGE ON SCHEMA {schema} TO r{schema}")
    server.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO r{schema}")
    oid = f"'{schema}.event'::regclass::oid::integer"
    with psycopg.connect(url) as other:
        other.execute(f"SELECT pg_advisory_lock(1937337955, {oid})")
        broker.publish([("a", b"2")])
        for sql in (
            *(f"SELECT FROM {schema}.state FOR {how}" for how in ("UPDATE", "SHARE")),
            f"LOCK TABLE {schema}.state IN ROW SHARE MODE",
            f"SELECT {schema}.append('a', '', 1, 1)",
        ):
            denied = pytest.raises(psycopg.errors.InsufficientPrivilege)
            with denied, other.transaction():
                other.execute(sql)


def test_transactions_of_opposite_order(server, make):
    """They take one lock, at their commits: none waits for the other for ever."""
    broker = make()

    def commit(channels):
        with server.connect() as connection:
            for _ in range(30):
                with connection.transaction():
                    for channel in channels:
                        broker.publish([(channel, b"x")], connection=connection)

    threads = [
        threading.Thread(target=commit, args=(channels,))
        for channels in ("ab", "ba", "abc", "cba")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert int(broker.read("a", None).head.partition("-")[0], 16) == 120


def test_ids_are_nobody_elses(server, schema, make):
    """Whatever a session, or a process, has seeded."""
    broker = make()
    broker.publish([("a", b"x")])
    nonces = set()
    for number in range(3):
        random.seed(0)
        with server.connect() as connection, connection.transaction():
            connection.execute("SELECT setseed(0)")
            broker.publish([(f"b{number}", b"x")], connection=connection)
        nonces.add(broker.read(f"b{number}", None).head)
    assert len(nonces) == 3


# The schema.


def test_install(server, schema, make):
    """As often as one likes; then it is used by who may not create it."""
    for _ in range(2):
        install(server.url, schema=schema)
    server.execute(f"CREATE ROLE r{schema} LOGIN")
    url = server.url.replace("postgres@", f"r{schema}@")
    with pytest.raises(Unavailable, match="permission denied"):
        make(url).publish([("a", b"x")])
    for grant in (
        f"USAGE ON SCHEMA {schema}",
        f"USAGE ON ALL SEQUENCES IN SCHEMA {schema}",
        f"SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema}",
    ):
        server.execute(f"GRANT {grant} TO r{schema}")
    broker = make(url)
    told = listening(broker, "a")
    broker.publish([("a", b"1")])
    with psycopg.connect(url) as connection:
        broker.publish([("a", b"2")], connection=connection)
    await_true(lambda: told.payloads() == [b"1", b"2"])


def test_the_schema_is_created_once(server, schema):
    """By the first of many who come at one moment."""
    errors = []

    def use(broker):
        try:
            broker.publish([("a", b"x")])
        except Exception as error:
            errors.append(error)

    brokers = [
        PostgreSQLBroker(server.url, schema=schema, publish_timeout=LIMIT)
        for _ in range(10)
    ]
    threads = [threading.Thread(target=use, args=(broker,)) for broker in brokers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert errors == []
    assert len(brokers[0].read("a", "0").entries) == 10
    for broker in brokers:
        broker.close()


def test_what_it_says_without_a_schema(server, schema, make):
    """That it may not create it, or that it was told not to; and what to do."""
    with pytest.raises(Unavailable, match=r"no schema .*manage.py migrate"):
        make(create=False).publish([("a", b"x")])
    server.execute(f"CREATE ROLE r{schema} LOGIN")
    url = server.url.replace("postgres@", f"r{schema}@")
    with pytest.raises(Unavailable, match=r"may not create it: permission .*migrate"):
        make(url).publish([("a", b"x")])


def test_another_version_is_refused(server, schema, make):
    """Before anything is done with it."""
    make().publish([("a", b"x")])
    server.execute(f"UPDATE {schema}.state SET version = 99")
    broker = make()
    told = listening(broker, "a")
    with pytest.raises(Unavailable, match=r"has version 99, .* needs 1"):
        broker.publish([("a", b"x")])
    await_true(lambda: told.states)
    assert "version 99" in told.states[0][1]


def test_search_path_does_not_matter(server, schema, make):
    """Nor who has made things of the same names."""
    server.execute(
        "CREATE SCHEMA evil; CREATE TABLE evil.event (x int);"
        " CREATE FUNCTION evil.to_hex(bigint) RETURNS text LANGUAGE sql AS"
        " 'SELECT ''evil''';"
    )
    broker = make(f"{server.url}?options=-csearch_path%3Devil,pg_catalog")
    told = listening(broker, "a")
    (id,) = broker.publish([("a", b"1")])
    assert id.startswith("1-")
    with server.connect() as connection:
        connection.execute("SET search_path = evil, pg_catalog")
        broker.publish([("a", b"2")], connection=connection)
    await_true(lambda: told.payloads() == [b"1", b"2"])


def test_other_settings_of_the_server(server, make):
    """Isolation, quoting and limits that a role or database has by default."""
    words = (
        "default_transaction_isolation=serializable",
        "default_transaction_read_only=on",
        "standard_conforming_strings=off",
        "bytea_output=escape",
    )
    options = "%20".join(f"-c{word}".replace("=", "%3D") for word in words)
    make().publish([("a", b"0")])
    broker = make(f"{server.url}?options={options}")
    told = listening(broker, "a")
    for number in range(3):
        broker.publish([("a", b"\\%d'" % number)])
    await_true(lambda: told.payloads() == [b"\\0'", b"\\1'", b"\\2'"])


def test_the_command(server, schema):
    """It installs, or prints what it would; what fails it says in one line."""

    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "syncstream.brokers.postgresql", *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )

    assert run("--sql").stdout == f"{install_sql()};\n"
    words = ("--schema", schema)
    for _ in range(2):
        done = run(server.url, *words)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert server.execute(f"SELECT version FROM {schema}.state") == [(1,)]
    done = run("postgresql://postgres@127.0.0.1:1/x", *words)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_urls(server, monkeypatch):
    """postgresql: alone is what the environment says; others are libpq's."""
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", str(server.port))
    monkeypatch.setenv("PGUSER", "postgres")
    for name, url in enumerate(("postgresql:", "postgres://", server.url)):
        with contextlib.closing(open_broker(url, capacity=7, max_age=None)) as broker:
            assert broker.scope == "cluster"
            channel = f"a{name}"
            assert broker.read(channel, None).head.startswith("0-")
            broker.publish([(channel, b"x")] * 8)
            assert len(broker.read(channel, "0").entries) == 7
    with pytest.raises(ValueError, match="url must be as libpq takes it"):
        open_broker("postgresql://h/d?no_such_option=1")
    for host in ("a..b", "c" * 64):
        with (
            contextlib.closing(open_broker(f"postgresql://{host}/d")) as broker,
            pytest.raises(Unavailable, match="cannot be found"),
        ):
            broker.publish([("a", b"x")])
    for options in (
        {"schema": "a; DROP"},
        {"publish_timeout": 0},
        {"connections": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            PostgreSQLBroker(**options)


# Revision 1 of the schema, and of what workers say to it.

REVISION_1 = (FORMATS / "postgresql_1.sql").read_text()


class OldWorker:
    """What a worker of revision 1 does, over a connection."""

    def __init__(self, server, schema):
        self.connection = server.connect()
        self.schema = schema
        self.place = 0

    def publish(self, *items):
        sql = f"SELECT {self.schema}.publish(%s::text[], %s::bytea[], 1000, 3600.0)"
        channels, data = map(list, zip(*items, strict=True))
        return [id for (id,) in self.connection.execute(sql, (channels, data))]

    def enlist(self, channel, payload):
        self.connection.execute(
            f"INSERT INTO {self.schema}.outbox (channel, data, capacity, max_age)"
            " VALUES (%s, %s, 1000, 3600.0)",
            (channel, payload),
        )

    def tail(self):
        sql = f"SELECT * FROM {self.schema}.tail(%s, 500, ARRAY['a'], '{{}}')"
        rows = self.connection.execute(sql, (self.place,)).fetchall()[1:]
        self.place = rows[-1][0] if rows else self.place
        return [bytes(row[5]) for row in rows if row[5] is not None]

    def read(self):
        sql = f"SELECT * FROM {self.schema}.read('a', -1, 0, 1000, 1000, 3600.0)"
        return [bytes(row[3]) for row in self.connection.execute(sql).fetchall()[1:]]

    def version(self):
        sql = f"SELECT version FROM {self.schema}.state"
        return self.connection.execute(sql).fetchone()[0]


def test_old_and_new_workers_share_a_schema(server, schema, make):
    """While it is renewed, and after it: nothing is lost, doubled or out of order."""
    server.execute(REVISION_1.replace("syncstream", schema))
    old, waiting, late = (OldWorker(server, schema) for _ in range(3))
    with contextlib.ExitStack() as stack:
        for worker in (old, waiting, late):
            stack.enter_context(worker.connection)
        assert old.publish(("a", b"1"))[0].startswith("1-")
        for options in ({"create": False}, {}):
            server.execute(f"CREATE ROLE r{schema}{len(options)} LOGIN")
            url = server.url.replace("postgres@", f"r{schema}{len(options)}@")
            server.execute(f"GRANT USAGE ON SCHEMA {schema} TO r{schema}{len(options)}")
            with pytest.raises(Unavailable, match=r"older release.*migrate"):
                make(url, **options).read("a", None)
        late.connection.execute("BEGIN")
        late.enlist("a", b"5")
        # One that has appended and not committed, and one that waits for its lock.
        old.connection.execute("BEGIN")
        old.publish(("a", b"2"))
        waiting.connection.execute("BEGIN")
        steps = [
            threading.Thread(target=waiting.publish, args=(("a", b"3"), ("new", b"x"))),
            threading.Thread(target=lambda: install(server.url, schema=schema)),
        ]
        blocked = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        for count, step in enumerate(steps, 1):
            step.start()
            await_true(lambda count=count: server.execute(blocked) == [(count,)])
        old.connection.execute("COMMIT")
        for step in steps:
            step.join(LIMIT)
        assert server.execute(f"SELECT revision FROM {schema}.upkeep") == [(2,)]
        assert waiting.version() == 1
        # It has begun before, and it holds up who has not.
        broker = make(publish_timeout=0.5)
        told = listening(broker, "a")
        with pytest.raises(Unavailable):
            broker.publish([("a", b"no")])
        waiting.connection.execute("COMMIT")
        broker.publish([("a", b"4")])
        late.connection.execute("COMMIT")
        old.publish(("a", b"6"))
        broker.publish([("a", b"7")])
        everything = [b"%d" % number for number in range(1, 8)]
        assert old.read() == everything
        assert old.tail() == everything
        await_true(lambda: told.payloads()[-1:] == [b"7"])
        assert told.payloads() == everything[2:]
        ids = [entry.id for entry in broker.read("a", "0").entries]
        prevs = [entry.prev for entry in broker.read("a", "0").entries]
        assert prevs[1:] == ids[:-1]


def test_who_may_not_renew_holds_up_nobody(server, schema, make):
    """Its turn at the schema ends before it waits for a lock that publishers need."""
    server.execute(REVISION_1.replace("syncstream", schema))
    server.execute(
        f"CREATE ROLE r{schema} LOGIN; GRANT USAGE ON SCHEMA {schema} TO r{schema};"
        f"GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO r{schema}"
    )
    with server.connect() as other, other.transaction():
        other.execute(f"DELETE FROM {schema}.event")
        with pytest.raises(Unavailable, match="must be owner"):
            make(server.url.replace("postgres@", f"r{schema}@")).read("a", None)


# Rights, as docs/brokers.md lists them.


def _grants(kind, role, schema):
    """Return the statements of the docs for a role that does one or the other."""
    docs = (ROOT / "docs" / "brokers.md").read_text()
    _, _, rest = docs.partition(f"<!-- postgresql rights: {kind} -->\n```sql\n")
    sql, _, _ = rest.partition("```")
    assert "GRANT" in sql
    sql = sql.replace("SCHEMA syncstream", f"SCHEMA {schema}")
    return sql.replace("syncstream.", f"{schema}.").replace("TO app;", f"TO {role};")


def _role(server, schema, kind):
    role = f"r{schema}_{kind}"
    server.execute(f"CREATE ROLE {role} LOGIN")
    server.execute(_grants(kind, role, schema))
    return server.url.replace("postgres@", f"{role}@")


def test_rights_of_the_docs(server, schema, make):
    """They are enough for what they say, and for no more."""
    install(server.url, schema=schema)
    # Functions that nobody else may call, as careful operators have it.
    server.execute(
        f"REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} FROM PUBLIC;"
        "REVOKE EXECUTE ON FUNCTION pg_control_system FROM PUBLIC"
    )
    urls = [_role(server, schema, kind) for kind in ("both", "publish", "subscribe")]
    both, publisher, reader = (make(url, create=False, capacity=10) for url in urls)
    heard = [listening(broker, "a") for broker in (both, reader)]
    for broker, url in zip((both, publisher), urls, strict=False):
        # Long enough to trim, by number and by age, of other channels, too.
        broker.publish([("a", b"x")] * 40)
        with psycopg.connect(url) as connection:
            broker.publish([("a", b"y")], connection=connection)
    for told in heard:
        await_true(lambda told=told: told.payloads().count(b"y") == 2)
    reader.read("a", "0")
    both.read("a", "0")
    with pytest.raises(Denied, match=r"permission denied.*docs/brokers.md"):
        reader.publish([("a", b"x")])
    # What it may not is its own affair: it hears as before.
    assert [told.states for told in heard] == [[], []]


def test_without_rights_it_says_so_once(server, schema, make):
    """And goes on when it has them: up and down as the server has it."""
    make().publish([("a", b"1")])
    server.execute(f"CREATE ROLE r{schema} LOGIN")
    broker = make(server.url.replace("postgres@", f"r{schema}@"))
    told = listening(broker, "a")
    for _ in range(2):
        with pytest.raises(Unavailable, match="permission denied for schema"):
            broker.read("a", None)
    await_true(lambda: told.states)
    assert [is_up for is_up, _ in told.states] == [False]
    server.execute(_grants("subscribe", f"r{schema}", schema))
    await_true(lambda: told.states[1:])
    assert [is_up for is_up, _ in told.states] == [False, True]
    # Rows that are hidden would be taken for deleted ones, or for none.
    server.execute(f"ALTER TABLE {schema}.event ENABLE ROW LEVEL SECURITY")
    for read in (lambda: broker.read("a", "0"), lambda: broker.newest("a", 1)):
        with pytest.raises(Unavailable, match="row-level security"):
            read()
    await_true(lambda: told.states[2:])
    server.execute(f"ALTER TABLE {schema}.event DISABLE ROW LEVEL SECURITY")
    broker.read("a", "0")
    await_true(lambda: told.states[3:])
    assert [is_up for is_up, _ in told.states] == [False, True, False, True]


def test_a_policy_denies_one_name(server, schema, make):
    """Who publishes is told; others, and all that listen, go on."""
    make().publish([("a", b"1")])
    url = _role(server, schema, "publish")
    server.execute(
        f"ALTER TABLE {schema}.event ENABLE ROW LEVEL SECURITY;"
        f"CREATE POLICY p ON {schema}.event USING (true) WITH CHECK (channel <> 'no')"
    )
    broker = make(url)
    told = listening(make(), "no", "a")
    with pytest.raises(Denied, match="row-level security"):
        broker.publish([("no", b"x")])
    broker.publish([("a", b"2")])
    await_true(lambda: told.payloads() == [b"2"])


def test_kicks_that_a_role_may_not_tell(server, schema, make):
    """It is told so; whoever listens goes on."""
    reader = make()
    reader.publish([("a", b"data: 1\n\n")])
    url = _role(server, schema, "publish")
    server.execute(
        f"ALTER TABLE {schema}.event ENABLE ROW LEVEL SECURITY;"
        f"CREATE POLICY p ON {schema}.event USING (true)"
        " WITH CHECK (channel NOT LIKE 'syncstream %')"
    )
    with (
        contextlib.closing(Hub(broker=make(url))) as hub,
        contextlib.closing(Hub(broker=reader)) as other,
    ):
        ann = other.subscribe("a", who="ann")
        assert ann.read(0) == []
        with pytest.raises(Denied, match=r"in this process: 0.*row-level security"):
            hub.kick(who="ann")
        hub.publish("a", "2")
        assert [event.data for event in ann.read(5)] == ["2"]
        assert other.kick(who="ann") == 1


def test_what_the_server_refuses_is_down(server, schema, make):
    """Reading goes on, and it is said once: a full disk, for one."""
    broker = make()
    told = listening(broker, "a")
    broker.publish([("a", b"1")])
    server.execute(
        f"CREATE FUNCTION {schema}.full() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN RAISE disk_full; END'; CREATE TRIGGER full_disk BEFORE INSERT ON"
        f" {schema}.event EXECUTE FUNCTION {schema}.full()"
    )
    for _ in range(2):
        with pytest.raises(Unavailable, match="53100"):
            broker.publish([("a", b"x")])
        assert len(broker.read("a", "0").entries) == 1
    assert [is_up for is_up, _ in told.states] == [False]
    server.execute(f"DROP TRIGGER full_disk ON {schema}.event")
    broker.publish([("a", b"2")])
    assert [is_up for is_up, _ in told.states] == [False, True]


# Lines that were forgotten, and brokers.


def test_a_firewall_forgets_idle_connections(server, make, clock, monkeypatch):
    """The next publish is stored, within its time; what listens goes on, too."""
    make().publish([("a", b"1")])
    with Proxy(server.port) as proxy:
        broker = make(server.url_at(proxy.port), connections=2)
        told = listening(broker, "a")
        broker.publish([("a", b"2")])
        # Until the listener takes no answer for an end.
        monkeypatch.setattr(listener, "READ_TIMEOUT", 1.0)
        monkeypatch.setattr(pool, "FRESH", 0.0)
        proxy.forget()
        began = clock()
        broker.publish([("a", b"3")])
        assert clock() - began < 2
        await_true(lambda: told.payloads() == [b"2", b"3"])
    payloads = [entry.payload for entry in make().read("a", "0").entries]
    assert payloads == [b"1", b"2", b"3"]


def test_connections_that_are_not_used_are_closed(server, schema, make, monkeypatch):
    """Some time after a burst, by whoever listens or publishes."""
    monkeypatch.setattr(listener, "HEARTBEAT", 0.05)
    broker = make(connections=4)
    listening(broker, "a")
    broker.publish([("a", b"1")])
    with server.connect() as other, other.transaction():
        other.execute(f"LOCK TABLE {schema}.channel")
        threads = [
            threading.Thread(target=broker.publish, args=([("a", b"x")],))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        await_true(lambda: waiting(server) == 4)
    for thread in threads:
        thread.join(LIMIT)
    assert backends(server) == 5
    monkeypatch.setattr(pool, "IDLE", 0.0)
    await_true(lambda: backends(server) == 1)  # who listens


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
    hub = Hub(broker=PostgreSQLBroker(url, schema=schema))
    hub.publish("a", "x")
    hub.subscribe("a").read(0)
    hub.publish("a", "y")
    return hub
call().close()
own = psutil.Process()
before = own.num_threads(), own.num_fds()
for _ in range(5):
    call()
deadline = time.monotonic() + 10
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


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://app:s3cr3t@h/d",
        "postgresql://app:s3cr3t%zz@h/d",
        "postgresql://app:x/s3cr3t@h/d",
        "postgresql://app:s3cr3t/x@h/d",
        "postgresql://app:x@s3cr3t@h/d",
        "postgresql://app:s3cr3t@h:port/d",
        "host=h password=x s3cr3t",
        "postgresql://app:s3cr3t@h/d?nonsense=1",
    ],
)
def test_no_password_is_shown(url, capsys, monkeypatch):
    """Not in an error, its causes, a repr, or what the command says."""
    with pytest.raises(ValueError, match="url must be") as found:
        PostgreSQLBroker(url)
    assert "s3cr3t" not in "".join(traceback.format_exception(found.value))
    for words in ([url], [url, url]):
        monkeypatch.setattr(sys, "argv", ["postgresql", *words])
        with pytest.raises(SystemExit) as ended:
            __main__.main()
        assert ended.value.code
        output = capsys.readouterr()
        assert "s3cr3t" not in output.out + output.err


DJANGO = """
import sys
_, mode, url, port, name = sys.argv
if mode == "gevent":
    from gevent import monkey
    monkey.patch_all()
import django
from django.conf import settings
from django.core.management import call_command
from django.db import connection, connections, transaction
from syncstream import Hub
from syncstream.brokers.postgresql import PostgreSQLBroker

where = {"HOST": "127.0.0.1", "PORT": port, "USER": "postgres", "NAME": name}
settings.configure(
    INSTALLED_APPS=["syncstream"],
    DATABASES={
        "default": {"ENGINE": "django.db.backends.postgresql", **where},
        "other": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
    },
)
django.setup()
if mode == "threads":  # what an older release has made
    call_command("migrate", "syncstream", "0001", fake=True, verbosity=0)
call_command("migrate", verbosity=0)
call_command("migrate", database="other", verbosity=0)
call_command("makemigrations", check=True, verbosity=0)

hub = Hub(broker=PostgreSQLBroker(url, create=False))
subscription = hub.subscribe("orders")
subscription.read(0)

def take(last):
    found = []
    while last not in found:
        events = subscription.read(10)
        assert events, found
        found += [event.json()["n"] for event in events]
    return found

class Refused(Exception):
    pass

def order(number, refuse=False):
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        id = hub.publish("orders", {"n": number}, connection=connection)
        assert id is None
        if refuse:
            raise Refused

for number in range(6):
    try:
        order(number, refuse=number % 2)
    except Refused:
        pass
with transaction.atomic():
    order(6)
    try:
        order(7, refuse=True)
    except Refused:
        pass
    assert take(4) == [0, 2, 4]
    assert subscription.read(0.3) == []
hub.publish("orders", {"n": 8}, connection=connection)  # no transaction: at once
assert take(8) == [6, 8]
try:
    hub.publish("orders", {"n": 9}, connection=connections["other"])
except ValueError as error:
    assert "PostgreSQL" in str(error)
else:
    raise AssertionError("it is a SQLite")
call_command("migrate", "syncstream", "zero", verbosity=0)
with connection.cursor() as cursor:
    cursor.execute("SELECT to_regnamespace('syncstream')")
    assert cursor.fetchone() == (None,)
hub.close()
connection.close()
"""


@pytest.mark.parametrize("mode", ["threads", "gevent"])
def test_django(server, schema, mode):
    """migrate installs it; what atomic() takes back is never seen, the rest once."""
    pytest.importorskip("django")
    server.execute(f"CREATE DATABASE {schema}")
    url = server.url_at(server.port, schema)
    if mode == "threads":
        with psycopg.connect(url) as connection:
            connection.execute(REVISION_1)
    check_script(DJANGO, mode, url, str(server.port), schema)
