"""The common part of the frameworks' decorators ``@sse`` and ``@with_sse``."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, ParamSpec, Protocol, overload

from ..protocol.json import Dumps
from ..runtime.greenlets import check_greenlets
from ..streams.async_push import AsyncPushed
from ..streams.push import Pushed, name_of_view
from .responses import SSEResponse

__all__ = [
    "PushDecorator",
    "ViewDecorator",
    "check_framework",
    "decorator",
    "push_decorator",
    "show_signature",
    "signature_of",
]

P = ParamSpec("P")

Args = tuple[Any, ...]
Options = dict[str, Any]

_BY_POSITION = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


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


class PushDecorator(Protocol):
    """``@with_sse``, and ``@with_sse(…)`` with the options of `SSEResponse`."""

    @overload
    def __call__(self, view: Callable[..., Any], /) -> Callable[..., Any]: ...

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
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...


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


def signature_of(view: Callable[..., Any]) -> inspect.Signature:
    """Return a view's signature, as it is called; of any arguments if it tells none.

    That of a function which it wraps may be another: decorators add arguments.
    """
    try:
        return inspect.signature(view, follow_wrapped=False)
    except ValueError:  # a callable written in C
        return inspect.signature(lambda *args, **kwargs: None)


def show_signature(wrapper: Any, signature: inspect.Signature) -> None:
    """Have a decorated view show its arguments.

    Pyramid asks whether a view takes the request alone or a context, too, and does not
    follow ``__wrapped__``.
    """
    wrapper.__signature__ = signature


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

    def decorate(view: Callable[P, Any], options: Options) -> Callable[P, Any]:
        if inspect.iscoroutinefunction(view):
            raise TypeError(
                "@sse takes a generator view, synchronous or asynchronous, got the"
                f" coroutine function {view!r}: yield the events, or make it a def"
                " that returns SSEResponse(...), or use @with_sse, which gives it an"
                " object to send with"
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

        show_signature(wrapper, signature_of(view))
        return wrapper

    found: ViewDecorator = _with_options(
        "sse",
        decorate,
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
        """,
    )
    return found


def push_decorator(
    response: Callable[..., Any],
    *,
    prepare: Callable[[Any], Iterable[Any]] = _same,
    finish: Callable[[Any], Any] = _same,
) -> PushDecorator:
    """Return the decorator that turns a view which sends into an event stream.

    Args:
        response, finish: As for `decorator`.
        prepare: Called with the items of a plain view; returns the response's source.
    """

    def decorate(view: Callable[..., Any], options: Options) -> Callable[..., Any]:
        if inspect.isgeneratorfunction(view) or inspect.isasyncgenfunction(view):
            raise TypeError(
                f"@with_sse takes a view that sends, got {view!r}, which yields: use"
                " @sse, or sse.send(…) instead of yield"
            )
        is_async = inspect.iscoroutinefunction(view)
        if not is_async:
            check_greenlets("a plain view of @with_sse")
        call, name, framed = _Call(view), name_of_view(view), options["framed"]

        @functools.wraps(view)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if response is SSEResponse:
                check_framework("with_sse", args, kwargs)
            call.check(args, kwargs)
            bind = functools.partial(call.bind, args, kwargs)
            if is_async:
                source: Any = AsyncPushed(bind, name, framed=framed)
            else:
                source = prepare(Pushed(bind, name, framed=framed))
            return finish(response(source, **options))

        show_signature(wrapper, call.outer)
        return wrapper

    found: PushDecorator = _with_options(
        "with_sse",
        decorate,
        """Turn a view that sends events into one that streams.

        Use it as ``@with_sse`` or ``@with_sse(retry=…, end=…)``, below the framework's
        own decorator. The options are those of `SSEResponse`. The view gets one more
        argument, by its name ``sse`` if it has one of that name, else after the
        positional ones, with the methods ``send(data, event=None, id=None,
        retry=None)``, ``comment(text)`` and ``close()``. The stream ends when the view
        returns.

        Each ``send`` waits until the server has written the event. When the client has
        left, a plain view gets `ClientDisconnected` there, and where it waits; one that
        is a coroutine function awaits ``sse.send(…)``, and is cancelled. A plain view
        needs the package greenlet (the extra ``push``).

        A view cannot choose the response's status: see ``@sse``.

        Raises:
            ImportError: The view is plain, and greenlet is not installed.
            TypeError, ValueError: The view yields, takes no argument, or is no
                function; an option is wrong.
        """,
    )
    return found


