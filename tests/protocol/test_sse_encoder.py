"""`Event` and what a generator may yield to an event stream.

Spec: https://html.spec.whatwg.org/multipage/server-sent-events.html §9.2.5. A case
that is written goes back through the decoder.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import itertools
import json
import pickle
import re
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from syncstream.protocol.sse import (
    END_ID,
    Decoder,
    Event,
    comment,
    encoder,
    ends_blank,
    passer,
    tail_after,
    without_blank,
)

MANY = settings(max_examples=300)


class Colour(enum.Enum):
    RED = "red"


class Word(str, enum.Enum):
    A = "a"


class Number(enum.IntEnum):
    ONE = 1


class Text(str):
    """Text that prints as something else."""

    __slots__ = ()

    def __str__(self) -> str:
        return "x\n\nevent: forged"

    def __format__(self, spec: str) -> str:
        return str(self)


class Whole(int):
    """A number that prints as something else."""

    __slots__ = ()

    def __str__(self) -> str:
        return "x\n\nevent: forged"

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return str(self)


# Construction


def refused(name: str, error: type, message: str, **fields: Any) -> Any:
    return pytest.param(fields, error, message, id=name)


# fmt: off
REFUSED = [
    refused("nothing", ValueError, "an event needs data, event, id, retry or comment"),
    refused("data bytes no UTF-8", ValueError,
            r"data given as bytes must be UTF-8: .* at offset 1, got b'a\xff'",
            data=b"a\xff"),
    refused("data bytearray no UTF-8", ValueError, "data given as bytes must be UTF-8",
            data=bytearray(b"\xff")),
    refused("data cut off", ValueError, r"at offset 0, got b'\xe2\x82'",
            data=b"\xe2\x82"),
    refused("data lone surrogate", ValueError, r"data cannot .*, got 'a\ud800'",
            data="a\ud800"),
    refused("event CR", ValueError, r"event must not contain CR, .*, got 'a\rb'",
            event="a\rb"),
    refused("event LF", ValueError, r"event must not contain CR, .*, got 'a\nb'",
            event="a\nb"),
    refused("event LF at the end", ValueError, r"event must not .*, got 'a\n'",
            event="a\n"),
    refused("event CR LF", ValueError, r"event must not .*, got '\r\n'", event="\r\n"),
    refused("event NUL", ValueError, r"event must not .*, got 'a\x00b'", event="a\0b"),
    refused("event lone surrogate", ValueError, r"event cannot .*, got '\udfff'",
            event="\udfff"),
    refused("event int", TypeError, "event must be str, got 5", event=5),
    refused("event bool", TypeError, "event must be str, got True", event=True),
    refused("event list", TypeError, r"event must be str, got ['a']", event=["a"]),
    refused("id CR", ValueError, r"id must not contain CR, LF or NUL, got 'a\rb'",
            id="a\rb"),
    refused("id LF", ValueError, r"id must not contain CR, LF or NUL, got 'a\nb'",
            id="a\nb"),
    refused("id NUL", ValueError, r"id must not contain CR, LF or NUL, got '\x00'",
            id="\0"),
    refused("id lone surrogate", ValueError, r"id cannot .*, got '\ud800'",
            id="\ud800"),
    refused("id reserved", ValueError, "id 'syncstream-end' is reserved", id=END_ID),
    refused("id reserved, with spaces", ValueError, "id 'syncstream-end' is reserved",
            id=f" {END_ID}\t"),
    refused("event bytes", TypeError, "event must be str, got b'a'", event=b"a"),
    refused("comment bytes", TypeError, "comment must be str, got b'a'", comment=b"a"),
    refused("id True", TypeError, "id must be str or int, got True", id=True),
    refused("id False", TypeError, "id must be str or int, got False", id=False),
    refused("id float", TypeError, "id must be str or int, got 1.5", id=1.5),
    refused("id bytes", TypeError, "id must be str or int, got b'1'", id=b"1"),
    refused("id UUID", TypeError, "id must be str or int, got UUID",
            id=uuid.UUID(int=1)),
    refused("retry negative", ValueError, "retry must be 0 or more, got -1", retry=-1),
    refused("retry endless", ValueError, "retry must have at most 15 digits",
            retry=10**5000),
    refused("retry True", TypeError,
            "retry must be whole milliseconds as an int, got True", retry=True),
    refused("retry False", TypeError, "retry must be .* got False", retry=False),
    refused("retry float", TypeError, "retry must be .* got 3.0", retry=3.0),
    refused("retry str", TypeError, "retry must be .* got '3000'", retry="3000"),
    refused("retry timedelta", TypeError, "retry must be .* got datetime.timedelta",
            retry=datetime.timedelta(seconds=3)),
    refused("comment int", TypeError, "comment must be str, got 5", comment=5),
    refused("comment lone surrogate", ValueError, r"comment cannot .*, got '\ud800'",
            comment="\ud800"),
]
# fmt: on


@pytest.mark.parametrize(("fields", "error", "message"), REFUSED)
def test_refuses_where_it_is_made(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    """What the wire cannot carry is refused, with the argument's name and repr."""
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(error, match=pattern) as caught:
        Event(**fields)
    assert type(caught.value) is error


def test_only_data_is_positional() -> None:
    """All but ``data`` goes by name, and there are no other names."""
    with pytest.raises(TypeError):
        Event("a", "name")  # type: ignore[misc]
    with pytest.raises(TypeError):
        Event("a", type="name")  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["data", "event", "id", "retry", "comment", "other"])
def test_is_immutable(name: str) -> None:
    """No attribute can be set, removed or added."""
    event = Event("a", event="e", id="1", retry=5, comment="c")
    with pytest.raises((AttributeError, TypeError)):
        setattr(event, name, "b")
    with pytest.raises((AttributeError, TypeError)):
        delattr(event, name)
    assert event == Event("a", event="e", id="1", retry=5, comment="c")


