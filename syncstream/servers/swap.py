"""Takes a connection from its server once the response's head has been sent.

A subscriber needs its connection, and not the thread or greenlet that its server
would hold for it. So in the response's first step the server's descriptor is made
one end of a socket pair; the server writes its head and our opening into that; in
the second step they are read back. If they are exactly that, in a framing that is
known by them (chunked or raw: it is learned, not assumed), the connection is ours, and
the server finishes an ordinary response, into the pair. If they are anything else, or
nothing, all is put back and sent as it came: until then nothing is lost.

Who owns what. One client's bytes must never reach another, so at each time each
descriptor has one owner, who alone writes to it and closes it:

- The server's *number* is always the server's. Before `Swap`, and again after
  `Swap.undo`, it stands for the connection; in between, and for ever after
  `Swap.take`, for one end of the pair. We never close it. We change what it stands
  for (dup2) twice at most: in `Swap`, and in `undo`, both before its server can have
  closed it: in the request's own thread or greenlet, while that is in our iterable,
  without a switch in between, and under `Server.lock` where the server has another
  thread. `undo` asks first whether the number still stands for the pair, by its
  inode. After `take` we do not so much as look at it: it may be another client's.
- The connection itself, the duplicate that `Swap` makes, is the `Swap`'s, which
  writes nothing to it, until `take` gives it away, once. Who is given it writes what
  `take` has returned, closes it, and is the only one.
- Our end of the pair is the `Swap`'s, and stays so. We only read from it. What the
  server writes into it after `take` is read by nobody.

Nobody may be watching the server's descriptor during a swap. What is still to be
read from the client stays in the kernel, and is its new owner's: a request that came
behind this one is not answered (RFC 9112 §9.6: the head says ``Connection: close``),
and a request's body that nobody has read stays unread. So a client that announces a
body, whether it sends it or not, holds nothing up.

Not used on purpose: SO_SNDTIMEO on the pair. A blocking send that runs into it ends
with EAGAIN, for which gunicorn writes a traceback; what does not fit into the pair is
fetched out of it instead.
"""

from __future__ import annotations

import _socket
import _thread
import errno
import functools
import logging
import os
import re
import select
import socket
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ..runtime.clock import time
from ..runtime.journal import journal, report
from ..runtime.sockets import (
    borrowed,
    forget,
    hang_up,
    hold,
    is_hung_up,
    native,
    release,
)
from ..runtime.waiting import hub, runner, say
from ..runtime.watch import Timer, watch
from .contract import Environ, Server, SocketLike

if sys.platform != "win32":
    import fcntl
    import resource

__all__ = ["Refused", "Swap", "Taken", "descriptor_limit", "read_back"]

log = logging.getLogger("syncstream.servers.handover")

LOWEST = 4096
"""Where the descriptors of connections that were taken begin: select(2), by which
waitress waits, dies of those from 1024 on, and these stay for as long as clients do."""

_RESERVE = 64  # descriptors that stay free for the server, and for everything else
_MOST_DESCRIPTORS = 1 << 20
_LOOK_EVERY = 0.25  # seconds: what the server writes may be more than a pair takes
_LOOK_AGAIN = 0.005  # seconds, if it was
_MOST_WRITTEN = 16 << 20
_FETCHED = 1 << 18  # bytes at once
_SEND_TIMEOUT = 10.0  # seconds, for what is put back

_SWAPPED, _TAKEN, _CLOSED = range(3)

_handed_over: weakref.WeakSet[Any] = weakref.WeakSet()
"""The servers' socket objects whose connections were taken."""


