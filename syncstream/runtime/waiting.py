"""Waiting, and the one module that knows threads from gevent.

The *scope* is whatever is running in this thread or greenlet on behalf of one
stream. A contextvar holds it, so that nested applications and generators that
create generators each see their own; it counts only for the thread or greenlet
that entered it, because spawned greenlets (gevent copies the context) and, from
Python 3.14, threads inherit contextvars.

Everything is looked up when it is called: gevent may patch the standard library
after this module was imported.
"""

from __future__ import annotations

import _thread
import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from opcode import opmap
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from .clock import time
from .journal import is_enabled, journal, report
from .sockets import native

if TYPE_CHECKING:
    from .waiter import Waiter

__all__ = [
    "LONGEST",
    "Parked",
    "Scope",
    "current",
    "current_scope",
    "entered",
    "hub",
    "hub_of_this_thread",
    "insist",
    "is_greenlet_exit",
    "make_lock",
    "refuse_eventlet",
    "runner",
    "runner_function",
    "say",
    "sleep",
    "sleep_in_hub",
    "wait",
]

log = logging.getLogger("syncstream.waiting")

_BEGINS_HANDLING = opmap.get("PUSH_EXC_INFO")  # None before Python 3.11

LONGEST = 86400.0 * 24
"""Seconds that a wait, a timer or a lock is given at a stretch, at most.

More overflows somewhere: epoll's milliseconds are a C int, PostgreSQL's and those of
sockets, too; locks take 292 years.
"""


class Scope(Protocol):
    """What waits, and subscriptions, need to know of the stream they are in.

    Attributes:
        is_running: The stream is inside its source now.
        runner: The thread or greenlet that runs it.
        reference: A weak reference to it.
        has_waited: Set by a wait that lets the others of a hub run.
        was_told: Its end has been raised in its source, which should not wait again.
        parked: The wait that its thread is in, for whoever ends the stream: sets an
            end first, then looks here; waits look the other way round.
        has_resumed: A subscription has begun after its ``last_event_id``, which is
            nobody else's.
    """

    has_resumed: bool
    is_running: bool
    has_waited: bool
    was_told: bool
    runner: object
    parked: Parked | Waiter | None

    @property
    def reference(self) -> Reference: ...

    @property
    def last_event_id(self) -> str | None:
        """The id of the last event that its client has, ``None`` if it says none."""

    @property
    def is_multiprocess(self) -> bool:
        """Whether other processes of its server answer requests, too."""

    def on_close(self, callback: Callable[[], object]) -> None:
        """Have something called when it has ended."""

    def abandon(self, reason: str) -> None:
        """End it, though its source is busy with what may never come back."""

    def is_over(self) -> bool:
        """Tell whether it has ended: there is nothing left to wait for."""

    def check(self) -> None:
        """Raise `ClientDisconnected` or another `GeneratorExit`, once, if it is over.

        Not in a source that is being closed: its ``finally`` may wait. But again in
        one that has swallowed it, and waits on.
        """

    def before_wait(self) -> None:
        """Give back what is not to be held during a wait."""


Reference = Callable[[], Any]

current: ContextVar[Reference | None] = ContextVar("syncstream_scope", default=None)
"""A weak reference to the scope last entered here; it may be running no more, or be
gone. Read `current_scope`."""


def runner() -> object:
    """Return what tells the running greenlet, else the running thread, from others."""
    return runner_function()()


def runner_function() -> Callable[[], object]:
    """Return the function that does what `runner` does, for many calls."""
    greenlet = sys.modules.get("greenlet")
    if greenlet is None:
        return threading.get_ident
    # Each thread has a main greenlet of its own, so this covers threads too.
    function: Callable[[], object] = greenlet.getcurrent
    return function


def current_scope() -> Scope | None:
    """Return the scope this thread or greenlet is in, ``None`` outside of any."""
    reference = current.get()
    scope: Scope | None = reference() if reference is not None else None
    if scope is None or not scope.is_running:
        return None
    # A thread's ident: greenlet has been imported since the scope was entered.
    if scope.runner not in (runner(), threading.get_ident()):
        return None
    return scope


@contextmanager
def entered(scope: Scope) -> Iterator[None]:
    """Run a block in a scope, in this thread or greenlet."""
    token = current.set(scope.reference)
    was_running = scope.is_running
    scope.runner = runner()
    scope.is_running = True
    try:
        yield
    finally:
        scope.is_running = was_running
        current.reset(token)


