"""Where a subscription begins: after an id, at the start, with the newest, now."""

import contextlib
import json
import re

import pytest

from syncstream import Closed, Denied, Gap, Hub, Unavailable
from syncstream.brokers.log import Entry
from syncstream.brokers.memory import MemoryBroker
from syncstream.channels import limits
from syncstream.channels.cursor import Cursor
from syncstream.channels.windows import Channel
from syncstream.protocol import sse
from tests.channels.readers import Line, data, read_all, resume
from tests.support.pairs import serve, stream_of


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


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_was_set_aside_before_a_beginning_is_not_for_it(count, place):
    """Neither the last one before it is, nor is the first one after it passed over."""
    record = Channel("a")
    record.begin("1-1")
    first = record.log.end
    told = [b"join", b"leave", b"event", b"join again", b"leave again"][:count]
    cursor = Cursor(record, "1-1", since=first + place)
    for fields in told:
        if fields == b"event":
            record.log.append(Entry("2-2", "1-1", fields))
        else:
            record.set_aside(fields, 0.0)
    assert cursor.find() == first
    entries, end = cursor.read(first, 10)
    wanted = [f for n, f in enumerate(told) if n >= place or f == b"event"]
    assert [entry.payload for entry in entries] == wanted
    assert end == first + count
