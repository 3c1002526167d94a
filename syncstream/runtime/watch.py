"""The watch: notices hang-ups and keeps time while generators wait.

One `Watch` per process, and per gevent hub. It knows descriptors and callables, not
streams. In a process of threads it is a thread of its own; under gevent it is one
epoll descriptor inside the hub's own loop, and one timer.

Hang-ups come from epoll, with EPOLLRDHUP and without EPOLLIN: unread bytes never wake
it, and an end behind unread bytes is noticed (measured). Without epoll (macOS), each
socket is checked 20 times a second.

Callbacks must not block: each delays all others, and under gevent they run in the hub,
where nothing may wait. Use `Watch.spawn` for callbacks that block.
"""

from __future__ import annotations

import _thread
import heapq
import itertools
import logging
import math
import os
import select
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from .clock import time
from .forks import process_key
from .sockets import is_hung_up, native
from .waiting import gevent_hub, say
from .worker import Callback, Worker

__all__ = ["GRID", "Timer", "Watch", "on_grid", "watch"]

log = logging.getLogger("syncstream.watch")


LOOK_EVERY = 0.05  # seconds, without epoll
AGAIN = 1.0  # seconds until a failed timer is tried again
_LONGEST = 3600.0  # seconds at a stretch: epoll takes 24 days at most
GRID = 0.08  # seconds between the runs of timers that are not urgent
_COMPACT = 1000  # cancelled timers to keep before removing them


class Timer:
    """A scheduled call.

    Attributes:
        callback: Returns the time of its next call (`time.monotonic`), ``None`` for
            no further call.
        has_failed: Whether the callback has raised before; only its first failure is
            logged.
        is_queued: Whether it waits for its time, and has not been cancelled.
    """

    __slots__ = ("callback", "has_failed", "is_queued")

    def __init__(self, callback: Callable[[], float | None]) -> None:
        self.callback: Callable[[], float | None] | None = callback
        self.has_failed = False
        self.is_queued = True


