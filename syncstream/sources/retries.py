"""`retrying`: one source out of as many attempts as it takes."""

from __future__ import annotations

import inspect
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
)
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from typing import Any, TypeVar, overload

from ..errors import Closed, Denied
from ..protocol.sse import id_of
from ..runtime.backoff import Backoff, checked_waits
from ..runtime.waiting import sleep
from ..streams.async_source import is_async
from ..streams.source import check_source
from .ends import aclose, close

__all__ = ["retrying"]

T = TypeVar("T")

Failures = type[Exception] | tuple[type[Exception], ...]
OnError = Callable[[Exception], object]

_FINAL = (Closed, Denied)  # a kick, or missing rights: another attempt changes nothing


@overload
def retrying(
    make: Callable[[str | None], Iterable[T]],
    *,
    on: Failures,
    attempts: int | None = 10,
    backoff: tuple[float, float] = (1.0, 30.0),
    last_event_id: str | None = None,
    on_error: OnError | None = None,
) -> Generator[T, None, None]: ...


@overload
def retrying(
    make: Callable[[str | None], AsyncIterable[T] | Awaitable[AsyncIterable[T]]],
    *,
    on: Failures,
    attempts: int | None = 10,
    backoff: tuple[float, float] = (1.0, 30.0),
    last_event_id: str | None = None,
    on_error: OnError | None = None,
) -> AsyncGenerator[T, None]: ...


def retrying(
    make: Any,
    *,
    on: Failures,
    attempts: int | None = 10,
    backoff: tuple[float, float] = (1.0, 30.0),
    last_event_id: str | None = None,
    on_error: OnError | None = None,
) -> Any:
    """Return a source that begins again when it fails, after its last event.

    Three traps of a loop with ``try`` and ``sleep``: a generator that has raised is
    over, so asking it again ends the stream without an error; one that is made anew
    begins at its first event, so clients get events twice; and a plain ``sleep`` goes
    on after the client has left.

    Here the wait ends at once when the client leaves, as `syncstream.sleep` does, or
    when an asynchronous source is cancelled. Each source is closed once, before the
    wait. A normal end is the end. Errors of the consumer's, such as an item that cannot
    be encoded, are raised in the source at its ``yield`` and are never retried; nor are
    `ClientDisconnected` and other ends of the stream, nor `Closed` and `Denied`.

    Args:
        make: Makes the source. It is called for each attempt with the id of the last
            event that was taken, ``None`` before the first one, and should begin after
            it. The id is that of an `Event`, of a mapping of an event's fields, or of
            an object with ``.data``; an id of ``""`` counts as ``None``. An ``async
            def`` function, which returns or is an asynchronous generator, makes an
            asynchronous source; errors of ``make`` itself are retried, too.
        on: The exceptions to retry after, one class or a tuple of them.
        attempts: After so many failures in a row the last error is raised. An item
            other than ``None`` ends the row. ``None``: no limit.
        backoff: The first and the longest wait, in seconds. Each failure in a row
            doubles it, at random down to a half. The first is at random up to a quarter
            longer, so that sources which fail together do not return together.
        last_event_id: Where the first attempt begins, such as `last_event_id(request)`.
        on_error: Called with the error before each wait, for a log; what it raises ends
            the source. It must not block in an asynchronous source.

    Returns:
        A generator; an asynchronous one if ``make`` is an ``async def`` function.

    Raises:
        TypeError, ValueError: An argument is wrong.
    """
    if not callable(make):
        raise TypeError(
            "make must be a function that takes the last event id and returns a new"
            f" source, got {make!r}: a source that has failed cannot be begun again"
        )
    if on_error is not None and (
        not callable(on_error) or inspect.iscoroutinefunction(on_error)
    ):
        raise TypeError(f"on_error must be a plain function or None, got {on_error!r}")
    if last_event_id is not None and not isinstance(last_event_id, str):
        raise TypeError(f"last_event_id must be a str or None, got {last_event_id!r}")
    retries = _Retries(
        _checked_failures(on),
        _checked_attempts(attempts),
        Backoff(*checked_waits(backoff)),
        last_event_id or None,
        on_error,
    )
    items: Any
    if inspect.isasyncgenfunction(make) or inspect.iscoroutinefunction(make):
        items = _async_items(make, retries)
    else:
        items = _items(make, retries)
    # The log calls a source by this name.
    items.__qualname__ = f"retrying({getattr(make, '__qualname__', repr(make))})"
    return items


def _checked_failures(on: Any) -> tuple[type[Exception], ...]:
    kinds = on if isinstance(on, tuple) else (on,)
    if not kinds or not all(
        isinstance(k, type) and issubclass(k, Exception) for k in kinds
    ):
        raise TypeError(
            "on must be a subclass of Exception, such as ConnectionError, or a tuple of"
            f" them, got {on!r}"
        )
    return kinds


