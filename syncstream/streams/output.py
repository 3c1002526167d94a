"""`Output`: what a stream has sent to its client, and what of ours may follow it.

A keepalive, the end block, ``retry:`` and an error's event may be added only where the
bytes before them are whole, and where nothing between us and the client would corrupt
them: a format with a Content-Encoding of the application's takes none.
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
from .ends import OPENING, come_back

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
    """The bytes that go to one client: counted, and continued where they may be.

    The thread or greenlet that iterates writes all of it, but for the keepalives that
    the stream's monitor adds, under its lock.

    Args:
        format: The source's.
        retry: Milliseconds, ``None`` for none.
        end: "stop" or "reconnect": what a client does after a normal end.

    Attributes:
        connection: To whom it goes, ``None`` while that is unknown.
        format: How items become chunks; of an encoded response, how nothing is added.
        is_event_stream: Its body is one, whatever may be added to it.
        opening: What is to be sent before all else, ``None`` for nothing.
        comment: The keepalive, in the form that this client reads.
        tail: The last bytes sent: 4 or more, or all there were.
        events, bytes: So many have been sent.
        moved: When the last chunk was sent, `time.monotonic`.
    """

    def __init__(self, format: Format, retry: int | None, end: str) -> None:
        self.connection: Connection | None = None
        self.format = format
        self.is_event_stream = format.is_events
        self.comment = _KEEPALIVES[False]
        self.opening: bytes | None = _OPENINGS[False] if format.is_events else None
        self.tail = b""
        self.events = self.bytes = 0
        self.moved = 0.0
        self.retry = retry or 0
        self._retrying: bytes | None = None
        if format.is_events and retry is not None:
            self._retrying = Event(comment=OPENING, retry=retry).encode()
        self._stops = end == "stop"
        self._is_asked = False  # see `is_over_for`

    def connect(
        self, connection: Connection, *, is_encoded: bool, written: bytes
    ) -> None:
        """Say to whom it goes; the arguments are those of `Stream.connect`."""
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

    def is_over_for(self, connection: Connection) -> bool:
        """Tell whether this client has been told to stop, and came back.

        Whoever asks answers it with 204, so it may be told to stop.
        """
        self._is_asked = True
        id = connection.last_event_id
        return id == sse.REFUSED_ID or (self._stops and id == sse.END_ID)

    @property
    def is_hung_up(self) -> bool:
        """Whether its client has gone: one look, now; ``False`` where unknown."""
        return self.connection is not None and self.connection.is_hung_up()

    # While it goes on.

    def open(self) -> bytes:
        """Return the opening, which goes now."""
        assert self.opening is not None
        self.tail = sse.tail_after(b"", self.opening)
        self.bytes += len(self.opening)
        return self.opening

    def note(self, item: Any, chunk: bytes) -> bytes:
        """Take note of a chunk that is short or a comment; return what to send.

        The application's own comments go out as ours do; what it has framed, as it is.
        """
        if (
            self.connection is not None
            and self.connection.parses_events
            and self.format.is_events
            and not isinstance(item, (bytes, bytearray, memoryview))
            and sse.ends_blank(self.tail)
        ):
            chunk = sse.without_blank(chunk)
        self.tail = sse.tail_after(self.tail, chunk)
        return chunk

    def pieces(self, chunk: bytes, size: int) -> Iterator[bytes]:
        """Yield a chunk in pieces of at most this size, each counted as it goes.

        Nothing is done between the pieces: they are one chunk.
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

    @property
    def comes_back(self) -> bool:
        """Whether the client takes an end in good order for a break."""
        return (
            self.format.is_events
            and self.connection is not None
            and self.connection.is_event_source
        )

    def come_back(self, reason: str) -> bytes:
        """Return what asks an EventSource to come back; others make events of it."""
        return come_back(reason, self.retry) if self.comes_back else b""

    def last_block(self, reason: str) -> bytes:
        """Return what the client is told at an end in good order."""
        if not (self.format.is_events and self.is_whole):
            return b""
        return self._end_block() if reason == "finished" else self.come_back(reason)

    def refusal(self) -> bytes:
        """Return what keeps a browser away for good after an error."""
        return self._end_block(is_refused=True)

    def _end_block(self, *, is_refused: bool = False) -> bytes:
        """Return the block after which a browser, coming back, gets 204."""
        stops = self._stops or (is_refused and self._is_asked)
        if not (
            stops and self.connection is not None and self.connection.is_event_source
        ):
            return b""
        # The blank line puts the id in force; there is no data, so no event.
        id = sse.END_ID if self._stops else sse.REFUSED_ID
        return f"id: {id}\n\n".encode()

    def answer_unsent(self, reason: str) -> bytes:
        """Answer by a status, if no byte has left; return the body, ``b""`` if not."""
        if self.is_out or self.connection is None:
            return b""
        status = 403 if reason in ("denied", "kicked") else 503
        error = RuntimeError(f"the stream has ended before it began: {reason}")
        return self.connection.answer(error, status, b"") or b""

    # What is said of it.

    def warn(self) -> None:
        """Tell the operator, once a process, what a stream lacks there."""
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
        """What the log calls the stream."""
        return self.connection.label if self.connection else "a stream"

    def report(
        self, level: int, message: str, error: BaseException | None = None
    ) -> None:
        """Log a line; a handler that is broken does not break the stream."""
        if is_enabled(log, level):
            report(log, level, message, self.label, error=error)

    def say(self, level: int, message: str, error: BaseException | None = None) -> None:
        """Log a line, soon: on the watch's side, where a handler holds up all."""
        if is_enabled(log, level):
            say(log, level, message, self.label, error=error)