class Watch:
    """Calls back when a connection hangs up, and when a time has come.

    All methods may be called from any thread of a process of threads, and under
    gevent from the greenlets of its hub; `run` from any thread.

    Attributes:
        ran_at: When a hub's watch last ran timers (`time.monotonic`).
        watched: The callbacks of hang-ups, by descriptor.
        timers: A heap of the timers that are set, the cancelled ones among them.
        lock: Held while either changes, and by no callback.
    """

    def __init__(self) -> None:
        self.ran_at = 0.0
        self.watched: dict[int, Callback] = {}
        self._told: dict[int, Callback] = {}  # hang-ups reported, without epoll
        self.timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._cancelled = 0
        self._process = process_key()
        self._later: deque[Callback] = deque()
        self._is_later_due = False
        # Reentrant: a garbage collection while it is held may close a stream.
        self.lock = native(_thread, "RLock")()
        epoll = native_epoll()
        self._epoll = epoll() if epoll is not None else None
        if self._epoll is None:
            self.call_at(time.monotonic(), self._look)

    # Hang-ups.

    def add(self, fd: int, hung_up: Callback) -> None:
        """Call back, once, when the peer of a socket has closed or reset it.

        Remove it before its server closes it: the number may then be another's.
        """
        with self.lock:
            known = fd in self.watched
            self.watched[fd] = hung_up
            if self._epoll is None:
                self._told.pop(fd, None)
                return
            mask = select.EPOLLRDHUP | select.EPOLLONESHOT
            try:
                self._epoll.register(fd, mask)
            except FileExistsError:  # a previous owner did not remove it
                self._epoll.modify(fd, mask)
            except BaseException:
                if not known:
                    del self.watched[fd]
                raise

    def remove(self, fd: int, hung_up: Callback) -> None:
        """Stop watching a socket, unless its number is watched by another owner now."""
        # A forked child shares the epoll with its parent, which keeps using it; and
        # the lock may be held by a thread that does not exist in the child.
        if self.is_foreign:
            return
        with self.lock:
            if self.watched.get(fd) is not hung_up:
                return
            del self.watched[fd]
            if self._epoll is None:
                self._told.pop(fd, None)
                return
            with suppress(OSError):  # the server has already closed it
                self._epoll.unregister(fd)

    @property
    def is_foreign(self) -> bool:
        """Whether this is a forked child, so that the watch is its parent's."""
        return self._process is not process_key()

    def _look(self) -> float:
        for fd in tuple(self.watched):
            hung_up = self.watched.get(fd)
            if hung_up is None or self._told.get(fd) is hung_up or not is_hung_up(fd):
                continue
            with self.lock:
                if self.watched.get(fd) is not hung_up:  # removed meanwhile
                    continue
                self._told[fd] = hung_up
            self._guarded(hung_up)
        return time.monotonic() + LOOK_EVERY

    def _look_at(self, fd: int) -> None:
        # Check the socket: the number may refer to another one by now.
        hung_up = self.watched.get(fd)
        if hung_up is not None and is_hung_up(fd):
            self._guarded(hung_up)

    def read(self, timeout: float) -> None:
        """Wait for epoll, for at most this many seconds, and report hang-ups."""
        assert self._epoll is not None
        for fd, _ in self._epoll.poll(timeout):
            try:
                if fd in self.watched:
                    self._look_at(fd)
                else:
                    self._woken(fd)
            except Exception as error:
                # Reported only once (EPOLLONESHOT): nobody would check again.
                self.call_at(time.monotonic() + AGAIN, partial(self._look_at, fd))
                text = "a hang-up could not be checked: trying again in %.0f s"
                say(log, logging.ERROR, text, AGAIN, error=error)

    def _do_without_epoll(self, error: BaseException) -> None:
        """Check each socket from now on: other code has closed our epoll descriptor."""
        with self.lock:
            if self._epoll is None:
                return
            self._epoll = None  # not closed: its number may be another file's
            self._told.clear()
        self.call_at(time.monotonic(), self._look)
        text = (
            "the watch's epoll is unusable, probably closed by other code: each"
            " connection is checked for a hang-up %.0f times a second instead"
        )
        say(log, logging.ERROR, text, 1 / LOOK_EVERY, error=error)

    def _woken(self, fd: int) -> None:
        """Handle a ready descriptor that is not a connection."""

    # The clock.

    def call_at(self, when: float, callback: Callable[[], float | None]) -> Timer:
        """Call at a time (`time.monotonic`), and again at the times that it returns.

        Args:
            when: The first time.
            callback: Returns the next time, ``None`` for never again.
        """
        timer = Timer(callback)
        if self.is_foreign:  # no thread runs it, and its lock may stay held
            return timer
        when = _shared(when)
        with self.lock:
            is_first = not self.timers or when < self.timers[0][0]
            heapq.heappush(self.timers, (when, next(self._order), timer))
        if is_first:
            self._wake()
        return timer

    def cancel(self, timer: Timer) -> None:
        """Cancel a timer."""
        if timer.callback is None:
            return
        if self.is_foreign:
            timer.callback = None
            return
        with self.lock:
            timer.callback = None
            if not timer.is_queued:  # it has run, or is running
                return
            timer.is_queued = False
            self._cancelled += 1
            if self._cancelled > max(_COMPACT, len(self.timers) // 2):
                self._cancelled = 0
                timers, self.timers = self.timers, []
                live = [t for t in timers if t[2].callback is not None]
                self.timers += live  # a garbage collection may have added some
                heapq.heapify(self.timers)

    def later(self, callback: Callback) -> None:
        """Call once: within `GRID`, or under gevent when the caller's hub runs next.

        It costs less than a timer, or than a descriptor in epoll, and need not be
        cancelled: it is for what is mostly over by then.
        """
        self._later.append(callback)
        # Cleared before the calls are made: none is missed.
        if self._is_later_due:
            return
        self._is_later_due = True
        try:
            self._begin_later()
        except BaseException:
            self._is_later_due = False  # the next call tries again
            raise

    def _begin_later(self) -> None:
        self.call_at(on_grid(time.monotonic() + GRID / 2), self._call_later)

    def _call_later(self) -> None:
        if self.is_foreign:  # a forked child: the calls are the parent's
            return
        self._is_later_due = False
        for _ in range(len(self._later)):
            self._guarded(self._later.popleft())

    def _run_timers(self) -> float | None:
        """Make the calls that are due; return the time of the next one."""
        now = time.monotonic()  # calls that become due later wait for the next round
        while True:
            with self.lock:
                if not self.timers:
                    return None
                when, _, timer = self.timers[0]
                callback = timer.callback
                if callback is None:  # cancelled
                    heapq.heappop(self.timers)
                    self._cancelled -= 1
                    continue
                if when > now:
                    return when
                heapq.heappop(self.timers)
                timer.is_queued = False
            again: float | None = now + AGAIN  # if even a BaseException ends the call
            try:
                again = self._guarded(callback, timer)
            finally:
                if again is not None:
                    # Not in this round: a time in the past would loop for ever.
                    again = max(again, time.monotonic())
                    with self.lock:
                        if timer.callback is not None:
                            timer.is_queued = True
                            entry = _shared(again), next(self._order), timer
                            heapq.heappush(self.timers, entry)

    def _wake(self) -> None:
        """Wake the watch: its first timer has changed."""
        raise NotImplementedError

    def _guarded(self, callback: Callable[[], Any], timer: Timer | None = None) -> Any:
        """Call; a failure ends neither the watch nor the timer: it is tried again."""
        try:
            return callback()
        except Exception as error:
            if timer is None or not timer.has_failed:
                text = (
                    "a callback of the watch failed: its stream may not notice an end"
                )
                say(log, logging.ERROR, text, error=error)
            if timer is None:
                return None
            timer.has_failed = True
            return time.monotonic() + AGAIN

    # Elsewhere.

    @property
    def is_over(self) -> bool:
        """Whether its hub has been destroyed, so that no callback will run."""
        return False

    def run(self, callback: Callback) -> None:
        """Run a callback where greenlets may be interrupted. From any thread."""
        raise NotImplementedError

    def spawn(self, callback: Callback) -> None:
        """Run a callback that may block briefly, soon, one after the other."""
        raise NotImplementedError

    def close(self) -> None:
        """End it, and close its descriptors. (A process keeps its own to its exit.)"""
        if self._epoll is not None:
            self._epoll.close()


class _ThreadWatch(Watch):
    """The watch of a process of threads: it runs in a thread of its own."""

    def __init__(self) -> None:
        self._ready = native_lock()  # without epoll: released to wake the thread
        self._event_fd = -1
        self._is_over = False
        super().__init__()
        if self._epoll is not None:
            self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            if self._epoll is not None:
                self._epoll.register(self._event_fd, select.EPOLLIN)
            self._thread = threading.Thread(target=self._loop, name="syncstream-watch")
            self._thread.daemon = True
            self._thread.start()
        except BaseException:  # no thread can be started: the next call tries again
            if self._epoll is not None:
                self._epoll.close()
                os.close(self._event_fd)
            raise

    def _loop(self) -> None:
        while not self._is_over:
            # Signal handlers run in the main thread, so none raises an exit here.
            try:
                self._round()
            except BaseException as error:
                text = "the watch for hang-ups failed and goes on"
                say(log, logging.ERROR, text, error=error)
                native(time, "sleep")(0.1)  # avoid a busy loop, whatever the error is

    def _round(self) -> None:
        when = self._run_timers()
        left = -1.0 if when is None else _left(when)
        if self._epoll is None:
            self._ready.acquire(True, left)
            return
        try:
            self.read(left)
        except (OSError, ValueError) as error:  # ValueError: closed
            self._event_fd = -1
            self._do_without_epoll(error)

    def _wake(self) -> None:
        event_fd = self._event_fd
        if event_fd >= 0:
            os.eventfd_write(event_fd, 1)
        elif self._epoll is None:
            with suppress(RuntimeError):  # it is awake
                self._ready.release()

    def _woken(self, fd: int) -> None:
        if fd == self._event_fd:
            os.eventfd_read(fd)

    def run(self, callback: Callback) -> None:
        self._guarded(callback)

    def spawn(self, callback: Callback) -> None:
        self._guarded(callback)

    def close(self) -> None:
        self._is_over = True
        self._wake()
        self._thread.join()
        super().close()
        if self._event_fd >= 0:
            os.close(self._event_fd)


class _GeventWatch(Watch):
    """The watch of a gevent hub: it runs in the hub's loop, without a thread."""

    def __init__(self, hub: Any) -> None:
        self._gevent_hub = weakref.ref(hub)
        self._timer: Any = None
        self._timer_at = float("inf")
        self._io: Any = None
        self._worker = Worker(self._guarded)
        self._calls: deque[Callback] = deque()
        # gevent's run_callback_threadsafe counts references without a lock while the
        # loop runs (libev's ev_ref), and sometimes the loop ended with LoopExit (gevent
        # 26.9). libev allows other threads to call ev_async_send only.
        self._async = hub.loop.async_(ref=False)
        self._async.start(self._run_calls)
        super().__init__()
        if self._epoll is not None:
            # An epoll descriptor is readable when one of its own is ready. Without
            # a reference: a hub with nothing else to wait for may end.
            self._io = hub.loop.io(self._epoll.fileno(), 1, ref=False)
            self._io.start(self._read_now)

    def _read_now(self) -> None:
        if self.is_foreign:  # a forked child: the event is the parent's
            self._io.stop()
            return
        try:
            self.read(0)
        except (OSError, ValueError) as error:
            self._io.stop()
            self._do_without_epoll(error)

    def _wake(self) -> None:
        hub = self._gevent_hub()
        if hub is None or not self.timers:
            return
        when = self.timers[0][0]
        if when >= self._timer_at:
            return
        self._set_timer(hub, when)

    def _begin_later(self) -> None:
        hub: Any = self._gevent_hub()
        hub.loop.run_callback(self._call_later)

    def _set_timer(self, hub: Any, when: float) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
        self._timer_at = when
        # Not early: the loop's clock is slightly behind ours.
        left = _left(when) + 0.0005
        self._timer = hub.loop.timer(left, ref=False)
        self._timer.start(self._tick, update=True)

    def _tick(self) -> None:
        self.ran_at = time.monotonic()
        self._timer_at = float("inf")
        if self.is_foreign:
            return
        try:
            self._run_timers()
        finally:  # even after an exit that the program may survive
            self._wake()

    @property
    def is_over(self) -> bool:
        return getattr(self._gevent_hub(), "loop", None) is None

    @property
    def is_home(self) -> bool:
        """Whether its hub is the main thread's, which lives as long as the program."""
        return not self.is_over and bool(getattr(self._gevent_hub(), "main_hub", False))

    def run(self, callback: Callback) -> None:
        self._calls.append(callback)
        self._async.send()

    def _run_calls(self) -> None:
        try:
            while self._calls:
                self._guarded(self._calls.popleft())
        finally:
            if self._calls:
                self._async.send()

    def spawn(self, callback: Callback) -> None:
        self._worker.jobs.append(callback)
        self._worker.begin()

    def start(self, callback: Callback) -> None:
        """Run a callback in a greenlet of its own. Call it in the hub."""
        import gevent

        gevent.spawn(self._guarded, callback)

    def close(self) -> None:
        for watcher in (self._io, self._timer, self._async):
            if watcher is not None:
                watcher.stop()
                watcher.close()
        super().close()


def _left(when: float) -> float:
    """Return the longest time to wait, so that the next timer is checked in time."""
    return min(max(0.0, when - time.monotonic()), _LONGEST)


def on_grid(when: float) -> float:
    """Return a slightly later time that timers share.

    A wake-up costs more than the call itself: 100 µs in a gevent hub.
    """
    place = when / GRID
    # Floats beyond this are coarser than the grid, and infinity has no ceiling.
    return math.ceil(place) * GRID if place < 1e15 else when


def _shared(when: float) -> float:
    return when if when - time.monotonic() < 1 else on_grid(when)


def elsewhere(watch: Watch, job: Callback) -> None:
    """Run a job outside of the watch, because it may block, for example on a broker.

    The job runs in a greenlet of the watch's hub if that is the main thread's, else in
    a new thread: other threads' hubs may be gone, or run only while something waits in
    them.
    """
    if isinstance(watch, _GeventWatch) and watch.is_home:
        watch.run(partial(watch.start, job))
        return
    try:
        native(_thread, "start_new_thread")(watch._guarded, (job,))
    except (RuntimeError, MemoryError):  # no thread can be started: block the watch
        watch._guarded(job)


def native_lock() -> Any:
    """Return a real lock: hold it briefly, and never while a greenlet switches."""
    return native(_thread, "allocate_lock")()


def native_epoll() -> Any:
    """Return the real ``select.epoll``, which gevent removes; ``None`` without one."""
    if not hasattr(os, "eventfd"):
        return None
    try:
        return native(select, "epoll")
    except AttributeError:
        return None


class Watches:
    """The watches of one process."""

    def __init__(self) -> None:
        self.process = process_key()
        self.lock = native_lock()
        self.of_threads: Watch | None = None
        self.of_hubs: weakref.WeakKeyDictionary[Any, Watch] = (
            weakref.WeakKeyDictionary()
        )

    def close(self) -> None:
        """End them all."""
        for one in (self.of_threads, *self.of_hubs.values()):
            if one is not None:
                one.close()


watches = Watches()


def watch() -> Watch:
    """Return the watch of the caller's gevent hub, else that of this process's threads.

    It is made, and its thread started, by the first call.
    """
    global watches
    if watches.process is not process_key():  # forked: the others are the parent's
        watches = Watches()
    here = gevent_hub()
    with watches.lock:
        if here is None:
            if watches.of_threads is None:
                watches.of_threads = _ThreadWatch()
            return watches.of_threads
        found = watches.of_hubs.get(here)
        if found is None:
            found = watches.of_hubs[here] = _GeventWatch(here)
        return found
