"""The response classes: `SSEResponse`, `NDJSONResponse`, `StreamResponse`.

Spec: https://peps.python.org/pep-3333/. A response under the middleware is one stream,
not two: the middleware leaves a `Connection` in the environ, and the response marks it
as taken.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from werkzeug.datastructures import Headers
from werkzeug.wrappers import Response

from ..fanout.departure import Departure
from ..protocol import ndjson, raw, sse
from ..protocol.json import Dumps
from ..runtime.process import process
from ..servers.advice import warn_of_compression
from ..servers.connection import Connection
from ..streams.contract import FRAMED, Format, life_of
from ..streams.stream import ANSWERED, Stream, warn_framed, warn_unframed
from .headers import (
    CONTROLS,
    EVENT_HEADERS,
    HOP_BY_HOP,
    LIVE,
    NDJSON_HEADERS,
    HeaderSource,
    answering,
    ends_line,
    has_body,
    merge_headers,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

__all__ = [
    "NDJSONResponse",
    "SSEResponse",
    "StreamResponse",
    "session_watch",
    "stream_of",
]

log = logging.getLogger("syncstream.wsgi")


# Attributes that Django and its middlewares read from a response.
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
        f"Django does not accept syncstream.{name}: in a Django view, use the one of"
        f" syncstream.django (from syncstream.django import {name})"
    )


def session_watch() -> Callable[[], None] | None:
    """Return a callback for a stream's end that warns of lost session writes in Flask.

    Flask saves the session before it sends the head, and the generator begins after.
    Call this in the request's context; elsewhere it returns ``None``.
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
                "a stream's generator has written to flask.session, and that is lost:"
                " the session is saved, and its cookie sent, before the generator"
                " starts. Write to the session in the view instead",
                "session",
            )

    return look


@functools.cache
def _joined(ours: Any, theirs: Any) -> Any:
    return type(ours.__name__, (ours, theirs), {})


_CLASS: Any = object.__dict__["__class__"]
_PERHAPS_DROPPED = HOP_BY_HOP | {"content-type", "content-length"}


