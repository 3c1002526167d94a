"""Newline-delimited JSON, encoded and decoded: one compact JSON value on each line.

Spec: https://github.com/ndjson/ndjson-spec (media type application/x-ndjson).
"""

from __future__ import annotations

from collections.abc import Callable
from json import loads
from typing import Any

from ..errors import RemoteProtocolError
from .json import Dumps, dumps_or_default
from .lines import LineBuffer
from .raw import as_bytes
from .sse import Event, check_dispatched

__all__ = ["MEDIA_TYPES", "Decoder", "encoder"]

# None is registered; servers and clients use all of these.
MEDIA_TYPES = frozenset(
    f"application/{name}" for name in ("x-ndjson", "ndjson", "jsonl", "x-jsonlines")
)


def encoder(dumps: Dumps | None = None) -> Callable[[Any], bytes | None]:
    """Return the function that turns an item of a generator into a line.

    ``bytes`` pass through unchanged, ``None`` and ``b""`` are checkpoints, an `Event`
    is written as its data (text becomes a JSON string), and any other item is one JSON
    value.

    The function raises ``TypeError`` or ``ValueError`` for an item that cannot be
    encoded, for an event with a name but no data, and if ``dumps`` writes a value over
    several lines.
    """
    json = dumps_or_default(dumps)

    def encode(item: Any) -> bytes | None:
        if item is None:
            return None
        if isinstance(item, (bytes, bytearray, memoryview)):
            return as_bytes(item) or None
        if isinstance(item, Event):
            if item.data is None:
                check_dispatched(item)
                return None
            item = item.data
        text = json(item)
        if isinstance(text, str):
            text = text.encode()
        elif not isinstance(text, (bytes, bytearray)):
            raise TypeError(f"dumps must return str or bytes, got {text!r}")
        if b"\n" in text or b"\r" in text:
            raise ValueError("dumps must write each value on one line, without indent")
        return b"%b\n" % text

    return encode


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


class Decoder:
    """Turns the bytes of an NDJSON stream into values, chunk by chunk.

    Args:
        max_line: The maximum length of a line, in bytes; ``None`` for no limit.

    Raises:
        ValueError: ``max_line`` is not positive.
    """

    def __init__(self, *, max_line: int | None = 4 * 1024 * 1024) -> None:
        if max_line is not None and max_line <= 0:
            raise ValueError(f"max_line must be positive or None, got {max_line!r}")
        self._max_line = max_line
        self._buffer = LineBuffer()
        self._error: RemoteProtocolError | None = None
        self._closed = False

    def feed(self, chunk: bytes) -> list[Any]:
        """Take the next bytes and return the values that they complete, oldest first.

        Empty lines are skipped; lines may end in LF or CRLF.

        Raises:
            RemoteProtocolError: A line is not JSON, not UTF-8, or too long. If the
                chunk completes values before that line, they are returned, and the next
                call raises the error. All later calls raise it again.
            ValueError: The decoder has been closed.
        """
        if self._closed:
            raise ValueError("feed() must not be called after close()")
        if self._error is not None:
            raise self._error
        values: list[Any] = []
        try:
            for line in self._buffer.split(bytes(chunk)):
                self._check_size(len(line))
                if line.strip():
                    values.append(self._value(line))
            self._check_size(self._buffer.size)
        except RemoteProtocolError as error:
            self._error = error
            if not values:
                raise
        return values

    def close(self) -> list[Any]:
        """End the stream; return the value of a last line that has no line end.

        A number there is refused, as its end may be missing.

        Raises:
            RemoteProtocolError: The stream ended within a value, or `feed` had an error
                still to raise.
        """
        self._closed = True
        if self._error is not None:
            raise self._error
        rest = self._buffer.rest().strip()
        self._buffer = LineBuffer()
        if not rest:
            return []
        if rest[-1:].isdigit():
            raise RemoteProtocolError("the stream ended within a number")
        return [self._value(rest)]

    def _check_size(self, size: int) -> None:
        if self._max_line is not None and size > self._max_line:
            raise RemoteProtocolError(f"a line is longer than {self._max_line} bytes")

    def _value(self, line: bytes) -> Any:
        try:
            return loads(line.decode(), parse_constant=_refuse)
        # Bad JSON and bad UTF-8 are ValueErrors, and so is an integer of more
        # digits than sys.get_int_max_str_digits().
        except (ValueError, RecursionError) as error:
            raise RemoteProtocolError(f"a line is not JSON: {error}") from error
