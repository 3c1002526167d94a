"""Subscribers without a thread: the connections that their servers have let go.

One native thread per process, also under gevent, owns them: it waits for all of them
at once, and sends each event's bytes, which were made once, to all who are at one
place of a channel. A client costs an entry in a table, not a stack.

**Who owns what.** A descriptor that came here is this loop's alone, and only the loop's
thread writes to it or closes it. It is taken out of epoll before it is closed, and out
of the table of clients before that, so no number is ever another's. What came by epoll
for a client that ended in the same round finds no client.

**No user code runs in the loop**, nor does it ask a broker: what needs either is done
in one of three `Lanes`, threads, or under gevent greenlets of the hub that the request
had. So what an application does, or does not come back from, holds up those alone who
have code of it: not what others get, nor the places that they leave.

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
from typing import Any

from .capacity import Place
from .clock import time
from .errors import BrokerError, Closed
from .hub import Apart, Subscription
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
from .watch import Watch, native_epoll, native_lock, watch

__all__ = ["Client", "Fanout", "Lane", "Lanes", "Terms", "come_back", "fanout"]

log = logging.getLogger(__name__)

SEND_BUFFER = 128 * 1024  # bytes; the kernel's own grows to megabytes, and hides a lag
GRAIN = 0.05  # seconds: timers are as exact as that
LAG_EVERY = 0.25  # seconds between two looks at those who lag
RETRY_EVERY = 1.0  # seconds between two questions to a broker that is down
_DRAINED = 16 * 65536  # bytes of a client that nobody reads are dropped at its end

# 0 where there is no epoll. (gevent takes select.epoll away, and leaves these.)
_OUT: int = getattr(select, "EPOLLOUT", 0)
_GONE: int = sum(
    getattr(select, name, 0) for name in ("EPOLLRDHUP", "EPOLLERR", "EPOLLHUP")
)

_KEEPALIVE = Event(comment="keepalive").encode()
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

    def give_back(self) -> None:
        for hook in self.before_wait:
            hook()


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
        *("_loop", "acknowledged", "began", "bucket", "bytes", "callbacks"),
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
        self.bucket = 0

    @property
    def is_given(self) -> bool:
        """Its descriptor is the loop's; or was."""
        return self in self.terms.served.parked or self.reason is not None

    def wake(self) -> bool:
        self._loop.call(self.turn)
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
        self._loop.call(partial(self._loop.end, self, reason))

    def on_close(self, callback: Callable[[], object]) -> None:
        """Call this, too, when it has ended; from any thread."""
        self._loop.call(partial(self._add_callback, callback))

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
        elif now >= self.subscription.ask_again_at:
            self.terms.lanes.users.do(self._ask_again)
            self._loop.wheel.add(self, self.deadline)  # whatever that takes
        else:
            self._loop.wheel.add(self, self.next_time())

    def _ask_again(self) -> None:
        """Ask the application whether it may go on; in its lane."""
        try:
            self.subscription.check_allowed()
        except BaseException as error:  # a sys.exit() ends nobody else
            self._loop.call(partial(self._loop.fail, self, error))
        else:
            self._loop.call(self._again)
        finally:
            self.terms.give_back()

    def _again(self) -> None:
        if self.reason is None:
            self._loop.wheel.add(self, self.next_time())
            self.turn()

    def leave(self) -> None:
        """Give back what it had of ours, and count it; in the lane of ends."""
        reason, terms = str(self.reason), self.terms
        seconds = time.monotonic() - self.began
        if self.place is not None:
            self.place.release()
        terms.process.count(reason, seconds, self.events, self.bytes)
        if self.subscription.announcement is None:
            self._close(reason, seconds)
        else:  # others are told by a broker, who may take his time
            terms.lanes.reads.do(partial(self._close, reason, seconds))

    def _close(self, reason: str, seconds: float) -> None:
        try:
            self.subscription.close(reason)
        except BaseException:
            log.exception("the subscription of %s could not be closed", self.label)
        # It is freed as soon as nobody has it, without a garbage collection.
        self.subscription.detach(None)
        if self.callbacks:
            self.terms.lanes.users.do(partial(self._finish, seconds))
        else:
            self._forget(seconds)

    def _finish(self, seconds: float) -> None:
        """Call what the application wants to have called; in its lane."""
        callbacks, self.callbacks = self.callbacks, ()
        try:
            for callback in callbacks:
                try:
                    callback()
                except BaseException:
                    log.exception("a callback at the end of %s failed", self.label)
            self.terms.give_back()
        finally:
            self._forget(seconds)

    def _forget(self, seconds: float) -> None:
        try:
            log.debug(
                "%s ended: %s, %.3f s, %d events, %d bytes",
                *(self.label, self.reason, seconds, self.events, self.bytes),
            )
        finally:  # last: a process that stops waits for no more than this
            self.terms.served.parked.discard(self)


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
        *("is_woken", "key", "leader", "moved", "retry_at", "terms"),
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
        self.moved = time.monotonic()
        self.bucket = 0
        loop.wheel.add(self, self.next_time())

    def wake(self) -> bool:
        self._loop.call(self.turn)
        return True

    def add(self, client: Client) -> None:
        self.clients[client.fd] = client
        client.group = self
        client.events -= self.events
        client.bytes -= self.bytes

    def remove(self, client: Client) -> None:
        del self.clients[client.fd]
        client.group = None
        client.events += self.events
        client.bytes += self.bytes
        if not self.clients:
            self._loop.drop(self)

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
            self.is_asking, self.is_woken = True, False
            lanes = self.terms.lanes
            lane = lanes.users if self.leader.has_user_code else lanes.reads
            lane.do(self._ask)
            return
        chunk, count = found
        if chunk:
            self.send(chunk, count)
            self._loop.again(self.turn)
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
        finally:
            if self.leader.has_user_code:
                self.terms.give_back()
        self._loop.call(partial(self._told, told))

    def _told(self, told: Any) -> None:
        self.is_asking = False
        if not self.clients:
            self.let_go()
            return
        if isinstance(told, BrokerError):
            log.debug("a channel cannot be read: %s", told)
            self._retry(time.monotonic() + RETRY_EVERY)
            return
        if isinstance(told, Apart):
            for client in tuple(self.clients.values()):
                self._loop.again(self._loop.part(client).turn)
            return
        if isinstance(told, BaseException):
            for client in tuple(self.clients.values()):
                self._loop.fail(client, told)
            return
        chunk, count, when = told
        if chunk:
            self.send(chunk, count)
            self._loop.again(self.turn)
        elif when is not None:
            self._retry(when)
        elif self.is_woken:  # after the lane had looked
            self.turn()
        elif not self.is_shared:
            self._loop.merge(self)

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
        for fd, taken in loop.sender.send(self.clients, framed):
            client = self.clients[fd]
            if taken >= 0:
                loop.lag(client, memoryview(framed)[taken:])
            elif -taken in (errno.EAGAIN, errno.ENOBUFS):
                loop.lag(client, memoryview(framed))
            else:
                loop.hung_up(client)

    # Its times: see `_Wheel`.

    def next_time(self) -> float:
        keepalive = self.terms.keepalive
        due = math.inf if keepalive is None else self.moved + keepalive
        return min(due, self.retry_at or math.inf)

    def due(self, now: float) -> None:
        if not self.clients:
            return
        if self.retry_at and now >= self.retry_at:
            self.retry_at = 0.0
            self.turn()
        keepalive = self.terms.keepalive
        if keepalive is not None and now - self.moved >= keepalive:
            if self._may_send():
                self.send(_KEEPALIVE)
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
        if when == math.inf:
            return
        number = max(1, math.ceil(when / GRAIN))
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = {}
            heapq.heappush(self._heap, number)
        bucket[id(item)] = item
        item.bucket = number

    def remove(self, item: Any) -> None:
        bucket = self._buckets.get(item.bucket)
        if bucket is not None:
            bucket.pop(id(item), None)
        item.bucket = 0

    def left(self) -> float:
        """Return the seconds until the next one; -1 if there is none."""
        while self._heap and not self._buckets[self._heap[0]]:
            del self._buckets[heapq.heappop(self._heap)]
        if not self._heap:
            return -1.0
        return max(0.0, self._heap[0] * GRAIN - time.monotonic())

    def run(self) -> None:
        now = time.monotonic()
        while self._heap and self._heap[0] * GRAIN <= now:
            bucket = self._buckets.pop(heapq.heappop(self._heap))
            for item in bucket.values():
                item.bucket = 0
            for item in bucket.values():
                if not item.bucket:  # what came before it may have moved it
                    item.due(now)


