"""Channels: nothing lost, nothing twice, in order; or a reset, which says so."""

import contextlib
import gc
import json
import logging
import random
import re
import sys
import time
import weakref
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from werkzeug.test import EnvironBuilder

from syncstream import (
    Closed,
    Denied,
    Event,
    Gap,
    Hub,
    PayloadTooLarge,
    SSEResponse,
    Unavailable,
)
from syncstream.brokers.log import JOIN, START, Entry, Page
from syncstream.brokers.memory import MemoryBroker
from syncstream.channels import limits
from syncstream.channels.cursor import Cursor
from syncstream.channels.ids import MAX_ID, composite, parts_of
from syncstream.channels.patterns import Patterns
from syncstream.channels.presence import PRESENCE
from syncstream.protocol import sse
from syncstream.runtime.journal import journal
from syncstream.runtime.waiter import Waiter, wake_all
from syncstream.testing.brokers.stored import HOSTILE
from tests.support.pairs import (
    Browser,
    Greenlets,
    Threads,
    check_script,
    serve,
    stream_of,
)
from tests.support.pairs import Line as PairsLine
from tests.support.removable import Removable, untold
from tests.support.waits import TIMEOUT


class Line(PairsLine):
    """A client's connection, with the id it has come back with."""

    def __init__(self, last_event_id=None, is_multiprocess=False):
        super().__init__()
        self.last_event_id = last_event_id
        self.is_multiprocess = is_multiprocess


class Resumed:
    """A subscription, read in a stream that came with a Last-Event-ID."""

    def __init__(self, subscription, last_event_id):
        self.subscription = subscription
        self.found = []

        def source():
            while events := subscription.read(0):
                self.found += events
                yield None

        serve(stream_of(source(), Line(last_event_id)))


def resume(hub, id, *channels, **options):
    """Return what a client gets that comes back with an id."""
    return Resumed(hub.subscribe(*(channels or ("a",)), **options), id).found


def data(events):
    return [event.data for event in events]


def read_all(subscription):
    found = []
    while events := subscription.read(0):
        found += events
    return found


@pytest.fixture(params=["threads", "gevent"])
def place(request):
    if request.param == "threads":
        return Threads()
    pytest.importorskip("gevent")
    return Greenlets()


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


def in_place(place, function):
    """Run a test's function where it is to run: its waits are of that kind."""
    return place.start(function)()


# Publish, subscribe, resume.


def test_publish_and_subscribe(hub):
    """What is published after the first read is got, with its id."""
    subscription = hub.subscribe("a")
    hub.publish("a", "before")
    assert subscription.read(0) == []
    ids = [
        hub.publish("a", "text", event="greeting", retry=5),
        hub.publish("a", {"n": [1]}),
        hub.publish("a", Event("x\ny", event="e")),
        hub.publish("a", ""),
    ]
    events = subscription.read()
    assert [event.id for event in events] == ids
    assert data(events) == ["text", '{"n":[1]}', "x\ny", ""]
    assert (events[0].event, events[0].retry) == ("greeting", 5)
    assert events[1].json() == {"n": [1]}
    assert hub.publish_many("a", []) == []
    many = hub.publish_many("a", ["1", Event("2"), 3])
    assert [event.id for event in subscription.read()] == many
    assert hub.head("a") == many[-1]
    assert subscription.read(0) == []
    subscription.close()


def test_it_waits(hub, place):
    """A reader is woken by what comes, as a list, or one by one."""

    def read():
        subscription = hub.subscribe("a")
        return [next(subscription).data, *data(subscription.read())]

    join = place.start(read)
    place.await_true(lambda: hub.stats()["subscribers"] == 1)
    hub.publish("a", "1")
    place.pause(0.01)
    hub.publish("a", "2")
    assert join() == ["1", "2"]


def test_read_times_out(hub, place):
    """With nothing there it returns nothing, after its time, and leaves nothing."""

    def read():
        subscription = hub.subscribe("a", "b")
        times = []
        for _ in range(20):
            began = time.monotonic()
            assert subscription.read(0.01) == []
            times.append(time.monotonic() - began)
        record = hub.windows.channels["a"]
        assert len(record.waiters) <= 1
        subscription.close()
        assert not record.waiters
        return times

    times = in_place(place, read)
    assert sum(times) >= 0.2
    assert min(times) < 0.1  # a busy machine may be late, but not each time


def test_resume_at_each_position(hub):
    """After any id the later ones follow, and no other."""
    ids = hub.publish_many("a", map(str, range(600)))
    first = hub.subscribe("a", after="start")
    assert data(read_all(first)) == [*map(str, range(600))]
    for place in (*range(0, 600, 7), 599):
        assert data(resume(hub, ids[place])) == [*map(str, range(place + 1, 600))]
    assert resume(hub, ids[-1]) == []
    first.close()


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("now", []),
        ("start", ["0", "1", "2", "3"]),
        (1, ["3"]),
        (3, ["1", "2", "3"]),
        (100, ["0", "1", "2", "3"]),
    ],
)
def test_after(hub, after, expected):
    """A first connection begins where it is told to."""
    hub.publish_many("a", map(str, range(4)))
    assert data(hub.subscribe("a", after=after).read(0)) == expected
    assert hub.subscribe("nothing", after=after).read(0) == []


def test_after_an_id(hub):
    """It may be `head`, of an empty channel too, or a composite one."""
    heads = hub.head("a"), hub.head("b")
    assert all(re.fullmatch("0-[0-9a-f]{8}", head) for head in heads)
    hub.publish("a", "1")
    assert data(hub.subscribe("a", after=heads[0]).read(0)) == ["1"]
    both = hub.subscribe("a", "b", after="start")
    (event,) = both.read(0)
    hub.publish("b", "2")
    assert data(hub.subscribe("a", "b", after=event.id).read(0)) == ["2"]
    (reset,) = hub.subscribe("b", after="nonsense", on_gap="live").read(0)
    assert reset.event == "reset"


class Busy(MemoryBroker):
    """A broker whose channel is written to between any two reads, and is full."""

    newest = None  # it is searched for them

    def __init__(self, more, **options):
        super().__init__(**options)
        self.more = more

    def read(self, channel, after, limit=1000):
        page = super().read(channel, after, limit)
        numbers, self.more = self.more[:1], self.more[1:]
        for count in numbers:
            self.publish([(channel, b"data: new\n\n")] * count)
        return page


@pytest.mark.parametrize("channels", [("a",), ("a", "b")])
@pytest.mark.parametrize(
    ("after", "more", "first"),
    [
        ("start", [2, 0], "2"),
        ("start", [2, 3], "2"),
        ("start", [10, 0], "new"),
        (7, [4, 0], "4"),
        (7, [2, 2, 1], "3"),
        (10, [9, 0, 1], "9"),
    ],
)
def test_a_busy_channel_begins_without_a_reset(channels, after, more, first):
    """What it drops while a first connection begins is older than that."""
    hub = Hub(broker=Busy([], capacity=10))
    hub.publish_many("a", map(str, range(10)))
    hub.broker.more = more
    subscription = hub.subscribe(*channels, after=after)
    found = read_all(subscription)
    assert not any(isinstance(event, Gap) for event in found)
    assert found[0].data == first
    assert data(found) == [
        *(str(n) for n in range(10) if first != "new" and n >= int(first)),
        *["new"] * (sum(more) - sum(hub.broker.more)),
    ]
    if len(channels) == 1:
        assert resume(hub, found[-1].id, *channels) == []
    hub.close()


@pytest.mark.parametrize("after", ["start", 3])
def test_a_busy_channel_that_drops_what_is_newer_says_so(after, monkeypatch):
    """It came after the first connection began, and is lost to it: a reset."""
    monkeypatch.setattr(limits, "WINDOW", 4)
    hub = Hub(broker=Busy([], capacity=10))
    hub.publish_many("a", map(str, range(10)))
    hub.broker.more = [15]
    reset, *found = read_all(hub.subscribe("a", after=after))
    assert reset.json() == {"channel": "a", "reason": "lagged"}
    assert len(found) == 10
    hub.close()


def test_a_busy_channel_ends_no_search(hub):
    """The newest are those of the beginning, however fast more come."""
    hub.publish_many("a", map(str, range(900)))
    hub.broker.__class__ = Busy
    hub.broker.more = [600] * 100
    subscription = hub.subscribe("a", after=5)
    subscription.begin()
    assert len(hub.broker.more) > 95
    subscription.close()


def test_the_newest_are_asked_for(hub):
    """Of a broker that can tell, nothing is read; what it raises is told."""
    ids = hub.publish_many("a", map(str, range(900)))
    reads = []
    read = hub.broker.read
    hub.broker.read = lambda *args: reads.append(args) or read(*args)
    subscription = hub.subscribe("a", after=2)
    subscription.begin()
    assert not reads
    assert data(subscription.read(0)) == ["898", "899"]
    assert data(hub.subscribe("a", after=10**30).read(0)) == [*map(str, range(500))]
    assert hub.broker.newest("a", 2) == (ids[-3], ids[-1])

    def refuse(channel, count):
        raise Denied("not allowed")

    hub.broker.newest = refuse
    with pytest.raises(Closed, match="denied"):
        hub.subscribe("a", after=2).read(0)


