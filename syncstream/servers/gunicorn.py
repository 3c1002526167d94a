"""gunicorn, with its sync, gthread and gevent workers."""

from __future__ import annotations

from .contract import Environ, Server, SocketLike, has_cipher

__all__ = ["SERVER"]


def _socket(environ: Environ) -> SocketLike | None:
    # Over HTTP/2 it is the connection that many streams share.
    if environ.get("SERVER_PROTOCOL", "").startswith("HTTP/2"):
        return None
    socket: SocketLike = environ["gunicorn.socket"]
    return socket


SERVER = Server(
    "gunicorn",
    runs=lambda environ: "gunicorn.socket" in environ,
    socket=_socket,
    is_tls=lambda environ: has_cipher(environ["gunicorn.socket"]),
    write_module="gunicorn.http.wsgi",
)
