"""Waiting, and the one module that tells whether a thread or a greenlet waits.

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
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from opcode import opmap
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from .clock import time
from .greenlets import outermost
from .journal import is_enabled, journal, report
from .sockets import native
from .tasks import refuse_in_task

if TYPE_CHECKING:
    from .waiter import Waiter

__all__ = [
    "LONGEST",
    "ThreadWait",
    "Scope",
    "current",
    "current_scope",
    "entered",
    "gevent_hub",
    "gevent_hub_of_thread",
    "insist",
    "is_greenlet_exit",
    "is_patched",
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
    """The stream that runs here, as waits and subscriptions see it.

    Attributes:
        is_running: Whether the stream is inside its source now.
        runner: The thread or greenlet that runs the stream.
        reference: A weak reference to the stream.
        has_waited: Set by a wait that lets other greenlets of the hub run.
        was_told: Whether the stream's end has been raised in its source, which should
            not wait again.
        thread_wait: The wait that blocks the stream's thread, ``None`` if none does.
            Ending a stream marks its end first and then reads this; a wait sets this
            first and then checks for an end, so that neither misses the other.
        has_resumed: Whether a subscription has begun after ``last_event_id``, which no
            other subscription may use then.
    """

    has_resumed: bool
    is_running: bool
    has_waited: bool
    was_told: bool
    runner: object
    thread_wait: ThreadWait | Waiter | None

    @property
    def reference(self) -> Reference: ...

    @property
    def last_event_id(self) -> str | None:
        """The id of the last event that the client has received, if it sent one."""

    @property
    def is_multiprocess(self) -> bool:
        """Whether the server answers requests in other processes, too."""

    def on_close(self, callback: Callable[[], object]) -> None:
        """Register a callback for the stream's end."""

    def abandon(self, reason: str) -> None:
        """End the stream even though a call in its source may never return."""

    def is_over(self) -> bool:
        """Tell whether the stream has ended, so that waiting is pointless."""

    def check(self) -> None:
        """Raise `ClientDisconnected` or another `GeneratorExit` if the stream is over.

        It is raised once, and again in a source that swallows it and waits again, which
        `insist` ends at last; never while that is closed: its ``finally`` may wait.
        """

    def before_wait(self) -> None:
        """Release what must not be held during a wait, such as database connections."""

    def ending(self) -> GeneratorExit:
        """Return the exception that tells the source of its end."""


Reference = Callable[[], Any]

current: ContextVar[Reference | None] = ContextVar("syncstream_scope", default=None)
"""A weak reference to the scope last entered here, which may have stopped running or be
gone. Call `current_scope` instead of reading this."""


def runner() -> object:
    """Return the identity of the running greenlet or, without greenlets, thread."""
    return runner_function()()


def runner_function() -> Callable[[], object]:
    """Return the function behind `runner`, to be called many times."""
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


class entered:
    """Runs a block in a scope, in this thread or greenlet.

    A class, as it costs a third of what `contextlib.contextmanager` does.
    """

    __slots__ = ("_scope", "_token", "_was_running")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def __enter__(self) -> None:
        scope = self._scope
        self._token = current.set(scope.reference)
        self._was_running = scope.is_running
        scope.runner = runner()
        scope.is_running = True

    def __exit__(self, *_: object) -> None:
        self._scope.is_running = self._was_running
        current.reset(self._token)


def gevent_hub() -> Any:
    """Return the gevent hub that the caller's waits run in; ``None``: a thread waits.

    Greenlets wait in their hub. In a patched process everything does, including the
    main greenlet. The hub itself cannot wait.
    """
    gevent = sys.modules.get("gevent")
    getcurrent = getattr(gevent, "getcurrent", None)
    if gevent is None or getcurrent is None:
        return None
    greenlet = outermost(getcurrent())
    if greenlet.parent is None and not is_patched():
        return None
    hub = gevent.get_hub()
    return None if greenlet is hub else hub