@pytest.mark.parametrize("is_known", [False, True], ids=["broken ids", "whole"])
def test_a_search_for_the_newest_ends(is_known):
    """Of a broker that knows its own ids, or not."""

    class Searched(MemoryBroker):
        newest = None

        def read(self, channel, after, limit=1000):
            assert len(reads) < 10
            reads.append(after)
            return super().read(channel, after if is_known else "0", limit)

    reads = []
    hub = Hub(broker=Searched())
    hub.publish_many("a", map(str, range(900)))
    subscription = hub.subscribe("a", after=2)
    subscription.begin()
    assert len(reads) <= 3
    if is_known:
        assert data(subscription.read(0)) == ["898", "899"]
    hub.close()


def test_last_event_id_counts_more_than_after(hub):
    """`after` is for first connections."""
    ids = hub.publish_many("a", "123")
    assert data(resume(hub, ids[1], after="start")) == ["3"]


@pytest.mark.parametrize("channels", [("a",), ("a", "b")])
def test_an_empty_last_event_id_is_a_first_connection(hub, channels):
    """It begins where `after` says, and nothing is reset."""
    hub.publish_many("a", "123")
    assert data(resume(hub, "", *channels, after=1)) == ["3"]


# Resets.


@pytest.mark.parametrize("name", ["a", "b"])
def test_last_event_id_is_the_first_ones(hub, name):
    """A generator's second subscription begins where `after` says."""
    first = hub.publish("a", "0")
    hub.publish_many("a", ["1", "2"])
    hub.publish_many("b", ["3", "4"])
    found = []

    def source():
        for options in ({}, {"after": 1}, {"after": hub.head(name)}, {}):
            with contextlib.closing(hub.subscribe(name, **options)) as subscription:
                if not found:
                    subscription = hub.subscribe("a")
                found.append(data(subscription.read(0)))
        yield None

    serve(stream_of(source(), Line(first)))
    assert found == [["1", "2"], ["2" if name == "a" else "4"], [], []]


@pytest.mark.parametrize("way", ["frames", "step"])
def test_what_was_read_before_is_in_the_response(hub, way):
    """Who has taken the first event gives the others to a client."""
    hub.publish_many("a", "123")
    subscription = hub.subscribe("a", after="start")
    assert next(subscription).data == "1"
    if way == "step":
        chunk, count, _ = subscription.step()
    else:
        frames = subscription.frames(True, json.dumps, None)
        chunk, count = next(frames), frames.events
    assert data(sse.Decoder().feed(chunk)) == ["2", "3"]
    assert count == 2
    hub.publish("a", "4")
    assert data(subscription.read(0)) == ["4"]


def test_a_beginning_that_fails_keeps_the_id():
    """Whoever tries again after the broker was down goes on where the client was."""

    class Down(MemoryBroker):
        def watch(self, channel):
            if is_down:
                raise Unavailable("no route")
            super().watch(channel)

    hub = Hub(broker=Down())
    first = hub.publish("a", "0")
    hub.publish("a", "1")
    found = []
    is_down = True

    def source():
        nonlocal is_down
        subscription = hub.subscribe("a")
        assert subscription.read(0) == []
        is_down = False
        found.extend(subscription.read(0))
        yield None

    serve(stream_of(source(), Line(first)))
    assert data(found) == ["1"]
    hub.close()


def cut_anywhere(hub, found, expected, **options):
    """Cut a client off after each of these events; it must come to the same end."""
    for place, event in enumerate(found):
        got = data(found[: place + 1])
        again = resume(hub, event.id, **options)
        rest = [e.data for e in again if not isinstance(e, Gap)]
        got = [d for d in got if d in expected]
        assert got + rest == expected, place


PRESENTED = tuple(id for id in HOSTILE if id)  # an empty one is no id


@pytest.mark.parametrize("id", [*PRESENTED, "1", "ffffffff-00000000"])
def test_unknown_ids_are_a_reset(hub, id):
    """Whatever a client presents: a reset and all there is; cut there, none is lost."""
    hub.publish_many("a", "123")
    reset, *found = resume(hub, id)
    assert isinstance(reset, Gap)
    assert (reset.event, reset.json()) == (
        "reset",
        {"channel": "a", "reason": "unknown"},
    )
    assert data(found) == ["1", "2", "3"]
    cut_anywhere(hub, [reset, *found], ["1", "2", "3"])


@pytest.mark.parametrize("id", [*PRESENTED, "a" * 8, ",,,", "a.b,c.d", "." * 9999])
def test_unknown_ids_of_several_are_resets(hub, id):
    """Each channel of which nothing is known has its own."""
    hub.publish_many("a", "12")
    hub.publish_many("b", "3")
    found = resume(hub, id, "a", "b")
    assert data(e for e in found if not isinstance(e, Gap)) == ["1", "2", "3"]
    assert [e.json()["channel"] for e in found if isinstance(e, Gap)] == ["a", "b"]


def test_a_trimmed_id_is_a_reset():
    """All that is kept follows, and the reset's id is the one before it."""
    with_room = Hub(capacity=5)
    ids = with_room.publish_many("a", map(str, range(10)))
    reset, *found = resume(with_room, ids[3])
    assert reset.id == ids[4]
    assert data(found) == ["5", "6", "7", "8", "9"]
    assert data(resume(with_room, ids[4])) == ["5", "6", "7", "8", "9"]
    cut_anywhere(with_room, [reset, *found], ["5", "6", "7", "8", "9"])
    with_room.close()


def test_a_gap_of_an_empty_channel(hub):
    """There is nothing, and the reset's id says so: the next event is got once."""
    (reset,) = resume(hub, "1-aaaaaaaa")
    hub.publish("a", "1")
    assert data(resume(hub, reset.id)) == ["1"]


def test_an_earlier_life_is_foreign():
    """Ids of a hub that is gone are not taken for this one's."""
    old, new = Hub(), Hub()
    ids = old.publish_many("a", "12")
    new.publish_many("a", "123")
    for id in ids:
        reset, *found = resume(new, id)
        assert isinstance(reset, Gap)
        assert data(found) == ["1", "2", "3"]


def test_on_gap_live(hub):
    """Only what comes from now on; cut at the reset, nothing of that is lost."""
    hub.publish_many("a", "123")
    subscription = hub.subscribe("a", on_gap="live", after="f-f")
    (reset,) = subscription.read(0)
    hub.publish("a", "4")
    assert data(subscription.read(0)) == ["4"]
    assert data(resume(hub, reset.id)) == ["4"]


@pytest.mark.parametrize("channels", [("a",), ("a", "b"), ("b", "a")])
def test_on_gap_callable(hub, channels):
    """A snapshot, then what came since it was made; cut in it, it is made again."""
    hub.publish_many("a", "12")

    def snapshot():
        hub.publish("a", "meanwhile")
        return ["so far", Event({"more": 1}, event="state")]

    options = {"on_gap": lambda: snapshot(), "after": "f-f"}
    if len(channels) == 2:
        empty = hub.subscribe(*channels, after="start")
        composite = empty.read(0)[-1].id
        parts = composite.split(",")
        parts[channels.index("a")] = parts[channels.index("a")].split(".")[0] + ".f-f"
        options["after"] = ",".join(parts)
    subscription = hub.subscribe(*channels, **options)
    found = read_all(subscription)
    assert isinstance(found[0], Gap)
    assert data(found[1:]) == ["so far", '{"more":1}', "meanwhile"]
    assert all(type(event.data) is str for event in found)
    assert [event.event for event in found] == ["reset", None, "state", None]
    # After the last of it: what has come since. Before: all of it.
    assert data(resume(hub, found[2].id, *channels)) == ["meanwhile"]
    last = found[0].id if found[1].id is None else found[1].id
    again = resume(hub, last, *channels, on_gap=lambda: ["anew"])
    assert data(again[1:]) == ["anew"]


@pytest.mark.parametrize("event", [Event("x", id="1"), Event(event="x")])
def test_a_snapshot_has_no_ids(hub, event):
    """They are the broker's; and an event without data never arrives."""
    with pytest.raises(ValueError, match="on_gap must return events with"):
        hub.subscribe("a", after="f-f", on_gap=lambda: [event]).read(0)


# Slow readers.


def lagging(hub, count=20, **options):
    """Return a subscription that has fallen behind what is kept."""
    subscription = hub.subscribe("a", **options)
    subscription.read(0)
    hub.publish_many("a", map(str, range(count)))
    return subscription


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(limits, "WINDOW", 4)
    hub = Hub(capacity=5)
    yield hub
    hub.close()


def test_a_lag_is_told(small):
    """It is told, and goes on with what is kept."""
    subscription = lagging(small)
    reset, *found = subscription.read(0)
    assert reset.json() == {"channel": "a", "reason": "lagged"}
    assert data(found) == ["15", "16", "17", "18", "19"]
    assert data(resume(small, reset.id)) == data(found)


