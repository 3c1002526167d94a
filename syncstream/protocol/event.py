"""`Event`: one server-sent event, valid by construction.

Spec: https://html.spec.whatwg.org/multipage/server-sent-events.html, §9.2.5. `Event`
refuses, where it is made, every value that the format cannot carry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from json import loads
from types import MethodType
from typing import TYPE_CHECKING, Any, overload

from .json import Dumps, default_dumps
from .raw import as_bytes

__all__ = [
    "END_ID",
    "MAX_RETRY_DIGITS",
    "REFUSED_ID",
    "RESERVED_IDS",
    "Event",
    "Received",
    "check_dispatched",
    "json_text",
    "received",
    "with_lf",
]

END_ID = "syncstream-end"
"""The last event id of a finished stream: a browser that reconnects with it is told to
stay away."""

REFUSED_ID = "syncstream-refused"
"""The last event id of a refused stream whose normal end asks browsers to reconnect: it
tells them to stay away, too."""

RESERVED_IDS = frozenset((END_ID, REFUSED_ID))

MAX_RETRY_DIGITS = 15  # 31,000 years; the decoder reads a longer number as this many 9s


def with_lf(text: str) -> str:
    """Return text with CRLF, CR and LF, and no other line ends, replaced by LF."""
    if "\r" in text:
        return text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def _text(name: str, value: Any) -> str:
    """Return value as an exact ``str``; refuse text that UTF-8 cannot encode."""
    if type(value) is str and value.isascii():
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name} must be str, got {value!r}")
    # A subclass may print other text: Python formats class Word(str, Enum) as
    # "Word.A", and a line end in __str__ would forge fields.
    text = str.__str__(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} cannot be encoded as UTF-8: {error.reason}, got {text!r}"
        ) from None
    return text


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data given as bytes must be UTF-8: {error.reason}"
            f" at offset {error.start}, got {data!r}"
        ) from None


def _name(name: str, value: Any) -> str:
    """Return value as text of one line."""
    if type(value) is str and value.isprintable():  # no controls, no surrogates
        return value
    text = _text(name, value)
    if "\n" in text or "\r" in text or "\0" in text:
        raise ValueError(f"{name} must not contain CR, LF or NUL, got {text!r}")
    return text


class _Comment:
    """``Event.comment("…")`` makes an event; ``.comment`` of an event is its text."""

    @overload
    def __get__(self, event: None, kind: type[Event]) -> Callable[[str], Event]: ...

    @overload
    def __get__(self, event: Event, kind: type[Event]) -> str | None: ...

    def __get__(self, event: Event | None, kind: type[Event]) -> Any:
        if event is None:
            return MethodType(_make_comment, kind)
        return _comment_of(event, kind)

    def __set__(self, event: Event, text: str | None) -> None:  # for unpickling
        _set_comment(event, text)


@dataclass(frozen=True, slots=True, init=False)
class Event:
    """One server-sent event, valid by construction and immutable.

    Args:
        data: The payload. ``str`` is sent unchanged, one ``data:`` line for each of its
            lines; ``bytes`` are UTF-8 text; ``None`` sends no data line, and then a
            browser dispatches nothing; any other value is sent as compact JSON. ``""``
            is one empty data line.
        event: The event's name; browsers call an event without one "message".
        id: The event's id, ``str`` or ``int`` (kept as ``str``), which a client
            sends back as Last-Event-ID. ``""`` makes the client forget its id.
        retry: The client's reconnection time from now on, whole milliseconds
            (the wire's unit), 0 or more.
        comment: Text that clients ignore, one comment line for each of its lines.

    Raises:
        ValueError: ``event`` or ``id`` contains CR, LF or NUL; ``id`` is reserved
            (``syncstream-end``, ``syncstream-refused``); UTF-8 cannot encode a text;
            ``retry`` is negative or has more than 15 digits; all fields are ``None``.
        TypeError: A field has the wrong type; ``bool`` does not count as an ``int``.

    >>> Event("Full event data", id="evt-1", event="custom_event", retry=3000).encode()
    b'id: evt-1\\nevent: custom_event\\nretry: 3000\\ndata: Full event data\\n\\n'
    >>> str(Event({"temperature": 21.5}))
    'data: {"temperature":21.5}\\n\\n'
    >>> bytes(Event.comment("keepalive"))  # the same as Event(comment="keepalive")
    b': keepalive\\n\\n'
    """

    data: Any
    event: str | None
    id: str | None
    retry: int | None
    if TYPE_CHECKING:
        comment: _Comment
        _comment: str | None
    else:
        comment: str | None

    def __init__(
        self,
        data: Any = None,
        *,
        event: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
        comment: str | None = None,
    ) -> None:
        if data is None:
            if event is None and id is None and retry is None and comment is None:
                raise ValueError(
                    "an event needs data, event, id, retry or comment;"
                    ' for a JSON null, pass data="null"'
                )
        elif isinstance(data, str):
            data = _text("data", data)
        elif isinstance(data, (bytes, bytearray, memoryview)):
            data = _decoded(as_bytes(data))
        if event is not None:
            event = _name("event", event)
        if id is not None:
            if isinstance(id, str):
                id = _name("id", id)
            elif isinstance(id, int) and not isinstance(id, bool):
                id = int.__repr__(id)
            else:
                raise TypeError(f"id must be str or int, got {id!r}")
            if id.strip() in RESERVED_IDS:  # HTTP strips Last-Event-ID, too
                raise ValueError(
                    f"id {id.strip()!r} is reserved for the end of a stream:"
                    " use another id"
                )
        if retry is not None:
            if isinstance(retry, bool) or not isinstance(retry, int):
                raise TypeError(
                    f"retry must be whole milliseconds as an int, got {retry!r}"
                )
            retry = int.__index__(retry)  # a subclass may print another number
            if retry < 0:
                raise ValueError(f"retry must be 0 or more, got {retry!r}")
            if retry >= 10**MAX_RETRY_DIGITS:
                raise ValueError(f"retry must have at most {MAX_RETRY_DIGITS} digits")
        if comment is not None:
            comment = _text("comment", comment)
        _set_data(self, data)
        _set_event(self, event)
        _set_id(self, id)
        _set_retry(self, retry)
        _set_comment(self, comment)

    def encode(self, dumps: Dumps | None = None) -> bytes:
        """Return the event's UTF-8 bytes, including the blank line at its end.

        Fields come in the order comment, id, event, retry, data; lines end in LF.

        Args:
            dumps: The JSON encoder for data that is not text; the default writes
                compact JSON.

        Raises:
            TypeError, ValueError: ``dumps`` cannot encode the data.
        """
        out = ""
        if self._comment is not None:
            out = f": {with_lf(self._comment)}".replace("\n", "\n: ") + "\n"
        if self.id is not None:
            out += f"id: {self.id}\n"
        if self.event is not None:
            out += f"event: {self.event}\n"
        if self.retry is not None:
            out += f"retry: {self.retry}\n"
        data = self.data
        if data is None:
            return f"{out}\n".encode()
        if not isinstance(data, str):
            data = json_text(data, dumps)
        if "\n" in data or "\r" in data:
            data = with_lf(data).replace("\n", "\ndata: ")
        return f"{out}data: {data}\n\n".encode()

    def __bytes__(self) -> bytes:
        return self.encode()

    def __str__(self) -> str:
        return self.encode().decode()

    def json(self) -> Any:
        """Return the data, decoded as JSON: the value that a client would get.

        Raises:
            ValueError: There is no data, or it is not JSON, or nested too deeply.
        """
        if self.data is None:
            raise ValueError("the event has no data to read as JSON")
        data = self.data
        try:
            return loads(data if isinstance(data, str) else json_text(data, None))
        except RecursionError:
            raise ValueError("the event's data is nested too deeply") from None


# Use the slots directly: the class is frozen, so its __setattr__ raises.
_set_data, _set_event, _set_id, _set_retry, _set_comment = (
    Event.__dict__[name].__set__ for name in ("data", "event", "id", "retry", "comment")
)
_comment_of = Event.__dict__["comment"].__get__
# The slot has two names: `encode` reads it without the function of `_Comment`.
Event._comment = Event.__dict__["comment"]  # type: ignore[misc]
Event.comment = _Comment()  # type: ignore[misc]


def _make_comment(kind: type[Event], text: str) -> Event:
    """Return an event that is a comment, which clients ignore."""
    return kind(comment=text)


class Received:
    """Becomes an `Event` once its slots are set: see `received`."""

    __slots__ = ("comment", "data", "event", "id", "retry")

    comment: str | None
    data: Any
    event: str | None
    id: str | None
    retry: int | None


def received(data: str, event: str | None, id: str | None) -> Event:
    """Return an event of a decoder, whatever it holds.

    Its name may contain NUL, and its id be reserved.
    """
    # Plain assignments to slots, and then another class with the same ones, take half
    # the time of five calls of an Event's own slots.
    found = Received()
    found.data = data
    found.event = event
    found.id = id
    found.retry = None
    found.comment = None
    found.__class__ = Event  # type: ignore[assignment]
    return found  # type: ignore[return-value]


def json_text(value: Any, dumps: Dumps | None) -> str:
    """Return a value as JSON text.

    Raises:
        TypeError, ValueError: ``dumps`` cannot encode it, or returns no text.
    """
    text = (dumps or default_dumps)(value)
    if isinstance(text, (bytes, bytearray)):
        return text.decode()
    if not isinstance(text, str):
        raise TypeError(f"dumps must return str or bytes, got {text!r}")
    return text


def check_dispatched(event: Event) -> None:
    """Refuse an event that has a name but no data: no client would dispatch it.

    Raises:
        ValueError: The event is one of these.
    """
    if event.data is None and event.event is not None:
        raise ValueError(
            "data must be given with event: without data a browser dispatches nothing"
            f' (data="" is enough), got event={event.event!r}'
        )
