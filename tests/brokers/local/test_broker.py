"""``local:``: the contract, between processes too, and its bounds."""

import contextlib
import fcntl
import itertools
import os
import random
import sqlite3
import sys
import time
from pathlib import Path

import pytest

from syncstream import Hub
from syncstream.brokers.local import LocalBroker
from syncstream.errors import PayloadTooLarge, Unavailable
from syncstream.runtime.waiting import LONGEST
from syncstream.testing import check_broker
from tests.brokers.local.logs import kept
from tests.brokers.processes import Node, Spread
from tests.brokers.sinks import Told
from tests.support.descriptors import open_files
from tests.support.pairs import check_script, come_and_go
from tests.support.waits import TIMEOUT, await_true

FORMATS = Path(__file__).parents[1] / "formats"


CONTRACT = """
import itertools, sys
from gevent import monkey
monkey.patch_all()
from tests.brokers.processes import Node, Spread
from syncstream.brokers.local import LocalBroker
from syncstream.testing import check_broker
folder, count, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
nodes = [Node("gevent") for _ in range(count)]
names = itertools.count()
def make(**options):
    return lambda: Spread(f"local:{folder}/{next(names)}", nodes, **options)
check_broker(make(), rounds=rounds)
check_broker(make(capacity=100), capacity=100, rounds=rounds // 2)
check_broker(make(max_age=0.5), max_age=0.5)
for node in nodes:
    node.close()
"""


