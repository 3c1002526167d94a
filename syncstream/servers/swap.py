"""Takes a connection from its server once the response's head has been sent.

A subscriber needs its connection, but not the thread or greenlet that the server
would keep for it. In the response's first step, the server's descriptor becomes one end
of a socket pair, and the server writes its head and our opening into the pair. In the
second step we read them back. If they are exactly a head and the opening, the head
shows the framing (chunked or raw), and we take the connection; the server finishes an
ordinary response, into the pair. If the bytes differ, or there are none, we put the
connection back and send the bytes as they came: nothing is lost.

Ownership. One client's bytes must never reach another client. So each descriptor has
exactly one owner at any time; only the owner writes to it and closes it:

- The server's *descriptor number* always belongs to the server. It refers to the
  connection before `Swap` and again after `Swap.undo`; in between, and forever after
  `Swap.take`, it refers to one end of the pair. We never close it. We redirect it
  (dup2) at most twice, in `Swap` and in `undo`, both before the server can have closed
  it: in the request's own thread or greenlet, while our iterable runs, without a
  switch, and under `Server.lock` if the server has another thread. `undo` first
  compares inodes to see whether the number still refers to the pair. After `take` we
  never touch the number: it may be another client's.
- The connection, as duplicated by `Swap`, belongs to the `Swap`, which writes nothing
  to it. `take` gives it away once. The new owner writes the bytes that `take` returned
  and closes the connection.
- Our end of the pair always belongs to the `Swap`. We only read from it. Nobody reads
  the bytes that the server writes after `take`.

Nobody may watch the server's descriptor during a swap. Unread bytes from the client
stay in the kernel and belong to the new owner. A pipelined request is not answered
(RFC 9112 §9.6: the head says ``Connection: close``), and the rest of a POST's body
is dropped as far as it is there. So a client that announces a body delays nothing,
even if it never sends it.

Deliberately not used: SO_SNDTIMEO on the pair. A blocking send that times out ends with
EAGAIN, for which gunicorn logs a traceback. Instead we drain the pair when it is full.
"""

from __future__ import annotations

import _socket
import _thread
import errno
import logging
import os
import re
import select
import socket
import sys
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..runtime.clock import time
from ..runtime.forks import process_key
from ..runtime.journal import journal, report
from ..runtime.sockets import (
    borrowed,
    forget,
    hang_up,
    is_hung_up,
    native,
    release,
)
from ..runtime.waiting import gevent_hub, runner, say
from ..runtime.watch import Timer, watch
from .contract import Environ, Server, SocketLike
from .descriptors import duplicate, none_left
from .framing import read_back
from .guard import say_failed

if sys.platform != "win32":
    import resource

__all__ = ["Refused", "Swap", "Taken"]

log = logging.getLogger("syncstream.servers.handover")

_LOOK_EVERY = 0.25  # seconds: the server may write more than a pair holds
_LOOK_AGAIN = 0.005  # seconds, while it does
MOST_WRITTEN = 16 << 20
MOST_UNREAD = 1 << 16  # bytes of a request's body
_FETCHED = 1 << 16  # bytes per read; for more, malloc would map memory each time
SEND_TIMEOUT = 10.0  # seconds, for bytes sent after `undo`

_HTTP_1 = re.compile(r"HTTP/1\.[0-9]")

_SWAPPED, _TAKEN, _CLOSED = range(3)

_handed_over: weakref.WeakSet[Any] = weakref.WeakSet()
"""The servers' socket objects whose connections were taken."""


class Refused(Exception):
    """A connection cannot leave its server; its text says why.

    Attributes:
        is_gone: The client has left, so the response must end.
        is_full: Only the descriptors that the server itself needs are left.
        is_choice: The client's own behaviour caused the refusal.
    """

    def __init__(
        self,
        reason: str,
        *,
        is_gone: bool = False,
        is_full: bool = False,
        is_choice: bool = False,
    ) -> None:
        super().__init__(reason)
        self.is_choice = is_choice
        self.is_gone = is_gone
        self.is_full = is_full


