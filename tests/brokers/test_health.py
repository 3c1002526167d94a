"""Whether a broker works, as its sink is told: down once, and up once again.

What is older than a failure does not end it. The sink here holds whoever listens, so
that what it has found is told after the failure.
"""

import contextlib
import logging
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import pytest

from syncstream.brokers.health import Health
from syncstream.brokers.local import LocalBroker
from syncstream.brokers.local import listener as local_listener
from syncstream.brokers.postgresql import PostgreSQLBroker
from syncstream.brokers.redis import RedisBroker, beats
from syncstream.errors import Unavailable
from syncstream.runtime.journal import journal
from tests.support.postgresql_server import PostgreSQL
from tests.support.redis_server import RedisServer
from tests.support.waits import TIMEOUT, await_true


@pytest.fixture(scope="module")
def server():
    with PostgreSQL() as server:
        yield server


class Held:
    """A sink that holds whoever tells it a payload, or to read anew, until let go.

    Attributes:
        payloads: What it was told, each by then.
        states: Up or down, as it was told.
        before: The states by the time of each payload.
    """

    def __init__(self, *held):
        self._gates = {what: threading.Event() for what in held}
        self._reached = {what: threading.Event() for what in held}
        self.payloads = []
        self.states = []
        self.before = {}

    def deliver(self, channel, entry):
        self.before[entry.payload] = list(self.states)
        self.payloads.append(entry.payload)
        self._hold(entry.payload)

    def resync(self, channels):
        self._hold("resync")

    def state(self, is_up, reason):
        self.states.append(is_up)

    def deny(self, name, reason):
        raise AssertionError(f"{name} is refused: {reason}")

    def _hold(self, what):
        if what in self._gates:
            self._reached[what].set()
            assert self._gates[what].wait(TIMEOUT)

    def await_held(self, what):
        assert self._reached[what].wait(TIMEOUT), f"{what} was not told"

    def let_go(self, what):
        self._gates[what].set()


# The rule.


@pytest.fixture
def told():
    return Held()


@pytest.fixture
def health(told):
    health = Health(logging.getLogger("syncstream.brokers"))
    health.sink = told
    return health


def test_each_change_is_told_once(health, told):
    """It is up when nothing fails any more, whichever failed first."""
    health.works("read", since=health.moment())
    health.fails("read", "no answer")
    health.fails("publish", "no answer")
    health.fails("read", "no answer")
    health.works("read", since=health.moment())
    assert told.states == [False]
    assert [health.is_failing(way) for way in ("read", "publish")] == [False, True]
    health.works("publish", "read", since=health.moment())
    health.works("publish", since=health.moment())
    assert told.states == [False, True]


def test_servers_fail_each_for_itself(health, told):
    """One that works says nothing of another one."""
    health.fails("read", "no answer", server="one")
    health.works("read", since=health.moment(), server="other")
    assert told.states == [False]
    health.works("read", since=health.moment(), server="one")
    assert told.states == [False, True]


def test_what_began_before_a_failure_does_not_end_it(health, told):
    """Nor before the last of several; what begins after it does."""
    before = health.moment()
    health.fails("read", "no answer")
    between = health.moment()
    health.fails("read", "no answer")
    for since in (before, between):
        health.works("read", since=since)
        assert told.states == [False]
    health.fails("publish", "no answer")  # of another way it says nothing
    health.works("read", "publish", since=health.moment())
    assert told.states == [False, True]


def test_who_attaches_later_is_told_the_next_change(health, told):
    """Without a sink nothing was said, and it is down from the next failure on."""
    health.sink = None
    health.fails("read", "no answer")
    health.sink = told
    health.works("read", since=health.moment())
    assert told.states == []
    health.fails("read", "no answer")
    assert told.states == [False]


def test_a_sink_that_fails_harms_nobody(health, told, caplog):
    """It is logged, and the next change is told, too."""

    class Failing:
        def state(self, is_up, reason):
            raise RuntimeError("no sink")

    health.sink = Failing()
    health.fails("read", "no answer")
    journal().flush()
    assert "the hub could not be told whether its broker is up" in caplog.text
    health.sink = told
    health.works("read", since=health.moment())
    assert told.states == [True]


@pytest.mark.parametrize("is_up", [False, True])
def test_changes_are_told_in_their_order(health, is_up):
    """The sink is told of the next one when it has been told of the last."""
    telling, told, states = threading.Event(), threading.Event(), []

    class Slow:
        def state(self, is_up, reason):
            if not telling.is_set():
                telling.set()
                told.wait(0.2)
            states.append(is_up)

    def change(is_up):
        if is_up:
            health.works("read", since=health.moment())
        else:
            health.fails("read", "no answer")

    if is_up:
        health.fails("read", "no answer")
    health.sink = Slow()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(change, is_up)
        assert telling.wait(TIMEOUT)
        change(not is_up)
        told.set()
        first.result(TIMEOUT)
    assert states == [is_up, not is_up]


