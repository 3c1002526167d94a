"""gunicorn, with its sync, gthread, gevent and gevent_pywsgi workers.

With gevent_pywsgi it is `pywsgi` that makes the environ, and asks here for the worker.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from .contract import (
    Environ,
    Headers,
    Server,
    SocketLike,
    Write,
    has_cipher,
    running,
)

__all__ = ["SERVER", "is_stopping", "worker"]


def _is_http_2(environ: Environ) -> bool:
    protocol: str = environ.get("SERVER_PROTOCOL", "")
    return protocol.startswith("HTTP/2")


def _socket(environ: Environ) -> SocketLike | None:
    # Over HTTP/2 it is the connection that many streams share.
    if _is_http_2(environ):
        return None
    socket: SocketLike = environ["gunicorn.socket"]
    return socket


def _headers(write: Write) -> Headers | None:
    response = getattr(write, "__self__", None)  # HTTP/2's, too
    headers: Headers | None = getattr(response, "headers", None)
    return headers


def _forget_head(environ: Environ, write: Write | None) -> bool:
    headers = _headers(write) if write is not None else None
    if headers is None:
        headers = getattr(_response(), "headers", None)
    if not isinstance(headers, list):
        return False
    headers.clear()  # 27.0: a Content-Length would stand there twice
    return True


def worker() -> Any:
    """Return the gunicorn worker that serves the running request, else ``None``."""
    found = running("gunicorn.workers", "alive")
    if found is None and (hub := _hub()) is not None:
        # gevent_pywsgi serves in greenlets that know nothing of the worker. It
        # waits for its end in the main greenlet, the hub's parent.
        found = running("gunicorn.workers", "alive", hub.parent.gr_frame)
    return found


def _hub() -> Any:
    gevent = sys.modules.get("gevent")
    # The hub's parent has no frame to show if it is what runs now.
    if gevent is None or gevent.getcurrent().parent is None:
        return None
    return gevent.get_hub()


def is_stopping(worker: Any) -> Callable[[], bool] | None:
    """Return what tells whether a worker has been told to stop.

    ``alive`` is what all of them look at (gunicorn 22 to 27): it falls with SIGTERM,
    SIGINT, SIGQUIT, SIGABRT, a reload, and as soon as the request that is the last one
    of max_requests *begins*. With a master that has been killed it stays: gthread
    then waits for its streams without an end, so ask what the workers ask, too.
    """
    if worker is None:
        return None
    return lambda: not worker.alive or worker.ppid != os.getppid()


def _stopping(environ: Environ) -> Callable[[], bool] | None:
    if not environ["wsgi.multithread"]:
        # A sync worker serves in its main thread, which runs signal handlers between
        # system calls. gunicorn has SIGTERM restart them (siginterrupt in its
        # init_signals), so a stream that waits for a lock or a socket would go on
        # and ``alive`` stay. Interrupted, Python retries them itself: PEP 475.
        signal.siginterrupt(signal.SIGTERM, True)
    return is_stopping(worker())


def _threads(environ: Environ) -> int | None:
    if not environ["wsgi.multithread"]:
        return 1
    found = worker()
    if found is None:
        return None
    # gevent's worker accepts so many connections, and then lets clients wait.
    name = "threads" if hasattr(found, "tpool") else "worker_connections"
    limit: int = getattr(found.cfg, name)
    return limit


def _stays(environ: Environ) -> str | None:
    # Not by HTTP_VERSION, which a request's own header ``Version`` sets, too.
    if any(key.startswith("gunicorn.http2") for key in environ):
        return "the connection is shared by the streams of HTTP/2"
    if _unreader(environ) is None:  # a request behind this one would be run
        return "gunicorn does not show what it has read ahead"
    return None


def _unreader(environ: Environ) -> Any:
    # Body -> its reader -> the parser's unreader; or the worker's Response -> its
    # request -> that, where somebody has put another ``wsgi.input`` into the environ.
    reader = getattr(environ.get("wsgi.input"), "reader", None)
    unreader = getattr(reader, "unreader", None)
    if unreader is None:
        request = getattr(_response(), "req", None)
        unreader = getattr(request, "unreader", None)
    return unreader


def _response() -> Any:
    """Return the server's own response to the running request."""
    return running("gunicorn.workers", "req", name="resp")


def _drop_read_ahead(environ: Environ) -> None:
    unreader = _unreader(environ)
    if unreader is not None:
        unreader.buf = io.BytesIO()
    # What is left of the request's body: a chunked one's reader may hold a request
    # that came behind it, and gives that back when gthread has it read on.
    body: Any = getattr(getattr(_response(), "req", None), "body", None)
    reader = getattr(body, "reader", None)
    if reader is not None:
        body.failed = True  # 27: "must not be reused"
        reader.parser, reader.length = None, 0


def _warning(environ: Environ) -> str | None:
    if _is_http_2(environ):
        # 27.0: handle_http2 runs one WSGI call after the other.
        return (
            "gunicorn answers the requests of one HTTP/2 connection one after another, "
            "so that an open stream holds up all others of its client: run gunicorn "
            "with --http-protocols h1, and leave HTTP/2 to the proxy"
        )
    if environ["wsgi.multithread"]:
        return None
    found = worker()
    timeout = None if found is None else found.cfg.timeout
    ends = f", and is killed by --timeout after {timeout} s" if timeout else ""
    return (
        "gunicorn's sync worker serves nothing else while a stream is open"
        f"{ends}: run gunicorn with -k gthread --threads N, or with -k gevent"
    )


SERVER = Server(
    "gunicorn",
    runs=lambda environ: "gunicorn.socket" in environ,
    socket=_socket,
    is_tls=lambda environ: has_cipher(environ["gunicorn.socket"]),
    write_module="gunicorn.http.wsgi",
    headers=_headers,
    forget_head=_forget_head,
    stopping=_stopping,
    threads=_threads,
    warning=_warning,
    stays=_stays,
    drop_read_ahead=_drop_read_ahead,
)