def test_the_class_makes_comments_and_an_event_has_its_text() -> None:
    """``Event.comment("…")`` is an event; ``.comment`` of an event is its text."""
    event = Event.comment("keepalive")
    assert event == Event(comment="keepalive")
    assert event.encode() == b": keepalive\n\n"
    assert (event.comment, Event("a").comment) == ("keepalive", None)
    assert dataclasses.replace(event, data="b") == Event("b", comment="keepalive")
    assert dataclasses.asdict(event)["comment"] == "keepalive"
    with pytest.raises(TypeError, match="comment must be str, got 5"):
        Event.comment(5)  # type: ignore[arg-type]


def test_fields_are_kept() -> None:
    """The fields are attributes; those not given are None; the id is text."""
    event = Event({"a": 1}, event="e", id=5, retry=0, comment="c")
    assert (event.data, event.event, event.id) == ({"a": 1}, "e", "5")
    assert (event.retry, event.comment) == (0, "c")
    event = Event("")
    assert (event.data, event.event, event.id) == ("", None, None)
    assert (event.retry, event.comment) == (None, None)


# fmt: off
EQUAL = [
    pytest.param(Event(id=5), Event(id="5"), id="id int"),
    pytest.param(Event(id=-5), Event(id="-5"), id="id negative"),
    pytest.param(Event(b"a"), Event("a"), id="bytes"),
    pytest.param(Event(bytearray(b"\xc3\xa9")), Event("é"), id="bytearray"),
    pytest.param(Event(memoryview(b"a")), Event("a"), id="memoryview"),
    pytest.param(Event(Word.A), Event("a"), id="str enum"),
    pytest.param(Event("x", retry=Number.ONE), Event("x", retry=1), id="int enum"),
]
# fmt: on


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_events(one: Event, other: Event) -> None:
    """Events with the same fields are equal, and have the same hash and bytes."""
    assert one == other
    assert hash(one) == hash(other)
    assert one.encode() == other.encode()


def test_different_events() -> None:
    """Any field makes a difference, also None and ""; other types never are equal."""
    events: list[Any] = [
        Event("a"),
        Event("a\n"),
        Event("a", event="e"),
        Event("a", event=""),
        Event("a", id="e"),
        Event("a", id=""),
        Event("a", retry=0),
        Event("a", comment=""),
        Event(comment=""),
        Event(1),
        Event("1"),
        "a",
        None,
    ]
    for i, one in enumerate(events):
        for other in events[i + 1 :]:
            assert one != other


def test_hash_needs_data_that_has_one() -> None:
    """An event is as hashable as its data is."""
    assert len({Event("a"), Event("a"), Event("b")}) == 2
    with pytest.raises(TypeError, match="unhashable"):
        hash(Event({"a": 1}))