@pytest.mark.parametrize(("on_gap", "expected"), [("live", []), (list, []), (0, ["s"])])
def test_a_lag_is_a_gap_as_others(small, on_gap, expected):
    """What `on_gap` says follows it: the page does the same at each reset."""
    subscription = lagging(small, on_gap=on_gap or (lambda: ["s"]))
    reset, *found = read_all(subscription)
    assert reset.json()["reason"] == "lagged"
    assert data(found) == expected
    small.publish("a", "new")
    assert data(subscription.read(0)) == ["new"]
    assert data(resume(small, (found or [reset])[-1].id)) == ["new"]


def test_within_what_is_kept_nothing_is_lost(small):
    """Behind the window, the broker is asked."""
    assert data(read_all(lagging(small, 5))) == ["0", "1", "2", "3", "4"]


def test_a_lag_before_the_first_event_is_a_lag(small):
    """Who began now and was too slow from the beginning is told so."""
    subscription = small.subscribe("a")
    subscription.begin()
    small.publish_many("a", map(str, range(50)))
    assert subscription.read(0)[0].json()["reason"] == "lagged"


def test_a_lag_behind_a_patterns_channel_is_a_lag(small):
    """What it had no time to begin with was for it all the same."""
    subscription = small.subscribe("c:*")
    subscription.read(0)
    small.publish_many("c:1", map(str, range(20)))
    reset, *found = read_all(subscription)
    assert reset.json() == {"channel": "c:1", "reason": "lagged"}
    assert data(found) == ["15", "16", "17", "18", "19"]


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


def test_a_snapshot_that_raises_loses_nothing(hub):
    """The reset comes with the next read, and what was read beside it."""

    def snapshot():
        if is_bad:
            raise ZeroDivisionError
        return ["snapshot"]

    subscription = hub.subscribe("a", "c:*", on_gap=snapshot)
    subscription.read(0)
    hub.publish("a", "0")
    hub.publish("c:1", "1")
    hub.sink.resync(["c:2"])
    is_bad = True
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            subscription.read(0)
    is_bad = False
    reset, snap, *rest = read_all(subscription)
    assert isinstance(reset, Gap)
    assert snap.data == "snapshot"
    assert sorted(data(rest)) == ["0", "1"]


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


def test_throttle(hub, place):
    """Deliveries have their distance, and nothing is lost by it."""

    def read():
        subscription = hub.subscribe("a", throttle=0.1)
        subscription.read(0)
        hub.publish("a", "1")
        began = time.monotonic()
        found = [data(subscription.read(TIMEOUT))]
        hub.publish_many("a", "23")
        early = subscription.read(0)
        found.append(data(early or subscription.read(TIMEOUT)))
        assert time.monotonic() - began >= 0.1
        subscription.close()
        return found

    assert in_place(place, read) == [["1"], ["2", "3"]]


def test_a_slow_reader_takes_no_memory(hub):
    """It is a position; what is kept for it is what is kept for all."""
    gc.collect()
    before = sum(isinstance(found, Entry) for found in gc.get_objects())
    subscription = hub.subscribe("a")
    subscription.read(0)
    for _ in range(100):
        hub.publish_many("a", ["x" * 100] * 100)
    stats = hub.stats()
    assert stats["entries"] <= limits.WINDOW
    gc.collect()
    kept = sum(isinstance(found, Entry) for found in gc.get_objects())
    assert kept - before <= 1000  # the broker's


# Several channels, and patterns.


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


def test_head_of_several(hub):
    """One id for all of them, and what follows follows it; in any order."""
    ids = [hub.publish_many(name, "12")[-1] for name in "ab"]
    head = hub.head("a", "b", "empty", "a")
    assert all(id in head for id in ids)
    hub.publish("b", "3")
    hub.publish("empty", "4")
    hub.publish("a", "5")
    for names in (("a", "b", "empty"), ("empty", "b", "a")):
        assert sorted(data(hub.subscribe(*names, after=head).read(0))) == [*"345"]
        assert sorted(data(resume(hub, head, *names))) == [*"345"]
    for names in ((), ("a", "b:*")):
        with pytest.raises(ValueError, match="channel"):
            hub.head(*names)


def test_a_channel_that_is_new_to_an_id_is_a_reset(hub):
    """Of the others nothing is lost, nothing is twice."""
    hub.publish("a", "1")
    (event,) = hub.subscribe("a", "b", after="start").read(0)
    hub.publish("b", "2")
    hub.publish("c", "3")
    found = resume(hub, event.id, "a", "b", "c")
    assert data(e for e in found if not isinstance(e, Gap)) == ["2", "3"]
    assert [e.json()["channel"] for e in found if isinstance(e, Gap)] == ["c"]


def test_names_whose_short_hashes_are_one(hub):
    """An id tells apart two that 32 bits do not."""
    channels = "user:73177", "user:148412"
    subscription = hub.subscribe(*channels)
    subscription.read(0)
    for name in channels:
        hub.publish_many(name, ["0", "1"])
    first, *_ = subscription.read(0)
    assert sorted(data(resume(hub, first.id, *channels))) == ["0", "1", "1"]


def test_a_list_of_channels_that_changes(hub):
    """Those that are in both go on; what is new begins with a reset."""
    subscription = hub.subscribe("a", "b")
    subscription.read(0)
    for name in "ab":
        hub.publish_many(name, [f"{name}0", f"{name}1"])
    last = subscription.read(0)[-1].id
    for name in "abc":
        hub.publish(name, f"{name}2")
    assert data(resume(hub, last, "a")) == ["a2"]
    assert data(resume(hub, last, "b")) == ["b2"]
    assert data(resume(hub, last, "b", "a")) == ["b2", "a2"]
    found = resume(hub, last, "b", "c")
    assert [e.event or e.data for e in found] == ["b2", "reset", "c2"]
    assert isinstance(resume(hub, last, "c")[0], Gap)
    one = hub.publish("a", "a3")
    assert [e.event for e in resume(hub, one, "a", "b")].count("reset") == 2


@pytest.mark.parametrize(
    ("pattern", "heard"),
    [
        ("chat:*", ["chat:1"]),
        ("chat:#", ["chat", "chat:1", "chat:1:2"]),
        ("*", ["chat"]),
        ("#", ["chat", "chat:1", "chat:1:2", "logs:x"]),
    ],
)
def test_patterns(hub, pattern, heard):
    """By them come the channels that match, of which somebody has heard or not."""
    names = ["chat", "chat:1", "chat:1:2", "logs:x"]
    by_name = [hub.subscribe(name) for name in names[:2]]
    for subscription in by_name:
        subscription.read(0)
    hub.publish("chat:1", "before")
    subscription = hub.subscribe(pattern)
    assert subscription.read(0) == []
    for _ in range(2):
        for name in names:
            hub.publish(name, name)
        assert sorted(data(read_all(subscription))) == heard
    later = hub.subscribe(pattern, "other")
    assert later.read(0) == []
    hub.publish(heard[0], "last")
    assert data(subscription.read(0)) == data(later.read(0)) == ["last"]
    for one in (*by_name, subscription, later):
        one.close()
    assert not hub.windows.patterns
    assert not hub.windows.listeners
    assert not hub.broker.watched.patterns


def test_a_pattern_wakes(hub, place):
    """A channel that nobody has heard of wakes who waits for it."""

    def read():
        return data(hub.subscribe("chat:*").read())

    join = place.start(read)
    place.await_true(lambda: hub.stats()["subscribers"] == 1)
    place.pause(0.02)
    hub.publish("chat:1", "x")
    assert join() == ["x"]


def test_who_comes_back_to_a_pattern_is_told(hub):
    """No broker knows which channels there were meanwhile: a reset says so."""
    subscription = hub.subscribe("chat:*", "b")
    subscription.read(0)
    hub.publish("b", "0")
    hub.publish("chat:1", "1")
    last = read_all(subscription)[-1]
    hub.publish("chat:2", "2")
    hub.publish("b", "3")
    reset, *found = resume(hub, last.id, "chat:*", "b")
    assert reset.json() == {"channel": "chat:*", "reason": "unknown"}
    assert data(found) == ["3"]
    only = hub.subscribe("chat:*")
    only.read(0)
    hub.publish("chat:1", "4")
    (event,) = only.read(0)
    assert event.id
    (reset, *_) = resume(hub, event.id, "chat:*", on_gap=lambda: ["state"])
    assert isinstance(reset, Gap)


def test_a_broker_that_lost_word_is_a_reset_for_patterns(hub):
    """Channels may have come of which it never heard."""
    subscription = hub.subscribe("chat:*")
    subscription.read(0)
    hub.sink.resync(["other"])
    assert subscription.read(0) == []
    hub.sink.resync(["chat:7"])
    hub.sink.resync(None)
    (reset,) = subscription.read(0)
    assert reset.json() == {"channel": "chat:*", "reason": "unknown"}


