"""The soak of the brokers finds what it looks for; and a few seconds of it."""

import random

import pytest

import broker_soak
from broker_soak import Fault, Published, Seen, judge


def published():
    """Five events of a channel, one after the other, and one that was not stored."""
    events = [
        Published("c", str(n), n, n + 0.5, f"{n:x}-0000000{n}", "stored")
        for n in range(1, 6)
    ]
    return [*events, Published("c", "no", 6, 6.5, None, "Unavailable")]


def verdict(*data, faults=()):
    record = [
        Seen(10 + at, f"{text}-0", text, text == "reset")
        for at, text in enumerate(data)
    ]
    return judge(published(), {"client": ("c", record)}, faults)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ("1 2 4", "hole"),
        ("1 2 2", "double"),
        ("1 3 2", "disorder"),
        ("1 2 no", "not stored, but delivered"),
        ("1 2 other", "unknown"),
    ],
)
def test_a_broken_promise_is_seen(data, kind):
    """Each kind is counted, and told with the client, the channel and the event."""
    found = verdict(*data.split())
    assert found.counts[kind] >= 1
    assert any(line.startswith(f"{kind}: client client") for line in found.broken)


@pytest.mark.parametrize("data", ["1 2 3 4 5", "3 4", "1 reset 3 4 5", "1 2 reset 1 2"])
def test_a_promise_that_was_kept(data):
    """Nothing is said of what came in order, or after a reset."""
    assert verdict(*data.split()).broken == []


@pytest.mark.parametrize(("loses", "count"), [(False, 1), (True, 0)])
def test_a_reset_that_was_not_needed(loses, count):
    """One is needed if a fault has lost something."""
    faults = [Fault("it", loses, 9, 11)]
    assert verdict("1", "reset", faults=faults).counts["false resets"] == count


def test_a_few_seconds():
    """A real run over `local:`, of two workers: all is delivered."""
    options = {"clients": 6, "rate": 30, "workers": broker_soak.WORKERS[1:3]}
    assert broker_soak.soak("local", 2, random.Random(1), **options)
