"""The thread or greenlet that listens for new events and reports them to the hub."""

from __future__ import annotations

import _socket
import _thread
import functools
import logging
import math
import random
import secrets
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from redis.exceptions import (
    NoPermissionError,
    RedisError,
    ResponseError,
)

from ...errors import BrokerError, Denied
from ...runtime.clock import time
from ...runtime.journal import report
from ...runtime.sockets import native
from ...runtime.waiter import Turn
from ...runtime.waiting import say, sleep
from ..log import Entry
from ..names import is_pattern, matches
from .scripts import HEADS, ID_BYTES
from .server import OF_NAME, RIGHTS, Server, is_at_home, is_patched, main_hub

if TYPE_CHECKING:
    from .process import Process

__all__ = ["Listener"]

log = logging.getLogger("syncstream.brokers.redis")
BEAT = 2.0  # seconds between two messages to oneself
DEAF = 5.0  # seconds without them, and the connection is given up
ROUND = 30.0  # seconds in which the heads of all channels are compared
BACKOFF = 0.05, 2.0  # seconds between attempts to connect: the first, the longest
_AT_ONCE = 64  # messages until others may run
_KEYS = 100  # of one request for heads
_TOPICS = 500  # of one SUBSCRIBE


class _Watch:
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


class _Asked:
    """A command that tells what is wanted, until it is acknowledged.

    Attributes:
        watches: Whose topics it names; none: it is our own.
        left: So many acknowledgements are to come.
    """

    __slots__ = ("left", "verb", "watches")

    def __init__(self, verb: bytes, watches: Sequence[_Watch]) -> None:
        self.verb = verb
        self.watches = watches
        self.left = max(1, len(watches))


class _Check(NamedTuple):
    """A name that is looked at with a beat, as it was when that was sent."""

    watch: _Watch
    last: str | None
    is_doubtful: bool