def calls_of(function):
    """Return how many calls a function makes."""
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def test_a_pattern_costs_what_is_new(hub):
    """Neither an event nor a wait costs more for the channels that were seen."""
    subscription = hub.subscribe("#", "c:1")
    subscription.read(0)

    def once():
        hub.publish("c:1", "x")
        hub.publish("c:2", "x")
        assert len(subscription.read(0)) == 2
        subscription.read(0.0001)

    costs = []
    for count in (10, 1000):
        hub.publish_many("c:1", ["x"])
        for number in range(count):
            hub.publish(f"c:{number}", "x")
        read_all(subscription)
        costs.append(min(calls_of(once) for _ in range(3)))
    assert costs[1] < 2 * costs[0]  # a wait may take a turn more


def test_a_pattern_forgets_idle_channels(hub, monkeypatch):
    """Of what is over it keeps nothing; what comes later is got, once."""
    monkeypatch.setattr(limits, "IDLE", 0.0)
    gc.collect()
    before = sum(isinstance(found, Cursor) for found in gc.get_objects())
    subscription = hub.subscribe("job:*")
    subscription.read(0)
    for number in range(1000):
        hub.publish(f"job:{number}", "x")
        assert data(subscription.read(0)) == ["x"]
    gc.collect()
    kept = sum(isinstance(found, Cursor) for found in gc.get_objects())
    assert kept - before < 200
    hub.publish_many("job:0", ["y", "z"])
    assert data(read_all(subscription)) == ["y", "z"]


def test_who_does_not_read_notes_each_channel_once(hub):
    """Whoever comes and goes beside it, and whatever comes."""
    slow = hub.subscribe("c:*")
    slow.read(0)
    for _ in range(20):
        other = hub.subscribe("c:*")
        other.read(0)
        for number in range(10):
            hub.publish(f"c:{number}", "x")
        other.close()
    assert len(read_all(slow)) == 200


def test_a_channel_that_a_pattern_has_brought_has_one_turn(hub):
    """However often it has something new, and whoever waits is woken once."""
    patterns = Patterns(("c:*",))
    woken = [patterns.discover(f"c:{n}", "0") for _ in range(20) for n in range(10)]
    assert woken.count(True) == 1
    turns = patterns.turns(hub.windows)
    assert [cursor.name for cursor in turns] == [f"c:{n}" for n in range(10)]


def test_a_channel_that_may_have_lost_word_is_read(hub):
    """Of a channel that a pattern has brought, all; of others, a reset tells."""
    subscription = hub.subscribe("c:*")
    subscription.read(0)
    hub.publish("c:1", "0")
    subscription.read(0)
    late = hub.subscribe("c:*")
    late.read(0)
    with untold(hub):
        hub.publish("c:1", "untold")
    hub.sink.resync(["c:1"])
    assert data(subscription.read(0)) == ["untold"]
    (reset,) = late.read(0)
    assert reset.json() == {"channel": "c:*", "reason": "unknown"}


def test_a_pattern_outlives_a_window(hub, monkeypatch):
    """A window that nobody wants by its name is forgotten; its next event is got."""
    monkeypatch.setattr(limits, "IDLE", 0.0)
    subscription = hub.subscribe("chat:*")
    subscription.read(0)
    for number in range(5):
        hub.publish("chat:1", str(number))
        hub.publish(f"chat:x{number}", "x")
        assert sorted(data(read_all(subscription))) == [str(number), "x"]
    assert hub.stats()["channels"] < 5


@pytest.mark.parametrize("after", ["id", 1, "start"])
def test_a_pattern_that_went_leaves_no_stale_window(hub, after):
    """What came after a pattern's end is not withheld from who comes back."""
    pattern = hub.subscribe("user:*")
    pattern.read(0)
    seen = hub.publish("user:7", "one")
    assert data(pattern.read(0)) == ["one"]
    pattern.close()
    hub.publish("user:7", "two")
    subscription = hub.subscribe("user:7", after=seen if after == "id" else after)
    assert data(read_all(subscription))[-1:] == ["two"]
    hub.publish("user:7", "three")
    assert data(read_all(subscription)) == ["three"]


def test_a_window_between_two_patterns(hub):
    """A second pattern goes on with what is new, and a name with all."""
    first = hub.subscribe("user:*")
    first.read(0)
    seen = hub.publish("user:7", "one")
    first.close()
    hub.publish("user:7", "two")
    second = hub.subscribe("user:#")
    assert second.read(0) == []
    named = hub.subscribe("user:7", after=seen)
    assert data(read_all(named)) == ["two"]
    hub.publish("user:7", "three")
    assert data(read_all(second)) == ["three"]
    assert data(read_all(named)) == ["three"]


def test_a_long_id_is_not_read_to_its_end():
    """What a client may make up costs nothing, however long it is."""
    id = composite(["a"], ["1-0"])
    channels = "a", "b"
    assert parts_of(f"{id},{'x' * MAX_ID}", channels) == {"a": "1-0"}
    assert parts_of(f"{'x' * MAX_ID},{id}", channels) == {}


# Who gets it.


def test_tags(hub):
    """`only` and `exclude` select; a resume selects likewise."""
    plain = hub.subscribe("a", after="start")
    admin = hub.subscribe("a", after="start", tags=["admin", "7"])
    hub.publish("a", "all")
    hub.publish("a", "admins", only=["admin", "root"])
    hub.publish("a", "not 7", exclude=["7"])
    hub.publish("a", "neither", only=["admin"], exclude=["7"])
    ids = [event.id for event in plain.read(0)]
    assert data(resume(hub, ids[0])) == ["not 7"]
    assert data(admin.read(0)) == ["all", "admins"]
    assert data(resume(hub, ids[0], tags=["admin"])) == ["admins", "not 7", "neither"]
    assert resume(hub, ids[-1]) == []


def test_an_empty_list_is_nobody(hub):
    """A list that was computed, and came out empty; so does a generator of none."""
    reader = hub.subscribe("a", after="start", tags=["x"])
    hub.publish("a", "nobody", only=[])
    hub.publish_many("a", ["nobody"], only=(tag for tag in ()))
    hub.publish_many("a", ["x", "x"], only=(tag for tag in ["x", "y"]))
    hub.publish("a", "all", only=None, exclude=[])
    hub.publish("a", "nobody", exclude=(tag for tag in ["x"]))
    assert data(reader.read(0)) == ["x", "x", "all"]
    for wrong in ("", "x", b"x", [1], 7):
        for name in ("only", "exclude"):
            with pytest.raises(TypeError, match=name):
                hub.publish_many("a", ["1"], **{name: wrong})


def test_tags_hold_where_a_thread_is_kept(hub):
    """A response that is not handed over passes each event on as it comes, or not."""
    stream = stream_of(hub.subscribe("a", after="start"), Line(), handover=False)
    chunks = iter(stream)
    assert next(chunks) == b": ok\n\n"
    hub.publish("a", "first")
    assert b"data: first\n" in next(chunks)
    hub.publish("a", "admins", only=["admin"])
    id = hub.publish("a", "all")
    assert next(chunks) == f"id: {id}\ndata: all\n\n".encode()
    stream.close()


def test_much_that_is_for_others_is_passed(hub):
    """What is for others never stands in the way of what is not."""
    hub.publish_many("a", ["x"] * 700, only=["others"])
    hub.publish("a", "mine")
    assert data(hub.subscribe("a", after="start").read(0)) == ["mine"]


def test_authorize(hub):
    """Asked at first, and every so often; a no is the end."""
    asked = []

    def authorize(subscription):
        asked.append(subscription)
        return len(asked) < 3

    subscription = hub.subscribe("a", authorize=(authorize, 0.05))
    with pytest.raises(Closed) as caught:
        subscription.read(TIMEOUT)
    assert caught.value.reason == "denied"
    assert asked == [subscription] * 3
    refused = hub.subscribe("a", authorize=lambda subscription: False)
    with pytest.raises(Closed, match="denied"):
        refused.read(0)
    assert hub.stats()["subscribers"] == 0


def test_an_authorize_that_raises_lets_nobody_in(hub):
    """Whoever reads gets its error, each time, and nothing else."""

    def broken(subscription):
        raise ConnectionError("no database")

    hub.publish("a", "secret")
    watcher = hub.subscribe("a")
    watcher.read(0)
    subscription = hub.subscribe("a", after="start", authorize=broken, announce=True)
    for call in (subscription.begin, *[lambda: subscription.read(0)] * 2):
        with pytest.raises(ConnectionError):
            call()
    with pytest.raises(ConnectionError):
        next(subscription)
    assert hub.presence("a") == [None]
    assert watcher.read(0) == []


def test_an_authorize_that_raises_later_lets_nobody_go_on(hub):
    """It is asked until it answers; what came meanwhile is not lost."""
    answers = [ConnectionError("no database"), ConnectionError("no database")]

    def authorize(subscription):
        if is_broken and answers:
            raise answers.pop()
        return True

    is_broken = False
    subscription = hub.subscribe("a", authorize=(authorize, 0.001))
    subscription.read(0)
    hub.publish("a", "x")
    is_broken = True
    time.sleep(0.002)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            subscription.read(0)
    assert data(subscription.read(0)) == ["x"]


