"""`StreamMiddleware`: adds keepalive, time-outs and limits to any WSGI stream."""

from __future__ import annotations

import logging
import math
import random
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, cast

from ..protocol import ndjson, raw, sse
from ..runtime.journal import report
from ..runtime.process import process
from ..streams.capacity import Capacity, Place
from ..streams.contract import Format, Life, life_of
from ..streams.stream import Stream, warn_unframed

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
from ..servers.connection import CONNECTION, HANDOVER, Connection
from ..servers.request import EVENT_TYPE
from .headers import LIVE, answering, ends_line, has_body, merge_headers
from .responses import session_watch

__all__ = ["StreamMiddleware"]

log = logging.getLogger("syncstream.wsgi")


class StreamMiddleware:
    """Manage the streams of any WSGI application as those of `SSEResponse` are.

    A response whose Content-Type is ``text/event-stream`` or one of NDJSON's is a
    stream. It gets the headers, the first flush (event streams), the keepalive, the
    time-outs, closing and error handling of `SSEResponse`; its generator may use
    `current_stream` and `sleep`. Its chunks pass through unchanged, and its end is not
    changed either, so that clients reconnect. All other responses are left alone,
    including those with a Content-Length and those of ``wsgi.file_wrapper``. (If an
    application calls start_response in its first step, the stream is recognised after
    that step: within the step, `current_stream` returns ``None``.)

    Streams over a limit are refused with 503 and Retry-After. As a browser's
    EventSource gives up for good after a 503, it gets an empty event stream instead
    that asks it to reconnect a few seconds later. The view of a refused stream has run;
    its generator has not.

    Args:
        app: The WSGI application. Flask: ``app.wsgi_app =
            StreamMiddleware(app.wsgi_app)``; Django: ``application =
            StreamMiddleware(get_wsgi_application())``.
        keepalive, send_timeout, max_duration, drain: As for `SSEResponse`, for streams
            that are not syncstream's own responses.
        max_streams: The maximum of open streams in this process, including those of
            syncstream's own responses; ``None`` for no limit.
        reserve_threads: At least this many server threads stay free of streams;
            ``None`` for no limit. (Werkzeug starts a thread for each request: no limit
            there.) A subscription that is about to be handed over waits for up to a
            second while others are about to leave their threads.
        limit_by: Returns the key under which a request's stream is counted, for example
            ``lambda environ: environ["REMOTE_ADDR"]``. Streams with the key ``None`` or
            an empty key are not counted; an empty key is logged. Behind a proxy
            REMOTE_ADDR is the proxy's address, and on a Unix socket it is empty: see
            docs/proxies.md.
        max_per_key: The maximum of open streams with the same key.
        handover: ``False`` keeps all subscriptions of the application in their
            requests' threads or greenlets, ``None`` lets each response decide.

    Raises:
        TypeError, ValueError: An argument has a wrong type or value.
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
        handover: Literal[False] | None = None,
    ) -> None:
        if not callable(app):
            raise TypeError(f"app must be a WSGI application, got {app!r}")
        self.app = app
        self._life = life_of(keepalive, send_timeout, max_duration, drain)
        self.capacity = Capacity(
            max_streams,
            reserve_threads,
            limit_by,
            max_per_key,
            lambda text: process().warn_once(log, text),
        )
        if handover is not None and handover is not False:
            raise ValueError(f"handover must be False or None, got {handover!r}")
        self._may_hand_over = handover is None

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        if CONNECTION in environ:  # installed twice
            return self.app(environ, start_response)
        connection = Connection.of(environ)
        if not self._may_hand_over:
            environ[HANDOVER] = False
        head = _Head(connection, start_response, self._life, self.capacity)
        token = answering.set(weakref.ref(connection))
        try:
            app_iter = self.app(environ, head.start_response)
            if head.refusal is not None:
                return head.refuse(app_iter)
            if connection.stream is not None or _is_file(environ, app_iter):
                head.leave_place_to(_stream_of(connection))
                return app_iter
            if not head.is_started:
                return _Lazy(app_iter, head)
            return app_iter if head.format is None else head.respond(app_iter)
        except BaseException:
            head.abandon()
            raise
        finally:
            answering.reset(token)


def _is_file(environ: WSGIEnvironment, app_iter: object) -> bool:
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(wrapper, type) and isinstance(app_iter, wrapper)


class _Head:
    """The start_response that the application gets from the middleware."""

    def __init__(
        self,
        connection: Connection,
        start_response: StartResponse,
        life: Life,
        capacity: Capacity,
    ) -> None:
        self.connection = connection
        self.is_started = False
        self.is_late = False  # the application returned before start_response
        self.format: Format | None = None
        self.written = b""  # the tail of bytes written before there is a stream
        self.refusal: bytes | None = None  # the body if the stream is refused
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
            # For example, the server refuses a header. There is no stream, and the
            # application may answer something else.
            self.is_started, self.refusal, self._status, self.format = before
            self.release()
            raise
        # From here on the head has been sent, or the server has it.
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
        ours = _stream_of(self.connection)
        self.format = _format_of(headers) if ours is None else None
        if self.format is not None and self.has_body:
            found = self.connection.find_made(is_events=self.format.is_events)
            ours = cast("Stream | None", found)
            if ours is not None and ours.ask_if_over(self.connection):
                ours.close()
                return self._stay_away(exc_info)
            if ours is not None:
                self.connection.take(ours, headers)
                self.format = None
        self._session_look = session_watch() if self.format is not None else None
        if (ours is not None or self.format is not None) and self.has_body:
            environ, connection = self.connection.environ, self.connection
            self._place = self._capacity.admit(
                environ,
                lambda: connection.threads,
                leaves=ours is not None and ours.may_leave,
            )
            if self._place is None:
                return self._refuse(exc_info)
        if self.format is not None:
            self._headers = headers = merge_headers(LIVE, headers)
        return self._call(status, headers, exc_info)

    def _call(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any
    ) -> Callable[[bytes], object]:
        # Some servers accept no third argument when it is None.
        if exc_info is None:
            write = self._start_response(status, headers)
            self.connection.note_head(self._start_response, headers)
        else:
            write = self._start_response(status, headers, exc_info)
        self.connection.note_write(write)
        return write

    def _open(self) -> None:
        """Write the opening at once, as the application is in its first step already.

        Only through the server's own ``write``: a middleware's may hold the bytes back,
        or change them.
        """
        write = self.connection.write
        if write is not None:
            opening = sse.comment("ok", is_line=self.connection.parses_events)
            self.written = sse.tail_after(b"", opening)
            try:
                write(opening)
            except OSError as error:
                # The client has left; the stream will notice that itself.
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
        """Close the stream after the application raised: no server will close it."""
        stream = _stream_of(self.connection)
        if stream is not None:
            stream.close()
        self.release()

    # The place that the capacity has given to this request.

    def release(self) -> None:
        """Give the place back, as there is no stream."""
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
        """Start the answer to a stream over the limits."""
        record = process()
        text = (
            "a stream was refused, the limits of StreamMiddleware are reached: raise"
            " them, or add processes. Further refusals are logged at DEBUG"
        )
        record.warn_once(log, text, "refused")
        report(log, logging.DEBUG, "%s was refused", self.connection.label)
        wait = random.uniform(2, 6)  # seconds; jitter spreads the retries
        if self.connection.is_event_source:
            self.refusal = sse.Event(retry=round(wait * 1000)).encode()
            status, headers = "200 OK", [("Content-Type", EVENT_TYPE)]
        else:
            self.refusal = b"too many streams, please retry later\n"
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
        """Answer 204 to a browser that presents the end id, so that it stays away."""
        self.refusal = b""
        self._call("204 No Content", [("Cache-Control", "no-store")], exc_info)
        return lambda data: None

    def refuse(self, app_iter: Iterable[bytes]) -> Iterable[bytes]:
        """Close the application's iterable; return the body of the refusal instead."""
        assert self.refusal is not None
        stream = _stream_of(self.connection)
        if stream is not None:
            stream.refuse()
        elif self.refusal:
            process().count("refused")
        close = getattr(app_iter, "close", None)
        if close is not None:
            close()
        return [self.refusal] if self.refusal else []


