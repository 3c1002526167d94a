"""``memory:``: the contract, by threads and by greenlets, and what it keeps."""

import itertools
import sys
import threading
from types import SimpleNamespace

import pytest

from syncstream import Hub, Unavailable
from syncstream.brokers import log, memory
from syncstream.brokers.contract import LONGEST_KEPT, MOST_KEPT
from syncstream.brokers.log import START
from syncstream.brokers.memory import MemoryBroker
from syncstream.testing import check_broker
from tests.brokers.test_contract import remove
from tests.support.pairs import check_script

BY_GREENLETS = """
from gevent import monkey
monkey.patch_all()
from syncstream.brokers.memory import MemoryBroker
from syncstream.testing import check_broker
check_broker(MemoryBroker, rounds=300)
check_broker(lambda: MemoryBroker(capacity=100), capacity=100, rounds=100)
check_broker(lambda: MemoryBroker(max_age=0.2), max_age=0.2)
"""


@pytest.mark.parametrize("capacity", [1000, 100])
def test_memory_keeps_the_contract_by_threads(capacity):
    """The whole suite, with much and with little room."""
    check_broker(
        lambda: MemoryBroker(capacity=capacity),
        capacity=capacity,
        rounds=1000,
        remove=remove,
    )


def test_memory_keeps_the_contract_by_age():
    """What is too old is not kept, and not taken for complete."""
    check_broker(lambda: MemoryBroker(max_age=0.2), max_age=0.2)


def test_memory_keeps_the_contract_by_greenlets():
    """The whole suite, in a process that gevent has patched."""
    pytest.importorskip("gevent")
    check_script(BY_GREENLETS)


@pytest.mark.parametrize(
    "bounds", [{"capacity": 0}, {"max_size": 0}, {"max_age": 0}, {"max_age": -1.0}]
)
def test_memory_refuses_bounds_that_keep_nothing(bounds):
    """At its construction, in a sentence."""
    with pytest.raises(ValueError, match=f"{next(iter(bounds))} must be"):
        MemoryBroker(**bounds)


@pytest.mark.parametrize(
    ("bounds", "kept"),
    [
        ({"capacity": 1}, 1),
        ({"capacity": MOST_KEPT, "max_age": LONGEST_KEPT}, 3),
        ({"max_size": 1}, 0),
        ({"max_size": 8 * 252 * 2}, 2),  # an eighth is for one channel
        ({"max_size": 8 * 252 * 2 - 1}, 1),
        ({"max_age": None}, 3),
    ],
)
def test_memory_keeps_what_its_bounds_allow(bounds, kept):
    """The least and the most that they may be, and just what an event takes."""
    broker = MemoryBroker(**bounds)
    for _ in range(3):
        broker.publish([("a", b"x")])
    entries = broker.read("a", START).entries
    assert len(entries) == kept
    assert broker.size == 252 * kept


