"""Django: the responses as StreamingHttpResponse, and decorators for its views.

For WSGI. A view makes its response without the request, so the response has to find
the request: after all middlewares and before anything is sent, Django's handler adds
the request's ``close`` to the response's ``_resource_closers`` (Django 4.2 to 6.1).
That works even if this module was imported during the request.
"""

from __future__ import annotations

import datetime
import logging
import threading
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from django.conf import settings
from django.core.serializers.json import DjangoJSONEncoder
from django.core.signals import request_finished, request_started
from django.db import connections
from django.db.backends.signals import connection_created
from django.http import HttpRequest, StreamingHttpResponse

from .protocol.json import Dumps, making_dumps
from .runtime.process import process
from .servers import connection as connection_module
from .servers.contract import running
from .streams.stream import ANSWERED, Stream
from .wsgi import headers as headers_module
from .wsgi import responses as wsgi
from .wsgi.decorator import decorator, push_decorator
from .wsgi.streaming import streaming_decorator

__all__ = [
    "NDJSONResponse",
    "SSEResponse",
    "StreamResponse",
    "sse",
    "streaming",
    "with_sse",
]

Environ = dict[str, Any] | None

log = logging.getLogger(__name__)

_TIMES = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta)


def _plain(value: Any) -> Any:
    """Return a time as JsonResponse would write it; other objects as they are."""
    return DjangoJSONEncoder().default(value) if isinstance(value, _TIMES) else value


_dumps = making_dumps(_plain)

# The environ of the running request, and of the request around it (a view may use
# Django's test client): for a body that a middleware has put into another response.
_environ: ContextVar[tuple[Environ, Environ]] = ContextVar(
    "syncstream_django_environ", default=(None, None)
)
# Under ASGI Django sends the signal in a separate task, whose context is lost, but in
# the thread that then runs the request's synchronous views.
_thread = threading.local()


def _started(sender: object, environ: Environ = None, **kwargs: Any) -> None:
    _environ.set((environ, _environ.get()[0]))
    _thread.is_asgi = environ is None
    if environ is not None:
        _prepare(environ, is_new=True)


def _prepare(environ: dict[str, Any], *, is_new: bool) -> None:
    """Have a request's database connections released while its stream waits.

    Args:
        environ: The request's environ.
        is_new: The request has just begun, so that it has no open cursors.
    """
    if connection_module.BEFORE_WAIT in environ and not is_new:
        return
    environ[connection_module.BEFORE_WAIT] = [_release_connections]
    for connection in connections.all(initialized_only=True):
        _OpenCursors.of(connection, is_late=not is_new)


def _find_started() -> None:
    """Find the running request if it began before this module was imported."""
    environ = running("django.core.handlers.wsgi", "keys", name="environ")
    if environ is not None:
        _environ.set((environ, None))
        _prepare(environ, is_new=False)


class _OpenCursors:
    """The open cursors of a connection, collected by an execute wrapper.

    Closing a connection would discard the unread rows of its open cursors, such as
    those of ``queryset.iterator()``.

    https://docs.djangoproject.com/en/stable/topics/db/instrumentation/
    """

    def __init__(self, is_late: bool) -> None:
        self._cursors: weakref.WeakSet[Any] = weakref.WeakSet()
        self.is_late = is_late

    @classmethod
    def of(cls, connection: Any, *, is_late: bool = False) -> _OpenCursors:
        """Return the open cursors of a connection; the first call installs the wrapper.

        Args:
            connection: A connection of this thread or greenlet.
            is_late: Unknown cursors may have been opened before: the connection counts
                as in use until the next request or connection.
        """
        for wrapper in connection.execute_wrappers:
            if isinstance(wrapper, cls):
                wrapper.is_late &= is_late
                return wrapper
        cursors = cls(is_late)
        # At the front: `connection.execute_wrapper` removes its own by popping the end.
        connection.execute_wrappers.insert(0, cursors)
        return cursors

    def __call__(
        self, execute: Any, sql: Any, params: Any, many: Any, context: Any
    ) -> Any:
        cursor = context["cursor"]
        if cursor not in self._cursors:
            self._cursors.add(cursor)
            cursor.close = self._closing(cursor)
        return execute(sql, params, many, context)

    def _closing(self, cursor: Any) -> Callable[[], Any]:
        # Some drivers' cursors (sqlite3's) do not tell whether they are closed.
        reference, close = weakref.ref(cursor), cursor.close

        def closing() -> Any:
            if (found := reference()) is not None:
                self._cursors.discard(found)
            return close()

        return closing

    def __bool__(self) -> bool:
        return self.is_late or bool(self._cursors)

    def clear(self) -> None:
        self.is_late = False
        self._cursors.clear()


def _connected(sender: object, connection: Any, **kwargs: Any) -> None:
    _OpenCursors.of(connection).clear()  # they belonged to the previous connection


