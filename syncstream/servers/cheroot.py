"""cheroot, CherryPy's server."""

from __future__ import annotations

from .contract import Environ, Server, SocketLike, connection_reset, has_cipher

__all__ = ["SERVER"]


def _socket(environ: Environ) -> SocketLike | None:
    # KnownLengthRFile -> StreamReader -> SocketIO -> socket
    reader = getattr(environ["wsgi.input"], "rfile", None)
    raw = getattr(reader, "_raw", None) or getattr(reader, "raw", None)
    socket: SocketLike | None = getattr(raw, "_sock", None)
    return socket


SERVER = Server(
    "cheroot",
    runs=lambda environ: "Cheroot" in environ.get("SERVER_SOFTWARE", ""),
    socket=_socket,
    # What it cannot write it keeps, and Python 3.13 complains of that later.
    raises=connection_reset,
    is_tls=lambda environ: has_cipher(_socket(environ)),
    write_module="cheroot.wsgi",
)
