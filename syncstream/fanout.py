"""Subscribers without a thread: the connections that their servers have let go.

One native thread per process, also under gevent, owns them: it waits for all of them
at once, and sends each event's bytes, which were made once, to all who are at one
place of a channel. A client costs an entry in a table, not a stack.

**Who owns what.** A descriptor that came here is this loop's alone, and only the loop's
thread writes to it or closes it. It is taken out of epoll before it is closed, and out
of the table of clients before that, so no number is ever another's. What came by epoll
for a client that ended in the same round finds no client.

**What fails, fails alone.** Each call, timer and descriptor of a round has its owner, a
client or a group. If it raises, nobody knows what those clients have got: they are cut,
and come back. All others go on. Nothing is logged here but by a `Journal`, after what
it is about; and a loop that cannot go on says so, cuts all of its clients, and leaves
its place to another one.

**No user code runs in the loop**, nor does it ask a broker: what needs either is done
in one of the `Lanes`, threads, or under gevent greenlets of the hub that the request
had. `authorize` has a `Crew`: who is not answered in time is denied, and the others are
asked by another thread. So what an application does, or does not come back from, holds
up those alone who have code of it: not what others get, nor the places that they leave.

Clients that are at the same place of the same channel, in the same framing, make a
`Group`: it has a leader, a subscription that nobody counts, whose place is theirs.
Whoever cannot take all of a chunk at once leaves it, goes on by itself from its own
place, and joins again where it has caught up. Subscriptions to several channels, with
a key or a throttle, remain by themselves.
"""

from __future__ import annotations

import _queue
import _thread
import errno
import heapq
import logging
import math
import os
import random
import select
import socket
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from .capacity import Place
from .clock import time
from .errors import Closed, Unavailable
from .hub import ANSWER, Apart, Subscription
from .journal import MOST, is_enabled, journal, report
from .process import EXIT_WAIT, Process, Served, process
from .protocol.sse import Event
from .senders import Sender, open_sender
from .sockets import (
    acknowledged,
    borrowed,
    has_timed_out,
    hold,
    native,
    queued,
    release,
    reset,
)
from .waiting import hub
from .watch import Watch, Worker, native_epoll, native_lock, watch

__all__ = ["Client", "Fanout", "Lane", "Lanes", "Terms", "come_back", "fanout"]

log = logging.getLogger(__name__)

SEND_BUFFER = 128 * 1024  # bytes; the kernel's own grows to megabytes, and hides a lag
GRAIN = 0.05  # seconds: timers are as exact as that
LAG_EVERY = 0.25  # seconds between two looks at those who lag
STUCK = 60.0  # seconds for one thing in a lane; then those who wait for it are ended
RETRY_EVERY = 1.0  # seconds between two questions to a broker that is down
MOST_ASKING = 128  # threads, or greenlets of a hub, in `authorize` at once
_LONGEST = 60.0  # seconds between two rounds; epoll takes 24 days at most
_MOST_FAILURES = 10  # rounds in a row, 0.1 s after each other: then it cannot go on
_DRAINED = 16 * 65536  # bytes of a client that nobody reads are dropped at its end

# 0 where there is no epoll. (gevent takes select.epoll away, and leaves these.)
_OUT: int = getattr(select, "EPOLLOUT", 0)
_GONE: int = sum(
    getattr(select, name, 0) for name in ("EPOLLRDHUP", "EPOLLERR", "EPOLLHUP")
)

_END = b"0\r\n\r\n"
_COME_BACK = {  # milliseconds; browsers' own 3 to 5 s would hammer a broken view
    "shutdown": 1000,
    "max_duration": 1000,
    "refused": 2000,
    "denied": 5000,
    "kicked": 5000,
    "error": 5000,
}


_WHOLE = frozenset(("closed", "finished"))
"""Ends that the application has asked for, and says are none of a failure's."""


def come_back(reason: str, retry: int) -> bytes:
    """Return what asks a client to come back, after an end in good order or not.

    Jittered, or all the clients that were here return together. Those that are not
    wanted come back, too, for ever: let it be seldom, at least.

    Args:
        reason: Why the stream has ended.
        retry: Milliseconds, at least.
    """
    least = _COME_BACK.get(reason)
    if least is None:
        return b""
    return Event(retry=round(max(retry, least) * random.uniform(1, 3))).encode()


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass(frozen=True, slots=True)
class Terms:
    """What many clients have in common; equal ones are kept once.

    Attributes:
        lanes: Do what the loop may not.
        process, served: Where their streams are counted.
        is_chunked: The framing of their responses.
        keepalive, send_timeout: Seconds, ``None`` for never.
        retry: Milliseconds, at least, after which they are to come back.
        comes_back: They take an end in good order for a break, as EventSources do.
        reasons: Why an application may end a stream.
        before_wait: What gives back, after code of the application has run, what
            should not be held.
        comment: The keepalive, in the form that these clients read.
    """

    lanes: Lanes
    process: Process
    served: Served
    is_chunked: bool
    keepalive: float | None
    send_timeout: float | None
    retry: int
    comes_back: bool
    reasons: frozenset[str]
    before_wait: tuple[Callable[[], object], ...] = ()
    comment: bytes = b": keepalive\n\n"

    def give_back(self) -> None:
        """Call the hooks; one that fails keeps nobody waiting."""
        for hook in self.before_wait:
            try:
                hook()
            except BaseException as error:
                text = "what gives back before a wait failed"
                self.lanes.say(logging.ERROR, text, error=error)


