"""`Monitor`: the watch's side of a stream: its descriptor, its clock, its time-outs.

It notices what a waiting source cannot: the client has left, a time limit is over, the
server is stopping. It then decides the stream's end and wakes the source, but never
closes it.

Unless they say otherwise, its methods run in the watch: in its thread, or in a callback
of the hub. The stream is referenced weakly: one that is dropped ends.
"""

from __future__ import annotations

import _thread
import logging
import math
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from ..runtime.clock import time
from ..runtime.process import Attached, Process, Served, process
from ..runtime.sockets import (
    GRACE,
    acknowledged,
    give_up_after,
    has_timed_out,
    native,
)
from ..runtime.waiting import Scope, gevent_hub, sleep_in_hub
from ..runtime.watch import Timer, Watch, watch
from .contract import Life
from .ends import CUT
from .interrupt import throw_into
from .keepalive import Keepalive
from .links import AGAIN, USELESS, Link, place_of, unblock
from .outcome import Once, Outcome
from .output import PIECE, Output
from .send_timeout import LOOKS, Progress, SendTimeout, progress_of
from .source import Source

__all__ = ["WATCHED_LOOK_EVERY", "Monitor", "jittered"]

R = TypeVar("R")

log = logging.getLogger("syncstream.stream")

WATCHED_LOOK_EVERY = 1.0
"""At most every so many seconds a busy stream that is watched looks by itself."""
VANISH_EVERY = 0.1  # seconds between two looks whether the server has closed a socket
SOON = 1.0  # seconds: a shorter time limit is watched from the first step on
STARVED = 0.2  # seconds in which a hub has not run its watch
STUCK = 1.0  # seconds that a write may block once the stream has ended
# Seconds without progress, of a client whose server is to stop. TCP tells of one that
# reads by steps of 64 kB and more: at 20 kB/s every 3 s.
FROZEN = 5.0
GHOST = 30.0  # seconds after which a source that has not noticed its end is named
THROW_EVERY = 2.5  # seconds: gunicorn leaves no more to a worker after its streams
_WAKE_AGAIN = 0.005  # seconds; until then whoever holds a condition has let go of it


