"""Running a coroutine in the process's event loop, while its caller waits."""

from __future__ import annotations

import logging
from collections.abc import Coroutine
from contextvars import Context, copy_context
from typing import Any, TypeVar

from .clock import time
from .event_loop import EventLoop, event_loop
from .journal import journal
from .waiter import Turn
from .waiting import LONGEST

__all__ = ["run_coroutine"]

log = logging.getLogger("syncstream.stream")

T = TypeVar("T")


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine as a task of the process's event loop; wait for its result.

    It runs in a copy of the caller's context, and the context variables that it sets
    are set for the caller. A caller that is interrupted (by a signal's handler,
    gevent's ``Timeout``) cancels it.

    Raises:
        RuntimeError: The caller runs in the event loop; or the coroutine was cancelled,
            though not by its caller.
        BaseException: What the coroutine raises.
    """
    loop = event_loop()
    if loop.is_here:
        coroutine.close()
        raise RuntimeError(
            "an asynchronous view cannot be called in an asynchronous source: await it"
        )
    run = _Run(coroutine, loop)
    run.wait()
    try:
        result: T = run.take()
        return result
    finally:
        del run  # an error's traceback has this frame


class _Run:
    """One coroutine's task, and what has become of it."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], loop: EventLoop) -> None:
        self._name = getattr(coroutine, "__qualname__", repr(coroutine))
        self._coroutine: Coroutine[Any, Any, Any] | None = coroutine
        self._loop = loop
        self._turn = Turn()
        self._task: Any = None
        self._is_left = False  # nobody waits for the result
        self._result: Any = None
        self._error: BaseException | None = None
        self._context: Context = copy_context()

    # In the caller's thread.

    def wait(self) -> None:
        """Start it, and wait until it has ended; cancel it if that is interrupted."""
        try:
            self._loop.start(self._run(), copy_context())
            while not self._turn.wait(time.monotonic() + LONGEST):
                pass
        except BaseException:
            try:
                self._loop.call(self._leave)
            except RuntimeError:  # the loop has ended, with the process
                self._leave()
            raise

    def take(self) -> Any:
        """Return the result, and set the context variables that it has set."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise _for_caller(error, self._name)
            finally:
                error = None  # its traceback has this frame
        before = copy_context()
        for variable, value in self._context.items():
            if variable not in before or before[variable] is not value:
                variable.set(value)
        return self._result

    # In the loop's thread.

    async def _run(self) -> None:
        import asyncio

        self._task = asyncio.current_task()
        coroutine, self._coroutine = self._coroutine, None
        if coroutine is None:
            return  # its caller has gone already
        try:
            self._result = await coroutine
        except BaseException as error:
            self._error = error
        finally:
            self._context = copy_context()
            self._task = None
            self._turn.end()
            self._log_late()

    def _leave(self) -> None:
        self._is_left = True
        if self._task is not None:
            self._task.cancel()
        elif self._coroutine is not None:  # its task has not begun
            self._coroutine.close()
            self._coroutine = None
        self._log_late()

    def _log_late(self) -> None:
        """Log an error for which nobody waits, unless it is our cancel."""
        if not self._is_left or self._error is None:
            return
        error, self._error = self._error, None
        if not _is_cancel(error):
            text = "the coroutine %s has failed after its caller had gone"
            journal().later(log, logging.WARNING, text, self._name, error=error)


def _for_caller(error: BaseException, name: str) -> BaseException:
    """Return the error for a caller who is no task, to whom no cancel applies."""
    if not _is_cancel(error):
        return error
    found = RuntimeError(f"the coroutine {name} was cancelled")
    found.__cause__ = error
    return found


def _is_cancel(error: BaseException) -> bool:
    import asyncio

    return isinstance(error, asyncio.CancelledError)
