"""What makes room in the log: capacity, size, age; whatever the clock says."""

import contextlib
import os
import sqlite3
import time

from syncstream.brokers.local import append
from tests.brokers.local.logs import kept
from tests.support.waits import TIMEOUT, await_true


def size_of(folder, suffix=""):
    return os.stat(f"{folder}/log/log.db{suffix}").st_size


def test_the_log_is_bounded(make, folder, monkeypatch):
    """By capacity: 100,000 events leave what is kept, and a small WAL."""
    monkeypatch.setattr(append, "_SEEN", 0)
    broker = make(capacity=100)
    for number in range(1000):
        broker.publish([(f"c{number % 10}", b"x" * 200)] * 100)
        assert size_of(folder, "-wal") < 32 << 20
    assert len(kept(broker, "c0")) == 100
    assert size_of(folder) < 4_000_000


def test_the_log_is_bounded_in_bytes(make, folder):
    """The oldest of all channels go; what is left of each is a chain."""
    broker = make(max_size=4 << 20)
    for number in range(3000):
        broker.publish([(f"c{number % 10}", b"x" * 10_000)])
    assert size_of(folder) < 8 << 20
    found = [len(kept(broker, f"c{n}")) for n in range(10)]
    assert 20 < min(found) <= max(found) < 60


def test_what_is_too_old_goes(make, folder):
    """In batches, not only from sight."""
    broker = make(max_age=0.2)
    broker.publish([("a", b"x" * 1000)] * 1000)
    limit = time.monotonic() + 0.3
    while time.monotonic() < limit:
        broker.publish([("b", b"x")])
    for _ in range(20):
        broker.publish([("c", b"x")] * 100)
    with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as connection:
        (left,) = connection.execute(
            "SELECT count(*) FROM event JOIN channel ON channel.id = event.channel"
            " WHERE name = 'a'"
        ).fetchone()
    assert left == 0
    assert broker.read("a", "0").entries == ()


def test_idle_channels_are_forgotten(make, monkeypatch):
    """When they are very many; heads of before are then unknown, not wrong."""
    monkeypatch.setattr(append, "MAX_CHANNELS", 1000)
    broker = make(max_age=0.1)
    empty = broker.read("never", None).head
    (old,) = broker.publish([("c0", b"x")])
    deadline = time.monotonic() + TIMEOUT
    number = 0
    while broker.read("c0", None).head == old:
        assert time.monotonic() < deadline
        broker.publish([(f"d{number + n}", b"x") for n in range(100)])
        number += 100
    assert not broker.read("never", empty).complete
    assert not broker.read("c0", old).complete
    lasting = make()  # or it might be too old before it is read
    lasting.publish([("c0", b"y")])
    page = lasting.read("c0", old)
    assert not page.complete
    assert [entry.payload for entry in page.entries] == [b"y"]


def test_a_clock_that_is_put_back_tears_no_hole(make, monkeypatch):
    """What follows an event that is kept is kept."""
    broker = make(max_age=60.0)
    now = time.time()
    ids = []
    for at in (now, now - 100, now):
        monkeypatch.setattr(time, "time", lambda at=at: at)
        ids += broker.publish([("a", b"x")])
    page = broker.read("a", "0")
    assert [entry.id for entry in page.entries] == ids
    page = broker.read("a", ids[0])
    assert not page.complete
    assert [entry.id for entry in page.entries] == ids
    page = broker.read("a", ids[1])
    assert page.complete


def test_what_a_fast_clock_has_stored_does_not_stay(make, monkeypatch):
    """It ages from when the clock was put back."""
    broker = make(max_age=60.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    broker.publish([("a", b"x")] * 10)
    monkeypatch.setattr(time, "time", lambda: now)
    broker.publish([("a", b"x")] * 100)
    assert len(kept(broker)) == 110
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert kept(broker) == []


def test_a_fast_clock_lets_no_log_grow(make, folder, monkeypatch):
    """What is beyond the capacity goes as well when nothing ages."""
    monkeypatch.setattr(append, "_SEEN", 0)
    broker = make(max_age=None, capacity=50)
    now = time.time()
    for number in range(30):
        at = now + (1e6 if number < 10 else number)
        monkeypatch.setattr(time, "time", lambda at=at: at)
        broker.publish([("a", b"x")] * 100)
    with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as connection:
        (count,) = connection.execute("SELECT count(*) FROM event").fetchone()
    assert 50 <= count <= 250
    assert len(kept(broker)) == 50


def test_idle_channels_are_forgotten_behind_busy_ones(make, monkeypatch):
    """They are looked at a part at a time; the next part comes after the last one."""
    monkeypatch.setattr(append, "MAX_CHANNELS", 1000)
    monkeypatch.setattr(append, "_CHANNELS", 100)
    broker = make(max_age=0.1)
    deadline, number = time.monotonic() + TIMEOUT, 0
    busy = [(f"busy{n}", b"x") for n in range(100)]
    broker.publish(busy)
    (old,) = broker.publish([("behind", b"x")])
    time.sleep(0.11)  # or new channels come faster here than they are looked at
    while broker.read("behind", None).head == old:
        assert time.monotonic() < deadline
        broker.publish([*busy, *((f"d{number + n}", b"x") for n in range(100))])
        number += 100


def test_what_came_just_now_is_kept_for_the_listeners(make, folder, monkeypatch):
    """Beyond the capacity, too, for two seconds: they may be slow to look."""
    broker, now = make(capacity=10), time.time()

    def count(at, number):
        monkeypatch.setattr(time, "time", lambda: at)
        broker.publish([("a", b"x")] * number)
        with contextlib.closing(sqlite3.connect(f"{folder}/log/log.db")) as connection:
            return connection.execute("SELECT count(*) FROM event").fetchone()[0]

    assert count(now, 100) == 100
    assert count(now + 1, 100) == 200
    assert count(now + 2.5, 32) == 132


def test_a_large_commit_is_moved_at_once(make, folder):
    """To where it belongs, so that the WAL need not grow."""
    broker = make()
    broker.publish([("a", b"x")])
    broker.publish([("a", b"x" * (5 << 20))])
    # The publisher has its answer before.
    await_true(lambda: os.stat(f"{folder}/log/log.db").st_size > 4 << 20)