@pytest.mark.parametrize("count", [1, 4], ids=["1-process", "4-processes"])
def test_it_keeps_the_contract_by_threads(folder, count):
    """The whole suite, with much and with little room, and by age."""
    nodes = [Node() for _ in range(count - 1)]
    names = itertools.count()

    def make(**options):
        return lambda: Spread(f"local:{folder}/{next(names)}", nodes, **options)

    def remove(broker, channel, id):
        path = f"{broker.url.partition(':')[2]}/log.db"
        number = int(id.partition("-")[0], 16)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute(f"DELETE FROM event WHERE number = {number}")
            connection.commit()

    rounds = 300 if count == 1 else 100  # another process's publish takes longer
    check_broker(make(), rounds=rounds, remove=remove)
    check_broker(make(capacity=100), capacity=100, rounds=rounds // 2)
    check_broker(make(max_age=0.5), max_age=0.5)
    for node in nodes:
        node.close()


@pytest.mark.parametrize("count", [1, 4], ids=["1-process", "4-processes"])
def test_it_keeps_the_contract_by_greenlets(folder, count):
    """The same in processes that gevent has patched."""
    pytest.importorskip("gevent")
    check_script(CONTRACT, folder, str(count - 1), "100")


def test_nothing_is_left_behind(make, folder):
    """A broker that was closed leaves no descriptor and no socket, and one file."""
    before = open_files() if sys.platform == "linux" else None
    broker = make()
    hub = Hub(broker=broker)
    subscription = hub.subscribe("a")
    subscription.read(0)
    hub.publish("a", "x")
    assert [event.data for event in subscription.read(TIMEOUT)] == ["x"]
    hub.close()
    assert os.listdir(f"{folder}/log/wake") == []
    assert sorted(os.listdir(f"{folder}/log")) == ["lock", "log.db", "wake"]
    if before:
        assert open_files() - before == {}


def test_nothing_is_opened_before_it_is_used(make, folder):
    """A hub in a module costs nothing: gunicorn may preload it, and fork."""
    Hub(broker=make()).close()
    assert os.listdir(folder) == []


def test_after_close(make):
    """A closed broker says so, and makes nothing anew."""
    broker = make()
    broker.publish([("a", b"x")])
    broker.close()
    with pytest.raises(Unavailable, match="closed"):
        broker.publish([("a", b"x")])
    with pytest.raises(Unavailable, match="closed"):
        broker.read("a", None)
    broker.watch("a")
    broker.close()


def test_ids_survive_a_restart(make):
    """What was kept is there for the next process, with its ids."""
    first = make()
    ids = first.publish([("a", b"1"), ("a", b"2")])
    empty = first.read("b", None).head
    first.close()
    second = make()
    assert [entry.id for entry in second.read("a", ids[0]).entries] == ids[1:]
    assert second.read("b", empty).complete
    (third,) = second.publish([("a", b"3")])
    page = second.read("a", ids[1])
    assert page.complete
    assert [entry.id for entry in page.entries] == [third]


@pytest.mark.parametrize("value", [0, -1.0])
def test_publish_timeout_is_checked(value):
    with pytest.raises(ValueError, match="publish_timeout must be above 0"):
        LocalBroker("local:", publish_timeout=value)


@pytest.mark.parametrize("value", [0, -1, 3, None, 4096.0, float("inf"), "1 MB"])
def test_max_size_is_checked(value):
    with pytest.raises(ValueError, match="max_size must be 4 bytes or more"):
        LocalBroker("local:", max_size=value)


def test_it_has_no_transactions(make):
    with pytest.raises(ValueError, match="connection must be None"):
        make().publish([("a", b"x")], connection=object())


def test_what_is_too_large_is_refused(make):
    """And what does not encode; nothing is stored."""
    broker = make(max_size=4000)
    with pytest.raises(PayloadTooLarge, match="1000 bytes at most"):
        broker.publish([("a", b"x"), ("a", b"x" * 1001)])
    with pytest.raises(UnicodeEncodeError):
        broker.publish([("a", b"x"), ("\ud800", b"x")])
    assert kept(broker) == []


class OldWorker:
    """What a worker of the first format does to a log: its lock, its statements."""

    def __init__(self, path):
        self._lock = os.open(f"{path}/lock", os.O_RDWR | os.O_CREAT, 0o644)
        self._log = sqlite3.connect(f"{path}/log.db", isolation_level=None)

    def make(self):
        self._log.executescript((FORMATS / "local_1.sql").read_text())

    def publish(self, name, payload):
        execute = self._log.execute
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        execute("BEGIN IMMEDIATE")
        (empty,) = execute("SELECT empty FROM life").fetchone()
        found = "SELECT id, last, nonce FROM channel WHERE name = ?"
        if (row := execute(found, (name,)).fetchone()) is None:
            execute("INSERT INTO channel(name, last, nonce) VALUES (?, 0, 0)", (name,))
            channel, number, prev = execute(found, (name,)).fetchone()[0], 0, empty
        else:
            channel, number, prev = row
        nonce = random.getrandbits(32)
        execute(
            "INSERT INTO event(channel, number, nonce, prev, time, payload)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (channel, number + 1, nonce, prev, int(time.time() * 1000), payload),
        )
        execute(
            "UPDATE channel SET last = ?, nonce = ? WHERE id = ?",
            (number + 1, nonce, channel),
        )
        execute("COMMIT")
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        return f"{number + 1:x}-{nonce:08x}"

    def read(self, name):
        rows = self._log.execute(
            "SELECT number, event.nonce, payload, prev FROM event"
            " JOIN channel ON channel.id = channel WHERE name = ? ORDER BY number",
            (name,),
        )
        return [(f"{row[0]:x}-{row[1]:08x}", *row[2:]) for row in rows]

    def close(self):
        self._log.close()
        os.close(self._lock)


def test_old_and_new_workers_share_a_log(folder, make):
    """A log that an old one has made, and both write: one chain, each told of all."""
    path = f"{folder}/log"
    os.mkdir(path, 0o700)
    with contextlib.closing(OldWorker(path)) as old:
        old.make()
        ids = [old.publish("a", b"0")]
        broker, told = make(), Told()
        broker.attach(told)
        broker.watch("a")
        for number in range(1, 20, 2):
            ids += broker.publish([("a", b"%d" % number)])
            ids.append(old.publish("a", b"%d" % (number + 1)))
        payloads = [b"%d" % number for number in range(21)]
        await_true(lambda: told.payloads == payloads[1:], lambda: told.payloads)
        assert told.resyncs == []
        page = broker.read("a", ids[3])
        assert page.complete
        assert [entry.id for entry in page.entries] == ids[4:]
        rows = old.read("a")
        assert [row[:2] for row in rows] == [*zip(ids, payloads, strict=True)]
        assert [row[2] for row in rows][1:] == [int(id[-8:], 16) for id in ids[:-1]]
        # What only old ones have written is found by who comes back to nothing.
        head = broker.read("b", None).head
        first = old.publish("b", b"x")
        assert [entry.id for entry in broker.read("b", head).entries] == [first]
        assert broker.read("b", head).complete


def test_who_comes_and_goes_evicts_nothing(make):
    """Each process tells of those of the others; events are kept."""
    here, there = (Hub(broker=make(capacity=3)) for _ in range(2))
    with contextlib.closing(here), contextlib.closing(there):
        come_and_go(here, there)


def test_each_operation_judges(make, folder):
    """Publishing and reading, too: said once, and once again when it is mended."""
    broker, told = make(), Told()
    broker.attach(told)
    with open(f"{folder}/log", "w"):
        pass
    for _ in range(2):
        with pytest.raises(Unavailable):
            broker.publish([("a", b"x")])
        with pytest.raises(Unavailable):
            broker.watch("a")
    assert told.states == [False]
    with pytest.raises(Unavailable):
        broker.read("a", None)
    os.unlink(f"{folder}/log")
    broker.publish([("a", b"x")])
    assert told.states == [False]
    broker.read("a", None)
    broker.watch("a")
    await_true(lambda: told.states == [False, True])


@pytest.mark.parametrize(
    ("given", "timeout"),
    [(None, None), (0.5, 0.5), (LONGEST, LONGEST), (1e300, LONGEST)],
)
def test_a_publish_timeout_overflows_nothing(given, timeout):
    """Of seconds, up to the longest that a system call takes."""
    assert LocalBroker("local:", publish_timeout=given).timeout == timeout


def test_what_is_just_not_too_large_is_stored(make):
    """A quarter of ``max_size``, and of the least one a byte."""
    for size in (1000, 1):
        broker = make(f"log{size}", max_size=4 * size + 3)
        broker.publish([("a", b"x" * size)])
        with pytest.raises(
            PayloadTooLarge, match=f"{size} bytes at most.*got {size + 1}"
        ):
            broker.publish([("a", b"x" * (size + 1))])


def test_a_broker_of_no_use_any_more_watches_nothing(make):
    """Closed, it is asked in vain, without an error: its hub may be ending."""
    broker = make()
    broker.close()
    broker.watch("a")
    assert broker.process is None
    broker.unwatch("a")
    assert not broker.watched
