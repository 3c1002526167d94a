"""What the package needs to know of a WSGI server: the contract of this folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Environ", "Server", "SocketLike", "connection_reset", "speaks_http_1_1"]

Environ = dict[str, Any]


class SocketLike(Protocol):
    """A socket, or as much of one as a server shows."""

    def fileno(self) -> int:
        """Return the descriptor, -1 once it is closed."""


def connection_reset() -> BaseException:
    """Return the exception that most servers take quietly for a client's leaving.

    With its errno: without it gunicorn and pywsgi log a traceback.
    """
    return ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


def speaks_http_1_1(environ: Environ) -> bool:
    """Tell whether a server that chunks for HTTP/1.1 clients chunks for this one."""
    return environ.get("SERVER_PROTOCOL") not in ("HTTP/1.0", "HTTP/0.9", None)


@dataclass(frozen=True, slots=True)
class Server:
    """One WSGI server, as seen from an application.

    Attributes:
        name: For the log and the tests.
        runs: Tells from an environ whether this server made it.
        socket: The client's socket, ``None`` where it cannot be had.
        raises: What a cut raises from ``next()``, after the socket has been shut
            down. ``None``, the rule: the iteration just ends, and what the server
            still writes fails as if the client had gone. Nothing can swallow or
            log that on its way, as Werkzeug's debugger does with exceptions.
        marks_end: Tells whether the server marks the end of a response without
            Content-Length (chunked), so that a missing mark shows a truncation.
        is_tls: Tells whether the server itself speaks TLS to the client.
        write_module: Where the ``write`` that its start_response returns comes
            from; middlewares hand out others, which do not write at once.
    """

    name: str
    runs: Callable[[Environ], bool]
    socket: Callable[[Environ], SocketLike | None] = lambda environ: None
    raises: Callable[[], BaseException | None] = lambda: None
    marks_end: Callable[[Environ], bool] = speaks_http_1_1
    is_tls: Callable[[Environ], bool] = lambda environ: (
        environ.get("wsgi.url_scheme") == "https"
    )
    write_module: str = ""


def has_cipher(socket: SocketLike | None) -> bool:
    """Tell an ``ssl.SSLSocket``, gevent's too, from a plain socket."""
    return hasattr(socket, "cipher")
