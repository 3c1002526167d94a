"""Werkzeug's development server, ``flask run``."""

from __future__ import annotations

from typing import Any

from ..runtime.process import Stopping
from .contract import (
    Environ,
    Headers,
    Server,
    Write,
    at_once,
    has_cipher,
    running,
    speaks_http_1_1,
)

__all__ = ["SERVER"]


def _marks_end(environ: Environ) -> bool:
    # Werkzeug speaks HTTP/1.1, with chunks, only with threads or processes.
    many: bool = environ["wsgi.multithread"] or environ["wsgi.multiprocess"]
    return many and speaks_http_1_1(environ)


def _headers(write: Write) -> Headers | None:
    # The headers are a variable of run_wsgi, which its write() closes over.
    names: tuple[str, ...] = getattr(
        getattr(write, "__code__", None), "co_freevars", ()
    )
    if "headers_set" not in names:
        return None
    cells: Any = getattr(write, "__closure__", None)
    headers: Headers = cells[names.index("headers_set")].cell_contents
    return headers


def _start_response(environ: Environ) -> Any:
    return running("werkzeug.serving", "__closure__", name="start_response")


def _own_write(environ: Environ) -> Write | None:
    write: Write | None = running("werkzeug.serving", "__closure__", name="write")
    return write


def _server() -> Any:
    return getattr(running("werkzeug.serving", "server"), "server", None)


def _stopping(environ: Environ) -> Stopping | None:
    server = _server()
    # serve_forever() ends with server_close(), for Ctrl-C and shutdown() (3.1).
    return None if server is None else at_once(lambda: server.socket.fileno() < 0)


def _threads(environ: Environ) -> int | None:
    # A thread for each request, or a process for each: no limit for this process.
    many = environ["wsgi.multithread"] or environ["wsgi.multiprocess"]
    return None if many else 1


def _stays(environ: Environ) -> str | None:
    if environ["wsgi.multiprocess"]:
        return "each request has a process of its own"
    return None


SERVER = Server(
    "werkzeug",
    runs=lambda environ: "werkzeug.socket" in environ,
    socket=lambda environ: environ["werkzeug.socket"],
    marks_end=_marks_end,
    is_tls=lambda environ: has_cipher(environ["werkzeug.socket"]),
    write_module="werkzeug.serving",
    headers=_headers,
    own_write=_own_write,
    start_response=_start_response,
    stopping=_stopping,
    threads=_threads,
    key=lambda environ: _server(),
    stays=_stays,
    lets_exits_through=True,  # with neither threads nor processes
)
