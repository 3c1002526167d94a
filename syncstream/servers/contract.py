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
    "body_length",
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
    """Return the exception that most servers silently treat as a lost client.

    It has an errno, without which gunicorn and pywsgi log a traceback.
    """
    return ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


def at_once(is_told: Callable[[], bool]) -> Stopping:
    """Return the `Stopping` of a server that leaves no time for finite work."""
    return lambda: AT_ONCE if is_told() else None


def speaks_http_1_1(environ: Environ) -> bool:
    """Return whether the client speaks HTTP/1.1, so that servers send it chunks."""
    return environ.get("SERVER_PROTOCOL") not in ("HTTP/1.0", "HTTP/0.9", None)


def body_length(environ: Environ) -> int | None:
    """Return the length of a request's body, ``None`` if it is unknown."""
    if "HTTP_TRANSFER_ENCODING" in environ or environ.get("wsgi.input_terminated"):
        return None
    length = environ.get("CONTENT_LENGTH") or "0"
    return int(length) if length.isdecimal() else None


@dataclass(frozen=True, slots=True, eq=False)  # there is one of each
class Server:
    """One WSGI server, as seen from an application.

    Attributes:
        name: Its name for the log and the tests.
        runs: Tells from an environ whether this server made it.
        socket: The client's socket, ``None`` if the server does not show it.
        raises: The exception that ``next()`` raises to cut a stream, after the socket
            has been shut down. ``None``, the default: the iteration ends normally, and
            the server's next write fails as if the client had left. No middleware can
            swallow or log that, as Werkzeug's debugger does with exceptions.
        marks_end: Tells whether the server marks the end of a response without
            Content-Length (chunked), so that a missing mark shows a truncation.
        is_tls: Tells whether the server itself terminates the client's TLS.
        write_module: The module of the ``write`` that the server's start_response
            returns. Middlewares may return others, which do not write at once.
        headers: The response's headers as the server sends them, given its own
            ``write`` (see ``write_module``). They include those added by middlewares
            above us, and perhaps the server's own. ``None`` if they are unknown. (If a
            middleware adds Content-Encoding but passes ``write`` through, our writes
            would corrupt the body.)
        own_write: The ``write`` of the running request's response, found in the
            server's frames: for frameworks and middlewares that do not pass it on.
            Call it in the thread or greenlet of the request.
        sent: The number of body bytes that the server has received for a response, by
            iteration or by its ``write``, which is the argument; ``None`` if the
            server does not count them (see `Counter`).
        unsent: The number of bytes for this client in the server's own buffers, without
            the kernel's. From any thread.
        drop: Makes the server close a client's socket that was shut down while full,
            if the server would not notice. From any thread.
        closes_early: A thread of the server may close the client's socket while the
            response is being generated.
        stopping: Returns a `process.Stopping`, which tells whether this process has
            been told to stop and until when finite work may continue; ``None`` if the
            server does not show it. Called once for each server of a process
            (`process.Served`), in the thread or greenlet of a running request. The
            result may be called often, from any thread, and holds no request.
        lets_exits_through: The server runs applications in the process's main thread,
            and ends when a KeyboardInterrupt, or a SystemExit from a signal handler,
            leaves the application.
        threads: The number of requests that this process serves at once (under gevent,
            greenlets); ``None`` if it is unlimited or unknown. In the thread or
            greenlet of the request.
        warnings: Advice for the operator if streams are served in this way, one
            sentence for each log line. In the thread or greenlet of the request.
        stop_warnings: Those of the ``warnings`` that hold for finite work whose client
            has left this server, too: the server's end waits for it.
        stays: The reason why a connection cannot leave this server, in plain words;
            ``None`` if it can (see `swap`). The method, the protocol, TLS and the
            socket's type are checked elsewhere.
        plain_sockets: Exact types, besides Python's and gevent's plain sockets, that
            ``socket`` returns and that neither encrypt nor buffer.
        lock: A lock that keeps the server's other threads from using the client's
            descriptor and from sending their buffers. We hold it briefly, in the
            thread or greenlet of the request.
        is_closing: Tells whether such a thread is about to close the descriptor. If it
            is not, while the lock is held, the thread takes the lock before it closes.
        drop_read_ahead: Drops the bytes of later requests that the server has read.
            Never blocks, as its descriptor reads an end of file.
        key: An object that identifies the server among others of its kind in this
            process, never taken from the client; ``None`` if there is only one. In the
            thread or greenlet of the request.
        unread: The number of bytes of the request's body that the application has not
            read, ``None`` if it is unknown. In the thread or greenlet of the request.
        leave_body: Makes the server send a head without reading the rest of the
            request's body first, and close the connection after the response.
        clears_environ: The server empties a request's environ when its response has
            ended: what goes on after that cannot use its request.
        closes_first: The server calls the response's ``close()`` before it writes the
            end mark of the response.
        start_response: The server's own start_response, found in its frames from
            within ``next()``: for frameworks that do not pass it on.
        forget_head: Makes the server forget a head that start_response received but
            that has not been sent, given the server's ``write`` (``None`` if unknown),
            so that start_response can be called again with an error. Returns whether
            it will. PEP 3333 demands that the new headers replace the old ones;
            gunicorn and cheroot append them.
        answers_errors: The server answers 500 if an `Exception` leaves ``next()``
            before the first byte of the response was sent.
        logs_errors: The server logs this exception with its traceback.
        raises_system_error: start_response, called again with an error, raises
            SystemError although it has accepted the call.
        is_known: The server's reaction to exceptions from ``next()`` is known.
        is_test: It is a test client's environ, whatever server it names.
        exact: The server whose functions may fail, if these do not (see `guard`).
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
    stop_warnings: Callable[[Environ], Iterable[str]] = lambda environ: ()
    stays: Callable[[Environ], str | None] = lambda environ: None
    plain_sockets: tuple[type, ...] = ()
    lock: Callable[[Environ], AbstractContextManager[Any]] = lambda environ: (
        nullcontext()
    )
    is_closing: Callable[[Environ], bool] = lambda environ: False
    drop_read_ahead: Callable[[Environ], object] = lambda environ: None
    key: Callable[[Environ], object] = lambda environ: None
    unread: Callable[[Environ], int | None] = body_length
    leave_body: Callable[[Environ], object] = lambda environ: None
    clears_environ: bool = False
    closes_first: bool = False
    start_response: Callable[[Environ], Any] = lambda environ: None
    forget_head: Callable[[Environ, Write | None], bool] = lambda environ, write: True
    answers_errors: bool = True
    logs_errors: bool = True
    raises_system_error: bool = False
    is_known: bool = True
    is_test: bool = False
    exact: Server | None = None


def has_cipher(socket: SocketLike | None) -> bool:
    """Return whether a socket is an ``ssl.SSLSocket``, Python's or gevent's."""
    return hasattr(socket, "cipher")


def decoded(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return a server's headers, decoded from bytes (PEP 3333: Latin-1)."""
    return [
        (name.decode("latin-1"), value.decode("latin-1")) for name, value in headers
    ]