@dataclass(frozen=True, slots=True, eq=False)  # of one connection
class Taken:
    """A connection that belongs to the caller, who must close it.

    Attributes:
        fd: The descriptor: non-blocking, not inherited by other programs.
        head: The bytes to send first: the response's head and the framed opening.
        is_chunked: All later bytes must be sent in chunks (RFC 9112 §7.1).
    """

    fd: int
    head: bytes
    is_chunked: bool


class Swap:
    """A connection withheld from its server, whose writes come to us instead.

    Call its methods in the request's thread or greenlet.

    Args:
        environ: The request's WSGI environ.
        server: The server that made the environ.

    Raises:
        Refused: The connection cannot leave its server; nothing has changed.
    """

    def __init__(self, environ: Environ, server: Server) -> None:
        self._state = _CLOSED
        self._timer: Timer | None = None
        self._process = process_key()
        self._runner = runner()
        self._environ = environ
        # Every fact is needed: the client's bytes would mix with the server's.
        self._server = server = server.exact or server
        self._written = bytearray()
        # Native: the watch's thread takes it too, and everybody holds it only briefly.
        self._lock = native(_thread, "allocate_lock")()
        try:
            clock = watch()
        except (OSError, RuntimeError) as error:  # no descriptor or thread is left
            raise Refused(f"it cannot be watched: {error}") from error
        try:
            lock = server.lock(environ)
        except Exception as error:
            raise _unknown(server, error) from error
        with lock:
            try:
                self._socket = _ready(environ, server)
            except Refused:
                raise
            except Exception as error:
                raise _unknown(server, error) from error
            try:
                self._swap(self._socket.fileno())
            except ValueError as error:  # the hard limit has been lowered since
                raise Refused(f"RLIMIT_NOFILE: {error}") from error
            except OSError as error:
                is_full = error.errno in (errno.EMFILE, errno.ENFILE)
                raise Refused(str(error.strerror), is_full=is_full) from error
        self._clock = clock
        # Weak: the clock must not keep a dropped swap alive.
        reference = weakref.ref(self)

        def look() -> None:
            swap = reference()
            if swap is not None:
                swap._begin_to_look()

        try:
            clock.later(look)  # mostly the connection has been taken by then
        except BaseException:
            self.undo()
            raise

    def _swap(self, fd: int) -> None:
        connection = duplicate(fd)
        try:
            # Native: gevent's sockets wait in the hub and defer their closing.
            theirs, ours = _socket.socketpair()
        except OSError as error:
            release(connection)
            if error.errno == errno.EMFILE:  # the soft limit, for the server's own
                raise none_left(
                    resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                ) from error
            raise
        except BaseException:
            release(connection)
            raise
        try:
            ours.setblocking(False)
            # O_NONBLOCK is a flag of the open file, so dup2 does not carry it over. A
            # gevent socket on a blocking file stops the hub; any other socket fails on
            # a non-blocking one.
            self._is_blocking = os.get_blocking(fd)
            if theirs.gettimeout() is not None or not self._is_blocking:
                os.set_blocking(theirs.fileno(), self._is_blocking)
            _forget_in_hub(fd)
            inode = _inode(theirs.fileno())  # now: nothing may fail after dup2
            # By default, programs that this process starts would inherit it.
            os.dup2(theirs.fileno(), fd, inheritable=False)
        except BaseException:
            ours.close()
            release(connection)
            raise
        finally:
            theirs.close()
        self._fd, self._connection, self._ours = fd, connection, ours
        self._inode = inode
        self._state = _SWAPPED

    def take(self, opening: bytes) -> Taken | None:
        """Take the connection, if the server has written exactly what it should have.

        Args:
            opening: The bytes that the iterable has yielded since the swap.

        Returns:
            The connection, which now belongs to the caller; ``None`` if the server
            has written anything but a head and the opening, or nothing yet (some
            middlewares read ahead). After ``None``, call `undo`.
        """
        with self._lock:
            if self._state != _SWAPPED:
                return None
            self._fetch()
            is_old = self._environ.get("SERVER_PROTOCOL") == "HTTP/1.0"
            found = read_back(bytes(self._written), opening, is_http_1_0=is_old)
            if found is None:
                return None
            self._state = _TAKEN
        self._forget_timer()
        self._written.clear()
        fd = self._connection
        try:
            self._part(fd)
        except BaseException:
            hang_up(fd)
            release(fd)
            raise
        finally:
            self._connection = -1
        return Taken(fd, *found)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._clock.cancel(self._timer)

    def _part(self, fd: int) -> None:
        """Separate the server from the connection, and prepare it for its new owner."""
        # The server now reads an end of file: it waits neither for another request
        # nor for the client to close.
        with suppress(OSError):
            self._ours.shutdown(socket.SHUT_WR)
        # Otherwise the server answers requests that it has read ahead (pywsgi did).
        self._server.drop_read_ahead(self._environ)
        if self._environ.get("REQUEST_METHOD") != "GET":
            _drain(fd)
        if type(self._socket) not in self._server.plain_sockets:
            _handed_over.add(self._socket)
        if self._is_blocking:
            os.set_blocking(fd, False)

    def undo(self) -> None:
        """Put the connection back, and send the bytes that the server has written.

        The call blocks like the server's own send (under gevent, only its greenlet). A
        client that does not accept the bytes in time is hung up. In any other thread or
        greenlet the call does nothing: the server may be writing.
        """
        # Also by thread: `runner` changes its answer when greenlet is imported.
        if self._runner not in (runner(), threading.get_ident()) or self._is_copy:
            return
        with self._server.lock(self._environ):
            with self._lock:
                if self._state != _SWAPPED:
                    return
                self._state = _CLOSED
                self._fetch()
                is_theirs = self._is_in_place()
                if is_theirs:
                    os.set_blocking(self._connection, os.get_blocking(self._fd))
                    _forget_in_hub(self._fd)
                    os.dup2(self._connection, self._fd, inheritable=False)
                else:
                    hang_up(self._connection)
                self._drop_connection()
                self._drop_pair()
            if not is_theirs:
                text = "a server has closed a connection that was swapped"
                report(log, logging.DEBUG, text)
            is_whole = len(self._written) <= MOST_WRITTEN
            if is_theirs and not (is_whole and _send(self._fd, self._written)):
                hang_up(self._fd)
        self._written.clear()
        self._forget_timer()

    def close(self) -> None:
        """End the swap when the server has finished the response.

        A connection that was not taken is put back (see `undo`). May be called more
        than once. In another thread or greenlet, only the pair of a taken connection is
        closed.
        """
        self.undo()
        if self._is_copy:
            return
        with self._lock:
            if self._state != _TAKEN:
                return
            self._state = _CLOSED
            if self._server.closes_first and self._drop_pair_later():
                return
            self._ours.close()  # its server reads an end of file since `_part`

    def __del__(self) -> None:
        # Nobody has closed the swap, and any thread may run this: it is too late to put
        # the connection back.
        if self._state == _CLOSED or self._is_copy:
            return
        if self._state == _SWAPPED:
            hang_up(self._connection)
            self._drop_connection()
            # Log later: a garbage collection may interrupt the logging of a line.
            text = "a swap was dropped: its client is hung up"
            journal().later(log, logging.DEBUG, text)
        self._drop_pair()
        self._state = _CLOSED

    @property
    def _is_copy(self) -> bool:
        """Whether this is a forked child, so that the connection is its parent's."""
        return self._process is not process_key()

    # Call the methods below under the lock; only `_relieve` takes it itself.

    def _fetch(self) -> None:
        """Read what the server has written so far."""
        while len(self._written) <= MOST_WRITTEN:
            try:
                data = self._ours.recv(_FETCHED)
            except BlockingIOError:
                return
            except OSError as error:  # closed with bytes unread
                say(log, logging.DEBUG, "a server's end of a pair: %s", error)
                return
            self._written += data
            if len(data) < _FETCHED:  # that was all
                return

    def _begin_to_look(self) -> None:
        """Drain the pair from now on, while the swap lasts."""
        reference, when = weakref.ref(self), self._relieve()

        def look() -> float | None:
            swap = reference()
            return None if swap is None else swap._relieve()

        if when is not None:
            self._timer = self._clock.call_at(when, look)

    def _relieve(self) -> float | None:
        """Drain the pair while the server writes more than it holds (200 KB).

        Returns:
            When to look again, `time.monotonic`; ``None`` for never.
        """
        with self._lock:
            if self._state != _SWAPPED:
                return None
            before = len(self._written)
            self._fetch()
            after = len(self._written)
            if after > MOST_WRITTEN:
                with suppress(OSError):
                    self._ours.shutdown(socket.SHUT_RDWR)
                return None
        return time.monotonic() + (_LOOK_EVERY if before == after else _LOOK_AGAIN)

    def _is_in_place(self) -> bool:
        """Return whether the server's number still refers to its end of the pair."""
        if self._server.is_closing(self._environ):
            return False
        try:
            return self._socket.fileno() == self._fd and _inode(self._fd) == self._inode
        except OSError:
            return False

    def _drop_connection(self) -> None:
        fd, self._connection = self._connection, -1
        release(fd)

    def _drop_pair(self) -> None:
        # Shut down before closing: a forked child may hold a copy, and under gevent
        # the server would wait on a registration that is gone.
        with suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        self._ours.close()

    def _drop_pair_later(self) -> bool:
        """Close our end when the server has closed its own."""
        pair, clock = self._ours, self._clock
        fd = pair.fileno()

        def closed() -> None:
            clock.remove(fd, closed)
            pair.close()

        try:
            clock.add(fd, closed)
        except OSError as error:
            report(log, logging.DEBUG, "a pair is closed early: %s", error)
            return False
        return True


