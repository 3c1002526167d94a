"""`Reader`: reads one response's body in a test, and never hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from ..protocol.event import Event
from ..protocol.sse import Decoder
from .limit import Late, Limit

__all__ = ["TIMEOUT", "Body", "Reader", "check_count", "check_timeout"]

R = TypeVar("R", bound="Reader")
T = TypeVar("T")

TIMEOUT = 2.0
"""Seconds that a read takes at most, unless a test says otherwise."""

Chunk = bytes  # in `Reader`, ``bytes`` is a method
_SHOWN = 200  # characters of what has come, in a failure's message


class Body(Protocol):
    """What a `Reader` reads.

    Attributes:
        label: Names the response in messages.
        interrupt: As for `Limit`.
    """

    @property
    def label(self) -> str: ...

    @property
    def interrupt(self) -> Callable[[], str] | None: ...

    def read(self) -> bytes:
        """Return the next piece, ``b""`` at the end; raise what the source raises."""

    def close(self) -> None:
        """End the response, and wait until its source has cleaned up.

        Raises:
            Late: It takes longer than `TIMEOUT`.
        """


class Reader:
    """The body of a response, for a test to read piece by piece.

    Each method reads on where the last one has stopped. A context manager: the
    response is closed at the end of the ``with``, and the source has cleaned up then.

    All methods raise the source's own exception, and `AssertionError` if what they
    wait for does not come within ``timeout`` (seconds), or not before the stream ends.
    Call them in one thread or greenlet.
    """

    def __init__(self, body: Body) -> None:
        self._body = body
        self._decoder = Decoder()
        self._rest = b""  # has come, and was not asked for yet
        self._has_ended = False
        self._is_closed = False

    @property
    def last_event_id(self) -> str | None:
        """The id to reconnect with: of the events read so far, ``None`` for none."""
        return self._decoder.last_event_id

    @property
    def retry(self) -> int | None:
        """The reconnection time received, in milliseconds, ``None`` for none."""
        return self._decoder.retry

    def events(self, n: int | None = None, *, timeout: float = TIMEOUT) -> list[Event]:
        """Return the next ``n`` events, oldest first; ``None``: all up to the end.

        In each, ``.data`` is text, ``.event`` is ``None`` for "message" and ``.id`` is
        the last event id in force, as a browser has them. Comments are no events:
        see `lines`.
        """
        return self._collect("events", self._next_event, n, timeout)

    def lines(self, n: int | None = None, *, timeout: float = TIMEOUT) -> list[str]:
        """Return the next ``n`` lines, empty ones, too; ``None``: all up to the end.

        They are text, decoded as UTF-8, without their ends (LF, CR LF or CR).
        """
        return self._collect("lines", self._next_line, n, timeout)

    def chunks(self, n: int | None = None, *, timeout: float = TIMEOUT) -> list[Chunk]:
        """Return the next ``n`` chunks as they were sent; ``None``: up to the end."""
        return self._collect("chunks", self._next_chunk, n, timeout)

    def bytes(self, *, timeout: float = TIMEOUT) -> Chunk:
        """Return the rest of the body. The stream must end."""
        return b"".join(self.chunks(timeout=timeout))

    def __iter__(self) -> Iterator[Event]:
        """Yield events up to the end; each must come within `TIMEOUT`."""
        return self._iterate("events", self._next_event)

    def iter_lines(self) -> Iterator[str]:
        """Yield lines, as `lines` has them; each must come within `TIMEOUT`."""
        return self._iterate("lines", self._next_line)

    def iter_bytes(self) -> Iterator[Chunk]:
        """Yield chunks; each must come within `TIMEOUT`."""
        return self._iterate("chunks", self._next_chunk)

    def close(self) -> None:
        """End the response: the source is closed. Calling it again does nothing.

        Raises:
            AssertionError: The source has not ended within `TIMEOUT`.
        """
        if self._is_closed:
            return
        self._is_closed = True
        # A body that waits for another thread has the same limit.
        with Limit(TIMEOUT + 1, self._body.interrupt) as limit:
            try:
                limit.call(self._body.close)
            except Late as late:
                raise AssertionError(
                    f"the source of {self._body.label} has not ended within"
                    f" {TIMEOUT:g} s of its close{_at(late)}"
                ) from late.__cause__

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, kind: type | None, *exc_info: object) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # the test's own failure says more
                raise

    # One item each, None at the end.

    def _next_event(self) -> Event | None:
        while True:
            pieces = self._pull().splitlines(keepends=True)
            if not pieces:
                return None
            for place, piece in enumerate(pieces, 1):
                events = self._decoder.feed(piece)
                if events:
                    self._rest = b"".join(pieces[place:])
                    return events[0]

    def _next_line(self) -> str | None:
        text = b""
        while True:
            more = self._pull()
            text += more
            lines = text.splitlines(keepends=True)
            # What a CR at the end belongs to is seen only by the next byte.
            is_whole = len(lines) > 1 or (lines and lines[0].endswith(b"\n"))
            if is_whole or (lines and not more):
                self._rest = b"".join(lines[1:])
                return lines[0].rstrip(b"\r\n").decode("utf-8", "replace")
            if not more:
                return None

    def _next_chunk(self) -> Chunk | None:
        return self._pull() or None

    def _pull(self) -> Chunk:
        """Return what is kept, else the next piece; b"" at the end."""
        if self._rest:
            kept, self._rest = self._rest, b""
            return kept
        if self._is_closed:
            raise ValueError("the response has been closed: read it before")
        if not self._has_ended:
            piece = self._body.read()
            if piece:
                return piece
            self._has_ended = True
        return b""

    # Many.

    def _collect(
        self, what: str, step: Callable[[], T | None], n: int | None, timeout: float
    ) -> list[T]:
        check_count(n)
        check_timeout(timeout)
        found: list[T] = []
        with Limit(timeout, self._body.interrupt) as limit:
            while n is None or len(found) < n:
                try:
                    item = limit.call(step)
                except Late as late:
                    raise AssertionError(
                        self._say_late(what, found, n, timeout) + _at(late)
                    ) from late.__cause__
                if item is None:
                    break
                found.append(item)
        if n is not None and len(found) < n:
            raise AssertionError(
                f"{self._body.label} ended after {len(found)} of {n} {what}"
                f"{_shown(found)}"
            )
        return found

    def _say_late(
        self, what: str, found: list[Any], n: int | None, timeout: float
    ) -> str:
        label = self._body.label
        if n is None:
            return (
                f"{label} has not ended within {timeout:g} s, after {len(found)}"
                f" {what}: say how many to read, as in {what}(3)"
            )
        return (
            f"{label} sent {len(found)} of {n} {what} within {timeout:g} s"
            f"{_shown(found)}"
        )

    def _iterate(self, what: str, step: Callable[[], T | None]) -> Iterator[T]:
        while True:
            with Limit(TIMEOUT, self._body.interrupt) as limit:
                try:
                    item = limit.call(step)
                except Late as late:
                    raise AssertionError(
                        f"{self._body.label} sent no more {what} within"
                        f" {TIMEOUT:g} s{_at(late)}"
                    ) from late.__cause__
            if item is None:
                return
            yield item


def check_count(n: object) -> None:
    """Refuse what is no number of items."""
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise ValueError(f"n must be a whole number from 1 on, or None, got {n!r}")


def check_timeout(timeout: object) -> None:
    """Refuse what is no time limit: a test without one may hang."""
    if not isinstance(timeout, (int, float)) or not 0 < timeout < 1e6:
        raise ValueError(
            f"timeout must be a positive number of seconds, got {timeout!r}"
        )


def _at(late: Late) -> str:
    return f"; its source is at {late}" if str(late) else ""


def _shown(found: list[Any]) -> str:
    if not found:
        return ""
    text = repr(found)
    return f": {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}"
