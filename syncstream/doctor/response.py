"""A response, read by http.client under a tap.

http.client parses heads and chunks, as leniently as most clients, and rarely says why
it failed. The tap is the file that it reads from: the tap limits the bytes of heads and
trailers, and names the bytes that break the format.

Spec: RFC 9112 (HTTP/1.1), 2.2, 5 and 7.1.
"""

from __future__ import annotations

import io
import re
import socket
from http.client import BadStatusLine, HTTPException, HTTPResponse, UnknownProtocol
from typing import Literal, cast

from ..errors import RemoteProtocolError
from ..runtime.clock import time
from .observation import End, Head, NoStream, show
from .request import parse_header

__all__ = ["Response"]
MAX_HEAD = 64 * 1024  # bytes of head, interim heads (1xx) included, or of a trailer
_READ = 65536
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?\r?\n")


class Response:
    """A response, as it comes.

    Args:
        sock: The connection; the caller closes it.
        deadline: When to stop waiting, by `time.monotonic`.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._wire = _Wire(sock, deadline)
        self._tap = _Tap(self._wire)
        self._http: HTTPResponse | None = None

    @property
    def has_begun(self) -> bool:
        return bool(self._wire.start)

    @property
    def received_at(self) -> float:
        """When the last bytes came, by `time.monotonic`."""
        return self._wire.received_at

    @property
    def end(self) -> End:
        """How the body ended, after `read` has returned ``b""``."""
        assert self._http is not None
        if not self._wire.is_at_end:
            return "whole"
        has_mark = self._http.chunked or self._http.length is not None
        return "cut" if has_mark else "closed"

    def read_head(self) -> Head:
        """Read interim heads, and return the one after them.

        Raises:
            NoStream: This is no response.
            TimeoutError: The deadline has passed.
            OSError: The connection broke.
        """
        status = 0
        try:
            while status < 200:
                # HTTPResponse uses nothing of a socket but makefile().
                self._http = HTTPResponse(cast(socket.socket, self._tap))
                self._http.begin()
                status = self._http.status
        except (BadStatusLine, UnknownProtocol) as error:
            if not self._wire.is_at_end:
                raise _not_http(self._wire.start) from error
        except (HTTPException, RemoteProtocolError) as error:
            raise NoStream(
                "head",
                f"the head cannot be read: {error}",
                "send fewer headers and cookies; proxies accept 4 to 16 KiB",
            ) from error
        if self._wire.is_at_end:
            raise NoStream(
                "no-head",
                "the server closed the connection without an answer",
                "check the server's log; is this the right port?",
            )
        assert self._http is not None
        self._tap.begin_body()
        return Head(
            version="1.0" if self._http.version == 10 else "1.1",
            status=status,
            reason=self._http.reason,
            headers=tuple((n, v.strip()) for n, v in self._http.headers.items()),
            malformed=self._tap.malformed,
        )

    def read(self) -> bytes:
        """Return the next bytes of the body as they come, ``b""`` at its end.

        Raises:
            RemoteProtocolError: The body's framing is broken.
            TimeoutError: The deadline has passed.
            OSError: The connection broke.
        """
        assert self._http is not None
        try:
            return self._http.read1(_READ)
        except HTTPException as error:
            if self._wire.is_at_end:  # within a chunk
                return b""
            raise RemoteProtocolError(str(error)) from error


class _Wire(io.RawIOBase):
    """A connection's bytes until a deadline, and when they came.

    Attributes:
        start: The first bytes.
        received_at: When the last bytes came, by `time.monotonic`.
        is_at_end: A read has found the connection closed by the server.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline
        self.start = b""
        self.received_at = 0.0
        self.is_at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        size = self._sock.recv_into(buffer)
        self.received_at = time.monotonic()
        self.is_at_end = not size
        if len(self.start) < 40:
            self.start += bytes(buffer[: min(size, 40)])
            # Now: without a line end, http.client would wait for the rest of the line.
            if not self.start.startswith(b"HTTP/"[: len(self.start)]):
                raise _not_http(self.start)
        return size


class _Tap:
    """The file that http.client reads.

    Attributes:
        malformed: Number of lines of the head that are no headers. They are hidden from
            http.client, which would end the head there.
    """

    def __init__(self, wire: _Wire) -> None:
        self.malformed = 0
        self._wire = wire
        self._file = io.BufferedReader(wire, _READ)
        self._next: Literal["status", "header", "chunk", "trailer"] = "status"
        self._size = 0  # bytes of lines since the beginning, or since the last data

    def makefile(self, mode: str) -> _Tap:
        return self

    def begin_body(self) -> None:
        self._next = "chunk"
        self._size = 0

    def readline(self, limit: int) -> bytes:
        line = self._line(limit)
        if self._next == "status":
            self._next = "header"
        elif self._next == "header":
            while line.strip() and not _is_header(line):
                self.malformed += 1
                line = self._line(limit)
            if not line.strip():  # the head of an interim response may end here
                self._next = "status"
        elif self._next == "chunk" and not self._wire.is_at_end:
            match = _SIZE.fullmatch(line)
            if match is None:
                raise RemoteProtocolError(f'a chunk has the size "{_shown(line)}"')
            if not int(match[1], 16):
                self._next = "trailer"
        return line

    def _line(self, limit: int) -> bytes:
        line = self._file.readline(limit)
        self._size += len(line)
        if self._size > MAX_HEAD:
            part = {"chunk": "line of a chunk's size", "trailer": "trailer"}
            raise RemoteProtocolError(
                f"the {part.get(self._next, 'head')} is larger than"
                f" {MAX_HEAD // 1024} KiB"
            )
        return line

    def read(self, size: int) -> bytes:
        """Return the line end after a chunk, which http.client drops unseen."""
        data = self._file.read(size)
        if data != b"\r\n" and not self._wire.is_at_end:
            raise RemoteProtocolError(
                f'a chunk is followed by "{_shown(data)}" instead of a line end: it is'
                " longer than its size says"
            )
        return data

    def read1(self, size: int) -> bytes:
        self._size = 0
        # Fill the buffer first: read1 alone would ask the connection for `size` bytes.
        return self._file.read1(size) if size and self._file.peek(1) else b""

    def flush(self) -> None:
        """Do nothing: nothing is written."""

    def close(self) -> None:
        """Do nothing: interim responses close their file, which is the final one's."""


def _is_header(line: bytes) -> bool:
    try:
        parse_header(line.decode("latin-1").removesuffix("\n").removesuffix("\r"))
    except ValueError:
        return False
    return True


def _shown(line: bytes) -> str:
    return show(line.rstrip(b"\r\n").decode("latin-1"), 40)


def _not_http(start: bytes) -> NoStream:
    if start[:1] == b"\x15":  # a TLS alert
        return NoStream("tls", "this port is HTTPS", "use https:// instead")
    return NoStream(
        "not-http",
        "the server does not speak HTTP/1: it began with"
        f' "{show(start[:40].decode("latin-1"), 40)}"',
        "check the port; an HTTP/2-only server needs a proxy for HTTP/1.1",
    )