def _checked(environ: Environ, server: Server) -> SocketLike:
    """Return the server's socket, or raise the reason why it must stay."""
    if sys.platform == "win32":
        raise Refused("Windows does not let us")
    method = environ.get("REQUEST_METHOD")
    if method not in ("GET", "POST", "QUERY"):
        # Other methods reach a stream only because some views, such as Django's,
        # accept any method.
        text = f"the method is {_told(method)}, not GET, POST or QUERY"
        raise Refused(text, is_choice=method != "HEAD")
    protocol = environ.get("SERVER_PROTOCOL")
    # A client may announce HTTP/1.9; the answer is 1.1 (RFC 9110 §2.5).
    if not _HTTP_1.fullmatch(str(protocol)):
        raise Refused(f"the protocol is {_told(protocol)}, not HTTP/1")
    sock = server.socket(environ)
    if sock is None:
        raise Refused(f"{server.name} does not show its socket")
    if server.is_tls(environ):
        raise Refused("the server speaks TLS")
    if method != "GET":
        # More than the kernel keeps for us would stop a client that is sending it.
        unread = server.unread(environ)
        if unread is None or unread > MOST_UNREAD:
            told = "an unknown number of" if unread is None else str(unread)
            raise Refused(f"{told} bytes of the request's body are unread")
    reason = server.stays(environ)
    if reason is not None:
        raise Refused(reason)
    kind = type(sock)
    if kind not in server.plain_sockets:
        # Compare exact types: gevent's SSLSocket does not inherit from ssl.SSLSocket,
        # and an unknown type may have its own buffer.
        if kind not in _plain_sockets():
            raise Refused(f"the socket is a {kind.__module__}.{kind.__qualname__}")
        if sock in _handed_over:
            raise Refused("the connection was handed over before", is_gone=True)
    fd = sock.fileno()
    if is_hung_up(fd):
        raise Refused("the client has left", is_gone=True)
    check_descriptor(fd)
    return sock


