"""One asynchronous source's task, in the process's event loop.

The task makes one item at a time, when it is asked for one. What a generator would be
told by its caller, it is told by its task: the client's leaving cancels the task, which
raises CancelledError where the source awaits; at a ``yield`` it is closed, and gets
GeneratorExit. Either way ``aclose()`` is awaited.

For the loop of `fanout` the source goes on before its last item was taken, unless it
has made that without waiting for anything, or is a view that waits for what it sends;
one item waits until it is taken, and with the next one the source waits, too. To wake
the event loop for each item costs more than to send it.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Generator
from contextvars import copy_context
from functools import partial
from opcode import opmap
from typing import Any

from ..runtime.clock import time
from ..runtime.event_loop import EventLoop, event_loop
from ..runtime.journal import journal
from ..runtime.process import process
from ..runtime.tasks import task_scope
from ..runtime.waiter import Wakeable, wake_all
from ..runtime.waiting import gevent_hub_of_thread, runner
from .answers import failure_of
from .links import AGAIN, Link, unblock

__all__ = ["CLOSE_WAIT", "SourceTask", "Timed"]

log = logging.getLogger("syncstream.stream")

_NOTHING = object()  # where there may be an item

BLOCKED = 0.1  # seconds for which a source may keep the loop from the others
CLOSE_WAIT = 5.0  # seconds in which a source should have ended after its cancel


class SourceTask:
    """One source's task, and the answers that it gives.

    Its reader asks for an item, and is woken when there is an answer; the task of a
    source that is never asked is begun by its end, unless that cannot matter. One
    thread at a time reads, the rest may come from any.

    Args:
        source: The source. Its task runs in a copy of the context that is the current
            one now.

    Attributes:
        name: The source's name and place in the code, for the log.
        has_begun: Whether the task was started.
        has_answered: Whether there is an answer to `take`.
        encode: Turns an item into the answer, ``None`` for no answer yet. What it
            raises is thrown into the source. ``None``: items are answers themselves.
    """

    def __init__(self, source: AsyncIterable[Any]) -> None:
        self.name = _name_of(source)
        self._source: AsyncIterable[Any] | None = source
        self._context = copy_context()
        self._running: EventLoop | None = None
        self._waiter: Wakeable | None = None
        self.has_answered = False
        self.encode: Callable[[Any], Any] | None = None
        self._item: Any = _NOTHING
        self._error: BaseException | None = None
        self._thrown: BaseException | None = None
        self._future: Any = None  # that the task awaits between two items
        self._is_asked = False
        self._is_over = False  # it is to end, or has no more items
        self._has_ended = False
        self._is_left = False  # nobody waits for its end
        self._told: list[Callable[[], object]] = []  # called at its end
        self._task: Any = None

    # From the thread that reads.

    def run_for(self, stream: Callable[[], Any]) -> None:
        """Set the stream, by a weak reference, that the source finds as its own."""
        self._context.run(task_scope.set, stream)

    @property
    def has_begun(self) -> bool:
        return self._running is not None

    @property
    def is_unstarted(self) -> bool:
        """Whether no code of the source has run, so that nothing is to be closed."""
        return not self.has_begun and _is_unstarted(self._source)

    @property
    def _loop(self) -> EventLoop:
        """The loop that runs it, which it is begun in now if it was in none."""
        loop = self._running
        if loop is None:
            loop = self._running = event_loop()
            loop.start(self._run(), self._context.copy())
        return loop

    def ask(self, error: BaseException | None, waiter: Wakeable) -> None:
        """Have the next item made; the waiter is woken when `has_answered`.

        Args:
            error: Raised in the source, instead of going on after its ``yield``.
            waiter: Whom to wake.

        Raises:
            RuntimeError: No loop can be started, or it has ended with the process.
        """
        self._thrown, self._waiter = error, waiter
        self.has_answered = False
        # In this order: a task that is about to wait says so, and then looks at this.
        self._is_asked = True
        if self._future is not None or self._is_over or not self.has_begun:
            self._waiter = waiter  # an end in between has forgotten it
            self._loop.call(self._asked)

    def take(self) -> Any:
        """Return the item, or raise what the source has raised.

        Raises:
            StopIteration: The source has finished.
        """
        self.has_answered = False
        item, self._item = self._item, _NOTHING
        if item is not _NOTHING:  # the end may have come since
            return item
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                error = None  # its traceback has this frame
        raise StopIteration

    def end(
        self,
        told: Callable[[], object],
        within: float | None = None,
        links: deque[Link] | None = None,
    ) -> None:
        """Cancel it, and call a function, in the loop, when it has ended.

        Args:
            told: The function, which is called once.
            within: Call it after so many seconds at the latest; ``None``: no limit.
            links: What the source has linked: reads of these are ended, until then.

        Raises:
            RuntimeError: As from `ask`.
        """
        if links is not None:
            self._loop.call(partial(self._cut, links))
        self._loop.call(partial(self._end, told, within))

    def leave(self) -> None:
        """Cancel it; log what it raises at its end, for which nobody waits."""
        self._loop.call(self._leave)

    def must_not_wait(self) -> bool:
        """Tell whether a wait for its end would hold up this thread's event loop."""
        hub = gevent_hub_of_thread()
        return self._loop.is_here or (hub is not None and runner() is hub)

    def take_late(self) -> BaseException | None:
        """Return what the source has raised at its end, ``None`` for nothing."""
        error, self._error = self._error, None
        return error

    def say_late(self, seconds: float) -> None:
        """Log that it goes on, so many seconds after its cancel."""
        text = (
            "%s has not ended within %g s after its cancel: its stream has ended"
            " without it"
        )
        journal().later(log, logging.WARNING, text, self.name, seconds)

    # In the loop's thread.

    def _asked(self) -> None:
        if self._is_over:  # before it was asked: others may cancel it, too
            self._answer()
        elif self._future is not None and not self._future.done():
            self._future.set_result(None)

    def _go_on(self) -> None:
        """Go on after a checkpoint; others have had their turn."""
        self._is_asked = True
        self._asked()

    def _end(self, told: Callable[[], object], within: float | None) -> None:
        if self._has_ended:
            told()
            return
        self._told.append(told)
        self._cancel()
        if within is not None:
            import asyncio

            loop = asyncio.get_running_loop()
            timer = loop.call_later(within, self._end_late, told, within)
            self._told.append(timer.cancel)

    def _cut(self, links: deque[Link]) -> None:
        """Unblock the threads that read for the source, again and again."""
        self.encode = None
        if self._has_ended or self._is_left or not links:
            return
        import asyncio

        unblock(links.copy(), lambda: not self._has_ended, is_waiting=False)
        asyncio.get_running_loop().call_later(AGAIN, self._cut, links)

    def _end_late(self, told: Callable[[], object], seconds: float) -> None:
        """Handle that it has not ended in time."""
        self._told.remove(told)
        self.say_late(seconds)
        told()
        self._is_left = True

    def _leave(self) -> None:
        self._is_left = True
        self._cancel()
        if self._has_ended:
            self._log_late()

    def _cancel(self) -> None:
        if not self._is_over:
            self._is_over = True
            if self._task is not None:
                self._task.cancel()

    def _log_late(self) -> None:
        error = self.take_late()
        if error is not None:
            text = "%s failed at its end"
            journal().later(log, logging.ERROR, text, self.name, error=error)

    def _answer(self) -> None:
        self.has_answered = True
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            wake_all([waiter])

    async def _run(self) -> None:
        import asyncio

        self._task = asyncio.current_task()
        iterator: AsyncIterator[Any] | None = None
        step: Any
        timed: Timed | None
        thrown: BaseException | None = None
        is_asked = is_ahead = False  # for an item; it may be made before
        source = self._source
        assert source is not None
        may_go_ahead = not getattr(source, "must_be_asked", False)
        try:
            while not self._is_over:
                if thrown is None and not (is_asked or is_ahead):
                    thrown, is_asked = await self._await_ask(), True
                if iterator is None:
                    iterator = _iterator_of(source, self.name)
                if thrown is None:
                    step = iterator.__anext__()
                else:
                    step = _thrown_into(iterator, thrown)
                    thrown = None
                timed = Timed(step, self.name, iterator)
                item = await timed
                # Otherwise others would never have their turn.
                is_ahead = may_go_ahead and timed.has_waited and self.encode is not None
                step = timed = None
                if not is_asked:  # the item before is still to be taken
                    thrown, is_asked = await self._await_ask(), True
                if self.encode is not None and not self._is_over:
                    try:
                        item = self._encoded(item, iterator)
                    except BaseException as error:
                        # Thrown at the yield, the user's line is in its traceback.
                        thrown = thrown or error
                        continue
                    if item is None:  # a checkpoint
                        is_asked = is_ahead = False
                        asyncio.get_running_loop().call_soon(self._go_on)
                        continue
                if not self._is_over:
                    self._item, is_asked = item, False
                    self._answer()
                item = None
        except StopAsyncIteration:
            pass
        except BaseException as error:
            if not (self._is_over and isinstance(error, asyncio.CancelledError)):
                self._error = failure_of(error, self.name)
        # Told before it is closed, which may take long.
        self._is_over = True
        self._answer()
        try:
            await self._aclose(iterator)
        finally:
            iterator = source = step = timed = thrown = None
            self._source = self._future = self._task = None
            self._has_ended = True
            if self._is_left:
                self._log_late()
            for told in self._told:
                told()

    def _encoded(self, item: Any, place: Any) -> Any:
        assert self.encode is not None
        began = time.monotonic()
        try:
            return self.encode(item)
        finally:
            seconds = time.monotonic() - began
            if seconds > BLOCKED:
                _note_step(self.name, seconds, place)

    async def _await_ask(self) -> BaseException | None:
        """Wait until an item is asked for.

        Returns:
            What to throw into the source at its ``yield``, where it stands: the
            asker's error, or the cancellation of a task group or a time-out of the
            source's, which are not ours.
        """
        import asyncio

        found: BaseException | None = None
        loop = asyncio.get_running_loop()
        while True:
            # Before it looks: see `ask`.
            future = self._future = loop.create_future()
            if self._is_asked:
                break
            try:
                await future
            except asyncio.CancelledError as error:
                if self._is_over:
                    raise
                found = error
        self._future, self._is_asked = None, False
        thrown, self._thrown = self._thrown, None
        return found or thrown

    async def _aclose(self, iterator: AsyncIterator[Any] | None) -> None:
        """Close the iterator, and what it was made of."""
        closables: list[Any] = [iterator] if iterator is not None else []
        if iterator is not self._source:
            closables.append(self._source)
        for closable in closables:
            try:
                await Timed(_closing(closable), self.name, closable)
            except BaseException as error:
                # One that has yielded while it was closed cannot be closed again: it
                # ends when it is freed.
                is_silent = _has_yielded(error) or _is_cancel(error)
                if self._error is None and not is_silent:
                    self._error = error