def hub() -> Any:
    """Return the gevent hub in which waits go on here; ``None``: a thread waits.

    Greenlets wait in it; so does everything in a patched process, the main greenlet
    too. The hub itself has nothing to wait in.
    """
    gevent = sys.modules.get("gevent")
    getcurrent = getattr(gevent, "getcurrent", None)
    if gevent is None or getcurrent is None:
        return None
    greenlet = getcurrent()
    if greenlet.parent is None and not _is_patched():
        return None
    hub = gevent.get_hub()
    return None if greenlet is hub else hub


def _is_patched() -> bool:
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def refuse_eventlet() -> None:
    """Refuse to run where eventlet has replaced what waits are made of.

    Raises:
        RuntimeError: It has.
    """
    patcher = sys.modules.get("eventlet.patcher")
    if getattr(patcher, "already_patched", None):
        raise RuntimeError(
            "syncstream cannot stream under eventlet, whose monkey patching it does not"
            " know: run gunicorn with -k gevent, or with -k gthread --threads N"
        )


def is_greenlet_exit(error: BaseException) -> bool:
    """Tell whether an exception is gevent's way to end this greenlet."""
    greenlet = sys.modules.get("greenlet")
    return greenlet is not None and isinstance(error, greenlet.GreenletExit)


def insist(error: BaseException) -> NoReturn:
    """Raise what the code around a wait has swallowed before: it does not get to again.

    An ``except:`` that goes on catches whatever is raised in its ``try``, for ever. So
    it is raised once more by the first line that runs when the handler has ended: that
    of a loop, or of its ``try:``, which are not in what the handler covers. Not before:
    a ``finally`` or the end of a ``with`` would be skipped, and its lock stay taken.
    """
    package = __name__.partition(".")[0]
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        is_ours = name == package or name.startswith(f"{package}.")
        if is_ours and frames:  # the stream, which runs the source
            break
        if not is_ours:
            frames.append(frame)
        frame = frame.f_back
    before, traces = sys.gettrace(), [frame.f_trace for frame in frames]

    def restore() -> None:
        sys.settrace(before)
        for frame, trace in zip(frames, traces, strict=True):
            frame.f_trace = trace
        frames.clear()
        traces.clear()

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if event == "line" and not _is_handled(error, frame):
            restore()
            raise error
        if event == "return" and frame is frames[-1]:  # nobody has swallowed it
            restore()
        return None if event == "call" else trace

    for frame in frames:
        frame.f_trace = trace
    sys.settrace(trace)
    raise error


def _is_handled(error: BaseException, frame: FrameType) -> bool:
    """Tell whether a line belongs to what is done for an exception on its way."""
    # A ``with`` has its line on the very instruction by which handling begins.
    if frame.f_code.co_code[frame.f_lasti] == _BEGINS_HANDLING:
        return True
    handled = sys.exc_info()[1]
    while handled is not None and handled is not error:
        handled = handled.__context__
    return handled is error


def sleep(seconds: float) -> None:
    """Sleep without holding up others: in a gevent greenlet, let the others run.

    Inside a stream's generator it ends at once, and ends the generator, when the
    client has gone or the stream is told to stop. Elsewhere it is a plain sleep.

    Args:
        seconds: How long; 0 lets others run.

    Raises:
        ClientDisconnected: In a stream's generator: the client has gone.
        GeneratorExit: In a stream's generator: the stream ends for another reason.
        TypeError: ``seconds`` is not a number.
        ValueError: ``seconds`` is negative, or not a number's worth.
    """
    if not isinstance(seconds, (int, float)):
        raise TypeError(f"seconds must be a number, got {seconds!r}")
    if not seconds >= 0:
        raise ValueError(f"seconds must be 0 or more, got {seconds!r}")
    scope = current_scope()
    if scope is None:
        _sleep(seconds)
        return
    scope.check()
    scope.before_wait()
    if seconds and hub() is None:
        _park(scope, seconds)
    else:
        _sleep(seconds)
        scope.check()


def sleep_in_hub(seconds: float) -> None:
    """Let the other greenlets of this hub run."""
    sys.modules["gevent"].sleep(seconds)


