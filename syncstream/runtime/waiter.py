"""`Waiter`: where one thread or greenlet waits, and how many are woken at once."""

from __future__ import annotations

import _thread
import logging
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from contextvars import Context
from typing import Any, Protocol

from .clock import time
from .sockets import native
from .tasks import refuse_in_task
from .waiting import (
    LONGEST,
    Scope,
    current,
    current_scope,
    gevent_hub,
    gevent_hub_of_thread,
    runner_function,
    say,
)

__all__ = ["Turn", "Waiter", "Wakeable", "wake_all"]

log = logging.getLogger("syncstream.waiting")


class Wakeable(Protocol):
    """A waiter that `wake_all` can wake.

    Attributes:
        gevent_hub: The hub that ``switch`` is called in, ``None`` for ``wake``.
    """

    @property
    def gevent_hub(self) -> Any: ...

    def wake(self) -> object:
        """End the wait; from any thread."""


class Waiter:
    """One thread's or greenlet's place for many waits; the waiting side creates it.

    A wake ends the current wait or, if there is none, the next one. So a wait may end
    although nothing has happened: check again after each.
    """

    __slots__ = (
        *(
            "_is_waiting",
            "_is_woken",
            "_lock",
            "_running",
            "gevent_hub",
            "runner",
            "scope",
        ),
    )

    def __init__(self) -> None:
        # This would block the thread of all asynchronous sources.
        refuse_in_task("wait in a plain generator, or in `await asyncio.to_thread(…)`")
        self.scope = current_scope()
        self.gevent_hub = gevent_hub()
        self._running = runner_function()
        self.runner: Any = self._running()
        self._is_waiting = self._is_woken = False  # used in a gevent hub only
        # A thread waits by acquiring this lock, which a wake releases.
        self._lock: Any = native(_thread, "allocate_lock")()
        self._lock.acquire()

    def is_ours(self) -> bool:
        """Tell whether this belongs to the running thread or greenlet and its scope."""
        # `current_scope` inlined: this runs for every event.
        scope, running = self.scope, self._running()
        if scope is None:
            return self.runner == running and current_scope() is None
        return (
            running == self.runner
            and running == scope.runner
            and scope.is_running
            and current.get() is scope.reference
        )

    def wait(self, timeout: float | None) -> None:
        """Wait until a wake, the scope's end, or the time-out.

        Args:
            timeout: Seconds, ``None`` for no limit.

        Raises:
            ClientDisconnected, GeneratorExit: The scope has ended.
        """
        scope = self.scope
        if scope is not None:
            if scope.was_told:
                scope.check()
            # Before every wait: application code or middleware may have taken a
            # connection since the last one. A wake during this call counts.
            scope.before_wait()
        if self.gevent_hub is None:
            self._wait_in_thread(scope, timeout)
        elif self._is_woken:  # before this wait
            self._is_woken = False
        elif timeout is not None:
            self._wait_in_hub(timeout)
        else:
            self._is_waiting = True
            try:
                self.gevent_hub.switch()
            finally:
                self._is_waiting = False
        if scope is not None:
            scope.has_waited = True
            if scope.is_over():
                scope.check()

    def _wait_in_thread(self, scope: Scope | None, timeout: float | None) -> None:
        limit = -1.0 if timeout is None else min(timeout, threading.TIMEOUT_MAX)
        if scope is None:
            self._lock.acquire(True, limit)
            return
        scope.thread_wait = self
        try:
            if not scope.is_over():
                self._lock.acquire(True, limit)
        finally:
            scope.thread_wait = None

    def _wait_in_hub(self, timeout: float) -> None:
        timer = self.gevent_hub.loop.timer(min(timeout, LONGEST))
        self._is_waiting = True
        try:
            timer.start(self.switch, update=True)
            self.gevent_hub.switch()
        finally:
            self._is_waiting = False
            timer.close()  # which stops it

    def switch(self) -> None:
        """Resume the greenlet, or end its next wait if it does not wait; in the hub."""
        if self._is_waiting:
            self._is_waiting = False
            self.runner.switch()
        else:
            self._is_woken = True

    def wake(self) -> bool:
        """Resume the thread; the scope's end calls this, too."""
        with suppress(RuntimeError):  # it has been woken already
            self._lock.release()
        return True


class Turn:
    """One thread's or greenlet's wait for a job that a native thread does for it.

    The end of a stream does not interrupt it: the caller must learn whether its event
    was stored.
    """

    __slots__ = ("_waiter", "is_done")

    def __init__(self) -> None:
        self._waiter: Waiter = Context().run(Waiter)
        self.is_done = False

    def wait(self, deadline: float | None) -> bool:
        """Wait until the job is done, or until a `time.monotonic`: ``False`` then."""
        while not self.is_done:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            self._waiter.wait(left)
        return True

    def end(self) -> None:
        """Say that the job is done; from any thread."""
        self.is_done = True
        wake_all([self._waiter])


def wake_all(waiters: Iterable[Wakeable]) -> None:
    """Wake all of them; from any thread.

    The greenlets of one hub are resumed one after the other in a single callback of
    that hub: a publisher pays for one callback, however many greenlets wait.
    """
    of_hubs: dict[Any, list[Any]] = {}
    last: Any = None  # mostly all are of one hub
    greenlets: list[Any] = []
    failed: list[tuple[Wakeable, BaseException]] = []
    for waiter in waiters:
        hub = waiter.gevent_hub
        if hub is None:
            try:
                waiter.wake()
            except BaseException as error:  # wake the others first, then try again
                failed.append((waiter, error))
            continue
        if hub is not last:
            last, greenlets = hub, of_hubs.setdefault(hub, [])
        greenlets.append(waiter)
    if of_hubs:
        _switch_in(of_hubs)
    for waiter, problem in failed:
        _wake_again(waiter, problem)


def _switch_in(of_hubs: dict[Any, list[Any]]) -> None:
    here = gevent_hub_of_thread()
    for there, greenlets in of_hubs.items():
        try:
            if there is here:
                there.loop.run_callback(_switch_all, there, greenlets)
            else:
                there.loop.run_callback_threadsafe(_switch_all, there, greenlets)
        except Exception as error:
            # A hub without a loop was destroyed: nothing waits there any more.
            _not_woken(error, logging.DEBUG if there.loop is None else logging.ERROR)


def _wake_again(waiter: Wakeable, error: BaseException) -> None:
    # The caller has forgotten this waiter: nothing else would wake it.
    try:
        waiter.wake()
    except Exception as second:
        error = second
        _not_woken(error)
    if not isinstance(error, Exception):  # from a signal handler, for example
        raise error


def _not_woken(error: BaseException, level: int = logging.ERROR) -> None:
    text = "a waiting stream or subscription could not be woken: it may be late"
    say(log, level, text, error=error)


def _switch_all(hub: Any, waiters: list[Waiter]) -> None:
    waiting = iter(waiters)
    for waiter in waiting:
        try:
            waiter.switch()
        except BaseException as error:
            try:
                hub.handle_error(waiter, *sys.exc_info())
            except Exception as problem:
                _not_woken(error)
                _not_woken(problem)
            except BaseException:  # it ends the hub or the program: wake the rest first
                hub.loop.run_callback(_switch_all, hub, list(waiting))
                raise
