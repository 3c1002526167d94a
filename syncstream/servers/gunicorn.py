"""gunicorn, with its sync, gthread, gevent and gevent_pywsgi workers.

With gevent_pywsgi, the environ is `pywsgi`'s, which finds its worker here.
"""

from __future__ import annotations

import io
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from ..runtime.clock import time
from ..runtime.process import AT_ONCE, Stopping, drain_of_environment, process
from .contract import (
    Environ,
    Headers,
    Server,
    SocketLike,
    Write,
    body_length,
    has_cipher,
    running,
)

__all__ = ["SERVER", "stopping", "worker"]

_HEADROOM = 2.5
"""Seconds of the graceful timeout that remain when finite work is cut: a gevent worker
notices up to 1 s late that it must stop, and again that all requests have ended."""
_NOTIFIED = 1.0  # seconds before a sync worker would be killed for its silence


def _is_http_2(environ: Environ) -> bool:
    protocol: str = environ.get("SERVER_PROTOCOL", "")
    return protocol.startswith("HTTP/2")


def _socket(environ: Environ) -> SocketLike | None:
    # Over HTTP/2 many streams share the connection.
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
    headers.clear()  # 27.0: else there would be two Content-Lengths
    return True


def worker() -> Any:
    """Return the gunicorn worker that serves the running request, else ``None``."""
    found = running("gunicorn.workers", "alive")
    if found is None and (hub := _gevent_hub()) is not None:
        # gevent_pywsgi serves in greenlets without a reference to the worker, which
        # waits in the main greenlet, the hub's parent.
        found = running("gunicorn.workers", "alive", hub.parent.gr_frame)
    return found


def _gevent_hub() -> Any:
    gevent = sys.modules.get("gevent")
    # If the main greenlet is running, it has no frame to search.
    if gevent is None or gevent.getcurrent().parent is None:
        return None
    return gevent.get_hub()


class _WorkerStopping:
    """The `Stopping` of a worker: until when its work may continue.

    All workers check ``alive`` (gunicorn 22 to 27). It becomes false with SIGTERM,
    SIGINT, SIGQUIT, SIGABRT, a reload, and as soon as the last request of max_requests
    *begins*. It stays true if the master is killed: gthread then waits for its streams
    forever. So this also compares the parent's pid, as workers do.

    A worker that exits closes its heartbeat's file before the interpreter ends, but the
    master has a descriptor of its own, and kills a worker that takes longer than
    ``timeout`` from its last heartbeat to its very end. (27 does not kill during SIGHUP
    and SIGTERM to itself, until its graceful timeout; a worker cannot tell these from
    others.)
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._until: float | None = None
        self.is_quitting = False
        self._heard = math.inf  # the last heartbeat
        self._killed_at()  # it may have closed the file when it is next asked

    def __call__(self) -> float | None:
        worker = self._worker
        killed_at = self._killed_at()
        if self.is_quitting or worker.ppid != os.getppid():
            return AT_ONCE
        if worker.alive:
            return None
        if worker.reloader is not None:  # development: do not wait
            return AT_ONCE
        drain = drain_of_environment()
        if self._until is None:
            seconds = max(0.0, worker.cfg.graceful_timeout - _HEADROOM)
            self._until = time.monotonic() + (seconds if drain is None else drain)
        return min(self._until, killed_at) if drain is None else self._until

    def _killed_at(self) -> float:
        """Return when the master would kill it, less a second; infinite for never.

        A sync worker sends no heartbeat while it serves a request, and no worker sends
        any while the interpreter ends.
        """
        worker, is_exiting = self._worker, False
        try:
            self._heard = worker.tmp.last_update()
        except ValueError:  # closed
            is_exiting = True
        if worker.cfg.timeout and (is_exiting or _is_sync(worker)):
            return float(self._heard + worker.cfg.timeout - _NOTIFIED)
        return math.inf


def _is_sync(worker: Any) -> bool:
    return any(c.__module__ == "gunicorn.workers.sync" for c in type(worker).__mro__)


class _QuitHook:
    """A gunicorn hook: the worker must end at once.

    ``worker_int`` is called for SIGINT and SIGQUIT, with 0.1 s left; ``worker_abort``
    for SIGABRT, which the master sends to kill, with no time left.
    """

    def __init__(self, stop: _WorkerStopping, before: Callable[[Any], object]) -> None:
        self.stop = stop
        self._before = before

    def __call__(self, worker: Any) -> None:
        self.stop.is_quitting = True
        process().stop()
        self._before(worker)


def stopping(worker: Any) -> Stopping | None:
    """Return the `Stopping` of a worker, ``None`` without one.

    It replaces the worker's hooks for an immediate end, and calls the previous ones:
    ``alive`` does not distinguish SIGQUIT from SIGTERM.
    """
    if worker is None:
        return None
    hook = worker.cfg.worker_int
    if isinstance(hook, _QuitHook):
        return hook.stop
    stop = _WorkerStopping(worker)
    for name in ("worker_int", "worker_abort"):
        worker.cfg.set(name, _QuitHook(stop, getattr(worker.cfg, name)))
    return stop


def _stopping(environ: Environ) -> Stopping | None:
    if not environ["wsgi.multithread"]:
        # A sync worker serves in its main thread, which runs signal handlers between
        # system calls. gunicorn makes SIGTERM restart system calls (siginterrupt in
        # its init_signals), so a stream that waits for a lock or a socket would not
        # notice it. Without restarts, Python itself retries the calls (PEP 475).
        signal.siginterrupt(signal.SIGTERM, True)
    return stopping(worker())


def _threads(environ: Environ) -> int | None:
    if not environ["wsgi.multithread"]:
        return 1
    found = worker()
    if found is None:
        return None
    # gevent's worker accepts this many connections; further clients wait.
    name = "threads" if hasattr(found, "tpool") else "worker_connections"
    limit: int = getattr(found.cfg, name)
    return limit


def _stays(environ: Environ) -> str | None:
    # Not HTTP_VERSION: a request's header ``Version`` sets it, too.
    if "gunicorn.http2" in " ".join(environ):
        return "the connection is shared by the streams of HTTP/2"
    if _unreader(environ) is None:  # a pipelined request would be run
        return "gunicorn does not show what it has read ahead"
    return None


def _unreader(environ: Environ) -> Any:
    # Body -> its reader -> the parser's unreader; or the worker's Response -> its
    # request -> the unreader, if an application has replaced ``wsgi.input``.
    reader = getattr(environ.get("wsgi.input"), "reader", None)
    unreader = getattr(reader, "unreader", None)
    if unreader is None:
        request = getattr(_response(), "req", None)
        unreader = getattr(request, "unreader", None)
    return unreader


def _response() -> Any:
    """Return the server's own response to the running request."""
    return running("gunicorn.workers", "req", name="resp")


