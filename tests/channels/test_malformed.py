"""What a broker tells, or has, that no hub has stored: dropped, said, read past."""

import json
import logging
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncstream import Event, Gap, Hub
from syncstream.brokers.log import Entry, flaw
from syncstream.brokers.memory import MemoryBroker
from syncstream.channels.control import CONTROL, Kick, decoded
from syncstream.channels.limits import MOST_SAID
from syncstream.errors import Unavailable
from syncstream.runtime.journal import journal
from tests.support.pairs import Threads
from tests.support.removable import untold
from tests.support.waits import await_true

PLACE = Threads()

PAYLOADS = {
    "no end of its tags": b"\0nope",
    "no JSON": b"\0nope\ndata: 1\n\n",
    "no tags": b"\0[]\ndata: 1\n\n",
    "no list": b'\0{"only": "x"}\ndata: 1\n\n',
    "no text": b'\0{"exclude": [[]]}\ndata: 1\n\n',
    "too deep": b"\0" + b"[" * 100_000 + b"\ndata: 1\n\n",
    "nothing": b"",
    "a line": b"data: 1\n",
    "no event": b"\xff\xfe",
    "two": b"data: 1\n\ndata: 2\n\n",
    "more": b"data: 1\n\nevent: x\n",
    "other lines": b"data: 1\rid: 7\n\n",
    "no data": b"event: x\n\n",
    "an id": b"id: 7-7\ndata: 1\n\n",
    "a later id": b"data: 1\nid: 7-7\n\n",
    "a reset": b'event: reset\ndata: {"channel":"a"}\n\n',
    "a reset behind": b"data: 1\nevent:reset\n\n",
    "a reset with tags": b'\0{"only": ["x"]}\nevent: reset\ndata: {}\n\n',
    "no UTF-8": b"data: \xff\n\n",
    "no name": b"event: a\0b\nretry: 7\ndata: 1\n\n",
}
IDS = {
    "none": "",
    "a number": "7",
    "words": "newest",
    "lines": "7-7\ndata: x\n",
    "a line": "7-7\n",
    "other digits": "\uff17-7",
    "long": f"{'7' * 50}-7",
    "a place": "-",
}


@pytest.fixture
def broker():
    return MemoryBroker()


@pytest.fixture
def hub(broker):
    hub = Hub(broker=broker)
    yield hub
    hub.close()


def shape(events):
    return ["reset" if isinstance(e, Gap) else e.data for e in events]


def read_all(subscription):
    found = []
    while events := subscription.read(0):
        found += events
        assert len(found) < 100
    return found


def malformed(hub):
    """Return entries that nobody has stored, of each kind."""
    head = hub.head("a")
    entries = [Entry("7-7", head, payload) for payload in PAYLOADS.values()]
    entries += [Entry(id, head, b"data: x\n\n") for id in IDS.values()]
    entries += [Entry("7-7", id, b"data: x\n\n") for id in IDS.values()]
    return [*entries, Entry("7-7", "7-7", b"data: x\n\n")]


@pytest.mark.parametrize(
    ("id", "prev", "payload"),
    [
        (f"{'7' * 38}-7", "0", b"data: x\n\n"),
        ("7-7", f"{'7' * 38}-7", b"data: x\n\n"),
        ("7-7", "6-6", b"data: \n\n"),
        ("7-7", "6-6", b"event: x\nretry: 1\ndata: x\n\n"),
        ("7-7", "6-6", b"data: x\nevent: x\n\n"),
        ("7-7", "6-6", b"event: resets\ndata: x\n\n"),
        ("7-7", "6-6", b"event: a reset\ndata: event: reset\n\n"),
        ("7-7", "6-6", b"data: id: 7\n\n"),
        ("7-7", "6-6", b"data: a\0b\nevent: x\n\n"),
        ("7-7", "6-6", b"\0{}\ndata: x\n\n"),
        ("7-7", "6-6", b'\0{"only": [], "in": ["a"]}\ndata: x\n\n'),
        ("7-7", "6-6", "data: \u00fc\n\n".encode()),
    ],
)
def test_what_is_just_sound_is_taken(id, prev, payload):
    """It looks like something that is not."""
    assert flaw(Entry(id, prev, payload)) is None


