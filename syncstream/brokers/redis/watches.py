"""What one listener tells of: what is wanted, and what was asked of the server.

The server acknowledges each topic of a command by itself, in their order, and refuses a
command as a whole for one of its topics. An acknowledgement says nothing while another
one of the same topic is to come: what was asked last counts.
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

_TOPICS = 500  # of one SUBSCRIBE


class Watch:
    """A channel or pattern that is watched, or was a moment ago.

    Attributes:
        topic: Its Pub/Sub channel, or glob.
        pending: So many acknowledgements are to come.
        is_asked: The server was asked to tell of it, later than not to.
        is_settled: It has said that it does.
        is_doubtful: Something may have been lost.
        is_apart: Its head is asked for by itself: the server has refused some.
        last: The id of what was told last, or was the head once; ``None``: neither.
        refusal: Why the server does not tell of it, if so.
        waiters: Are ended when it is settled, or refused.
    """

    __slots__ = (
        *("is_apart", "is_asked", "is_doubtful", "is_pattern", "is_settled"),
        *("is_wanted", "last", "name", "pending", "refusal", "topic", "waiters"),
    )

    def __init__(self, name: str, is_pattern: bool, topic: bytes) -> None:
        self.name = name
        self.is_pattern = is_pattern
        self.topic = topic
        self.pending = 0
        self.is_wanted = True
        self.is_asked = self.is_settled = self.is_doubtful = self.is_apart = False
        self.refusal = ""
        self.last: str | None = None
        self.waiters: list[Turn] = []

    def end_waits(self) -> None:
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter.end()


class Command:
    """What the server is told, until it has acknowledged all of it.

    Attributes:
        watches: Whose topics it names; none: it is the listener's own.
        left: So many acknowledgements are to come.
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
    """A name that is looked at with a beat, as it was when that was sent."""

    watch: Watch
    last: str | None
    is_doubtful: bool


class Watches:
    """All of one listener; `watch` and `unwatch` are for any thread."""

    def __init__(self, server: Server) -> None:
        self._server = server
        # Native: threads of several hubs meet in it.
        self._lock = native(_thread, "allocate_lock")()
        self._watches: dict[str, Watch] = {}
        self._by_topic: dict[tuple[bool, bytes], Watch] = {}
        self._changes: deque[Watch] = deque()
        self._sent: deque[Command] = deque()  # they are answered in their order
        self._doubtful: list[Watch] = []
        self._round: deque[Watch] = deque()  # whose heads are to be compared
        self._is_down = False

    # From any thread.

    def watch(self, name: str, timeout: float, wake: Callable[[], None]) -> None:
        """Have it told of; wait until it is, at most so many seconds.

        What was not in time is looked at later, as after a loss.

        Args:
            wake: Wakes the listener.

        Raises:
            Denied: The server refuses it.
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
        """Return what is wanted; in a forked child, too, whoever has the lock."""
        return [watch.name for watch in self._watches.values() if watch.is_wanted]

    def abandon(self) -> None:
        """Go on without those who have the lock: they are in the parent of a fork."""
        self._lock = native(_thread, "allocate_lock")()

    # From here on by the listener alone.

    def __contains__(self, name: str) -> bool:
        return name in self._watches

    def of_topic(self, topic: bytes) -> Watch | None:
        return self._by_topic.get((False, topic))

    def of_glob(self, glob: bytes) -> Watch | None:
        return self._by_topic.get((True, glob))

    # What the server is told, and answers.

    def ask(
        self, verb: bytes, watches: Sequence[Watch], topics: Sequence[bytes] = ()
    ) -> Command:
        """Return a command that is to be sent now."""
        command = Command(verb, watches, topics)
        self._sent.append(command)
        return command

    def commands(self) -> list[Command]:
        """Return what is to be sent for what has changed."""
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
        """The server has answered all that it was told."""
        return not self._sent

    def acknowledged(self) -> None:
        """Take note that the server does what it was asked for the next topic."""
        command = self._sent[0]
        command.left -= 1
        if not command.left:
            self._sent.popleft()
        if command.watches:
            with self._lock:
                self._done(command.watches[-1 - command.left])

    def refused(self) -> tuple[list[Command], list[Watch]] | None:
        """Take note that it does not, for one of the next command's topics.

        Returns:
            The commands to send instead, and the names that are refused; ``None``:
            it was the listener's own, or none at all.
        """
        if not self._sent or not self._sent[0].watches:
            return None
        command = self._sent.popleft()
        denied: list[Watch] = []
        again: list[Watch] = []
        with self._lock:
            for watch in command.watches:
                if watch.pending > 1 or command.verb.endswith(b"UNSUBSCRIBE"):
                    # Another command has the last word; or it may tell for ever.
                    self._done(watch)
                elif len(command.watches) > 1:
                    again.append(watch)
                else:
                    denied.append(watch)
        half = len(again) // 2
        halves = [some for some in (again[:half], again[half:]) if some]
        return [self.ask(command.verb, some) for some in halves], denied

    def deny(self, watch: Watch, reason: str) -> bool:
        """Give a name up; return whether it was wanted."""
        with self._lock:
            was_wanted, watch.is_wanted = watch.is_wanted, False
            watch.refusal = reason
            if self._watches.get(watch.name) is watch:
                del self._watches[watch.name]  # who asks again has the server asked
            if watch.is_settled:
                self._changes.append(watch)
            else:
                watch.pending, watch.is_asked = 0, False
                self._forget(watch)
            watch.end_waits()
        return was_wanted

    def lose(self) -> None:
        """Take note that the server tells of nothing any more."""
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
        """Take note that it answers: who watches waits for it again."""
        self._is_down = False

    def _done(self, watch: Watch) -> None:
        """Take note of an answer; under the lock."""
        watch.pending -= 1
        if watch.is_asked and not watch.pending:
            self._settle(watch)
        self._forget(watch)

    def _settle(self, watch: Watch) -> None:
        """Take note that what is stored from now on is told; under the lock."""
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

    # Whose heads are compared.

    @property
    def are_doubtful(self) -> bool:
        """Something of one that is told of by now may have been lost."""
        return bool(self._doubtful)

    def due(self, part: float) -> list[Check]:
        """Return those to be looked at now: what is doubtful, and a part of all."""
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
        """Have each of them asked for by itself: the server has refused one."""
        with self._lock:
            for watch, _, is_doubtful in checks:
                watch.is_apart = True
                watch.is_doubtful = watch.is_doubtful or is_doubtful
                self._doubtful.append(watch)
