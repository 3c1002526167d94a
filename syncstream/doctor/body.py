"""The body's text: events, comments and values, counted as they come."""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..protocol import ndjson, sse
from ..runtime.clock import time
from .observation import INFLATABLE, Head, coding_of, kind_of

__all__ = ["Text"]
MAX_INFLATED = 2 * 1024 * 1024  # bytes from one read; a gzip bomb yields 64 MiB


def _inflater() -> Any:
    # 32: detect whether the header is gzip's or zlib's.
    return zlib.decompressobj(32 + 15)


class Text:
    """The body as text, read by the project's decoders and line by line.

    Attributes:
        is_torn: The bytes so far end within an event or an NDJSON line.
        is_bloated: One read inflated to more than `MAX_INFLATED`, or to more than
            could be decoded before the deadline.
    """

    def __init__(self, head: Head, deadline: float) -> None:
        self._deadline = deadline
        self._is_ndjson = kind_of(head) == "ndjson"
        self._events = sse.Decoder()
        self._values = ndjson.Decoder()
        self._lines = _Lines()
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._is_utf8 = True
        self._is_ascii = True
        coding = coding_of(head)
        self._is_unread = bool(coding) and coding not in INFLATABLE
        self._inflate = _inflater() if coding in INFLATABLE else None
        self.is_torn = False
        self.is_bloated = False

    def feed(self, data: bytes) -> tuple[int, int]:
        """Take the next bytes; return the numbers of events and comments completed.

        Raises:
            RemoteProtocolError, zlib.error: The bytes cannot be decoded.
        """
        events = comments = size = 0
        for piece in self._unpack(data):
            new_events, new_comments = self._read(piece)
            events += new_events
            comments += new_comments
            size += len(piece)
            if size > MAX_INFLATED or time.monotonic() > self._deadline:
                self.is_bloated = True
                break
        return events, comments

    def _unpack(self, data: bytes) -> Iterator[bytes]:
        if self._is_unread:
            return
        if self._inflate is None:
            yield data
            return
        while True:
            piece = self._inflate.decompress(data, 65536)
            data = self._inflate.unconsumed_tail or self._inflate.unused_data
            if self._inflate.eof:  # each event may be a member of its own
                self._inflate = _inflater()
            yield piece
            if not data and len(piece) < 65536:
                return

    def _read(self, data: bytes) -> tuple[int, int]:
        self._check_encoding(data)
        if self._is_ndjson:
            if data:
                self.is_torn = not data.endswith(b"\n")
            return len(self._values.feed(data)), 0
        comments = self._lines.feed(data)
        self.is_torn = self._lines.is_torn
        return len(self._events.feed(data)), comments

    def close(self) -> None:
        if self._is_ndjson and not self._is_unread:
            self._values.close()

    def _check_encoding(self, data: bytes) -> None:
        self._is_ascii = self._is_ascii and data.isascii()
        if self._is_utf8:
            try:
                self._utf8.decode(data)
            except UnicodeDecodeError:
                self._is_utf8 = False

    def facts(self) -> dict[str, Any]:
        return {
            "retry": self._events.retry,
            "last_id": self._events.last_event_id,
            "stray": self._lines.stray,
            "sample": self._lines.sample,
            "dataless": self._lines.dataless,
            "is_utf8": self._is_utf8,
            "is_ascii": self._is_ascii,
        }


_FIELDS = frozenset((b"data", b"event", b"id", b"retry"))


@dataclass(slots=True)
class _Lines:
    """Comments and ignored lines, which a decoder of events does not report.

    Only the beginning of each line is kept.
    """

    stray: int = 0
    sample: str = ""
    dataless: int = 0
    _line: bytes = b""
    _after_cr: bool = False
    _is_first: bool = True
    _fields: set[bytes] = field(default_factory=set)  # of the block so far

    def feed(self, data: bytes) -> int:
        """Take the next bytes; return the number of comments completed."""
        if self._after_cr and data:
            data = data.removeprefix(b"\n")
            self._after_cr = False
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        comments = 0
        *lines, rest = data.split(b"\n")
        for line in lines:
            comments += self._take(self._line + line)
            self._line = b""
        self._line = (self._line + rest)[:200]
        return comments

    @property
    def is_torn(self) -> bool:
        return bool(self._line or self._fields)

    def _take(self, line: bytes) -> bool:
        """Take a line; return whether it is a comment."""
        if self._is_first:
            self._is_first = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        name = line.partition(b":")[0]
        if not line:
            self.dataless += b"event" in self._fields and b"data" not in self._fields
            self._fields.clear()
        elif name in _FIELDS:
            self._fields.add(name)
        elif name:
            self.stray += 1
            self.sample = self.sample or line[:80].decode(errors="replace")
        return line[:1] == b":"
