"""`Subscribers`: who comes, who goes, who is kicked, in this process."""

import gc
import time

import pytest

from syncstream import Closed, Hub, PayloadTooLarge, Unavailable
from syncstream.brokers.memory import MemoryBroker
from syncstream.runtime.journal import journal
from tests.support.pairs import Threads
from tests.support.waits import TIMEOUT


def test_presence_kick_and_announce(hub):
    """Who is there is shown and announced; who is kicked is told why."""
    watcher = hub.subscribe("room")
    watcher.read(0)
    ada = hub.subscribe("room", "other", who="ada", announce=True)
    assert hub.presence("room") == [None]
    ada.read(0)
    everybody = hub.subscribe("#", who="logger", announce=True)
    everybody.read(0)
    assert hub.presence("room") == [None, "ada", "logger"]
    assert hub.presence("other") == ["ada", "logger"]
    assert hub.kick(lambda subscription: subscription.who == "ada") == 1
    with pytest.raises(Closed) as caught:
        ada.read(0)
    assert caught.value.reason == "kicked"
    assert ada.is_closed
    assert hub.presence("room") == [None, "logger"]
    assert [(e.event, e.json()) for e in watcher.read(0)] == [
        ("join", {"who": "ada"}),
        ("leave", {"who": "ada"}),
    ]


@pytest.mark.parametrize("who", [object(), {1, 2}, {"user": object()}])
def test_who_must_be_encodable(hub, who):
    """An error of it is that of who subscribes, and nobody else's."""
    with pytest.raises(TypeError):
        hub.subscribe("a", who=who, announce=True)
    assert hub.subscribe("a", who=who).read(0) == []
    assert hub.stats()["subscribers"] == 0


def test_who_must_not_be_too_large():
    """It is not announced, then, but refused."""
    hub = Hub(max_payload=100)
    with pytest.raises(PayloadTooLarge):
        hub.subscribe("a", who="x" * 100, announce=True)
    hub.close()


@pytest.mark.parametrize("how", ["kick", "close", "drop"])
def test_who_is_announced_as_it_was(hub, how):
    """What becomes of it later breaks neither a kick nor a close halfway."""
    watcher = hub.subscribe("a")
    watcher.read(0)
    names = [{"name": str(number)} for number in range(3)]
    subscriptions = [hub.subscribe("a", who=who, announce=True) for who in names]
    for subscription in subscriptions:
        subscription.begin()
    names[0]["name"] = object()
    if how == "kick":
        assert hub.kick(lambda s: s.who in names) == 3
    elif how == "close":
        for subscription in subscriptions:
            subscription.close()
    else:
        del subscription
        subscriptions.clear()
        gc.collect()
        hub.presence("a")
    assert hub.presence("a") == [None]
    told = [(e.event, e.json()["who"]["name"]) for e in watcher.read(0)]
    assert told[:3] == [("join", name) for name in "012"]
    assert sorted(told[3:]) == [("leave", name) for name in "012"]


def test_a_broker_that_fails_breaks_no_kick(caplog):
    """All are ended; what could not be told is in the log."""

    class Down(MemoryBroker):
        def publish(self, items, *, connection=None):
            if error:
                raise error
            return super().publish(items, connection=connection)

        def unwatch(self, channel):
            raise Unavailable("no route")

    error = None
    hub = Hub(broker=Down())
    names = ["a", "b:*"]
    subscriptions = [hub.subscribe(*names, announce=True) for _ in range(4)]
    for subscription in subscriptions:
        subscription.begin()
    error = Unavailable("no route")
    assert hub.kick(lambda s: s in subscriptions[:2]) == 2
    error = OSError("no route")
    assert hub.kick(lambda s: True) == 2
    assert all(subscription.is_closed for subscription in subscriptions)
    assert hub.stats()["subscribers"] == 0
    journal().flush()
    said = {record.message for record in caplog.records}
    assert "a leave could not be announced in 'a', so its list may be wrong" in said
    assert "'b:*' could not be unwatched: no route" in said
    hub.close()


def test_who_is_dropped_leaves(hub):
    """A subscription that nobody closed is gone with its last reference."""
    watcher = hub.subscribe("a")
    subscription = hub.subscribe("a", "b:*", who="x", announce=True)
    subscription.read(0)
    watcher.read(0)
    del subscription
    gc.collect()
    assert hub.presence("a") == [None]
    assert hub.stats()["subscribers"] == 1
    assert [event.event for event in watcher.read(0)] == ["leave"]
    assert hub.windows.channels["a"].subscriptions == 1
    assert not hub.windows.patterns


def test_kicks_and_beginnings(hub):
    """Closed in the moment in which it begins: nothing is left of it."""

    def close():
        while not stop:
            for subscription in now:
                subscription.close()

    stop, now = [], []
    join = Threads().start(close)
    begun = closed = 0
    deadline = time.monotonic() + TIMEOUT
    try:
        while begun < 3000 or not closed:
            subscription = hub.subscribe("a", "b:*")
            now[:] = [subscription]
            try:
                subscription.read(0)
            except Closed:
                closed += 1
            subscription.close()
            begun += 1
            assert closed or time.monotonic() < deadline
    finally:
        stop.append(True)
        join()
    record = hub.windows.channels.get("a")
    assert record is None or record.subscriptions == 0
    assert not hub.windows.patterns
    assert hub.stats()["subscribers"] == 0


def test_an_end_just_after_the_beginning(hub):
    """Whoever closes it the moment that it counts as present takes back all, once."""

    class Lock:
        """The hub's lock: a subscription that has begun ends as it is released."""

        def __init__(self, lock):
            self.lock = lock

        def __enter__(self):
            self.lock.acquire()

        def __exit__(self, *error):
            self.lock.release()
            reading = subscription.reading
            if reading is not None and reading.cursors:
                hub.windows.lock = self.lock
                subscription.close()

    subscription = hub.subscribe("a", "b:*")
    hub.windows.lock = Lock(hub.windows.lock)
    with pytest.raises(Closed):
        subscription.read(0)
    assert hub.windows.channels["a"].subscriptions == 0
    assert not hub.windows.patterns
    assert hub.stats()["subscribers"] == 0


def test_a_kick_while_the_broker_is_asked(place):
    """It is not lost in what the reader does before it waits."""
    started = []

    class Slow(MemoryBroker):
        def read(self, channel, after, limit=1000):
            page = super().read(channel, after, limit)
            if after is not None:
                started.append(channel)
                place.pause(0.05)
            return page

    hub = Hub(broker=Slow())

    def read():
        with pytest.raises(Closed) as caught:
            hub.subscribe("a").read(TIMEOUT)
        return caught.value.reason

    join = place.start(read)
    place.await_true(lambda: started)
    hub.kick(lambda subscription: True)
    began = time.monotonic()
    assert join() == "kicked"
    assert time.monotonic() - began < 5
    hub.close()
