"""`EventSource`: an event stream over as many connections as it takes.

Spec: https://html.spec.whatwg.org/multipage/server-sent-events.html, §9.2.3 (what ends
a stream and what is tried again) and §9.2.4 (Last-Event-ID). Two things are added to
it, as it allows: waits grow while attempts fail, and answers of 500 and above count as
failures that pass.

One thread or greenlet iterates; any other may call `close` and `reconnect`.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConnectError
from ..protocol.sse import Decoder, Event
from ..runtime.backoff import Backoff, checked_seconds, checked_waits
from ..runtime.clock import time
from ..runtime.sockets import native
from ..runtime.waiter import Waiter, wake_all

if TYPE_CHECKING:
    from .connection import Connection, Requests, Response, Session

__all__ = ["EventSource"]

State = Literal["connecting", "open", "closed"]

_MEDIA_TYPE = "text/event-stream"
_HEADERS = {"Accept": _MEDIA_TYPE, "Cache-Control": "no-cache"}


class EventSource:
    """The events of a URL: iterate it; it reconnects and resumes by itself.

    ::

        with EventSource("https://example.com/events") as source:
            for event in source:
                print(event.id, event.event, event.data)

    The iteration ends when the server answers 204, and after `close`. It raises
    `ConnectError` if the server refuses for good: by a status other than 200 and below
    500, by a content type other than ``text/event-stream``, or by endless redirects.
    Ends of the response, network errors and answers of 500 and above are tried again,
    for ever, with the id of the last event.

    Inside a stream's generator the waits between attempts end when the stream's client
    leaves; ``current_stream().link(source)`` ends its reads, too.

    Args:
        url: The stream's, ``http:`` or ``https:``. Redirects are followed, and each new
            attempt begins at this URL again.
        session: A `requests.Session`, whose headers, cookies, authentication, proxies
            and certificates are used; it is not closed. ``None`` makes one.
        method: The HTTP method; give ``"POST"`` for one with a body.
        headers: More headers of the request; they replace those of an EventSource.
        data: The body, as for requests: bytes, text, or the fields of a form. It is
            sent with each attempt.
        json: A body that is sent as JSON.
        last_event_id: Where to resume: the id of the last event that was received.
        read_timeout: Seconds of silence after which the connection counts as dead; a
            comment of the server's is a sign of life. The default suits servers that
            send one every 15 seconds, as syncstream's do. ``None`` waits for ever.
        backoff: The first and the longest wait between attempts, in seconds. Each
            failed attempt doubles it, at random down to a half. The server's
            ``retry:`` replaces the first, and no wait is shorter than that.
        reconnect: ``False`` reads one response: the iteration ends with it, and raises
            `ConnectError` if there is none or it breaks off.
        on_open: Called with each response (`requests.Response`) that is an event
            stream, before its first event.
        on_error: Called with the `ConnectError` before each new attempt; what it raises
            ends the source and its iteration.

    Attributes:
        last_event_id: The id in force after the last event that was iterated.
        retry: The server's last ``retry:``, milliseconds; ``None`` before the first.

    Raises:
        ImportError: requests is not installed.
        TypeError, ValueError: An argument is wrong.
    """

    def __init__(
        self,
        url: str,
        *,
        session: Session | None = None,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        data: Any = None,
        json: Any = None,
        last_event_id: str | None = None,
        read_timeout: float | None = 60.0,
        backoff: tuple[float, float] = (1.0, 30.0),
        reconnect: bool = True,
        on_open: Callable[[Response], object] | None = None,
        on_error: Callable[[ConnectError], object] | None = None,
    ) -> None:
        if not isinstance(url, str):
            raise TypeError(f"url must be a str, got {url!r}")
        _check_body(method, data, json)
        first, longest = checked_waits(backoff)
        if read_timeout is not None:
            read_timeout = checked_seconds("read_timeout", read_timeout)
        self.last_event_id = _checked_id(last_event_id)
        self.retry: int | None = None
        self._backoff = Backoff(first, longest)
        connection = _requests()
        self._new_connection: Callable[[], Connection] = connection.Connection
        self._requests: Requests = connection.Requests(
            session, method, url, _merged(headers), data, json, read_timeout
        )
        self._reconnects = reconnect
        self._on_open = on_open
        self._on_error = on_error
        # Held for a moment only, never while waiting: good for gevent's hubs, too.
        self._lock: Any = native(_thread, "allocate_lock")()
        self._state: State = "connecting"
        self._attempt: Connection | None = None
        self._pending: list[Event] = []  # those of the last read, being iterated
        self._waiter: Waiter | None = None  # of the wait for the next attempt
        self._is_asked = False  # `reconnect` was called since the last attempt began
        self._events = self._run()

    @property
    def state(self) -> State:
        """ "connecting", also before the iteration and between attempts; "open" or
        "closed"."""
        return self._state

    def __iter__(self) -> Iterator[Event]:
        """Return the one iterator of the events: another loop goes on with the next.

        Raises:
            ConnectError: While iterating, see above. The source is closed then.
            RemoteProtocolError: While iterating: a line or an event is larger than
                4 MiB. The source is closed then.
        """
        return self._events

    def __next__(self) -> Event:
        return next(self._events)

    def __enter__(self) -> EventSource:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the iteration, also a read that blocks; from any thread or greenlet.

        It returns at once; whoever waits for an event sees the iteration's end. What
        cannot be cut short is the wait for a new connection, at most 10 seconds, and
        the wait for the first bytes of an answer to a session, or by an adapter, that
        is of a subclass. Closing again does nothing.
        """
        with self._lock:
            self._state = "closed"
            self._pending.clear()
            attempt, waiter = self._attempt, self._waiter
        self._interrupt(attempt, waiter)
        self._requests.close()

    def reconnect(self) -> None:
        """Drop the connection, or cut the wait for it short, and connect at once.

        It may be called from any thread or greenlet, and returns at once. Nothing is
        lost if the server resumes by Last-Event-ID. After the end it does nothing.

        Raises:
            RuntimeError: The source was made with ``reconnect=False``.
        """
        if not self._reconnects:
            raise RuntimeError("reconnect() must not be called with reconnect=False")
        with self._lock:
            self._is_asked = True
            attempt, waiter = self._attempt, self._waiter
        self._interrupt(attempt, waiter)

    def _interrupt(self, attempt: Connection | None, waiter: Waiter | None) -> None:
        if attempt is not None:
            attempt.shut()
        if waiter is not None:
            wake_all([waiter])

    def _run(self) -> Iterator[Event]:
        """Yield the events of one connection after the other."""
        try:
            while (attempt := self._begin()) is not None:
                try:
                    if self._open(attempt):
                        decoder = Decoder(last_event_id=self.last_event_id)
                        while chunk := attempt.read():
                            events = self._decode(decoder, chunk)
                            for event in events:  # `close` empties the list
                                self.last_event_id = event.id
                                yield event
                            if self._is_over():
                                return
                            self.last_event_id = decoder.last_event_id
                        decoder.close()
                    error = None
                except ConnectError as caught:
                    error = caught
                finally:
                    attempt.shut()
                if not self._goes_on(error):
                    return
        finally:
            self.close()

    def _begin(self) -> Connection | None:
        """Return the next attempt; ``None`` after the end."""
        attempt = self._new_connection()
        with self._lock:
            if self._state == "closed":
                return None
            self._state = "connecting"
            self._is_asked = False
            self._attempt = attempt
        return attempt

    def _open(self, attempt: Connection) -> bool:
        """Send the request; tell whether there are events to read.

        Raises:
            ConnectError: There is no event stream.
        """
        response = attempt.open(partial(self._requests.send, self.last_event_id))
        if response is None:  # another thread has ended it
            return False
        if response.status_code == HTTPStatus.NO_CONTENT:
            self.close()
            return False
        _check_response(response)
        with self._lock:
            if self._state == "closed":
                return False
            self._state = "open"
        if self._on_open is not None:
            self._on_open(response)
        return True

    def _decode(self, decoder: Decoder, chunk: bytes) -> list[Event]:
        """Return the events that a read completes, none after the end."""
        events = decoder.feed(chunk)
        self._backoff.reset()
        if decoder.retry is not None:
            self.retry = decoder.retry
            self._backoff.reconnection_time = decoder.retry / 1000
        with self._lock:
            if self._state == "closed":
                return []
            self._pending = events
        return events

    def _goes_on(self, error: ConnectError | None) -> bool:
        """Wait for the time of the next attempt; ``False`` if there is none.

        Args:
            error: What ended the last one, ``None`` for an end of the response.

        Raises:
            ConnectError: The error is final.
        """
        if self._is_over():
            return False
        if self._is_asked:
            return True
        if error is not None and (not self._reconnects or _is_final(error)):
            raise error
        if not self._reconnects:
            return False
        with self._lock:
            if self._state == "open":
                self._state = "connecting"
        self._backoff.fail()
        if self._on_error is not None:
            self._on_error(error or ConnectError("the server has ended the response"))
        self._pause(self._backoff.seconds())
        return True

    def _is_over(self) -> bool:
        return self._state == "closed"

    def _pause(self, seconds: float) -> None:
        """Wait, until another thread calls `close` or `reconnect` at most."""
        deadline = time.monotonic() + seconds
        waiter = Waiter()
        with self._lock:
            self._waiter = waiter
        try:
            while not (self._is_over() or self._is_asked):
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                waiter.wait(left)
        finally:
            with self._lock:
                self._waiter = None


