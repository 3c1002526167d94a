"""`Reading`: several channels take turns, conflated or whole."""

import contextlib

import pytest
from werkzeug.test import EnvironBuilder

from syncstream import Gap, Hub, SSEResponse, Unavailable
from syncstream.brokers.log import JOIN, Page
from syncstream.brokers.memory import MemoryBroker
from tests.channels.readers import data, read_all, resume


def test_conflating_does_not_wait_for_a_busy_channel_to_rest(hub):
    """What comes while keys are asked for is for the next read."""

    def key(event):
        hub.publish_many("a", ["x", "y"])  # faster than they are read
        return event.data

    subscription = hub.subscribe("a", conflate=key)
    subscription.read(0)
    hub.publish("a", "x")
    for _ in range(5):
        assert 1 <= len(subscription.read(0)) <= 3


@pytest.mark.parametrize("channels", [("a",), ("a", "b"), ("b", "a"), ("a", "#")])
def test_a_key_that_raises_loses_nothing(hub, channels):
    """The next read gives what this one had taken."""

    def key(event):
        if event.data == "bad" and is_bad:
            raise ZeroDivisionError
        return event.data

    subscription = hub.subscribe(*channels, conflate=key)
    subscription.read(0)
    hub.publish("b", "0")
    for text in ("1", "bad", "2"):
        hub.publish("a", text)
    is_bad = True
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            subscription.read(0)
    is_bad = False
    expected = ["1", "2", "bad"] if channels == ("a",) else ["0", "1", "2", "bad"]
    assert sorted(data(read_all(subscription))) == expected


class Partial(MemoryBroker):
    """A broker that may not answer about one channel."""

    is_down = False

    def read(self, channel, after, limit=1000):
        if self.is_down and channel == "b":
            raise Unavailable("no route")
        return super().read(channel, after, limit)


@pytest.mark.parametrize("options", [{}, {"conflate": str}])
@pytest.mark.parametrize("channels", [("a", "b"), ("b", "a"), ("b", "#")])
def test_a_broker_that_is_away_holds_up_no_window(channels, options):
    """What is there is given out, then there is nothing, and nothing is lost."""
    hub = Hub(broker=Partial())
    subscription = hub.subscribe(*channels, **options)
    subscription.read(0)
    hub.sink.resync(["b"])
    hub.broker.is_down = True
    hub.publish("a", "0")
    found = []
    for _ in range(6):
        found += data(subscription.read(0))
    assert found == ["0"]
    hub.publish("b", "1")
    hub.broker.is_down = False
    assert data(read_all(subscription)) == ["1"]
    hub.close()


@pytest.mark.parametrize("channels", [("a",), ("a", "b")])
def test_conflate(hub, channels):
    """Of each key the newest; cut anywhere, each key's newest is got in the end."""
    options = {"conflate": lambda event: event.json()["k"]}
    subscription = hub.subscribe(*channels, **options)
    subscription.read(0)
    for number in range(30):
        hub.publish(channels[number % len(channels)], {"k": number % 3, "n": number})
    found = subscription.read(0)
    keyed = {}
    for number in range(30):
        keyed[number % len(channels), number % 3] = number
    assert sorted(event.json()["n"] for event in found) == sorted(keyed.values())
    for place, event in enumerate(found):
        got = found[: place + 1] + resume(hub, event.id, *channels, **options)
        assert {e.json()["n"] for e in got} == set(keyed.values())


class Unbounded(MemoryBroker):
    """A broker whose pages are as long as they may be; it counts what it reads."""

    read_bytes = 0

    def read(self, channel, after, limit=1000):
        page = super().read(channel, after, limit)
        entries = list(page.entries)
        while entries and len(entries) < limit:
            more = super().read(channel, entries[-1].id, limit - len(entries)).entries
            if not more:
                break
            entries += more
        self.read_bytes += sum(len(entry.payload) for entry in entries)
        return Page(entries, page.complete, page.head)


@pytest.mark.parametrize("channels", [("a",), ("a", "b")])
@pytest.mark.parametrize("make", [MemoryBroker, Unbounded])
def test_what_is_taken_at_once_is_bounded_in_bytes(make, channels):
    """A reader that is behind by much holds little of it, and gets all of it."""
    hub = Hub(broker=make(capacity=1000))
    for name in channels:
        hub.publish_many(name, [str(n) + "x" * 20_000 for n in range(300)])
    environ = EnvironBuilder().get_environ()
    response = SSEResponse(hub.subscribe(*channels, after="start"))
    sizes, found = [], b""
    with contextlib.closing(response(environ, lambda *rest: None)) as body:
        for chunk in body:
            sizes.append(len(chunk))
            found += chunk
            if found.count(b"data:") == 300 * len(channels):
                break
    assert max(sizes) < len(channels) * JOIN + 21_000
    assert len(sizes) < 60 * len(channels)
    if make is Unbounded:  # it is asked for less once it is known
        assert hub.broker.read_bytes < 3 * len(found) + 500 * 20_000
    subscription = hub.subscribe(*channels, after="start")
    while events := subscription.read(0):
        assert sum(len(event.data) for event in events) < 2 * JOIN + 21_000
    hub.close()


@pytest.mark.parametrize("is_pattern", [False, True])
def test_a_busy_channel_holds_up_no_other(hub, is_pattern):
    """However much there is of one, the others get their turns."""
    names = ["c:busy", "c:1", "c:2"]
    given = ["c:busy", "c:*"] if is_pattern else names
    subscription = hub.subscribe(*given)
    subscription.read(0)
    for name in names[1:]:
        hub.publish_many(name, [name, name])
    found = []
    for _ in range(6):
        hub.publish("c:busy", "x" * JOIN)
        hub.publish("c:busy", "x" * JOIN)
        found += data(subscription.read(0))
    assert {"c:1", "c:2"} < set(found)
    assert found.count("c:1") == 2


def test_several_channels_resume_anywhere(hub):
    """One id for all: cut anywhere, in the midst of one read too."""
    expected = []
    for number in range(60):
        channel = "abc"[number * 7 % 3]
        hub.publish(channel, f"{channel}{number}")
        expected.append(f"{channel}{number}")
    subscription = hub.subscribe("a", "b", "c", after="start")
    found = read_all(subscription)
    assert sorted(data(found)) == sorted(expected)
    for place, event in enumerate(found):
        rest = resume(hub, event.id, "c", "a", "b")
        assert not any(isinstance(e, Gap) for e in rest)
        got = data(found[: place + 1]) + data(rest)
        for channel in "abc":
            mine = [d for d in expected if d[0] == channel]
            assert [d for d in got if d[0] == channel] == mine


def test_much_that_is_for_others_is_passed(hub):
    """What is for others never stands in the way of what is not."""
    hub.publish_many("a", ["x"] * 700, only=["others"])
    hub.publish("a", "mine")
    assert data(hub.subscribe("a", after="start").read(0)) == ["mine"]