class Refused(Exception):
    """A connection cannot leave its server; its text says why.

    Attributes:
        is_gone: Nobody is there to write to, for the server neither: the response is
            to end.
        is_full: No descriptor is left, but those that the server needs.
        is_choice: It is so because the client asked in this way.
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


@dataclass(frozen=True, slots=True)
class Taken:
    """A connection that is now its owner's, who closes it.

    Attributes:
        fd: Its descriptor: non-blocking, not inherited by other programs.
        head: What must be sent first: the response's head, and the opening, framed.
        is_chunked: Whatever follows must be sent in chunks (RFC 9112 §7.1).
    """

    fd: int
    head: bytes
    is_chunked: bool


class Swap:
    """A connection that its server does not have: what it writes comes to us.

    Its methods belong to the request's thread or greenlet.

    Args:
        environ: The request's WSGI environ.
        server: The server that made it.

    Raises:
        Refused: The connection cannot leave, and nothing has changed.
    """

    def __init__(self, environ: Environ, server: Server) -> None:
        self._state = _CLOSED
        self._timer: Timer | None = None
        self._pid = os.getpid()
        self._runner = runner()
        self._environ = environ
        self._server = server
        self._written = bytearray()
        # For the watch's thread, held for moments: not what a greenlet waits for.
        self._lock = native(_thread, "allocate_lock")()
        try:
            clock = watch()
        except (OSError, RuntimeError) as error:  # no descriptor or thread is left
            raise Refused(f"it cannot be watched: {error}") from error
        with server.lock(environ):
            if server.is_closing(environ):
                raise Refused("the server is closing it", is_gone=True)
            self._socket = _checked(environ, server)
            if server.unsent(environ):
                raise Refused(
                    "the server has not sent the response before it yet",
                    is_choice=True,
                )
            server.leave_body(environ)
            try:
                self._swap(self._socket.fileno())
            except ValueError as error:  # the hard limit has been lowered since
                raise Refused(f"RLIMIT_NOFILE: {error}") from error
            except OSError as error:
                is_full = error.errno in (errno.EMFILE, errno.ENFILE)
                raise Refused(str(error.strerror), is_full=is_full) from error
        self._clock = clock
        # Not for as long as the clock has it: who drops a swap ends it.
        reference = weakref.ref(self)

        def look() -> float | None:
            swap = reference()
            return None if swap is None else swap._relieve()

        try:
            when = time.monotonic() + _LOOK_EVERY
            self._timer = clock.call_at(when, look)
        except BaseException:
            self.undo()
            raise

    def _swap(self, fd: int) -> None:
        connection = _duplicate(fd)
        try:
            # Native: gevent's would wait in the hub, and defers what it closes.
            theirs, ours = _socket.socketpair()
        except OSError as error:
            release(connection)
            if error.errno == errno.EMFILE:  # of the server's own, by the soft limit
                raise _none_left(
                    resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                ) from error
            raise
        except BaseException:
            release(connection)
            raise
        try:
            ours.setblocking(False)
            # A flag of the file, not of its number: it does not come along. A gevent
            # socket on a file that blocks stops the hub, any other fails on one that
            # does not.
            os.set_blocking(theirs.fileno(), os.get_blocking(fd))
            _forget_in_hub(fd)
            inode = _inode(theirs.fileno())  # before: nothing may fail from then on
            # Other programs would inherit the connection by default.
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
        """Make the connection ours, if the server has written what it should have.

        Args:
            opening: What the iterable has yielded in between.

        Returns:
            The connection, which now belongs to the caller; ``None`` if what the
            server wrote is not exactly a head and the opening, or if it has written
            nothing (a middleware asks for more before it passes that on). Call
            `undo` then.
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
        """Let the server be done with a connection, and its new owner begin."""
        # From here on the server reads an end: neither does it wait for another
        # request, nor for the client to close.
        with suppress(OSError):
            self._ours.shutdown(socket.SHUT_WR)
        # What it has read already it would answer, into the pair: pywsgi did.
        self._server.drop_read_ahead(self._environ)
        if type(self._socket) not in self._server.plain_sockets:
            _handed_over.add(self._socket)
        os.set_blocking(fd, False)

    def undo(self) -> None:
        """Put the connection back, and send what the server has written meanwhile.

        It waits, as the server's own send would, under gevent for the client alone;
        a client that does not take it in time is hung up. From any other thread or
        greenlet it does nothing: the server may be writing.
        """
        # A thread's ident: greenlet may have been imported since.
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
            is_whole = len(self._written) <= _MOST_WRITTEN
            if is_theirs and not (is_whole and _send(self._fd, self._written)):
                hang_up(self._fd)
        self._written.clear()
        self._forget_timer()

    def close(self) -> None:
        """End a swap, when the server is done with the response: undo, or let go.

        May be called more than once; from another thread or greenlet it lets go of
        what was taken, and leaves the rest to the request's own.
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
            self._drop_pair()

    def __del__(self) -> None:
        # Nobody has closed it, and who collects it may be any thread: it is too late
        # to put anything back.
        if self._state == _CLOSED or self._is_copy:
            return
        if self._state == _SWAPPED:
            hang_up(self._connection)
            self._drop_connection()
            # By a garbage collection, maybe in the midst of a log line.
            text = "a swap was dropped: its client is hung up"
            journal().later(log, logging.DEBUG, text)
        self._drop_pair()
        self._state = _CLOSED

    @property
    def _is_copy(self) -> bool:
        """This is a forked child, and the connection its parent's."""
        return self._pid != os.getpid()

    # Under the lock.

    def _fetch(self) -> None:
        """Read what the server has written so far."""
        while len(self._written) <= _MOST_WRITTEN:
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

    def _relieve(self) -> float | None:
        """Make room for a server that writes more than the pair takes (200 KB)."""
        with self._lock:
            if self._state != _SWAPPED:
                return None
            before = len(self._written)
            self._fetch()
            after = len(self._written)
            if after > _MOST_WRITTEN:
                with suppress(OSError):
                    self._ours.shutdown(socket.SHUT_RDWR)
                return None
        return time.monotonic() + (_LOOK_EVERY if before == after else _LOOK_AGAIN)

    def _is_in_place(self) -> bool:
        """Tell whether the server's number still stands for its end of the pair."""
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
        # Shut down, not closed alone: a forked child may hold it, too, and under
        # gevent the server would wait for a registration that is not there.
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
    """Return the server's socket, or say why its connection cannot leave."""
    if sys.platform == "win32":
        raise Refused("Windows does not let us")
    method = environ.get("REQUEST_METHOD")
    if method != "GET":
        # A POST may be meant, for fetch(); views that take any method, as Django's
        # do, take those by which nobody asks for a stream.
        is_choice = method not in ("HEAD", "POST")
        raise Refused(f"the method is {_told(method)}, not GET", is_choice=is_choice)
    protocol = environ.get("SERVER_PROTOCOL")
    # A client may say HTTP/1.9, which is answered as 1.1 (RFC 9110 §2.5).
    if not _HTTP_1.fullmatch(str(protocol)):
        raise Refused(f"the protocol is {_told(protocol)}, not HTTP/1")
    sock = server.socket(environ)
    if sock is None:
        raise Refused(f"{server.name} does not show its socket")
    if server.is_tls(environ):
        raise Refused("the server speaks TLS")
    reason = server.stays(environ)
    if reason is not None:
        raise Refused(reason)
    kind = type(sock)
    if kind not in server.plain_sockets:
        # By its exact type: gevent's SSLSocket is no ssl.SSLSocket, and of what is
        # unknown it is unknown what it keeps to itself.
        if kind not in _plain_sockets():
            raise Refused(f"the socket is a {kind.__module__}.{kind.__qualname__}")
        if sock in _handed_over:
            raise Refused("the connection was handed over before", is_gone=True)
    fd = sock.fileno()
    if is_hung_up(fd):
        raise Refused("the client has left", is_gone=True)
    _check_descriptor(fd)
    return sock


