"""Server-sent events: the text/event-stream format, encoded and decoded.

Spec: https://html.spec.whatwg.org/multipage/server-sent-events.html, §9.2.5
(parsing) and §9.2.6 (interpreting). `Event` itself is in ``event``.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import RemoteProtocolError
from .comments import comment, completion, ends_blank, tail_after, without_blank
from .event import (
    END_ID,
    MAX_RETRY_DIGITS,
    REFUSED_ID,
    RESERVED_IDS,
    Event,
    Received,
    check_dispatched,
    json_text,
    received,
    with_lf,
)
from .json import Dumps, as_mapping, dumps_or_default, is_array
from .lines import LineBuffer
from .raw import encode_bytes

__all__ = [
    "END_ID",
    "REFUSED_ID",
    "RESERVED_IDS",
    "Decoder",
    "Event",
    "check_dispatched",
    "comment",
    "completion",
    "encoder",
    "ends_blank",
    "framed_encoder",
    "id_of",
    "passer",
    "tail_after",
    "without_blank",
]

_FIELDS = frozenset(("data", "event", "id", "retry", "comment"))


_NOTHING: Any = object()

# Objects of these exact types are never records of fields.
_VALUES = frozenset((list, tuple, int, float, bool))

# Nor are those of these types: what their classes define besides is no field.
_KINDS: tuple[type, ...] = (list, int, float, decimal.Decimal, uuid.UUID)
_KINDS += (datetime.date, datetime.time, datetime.timedelta)


def _event_of(item: object, has_dumps: bool) -> Event:
    """Return an event made of an object's fields, else one with it as JSON data."""
    # A member of an enumeration shows the others as its attributes.
    if type(item) in _VALUES or isinstance(item, (type, enum.Enum)):
        return Event(item)
    if isinstance(item, tuple):
        names = getattr(item, "_fields", ())
        if "data" in names and _FIELDS.issuperset(names):
            return _record(item, {name: getattr(item, name) for name in names})
        return Event(item)
    fields = as_mapping(item)
    if fields is None:
        return Event(item) if isinstance(item, _KINDS) else _attributes(item)
    if not isinstance(fields, dict):
        return Event(item)
    if "data" in fields and fields.keys() <= _FIELDS:
        return _record(item, fields)
    return Event(item if has_dumps else fields)  # dumps= may encode the object better


def _record(item: object, fields: dict[str, Any]) -> Event:
    """Return an event of a record's fields, all of which are an event's."""
    if fields["data"] is None:  # a row with a null: no client would dispatch it
        raise ValueError(
            f"data of a {type(item).__qualname__} is None, and a browser dispatches"
            " nothing without data: yield Event(id=…) for an id alone, or a dict"
            " with the field under another name"
        )
    return Event(**fields)


def _attributes(item: object) -> Event:
    """Return an event made of the attributes of an object that has ``.data``."""
    data = getattr(item, "data", _NOTHING)
    if data is _NOTHING or callable(data) or is_array(item):
        return Event(item)
    others = {name: getattr(item, name, None) for name in _FIELDS - {"data"}}
    # Its methods, such as the retry() of a job, are no fields.
    return Event(data, **{n: None if callable(v) else v for n, v in others.items()})


def id_of(item: object) -> str | None:
    """Return the id that an item has as an event; ``None``: it changes no id.

    Text and bytes have none; ``""`` is the id that has a client forget its own.
    """
    if type(item) in _VALUES or isinstance(item, (type, enum.Enum)):
        return None
    fields = item if isinstance(item, Mapping) else as_mapping(item)
    if isinstance(fields, Mapping):
        is_event = "data" in fields and fields.keys() <= _FIELDS
        id = fields.get("id") if is_event else None
    else:
        id = getattr(item, "id", None) if hasattr(item, "data") else None
    if isinstance(id, int) and not isinstance(id, bool):
        return int.__repr__(id)
    return id if isinstance(id, str) else None


