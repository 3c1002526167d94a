"""cheroot, CherryPy's server."""

from __future__ import annotations

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
    connection_reset,
    decoded,
    drop_buffered,
    has_cipher,
    running,
)

__all__ = ["SERVER"]


def _reader(environ: Environ) -> Any:
    # KnownLengthRFile -> StreamReader; or the connection's reader, if the application
    # has replaced ``wsgi.input``.
    reader = getattr(environ.get("wsgi.input"), "rfile", None)
    if not hasattr(_raw(reader), "_sock"):
        gateway = running("cheroot.wsgi", "req")
        connection = getattr(getattr(gateway, "req", None), "conn", None)
        reader = getattr(connection, "rfile", None)
    return reader


def _raw(reader: Any) -> Any:
    return getattr(reader, "_raw", None) or getattr(reader, "raw", None)


def _socket(environ: Environ) -> SocketLike | None:
    # StreamReader -> SocketIO -> socket
    socket: SocketLike | None = getattr(_raw(_reader(environ)), "_sock", None)
    return socket


def _headers(write: Write) -> Headers | None:
    request = getattr(getattr(write, "__self__", None), "req", None)
    headers = getattr(request, "outheaders", None)
    return None if headers is None else decoded(headers)


def _start_response(environ: Environ) -> Any:
    gateway = running("cheroot.wsgi", "started_response")
    # ``started_response`` is false while a framework takes the first item before it
    # calls start_response; such a framework answers errors itself.
    return gateway.start_response if getattr(gateway, "started_response", 0) else None


def _forget_head(environ: Environ, write: Write | None) -> bool:
    gateway: Any = getattr(_start_response(environ), "__self__", None)
    request = getattr(gateway, "req", None)
    if request is None or request.sent_headers:
        return False
    request.outheaders.clear()
    gateway.remaining_bytes_out = None
    return True


def _own_write(environ: Environ) -> Write | None:
    gateway = running("cheroot.wsgi", "started_response")
    write: Write | None = getattr(gateway, "write", None)
    return write


def _server() -> Any:
    return getattr(running("cheroot.server", "server"), "server", None)


def _stopping(environ: Environ) -> Stopping | None:
    server = _server()
    if server is None:
        return None
    # stop() begins with ``ready``; a thread's SystemExit with ``interrupt`` (11.1).
    return at_once(lambda: not (server.ready and server.interrupt is None))


def _threads(environ: Environ) -> int | None:
    # The pool never grows beyond ``min``, whatever ``max`` is (11.1).
    threads: int | None = getattr(_server(), "numthreads", None)
    return threads


def _leave_body(environ: Environ) -> None:
    # send_headers() would try for 10 s to read the rest of the body, although the
    # client's connection has been taken away (11.1).
    request: Any = getattr(running("cheroot.wsgi", "req"), "req", None)
    if getattr(getattr(request, "rfile", None), "remaining", 0) > 0:
        request.close_connection = True


def _unread(environ: Environ) -> int | None:
    request: Any = getattr(running("cheroot.wsgi", "req"), "req", None)
    body: Any = getattr(request, "rfile", None)
    if hasattr(body, "remaining"):
        return int(body.remaining)
    return 0 if getattr(body, "closed", False) else body_length(environ)


SERVER = Server(
    "cheroot",
    runs=lambda environ: "Cheroot" in environ.get("SERVER_SOFTWARE", ""),
    socket=_socket,
    # cheroot keeps bytes that it cannot write; Python 3.13 warns about them later.
    raises=connection_reset,
    is_tls=lambda environ: has_cipher(_socket(environ)),
    write_module="cheroot.wsgi",
    headers=_headers,
    own_write=_own_write,
    start_response=_start_response,
    forget_head=_forget_head,
    answers_errors=False,  # it sends the head from start_response, 200 (11.1)
    stopping=_stopping,
    threads=_threads,
    key=lambda environ: _server(),
    drop_read_ahead=lambda environ: drop_buffered(_reader(environ)),
    unread=_unread,
    leave_body=_leave_body,
    closes_first=True,  # and Python 3.13 warns about bytes that cannot be written then
)
