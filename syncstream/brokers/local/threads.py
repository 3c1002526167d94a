"""Native threads that run jobs while their callers wait."""

from __future__ import annotations

import _thread
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ...errors import Unavailable, Uncertain
from ...runtime.clock import time
from ...runtime.sockets import native
from ...runtime.waiter import Turn
from ...runtime.waiting import say
from ..process import start_thread
from .database import Items

__all__ = ["Job", "Thread"]

log = logging.getLogger("syncstream.brokers.local")


class Job:
    """A waiting publish or call, and its result."""

    __slots__ = ("call", "error", "is_taken", "items", "result", "turn")

    def __init__(self, items: Items = (), call: Callable[[], Any] | None = None):
        self.items = items
        self.call = call
        self.turn: Turn | None = None  # the caller's wait
        self.is_taken = False
        self.result: Any = None
        self.error: Exception | None = None

    def end(self, result: Any = None, error: Exception | None = None) -> None:
        self.result, self.error = result, error
        if self.turn is None:
            return
        try:
            self.turn.end()
        except Exception as problem:  # the caller's hub was destroyed
            say(log, logging.DEBUG, "the caller of a job is gone", error=problem)


class Thread:
    """A native thread that is woken to do jobs.

    Args:
        path: Of the log, for errors.
        serve: Does all waiting jobs; it must not raise.
        leave: Called at the thread's end.
    """

    def __init__(
        self,
        path: str,
        serve: Callable[[], None],
        leave: Callable[[], None] | None = None,
    ) -> None:
        self._path = path
        self._serve = serve
        self._leave = leave
        self.lock = native(_thread, "RLock")()
        self.jobs: deque[Job] = deque()
        self._bell = native(_thread, "allocate_lock")()
        self._bell.acquire()
        self._is_running = False
        self._is_closed = False
        self._ended: list[Turn] = []

    def do(self, job: Job, timeout: float | None) -> None:
        """Have a job done, and wait for that.

        Raises:
            Unavailable: Not in time: it will not be, or it stores nothing.
            Uncertain: It may have stored events.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        turn = self.add(job)
        try:
            is_done = turn.wait(deadline)
        except BaseException:  # such as gevent.Timeout
            self.give_up(job)
            raise
        if is_done:
            return
        message = f"{self._path} was not available within {timeout} s"
        if self.give_up(job) or job.call is not None:
            raise Unavailable(message)
        raise Uncertain(f"{message}: the events may be stored")

    def add(self, job: Job) -> Turn:
        turn = job.turn = Turn()
        with self.lock:
            if self._is_closed:
                raise Unavailable("local: is closed")
            self._start()
            self.jobs.append(job)
        self.ring()
        return turn

    def _start(self) -> None:
        if not self._is_running:
            start_thread("local:", self._run)
            self._is_running = True

    def ring(self) -> None:
        with suppress(RuntimeError):  # it has been woken already
            self._bell.release()

    def give_up(self, job: Job) -> bool:
        """Take a job back; ``False``: the thread has taken it already."""
        with self.lock:
            if job.is_taken:
                return False
            self.jobs.remove(job)
            return True

    def take(self) -> Job | None:
        with self.lock:
            if not self.jobs:
                return None
            job = self.jobs.popleft()
            job.is_taken = True
            return job

    def _run(self) -> None:
        while True:
            self._bell.acquire()
            is_last = self._is_closed
            try:
                self._serve()
            except BaseException as error:  # go on: later jobs need this thread
                text = (
                    "a job of local: failed unexpectedly; its caller may wait in vain"
                )
                say(log, logging.ERROR, text, error=error)
            if is_last:
                break
        try:
            if self._leave is not None:
                self._leave()
        finally:
            with self.lock:
                self._is_running = False
                ended, self._ended = self._ended, []
            for turn in ended:
                turn.end()

    def close(self, deadline: float) -> bool:
        """Have the thread finish its jobs and end; ``False``: it did not in time."""
        turn = Turn()
        return not self.end(turn) or turn.wait(deadline)

    def end(self, *turns: Turn) -> bool:
        """Tell the thread to end, and end these turns then; ``False``: none runs."""
        with self.lock:
            self._is_closed = True
            if self._leave is not None:
                with suppress(Unavailable):
                    self._start()  # its thread calls `leave`
            is_running = self._is_running
            if is_running:
                self._ended.extend(turns)
        if is_running:
            self.ring()
        elif self._leave is not None:  # no thread could be started
            self._leave()
        return is_running
