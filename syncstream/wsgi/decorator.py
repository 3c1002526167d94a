"""The common part of the frameworks' ``@sse`` decorators."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, ParamSpec, Protocol, overload

from ..protocol.json import Dumps
from .responses import SSEResponse

__all__ = ["ViewDecorator", "check_framework", "decorator"]

P = ParamSpec("P")


class ViewDecorator(Protocol):
    """``@sse``, and ``@sse(…)`` with the options of `SSEResponse`."""

    @overload
    def __call__(self, view: Callable[P, Any], /) -> Callable[P, Any]: ...

    @overload
    def __call__(
        self,
        *,
        keepalive: float | None = 15.0,
        retry: int | None = None,
        send_timeout: float | None = 30.0,
        max_duration: float | None = None,
        drain: float | None = None,
        end: Any = None,
        framed: bool = False,
        on_error: Callable[[Exception], Any] | None = None,
        dumps: Dumps | None = None,
    ) -> Callable[[Callable[P, Any]], Callable[P, Any]]: ...


def check_framework(name: str, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse requests of Django and REST framework: they need Django's responses.

    Args:
        name: The decorator's name.
        args, kwargs: The view's arguments.

    Raises:
        TypeError: One of them is such a request.
    """
    django = sys.modules.get("django.http")
    if django is None:
        return
    kinds = [django.HttpRequest]
    if (rest_framework := sys.modules.get("rest_framework.request")) is not None:
        kinds.append(rest_framework.Request)
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, tuple(kinds)):
            raise TypeError(
                f"@{name} of syncstream does not work in Django: use the one of"
                f" syncstream.django (from syncstream.django import {name})"
            )


def _same(value: Any) -> Any:
    return value


def decorator(
    response: Callable[..., Any],
    *,
    prepare: Callable[[Generator[Any, Any, Any]], Iterable[Any]] = _same,
    finish: Callable[[Any], Any] = _same,
) -> ViewDecorator:
    """Return the decorator that turns a generator view into an event stream.

    Args:
        response: A framework's SSEResponse.
        prepare: Called with the view's generator; returns the response's source.
        finish: Called with the response; returns the view's result.
    """

    def sse(
        view: Callable[P, Any] | None = None,
        /,
        *,
        keepalive: float | None = 15.0,
        retry: int | None = None,
        send_timeout: float | None = 30.0,
        max_duration: float | None = None,
        drain: float | None = None,
        end: Any = None,
        framed: bool = False,
        on_error: Callable[[Exception], Any] | None = None,
        dumps: Dumps | None = None,
    ) -> Any:
        """Turn a generator view, which may be asynchronous, into one that streams.

        Use it as ``@sse`` or ``@sse(retry=…, end=…)``, below the framework's own
        decorator. The view may yield the same items as the source of `SSEResponse`, and
        the options are the same. If a view returns anything but a generator, such as a
        redirect, the framework handles it.

        A generator view cannot choose the response's status: its head leaves before
        the generator begins. If the generator raises or returns a response
        (``abort(404)``, ``return redirect(...)``), that is logged, and the stream
        ends for good: a browser does not reconnect. To choose a status, write a plain
        view that returns ``SSEResponse(...)``.

        Raises:
            TypeError, ValueError: The view is a coroutine function, or no function;
                an option is wrong.
        """
        # Wrong options fail here, not in every request.
        SSEResponse(
            [],
            keepalive=keepalive,
            retry=retry,
            send_timeout=send_timeout,
            max_duration=max_duration,
            drain=drain,
            end=end,
            framed=framed,
            on_error=on_error,
            dumps=dumps,
        )
        options = {
            "keepalive": keepalive,
            "retry": retry,
            "send_timeout": send_timeout,
            "max_duration": max_duration,
            "drain": drain,
            "end": end,
            "framed": framed,
            "on_error": on_error,
            "dumps": dumps,
        }

        def decorate(view: Callable[P, Any]) -> Callable[P, Any]:
            if not callable(view):
                raise TypeError(f"@sse takes a view function, got {view!r}")
            if inspect.iscoroutinefunction(view):
                raise TypeError(
                    "@sse takes a generator view, synchronous or asynchronous, got the"
                    f" coroutine function {view!r}: yield the events, or make it a def"
                    " that returns SSEResponse(...)"
                )

            @functools.wraps(view)
            def wrapper(*args: P.args, **kwargs: P.kwargs) -> Any:
                if response is SSEResponse:
                    check_framework("sse", args, kwargs)
                result = view(*args, **kwargs)
                if inspect.isasyncgen(result):
                    return finish(response(result, **options))
                if not inspect.isgenerator(result):
                    return result
                return finish(response(prepare(result), **options))

            return wrapper

        return decorate if view is None else decorate(view)

    return sse