class Client:
    """One connection, and the subscription that is sent to it.

    It stands where a thread would wait: a channel, or who ends the subscription,
    wakes it (see `waiting.Waiter`).

    Args:
        loop: The loop that is to have it.
        fd: The connection's descriptor, the loop's from now on.
        subscription: It has begun.
        terms: From `Fanout.terms`.
        label: For the log.
        began, deadline: `time.monotonic`.
        callbacks: The application's; called when it has ended.
        place: Given back when it has ended, whatever the application does.
        events, bytes: What has been sent, or will be with its head.
    """

    __slots__ = (
        *("_loop", "_offer", "acknowledged", "answer_by", "began", "bucket"),
        *("bytes", "callbacks"),
        *("deadline", "early", "events", "fd", "group", "is_lagged", "label", "place"),
        *("reason", "rest", "since", "subscription", "terms"),
    )

    hub: None = None  # no gevent hub's: `wake_all` calls `wake`

    def __init__(
        self,
        loop: Fanout,
        fd: int,
        subscription: Subscription,
        terms: Terms,
        *,
        label: str,
        began: float,
        deadline: float = math.inf,
        callbacks: tuple[Callable[[], object], ...] = (),
        place: Place | None = None,
        events: int = 0,
        bytes: int = 0,
    ) -> None:
        self._loop = loop
        self._offer = [loop]  # see `claim`
        self.fd = fd
        self.subscription = subscription
        self.terms = terms
        self.label = label
        self.began = began
        self.deadline = deadline
        self.callbacks = callbacks
        self.place = place
        self.events, self.bytes = events, bytes  # less its group's: see Group
        self.reason: str | None = None
        self.is_lagged = False  # dropped for that
        self.early: str | None = None  # an end that came before the client itself
        self.group: Group | None = None  # always, from `_add` to its end
        self.rest: memoryview | None = None  # of a chunk that the kernel has not taken
        self.since = 0.0  # it takes nothing
        self.acknowledged: int | None = None
        self.answer_by: float | None = None  # the application's, while it is asked
        self.bucket = 0

    @property
    def is_given(self) -> bool:
        """Its descriptor is the loop's; or was."""
        return self in self.terms.served.parked or self.reason is not None

    def claim(self) -> bool:
        """Tell whether it is the caller's, once: the loop's, or who could not give it.

        One step, which is whole or not done: its descriptor has one owner.
        """
        with suppress(IndexError):
            self._offer.pop()
            return True
        return False

    def wake(self) -> bool:
        self._loop.call(self.turn, self)
        return True

    def turn(self) -> None:
        """Look what there is, in the loop."""
        if self.reason is not None:
            return
        reason = self.subscription.reason
        if reason is not None:
            self._loop.end(self, reason if reason in self.terms.reasons else "closed")
        elif self.group is not None and not self.group.is_shared:
            self.group.turn()

    def stop(self, reason: str = "closed") -> None:
        """End it, from any thread."""
        self._loop.call(partial(self._loop.end, self, reason), self)

    def on_close(self, callback: Callable[[], object]) -> None:
        """Call this, too, when it has ended; from any thread."""
        self._loop.call(partial(self._add_callback, callback), self)

    def _add_callback(self, callback: Callable[[], object]) -> None:
        if self.reason is None:
            self.callbacks = (*self.callbacks, callback)
        else:
            self.terms.lanes.users.do(callback)

    # Its times: see `_Wheel`.

    def next_time(self) -> float:
        return min(self.deadline, self.subscription.ask_again_at)

    def due(self, now: float) -> None:
        if self.reason is not None:
            return
        if now >= self.deadline:
            self._loop.end(self, "max_duration")
        elif self.answer_by is not None:
            if now >= self.answer_by:
                self._loop.end(self, "denied")
                text = "authorize of %s has not answered in %g seconds: it is denied"
                self.terms.lanes.say(logging.WARNING, text, self.label, ANSWER)
            else:  # it waits for others, which may never come back
                self.terms.lanes.asks.hurry()
                again = min(self.answer_by, now + ANSWER / 4)
                self._loop.wheel.add(self, min(self.deadline, again))
        elif now >= self.subscription.ask_again_at:
            self.answer_by = now + ANSWER
            self._loop.do(self.terms.lanes.asks, self._ask_again, self)
            self._loop.wheel.add(self, min(self.deadline, now + ANSWER / 4))
        else:
            self._loop.wheel.add(self, self.next_time())

    def _ask_again(self) -> None:
        """Ask the application whether it may go on; in the crew."""
        if self.reason is not None:  # since it was to be asked
            return
        try:
            self.subscription.ask()
        except BaseException as error:  # a sys.exit() ends nobody else
            self._loop.call(partial(self._loop.fail, self, error), self)
        else:
            self._loop.call(self._again, self)
        finally:
            self.terms.give_back()

    def _again(self) -> None:
        if self.reason is None:  # or its answer came too late
            self.answer_by = None
            self._loop.wheel.add(self, self.next_time())
            self.turn()

    def leave(self) -> None:
        """Give back what it had of ours, and count it; in the lane of ends."""
        reason, terms = str(self.reason), self.terms
        seconds = time.monotonic() - self.began
        for step in (
            self._leave_place,
            partial(terms.process.count, reason, seconds, self.events, self.bytes),
            partial(self._part, reason, seconds),
        ):
            _run(step)  # one that fails keeps no other from it

    def _leave_place(self) -> None:
        if self.place is not None:
            self.place.release()

    def _part(self, reason: str, seconds: float) -> None:
        try:
            close = partial(self._close, reason, seconds)
            if self.subscription.announcement is None:
                close()
            else:  # others are told by a broker, who may take his time
                job = _Job(close, lambda error: self._forget(seconds))
                self.terms.lanes.reads.do(job)
        except BaseException:  # or it would be counted for ever
            self._forget(seconds)
            raise

    def _close(self, reason: str, seconds: float) -> None:
        is_left = True
        try:
            try:
                self.subscription.close(reason)
            except BaseException as error:
                text = "the subscription of %s could not be closed"
                self.terms.lanes.say(logging.ERROR, text, self.label, error=error)
            # It is freed as soon as nobody has it, without a garbage collection.
            self.subscription.detach(None)
            if self.callbacks:
                finish = partial(self._finish, seconds)
                job = _Job(finish, lambda error: self._forget(seconds))
                self.terms.lanes.users.do(job)
                is_left = False
        except BaseException as error:
            text = "the callbacks at the end of %s cannot be called"
            self.terms.lanes.say(logging.ERROR, text, self.label, error=error)
        finally:
            if is_left:
                self._forget(seconds)

    def _finish(self, seconds: float) -> None:
        """Call what the application wants to have called; in its lane."""
        callbacks, self.callbacks = self.callbacks, ()
        try:
            for callback in callbacks:
                try:
                    callback()
                except BaseException as error:
                    text = "a callback at the end of %s failed"
                    self.terms.lanes.say(logging.ERROR, text, self.label, error=error)
            self.terms.give_back()
        finally:
            self._forget(seconds)

    def _forget(self, seconds: float) -> None:
        self.terms.served.parked.discard(self)
        self.terms.lanes.say(  # at the process's exit it is waited for
            logging.DEBUG,
            "%s ended: %s, %.3f s, %d events, %d bytes",
            *(self.label, self.reason, seconds, self.events, self.bytes),
        )