class _Streaming(Response):
    """A Werkzeug response whose body is a `Stream`."""

    # Computing the length would read an endless source to its end. (get_data() would,
    # too, but it calls make_sequence(), which raises.)
    automatically_set_content_length = False

    # A given Content-Length does not count our comments and the end's event.
    _may_have_length = False

    def __init__(
        self,
        stream: Stream,
        defaults: Mapping[str, str],
        status: int | str,
        headers: HeaderSource | None,
    ) -> None:
        self._stream = stream
        reference = answering.get()
        if reference is not None and (connection := reference()) is not None:
            connection.note_made(stream)
        merged = merge_headers(defaults, headers)
        if not isinstance(status, (int, str)) or isinstance(status, bool):
            raise TypeError(f"status must be int or str, got {status!r}")
        super().__init__(response=stream, status=status, headers=Headers(merged))
        is_text = isinstance(status, str)
        if not 200 <= self.status_code <= 599 or (
            is_text and CONTROLS.search(self.status)
        ):
            raise ValueError(
                f"status must be an HTTP status from 200 to 599, got {status!r}"
            )
        if headers is not None and not any(
            n.lower() == "content-type" for n, _ in merged
        ):
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

    def _become(self, theirs: Any) -> None:
        # Werkzeug's force_type, and so Flask's make_response, gives a foreign response
        # the application's class. The response gets a class that inherits from both.
        ours: Any = type(self)
        is_ours = issubclass(theirs, _Streaming)
        _CLASS.__set__(self, theirs if is_ours else _joined(ours, theirs))

    # Not by __setattr__, which each attribute of Werkzeug's would go through.
    __class__ = property(_CLASS.__get__, _become)

    def make_sequence(self) -> None:
        """Refuse to read a stream to its end, which may never come.

        Raises:
            RuntimeError: The body is still a stream, not plain data set by a hook.
        """
        if not self.is_sequence:
            raise RuntimeError(
                f"{type(self).__name__} is a stream, which may never end: its data"
                " cannot be read before it is sent. Hooks, caches and ETags that read"
                " response.data must skip responses with is_streamed. A test can read a"
                ' stream that ends with a test client: client.get("/events").data'
            )

    def freeze(self) -> None:
        """Freeze plain data, as Werkzeug does; refuse a stream like `make_sequence`."""
        self.make_sequence()
        super().freeze()

    def call_on_close(self, func: Callable[[], Any]) -> Callable[[], Any]:
        """Call a function, once, when the response has ended and is closed."""
        self._stream.on_response_close(func)
        return func

    def close(self) -> None:
        """Close the source, once, and run the functions given to `call_on_close`."""
        try:
            if self.response is not self._stream and hasattr(self.response, "close"):
                self.response.close()
        finally:
            self._stream.close()

    def get_wsgi_headers(self, environ: WSGIEnvironment) -> Headers:
        headers = super().get_wsgi_headers(environ)
        has_type = self.status_code != 204
        has_length = self.response is not self._stream or self._may_have_length
        for name in {name.lower() for name, _ in headers} & _PERHAPS_DROPPED:
            if not (
                (name == "content-type" and has_type)
                or (name == "content-length" and has_length)
            ):
                del headers[name]
        return headers

    def get_wsgi_response(
        self, environ: WSGIEnvironment
    ) -> tuple[Iterable[bytes], str, list[tuple[str, str]]]:
        """Return the body, status line and headers for a request's server.

        The stream is bound to that request's connection; call this once.

        Raises:
            RuntimeError: The stream has answered another request.
        """
        connection, stream = Connection.of(environ), self._stream
        is_elsewhere = stream.has_connection and connection.stream is not stream
        if is_elsewhere and stream.reason is None:
            # Also for HEAD, whose answer would close the other request's stream.
            raise RuntimeError(ANSWERED)
        self._connection = connection  # the environ has a weak reference only
        if stream.ask_if_over(connection):
            self.status_code = 204
        is_sent = has_body(connection, self.status_code)
        if is_sent and self.response is stream:
            headers = self.get_wsgi_headers(environ).to_wsgi_list()
            connection.take(stream, headers)
            return stream, self.status, headers
        app_iter, status, headers = super().get_wsgi_response(environ)
        if not is_sent:
            stream.close()
        elif not self.is_sequence:  # a hook has wrapped the stream, not set plain data
            connection.take(stream, headers)
            if "content-encoding" in {name.lower() for name, _ in headers}:
                warn_of_compression()
        return app_iter, status, headers

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Answer a request: this is a WSGI application."""
        app_iter, status, headers = self.get_wsgi_response(environ)
        try:
            write = start_response(status, headers)
            self._connection.note_write(write)
            self._connection.note_head(start_response, headers)
            if not self._stream.may_leave and (look := session_watch()) is not None:
                self._stream.on_close(look)
        except BaseException:  # it refused a header, for example: no server closes us
            self.close()
            raise
        return app_iter


def stream_of(response: _Streaming) -> Stream:
    """Return the stream that is a response's body, whatever `response` is now."""
    return response._stream


def _events(dumps: Dumps | None, *, is_framed: bool) -> Format:
    """Return the format of event streams."""
    if is_framed:
        encode = sse.framed_encoder(dumps, warn_unframed)
        framed: tuple[type, ...] = (str, *FRAMED)
    else:
        encode = sse.encoder(dumps, warn_unframed, warn_framed)
        framed = FRAMED
    return Format(
        encode,
        sse.ends_blank,
        is_events=True,
        framed=framed,
        completion=sse.completion,
    )


