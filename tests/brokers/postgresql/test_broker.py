"""Channels in PostgreSQL: the contract, between processes too, and any name."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter

import psycopg
import pytest

from syncstream import Hub
from syncstream.brokers.postgresql import PostgreSQLBroker
from syncstream.errors import (
    Closed,
    Denied,
    PayloadTooLarge,
)
from syncstream.protocol import sse
from tests import ROOT
from tests.brokers.postgresql.waits import LIMIT, read_until
from tests.brokers.sinks import listening
from tests.support.pairs import check_script, come_and_go, read_for_the_newest
from tests.support.waits import await_true

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


def test_long_payloads(make):
    """8000 bytes are no limit, nor are many of them; too many are refused."""
    broker = make(publish_timeout=LIMIT)
    told = listening(broker, "a")
    payloads = [bytes([number]) * (1 << 20) for number in range(30)]
    for start in range(0, 30, 10):
        broker.publish([("a", p) for p in payloads[start : start + 10]])
    await_true(lambda: len(told.entries) == len(payloads))
    assert told.payloads == payloads
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
def test_a_name_that_the_encoding_has_not_is_denied(database, make):
    """It deafens nobody else: clients may choose names."""
    with contextlib.closing(Hub(broker=make(database))) as hub:
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
def test_a_name_that_is_not_utf8_silences_nobody(database, schema, make):
    """A server without an encoding has names of any bytes."""
    with contextlib.closing(Hub(broker=make(database))) as hub:
        heard = hub.subscribe("\xe9"), hub.subscribe("#")
        assert [s.read(0) for s in heard] == [[], []]
        with psycopg.connect(database, autocommit=True) as connection:
            for text in ("data: x\n\n", "no event"):
                connection.execute(
                    f"SELECT {schema}.append(E'\\377', %s::text::bytea, 9, 9)", [text]
                )
        hub.publish("\xe9", "1")
        for subscription in heard:
            assert read_until(subscription, "1")
        assert hub.stats()["up"]


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
