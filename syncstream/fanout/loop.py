"""The loop: it serves the connections that their servers have handed over.

One native thread per process, also under gevent, owns these connections: it waits for
all of them at once, and sends the bytes of each event, which are made once, to all
clients at one place of a channel. A client costs an entry in a table, not a stack.

**Ownership.** `Fanout.add` sends the head in the thread that brings the client, so that
the loop need not wake for a client without events. From then on the loop owns the
descriptor, and only the loop's thread writes to it or closes it. Before closing, it
removes the client from its table and the descriptor from epoll, so that no number ever
refers to another client. An epoll event for a client that has ended in the same round
finds no client.

**Failures are isolated.** Each call, timer and descriptor of a round has an owner, a
client or a group. If it raises, the bytes that these clients have received are unknown:
they are cut, and reconnect. All others go on. The loop logs only through a `Journal`,
after it has acted. A loop that cannot go on logs it, cuts all of its clients, and is
replaced by another one.

**No application code runs in the loop**, nor does it call a broker: such work is done
in `Lanes`, which are threads, or under gevent greenlets of the request's hub.
``authorize`` has a `Crew`: a client without an answer in time is denied, and another
thread asks for the others. So slow application code delays only the clients that use
it.

Clients at the same place of the same channel, in the same framing, form a `Group` with
a leader, a subscription that does not count, whose place is theirs. A client that
cannot accept a whole chunk leaves its group, continues alone from its own place, and
joins again after it has caught up. Subscriptions to several channels, and those with
``conflate`` or ``throttle``, remain alone.
"""

from __future__ import annotations

import _thread
import errno
import logging
import math
import os
import select
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Literal
from weakref import WeakValueDictionary

from ..runtime.clock import time
from ..runtime.forks import process_key
from ..runtime.journal import MOST, journal, report
from ..runtime.process import EXIT_WAIT, Process, Served, process
from ..runtime.signals import block_sigpipe
from ..runtime.sockets import hold, is_hung_up, native
from ..runtime.waiting import gevent_hub
from ..runtime.watch import native_epoll, native_lock, watch
from .client import Client, Terms
from .connection import send_head
from .ends import Ends
from .group import Group
from .lanes import Crew, Doer, HubCrew, HubLane, Job, Lane, Lanes, say_failed
from .meeting import Meeting
from .sender import Sender, open_sender
from .wheel import Wheel

__all__ = ["Fanout", "fanout"]

log = logging.getLogger("syncstream.fanout")

LAG_EVERY = 0.25  # seconds between two looks at the clients that lag
SETTLE = 5.0  # seconds, at most, until the kernel is told of the send timeout
# Seconds between two rounds. Less than `SETTLE`, so that the loop need not wake to note
# when a new client settles.
MAX_PAUSE = 4.0
MOST_CALLS = 64  # that may wait: until the loop has a client, it takes more memory
_MOST_FAILURES = 10  # failed rounds in a row, 0.1 s apart; then the loop gives up

# 0 without epoll. (gevent removes select.epoll, but not these constants.)
_OUT: int = getattr(select, "EPOLLOUT", 0)
_ERROR: int = getattr(select, "EPOLLERR", 0)
_GONE: int = _ERROR | sum(
    getattr(select, name, 0) for name in ("EPOLLRDHUP", "EPOLLHUP")
)
_EDGE: int = getattr(select, "EPOLLET", 0)