@pytest.mark.parametrize(
    "event",
    [
        Event("a\nb", event="e", id=5, retry=3000, comment="c"),
        Event(""),
        Event({"a": [1, 2]}),
        Event(comment="keepalive"),
        Decoder().feed(f"id: {END_ID}\ndata: a\n\n".encode())[0],
    ],
    ids=["all fields", "empty", "json", "comment", "decoded"],
)
def test_survives_pickle_and_copy(event: Event) -> None:
    """Pickle of every protocol, `copy` and `deepcopy` give an equal event."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        if protocol >= 2:  # __slots__ need it
            assert pickle.loads(pickle.dumps(event, protocol)) == event
    assert copy.copy(event) == event
    assert copy.deepcopy(event) == event
    assert repr(event) == repr(copy.copy(event))


def test_replace() -> None:
    """`dataclasses.replace` makes a changed event, and validates it."""
    event = Event("a", id=1)
    assert dataclasses.replace(event, id=2) == Event("a", id=2)
    with pytest.raises(ValueError, match="id must not contain"):
        dataclasses.replace(event, id="\n")


def test_subclass_text_is_its_characters() -> None:
    """A str or int subclass is written as its value, never as what it prints.

    Python formats a ``class Word(str, Enum)`` as "Word.A" (before 3.12 also where
    the value was validated), and one that prints a line end would forge fields.
    """
    event = Event(
        Text("d"), event=Text("e"), id=Text("i"), retry=Whole(5), comment=Text("c")
    )
    assert event.encode() == b": c\nid: i\nevent: e\nretry: 5\ndata: d\n\n"
    assert Event(id=Whole(7)).encode() == b"id: 7\n\n"
    assert encoder()(Text("d")) == b"data: d\n\n"
    event = Event(Word.A, event=Word.A, id=Number.ONE, retry=Number.ONE, comment=Word.A)
    assert event.encode() == b": a\nid: 1\nevent: a\nretry: 1\ndata: a\n\n"
    assert type(event.data) is str
    assert type(event.event) is str
    assert type(event.retry) is int


# Bytes


def written(name: str, event: Event, wire: bytes | str) -> Any:
    return pytest.param(
        event, wire if isinstance(wire, bytes) else wire.encode(), id=name
    )


# fmt: off
WRITTEN = [
    written("the seed's full event",
            Event("Full event data", id="evt-1", event="custom_event", retry=3000),
            b"id: evt-1\nevent: custom_event\nretry: 3000\ndata: Full event data\n\n"),
    written("wire order", Event("d", comment="c", retry=1, event="e", id="i"),
            b": c\nid: i\nevent: e\nretry: 1\ndata: d\n\n"),
    written("text", Event("hello"), b"data: hello\n\n"),
    written("empty text", Event(""), b"data: \n\n"),
    written("leading space", Event(" a"), b"data:  a\n\n"),
    written("trailing space", Event("a "), b"data: a \n\n"),
    written("LF", Event("a\nb"), b"data: a\ndata: b\n\n"),
    written("CR", Event("a\rb"), b"data: a\ndata: b\n\n"),
    written("CR LF", Event("a\r\nb"), b"data: a\ndata: b\n\n"),
    written("LF CR", Event("a\n\rb"), b"data: a\ndata: \ndata: b\n\n"),
    written("LF only", Event("\n"), b"data: \ndata: \n\n"),
    written("LF at the end", Event("a\n"), b"data: a\ndata: \n\n"),
    written("LF at the start", Event("\na"), b"data: \ndata: a\n\n"),
    written("blank lines", Event("a\n\n\nb"), b"data: a\ndata: \ndata: \ndata: b\n\n"),
    written("U+2028", Event("a\u2028b"), "data: a\u2028b\n\n"),
    written("U+2029", Event("a\u2029b"), "data: a\u2029b\n\n"),
    written("U+0085", Event("a\x85b"), "data: a\x85b\n\n"),
    written("VT, FF, FS, GS, RS", Event("a\v\f\x1c\x1d\x1eb"),
            b"data: a\x0b\x0c\x1c\x1d\x1eb\n\n"),
    written("NUL in data", Event("a\0b"), b"data: a\0b\n\n"),
    written("NUL in a comment", Event(comment="\0"), b": \0\n\n"),
    written("UTF-8", Event("é€😀", event="é", id="€", comment="😀"),
            ": 😀\nid: €\nevent: é\ndata: é€😀\n\n"),
    written("data like a field", Event("x\n\nevent: forged"),
            b"data: x\ndata: \ndata: event: forged\n\n"),
    written("comment like a field", Event(comment="x\n\ndata: forged"),
            b": x\n: \n: data: forged\n\n"),
    written("bytes", Event(b"a\nb"), b"data: a\ndata: b\n\n"),
    written("bytearray", Event(bytearray("é", "utf-8")), "data: é\n\n"),
    written("memoryview", Event(memoryview(b"abc")[1:]), b"data: bc\n\n"),
    written("event only", Event(event="e"), b"event: e\n\n"),
    written("id only", Event(id="1"), b"id: 1\n\n"),
    written("empty id", Event(id=""), b"id: \n\n"),
    written("empty event", Event("a", event=""), b"event: \ndata: a\n\n"),
    written("id int", Event("a", id=5), b"id: 5\ndata: a\n\n"),
    written("id 0", Event("a", id=0), b"id: 0\ndata: a\n\n"),
    written("id negative", Event("a", id=-1), b"id: -1\ndata: a\n\n"),
    written("id with a colon", Event("a", id=":1"), b"id: :1\ndata: a\n\n"),
    written("retry only", Event(retry=3000), b"retry: 3000\n\n"),
    written("retry 0", Event(retry=0), b"retry: 0\n\n"),
    written("retry next to JSON", Event({"error": "x"}, event="error", retry=1000),
            b'event: error\nretry: 1000\ndata: {"error":"x"}\n\n'),
    written("comment", Event(comment="keepalive"), b": keepalive\n\n"),
    written("empty comment", Event(comment=""), b": \n\n"),
    written("comment of two lines", Event(comment="a\r\nb\rc"), b": a\n: b\n: c\n\n"),
    written("comment with LF at the end", Event(comment="a\n"), b": a\n: \n\n"),
    written("object", Event({"temperature": 21.5}), b'data: {"temperature":21.5}\n\n'),
    written("list", Event([1, "a", None]), b'data: [1,"a",null]\n\n'),
    written("empty object", Event({}), b"data: {}\n\n"),
    written("empty list", Event([]), b"data: []\n\n"),
    written("int", Event(0), b"data: 0\n\n"),
    written("float", Event(1.5), b"data: 1.5\n\n"),
    written("True", Event(True), b"data: true\n\n"),
    written("False", Event(False), b"data: false\n\n"),
    written("line ends in JSON", Event({"a": "b\r\nc"}),
            rb'data: {"a":"b\r\nc"}' + b"\n\n"),
]
# fmt: on


@pytest.mark.parametrize(("event", "wire"), WRITTEN)
def test_writes(event: Event, wire: bytes) -> None:
    """An event is written in exactly these bytes, by all three ways to ask for it."""
    assert event.encode() == wire
    assert bytes(event) == wire
    assert str(event) == wire.decode()
    if event.event is None or event.data is not None:
        assert encoder()(event) == wire
    assert ends_blank(wire[-4:])


@pytest.mark.parametrize(("event", "wire"), WRITTEN)
def test_is_read_back(event: Event, wire: bytes) -> None:
    """What was written is decoded to the same event, its line ends as LF."""
    decoder = Decoder()
    events = decoder.feed(wire)
    assert decoder.retry == event.retry
    assert decoder.last_event_id == event.id
    if event.data is None:
        assert events == []
        return
    ((data, name, id),) = [(e.data, e.event, e.id) for e in events]
    assert (name, id) == (event.event or None, event.id)
    if isinstance(event.data, str):
        assert data == re.sub("\r\n?", "\n", event.data)
    else:
        assert json.loads(data) == event.data


# .json()


@pytest.mark.parametrize(
    ("data", "value"),
    [
        ("1", 1),
        ('{"a":\n1}', {"a": 1}),
        (b"[]", []),
        ("null", None),
        ('"a"', "a"),
        ({"a": (1, 2)}, {"a": [1, 2]}),
        ({1: 2}, {"1": 2}),
        (float("nan"), None),
        (uuid.UUID(int=0), "00000000-0000-0000-0000-000000000000"),
        (0, 0),
        (False, False),
    ],
    ids=repr,
)
def test_json_is_what_a_receiver_gets(data: Any, value: Any) -> None:
    """`Event.json` decodes the data as its receiver would."""
    event = Event(data)
    assert event.json() == value
    (received,) = Decoder().feed(event.encode())
    assert received.json() == value


@pytest.mark.parametrize("event", [Event(id=1), Event("hello"), Event(""), Event("{")])
def test_json_of_no_json(event: Event) -> None:
    """No data, or data that is not JSON, is a ValueError."""
    with pytest.raises(ValueError, match=r"no data|Expecting"):
        event.json()


# What a generator may yield


class ClassLevel:
    """The seed documents' custom event: class-level data and event, nothing else."""

    data = "Custom event"
    event = "custom"