def is_patched() -> bool:
    """Tell whether gevent has patched `threading`: its threads are greenlets."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def refuse_eventlet() -> None:
    """Refuse to run in a process that eventlet has patched.

    Raises:
        RuntimeError: eventlet has replaced the locks and sockets that waits use.
    """
    patcher = sys.modules.get("eventlet.patcher")
    if getattr(patcher, "already_patched", None):
        raise RuntimeError(
            "syncstream cannot stream under eventlet, whose monkey patching it does not"
            " support: run gunicorn with -k gevent, or with -k gthread --threads N"
        )


def is_greenlet_exit(error: BaseException) -> bool:
    """Tell whether gevent raised this exception to end a greenlet."""
    greenlet = sys.modules.get("greenlet")
    return greenlet is not None and isinstance(error, greenlet.GreenletExit)


def insist(error: BaseException) -> NoReturn:
    """Raise an exception that the code around a wait has swallowed before.

    An ``except:`` inside a loop would catch the exception for ever. So a trace function
    raises it once more at the first line that runs after the handler, such as the line
    of the loop or of its ``try:``, which the handler does not cover. Raising it earlier
    would skip a ``finally`` or the end of a ``with``, and leave a lock taken.
    """
    package = __name__.partition(".")[0]
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        is_ours = name == package or name.startswith(f"{package}.")
        if frames and (is_ours or name == "asyncio.events"):  # what called the source
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
        if event == "return" and frame is frames[-1]:  # it was not swallowed
            restore()
        return None if event == "call" else trace

    for frame in frames:
        frame.f_trace = trace
    sys.settrace(trace)
    raise error


def _is_handled(error: BaseException, frame: FrameType) -> bool:
    """Tell whether the frame is handling this exception, or cleaning up after it."""
    # Cleaning up a ``with`` runs on the line of the ``with`` itself: only the
    # instruction shows that handling begins.
    if frame.f_code.co_code[frame.f_lasti] == _BEGINS_HANDLING:
        return True
    handled = sys.exc_info()[1]
    while handled is not None and handled is not error:
        handled = handled.__context__
    return handled is error


def sleep(seconds: float) -> None:
    """Sleep; a gevent greenlet lets the other greenlets run meanwhile.

    Inside a stream's generator the sleep ends at once, and ends the generator, when the
    client has gone or the stream is told to stop. Elsewhere it is a plain sleep.

    Args:
        seconds: How long to sleep; 0 lets other threads or greenlets run.

    Raises:
        ClientDisconnected: In a stream's generator: the client has gone.
        GeneratorExit: In a stream's generator: the stream ends for another reason.
        TypeError: ``seconds`` is not a number.
        ValueError: ``seconds`` is negative or NaN.
    """
    if not isinstance(seconds, (int, float)):
        raise TypeError(f"seconds must be a number, got {seconds!r}")
    if not seconds >= 0:
        raise ValueError(f"seconds must be 0 or more, got {seconds!r}")
    scope = current_scope()
    if scope is None:
        refuse_in_task("await asyncio.sleep(seconds)")
        _sleep(seconds)
        return
    scope.check()
    scope.before_wait()
    if seconds and gevent_hub() is None:
        _wait_in_thread(scope, seconds)
    else:
        _sleep(seconds)
        scope.check()


def sleep_in_hub(seconds: float) -> None:
    """Let the other greenlets of this hub run."""
    sys.modules["gevent"].sleep(seconds)


def _sleep(seconds: float) -> None:
    # Without monkey patching, time.sleep would block the whole hub.
    pause = time.sleep if gevent_hub() is None else sleep_in_hub
    while seconds > LONGEST:
        pause(LONGEST)
        seconds -= LONGEST
    pause(seconds)


def wait(waitable: Any, timeout: float | None = None) -> Any:
    """Wait for a queue's next item, an event or a condition.

    It does the same as the waitable's own ``get(timeout=timeout)`` or
    ``wait(timeout)``, and in a stream's generator it ends as `sleep` does. Nothing is
    polled: the end of the stream wakes a thread just as the waitable does.

    Args:
        waitable: A ``queue.Queue`` or a subclass or sibling of it, a
            ``threading.Event``, or a ``threading.Condition`` that the caller holds;
            under gevent also gevent's own.
        timeout: Seconds, ``None`` for no limit.

    Returns:
        A queue's item; for events and conditions, ``False`` after a time-out, else
        ``True``.

    Raises:
        queue.Empty: The queue was empty until the time-out.
        ClientDisconnected, GeneratorExit: As from `sleep`.
        TypeError: ``waitable`` is of another kind, or cannot wake this thread or
            greenlet.
        ValueError: ``timeout`` is negative or NaN.
    """
    if timeout is not None and not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number or None, got {timeout!r}")
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"timeout must be 0 or more, got {timeout!r}")
    if timeout is not None:  # 146 years: a lock overflows at twice that
        timeout = min(timeout, threading.TIMEOUT_MAX / 2)
    in_hub = gevent_hub() is not None
    condition: Any = None if in_hub else _condition_of(waitable)
    if condition is None and not (in_hub and _is_cooperative(waitable)):
        raise TypeError(
            "waitable must be a queue.Queue, an Event or a Condition that this"
            f" {'hub' if in_hub else 'thread'} can wait for, got {waitable!r}"
        )
    scope = current_scope()
    if scope is None:
        refuse_in_task("await what asyncio has for it, such as an asyncio.Queue")
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
            # It may have been notified at the same moment: pass that on to another
            # waiter, or the notification would be lost.
            _pass_on(_condition_of(waitable))
            raise
    if waitable is condition:
        scope.before_wait()
        return _wait_in_thread(scope, timeout, condition)
    if hasattr(waitable, "is_set"):
        return _event_wait(scope, waitable, timeout)
    return _queue_get(scope, waitable, timeout)


def _event_wait(scope: Scope, event: Any, timeout: float | None) -> bool:
    if event.is_set():
        return True
    # Not under the event's lock: the hook may take time, or set the event.
    scope.before_wait()
    with event._cond:
        # An event notifies all waiters: nothing needs to be passed on.
        return event.is_set() or _wait_in_thread(
            scope, timeout, event._cond, passes_on=False
        )


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
            scope.before_wait()  # not under the queue's lock: the hook may take time
            has_waited = True
        with items.not_empty:
            if not items._qsize() and not getattr(items, "is_shutdown", False):
                _wait_in_thread(scope, left, items.not_empty)


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
    """Return a waitable's condition; ``None``: no single waiter of it can be woken."""
    if hasattr(waitable, "get"):
        condition = getattr(waitable, "not_empty", None)
    elif hasattr(waitable, "is_set"):
        condition = getattr(waitable, "_cond", None)
    else:
        condition = waitable
    # asyncio.Condition has waiters, too, but no _release_save.
    is_usable = hasattr(condition, "_waiters") and hasattr(condition, "_release_save")
    return condition if is_usable else None