@pytest.mark.parametrize("is_first", [True, False])
def test_an_authorize_that_hangs_ends_a_reader(
    hub, place, monkeypatch, caplog, is_first
):
    """In time, whoever waits there; the answer that comes late changes nothing."""
    monkeypatch.setattr(limits, "ANSWER", 0.2)
    asked = []

    def authorize(subscription):
        asked.append(1)
        while not subscription.is_closed and (is_first or len(asked) > 1):
            place.pause()  # it hangs until that
        return True

    def read():
        while True:
            reader.read()

    hub.publish("a", "1")
    reader = hub.subscribe(
        "a", after="start", authorize=(authorize, 0.05), announce=True
    )
    with pytest.raises(Closed, match="denied"):
        place.start(read)()
    assert len(asked) == 1 if is_first else 2
    place.await_true(lambda: hub.presence("a") == [])
    journal().flush()
    assert "has not answered" in caplog.text


async def no_later(subscription):
    return False


def no_by_and_by(subscription):
    yield False


@pytest.mark.parametrize(
    "authorize",
    [
        no_later,
        no_by_and_by,
        lambda s: filter(None, ()),
        lambda s: no_later,
        lambda s: s.is_closed.__bool__,
    ],
    ids=["awaitable", "generator", "iterator", "function", "method"],
)
def test_an_answer_that_is_true_whatever_it_says_is_no_yes(hub, authorize):
    """An `async def`, a `yield`, a call that was forgotten."""
    reader = hub.subscribe("a", authorize=authorize)
    for _ in range(2):
        with pytest.raises(TypeError, match="plain function"):
            reader.read(0)


def test_a_snapshot_that_comes_after_the_end_is_not_given_out(hub):
    """Kicked while `on_gap` ran: what it returns is of before that."""

    def on_gap():
        reader.close("kicked")
        return ["private"]

    reader = hub.subscribe("a", after="9-9", on_gap=on_gap)
    with pytest.raises(Closed, match="kicked"):
        reader.read(0)


def test_authorize_on_a_busy_channel(hub):
    """Who always has something to read is asked, too."""
    answers = iter([True, False])
    subscription = hub.subscribe("a", authorize=(lambda s: next(answers), 0.02))
    subscription.read(0)

    def read():
        while True:
            hub.publish("a", "x")
            subscription.read(0)

    with pytest.raises(Closed, match="denied"):
        read()


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


def test_who_waited_and_left_is_not_held(hub, place):
    """A quiet channel holds nothing of those who came and went."""

    def come_and_go():
        for _ in range(50):
            subscription = hub.subscribe("quiet", "busy")
            subscription.read(0)
            hub.publish("busy", "x")
            subscription.read()
            subscription.read(0.001)
            subscription.close()

    in_place(place, come_and_go)
    assert not hub.windows.channels["quiet"].waiters
    assert hub.windows.channels["quiet"].subscriptions == 0
    assert hub.stats()["subscribers"] == 0


# Ends.


@pytest.mark.parametrize("channels", [("a",), ("a", "b"), ("a", "b:*")])
def test_an_exception_in_a_wait_ends_only_the_wait(hub, channels):
    """A time-out or an interrupt that comes from outside loses nothing."""
    gevent = pytest.importorskip("gevent")

    def read():
        subscription = hub.subscribe(*channels)
        subscription.read(0)
        for number in range(3):
            with pytest.raises(gevent.Timeout), gevent.Timeout(0.005):
                subscription.read()
            assert not hub.windows.channels["a"].waiters
            hub.publish("a", str(number))
            assert data(subscription.read(TIMEOUT)) == [str(number)]
        subscription.close()

    in_place(Greenlets(), read)


def test_what_was_told_in_disorder_is_not_waited_for(hub, place):
    """A window that may lack the newest is asked about before a response's wait."""
    hub.publish("a", "0")
    subscription = hub.subscribe("a")
    subscription.begin()
    sink = hub.sink
    with untold(hub):
        hub.publish_many("a", "1234")
    entries = hub.broker.read("a", START).entries

    def read():
        frames = subscription.frames(True, json.dumps, None)
        sink.deliver("a", entries[4])
        sink.deliver("a", entries[1])  # late
        chunks = [next(frames)]
        sink.deliver("a", entries[2])
        chunks += [next(frames), next(frames)]
        subscription.close()
        return chunks

    chunks = in_place(place, read)
    assert b"".join(chunks) == b"".join(entry.wire for entry in entries[1:])


def test_close_wakes_all(place):
    """Whoever waits gets `Closed`, at once; whoever comes later, too."""
    # A busy machine may be late, but not each time.
    assert min(check_close(place) for _ in range(3)) < 1


def check_close(place):
    """Return how long a close takes to be noticed by all."""
    hub = Hub()
    early = hub.subscribe("a")

    def read(*names, **options):
        with pytest.raises(Closed) as caught:
            hub.subscribe(*names, **options).read()
        return caught.value.reason

    joins = [
        place.start(lambda: read("a")),
        place.start(lambda: read("a", "b")),
        place.start(lambda: read("c:*")),
        place.start(lambda: read("a", throttle=100)),
    ]
    place.await_true(lambda: hub.stats()["subscribers"] == 4)
    place.pause(0.02)
    began = time.monotonic()
    hub.close()
    assert [join() for join in joins] == ["closed"] * 4
    took = time.monotonic() - began
    assert hub.stats()["subscribers"] == 0
    for what, call in {
        "publish": lambda: hub.publish("a", "x"),
        "subscribe": lambda: hub.subscribe("a"),
        "head": lambda: hub.head("a"),
    }.items():
        with pytest.raises(
            ValueError, match=rf"{what}\(\) must not be called after close\(\)"
        ):
            call()
    with pytest.raises(Closed, match="closed"):
        early.read()
    hub.close()
    return took


def test_close_while_the_broker_is_asked():
    """Whoever reads then learns that it is closed, not what became of the broker."""

    class Gone(MemoryBroker):
        def read(self, channel, after, limit=1000):
            hub.close()
            raise Unavailable("the broker is closed")

    hub = Hub(broker=Gone())
    with pytest.raises(Closed) as caught:
        hub.subscribe("a").read(0)
    assert caught.value.reason == "closed"


def test_close_of_a_subscription(hub, place):
    """From elsewhere, before it is read, while it is, twice."""
    subscription = hub.subscribe("a")
    subscription.close()
    with pytest.raises(Closed):
        subscription.read()
    other = hub.subscribe("a")

    def read():
        with pytest.raises(Closed) as caught:
            next(other)
        return caught.value.reason

    join = place.start(read)
    place.await_true(lambda: hub.stats()["subscribers"] == 1)
    other.close("kicked")
    other.close()
    assert join() == "kicked"
    with pytest.raises(Closed):
        iter(other).__next__()
    assert hub.stats()["subscribers"] == 0


@pytest.mark.parametrize("how", ["next", "read"])
@pytest.mark.parametrize("reason", ["kicked", "denied", "closed"])
def test_an_end_is_the_end_of_what_was_read_before(hub, how, reason):
    """Who is kicked, denied or closed gets nothing more, not even what is there."""
    hub.publish_many("a", map(str, range(10)))
    is_allowed = True
    subscription = hub.subscribe(
        "a", after="start", authorize=(lambda s: is_allowed, 0.001)
    )
    assert next(subscription).data == "0"
    if reason == "denied":
        is_allowed = False
        time.sleep(0.002)
    elif reason == "kicked":
        hub.kick(lambda subscription: True)
    else:
        hub.close()
    for _ in range(2):
        with pytest.raises(Closed) as caught:
            next(subscription) if how == "next" else subscription.read(0)
        assert caught.value.reason == reason


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


# What the broker tells.


class Told(MemoryBroker):
    """A broker that tells only what it is made to."""

    def __init__(self, **options):
        super().__init__(**options)
        self.sinks = []
        self.reads = 0
        self.is_down = self.is_deaf = False

    def attach(self, sink):
        self.sinks.append(sink)

    def read(self, channel, after, limit=1000):
        self.reads += 1
        if self.is_down:
            raise Unavailable("down")
        return super().read(channel, after, limit)

    def watch(self, channel):
        if self.is_deaf:
            raise Unavailable("down")
        super().watch(channel)

    def tell(self, channel, *places):
        entries = MemoryBroker.read(self, channel, "0").entries
        for place in places:
            self.sinks[0].deliver(channel, entries[place])


@pytest.mark.parametrize(
    "places",
    [
        [0, 1, 2, 3],
        [3],
        [0, 3],
        [1, 0, 3, 2],
        [3, 2, 1, 0],
        [0, 0, 1, 1, 3, 3, 0],
        [2, 3, 0],
        [0, 1, 2, 3, 1],
    ],
    ids=str,
)
@pytest.mark.parametrize("is_read_between", [False, True])
def test_word_may_be_late_twice_or_never(places, is_read_between):
    """The chain shows it: no hole, nothing twice; and nobody looks without end."""
    broker = Told()
    hub = Hub(broker=broker)
    subscription = hub.subscribe("a")
    subscription.read(0)
    found = []
    hub.publish_many("a", "0123")
    for place in places:
        broker.tell("a", place)
        if is_read_between:
            found += data(read_all(subscription))
    found += data(read_all(subscription))
    assert found == ["0", "1", "2", "3"]
    before = broker.reads
    assert subscription.read(0.05) == []
    assert broker.reads - before < 3
    hub.publish("a", "4")
    broker.tell("a", 4)
    assert data(read_all(subscription)) == ["4"]
    hub.close()


