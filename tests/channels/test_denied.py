"""A name that the engine refuses: its subscribers end, nobody else; said once."""

import logging
import threading

import pytest

from syncstream import Closed, Denied, Hub
from syncstream.brokers.memory import MemoryBroker
from syncstream.channels import control
from syncstream.channels.control import CONTROL, Kick
from syncstream.runtime.journal import journal
from tests.support.pairs import Threads
from tests.support.waits import await_true

PLACE = Threads()


class Refusing(MemoryBroker):
    """One whose engine refuses names.

    Attributes:
        watches, reads: Those that it refuses to tell of, and to read.
        asked: Names that it refused, each time.
    """

    def __init__(self):
        super().__init__()
        self.watches, self.reads = set(), set()
        self.asked = []
        self.scope = "process"

    def watch(self, channel):
        self._check(channel, self.watches)
        super().watch(channel)

    def read(self, channel, after, limit=1000):
        self._check(channel, self.reads)
        return super().read(channel, after, limit)

    def _check(self, channel, refused):
        if channel in refused:
            self.asked.append(channel)
            raise Denied(f"no permission for {channel}")


@pytest.fixture
def broker():
    return Refusing()


@pytest.fixture
def hub(broker):
    hub = Hub(broker=broker)
    yield hub
    hub.close()


def begun(hub, *channels, **options):
    subscription = hub.subscribe(*(channels or ("a",)), **options)
    assert subscription.read(0) == []
    return subscription


def assert_denied(subscription, timeout=0):
    for _ in range(2):
        with pytest.raises(Closed) as caught:
            subscription.read(timeout)
        assert caught.value.reason == "denied"


def said(caplog, name="'a'"):
    """Return the lines about a name that is refused, by now."""

    def lines():
        texts = [(record, record.getMessage()) for record in caplog.records]
        return [r for r, text in texts if f"denies access to {name}," in text]

    await_true(lines)
    journal().flush()
    return lines()


@pytest.mark.parametrize("names", [("a",), ("b", "a"), ("a", "x:*")], ids="+".join)
@pytest.mark.parametrize("what", ["watches", "reads"])
def test_who_comes_is_denied(hub, broker, names, what, caplog):
    """At once, as a whole, and is not there; the others are; it is logged once."""
    other = begun(hub, "b")
    getattr(broker, what).add("a")
    for _ in range(3):
        assert_denied(hub.subscribe(*names, who="ann"), timeout=None)
    assert broker.asked == ["a"] * 3
    assert hub.presence("a") == []
    assert hub.presence("b") == [None]
    hub.publish("b", "1")
    assert [event.data for event in other.read(5)] == ["1"]
    (line,) = said(caplog)
    assert line.levelno == logging.ERROR
    assert "no permission for a" in line.getMessage()


def test_a_pattern_is_denied(hub, broker, caplog):
    """It is a name like others."""
    broker.watches.add("x:*")
    assert_denied(hub.subscribe("x:*", "a"))
    begun(hub, "x:1")
    assert len(said(caplog, "'x:*'")) == 1


@pytest.mark.parametrize("names", [("a",), ("b", "a"), ("a", "x:*")], ids="+".join)
def test_the_listener_is_refused(hub, names, caplog):
    """Those who wait end, by that name alone, whichever else they have."""
    denied = [begun(hub, *names, who="ann") for _ in range(2)]
    others = begun(hub, "b"), begun(hub, "*"), begun(hub, "aa")
    ends = []

    def wait():
        try:
            denied[0].read(15)
        except Closed as closed:
            ends.append(closed.reason)

    waiting = threading.Thread(target=wait)
    waiting.start()
    await_true(lambda: hub.windows.channels["a"].waiters)
    for _ in range(2):
        hub.sink.deny("a", "NOPERM")
    waiting.join(15)
    assert ends == ["denied"]
    assert_denied(denied[1])
    assert [other.read(0) for other in others] == [[], [], []]
    assert hub.presence("a") == [None]
    assert len(said(caplog)) == 1


def test_who_has_begun_is_denied_by_a_read(hub, broker, caplog):
    """All who subscribe to that name: those who read a window are, too."""
    reader, other = begun(hub), begun(hub, "b")
    broker.reads.add("a")
    hub.sink.resync(None)
    assert_denied(reader, timeout=None)
    assert other.read(0) == []
    assert broker.asked == ["a"]
    assert len(said(caplog)) == 1