class Group:
    """The clients who are at one place, its leader's; or one that is by itself.

    Attributes:
        clients: By descriptor.
        terms: Those of the first; in what matters here they are all the same.
        events, bytes: What each of them would have got that was there from the
            beginning.
    """

    __slots__ = (
        *("_loop", "bucket", "bytes", "clients", "events", "is_asking", "is_shared"),
        *("asked", "is_woken", "key", "lane", "leader", "moved", "retry_at", "terms"),
    )

    hub: None = None

    def __init__(
        self, loop: Fanout, leader: Subscription, client: Client, key: Hashable = None
    ) -> None:
        self._loop = loop
        self.leader = leader
        self.key = key
        self.is_shared = key is not None
        self.terms = client.terms
        self.clients: dict[int, Client] = {}
        self.events = self.bytes = 0
        self.is_asking = False  # a lane reads for it
        self.is_woken = False  # meanwhile
        self.retry_at = 0.0  # not before; 0: at any time
        self.lane: Lane | None = None  # the one that reads for it, or was the last to
        self.asked = 0.0  # when it was asked to
        self.moved = time.monotonic()
        self.bucket = 0
        loop.wheel.add(self, self.next_time())

    def wake(self) -> bool:
        self._loop.call(self.turn, self)
        return True

    def add(self, client: Client) -> None:
        self.clients[client.fd] = client
        client.group = self
        client.events -= self.events
        client.bytes -= self.bytes

    def remove(self, client: Client) -> None:
        del self.clients[client.fd]
        self.left(client)

    def left(self, client: Client) -> None:
        """Take note that a client has been removed."""
        client.group = None
        client.events += self.events
        client.bytes += self.bytes
        if self.clients:
            return
        try:
            self._loop.drop(self)
        except BaseException:  # twice, if need be: nobody else forgets it
            self._loop.drop(self)
            raise

    def let_go(self) -> None:
        """Be woken no more."""
        if self.is_shared:
            self.leader.detach(None)
        else:
            self.leader.withdraw()

    def turn(self) -> None:
        """Send what is new; or have it read in a lane; or wait."""
        self.is_woken = True
        if not self._may_send() or time.monotonic() < self.retry_at:
            return
        found = self.leader.poll() if self.leader.is_plain else None
        if found is None:
            lanes = self.terms.lanes
            lane = lanes.users if self.leader.has_user_code else lanes.reads
            self._loop.do(lane, self._ask, self)
            # What it is told, and who wakes it, is told to the loop, later than this.
            self.is_asking, self.is_woken = True, False
            self.lane, self.asked = lane, time.monotonic()
            self._loop.wheel.add(self, self.next_time())
            return
        chunk, count = found
        if chunk:
            self.send(chunk, count)
            self._loop.again(self.turn, self)
        elif not self.is_shared:
            self._loop.merge(self)

    def _may_send(self) -> bool:
        # While a lane reads, the leader's place is not yet its clients'.
        if self.is_asking:
            return False
        if self.is_shared:
            return bool(self.clients)
        # Its only one may have to take the rest of something first.
        return any(client.rest is None for client in self.clients.values())

    def _ask(self) -> None:
        """Read, with all that this may call; in a lane."""
        told: Any
        try:
            told = self.leader.step()
        except BaseException as error:
            told = error
        if self.leader.has_user_code:
            self.terms.give_back()
        self._loop.call(partial(self._told, told), self)

    def _told(self, told: Any) -> None:
        self.is_asking = False
        if not self.clients:
            self.let_go()
            return
        if isinstance(told, Unavailable):
            self._retry(time.monotonic() + RETRY_EVERY)
            self.terms.lanes.say(logging.DEBUG, "a channel cannot be read: %s", told)
            return
        if isinstance(told, Apart):
            for client in tuple(self.clients.values()):
                self._loop.guard(client, partial(self._go_apart, client))
            return
        if isinstance(told, BaseException):
            for client in tuple(self.clients.values()):
                self._loop.guard(client, partial(self._loop.fail, client, told))
            return
        chunk, count, when = told
        if chunk:
            self.send(chunk, count)
            self._loop.again(self.turn, self)
        elif when is not None:
            self._retry(when)
        elif self.is_woken:  # after the lane had looked
            self.turn()
        elif not self.is_shared:
            self._loop.merge(self)

    def _go_apart(self, client: Client) -> None:
        alone = self._loop.part(client)
        self._loop.again(alone.turn, alone)

    def _retry(self, when: float) -> None:
        self.retry_at = when
        self._loop.wheel.add(self, self.next_time())

    def send(self, data: bytes, count: int = 0) -> None:
        """Send it to all; who cannot take all of it goes on by itself."""
        framed = _chunked(data) if self.terms.is_chunked else data
        self.moved = time.monotonic()
        self.events += count
        self.bytes += len(data)
        self.leader.count(count * len(self.clients))
        loop = self._loop
        try:
            rest = loop.sender.send(self.clients, framed)
        except BaseException as error:
            loop.cut(self, error)
            loop.replace_sender()
            return
        for fd, taken in rest:
            client = self.clients[fd]
            try:
                if taken >= 0:
                    loop.lag(client, memoryview(framed)[taken:])
                elif -taken in (errno.EAGAIN, errno.ENOBUFS):
                    loop.lag(client, memoryview(framed))
                else:
                    loop.hung_up(client)
            except BaseException as error:
                loop.cut(client, error)

    # Its times: see `_Wheel`.

    def _let_clients_go(self) -> None:
        """End all, who would get keepalives and nothing else; they may come back."""
        text = "what %d subscribers wait for has not come in %g seconds: they are ended"
        self.terms.lanes.say(logging.ERROR, text, len(self.clients), STUCK)
        for client in tuple(self.clients.values()):
            self._loop.guard(client, partial(self._loop.end, client, "error"))

    def next_time(self) -> float:
        keepalive = self.terms.keepalive
        due = math.inf if keepalive is None else self.moved + keepalive
        return min(due, self._stuck_at(), self.retry_at or math.inf)

    def _stuck_at(self) -> float:
        """Return when its lane has been at one thing for too long; maybe never."""
        if self.lane is None or not self.is_asking:
            return math.inf
        return max(self.asked, self.lane.began) + STUCK

    def due(self, now: float) -> None:
        if not self.clients:
            return
        if now >= self._stuck_at():
            self._let_clients_go()
            return
        if self.retry_at and now >= self.retry_at:
            self.retry_at = 0.0
            self.turn()
        keepalive = self.terms.keepalive
        if keepalive is not None and now - self.moved >= keepalive:
            if self._may_send():
                self.send(self.terms.comment)
            self.moved = now
        if self.clients:
            self._loop.wheel.add(self, self.next_time())


