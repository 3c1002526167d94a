"""Calls that block: each runs in a thread of its own, so that its stream can leave it.

Nothing can interrupt a thread that waits in a library. So a stream's end does not end
the call, but the wait for it: what comes of the call then is closed, or logged.

Under gevent the call stays in the stream's greenlet. There the end interrupts the call
itself; and what it uses, such as a pool of connections, may belong to that hub.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, Literal, TypeVar

from ..runtime.journal import report
from ..runtime.process import process
from ..runtime.tasks import refuse_in_task
from ..runtime.waiter import Waiter, wake_all
from ..runtime.waiting import current_scope, gevent_hub

__all__ = ["MOST_LEFT", "nothing", "run"]

log = logging.getLogger("syncstream.stream")

T = TypeVar("T")

MOST_LEFT = 64
"""Calls of one process that may go on without their streams.

Clients who come and go could start any number of threads otherwise."""


def nothing() -> None:
    """Release nothing."""


def run(call: Callable[[], T], release: Callable[[], object]) -> T:
    """Make a call that blocks; see `Stream.run`.

    Args:
        call: The call.
        release: Called after it, in its thread: gives back what the application should
            not hold, such as database connections.
    """
    if inspect.iscoroutinefunction(getattr(call, "func", call)):
        raise TypeError(
            f"call must not be a coroutine function, got {call!r}: make the source an"
            " asynchronous generator, and await it there"
        )
    scope = current_scope()
    if scope is None:
        refuse_in_task("await asyncio.to_thread(call)")
        return call()
    scope.check()
    if gevent_hub() is not None:
        return call()
    if process().left_calls >= MOST_LEFT:
        process().say_once(
            log,
            logging.WARNING,
            "%d calls of stream.run go on although their streams have ended: further"
            " calls hold their streams up until some return. Give them a time-out",
            MOST_LEFT,
        )
        return call()
    running = _Call(call, release)
    try:
        if not running.begin():
            return call()
        result: T = running.wait()
        return result
    except BaseException:
        running.leave()
        raise
    finally:
        del running  # an error's traceback has this frame


class _Call:
    """One call in its thread. Its lock is the process's."""

    def __init__(self, call: Callable[[], Any], release: Callable[[], object]) -> None:
        self._call, self._release = call, release
        self._context = copy_context()
        self._waiter = Waiter()
        self._process = process()
        self._state: Literal["running", "done", "left", "taken"] = "running"
        self._result: Any = None
        self._error: BaseException | None = None

    # In the stream's thread.

    def begin(self) -> bool:
        """Start the thread; ``False``: there can be no more threads."""
        name = getattr(getattr(self._call, "func", self._call), "__qualname__", "")
        thread = threading.Thread(
            target=self._run, name=f"syncstream-run {name}".rstrip(), daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            self._state = "taken"
            return False
        return True

    def wait(self) -> Any:
        """Wait for the result.

        Raises:
            GeneratorExit: The stream has ended.
            BaseException: What the call has raised.
        """
        while self._state == "running":
            self._waiter.wait(None)
        result, self._result = self._result, None
        error, self._error = self._error, None
        self._state = "taken"
        if error is not None:
            try:
                raise error
            finally:
                error = None  # its traceback has this frame
        return result

    def leave(self) -> None:
        """Have what comes of it closed, unless it has been returned."""
        with self._process.lock:
            before, self._state = self._state, "left"
            if before == "running":
                self._process.left_calls += 1
            del self._waiter  # which has the stream
        if before == "done":
            self._drop()

    # In its own thread.

    def _run(self) -> None:
        try:
            self._result = self._context.run(self._call)
        except BaseException as error:
            self._error = error
        self._release()
        with self._process.lock:
            waiter: Waiter | None = None
            if self._state == "left":
                self._process.left_calls -= 1
            else:
                waiter, self._state = self._waiter, "done"
        if waiter is None:
            self._drop()
        else:
            wake_all([waiter])

    def _drop(self) -> None:
        result, self._result = self._result, None
        error, self._error = self._error, None
        if error is not None:
            text = "a call failed after its stream had ended"
            report(log, logging.DEBUG, text, error=error)
            return
        close = getattr(result, "close", None)
        if callable(close) and not isinstance(result, type):
            try:
                close()
            except Exception as problem:
                text = "the result of a call, which came too late, could not be closed"
                report(log, logging.DEBUG, text, error=problem)