def _start_response(environ: Environ) -> Any:
    return getattr(_response(), "start_response", None)


def _own_write(environ: Environ) -> Write | None:
    write: Write | None = getattr(_response(), "write", None)
    return write


def _sent(write: Write) -> int | None:
    sent: int | None = getattr(getattr(write, "__self__", None), "sent", None)
    return sent


def _drop_read_ahead(environ: Environ) -> None:
    unreader = _unreader(environ)
    if unreader is not None:
        unreader.buf = io.BytesIO()
    # The rest of the request's body, too: the reader of a chunked body may hold a
    # pipelined request, and returns it when gthread reads on.
    body: Any = getattr(getattr(_response(), "req", None), "body", None)
    reader = getattr(body, "reader", None)
    if reader is not None:
        with suppress(AttributeError):  # a reader without these attributes
            body.failed = True  # 27: "must not be reused"
            reader.parser, reader.length = None, 0


def _unread(environ: Environ) -> int | None:
    # Body -> its reader, of a known length or of chunks (22 to 27).
    body: Any = getattr(getattr(_response(), "req", None), "body", None)
    reader: Any = getattr(body, "reader", None)
    if hasattr(reader, "length"):
        return int(reader.length)
    is_read = reader is not None and getattr(reader, "parser", reader) is None
    return 0 if is_read else body_length(environ)


def _stop_warnings(environ: Environ) -> Iterator[str]:
    found = worker()
    if found is not None and found.cfg.max_requests and found.cfg.workers == 1:
        yield (
            "gunicorn replaces a worker that has served its max_requests only after "
            "the worker has exited, and an open stream delays the exit by up to "
            f"{found.cfg.graceful_timeout} s, during which no worker serves: run "
            "gunicorn with two workers or more, or without --max-requests"
        )


def _warnings(environ: Environ) -> Iterator[str]:
    if _is_http_2(environ):
        # 27.0: handle_http2 runs one WSGI call after the other.
        yield (
            "gunicorn answers the requests of one HTTP/2 connection one after another: "
            "an open stream blocks all other requests of its client. Run gunicorn with "
            "--http-protocols h1, and leave HTTP/2 to the proxy"
        )
        return
    yield from _stop_warnings(environ)
    if environ["wsgi.multithread"]:
        return
    found = worker()
    timeout = None if found is None else found.cfg.timeout
    ends = f", and --timeout kills it after {timeout} s" if timeout else ""
    yield (
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
    own_write=_own_write,
    sent=_sent,
    start_response=_start_response,
    forget_head=_forget_head,
    stopping=_stopping,
    threads=_threads,
    warnings=_warnings,
    stop_warnings=_stop_warnings,
    stays=_stays,
    drop_read_ahead=_drop_read_ahead,
    unread=_unread,
    lets_exits_through=True,  # its sync worker
)