def test_a_hole_in_what_is_told_is_read(hub):
    """Who was at the end of a window is behind the hole, not beyond it."""
    broker = Told()
    hub = Hub(broker=broker)
    subscription = hub.subscribe("a")
    subscription.read(0)
    hub.publish("a", "0")
    broker.tell("a", 0)
    assert data(subscription.read(0)) == ["0"]
    hub.publish_many("a", "12")
    broker.tell("a", 2)
    assert data(read_all(subscription)) == ["1", "2"]
    hub.publish("a", "3")
    hub.sink.resync(["a", "never heard of"])
    assert data(read_all(subscription)) == ["3"]
    hub.close()


def test_a_window_that_was_not_told_for_long(hub):
    """A pattern's window, left untold: a subscriber reads the broker, and waits."""
    with_pattern = hub.subscribe("a:*")
    with_pattern.read(0)
    hub.publish("a:1", "0")
    with_pattern.close()
    hub.publish("a:1", "1")
    subscription = hub.subscribe("a:1")
    assert subscription.read(0.01) == []
    began = time.process_time()
    assert subscription.read(0.3) == []
    assert time.process_time() - began < 0.15
    hub.publish("a:1", "2")
    assert data(subscription.read(0)) == ["2"]


@pytest.mark.parametrize("what", ["is_down", "is_deaf"])
def test_a_broker_that_is_down(what):
    """Who reads waits, and is not there yet; who begins is told. Then it goes on."""
    broker = Told()
    hub = Hub(broker=broker)
    setattr(broker, what, True)
    subscription = hub.subscribe("a", "b", announce=True)
    assert subscription.read(0) == []
    with pytest.raises(Unavailable):
        subscription.begin()
    assert hub.stats()["subscribers"] == 0
    assert all(not record.subscriptions for record in hub.windows.channels.values())
    setattr(broker, what, False)
    assert not broker.read(PRESENCE, START).entries  # nobody has come, or left
    assert read_all(subscription) == []
    broker.tell(PRESENCE, 0, 1, 0)
    assert [event.event for event in read_all(subscription)] == ["join", "join"]
    assert hub.stats()["subscribers"] == 1
    subscription.close()
    hub.close()


def test_a_broker_that_goes_down_later(monkeypatch):
    """Who is there stays, waits without haste, and loses nothing of what it has."""
    monkeypatch.setattr(limits, "RETRY", 0.1)
    broker = Told()
    hub = Hub(broker=broker)
    subscription = hub.subscribe("a", "b")
    subscription.read(0)
    hub.publish_many("a", "01")
    broker.tell("a", 0, 1)
    hub.publish("b", "2")
    hub.sink.resync(["b"])
    broker.is_down = True
    assert data(subscription.read(0)) == ["0", "1"]
    looks = [0]
    while looks[-1] < 2 and len(looks) < 9:  # one that a busy machine held up has one
        before = broker.reads
        assert subscription.read(0.5) == []
        looks.append(broker.reads - before)
    assert 2 <= looks[-1] <= 12
    assert hub.stats()["subscribers"] == 1
    broker.is_down = False
    assert data(subscription.read(5)) == ["2"]
    hub.close()


def test_idle_channels_are_forgotten(hub, monkeypatch):
    """A window without subscribers goes, and is no more told of."""
    monkeypatch.setattr(limits, "IDLE", 0.0)
    for number in range(10):
        subscription = hub.subscribe(f"c{number}")
        subscription.read(0)
        subscription.close()
        time.sleep(0.001)
    assert hub.stats()["channels"] <= 1
    assert len(hub.broker.watched.names - {PRESENCE}) <= 1


def test_forgotten_and_wanted_at_once(monkeypatch):
    """A broker's unwatch that comes after another's watch costs nothing."""
    monkeypatch.setattr(limits, "IDLE", -1.0)

    class Late(MemoryBroker):
        def unwatch(self, channel):
            found.append(hub.subscribe("a"))
            found[-1].read(0)
            super().unwatch(channel)
            hub.publish("a", "untold")

    found = []
    hub = Hub(broker=Late())
    first = hub.subscribe("a")
    first.read(0)
    first.close()
    assert data(found[0].read(0)) == ["untold"]
    hub.publish("a", "told")
    assert data(found[0].read(0)) == ["told"]


def test_state(hub, caplog):
    """Down and back are said once each."""
    hub.sink.state(True, "as it was")
    hub.sink.state(False, "no route")
    hub.sink.state(False, "no route")
    assert hub.stats()["up"] is False
    hub.sink.state(True, "connected")
    journal().flush()
    assert [record.message for record in caplog.records] == [
        "the broker is down: no route",
        "the broker is back: connected",
    ]


# Arguments.


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"capacity": 0}, ValueError),
        ({"capacity": 1.5}, TypeError),
        ({"capacity": True}, TypeError),
        ({"capacity": 10**10}, ValueError),
        ({"max_payload": 1 << 40}, ValueError),
        ({"max_age": float("inf")}, ValueError),
        ({"max_age": 1e300}, ValueError),
        ({"url": "memory:?x=1"}, ValueError),
        ({"url": "memory:name"}, ValueError),
        ({"url": "local:x?y=1"}, ValueError),
        ({"max_payload": 0}, ValueError),
        ({"max_age": 0}, ValueError),
        ({"max_age": "1"}, TypeError),
        ({"max_age": float("nan")}, ValueError),
        ({"url": "nowhere:"}, ValueError),
        ({"url": 5}, TypeError),
        ({"broker": 5}, TypeError),
        ({"broker": "memory:"}, TypeError),
    ],
    ids=str,
)
def test_wrong_arguments_of_a_hub(options, error):
    """Each is refused, by its name."""
    with pytest.raises(error, match=next(iter(options))):
        Hub(**options)


@pytest.mark.parametrize(
    "options", [{"url": "memory:"}, {"capacity": 1000}, {"max_age": None}], ids=str
)
def test_what_a_broker_has_is_not_given_beside_it(options):
    """It would be ignored."""
    with pytest.raises(ValueError, match="with broker"):
        Hub(broker=MemoryBroker(), **options)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"after": 0}, ValueError, "after"),
        ({"after": True}, TypeError, "after"),
        ({"after": None}, TypeError, "after"),
        ({"on_gap": "x"}, ValueError, "on_gap"),
        ({"conflate": "symbol"}, TypeError, "conflate"),
        ({"conflate": True}, TypeError, "conflate"),
        ({"throttle": 0}, ValueError, "throttle"),
        ({"throttle": float("inf")}, ValueError, "throttle"),
        ({"throttle": True}, TypeError, "throttle"),
        ({"throttle": "1"}, TypeError, "throttle"),
        ({"authorize": False}, TypeError, "authorize"),
        ({"authorize": (bool,)}, TypeError, "authorize"),
        ({"authorize": (5, bool)}, TypeError, "authorize"),
        ({"authorize": (None, 5)}, TypeError, "authorize"),
        ({"authorize": (bool, None)}, TypeError, "authorize"),
        ({"authorize": (bool, True)}, TypeError, "authorize"),
        ({"authorize": (bool, -1)}, ValueError, "authorize"),
        ({"authorize": (bool, float("nan"))}, ValueError, "authorize"),
        ({"tags": "x"}, TypeError, "tags"),
        ({"tags": [1]}, TypeError, "tags"),
    ],
    ids=str,
)
def test_wrong_arguments_of_subscribe(hub, options, error, name):
    """Each is refused where it is given, by its name."""
    with pytest.raises(error, match=name):
        hub.subscribe("a", **options)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("", ValueError),
        ("a b", ValueError),
        ("a\n", ValueError),
        ("a\0", ValueError),
        ("a\ud800", ValueError),
        ("x" * 201, ValueError),
        ("a*", ValueError),
        (7, TypeError),
        (b"a", TypeError),
    ],
    ids=repr,
)
def test_wrong_channels(hub, name, error):
    """A name is one, wherever it is given."""
    for call in (lambda name: hub.publish(name, "x"), hub.subscribe, hub.head):
        with pytest.raises(error, match="channel"):
            call(name)


@pytest.mark.parametrize(
    "level", ["*", "#", "a:b", "b:#", "", " ", "a b", "a\n", "a*", "\0", "x" * 200]
)
def test_a_name_from_outside_is_one_level(hub, level):
    """It is no pattern, and nobody else's channel."""
    with pytest.raises(ValueError, match="channel"):
        hub.channel("user", level)


@pytest.mark.parametrize("level", [None, True, b"x", 1.5])
def test_a_level_is_text_or_a_number(hub, level):
    """Nothing else is turned into a name in silence."""
    with pytest.raises(TypeError, match="level"):
        hub.channel("user", level)


def test_names_of_levels(hub):
    """What is left is a name."""
    assert hub.channel("user", "ann", 7) == "user:ann:7"
    assert Hub.channel("Ünïcode.@-_%") == "Ünïcode.@-_%"
    with pytest.raises(ValueError, match="channel"):
        hub.channel()