class Lane:
    """Runs one thing after the other: a thread, from the first one on.

    Args:
        other: Has it to do where no thread can be started.
    """

    def __init__(self, other: Lane | None = None) -> None:
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
        try:
            if not self._is_running:
                self.start()
        except RuntimeError as error:
            if self._other is not None:
                self._other.do(job)
                return
            log.warning("work for a subscriber waits: %s", error)
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            _run(self._jobs.get())


class _HubLane(Lane):
    """The same in a gevent hub: a greenlet, for the application's locks are its.

    Args:
        watch: The hub's.
        other: Does the rest when the hub has been destroyed.
    """

    def __init__(self, watch: Watch, other: Lane) -> None:
        self._watch = watch
        self._rest = other
        self._waiting: deque[Callable[[], object]] = deque()
        self._is_working = False

    def start(self) -> None:
        pass

    def do(self, job: Callable[[], object]) -> None:
        self._waiting.append(job)
        if self._watch.is_over:
            while self._waiting:
                self._rest.do(self._waiting.popleft())
        else:
            self._watch.run(self._begin)

    def _begin(self) -> None:
        if not self._is_working:
            import gevent

            self._is_working = True
            gevent.spawn(self._work)

    def _work(self) -> None:
        try:
            while self._waiting:
                _run(self._waiting.popleft())
        finally:
            self._is_working = False


