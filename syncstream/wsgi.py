"""All of PEP 3333: connections, the response classes, the middleware.

Spec: https://peps.python.org/pep-3333/. A response of ours under the middleware is
one stream: the middleware leaves a `Connection` in the environ, the response marks
it as taken.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import random
import re
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs
from wsgiref.util import is_hop_by_hop

from werkzeug.datastructures import Headers
from werkzeug.http import HTTP_STATUS_CODES
from werkzeug.wrappers import Response

from .capacity import Capacity, Full, Place
from .errors import ClientDisconnected
from .journal import report
from .process import Stopping, process
from .protocol import ndjson, raw, sse
from .protocol.json import Dumps
from .servers import (
    Counter,
    Server,
    SocketLike,
    connection_reset,
    server_of,
    takes_directly,
)
from .servers.handover import Refused, Swap
from .sockets import hang_up, is_hung_up, is_unix, is_writable, release, reset
from .stream import (
    Format,
    Life,
    Stream,
    check_handover,
    warn_framed,
    warn_unframed,
)
from .waiting import hub, say

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = [
    "Connection",
    "NDJSONResponse",
    "SSEResponse",
    "StreamMiddleware",
    "StreamResponse",
    "last_event_id",
]

log = logging.getLogger(__name__)

CONNECTION = "syncstream.connection"
"""The environ key of the connection: a weak reference to it."""

BEFORE_WAIT = "syncstream.before_wait"
"""The environ key of callables that give back, before a stream begins and whenever
it waits, what should not be held so long: a list of them."""

HANDOVER = "syncstream.handover"
"""The environ key that is ``False`` where a connection must stay with its server."""

# The connection of the request that a middleware has its application answer here.
_answering: ContextVar[Callable[[], Any] | None] = ContextVar(
    "syncstream_answering", default=None
)

_LIVE = {
    # no-transform keeps proxies from compressing, and so from buffering; nginx
    # wants to be told by a header of its own.
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}
_EVENT_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", **_LIVE}
_NDJSON_HEADERS = {"Content-Type": "application/x-ndjson", **_LIVE}

_EVENT_TYPE = "text/event-stream"
_NDJSON_TYPES = frozenset(
    f"application/{name}" for name in ("x-ndjson", "ndjson", "jsonl", "x-jsonlines")
)

_REFUSED = re.compile(r"q\s*=\s*0(?:\.0*)?")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROLS = re.compile(r"[\r\n\0]")
_DESCRIBES_BODY = re.compile(
    r"(content-.*|x-accel-.*|etag|last-modified|expires|cache-control|accept-ranges)$",
    re.I,
)

HeaderSource = (
    Mapping[str, "str | int | None"] | Iterable[tuple[str, "str | int | None"]]
)
"""Header names and values; the value ``None`` removes a default."""


def last_event_id(request: Any) -> str | None:
    """Return the id of the last event that a client has, ``None`` if it says none.

    The header Last-Event-ID comes first, then the query's ``last_event_id`` and
    ``lastEventId``, for clients that cannot set headers. An empty one says none, as
    a first connection does: the next is looked at. It comes from outside: expect any
    text.

    Args:
        request: The request, of Flask, Django, Bottle, Pyramid or Falcon, or its WSGI
            environ.

    Raises:
        TypeError: It is neither.
    """
    environ = _environ_of(request)
    header: str = environ.get("HTTP_LAST_EVENT_ID", "")
    if header and not header.isspace():
        # Browsers send UTF-8, and PEP 3333 shows its bytes as Latin-1.
        return header.encode("latin-1", "replace").decode(errors="replace")
    text: str = environ.get("QUERY_STRING", "")
    if "last_event_id=" not in text and "lastEventId=" not in text:
        return None
    try:
        query = parse_qs(text, errors="replace")  # of no empty values
    except ValueError:  # too many fields
        return None
    for name in ("last_event_id", "lastEventId"):
        for id in query.get(name, ()):
            if not id.isspace():  # as in the header, whose blanks HTTP strips
                return id
    return None


def _environ_of(request: Any) -> Mapping[str, Any]:
    """Return a request's environ; Django has it in META, Falcon in env."""
    if isinstance(request, Mapping):
        return request
    for name in ("environ", "META", "env"):
        environ = getattr(request, name, None)
        if isinstance(environ, Mapping):
            return environ
    raise TypeError(f"request must be a request or a WSGI environ, got {request!r}")


