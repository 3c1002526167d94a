"""Native threads that run jobs while their callers wait."""

from __future__ import annotations

import _thread
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ...errors import Unavailable
from ...runtime.sockets import native
from ...runtime.waiter import Turn
from ...runtime.waiting import say
from .database import Items

__all__ = ["Job", "Thread", "start_thread"]

log = logging.getLogger("syncstream.brokers.local")


# Who does it.


class Job:
    """A call that waits to be made, or a publish; and what has come of it."""

    __slots__ = ("call", "error", "is_taken", "items", "result", "turn")

    def __init__(self, items: Items = (), call: Callable[[], Any] | None = None):
        self.items = items
        self.call = call
        self.turn: Turn | None = None  # of who waits, if somebody does
        self.is_taken = False
        self.result: Any = None
        self.error: Exception | None = None

    def end(self, result: Any = None, error: Exception | None = None) -> None:
        self.result, self.error = result, error
        if self.turn is None:
            return
        try:
            self.turn.end()
        except Exception as problem:  # its hub was destroyed: nobody waits there
            say(log, logging.DEBUG, "nobody waits for what was done", error=problem)


def start_thread(run: Callable[[], None]) -> None:
    """Start a native thread.

    Raises:
        Unavailable: The system has none left.
    """
    try:
        native(_thread, "start_new_thread")(run, ())
    except (RuntimeError, MemoryError) as error:
        raise Unavailable(f"local: needs a thread: {error}") from error


class Thread:
    """A native thread that is woken to do jobs.

    Args:
        serve: Does those that are there; it must not raise.
        leave: Is called at its end.
    """

    def __init__(
        self, serve: Callable[[], None], leave: Callable[[], None] | None = None
    ) -> None:
        self._serve = serve
        self._leave = leave
        self.lock = native(_thread, "RLock")()
        self.jobs: deque[Job] = deque()
        self._bell = native(_thread, "allocate_lock")()
        self._bell.acquire()
        self._is_running = False
        self._is_closed = False
        self._ended: list[Turn] = []

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
            start_thread(self._run)
            self._is_running = True

    def ring(self) -> None:
        with suppress(RuntimeError):  # it is awake
            self._bell.release()

    def give_up(self, job: Job) -> bool:
        """Take a job back; ``False``: it has been taken."""
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
            except BaseException as error:  # others wait for this thread, from now on
                say(log, logging.ERROR, "work of local: failed", error=error)
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
        """Let it do what is there, and end; ``False``: not within this time."""
        turn = Turn()
        return not self.end(turn) or turn.wait(deadline)

    def end(self, *turns: Turn) -> bool:
        """Have it end, and end these turns then; ``False``: there is nothing to end."""
        with self.lock:
            self._is_closed = True
            if self._leave is not None:
                with suppress(Unavailable):
                    self._start()  # to leave as it should
            is_running = self._is_running
            if is_running:
                self._ended.extend(turns)
        if is_running:
            self.ring()
        elif self._leave is not None:  # no thread is left for it
            self._leave()
        return is_running