# The beginning of any line of an event stream; the last line may be incomplete. A blank
# line at the beginning ends the event before it.
_FRAMED = re.compile(
    rb"\A[\r\n]|(?:\A(?:\xef\xbb\xbf)?|[\r\n])"
    rb"(?::|(?:data|event|id|retry)(?:[:\r\n]|\Z)"
    rb"|(?:d|da|dat|e|ev|eve|even|i|r|re|ret|retr)\Z)"
)
_USUAL = (b"data:", b"id:", b"event:", b":")


def passer(unframed: Callable[[], object] | None) -> Callable[[Any], bytes | None]:
    """Return the function that passes bytes through unchanged.

    ``b""`` and ``None`` are checkpoints. Anything else is a ``TypeError``.

    Args:
        unframed: Called once, for the first bytes that mean nothing in an event stream:
            none of their lines begins with a colon or the name of a field, so that no
            client ever sees them. An example is ``json.dumps(…).encode()``. ``None``
            skips the check.
    """
    is_inside = False  # the last chunk ended within a line

    def encode(item: Any) -> bytes | None:
        nonlocal is_inside, unframed
        chunk = encode_bytes(item)
        if chunk is None or unframed is None:
            return chunk
        if not is_inside and not chunk.startswith(_USUAL) and not _FRAMED.search(chunk):
            unframed()
            unframed = None
        is_inside = chunk[-1] not in b"\r\n"
        return chunk

    return encode


# Text that is a complete event, as many write it by hand: it begins with a field and
# ends with a blank line.
_WRITTEN = re.compile(r"(?:data|event|id|retry)?:.*(?:\n\n|\r\r|\r\n\r\n)\Z", re.S)


def encoder(
    dumps: Dumps | None = None,
    unframed: Callable[[], object] | None = None,
    framed: Callable[[], object] | None = None,
) -> Callable[[Any], bytes | None]:
    """Return the function that turns an item of a generator into a chunk.

    ============================================  ================================
    yielded                                       written
    ============================================  ================================
    `Event`                                       the event
    ``str``                                       an event with that data
    a mapping with ``data`` whose keys are all    an event with those fields
    event fields
    a dataclass, an object of attrs, pydantic or  the same as a mapping of its
    msgspec, a Django, SQLAlchemy or peewee       fields
    object; a named tuple of event fields with
    ``data``
    any other object with a ``.data`` attribute   an event with those fields
    (and maybe ``event, id, retry, comment``)
    ``bytes``, ``bytearray``, ``memoryview``      the bytes: already framed
    ``None``, ``b""``                             nothing: a checkpoint
    anything else, including numpy's numbers and  an event with that as JSON data
    arrays
    ============================================  ================================

    The function raises ``TypeError`` or ``ValueError`` for an item that cannot be
    encoded, such as the memory of numbers (``array.array``, a memoryview of them,
    ctypes), and for an event with a name but no data, which browsers do not dispatch.

    Args:
        dumps: The JSON encoder; it receives the objects that you yield.
        unframed: As for `passer`.
        framed: Called once, for the first ``str`` that is a complete event
            (``"data: x\\n\\n"``) and is sent as data all the same. ``None`` skips
            the check.
    """
    json = dumps_or_default(dumps)
    passed = passer(unframed)

    def encode(item: Any) -> bytes | None:
        nonlocal framed
        if type(item) is str:
            if "\n" in item or "\r" in item:
                if framed is not None and _WRITTEN.match(item):
                    framed()
                    framed = None
                item = with_lf(item).replace("\n", "\ndata: ")
            return f"data: {item}\n\n".encode()
        if type(item) is dict and "data" not in item:
            if dumps is not None:
                data = json_text(item, dumps)
                if "\n" in data or "\r" in data:
                    data = with_lf(data).replace("\n", "\ndata: ")
                return f"data: {data}\n\n".encode()
            text = json(item)
            if type(text) is bytes:
                return b"data: %b\n\n" % text
            return f"data: {text}\n\n".encode()  # type: ignore[str-bytes-safe]
        if type(item) is Event:
            if item.data is None:
                check_dispatched(item)
            return item.encode(dumps)
        if item is None:
            return None
        if isinstance(item, (bytes, bytearray, memoryview)):
            return passed(item)
        if isinstance(item, (str, Event)):
            event = Event(item) if isinstance(item, str) else item
        elif isinstance(item, Mapping):
            if "data" in item and item.keys() <= _FIELDS:
                # By item: ** would read a multidict's lists.
                event = Event(**{name: item[name] for name in item})
            else:
                event = Event(item)
        else:
            event = _event_of(item, dumps is not None)
        check_dispatched(event)
        return event.encode(dumps)

    return encode


