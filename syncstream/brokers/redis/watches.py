"""The watched names of one listener: wanted by the hub, requested from the server.

The server acknowledges each topic of a command separately, in order, but denies a
whole command because of one topic. Only the last acknowledgement of a topic counts: an
earlier one says nothing while another is to come.
"""

from __future__ import annotations

import _thread
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...errors import Denied
from ...runtime.clock import time
from ...runtime.sockets import native
from ...runtime.waiter import Turn
from ..names import is_pattern
from .server import Server

__all__ = ["Check", "Command", "Watch", "Watches"]

_TOPICS = 500  # topics in one SUBSCRIBE


class Watch:
    """A channel or pattern that is watched, or was a moment ago.

    Attributes:
        topic: The Pub/Sub channel or glob.
        pending: The number of acknowledgements still to come.
        is_asked: The last command about it was a SUBSCRIBE, not an UNSUBSCRIBE.
        is_settled: The server has acknowledged that.
        is_doubtful: Announcements may have been lost.
        is_asked_alone: Its head is requested alone, because the server has denied a
            request for several.
        last: The id of the last announced event, or of a head; ``None`` for neither.
        refusal: The server's reason for denying it, ``""`` without one.
        waiters: Threads that wait until it is settled or denied.
    """

    __slots__ = (
        *("is_asked_alone", "is_asked", "is_doubtful", "is_pattern", "is_settled"),
        *("is_wanted", "last", "name", "pending", "refusal", "topic", "waiters"),
    )

    def __init__(self, name: str, is_pattern: bool, topic: bytes) -> None:
        self.name = name
        self.is_pattern = is_pattern
        self.topic = topic
        self.pending = 0
        self.is_wanted = True
        self.is_asked = self.is_settled = self.is_doubtful = self.is_asked_alone = False
        self.refusal = ""
        self.last: str | None = None
        self.waiters: list[Turn] = []

    def end_waits(self) -> None:
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter.end()


class Command:
    """A command to the server, until all of it is acknowledged.

    Attributes:
        watches: The watches whose topics it has; empty for the listener's own topic.
        left: The number of acknowledgements still to come.
    """

    __slots__ = ("left", "topics", "verb", "watches")

    def __init__(
        self, verb: bytes, watches: Sequence[Watch], topics: Sequence[bytes] = ()
    ) -> None:
        self.verb = verb
        self.watches = watches
        self.topics = topics or [watch.topic for watch in watches]
        self.left = len(self.topics)


class Check(NamedTuple):
    """A watch that is checked with a beat, as it was when the beat was sent."""

    watch: Watch
    last: str | None
    is_doubtful: bool


