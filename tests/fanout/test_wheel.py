"""`Wheel`: timers, rounded up to a grain."""

import math
from types import SimpleNamespace

import pytest

from syncstream.fanout import wheel as wheel_module
from syncstream.fanout.wheel import GRAIN, Wheel


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(wheel_module, "time", clock)
    return clock


class Item:
    def __init__(self):
        self.bucket = 0
        self.dues = []

    def due(self, now):
        self.dues.append(now)


def fail(item, error):
    raise error


def test_a_timer_is_due_once(clock):
    """Never before its time, and within a grain of it."""
    wheel, item = Wheel(), Item()
    assert wheel.left() == -1.0
    wheel.add(item, 1000.125)
    assert 0.125 <= wheel.left() < 0.125 + GRAIN
    clock.now = 1000.12
    wheel.run(fail)
    assert item.dues == []
    clock.now = 1000.125 + GRAIN
    assert wheel.left() == 0.0
    wheel.run(fail)
    wheel.run(fail)
    assert item.dues == [clock.now]
    assert item.bucket == 0
    assert wheel.left() == -1.0


def test_a_timer_is_due_just_then(clock):
    """At a time that is one of the wheel's own, and at the beginning of all time."""
    wheel, first, second = Wheel(), Item(), Item()
    number = 20_001
    wheel.add(first, number * GRAIN)
    assert first.bucket == number
    clock.now = number * GRAIN
    wheel.run(fail)
    assert first.dues == [clock.now]
    for when in (0.0, -5.0):
        wheel.add(second, when)
        assert second.bucket == 1
    wheel.run(fail)
    assert second.dues == [clock.now]


def test_a_later_time_takes_the_place_of_an_earlier_one(clock):
    """So does none, or one that never comes."""
    wheel, item, other = Wheel(), Item(), Item()
    wheel.add(item, 1001.0)
    wheel.add(other, 1003.0)
    wheel.add(item, 1002.0)
    assert 2.0 <= wheel.left() < 2.0 + GRAIN
    clock.now = 1001.5
    wheel.run(fail)
    assert item.dues == []
    wheel.remove(item)
    assert item.bucket == 0
    wheel.remove(item)
    assert 1.5 <= wheel.left() < 1.5 + GRAIN
    for never in (math.inf, 1e15 * GRAIN * 2):
        wheel.add(other, never)
        assert other.bucket == 0
    assert wheel.left() == -1.0
    clock.now = 2000.0
    wheel.run(fail)
    assert item.dues == other.dues == []


def test_many_of_one_time_are_all_due(clock):
    """In whatever order; those that are added meanwhile have their own times."""
    wheel, items = Wheel(), [Item() for _ in range(5)]
    again = Item()

    def due(now):
        again.dues.append(now)
        wheel.add(again, now + 1.0)
        wheel.remove(items[0])

    again.due = due
    for item in [again, *items]:
        wheel.add(item, 1000.0)
    clock.now = 1000.0 + GRAIN
    wheel.run(fail)
    assert [item.dues for item in items[1:]] == [[clock.now]] * 4
    assert again.dues == [clock.now]
    assert 1.0 <= wheel.left() < 1.0 + GRAIN


def test_one_that_raises_hinders_no_other(clock):
    """It is told of, and not due again."""
    wheel, items, failed = Wheel(), [Item() for _ in range(5)], []

    def broken(now):
        raise LookupError("broken")

    items[2].due = broken
    for item in items:
        wheel.add(item, 1000.0)
    clock.now += 1.0
    wheel.run(lambda item, error: failed.append((item, str(error))))
    assert failed == [(items[2], "broken")]
    assert [len(item.dues) for item in items] == [1, 1, 0, 1, 1]
    assert wheel.left() == -1.0