class _Wheel:
    """Timers, one for each object, as exact as `GRAIN`; cheap to move and to drop."""

    def __init__(self) -> None:
        self._buckets: dict[int, dict[int, Any]] = {}
        self._heap: list[int] = []

    def add(self, item: Any, when: float) -> None:
        """Have its ``due`` called at a time, and at no other."""
        self.remove(item)
        place = when / GRAIN
        if place > 1e15:  # never, or in a million years
            return
        number = max(1, math.ceil(place))
        bucket = self._buckets.get(number)
        if bucket is None:
            # First: a number without a bucket is passed over, a bucket without its
            # number would never be found.
            heapq.heappush(self._heap, number)
            bucket = self._buckets[number] = {}
        bucket[id(item)] = item
        item.bucket = number

    def remove(self, item: Any) -> None:
        bucket = self._buckets.get(item.bucket)
        if bucket is not None:
            bucket.pop(id(item), None)
        item.bucket = 0

    def left(self) -> float:
        """Return the seconds until the next one; -1 if there is none."""
        while self._heap and not self._buckets.get(self._heap[0]):
            self._pop()
        if not self._heap:
            return -1.0
        return max(0.0, self._heap[0] * GRAIN - time.monotonic())

    def _pop(self) -> None:
        self._buckets.pop(self._heap[0], None)
        heapq.heappop(self._heap)

    def run(self, failed: Callable[[Any, BaseException], object]) -> None:
        """Call what is due.

        Args:
            failed: Is told of one whose ``due`` has raised, and what that was.
        """
        now = time.monotonic()
        while self._heap and self._heap[0] * GRAIN <= now:
            # One by one: what ends this leaves the others where they are.
            bucket = self._buckets.get(self._heap[0])
            while bucket:
                _, item = bucket.popitem()
                item.bucket = 0
                try:
                    item.due(now)
                except BaseException as error:
                    failed(item, error)
            self._pop()


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


