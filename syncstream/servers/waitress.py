"""waitress."""

from __future__ import annotations

from .contract import Environ, Server, SocketLike

__all__ = ["SERVER"]


def _socket(environ: Environ) -> SocketLike | None:
    # The callable is a bound method of the channel.
    channel = environ["waitress.client_disconnected"].__self__
    socket: SocketLike | None = channel.socket
    return socket


SERVER = Server(
    "waitress",
    runs=lambda environ: "waitress.client_disconnected" in environ,
    socket=_socket,
    is_tls=lambda environ: False,
    write_module="waitress.task",
)
