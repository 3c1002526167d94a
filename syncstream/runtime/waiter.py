"""`Waiter`: one thread's or greenlet's place to wait, woken alone or with many."""

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
from .waiting import (
    LONGEST,
    Scope,
    current,
    current_scope,
    hub,
    hub_of_this_thread,
    runner_function,
    say,
)

__all__ = ["Turn", "Waiter", "Wakeable", "wake_all"]

log = logging.getLogger("syncstream.waiting")


class Wakeable(Protocol):
    """Who waits for its turns.

    Attributes:
        hub: The gevent hub that ``switch`` is called in, ``None`` for ``wake``.
    """

    @property
    def hub(self) -> Any: ...

    def wake(self) -> object:
        """End its wait; from any thread."""


class Waiter:
    """Where one thread or greenlet waits for its turns; made by it, for many waits.

    A wake ends the wait that goes on, or else the next one: waits may end without
    anything to wait for, so look again after each.
    """

    __slots__ = (
        *("_is_waiting", "_is_woken", "_lock", "_running", "hub", "runner", "scope"),
    )

    def __init__(self) -> None:
        self.scope = current_scope()
        self.hub = hub()
        self._running = runner_function()
        self.runner: Any = self._running()
        self._is_waiting = self._is_woken = False  # in its hub
        # A thread waits to acquire it. Held but for the moment of a wake.
        self._lock: Any = native(_thread, "allocate_lock")()
        self._lock.acquire()

    def is_ours(self) -> bool:
        """Tell whether it is for the thread or greenlet and scope that run here."""
        # `current_scope`, without its calls: this is asked for every event.
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
        """Wait until woken, or the scope's end, or the time is over.

        Raises:
            ClientDisconnected, GeneratorExit: The scope has ended.
        """
        scope = self.scope
        if scope is not None:
            if scope.was_told:
                scope.check()
            # Each time: who knows what ran since the last wait, here or in a
            # middleware, and what it took. A wake that comes meanwhile counts.
            scope.before_wait()
        if self.hub is None:
            self._wait_in_thread(scope, timeout)
        elif self._is_woken:  # while it was elsewhere
            self._is_woken = False
        elif timeout is not None:
            self._wait_in_hub(timeout)
        else:
            self._is_waiting = True
            try:
                self.hub.switch()
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
        scope.parked = self
        try:
            if not scope.is_over():
                self._lock.acquire(True, limit)
        finally:
            scope.parked = None

    def _wait_in_hub(self, timeout: float) -> None:
        timer = self.hub.loop.timer(min(timeout, LONGEST))
        self._is_waiting = True
        try:
            timer.start(self.switch, update=True)
            self.hub.switch()
        finally:
            self._is_waiting = False
            timer.stop()
            timer.close()

    def switch(self) -> None:
        """Let the greenlet go on, or else end its next wait; in its hub."""
        if self._is_waiting:
            self._is_waiting = False
            self.runner.switch()
        else:
            self._is_woken = True

    def wake(self) -> bool:
        """Let the thread go on; for the scope's end, too."""
        with suppress(RuntimeError):  # it is awake
            self._lock.release()
        return True


class Turn:
    """One thread's or greenlet's wait for what a native thread does for it.

    No stream's end interrupts it: what was stored was stored.
    """

    __slots__ = ("_waiter", "is_done")

    def __init__(self) -> None:
        self._waiter: Waiter = Context().run(Waiter)
        self.is_done = False

    def wait(self, deadline: float | None) -> bool:
        """Wait until it is done; ``False``: the time is over."""
        while not self.is_done:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            self._waiter.wait(left)
        return True

    def end(self) -> None:
        self.is_done = True
        wake_all([self._waiter])


def wake_all(waiters: Iterable[Wakeable]) -> None:
    """Wake all of them; from any thread.

    The greenlets of one hub go on in one callback of that, one after the other: who
    publishes pays for one, however many wait.
    """
    of_hubs: dict[Any, list[Any]] = {}
    last: Any = None  # mostly all are of one
    greenlets: list[Any] = []
    failed: list[tuple[Wakeable, BaseException]] = []
    for waiter in waiters:
        hub = waiter.hub
        if hub is None:
            try:
                waiter.wake()
            except BaseException as error:  # the others are to wake; and this one
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
    here = hub_of_this_thread()
    for there, greenlets in of_hubs.items():
        try:
            if there is here:
                there.loop.run_callback(_switch_all, there, greenlets)
            else:
                there.loop.run_callback_threadsafe(_switch_all, there, greenlets)
        except Exception as error:
            # A hub that was destroyed has no loop: nobody waits there any more.
            _not_woken(error, logging.DEBUG if there.loop is None else logging.ERROR)


def _wake_again(waiter: Wakeable, error: BaseException) -> None:
    # It is registered nowhere any more: nobody else would wake it.
    try:
        waiter.wake()
    except Exception as second:
        error = second
        _not_woken(error)
    if not isinstance(error, Exception):  # a signal's, say
        raise error


def _not_woken(error: BaseException, level: int = logging.ERROR) -> None:
    say(log, level, "a waiter could not be woken", error=error)


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
            except BaseException:  # what ends the hub, or its program, is for those
                hub.loop.run_callback(_switch_all, hub, list(waiting))
                raise
