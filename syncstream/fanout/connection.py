"""The first and the last bytes of a connection that the loop has."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from ..runtime.sockets import borrowed, release, reset
from ..streams.ends import come_back

if TYPE_CHECKING:
    from .client import Client

__all__ = ["chunked", "close", "say_goodbye", "send_head"]

SEND_BUFFER = 128 * 1024  # bytes; the kernel's own grows to megabytes, and hides a lag
_DRAINED = 16 * 65536  # bytes of a client that nobody reads are dropped at its end
_END = b"0\r\n\r\n"
# EPIPE is told, whatever the application has made of SIGPIPE. (Windows has neither
# flag, nor the loop.)
_SENT: int = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)

_WHOLE = frozenset(("closed", "finished"))
"""Ends that the application has asked for, and says are none of a failure's."""


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def send_head(fd: int, head: bytes) -> bytes:
    """Prepare a connection, and send what comes first; return what it did not take."""
    with suppress(OSError), borrowed(fd) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        with suppress(OSError):  # Unix has no TCP_NODELAY
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return head[sock.send(head, _SENT) :] if head else b""
    return head  # the loop finds out why


def say_goodbye(client: Client) -> None:
    """Write the last words, as far as the kernel takes them at once."""
    reason, terms = client.reason, client.terms
    if reason in ("disconnected", "send_timeout"):
        if reason == "send_timeout" and not client.is_chunked:
            reset(client.fd)  # or it reads on one day, and finds an end
        return
    # A subscription is never done: others would take it for a whole answer.
    is_partial = reason not in _WHOLE
    is_cut = reason == "error" or (is_partial and not terms.comes_back)
    is_whole = client.rest is None  # not in the middle of a chunk
    if is_whole:
        words = come_back(str(reason), terms.retry) if terms.comes_back else b""
        if client.is_chunked and words:
            words = chunked(words)
        if client.is_chunked and not is_cut:
            words += _END
        with suppress(OSError):
            is_whole = os.write(client.fd, words) == len(words)
    if (not is_whole or is_cut) and not client.is_chunked:
        reset(client.fd)  # only that tells it that something is missing


def close(fd: int) -> None:
    """Close a connection so that what was sent arrives.

    Shut down first: a forked child may have it, too. And read: what the client has
    sent, and nobody has read, makes the kernel reset the connection at its close.
    """
    try:
        with suppress(OSError), borrowed(fd) as sock:
            sock.shutdown(socket.SHUT_WR)
            for _ in range(_DRAINED // 65536):
                if len(sock.recv(65536, socket.MSG_DONTWAIT)) < 65536:
                    break
    finally:
        release(fd)