def _told(text: object) -> str:
    """Return what a client has said as it may stand in a log."""
    return ascii(str(text)[:20])[1:-1]


def _check_descriptor(fd: int) -> None:
    try:
        with borrowed(fd) as sock:
            kind, protocol, family = (
                sock.getsockopt(socket.SOL_SOCKET, option)
                for option in (socket.SO_TYPE, socket.SO_PROTOCOL, socket.SO_DOMAIN)
            )
    except OSError as error:
        raise Refused(f"not a socket: {error.strerror}") from error
    if kind != socket.SOCK_STREAM or protocol not in (0, socket.IPPROTO_TCP):
        raise Refused("the socket is not a stream")
    if family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
        raise Refused("the socket is neither TCP nor Unix")
    if family == socket.AF_UNIX:
        try:
            with borrowed(fd, socket.AF_UNIX) as sock:
                name = sock.getsockname()
        except OSError as error:
            reason = f"the client has left: {error.strerror}"
            raise Refused(reason, is_gone=True) from error
        if not name:  # nobody listens there: half of a pair
            raise Refused("the socket is one of a pair")


def _plain_sockets() -> tuple[type, ...]:
    """Return the types of sockets that keep nothing to themselves."""
    gevent = sys.modules.get("gevent._socket3")
    types: tuple[type, ...] = (socket.socket, native(socket, "socket"))
    return types if gevent is None else (*types, gevent.socket)


def _duplicate(fd: int) -> int:
    """Return another descriptor of a connection, out of the way of all others.

    Raises:
        OSError: There is none left, but for those that the server needs itself.
    """
    limit = descriptor_limit()
    lowest = min(LOWEST, limit // 4)
    with _limit.raised(limit):
        duplicate = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)
    try:
        hold(duplicate)
    except BaseException:
        release(duplicate)
        raise
    # The lowest that is free from there on: how many are left can be seen by it.
    if duplicate >= limit - min(_RESERVE, limit // 8):
        release(duplicate)
        raise _none_left(limit)
    return duplicate


def _none_left(limit: int) -> OSError:
    return OSError(errno.EMFILE, f"no descriptor is left of {limit}")


class _Limit:
    """RLIMIT_NOFILE, raised for the moments in which a connection is taken.

    It holds for new descriptors alone: those that are there stay, whatever it is. So
    programs that the application starts inherit the soft limit, mostly 1024, that is
    there for those which use select(2). (One that another thread starts in such a
    moment, some microseconds, inherits the raised one.)
    """

    def __init__(self) -> None:
        self._lock = native(_thread, "allocate_lock")()
        self._before: tuple[int, int] | None = None

    @contextmanager
    def raised(self, most: int) -> Iterator[None]:
        """Raise the soft limit for a block that neither waits nor forks."""
        with self._lock:
            soft, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft == resource.RLIM_INFINITY or soft >= most:
                yield
                return
            self._before = before
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
                self._before = None

    def forked(self) -> None:
        """Have a child's own, whichever moment of another thread's it was."""
        self._lock = native(_thread, "allocate_lock")()
        before, self._before = self._before, None
        if before is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


_limit = _Limit()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_limit.forked)