class Watches:
    """All watches of one listener; `watch` and `unwatch` may run in any thread."""

    def __init__(self, server: Server) -> None:
        self._server = server
        # Native: threads with different gevent hubs share it.
        self._lock = native(_thread, "allocate_lock")()
        self._watches: dict[str, Watch] = {}
        self._by_topic: dict[tuple[bool, bytes], Watch] = {}
        self._changes: deque[Watch] = deque()
        self._sent: deque[Command] = deque()  # answered in this order
        self._doubtful: list[Watch] = []
        self._round: deque[Watch] = deque()  # watches to check in this round
        self._is_down = False

    # From any thread.

    def watch(self, name: str, timeout: float, wake: Callable[[], None]) -> None:
        """Have a name announced; wait until it is, or for ``timeout`` seconds.

        A name that is not settled in time is checked later, as after a loss.

        Args:
            name: A channel or a pattern.
            timeout: The maximum of seconds; 0 does not wait.
            wake: Wakes the listener.

        Raises:
            Denied: The server denies access to it.
        """
        waiter = None
        with self._lock:
            watch = self._watches.get(name)
            if watch is None:
                watch = self._watches[name] = self._new(name)
            watch.is_wanted = True
            if watch.is_settled:
                return
            if timeout and not self._is_down:
                waiter = Turn()
                watch.waiters.append(waiter)
            else:
                watch.is_doubtful = True
            self._changes.append(watch)
        wake()
        if waiter is None:
            return
        if waiter.wait(time.monotonic() + timeout):
            if watch.refusal:
                raise Denied(watch.refusal)
            return
        with self._lock:
            if waiter in watch.waiters:
                watch.waiters.remove(waiter)
                watch.is_doubtful = True

    def _new(self, name: str) -> Watch:
        if is_pattern(name):
            return Watch(name, True, self._server.glob(name))
        return Watch(name, False, self._server.topic(name))

    def unwatch(self, name: str) -> None:
        with self._lock:
            watch = self._watches.get(name)
            if watch is None:
                return
            watch.is_wanted = False
            self._changes.append(watch)

    def names(self) -> list[str]:
        """Return the wanted names; without the lock, as a forked child calls this."""
        return [watch.name for watch in self._watches.values() if watch.is_wanted]

    def abandon(self) -> None:
        """Replace the lock in a forked child: a thread of the parent may hold it."""
        self._lock = native(_thread, "allocate_lock")()

    # The methods from here on are for the listener only.

    def __contains__(self, name: str) -> bool:
        return name in self._watches

    def of_topic(self, topic: bytes) -> Watch | None:
        return self._by_topic.get((False, topic))

    def of_glob(self, glob: bytes) -> Watch | None:
        return self._by_topic.get((True, glob))

    # Commands and their answers.

    def ask(
        self, verb: bytes, watches: Sequence[Watch], topics: Sequence[bytes] = ()
    ) -> Command:
        """Return a command, to be sent at once."""
        command = Command(verb, watches, topics)
        self._sent.append(command)
        return command

    def commands(self) -> list[Command]:
        """Return the commands for the watches that have changed."""
        groups: list[tuple[bytes, list[Watch]]] = []
        with self._lock:
            while self._changes:
                watch = self._changes.popleft()
                if watch.is_wanted == watch.is_asked:
                    if watch.is_asked and not watch.pending:
                        self._settle(watch)
                    self._forget(watch)
                    continue
                watch.is_asked = watch.is_wanted
                watch.is_settled = False
                watch.pending += 1
                self._by_topic[watch.is_pattern, watch.topic] = watch
                verb = b"SUBSCRIBE" if watch.is_wanted else b"UNSUBSCRIBE"
                verb = b"P" + verb if watch.is_pattern else verb
                if not groups or groups[-1][0] != verb:
                    groups.append((verb, []))
                groups[-1][1].append(watch)
        return [
            self.ask(verb, watches[start : start + _TOPICS])
            for verb, watches in groups
            for start in range(0, len(watches), _TOPICS)
        ]

    @property
    def is_answered(self) -> bool:
        """Whether the server has answered all commands."""
        return not self._sent

    def acknowledged(self) -> None:
        """Handle the acknowledgement of the next topic."""
        command = self._sent[0]
        command.left -= 1
        if not command.left:
            self._sent.popleft()
        if command.watches:
            with self._lock:
                self._done(command.watches[-1 - command.left])

    def refused(self) -> tuple[list[Command], list[Watch]] | None:
        """Handle the denial of the next command, because of one of its topics.

        Returns:
            The commands to send instead, and the denied watches; ``None`` if the
            listener's own topic was denied, or no command was sent.
        """
        if not self._sent or not self._sent[0].watches:
            return None
        command = self._sent.popleft()
        denied: list[Watch] = []
        again: list[Watch] = []
        with self._lock:
            for watch in command.watches:
                if watch.pending > 1 or command.verb.endswith(b"UNSUBSCRIBE"):
                    # A later command decides; a denied UNSUBSCRIBE does no harm.
                    self._done(watch)
                elif len(command.watches) > 1:
                    again.append(watch)
                else:
                    denied.append(watch)
        half = len(again) // 2
        halves = [some for some in (again[:half], again[half:]) if some]
        return [self.ask(command.verb, some) for some in halves], denied

    def deny(self, watch: Watch, reason: str) -> bool:
        """Give a denied name up; return whether it was wanted."""
        with self._lock:
            was_wanted, watch.is_wanted = watch.is_wanted, False
            watch.refusal = reason
            if self._watches.get(watch.name) is watch:
                del self._watches[watch.name]  # the next `watch` asks the server again
            if watch.is_settled:
                self._changes.append(watch)
            else:
                watch.pending, watch.is_asked = 0, False
                self._forget(watch)
            watch.end_waits()
        return was_wanted

    def lose(self) -> None:
        """Handle the lost connection: nothing is announced any more."""
        with self._lock:
            self._is_down = True
            self._sent.clear()
            self._by_topic.clear()
            self._changes.clear()
            self._doubtful.clear()
            self._round.clear()
            for watch in [*self._watches.values()]:
                if not watch.is_wanted:
                    del self._watches[watch.name]
                    continue
                watch.pending = 0
                watch.is_asked = watch.is_settled = False
                watch.is_doubtful = True
                self._changes.append(watch)
                watch.end_waits()

    def found(self) -> None:
        """Record that the server answers, so that `watch` waits for it again."""
        self._is_down = False

    def _done(self, watch: Watch) -> None:
        """Handle an answer, under the lock."""
        watch.pending -= 1
        if watch.is_asked and not watch.pending:
            self._settle(watch)
        self._forget(watch)

    def _settle(self, watch: Watch) -> None:
        """Record that all events stored from now on are announced; under the lock."""
        if not watch.is_settled:
            watch.is_settled = True
            if watch.is_doubtful:
                self._doubtful.append(watch)
            else:
                watch.last = None
        watch.end_waits()

    def _forget(self, watch: Watch) -> None:
        if not (watch.is_wanted or watch.is_asked or watch.pending):
            topic = watch.is_pattern, watch.topic
            if self._by_topic.get(topic) is watch:
                del self._by_topic[topic]
            if self._watches.get(watch.name) is watch:
                del self._watches[watch.name]

    # Comparing heads.

    @property
    def are_doubtful(self) -> bool:
        """Whether a settled watch may have lost announcements."""
        return bool(self._doubtful)

    def due(self, part: float) -> list[Check]:
        """Return the watches to check now: the doubtful ones, and a part of all."""
        with self._lock:
            due, self._doubtful = self._doubtful, []
            if not self._round:
                self._round.extend(self._watches.values())
            share = math.ceil(len(self._watches) * part)
            due += [self._round.popleft() for _ in range(min(share, len(self._round)))]
            settled = [watch for watch in dict.fromkeys(due) if watch.is_settled]
            checks = [Check(watch, watch.last, watch.is_doubtful) for watch in settled]
            for watch in settled:
                watch.is_doubtful = False
            return checks

    def look_again(self, checks: list[Check]) -> None:
        """Have each of these requested alone, as the server has denied one of them."""
        with self._lock:
            for watch, _, is_doubtful in checks:
                watch.is_asked_alone = True
                watch.is_doubtful = watch.is_doubtful or is_doubtful
                self._doubtful.append(watch)
