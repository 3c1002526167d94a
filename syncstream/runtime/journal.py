"""Logging that neither fails nor blocks its caller.

Logging filters and handlers belong to the application. They may raise (one that reads
Flask's ``request`` does, outside of a request), and they may take seconds. So the
package logs in two ways only:

- `report` logs at once, in the caller's thread, and prints the line if logging raises.
- A `Journal` logs later, in its own thread. Code that others wait for uses it: loops,
  lanes, watches and listeners.

Act first, then log: a log line never delays the action that it reports.
"""

from __future__ import annotations

import _queue
import _thread
import atexit
import logging
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from .clock import time
from .ending import is_cut_short
from .forks import process_key
from .signals import unblock_sigpipe
from .sockets import native

__all__ = ["Journal", "is_enabled", "journal", "report"]

log = logging.getLogger("syncstream.journal")

MOST = 1000  # the maximum of waiting lines
_EXIT_WAIT = 5.0  # seconds that the interpreter's exit waits for each line


def report(
    log: logging.Logger,
    level: int,
    message: str,
    *args: Any,
    error: BaseException | None = None,
) -> None:
    """Log a line; print it to stderr if logging raises.

    Args:
        log, level, message, args: As for `logging.Logger.log`.
        error: An exception, logged with its traceback.
    """
    # A tuple instead of the error: logging tests its truth, and an exception with a
    # __len__ may be false.
    info = (type(error), error, error.__traceback__) if error is not None else None
    try:
        log.log(level, message, *args, exc_info=info, stacklevel=2)
    except Exception as problem:
        _print(message, args, error, problem)


def is_enabled(log: logging.Logger, level: int) -> bool:
    """Tell whether this level is logged; ``True`` if the logger raises."""
    try:
        return log.isEnabledFor(level)
    except Exception:  # `report` will raise it again and print it
        return True


def _print(
    message: str,
    args: tuple[Any, ...],
    error: BaseException | None,
    problem: BaseException,
) -> None:
    """Print a line that could not be logged, without calling the exceptions' code."""
    with suppress(Exception):  # nowhere is left to report it
        if sys.stderr is None:
            return
        if error is not None:
            traceback.print_tb(error.__traceback__)
        names = [type(e).__name__ for e in (error, problem) if e is not None]
        text = message % args if args else message
        print(f"syncstream: {text} (not logged: {', '.join(names)})", file=sys.stderr)


class Journal:
    """Logs lines in its own thread, one after the other; get it from `journal`.

    All methods may be called from any thread, and only `flush` waits. When `MOST` lines
    are waiting, new ones are dropped and counted.
    """

    def __init__(self) -> None:
        self._jobs: Any = _queue.SimpleQueue()
        # Reentrant: a garbage collection while it is held may log a line.
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
        """Log a line soon; the arguments are those of `report`."""
        if is_enabled(log, level):
            self.do(partial(report, log, level, message, *args, error=error))

    def do(self, job: Callable[[], object]) -> None:
        """Call a function that logs a line, soon and in the journal's thread."""
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
                    return False  # no thread can be started: the next line tries again
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
        except BaseException as problem:  # a handler's sys.exit() must not end this
            _print("a log line was lost", (), None, problem)
        left_out, self._left_out = self._left_out, 0
        if left_out:
            text = "%d log lines were dropped: a logging handler is too slow"
            report(log, logging.WARNING, text, left_out)

    def flush(self, limit: float = _EXIT_WAIT) -> bool:
        """Wait until all lines given so far are logged.

        Args:
            limit: The maximum of seconds for each line.

        Returns:
            ``False`` if a line took longer.
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


_journals: dict[object, Journal] = {}  # a forked child also has its parents'


def journal() -> Journal:
    """Return this process's journal; a forked child begins with an empty one."""
    key = process_key()
    found = _journals.get(key)
    if found is None:
        found = _journals.setdefault(key, Journal())
        atexit.register(_at_exit)
    return found


def _at_exit() -> None:
    is_cut_short(_flush)


def _flush() -> None:
    found = _journals.get(process_key())
    if found is not None and not found.flush():
        _print(
            "log lines were lost at the exit: a logging handler takes too long",
            (),
            None,
            TimeoutError(),
        )