class SSEResponse(_Streaming):
    """An event stream: each item that the source yields leaves as one event.

    It is a Werkzeug and Flask response, and by itself a WSGI application. A comment
    (and ``retry``) leaves at once, before the source has yielded anything.

    Args:
        source: A generator or another iterable of events, or a `Subscription`.
            `syncstream.protocol.sse.encoder` lists the items that it may yield. The
            source runs in the thread or greenlet of the request, and is closed exactly
            once, there, when it ends, fails, or the client has left. For HEAD, and for
            a status without a body, it is closed without having run. An asynchronous
            generator or iterable runs in the process's event loop instead, where it is
            cancelled and closed, and needs no thread of the server's.
        status: The HTTP status.
        headers: Headers that override or extend the defaults (``Content-Type:
            text/event-stream; charset=utf-8``, ``Cache-Control: no-cache,
            no-transform``, ``X-Accel-Buffering: no``). The value ``None`` removes a
            default. Hop-by-hop headers are left to the server.
        keepalive: Seconds of silence after which a comment is sent, which clients
            ignore and proxies count as traffic; ``None`` sends none. It is sent even
            while the source computes or waits, except on uWSGI: there, only when the
            source yields ``None``.
        retry: The client's reconnection time, whole milliseconds; ``None`` leaves
            it to the client (Chromium 3 s, Firefox 5 s). It is sent to EventSources
            only: other clients take it for an event, see docs/clients.md.
        send_timeout: Drops a client that has accepted no data for this many seconds
            although data is waiting, or has vanished without closing. ``None`` leaves
            it to the operating system (some 15 minutes, or never).
        max_duration: Seconds after which the stream ends and the client reconnects; up
            to a tenth less, at random, so that clients do not return all at once.
            ``None``: no limit.
        drain: Seconds for which a generator may continue after the server was told to
            stop; then an EventSource's stream ends, and any other response is cut.
            ``None``: an EventSource's stream ends at once, as the client reconnects;
            any other continues for as long as the server allows (gunicorn: its graceful
            timeout less 2.5 s, unless the environment variable ``SYNCSTREAM_DRAIN``
            says otherwise). ``0``: all end at once. A `Subscription` always ends at
            once.
        end: The behaviour of browsers after the source has finished. ``"stop"``: they
            do not come back. (A browser gets the reserved id ``syncstream-end``,
            reconnects once with it, and gets 204; the view runs for that request, its
            source does not.) ``"reconnect"``: they reconnect, and the view runs again.
            ``None``: "reconnect" for a `Subscription`, else "stop". An `Event`, or
            another item that the source may yield: it is sent last, and then all is as
            with "stop". So clients that are no EventSource can tell a finished stream,
            too: one that failed, was cut, or was stopped for another reason than
            "finished" lacks it.
        handover: A `Subscription` and an asynchronous source need no thread. With
            ``None``, their connections leave the server where that is possible, and the
            request ends. ``False`` keeps them in the request's thread or greenlet.
            ``True`` is the same as ``None``, but raises for other sources, which need
            their thread. See docs/handover.md.
        framed: Whether the source's ``str`` is event-stream text, like its bytes:
            both are sent unchanged, and other items as ever. An event that lacks its
            blank line when the source has finished gets one, and a warning is logged.
        on_error: Called with the exception when the source has failed with an
            ``Exception`` (not with ``SystemExit`` and the like). Its result is encoded
            and sent as the last event, and then the response ends normally: the event
            tells the client of the failure. ``None`` sends no event. Without
            ``on_error`` the client only sees that the stream was cut.
        dumps: The JSON encoder; returns ``str`` or ``bytes``. The default writes
            compact JSON, by orjson with the ``fast`` extra.

    Raises:
        TypeError: ``source`` cannot be iterated; ``status`` or a
            header has a wrong type.
        ValueError: ``status`` is not 200 to 599, a header cannot be sent (it has a line
            break, for example), ``retry`` is negative, ``end`` is another word, or
            nothing is sent for it, a number of seconds is not above 0, ``handover`` is
            true for a source that needs its thread.
    """

    def __init__(
        self,
        source: Iterable[Any] | AsyncIterable[Any],
        status: int | str = 200,
        headers: HeaderSource | None = None,
        *,
        keepalive: float | None = 15.0,
        retry: int | None = None,
        send_timeout: float | None = 30.0,
        max_duration: float | None = None,
        drain: float | None = None,
        end: Any = None,
        handover: bool | None = None,
        framed: bool = False,
        on_error: Callable[[Exception], Any] | None = None,
        dumps: Dumps | None = None,
    ) -> None:
        if not isinstance(framed, bool):
            raise TypeError(f"framed must be True or False, got {framed!r}")
        format = _events(dumps, is_framed=framed)
        life = life_of(keepalive, send_timeout, max_duration, drain)
        stream = Stream(
            source,
            format,
            life=life,
            retry=retry,
            end=end,
            handover=handover,
            on_error=on_error,
            departure=Departure,
        )
        super().__init__(stream, EVENT_HEADERS, status, headers)