class Connection:
    """The request's connection, and what its server lets us do with it.

    Attributes:
        stream: The stream that is written to it, ``None`` before and after.
    """

    def __init__(self, environ: WSGIEnvironment) -> None:
        self.environ = environ
        # As the server has made it, if this is early enough: the socket is found by
        # it, and Bottle's request.params puts another one into its place.
        self._input = environ.get("wsgi.input")
        # Weak references, here and in the environ: no cycle keeps either alive.
        self._stream: weakref.ref[Stream] | None = None
        self._write: Callable[[bytes], object] | None = None
        self._is_encoded = False  # by the application, who has its reasons
        self._sent_before: int | None = None  # of the body, before the stream
        self._counter: Counter | None = None
        self._begun: tuple[StartResponse, list[tuple[str, str]]] | None = None
        self.is_answering = False  # start_response is called again, for an error
        self.hides_errors = False  # a framework answers errors, and logs none
        self._has_failed_hook = False
        self._made: list[Callable[[], Any]] = []

    @classmethod
    def of(cls, environ: WSGIEnvironment) -> Connection:
        """Return the connection of a request; the same again while it is held."""
        reference = environ.get(CONNECTION)
        connection = reference() if reference is not None else None
        if not isinstance(connection, cls):
            connection = cls(environ)
            environ[CONNECTION] = weakref.ref(connection)
        return connection

    @property
    def stream(self) -> Stream | None:
        stream = self._stream() if self._stream is not None else None
        return None if stream is None or stream.reason is not None else stream

    def take(
        self,
        stream: Stream,
        headers: Iterable[tuple[str, str]] = (),
        written: bytes = b"",
    ) -> None:
        """Say which stream is written to it, under which response headers."""
        self._stream = weakref.ref(stream)
        encoded = any(name.lower() == "content-encoding" for name, _ in headers)
        self._is_encoded = encoded
        stream.connect(self, is_encoded=encoded, written=written)

    def made(self, stream: Stream) -> None:
        """Note a stream that has been made for a response to this request, perhaps."""
        self._made.append(stream.reference)

    def find_made(self, format: Format) -> Stream | None:
        """Return the last such stream of a format, if it still waits to be sent.

        Its response is not what the application answers by, so its chunks are on
        their way in another one, as that of a middleware which changes bodies.
        """
        for reference in reversed(self._made):
            stream: Stream | None = reference()
            if stream is not None and stream.is_new(is_events=format.is_events):
                return stream
        return None

    def warn(self) -> None:
        """Say, once a process, what an operator should change: a stream stays here."""
        record, server, environ = process(), self.server, self._given
        write = self._write
        if write is not None and not self._is_encoded:
            head = server.headers(write) or ()
            if any(name.lower() == "content-encoding" for name, _ in head):
                _warn_of_compression()
        # Not by what the client has sent, nor is one of HTTP/2's that of HTTP/1's.
        is_http_2 = str(environ.get("SERVER_PROTOCOL")).startswith("HTTP/2")
        key = ("warning", server.name, is_http_2)
        warnings = record.memo(key, lambda: tuple(server.warnings(environ)))
        for warning in warnings:
            record.warn_once(log, warning)
        # Frameworks' test clients name no server.
        software = environ.get("SERVER_SOFTWARE")
        if self.fd is None and software and not warnings and not server.is_test:
            record.warn_once(
                log,
                f"{_short(ascii(software)[1:-1], 60)} shows no socket: a stream is not"
                " told when its client leaves, until it yields, and has no keepalive"
                " while its generator waits. Prefer one of the servers in the README",
                "no socket",
            )
        fd, is_old = self.fd, environ.get("SERVER_PROTOCOL") == "HTTP/1.0"
        if is_old and fd is not None and not server.marks_end(environ) and is_unix(fd):
            record.warn_once(
                log,
                "a stream that is cut looks finished to a client of HTTP/1.0 over a"
                " Unix socket, where nothing marks an end and no reset can be had: let"
                " the proxy speak HTTP/1.1 (nginx: proxy_http_version 1.1)",
                "unmarked",
            )
        threads, streams = self.threads, record.attached_streams
        if threads is not None and threads > 1 and streams >= threads:
            record.warn_once(
                log,
                f"streams hold all of the {threads} requests that this server process"
                " serves at once, the others wait: give it more threads (or greenlets),"
                " or set StreamMiddleware(app, reserve_threads=…)",
            )

    @functools.cached_property
    def server(self) -> Server:
        return server_of(self.environ)

    @property
    def _given(self) -> WSGIEnvironment:
        """The environ, as far as the server is found by it, as it was at first."""
        environ, given = self.environ, self._input
        if environ.get("wsgi.input") is given:
            return environ
        return {**environ, "wsgi.input": given}

    @property
    def label(self) -> str:
        # From outside: no escape sequence and no endless line gets into the log.
        environ = self.environ
        method = ascii(environ.get("REQUEST_METHOD", ""))[1:-1]
        path = ascii(environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", ""))
        return f"{_short(method, 20)} {_short(path, 200)}"

    @functools.cached_property
    def last_event_id(self) -> str | None:
        return last_event_id(self.environ)

    @functools.cached_property
    def is_event_source(self) -> bool:
        # What the standard's EventSource sends (Chromium 156 and npm's eventsource
        # 5 do, exactly). httpx-sse would make an event of the end block: it sends
        # no-store.
        environ = self.environ
        return (
            environ.get("REQUEST_METHOD") == "GET"
            and _names_event_stream(environ.get("HTTP_ACCEPT", ""))
            and environ.get("HTTP_CACHE_CONTROL", "").strip().lower() == "no-cache"
        )

    @functools.cached_property
    def parses_events(self) -> bool:
        # The SDKs of OpenAI, Anthropic and others that are made by Stainless read by
        # lines, with the decoder of httpx-sse, and ask for application/json.
        environ = self.environ
        return "HTTP_X_STAINLESS_LANG" in environ or _names_event_stream(
            environ.get("HTTP_ACCEPT", "")
        )

    @property
    def is_multiprocess(self) -> bool:
        is_claimed = bool(self.environ.get("wsgi.multiprocess"))
        return is_claimed and not self.server.is_test

    @property
    def is_head(self) -> bool:
        return self.environ.get("REQUEST_METHOD") == "HEAD"

    def is_hung_up(self) -> bool:
        fd = self.fd
        return fd is not None and is_hung_up(fd)

    def is_full(self) -> bool:
        fd = self.fd
        if fd is not None and not is_writable(fd):
            return True
        return self.unsent() > 0

    def unsent(self) -> int:
        return self.server.unsent(self._given)

    @property
    def shows_errors(self) -> bool:
        return not self.server.is_known

    @property
    def answers_errors(self) -> bool:
        return self.server.answers_errors or self.hides_errors

    @property
    def logs_errors(self) -> bool:
        return self.server.logs_errors and not self.hides_errors

    def answer(self, error: BaseException, status: int, body: bytes) -> bytes | None:
        server, environ = self.server, self.environ
        start_response, headers = self._begun or (server.start_response(environ), [])
        if start_response is None or not server.forget_head(environ, self._write):
            return None
        line = f"{status} {HTTP_STATUS_CODES.get(status, 'Error')}"
        kinds = [value for name, value in headers if name.lower() == "content-type"]
        if not (body and kinds):
            body, kinds = f"{line}\n".encode(), ["text/plain; charset=utf-8"]
        headers = [pair for pair in headers if not _DESCRIBES_BODY.match(pair[0])]
        headers += [
            ("Content-Type", kinds[0]),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
        ]
        self.is_answering = True
        try:
            exc_info: Any = (type(error), error, error.__traceback__)
            start_response(line, headers, exc_info)
        except SystemError:
            # uWSGI 2.0.30 does as it is told, and leaves the error set in which it
            # was told so.
            return body if server.name == "uwsgi" else None
        except BaseException as raised:
            if raised is not error and not isinstance(raised, Exception):
                raise
            # It raises the error if a byte is out (PEP 3333), and a middleware's may
            # take no third argument.
            text = "%s is cut, not answered by %s: %r"
            report(log, logging.DEBUG, text, self.label, line, raised)
            return None
        finally:
            self.is_answering, exc_info = False, None  # no cycle by its traceback
        return body

    def begun(
        self, start_response: StartResponse, headers: list[tuple[str, str]]
    ) -> None:
        """Note by what the response began, and may begin anew until a byte is out."""
        self._begun = start_response, headers

    def started(self, write: Callable[[bytes], object]) -> None:
        """Take what the server's, or a middleware's, start_response has returned."""
        module = getattr(write, "__module__", None)
        if module and module == self.server.write_module:
            self._write = write

    def find_write(self) -> None:
        """See what may be written by others than the request's thread, and whether.

        What a framework (Django) or a middleware (New Relic's) does not pass on is
        found in the server's own frames. In any case it is of use only while the
        server has got all that we have yielded: a middleware above us may put bodies
        into other blocks, and a comment would get into the middle of an event.
        """
        server = self.server
        if self._write is None:
            self._write = server.own_write(self._given)
            vars(self).pop("write", None)
        write = self.write
        if write is None:
            return
        self._sent_before = server.sent(write)
        if self._sent_before is None and hasattr(write, "__self__"):
            self._counter, self._sent_before = Counter(write), 0
            vars(self)["write"] = self._counter
        elif self._sent_before is None and not takes_directly(server.write_module):
            vars(self)["write"] = None
            process().warn_once(
                log,
                "streams have no keepalive while their generators wait: a WSGI"
                f" middleware stands between them and {server.name}, and may hold back"
                " parts of events. Leave it out where streams are, use another server,"
                " or have the generators yield None now and then",
                "no write",
            )

    def leave_write(self) -> None:
        """Leave the server's write as it was."""
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.close()

    def has_got(self, size: int) -> bool:
        """Tell whether the server has got all of so many bytes that were yielded."""
        if self._write is None or self._sent_before is None:
            return True
        counter = self._counter
        sent = self.server.sent(self._write) if counter is None else counter.sent
        return sent is not None and sent - self._sent_before == size

    @functools.cached_property
    def write(self) -> Callable[[bytes], object] | None:
        # Asked when there is a head: it stays what it is.
        write = self._write
        headers = self.server.headers(write) if write is not None else None
        if headers is None:
            return None
        # A middleware above us may compress, and pass the server's write through.
        encoded = any(name.lower() == "content-encoding" for name, _ in headers)
        return None if encoded else write

    @functools.cached_property
    def server_key(self) -> Hashable:
        # By the server's own object, not by SERVER_NAME: over a Unix socket, and
        # behind ProxyFix, that is the client's Host. Weak: nobody is kept by a key,
        # and no other object at the same address is taken for it.
        key = self.server.key(self._given)
        return (self.server.name, None if key is None else weakref.ref(key))

    @property
    def may_vanish(self) -> bool:
        return self.server.closes_early

    @property
    def stopping(self) -> Stopping | None:
        return self.server.stopping(self._given)

    @property
    def lets_exits_through(self) -> bool:
        return self.server.lets_exits_through

    @property
    def threads(self) -> int | None:
        """How many requests the server process serves at once."""
        threads: int | None = process().memo(
            ("threads", self.server_key), lambda: self.server.threads(self._given)
        )
        return threads

    def before_wait(self) -> None:
        for give_back in self.environ.get(BEFORE_WAIT, ()):
            try:
                give_back()
            except Exception as error:  # no reason to end what waits
                # Once: each of its waits calls it again.
                level = logging.DEBUG if self._has_failed_hook else logging.ERROR
                self._has_failed_hook = True
                text = "what gives back before a wait of %s failed"
                report(log, level, text, self.label, error=error)

    @functools.cached_property
    def _socket(self) -> SocketLike | None:
        return self.server.socket(self._given)

    @property
    def fd(self) -> int | None:
        return None if self._socket is None else self._socket.fileno()

    @property
    def hooks(self) -> tuple[Callable[[], object], ...]:
        return tuple(self.environ.get(BEFORE_WAIT, ()))

    @property
    def _holds_thread(self) -> bool:
        """A stream that stays with its server holds one of a few threads there."""
        return hub() is None and self.threads is not None

    def swap(self) -> Swap | None:
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
                # What is left the server needs: without it gunicorn's accept fails.
                process().warn_once(
                    log,
                    f"a stream was refused: {error}. Each client needs one: raise the"
                    " hard limit (ulimit -Hn; LimitNOFILE= of systemd, --ulimit nofile="
                    " of Docker), or limit the streams by StreamMiddleware",
                    "descriptors",
                )
                raise Full(str(error)) from error
            if error.is_choice and self._holds_thread:
                # A few such clients would stop the server for everybody.
                process().warn_once(
                    log,
                    "a stream was refused: it would have held one of the server's few"
                    f" threads, for {error}",
                    "choice",
                )
                raise Full(str(error)) from error
            if self.threads == 1 and process().parked_streams:
                # It would hold up the whole worker, which gunicorn's --timeout then
                # kills, with all whose connections it has.
                raise Full(f"the server has one thread, and {error}") from error
            return None

    def drop(self) -> None:
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
        """Let the client see that the response is not whole.

        Where the end would be marked, the mark must not come: the connection is
        shut down, after what was sent. Elsewhere (HTTP/1.0, uWSGI) only a reset
        can tell.
        """
        fd = self.fd
        if fd is None:
            return connection_reset()
        if fd >= 0:
            self._cut(fd)
        return self.server.raises()

    def _cut(self, fd: int) -> None:
        server = self.server
        is_hidden = (
            not server.marks_end(self.environ)
            and not server.is_tls(self._given)
            and not reset(fd)
        )
        hang_up(fd)
        if is_hidden:
            text = "%s cannot be reset: the client sees an end"
            say(log, logging.WARNING, text, self.label)  # the watch may be here


def _warn_of_compression() -> None:
    process().warn_once(
        log,
        "streams are compressed on their way to the server, which holds back what they"
        " send, maybe to their end: leave streams out of that (COMPRESS_STREAMS = False"
        " of Flask-Compress), and let the proxy compress",
        "compressed",
    )


def _names_event_stream(accept: str) -> bool:
    """Tell whether an Accept header asks for event streams by name (RFC 9110 §12.5.1).

    ``*/*`` and ``text/*`` are what curl, fetch and requests send, whatever they do with
    what comes; ``q=0`` is a refusal.
    """
    accept = accept.lower()
    if _EVENT_TYPE not in accept:
        return False
    for item in accept.split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        if name == _EVENT_TYPE:
            return not any(_REFUSED.fullmatch(each) for each in parameters)
    return False


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


BODILESS = frozenset((204, 205, 304))


def has_body(connection: Connection, status: int) -> bool:
    """Tell whether a response has a body (RFC 9110 §6.4.1)."""
    return not (connection.is_head or status < 200 or status in BODILESS)


def merge_headers(
    defaults: Mapping[str, str], given: HeaderSource | None
) -> list[tuple[str, str]]:
    """Return the defaults with the given headers over them.

    Hop-by-hop headers are the server's own (PEP 3333): on wsgiref, waitress and
    Django's runserver one of them is a 500. They are left out.
    """
    pairs: list[tuple[str, str | int | None]] = []
    if given is not None:
        # Werkzeug's Headers are a multidict: items() repeats a name.
        items = given.items() if hasattr(given, "items") else given
        pairs = [_checked_header(item) for item in items]
    names = {name.lower() for name, _ in pairs}
    merged = [(n, v) for n, v in defaults.items() if n.lower() not in names]
    merged += [(name, str(value)) for name, value in pairs if value is not None]
    return without_hop_by_hop(merged)


def _checked_header(item: Any) -> tuple[str, str | int | None]:
    """Return a header that can be sent (RFC 9110 §5), or say why it cannot."""
    if not isinstance(item, tuple) or len(item) != 2:
        raise TypeError(
            f"headers must be a mapping or pairs of name and value, got {item!r}"
        )
    name, value = item
    if not isinstance(name, str) or not _TOKEN.fullmatch(name):
        raise ValueError(f"headers must have tokens for names, got {name!r}")
    if value is not None and not isinstance(value, (str, int)):
        raise TypeError(f"headers must have str, int or None for values, got {item!r}")
    if isinstance(value, str) and _CONTROLS.search(value):
        raise ValueError(f"headers must not contain CR, LF or NUL, got {item!r}")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("latin-1")
        except UnicodeEncodeError:
            raise ValueError(
                f"headers must have Latin-1 for values (PEP 3333), got {item!r}"
            ) from None
    return name, value


def without_hop_by_hop(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if not is_hop_by_hop(name)]


def _ends_line(tail: bytes) -> bool:
    return tail[-1:] in (b"", b"\n")


# What Django, and the middlewares that come with it, look at in a response.
_OF_DJANGO = frozenset(
    [
        "_resource_closers",
        "cookies",
        "get",
        "has_header",
        "items",
        "reason_phrase",
        "setdefault",
        "streaming",
    ]
)


def _not_for_django(response: object) -> str:
    name = type(response).__name__
    return (
        f"Django does not take syncstream.{name}: in a Django view"
        f" use the one of syncstream.django (from syncstream.django import {name})"
    )


def _session_watch() -> Callable[[], None] | None:
    """Return what says, when a generator has ended, that it wrote to Flask's session.

    That is saved before the head is sent, when the generator has not begun. In the
    request's context; ``None`` elsewhere.
    """
    flask: Any = sys.modules.get("flask")
    if flask is None or not flask.has_request_context():
        return None
    session = flask.session._get_current_object()
    if not isinstance(session, dict):
        return None
    before, was_modified = dict(session), getattr(session, "modified", False)

    def look() -> None:
        is_same = session.keys() == before.keys() and all(
            session[key] is value for key, value in before.items()
        )
        if not is_same or getattr(session, "modified", False) != was_modified:
            process().warn_once(
                log,
                "what a stream's generator writes to flask.session is lost: the session"
                " has been saved, and its cookie sent, before the generator starts."
                " Write to it in the view, and give the generator what it needs",
                "session",
            )

    return look


@functools.cache
def _joined(ours: Any, theirs: Any) -> Any:
    return type(ours.__name__, (ours, theirs), {})


class _Streaming(Response):
    """A Werkzeug response whose body is a `Stream`."""

    # Would run an endless source to its end. (So would get_data(), but by
    # make_sequence(), which says so.)
    automatically_set_content_length = False

    # Comments and last words are not in anybody's count.
    _may_have_length = False

    def __init__(
        self,
        stream: Stream,
        defaults: Mapping[str, str],
        status: int | str,
        headers: HeaderSource | None,
    ) -> None:
        self._stream = stream
        reference = _answering.get()
        if reference is not None and (connection := reference()) is not None:
            connection.made(stream)
        merged = merge_headers(defaults, headers)
        if not isinstance(status, (int, str)) or isinstance(status, bool):
            raise TypeError(f"status must be int or str, got {status!r}")
        super().__init__(response=stream, status=status, headers=Headers(merged))
        if not 200 <= self.status_code <= 599 or _CONTROLS.search(self.status):
            raise ValueError(
                f"status must be one of HTTP's, 200 to 599, got {status!r}"
            )
        if "content-type" not in {name.lower() for name, _ in merged}:
            del self.headers["Content-Type"]  # Werkzeug's default, not ours

    def __getattr__(self, name: str) -> Any:
        if name in _OF_DJANGO:
            raise AttributeError(_not_for_django(self), name=name, obj=self)
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=self)

    def __contains__(self, header: object) -> bool:
        raise TypeError(_not_for_django(self))

    # Not __getitem__, which would make it look like a sequence.
    def __setitem__(self, header: str, value: object) -> None:
        raise TypeError(_not_for_django(self))

    def __setattr__(self, name: str, value: Any) -> None:
        # Werkzeug's force_type, and so Flask's make_response, gives a foreign
        # response the application's class. It becomes one of both.
        if name == "__class__" and not issubclass(value, _Streaming):
            ours: Any = type(self)
            value = _joined(ours, value)
        super().__setattr__(name, value)

    def make_sequence(self) -> None:
        """Refuse to read a stream to its end, which may never come.

        Raises:
            RuntimeError: It is a stream still, no plain data that a hook has set.
        """
        if not self.is_sequence:
            raise RuntimeError(
                f"{type(self).__name__} is a stream, which may not end: its data cannot"
                " be had before it is sent. Hooks, caches and ETags that read"
                " response.data must leave out responses with is_streamed; a test reads"
                ' a stream that ends by a test client: client.get("/events").data'
            )

    def freeze(self) -> None:
        """Do as `make_sequence`, and then as Werkzeug's."""
        self.make_sequence()
        super().freeze()

    def call_on_close(self, func: Callable[[], Any]) -> Callable[[], Any]:
        """Call a function, once, when the response has ended and is closed."""
        self._stream.on_response_close(func)
        return func

    def close(self) -> None:
        """Close the source, once, and run what `call_on_close` was given."""
        try:
            if self.response is not self._stream and hasattr(self.response, "close"):
                self.response.close()
        finally:
            self._stream.close()

    def get_wsgi_headers(self, environ: WSGIEnvironment) -> Headers:
        headers = super().get_wsgi_headers(environ)
        for name in {name for name, _ in headers if is_hop_by_hop(name)}:
            del headers[name]
        if self.status_code == 204:
            del headers["Content-Type"]
        if self.response is self._stream and not self._may_have_length:
            del headers["Content-Length"]
        return headers

    def get_wsgi_response(
        self, environ: WSGIEnvironment
    ) -> tuple[Iterable[bytes], str, list[tuple[str, str]]]:
        """Return what a server needs for this request: body, status line, headers.

        The body goes to the connection of that request, and may be taken once.
        """
        connection = Connection.of(environ)
        self._connection = connection  # an environ holds it weakly
        if self._stream.is_over_for(connection):
            self.status_code = 204
        app_iter, status, headers = super().get_wsgi_response(environ)
        if not has_body(connection, self.status_code):
            self._stream.close()
        elif not self.is_sequence:  # a hook may have set plain data instead
            connection.take(self._stream, headers)
            if self.response is self._stream:
                app_iter = self._stream
            elif "content-encoding" in {name.lower() for name, _ in headers}:
                _warn_of_compression()
        return app_iter, status, headers

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Answer a request: this is a WSGI application."""
        app_iter, status, headers = self.get_wsgi_response(environ)
        try:
            write = start_response(status, headers)
        except BaseException:  # a header that it refuses, say: nobody will close it
            self.close()
            raise
        self._connection.started(write)
        self._connection.begun(start_response, headers)
        if not self._stream.will_leave and (look := _session_watch()) is not None:
            self._stream.on_close(look)
        return app_iter


class SSEResponse(_Streaming):
    """An event stream: each item that the source yields leaves as one event.

    It is a Werkzeug and Flask response, and by itself a WSGI application. A comment
    (and ``retry``) leaves at once, before the source has yielded anything.

    Args:
        source: A generator or another iterable of events, or a `Subscription`. For
            what it may yield see `syncstream.protocol.sse.encoder`. It runs in the
            thread or greenlet of the request, and is closed exactly once, there,
            when it ends, fails, or the client has left. For HEAD, and for a
            status without a body, it is closed without having run.
        status: The HTTP status.
        headers: Headers on top of the defaults (``Content-Type:
            text/event-stream; charset=utf-8``, ``Cache-Control: no-cache,
            no-transform``, ``X-Accel-Buffering: no``). Yours win; ``None`` removes
            a default. Hop-by-hop headers are left to the server.
        keepalive: After so many seconds of silence a comment is sent, which clients
            skip and proxies count. ``None`` for none. Also while the source is busy
            or waits, but not on uWSGI: there it is sent when the source yields
            ``None``.
        retry: The client's reconnection time, whole milliseconds; ``None`` leaves
            it to the client (Chromium 3 s, Firefox 5 s). It goes to EventSources
            alone: other clients make an event of it, see docs/clients.md.
        send_timeout: A client that takes nothing for so many seconds, though there
            is something for it, is dropped; also one that is gone without a word.
            ``None``: the system decides (some 15 minutes, or never).
        max_duration: The stream ends after so many seconds (up to a tenth less, by
            chance), and the client comes back. ``None``: never.
        drain: How many seconds a generator goes on after the server was told to stop;
            then its response is cut, or, for an EventSource, ended. ``None``: not at
            all for an EventSource, which comes back; for all others as long as the
            server lets it (gunicorn's graceful timeout less 2.5 s; the variable
            ``SYNCSTREAM_DRAIN`` of the environment says otherwise). ``0``: not at all.
            A `Subscription` ends at once.
        end: What a browser does when the source has finished. ``"stop"``: it stays
            away (it gets the reserved id ``syncstream-end``, returns once with
            that, and gets 204; the view has run once more, its source has not).
            ``"reconnect"``: it comes back and the view runs again. ``None``: "stop",
            but for a `Subscription` "reconnect".
        handover: A `Subscription` needs no thread: where the server lets us, its
            connection goes on without the request, which ends ("auto"). ``False``
            keeps it in the request's thread or greenlet. See docs/handover.md.
        on_error: Called with the exception when the source has failed (an
            ``Exception``, not ``SystemExit`` and its kin); what it returns is
            encoded and sent as the last event, and the response ends in order behind
            it: that event is the sign. ``None`` sends nothing. Without it the client
            learns no more than that the stream broke.
        dumps: Encodes what is sent as JSON, into ``str`` or ``bytes``. The default
            is compact, and orjson with the ``fast`` extra.

    Raises:
        TypeError: ``source`` cannot be iterated, or is asynchronous.
        ValueError: ``retry`` is negative, ``end`` is neither of the two, a number
            of seconds is not above 0.
    """

    def __init__(
        self,
        source: Iterable[Any],
        status: int | str = 200,
        headers: HeaderSource | None = None,
        *,
        keepalive: float | None = 15.0,
        retry: int | None = None,
        send_timeout: float | None = 30.0,
        max_duration: float | None = None,
        drain: float | None = None,
        end: str | None = None,
        handover: str | bool = "auto",
        on_error: Callable[[Exception], Any] | None = None,
        dumps: Dumps | None = None,
    ) -> None:
        encode = sse.encoder(dumps, warn_unframed, warn_framed)
        format = Format(encode, sse.ends_blank, is_events=True)
        life = Life(keepalive, send_timeout, max_duration, drain)
        stream = Stream(
            source,
            format,
            life=life,
            retry=retry,
            end=end,
            handover=handover,
            on_error=on_error,
        )
        super().__init__(stream, _EVENT_HEADERS, status, headers)


class NDJSONResponse(_Streaming):
    """A stream of JSON values (``application/x-ndjson``), one compact one a line.

    Each line leaves at once. NDJSON has no comments: the response's head leaves
    with the first line. A source that raises before it is answered with 500, or with
    the status of a framework's error (``abort(404)``).

    Args:
        source: A generator or another iterable of values. What becomes of them:
            `syncstream.protocol.ndjson.encoder`.
        status, headers: As for `SSEResponse`.
        send_timeout, max_duration, drain: As for `SSEResponse`. A response that is
            ended by one of them is cut: this client does not come back.
        on_error: Called with the exception when the source has failed; what it
            returns is sent as the last value, ``None`` sends nothing.
        dumps: Encodes a value into ``str`` or ``bytes`` without line ends.

    Raises:
        TypeError: ``source`` cannot be iterated, or is asynchronous.
    """

    def __init__(
        self,
        source: Iterable[Any],
        status: int | str = 200,
        headers: HeaderSource | None = None,
        *,
        send_timeout: float | None = 30.0,
        max_duration: float | None = None,
        drain: float | None = None,
        on_error: Callable[[Exception], Any] | None = None,
        dumps: Dumps | None = None,
    ) -> None:
        format = Format(ndjson.encoder(dumps), _ends_line, dumps=dumps)
        life = Life(None, send_timeout, max_duration, drain)
        stream = Stream(source, format, life=life, on_error=on_error)
        super().__init__(stream, _NDJSON_HEADERS, status, headers)


class StreamResponse(_Streaming):
    """A stream of text or bytes; each chunk leaves at once.

    The response's head leaves with the first chunk. A source that raises before it is
    answered with 500, or with the status of a framework's error (``abort(404)``). One
    that fails later is cut: there are no last words in a format that is not ours. For a
    file behind nginx, whose buffering is of use there, remove the header
    ``X-Accel-Buffering``.

    Args:
        source: A generator or another iterable of ``str`` (sent as UTF-8), bytes,
            or ``None`` (a checkpoint: nothing is sent).
        status, headers: As for `SSEResponse`. Give a Content-Length where you know
            it, and clients can show the progress of a download.
        send_timeout, max_duration, drain: As for `NDJSONResponse`.
        content_type: The body's media type.

    Raises:
        TypeError: ``source`` cannot be iterated, or is asynchronous.
    """

    _may_have_length = True

    def __init__(
        self,
        source: Iterable[str | bytes | None],
        status: int | str = 200,
        headers: HeaderSource | None = None,
        *,
        send_timeout: float | None = 30.0,
        max_duration: float | None = None,
        drain: float | None = None,
        content_type: str = "text/plain; charset=utf-8",
    ) -> None:
        if not isinstance(content_type, str):
            raise TypeError(f"content_type must be str, got {content_type!r}")
        defaults = {"Content-Type": content_type, **_LIVE}
        life = Life(None, send_timeout, max_duration, drain)
        stream = Stream(source, Format(raw.encode, lambda tail: False), life=life)
        super().__init__(stream, defaults, status, headers)


class StreamMiddleware:
    """Give the streams of any WSGI application the life of ours.

    What is found to be a stream, by its Content-Type ``text/event-stream`` or one
    of NDJSON's, gets the headers, the first flush (event streams), the keepalive,
    the time-outs, closing and error handling of `SSEResponse`; its generator may
    use `current_stream` and `sleep`. Its chunks are passed through as they are, and
    it may end as it always did (clients reconnect). Responses with a
    Content-Length, ``wsgi.file_wrapper`` ones, and all others are left alone. (An
    application that calls start_response in its first step is known to be a stream
    after that step only: in it, `current_stream` is None.)

    With limits, a stream beyond them is refused: 503 with Retry-After, or, because a
    browser's EventSource gives up for good on that, an empty event stream that asks
    it to come back a little later. A refused view has run, its generator has not.

    Args:
        app: The WSGI application. Flask: ``app.wsgi_app =
            StreamMiddleware(app.wsgi_app)``; Django: ``application =
            StreamMiddleware(get_wsgi_application())``.
        keepalive, send_timeout, max_duration, drain: As for `SSEResponse`, for streams
            that are not responses of ours.
        max_streams: So many streams at once in this process, ours included;
            ``None`` for no limit.
        reserve_threads: So many of the server's threads are kept free of streams;
            ``None`` for none. (Werkzeug makes as many as it needs: no limit there.)
            A subscription that is to be handed over waits, for up to a second, while
            others are about to leave their threads.
        limit_by: Returns, for an environ, whose stream it is, say ``lambda environ:
            environ["REMOTE_ADDR"]``; ``None``: not counted for anybody, nor is an
            empty key, which is warned of. Behind a proxy REMOTE_ADDR is the proxy's,
            on a Unix socket nobody's: see docs/proxies.md.
        max_per_key: So many streams at once for each of these.
        handover: As for `SSEResponse`; ``False`` for all of the application.

    Raises:
        TypeError, ValueError: An argument is not what it should be.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        keepalive: float | None = 15.0,
        send_timeout: float | None = 30.0,
        max_duration: float | None = None,
        drain: float | None = None,
        max_streams: int | None = None,
        reserve_threads: int | None = None,
        limit_by: Callable[[WSGIEnvironment], Hashable] | None = None,
        max_per_key: int | None = None,
        handover: str | bool = "auto",
    ) -> None:
        if not callable(app):
            raise TypeError(f"app must be a WSGI application, got {app!r}")
        self.app = app
        self._life = Life(keepalive, send_timeout, max_duration, drain)
        self._capacity = Capacity(
            max_streams,
            reserve_threads,
            limit_by,
            max_per_key,
            lambda text: process().warn_once(log, text),
        )
        check_handover(handover)
        self._may_hand_over = bool(handover)

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        if CONNECTION in environ:  # installed twice
            return self.app(environ, start_response)
        connection = Connection.of(environ)
        if not self._may_hand_over:
            environ[HANDOVER] = False
        head = _Head(connection, start_response, self._life, self._capacity)
        token = _answering.set(weakref.ref(connection))
        try:
            app_iter = self.app(environ, head.start_response)
            if head.refusal is not None:
                return head.refuse(app_iter)
            if connection.stream is not None or _is_file(environ, app_iter):
                head.leave_place_to(connection.stream)
                return app_iter
            if not head.is_started:
                return _Lazy(app_iter, head)
            return app_iter if head.format is None else head.respond(app_iter)
        except BaseException:
            head.abandon()
            raise
        finally:
            _answering.reset(token)