class _HubLane(Lane):
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
        _run(job)

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
                _run(job)
                job = None  # or it would live on while nothing is to be done
        finally:
            with self._lock:
                self._threads -= 1


class _HubCrew:
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
                _run(self._jobs.popleft())
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


class _Job:
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


def _run(job: Callable[[], object]) -> None:
    try:
        job()
    except BaseException as error:  # the others go on
        _failed(job, error)


def _failed(job: Callable[[], object] | None, error: BaseException) -> None:
    if isinstance(job, _Job):
        try:
            job.failed(error)
        except BaseException as second:
            _say("work for a subscriber failed twice", second)
    _say("work for a subscriber failed", error)


def _say(message: str, error: BaseException, *args: Any) -> None:
    # Without the memory for a line nothing can be said, and everything else goes on.
    with suppress(BaseException):
        journal().later(log, logging.ERROR, message, *args, error=error)


class Fanout:
    """The loop. Get it from `fanout`.

    `add`, `call` and a client's `stop` may be used from any thread; all else is the
    loop's own.
    """

    def __init__(self) -> None:
        epoll = native_epoll()
        if epoll is None:
            raise OSError(errno.ENOSYS, "no epoll on this system")
        self.wheel = _Wheel()
        self.sender: Sender = open_sender("write")  # until the thread has its own
        # What to call, and whose it is: see `cut`.
        self._calls: deque[tuple[Owner, Callable[[], object]]] = deque()
        self._again: deque[tuple[Owner, Callable[[], object]]] = deque()
        self._is_woken = self._is_abandoned = False
        self.is_dead = False  # it takes no one any more
        self._burying = native(_thread, "RLock")()
        self._clients: dict[int, Client] = {}
        self._lagging: dict[int, Client] = {}
        self._looked_at = 0.0
        self._shared: dict[Hashable, Group] = {}
        self._terms: dict[Terms, Terms] = {}
        self._lanes: dict[Any, Lanes] = {}
        self._lanes_lock = native_lock()
        self._epoll = epoll()
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._event_fd, select.EPOLLIN)
        self._is_over = False
        self._ended = native_lock()  # the thread's, until then
        self._ended.acquire()
        try:
            native(_thread, "start_new_thread")(self._run, ())
        except BaseException:
            self._epoll.close()
            os.close(self._event_fd)
            raise
        process().at_exit(self.quit)

    # From any thread.

    def quit(self) -> None:
        """Let the thread end before the interpreter does, and wait a little for that.

        It would wake in the midst of that: greenlet then brings the process down
        (segmentation fault, Python 3.10).
        """
        self._is_over = True
        self.call(lambda: None)
        self._ended.acquire(True, EXIT_WAIT)

    def call(self, function: Callable[[], object], owner: Owner = None) -> None:
        """Call this in the loop, soon; not in a child that has been forked.

        Args:
            owner: Who is cut if it fails.
        """
        if self._is_abandoned:
            return
        self._calls.append((owner, function))
        if self.is_dead:
            self._call_the_last()
        # Set by those who call, cleared by the loop before it looks: none is missed.
        elif not self._is_woken:
            self._is_woken = True
            try:
                os.eventfd_write(self._event_fd, 1)
            except OSError as error:
                # Somebody has closed it: the loop finds that out, within a minute.
                _say("the loop of the subscribers cannot be woken", error)

    def do(self, lane: Doer, job: Callable[[], object], owner: Owner) -> None:
        """Have this done in a lane."""
        # If it fails, the loop would wait for it for ever.
        lane.do(_Job(job, lambda error: self.call(partial(self.cut, owner, error))))

    def lanes(self) -> Lanes:
        """Return the lanes of what runs here: of a thread, or of a gevent hub.

        Raises:
            RuntimeError: No thread is left.
        """
        own = None if hub() is None else watch()
        with self._lanes_lock:
            threads = self._lanes.get(None)
            if threads is None:
                ends = Lane()
                reads, users = Lane(ends), Lane(ends)
                crew = Crew()
                threads = Lanes(ends, reads, users, crew, journal())
                self._lanes[None] = threads
            found = threads
            if own is not None:  # it has the watch, so its id is no other's
                found = self._lanes.get(id(own)) or self._lanes.setdefault(
                    id(own),
                    Lanes(
                        _HubLane(own, threads.ends),
                        _HubLane(own, threads.reads),
                        _HubLane(own, threads.users),
                        _HubCrew(own, threads.asks),
                        _HubLane(own, threads.logs, MOST),
                    ),
                )
        found.ends.start()
        return found

    def prepare(
        self,
        process: Process,
        served: Served,
        *,
        keepalive: float | None,
        send_timeout: float | None,
        retry: int,
        comes_back: bool,
        reasons: frozenset[str],
        before_wait: tuple[Callable[[], object], ...] = (),
        comment: bytes = b": keepalive\n\n",
    ) -> tuple[Terms, Terms]:
        """Make all that a client needs and that can fail, before it is taken.

        Args:
            process, served, keepalive, send_timeout, retry, comes_back, reasons,
                before_wait, comment: As for `Terms`.

        Returns:
            Those of a response that is raw, and of one in chunks.

        Raises:
            RuntimeError: No thread is left.
        """
        lanes, life = self.lanes(), (keepalive, send_timeout, retry, comes_back)
        rest = (*life, reasons, before_wait, comment)
        return (
            self._same(Terms(lanes, process, served, False, *rest)),
            self._same(Terms(lanes, process, served, True, *rest)),
        )

    def _same(self, terms: Terms) -> Terms:
        """Return the same object for equal ones."""
        if len(self._terms) > 1000:  # an application makes a hook for each request
            self._terms.clear()
        try:
            return self._terms.setdefault(terms, terms)
        except Exception as error:  # its hooks need not be comparable
            report(log, logging.DEBUG, "terms are not shared: %r", error)
            return terms

    def add(self, client: Client, head: bytes) -> None:
        """Take a client on.

        Args:
            client: Its subscription has begun, and was detached to it; its descriptor
                is the loop's from now.
            head: What is to be sent before all else, framed.
        """
        hold(client.fd)
        parked = client.terms.served.parked
        parked.add(client)  # first: see `Client.is_given`
        try:
            self.call(partial(self._add, client, head), client)
        except BaseException:
            if client.claim():  # the loop has not heard of it, or will not take it
                parked.discard(client)
            raise

    # The loop.

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            self._have_sender()
            failures = 0
            while not self._is_over and failures < _MOST_FAILURES:
                try:
                    self._round()
                    failures = 0
                except BaseException as error:
                    failure, failures = error, failures + 1
                    _say("the loop of the subscribers failed", error)
                    native(time, "sleep")(0.1)  # whatever it is, not as fast as can be
        finally:
            if not self._is_over:
                self._die(failure)
            self._ended.release()

    def _have_sender(self) -> None:
        try:
            self.sender = open_sender()
        except Exception as error:
            _say("events are sent by os.write: what was asked for failed", error)

    def replace_sender(self) -> None:
        """Send by os.write from now on: this one may be in the middle of a batch."""
        sender, self.sender = self.sender, open_sender("write")
        try:
            sender.close()
        except BaseException as error:
            _say("a sender could not be closed", error)

    def _round(self) -> None:
        for fd, events in self._epoll.poll(self._pause(), 1024):
            client = self._clients.get(fd)
            try:
                if client is not None:
                    if events & _GONE:
                        self.hung_up(client)
                    else:
                        self._flush(client)
                elif fd == self._event_fd:
                    os.eventfd_read(fd)
                # Else it has ended in this round.
            except BaseException as error:
                self.cut(client, error)
        # After it was read, before the calls are looked at: who calls from here on
        # finds it cleared, and wakes us.
        self._is_woken = False
        for queue in (self._calls, self._again):
            for _ in range(len(queue)):
                owner, function = queue.popleft()
                try:
                    function()
                except BaseException as error:
                    self.cut(owner, error)
        self.wheel.run(self.cut)
        if self._lagging:
            self._look_at_lagging()

    def _pause(self) -> float:
        if self._again or self._calls:
            return 0.0
        left = self.wheel.left()
        longest = LAG_EVERY if self._lagging else _LONGEST
        return longest if left < 0 else min(left, longest)

    def again(self, function: Callable[[], object], owner: Owner) -> None:
        """Call this in the next round."""
        self._again.append((owner, function))

    # What fails.

    def guard(self, owner: Owner, function: Callable[[], object]) -> None:
        """Call; whose it is are cut if it fails, and nobody else."""
        try:
            function()
        except BaseException as error:
            self.cut(owner, error)

    def cut(self, owner: Owner, error: BaseException) -> None:
        """Cut those whom a failure concerns: nobody knows what they have got."""
        clients: tuple[Client, ...] = ()
        if isinstance(owner, Client):
            clients = (owner,)
        elif owner is not None:
            owner.is_asking = False  # nor is anything told to it any more
            clients = (*owner.clients.values(),)
        for client in clients:
            self._cut(client)
        text = "the loop of the subscribers failed: %d of them are cut"
        _say(text, error, len(clients))

    def _cut(self, client: Client) -> None:
        if client.reason is not None:
            return
        if client.group is None and client not in client.terms.served.parked:
            client.early = "error"  # its descriptor is not ours yet
            return
        client.rest = _UNKNOWN
        self._end(client, "error")

    def _die(self, error: BaseException | None) -> None:
        """Let everybody go: this loop sends nothing any more.

        Who is cut comes back, to another loop.
        """
        self.is_dead = True
        count = len(self._clients)
        for client in (*self._clients.values(),):
            self._cut(client)
        self._call_the_last()
        self.replace_sender()
        # The other descriptor stays open: somebody may be about to write to it.
        self._epoll.close()
        text = "the loop of the subscribers has ended, and %d of them with it"
        journal().later(log, logging.CRITICAL, text, count, error=error)

    def _call_the_last(self) -> None:
        """Do in its place what a loop that has ended was to do: end who comes."""
        with self._burying:
            while self._calls:
                owner, function = self._calls.popleft()
                self.guard(owner, function)

    def _add(self, client: Client, head: bytes) -> None:
        if not client.claim():
            return
        if self.is_dead:
            self._cut(client)
        if client.reason is not None:  # by a failure
            return
        self._clients[client.fd] = client
        group = Group(self, client.subscription, client)
        group.add(client)
        client.rest = memoryview(head)
        try:
            self._epoll.register(client.fd, _GONE)
        except OSError as error:
            self.end(client, "error")
            text = "%s cannot be waited for: %s"
            client.terms.lanes.say(logging.WARNING, text, client.label, error)
            return
        with suppress(OSError), borrowed(client.fd) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.wheel.add(client, client.next_time())
        self._flush(client)
        if client.early is not None:
            self.end(client, client.early)

    def merge(self, group: Group) -> None:
        """Have the only client of a group join the others who are where it is."""
        (client,) = group.clients.values()
        mine = client.subscription
        if not mine.is_plain or client.rest is not None:
            return
        terms = client.terms
        form = (terms.is_chunked, terms.keepalive, terms.comment)
        key = (*mine.kind, *form, id(terms.lanes))
        shared = self._shared.get(key)
        if shared is not None and not shared.clients and not shared.is_asking:
            self.drop(shared)  # a failure has left it, at a place where nobody comes
            shared = None
        if shared is None:
            leader = mine.twin()
            shared = Group(self, leader, client, key)
            leader.detach(shared)
            self._shared[key] = shared
        elif shared.is_asking or not mine.is_where(shared.leader):
            # It has not had its turn since. We come again with the next event.
            return
        is_first = not shared.clients
        try:
            group.remove(client)
            mine.lean_on(shared.leader)
            shared.add(client)
        except BaseException as error:  # it may be in neither
            self.cut(client, error)
            if not shared.clients:
                self.drop(shared)
            return
        if is_first:
            self.guard(shared, shared.turn)

    def drop(self, group: Group) -> None:
        """Forget a group that is empty."""
        if group.is_shared and self._shared.get(group.key) is group:
            del self._shared[group.key]
        self.wheel.remove(group)
        if not group.is_asking:
            group.let_go()

    def part(self, client: Client) -> Group:
        """Have a client of a shared group be by itself, where that is."""
        group = client.group
        assert group is not None
        client.subscription.go_where(group.leader)
        group.remove(client)
        alone = Group(self, client.subscription, client)
        alone.add(client)
        return alone

    def lag(self, client: Client, rest: memoryview) -> None:
        """Let a client go on by itself, as fast as it can."""
        group = client.group
        assert group is not None
        if group.is_shared:
            self.part(client)
        if client.rest is None:
            client.since = time.monotonic()
            client.acknowledged = None
            self._epoll.modify(client.fd, _GONE | _OUT)
            self._lagging[client.fd] = client
        client.rest = rest

    def _flush(self, client: Client) -> None:
        """Write what is left of a chunk; then go on."""
        rest = client.rest
        if rest is None or client.group is None:
            return
        try:
            taken = os.write(client.fd, rest)
        except BlockingIOError:
            taken = 0
        except OSError:
            self.hung_up(client)
            return
        if taken:
            client.since = time.monotonic()
        if taken < len(rest):
            if client.fd not in self._lagging:
                client.rest = None  # as lag() wants it
                self.lag(client, rest[taken:])
            client.rest = rest[taken:]
            return
        client.rest = None
        if self._lagging.pop(client.fd, None) is not None:
            self._epoll.modify(client.fd, _GONE)
        client.group.turn()

    def _look_at_lagging(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < LAG_EVERY:
            return
        self._looked_at = now
        for client in tuple(self._lagging.values()):
            self.guard(client, partial(self._look_at, client, now))

    def _look_at(self, client: Client, now: float) -> None:
        limit = client.terms.send_timeout
        if limit is None:
            return
        # A Unix socket acknowledges nothing: its queue, that we fill, is read.
        taken = acknowledged(client.fd) or queued(client.fd)
        if taken is not None and taken != client.acknowledged:
            if client.acknowledged is not None:
                client.since = now
            else:  # if it was long ago, we were stopped ourselves
                client.since = max(client.since, now - limit / 2)
            client.acknowledged = taken
        if now - client.since >= limit:
            self.end(client, "send_timeout")

    def abandon(self) -> None:
        """Close the copies of a parent's own descriptors, in a child.

        Those of its clients are closed by `sockets.hold`.
        """
        if self._is_abandoned:  # by our parent: these numbers are ours
            return
        self._is_abandoned = True
        with suppress(OSError):
            native(os, "close")(self._event_fd)
        self._epoll.close()

    # Ends.

    def hung_up(self, client: Client) -> None:
        timed_out = has_timed_out(client.fd)
        self.end(client, "send_timeout" if timed_out else "disconnected")

    def fail(self, client: Client, error: BaseException) -> None:
        """End a client for an error of the application's, or with its subscription."""
        if client.reason is not None:
            return
        if isinstance(error, Closed):
            known = error.reason in client.terms.reasons
            client.is_lagged = error.reason == "lagged"
            self.end(client, error.reason if known else "closed")
            return
        self.end(client, "error")
        text = "the source of %s failed"
        client.terms.lanes.say(logging.ERROR, text, client.label, error=error)

    def end(self, client: Client, reason: str) -> None:
        """End a client, once; what is the application's of it in its lane."""
        if client.reason is not None:
            return
        if client.group is None:
            # It is on its way here, and its head has not been sent.
            client.early = client.early or reason
            return
        self._end(client, reason)

    def _end(self, client: Client, reason: str) -> None:
        client.reason = reason
        fd, group = client.fd, client.group
        # By statements, which do not fail: from here on nothing is sent to its number,
        # which may soon be another's.
        if group is not None and fd in group.clients:
            del group.clients[fd]
        if fd in self._clients and self._clients[fd] is client:
            del self._clients[fd]
        if fd in self._lagging and self._lagging[fd] is client:
            del self._lagging[fd]
        for step in _ENDS:
            try:
                step(self, client)
            except BaseException as error:
                _say("the end of %s failed", error, client.label)

    def _forget(self, client: Client) -> None:
        with suppress(OSError):
            self._epoll.unregister(client.fd)
        self.wheel.remove(client)

    def _leave_group(self, client: Client) -> None:
        group = client.group
        if group is None:
            return
        try:
            group.left(client)
        except BaseException:
            if not group.clients:  # twice, if need be: nobody else forgets it
                self.drop(group)
            raise

    def _close(self, client: Client) -> None:
        client.rest = None
        _close(client.fd)

    def _depart(self, client: Client) -> None:
        # Twice, if need be: its place is not to be lost.
        try:
            leave = _Job(client.leave, lambda error: client.leave())
            client.terms.lanes.ends.do(leave)
        except BaseException:
            journal().do(client.leave)
            raise

    def _say_goodbye(self, client: Client) -> None:
        """Write the last words, as far as the kernel takes them at once."""
        reason, terms = client.reason, client.terms
        if reason in ("disconnected", "send_timeout"):
            if reason == "send_timeout" and not terms.is_chunked:
                reset(client.fd)  # or it reads on one day, and finds an end
            return
        # A subscription is never done: others would take it for a whole answer.
        is_partial = reason not in _WHOLE or client.is_lagged
        is_cut = reason == "error" or (is_partial and not terms.comes_back)
        is_whole = client.rest is None  # not in the middle of a chunk
        if is_whole:
            words = come_back(str(reason), terms.retry) if terms.comes_back else b""
            if terms.is_chunked and words:
                words = _chunked(words)
            if terms.is_chunked and not is_cut:
                words += _END
            with suppress(OSError):
                is_whole = os.write(client.fd, words) == len(words)
        if (not is_whole or is_cut) and not terms.is_chunked:
            reset(client.fd)  # only that tells it that something is missing


def _close(fd: int) -> None:
    """Close a connection so that what was sent arrives.

    Shut down first: a forked child may have it, too. And read: what the client has
    sent, and nobody has read, makes the kernel reset the connection at its close.
    """
    try:
        with suppress(OSError), borrowed(fd) as sock:
            sock.shutdown(socket.SHUT_WR)
            for _ in range(_DRAINED // 65536):
                if len(sock.recv(65536, socket.MSG_DONTWAIT)) < 65536:
                    break
    finally:
        release(fd)


Owner = Client | Group | None
_UNKNOWN = memoryview(b"?")  # the rest of nobody knows what
_ENDS: tuple[Callable[[Fanout, Client], None], ...] = (
    Fanout._forget,
    Fanout._leave_group,
    Fanout._say_goodbye,
    Fanout._close,
    Fanout._depart,
)

_fanouts: dict[int, Fanout] = {}  # this process's, and its parents' if it was forked
_lock = native_lock()


def fanout() -> Fanout:
    """Return the loop of this process; start it first.

    Raises:
        OSError: This system has no epoll, or no descriptor is left.
        RuntimeError: No thread is left.
    """
    pid = os.getpid()
    found = _fanouts.get(pid)
    if found is not None and not found.is_dead:
        return found
    with _lock:
        found = _fanouts.get(pid)
        if found is None or found.is_dead:
            found = _fanouts[pid] = Fanout()
        return found


def _forked() -> None:
    """Let go, in a child, of what its parent owns: the loop's thread is not here."""
    global _lock
    _lock = native_lock()  # a thread that is not here may have held it
    for parents in _fanouts.values():
        parents.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