def framed_encoder(
    dumps: Dumps | None = None, unframed: Callable[[], object] | None = None
) -> Callable[[Any], bytes | None]:
    """Return an `encoder` for which ``str`` is framed already, as bytes are.

    Args:
        dumps, unframed: As for `encoder`.
    """
    encode_item = encoder(dumps, unframed)

    def encode(item: Any) -> bytes | None:
        return encode_item(item.encode() if isinstance(item, str) else item)

    return encode


_BOM = b"\xef\xbb\xbf"

# The usual event, whole: an id, a name, one line of data. The last group is any other
# block, so that matches follow one another without a hole. ("(?:x|)" is faster than
# "(?:x)?".)
_BLOCKS = re.compile(
    r"(?:id: ?([^ \n].*)\n|)(?:event: ?([^ \n].*)\n|)data: ?(.*)\n\n|((?:.+\n)*\n)"
)


class Decoder:
    """Turns the bytes of an event stream into events, chunk by chunk.

    Args:
        max_line: The maximum length of a line, in bytes; ``None`` for no limit.
        max_event: The maximum size of an event's data, in bytes; ``None`` for no limit.
        last_event_id: The id in force before the first event, for a connection that
            resumes another.

    Attributes:
        retry: The last reconnection time received, in milliseconds; ``None`` before
            the first.
        last_event_id: The id to reconnect with; ``None`` before the first, ``""`` after
            the server has cleared it.

    Raises:
        ValueError: ``max_line`` or ``max_event`` is not positive.
    """

    def __init__(
        self,
        *,
        max_line: int | None = 4 * 1024 * 1024,
        max_event: int | None = 4 * 1024 * 1024,
        last_event_id: str | None = None,
    ) -> None:
        for name, limit in (("max_line", max_line), ("max_event", max_event)):
            if limit is not None and limit <= 0:
                raise ValueError(f"{name} must be positive or None, got {limit!r}")
        self.retry: int | None = None
        self.last_event_id = last_event_id
        self._max_line = max_line
        self._max_event = max_event
        self._start = True  # before the first line, where a byte order mark may be
        self._after_cr = False  # an LF at the next chunk's beginning belongs to a CR
        self._buffer = LineBuffer()
        self._data: list[bytes] = []
        self._data_size = 0
        self._event = b""
        self._id = last_event_id  # takes effect at the end of its block
        self._error: RemoteProtocolError | None = None
        self._closed = False

    def feed(self, chunk: bytes) -> list[Event]:
        """Take the next bytes and return the events that they complete, oldest first.

        In each event ``.data`` is text, ``.event`` is ``None`` for "message", and
        ``.id`` is the last event id in force.

        Raises:
            RemoteProtocolError: A line or an event is too large. If the chunk completes
                events before it, they are returned, and the next call raises the error.
                All later calls raise it again.
            ValueError: The decoder has been closed.
        """
        if self._closed:
            raise ValueError("feed() must not be called after close()")
        if self._error is not None:
            raise self._error
        events: list[Event] = []
        try:
            chunk = self._with_lf(bytes(chunk))
            first = chunk.find(b"\n\n") + 2
            last = chunk.rfind(b"\n\n") + 2
            if first < last and self._are_small(chunk):
                self._take_lines(chunk[:first], events)
                self._take_blocks(chunk[first:last], events)
                chunk = chunk[last:]
            self._take_lines(chunk, events)
        except RemoteProtocolError as error:
            self._error = error
            if not events:
                raise
        return events

    def close(self) -> None:
        """End the stream; an incomplete event is discarded (§9.2.6).

        Raises:
            RemoteProtocolError: `feed` had an error still to raise.
        """
        self._closed = True
        if self._error is not None:
            raise self._error

    def _with_lf(self, chunk: bytes) -> bytes:
        """Return the chunk with LF for all line ends."""
        if self._after_cr and chunk:
            self._after_cr = False
            if chunk[:1] == b"\n":
                chunk = chunk[1:]
        if b"\r" in chunk:
            self._after_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return chunk

    def _are_small(self, chunk: bytes) -> bool:
        """Tell whether nothing that begins in the chunk exceeds a limit."""
        size = len(chunk)
        return (self._max_line is None or size <= self._max_line) and (
            self._max_event is None or size <= self._max_event
        )

    def _take_blocks(self, blocks: bytes, events: list[Event]) -> None:
        """Process whole blocks that follow a blank line; append their events."""
        try:
            text = blocks.decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:  # an id with one does not count
            self._take_lines(blocks, events)
            return
        last = self._id
        for id, name, data, other in _BLOCKS.findall(text):
            if other:
                self._id = last
                self._take_lines(other.encode(), events)
                last = self._id
                continue
            if id:
                last = id
            # `received`, inlined
            found = Received()
            found.data = data
            found.event = name or None
            found.id = last
            found.retry = None
            found.comment = None
            found.__class__ = Event  # type: ignore[assignment]
            events.append(found)  # type: ignore[arg-type]
        self._id = self.last_event_id = last

    def _take_lines(self, chunk: bytes, events: list[Event]) -> None:
        """Process the lines that end in this chunk; append their events."""
        lines = self._buffer.split(chunk)
        if self._max_line is not None and self._buffer.size > self._max_line:
            lines.append(self._buffer.rest())  # _take refuses it after the others
        for line in lines:
            event = self._take(line)
            if event is not None:
                events.append(event)

    def _take(self, line: bytes) -> Event | None:
        """Process one line; return an event if the line dispatches one."""
        if self._max_line is not None and len(line) > self._max_line:
            raise RemoteProtocolError(
                f"a line of the event stream is longer than {self._max_line} bytes"
            )
        if self._start:
            self._start = False
            if line.startswith(_BOM):
                line = line[3:]
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        if value[:1] == b" ":
            value = value[1:]
        if name == b"data":
            # The line end that joins two data lines counts, too.
            self._data_size += len(value) + 1
            if self._max_event is not None and self._data_size - 1 > self._max_event:
                raise RemoteProtocolError(
                    f"an event holds more than {self._max_event} bytes of data"
                )
            self._data.append(value)
        elif name == b"event":
            self._event = value
        elif name == b"id":
            if b"\0" not in value:
                self._id = value.decode(errors="replace")
        elif name == b"retry" and value.isdigit():
            digits = value.lstrip(b"0")
            if len(digits) > MAX_RETRY_DIGITS:
                digits = b"9" * MAX_RETRY_DIGITS
            self.retry = int(digits or b"0")
        return None

    def _dispatch(self) -> Event | None:
        self.last_event_id = self._id
        data, event = self._data, self._event
        if event:
            self._event = b""
        if not data:
            return None
        self._data = []
        self._data_size = 0
        text = b"\n".join(data).decode(errors="replace")
        return received(text, event.decode(errors="replace") or None, self._id)