def _ready(environ: Environ, server: Server) -> SocketLike:
    """Return the client's socket, which nobody is using; under the server's lock."""
    if server.is_closing(environ):
        raise Refused("the server is closing it", is_gone=True)
    sock = _checked(environ, server)
    if server.unsent(environ):
        raise Refused(
            "the server has not sent the previous response yet", is_choice=True
        )
    server.leave_body(environ)
    return sock


def _drain(fd: int) -> None:
    """Drop what the client has sent of its request's body, for as much as is there."""
    with suppress(OSError), borrowed(fd) as sock:
        for _ in range(2):  # whoever sends more has left the rules
            if len(sock.recv(MOST_UNREAD, socket.MSG_DONTWAIT)) < MOST_UNREAD:
                return


def _unknown(server: Server, error: Exception) -> Refused:
    say_failed(server, error)
    return Refused(f"its place in {server.name} is not known")


def _told(text: object) -> str:
    """Return a client's text, escaped and shortened for the log."""
    return ascii(str(text)[:20])[1:-1]


def check_descriptor(fd: int) -> None:
    try:
        with borrowed(fd, family=-1, protocol=-1) as sock:
            kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            protocol, family = sock.proto, sock.family
    except OSError as error:
        raise Refused(f"not a socket: {error.strerror}") from error
    if kind != socket.SOCK_STREAM or protocol not in (0, socket.IPPROTO_TCP):
        raise Refused("the socket is not a stream")
    if family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
        raise Refused("the socket is neither TCP nor Unix")
    if family == socket.AF_UNIX:
        try:
            with borrowed(fd, family=socket.AF_UNIX) as sock:
                name = sock.getsockname()
        except OSError as error:
            reason = f"the client has left: {error.strerror}"
            raise Refused(reason, is_gone=True) from error
        if not name:  # no name: half of a pair
            raise Refused("the socket is one of a pair")


