"""Reads what the frameworks' own test clients return: `events`, `lines`, `chunks`.

The source runs in the test's thread, step by step as the test reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..protocol.event import Event
from .reader import TIMEOUT, Reader, check_count, check_timeout

__all__ = ["chunks", "events", "lines", "reading"]


def events(
    response: Any, n: int | None = None, timeout: float = TIMEOUT
) -> list[Event]:
    """Read ``n`` events of a test client's response, then close it.

    Args:
        response: What a test client has returned: Werkzeug's, Flask's, Django's,
            WebTest's; or a response that a view has returned, or a WSGI application's
            iterable.
        n: How many to read; ``None``: all, of a stream that ends.
        timeout: Seconds that they may take together.

    Returns:
        The events, oldest first, as `Reader.events` describes them.

    Raises:
        AssertionError: They have not come within ``timeout``, or the stream has ended
            before.
        Exception: What the source has raised.
        TypeError: The response cannot be read.
    """
    with _reading(response, n, timeout) as reader:
        return reader.events(n, timeout=timeout)


def lines(response: Any, n: int | None = None, timeout: float = TIMEOUT) -> list[str]:
    """Read ``n`` lines of a test client's response, then close it; as `events`.

    Returns:
        Text, decoded as UTF-8, without the lines' ends; with comments and empty lines.
    """
    with _reading(response, n, timeout) as reader:
        return reader.lines(n, timeout=timeout)


def chunks(
    response: Any, n: int | None = None, timeout: float = TIMEOUT
) -> list[bytes]:
    """Read ``n`` chunks of a test client's response, then close it; as `events`.

    Returns:
        The chunks as the application sent them, none of them empty. An event stream's
        first one is its opening, a comment.
    """
    with _reading(response, n, timeout) as reader:
        return reader.chunks(n, timeout=timeout)


def _reading(response: Any, n: object, timeout: object) -> Reader:
    check_count(n)
    check_timeout(timeout)
    return reading(response)


def reading(response: Any) -> Reader:
    """Return a reader of a test client's response, to read it in several steps.

    ::

        with reading(client.get("/events")) as stream:
            hub.publish("news", stream.events(1)[0].data)
            assert stream.events(1)[0].data == "hello"

    Args:
        response: As for `events`.

    Raises:
        TypeError: The response cannot be read.
    """
    return Reader(_Response(response))


class _Response:
    """A response of a test client, as a `Body`."""

    interrupt: None = None  # the source runs in the test's thread

    def __init__(self, response: Any) -> None:
        self._response = response
        self._chunks = iter(_body_of(response))
        self.label = _label_of(response)

    def read(self) -> bytes:
        for chunk in self._chunks:
            if chunk:
                return bytes(chunk)
        return b""

    def close(self) -> None:
        closable = self._response
        if hasattr(closable, "streaming_content"):
            _close_of_django(closable)
            return
        if not hasattr(closable, "close"):  # WebTest's has none
            closable = getattr(closable, "app_iter", None)
        close = getattr(closable, "close", None)
        if close is not None:
            close()


def _close_of_django(response: Any) -> None:
    """Close a response, and leave the test's database connections open.

    As Django's Client does, with a response that it has read itself.
    """
    from django.core.signals import request_finished
    from django.db import close_old_connections

    request_finished.disconnect(close_old_connections)
    try:
        response.close()
    finally:
        request_finished.connect(close_old_connections)


def _body_of(response: Any) -> Iterable[bytes]:
    if getattr(response, "is_async", False):
        raise TypeError(
            "response has an asynchronous body, which Django's Client cannot read:"
            " return syncstream.django.SSEResponse(source) from the view, or test it"
            " under ASGI with AsyncClient"
        )
    for name in ("streaming_content", "app_iter"):  # Django's; WebOb's
        if hasattr(response, name):
            return _bytes_of(getattr(response, name))
    if hasattr(response, "iter_encoded"):  # Werkzeug's
        return _bytes_of(response.iter_encoded())
    if isinstance(response, (str, bytes)) or not hasattr(response, "__iter__"):
        raise TypeError(
            "response must be what a test client returns, or an iterable of bytes,"
            f" got {response!r}"
        )
    return _bytes_of(response)


def _bytes_of(body: Iterable[bytes]) -> Iterator[bytes]:
    iterator = iter(body)
    for chunk in iterator:
        if not isinstance(chunk, bytes):
            raise TypeError(f"a body must yield bytes, got {chunk!r}")
        yield chunk


def _label_of(response: Any) -> str:
    request = getattr(response, "request", None)
    if isinstance(request, dict):  # Django's: an environ
        method, path = request.get("REQUEST_METHOD", ""), request.get("PATH_INFO", "")
    else:
        method, path = getattr(request, "method", ""), getattr(request, "path", "")
    return f"{method} {path}".strip() or "the response"