@pytest.fixture
def clock(monkeypatch):
    """The time of the broker: ``clock.now``, in seconds."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(memory, "time", clock)
    return clock


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_newest_of_memory(count, clock):
    """Of three; of none it is the head, before and after there were some."""
    broker = MemoryBroker(max_age=8.0)
    nothing = broker.newest("a", count)
    assert nothing == (broker.read("a", None).head,) * 2
    ids = [nothing[0], *broker.publish([("a", b"x")] * 3)]
    clock.now += 8.0
    assert broker.newest("a", count) == (ids[max(0, 3 - count)], ids[3])
    clock.now += 0.5
    assert broker.newest("a", count) == (ids[3], ids[3])
    assert broker.size == 0


def test_memory_keeps_what_is_just_as_old_as_it_may_be(clock):
    """A moment later it is gone, and its head is known still."""
    broker = MemoryBroker(max_age=8.0)
    first, second = broker.publish([("a", b"1"), ("a", b"2")])
    clock.now += 8.0
    page = broker.read("a", first)
    assert ([entry.id for entry in page.entries], page.complete) == ([second], True)
    clock.now += 0.5
    pages = [broker.read("a", after) for after in (START, first, second, None)]
    assert [entry for page in pages for entry in page.entries] == []
    assert [page.complete for page in pages] == [False, False, True, True]
    assert {page.head for page in pages} == {second}
    (third,) = broker.publish([("a", b"3")])
    page = broker.read("a", second)
    assert ([entry.id for entry in page.entries], page.complete) == ([third], True)


@pytest.mark.parametrize("others", [998, 999])
def test_memory_looks_for_old_channels_now_and_then(clock, others):
    """With every thousandth event; one that is as old as it may be stays."""
    broker = MemoryBroker(max_age=8.0)
    broker.publish([("old", b"x")])
    clock.now += 0.5
    broker.publish([("kept", b"x")])
    clock.now += 8.0
    broker.publish([("new", b"x")] * (others - 1))
    assert broker.channels == {"new", "kept"} | ({"old"} if others < 999 else set())


def test_memory_keeps_nothing_of_what_is_read():
    """However many names are read, watched and left."""
    broker = MemoryBroker()
    for number in range(1000):
        name = f"unused:{number}"
        broker.watch(name)
        head = broker.read(name, None).head
        assert broker.read(name, head).complete
        assert broker.newest(name, 5) == (head, head)
        broker.unwatch(name)
    assert not broker.channels
    assert not broker.watched
    broker.close()


def test_memory_is_bounded():
    """100,000 events leave no more than what is kept, in count and in bytes."""
    broker = MemoryBroker(capacity=100, max_size=1_000_000)
    for number in range(1000):
        broker.publish([(f"c{number % 200}", b"x" * 100)] * 100)
    kept = sum(len(broker.read(f"c{n}", "0").entries) * (100 + 350) for n in range(200))
    assert kept < 1_200_000
    broker.close()


@pytest.mark.parametrize(
    ("heads", "names"),
    [(0, ["never", "was:1"]), (10_000, ["never", "was:1", "was:*", "#"])],
)
def test_what_is_forgotten_is_no_reset(monkeypatch, heads, names):
    """Whoever has the newest of what is too old has missed nothing."""
    monkeypatch.setattr("syncstream.brokers.memory._SWEEP", 1)
    monkeypatch.setattr("syncstream.brokers.memory._HEADS", heads)
    hub = Hub(max_age=60)
    head = hub.head("never")
    subscriptions = [hub.subscribe(name) for name in names]
    for subscription in subscriptions:
        subscription.read(0)
    ids = hub.publish_many("was:1", ["1", "2"])
    for subscription in subscriptions[1:]:
        assert len(subscription.read(0)) == 2
    for entry in hub.broker.read("was:1", START).entries:
        entry.time -= 61
    hub.publish("other", "x")
    assert hub.broker.channels == {"other"}
    resumed = [hub.subscribe("was:1", after=id).read(0) for id in ids]
    assert [[event.event for event in found] for found in resumed] == [["reset"], []]
    hub.publish("never", "3")
    hub.publish("was:1", "3")
    for subscription in subscriptions:
        found = [event.event or event.data for event in subscription.read(0)]
        assert "reset" not in found
        assert found[-1] == "3"
    assert [e.data for e in hub.subscribe("never", after=head).read(0)] == ["3"]
    assert [e.data for e in hub.subscribe("was:1", after=ids[1]).read(0)] == ["3"]
    hub.close()


def test_memory_gives_no_channel_all_of_it():
    """A noisy channel leaves the others theirs; what is quiet for longest goes."""
    broker = MemoryBroker(capacity=10_000, max_size=1_000_000)
    broker.watch("heard")
    ids = {
        name: broker.publish([(name, b"x" * 100)] * 10) for name in ("quiet", "heard")
    }
    broker.publish([("noisy", b"x" * 1000)] * 1000)
    assert broker.size <= 1_000_000 / 8 + 10_000
    assert len(broker.read("quiet", "0").entries) == 10
    for number in range(20):
        broker.publish([(f"c{number}", b"x" * 1000)] * 1000)
    assert 800_000 < broker.size <= 1_000_000
    kept = [broker.read(name, START, 10_000).entries for name in broker.channels]
    assert broker.size == sum(entry.size for entries in kept for entry in entries)
    for name in ids:
        assert not broker.read(name, "0").entries
        assert not broker.read(name, ids[name][-2]).complete
        # Who has the newest has missed nothing, and goes on from there.
        assert broker.read(name, ids[name][-1]).complete
    broker.close()


def test_memory_counts_what_reads_trim():
    """What a read finds too old makes room again."""
    broker = MemoryBroker(max_age=0.05)
    broker.publish([("a", b"x" * 1000)] * 10)
    assert broker.size > 10_000
    deadline = threading.Event()
    while broker.read("a", "0").entries:
        deadline.wait(0.01)
    assert broker.size == 0


class Interrupting:
    """Makes a call between two lines of the broker, as a finalizer may.

    Args:
        place: The number of lines, calls and returns before the call.
        call: The call.
    """

    def __init__(self, place, call):
        self.left, self.call = place, call
        self.results = []

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def trace(self, frame, *_):
        if frame.f_code.co_filename not in FILES:
            return None
        self.left -= 1
        if self.left == 0:
            sys.settrace(None)
            self.results.append(self.call())
        return self.trace


FILES = {memory.__file__, log.__file__}


class Told:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.entries = []

    def deliver(self, channel, entry):
        self.entries.append(entry)
        len(self.entries)  # it may be interrupted, too


def interrupted(name, call):
    """Interrupt a publish or a read at each of its lines in turn.

    Yields:
        The broker, the entries that its sink was told, what the call has returned.
    """
    for place in itertools.count(1):
        broker, told = MemoryBroker(capacity=2, max_age=8.0), Told()
        broker.watch("a")
        broker.attach(told)
        broker.publish([("a", b"1"), ("b", b"1"), ("a", b"2")])
        if name == "read":  # something is to be dropped
            for entry in broker.read("a", START).entries:
                entry.time -= 9.0
        with Interrupting(place, lambda broker=broker: call(broker)) as interrupting:
            if name == "publish":
                broker.publish([("a", b"3"), ("a", b"4")])
            else:
                broker.read("a", START)
        if not interrupting.results:
            assert place > 30
            return
        yield broker, told.entries, interrupting.results[0]


@pytest.mark.parametrize("name", ["publish", "read"])
def test_memory_stores_what_a_finalizer_publishes_in_order(name, monkeypatch):
    """Whenever it runs; the ids, the sum of sizes and what is told are right."""
    monkeypatch.setattr("syncstream.brokers.memory._SWEEP", 4)
    immediate = 0
    items = [("a", b"of a finalizer"), ("new", b"of a finalizer")]
    for broker, told, ids in interrupted(name, lambda broker: broker.publish(items)):
        assert {entry.payload for entry in told} >= {b"1", b"2", b"of a finalizer"}
        assert len(told) == (5 if name == "publish" else 3)
        for one, following in itertools.pairwise(told):
            assert following.prev == one.id
            assert number_of(following) > number_of(one)
        kept = broker.read("a", START).entries
        assert kept == told[-len(kept) :]
        (new,) = broker.read("new", START).entries
        assert broker.size == sum(
            entry.size
            for name in broker.channels
            for entry in broker.read(name, START).entries
        )
        immediate += ids[1] == new.id
        assert ids == [None, None] or ids[1] == new.id
    assert immediate  # before the change, and after it


def number_of(entry):
    return int(entry.id.partition("-")[0], 16)


@pytest.mark.parametrize("name", ["publish", "read"])
def test_memory_is_read_by_a_finalizer_as_a_whole(name):
    """Or, in the middle of a change, not at all."""

    def look(broker):
        try:
            return broker.read("a", START), broker.newest("a", 1)
        except Unavailable:
            return None

    found = []
    for _, told, pages in interrupted(name, look):
        found.append(pages)
        if pages is None:
            continue
        page, (_, head) = pages
        assert page.head == head
        if page.entries:
            first = told.index(page.entries[0])
            assert page.entries == told[first : first + len(page.entries)]
            assert page.entries[-1].id == head
    assert None in found
    assert any(found)


@pytest.mark.parametrize("name", ["publish", "read"])
def test_memory_is_closed_by_a_finalizer(name):
    """It is empty then."""
    for broker, _, _ in interrupted(name, MemoryBroker.close):
        assert broker.size == 0 or broker.read("a", START).entries
        broker.close()
        assert (broker.size, broker.channels) == (0, set())


def test_memory_forgets_idle_channels(monkeypatch):
    """Of channels without events some heads are kept, and those of who listens."""
    monkeypatch.setattr("syncstream.brokers.memory._HEADS", 1)
    broker = MemoryBroker(max_age=0.01)
    broker.watch("heard")
    broker.publish([("heard", b"x"), ("idle", b"x")])
    head = broker.read("heard", None).head
    threading.Event().wait(0.05)
    broker.publish([("busy", b"x")] * 1000)
    assert not broker.channels & {"idle", "heard"}
    assert broker.read("idle", None).head.startswith("0-")
    assert broker.read("heard", None).head == head


IN_DJANGO = """
import django
from django.conf import settings
from django.db import connection, transaction

settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
)
django.setup()

from syncstream import Hub

hub = Hub()
subscription = hub.subscribe("orders")

def order(number, refuse=False):
    with transaction.atomic():
        assert hub.publish("orders", number, connection=connection) is None
        if refuse:
            raise ZeroDivisionError

def refused(number):
    try:
        order(number, refuse=True)
    except ZeroDivisionError:
        pass

def told():
    return [event.json() for event in subscription.read(0)]

assert told() == []
order(1)
refused(2)
assert told() == [1]
with transaction.atomic():
    ids = hub.publish_many("orders", [3, 4], connection=connection)
    assert ids == [None, None]
    refused(5)
    order(6)
    hub.publish("orders", 0)  # no connection: at once
    assert told() == [0]
assert told() == [3, 4, 6]
assert hub.publish("orders", 7, connection=connection) is None  # no transaction
assert told() == [7]
assert len(hub.broker.read("orders", "0").entries) == 6
hub.close()
connection.close()
"""


def test_memory_follows_the_transactions_of_django():
    """As PostgreSQL would: told at the commit, and never after a rollback."""
    check_script(IN_DJANGO)


BY_ANOTHER_CONNECTION = """
import logging, sqlite3, sys
from contextlib import closing

from syncstream.brokers.memory import MemoryBroker
from syncstream.runtime.journal import journal

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
broker = MemoryBroker()
with closing(sqlite3.connect(":memory:")) as connection:
    for _ in range(2):
        items = [("a", b"1"), ("a", b"2")]
        assert broker.publish(items, connection=connection) == [None, None]
        connection.rollback()