def _is_file(environ: WSGIEnvironment, app_iter: object) -> bool:
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(wrapper, type) and isinstance(app_iter, wrapper)


class _Head:
    """The start_response that the middleware gives to its application."""

    def __init__(
        self,
        connection: Connection,
        start_response: StartResponse,
        life: Life,
        capacity: Capacity,
    ) -> None:
        self.connection = connection
        self.is_started = False
        self.is_late = False  # the application has been called, and has returned
        self.format: Format | None = None
        self.written = b""  # by the application or us, before there is a stream
        self.refusal: bytes | None = None  # the body of one
        self._start_response = start_response
        self._life = life
        self._capacity = capacity
        self._place: Place | None = None
        self._status = 0
        self._headers: list[tuple[str, str]] = []
        self._session_look: Callable[[], None] | None = None

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        if self.connection.is_answering:
            return self._call(status, headers, exc_info)
        self.release()  # called again, for an error
        before = self.is_started, self.refusal, self._status, self.format
        try:
            write = self._start(status, headers, exc_info)
        except BaseException:
            # A header that the server refuses, say. There is no stream, and the
            # application may answer something else.
            self.is_started, self.refusal, self._status, self.format = before
            self.release()
            raise
        # The head is out from here on, or the server's.
        if self.format is None or self.refusal is not None:
            return write
        if self.is_late and self.format.is_events and self.has_body:
            self._open()

        def noted(data: bytes) -> object:
            if data:
                self.written = sse.tail_after(self.written, data)
            return write(data)

        return noted

    def _start(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any
    ) -> Callable[[bytes], object]:
        self.is_started = True
        self.refusal = None  # called again, for an error of a refused application
        self._status = _code(status)
        ours = self.connection.stream
        self.format = _format_of(headers) if ours is None else None
        if self.format is not None and self.has_body:
            ours = self.connection.find_made(self.format)
            if ours is not None and ours.is_over_for(self.connection):
                ours.close()
                return self._stay_away(exc_info)
            if ours is not None:
                self.connection.take(ours, headers)
                self.format = None
        self._session_look = _session_watch() if self.format is not None else None
        if (ours is not None or self.format is not None) and self.has_body:
            environ, connection = self.connection.environ, self.connection
            self._place = self._capacity.admit(
                environ,
                lambda: connection.threads,
                leaves=ours is not None and ours.will_leave,
            )
            if self._place is None:
                return self._refuse(exc_info)
        if self.format is not None:
            self._headers = headers = merge_headers(_LIVE, headers)
        return self._call(status, headers, exc_info)

    def _call(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any
    ) -> Callable[[bytes], object]:
        # Some servers take no third argument unless there is one to give.
        if exc_info is None:
            write = self._start_response(status, headers)
            self.connection.begun(self._start_response, headers)
        else:
            write = self._start_response(status, headers, exc_info)
        self.connection.started(write)
        return write

    def _open(self) -> None:
        """Write the opening now: the application is in its first step already.

        Only through the server's own ``write``: what a middleware hands out may
        keep the bytes, or change them.
        """
        write = self.connection.write
        if write is not None:
            opening = sse.comment("ok", is_line=self.connection.parses_events)
            self.written = sse.tail_after(b"", opening)
            try:
                write(opening)
            except OSError as error:
                # The client has left: the stream will find that out for itself.
                report(log, logging.DEBUG, "%s: %s", self.connection.label, error)

    @property
    def has_body(self) -> bool:
        return has_body(self.connection, self._status)

    def respond(self, source: Iterable[bytes]) -> Iterable[bytes]:
        """Make the application's iterable the source of a stream."""
        assert self.format is not None
        stream = Stream(source, self.format, life=self._life)
        if not self.has_body:
            stream.close()
            return ()
        self.connection.take(stream, self._headers, self.written)
        self.leave_place_to(stream)
        if self._session_look is not None:
            stream.on_close(self._session_look)
        return stream

    def abandon(self) -> None:
        """Nothing is returned, so that nobody closes what the application began."""
        stream = self.connection.stream
        if stream is not None:
            stream.close()
        self.release()

    # A place among those that the capacity allows.

    def release(self) -> None:
        """Give the place back: there is no stream."""
        if self._place is not None:
            self._place.release()
            self._place = None

    def leave_place_to(self, stream: Stream | None) -> None:
        """Leave the place to a stream, until it ends."""
        if stream is not None and self._place is not None:
            stream.hold(self._place)
            self._place = None
        self.release()

    def _refuse(self, exc_info: Any) -> Callable[[bytes], object]:
        """Start the answer for a stream that there is no place for."""
        record = process()
        record.warn_once(log, "a stream was refused: all places are taken", "refused")
        report(log, logging.DEBUG, "%s was refused", self.connection.label)
        wait = random.uniform(2, 6)  # seconds, jittered: not all at once
        if self.connection.is_event_source:
            self.refusal = sse.Event(retry=round(wait * 1000)).encode()
            status, headers = "200 OK", [("Content-Type", _EVENT_TYPE)]
        else:
            self.refusal = b"too many streams, come back a little later\n"
            status = "503 Service Unavailable"
            headers = [
                ("Content-Type", "text/plain; charset=utf-8"),
                ("Retry-After", str(math.ceil(wait))),
            ]
        headers += [
            ("Cache-Control", "no-store"),
            ("Content-Length", str(len(self.refusal))),
        ]
        self._call(status, headers, exc_info)
        return lambda data: None

    def _stay_away(self, exc_info: Any) -> Callable[[bytes], object]:
        """Tell a browser, which has come back with the end id, to stay away."""
        self.refusal = b""
        self._call("204 No Content", [("Cache-Control", "no-store")], exc_info)
        return lambda data: None

    def refuse(self, app_iter: Iterable[bytes]) -> Iterable[bytes]:
        """Close what the application has returned; return the refusal instead."""
        assert self.refusal is not None
        stream = self.connection.stream
        if stream is not None:
            stream.refuse()
        elif self.refusal:
            process().count("refused")
        close = getattr(app_iter, "close", None)
        if close is not None:
            close()
        return [self.refusal] if self.refusal else []