def _is_cooperative(waitable: Any) -> bool:
    """Tell whether waiting for this lets other greenlets run."""
    if not (hasattr(waitable, "get") or hasattr(waitable, "wait")):
        return False
    if type(waitable).__module__.startswith("gevent."):
        return True
    # The standard library's classes cooperate only when gevent has patched them.
    return is_patched() and _condition_of(waitable) is not None


def make_lock() -> Any:
    """Return a lock for greenlets of this hub or, outside of gevent, for threads."""
    if gevent_hub() is None:
        return native(_thread, "allocate_lock")()
    from gevent.lock import BoundedSemaphore

    return BoundedSemaphore(1)


class ThreadWait:
    """A thread's wait, of its own or for a condition, which other threads can end.

    Attributes:
        lock: Taken while it waits; the condition's next notification releases it.
        is_woken: Whether `wake` has ended it.
    """

    __slots__ = ("_condition", "is_woken", "lock")

    def __init__(self, condition: Any = None) -> None:
        self._condition = condition
        self.lock = native(_thread, "allocate_lock")()
        self.lock.acquire()
        self.is_woken = False

    def wait(self, timeout: float | None) -> bool:
        """Wait; return ``False`` after a time-out, ``True`` if woken or notified."""
        limit = -1.0 if timeout is None else min(timeout, threading.TIMEOUT_MAX)
        condition = self._condition
        if condition is None:
            ended: bool = self.lock.acquire(True, limit)
            return ended
        # The same as Condition.wait, but with our own lock, so that we can release it.
        if not condition._is_owned():
            raise RuntimeError("cannot wait on un-acquired lock")
        condition._waiters.append(self.lock)
        saved = condition._release_save()
        ended = has_failed = False
        try:
            ended = self.lock.acquire(True, limit)
        except BaseException:  # from a signal handler, such as KeyboardInterrupt
            has_failed = True
            raise
        finally:
            condition._acquire_restore(saved)
            if not ended:
                try:
                    condition._waiters.remove(self.lock)
                except ValueError:  # woken or notified just now
                    ended = True
                    if has_failed and not self.is_woken:
                        self.pass_on()
        return ended

    def wake(self) -> bool:
        """End the wait; ``False``: its condition is locked, so try again soon."""
        condition = self._condition
        if condition is None:
            if not self.is_woken:
                self.is_woken = True
                with suppress(RuntimeError):  # another thread was faster
                    self.lock.release()
            return True
        if not condition.acquire(False):
            return False
        try:
            # A waiter that was notified has left the list already.
            if self.lock in condition._waiters:
                condition._waiters.remove(self.lock)
                self.is_woken = True
                self.lock.release()
        finally:
            condition.release()
        return True

    def pass_on(self) -> None:
        """Pass a notification that this wait no longer needs on to the next waiter."""
        if self._condition is not None:
            self._condition.notify()