class Fields:
    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class Slotted:
    __slots__ = ("data",)

    def __init__(self) -> None:
        self.data = {"a": 1}


class Computed:
    @property
    def data(self) -> str:
        return "computed"


class Sensor(collections.namedtuple("Sensor", "data id")):
    __slots__ = ()


class Record(Mapping[str, Any]):
    """A mapping that is no dict."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


@dataclasses.dataclass
class Point:
    x: int
    y: Any = None


@dataclasses.dataclass
class Message:
    data: Any
    id: int = 7
    other: str = "not a field"


class Derived(Event):
    """Somebody's subclass."""


UUID = uuid.UUID(int=1)
NOON = datetime.datetime(2026, 1, 2, 12, tzinfo=datetime.timezone.utc)


def yields(name: str, item: Any, wire: bytes | str | None) -> Any:
    wire = wire.encode() if isinstance(wire, str) else wire
    return pytest.param(item, wire, id=name)


# fmt: off
YIELDS = [
    # Events
    yields("Event", Event("a", id=1), b"id: 1\ndata: a\n\n"),
    yields("Event of JSON", Event({"a": 1}), b'data: {"a":1}\n\n'),
    yields("Event without data", Event(comment="c"), b": c\n\n"),
    yields("Event subclass", Derived("a", event="e"), b"event: e\ndata: a\n\n"),

    # Text
    yields("str", "hello", b"data: hello\n\n"),
    yields("str empty", "", b"data: \n\n"),
    yields("str of two lines", "a\nb", b"data: a\ndata: b\n\n"),
    yields("str with CR", "a\rb", b"data: a\ndata: b\n\n"),
    yields("str with CR LF", "a\r\nb", b"data: a\ndata: b\n\n"),
    yields("str with LF at the end", "a\n", b"data: a\ndata: \n\n"),
    yields("str with U+2028", "a\u2028b", "data: a\u2028b\n\n"),
    yields("str like a field", "event: e", b"data: event: e\n\n"),
    yields("str like a framed event", "data: a\n\n",
           b"data: data: a\ndata: \ndata: \n\n"),
    yields("str subclass that prints otherwise", Text("a"), b"data: a\n\n"),
    yields("str enum", Word.A, b"data: a\n\n"),

    # Bytes are framed already
    yields("bytes", b"data: a\n\n", b"data: a\n\n"),
    yields("bytes unframed", b"a", b"a"),
    yields("bytes not UTF-8", b"\xff", b"\xff"),
    yields("bytes half an event", b"data: a\n", b"data: a\n"),
    yields("bytearray", bytearray(b": c\n\n"), b": c\n\n"),
    yields("memoryview", memoryview(b"x: c\n\n")[1:], b": c\n\n"),
    yields("memoryview with a stride", memoryview(b":_\n_\n_")[::2], b":\n\n"),

    # Checkpoints
    yields("None", None, None),
    yields("b''", b"", None),
    yields("bytearray empty", bytearray(), None),
    yields("memoryview empty", memoryview(b""), None),

    # Mappings of event fields
    yields("mapping of data", {"data": "a"}, b"data: a\n\n"),
    yields("the seed's dict(data=i)", dict(data=1), b"data: 1\n\n"),  # noqa: C408
    yields("mapping of data 0", {"data": 0}, b"data: 0\n\n"),
    yields("mapping of empty data", {"data": ""}, b"data: \n\n"),
    yields("mapping of data and event and id",
           {"data": "Event 2", "event": "type2", "id": "2"},
           b"id: 2\nevent: type2\ndata: Event 2\n\n"),
    yields("mapping of all fields",
           {"data": "d", "event": "e", "id": 1, "retry": 5, "comment": "c"},
           b": c\nid: 1\nevent: e\nretry: 5\ndata: d\n\n"),
    yields("mapping of JSON data and retry=1000", {"data": {"a": 1}, "retry": 1000},
           b'retry: 1000\ndata: {"a":1}\n\n'),
    yields("mapping of bytes data", {"data": b"a"}, b"data: a\n\n"),
    yields("mapping with data None", {"data": None, "id": 5}, b"id: 5\n\n"),
    yields("mapping with None fields", {"data": "a", "event": None, "id": None},
           b"data: a\n\n"),
    yields("MappingProxyType", types.MappingProxyType({"data": "a", "id": 1}),
           b"id: 1\ndata: a\n\n"),
    yields("UserDict", collections.UserDict(data="a", event="e"),
           b"event: e\ndata: a\n\n"),
    yields("OrderedDict", collections.OrderedDict(data="a"), b"data: a\n\n"),
    yields("defaultdict", collections.defaultdict(int, data="a"), b"data: a\n\n"),
    yields("own Mapping", Record(data="a", id=1), b"id: 1\ndata: a\n\n"),

    # Other mappings are JSON
    yields("mapping with another key", {"data": "a", "type": "b"},
           b'data: {"data":"a","type":"b"}\n\n'),
    yields("mapping with Data", {"Data": "a"}, b'data: {"Data":"a"}\n\n'),
    yields("mapping of an event alone", {"event": "x"}, b'data: {"event":"x"}\n\n'),
    yields("mapping of id and retry", {"id": 1, "retry": 2},
           b'data: {"id":1,"retry":2}\n\n'),
    yields("mapping of a comment", {"comment": "c"}, b'data: {"comment":"c"}\n\n'),
    yields("mapping empty", {}, b"data: {}\n\n"),
    yields("mapping with int keys", {1: "a", "data": 2},
           b'data: {"1":"a","data":2}\n\n'),
    yields("MappingProxyType of other keys", types.MappingProxyType({"a": 1}),
           b'data: {"a":1}\n\n'),
    yields("UserDict of other keys", collections.UserDict(a=1), b'data: {"a":1}\n\n'),
    yields("UserDict empty", collections.UserDict(), b"data: {}\n\n"),
    yields("OrderedDict of other keys", collections.OrderedDict(b=1, a=2),
           b'data: {"b":1,"a":2}\n\n'),
    yields("defaultdict without data", collections.defaultdict(str, a=1),
           b'data: {"a":1}\n\n'),
    yields("own Mapping of other keys", Record(a=1, data=2),
           b'data: {"a":1,"data":2}\n\n'),

    # Objects with .data
    yields("class-level data and event", ClassLevel(),
           b"event: custom\ndata: Custom event\n\n"),
    yields("instance attributes", Fields(data="a", id=1, retry=5, comment="c"),
           b": c\nid: 1\nretry: 5\ndata: a\n\n"),
    yields("object with .data alone", Fields(data={"a": 1}), b'data: {"a":1}\n\n'),
    yields("object with .data None", Fields(data=None, id=1), b"id: 1\n\n"),
    yields("object with other attributes", Fields(data="a", name="b", type="c"),
           b"data: a\n\n"),
    yields("object with slots", Slotted(), b'data: {"a":1}\n\n'),
    yields("object with a property", Computed(), b"data: computed\n\n"),
    yields("SimpleNamespace", types.SimpleNamespace(data="a", event="e"),
           b"event: e\ndata: a\n\n"),
    yields("dataclass with data", Message("a"),
           b'data: {"data":"a","id":7,"other":"not a field"}\n\n'),
    yields("namedtuple with data", Sensor({"t": 1}, 3), b'id: 3\ndata: {"t":1}\n\n'),
    yields("UserString", collections.UserString("a"), b"data: a\n\n"),
    yields("UserList", collections.UserList([1, 2]), b"data: [1,2]\n\n"),

    # JSON
    yields("int", 5, b"data: 5\n\n"),
    yields("zero", 0, b"data: 0\n\n"),
    yields("float", 1.5, b"data: 1.5\n\n"),
    yields("True", True, b"data: true\n\n"),
    yields("False", False, b"data: false\n\n"),
    yields("big int", 2**70, b"data: 1180591620717411303424\n\n"),
    yields("big int within", {"a": [-(2**64)]},
           b'data: {"a":[-18446744073709551616]}\n\n'),
    yields("NaN", float("nan"), b"data: null\n\n"),
    yields("infinities", [float("inf"), float("-inf")], b"data: [null,null]\n\n"),
    yields("NaN within", {"a": float("nan"), "b": 1}, b'data: {"a":null,"b":1}\n\n'),
    yields("list", [1, "a", None, True], b'data: [1,"a",null,true]\n\n'),
    yields("list empty", [], b"data: []\n\n"),
    yields("tuple", (1, (2, 3)), b"data: [1,[2,3]]\n\n"),
    yields("nested", {"a": {"b": [{}, []]}}, b'data: {"a":{"b":[{},[]]}}\n\n'),
    yields("text within", {"a": "é\u2028\n"}, 'data: {"a":"é\u2028\\n"}\n\n'),
    yields("keys not str", {1: 1, None: 2, 1.5: 4, False: 5},
           b'data: {"1":1,"null":2,"1.5":4,"false":5}\n\n'),
    yields("dataclass", Point(1), b'data: {"x":1,"y":null}\n\n'),
    yields("dataclass in a dataclass", Point(1, Point(2, [Point(3)])),
           b'data: {"x":1,"y":{"x":2,"y":[{"x":3,"y":null}]}}\n\n'),
    yields("dataclass of NaN", Point(1, float("nan")), b'data: {"x":1,"y":null}\n\n'),
    yields("datetime", NOON, b'data: "2026-01-02T12:00:00+00:00"\n\n'),
    yields("naive datetime", datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
           b'data: "2026-01-02T03:04:05.000006"\n\n'),
    yields("date", datetime.date(2026, 1, 2), b'data: "2026-01-02"\n\n'),
    yields("time", datetime.time(1, 2), b'data: "01:02:00"\n\n'),
    yields("UUID", UUID, b'data: "00000000-0000-0000-0000-000000000001"\n\n'),
    yields("Decimal", decimal.Decimal("1.50"), b'data: "1.50"\n\n'),
    yields("Enum", Colour.RED, b'data: "red"\n\n'),
    yields("IntEnum", Number.ONE, b"data: 1\n\n"),
    yields("all of them within",
           {"w": NOON, "u": [UUID], "d": decimal.Decimal(2), "e": Colour.RED,
            "p": Point(Number.ONE, types.MappingProxyType({"a": Word.A}))},
           b'data: {"w":"2026-01-02T12:00:00+00:00",'
           b'"u":["00000000-0000-0000-0000-000000000001"],"d":"2","e":"red",'
           b'"p":{"x":1,"y":{"a":"a"}}}\n\n'),
    yields("an Event within", [Event("a")],
           b'data: [{"data":"a","event":null,"id":null,"retry":null,'
           b'"comment":null}]\n\n'),
]
# fmt: on


