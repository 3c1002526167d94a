"""`batched`: events in lists, by their number and by time."""

from __future__ import annotations

import queue
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Callable,
    Generator,
    Iterable,
    Iterator,
)
from contextlib import AsyncExitStack, ExitStack
from typing import Any, Generic, TypeVar, overload

from ..channels.subscription import Subscription
from ..protocol.sse import Event
from ..runtime.backoff import checked_seconds
from ..runtime.clock import time
from ..runtime.waiting import wait
from ..streams.async_source import is_async
from ..streams.source import check_source, name_of_source
from .ends import aclose, close

__all__ = ["AsyncBatches", "Batches", "batched"]

T = TypeVar("T")

_SHUT_DOWN: Any = getattr(queue, "ShutDown", ())  # none before Python 3.13


@overload
def batched(
    events: Subscription, *, max: int, within: float | None = None
) -> Batches[Event]: ...


@overload
def batched(
    events: queue.Queue[T], *, max: int, within: float | None = None
) -> Batches[T]: ...


@overload
def batched(
    events: AsyncIterable[T], *, max: int, within: float | None = None
) -> AsyncBatches[T]: ...


@overload
def batched(events: Iterable[T], *, max: int) -> Batches[T]: ...


def batched(events: Any, *, max: int, within: float | None = None) -> Any:
    """Return a source of lists of events, none of them empty, oldest event first.

    Traps of the naive forms: `itertools.batched` loses the events that it holds when
    its source fails. A loop that looks at the clock after each event keeps the last
    ones of a burst until another event comes. And ``asyncio.wait_for(anext(…), 1)``
    cancels the source when the time is over, which ends an asynchronous generator.

    A normal end sends the rest; an error sends the rest, and is then raised. Nothing is
    sent after the client has left. The wait ends at once when the client leaves, as
    `syncstream.sleep` does. Closing this, or its end, closes ``events`` exactly once.

    A list is one item of a stream, so make an event of it whose id is that of the last
    one in the list: a client then resumes after the list.

    Args:
        events: A subscription, a ``queue.Queue`` or one like it (see `Stream.wait`), an
            asynchronous source or any iterable. A queue ends when it is shut down
            (``queue.ShutDown``, Python 3.13), and is not closed. An asynchronous source
            is read in a task of its own, at most ``max`` events ahead.
        max: The number of events in a list, at most.
        within: Seconds that an event is held, at most, counted from when it is read.
            Without it, ``None``, a list is sent when it has ``max`` events. Only what
            can be waited for has it: nothing interrupts a plain generator that waits.

    Returns:
        An iterator with ``close()``, for an asynchronous source an asynchronous one
        with ``aclose()``.

    Raises:
        TypeError, ValueError: An argument is wrong; ``within`` is given for a plain
            iterable.
    """
    if isinstance(max, bool) or not isinstance(max, int):
        raise TypeError(f"max must be an int, got {max!r}")
    if max < 1:
        raise ValueError(f"max must be 1 or more, got {max!r}")
    if within is not None:
        within = checked_seconds("within", within)
    if is_async(events):
        return AsyncBatches(events, max, within)
    if not isinstance(events, Subscription) and not _is_queue(events):
        check_source(events)
        if within is not None:
            raise TypeError(
                "within needs a subscription, a queue or an asynchronous source, as"
                f" nothing interrupts another's wait, got {events!r}: have a thread put"
                " its events into a queue.Queue"
            )
    return Batches(events, max, within)


def _is_queue(events: object) -> bool:
    return hasattr(events, "get") and hasattr(events, "put")


class Batches(Generic[T]):
    """The lists of a subscription's, a queue's or an iterable's events: see `batched`.

    One thread or greenlet reads and closes it.
    """

    def __init__(self, source: Any, max: int, within: float | None) -> None:
        self.__qualname__ = name_of_source(source)  # for the log
        self._closing = ExitStack()
        if not _is_queue(source):
            self._closing.callback(close, source)
        self._batches = _run(self._closing, source, max, within)

    def __iter__(self) -> Iterator[list[T]]:
        return self

    def __next__(self) -> list[T]:
        return next(self._batches)

    def close(self) -> None:
        """Close the source; events that are held are dropped."""
        with self._closing:  # also if the generator has not begun
            self._batches.close()