@pytest.mark.parametrize(
    ("id", "prev", "payload", "problem"),
    [
        (f"{'7' * 39}-7", "0", b"data: x\n\n", "its id is"),
        ("7-7", f"{'7' * 39}-7", b"data: x\n\n", "its predecessor's id is"),
        ("7-7", "7-7", b"data: x\n\n", "names itself"),
        ("7-7", "6-6", b"\0{\ndata: x\n\n", "its tags are"),
        ("7-7", "6-6", b'\0{"only": [1]}\ndata: x\n\n', "its tags are"),
        ("7-7", "6-6", b'\0{"only": "x"}\ndata: x\n\n', "its tags are"),
        ("7-7", "6-6", b"data: x\n\n\n", "exactly one"),
        ("7-7", "6-6", b"\n\ndata: x\n\n", "exactly one"),
        ("7-7", "6-6", b"data: x\r\n\n", "exactly one"),
        ("7-7", "6-6", b"data: x", "exactly one"),
        ("7-7", "6-6", b"data:x\n\n", "no data"),
        ("7-7", "6-6", b"id\ndata: x\n\n", "second id"),
        ("7-7", "6-6", b"data: x\nid: 1\n\n", "second id"),
        ("7-7", "6-6", b"event: reset\ndata: x\n\n", "name is reset"),
        ("7-7", "6-6", b"data: x\nevent:reset\n\n", "name is reset"),
        ("7-7", "6-6", b"event: \0\ndata: x\n\n", "contains NUL"),
        ("7-7", "6-6", b"data: \xff\n\n", "not UTF-8"),
    ],
)
def test_a_flaw_is_named(id, prev, payload, problem):
    """By the first rule that it breaks."""
    assert problem in flaw(Entry(id, prev, payload))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TAGS = st.lists(TEXTS, max_size=2)


@given(
    TEXTS,
    st.none() | st.sampled_from(["e", "resets", "id", "data", "ü"]),
    st.none() | TEXTS,
    st.none() | TAGS,
    TAGS,
)
def test_what_a_hub_stores_is_sound(text, name, comment, only, exclude):
    """Whatever is published."""
    broker = MemoryBroker()
    hub = Hub(broker=broker)
    for data in (text, {"event: reset": text}, "id: 1\n\nevent: reset\r\n"):
        event = Event(data, event=name, comment=comment, retry=7)
        hub.publish("a", event, only=only, exclude=exclude)
    assert [flaw(entry) for entry in broker.read("a", "0").entries] == [None] * 3
    hub.close()


def test_what_is_told_is_dropped(hub, caplog):
    """It is said, once; the channel is read anew, and nobody gets a thing of it."""
    begun = [hub.subscribe(*names, tags=["x"]) for names in ("a", "ab", "*")]
    assert [s.read(0) for s in begun] == [[], [], []]
    hub.publish("a", "0")
    assert [shape(read_all(s)) for s in begun] == [["0"]] * 3
    for entry in malformed(hub):
        hub.sink.deliver("a", entry)
        assert [read_all(s) for s in begun] == [[], [], []], entry
    hub.publish("a", "1")
    assert [shape(read_all(s)) for s in begun] == [["1"]] * 3

    def lines():
        text = "an entry of 'a' is not an event of a hub"
        return [r for r in caplog.records if text in r.getMessage()]

    await_true(lines)
    assert [line.levelno for line in lines()] == [logging.ERROR]


def test_what_came_in_place_of_another_is_read(hub, broker):
    """The event whose message was damaged on its way is delivered."""
    subscription = hub.subscribe("a")
    assert subscription.read(0) == []
    with untold(hub):
        hub.publish("a", "1")
    hub.sink.deliver("a", Entry("7-7", "0", b"\0nope"))
    assert shape(subscription.read(5)) == ["1"]


def test_a_chain_that_is_not_its_own(hub):
    """It is well formed, and follows nothing: what is stored is read, and no more."""
    subscription = hub.subscribe("a")
    assert subscription.read(0) == []
    hub.publish("a", "0")
    assert shape(read_all(subscription)) == ["0"]
    hub.sink.deliver("a", Entry("7-7", "6-6", b"data: forged\n\n"))
    assert read_all(subscription) == []
    hub.publish("a", "1")
    assert shape(read_all(subscription)) == ["1"]


