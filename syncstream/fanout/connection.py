"""The first and the last bytes of a connection that the loop has."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from ..runtime.sockets import borrowed, release, reset
from ..streams.async_feed import AsyncFeed
from ..streams.ends import GONE, WHOLE, come_back

if TYPE_CHECKING:
    from .client import Client

__all__ = ["chunked", "close", "say_goodbye", "send_head"]

SEND_BUFFER = 128 * 1024  # bytes; the kernel's default grows to megabytes, hiding a lag
_DRAINED = 16 * 65536  # the maximum of unread bytes that are dropped at a client's end
_END = b"0\r\n\r\n"
# Report EPIPE, whatever the application does with SIGPIPE. (Windows has neither flag,
# nor the loop.)
_SENT: int = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def send_head(fd: int, head: bytes) -> bytes:
    """Prepare a connection, and send the head; return the bytes not accepted yet."""
    with suppress(OSError), borrowed(fd) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        with suppress(OSError):  # Unix has no TCP_NODELAY
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return head[sock.send(head, _SENT) :] if head else b""
    return head  # the loop will notice the error


def say_goodbye(client: Client) -> None:
    """Write the last bytes, as far as the kernel accepts them at once."""
    reason, terms = client.reason, client.terms
    if reason in GONE:
        if reason == "send_timeout" and not client.is_chunked:
            reset(client.fd)  # otherwise it may read on later, and find a normal end
        return
    # To clients that do not come back, an orderly end would look complete.
    is_partial = reason not in WHOLE and not terms.comes_back
    is_cut = is_partial or reason == "error"
    if client.last is not None and client.last[1]:
        is_cut = False
    is_whole = client.rest is None  # not in the middle of a chunk
    if is_whole:
        words = _last_words(client)
        if client.is_chunked and words:
            words = chunked(words)
        if client.is_chunked and not is_cut:
            words += _END
        is_whole = False
        with suppress(OSError):
            is_whole = os.write(client.fd, words) == len(words)
    if (not is_whole or is_cut) and not client.is_chunked:
        reset(client.fd)  # without chunks, only a reset shows the truncation


def _last_words(client: Client) -> bytes:
    feed, missing = client.feed, b""
    if isinstance(feed, AsyncFeed) and not feed.is_whole:
        missing = feed.missing
        if not missing:
            return b""  # in the middle of an event
    if client.last is not None:
        return client.last[0]
    reason, terms = client.reason, client.terms
    if reason == "finished":
        return missing + terms.finish
    return missing + (come_back(str(reason), terms.retry) if terms.comes_back else b"")


def close(fd: int) -> None:
    """Close a connection so that the bytes sent before arrive.

    It is shut down first, because a forked child may have a copy. Then unread bytes
    from the client are read: they would make the kernel reset the connection.
    """
    try:
        with suppress(OSError), borrowed(fd) as sock:
            sock.shutdown(socket.SHUT_WR)
            for _ in range(_DRAINED // 65536):
                if len(sock.recv(65536, socket.MSG_DONTWAIT)) < 65536:
                    break
    finally:
        release(fd)
