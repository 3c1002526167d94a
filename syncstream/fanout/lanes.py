"""Threads, or greenlets of a hub, that run application code for the loop."""

from __future__ import annotations

import _queue
import _thread
import logging
import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from ..runtime.clock import time
from ..runtime.journal import is_enabled, journal, report
from ..runtime.signals import unblock_sigpipe
from ..runtime.sockets import (
    native,
)
from ..runtime.watch import Watch, Worker, native_lock

__all__ = ["HubCrew", "HubLane", "Job", "Lane", "Lanes", "run_safely", "say_failed"]

log = logging.getLogger("syncstream.fanout")
MOST_ASKING = 128  # threads, or greenlets of a hub, in `authorize` at once


class Doer(Protocol):
    """Does things elsewhere."""

    def do(self, job: Callable[[], object]) -> None:
        """Do this, soon; from any thread, without waiting."""


class Lane:
    """Runs one thing after the other: a thread, from the first one on.

    Args:
        other: Has it to do where no thread can be started.

    Attributes:
        began: When it began with what it does, `time.monotonic`.
    """

    def __init__(self, other: Lane | None = None) -> None:
        self.began = 0.0  # with what it does, or has done last
        self._jobs: Any = _queue.SimpleQueue()
        self._other = other
        self._lock = native_lock()
        self._is_running = False

    def start(self) -> None:
        """Start it, if nothing has.

        Raises:
            RuntimeError: No thread is left.
        """
        with self._lock:
            if not self._is_running:
                native(_thread, "start_new_thread")(self._work, ())
                self._is_running = True

    def do(self, job: Callable[[], object]) -> None:
        """Run this when all that came before has been done; from any thread."""
        problem = None
        try:
            if not self._is_running:
                self.start()
        except (RuntimeError, MemoryError) as error:
            if self._other is not None:
                self._other.do(job)
                return
            problem = error
        self._jobs.put(job)
        if problem is not None:
            text = "work for a subscriber waits: %s"
            journal().later(log, logging.WARNING, text, problem)

    def _work(self) -> None:
        job: Callable[[], object] | None
        unblock_sigpipe()
        try:
            while True:
                job = None  # or it would live on while nothing is to be done
                try:
                    job = self._jobs.get()
                    self.began = time.monotonic()
                    job()
                except BaseException as error:  # there is one for all
                    _failed(job, error)
        finally:  # there is no memory, say: what is left is another's, from now on
            self._is_running = False
            if not self._jobs.empty():
                self.start()
            journal().later(log, logging.ERROR, "a lane has ended: another one begins")


class HubLane(Lane):
    """The same in a gevent hub: a greenlet, for the application's locks are its.

    Args:
        watch: The hub's.
        other: Does the rest when the hub has been destroyed.
        most: As many wait here; what is more is the other's, too.
    """

    def __init__(self, watch: Watch, other: Doer, most: float = math.inf) -> None:
        self._watch = watch
        self._rest = other
        self._most = most
        self.began = 0.0
        self._worker = Worker(self._run)

    def start(self) -> None:
        pass

    def _run(self, job: Callable[[], object]) -> None:
        self.began = time.monotonic()
        run_safely(job)

    def do(self, job: Callable[[], object]) -> None:
        jobs = self._worker.jobs
        if len(jobs) >= self._most:
            self._rest.do(job)
            return
        jobs.append(job)
        try:
            if not self._watch.is_over:
                self._watch.run(self._worker.begin)
                return
        except Exception as error:  # it has been destroyed in this moment
            journal().later(log, logging.DEBUG, "a hub is not woken: %r", error)
        while jobs:
            try:
                left = jobs.popleft()
            except IndexError:  # another thread was faster
                return
            self._rest.do(left)


class Asker(Doer, Protocol):
    """Does things that may never come back."""

    def hurry(self) -> None:
        """Take note that one of them is late; from any thread, without waiting."""