class Monitor:
    """Watches one stream, from its first step until its server is done with it.

    Many methods: one clock looks at three kinds of time limits, those of the stream's
    life, of a client that takes nothing and of a server that stops.

    Args:
        scope: Returns the stream, ``None`` once it is gone.
        outcome, output, source, life: The stream's parts.

    Attributes:
        keepalive: Writes the stream's keepalives.
        watch: The watch, ``None`` before the first step, at the end, and if no watch
            can be started.
        in_hub: Whether the source runs in a greenlet.
        process: The process's record, ``None`` before the first step.
        served: The server's open streams, which this one is among; ``None`` before the
            first step, and once the server is done with it.
        began: The time of the first step, `time.monotonic`.
        deadline: When ``max_duration`` is over, `time.monotonic`; infinity for never.
        thrown_at: When the source's thread was interrupted; 0 for never.
    """

    def __init__(
        self,
        scope: Callable[[], Scope | None],
        outcome: Outcome,
        output: Output,
        source: Source,
        life: Life,
    ) -> None:
        self._scope = scope
        self._outcome = outcome
        self._output = output
        self._source = source
        self._life = life
        self.keepalive = Keepalive(scope, outcome, output, life.keepalive)
        self.watch: Watch | None = None
        self.in_hub = False
        self.process: Process | None = None
        self.served: Served | None = None
        self.began = 0.0
        self.deadline = math.inf
        self.thrown_at = 0.0
        self._send_timeout: SendTimeout | None = None
        self._timer: Timer | None = None
        self._hung_up: Callable[[], object] | None = None
        self._fd = -1
        self._is_awaiting = False  # `settle`
        self._kernel_timeout: float | None = None  # what held before ours
        self._thread = 0
        self._look_at = 0.0
        self._stuck_since = 0.0  # it takes nothing, while its server is to stop
        self._stuck_at: Progress | None = None  # its progress then
        self._named = Once()
        self._unblocked: tuple[tuple[Link, ...], object] | None = None  # and from where

    # From its first step on, in the thread or greenlet that iterates.

    def begin(
        self, stream: Attached, watching: Literal["now", "soon", "never"] = "now"
    ) -> None:
        """Add the stream to its process's open streams, and have it watched.

        Args:
            stream: The stream.
            watching: When its connection and its clock are watched: from now on; from
                its source's first wait, or a moment later (see `settle`); never, as it
                leaves its server in a moment.
        """
        self.began = self._output.moved = now = time.monotonic()
        self.in_hub = gevent_hub() is not None
        self._thread = threading.get_ident()
        if self.in_hub:  # where gevent has patched it to tell greenlets
            self._thread = native(_thread, "get_ident")()
        record = self.process = process()
        connection, life = self._output.connection, self._life
        if life.max_duration is not None:
            self.deadline = now + jittered(life.max_duration)
        try:
            if (
                connection is not None
                and life.keepalive
                and self._output.format.is_events
            ):
                connection.find_write()
            if watching == "now":
                self.observe()
            else:
                self._observe_later(is_ever=watching == "soon")
            self.served = record.opened(
                stream,
                self.watch,
                connection.server_key if connection is not None else None,
                lambda: connection.stopping if connection is not None else None,
            )
        except BaseException:
            self._leave_watch()
            raise

    def observe(self) -> None:
        """Have the connection and the clock watched."""
        try:
            self.watch = watch()
            self._find_socket()
            self._observe(self.watch)
        except (OSError, RuntimeError) as error:  # no descriptor or thread is left
            self._say_unwatched(error)

    def _observe_later(self, *, is_ever: bool) -> None:
        """Have the connection and the clock watched from `settle` on, if ever.

        Most sources that do not wait have ended before.
        """
        connection = self._output.connection
        may_vanish = connection is not None and connection.may_vanish
        if is_ever and (may_vanish or self._life.soonest < SOON):
            self.observe()
            return
        try:
            self.watch = watch()
            if is_ever:
                self._find_socket()
                self._is_awaiting = True
                self.watch.later(_weakly(self.settle, None))
        except (OSError, RuntimeError) as error:  # no descriptor or thread is left
            self._say_unwatched(error)

    def settle(self) -> None:
        """Have the connection and the clock watched, unless they are, or it is over.

        Called before the source's waits, in its thread or greenlet, and by the watch.
        """
        watch = self.watch
        if not self._is_awaiting or watch is None or watch.is_foreign:
            return
        if self.in_hub and native(_thread, "get_ident")() != self._thread:
            return  # the hub will do it: its loop is no other thread's to touch
        try:
            with watch.lock:
                if self._is_awaiting:
                    self._is_awaiting = False
                    # The server may have closed it, and another have its number.
                    if self._fd >= 0 and not self._has_socket(self._fd):
                        self._fd = -1
                    self._observe(watch)
        except (OSError, RuntimeError) as error:  # no descriptor is left
            self._say_unwatched(error)

    def _find_socket(self) -> None:
        connection = self._output.connection
        fd = connection.fd if connection is not None else None
        self._fd = -1 if fd is None else fd

    def _observe(self, watch: Watch) -> None:
        if self._fd >= 0:
            # First: the client may have gone already, and we are told at once.
            self._hung_up = _weakly(self._on_hang_up, None)
            watch.add(self._fd, self._hung_up)
        tick = self._next_tick(time.monotonic())
        if tick < math.inf and self._timer is None:  # an end may have set one
            self._timer = watch.call_at(tick, _weakly(self._tick, None))

    def _say_unwatched(self, error: Exception) -> None:
        self._output.say(logging.WARNING, "%s is not watched for a hang-up", error)

    def leave_connection(self) -> None:
        """Stop watching the connection: its descriptor will be another file's."""
        if self.watch is not None:
            self._stop_watching(self.watch)
        self._fd = -1

    def _stop_watching(self, watch: Watch) -> None:
        with watch.lock:  # `settle` may run in the watch
            self._is_awaiting = False
            timer, hung_up = self._timer, self._hung_up
            self._timer = self._hung_up = None
            if timer is not None:
                watch.cancel(timer)
            if hung_up is not None:
                watch.remove(self._fd, hung_up)

    @property
    def is_watching(self) -> bool:
        """Whether the watch reports a hang-up."""
        return self._hung_up is not None

    def look(self, now: float) -> None:
        """Check in the body for what the watch would report if it came to run."""
        watch, connection, scope = self.watch, self._output.connection, self._scope()
        # A generator that never waits never lets the hub run: nobody else is served,
        # and gunicorn's SIGQUIT comes to nothing.
        if scope is not None and scope.has_waited:
            scope.has_waited = False
        elif self.in_hub and watch is not None and now - watch.ran_at > STARVED:
            sleep_in_hub(0)
        if now >= self.deadline:
            self._outcome.decide("max_duration")
        if self._hung_up is not None and now < self._look_at:
            return
        self._look_at = now + WATCHED_LOOK_EVERY
        if connection is not None and connection.is_hung_up():
            self._outcome.decide(self.how_gone())
            return
        until = self.until()
        if until is not None:
            assert self.served is not None
            since = self.served.since or now
            if time.monotonic() >= self._drained_at(since, until):
                self._outcome.decide("shutdown")

    def until(self) -> float | None:
        """Return until when work may go on; ``None`` if the server is not stopping."""
        process, served = self.process, self.served
        if process is None or served is None:
            return None
        return process.until(served)

    def piece(self, size: int) -> int:
        """Return the size of a chunk's pieces that shows the client's progress."""
        is_seen = self._fd < 0 or acknowledged(self._fd) is not None
        return size if is_seen else PIECE

    # Its end.

    def end(self, reason: str) -> None:
        """Decide the end from outside of the source, and wake that; any thread."""
        if self._outcome.decide(reason):
            self.wake()

    def wake(self) -> None:
        """Interrupt the source's wait, soon; from any thread."""
        if self.watch is not None:
            self.watch.run(self._bring_through)
        elif not self.in_hub:
            self.interrupt()

    def _bring_through(self) -> None:
        """Interrupt the source, and check soon whether it has ended."""
        watch, timer = self.watch, self._timer
        if watch is not None:
            if timer is not None:
                watch.cancel(timer)
            when = time.monotonic() + STUCK
            self._timer = watch.call_at(when, _weakly(self._tick, None))
        self.interrupt()

    def interrupt(self) -> None:
        """Interrupt the source's wait: in a hub callback or, for a thread, any thread.

        Under gevent the decision and the throw are one callback of the hub, so no
        other greenlet runs in between: thrown a moment later (`gevent.kill`), it
        could hit the server's own code, or its next request's.
        """
        scope, outcome = self._scope(), self._outcome
        if scope is None or not scope.is_running or outcome.is_closing:
            return
        if self.in_hub:
            outcome.is_closing = scope.was_told = True
            runner: Any = scope.runner
            runner.throw(outcome.error())
            return
        if outcome.links:
            self._unblock(scope, tuple(outcome.links))
        waits = scope.thread_wait
        if waits is not None and not waits.wake() and self.watch is not None:
            # Somebody holds its condition just now.
            self.watch.call_at(
                time.monotonic() + _WAKE_AGAIN,
                lambda: None if waits.wake() else time.monotonic() + _WAKE_AGAIN,
            )

    def _unblock(self, scope: Scope, links: tuple[Link, ...]) -> None:
        """End the reads of the links, again and again while the source is in one."""
        began, place = time.monotonic(), place_of(links)
        reference, outcome, output = self._scope, self._outcome, self._output
        self._unblocked = links, place

        def is_there() -> bool:
            return place_of(links) == place

        def unblock_again() -> float | None:
            now, stream = time.monotonic(), reference()
            if stream is None or not stream.is_running or outcome.is_closing:
                return None
            is_late = now - began >= USELESS
            if not is_there():  # it cleans up, perhaps by these
                return None if is_late else now + AGAIN
            if stream.thread_wait is not None:
                return now + AGAIN
            if is_late:
                _say_useless(links, output)
                return None
            unblock(links, is_there, is_waiting=False)
            return now + AGAIN

        unblock(links, is_there, is_waiting=scope.thread_wait is not None)
        if self.watch is not None:
            self.watch.call_at(began + AGAIN, unblock_again)

    def cut_off(self) -> None:
        """Cut the connection while the source may never return.

        A greenlet has been interrupted. A thread cannot be: the server notices the cut
        when the source goes on.
        """
        scope, connection = self._scope(), self._output.connection
        if (
            connection is not None
            and scope is not None
            and scope.is_running
            and not self.in_hub
            and self._has_socket(self._fd)
        ):
            connection.drop()

    def forget(self, stream: Attached) -> None:
        """Remove the stream from the watch and the process: the server is done."""
        served, self.served = self.served, None
        if served is None or self.process is not process():
            return  # a forked child's copy: the socket is its parent's, too
        self.process.closed(stream, served)
        self._leave_watch()

    def _leave_watch(self) -> None:
        fd = self._fd
        if self._output.connection is not None:
            self._output.connection.leave_write()
        watch, self.watch = self.watch, None
        if watch is not None:
            self._stop_watching(watch)
        self._fd = -1
        # The connection may serve other requests after this one.
        if self._send_timeout is not None and fd >= 0 and self._has_socket(fd):
            give_up_after(fd, self._kernel_timeout)

    # Its connection.

    def _has_socket(self, fd: int) -> bool:
        """Tell whether a descriptor is still our connection's."""
        connection = self._output.connection
        return connection is not None and connection.fd == fd

    def _on_hang_up(self) -> None:
        self.end(self.how_gone())

    def how_gone(self) -> str:
        """Return the reason for a client that is gone; first come, first told.

        Whoever is first clears the kernel's error, or the server's next write would
        fail with that: see `has_timed_out`.
        """
        fd = self._fd
        timed_out = fd >= 0 and self._has_socket(fd) and has_timed_out(fd)
        return "send_timeout" if timed_out else "disconnected"

    def _is_full(self) -> bool:
        """Tell whether a write would block now."""
        connection = self._output.connection
        is_open = self._fd >= 0 and self._has_socket(self._fd)
        return is_open and connection is not None and connection.is_full()

    def _drop(self) -> None:
        """Make a blocked write fail."""
        if self._output.connection is not None:
            self._output.connection.drop()

    # Its clock.

    def _next_tick(self, now: float) -> float:
        """Return the time of the next tick, `time.monotonic`; infinity for never."""
        if self._outcome.ended:
            tick = now + STUCK
        else:
            due = self.keepalive.next_time(now)
            tick = self.deadline if due is None else min(self.deadline, due)
        if self._life.send_timeout is not None and self._fd >= 0:
            if self._send_timeout is None:
                due = now + self._life.send_timeout / LOOKS
            else:
                due = self._send_timeout.next_time(now)
            tick = min(tick, due)
        connection = self._output.connection
        if connection is not None and connection.may_vanish:
            tick = min(tick, now + VANISH_EVERY)
        return tick

    def _tick(self) -> float | None:
        """Check what is due; return the time of the next tick."""
        if self.watch is None:
            return None
        now = time.monotonic()
        if self._outcome.ended:
            self._look_after_the_end(now)
        if self._fd >= 0 and not self._has_socket(self._fd):
            # waitress closes from its own thread, and epoll forgets what is closed.
            self.end("disconnected")
            return None
        if now >= self.deadline:
            self.end("max_duration")
        if self._fd >= 0 and self._life.send_timeout is not None:
            self._look_at_the_client(now, self._life.send_timeout)
        if self.keepalive.is_due(now) and not self._outcome.ended:
            self.watch.spawn(self.keepalive.write)
        tick = self._next_tick(time.monotonic())
        return None if tick == math.inf else tick

    def _look_at_the_client(self, now: float, seconds: float) -> None:
        """Drop a client that has accepted no data for ``send_timeout``."""
        if self._send_timeout is None:  # now: most streams have ended before
            self._send_timeout = SendTimeout(self._output, seconds)
            self._kernel_timeout = give_up_after(self._fd, seconds + GRACE)
        scope = self._scope()
        is_running = scope is not None and scope.is_running
        if self._send_timeout.look(now, self._fd, is_running=is_running):
            self.end("send_timeout")
            self._drop()

    # From its end until its server is done with it.

    def _look_after_the_end(self, now: float) -> None:
        """Cut a blocked write; name a source that has not noticed its end."""
        scope, reason = self._scope(), self._outcome.reason
        since = now - self._outcome.at
        if scope is not None and scope.is_running:
            if since >= GHOST:
                self.name_source(
                    f"has not yielded for {GHOST:.0f} s since its stream has ended"
                    f" ({reason}), and holds its thread and its place: let it wait"
                    " in syncstream.sleep or stream.wait, or yield None now and then"
                )
        elif reason in CUT and since >= STUCK and self._is_full():
            self._drop()

    def name_source(self, what: str) -> None:
        """Log, once a stream, what is wrong with its source, with its place."""
        if self._named.set("named"):
            self._output.say(logging.WARNING, f"{self._source.name} of %s {what}")

    # While its server stops; in any thread.

    def shut_down(self, since: float, until: float) -> None:
        """End the stream, or let it finish; arguments as for `Stream.shut_down`."""
        now = time.monotonic()
        if now >= self._drained_at(since, until):
            self.end("shutdown")
        self._hurry(now, until)

    def _drained_at(self, since: float, until: float) -> float:
        """Return when this stream must end, if its server is stopping."""
        return min(until, since + self.drain)

    @property
    def drain(self) -> float:
        """The seconds for which the source may go on when its server is to stop."""
        if self._source.feed is not None:
            return 0.0  # it never ends by itself
        if self._life.drain is not None:
            return self._life.drain
        return 0.0 if self._output.comes_back else math.inf

    def _hurry(self, now: float, until: float) -> None:
        """Keep a stopping server from waiting for this stream.

        A client that accepts no data is cut, whether its stream has ended or not.
        """
        scope = self._scope()
        if scope is not None and scope.is_running:
            self._stuck_since = 0.0
            if self._is_deaf(scope, now, until):
                self.thrown_at = now
                throw_into(self._thread, lambda: scope.is_running)
            return
        if not self._is_full():
            self._stuck_since = 0.0
            return
        connection = self._output.connection
        assert connection is not None
        progress = progress_of(connection, self._fd, self._output.bytes)
        is_unwanted = self._outcome.reason in CUT
        if not self._stuck_since or (progress != self._stuck_at and not is_unwanted):
            self._stuck_since, self._stuck_at = now, progress
        elif now - self._stuck_since >= (STUCK if is_unwanted else FROZEN):
            self.end("shutdown")
            self._drop()

    def _is_deaf(self, scope: Scope, now: float, until: float) -> bool:
        """Tell whether a thread ignores the end, and so keeps its server from stopping.

        Such a thread waits in none of our waits. It gets a moment to end by itself, and
        is interrupted once: its ``finally`` may take until the drain is over. A thread
        whose linked read was ended has been told, too.
        """
        outcome = self._outcome
        if not outcome.ended or self.in_hub or outcome.is_closing:
            return False
        if scope.thread_wait is not None:
            return False
        if self.thrown_at or self._has_moved():
            told_at = self.thrown_at or outcome.at
            return now >= until and now - told_at >= THROW_EVERY
        return now - outcome.at >= STUCK

    def _has_moved(self) -> bool:
        """Tell whether a source has left the read out of which its links got it."""
        if self._unblocked is None:
            return False
        links, place = self._unblocked
        return place_of(links) != place


def jittered(seconds: float) -> float:
    """Return up to a tenth less: clients that came together return apart."""
    return seconds * random.uniform(0.9, 1)


def _say_useless(links: tuple[Link, ...], output: Output) -> None:
    names = sorted({type(link.closable).__qualname__ for link in links})
    text = (
        f"%s goes on {USELESS:.0f} s after its end: what it has linked"
        f" ({', '.join(names)}) does not end what it waits in; link the socket,"
        " the response or the process that it reads from"
    )
    process().say_once(log, logging.WARNING, text, output.label)


def _weakly(method: Callable[[], R], default: R) -> Callable[[], R]:
    """Return a call of a method that does not keep its object alive."""
    # Not `weakref.WeakMethod`, which takes three times as long to make.
    bound: Any = method
    reference, function = weakref.ref(bound.__self__), bound.__func__

    def call() -> R:
        found = reference()
        return default if found is None else function(found)

    return call
