"""Questions to a socket, by its descriptor, without reading or writing.

The descriptor is used because the socket object belongs to the server, and because the
methods of ``ssl.SSLSocket`` and of gevent's sockets do more than the system call.
Nothing blocks.
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
"""Seconds that the kernel waits longer than we do for a client that reads nothing."""

SO_DOMAIN: int | None = getattr(socket, "SO_DOMAIN", None)
POLLRDHUP: int = getattr(select, "POLLRDHUP", 0)
"""The peer has stopped writing; 0 if poll cannot report that (macOS)."""
_POLLIN: int = getattr(select, "POLLIN", 1)  # Windows has no poll
_POLLOUT: int = getattr(select, "POLLOUT", 4)
_POLLERR: int = getattr(select, "POLLERR", 8)
# Without MSG_DONTWAIT (Windows) a peek blocks if another thread has just read the
# bytes; a server does not read while it serves a stream.
_PEEK: int = socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)

_TCP_USER_TIMEOUT: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)
# struct tcp_info of linux/tcp.h: 8 bytes, 24 u32, two u64, then this one.
_BYTES_ACKED = 120
# The probes of an idle connection: the maximum of seconds until the first and between
# two of them, and the divisor of the timeout that gives a shorter time.
_PROBES = (("TCP_KEEPIDLE", 30, 2), ("TCP_KEEPINTVL", 10, 6))
_PROBE_COUNT = 3
_EPOLL_CTL_DEL = 2
# Python takes the socket for non-blocking already. Otherwise, under
# socket.setdefaulttimeout, it would make the server's descriptor non-blocking.
_STREAM: int = socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0)
_SIOCOUTQ = 0x5411  # linux/sockios.h
_SO_NWRITE = 0x1024  # macOS, sys/socket.h: the bytes that its send buffer holds


@functools.cache
def native(module: Any, name: str) -> Any:
    """Return a function as it was before gevent patched it.

    The result is the same before and after the patching.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None:
        return monkey.get_original(module.__name__, name)
    return getattr(module, name)


_held: set[int] = set()


def hold(fd: int) -> None:
    """Remember that a connection's descriptor is ours and not the server's.

    A child that is forked meanwhile closes its copy at once. Otherwise the client would
    not see the end of the connection.
    """
    _held.add(fd)