class Crew:
    """Runs what may never come back: a thread, and more while that is late."""

    def __init__(self) -> None:
        self._jobs: Any = _queue.SimpleQueue()
        self._lock = native_lock()
        self._threads = 0
        self._idle = 0

    def do(self, job: Callable[[], object]) -> None:
        """Run this, soon; from any thread."""
        self._jobs.put(job)
        if not self._threads:
            self._start(1)

    def hurry(self) -> None:
        """Take note that a job is late: another thread may have to do it."""
        if not self._jobs.empty():
            self._start(MOST_ASKING)

    def _start(self, most: int) -> None:
        with self._lock:
            if self._idle or self._threads >= most:
                return
            try:
                native(_thread, "start_new_thread")(self._work, ())
            except (RuntimeError, MemoryError) as error:
                # Who is not asked in time is denied.
                text = "nobody can be asked whether they may go on: %s"
                journal().later(log, logging.WARNING, text, error)
            else:
                self._threads += 1

    def _work(self) -> None:
        job: Callable[[], object] | None
        unblock_sigpipe()
        try:
            while True:
                with self._lock:
                    if self._idle and self._jobs.empty():
                        return  # one waits already
                    self._idle += 1
                try:
                    job = self._jobs.get()
                finally:
                    with self._lock:
                        self._idle -= 1
                run_safely(job)
                job = None  # or it would live on while nothing is to be done
        finally:
            with self._lock:
                self._threads -= 1


class HubCrew:
    """The same in a gevent hub, of greenlets.

    Args:
        watch: The hub's.
        other: Does the rest when the hub has been destroyed.
    """

    def __init__(self, watch: Watch, other: Asker) -> None:
        self._watch = watch
        self._rest = other
        self._jobs: deque[Callable[[], object]] = deque()
        self._greenlets = 0

    def do(self, job: Callable[[], object]) -> None:
        self._jobs.append(job)
        self._call(self._begin)

    def hurry(self) -> None:
        self._call(self._more)

    def _call(self, function: Callable[[], object]) -> None:
        try:
            if not self._watch.is_over:
                self._watch.run(function)
                return
        except Exception as error:  # it has been destroyed in this moment
            journal().later(log, logging.DEBUG, "a hub is not woken: %r", error)
        while self._jobs:
            with suppress(IndexError):  # another thread was faster
                self._rest.do(self._jobs.popleft())

    def _begin(self) -> None:
        if not self._greenlets:
            self._more()

    def _more(self) -> None:
        if self._jobs and self._greenlets < MOST_ASKING:
            import gevent

            gevent.spawn(self._work)
            self._greenlets += 1

    def _work(self) -> None:
        try:
            while self._jobs:
                run_safely(self._jobs.popleft())
        finally:
            self._greenlets -= 1
            self._begin()  # it was killed, and what it had to do was not


class Lanes:
    """Who does what the loop may not: those that do not wait for each other.

    Attributes:
        ends: What is given back and told at an end. It asks no application.
        reads: What may ask a broker, and no application.
        users: What may call an application, which may take its time.
        asks: Asks an application who may go on, and does not wait for all answers.
        logs: What is logged, by handlers that are an application's.
    """

    __slots__ = ("asks", "ends", "logs", "reads", "users")

    def __init__(
        self,
        ends: Lane,
        reads: Lane,
        users: Lane,
        asks: Asker,
        logs: Doer,
    ) -> None:
        self.ends, self.reads, self.users = ends, reads, users
        self.asks, self.logs = asks, logs

    def say(
        self,
        level: int,
        message: str,
        *args: Any,
        error: BaseException | None = None,
    ) -> None:
        """Log a line, soon; what it is about goes on without it."""
        # Without the memory for a line nothing can be said.
        with suppress(BaseException):
            if is_enabled(log, level):
                self.logs.do(partial(report, log, level, message, *args, error=error))


class Job:
    """Work for a lane that somebody waits for.

    Args:
        call: What is to be done.
        failed: Is told if it raises.
    """

    __slots__ = ("_call", "failed")

    def __init__(
        self, call: Callable[[], object], failed: Callable[[BaseException], object]
    ) -> None:
        self._call = call
        self.failed = failed

    def __call__(self) -> None:
        self._call()


def run_safely(job: Callable[[], object]) -> None:
    try:
        job()
    except BaseException as error:  # the others go on
        _failed(job, error)


def _failed(job: Callable[[], object] | None, error: BaseException) -> None:
    if isinstance(job, Job):
        try:
            job.failed(error)
        except BaseException as second:
            say_failed("work for a subscriber failed twice", second)
    say_failed("work for a subscriber failed", error)


def say_failed(message: str, error: BaseException, *args: Any) -> None:
    # Without the memory for a line nothing can be said, and everything else goes on.
    with suppress(BaseException):
        journal().later(log, logging.ERROR, message, *args, error=error)
