"""uWSGI: threads, gevent, behind its HTTP router or with ``--http-socket``.

Nothing shows that it is stopping (2.0.30): SIGTERM and SIGINT end it at once, in C.
During the graceful reload of SIGHUP, which waits for streams, ``uwsgi.workers()`` and
``uwsgi.ready()`` return the same as before. Its ``write`` does not show the headers.
"""

from __future__ import annotations

from collections.abc import Iterator

from .contract import Environ, Server, SocketLike, unpatched

__all__ = ["SERVER"]


class _Descriptor:
    """The descriptor of the running request's connection.

    uWSGI shows it only in the request's thread, so it is read once, there.
    """

    def __init__(self) -> None:
        import uwsgi

        self._fd: int = uwsgi.connection_fd()

    def fileno(self) -> int:
        return self._fd


def _socket(environ: Environ) -> SocketLike | None:
    return _Descriptor()


def _is_tls(environ: Environ) -> bool:
    # nginx also sets HTTPS if it terminates the TLS itself (its uwsgi_params).
    import uwsgi

    return environ.get("HTTPS") == "on" and any(
        option.startswith(("https-socket", "suwsgi-socket", "ssl-socket"))
        for option in uwsgi.opt
    )


def _threads(environ: Environ) -> int | None:
    import uwsgi

    cores: int = uwsgi.cores  # its threads, or its greenlets
    return cores


def _warnings(environ: Environ) -> Iterator[str]:
    import uwsgi

    seconds = uwsgi.opt.get("harakiri")
    if seconds:
        yield (
            f"uWSGI's harakiri kills a worker whose stream is older than "
            f"{int(seconds)} s, with all its streams: raise harakiri, or remove it"
        )
    if "gevent" in uwsgi.opt:
        yield from unpatched()


SERVER = Server(
    "uwsgi",
    runs=lambda environ: "uwsgi.version" in environ,
    socket=_socket,
    # uWSGI never sends chunks.
    marks_end=lambda environ: False,
    clears_environ=True,
    answers_errors=False,  # it sends the head from start_response, 200 (2.0.30)
    raises_system_error=True,  # it leaves the error of exc_info set (2.0.30)
    is_tls=_is_tls,
    threads=_threads,
    warnings=_warnings,
    plain_sockets=(_Descriptor,),
)
