"""waitress."""

from __future__ import annotations

from .contract import Environ, Server, SocketLike

__all__ = ["SERVER"]


def _socket(environ: Environ) -> SocketLike | None:
    # The callable is a bound method of the channel.
    channel = environ["waitress.client_disconnected"].__self__
    socket: SocketLike | None = channel.socket
    return socket


def _gone() -> BaseException:
    # Any other exception is logged with its traceback.
    from waitress.channel import ClientDisconnected

    error: BaseException = ClientDisconnected()
    return error


SERVER = Server(
    "waitress",
    runs=lambda environ: "waitress.client_disconnected" in environ,
    socket=_socket,
    gone=_gone,
    is_tls=lambda environ: False,
    write_module="waitress.task",
)