def test_more_wrong_arguments(hub):
    """Patterns are for subscriptions from now on; ids are the broker's."""
    for name in ("a:*", "#", "*:a:*"):
        with pytest.raises(ValueError, match="channel"):
            hub.publish(name, "x")
    with pytest.raises(ValueError, match="channel"):
        hub.subscribe("a*:*")
    with pytest.raises(ValueError, match="at least one"):
        hub.subscribe()
    with pytest.raises(ValueError, match="32 at most"):
        hub.subscribe(*map(str, range(33)))
    with pytest.raises(ValueError, match="after must be 'now'"):
        hub.subscribe("a", "b:*", after="start")
    with pytest.raises(ValueError, match="id must be None, as the broker creates ids"):
        hub.publish("a", Event("x", id="1"))
    with pytest.raises(ValueError, match="data must be given"):
        hub.publish("a", Event(event="x"))
    with pytest.raises(ValueError, match="must be None with an Event"):
        hub.publish("a", Event("x"), event="e")
    with pytest.raises(TypeError, match="only"):
        hub.publish("a", "x", only="admin")
    assert hub.head("a").startswith("0-")


@pytest.mark.parametrize(
    ("reason", "error"), [(None, TypeError), (5, TypeError), ("", ValueError)]
)
def test_a_reason_is_a_word(hub, reason, error):
    """Whoever reads it is told it; nothing else ends a subscription."""
    subscription = hub.subscribe("a")
    with pytest.raises(error, match="reason"):
        subscription.close(reason)
    assert subscription.read(0) == []


def test_nobody_makes_a_reset(hub):
    """Only a hub says that events are missing."""
    for call in (
        lambda: hub.publish("a", "x", event="reset"),
        lambda: hub.publish("a", Event("x", event="reset")),
        lambda: hub.publish_many("a", ["x", Event("x", event="reset")]),
    ):
        with pytest.raises(ValueError, match="reset"):
            call()
    assert hub.subscribe("a", after="start").read(0) == []


def test_too_large():
    """Refused, with all that came with it."""
    hub = Hub(max_payload=100)
    with pytest.raises(PayloadTooLarge, match="100 bytes at most"):
        hub.publish_many("a", ["x", "x" * 100])
    assert hub.head("a").startswith("0-")
    hub.close()


def test_dumps():
    """What is not text is encoded by it."""
    hub = Hub(dumps=lambda value: b"<%d>" % value)
    hub.publish("a", 7)
    hub.publish("a", Event(8, event="e"))
    assert data(hub.subscribe("a", after="start").read(0)) == ["<7>", "<8>"]
    hub.close()


def test_many_processes_are_warned_of(hub, caplog):
    """A hub of one process, in a server that has several."""

    def subscribe():
        with caplog.at_level(logging.WARNING):
            serve(stream_of(iter([hub.subscribe("b").read(0)]), Line()))

    def source():
        assert hub.subscribe("a").read(0) == []
        yield "x"

    for _ in range(2):
        serve(stream_of(source(), Line(is_multiprocess=True)))
    warnings = [r.message for r in caplog.records if "one process" in r.message]
    assert len(warnings) == 1


def test_stats(hub):
    """Counts, as the docstring has them."""
    assert json.loads(json.dumps(hub.stats())) == {
        "subscribers": 0,
        "channels": 0,
        "entries": 0,
        "bytes": 0,
        "published": 0,
        "delivered": 0,
        "up": True,
    }
    subscription = hub.subscribe("a")
    subscription.read(0)
    hub.publish_many("a", "123")
    subscription.read(0)
    stats = hub.stats()
    assert (stats["subscribers"], stats["channels"], stats["entries"]) == (1, 1, 3)
    assert (stats["published"], stats["delivered"]) == (3, 3)
    assert stats["bytes"] > 0


# In streams.


def test_in_a_response(hub):
    """Given to a stream: chunks that hold all there is, and the bytes are shared."""
    ids = hub.publish_many("a", "12")
    chunks = []
    for _ in range(2):
        subscription = hub.subscribe("a", after="start")
        stream = stream_of(subscription, Line(), end=None)
        chunks.append([next(stream), next(stream)])
        hub.publish_many("a", [])
        stream.close()
    wire = b"id: %b\ndata: 1\n\nid: %b\ndata: 2\n\n" % tuple(i.encode() for i in ids)
    assert chunks[0][1] == chunks[1][1] == wire
    assert hub.stats()["subscribers"] == 0


@pytest.mark.parametrize("is_generator", [False, True])
def test_who_is_denied_or_kicked_is_told_to_come_back_late(hub, is_generator):
    """A browser comes back for ever: not soon, and not all at once."""

    def source(subscription):
        yield from subscription

    def stream_to(subscription):
        given = source(subscription) if is_generator else subscription
        return stream_of(given, Browser(), end="stop")

    waits = set()
    for _ in range(20):
        denied = hub.subscribe("a", authorize=lambda subscription: False)
        kicked = hub.subscribe("a", after="start")
        hub.publish("a", "x")
        stream = stream_to(kicked)
        for chunk in stream:
            if b"x" in chunk:
                hub.kick(lambda subscription: True)
        last = chunk
        stream.close()
        for block in (serve(stream_to(denied))[-1], last):
            waits.add(int(re.fullmatch(rb"retry: (\d+)\n\n", block)[1]))
    assert 5000 <= min(waits) <= max(waits) <= 15_000
    assert len(waits) > 30


def test_an_end_of_the_stream_frees_a_generators_subscription(hub):
    """Even where the generator's frame is held."""
    held = []

    def source():
        subscription = hub.subscribe("a", after="start")
        held.append(subscription)
        yield from subscription

    hub.publish("a", "1")
    stream = stream_of(source(), Line())
    next(stream)
    next(stream)
    assert hub.stats()["subscribers"] == 1
    stream.close()
    assert hub.stats()["subscribers"] == 0
    assert held[0].is_closed


@pytest.mark.parametrize("channels", [("a",), ("a", "b")])
def test_what_is_held_is_given_back_before_each_wait(hub, place, channels):
    """A database connection, for one: whatever ran since the wait before took it."""
    held = ["the view's"]

    def snapshot():
        held.append("the snapshot's")
        return ["so far"]

    line = Line("f-f")
    line.before_wait = held.clear
    waits = []

    def run():
        stream = stream_of(hub.subscribe(*channels, on_gap=snapshot), line, end=None)
        for chunk in stream:
            waits.append(chunk)
            held.append("a middleware's")

    join = place.start(run)
    for number in range(3):
        place.await_true(lambda: b"so far" in b"".join(waits))
        place.await_true(lambda: not held)
        hub.publish("a", f"event {number}")
        text = b"event %d" % number
        place.await_true(lambda text=text: text in b"".join(waits))
    place.await_true(lambda: not held)
    hub.close()
    join()


# Accounts.


def test_races_lose_nothing(place):
    """Subscribe and publish at once, 10,000 times: each is got once, in order.

    A machine on which a thread waits long for its turn does what it can in 30 s.
    """
    hub = Hub(capacity=1_000_000)
    start = hub.head("a")
    stop = []
    until = time.monotonic() + 2 * TIMEOUT

    def publish():
        number = 0
        while not stop:
            hub.publish("a", str(number))
            number += 1
            if number % 5 == 0:
                place.pause(0)

    def subscribe():
        mine = random.Random(1)
        expected, id, rounds = 0, start, 0
        try:
            while rounds < 2500 and (rounds < 10 or time.monotonic() < until):
                rounds += 1
                subscription = hub.subscribe("a", after=id)
                events = subscription.read(TIMEOUT)
                assert events
                if mine.random() < 0.5:
                    events += subscription.read(0)
                subscription.close()
                place.pause(0)
                for event in events[: mine.randrange(1, len(events) + 1)]:
                    assert event.data == str(expected), event
                    expected, id = expected + 1, event.id
        finally:
            done.append((rounds, expected))

    done = []
    publisher = place.start(publish)
    joins = [place.start(subscribe) for _ in range(4)]
    try:
        for join in joins:
            while len(done) < 4 and time.monotonic() < until + TIMEOUT:
                place.pause(0.01)
            join()
    finally:
        stop.append(True)
        publisher()
    assert all(expected >= rounds for rounds, expected in done)
    hub.close()