def drop_buffered(reader: Any) -> None:
    """Drop the bytes that an `io.BufferedReader` has read ahead."""
    peek = getattr(reader, "peek", None)
    if peek is None:
        return
    with suppress(OSError, ValueError):  # closed, or reset
        reader.read(len(peek(1)))


def running(
    module: str, attribute: str, frame: FrameType | None = None, *, name: str = "self"
) -> Any:
    """Find an object on the stack whose method, from a given module, is running.

    Most servers are missing from the environ, but none from the stack.

    Args:
        module: The server's module or package.
        attribute: The name of an attribute that the object must have.
        frame: The innermost frame to search; by default the caller's, in this thread
            or greenlet.
        name: The variable that holds the object.

    Returns:
        The object of the innermost such call, ``None`` if there is none.
    """
    frame = sys._getframe(1) if frame is None else frame
    while frame is not None:
        # Never read f_locals of other modules: up to Python 3.12 a frame keeps the
        # dict, and with it the values of the application's variables.
        written_in = frame.f_globals.get("__name__") or ""
        if _is_in(written_in, module):
            owner = frame.f_locals.get(name)
            if hasattr(owner, attribute):
                return owner
        frame = frame.f_back
    return None


class Counter:
    """Counts the body bytes of one response, for a server that does not.

    Until it is closed, it replaces the ``write`` method of the server's response, which
    the server's iteration calls, too.

    Args:
        write: The bound method to replace.
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
        """Restore the original method."""
        if vars(self._owner).get("write") is self:
            del self._owner.write


# These modules pass each chunk on unchanged, or drop it.
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
    """Return whether the chunks of this generator reach the server unchanged, at once.

    They do if all frames in between belong to modules known to pass chunks on.

    Args:
        module: The server's module or package.
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
    """Yield a warning if gevent serves code without having patched it."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not all(map(monkey.is_module_patched, ("time", "socket"))):
        yield (
            "gevent has not patched the standard library: one stream that sleeps or "
            "waits blocks all others. Call gevent.monkey.patch_all() before anything "
            "else is imported"
        )