def _code(status: Any) -> int:
    """Return a status line's code, 0 where there is none: the server judges that."""
    try:
        return int(status[:3])
    except (TypeError, ValueError):
        return 0


def _format_of(headers: Any) -> Format | None:
    """Return the format of an application's stream, ``None`` if it is not one."""
    try:
        values = {name.lower(): value + "" for name, value in headers}
    except (AttributeError, TypeError, ValueError):  # the server says what is wrong
        return None
    if "content-length" in values:
        return None
    mimetype = values.get("content-type", "").partition(";")[0].strip().lower()
    if mimetype == _EVENT_TYPE:
        return Format(sse.passer(warn_unframed), sse.ends_blank, is_events=True)
    if mimetype in _NDJSON_TYPES:
        return Format(raw.encode_bytes, _ends_line)
    return None


class _Lazy:
    """The iterable of an application that calls start_response in its first step.

    After that step it is known whether this is a stream; if so, what is left of
    the application, beginning with the step's outcome, becomes a stream's source.
    """

    def __init__(self, app_iter: Iterable[bytes], head: _Head) -> None:
        self._app_iter = app_iter
        self._head = head
        self._chunks: Iterator[bytes] | None = None
        self._stream: Iterable[bytes] | None = None
        head.is_late = True

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._chunks is None:
            self._chunks = self._first_step()
        return next(self._chunks)

    def _first_step(self) -> Iterator[bytes]:
        iterator = iter(self._app_iter)
        head = self._head
        try:
            first = next(iterator)
        except BaseException as error:
            if head.format is None and head.refusal is None:
                head.leave_place_to(head.connection.stream)
                raise
            rest = _Rest(self._app_iter, iterator, error=error)
        else:
            rest = _Rest(self._app_iter, iterator, first=first)
        if head.refusal is not None:
            self._app_iter = ()  # closed now
            return iter(head.refuse(rest))
        if head.format is None:
            head.leave_place_to(head.connection.stream)  # one of ours, or none
            return rest
        self._stream = head.respond(rest)
        return iter(self._stream)

    def close(self) -> None:
        self._head.release()  # a stream's is its own
        closable = self._app_iter if self._stream is None else self._stream
        close = getattr(closable, "close", None)
        if close is not None:
            close()


class _Rest:
    """An iterator whose first step has been taken already."""

    def __init__(
        self,
        app_iter: Iterable[bytes],
        iterator: Iterator[bytes],
        *,
        first: bytes | None = None,
        error: BaseException | None = None,
    ) -> None:
        self._app_iter = app_iter
        self._iterator = iterator
        self._first = [first] if error is None else []
        self._error = error

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._first:
            return self._first.pop()  # type: ignore[return-value]
        return next(self._iterator)

    def close(self) -> None:
        close = getattr(self._app_iter, "close", None)
        if close is not None:
            close()
