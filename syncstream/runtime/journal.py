"""Log lines that harm nobody: the last resort must not fail itself.

A logging filter or handler is the application's. It may raise (one that reads Flask's
``request`` does, outside of a request), and it may take seconds. So nothing here
logs but by these two:

- `report` logs at once, where the caller is; what that raises is printed.
- A `Journal` logs later, in a thread of its own. For whatever others wait for: loops,
  lanes, watches and listeners.

Act first, and log after: a line is never in the way of what it is about.
"""

from __future__ import annotations

import _queue
import _thread
import atexit
import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from .clock import time
from .signals import unblock_sigpipe
from .sockets import native

__all__ = ["Journal", "is_enabled", "journal", "report"]

log = logging.getLogger("syncstream.journal")

MOST = 1000  # lines that wait, at most
_EXIT_WAIT = 5.0  # seconds that the interpreter's exit waits for one line


def report(
    log: logging.Logger,
    level: int,
    message: str,
    *args: Any,
    error: BaseException | None = None,
) -> None:
    """Log a line; print it to stderr if that raises.

    Args:
        log, level, message, args: As for `logging.Logger.log`.
        error: To be logged with its traceback.
    """
    # Not the error itself: logging asks whether it is true, and one with a __len__ may
    # say no.
    info = (type(error), error, error.__traceback__) if error is not None else None
    try:
        log.log(level, message, *args, exc_info=info, stacklevel=2)
    except Exception as problem:
        _print(message, args, error, problem)


def is_enabled(log: logging.Logger, level: int) -> bool:
    """Tell whether a line of this level is wanted; ``True`` if that fails."""
    try:
        return log.isEnabledFor(level)
    except Exception:  # `report` meets it, too, and prints it
        return True


def _print(
    message: str,
    args: tuple[Any, ...],
    error: BaseException | None,
    problem: BaseException,
) -> None:
    """Print what could not be logged, without asking the exceptions anything."""
    with suppress(Exception):  # there is no third place to say it
        if sys.stderr is None:
            return
        if error is not None:
            traceback.print_tb(error.__traceback__)
        names = [type(e).__name__ for e in (error, problem) if e is not None]
        text = message % args if args else message
        print(f"syncstream: {text} (not logged: {', '.join(names)})", file=sys.stderr)


class Journal:
    """Logs lines in a thread of its own, one after the other; get it from `journal`.

    Its methods may be called from any thread, and never wait, but for `flush`. Of more
    than `MOST` lines that wait, the last ones are left out, and counted.
    """

    def __init__(self) -> None:
        self._jobs: Any = _queue.SimpleQueue()
        # Reentrant: a garbage collection in here may have something to say.
        self._lock = native(_thread, "RLock")()
        self._is_running = False
        self._left_out = 0

    def later(
        self,
        log: logging.Logger,
        level: int,
        message: str,
        *args: Any,
        error: BaseException | None = None,
    ) -> None:
        """Do as `report`, soon."""
        if is_enabled(log, level):
            self.do(partial(report, log, level, message, *args, error=error))

    def do(self, job: Callable[[], object]) -> None:
        """Have a line logged by calling this."""
        if self._jobs.qsize() >= MOST:
            self._left_out += 1
            return
        self._jobs.put(job)
        if not self._is_running:
            self._start()

    def _start(self) -> bool:
        with self._lock:
            if not self._is_running:
                try:
                    native(_thread, "start_new_thread")(self._work, ())
                except (RuntimeError, MemoryError):
                    return False  # no thread is left: the next line tries again
                self._is_running = True
        return True

    def _work(self) -> None:
        unblock_sigpipe()
        try:
            while True:
                self._do(self._jobs.get())
        finally:
            self._is_running = False

    def _do(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as problem:  # a handler's sys.exit() ends no journal
            _print("a line was lost", (), None, problem)
        left_out, self._left_out = self._left_out, 0
        if left_out:
            report(log, logging.WARNING, "%d lines came too fast: left out", left_out)

    def flush(self, limit: float = _EXIT_WAIT) -> bool:
        """Wait until all lines that have been given are logged.

        Args:
            limit: Seconds that one line may take.

        Returns:
            ``False`` if one took longer.
        """
        done = native(_thread, "allocate_lock")()
        done.acquire()
        left = self._jobs.qsize() + 1
        self._jobs.put(done.release)
        if not self._start():
            while not self._jobs.empty():
                self._do(self._jobs.get())
        deadline = time.monotonic() + limit
        gevent: Any = sys.modules.get("gevent")
        while not done.acquire(False):
            now, before, left = time.monotonic(), left, self._jobs.qsize()
            if left < before:
                deadline = now + limit
            elif now >= deadline:
                return False
            (gevent or time).sleep(0.005)
        return True


_journals: dict[int, Journal] = {}  # this process's, and its parents' if it was forked


def journal() -> Journal:
    """Return this process's; a forked child leaves its parent's lines to that."""
    pid = os.getpid()
    found = _journals.get(pid)
    if found is None:
        found = _journals.setdefault(pid, Journal())
        atexit.register(_at_exit)
    return found


def _at_exit() -> None:
    found = _journals.get(os.getpid())
    if found is not None and not found.flush():
        _print(
            "log lines were lost: a handler takes too long", (), None, TimeoutError()
        )
