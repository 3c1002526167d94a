"""Questions to a socket, by its descriptor, without reading or writing.

By the descriptor, because the socket belongs to the server, and because what an
``ssl.SSLSocket`` or gevent's sockets do is not what is wanted here. Nothing blocks.
"""

from __future__ import annotations

import _socket
import ctypes
import errno
import functools
import os
import select
import socket
import struct
import sys
from contextlib import suppress
from typing import Any

if sys.platform != "win32":
    import fcntl

__all__ = [
    "GRACE",
    "POLLRDHUP",
    "acknowledged",
    "borrowed",
    "give_up_after",
    "hang_up",
    "has_timed_out",
    "hold",
    "is_hung_up",
    "is_socket",
    "is_unix",
    "is_writable",
    "native",
    "queued",
    "release",
    "reset",
]

GRACE = 1.5
"""Seconds that the kernel waits longer than we do, for a client that takes nothing."""

_SO_DOMAIN: int | None = getattr(socket, "SO_DOMAIN", None)
POLLRDHUP: int = getattr(select, "POLLRDHUP", 0)
"""The peer will write no more; 0 where poll cannot tell (macOS)."""
_POLLIN: int = getattr(select, "POLLIN", 1)  # Windows has no poll
_POLLOUT: int = getattr(select, "POLLOUT", 4)
_POLLERR: int = getattr(select, "POLLERR", 8)
# Without MSG_DONTWAIT (Windows) a peek waits, if others read what was there just now:
# a server does not while it serves a stream.
_PEEK: int = socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)

_TCP_USER_TIMEOUT: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)
# struct tcp_info of linux/tcp.h: 8 bytes, 24 u32, two u64, then this one.
_BYTES_ACKED = 120
# The probes of an idle connection: at the latest so many seconds after it was heard of,
# and after each other; and which part of the time-out that may be.
_PROBES = (("TCP_KEEPIDLE", 30, 2), ("TCP_KEEPINTVL", 10, 6))
_PROBE_COUNT = 3
_EPOLL_CTL_DEL = 2
# Non-blocking, as far as Python knows: with socket.setdefaulttimeout it would else make
# the descriptor so, of which its server learns nothing.
_STREAM: int = socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0)
_SIOCOUTQ = 0x5411  # linux/sockios.h
_SO_NWRITE = 0x1024  # macOS, sys/socket.h: the bytes that its send buffer holds


