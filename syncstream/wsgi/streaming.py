"""``@streaming``: views that answer with a body, and maybe a status and headers.

What such a view returns says which order it has: a status comes first in ``(status,
body, headers)``, and a generator in ``(body, status, headers)``.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, overload

from ..runtime.coroutines import run_coroutine
from ..servers.request import EVENT_TYPE
from ..streams.async_source import is_async
from ..streams.contract import FRAMED
from .decorator import check_framework, show_signature, signature_of
from .responses import StreamResponse

__all__ = ["StreamingDecorator", "finish_wsgi", "streaming_decorator"]

P = ParamSpec("P")

HTML = "text/html; charset=utf-8"
_STATUS = re.compile(r"[1-5]\d\d( .*)?", re.DOTALL)


class StreamingDecorator(Protocol):
    """``@streaming``, and ``@streaming(…)`` with the options of `StreamResponse`."""

    @overload
    def __call__(self, view: Callable[P, Any], /) -> Callable[P, Any]: ...

    @overload
    def __call__(
        self,
        *,
        send_timeout: float | None = 30.0,
        max_duration: float | None = None,
        drain: float | None = None,
        content_type: str = HTML,
    ) -> Callable[[Callable[P, Any]], Callable[P, Any]]: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A view's body, status and headers.

    Attributes:
        headers: As for `StreamResponse`, but no iterator.
    """

    body: Any
    status: int | str = 200
    headers: Any = None

    def is_event_stream(self, content_type: str) -> bool:
        """Tell whether the body is event-stream text.

        Args:
            content_type: The media type unless the headers have one.
        """
        headers = self.headers or ()
        pairs = headers.items() if hasattr(headers, "items") else headers
        for pair in pairs:  # they are checked when the response is made
            if isinstance(pair, tuple) and len(pair) == 2:
                name, value = pair
                if str(name).lower() == "content-type":
                    content_type = str(value)
        media_type, _, _ = content_type.partition(";")
        return media_type.strip().lower() == EVENT_TYPE


def answer_of(result: Any) -> Answer | None:
    """Return a view's answer; ``None``: the framework has to make it.

    Raises:
        TypeError: It has a status, but no body that can be sent.
    """
    if _is_stream(result):
        return Answer(result)
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        return None
    first, second = result[:2]
    third = result[2] if len(result) == 3 else None
    if _is_stream(first):  # Flask's order
        if len(result) == 2 and not isinstance(second, (int, str)):
            return Answer(first, headers=_kept(second))
        return Answer(first, 200 if second is None else second, _kept(third))
    if isinstance(first, str) and _STATUS.fullmatch(first):
        if _is_text(second) and not _is_other_line(first, second):
            return Answer([second], first, _kept(third))
        return Answer(second, first, _kept(third)) if _is_stream(second) else None
    if not isinstance(first, int) or isinstance(first, bool):
        return None
    if _is_text(second):
        return Answer([second], first, _kept(third))
    if not _is_stream(second):
        raise TypeError(
            "@streaming takes a generator, another iterator, str or bytes as the body"
            f" of (status, body, headers), got {type(second).__name__}: return the"
            " framework's own response for it"
        )
    return Answer(second, first, _kept(third))


def _is_stream(value: Any) -> bool:
    return isinstance(value, Iterator) or (
        is_async(value) and not isinstance(value, type)
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, *FRAMED))


def _is_other_line(first: str, second: Any) -> bool:
    """Tell whether the second of two status lines says that the first is a body."""
    is_line = isinstance(second, str) and _STATUS.fullmatch(second) is not None
    return is_line and second != first


def _kept(headers: Any) -> Any:
    return [*headers] if isinstance(headers, Iterator) else headers


def _same(value: Any) -> Any:
    return value


def streaming_decorator(
    stream_response: Callable[..., Any],
    sse_response: Callable[..., Any],
    *,
    prepare: Callable[[Generator[Any, Any, Any]], Iterable[Any]] = _same,
    finish: Callable[[Any, tuple[Any, ...]], Any],
) -> StreamingDecorator:
    """Return the decorator that makes responses of what views return.

    Args:
        stream_response: A framework's StreamResponse.
        sse_response: Its SSEResponse, for a body that is an event stream.
        prepare: Called with a view's plain generator; returns the response's source.
        finish: Called with the response and the view's positional arguments; returns
            the view's result.
    """

    def streaming(
        view: Callable[P, Any] | None = None,
        /,
        *,
        send_timeout: float | None = 30.0,
        max_duration: float | None = None,
        drain: float | None = None,
        content_type: str = HTML,
    ) -> Any:
        """Turn what a view returns into a response that streams.

        Use it as ``@streaming`` or ``@streaming(drain=…)``, below the framework's own
        decorator. The view returns a body, ``(status, body)`` or ``(status, body,
        headers)``, or is a generator itself. The body is a generator or another
        iterator of ``str`` and bytes, which may be asynchronous. Behind a status, a
        it may also be ``str`` or bytes. The status is a number or a line such as
        ``"200 OK"``, the headers are a mapping or pairs. Flask's order ``(body,
        status, headers)`` is understood, too, if the body is an iterator. Anything else
        that the view returns is left to the framework.

        The response is a `StreamResponse`; if the headers say ``text/event-stream``, it
        is an `SSEResponse` whose ``str`` is event-stream text (``framed=True``).

        An ``async def`` view runs in the process's event loop, and the request's thread
        or greenlet waits until it returns; a client that leaves does not end that wait.

        Args:
            send_timeout, max_duration, drain: As for `StreamResponse`.
            content_type: The body's media type, unless the headers have one.

        Raises:
            TypeError, ValueError: The view cannot be called; an option is wrong.
        """
        options: dict[str, Any] = {
            "send_timeout": send_timeout,
            "max_duration": max_duration,
            "drain": drain,
        }
        # Wrong options fail here, not in every request.
        StreamResponse([], content_type=content_type, **options)

        def respond(answer: Answer) -> Any:
            body, status, headers = answer.body, answer.status, answer.headers
            if inspect.isgenerator(body):
                body = prepare(body)
            if answer.is_event_stream(content_type):
                return sse_response(body, status, headers, framed=True, **options)
            return stream_response(
                body, status, headers, content_type=content_type, **options
            )

        def decorate(view: Callable[P, Any]) -> Callable[P, Any]:
            if not callable(view):
                raise TypeError(f"@streaming takes a view function, got {view!r}")

            @functools.wraps(view)
            def wrapper(*args: P.args, **kwargs: P.kwargs) -> Any:
                if stream_response is StreamResponse:
                    check_framework("streaming", args, kwargs)
                result = view(*args, **kwargs)
                if inspect.iscoroutine(result):
                    result = run_coroutine(result)
                answer = answer_of(result)
                return result if answer is None else finish(respond(answer), args)

            show_signature(wrapper, signature_of(view))
            return wrapper

        return decorate if view is None else decorate(view)

    return streaming


def finish_wsgi(response: Any, args: tuple[Any, ...]) -> Any:
    """Answer a request if the view is a WSGI application, else return the response."""
    if len(args) >= 2 and isinstance(args[-2], dict) and "wsgi.version" in args[-2]:
        return response(*args[-2:])
    return response