def release(fd: int) -> None:
    """Close a descriptor that was ours (see `hold`)."""
    _held.discard(fd)  # first: a child forked after the close would close another's
    # gevent's close is delayed, until the number may be reused, too.
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
    """Return at once whether the peer of a socket has closed or reset it.

    Nothing is read: neither unread bytes nor TLS matter. (Measured: gevent's patched
    poll never reports POLLRDHUP, the original does.) Without POLLRDHUP an end is
    noticed only if no unread bytes precede it.
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
    """Return those of these events, and the errors, that a socket has now, else 0."""
    if hasattr(select, "poll"):
        poll = native(select, "poll")()
        poll.register(fd, events)
        return sum(found for _, found in poll.poll(0))
    # On Windows select(2) accepts any number, elsewhere only those below 1024.
    is_out = events == _POLLOUT
    try:
        in_, out, _ = native(select, "select")(
            () if is_out else (fd,), (fd,) if is_out else (), (), 0
        )
    except OSError:  # closed
        return _POLLERR
    return events if in_ or out else 0


def is_writable(fd: int) -> bool:
    """Return at once whether the kernel would accept a few more bytes.

    ``True`` for a socket with an error: the next write reports it.
    """
    if fd < 0:
        return True
    return bool(_poll(fd, _POLLOUT))


def hang_up(fd: int) -> None:
    """Shut a socket down: bytes sent before still arrive, later writes fail.

    The descriptor is used because ``SSLSocket.shutdown`` would drop the encryption.
    Writes then fail as if the peer had left; reads return an end of file.
    """
    # Already closed or reset; ValueError: the number is -1.
    with suppress(OSError, ValueError), borrowed(fd) as sock:
        sock.shutdown(socket.SHUT_RDWR)


def reset(fd: int) -> bool:
    """Reset a TCP connection at once; return whether that was possible.

    On Linux, connect(2) to AF_UNSPEC resets it and keeps the descriptor open. (The
    portable way, closing with SO_LINGER 0, is only open to the server, and servers shut
    down before they close, which is an orderly end.)
    """
    if not sys.platform.startswith("linux"):
        return False
    address = struct.pack("H14x", socket.AF_UNSPEC)
    done: int = _libc().connect(fd, address, len(address))
    return done == 0


def give_up_after(fd: int, seconds: float | None) -> float | None:
    """Make the kernel drop a TCP connection whose peer acknowledges nothing.

    TCP_USER_TIMEOUT counts from the first unacknowledged byte, for peers that vanished
    as for peers that do not read. Idle connections are probed from now on
    (SO_KEEPALIVE), so that a vanished peer is noticed there, too.

    Args:
        seconds: How long; ``None`` leaves it to the system (15 minutes and more).

    Returns:
        What held before, to be restored; ``None`` also where this cannot be set.
    """
    if _TCP_USER_TIMEOUT is None:
        return None
    with suppress(OSError), borrowed(fd) as sock:  # not TCP, or already closed
        before = sock.getsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT)
        timeout = _milliseconds(seconds) if seconds is not None else 0
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, timeout)
        if seconds is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            # After the timeout a single unanswered probe ends the connection, whatever
            # TCP_KEEPCNT is (tcp_keepalive_timer of Linux; measured): one lost packet
            # would be enough. So send several probes before the timeout.
            for name, most, part in _PROBES:
                value = min(most, max(1, int(seconds / part)))
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBE_COUNT)
        return before / 1000 or None
    return None


def _milliseconds(seconds: float) -> int:
    return round(min(seconds * 1000, 0x7FFFFFFF))  # the maximum of a C int: 24 days


def has_timed_out(fd: int) -> bool:
    """Return whether the kernel has dropped a connection, and clear its error.

    With the error, the server's next write would fail with ETIMEDOUT, which gunicorn
    logs with a traceback; without it, the write fails with EPIPE.
    """
    with suppress(OSError), borrowed(fd) as sock:
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return error in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
    return False


def acknowledged(fd: int) -> int | None:
    """Return the number of bytes acknowledged by the peer, ``None`` if unknown."""
    if not sys.platform.startswith("linux"):
        return None
    with suppress(OSError), borrowed(fd) as sock:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        if len(info) >= _BYTES_ACKED + 8:
            return int.from_bytes(info[_BYTES_ACKED : _BYTES_ACKED + 8], sys.byteorder)
    return None


def queued(fd: int) -> int | None:
    """Return the size of the kernel's send queue, ``None`` if it is unknown.

    Only changes are meaningful: for a Unix socket the size is one of memory, released
    in pieces of up to 37 KB as the peer reads (measured, Linux 6.18).
    """
    system: str = sys.platform
    with suppress(OSError, ValueError):  # ValueError: closed, so -1
        if system == "linux":
            answer = fcntl.ioctl(fd, _SIOCOUTQ, bytes(4))
            return int.from_bytes(answer, sys.byteorder)
        if system == "darwin":
            with borrowed(fd) as sock:
                size: int = sock.getsockopt(socket.SOL_SOCKET, _SO_NWRITE)
            return size
    return None


def is_socket(fd: int) -> bool:
    """Return whether a descriptor is a connected socket, not a file or listener."""
    try:
        with borrowed(fd) as sock:
            sock.getpeername()
    except OSError:
        return False
    return True


def is_unix(fd: int) -> bool:
    """Return whether it is a Unix socket, which has no reset; ``False`` if unknown."""
    if SO_DOMAIN is None:
        return False
    with suppress(OSError), borrowed(fd) as sock:
        family: int = sock.getsockopt(socket.SOL_SOCKET, SO_DOMAIN)
        return family == socket.AF_UNIX
    return False


def forget(epoll: int, fd: int) -> None:
    """Remove a descriptor, if present, from an epoll that is not ours.

    `select.epoll` objects would close the epoll.
    """
    _libc().epoll_ctl(epoll, _EPOLL_CTL_DEL, fd, None)


class borrowed:
    """Lends a native socket object for a descriptor without closing it afterwards.

    Args:
        fd: The descriptor.
        family: It matters only for names; -1 asks the kernel.
        protocol: -1 asks the kernel.
    """

    __slots__ = ("_socket",)

    def __init__(
        self, fd: int, family: int = socket.AF_INET, protocol: int = 0
    ) -> None:
        # Without gevent's and Python's subclasses.
        self._socket: Any = _socket.socket(family, _STREAM, protocol, fileno=fd)

    def __enter__(self) -> Any:
        return self._socket

    def __exit__(self, *_: object) -> None:
        self._socket.detach()


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None)