def _wait_in_thread(
    scope: Scope,
    timeout: float | None,
    condition: Any = None,
    *,
    passes_on: bool = True,
) -> bool:
    """Wait; return whether a notification ended it, not a time-out; check the scope.

    If the scope has ended, the notification is passed on to the next (``passes_on``).
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        scope.thread_wait = place = ThreadWait(condition)
        try:
            is_over = scope.is_over()
            notified = not is_over and place.wait(timeout) and not place.is_woken
        finally:
            scope.thread_wait = None
        try:  # while the condition is held: later, the notification would be lost
            scope.check()
        except BaseException:
            if notified and passes_on:
                place.pass_on()
            raise
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        # Woken without an end: a test has moved the clock.
        if notified or not place.is_woken or timeout == 0:
            return notified


def say(
    log: logging.Logger,
    level: int,
    message: str,
    *args: Any,
    error: BaseException | None = None,
) -> None:
    """Log a line soon, without blocking the caller, which may be any thread or hub.

    The line is logged in a new greenlet of this thread's hub, where a handler may wait
    as usual; without a hub, in the journal's thread.
    """
    if not is_enabled(log, level):
        return
    gevent = sys.modules.get("gevent")
    # The hub, which runs callbacks, is a greenlet with a parent, too.
    if gevent is not None and gevent_hub_of_thread() is not None:
        try:
            if outermost(gevent.getcurrent()).parent is not None:
                gevent.spawn(report, log, level, message, *args, error=error)
                return
        except Exception as problem:  # the hub has been destroyed
            text = "the gevent hub is gone, its log line moves to a thread: %r"
            journal().later(log, logging.DEBUG, text, problem)
    journal().later(log, level, message, *args, error=error)


def gevent_hub_of_thread() -> Any:
    gevent = sys.modules.get("gevent._hub_local")
    return None if gevent is None else gevent.get_hub_if_exists()