def _requests() -> Any:
    """Return the module that sends requests.

    Raises:
        ImportError: requests is missing; the message says what to install.
    """
    try:
        import requests  # noqa: F401 (only for the error message)
    except ImportError as error:
        raise ImportError(
            "EventSource needs the package requests,"
            " run pip install 'syncstream-wsgi[client]'"
        ) from error
    from . import connection

    return connection


def _check_response(response: Response) -> None:
    """Refuse an answer that is no event stream.

    Raises:
        ConnectError: It is none.
    """
    status = response.status_code
    if status != HTTPStatus.OK:
        raise ConnectError(f"the server answered {status}", status)
    content_type = response.headers.get("Content-Type", "")
    if content_type.partition(";")[0].strip().lower() != _MEDIA_TYPE:
        raise ConnectError(
            f"the answer is no event stream: its Content-Type is {content_type!r}",
            status,
        )


def _is_final(error: ConnectError) -> bool:
    """Tell whether a new attempt would be in vain."""
    return error.status is not None and error.status < 500


def _check_body(method: str, data: Any, json: Any) -> None:
    if not isinstance(method, str):
        raise TypeError(f"method must be a str, got {method!r}")
    for name, body in (("data", data), ("json", json)):
        if body is not None and method.upper() in ("GET", "HEAD"):
            raise ValueError(f'{name} needs method="POST", got method={method!r}')
    if data is not None and json is not None:
        raise ValueError("data and json must not be given both")
    if hasattr(data, "read") or isinstance(data, Iterator):
        raise TypeError(
            "data must be bytes, text or fields, which can be sent again when the"
            f" source reconnects, got {data!r}"
        )


def _merged(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return an EventSource's headers with the caller's, who win.

    Raises:
        ValueError: One of them is for the source to send.
    """
    given = dict(headers or {})
    names = {name.lower() for name in given}
    if "last-event-id" in names:
        raise ValueError(
            "headers must not contain Last-Event-ID: pass last_event_id=, which is"
            " replaced as events come"
        )
    return {n: v for n, v in _HEADERS.items() if n.lower() not in names} | given


def _checked_id(last_event_id: str | None) -> str | None:
    if last_event_id is None:
        return None
    if not isinstance(last_event_id, str):
        raise TypeError(f"last_event_id must be a str or None, got {last_event_id!r}")
    if any(end in last_event_id for end in "\r\n\0"):
        raise ValueError(
            f"last_event_id must not contain CR, LF or NUL, got {last_event_id!r}"
        )
    return last_event_id