class NDJSONResponse(_Streaming):
    """A stream of JSON values (``application/x-ndjson``), one compact value a line.

    Each line leaves at once. NDJSON has no comments, so the response's head leaves
    with the first line, and there is no keepalive. If the source raises before its
    first line, the answer is 500, or the status of a framework's error
    (``abort(404)``).

    Args:
        source: A generator or another iterable of values, which may be
            asynchronous, or a `Subscription`;
            `syncstream.protocol.ndjson.encoder` says how each is written.
        status, headers: As for `SSEResponse`.
        send_timeout, max_duration, drain: As for `SSEResponse`, but they cut the
            response: NDJSON clients do not reconnect by themselves.
        on_error: Called with the exception when the source has failed; its result is
            sent as the last value, and ``None`` sends nothing.
        dumps: The JSON encoder; returns ``str`` or ``bytes`` without line ends.

    Raises:
        TypeError: ``source`` cannot be iterated.
    """

    def __init__(
        self,
        source: Iterable[Any] | AsyncIterable[Any],
        status: int | str = 200,
        headers: HeaderSource | None = None,
        *,
        send_timeout: float | None = 30.0,
        max_duration: float | None = None,
        drain: float | None = None,
        on_error: Callable[[Exception], Any] | None = None,
        dumps: Dumps | None = None,
    ) -> None:
        format = Format(ndjson.encoder(dumps), ends_line, dumps=dumps)
        life = life_of(None, send_timeout, max_duration, drain)
        stream = Stream(
            source, format, life=life, on_error=on_error, departure=Departure
        )
        super().__init__(stream, NDJSON_HEADERS, status, headers)


class StreamResponse(_Streaming):
    """A stream of text or bytes; each chunk leaves at once.

    The response's head leaves with the first chunk. If the source raises before that,
    the answer is 500, or the status of a framework's error (``abort(404)``). If it
    fails later, the response is cut: the format has no place for an error. For a file
    behind nginx, whose buffering helps there, remove the header ``X-Accel-Buffering``.

    Args:
        source: A generator or another iterable, which may be asynchronous, of ``str``
            (sent as UTF-8), bytes, or ``None`` (a checkpoint: nothing is sent).
        status, headers: As for `SSEResponse`. With a Content-Length, clients can show
            the progress of a download.
        send_timeout, max_duration, drain: As for `NDJSONResponse`.
        content_type: The body's media type.

    Raises:
        TypeError: ``source`` cannot be iterated.
    """

    _may_have_length = True

    def __init__(
        self,
        source: Iterable[str | bytes | None] | AsyncIterable[str | bytes | None],
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
        defaults = {"Content-Type": content_type, **LIVE}
        life = life_of(None, send_timeout, max_duration, drain)
        format = Format(raw.encode, lambda tail: False)
        stream = Stream(source, format, life=life, departure=Departure)
        super().__init__(stream, defaults, status, headers)
