"""The contract of this folder: the facts that each server's file states."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

from ..runtime.process import AT_ONCE, Stopping

__all__ = [
    "Counter",
    "Environ",
    "Headers",
    "Server",
    "SocketLike",
    "Write",
    "at_once",
    "connection_reset",
    "decoded",
    "drop_buffered",
    "has_cipher",
    "running",
    "speaks_http_1_1",
    "takes_directly",
    "unpatched",
]

Environ = dict[str, Any]
Headers = Iterable[tuple[str, str]]
Write = Callable[[bytes], object]


class SocketLike(Protocol):
    """A socket, or as much of one as a server shows."""

    def fileno(self) -> int:
        """Return the descriptor, -1 once it is closed."""


def connection_reset() -> BaseException:
    """Return the exception that most servers take quietly for a client's leaving.

    With its errno: without it gunicorn and pywsgi log a traceback.
    """
    return ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


def at_once(is_told: Callable[[], bool]) -> Stopping:
    """Return the `Stopping` of a server that leaves no time for finite work."""
    return lambda: AT_ONCE if is_told() else None


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
        headers: The response's headers as the server sends them or has sent them,
            given its own ``write`` (see ``write_module``): what middlewares above
            us have added is among them, what the server adds itself may be.
            ``None`` where they cannot be had. (With Content-Encoding added and
            ``write`` passed through, what we write would be garbage.)
        own_write: The ``write`` of the running request's response, from the server's
            own frames: for where a framework or a middleware does not pass it on. In
            the thread or greenlet of the request.
        sent: How many bytes of a response's body the server has been given, by
            iteration or by its ``write``, which is the argument; ``None`` where it
            does not count them (see `Counter`).
        unsent: How many bytes for this client the server keeps in buffers of its
            own, beyond the kernel's. From any thread.
        drop: Has it close a client's socket that was shut down and is full, where it
            would not notice. From any thread.
        closes_early: It may close the client's socket, from a thread of its own,
            while the response is being made.
        stopping: Returns what tells whether this process has been told to stop, and
            until when finite work may go on (`process.Stopping`); ``None`` where
            nothing shows it. Once a process, in the thread or greenlet of a request
            that is being served; what it returns may be called often, from any
            thread, and holds no request.
        lets_exits_through: It serves in the process's main thread, and ends when a
            KeyboardInterrupt, or a SystemExit that a signal's handler raises, leaves
            the application there.
        threads: How many requests this process serves at once, ``None`` where
            there is no such limit, or where it cannot be told. Under gevent it
            counts greenlets. In the thread or greenlet of the request.
        warnings: What an operator should change where streams are served in this
            way, a sentence for the log each. In the thread or greenlet of the request.
        stays: Why a connection cannot leave this server, in plain words, ``None`` if
            it can (see `handover`). That the method, the protocol, TLS and the
            socket's type allow it is asked elsewhere.
        plain_sockets: What ``socket`` returns beside Python's and gevent's plain
            sockets: exact types that encrypt and keep nothing.
        lock: What keeps threads of the server's own from the client's descriptor,
            and from sending what it has in buffers of its own, while it is held. It
            is held for moments, in the thread or greenlet of the request.
        is_closing: Tells whether such a thread is about to close the descriptor: one
            that is not, while the lock is held, will ask for the lock before it does.
        drop_read_ahead: Drops what the server has read of requests behind this one.
            Nothing blocks: its descriptor reads an end.
        key: The server's own object that tells it from others of its kind in this
            process, never what a client sends; ``None`` if there can be but one. In
            the thread or greenlet of the request.
        leave_body: Has the server not read what is left of the request's body before
            it sends a head, and close the connection after the response instead.
        closes_first: It calls the response's ``close()`` before it writes the mark
            of the response's end.
        start_response: The server's own, where it can be had from within ``next()``;
            needed only where ``answers_errors`` does not hold.
        forget_head: Has the server forget a head that start_response was given and
            that has not been sent, given its own ``write`` (``None`` if that is not
            known), so that start_response may be called again with an error. Tells
            whether it will: PEP 3333 wants the new headers to replace the old ones,
            gunicorn and cheroot add them to the old ones.
        answers_errors: It answers 500 for an `Exception` that leaves ``next()``
            before a byte of the response has left.
        logs_errors: And logs it, with its traceback.
        is_known: What it does with an error that leaves ``next()`` is known.
        is_test: It is no server, whatever the environ says.
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
    headers: Callable[[Write], Headers | None] = lambda write: None
    own_write: Callable[[Environ], Write | None] = lambda environ: None
    sent: Callable[[Write], int | None] = lambda write: None
    unsent: Callable[[Environ], int] = lambda environ: 0
    drop: Callable[[Environ], object] = lambda environ: None
    closes_early: bool = False
    stopping: Callable[[Environ], Stopping | None] = lambda environ: None
    lets_exits_through: bool = False
    threads: Callable[[Environ], int | None] = lambda environ: None
    warnings: Callable[[Environ], Iterable[str]] = lambda environ: ()
    stays: Callable[[Environ], str | None] = lambda environ: None
    plain_sockets: tuple[type, ...] = ()
    lock: Callable[[Environ], AbstractContextManager[Any]] = lambda environ: (
        nullcontext()
    )
    is_closing: Callable[[Environ], bool] = lambda environ: False
    drop_read_ahead: Callable[[Environ], object] = lambda environ: None
    key: Callable[[Environ], object] = lambda environ: None
    leave_body: Callable[[Environ], object] = lambda environ: None
    closes_first: bool = False
    start_response: Callable[[Environ], Any] = lambda environ: None
    forget_head: Callable[[Environ, Write | None], bool] = lambda environ, write: True
    answers_errors: bool = True
    logs_errors: bool = True
    is_known: bool = True
    is_test: bool = False


def has_cipher(socket: SocketLike | None) -> bool:
    """Tell an ``ssl.SSLSocket``, gevent's too, from a plain socket."""
    return hasattr(socket, "cipher")


