"""gevent.pywsgi."""

from __future__ import annotations

from .contract import Environ, Server, SocketLike, has_cipher

__all__ = ["SERVER"]


def _socket(environ: Environ) -> SocketLike | None:
    raw = getattr(getattr(environ["wsgi.input"], "rfile", None), "raw", None)
    socket: SocketLike | None = getattr(raw, "_sock", None)
    return socket


SERVER = Server(
    "pywsgi",
    runs=lambda environ: environ.get("SERVER_SOFTWARE", "").startswith("gevent/"),
    socket=_socket,
    is_tls=lambda environ: has_cipher(_socket(environ)),
    write_module="gevent.pywsgi",
)