@pytest.mark.parametrize("name", ["a b", "a\n", "", "x" * 300, "a:*"])
def test_a_name_that_is_none(hub, name):
    """A pattern's subscribers hear of no channel that cannot be."""
    subscription = hub.subscribe("#")
    assert subscription.read(0) == []
    hub.sink.deliver(name, Entry("7-7", "6-6", b"data: forged\n\n"))
    assert read_all(subscription) == []
    assert hub.stats()["channels"] == 0


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_what_is_stored_is_passed(hub, broker, payload, caplog):
    """With a reset, by whoever listens and whoever resumes, wherever they were."""
    live = hub.subscribe("a"), hub.subscribe("a", "b")
    assert [s.read(0) for s in live] == [[], []]
    start = hub.head("a")
    first = hub.publish("a", "1")
    (bad,) = broker.publish([("a", payload)])
    assert [shape(read_all(s)) for s in live] == [["1", "reset"]] * 2
    second = hub.publish("a", "2")
    assert [shape(read_all(s)) for s in live] == [["2"]] * 2
    (last,) = broker.publish([("a", payload)])
    for after, expected in (
        (start, ["1", "reset", "2", "reset"]),
        (first, ["reset", "2", "reset"]),
        (bad, ["2", "reset"]),
        (second, ["reset"]),
        (last, []),
    ):
        resumed = hub.subscribe("a", after=after, tags=["x"])
        found = read_all(resumed)
        assert shape(found) == expected
        assert not found or found[-1].id == last
        resumed.close()
    await_true(lambda: "is not an event of a hub" in caplog.text)


def test_nothing_but_what_is_none(hub, broker):
    """A channel of it alone ends in a reset, and goes on with the first event."""
    broker.publish([("a", b"\0nope")] * 3)
    subscription = hub.subscribe("a", after="f-f")
    assert shape(read_all(subscription)) == ["reset"]
    hub.publish("a", {"n": 1})
    (event,) = subscription.read(5)
    assert json.loads(event.data) == {"n": 1}


@pytest.mark.parametrize("data", ["x" * (5 << 20), "x\n" * (3 << 19)], ids=len)
def test_an_event_is_as_large_as_its_hub_allows(data):
    """Who publishes it was told that it is stored: it is decoded, too."""
    with closing(Hub(max_payload=32 << 20)) as hub:
        one = hub.subscribe("a", after="start")
        newest = hub.subscribe("a", after="start", conflate=type)
        hub.publish("a", data)
        assert [e.data == data for s in (one, newest) for e in s.read(5)] == [True] * 2


def test_a_large_kick_hides_no_other(hub):
    """It is one of the hub's own, whatever its size."""
    kick = Kick(None, ["x" * (5 << 20)])
    assert decoded(Entry("7-7", "0", kick.encoded("other")))[0].tags == kick.tags


def test_who_cannot_be_read_is_named(hub, broker, monkeypatch, caplog):
    """Once: the broker is up, and their readers would get keepalives for ever."""

    def read(channel, after, limit=1000):
        raise Unavailable("no stream")

    monkeypatch.setattr(broker, "read", read)
    for _ in range(2):
        assert hub.subscribe("a", after="start").read(0) == []
    await_true(lambda: "'a' cannot be read: no stream" in caplog.text)
    journal().flush()
    assert caplog.text.count("cannot be read") == 1


def test_a_hub_that_closes_names_nobody(hub, caplog):
    """A read under way finds a broker that is closed, which is no news."""
    hub.close()
    hub.windows.say_unreadable(CONTROL, Unavailable("memory: is closed"))
    journal().flush()
    assert "cannot be read" not in caplog.text


def test_names_without_end_hide_no_line_of_the_hub_s_own(hub, caplog):
    """Clients choose names, and so how much is said of them."""
    for number in range(MOST_SAID + 1):
        hub.sink.deny(f"n{number}", "no")
    hub.sink.deny(CONTROL, "no")
    await_true(lambda: "kicks of other processes are not received" in caplog.text)
    assert "'n99'" in caplog.text
    assert "'n100'" not in caplog.text


def test_a_name_that_no_hub_has_is_named(caplog):
    """Others may write to the engine: to whatever channel they like."""
    broker = MemoryBroker()
    with closing(Hub(broker=broker)) as hub, closing(hub.subscribe("#")) as reader:
        assert reader.read(0) == []
        hub.sink.deliver("no\nchannel", Entry("2-2", "1-1", b"data: 1\n\n"))
        assert reader.read(0) == []
    journal().flush()
    assert "the channel's name is invalid" in caplog.text