class Fanout:
    """The loop. Get it from `fanout`.

    Any thread may use the methods up to `add`, and a client's `stop`. The rest runs in
    the loop's thread; `abandon` runs in a forked child.

    Attributes:
        state: "ending" with the process; "dead" after failures: it accepts no clients
            any more; "abandoned" in a forked child.
    """

    def __init__(self) -> None:
        epoll = native_epoll()
        if epoll is None:
            raise OSError(errno.ENOSYS, "no epoll on this system")
        self.wheel = Wheel()
        self.sender: Sender = open_sender("write")  # until the thread has its own
        # Calls, each with its owner: see `cut`.
        self._calls: deque[tuple[Owner, Callable[[], object]]] = deque()
        self._again: deque[tuple[Owner, Callable[[], object]]] = deque()
        self._is_woken = False
        self._next_look = 0.0  # when it next makes its calls, at the latest
        self.state: Literal["running", "ending", "dead", "abandoned"] = "running"
        self._burying = native(_thread, "RLock")()
        self._clients: dict[int, Client] = {}
        self._lagging: dict[int, Client] = {}
        self._early: dict[int, int] = {}  # events of descriptors without a client
        self._looked_at = 0.0
        self.meeting = Meeting(self)
        # Weak: keep neither the hooks of requests nor servers that are gone.
        self._terms: WeakValueDictionary[tuple[Any, ...], Terms] = WeakValueDictionary()
        self._events: list[tuple[int, int]] = []  # of this round
        self._duties = (
            self._serve,
            self._make_calls,
            partial(self.wheel.run, self.cut),
            self._look_at_lagging,
        )
        self._lanes: dict[Any, Lanes] = {}
        self._lanes_lock = native_lock()
        self._epoll = epoll()
        tables = self._clients, self._lagging
        self.ends = Ends(*tables, self._epoll, self.wheel, self.meeting)
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ended = native_lock()  # held until the thread has ended
        self._ended.acquire()
        try:
            # Edge-triggered: each write wakes once, and it need not be read.
            self._epoll.register(self._event_fd, select.EPOLLIN | select.EPOLLET)
            native(_thread, "start_new_thread")(self._run, ())
        except BaseException:
            self._epoll.close()
            os.close(self._event_fd)
            raise
        process().at_exit(self.quit)

    # From any thread.

    def quit(self) -> None:
        """End the thread before the interpreter ends, and wait briefly for it.

        If it woke during the interpreter's end, greenlet would crash the process
        (segmentation fault, Python 3.10).
        """
        if self.state == "running":
            self.state = "ending"
        self.call(lambda: None)
        self._ended.acquire(True, EXIT_WAIT)

    def call(
        self,
        function: Callable[[], object],
        owner: Owner = None,
        *,
        by: float = -math.inf,
    ) -> None:
        """Call a function in the loop soon; does nothing in a forked child.

        Args:
            function: The function.
            owner: The client or group that is cut if it fails.
            by: It may wait until this `time.monotonic`, or until the loop wakes.
        """
        if self.state == "abandoned":
            return
        self._calls.append((owner, function))
        if self.state == "dead":
            self._call_the_last()
        # Set by those who call, cleared by the loop before it looks: none is missed.
        elif by < self._next_look or len(self._calls) >= MOST_CALLS:
            self._wake()

    def _wake(self) -> None:
        if not self._is_woken:
            self._is_woken = True
            try:
                os.eventfd_write(self._event_fd, 1)
            except OSError as error:
                # Other code has closed it; the loop will notice that within seconds.
                text = "the subscribers' loop cannot be woken: events may be late"
                say_failed(text, error)

    def do(self, lane: Doer, job: Callable[[], object], owner: Owner) -> None:
        """Have a job done in a lane."""
        # Handle its failure: the loop would wait for it for ever.
        lane.do(Job(job, lambda error: self.call(partial(self.cut, owner, error))))

    def lanes(self, *, has_broker: bool = True) -> Lanes:
        """Return the lanes for this thread, or for its gevent hub.

        Args:
            has_broker: Whether a broker will be told of their clients' ends.

        Raises:
            RuntimeError: No thread can be started.
        """
        own = None if gevent_hub() is None else watch()
        with self._lanes_lock:
            threads = self._lanes.get(None)
            if threads is None:
                ends = Lane()
                reads, users = Lane(ends), Lane(ends)
                crew = Crew()
                threads = Lanes(ends, reads, users, crew, journal())
                self._lanes[None] = threads
            found = threads
            if own is not None:  # its lanes keep the watch alive, so its id is unique
                found = self._lanes.get(id(own)) or self._lanes.setdefault(
                    id(own),
                    Lanes(
                        HubLane(own, threads.ends),
                        HubLane(own, threads.reads),
                        HubLane(own, threads.users),
                        HubCrew(own, threads.asks),
                        HubLane(own, threads.logs, MOST),
                    ),
                )
        if has_broker:
            found.ends.start()
        return found

    def prepare(
        self,
        counted_in: Process,
        served: Served,
        *,
        keepalive: float | None,
        send_timeout: float | None,
        retry: int,
        comes_back: bool,
        reasons: frozenset[str],
        before_wait: tuple[Callable[[], object], ...] = (),
        comment: bytes = b": keepalive\n\n",
        finish: bytes = b"",
        drain: float = 0.0,
        has_broker: bool = True,
    ) -> Terms:
        """Make everything that a client needs and that can fail, before it is taken.

        Args:
            counted_in: The ``process`` of `Terms`.
            served, keepalive, send_timeout, retry, comes_back, reasons, before_wait,
                comment, finish, drain: As for `Terms`.
            has_broker: As for `lanes`.

        Raises:
            RuntimeError: No thread can be started.
        """
        lanes = self.lanes(has_broker=has_broker)
        life = (keepalive, send_timeout, retry, comes_back)
        values = (
            *(lanes, counted_in, served, *life, reasons, before_wait, comment),
            finish,
            drain,
        )
        try:
            found = self._terms.get(values)
        except Exception as error:  # its hooks need not be comparable
            report(log, logging.DEBUG, "terms are not shared: %r", error)
            return Terms(*values)
        if found is None:
            found = self._terms[values] = Terms(*values)
        return found

    def add(self, client: Client, head: bytes) -> None:
        """Begin to serve a client.

        Args:
            client: The client. Its subscription has begun, and was detached to it; the
                loop owns its descriptor from now on.
            head: The bytes to send first, framed.
        """
        fd, terms = client.fd, client.terms
        client.since = now = time.monotonic()
        hold(fd)
        rest, problem = send_head(fd, head), None
        try:
            # Edge-triggered: until `_add` has run nobody can end it.
            self._epoll.register(fd, _GONE | _EDGE)
        except (OSError, ValueError) as error:  # ValueError: the loop is dead
            problem = str(error)
        if terms.send_timeout is not None:
            client.settles_at = now + min(SETTLE, terms.send_timeout / 4)
        by = -math.inf
        if not rest and client.feed.awaits(client):
            by = min(client.next_time(), now + (terms.keepalive or math.inf))
        parked = terms.served.parked
        try:
            parked.add(client)  # before the call: see `Client.is_given`
            self.call(partial(self._add, client, rest, problem), client, by=by)
            # The loop notes these before it looks for calls: none is missed.
            if fd in self._early or client.has_news:
                self._wake()
        except BaseException:
            if client.claim():  # the loop has not got it, and will not take it
                parked.discard(client)
            raise

    # The loop.

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            block_sigpipe()
            self._have_sender()
            failures = 0
            while self.state == "running" and failures < _MOST_FAILURES:
                try:
                    self._round()
                    failures = 0
                except BaseException as error:
                    failure, failures = error, failures + 1
                    say_failed("the subscribers' loop failed, and goes on", error)
                    native(time, "sleep")(0.1)  # avoid a busy loop
        finally:
            if self.state != "ending":
                self._die(failure)
            self._ended.release()

    def _have_sender(self) -> None:
        try:
            self.sender = open_sender()
        except Exception as error:
            text = "SYNCSTREAM_SENDER cannot be used: events are sent by os.write"
            say_failed(text, error)

    def replace_sender(self) -> None:
        """Send by os.write from now on: this one may be in the middle of a batch."""
        sender, self.sender = self.sender, open_sender("write")
        try:
            sender.close()
        except BaseException as error:
            say_failed("a sender could not be closed", error)

    def _round(self) -> None:
        """Wait, then do all duties, even if one of them fails."""
        self._events = self._epoll.poll(self._pause(), 1024)
        failure: BaseException | None = None
        for duty in self._duties:
            try:
                duty()
            except BaseException as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _serve(self) -> None:
        """Send to clients that can accept data again; end those that have gone."""
        for fd, mask in self._events:
            client = self._clients.get(fd)
            try:
                if client is not None:
                    if mask & _GONE:
                        self.ends.hung_up(client, is_error=bool(mask & _ERROR))
                    else:
                        self._flush(client)
                elif fd != self._event_fd:  # the client is on its way, or has ended
                    self._early[fd] = mask
            except BaseException as error:
                self.cut(client, error)

    def _make_calls(self) -> None:
        # Cleared before it looks at the calls: any later call wakes the loop again.
        self._is_woken = False
        for queue in (self._calls, self._again):
            for _ in range(len(queue)):
                owner, function = queue.popleft()
                try:
                    function()
                except BaseException as error:
                    self.cut(owner, error)

    def _pause(self) -> float:
        now = time.monotonic()
        # Set before it looks at the calls: a later call compares its `by` with this.
        self._next_look = now + MAX_PAUSE
        if self._again or self._calls:
            return 0.0
        left = self.wheel.left()
        longest = LAG_EVERY if self._lagging else MAX_PAUSE
        pause = longest if left < 0 else min(left, longest)
        self._next_look = now + pause
        return pause

    def again(self, function: Callable[[], object], owner: Owner) -> None:
        """Call this in the next round."""
        self._again.append((owner, function))

    # What fails.

    def guard(self, owner: Owner, function: Callable[[], object]) -> None:
        """Call a function; if it fails, cut its owner only."""
        try:
            function()
        except BaseException as error:
            self.cut(owner, error)

    def cut(self, owner: Owner, error: BaseException) -> None:
        """Cut the clients that a failure concerns: what they received is unknown."""
        clients: tuple[Client, ...] = ()
        if isinstance(owner, Client):
            clients = (owner,)
        elif owner is not None:
            owner.is_asking = False  # no lane will report to it any more
            clients = (*owner.clients.values(),)
        for client in clients:
            self.ends.cut(client)
        text = "the loop of the subscribers failed: %d of them are cut"
        say_failed(text, error, len(clients))

    def _die(self, error: BaseException | None) -> None:
        """Cut all clients, as this loop sends nothing any more.

        They reconnect, to another loop.
        """
        self.state = "dead"
        count = len(self._clients)
        for client in (*self._clients.values(),):
            self.ends.cut(client)
        self._call_the_last()
        self.replace_sender()
        # The eventfd stays open: another thread may be about to write to it.
        self._epoll.close()
        text = "the subscribers' loop has ended: %d clients are cut, and reconnect"
        journal().later(log, logging.CRITICAL, text, count, error=error)

    def _call_the_last(self) -> None:
        """Make the calls of a loop that has ended, which end new clients."""
        with self._burying:
            while self._calls:
                owner, function = self._calls.popleft()
                self.guard(owner, function)

    def _add(self, client: Client, rest: bytes, problem: str | None) -> None:
        if not client.claim():
            return
        if self.state == "dead":
            self.ends.cut(client)
        if client.reason is not None:  # it was cut
            return
        early = self._early.pop(client.fd, 0)
        self._clients[client.fd] = client
        group = Group(self, client.feed, client, moved=client.since)
        group.add(client)
        # A write to a blocking descriptor would stop the loop for all clients.
        if os.get_blocking(client.fd):
            raise ValueError("a descriptor of the loop's must have O_NONBLOCK")
        if problem is not None:
            self.ends.end(client, "error")
            text = "%s cannot be waited for: %s"
            client.terms.lanes.say(logging.WARNING, text, client.label, problem)
            return
        # epoll does not report it again; or it was an earlier owner of the number.
        if early and is_hung_up(client.fd):
            self.ends.hung_up(client, is_error=bool(early & _ERROR))
            return
        self.wheel.add(client, client.next_time())
        client.rest = memoryview(rest)
        self._flush(client)
        if client.early is not None:
            self.ends.end(client, client.early)

    def lag(self, client: Client, rest: memoryview) -> None:
        """Have a client continue alone, with the rest of a chunk first."""
        group = client.group
        assert group is not None
        if group.is_shared:
            self.meeting.part(client)
        if client.fd not in self._lagging:
            client.since = time.monotonic()
            client.acknowledged = None
            self._epoll.modify(client.fd, _GONE | _OUT)
            self._lagging[client.fd] = client
        client.rest = rest

    def _flush(self, client: Client) -> None:
        """Write the rest of a chunk, then new events."""
        rest = client.rest
        if rest is None or client.group is None:
            return
        try:
            taken = os.write(client.fd, rest) if rest else 0
        except BlockingIOError:
            taken = 0
        except OSError:
            self.ends.hung_up(client)
            return
        if taken:
            client.since = time.monotonic()
        if taken < len(rest):
            self.lag(client, rest[taken:])
            return
        client.rest = None
        if self._lagging.pop(client.fd, None) is not None:
            self._epoll.modify(client.fd, _GONE)
        client.group.turn()

    def _look_at_lagging(self) -> None:
        now = time.monotonic()
        if not self._lagging or now - self._looked_at < LAG_EVERY:
            return
        self._looked_at = now
        for client in tuple(self._lagging.values()):
            try:
                if client.is_stuck(now):
                    self.ends.end(client, "send_timeout")
            except BaseException as error:
                self.cut(client, error)

    def abandon(self) -> None:
        """Close a child's copies of the loop's own descriptors.

        `sockets.hold` has those of the clients closed.
        """
        if self.state == "abandoned":  # in our parent: these numbers are ours now
            return
        self.state = "abandoned"
        with suppress(OSError):
            native(os, "close")(self._event_fd)
        self._epoll.close()


Owner = Client | Group | None
_fanouts: dict[object, Fanout] = {}  # this process's
_parents: list[Fanout] = []  # kept, as what they hold must not be freed here
_lock = native_lock()


def fanout() -> Fanout:
    """Return the loop of this process; start it first.

    Raises:
        OSError: This system has no epoll, or no descriptor is left.
        RuntimeError: No thread can be started.
    """
    key = process_key()
    found = _fanouts.get(key)
    if found is not None and found.state != "dead":
        return found
    with _lock:
        found = _fanouts.get(key)
        if found is None or found.state == "dead":
            found = _fanouts[key] = Fanout()
        return found


def _forked() -> None:
    """Let go, in a child, of what its parent owns: the loop's thread is not here."""
    global _lock
    _lock = native_lock()  # a thread that is not here may have held it
    _parents.extend(_fanouts.values())
    _fanouts.clear()
    for parents in _parents:
        parents.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
