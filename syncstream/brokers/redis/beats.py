"""Beats: messages to oneself, which show that announcements arrive and none was lost.

Every `BEAT` seconds a listener publishes a message to itself, over another connection
than the one that it listens on. If the message does not arrive, the listening
connection is dead, or leads to another server. With each beat the listener asks for
some channels' heads. When the message arrives, all announcements from before those
heads were read have arrived, too: a different head shows a loss.
"""

from __future__ import annotations

import secrets
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from ...errors import BrokerError
from ...runtime.clock import time
from ..tail import jitter
from .scripts import HEADS
from .server import OF_NAME, RIGHTS, Server, socket_of
from .watches import Check, Watch, Watches

__all__ = ["Beats", "Compared"]

BEAT = 2.0  # seconds between two beats
DEAF = 5.0  # seconds without a beat until the connection is abandoned
ROUND = 30.0  # seconds within which the heads of all channels are compared
KEYS = 100  # keys in one request for heads


class Compared(NamedTuple):
    """The result of comparing the heads of a beat.

    Attributes:
        lost: The names whose announcements may have been lost.
        denied: The watches that the server denies, each with its reason.
        refusal: The reason why the server denies heads of any name; ``""`` if it does
            not.
        was_asked: Whether heads were requested.
        since: The `Health.moment` at which the beat began.
    """

    lost: list[str]
    denied: list[tuple[Watch, str]]
    refusal: str
    was_asked: bool
    since: int


class Beats:
    """The beats of one listener, for its thread.

    Attributes:
        own: The Pub/Sub channel of the beats' messages.
        fresh: The `Health.moment` at which the last arrived beat began: later messages
            were published after it.
    """

    def __init__(self, server: Server, watches: Watches, ttl: bytes) -> None:
        self._server = server
        self._watches = watches
        self._ttl = ttl
        self.own = server.own()
        self.fresh = 0
        self._connection: Any = None  # the connection by which a beat was sent
        self._sent_at: float | None = None  # when; ``None``: no beat is under way
        self._began = 0
        self._next = 0.0
        self._has_come = False  # a beat of this connection has arrived
        self._token = b""
        self._checked: list[list[Check]] = []  # the checks of each request for heads
        self._answers: list[Any] = []
        self._replies: list[Any] | None = None  # ``None``: not complete yet
        self._is_echoed = False

    def begin(self) -> None:
        """Begin anew on a new connection."""
        self._sent_at = None
        self._next = time.monotonic() + BEAT
        self._has_come = False

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()

    @property
    def sockets(self) -> list[Any]:
        """The sockets on which replies arrive."""
        return [] if self._connection is None else [socket_of(self._connection)]

    def left(self) -> float:
        """Return the seconds until the next beat, or until the current one is late."""
        ends = self._next if self._sent_at is None else self._deaf_at()
        return max(0.0, ends - time.monotonic())

    @property
    def are_late(self) -> bool:
        return self._sent_at is not None and time.monotonic() > self._deaf_at()

    def _deaf_at(self) -> float:
        assert self._sent_at is not None
        return self._sent_at + DEAF - BEAT

    def go_on(self) -> None:
        """Send a beat if it is time, or at once if announcements may be lost."""
        now = time.monotonic()
        if self._sent_at is None and (
            now >= self._next
            or (
                self._watches.is_answered
                and (self._watches.are_doubtful or not self._has_come)
            )
        ):
            self._send(now)

    def _send(self, now: float) -> None:
        """Ask for heads, then publish the message to ourselves."""
        checks = self._watches.due(BEAT / ROUND)
        named = [check for check in checks if not check.watch.is_pattern]
        alone = [[check] for check in named if check.watch.is_asked_alone]
        named = [check for check in named if not check.watch.is_asked_alone]
        self._checked = [
            [check for check in checks if check.watch.is_pattern],
            *(named[start : start + KEYS] for start in range(0, len(named), KEYS)),
            *alone,
        ]
        commands: list[tuple[bytes, ...]] = []
        for some in self._checked[1:]:
            keys = [self._server.key(check.watch.name) for check in some]
            keys.append(self._server.marks)
            number = b"%d" % len(keys)
            commands.append((b"EVAL", HEADS.text, number, *keys, self._ttl))
        self._began = self._server.moment()
        self._token = b"%x" % secrets.randbits(64)
        commands.append((b"PUBLISH", self.own, self._token))
        self._connection = self._server.take(now + DEAF)
        self._replies = None
        self._answers = []
        self._is_echoed = False
        packed = self._connection.pack_commands(commands)
        self._connection.send_packed_command(packed, check_health=False)
        self._sent_at = time.monotonic()  # to find a connection may have taken long
        # Jitter: listeners that began together must not beat together for ever.
        self._next = now + BEAT * jitter(0.9, 1.1)

    def echo(self, data: bytes) -> None:
        """Take a message that has arrived on `own`, where others may publish, too."""
        if data == self._token:
            self._is_echoed = True
            self.fresh = self._began

    def take(self) -> Compared | None:
        """Take the replies so far; compare the heads when all have arrived.

        Raises:
            BrokerError: The server denies publishing to `own`.
        """
        while (
            self._connection is not None
            and self._replies is None
            and self._connection.can_read(timeout=0)
        ):
            try:
                reply = self._connection.read_response(disconnect_on_error=False)
            except ResponseError as error:
                reply = error
            self._answers.append(reply)
            # The last reply is that of PUBLISH; patterns have no reply.
            if len(self._answers) < len(self._checked):
                continue
            if isinstance(reply, Exception):
                raise BrokerError(
                    f"{self._server.name} denies publishing to the listener's own"
                    f" channel, by which it detects losses: {reply}; {RIGHTS}"
                )
            self._replies = self._answers[:-1]
        if not self._is_echoed or self._replies is None:
            return None
        return self._compare(self._replies)

    def _compare(self, replies: list[Any]) -> Compared:
        """Compare the heads: all announcements from before have arrived."""
        self._server.give_back(self._connection)
        self._connection = None
        patterns, *named = self._checked
        # Nothing shows which channels a pattern's lost announcements were of.
        lost = [check.watch.name for check in patterns if check.is_doubtful]
        denied: list[tuple[Watch, str]] = []
        refusal = ""
        for checks, reply in zip(named, replies, strict=True):
            if isinstance(reply, list) and len(reply) == len(checks):
                for check, head in zip(checks, reply, strict=True):
                    check.watch.is_asked_alone = False
                    lost += _lost(check, head)
            elif not OF_NAME.search(str(reply)):
                refusal = refusal or str(reply)
                for check in checks:
                    lost += _lost(check, None)
            elif len(checks) > 1:
                self._watches.look_again(checks)
            else:
                denied.append((checks[0].watch, str(reply)))
        self._checked = []
        self._replies = None
        self._sent_at = None
        self._has_come = True
        return Compared(lost, denied, refusal, bool(named), self._began)


def _lost(check: Check, reply: Any) -> list[str]:
    """Compare a head; return the name if announcements may be lost, else nothing."""
    watch, last, is_doubtful = check
    head = reply.decode(errors="replace") if isinstance(reply, bytes) else None
    # An event has arrived meanwhile, and names its predecessor.
    if watch.last != last:
        return []
    watch.last = head
    if is_doubtful if last is None or head is None else head != last:
        return [watch.name]
    return []