def _run(
    closing: ExitStack, source: Any, max: int, within: float | None
) -> Generator[list[Any], None, None]:
    with closing:
        yield from _lists(_reader_of(source, closing), max, within)


def _reader_of(source: Any, closing: ExitStack) -> Callable[[float | None], list[Any]]:
    """Return a function that waits for events, some seconds at most.

    It returns an empty list after a time-out, and raises `StopIteration` at the end.
    """
    if isinstance(source, Subscription):
        return source.read
    if _is_queue(source):
        return _QueueReader(source)
    iterator = iter(source)
    if iterator is not source:
        closing.callback(close, iterator)
    return lambda timeout: [next(iterator)]


class _QueueReader:
    def __init__(self, items: Any) -> None:
        self._items = items

    def __call__(self, timeout: float | None) -> list[Any]:
        try:
            return [wait(self._items, timeout)]
        except queue.Empty:
            return []
        except _SHUT_DOWN:
            raise StopIteration from None


def _lists(
    read: Callable[[float | None], list[T]], max: int, within: float | None
) -> Generator[list[T], None, None]:
    held: list[T] = []
    until = 0.0  # when the first one held must be sent
    while True:
        timeout = None if within is None or not held else until - time.monotonic()
        found: list[T] = []
        if timeout is None or timeout > 0:
            try:
                found = read(timeout)
            except StopIteration:
                if held:
                    yield held
                return
            except Exception:
                if held:
                    yield held
                raise
        came = time.monotonic()
        if not held:
            until = came + (within or 0.0)
        held += found
        while len(held) >= max:
            yield held[:max]
            del held[:max]
            until = came + (within or 0.0)  # the rest has come with this read
        if held and within is not None and time.monotonic() >= until:
            yield held
            held = []


class AsyncBatches(Generic[T]):
    """The lists of an asynchronous source's events: see `batched`."""

    def __init__(
        self, source: AsyncIterable[T], max: int, within: float | None
    ) -> None:
        name = getattr(source, "__qualname__", None) or type(source).__qualname__
        self.__qualname__ = f"batched({name})"  # for the log
        self._closing = AsyncExitStack()
        self._closing.push_async_callback(aclose, source)
        self._batches = _arun(self._closing, source, max, within)

    def __aiter__(self) -> AsyncBatches[T]:
        return self

    async def __anext__(self) -> list[T]:
        return await anext(self._batches)

    async def aclose(self) -> None:
        """Cancel and close the source; events that are held are dropped."""
        async with self._closing:  # also if the generator has not begun
            await self._batches.aclose()


async def _arun(
    closing: AsyncExitStack,
    source: AsyncIterable[T],
    max: int,
    within: float | None,
) -> AsyncGenerator[list[T], None]:
    import asyncio

    loop = asyncio.get_running_loop()
    held: list[T] = []
    until = 0.0  # when the first one held must be sent
    changed, taken = asyncio.Event(), asyncio.Event()

    async def read() -> None:
        nonlocal until
        async with closing:
            iterator = aiter(source)
            if iterator is not source:
                closing.push_async_callback(aclose, iterator)
            async for item in iterator:
                if not held:
                    until = loop.time() + (within or 0.0)
                held.append(item)
                changed.set()
                while len(held) >= max:
                    taken.clear()
                    await taken.wait()

    # One task for all of it, for what the source has entered belongs to its task:
    # time-outs, task groups and cancel scopes.
    task = loop.create_task(read())
    task.add_done_callback(lambda _: changed.set())
    try:
        while held or not task.done():
            changed.clear()
            is_late = within is not None and loop.time() >= until
            if held and (is_late or len(held) >= max or task.done()):
                batch = held.copy()
                held.clear()
                taken.set()
                yield batch
                continue
            timer = None
            if held and within is not None:
                timer = loop.call_at(until, changed.set)
            try:
                await changed.wait()
            finally:
                if timer is not None:
                    timer.cancel()
    except BaseException:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()  # the source has failed, or its end has
        raise
    task.result()