class Timed:
    """Awaits an awaitable, and logs a step of it that keeps the loop for long.

    Args:
        awaitable: The awaitable.
        name: The name of the source that it is of, for the log.
        place: The generator or coroutine whose line is logged.

    Attributes:
        has_waited: Whether others of the loop have had their turn meanwhile.
    """

    __slots__ = ("_awaitable", "_name", "_place", "has_waited")

    def __init__(self, awaitable: Any, name: str, place: Any) -> None:
        self._awaitable, self._name, self._place = awaitable, name, place
        self.has_waited = False

    def __await__(self) -> Generator[Any, None, Any]:
        awaitable = self._awaitable
        if not hasattr(awaitable, "__await__"):  # of `types.coroutine`
            awaitable = _awaited(awaitable)
        steps: Any = awaitable.__await__()
        monotonic, thrown = time.monotonic, None
        while True:
            began = monotonic()
            try:
                future = next(steps) if thrown is None else _throw(steps, thrown)
            except StopIteration as stop:
                return stop.value
            finally:
                thrown = None
                seconds = monotonic() - began
                if seconds > BLOCKED:
                    _note_step(self._name, seconds, self._place)
            self.has_waited = True
            try:
                yield future
            except BaseException as error:
                thrown = error


def _note_step(name: str, seconds: float, place: Any) -> None:
    """Say, once a process, that a source has held the loop up, and where."""
    process().say_once(
        log,
        logging.WARNING,
        name.replace("%", "%%")
        + " has blocked the event loop for %.2f s, before %s: all other"
        " asynchronous sources had to wait. Await a coroutine instead of a call"
        " that waits or computes, or use `await asyncio.to_thread(call)`",
        seconds,
        _place_of(place),
    )


