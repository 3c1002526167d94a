"""`Limit`: ends what a test waits for when its time is over, whatever that waits in.

It runs in the thread or greenlet of the test, for there a source has its thread-locals:
Django's connections, whose transaction a TestCase rolls back. A native thread beside it
keeps the time. When that is over, the stream that the test reads is told to end, which
wakes all waits of this package. A source that blocks in something else is interrupted
by an exception: in a greenlet by the hub, in the main thread by a signal. SIGURG, for
nothing happens if it comes late: it is ignored by default. In other threads Python has
no way to interrupt a system call.
"""

from __future__ import annotations

import _thread
import signal
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from ..runtime.process import process
from ..runtime.sockets import native
from ..runtime.waiting import gevent_hub, runner_function
from ..streams.stream import Stream

__all__ = ["Late", "Limit", "place", "place_of_test"]

T = TypeVar("T")

GRACE = 0.3  # seconds that a source gets for its clean-up before it is interrupted
_PATHS = "stdlib", "purelib", "platlib", "scripts"
_LIBRARIES = (*{sysconfig.get_path(name) for name in _PATHS}, "<")
_SIGNAL: int | None = getattr(signal, "SIGURG", None)  # Windows has none


class Late(Exception):
    """The time is over; the text says where the source waited, if that is known."""


class _TimeIsOver(BaseException):
    """Interrupts a source. No `Exception`: it shall not be handled as an error."""


class Limit:
    """A time limit for calls of one thread or greenlet. Not for two at once.

    Args:
        seconds: How long all calls may take together.
        interrupt: Ends what the calls wait for, in a native thread, and returns where
            the source is; ``None``: the source runs here, and is looked for.
    """

    def __init__(
        self, seconds: float, interrupt: Callable[[], str] | None = None
    ) -> None:
        self._seconds = seconds
        self._end = self._end_source if interrupt is None else interrupt
        self._is_inside = False  # a call of ours
        self._is_over = False
        self._place = ""

    def __enter__(self) -> Limit:
        self._hub = gevent_hub()
        self._runner: Any = runner_function()()
        self._thread: int = native(_thread, "get_ident")()
        is_main = self._thread == threading.main_thread().ident
        self._number = _SIGNAL if is_main and self._hub is None else None
        if self._number is not None:
            self._before = signal.signal(self._number, self._interrupt)
        locks = [native(_thread, "allocate_lock")() for _ in range(3)]
        self._done, self._told, self._ended = locks
        for lock in locks:
            lock.acquire()
        native(_thread, "start_new_thread")(self._keep_time, ())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._done.release()
        self._ended.acquire()
        if self._number is not None:
            signal.signal(self._number, self._before)

    def call(self, function: Callable[[], T]) -> T:
        """Call a function, and return what it returns.

        Raises:
            Late: The time is over. The function has been interrupted.
        """
        error: BaseException | None = None
        try:
            try:
                self._is_inside = True
                return_value = function()
            finally:
                self._is_inside = False
        except _TimeIsOver as raised:
            error = raised
        except BaseException as raised:
            if not self._is_over:
                raise
            error = raised
        if self._is_over:
            with self._told:  # the place is known
                pass
            cause = None if isinstance(error, (_TimeIsOver, StopIteration)) else error
            raise Late(self._place) from cause
        return return_value

    # In the thread that keeps the time.

    def _keep_time(self) -> None:
        try:
            if self._done.acquire(True, self._seconds):
                return
            self._is_over = True
            try:
                self._place = self._end()
            finally:
                self._told.release()
            while not self._done.acquire(True, GRACE):
                self._force()
        finally:
            self._ended.release()

    def _end_source(self) -> str:
        """Stop the streams whose sources run in the test's thread."""
        found = self._find_place()
        ours = self._runner, self._thread
        attached = process().attached()
        streams = [stream for stream in attached if isinstance(stream, Stream)]
        for stream in streams:
            if stream.is_running and stream.runner in ours:
                stream.stop()
        return found

    def _force(self) -> None:
        if self._hub is not None:
            self._hub.loop.run_callback_threadsafe(self._throw)
        elif self._number is not None:
            signal.pthread_kill(self._thread, self._number)

    def _throw(self) -> None:
        if self._is_inside:
            self._runner.throw(_TimeIsOver())

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal, in the main thread."""
        if self._is_inside and self._is_over:
            raise _TimeIsOver

    def _find_place(self) -> str:
        """Return where the application's code is, "" if it is not in any."""
        frame: FrameType | None
        if self._hub is not None:
            frame = self._runner.gr_frame
        else:
            frame = sys._current_frames().get(self._thread)
        return place(frame)


def place(frame: FrameType | None) -> str:
    """Describe where a thread is in an application, from its innermost frame on.

    Returns:
        ``"app.py, line 12, in ticks"``; "" if nobody else's code runs below ours.
    """
    for found in _foreign(frame):
        return "" if found.f_globals.get("__name__") == __name__ else _said(found)
    return ""


def place_of_test(frame: FrameType | None) -> str:
    """Describe, from a frame on, which line of a test has called; "" for no test."""
    found = [
        _said(one)
        for one in _foreign(frame)
        if one.f_code.co_name != "<module>" and one.f_globals["__name__"] != __name__
    ]
    return found[-1] if found else ""


def _foreign(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frames of code that is no library's, and `Limit`'s own."""
    package = __name__.partition(".")[0]
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        is_ours = name == package or name.startswith(f"{package}.")
        is_library = is_ours or frame.f_code.co_filename.startswith(_LIBRARIES)
        if name == __name__ or not is_library:
            yield frame
        frame = frame.f_back


def _said(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_filename}, line {frame.f_lineno}, in {code.co_name}"
