"""Who comes and goes is told to those who are there, and is no part of history."""

import json

import pytest

from syncstream import Closed, Gap, Hub
from syncstream.brokers.log import START, Entry, Log
from syncstream.brokers.memory import MemoryBroker
from syncstream.channels.presence import PRESENCE, decoded, encoded
from syncstream.runtime.journal import journal
from tests.channels.readers import read_all

PLACE = "tests/channels/test_presence.py"
JOIN = b'event: join\ndata: {"who":"eve"}\n\n'


@pytest.fixture
def hub():
    with_room = Hub(capacity=10)
    yield with_room
    with_room.close()


def come_and_go(hub, *channels, who="ann"):
    subscription = hub.subscribe(*channels, who=who, announce=True)
    subscription.begin()
    subscription.close()


def told(events):
    return [event.event or event.data for event in events]


def test_connections_evict_nothing(hub):
    """However many come and go, what was published is kept."""
    messages = [*map(str, range(10))]
    ids = hub.publish_many("room", messages)
    for _ in range(20):
        come_and_go(hub, "room")
    for after in ("start", 10):
        with_all = hub.subscribe("room", after=after)
        assert told(with_all.read(0)) == messages
    assert told(hub.subscribe("room", after=ids[3]).read(0)) == messages[4:]
    assert hub.head("room") == ids[-1]
    assert [e.id for e in hub.broker.read("room", START).entries] == ids


def test_who_is_there_is_told_in_order(hub):
    """At its place among the events, to the one who comes, too; not to later ones."""
    watcher = hub.subscribe("room")
    watcher.begin()
    hub.publish("room", "1")
    ann = hub.subscribe("room", who="ann", announce=True)
    assert told(ann.read(0)) == ["join"]
    hub.publish("room", "2")
    later = hub.subscribe("room")
    assert later.read(0) == []
    ann.close()
    hub.publish("room", "3")
    assert told(watcher.read(0)) == ["1", "join", "2", "leave", "3"]
    assert told(later.read(0)) == ["leave", "3"]
    assert watcher.read(0) == []


def test_a_resume_by_its_id_has_no_hole(hub):
    """The id is the one of the event before: no reset, nothing lost or told twice."""
    watcher = hub.subscribe("room")
    first = hub.head("room")
    watcher.begin()
    come_and_go(hub, "room")
    join, leave = watcher.read(0)
    assert (join.event, join.id, leave.id) == ("join", first, first)
    (one,) = hub.publish_many("room", ["1"])
    come_and_go(hub, "room")
    found = watcher.read(0)
    assert [event.id for event in found] == [one, one, one]
    for id in (join.id, one):
        hub.publish("room", "2")
        expected = [e.data for e in hub.subscribe("room", after=id).read(0)]
        assert expected == (["1", "2"] if id == first else ["2", "2"])
    # Of those, too, who lose their place in the window.
    hub.sink.resync(["room"])
    come_and_go(hub, "room")
    assert told(watcher.read(0)) == ["2", "2"]
    assert told(watcher.read(0)) == ["join", "leave"]
    assert watcher.read(0) == []


def test_of_several_channels(hub):
    """The id of all stays true; each channel is told."""
    both = hub.subscribe("news", "room")
    both.begin()
    hub.publish("news", "n1")
    hub.publish("room", "r1")
    come_and_go(hub, "news", "room")
    found = both.read(0)
    assert sorted(told(found)) == ["join"] * 2 + ["leave"] * 2 + ["n1", "r1"]
    hub.publish("news", "n2")
    again = hub.subscribe("news", "room", after=found[-1].id).read(0)
    assert told(again) == ["n2"]


def test_by_patterns(hub):
    """Of channels that nobody has heard of, too, and each once."""
    everybody = hub.subscribe("#", "*", "a:room")
    everybody.begin()
    come_and_go(hub, "room")
    come_and_go(hub, "a:room")
    found = read_all(everybody)
    assert told(found) == ["join", "leave"] * 2
    hub.publish("room", "1")
    assert told(everybody.read(0)) == ["1"]
    assert not any(isinstance(event, Gap) for event in found)


def test_a_snapshot_that_fails_loses_no_join(hub):
    """What was read and not given out is read again."""

    failures = [OSError("no database")]

    def snapshot():
        if failures:
            raise failures.pop()
        return ()

    subscription = hub.subscribe("room:*", on_gap=snapshot)
    subscription.begin()
    come_and_go(hub, "room:1")
    hub.sink.resync(None)
    with pytest.raises(OSError, match="no database"):
        subscription.read(0)
    assert told(subscription.read(0)) == ["reset", "join", "leave"]