def _plain_sockets() -> tuple[type, ...]:
    """Return the types of sockets that have no buffer of their own."""
    gevent = sys.modules.get("gevent._socket3")
    types: tuple[type, ...] = (socket.socket, native(socket, "socket"))
    return types if gevent is None else (*types, gevent.socket)


def _forget_in_hub(fd: int) -> None:
    """Remove a descriptor's registrations from gevent's loop.

    libev's epoll keeps reporting a connection as long as it is open, even if its number
    refers to another file by now (measured: once for each client whose request came in
    two pieces). And if one wait ends and the next begins in the same turn of the loop,
    libev does not update its epoll at all unless a new watcher starts.
    """
    loop = getattr(gevent_hub(), "loop", None)
    if loop is None or getattr(loop, "backend", None) != "epoll":
        return  # libuv registers again for each wait
    forget(loop.fileno(), fd)
    watcher = loop.io(fd, 1)
    watcher.start(int)
    watcher.stop()
    watcher.close()


def _inode(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _send(fd: int, data: bytearray) -> bool:
    """Send the client the missed bytes; return whether it accepted them in time."""
    deadline = time.monotonic() + SEND_TIMEOUT
    view = memoryview(data)
    while view:
        try:
            with borrowed(fd) as sock:
                view = view[sock.send(view, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            _await_writable(fd, left)
        except OSError as error:  # the server's next write fails, too
            report(
                log, logging.DEBUG, "a client left before it was put back: %s", error
            )
            return True
    return True


def _await_writable(fd: int, timeout: float) -> None:
    if gevent_hub() is not None:
        from gevent.socket import wait_write

        with suppress(TimeoutError):
            wait_write(fd, timeout)
        return
    poll = native(select, "poll")()
    poll.register(fd, select.POLLOUT)
    poll.poll(timeout * 1000)