@functools.cache
def descriptor_limit() -> int:
    """Return how many descriptors this process may have, by its hard limit.

    A million at most; the soft limit where that cannot be raised.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    most = _MOST_DESCRIPTORS if hard == infinite else min(hard, _MOST_DESCRIPTORS)
    if soft == infinite or soft >= most:
        return _MOST_DESCRIPTORS if soft == infinite else soft
    try:
        with _limit.raised(most):
            return most
    except (OSError, ValueError) as error:
        report(log, logging.DEBUG, "RLIMIT_NOFILE stays at %d: %s", soft, error)
        return soft


def _forget_in_hub(fd: int) -> None:
    """Have gevent's loop forget what it has registered under a descriptor.

    libev finds a connection in its epoll for as long as that lives, though the number
    stands for another (measured: one such for each client whose request came in two
    pieces). And where a wait ends and the next one begins in the same turn of the
    loop, it does not look at its epoll at all, unless a new watcher begins.
    """
    loop = getattr(hub(), "loop", None)
    if loop is None or getattr(loop, "backend", None) != "epoll":
        return  # libuv registers anew for each wait
    forget(loop.fileno(), fd)
    watcher = loop.io(fd, 1)
    watcher.start(int)
    watcher.stop()
    watcher.close()


def _inode(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _send(fd: int, data: bytearray) -> bool:
    """Send to a server's client what it has missed; tell whether it took it."""
    deadline = time.monotonic() + _SEND_TIMEOUT
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
        except OSError as error:  # the server's next write will find that out
            report(
                log, logging.DEBUG, "a client left before it was put back: %s", error
            )
            return True
    return True


def _await_writable(fd: int, timeout: float) -> None:
    if hub() is not None:
        from gevent.socket import wait_write

        with suppress(TimeoutError):
            wait_write(fd, timeout)
        return
    poll = native(select, "poll")()
    poll.register(fd, select.POLLOUT)
    poll.poll(timeout * 1000)


_HEAD = re.compile(
    rb"HTTP/1\.[01] (?!204|205|304)[2-5][0-9][0-9](?: [^\r\n\0]*)?"
    rb"(?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*)*"
)
# With these the body is not what we know it to be, or ends elsewhere.
_FOREIGN = re.compile(
    rb"\r\n(?:content-length|content-encoding|upgrade|trailer):", re.IGNORECASE
)
_CODING = re.compile(rb"\r\ntransfer-encoding:([^\r\n]*)", re.IGNORECASE)
_HOP_BY_HOP = re.compile(
    rb"\r\n(?:connection|keep-alive|proxy-connection|transfer-encoding):[^\r\n]*",
    re.IGNORECASE,
)
_HTTP_1 = re.compile(r"HTTP/1\.[0-9]")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})\r\n")


def read_back(
    written: bytes, opening: bytes, *, is_http_1_0: bool
) -> tuple[bytes, bool] | None:
    """Tell what a server made of an opening, if it is what can be gone on with.

    Args:
        written: All that it wrote.
        opening: The bytes that it was given for the body, not empty.
        is_http_1_0: The client speaks HTTP/1.0, and does not know of chunks.

    Returns:
        The head, which now says that the connection closes (it does, and a proxy
        that took it for one of its pool would lose a request), and the opening, in
        the framing to go on with; and whether that is chunked. ``None`` unless what
        was written is exactly one HTTP/1 head and the opening, raw or as one chunk.
    """
    head, blank, body = written.partition(b"\r\n\r\n")
    if not blank or not opening:
        return None
    if not _HEAD.fullmatch(head) or _FOREIGN.search(head):
        return None
    codings = [value.strip(b" \t").lower() for value in _CODING.findall(head)]
    if codings not in ([], [b"chunked"]):
        return None
    if (_unchunked(body) if codings else body) != opening:
        return None
    # Werkzeug answers HTTP/1.0 in chunks, too (3.1).
    is_chunked = bool(codings) and not is_http_1_0
    ours = b"\r\nConnection: close\r\n\r\n"
    if is_chunked:
        ours = b"\r\nTransfer-Encoding: chunked" + ours
    framed = body if is_chunked else opening
    return _HOP_BY_HOP.sub(b"", head) + ours + framed, is_chunked


def _unchunked(body: bytes) -> bytes | None:
    """Return what is in a body of one chunk without extensions, and no more."""
    size = _CHUNK.match(body)
    if size is None:
        return None
    data = body[size.end() : -2]
    is_whole = body.endswith(b"\r\n") and len(data) == int(size[1], 16)
    return data if is_whole else None