def test_a_channel_of_a_pattern_is_refused(hub, broker):
    """Who has the pattern could not be told what it misses: it ends."""
    pattern, other = begun(hub, "x:*"), begun(hub, "y:*")
    named = begun(hub, "x:1")
    broker.reads.add("x:1")
    hub.publish("x:1", "lost")
    hub.sink.resync(["x:1"])
    assert_denied(pattern)
    assert_denied(named)
    hub.publish("y:1", "1")
    assert [event.data for event in other.read(5)] == ["1"]


def test_what_is_allowed_again_is_told(hub, broker):
    """Who comes after that has the broker asked, although it was watched before."""
    begun(hub)
    hub.sink.deny("a", "NOPERM")
    broker.unwatch("a")
    subscription = begun(hub)
    hub.publish("a", "1")
    assert [event.data for event in subscription.read(5)] == ["1"]


def test_what_is_only_asked_is_raised(hub, broker):
    """Who asks for a head has no stream that could end."""
    broker.reads.add("a")
    with pytest.raises(Denied, match="no permission"):
        hub.head("a")


@pytest.fixture
def shared(broker):
    """Return a hub that has, as far as it can tell, other processes."""
    broker.scope = "machine"
    hub = Hub(broker=broker)
    yield hub
    hub.close()


def await_kicked(subscription):
    await_true(lambda: subscription.is_closed)
    assert subscription.reason == "kicked"


@pytest.mark.parametrize("what", ["watches", "reads"])
def test_kicks_that_are_refused(shared, broker, what, caplog):
    """Nobody ends; it is said once, and to whoever kicks, whose own are ended."""
    getattr(broker, what).add(CONTROL)
    ann, bob = begun(shared, who="ann"), begun(shared, tags=["x"])
    shared.publish("a", "1")
    for subscription in (ann, bob):
        assert [event.data for event in subscription.read(5)] == ["1"]
    with pytest.raises(Denied, match=r"ended in this process: 1.*cannot be received"):
        shared.kick(who="ann")
    assert ann.is_closed
    assert not bob.is_closed
    text = "kicks of other processes are not received"
    await_true(lambda: text in caplog.text)
    shared.close()
    journal().flush()
    assert caplog.text.count(text) == 1


@pytest.mark.parametrize("by", ["time", "newcomer", "kick"])
@pytest.mark.parametrize("what", ["watches", "reads"])
def test_kicks_that_are_allowed_again(shared, broker, what, by, monkeypatch, caplog):
    """Who was there unheard may have been kicked, and is: once."""
    monkeypatch.setattr(control, "ASK_AGAIN", 0.05 if by == "time" else 60)
    getattr(broker, what).add(CONTROL)
    ann, nobody = begun(shared, who="ann"), begun(shared)
    getattr(broker, what).clear()
    if by == "newcomer":
        begun(shared, who="bob")
    elif by == "kick":
        assert shared.kick(who="bob") == 0
    await_kicked(ann)
    await_true(lambda: "kicks are received again" in caplog.text)
    newcomers = begun(shared, who="ann"), begun(shared, who="bob")
    assert shared.kick(who="bob") == 1
    assert not newcomers[0].is_closed
    assert not nobody.is_closed
    broker.publish([(CONTROL, Kick('"ann"', None).encoded("another"))])
    await_kicked(newcomers[0])


@pytest.mark.parametrize("by", ["time", "newcomer"])
def test_kicks_that_were_refused_for_a_while(shared, broker, by, monkeypatch):
    """They are read on from the place of before: it ends whom it names."""
    monkeypatch.setattr(control, "ASK_AGAIN", 0.05 if by == "time" else 60)
    ann, bob = begun(shared, who="ann"), begun(shared, who="bob")
    await_true(lambda: not shared.subscribers.control.is_reading)
    broker.watches.add(CONTROL)
    broker.unwatch(CONTROL)
    shared.sink.deny(CONTROL, "NOPERM")
    broker.publish([(CONTROL, Kick('"ann"', None).encoded("another"))])
    broker.watches.clear()
    if by == "newcomer":
        begun(shared, who="carl")
    await_kicked(ann)
    assert not bob.is_closed