def _release_connections() -> None:
    """Close this thread's database connections, or return them to their pool.

    Django does so between requests, but a stream is one long request. Connections in
    use stay open: those in a transaction (``atomic()``, or without autocommit), and
    those with an open cursor. If closing one fails, the others are closed all the same.

    Raises:
        Exception: The error of the last connection that could not be closed.
    """
    failure = None
    for connection in connections.all(initialized_only=True):
        try:
            _release(connection)
        except Exception as error:
            failure = error
    if failure is not None:
        raise failure


def _release(connection: Any) -> None:
    if (
        connection.connection is not None
        and not connection.in_atomic_block
        and connection.get_autocommit()
        and not _OpenCursors.of(connection)
    ):
        connection.close()


def _finished(sender: object, **kwargs: Any) -> None:
    _environ.set((_environ.get()[1], None))
    _thread.is_asgi = False


request_started.connect(_started, dispatch_uid="syncstream")
request_finished.connect(_finished, dispatch_uid="syncstream")
connection_created.connect(_connected, dispatch_uid="syncstream")

_ASGI = (
    "syncstream streams under WSGI, but this request runs under ASGI: serve the"
    " application with a WSGI server, or return Django's own StreamingHttpResponse with"
    " an asynchronous generator"
)


class _Streaming(StreamingHttpResponse):
    _response: Any = None
    _connection: connection_module.Connection | None = None
    _seen_closers = -1  # the number of closers that were searched for a request
    _status = 200

    def __init__(
        self, response: wsgi.SSEResponse | wsgi.NDJSONResponse | wsgi.StreamResponse
    ) -> None:
        if _environ.get()[0] is None and getattr(_thread, "is_asgi", False):
            response.close()
            raise RuntimeError(_ASGI)
        if _environ.get()[0] is None:
            _find_started()
        _, _, reason = response.status.partition(" ")
        stream = wsgi.stream_of(response)
        super().__init__(_body(stream), status=response.status_code, reason=reason)
        self._stream_iterator = self._iterator
        self._resource_closers.append(stream.close)
        _warn_of_gzip()
        del self.headers["Content-Type"]  # Django's default
        for name, value in response.get_wsgi_headers({}):
            if name.lower() == "set-cookie":
                self.cookies.load(value)
            elif name in self.headers:  # Django's are a mapping
                self.headers[name] = f"{self.headers[name]}, {value}"
            else:
                self.headers[name] = value
        self._response = response

    def _find_request(self) -> None:
        """Find the request of this response, once the handler has added its closer."""
        if self._response is None or len(self._resource_closers) == self._seen_closers:
            return
        self._seen_closers = len(self._resource_closers)
        for closer in reversed(self._resource_closers):
            request = getattr(closer, "__self__", None)
            if isinstance(request, HttpRequest):
                break
        else:
            return
        environ = getattr(request, "environ", None)
        if environ is None:
            self._response.close()
            raise RuntimeError(_ASGI)
        stream, before = wsgi.stream_of(self._response), self._connection
        if before is not None and before.environ is environ:
            return
        if before is not None and not (before.server.is_test and stream.leave()):
            # The server answers 500, and the first request has its stream.
            self._resource_closers.remove(request.close)
            self._seen_closers -= 1
            request.close()
            raise RuntimeError(ANSWERED)
        _prepare(environ, is_new=False)
        self._connection = connection = connection_module.Connection.of(environ)
        if stream.ask_if_over(connection):
            self._status, self._reason_phrase = 204, None
            del self.headers["Content-Type"]
        if headers_module.has_body(connection, self._status):
            is_replaced = self._iterator is not self._stream_iterator
            if is_replaced and "Content-Encoding" in self.headers:
                _warn_of_compression()  # a decorator such as gzip_page compresses
            connection.take(stream, self.headers.items())
            self._note_head(connection)
            if not stream.may_leave:
                _watch_session(request, stream)
        else:
            stream.close()

    def _note_head(self, connection: connection_module.Connection) -> None:
        """Have an error before the first item answered with its own status."""
        handler = "django.core.handlers.wsgi"
        if running(handler, "keys", name="environ") is not connection.environ:
            return  # a test client, perhaps in a view of another request
        start_response = running(handler, "__call__", name="start_response")
        headers = headers_module.without_hop_by_hop(super().items())
        cookies = [cookie.OutputString() for cookie in self.cookies.values()]
        headers += [("Set-Cookie", cookie) for cookie in cookies]
        connection.note_head(start_response, headers)

    # The handler adds the closer, then reads the status, then the headers.

    @property
    def status_code(self) -> int:
        self._find_request()
        return self._status

    @status_code.setter
    def status_code(self, status: int) -> None:
        self._status = status

    def items(self) -> Any:
        """Return the headers, without hop-by-hop ones, which are the server's."""
        self._find_request()
        return headers_module.without_hop_by_hop(super().items())

    def __iter__(self) -> Iterator[bytes]:
        # A middleware may have changed the status.
        if self.status_code in headers_module.BODILESS:
            self._response.close()
            return iter(())
        iterator: Iterator[bytes] = super().__iter__()
        return iterator

    def __aiter__(self) -> AsyncIterator[bytes]:
        raise RuntimeError(_ASGI)