@functools.cache
def native(module: Any, name: str) -> Any:
    """Return a function as it was before gevent patched it.

    Always the same one, whether that has happened already or comes to happen.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None:
        return monkey.get_original(module.__name__, name)
    return getattr(module, name)


_held: set[int] = set()


def hold(fd: int) -> None:
    """Take note that a connection's descriptor is ours, and no server's.

    A child that is forked while it is closes its copy at once: it would keep the
    client from seeing the end.
    """
    _held.add(fd)


def release(fd: int) -> None:
    """Close a descriptor that was ours."""
    _held.discard(fd)  # first: in a child the number may be another's
    # gevent's close comes later, when the number may be another's, too.
    native(os, "close")(fd)


def _forked() -> None:
    held = tuple(_held)
    _held.clear()
    for fd in held:
        with suppress(OSError):
            native(os, "close")(fd)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def is_hung_up(fd: int) -> bool:
    """Tell at once whether the peer of a socket has closed or reset it.

    Nothing is read: bytes that wait there do not matter, nor does TLS. (Measured:
    gevent's patched poll never reports POLLRDHUP, the original does.) Without
    POLLRDHUP an end is seen only when no bytes wait before it.
    """
    if fd < 0:
        return True
    events = _poll(fd, POLLRDHUP or _POLLIN)
    if events != _POLLIN:
        return bool(events)
    try:
        with borrowed(fd) as sock:
            return not sock.recv(1, _PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _poll(fd: int, events: int) -> int:
    """Return which of these events, or of errors, a socket has now; 0 for none."""
    if hasattr(select, "poll"):
        poll = native(select, "poll")()
        poll.register(fd, events)
        return sum(found for _, found in poll.poll(0))
    # Windows: its select(2) takes any number, elsewhere those below 1024.
    is_out = events == _POLLOUT
    try:
        in_, out, _ = native(select, "select")(
            () if is_out else (fd,), (fd,) if is_out else (), (), 0
        )
    except OSError:  # closed
        return _POLLERR
    return events if in_ or out else 0


def is_writable(fd: int) -> bool:
    """Tell at once whether the kernel takes a few bytes more.

    ``True`` for a socket in error: who writes to it learns that.
    """
    if fd < 0:
        return True
    return bool(_poll(fd, _POLLOUT))


def hang_up(fd: int) -> None:
    """Shut a socket down: what was sent still arrives, and nothing more is.

    By its descriptor, because ``SSLSocket.shutdown`` would forget the encryption.
    Writes then fail as if the peer had gone, reads show an end.
    """
    # Closed already, or reset; ValueError: its number is -1.
    with suppress(OSError, ValueError), borrowed(fd) as sock:
        sock.shutdown(socket.SHUT_RDWR)


def reset(fd: int) -> bool:
    """Reset a TCP connection at once, and tell whether that could be done.

    connect(2) to AF_UNSPEC does it, on Linux, without a descriptor of its own. (The
    portable way, to close with SO_LINGER 0, is the server's to go, and servers shut
    down before they close: that is an end in good order.)
    """
    if not sys.platform.startswith("linux"):
        return False
    address = struct.pack("H14x", socket.AF_UNSPEC)
    done: int = _libc().connect(fd, address, len(address))
    return done == 0


def give_up_after(fd: int, seconds: float | None) -> float | None:
    """Let the kernel give a TCP connection up whose peer acknowledges nothing.

    TCP_USER_TIMEOUT counts from the first byte that waits, a peer that is gone
    without a word and one that does not read alike. An idle connection is probed
    from now on (SO_KEEPALIVE), so that a peer that is gone is missed there too.

    Args:
        seconds: How long; ``None`` leaves it to the system (15 minutes and more).

    Returns:
        What held before, to be restored; ``None`` also where this cannot be set.
    """
    if _TCP_USER_TIMEOUT is None:
        return None
    with suppress(OSError), borrowed(fd) as sock:  # no TCP, or closed already
        before = sock.getsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT)
        timeout = _milliseconds(seconds) if seconds is not None else 0
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, timeout)
        if seconds is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            # Past the time-out one unanswered probe ends the connection, whatever
            # TCP_KEEPCNT says (tcp_keepalive_timer of Linux; measured): one packet
            # lost. So let some go unanswered before.
            for name, most, part in _PROBES:
                value = min(most, max(1, int(seconds / part)))
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBE_COUNT)
        return before / 1000 or None
    return None


def _milliseconds(seconds: float) -> int:
    return round(min(seconds * 1000, 0x7FFFFFFF))  # what a C int takes: 24 days


def has_timed_out(fd: int) -> bool:
    """Tell whether the kernel has given a connection up; this clears its error.

    Uncleared, the server's next write would fail with ETIMEDOUT, which gunicorn
    logs with a traceback; cleared, it fails with EPIPE.
    """
    with suppress(OSError), borrowed(fd) as sock:
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return error in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
    return False


def acknowledged(fd: int) -> int | None:
    """Return how many bytes the peer has taken so far, ``None`` if it is not told."""
    if not sys.platform.startswith("linux"):
        return None
    with suppress(OSError), borrowed(fd) as sock:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        if len(info) >= _BYTES_ACKED + 8:
            return int.from_bytes(info[_BYTES_ACKED : _BYTES_ACKED + 8], sys.byteorder)
    return None


def queued(fd: int) -> int | None:
    """Return how much the kernel still holds for the peer, ``None`` if it is not told.

    Only whether it changes says something: for a Unix socket it is memory, given back
    in pieces of up to 37 KB as the peer reads (measured, Linux 6.18).
    """
    system: str = sys.platform
    with suppress(OSError, ValueError):  # ValueError: closed, -1
        if system == "linux":
            answer = fcntl.ioctl(fd, _SIOCOUTQ, bytes(4))
            return int.from_bytes(answer, sys.byteorder)
        if system == "darwin":
            with borrowed(fd) as sock:
                size: int = sock.getsockopt(socket.SOL_SOCKET, _SO_NWRITE)
            return size
    return None


def is_socket(fd: int) -> bool:
    """Tell a connected socket's descriptor from a file's or a listener's."""
    try:
        with borrowed(fd) as sock:
            sock.getpeername()
    except OSError:
        return False
    return True


def is_unix(fd: int) -> bool:
    """Tell a Unix socket, which cannot be reset; ``False`` where nothing tells it."""
    if _SO_DOMAIN is None:
        return False
    with suppress(OSError), borrowed(fd) as sock:
        family: int = sock.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN)
        return family == socket.AF_UNIX
    return False


def forget(epoll: int, fd: int) -> None:
    """Take a descriptor out of somebody's epoll; it need not be in there.

    `select.epoll` would close an epoll that it is lent.
    """
    _libc().epoll_ctl(epoll, _EPOLL_CTL_DEL, fd, None)


class borrowed:
    """Lends a native socket object for a descriptor that stays its owner's."""

    __slots__ = ("_socket",)

    def __init__(self, fd: int, family: int = socket.AF_INET) -> None:
        # Below gevent's and Python's own classes. The family matters to names alone.
        self._socket: Any = _socket.socket(family, _STREAM, 0, fileno=fd)

    def __enter__(self) -> Any:
        return self._socket

    def __exit__(self, *_: object) -> None:
        self._socket.detach()


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None)