def _sleep(seconds: float) -> None:
    # Without monkey-patching time.sleep would hold up the whole hub.
    pause = time.sleep if hub() is None else sleep_in_hub
    while seconds > LONGEST:
        pause(LONGEST)
        seconds -= LONGEST
    pause(seconds)


def wait(waitable: Any, timeout: float | None = None) -> Any:
    """Wait for a queue's next item, an event or a condition.

    It does what the waitable's own ``get(timeout=timeout)`` or ``wait(timeout)``
    does, and in a stream's generator ends as `sleep` does. No polling: a thread is
    woken by the end of the stream as by the waitable itself.

    Args:
        waitable: A ``queue.Queue`` or one of its kin, a ``threading.Event`` or
            ``threading.Condition`` (held by the caller, as always); under gevent
            also gevent's own.
        timeout: Seconds, ``None`` for no limit.

    Returns:
        A queue's item; otherwise whether it was notified, not timed out.

    Raises:
        queue.Empty: The time is over, and the queue has nothing.
        ClientDisconnected, GeneratorExit: As from `sleep`.
        TypeError: It cannot be waited for, or nothing could wake the wait.
        ValueError: ``timeout`` is negative.
    """
    if timeout is not None and not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number or None, got {timeout!r}")
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"timeout must be 0 or more, got {timeout!r}")
    if timeout is not None:  # 146 years: a lock overflows at twice that
        timeout = min(timeout, threading.TIMEOUT_MAX / 2)
    in_hub = hub() is not None
    condition: Any = None if in_hub else _condition_of(waitable)
    if condition is None and not (in_hub and _is_cooperative(waitable)):
        raise TypeError(
            "waitable must be a queue.Queue, an Event or a Condition that this"
            f" {'hub' if in_hub else 'thread'} can wait for, got {waitable!r}"
        )
    scope = current_scope()
    if scope is None:
        return _plain_wait(waitable, timeout)
    scope.check()
    if in_hub:
        if hasattr(waitable, "get_nowait"):
            with suppress(queue.Empty):
                return waitable.get_nowait()
        scope.before_wait()
        try:
            return _plain_wait(waitable, timeout)
        except GeneratorExit:
            # It may have been notified in the same moment: others wait for that.
            _pass_on(_condition_of(waitable))
            raise
    if waitable is condition:
        scope.before_wait()
        return _park(scope, timeout, condition)
    if hasattr(waitable, "is_set"):
        return _event_wait(scope, waitable, timeout)
    return _queue_get(scope, waitable, timeout)


def _event_wait(scope: Scope, event: Any, timeout: float | None) -> bool:
    if event.is_set():
        return True
    scope.before_wait()  # not under the event's lock: it may take time, or set it
    with event._cond:
        # Everybody is notified: there is nothing to pass on.
        return event.is_set() or _park(scope, timeout, event._cond, passes_on=False)


def _queue_get(scope: Scope, items: Any, timeout: float | None) -> Any:
    deadline = None if timeout is None else time.monotonic() + timeout
    has_waited = False
    while True:
        with suppress(queue.Empty):
            return items.get(block=False)
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise queue.Empty
        if not has_waited:
            scope.before_wait()  # not under the queue's lock: it may take time
            has_waited = True
        with items.not_empty:
            if not items._qsize() and not getattr(items, "is_shutdown", False):
                _park(scope, left, items.not_empty)


def _plain_wait(waitable: Any, timeout: float | None) -> Any:
    if hasattr(waitable, "get"):
        return waitable.get(timeout=timeout)
    return waitable.wait(timeout)


def _pass_on(condition: Any) -> None:
    if condition is None or not hasattr(condition, "notify"):
        return
    if condition._is_owned():
        condition.notify()
    else:
        with condition:
            condition.notify()


def _condition_of(waitable: Any) -> Any:
    """Return the condition that wakes who waits, if a single waiter can be told."""
    if hasattr(waitable, "get"):
        condition = getattr(waitable, "not_empty", None)
    elif hasattr(waitable, "is_set"):
        condition = getattr(waitable, "_cond", None)
    else:
        condition = waitable
    # asyncio's have waiters, too, but nothing to release.
    is_one = hasattr(condition, "_waiters") and hasattr(condition, "_release_save")
    return condition if is_one else None


