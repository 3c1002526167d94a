"""gevent.pywsgi, also as gunicorn's gevent_pywsgi worker."""

from __future__ import annotations

from typing import Any

from ..runtime.process import Stopping
from . import gunicorn
from .contract import (
    Environ,
    Headers,
    Server,
    SocketLike,
    Write,
    at_once,
    body_length,
    decoded,
    drop_buffered,
    has_cipher,
    running,
    unpatched,
)

__all__ = ["SERVER"]


def _reader(environ: Environ) -> Any:
    # An application may have replaced ``wsgi.input``.
    reader = getattr(environ.get("wsgi.input"), "rfile", None)
    if not hasattr(getattr(reader, "raw", None), "_sock"):
        reader = getattr(running("gevent.pywsgi", "rfile"), "rfile", None)
    return reader


def _socket(environ: Environ) -> SocketLike | None:
    raw = getattr(_reader(environ), "raw", None)
    socket: SocketLike | None = getattr(raw, "_sock", None)
    return socket


def _headers(write: Write) -> Headers | None:
    handler = getattr(write, "__self__", None)
    headers = getattr(handler, "response_headers", None)
    return None if headers is None else decoded(headers)


def _start_response(environ: Environ) -> Any:
    handler = running("gevent.pywsgi", "response_headers")
    return getattr(handler, "start_response", None)


def _own_write(environ: Environ) -> Write | None:
    handler = running("gevent.pywsgi", "response_headers")
    write: Write | None = getattr(handler, "write", None)
    return write


def _server() -> Any:
    return getattr(running("gevent.pywsgi", "server"), "server", None)


def _stopping(environ: Environ) -> Stopping | None:
    if "gunicorn.sock" in environ:  # the worker closes the server up to 1 s later
        return gunicorn.stopping(gunicorn.worker())
    server = _server()
    # stop() begins with close(), which clears ``started`` (26.9).
    return None if server is None else at_once(lambda: not server.started)


def _threads(environ: Environ) -> int | None:
    pool = getattr(_server(), "pool", None)
    size: int | None = getattr(pool, "size", None)
    return size


def _unread(environ: Environ) -> int | None:
    body: Any = environ.get("wsgi.input")
    if getattr(body, "chunked_input", False):
        return 0 if body.chunk_length == 0 else None
    if not hasattr(body, "position"):  # an application has replaced it
        return body_length(environ)
    return int(body.content_length or 0) - int(body.position)


SERVER = Server(
    "pywsgi",
    runs=lambda environ: environ.get("SERVER_SOFTWARE", "").startswith("gevent/"),
    socket=_socket,
    is_tls=lambda environ: has_cipher(_socket(environ)),
    write_module="gevent.pywsgi",
    headers=_headers,
    own_write=_own_write,
    start_response=_start_response,
    stopping=_stopping,
    threads=_threads,
    key=lambda environ: _server(),
    warnings=lambda environ: unpatched(),
    unread=_unread,
    drop_read_ahead=lambda environ: drop_buffered(_reader(environ)),
)