class Lanes:
    """Who does what the loop may not: three that do not wait for each other.

    Attributes:
        ends: What is given back and told at an end. It asks no application.
        reads: What may ask a broker, and no application.
        users: What may call an application, which may take its time.
    """

    __slots__ = ("ends", "reads", "users")

    def __init__(self, ends: Lane, reads: Lane, users: Lane) -> None:
        self.ends, self.reads, self.users = ends, reads, users


def _run(job: Callable[[], object]) -> None:
    try:
        job()
    except BaseException:  # there is one for all
        log.exception("work for a subscriber failed")


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
        self._calls: deque[Callable[[], object]] = deque()
        self._again: deque[Callable[[], object]] = deque()
        self._is_woken = self._is_abandoned = False
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

    def call(self, function: Callable[[], object]) -> None:
        """Call this in the loop, soon; not in a child that has been forked."""
        if self._is_abandoned:
            return
        self._calls.append(function)
        # Set by those who call, cleared by the loop before it looks: none is missed.
        if not self._is_woken:
            self._is_woken = True
            os.eventfd_write(self._event_fd, 1)

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
                threads = self._lanes[None] = Lanes(ends, Lane(ends), Lane(ends))
            found = threads
            if own is not None:  # it has the watch, so its id is no other's
                found = self._lanes.get(id(own)) or self._lanes.setdefault(
                    id(own),
                    Lanes(
                        _HubLane(own, threads.ends),
                        _HubLane(own, threads.reads),
                        _HubLane(own, threads.users),
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
    ) -> tuple[Terms, Terms]:
        """Make all that a client needs and that can fail, before it is taken.

        Args:
            process, served, keepalive, send_timeout, retry, comes_back, reasons,
                before_wait: As for `Terms`.

        Returns:
            Those of a response that is raw, and of one in chunks.

        Raises:
            RuntimeError: No thread is left.
        """
        lanes, life = self.lanes(), (keepalive, send_timeout, retry, comes_back)
        rest = (*life, reasons, before_wait)
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
            log.debug("terms are not shared: %r", error)
            return terms

    def add(self, client: Client, head: bytes) -> None:
        """Take a client on.

        Args:
            client: Its subscription has begun, and was detached to it; its descriptor
                is the loop's from now.
            head: What is to be sent before all else, framed.
        """
        client.terms.served.parked.add(client)  # first: see `Client.is_given`
        hold(client.fd)
        self.call(partial(self._add, client, head))

    # The loop.

    def _run(self) -> None:
        try:
            self.sender = open_sender()
        except Exception:
            log.exception("events are sent by os.write: what was asked for failed")
        while not self._is_over:
            try:
                self._round()
            except Exception:
                log.exception("the loop of the subscribers failed")
                native(time, "sleep")(0.1)  # whatever it is, not as fast as can be
        self._ended.release()

    def _round(self) -> None:
        for fd, events in self._epoll.poll(self._pause(), 1024):
            client = self._clients.get(fd)
            if client is not None:
                if events & _GONE:
                    self.hung_up(client)
                else:
                    self._flush(client)
            elif fd == self._event_fd:
                os.eventfd_read(fd)
            # Else it has ended in this round.
        # After it was read, before the calls are looked at: who calls from here on
        # finds it cleared, and wakes us.
        self._is_woken = False
        for queue in (self._calls, self._again):
            for _ in range(len(queue)):
                queue.popleft()()
        self.wheel.run()
        if self._lagging:
            self._look_at_lagging()

    def _pause(self) -> float:
        if self._again or self._calls:
            return 0.0
        left = self.wheel.left()
        if not self._lagging:
            return left
        return LAG_EVERY if left < 0 else min(left, LAG_EVERY)

    def again(self, function: Callable[[], object]) -> None:
        """Call this in the next round."""
        self._again.append(function)

    def _add(self, client: Client, head: bytes) -> None:
        self._clients[client.fd] = client
        group = Group(self, client.subscription, client)
        group.add(client)
        client.rest = memoryview(head)
        try:
            self._epoll.register(client.fd, _GONE)
        except OSError as error:
            log.warning("%s cannot be waited for: %s", client.label, error)
            self.end(client, "error")
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
        key = (*mine.kind, terms.is_chunked, terms.keepalive, id(terms.lanes))
        shared = self._shared.get(key)
        if shared is None:
            leader = mine.twin()
            shared = self._shared[key] = Group(self, leader, client, key)
            leader.detach(shared)
        elif shared.is_asking or not mine.is_where(shared.leader):
            # It has not had its turn since. We come again with the next event.
            return
        group.remove(client)
        mine.lean_on(shared.leader)
        is_first = not shared.clients
        shared.add(client)
        if is_first:
            shared.turn()

    def drop(self, group: Group) -> None:
        """Forget a group that is empty."""
        self.wheel.remove(group)
        if group.is_shared:
            del self._shared[group.key]
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
            limit = client.terms.send_timeout
            if limit is None:
                continue
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
        log.error("the source of %s failed", client.label, exc_info=error)
        self.end(client, "error")

    def end(self, client: Client, reason: str) -> None:
        """End a client, once; what is the application's of it in its lane."""
        if client.reason is not None:
            return
        if client.group is None:
            # It is on its way here, and its head has not been sent.
            client.early = client.early or reason
            return
        client.reason = reason
        fd = client.fd
        self.wheel.remove(client)
        self._lagging.pop(fd, None)
        client.group.remove(client)
        del self._clients[fd]
        with suppress(OSError):
            self._epoll.unregister(fd)
        self._say_goodbye(client)
        client.rest = None
        _close(fd)
        client.terms.lanes.ends.do(client.leave)

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
            words = come_back(str(reason), terms.retry)
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
    with suppress(OSError), borrowed(fd) as sock:
        sock.shutdown(socket.SHUT_WR)
        for _ in range(_DRAINED // 65536):
            if len(sock.recv(65536, socket.MSG_DONTWAIT)) < 65536:
                break
    release(fd)


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
    if found is not None:
        return found
    with _lock:
        if pid not in _fanouts:
            _fanouts[pid] = Fanout()
        return _fanouts[pid]


def _forked() -> None:
    """Let go, in a child, of what its parent owns: the loop's thread is not here."""
    global _lock
    _lock = native_lock()  # a thread that is not here may have held it
    for parents in _fanouts.values():
        parents.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
