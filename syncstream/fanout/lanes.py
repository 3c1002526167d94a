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
from ..runtime.sockets import native
from ..runtime.watch import Watch, native_lock
from ..runtime.worker import Worker

__all__ = ["HubCrew", "HubLane", "Job", "Lane", "Lanes", "run_safely", "say_failed"]

log = logging.getLogger("syncstream.fanout")
MOST_ASKING = 128  # threads, or greenlets of a hub, in `authorize` at once


class Doer(Protocol):
    """Runs jobs outside of the loop."""

    def do(self, job: Callable[[], object]) -> None:
        """Run a job soon; from any thread, without waiting."""


class Lane:
    """Runs jobs one after the other, in a thread that the first job starts.

    Args:
        other: The lane that does the jobs if no thread can be started.

    Attributes:
        began: When the current job began, `time.monotonic`.
    """

    def __init__(self, other: Lane | None = None) -> None:
        self.began = 0.0  # when the current or last job began
        self._jobs: Any = _queue.SimpleQueue()
        self._other = other
        self._lock = native_lock()
        self._is_running = False

    def start(self) -> None:
        """Start the thread, unless it runs.

        Raises:
            RuntimeError: No thread can be started.
        """
        with self._lock:
            if not self._is_running:
                native(_thread, "start_new_thread")(self._work, ())
                self._is_running = True

    def do(self, job: Callable[[], object]) -> None:
        """Run a job after all earlier ones; from any thread."""
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
            text = "no thread can be started, so work for a subscriber waits: %s"
            journal().later(log, logging.WARNING, text, problem)

    def _work(self) -> None:
        job: Callable[[], object] | None
        unblock_sigpipe()
        try:
            while True:
                job = None  # do not keep the last job alive while waiting
                try:
                    job = self._jobs.get()
                    self.began = time.monotonic()
                    job()
                except BaseException as error:  # go on: all clients share this lane
                    _failed(job, error)
        finally:  # for example, out of memory: a new thread does the other jobs
            self._is_running = False
            if not self._jobs.empty():
                self.start()
            text = "a thread of the subscribers' loop ended: another one is started"
            journal().later(log, logging.ERROR, text)


class HubLane(Lane):
    """The same in a gevent hub: a greenlet, as the application's locks are gevent's.

    Args:
        watch: The hub's watch.
        other: Does the waiting jobs when the hub has been destroyed.
        most: The maximum of waiting jobs; more jobs go to the other, too.
    """

    def __init__(self, watch: Watch, other: Doer, most: float = math.inf) -> None:
        self._watch = watch
        self._rest = other
        self._most = most
        self.began = 0.0
        self._worker = Worker(self._run_job)

    def start(self) -> None:
        pass

    def _run_job(self, job: Callable[[], object]) -> None:
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
    """Runs jobs that may never return."""

    def hurry(self) -> None:
        """Handle that a job is late; from any thread, without waiting."""


class Crew:
    """Runs jobs that may never return: in one thread, and in more if jobs are late."""

    def __init__(self) -> None:
        self._jobs: Any = _queue.SimpleQueue()
        self._lock = native_lock()
        self._threads = 0
        self._idle = 0

    def do(self, job: Callable[[], object]) -> None:
        """Run a job soon; from any thread."""
        self._jobs.put(job)
        if not self._threads:
            self._start(1)

    def hurry(self) -> None:
        """Handle that a job is late: another thread may be needed."""
        if not self._jobs.empty():
            self._start(MOST_ASKING)

    def _start(self, most: int) -> None:
        with self._lock:
            if self._idle or self._threads >= most:
                return
            try:
                native(_thread, "start_new_thread")(self._work, ())
            except (RuntimeError, MemoryError) as error:
                # A client without an answer in time is denied.
                text = "authorize cannot be called, so streams will be denied: %s"
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
                        return  # another thread waits already
                    self._idle += 1
                try:
                    job = self._jobs.get()
                finally:
                    with self._lock:
                        self._idle -= 1
                run_safely(job)
                job = None  # do not keep it alive while waiting
        finally:
            with self._lock:
                self._threads -= 1


class HubCrew:
    """The same in a gevent hub, with greenlets.

    Args:
        watch: The hub's watch.
        other: Does the waiting jobs when the hub has been destroyed.
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
            self._begin()  # the greenlet was killed, but its jobs remain


class Lanes:
    """The lanes for work that the loop must not do; none waits for another.

    Attributes:
        ends: For what a client's end asks of the broker. It calls no application code.
        reads: For calls of a broker, without application code.
        users: For application code, which may be slow.
        asks: For ``authorize``, which may never return.
        logs: For log lines, whose handlers are application code.
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
        """Log a line soon, without delaying the loop."""
        # Out of memory, a line cannot be logged, and everything else must go on.
        with suppress(BaseException):
            if is_enabled(log, level):
                self.logs.do(partial(report, log, level, message, *args, error=error))


class Job:
    """A job for a lane whose failure must be handled.

    Args:
        call: Does the job.
        failed: Called with the exception if ``call`` raises.
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
    except BaseException as error:  # the other jobs go on
        _failed(job, error)


def _failed(job: Callable[[], object] | None, error: BaseException) -> None:
    if isinstance(job, Job):
        try:
            job.failed(error)
        except BaseException as second:
            say_failed("work for a subscriber failed twice", second)
    say_failed("work for a subscriber failed", error)


def say_failed(message: str, error: BaseException, *args: Any) -> None:
    # Out of memory, a line cannot be logged, and everything else must go on.
    with suppress(BaseException):
        journal().later(log, logging.ERROR, message, *args, error=error)