def _throw(steps: Any, error: BaseException) -> Any:
    if not hasattr(steps, "throw"):
        raise error
    return steps.throw(error)


def _iterator_of(source: AsyncIterable[Any], name: str) -> AsyncIterator[Any]:
    try:
        return source.__aiter__()
    except StopAsyncIteration as error:
        raise failure_of(error, name) from error


def _thrown_into(iterator: Any, error: BaseException) -> Awaitable[Any]:
    athrow = getattr(iterator, "athrow", None)
    if athrow is None:
        raise failure_of(error, "the encoding of an item")
    found: Awaitable[Any] = athrow(error)
    return found


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


async def _closing(closable: Any) -> None:
    close = getattr(closable, "aclose", None) or getattr(closable, "close", None)
    if close is not None:
        result = close()
        if inspect.isawaitable(result):
            await result


def _has_yielded(error: BaseException) -> bool:
    return type(error) is RuntimeError and error.args == (
        "async generator ignored GeneratorExit",
    )


def _is_cancel(error: BaseException) -> bool:
    import asyncio

    return isinstance(error, asyncio.CancelledError)


def _is_unstarted(source: object) -> bool:
    if getattr(source, "is_unstarted", False) is True:  # a view's, of `async_push`
        return True
    if not inspect.isasyncgen(source) or source.ag_frame is None:
        return False
    is_suspended: bool | None = getattr(source, "ag_suspended", None)
    if is_suspended is not None:  # from Python 3.12 on
        return not (is_suspended or source.ag_running)
    last = source.ag_frame.f_lasti
    return last < 0 or source.ag_code.co_code[last] == opmap.get("RETURN_GENERATOR")


def _name_of(source: object) -> str:
    name = getattr(source, "__qualname__", None) or type(source).__qualname__
    code = getattr(source, "ag_code", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return f"the asynchronous source {name}{place}"


def _place_of(source: Any) -> str:
    """Return the source's own line where it stands now, and what it awaits there."""
    places = []
    awaited = source
    while awaited is not None:
        frame = getattr(awaited, "ag_frame", None) or getattr(awaited, "cr_frame", None)
        if frame is None:
            break
        places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        awaited = getattr(awaited, "ag_await", None) or getattr(
            awaited, "cr_await", None
        )
    if not places:
        return "a place that is not known"
    return places[0] if len(places) == 1 else f"{places[0]} (in {places[-1]})"
