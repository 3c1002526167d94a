"""`Connection`: a request's socket, server and headers, read once from its environ."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ClientDisconnected
from ..runtime.journal import report
from ..runtime.process import Stopping, process
from ..runtime.sockets import hang_up, is_hung_up, is_unix, is_writable, release, reset
from ..runtime.waiting import gevent_hub, say
from . import safe, server_of
from .advice import advise, log, warn_of_compression
from .cached import cached
from .contract import Counter, Server, SocketLike, connection_reset, takes_directly
from .head import error_head, find_head
from .request import last_event_id, names_event_stream
from .swap import Refused, Swap

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

__all__ = [
    "Connection",
    "Full",
    "Sent",
]

CONNECTION = "syncstream.connection"
"""The environ key of the connection: a weak reference to it."""

BEFORE_WAIT = "syncstream.before_wait"
"""The environ key of a list of callables. They release resources, such as database
connections, before a stream begins and whenever it waits."""

HANDOVER = "syncstream.handover"
"""The environ key that is ``False`` if the connection must stay with its server."""

_UNKNOWN: Any = object()


class Full(Exception):
    """A stream must be refused although the limits allow it; the text says why."""


class Sent(Protocol):
    """A stream, as its connection sees it.

    Attributes:
        reference: A weak reference to it.
        reason: Why it has ended, ``None`` while it lives.
    """

    @property
    def reference(self) -> Callable[[], Any]: ...

    @property
    def reason(self) -> str | None: ...

    def connect(
        self, connection: Connection, *, is_encoded: bool, written: bytes
    ) -> None:
        """Say which connection its chunks go to; see `Stream.connect`."""

    def is_new(self, *, is_events: bool) -> bool:
        """Tell whether it waits for a client, in a format of events or in another."""


class Connection:
    """The request's connection, and the operations that its server allows.

    Many methods: it answers what streams, responses and the middleware ask of one
    request; most are one question to its server.

    Attributes:
        stream: The running stream of this connection, ``None`` before and after it.
    """

    def __init__(self, environ: WSGIEnvironment) -> None:
        self.environ = environ
        # Keep the server's own input: the socket is found through it, and Bottle's
        # request.params replaces it in the environ.
        self._input = environ.get("wsgi.input")
        # Weak references, here and in the environ: no cycle keeps either alive.
        self._stream: weakref.ref[Sent] | None = None
        self._write: Callable[[bytes], object] | None = None  # the server's
        self._usable: Any = _UNKNOWN  # what `write` returns
        self._is_encoded = False  # whether the application set Content-Encoding
        self._sent_before: int | None = None  # bytes of the body, before the stream
        self._counter: Counter | None = None
        self._begun: tuple[StartResponse, list[tuple[str, str]]] | None = None
        self.is_answering = False  # start_response is being called again, with an error
        self.hides_errors = False  # a framework answers errors without logging them
        self._has_failed_hook = False
        self._made: list[Callable[[], Any]] = []

    @classmethod
    def of(cls, environ: WSGIEnvironment) -> Connection:
        """Return the request's connection: the same one as long as it is referenced."""
        reference = environ.get(CONNECTION)
        connection = reference() if reference is not None else None
        if not isinstance(connection, cls):
            connection = cls(environ)
            environ[CONNECTION] = weakref.ref(connection)
        return connection

    @property
    def stream(self) -> Sent | None:
        stream = self._stream() if self._stream is not None else None
        return None if stream is None or stream.reason is not None else stream

    def take(
        self,
        stream: Sent,
        headers: Iterable[tuple[str, str]] = (),
        written: bytes = b"",
    ) -> None:
        """Connect a stream that this connection sends, with its response headers.

        Raises:
            RuntimeError: It goes to another connection already, or has ended.
        """
        encoded = "content-encoding" in [name.lower() for name, _ in headers]
        # First: it raises if another request has the stream, which must not be closed
        # with this one.
        stream.connect(self, is_encoded=encoded, written=written)
        self._stream = weakref.ref(stream)
        self._is_encoded = encoded

    def note_made(self, stream: Sent) -> None:
        """Remember a stream that was created during this request."""
        self._made.append(stream.reference)

    def find_made(self, *, is_events: bool) -> Sent | None:
        """Return the last stream made in a format of events or not, if it is unsent.

        The application returned another response, for instance one of a middleware
        that rewrites bodies; the stream's chunks pass through that one.
        """
        for reference in reversed(self._made):
            stream: Sent | None = reference()
            if stream is not None and stream.is_new(is_events=is_events):
                return stream
        return None

    def warn(self) -> None:
        """Log advice for the operator about a stream that stays, once a process."""
        record, server, environ = process(), self.server, self._given
        write = self._write
        # `write` is None if the head shows an encoding.
        if write is not None and self.write is None and not self._is_encoded:
            head = server.headers(write) or ()
            if any(name.lower() == "content-encoding" for name, _ in head):
                warn_of_compression()
        protocol = str(environ.get("SERVER_PROTOCOL"))
        warnings = advise(server, environ, "warnings")
        # The test clients of frameworks name no server.
        software, fd = environ.get("SERVER_SOFTWARE"), self.fd
        if fd is None and software and not warnings and not server.is_test:
            record.warn_once(
                log,
                f"{_short(ascii(software)[1:-1], 60)} shows no socket: a stream does"
                " not notice that its client has left until it yields, and sends no"
                " keepalive while its generator waits. Prefer one of the servers in"
                " docs/servers.md",
                "no socket",
            )
        is_old = protocol == "HTTP/1.0"
        if is_old and fd is not None and not server.marks_end(environ) and is_unix(fd):
            record.warn_once(
                log,
                "a stream that is cut looks finished to the client: the proxy speaks"
                " HTTP/1.0 over a Unix socket, where nothing marks a response's end and"
                " no reset is possible. Let the proxy speak HTTP/1.1 (nginx:"
                " proxy_http_version 1.1)",
                "unmarked",
            )
        threads, streams = self.threads, record.attached_streams
        if threads is not None and threads > 1 and streams >= threads:
            record.warn_once(
                log,
                f"streams occupy all {threads} threads (or greenlets) of this server"
                " process, so other requests wait: give it more threads (or greenlets),"
                " or set StreamMiddleware(app, reserve_threads=…)",
            )

    def warn_of_stop(self) -> None:
        """Log advice about finite work that leaves its server, once a process."""
        advise(self.server, self._given, "stop_warnings")

    @cached
    def server(self) -> Server:
        return safe(server_of(self.environ))

    @property
    def _given(self) -> WSGIEnvironment:
        """The environ with the server's own ``wsgi.input``."""
        environ, given = self.environ, self._input
        if environ.get("wsgi.input") is given:
            return environ
        return {**environ, "wsgi.input": given}

    def forget_request(self) -> None:
        """Let go of the request: its client has left the server, and stays known."""
        known = "is_event_source", "is_multiprocess", "label", "last_event_id"
        for name in (*known, "parses_events"):
            getattr(self, name)  # it is kept from now on
        self.leave_write()
        self.environ, self._input, self._begun = {}, None, None
        self._write, self._usable = None, None
        vars(self)["_socket"] = None

    @cached
    def label(self) -> str:
        """Method and path, for the log."""
        # The client chose it: keep escape sequences and endless lines out of the log.
        environ = self.environ
        method = ascii(environ.get("REQUEST_METHOD", ""))[1:-1]
        path = ascii(environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", ""))
        return f"{_short(method, 20)} {_short(path, 200)}"

    @cached
    def last_event_id(self) -> str | None:
        """The id after which the client wants to go on."""
        return last_event_id(self.environ)

    @cached
    def is_event_source(self) -> bool:
        """The client asks as a browser's EventSource does, and obeys an end id."""
        # The headers of an EventSource (exactly those of Chromium 156 and npm's
        # eventsource 5). httpx-sse, which would turn the end block into an event,
        # sends no-store.
        environ = self.environ
        return (
            environ.get("REQUEST_METHOD") == "GET"
            and names_event_stream(environ.get("HTTP_ACCEPT", ""))
            and environ.get("HTTP_CACHE_CONTROL", "").strip().lower() == "no-cache"
        )

    @cached
    def parses_events(self) -> bool:
        """The client reads an event stream line by line, as the standard does."""
        # SDKs generated by Stainless (OpenAI, Anthropic) parse lines with httpx-sse's
        # decoder, but accept application/json.
        environ = self.environ
        return "HTTP_X_STAINLESS_LANG" in environ or names_event_stream(
            environ.get("HTTP_ACCEPT", "")
        )

    @cached
    def is_multiprocess(self) -> bool:
        """The server has other processes that answer requests."""
        is_claimed = bool(self.environ.get("wsgi.multiprocess"))
        return is_claimed and not self.server.is_test

    @property
    def is_head(self) -> bool:
        return self.environ.get("REQUEST_METHOD") == "HEAD"

    def is_hung_up(self) -> bool:
        """Tell at once whether the client has gone; ``False`` where unknown."""
        fd = self.fd
        return fd is not None and is_hung_up(fd)

    def is_full(self) -> bool:
        """Tell at once whether the server or the kernel has bytes it cannot send."""
        fd = self.fd
        if fd is not None and not is_writable(fd):
            return True
        return self.unsent() > 0

    def unsent(self) -> int:
        """Return how many bytes the server itself keeps for the client."""
        return self.server.unsent(self._given)

    @property
    def shows_errors(self) -> bool:
        """What the source raises is to leave ``next()``: it goes to a test, or to a
        server of which we do not know better."""
        return not self.server.is_known

    @property
    def answers_errors(self) -> bool:
        """The server answers 500 for an `Exception` that leaves ``next()`` now,
        before any byte."""
        return self.server.answers_errors or self.hides_errors

    @property
    def logs_errors(self) -> bool:
        """The server logs an `Exception` that leaves ``next()`` before any byte."""
        return self.server.logs_errors and not self.hides_errors

    def answer(self, error: BaseException, status: int, body: bytes) -> bytes | None:
        """Begin the response anew, by another head, while no byte of it is out.

        Args:
            error: Why.
            status: What to answer instead, 400 to 599.
            body: What to send, of the response's own type; ``b""`` for plain text.

        Returns:
            The body to send, all of it; ``None`` if the response has to stay.
        """
        server, environ = self.server, self.environ
        start_response, headers = self._begun or find_head(server, self._given)
        # What encodes the body would encode the answer, too, which does not say so.
        is_encoded = "content-encoding" in [name.lower() for name, _ in headers]
        if start_response is None or is_encoded:
            return None
        if not server.forget_head(environ, self._write):
            return None
        line, headers, body = error_head(status, headers, body)
        self.is_answering = True
        try:
            exc_info: Any = (type(error), error, error.__traceback__)
            start_response(line, headers, exc_info)
        except SystemError:
            return body if server.raises_system_error else None
        except BaseException as raised:
            if raised is not error and not isinstance(raised, Exception):
                raise
            # start_response raises the error if a byte has been sent (PEP 3333), and
            # that of a middleware may accept no third argument.
            text = "%s: the stream is cut, as %s cannot be sent: %r"
            report(log, logging.DEBUG, text, self.label, line, raised)
            return None
        finally:
            self.is_answering, exc_info = False, None  # the traceback would be a cycle
        return body

    def note_head(
        self, start_response: StartResponse, headers: list[tuple[str, str]]
    ) -> None:
        """Remember how the response began, to begin again if no byte was sent."""
        self._begun = start_response, headers

    def note_write(self, write: Callable[[bytes], object]) -> None:
        """Remember the ``write`` of start_response, if it is the server's."""
        module = getattr(write, "__module__", None)
        if module and module == self.server.write_module:
            self._write = write

    def find_write(self) -> None:
        """Find the ``write`` for other threads, such as the one of keepalives.

        If a framework (Django) or a middleware (New Relic's) does not pass it on, it is
        found in the server's frames. It may be used only while the server has received
        all yielded bytes: a middleware above us may split bodies anew, and a comment
        would land in the middle of an event.
        """
        server = self.server
        if self._write is None:
            self._write = server.own_write(self._given)
            self._usable = _UNKNOWN
        write = self.write
        if write is None:
            return
        self._sent_before = server.sent(write)
        if self._sent_before is None and hasattr(write, "__self__"):
            self._counter, self._sent_before = Counter(write), 0
            self._usable = self._counter
        elif self._sent_before is None and not takes_directly(server.write_module):
            self._usable = None
            process().warn_once(
                log,
                "streams send no keepalive while their generators wait: a WSGI"
                f" middleware between them and {server.name} may hold back parts of"
                " events. Exempt streams from that middleware, use another server, or"
                " have the generators yield None now and then",
                "no write",
            )

    def leave_write(self) -> None:
        """Restore the server's own ``write``."""
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.close()

    def has_got(self, size: int) -> bool:
        """Return whether the server has received all ``size`` yielded bytes."""
        if self._write is None or self._sent_before is None:
            return True
        counter = self._counter
        sent = self.server.sent(self._write) if counter is None else counter.sent
        return sent is not None and sent - self._sent_before == size

    @property
    def write(self) -> Callable[[bytes], object] | None:
        """The server's own ``write``, if others than its thread may write by it, and
        what they write reaches the client as it is."""
        if self._usable is _UNKNOWN:
            # Once: it is first read when there is a head, which no longer changes.
            self._usable = self._unencoded()
        found: Callable[[bytes], object] | None = self._usable
        return found

    def _unencoded(self) -> Callable[[bytes], object] | None:
        """Return the server's ``write`` if nothing encodes what it writes."""
        write = self._write
        headers = self.server.headers(write) if write is not None else None
        if headers is None:
            return None
        # A middleware above us may compress, but pass the server's write through.
        encoded = any(name.lower() == "content-encoding" for name, _ in headers)
        return None if encoded else write

    @cached
    def server_key(self) -> Hashable:
        """What tells its server from others of this process."""
        # The server's own object, not SERVER_NAME: over a Unix socket, and behind
        # ProxyFix, that is the client's Host header. Weak: a key keeps no server
        # alive, and no later object at the same address equals it.
        key = self.server.key(self._given)
        return (self.server.name, None if key is None else weakref.ref(key))

    @property
    def may_vanish(self) -> bool:
        """The server may close its socket while the source runs."""
        return self.server.closes_early

    @property
    def stopping(self) -> Stopping | None:
        """Tells whether the server has been told to stop; ``None`` if unknown."""
        return self.server.stopping(self._given)

    @property
    def lets_exits_through(self) -> bool:
        """Whether an exit that the application raises in the main thread ends it."""
        return self.server.lets_exits_through

    @property
    def threads(self) -> int | None:
        """The number of requests that the server process serves at once."""
        threads: int | None = process().memo(
            ("threads", self.server_key), lambda: self.server.threads(self._given)
        )
        return threads

    def before_wait(self) -> None:
        """Give back what the application should not hold while the stream waits."""
        for give_back in self.environ.get(BEFORE_WAIT, ()):
            try:
                give_back()
            except Exception as error:  # no reason to end the stream
                # An error only once: every wait calls the hook again.
                level = logging.DEBUG if self._has_failed_hook else logging.ERROR
                self._has_failed_hook = True
                text = "%s: a before_wait hook failed: connections may stay occupied"
                report(log, level, text, self.label, error=error)

    @cached
    def _socket(self) -> SocketLike | None:
        return self.server.socket(self._given)

    @property
    def fd(self) -> int | None:
        """The socket's descriptor, ``None`` where the server hides it."""
        return None if self._socket is None else self._socket.fileno()

    @property
    def hooks(self) -> tuple[Callable[[], object], ...]:
        """What `before_wait` calls."""
        return tuple(self.environ.get(BEFORE_WAIT, ()))

    @property
    def _holds_thread(self) -> bool:
        """Whether a stream that stays occupies one of the server's few threads."""
        return gevent_hub() is None and self.threads is not None

    def swap(self) -> Swap | None:
        """Take the connection from its server; ``None`` where that cannot be.

        Raises:
            Full: It cannot be, and must not stay there either.
            ClientDisconnected: Nobody is there.
        """
        if self.environ.get(HANDOVER) is False:
            return None
        try:
            return Swap(self._given, self.server)
        except Refused as error:
            text = "%s stays with its server: %s"
            report(log, logging.DEBUG, text, self.label, error)
            if error.is_gone:
                raise ClientDisconnected(str(error)) from error
            if error.is_full:
                # The server needs the rest: without it, gunicorn's accept fails.
                process().warn_once(
                    log,
                    f"a stream was refused: {error}. Each client needs a file"
                    " descriptor: raise the hard limit (ulimit -Hn; systemd:"
                    " LimitNOFILE=; Docker: --ulimit nofile=), or limit the streams"
                    " with StreamMiddleware(app, max_streams=…)",
                    "descriptors",
                )
                raise Full(str(error)) from error
            if error.is_choice and self._holds_thread:
                # A few such clients would occupy all threads of the server.
                process().warn_once(
                    log,
                    "a stream was refused, as it would have kept one of the server's"
                    f" few threads: {error}",
                    "choice",
                )
                raise Full(str(error)) from error
            if self.threads == 1 and process().parked_streams:
                # The stream would block the whole worker. gunicorn's --timeout would
                # then kill it, with all its parked connections.
                process().warn_once(
                    log,
                    "a stream was refused, as it would have blocked the only thread of"
                    f" this server process, which has handed streams over: {error}",
                    "one thread",
                )
                raise Full(f"the server has one thread, and {error}") from error
            return None

    def drop(self) -> None:
        """Hang up, so that a write which waits for the client fails; any thread's."""
        fd = self.fd
        if fd is not None and fd >= 0:
            # As soon as its write fails, the server may close its own descriptor.
            try:
                fd = os.dup(fd)
            except OSError:  # closed already, or there are too many
                hang_up(fd)
            else:
                self._cut(fd)
                release(fd)
            self.server.drop(self._given)

    def cut(self) -> BaseException | None:
        """Let the client see that the response is incomplete.

        If the server marks the end of a response (chunked), the connection is shut down
        without the mark, after the bytes sent so far. Elsewhere (HTTP/1.0, uWSGI) only
        a reset shows it.
        """
        fd = self.fd
        if fd is None:
            return connection_reset()
        if fd >= 0:
            self._cut(fd)
        return self.server.raises()

    def _cut(self, fd: int) -> None:
        server = self.server
        is_visible = server.marks_end(self.environ) or server.is_tls(self._given)
        if not is_visible:
            is_visible = reset(fd)
        hang_up(fd)
        if not is_visible:
            text = (
                "%s was cut, but the client takes it for finished: no reset is possible"
            )
            # Not `report`: this may be the thread of the watch.
            say(log, logging.WARNING, text, self.label)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