class Listener:
    """Who is told by one server, in one process: a thread; a greenlet under gevent.

    It is told over one connection, which nobody else touches. Every `BEAT` seconds it
    sends a message to itself, by one of those that publish: what does not come back
    shows a connection that is dead, or leads elsewhere. With each it asks for some
    channels' heads. All that was told of before these were read has come when the
    message comes back: a head that is another one shows a loss.
    """

    def __init__(self, server: Server, process: Process) -> None:
        self._server = server
        self._process = process
        self._lock = native(_thread, "allocate_lock")()
        self._watches: dict[str, _Watch] = {}
        self._by_topic: dict[tuple[bool, bytes], _Watch] = {}
        self._changes: deque[_Watch] = deque()
        self._sent: deque[_Asked] = deque()  # they are answered in their order
        self._doubtful: list[_Watch] = []
        self._spoilt: dict[str, None] = {}  # channels that had what is no event
        self._has_warned = False
        self._round: deque[_Watch] = deque()  # whose heads are to be compared
        # gevent's sockets would wait in the hub of whoever makes this.
        self._waker, self._woken = _socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._is_woken = False
        self.is_closed = False
        self._is_down = False
        self._own = server.own()
        self._sub: Any = None
        self._beats: Any = None  # by which the beat that is out was sent
        self._sent_at: float | None = None  # when the beat that is out was
        self._next_beat = 0.0
        self._has_beaten = False
        self._token = b""
        self._answers: list[Any] = []
        self._checked: list[list[_Check]] = []  # a request for heads each
        self._replies: list[Any] | None = None  # to the beat; `None`: it has not come
        self._is_echoed = False  # the message of the beat has come
        # When the beat began that has come back last, for `Health.works`: what comes
        # after it was published since then.
        self._fresh = 0
        self._began = 0  # likewise, of the beat that is out
        self._told: tuple[bytes, bytes] | None = None
        self._has_more = False
        self._has_ended = False
        self._joining: list[Turn] = []  # who waits for that

    # From any thread.

    def start(self) -> None:
        if not is_patched():
            threading.Thread(
                target=self._run, name="syncstream-redis", daemon=True
            ).start()
            return
        # No patched thread: a forked child has this greenlet, too, and does not know
        # the thread that would end there. In the main hub, whoever asks: others run
        # only while somebody waits in them.
        home = sys.modules["gevent"].get_hub() if is_at_home() else main_hub()
        home.loop.run_callback_threadsafe(sys.modules["gevent"].spawn, self._run)

    def abandon(self) -> None:
        """Leave it to the parent of a fork, all of whose threads are not here."""
        self.is_closed = True
        self._lock = native(_thread, "allocate_lock")()

    def stop(self) -> None:
        self.is_closed = True
        self._wake()

    def join(self, timeout: float) -> None:
        turn = Turn()
        self._joining.append(turn)
        # Looked at after that: it ends those who wait after it has said so.
        if self._has_ended or turn.wait(time.monotonic() + timeout) or not timeout:
            return
        text = "the listener of %s did not end"
        report(log, logging.WARNING, text, self._server.name)

    def watched(self) -> list[str]:
        return [watch.name for watch in self._watches.values() if watch.is_wanted]

    def watch(self, name: str, timeout: float) -> None:
        """Have it told of; wait until it is, at most so many seconds.

        What was not in time is looked at later, as after a loss.

        Raises:
            Denied: The server refuses it.
        """
        waiter = None
        with self._lock:
            watch = self._watches.get(name)
            if watch is None:
                watch = self._watches[name] = self._new_watch(name)
            watch.is_wanted = True
            if watch.is_settled:
                return
            if timeout and not self._is_down:
                waiter = Turn()
                watch.waiters.append(waiter)
            else:
                watch.is_doubtful = True
            self._changes.append(watch)
        self._wake()
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

    def _new_watch(self, name: str) -> _Watch:
        if is_pattern(name):
            return _Watch(name, True, self._server.glob(name))
        return _Watch(name, False, self._server.topic(name))

    def unwatch(self, name: str) -> None:
        with self._lock:
            watch = self._watches.get(name)
            if watch is None:
                return
            watch.is_wanted = False
            self._changes.append(watch)
        self._wake()

    def _wake(self) -> None:
        # It clears the mark before it looks at what there is to do.
        if not self._is_woken:
            self._is_woken = True
            with suppress(OSError):  # it is awake, or closed
                self._waker.send(b"\0")

    # Its thread.

    def _run(self) -> None:
        try:
            self._follow()
        finally:
            self._server.close()
            self._waker.close()
            self._woken.close()
            self._has_ended = True
            for turn in self._joining:
                turn.end()

    def _follow(self) -> None:
        first, longest = BACKOFF
        delay = first
        while not self.is_closed:
            reason = "closed"
            self._has_beaten = False
            try:
                self._connect()
                self._listen()
            except (RedisError, OSError, BrokerError) as error:
                reason = str(error)
            except Exception as error:
                reason = repr(error)
                text = "the listener of %s has failed"
                say(log, logging.ERROR, text, self._server.name, error=error)
            finally:
                self._try(self._disconnect)
            if not self.is_closed:
                self._try(functools.partial(self._lose, reason))
                delay = first if self._has_beaten else min(2 * delay, longest)
                self._wait(random.uniform(delay / 2, delay), [self._woken])
        self._lose("closed", is_told=False)

    def _connect(self) -> None:
        self._sub = self._server.connect(time.monotonic() + self._process.timeout)
        self._send(b"SUBSCRIBE", ())
        self._ask()
        self._sent_at = None
        self._next_beat = time.monotonic() + BEAT
        self._has_more = False

    def _try(self, step: Callable[[], object]) -> None:
        """Take a step between two connections: the next one comes without it, too."""
        try:
            step()
        except Exception as error:
            text = "the listener of %s could not let go"
            say(log, logging.ERROR, text, self._server.name, error=error)

    def _disconnect(self) -> None:
        connections, self._sub, self._beats = (self._sub, self._beats), None, None
        for connection in connections:
            if connection is not None:
                connection.disconnect()

    def _lose(self, reason: str, is_told: bool = True) -> None:
        """Take note that nothing is told any more."""
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
                for waiter in watch.waiters:
                    waiter.end()
                watch.waiters = []
        self._server.forget_idle()
        if is_told:
            self._server.fails("listen", reason)

    def _listen(self) -> None:
        while True:
            now = time.monotonic()
            if self._sent_at is None and (
                now >= self._next_beat
                or (not self._sent and (self._doubtful or not self._has_beaten))
            ):
                self._beat(now)
            ends = self._next_beat if self._sent_at is None else self._deaf_at()
            left = 0.0 if self._has_more else max(0.0, ends - now)
            beats = [] if self._beats is None else [self._beats._sock]
            self._wait(left, [self._woken, self._sub._sock, *beats])
            if self.is_closed:
                return
            self._ask()
            self._take_some()
            self._take_replies()
            if self._is_echoed and self._replies is not None:
                self._heard(self._replies)
            if self._sent_at is not None and time.monotonic() > self._deaf_at():
                raise BrokerError(f"{self._server.name} is silent")

    def _deaf_at(self) -> float:
        assert self._sent_at is not None
        return self._sent_at + DEAF - BEAT

    def _wait(self, seconds: float, socks: list[Any]) -> None:
        """Wait until one of them can be read, or the time is over."""
        if hasattr(select, "poll"):  # gevent's, where that has patched it
            poll = select.poll()
            for sock in socks:
                poll.register(sock, select.POLLIN)
            poll.poll(seconds * 1000)
        else:
            select.select(socks, [], [], seconds)
        with suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
        self._is_woken = False

    def _ask(self) -> None:
        """Tell the server what is wanted now."""
        commands: list[tuple[bytes, list[_Watch]]] = []
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
                if not commands or commands[-1][0] != verb:
                    commands.append((verb, []))
                commands[-1][1].append(watch)
        for verb, watches in commands:
            for start in range(0, len(watches), _TOPICS):
                self._send(verb, watches[start : start + _TOPICS])

    def _send(self, verb: bytes, watches: Sequence[_Watch]) -> None:
        self._sent.append(_Asked(verb, watches))
        topics = [watch.topic for watch in watches] or [self._own]
        self._sub.send_command(verb, *topics)

    def _settle(self, watch: _Watch) -> None:
        """Take note that what is stored from now on is told; under the lock."""
        if not watch.is_settled:
            watch.is_settled = True
            if watch.is_doubtful:
                self._doubtful.append(watch)
            else:
                watch.last = None
        for waiter in watch.waiters:
            waiter.end()
        watch.waiters = []

    def _forget(self, watch: _Watch) -> None:
        if not (watch.is_wanted or watch.is_asked or watch.pending):
            topic = watch.is_pattern, watch.topic
            if self._by_topic.get(topic) is watch:
                del self._by_topic[topic]
            if self._watches.get(watch.name) is watch:
                del self._watches[watch.name]

    def _take_some(self) -> None:
        sub = self._sub
        for _ in range(_AT_ONCE):
            if not sub.can_read(timeout=0):
                self._has_more = False
                return
            try:
                reply = sub.read_response(disconnect_on_error=False)
            except NoPermissionError as error:
                self._refused(str(error))
            else:
                self._take(reply)
        self._has_more = True
        sleep(0)

    def _take(self, reply: Any) -> None:
        match reply:
            case [b"message", self._own, data]:
                if data == self._token:
                    self._is_echoed = True
                    self._fresh = self._began
            case [b"message", bytes(topic), bytes(data)]:
                watch = self._by_topic.get((False, topic))
                if watch is not None:
                    self._deliver(watch, watch.name, topic, data)
            case [b"pmessage", bytes(glob), bytes(topic), bytes(data)]:
                watch = self._by_topic.get((True, glob))
                channel = self._server.channel(topic)
                if watch is not None and channel and matches(watch.name, channel):
                    self._deliver(None, channel, topic, data)
            case [
                b"subscribe" | b"unsubscribe" | b"psubscribe" | b"punsubscribe",
                *_,
            ] if self._sent:
                self._acknowledged()

    def _acknowledged(self) -> None:
        asked = self._sent[0]
        asked.left -= 1
        if not asked.left:
            self._sent.popleft()
        if asked.watches:
            with self._lock:
                self._done(asked.watches[-1 - asked.left])

    def _done(self, watch: _Watch) -> None:
        """Take note that the server does what it was asked; under the lock."""
        watch.pending -= 1
        if watch.is_asked and not watch.pending:
            self._settle(watch)
        self._forget(watch)

    def _refused(self, reason: str) -> None:
        """Take note that a command is not allowed: all of it, for one of its names."""
        if not self._sent or not self._sent[0].watches:
            raise BrokerError(f"{self._server.name} has refused it: {reason}; {RIGHTS}")
        asked = self._sent.popleft()
        denied: list[_Watch] = []
        again: list[_Watch] = []
        with self._lock:
            for watch in asked.watches:
                if watch.pending > 1 or asked.verb.endswith(b"UNSUBSCRIBE"):
                    # Another command has the last word; or it may tell for ever.
                    self._done(watch)
                elif len(asked.watches) > 1:
                    again.append(watch)
                else:
                    denied.append(watch)
        half = len(again) // 2
        for some in (again[:half], again[half:]):
            if some:
                self._send(asked.verb, some)
        for watch in denied:
            self._deny(watch, reason)

    def _deny(self, watch: _Watch, reason: str) -> None:
        """Give a name up, and say so to those who wait for it, and to the sink."""
        reason = f"{self._server.name} does not allow it: {reason}; {RIGHTS}"
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
            for waiter in watch.waiters:
                waiter.end()
            watch.waiters = []
        sink = self._process.health.sink
        if was_wanted and sink is not None:
            sink.deny(watch.name, reason)

    def _deliver(
        self, watch: _Watch | None, channel: str, topic: bytes, data: bytes
    ) -> None:
        id, _, rest = data.partition(b" ")
        prev, space, payload = rest.partition(b" ")
        # One message comes once for the channel, and once for each of its patterns.
        if space and self._told == (topic, id):
            return
        if not (space and ID_BYTES.fullmatch(id) and ID_BYTES.fullmatch(prev)):
            self._spoil(channel, "it is no event")
            return
        self._told = topic, id
        entry = Entry(id.decode(), prev.decode(), payload, time.monotonic())
        if watch is not None:
            watch.last = entry.id
        sink = self._process.health.sink
        if sink is None:
            return
        try:
            sink.deliver(channel, entry)
        except Exception as error:
            self._spoil(channel, repr(error))
        else:
            self._server.works("publish", since=self._fresh)  # somebody can

    def _spoil(self, channel: str, problem: str) -> None:
        """Drop a message, and have its channel read anew, with the next beat.

        Anybody whom the server allows to may send such, as often as he likes, and
        under names without end that a pattern matches.
        """
        if channel in self._watches or len(self._spoilt) < _KEYS:
            self._spoilt[channel] = None
        if not self._has_warned:
            self._has_warned = True
            text = "a message of %s to %r is dropped, and more such may be: %s"
            say(log, logging.WARNING, text, self._server.name, channel, problem)

    # Beats.

    def _beat(self, now: float) -> None:
        """Ask for heads, then send a message to ourselves."""
        with self._lock:
            checks = self._to_check()
        named = [check for check in checks if not check.watch.is_pattern]
        apart = [[check] for check in named if check.watch.is_apart]
        named = [check for check in named if not check.watch.is_apart]
        self._checked = [
            [check for check in checks if check.watch.is_pattern],
            *(named[start : start + _KEYS] for start in range(0, len(named), _KEYS)),
            *apart,
        ]
        commands: list[tuple[bytes, ...]] = []
        for some in self._checked[1:]:
            keys = [self._server.key(check.watch.name) for check in some]
            keys.append(self._server.marks)
            number = b"%d" % len(keys)
            commands.append((b"EVAL", HEADS.text, number, *keys, self._process.ttl))
        self._began = self._server.moment()
        self._token = b"%x" % secrets.randbits(64)
        commands.append((b"PUBLISH", self._own, self._token))
        self._beats = self._server.take(now + DEAF)
        self._replies = None
        self._answers = []
        self._is_echoed = False
        packed = self._beats.pack_commands(commands)
        self._beats.send_packed_command(packed, check_health=False)
        self._sent_at = now
        self._next_beat = now + BEAT * random.uniform(0.9, 1.1)

    def _to_check(self) -> list[_Check]:
        """Return those whose heads are asked for now, under the lock."""
        due, self._doubtful = self._doubtful, []
        if not self._round:
            self._round.extend(self._watches.values())
        share = math.ceil(len(self._watches) * BEAT / ROUND)
        due += [self._round.popleft() for _ in range(min(share, len(self._round)))]
        settled = [watch for watch in dict.fromkeys(due) if watch.is_settled]
        checked = [_Check(watch, watch.last, watch.is_doubtful) for watch in settled]
        for watch in settled:
            watch.is_doubtful = False
        return checked

    def _take_replies(self) -> None:
        """Take the replies to a beat, as far as they have come."""
        beats = self._beats
        while beats is not None and self._replies is None and beats.can_read(timeout=0):
            try:
                reply = beats.read_response(disconnect_on_error=False)
            except ResponseError as error:
                reply = error
            self._answers.append(reply)
            # The message's own is the last; the patterns have none.
            if len(self._answers) < len(self._checked):
                continue
            if isinstance(reply, Exception):
                raise BrokerError(
                    f"{self._server.name} does not let us hear ourselves:"
                    f" {reply}; {RIGHTS}"
                )
            self._replies = self._answers[:-1]

    def _heard(self, replies: list[Any]) -> None:
        """Compare the heads: all that was told of before has come."""
        self._server.give_back(self._beats)
        self._beats = None
        patterns, *named = self._checked
        # Nobody can say which channels it would have brought.
        lost = [check.watch.name for check in patterns if check.is_doubtful]
        refusals = []
        for checks, reply in zip(named, replies, strict=True):
            if isinstance(reply, list) and len(reply) == len(checks):
                for check, head in zip(checks, reply, strict=True):
                    check.watch.is_apart = False
                    lost += self._compared(check, head)
            elif not OF_NAME.search(str(reply)):
                refusals.append(reply)
                for check in checks:
                    lost += self._compared(check, None)
            elif len(checks) > 1:
                self._look_again(checks)
            else:
                self._deny(checks[0].watch, str(reply))
        self._checked = []
        self._replies = None
        self._sent_at = None
        self._has_beaten = True
        self._is_down = False
        self._server.works("connect", "listen", since=self._began)
        for reply in refusals[:1]:
            reason = f"{self._server.name} tells no heads: {reply}; {RIGHTS}"
            self._server.fails("heads", reason)
        if named and not refusals:
            self._server.works("heads", since=self._began)
        spoilt, self._spoilt = self._spoilt, {}
        lost = [*dict.fromkeys([*lost, *spoilt])]
        sink = self._process.health.sink
        if lost and sink is not None:
            sink.resync(lost)

    def _compared(self, check: _Check, reply: Any) -> list[str]:
        """Compare a head; return the name if something may be lost."""
        watch, last, is_doubtful = check
        head = reply.decode(errors="replace") if isinstance(reply, bytes) else None
        # What has come meanwhile names what it follows.
        if watch.last != last:
            return []
        watch.last = head
        if is_doubtful if last is None or head is None else head != last:
            return [watch.name]
        return []

    def _look_again(self, checks: list[_Check]) -> None:
        """Have each of them asked for by itself: the server has refused one."""
        with self._lock:
            for watch, _, is_doubtful in checks:
                watch.is_apart = True
                watch.is_doubtful = watch.is_doubtful or is_doubtful
                self._doubtful.append(watch)
