"""`Output`: the bytes a stream has sent, and the words of ours that may follow.

A keepalive, the end block, ``retry:`` and an error's event may be added only after
whole events, and never to a response with a Content-Encoding of the application, which
they would corrupt.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from ..protocol import sse
from ..protocol.sse import Event
from ..runtime.journal import is_enabled, report
from ..runtime.process import process
from ..runtime.waiting import say
from ..servers.connection import Connection
from .contract import Format
from .ends import OPENING, End, come_back

__all__ = ["PIECE", "Output"]

log = logging.getLogger("syncstream.stream")

PIECE = 64 * 1024
"""Bytes; what a server's socket accepts at once is about as much."""

# As an event stream has them, and, the second, as those read it who read by lines.
_KEEPALIVES, _OPENINGS = (
    tuple(sse.comment(text, is_line=is_line) for is_line in (False, True))
    for text in ("keepalive", OPENING)
)


class Output:
    """The bytes that one client gets: counts them, and adds what may be added.

    Only the thread or greenlet that iterates changes it, except for the keepalives,
    which the watch adds under the lock of `Keepalive`.

    Args:
        format: The format of the source's items.
        retry: The client's reconnection time in milliseconds; ``None`` sends none.
        end: What the client does after a normal end, and the event before it.

    Attributes:
        connection: The client's connection, ``None`` before `connect`.
        format: The format, without its events if nothing may be added to the response.
        is_event_stream: Whether the body is an event stream, encoded or not.
        opening: The bytes to send before the first item, ``None`` for none.
        comment: The keepalive, in the form that this client reads.
        tail: The last bytes sent: 4 or more, or all if fewer were sent.
        events, bytes: The numbers of events and bytes sent.
        moved: When the last chunk was sent, `time.monotonic`.
        retry: The reconnection time in milliseconds, 0 for none.
        missing: What completes the last event of a source that has ended by itself.
    """

    def __init__(self, format: Format, retry: int | None, end: End) -> None:
        self.connection: Connection | None = None
        self.format = format
        self.is_event_stream = format.is_events
        self.comment = _KEEPALIVES[False]
        self.opening: bytes | None = _OPENINGS[False] if format.is_events else None
        self.tail = b""
        self.events = self.bytes = 0
        self.moved = 0.0
        self.missing = b""
        self.retry = retry or 0
        self._retrying: bytes | None = None
        if format.is_events and retry is not None:
            self._retrying = Event(comment=OPENING, retry=retry).encode()
        self._end = end
        self._is_asked = False  # see `ask_if_over`

    def connect(
        self, connection: Connection, *, is_encoded: bool, written: bytes
    ) -> None:
        """Set the connection; the arguments are those of `Stream.connect`."""
        self.connection = connection
        is_line = connection.parses_events
        self.comment = _KEEPALIVES[is_line]
        if self.opening is not None:
            self.opening = _OPENINGS[is_line]
            if self._retrying is not None and connection.is_event_source:
                self.opening = self._retrying
        if written:
            self.tail, self.opening = written, None
        if is_encoded:
            self.opening = None
            self.format = Format(self.format.encode, lambda tail: False)

    def ask_if_over(self, connection: Connection) -> bool:
        """Ask whether this client was told to stop, and has come back.

        It notes that somebody asks, who answers such a client with 204: so this client
        may be told to stop.
        """
        self._is_asked = True
        id = connection.last_event_id
        return id == sse.REFUSED_ID or (self._end.stops and id == sse.END_ID)

    @property
    def is_hung_up(self) -> bool:
        """Whether a look at the socket shows that the client has left."""
        return self.connection is not None and self.connection.is_hung_up()

    # While it goes on.

    def open(self) -> bytes:
        """Return the opening, and count it as sent."""
        assert self.opening is not None
        self.tail = b"\n\n"  # behind its comment an event may begin
        self.bytes += len(self.opening)
        return self.opening

    def encode(self, item: Any) -> bytes | None:
        """Encode an item, and record its chunk; ``None`` for a checkpoint."""
        chunk = self.format.encode(item)
        return None if chunk is None else self.note(item, chunk)

    def note(self, item: Any, chunk: bytes) -> bytes:
        """Record a chunk that is short or a comment; return the bytes to send.

        Comments of the application get the same form as ours, except in bytes that it
        has framed itself.
        """
        if (
            self.connection is not None
            and self.connection.parses_events
            and self.format.is_events
            and not isinstance(item, self.format.framed)
            and sse.ends_blank(self.tail)
        ):
            chunk = sse.without_blank(chunk)
        self.tail = sse.tail_after(self.tail, chunk)
        return chunk

    def pieces(self, chunk: bytes, size: int) -> Iterator[bytes]:
        """Yield a chunk in pieces of at most this size, counting each as it is sent.

        Nothing else is done between the pieces of a chunk.
        """
        for start in range(0, len(chunk), size):
            piece = chunk[start : start + size]
            self.bytes += len(piece)
            yield piece

    @property
    def is_whole(self) -> bool:
        """Whether a new event or value may begin."""
        return self.format.is_whole(self.tail)

    @property
    def is_out(self) -> bool:
        """Whether a byte of the response may have left."""
        return bool(self.is_event_stream or self.tail or self.bytes or self.events)

    # Its end.

    def end_source(self) -> None:
        """Note that the source has ended by itself: nothing more comes of its event."""
        self.missing = self.complete(self.tail)

    def complete(self, tail: bytes) -> bytes:
        """Return what completes the application's last event, and say so; never waits.

        Args:
            tail: As for ``Format.is_whole``.
        """
        missing = self.format.completion(tail)
        if missing:
            process().say_once(
                log,
                logging.WARNING,
                "%s ends with an event that has no blank line behind it, so that"
                " clients would drop it: it gets one. End the text of each event with"
                " one ('data: ...\\n\\n')",
                self.label,
            )
        return missing

    @property
    def comes_back(self) -> bool:
        """Whether the client takes an orderly end for a break, and reconnects."""
        return (
            self.format.is_events
            and self.connection is not None
            and self.connection.is_event_source
        )

    def come_back(self, reason: str) -> bytes:
        """Return a ``retry:``, only for EventSources: others make an event of it."""
        return come_back(reason, self.retry) if self.comes_back else b""

    def last_block(self, reason: str) -> bytes:
        """Return the last bytes of a response that ends in order."""
        if not (self.format.is_events and (self.is_whole or self.missing)):
            return b""
        if reason != "finished":
            return self.missing + self.come_back(reason)
        return self.missing + self._end.event + self._end_block()

    def refusal(self) -> bytes:
        """Return the bytes that keep a browser from reconnecting after an error."""
        return self._end_block(is_refused=True)

    def _end_block(self, *, is_refused: bool = False) -> bytes:
        """Return the block after which a browser that reconnects gets 204."""
        stops = self._end.stops or (is_refused and self._is_asked)
        if not (
            stops and self.connection is not None and self.connection.is_event_source
        ):
            return b""
        # The blank line puts the id in force; there is no data, so no event.
        id = sse.END_ID if self._end.stops else sse.REFUSED_ID
        return f"id: {id}\n\n".encode()

    def answer_unsent(self, reason: str) -> bytes:
        """Answer by an error status if no byte was sent; return the body or ``b""``."""
        if self.is_out or self.connection is None:
            return b""
        status = 403 if reason in ("denied", "kicked") else 503
        error = RuntimeError(f"the stream has ended before it began: {reason}")
        return self.connection.answer(error, status, b"") or b""

    # Its log lines.

    def warn(self) -> None:
        """Advise the operator, once a process, about a stream that is not watched."""
        if self.connection is not None:
            self.connection.warn()
            return
        process().warn_once(
            log,
            "a stream has no connection: its request was not found, so that it is not"
            " told when its client leaves or its server stops, and has no keepalive."
            " Return the response itself from the view",
            "no connection",
        )

    @property
    def label(self) -> str:
        """The stream's name in the log."""
        return self.connection.label if self.connection else "a stream"

    def report(
        self, level: int, message: str, error: BaseException | None = None
    ) -> None:
        """Log a line; a handler that is broken does not break the stream."""
        if is_enabled(log, level):
            report(log, level, message, self.label, error=error)

    def say(self, level: int, message: str, error: BaseException | None = None) -> None:
        """Log a line later: for the watch, which a log handler must not hold up."""
        if is_enabled(log, level):
            say(log, level, message, self.label, error=error)