def _checked_attempts(attempts: int | None) -> int | None:
    if attempts is None:
        return None
    if isinstance(attempts, bool) or not isinstance(attempts, int):
        raise TypeError(f"attempts must be an int or None, got {attempts!r}")
    if attempts < 1:
        raise ValueError(f"attempts must be 1 or more, or None, got {attempts!r}")
    return attempts


class _Retries:
    """The attempts so far, and whether another one follows.

    Attributes:
        on: The exceptions to retry after.
        last_event_id: Where the next attempt begins.
        is_final: Whether no other follows, whatever is raised from now on: the source
            has finished, or the consumer's error is on its way back.
    """

    def __init__(
        self,
        on: tuple[type[Exception], ...],
        attempts: int | None,
        backoff: Backoff,
        last_event_id: str | None,
        on_error: OnError | None,
    ) -> None:
        self.on = on
        self.last_event_id = last_event_id
        self.is_final = False
        self._attempts = attempts
        self._backoff = backoff
        self._on_error = on_error
        self._failures = 0  # in a row

    def note(self, item: object) -> None:
        """Note an item that the consumer has taken."""
        if item is None:
            return
        self._failures = 0
        self._backoff.reset()
        id = id_of(item)
        if id is not None:
            self.last_event_id = id or None

    def ends_with(self, error: Exception) -> bool:
        """Note an error of the ones to retry after; tell whether it is the last."""
        if self.is_final or isinstance(error, _FINAL):
            return True
        self._failures += 1
        if self._failures == self._attempts:
            return True
        self._backoff.fail()
        if self._on_error is not None:
            self._on_error(error)
        return False

    def seconds(self) -> float:
        """Return how long to wait before the next attempt."""
        return self._backoff.seconds()


def _items(
    make: Callable[[str | None], Iterable[T]], retries: _Retries
) -> Generator[T, None, None]:
    while True:
        try:
            yield from _attempt(make, retries)
            return
        except retries.on as error:
            if retries.ends_with(error):
                raise
        sleep(retries.seconds())


def _attempt(
    make: Callable[[str | None], Iterable[T]], retries: _Retries
) -> Generator[T, None, None]:
    with ExitStack() as closing:
        source = make(retries.last_event_id)
        closing.callback(close, source)
        check_source(source)
        if is_async(source):
            raise TypeError(
                "make must be an `async def` function, or a functools.partial of one,"
                f" to return an asynchronous source, got {make!r}"
            )
        iterator = iter(source)
        if iterator is not source:
            closing.callback(close, iterator)
        yield from _passed(iterator, retries)


def _passed(iterator: Iterator[T], retries: _Retries) -> Generator[T, None, None]:
    """Pass the items on, and the consumer's errors back."""
    throw = getattr(iterator, "throw", None)
    step: Callable[[], T] = iterator.__next__
    thrown: Exception | None = None
    while True:
        try:
            item = step()
        except StopIteration:
            retries.is_final = True
            return
        except Exception as error:
            retries.is_final = error is thrown
            raise
        finally:  # or the error would keep its own frames
            step, thrown = iterator.__next__, None
        try:
            yield item
        except Exception as error:
            if throw is None:
                retries.is_final = True
                raise
            step, thrown = partial(throw, error), error
        else:
            retries.note(item)


async def _async_items(
    make: Callable[[str | None], Any], retries: _Retries
) -> AsyncGenerator[Any, None]:
    import asyncio

    while True:
        # In one function: an asynchronous generator cannot pass errors on to another.
        source: Any = None
        iterator: Any = None
        step: Any
        thrown: Exception | None = None
        try:
            async with AsyncExitStack() as closing:
                source = make(retries.last_event_id)
                if inspect.isawaitable(source):
                    source = await source
                closing.push_async_callback(aclose, source)
                if not is_async(source):
                    raise TypeError(
                        "make is an `async def` function and must return an"
                        f" asynchronous source, got {source!r}"
                    )
                iterator = aiter(source)
                if iterator is not source:
                    closing.push_async_callback(aclose, iterator)
                step = iterator.__anext__
                while True:
                    try:
                        item = await step()
                    except StopAsyncIteration:
                        retries.is_final = True
                        return
                    except Exception as error:
                        retries.is_final = error is thrown
                        raise
                    finally:
                        step, thrown = iterator.__anext__, None
                    try:
                        yield item
                    except Exception as error:
                        if not hasattr(iterator, "athrow"):
                            retries.is_final = True
                            raise
                        step, thrown = partial(iterator.athrow, error), error
                    else:
                        retries.note(item)
        except retries.on as error:
            if retries.ends_with(error):
                raise
        source = iterator = step = None
        await asyncio.sleep(retries.seconds())