FORKED = """
import ctypes, logging, os, threading
from syncstream.brokers.health import Health
class Told:
    def state(self, is_up, reason):
        print(os.getpid() == parent, is_up, flush=True)
        if is_slow:
            is_held.set()
            goes_on.wait()
parent = os.getpid()
is_slow, is_held, goes_on = False, threading.Event(), threading.Event()
health = Health(logging.getLogger("syncstream.brokers"))
health.sink = told = Told()
health.fails("read", "no answer")
is_slow = True
thread = threading.Thread(
    target=lambda: health.works("read", since=health.moment())
)
if HELD:
    thread.start()  # it has the lock
    is_held.wait()
is_slow = False
child = FORK()
if not child:
    health.works("publish", since=health.moment())
    health.fails("publish", "no answer")
    health.works("publish", since=health.moment())
    os._exit(0)
os.waitpid(child, 0)
goes_on.set()
if HELD:
    thread.join()
else:
    health.works("read", since=health.moment())
"""


@pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"])
@pytest.mark.parametrize("is_held", [False, True], ids=["", "locked"])
def test_a_child_has_failures_of_its_own(fork, is_held):
    """It goes on from what the sink was told by then, whoever has the lock."""
    program = FORKED.replace("FORK", fork).replace("HELD", str(is_held))
    # Under Python 3.12 and later a fork among threads is warned of.
    words = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT)
    assert ran.returncode == 0, ran.stderr
    child = ["False False", "False True"]
    if is_held:
        assert ran.stdout.splitlines() == ["True False", "True True", *child]
    else:
        child = ["False True", *child]
        assert ran.stdout.splitlines() == ["True False", *child, "True True"]


# What was stored before a failure, and found after it.


def test_postgresql_finds_an_older_event(server):
    """Of one that comes after the failure it is said that publishing works again."""
    make = partial(PostgreSQLBroker, publish_timeout=TIMEOUT)  # it may be busy
    told, schema = Held(b"0", b"1"), "older"
    with (
        closing(make(server.url, schema=schema)) as broker,
        closing(make(server.url, schema=schema)) as other,
    ):
        broker.attach(told)
        broker.watch("a")
        broker.publish([("a", b"0")])
        told.await_held(b"0")
        broker.publish([("a", b"1")])
        server.execute(
            f"CREATE FUNCTION {schema}.full() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN RAISE disk_full; END'; CREATE TRIGGER full_disk BEFORE INSERT ON"
            f" {schema}.event FOR EACH ROW WHEN (NEW.data = 'x')"
            f" EXECUTE FUNCTION {schema}.full()"
        )
        with pytest.raises(Unavailable, match="53100"):
            broker.publish([("a", b"x")])
        assert told.states == [False]
        told.let_go(b"0")  # it was found before
        told.await_held(b"1")  # by a look that began after it
        assert told.states == [False]
        other.publish([("a", b"2")])
        told.let_go(b"1")
        await_true(lambda: told.states == [False, True])
        assert told.payloads == [b"0", b"1", b"2"]
        assert told.before[b"2"] == [False]


def test_redis_brings_an_older_event(monkeypatch):
    """Of one that comes after the failure it is said that publishing works again."""
    monkeypatch.setattr(beats, "BEAT", 0.2)
    monkeypatch.setattr(beats, "DEAF", TIMEOUT)
    told = Held(b"0")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer())
        url = f"{server.url}?publish_timeout={TIMEOUT}"
        broker, other = (
            stack.enter_context(closing(RedisBroker(url))) for _ in range(2)
        )
        broker.attach(told)
        broker.watch("a")
        broker.publish([("a", b"0")])
        told.await_held(b"0")
        broker.publish([("a", b"1")])
        server.command("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(Unavailable, match="maxmemory"):
            broker.publish([("a", b"x")])
        assert told.states == [False]
        server.command("CONFIG", "SET", "maxmemory", "0")
        # It waits in the listener's connection, before any beat, as "1" does.
        other.publish([("a", b"2")])
        told.let_go(b"0")
        await_true(lambda: b"2" in told.payloads)
        assert told.before[b"2"] == [False]

        def publish():
            other.publish([("a", b"3")])
            return told.states == [False, True]

        await_true(publish)


def test_local_ends_an_older_look(monkeypatch):
    """One that begins after the failure shows that it can be read again."""
    monkeypatch.setattr(local_listener, "LOOK_EVERY", 3600.0)
    told = Held(b"0", "resync")
    with tempfile.TemporaryDirectory(prefix="ss-") as folder:
        make = partial(LocalBroker, f"local:{folder}/log", publish_timeout=TIMEOUT)
        with closing(make()) as broker, closing(make()) as other:
            broker.attach(told)
            broker.watch("a")
            broker.publish([("a", b"0")])
            told.await_held(b"0")
            broker.publish([("a", b"1")])
            with sqlite3.connect(f"{folder}/log/log.db") as database:
                database.execute("DELETE FROM event")
            database.close()
            told.let_go(b"0")
            told.await_held("resync")  # by a look that found none: it is the last one
            os.rename(f"{folder}/log", f"{folder}/away")
            with open(f"{folder}/log", "w"):
                pass
            with pytest.raises(Unavailable):
                broker.read("a", None)
            assert told.states == [False]
            os.unlink(f"{folder}/log")
            os.rename(f"{folder}/away", f"{folder}/log")
            other.publish([("a", b"2")])  # whoever looks again finds it
            told.let_go("resync")
            await_true(lambda: told.states == [False, True])
            assert told.payloads == [b"0", b"2"]
            assert told.before[b"2"] == [False]