@pytest.mark.parametrize(("item", "wire"), YIELDS)
def test_yield(item: Any, wire: bytes | None) -> None:
    """Each kind of item is written by the rule of its row; a checkpoint is None."""
    chunk = encoder()(item)
    assert chunk == wire
    assert chunk is None or type(chunk) is bytes


@pytest.mark.parametrize(("item", "wire"), YIELDS)
def test_yield_is_one_event(item: Any, wire: bytes | None) -> None:
    """What is not bytes or a checkpoint is exactly one block, and decodes."""
    if wire is None or isinstance(item, (bytes, bytearray, memoryview)):
        return
    assert wire.count(b"\n\n") == 1
    assert wire.endswith(b"\n\n")
    has_data = b"data:" in wire
    assert len(Decoder().feed(wire)) == has_data


def test_class_with_data_is_no_event() -> None:
    """The class itself, forgotten to be called, is refused, not sent."""
    with pytest.raises(TypeError, match=r"cannot encode builtins\.type as"):
        encoder()(ClassLevel)


def raising(name: str, item: Any, error: type, message: str) -> Any:
    return pytest.param(item, error, message, id=name)


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)

# fmt: off
RAISING = [
    raising("object", object(), TypeError, "cannot encode builtins.object as JSON"),
    raising("set", {1}, TypeError, "cannot encode builtins.set as JSON"),
    raising("set within", {"a": {1}}, TypeError, "cannot encode builtins.set as JSON"),
    raising("set as data", {"data": {1}}, TypeError, "builtins.set as JSON"),
    raising("set in an Event", Event({1}), TypeError, "builtins.set as JSON"),
    raising("complex", 1j, TypeError, "cannot encode builtins.complex as JSON"),
    raising("function", len, TypeError, "as JSON"),
    raising("generator", (x for x in "a"), TypeError, "builtins.generator as JSON"),
    raising("range", range(3), TypeError, "builtins.range as JSON"),
    raising("bytes within", [b"a"], TypeError, "builtins.bytes as JSON"),
    raising("tuple key", {(1, 2): 3}, TypeError, "keys must be"),
    raising("UUID key", {UUID: 3}, TypeError, "keys must be"),
    raising("exception", ValueError("x"), TypeError, "builtins.ValueError as JSON"),
    raising("circle", CIRCLE, ValueError, "Circular reference"),
    raising("lone surrogate", "\ud800", ValueError, "surrogates not allowed"),
    raising("lone surrogate and LF", "\n\ud800", ValueError, "surrogates not allowed"),
    raising("lone surrogate within", ["\ud800"], ValueError, "surrogates not allowed"),
    raising("lone surrogate in a dict", {"a": "\ud800"}, ValueError,
            "surrogates not allowed"),
    raising("lone surrogate as a key", {"\ud800": 1}, ValueError,
            "surrogates not allowed"),
    raising("lone surrogate as data", {"data": "\ud800"}, ValueError, "data cannot"),
    raising("data bytes no UTF-8", {"data": b"\xff"}, ValueError, "must be UTF-8"),
    raising("data None and nothing else", {"data": None}, ValueError,
            "an event needs data, event, id, retry or comment"),
    raising("wrong event in a mapping", {"data": 1, "event": 5}, TypeError,
            "event must be str, got 5"),
    raising("wrong id in a mapping", {"data": 1, "id": 1.5}, TypeError,
            "id must be str or int, got 1.5"),
    raising("wrong retry in a mapping", {"data": 1, "retry": "5"}, TypeError,
            "retry must be"),
    raising("LF in an id in a mapping", {"data": 1, "id": "a\nb"}, ValueError,
            r"id must not contain CR, LF or NUL, got 'a\nb'"),
    raising("wrong .event", Fields(data=1, event=5), TypeError,
            "event must be str, got 5"),
    raising("wrong .id", Fields(data=1, id=UUID), TypeError,
            "id must be str or int, got UUID"),
    raising("wrong .retry", Fields(data=1, retry=1.5), TypeError,
            "retry must be whole milliseconds as an int, got 1.5"),
    raising("wrong .comment", Fields(data=1, comment=5), TypeError,
            "comment must be str, got 5"),
    raising("LF in .event", Fields(data=1, event="a\nb"), ValueError,
            "event must not contain CR, LF or NUL"),
    raising("reserved .id", Fields(data=1, id=END_ID), ValueError, "is reserved"),
    raising("object with .data None alone", Fields(data=None), ValueError,
            "an event needs data"),
    *(
        raising(f"{name} without data", item, ValueError,
                "data must be given with event: without data a browser dispatches"
                ' nothing (data="" is enough), got event=\'done\'')
        for name, item in (
            ("Event", Event(event="done")),
            ("Event with an id", Event(event="done", id=1, comment="c")),
            ("Event subclass", Derived(event="done")),
            ("mapping", {"data": None, "event": "done"}),
            ("object", Fields(data=None, event="done")),
        )
    ),
]
# fmt: on