class Client:
    """A client of one channel or several, that is cut off anywhere and comes back."""

    def __init__(self, hub, channels, on_gap):
        self.hub = hub
        self.channels = channels
        self.on_gap = on_gap
        self.subscription = hub.subscribe(*channels, after="start")
        self.subscription.read(0)
        self.id = None
        self.got = {channel: [] for channel in channels}

    def take(self, events):
        for event in events:
            self.id = event.id or self.id
            if isinstance(event, Gap):
                self.got[event.json()["channel"]].append(None)
            else:
                channel, number = event.json()
                self.got[channel].append(number)

    def read(self):
        self.take(self.subscription.read(0))

    def cut(self, share):
        events = self.subscription.read(0)
        self.take(events[: int(len(events) * share)])
        self.subscription.close()
        if self.id is None:  # it begins anew
            for numbers in self.got.values():
                numbers.append(None)
        self.subscription = self.hub.subscribe(
            *self.channels, after=self.id or "start", on_gap=self.on_gap
        )

    def check(self, published, removed):
        self.take(read_all(self.subscription))
        for channel in self.channels:
            expected, is_told = 0, False
            for number in self.got[channel]:
                if number is None:
                    is_told = True
                    continue
                # After an id that was removed all that is kept may come again.
                assert number == expected or (
                    is_told and (number > expected or channel in removed)
                )
                expected, is_told = number + 1, False
            assert is_told or expected == published[channel]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.sampled_from("ab"), st.integers(1, 12)),
        st.tuples(st.just("read"), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("cut"), st.integers(0, 2), st.floats(0, 1)),
        st.tuples(st.just("trim"), st.sampled_from("ab"), st.integers(0, 8)),
        st.tuples(st.just("remove"), st.sampled_from("ab"), st.integers(0, 8)),
        st.tuples(st.just("resync"), st.just(0), st.just(0)),
        st.tuples(st.just("forge"), st.integers(0, 2), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(STEPS)
def test_all_is_delivered_or_announced(steps):
    """Whatever happens in whatever order: delivered once, in order, or announced."""
    broker = Removable(capacity=20)
    hub = Hub(broker=broker)
    published = {"a": 0, "b": 0}
    removed = set()
    clients = [
        Client(hub, ("a",), "replay"),
        Client(hub, ("a", "b"), "replay"),
        Client(hub, ("b", "a"), "replay"),
    ]
    for action, what, value in steps:
        if action == "publish":
            start = published[what]
            hub.publish_many(what, [[what, start + n] for n in range(value)])
            published[what] += value
        elif action == "read":
            clients[what].read()
        elif action == "cut":
            clients[what].cut(value)
        elif action == "trim":
            broker.trim(what, value)
        elif action == "remove":
            kept = broker.kept(what)
            if kept:
                broker.remove(what, kept[max(0, len(kept) - 1 - value)].id)
                removed.add(what)
        elif action == "resync":
            hub.sink.resync(None)
        else:
            clients[what].cut(1.0)
            clients[what].id = "5-00000000"
            # What it has got, it gets again, after a reset.
            clients[what].got = {channel: [] for channel in clients[what].channels}
            clients[what].cut(0.0)
    for client in clients:
        client.check(published, removed)
    hub.close()


def test_a_wake_before_the_wait_ends_it(place):
    """One that comes while the reader is elsewhere, asking a broker, say."""

    def wait():
        waiter = Waiter()
        wake_all([waiter])
        place.pause(0.01)
        began = time.monotonic()
        waiter.wait(4 * TIMEOUT)
        assert time.monotonic() - began < TIMEOUT
        began = time.monotonic()
        waiter.wait(0.05)
        return time.monotonic() - began

    assert in_place(place, wait) > 0.03


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


# Size.

SIZES = st.lists(
    st.one_of(
        st.tuples(
            st.just("publish"), st.sampled_from("abcdef"), st.integers(0, 30_000)
        ),
        st.tuples(st.just("read"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("renew"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("resync"), st.sampled_from("abcdef"), st.just(0)),
        st.tuples(st.just("hole"), st.sampled_from("abcdef"), st.just(0)),
        st.tuples(st.just("age"), st.just(0), st.just(0)),
    ),
    max_size=80,
)
NAMES = [("a",), ("a", "b", "c"), ("#",), ("*", "f")]


@contextmanager
def tight_windows():
    """Let windows have little room, and be forgotten at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "IDLE", -1.0)
        patch.setattr(limits, "WINDOW", 5)
        patch.setattr(limits, "WINDOW_SIZE", 50_000)
        patch.setattr(limits, "BUDGET", 100_000)
        yield


@settings(max_examples=150)
@given(SIZES)
def test_windows_have_a_budget(steps):
    """Their sizes are known exactly, and bounded together; and nothing is lost."""
    with tight_windows():
        check_budget(steps)


def check_budget(steps):
    # Windows forget what is too old; the broker does not, or it were a gap.
    broker = Told(capacity=10_000, max_age=None)
    hub = Hub(broker=broker)
    subscriptions = [hub.subscribe(*names) for names in NAMES]
    found = [[] for _ in NAMES]
    published = []
    # In the end of what was not told, too.
    last = [("resync", name, 0) for name in "abcdef"]
    last += [("read", number, 0) for number in range(len(NAMES))]
    for action, what, size in steps + last:
        if action in ("publish", "hole"):
            hub.publish(what, f"{len(published)}:{what}:" + "x" * size)
            published.append(what)
            if action == "publish" and broker.is_watched(what):
                broker.tell(what, -1)
        elif action == "read":
            found[what] += read_all(subscriptions[what])
        elif action == "renew":
            subscriptions[what].close()
            subscriptions[what] = hub.subscribe(*NAMES[what])
            found[what] = []
        elif action == "resync":
            hub.sink.resync([what])
        else:
            for record in hub.windows.channels.values():
                for entry in record.log.read(record.log.first, 1):
                    entry.time -= 2e6
        sizes = [
            sum(entry.size for entry in record.log.read(record.log.first, 100))
            for record in hub.windows.channels.values()
        ]
        assert hub.stats()["bytes"] == hub.windows.budget.size == sum(sizes) <= 100_000
        assert all(size <= 50_000 + 30_000 * 2 for size in sizes)
        assert len(hub.windows.budget.filled) == len([size for size in sizes if size])
    for subscription, names, events in zip(subscriptions, NAMES, found, strict=True):
        numbers = {}
        for event in events:
            if not isinstance(event, Gap):
                number, channel, _ = event.data.split(":")
                numbers.setdefault(channel, []).append(int(number))
        for channel, mine in numbers.items():
            assert mine == sorted(set(mine))
            # By its name nothing is lost from the first that it got on.
            if channel in names:
                rest = range(mine[0], len(published))
                assert mine == [n for n in rest if published[n] == channel]
        subscription.close()
    hub.close()


def test_the_window_that_is_quiet_for_longest_makes_room(hub, monkeypatch):
    """Who is behind in it reads the broker; who is at its end does not notice."""
    monkeypatch.setattr(limits, "BUDGET", 9_000)
    quiet, behind, busy = (hub.subscribe(name) for name in ("quiet", "quiet", "busy"))
    for subscription in (quiet, behind, busy):
        subscription.read(0)
    hub.publish_many("quiet", ["x" * 100] * 10)
    assert len(quiet.read(0)) == 10
    hub.publish_many("busy", ["x" * 100] * 12)
    assert not len(hub.windows.channels["quiet"].log)
    assert len(hub.windows.channels["busy"].log) == 12
    assert quiet.read(0) == []
    hub.publish("quiet", "more")
    assert data(quiet.read(0)) == ["more"]
    assert data(read_all(behind)) == ["x" * 100] * 10 + ["more"]
    assert len(busy.read(0)) == 12


def test_a_window_holds_nothing_that_is_too_old():
    """What is older than ``max_age`` goes when its channel is touched."""
    hub = Hub(max_age=60)
    subscription = hub.subscribe("a")
    subscription.read(0)
    record = hub.windows.channels["a"]

    def pass_a_minute():
        for entry in record.log.read(record.log.first, 10):
            entry.time -= 61

    hub.publish("a", "old")
    pass_a_minute()
    hub.publish("a", "new")
    assert len(record.log) == 1
    pass_a_minute()
    hub.subscribe("a").read(0)
    assert len(record.log) == hub.windows.budget.size == 0
    hub.close()


@pytest.mark.parametrize("part", ["channels", "subscribers", "both"])
def test_many_channels_are_small(part):
    """10,000 subscribers, 100,000 channels: below 300 MB; here a tenth of them.

    Python's development mode takes its share; ``tox -e soak`` runs all of them.
    """
    if part == "subscribers":
        pytest.importorskip("gevent")
    script = (
        "from tests.soak import full_size; import sys;"
        "print(getattr(full_size, sys.argv[1])(0.1))"
    )
    assert float(check_script(script, part)) < 40e6


def test_a_hub_that_is_dropped_is_freed():
    """One made for each call; at once, for nothing refers to it in a circle."""
    gc.disable()
    try:
        hub = Hub()
        subscription = hub.subscribe("a", who="ann", announce=True)
        subscription.read(0)
        found = weakref.ref(hub.windows), weakref.ref(hub.broker)
        del hub
        assert found[0]() is not None  # somebody reads it
        del subscription
        assert [reference() for reference in found] == [None, None]
    finally:
        gc.enable()


def test_hubs_by_the_dozen_are_warned_of(caplog, tmp_path):
    url = f"local:{tmp_path}"
    few = [Hub(url) for _ in range(limits.MANY)]
    assert not caplog.records
    many = [Hub(url) for _ in range(3)]
    (record,) = caplog.records
    assert "hubs of one local: are in use, each with" in record.message
    assert str(tmp_path) not in record.message
    assert all(hub.close() is None for hub in few + many)
