"""uWSGI: threads, gevent, behind its HTTP router or with ``--http-socket``."""

from __future__ import annotations

from .contract import Environ, Server, SocketLike

__all__ = ["SERVER"]


class _Connection:
    """The running request's connection, of which uWSGI shows the descriptor.

    It shows it to the thread of the request only, so it is asked once, there.
    """

    def __init__(self) -> None:
        import uwsgi

        self._fd: int = uwsgi.connection_fd()

    def fileno(self) -> int:
        return self._fd


def _socket(environ: Environ) -> SocketLike | None:
    return _Connection()


SERVER = Server(
    "uwsgi",
    runs=lambda environ: "uwsgi.version" in environ,
    socket=_socket,
    # It never chunks.
    marks_end=lambda environ: False,
    is_tls=lambda environ: environ.get("HTTPS") == "on",
)