def _watch_session(request: HttpRequest, stream: Stream) -> None:
    """Warn if a generator writes to the session, which has been saved already."""
    session: Any = getattr(request, "session", None)
    if session is None or not hasattr(session, "modified"):
        return
    session.modified = False  # SessionMiddleware has saved it already
    save = session.save

    def saving(*args: Any, **kwargs: Any) -> Any:
        result = save(*args, **kwargs)
        session.modified = False
        return result

    session.save = saving

    def look() -> None:
        vars(session).pop("save", None)  # break the reference cycle
        if session.modified:
            process().warn_once(
                log,
                "a stream's generator has written to request.session, and that is lost:"
                " the session is saved before the generator starts. Write to the"
                " session in the view, or call request.session.save() in the generator"
                " (which has no effect with signed cookies)",
                "session",
            )

    stream.on_close(look)


def _body(stream: Stream) -> Iterator[bytes]:
    """Yield a stream's chunks, and connect the stream to the running request.

    A middleware may have put the body into another response, which did not connect it.
    Without a running request (RequestFactory), the stream has no connection.
    """
    environ, _ = _environ.get()
    if environ is not None and not stream.has_connection and not stream.reason:
        connection = connection_module.Connection.of(environ)
        if connection.is_head or stream.ask_if_over(connection):
            stream.close()
        elif connection.stream is None:
            connection.take(stream)
    yield from stream


def _warn_of_gzip() -> None:
    if any(name.endswith(".GZipMiddleware") for name in settings.MIDDLEWARE):
        _warn_of_compression()


def _warn_of_compression() -> None:
    process().warn_once(
        log,
        "Django's GZipMiddleware, or another compressing middleware or decorator, holds"
        " back the events of streams: remove it from MIDDLEWARE and let the proxy"
        " compress, or decorate only views that do not stream with gzip_page",
    )


class SSEResponse(_Streaming):
    """`syncstream.SSEResponse` for Django views; the same arguments.

    By default times are JSON as in Django's ``JsonResponse``.
    """

    def __init__(
        self,
        source: Iterable[Any] | AsyncIterable[Any],
        status: int = 200,
        headers: headers_module.HeaderSource | None = None,
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
        response = wsgi.SSEResponse(
            source,
            status,
            headers,
            keepalive=keepalive,
            retry=retry,
            send_timeout=send_timeout,
            max_duration=max_duration,
            drain=drain,
            end=end,
            handover=handover,
            framed=framed,
            on_error=on_error,
            dumps=_dumps if dumps is None else dumps,
        )
        super().__init__(response)


class NDJSONResponse(_Streaming):
    """`syncstream.NDJSONResponse` for Django views; the same arguments.

    By default times are JSON as in Django's ``JsonResponse``.
    """

    def __init__(
        self,
        source: Iterable[Any] | AsyncIterable[Any],
        status: int = 200,
        headers: headers_module.HeaderSource | None = None,
        *,
        send_timeout: float | None = 30.0,
        max_duration: float | None = None,
        drain: float | None = None,
        on_error: Callable[[Exception], Any] | None = None,
        dumps: Dumps | None = None,
    ) -> None:
        response = wsgi.NDJSONResponse(
            source,
            status,
            headers,
            send_timeout=send_timeout,
            max_duration=max_duration,
            drain=drain,
            on_error=on_error,
            dumps=_dumps if dumps is None else dumps,
        )
        super().__init__(response)


class StreamResponse(_Streaming):
    """`syncstream.StreamResponse` for Django views; the same arguments."""

    def __init__(
        self,
        source: Iterable[str | bytes | None] | AsyncIterable[str | bytes | None],
        status: int = 200,
        headers: headers_module.HeaderSource | None = None,
        *,
        send_timeout: float | None = 30.0,
        max_duration: float | None = None,
        drain: float | None = None,
        content_type: str = "text/plain; charset=utf-8",
    ) -> None:
        response = wsgi.StreamResponse(
            source,
            status,
            headers,
            send_timeout=send_timeout,
            max_duration=max_duration,
            drain=drain,
            content_type=content_type,
        )
        super().__init__(response)


sse = decorator(SSEResponse)
with_sse = push_decorator(SSEResponse)
streaming = streaming_decorator(
    StreamResponse, SSEResponse, finish=lambda response, args: response
)