@pytest.mark.parametrize(("item", "error", "message"), RAISING)
def test_cannot_be_encoded(item: Any, error: type[Exception], message: str) -> None:
    """What cannot be encoded raises TypeError or ValueError, with a reason."""
    with pytest.raises(error, match=re.escape(message)):
        encoder()(item)


# Bytes


@pytest.mark.parametrize(
    ("chunks", "is_framed"),
    [
        ([b"data: a\n\n"], True),
        ([b"data\n\n"], True),
        ([b"id\ndata: a\n\n"], True),
        ([b": c\n"], True),
        ([b"\xef\xbb\xbfdata: a\n\n"], True),
        ([b"x: y\r\ndata: a\r\n\r\n"], True),
        ([b"retry: 5\n\n"], True),
        ([b"da", b"ta: a", b"bc\n", b"\n"], True),
        ([b"data: ", b'{"a":1}', b"\n\n", b"data: b\n\n"], True),
        ([b"data: a\n", b"\r\n"], True),
        ([b'{"a":1}'], False),
        ([b'{"a":1}\n'], False),
        ([b'{"a":1}\n\n'], False),
        ([b'{\n  "data": 1\n}'], False),
        ([b"data: a\n\n", b"hello"], False),
        ([b"data: a\n\n", b"dataset: a\n\n"], False),
        ([b"hello", b"hello"], False),
        ([b"xdata: a\n\n"], False),
    ],
    ids=repr,
)
def test_tells_once_of_bytes_that_are_no_event(
    chunks: list[bytes], is_framed: bool
) -> None:
    """Bytes that are nothing in an event stream are told of, once, and pass."""
    told: list[int] = []
    for encode in (encoder(None, lambda: told.append(1)), encoder()):
        assert [encode(chunk) for chunk in chunks] == chunks
    assert len(told) == (not is_framed)