class _Call:
    """How a view is called with its sender.

    Attributes:
        outer: The view's signature without the sender.
    """

    def __init__(self, view: Callable[..., Any]) -> None:
        self._view = view
        self._signature = signature_of(view)
        parameters = [*self._signature.parameters.values()]
        kinds = {parameter.kind for parameter in parameters}
        if not kinds - {inspect.Parameter.KEYWORD_ONLY} and not _named(parameters):
            raise TypeError(
                f"@with_sse gives the view one more argument, and {view!r} takes none:"
                " add sse to its arguments"
            )
        taken = _named(parameters) or [p for p in parameters if p.kind in _BY_POSITION]
        rest = [parameter for parameter in parameters if parameter not in taken[-1:]]
        self.outer = self._signature.replace(parameters=rest)
        # A decorator in between passes on what it does not know.
        if not _named(parameters) and inspect.Parameter.VAR_KEYWORD in kinds:
            parameters = _inner_parameters(view) or parameters
            kinds = {parameter.kind for parameter in parameters}
        named = _named(parameters)
        self._is_named = bool(named) or kinds == {inspect.Parameter.VAR_KEYWORD}
        self._index: int | None = None
        if named and named[0].kind in _BY_POSITION:
            self._index = parameters.index(named[0])

    def check(self, args: Args, kwargs: Mapping[str, Any]) -> None:
        """Check the arguments now, as a call of the view would.

        Raises:
            TypeError: The view takes others.
        """
        args, kwargs = self._all(args, kwargs, None)
        self._signature.bind(*args, **kwargs)

    def bind(
        self, args: Args, kwargs: Mapping[str, Any], sender: object
    ) -> Callable[[], Any]:
        """Return the view with all of its arguments."""
        args, kwargs = self._all(args, kwargs, sender)
        return functools.partial(self._view, *args, **kwargs)

    def _all(
        self, args: Args, kwargs: Mapping[str, Any], sender: object
    ) -> tuple[Args, Mapping[str, Any]]:
        if not self._is_named:
            return (*args, sender), kwargs
        index = self._index
        if index is not None and len(args) > index:  # by position, they reach it
            return (*args[:index], sender, *args[index:]), kwargs
        return args, {**kwargs, "sse": sender}


def _named(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    """Return the parameter ``sse`` that can be given by that name, if there is one."""
    return [p for p in parameters if p.name == "sse" and p.kind in _BY_NAME]


def _inner_parameters(view: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of the view that a decorator's function wraps.

    It may be empty: there is none, or it takes no ``sse`` by name.
    """
    inner = inspect.unwrap(view)
    parameters = [*signature_of(inner).parameters.values()]
    return parameters if _named(parameters) else []


def _with_options(name: str, decorate: Callable[[Any, Options], Any], text: str) -> Any:
    """Return a decorator that may be given options first, those of `SSEResponse`.

    Args:
        name: The decorator's name.
        decorate: Decorates a view, with the options.
        text: The decorator's docstring.
    """

    def named(
        view: Callable[..., Any] | None = None,
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
        options: Options = {
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
        # Wrong options fail here, not in every request.
        SSEResponse([], **options)

        def checked(view: Callable[..., Any]) -> Any:
            if not callable(view):
                raise TypeError(f"@{name} takes a view function, got {view!r}")
            return decorate(view, options)

        return checked if view is None else checked(view)

    named.__name__ = named.__qualname__ = name
    named.__doc__ = inspect.cleandoc(text)
    return named
