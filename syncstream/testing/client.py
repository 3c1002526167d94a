"""`Client`: requests to a WSGI application in this process, answered as by a server.

Each request runs in a thread of its own, with a socket: a source waits, gets keepalives
and notices that its client leaves, as it does on a server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import werkzeug.test
from werkzeug.datastructures import Headers

from .exchange import Exchange
from .limit import Late
from .reader import TIMEOUT, Reader, check_timeout

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["EVENT_SOURCE", "Client", "ClientStream"]

EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
"""The headers that a browser's EventSource sends."""


class ClientStream(Reader):
    """A response of a `Client`, to be read while it runs.

    Attributes:
        status_code: The HTTP status.
        headers: The response's headers; names in any case.
    """

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange)
        self._exchange = exchange
        self.status_code = int(exchange.status.split(" ", 1)[0])
        self.headers = Headers(exchange.headers)

    @property
    def reason(self) -> str | None:
        """Why the stream has ended, as `Stream.reason`; ``None`` while it lives.

        ``None`` of a response that is none of this package's streams, too.
        """
        return self._exchange.reason

    def disconnect(self) -> None:
        """Leave, as a client does that closes its connection.

        A source that waits ends at once, by `ClientDisconnected`; one that is between
        two events, by a `GeneratorExit` at its yield. It has cleaned up when this
        returns. Calling it again does nothing.

        Raises:
            AssertionError: The source has not ended within 2 s.
        """
        self.close()


class Client:
    """Requests to a WSGI application, in this process. It keeps cookies.

    ::

        client = Client(app)
        with client.stream("GET", "/events") as stream:
            assert stream.status_code == 200
            first, second = stream.events(2)

    Args:
        app: The WSGI application.
    """

    def __init__(self, app: WSGIApplication) -> None:
        if not callable(app):
            raise TypeError(f"app must be a WSGI application, got {app!r}")
        self._app = app
        self._client = werkzeug.test.Client(self._begin)
        self._begun: list[Exchange] = []
        self._timeout = TIMEOUT

    def stream(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
        query_string: Mapping[str, Any] | str | None = None,
        data: Any = None,
        json: Any = None,
        last_event_id: str | None = None,
        timeout: float = TIMEOUT,
    ) -> ClientStream:
        """Send a request; return its response as soon as the head has come.

        The source of an event stream waits by then, or has sent: a subscription has
        begun, and gets what the test publishes from now on.

        Args:
            method: The HTTP method.
            path: The path; it may have a query.
            headers: Request headers. `EVENT_SOURCE` has those of a browser's
                EventSource.
            query_string: The query, as text or as a mapping.
            data: The body: bytes, text, or a mapping of form fields.
            json: The body, to be sent as JSON.
            last_event_id: The id to resume after, as a client that reconnects sends it.
            timeout: Seconds until the head must have come. The head of a stream that
                is no event stream comes with its first item.

        Raises:
            AssertionError: It has not come.
            BaseException: What the application has raised.
        """
        check_timeout(timeout)
        sent = Headers(headers)
        if last_event_id is not None:
            # PEP 3333: a header's bytes, as Latin-1.
            sent["Last-Event-ID"] = last_event_id.encode().decode("latin-1")
        self._timeout = timeout
        try:
            self._client.open(
                path,
                method=method,
                headers=sent,
                query_string=query_string,
                data=data,
                json=json,
            )
        except Late as late:
            at = f"; the application is at {late}" if str(late) else ""
            raise AssertionError(
                f"{method} {path} sent no head within {timeout:g} s{at}"
            ) from None
        return ClientStream(self._begun.pop())

    def _begin(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Begin an exchange, for Werkzeug's client, which keeps the cookies."""
        exchange = Exchange(self._app, environ)
        exchange.open(self._timeout)
        start_response(exchange.status, exchange.headers)
        self._begun.append(exchange)
        return [b""]
