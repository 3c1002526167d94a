"""Asynchronous sources, for a thread or greenlet that waits: see `async_task`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable
from contextlib import suppress
from typing import Any, TypeGuard

from ..runtime.clock import time
from ..runtime.journal import journal
from ..runtime.waiter import Turn, Waiter
from ..runtime.waiting import LONGEST
from .async_task import CLOSE_WAIT, SourceTask

__all__ = ["AsyncItems", "is_async"]

log = logging.getLogger("syncstream.stream")


def is_async(source: object) -> TypeGuard[AsyncIterable[Any]]:
    """Tell whether a source can be iterated by ``async for`` only."""
    return hasattr(source, "__aiter__") and not hasattr(source, "__iter__")


class AsyncItems:
    """The items of an asynchronous source, for a thread or greenlet that waits.

    It is an iterator like a generator: an error that is thrown is raised at the
    source's ``yield``. ``close`` cancels the source's task and waits for its end, some
    seconds at most.

    Args:
        source: The asynchronous source. Its task runs in a copy of the context that is
            the current one now.

    Attributes:
        task: The source's task; ``None`` once it is closed, or another's.
        name: The source's name and place in the code, for the log.
    """

    def __init__(self, source: AsyncIterable[Any]) -> None:
        self.task: SourceTask | None = SourceTask(source)
        self.name = self.task.name
        self._waiter: Waiter | None = None

    def __iter__(self) -> AsyncItems:
        return self

    def __next__(self) -> Any:
        return self._get(None)

    def throw(self, error: BaseException) -> Any:
        """Raise an error at the source's ``yield``; return its next item."""
        return self._get(error)

    def _get(self, error: BaseException | None) -> Any:
        task = self.task
        if task is None:
            raise StopIteration
        if self._waiter is None or not self._waiter.is_ours():
            self._waiter = Waiter()
        task.ask(error, self._waiter)
        error = None
        while not task.has_answered:
            # With a limit: its timer keeps a hub going in which nothing else waits.
            self._waiter.wait(LONGEST)
        return task.take()

    def part(self) -> SourceTask | None:
        """Leave the task to another reader; only the first caller gets it."""
        task, self.task = self.task, None
        return task

    def close(self) -> None:
        """Cancel the source, and wait until it has ended, some seconds at most."""
        task = self.part()
        if task is None or task.is_unstarted:
            return
        # One that has not begun may be an upstream's response, with a connection.
        turn = Turn()
        try:
            if task.must_not_wait():
                task.leave()
                return
            task.end(turn.end)
        except RuntimeError as problem:  # the loop has ended, with the process
            journal().later(log, logging.DEBUG, "%s: %s", self.name, problem)
            return
        if not turn.wait(time.monotonic() + CLOSE_WAIT):
            task.say_late(CLOSE_WAIT)
            task.leave()
            return
        error = task.take_late()
        if error is not None:
            try:
                raise error
            finally:
                error = None  # its traceback has this frame

    def __del__(self) -> None:
        task = getattr(self, "task", None)
        if task is not None and task.has_begun:
            with suppress(RuntimeError):  # the loop has ended, with the process
                task.leave()