def _is_cooperative(waitable: Any) -> bool:
    """Tell whether a wait for it lets other greenlets run."""
    if not (hasattr(waitable, "get") or hasattr(waitable, "wait")):
        return False
    if type(waitable).__module__.startswith("gevent."):
        return True
    # The standard library's: only as gevent has patched it.
    return _is_patched() and _condition_of(waitable) is not None


def make_lock() -> Any:
    """Return a lock for what waits here: greenlets of a hub, else threads."""
    if hub() is None:
        return native(_thread, "allocate_lock")()
    from gevent.lock import BoundedSemaphore

    return BoundedSemaphore(1)


class Parked:
    """A thread's wait, alone or as one of a condition's, that others can end."""

    __slots__ = ("_condition", "_lock", "is_woken")

    def __init__(self, condition: Any = None) -> None:
        self._condition = condition
        self._lock = native(_thread, "allocate_lock")()
        self._lock.acquire()
        self.is_woken = False

    def wait(self, timeout: float | None) -> bool:
        """Wait; tell whether it was ended, by whomever, before its time."""
        limit = -1.0 if timeout is None else min(timeout, threading.TIMEOUT_MAX)
        condition = self._condition
        if condition is None:
            ended: bool = self._lock.acquire(True, limit)
            return ended
        # What Condition.wait does, with a lock that we know.
        if not condition._is_owned():
            raise RuntimeError("cannot wait on un-acquired lock")
        condition._waiters.append(self._lock)
        saved = condition._release_save()
        ended = has_failed = False
        try:
            ended = self._lock.acquire(True, limit)
        except BaseException:  # a signal handler's, KeyboardInterrupt for one
            has_failed = True
            raise
        finally:
            condition._acquire_restore(saved)
            if not ended:
                try:
                    condition._waiters.remove(self._lock)
                except ValueError:  # ended in the very last moment
                    ended = True
                    if has_failed and not self.is_woken:
                        self.pass_on()
        return ended

    def wake(self) -> bool:
        """End the wait; ``False``: its condition is held, try again soon."""
        condition = self._condition
        if condition is None:
            if not self.is_woken:
                self.is_woken = True
                with suppress(RuntimeError):  # another thread was faster
                    self._lock.release()
            return True
        if not condition.acquire(False):
            return False
        try:
            # Who was notified already is not among them any more.
            if self._lock in condition._waiters:
                condition._waiters.remove(self._lock)
                self.is_woken = True
                self._lock.release()
        finally:
            condition.release()
        return True

    def pass_on(self) -> None:
        """Give the notification that came to the next one: we do not need it."""
        if self._condition is not None:
            self._condition.notify()


def _park(
    scope: Scope,
    timeout: float | None,
    condition: Any = None,
    *,
    passes_on: bool = True,
) -> bool:
    """Wait until notified, or the time is over: tell which; check the scope.

    Args:
        passes_on: A notification that comes to a scope at its end is the next
            waiter's.
    """
    parked = Parked(condition)
    scope.parked = parked
    notified = False
    try:
        if not scope.is_over():
            notified = parked.wait(timeout) and not parked.is_woken
    finally:
        scope.parked = None
    try:
        # Here, where the condition is held: an end that is found out a moment later
        # would take the notification with it.
        scope.check()
    except BaseException:
        if notified and passes_on:
            parked.pass_on()
        raise
    return notified


def say(
    log: logging.Logger,
    level: int,
    message: str,
    *args: Any,
    error: BaseException | None = None,
) -> None:
    """Log a line, soon: for those whom others wait for. From anywhere.

    In a greenlet of the hub that runs here, where a handler may wait as it is used to;
    else in the thread of the journal.
    """
    if not is_enabled(log, level):
        return
    gevent = sys.modules.get("gevent")
    # A hub's callbacks run in the hub, which is a greenlet with a parent, too.
    if gevent is not None and hub_of_this_thread() is not None:
        try:
            if gevent.getcurrent().parent is not None:
                gevent.spawn(report, log, level, message, *args, error=error)
                return
        except Exception as problem:  # it cannot be, any more
            journal().later(log, logging.DEBUG, "not logged in a hub: %r", problem)
    journal().later(log, level, message, *args, error=error)


def hub_of_this_thread() -> Any:
    gevent = sys.modules.get("gevent._hub_local")
    return None if gevent is None else gevent.get_hub_if_exists()
