"""The contract: where URLs lead, bounds, and that the suite sees what is broken."""

import math
import os

import pytest

from syncstream.brokers import open_broker
from syncstream.brokers.log import Entry, Page
from syncstream.brokers.memory import MemoryBroker
from syncstream.testing import check_broker
from syncstream.testing.brokers import bench, stored, told


def remove(broker, channel, *ids):
    """Remove events of a `MemoryBroker`, as an operator may from a database.

    By private names: its users cannot remove single events.
    """
    log = broker._logs[channel]
    entries = log._entries[log._skip :]
    log._entries = [entry for entry in entries if entry.id not in ids]
    log._skip, log.end = 0, log.first + len(log._entries)


class Forgetful(MemoryBroker):
    """Takes unknown ids for the newest."""

    def read(self, channel, after, limit=1000):
        page = super().read(channel, after, limit)
        return Page(page.entries if page.complete else (), True, page.head)


class Chainless(MemoryBroker):
    """Says of each that it is the first."""

    def read(self, channel, after, limit=1000):
        page = super().read(channel, after, limit)
        entries = [Entry(e.id, "0", e.payload, e.time) for e in page.entries]
        return Page(entries, page.complete, page.head)


class Smooth(MemoryBroker):
    """Says that nothing is missing where something was removed."""

    def read(self, channel, after, limit=1000):
        page = super().read(channel, after, limit)
        log = self._logs.get(channel)
        is_known = (
            log is not None and after is not None and log.after(after) is not None
        )
        return Page(page.entries, page.complete or is_known, page.head)


class Mixing(MemoryBroker):
    """Knows the ids of its other channels."""

    def read(self, channel, after, limit=1000):
        page = super().read(channel, after, limit)
        logs = [log for name, log in self._logs.items() if name != channel]
        is_known = any(log.after(str(after)) is not None for log in logs)
        return Page(page.entries, page.complete or is_known, page.head)


class Silent(MemoryBroker):
    """Tells nothing."""

    def attach(self, sink):
        pass


class Greedy(MemoryBroker):
    """Keeps more than it should."""

    def __init__(self):
        super().__init__(capacity=1001)


class Generous(MemoryBroker):
    """Finds one more than was asked for."""

    def newest(self, channel, count):
        return super().newest(channel, count + 1)


class Hoarding(MemoryBroker):
    """Finds what it does not keep."""

    def newest(self, channel, count):
        before, head = super().newest(channel, count)
        return (before if count < 1000 else self._empty), head


class Scribbling(MemoryBroker):
    """Stores something of each channel that is read."""

    def read(self, channel, after, limit=1000):
        if ":" in channel and channel not in self._logs:
            self.publish([(channel, b"data: made\n\n")])
        return super().read(channel, after, limit)


class Down(MemoryBroker):
    """Says that it is down, and is not."""

    def attach(self, sink):
        super().attach(sink)
        sink.state(False, "for no reason")


class Lenient(MemoryBroker):
    """Takes what is like an id for one."""

    def read(self, channel, after, limit=1000):
        return super().read(channel, after and after.lstrip("+"), limit)


class Leaking(MemoryBroker):
    """Leaves a descriptor behind."""

    opened = ()

    def close(self, timeout=5.0):
        super().close(timeout)
        Leaking.opened += (os.open(os.devnull, os.O_RDONLY),)


def have_patience(monkeypatch, seconds):
    """Have the suite wait for so long, for what must happen."""
    for module in (bench, stored, told):
        monkeypatch.setattr(module, "LIMIT", seconds)


@pytest.mark.parametrize(
    ("broker", "sentence"),
    [
        (Generous, "id before so many events"),
        (Hoarding, "id before the kept events"),
        (Scribbling, "must not write"),
        (Down, "must be up"),
        (Lenient, "never gave"),
        (Leaking, "no descriptor"),
        (Forgetful, "complete|payloads"),
        (Chainless, "prev"),
        (Smooth, "whose next was removed"),
        (Mixing, "never gave"),
        (Silent, "told"),
        (Greedy, "trimmed|no more"),
    ],
)
def test_the_suite_sees_what_is_broken(broker, sentence, monkeypatch):
    """It is no suite if all pass."""
    if broker is Silent:  # the others are found out without a wait
        have_patience(monkeypatch, 0.3)
    if broker is Leaking:  # at the end
        have_patience(monkeypatch, 3.0)
    with pytest.raises(AssertionError, match=sentence):
        check_broker(broker, rounds=10, remove=remove)
    for descriptor in Leaking.opened:
        os.close(descriptor)
    Leaking.opened = ()


@pytest.mark.parametrize(
    "bounds", [{"max_age": math.inf}, {"capacity": 10**10}], ids=str
)
@pytest.mark.parametrize("url", ["memory:", "local:", "redis://h", "postgresql://h/d"])
def test_bounds_that_no_engine_can_count_are_refused(url, bounds):
    """Before anything is stored, or anybody is asked."""
    with pytest.raises(ValueError, match=f"{next(iter(bounds))} must be"):
        open_broker(url, **bounds)


def test_open_broker():
    """A URL names a broker, or is refused."""
    broker = open_broker("memory:", capacity=3)
    assert broker.scope == "process"
    with pytest.raises(ValueError, match="url must begin with one of memory:"):
        open_broker("carrier-pigeon://roof")


def test_nothing_is_missing_after_nothing():
    """Of a channel that nobody has written to, as of one that has events."""
    broker = MemoryBroker()
    broker.publish([("a", b"x")])
    assert broker.read("a", None).complete
    assert broker.read("never", None).complete