journal().flush()
assert len(broker.read("a", "0").entries) == 4
"""


def test_memory_says_that_it_cannot_follow_other_transactions():
    """Once; it publishes at once, and returns no ids, as in a transaction."""
    (line,) = check_script(BY_ANOTHER_CONNECTION).splitlines()
    assert line.startswith("WARNING memory: cannot see the commit of a connection")


class Async:
    """A connection as psycopg's `AsyncConnection` is."""

    def cursor(self):
        return self

    async def commit(self):
        pass


@pytest.mark.parametrize(
    "connection", ["sqlite://", object(), Async()], ids=["text", "object", "async"]
)
def test_memory_refuses_what_is_no_connection(connection):
    """What no broker takes; nothing is stored."""
    broker = MemoryBroker()
    with pytest.raises(TypeError, match="connection must"):
        broker.publish([("a", b"x")], connection=connection)
    assert len(broker.read("a", "0").entries) == 0


FORKED = """
import json, os
from syncstream import Hub
hub = Hub()
read, publish = hub.broker.read, hub.broker.publish
before = [hub.head("empty"), hub.publish("a", "0"), hub.publish("a", "1")]
reading, writing = os.pipe()
if not os.fork():
    heads = [read(name, None).head for name in ("empty", "a")]
    assert not {*heads} & {*before}
    assert not read("empty", before[0]).complete
    assert not any(read("a", id).complete for id in before[1:])
    found = hub.subscribe("a", after="start").read(0)
    assert [event.data for event in found] == ["0", "1"]
    os.write(writing, hub.publish("a", "2").encode())
    os._exit(0)
assert os.wait()[1] == 0
assert not read("a", os.read(reading, 100).decode()).complete
assert read("a", before[1]).complete
hub.close()
"""


def test_a_fork_is_another_life():
    """Siblings that share what was before do not know each other's ids."""
    check_script(FORKED)


FORKED_WHILE_PUBLISHING = """
import os, threading
from syncstream.brokers.memory import MemoryBroker
broker, is_told, may_go = MemoryBroker(), threading.Event(), threading.Event()

class Waits:
    def deliver(self, channel, entry):
        is_told.set()
        may_go.wait()

before, = broker.publish([("a", b"0")])
broker.attach(Waits())
broker.watch("a")
thread = threading.Thread(target=broker.publish, args=([("a", b"1")],))
thread.start()
is_told.wait()
pid = os.fork()
if not pid:
    may_go.set()
    assert not broker.read("a", before).complete
    broker.publish([("a", b"2")])
    assert [e.payload for e in broker.read("a", "0").entries] == [b"2"]
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
may_go.set()
thread.join()
"""


def test_a_fork_while_another_thread_publishes():
    """The child, which has not that thread, does not wait for its lock."""
    check_script(FORKED_WHILE_PUBLISHING)


def test_a_reader_takes_nothing_from_others():
    """What is above the bound goes when something is published, not when it is read.

    The bound is lowered by its private name: no user can have more than it allows.
    """
    broker = MemoryBroker(max_size=100_000)
    for name in ("quiet", "noisy", "noisy", "noisy"):
        broker.publish([(name, b"x" * 1000)] * 3)
    ids = [entry.id for entry in broker.read("noisy", START).entries]
    broker._max_size = 1000
    for _ in range(2):
        assert [entry.id for entry in broker.read("noisy", START).entries] == ids
    assert len(broker.read("quiet", START).entries) == 3


def test_a_noisy_channel_leaves_the_others_theirs():
    """It has an eighth at most, so that quiet ones keep what they have."""
    broker = MemoryBroker(max_size=100_000)
    ids = broker.publish([("quiet", b"x")] * 50)
    for _ in range(1000):
        broker.publish([("noisy", b"x" * 1000)])
    page = broker.read("quiet", ids[0])
    assert page.complete
    assert len(page.entries) == 49
    assert len(broker.read("noisy", START).entries) == 12_500 // 2258
