"""`ChunkedBody`: HTTP's chunks without their framing, many at a time.

Spec: RFC 9112, §7.1. ``http.client`` reads chunk by chunk, which costs more than the
events in them.
"""

from __future__ import annotations

from enum import Enum

__all__ = ["ChunkedBody"]

_LONGEST = 65536  # bytes of a line of the framing, as in http.client


class _Next(Enum):
    """What comes next in the body."""

    SIZE = 1  # the line before a chunk
    DATA = 2
    END = 3  # the line end after a chunk
    TRAILER = 4  # a line of it
    NOTHING = 5


class ChunkedBody:
    """Takes the bytes of a body and gives its content back."""

    def __init__(self) -> None:
        self._next = _Next.SIZE
        self._rest = b""  # the beginning of a line of the framing
        self._left = 0  # bytes of the chunk that are still to come

    @property
    def is_complete(self) -> bool:
        """Whether the last chunk and the trailer have come."""
        return self._next is _Next.NOTHING

    def feed(self, received: bytes) -> bytes:
        """Return the content of the next bytes, ``b""`` if they hold none.

        Raises:
            ValueError: They are no chunks.
        """
        data, position = self._rest + received, 0
        self._rest = b""
        pieces: list[bytes] = []
        while position < len(data) and self._next is not _Next.NOTHING:
            if self._next is _Next.DATA:
                piece = data[position : position + self._left]
                pieces.append(piece)
                position += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._next = _Next.END
                continue
            stop = data.find(b"\n", position)
            if stop < 0:
                self._rest = data[position:]
                if len(self._rest) > _LONGEST:
                    raise ValueError("a line of a chunked body is too long")
                break
            line, position = data[position:stop], stop + 1
            if self._next is not _Next.SIZE:
                self._take(line.rstrip(b"\r"))
                continue
            size = _size(line)
            after = position + size
            if size and data[after : after + 2] == b"\r\n":  # all of it has come
                pieces.append(data[position:after])
                position = after + 2
            else:
                self._next = _Next.DATA if size else _Next.TRAILER
                self._left = size
        return b"".join(pieces)

    def _take(self, line: bytes) -> None:
        """Process a line after a chunk's data, or of the trailer."""
        if self._next is _Next.TRAILER:
            if not line:
                self._next = _Next.NOTHING
        elif line:
            raise ValueError(f"a chunk is longer than its size: {line[:20]!r}")
        else:
            self._next = _Next.SIZE


def _size(line: bytes) -> int:
    """Return a chunk's size; its extensions are ignored.

    Raises:
        ValueError: The line holds none.
    """
    try:
        size = int(line.partition(b";")[0], 16)
    except ValueError:
        size = -1
    if size < 0:
        raise ValueError(f"a chunk begins with no size: {line[:20]!r}")
    return size
