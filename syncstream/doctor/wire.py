"""HTTP as it comes: heads, chunks, codings, lines."""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import RemoteProtocolError
from ..protocol import ndjson, sse
from ..runtime.clock import time
from .observation import INFLATABLE, Finding, Head, coding_of, kind_of, show

__all__ = ["NoStream", "Response", "Text", "is_sendable", "parse_header"]
MAX_HEAD = 64 * 1024  # bytes of head, interim heads (1xx) included
MAX_LINE = 4096  # bytes of a chunk's size line
MAX_INFLATED = 2 * 1024 * 1024  # bytes out of one read; a bomb makes 64 MiB of it


def parse_header(text: str) -> tuple[str, str]:
    """Return name and value of ``Name: value``.

    Raises:
        ValueError: It is no header that can be sent (RFC 9110, 5).
    """
    name, colon, value = text.partition(":")
    if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise ValueError("must be 'Name: value'; what came is not shown")
    if not is_sendable(value):
        raise ValueError(f"must be one line of text, which {name} is not")
    return name, value.strip()


def is_sendable(text: str) -> bool:
    return not re.search("[\0-\x08\x0a-\x1f\x7f\ud800-\udfff]", text)


class NoStream(Exception):
    """There is no response to listen to, for a reason."""

    def __init__(self, name: str, text: str, cure: str) -> None:
        super().__init__(text)
        self.finding = Finding(name, text, cure)


_HEAD_END = re.compile(rb"\r?\n\r?\n")
_STATUS_LINE = re.compile(r"HTTP/(1\.[01]) ([1-9][0-9]{2})(?: (.*))?", re.DOTALL)


class Response:
    """An HTTP/1 response, taken piece by piece.

    Attributes:
        head: The head, ``None`` until it has come.
        is_whole: The body's end mark has come.
        has_begun: Something has come.
        ends_by_closing: The body has no other end than the connection's.
    """

    def __init__(self) -> None:
        self.head: Head | None = None
        self.is_whole = False
        self.has_begun = False
        self.ends_by_closing = False
        self._buffer = bytearray()
        self._size = 0  # of heads so far
        self._chunks: _Chunks | None = None
        self._left = 0

    def take_head(self, data: bytes) -> bytes | None:
        """Take bytes of the head; return those after it, ``None`` before its end.

        Raises:
            NoStream: This is no response.
        """
        self.has_begun = True
        self._size += len(data)
        searched = max(len(self._buffer) - 3, 0)
        self._buffer += data
        while end := _HEAD_END.search(self._buffer, searched):
            head = _parse_head(bytes(self._buffer[: end.start()]))
            del self._buffer[: end.end()]
            searched = 0
            if head.status >= 200:  # else interim, such as 103 Early Hints
                self.head = head
                self._begin_body(head)
                return bytes(self._buffer)
        start = bytes(self._buffer[:5])
        if start != b"HTTP/"[: len(start)]:
            raise _not_http(bytes(self._buffer[:40]))
        if self._size > MAX_HEAD:
            raise NoStream(
                "head",
                f"the head is larger than {MAX_HEAD // 1024} KiB",
                "send fewer headers and cookies; proxies take 4 to 16 KiB",
            )
        return None

    def feed(self, data: bytes) -> bytes:
        """Take what comes after the head; return the body's bytes in it.

        Raises:
            RemoteProtocolError: The body's framing is broken.
        """
        if self.is_whole:
            return b""
        if self._chunks is not None:
            data = self._chunks.feed(data)
            self.is_whole = self._chunks.is_whole
        elif not self.ends_by_closing:
            data = data[: self._left]
            self._left -= len(data)
            self.is_whole = not self._left
        return data

    def _begin_body(self, head: Head) -> None:
        lengths = {value.strip() for value in head.all("Content-Length")}
        length = lengths.pop() if len(lengths) == 1 else ""
        if "chunked" in head.words("Transfer-Encoding"):
            self._chunks = _Chunks()
        elif length.isascii() and length.isdecimal():
            self._left = int(length[:18])
            self.is_whole = not self._left
        else:
            self.ends_by_closing = True


def _not_http(start: bytes) -> NoStream:
    if start[:1] == b"\x15":  # a TLS alert
        return NoStream("tls", "this port speaks TLS", "ask for https:// instead")
    return NoStream(
        "not-http",
        "the server does not speak HTTP/1: it began with"
        f' "{show(start.decode("latin-1"), 40)}"',
        "check the port; an HTTP/2-only server needs a proxy that takes HTTP/1.1",
    )


def _parse_head(data: bytes) -> Head:
    first, *lines = data.decode("latin-1").replace("\r\n", "\n").split("\n")
    match = _STATUS_LINE.fullmatch(first)
    if match is None:
        raise _not_http(data[:40])
    headers: list[tuple[str, str]] = []
    malformed = 0
    for line in lines:
        try:
            headers.append(parse_header(line))
        except ValueError:
            malformed += 1
    version, status, reason = match.groups()
    return Head(version, int(status), reason or "", tuple(headers), malformed)


class _Chunks:
    """The chunked coding (RFC 9112, 7.1), taken piece by piece."""

    def __init__(self) -> None:
        self.is_whole = False
        self._line = bytearray()
        self._state: Literal["size", "data", "end", "trailer"] = "size"
        self._left = 0  # bytes of data, or of trailers that are still taken

    def feed(self, data: bytes) -> bytes:
        """Return the data without its framing.

        Raises:
            RemoteProtocolError: The framing is broken.
        """
        pieces: list[bytes] = []
        at = 0
        while at < len(data) and not self.is_whole:
            if self._state == "data":
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._state = "end"
                continue
            end = data.find(b"\n", at, at + MAX_LINE)
            stop = end + 1 if end >= 0 else min(len(data), at + MAX_LINE)
            self._line += data[at:stop]
            at = stop
            if len(self._line) > MAX_LINE:
                raise RemoteProtocolError("a line of the chunks' framing has no end")
            if end >= 0:
                line = bytes(self._line).rstrip(b"\r\n")
                self._line.clear()
                self._take_line(line)
        return b"".join(pieces)

    def _take_line(self, line: bytes) -> None:
        if self._state == "size":
            match = re.fullmatch(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?", line)
            if match is None:
                text = show(line.decode("latin-1"), 40)
                raise RemoteProtocolError(f'a chunk has the size "{text}"')
            self._left = int(match[1], 16)
            self._state = "data"
            if not self._left:
                self._state, self._left = "trailer", MAX_HEAD
        elif self._state == "end":
            if line:
                raise RemoteProtocolError("a chunk is longer than its size says")
            self._state = "size"
        else:
            self._left -= len(line) + 2
            if self._left < 0:
                raise RemoteProtocolError("the trailer has no end")
            self.is_whole = not line


def _inflater() -> Any:
    # 32: with the head of gzip or zlib, whichever comes.
    return zlib.decompressobj(32 + 15)


class Text:
    """The body as text: what it holds, by the project's decoders and by looking.

    Attributes:
        is_torn: It stands within an event, or a line of NDJSON.
        is_bloated: One read held more, unpacked, than `MAX_INFLATED` or than could
            be looked at before the deadline.
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
        """Take the next bytes; return how many events and comments they complete.

        Raises:
            RemoteProtocolError, zlib.error: They cannot be read.
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
    """What a decoder of events does not tell: comments, and lines of no use.

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
        """Take the next bytes; return how many comments they complete."""
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
        """Take a line; tell whether it is a comment."""
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