def test_as_lines(hub):
    """A line as others, with the id of the event before."""
    subscription = hub.subscribe("room", who="ann", announce=True)
    assert json.loads(next(subscription.frames(False, json.dumps, None))) == {
        "id": hub.head("room"),
        "event": "join",
        "data": '{"who":"ann"}',
    }


@pytest.mark.parametrize(
    "payload",
    [
        b"data: nope\n\n",
        b'\0{"only": []}\n' + JOIN,
        b'\0{"in": 7}\n' + JOIN,
        b'\0{"in": ["room"]}\n' + JOIN.replace(b"join", b"reset"),
        b'\0{"in": ["room"]}\n' + JOIN.replace(b"join", b"news"),
        b'\0{"in": ["room"]}\nid: 1-1\n' + JOIN,
        b'\0{"in": ["room"]}\n' + JOIN * 2,
        b'\0{"in": ["room"]}\n',
        b"\0" + b"[" * 100_000,
        b'\0{"in": ["\\ud800"]}\n' + JOIN,  # no UTF-8: a line of JSON would fail
    ],
    ids=range(10),
)
def test_what_is_malformed_is_dropped(hub, payload, caplog):
    """And said; what follows is told."""
    watcher = hub.subscribe("room")
    watcher.begin()
    hub.broker.publish([(PRESENCE, payload), (PRESENCE, encoded("room", JOIN))])
    assert told(watcher.read(0)) == ["join"]
    journal().flush()
    assert f"an entry of {PRESENCE!r} is not an event of a hub" in caplog.text


def test_workers_without_this_deliver_it_to_nobody():
    """They have it under its own name, by "#", for those who have no tags."""
    payload = encoded("room", JOIN)
    assert json.loads(Entry("1-1", "0", payload).tags)["only"] == []
    assert decoded(Entry("1-1", "0", payload)) == ("room", JOIN)


def test_it_waits_for_the_place_where_it_belongs(hub):
    """While nobody here knows the newest event, which comes before it."""
    watcher = hub.subscribe("room")
    watcher.begin()
    come_and_go(hub, "room")
    hub.publish("room", "1")
    assert told(watcher.read(0)) == ["join", "leave", "1"]


def test_what_is_set_aside_moves_no_place():
    """It follows the event before it, whatever is trimmed."""
    log = Log("0")
    log.set_aside(b"a", 0.0)
    log.append(Entry("1-1", "0", b"x"))
    log.set_aside(b"b", 0.0)
    log.set_aside(b"c", 0.0)
    assert (log.after("0"), log.after("1-1"), log.end) == (0, 2, 4)
    log.append(Entry("2-2", "1-1", b"y"))
    assert (log.after("1-1"), log.after("2-2")) == (2, 5)
    log.trim(2, float("-inf"), float("inf"))
    assert (log.after("0"), log.after("1-1"), log.after("2-2")) == (None, 3, 5)
    assert (log.base, log.head) == ("1-1", "2-2")


def test_a_close_during_the_join_leaves_after_it():
    """A page that got the leave first would show somebody who has left."""

    class Slow(MemoryBroker):
        def publish(self, items, *, connection=None):
            if comers:
                comers.pop().close()
            return super().publish(items, connection=connection)

    comers = []
    hub = Hub(broker=Slow())
    watcher = hub.subscribe("room", "other")
    watcher.begin()
    ann = hub.subscribe("room", "other", who="ann", announce=True)
    comers.append(ann)
    with pytest.raises(Closed):
        ann.read(0)
    assert told(read_all(watcher)) == ["join", "leave"] * 2
    assert hub.presence("room") == [None]
    hub.close()


def test_a_join_that_is_interrupted_is_taken_back():
    """A time-out of gevent, for example: some channels may have been told."""

    class Interrupted(MemoryBroker):
        def publish(self, items, *, connection=None):
            ids = super().publish(items, connection=connection)
            if failures:
                raise failures.pop()
            return ids

    failures = []
    hub = Hub(broker=Interrupted())
    watcher = hub.subscribe("room")
    watcher.begin()
    failures.append(KeyboardInterrupt())
    ann = hub.subscribe("room", who="ann", announce=True)
    with pytest.raises(KeyboardInterrupt):
        ann.begin()
    ann.close()
    assert told(watcher.read(0)) == ["join", "leave"]
    hub.close()


def test_who_has_ended_is_present_no_more(hub):
    """Though the reader has not noticed the end yet."""
    ann = hub.subscribe("room", who="ann")
    ann.begin()
    ann.end("denied")
    assert hub.presence("room") == []