def _code(status: Any) -> int:
    """Return a status line's code; 0 for a malformed one, which the server refuses."""
    try:
        return int(status[:3])
    except (TypeError, ValueError):
        return 0


def _stream_of(connection: Connection) -> Stream | None:
    """Return the running stream of a connection, ``None`` before and after it."""
    return cast("Stream | None", connection.stream)


def _format_of(headers: Any) -> Format | None:
    """Return the format of an application's stream, ``None`` if it is not one."""
    try:
        values = {name.lower(): value + "" for name, value in headers}
    except (AttributeError, TypeError, ValueError):  # the server will refuse them
        return None
    if "content-length" in values:
        return None
    mimetype = values.get("content-type", "").partition(";")[0].strip().lower()
    if mimetype == EVENT_TYPE:
        return Format(sse.passer(warn_unframed), sse.ends_blank, is_events=True)
    if mimetype in ndjson.MEDIA_TYPES:
        return Format(raw.encode_bytes, ends_line)
    return None


class _Lazy:
    """The iterable of an application that calls start_response in its first step.

    Only after that step it is known whether this is a stream. If it is, the result of
    the step and the rest of the iterable become the stream's source.
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
                head.leave_place_to(_stream_of(head.connection))
                raise
            rest = _Rest(self._app_iter, iterator, error=error)
        else:
            rest = _Rest(self._app_iter, iterator, first=first)
        if head.refusal is not None:
            self._app_iter = ()  # refuse() closes it
            return iter(head.refuse(rest))
        if head.format is None:
            head.leave_place_to(
                _stream_of(head.connection)
            )  # a response of ours, or None
            return rest
        self._stream = head.respond(rest)
        return iter(self._stream)

    def close(self) -> None:
        self._head.release()  # a stream holds its own place
        closable = self._app_iter if self._stream is None else self._stream
        close = getattr(closable, "close", None)
        if close is not None:
            close()


class _Rest:
    """An iterator whose first step has been taken, with the result of that step."""

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