def test_checkpoints_are_no_bytes() -> None:
    """Nothing is told of them, and what is framed over them stays framed."""
    told: list[int] = []
    encode = passer(lambda: told.append(1))
    assert [encode(item) for item in (None, b"", bytearray(), b"da", b"")] == [
        *[None] * 3,
        b"da",
        None,
    ]
    assert encode(b"hello") == b"hello"  # within the line
    assert told == []
    assert encode(b"\n\nhello") == b"\n\nhello"
    assert encode(b"\nhello") == b"\nhello"
    with pytest.raises(TypeError, match="a chunk must be bytes, got 'a'"):
        encode("a")


@pytest.mark.parametrize("dumps", [5, "json", []], ids=repr)
def test_dumps_must_be_a_function(dumps: Any) -> None:
    """It is refused where it is given, before any item."""
    with pytest.raises(TypeError, match="dumps must be callable, got "):
        encoder(dumps)
    assert encoder(None)([1]) == b"data: [1]\n\n"


@pytest.mark.parametrize(
    ("text", "is_framed"),
    [
        ("data: a\n\n", True),
        ("data:a\r\n\r\n", True),
        ("event: e\ndata: a\n\n", True),
        ("id: 1\ndata: a\n\n", True),
        ("retry: 5\n\n", True),
        (": c\n\n", True),
        ("data: a", False),
        ("data: a\n", False),
        ("a\n\n", False),
        ("the data: a\n\n", False),
        ("note: a\n\n", False),
        ("\n\n", False),
    ],
    ids=repr,
)
def test_tells_once_of_text_that_is_an_event(text: str, is_framed: bool) -> None:
    """Text that was framed by hand is data all the same; it is told of, once."""
    told: list[int] = []
    encode, plain = encoder(None, None, lambda: told.append(1)), encoder()
    assert [encode(text), encode(text)] == [plain(text)] * 2
    assert len(told) == is_framed


# dumps


def of(result: Any) -> Callable[[Any], Any]:
    return lambda value: result


@pytest.mark.parametrize(
    "item", [{"a": 1}, [1], 5, Event([1]), {"data": [1]}], ids=repr
)
@pytest.mark.parametrize(
    ("result", "wire"),
    [
        pytest.param("text", b"data: text\n\n", id="str"),
        pytest.param(b"bytes", b"data: bytes\n\n", id="bytes"),
        pytest.param(bytearray(b"ba"), b"data: ba\n\n", id="bytearray"),
        pytest.param("é", "data: é\n\n".encode(), id="str not ASCII"),
        pytest.param("é".encode(), "data: é\n\n".encode(), id="bytes not ASCII"),
        pytest.param("", b"data: \n\n", id="str empty"),
        pytest.param(
            '{\n "a": 1\n}', b'data: {\ndata:  "a": 1\ndata: }\n\n', id="lines"
        ),
        pytest.param(b"[\r\n1]\n", b"data: [\ndata: 1]\ndata: \n\n", id="bytes lines"),
    ],
)
def test_dumps(item: Any, result: Any, wire: bytes) -> None:
    """``dumps`` writes all JSON: it returns str or UTF-8 bytes, on any lines."""
    assert encoder(of(result))(item) == wire


def test_dumps_is_for_json_only() -> None:
    """Text, bytes and checkpoints do not go through ``dumps``."""
    encode = encoder(of("never"))
    assert encode("a") == b"data: a\n\n"
    assert encode(Event("a")) == b"data: a\n\n"
    assert encode({"data": "a"}) == b"data: a\n\n"
    assert encode(Fields(data="a")) == b"data: a\n\n"
    assert encode(b"a") == b"a"
    assert encode(None) is None


def test_dumps_gets_the_value() -> None:
    """``dumps`` gets the very value: the item, or what is its data."""
    seen: list[Any] = []

    def dumps(value: Any) -> str:
        seen.append(value)
        return "x"

    items: list[Any] = [{"a": 1}, [1], object(), Point(1), 5, float("nan")]
    for item in items:
        encoder(dumps)(item)
        encoder(dumps)({"data": item})
        encoder(dumps)(Event(item))
        Event(item).encode(dumps)
    assert all(
        a is b for a, b in zip(seen, [i for i in items for _ in "1234"], strict=True)
    )


@pytest.mark.parametrize("item", [{"a": 1}, [1], Event([1]), {"data": [1]}], ids=repr)
@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        pytest.param(
            None, TypeError, "dumps must return str or bytes, got None", id="None"
        ),
        pytest.param(5, TypeError, "dumps must return str or bytes, got 5", id="int"),
        pytest.param(b"\xff", ValueError, "invalid start byte", id="not UTF-8"),
        pytest.param("\ud800", ValueError, "surrogates not allowed", id="surrogate"),
    ],
)
def test_wrong_dumps(
    item: Any, result: Any, error: type[Exception], message: str
) -> None:
    """What ``dumps`` must not return is refused, and named."""
    with pytest.raises(error, match=message):
        encoder(of(result))(item)