def decoded(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return headers that a server keeps as bytes, as `str` (PEP 3333: Latin-1)."""
    return [
        (name.decode("latin-1"), value.decode("latin-1")) for name, value in headers
    ]


def drop_buffered(reader: Any) -> None:
    """Drop what an `io.BufferedReader` has read ahead of its socket's end."""
    peek = getattr(reader, "peek", None)
    if peek is None:
        return
    with suppress(OSError, ValueError):  # closed, or reset
        reader.read(len(peek(1)))


def running(
    module: str, attribute: str, frame: FrameType | None = None, *, name: str = "self"
) -> Any:
    """Return whose method is running here, by the module that it is written in.

    Most servers leave themselves out of the environ, but not out of the stack.

    Args:
        module: The server's module, or its package.
        attribute: What the object must have.
        frame: Where to begin; by default with the caller, in this thread or
            greenlet.
        name: The variable that holds the object.

    Returns:
        The ``self`` of the innermost such call, ``None`` if there is none.
    """
    frame = sys._getframe(1) if frame is None else frame
    while frame is not None:
        # Others are not looked into: up to Python 3.12 a frame keeps the f_locals
        # that were read, and so whatever the application had in its variables.
        written_in = frame.f_globals.get("__name__") or ""
        if _is_in(written_in, module):
            owner = frame.f_locals.get(name)
            if hasattr(owner, attribute):
                return owner
        frame = frame.f_back
    return None


class Counter:
    """Counts what a server that does not count is given of one response's body.

    It stands in the place of the ``write`` of the server's response, through which its
    iteration goes, too, until it is closed.

    Args:
        write: That, a bound method.
    """

    def __init__(self, write: Write) -> None:
        self._owner: Any = write.__self__  # type: ignore[attr-defined]
        self._write = write
        self.sent = 0  # bytes
        self._owner.write = self

    def __call__(self, data: bytes) -> object:
        result = self._write(data)
        self.sent += len(data)
        return result

    def close(self) -> None:
        """Leave the place."""
        if vars(self._owner).get("write") is self:
            del self._owner.write


# They hand on each chunk as it is, or not at all.
_PASSING = (
    "django.http.response",
    "newrelic",
    "opentelemetry",
    "sentry_sdk",
    "syncstream",
    "werkzeug.debug",
    "werkzeug.wsgi",
)


def takes_directly(module: str) -> bool:
    """Tell whether what a generator yields here reaches its server at once, as it is.

    So it is if nobody stands between them but who is known to hand on chunks.

    Args:
        module: The server's, or its package.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if _is_in(name, module):
            return True
        if not any(_is_in(name, passing) for passing in _PASSING):
            return False
        frame = frame.f_back
    return False


def _is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def unpatched() -> Iterator[str]:
    """Yield the warning that gevent serves code which it has not patched, if so."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not all(map(monkey.is_module_patched, ("time", "socket"))):
        yield (
            "gevent has not patched the standard library, so that one stream that "
            "sleeps or waits holds up all others: call gevent.monkey.patch_all() "
            "before anything else is imported"
        )
