"""The standard library's server, and Django's ``runserver``, which is built on it.

Neither shows its socket. It is found through the reader of the request's body,
``rfile``, which Django wraps in a ``LimitedStream`` (4.2 to 6.1).
"""

from __future__ import annotations

import socketserver
from collections.abc import Iterator
from typing import Any

from ..runtime.process import Stopping
from .contract import (
    Environ,
    Headers,
    Server,
    SocketLike,
    Write,
    at_once,
    body_length,
    drop_buffered,
    has_cipher,
    running,
)

__all__ = ["SERVER"]


def _handler() -> Any:
    """Return the `http.server` handler of the running request."""
    return running("django.core.servers", "rfile") or running(
        "wsgiref.simple_server", "rfile"
    )


def _reader(environ: Environ) -> Any:
    given = environ.get("wsgi.input")
    read = getattr(given, "_read", None)  # Django's: of the limited stream
    for reader in (given, getattr(read, "__self__", None), _stream(given)):
        if hasattr(getattr(reader, "raw", None), "_sock"):
            return reader
    return getattr(_handler(), "rfile", None)


def _stream(given: Any) -> Any:
    return getattr(given, "stream", None)  # Django's, up to 4.2


def _socket(environ: Environ) -> SocketLike | None:
    raw = getattr(_reader(environ), "raw", None)
    socket: SocketLike | None = getattr(raw, "_sock", None)
    return socket


def _headers(write: Write) -> Headers | None:
    headers = getattr(getattr(write, "__self__", None), "headers", None)
    return None if headers is None else headers.items()


def _response() -> Any:
    """Return the `wsgiref.handlers` handler of the running request."""
    return running("django.core.servers", "bytes_sent") or running(
        "wsgiref.handlers", "bytes_sent"
    )


def _own_write(environ: Environ) -> Write | None:
    write: Write | None = getattr(_response(), "write", None)
    return write


def _sent(write: Write) -> int | None:
    sent: int | None = getattr(getattr(write, "__self__", None), "bytes_sent", None)
    return sent


def _server() -> Any:
    return getattr(_handler(), "server", None)


def _stopping(environ: Environ) -> Stopping | None:
    server = _server()
    # After serve_forever() its creator closes it; ``runserver`` just exits.
    return None if server is None else at_once(lambda: server.socket.fileno() < 0)


def _threads(environ: Environ) -> int | None:
    server = _server()
    if server is None or isinstance(server, socketserver.ThreadingMixIn):
        return None
    return 1


def _warnings(environ: Environ) -> Iterator[str]:
    if _threads(environ) is not None:
        yield (
            "this wsgiref server has one thread and serves nothing else while a stream "
            "is open: run Django's runserver without --nothreading, or use a server "
            "class with socketserver.ThreadingMixIn"
        )


def _unread(environ: Environ) -> int | None:
    given = environ.get("wsgi.input")  # Django's limited stream knows
    limit, position = (getattr(given, name, None) for name in ("limit", "_pos"))
    if isinstance(limit, int) and isinstance(position, int):
        return limit - position
    return body_length(environ)


SERVER = Server(
    "wsgiref",
    runs=lambda environ: environ.get("SERVER_SOFTWARE", "").startswith("WSGIServer/"),
    socket=_socket,
    # wsgiref never sends chunks: the connection's end is the body's.
    marks_end=lambda environ: False,
    is_tls=lambda environ: has_cipher(_socket(environ)),
    write_module="wsgiref.handlers",
    headers=_headers,
    own_write=_own_write,
    start_response=lambda environ: getattr(_response(), "start_response", None),
    sent=_sent,
    stopping=_stopping,
    threads=_threads,
    warnings=_warnings,
    key=lambda environ: _server(),
    unread=_unread,
    drop_read_ahead=lambda environ: drop_buffered(_reader(environ)),
    lets_exits_through=True,  # without threads
)
