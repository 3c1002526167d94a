"""Django: the responses as StreamingHttpResponse, and ``@sse`` for its views.

For WSGI. A response is made without the request, so the request's environ is taken
from Django's ``request_started`` signal, in the thread or greenlet that handles it.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from django.core.signals import request_finished, request_started
from django.http import StreamingHttpResponse

from . import wsgi
from .protocol.json import Dumps
from .views import decorator

__all__ = ["NDJSONResponse", "SSEResponse", "StreamResponse", "sse"]

Environ = dict[str, Any] | None

# The environ of the request that runs here, and of the one around it: a view may use
# Django's test client.
_environ: ContextVar[tuple[Environ, Environ]] = ContextVar(
    "syncstream_django_environ", default=(None, None)
)
# Under ASGI Django sends the signal in a task of its own, whose context is lost,
# but in the thread that then runs the synchronous views of the request.
_thread = threading.local()


def _started(sender: object, environ: Environ = None, **kwargs: Any) -> None:
    _environ.set((environ, _environ.get()[0]))
    _thread.is_asgi = environ is None


def _finished(sender: object, **kwargs: Any) -> None:
    _environ.set((_environ.get()[1], None))
    _thread.is_asgi = False


request_started.connect(_started, dispatch_uid="syncstream")
request_finished.connect(_finished, dispatch_uid="syncstream")

_ASGI = (
    "syncstream streams synchronous generators under WSGI, and this runs under ASGI:"
    " serve it by WSGI, or return Django's own StreamingHttpResponse with an"
    " asynchronous generator"
)


class _Streaming(StreamingHttpResponse):
    def __init__(
        self, response: wsgi.SSEResponse | wsgi.NDJSONResponse | wsgi.StreamResponse
    ) -> None:
        environ, _ = _environ.get()
        if environ is None and getattr(_thread, "is_asgi", False):
            response.close()
            raise RuntimeError(_ASGI)
        # No request at all: a response that a test made, of a RequestFactory's.
        body, status, headers = response.get_wsgi_response(
            {"REQUEST_METHOD": "GET"} if environ is None else environ
        )
        code, _, reason = status.partition(" ")
        super().__init__(body, status=int(code), reason=reason)
        del self.headers["Content-Type"]  # Django's default
        for name, value in headers:
            if name.lower() == "set-cookie":
                self.cookies.load(value)
            elif name in self.headers:  # Django's are a mapping
                self.headers[name] = f"{self.headers[name]}, {value}"
            else:
                self.headers[name] = value
        self._response = response

    def items(self) -> Any:
        """Return the headers that WSGI leaves to the application."""
        return wsgi.without_hop_by_hop(super().items())

    def __iter__(self) -> Iterator[bytes]:
        # A middleware may have changed the status since.
        if self.status_code in wsgi.BODILESS:
            self._response.close()
            return iter(())
        iterator: Iterator[bytes] = super().__iter__()
        return iterator

    def __aiter__(self) -> AsyncIterator[bytes]:
        raise RuntimeError(_ASGI)


class SSEResponse(_Streaming):
    """`syncstream.SSEResponse` for Django views; the same arguments."""

    def __init__(
        self,
        source: Iterable[Any],
        status: int = 200,
        headers: wsgi.HeaderSource | None = None,
        *,
        retry: int | None = None,
        end: str = "stop",
        on_error: Callable[[Exception], Any] | None = None,
        dumps: Dumps | None = None,
    ) -> None:
        response = wsgi.SSEResponse(
            source,
            status,
            headers,
            retry=retry,
            end=end,
            on_error=on_error,
            dumps=dumps,
        )
        super().__init__(response)


class NDJSONResponse(_Streaming):
    """`syncstream.NDJSONResponse` for Django views; the same arguments."""

    def __init__(
        self,
        source: Iterable[Any],
        status: int = 200,
        headers: wsgi.HeaderSource | None = None,
        *,
        on_error: Callable[[Exception], Any] | None = None,
        dumps: Dumps | None = None,
    ) -> None:
        response = wsgi.NDJSONResponse(
            source, status, headers, on_error=on_error, dumps=dumps
        )
        super().__init__(response)


class StreamResponse(_Streaming):
    """`syncstream.StreamResponse` for Django views; the same arguments."""

    def __init__(
        self,
        source: Iterable[str | bytes | None],
        status: int = 200,
        headers: wsgi.HeaderSource | None = None,
        *,
        content_type: str = "text/plain; charset=utf-8",
    ) -> None:
        response = wsgi.StreamResponse(
            source, status, headers, content_type=content_type
        )
        super().__init__(response)


sse = decorator(SSEResponse)
