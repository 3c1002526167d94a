"""`Exchange`: one request and its response, served by a thread of this process.

The body passes through a pair of sockets, so that an application sees what it sees on a
server: a client that leaves or takes nothing. Each chunk is framed by its length, four
bytes, and one of length 0 marks the end: what an application sends as one chunk is read
as one.
"""

from __future__ import annotations

import math
import socket
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from ..runtime.sockets import hang_up, is_writable
from ..runtime.waiting import gevent_hub
from ..servers.connection import CONNECTION
from ..servers.testing import EXCHANGE
from ..streams.stream import Stream
from .leaks import opened_at
from .limit import Late, place, place_of_test
from .reader import TIMEOUT

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

__all__ = ["Exchange"]

_LENGTH = struct.Struct("!I")
_LOOK_EVERY = 0.001  # seconds
_SETTLES = 1.0  # seconds that a source gets at most to begin its wait


class Exchange:
    """A request to an application, and what comes back.

    Args:
        app: The WSGI application.
        environ: The request; its server's part is filled in.

    Attributes:
        socket: The server's side of the connection.
        status: The response's status line, "" before its head is out.
        headers: Its headers.
        sent: How many bytes of the body the application has sent.
        has_head: Set when the head is out, or none will be.
    """

    def __init__(self, app: WSGIApplication, environ: WSGIEnvironment) -> None:
        self._app = app
        self._environ = environ
        environ.update(
            {EXCHANGE: self, "wsgi.multithread": True, "wsgi.multiprocess": False}
        )
        self.socket, self._client = socket.socketpair()
        self.status = self._status = ""
        self.headers: list[tuple[str, str]] = []
        self.sent = self._chunks = 0
        self._error: BaseException | None = None  # what the test has not seen yet
        self.has_head = threading.Event()
        self._opened_at = place_of_test(sys._getframe())
        self._stream: Stream | None = None
        self._is_left = False
        self._is_whole = False  # the end's mark has been read
        self._name = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        self._thread = threading.Thread(
            target=self._serve, name=f"syncstream-test {self._name}", daemon=True
        )

    # The server's side, in its thread.

    def _serve(self) -> None:
        opened_at.set(self._opened_at)
        try:
            self._run()
        except BaseException as error:
            # The application may let the failure of its own write() through.
            if not (self._is_left and isinstance(error, OSError)):
                self._error = error
        finally:
            self._find_stream()
            self.socket.close()
            self._environ.pop(EXCHANGE, None)  # a cycle
            self.has_head.set()

    def _run(self) -> None:
        body = self._app(self._environ, self.start_response)
        try:
            for chunk in body:
                if chunk and not self._send(chunk):
                    return
            if not self._status:
                raise AssertionError(f"{self.label} has not called start_response")
            self._send(b"")
        finally:
            close = getattr(body, "close", None)
            if close is not None:
                close()

    def _send(self, data: bytes) -> bool:
        """Write as a server does, which takes a client that has gone quietly."""
        try:
            self.write(data)
        except OSError:
            return False
        return True

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Any:
        """Take the head; an error that it would hide goes to the test."""
        if exc_info:
            try:
                raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None
        self._status, self.headers = status, headers
        return self.write

    def write(self, data: bytes) -> None:
        """Send a part of the body."""
        if not isinstance(data, bytes):
            raise TypeError(f"a body must be bytes, got {data!r}")
        if not self.status:  # out with the first bytes (PEP 3333)
            self.status = self._status
            self._find_stream()
            self.has_head.set()
        self.sent += len(data)
        self._chunks += 1
        self.socket.sendall(_LENGTH.pack(len(data)) + data)

    def _find_stream(self) -> None:
        reference = self._environ.get(CONNECTION)
        connection = reference() if reference is not None else None
        if self._stream is None and connection is not None:
            self._stream = connection.stream

    # The test's side.

    @property
    def label(self) -> str:
        """Method and path, with the status if it is not the usual one."""
        is_usual = not self.status or self.status.startswith("200")
        return self._name if is_usual else f"{self._name} ({self.status})"

    @property
    def reason(self) -> str | None:
        """Why the stream has ended; ``None`` while it lives, and of other bodies."""
        return None if self._stream is None else self._stream.reason

    def open(self, timeout: float) -> None:
        """Wait for the head, and a moment more: until the source waits, or has sent.

        Then a subscription has begun: the test may publish.

        Raises:
            Late: The head has not come within ``timeout`` seconds.
            BaseException: What the application has raised instead.
        """
        self._thread.start()
        try:
            if not self.has_head.wait(timeout):
                raise Late(self.interrupt())
            if not self.status:
                self._thread.join(TIMEOUT)
                self._raise_error()
        except BaseException:
            self._hang_up()
            self._client.close()
            raise
        self._settle(2)

    def _settle(self, chunks: float = math.inf) -> None:
        """Wait until the source waits, for whatever it is, or has sent that many."""
        until = time.monotonic() + _SETTLES
        while self._is_busy() and self._chunks < chunks and time.monotonic() < until:
            time.sleep(_LOOK_EVERY)

    def _is_busy(self) -> bool:
        stream = self._stream
        if stream is None or stream.reason or not self._thread.is_alive():
            return False
        fd = self.socket.fileno()
        if fd < 0 or not is_writable(fd):  # it waits for the test to read
            return False
        in_hub = gevent_hub() is not None
        return not (stream.has_waited if in_hub else stream.thread_wait is not None)

    def read(self) -> bytes:
        """Return the next chunk, ``b""`` at the end, when the source has ended, too."""
        size = 0
        if not self._is_whole:
            size = _LENGTH.unpack(self._receive(_LENGTH.size) or _LENGTH.pack(0))[0]
        if size:
            return self._receive(size)
        self._is_whole = True
        self._thread.join(TIMEOUT)
        self._raise_error()
        return b""

    def _receive(self, size: int) -> bytes:
        """Return so many bytes; ``b""`` if the connection has been cut."""
        pieces, left = [], size
        while left:
            piece = self._client.recv(left)
            if not piece:
                return b""
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def interrupt(self) -> str:
        """Hang up, which ends a `read`, from any thread; return where the source is."""
        found = place(sys._current_frames().get(self._thread.ident or 0))
        self._hang_up()
        return found

    def _hang_up(self) -> None:
        self._is_left = True
        if self._client.fileno() >= 0:
            hang_up(self._client.fileno())

    def close(self) -> None:
        """Leave, and wait until the application has noticed.

        A source that is about to wait begins to: how it is told is no matter of chance.

        Raises:
            Late: It has not, within `TIMEOUT`.
            BaseException: What has left the application.
        """
        if not self._is_left:
            self._settle()
        self._hang_up()
        self._client.close()
        self._thread.join(TIMEOUT)
        if self._thread.is_alive():
            raise Late(self.interrupt())
        self._raise_error()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