def test_error_of_dumps_comes_through() -> None:
    """An exception of ``dumps`` reaches the caller as it is."""

    def dumps(value: Any) -> str:
        raise KeyError("mine")

    for item in ({"a": 1}, [1], Event([1])):
        with pytest.raises(KeyError, match="mine"):
            encoder(dumps)(item)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON.filter(lambda value: value is not None and not isinstance(value, str)))
def test_json_round_trips(value: Any) -> None:
    """Any JSON value but text and null comes back from the wire as it was."""
    (received,) = Decoder().feed(Event(value).encode())
    assert received.json() == value
    assert Event(value).json() == value
    if not (isinstance(value, dict) and "data" in value):
        assert encoder()(value) == Event(value).encode()


@MANY
@given(st.text())
def test_text_fast_path(text: str) -> None:
    """A yielded str and an `Event` of it are the same bytes."""
    assert encoder()(text) == Event(text).encode() == encoder()({"data": text})


# Between two events?


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (b"", True),
        (b"data: a\n\n", True),
        (b"data: a\r\n\r\n", True),
        (b"data: a\r\r", True),
        (b"data: a\n\r", True),
        (b"data: a\n\r\n", True),
        (b"data: a\r\n\n", True),
        (b"data: a\r\n\r", True),
        (b"data: a", False),
        (b"data: a\n", False),
        (b"data: a\r\n", False),
        (b"data: a\r", False),
        (b"data: a\n\ndata: b\n", False),
        (b"data: a\n\n ", False),
        (b"data: a\n\n:", False),
        (b"data: \n\ndata: \r\n", False),
        ("data: a\u2028\u2028".encode(), False),
        ("data: a\x85\x85".encode(), False),
    ],
    ids=repr,
)
def test_ends_blank(written: bytes, expected: bool) -> None:
    """A stream that ends in a blank line, or is empty, stands between two events."""
    assert ends_blank(written) is expected
    assert ends_blank(written[-4:]) is expected


@MANY
@given(
    st.lists(st.sampled_from([b"data: a", b"\n", b"\r", b":", b"\r\n"])).map(b"".join)
)
@example(b"data: a\r")
def test_ends_blank_lets_nothing_be_lost(written: bytes) -> None:
    """Where `ends_blank` says yes, a block written next is an event of its own."""
    if ends_blank(written[-4:]):
        decoder = Decoder()
        decoder.feed(written)
        assert decoder.feed(b"event: mine\ndata: b\n\n") == [Event("b", event="mine")]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (b": ok\n", True),
        (b":\n", True),
        (b": a\r\n: b\r: c\n", True),
        (b"data: a\n\n: c\n", True),
        (b"data: a\n\n: c\r\n: d\r", True),
        (b": c\n\n: d\n", True),
        (b"data: a\n: c\n", False),
        (b"data: a\n\nid: 1\n: c\n", False),
        (b": c", False),
        (b"data: a\n\n: c", False),
        (b"data: a\n:", False),
        (b"data: :\n", False),
        (b"data: a:\n: b\n", False),
    ],
    ids=repr,
)
def test_comment_lines_leave_a_stream_between_two_events(
    written: bytes, expected: bool
) -> None:
    """In whatever pieces they are written, whole comment lines are no event's part."""
    assert ends_blank(tail_after(b"", written)) is expected
    for size in range(1, len(written)):
        tail = b""
        for start in range(0, len(written), size):
            tail = tail_after(tail, written[start : start + size])
        assert expected or not ends_blank(tail)  # a piece may say too little


@MANY
@given(
    st.lists(
        st.sampled_from(
            [b"data: a", b"id: 1", b": ok", b":", b"\n", b"\r", b"\r\n", b"\n\n"]
        )
    ).map(b"".join),
    st.lists(st.integers(0, 100)),
    st.booleans(),
)
def test_a_comment_line_loses_nothing(
    written: bytes, places: list[int], is_line: bool
) -> None:
    """Where `ends_blank` says yes a keepalive, of either form, changes no event."""
    cuts = sorted({0, len(written), *(n for n in places if n < len(written))})
    chunks = [written[a:b] for a, b in itertools.pairwise(cuts)]
    tail = b""
    for chunk in chunks:
        tail = tail_after(tail, chunk)
    if ends_blank(tail):
        plain, kept = Decoder(), Decoder()
        plain.feed(written)
        kept.feed(written)
        assert kept.feed(comment("keepalive", is_line=is_line)) == []
        more = b"event: mine\ndata: b\n\n"
        assert kept.feed(more) == plain.feed(more)
        assert kept.last_event_id == plain.last_event_id


@pytest.mark.parametrize("is_line", [True, False])
def test_comments_between_events_are_nothing(is_line: bool) -> None:
    """Opening, keepalives and events decode to the events, however they are cut."""
    block = comment("ok", is_line=is_line)
    keepalive = comment("keepalive", is_line=is_line)
    events = [Event("a\nb", id=1), Event({"n": 1}, event="e"), Event("", id="")]
    wire = block + b"".join(event.encode() + keepalive for event in events)
    whole = Decoder().feed(wire)
    assert [event.data for event in whole] == ["a\nb", '{"n":1}', ""]
    for cut in range(len(wire)):
        decoder = Decoder()
        assert decoder.feed(wire[:cut]) + decoder.feed(wire[cut:]) == whole


def test_only_comments_lose_their_blank_line() -> None:
    """A block with a field in it stays as it is."""
    for event in (Event(comment="a\nb"), Event(comment="")):
        assert without_blank(event.encode()) == event.encode()[:-1]
    for event in (Event("a", comment="c"), Event(id=1, comment="c"), Event(retry=5)):
        assert without_blank(event.encode()) == event.encode()
